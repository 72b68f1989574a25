"""What the rank does when an attempt has ended, for every kind of end."""

from __future__ import annotations

import itertools

import pytest

from rfaas_mpi.policy import MAX_REISSUES, MAX_UNKNOWN, End, decide
from rfaas_mpi.types import Action, Outcome

ENDED = [outcome for outcome in Outcome if outcome is not Outcome.PENDING]


def lost(cause: str, **facts) -> Action:
    return decide(End(Outcome.LOST, cause=cause, **facts))


@pytest.mark.parametrize(("outcome", "action"), [
    (Outcome.OK, Action.DELIVER),
    (Outcome.LARGE, Action.FETCH),
    (Outcome.KERNEL_ERROR, Action.FAIL_KERNEL),
    (Outcome.BAD_KERNEL, Action.FAIL_BAD_KERNEL),
    (Outcome.TIMEOUT, Action.FAIL_TIMEOUT),
    (Outcome.CANCELLED, Action.CANCEL),
    (Outcome.NO_WORKER, Action.RUN_ON_RANK),
    (Outcome.NO_ROOM, Action.FAIL_NO_ROOM),
])
def test_an_end_without_a_lost_worker_speaks_for_itself(outcome, action):
    assert decide(End(outcome)) is action


def test_what_the_kernel_did_is_never_tried_again():
    assert lost("kernel", reason="signal") is Action.FAIL_KERNEL
    assert lost("kernel", reason="memory") is Action.FAIL_KERNEL
    assert lost("kernel", reason="deadline") is Action.FAIL_TIMEOUT


def test_a_neighbour_of_a_crashing_kernel_runs_again():
    assert lost("kernel", reason="signal", own=False) is Action.REISSUE
    assert lost("unknown", own=False, unexplained=MAX_UNKNOWN) is Action.REISSUE


def test_infrastructure_may_take_three_workers_then_the_rank_runs_it():
    actions = [lost("infrastructure", lost=n) for n in range(MAX_REISSUES + 1)]
    assert actions == [Action.REISSUE] * 3 + [Action.RUN_ON_RANK]


def test_without_fallback_it_fails_instead_of_running_on_the_rank():
    assert lost("infrastructure", lost=MAX_REISSUES, fallback=False) is Action.FAIL_LOST
    assert decide(End(Outcome.NO_WORKER, fallback=False)) is Action.FAIL_LOST
    assert decide(End(Outcome.BUSY, lost=MAX_REISSUES, fallback=False)) is Action.FAIL_LOST


def test_an_unexplained_end_is_tried_once_elsewhere_then_it_is_the_kernels():
    assert lost("unknown") is Action.REISSUE
    assert lost("unknown", unexplained=1) is Action.FAIL_KERNEL


@pytest.mark.parametrize("outcome", ENDED)
def test_a_forced_cancel_that_was_accepted_never_delivers(outcome):
    assert decide(End(outcome, cause="kernel", forced=True)) is Action.CANCEL


@pytest.mark.parametrize("outcome", ENDED)
def test_nothing_is_started_by_a_closed_executor(outcome):
    for cause, count, own in itertools.product(("infrastructure", "unknown"), range(5), (True, False)):
        end = End(outcome, cause=cause, lost=count, own=own, closed=True)
        assert decide(end) not in (Action.REISSUE, Action.RUN_ON_RANK)


def test_every_end_has_an_action_and_re_issues_come_to_an_end():
    for outcome, cause, own in itertools.product(
            ENDED, ("kernel", "infrastructure", "unknown", "something new"), (True, False)):
        tries, lost_so_far, unexplained = 0, 0, 0
        while True:
            action = decide(End(outcome, cause=cause, own=own, lost=lost_so_far, unexplained=unexplained))
            if action is not Action.REISSUE:
                break
            tries += 1
            if own and cause == "unknown" and outcome is Outcome.LOST:
                unexplained += 1
            else:
                lost_so_far += 1
        assert tries <= MAX_REISSUES


def test_what_has_not_ended_has_no_action():
    with pytest.raises(ValueError, match="not ended"):
        decide(End(Outcome.PENDING))

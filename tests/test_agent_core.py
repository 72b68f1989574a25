"""The agent's decisions, without a process."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfaas_mpi.agent.core import (
    BACK_OFF_S,
    DEATHS,
    LAST_LINES,
    POLL_S,
    AgentCore,
    Close,
    Exit,
    Fork,
    Kill,
    Meter,
    Page,
    Quit,
    Stopped,
    Tell,
    Withdraw,
    classify,
)

LEASE, OWNER, OTHER = 7, 100, 200
SIGNALS_OF_KERNELS = [signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS,
                      signal.SIGTRAP, signal.SIGPIPE, signal.SIGXCPU, signal.SIGXFSZ]


def serving(core: AgentCore, seats: int = 1) -> list[int]:
    """Starts a lease whose workers are all up; their numbers."""
    numbers, _ = core.start(LEASE, OWNER, {seat: (seat,) for seat in range(seats)}, 1 << 20, now=0.0)
    for number in numbers.values():
        core.forked(number, 1000 + number)
        core.ready(number)
    return list(numbers.values())


def of(kind: type, actions: list) -> list:
    return [action for action in actions if isinstance(action, kind)]


def ends_told(actions: list) -> dict[int, object]:
    """session → the WorkerEnded that it is told."""
    return {session: tell.event for tell in of(Tell, actions) for session in tell.sessions}


# --- who caused an end ----------------------------------------------------------

@pytest.mark.parametrize("number", SIGNALS_OF_KERNELS)
def test_a_fault_in_an_invocation_is_the_kernels(number):
    assert classify(Exit(signal=number), Page(invocation=5), killed="", kill_invocation=0) == ("kernel", "signal")


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_kernel_that_exits_is_the_kernels_fault(code):
    assert classify(Exit(exit_code=code), Page(invocation=5), killed="", kill_invocation=0) == ("kernel", "exit")


@pytest.mark.parametrize("how", [Exit(signal=signal.SIGSEGV), Exit(signal=signal.SIGKILL), Exit(exit_code=1)])
def test_an_idle_workers_end_is_never_a_kernels_fault(how):
    assert classify(how, Page(), killed="", kill_invocation=0)[0] == "infrastructure"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_that_nobody_of_ours_sent_is_unknown(number):
    assert classify(Exit(signal=number), Page(invocation=5), killed="", kill_invocation=0) == ("unknown", "signal")


def test_a_kill_for_lack_of_memory_is_the_kernels():
    ended = Exit(signal=signal.SIGKILL, oom=True)
    assert classify(ended, Page(invocation=5), killed="", kill_invocation=0) == ("kernel", "memory")


def test_a_kill_at_the_time_limit_is_the_kernels_only_if_it_hit_that_invocation():
    ended = Exit(signal=signal.SIGKILL)
    assert classify(ended, Page(invocation=5), killed="deadline", kill_invocation=5) == ("kernel", "deadline")
    assert classify(ended, Page(invocation=6), killed="deadline", kill_invocation=5) == ("infrastructure", "deadline")
    assert classify(ended, Page(), killed="deadline", kill_invocation=5) == ("infrastructure", "deadline")


@given(killed=st.sampled_from(["released", "revoked", "expired"]), invocation=st.integers(0, 3),
       number=st.sampled_from([0, *SIGNALS_OF_KERNELS, signal.SIGKILL]))
def test_what_the_service_stops_is_never_a_kernels_fault(killed, invocation, number):
    ended = Exit(signal=number)
    assert classify(ended, Page(invocation=invocation), killed=killed, kill_invocation=0) == ("infrastructure", killed)


def test_a_fault_that_came_before_our_kill_is_still_the_kernels():
    ended = Exit(signal=signal.SIGSEGV)
    assert classify(ended, Page(invocation=5), killed="deadline", kill_invocation=5) == ("kernel", "signal")


# --- who is told ------------------------------------------------------------------

def test_only_the_session_whose_invocation_ran_learns_its_id():
    core = AgentCore()
    [worker] = serving(core)
    core.attach(worker, LEASE, OWNER)
    theirs = core.attach(worker, LEASE, OTHER)
    told = ends_told(core.ended(worker, Exit(signal=signal.SIGSEGV), Page(invocation=5, connection=theirs), 1.0))
    assert {session: event.invocation for session, event in told.items()} == {OWNER: 0, OTHER: 5}


def test_a_session_that_hung_up_is_not_told():
    core = AgentCore()
    [worker] = serving(core)
    connection = core.attach(worker, LEASE, OTHER)
    core.gone(worker, connection)
    assert set(ends_told(core.ended(worker, Exit(), Page(), 1.0))) == {OWNER}


def test_a_workers_last_lines_come_with_its_end():
    core = AgentCore()
    [worker] = serving(core)
    core.output(worker, [(f"line {n}", 0) for n in range(100)])
    told = ends_told(core.ended(worker, Exit(signal=signal.SIGABRT), Page(invocation=1), 1.0))
    assert told[OWNER].last_lines == tuple(f"line {n}" for n in range(100 - LAST_LINES, 100))


def test_what_an_invocation_prints_goes_to_its_rank_alone_and_nobodys_to_all():
    core = AgentCore()
    [worker] = serving(core)
    mine, theirs = core.attach(worker, LEASE, OWNER), core.attach(worker, LEASE, OTHER)
    lines = [("mine", mine), ("theirs", theirs), ("nobody's", 0), ("a stranger's", 99)]
    assert core.output(worker, lines) == {OWNER: (0, 2, 3), OTHER: (1, 2, 3)}
    assert core.output(worker, [("mine", mine)]) == {OWNER: (0,)}
    core.gone(worker, theirs)
    assert core.output(worker, lines) == {OWNER: (0, 2, 3)}, "whoever has gone hears nothing, and nobody for it"


def test_a_connection_for_another_lease_is_refused():
    core = AgentCore()
    [worker] = serving(core)
    assert core.attach(worker, LEASE + 1, OWNER) == 0


# --- replacement ------------------------------------------------------------------

def test_a_worker_that_dies_unasked_is_replaced_on_its_cores_under_a_new_number():
    core = AgentCore()
    [worker] = serving(core)
    actions = core.ended(worker, Exit(signal=signal.SIGSEGV), Page(invocation=1), 1.0)
    [fork] = of(Fork, actions)
    assert fork.cores == (0,) and fork.lease == LEASE and fork.worker != worker
    assert not of(Stopped, actions)
    core.forked(fork.worker, 4711)
    [tell] = core.ready(fork.worker)
    assert (tell.sessions, tell.event.worker, tell.event.replaces) == ((OWNER,), fork.worker, worker)


def test_the_first_workers_of_a_lease_are_not_announced():
    core = AgentCore()
    numbers, _ = core.start(LEASE, OWNER, {0: (0,)}, 0, 0.0)
    assert core.ready(numbers[0]) == []


def test_a_seat_whose_workers_die_at_once_waits_before_the_next():
    core = AgentCore()
    [worker] = serving(core)
    for death in range(DEATHS - 1):
        [fork] = of(Fork, core.ended(worker, Exit(exit_code=1), Page(), 0.1 * death))
        worker = fork.worker
    last = 0.1 * DEATHS
    assert not of(Fork, core.ended(worker, Exit(exit_code=1), Page(), last))
    assert core.next_deadline(last) == pytest.approx(last + BACK_OFF_S)
    assert core.tick(last + BACK_OFF_S / 2) == []
    assert len(of(Fork, core.tick(last + BACK_OFF_S))) == 1


def test_a_lease_that_ends_while_its_worker_waits_for_its_turn_is_stopped():
    core = AgentCore()
    [worker] = serving(core)
    for death in range(DEATHS):
        forks = of(Fork, core.ended(worker, Exit(exit_code=1), Page(), 0.1 * death))
        worker = forks[0].worker if forks else 0
    assert of(Stopped, core.stop(LEASE, [0], "released", 1.0, 1.0)) == [Stopped(LEASE, 0)]
    assert core.tick(100.0) == []


def test_kills_that_were_asked_for_do_not_slow_the_replacement_down():
    core = AgentCore()
    [worker] = serving(core)
    for _ in range(3 * DEATHS):
        core.forked(worker, 1)
        assert core.kill(worker, LEASE, "cancel", 9, Page(invocation=9))[0]
        [fork] = of(Fork, core.ended(worker, Exit(signal=signal.SIGKILL), Page(invocation=9), 0.0))
        worker = fork.worker


# --- stopping -----------------------------------------------------------------------

def test_a_released_worker_is_told_then_killed_then_its_cores_are_free():
    core = AgentCore()
    [worker] = serving(core)
    assert core.stop(LEASE, [0], "released", 0.5, now=10.0) == [Quit(worker)]
    assert core.tick(10.4) == []
    assert core.tick(10.5) == [Kill(worker)]
    actions = core.ended(worker, Exit(signal=signal.SIGKILL), Page(), 10.6)
    assert of(Stopped, actions) == [Stopped(LEASE, 0)] and of(Close, actions) == [Close(worker)]
    assert not of(Fork, actions)


def test_stopping_without_grace_kills_at_once_and_only_once():
    core = AgentCore()
    [worker] = serving(core)
    assert core.stop(LEASE, [0], "released", 0.0, now=10.0) == [Kill(worker)]
    assert core.stop(LEASE, [0], "released", 0.0, now=10.1) == []


def test_a_worker_that_has_no_process_yet_is_withdrawn_or_killed_once_it_has_one():
    core = AgentCore()
    numbers, _ = core.start(LEASE, OWNER, {0: (0,)}, 0, 0.0)
    assert core.stop(LEASE, [0], "released", 0.0, 0.0) == [Withdraw(numbers[0])]
    assert core.forked(numbers[0], 55) == [Kill(numbers[0])]
    core = AgentCore()
    numbers, _ = core.start(LEASE, OWNER, {0: (0,)}, 0, 0.0)
    core.stop(LEASE, [0], "released", 0.0, 0.0)
    assert Stopped(LEASE, 0) in core.ended(numbers[0], Exit(lost=True), Page(), 0.0)


def test_cores_of_each_seat_are_freed_when_its_own_worker_is_gone():
    core = AgentCore()
    first, second = serving(core, 2)
    core.stop(LEASE, [0, 1], "released", 0.0, 1.0)
    assert of(Stopped, core.ended(second, Exit(signal=9), Page(), 1.0)) == [Stopped(LEASE, 1)]
    assert core.seats_of(LEASE) == [0]
    assert of(Stopped, core.ended(first, Exit(signal=9), Page(), 1.0)) == [Stopped(LEASE, 0)]


def test_nobody_can_dial_a_worker_that_is_ending():
    core = AgentCore()
    [worker] = serving(core)
    core.stop(LEASE, [0], "released", 1.0, 1.0)
    assert core.attach(worker, LEASE, OWNER) == 0


def test_an_end_is_metered_with_what_the_worker_used():
    core = AgentCore()
    [worker] = serving(core)
    [meter] = of(Meter, core.ended(worker, Exit(cpu_s=1.5), Page(exec_ns=7, poll_ns=8, count=9), 3.0))
    assert meter == Meter(LEASE, worker, OWNER, 1, 3.0, 1.5, 7, 8, 9)


# --- cancel and time limits ---------------------------------------------------------

def test_a_cancel_that_comes_too_late_kills_nobody():
    core = AgentCore()
    [worker] = serving(core)
    assert core.kill(worker, LEASE, "cancel", 5, Page(invocation=6)) == (False, [])
    assert core.kill(worker, LEASE, "cancel", 5, Page()) == (False, [])
    assert core.kill(worker, LEASE, "cancel", 5, Page(invocation=5)) == (True, [Kill(worker)])


def test_a_rank_can_not_kill_another_leases_worker():
    core = AgentCore()
    [worker] = serving(core)
    assert core.kill(worker, LEASE + 1, "cancel", 0, Page(invocation=5)) == (False, [])


def test_a_neighbours_cancel_is_infrastructure_to_all_others():
    core = AgentCore()
    [worker] = serving(core)
    mine = core.attach(worker, LEASE, OWNER)
    core.attach(worker, LEASE, OTHER)
    core.kill(worker, LEASE, "cancel", 5, Page(invocation=5, connection=mine))
    told = ends_told(core.ended(worker, Exit(signal=9), Page(invocation=5, connection=mine), 1.0))
    assert (told[OTHER].cause, told[OTHER].reason, told[OTHER].invocation) == ("infrastructure", "cancel", 0)
    assert (told[OWNER].reason, told[OWNER].invocation) == ("cancel", 5)


def test_an_invocation_past_its_limit_is_killed_and_one_within_it_is_not():
    core = AgentCore()
    [worker] = serving(core)
    core.limits(worker, now=1.0)
    page = Page(invocation=5, connection=1, limit_ns=2_000)
    assert core.check_limits({worker: page}, 1.0, 2_000) == []
    assert core.check_limits({worker: page}, 1.0, 2_001) == [Kill(worker)]
    assert core.check_limits({worker: page}, 1.0, 2_002) == []
    told = ends_told(core.ended(worker, Exit(signal=9), page, 1.0))
    assert (told[OWNER].cause, told[OWNER].reason) == ("kernel", "deadline")


def test_an_idle_worker_is_not_killed_by_a_limit_left_in_its_page():
    core = AgentCore()
    [worker] = serving(core)
    core.limits(worker, now=1.0)
    assert core.check_limits({worker: Page(limit_ns=1)}, 1.0, 10) == []


def test_pages_are_watched_only_once_limits_are_in_use():
    core = AgentCore()
    [worker] = serving(core)
    assert core.watched == () and core.next_deadline(1.0) is None
    core.limits(worker, now=1.0)
    assert core.watched == (worker,)
    assert core.next_deadline(1.0) == pytest.approx(1.0 + POLL_S)


def test_news_about_workers_that_are_gone_is_ignored():
    core = AgentCore()
    assert core.forked(9, 1) == core.ready(9) == core.ended(9, Exit(), Page(), 0.0) == []
    assert core.output(9, [("x", 0)]) == {} and core.kill(9, 1, "cancel", 0, Page()) == (False, [])
    core.gone(9, 1)
    core.limits(9, 0.0)
    assert core.check_limits({9: Page(1, limit_ns=1)}, 0.0, 9) == core.stop(9, [0], "released", 0.0, 0.0) == []

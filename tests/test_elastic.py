"""When more workers are asked for, and when some are given back: decided, and done."""

from __future__ import annotations

import threading

import kernels_for_tests as k
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfaas_mpi import Executor
from rfaas_mpi.elastic import AGAIN_MOST_S, AGAIN_S, LONG_S, Elastic, Facts

IDLE = Facts(1, 0, 0)
BUSY = Facts(1, 0, 3)
LONG = Facts(1, 9, 16)


def test_a_burst_asks_for_nothing_and_a_long_queue_for_as_many_as_there_are():
    elastic = Elastic(0, 8, 1.0)
    assert elastic.decide(LONG, 0.0) == 0
    assert elastic.decide(BUSY, LONG_S) == 0
    assert elastic.decide(LONG, 2 * LONG_S) == 0, "it was short in between"
    assert elastic.decide(LONG, 3.1 * LONG_S) == 1
    elastic.answered(1, 3.1 * LONG_S)
    assert elastic.decide(Facts(2, 9, 32), 3.1 * LONG_S) == 0
    assert elastic.decide(Facts(2, 9, 32), 5 * LONG_S) == 2


def test_there_are_never_more_than_the_most_and_never_less_than_the_least_if_they_can_be_had():
    elastic = Elastic(2, 3, 1.0)
    assert elastic.decide(Facts(0, 0, 0), 0.0) == 2
    assert elastic.decide(Facts(1, 0, 0), 0.0) == 1
    elastic.decide(Facts(3, 9, 0), 0.0)
    assert elastic.decide(Facts(3, 9, 0), 5.0) == 0
    elastic.decide(Facts(2, 9, 0), 5.0)
    assert elastic.decide(Facts(2, 9, 0), 6.0) == 1


def test_workers_beyond_the_least_go_back_once_they_have_had_nothing_to_do_for_long():
    elastic = Elastic(1, 8, 1.0)
    assert elastic.decide(Facts(4, 0, 1), 0.0) == 0
    assert elastic.decide(Facts(4, 0, 0), 5.0) == 0
    assert elastic.decide(Facts(4, 0, 0), 5.9) == 0
    assert elastic.decide(Facts(4, 0, 0), 6.0) == -3
    assert elastic.decide(IDLE, 7.0) == 0


def test_who_gets_nothing_asks_less_and_less_often():
    elastic, now, asked = Elastic(1, None, 1.0), 0.0, []
    while now < 60.0:
        if elastic.decide(Facts(0, 0, 0), now):
            asked.append(now)
            elastic.answered(0, now)
        now += 0.05
    pauses = [b - a for a, b in zip(asked, asked[1:], strict=False)]
    assert AGAIN_S <= pauses[0] < 2 * AGAIN_S
    assert all(later > sooner - 0.06 for sooner, later in zip(pauses, pauses[1:], strict=False))
    assert AGAIN_MOST_S <= pauses[-1] < AGAIN_MOST_S + 0.1


@given(st.integers(0, 4), st.none() | st.integers(4, 9), st.lists(st.tuples(
    st.integers(0, 12), st.integers(0, 5), st.integers(0, 5), st.integers(0, 3), st.integers(0, 2), st.floats(0, 2)),
    max_size=40))
def test_what_is_decided_keeps_to_the_bounds(least, most, steps):
    elastic, now = Elastic(least, most, 0.5), 0.0
    for own, queued, in_flight, shared, lost, step in steps:
        now += step
        workers = own + shared
        change = elastic.decide(Facts(workers, queued, in_flight, shared, lost), now)
        if change > 0:
            assert most is None or workers + change <= most + shared + lost
            elastic.answered(queued % 2, now)
        if change < 0:
            assert workers + change == max(1, least + shared + lost) and not queued and not in_flight


def test_a_rank_keeps_what_it_shares_and_takes_the_place_of_what_is_its_to_replace():
    elastic = Elastic(0, 1, 1.0)
    assert elastic.decide(Facts(3, 0, 0, shared=2), 0.0) == 0
    assert elastic.decide(Facts(3, 0, 0, shared=2), 1.0) == -1
    assert elastic.decide(Facts(1, 0, 0, shared=1), 2.0) == 0, "it was another rank's to replace"
    assert elastic.decide(Facts(1, 0, 0, shared=1, lost=1), 3.0) == 1


def test_a_rank_that_has_nothing_any_more_asks_for_one_if_it_may():
    assert Elastic(0, 2, 1.0).decide(Facts(0, 0, 0), 0.0) == 1
    assert Elastic(0, 0, 1.0).decide(Facts(0, 0, 0), 0.0) == 0
    assert Elastic(0, 0, 1.0).decide(Facts(0, 0, 0, lost=1), 0.0) == 1


def test_whoever_wants_to_know_is_told_which_workers_there_are_now(wait_until):
    told: list[list[int]] = []
    with Executor(workers=1, cores=(0, 1)) as ex:
        @ex.on_change
        def changed(workers):
            told.append(workers)
            raise ValueError("nobody's concern")
        [first] = ex.workers
        assert ex.submit(k.crash, 11).exception() is not None
        assert ex.wait_workers(1, 60)
        wait_until(lambda: ex.workers not in ([], [first]) and told[-1:] == [ex.workers], "the new one is told of")
        assert told[0] == [] and not ex.wait_workers(2, 0.01)
    assert not ex.wait_workers(1, 60), "it ends with the executor"


def test_what_can_not_be_told_is_refused_at_once():
    with Executor(transport="inline") as ex, pytest.raises(TypeError, match="3 can't be called"):
        ex.on_change(3)


def test_what_is_told_last_is_how_it_is_whoever_tells():
    with Executor(transport="inline") as ex:
        crew, told, slow, go = ex._crew, [], threading.Event(), threading.Event()
        state = [[1], [2]]
        crew.__class__ = type("Crew", (type(crew),), {"workers": property(lambda self: state[0])})

        @ex.on_change
        def changed(workers):
            if workers == [1]:
                slow.set()
                assert go.wait(60)
            told.append(workers)

        first = threading.Thread(target=crew.look_around)
        first.start()
        assert slow.wait(60)
        state.pop(0)
        crew.look_around()
        go.set()
        first.join(60)
        assert told == [[1], [2]]


def test_workers_come_when_calls_queue_and_go_when_they_have_nothing_to_do(tmp_path, wait_until):
    go = tmp_path / "go"
    with Executor(workers=(0, 2), cores=(0, 1), idle_s=0.3, slots=2, fallback=False) as ex:
        assert len(ex.workers) == 1
        futures = [ex.submit(k.wait_for, go, n) for n in range(12)]
        assert ex.wait_workers(2, 60)
        go.touch()
        assert [future.result(60) for future in futures] == list(range(12))
        # Nobody looks at the replies any more, among them those to what was taken back for the one that came.
        wait_until(lambda: len(ex.workers) == 1, "one went back")
        assert ex.submit(k.add, 1, 2).result() == 3
        assert sum(ex.map(k.add, range(500))) == sum(range(500))


def test_other_workers_are_asked_for_when_all_were_taken_back(wait_until):
    gone = threading.Event()
    with Executor(workers=(1, 1), cores=(0, 1), idle_s=60.0) as ex:
        [first] = ex.workers
        ex.on_change(lambda workers: workers or gone.set())
        ex._crew.lending.session.reclaim()
        assert gone.wait(60)
        wait_until(lambda: ex.workers not in ([], [first]), "another one has come")
        assert ex.submit(k.pid).result() > 0


def test_whoever_crashed_is_replaced_and_not_leased_anew_as_well(wait_until):
    with Executor(workers=(1, 1), cores=(0, 1), idle_s=60.0) as ex:
        lending = ex._crew.lending
        expected: list[int] = []
        ex.on_change(lambda workers: workers or expected.append(lending.seats))
        for turn in range(1, 6):
            before = ex.workers
            assert ex.submit(k.crash, 11).exception() is not None
            wait_until(lambda turn=turn, before=before: len(expected) == turn and ex.workers not in ([], before),
                       "another one has come")
            assert len(ex.workers) == 1
        assert expected == [1] * 5 and len(lending.grant.leases) == 1

"""Which leases an agent runs, decided: hard ends, orders, cores that are wanted back, ends of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rfaas_mpi.agent.tenure import Ended, Forbid, Stop, Tenures
from rfaas_mpi.api import StopOrder
from rfaas_mpi.leases import Cause, GrantedWorker, LiveLease

NEWS = (Cause.REVOKED, Cause.EXPIRED, Cause.NODE_LOST)


def workers(*cores: tuple[int, ...]) -> tuple[GrantedWorker, ...]:
    return tuple(GrantedWorker(number, each) for number, each in enumerate(cores))


@pytest.fixture
def tenures() -> Tenures:
    """Lease 7 of session 1: two workers, on cores 2 and 3; no hard end."""
    table = Tenures()
    table.begin(7, 70, 1000, 1, workers((2,), (3,)), 1 << 20, None)
    return table


def test_a_lease_is_reported_whole_from_its_begin_and_less_each_worker_whose_core_is_free(tenures):
    assert tenures.live == (LiveLease(7, 70, workers((2,), (3,))),)
    assert tenures.freed(7, 0)
    assert tenures.live == (LiveLease(7, 70, (GrantedWorker(1, (3,)),)),)
    assert tenures.in_use == {3}
    assert tenures.freed(7, 1)
    assert tenures.live == () and 7 not in tenures and not tenures


def test_news_of_what_ended_already_is_none(tenures):
    assert tenures.freed(7, 0)
    assert not tenures.freed(7, 0)
    assert not tenures.freed(8, 0)


def test_exactly_the_workers_on_cores_that_are_not_lent_any_more_stop(tenures):
    assert tenures.lend({2, 9}, 0.5, 100.0) == [Stop(7, (1,), Cause.REVOKED, 0.5, owned=True)]
    assert tenures.lend({2, 9}, 0.5, 100.1) == []


def test_a_worker_stops_if_one_of_its_cores_is_wanted_back():
    table = Tenures()
    table.begin(7, 70, 1000, 1, workers((2, 3), (4, 5)), 0, None)
    assert table.lend({2, 4, 5}, 0.0, 0.0) == [Stop(7, (0,), Cause.REVOKED, 0.0, owned=True)]


def test_a_rank_is_told_before_the_last_of_its_workers_stop_and_only_once(tenures):
    assert tenures.order(StopOrder(7, (0,), Cause.REVOKED, 1.0), 10.0) == [Stop(7, (0,), Cause.REVOKED, 1.0)]
    assert tenures.order(StopOrder(7, (), Cause.REVOKED, 1.0), 10.5) == [
        Ended(1, 7, Cause.REVOKED), Stop(7, (1,), Cause.REVOKED, 1.0)]
    # At once, after all.
    assert tenures.leave(0.0, 10.6) == [Stop(7, (0, 1), Cause.REVOKED, 0.0)]


@pytest.mark.parametrize("cause", list(Cause))
def test_a_rank_is_told_of_what_it_did_not_do_itself(tenures, cause):
    told = Ended(1, 7, cause) in tenures.order(StopOrder(7, (), cause, 0.0), 0.0)
    assert told == (cause in NEWS)


def test_a_lease_that_nobody_keeps_any_more_ends_and_no_other_does(tenures):
    tenures.begin(8, 80, 1000, 2, workers((4,)), 0, None)
    assert tenures.abandon(8, 0.0) == [Stop(8, (0,), Cause.SESSION_ENDED, 0.0)]
    assert tenures.abandon(9, 0.0) == []


def test_an_order_for_a_lease_that_has_not_begun_forbids_its_grant(tenures):
    assert tenures.order(StopOrder(9, (), Cause.REVOKED, 0.0), 0.0) == [Forbid(9)]


def test_an_order_that_is_repeated_changes_nothing_and_a_sooner_one_does(tenures):
    order = StopOrder(7, (0,), Cause.REVOKED, 5.0)
    assert tenures.order(order, 0.0) == [Stop(7, (0,), Cause.REVOKED, 5.0)]
    assert tenures.order(order, 0.1) == []
    assert tenures.order(StopOrder(7, (0,), Cause.REVOKED, 1.0), 0.1) == [Stop(7, (0,), Cause.REVOKED, 1.0)]


def test_cores_that_somebody_on_the_node_wants_back_are_given_up(tenures):
    assert tenures.reclaim(7, [1], 2.0, 0.0, owned=False) == [Stop(7, (1,), Cause.REVOKED, 2.0)]
    assert tenures.reclaim(9, [0], 2.0, 0.0, owned=True) == []


def test_a_hard_end_comes_by_our_own_clock_and_bounds_every_grace():
    table = Tenures()
    table.begin(7, 70, 1000, 1, workers((2,), (3,)), 0, 20.0)
    assert table.next_deadline() == 20.0
    assert table.tick(19.9) == []
    assert table.lend({3}, 60.0, 15.0) == [Stop(7, (0,), Cause.REVOKED, 5.0, owned=True)]
    assert table.tick(20.0) == [Ended(1, 7, Cause.EXPIRED), Stop(7, (1,), Cause.EXPIRED, 0.0)]
    assert table.next_deadline() is None
    assert table.tick(21.0) == []


def test_no_lease_outlives_the_node_s_window_whatever_its_grant_says(tenures):
    tenures.begin(8, 80, 1000, 2, workers((4,)), 0, 50.0)
    tenures.begin(9, 90, 1000, 3, workers((5,)), 0, 10.0)
    tenures.window_ends(20.0)
    assert [tenures.end_of(lease) for lease in (7, 8, 9, 10)] == [20.0, 20.0, 10.0, None]
    assert tenures.order(StopOrder(8, (0,), Cause.REVOKED, 60.0), 15.0)[-1] == Stop(8, (0,), Cause.REVOKED, 5.0)
    assert tenures.tick(19.9) == [Ended(3, 9, Cause.EXPIRED), Stop(9, (0,), Cause.EXPIRED, 0.0)]
    # It was told otherwise meanwhile: leases that run go on until the new end.
    tenures.window_ends(30.0)
    assert tenures.tick(20.0) == [] and tenures.next_deadline() == 30.0
    assert tenures.tick(30.0) == [Ended(1, 7, Cause.EXPIRED), Stop(7, (0, 1), Cause.EXPIRED, 0.0)]
    tenures.window_ends(None)
    assert tenures.next_end is None and tenures.end_of(8) == 50.0


def test_a_lease_takes_no_call_that_would_not_be_done_by_its_end_and_what_runs_may_go_on_until_then():
    table = Tenures()
    table.begin(7, 70, 1000, 1, workers((2,), (3,)), 0, 20.0)
    table.calls_take({7: 4.0, 8: 1.0})
    due = table.next_deadline()
    assert due is not None and 8.0 < due < 12.0 and table.next_end == 20.0, "two calls, and somewhat more"
    assert table.tick(due - 0.1) == []
    assert table.tick(due) == [Ended(1, 7, Cause.EXPIRED), Stop(7, (0, 1), Cause.EXPIRED, 20.0 - due)]
    assert table.next_deadline() is None and table.next_end is None


def test_nothing_is_due_without_hard_ends(tenures):
    assert tenures.next_deadline() is None


class Node(RuleBasedStateMachine):
    """Leases come, are stopped for every reason, and end; the node's cores are never promised twice."""

    CORES = range(6)

    def __init__(self) -> None:
        super().__init__()
        self.table = Tenures()
        self.now = 0.0
        self.next = 1
        self.ordered: dict[tuple[int, int], float] = {}      # what was told to stop, and until when
        self.told: set[int] = set()

    def do(self, actions) -> None:
        for action in actions:
            match action:
                case Ended(lease=lease, cause=cause):
                    assert lease not in self.told, "told twice"
                    assert cause in NEWS
                    self.told.add(lease)
                case Stop(lease=lease, seats=seats, grace_s=grace_s):
                    assert grace_s >= 0.0 and seats
                    for seat in seats:
                        assert self.now + grace_s < self.ordered.get((lease, seat), float("inf")), "no sooner"
                        self.ordered[lease, seat] = self.now + grace_s
                        hard_end = self.table.get(lease).hard_end
                        assert hard_end is None or self.ordered[lease, seat] <= max(self.now, hard_end)

    @rule(session=st.integers(1, 3), wanted=st.sets(st.sampled_from(CORES), min_size=1, max_size=3),
          life=st.none() | st.floats(0.1, 5.0))
    def begin(self, session, wanted, life):
        free = sorted(wanted - self.table.in_use)
        if free:
            self.table.begin(self.next, self.next, 1000, session, workers(*((core,) for core in free)), 0,
                             None if life is None else self.now + life)
            self.next += 1

    @rule(lease=st.integers(1, 8))
    def abandon(self, lease):
        self.do(self.table.abandon(lease, self.now))
        assert lease not in self.table or self.table.get(lease).ending

    @rule(spare=st.sets(st.sampled_from(CORES)), grace=st.sampled_from([0.0, 1.0]))
    def lend(self, spare, grace):
        self.do(self.table.lend(spare, grace, self.now))
        assert all((tenure.lease, seat) in self.ordered for tenure in self.table.all
                   for seat, cores in tenure.seats.items() if not spare.issuperset(cores))

    @rule(lease=st.integers(1, 8), seats=st.sets(st.integers(0, 3)), cause=st.sampled_from(list(Cause)),
          grace=st.floats(0.0, 3.0))
    def order(self, lease, seats, cause, grace):
        actions = self.table.order(StopOrder(lease, tuple(seats), cause, grace), self.now)
        if lease not in self.table:
            assert actions == [Forbid(lease)]
        self.do(action for action in actions if not isinstance(action, Forbid))

    @rule(step=st.floats(0.0, 2.0))
    def time(self, step):
        self.now += step
        self.do(self.table.tick(self.now))
        due = self.table.next_deadline()
        assert due is None or due > self.now, "it would be called again at once, for ever"

    @precondition(lambda self: self.ordered)
    @rule(data=st.data())
    def free(self, data):
        lease, seat = data.draw(st.sampled_from(sorted(self.ordered)))
        del self.ordered[lease, seat]
        assert self.table.freed(lease, seat)

    @invariant()
    def no_core_twice(self):
        cores = [core for tenure in self.table.all for core in tenure.cores]
        assert len(cores) == len(set(cores))
        assert {core for lease in self.table.live for worker in lease.workers for core in worker.cores} == set(cores)


TestNode = Node.TestCase
TestNode.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.floats(0, 1e6), st.floats(0, 1e5), st.floats(0, 1e5))
def test_a_grace_never_reaches_beyond_the_hard_end(now, life, grace):
    table = Tenures()
    table.begin(1, 1, 0, 1, workers((0,)), 0, now + life)
    (*_, stop) = table.leave(grace, now)
    assert now + stop.grace_s <= max(now, now + life)

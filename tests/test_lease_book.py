"""The lease book: every promise of the lease state machine, and long random lives."""

from __future__ import annotations

import os
import random

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rfaas_mpi.leases import (
    Action,
    Activated,
    Cause,
    Demand,
    Event,
    Grant,
    Lease,
    LeaseBook,
    LeaseState,
    NodeLost,
    NodeReport,
    Notify,
    Refuse,
    Release,
    Revoke,
    SessionEnded,
    StopWorkers,
    Store,
    Tick,
    WorkersStopped,
)
from rfaas_mpi.leases.book import REMEMBER_LEAST_S
from rfaas_mpi.placement import POLICIES, Placer, Settings, pick_cores

GIB = 2**30


def report(node: str = "n0", spare=(1, 2, 3, 4), memory: int = 8 * GIB, **more):
    return NodeReport(node=node, spare=tuple(spare), memory_bytes=memory, **more)


def demand(request_id: int = 1, low: int = 0, high: int = 1, session: int = 7,
           **more) -> Demand:
    return Demand(session=session, request_id=request_id, uid=1000,
                  workers_min=low, workers_max=high, **more)


@pytest.fixture
def book() -> LeaseBook:
    """A book that knows one node with spare cores 1 to 4."""
    book = LeaseBook(pick_cores)
    book.handle(report(), 0.0)
    return book


def granted(book: LeaseBook, event: Demand, now: float = 0.0) -> Grant:
    answer = book.handle(event, now)[-1]
    assert isinstance(answer, Grant), answer
    return answer


def only_lease(grant: Grant) -> Lease:
    (lease,) = grant.leases
    return lease


def view(book: LeaseBook, node: str = "n0"):
    (found,) = [view for view in book.nodes if view.node == node]
    return found


# --- granting ---------------------------------------------------------------

def test_the_epoch_is_stored_before_the_grant_is_answered(book):
    store, grant = book.handle(demand(low=2, high=2), 0.0)
    assert isinstance(store, Store) and isinstance(grant, Grant)
    assert store.epoch == only_lease(grant).epoch == book.epoch


def test_a_grant_names_the_cores_of_each_worker(book):
    lease = only_lease(granted(book, demand(low=1, high=2, cores_per_worker=2)))
    assert [worker.cores for worker in lease.workers] == [(1, 2), (3, 4)]
    assert lease.state is LeaseState.GRANTED
    assert view(book).free == ()


def test_a_demand_gets_fewer_workers_than_its_maximum_and_is_told_why(book):
    grant = granted(book, demand(low=1, high=9))
    assert grant.workers == 4
    assert "9 workers" in grant.reason and "4 available" in grant.reason


def test_a_full_grant_has_no_excuse(book):
    assert granted(book, demand(low=1, high=4)).reason == ""


def test_a_demand_for_none_at_least_is_granted_with_none(book):
    granted(book, demand(request_id=1, low=4, high=4))
    actions = book.handle(demand(request_id=2, low=0, high=2), 0.0)
    (grant,) = actions
    assert isinstance(grant, Grant) and grant.leases == ()
    assert "0 of 4 spare cores free" in grant.reason


def test_a_demand_beyond_what_is_spare_is_refused_with_both_numbers(book):
    (refuse,) = book.handle(demand(low=3, high=4, cores_per_worker=2), 0.0)
    assert isinstance(refuse, Refuse)
    assert (refuse.asked, refuse.available) == (3, 2)
    assert "3 workers" in refuse.reason and "2 available" in refuse.reason
    assert view(book).free == (1, 2, 3, 4)


def test_memory_is_lent_like_cores(book):
    grant = granted(book, demand(high=4, memory_per_worker=3 * GIB))
    assert grant.workers == 2
    assert view(book).memory_free == 2 * GIB
    (refuse,) = book.handle(demand(2, low=1, memory_per_worker=3 * GIB), 0.0)
    assert isinstance(refuse, Refuse) and "2 GiB of 8 GiB" in refuse.reason


def test_nothing_is_granted_on_a_node_before_its_first_report():
    (refuse,) = LeaseBook(pick_cores, epoch=9).handle(demand(low=1), 0.0)
    assert isinstance(refuse, Refuse) and "no node" in refuse.reason


def test_a_demand_larger_than_a_node_is_filled_by_a_lease_on_each(book):
    book.handle(report("n1", spare=(0, 1)), 0.0)
    store, grant = book.handle(demand(low=5, high=6), 0.0)
    assert [(lease.node, len(lease.workers)) for lease in grant.leases] == [
        ("n0", 4), ("n1", 2)]
    assert store.epoch == max(lease.epoch for lease in grant.leases)


def test_a_demand_that_one_node_can_fill_is_not_spread(book):
    book.handle(report("n1", spare=(0, 1)), 0.0)
    assert only_lease(granted(book, demand(low=2, high=2))).node == "n1"


def test_a_node_that_lends_to_one_user_only_is_closed_to_the_others():
    book = LeaseBook(pick_cores)
    book.handle(report(lends_to_uid=1), 0.0)
    (refuse,) = book.handle(demand(low=1), 0.0)
    assert isinstance(refuse, Refuse) and "no node" in refuse.reason


def test_an_agent_that_runs_workers_of_an_earlier_book_keeps_their_cores():
    book = LeaseBook(pick_cores, epoch=40)
    book.handle(report(busy={2: 31}), 0.0)
    assert only_lease(granted(book, demand(high=4))).cores == (1, 3, 4)
    book.handle(report(busy={}), 1.0)
    assert only_lease(granted(book, demand(2, high=4), 1.0)).cores == (2,)


def test_ids_and_epochs_go_on_where_the_stored_epoch_stood(book):
    first = only_lease(granted(book, demand()))
    later = LeaseBook(pick_cores, epoch=book.epoch)
    later.handle(report(), 0.0)
    second = only_lease(granted(later, demand()))
    assert second.id > first.id and second.epoch > first.epoch


@pytest.mark.parametrize("event", [
    demand(low=-1), demand(low=2, high=1), demand(cores_per_worker=0),
    demand(memory_per_worker=-1), demand(duration_s=0.0),
    report(spare=(1, 1)), report(memory=-1)])
def test_a_senseless_event_changes_nothing(book, event):
    with pytest.raises(ValueError):
        book.handle(event, 0.0)
    assert book.epoch == 0 and view(book).spare == (1, 2, 3, 4)


# --- repeated requests ------------------------------------------------------

def test_a_repeated_demand_gets_the_same_answer_in_every_phase(book):
    event = demand(low=1, high=2)
    first = granted(book, event)
    lease = only_lease(first)
    for step in (Activated(lease.id), Revoke(lease.id, grace_s=5.0),
                 WorkersStopped(lease.id), SessionEnded(event.session)):
        book.handle(step, 1.0)
        assert book.handle(event, 1.0) == [first]
    assert book.epoch == lease.epoch


def test_a_repeated_refusal_stays_one_when_cores_came_free(book):
    blocker = only_lease(granted(book, demand(1, low=4, high=4)))
    refused = book.handle(demand(2, low=1), 0.0)
    book.handle(Release(7, blocker.id), 1.0)
    book.handle(WorkersStopped(blocker.id), 1.0)
    assert book.handle(demand(2, low=1), 2.0) == refused
    assert granted(book, demand(3, low=1), 2.0).workers == 1


def test_one_request_id_for_two_different_demands_is_refused(book):
    first = granted(book, demand(1, high=1))
    (refuse,) = book.handle(demand(1, high=2), 0.0)
    assert isinstance(refuse, Refuse) and "request id" in refuse.reason
    assert book.handle(demand(1, high=1), 0.0) == [first]


def test_a_demand_that_arrives_after_its_session_ended_gets_nothing(book):
    book.handle(SessionEnded(7), 0.0)
    (refuse,) = book.handle(demand(low=0), 1.0)
    assert isinstance(refuse, Refuse) and "has ended" in refuse.reason


def test_a_session_that_ended_is_remembered_for_as_long_as_its_leases_live():
    book = LeaseBook(pick_cores, remember_s=100.0)
    book.handle(report(), 0.0)
    granted(book, demand())
    book.handle(SessionEnded(7), 1.0)
    book.handle(Tick(), 500.0)
    assert isinstance(book.handle(demand(2), 500.0)[0], Refuse)


@pytest.mark.parametrize("first, again", [
    (Activated(1), Activated(1)),
    (Revoke(1, grace_s=5.0), Revoke(1, grace_s=5.0)),
    (Release(7, 1), Release(7, 1)),
    (SessionEnded(7), SessionEnded(7)),
    (WorkersStopped(1), WorkersStopped(1)),
    (NodeLost("n0"), NodeLost("n0"))])
def test_the_second_of_two_equal_events_changes_nothing(book, first, again):
    assert only_lease(granted(book, demand(high=2))).id == 1
    book.handle(first, 1.0)
    before = (book.lease(1), book.nodes)
    for now in (1.0, 2.0):
        assert book.handle(again, now) == []
        assert (book.lease(1), book.nodes) == before


# --- ending -----------------------------------------------------------------

def test_cores_are_free_only_when_the_workers_are_gone(book):
    lease = only_lease(granted(book, demand(high=4)))
    (stop,) = book.handle(Release(7, lease.id), 1.0)
    assert stop == StopWorkers("n0", lease.id, (0, 1, 2, 3), Cause.RELEASED)
    assert book.lease(lease.id).state is LeaseState.REVOKING
    assert view(book).free == ()
    book.handle(WorkersStopped(lease.id), 2.0)
    assert book.lease(lease.id).state is LeaseState.RELEASED
    assert view(book).free == (1, 2, 3, 4) and book.leases == []


def test_the_end_of_a_session_stops_all_it_holds_at_once(book):
    first = only_lease(granted(book, demand(1, high=1)))
    second = only_lease(granted(book, demand(2, high=1)))
    other = only_lease(granted(book, demand(1, high=1, session=8)))
    stops = book.handle(SessionEnded(7), 1.0)
    assert [(stop.lease_id, stop.grace_s) for stop in stops] == [
        (first.id, 0.0), (second.id, 0.0)]
    assert book.lease(other.id).state is LeaseState.GRANTED


def test_a_session_cannot_release_what_another_holds(book):
    lease = only_lease(granted(book, demand(session=8)))
    assert book.handle(Release(7, lease.id), 1.0) == []
    assert book.lease(lease.id).state is LeaseState.GRANTED


def test_a_revoked_lease_is_announced_before_its_workers_are_stopped(book):
    lease = only_lease(granted(book, demand(high=2)))
    notify, stop = book.handle(Revoke(lease.id, grace_s=3.0), 1.0)
    assert notify == Notify(7, lease.id, (0, 1), Cause.REVOKED, 3.0)
    assert isinstance(stop, StopWorkers) and stop.grace_s == 3.0


def test_a_revoked_worker_leaves_the_rest_of_its_lease_running(book):
    lease = only_lease(granted(book, demand(high=3)))
    book.handle(Activated(lease.id), 0.0)
    _, stop = book.handle(Revoke(lease.id, workers=(1,)), 1.0)
    assert stop.workers == (1,)
    assert book.lease(lease.id).state is LeaseState.ACTIVE
    book.handle(WorkersStopped(lease.id, (1,)), 2.0)
    assert book.lease(lease.id).cores == (1, 3)
    assert view(book).free == (2, 4)


def test_a_core_missing_from_a_report_takes_only_its_worker_back(book):
    lease = only_lease(granted(book, demand(high=3)))
    notify, stop = book.handle(report(spare=(1, 3, 4), grace_s=0.5), 1.0)
    assert notify.workers == stop.workers == (1,) and stop.grace_s == 0.5
    assert stop.cause is Cause.REVOKED
    book.handle(WorkersStopped(lease.id, (1,)), 2.0)
    assert 2 not in view(book).free


def test_one_missing_core_takes_the_whole_worker_back(book):
    lease = only_lease(granted(book, demand(high=2, cores_per_worker=2)))
    notify, stop = book.handle(report(spare=(1, 2, 4)), 1.0)
    assert notify.workers == stop.workers == (1,)
    assert book.lease(lease.id).state is LeaseState.GRANTED


def test_an_owner_in_a_hurry_shortens_the_grace_but_never_lengthens_it(book):
    lease = only_lease(granted(book, demand(high=1)))
    book.handle(Revoke(lease.id, grace_s=10.0), 0.0)
    assert book.handle(Revoke(lease.id, grace_s=60.0), 1.0) == []
    _, stop = book.handle(Revoke(lease.id, grace_s=1.0), 2.0)
    assert stop.grace_s == 1.0
    (stop,) = book.handle(SessionEnded(7), 2.5)
    assert stop.grace_s == 0.0
    book.handle(WorkersStopped(lease.id), 2.6)
    assert book.lease(lease.id).cause is Cause.REVOKED


def test_a_lease_expires_at_its_hard_end(book):
    lease = only_lease(granted(book, demand(duration_s=60.0), 10.0))
    assert lease.hard_end == book.next_deadline() == 70.0
    assert book.handle(Tick(), 69.9) == []
    notify, stop = book.handle(Tick(), 70.0)
    assert notify.cause is stop.cause is Cause.EXPIRED
    assert book.next_deadline() is None
    book.handle(WorkersStopped(lease.id), 70.1)
    assert book.lease(lease.id).state is LeaseState.EXPIRED


def test_the_node_s_idle_window_bounds_every_lease_on_it():
    book = LeaseBook(pick_cores)
    book.handle(report(hard_end=50.0), 0.0)
    assert only_lease(granted(book, demand(1, duration_s=90.0), 10.0)).hard_end == 50.0
    assert isinstance(book.handle(demand(2, low=1), 50.0)[0], Refuse)


def test_no_grace_reaches_beyond_the_hard_end(book):
    lease = only_lease(granted(book, demand(duration_s=10.0), 0.0))
    _, stop = book.handle(Revoke(lease.id, grace_s=60.0), 8.0)
    assert stop.grace_s == 2.0


def test_a_grant_that_is_never_activated_expires():
    book = LeaseBook(pick_cores, activate_within_s=5.0)
    book.handle(report(), 0.0)
    idle = only_lease(granted(book, demand(1), 0.0))
    used = only_lease(granted(book, demand(2), 0.0))
    book.handle(Activated(used.id), 1.0)
    stopped = [action.lease_id for action in book.handle(Tick(), 5.0)
               if isinstance(action, StopWorkers)]
    assert stopped == [idle.id]


def test_a_lost_node_takes_its_leases_with_it_and_lends_no_more(book):
    lease = only_lease(granted(book, demand(high=2)))
    (notify,) = book.handle(NodeLost("n0"), 1.0)
    assert notify.cause is Cause.NODE_LOST and notify.workers == (0, 1)
    assert book.lease(lease.id).state is LeaseState.LOST
    assert isinstance(book.handle(demand(2, low=1), 2.0)[0], Refuse)


def test_a_node_that_comes_back_must_stop_what_was_lost_before_lending_it(book):
    lease = only_lease(granted(book, demand(high=2)))
    book.handle(NodeLost("n0"), 1.0)
    (stop,) = book.handle(report(busy={1: lease.id, 2: lease.id}), 2.0)
    assert (stop.lease_id, stop.cause) == (lease.id, Cause.NODE_LOST)
    assert view(book).free == (3, 4)
    assert book.handle(report(), 3.0) == []
    assert view(book).free == (1, 2, 3, 4)


def test_a_lease_whose_workers_all_ended_by_themselves_is_over(book):
    lease = only_lease(granted(book, demand(high=2)))
    book.handle(WorkersStopped(lease.id, (0,)), 1.0)
    assert book.lease(lease.id).state is LeaseState.GRANTED
    book.handle(WorkersStopped(lease.id, (1,)), 2.0)
    assert book.lease(lease.id).state is LeaseState.RELEASED


def test_what_ended_long_ago_is_forgotten_but_never_granted_again_by_id():
    book = LeaseBook(pick_cores, remember_s=100.0)
    book.handle(report(), 0.0)
    lease = only_lease(granted(book, demand()))
    book.handle(SessionEnded(7), 1.0)
    book.handle(WorkersStopped(lease.id), 1.0)
    book.handle(Tick(), 100.0)
    assert book.lease(lease.id) is not None
    book.handle(Tick(), 200.0)
    assert book.lease(lease.id) is None
    assert only_lease(granted(book, demand(), 200.0)).id > lease.id


def test_of_too_many_that_ended_the_last_are_remembered_and_all_that_ended_just_now():
    book = LeaseBook(pick_cores, remember_s=10_000.0, remember_most=10)
    book.handle(report(), 0.0)

    def lives(requests: range, now: float) -> list[int]:
        ids = []
        for request in requests:
            lease = only_lease(granted(book, demand(request), now))
            book.handle(WorkersStopped(lease.id), now)
            ids.append(lease.id)
        book.handle(Tick(), now)
        return [each for each in ids if book.lease(each) is not None]

    assert len(lives(range(1, 31), 1.0)) == 30
    assert book.remembers(7, 1)
    book.handle(Tick(), 2.0 + REMEMBER_LEAST_S)
    assert [book.remembers(7, request) for request in (1, 20, 21, 30)] == [False, False, True, True]
    # Without a tick as well.
    lives(range(31, 34), 3.0 + REMEMBER_LEAST_S)
    assert not book.remembers(7, 21)
    assert book.remembers(7, 33)


def test_leases_that_were_lost_are_remembered_however_many_have_ended_since():
    book = LeaseBook(pick_cores, remember_s=10_000.0, remember_most=1)
    book.handle(report("n1"), 0.0)
    lost = only_lease(granted(book, demand(1)))
    book.handle(NodeLost("n1"), 1.0)
    book.handle(report("n2"), 2.0)
    for request in range(2, 6):
        book.handle(WorkersStopped(only_lease(granted(book, demand(request), 2.0)).id), 2.0)
    book.handle(Tick(), 3.0 + REMEMBER_LEAST_S)
    assert book.lease(lost.id).state is LeaseState.LOST
    book.handle(Tick(), 10_002.0)
    assert book.lease(lost.id) is None


def test_events_and_actions_survive_a_trace_on_disk(book):
    events: list[Event] = [report("n1", numa={1: 0}, busy={2: 5}), demand(high=2)]
    assert msgspec.json.decode(msgspec.json.encode(events), type=list[Event]) == events
    actions = [action for event in events for action in book.handle(event, 0.0)]
    assert msgspec.json.decode(
        msgspec.json.encode(actions), type=list[Action]) == actions


# --- long random lives ------------------------------------------------------

NODES = ("n0", "n1", "n2")
NEXT_STATES = {
    LeaseState.GRANTED: {LeaseState.ACTIVE, LeaseState.REVOKING, LeaseState.RELEASED,
                         LeaseState.EXPIRED, LeaseState.LOST},
    LeaseState.ACTIVE: {LeaseState.REVOKING, LeaseState.RELEASED, LeaseState.EXPIRED,
                        LeaseState.LOST},
    LeaseState.REVOKING: {LeaseState.RELEASED, LeaseState.EXPIRED, LeaseState.LOST},
}


def chooser(policy: str):
    """Who chooses a book's nodes: its own shelves, or a policy, which looks at a sample of more than two nodes."""
    return pick_cores if policy == "shelves" else Placer(policy, Settings(exact_to=2, sample=1))


class World:
    """Ranks and agents around a book: they do what its actions say, and check them.

    `running` is what really runs on each node's cores, also where the book was
    told that the node is lost: two leases on one core would meet there. All of
    its knowledge comes from the events sent and the actions returned.
    """

    def __init__(self, policy: str = "default") -> None:
        self.policy = policy
        self.now = 0.0
        self.stored = 0
        self.running: dict[str, dict[int, tuple[int, int]]] = {n: {} for n in NODES}
        self.reports: dict[str, NodeReport] = {}
        self.highest = 0                     # epoch or id, over all books
        self.next_session = 0
        self.grants = 0
        self.restart()

    def restart(self) -> None:
        """A new book from the stored epoch; old sessions are gone, workers run on."""
        self.book = LeaseBook(chooser(self.policy), epoch=self.stored, activate_within_s=20.0,
                              remember_s=50.0)
        self.reports.clear()
        self.states: dict[int, LeaseState] = {}
        self.answers: dict[tuple[int, int], tuple[Demand, Action]] = {}
        self.past: list[Event] = []
        self.sessions = [self.new_session() for _ in range(3)]

    def new_session(self) -> int:
        self.next_session += 1
        return self.next_session

    def send(self, event: Event) -> list[Action]:
        """Hand in one event, check and do what comes back, look at everything."""
        self.past.append(event)
        del self.past[:-40]
        match event:
            case NodeReport(node=name):
                self.reports[name] = event
            case NodeLost(node=name):
                self.reports.pop(name, None)
            case WorkersStopped(lease_id, workers):
                self.stop_running(lease_id, workers)
        before = {lease.id: lease for lease in self.book.leases}
        actions = self.book.handle(event, self.now)
        if isinstance(event, Demand):
            self.check_answer(event, actions)
        for position, action in enumerate(actions):
            match action:
                case Store(epoch):
                    assert epoch > self.stored
                    self.stored = epoch
                case Grant():
                    assert isinstance(event, Demand) and position == len(actions) - 1
                case StopWorkers(node, lease_id, workers, _, grace_s):
                    self.check_stop(event, before, node, lease_id, workers, grace_s)
                case Notify(session, lease_id):
                    assert before[lease_id].session == session
        if isinstance(event, NodeReport):
            for lease in self.book.leases:
                for worker in lease.workers if lease.node == event.node else ():
                    assert (worker.number in lease.stopping
                            or set(worker.cores) <= set(event.spare))
        self.check()
        return actions

    def check_answer(self, event: Demand, actions: list[Action]) -> None:
        key = (event.session, event.request_id)
        answer = actions[-1]
        assert isinstance(answer, Grant | Refuse)
        assert (answer.session, answer.request_id) == key
        if key in self.answers:
            first, same = self.answers[key]
            assert len(actions) == 1
            if first == event:
                assert answer == same
            else:
                assert isinstance(answer, Refuse)
            return
        self.answers[key] = (event, answer)
        if isinstance(answer, Refuse):
            assert len(actions) == 1 and answer.asked == event.workers_min
            assert answer.available < answer.asked or "has ended" in answer.reason
            return
        assert event.workers_min <= answer.workers <= event.workers_max
        assert bool(answer.reason) == (answer.workers < event.workers_max)
        # The epoch is durable before the answer, if the answer needs one.
        assert [type(action) for action in actions[:-1]] == [Store] * bool(answer.leases)
        for lease in answer.leases:
            self.check_grant(event, lease, actions[0])

    def check_grant(self, event: Demand, lease: Lease, store: Action) -> None:
        assert isinstance(store, Store) and lease.epoch <= store.epoch
        assert lease.epoch > self.highest and lease.id > self.highest
        self.highest = max(lease.epoch, lease.id)
        self.grants += 1
        assert lease.workers
        last = self.reports[lease.node]
        there = self.running[lease.node]
        for worker in lease.workers:
            assert len(worker.cores) == event.cores_per_worker
            for core in worker.cores:
                assert core not in there, f"core {core} of {lease.node} granted twice"
                assert core in last.spare
                there[core] = (lease.id, worker.number)
        assert last.hard_end is None or lease.hard_end <= last.hard_end
        assert lease.hard_end is None or lease.hard_end > self.now
        used = sum(held.memory_bytes for held in self.book.leases
                   if held.node == lease.node)
        assert lease.memory_bytes == 0 or used <= last.memory_bytes

    def check_stop(self, event: Event, before: dict[int, Lease], node: str,
                   lease_id: int, workers: tuple[int, ...], grace_s: float) -> None:
        assert grace_s >= 0.0
        lease = before.get(lease_id)
        if lease is None:
            # Only an agent that was thought dead is told about an ended lease.
            assert isinstance(event, NodeReport) and workers == ()
            for core, (held, _) in list(self.running[node].items()):
                if held == lease_id:
                    del self.running[node][core]
        else:
            assert lease.node == node
            assert set(workers) <= {worker.number for worker in lease.workers}
            if lease.hard_end is not None:
                assert grace_s == 0.0 or self.now + grace_s <= lease.hard_end

    def stop_running(self, lease_id: int, workers: tuple[int, ...]) -> None:
        for there in self.running.values():
            for core, (held, number) in list(there.items()):
                if held == lease_id and (not workers or number in workers):
                    del there[core]

    def check(self) -> None:
        """The book's own view agrees with what really runs."""
        states = {lease.id: lease for lease in self.book.leases}
        for view in self.book.nodes:
            held = {core: lease.id for lease in states.values()
                    if lease.node == view.node for core in lease.cores}
            assert tuple(sorted(held)) == view.lent, "a core is in two live leases"
            there = self.running[view.node]
            for core, lease_id in held.items():
                assert there[core][0] == lease_id
            assert set(view.free) <= set(view.spare) - set(there)
        for lease_id, old in list(self.states.items()):
            lease = states.get(lease_id) or self.book.lease(lease_id)
            if lease is None:
                assert not old.live, f"lease {lease_id} was forgotten while it lived"
                del self.states[lease_id]
            elif lease.state is not old:
                assert lease.state in NEXT_STATES.get(old, ()), (old, lease.state)
                self.states[lease_id] = lease.state
        for lease_id, lease in states.items():
            self.states.setdefault(lease_id, lease.state)
            assert lease.workers and lease.state.live
            all_stop = len(lease.stopping) == len(lease.workers)
            assert (lease.state is LeaseState.REVOKING) == all_stop
            assert (lease.cause is None) != all_stop

    def end(self) -> None:
        """Everybody leaves: every core is free again and every lease has its end."""
        for lease in self.book.leases:
            self.send(SessionEnded(lease.session))
            self.send(WorkersStopped(lease.id))
        assert self.book.leases == []
        assert self.book.next_deadline() is None
        for name in NODES:
            self.running[name].clear()
            self.send(report(name))
            assert view(self.book, name).free == (1, 2, 3, 4)
            assert view(self.book, name).memory_free == 8 * GIB

    # --- what may happen ---

    def wants(self, choose: random.Random) -> None:
        low = choose.choice((0, 0, 1, 1, 2, 5))
        self.send(Demand(
            session=choose.choice(self.sessions), request_id=choose.randrange(40),
            uid=choose.choice((1, 2)), workers_min=low,
            workers_max=low + choose.randrange(4), cores_per_worker=choose.choice((1, 1, 2, 3)),
            memory_per_worker=choose.choice((0, 0, GIB, 3 * GIB)),
            duration_s=choose.choice((None, None, 5.0, 30.0))))

    def reports_in(self, choose: random.Random) -> None:
        name = choose.choice(NODES)
        spare = [core for core in range(8) if choose.random() < 0.8]
        choose.shuffle(spare)
        self.send(NodeReport(
            node=name, spare=tuple(spare), memory_bytes=choose.choice((4, 8, 16)) * GIB,
            numa={core: core // 4 for core in spare},
            busy={core: held for core, (held, _) in self.running[name].items()},
            hard_end=choose.choice((None, None, self.now + 15.0)),
            grace_s=choose.choice((0.0, 3.0)),
            lends_to_uid=choose.choice((None, None, 1))))

    def stops(self, choose: random.Random) -> None:
        """An agent says that workers are gone: told to stop or not."""
        if leases := self.book.leases:
            lease = choose.choice(leases)
            numbers = lease.stopping or [worker.number for worker in lease.workers]
            self.send(WorkersStopped(lease.id, choose.choice(
                (tuple(numbers), (choose.choice(numbers),)))))

    def changes_a_lease(self, choose: random.Random) -> None:
        if leases := self.book.leases:
            lease = choose.choice(leases)
            some = tuple(worker.number for worker in lease.workers
                         if choose.random() < 0.5)
            self.send(choose.choice((
                Activated(lease.id), Activated(lease.id),
                Revoke(lease.id, some, choose.choice((0.0, 1.0, 60.0))),
                Release(choose.choice(self.sessions), lease.id))))

    def repeats(self, choose: random.Random) -> None:
        """Something arrives twice, late."""
        event = choose.choice(self.past) if self.past else Tick()
        if isinstance(event, NodeReport):
            # A report is a fact about now; an old one can't be true again.
            return
        if isinstance(event, Demand) and (event.session, event.request_id) not in self.answers:
            return
        self.send(event)

    def session_ends(self, choose: random.Random) -> None:
        gone = choose.choice(self.sessions)
        self.send(SessionEnded(gone))
        if choose.random() < 0.8:
            self.sessions[self.sessions.index(gone)] = self.new_session()

    def node_is_lost(self, choose: random.Random) -> None:
        name = choose.choice(NODES)
        if choose.random() < 0.5:
            self.running[name].clear()
            held = [lease for lease in self.book.leases if lease.node == name]
            # Dead for real; the book hears of it in the same breath.
            self.send(NodeLost(name))
            assert all(self.book.lease(lease.id).state is LeaseState.LOST for lease in held)
        elif name in self.reports:
            self.send(NodeLost(name))

    def time_passes(self, choose: random.Random) -> None:
        self.now += choose.choice((0.1, 1.0, 10.0))
        self.send(Tick())
        deadline = self.book.next_deadline()
        assert deadline is None or deadline > self.now
        # What the book has forgotten may be asked for anew.
        self.answers = {key: answer for key, answer in self.answers.items()
                        if self.book.remembers(*key)}

    def book_restarts(self, choose: random.Random) -> None:
        self.restart()

    def old_workers_end(self, choose: random.Random) -> None:
        """What an earlier book granted comes to its hard end at the agent."""
        live = {lease.id for lease in self.book.leases}
        for there in self.running.values():
            for core, (held, _) in list(there.items()):
                if held not in live:
                    del there[core]


OPERATIONS = {
    World.wants: 30, World.stops: 22, World.reports_in: 10, World.changes_a_lease: 14,
    World.repeats: 12, World.time_passes: 8, World.session_ends: 4,
    World.old_workers_end: 3, World.node_is_lost: 2, World.book_restarts: 0.2,
}


@pytest.mark.parametrize("policy", ["shelves", *sorted(POLICIES)])
def test_no_random_life_breaks_a_promise(policy):
    """RFAAS_SOAK_LEASES sets how many operations."""
    count = int(os.environ.get("RFAAS_SOAK_LEASES", "100000" if policy == "default" else "20000"))
    choose = random.Random(count)
    world = World(policy)
    operations = choose.choices(list(OPERATIONS), list(OPERATIONS.values()), k=count)
    for operation in operations:
        operation(world, choose)
    world.end()
    assert world.grants > count // 20, "the test exercises too little"


class LeaseBookMachine(RuleBasedStateMachine):
    """The same world, driven by hypothesis, which finds the shortest failing life."""

    world: World

    @initialize(policy=st.sampled_from(["shelves", *sorted(POLICIES)]))
    def begins(self, policy: str) -> None:
        self.world = World(policy)

    @rule(choose=st.randoms(use_true_random=False),
          operation=st.sampled_from(list(OPERATIONS)))
    def happens(self, choose: random.Random, operation) -> None:
        operation(self.world, choose)

    @invariant()
    def the_book_agrees_with_what_runs(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()


TestLeaseBookMachine = LeaseBookMachine.TestCase
TestLeaseBookMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None)

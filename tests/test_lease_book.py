"""The lease book: every promise of the lease state machine, and long random lives."""

from __future__ import annotations

import os
import random

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
)

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
from rfaas_mpi.placement import pick_cores

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
    assert book.handle(again, 2.0) == []
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


def test_events_and_actions_survive_a_trace_on_disk(book):
    events: list[Event] = [report("n1", numa={1: 0}, busy={2: 5}), demand(high=2)]
    assert msgspec.json.decode(msgspec.json.encode(events), type=list[Event]) == events
    actions = [action for event in events for action in book.handle(event, 0.0)]
    assert msgspec.json.decode(
        msgspec.json.encode(actions), type=list[Action]) == actions

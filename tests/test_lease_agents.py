"""What agents' reports tell a lease book, and what a book that was restarted knows."""

from __future__ import annotations

import msgspec
import pytest

from rfaas_mpi.leases import (
    Admit,
    AgentStarted,
    Answered,
    Cause,
    Changes,
    Demand,
    Grant,
    GrantedWorker,
    Kept,
    Lease,
    LeaseBook,
    LeaseState,
    LiveLease,
    NodeDrained,
    NodeLost,
    NodeReport,
    NodeSilent,
    NodeUndrained,
    Notify,
    Refuse,
    Release,
    SessionEnded,
    StopWorkers,
    Store,
    Superseded,
    Tick,
    WorkersStopped,
)
from rfaas_mpi.placement import pick_cores

GIB = 2**30
S = 10**9


def report(clock_s: float, *live: Lease | LiveLease, node: str = "n0", spare=(1, 2, 3, 4), incarnation: int = 1,
           **more) -> NodeReport:
    return NodeReport(node=node, spare=tuple(spare), memory_bytes=8 * GIB, incarnation=incarnation,
                      clock_ns=int(clock_s * S), live=tuple(
                          lease if isinstance(lease, LiveLease) else LiveLease(lease.id, lease.epoch, lease.workers)
                          for lease in live), **more)


def demand(request_id: int = 1, low: int = 1, high: int = 1, **more) -> Demand:
    return Demand(**{"session": 7, "request_id": request_id, "uid": 1000, "workers_min": low, "workers_max": high,
                     **more})


@pytest.fixture
def book() -> LeaseBook:
    """A book with one node, whose agent's clock shows 1000 s where the book's shows 0."""
    book = LeaseBook(pick_cores, activate_within_s=10.0, durable=True, epoch=1)
    book.handle(report(1000), 0.0)
    return book


def lease_of(book: LeaseBook, event: Demand, now: float = 0.0) -> Lease:
    answer = book.handle(event, now)[-1]
    assert isinstance(answer, Grant), answer
    (lease,) = answer.leases
    return lease


def view(book: LeaseBook, node: str = "n0"):
    (found,) = [view for view in book.nodes if view.node == node]
    return found


def restarted(book: LeaseBook, now: float = 0.0) -> LeaseBook:
    """A book that begins with everything that this one changed so far."""
    changes = msgspec.json.decode(msgspec.json.encode(book.changes()), type=Changes)
    later = LeaseBook(pick_cores, epoch=changes.epoch, activate_within_s=10.0, durable=True)
    later.restore(Kept(leases=changes.leases, answers=changes.answers, closed=changes.closed,
                       drained=[node for node, drained in changes.drained.items() if drained]), now)
    return later


# --- incarnations -----------------------------------------------------------

def test_an_agent_is_admitted_under_a_number_that_is_stored_first():
    book = LeaseBook(pick_cores, epoch=40)
    assert book.handle(AgentStarted("n0", "a"), 0.0) == [Store(41), Admit("n0", "a", 41)]


def test_an_agent_that_asks_twice_is_the_same_agent():
    book = LeaseBook(pick_cores)
    _, admit = book.handle(AgentStarted("n0", "a"), 0.0)
    assert book.handle(AgentStarted("n0", "a"), 0.0) == [admit]
    _, other = book.handle(AgentStarted("n0", "b"), 0.0)
    assert isinstance(other, Admit) and other.incarnation > admit.incarnation


def test_an_agent_that_was_replaced_is_told_and_changes_nothing(book):
    book.handle(report(5, incarnation=2, spare=(1,)), 0.0)
    assert book.handle(report(1001, incarnation=1), 0.0) == [Superseded("n0", 1)]
    assert view(book).spare == (1,)


def test_all_that_a_dead_agent_ran_is_lost_with_the_next_one_s_first_report(book):
    begun, idle = lease_of(book, demand(1)), lease_of(book, demand(2))
    book.handle(report(1001, begun), 1.0)
    actions = book.handle(report(5, incarnation=2), 2.0)
    assert {(action.lease_id, action.cause) for action in actions if isinstance(action, Notify)} == {
        (begun.id, Cause.NODE_LOST), (idle.id, Cause.NODE_LOST)}
    assert {book.lease(lease.id).state for lease in (begun, idle)} == {LeaseState.LOST}
    assert view(book).free == (1, 2, 3, 4)


# --- reports that come late or twice ----------------------------------------

def test_a_report_that_comes_twice_changes_nothing(book):
    lease = lease_of(book, demand(high=2))
    book.handle(report(1001, lease), 1.0)
    book.handle(report(1002), 2.0)
    assert book.handle(report(1001, lease), 3.0) == []
    assert view(book).free == (1, 2, 3, 4)


def test_a_report_that_was_overtaken_does_not_end_what_began_after_it(book):
    lease = lease_of(book, demand())
    book.handle(report(1005, lease), 5.0)
    assert book.handle(report(1001), 6.0) == []
    assert book.lease(lease.id).state is LeaseState.ACTIVE


# --- what became of a grant -------------------------------------------------

def test_a_lease_that_began_and_ended_between_two_reports_is_over(book):
    lease, idle = lease_of(book, demand(1)), lease_of(book, demand(2))
    assert book.handle(report(1001, over=(lease.id, 10**6)), 1.0) == []
    assert book.lease(lease.id).state is LeaseState.RELEASED
    assert book.lease(idle.id).state is LeaseState.GRANTED
    assert view(book).free == (1, 3, 4)


def test_a_lease_that_was_given_back_unused_is_over_when_its_agent_says_so(book):
    lease = lease_of(book, demand())
    (stop,) = book.handle(Release(7, lease.id), 1.0)
    assert isinstance(stop, StopWorkers) and book.lease(lease.id).state is LeaseState.REVOKING
    assert book.handle(report(1002, over=(lease.id,)), 2.0) == []
    assert book.lease(lease.id).state is LeaseState.RELEASED and view(book).free == (1, 2, 3, 4)


def test_what_another_agent_says_is_over_is_not(book):
    book.handle(report(1, node="n1", spare=()), 0.0)
    lease = lease_of(book, demand())
    book.handle(report(2, node="n1", spare=(), over=(lease.id,)), 1.0)
    assert book.lease(lease.id).state is LeaseState.GRANTED
    # An earlier agent's word comes too late.
    assert book.handle(report(2000, incarnation=0x10, over=()), 2.0)
    lease = lease_of(book, demand(9), 2.0)
    assert book.handle(report(3000, incarnation=1, over=(lease.id,)), 3.0) == [Superseded("n0", 1)]
    assert book.lease(lease.id).state is LeaseState.GRANTED


def test_a_lease_that_lives_is_not_over_whatever_else_is_said(book):
    lease = lease_of(book, demand())
    book.handle(report(1001, lease, over=(lease.id,)), 1.0)
    assert book.lease(lease.id).state is LeaseState.ACTIVE


def test_a_reported_lease_is_active_and_once_it_is_missing_it_has_ended(book):
    lease = lease_of(book, demand())
    book.handle(report(1001, lease), 1.0)
    assert book.lease(lease.id).state is LeaseState.ACTIVE
    assert book.handle(report(1002), 2.0) == []
    assert book.lease(lease.id).state is LeaseState.RELEASED


def test_a_worker_that_is_missing_from_its_lease_has_ended(book):
    lease = lease_of(book, demand(high=3))
    book.handle(report(1001, LiveLease(lease.id, lease.epoch, lease.workers[1:])), 1.0)
    assert book.lease(lease.id).cores == (2, 3) and view(book).free == (1, 4)


def test_a_grant_that_may_still_begin_keeps_its_cores(book):
    lease = lease_of(book, demand(), 2.0)
    assert lease.not_after_ns == 1012 * S and lease.incarnation == 1
    assert book.handle(report(1012), 12.0) == [] and 1 not in view(book).free
    (notify,) = book.handle(report(1012.001), 12.0)
    assert isinstance(notify, Notify) and notify.cause is Cause.EXPIRED
    assert book.lease(lease.id).state is LeaseState.EXPIRED and 1 in view(book).free


def test_the_manager_s_clock_alone_never_ends_a_grant_that_may_have_begun(book):
    lease = lease_of(book, demand())
    assert book.next_deadline() is None and book.handle(Tick(), 500.0) == []
    book.handle(report(1500, lease), 500.0)
    assert book.lease(lease.id).state is LeaseState.ACTIVE


def test_an_agent_that_still_runs_what_it_was_told_to_stop_is_told_again(book):
    lease = lease_of(book, demand())
    book.handle(report(1001, lease), 1.0)
    book.handle(Release(7, lease.id), 1.0)
    (stop,) = book.handle(report(1002, lease), 2.0)
    assert stop == StopWorkers("n0", lease.id, (0,), Cause.RELEASED)


def test_an_agent_that_claims_an_epoch_beyond_the_book_s_raises_it(book):
    foreign = LiveLease(900, 900, (GrantedWorker(0, (3,)),))
    assert book.handle(report(1001, foreign), 1.0) == [Store(900)]
    assert lease_of(book, demand(high=4)).id == 901
    assert 3 not in {core for lease in book.leases for core in lease.cores}


def test_an_incarnation_beyond_the_book_s_epoch_raises_it_too():
    book = LeaseBook(pick_cores)
    assert book.handle(report(5, incarnation=800), 0.0) == [Store(800)]
    assert book.handle(AgentStarted("n0", "b"), 0.0)[-1].incarnation == 801


def test_a_user_s_own_agent_does_not_raise_the_epoch(book):
    lie = LiveLease(2**61, 2**61, (GrantedWorker(0, (3,)),))
    assert book.handle(report(1001, lie, lends_to_uid=1000), 1.0) == []
    assert book.epoch < 100


@pytest.mark.parametrize("senseless", [
    report(1, LiveLease(2**62, 1, ())), report(1, LiveLease(0, 0, ())), report(0, LiveLease(1, 1, ())),
    report(1, LiveLease(1, 1, ()), incarnation=0), report(1, spare=(-1,)), report(1, incarnation=2**62),
    report(1, LiveLease(1, 1, (GrantedWorker(0, (3,)), GrantedWorker(1, (3,)))))])
def test_a_senseless_report_changes_nothing(book, senseless):
    with pytest.raises(ValueError, match="node n0 reports"):
        book.handle(senseless, 1.0)
    assert view(book).free == (1, 2, 3, 4)


# --- silent, dead, drained --------------------------------------------------

def test_cores_of_a_silent_agent_are_not_granted_until_it_is_back(book):
    lease = lease_of(book, demand(1))
    book.handle(report(1001, lease), 1.0)
    book.handle(NodeSilent("n0"), 30.0)
    (refuse,) = book.handle(demand(2), 30.0)
    assert isinstance(refuse, Refuse) and view(book).silent and view(book).free == ()
    assert book.lease(lease.id).state is LeaseState.ACTIVE
    book.handle(report(1031, lease), 31.0)
    assert lease_of(book, demand(3), 31.0).cores == (2,)


def test_a_dead_agent_that_is_back_waits_for_a_grant_that_may_be_on_its_way(book):
    lease = lease_of(book, demand())
    book.handle(NodeLost("n0"), 1.0)
    assert book.lease(lease.id).state is LeaseState.LOST
    book.handle(report(1002), 2.0)
    assert isinstance(book.handle(demand(2), 2.0)[0], Refuse)
    book.handle(report(1011), 11.0)
    assert lease_of(book, demand(3), 11.0).cores == (1,)


def test_a_dead_agent_that_still_runs_a_lease_is_told_to_stop_it(book):
    lease = lease_of(book, demand())
    book.handle(report(1001, lease), 1.0)
    book.handle(NodeLost("n0"), 60.0)
    (stop,) = book.handle(report(1061, lease), 61.0)
    assert stop == StopWorkers("n0", lease.id, (), Cause.NODE_LOST)
    assert view(book).free == (2, 3, 4)
    book.handle(report(1062), 62.0)
    assert view(book).free == (1, 2, 3, 4)


def test_a_drained_node_takes_back_and_lends_nothing(book):
    lease = lease_of(book, demand())
    notify, stop = book.handle(NodeDrained("n0", grace_s=2.0), 1.0)
    assert isinstance(notify, Notify) and stop == StopWorkers("n0", lease.id, (0,), Cause.REVOKED, 2.0)
    assert book.handle(NodeDrained("n0", grace_s=2.0), 1.0) == []
    book.handle(report(1012), 12.0)
    assert isinstance(book.handle(demand(2), 12.0)[0], Refuse) and view(book).drained
    book.handle(NodeUndrained("n0"), 13.0)
    assert lease_of(book, demand(3), 13.0).cores == (1,)


# --- which node -------------------------------------------------------------

def test_what_one_node_can_take_goes_where_least_is_left_and_the_rest_to_few():
    book = LeaseBook(pick_cores)
    for node, size in {"a": 8, "b": 3, "c": 6, "d": 2}.items():
        book.handle(NodeReport(node=node, spare=tuple(range(size)), memory_bytes=GIB), 0.0)
    one = book.handle(demand(1, 1, 3), 0.0)[-1]
    assert [(lease.node, len(lease.workers)) for lease in one.leases] == [("b", 3)]
    rest = book.handle(demand(2, 1, 15), 0.0)[-1]
    assert [(lease.node, len(lease.workers)) for lease in rest.leases] == [("a", 8), ("c", 6), ("d", 1)]


def test_memory_decides_too_which_node_has_room():
    book = LeaseBook(pick_cores)
    for node, size, memory in (("a", 8, 1), ("b", 4, 4), ("c", 2, 8)):
        book.handle(NodeReport(node=node, spare=tuple(range(size)), memory_bytes=memory * GIB), 0.0)
    grant = book.handle(demand(1, 1, 6, memory_per_worker=GIB), 0.0)[-1]
    assert [(lease.node, len(lease.workers)) for lease in grant.leases] == [("b", 4), ("c", 2)]


def test_a_users_own_nodes_and_everybodys_fill_a_demand_together():
    book = LeaseBook(pick_cores)
    for node, uid in (("own", 1000), ("other", 1001), ("all", None)):
        book.handle(NodeReport(node=node, spare=(0, 1), memory_bytes=GIB, lends_to_uid=uid), 0.0)
    grant = book.handle(demand(1, 1, 6), 0.0)[-1]
    assert {lease.node for lease in grant.leases} == {"own", "all"} and "2 spare" not in grant.reason
    assert "0 of 4 spare cores" in book.handle(demand(2, 1, 1), 0.0)[0].reason


def test_memory_that_nobody_asked_for_is_a_fair_share_of_the_node():
    book = LeaseBook(pick_cores)
    book.handle(NodeReport(node="n0", spare=(0, 1, 2, 3), memory_bytes=8 * GIB), 0.0)
    assert lease_of(book, demand(1, memory_per_worker=None)).memory_per_worker == 2 * GIB
    assert lease_of(book, demand(2, cores_per_worker=2, memory_per_worker=None)).memory_per_worker == 4 * GIB


def test_a_demand_that_waits_has_no_answer_before_it_can_be_met(book):
    assert book.handle(demand(1, 5, 5, waits=True), 0.0) == [] and not book.remembers(7, 1)
    book.handle(report(1001, spare=range(6)), 1.0)
    *_, grant = book.handle(demand(1, 5, 5, waits=True), 1.0)
    assert isinstance(grant, Grant) and book.handle(demand(1, 5, 5), 2.0) == [grant]


# --- a book that is restarted -----------------------------------------------

def test_a_restarted_book_knows_every_lease_and_lends_nothing_before_a_report(book):
    lease = lease_of(book, demand())
    book.handle(report(1001, lease), 1.0)
    later = restarted(book)
    assert later.leases == [book.lease(lease.id)] and later.unheard == ["n0"]
    assert isinstance(later.handle(demand(2), 2.0)[0], Refuse)
    later.handle(report(1002, lease), 2.0)
    assert lease_of(later, demand(3), 2.0).cores == (2,) and later.unheard == []


def test_a_restarted_book_gives_the_same_answer_and_goes_on_counting(book):
    first = book.handle(demand(1, 1, 2), 0.0)[-1]
    later = restarted(book)
    assert later.handle(demand(1, 1, 2), 1.0) == [first]
    later.handle(report(1001), 1.0)
    assert lease_of(later, demand(2), 1.0).id > first.leases[0].id


def test_a_book_never_repeats_the_number_of_a_lease_that_it_was_given(book):
    lease = lease_of(book, demand())
    later = LeaseBook(pick_cores, epoch=0)
    later.restore(Kept(leases=[lease]), 0.0)
    assert later.epoch == lease.epoch


def test_a_lease_that_ended_while_the_manager_was_down_ends_with_the_first_report(book):
    lease = lease_of(book, demand())
    book.handle(report(1001, lease), 1.0)
    later = restarted(book, 100.0)
    later.handle(report(1101), 101.0)
    assert later.lease(lease.id).state is LeaseState.RELEASED and view(later).free == (1, 2, 3, 4)


def test_a_report_from_before_the_restart_does_not_end_what_began_after_it(book):
    lease = lease_of(book, demand())
    book.handle(report(1005, lease), 5.0)
    later = restarted(book, 6.0)
    assert later.handle(report(1001), 6.0) == []
    assert later.lease(lease.id).state is LeaseState.ACTIVE


def test_a_restarted_book_still_waits_for_a_grant_that_may_be_on_its_way(book):
    lease_of(book, demand())
    book.handle(NodeLost("n0"), 1.0)
    later = restarted(book, 2.0)
    later.handle(report(1002), 2.0)
    assert isinstance(later.handle(demand(2), 2.0)[0], Refuse)
    later.handle(report(1011), 11.0)
    assert lease_of(later, demand(3), 11.0).cores == (1,)


def test_a_revocation_goes_on_after_a_restart_with_the_grace_that_is_left(book):
    lease = lease_of(book, demand())
    book.handle(report(1001, lease), 1.0)
    book.handle(NodeDrained("n0", grace_s=5.0), 2.0)
    later = restarted(book, 3.0)
    (stop,) = later.handle(report(1004, lease), 4.0)
    assert stop == StopWorkers("n0", lease.id, (0,), Cause.REVOKED, 3.0)


def test_sessions_that_ended_and_nodes_that_are_drained_stay_so_over_a_restart(book):
    book.handle(SessionEnded(7), 0.0)
    book.handle(NodeDrained("n0"), 0.0)
    later = restarted(book)
    later.handle(report(1001), 1.0)
    assert "has ended" in later.handle(demand(2), 1.0)[0].reason
    assert "no node" in later.handle(demand(1, session=8), 1.0)[0].reason


def test_a_hard_end_is_kept_over_a_restart(book):
    lease = lease_of(book, demand(duration_s=60.0))
    later = restarted(book)
    assert later.next_deadline() == 60.0
    later.handle(report(1001, lease), 1.0)
    assert {action.cause for action in later.handle(Tick(), 60.0)} == {Cause.EXPIRED}


def test_records_that_lend_a_core_twice_are_refused(book):
    lease = lease_of(book, demand())
    twin = msgspec.structs.replace(lease, id=9, epoch=9)
    with pytest.raises(ValueError, match="core 1 of node n0 is in both"):
        LeaseBook(pick_cores).restore(Kept(leases=[lease, twin]), 0.0)


def test_changes_tell_each_lease_once_as_it_is_now(book):
    lease = lease_of(book, demand())
    book.handle(report(1001, lease), 1.0)
    changes = book.changes()
    assert changes.leases == (book.lease(lease.id),) and changes.leases[0].state is LeaseState.ACTIVE
    assert changes.answers == (Answered(demand(), book.handle(demand(), 2.0)[0]),)
    assert not book.changes()
    book.handle(report(1002), 2.0)
    assert [lease.state for lease in book.changes().leases] == [LeaseState.RELEASED]


def test_an_answer_that_gave_nothing_is_not_written_down(book):
    book.handle(demand(1, 9, 9), 0.0)
    book.handle(demand(2, 0, 0), 0.0)
    assert not book.changes()


def test_a_long_life_of_short_leases_keeps_nothing_of_them():
    book = LeaseBook(pick_cores, remember_s=1.0)
    book.handle(NodeReport(node="n0", spare=(1,), memory_bytes=GIB), 0.0)
    for number in range(2000):
        now = float(number)
        book.handle(demand(number, duration_s=1e6), now)
        book.handle(Release(7, book.leases[0].id), now)
        book.handle(WorkersStopped(book.leases[0].id), now)
        book.handle(Tick(), now)
    assert len(book._answers) < 10 and len(book._ended) < 10 and len(book._deadlines) < 100

"""The manager's decisions and what it keeps on disk."""

from __future__ import annotations

import itertools
import os
import sqlite3

import pytest

from rfaas_mpi.leases import LeaseBook, NodeReport
from rfaas_mpi.manager.core import Granted, Manager, Notify, Refused, StopWorkers
from rfaas_mpi.manager.core import Store as StoreEpoch
from rfaas_mpi.manager.store import EPOCHS_AHEAD, Store
from rfaas_mpi.messages import LeaseRequest
from rfaas_mpi.placement import pick_cores

GIB = 1 << 30
_ids = itertools.count(1)


def report(*cores: int, memory_bytes: int = 8 * GIB) -> NodeReport:
    return NodeReport(node="here", spare=cores, memory_bytes=memory_bytes)


def ask(workers: int | tuple[int, int] = 1, *, timeout_s: float = 0.0, **facts: object) -> LeaseRequest:
    least, most = (workers, workers) if isinstance(workers, int) else workers
    return LeaseRequest(next(_ids), least, most, **{"cores_per_worker": 1, **facts}, timeout_s=timeout_s)


@pytest.fixture
def manager():
    manager = Manager(LeaseBook(pick_cores))
    manager.report(report(0, 1, 2, 3), 0.0)
    return manager


def give_back(manager: Manager, granted: Granted, now: float) -> None:
    """Releases every lease of a grant and says that its workers are gone."""
    for lease in granted.leases:
        manager.release(granted.session, lease.id, now)
        for worker in lease.workers:
            manager.stopped(lease.id, worker.number, now)


def granted(actions: list) -> Granted:
    [grant] = [action for action in actions if isinstance(action, Granted)]
    return grant


def test_an_epoch_is_stored_before_the_grant_that_needs_it(manager):
    store, grant = manager.demand(1, 0, ask(2), 0.0)
    assert isinstance(store, StoreEpoch) and isinstance(grant, Granted)
    assert store.epoch == grant.leases[0].epoch


def test_a_demand_without_patience_is_refused_at_once(manager):
    [refused] = manager.demand(1, 0, ask(5), 0.0)
    assert isinstance(refused, Refused) and "5 workers" in refused.reason and "4 available" in refused.reason
    assert manager.waiting == 0


def test_a_demand_waits_until_its_time_is_over_and_is_then_refused(manager):
    assert manager.demand(1, 0, ask(5, timeout_s=10), 0.0) == []
    assert manager.waiting == 1 and manager.next_deadline() <= 10
    assert manager.tick(9.9) == []
    assert isinstance(manager.tick(10.0)[0], Refused) and manager.waiting == 0


def test_demands_that_wait_are_served_in_their_order(manager):
    first = granted(manager.demand(1, 0, ask(4), 0.0))
    big, small = ask(4, timeout_s=100), ask(1, timeout_s=100)
    assert manager.demand(2, 0, big, 1.0) == [] and manager.demand(3, 0, small, 2.0) == []
    give_back(manager, first, 3.0)
    assert granted(manager.report(report(0, 1, 2, 3), 3.0)).request == big.id
    assert manager.waiting == 1


def test_a_demand_does_not_pass_those_that_wait(manager):
    granted(manager.demand(1, 0, ask(3), 0.0))
    assert manager.demand(2, 0, ask(2, timeout_s=100), 1.0) == []
    assert manager.demand(3, 0, ask(1, timeout_s=100), 2.0) == []


def test_a_demand_that_could_never_be_met_holds_nobody_up(manager):
    assert manager.demand(2, 0, ask(5, timeout_s=100), 0.0) == []
    assert granted(manager.demand(3, 0, ask(1, timeout_s=100), 1.0)).leases
    assert manager.waiting == 1
    more = manager.report(report(*range(6)), 2.0)
    assert granted(more).session == 2


def test_a_request_that_comes_twice_waits_once_and_is_answered_the_same(manager):
    first = ask(4)
    grant = granted(manager.demand(1, 0, first, 0.0))
    assert manager.demand(1, 0, first, 1.0) == [grant]
    later = ask(2, timeout_s=100)
    assert manager.demand(2, 0, later, 1.0) == manager.demand(2, 0, later, 2.0) == [] and manager.waiting == 1
    give_back(manager, grant, 3.0)
    served = granted(manager.report(report(0, 1, 2, 3), 3.0))
    assert manager.demand(2, 0, later, 4.0) == [served]
    other = LeaseRequest(later.id, 1, 1, 1)
    assert "different demand" in manager.demand(2, 0, other, 4.0)[0].reason
    refused = manager.demand(3, 0, wanted := ask(9), 5.0)
    assert manager.demand(3, 0, wanted, 6.0) == refused


def test_a_request_that_waits_is_not_replaced_by_another_of_its_name(manager):
    waiting = ask(5, timeout_s=100)
    manager.report(report(*range(8)), 0.0)
    granted(manager.demand(1, 0, ask(8), 0.0))
    manager.demand(2, 0, waiting, 0.0)
    [refused] = manager.demand(2, 0, LeaseRequest(waiting.id, 1, 1, 1), 0.0)
    assert isinstance(refused, Refused) and "different demand" in refused.reason and manager.waiting == 1


def test_a_senseless_demand_is_refused_at_once_also_behind_others(manager):
    granted(manager.demand(1, 0, ask(4), 0.0))
    assert manager.demand(2, 0, ask(2, timeout_s=100), 0.0) == []
    with pytest.raises(ValueError, match="min <= max"):
        manager.demand(3, 0, ask((2, 1), timeout_s=100), 0.0)
    assert manager.waiting == 1


def test_a_session_that_ended_no_longer_waits(manager):
    manager.demand(1, 0, ask(5, timeout_s=100), 0.0)
    manager.session_ended(1, 1.0)
    assert manager.waiting == 0
    assert manager.report(report(*range(8)), 2.0) == []


def test_a_sessions_end_stops_what_it_holds(manager):
    grant = granted(manager.demand(1, 0, ask(2), 0.0))
    [stop] = manager.session_ended(1, 1.0)
    assert isinstance(stop, StopWorkers) and stop.lease_id == grant.leases[0].id and len(stop.workers) == 2


def test_memory_is_shared_by_cores_where_nothing_is_said(manager):
    assert granted(manager.demand(1, 0, ask(1), 0.0)).leases[0].memory_per_worker == 2 * GIB
    assert granted(manager.demand(1, 0, ask(1, cores_per_worker=2), 0.0)).leases[0].memory_per_worker == 4 * GIB


def test_a_neighbour_that_took_more_memory_leaves_less_and_not_nothing(manager):
    granted(manager.demand(1, 0, ask(1, memory_per_worker=7 * GIB), 0.0))
    share = granted(manager.demand(2, 0, ask(3), 0.0)).leases[0].memory_per_worker
    assert 0 < share * 3 <= GIB


def test_a_core_that_is_wanted_back_is_told_and_stopped(manager):
    grant = granted(manager.demand(1, 0, ask(1), 0.0))
    [core] = grant.leases[0].cores
    actions = manager.report(report(*({0, 1, 2, 3} - {core})), 1.0)
    assert {type(action) for action in actions} == {Notify, StopWorkers}


def test_only_the_owner_holds_a_lease(manager):
    lease = granted(manager.demand(1, 0, ask(1), 0.0)).leases[0].id
    assert manager.release(2, lease, 1.0) == []
    assert manager.release(1, lease, 1.0) != []


# --- what is kept ---------------------------------------------------------------

def test_epochs_only_rise_also_after_a_crash(tmp_path):
    path = tmp_path / "store.db"
    seen = 0
    stores = []
    for _ in range(5):
        store = Store(path)          # not closed before the next opens: as after SIGKILL
        stores.append(store)
        assert store.epoch >= seen
        for epoch in range(store.epoch + 1, store.epoch + 4):
            store.keep(epoch)
            seen = epoch
    for store in stores:
        store.close()


def test_an_epoch_is_on_disk_before_keep_returns(tmp_path):
    path = tmp_path / "store.db"
    store = Store(path)
    for epoch in (1, 2, EPOCHS_AHEAD + 2, 10 * EPOCHS_AHEAD):
        store.keep(epoch)
        other = sqlite3.connect(path)
        assert other.execute("SELECT reserved FROM epoch").fetchone()[0] >= epoch
        other.close()
    store.close()
    store.close()


def test_a_damaged_store_is_set_aside_and_epochs_begin_above_it(tmp_path):
    path = tmp_path / "store.db"
    store = Store(path)
    store.keep(1000)
    store.close()
    path.write_bytes(os.urandom(8192))
    store = Store(path)
    assert store.epoch > 1000 + EPOCHS_AHEAD and path.with_suffix(".damaged").exists()
    store.close()


def test_counts_that_no_worker_can_have_reached_spoil_no_sums(tmp_path):
    store = Store(tmp_path / "store.db")
    for worker in range(3):
        store.used(lease=1, worker=worker, pid=3, cores=4, held_s=2.0, cpu_s=1.0, exec_ns=0, poll_ns=0, count=2**64 - 1)
    assert (store.usage()["workers"], store.usage()["invocations"]) == (3, 2**63 - 1)
    store.close()


def test_usage_is_cut_to_what_can_have_been_used(tmp_path):
    store = Store(tmp_path / "store.db")
    store.used(lease=1, worker=2, pid=3, cores=4, held_s=2.0, cpu_s=1.0, exec_ns=2**63, poll_ns=2**63, count=2**64 - 1)
    usage = store.usage()
    assert (usage["core_s"], usage["exec_s"], usage["invocations"]) == (8.0, 2.0, 2**63 - 1)
    store.close()

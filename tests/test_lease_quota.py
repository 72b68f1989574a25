"""Quotas, what users have had, and demands that need a node for a while: what the lease book makes of them."""

from __future__ import annotations

import math

import pytest

from rfaas_mpi.leases import Demand, Grant, LeaseBook, NodeReport, NodeTraits, RankAt, Refuse, Release, WorkersStopped
from rfaas_mpi.leases.held import Held
from rfaas_mpi.placement import Placer, Settings, pick_cores

GIB = 1 << 30


def report(node: str = "n0", cores: int = 8, **more) -> NodeReport:
    return NodeReport(node=node, spare=tuple(range(cores)), memory_bytes=8 * GIB, **more)


def demand(number: int = 1, low: int = 1, high: int | None = None, uid: int = 7, **more) -> Demand:
    return Demand(session=uid, request_id=number, uid=uid, workers_min=low, workers_max=low if high is None else high,
                  **more)


EACH = pytest.mark.parametrize("pick", [pick_cores, Placer()], ids=["shelves", "default"])


def answer(book: LeaseBook, event: Demand, now: float = 0.0) -> Grant | Refuse:
    found = book.handle(event, now)[-1]
    assert isinstance(found, Grant | Refuse)
    return found


@pytest.mark.parametrize("made", [lambda: pick_cores, Placer])
def test_a_user_gets_no_more_cores_than_the_quota_and_others_get_theirs(made):
    book = LeaseBook(made(), quota=lambda uid: 4 if uid == 7 else None)
    book.handle(report(), 0.0)
    first = answer(book, demand(1, 1, 6))
    assert isinstance(first, Grant) and first.workers == 4
    assert "asked for 6 workers with each 1 core, 4 allowed" in first.reason
    assert "an administrator can raise" in first.reason
    refused = answer(book, demand(2))
    assert isinstance(refused, Refuse) and "user 7 holds 4 cores and may hold 4 at a time" in refused.reason
    assert refused.available == 0
    other = answer(book, demand(3, 2, uid=8))
    assert isinstance(other, Grant) and other.workers == 2 and other.reason == ""
    for lease in first.leases:
        book.handle(Release(7, lease.id), 1.0)
        book.handle(WorkersStopped(lease.id), 1.0)
    again = answer(book, demand(4, 2, cores_per_worker=2), 2.0)
    assert isinstance(again, Grant) and again.workers == 2


def test_who_waits_for_the_own_cores_waits_and_who_asks_for_more_than_the_quota_does_not():
    book = LeaseBook(Placer(), quota=lambda uid: 4)
    book.handle(report(), 0.0)
    answer(book, demand(1, 4))
    assert book.handle(demand(2, 1, waits=True), 0.0) == []
    assert book.quota_left(7) == 0 and book.quota_left(8) == 4
    refused = answer(book, demand(3, 5, waits=True))
    assert isinstance(refused, Refuse) and "may hold 4 at a time" in refused.reason


@pytest.mark.parametrize("made", [lambda: pick_cores, Placer])
def test_a_node_that_is_wanted_back_too_soon_is_refused_with_the_reason(made):
    book = LeaseBook(made())
    book.handle(report(hard_end=30.0), 0.0)
    refused = answer(book, demand(1, least_s=60.0))
    assert isinstance(refused, Refuse) and "1 node is wanted back within 60 s" in refused.reason
    book.handle(report("n1"), 0.0)
    found = answer(book, demand(2, least_s=60.0, duration_s=600.0))
    assert isinstance(found, Grant)
    (lease,) = found.leases
    assert (lease.node, lease.hard_end) == ("n1", 600.0)
    # Without such a need the end is whatever comes first.
    answer(book, demand(3, 7, 7))
    (soon,) = [one for one in book.leases if one.node == "n0" or one.request_id == 3][:1]
    assert soon.hard_end in (None, 30.0)


def test_a_lease_ends_with_its_duration_or_with_the_nodes_window():
    book = LeaseBook(Placer())
    book.handle(report(hard_end=30.0), 0.0)
    for number, (duration_s, end) in enumerate(((10.0, 10.0), (50.0, 30.0), (None, 30.0))):
        found = answer(book, demand(number, duration_s=duration_s))
        assert isinstance(found, Grant) and found.leases[0].hard_end == end


def test_a_demand_goes_to_the_node_and_switch_of_its_rank():
    # By default a node's memory is as near as its leaf switch.
    book = LeaseBook(Placer(settings=Settings(bandwidth=(20e9, 10e9, 5e9, 2.5e9))))
    for number in range(6):
        book.handle(report(f"n{number}", 2, traits=NodeTraits(switches=(f"s{number // 2}", "top"))), 0.0)
    near = answer(book, demand(1, 1, place=RankAt("n3")))
    assert isinstance(near, Grant) and near.leases[0].node == "n3"
    # Its own node lends nothing: the rank knows its switch.
    below = answer(book, demand(2, 1, place=RankAt("elsewhere", switches=("s2", "top"))))
    assert isinstance(below, Grant) and below.leases[0].node in ("n4", "n5")


def test_a_chooser_that_wants_what_is_lent_is_stopped():
    class Wrong(Placer):
        def choose(self, demand, now, **more):
            return {"n0": [(0,)]}

    book = LeaseBook(Wrong())
    book.handle(report(), 0.0)
    answer(book, demand(1))
    with pytest.raises(RuntimeError, match="that is lent"):
        book.handle(demand(2), 0.0)


# --- what users have had --------------------------------------------------------

def test_what_is_held_adds_up_and_halves_each_half_life():
    held = Held(half_life_s=100.0)
    held.change(7, 4, 0.0)
    assert held.cores(7) == 4 and held.had(0.0) == {7: 0.0}
    # c · H / ln 2 · (1 − ½)
    assert held.had(100.0)[7] == pytest.approx(4 * 100 / math.log(2) / 2)
    held.change(7, -4, 100.0)
    assert held.had(200.0)[7] == pytest.approx(4 * 100 / math.log(2) / 4)
    held.add({8: 50.0}, 200.0)
    assert held.had(300.0)[8] == pytest.approx(25.0)
    held.forget(10_000.0)
    assert held.had(10_000.0) == {} and held.cores(7) == 0
    with pytest.raises(ValueError, match="half_life_s is 0"):
        Held(0.0)


@EACH
def test_the_book_knows_what_each_user_holds(pick):
    book = LeaseBook(pick)
    book.handle(report(), 0.0)
    found = answer(book, demand(1, 3, cores_per_worker=2))
    assert isinstance(found, Grant) and book.held.cores(7) == 6
    lease = found.leases[0]
    book.handle(WorkersStopped(lease.id, (0,)), 1.0)
    assert book.held.cores(7) == 4
    book.handle(WorkersStopped(lease.id), 2.0)
    assert book.held.cores(7) == 0 and book.held.had(2.0)[7] == pytest.approx(6 + 4, rel=1e-3)

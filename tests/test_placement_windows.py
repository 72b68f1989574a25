"""What reports teach of windows: how long they last, by partition, and what the default policy makes of it."""

from __future__ import annotations

import pytest

from rfaas_mpi.leases import Demand, LeaseBook, NodeReport, NodeTraits
from rfaas_mpi.manager.cluster import Cluster
from rfaas_mpi.messages import LeaseRequest
from rfaas_mpi.placement import Learned, Placer, Settings, Window, Windows
from rfaas_mpi.placement.survival import PROMETHEUS_FIB
from rfaas_mpi.placement.windows import FOLD_S, PARTITIONS_MAX, PIECES_MAX

GIB = 1 << 30
WEEK_S = 604_800.0
CORES = (0, 1, 2, 3)


def windows(half_life_s: float = WEEK_S) -> Windows:
    return Windows(PROMETHEUS_FIB, half_life_s)


def lived(seen: Windows, partition: str, length_s: float, *, times: int = 1, begin: float = 0.0) -> float:
    """So many windows of that length, one after the other on one node; when the last one ended."""
    now = begin
    for _ in range(times):
        seen.seen(f"node of {partition}", partition, now, CORES, now)
        now += length_s
        seen.seen(f"node of {partition}", partition, None, CORES, now)
    return now


def test_short_windows_make_their_partition_risky_and_no_other():
    seen = windows()
    now = max(lived(seen, "short", 20.0, times=40), lived(seen, "long", 5000.0, times=40))
    model = seen.fold(now)
    short, long, other = (model.of(name).ends_within(0.0, 60.0) for name in ("short", "long", "never heard of"))
    assert other == PROMETHEUS_FIB.ends_within(0.0, 60.0) == model.ends_within(0.0, 60.0)
    assert long < 0.7 * other and short > 2 * other


def test_a_window_that_goes_on_counts_as_one_that_has_not_ended():
    seen = windows()
    for at in range(0, 6000, 10):
        for node in range(5):
            seen.seen(f"n{node}", "p", 0.0, CORES, float(at))
    assert seen.fold(6000.0).of("p").ends_within(600.0, 600.0) < 0.7 * PROMETHEUS_FIB.ends_within(600.0, 600.0)


def test_what_nobody_saw_of_a_window_says_nothing():
    seen = windows()
    for node in range(200):
        # Two hours old when they are first heard of, and over a second later.
        seen.seen(f"n{node}", "p", 0.0, CORES, 7200.0)
        seen.seen(f"n{node}", "p", None, (), 7201.0)
    model = seen.fold(7201.0).of("p")
    young, old = model.ends_within(0.0, 60.0), model.ends_within(7200.0, 60.0)
    assert old > 5 * PROMETHEUS_FIB.ends_within(7200.0, 60.0)
    assert young == pytest.approx(PROMETHEUS_FIB.ends_within(0.0, 60.0), abs=0.12)


def test_cores_that_are_wanted_back_end_a_window_for_their_share_of_the_node():
    def risk(*reports: tuple[int, ...]) -> float:
        seen = windows()
        for node in range(40):
            for at, spare in enumerate(reports):
                seen.seen(f"n{node}", "p", 0.0 if spare else None, spare, 10.0 * at)
        return seen.fold(100.0).of("p").ends_within(0.0, 15.0)

    one, whole, none = risk(CORES, (0, 1, 2)), risk(CORES, ()), risk(CORES, CORES, CORES, CORES, CORES, CORES, CORES)
    assert none < one < 0.6 * whole
    # Cores that come back are no end of anything.
    assert risk((0, 1), CORES, CORES, CORES, CORES, CORES, CORES) == none


def test_the_cores_that_were_idle_the_longest_are_no_more_than_their_share():
    """What is left is a younger window; one that began after the last look is another one."""
    def risk(since: float) -> float:
        seen = windows()
        for node in range(40):
            seen.seen(f"n{node}", "p", 0.0, CORES, 20.0)
            seen.seen(f"n{node}", "p", since, (1, 2, 3), 30.0)
        return seen.fold(30.0).of("p").ends_within(20.0, 10.0)

    assert risk(0.0) == risk(10.0) < 0.6 * risk(25.0)


def test_an_agent_that_leaves_ends_no_window():
    """It lends nothing any more, of a node that is as idle as it was."""
    seen = windows()
    for node in range(40):
        seen.seen(f"n{node}", "p", 0.0, CORES, 10.0)
        seen.seen(f"n{node}", "p", 0.0, (), 20.0)
        seen.seen(f"n{node}", "p", None, (), 30.0)
        seen.seen(f"n{node}", "p", 40.0, CORES, 40.0)
    assert not seen.due(40.0)


@pytest.mark.parametrize("same_agent", [True, False])
def test_agents_that_are_started_again_teach_nothing_by_it(same_agent):
    """To the next one the node is idle since it looks."""
    placer = Placer(settings=Settings(min_age_s=0.0))
    cluster = Cluster(LeaseBook(placer, epoch=10), 0.0, placer=placer)
    for incarnation, begin in ((5, 0.0), (5 if same_agent else 6, 100.0)):
        for node in range(20):
            for now in (begin + 1.0, begin + 50.0):
                cluster.report(0, NodeReport(
                    node=f"n{node}", spare=CORES, memory_bytes=GIB, incarnation=incarnation, clock_ns=int(now * 1e9),
                    live=(), traits=NodeTraits(since=begin, partition="p")), now)
    cluster.explain(0, "s", LeaseRequest(1, 1, 1, 1), 150.0)
    # A younger window of the same agent's is another one.
    taught = placer.settings.survival.of("p").ends_within(50.0, 50.0) > PROMETHEUS_FIB.ends_within(50.0, 50.0)
    assert taught is same_agent


def test_a_node_that_fell_silent_teaches_nothing_by_it():
    seen = windows()
    for node in range(40):
        seen.seen(f"n{node}", "p", 0.0, CORES, 0.0)
        seen.lost(f"n{node}")
        seen.seen(f"n{node}", "p", 300.0, CORES, 300.0)
    assert not seen.due(300.0)


def test_what_was_seen_counts_half_after_its_half_life():
    seen = windows(half_life_s=1000.0)
    now = lived(seen, "p", 20.0, times=40)
    fresh = seen.fold(now).of("p").ends_within(0.0, 60.0)
    faded = seen.fold(now + 20_000.0).of("p").ends_within(0.0, 60.0)
    assert faded == pytest.approx(PROMETHEUS_FIB.ends_within(0.0, 60.0), abs=0.12) and fresh > faded + 0.2


def test_many_partitions_and_many_windows_are_no_more_than_was_promised():
    seen = windows()
    now = 0.0
    for number in range(3 * PARTITIONS_MAX):
        now = lived(seen, f"p{number}", 10.0, begin=now)
    assert len(seen.fold(now).models) == PARTITIONS_MAX
    lived(seen, "p0", 1.0, times=PIECES_MAX - 1, begin=now)
    assert not seen.due(now) and seen.due(now + FOLD_S)
    lived(seen, "p0", 1.0, begin=now)
    assert seen.due(now)


def test_a_cluster_of_which_nobody_asks_anything_gathers_no_more_than_was_promised():
    placer = Placer()
    nodes = [f"n{number}" for number in range(2 * PIECES_MAX)]
    for node in nodes:
        placer.tell(node, partition="p", since=0.0)
        placer.changed(node, CORES, GIB)
    for minute in range(1, 6):
        for node in nodes:
            placer.observe(node, 0.0, CORES, 61.0 * minute)
            assert placer._windows._waiting < PIECES_MAX
    before = placer.settings.survival.of("p").ends_within(60.0, 60.0)
    assert before < PROMETHEUS_FIB.ends_within(60.0, 60.0), "what was seen has been learned all the same"


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="its share is above 0 and at most 1"):
        Learned().observe([Window(1.0, share=share)])


def demand(number: int) -> Demand:
    return Demand(session=1, request_id=number, uid=7, workers_min=1, workers_max=1, duration_s=60.0)


def taught(settings: Settings = Settings()) -> Placer:
    """Two nodes that differ by name and partition only; windows of the first one's partition have been short."""
    placer = Placer(settings=settings)
    for name, partition in (("a", "short"), ("b", "long")):
        placer.tell(name, partition=partition, since=0.0)
        placer.changed(name, CORES, GIB)
    for number in range(40):
        placer.observe("a", 100.0 * number, CORES, 100.0 * number)
        placer.observe("a", None, (), 100.0 * number + 30.0)
        placer.observe("b", 0.0, CORES, 100.0 * number)
    for name in "ab":
        placer.tell(name, since=3990.0)
    return placer


def test_the_default_prefers_nodes_whose_windows_last_and_explains_it_in_seconds():
    placer = taught()
    assert placer.choose(demand(1), 4000.0) == {"b": [(0,)]}
    short, long = (verdict.terms.eviction_s for verdict in placer.explain(demand(2), 4000.0))
    assert short > 2 * long > 0.0
    assert f"eviction {short:.3g}" in str(placer.explain(demand(2), 4000.0)[0])


def test_a_site_may_have_nothing_learned():
    placer = taught(Settings(learn_half_life_s=0.0))
    assert placer.choose(demand(1), 4000.0) == {"a": [(0,)]}


def test_a_node_that_nobody_knows_teaches_nothing():
    placer = Placer()
    placer.observe("nowhere", 0.0, CORES, 0.0)
    placer.observe("nowhere", None, (), 10.0)
    assert placer.choose(demand(1), 20.0) == {} and placer.settings == Settings()

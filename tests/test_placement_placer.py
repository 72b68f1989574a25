"""Placement as the lease book uses it, cohorts, and debts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from rfaas_mpi.leases import Demand, NodeReport
from rfaas_mpi.placement import ClusterView, Cohorts, NodeFacts, Placer, RankPlace, Settings, fill
from rfaas_mpi.placement.policies import Search, seats
from rfaas_mpi.placement.fairness import debt_s, decayed, dominant_share

GIB = 1 << 30


def demand(low: int = 1, high: int | None = None, **facts) -> Demand:
    return Demand(session=1, request_id=facts.pop("request_id", 1), uid=7, workers_min=low,
                  workers_max=low if high is None else high, **facts)


def report(placer: Placer, facts: NodeReport, held: tuple[int, ...] = ()) -> None:
    """What the book does with a report."""
    placer.changed(facts.node, tuple(core for core in facts.spare if core not in held), facts.memory_bytes, held=held,
                   numa=facts.numa, hard_end=facts.hard_end, lends_to_uid=facts.lends_to_uid)


def test_the_books_reports_and_demands_are_all_it_needs():
    placer = Placer()
    report(placer, NodeReport(node="a", spare=(0, 1, 2), memory_bytes=GIB))
    report(placer, NodeReport(node="b", spare=(0, 1, 2, 3), memory_bytes=GIB, lends_to_uid=8))
    assert sum(map(len, placer.choose(demand(1, 9), now=0.0).values())) == 3
    # Fewer than the least is for the book to refuse: it says what there is.
    assert list(placer.choose(demand(5), now=0.0)) == ["a"]
    report(placer, NodeReport(node="a", spare=(0, 1, 2), memory_bytes=GIB), held=(0, 2))
    assert placer.choose(demand(1, 9), now=0.0) == {"a": [(1,)]}
    assert [str(verdict) for verdict in placer.explain(demand(1), now=0.0)][1] == (
        "b: another user's: it lends to user 8 only")
    placer.gone("a")
    placer.gone("never seen")
    assert placer.choose(demand(1), now=0.0) == {}


def test_the_least_is_placed_however_dear_it_is():
    placer = Placer()
    report(placer, NodeReport(node="a", spare=(0, 1, 2, 3), memory_bytes=GIB))
    # A cold start takes longer than these workers are wanted.
    assert placer.choose(demand(2, 4, duration_s=0.01), now=0.0) == {"a": [(0,), (1,)]}


def test_a_fair_share_of_memory_is_no_filter():
    placer = Placer()
    report(placer, NodeReport(node="a", spare=(0,), memory_bytes=0))
    assert placer.choose(demand(memory_per_worker=None), now=0.0) == {"a": [(0,)]}


def test_what_agents_tell_stays_over_the_books_changes():
    placer = Placer()
    placer.tell("b", switches=("s2", "top"), warm=True)
    for name in "ab":
        report(placer, NodeReport(node=name, spare=(0, 1, 2), memory_bytes=GIB))
    placer.tell("a", switches=("s1", "top"), warm=True)
    placer.paths["rank"] = ("s2", "top")
    ranks = (RankPlace("rank"),)
    assert list(placer.choose(demand(), now=0.0, ranks=ranks, bytes_per_s=4e9)) == ["b"]
    report(placer, NodeReport(node="b", spare=(0, 1, 2), memory_bytes=GIB), held=(0,))
    assert placer.choose(demand(), now=0.0, ranks=ranks, bytes_per_s=4e9) == {"b": [(1,)]}
    placer.paths["rank"] = ("s1", "top")
    assert list(placer.choose(demand(), now=0.0, ranks=ranks, bytes_per_s=4e9)) == ["a"]


def test_the_same_calls_give_the_same_answers_and_other_requests_other_chances():
    def answers(seed: int = 0) -> list[list[str]]:
        placer = Placer("random", seed=seed)
        for number in range(20):
            report(placer, NodeReport(node=f"n{number}", spare=(0,), memory_bytes=GIB))
        return [list(placer.choose(demand(request_id=number), now=0.0)) for number in range(20)]

    assert answers() == answers() != answers(1)
    assert len({answer[0] for answer in answers()}) > 5


def test_windows_that_began_together_make_a_cohort_and_keep_its_size():
    placer = Placer()
    for name, since in (("a", 100.0), ("b", 104.0), ("c", 200.0), ("d", 109.0)):
        placer.tell(name, since=since, partition="p")
        report(placer, NodeReport(node=name, spare=(0,), memory_bytes=GIB))
    nodes = placer.view().nodes
    assert nodes["a"].cohort == nodes["b"].cohort == nodes["d"].cohort != nodes["c"].cohort
    assert [nodes[name].cohort_size for name in "abcd"] == [3, 3, 1, 3]
    placer.gone("a")
    placer.tell("b", since=None)
    nodes = placer.view().nodes
    assert (nodes["d"].cohort_size, nodes["b"].cohort, nodes["b"].cohort_size) == (3, "", 1)
    placer.tell("d", since=400.0)
    placer.tell("b", since=401.0)
    nodes = placer.view().nodes
    assert nodes["b"].cohort == nodes["d"].cohort and nodes["d"].cohort_size == 2


def test_windows_far_apart_or_of_other_partitions_make_no_cohort():
    cohorts = Cohorts(within_s=10.0)
    for node, partition, since in (("a", "p", 0.0), ("b", "q", 0.0), ("c", "p", 10.5), ("d", "p", 10.0)):
        cohorts.window(node, partition, since)
    news = cohorts.news()
    assert {node: size for node, (_, size) in news.items()} == {"a": 2, "b": 1, "c": 1, "d": 2}
    cohorts.window("d", "p", 10.0)
    assert cohorts.news() == {}


def test_facts_that_a_node_has_not_are_refused_by_name():
    with pytest.raises(ValueError, match="spare can't be told of a node; what can is busy, classes"):
        Placer().tell("a", spare=(1,))
    with pytest.raises(ValueError, match="colour can't be told"):
        Placer().tell("a", colour="red")
    with pytest.raises(ValueError, match="no placement policy 'best'"):
        Placer("best")


def test_settings_of_the_site_hold_for_every_demand():
    placer = Placer(settings=Settings(min_age_s=5.0))
    placer.tell("a", since=0.0)
    report(placer, NodeReport(node="a", spare=(0,), memory_bytes=GIB))
    assert placer.choose(demand(), now=4.0) == {}
    assert placer.choose(demand(), now=5.0) == {"a": [(0,)]}


@pytest.mark.parametrize("seed", range(40))
def test_what_is_kept_of_a_node_says_the_same_as_a_node_that_is_new(seed):
    chance = random.Random(seed)
    placer = Placer(settings=Settings(exact_to=chance.choice((4, 64)), sample=3))
    cores = {f"n{number}": chance.sample(range(12), chance.randint(1, 12)) for number in range(9)}
    held: dict[str, set[int]] = {name: set() for name in cores}
    numa = {core: core % 3 for core in range(12)}
    for name in cores:
        placer.tell(name, since=chance.uniform(0, 50), speed=chance.choice((1.0, 0.9)),
                    busy=frozenset(chance.sample(range(14), chance.randint(0, 3))),
                    classes=chance.choice(({}, {1: "idle", 5: "idle", 6: "unused"})),
                    physical=chance.choice(({}, {core: core % 6 for core in range(12)})))
        placer.changed(name, tuple(cores[name]), GIB, numa=numa)
    live: list[tuple[str, set[int]]] = []
    for number in range(25):
        want = demand(0, chance.randint(1, 4), request_id=number, cores_per_worker=chance.choice((1, 1, 2, 4)),
                      duration_s=chance.choice((None, 20.0)))
        needs = placer.needs(want)
        before = placer.view().nodes
        new = [replace(facts) for facts in before.values()]
        chosen = placer.choose(want, now=60.0 + number)
        again = Search(needs, ClusterView.of(new), placer.settings, 60.0 + number, hash((placer.seed, 1, number)),
                       [name for name in sorted(before) if before[name].spare])
        assert chosen == seats(again)
        taken = [(name, {core for worker in workers for core in worker}) for name, workers in chosen.items()]
        live += taken
        back = [live.pop(chance.randrange(len(live))) for _ in live[:] if len(live) > 8 or chance.random() < 0.2]
        for name, some in [*taken, *back]:
            held[name] ^= some
            placer.changed(name, tuple(core for core in cores[name] if core not in held[name]), GIB, held=held[name])


@pytest.mark.parametrize("seed", range(200))
def test_the_default_puts_each_worker_where_it_costs_least_given_those_before(seed):
    chance = random.Random(seed)
    view = ClusterView.of([
        NodeFacts(node=f"n{number}", spare=tuple(range(chance.randint(0, 8))), lent=frozenset({8, 9}),
                  numa={core: core % 2 for core in range(10)}, since=chance.uniform(0, 50),
                  nic_numa=chance.choice((None, 0)), cohort=chance.choice(("", "a", "b")),
                  speed=chance.uniform(0.8, 1.0), starting=chance.randint(0, 2))
        for number in range(8)])
    needs = Placer().needs(demand(6, bytes_per_s=1e8, cores_per_worker=chance.randint(1, 3)),
                           (RankPlace("n1", 1, 0), RankPlace("far", 2)))
    search, found = Search(needs, view, Settings(), 60.0, 0), []
    while len(found) < needs.workers_max and (rooms := list(search.rooms())):
        found.append(min(rooms, key=lambda room: (room.total_s(), room.key)).take())
    assert fill(needs, view, now=60.0) == found


# --- fairness -----------------------------------------------------------------

def test_usage_halves_each_half_life():
    assert decayed([(0.0, 100.0), (86_400.0, 100.0), (2 * 86_400.0, 8.0)], now=2 * 86_400.0) == pytest.approx(83.0)
    assert decayed([(10.0, 4.0)], now=0.0) == 4.0


def test_the_dominant_share_is_the_largest_one():
    assert dominant_share({"cores": 10, "memory": 30, "gpu": 1}, {"cores": 100, "memory": 100}) == 0.3
    assert dominant_share({}, {"cores": 100}) == 0.0


def test_who_used_more_than_the_share_is_in_debt_and_nobody_else():
    used = {1: 300.0, 2: 100.0}
    assert debt_s(1, used, cores=10) == pytest.approx(10.0)
    assert debt_s(2, used, cores=10) == debt_s(3, used, cores=10) == 0.0
    assert debt_s(1, used, weights={1: 3.0}, cores=10) == 0.0
    assert debt_s(9, {}) == 0.0
    # Alone, one has no share to exceed.
    assert debt_s(1, {1: 1e9}) == 0.0


def test_a_cluster_without_cores_and_weights_of_nothing_are_refused():
    with pytest.raises(ValueError, match="cores is 0"):
        debt_s(1, {}, cores=0)
    with pytest.raises(ValueError, match="must be above 0"):
        debt_s(1, {}, weights={2: 0.0})

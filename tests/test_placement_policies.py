"""Placement over several nodes: what every answer keeps to, whatever the policy, and what each policy is for."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfaas_mpi.placement import (
    POLICIES,
    ClusterView,
    Needs,
    NodeFacts,
    Placement,
    RankPlace,
    Refusal,
    Settings,
    explain,
    place,
)
from rfaas_mpi.placement.score import Scorer

GIB = 1 << 30
NOW = 1000.0
EVERY_POLICY = pytest.mark.parametrize("policy", sorted(POLICIES))


def node(name: str, cores: int = 4, **facts) -> NodeFacts:
    return NodeFacts(node=name, **{"spare": tuple(range(cores)), "memory_bytes": 64 * GIB, **facts})


def needs(low: int = 1, high: int | None = None, **facts) -> Needs:
    return Needs(workers_min=low, workers_max=low if high is None else high, **facts)


def placed(want: Needs, nodes, policy: str = "default", **more) -> Placement:
    answer = place(want, ClusterView.of(nodes), policy, now=NOW, **more)
    assert isinstance(answer, Placement), answer
    return answer


def counts(answer: Placement) -> dict[str, int]:
    return {name: len(workers) for name, workers in answer.by_node.items()}


# --- what always holds --------------------------------------------------------

@st.composite
def nodes_of(draw, name: str) -> NodeFacts:
    total = draw(st.integers(1, 12))
    threads = draw(st.sampled_from((1, 2)))
    sockets = draw(st.integers(1, 3))
    # CPU c and c + total are threads of one core, as Linux numbers them.
    every = range(total * threads)
    state = draw(st.lists(st.sampled_from("fffflb"), min_size=len(every), max_size=len(every)))
    spare = draw(st.permutations([core for core in every if state[core] == "f"]))
    return NodeFacts(
        node=name, spare=tuple(spare), memory_bytes=draw(st.integers(0, 8)) * GIB,
        lent=frozenset(core for core in every if state[core] == "l"),
        busy=frozenset(core for core in every if state[core] == "b"),
        numa={core: core % total % sockets for core in every},
        physical={core: core % total for core in every} if threads > 1 else {},
        classes=draw(st.dictionaries(st.sampled_from(every), st.sampled_from(("free", "unused", "idle")))),
        lends_to_uid=draw(st.sampled_from((None, None, 7, 8))),
        draining=draw(st.sampled_from(("", "", "", "asked to"))),
        since=draw(st.none() | st.floats(0, NOW)),
        hard_end=draw(st.none() | st.floats(NOW - 10, NOW + 1000)),
        cohort=draw(st.sampled_from(("", "a", "b"))), cohort_size=draw(st.integers(1, 20)),
        switches=draw(st.sampled_from(((), ("s0", "top"), ("s1", "top")))),
        network_load=draw(st.floats(0, 1)), nic_numa=draw(st.sampled_from((None, 0))),
        memory_pressure=draw(st.none() | st.just({0: 0.5})), speed=draw(st.floats(0.5, 2.0)),
        warm=draw(st.booleans()), starting=draw(st.integers(0, 3)))


@st.composite
def clusters(draw) -> list[NodeFacts]:
    return [draw(nodes_of(f"n{number}")) for number in range(draw(st.integers(0, 7)))]


@st.composite
def demands(draw) -> Needs:
    low = draw(st.integers(0, 6))
    return Needs(
        workers_min=low, workers_max=low + draw(st.integers(0, 8)), cores_per_worker=draw(st.integers(1, 4)),
        memory_per_worker=draw(st.integers(0, 3)) * GIB, uid=7,
        ranks=draw(st.sampled_from(((), (RankPlace("n0", 2, 0),), (RankPlace("n1"), RankPlace("far", 3))))),
        duration_s=draw(st.none() | st.floats(0.01, 1e4)), least_s=draw(st.sampled_from((0.0, 30.0))),
        bytes_per_s=draw(st.sampled_from((0.0, 1e6, 1e10))), memory_bound=draw(st.floats(0, 1)),
        gang=draw(st.booleans()), whole_cores=draw(st.booleans()),
        classes=draw(st.sampled_from((None, frozenset({"free"})))), debt_s=draw(st.sampled_from((0.0, 1e5))))


@given(want=demands(), nodes=clusters(), policy=st.sampled_from(sorted(POLICIES)), seed=st.integers(0, 3))
def test_every_placement_fits_and_every_refusal_says_why_of_each_node(want, nodes, policy, seed):
    view = ClusterView.of(nodes, paths={"far": ("s9", "top")}, waiting_cores=2)
    answer = place(want, view, policy, now=NOW, seed=seed, settings=Settings(exact_to=4, sample=3))
    verdicts = explain(want, view, now=NOW)
    assert [verdict.node for verdict in verdicts] == sorted(facts.node for facts in nodes)
    assert all((verdict.workers > 0) == (verdict.terms is not None) == (not verdict.refused) for verdict in verdicts)
    room = sum(verdict.workers for verdict in verdicts)
    if isinstance(answer, Refusal):
        assert room == answer.available < answer.asked == want.workers_min
        assert answer.nodes == verdicts
        assert f"{answer.available} available" in answer.reason
        return

    count = len(answer.workers)
    assert want.workers_min <= count <= min(room, want.workers_max)
    assert (answer.reason == "") == (count == want.workers_max)
    if policy != "default":
        assert count == min(room, want.workers_max)
    fits = {verdict.node: verdict.workers for verdict in verdicts}
    for name, workers in answer.by_node.items():
        facts = view.nodes[name]
        cores = [core for worker in workers for core in worker]
        assert len(workers) <= fits[name]
        assert len(set(cores)) == len(cores) and set(cores) <= set(facts.spare)
        assert all(len(worker) == want.cores_per_worker for worker in workers)
        assert len(workers) * want.memory_per_worker <= facts.memory_bytes
        assert facts.lends_to_uid in (None, want.uid) and not facts.draining
        assert facts.hard_end is None or facts.hard_end - NOW > want.least_s
        assert want.classes is None or {facts.classes.get(core, "free") for core in cores} <= want.classes
        # Nobody shares a physical core with another lease, nor, with whole cores, two workers with each other.
        physical = [facts.physical.get(core, core) for core in cores]
        assert not set(physical) & {facts.physical.get(core, core) for core in facts.lent}
        assert not want.whole_cores or len(set(physical)) == len(physical)


@given(want=demands(), nodes=clusters(), policy=st.sampled_from(sorted(POLICIES)), seed=st.integers(0, 3),
       order=st.randoms(use_true_random=False))
def test_the_order_of_nodes_changes_nothing(want, nodes, policy, seed, order):
    settings = Settings(exact_to=4, sample=3)
    mixed = list(nodes)
    order.shuffle(mixed)
    one = place(want, ClusterView.of(nodes), policy, now=NOW, seed=seed, settings=settings)
    assert place(want, ClusterView.of(mixed), policy, now=NOW, seed=seed, settings=settings) == one


@given(want=demands(), nodes=clusters(), policy=st.sampled_from(sorted(POLICIES)), seed=st.integers(0, 3))
def test_where_losses_are_independent_no_policy_is_cheaper_than_the_default(want, nodes, policy, seed):
    # Workers that are lost together make a sum that no order of placing minimises; the rest is exact.
    settings = Settings(same_cohort=0.0, other_cohort=0.0)
    view = ClusterView.of([replace(facts, cohort=facts.node) for facts in nodes], waiting_cores=2)
    # Nor does an order of placing minimise what a gang pays for each node that it depends on.
    want = replace(want, workers_max=want.workers_min, gang=False)
    best, other = (place(want, view, name, now=NOW, seed=seed, settings=settings) for name in ("default", policy))
    assert isinstance(best, Placement) == isinstance(other, Placement)
    if isinstance(best, Placement) and isinstance(other, Placement):
        assert best.score_s <= other.score_s + 1e-9 * abs(other.score_s) + 1e-12


@given(want=demands(), nodes=clusters(), seed=st.integers(0, 3))
def test_one_more_worker_on_a_node_never_costs_less_than_the_one_before(want, nodes, seed):
    for facts in nodes:
        alone = replace(want, workers_min=0, gang=False)
        answer = place(alone, ClusterView.of([facts]), "first-fit", now=NOW, seed=seed)
        assert isinstance(answer, Placement)
        costs = [worker.terms.total_s for worker in answer.workers]
        assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in zip(costs, costs[1:], strict=False))


# --- filters ------------------------------------------------------------------

@pytest.mark.parametrize("facts, want, said", [
    ({"spare": (0, 1, 2)}, {"cores_per_worker": 4}, "3 cores free, 4 wanted"),
    ({"spare": (0,)}, {"cores_per_worker": 2}, "1 core free, 2 wanted"),
    ({"draining": "maintenance"}, {}, "draining (maintenance)"),
    ({"memory_bytes": GIB}, {"memory_per_worker": 2 * GIB}, "memory: 1 GiB free, 2 GiB wanted"),
    ({"lends_to_uid": 1001}, {"uid": 1000}, "another user's: it lends to user 1001 only"),
    ({"since": NOW - 0.5}, {}, "window younger than 2 s: 0.5 s"),
    ({"hard_end": NOW + 3}, {"least_s": 10.0}, "its window ends in 3 s, 10 s wanted"),
    ({"hard_end": NOW - 3}, {}, "its window ends in 0 s, 0 s wanted"),
    ({"heard_at": NOW - 45}, {}, "not heard of for 45 s, 30 s are the most"),
    ({"cpu_type": "zen4"}, {"cpu_type": "zen3"}, "its CPU is zen4, zen3 wanted"),
    ({}, {"cpu_type": "zen3"}, "its CPU is of no known type, zen3 wanted"),
    ({}, {"avoid": frozenset({"n7"})}, "left out by the demand"),
    ({"spare": (0, 1), "lent": frozenset({2, 3}), "physical": {2: 0, 3: 1}}, {},
     "0 cores free, 1 wanted (2 beside another lease on a physical core)"),
    ({"spare": (0, 1), "physical": {1: 0}}, {"cores_per_worker": 2}, "1 core free, 2 wanted (1 second thread)"),
    ({"spare": (0,), "classes": {0: "idle"}}, {"classes": frozenset({"free"})},
     "0 cores free, 1 wanted (1 of other classes)")])
def test_a_refused_node_says_why(facts, want, said):
    facts = {"since": NOW - 60, **facts}
    answer = place(needs(**want), ClusterView.of([node("n7", **facts)]), now=NOW, settings=Settings(min_age_s=2.0))
    assert isinstance(answer, Refusal)
    (verdict,) = answer.nodes
    assert verdict.refused == (said,)
    assert str(verdict) == f"n7: {said}" and str(verdict) in answer.reason


def test_all_reasons_against_a_node_are_told_not_only_the_first():
    view = ClusterView.of([node("n1", 0, draining="x", lends_to_uid=3, memory_bytes=0)])
    (verdict,) = explain(needs(memory_per_worker=GIB), view, now=NOW)
    assert len(verdict.refused) == 4


def test_a_refusal_counts_what_there_is_and_tells_of_some_nodes():
    nodes = [node(f"n{number}", 1 if number else 3) for number in range(9)]
    answer = place(needs(5, cores_per_worker=2), ClusterView.of(nodes), now=NOW)
    assert isinstance(answer, Refusal)
    assert answer.reason == (
        "asked for 5 workers with each 2 cores, 1 available on 1 of 9 nodes; n1: 1 core free, 2 wanted; "
        "n2: 1 core free, 2 wanted; n3: 1 core free, 2 wanted; and 5 more")
    assert [str(verdict) for verdict in answer.nodes][0].startswith("n0: 1 worker fits, ")


def test_no_nodes_at_all_are_said_to_be_none():
    answer = place(needs(1), ClusterView.of([]), now=NOW)
    assert isinstance(answer, Refusal) and "no node lends cores now" in answer.reason


@EVERY_POLICY
def test_a_demand_that_would_take_none_gets_none_with_a_reason(policy):
    answer = placed(needs(0, 3), [], policy)
    assert answer.workers == () and answer.reason == "0 of 3 workers: no further one fits on any node"
    assert placed(needs(0, 0), [node("a")], policy) == Placement(())


@EVERY_POLICY
def test_a_moldable_demand_gets_what_there_is_over_several_nodes(policy):
    answer = placed(needs(2, 9, cores_per_worker=2), [node("a", 3), node("b", 5), node("c", 1)], policy)
    assert counts(answer) == {"a": 1, "b": 2}
    assert answer.reason.startswith("3 of 9 workers")


def test_senseless_facts_are_refused_by_name():
    with pytest.raises(ValueError, match="n1: a core is listed twice"):
        node("n1", spare=(1, 1))
    with pytest.raises(ValueError, match="core 1 is said to be both"):
        node("n1", spare=(1, 2), lent=frozenset({1}))
    with pytest.raises(ValueError, match="node a is listed twice"):
        ClusterView.of([node("a"), node("a")])
    with pytest.raises(ValueError, match="is new here or has moved"):
        ClusterView.of([node("a")]).with_node(node("b"))
    with pytest.raises(ValueError, match="min <= max"):
        needs(3, 2)
    with pytest.raises(ValueError, match="at least one core"):
        needs(cores_per_worker=0)
    with pytest.raises(ValueError, match="it can't be negative"):
        needs(memory_per_worker=-1)
    with pytest.raises(ValueError, match="must be above 0"):
        needs(duration_s=0.0)
    with pytest.raises(ValueError, match="no placement policy 'best'; there are default, first-fit"):
        place(needs(), ClusterView.of([]), "best", now=NOW)
    with pytest.raises(ValueError, match="a rate above 0"):
        Settings(bandwidth=())


def test_the_pages_example_prints_what_the_page_says(capsys):
    page = (Path(__file__).parent.parent / "docs" / "placement.md").read_text()
    found = re.search(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", page, re.DOTALL)
    assert found is not None
    exec(compile(found[1], "docs/placement.md", "exec"), {})
    assert capsys.readouterr().out == found[2].replace("    ", "")


# --- policies -----------------------------------------------------------------

def test_first_fit_fills_nodes_in_order_of_their_names():
    assert counts(placed(needs(6), [node("c"), node("a"), node("b")], "first-fit")) == {"a": 4, "b": 2}


def test_random_fills_nodes_in_an_order_of_chance_that_the_seed_decides():
    nodes = [node(f"n{number}") for number in range(9)]
    answers = [counts(placed(needs(6), nodes, "random", seed=seed)) for seed in range(20)]
    assert all(sorted(answer.values()) == [2, 4] for answer in answers)
    assert len({tuple(answer) for answer in answers}) > 10
    assert answers == [counts(placed(needs(6), nodes, "random", seed=seed)) for seed in range(20)]


def test_random_meets_every_node_about_equally_often():
    nodes = [node(f"n{number}", 1) for number in range(8)]
    met = Counter(placed(needs(), nodes, "random", seed=seed).workers[0].node for seed in range(800))
    assert len(met) == 8 and min(met.values()) > 60


def test_pack_takes_the_node_with_least_left_if_one_is_enough():
    nodes = [node("a", 8), node("b", 4), node("c", 3), node("d", 4)]
    assert counts(placed(needs(4), nodes, "pack")) == {"b": 4}


def test_pack_takes_the_largest_first_if_none_is_enough():
    assert counts(placed(needs(7), [node("a", 2), node("b", 4), node("c", 3)], "pack")) == {"b": 4, "c": 3}


def test_spread_takes_other_cohorts_first_then_other_nodes():
    nodes = [node("a", cohort="x"), node("b", cohort="x"), node("c", cohort="y"), node("d", cohort="y")]
    two = placed(needs(2), nodes, "spread")
    assert {worker.node[0] for worker in two.workers} in ({"a", "c"}, {"a", "d"})
    assert counts(placed(needs(4), nodes, "spread")) == {"a": 1, "b": 1, "c": 1, "d": 1}


def test_spread_prefers_the_emptiest_node():
    assert placed(needs(1), [node("a", 2), node("b", 5), node("c", 3)], "spread").workers[0].node == "b"


def test_two_choices_takes_the_cheaper_of_two():
    # Nine of ten nodes are cold: warm ones are taken about as often as one of two draws meets one.
    nodes = [node(f"n{number}", warm=number == 0) for number in range(10)]
    warm = sum(placed(needs(), nodes, "two-choices", seed=seed).workers[0].node == "n0" for seed in range(500))
    assert 0.13 * 500 < warm < 0.25 * 500


def test_two_choices_finds_the_last_free_core_of_a_large_cluster():
    nodes = [node(f"n{number}", int(number == 321)) for number in range(500)]
    assert counts(placed(needs(), nodes, "two-choices")) == {"n321": 1}


def test_the_default_spreads_memory_bound_kernels_over_numa_nodes_and_packs_the_others():
    sockets = {core: core // 4 for core in range(8)}
    facts = node("a", 8, numa=sockets, nic_numa=0)
    far = (RankPlace("elsewhere"),)
    bound = placed(needs(4, memory_bound=1.0, bytes_per_s=1e7, ranks=far, duration_s=60.0), [facts])
    assert Counter(sockets[worker.cores[0]] for worker in bound.workers) == {0: 2, 1: 2}
    # With much to transfer and little to wait for in memory, the network card's side is worth more.
    compute = placed(needs(4, memory_bound=0.0, bytes_per_s=4e9, ranks=far, duration_s=60.0), [facts])
    assert {sockets[worker.cores[0]] for worker in compute.workers} == {0}


def test_the_default_prefers_quiet_nodes_for_memory_bound_kernels():
    nodes = [node("busy", 4, busy=frozenset(range(4, 32))), node("quiet", 32)]
    assert counts(placed(needs(4, memory_bound=0.9), nodes)) == {"quiet": 4}


def test_a_large_cluster_is_searched_by_a_sample_that_begins_at_the_ranks():
    nodes = [node(f"n{number:03}", switches=(f"s{number // 10}", "top")) for number in range(300)]
    want = needs(4, bytes_per_s=1e9, ranks=(RankPlace("n123"),))
    assert {worker.node[:3] for worker in placed(want, nodes).workers} == {"n12"}


def test_a_sample_without_enough_room_is_not_the_end():
    nodes = [node(f"n{number:03}", int(number == 7)) for number in range(300)]
    assert counts(placed(needs(1), nodes, settings=Settings(sample=4))) == {"n007": 1}


# --- locality -----------------------------------------------------------------

def test_the_default_goes_to_the_ranks_node_then_to_its_switch_then_farther():
    nodes = [node("a", 1, switches=("s1", "p1", "top")), node("b", 1, switches=("s2", "p1", "top")),
             node("c", 1, switches=("s3", "p2", "top")), node("d", 1, switches=("s1", "p1", "top"))]
    want = needs(4, bytes_per_s=1e9, ranks=(RankPlace("d"),))
    answer = placed(want, nodes, settings=Settings(bandwidth=(20e9, 10e9, 5e9, 2.5e9)))
    assert [worker.node for worker in answer.workers] == ["d", "a", "b", "c"]
    transfers = [worker.terms.transfer_s for worker in answer.workers]
    assert transfers == pytest.approx([60e9 / 20e9, 60e9 / 10e9, 60e9 / 5e9, 60e9 / 2.5e9])


def test_ranks_on_nodes_that_lend_nothing_count_by_their_switches():
    nodes = [node("a", switches=("s1",)), node("b", switches=("s2",))]
    view = ClusterView.of(nodes, paths={"rank": ("s2",)})
    answer = place(needs(2, bytes_per_s=1e9, ranks=(RankPlace("rank"),)), view, now=NOW)
    assert isinstance(answer, Placement) and counts(answer) == {"b": 2}


def test_a_sample_has_a_place_for_each_node_that_has_ranks():
    nodes = [node(f"n{number:03}", 8) for number in range(200)]
    ranks = tuple(RankPlace(f"n{number:03}", 2) for number in range(7, 200, 10))
    answer = placed(needs(len(ranks), bytes_per_s=4e9, ranks=ranks), nodes, settings=Settings(sample=4, exact_to=64))
    assert counts(answer) == {rank.node: 1 for rank in ranks}


@given(st.lists(st.tuples(st.sampled_from("abcxy"), st.sampled_from((None, 0, 1)), st.integers(1, 3)), min_size=2,
                max_size=12), st.sampled_from("abc"))
def test_what_ranks_exchange_costs_what_their_places_say_however_many_share_one(ranks, at):
    paths = {"a": ("s1", "top"), "b": ("s1", "top"), "c": ("s2", "top"), "x": ("s2", "top"), "y": ()}
    facts = [node(name, switches=paths[name], host=name) for name in "abc"]
    view = ClusterView.of(facts, paths={name: paths[name] for name in "xy"})
    settings = Settings()
    scorer = Scorer(needs(1, ranks=tuple(RankPlace(name, count, numa) for name, numa, count in ranks)), view,
                    settings, NOW)
    here = next(each for each in facts if each.node == at)
    whole = sum(count for _, _, count in ranks)

    def level(name):
        return 1 if paths[name][:1] == paths[at][:1] else 2 if paths[name] else 3
    assert scorer.far_per_byte(here) == pytest.approx(
        sum(count / settings.bandwidth[level(name)] for name, _, count in ranks if name != at) / whole)
    assert scorer.near(here) == [(numa, count / whole) for name, numa, count in ranks if name == at]


def test_most_ranks_decide():
    nodes = [node("a", switches=("s1", "top")), node("b", switches=("s2", "top"))]
    view = ClusterView.of(nodes, paths={"few": ("s1", "top"), "many": ("s2", "top")})
    answer = place(needs(1, bytes_per_s=1e9, ranks=(RankPlace("few", 1), RankPlace("many", 3))), view, now=NOW)
    assert isinstance(answer, Placement) and counts(answer) == {"b": 1}


def test_workers_on_the_ranks_node_get_cores_of_its_numa_node():
    facts = node("a", 8, numa={core: core // 4 for core in range(8)})
    want = needs(2, bytes_per_s=4e9, ranks=(RankPlace("a", 1, numa=1),))
    assert placed(want, [facts]).by_node == {"a": [(4,), (5,)]}


def test_a_loaded_link_is_avoided():
    nodes = [node("a", switches=("s",), network_load=0.8), node("b", switches=("s",))]
    assert counts(placed(needs(1, bytes_per_s=1e9, ranks=(RankPlace("r"),)), nodes)) == {"b": 1}


# --- terms --------------------------------------------------------------------

def test_a_warm_node_and_one_that_starts_nothing_else_is_quicker_to_begin():
    assert counts(placed(needs(1), [node("a"), node("b", warm=True)])) == {"b": 1}
    assert counts(placed(needs(1), [node("a", starting=3), node("b", starting=1)])) == {"b": 1}


def test_older_windows_smaller_cohorts_and_later_ends_are_preferred():
    for worse, better in (
            ({"since": NOW - 60}, {"since": NOW - 1800}), ({"cohort": "x", "cohort_size": 16}, {"cohort_size": 1}),
            ({"hard_end": NOW + 30}, {"hard_end": NOW + 90})):
        assert counts(placed(needs(1, duration_s=60.0), [node("a", **worse), node("b", **better)])) == {"b": 1}


def test_workers_go_to_several_cohorts_since_members_end_together():
    nodes = [node("a", cohort="x", cohort_size=2), node("b", cohort="x", cohort_size=2),
             node("c", cohort="y", cohort_size=2)]
    answer = placed(needs(2, memory_bound=0.0), nodes, settings=Settings(contention=0.0, next_s=0.0))
    assert {nodes["abc".index(worker.node)].cohort for worker in answer.workers} == {"x", "y"}


def test_a_gang_pays_for_each_node_that_it_depends_on():
    one = placed(needs(4, gang=True), [node("a")])
    first, *others = [worker.terms.eviction_s for worker in one.workers]
    assert first > 0 and others == [0, 0, 0]
    four = placed(needs(4, gang=True), [node(name, 1) for name in "abcd"])
    assert [worker.terms.eviction_s for worker in four.workers] == pytest.approx([4 * first] * 4)


def test_a_gang_goes_to_few_nodes_and_these_of_one_cohort_where_a_loss_is_dear():
    small = [node(f"a{number}", 2, cohort="x" if number % 2 else "y") for number in range(8)]
    gang = {"gang": True, "call_s": 1000.0, "memory_bound": 0.0}
    assert len(counts(placed(needs(4, **gang), [*small, node("large", 4)]))) == 1
    found = counts(placed(needs(6, **gang), small))
    assert len(found) == 3 and len({int(name[1]) % 2 for name in found}) == 1
    # Where a loss costs next to nothing, it is the quiet that counts.
    assert len(counts(placed(needs(4, call_s=0.0, memory_bound=1.0), [*small, node("large", 4)]))) == 4


def test_idle_cores_come_last_and_cost_more():
    facts = node("a", 4, classes={0: "idle", 1: "idle"})
    answer = placed(needs(4, duration_s=60.0), [facts], settings=Settings(contention=0.0, memory_contention=0.0))
    assert [worker.cores for worker in answer.workers] == [(2,), (3,), (0,), (1,)]
    assert [worker.terms.slowdown_s for worker in answer.workers] == pytest.approx([0, 0, 3, 3])


def test_a_user_ahead_of_the_share_leaves_contended_nodes_to_others():
    nodes = [node("a"), node("b", lends_to_uid=7)]
    view = ClusterView.of(nodes, waiting_cores=8)
    want = needs(1, uid=7, duration_s=60.0, debt_s=1e6)
    answer = place(want, view, now=NOW)
    assert isinstance(answer, Placement) and counts(answer) == {"b": 1}
    costs = {verdict.node: verdict.terms.fairness_s for verdict in explain(want, view, now=NOW)}
    assert costs["b"] == 0 and costs["a"] == pytest.approx(60.0, rel=1e-3)
    assert [verdict.terms.fairness_s for verdict in explain(replace(want, debt_s=0.0), view, now=NOW)] == [0, 0]


def test_a_user_far_ahead_gets_only_what_was_the_least_while_others_wait():
    view = ClusterView.of([node("a", 8)], waiting_cores=8)
    want = needs(2, 8, duration_s=60.0, debt_s=1e9)
    ahead, even = (place(replace(want, debt_s=debt), view, now=NOW) for debt in (1e9, 0.0))
    assert isinstance(ahead, Placement) and isinstance(even, Placement)
    assert (len(ahead.workers), len(even.workers)) == (2, 8)
    assert ahead.reason == "2 of 8 workers: a further one would lose more time than it has"


def test_threads_of_one_core_go_to_one_worker_only_unless_the_demand_shares():
    facts = node("a", 8, physical={core: core % 4 for core in range(8)})
    assert len(placed(needs(0, 8), [facts]).workers) == 4
    shared = placed(needs(8, whole_cores=False), [facts])
    assert [worker.cores[0] for worker in shared.workers] == list(range(8))


def test_a_worker_larger_than_a_numa_node_spans_as_few_as_possible():
    facts = node("a", spare=(0, 2, 3, 4, 5, 6), numa={core: core // 2 for core in range(8)})
    (worker,) = placed(needs(1, cores_per_worker=4), [facts]).workers
    assert {facts.numa[core] for core in worker.cores} == {1, 2}


def test_a_long_random_life_of_one_cluster_never_lends_a_core_twice():
    chance = random.Random(1)
    view = ClusterView.of([node(f"n{number}", 8, numa={core: core // 4 for core in range(8)}) for number in range(12)])
    leases: list[list[tuple[str, tuple[int, ...]]]] = []
    for turn in range(400):
        if leases and chance.random() < 0.45:
            for name, cores in leases.pop(chance.randrange(len(leases))):
                facts = view.nodes[name]
                assert set(cores) <= facts.lent
                view = view.with_node(replace(facts, spare=(*facts.spare, *cores), lent=facts.lent - set(cores)))
            continue
        want = needs(1, chance.randint(1, 9), cores_per_worker=chance.randint(1, 3))
        answer = place(want, view, chance.choice(sorted(POLICIES)), now=float(turn), seed=turn)
        if isinstance(answer, Refusal):
            continue
        leases.append([(worker.node, worker.cores) for worker in answer.workers])
        for name, cores in leases[-1]:
            facts = view.nodes[name]
            assert set(cores) <= set(facts.spare)
            view = view.with_node(replace(facts, lent=facts.lent | set(cores),
                                          spare=tuple(core for core in facts.spare if core not in cores)))
    assert leases

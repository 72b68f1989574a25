"""What is kept of a node between two demands chooses what the rule chooses, which looks at everything anew."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from rfaas_mpi.leases import Demand, RankAt
from rfaas_mpi.placement import ClusterView, LogNormals, Placer, Settings
from rfaas_mpi.placement.policies import Search, seats
from rfaas_mpi.placement.quick import cheapest

GIB = 1 << 30
CORES = 12
SWITCHES = ((), ("s0", "top"), ("s1", "top"), ("s2", "pod", "top"))


def cluster(chance: random.Random, placer: Placer) -> dict[str, list[int]]:
    """Nodes of every kind that reports can tell of; node → the cores that it lends."""
    odd = chance.random() < 0.3
    numa_nodes = chance.randint(1, 3)
    spare: dict[str, list[int]] = {}
    for number in range(chance.randint(1, 14)):
        name = f"n{number}"
        told: dict = {
            "since": chance.choice((None, chance.uniform(0, 50))), "speed": chance.choice((1.0, 0.9)),
            "busy": frozenset(chance.sample(range(CORES + 2), chance.randint(0, 3))),
            "switches": chance.choice(SWITCHES), "nic_numa": chance.choice((None, None, 0)),
            "network_load": chance.choice((0.0, 0.0, chance.random())), "warm": chance.random() < 0.5,
            "starting": chance.choice((0, 0, 2)), "partition": chance.choice("pq"),
            "host": chance.choice(("", "", "rank"))}
        if odd:
            told |= {"classes": chance.choice(({}, {1: "idle", 5: "unused"}, {6: "unused"})),
                     "physical": chance.choice(({}, {core: core % (CORES // 2) for core in range(CORES)})),
                     "draining": chance.choice(("", "", "", "asked to"))}
        placer.tell(name, **told)
        spare[name] = chance.sample(range(CORES), chance.randint(1, CORES))
        placer.changed(name, tuple(spare[name]), chance.randint(4, 16) * GIB,
                       numa={core: core % numa_nodes for core in range(CORES)},
                       hard_end=chance.choice((None, None, None, chance.uniform(60, 400))),
                       lends_to_uid=chance.choice((None, None, None, 7, 8)))
    return spare


def ask(chance: random.Random, number: int) -> Demand:
    place = chance.choice((None, RankAt(node=f"n{chance.randrange(14)}"), RankAt(node="n1", numa=1, ranks=2),
                           RankAt(node="rank", switches=("s1", "top")), RankAt(node="far")))
    low = chance.choice((0, 1, 1, 2, 4))
    return Demand(session=1, request_id=number, uid=7, workers_min=low, workers_max=low + chance.choice((0, 1, 3, 7)),
                  cores_per_worker=chance.choice((1, 1, 2, 4)), memory_per_worker=chance.choice((0, None, GIB)),
                  duration_s=chance.choice((None, 0.2, 20.0)), least_s=chance.choice((0.0, 30.0)), place=place,
                  bytes_per_s=chance.choice((None, 0.0, 1e6, 4e9)),
                  others=(RankAt(node="n3", ranks=2), RankAt(node="far")) if number == 5 else ())


def play(seed: int) -> tuple[int, int]:
    """A book's life with demands that come and end; how many of them were chosen for, and how many the quick way."""
    chance = random.Random(seed)
    placer = Placer(settings=Settings(
        exact_to=chance.choice((2, 64)), sample=chance.choice((1, 2, 3, 8)), min_age_s=chance.choice((0.0, 0.0, 20.0)),
        survival=LogNormals(((1.0, 100.0, 1.0),))))
    spare = cluster(chance, placer)
    held: dict[str, set[int]] = {name: set() for name in spare}
    live: list[tuple[str, set[int]]] = []
    asked = quickly = 0
    for number in range(12):
        want, now = ask(chance, number), 60.0 + number
        random_seed = hash((placer.seed, want.session, want.request_id))
        quick = cheapest(want, now, random_seed, placer._spots, placer._likely, placer._places(), placer.settings)
        chosen = placer.choose(want, now)
        if quick is None or chance.random() < 0.7:
            # To look at the view brings it up to date: not each time, so that a node moves more than once meanwhile.
            nodes = placer.view().nodes
            again = Search(placer.needs(want), ClusterView.of([replace(facts) for facts in nodes.values()]),
                           placer.settings, now, random_seed, [name for name in sorted(nodes) if nodes[name].spare])
            assert chosen == seats(again)
        assert quick is None or (quick == chosen and list(quick) == list(chosen))
        asked, quickly = asked + 1, quickly + (quick is not None)
        taken = [(name, {core for worker in workers for core in worker}) for name, workers in chosen.items()]
        live += taken
        back = [live.pop(chance.randrange(len(live))) for _ in live[:] if len(live) > 8 or chance.random() < 0.2]
        for name, some in [*taken, *back]:
            held[name] ^= some
            free = tuple(core for core in spare[name] if core not in held[name])
            if chance.random() < 0.8:
                placer.moved(name, tuple(some), free, 8 * GIB)
            else:
                placer.changed(name, free, 8 * GIB, held=held[name])
    return asked, quickly


@pytest.mark.parametrize("seeds", [range(begin, begin + 75) for begin in range(0, 600, 75)])
def test_the_same_is_chosen_on_clusters_of_every_kind(seeds):
    asked, quickly = (sum(each) for each in zip(*map(play, seeds), strict=True))
    # What has no node, or only a part of its workers, is the rule's to answer; most of the rest is not.
    assert asked == 12 * len(seeds) and quickly > 0.25 * asked


def test_a_node_that_was_moved_is_forgotten_and_comes_back_as_any_other():
    placer = Placer()
    want = Demand(session=1, request_id=1, uid=7, workers_min=1, workers_max=1)
    placer.changed("a", (0, 1), GIB, numa={0: 0, 1: 1})
    placer.moved("a", (0,), (1,), GIB)
    assert placer.choose(want, 0.0) == {"a": [(1,)]}
    placer.moved("a", (1,), (), GIB)
    assert placer.choose(want, 0.0) == {}
    placer.moved("a", (0,), (0,), GIB)
    assert placer.choose(want, 0.0) == {"a": [(0,)]}
    assert placer.view().nodes["a"].lent == {1} and placer.view().free_cores == 1
    placer.moved("a", (1,), (0, 1), GIB)
    assert placer.view().free_cores == 2
    placer.gone("a")
    assert placer.choose(want, 0.0) == {} and not placer.view().names
    placer.changed("a", (3,), GIB)
    assert placer.choose(want, 0.0) == {"a": [(3,)]}

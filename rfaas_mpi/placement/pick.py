"""Choose the cores of each worker from a node's spare ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["pick_cores"]


def pick_cores(spare: Sequence[int], workers_min: int, workers_max: int,
               cores_per_worker: int, numa: Mapping[int, int] | None = None,
               ) -> list[tuple[int, ...]]:
    """One tuple of cores for each worker, at most `workers_max` of them.

    `spare` is in the order in which to lend; the same arguments give the same
    answer. Each worker stays on one NUMA node (`numa`: core → node, a missing
    core is on node 0) as long as that makes `workers_max` workers; only the
    cores left over on several nodes are put together, over as few nodes as
    possible. Empty where fewer than `workers_min` workers fit. Raises
    ValueError on a repeated core, cores_per_worker < 1, or bounds that are
    negative or out of order.
    """
    if cores_per_worker < 1:
        raise ValueError(f"cores_per_worker is {cores_per_worker}; "
                         "a worker needs at least one core")
    if not 0 <= workers_min <= workers_max:
        raise ValueError(f"workers are ({workers_min}, {workers_max}); "
                         "0 <= min <= max must hold")
    if len(set(spare)) != len(spare):
        raise ValueError(f"a core is listed twice among the spare ones: {list(spare)}")
    wanted = min(workers_max, len(spare) // cores_per_worker)
    if wanted < workers_min:
        return []

    if cores_per_worker == 1:
        return [(core,) for core in spare[:wanted]]

    node_of = numa or {}
    by_node = _by_node(spare, node_of)
    picked: list[tuple[int, ...]] = []
    # The first cores that lie together, most preferred first. A NUMA node that has
    # no room for one more worker never gets any, so one walk over them is enough.
    taken: set[int] = set()
    for core in spare:
        if len(picked) == wanted:
            return picked
        there = by_node[node_of.get(core, 0)]
        if core not in taken and len(there) >= cores_per_worker:
            picked.append(tuple(there[:cores_per_worker]))
            taken.update(picked[-1])
            del there[:cores_per_worker]
    left = [core for core in spare if core not in taken]
    while len(picked) < wanted:
        picked.append(_on_few_nodes(left, cores_per_worker, node_of))
        taken.update(picked[-1])
        left = [core for core in left if core not in taken]
    return picked


def _on_few_nodes(left: Sequence[int], count: int,
                  node_of: Mapping[int, int]) -> tuple[int, ...]:
    """`count` cores of the fullest NUMA nodes; no single one has enough."""
    by_node = _by_node(left, node_of)
    fullest = sorted(by_node, key=lambda node: (-len(by_node[node]), node))
    cores = [core for node in fullest for core in by_node[node]]
    return tuple(cores[:count])


def _by_node(left: Sequence[int], node_of: Mapping[int, int]) -> dict[int, list[int]]:
    by_node: dict[int, list[int]] = {}
    for core in left:
        by_node.setdefault(node_of.get(core, 0), []).append(core)
    return by_node

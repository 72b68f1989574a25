"""The policies: to which nodes the workers of a demand go, and why not to others.

A policy is a generator over the rooms of one search; each room that it yields gets the next worker. It ends when it has
nothing more to offer.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias

from rfaas_mpi.placement.chance import Chance
from rfaas_mpi.placement.facts import ClusterView, Needs, Placed, Placement, Refusal, Verdict
from rfaas_mpi.placement.score import Room, Scorer, Settings, fits, refusals

__all__ = ["POLICIES", "Policy", "Search", "explain", "fill", "least_cost", "place", "seats"]

# So many draws of a node may meet none that has room before all of them are looked at.
_DRAWS = 8


_UNKNOWN: Any = object()


class Search:
    """What a policy sees: the rooms of the nodes that can have a worker, and a source of chance.

    `likely` are names, in order, of nodes among which all are that can have one; None: any may be.
    """

    def __init__(self, needs: Needs, view: ClusterView, settings: Settings, now: float, seed: int,
                 likely: Sequence[str] | None = None) -> None:
        self.needs = needs
        self.view = view
        self.settings = settings
        self.now = now
        self.chance = Chance(seed)
        self.scorer = Scorer(needs, view, settings, now)
        self.likely = view.names if likely is None else likely
        self._rooms: dict[str, Room | None] = {}

    def room(self, name: str) -> Room | None:
        """The node's room; None if it is refused, or full."""
        room = self._rooms.get(name, _UNKNOWN)
        if room is _UNKNOWN:
            facts = self.view.nodes[name]
            most = fits(facts, self.needs, self.settings, self.now)
            room = self._rooms[name] = Room(facts, self.scorer, most) if most > 0 else None
        return room if room is not None and room.left > 0 else None

    def rooms(self) -> Iterator[Room]:
        """All rooms, in order of the nodes' names; the nodes are looked at as they are asked for."""
        for name in self.likely:
            if (room := self.room(name)) is not None:
                yield room

    def shuffled(self) -> Iterator[Room]:
        """All rooms in an order of chance, as they are asked for."""
        for name in self.chance.shuffled(self.likely):
            if (room := self.room(name)) is not None:
                yield room

    def draw(self) -> Room | None:
        """A room by chance; None after some draws without one."""
        for _ in range(_DRAWS if self.likely else 0):
            name = self.likely[self.chance.below(len(self.likely))]
            if (room := self.room(name)) is not None:
                return room
        return None


Policy: TypeAlias = Callable[[Search], Iterator[Room]]


def first_fit(search: Search) -> Iterator[Room]:
    """Nodes in order of their names, each as full as it gets."""
    return _filled(search.rooms())


def at_random(search: Search) -> Iterator[Room]:
    """Nodes in an order of chance, each as full as it gets."""
    return _filled(search.shuffled())


def pack(search: Search) -> Iterator[Room]:
    """As few nodes as possible: the one with least left if one is enough, else the largest first."""
    rooms = list(search.rooms())
    enough = [room for room in rooms if room.left >= search.needs.workers_max]
    if enough:
        rooms = [min(enough, key=lambda room: (room.cores_left, room.key))]
    return _filled(sorted(rooms, key=lambda room: (-room.left, room.key)))


def spread(search: Search) -> Iterator[Room]:
    """As many cohorts as possible, then as many nodes; among equal ones that with most cores left."""
    by_cohort = search.scorer.by_cohort
    return _cheapest(search.rooms(), lambda room: (
        by_cohort.get(room.facts.cohort, 0) if room.facts.cohort else room.here, room.here, -room.cores_left))


def two_choices(search: Search) -> Iterator[Room]:
    """For each worker the cheaper of two nodes drawn by chance (Mitzenmacher, The Power of Two Choices, 2001)."""
    rest: list[Room] | None = None
    while True:
        one, other = search.draw(), search.draw()
        if one is None or other is None:
            rest = [room for room in (search.rooms() if rest is None else rest) if room.left > 0]
            if not rest:
                return
            one, other = (rest[search.chance.below(len(rest))] for _ in range(2))
        yield min((one, other), key=lambda room: (room.total_s(), room.key))


def least_cost(search: Search) -> Iterator[Room]:
    """Each worker where it costs least, given those before it; the default.

    Beyond `exact_to` nodes that may have room that is the least of `sample` rooms (those of the ranks' own nodes and
    leaf switches first, the others by chance) as long as they have one left, then of all. Above `workers_min` it ends
    where a worker would lose more time than it has. `quick.cheapest` answers the same for most demands of a lease book.
    """
    needs, scorer = search.needs, search.scorer
    rooms = search.rooms() if len(search.likely) <= search.settings.exact_to else _sample(search)
    for some in (rooms, search.rooms()):
        for room in _cheapest(some, Room.total_s, falls=needs.gang):
            if scorer.placed >= needs.workers_min and room.lost_s() >= scorer.duration_s:
                break
            yield room


POLICIES: dict[str, Policy] = {
    "default": least_cost, "first-fit": first_fit, "random": at_random, "pack": pack, "spread": spread,
    "two-choices": two_choices}


def _filled(rooms: Iterable[Room]) -> Iterator[Room]:
    for room in rooms:
        while room.left > 0:
            yield room


def _cheapest(rooms: Iterable[Room], cost: Callable[[Room], Any], falls: bool = False) -> Iterator[Room]:
    """The cheapest room each time. Costs only rise while workers are placed, so that an old one is a bound.

    `falls`: they may fall where a node gets its first worker; the room on top may fall in any case, and stays there.
    """
    heap = [(cost(room), room.key, room) for room in rooms]
    heapq.heapify(heap)
    changed = False                            # anything was placed since all of them were found
    while heap:
        old, key, room = heap[0]
        if room.left < 1:
            heapq.heappop(heap)
        elif changed and (fresh := cost(room)) > old:
            heapq.heapreplace(heap, (fresh, key, room))
        else:
            first = room.here == 0
            yield room
            changed = True
            if falls and first:
                heap = [(cost(room), room.key, room) for _, _, room in heap if room.left > 0]
                heapq.heapify(heap)


def _sample(search: Search) -> Iterator[Room]:
    """Distinct rooms: half of them near the ranks, or as many as their nodes, if there are; the others by chance."""
    sample, missing = search.settings.sample, search.needs.workers_max
    near = max(sample // 2, len(search.needs.ranks))
    most = near + sample - sample // 2
    seen: set[str] = set()
    for name in _near(search) if search.needs.ranks else ():
        if len(seen) >= near:
            break
        if name not in seen and (room := search.room(name)) is not None:
            seen.add(name)
            missing -= room.left
            yield room
    for room in search.shuffled():
        # All of them are looked at only if they have no room for the demand.
        if len(seen) >= most and missing <= 0:
            break
        if room.key not in seen:
            seen.add(room.key)
            missing -= room.left
            yield room


def _near(search: Search) -> Iterator[str]:
    """Nodes of the ranks, then nodes below their leaf switches in an order of chance."""
    view, ranks = search.view, search.needs.ranks
    for rank in ranks:
        if rank.node in view.nodes:
            yield rank.node
        yield from view.by_host.get(rank.node, ())
    for switch in dict.fromkeys(path[0] for rank in ranks if (path := view.path(rank.node) or rank.switches)):
        yield from search.chance.shuffled(view.by_switch.get(switch, ()))


# --- the answer ---------------------------------------------------------------

def fill(needs: Needs, view: ClusterView, policy: str | Policy = "default", *, now: float, seed: int = 0,
         settings: Settings = Settings()) -> list[Placed]:
    """The workers that can be placed, perhaps fewer than `workers_min`: `place` without what it says of them.

    ValueError for a policy that isn't one of POLICIES.
    """
    return _fill(Search(needs, view, settings, now, seed), policy)


def seats(search: Search, policy: str | Policy = "default") -> dict[str, list[tuple[int, ...]]]:
    """Node → the cores of each worker there: `fill` without what they cost, for who decides thousands of times.

    ValueError for a policy that isn't one of POLICIES.
    """
    found: dict[str, list[tuple[int, ...]]] = {}
    left = search.needs.workers_max
    for room in _policy(policy)(search) if left > 0 else ():
        cores = room.seat()
        if room.key in found:
            found[room.key].append(cores)
        else:
            found[room.key] = [cores]
        left -= 1
        if left == 0:
            break
    return found


def _fill(search: Search, policy: str | Policy) -> list[Placed]:
    rooms = _policy(policy)(search)
    most = search.needs.workers_max
    return [room.take() for room in islice(rooms, most)] if most > 0 else []


def place(needs: Needs, view: ClusterView, policy: str | Policy = "default", *, now: float, seed: int = 0,
          settings: Settings = Settings()) -> Placement | Refusal:
    """Up to `workers_max` workers and the cores of each, at least `workers_min`; else a Refusal.

    The same arguments give the same answer, whatever the order of the nodes. ValueError for a policy that isn't one of
    POLICIES.
    """
    search = Search(needs, view, settings, now, seed)
    workers = _fill(search, policy)
    if len(workers) < needs.workers_min:
        nodes = explain(needs, view, now=now, settings=settings)
        return Refusal(needs.workers_min, len(workers), _shortfall(needs, len(workers), nodes), nodes)
    if len(workers) == needs.workers_max:
        return Placement(tuple(workers))
    # What was offered and not taken was too dear, see least_cost; else there is nothing left.
    dear = next((True for room in search.rooms()), False)
    reason = (f"{len(workers)} of {needs.workers_max} workers: a further one would lose more time than it has"
              if dear else f"{len(workers)} of {needs.workers_max} workers: no further one fits on any node")
    return Placement(tuple(workers), reason)


def explain(needs: Needs, view: ClusterView, *, now: float, settings: Settings = Settings()) -> tuple[Verdict, ...]:
    """For each node, in order of the names: all reasons against it, or how many workers fit and what one costs."""
    scorer = Scorer(needs, view, settings, now)
    verdicts = []
    for name in view.names:
        facts = view.nodes[name]
        if refused := tuple(refusals(facts, needs, settings, now)):
            verdicts.append(Verdict(name, refused))
        else:
            room = Room(facts, scorer, fits(facts, needs, settings, now))
            verdicts.append(Verdict(name, workers=room.left, terms=room.cost()))
    return tuple(verdicts)


def _policy(policy: str | Policy) -> Policy:
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"there is no placement policy {policy!r}; there are {', '.join(sorted(POLICIES))}")
    return POLICIES[policy]


def _shortfall(needs: Needs, available: int, nodes: tuple[Verdict, ...]) -> str:
    """One line: what was asked, what there is, and what stands against the first nodes."""
    asked = needs.workers_min
    size = f"{needs.cores_per_worker} core{'s' if needs.cores_per_worker != 1 else ''}"
    if needs.memory_per_worker > 0:
        size += f" and {needs.memory_per_worker / 2**30:.3g} GiB"
    text = f"asked for {asked} worker{'s' if asked != 1 else ''} with {'each ' if asked != 1 else ''}{size}, " \
           f"{available} available"
    if not nodes:
        return f"{text}: no node lends cores now"
    refused = [verdict for verdict in nodes if verdict.refused]
    text += f" on {len(nodes) - len(refused)} of {len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    return f"{text}; {'; '.join(map(str, refused[:3]))}" \
           f"{f'; and {len(refused) - 3} more' if len(refused) > 3 else ''}" if refused else text

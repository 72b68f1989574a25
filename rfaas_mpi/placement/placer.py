"""Placement as the lease book uses it: told of each node that changes, asked for each demand.

The book knows what is free; what it doesn't know (topology, windows, what the detector found out) comes from the
agents' reports by `tell`. Deterministic: the same calls give the same answers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rfaas_mpi.placement.facts import Asked, ClusterView, Needs, NodeFacts, RankPlace, Verdict
from rfaas_mpi.placement.policies import POLICIES, Search, explain, seats
from rfaas_mpi.placement.quick import Spot, cheapest
from rfaas_mpi.placement.score import Settings
from rfaas_mpi.placement.windows import Windows

__all__ = ["Cohorts", "Placer"]

_TOLD = frozenset(NodeFacts.__dataclass_fields__) - {"node", "spare", "lent", "memory_bytes", "numa", "hard_end",
                                                     "lends_to_uid", "closed", "cohort", "cohort_size"}


class Cohorts:
    """Which nodes became spare together: of one partition, and no gap between two of them longer than `within_s`.

    Ten seconds is the time between two looks in the traces that the numbers of score.py are from. A cohort's size is
    that of its beginning: who has left it was freed with the others all the same.
    """

    def __init__(self, within_s: float = 10.0) -> None:
        self.within_s = within_s
        self._of: dict[str, _Cohort] = {}
        self._open: dict[str, list[_Cohort]] = {}      # partition → those with members
        self._changed: set[str] = set()

    def window(self, node: str, partition: str, since: float | None) -> None:
        """The node's window began then; None: it has none (any more)."""
        mine = self._of.get(node)
        if mine is not None:
            if since is not None and partition == mine.partition and mine.members.get(node) == since:
                return
            del self._of[node], mine.members[node]
            if not mine.members:
                self._open[mine.partition].remove(mine)
            self._changed.add(node)
        if since is None:
            return
        cohorts = self._open.setdefault(partition, [])
        fits = [cohort for cohort in cohorts
                if cohort.first - self.within_s <= since <= cohort.last + self.within_s]
        if fits:
            cohort = min(fits, key=lambda cohort: cohort.first)
        else:
            cohort = _Cohort(partition, since)
            cohorts.append(cohort)
        cohort.join(node, since)
        self._of[node] = cohort
        self._changed.update(cohort.members)

    def news(self) -> dict[str, tuple[str, int]]:
        """Node → name and size of its cohort ("" and 1: none), for those of which they may have changed."""
        if not self._changed:
            return {}
        changed, self._changed = self._changed, set()
        return {node: (cohort.name, cohort.size) if (cohort := self._of.get(node)) is not None else ("", 1)
                for node in sorted(changed)}


class _Cohort:

    def __init__(self, partition: str, since: float) -> None:
        self.partition = partition
        self.name = f"{partition}@{since!r}"
        self.first = self.last = since
        self.members: dict[str, float] = {}
        self.size = 0

    def join(self, node: str, since: float) -> None:
        self.members[node] = since
        self.first, self.last = min(self.first, since), max(self.last, since)
        self.size += 1


class Placer:
    """Placement for one lease book; without `tell` it knows nothing that the book doesn't.

    `debt_s` says how far a user is ahead of his share (fairness.debt_s); it is asked only while demands wait.
    ValueError for a policy that isn't one of POLICIES.
    """

    def __init__(self, policy: str = "default", settings: Settings = Settings(), seed: int = 0) -> None:
        if policy not in POLICIES:
            raise ValueError(f"there is no placement policy {policy!r}; there are {', '.join(sorted(POLICIES))}")
        self.policy = policy
        self.settings = settings
        self.seed = seed
        self.paths: dict[str, tuple[str, ...]] = {}    # switches above nodes that lend nothing
        self.waiting_cores = 0                 # wanted by demands that wait, for the fairness term
        self.debt_s: Callable[[int], float] | None = None
        self._nodes: dict[str, NodeFacts] = {}         # of those in _moved they are old
        self._spots: dict[str, Spot] = {}
        self._moved: set[str] = set()
        self._likely: list[str] = []           # those with something free, in order
        self._told: dict[str, dict[str, Any]] = {}
        self._cohorts = Cohorts()
        self._view: ClusterView | None = ClusterView.of(())
        self._windows = (Windows(settings.survival, settings.learn_half_life_s)
                         if settings.learn_half_life_s > 0 else None)

    # ---- facts -----------------------------------------------------------------------------------

    def changed(self, node: str, free: tuple[int, ...], memory_bytes: int, *, held: Iterable[int] = (),
                numa: Mapping[int, int] | None = None, hard_end: float | None = None,
                lends_to_uid: int | None = None, closed: str = "") -> None:
        """This is free on the node now, and this is held by leases.

        A node that may lend nothing has nothing free, and `closed` says why. `numa` None: nothing was reported, what
        is lent has changed; NUMA nodes, end and user are those that were said before.
        """
        known = self._known(node)
        held = frozenset(held)
        if known is None:
            facts = NodeFacts(node=node, spare=free, memory_bytes=memory_bytes, lent=held, numa=numa or {},
                              hard_end=hard_end, lends_to_uid=lends_to_uid, closed=closed, **self._told.get(node, {}))
            self._cohorts.window(node, facts.partition, facts.since)
        elif numa is None and closed == known.closed:
            facts = known.lending(free, held, memory_bytes)
        else:
            said: dict[str, Any] = {"closed": closed}
            if numa is not None:
                said |= {"numa": numa, "hard_end": hard_end, "lends_to_uid": lends_to_uid}
            if ((free, held, memory_bytes) == (known.spare, known.lent, known.memory_bytes)
                    and all(getattr(known, name) == value for name, value in said.items())):
                return
            facts = replace(known, spare=free, lent=held, memory_bytes=memory_bytes, **said)
        self._put(facts)

    def moved(self, node: str, cores: Iterable[int], free: tuple[int, ...], memory_bytes: int) -> None:
        """`changed`, for much less, where nothing else has: these cores were free and are held, or the reverse."""
        spot = self._spots[node]
        before = spot.free
        spot.move(cores, free, memory_bytes)
        self._moved.add(node)
        if not before or not free:
            self._list(node, bool(before), bool(free))

    def tell(self, node: str, **facts: Any) -> None:
        """Facts that the book hasn't got, by the names of NodeFacts; they stay until they are told anew.

        ValueError for a name that isn't one of them, or is the book's to say.
        """
        if unknown := facts.keys() - _TOLD:
            raise ValueError(f"{min(unknown)} can't be told of a node; what can is {', '.join(sorted(_TOLD))}")
        told = self._told.setdefault(node, {})
        told.update(facts)
        known = self._known(node)
        if known is not None and any(getattr(known, name) != value for name, value in facts.items()):
            facts_now = replace(known, **facts)
            self._put(facts_now)
            self._cohorts.window(node, facts_now.partition, facts_now.since)

    def observe(self, node: str, since: float | None, spare: Iterable[int], now: float) -> None:
        """A report of a node whose word counts: what its window has lasted, and which of its cores are wanted back.

        The default's risk of evictions follows from what all nodes of its partition have shown.
        """
        if self._windows is not None and (facts := self._nodes.get(node)) is not None:
            self._windows.seen(node, facts.partition, since, spare, now, facts.cohort_size)
            if self._windows.full:
                # Not only when somebody asks: on a cluster that is idle for days nobody does.
                self._learn(now)

    def lost(self, node: str) -> None:
        """Nothing is heard of the node any more."""
        if self._windows is not None:
            self._windows.lost(node)

    def gone(self, node: str) -> None:
        """The node isn't there any more, and what was told of it no longer holds."""
        self._told.pop(node, None)
        self.lost(node)
        if self._known(node) is not None:
            self._list(node, bool(self._nodes.pop(node).spare), False)
            del self._spots[node]
            self._cohorts.window(node, "", None)
            self._view = None

    # ---- questions -------------------------------------------------------------------------------

    def choose(self, demand: Asked, now: float, *, ranks: tuple[RankPlace, ...] = (),
               **more: Any) -> dict[str, list[tuple[int, ...]]]:
        """Node → the cores of each worker there; fewer than `workers_min` in all where no more fit: to refuse is the
        book's.

        `more`: further fields of Needs.
        """
        self._learn(now)
        seed = hash((self.seed, demand.session, demand.request_id))
        others_wait = self.waiting_cores > 0 and self.debt_s is not None
        if self.policy == "default" and not ranks and not more and not others_wait:
            found = cheapest(demand, now, seed, self._spots, self._likely, self._places(), self.settings)
            if found is not None:
                return found
        search = Search(self.needs(demand, ranks, **more), self.view(), self.settings, now, seed, self._likely)
        return seats(search, self.policy)

    def explain(self, demand: Asked, now: float, *, ranks: tuple[RankPlace, ...] = (),
                **more: Any) -> tuple[Verdict, ...]:
        """For each node: why not, or how many workers fit and what one costs."""
        self._learn(now)
        return explain(self.needs(demand, ranks, **more), self.view(), now=now, settings=self.settings)

    def needs(self, demand: Asked, ranks: tuple[RankPlace, ...] = (), **more: Any) -> Needs:
        """The demand as placement has it; its places and what it exchanges are the demand's if nothing else is said."""
        if not ranks:
            places = demand.others if demand.place is None else (demand.place, *demand.others)
            ranks = tuple(RankPlace(place.node, place.ranks, place.numa, place.switches) for place in places)
        if ranks and "bytes_per_s" not in more and "transfer_bytes" not in more:
            more["bytes_per_s"] = (self.settings.assumed_bytes_per_s if demand.bytes_per_s is None
                                   else demand.bytes_per_s)
        if self.waiting_cores > 0 and self.debt_s is not None and "debt_s" not in more:
            more["debt_s"] = self.debt_s(demand.uid)
        return Needs(workers_min=demand.workers_min, workers_max=demand.workers_max,
                     cores_per_worker=demand.cores_per_worker, memory_per_worker=demand.memory_per_worker or 0,
                     uid=demand.uid, duration_s=demand.duration_s, least_s=demand.least_s, ranks=ranks, **more)

    def view(self) -> ClusterView:
        """All nodes as they are known now; good until the next change."""
        moved, self._moved = self._moved, set()
        for name in moved:
            self._nodes[name] = self._spots[name].facts
        view = self._places()
        if self.waiting_cores or view.waiting_cores or moved:
            # Not the same one: it keeps how many cores were free.
            view = self._view = replace(view, waiting_cores=self.waiting_cores)
        return view

    # ---- inside ----------------------------------------------------------------------------------

    def _learn(self, now: float) -> None:
        if self._windows is not None and self._windows.due(now):
            self.settings = replace(self.settings, survival=self._windows.fold(now))

    def _places(self) -> ClusterView:
        """The view, where what is free and held is not asked of it."""
        for name, (cohort, size) in self._cohorts.news().items():
            facts = self._known(name)
            if facts is not None and (facts.cohort, facts.cohort_size) != (cohort, size):
                self._nodes[name] = facts = replace(facts, cohort=cohort, cohort_size=size)
                self._spots[name].know(facts, self.settings)
        view = self._view
        if view is None:
            # A copy of all nodes for each change of one would cost more than all the rest of a decision.
            view = self._view = replace(ClusterView.of(self._nodes.values()), nodes=self._nodes, paths=self.paths)
        return view

    def _known(self, node: str) -> NodeFacts | None:
        """The node as it is now."""
        if node in self._moved:
            self._moved.discard(node)
            self._nodes[node] = self._spots[node].facts
        return self._nodes.get(node)

    def _put(self, facts: NodeFacts) -> None:
        node = facts.node
        before = self._nodes.get(node)
        self._nodes[node] = facts
        if before is None:
            self._spots[node] = Spot(facts, self.settings)
        else:
            self._spots[node].know(facts, self.settings)
        if before is None or (before.switches, before.host) != (facts.switches, facts.host):
            self._view = None
        self._list(node, before is not None and bool(before.spare), bool(facts.spare))

    def _list(self, node: str, was_likely: bool, is_likely: bool) -> None:
        if is_likely and not was_likely:
            insort(self._likely, node)
        elif was_likely and not is_likely:
            del self._likely[bisect_left(self._likely, node)]

"""The nodes of a lease book: what each lends, and which of them can fill a demand.

A grant must not look at every node of a cluster, so nodes stand on shelves by how
many cores they have free. A node that may lend nothing now stands on none.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from itertools import filterfalse
from typing import Any, Protocol, TypeAlias

from rfaas_mpi.leases.types import Demand, NodeReport, NodeTraits, NodeView

__all__ = ["Chooser", "Node", "Nodes", "Picker"]

Picker: TypeAlias = Callable[
    [Sequence[int], int, int, int, Mapping[int, int]], list[tuple[int, ...]]]
"""Placement policy: (spare, workers_min, workers_max, cores_per_worker, numa) →
the cores of each worker; `placement.pick_cores` is one."""


class Chooser(Protocol):
    """Who chooses nodes in a book's stead: told of each node that changes, asked for each demand.

    `placement.Placer` is one. The book has the last word: a core that isn't free isn't granted.
    """

    def changed(self, node: str, free: tuple[int, ...], memory_bytes: int, *, held: Collection[int],
                numa: Mapping[int, int] | None = None, hard_end: float | None = None,
                lends_to_uid: int | None = None, closed: str = "") -> None:
        """This is free there now, or nothing is, and `closed` says why; `numa` None: nothing new was reported."""

    def moved(self, node: str, cores: Collection[int], free: tuple[int, ...], memory_bytes: int) -> None:
        """These free cores were lent, or these lent ones are free again, and nothing else has changed."""

    def tell(self, node: str, **facts: Any) -> None:
        """What the agent knows of it, by the names of NodeTraits."""

    def gone(self, node: str) -> None:
        """It isn't there any more."""

    def choose(self, demand: Demand, now: float) -> Mapping[str, list[tuple[int, ...]]]:
        """Node → the cores of each worker there, fewer than `workers_max` where no more fit."""


class Node:
    """A node's last report, and what the book has lent there.

    `report` is None before the first one and once the agent was declared dead.
    `incarnation` and `clock_ns` are those of the last report, or of what the book
    before this one knew: anything older changes nothing. Until the agent's clock
    has passed `fence_ns`, a grant that the book has given up may still begin there.
    """

    __slots__ = ("clock_ns", "drained", "fence_ns", "foreign", "free", "held",
                 "incarnation", "memory_held", "name", "place", "received", "report",
                 "settled", "silent", "told", "traits")

    def __init__(self, name: str) -> None:
        self.name = name
        self.report: NodeReport | None = None
        self.received = 0.0
        self.incarnation = 0
        self.clock_ns = 0
        self.fence_ns = 0
        self.silent = False
        self.drained = False
        self.held: dict[int, int] = {}              # core → lease id
        self.memory_held = 0
        self.foreign: frozenset[int] = frozenset()  # busy, but for no live lease
        self.free: tuple[int, ...] = ()             # would be granted, in this order
        self.settled: NodeReport | None = None      # of which `free` is what isn't held
        self.place: tuple[int | None, int] | None = None  # the shelf it stands on
        self.told: NodeReport | None = None         # the last of which a chooser knows
        self.traits = NodeTraits()                  # likewise

    @property
    def memory_free(self) -> int:
        # A report may promise less than is lent: what is lent stays lent.
        left = (self.report.memory_bytes if self.report is not None else 0) - self.memory_held
        return left if left > 0 else 0

    @property
    def view(self) -> NodeView:
        """It as people see it; only for a node that has reported."""
        report = self.report
        assert report is not None
        return NodeView(node=self.name, spare=report.spare, lent=tuple(sorted(self.held)),
                        free=self.free, memory_bytes=report.memory_bytes,
                        memory_free=self.memory_free, silent=self.silent,
                        drained=self.drained)

    def is_news(self, report: NodeReport) -> bool:
        """False for a report that came before, or was overtaken by a later one."""
        if report.incarnation != self.incarnation:
            return report.incarnation > self.incarnation
        return report.incarnation == 0 or report.clock_ns > self.clock_ns

    def not_after_ns(self, now: float, within_s: float) -> int:
        """`within_s` from now on the agent's clock, or earlier: reports take time to come."""
        return self.clock_ns + int((now - self.received + within_s) * 1e9)

    @property
    def closed(self) -> str:
        """Why nothing is granted here, whatever is free; "" if that isn't so."""
        if self.drained:
            return "drained: nothing is lent there until it is undrained"
        if self.report is None:
            return "its agent has not reported"
        if self.silent:
            return "its agent is silent"
        return "a grant that was given up could still begin there" if self.fence_ns else ""

    def serves(self, now: float, least_s: float = 0.0) -> bool:
        """True if leases granted now would have any time at all, and more than `least_s`."""
        report = self.report
        return report is not None and (report.hard_end is None or report.hard_end > now + least_s)

    def seats(self, cores_per_worker: int, *, whole: bool) -> int:
        """How many workers fit if nothing is lent; `whole`: no two hardware threads of one core count."""
        report = self.report
        if report is None:
            return 0
        if whole and (physical := report.traits.physical):
            return len({physical.get(core, core) for core in report.spare}) // cores_per_worker
        return len(report.spare) // cores_per_worker

    def capacity(self, demand: Demand) -> int:
        """How many of the demand's workers fit, whatever their number."""
        most = len(self.free) // demand.cores_per_worker
        if demand.memory_per_worker:
            most = min(most, self.memory_free // demand.memory_per_worker)
        return most

    def share(self, demand: Demand, workers: int) -> int:
        """Memory of each of so many workers: what is asked for, else a fair share by cores."""
        if demand.memory_per_worker is not None:
            return demand.memory_per_worker
        report = self.report
        assert report is not None
        fair = report.memory_bytes * demand.cores_per_worker // max(1, len(report.spare))
        return min(fair, self.memory_free // max(1, workers))


class Nodes:
    """Every node that the book knows, by name; call `changed` after touching one."""

    def __init__(self, chooser: Chooser | None = None) -> None:
        self.chooser = chooser
        self._all: dict[str, Node] = {}
        # For the only user that its nodes lend to (None: for all): free cores →
        # names in order, and those numbers of cores in order. A chooser knows the names;
        # for one only how many there are is kept.
        self._shelves: dict[int | None, dict[int, list[str]]] = {}
        self._sizes: dict[int | None, list[int]] = {}
        self._counts: dict[tuple[int | None, int], int] = {}

    def __iter__(self) -> Iterator[Node]:
        return iter(self._all.values())

    def get(self, name: str) -> Node | None:
        return self._all.get(name)

    def known(self, name: str) -> Node:
        """The node of that name, a new one if need be."""
        node = self._all.get(name)
        if node is None:
            node = self._all[name] = Node(name)
        return node

    def forget(self, name: str) -> None:
        """A node that has no report."""
        node = self._all.pop(name)
        assert node.report is None and node.place is None, name
        if self.chooser is not None:
            self.chooser.gone(name)

    @property
    def views(self) -> list[NodeView]:
        """Those that have reported, by name."""
        return [node.view for _, node in sorted(self._all.items()) if node.report is not None]

    def changed(self, node: Node, moved: tuple[int, ...] = ()) -> None:
        """Works out what is free there and puts it on the right shelf; `moved`: only these were lent, or given back."""
        before = node.free
        report = node.report
        place = None
        if report is None or node.silent or node.drained or node.fence_ns:
            node.free, node.settled = (), None
        else:
            # This is done for each grant and end: no loop of Python's over a node's cores.
            if moved and report is node.settled and moved[0] in node.held:
                node.free = tuple(filterfalse((moved if len(moved) < 4 else set(moved)).__contains__, before))
            else:
                free = filterfalse(node.held.__contains__, report.spare)
                node.free = tuple(filterfalse(node.foreign.__contains__, free) if node.foreign else free)
                node.settled = report
            if node.free:
                place = (report.lends_to_uid, len(node.free))
        if self.chooser is not None:
            # Cores that have left what is spare, or are busy still, don't become free.
            if moved and report is node.told and abs(len(node.free) - len(before)) == len(moved):
                self.chooser.moved(node.name, moved, node.free, node.memory_free)
            else:
                self._tell(self.chooser, node)
        if place == node.place:
            return
        if self.chooser is not None:
            counts = self._counts
            if node.place is not None:
                counts[node.place] -= 1
                if not counts[node.place]:
                    del counts[node.place]
            if place is not None:
                counts[place] = counts.get(place, 0) + 1
            node.place = place
            return
        if node.place is not None:
            user, size = node.place
            shelf = self._shelves[user][size]
            del shelf[bisect_left(shelf, node.name)]
            if not shelf:
                del self._shelves[user][size]
                sizes = self._sizes[user]
                del sizes[bisect_left(sizes, size)]
                if not sizes:
                    del self._shelves[user], self._sizes[user]
        if place is not None:
            user, size = place
            shelves = self._shelves.setdefault(user, {})
            if size not in shelves:
                shelves[size] = []
                insort(self._sizes.setdefault(user, []), size)
            insort(shelves[size], node.name)
        node.place = place

    def _tell(self, chooser: Chooser, node: Node) -> None:
        report, closed = node.report, node.closed
        if report is None or report is node.told:
            chooser.changed(node.name, node.free, node.memory_free, held=node.held, closed=closed)
            return
        chooser.changed(node.name, node.free, node.memory_free, held=node.held, numa=report.numa,
                        hard_end=report.hard_end, lends_to_uid=report.lends_to_uid, closed=closed)
        node.told = report
        if report.traits != node.traits:
            node.traits = report.traits
            traits = {name: getattr(report.traits, name) for name in NodeTraits.__struct_fields__}
            chooser.tell(node.name, **traits | {"busy": frozenset(report.traits.busy)})

    def for_user(self, uid: int, now: float) -> list[Node]:
        """All that this user's demands can be filled from, also where nothing is free."""
        return [node for node in self._all.values()
                if node.serves(now) and not node.silent and not node.drained and not node.fence_ns
                and node.report is not None and node.report.lends_to_uid in (None, uid)]

    def choose(self, demand: Demand, now: float, pick: Picker,
               ) -> list[tuple[Node, list[tuple[int, ...]]]]:
        """As few nodes as possible; whatever one can take goes where least is left.

        Fewer than `workers_max` workers where no more fit. With a chooser: as that one says.
        """
        if self.chooser is not None:
            return self._chosen(self.chooser, demand, now)
        chosen: list[tuple[Node, list[tuple[int, ...]]]] = []
        taken: set[str] = set()
        left = demand.workers_max
        largest: Iterator[Node] | None = None
        while left > 0:
            node = self._tightest(demand, left, now, taken)
            if node is None:
                largest = largest or self._largest_first(demand, now)
                node = next(largest, None)
                if node is None:
                    break
            taken.add(node.name)
            report = node.report
            assert report is not None
            workers = pick(node.free, 0, min(left, node.capacity(demand)),
                           demand.cores_per_worker, report.numa)
            if workers:
                chosen.append((node, workers))
                left -= len(workers)
        return chosen

    def _chosen(self, chooser: Chooser, demand: Demand, now: float) -> list[tuple[Node, list[tuple[int, ...]]]]:
        # Who waits is tried again with each report: that must not look at every node.
        if demand.waits and not self._may_fit(demand):
            return []
        chosen = []
        for name, workers in chooser.choose(demand, now).items():
            node = self._all[name]
            held = node.held.keys()
            for cores in workers:
                if not held.isdisjoint(cores):
                    raise RuntimeError(f"who chooses nodes wants to lend a core of {name} that is lent: {workers}")
            chosen.append((node, workers))
        return chosen

    def _may_fit(self, demand: Demand) -> bool:
        """False if there are too few free cores for sure."""
        missing = demand.workers_min
        for (user, size), nodes in self._counts.items():
            if missing <= 0:
                break
            if user is None or user == demand.uid:
                missing -= size // demand.cores_per_worker * nodes
        return missing <= 0

    def _tightest(self, demand: Demand, workers: int, now: float, taken: set[str]) -> Node | None:
        """The node with the fewest free cores that has room for all of these workers."""
        found: Node | None = None
        for user in (None, demand.uid):
            sizes = self._sizes.get(user, ())
            for position in range(bisect_left(sizes, workers * demand.cores_per_worker), len(sizes)):
                size = sizes[position]
                if found is not None and size > len(found.free):
                    break
                node = next((node for node in self._on(user, size, now + demand.least_s)
                             if node.name not in taken and node.capacity(demand) >= workers), None)
                if node is not None:
                    if found is None or (size, node.name) < (len(found.free), found.name):
                        found = node
                    break
        return found

    def _largest_first(self, demand: Demand, now: float) -> Iterator[Node]:
        """Nodes with room for at least one worker, those with room for most first."""
        waiting: list[tuple[int, str, Node]] = []
        shelves = sorted(((size // demand.cores_per_worker, user, size)
                          for user in (None, demand.uid) for size in self._sizes.get(user, ())),
                         key=lambda shelf: -shelf[0])
        for most, user, size in shelves:
            # By memory, one from a shelf before may have no more room than these.
            while waiting and -waiting[0][0] > most:
                yield heappop(waiting)[2]
            for node in self._on(user, size, now + demand.least_s):
                if (room := node.capacity(demand)) > 0:
                    heappush(waiting, (-room, node.name, node))
        while waiting:
            yield heappop(waiting)[2]

    def _on(self, user: int | None, size: int, now: float) -> Iterator[Node]:
        return (node for name in self._shelves[user][size]
                if (node := self._all[name]).serves(now))

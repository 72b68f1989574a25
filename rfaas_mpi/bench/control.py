"""The control plane's figures: how many leases a book grants in a second, by who chooses the nodes.

No core is borrowed for it.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, cycle

from rfaas_mpi.bench import measure
from rfaas_mpi.bench.measure import Subject
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, check_quiet
from rfaas_mpi.leases import (
    Activated,
    Demand,
    Grant,
    Lease,
    LeaseBook,
    LiveLease,
    NodeReport,
    NodeTraits,
    RankAt,
    Release,
    Tick,
    WorkersStopped,
)
from rfaas_mpi.leases.nodes import Chooser, Picker
from rfaas_mpi.manager.ledger import Ledger
from rfaas_mpi.placement import Placer, Settings, pick_cores

__all__ = ["NODES", "Cluster", "measure_book"]

NODES = 1000
CORES = 64
GIB = 1 << 30
CYCLES = 50
# Grants that live while the others come and go: about half of all cores.
LIVE = 8000
# What a manager writes down at once.
GROUP = 32
UID = 1000
NUMA = {core: core * 2 // CORES for core in range(CORES)}


class Cluster:
    """A lease book of many nodes, half lent, whose leases come and go; its time is only counted.

    `granted`: the leases of each grant that lives, oldest first.
    """

    def __init__(self, nodes: int = NODES, live: int = LIVE, seed: int = 1, *,
                 pick: Picker | Chooser | None = None, now: float = 0.0) -> None:
        self.book = LeaseBook(Placer() if pick is None else pick, remember_s=10.0, durable=True)
        self.nodes = nodes
        self._now = now
        self.granted: deque[tuple[Lease, ...]] = deque()
        self._requests = count(1)
        choose = random.Random(seed)
        self._shapes = cycle([(choose.choice((1, 1, 1, 2, 4, 8)), choose.choice((1, 1, 1, 2, 4)))
                              for _ in range(4096)])
        self._clocks = count(1)
        for number in range(nodes):
            self.book.handle(self._report(number, ()), self._now)
        while len(self.granted) < live:
            self.grant()

    def _report(self, number: int, live: tuple[LiveLease, ...]) -> NodeReport:
        # Sixteen nodes below a switch, windows of all ages.
        traits = NodeTraits(host=f"nid{number:05}", since=-1.0 - number % 3600,
                            switches=(f"leaf{number // 16}", f"pod{number // 128}", "top"))
        return NodeReport(node=f"nid{number:05}", spare=tuple(range(CORES)), memory_bytes=256 * GIB, numa=NUMA,
                          incarnation=1, clock_ns=next(self._clocks), live=live, traits=traits)

    def demand(self) -> Demand:
        workers, cores = next(self._shapes)
        number = next(self._requests)
        place = RankAt(node=f"nid{number * 7919 % self.nodes:05}")
        return Demand(session=number % 997, request_id=number, uid=UID, workers_min=1, workers_max=workers,
                      cores_per_worker=cores, memory_per_worker=None, place=place)

    def grant(self) -> None:
        """One demand, granted in full and activated. BenchError if it is not."""
        demand = self.demand()
        *_, answer = self.book.handle(demand, self._now)
        if not isinstance(answer, Grant) or answer.workers != demand.workers_max:
            raise BenchError(f"a demand for {demand.workers_max} workers was answered with {answer}")
        for lease in answer.leases:
            self.book.handle(Activated(lease.id), self._now)
        self.granted.append(answer.leases)

    def end(self) -> None:
        """What was granted longest ago is given back, and its agents say that its workers are gone."""
        for lease in self.granted.popleft():
            self.book.handle(Release(lease.session, lease.id), self._now)
            self.book.handle(WorkersStopped(lease.id), self._now)

    def keep(self, ledger: Ledger) -> int:
        """Writes down what has changed; how many leases that were."""
        changes = self.book.changes()
        ledger.write([changes])
        return len(changes.leases)

    def lives(self, number: int, *, tidy: bool = True) -> None:
        """So many grants begin and end, one for another; `tidy`: what changed is forgotten as if it was written."""
        for step in range(number):
            self.grant()
            self.end()
            if step % GROUP == 0:
                self._now += 0.001 * GROUP
                self.book.handle(Tick(), self._now)
                if tidy:
                    self.book.changes()

    def reports(self) -> Iterator[NodeReport]:
        """A report of each node as it stands, for ever."""
        there: dict[str, list[LiveLease]] = {}
        for lease in self.book.leases:
            there.setdefault(lease.node, []).append(LiveLease(lease.id, lease.epoch, lease.workers))
        for number in cycle(range(self.nodes)):
            yield self._report(number, tuple(there.get(f"nid{number:05}", ())))

    @property
    def leases_per_grant(self) -> float:
        """On so many nodes a grant is, on average."""
        return round(sum(map(len, self.granted)) / max(1, len(self.granted)), 2)

    def check(self) -> None:
        """BenchError if a core is in two leases, or one was lost: no rate is worth anything then."""
        held: dict[tuple[str, int], int] = {}
        for lease in self.book.leases:
            for core in lease.cores:
                if held.setdefault((lease.node, core), lease.id) != lease.id:
                    raise BenchError(f"core {core} of {lease.node} is lent twice")
        if {lease.id for lease in self.book.leases} != {lease.id for leases in self.granted for lease in leases}:
            raise BenchError("the book and the bench disagree about which leases live")


def measure_book(options: Options, *, nodes: int = NODES, live: int = LIVE) -> dict:
    """Rates in 1/s and grants in µs, of books whose nodes are about half lent.

    `book_grants_per_s` counts whole lives: asked for, granted, activated, given back, gone, with the default policy;
    the same by the other ways to choose nodes: `two_choices_…`, `sample_32_…` (the default's score over four times as
    many nodes), and `shelves_…`, where a book looks only at what is free. BenchError where a grant was not what was
    asked for, or a core was lent twice.
    """
    check_quiet(options.progress)
    cluster = Cluster(nodes, live)
    others = {name: Cluster(nodes, live, pick=pick) for name, pick in (
        ("shelves", pick_cores), ("two_choices", Placer("two-choices")),
        ("sample_32", Placer(settings=Settings(sample=32))))}
    subjects = [_lives("lives", cluster), _grants("grant", cluster), _reports("reports", cluster),
                *(_lives(name, other) for name, other in others.items()), _lives("lives_again", cluster)]
    runs = []
    for number in range(1, options.runs + 1):
        options.progress(f"control: run {number} of {options.runs}")
        runs.append(measure.interleave(subjects, cycles=options.cycles(CYCLES)))
    for each in (cluster, *others.values()):
        each.check()
    figures = {
        "book_grants_per_s": {**measure.rate_figure(runs, "lives"), "aa": measure.rate_figure(runs, "lives_again")},
        "book_grant_us": measure.latency_figure(runs, "grant", unit="us", digits=2),
        "book_reports_per_s": measure.rate_figure(runs, "reports"),
        **{f"{name}_grants_per_s": measure.rate_figure(runs, name) for name in others},
    }
    return {**measure.flat(figures), "cluster": {
        "nodes": nodes, "cores": CORES, "live_grants": live,
        "leases_per_grant": {"default": cluster.leases_per_grant,
                             **{name: other.leases_per_grant for name, other in others.items()}}}}


def _lives(name: str, cluster: Cluster) -> Subject:
    def block(number: int) -> int:
        begin = time.perf_counter_ns()
        cluster.lives(number)
        return time.perf_counter_ns() - begin

    return Subject(name, block)


def _grants(name: str, cluster: Cluster) -> Subject:
    """The demand alone, each by itself."""
    clock: Callable[[], int] = time.perf_counter_ns

    def singles(number: int) -> list[int]:
        times = []
        for _ in range(number):
            begin = clock()
            cluster.grant()
            times.append(clock() - begin)
            cluster.end()
        cluster.book.changes()
        return times

    return Subject(name, singles=singles)


def _reports(name: str, cluster: Cluster) -> Subject:
    """What agents say when nothing has changed: the leases that they run."""
    ready: list[NodeReport] = []

    def prepare(number: int) -> None:
        reports = cluster.reports()
        ready[:] = [next(reports) for _ in range(number)]

    def block(number: int) -> int:
        begin = time.perf_counter_ns()
        for report in ready:
            cluster.book.handle(report, 0.0)
        return time.perf_counter_ns() - begin

    return Subject(name, block, prepare=prepare)

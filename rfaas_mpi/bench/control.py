"""The control plane's figures: how many leases a book grants in a second. No core is borrowed for it."""

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
    Release,
    Tick,
    WorkersStopped,
)
from rfaas_mpi.placement import pick_cores

__all__ = ["NODES", "Cluster", "measure_control"]

NODES = 1000
CORES = 64
GIB = 1 << 30
CYCLES = 50
# Leases that live while the others come and go: about half of all cores.
LIVE = 8000
# What a manager writes down at once.
GROUP = 32
UID = 1000


class Cluster:
    """A lease book of many nodes, half lent, whose leases come and go; its time is only counted."""

    def __init__(self, nodes: int = NODES, live: int = LIVE, seed: int = 1) -> None:
        self.book = LeaseBook(pick_cores, remember_s=10.0, durable=True)
        self.nodes = nodes
        self._now = 0.0
        self._live: deque[Lease] = deque()
        self._requests = count(1)
        choose = random.Random(seed)
        self._shapes = cycle([(choose.choice((1, 1, 1, 2, 4, 8)), choose.choice((1, 1, 1, 2, 4)))
                              for _ in range(4096)])
        self._clocks = count(1)
        for number in range(nodes):
            self.book.handle(self._report(number, ()), self._now)
        while len(self._live) < live:
            self.grant()

    def _report(self, number: int, live: tuple[LiveLease, ...]) -> NodeReport:
        return NodeReport(node=f"nid{number:05}", spare=tuple(range(CORES)), memory_bytes=256 * GIB,
                          numa={core: core * 2 // CORES for core in range(CORES)}, incarnation=1,
                          clock_ns=next(self._clocks), live=live)

    def demand(self) -> Demand:
        workers, cores = next(self._shapes)
        number = next(self._requests)
        return Demand(session=number % 997, request_id=number, uid=UID, workers_min=1, workers_max=workers,
                      cores_per_worker=cores, memory_per_worker=None)

    def grant(self) -> None:
        """One demand, granted in full and activated. BenchError if it is not."""
        demand = self.demand()
        *_, answer = self.book.handle(demand, self._now)
        if not isinstance(answer, Grant) or answer.workers != demand.workers_max:
            raise BenchError(f"a demand for {demand.workers_max} workers was answered with {answer}")
        for lease in answer.leases:
            self.book.handle(Activated(lease.id), self._now)
            self._live.append(lease)

    def end(self) -> None:
        """The oldest lease is given back, and its agent says that its workers are gone."""
        lease = self._live.popleft()
        self.book.handle(Release(lease.session, lease.id), self._now)
        self.book.handle(WorkersStopped(lease.id), self._now)

    def lives(self, number: int) -> None:
        """So many leases begin and end, one for another."""
        for step in range(number):
            self.grant()
            self.end()
            if step % GROUP == 0:
                self._now += 0.001 * GROUP
                self.book.handle(Tick(), self._now)
                self.book.changes()

    def reports(self) -> Iterator[NodeReport]:
        """A report of each node as it stands, for ever."""
        there: dict[str, list[LiveLease]] = {}
        for lease in self.book.leases:
            there.setdefault(lease.node, []).append(LiveLease(lease.id, lease.epoch, lease.workers))
        for number in cycle(range(self.nodes)):
            yield self._report(number, tuple(there.get(f"nid{number:05}", ())))

    def check(self) -> None:
        """BenchError if a core is in two leases, or one was lost: no rate is worth anything then."""
        held: dict[tuple[str, int], int] = {}
        for lease in self.book.leases:
            for core in lease.cores:
                if held.setdefault((lease.node, core), lease.id) != lease.id:
                    raise BenchError(f"core {core} of {lease.node} is lent twice")
        if {lease.id for lease in self.book.leases} != {lease.id for lease in self._live}:
            raise BenchError("the book and the bench disagree about which leases live")


def measure_control(options: Options, *, nodes: int = NODES, live: int = LIVE) -> dict:
    """Rates in 1/s and grants in µs, of a book whose nodes are about half lent.

    `book_grants_per_s` counts whole lives: asked for, granted, activated, given back, gone. BenchError where a grant
    was not what was asked for, or a core was lent twice.
    """
    check_quiet(options.progress)
    cluster = Cluster(nodes, live)
    subjects = [_lives("lives", cluster), _grants("grant", cluster), _reports("reports", cluster),
                _lives("lives_again", cluster)]
    runs = []
    for number in range(1, options.runs + 1):
        options.progress(f"control: run {number} of {options.runs}")
        runs.append(measure.interleave(subjects, cycles=options.cycles(CYCLES)))
    cluster.check()
    figures = {
        "book_grants_per_s": {**measure.rate_figure(runs, "lives"), "aa": measure.rate_figure(runs, "lives_again")},
        "book_grant_us": measure.latency_figure(runs, "grant", unit="us", digits=2),
        "book_reports_per_s": measure.rate_figure(runs, "reports"),
    }
    return {**measure.flat(figures), "cluster": {"nodes": nodes, "cores": CORES, "live_leases": live}}


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

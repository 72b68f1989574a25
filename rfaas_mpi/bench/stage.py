"""The stage of a measurement: the rank on one core, one worker and one bare partner on the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfaas_mpi.bench import environment, measure, raw
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.config import Settings
from rfaas_mpi.executor import Executor

# Round trips before a block, so that both sides are hot when it begins.
WARM_UP = 50
# How long after its last invocation a worker still spins, and a little more: the bare partner then has the core alone.
REST_S = 0.0005


@dataclass(frozen=True)
class Options:
    """How to measure."""

    transport: str = "shm"
    provider: str = "device"  # of verbs; "null": none
    runs: int = 3
    core: int | None = None
    quick: bool = False
    of: tuple[str, ...] = ()  # which workers are reclaimed; none named: each kind
    namespaces: bool = False  # the agent of `first` in a network namespace of its own
    apps: tuple[Path, ...] = ()  # programs of apps/ that meet faults
    progress: Callable[[str], None] = field(default=lambda _text: None, compare=False)

    def cycles(self, full: int) -> int:
        return max(2, full // 10) if self.quick else full

    def settings(self) -> dict[str, Any]:
        return {"transport": self.transport, "provider": self.provider, "runs": self.runs, "quick": self.quick,
                "block": measure.BLOCK, "warm_up": WARM_UP}


@dataclass(frozen=True)
class Stage:
    """What a benchmark works with."""

    options: Options
    executor: Executor
    partner: raw.Partner
    rank_core: int
    worker_cores: tuple[int, ...]
    worker_pid: int
    spin_s: float

    def rest(self) -> None:
        """Lets the worker fall asleep, so that it does not spin on the core of the bare partner."""
        time.sleep(self.spin_s + REST_S)

    def bare(self, name: str, mode: int = raw.MAILBOX) -> measure.Subject:
        """Two bare processes, as a subject."""
        def prepare(count: int) -> None:
            self.partner.arm(mode, WARM_UP + count)
            self.partner.calls(WARM_UP)

        return measure.Subject(name, self.partner.calls, self.partner.samples, prepare)

    def runs(self, title: str, subjects: list[measure.Subject], *, cycles: int,
             block: int = measure.BLOCK) -> list[measure.Run]:
        """All runs of one comparison, each told as it begins."""
        found = []
        for number in range(1, self.options.runs + 1):
            self.options.progress(f"{title}: run {number} of {self.options.runs}")
            found.append(measure.interleave(subjects, cycles=cycles, block=block, between=self.rest))
        return found

    def facts(self) -> dict:
        return {"rank_core": self.rank_core, "worker_cores": list(self.worker_cores), "spin_us": self.spin_s * 1e6}


def check_quiet(progress: Callable[[str], None]) -> None:
    """Says so if others are busy here; figures then tell about them."""
    load = os.getloadavg()[0]
    if load > 0.5:
        progress(f"note: the load of this machine was {load:.1f} before the start; it should be idle")


@contextmanager
def stage(options: Options, *, data_bytes: int = 0) -> Iterator[Stage]:
    """Pins the rank, borrows one core and puts the bare partner there too.

    BenchError where no core can be borrowed: there is nothing to measure then.
    """
    check_quiet(options.progress)
    with environment.pinned(options.core) as cores:
        # Forked before the executor: its connections are not the partner's to inherit.
        with raw.Partner(data_bytes=data_bytes) as partner, Executor(workers=1, transport=options.transport) as executor:
            worker_pid = executor.submit(os.getpid).result()
            if worker_pid == os.getpid():
                raise BenchError("no core could be borrowed, so every invocation would run on the rank",
                                 hint="`rfaas doctor` says why")
            worker_cores = tuple(sorted(executor.submit(os.sched_getaffinity, 0).result()))
            if cores.rank in worker_cores:
                raise BenchError(f"the worker shares core {cores.rank} with the rank", hint="`rfaas doctor` says why")
            os.sched_setaffinity(partner.pid, set(worker_cores))
            spin_s = Settings.load(transport=options.transport).spin_us * 1e-6
            yield Stage(options, executor, partner, cores.rank, worker_cores, worker_pid, spin_s)


def timed_each(call: Callable[[], object]) -> Callable[[int], list[int]]:
    """singles(n) for something that is called from Python."""
    clock = time.perf_counter_ns

    def singles(count: int) -> list[int]:
        times = []
        for _ in range(count):
            start = clock()
            call()
            times.append(clock() - start)
        return times
    return singles

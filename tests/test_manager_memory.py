"""A manager's memory is bounded by what lives, not by what it has ever granted.

    RFAAS_SOAK_LEASES=1000000 RFAAS_SOAK_JSON=FILE … -s      # prints what was counted, and writes it down
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

from rfaas_mpi.leases import Demand, Grant, LiveLease, NodeReport, Tick
from rfaas_mpi.manager.accounts import KernelUse
from rfaas_mpi.manager.ledger import Ledger, Usage
from rfaas_mpi.manager.registry import Registry
from rfaas_mpi.placement import Placer

LEASES = int(os.environ.get("RFAAS_SOAK_LEASES", "2000"))
MOST = 200                       # ended leases that are remembered
NODES = 8
GROUP = 100
STEP_S = 0.5                     # one lease after another: those of two minutes are always remembered
KEEP_S = 86_400.0                # so long the ledger has them, in the time that the leases take
SAMPLES = 20
GIB = 1 << 30


class Life:
    """A registry and its ledger, in which leases come and go."""

    def __init__(self, directory: Path) -> None:
        self.now = 0.0
        self.requests = 0
        self.path = directory / "ledger.db"
        began = time.time()
        self.ledger = Ledger(self.path, monotonic=lambda: self.now, wall=lambda: began + self.now,
                             keep_ended_s=KEEP_S)
        self.registry = Registry(self.ledger, Placer(), 0.0, remember_most=MOST)
        for number in range(NODES):
            self.report(f"n{number}")

    def report(self, node: str, *live: LiveLease) -> None:
        self.now += STEP_S / 4
        self.registry.handle(NodeReport(
            node=node, spare=tuple(range(16)), memory_bytes=GIB, incarnation=1, clock_ns=int(self.now * 1e9),
            live=live), self.now)

    def leases(self, count: int) -> None:
        for _ in range(count):
            self.requests += 1
            self.now += STEP_S / 2
            (*_, answer) = self.registry.book.handle(Demand(
                session=self.requests // 4, request_id=self.requests, uid=1000, workers_min=1, workers_max=2), self.now)
            assert isinstance(answer, Grant)
            for lease in answer.leases:
                self.report(lease.node, LiveLease(lease.id, lease.epoch, lease.workers))
                self.registry.used(Usage(
                    node=lease.node, incarnation=1, number=lease.id, lease=lease.id, uid=1000, seat=worker.number,
                    cores=1, memory_bytes=GIB, held_s=STEP_S / 4, cpu_s=STEP_S / 8, exec_s=STEP_S / 8, invocations=3,
                    kernels=(KernelUse(f"kernel{lease.id % 7}", STEP_S / 8, 3),)) for worker in lease.workers)
                self.report(lease.node)
            if self.requests % GROUP == 0:
                self.registry.handle(Tick(), self.now)
                self.registry.flush()
        assert self.registry.book.leases == []


def blocks() -> int:
    """Pieces of memory that Python holds."""
    gc.collect()
    return sys.getallocatedblocks()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_four_times_as_many_leases_need_no_more_memory(tmp_path: Path) -> None:
    life = Life(tmp_path)
    began = time.monotonic()
    samples: list[dict[str, float]] = []
    for number in range(1, SAMPLES + 1):
        life.leases(LEASES * number // SAMPLES - life.requests)
        samples.append({"leases": life.requests, "seconds": round(time.monotonic() - began, 1), "pieces": blocks(),
                        "resident_bytes": resident_bytes(), "ledger_bytes": life.path.stat().st_size})
        print(" ".join(f"{name}={value}" for name, value in samples[-1].items()), flush=True)
        if (out := os.environ.get("RFAAS_SOAK_JSON")) is not None:
            Path(out).write_text(json.dumps({"asked_for": LEASES, "samples": samples}, indent=1) + "\n")
    life.ledger.close()
    # One that is kept has more than ten.
    assert samples[-1]["pieces"] - samples[SAMPLES // 4 - 1]["pieces"] < LEASES


def test_what_is_forgotten_is_in_the_ledger(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.leases(2 * MOST + 400)
    assert life.registry.book.lease(life.registry.book.epoch - 2 * MOST - 350) is None
    kept = len(life.ledger.load(remember_s=1e6).leases)
    life.ledger.close()
    assert kept >= 2 * MOST + 400

"""A manager's memory is bounded by what lives, not by what it has ever granted.

    RFAAS_SOAK_LEASES=1000000 … -s        # prints what was counted
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

from rfaas_mpi.leases import Demand, Grant, LiveLease, NodeReport, Tick
from rfaas_mpi.manager.ledger import Ledger
from rfaas_mpi.manager.registry import Registry
from rfaas_mpi.placement import Placer

LEASES = int(os.environ.get("RFAAS_SOAK_LEASES", "2000"))
MOST = 200                       # ended leases that are remembered
NODES = 8
GROUP = 100
STEP_S = 0.5                     # one lease after another: those of two minutes are always remembered
GIB = 1 << 30


class Life:
    """A registry and its ledger, in which leases come and go."""

    def __init__(self, directory: Path) -> None:
        self.now = 0.0
        self.requests = 0
        self.ledger = Ledger(directory / "ledger.db")
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
                self.report(lease.node)
            if self.requests % GROUP == 0:
                self.registry.handle(Tick(), self.now)
                self.registry.flush()
        assert self.registry.book.leases == []


def blocks() -> int:
    """Pieces of memory that Python holds."""
    gc.collect()
    return sys.getallocatedblocks()


def test_four_times_as_many_leases_need_no_more_memory(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.leases(LEASES // 4)
    before = blocks()
    life.leases(LEASES - LEASES // 4)
    after = blocks()
    life.ledger.close()
    print(f"{LEASES // 4} leases: {before} pieces of memory, {LEASES}: {after}")
    # One that is kept has more than ten.
    assert after - before < LEASES


def test_what_is_forgotten_is_in_the_ledger(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.leases(2 * MOST + 400)
    assert life.registry.book.lease(life.registry.book.epoch - 2 * MOST - 350) is None
    kept = len(life.ledger.load(remember_s=1e6).leases)
    life.ledger.close()
    assert kept >= 2 * MOST + 400

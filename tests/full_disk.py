"""Run in a mount namespace: a manager whose file lies on a small tmpfs (argument 1) that fills up."""

from __future__ import annotations

import sys
from pathlib import Path

from rfaas_mpi.errors import StoreError
from rfaas_mpi.leases import Demand, Grant, NodeReport
from rfaas_mpi.manager.ledger import Ledger
from rfaas_mpi.manager.registry import Registry
from rfaas_mpi.placement import pick_cores

directory = Path(sys.argv[1])
ledger = Ledger(directory / "ledger.db")
registry = Registry(ledger, pick_cores, 0.0)
registry.handle(NodeReport(node="n0", spare=tuple(range(4096)), memory_bytes=0, incarnation=1, clock_ns=1,
                           live=()), 0.0)
registry.flush()

told: set[int] = set()


def ask(number: int) -> None:
    """One demand; its leases are told once they are written down."""
    registry.handle(Demand(session=7, request_id=number, uid=1000, workers_min=1, workers_max=1), 1.0)
    for action in registry.flush():
        assert isinstance(action, Grant)
        told.update(lease.id for lease in action.leases)


# Something else takes all the room that there is.
with open(directory / "other", "wb", buffering=0) as other:
    try:
        while True:
            other.write(bytes(4096))
    except OSError:
        pass
number = 0
try:
    while True:
        number += 1
        assert number < 4000, "the disk is never full"
        ask(number)
except StoreError as error:
    assert "make room on that disk" in str(error), error
before = len(told)
assert len(registry.book.leases) == before + 1, "the last grant was made and not told"

(directory / "other").unlink()
for more in range(20):
    ask(number + 1 + more)
assert len(told) == before + 21
ledger.close()

kept = Ledger(directory / "ledger.db").load()
assert {lease.id for lease in kept.leases} == told
print(f"full after {before} grants")
print("every grant is there")

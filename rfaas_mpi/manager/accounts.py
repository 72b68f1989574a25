"""What workers used, as the accounts keep it, and what that costs. Pure.

    agent's line ──▶ believable ──▶ Usage, kept ──▶ sums ──▶ Prices.cost
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from rfaas_mpi.api import OTHERS

__all__ = ["KERNELS_MAX", "OTHERS", "RECORD", "KernelUse", "Prices", "Usage", "believable", "by_kernel"]

KERNELS_MAX = 1000               # names of one user that are kept apart
RECORD = 0                       # the number of what the manager knows of a seat itself

INVOCATIONS_MAX = 2**63 - 1
GIB = 1 << 30


class KernelUse(msgspec.Struct, frozen=True):
    """How often a worker ran a kernel, and for how long in all."""

    kernel: str
    exec_s: float
    invocations: int


class Usage(msgspec.Struct, frozen=True):
    """What one worker has used so far: cumulative, so that the latest is all there is to know.

    `(node, incarnation, lease, seat, number)` names the worker: it counts once, however often it is told of.
    Number RECORD is no worker: it says for how long the seat was held as far as the manager knows, and counts
    where the workers that sat there account for less.
    """

    node: str
    incarnation: int
    number: int
    lease: int
    uid: int
    cores: int
    memory_bytes: int
    held_s: float
    cpu_s: float
    exec_s: float = 0.0
    poll_s: float = 0.0
    invocations: int = 0
    seat: int = 0
    kernels: tuple[KernelUse, ...] = ()


class Prices(msgspec.Struct, frozen=True):
    """What an hour costs; 0: nothing.

    `core_h`: of a core that was held, used or not. `gib_h`: the same of a GiB of memory. `compute_h`: of CPU time
    that kernels took. `poll_h`: of CPU time in which a worker looked for its next call (hot).
    """

    core_h: float = 0.0
    gib_h: float = 0.0
    compute_h: float = 0.0
    poll_h: float = 0.0

    def cost(self, used: Mapping[str, Any]) -> float:
        """What these sums cost, in the unit of the prices: C = Ca·ta·M + Cc·tc + Ch·th.

        The model is rFaaS' (Copik et al., "rFaaS: Enabling High Performance Serverless with RDMA and Leases", IPDPS
        2023). ta·M is what was held for how long: `core_s` core-seconds and `memory_byte_s` byte-seconds, each with
        its price. th is `poll_s`, tc what else there is of `cpu_s`, both seconds of CPU time.
        """
        return (self.core_h * used["core_s"] + self.gib_h * used["memory_byte_s"] / GIB
                + self.compute_h * (used["cpu_s"] - used["poll_s"]) + self.poll_h * used["poll_s"]) / 3600.0


def believable(used: Usage, known: Collection[str], *, most: int = KERNELS_MAX) -> Usage:
    """The same without what can't be: a worker's page is its user's to write, and so are kernels' names.

    Polling is a part of CPU time; kernels ran no longer than the worker was there, and all of them together as long
    as it says. A name that isn't in `known` goes to OTHERS once there are `most` of them.
    """
    exec_s = min(used.exec_s, used.held_s)
    ran: dict[str, tuple[float, int]] = {}
    names = set(known)
    left = exec_s
    for one in used.kernels:
        name = one.kernel if one.kernel in names or len(names) < most else OTHERS
        names.add(name)
        seconds, invocations = ran.get(name, (0.0, 0))
        share = min(one.exec_s, left)
        left -= share
        # No database's integer is larger.
        ran[name] = seconds + share, min(invocations + one.invocations, INVOCATIONS_MAX)
    return msgspec.structs.replace(
        used, exec_s=exec_s, poll_s=min(used.poll_s, used.cpu_s),
        kernels=tuple(KernelUse(name, seconds, invocations) for name, (seconds, invocations) in ran.items()))


def by_kernel(rows: Sequence[dict[str, Any]], total: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Sums by kernel that add up to `total` (None: nothing was used): what no kernel took is the row of the name ""."""
    if total is None:
        return []
    rest = {name: max(0, value - sum(row[name] for row in rows)) for name, value in total.items()
            if name not in ("uid", "workers")}
    return [{"kernel": "", "workers": total["workers"], **rest}, *rows]

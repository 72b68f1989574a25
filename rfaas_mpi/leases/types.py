"""Facts, events and actions of the lease book.

Events go into `LeaseBook.handle`, actions come out of it; both are frozen and
msgspec can write and read them, so that a trace of a cluster can be replayed.
Times are seconds on the caller's monotonic clock.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec

__all__ = [
    "Action", "Activated", "Cause", "Demand", "Event", "Grant", "GrantedWorker",
    "Lease", "LeaseState", "NodeLost", "NodeReport", "NodeView", "Notify", "Refuse",
    "Release", "Revoke", "SessionEnded", "StopWorkers", "Store", "Tick",
    "WorkersStopped",
]


class LeaseState(StrEnum):
    """Where a lease stands; the last three are ends and are never left."""

    REQUESTED = "requested"
    GRANTED = "granted"
    ACTIVE = "active"
    REVOKING = "revoking"
    RELEASED = "released"
    EXPIRED = "expired"
    LOST = "lost"

    @property
    def live(self) -> bool:
        """True while the lease holds its cores."""
        return self in (LeaseState.GRANTED, LeaseState.ACTIVE, LeaseState.REVOKING)


class Cause(StrEnum):
    """Why workers stop. All of them are infrastructure (re-issue elsewhere)."""

    RELEASED = "released"            # the rank gave the lease back
    SESSION_ENDED = "session-ended"  # the rank closed its executor or died
    REVOKED = "revoked"              # the owner of the cores wants them
    EXPIRED = "expired"              # hard end, or never activated
    NODE_LOST = "node-lost"          # the agent was declared dead


# --- facts ------------------------------------------------------------------

class GrantedWorker(msgspec.Struct, frozen=True):
    """One worker of a lease: its number (0, 1, … in the lease) and its cores."""

    number: int
    cores: tuple[int, ...]


class Lease(msgspec.Struct, frozen=True):
    """What was granted on one node, as it stands now.

    `id` is never used again, not even by a later book that starts from the
    stored epoch. `workers` are those that still hold cores; `stopping` are the
    numbers of those among them that were told to stop.
    """

    id: int
    epoch: int
    node: str
    session: int
    uid: int
    request_id: int
    workers: tuple[GrantedWorker, ...]
    memory_per_worker: int
    hard_end: float | None = None
    state: LeaseState = LeaseState.GRANTED
    stopping: tuple[int, ...] = ()
    cause: Cause | None = None

    @property
    def cores(self) -> tuple[int, ...]:
        """Every core that the lease holds now, in order of its workers."""
        return tuple(core for worker in self.workers for core in worker.cores)

    @property
    def memory_bytes(self) -> int:
        """Memory that the lease holds now."""
        return self.memory_per_worker * len(self.workers)


class NodeView(msgspec.Struct, frozen=True):
    """A node as the book sees it: for status pages and reports."""

    node: str
    spare: tuple[int, ...]         # as last reported, lent ones included
    lent: tuple[int, ...]          # held by live leases
    free: tuple[int, ...]          # would be granted now, in this order
    memory_bytes: int              # lendable, as last reported
    memory_free: int


# --- events -----------------------------------------------------------------

class Demand(msgspec.Struct, frozen=True, tag=True):
    """A session asks for workers; answered by exactly one Grant or Refuse.

    `(session, request_id)` names the demand: the same one again gets the same
    answer. `duration_s` bounds the leases' life, None leaves it to the node.
    """

    session: int
    request_id: int
    uid: int
    workers_min: int
    workers_max: int
    cores_per_worker: int = 1
    memory_per_worker: int = 0
    duration_s: float | None = None


class NodeReport(msgspec.Struct, frozen=True, tag=True):
    """What an agent lends: every core that may be lent, lent ones included.

    A lent core that is missing from `spare` is wanted back: its worker is
    revoked. `busy` says on which cores workers of ours run now and for which
    lease: a core that is busy for no live lease of this book isn't granted until
    a later report leaves it out, and if the book ended that lease itself, it
    says again that its workers must stop. `hard_end` is the end of the node's
    idle window, for leases granted from now on.
    """

    node: str
    spare: tuple[int, ...]         # in the order in which to lend them
    memory_bytes: int              # lendable in all, lent memory included
    numa: dict[int, int] = {}      # core → NUMA node; a missing core is on 0
    busy: dict[int, int] = {}      # core → lease id
    hard_end: float | None = None
    grace_s: float = 0.0           # for workers whose cores are wanted back
    lends_to_uid: int | None = None  # the only user it lends to; None: to all


class Activated(msgspec.Struct, frozen=True, tag=True):
    """The lease's workers are up and its rank was told."""

    lease_id: int


class Revoke(msgspec.Struct, frozen=True, tag=True):
    """Take workers of a lease back (all of them if `workers` is empty)."""

    lease_id: int
    workers: tuple[int, ...] = ()
    grace_s: float = 0.0


class Release(msgspec.Struct, frozen=True, tag=True):
    """The session gives a lease back."""

    session: int
    lease_id: int


class SessionEnded(msgspec.Struct, frozen=True, tag=True):
    """The rank's connection ended: everything it holds is released."""

    session: int


class WorkersStopped(msgspec.Struct, frozen=True, tag=True):
    """Nothing of these workers can run any more (all if `workers` is empty).

    Frees their cores. Also right for a worker that ended by itself and won't be
    started again.
    """

    lease_id: int
    workers: tuple[int, ...] = ()


class NodeLost(msgspec.Struct, frozen=True, tag=True):
    """The agent was declared dead; its node comes back with its next report."""

    node: str


class Tick(msgspec.Struct, frozen=True, tag=True):
    """Time passed: look for leases whose end has come (see `next_deadline`)."""


Event: TypeAlias = (Demand | NodeReport | Activated | Revoke | Release
                    | SessionEnded | WorkersStopped | NodeLost | Tick)


# --- actions ----------------------------------------------------------------

class Store(msgspec.Struct, frozen=True, tag=True):
    """Make `epoch` durable before doing any action behind this one."""

    epoch: int


class Grant(msgspec.Struct, frozen=True, tag=True):
    """The answer to a demand: its leases, perhaps none where `workers_min` is 0.

    `reason` is empty where all of `workers_max` was granted, else it says in one
    line with both numbers why not.
    """

    session: int
    request_id: int
    leases: tuple[Lease, ...]
    reason: str = ""

    @property
    def workers(self) -> int:
        """How many workers all the leases have together."""
        return sum(len(lease.workers) for lease in self.leases)


class Refuse(msgspec.Struct, frozen=True, tag=True):
    """The answer to a demand of which not even `workers_min` can be met.

    `asked` and `available` count workers; `reason` names both and what runs out.
    """

    session: int
    request_id: int
    reason: str
    asked: int
    available: int


class StopWorkers(msgspec.Struct, frozen=True, tag=True):
    """Agent: stop these workers (all if empty), at the latest `grace_s` from now.

    Answer with WorkersStopped once nothing of them can run any more: only that
    frees the cores.
    """

    node: str
    lease_id: int
    workers: tuple[int, ...]
    cause: Cause
    grace_s: float = 0.0


class Notify(msgspec.Struct, frozen=True, tag=True):
    """Tell the session that these workers of a lease end, and why."""

    session: int
    lease_id: int
    workers: tuple[int, ...]
    cause: Cause
    grace_s: float = 0.0


Action: TypeAlias = Store | Grant | Refuse | StopWorkers | Notify

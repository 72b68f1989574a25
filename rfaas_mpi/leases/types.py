"""Facts, events and actions of the lease book.

Events go into `LeaseBook.handle`, actions come out of it; both are frozen and
msgspec can write and read them, so that a trace of a cluster can be replayed.
Times are seconds on the caller's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TypeAlias

import msgspec

from rfaas_mpi.messages import RankAt

__all__ = [
    "Action", "Activated", "Admit", "AgentStarted", "Answered", "Cause", "Changes",
    "Demand", "Event", "Grant", "GrantedWorker", "Kept", "Lease", "LeaseState",
    "LiveLease", "NodeDrained", "NodeLost", "NodeReport", "NodeSilent", "NodeTraits",
    "NodeUndrained", "NodeView", "Notify", "RankAt", "Refuse", "Release", "Revoke", "SessionEnded", "StopWorkers",
    "Store", "Superseded", "Tick", "WorkersStopped",
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

class GrantedWorker(msgspec.Struct, frozen=True, gc=False):
    """One worker of a lease: its number (0, 1, … in the lease) and its cores."""

    number: int
    cores: tuple[int, ...]


class Lease(msgspec.Struct, frozen=True, gc=False):
    """What was granted on one node, as it stands now.

    `id` is never used again, not even by a later book that starts from the
    stored epoch. `workers` are those that still hold cores; `stopping` are the
    numbers of those among them that were told to stop.

    `incarnation` is the agent that the grant is for, 0 where agents aren't told
    apart. The other two times are on that agent's clock: it must not begin the
    lease after `not_after_ns`, and first reported it as begun at `seen_ns` (0: it
    has not, as far as the book knows).
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
    stop_by: float | None = None     # when the last of those has to be gone
    cause: Cause | None = None
    incarnation: int = 0
    not_after_ns: int = 0
    seen_ns: int = 0

    @property
    def cores(self) -> tuple[int, ...]:
        """Every core that the lease holds now, in order of its workers."""
        workers = self.workers
        if len(workers) == 1:
            return workers[0].cores
        return tuple([core for worker in workers for core in worker.cores])

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
    silent: bool = False           # nothing is granted there until it reports
    drained: bool = False          # nor there, until it is undrained


class LiveLease(msgspec.Struct, frozen=True, gc=False):
    """A lease that an agent has begun: the workers whose cores are not free yet.

    All of its workers from the moment in which the agent accepts the grant, and
    each until nothing of it can run any more.
    """

    lease_id: int
    epoch: int
    workers: tuple[GrantedWorker, ...]


class NodeTraits(msgspec.Struct, frozen=True):
    """What else an agent knows of its node, for who chooses nodes: the book only hands it on.

    What is left out counts neither for nor against the node. `physical` and
    `numa` count like the kernel; `busy` are cores on which owners' work runs.
    """

    host: str = ""
    since: float | None = None               # begin of its idle window
    classes: dict[int, str] = {}             # core → whose it is, in the detector's words
    physical: dict[int, int] = {}            # core → physical core; a missing one is its own
    busy: tuple[int, ...] = ()
    cpu_type: str = ""
    partition: str = ""
    switches: tuple[str, ...] = ()           # from its leaf switch up
    nic_numa: int | None = None              # the NUMA node that its network card is on
    network_load: float = 0.0                # share of its link that is in use, 0 … 1
    memory_pressure: dict[int, float] | None = None  # NUMA node → share of its bandwidth in use
    speed: float = 1.0                       # a kernel takes 1/speed of its time elsewhere


# --- events -----------------------------------------------------------------

class Demand(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A session asks for workers; answered by exactly one Grant or Refuse.

    `(session, request_id)` names the demand: the same one again gets the same
    answer. `duration_s` bounds the leases' life, None leaves it to the node; a
    node that is known to be wanted back within `least_s` isn't taken.
    `place` says where its ranks run (and `others` where further ones do), `bytes_per_s`
    what a worker exchanges with one: these only count where who chooses nodes looks at them.
    `memory_per_worker` None is a fair share of what the node lends, by cores.
    With `waits` a demand that can't be met has no answer yet (and none is kept):
    hand it in again when something may have become free.
    """

    session: int
    request_id: int
    uid: int
    workers_min: int
    workers_max: int
    cores_per_worker: int = 1
    memory_per_worker: int | None = 0
    duration_s: float | None = None
    waits: bool = False
    least_s: float = 0.0
    place: RankAt | None = None
    bytes_per_s: float | None = None
    others: tuple[RankAt, ...] = ()


class AgentStarted(msgspec.Struct, frozen=True, tag=True):
    """An agent begins; answered by Admit. `agent` is a name that no other has had.

    Changes nothing about the node: only the new agent's first report does.
    """

    node: str
    agent: str


class NodeReport(msgspec.Struct, frozen=True, tag=True):
    """What an agent lends: every core that may be lent, lent ones included.

    A lent core that is missing from `spare` is wanted back: its worker is
    revoked. `busy` says on which cores workers of ours run now and for which
    lease: a core that is busy for no live lease of this book isn't granted until
    a later report leaves it out, and if the book ended that lease itself, it
    says again that its workers must stop. `hard_end` is the end of the node's
    idle window, for leases granted from now on.

    Where reports may be lost, doubled or overtaken, they carry the `incarnation`
    that Admit gave to the agent and its clock, which rises from one to the next:
    an older report changes nothing. `live` then says which leases it has begun,
    and stands for Activated and WorkersStopped: a lease that was there and isn't
    any more has ended, and so have all of an earlier incarnation. One that began
    and ended between two reports, or that the agent will never begin, is in `over`.
    """

    node: str
    spare: tuple[int, ...]         # in the order in which to lend them
    memory_bytes: int              # lendable in all, lent memory included
    numa: dict[int, int] = {}      # core → NUMA node; a missing core is on 0
    busy: dict[int, int] = {}      # core → lease id
    hard_end: float | None = None
    grace_s: float = 0.0           # for workers whose cores are wanted back
    lends_to_uid: int | None = None  # the only user it lends to; None: to all
    incarnation: int = 0
    clock_ns: int = 0
    live: tuple[LiveLease, ...] | None = None
    over: tuple[int, ...] = ()
    traits: NodeTraits = NodeTraits()


class Activated(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The lease's workers are up and its rank was told."""

    lease_id: int


class Revoke(msgspec.Struct, frozen=True, tag=True):
    """Take workers of a lease back (all of them if `workers` is empty)."""

    lease_id: int
    workers: tuple[int, ...] = ()
    grace_s: float = 0.0


class Release(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The session gives a lease back."""

    session: int
    lease_id: int


class SessionEnded(msgspec.Struct, frozen=True, tag=True):
    """The rank's connection ended: everything it holds is released."""

    session: int


class WorkersStopped(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Nothing of these workers can run any more (all if `workers` is empty).

    Frees their cores. Also right for a worker that ended by itself and won't be
    started again.
    """

    lease_id: int
    workers: tuple[int, ...] = ()


class NodeSilent(msgspec.Struct, frozen=True, tag=True):
    """The agent missed its heartbeats: its leases live on, nothing more is granted."""

    node: str


class NodeLost(msgspec.Struct, frozen=True, tag=True):
    """The agent was declared dead; its node comes back with its next report."""

    node: str


class NodeDrained(msgspec.Struct, frozen=True, tag=True):
    """Take back what is lent on a node, and lend nothing there until NodeUndrained."""

    node: str
    grace_s: float = 0.0


class NodeUndrained(msgspec.Struct, frozen=True, tag=True):
    """A drained node may lend again."""

    node: str


class Tick(msgspec.Struct, frozen=True, tag=True):
    """Time passed: look for leases whose end has come (see `next_deadline`)."""


Event: TypeAlias = (Demand | AgentStarted | NodeReport | Activated | Revoke | Release
                    | SessionEnded | WorkersStopped | NodeSilent | NodeLost
                    | NodeDrained | NodeUndrained | Tick)


# --- actions ----------------------------------------------------------------

class Store(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Make `epoch` durable before doing any action behind this one."""

    epoch: int


class Grant(msgspec.Struct, frozen=True, tag=True, gc=False):
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


class StopWorkers(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Agent: stop these workers (all if empty), at the latest `grace_s` from now.

    Answer with WorkersStopped once nothing of them can run any more: only that
    frees the cores.
    """

    node: str
    lease_id: int
    workers: tuple[int, ...]
    cause: Cause
    grace_s: float = 0.0


class Notify(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Tell the session that these workers of a lease end, and why."""

    session: int
    lease_id: int
    workers: tuple[int, ...]
    cause: Cause
    grace_s: float = 0.0


class Admit(msgspec.Struct, frozen=True, tag=True):
    """The answer to AgentStarted: the number for its reports, above all before it."""

    node: str
    agent: str
    incarnation: int


class Superseded(msgspec.Struct, frozen=True, tag=True):
    """The answer to a report of an agent after which another one took its node over."""

    node: str
    incarnation: int


Action: TypeAlias = (Store | Grant | Refuse | StopWorkers | Notify | Admit
                     | Superseded)


# --- what outlives the book -------------------------------------------------

class Answered(msgspec.Struct, frozen=True, gc=False):
    """A demand and the grant that it got."""

    demand: Demand
    grant: Grant


class Changes(msgspec.Struct, frozen=True):
    """What became different since the last call of `LeaseBook.changes`, as it is now.

    An answer that gave nothing is not among them: after a restart it is found anew.
    """

    epoch: int
    leases: tuple[Lease, ...] = ()         # ended ones, too
    answers: tuple[Answered, ...] = ()
    closed: tuple[int, ...] = ()           # sessions that ended
    drained: dict[str, bool] = {}          # node → it is

    def __bool__(self) -> bool:
        return bool(self.leases or self.answers or self.closed or self.drained)


class Kept(msgspec.Struct, frozen=True):
    """What an earlier book's changes add up to.

    `leases` are the live ones and those that ended not long ago.
    """

    leases: Sequence[Lease] = ()
    answers: Sequence[Answered] = ()
    closed: Sequence[int] = ()
    drained: Sequence[str] = ()

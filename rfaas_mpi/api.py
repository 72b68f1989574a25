"""What the manager's HTTP interface takes and says: types, routes, and the OpenAPI page made of them.

Bodies are JSON. An error is a Problem: 400 names the field that is wrong, 401 and
403 say who may, 404 and 409 what is not there or not now, 426 that caller and manager
are of versions that don't work together, 503 that nothing can be written down at the
moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rfaas_mpi._version import __version__
from rfaas_mpi.leases import Cause, GrantedWorker, LeaseState, LiveLease, NodeView

__all__ = ["ROUTES", "Route", "openapi"]

CORES_MAX = 4096
WORKERS_MAX = 100_000
KERNELS_MAX = 16                 # of one worker
OTHERS = "(others)"              # kernels that have no line of their own
KEY_BYTES = 32

Core = Annotated[int, Meta(ge=0, lt=1 << 20)]
Uid = Annotated[int, Meta(ge=0, lt=1 << 32)]
Size = Annotated[int, Meta(ge=0, lt=1 << 60)]
Number = Annotated[int, Meta(ge=1, lt=1 << 62)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Grace = Annotated[float, Meta(ge=0, le=86400)]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Node = Annotated[str, Meta(min_length=1, max_length=254, pattern="^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
# Those of a user's own agents end with his uid.
KnownNode = Annotated[str, Meta(min_length=1, max_length=270)]
BootId = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[A-Za-z0-9-]+$")]
NumaNode = Annotated[int, Meta(ge=0, lt=4096)]
Share = Annotated[float, Meta(ge=0, le=1)]
Switches = Annotated[tuple[Name, ...], Meta(max_length=8)]
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
# (A path may have blanks in it: TMPDIR's has where a user wants it so.)
Address = Annotated[str, Meta(max_length=280, pattern=r"^(tcp://[^/\s]+:[0-9]{1,5}|unix:/[^\x00-\x1f\x7f]+)$")]


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what callers send: an unknown field is an error."""


# --- agents -------------------------------------------------------------------

class StartAgent(Body, frozen=True):
    """An agent begins; `agent` is a name that no other has had. The same one again gets the same number.

    `key` is its public key (X25519) to which leases' secrets are sealed, `addresses` are
    where ranks dial it ("tcp://HOST:PORT", "unix:/path"), `host` is its host's name.
    """

    node: Node
    agent: Name
    boot_id: BootId
    key: Key
    addresses: Annotated[tuple[Address, ...], Meta(min_length=1, max_length=16)]
    host: Node


class Admitted(msgspec.Struct, frozen=True):
    """The number for this agent's reports, and the public keys (one or two) whose grants it believes."""

    node: str
    incarnation: int
    keys: tuple[bytes, ...] = ()


class KernelLine(Body, frozen=True):
    """How often a worker ran a kernel, and for how long in all."""

    kernel: Annotated[str, Meta(max_length=128)]
    exec_s: Seconds
    invocations: Size


class UsedLine(Body, frozen=True):
    """What one worker has used so far; a later line of the same worker takes its place.

    `number` is the worker's within the agent's `incarnation` (0: that of the report), `seat` its place in the lease.
    `kernels`: what it ran, those in which most time went; "(others)" are the rest.
    """

    number: Number
    lease: Number
    cores: Annotated[int, Meta(ge=1, le=CORES_MAX)]
    memory_bytes: Size
    held_s: Seconds
    cpu_s: Seconds
    exec_s: Seconds = 0.0
    poll_s: Seconds = 0.0
    invocations: Size = 0
    incarnation: Annotated[int, Meta(ge=0, lt=1 << 62)] = 0
    seat: Annotated[int, Meta(ge=0, lt=WORKERS_MAX)] = 0
    kernels: Annotated[tuple[KernelLine, ...], Meta(max_length=KERNELS_MAX)] = ()


class Traits(Body, frozen=True):
    """What else an agent knows of its node; what is left out counts neither for nor against it.

    `window_age_s`: for how long the node has been idle. `classes`: whose a spare core is.
    `physical`: core → physical core, where hardware threads share one. `busy`: cores on
    which owners' work runs. `switches`: from the leaf switch up. Shares are 0 to 1.
    """

    window_age_s: Seconds | None = None
    classes: Annotated[dict[Core, Literal["free", "specialised", "unused", "idle"]], Meta(max_length=CORES_MAX)] = {}
    physical: Annotated[dict[Core, Core], Meta(max_length=CORES_MAX)] = {}
    busy: Annotated[tuple[Core, ...], Meta(max_length=CORES_MAX)] = ()
    cpu_type: Annotated[str, Meta(max_length=128)] = ""
    partition: Annotated[str, Meta(max_length=128)] = ""
    switches: Switches = ()
    nic_numa: NumaNode | None = None
    network_load: Share = 0.0
    memory_pressure: Annotated[dict[NumaNode, Share], Meta(max_length=CORES_MAX)] | None = None
    speed: Annotated[float, Meta(ge=0.01, le=100)] = 1.0


class Report(Body, frozen=True):
    """All that an agent lends and runs now. Times: `clock_ns` is its own clock, `ends_in_s` from now.

    `over` are leases that it won't begin (again), though their grants aren't late yet.
    `owners`: core → the user of the batch job that it is of; only from the site's own agents.
    """

    incarnation: Number
    clock_ns: Number
    spare: Annotated[tuple[Core, ...], Meta(max_length=CORES_MAX)]
    memory_bytes: Size
    live: Annotated[tuple[LiveLease, ...], Meta(max_length=CORES_MAX)]
    over: Annotated[tuple[Number, ...], Meta(max_length=CORES_MAX)] = ()
    numa: dict[Core, NumaNode] = {}
    ends_in_s: Seconds | None = None
    grace_s: Grace = 0.0
    traits: Traits = Traits()
    owners: Annotated[dict[Core, Uid], Meta(max_length=CORES_MAX)] = {}
    used: Annotated[tuple[UsedLine, ...], Meta(max_length=10_000)] = ()


class StopOrder(msgspec.Struct, frozen=True):
    """Stop these workers of a lease (all if empty), at the latest `grace_s` from now."""

    lease_id: int
    workers: tuple[int, ...]
    cause: Cause
    grace_s: float


class Orders(msgspec.Struct, frozen=True):
    """What the agent has to do.

    `superseded`: another agent took the node over; end. `keys`: believe grants of these
    public keys from now on, and of no others (none: as before). `register`: this manager
    doesn't know the agent; register again, under the same name. `clock_ns` is that of
    the report which this answers, whose used lines are on disk; 0: it answers none.
    `lending`: the batch jobs on this node whose owners lend what they leave idle; None:
    nobody asks the batch system.
    """

    stop: tuple[StopOrder, ...] = ()
    superseded: bool = False
    keys: tuple[bytes, ...] = ()
    register: bool = False
    clock_ns: int = 0
    lending: tuple[str, ...] | None = None


# --- ranks --------------------------------------------------------------------

OTHER_PLACES_MAX = 1023          # besides the first one


class Place(Body, frozen=True):
    """Where ranks run: their node, the NUMA node that they are bound to, the switches above it, leaf first."""

    node: Annotated[str, Meta(min_length=1, max_length=254)]
    numa: NumaNode | None = None
    switches: Switches = ()
    ranks: Annotated[int, Meta(ge=1, le=1 << 20)] = 1


class AskLease(Body, frozen=True):
    """A rank wants workers; `(session, request_id)` names the request, which may be repeated.

    It waits for `timeout_s` at most, and no longer than its caller does: a request that is
    given up is taken back. `duration_s` bounds the leases' life; nodes that are known to be
    wanted back within `least_s` aren't taken. `place`: where the rank runs, so that workers
    come near it; `others`: the places of the other ranks of its communicator, where they are
    elsewhere. `bytes_per_s`: what a worker and its rank exchange, if that is known. `job`
    is the batch job that the accounts name.
    """

    session: Name
    request_id: Annotated[int, Meta(ge=0, lt=1 << 62)]
    workers_min: Annotated[int, Meta(ge=0, le=WORKERS_MAX)]
    workers_max: Annotated[int, Meta(ge=0, le=WORKERS_MAX)]
    cores_per_worker: Annotated[int, Meta(ge=1, le=CORES_MAX)] = 1
    memory_per_worker: Size | None = None
    timeout_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    duration_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    job: Annotated[str, Meta(max_length=64, pattern="^[A-Za-z0-9._+-]*$")] = ""
    least_s: Seconds = 0.0
    place: Place | None = None
    bytes_per_s: Annotated[float, Meta(ge=0, le=1e15)] | None = None
    others: Annotated[tuple[Place, ...], Meta(max_length=OTHER_PLACES_MAX)] = ()


class LentLease(msgspec.Struct, frozen=True):
    """A lease as its rank needs it.

    `grant` is signed for the agent on `host`, which listens at `addresses`; `secret` is what
    rank and agent prove to each other. `hard_end_in_s` counts from this answer.
    """

    id: int
    epoch: int
    node: str
    host: str
    workers: tuple[GrantedWorker, ...]
    memory_per_worker: int
    hard_end_in_s: float | None
    grant: bytes
    secret: bytes
    addresses: tuple[str, ...]

    def __repr__(self) -> str:
        # The secret stays out of text.
        return (f"LentLease(id={self.id}, epoch={self.epoch}, node={self.node!r}, host={self.host!r}, "
                f"workers={self.workers!r}, addresses={self.addresses!r})")


class LeaseGrant(msgspec.Struct, frozen=True):
    """What was granted; `reason` says why not all of `workers_max`. The same request again gets the same leases."""

    leases: tuple[LentLease, ...]
    reason: str = ""


class Terms(msgspec.Struct, frozen=True):
    """What the next worker on a node costs, in seconds of its time (docs/placement.md)."""

    total_s: float
    queueing_s: float
    transfer_s: float
    slowdown_s: float
    eviction_s: float
    fairness_s: float


class ExplainedNode(msgspec.Struct, frozen=True):
    """`chosen` workers would go there, `room` fit; `refused`: every reason against it, in words."""

    node: str
    chosen: int
    room: int
    refused: tuple[str, ...]
    terms: Terms | None


class Explanation(msgspec.Struct, frozen=True):
    """What a demand would get if it came now; nothing is granted."""

    policy: str
    granted: bool
    workers: int
    reason: str
    nodes: tuple[ExplainedNode, ...]


class RevokeLease(Body, frozen=True):
    grace_s: Grace = 0.0


class LeaseView(msgspec.Struct, frozen=True):
    """A lease as it stands: `workers` still hold cores, those in `stopping` were told to stop. Times: from now."""

    id: int
    epoch: int
    node: str
    host: str
    uid: int
    state: LeaseState
    workers: tuple[GrantedWorker, ...]
    stopping: tuple[int, ...]
    memory_per_worker: int
    hard_end_in_s: float | None = None
    stop_in_s: float | None = None
    cause: Cause | None = None


class Leases(msgspec.Struct, frozen=True):
    leases: tuple[LeaseView, ...]


class Done(msgspec.Struct, frozen=True):
    """It is on disk, and under way."""

    done: bool = True


# --- everybody and administrators -----------------------------------------------

class Nodes(msgspec.Struct, frozen=True):
    """`versions`: node → that of its agent, where it has said it."""

    nodes: tuple[NodeView, ...]
    versions: dict[str, str] = {}


class DrainNodes(Body, frozen=True):
    """No node named: all."""

    nodes: Annotated[tuple[KnownNode, ...], Meta(max_length=100_000)] = ()
    grace_s: Grace = 0.0


class UndrainNodes(Body, frozen=True):
    nodes: Annotated[tuple[KnownNode, ...], Meta(max_length=100_000)] = ()


class UsageSums(msgspec.Struct, frozen=True):
    """Sums of what workers have used; each row's `cost` is at the prices of today, which `prices` says, of an hour.

    Of the days (UTC) from `since` on and before `until`; both "": of all whose lines are kept, 30 days.
    """

    by: str
    rows: tuple[dict[str, Any], ...]
    prices: dict[str, float] = {}
    since: str = ""
    until: str = ""


class PolicyView(msgspec.Struct, frozen=True):
    """Who may do what, how nodes are chosen, and what holds for the caller: his quota of cores (None: none), weight."""

    lenders: tuple[int, ...]
    admins: tuple[int, ...]
    placement: str = "default"
    cores_max: int | None = None
    half_life_s: float = 86_400.0
    weight: float = 1.0


class Event(msgspec.Struct, frozen=True):
    """Workers of a lease end, and why; `number` rises, `at` is when, in seconds since 1970."""

    number: int
    at: float
    node: str
    uid: int
    lease_id: int
    workers: tuple[int, ...]
    cause: Cause
    grace_s: float


class Events(msgspec.Struct, frozen=True):
    """The caller's events after `after`, oldest first. Those before `first` are not kept any more.

    `more`: there are later ones, too; ask again after the last one. None says a manager that knows of `after` only.
    """

    first: int
    events: tuple[Event, ...]
    more: bool | None = None


class Challenge(msgspec.Struct, frozen=True):
    """What a caller over a network proves with his next request: good once, for a minute."""

    challenge: bytes
    means: tuple[str, ...]


class Problem(msgspec.Struct, frozen=True):
    """Why not, and what to do about it."""

    error: str
    hint: str = ""


# --- routes -------------------------------------------------------------------

@dataclass(frozen=True)
class Route:
    """One operation: `name` is the method of the server that does it."""

    method: str
    path: str
    name: str
    summary: str
    body: type[msgspec.Struct] | None
    answer: type[msgspec.Struct]
    query: tuple[tuple[str, Any], ...] = ()


_DAY = "A date (UTC) like 2026-11-01, or how long ago: P7D, P2W, P1M, P1Y"

ROUTES = (
    Route("POST", "/v1/agents", "start_agent", "An agent begins on a node", StartAgent, Admitted),
    Route("POST", "/v1/agents/{node}/reports", "report", "What an agent lends and runs", Report, Orders),
    Route("POST", "/v1/leases", "ask", "Ask for workers; answered when they are there or the time is over", AskLease,
          LeaseGrant),
    Route("POST", "/v1/explain", "explain", "What a demand would get now, and why, node by node; grants nothing", AskLease,
          Explanation),
    Route("GET", "/v1/leases", "leases", "The caller's live leases; an administrator's are all", None, Leases),
    Route("GET", "/v1/leases/{lease}", "lease", "One of the caller's leases, also one that ended not long ago", None,
          LeaseView),
    Route("DELETE", "/v1/leases/{lease}", "release", "Give a lease back", None, Done),
    Route("POST", "/v1/leases/{lease}/revoke", "revoke", "Take a lease back", RevokeLease, Done),
    Route("DELETE", "/v1/sessions/{session}", "end_session", "A rank ended, and with it all that it holds", None, Done),
    Route("GET", "/v1/nodes", "nodes", "Nodes that lend to the caller", None, Nodes),
    Route("POST", "/v1/drain", "drain", "Take back what is lent on nodes, and lend nothing there", DrainNodes, Done),
    Route("POST", "/v1/undrain", "undrain", "Let drained nodes lend again", UndrainNodes, Done),
    Route("GET", "/v1/usage", "usage", "Who used what: the caller; all, for an administrator", None, UsageSums,
          (("by", {"type": "string", "enum": ["uid", "job", "node", "kernel", "lease"], "default": "uid"}),
           ("since", {"type": "string", "description": _DAY}), ("until", {"type": "string", "description": _DAY}))),
    Route("GET", "/v1/policy", "policy", "Who may lend to all, and who administers", None, PolicyView),
    Route("GET", "/v1/events", "events", "What became of the caller's leases; of all, for an administrator", None,
          Events,
          (("after", {"type": "integer", "minimum": 0, "default": 0}), ("node", {"type": "string"}),
           ("lease", {"type": "integer", "minimum": 1}),
           ("since", {"type": "string", "description": f"{_DAY}, PT12H, PT30M"}))),
)

_PARAMETERS = {"node": {"type": "string"}, "lease": {"type": "integer", "minimum": 1}, "session": {"type": "string"}}


def openapi() -> dict[str, Any]:
    """The whole interface as an OpenAPI 3.1 document."""
    types = [kind for route in ROUTES for kind in (route.body, route.answer) if kind is not None]
    (*schemas, problem), components = msgspec.json.schema_components(
        [*types, Problem], ref_template="#/components/schemas/{name}")
    of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        operation: dict[str, Any] = {
            "operationId": route.name, "summary": route.summary,
            "parameters": [
                *({"name": name, "in": "path", "required": True, "schema": schema}
                  for name, schema in _PARAMETERS.items() if f"{{{name}}}" in route.path),
                *({"name": name, "in": "query", "schema": schema} for name, schema in route.query)],
            "responses": {"200": _content("Done", of[route.answer]), "default": _content("Why not", problem)}}
        if route.body is not None:
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": of[route.body]}}}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {"openapi": "3.1.0", "info": {"title": "rfaas_mpi resource manager", "version": __version__},
            "paths": paths, "components": {"schemas": components}}


def _content(what: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": what, "content": {"application/json": {"schema": schema}}}

"""What rank, service, zygote and worker say to each other: hello, frames, and their JSON bodies.

 hello (64 bytes, both ways)  then  frame, frame, …
 frame = body length u32 · type u16 · descriptors u16 · cookie u64 · body
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator
from itertools import zip_longest
from typing import Annotated, Any, NamedTuple, TypedDict, get_args

import msgspec

from rfaas_mpi import skew
from rfaas_mpi._version import __version__
from rfaas_mpi.errors import ServiceError
from rfaas_mpi.types import TcpOptions

MAGIC = b"RFAASMPI"
PROTOCOL = 1
HELLO = struct.Struct("<8sHHIQIi16sQQ")
FRAME = struct.Struct("<IHHQ")
MAX_BODY = 64 << 20
GRACE_MAX_S = 86400.0
PROOF_BYTES = 32
PROOF_ANSWER = struct.Struct("<i32s")
GRANT_LENGTH = struct.Struct("<I")
GRANT_BYTES_MAX = 64 << 10           # nobody has proved anything yet when it is read

KIND_SESSION = 1
KIND_WORKER = 2
KIND_DATA = 3
KIND_LEASE = 4
KINDS = (KIND_SESSION, KIND_WORKER, KIND_DATA, KIND_LEASE)

HELLO_OK = 0
HELLO_BAD_MAGIC = -1
HELLO_PROTOCOL = -2
HELLO_VERSION = -3
HELLO_UNKNOWN = -4
HELLO_CLOSING = -5
HELLO_REFUSED = -6

HELLO_TEXT = {
    HELLO_BAD_MAGIC: "the other side does not speak this protocol",
    HELLO_PROTOCOL: "rank and service speak different protocol versions",
    HELLO_VERSION: "rank and service run different package versions",
    HELLO_UNKNOWN: "no such lease or worker",
    HELLO_CLOSING: "the service is shutting down",
    HELLO_REFUSED: "refused",
}

FRAME_ADOPT = 40
FRAME_QUIT = 41
FRAME_READY = 48
FRAME_LIMITS = 49
FRAME_GONE = 50
FRAME_JSON = 64

ADOPT_BODY = struct.Struct("<QII")
GONE_BODY = struct.Struct("<II")


def version_number(version: str = __version__) -> int:
    """`major<<16 | minor<<8 | patch`, as the hello carries it."""
    return skew.number(version)


class Hello(NamedTuple):
    """The first 64 bytes of every connection, and of the answer to it."""

    magic: bytes
    protocol: int
    kind: int
    version: int
    lease: int
    worker: int
    status: int
    nonce: bytes
    session: int                     # which session dials (0: none); only tells whom to tell
    data: int = 0                    # kind 2: so many data connections follow (0 or 1)

    def pack(self) -> bytes:
        return HELLO.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Hello:
        return cls(*HELLO.unpack(data))

    @classmethod
    def make(cls, kind: int, nonce: bytes, *, lease: int = 0, worker: int = 0, status: int = 0,
             session: int = 0, data: int = 0) -> Hello:
        return cls(MAGIC, PROTOCOL, kind, version_number(), lease, worker, status, nonce, session, data)

    @classmethod
    def make_data(cls, nonce: bytes, pairing: bytes, *, lease: int, worker: int) -> Hello:
        """The hello of the data connection that belongs to the control connection which was answered with `pairing`."""
        return cls.make(KIND_DATA, nonce, lease=lease, worker=worker)._replace(
            **dict(zip(("session", "data"), _PAIRING.unpack(pairing), strict=True)))

    @property
    def pairing(self) -> bytes:
        """Kind 3: the nonce with which the service answered the control connection's hello."""
        return _PAIRING.pack(self.session, self.data)

    def problem(self) -> int:
        """0, or the status with which to refuse it."""
        if self.magic != MAGIC:
            return HELLO_BAD_MAGIC
        if self.protocol != PROTOCOL:
            return HELLO_PROTOCOL
        if not skew.near(self.version, version_number()):
            return HELLO_VERSION
        if self.kind not in KINDS or (self.kind == KIND_WORKER and self.data > 1):
            return HELLO_REFUSED
        return HELLO_OK


_PAIRING = struct.Struct("<QQ")

# Who proves what: no proof of one kind or side passes for another.
ROLE_RANK = b"rank"
ROLE_WORKER = b"worker"
ROLE_SESSION_RANK = b"session rank"
ROLE_SESSION_SERVICE = b"session service"
ROLE_DATA_RANK = b"data rank"
ROLE_DATA_WORKER = b"data worker"
ROLE_LEASE_RANK = b"lease rank"
ROLE_LEASE_AGENT = b"lease agent"
_HOLD = b"hold"


def proof(secret: bytes, role: bytes, rank_nonce: bytes, service_nonce: bytes, lease: int, worker: int) -> bytes:
    """32 bytes that only who knows the secret can make; `role` says which side makes it, and for what."""
    text = role + rank_nonce + service_nonce + struct.pack("<QI", lease, worker)
    return hmac.new(secret, text, hashlib.sha256).digest()


def same_proof(a: bytes, b: bytes) -> bool:
    return hmac.compare_digest(a, b)


def lease_secret(key: bytes, lease: int, epoch: int, rank_nonce: bytes, service_nonce: bytes) -> bytes:
    """The secret of a lease that a session over TCP was granted: each side makes it, so that it never travels."""
    text = b"lease" + struct.pack("<QQ", lease, epoch) + rank_nonce + service_nonce
    return hmac.new(key, text, hashlib.sha256).digest()


def lease_roles(grant: bytes) -> tuple[bytes, bytes]:
    """The roles of rank and agent at the begin of a lease's session: proofs are good for this grant only."""
    digest = hashlib.sha256(grant).digest()
    return ROLE_LEASE_RANK + digest, ROLE_LEASE_AGENT + digest


def hold_proof(secret: bytes, lease: int, session: int) -> bytes:
    """What a session shows that wants to keep a lease, too: it is good for that session only."""
    return proof(secret, _HOLD, struct.pack("<Q", session), b"", lease, 0)


class Frame(NamedTuple):
    type: int
    descriptors: int
    cookie: int
    body: bytes


def pack_frame(type: int, body: bytes = b"", *, descriptors: int = 0, cookie: int = 0) -> bytes:
    """A frame as bytes; ServiceError if the body is above 64 MiB."""
    if len(body) > MAX_BODY:
        raise ServiceError(f"a message of {len(body)} bytes is above the limit of {MAX_BODY}")
    return FRAME.pack(len(body), type, descriptors, cookie) + body


class FrameReader:
    """Makes frames of bytes as they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yields every frame that is complete now; ServiceError on a length above the limit."""
        self._buffer += data
        while len(self._buffer) >= FRAME.size:
            length, kind, descriptors, cookie = FRAME.unpack_from(self._buffer)
            if length > MAX_BODY:
                raise ServiceError(f"a frame announces {length} bytes, the limit is {MAX_BODY}")
            end = FRAME.size + length
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[FRAME.size:end])
            del self._buffer[:end]
            yield Frame(kind, descriptors, cookie, body)


# ---- facts both ends keep ----------------------------------------------------------------------

class WorkerInfo(msgspec.Struct, frozen=True):
    """One worker of a lease."""

    number: int
    cores: tuple[int, ...]


class GrantLease(msgspec.Struct, frozen=True):
    """A lease as its owner sees it. The secret is what a rank proves to know; it stays out of text."""

    id: int
    epoch: int
    secret: bytes
    workers: tuple[WorkerInfo, ...]
    memory_bytes: int                # of the whole lease
    hard_end: float | None = None    # CLOCK_MONOTONIC seconds of the lease's node; None: no end known
    endpoint: str = ""               # where its workers are dialled: tcp:// or unix:; "": at the session's service
    host: str = ""                   # its agent's, as the manager says; "": the service's
    addresses: tuple[str, ...] = ()  # where other ranks find that agent; none: at the endpoint
    ends_in_s: float | None = None   # until its hard end, as this is sent; None: no end known

    @property
    def memory_per_worker(self) -> int:
        return self.memory_bytes // max(1, len(self.workers))

    def __repr__(self) -> str:
        return (f"GrantLease(id={self.id}, epoch={self.epoch}, workers={self.workers!r}, "
                f"memory_bytes={self.memory_bytes}, hard_end={self.hard_end})")


class Grant(msgspec.Struct, frozen=True):
    """What a demand was filled with: one lease or several, none where `workers_min` was 0."""

    leases: tuple[GrantLease, ...]
    reason: str = ""                 # why fewer workers than workers_max, in one line

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        return tuple(worker for lease in self.leases for worker in lease.workers)


# ---- rank → service ----------------------------------------------------------------------------

class RankRequest(msgspec.Struct, frozen=True, tag_field="t"):
    """Base: `id` is chosen by the rank; the answer carries it."""

    id: int


class Join(RankRequest, frozen=True, tag="join"):
    """First message of a session: who this is and what a worker must look like."""

    pid: int
    executable: bytes
    flags: tuple[str, ...]
    path: tuple[bytes, ...]
    directory: bytes
    environment: tuple[tuple[bytes, bytes], ...]
    affinity: tuple[int, ...]
    lend: str = "auto"
    cores: tuple[int, ...] = ()      # lend exactly these
    observer: bool = False           # asks and commands only: no zygote, does not hold the service
    package: bytes = b""             # where the rank has rfaas_mpi from


class RankAt(msgspec.Struct, frozen=True):
    """Where ranks of a demand run: their node, the NUMA node that they are bound to, the switches above, leaf first."""

    node: str
    numa: int | None = None
    switches: tuple[str, ...] = ()
    ranks: int = 1


class LeaseRequest(RankRequest, frozen=True, tag="lease"):
    workers_min: int
    workers_max: int
    cores_per_worker: int
    memory_per_worker: int | None = None
    timeout_s: float = 0.0
    duration_s: float | None = None  # the leases end then, or earlier; None: when they are given back
    least_s: float = 0.0             # a node that is known to be wanted back sooner is no use
    place: RankAt | None = None
    bytes_per_s: float | None = None  # that a worker and its rank exchange, if the rank knows
    others: tuple[RankAt, ...] = ()  # where further ranks of the same communicator run


class Use(RankRequest, frozen=True, tag="use"):
    """Begins the lease that this session is about; in one that has begun already: says how it stands."""


class Hold(RankRequest, frozen=True, tag="hold"):
    """From now on this session keeps a lease besides those that do already. Each gives up its own part of it.

    The proof is `hold_proof`: of who has the lease's secret.
    """

    lease: int
    proof: bytes


class KillRequest(RankRequest, frozen=True, tag="kill"):
    lease: int
    worker: int
    reason: str                      # cancel · link: its connection ended, and it did not
    invocation: int = 0              # 0: whatever runs; else only if this one still runs


class ReleaseRequest(RankRequest, frozen=True, tag="release"):
    lease: int


class StatusRequest(RankRequest, frozen=True, tag="status"):
    pass


class StayRequest(RankRequest, frozen=True, tag="stay"):
    """The service stays until it is told to go down."""


class ListenRequest(RankRequest, frozen=True, tag="listen"):
    """The service listens on TCP too, from now on. Only from its own node."""

    addresses: tuple[str, ...]
    key_file: bytes = b""            # b"": `key` in the service's directory; made where there is none
    tcp: TcpOptions = TcpOptions()
    lend: str = "auto"               # what ranks of other nodes may be lent
    cores: tuple[int, ...] = ()
    device: str = ""                 # for verbs, that their workers use


class ReclaimRequest(RankRequest, frozen=True, tag="reclaim"):
    """These cores (none named: all that are lent) are wanted back. Answered once nothing of ours may run there.

    Only from its own node. `owned`: an owner is there already, so that only workers of low priority have a grace.
    """

    cores: tuple[int, ...] = ()
    grace_s: float = 0.0
    owned: bool = False


class DownRequest(RankRequest, frozen=True, tag="down"):
    pass


AnyRequest = (Join | LeaseRequest | Use | Hold | KillRequest | ReleaseRequest | StatusRequest | StayRequest | ListenRequest
              | ReclaimRequest | DownRequest)


class Unknown(msgspec.Struct, frozen=True, rename={"kind": "t"}):
    """A request, answer or event of a newer version, which this one has no type for; id 0: an event."""

    kind: Annotated[str, msgspec.Meta(max_length=64, pattern="^[a-z_]+$")]
    id: Annotated[int, msgspec.Meta(ge=0)] = 0


# ---- service → rank ----------------------------------------------------------------------------

class Answer(msgspec.Struct, frozen=True, tag_field="t"):
    """Base: answers the request with this id."""

    id: int


class Welcome(Answer, frozen=True, tag="welcome"):
    session: int
    service_pid: int
    cores: tuple[int, ...]           # what may be lent, lent ones included
    spare: tuple[int, ...]           # what could be lent now
    memory_bytes: int                # lendable
    version: str = __version__
    why_none: str = ""               # why no core is lent, where none is
    listen: tuple[str, ...] = ()     # where it listens on TCP
    transports: tuple[str, ...] = ()     # that its workers can use; told to ranks of other nodes only
    host: str = ""


class Granted(Answer, frozen=True, tag="granted"):
    leases: tuple[GrantLease, ...]
    reason: str = ""                 # why fewer than asked for


class Denied(Answer, frozen=True, tag="denied"):
    message: str
    hint: str = ""


class Failed(Answer, frozen=True, tag="failed"):
    """A request that could not be done for another reason than a lack of cores."""

    message: str
    hint: str = ""


class Done(Answer, frozen=True, tag="done"):
    ok: bool = True


class StatusAnswer(Answer, frozen=True, tag="status"):
    data: dict[str, Any] = {}


class Listening(Answer, frozen=True, tag="listening"):
    """It listens there, to whoever knows the key in this file."""

    addresses: tuple[str, ...]
    key_file: bytes


class Reclaimed(Answer, frozen=True, tag="reclaimed"):
    """Nothing of ours may run on these cores. It was decided at `decided_ns` of CLOCK_MONOTONIC."""

    cores: tuple[int, ...]
    decided_ns: int


AnyAnswer = Welcome | Granted | Denied | Failed | Done | StatusAnswer | Listening | Reclaimed


class Event(msgspec.Struct, frozen=True, tag_field="t"):
    """Base of what the service tells unasked."""


class Log(Event, frozen=True, tag="log"):
    """Lines that a worker wrote to stdout or stderr, and in which invocations; 0: in none, or nobody knows."""

    lease: int
    worker: int
    lines: tuple[str, ...]
    invocations: tuple[int, ...] = ()


def log_text(event: Log) -> str:
    """The lines as a rank prints them on its stderr."""
    return "".join(f"[rfaas worker {event.worker}, invocation {invocation}] {line}\n" if invocation else
                   f"[rfaas worker {event.worker}] {line}\n"
                   for line, invocation in zip_longest(event.lines, event.invocations[:len(event.lines)]))


class Revoking(Event, frozen=True, tag="revoking"):
    """The cores of these workers are wanted back: they take no more invocations, and end after their grace.

    reason: revoked · expired. Each one's end is told when it has come, and whom it hit.
    """

    lease: int
    workers: tuple[int, ...]
    reason: str
    grace_s: float = 0.0


class WorkerReady(Event, frozen=True, tag="ready"):
    """A replacement can be dialled. `replaces` is the number of the worker that ended."""

    lease: int
    worker: int
    cores: tuple[int, ...]
    replaces: int = 0


class WorkerEnded(Event, frozen=True, tag="ended"):
    """A worker is gone, and who caused it.

    cause: kernel · infrastructure · unknown. reason: signal · exit · memory · deadline · cancel · released ·
    revoked · idle · service · link. `invocation` is the one it died in, told only to the session that posted it
    (0: none, or another session's).
    """

    lease: int
    worker: int
    cause: str
    reason: str
    signal: int = 0
    exit_code: int | None = None
    invocation: int = 0
    last_lines: tuple[str, ...] = ()
    message: str = ""


class LeaseEnded(Event, frozen=True, tag="lease_ended"):
    """The service ended a lease unasked. cause: expired · revoked · failed · service."""

    lease: int
    cause: str
    message: str = ""


class ServiceEnded(Event, frozen=True, tag="service_ended"):
    """The connection to the service ended (told by the session itself, last event of all)."""

    message: str = ""


AnyEvent = Log | Revoking | WorkerReady | WorkerEnded | LeaseEnded | ServiceEnded
AnyToRank = (Welcome | Granted | Denied | Failed | Done | StatusAnswer | Listening | Reclaimed | Log | Revoking
             | WorkerReady | WorkerEnded | LeaseEnded | ServiceEnded)

_encoder = msgspec.json.Encoder()
_decode_request: msgspec.json.Decoder[AnyRequest] = msgspec.json.Decoder(AnyRequest)
_decode_to_rank: msgspec.json.Decoder[AnyToRank] = msgspec.json.Decoder(AnyToRank)
_decode_unknown: msgspec.json.Decoder[Unknown] = msgspec.json.Decoder(Unknown)
_REQUESTS = frozenset(kind.__struct_config__.tag for kind in get_args(AnyRequest))
_TO_RANK = frozenset(kind.__struct_config__.tag for kind in get_args(AnyToRank))
# What decoding raises for some bytes or other: not only errors of msgspec's own.
_NO_MESSAGE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def pack_message(message: msgspec.Struct) -> bytes:
    """A frame of type 64 with the message as JSON."""
    return pack_frame(FRAME_JSON, _encoder.encode(message))


def unpack_request(body: bytes) -> AnyRequest | Unknown:
    """Unknown for one that a newer version may have; ServiceError if it is no request."""
    try:
        return _decode_request.decode(body)
    except _NO_MESSAGE as error:
        if (unknown := _unknown(body, _REQUESTS)) is not None:
            return unknown
        raise ServiceError(f"a message that is no request: {error}") from None


def unpack_to_rank(body: bytes) -> AnyToRank | Unknown:
    """Unknown for what a service of a newer version may say; ServiceError if it is no answer or event."""
    try:
        return _decode_to_rank.decode(body)
    except _NO_MESSAGE as error:
        if (unknown := _unknown(body, _TO_RANK)) is not None:
            return unknown
        raise ServiceError(f"a message that is no answer or event: {error}") from None


def _unknown(body: bytes, known: frozenset[object]) -> Unknown | None:
    """The message if it is of a kind that isn't known."""
    try:
        found = _decode_unknown.decode(body)
    except _NO_MESSAGE:
        return None
    return None if found.kind in known else found


# ---- service ↔ zygote (one datagram each, descriptors beside it) ---------------------------------

class ZygoteSetup(msgspec.Struct, frozen=True, tag_field="t", tag="setup"):
    """First message: what the rank's interpreter looked like."""

    path: tuple[bytes, ...]
    environment: tuple[tuple[bytes, bytes], ...]
    low: str = ""                    # by which means workers take low priority; of a group, its entrance follows
    low_group: str = ""
    spares: bool = False             # whether to tell of forks that wait for their order


class Entrance(msgspec.Struct, frozen=True, tag_field="t", tag="entrance"):
    """Descriptor: by which a process enters the group of low priority."""


class ForkWorker(msgspec.Struct, frozen=True, tag_field="t", tag="fork"):
    """Descriptors: agent socket, page, output pipe, then entrances of its control group."""

    worker: int
    cores: tuple[int, ...]
    memory_bytes: int


# A zygote is its user's, who may have it say anything: what is out of bounds is not decoded.
_Pid = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_WorkerNumber = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Word = Annotated[str, msgspec.Meta(max_length=1024)]
_Words = Annotated[list[_Word], msgspec.Meta(max_length=16)]


class SandboxLevel(TypedDict):
    """What agent/sandbox.py reaches, for people to see."""

    policy: _Word
    seccomp: bool
    landlock: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
    keeps: _Words
    lacks: _Words


class ZygoteReady(msgspec.Struct, frozen=True, tag_field="t", tag="zygote_ready"):
    """`sandbox` is the level that its workers get."""

    pid: _Pid
    sandbox: SandboxLevel
    version: _Word = ""              # of the package that its workers run


class SpareForked(msgspec.Struct, frozen=True, tag_field="t", tag="spare"):
    """A process that will be some worker. Descriptor: a pidfd of it."""

    pid: _Pid


class WorkerForked(msgspec.Struct, frozen=True, tag_field="t", tag="forked"):
    """Descriptor: a pidfd of the worker."""

    worker: _WorkerNumber
    pid: _Pid


class WorkerExited(msgspec.Struct, frozen=True, tag_field="t", tag="exited"):
    worker: _WorkerNumber
    pid: _Pid
    signal: Annotated[int, msgspec.Meta(ge=0, le=127)]
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)]
    cpu_s: Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
    max_rss_bytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class ZygoteProblem(msgspec.Struct, frozen=True, tag_field="t", tag="problem"):
    """A worker that could not be forked (worker > 0), or a zygote that can't fork at all (0)."""

    worker: _WorkerNumber
    message: str


AnyToZygote = ZygoteSetup | Entrance | ForkWorker
AnyFromZygote = ZygoteReady | SpareForked | WorkerForked | WorkerExited | ZygoteProblem
_decode_to_zygote: msgspec.json.Decoder[AnyToZygote] = msgspec.json.Decoder(AnyToZygote)
_decode_from_zygote: msgspec.json.Decoder[AnyFromZygote] = msgspec.json.Decoder(AnyFromZygote)


def pack_plain(message: msgspec.Struct) -> bytes:
    """A message as JSON without a frame, for sockets that keep boundaries."""
    return _encoder.encode(message)


def unpack_to_zygote(body: bytes) -> AnyToZygote:
    return _decode_to_zygote.decode(body)


def unpack_from_zygote(body: bytes) -> AnyFromZygote:
    return _decode_from_zygote.decode(body)

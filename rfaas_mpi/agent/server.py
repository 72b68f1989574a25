"""What every agent is: one thread, one selector, a door, sessions of ranks, and the workers that they borrow.

Who gets a lease is not decided here: `AgentServer` is the base of the embedded
service, which has a manager of its own, and of a cluster's agent, which has one
elsewhere. Both fill in the hooks in the middle of the class.
"""

from __future__ import annotations

import functools
import logging
import os
import selectors
import shlex
import signal
import socket
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rfaas_mpi import messages as msg
from rfaas_mpi import skew
from rfaas_mpi._version import __version__
from rfaas_mpi.agent import core as agent_core
from rfaas_mpi.agent import sandbox
from rfaas_mpi.agent.core import AgentCore
from rfaas_mpi.agent.door import Door, Guest
from rfaas_mpi.agent.pool import ZygoteKind
from rfaas_mpi.agent.workers import Workers
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import RFaaSError, ServiceError
from rfaas_mpi.leases import Cause, GrantedWorker
from rfaas_mpi.sealing import Opener, Sealer
from rfaas_mpi.session import FileLock

__all__ = ["AgentServer", "LeaseHandle", "Offer", "REASONS", "SessionHandle"]

log = logging.getLogger("rfaas_mpi.agent.server")

LOG_BUFFER_BYTES = 1 << 20           # lines are dropped for a rank that reads slower
SESSION_BUFFER_BYTES = 64 << 20      # and it is given up beyond this
LOG_BYTES = 1 << 20                  # a longer log is begun anew
LIFE_LOCK_S = 5.0                    # the one before may need so long to end

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

REASONS = {
    Cause.RELEASED: "released",
    Cause.SESSION_ENDED: "released",
    Cause.REVOKED: "revoked",
    Cause.EXPIRED: "expired",
    Cause.NODE_LOST: "service",
}


@dataclass
class SessionHandle:
    """One rank's session."""

    number: int
    connection: socket.socket
    pidfd: int = -1
    peer_pid: int = 0
    where: str = ""                  # of another node: its address
    nonces: tuple[bytes, bytes] = (b"", b"")
    sealer: Sealer | None = None     # over TCP
    opener: Opener | None = None
    since: float = 0.0
    frames: msg.FrameReader = field(default_factory=msg.FrameReader)
    out: bytearray = field(default_factory=bytearray)
    join: msg.Join | None = None
    kind: ZygoteKind | None = None
    version: int = 0                 # of the rank's package
    dropped_lines: int = 0
    dropped_from: tuple[int, int] = (0, 0)      # the lease and the worker of the last of them
    closed: bool = False

    @property
    def holds(self) -> bool:
        """True if the service must stay for it."""
        return self.join is not None and not self.join.observer


@dataclass
class LeaseHandle:
    """What the shell knows of a lease besides whoever decides about it."""

    secret: bytes
    session: int
    kind: ZygoteKind
    hard_end: float | None = None
    holders: set[int] = field(default_factory=set)   # the sessions that keep it


class Offer(NamedTuple):
    """What a session is told of the node when it joins."""

    cores: tuple[int, ...]           # what may be lent, lent ones included
    spare: tuple[int, ...]           # what could be lent now
    memory_bytes: int
    why_none: str = ""


@dataclass
class _Reclaim:
    """Cores that somebody waits for."""

    session: int
    request: int
    cores: tuple[int, ...]
    seats: set[tuple[int, int]]
    decided_ns: int


class AgentServer(ABC):
    """Owns the selector, the door, sessions and workers. close() ends them all.

    With `grants` sessions may begin with a grant, and ranks of all users may come.
    """

    grants = False

    def __init__(self, directory: Path, *, zygote_idle_s: float) -> None:
        self.directory = directory
        self.socket = directory / "socket"
        self.started = time.monotonic()
        self.leaving = False
        self.core = AgentCore()
        self.sessions: dict[int, SessionHandle] = {}
        self.leases: dict[int, LeaseHandle] = {}
        self.selector = selectors.DefaultSelector()
        self.workers = Workers(self.selector, self.core, self, zygote_idle_s=zygote_idle_s)
        self.door = Door(self.selector, self, grants=self.grants)
        self.key = b""                               # that sessions over TCP prove to know
        self.device = ""                             # for verbs, that workers of other nodes' ranks use
        self.spin_us_max: int | None = None          # what ranks want, and no longer than this, workers spin
        self._life = FileLock(directory / "life.lock")
        self._next_session = 1
        self._releasing: dict[int, list[tuple[int, int]]] = {}
        self._failing: dict[int, str] = {}           # lease → why it is taken back
        self._reclaims: list[_Reclaim] = []

    # ---- start -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Takes the life lock, before anything else is done in the directory.

        ServiceError if another one lives, or what lies there isn't ours alone to write: this may be root still, in
        a directory of the service's user.
        """
        deadline = time.monotonic() + LIFE_LOCK_S
        try:
            self._life.wait(deadline)
        except ServiceError:
            raise ServiceError(f"another service lives in {self.directory}") from None
        if not _has_one_name(self._life.fd):
            raise ServiceError(f"{self._life.path} is no plain file, or has another name besides",
                               hint="find out who made it, and remove it")
        _shorten(self.directory / "log")
        os.ftruncate(self._life.fd, 0)
        os.pwrite(self._life.fd, b"%d\n" % os.getpid(), 0)

    def watch_signals(self) -> None:
        """SIGTERM, SIGINT and SIGHUP end it; `wake` is heard."""
        wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self.selector.register(wake_r, READ, lambda _m: self._on_wake(wake_r))

    def _on_signal(self, number: int, _frame: object) -> None:
        self.told_to_leave()

    def wake(self) -> None:
        """Has the loop call woken(). From any thread."""
        try:
            os.write(self._wake_w, b"\0")
        except BlockingIOError:
            return                    # it is full of wakes already

    def _on_wake(self, wake_r: int) -> None:
        try:
            os.read(wake_r, 4096)
        except BlockingIOError:
            return
        self.woken()

    # ---- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until it is told to leave."""
        while not self.leaving:
            happened = self.selector.select(self._patience())
            self.first(time.monotonic())
            for key, mask in happened:
                # What was handled just before may have closed it, and its
                # number may belong to something else already.
                if not self.leaving and self.selector.get_map().get(key.fd) == key:
                    key.data(mask)
            now = time.monotonic()
            self.workers.check(now)
            self.on_time(now)
            self.workers.tidy(now)
            self.door.tick(now)
            self.settled(now)

    def _patience(self) -> float:
        now = time.monotonic()
        times = [now + 60.0, *self.workers.deadlines(now), *self.deadlines(now)]
        guests = self.door.next_deadline()
        if guests is not None:
            times.append(guests)
        return max(0.0, min(times) - now)

    def close(self) -> None:
        """Ends everything that was started, and leaves no process, socket or segment. Safe to call twice."""
        if self._life.fd >= 0:
            # Only ours: the life lock is held.
            self.socket.unlink(missing_ok=True)
        self.door.stop_listening()
        self.workers.close()
        self.door.close()
        for session in self.sessions.values():
            session.connection.close()
            if session.pidfd >= 0:
                os.close(session.pidfd)
        self.sessions.clear()
        self._life.close()

    # ---- hooks: who decides about leases ---------------------------------------------------------

    @abstractmethod
    def offer(self, session: SessionHandle, now: float) -> Offer:
        """What there is to lend to a session that joins, looked at now."""

    def check(self, session: SessionHandle, request: msg.AnyRequest) -> None:
        """ServiceError for what this session may not ask."""

    def request(self, session: SessionHandle, request: msg.AnyRequest, now: float) -> None:
        """A request that not every agent knows. Raises RFaaSError or ValueError for what can't be done."""
        raise ServiceError(f"{socket.gethostname()}'s agent does not do this: {type(request).__name__}")

    def joined(self, session: SessionHandle, join: msg.Join, environment: Mapping[str, str]) -> None:
        """A rank has joined, and is no observer."""

    @abstractmethod
    def session_over(self, session: SessionHandle, now: float) -> None:
        """A session has ended: what it alone kept ends too."""

    @abstractmethod
    def let_go(self, lease: int, now: float) -> None:
        """The last session that kept a lease has ended."""

    @abstractmethod
    def release(self, lease: int, now: float) -> None:
        """The last session that kept a lease gives it back. Answered once its last seat has stopped."""

    @abstractmethod
    def fail(self, lease: int, now: float) -> None:
        """The lease's workers can't be started: it is taken back."""

    def give_up(self, seats: Mapping[int, Sequence[int]], grace_s: float, now: float, *, owned: bool) -> None:
        """Cores are wanted back: these seats of each lease are given up, down the ladder. It waits for nobody."""
        for lease, numbers in seats.items():
            self.workers.act(self.core.stop(lease, numbers, "revoked", grace_s, now, owned=owned))

    def freed(self, lease: int, seat: int, cores: tuple[int, ...], now: float) -> None:
        """Nothing of this seat may run on its cores any more. Its worker may still hold memory."""

    @abstractmethod
    def stopped(self, lease: int, seat: int, now: float) -> None:
        """Nothing of this seat can run any more."""

    @abstractmethod
    def used(self, meter: agent_core.Meter, pid: int) -> None:
        """What a worker that ended has used."""

    def status(self) -> dict[str, Any]:
        """Facts for people and programs, all of them JSON."""
        return {
            "pid": os.getpid(), "version": __version__, "uptime_s": round(time.monotonic() - self.started, 3),
            "directory": str(self.directory),
            "low_priority": str(self.workers.low.means or ""), "spin_us_max": self.spin_us_max,
            "workers": self.workers.status(), "zygotes": self.workers.zygotes_status(),
            "memory_limit": self.workers.memory_status(),
            "sessions": [{"number": session.number, "pid": session.join.pid if session.join else 0,
                          "where": session.where, "age_s": round(time.monotonic() - session.since, 3)}
                         for session in self.sessions.values() if session.holds],
            "host": socket.gethostname(), "listen": [str(address) for address in self.door.addresses],
            "door": dict(self.door.counts), "refused": self.workers.refused,
        }

    def user_of(self, session: SessionHandle) -> int | None:
        """As whom its workers run; None: as we do."""
        return None

    def prefix(self, environment: Mapping[str, str]) -> tuple[str, ...]:
        """The command that workers of a rank with this environment are started through."""
        return tuple(shlex.split(Settings.load(environment).worker_prefix))

    def told_to_leave(self) -> None:
        """By a signal, or by a session of our own user's."""
        self.leaving = True

    def woken(self) -> None:
        """After wake(), or a signal."""

    def deadlines(self, now: float) -> list[float]:
        """When to call on_time() and settled() at the latest."""
        return []

    def first(self, now: float) -> None:
        """Before anything else that has happened is looked at."""

    def on_time(self, now: float) -> None:
        """Once in each turn of the loop, after the workers' time limits."""

    def settled(self, now: float) -> None:
        """At the end of each turn."""

    # ---- what the door asks, and whom it lets in -------------------------------------------------

    def secret_of(self, lease: int, worker: int) -> bytes | None:
        """The lease's secret; None if there is no such lease with such a worker."""
        found = self.core.workers.get(worker)
        if found is None or found.lease != lease or lease not in self.leases:
            return None
        return self.leases[lease].secret

    def worker_came(self, guest: Guest, hello: msg.Hello, connections: list[socket.socket]) -> None:
        """Passes a rank's connections on to its worker."""
        session = self.sessions.get(hello.session)
        # A process can speak for its own session only; who came over TCP has
        # proved to know the lease's secret, and no pid.
        mine = session is not None and (guest.remote or session.peer_pid == guest.pid)
        self.workers.adopt(hello.worker, hello.lease, hello.session if mine else 0, connections)

    def session_came(self, guest: Guest) -> None:
        """A session begins; its join follows."""
        self.begin_session(guest, self.key, (msg.ROLE_SESSION_RANK, msg.ROLE_SESSION_SERVICE))

    def secret_for(self, lease: int, grant: bytes) -> bytes | None:
        """The secret of the lease that the manager granted with these bytes."""
        return None

    def lease_came(self, guest: Guest, lease: int, grant: bytes) -> None:
        """The session of a lease begins. For those that take grants."""

    def begin_session(self, guest: Guest, key: bytes, roles: tuple[bytes, bytes]) -> SessionHandle:
        """Listens to it from now on; over TCP it is sealed with the key that it proved to know, rank's role first."""
        number, self._next_session = self._next_session, self._next_session + 1
        session = SessionHandle(number, guest.connection, peer_pid=guest.pid, where=guest.where,
                                nonces=guest.nonces, since=time.monotonic(),
                                version=0 if guest.hello is None else guest.hello.version)
        if guest.pid > 0:
            try:
                session.pidfd = os.pidfd_open(guest.pid)
            except OSError as error:
                log.info("session=%d no pidfd of pid %d: %s", number, guest.pid, error)
        if session.where:
            session.sealer = Sealer(key, roles[1], session.nonces)
            session.opener = Opener(key, roles[0], session.nonces)
            log.info("session=%d from %s", number, session.where)
        self.sessions[number] = session
        self.selector.register(session.connection, READ, lambda mask: self._on_session(session, mask))
        if session.pidfd >= 0:
            # Its connection may live on in a child that it forked.
            self.selector.register(session.pidfd, READ, lambda _m: self.end_session(session, "its process ended"))
        return session

    # ---- sessions --------------------------------------------------------------------------------

    def _on_session(self, session: SessionHandle, mask: int) -> None:
        if mask & WRITE:
            self._flush(session)
        if not mask & READ or session.closed:
            return
        try:
            data = session.connection.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            self.end_session(session, str(error))
            return
        if not data:
            self.end_session(session, "it closed the connection")
            return
        try:
            for frame in session.frames.feed(session.opener.feed(data) if session.opener else data):
                if session.closed:
                    return
                if frame.type != msg.FRAME_JSON or frame.descriptors:
                    raise ServiceError(f"a frame of type {frame.type} in a session")
                self._handle(session, msg.unpack_request(frame.body))
        except ServiceError as error:
            log.warning("session=%d %s", session.number, error)
            self.end_session(session, str(error))

    def end_session(self, session: SessionHandle, why: str) -> None:
        """Closes it, and ends what it holds. Safe to call twice."""
        if session.closed:
            return
        session.closed = True
        del self.sessions[session.number]
        self.selector.unregister(session.connection)
        session.connection.close()
        if session.pidfd >= 0:
            self.selector.unregister(session.pidfd)
            os.close(session.pidfd)
            session.pidfd = -1
        log.info("session=%d ends: %s", session.number, why)
        now = time.monotonic()
        for lease, handle in list(self.leases.items()):
            if session.number in handle.holders:
                handle.holders.discard(session.number)
                if not handle.holders:
                    self.let_go(lease, now)
        self.session_over(session, now)

    def send(self, session: SessionHandle | None, message: msg.Answer | msg.Event) -> None:
        """Says it as soon as the session reads; nothing if there is none."""
        if session is None or session.closed:
            return
        packed = msg.pack_message(message)
        session.out += session.sealer.seal(packed) if session.sealer else packed
        self._flush(session)

    def _flush(self, session: SessionHandle) -> None:
        if session.closed:
            return
        try:
            while session.out:
                sent = session.connection.send(memoryview(session.out)[:1 << 18])
                del session.out[:sent]
        except BlockingIOError:
            pass                      # the selector tells when it reads again
        except OSError as error:
            self.end_session(session, str(error))
            return
        if len(session.out) > SESSION_BUFFER_BYTES:
            self.end_session(session, f"it does not read: {len(session.out)} bytes wait for it")
            return
        wanted = READ | WRITE if session.out else READ
        if self.selector.get_key(session.connection).events != wanted:
            self.selector.modify(session.connection, wanted, lambda mask: self._on_session(session, mask))
        if not session.out:
            self._say_dropped(session)

    def _handle(self, session: SessionHandle, request: msg.AnyRequest | msg.Unknown) -> None:
        now = time.monotonic()
        try:
            if isinstance(request, msg.Unknown):
                raise ServiceError(f"there is no request {request.kind!r} in rfaas_mpi {__version__}, which runs here",
                                   hint=f"the rank runs {skew.text(session.version)}")
            self.check(session, request)
            match request:
                case msg.Join():
                    self._join(session, request, now)
                case _ if session.join is None:
                    raise ServiceError("a session begins with a join")
                case msg.KillRequest():
                    self.send(session, msg.Done(request.id, self.workers.kill(request)))
                case msg.ReleaseRequest():
                    self._release(session, request, now)
                case msg.Hold():
                    self._hold(session, request)
                case msg.StatusRequest():
                    self.send(session, msg.StatusAnswer(request.id, self.status()))
                case msg.ReclaimRequest():
                    self._reclaim(session, request, now)
                case _:
                    self.request(session, request, now)
        except (RFaaSError, ValueError) as error:
            hint = error.hint if isinstance(error, RFaaSError) else ""
            text = Exception.__str__(error)
            self.send(session, msg.Failed(request.id, text, hint))

    def _join(self, session: SessionHandle, join: msg.Join, now: float) -> None:
        if session.join is not None:
            raise ServiceError("this session has joined already")
        if not join.observer:
            environment = _decoded(join.environment)
            sandbox.required(_settings_of(join.environment).sandbox, sandbox.probe())
            uid = self.user_of(session)
            if session.where and uid is None:
                # Another user's files may not be ours to see: there the zygote says what is missing.
                _check_places(join)
            session.kind = ZygoteKind.of(join, self.device if session.where else None,
                                         prefix=self.prefix(environment), uid=uid, spin_us_max=self.spin_us_max,
                                         version=session.version)
            _check_program(session.kind)
            self.joined(session, join, environment)
        session.join = join
        offer = self.offer(session, now)
        self.send(session, msg.Welcome(
            join.id, session=session.number, service_pid=os.getpid(), cores=offer.cores, spare=offer.spare,
            memory_bytes=offer.memory_bytes, why_none=offer.why_none,
            listen=tuple(str(address) for address in self.door.addresses),
            transports=_transports() if session.kind is not None and session.where else (),
            host=socket.gethostname()))
        if session.kind is not None and offer.cores and not session.closed:
            # Warm by the time the rank asks for a lease.
            try:
                self.workers.warm(session.kind, now)
            except ServiceError as error:
                log.error("session=%d %s", session.number, error)    # which its first lease will tell

    # ---- leases ----------------------------------------------------------------------------------

    def start_lease(self, lease: int, epoch: int, session: SessionHandle, secret: bytes,
                    workers: Iterable[GrantedWorker], memory_per_worker: int, hard_end: float | None,
                    now: float) -> tuple[msg.GrantLease, list[agent_core.Action]]:
        """The lease as its rank is told of it, less the secret; and what starts its workers: to be done first."""
        assert session.kind is not None
        self.leases[lease] = LeaseHandle(secret, session.number, session.kind, hard_end, {session.number})
        seats = {worker.number: worker.cores for worker in workers}
        numbers, actions = self.core.start(lease, session.number, seats, memory_per_worker, now)
        return msg.GrantLease(
            id=lease, epoch=epoch, secret=b"", memory_bytes=memory_per_worker * len(seats),
            workers=tuple(msg.WorkerInfo(numbers[seat], cores) for seat, cores in seats.items()),
            hard_end=hard_end, ends_in_s=None if hard_end is None else max(0.0, hard_end - now)), actions

    def tell_lease_ended(self, session: int, lease: int, cause: Cause) -> None:
        """The session hears that all of a lease ends, and why."""
        why = self._failing.pop(lease, "")
        ended = msg.LeaseEnded(lease, "failed" if why else REASONS[cause], why or _why_ended(lease, cause))
        holders = self.leases[lease].holders if lease in self.leases else set()
        for number in sorted(holders | {session}):
            self.tell(number, ended)

    def _hold(self, session: SessionHandle, request: msg.Hold) -> None:
        handle = self.leases.get(request.lease)
        if handle is None or not msg.same_proof(request.proof, msg.hold_proof(handle.secret, request.lease,
                                                                              session.number)):
            raise ServiceError(f"there is no lease {request.lease} that this session could keep",
                               hint="it may have ended: make a new Executor")
        handle.holders.add(session.number)
        log.info("lease=%d session=%d keeps it, too", request.lease, session.number)
        self.send(session, msg.Done(request.id))

    def _release(self, session: SessionHandle, request: msg.ReleaseRequest, now: float) -> None:
        handle = self.leases.get(request.lease)
        if handle is None or session.number not in handle.holders:
            self.send(session, msg.Done(request.id, False))
            return
        handle.holders.discard(session.number)
        if handle.holders:
            # Others work on with it, and are not shown what it had printed.
            self.workers.hear(request.lease)
            self.send(session, msg.Done(request.id))
            return
        self._releasing.setdefault(request.lease, []).append((session.number, request.id))
        self.release(request.lease, now)

    # ---- for whom the workers work ---------------------------------------------------------------

    def cores_freed(self, lease: int, seat: int, cores: tuple[int, ...]) -> None:
        """Nothing of this seat may run on these cores any more."""
        log.info("lease=%d seat=%d cores=%s are free", lease, seat, cores)
        for reclaim in self._reclaims:
            reclaim.seats.discard((lease, seat))
        self._answer_reclaims()
        self.freed(lease, seat, cores, time.monotonic())

    def _reclaim(self, session: SessionHandle, request: msg.ReclaimRequest, now: float) -> None:
        if session.where:
            raise ServiceError("only from its own node are an agent's cores taken back",
                               hint="run `rfaas drain` where the manager is")
        if not 0 <= request.grace_s <= msg.GRACE_MAX_S:
            raise ServiceError(f"a grace of {request.grace_s} s", hint=f"choose one from 0 to {msg.GRACE_MAX_S:g}")
        wanted = set(request.cores)
        seats = {seat: held for seat, held in self.core.seats.items() if not wanted or wanted & set(held.cores)}
        cores = request.cores or tuple(sorted({core for held in seats.values() for core in held.cores}))
        by_lease: dict[int, list[int]] = {}
        for lease, seat in seats:
            by_lease.setdefault(lease, []).append(seat)
        left = {key for key, held in seats.items() if not held.freed}
        self._reclaims.append(_Reclaim(session.number, request.id, cores, left, time.monotonic_ns()))
        self.give_up(by_lease, request.grace_s, now, owned=request.owned)
        log.info("cores=%s were wanted back within %g s: seats=%s", cores, request.grace_s, sorted(seats))
        self._answer_reclaims()

    def _answer_reclaims(self) -> None:
        for reclaim in [reclaim for reclaim in self._reclaims if not reclaim.seats]:
            self._reclaims.remove(reclaim)
            self.tell(reclaim.session, msg.Reclaimed(reclaim.request, reclaim.cores, reclaim.decided_ns))

    def kind_for(self, lease: int) -> ZygoteKind:
        """What the lease's workers are started from."""
        if lease not in self.leases:
            raise ServiceError(f"lease {lease} is gone")
        return self.leases[lease].kind

    def tell(self, session: int, event: msg.Answer | msg.Event) -> None:
        """Sends it to a session, if there is one."""
        self.send(self.sessions.get(session), event)

    def show(self, session: int, event: msg.Log) -> None:
        """Sends a worker's output, as much as the session reads."""
        found = self.sessions.get(session)
        if found is None:
            return
        if len(found.out) > LOG_BUFFER_BYTES:
            found.dropped_lines += len(event.lines)
            found.dropped_from = event.lease, event.worker
            return
        self._say_dropped(found)
        self.send(found, event)

    def _say_dropped(self, session: SessionHandle) -> None:
        if session.dropped_lines:
            note = f"({session.dropped_lines} lines are left out: this rank did not read them in time)"
            session.dropped_lines = 0
            self.send(session, msg.Log(*session.dropped_from, (note,)))

    def lease_failed(self, lease: int, why: str) -> None:
        """Its workers can't be started: it has to end."""
        if lease in self.leases and lease not in self._failing:
            self._failing[lease] = why
            self.fail(lease, time.monotonic())

    def spawner_lost(self, why: str) -> None:
        """Nothing can be started or ended for other users any more."""
        log.error("%s", why)
        self.leaving = True

    def seat_stopped(self, lease: int, seat: int, last: bool) -> None:
        """Nothing of this seat can run any more."""
        if last:
            self.leases.pop(lease, None)
            self._failing.pop(lease, None)
            for number, request in self._releasing.pop(lease, []):
                if found := self.sessions.get(number):
                    self._say_dropped(found)
                self.tell(number, msg.Done(request))
            log.info("lease=%d ended", lease)
        self.stopped(lease, seat, time.monotonic())


# Ranks come again and again with the same environment.
@functools.lru_cache(maxsize=32)
def _decoded(environment: tuple[tuple[bytes, bytes], ...]) -> Mapping[str, str]:
    return {os.fsdecode(name): os.fsdecode(value) for name, value in environment}


@functools.lru_cache(maxsize=32)
def _settings_of(environment: tuple[tuple[bytes, bytes], ...]) -> Settings:
    return Settings.load(_decoded(environment))


def _why_ended(lease: int, cause: Cause) -> str:
    match cause:
        case Cause.REVOKED:
            return f"lease {lease} was revoked: its cores are wanted back"
        case Cause.EXPIRED:
            return f"lease {lease} came to its hard end"
        case _:
            return f"lease {lease} ended: {cause}"


def _check_places(join: msg.Join) -> None:
    """ServiceError unless this node has what a worker of that rank of another node is started from."""
    places = (("interpreter", join.executable, os.path.isfile), ("directory", join.directory, os.path.isdir),
              ("package rfaas_mpi", join.package, os.path.isdir))
    for what, path, there in places:
        if not there(path):
            raise ServiceError(f"{socket.gethostname()} has no {os.fsdecode(path)!r}, the rank's {what}",
                               hint="both nodes need the same files under the same paths: start the rank from a "
                                    "file system that they share")


def _check_program(kind: ZygoteKind) -> None:
    """ServiceError unless the command that its workers are started through is there."""
    if kind.prefix and not os.access(kind.prefix[0], os.X_OK):
        raise ServiceError(f"{socket.gethostname()} can't run {kind.prefix[0]}, through which workers are started",
                           hint="install it there, or correct worker_prefix (RFAAS_WORKER_PREFIX)")


def _transports() -> tuple[str, ...]:
    # Later, and only for ranks of other nodes: the start of a service need not wait for it.
    from rfaas_mpi import fabric
    return fabric.transports()


def _has_one_name(fd: int) -> bool:
    """True for a plain file that is not somebody else's under a second name."""
    facts = os.fstat(fd)
    return stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1


def _shorten(path: Path) -> None:
    """Empties a log that has become long; what is no file of its own is left as it is."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is left as it is: %s", path, error.strerror)
        return
    try:
        if _has_one_name(fd) and os.fstat(fd).st_size > LOG_BYTES:
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)

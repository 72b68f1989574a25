"""The embedded service: manager and agent of one node in one process, for one user. `python -m rfaas_mpi.service`

Decisions are made in manager/core.py and agent/core.py; here is one thread, one
selector, and everything that has a descriptor.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import selectors
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfaas_mpi import messages as msg
from rfaas_mpi import remote
from rfaas_mpi._version import __version__
from rfaas_mpi.agent import core as agent_core
from rfaas_mpi.agent import cores as node_cores
from rfaas_mpi.agent import sandbox
from rfaas_mpi.agent.core import AgentCore, Exit
from rfaas_mpi.agent.door import Door, Guest
from rfaas_mpi.agent.pool import CoreLocks, Taking, WorkerHandle, ZygoteHandle, ZygoteKind, full_cpuset, oom_kills
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import RFaaSError, ServiceError
from rfaas_mpi.leases import Cause, Lease, LeaseBook, NodeReport
from rfaas_mpi.manager import core as manager_core
from rfaas_mpi.manager.core import Manager
from rfaas_mpi.manager.store import Store
from rfaas_mpi.placement import pick_cores
from rfaas_mpi.sealing import Opener, Sealer
from rfaas_mpi.session import FileLock

__all__ = ["Service", "main"]

log = logging.getLogger("rfaas_mpi.service")

LOG_BUFFER_BYTES = 1 << 20           # lines are dropped for a rank that reads slower
SESSION_BUFFER_BYTES = 64 << 20      # and it is given up beyond this
PARTIAL_LINE_S = 0.2                 # an unfinished line is shown after this
LEAVE_RETRY_S = 0.05
CORE_RETRY_S = 0.1                   # another service of ours may give up a core
REPORT_S = 5.0                       # the node is looked at again while leases live
FORGET_S = 7 * 86400.0               # files of a service that last started so long ago are removed
LOG_BYTES = 1 << 20                  # a longer log is begun anew
ENDS_S = 5.0                         # killed workers are waited for, at our own end
LIFE_LOCK_S = 5.0                    # the service before may need so long to end
NODE = "local"

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

_REASONS = {
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
    rank: node_cores.Rank | None = None
    slurm: node_cores.SlurmFacts = field(default_factory=node_cores.SlurmFacts)
    dropped_lines: int = 0
    closed: bool = False

    @property
    def holds(self) -> bool:
        """True if the service must stay for it."""
        return self.join is not None and not self.join.observer


@dataclass
class LeaseHandle:
    """What the service knows of a lease besides the book."""

    secret: bytes
    session: int
    zygote_key: str
    workers: set[int] = field(default_factory=set)
    hard_end: float | None = None


class Service:
    """Owns the door, sessions, zygotes, workers, locks and the store."""

    def __init__(self, directory: Path, *, linger_s: float, zygote_idle_s: float, memory_reserve: int) -> None:
        self.directory = directory
        self.linger_s = linger_s
        self.zygote_idle_s = zygote_idle_s
        self.memory_reserve = memory_reserve
        self.started = time.monotonic()
        self.stay = False
        self.leaving = False
        self._selector = selectors.DefaultSelector()
        self._sessions: dict[int, SessionHandle] = {}
        self._next_session = 1
        self._workers: dict[int, WorkerHandle] = {}
        self._zygotes: dict[str, ZygoteHandle] = {}
        self._leases: dict[int, LeaseHandle] = {}
        self._releasing: dict[int, list[tuple[int, int]]] = {}
        self._failing: dict[int, str] = {}           # lease → why it is taken back
        self._idle_since: float | None = self.started
        self._next_report = 0.0
        self._report_due = False
        self._leave_again_at = 0.0
        self._oom_kills = 0
        self._life = FileLock(directory / "life.lock")
        self._door = Door(self._selector, self)
        self._key = b""
        self._refused = 0                    # what ranks sent to workers and made no sense
        self._key_file = directory / "key"
        self._for_others = msg.ListenRequest(0, ())
        self._around = node_cores.SlurmFacts()       # whoever opened the door
        self._kept: dict[int, str] = {}
        self._why_none = ""

    # ---- start -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Takes the life lock and listens. ServiceError if another service lives."""
        deadline = time.monotonic() + LIFE_LOCK_S
        try:
            self._life.wait(deadline)
        except ServiceError:
            raise ServiceError(f"another service lives in {self.directory}") from None
        if (log_file := self.directory / "log").exists() and log_file.stat().st_size > LOG_BYTES:
            os.truncate(log_file, 0)
        os.ftruncate(self._life.fd, 0)
        os.pwrite(self._life.fd, b"%d\n" % os.getpid(), 0)
        self._store = Store(self.directory / "store.db")
        self.manager = Manager(LeaseBook(pick_cores, epoch=self._store.epoch, remember_s=60.0))
        self.agent = AgentCore()
        # The rank that started us may have been bound to one core.
        self._facts = node_cores.read_node_facts(affinity=full_cpuset())
        _forget_old(self.directory.parent, self.directory)
        cores_directory = self.directory.parent / "cores"
        cores_directory.mkdir(mode=0o700, exist_ok=True)
        self._locks = CoreLocks(cores_directory)
        # Held while cores are looked at, so that no other service of this user
        # takes our look for a loan.
        self._taking = Taking(cores_directory / "taking")
        self._oom_kills = oom_kills()

        self._door.listen_unix(self.directory / "socket")

        self._wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._selector.register(self._wake_r, READ, self._on_wake)
        log.info("pid=%d version=%s listens in %s", os.getpid(), __version__, self.directory)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.leaving = True

    def _on_wake(self, _mask: int) -> None:
        try:
            os.read(self._wake_r, 4096)
        except BlockingIOError:
            return

    # ---- the loop --------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until it is told to leave, or nobody has been here for the linger time."""
        while not self.leaving:
            for key, mask in self._selector.select(self._patience()):
                # What was handled just before may have closed it, and its
                # number may belong to something else already.
                if not self.leaving and self._selector.get_map().get(key.fd) == key:
                    key.data(mask)
            self._on_time()

    def _patience(self) -> float:
        now = time.monotonic()
        times = [now + 60.0, self.manager.next_deadline()]
        due = self.agent.next_deadline(now)
        if due is not None:
            times.append(due)
        if self._idle_since is not None and not self.stay:
            times.append(max(self._idle_since + self.linger_s, self._leave_again_at))
        if self.manager.waiting:
            times.append(now + CORE_RETRY_S)
        if self._leases:
            times.append(self._next_report)
        guests = self._door.next_deadline()
        if guests is not None:
            times.append(guests)
        times += [worker.lines.since + PARTIAL_LINE_S for worker in self._workers.values()
                  if worker.lines.since is not None]
        times += [zygote.idle_since + self.zygote_idle_s for zygote in self._zygotes.values() if not zygote.workers]
        return max(0.0, min(times) - now)

    def _on_time(self) -> None:
        now = time.monotonic()
        if self.agent.watched:
            pages = {number: self._workers[number].read_page() for number in self.agent.watched
                     if number in self._workers}
            self._act(self.agent.check_limits(pages, now, time.monotonic_ns()))
        self._act(self.agent.tick(now))
        if self.manager.waiting or self._report_due or (self._leases and now >= self._next_report):
            self._report(now)
        if now >= self.manager.next_deadline():
            self._manage(self.manager.tick(now))
        for worker in list(self._workers.values()):
            if worker.lines.since is not None and now >= worker.lines.since + PARTIAL_LINE_S:
                self._show(worker, worker.lines.flush())
        self._door.tick(now)
        for key, zygote in list(self._zygotes.items()):
            if not zygote.workers and now >= zygote.idle_since + self.zygote_idle_s:
                log.info("zygote=%s pid=%d ends: idle for %g s", key, zygote.pid, self.zygote_idle_s)
                self._close_zygote(key)
        self._decided()
        self._maybe_leave(now)

    def _maybe_leave(self, now: float) -> None:
        busy = self.stay or self._leases or any(session.holds for session in self._sessions.values())
        if busy:
            self._idle_since = None
            return
        if self._idle_since is None:
            self._idle_since = now
        if now < max(self._idle_since + self.linger_s, self._leave_again_at):
            return
        # A rank that joins holds this lock until it is welcome.
        join = FileLock(self.directory / "join.lock")
        if not join.take():
            self._leave_again_at = now + LEAVE_RETRY_S
            return
        log.info("pid=%d leaves: nobody was here for %g s", os.getpid(), self.linger_s)
        self._join_lock = join        # held until the process is gone
        self.leaving = True

    def close(self) -> None:
        """Ends everything that was started, and leaves no process, socket or segment."""
        if self._life.fd >= 0:
            # Only ours: the life lock is held.
            (self.directory / "socket").unlink(missing_ok=True)
        self._door.stop_listening()
        for worker in self._workers.values():
            worker.kill()
        for key in list(self._zygotes):
            self._close_zygote(key)
        # A killed process lives on until the kernel has freed its memory. Who sent us
        # down hears of it by the end of his session, which is closed below.
        deadline = time.monotonic() + ENDS_S
        for worker in self._workers.values():
            if not worker.gone(deadline - time.monotonic()):
                log.warning("worker=%d pid=%d was killed and has not ended", worker.number, worker.pid)
            worker.close()
        self._door.close()
        for session in self._sessions.values():
            session.connection.close()
            if session.pidfd >= 0:
                os.close(session.pidfd)
        self._locks.close()
        self._store.close()
        self._life.close()

    # ---- what the door asks, and whom it lets in ---------------------------------------------------

    def secret_of(self, lease: int, worker: int) -> bytes | None:
        """The lease's secret; None if there is no such lease with such a worker."""
        found = self.agent.workers.get(worker)
        if found is None or found.lease != lease or lease not in self._leases:
            return None
        return self._leases[lease].secret

    def worker_came(self, guest: Guest, hello: msg.Hello, connections: list[socket.socket]) -> None:
        """Passes a rank's connections on to its worker."""
        handle = self._workers.get(hello.worker)
        if handle is None:
            return
        session = self._sessions.get(hello.session)
        # A process can speak for its own session only; who came over TCP has
        # proved to know the lease's secret, and no pid.
        mine = session is not None and (guest.remote or session.peer_pid == guest.pid)
        connection = self.agent.attach(hello.worker, hello.lease, hello.session if mine else 0)
        if connection:
            frame = msg.pack_frame(msg.FRAME_ADOPT, msg.ADOPT_BODY.pack(hello.lease, connection, 0),
                                   descriptors=len(connections))
            if not handle.send(frame, [each.fileno() for each in connections]):
                self.agent.gone(hello.worker, connection)

    def session_came(self, guest: Guest) -> None:
        """A session begins; its join follows."""
        number, self._next_session = self._next_session, self._next_session + 1
        session = SessionHandle(number, guest.connection, peer_pid=guest.pid, where=guest.where,
                                nonces=guest.nonces, since=time.monotonic())
        if guest.pid > 0:
            try:
                session.pidfd = os.pidfd_open(guest.pid)
            except OSError as error:
                log.info("session=%d no pidfd of pid %d: %s", number, guest.pid, error)
        if session.where:
            session.sealer = Sealer(self._key, msg.ROLE_SESSION_SERVICE, session.nonces)
            session.opener = Opener(self._key, msg.ROLE_SESSION_RANK, session.nonces)
            log.info("session=%d from %s", number, session.where)
        self._sessions[number] = session
        self._selector.register(session.connection, READ, lambda mask: self._on_session(session, mask))
        if session.pidfd >= 0:
            # Its connection may live on in a child that it forked.
            self._selector.register(session.pidfd, READ, lambda _m: self._end_session(session, "its process ended"))

    def _listen(self, session: SessionHandle, request: msg.ListenRequest) -> msg.Listening:
        """Opens the door to ranks of other nodes."""
        if session.where:
            raise ServiceError("only from its own node is a service told where to listen",
                               hint="run `rfaas up --listen` there")
        path = Path(os.fsdecode(request.key_file)) if request.key_file else self._key_file
        if self._key and path != self._key_file:
            raise ServiceError(f"the service has its key in {self._key_file} already",
                               hint="use that one, or `rfaas down` first")
        key = self._key or remote.make_key(path)
        addresses = [remote.Address.parse(text, port_0=True) for text in request.addresses]
        try:
            self._door.listen_tcp(addresses, key, request.tcp)
        except OSError as error:
            raise ServiceError(str(error.strerror), hint="choose another port, or 0 for any that is free") from None
        self._key, self._key_file = key, path
        self._for_others = request
        if session.join is not None:
            self._around = node_cores.slurm_facts(
                {os.fsdecode(name): os.fsdecode(value) for name, value in session.join.environment})
        listening = tuple(map(str, self._door.addresses))
        log.info("listens at %s, with the key in %s", ", ".join(listening), path)
        return msg.Listening(request.id, listening, os.fsencode(path))

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
            self._end_session(session, str(error))
            return
        if not data:
            self._end_session(session, "it closed the connection")
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
            self._end_session(session, str(error))

    def _end_session(self, session: SessionHandle, why: str) -> None:
        if session.closed:
            return
        session.closed = True
        del self._sessions[session.number]
        self._selector.unregister(session.connection)
        session.connection.close()
        if session.pidfd >= 0:
            self._selector.unregister(session.pidfd)
            os.close(session.pidfd)
            session.pidfd = -1
        now = time.monotonic()
        log.info("session=%d ends: %s", session.number, why)
        self._manage(self.manager.session_ended(session.number, now))
        if session.holds:
            # Its own cores may be spare now, too.
            self._report_due = True

    def _send(self, session: SessionHandle | None, message: Any) -> None:
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
            self._end_session(session, str(error))
            return
        if len(session.out) > SESSION_BUFFER_BYTES:
            self._end_session(session, f"it does not read: {len(session.out)} bytes wait for it")
            return
        wanted = READ | WRITE if session.out else READ
        if self._selector.get_key(session.connection).events != wanted:
            self._selector.modify(session.connection, wanted, lambda mask: self._on_session(session, mask))

    def _handle(self, session: SessionHandle, request: msg.AnyRequest) -> None:
        now = time.monotonic()
        try:
            match request:
                case msg.Join():
                    self._joined(session, request, now)
                case _ if session.join is None:
                    raise ServiceError("a session begins with a join")
                case msg.LeaseRequest():
                    # Its cores must be locked before the book gives them out.
                    self._report(now)
                    self._manage(self.manager.demand(session.number, os.geteuid(), request, now))
                case msg.KillRequest():
                    self._send(session, msg.Done(request.id, self._kill(request)))
                case msg.ReleaseRequest():
                    self._release(session, request, now)
                case msg.StatusRequest():
                    self._send(session, msg.StatusAnswer(request.id, self.status()))
                case msg.StayRequest():
                    self.stay = True
                    self._send(session, msg.Done(request.id))
                case msg.ListenRequest():
                    self._send(session, self._listen(session, request))
                case msg.DownRequest():
                    self._send(session, msg.Done(request.id))
                    log.info("session=%d sends the service down", session.number)
                    self.leaving = True
        except (RFaaSError, ValueError) as error:
            hint = error.hint if isinstance(error, RFaaSError) else ""
            text = Exception.__str__(error)
            self._send(session, msg.Failed(request.id, text, hint))

    def _joined(self, session: SessionHandle, join: msg.Join, now: float) -> None:
        if session.join is not None:
            raise ServiceError("this session has joined already")
        if not join.observer:
            environment = {os.fsdecode(name): os.fsdecode(value) for name, value in join.environment}
            sandbox.required(Settings.load(environment).sandbox, sandbox.probe())
            if session.where:
                _check_places(join)
            session.kind = ZygoteKind.of(join, self._for_others.device if session.where else None)
        if not join.observer and not session.where:
            # Where a rank of another node runs, and beside whom, says nothing about this one.
            session.slurm = node_cores.slurm_facts(environment)
            session.rank = node_cores.Rank(
                pid=join.pid, mask=join.affinity, local_ranks=node_cores.local_ranks(environment),
                launch=node_cores.launch_key(environment, join.pid, node_cores.launcher_pid(environment, join.pid)))
        session.join = join
        self._report(now)
        view = self._node()
        self._send(session, msg.Welcome(
            join.id, session=session.number, service_pid=os.getpid(), cores=view.spare, spare=view.free,
            memory_bytes=view.memory_bytes, why_none=self._why_none,
            listen=tuple(str(address) for address in self._door.addresses),
            transports=_transports() if session.kind is not None and session.where else (),
            host=socket.gethostname()))
        if session.kind is not None and view.spare and not session.closed:
            # Warm by the time the rank asks for a lease.
            self._zygote(session.kind, now)

    # ---- the node --------------------------------------------------------------------------------

    def _node(self) -> Any:
        return next(view for view in self.manager.book.nodes if view.node == NODE)

    def _report(self, now: float) -> None:
        """Looks at the node and tells the manager what may be lent."""
        self._next_report = now + REPORT_S
        self._report_due = False
        joined = [session for session in self._sessions.values() if session.rank is not None]
        joins: list[Any] = [session.join for session in joined if session.join is not None]
        expected = 1
        if any(session.where and session.holds for session in self._sessions.values()):
            # Ranks of other nodes get what whoever opened the door lends to them.
            joins.append(self._for_others)
            expected = 0
        told = [join.lend for join in joins]
        lend = "no" if "no" in told else "yes" if "yes" in told else "auto"
        slurm = joined[0].slurm if joined else self._around
        spare = node_cores.spare_cores(
            self._facts, [session.rank for session in joined if session.rank is not None], slurm, lend=lend,
            only=tuple(dict.fromkeys(core for join in joins for core in join.cores)), lent=self._lent(),
            expected=expected)
        cores, kept, reason = list(spare.cores), dict(spare.kept), spare.reason
        # A core is locked while it is lent; to know which ones can be, we lock
        # them all for the moment that the decision takes.
        self._taking.take()
        locked = self._locks.take(cores)
        if len(locked) < len(cores):
            kept.update(dict.fromkeys(set(cores) - locked, "another service of this user lends it"))
            cores = [core for core in cores if core in locked]
            reason = "" if cores else ("another service of this user lends every spare core: wait for it, or see "
                                       "`rfaas status` in its environment")
        self._kept, self._why_none = kept, reason
        memory = node_cores.lendable_memory(self._facts, slurm, reserve=self.memory_reserve)
        self._manage(self.manager.report(NodeReport(
            node=NODE, spare=tuple(cores), memory_bytes=memory, numa=spare.numa), now))

    def _decided(self) -> None:
        """Keeps the locks of what is lent, and only those."""
        self._locks.keep_only(self._lent())
        self._taking.close()

    def _lent(self) -> set[int]:
        return {core for lease in self.manager.book.leases for core in lease.cores}

    # ---- the manager's actions -------------------------------------------------------------------

    def _manage(self, actions: Iterable[manager_core.Action]) -> None:
        now = time.monotonic()
        for action in actions:
            match action:
                case manager_core.Store(epoch=epoch):
                    self._store.keep(epoch)
                case manager_core.Granted():
                    self._grant(action, now)
                case manager_core.Refused(session=session, request=request, reason=reason):
                    self._send(self._sessions.get(session), msg.Denied(
                        request, reason, self._why_none or "ask for fewer workers, or wait longer for them"))
                case manager_core.StopWorkers(lease_id=lease, workers=seats, cause=cause, grace_s=grace):
                    if cause is Cause.RELEASED:
                        # Its rank took what it wanted; the end of the current
                        # kernel is waited for only so that its output is whole.
                        grace = agent_core.QUIT_GRACE_S
                    self._act(self.agent.stop(lease, seats, _REASONS[cause], grace, now))
                case manager_core.Notify():
                    self._notify(action)

    def _grant(self, granted: manager_core.Granted, now: float) -> None:
        session = self._sessions.get(granted.session)
        if session is None or session.kind is None:
            # It ended meanwhile; what the book knows of it ends with it.
            self._manage(self.manager.session_ended(granted.session, now))
            return
        answer = []
        started: list[agent_core.Action] = []
        for lease in granted.leases:
            # It never travels over TCP: the rank makes the same one.
            secret = (msg.lease_secret(self._key, lease.id, lease.epoch, *session.nonces) if session.where
                      else secrets.token_bytes(16))
            handle = LeaseHandle(secret, session.number, session.kind.key, hard_end=lease.hard_end)
            self._leases[lease.id] = handle
            numbers, actions = self.agent.start(lease.id, session.number,
                                                {worker.number: worker.cores for worker in lease.workers},
                                                lease.memory_per_worker, now)
            started += actions
            answer.append(msg.GrantLease(
                id=lease.id, epoch=lease.epoch, secret=b"" if session.where else secret,
                memory_bytes=lease.memory_bytes,
                workers=tuple(msg.WorkerInfo(numbers[worker.number], worker.cores) for worker in lease.workers),
                hard_end=lease.hard_end))
            self.manager.activated(lease.id, now)
            log.info("lease=%d session=%d cores=%s granted", lease.id, session.number, lease.cores)
        # Forked first: the answer's way to the rank costs no time then.
        self._act(started)
        reason = granted.reason if answer else self._why_none or granted.reason
        self._send(session, msg.Granted(granted.request, tuple(answer), reason))

    def _notify(self, notify: manager_core.Notify) -> None:
        lease = self.manager.book.lease(notify.lease_id)
        left = set() if lease is None else {worker.number for worker in lease.workers}
        if not left <= set(notify.workers):
            return                    # some stay: the others' ends say why
        why = self._failing.pop(notify.lease_id, "")
        self._send(self._sessions.get(notify.session), msg.LeaseEnded(
            notify.lease_id, "failed" if why else _REASONS[notify.cause],
            why or _why_ended(notify.lease_id, notify.cause)))

    def _release(self, session: SessionHandle, request: msg.ReleaseRequest, now: float) -> None:
        if not self.manager.owns(session.number, request.lease):
            self._send(session, msg.Done(request.id, False))
            return
        self._releasing.setdefault(request.lease, []).append((session.number, request.id))
        self._manage(self.manager.release(session.number, request.lease, now))

    def _kill(self, request: msg.KillRequest) -> bool:
        handle = self._workers.get(request.worker)
        if handle is None:
            return False
        reason = request.reason if request.reason in ("cancel", "link") else "cancel"
        killed, actions = self.agent.kill(request.worker, request.lease, reason, request.invocation,
                                          handle.read_page())
        log.info("lease=%d worker=%d kill (%s) invocation=%d: %s", request.lease, request.worker, request.reason,
                 request.invocation, killed)
        self._act(actions)
        return killed

    # ---- the agent's actions ---------------------------------------------------------------------

    def _act(self, actions: Iterable[agent_core.Action]) -> None:
        for action in actions:
            match action:
                case agent_core.Fork():
                    self._fork(action)
                case agent_core.Kill(worker=number):
                    if number in self._workers:
                        self._workers[number].kill()
                case agent_core.Quit(worker=number):
                    if number in self._workers:
                        self._workers[number].send(msg.pack_frame(msg.FRAME_QUIT))
                case agent_core.Tell(sessions=sessions, event=event):
                    for number in sessions:
                        self._send(self._sessions.get(number), event)
                case agent_core.Meter():
                    pid = self._workers[action.worker].pid if action.worker in self._workers else 0
                    self._store.used(lease=action.lease, worker=action.worker, pid=pid, cores=action.cores,
                                     held_s=action.held_s, cpu_s=action.cpu_s, exec_ns=action.exec_ns,
                                     poll_ns=action.poll_ns, count=action.count)
                case agent_core.Close(worker=number):
                    self._close_worker(number)
                case agent_core.Stopped(lease=lease, seat=seat):
                    self._stopped(lease, seat)

    def _stopped(self, lease: int, seat: int) -> None:
        now = time.monotonic()
        if not self.agent.seats_of(lease):
            self._leases.pop(lease, None)
            self._failing.pop(lease, None)
            for number, request in self._releasing.pop(lease, []):
                self._send(self._sessions.get(number), msg.Done(request))
            log.info("lease=%d ended", lease)
        self._manage(self.manager.stopped(lease, seat, now))

    def _zygote(self, kind: ZygoteKind, now: float) -> ZygoteHandle:
        key = kind.key
        zygote = self._zygotes.get(key)
        if zygote is None:
            zygote = self._zygotes[key] = ZygoteHandle(kind, now)
            self._selector.register(zygote.channel, READ, lambda _m: self._on_zygote(key, zygote))
            self._selector.register(zygote.errors, READ, lambda _m: self._on_zygote_errors(zygote))
            log.info("zygote=%s pid=%d started for %s", key, zygote.pid, os.fsdecode(kind.executable))
        return zygote

    def _fork(self, order: agent_core.Fork) -> None:
        now = time.monotonic()
        lease = self._leases.get(order.lease)
        session = None if lease is None else self._sessions.get(lease.session)
        try:
            if lease is None:
                raise ServiceError(f"lease {order.lease} is gone")
            zygote = self._zygotes.get(lease.zygote_key)
            if zygote is None:
                if session is None or session.kind is None:
                    raise ServiceError(f"the session of lease {order.lease} is gone")
                zygote = self._zygote(session.kind, now)
            handle = WorkerHandle.fork(zygote, order.worker, order.lease, order.cores, order.memory_bytes, now)
        except (OSError, ServiceError) as error:
            log.error("lease=%d worker=%d could not be started: %s", order.lease, order.worker, error)
            self._fail_lease(order.lease, f"worker {order.worker} could not be started: {error}")
            self._act(self.agent.ended(order.worker, Exit(lost=True), agent_core.Page(), now))
            return
        self._workers[order.worker] = handle
        lease.workers.add(order.worker)
        self._selector.register(handle.agent, READ, lambda _m: self._on_agent_socket(handle))
        self._selector.register(handle.output, READ, lambda _m: self._on_output(handle))

    def _fail_lease(self, lease: int, why: str) -> None:
        if lease in self._leases and lease not in self._failing:
            self._failing[lease] = why
            self._manage(self.manager.revoke(lease, time.monotonic()))

    def _close_worker(self, number: int) -> None:
        handle = self._workers.pop(number, None)
        if handle is None:
            return
        now = time.monotonic()
        zygote = handle.zygote
        zygote.workers.discard(number)
        if not zygote.workers:
            zygote.idle_since = now
        if handle.lease in self._leases:
            self._leases[handle.lease].workers.discard(number)
        for what in (handle.agent, handle.output, *((handle.pidfd,) if handle.pidfd >= 0 else ())):
            self._unregister(what)
        handle.close()

    def _unregister(self, what: Any) -> None:
        try:
            self._selector.unregister(what)
        except KeyError:
            return                    # at its end already

    # ---- workers ---------------------------------------------------------------------------------

    def _on_agent_socket(self, handle: WorkerHandle) -> None:
        try:
            data = handle.agent.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # It is ending, and its zygote says how; unless a kernel has closed all that there was.
            self._unregister(handle.agent)
            if not handle.ending():
                self._act(self.agent.cut_off(handle.number))
            return
        now = time.monotonic()
        try:
            for frame in handle.frames.feed(data):
                match frame.type:
                    case msg.FRAME_READY:
                        self._act(self.agent.ready(handle.number))
                    case msg.FRAME_LIMITS:
                        self.agent.limits(handle.number, now)
                    case msg.FRAME_GONE if len(frame.body) >= msg.GONE_BODY.size:
                        connection, refused = msg.GONE_BODY.unpack_from(frame.body)
                        self.agent.gone(handle.number, connection)
                        if refused:
                            self._refused += refused
                            log.warning("worker=%d connection=%d refused=%d: what made no sense",
                                        handle.number, connection, refused)
                    case _:
                        raise ServiceError(f"a frame of type {frame.type}")
        except ServiceError as error:
            # Only a kernel that wrote where it should not gets us here.
            log.error("worker=%d says what makes no sense (%s); it is killed", handle.number, error)
            self._unregister(handle.agent)
            handle.kill()

    def _on_output(self, handle: WorkerHandle) -> None:
        data, ended = handle.read_output()
        if data:
            self._show(handle, handle.lines.feed(data, time.monotonic()))
        if ended:
            self._unregister(handle.output)

    def _show(self, handle: WorkerHandle, lines: list[str]) -> None:
        if not lines:
            return
        event = msg.Log(handle.lease, handle.number, tuple(lines))
        for number in self.agent.output(handle.number, lines):
            session = self._sessions.get(number)
            if session is None:
                continue
            if len(session.out) > LOG_BUFFER_BYTES:
                session.dropped_lines += len(lines)
                continue
            if session.dropped_lines:
                note = f"({session.dropped_lines} lines are left out: this rank did not read them in time)"
                session.dropped_lines = 0
                self._send(session, msg.Log(handle.lease, handle.number, (note,)))
            self._send(session, event)

    def _worker_ended(self, number: int, how: Exit) -> None:
        """Its process is gone: show what it still said, then decide."""
        handle = self._workers.get(number)
        if handle is None:
            return
        now = time.monotonic()
        while True:
            data, ended = handle.read_output()
            self._show(handle, handle.lines.feed(data, now))
            if ended or not data:
                break
        self._show(handle, handle.lines.flush())
        log.info("lease=%d worker=%d pid=%d ended: signal=%d exit_code=%d", handle.lease, number, handle.pid,
                 how.signal, how.exit_code)
        self._act(self.agent.ended(number, how, handle.read_page(), now))

    # ---- zygotes ---------------------------------------------------------------------------------

    def _on_zygote(self, key: str, zygote: ZygoteHandle) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(zygote.channel, 1 << 16, 1)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self._zygote_ended(key, zygote)
            return
        match msg.unpack_from_zygote(data):
            case msg.ZygoteReady(sandbox=level):
                zygote.sandbox = level
                zygote.became_ready()
                log.info("zygote=%s pid=%d ready, sandbox %s", key, zygote.pid, sandbox.level_text(level))
            case msg.WorkerForked(worker=number, pid=pid):
                handle = self._workers.get(number)
                if handle is not None and fds:
                    handle.pid, handle.pidfd = pid, fds.pop()
                    self._act(self.agent.forked(number, pid))
            case msg.WorkerExited(worker=number) as exited:
                kills = oom_kills()
                oom, self._oom_kills = kills > self._oom_kills, kills
                self._worker_ended(number, Exit(exited.signal, exited.exit_code, exited.cpu_s, exited.max_rss_bytes,
                                                oom=oom))
            case msg.ZygoteProblem(worker=number, message=text):
                log.error("zygote=%s %s", key, text)
                zygote.stderr += text.encode() + b"\n"
                if number in self._workers:
                    self._fail_lease(self._workers[number].lease, text.strip().splitlines()[-1])
                    self._worker_ended(number, Exit(lost=True))
        for fd in fds:
            os.close(fd)

    def _on_zygote_errors(self, zygote: ZygoteHandle) -> None:
        said = zygote.read_errors()
        if said:
            log.warning("zygote pid=%d says: %s", zygote.pid, said.decode(errors="replace").rstrip())
        else:
            self._unregister(zygote.errors)

    def _zygote_ended(self, key: str, zygote: ZygoteHandle) -> None:
        """With it, by the kernel's hand, all of its workers."""
        was_ready = zygote.ready
        self._close_zygote(key)
        why = zygote.why()
        log.error("zygote=%s pid=%d ended: %s", key, zygote.pid, why)
        for number in list(zygote.workers):
            handle = self._workers.get(number)
            if handle is None:
                continue
            if not was_ready:
                self._fail_lease(handle.lease, f"the interpreter for workers did not start: {why}")
            if handle.gone():
                self._worker_ended(number, Exit(lost=True))
            else:
                handle.kill()
                self._selector.register(handle.pidfd, READ,
                                        lambda _m, number=number: self._worker_ended(number, Exit(lost=True)))

    def _close_zygote(self, key: str) -> None:
        zygote = self._zygotes.pop(key)
        self._unregister(zygote.channel)
        self._unregister(zygote.errors)
        zygote.close()

    # ---- status ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Facts for people and programs, all of them JSON."""
        now = time.monotonic()
        self._report(now)
        view = self._node()
        workers = []
        for number, worker in sorted(self.agent.workers.items()):
            handle = self._workers.get(number)
            page = handle.read_page() if handle is not None else agent_core.Page()
            workers.append({
                "number": number, "lease": worker.lease, "pid": worker.pid, "cores": list(worker.seat.cores),
                "state": str(worker.state), "running": page.invocation != 0, "invocations": page.count,
                "exec_ns": page.exec_ns, "poll_ns": page.poll_ns, "connections": len(worker.connections)})
        return {
            "pid": os.getpid(), "version": __version__, "uptime_s": round(now - self.started, 3),
            "directory": str(self.directory), "stay": self.stay,
            "cores": {"spare": list(view.spare), "lent": list(view.lent), "free": list(view.free),
                      "kept": {str(core): why for core, why in sorted(self._kept.items())},
                      "why_none": self._why_none},
            "memory": {"lendable_bytes": view.memory_bytes, "free_bytes": view.memory_free},
            "leases": [_lease_status(lease) for lease in self.manager.book.leases],
            "workers": workers,
            "zygotes": [{"key": key, "pid": zygote.pid, "ready": zygote.ready, "workers": len(zygote.workers),
                         "sandbox": zygote.sandbox}
                        for key, zygote in self._zygotes.items()],
            "sessions": [{"number": session.number, "pid": session.join.pid if session.join else 0,
                          "where": session.where, "age_s": round(now - session.since, 3)}
                         for session in self._sessions.values() if session.holds],
            "host": socket.gethostname(), "listen": [str(address) for address in self._door.addresses],
            "key_file": str(self._key_file) if self._key else "", "door": dict(self._door.counts),
            "refused": self._refused,
            "waiting": self.manager.waiting,
            "usage": self._store.usage(),
        }


def _lease_status(lease: Lease) -> dict[str, Any]:
    return {"id": lease.id, "epoch": lease.epoch, "session": lease.session, "state": str(lease.state),
            "cores": list(lease.cores), "memory_bytes": lease.memory_bytes, "hard_end": lease.hard_end}


def _why_ended(lease: int, cause: Cause) -> str:
    match cause:
        case Cause.REVOKED:
            return f"lease {lease} was revoked: its cores are wanted back"
        case Cause.EXPIRED:
            return f"lease {lease} came to its hard end"
        case _:
            return f"lease {lease} ended: {cause}"


def _forget_old(base: Path, ours: Path) -> None:
    """Removes the files of services that nobody has started for long: login sessions and jobs come and go."""
    for directory in base.iterdir():
        life = directory / "life.lock"
        try:
            if directory == ours or time.time() - life.stat().st_mtime < FORGET_S:
                continue
            with FileLock(directory / "join.lock") as join, FileLock(life) as lives:
                if join.take() and lives.take():
                    shutil.rmtree(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue                  # no service's directory, or another service was faster


def _check_places(join: msg.Join) -> None:
    """ServiceError unless this node has what a worker of that rank of another node is started from."""
    places = (("interpreter", join.executable, os.path.isfile), ("directory", join.directory, os.path.isdir),
              ("package rfaas_mpi", join.package, os.path.isdir))
    for what, path, there in places:
        if not there(path):
            raise ServiceError(f"{socket.gethostname()} has no {os.fsdecode(path)!r}, the rank's {what}",
                               hint="both nodes need the same files under the same paths: start the rank from a "
                                    "file system that they share")


def _transports() -> tuple[str, ...]:
    # Later, and only for ranks of other nodes: the start of a service need not wait for it.
    from rfaas_mpi import fabric
    return fabric.transports()


def _detach() -> None:
    """Becomes a child of init: whoever started us has nothing to reap, and no terminal to share."""
    if os.fork() > 0:
        os._exit(0)
    os.chdir("/")
    os.umask(0o077)


def main(argv: list[str] | None = None) -> int:
    """`python -m rfaas_mpi.service --directory D`: serves in the background until nobody is left; 0 if it did."""
    parser = argparse.ArgumentParser(prog="python -m rfaas_mpi.service", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--ready-fd", type=int, default=-1)
    parser.add_argument("--linger-s", type=float, default=2.0)
    parser.add_argument("--zygote-idle-s", type=float, default=300.0)
    parser.add_argument("--memory-reserve", type=int, default=512 << 20)
    parser.add_argument("--foreground", action="store_true")
    arguments = parser.parse_args(argv)
    ready = arguments.ready_fd

    def tell(text: bytes) -> None:
        nonlocal ready
        if ready >= 0:
            try:
                os.write(ready, text)
            except BrokenPipeError:
                log.warning("who started the service did not wait for it")
            os.close(ready)
            ready = -1

    if ready >= 0:
        os.set_inheritable(ready, False)
    if not arguments.foreground:
        _detach()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr,
                        format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
    service = Service(arguments.directory, linger_s=arguments.linger_s, zygote_idle_s=arguments.zygote_idle_s,
                      memory_reserve=arguments.memory_reserve)
    try:
        service.start()
    except (OSError, RFaaSError) as error:
        log.error("could not start: %s", error)
        tell(f"{error}\n".encode())
        return 1
    tell(b"ready\n")
    try:
        service.run()
    finally:
        service.close()
        log.info("pid=%d is gone", os.getpid())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The rank's side of a cluster: a manager that lends cores of many nodes, and a session with each node's agent.

To what is above it looks like one session with many leases (decision 0013).
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from rfaas_mpi import api, config
from rfaas_mpi import messages as msg
from rfaas_mpi.client import ManagerClient, ManagerRefused, here
from rfaas_mpi.config import Settings
from rfaas_mpi.errands import each
from rfaas_mpi.errors import (
    ClosedError,
    ConfigError,
    LeaseDenied,
    NestedError,
    RFaaSError,
    ServiceError,
    ServiceLost,
    TransportError,
)
from rfaas_mpi.messages import Grant, GrantLease, WorkerEnded
from rfaas_mpi.session import Lent, Session, check_workers

__all__ = ["ClusterSession"]

log = logging.getLogger("rfaas_mpi.cluster")

# A manager that is restarted is back within so long; until then it is asked again.
_RESTART_S = 5.0
# Where several may lead, the next one does within so long.
_TAKEOVER_S = 20.0
_AGAIN_S = 0.1
# It can't write now, or has not heard of every agent again since it was restarted.
_NOT_NOW = 503
# A manager takes a while to notice that an agent is gone: so often it is asked for another one's cores.
_ATTEMPTS = 3
# So many leases that have ended may still be asked about.
_OVER_KEPT = 256
# What was granted to an executor that closed meanwhile is given back within this, or held until it is late.
_TAKE_BACK_S = 5.0


class _Line:
    """One lease and the session with its agent, once there is one."""

    def __init__(self, lease: int, node: str) -> None:
        self.lease = lease
        self.node = node
        self.session: Session | None = None
        self.workers: set[int] = set()       # that were granted, or took another one's place
        self.ended: set[int] = set()
        self.over = False                    # its end was told
        self.why = f"lease {lease} has ended"

class ClusterSession:
    """What an executor has of a cluster: looks like a Session, with one Session for each lease behind it.

    `on_event` is called from the reader threads of those sessions, with what
    each tells, but never with ServiceEnded: an agent's end is the end of its
    lease (LeaseEnded, cause `service`) and of that lease's workers. The manager
    is only asked; it may be gone while leases are used.

    Methods raise ServiceLost where the manager or the agent that they need is
    gone, ClosedError after close().
    """

    why_none = ""
    way_out = "make a new Executor: the manager may find other nodes"

    def __init__(self, settings: Settings, client: ManagerClient,
                 on_event: Callable[[msg.AnyEvent], None] | None) -> None:
        self.settings = settings
        self.on_event = on_event
        self.closed = False
        self._client = client
        # Names this executor's requests; no other has had it.
        self._name = f"{socket.gethostname()[:80]}.{os.getpid()}.{secrets.token_hex(8)}"
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._lines: dict[int, _Line] = {}

    @classmethod
    def open(cls, settings: Settings, *, on_event: Callable[[msg.AnyEvent], None] | None = None) -> ClusterSession:
        """A session with the cluster that the settings name; nobody is asked anything yet.

        Raises ConfigError where they name a service, too, and NestedError inside a kernel.
        """
        if config.inside_worker():
            raise NestedError("an Executor can't be used inside a kernel",
                              hint="offload from the rank; a kernel computes and returns")
        if settings.service:
            raise ConfigError(f"both a manager ({settings.manager}) and a service ({settings.service}) are named",
                              hint="unset RFAAS_SERVICE to use the cluster, or RFAAS_MANAGER to use that service")
        return cls(settings, ManagerClient(settings), on_event)

    @property
    def name(self) -> str:
        """The cluster, for messages."""
        return f"the manager at {self.settings.manager}"

    @property
    def place(self) -> msg.RankAt:
        """Where this rank runs."""
        found = here(switches=self.settings.switches)
        return msg.RankAt(found.node, found.numa, found.switches)

    @property
    def spare(self) -> tuple[tuple[str, int], ...]:
        """Node and number of each core that could be lent now; asks the manager."""
        nodes = self._client.call("nodes").nodes
        return tuple((view.node, core) for view in nodes if not (view.silent or view.drained) for core in view.free)

    # ---- leases ----------------------------------------------------------------------------------

    def request(self, workers_min: int, workers_max: int, cores_per_worker: int = 1,
                memory_per_worker: int | None = None, timeout_s: float | None = None,
                ranks: Sequence[msg.RankAt] = ()) -> Grant:
        """Leases with workers_min … workers_max workers in all; waits up to `timeout_s` for cores.

        `ranks` says where those run that they are for; none: one, here.

        A lease whose agent can't be reached is given back, and the manager asked
        for what other nodes have; if that isn't enough, workers are missing, and
        where there is none at all the first agent's error is raised. Raises
        LeaseDenied where not even workers_min can be met in time, ServiceLost
        where the manager can't be reached.
        """
        if timeout_s is None:
            timeout_s = self.settings.lease_timeout_s
        check_workers(workers_min, workers_max, cores_per_worker)
        if memory_per_worker is None:
            memory_per_worker = self.settings.memory_per_worker
        first, *others = map(_place, ranks or [self.place])
        # More than a demand can name: those with most ranks count.
        others = sorted(others, key=lambda place: -place.ranks)[:api.OTHER_PLACES_MAX]
        leases: list[GrantLease] = []
        failures: list[RFaaSError] = []
        reason = ""
        for attempt in range(_ATTEMPTS):
            have = sum(len(lease.workers) for lease in leases)
            try:
                answer = self._ask(api.AskLease(
                    self._name, next(self._ids), max(0, workers_min - have), workers_max - have, cores_per_worker,
                    memory_per_worker, timeout_s if attempt == 0 else 0.0,
                    duration_s=self.settings.lease_duration_s, place=first, others=tuple(others)))
            except LeaseDenied as denied:
                if attempt == 0:
                    raise
                log.info("no other node has what is missing: %s", denied)
                break
            reason = answer.reason
            failed = self._begin_all(answer.leases, leases)
            if not failed:
                break
            failures += failed
        if failures and not leases:
            raise failures[0]
        return Grant(tuple(leases), reason or (str(failures[0]) if failures else ""))

    def _begin_all(self, lent: tuple[api.LentLease, ...], begun: list[GrantLease]) -> list[RFaaSError]:
        """Has the agents begin their leases, all at the same time, and adds them; why those failed that did."""
        failures = []
        for one, found in zip(lent, each(self._begin, lent), strict=True):
            if isinstance(found, GrantLease):
                begun.append(found)
                continue
            failures.append(found)
            # Nobody misses them who has closed meanwhile.
            log.log(logging.DEBUG if self.closed else logging.WARNING, "lease=%d node=%s %d worker(s) are missing: %s",
                    one.id, one.node, len(one.workers), found)
            self._give_up(one)
        return failures

    def _ask(self, ask: api.AskLease) -> api.LeaseGrant:
        """The manager's answer, also where it is restarted meanwhile: the same request gets the same leases."""
        since = None
        first = time.monotonic()
        while True:
            begun = time.monotonic()
            try:
                return self._client.call("ask", ask)
            except ClosedError:
                self._take_back(ask)
                raise
            except (ServiceLost, ManagerRefused) as error:
                patience = _TAKEOVER_S if "," in (self.settings.manager or "") else _RESTART_S
                if isinstance(error, ManagerRefused):
                    if error.status != _NOT_NOW:
                        raise
                    patience = self.settings.start_timeout_s
                now = time.monotonic()
                # Who has waited for long may do so again, but for no longer than was asked for in all: each
                # attempt may take its time to fail.
                if since is None or (now - begun > _RESTART_S and now - first < ask.timeout_s):
                    log.info("%s; asking again for %g s", error, patience)
                    since = now
                if now - since >= patience or self.closed:
                    raise
                time.sleep(_AGAIN_S)

    def _take_back(self, ask: api.AskLease) -> None:
        """Gives back what the manager may have granted just when this session was closed."""
        try:
            with ManagerClient(self.settings) as client:
                # The same request has the same answer.
                again = msgspec.structs.replace(ask, timeout_s=0.0)
                for lease in client.call("ask", again, wait_s=_TAKE_BACK_S).leases:
                    client.call("release", lease=lease.id, wait_s=_TAKE_BACK_S)
        except RFaaSError as error:
            log.debug("nothing is given back: %s", error)

    def _begin(self, lent: api.LentLease) -> GrantLease:
        """Has the agent begin a lease."""
        return self._open(self._add(lent.id, lent.node), lent)

    def at(self, lease: GrantLease) -> Session:
        """The session with the agent of a lease; joins a lease that another process of this user began.

        Raises as `Session.open_lease`, TransportError for a lease that has ended.
        """
        line = self._line(lease.id)
        if line is None:
            line = self._add(lease.id, "")
            self._open(line, _Held(lease))
        if line.session is None:
            raise ServiceLost(f"lease {lease.id} has not begun", hint=self.way_out)
        if line.session.closed and not self.closed:
            raise TransportError(line.why, hint=self.way_out)
        return line.session

    def _add(self, lease: int, node: str) -> _Line:
        line = _Line(lease, node)
        with self._lock:
            if self.closed:
                raise ClosedError("the executor was closed", hint="make a new Executor")
            ended = [known for known, line in self._lines.items() if line.session is not None and line.session.closed]
            for known in ended[:-_OVER_KEPT]:
                del self._lines[known]
            self._lines[lease] = line
        return line

    def _open(self, line: _Line, lent: Lent) -> GrantLease:
        """Opens a line's session and has the lease begun that it is for; no line is left where that fails."""
        session = None
        try:
            session = Session.open_lease(lent, self.settings, on_event=lambda event: self._hear(line, event),
                                         begin=True)
            lease = msgspec.structs.replace(session.use(), host=lent.host, addresses=lent.addresses)
            with self._lock:
                if self.closed:
                    raise ClosedError("the executor was closed", hint="make a new Executor")
                line.session = session
                line.workers.update(worker.number for worker in lease.workers)
        except BaseException as error:
            with self._lock:
                self._lines.pop(line.lease, None)
            if session is not None:
                session.close()
            if isinstance(error, TimeoutError):
                raise ServiceError(f"the agent of lease {line.lease} has not answered: {error}",
                                   hint=self.way_out) from error
            raise
        if session.lost:
            # While nobody knew yet what ends with it.
            self._cut(line, f"{session.name} is gone")
        self._leave_ended(line)
        return lease

    def _give_up(self, lent: api.LentLease) -> None:
        """Lets a lease go that can't be used, so that others need not wait for the end of its grant."""
        try:
            # A client of its own: the session's may be closed already.
            with ManagerClient(self.settings) as client:
                client.call("release", lease=lent.id, wait_s=_TAKE_BACK_S)
        except RFaaSError as error:
            log.debug("lease=%d not given back: %s", lent.id, error)

    def _line(self, lease: int) -> _Line | None:
        with self._lock:
            return self._lines.get(lease)

    def _session(self, lease: int) -> Session:
        line = self._line(lease)
        if line is None or line.session is None:
            raise ServiceLost(f"there is no lease {lease}", hint=self.way_out)
        return line.session

    # ---- one lease's: as Session has them ----------------------------------------------------------

    def reach(self, lease: GrantLease, worker: int, transport: str, timeout_s: float | None = None) -> tuple[int, int]:
        """The connections that a transport needs to a worker, as `Session.reach`."""
        session = self.at(lease)
        # Who leased it may have reached its agent by another way.
        return session.reach(msgspec.structs.replace(lease, endpoint=session.endpoint), worker, transport, timeout_s)

    def hold(self, lease: GrantLease) -> None:
        """This process keeps the lease, too, as `Session.hold`."""
        try:
            self.at(lease).hold(lease)
        except TransportError as error:
            raise ServiceError(f"there is no lease {lease.id} that this process could keep: {error}") from None

    def kill(self, lease: GrantLease | int, worker: int, reason: str = "cancel", invocation: int = 0) -> bool:
        """Has a worker killed, as `Session.kill`; False where its agent is gone, or its lease was given back."""
        try:
            return self._session(_number(lease)).kill(lease, worker, reason, invocation)
        except (ServiceLost, ClosedError) as error:
            log.debug("lease=%d worker=%d not killed: %s", _number(lease), worker, error)
            return False

    def release(self, lease: GrantLease | int) -> None:
        """Gives a lease back, as `Session.release`; its agent is not needed any more."""
        line = self._line(_number(lease))
        if line is not None and line.session is not None:
            line.session.release(lease)
            line.session.close()

    def verdict(self, lease: GrantLease | int, worker: int, timeout_s: float = 5.0) -> WorkerEnded:
        """How a worker ended, as `Session.verdict`."""
        line = self._line(_number(lease))
        if line is None or line.session is None:
            raise ServiceLost(f"there is no lease {_number(lease)}", hint=self.way_out)
        try:
            return line.session.verdict(lease, worker, timeout_s)
        except ClosedError:
            if self.closed:
                raise
            raise ServiceLost(line.why, hint=self.way_out) from None

    # ---- what agents tell ----------------------------------------------------------------------------

    def _hear(self, line: _Line, event: msg.AnyEvent) -> None:
        match event:
            case msg.ServiceEnded(message=message):
                self._cut(line, message)
                return
            case msg.WorkerReady(worker=worker):
                with self._lock:
                    line.workers.add(worker)
            case msg.WorkerEnded(worker=worker):
                with self._lock:
                    line.ended.add(worker)
            case msg.LeaseEnded():
                line.over = True
        self._tell(event)
        self._leave_ended(line)

    def _leave_ended(self, line: _Line) -> None:
        """Ends the session of a lease of which nothing is left: its agent leaves that to the rank."""
        with self._lock:
            session = line.session if line.over and line.workers <= line.ended else None
        if session is not None:
            session.close()

    def _cut(self, line: _Line, why: str) -> None:
        """An agent's connection ended: so has its lease, and every worker that had not before."""
        with self._lock:
            if line.session is None:
                return
            left = sorted(line.workers - line.ended)
            line.ended.update(left)
            over, line.over = line.over, True
            message = line.why = f"lease {line.lease}" + (f" on {line.node}" if line.node else "") + f" ended: {why}"
        if not over:
            self._tell(msg.LeaseEnded(line.lease, "service", message))
        for worker in left:
            self._tell(WorkerEnded(line.lease, worker, "infrastructure", "service", message=message))
        self._leave_ended(line)

    def _tell(self, event: msg.AnyEvent) -> None:
        if self.on_event is not None and not self.closed:
            self.on_event(event)

    # ---- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends all sessions; what they still hold is released. Safe to call twice."""
        with self._lock:
            self.closed = True
            sessions = [line.session for line in self._lines.values() if line.session is not None]
        self._client.close()
        for session in sessions:
            session.close()

    def __enter__(self) -> ClusterSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Held:
    """A lease that another process began, as `Session.open_lease` takes it."""

    grant = b""

    def __init__(self, lease: GrantLease) -> None:
        self.id = lease.id
        self.secret = lease.secret
        self.host = lease.host
        self.addresses = lease.addresses or (lease.endpoint,)


def _place(at: msg.RankAt) -> api.Place:
    return api.Place(node=at.node, numa=at.numa, switches=at.switches, ranks=at.ranks)


def _number(lease: GrantLease | int) -> int:
    return lease if isinstance(lease, int) else lease.id

"""The workers that an executor's leases give it: asked for, dialled, replaced, given back."""

from __future__ import annotations

import functools
import logging
import math
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from rfaas_mpi import messages as msg
from rfaas_mpi.config import Settings
from rfaas_mpi.errands import Errands, each
from rfaas_mpi.errors import (
    AuthError,
    ClosedError,
    ConfigError,
    LeaseDenied,
    LeaseExpired,
    LeaseRevoked,
    RFaaSError,
    ServiceError,
    ServiceLost,
    TransportError,
    WorkerLost,
)
from rfaas_mpi.session import Grant, GrantLease, Session, WorkerEnded

if TYPE_CHECKING:
    from rfaas_mpi.cluster import ClusterSession
    from rfaas_mpi.fabric import Channel, Invoker

__all__ = ["Lending", "choose_transport", "lost_error"]

log = logging.getLogger("rfaas_mpi.lending")

REPLACEMENT_S = 10.0
"""How long an executor without a worker waits for the replacement of the last one."""

_VERDICT_S = 5.0

# A connection over a network may end although its worker lives: looked for so
# often, and acted upon if the worker's own end is not told meanwhile.
_CHECK_S = 0.25
_BROKEN_S = 0.5
_FENCED_S = 5.0

# So often a worker is dialled again that could not be reached.
_AGAIN_S = 1.0
_WHY_S = 1.0                         # a lease whose workers can't be started ends within this

# So long after its hard end a lease has ended, whether its agent says so or not.
_OVER_S = 2.0

# So many leases and workers that have ended may still be asked about; up to twice as many are known.
_LEASES_KEPT = 256
_WORKERS_KEPT = 4096

# As many workers as an executor can have.
_WORKERS_MAX = 256


class Lending:
    """Owns the session, the leases and the channels of one executor.

    `on_end` is called, from threads of this object's own, whenever a worker has
    ended or come: what waits may then have to be looked at.

    A worker has a number of its own in this executor (the one that `workers`,
    requests and errors name): with workers of several nodes, what their agents
    call them is not unique. Where nothing speaks against it, it is the same.
    """

    def __init__(self, settings: Settings, invoker: Invoker, on_end: Callable[[], None]) -> None:
        self._invoker = invoker
        self._on_end = on_end
        # () is no news: there is something new to wait for.
        self._events: queue.SimpleQueue[msg.AnyEvent | tuple[()] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._leases: dict[int, GrantLease] = {}
        self._had: dict[int, None] = {}                  # these, and those that ended not long ago
        # By lease and the number that its agent gave the worker, as all of these.
        self._channels: dict[tuple[int, int], Channel] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._homes: dict[int, tuple[int, int]] = {}     # and back
        self._ways: dict[int, str] = {}                  # lease → transport
        self._ends: dict[int, float] = {}                # lease → its hard end, by our clock
        self._over: set[int] = set()                     # ended by us: nobody said so
        self._errands: dict[int, Errands] = {}           # where there are several leases
        # What ended, and was told to have, before we had it.
        self._early: set[tuple[int, int]] = set()
        self._early_leases: set[int] = set()
        self._leaving: set[tuple[int, int]] = set()      # their agent takes them back: they may finish
        self._awaited: dict[int, float] = {}
        self._broken: dict[tuple[int, int], float] = {}
        self._unreached: dict[tuple[int, int], float] = {}
        self._whys: dict[tuple[int, int], str] = {}
        self._own = True                                 # nobody else uses these workers
        self._keeps = True                               # the leases end no sooner than we
        # Of leases that ranks share: on which cores our workers are, who they have been, and which of those places
        # nobody but us replaces; leases of which we have nothing.
        self._only: dict[int, set[tuple[int, ...]]] = {}
        self._mine: dict[tuple[int, int], tuple[int, ...]] = {}
        self._owned: set[tuple[int, tuple[int, ...]]] = set()
        self._left: frozenset[int] = frozenset()
        self._closed = False
        self.memory_limit = 0
        self.alone = True
        self.why: RFaaSError | None = None
        self._settings = settings
        self.session = _open_session(settings, self._events.put)
        self._way = settings.transport
        if isinstance(self.session, Session):
            try:
                self._way = self._choose(self.session)
            except BaseException:
                self.session.close()
                raise
        self._thread = threading.Thread(target=self._run, name="rfaas-lending", daemon=True)
        self._thread.start()

    # -- getting workers -------------------------------------------------------------------------

    def hire(self, workers_min: int, workers_max: int | None, cores_per_worker: int,
             memory_per_worker: int | None) -> None:
        """Asks for workers and connects to those that are granted.

        `workers_max=None` asks for all that are spare now. Raises LeaseDenied
        where fewer than `workers_min` can be had, ServiceError and
        TransportError where the service fails.
        """
        self._accept(self.ask(workers_min, workers_max, cores_per_worker, memory_per_worker))

    def ask(self, workers_min: int, workers_max: int | None, cores_per_worker: int, memory_per_worker: int | None,
            ranks: Sequence[msg.RankAt] = (), timeout_s: float | None = None) -> Grant:
        """Asks for workers, for the ranks that are there (none: for this one); connects to none yet. Raises as `hire`.
        """
        count = sum(at.ranks for at in ranks) or 1
        most = _WORKERS_MAX * count
        if workers_min > most:
            raise LeaseDenied(f"{workers_min} workers are more than "
                              + (f"{count} ranks" if count > 1 else "an executor") + f" can have ({most})",
                              hint="share the work between several executors")
        if workers_max is None:
            workers_max = max(1, workers_min, len(self.session.spare) // cores_per_worker)
        most = min(workers_max, most)
        if isinstance(self.session, Session):
            # All that it has is at one place.
            return self.session.request(workers_min, most, cores_per_worker, memory_per_worker, timeout_s)
        return self.session.request(workers_min, most, cores_per_worker, memory_per_worker, timeout_s, ranks)

    def more(self, workers: int, cores_per_worker: int, memory_per_worker: int | None) -> int:
        """Connects to so many more workers, or as many as can be had now; how many. Raises as `hire`."""
        workers = min(workers, _WORKERS_MAX - len(self.workers))
        if workers < 1:
            return 0
        grant = self.ask(0, workers, cores_per_worker, memory_per_worker, timeout_s=0.0)
        if grant.leases:
            self._accept(grant)
        return len(grant.workers)

    def give_back(self, workers: int) -> int:
        """Gives whole leases back with at most so many workers, the newest first; how many. None that ranks share.

        What these run has the time that a release gives it; what they have not begun runs elsewhere.
        """
        with self._lock:
            count: dict[int, int] = dict.fromkeys((lease for lease in self._leases if lease not in self._only), 0)
            for lease, _ in self._channels:
                if lease in count:
                    count[lease] += 1
            chosen: list[int] = []
            left = workers
            for lease in reversed(count):
                if 0 < count[lease] <= left:
                    chosen.append(lease)
                    left -= count[lease]
            for lease in chosen:
                del self._leases[lease]
            going = [(key, channel) for key, channel in self._channels.items() if key[0] in chosen]
            self._leaving.update(key for key, _ in going)
        for _, channel in going:
            channel.drain()
        for lease, failure in zip(chosen, each(self.session.release, chosen), strict=True):
            if failure is not None:
                log.debug("lease=%d not released: %s", lease, failure)
            if (errands := self._errands.pop(lease, None)) is not None:
                errands.close()
        # Now, and not when their ends are told: whoever counts workers must not count these.
        with self._lock:
            for key, _ in going:
                self._channels.pop(key, None)
        for _, channel in going:
            channel.close()
        self._look()
        return workers - left

    def join(self, grant: Grant) -> None:
        """Connects to the workers of a lease that another process of this user holds and releases."""
        self._own = self._keeps = False
        self._accept(grant)

    def take(self, part: Grant, owned: Collection[tuple[int, int]] = (), whole: Grant | None = None) -> None:
        """Connects to the workers of a part of what another rank leased for all, and keeps those leases, too.

        `owned` names those of its workers (by lease and number) that nobody but this rank is to have replaced by
        others; `whole` is what this process leased for all, if it did. Raises ServiceError for a lease that has
        ended meanwhile, and as `hire`.
        """
        with self._lock:
            self._only = {lease.id: {worker.cores for worker in lease.workers} for lease in part.leases}
            self._mine = {(lease.id, worker.number): worker.cores for lease in part.leases for worker in lease.workers}
            self._owned = {(key[0], cores) for key, cores in self._mine.items() if key in owned}
            if whole is not None:
                self._left = frozenset(lease.id for lease in whole.leases) - set(self._only)
        for failure in each(self.session.hold, part.leases):
            if failure is not None:
                raise failure
        self._accept(part)

    def leave_to_others(self) -> None:
        """Lets go of the leases that this process asked for and of which it has no worker."""
        for lease in sorted(self._left):
            self.session.release(lease)

    def _accept(self, grant: Grant) -> None:
        if not grant.leases:
            reason = grant.reason or self.session.why_none or "no core is spare"
            self.why = WorkerLost(f"no worker was lent: {reason}")
            self._look()
            return
        limits = [lease.memory_per_worker for lease in grant.leases]
        self.memory_limit = min([*limits, self.memory_limit] if self.memory_limit else limits)
        with self._lock:
            several = len(grant.leases) > 1 or bool(self._leases)
            for lease in grant.leases:
                self._had[lease.id] = None
                if lease.id not in self._early_leases:
                    self._leases[lease.id] = lease
                    if lease.ends_in_s is not None:
                        self._ends[lease.id] = time.monotonic() + lease.ends_in_s
                if several:
                    self._errands[lease.id] = Errands(f"rfaas-lease-{lease.id}")
            self._forget()
        self._events.put(())
        for lease, failure in zip(grant.leases, each(self._connect, grant.leases), strict=True):
            if failure is None:
                continue
            if not self._channels or isinstance(failure, ConfigError):
                cause = self._cause(lease, failure)
                raise cause from (None if cause is failure else failure)
            log.warning("lease=%d not every worker was reached: %s", lease.id, failure)
        self._look()

    def _forget(self) -> None:
        """Drops what is known of leases and workers that ended long ago. The caller holds the lock."""
        if len(self._had) > 2 * _LEASES_KEPT:
            live = {*self._leases, *self._only, *(lease for lease, _ in self._channels)}
            for lease in [lease for lease in self._had if lease not in live][:-_LEASES_KEPT]:
                self._way = self._ways.pop(lease, self._way)
                for by_lease in (self._had, self._ends, self._awaited, self._errands):
                    by_lease.pop(lease, None)
                self._over.discard(lease)
                self._early_leases.discard(lease)
        if len(self._numbers) > 2 * _WORKERS_KEPT:
            there = {*self._channels, *self._unreached}
            for key in [key for key in self._numbers if key not in there][:-_WORKERS_KEPT]:
                del self._homes[self._numbers.pop(key)]
                for by_worker in (self._whys, self._mine):
                    by_worker.pop(key, None)
                self._early.discard(key)
                self._leaving.discard(key)

    def _cause(self, lease: GrantLease, failure: RFaaSError) -> RFaaSError:
        """Why a lease's workers can't be reached: they could not be started, if that is told within a moment."""
        deadline = time.monotonic() + _WHY_S
        while isinstance(failure, TransportError) and time.monotonic() < deadline:
            with self._lock:
                if lease.id not in self._leases and self.why is not None:
                    return self.why
            time.sleep(0.005)
        return failure

    def _connect(self, lease: GrantLease) -> RFaaSError | None:
        """Connects to all workers of a lease; why one of them was not reached."""
        failure, connected = self._dial_all(lease)
        if (isinstance(failure, TransportError) and not connected and self._way_to(lease) == "verbs"
                and self._settings.transport == "auto"):
            log.warning("invocations travel over tcp, because verbs does not reach a worker: %s", failure)
            with self._lock:
                self._ways[lease.id] = "tcp"
            failure, _ = self._dial_all(lease)
        return failure

    def _dial_all(self, lease: GrantLease) -> tuple[RFaaSError | None, bool]:
        """Why a worker was not reached, and whether another one was."""
        dialled = []
        failure: RFaaSError | None = None
        connected = False
        for worker in lease.workers:
            try:
                dialled.append((worker.number, self._reach(lease, worker.number)))
            except (TransportError, AuthError, ServiceLost) as error:
                failure = error
                self._dial_later(lease, worker.number)
        for number, fds in dialled:
            try:
                self._attach(lease, number, fds)
                connected = True
            except TransportError as error:
                failure = error
                self._dial_later(lease, number)
        return failure, connected

    def _dial_later(self, lease: GrantLease, worker: int) -> bool:
        """Has a worker dialled again that could not be reached; True if it was not to be before."""
        with self._lock:
            first = (lease.id, worker) not in self._unreached
            self._unreached[lease.id, worker] = time.monotonic() + _AGAIN_S
        return first

    def _way_to(self, lease: GrantLease) -> str:
        """How invocations travel to the workers of a lease."""
        with self._lock:
            found = self._ways.get(lease.id)
        if found is None:
            found = self._choose(self.session.at(lease))
            with self._lock:
                found = self._ways.setdefault(lease.id, found)
        return found

    def _choose(self, session: Session) -> str:
        return choose_transport(self._settings.transport, session, strict=self._settings.sandbox == "strict")

    def _reach(self, lease: GrantLease, worker: int) -> tuple[int, int]:
        return self.session.reach(lease, worker, self._way_to(lease))

    def _attach(self, lease: GrantLease, worker: int, fds: tuple[int, int]) -> None:
        control, data = fds
        settings = self._settings
        number = self._number(lease.id, worker)
        with self._lock:
            invoker, closed = self._invoker, self._closed
        if closed:
            for fd in fds:
                if fd >= 0:
                    os.close(fd)
            raise ClosedError("the executor was closed", hint="make a new Executor")
        channel = invoker.attach(control, lease=lease.id, worker=number, transport=self._way_to(lease), data_fd=data,
                                 integrity=settings.integrity, device=settings.device,
                                 timeout_s=settings.start_timeout_s)
        with self._lock:
            self._unreached.pop((lease.id, worker), None)
            # It may have ended, and its end been told, before we had it.
            if (lease.id, worker) not in self._early:
                self._channels[lease.id, worker] = channel
                self.alone = False

    def _number(self, lease: int, worker: int) -> int:
        """The number that a worker has in this executor, for good."""
        with self._lock:
            found = self._numbers.get((lease, worker))
            if found is None:
                found = worker if worker not in self._homes else max(self._homes) + 1
                self._numbers[lease, worker] = found
                self._homes[found] = lease, worker
            return found

    @property
    def transport(self) -> str:
        """How invocations travel; with workers on several nodes perhaps in two ways, as in "shm+tcp"."""
        with self._lock:
            return "+".join(sorted(set(self._ways.values()))) or self._way

    @property
    def service(self) -> str:
        """Who lends: ranks that are to share workers have the same."""
        if isinstance(self.session, Session) and not self.session.remote:
            return f"{self.session.home} on {socket.gethostname()}"
        return self.session.name

    @property
    def host(self) -> str:
        """Where the workers are of a lease that doesn't say so itself."""
        return getattr(self.session, "host", "") or socket.gethostname()

    @property
    def place(self) -> msg.RankAt:
        """Where this rank runs."""
        return msg.RankAt(socket.gethostname()) if isinstance(self.session, Session) else self.session.place

    @property
    def grant(self) -> Grant:
        """The leases, for `join` in another process."""
        with self._lock:
            return Grant(tuple(self._leases.values()))

    @property
    def workers(self) -> list[int]:
        """Numbers of the workers that are there now."""
        with self._lock:
            return sorted(self._numbers[key] for key, channel in self._channels.items() if channel.alive)

    @property
    def ends_at(self) -> float:
        """When the last of the workers that are there now has to be gone (time.monotonic); infinity: not known."""
        with self._lock:
            return max((self._ends.get(lease, math.inf) for (lease, _), channel in self._channels.items()
                        if channel.alive), default=math.inf)

    @property
    def seats(self) -> int:
        """How many workers there are or will be: one that ended under a lease that lives is replaced."""
        return sum(self._seats().values())

    @property
    def shared_seats(self) -> int:
        """How many of them are of leases that ranks share."""
        return sum(count for lease, count in self._seats().items() if lease in self._only)

    @property
    def lost_seats(self) -> int:
        """How many of those that nobody but this process may have replaced by others are gone, each with its lease."""
        with self._lock:
            there = {(key[0], self._mine.get(key)) for key in (*self._channels, *self._unreached)
                     if key not in self._leaving}
            return sum(lease not in self._leases or (lease not in self._awaited and (lease, cores) not in there)
                       for lease, cores in self._owned)

    def _seats(self) -> dict[int, int]:
        with self._lock:
            connected = dict.fromkeys(self._leases, 0)
            for key in self._channels:
                if key[0] in connected and key not in self._leaving:
                    connected[key[0]] += 1
            return {lease: len(self._leases[lease].workers) if lease in self._awaited else count
                    for lease, count in connected.items()}

    # -- what the requests ask ---------------------------------------------------------------------

    def verdict(self, raw: Any) -> WorkerEnded:
        """How the worker of an invocation ended.

        Never raises: what can't be known any more counts as infrastructure's.
        """
        lease, worker = self._home(raw)
        with self._lock:
            told = lease not in self._over
        try:
            return self._explained(self.session.verdict(lease, worker, _VERDICT_S if told else 0.0))
        except TimeoutError:
            if not told:
                return WorkerEnded(lease, raw.worker, "infrastructure", "expired", message=_untold(lease))
            return self._explained(WorkerEnded(lease, worker, "infrastructure", "link"))
        except (ServiceLost, ClosedError) as error:
            return WorkerEnded(lease, raw.worker, "infrastructure", "service", message=str(error))

    def _explained(self, ended: WorkerEnded) -> WorkerEnded:
        """The same for this executor's user, with what broke the connection where that ended the worker."""
        message = self._broke(ended.lease, ended.worker) if ended.reason == "link" else ended.message
        return msgspec.structs.replace(ended, worker=self._number(ended.lease, ended.worker), message=message)

    def _broke(self, lease: int, worker: int) -> str:
        with self._lock:
            why = self._whys.get((lease, worker), "")
        return (f"the connection to worker {self._number(lease, worker)} of lease {lease} broke"
                + (f": {why}" if why else ""))

    def kill(self, raw: Any) -> bool:
        """Has the worker killed that runs this invocation; False if none does so now."""
        lease, worker = self._home(raw)
        return self.session.kill(lease, worker, "cancel", raw.id)

    def give_up(self, raw: Any) -> None:
        """Has done with the worker that an invocation was given to, whatever it does: it is replaced.

        Over a network the connection is ended, which needs nobody's help; on shared
        memory only a worker's end keeps it from writing.
        """
        lease, worker = home = self._home(raw)
        with self._lock:
            channel = self._channels.get(home)
            shared = self._ways.get(lease, self._way) == "shm"
        if channel is None:
            return
        if shared and self._alone_with(lease):
            self.session.kill(lease, worker, "link")
        else:
            # Not closed: that gives it two seconds to let go by itself.
            channel.kill()

    def _home(self, raw: Any) -> tuple[int, int]:
        """Lease and number of the worker that an invocation was given to last."""
        with self._lock:
            return self._homes.get(raw.worker, (0, raw.worker))

    # -- the thread that hears the service ---------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=self._patience())
            except queue.Empty:
                self._pass_time()
                continue
            if event is None:
                return
            if isinstance(event, tuple):
                continue
            try:
                self._handle(event)
            except Exception:
                # Later events concern other workers and must still be heard.
                log.exception("could not handle %s", type(event).__name__)

    def _patience(self) -> float | None:
        with self._lock:
            times = [until - time.monotonic() for until in self._awaited.values()]
            if self._networked:
                times.append(_CHECK_S)
            if self._ends:
                times.append(min(self._ends.values()) + _OVER_S - time.monotonic())
            return max(0.0, min(times)) if times else None

    def _pass_time(self) -> None:
        now = time.monotonic()
        with self._lock:
            overdue = any(until <= now for until in self._awaited.values())
        if overdue:
            self._look()
        self._end_overdue(now)
        self._mend()
        self._try_again(now)

    def _end_overdue(self, now: float) -> None:
        """Ends leases whose hard end has passed, and whose agent, frozen or cut off, ended nothing."""
        with self._lock:
            overdue = [lease for lease, at in self._ends.items() if at + _OVER_S <= now]
            for lease in overdue:
                del self._ends[lease]
            self._over.update(overdue)
            live = [lease for lease in overdue if lease in self._leases]
            channels = [channel for (lease, _), channel in self._channels.items() if lease in overdue]
        for lease in live:
            self._handle(msg.LeaseEnded(lease, "expired", _untold(lease)))
        for channel in channels:
            channel.kill()
            channel.close()
        if channels:
            self._look()

    @property
    def _networked(self) -> bool:
        """True if a worker is reached by what may end although the worker lives."""
        # It decides how long to sleep, also before there is a lease.
        return any(way != "shm" for way in self._ways.values() or (self._way,))

    def _have_done(self, what: str, lease: int, worker: int, act: Callable[[], object]) -> None:
        """Does what may have to wait for a lease's agent, without keeping other leases' events waiting."""
        def attempt() -> None:
            try:
                act()
            except (RFaaSError, TimeoutError) as error:
                log.debug("lease=%d worker=%d %s: %s", lease, worker, what, error)

        errands = self._errands.get(lease)
        if errands is None:
            attempt()
        else:
            errands.do((what, worker), attempt)

    def _try_again(self, now: float) -> None:
        """Dials workers that could not be reached: a link that is down may come up again."""
        with self._lock:
            self._unreached = {key: at for key, at in self._unreached.items()
                               if key[0] in self._leases and key not in self._early and not self._closed}
            due = [(self._leases[lease], worker) for (lease, worker), at in self._unreached.items() if at <= now]
        for lease, worker in due:
            self._have_done("dial", lease.id, worker, functools.partial(self._dial_new, lease, worker))

    def _mend(self) -> None:
        """Replaces workers whose connection ended without them: over a network that happens."""
        now = time.monotonic()
        with self._lock:
            if self._closed or not self._networked:
                return
            self._broken = {key: self._broken.get(key, now) for key, channel in self._channels.items()
                            if not channel.alive and key[0] in self._leases and self._ways[key[0]] != "shm"
                            and key not in self._leaving}
            # Once it is fenced it is known what broke it, which is soon.
            overdue = [key for key, since in self._broken.items()
                       if now - since >= (_BROKEN_S if self._channels[key].fenced else _FENCED_S)]
            for key in overdue:
                self._broken[key] = now
                self._whys[key] = self._channels[key].why
        for lease, worker in overdue:
            log.warning("lease=%d worker=%d is replaced: %s", lease, worker, self._broke(lease, worker))
            if self._alone_with(lease):
                # It may still run what is run elsewhere now. Its successor is told as any other.
                self._have_done("mend", lease, worker, functools.partial(self.session.kill, lease, worker, "link"))
            else:
                self._have_done("mend", lease, worker, functools.partial(self._dial_again, lease, worker))

    def _alone_with(self, lease: int) -> bool:
        """True if no other process uses the workers of this lease."""
        return self._own and lease not in self._only

    def _dial_again(self, lease: int, worker: int) -> None:
        """Another connection to a worker that belongs to another process."""
        with self._lock:
            broken, grant = self._channels.pop((lease, worker), None), self._leases.get(lease)
            if grant is not None:
                # Meanwhile it is not gone.
                self._awaited[lease] = time.monotonic() + REPLACEMENT_S
        if broken is not None:
            broken.close()
        if grant is None:
            return
        try:
            self._attach(grant, worker, self._reach(grant, worker))
        except RFaaSError as error:
            with self._lock:
                self._whys[lease, worker] = str(error)
            self._bury(WorkerEnded(lease, worker, "infrastructure", "link"))
        else:
            with self._lock:
                self._come(lease)
        self._look()

    def _come(self, lease: int) -> None:
        """A worker of the lease is there: no other one is awaited if all are. The caller holds the lock."""
        found = self._leases.get(lease)
        there = sum(key[0] == lease and key not in self._leaving for key in self._channels)
        if found is None or there >= len(found.workers):
            self._awaited.pop(lease, None)

    def _handle(self, event: msg.AnyEvent) -> None:
        if isinstance(event, (msg.Log, msg.WorkerReady, msg.WorkerEnded)) and not self._concerns(event):
            return
        match event:
            case msg.Log():
                self._print(event)
            case msg.Revoking():
                self._use_no_more(event)
            case msg.WorkerReady():
                self._replace(event)
            case msg.WorkerEnded():
                self._bury(event)
            case msg.LeaseEnded():
                with self._lock:
                    self._drop(event.lease)
                    self._awaited.pop(event.lease, None)
                    self.why = lease_error(event)
                self._look()
            case msg.ServiceEnded():
                with self._lock:
                    self._leases.clear()
                    self._awaited.clear()
                    self.why = ServiceLost(event.message or "the service ended", hint=self.session.way_out)
                    channels = list(self._channels.values())
                # Its workers end with it; one that is stopped would only notice later,
                # and keep what it was given in flight until then.
                for channel in channels:
                    channel.kill()
                    channel.close()
                self._look()

    def _concerns(self, event: msg.Log | msg.WorkerReady | msg.WorkerEnded) -> bool:
        """Whether it is about a worker of ours, and not another rank's of the same lease."""
        with self._lock:
            if isinstance(event, msg.WorkerReady) and event.cores in self._only.get(event.lease, ()):
                self._mine[event.lease, event.worker] = event.cores
            if event.lease in self._only:
                return (event.lease, event.worker) in self._mine
            return event.lease not in self._left

    def _drop(self, lease: int) -> None:
        """The lease has ended, perhaps before its grant is looked at. The caller holds the lock."""
        self._ends.pop(lease, None)
        if self._leases.pop(lease, None) is None:
            self._early_leases.add(lease)

    def _print(self, event: msg.Log) -> None:
        if sys.stderr is not None:
            number = self._number(event.lease, event.worker)
            sys.stderr.write(msg.log_text(msgspec.structs.replace(event, worker=number)))
            sys.stderr.flush()

    def _use_no_more(self, event: msg.Revoking) -> None:
        """Sends nothing more to workers that end soon. What they have already ends with them at the latest."""
        with self._lock:
            self._leaving.update((event.lease, worker) for worker in event.workers)
            channels = [self._channels.get((event.lease, worker)) for worker in event.workers]
        for channel in channels:
            if channel is not None:
                channel.drain()
        self._look()

    def _replace(self, event: msg.WorkerReady) -> None:
        with self._lock:
            lease = self._leases.get(event.lease)
            if lease is None or self._closed:
                return
        self._have_done("dial", lease.id, event.worker, functools.partial(self._dial_new, lease, event.worker))

    def _dial_new(self, lease: GrantLease, worker: int) -> None:
        """Connects to a worker that took another one's place, now or later."""
        try:
            self._attach(lease, worker, self._reach(lease, worker))
        except RFaaSError as error:
            log.log(logging.WARNING if self._dial_later(lease, worker) else logging.DEBUG,
                    "lease=%d worker=%d can't be reached: %s", lease.id, worker, error)
            return
        with self._lock:
            self._come(lease.id)
        self._look()

    def _bury(self, event: WorkerEnded) -> None:
        told = self._explained(event)
        with self._lock:
            channel = self._channels.pop((event.lease, event.worker), None)
            self._unreached.pop((event.lease, event.worker), None)
            self._leaving.discard((event.lease, event.worker))
            if channel is None:
                self._early.add((event.lease, event.worker))
            if event.reason == "released":
                # By another process: it leased what this one joined.
                self._drop(event.lease)
            if event.lease in self._leases:
                self._awaited[event.lease] = time.monotonic() + REPLACEMENT_S
            self._forget()
            # A lease that has ended already said why, for all of its workers.
            if self.why is None or (isinstance(self.why, WorkerLost) and event.lease in self._leases):
                self.why = lost_error(told)
        if channel is not None:
            if event.reason == "service":
                # Its agent is gone, and with it the worker; one that is stopped would only notice later.
                channel.kill()
            channel.close()
        self._look()

    def _look(self) -> None:
        """Decides whether anybody is left to wait for."""
        with self._lock:
            if self._closed:
                return
            now = time.monotonic()
            for lease, until in list(self._awaited.items()):
                if until <= now:
                    del self._awaited[lease]
            # One that has ended under a lease that lives is replaced, once its end is told.
            there = any(channel.alive or lease in self._leases for (lease, _), channel in self._channels.items())
            self.alone = not there and not self._awaited
            alone = self.alone
        if alone:
            self._invoker.abandon()
        self._invoker.wake()
        self._on_end()

    # -- the end -------------------------------------------------------------------------------------

    def release(self) -> None:
        """Gives the leases back; returns when their workers' last lines are printed, or soon after."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            leases = list(self._leases)
            self._awaited.clear()
        if self._keeps:
            for lease, failure in zip(leases, each(self.session.release, leases), strict=True):
                if isinstance(failure, ServiceError):
                    log.debug("lease=%d not released: %s", lease, failure)
                elif failure is not None:
                    raise failure

    def detach(self, invoker: Any) -> None:
        """Lets go of a data plane that was closed."""
        self._invoker = invoker

    def close(self) -> None:
        """Ends the session. Safe to call twice."""
        self.release()
        self.session.close()
        for errands in list(self._errands.values()):
            errands.close()
        self._events.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(2.0)
        with self._lock:
            self._channels.clear()
            self.alone = True


def _open_session(settings: Settings, on_event: Callable[[msg.AnyEvent], None]) -> Session | ClusterSession:
    """The session that the settings ask for: with a manager's cluster, or with one service."""
    if settings.manager is None:
        return Session.open(settings, on_event=on_event)
    # What only ranks of a cluster need: no other waits for its import.
    from rfaas_mpi.cluster import ClusterSession
    return ClusterSession.open(settings, on_event=on_event)


def choose_transport(wanted: str, session: Session, *, strict: bool = False) -> str:
    """How invocations travel to the workers of a session, for a setting that may say "auto".

    `strict` is the sandbox that keeps workers from devices. Raises ConfigError for a transport that can't be used.
    """
    if not session.remote and wanted in ("auto", "shm"):
        return "shm"
    from rfaas_mpi import fabric
    here = fabric.transports()
    if wanted == "auto":
        return "verbs" if "verbs" in here and "verbs" in session.transports and not strict else "tcp"
    if wanted == "shm":
        raise ConfigError(f"transport shm is for workers of this node, and {session.name} is another one's",
                          hint="leave the transport to auto, or choose tcp or verbs")
    if wanted == "tcp" and not (session.remote or session.listen):
        raise ConfigError("transport tcp needs a service that listens on TCP, and this node's does not",
                          hint="`rfaas up --listen 127.0.0.1:0` has it do so")
    if wanted == "verbs" and strict:
        raise ConfigError("a worker in the sandbox `strict` opens no device, and so has no verbs",
                          hint="choose transport tcp, or RFAAS_SANDBOX=default")
    if wanted not in here:
        raise ConfigError(f"transport {wanted} can't be used on this node", hint="`rfaas doctor` says why")
    if session.remote and wanted not in session.transports:
        raise ConfigError(f"transport {wanted} can't be used on {session.host}", hint="`rfaas doctor` there says why")
    return wanted


def _untold(lease: int) -> str:
    return f"lease {lease} came to its hard end, and its agent did not say so"


def lease_error(event: msg.LeaseEnded) -> RFaaSError:
    """What a lease's end means to an invocation that nobody is left to run."""
    text = event.message or f"lease {event.lease} ended ({event.cause})"
    match event.cause:
        case "expired":
            return LeaseExpired(text, hint="ask for cores again with a new Executor")
        case "revoked":
            return LeaseRevoked(text, hint="run on the rank, or ask for cores again with a new Executor")
        case "service":
            return ServiceLost(text, hint="make a new Executor")
    return WorkerLost(text, hint="make a new Executor")


def lost_error(ended: WorkerEnded) -> RFaaSError:
    """The error for an invocation whose worker infrastructure took, and that nothing else may run."""
    what = ended.message or f"worker {ended.worker} of lease {ended.lease} ended ({ended.reason or ended.cause})"
    error: RFaaSError
    match ended.reason:
        case "revoked":
            error = LeaseRevoked(what, hint="run on the rank, or ask for cores again with a new Executor")
        case "expired":
            error = LeaseExpired(what, hint="ask for cores again with a new Executor")
        case "service":
            error = ServiceLost(what, hint="make a new Executor")
        case _:
            error = WorkerLost(what, hint="call again, or let it run on the rank with fallback=True")
    describe(error, ended)
    return error


def describe(error: Any, ended: WorkerEnded) -> None:
    """Puts the facts of a worker's end on an error."""
    error.worker = ended.worker
    error.cause = ended.cause
    error.signal = ended.signal
    error.exit_code = ended.exit_code
    error.last_lines = ended.last_lines

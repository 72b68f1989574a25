"""The processes of a node: zygotes and workers, and everything of them that has a descriptor.

Which worker is forked, told to quit or killed is decided in agent/core.py; here
it is done, and what becomes of it is told there.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

import msgspec

from rfaas_mpi import messages as msg
from rfaas_mpi import skew
from rfaas_mpi.agent import core as agent_core
from rfaas_mpi.agent import sandbox
from rfaas_mpi.agent.core import AgentCore, Exit, Meter, Page
from rfaas_mpi.agent.memory import WATCH_S, MemoryGuard
from rfaas_mpi.agent.output import Line
from rfaas_mpi.agent.pool import StandIn, WorkerHandle, ZygoteHandle, ZygoteKind, oom_kills
from rfaas_mpi.agent.priority import NO_PRIORITY
from rfaas_mpi.agent.reclaim import runs_only_on, started_by
from rfaas_mpi.agent.spawner import Spawner, SpawnerLost
from rfaas_mpi.agent.users import Pool
from rfaas_mpi.errors import ServiceError

__all__ = ["Employer", "Workers"]

log = logging.getLogger("rfaas_mpi.agent.workers")

PARTIAL_LINE_S = 0.2                 # an unfinished line is shown after this
IDLE_ZYGOTES = 4                     # of one user, that wait for another lease
ENDS_S = 5.0                         # killed workers are waited for, at our own end

STARTS_S = 120.0                     # an interpreter with the user's modules may need so long to be ready
FORKS_S = 60.0                       # and then so long for a worker that serves
MASKS_S = 1.0                        # how often it is looked at where other users' processes may run
MASKS_MOST_S = 10.0                  # less often where it takes long, but not less often than this …
MASKS_PART = 20                      # … so that one part in so many of all time is spent on it
MOVES_S = 0.02                       # and what one look moves takes no longer
STRAYS_MAX = 10                      # such looks in a row that find one elsewhere end its zygote

_LEAVES_S = 2.0                      # a zygote that is told to end is killed after this
_LEAVING_POLL_S = 0.05
_HUNG_UP_S = 0.05                    # and another user's that has closed its channel after this
_LAST_WORDS = 64                     # messages of a zygote or a worker that has ended
_PROBLEM_CHARS = 4000                # more doesn't come from a zygote of ours

# What may come of what a zygote says or does, and of nothing else that is done with it.
_NO_SENSE = (ServiceError, msgspec.MsgspecError, OSError, ValueError, LookupError, TypeError, RecursionError)

READ = selectors.EVENT_READ


class Employer(Protocol):
    """For whom workers are started, and who hears of them."""

    def kind_for(self, lease: int) -> ZygoteKind:
        """What the lease's workers are started from. ServiceError if it can't be known any more."""

    def tell(self, session: int, event: msg.Event) -> None:
        """Sends it to a session, if there is one."""

    def show(self, session: int, event: msg.Log) -> None:
        """Sends a worker's output, as much as the session reads."""

    def used(self, meter: Meter, pid: int) -> None:
        """What a worker that ended has used."""

    def cores_freed(self, lease: int, seat: int, cores: tuple[int, ...]) -> None:
        """Nothing of this seat may run on these cores any more; its worker may still hold memory."""

    def seat_stopped(self, lease: int, seat: int, last: bool) -> None:
        """Nothing of this seat can run any more; `last`: nor of its lease."""

    def lease_failed(self, lease: int, why: str) -> None:
        """Its workers can't be started: it has to end."""

    def spawner_lost(self, why: str) -> None:
        """Nothing can be started or ended for other users any more: the agent has to end."""


class Workers:
    """Owns the processes, their sockets, pages and pipes, and does the core's actions. close() ends them all."""

    def __init__(self, selector: selectors.BaseSelector, core: AgentCore, employer: Employer, *,
                 zygote_idle_s: float) -> None:
        self.core = core
        self.zygotes: dict[str, ZygoteHandle] = {}
        self.refused = 0                     # what ranks sent to workers and made no sense
        self.forks = 0
        self.low = NO_PRIORITY               # that workers of zygotes take that begin from now on
        self.deaf: tuple[int, ...] = ()      # signals that are the agent's alone, whoever sends them to all
        self._selector = selector
        self._employer = employer
        self._zygote_idle_s = zygote_idle_s
        self._handles: dict[int, WorkerHandle] = {}
        self._oom_kills = oom_kills()
        self._spawner: Spawner | None = None
        self._pool: Pool | None = None
        self._begun = 0                      # zygotes, ever
        self._guard = MemoryGuard("watch")
        self._zygote_bytes = 0
        self._masks_at = 0.0                 # when to look where other users' processes may run
        self._strayed: dict[str, int] = {}   # zygotes, workers → looks in a row that found them elsewhere
        self._leaving: list[tuple[float, ZygoteHandle]] = []     # when to kill them
        self._look_at = float("inf")         # when to look at the workers' memory

    def serve_users(self, spawner: Spawner, pool: Pool | None = None) -> None:
        """From now on zygotes of a kind with a uid are that user's, or, with a pool, of the one that stands for him.

        The spawner is closed with us.
        """
        self._spawner, self._pool = spawner, pool
        self._selector.register(spawner, READ, lambda _m: self._on_spawner())

    def guard_memory(self, wanted: str, *, low: bool = False, zygote_bytes: int = 0) -> None:
        """Bounds each worker's memory from now on as the setting says. ServiceError if it can't be had.

        With `low` their groups have low priority, where workers have it from no other one. Another user's zygote may
        hold `zygote_bytes`, 0: any amount.
        """
        self._zygote_bytes = zygote_bytes
        self._guard = MemoryGuard(wanted, self._spawner, low=low)

    # ---- time ------------------------------------------------------------------------------------

    def deadlines(self, now: float) -> list[float]:
        """When to call check() and tidy() again."""
        times = [handle.lines.since + PARTIAL_LINE_S for handle in self._handles.values()
                 if handle.lines.since is not None]
        times += [zygote.idle_since + self._zygote_idle_s for zygote in self.zygotes.values() if not zygote.workers]
        times += [min(due, now + _LEAVING_POLL_S) for due, _ in self._leaving]
        if self._confines:
            times.append(self._masks_at)
        times += [handle.serves_by(STARTS_S, FORKS_S) for handle in self._handles.values() if not handle.serves]
        due = self.core.next_deadline(now)
        return [*times, self._look_at] if due is None else [*times, self._look_at, due]

    def check(self, now: float) -> None:
        """Time limits, kills after their grace, forks that waited."""
        if self.core.watched:
            pages = {number: self._handles[number].read_page() for number in self.core.watched
                     if number in self._handles}
            self.act(self.core.check_limits(pages, now, time.monotonic_ns()))
        if now >= self._look_at:
            self._look_at = now + WATCH_S if self._guard.watches else float("inf")
            for number in self._guard.over():
                self._end_for_memory(number)
        if self._confines and now >= self._masks_at:
            begun = time.monotonic()
            for key, zygote in list(self.zygotes.items()):
                if zygote.spawner is not None:
                    self._confine(key, zygote)
            # Users may have many thousands of processes, and all others wait while we look.
            self._masks_at = now + min(max(MASKS_S, MASKS_PART * (time.monotonic() - begun)), MASKS_MOST_S)
        self._end_late(now)
        self.act(self.core.tick(now))
        if self._spawner is not None and self._spawner.has_news:
            self._on_spawner()

    @property
    def _confines(self) -> bool:
        """Whether there is somebody to be kept where he belongs, and such a place."""
        return self._spawner is not None and bool(self.core.own_cores) and bool(self.zygotes)

    def _confine(self, key: str, zygote: ZygoteHandle) -> None:
        """Takes what a user runs back to cores that he was lent, or to ours; what insists is killed.

        Groups bound its memory, but a mask is its own to change.
        """
        own = frozenset(self.core.own_cores)
        lent: set[int] = set()
        seen: set[int] = set()
        for number in zygote.workers:
            handle, worker = self._handles.get(number), self.core.workers.get(number)
            if handle is None or worker is None:
                continue
            lent.update(worker.seat.cores)
            if not handle.pid:
                continue
            seen.add(handle.pid)
            if handle.serves and not worker.killed and not worker.seat.stopping:
                family = [handle.pid, *started_by(handle.pid)]
                self._take_back(f"{key}/{number}", zygote, family, worker.seat.cores, worker.seat.cores, handle.kill)
        # One that is forked at this moment may be on its core already.
        others = [zygote.pid, *started_by(zygote.pid, but=seen)]
        self._take_back(key, zygote, others, own | lent, own, zygote.process.kill)

    def _take_back(self, name: str, zygote: ZygoteHandle, pids: Iterable[int], allowed: Collection[int],
                   cores: Collection[int], end: Callable[[], None]) -> None:
        strayed = [pid for pid in pids if not runs_only_on(pid, allowed)]
        if not strayed:
            self._strayed.pop(name, None)
            return
        count = self._strayed[name] = self._strayed.get(name, 0) + 1
        if count >= STRAYS_MAX:
            del self._strayed[name]
            log.error("zygote=%s runs where its user was lent nothing, again and again: it is killed", name)
            end()
            return
        log.warning("zygote=%s may run where its user was lent nothing: %d processes, like pid %d, are moved", name,
                    len(strayed), strayed[0])
        assert zygote.spawner is not None
        until = time.monotonic() + MOVES_S
        for pid in strayed:
            if time.monotonic() >= until:
                return                # nobody else waits for thousands of them: the others are the next look's
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                continue              # it is gone, or the next look's
            try:
                zygote.spawner.bind(zygote.number, pidfd, cores)
            except SpawnerLost as error:
                self._employer.spawner_lost(str(error))
                return
            except OSError as error:
                log.debug("zygote=%s pid=%d was not moved: %s", name, pid, error)     # gone, or the next look's
            finally:
                os.close(pidfd)

    def zygotes_bytes(self) -> int:
        """Memory that other users' zygotes hold, and nobody was granted."""
        return self._guard.held_by(self.zygotes.values())

    def _bind(self, handle: WorkerHandle) -> None:
        """To its cores, as it does itself; entering a group may have undone that."""
        worker = self.core.workers.get(handle.number)
        if worker is None or worker.killed:
            return
        try:
            if handle.zygote.spawner is None:
                os.sched_setaffinity(handle.pid, worker.seat.cores)
            else:
                handle.zygote.spawner.bind(handle.zygote.number, handle.pidfd, worker.seat.cores)
        except SpawnerLost:
            raise
        except OSError as error:
            log.debug("worker=%d pid=%d is not bound: %s", handle.number, handle.pid, error)     # it is gone

    def _end_late(self, now: float) -> None:
        """What a user's zygote doesn't start keeps no lease, and nobody waits for it."""
        for handle in list(self._handles.values()):
            if handle.serves or now < handle.serves_by(STARTS_S, FORKS_S):
                continue
            handle.serves = True      # it is looked at once
            zygote = handle.zygote
            what = "has no zygote" if not zygote.ready else "is not forked" if handle.pidfd < 0 else "does not serve"
            log.error("lease=%d worker=%d %s in time; zygote=%s pid=%d is killed", handle.lease, handle.number, what,
                      zygote.kind.key, zygote.pid)
            self._employer.lease_failed(handle.lease, f"worker {handle.number} {what} within "
                                                      f"{FORKS_S if zygote.ready else STARTS_S:g} s")
            # What holds it up (an import, a stopped process, its user) would hold up the next one.
            zygote.process.kill()

    def tidy(self, now: float) -> None:
        """Shows unfinished lines, ends zygotes that nobody needs."""
        for handle in list(self._handles.values()):
            if handle.lines.since is not None and now >= handle.lines.since + PARTIAL_LINE_S:
                self._on_output(handle)
                if handle.lines.since is not None and now >= handle.lines.since + PARTIAL_LINE_S:
                    self._show(handle, handle.lines.flush())
        for key, zygote in list(self.zygotes.items()):
            if not zygote.workers and now >= zygote.idle_since + self._zygote_idle_s:
                log.info("zygote=%s pid=%d ends: idle for %g s", key, zygote.pid, self._zygote_idle_s)
                self._leave_zygote(key)
        leaving, self._leaving = self._leaving, []
        for due, zygote in leaving:
            if now >= due or zygote.ended:
                self._close_zygote(zygote, 0.0)
            else:
                self._leaving.append((due, zygote))

    def close(self) -> None:
        """Ends every process, and returns when they have ended. Safe to call twice."""
        for handle in self._handles.values():
            handle.kill()
        for key in list(self.zygotes):
            self._leave_zygote(key)
        leaving, self._leaving = self._leaving, []
        for due, zygote in leaving:
            zygote.close(max(0.0, due - time.monotonic()))
        # A killed process lives on until the kernel has freed its memory. Who sent us
        # down hears of it by the end of his session, which is closed after this.
        deadline = time.monotonic() + ENDS_S
        for handle in self._handles.values():
            if not handle.gone(deadline - time.monotonic()):
                log.warning("worker=%d pid=%d was killed and has not ended", handle.number, handle.pid)
            handle.close()
        self._handles.clear()
        self._guard.close()
        if self._spawner is not None:
            self._unregister(self._spawner)
            self._spawner.close()
            self._spawner = None

    # ---- what ranks want of them -----------------------------------------------------------------

    def adopt(self, number: int, lease: int, session: int, connections: list[socket.socket]) -> None:
        """Passes a rank's connections on to its worker; `session` is whom to tell of its end (0: nobody more)."""
        handle = self._handles.get(number)
        if handle is None:
            return
        connection = self.core.attach(number, lease, session)
        if connection:
            frame = msg.pack_frame(msg.FRAME_ADOPT, msg.ADOPT_BODY.pack(lease, connection, 0),
                                   descriptors=len(connections))
            if not handle.send(frame, [each.fileno() for each in connections]):
                self.core.gone(number, connection)

    def kill(self, request: msg.KillRequest) -> bool:
        """Kills a worker for its rank; False if there is none, or it runs something else by now."""
        handle = self._handles.get(request.worker)
        if handle is None:
            return False
        reason = request.reason if request.reason in ("cancel", "link") else "cancel"
        killed, actions = self.core.kill(request.worker, request.lease, reason, request.invocation,
                                         handle.read_page())
        log.info("lease=%d worker=%d kill (%s) invocation=%d: %s", request.lease, request.worker, request.reason,
                 request.invocation, killed)
        self.act(actions)
        return killed

    def status(self) -> list[dict[str, Any]]:
        """Facts about each worker, all of them JSON."""
        facts = []
        for number, worker in sorted(self.core.workers.items()):
            handle = self._handles.get(number)
            page = handle.read_page() if handle is not None else Page()
            facts.append({
                "number": number, "lease": worker.lease, "pid": worker.pid, "cores": list(worker.seat.cores),
                "low_priority": worker.low,
                "state": str(worker.state), "running": page.invocation != 0, "invocations": page.count,
                "exec_ns": page.exec_ns, "poll_ns": page.poll_ns, "connections": len(worker.connections)})
        return facts

    def meters(self, now: float) -> list[Meter]:
        """What those that run have used so far."""
        return self.core.meters({number: (handle.cpu_s(), _whole(handle)) for number, handle in self._handles.items()
                                 if handle.pidfd >= 0}, now)

    def calls_take(self) -> dict[int, float]:
        """Lease → seconds that calls of the longest of its kernels have taken on average."""
        found: dict[int, float] = {}
        for handle in self._handles.values():
            times = [each.exec_ns / each.count / 1e9 for each in handle.read_kernels() if each.count]
            found[handle.lease] = max([found.get(handle.lease, 0.0), *times])
        return found

    def cpu_by_core(self) -> dict[int, float]:
        """CPU time that those which run have used so far, on each of their cores, of several as much on each."""
        used: dict[int, float] = {}
        for number, handle in self._handles.items():
            worker = self.core.workers.get(number)
            if worker is not None and (cpu_s := handle.own_cpu_s()) is not None:
                for core in worker.seat.cores:
                    used[core] = used.get(core, 0.0) + cpu_s / len(worker.seat.cores)
        return used

    def zygotes_status(self) -> list[dict[str, Any]]:
        """And about each zygote."""
        return [{"key": key, "pid": zygote.pid, "ready": zygote.ready, "workers": len(zygote.workers),
                 "sandbox": zygote.sandbox}
                for key, zygote in self.zygotes.items()]

    def memory_status(self) -> dict[str, str]:
        """What bounds workers' memory, and why nothing better does."""
        return self._guard.status()

    # ---- the core's actions ----------------------------------------------------------------------

    def act(self, actions: Iterable[agent_core.Action]) -> None:
        """Does them in order."""
        for action in actions:
            match action:
                case agent_core.Fork():
                    self._fork(action)
                case agent_core.Kill(worker=number):
                    if number in self._handles:
                        self._handles[number].kill()
                case agent_core.Halt(worker=number):
                    if number in self._handles:
                        self._handles[number].halt()
                case agent_core.Withdraw(worker=number):
                    self._withdraw(number)
                case agent_core.Move(worker=number):
                    self._clear(number)
                case agent_core.Quit(worker=number):
                    if number in self._handles:
                        self._handles[number].send(msg.pack_frame(msg.FRAME_QUIT))
                case agent_core.Tell(sessions=sessions, event=event):
                    for number in sessions:
                        self._employer.tell(number, event)
                case agent_core.Meter(worker=number):
                    try:
                        self._employer.used(action, self._handles[number].pid if number in self._handles else 0)
                    except ValueError:
                        # What comes after it frees the cores.
                        log.exception("lease=%d worker=%d what it used could not be noted", action.lease, number)
                case agent_core.Close(worker=number):
                    self._close_worker(number)
                case agent_core.Freed(lease=lease, seat=seat, cores=cores):
                    self._employer.cores_freed(lease, seat, cores)
                case agent_core.Stopped(lease=lease, seat=seat):
                    self._employer.seat_stopped(lease, seat, not self.core.seats_of(lease))

    def _fork(self, order: agent_core.Fork) -> None:
        now = time.monotonic()
        entrances: list[int] = []
        try:
            zygote = self.warm(self._employer.kind_for(order.lease), now)
            entrances = self._guard.expect(zygote, order.worker, order.memory_bytes)
            handle = WorkerHandle.fork(zygote, order.worker, order.lease, order.cores, order.memory_bytes, now,
                                       entrances)
        except (OSError, ServiceError) as error:
            self._guard.end(order.worker)
            log.error("lease=%d worker=%d could not be started: %s", order.lease, order.worker, error)
            self._employer.lease_failed(order.lease, f"worker {order.worker} could not be started: {error}")
            self.act(self.core.ended(order.worker, Exit(lost=True), Page(), now))
            return
        finally:
            for fd in entrances:
                os.close(fd)
        self._handles[order.worker] = handle
        self._selector.register(handle.agent, READ, lambda _m: self._on_agent_socket(handle))
        self._selector.register(handle.output, READ, lambda _m: self._on_output(handle))

    def _withdraw(self, number: int) -> None:
        """Whose cores are wanted doesn't wait until the zygote has loaded what its workers need.

        Another user's may run anything by then: it is waited for until it has ended.
        """
        handle = self._handles.get(number)
        if handle is not None and handle.zygote.spawner is None and handle.zygote.withdraw(number):
            handle.withdrawn = True
            self._worker_ended(number, Exit(lost=True))

    def _clear(self, number: int) -> None:
        """Takes a killed worker off its cores; where that can't be done they are free once it is gone."""
        handle = self._handles.get(number)
        if handle is None:
            return
        try:
            free = handle.clear(self.core.workers[number].seat.cores, self.core.own_cores,
                                [other.pid for other in self._handles.values() if other.zygote is handle.zygote])
        except (OSError, SpawnerLost) as error:
            log.warning("worker=%d pid=%d can't be moved off its cores: %s", number, handle.pid, error)
            return
        if free:
            self.act(self.core.cleared(number))

    def _close_worker(self, number: int) -> None:
        handle = self._handles.pop(number, None)
        if handle is None:
            return
        zygote = handle.zygote
        zygote.workers.discard(number)
        if not zygote.workers:
            zygote.idle_since = time.monotonic()
        for what in (handle.agent, handle.output, *((handle.pidfd,) if handle.pidfd >= 0 else ())):
            self._unregister(what)
        handle.close()

    def _unregister(self, what: Any) -> None:
        try:
            self._selector.unregister(what)
        except KeyError:
            return                    # at its end already

    # ---- workers ---------------------------------------------------------------------------------

    def _on_agent_socket(self, handle: WorkerHandle) -> bool:
        """True if there may be more to read."""
        try:
            data = handle.agent.recv(1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            # It is ending, and its zygote says how; unless a kernel has closed all that there was.
            self._unregister(handle.agent)
            if not handle.ending():
                self.act(self.core.cut_off(handle.number))
            return False
        now = time.monotonic()
        try:
            for frame in handle.frames.feed(data):
                match frame.type:
                    case msg.FRAME_READY:
                        handle.serves = True
                        self._settle(handle)
                        self.act(self.core.ready(handle.number))
                    case msg.FRAME_LIMITS:
                        self.core.limits(handle.number, now)
                    case msg.FRAME_GONE if len(frame.body) >= msg.GONE_BODY.size:
                        connection, refused = msg.GONE_BODY.unpack_from(frame.body)
                        self.core.gone(handle.number, connection)
                        if refused:
                            self.refused += refused
                            log.warning("worker=%d connection=%d refused=%d: what made no sense",
                                        handle.number, connection, refused)
                    case _:
                        raise ServiceError(f"a frame of type {frame.type}")
        except ServiceError as error:
            # Only a kernel that wrote where it should not gets us here.
            log.error("worker=%d says what makes no sense (%s); it is killed", handle.number, error)
            self._unregister(handle.agent)
            handle.kill()
            return False
        return True

    def _settle(self, handle: WorkerHandle) -> None:
        """Once it serves and its process is known: it is where it belongs, and ranks may have it."""
        if handle.pidfd < 0 or not handle.serves:
            return
        try:
            self._guard.check(handle)
        except SpawnerLost as error:
            self._employer.spawner_lost(str(error))
            return
        handle.admit()
        self._look_at_priority(handle)

    def _look_at_priority(self, handle: WorkerHandle) -> None:
        low = handle.zygote.low
        if self._guard.lowered(handle.number) or low.has(handle.pid):
            self.core.low(handle.number)
        elif low.means is not None:
            log.warning("worker=%d pid=%d has no low priority, though it should have it by %s", handle.number,
                        handle.pid, low.means)

    def _on_output(self, handle: WorkerHandle) -> None:
        lines, _, ended = handle.hear(time.monotonic())
        self._show(handle, lines)
        if ended:
            self._unregister(handle.output)

    def hear(self, lease: int) -> None:
        """Shows what the workers of a lease have printed until now."""
        for handle in [handle for handle in self._handles.values() if handle.lease == lease]:
            lines, _, _ = handle.hear(time.monotonic())
            self._show(handle, lines)

    def _show(self, handle: WorkerHandle, lines: list[Line]) -> None:
        if not lines:
            return
        for number, mine in self.core.output(handle.number, [(line.text, line.connection) for line in lines]).items():
            shown = [lines[at] for at in mine]
            invocations = tuple(line.invocation for line in shown)
            self._employer.show(number, msg.Log(handle.lease, handle.number, tuple(line.text for line in shown),
                                                invocations if any(invocations) else ()))

    def _worker_ended(self, number: int, how: Exit) -> None:
        """Its process is gone: show what it still said, then decide."""
        handle = self._handles.get(number)
        if handle is None:
            return
        if not handle.gone():
            # Another user's zygote may say what it likes.
            if handle.pidfd < 0 or handle.foreign:
                self._makes_no_sense(handle.zygote, f"it has not shown worker {number}")
            else:
                self._end_then_tell(handle, how)
            return
        now = time.monotonic()
        if self._guard.end(number):
            how = dataclasses.replace(how, oom=True)
        # Its farewell may be there as late as the news of its end.
        for _ in range(_LAST_WORDS):
            if not self._on_agent_socket(handle):
                break
        self._show(handle, handle.hear_last(now))
        log.info("lease=%d worker=%d pid=%d ended: signal=%d exit_code=%d", handle.lease, number, handle.pid,
                 how.signal, how.exit_code)
        # Where nobody saw how it ended, what was seen of it before is all that is known.
        how = dataclasses.replace(how, cpu_s=max(how.cpu_s, handle.seen_cpu_s))
        self.act(self.core.ended(number, how, _whole(handle), now))

    # ---- zygotes ---------------------------------------------------------------------------------

    def warm(self, kind: ZygoteKind, now: float) -> ZygoteHandle:
        """The zygote of that kind, started if there is none. ServiceError if it can't be."""
        key = kind.key
        zygote = self.zygotes.get(key)
        if zygote is None:
            spawner = None
            if kind.uid is not None:
                spawner = self._spawner
                if spawner is None:
                    raise ServiceError(f"this agent can't start a worker of uid {kind.uid}",
                                       hint="only an agent that root starts, with RFAAS_SERVICE_USER, serves others")
            stands_for = self._stand_for(kind)
            try:
                zygote = ZygoteHandle(kind, now, spawner, self.low if spawner is None else NO_PRIORITY,
                                      tell_spares=self._guard.moves,
                                      memory_bytes=self._zygote_bytes, deaf=self.deaf, stands_for=stands_for)
            except OSError as error:
                self._stand_no_more(kind, stands_for)
                what = kind.prefix[0] if kind.prefix else os.fsdecode(kind.executable)
                raise ServiceError(f"{socket.gethostname()} can't start {what} for workers: "
                                   f"{error.strerror or error}") from None
            self.zygotes[key] = zygote
            self._selector.register(zygote.channel, READ, lambda _m: self._on_zygote(key, zygote))
            self._selector.register(zygote.errors, READ, lambda _m: self._on_zygote_errors(zygote))
            log.info("zygote=%s pid=%d started for %s", key, zygote.pid, os.fsdecode(kind.executable))
            self._end_idle(kind.uid, but=key)
        return zygote

    def _stand_for(self, kind: ZygoteKind) -> StandIn | None:
        if kind.uid is None or self._pool is None:
            return None
        self._begun += 1
        what = f"{kind.key}/{self._begun}"
        return StandIn(what, *self._pool.take(kind.uid, what))

    def _stand_no_more(self, kind: ZygoteKind, stands_for: StandIn | None) -> None:
        if stands_for is not None and kind.uid is not None and self._pool is not None:
            self._pool.give_back(kind.uid, stands_for.what)

    def _close_zygote(self, zygote: ZygoteHandle, wait_s: float) -> None:
        zygote.close(wait_s)
        if zygote.gone:
            self._stand_no_more(zygote.kind, zygote.stands_for)

    def _end_idle(self, uid: int | None, but: str) -> None:
        """No user fills the node with zygotes that nobody needs."""
        idle = sorted((zygote.idle_since, key) for key, zygote in self.zygotes.items()
                      if zygote.kind.uid == uid and not zygote.workers and key != but)
        for _, key in idle[:max(0, len(idle) - IDLE_ZYGOTES)]:
            log.info("zygote=%s pid=%d ends: its user has enough others", key, self.zygotes[key].pid)
            self._leave_zygote(key)

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
        try:
            self._heard(key, zygote, data, fds)
        except SpawnerLost as error:
            self._employer.spawner_lost(str(error))
        except _NO_SENSE as error:
            self._makes_no_sense(zygote, error)
        finally:
            for fd in fds:
                os.close(fd)

    def _makes_no_sense(self, zygote: ZygoteHandle, why: object) -> None:
        """It is its user's, who may have made it say anything: it is killed, with all of its workers."""
        log.error("zygote=%s pid=%d makes no sense (%s); it is killed", zygote.kind.key, zygote.pid, why)
        zygote.process.kill()

    def _heard(self, key: str, zygote: ZygoteHandle, data: bytes, fds: list[int]) -> None:
        said = msg.unpack_from_zygote(data)
        number = 0 if isinstance(said, msg.ZygoteReady | msg.SpareForked) else said.worker
        if number not in zygote.workers and number != 0:
            log.debug("zygote=%s tells of worker %d, which it doesn't have", key, number)
            return
        match said:
            case msg.ZygoteReady(sandbox=level, version=version):
                if zygote.kind.version not in (0, skew.number(version)):
                    self._of_another_version(key, zygote, version)
                    return
                zygote.sandbox = dict(level)
                zygote.became_ready()
                log.info("zygote=%s pid=%d ready, sandbox %s", key, zygote.pid, sandbox.level_text(level))
            case msg.SpareForked() if fds:
                self._guard.prepare(zygote, fds[0])
            case msg.WorkerForked(worker=number, pid=pid):
                handle = self._handles.get(number)
                if handle is not None and handle.pidfd < 0:
                    if not fds:
                        raise ServiceError(f"worker {number} without its pidfd")
                    pid = handle.forked(fds.pop(), pid)
                    handle.verify()
                    self._guard.begin(handle)
                    if self._guard.may_unbind:
                        self._bind(handle)
                    if self._guard.watches:
                        self._look_at = min(self._look_at, time.monotonic() + WATCH_S)
                    if zygote.spawner is None or self._guard.moves:
                        handle.admit()
                    self._settle(handle)      # another user's enters its group itself, or doesn't
                    self.forks += 1
                    self.act(self.core.forked(number, pid))
            case msg.WorkerExited(worker=number) as exited:
                kills = oom_kills()
                oom, self._oom_kills = kills > self._oom_kills, kills
                # Who ended its zygote, too, ended all that its user runs here: that is no doing of the kernel's.
                lost = exited.signal in (signal.SIGKILL, signal.SIGTERM) and zygote.ended
                self._worker_ended(number, Exit(exited.signal, exited.exit_code, exited.cpu_s, exited.max_rss_bytes,
                                                oom=oom, lost=lost))
            case msg.ZygoteProblem(worker=number, message=text):
                text = text[-_PROBLEM_CHARS:]
                log.error("zygote=%s %s", key, text)
                zygote.stderr += text.encode(errors="replace") + b"\n"
                if number in self._handles:
                    lines = text.strip().splitlines() or ["it doesn't say why"]
                    self._employer.lease_failed(self._handles[number].lease, lines[-1])
                    self._worker_ended(number, Exit(lost=True))

    def _of_another_version(self, key: str, zygote: ZygoteHandle, version: str) -> None:
        """What rank and worker say to each other is of one version; the zygote can't be of use to its rank."""
        why = (f"workers on {socket.gethostname()} would run rfaas_mpi {version[:40]}, and their rank runs "
               f"{skew.text(zygote.kind.version)}: it finds another package there than where the rank runs")
        log.error("zygote=%s %s", key, why)
        for number in list(zygote.workers):
            if (handle := self._handles.get(number)) is not None:
                self._employer.lease_failed(handle.lease, why)
        zygote.process.kill()

    def _on_spawner(self) -> None:
        assert self._spawner is not None
        try:
            ended = {each.zygote: each for each in self._spawner.ended()}
        except SpawnerLost as error:
            self._unregister(self._spawner)
            self._employer.spawner_lost(str(error))
            return
        for key, zygote in list(self.zygotes.items()):
            if zygote.spawner is not None and zygote.number in ended:
                zygote.process.returncode = ended[zygote.number].code
                zygote.stderr += ended[zygote.number].why.encode()
                self._spawner_saw_it_end(key, zygote)

    def _spawner_saw_it_end(self, key: str, zygote: ZygoteHandle) -> None:
        """Its channel need not end with it: its user may have passed that on to a process that lives."""
        poller = select.poll()
        poller.register(zygote.channel, select.POLLIN)
        for _ in range(_LAST_WORDS):
            if self.zygotes.get(key) is not zygote or not poller.poll(0):
                break
            self._on_zygote(key, zygote)
        if self.zygotes.get(key) is zygote:
            self._zygote_ended(key, zygote)

    def _on_zygote_errors(self, zygote: ZygoteHandle) -> None:
        said = zygote.read_errors()
        if not said:
            self._unregister(zygote.errors)
        elif text := zygote.loggable(said, time.monotonic()).decode(errors="replace").rstrip():
            log.warning("zygote pid=%d says: %s", zygote.pid, text)

    def _zygote_ended(self, key: str, zygote: ZygoteHandle) -> None:
        """With it, by the kernel's hand, all of its workers."""
        was_ready = zygote.ready
        self._forget_zygote(key)
        # Another user's may have closed its channel and go on: the others don't wait for it.
        self._close_zygote(zygote, 2.0 if zygote.spawner is None else _HUNG_UP_S)
        why = zygote.why()
        log.error("zygote=%s pid=%d ended: %s", key, zygote.pid, why)
        for number in list(zygote.workers):
            handle = self._handles.get(number)
            if handle is None:
                continue
            if not was_ready:
                self._employer.lease_failed(handle.lease, f"the interpreter for workers did not start: {why}")
            self._worker_ended(number, Exit(lost=True))

    def _end_then_tell(self, handle: WorkerHandle, how: Exit) -> None:
        handle.kill()
        if handle.foreign:
            if handle.gone():
                self._worker_ended(handle.number, how)
            return                    # with its zygote
        self._unregister(handle.pidfd)
        self._selector.register(handle.pidfd, READ, lambda _m: self._ended_as_told(handle, how))

    def _ended_as_told(self, handle: WorkerHandle, how: Exit) -> None:
        try:
            self._worker_ended(handle.number, how)
        except SpawnerLost as error:
            self._employer.spawner_lost(str(error))
        except _NO_SENSE as error:
            self._makes_no_sense(handle.zygote, error)

    def _end_for_memory(self, number: int) -> None:
        handle = self._handles.get(number)
        if handle is not None:
            log.warning("lease=%d worker=%d pid=%d holds more than the %d bytes that it was granted: it is killed",
                        handle.lease, number, handle.pid, handle.memory_bytes)
            self.act(self.core.over_memory(number, handle.read_page()))

    def _leave_zygote(self, key: str) -> None:
        """Nobody waits for its end; what doesn't end is killed in time."""
        zygote = self._forget_zygote(key)
        zygote.leave()
        self._leaving.append((time.monotonic() + _LEAVES_S, zygote))

    def _forget_zygote(self, key: str) -> ZygoteHandle:
        zygote = self.zygotes.pop(key)
        self._strayed = {name: count for name, count in self._strayed.items() if name.partition("/")[0] != key}
        self._guard.forget(zygote)
        self._unregister(zygote.channel)
        self._unregister(zygote.errors)
        return zygote


def _whole(handle: WorkerHandle) -> Page:
    """Its page, with what each kernel took."""
    return dataclasses.replace(handle.read_page(), kernels=handle.read_kernels())

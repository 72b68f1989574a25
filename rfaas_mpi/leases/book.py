"""The lease book: who holds which cores of which node, and until when.

    REQUESTED ──▶ GRANTED ──▶ ACTIVE
        │            │           │   release, revoke, expiry, end of the session
        ▼            ▼           ▼
     refused      REVOKING: its workers were told to stop and hold their cores
                     │           until the agent says that they are gone
                     ▼
            RELEASED | EXPIRED | LOST      (LOST at once, from any live state)

No clock, no socket, no disk: `handle` takes an event and the time, returns what
to do, and the shell does it in that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TypeAlias, TypeVar

import msgspec

from rfaas_mpi.leases.types import (
    Action,
    Activated,
    Cause,
    Demand,
    Event,
    Grant,
    GrantedWorker,
    Lease,
    LeaseState,
    NodeLost,
    NodeReport,
    NodeView,
    Notify,
    Refuse,
    Release,
    Revoke,
    SessionEnded,
    StopWorkers,
    Store,
    Tick,
    WorkersStopped,
)

__all__ = ["LeaseBook", "Picker"]

Picker: TypeAlias = Callable[
    [Sequence[int], int, int, int, Mapping[int, int]], list[tuple[int, ...]]]
"""Placement policy: (spare, workers_min, workers_max, cores_per_worker, numa) →
the cores of each worker; `placement.pick_cores` is one."""

_END_OF = {
    Cause.RELEASED: LeaseState.RELEASED,
    Cause.SESSION_ENDED: LeaseState.RELEASED,
    Cause.REVOKED: LeaseState.RELEASED,
    Cause.EXPIRED: LeaseState.EXPIRED,
    Cause.NODE_LOST: LeaseState.LOST,
}

# Causes that the session doesn't know of already.
_NEWS = (Cause.REVOKED, Cause.EXPIRED, Cause.NODE_LOST)

_K = TypeVar("_K")
_V = TypeVar("_V")
_Key: TypeAlias = tuple[int, int]         # (session, request id)


class _Answer:
    """What a demand was answered, and how many of its leases still live."""

    __slots__ = ("action", "demand", "live")

    def __init__(self, demand: Demand, action: Grant | Refuse) -> None:
        self.demand = demand
        self.action = action
        self.live = len(action.leases) if isinstance(action, Grant) else 0


class _Entry:
    """A live lease and what only the book needs to know of it."""

    __slots__ = ("activate_by", "lease", "stops")

    def __init__(self, lease: Lease, activate_by: float | None) -> None:
        self.lease = lease
        self.activate_by = activate_by
        self.stops: dict[int, float] = {}      # worker told to stop → by when

    @property
    def deadline(self) -> float | None:
        """When it expires; None once it is ending, or if it never does."""
        match self.lease.state:
            case LeaseState.GRANTED:
                ends = [end for end in (self.lease.hard_end, self.activate_by)
                        if end is not None]
                return min(ends, default=None)
            case LeaseState.ACTIVE:
                return self.lease.hard_end
            case _:
                return None


class _Node:
    """A node's last report, and what the book has lent there."""

    __slots__ = ("foreign", "held", "memory_held", "report")

    def __init__(self, report: NodeReport) -> None:
        self.report = report
        self.held: dict[int, int] = {}          # core → lease id
        self.memory_held = 0
        self.foreign: frozenset[int] = frozenset()  # busy, but for no live lease

    @property
    def free(self) -> tuple[int, ...]:
        return tuple(core for core in self.report.spare
                     if core not in self.held and core not in self.foreign)

    @property
    def memory_free(self) -> int:
        # A report may promise less than is lent: what is lent stays lent.
        return max(0, self.report.memory_bytes - self.memory_held)

    def serves(self, demand: Demand, now: float) -> bool:
        report = self.report
        return ((report.lends_to_uid is None or report.lends_to_uid == demand.uid)
                and (report.hard_end is None or report.hard_end > now))

    def pick(self, demand: Demand, most: int, pick: Picker) -> list[tuple[int, ...]]:
        """Cores for at most `most` of the demand's workers."""
        if demand.memory_per_worker > 0:
            most = min(most, self.memory_free // demand.memory_per_worker)
        return pick(self.free, 0, most, demand.cores_per_worker, self.report.numa)


class LeaseBook:
    """Grants, revokes and ends leases; the only owner of who holds a core.

    The shell's part:

    * one book, one thread at a time; events in the order in which they happened;
    * do the returned actions in order. `Store(epoch)` comes before the `Grant`
      that needs it: if it can't be made durable, don't answer, and hand in a
      `Revoke` for the grant's leases;
    * a new book starts from the stored epoch: `LeaseBook(pick, epoch=stored)`;
      it grants nothing on a node before that node's first `NodeReport`;
    * after `StopWorkers`, hand in `WorkersStopped` once nothing of them can run:
      only that frees their cores;
    * call `handle(Tick(), now)` at `next_deadline()`, and now and then anyway:
      leases and answers that ended `remember_s` ago are forgotten there.

    Every event may come twice: the second one changes nothing and, for a demand,
    gives the same answer. Events about leases, workers or nodes that the book
    doesn't know (any more) are ignored, since they race with each other.

    `activate_within_s` expires a grant whose `Activated` doesn't come; None
    leaves that to the end of the session.
    """

    def __init__(self, pick: Picker, *, epoch: int = 0,
                 activate_within_s: float | None = None,
                 remember_s: float = 3600.0) -> None:
        self._pick = pick
        self._epoch = epoch
        self._activate_within_s = activate_within_s
        self._remember_s = remember_s
        self._nodes: dict[str, _Node] = {}
        self._live: dict[int, _Entry] = {}
        self._by_session: dict[int, dict[int, None]] = {}   # an ordered set of ids
        self._answers: dict[_Key, _Answer] = {}
        # What ended and when, oldest first: to be forgotten from the front.
        self._ended: dict[int, tuple[Lease, float]] = {}
        self._settled: dict[_Key, float] = {}
        self._closed_sessions: dict[int, float] = {}

    # --- looking in ---------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The highest epoch given out."""
        return self._epoch

    @property
    def leases(self) -> Sequence[Lease]:
        """All live leases (GRANTED, ACTIVE, REVOKING), oldest first."""
        return [entry.lease for entry in self._live.values()]

    def lease(self, lease_id: int) -> Lease | None:
        """The lease as it stands, ended ones too until they are forgotten."""
        if (entry := self._live.get(lease_id)) is not None:
            return entry.lease
        if (ended := self._ended.get(lease_id)) is not None:
            return ended[0]
        return None

    def remembers(self, session: int, request_id: int) -> bool:
        """True while the same demand would get the same answer."""
        return (session, request_id) in self._answers

    def session_leases(self, session: int) -> Sequence[Lease]:
        """The live leases of one session, oldest first."""
        return [self._live[lease_id].lease
                for lease_id in self._by_session.get(session, ())]

    @property
    def nodes(self) -> Sequence[NodeView]:
        """Every node that has reported, by name: spare, lent and free cores."""
        return [
            NodeView(node=name, spare=node.report.spare,
                     lent=tuple(sorted(node.held)), free=node.free,
                     memory_bytes=node.report.memory_bytes,
                     memory_free=node.memory_free)
            for name, node in sorted(self._nodes.items())]

    def next_deadline(self) -> float | None:
        """When the next live lease expires; None: nothing to wait for."""
        ends = (entry.deadline for entry in self._live.values())
        return min((end for end in ends if end is not None), default=None)

    # --- events -------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event, return what to do, in order.

        Raises ValueError for an event that makes no sense in itself (a demand
        for -1 workers, a report that lists a core twice); nothing has changed
        then.
        """
        match event:
            case Demand():
                return self._demand(event, now)
            case NodeReport():
                return self._report(event, now)
            case Activated(lease_id):
                return self._activated(lease_id)
            case Revoke(lease_id, workers, grace_s):
                return self._stop(lease_id, workers, Cause.REVOKED, grace_s, now)
            case Release(session, lease_id):
                if lease_id not in self._by_session.get(session, ()):
                    return []
                return self._stop(lease_id, (), Cause.RELEASED, 0.0, now)
            case SessionEnded(session):
                return self._session_ended(session, now)
            case WorkersStopped(lease_id, workers):
                return self._stopped(lease_id, workers, now)
            case NodeLost(node):
                return self._node_lost(node, now)
            case Tick():
                return self._tick(now)
            case _:
                raise ValueError(f"{event!r} is no event of the lease book")

    def _demand(self, demand: Demand, now: float) -> list[Action]:
        _check_demand(demand)
        key = (demand.session, demand.request_id)
        if (answer := self._answers.get(key)) is not None:
            if answer.demand == demand:
                return [answer.action]
            return [_refusal(
                demand, f"request {demand.request_id} of session {demand.session} "
                "was a different demand; use a new request id")]
        if demand.session in self._closed_sessions:
            return [_refusal(demand, f"session {demand.session} has ended; "
                             "open a new one")]

        nodes = [(name, node) for name, node in sorted(self._nodes.items())
                 if node.serves(demand, now)]
        chosen = self._choose(demand, nodes)
        count = sum(len(workers) for _, workers in chosen)
        reason = _shortfall(demand, count, [node for _, node in nodes])

        action: Grant | Refuse
        actions: list[Action] = []
        if count < demand.workers_min:
            action = Refuse(session=demand.session, request_id=demand.request_id,
                            reason=reason, asked=demand.workers_min, available=count)
        else:
            leases = tuple(self._grant(demand, name, workers, now)
                           for name, workers in chosen)
            if leases:
                actions.append(Store(self._epoch))
            action = Grant(session=demand.session, request_id=demand.request_id,
                           leases=leases, reason=reason)
        self._answers[key] = answer = _Answer(demand, action)
        if answer.live == 0:
            self._settled[key] = now
        return [*actions, action]

    def _choose(self, demand: Demand, nodes: list[tuple[str, _Node]],
                ) -> list[tuple[str, list[tuple[int, ...]]]]:
        """As few nodes as possible; if one is enough, the one with least left."""
        options = [(name, node, node.pick(demand, demand.workers_max, self._pick))
                   for name, node in nodes]
        enough = [option for option in options
                  if 0 < demand.workers_max <= len(option[2])]
        if enough:
            name, _, workers = min(enough, key=lambda o: (len(o[1].free), o[0]))
            return [(name, workers)]

        chosen = []
        left = demand.workers_max
        for name, node, workers in sorted(options, key=lambda o: (-len(o[2]), o[0])):
            if len(workers) > left:
                workers = node.pick(demand, left, self._pick)
            if workers:
                chosen.append((name, workers))
                left -= len(workers)
        return chosen

    def _grant(self, demand: Demand, name: str, workers: list[tuple[int, ...]],
               now: float) -> Lease:
        node = self._nodes[name]
        ends = [end for end in (
            node.report.hard_end,
            None if demand.duration_s is None else now + demand.duration_s,
        ) if end is not None]
        self._epoch += 1
        lease = Lease(
            # One stored counter for both: ids stay unique over restarts.
            id=self._epoch, epoch=self._epoch,
            node=name, session=demand.session, uid=demand.uid,
            request_id=demand.request_id,
            workers=tuple(GrantedWorker(number, cores)
                          for number, cores in enumerate(workers)),
            memory_per_worker=demand.memory_per_worker,
            hard_end=min(ends, default=None))
        self._live[lease.id] = _Entry(
            lease, None if self._activate_within_s is None
            else now + self._activate_within_s)
        self._by_session.setdefault(demand.session, {})[lease.id] = None
        node.held.update(dict.fromkeys(lease.cores, lease.id))
        node.memory_held += lease.memory_bytes
        return lease

    def _activated(self, lease_id: int) -> list[Action]:
        entry = self._live.get(lease_id)
        if entry is not None and entry.lease.state is LeaseState.GRANTED:
            self._change(entry, state=LeaseState.ACTIVE)
        return []

    def _report(self, report: NodeReport, now: float) -> list[Action]:
        _check_report(report)
        node = self._nodes.get(report.node)
        if node is None:
            node = self._nodes[report.node] = _Node(report)
        node.report = report
        node.foreign = frozenset(core for core, lease_id in report.busy.items()
                                 if node.held.get(core) != lease_id)

        actions: list[Action] = []
        spare = set(report.spare)
        wanted_back: dict[int, list[int]] = {}
        for lease_id in dict.fromkeys(node.held.values()):
            for worker in self._live[lease_id].lease.workers:
                if not spare.issuperset(worker.cores):
                    wanted_back.setdefault(lease_id, []).append(worker.number)
        for lease_id, workers in wanted_back.items():
            actions += self._stop(lease_id, workers, Cause.REVOKED,
                                  report.grace_s, now)
        # Leases that ended here without their agent hearing of it (it had been
        # declared dead). Those of an earlier book are left to their hard end.
        for lease_id in dict.fromkeys(report.busy.values()):
            if (ended := self._ended.get(lease_id)) is not None:
                actions.append(StopWorkers(
                    node=report.node, lease_id=lease_id, workers=(),
                    cause=ended[0].cause or Cause.RELEASED))
        return actions

    def _session_ended(self, session: int, now: float) -> list[Action]:
        actions: list[Action] = []
        for lease_id in list(self._by_session.get(session, ())):
            actions += self._stop(lease_id, (), Cause.SESSION_ENDED, 0.0, now)
        self._closed_sessions.setdefault(session, now)
        return actions

    def _node_lost(self, name: str, now: float) -> list[Action]:
        node = self._nodes.pop(name, None)
        if node is None:
            return []
        actions: list[Action] = []
        for lease_id in dict.fromkeys(node.held.values()):
            entry = self._live[lease_id]
            actions.append(Notify(
                session=entry.lease.session, lease_id=lease_id,
                workers=tuple(worker.number for worker in entry.lease.workers),
                cause=Cause.NODE_LOST))
            self._end(entry, Cause.NODE_LOST, now)
        return actions

    def _tick(self, now: float) -> list[Action]:
        due = [lease_id for lease_id, entry in self._live.items()
               if entry.deadline is not None and entry.deadline <= now]
        actions: list[Action] = []
        for lease_id in due:
            actions += self._stop(lease_id, (), Cause.EXPIRED, 0.0, now)
        self._forget(now - self._remember_s)
        return actions

    # --- ending -------------------------------------------------------------

    def _stop(self, lease_id: int, workers: Iterable[int], cause: Cause,
              grace_s: float, now: float) -> list[Action]:
        """Tell workers of a live lease to stop, unless they were told as soon."""
        entry = self._live.get(lease_id)
        if entry is None:
            return []
        lease = entry.lease
        until = now + max(0.0, grace_s)
        if lease.hard_end is not None:
            until = min(until, max(now, lease.hard_end))
        asked = set(workers)
        stop = tuple(
            worker.number for worker in lease.workers
            if (not asked or worker.number in asked)
            and until < entry.stops.get(worker.number, math.inf))
        if not stop:
            return []
        entry.stops.update(dict.fromkeys(stop, until))
        self._restate(entry, cause)

        actions: list[Action] = []
        if cause in _NEWS:
            actions.append(Notify(
                session=lease.session, lease_id=lease.id, workers=stop,
                cause=cause, grace_s=until - now))
        actions.append(StopWorkers(
            node=lease.node, lease_id=lease.id, workers=stop, cause=cause,
            grace_s=until - now))
        return actions

    def _stopped(self, lease_id: int, workers: Iterable[int],
                 now: float) -> list[Action]:
        entry = self._live.get(lease_id)
        if entry is None:
            return []
        lease = entry.lease
        gone = set(workers) or {worker.number for worker in lease.workers}
        left = tuple(worker for worker in lease.workers if worker.number not in gone)
        if not left:
            # Nobody told them to stop: they ended by themselves.
            self._end(entry, lease.cause or Cause.RELEASED, now)
            return []

        node = self._nodes[lease.node]
        for worker in lease.workers:
            if worker.number in gone:
                entry.stops.pop(worker.number, None)
                node.memory_held -= lease.memory_per_worker
                for core in worker.cores:
                    del node.held[core]
        self._change(entry, workers=left)
        # Nothing else stops some workers of a lease and not the others.
        self._restate(entry, Cause.REVOKED)
        return []

    def _restate(self, entry: _Entry, cause: Cause) -> None:
        """Write down who is stopping; once all are, the lease ends by `cause`.

        By the first such cause: what comes later only hurries it.
        """
        stopping = tuple(worker.number for worker in entry.lease.workers
                         if worker.number in entry.stops)
        self._change(entry, stopping=stopping)
        if len(stopping) == len(entry.lease.workers) and entry.lease.cause is None:
            self._change(entry, state=LeaseState.REVOKING, cause=cause)

    def _end(self, entry: _Entry, cause: Cause, now: float) -> None:
        """Free what the lease holds and put it among the ended ones."""
        lease = entry.lease
        node = self._nodes.get(lease.node)
        if node is not None:
            node.memory_held -= lease.memory_bytes
            for core in lease.cores:
                del node.held[core]
        del self._live[lease.id]
        of_session = self._by_session[lease.session]
        del of_session[lease.id]
        if not of_session:
            del self._by_session[lease.session]
        self._ended[lease.id] = (msgspec.structs.replace(
            lease, state=_END_OF[cause], cause=cause, workers=(), stopping=()), now)
        key = (lease.session, lease.request_id)
        answer = self._answers[key]
        answer.live -= 1
        if answer.live == 0:
            self._settled[key] = now

    def _forget(self, before: float) -> None:
        """Drop what ended before that time, so that a long life costs nothing."""
        for lease_id in _older(self._ended.items(), lambda v: v[1], before):
            del self._ended[lease_id]
        for key in _older(self._settled.items(), lambda v: v, before):
            del self._settled[key], self._answers[key]
        for session in _older(self._closed_sessions.items(), lambda v: v, before):
            # A session is remembered for as long as any of its leases lives.
            if session not in self._by_session:
                del self._closed_sessions[session]

    def _change(self, entry: _Entry, **fields: object) -> None:
        entry.lease = msgspec.structs.replace(entry.lease, **fields)


def _older(items: Iterable[tuple[_K, _V]], when: Callable[[_V], float],
           before: float) -> list[_K]:
    """The keys at the front of `items` (oldest first) from before that time."""
    return [key for key, value in
            takewhile(lambda item: when(item[1]) < before, items)]


def _check_demand(demand: Demand) -> None:
    if not 0 <= demand.workers_min <= demand.workers_max:
        raise ValueError(
            f"workers are ({demand.workers_min}, {demand.workers_max}); "
            "0 <= min <= max must hold")
    if demand.cores_per_worker < 1:
        raise ValueError(f"cores_per_worker is {demand.cores_per_worker}; "
                         "a worker needs at least one core")
    if demand.memory_per_worker < 0:
        raise ValueError(f"memory_per_worker is {demand.memory_per_worker}; "
                         "it can't be negative")
    if demand.duration_s is not None and not demand.duration_s > 0:
        raise ValueError(f"duration_s is {demand.duration_s}; it must be above 0")


def _check_report(report: NodeReport) -> None:
    if len(set(report.spare)) != len(report.spare):
        raise ValueError(f"node {report.node} reports a spare core twice: "
                         f"{list(report.spare)}")
    if report.memory_bytes < 0:
        raise ValueError(f"node {report.node} reports {report.memory_bytes} bytes "
                         "of memory; it can't be negative")


def _refusal(demand: Demand, reason: str) -> Refuse:
    return Refuse(session=demand.session, request_id=demand.request_id,
                  reason=reason, asked=demand.workers_min, available=0)


def _shortfall(demand: Demand, count: int, nodes: list[_Node]) -> str:
    """One line that says why `count` workers and not all; empty if it is all."""
    if count >= demand.workers_max:
        return ""
    asked = (demand.workers_min if count < demand.workers_min
             else demand.workers_max)
    size = _count(demand.cores_per_worker, "core")
    if demand.memory_per_worker > 0:
        size += f" and {_gib(demand.memory_per_worker)}"
    each = "each " if asked != 1 else ""
    text = (f"asked for {_count(asked, 'worker')} with {each}{size}, "
            f"{count} available")
    if not nodes:
        return f"{text}: no node lends cores now"
    spare = sum(len(node.report.spare) for node in nodes)
    free = sum(len(node.free) for node in nodes)
    text += f": {free} of {_count(spare, 'spare core')} free"
    if demand.memory_per_worker > 0:
        total = sum(node.report.memory_bytes for node in nodes)
        left = sum(node.memory_free for node in nodes)
        text += f", {_gib(left)} of {_gib(total)} memory free"
    return text


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.3g} GiB"

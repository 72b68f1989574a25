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
from heapq import heapify, heappop, heappush
from itertools import islice, takewhile
from typing import NamedTuple, TypeAlias, TypeVar

import msgspec

from rfaas_mpi.leases.held import Held
from rfaas_mpi.leases.nodes import Chooser, Node, Nodes, Picker
from rfaas_mpi.leases.types import (
    Action,
    Activated,
    Admit,
    AgentStarted,
    Answered,
    Cause,
    Changes,
    Demand,
    Event,
    Grant,
    GrantedWorker,
    Kept,
    Lease,
    LeaseState,
    LiveLease,
    NodeDrained,
    NodeLost,
    NodeReport,
    NodeSilent,
    NodeUndrained,
    NodeView,
    Notify,
    Refuse,
    Release,
    Revoke,
    SessionEnded,
    StopWorkers,
    Store,
    Superseded,
    Tick,
    WorkersStopped,
)

__all__ = ["Chooser", "LeaseBook", "Picker", "check_demand"]

_END_OF = {
    Cause.RELEASED: LeaseState.RELEASED,
    Cause.SESSION_ENDED: LeaseState.RELEASED,
    Cause.REVOKED: LeaseState.RELEASED,
    Cause.EXPIRED: LeaseState.EXPIRED,
    Cause.NODE_LOST: LeaseState.LOST,
}

# Causes that the session doesn't know of already.
_NEWS = (Cause.REVOKED, Cause.EXPIRED, Cause.NODE_LOST)

BEGIN_WITHIN_S = 20.0
"""How long an agent may still begin a lease, where the book says nothing else."""

REMEMBER_LEAST_S = 120.0
"""So long answers and ended leases are remembered however many they are: who asks again does it sooner."""

HIGHEST_EPOCH = 1 << 62
"""What an agent may claim at most: so many more can follow it in 63 bits."""

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


class _Quota(NamedTuple):
    """What a user's quota makes of a demand: why it gets less, how many workers, and whether it gets them ever."""

    reason: str
    workers: int
    never: bool = False


_NO_QUOTA = _Quota("", 0)


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


class _Changed:
    """What has changed since the shell last asked."""

    __slots__ = ("answers", "closed", "drained", "leases")

    def __init__(self) -> None:
        self.leases: dict[int, Lease] = {}
        self.answers: list[Answered] = []
        self.closed: list[int] = []
        self.drained: dict[str, bool] = {}


class LeaseBook:
    """Grants, revokes and ends leases; the only owner of who holds a core.

    `pick` says which cores of a node: nodes are then taken so that as few as
    possible are used. Instead it may be a `Chooser`, which chooses nodes and cores.

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
      leases and answers that ended `remember_s` ago are forgotten there. Of more than
      `remember_most` of either the oldest are forgotten sooner, but for those of the
      last REMEMBER_LEAST_S, and for leases whose agent may come back with them.

    Where the leases must outlive the book (`durable`): before doing any action,
    write down `changes()`, in order, in a way that is there whole or not at all.
    A new book then begins with `restore(kept)`, before its first event.

    Every event may come twice: the second one changes nothing and, for a demand,
    gives the same answer. Events about leases, workers or nodes that the book
    doesn't know (any more) are ignored, since they race with each other. Reports
    with an incarnation may also come late, in any order, or never.

    `quota` says how many cores a user may hold at a time (None: any number); `held`
    knows how many each does, and has had.

    `activate_within_s` expires a grant whose `Activated` doesn't come; None
    leaves that to the end of the session. An agent that has an incarnation and a
    clock doesn't begin a lease later than this, or `BEGIN_WITHIN_S`, and its
    reports say what became of it.
    """

    def __init__(self, pick: Picker | Chooser, *, epoch: int = 0,
                 activate_within_s: float | None = None,
                 remember_s: float = 3600.0, remember_most: int | None = None, durable: bool = False,
                 quota: Callable[[int], int | None] = lambda uid: None, held: Held | None = None) -> None:
        chooser, self._pick = (None, pick) if callable(pick) else (pick, _no_picker)
        self._epoch = epoch
        self._activate_within_s = activate_within_s
        self._remember_s = remember_s
        self._remember_most = remember_most
        self._forget_again = -math.inf
        self._nodes = Nodes(chooser)
        self._quota = quota
        self.held = Held() if held is None else held
        self._live: dict[int, _Entry] = {}
        self._by_session: dict[int, dict[int, None]] = {}   # an ordered set of ids
        self._answers: dict[_Key, _Answer] = {}
        # When leases expire, soonest first; what is no longer true is skipped.
        self._deadlines: list[tuple[float, int]] = []
        # What ended and when, oldest first: to be forgotten from the front.
        self._ended: dict[int, tuple[Lease, float]] = {}
        self._lost: dict[int, tuple[Lease, float]] = {}     # likewise, with their agents
        self._settled: dict[_Key, float] = {}
        self._closed_sessions: dict[int, float] = {}
        self._admitted: dict[str, tuple[str, int]] = {}     # node → its newest agent
        self._reporting: Node | None = None                 # whose report is being taken
        self._changed: _Changed | None = _Changed() if durable else None

    @property
    def epoch(self) -> int:
        """The highest epoch that was ever given out."""
        return self._epoch

    @property
    def leases(self) -> list[Lease]:
        """Every live lease, oldest first."""
        return [entry.lease for entry in self._live.values()]

    def lease(self, lease_id: int) -> Lease | None:
        """A lease that lives or ended not long ago, else None."""
        if (entry := self._live.get(lease_id)) is not None:
            return entry.lease
        return self._ended_lease(lease_id)

    def _ended_lease(self, lease_id: int) -> Lease | None:
        ended = self._ended.get(lease_id) or self._lost.get(lease_id)
        return None if ended is None else ended[0]

    def remembers(self, session: int, request_id: int) -> bool:
        """True if that demand would be answered from memory."""
        return (session, request_id) in self._answers

    def session_leases(self, session: int) -> list[Lease]:
        """The session's live leases, oldest first."""
        return [self._live[lease_id].lease
                for lease_id in self._by_session.get(session, ())]

    @property
    def nodes(self) -> Sequence[NodeView]:
        """Every node that has reported, by name: spare, lent and free cores."""
        return self._nodes.views

    @property
    def unheard(self) -> list[str]:
        """Nodes with leases of which nothing was heard since the book began."""
        return sorted(node.name for node in self._nodes if node.held and node.report is None)

    def heard(self, node: str) -> tuple[int, int]:
        """Incarnation and clock of the node's newest report, (0, 0) if there was none."""
        found = self._nodes.get(node)
        return (0, 0) if found is None else (found.incarnation, found.clock_ns)

    def forget(self, name: str) -> bool:
        """Nothing is known any more of a node whose agent was declared dead; False if it has to be.

        An agent that comes back there is a new one.
        """
        node = self._nodes.get(name)
        if node is not None:
            if node.report is not None or node.held or node.drained:
                return False
            self._nodes.forget(name)
        self._admitted.pop(name, None)
        return True

    def room(self, uid: int, cores_per_worker: int, now: float) -> int:
        """How many workers this user's demands could get at most if nothing were lent."""
        whole = self._nodes.chooser is not None
        return sum(node.seats(cores_per_worker, whole=whole) for node in self._nodes.for_user(uid, now))

    def would_grant(self, demand: Demand, now: float) -> tuple[dict[str, list[tuple[int, ...]]], str]:
        """Node → the cores of each worker that a new demand would get now, and why not all; nothing is granted.

        Fewer than `workers_min` where it would be refused, or would wait.
        """
        asked, over = self._within_quota(demand)
        chosen = [] if asked is None else self._nodes.choose(asked, now, self._pick)
        count = sum(len(workers) for _, workers in chosen)
        reason = ""
        if count < demand.workers_max:
            reason = over.reason if asked is None or count == asked.workers_max else _shortfall(
                asked, count, self._nodes.for_user(demand.uid, now), now)
        return {node.name: workers for node, workers in chosen}, reason

    def quota_left(self, uid: int) -> int | None:
        """How many more cores the user may hold; None: any number."""
        most = self._quota(uid)
        return None if most is None else max(0, most - self.held.cores(uid))

    def next_deadline(self) -> float | None:
        """When the next live lease expires; None: nothing to wait for."""
        deadlines = self._deadlines
        while deadlines:
            when, lease_id = deadlines[0]
            entry = self._live.get(lease_id)
            if entry is not None and entry.deadline == when:
                return when
            heappop(deadlines)
        return None

    # --- what outlives the book ---------------------------------------------

    def changes(self) -> Changes:
        """What changed since the last call; a lease that changed twice is there once."""
        changed = self._changed
        if changed is None:
            raise ValueError("only a durable book keeps its changes: LeaseBook(durable=True)")
        self._changed = _Changed()
        return Changes(
            epoch=self._epoch,
            leases=tuple(changed.leases.values()), answers=tuple(changed.answers),
            closed=tuple(changed.closed), drained=changed.drained)

    def restore(self, kept: Kept, now: float) -> None:
        """Begin with what an earlier book's changes add up to.

        Every lease lives on; its node's first report says what became of it.
        ValueError where a core is in two live leases: the records are damaged.
        """
        for lease in kept.leases:
            node = self._nodes.known(lease.node)
            if lease.incarnation > node.incarnation:
                node.incarnation, node.clock_ns, node.fence_ns = lease.incarnation, 0, 0
            if lease.incarnation == node.incarnation:
                node.clock_ns = max(node.clock_ns, lease.seen_ns)
            if not lease.state.live:
                (self._lost if lease.state is LeaseState.LOST else self._ended)[lease.id] = (lease, now)
                if lease.state is LeaseState.LOST:
                    self._fence(node, lease)
                continue
            for core in lease.cores:
                if (other := node.held.setdefault(core, lease.id)) != lease.id:
                    raise ValueError(f"core {core} of node {lease.node} is in both lease "
                                     f"{other} and lease {lease.id}")
            node.memory_held += lease.memory_bytes
            self.held.change(lease.uid, len(lease.cores), now)
            entry = self._live[lease.id] = _Entry(lease, None)
            entry.stops = dict.fromkeys(lease.stopping, now if lease.stop_by is None else lease.stop_by)
            self._expect(entry)
            self._by_session.setdefault(lease.session, {})[lease.id] = None
        for name in kept.drained:
            self._nodes.known(name).drained = True
        for answered in kept.answers:
            demand, grant = answered.demand, answered.grant
            key = (demand.session, demand.request_id)
            answer = self._answers[key] = _Answer(demand, grant)
            answer.live = sum(lease.id in self._live for lease in grant.leases)
            if answer.live == 0:
                self._settled[key] = now
        self._closed_sessions.update(dict.fromkeys(kept.closed, now))
        highest = max((max(lease.id, lease.epoch) for lease in kept.leases), default=0)
        self._epoch = max(self._epoch, highest)

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
            case AgentStarted(node, agent):
                return self._agent_started(node, agent)
            case NodeSilent(node):
                return self._node_silent(node)
            case NodeLost(node):
                return self._node_lost(node, now)
            case NodeDrained(node, grace_s):
                return self._node_drained(node, grace_s, now)
            case NodeUndrained(node):
                return self._node_undrained(node)
            case Tick():
                return self._tick(now)
            case _:
                raise ValueError(f"{event!r} is no event of the lease book")

    def _demand(self, demand: Demand, now: float) -> list[Action]:
        check_demand(demand)
        key = (demand.session, demand.request_id)
        if (answer := self._answers.get(key)) is not None:
            if _same(answer.demand, demand):
                return [answer.action]
            return [_refusal(
                demand, f"request {demand.request_id} of session {demand.session} "
                "was a different demand; use a new request id")]
        if demand.session in self._closed_sessions:
            return [_refusal(demand, f"session {demand.session} has ended; "
                             "open a new one")]

        asked, over = self._within_quota(demand)
        if asked is None:
            return [] if demand.waits and not over.never else self._refused(demand, over.reason, over.workers, now)
        chosen = self._nodes.choose(asked, now, self._pick)
        count = sum(len(workers) for _, workers in chosen)
        if count < demand.workers_min and demand.waits:
            return []
        reason = ""
        if count < demand.workers_max:
            reason = over.reason if count == asked.workers_max else _shortfall(
                asked, count, self._nodes.for_user(demand.uid, now), now)

        if count < demand.workers_min:
            return self._refused(demand, reason, count, now)
        leases = tuple(self._grant(demand, node, workers, now)
                       for node, workers in chosen)
        action = Grant(session=demand.session, request_id=demand.request_id,
                       leases=leases, reason=reason)
        self._answers[key] = answer = _Answer(demand, action)
        if answer.live == 0:
            self._settled[key] = now
        if not leases:
            return [action]
        if self._changed is not None:
            self._changed.answers.append(Answered(demand=demand, grant=action))
        return [Store(self._epoch), action]

    def _refused(self, demand: Demand, reason: str, available: int, now: float) -> list[Action]:
        """No, and the same to whoever asks again under this number."""
        action = Refuse(session=demand.session, request_id=demand.request_id,
                        reason=reason, asked=demand.workers_min, available=available)
        key = (demand.session, demand.request_id)
        self._answers[key] = _Answer(demand, action)
        self._settled[key] = now
        return [action]

    def _within_quota(self, demand: Demand) -> tuple[Demand | None, _Quota]:
        """The demand for no more than its user may have, None if that is too little; and what to say of it."""
        most = self._quota(demand.uid)
        if most is None:
            return demand, _NO_QUOTA
        held = self.held.cores(demand.uid)
        workers = max(0, most - held) // demand.cores_per_worker
        if workers >= demand.workers_max:
            return demand, _NO_QUOTA
        wanted = demand.workers_min if workers < demand.workers_min else demand.workers_max
        over = _Quota(
            f"asked for {_count(wanted, 'worker')} with {'each ' if wanted != 1 else ''}"
            f"{_count(demand.cores_per_worker, 'core')}, {workers} allowed: user {demand.uid} holds {held} cores and "
            f"may hold {most} at a time; an administrator can raise that quota in the manager's policy file",
            workers, never=demand.workers_min * demand.cores_per_worker > most)
        if workers < demand.workers_min:
            return None, over
        return msgspec.structs.replace(demand, workers_max=workers), over

    def _grant(self, demand: Demand, node: Node, workers: list[tuple[int, ...]],
               now: float) -> Lease:
        report = node.report
        assert report is not None
        ends = [end for end in (
            report.hard_end,
            None if demand.duration_s is None else now + demand.duration_s,
        ) if end is not None]
        told_apart = report.incarnation > 0 and report.live is not None
        within_s = self._activate_within_s
        self._epoch += 1
        lease = Lease(
            # One stored counter for both: ids stay unique over restarts.
            id=self._epoch, epoch=self._epoch,
            node=node.name, session=demand.session, uid=demand.uid,
            request_id=demand.request_id,
            workers=tuple([GrantedWorker(number, cores)
                           for number, cores in enumerate(workers)]),
            memory_per_worker=node.share(demand, len(workers)),
            hard_end=min(ends, default=None),
            incarnation=report.incarnation,
            not_after_ns=node.not_after_ns(now, within_s or BEGIN_WITHIN_S) if told_apart else 0)
        # Else the agent's clock decides, and its reports tell.
        entry = self._live[lease.id] = _Entry(
            lease, None if within_s is None or told_apart else now + within_s)
        if lease.hard_end is not None or entry.activate_by is not None:
            self._expect(entry)
        self._by_session.setdefault(demand.session, {})[lease.id] = None
        cores = lease.cores
        node.held.update(dict.fromkeys(cores, lease.id))
        self.held.change(lease.uid, len(cores), now)
        node.memory_held += lease.memory_bytes
        self._nodes.changed(node, cores)
        self._note(lease)
        return lease

    def _activated(self, lease_id: int) -> list[Action]:
        entry = self._live.get(lease_id)
        if entry is not None and entry.lease.state is LeaseState.GRANTED:
            self._change(entry, state=LeaseState.ACTIVE)
        return []

    def _agent_started(self, name: str, agent: str) -> list[Action]:
        known = self._admitted.get(name)
        if known is not None and known[0] == agent:
            return [Admit(node=name, agent=agent, incarnation=known[1])]
        # From the stored counter: above every incarnation of earlier books.
        self._epoch += 1
        self._admitted[name] = (agent, self._epoch)
        return [Store(self._epoch), Admit(node=name, agent=agent, incarnation=self._epoch)]

    def _report(self, report: NodeReport, now: float) -> list[Action]:
        _check_report(report)
        node = self._nodes.known(report.node)
        if not node.is_news(report):
            if report.incarnation < node.incarnation:
                return [Superseded(node=report.node, incarnation=report.incarnation)]
            return []
        actions: list[Action] = []
        live = {lease.lease_id: lease for lease in report.live or ()}
        over = frozenset(report.over)
        highest = max([report.incarnation,
                       *(max(lease.lease_id, lease.epoch) for lease in live.values())])
        if highest > self._epoch and report.lends_to_uid is None:
            # This book's store was lost, or is an old one: never give these out
            # again. (A user's own agent may say what it likes.)
            self._epoch = highest
            actions.append(Store(highest))
        if report.incarnation > node.incarnation or report.clock_ns > node.fence_ns:
            node.fence_ns = 0
        node.report, node.received, node.silent = report, now, False
        node.incarnation, node.clock_ns = report.incarnation, report.clock_ns

        if report.live is not None:
            # Who chooses nodes is told once, below, of all that is different.
            self._reporting = node
            try:
                for lease_id in dict.fromkeys(node.held.values()):
                    actions += self._reconcile(self._live[lease_id], report, live.get(lease_id), lease_id in over, now)
            finally:
                self._reporting = None
        busy = dict(report.busy)
        for begun in live.values():
            busy.update((core, begun.lease_id) for worker in begun.workers for core in worker.cores)
        node.foreign = frozenset([core for core, lease_id in busy.items()
                                  if node.held.get(core) != lease_id])
        self._nodes.changed(node)

        actions += self._take_back(node, report, now)
        # Leases that ended here without their agent hearing of it (it had been
        # declared dead). Those of an earlier book are left to their hard end.
        for lease_id in dict.fromkeys(busy.values()):
            if (ended := self._ended_lease(lease_id)) is not None:
                actions.append(StopWorkers(
                    node=report.node, lease_id=lease_id, workers=(),
                    cause=ended.cause or Cause.RELEASED))
        return actions

    def _take_back(self, node: Node, report: NodeReport, now: float) -> list[Action]:
        """Revokes the workers whose cores aren't lent any more."""
        actions: list[Action] = []
        wanted_back: dict[int, list[int]] = {}
        spare = set(report.spare)
        for core in node.held.keys() - spare:
            lease_id = node.held[core]
            if lease_id in wanted_back:
                continue
            wanted_back[lease_id] = [worker.number for worker in self._live[lease_id].lease.workers
                                     if not spare.issuperset(worker.cores)]
        for lease_id, workers in sorted(wanted_back.items()):
            actions += self._stop(lease_id, workers, Cause.REVOKED, report.grace_s, now)
        return actions

    def _reconcile(self, entry: _Entry, report: NodeReport, begun: LiveLease | None, over: bool,
                   now: float) -> list[Action]:
        """What a report says about a lease: it has begun, some of it has ended, or all, or it never will begin."""
        lease = entry.lease
        if begun is not None and begun.epoch == lease.epoch:
            if not lease.seen_ns:
                self._change(entry, seen_ns=report.clock_ns)
            if lease.state is LeaseState.GRANTED:
                self._change(entry, state=LeaseState.ACTIVE)
                self._expect(entry)
            there = {worker.number for worker in begun.workers}
            if gone := [worker.number for worker in lease.workers if worker.number not in there]:
                self._stopped(lease.id, gone, now)
            # What told it to stop may have been lost.
            again: dict[float, list[int]] = {}
            for number, until in entry.stops.items():
                if number in there:
                    again.setdefault(until, []).append(number)
            return [StopWorkers(
                node=lease.node, lease_id=lease.id, workers=tuple(numbers),
                cause=entry.lease.cause or Cause.REVOKED, grace_s=max(0.0, until - now))
                for until, numbers in again.items()]
        if lease.incarnation != report.incarnation:
            cause = Cause.NODE_LOST             # its agent is gone, and it with it
        elif lease.seen_ns or over:
            cause = Cause.RELEASED              # it was there and isn't any more
        elif 0 < lease.not_after_ns < report.clock_ns:
            cause = Cause.EXPIRED               # it never began and can't any more
        else:
            return []
        actions: list[Action] = []
        if lease.cause is None and cause in _NEWS:
            actions.append(Notify(
                session=lease.session, lease_id=lease.id,
                workers=tuple(worker.number for worker in lease.workers), cause=cause))
        self._end(entry, lease.cause or cause, now)
        return actions

    def _session_ended(self, session: int, now: float) -> list[Action]:
        actions: list[Action] = []
        for lease_id in list(self._by_session.get(session, ())):
            actions += self._stop(lease_id, (), Cause.SESSION_ENDED, 0.0, now)
        if session not in self._closed_sessions:
            self._closed_sessions[session] = now
            if self._changed is not None:
                self._changed.closed.append(session)
        return actions

    def _node_silent(self, name: str) -> list[Action]:
        node = self._nodes.get(name)
        if node is not None and not node.silent:
            node.silent = True
            self._nodes.changed(node)
        return []

    def _node_lost(self, name: str, now: float) -> list[Action]:
        node = self._nodes.get(name)
        if node is None:
            return []
        actions: list[Action] = []
        # Nothing is free here before it reports again.
        node.report = None
        for lease_id in dict.fromkeys(node.held.values()):
            entry = self._live[lease_id]
            actions.append(Notify(
                session=entry.lease.session, lease_id=lease_id,
                workers=tuple(worker.number for worker in entry.lease.workers),
                cause=Cause.NODE_LOST))
            self._fence(node, entry.lease)
            self._end(entry, Cause.NODE_LOST, now)
        self._nodes.changed(node)
        return actions

    def _fence(self, node: Node, lease: Lease) -> None:
        """The grant may be on its way to the agent still: wait until it would refuse it."""
        if lease.incarnation == node.incarnation and not lease.seen_ns:
            node.fence_ns = max(node.fence_ns, lease.not_after_ns)

    def _node_drained(self, name: str, grace_s: float, now: float) -> list[Action]:
        node = self._nodes.known(name)
        actions: list[Action] = []
        self._set_drained(node, True)
        for lease_id in list(dict.fromkeys(node.held.values())):
            actions += self._stop(lease_id, (), Cause.REVOKED, grace_s, now)
        return actions

    def _node_undrained(self, name: str) -> list[Action]:
        node = self._nodes.get(name)
        if node is not None:
            self._set_drained(node, False)
        return []

    def _set_drained(self, node: Node, drained: bool) -> None:
        if node.drained != drained:
            node.drained = drained
            self._nodes.changed(node)
            if self._changed is not None:
                self._changed.drained[node.name] = drained

    def _tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while (due := self.next_deadline()) is not None and due <= now:
            _, lease_id = heappop(self._deadlines)
            actions += self._stop(lease_id, (), Cause.EXPIRED, 0.0, now)
        self._forget(now)
        self.held.forget(now)
        return actions

    def _expect(self, entry: _Entry) -> None:
        """Puts the lease's deadline among the others."""
        if (deadline := entry.deadline) is None:
            return
        heappush(self._deadlines, (deadline, entry.lease.id))
        if len(self._deadlines) > 2 * len(self._live) + 64:
            # Most of them are of leases that ended early.
            self._deadlines = [(when, entry.lease.id) for entry in self._live.values()
                               if (when := entry.deadline) is not None]
            heapify(self._deadlines)

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
        asked, stops = set(workers), entry.stops
        if asked or stops or until == math.inf:
            stop = tuple(
                worker.number for worker in lease.workers
                if (not asked or worker.number in asked)
                and until < stops.get(worker.number, math.inf))
        else:
            stop = tuple([worker.number for worker in lease.workers])
        if not stop:
            return []
        stops.update(dict.fromkeys(stop, until))
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
        gone = set(workers)
        left = tuple([worker for worker in lease.workers if worker.number not in gone]) if gone else ()
        if not left:
            # Nobody told them to stop: they ended by themselves.
            self._end(entry, lease.cause or Cause.RELEASED, now)
            return []

        node = self._nodes.known(lease.node)
        for worker in lease.workers:
            if worker.number in gone:
                entry.stops.pop(worker.number, None)
                node.memory_held -= lease.memory_per_worker
                self.held.change(lease.uid, -len(worker.cores), now)
                for core in worker.cores:
                    del node.held[core]
        if node is not self._reporting:
            self._nodes.changed(node)
        self._change(entry, workers=left)
        # Nothing else stops some workers of a lease and not the others.
        self._restate(entry, Cause.REVOKED)
        return []

    def _restate(self, entry: _Entry, cause: Cause) -> None:
        """Write down who is stopping; once all are, the lease ends by `cause`.

        By the first such cause: what comes later only hurries it.
        """
        stops, lease = entry.stops, entry.lease
        stopping = tuple([worker.number for worker in lease.workers if worker.number in stops])
        stop_by = max(stops.values()) if stops else None
        if len(stopping) == len(lease.workers) and lease.cause is None:
            self._change(entry, stopping=stopping, stop_by=stop_by, state=LeaseState.REVOKING, cause=cause)
        else:
            self._change(entry, stopping=stopping, stop_by=stop_by)

    def _end(self, entry: _Entry, cause: Cause, now: float) -> None:
        """Free what the lease holds and put it among the ended ones."""
        lease = entry.lease
        node = self._nodes.known(lease.node)
        node.memory_held -= lease.memory_bytes
        cores = lease.cores
        self.held.change(lease.uid, -len(cores), now)
        for core in cores:
            del node.held[core]
        if node is not self._reporting:
            self._nodes.changed(node, cores)
        del self._live[lease.id]
        of_session = self._by_session[lease.session]
        del of_session[lease.id]
        if not of_session:
            del self._by_session[lease.session]
        ended = msgspec.structs.replace(lease, state=_END_OF[cause], cause=cause, workers=(),
                                        stopping=(), stop_by=None)
        (self._lost if ended.state is LeaseState.LOST else self._ended)[lease.id] = (ended, now)
        self._note(ended)
        key = (lease.session, lease.request_id)
        answer = self._answers.get(key)
        if answer is None:
            return                    # restored without the answer that it belongs to
        answer.live -= 1
        if answer.live == 0:
            self._settled[key] = now
        # Many at a time: the front of a dict whose first entries were deleted is slow to find.
        if (self._remember_most is not None and len(self._ended) > 1.25 * self._remember_most
                and now >= self._forget_again):
            self._forget(now)

    def _forget(self, now: float) -> None:
        """Drop what ended long ago, and the oldest of too many, so that a long life costs nothing."""
        self._forget_again = now + 1.0
        for lease_id in self._past(self._ended, lambda v: v[1], now):
            del self._ended[lease_id]
        for lease_id in _older(self._lost.items(), lambda v: v[1], now - self._remember_s):
            del self._lost[lease_id]
        for key in self._past(self._settled, lambda v: v, now):
            del self._settled[key], self._answers[key]
        for session in self._past(self._closed_sessions, lambda v: v, now):
            # A session is remembered for as long as any of its leases lives.
            if session not in self._by_session:
                del self._closed_sessions[session]

    def _past(self, records: Mapping[_K, _V], when: Callable[[_V], float], now: float) -> list[_K]:
        """The keys of those, oldest first, that are to be forgotten now."""
        old = _older(records.items(), when, now - self._remember_s)
        if self._remember_most is None or (surplus := len(records) - self._remember_most) <= len(old):
            return old
        return _older(islice(records.items(), surplus), when, now - min(REMEMBER_LEAST_S, self._remember_s))

    def _change(self, entry: _Entry, **fields: object) -> None:
        entry.lease = msgspec.structs.replace(entry.lease, **fields)
        self._note(entry.lease)

    def _note(self, lease: Lease) -> None:
        if self._changed is not None:
            self._changed.leases[lease.id] = lease


def _older(items: Iterable[tuple[_K, _V]], when: Callable[[_V], float],
           before: float) -> list[_K]:
    """The keys at the front of `items` (oldest first) from before that time."""
    return [key for key, value in
            takewhile(lambda item: when(item[1]) < before, items)]


def _no_picker(spare: Sequence[int], workers_min: int, workers_max: int, cores_per_worker: int,
               numa: Mapping[int, int]) -> list[tuple[int, ...]]:
    raise AssertionError("a book with a chooser has no use for a picker: it picks cores, too")


def _same(one: Demand, other: Demand) -> bool:
    return one == other or (one.waits != other.waits
                            and msgspec.structs.replace(one, waits=other.waits) == other)


def check_demand(demand: Demand) -> None:
    """ValueError for a demand that makes no sense, whatever is free."""
    if not 0 <= demand.workers_min <= demand.workers_max:
        raise ValueError(
            f"workers are ({demand.workers_min}, {demand.workers_max}); "
            "0 <= min <= max must hold")
    if demand.cores_per_worker < 1:
        raise ValueError(f"cores_per_worker is {demand.cores_per_worker}; "
                         "a worker needs at least one core")
    if demand.memory_per_worker is not None and demand.memory_per_worker < 0:
        raise ValueError(f"memory_per_worker is {demand.memory_per_worker}; "
                         "it can't be negative")
    if demand.duration_s is not None and not demand.duration_s > 0:
        raise ValueError(f"duration_s is {demand.duration_s}; it must be above 0")
    if not 0 <= demand.least_s < math.inf:
        raise ValueError(f"least_s is {demand.least_s}; it can't be negative")


def _check_report(report: NodeReport) -> None:
    if len(set(report.spare)) != len(report.spare):
        raise ValueError(f"node {report.node} reports a spare core twice: "
                         f"{list(report.spare)}")
    if min(report.spare, default=0) < 0:
        raise ValueError(f"node {report.node} reports core {min(report.spare)}; "
                         "cores count from 0")
    if report.memory_bytes < 0:
        raise ValueError(f"node {report.node} reports {report.memory_bytes} bytes "
                         "of memory; it can't be negative")
    if not 0 <= report.incarnation < HIGHEST_EPOCH:
        raise ValueError(f"node {report.node} reports incarnation {report.incarnation}; "
                         f"it is below {HIGHEST_EPOCH}")
    if report.live is not None:
        if report.incarnation < 1 or report.clock_ns < 1:
            raise ValueError(f"node {report.node} reports leases without an incarnation "
                             "and a clock")
        cores = [core for lease in report.live for worker in lease.workers for core in worker.cores]
        if len(set(cores)) != len(cores):
            raise ValueError(f"node {report.node} reports a core in two workers: {sorted(cores)}")
        for lease in report.live:
            if not 0 < max(lease.lease_id, lease.epoch) < HIGHEST_EPOCH:
                raise ValueError(f"node {report.node} reports lease {lease.lease_id} with epoch "
                                 f"{lease.epoch}; both are below {HIGHEST_EPOCH}")


def _refusal(demand: Demand, reason: str) -> Refuse:
    return Refuse(session=demand.session, request_id=demand.request_id,
                  reason=reason, asked=demand.workers_min, available=0)


def _shortfall(demand: Demand, count: int, nodes: list[Node], now: float) -> str:
    """One line that says why `count` workers and not all."""
    asked = (demand.workers_min if count < demand.workers_min
             else demand.workers_max)
    size = _count(demand.cores_per_worker, "core")
    if demand.memory_per_worker:
        size += f" and {_gib(demand.memory_per_worker)}"
    each = "each " if asked != 1 else ""
    text = (f"asked for {_count(asked, 'worker')} with {each}{size}, "
            f"{count} available")
    if not nodes:
        return f"{text}: no node lends cores now"
    if ending := [node for node in nodes if not node.serves(now, demand.least_s)]:
        soon = (f"{_count(len(ending), 'node')} {'is' if len(ending) == 1 else 'are'} wanted back within "
                f"{demand.least_s:g} s")
        nodes = [node for node in nodes if node.serves(now, demand.least_s)]
        if not nodes:
            return f"{text}: {soon}"
        text += f", {soon}"
    spare = sum(len(node.report.spare) for node in nodes if node.report)
    free = sum(len(node.free) for node in nodes)
    text += f": {free} of {_count(spare, 'spare core')} free"
    if demand.memory_per_worker:
        total = sum(node.report.memory_bytes for node in nodes if node.report)
        left = sum(node.memory_free for node in nodes)
        text += f", {_gib(left)} of {_gib(total)} memory free"
    return text


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.3g} GiB"

"""The manager's decisions, pure: which demand is answered when, and what the book's actions mean for a session."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from rfaas_mpi.leases import (
    Activated,
    Demand,
    Event,
    Grant,
    Lease,
    LeaseBook,
    LeaseState,
    NodeReport,
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
from rfaas_mpi.messages import LeaseRequest

__all__ = ["Action", "Granted", "Manager", "Notify", "Refused", "StopWorkers", "Store"]

TICK_S = 60.0


@dataclass(frozen=True)
class Granted:
    """Answer the request: start the workers of these leases and tell the session."""

    session: int
    request: int
    leases: tuple[Lease, ...]
    reason: str


@dataclass(frozen=True)
class Refused:
    """Answer the request: it can't be met, and was not within its time."""

    session: int
    request: int
    reason: str


Action = Store | Granted | Refused | StopWorkers | Notify


@dataclass
class _Waiting:
    session: int
    uid: int
    request: LeaseRequest
    deadline: float


class Manager:
    """Sessions' demands and leases over one lease book.

    A demand that can't be met waits for its time-out; those that wait are
    served, in the order in which they came, by the next report: the shell makes
    one when something may have become free. Actions are to be done in order.
    """

    def __init__(self, book: LeaseBook) -> None:
        self.book = book
        self._waiting: list[_Waiting] = []
        self._numbers = count(1)
        self._next_tick = 0.0

    @property
    def waiting(self) -> int:
        """Demands that wait for cores."""
        return len(self._waiting)

    def report(self, report: NodeReport, now: float) -> list[Action]:
        """The node's spare cores are these now."""
        return self._handle(report, now) + self._retry(now)

    def demand(self, session: int, uid: int, request: LeaseRequest, now: float) -> list[Action]:
        """A session wants workers. ValueError for a demand that makes no sense."""
        waiting = _Waiting(session, uid, request, now + max(0.0, request.timeout_s))
        # Not past those that already wait.
        ahead = bool(self._waiting)
        answer = [] if ahead else self._try(waiting, now)
        if answer:
            return answer
        self._waiting.append(waiting)
        return self.tick(now) if ahead and waiting.deadline <= now else []

    def activated(self, lease: int, now: float) -> list[Action]:
        """The lease's session was told."""
        return self._handle(Activated(lease), now)

    def release(self, session: int, lease: int, now: float) -> list[Action]:
        """A session gives a lease back."""
        return self._handle(Release(session, lease), now)

    def revoke(self, lease: int, now: float) -> list[Action]:
        """A lease is taken back whole."""
        return self._handle(Revoke(lease), now)

    def session_ended(self, session: int, now: float) -> list[Action]:
        """Its connection ended: what it holds and what it waits for."""
        self._waiting = [waiting for waiting in self._waiting if waiting.session != session]
        return self._handle(SessionEnded(session), now)

    def stopped(self, lease: int, seat: int, now: float) -> list[Action]:
        """Nothing of this worker can run any more."""
        return self._handle(WorkersStopped(lease, (seat,)), now)

    def tick(self, now: float) -> list[Action]:
        """Ends what came to its end, refuses who waited long enough."""
        self._next_tick = now + TICK_S
        actions = self._handle(Tick(), now)
        for waiting in [w for w in self._waiting if w.deadline <= now]:
            self._waiting.remove(waiting)
            actions += self._try(waiting, now, last=True)
        return actions

    def next_deadline(self) -> float:
        """When to call tick() at the latest."""
        times = [waiting.deadline for waiting in self._waiting]
        ends = self.book.next_deadline()
        if ends is not None:
            times.append(ends)
        return min([*times, self._next_tick])

    def owns(self, session: int, lease: int) -> bool:
        """True if the session holds the lease, also while it is ending."""
        return any(held.id == lease for held in self.book.session_leases(session))

    def live(self, lease: int) -> bool:
        """True while the lease may start workers."""
        found = self.book.lease(lease)
        return found is not None and found.state in (LeaseState.GRANTED, LeaseState.ACTIVE)

    # ---- inside ----------------------------------------------------------------------------------

    def _retry(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._waiting:
            answer = self._try(self._waiting[0], now)
            if not answer:
                break
            self._waiting.pop(0)
            actions += answer
        return actions

    def _try(self, waiting: _Waiting, now: float, *, last: bool = False) -> list[Action]:
        """The answer to a demand, [] if it has to wait."""
        request = waiting.request
        demand = Demand(session=waiting.session, request_id=next(self._numbers), uid=waiting.uid,
                        workers_min=request.workers_min, workers_max=request.workers_max,
                        cores_per_worker=request.cores_per_worker, memory_per_worker=request.memory_per_worker)
        actions: list[Action] = []
        for action in self.book.handle(demand, now):
            match action:
                case Refuse(reason=reason):
                    if last or waiting.deadline <= now:
                        actions.append(Refused(waiting.session, request.id, reason))
                case Grant(leases=leases, reason=reason):
                    actions.append(Granted(waiting.session, request.id, leases, reason))
                case _:
                    actions.append(action)
        return actions

    def _handle(self, event: Event, now: float) -> list[Action]:
        return [action for action in self.book.handle(event, now) if not isinstance(action, (Grant, Refuse))]

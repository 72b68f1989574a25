"""The manager's decisions, pure: which demand is answered when, and what the book's actions mean for a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rfaas_mpi.leases import (
    Activated,
    Admit,
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
    Superseded,
    Tick,
    WorkersStopped,
    check_demand,
)
from rfaas_mpi.messages import LeaseRequest

__all__ = ["Action", "Admit", "Granted", "Manager", "Notify", "Refused", "StopWorkers", "Store", "Superseded"]

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


Action = Store | Granted | Refused | StopWorkers | Notify | Admit | Superseded


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
    one when something may have become free. Users for whom `precedence` says more
    come before others. One that could not be met if every
    core were free holds nobody up, nor does one whose user has to give cores back
    first, by his quota. Actions are to be done in order.

    A request may come twice: while it waits the second one is ignored, and later
    it gets the same answer.
    """

    def __init__(self, book: LeaseBook) -> None:
        self.book = book
        self.precedence: Callable[[int], float] | None = None
        self._waiting: dict[tuple[int, int], _Waiting] = {}     # in the order in which they came
        self._next_tick = 0.0

    @property
    def waiting(self) -> int:
        """Demands that wait for cores."""
        return len(self._waiting)

    @property
    def waiting_cores(self) -> int:
        """How many those want at least."""
        return sum(waiting.request.workers_min * waiting.request.cores_per_worker
                   for waiting in self._waiting.values())

    def report(self, report: NodeReport, now: float) -> list[Action]:
        """The node's spare cores are these now."""
        return self.handle(report, now) + self.retry(now)

    def demand(self, session: int, uid: int, request: LeaseRequest, now: float) -> list[Action]:
        """A session wants workers. ValueError for a demand that makes no sense."""
        waiting = _Waiting(session, uid, request, now + max(0.0, request.timeout_s))
        check_demand(self._demand(waiting, waits=True))
        key = (session, request.id)
        if (first := self._waiting.get(key)) is not None:
            if (first.uid, first.request) == (uid, request):
                return []
            return [Refused(session, request.id, f"request {request.id} waits already and was a different demand; "
                                                 "use a new request id")]
        # Not past those that already wait, unless it was answered long ago.
        ahead = (not self.book.remembers(session, request.id)
                 and any(self._can_be_met(one, now) for one in self._before(uid)))
        answer = [] if ahead else self._try(waiting, now)
        if answer:
            return answer
        self._waiting[key] = waiting
        return self.tick(now) if ahead and waiting.deadline <= now else []

    def withdraw(self, session: int, request: int, now: float) -> list[Action] | None:
        """Whoever asked is gone: those behind it may be served. None if it doesn't wait (any more)."""
        if self._waiting.pop((session, request), None) is None:
            return None
        return self.retry(now)

    def activated(self, lease: int, now: float) -> list[Action]:
        """The lease's session was told."""
        return self.handle(Activated(lease), now)

    def release(self, session: int, lease: int, now: float) -> list[Action]:
        """A session gives a lease back."""
        return self.handle(Release(session, lease), now)

    def revoke(self, lease: int, now: float) -> list[Action]:
        """A lease is taken back whole."""
        return self.handle(Revoke(lease), now)

    def session_ended(self, session: int, now: float) -> list[Action]:
        """Its connection ended: what it holds and what it waits for."""
        self.forget_demands(session)
        return self.handle(SessionEnded(session), now)

    def forget_demands(self, session: int) -> None:
        """It waits for nothing any more."""
        self._waiting = {key: waiting for key, waiting in self._waiting.items() if waiting.session != session}

    def stopped(self, lease: int, seat: int, now: float) -> list[Action]:
        """Nothing of this worker can run any more."""
        return self.handle(WorkersStopped(lease, (seat,)), now)

    def tick(self, now: float) -> list[Action]:
        """Ends what came to its end, refuses who waited long enough."""
        self._next_tick = now + TICK_S
        actions = self.handle(Tick(), now)
        for key in [key for key, waiting in self._waiting.items() if waiting.deadline <= now]:
            actions += self._try(self._waiting.pop(key), now)
        return actions

    def next_deadline(self) -> float:
        """When to call tick() at the latest."""
        times = [waiting.deadline for waiting in self._waiting.values()]
        ends = self.book.next_deadline()
        if ends is not None:
            times.append(ends)
        return min([*times, self._next_tick])

    def live(self, lease: int) -> bool:
        """True while the lease may start workers."""
        found = self.book.lease(lease)
        return found is not None and found.state in (LeaseState.GRANTED, LeaseState.ACTIVE)

    def retry(self, now: float) -> list[Action]:
        """Something may have become free: serves those that wait."""
        actions: list[Action] = []
        for key, waiting in self._in_turn():
            if answer := self._try(waiting, now):
                del self._waiting[key]
                actions += answer
            elif self._can_be_met(waiting, now):
                break
        return actions

    def handle(self, event: Event, now: float) -> list[Action]:
        """Anything else that the book should know; demands have an answer of their own."""
        return [action for action in self.book.handle(event, now) if not isinstance(action, (Grant, Refuse))]

    def as_demand(self, session: int, uid: int, request: LeaseRequest) -> Demand:
        """The request as the book has it, if it came now and waited for nothing. ValueError if it makes no sense."""
        demand = self._demand(_Waiting(session, uid, request, 0.0), waits=False)
        check_demand(demand)
        return demand

    # ---- inside ----------------------------------------------------------------------------------

    def _before(self, uid: int) -> list[_Waiting]:
        """Those that wait and aren't to be passed by a demand of this user."""
        waiting = list(self._waiting.values())
        if not waiting or self.precedence is None or not (mine := self.precedence(uid)):
            return waiting
        of = {uid: self.precedence(uid) for uid in {one.uid for one in waiting}}
        return [one for one in waiting if one.uid == uid or of[one.uid] >= mine]

    def _in_turn(self) -> list[tuple[tuple[int, int], _Waiting]]:
        """Those that wait, who comes first first."""
        waiting = list(self._waiting.items())
        if len(waiting) > 1 and self.precedence is not None:
            of = {uid: self.precedence(uid) for uid in {one.uid for _, one in waiting}}
            waiting.sort(key=lambda item: -of[item[1].uid])
        return waiting

    def _can_be_met(self, waiting: _Waiting, now: float) -> bool:
        """True if there are cores enough, lent ones included, and all that its user waits for are others' to return."""
        request = waiting.request
        left = self.book.quota_left(waiting.uid)
        if left is not None and left < request.workers_min * request.cores_per_worker:
            return False
        return self.book.room(waiting.uid, request.cores_per_worker, now) >= request.workers_min

    def _demand(self, waiting: _Waiting, *, waits: bool) -> Demand:
        request = waiting.request
        return Demand(session=waiting.session, request_id=request.id, uid=waiting.uid,
                      workers_min=request.workers_min, workers_max=request.workers_max,
                      cores_per_worker=request.cores_per_worker, memory_per_worker=request.memory_per_worker,
                      duration_s=request.duration_s, waits=waits, least_s=request.least_s, place=request.place,
                      bytes_per_s=request.bytes_per_s, others=request.others)

    def _try(self, waiting: _Waiting, now: float) -> list[Action]:
        """The answer to a demand, [] if it has to wait; never that once its time is over."""
        request = waiting.request
        demand = self._demand(waiting, waits=waiting.deadline > now)
        actions: list[Action] = []
        for action in self.book.handle(demand, now):
            match action:
                case Refuse(reason=reason):
                    actions.append(Refused(waiting.session, request.id, reason))
                case Grant(leases=leases, reason=reason):
                    actions.append(Granted(waiting.session, request.id, leases, reason))
                case _:
                    actions.append(action)
        return actions

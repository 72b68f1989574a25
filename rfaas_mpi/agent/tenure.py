"""The leases that an agent of a cluster runs, pure: until when each may stay, what has to stop, what its manager hears.

    begin ──▶ runs ──▶ stopping (released · its rank ended · revoked · expired · failed) ──▶ its cores are free

Facts and `now` in, actions out. The agent has the last word on its cores: a hard end,
a core that is wanted back and the end of a rank need nobody's leave.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from rfaas_mpi.api import StopOrder
from rfaas_mpi.leases import Cause, GrantedWorker, LiveLease

__all__ = ["Action", "Ended", "Forbid", "Stop", "Tenure", "Tenures"]

# So many times as long as its calls take on average a lease takes none any more before its end: a worker has one more
# behind the one that runs, and each may take somewhat longer than others did;
_DRAIN = 2 * 1.25
# and a little longer, in which its rank hears of it.
_DRAIN_MORE_S = 0.05

# What a rank has to be told; the other ends are its own.
_NEWS = frozenset((Cause.REVOKED, Cause.EXPIRED, Cause.NODE_LOST))


# ---- actions -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Stop:
    """Stop the workers of these seats, at the latest `grace_s` from now; `owned`: an owner is on their cores."""

    lease: int
    seats: tuple[int, ...]
    cause: Cause
    grace_s: float
    owned: bool = False


@dataclass(frozen=True)
class Ended:
    """Tell the session that all of its lease ends, and why."""

    session: int
    lease: int
    cause: Cause


@dataclass(frozen=True)
class Forbid:
    """The lease was taken back before it began here: refuse its grant."""

    lease: int


Action = Stop | Ended | Forbid


# ---- state ---------------------------------------------------------------------------------------

@dataclass
class Tenure:
    """One lease that has begun here; `hard_end` is a moment of our own clock, `call_s` what its longest calls take."""

    lease: int
    epoch: int
    uid: int
    session: int                     # that began it
    memory_per_worker: int
    hard_end: float | None
    seats: dict[int, tuple[int, ...]]                # whose cores are not free yet
    stops: dict[int, float] = field(default_factory=dict)        # seat → when it has to be gone
    told: bool = False               # its rank was told that all of it ends
    call_s: float = 0.0

    @property
    def cores(self) -> tuple[int, ...]:
        return tuple(core for cores in self.seats.values() for core in cores)

    @property
    def ending(self) -> bool:
        """All of it was told to stop."""
        return self.stops.keys() >= self.seats.keys()


class Tenures:
    """The table of leases on this node. Unknown leases and seats are ignored: news of them races with their end."""

    def __init__(self) -> None:
        self._live: dict[int, Tenure] = {}
        self._window_end: float | None = None

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, lease: int) -> bool:
        return lease in self._live

    def get(self, lease: int) -> Tenure | None:
        """The lease, as long as one of its cores isn't free."""
        return self._live.get(lease)

    @property
    def all(self) -> tuple[Tenure, ...]:
        return tuple(self._live.values())

    @property
    def in_use(self) -> frozenset[int]:
        """Cores on which something of a lease may still run."""
        return frozenset(core for tenure in self._live.values() for core in tenure.cores)

    @property
    def live(self) -> tuple[LiveLease, ...]:
        """What the manager hears of them."""
        return tuple(LiveLease(tenure.lease, tenure.epoch,
                               tuple(GrantedWorker(seat, cores) for seat, cores in tenure.seats.items()))
                     for tenure in self._live.values())

    def end_of(self, lease: int) -> float | None:
        """When the lease ends at the latest: with the node's window, whatever its grant says. None: not known."""
        tenure = self._live.get(lease)
        return None if tenure is None else self._end(tenure)

    # ---- what happens ----------------------------------------------------------------------------

    def window_ends(self, at: float | None) -> None:
        """The node's window ends then, for leases that run, too; None: no end is known (any more)."""
        self._window_end = at

    def calls_take(self, seconds: Mapping[int, float]) -> None:
        """Lease → what its longest calls take, by what its workers have run so far."""
        for lease, call_s in seconds.items():
            if lease in self._live:
                self._live[lease].call_s = call_s

    def begin(self, lease: int, epoch: int, uid: int, session: int, workers: Iterable[GrantedWorker],
              memory_per_worker: int, hard_end: float | None) -> Tenure:
        """A session uses a grant that was admitted."""
        tenure = Tenure(lease, epoch, uid, session, memory_per_worker, hard_end,
                        {worker.number: worker.cores for worker in workers})
        self._live[lease] = tenure
        return tenure

    def abandon(self, lease: int, now: float) -> list[Action]:
        """The last of its ranks is gone, and nobody waits for what its workers still do."""
        return self._stop_lease(lease, Cause.SESSION_ENDED, 0.0, now)

    def release(self, lease: int, grace_s: float, now: float) -> list[Action]:
        """Its rank gives it back."""
        return self._stop_lease(lease, Cause.RELEASED, grace_s, now)

    def fail(self, lease: int, now: float) -> list[Action]:
        """No worker of it can be started."""
        return self._stop_lease(lease, Cause.REVOKED, 0.0, now)

    def order(self, order: StopOrder, now: float) -> list[Action]:
        """The manager has workers stopped. Of a lease that hasn't begun its grant is refused from now on."""
        tenure = self._live.get(order.lease_id)
        if tenure is None:
            return [Forbid(order.lease_id)]
        return self._stop(tenure, order.workers or tenure.seats, order.cause, order.grace_s, now)

    def lend(self, spare: Collection[int], grace_s: float, now: float) -> list[Action]:
        """The node lends these cores: exactly the workers on others have to go, whose owners are there."""
        return [action for tenure in self.all
                for action in self._stop(tenure, [seat for seat, cores in tenure.seats.items()
                                                  if not all(core in spare for core in cores)],
                                         Cause.REVOKED, grace_s, now, owned=True)]

    def reclaim(self, lease: int, seats: Iterable[int], grace_s: float, now: float, *, owned: bool) -> list[Action]:
        """Somebody on the node wants the cores of these seats."""
        tenure = self._live.get(lease)
        return [] if tenure is None else self._stop(tenure, seats, Cause.REVOKED, grace_s, now, owned=owned)

    def leave(self, grace_s: float, now: float) -> list[Action]:
        """The agent ends."""
        return [action for tenure in self.all
                for action in self._stop(tenure, tenure.seats, Cause.REVOKED, grace_s, now)]

    def tick(self, now: float) -> list[Action]:
        """Hard ends that have come, or are so near that a call which begins now would not be done by then.

        What runs there may go on until the end; nothing is begun any more.
        """
        return [action for tenure in self.all if now >= self._drained_at(tenure)
                for action in self._stop(tenure, tenure.seats, Cause.EXPIRED, max(0.0, self._end_s(tenure) - now), now)]

    def next_deadline(self) -> float | None:
        """When to call tick() at the latest."""
        # What was told to stop has to be gone by then anyway.
        return min((at for tenure in self._live.values()
                    if not tenure.ending and (at := self._drained_at(tenure)) != math.inf), default=None)

    @property
    def next_end(self) -> float | None:
        """The first end of a lease that still takes calls."""
        return min((end for tenure in self._live.values() if not tenure.ending and (end := self._end(tenure)) is not None),
                   default=None)

    def freed(self, lease: int, seat: int) -> bool:
        """Nothing of this seat may run on its cores any more. True if that is news."""
        tenure = self._live.get(lease)
        if tenure is None or tenure.seats.pop(seat, None) is None:
            return False
        tenure.stops.pop(seat, None)
        if not tenure.seats:
            del self._live[lease]
        return True

    # ---- inside ----------------------------------------------------------------------------------

    def _end(self, tenure: Tenure) -> float | None:
        return min((end for end in (tenure.hard_end, self._window_end) if end is not None), default=None)

    def _end_s(self, tenure: Tenure) -> float:
        end = self._end(tenure)
        return math.inf if end is None else end

    def _drained_at(self, tenure: Tenure) -> float:
        return self._end_s(tenure) - (_DRAIN * tenure.call_s + _DRAIN_MORE_S if tenure.call_s else 0.0)

    def _stop_lease(self, lease: int, cause: Cause, grace_s: float, now: float) -> list[Action]:
        tenure = self._live.get(lease)
        return [] if tenure is None else self._stop(tenure, tenure.seats, cause, grace_s, now)

    def _stop(self, tenure: Tenure, seats: Iterable[int], cause: Cause, grace_s: float, now: float, *,
              owned: bool = False) -> list[Action]:
        """Stops those that were not told to stop as soon already; its rank hears it first."""
        until = now + max(0.0, grace_s)
        until = min(until, max(now, self._end_s(tenure)))
        stop = tuple(seat for seat in seats
                     if seat in tenure.seats and until < tenure.stops.get(seat, math.inf))
        if not stop:
            return []
        tenure.stops.update(dict.fromkeys(stop, until))
        actions: list[Action] = []
        if cause in _NEWS and tenure.ending and not tenure.told:
            tenure.told = True
            actions.append(Ended(tenure.session, tenure.lease, cause))
        return [*actions, Stop(tenure.lease, stop, cause, until - now, owned)]

"""The lease book: who holds which cores of which node, and until when.

    REQUESTED ──▶ GRANTED ──▶ ACTIVE
        │            │           │   release, revoke, expiry, end of the session
        ▼            ▼           ▼
     refused      REVOKING: its workers were told to stop and hold their cores
                     │           until the agent says that they are gone
                     ▼           ▼
            RELEASED | EXPIRED | LOST      (LOST at once, from any live state)

No clock, no socket, no disk: `handle` takes an event and the time, returns what
to do, and the shell does it in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

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

Picker = Callable[
    [Sequence[int], int, int, int, Mapping[int, int]], "list[tuple[int, ...]]"]
"""Placement policy: (spare, workers_min, workers_max, cores_per_worker, numa) →
the cores of each worker; `placement.pick_cores` is one."""


class LeaseBook:
    """Grants, revokes and ends leases; the only owner of who holds a core.

    The shell's part:

    * one book, one thread at a time; events in the order in which they happened;
    * do the returned actions in order. `Store(epoch)` comes before the `Grant`
      that needs it: if it can't be made durable, don't answer, and hand in a
      `Revoke` for the grant's leases;
    * a new book starts from the stored epoch: `LeaseBook(pick, epoch=stored)`;
      it grants nothing on a node before that node's first `NodeReport`;
    * call `handle(Tick(), now)` at `next_deadline()`, and now and then, so that
      old answers are forgotten.

    Every event may come twice: the second one changes nothing and, for a demand,
    gives the same answer. Events about leases, workers or nodes that the book
    doesn't know (any more) are ignored, since they race with each other.
    """

    def __init__(self, pick: Picker, *, epoch: int = 0,
                 activate_within_s: float | None = None,
                 remember_s: float = 3600.0) -> None:
        raise NotImplementedError

    @property
    def epoch(self) -> int:
        """The highest epoch given out."""
        raise NotImplementedError

    @property
    def leases(self) -> Sequence[Lease]:
        """All live leases (GRANTED, ACTIVE, REVOKING), oldest first."""
        raise NotImplementedError

    def lease(self, lease_id: int) -> Lease | None:
        """The lease as it stands, ended ones too until they are forgotten."""
        raise NotImplementedError

    def session_leases(self, session: int) -> Sequence[Lease]:
        """The live leases of one session, oldest first."""
        raise NotImplementedError

    @property
    def nodes(self) -> Sequence[NodeView]:
        """Every node that has reported, by name: spare, lent and free cores."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When the next live lease expires; None: nothing to wait for."""
        raise NotImplementedError

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event, return what to do, in order.

        Raises ValueError for an event that makes no sense in itself (a demand
        for -1 workers, a report that lists a core twice); nothing has changed
        then.
        """
        raise NotImplementedError

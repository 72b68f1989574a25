"""A lease book that outlives its manager: an action is handed out once what it rests on is on disk.

    events ──▶ book ──▶ actions wait ──▶ one flush for all of them ──▶ actions
                └────── changes wait ──▶ ledger ──┘

Killed at any point, the manager has said nothing that the next one doesn't know.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rfaas_mpi import api
from rfaas_mpi.errors import StoreError
from rfaas_mpi.leases import Changes, Event, Lease, LeaseBook, LeaseState, Notify, Store
from rfaas_mpi.leases.held import Held
from rfaas_mpi.leases.nodes import Chooser, Picker
from rfaas_mpi.manager.accounts import RECORD, Usage
from rfaas_mpi.manager.credit import Lent, LentLine
from rfaas_mpi.manager.directory import Registration
from rfaas_mpi.manager.ledger import Ledger

__all__ = ["REMEMBER_MOST", "Group", "Registry"]

REMEMBER_MOST = 20_000
"""Ended leases, and answers, that a book keeps in memory; the ledger has all of them."""

KEEP_HEARD_NS = 60 * 10**9
"""So often it is written down that an agent whose leases live was heard of."""


@contextmanager
def _no_collections() -> Iterator[None]:
    """Nothing that is read from a ledger is garbage: looking for it only costs time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Group:
    """Actions that may be done once their changes are written down."""

    def __init__(self) -> None:
        self.actions: list[Any] = []
        self.usage: list[Usage] = []
        self.agents: dict[str, tuple[Registration, ...]] = {}
        self.jobs: dict[int, str] = {}
        self.lent: list[LentLine] = []
        self.heard: dict[str, tuple[int, int]] = {}
        self.events: list[api.Event] = []
        self.changes: list[Changes] = []
        self.epoch = 0

    @property
    def to_write(self) -> bool:
        """True if any of it has to be on disk."""
        return bool(self.usage or self.agents or self.jobs or self.lent or self.heard or self.events
                    or self.changes)

    def __bool__(self) -> bool:
        return self.to_write or bool(self.actions)


class Registry:
    """One book, one ledger. `handle` as often as events come; then `take`, `write` and do what it returns.

    `write` may run in another thread while the book goes on: the events of that
    time make the next group, so that many of them share one flush. Groups are
    written in the order in which they were taken, one at a time.

    A write that fails (the disk is full) keeps its group: nothing of it has been
    said to anybody, and the next `write` begins with it.
    """

    def __init__(self, ledger: Ledger, pick: Picker | Chooser, now: float, *, begin_within_s: float = 20.0,
                 remember_s: float = 3600.0, remember_most: int = REMEMBER_MOST,
                 quota: Callable[[int], int | None] = lambda uid: None,
                 held: Held | None = None, lent: Lent | None = None,
                 clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.begin_within_s = begin_within_s
        self.owners: Callable[[Lease], Mapping[int, int]] = lambda lease: {}     # whose cores it holds
        self._lent = lent
        self._clock = clock
        self._wall = wall
        self._ledger = ledger
        self._group = Group()
        self._unwritten: list[Group] = []
        # Above those of every manager that was here before, also of one that kept none.
        self._next_event = max(ledger.last_event() + 1, int(wall()) * 1000)
        self.book = LeaseBook(pick, epoch=ledger.epoch, activate_within_s=begin_within_s, remember_s=remember_s,
                              remember_most=remember_most, durable=True, quota=quota, held=held)
        with _no_collections():
            kept = ledger.load(remember_s=remember_s, remember_most=remember_most)
            try:
                self.book.restore(kept, now)
            except ValueError as error:
                raise StoreError(f"{ledger.name} makes no sense: {error}",
                                 hint="put a backup in its place") from error
            # For the accounts: what a lease held, which its end leaves out, and the last word of its agent.
            self._held = {lease.id: lease for lease in kept.leases if lease.state.live}
            self._clocks: dict[str, dict[int, int]] = {}     # node → incarnation → ns
            self._kept: dict[str, tuple[int, int]] = ledger.heard()
            for node, (incarnation, clock_ns) in self._kept.items():
                self._clocks[node] = {incarnation: clock_ns}
            self._lending = Counter(lease.node for lease in self._held.values())

    def handle(self, event: Event, now: float) -> None:
        """Takes an event. ValueError for one that makes no sense; nothing has changed then."""
        self.add(self.book.handle(event, now))

    def add(self, actions: Iterable[Any]) -> None:
        """Takes what the book, or whoever decides with it, wants to have done."""
        for action in actions:
            if isinstance(action, Store):
                self._group.epoch = action.epoch
                continue
            self._group.actions.append(action)
            if isinstance(action, Notify) and (lease := self.book.lease(action.lease_id)) is not None:
                self._group.events.append(api.Event(
                    self._next_event, self._wall(), lease.node, lease.uid, lease.id, action.workers, action.cause,
                    action.grace_s))
                self._next_event += 1

    def used(self, usage: Iterable[Usage]) -> None:
        """Takes what workers used, to be written down with the rest."""
        self._group.usage += usage

    def reported(self, node: str, incarnation: int, clock_ns: int) -> None:
        """Takes that a node's agent has spoken, at that moment of its clock."""
        clocks = self._clocks.setdefault(node, {})
        if incarnation not in clocks and len(clocks) > 1:
            del clocks[min(clocks)]
        clocks[incarnation] = max(clock_ns, clocks.get(incarnation, 0))
        # A manager that was restarted knows by it what a lease held of a node that died meanwhile.
        kept = self._kept.get(node)
        if self._lending[node] and (kept is None or kept[0] != incarnation or clock_ns >= kept[1] + KEEP_HEARD_NS):
            self._kept[node] = self._group.heard[node] = incarnation, clock_ns

    def agents(self, node: str, known: tuple[Registration, ...]) -> None:
        """Takes what is known of a node's agents, to be written down with the rest; nothing: it is forgotten."""
        self._group.agents[node] = known
        if not known:
            self._clocks.pop(node, None)
            self._kept.pop(node, None)
            self._group.heard.pop(node, None)

    def job(self, session: int, job: str) -> None:
        """Takes the batch job in which a session runs, for the accounts."""
        self._group.jobs[session] = job

    def take(self) -> Group:
        """Everything since the last call: false if there is nothing to write or do."""
        group, self._group = self._group, Group()
        changes = self.book.changes()
        if changes or group.epoch:
            group.changes.append(changes)
        for lease in changes.leases:
            before = self._held.get(lease.id)
            if lease.state.live:
                self._lending[lease.node] += before is None
                self._held[lease.id] = lease
            elif before is not None:
                del self._held[lease.id]
                self._lending[lease.node] -= 1
                if not self._lending[lease.node]:
                    del self._lending[lease.node]
                if lease.state is LeaseState.LOST:
                    group.usage += self._lost(before)
        if self._lent is not None:
            now = self._clock()
            for lease in changes.leases:
                group.lent += self._lent.changed(lease, self.owners(lease) if self._lent.begun(lease) else {}, now)
            group.lent += self._lent.due(now)
        return group

    def _lost(self, lease: Lease) -> list[Usage]:
        """What a lease held until its agent was last heard of: nobody else may be left to tell it."""
        until_ns = self._clocks.get(lease.node, {}).get(lease.incarnation, 0)
        if not 0 < lease.seen_ns < until_ns:
            return []
        return [Usage(node=lease.node, incarnation=lease.incarnation, number=RECORD, lease=lease.id, uid=lease.uid,
                      cores=len(worker.cores), memory_bytes=lease.memory_per_worker,
                      held_s=(until_ns - lease.seen_ns) / 1e9, cpu_s=0.0, seat=worker.number)
                for worker in lease.workers]

    def must_write(self, group: Group) -> bool:
        """False if `write` would not touch the disk."""
        return group.to_write or bool(self._unwritten)

    def write(self, group: Group) -> list[Any]:
        """Makes the group durable and returns what may be done now, in order. StoreError if it can't be written."""
        if group:
            self._unwritten.append(group)
        waiting = self._unwritten
        changes = [each for one in waiting for each in one.changes]
        usage = [each for one in waiting for each in one.usage]
        agents = {node: known for one in waiting for node, known in one.agents.items()}
        jobs = {session: job for one in waiting for session, job in one.jobs.items()}
        lent = [line for one in waiting for line in one.lent]
        heard = {node: clock for one in waiting for node, clock in one.heard.items()}
        events = [event for one in waiting for event in one.events]
        if changes or usage or agents or jobs or lent or heard or events:
            self._ledger.write(changes, usage, agents, jobs, lent, heard, events)
        self._unwritten = []
        return [action for one in waiting for action in one.actions]

    def flush(self) -> list[Any]:
        """take and write in one."""
        return self.write(self.take())

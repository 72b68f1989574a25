"""Keeps each worker within the memory that it was granted.

Its own allocations are bounded by its data limit (child.py), which makes them raise MemoryError. That bounds neither
what it starts nor what it maps or writes to a tmpfs. So it gets a control group, in which the kernel ends what takes
too much; where no group can be made, the agent looks at what it holds, and ends it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from rfaas_mpi.agent.groups import Group, Roots, maker, remove_stale
from rfaas_mpi.agent.kernel_files import pid_of, read_text
from rfaas_mpi.agent.reclaim import started_by
from rfaas_mpi.agent.spawner import Spawner, SpawnerLost
from rfaas_mpi.errors import ServiceError

__all__ = ["MemoryGuard", "Means", "WATCH_S", "held_bytes"]

log = logging.getLogger("rfaas_mpi.agent")

WATCH_S = 0.5                        # how often those without a group are looked at
# What a worker has before its first kernel: interpreter, numpy, its copies of the zygote's pages. It
# leaves room above the data limit, too, so that an honest kernel meets that one, and can go on.
BASE_BYTES = 64 << 20


class Means(StrEnum):
    """What bounds memory, the best first."""

    CGROUP = "cgroup"
    WATCH = "watch"


class Parent(Protocol):
    """A zygote, as pool.py holds it."""

    spawner: Spawner | None          # None: it is our own child
    number: int                      # the spawner's for it


class Guarded(Protocol):
    """A worker, as pool.py holds it."""

    number: int
    pid: int
    pidfd: int
    memory_bytes: int

    @property
    def zygote(self) -> Parent: ...


class _Bound:
    """A process in a control group of its own, made by us or by the spawner."""

    def __init__(self, zygote: Parent, number: int, name: str, roots: Roots, low: bool, memory_bytes: int) -> None:
        """OSError if it can't be made."""
        self.number = number
        self.spawner, self.zygote = zygote.spawner, zygote.number
        self.entrances: list[int] = []       # whoever asks for it closes them
        if self.spawner is None:
            self.group = Group.make(name, roots, memory_bytes, low=low)
            try:
                self.entrances = self.group.entrances()
            except BaseException:
                self.group.remove()
                raise
        else:
            self.entrances = self.spawner.make_group(self.zygote, number, memory_bytes, low=low)
            self.group = Group(name, roots, low)  # to look at

    def enter(self, pid: int, pidfd: int) -> None:
        if self.spawner is None:
            self.group.enter(pid)
        else:
            self.spawner.enter(self.zygote, self.number, pidfd)

    def limit(self, memory_bytes: int) -> None:
        if self.spawner is None:
            self.group.limit(memory_bytes)
        else:
            self.spawner.limit(self.zygote, self.number, memory_bytes)

    def remove(self) -> tuple[bool, int]:
        """Ends what is in it: whether it is removed already, and how often its limit had killed there."""
        if self.spawner is None:
            kills = self.group.oom_kills()
            return self.group.remove(), kills
        try:
            return True, self.spawner.remove_group(self.zygote, self.number)
        except (ProcessLookupError, FileNotFoundError, SpawnerLost):
            return True, 0            # it went with its zygote, or will with the spawner


@dataclass
class _Kept:
    worker: Guarded
    bound: _Bound | None = None


class MemoryGuard:
    """Of all workers of one agent. close() removes what it made."""

    def __init__(self, wanted: str = "auto", spawner: Spawner | None = None, *, low: bool = False,
                 root: Path = Path("/")) -> None:
        """`wanted` is auto, cgroup or watch. ServiceError where cgroup is wanted and can't be had.

        With `low` the groups have low priority: on version 2 a process is in one group only, and
        those of other users' workers can't be let into one of ours (priority.py).
        """
        self._roots = Roots.find(root, to_look=spawner is not None) if wanted != "watch" else Roots()
        if spawner is None:
            self._roots = self._roots.settle(os.getpid())
        why = spawner.why_no_groups if spawner is not None else self._roots.why_not
        if low and spawner is None and self._roots.unified and self._roots.cpu is None:
            why = why or f"a worker is in one group only, and none below {self._roots.memory} could have low priority"
        if wanted == "watch":
            why = "no control groups are to be made"
        self.why_no_groups = why
        if wanted == "cgroup" and why:
            raise ServiceError(f"memory_limit=cgroup can't be kept on node {os.uname().nodename}: {why}",
                               hint="start the agent as root on a node whose control groups have the memory "
                                    "controller, or set RFAAS_MEMORY_LIMIT=auto")
        self._low = low and (spawner is not None or self._roots.unified)
        self._maker = maker() if spawner is None else maker(spawner.pid)
        self._kept: dict[int, _Kept] = {}
        self._expected: dict[int, _Bound] = {}                   # of workers that are being forked
        self._spares: dict[int, tuple[Parent, _Bound]] = {}      # by pid
        self._next_group = 1
        self._removing: list[Group] = []
        if spawner is None and not why:
            for name in remove_stale(self._roots):
                log.info("ended what was left in %s", name)

    @property
    def means(self) -> Means:
        """What bounds the next worker's memory."""
        return Means.WATCH if self.why_no_groups else Means.CGROUP

    @property
    def moves(self) -> bool:
        """Whether processes are moved into their groups, which takes 10 ms or 20; else they enter them themselves."""
        return not self.why_no_groups and self._roots.unified

    @property
    def may_unbind(self) -> bool:
        """Whether a process may run elsewhere than before once it is in its group (Group.enter)."""
        return not self.why_no_groups and self._roots.unified

    def status(self) -> dict[str, str]:
        """For people and programs."""
        return {"means": str(self.means), "why": self.why_no_groups}

    def held_by(self, zygotes: Iterable[Parent]) -> int:
        """Memory that zygotes of other users hold, which nobody was granted; 0 where they are in no group."""
        if self.why_no_groups or self._roots.why_not:
            return 0
        return sum(Group(f"{self._maker}-z{zygote.number}", self._roots).anonymous_bytes()
                   for zygote in zygotes if zygote.spawner is not None)

    def expect(self, zygote: Parent, number: int, memory_bytes: int) -> list[int]:
        """The zygote is about to fork that worker, whose group is made: by what the fork enters it, the caller's to
        close. None where it is in no group, or is moved there."""
        if self.why_no_groups or self.moves or not memory_bytes:
            return []
        try:
            bound = self._make(zygote, memory_bytes + BASE_BYTES)
        except OSError as error:
            log.warning("worker=%d will have no control group: %s", number, error)
            return []
        self._expected[number] = bound
        return bound.entrances

    def prepare(self, zygote: Parent, pidfd: int) -> None:
        """A process of it waits to become a worker: it is moved into a group now, while nobody waits for it."""
        self.forget(zygote)           # it has one at a time, whatever it says
        if not self.moves:
            return
        try:
            pid = pid_of(pidfd)
            self._spares[pid] = zygote, self._bind(zygote, pid, pidfd)
        except (ProcessLookupError, ValueError):
            return                    # it has ended already, or was none
        except OSError as error:
            log.warning("a fork has no control group: %s", error)

    def forget(self, zygote: Parent) -> None:
        """What it had forked ahead will be no worker."""
        for pid in [pid for pid, (parent, _) in self._spares.items() if parent is zygote]:
            self._drop(self._spares.pop(pid)[1])

    def begin(self, worker: Guarded) -> None:
        """From here on it is bounded, once its process exists."""
        kept = self._kept[worker.number] = _Kept(worker)
        _, kept.bound = self._spares.pop(worker.pid, (None, self._expected.pop(worker.number, None)))
        if not self.moves or not worker.memory_bytes:
            return
        try:
            if kept.bound is None:
                kept.bound = self._bind(worker.zygote, worker.pid, worker.pidfd)
            kept.bound.limit(worker.memory_bytes + BASE_BYTES)
        except ProcessLookupError:
            return                    # it has ended already
        except OSError as error:
            log.warning("worker=%d pid=%d has no control group: %s", worker.number, worker.pid, error)

    def check(self, worker: Guarded) -> None:
        """It serves: moved into its group if it isn't there, for another user's zygote may do what it likes."""
        kept = self._kept.get(worker.number)
        if kept is None or kept.bound is None or self.moves or kept.bound.group.holds(worker.pid):
            return
        log.warning("worker=%d pid=%d has not entered its control group: it is moved there", worker.number, worker.pid)
        try:
            kept.bound.enter(worker.pid, worker.pidfd)
        except ProcessLookupError:
            return                    # it has ended already
        except OSError as error:
            log.warning("worker=%d pid=%d has no control group: %s", worker.number, worker.pid, error)
            self._drop(kept.bound)
            kept.bound = None

    def _make(self, zygote: Parent, memory_bytes: int = 0) -> _Bound:
        number, self._next_group = self._next_group, self._next_group + 1
        return _Bound(zygote, number, f"{self._maker}-w{number}", self._roots, self._low, memory_bytes)

    def _bind(self, zygote: Parent, pid: int, pidfd: int) -> _Bound:
        bound = self._make(zygote)
        try:
            bound.enter(pid, pidfd)
        except BaseException:
            self._drop(bound)
            raise
        return bound

    def _drop(self, bound: _Bound) -> bool:
        """Whether its limit had killed."""
        removed, kills = bound.remove()
        if not removed:
            self._removing.append(bound.group)
        return kills > 0

    def lowered(self, number: int) -> bool:
        """Whether its group gives it low priority."""
        kept = self._kept.get(number)
        return self._low and kept is not None and kept.bound is not None

    def end(self, number: int) -> bool:
        """The worker's process has ended, and so does all that it started: whether its limit has killed there."""
        kept = self._kept.pop(number, None)
        bound = self._expected.pop(number, None) if kept is None else kept.bound
        return bound is not None and self._drop(bound)

    def over(self) -> list[int]:
        """Workers that hold more than they were granted, or have lost a part for that: they are to be killed.

        Call it every WATCH_S while `watches`.
        """
        self._removing = [group for group in self._removing if not group.remove()]
        return [number for number, kept in self._kept.items() if self._is_over(kept)]

    def _is_over(self, kept: _Kept) -> bool:
        if kept.bound is not None:
            # Version 2 kills all that is in the group, version 1 one process, which need not be the worker.
            return not kept.bound.group.unified and kept.bound.group.oom_kills() > 0
        return (kept.worker.memory_bytes > 0 and kept.worker.pid > 0
                and held_bytes(kept.worker.pid) > kept.worker.memory_bytes + BASE_BYTES)

    @property
    def watches(self) -> bool:
        """Whether over() has anything to look at."""
        return bool(self._removing) or any(
            kept.worker.memory_bytes and (kept.bound is None or not kept.bound.group.unified)
            for kept in self._kept.values())

    def close(self) -> None:
        """Ends what is in groups of ours, and removes them. Safe to call twice."""
        bounds = [*(kept.bound for kept in self._kept.values()), *self._expected.values(),
                  *(bound for _, bound in self._spares.values())]
        groups = [bound.group for bound in bounds if bound is not None and bound.spawner is None] + self._removing
        self._kept.clear()
        self._expected.clear()
        self._spares.clear()
        self._removing = []
        for group in groups:
            try:
                group.close()
            except OSError as error:
                log.error("%s", error)


def held_bytes(pid: int) -> int:
    """Memory of a process and all that it started, swapped out or not, that is nobody else's; 0 if it is gone."""
    return sum(map(_own_bytes, _tree(pid)))


def _tree(pid: int) -> Iterable[int]:
    yield pid
    yield from started_by(pid)


def _own_bytes(pid: int) -> int:
    # The process' own name is in there, with any character that ends a line for splitlines().
    return sum(int(line.split()[1]) << 10 for line in read_text(Path(f"/proc/{pid}/status")).split("\n")
               if line.startswith(("RssAnon:", "VmSwap:")))

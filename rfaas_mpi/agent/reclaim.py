"""Takes cores back from a worker: every thread elsewhere, with all that it started, and certainty that none is left.

A core is wanted at once, and a killed process may need long to end: its memory is freed by its own last thread, on
whatever core that may use. So once it was killed, its threads are taken to cores of the agent's own, and end there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator

__all__ = ["Clearing", "runs_only_on", "started_by", "threads"]

# Each round sees what began during the one before. Only what forks on and on needs more.
_ROUNDS = 8


def threads(pid: int) -> list[int]:
    """A process' threads, those that are just ending among them; none once it is gone."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def started_by(pid: int, *, but: Collection[int] = ()) -> Iterator[int]:
    """The living descendants of a process, parents first; without these, and theirs."""
    left = [pid]                     # no recursion: how deep they go is for them to choose
    while left:
        parent = left.pop()
        for thread in threads(parent):
            for child in _children(parent, thread):
                if child not in but:
                    yield child
                    left.append(child)


def runs_only_on(pid: int, cores: Collection[int]) -> bool:
    """Whether no thread of the process may run elsewhere; True if it is gone."""
    for thread in threads(pid):
        try:
            if not os.sched_getaffinity(thread) <= set(cores):
                return False
        except ProcessLookupError:
            continue                  # it has ended
    return True


def _children(pid: int, thread: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{thread}/children") as file:
            return [int(word) for word in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _there(pidfd: int) -> bool:
    """Whether the number still is this process'."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


class Clearing:
    """A worker that has to leave its cores; whoever owns it kills it first.

    `off` are the worker's cores, which nobody else of ours uses; `to` those where it may end. `parent` is its zygote,
    which inherits what the worker's own children leave behind; `others` are that one's other workers.
    """

    def __init__(self, pid: int, off: Collection[int], to: Collection[int], *, parent: int = 0,
                 others: Collection[int] = ()) -> None:
        self.pid = pid
        self._off = frozenset(off)
        self._to = frozenset(to)
        self._parent = parent
        self._others = frozenset((pid, *others))
        self._started: dict[int, int] = {}       # what it started → a pidfd

    def cleared(self) -> bool:
        """Takes all of it off its cores; True: nothing of it may run there any more.

        A thread that runs there is stopped for that, and what the worker started is killed. Of a worker that was
        killed before, True means for ever. PermissionError if it isn't ours to move, OSError where the other cores
        are not open to it.
        """
        for _ in range(_ROUNDS):
            moved = self._move(self.pid)
            for child in (*started_by(self.pid), *self._left_behind()):
                moved |= self._end(child)
            for child, pidfd in self._started.items():
                moved |= _there(pidfd) and self._move(child)
            if not moved:
                return True
        return False

    def _left_behind(self) -> list[int]:
        """Processes that only the worker's cores are open to, and whose parent is gone: nobody else has those."""
        found = []
        for child in _children(self._parent, self._parent) if self._parent else ():
            try:
                if child not in self._others and self._off.issuperset(os.sched_getaffinity(child)):
                    found.append(child)
            except ProcessLookupError:
                continue
        return found

    def _end(self, child: int) -> bool:
        """Kills and moves it; False if that was done before."""
        if child in self._started:
            return False
        try:
            pidfd = self._started[child] = os.pidfd_open(child)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self._move(child)
        return True

    def _move(self, pid: int) -> bool:
        """Whether a thread of this process had to be moved."""
        moved = False
        for thread in threads(pid):
            try:
                if not self._off.isdisjoint(os.sched_getaffinity(thread)):
                    os.sched_setaffinity(thread, self._to)
                    moved = True
            except ProcessLookupError:
                continue              # it has ended
        return moved

    def close(self) -> None:
        """Safe to call twice."""
        for pidfd in self._started.values():
            os.close(pidfd)
        self._started.clear()

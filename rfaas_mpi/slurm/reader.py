"""One reader of Slurm in a process: asked by whoever wants to know, it asks slurmctld at most once in a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from rfaas_mpi.errors import ServiceError

__all__ = ["EVERY_S", "Pace", "Reader"]

# Nobody asks slurmctld more often than this,
EVERY_S = 10.0
# nor, where it doesn't answer, sooner than twice as long after each time, up to this.
_AWAY_S = 300.0

T = TypeVar("T")


class Pace:
    """When to ask next, pure. `now` in seconds, rising."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._failures = 0
        self.next_at = float("-inf")

    def due(self, now: float) -> bool:
        return now >= self.next_at

    def answered(self, now: float) -> None:
        self._failures = 0
        self.next_at = now + self._every_s

    def failed(self, now: float) -> None:
        self._failures += 1
        self.next_at = now + max(self._every_s, min(_AWAY_S, self._every_s * 2.0**min(self._failures - 1, 16)))


class Reader(Generic[T]):
    """What `read` says, kept: what was read last stays, with its age, while slurmctld doesn't answer.

    `read` raises ServiceError then. For several threads.
    """

    def __init__(self, read: Callable[[], T], every_s: float = EVERY_S,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self._pace = Pace(every_s)
        self._lock = threading.Lock()
        self._found: T | None = None
        self._at: float | None = None
        self.error = ""                      # why it couldn't be read again; "": it could

    def look(self) -> T | None:
        """As it was read last, now if it is time; None if it never could be."""
        with self._lock:
            now = self._clock()
            if self._pace.due(now):
                try:
                    self._found, self._at, self.error = self._read(), now, ""
                    self._pace.answered(self._clock())
                except ServiceError as error:
                    self.error = Exception.__str__(error)
                    self._pace.failed(self._clock())
            return self._found

    @property
    def age_s(self) -> float | None:
        """How old that is; None: it was never read."""
        return None if self._at is None else self._clock() - self._at

    @property
    def next_in_s(self) -> float:
        """So long `look` only repeats itself."""
        return max(0.0, self._pace.next_at - self._clock())

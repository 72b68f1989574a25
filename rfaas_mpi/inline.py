"""transport="inline": the fabric's rank side without workers; a kernel runs in the call that starts it.

For a debugger, and for machines where nothing can be lent: the same checks, the
same copies and the same errors as with workers.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rfaas_mpi.errors import ClosedError, ForkedError
from rfaas_mpi.types import Outcome

__all__ = ["InlineInvoker", "InlineRequest"]

Run = Callable[[], tuple[Outcome, Any]]
"""Runs a kernel; its outcome, and the error's text or the result's parts."""


# As in csrc/arena.c. Smaller arrays lie scattered anyway.
_LARGE_BYTES = 1 << 20
_PAGE_BYTES = 4096
_STEP_BYTES = 25 * 64


class InlineRequest:
    """As fabric.Request, for a kernel that runs here."""

    worker = 0
    channel = None

    def __init__(self, invoker: InlineInvoker, run: Run, out_sizes: tuple[int, ...]) -> None:
        self._invoker = invoker
        self._run: Run | None = run
        self._result: Any = None
        self._watched = False
        self.out_sizes = out_sizes
        self.active = False
        self.outcome: int = Outcome.PENDING
        self.id = 0
        self.attempts = 0
        self.exec_ns = 0
        self.detail = b""

    @property
    def out_bytes(self) -> int:
        """Bytes of the first output."""
        return self.out_sizes[0] if self.out_sizes else 0

    def start(self, timeout_s: float | None = None) -> None:
        """Runs the kernel. Time limits are not enforced: nobody can stop this thread."""
        if self._run is None:
            raise ClosedError("this request was freed; make another")
        self.id = self._invoker.begin()
        self.attempts = 1
        self.outcome = Outcome.PENDING
        start = self._invoker.clock()
        outcome, found = self._run()
        self.exec_ns = self._invoker.clock() - start
        self._result = found
        self.detail = b"" if outcome is Outcome.OK else found
        self.outcome = outcome
        if self._watched:
            self._invoker.ended(self)

    def restart(self) -> None:
        """Never needed: nothing is lost here."""
        self.start()

    def test(self) -> bool:
        return self.outcome != Outcome.PENDING

    def wait(self, timeout_s: float | None = None) -> bool:
        return self.test()

    def cancel(self) -> bool:
        return False

    def watch(self) -> None:
        self._watched = True
        if self.test():
            self._invoker.ended(self)

    def result(self) -> Any:
        return self._result

    def close(self) -> None:
        self._run = None
        self._result = None


class InlineInvoker:
    """As fabric.Invoker, without channels."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self.clock = clock
        self.closed = False
        self.channels: list[Any] = []
        self.queued = 0
        self.in_flight = 0
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._large = itertools.count()
        self._ended: deque[InlineRequest] = deque()
        self._bell = threading.Condition()

    def begin(self) -> int:
        """The next invocation's id. Raises ClosedError and ForkedError as the fabric does."""
        self._live()
        if os.getpid() != self._pid:
            raise ForkedError("this executor belongs to the process that made it; make another one here")
        return next(self._ids)

    def _live(self) -> None:
        if self.closed:
            raise ClosedError("the executor is shut down; make another Executor")

    def alloc(self, nbytes: int, *, zero: bool = False) -> Any:
        """64-byte aligned memory, as the workers' arenas give it: large arrays begin at different lines of a page."""
        self._live()
        spare, start = 64, 0
        if nbytes >= _LARGE_BYTES:
            spare, start = _PAGE_BYTES, next(self._large) * _STEP_BYTES
        raw = np.zeros(nbytes + spare, np.uint8) if zero else np.empty(nbytes + spare, np.uint8)
        start = (start - raw.__array_interface__["data"][0]) % spare
        return raw[start:start + nbytes].data

    def locate(self, address: int, nbytes: int) -> None:
        return None

    def request(self, run: Run, outputs: Sequence[np.ndarray]) -> InlineRequest:
        return InlineRequest(self, run, tuple(out.nbytes for out in outputs))

    def ended(self, request: InlineRequest) -> None:
        """Tells next_watched."""
        with self._bell:
            self._ended.append(request)
            self._bell.notify_all()

    def next_watched(self, timeout_s: float | None) -> list[InlineRequest]:
        with self._bell:
            self._bell.wait_for(lambda: self._ended or self.closed, timeout_s)
            found = list(self._ended)
            self._ended.clear()
            return found

    def wake(self) -> None:
        with self._bell:
            self._bell.notify_all()

    def abandon(self) -> None:
        """Nothing ever waits here."""

    def stats(self) -> dict[str, int]:
        self._live()
        return {}

    def close(self) -> None:
        self.closed = True
        self.wake()

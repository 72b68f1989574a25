"""Executor.map: many calls with a bounded number of them in flight."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

__all__ = ["Results", "chunks"]

Submit = Callable[[Any], Future[Any]]


def chunks(items: Iterable[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """Lists of up to `size` items, read only as far as asked for."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


class Pump:
    """Keeps a window of calls in flight; reads its items no further than that."""

    def __init__(self, submit: Submit, items: Iterator[Any], window: Callable[[], int],
                 wait_any: Callable[[list[Any], float | None], None], *, unordered: bool) -> None:
        self._submit = submit
        self._items = items
        self._window = window
        self._wait_any = wait_any
        self._unordered = unordered
        self._flying: deque[Future[Any]] = deque()
        self._exhausted = False

    def fill(self) -> None:
        """Starts calls until the window is full or the items end."""
        limit = self._window()
        while not self._exhausted and len(self._flying) < limit:
            try:
                item = next(self._items)
            except StopIteration:
                self._exhausted = True
                return
            self._flying.append(self._submit(item))

    def next(self, deadline: float | None) -> Any:
        """The next result; StopIteration at the end, TimeoutError at the deadline."""
        if not self._flying:
            self.fill()
            if not self._flying:
                raise StopIteration
        future = self._take(deadline) if self._unordered else self._flying.popleft()
        try:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            result = future.result(left)
        except TimeoutError:
            if not future.done():
                self._flying.appendleft(future)
            raise
        self.fill()
        return result

    def _take(self, deadline: float | None) -> Future[Any]:
        while True:
            for index, future in enumerate(self._flying):
                if future.done():
                    del self._flying[index]
                    return future
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self._wait_any(list(self._flying), left)

    def drain(self) -> None:
        """Runs what is left and drops the results, as if every call had been submitted at once."""
        while self._flying or not self._exhausted:
            self.fill()
            if self._flying:
                self._flying.popleft().exception()

    def cancel(self) -> None:
        """Cancels what has not begun and reads no more items."""
        self._exhausted = True
        for future in self._flying:
            future.cancel()
        self._flying.clear()


class Results:
    """The iterator that `map` returns.

    Abandoned half-way, it cancels what has not begun. Never asked for a result,
    it leaves the calls to run to their end, as concurrent.futures does: the
    executor then sees to them before it shuts down.
    """

    def __init__(self, pump: Pump, timeout: float | None, *, chunked: bool,
                 started: Callable[[Pump], None]) -> None:
        self._pump = pump
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._chunked = chunked
        self._ready: Iterator[Any] = iter(())
        self._told = started
        self._begun = False

    def __iter__(self) -> Results:
        return self

    def __next__(self) -> Any:
        if not self._begun:
            self._begun = True
            self._told(self._pump)
        try:
            if not self._chunked:
                return self._pump.next(self._deadline)
            for value in self._ready:
                return value
            self._ready = iter(self._pump.next(self._deadline))
            return next(self._ready)
        except BaseException:
            # As a generator: once it has raised it is at its end.
            self.close()
            raise

    def close(self) -> None:
        """Cancels what has not begun. Safe to call twice."""
        self._begun = True
        self._ready = iter(())
        self._told(self._pump)
        self._pump.cancel()

    def __del__(self) -> None:
        if self._begun:
            self._pump.cancel()

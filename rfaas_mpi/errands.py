"""What may take long is done side by side, or in a thread of its own, so that nothing else waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from rfaas_mpi.errors import RFaaSError

__all__ = ["Errands", "each"]

log = logging.getLogger("rfaas_mpi.errands")

T = TypeVar("T")
R = TypeVar("R")


def each(act: Callable[[T], R], items: Iterable[T]) -> list[R | RFaaSError]:
    """`act(item)` for all items at the same time: in their order, what it returned or the RFaaSError that it raised.

    What else is raised goes through.
    """
    things = list(items)
    results: list[R | RFaaSError | None] = [None] * len(things)
    wrong: list[BaseException] = []

    def one(index: int) -> None:
        try:
            results[index] = act(things[index])
        except RFaaSError as error:
            results[index] = error

    def aside(index: int) -> None:
        try:
            one(index)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=aside, args=(index,), name="rfaas-each", daemon=True)
               for index in range(1, len(things))]
    for thread in threads:
        thread.start()
    if things:
        # The first one here: most often there is no other, and Ctrl-C has somebody to tell.
        one(0)
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
    return results  # type: ignore[return-value]


class Errands:
    """Does things in order, in a thread that ends when there is nothing to do."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._waiting: dict[object, Callable[[], object]] = {}
        self._doing: object = None
        self._running = False
        self._closed = False

    def do(self, what: object, act: Callable[[], object]) -> None:
        """Has it done, unless the same (`what`) is being done or waits; never after close()."""
        with self._changed:
            if self._closed or what in self._waiting or what == self._doing:
                return
            self._waiting[what] = act
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._doing = None
                if not self._waiting:
                    self._running = False
                    self._changed.notify_all()
                    return
                self._doing, act = next(iter(self._waiting.items()))
                del self._waiting[self._doing]
            try:
                act()
            except Exception:
                # What waits behind it is about something else.
                log.exception("could not do %s", self._doing)

    def close(self, timeout_s: float = 2.0) -> None:
        """Does nothing more; waits so long for what is being done. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.wait_for(lambda: not self._running, timeout_s)

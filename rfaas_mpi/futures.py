"""Futures: concurrent.futures.Future without a thread behind it until somebody needs one.

A result is taken by whoever waits for it, in place. Only callbacks and the
standard library's `wait` and `as_completed` have to be told: the first of them
makes the executor start its one notifier thread.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, InvalidStateError
from typing import Any, TypeVar

from rfaas_mpi.crew import Crew, History
from rfaas_mpi.types import Action, Outcome

__all__ = ["Future", "started"]

log = logging.getLogger("rfaas_mpi.futures")

T = TypeVar("T")

# The states of concurrent.futures, whose wait() compares with these words.
_PENDING = "PENDING"
_RUNNING = "RUNNING"
_CANCELLED = "CANCELLED_AND_NOTIFIED"
_FINISHED = "FINISHED"

_OK = int(Outcome.OK)


class Future(concurrent.futures.Future[T]):
    """The result of one `submit`, as concurrent.futures has it.

    `result` and `exception` raise what the kernel raised (the remote traceback
    is its `__cause__`), CancelledError, TimeoutError, or WorkerLost where no
    worker could run it and the rank must not.
    """

    # Class-level defaults of what few futures ever set: building one has to be
    # cheap, and the base class's __init__ builds a lock and a condition.
    _over: str | None = None
    _value: Any = None
    _error: BaseException | None = None
    _cond: threading.Condition | None = None
    _callbacks: list[Callable[[Any], Any]] | None = None
    _waiting: list[Any] | None = None
    _armed = False
    _free = False
    _history: History | None = None

    def __init__(self, crew: Crew, raw: Any, call: tuple[Any, ...]) -> None:
        self._crew = crew
        self._raw = raw
        self._call = call
        # Taken out by the one thread that acts on an attempt's end.
        self._free = True

    # -- results -----------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> T:
        if self._over is None:
            self._finish(timeout)
        if self._over is _CANCELLED:
            raise CancelledError
        if self._error is not None:
            try:
                raise self._error
            finally:
                # As in the standard library: no cycle of error, traceback, frame and future.
                self = None  # type: ignore[assignment]
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if self._over is None:
            self._finish(timeout)
        if self._over is _CANCELLED:
            raise CancelledError
        return self._error

    def done(self) -> bool:
        if self._over is None and self._raw.test():
            self._advance(in_place=False)
        return self._over is not None

    def cancelled(self) -> bool:
        return self.done() and self._over is _CANCELLED

    def running(self) -> bool:
        return not self.done() and bool(self._raw.worker)

    def cancel(self, force: bool = False) -> bool:
        """True if the result will not be delivered.

        Without `force` that is possible only until a worker begins it; over a
        network (tcp, verbs) only until it is sent. With it, the worker that runs
        it, now or later, is killed; what else it was given runs elsewhere.
        """
        if self._over is not None:
            return self._over is _CANCELLED
        crew = self._crew
        if crew.unqueue(self):
            self._conclude(_CANCELLED)
            return True
        if self._raw.cancel():
            self._advance(in_place=False)
            return self._over is _CANCELLED
        if not force or self.done():
            return self._over is _CANCELLED
        if self._history is None:
            self._history = History()
        self._history.forced = True
        crew.kill(self._raw)
        return True

    # -- what concurrent.futures' own functions look at ----------------------------------------------

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        if self._cond is None:
            with self._crew.lock:
                if self._cond is None:
                    self._cond = threading.Condition()
        return self._cond

    @property
    def _state(self) -> str:  # type: ignore[override]
        # wait() reads this with every future's condition held: an end is taken
        # here only where nobody has to be told of it.
        if self._over is None and not self._armed and self._raw.test():
            self._advance(in_place=False)
        if self._over is not None:
            return self._over
        return _RUNNING if self._raw.worker else _PENDING

    @property
    def _waiters(self) -> list[Any]:  # type: ignore[override]
        if self._waiting is None:
            self._waiting = []
        self._arm()
        return self._waiting

    @property
    def _done_callbacks(self) -> list[Callable[[Any], Any]]:  # type: ignore[override]
        if self._callbacks is None:
            self._callbacks = []
        self._arm()
        return self._callbacks

    @property
    def _result(self) -> Any:  # type: ignore[override]
        return self._value

    @property
    def _exception(self) -> BaseException | None:  # type: ignore[override]
        return self._error

    def set_running_or_notify_cancel(self) -> bool:
        raise InvalidStateError("the executor alone starts its futures")

    def set_result(self, result: Any) -> None:
        raise InvalidStateError("the executor alone sets results")

    def set_exception(self, exception: BaseException | None) -> None:
        raise InvalidStateError("the executor alone sets exceptions")

    # -- inside ----------------------------------------------------------------------------------------

    def _arm(self) -> None:
        if self._over is None and not self._armed:
            self._armed = True
            self._crew.watch(self)

    def _finish(self, timeout: float | None) -> None:
        """Waits for the end of the last attempt; TimeoutError after `timeout` seconds."""
        if timeout is None:
            while self._over is None:
                self._raw.wait()
                self._advance(in_place=True)
            return
        deadline = time.monotonic() + timeout
        while self._over is None:
            if not self._raw.wait(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            self._advance(in_place=True, deadline=deadline)

    def _advance(self, *, in_place: bool, deadline: float | None = None) -> None:
        """Takes the end of an attempt and acts on it.

        Exactly one thread does so for each attempt; others wait here until it
        has, or, with a `deadline`, raise TimeoutError. `in_place`: the caller
        waits for this result, so that a kernel may run in its thread.
        """
        crew = self._crew
        if not crew.claim(self):
            if not in_place:
                return
            if crew.unqueue(self):
                self._run_on_rank()
            else:
                self._wait_for_claimer(deadline)
            return
        raw = self._raw
        try:
            if raw.outcome == _OK and self._history is None:
                self._deliver(raw)
                return
            self._act(in_place)
        except BaseException:
            # Interrupted (Ctrl-C): the next one who asks takes it again.
            if self._over is None and not crew.queued(self):
                crew.unclaim(self)
                self._tell()
            raise

    def _act(self, in_place: bool) -> None:
        crew, raw = self._crew, self._raw
        if raw.outcome == Outcome.PENDING:
            crew.unclaim(self)
            return
        if self._history is None:
            self._history = History()
        end = crew.ended(raw, self._history, objects=True)
        match end.action:
            case Action.DELIVER:
                self._deliver(raw)
            case Action.FETCH:
                raw.fetch(0.0)
                crew.unclaim(self)
                self._tell()
            case Action.REISSUE:
                raw.restart()
                crew.unclaim(self)
                self._tell()
            case Action.RUN_ON_RANK if in_place:
                self._run_on_rank()
            case Action.RUN_ON_RANK:
                crew.queue(self)
                self._tell()
            case Action.CANCEL:
                self._conclude(_CANCELLED)
            case _:
                self._conclude(_FINISHED, error=end.error)

    def _deliver(self, raw: Any) -> None:
        try:
            value = self._crew.loads_result(raw.result())
        except Exception as error:
            self._conclude(_FINISHED, error=error)
        else:
            self._conclude(_FINISHED, value)

    def _run_on_rank(self) -> None:
        """Runs the call here. It is claimed and in no queue."""
        try:
            value, error = self._crew.run_object(*self._call)
        except BaseException:
            # Ctrl-C in the kernel: the next one who asks runs it again.
            self._crew.queue(self)
            raise
        self._conclude(_FINISHED, value, error)

    def _abandon(self) -> None:
        """The executor has closed: it ends now, one way or another."""
        if self._over is None:
            if self._raw.test():
                self._advance(in_place=False)
            if self._over is None and (self._crew.claim(self) or self._crew.unqueue(self)):
                self._conclude(_CANCELLED)

    def _conclude(self, state: str, value: Any = None, error: BaseException | None = None) -> None:
        self._value = value
        self._error = error
        with self._crew.lock:
            # Nobody makes a condition meanwhile: who makes one later sees that it is over.
            cond = self._cond
            if cond is None:
                self._over = state
        callbacks: list[Callable[[Any], Any]] = []
        if cond is not None:
            with cond:
                # Set with the condition held: as_completed, which looks at the state and then adds
                # its waiter, either sees the end or is told of it, and never both.
                self._over = state
                for waiter in self._waiting or ():
                    if state is _CANCELLED:
                        waiter.add_cancelled(self)
                    elif error is not None:
                        waiter.add_exception(self)
                    else:
                        waiter.add_result(self)
                callbacks, self._callbacks = self._callbacks or [], []
                cond.notify_all()
        self._call = ()
        self._crew.pending.pop(self, None)
        self._raw.close()
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                log.exception("exception calling callback for %r", self)

    def _tell(self) -> None:
        """The next attempt has begun, or waits to be run: who waits for this thread looks again."""
        cond = self._cond
        if cond is not None:
            with cond:
                cond.notify_all()

    def _wait_for_claimer(self, deadline: float | None) -> None:
        with self._condition:
            while self._over is None and not self._free and not self._crew.queued(self):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                # In slices: a claimer that dies with its thread must not hang us.
                self._condition.wait(left if left is not None and left < 1.0 else 1.0)


def started(crew: Crew, call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Future[Any]:
    """A future for a call (kernel, arguments, named ones), on its way to a worker. Raises as `submit`."""
    raw = crew.object_request(*call)
    future: Future[Any] = Future(crew, raw, call)
    crew.pending[future] = None
    try:
        raw.start()
    except BaseException:
        crew.pending.pop(future, None)
        raise
    return future

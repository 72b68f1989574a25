"""Requests: invocations on buffers that were started and not waited for, with MPI's words."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rfaas_mpi.crew import Crew, History
from rfaas_mpi.errors import ClosedError, InvalidBuffer
from rfaas_mpi.types import UNDEFINED, Action, Outcome

if TYPE_CHECKING:
    import numpy as np

    from rfaas_mpi.kernels import Kernel

__all__ = ["PersistentRequest", "Request", "Startall", "Testall", "Testany", "Testsome", "Waitall",
           "Waitany", "Waitsome", "dismiss"]

_OK = int(Outcome.OK)


class Request:
    """An invocation on buffers. Until it has ended, its arrays are not yours.

    Active from its start until Wait, Test or one of the functions on several
    requests has told its end. A failed invocation raises there: KernelError,
    KernelTimeout, BadKernel, WorkerLost or CancelledError; asking again raises
    the same again.
    """

    __slots__ = ("__weakref__", "_active", "_crew", "_entry", "_error", "_history", "_inputs", "_kernel",
                 "_outputs", "_over", "_peers", "_raw", "_run", "_settling", "_wait", "out")

    if TYPE_CHECKING:
        Waitall: Callable[..., bool]
        Waitany: Callable[..., int]
        Waitsome: Callable[..., list[int] | None]
        Testall: Callable[..., bool]
        Testany: Callable[..., tuple[int, bool]]
        Testsome: Callable[..., list[int] | None]

    def __init__(self, crew: Crew, kernel: Kernel, inputs: tuple[np.ndarray, ...],
                 outputs: tuple[np.ndarray, ...], out: Any, timeout_s: float | None, *,
                 persistent: bool = False, raw: Any = None) -> None:
        self.out = out
        self._crew = crew
        self._kernel = kernel
        self._inputs = inputs
        self._outputs = outputs
        self._error: BaseException | None = None
        # None unless an attempt has ended otherwise than with a result: then, until its end is told.
        self._history: History | None = None
        self._over = False               # has ended for good, which is not told yet
        self._settling = False
        self._peers: list[Any] = []
        # `raw` was made and started by Invoke, which needs no more than that as
        # long as nothing goes wrong.
        self._active = raw is not None
        self._raw = raw if raw is not None else crew.buffers_request(kernel, inputs, outputs, persistent)
        self._run = self._raw.start if timeout_s is None else partial(self._raw.start, timeout_s)
        self._wait = self._raw.wait
        self._entry = crew.enter(self, inputs, outputs)

    # -- one request -------------------------------------------------------------------------

    def Test(self) -> bool:
        """True once the invocation has ended; never waits for a worker.

        Where no worker is left to run it, it is run here and now, on the rank.
        """
        if not self._active:
            return self._told()
        if not self._raw.test():
            return False
        if self._raw.outcome == _OK and self._history is None:
            self._ended()
            return True
        return self._settle(0.0)

    def Wait(self, timeout_s: float | None = None) -> bool:
        """True once the invocation has ended; False after `timeout_s` seconds.

        Interruptible with Ctrl-C. Raises what the invocation ended with.
        """
        if not self._active:
            return self._told()
        if timeout_s is not None:
            return self._wait_until(time.monotonic() + timeout_s)
        self._wait()
        if self._raw.outcome == _OK and self._history is None:
            self._ended()
            return True
        return self._settle(None)

    def Cancel(self, force: bool = False) -> bool:
        """True if the invocation will not deliver: Wait then raises CancelledError.

        Without `force` only what no worker has begun can be cancelled; over a
        network (tcp, verbs) only what still waits for a slot. With it the worker
        that runs it, now or later, is killed; its other invocations run elsewhere.
        """
        if not self._active:
            return False
        if self._raw.cancel():
            return True
        if not force or self._raw.test():
            return False
        if self._history is None:
            self._history = History()
        self._history.forced = True
        self._crew.kill(self._raw)
        return True

    def Free(self) -> None:
        """Gives back what the request holds; cancels it if it is still queued, else waits for its end.

        Safe to call twice; starting it afterwards raises ClosedError.
        """
        if self._entry is not None:
            if self._active and not self._raw.cancel():
                while not self._raw.wait():
                    pass
            self._release()

    @property
    def active(self) -> bool:
        """Started, and its end not yet told."""
        return self._active

    @property
    def worker(self) -> int:
        """Number of the worker that ran it last (0: none yet)."""
        return self._raw.worker

    @property
    def exec_ns(self) -> int:
        """How long the kernel ran, by the worker's clock."""
        return self._raw.exec_ns

    @property
    def out_sizes(self) -> tuple[int, ...]:
        """Bytes that the kernel wrote to each output."""
        return self._raw.out_sizes

    def __repr__(self) -> str:
        state = "active" if self._active else "ended" if self._entry is None else "inactive"
        return f"<{type(self).__name__} of {self._kernel!r}: {state}>"

    # -- inside ------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._peers:
            self._check_peers()
        self._run()
        self._active = True

    def _check_peers(self) -> None:
        check_peers(self._kernel, self._peers)

    def _in_flight(self) -> bool:
        return self._active and not (self._raw.test() and self._raw.outcome == _OK)

    def _told(self) -> bool:
        if self._error is not None:
            raise self._error.with_traceback(None)
        return True

    def _ended(self) -> None:
        self._active = False
        self._release()

    def _release(self) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._crew.leave(self, entry)
            self._active = False
            self._raw.close()

    def _wait_until(self, deadline: float) -> bool:
        if not self._raw.wait(max(0.0, deadline - time.monotonic())):
            return False
        return self._settle(deadline)

    def _settle(self, deadline: float | None, *, tell: bool = True) -> bool:
        """Waits for the last attempt's end and acts on it. A deadline that has passed: as Test. Without `tell` it
        stays active once it has ended, and raises nothing."""
        changed = self._crew.changed
        while self._active and (tell or not self._over):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._settling:
                # Another thread is at it: it tells us the end, or starts the next attempt.
                with changed:
                    if not changed.wait_for(lambda: not self._settling, left):
                        return False
                continue
            if not self._over and not (self._wait() if left is None else self._wait(left)):
                return False
            with changed:
                if self._settling or not self._active or (not self._over and self._raw.outcome == Outcome.PENDING):
                    continue
                self._settling = True
            try:
                if not self._over:
                    self._advance()
                if self._over and tell:
                    self._over, self._history = False, None
                    self._ended()
            finally:
                with changed:
                    self._settling = False
                    changed.notify_all()
        return self._told() if tell else True

    def _advance(self) -> None:
        if self._raw.outcome == _OK and self._history is None:
            self._over = True
            return
        if self._history is None:
            self._history = History()
        end = self._crew.ended(self._raw, self._history, objects=False)
        match end.action:
            case Action.DELIVER:
                self._over = True
            case Action.FETCH:
                # An error text that was too long for the slot.
                self._raw.fetch(0.0)
            case Action.REISSUE:
                self._raw.restart()
            case Action.RUN_ON_RANK:
                self._error = self._run_on_rank()
                self._over = True
            case _:
                self._error = end.error
                self._over = True

    def _run_on_rank(self) -> BaseException | None:
        """Runs the kernel here, since nobody is left to do it; the error it failed with."""
        return self._crew.run_buffers(self._kernel, self._inputs, self._outputs)


def check_peers(kernel: Kernel, peers: Sequence[Any]) -> None:
    """Raises InvalidBuffer if one of these requests, weakly referenced, is in flight."""
    for peer in peers:
        other = peer()
        if other is not None and other._in_flight():
            raise InvalidBuffer(
                f"an array of this {kernel!r} invocation is written or read by another one that is "
                f"still in flight ({other!r})", hint="Wait for that one first, or give this one its own array")


def dismiss(crew: Crew, request: Request) -> None:
    """Ends what was given to a worker that does not answer, at the price of that worker."""
    if request._history is None:
        request._history = History()
    request._history.forced = True
    if crew.lending is not None and not request._raw.test():
        crew.lending.give_up(request._raw)


class PersistentRequest(Request):
    """An invocation that is set up once and started as often as you like.

    It holds a slot only while it is active, so there may be many more of them
    than slots.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        Startall: Callable[[Sequence[Any]], None]

    def __init__(self, crew: Crew, kernel: Kernel, inputs: tuple[np.ndarray, ...],
                 outputs: tuple[np.ndarray, ...], out: Any, timeout_s: float | None) -> None:
        super().__init__(crew, kernel, inputs, outputs, out, timeout_s, persistent=True)

    # Start and Wait are what a loop at a million calls a second pays for: no
    # call here that the plain path does not need.

    def Start(self) -> None:
        """Starts the invocation; never blocks.

        Raises InvalidBuffer if it, or another one that shares an array with it,
        is still in flight, ClosedError after Free or the executor's end.
        """
        if self._active or self._peers:
            self._check_start()
        self._error = None
        self._run()
        self._active = True

    def Wait(self, timeout_s: float | None = None) -> bool:
        if timeout_s is None and self._active:
            self._wait()
            if self._raw.outcome == 1 and self._history is None:
                self._active = False
                return True
        return Request.Wait(self, timeout_s)

    Wait.__doc__ = Request.Wait.__doc__

    def _check_start(self) -> None:
        if self._active:
            raise InvalidBuffer(f"this request of {self._kernel!r} is still active",
                                hint="Wait for it (or Test until True) before the next Start")
        self._check_peers()

    def _ended(self) -> None:
        self._active = False

    def _release(self) -> None:
        if self._entry is not None:
            super()._release()
            self._run = self._freed

    def _freed(self) -> None:
        raise ClosedError("this request was freed; make another with Invoke_init")


def Startall(requests: Sequence[Any]) -> None:
    """Starts persistent requests, ours and MPI's, as Start does for each; none of them is started if one of ours can't be."""
    if not _PERSISTENT.issuperset(map(type, requests)):
        _start_mixed(requests)
        return
    for request in requests:
        if request._active or request._peers:
            request._check_start()
    for request in requests:
        request._error = None
        request._run()
        request._active = True


def Waitall(requests: Sequence[Any], timeout_s: float | None = None) -> bool:
    """True once all have ended; False after `timeout_s` seconds.

    This one and those below take MPI's requests as well, mixed with ours as you
    like; both make progress while one waits. Raises the first failure (by
    index), after all of them have ended.
    """
    if not _OURS.issuperset(map(type, requests)):
        return _wait_all_mixed(requests, timeout_s)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    failure: BaseException | None = None
    for request in requests:
        if deadline is None and request._active:
            request._wait()
            if request._raw.outcome == 1 and request._history is None:
                request._ended()
                continue
        try:
            if deadline is None:
                request.Wait()
            elif not request._active:
                request._told()
            elif not request._wait_until(deadline):
                return False
        except Exception as error:
            # All must have ended before the caller may touch any array again.
            failure = failure or error
    if failure is not None:
        raise failure
    return True


def Waitany(requests: Sequence[Any], timeout_s: float | None = None) -> int:
    """Index of an active request that has ended, UNDEFINED if none is active, -1 after the time-out.

    Raises what that request ended with.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pace = _Pace()
    while True:
        index, flag = Testany(requests)
        if flag:
            return index
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return -1
        _wait_some(requests, left, pace)


def Waitsome(requests: Sequence[Any], timeout_s: float | None = None) -> list[int] | None:
    """Indices of active requests that have ended, at least one; None if none is active, [] after the time-out."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pace = _Pace()
    while True:
        found = Testsome(requests)
        if found is None or found:
            return found
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return []
        _wait_some(requests, left, pace)


def Testall(requests: Sequence[Any]) -> bool:
    """True if all have ended; else none of them is told to have. Raises the first failure."""
    for request in requests:
        if not isinstance(request, Request):
            if not _checked(request).Get_status():
                return False
        elif request._active and not request._raw.test():
            return False
    for request in requests:
        # Whose worker was lost may begin again.
        if (isinstance(request, Request) and (request._raw.outcome != _OK or request._history is not None)
                and not request._settle(0.0, tell=False)):
            return False
    return Waitall(requests, 0.0)


def Testany(requests: Sequence[Any]) -> tuple[int, bool]:
    """(index, True) of an active request that has ended, (UNDEFINED, True) if none is active, else
    (UNDEFINED, False). Raises what that request ended with."""
    active = False
    for index, request in enumerate(requests):
        ended = _ended(request)
        if ended:
            return index, True
        active |= ended is False
    return UNDEFINED, not active


def Testsome(requests: Sequence[Any]) -> list[int] | None:
    """Indices of active requests that have ended; None if none is active. Raises the first failure."""
    ended = [_ended(request) for request in requests]
    if all(one is None for one in ended):
        return None
    return [index for index, one in enumerate(ended) if one]


def _ended(request: Any) -> bool | None:
    """Whether a request has ended, as its Test says; None for one that isn't active."""
    if isinstance(request, Request):
        return request.Test() if request._active else None
    # MPI's Test is also true for one that isn't active.
    index, flag = _checked(request).Testany([request])
    return (True if index == 0 else None) if flag else False


def _checked(request: Any) -> Any:
    if not hasattr(request, "Testany") or not hasattr(request, "Get_status"):
        raise TypeError(f"{request!r} is no request, neither of ours nor of MPI's")
    return request


def _start_mixed(requests: Sequence[Any]) -> None:
    ours, others = list[PersistentRequest](), list[Any]()
    for request in requests:
        if isinstance(request, PersistentRequest):
            if request._active or request._peers:
                request._check_start()
            ours.append(request)
        elif isinstance(request, Request) or not hasattr(_checked(request), "Start"):
            raise TypeError(f"{request!r} is no persistent request; Invoke_init makes one, and MPI's Send_init and Recv_init")
        else:
            others.append(request)
    for request in others:
        request.Start()
    Startall(ours)


def _wait_all_mixed(requests: Sequence[Any], timeout_s: float | None) -> bool:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    failures: dict[int, BaseException] = {}
    left, pace = dict(enumerate(requests)), _Pace()
    for index, request in enumerate(requests):
        if isinstance(request, Request) and not request._active and request._error is not None:
            # It was told already, and is told again.
            failures[index] = request._error.with_traceback(None)
    while True:
        for index, request in list(left.items()):
            try:
                if _ended(request) is False:
                    continue
            except Exception as error:
                # All must have ended before the caller may touch any array again.
                failures[index] = error
            del left[index]
        if not left:
            break
        patience = None if deadline is None else deadline - time.monotonic()
        if patience is not None and patience <= 0:
            return False
        _wait_some(list(left.values()), patience, pace)
    if failures:
        raise failures[min(failures)]
    return True


class _Pace:
    """How long to look away from requests that have no doorbell: MPI's make progress only while they are asked."""

    __slots__ = ("_begun",)

    def __init__(self) -> None:
        self._begun = time.monotonic()

    @property
    def slice_s(self) -> float:
        """At most a tenth of the time that it has taken so far."""
        return min(0.001, (time.monotonic() - self._begun) / 10)


def _wait_some(requests: Sequence[Any], timeout_s: float | None, pace: _Pace) -> None:
    by_crew: dict[Crew, list[Any]] = {}
    others = False
    for request in requests:
        if not isinstance(request, Request):
            others = True
        elif request._active:
            by_crew.setdefault(request._crew, []).append(request._raw)
    if len(by_crew) == 1 and not others:
        [(crew, raws)] = by_crew.items()
        crew.wait_any(raws, timeout_s)
        return
    # MPI's, and requests of several executors, have no common doorbell: look at each in turn.
    slice_s = pace.slice_s if others else 0.001
    if timeout_s is not None:
        slice_s = min(slice_s, timeout_s)
    for crew, raws in by_crew.items():
        crew.wait_any(raws, slice_s)
    if not by_crew:
        time.sleep(slice_s)


_OURS = {Request, PersistentRequest}
_PERSISTENT = {PersistentRequest}

# mpi4py has them as static methods of its requests too.
PersistentRequest.Startall = staticmethod(Startall)
for _function in (Waitall, Waitany, Waitsome, Testall, Testany, Testsome):
    setattr(Request, _function.__name__, staticmethod(_function))

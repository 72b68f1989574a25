"""What an executor, its requests and its futures share: data plane, workers, memory, and what to do about ends."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import logging
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from rfaas_mpi import codec, local, policy
from rfaas_mpi.arrays import Memory, Spans
from rfaas_mpi.config import Settings
from rfaas_mpi.elastic import LOOK_S, Elastic, Facts
from rfaas_mpi.errors import (
    ClosedError,
    ConfigError,
    ForkedError,
    InvalidBuffer,
    KernelError,
    KernelTimeout,
    RFaaSError,
    WorkerLost,
)
from rfaas_mpi.inline import InlineInvoker
from rfaas_mpi.lending import Lending, describe, lost_error
from rfaas_mpi.types import Action, Outcome

if TYPE_CHECKING:
    import numpy as np

    from rfaas_mpi.kernels import Kernel
    from rfaas_mpi.messages import WorkerEnded

__all__ = ["Crew", "Ended", "History"]

log = logging.getLogger("rfaas_mpi.crew")

_KILL_AGAIN_S = 0.02
_NOTIFIER_S = 1.0
_SWEEP = 64


@dataclasses.dataclass(slots=True)
class History:
    """What has befallen an invocation so far; most never have one."""

    lost: int = 0
    unexplained: int = 0
    forced: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """What to do about the end of an attempt, and the error to raise where it is to fail."""

    action: Action
    error: BaseException | None = None


class Crew:
    """Owns the data plane and the workers of one executor.

    Raises ClosedError after `close`, ForkedError in a forked child.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lock = threading.Lock()
        self.changed = threading.Condition(threading.Lock())
        self.lending: Lending | None = None
        self.closing = False
        self.closed = False
        # It belongs to the process that this one was forked from.
        self.foreign = False
        self._spans = Spans()
        self._refs: dict[bytes, Any] = {}
        # Every future that is not over; in order, oldest first.
        self.pending: dict[Any, None] = {}
        self._on_rank: dict[Any, None] = {}
        self._errands: threading.Thread | None = None
        self._watched: dict[Any, Any] = {}
        self._notifier: threading.Thread | None = None
        self._listeners: list[Callable[[list[int]], object]] = []
        self._seen: list[int] = []
        self._changes = 0                        # of workers, that somebody has seen
        self._telling = False                    # a thread is at it, and looks again before it ends
        self._stretcher: threading.Thread | None = None
        self._stretched = threading.Event()      # enough of it
        self.said_fallback = False
        self.on_close: Callable[[], object] = _nothing
        # What lets go of requests that nobody waits for.
        self.closers: list[Callable[[], object]] = []
        if settings.transport == "inline":
            self.invoker: Any = InlineInvoker(time.monotonic_ns)
        else:
            from rfaas_mpi import fabric
            try:
                self.invoker = fabric.Invoker(slots=settings.slots, slot_bytes=settings.slot_bytes,
                                              spin_us=settings.spin_us)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        self.inline = isinstance(self.invoker, InlineInvoker)
        self.memory = Memory(self.invoker)

    # -- workers ---------------------------------------------------------------------------------

    def hire(self, act: Callable[[Lending], None]) -> None:
        """Opens the session and lets `act` get workers through it; closes everything where that fails."""
        lending = self.open()
        if lending is None:
            return
        try:
            act(lending)
        except BaseException:
            self.close()
            raise
        self._granted(lending.memory_limit)

    def _granted(self, nbytes: int) -> None:
        """So much memory each worker has (0: not known)."""
        self.memory.limit = nbytes
        wanted = self.settings.constants_bytes
        self.invoker.limit_constants(nbytes // 4 * 3 if wanted is None else wanted)

    def open(self) -> Lending | None:
        """The session that workers are had through, opened once; None where kernels run inline."""
        if self.lending is None and not self.inline:
            try:
                opened = Lending(self.settings, self.invoker, self.look_around)
            except BaseException:
                self.close()
                raise
            with self.lock:
                # Who took part in opening it may have had enough meanwhile.
                closed = self.closed
                self.lending = None if closed else opened
            if closed:
                opened.close()
                raise ClosedError("the executor was closed", hint="make a new Executor")
        return self.lending

    def listen(self, fn: Callable[[list[int]], object]) -> None:
        """Has `fn` called with the workers' numbers whenever one has come or gone."""
        with self.lock:
            self._listeners.append(fn)

    def wait_workers(self, least: int, timeout_s: float | None) -> bool:
        """True once there are so many; False after the time-out, or when nothing may be started any more."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.workers) >= least or self.closing, timeout_s)
            return len(self.workers) >= least and not self.closing

    def _say_change(self) -> None:
        """Tells of what has changed: one thread at a time, so that nobody hears of the newest state before an older."""
        with self.changed:
            self.changed.notify_all()
        with self.lock:
            self._changes += 1
            if self._telling:
                return
            self._telling = True
        try:
            while self._tell():
                pass
        except BaseException:
            with self.lock:
                self._telling = False
            raise

    def _tell(self) -> bool:
        """Tells once; True if something may have changed meanwhile, which is for the same thread to tell."""
        with self.lock:
            changes = self._changes
        now = self.workers
        with self.lock:
            changed, self._seen = now != self._seen, now
            listeners = list(self._listeners)
        for fn in listeners if changed else ():
            try:
                fn(list(now))
            except Exception:
                # Others want to know as well, and the thread has more to hear.
                log.exception("what was to be told of a change of workers failed: %r", fn)
        with self.lock:
            self._telling = self._changes != changes
            return self._telling

    def stretch(self, elastic: Elastic, cores_per_worker: int) -> None:
        """Has workers asked for and given back as it decides, by a thread of ours."""
        self._stretcher = threading.Thread(target=self._stretch, args=(elastic, cores_per_worker),
                                           name="rfaas-elastic", daemon=True)
        self._stretcher.start()

    def _stretch(self, elastic: Elastic, cores_per_worker: int) -> None:
        lending = self.lending
        while lending is not None and not self._stretched.wait(LOOK_S):
            try:
                # What was taken back from a worker counts as in flight until its reply is looked at, and
                # nobody waits for that: without this an idle executor may look busy for good.
                self.invoker.progress()
                stats = self.invoker.stats()
                # Whoever crashed and is replaced needs no substitute.
                workers = max(len(lending.workers), lending.seats)
                facts = Facts(workers, stats["queued"], stats["in_flight"], lending.shared_seats, lending.lost_seats)
                change = elastic.decide(facts, time.monotonic())
                if change > 0:
                    given = 0
                    try:
                        given = lending.more(change, cores_per_worker, self.settings.memory_per_worker)
                        self._granted(lending.memory_limit)
                    finally:
                        elastic.answered(given, time.monotonic())
                elif change < 0:
                    lending.give_back(-change)
            except ClosedError:
                return
            except (RFaaSError, TimeoutError) as error:
                log.debug("no more workers for now: %s", error)

    @property
    def transport(self) -> str:
        """How invocations travel, or are to, where that is not known yet."""
        return self.settings.transport if self.lending is None else self.lending.transport

    @property
    def workers(self) -> list[int]:
        """Numbers of the workers that are there now."""
        return self.lending.workers if self.lending is not None else []

    @property
    def ends_at(self) -> float:
        """When the last of these workers' leases ends (time.monotonic); infinity where no end is known."""
        return self.lending.ends_at if self.lending is not None else math.inf

    @property
    def alone(self) -> bool:
        """No worker is there and none will come."""
        return self.lending is None or self.lending.alone

    def check(self) -> None:
        """Raises ClosedError or ForkedError where nothing may be started any more."""
        if self.foreign:
            raise ForkedError("this executor belongs to the process that made it",
                              hint="make another Executor in the child")
        if self.closing:
            raise ClosedError("cannot schedule new futures after shutdown: this executor is shut down",
                              hint="make another Executor")

    # -- buffers -----------------------------------------------------------------------------------

    def buffers_request(self, kernel: Kernel, inputs: tuple[np.ndarray, ...],
                        outputs: tuple[np.ndarray, ...], persistent: bool) -> Any:
        """A fabric request for these arguments, which have been checked."""
        self.check()
        if self.inline:
            return self.invoker.request(
                functools.partial(local.run_buffers, kernel, inputs, outputs), outputs)
        return self.invoker.request(self.reference(kernel), inputs, outputs,
                                    kernel.meta(inputs, outputs), persistent=persistent)

    def divided_request(self, kernel: Kernel, inputs: tuple[np.ndarray, ...], outputs: tuple[np.ndarray, ...],
                        division: codec.Division) -> Any:
        """A persistent fabric request that runs cells of these arrays; the last output is their board."""
        self.check()
        return self.invoker.request(self.reference(kernel), inputs, outputs,
                                    codec.encode_binding(inputs, outputs, division), persistent=True,
                                    reclaimable=True)

    def reference(self, kernel: Kernel) -> Any:
        """The fabric's number for a kernel."""
        digest = kernel.digest
        found = self._refs.get(digest)
        if found is None:
            found = self._refs[digest] = self.invoker.kernel(kernel.kind, digest, kernel.blob)
        return found

    def run_buffers(self, kernel: Kernel, inputs: tuple[np.ndarray, ...],
                    outputs: tuple[np.ndarray, ...]) -> BaseException | None:
        """Runs a kernel on the rank; the error it failed with."""
        outcome, detail = local.run_buffers(kernel, inputs, outputs)
        return None if outcome is Outcome.OK else self._kernel_failed(outcome, detail, objects=False)

    def enter(self, request: Any, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Any:
        """Notes a request's arrays, so that others on the same memory know of it; what `leave` takes."""
        mine = weakref.ref(request)
        with self.lock:
            entry, clashes = self._spans.add(mine, inputs, outputs)
            for other in clashes:
                peer = other()
                if peer is not None:
                    peer._peers.append(mine)
                    request._peers.append(other)
        return entry

    def leave(self, request: Any, entry: Any) -> None:
        """Forgets a request's arrays. Safe to call twice."""
        with self.lock:
            self._spans.remove(entry)
            for other in request._peers:
                peer = other()
                if peer is not None:
                    peer._peers = [ref for ref in peer._peers if ref() is not request]
            request._peers = []

    @property
    def busy(self) -> bool:
        """Whether there are requests that somebody may still wait for."""
        return len(self._spans) > 0

    def peers(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> list[Any]:
        """The requests that use the memory of these arrays in a way that clashes."""
        if not len(self._spans):
            return []
        with self.lock:
            return self._spans.clashes(inputs, outputs)

    def wait_any(self, raws: Sequence[Any], timeout_s: float | None) -> None:
        """Returns when one of the fabric requests has ended, or after the time-out."""
        if self.inline:
            return
        from rfaas_mpi import fabric
        fabric.wait_any(raws, timeout_s)

    # -- objects -----------------------------------------------------------------------------------

    loads_result = staticmethod(codec.loads_result)

    def object_request(self, kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A fabric request for one call of a callable. Raises BadKernel for what can't be pickled."""
        self.check()
        if self.inline:
            # Pickled now, as with workers: what the caller changes afterwards is not seen.
            codec.dumps_call(args, kwargs)
            return self.invoker.request(functools.partial(local.run_object, kernel.fn, args, kwargs), ())
        parts, refs = codec.dumps_call(args, kwargs, self.invoker.locate)
        return self.invoker.object_request(self.reference(kernel), parts, refs)

    def run_object(self, kernel: Kernel, args: tuple[Any, ...],
                   kwargs: dict[str, Any]) -> tuple[Any, BaseException | None]:
        """Runs a call on the rank; its value, or the error it failed with."""
        outcome, found = local.run_object(kernel.fn, args, kwargs)
        if outcome is not Outcome.OK:
            return None, self._kernel_failed(outcome, found, objects=True)
        try:
            return codec.loads_result(found), None
        except Exception as error:
            return None, error

    def claim(self, future: Any) -> bool:
        """True for the one thread that may act on the end of a future's attempt."""
        # A dict's pop is atomic, and cheaper than a lock that nearly nobody contends for.
        return future.__dict__.pop("_free", False)

    def unclaim(self, future: Any) -> None:
        """The next attempt has begun: whoever sees its end may act on it."""
        future._free = True
        if future._armed:
            self.watch(future)

    def watch(self, future: Any) -> None:
        """Has the notifier thread act on the future's end."""
        raw = future._raw
        self._watched[raw] = future
        raw.watch()
        if self._notifier is None:
            with self.lock:
                if self._notifier is None and not self.closed:
                    self._notifier = threading.Thread(target=self._notify, name="rfaas-notifier", daemon=True)
                    self._notifier.start()

    def _notify(self) -> None:
        while not self.closed:
            try:
                ended = self.invoker.next_watched(_NOTIFIER_S)
            except ClosedError:
                return
            for raw in ended:
                future = self._watched.pop(raw, None)
                if future is not None:
                    self._advance(future)

    def _advance(self, future: Any) -> None:
        try:
            future._advance(in_place=False)
        except Exception:
            # This thread also serves other futures.
            log.exception("could not take the end of %r", future)

    def look_around(self) -> None:
        """Acts on ends that nobody may be waiting for; called when workers came or went."""
        self._say_change()
        for future in list(self.pending):
            if future._over is None and future._raw.test():
                self._advance(future)

    def sweep(self) -> None:
        """Takes results that nobody asked for yet, so that calls without readers don't pile up."""
        for future in list(itertools.islice(list(self.pending), _SWEEP)):
            if future._raw.test():
                self._advance(future)

    # -- kernels on the rank that nobody waits for ---------------------------------------------------

    def queue(self, future: Any) -> None:
        """Has a claimed future's call run on the rank, by whoever comes first: a waiter or a thread of ours."""
        with self.changed:
            self._on_rank[future] = None
            if self._errands is None:
                self._errands = threading.Thread(target=self._run_errands, name="rfaas-fallback", daemon=True)
                self._errands.start()
            self.changed.notify_all()

    def unqueue(self, future: Any) -> bool:
        """True if the call was still queued, and is now the caller's."""
        with self.changed:
            return self._on_rank.pop(future, self) is None

    def queued(self, future: Any) -> bool:
        """True if the call waits to be run on the rank."""
        return future in self._on_rank

    def _run_errands(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._on_rank or self.closed)
                if self.closed:
                    return
                future = next(iter(self._on_rank))
                del self._on_rank[future]
            future._run_on_rank()

    # -- ends ----------------------------------------------------------------------------------------

    def ended(self, raw: Any, history: History, *, objects: bool) -> Ended:
        """What to do about an attempt's end. Asks the service where a worker was lost."""
        outcome = Outcome(raw.outcome)
        verdict: WorkerEnded | None = None
        if outcome is Outcome.LOST and not history.forced and self.lending is not None:
            verdict = self.lending.verdict(raw)
        own = verdict is not None and verdict.invocation == raw.id
        action = policy.decide(policy.End(
            outcome, cause=verdict.cause if verdict else "", reason=verdict.reason if verdict else "",
            own=own, lost=history.lost, unexplained=history.unexplained, forced=history.forced,
            fallback=self.settings.fallback, closed=self.closed))
        if action is Action.REISSUE:
            if own and verdict is not None and verdict.cause == "unknown":
                history.unexplained += 1
            else:
                history.lost += 1
        if action is Action.RUN_ON_RANK:
            self._say_fallback(verdict)
        return Ended(action, self._error(action, outcome, raw, verdict, objects))

    def _error(self, action: Action, outcome: Outcome, raw: Any, verdict: WorkerEnded | None,
               objects: bool) -> BaseException | None:
        match action:
            case Action.CANCEL:
                return CancelledError("this invocation was cancelled")
            case Action.FAIL_TIMEOUT if verdict is None:
                return KernelTimeout("the invocation's time limit passed before a worker was free to run it",
                                     hint="give it more time, or ask for more workers")
            case Action.FAIL_TIMEOUT | Action.FAIL_KERNEL if verdict is not None:
                return worker_error(verdict, timeout=action is Action.FAIL_TIMEOUT)
            case Action.FAIL_KERNEL | Action.FAIL_BAD_KERNEL:
                return self._kernel_failed(outcome, raw.detail, objects=objects)
            case Action.FAIL_NO_ROOM:
                return InvalidBuffer(
                    f"an array of this call has no room at worker {raw.worker}, which was granted {self.memory.limit} "
                    f"bytes: {raw.detail.decode(errors='replace')}",
                    hint="ask for more with Executor(memory_per_worker=...), or use smaller arrays, or fewer at once")
            case Action.FAIL_LOST:
                if verdict is not None:
                    return lost_error(verdict)
                why = self.lending.why if self.lending is not None else None
                # A copy: each error that is raised gets its own traceback.
                return copy.copy(why) if why is not None else WorkerLost(
                    "no worker is left to run this invocation", hint="make a new Executor")
        return None

    def _kernel_failed(self, outcome: Outcome, detail: Any, *, objects: bool) -> BaseException:
        if outcome is Outcome.BAD_KERNEL:
            return codec.error_for_bind(detail)
        return codec.error_for_future(detail) if objects else codec.error_for_invoke(detail)

    def _say_fallback(self, verdict: WorkerEnded | None) -> None:
        if self.said_fallback:
            return
        self.said_fallback = True
        why = verdict.message if verdict is not None else str(self.lending.why) if self.lending else ""
        log.warning("kernels now run on the rank itself: %s", why or "no worker is left")

    def kill(self, raw: Any) -> None:
        """Has the worker killed that runs this invocation, now or as soon as it does."""
        if self.lending is None or self.lending.kill(raw):
            return
        # It waits in its worker's slots, behind another one that must not suffer.
        threading.Thread(target=self._kill_later, args=(raw,), name="rfaas-kill", daemon=True).start()

    def _kill_later(self, raw: Any) -> None:
        while not self.closed and not raw.wait(_KILL_AGAIN_S):
            try:
                if self.lending is None or self.lending.kill(raw):
                    return
            except RFaaSError as error:
                log.debug("invocation=%d not killed: %s", raw.id, error)
                return

    # -- the end ---------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Returns when every future is over and every request has ended."""
        while self.pending:
            future = next(iter(list(self.pending)), None)
            if future is not None:
                future._finish(None)
        with self.lock:
            owners = self._spans.owners()
        for ref in owners:
            request = ref()
            if request is not None and request._active:
                request._raw.wait()

    def close(self) -> None:
        """Gives the workers back and ends what is still in flight. Safe to call twice."""
        if self.foreign:
            return
        with self.lock:
            self.closing = True
            if self.closed:
                return
            self.closed = True
        self._stretched.set()
        with self.changed:
            self.changed.notify_all()
        if self.lending is not None:
            self.lending.release()
        while self.closers:
            self.closers.pop()()
        self.invoker.close()
        for future in list(self.pending):
            self.unqueue(future)
            future._abandon()
        if self.lending is not None:
            self.lending.close()
        me = threading.current_thread()
        for thread in (self._notifier, self._stretcher):
            if thread is not None and thread is not me:
                thread.join(2.0)
        self._refs.clear()
        # The memory of the data plane goes with the last request and array on
        # it, not with this object, which its user may still hold.
        self.invoker = InlineInvoker(time.monotonic_ns)
        self.invoker.close()
        self.memory = Memory(self.invoker)
        if self.lending is not None:
            self.lending.detach(self.invoker)
        self.on_close()

    def forget(self) -> None:
        """In a forked child: nothing here is ours any more. Takes no lock, since the parent may have held it."""
        error = ForkedError("this result belongs to the process that made the executor",
                            hint="make another Executor in the child")
        self.foreign = self.closing = self.closed = True
        self.lock = threading.Lock()
        self.changed = threading.Condition(threading.Lock())
        for future in list(self.pending):
            future.__dict__.update(_error=error, _over="FINISHED", _cond=None)
        self.pending.clear()


def _nothing() -> None:
    """Nobody wants to know."""


def worker_error(ended: WorkerEnded, *, timeout: bool = False) -> KernelError:
    """The error for a kernel that ended its worker."""
    kind = KernelTimeout if timeout else KernelError
    text = "the kernel ran past its time limit and was stopped" if timeout else "the kernel ended its worker"
    if ended.message:
        text = ended.message
    elif ended.signal and not timeout:
        text += f" with signal {ended.signal} ({_signal_name(ended.signal)})"
    elif ended.exit_code is not None and not timeout:
        text += f" with exit code {ended.exit_code}"
        if ended.exit_code == os.EX_IOERR:
            text += ", as one ends whose connection to the rank was closed by its own kernel"
    if ended.last_lines:
        text += "; its last lines were:\n" + "\n".join(f"  {line}" for line in ended.last_lines)
    error = kind(text)
    describe(error, ended)
    return error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown to this system"

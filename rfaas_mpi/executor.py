"""The executor: the workers that your leases give you, called with objects or with buffers."""

from __future__ import annotations

import atexit
import concurrent.futures
import os
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from rfaas_mpi import config, local
from rfaas_mpi._version import __version__
from rfaas_mpi.arrays import Constant, arguments, as_inputs, as_outputs, check_memory, check_overlap, with_values
from rfaas_mpi.config import Settings
from rfaas_mpi.crew import Crew
from rfaas_mpi.elastic import Elastic
from rfaas_mpi.errors import ConfigError, NestedError
from rfaas_mpi.futures import Future, started
from rfaas_mpi.kernels import Kernel, object_kernel
from rfaas_mpi.mapping import Pump, Results, chunks
from rfaas_mpi.messages import Grant
from rfaas_mpi.offloading import Chosen, Offloads
from rfaas_mpi.requests import PersistentRequest, Request, check_peers
from rfaas_mpi.splitting import Explained, Split, Splits, Where
from rfaas_mpi.types import Chunk, Initialised, Outcome, apply

__all__ = ["Executor"]

P = ParamSpec("P")
T = TypeVar("T")

Buffer = ArrayLike | Constant
Buffers = Buffer | tuple[Buffer, ...]

_OK = int(Outcome.OK)
_SWEEP_EVERY = 256
# So many kernels a worker is given before callables travel with each call.
_KNOWN = 4096
_UNSETTLED = 256
# What is sent once and then called by its number.
_SHIPPED = (types.FunctionType, types.BuiltinFunctionType, type, Kernel)


class Executor(concurrent.futures.Executor):
    """Workers on borrowed cores.

    `workers`: (min, max), or a number for exactly so many; `max_workers` asks
    for none to so many, as the standard library's executors do; neither asks
    for all cores that are spare. With `comm`, a communicator of mpi4py, so many are
    leased for all of its ranks together, by one demand, and each rank gets its share:
    all of them call this with the same arguments. What fails on one of them, or that one is not
    heard of any more, is raised by all, within ten seconds. With `idle_s` few are leased at
    first; each executor asks for more when its calls queue, and gives back what it hasn't
    needed for so long, down to `min` for all ranks and never beyond `max`. Where none is
    granted, kernels run on the rank and one warning says why. `transport="inline"` runs every kernel in this
    process, for a debugger. `service="tcp://HOST:PORT"` and `key_file` name a
    service on another node; `manager` names a cluster's, and workers are then on
    whichever of its nodes have cores to spare. `initializer(*initargs)` runs once
    in each worker before its first call. `fallback=False`: nothing is ever run on
    the rank instead. The rest are settings (see `config.Settings`).

    Raises LeaseDenied where `min` workers can't be had, ServiceError where the
    service can't be reached, ConfigError for a setting that is not possible,
    and NestedError inside a kernel.

    Lower-case methods take objects (`submit`, `map`, `starmap`), upper-case
    ones take buffers (`Invoke`, `Iinvoke`, `Invoke_init`). All may be called
    from any thread. Use it as a context manager, or call `close`.
    """

    def __init__(self, workers: tuple[int, int] | int | None = None, *, comm: Any = None,
                 max_workers: int | None = None, cores_per_worker: int = 1, memory_per_worker: int | str | None = None,
                 initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = (),
                 transport: Literal["auto", "shm", "tcp", "verbs", "inline"] | None = None, slots: int | None = None,
                 slot_bytes: int | str | None = None, spin_us: int | None = None,
                 fallback: bool | None = None, **settings: Any) -> None:
        self._crew: Crew | None = None
        _refuse_nesting()

        def set_up() -> tuple[Crew, int, int | None]:
            least, most = _demand(workers, max_workers, cores_per_worker)
            if initializer is not None and not callable(initializer):
                raise TypeError("initializer must be a callable")
            self._settings = Settings.load(
                transport=transport, slots=slots, slot_bytes=slot_bytes, spin_us=spin_us, fallback=fallback,
                memory_per_worker=memory_per_worker, **settings)
            self._prepare(initializer, initargs)
            self._crew = _new_crew(self, self._settings)
            return self._crew, least, most

        if comm is None:
            crew, least, most = set_up()
            # Who gives back what is idle begins with little, and so with leases that can be given back one by one.
            idle_s = self._settings.idle_s
            first = most if idle_s is None else max(1, least)
            crew.hire(lambda lending: lending.hire(least, first, cores_per_worker, self._settings.memory_per_worker))
            if idle_s is not None and not crew.inline:
                crew.stretch(Elastic(least, most, idle_s), cores_per_worker)
        else:
            from rfaas_mpi import mpi

            def ask() -> mpi.Ask:
                crew, least, most = set_up()
                return mpi.Ask(crew, _terms(least, most, cores_per_worker, initializer, self._settings), least, most,
                               cores_per_worker)
            more = mpi.hire(comm, ask)
            crew, idle_s = self._open(), self._settings.idle_s
            if idle_s is not None and not crew.inline:
                crew.stretch(Elastic(0, more, idle_s), cores_per_worker)
        if crew.alone and not crew.inline:
            crew.said_fallback = True
            why = crew.lending.why if crew.lending is not None else None
            warnings.warn(f"kernels run on the rank itself: {why or 'no worker was lent'}",
                          RuntimeWarning, stacklevel=2)

    @classmethod
    def _join(cls, grant: Grant, **settings: Any) -> Executor:
        """An executor on workers that another process of this user leased (its `_grant`)."""
        executor = cls.__new__(cls)
        executor._crew = None
        _refuse_nesting()
        executor._settings = Settings.load(**settings)
        executor._prepare(None, ())
        crew = executor._crew = _new_crew(executor, executor._settings)
        crew.hire(lambda lending: lending.join(grant))
        return executor

    @property
    def _grant(self) -> Grant:
        """What `_join` needs in another process. It holds the leases' secrets."""
        lending = self._open().lending
        return lending.grant if lending is not None else Grant(())

    def _prepare(self, initializer: Callable[..., Any] | None, initargs: tuple[Any, ...]) -> None:
        self._initializer = initializer
        self._initargs = initargs
        self._init_key = Initialised.new_key(os.urandom(8)) if initializer is not None else None
        # The callable that was submitted last, as long as its kernel is what it is.
        self._last: tuple[Any, Any] = (object(), None)
        self._wrapped: dict[bytes, Kernel] = {}
        self._known: set[bytes] = set()
        self._submitted = 0
        self._pumps: set[Pump] = set()
        self._splits: Splits | None = None
        self._offloads: Offloads | None = None
        self._shutdown_lock = threading.Lock()

    # -- what it has -----------------------------------------------------------------------------------

    @property
    def workers(self) -> list[int]:
        """Numbers of the workers that are there now; empty where kernels run on the rank."""
        return self._crew.workers if self._crew is not None else []

    def on_change(self, fn: Callable[[list[int]], T]) -> Callable[[list[int]], T]:
        """Has `fn(workers)` called after each change of `workers`, in a thread of ours; returns `fn`.

        Revoked and lost workers go, replaced and new ones come. What it raises is logged.
        """
        if not callable(fn):
            raise TypeError(f"{fn!r} can't be called with the workers")
        self._open().listen(fn)
        return fn

    def wait_workers(self, least: int = 1, timeout_s: float | None = None) -> bool:
        """True once there are at least so many workers; False after `timeout_s` seconds, or at the executor's end."""
        return self._open().wait_workers(least, timeout_s)

    def stats(self) -> dict[str, int]:
        """Counters of the data plane."""
        return self._open().invoker.stats()

    def _open(self) -> Crew:
        crew = self._crew
        if crew is None:
            raise ConfigError("this executor was never set up: its __init__ raised or was not called")
        return crew

    def __repr__(self) -> str:
        crew = self._crew
        state = "shut down" if crew is None or crew.closing else f"workers={self.workers}"
        transport = self._settings.transport if crew is None else crew.transport
        return f"<Executor transport={transport} {state}>"

    # -- objects ---------------------------------------------------------------------------------------

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future for `fn(*args, **kwargs)`, run on a worker; never waits for one.

        Arrays in the arguments are not pickled; those made by `empty` and
        constants made by `put` are not even copied, and arrive read-only. Raises
        BadKernel (a TypeError) for what can't be sent, ClosedError (a
        RuntimeError) after shutdown.
        """
        crew = self._crew or self._open()
        last, kernel = self._last
        if fn is not last or not kernel.settled:
            kernel = self._kernel_of(fn)
            if kernel is None:
                args, kernel = (fn, *args), self._initialised(object_kernel(apply))  # type: ignore[assignment]
        return self._send(crew, kernel, args, kwargs)

    def offload(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`fn(*args, **kwargs)`, run here or on a worker, whichever is expected to be done sooner; its result.

        What calls of `fn` with such arguments take here, there and on the way is
        learned; a worker now and then runs one of them besides, for which at most
        1 % of the time is spent. So `fn` has no effects but its result: it may run
        twice, and must not change its arguments. Arrays arrive read-only where they
        are not copied, as they are here. It pays where workers are faster, or the
        rank is busy: call it from several threads. `explain` says what was learned.

        Raises what `fn` raises, and as `submit`.
        """
        crew = self._crew or self._open()
        last, kernel = self._last
        if fn is not last or not kernel.settled:
            kernel = self._kernel_of(fn)
            if kernel is None:
                args, kernel = (fn, *args), self._initialised(object_kernel(apply))  # type: ignore[assignment]
        return (self._offloads or self._offloading(crew)).call(kernel, args, kwargs)

    def _offloading(self, crew: Crew) -> Offloads:
        with crew.lock:
            if self._offloads is None:
                self._offloads = Offloads(crew)
            return self._offloads

    def _send(self, crew: Crew, kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
        args, kwargs = with_values(args, kwargs)
        future = started(crew, (kernel, args, kwargs))
        self._submitted += 1
        if not self._submitted % _SWEEP_EVERY:
            crew.sweep()
        return future

    def map(self, fn: Callable[..., T], /, *iterables: Iterable[Any], timeout: float | None = None,
            chunksize: int = 1, unordered: bool = False) -> Iterator[T]:
        """Results of `fn` on the items, in order, or as they come with `unordered`.

        Items are read as results are taken, a few for each slot ahead, so that
        the iterables may be endless. `chunksize` items travel together.
        `timeout` seconds from now on, waiting raises TimeoutError.
        """
        return self.starmap(fn, zip(*iterables, strict=False), timeout=timeout, chunksize=chunksize, unordered=unordered)

    def starmap(self, fn: Callable[..., T], items: Iterable[Sequence[Any]], *, timeout: float | None = None,
                chunksize: int = 1, unordered: bool = False) -> Iterator[T]:
        """As `map`, for an iterable of argument tuples."""
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        crew = self._open()
        crew.check()
        submit: Callable[[Any], Future[Any]]
        source: Iterator[Any]
        if chunksize == 1:
            def submit(item: Any) -> Future[Any]:
                return self.submit(fn, *item)
            source = iter(items)
        else:
            chunk = self._initialised(object_kernel(Chunk(fn)))

            def submit(item: Any) -> Future[Any]:
                return self._send(crew, chunk, (item,), {})
            source = chunks((tuple(item) for item in items), chunksize)
        pump = Pump(submit, source, self._window, _wait_any(crew), unordered=unordered)
        self._pumps.add(pump)
        results = Results(pump, timeout, chunked=chunksize > 1, started=self._pumps.discard)
        pump.fill()
        return results

    def _window(self) -> int:
        crew = self._open()
        return 1 if crew.inline else max(4, 2 * self._settings.slots * max(1, len(self.workers)))

    def _kernel_of(self, fn: Callable[..., Any]) -> Kernel | None:
        """The kernel for a callable, or None where it is to travel with each call."""
        if not isinstance(fn, _SHIPPED):
            # It may change between two calls, as a bound method's object does.
            if not callable(fn):
                raise TypeError(f"{fn!r} is not callable")
            return None
        kernel = object_kernel(fn)
        settled = kernel.settled
        if kernel.digest not in self._known:
            # A worker keeps the code it was sent: a loop that makes a new closure
            # for each call must not fill it.
            if len(self._known) >= (_KNOWN if settled else _UNSETTLED):
                return None
            self._known.add(kernel.digest)
        kernel = self._initialised(kernel)
        if settled:
            self._last = fn, kernel
        return kernel

    def _initialised(self, kernel: Kernel) -> Kernel:
        """The kernel that runs the initializer first, where there is one."""
        if self._initializer is None:
            return kernel
        found = self._wrapped.get(kernel.digest)
        if found is None:
            assert self._init_key is not None
            assert kernel.fn is not None
            found = object_kernel(Initialised(kernel.fn, self._initializer, self._initargs, self._init_key))
            self._wrapped[kernel.digest] = found
        return found

    # -- buffers ---------------------------------------------------------------------------------------

    def Invoke(self, kernel: Kernel, inputs: Buffers, out: Buffers, timeout_s: float | None = None) -> Any:
        """Runs the kernel on the inputs and fills `out`, which it returns.

        `inputs` and `out` are one array or a tuple of them: C-contiguous arrays
        or buffers, constants, scalars as inputs, mpi4py's [buffer, count,
        datatype]. `timeout_s` bounds the kernel; past it its worker is stopped.

        Raises InvalidBuffer for an argument that can't be used, KernelError
        where the kernel fails, KernelTimeout, BadKernel, WorkerLost.
        """
        _, read, written = self._checked(kernel, inputs, out)
        crew = self._open()
        if peers := crew.peers(read, written):
            check_peers(kernel, peers)
        raw = crew.buffers_request(kernel, read, written, persistent=False)
        raw.start(timeout_s)
        raw.wait()
        if raw.outcome == _OK:
            raw.close()
        else:
            # Something went wrong: what follows is the same as for a request.
            Request(crew, kernel, read, written, out, timeout_s, raw=raw).Wait()
        return out

    def Iinvoke(self, kernel: Kernel, inputs: Buffers, out: Buffers, timeout_s: float | None = None) -> Request:
        """As Invoke, without waiting: the arrays are yours again after the request's Wait."""
        request = Request(self._open(), *self._checked(kernel, inputs, out), out, timeout_s)
        request._begin()
        return request

    def Invoke_init(self, kernel: Kernel, inputs: Buffers, out: Buffers,
                    timeout_s: float | None = None) -> PersistentRequest:
        """A request on these arrays that can be started again and again; not started yet."""
        return PersistentRequest(self._open(), *self._checked(kernel, inputs, out), out, timeout_s)

    def Offload(self, kernel: Kernel, inputs: Buffers, out: Buffers, timeout_s: float | None = None) -> Any:
        """As Invoke, but run here where that is expected to be done sooner; returns `out`.

        Decided as for `offload`. `timeout_s` bounds the kernel where a worker runs
        it. Raises as Invoke; what happens to a worker costs time and no result.
        """
        crew = self._crew or self._open()
        if self._offloads is not None and self._offloads.invoke_again(kernel, inputs, out):
            return out
        _, read, written = self._checked(kernel, inputs, out)
        if peers := crew.peers(read, written):
            check_peers(kernel, peers)
        constant = [isinstance(value, Constant) for value in arguments(inputs)]
        (self._offloads or self._offloading(crew)).invoke(kernel, read, written, timeout_s, constant)
        return out

    def Split(self, kernel: Kernel, inputs: Buffers, out: Buffers, *, whole: Sequence[int] = (),
              rows: int | None = None, index: bool = False, reduce: Callable[..., Any] | None = None,
              grain: int | None = None, rowwise: bool = False, timeout_s: float | None = None,
              where: Where = "both") -> Any:
        """Runs a data-parallel kernel on all rows, here and at the workers, and fills `out`, which it returns.

        The arrays are cut along their first axis into cells, by their shape
        alone, and the kernel is called once for each: any split gives the same
        bits. Constants, scalars and the inputs named in `whole` go to each cell
        as they are. With `index` the kernel gets one more input, the number of
        its cell's first row (int64). With `reduce` (such as numpy.add) each cell
        fills arrays of the shape of `out`, which are then combined in order.
        `rows` says how many rows there are where no array does; `grain` is the
        least number of rows of a cell: 1 for a kernel that takes long for a row.
        `rowwise`: no row's result depends on which other rows its call has, so
        that cells which follow each other may be run by one call.

        Who runs which cell is decided from what it takes here and there; where
        offloading can't win, nothing is. `where` takes that decision: "here" or
        "workers". Raises as `Invoke`.
        """
        made = self.Split_init(kernel, inputs, out, whole=whole, rows=rows, index=index, reduce=reduce,
                               grain=grain, rowwise=rowwise, timeout_s=timeout_s, where=where, persistent=False)
        try:
            return made.Run()
        finally:
            made.Free()

    def Split_init(self, kernel: Kernel, inputs: Buffers, out: Buffers, *, persistent: bool = True,
                   **how: Any) -> Split:
        """As Split, set up once for these arrays: `Run` it as often as you like."""
        crew = self._open()
        if self._splits is None:
            self._splits = Splits(crew)
        return Split(self._splits, kernel, inputs, out, persistent=persistent, **how)

    def explain(self) -> list[Explained | Chosen]:
        """For each kernel and size that was divided or offloaded: what would be done now, what it would take, and why.
        """
        self._open()
        return [*(self._splits.explain() if self._splits is not None else ()),
                *(self._offloads.explain() if self._offloads is not None else ())]

    def _checked(self, kernel: Kernel, inputs: Buffers,
                 out: Buffers) -> tuple[Kernel, tuple[Any, ...], tuple[np.ndarray, ...]]:
        crew = self._open()
        crew.check()
        if not isinstance(kernel, Kernel):
            raise TypeError(f"{kernel!r} is no kernel; make it one with @rfaas_mpi.kernel or Kernel.from_library")
        read, written = as_inputs(inputs, kernel.name), as_outputs(out, kernel.name)
        check_overlap(read, written)
        if limit := crew.memory.limit:
            for kind, arrays in (("input", read), ("output", written)):
                for i, values in enumerate(arrays):
                    if values.nbytes > limit:
                        check_memory(values.nbytes, limit, f"{kind} {i} of {kernel.name}")
        return kernel, read, written

    # -- memory ----------------------------------------------------------------------------------------

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike = float) -> np.ndarray:
        """An uninitialised array that workers use in place; valid as long as you hold it."""
        return self._memory().empty(shape, dtype)

    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike = float) -> np.ndarray:
        """As `empty`, of zeros."""
        return self._memory().empty(shape, dtype, zero=True)

    def full(self, shape: int | Sequence[int], fill_value: Any, dtype: DTypeLike | None = None) -> np.ndarray:
        """As `empty`, filled with a value, whose dtype it takes by default."""
        made = self._memory().empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype)
        made[...] = fill_value
        return made

    def array(self, values: ArrayLike, dtype: DTypeLike | None = None) -> np.ndarray:
        """As `empty`, with a copy of the values."""
        source = np.asarray(values, dtype)
        made = self._memory().empty(source.shape, source.dtype)
        made[...] = source
        return made

    def empty_like(self, prototype: ArrayLike, dtype: DTypeLike | None = None,
                   shape: int | Sequence[int] | None = None) -> np.ndarray:
        """As `empty`, with the shape and dtype of another array."""
        source = np.asarray(prototype)
        return self._memory().empty(source.shape if shape is None else shape,
                                    source.dtype if dtype is None else dtype)

    def zeros_like(self, prototype: ArrayLike, dtype: DTypeLike | None = None,
                   shape: int | Sequence[int] | None = None) -> np.ndarray:
        """As `zeros`, with the shape and dtype of another array."""
        source = np.asarray(prototype)
        return self._memory().empty(source.shape if shape is None else shape,
                                    source.dtype if dtype is None else dtype, zero=True)

    def put(self, values: ArrayLike) -> Constant:
        """A constant for the workers, copied once; pass its handle like an array."""
        return self._memory().put(values)

    def _memory(self) -> Any:
        crew = self._open()
        crew.check()
        return crew.memory

    # -- the end ---------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more calls and gives the workers back. Safe to call twice.

        Waits for the calls in flight, or, with `wait=False`, leaves that to a
        thread. `cancel_futures` cancels those that have not begun.
        """
        crew = self._crew
        if crew is None or crew.foreign:
            return
        with self._shutdown_lock:
            pumps, self._pumps = self._pumps, set()
            if cancel_futures:
                for pump in pumps:
                    pump.cancel()
            elif wait:
                for pump in pumps:
                    pump.drain()
            crew.closing = True
            if cancel_futures:
                for future in list(crew.pending):
                    future.cancel()
            if wait:
                crew.drain()
                crew.close()
            else:
                _finish_later(crew)

    def close(self) -> None:
        """The end, as `shutdown()`: safe to call twice, and no call to MPI, with `comm` either."""
        self.shutdown()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: types.TracebackType | None) -> Literal[False]:
        if kind is None:
            self.shutdown(wait=True)
        elif issubclass(kind, Exception):
            self.shutdown(wait=True, cancel_futures=True)
        elif self._crew is not None:
            # Ctrl-C or exit: nobody waits for a kernel any more.
            self._crew.close()
        return False


def _refuse_nesting() -> None:
    if config.inside_worker() or local.inside_kernel():
        raise NestedError("an Executor can't be made inside a kernel",
                          hint="return what the rank needs, and let the rank call the next kernel")


def _demand(workers: tuple[int, int] | int | None, max_workers: int | None,
            cores_per_worker: int) -> tuple[int, int | None]:
    """(min, max) of workers to ask for; max None: all that are spare."""
    if workers is not None and max_workers is not None:
        raise ConfigError("both workers and max_workers were given", hint="give one of them")
    if not isinstance(cores_per_worker, int) or isinstance(cores_per_worker, bool) or cores_per_worker < 1:
        raise ConfigError(f"cores_per_worker={cores_per_worker!r} is no number of cores", hint="1 or more")
    if max_workers is not None:
        if not isinstance(max_workers, (int, np.integer)) or max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        return 0, int(max_workers)
    match workers:
        case None:
            return 0, None
        case bool():
            pass
        case int() if workers >= 1:
            return workers, workers
        case (int() as least, int() as most) if 0 <= least <= most and most >= 1:
            return least, most
    raise ConfigError(f"workers={workers!r} is no demand",
                      hint="give (min, max) with 0 <= min <= max and max >= 1, or one number")


# Of these settings all ranks of a communicator have the same; the others say where a rank is.
_COMMON = ("service", "manager", "transport", "lend", "lease_duration_s", "lease_timeout_s", "spin_us", "slots",
           "slot_bytes", "idle_s", "memory_per_worker", "sandbox", "worker_prefix", "fallback", "integrity")


def _terms(least: int, most: int | None, cores_per_worker: int, initializer: Callable[..., Any] | None,
           settings: Settings) -> dict[str, str]:
    """What the ranks of a communicator have to agree on, by name."""
    named = getattr(initializer, "__qualname__", type(initializer).__name__)
    return {"rfaas_mpi's version": __version__, "workers": f"({least}, {'all' if most is None else most})",
            "cores_per_worker": str(cores_per_worker), "initializer": "None" if initializer is None else named,
            **{name: repr(getattr(settings, name)) for name in _COMMON}}


def _wait_any(crew: Crew) -> Callable[[list[Any], float | None], None]:
    def wait(futures: list[Any], timeout_s: float | None) -> None:
        crew.wait_any([future._raw for future in futures], timeout_s)
    return wait


# -- executors that nobody shut down -----------------------------------------------------------------------

_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


def _new_crew(executor: Executor, settings: Settings) -> Crew:
    crew = Crew(settings)
    _crews.add(crew)
    forgotten = weakref.finalize(executor, _forgotten, crew)
    forgotten.atexit = False
    crew.on_close = forgotten.detach
    return crew


def _forgotten(crew: Crew) -> None:
    """An executor is gone: what it was asked to do is still done."""
    if crew.closed or crew.foreign:
        return
    crew.closing = True
    _finish_later(crew)


def _finish_later(crew: Crew) -> None:
    def finish() -> None:
        crew.drain()
        crew.close()
    # Not a daemon: as with the standard library, the interpreter waits for what was accepted.
    threading.Thread(target=finish, name="rfaas-shutdown", daemon=False).start()


def _at_exit() -> None:
    for crew in list(_crews):
        crew.close()


def _after_fork() -> None:
    for crew in list(_crews):
        crew.forget()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)

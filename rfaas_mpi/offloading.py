"""One call, run here or at a worker, whichever is expected to be done sooner.

`choice.py` decides; here what a call is like is told from its arguments, and it
is run where it was decided.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import numpy as np

from rfaas_mpi import codec, local
from rfaas_mpi.arrays import Constant, with_values
from rfaas_mpi.choice import Choice, Known, Load
from rfaas_mpi.errors import BadKernel, InvalidBuffer, LeaseExpired, LeaseRevoked, ServiceLost, WorkerLost
from rfaas_mpi.futures import started
from rfaas_mpi.kernels import Kernel
from rfaas_mpi.planner import Line
from rfaas_mpi.requests import Request
from rfaas_mpi.splitting import dismiss
from rfaas_mpi.types import Outcome

if TYPE_CHECKING:
    from rfaas_mpi.crew import Crew

__all__ = ["Chosen", "Offloads"]

# What happened to a worker; the rank runs the call then.
_LOST = (CancelledError, WorkerLost, LeaseRevoked, LeaseExpired, ServiceLost)

# How many kernels and sizes are remembered, and how many shapes of arguments.
_KNOWN = 4096
_AGAIN = 256
# How often the rank asks who its workers are, and until when.
_LOOK_S = 1e-3
# What is expected of a way before it was used: for nothing, and a byte.
_WAYS = {"shm": (30e-6, 0.2e-9), "verbs": (40e-6, 0.4e-9)}
_NETWORK = (100e-6, 1.5e-9)
# What a probe costs the rank.
_HAND_S = 150e-6


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What is known of a kernel that `offload` and `Offload` call, with arguments of one size. Times are seconds."""

    kernel: str
    nbytes: int
    """Of the arguments, in the call that was last."""
    workers: int
    offload: bool
    """Where the next such call goes, if nothing else runs."""
    why: str
    here_s: float | None
    there_s: float | None
    """With the way there and back; what is assumed as long as no worker has run it."""
    way_s: float
    runs_here: int
    runs_there: int
    probes: int
    stalls: int

    def __str__(self) -> str:
        where = "offload" if self.offload else "run here"
        return f"{self.kernel}, {self.nbytes:,} bytes: {where} ({self.why})"


@dataclasses.dataclass(eq=False)
class _Probe:
    """A call that a worker runs as well; nobody waits for it."""

    raw: Any
    choice: Choice
    size: float
    arrays: Any


class _Entry:
    """One kernel on arguments of one size."""

    __slots__ = ("choice", "here", "name", "nbytes", "probe", "size")

    def __init__(self, name: str, choice: Choice) -> None:
        self.name = name
        self.choice = choice
        # Of the last call: bytes of all arguments, and of those that travel.
        self.size = 1.0
        self.nbytes = 0
        self.here = 0            # such calls that run on the rank now
        self.probe: _Probe | None = None


class Offloads:
    """What an executor has learned of its single calls. May be used from several threads."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._lock = threading.Lock()
        self._entries: dict[Any, _Entry] = {}
        self._known: dict[Any, Known] = {}
        self._ways: dict[Any, Line] = {}
        # Calls of ours that run now, here and there.
        self._here = 0
        self._there = 0
        self._probing: list[_Entry] = []
        self._looked = -math.inf
        self._workers: list[int] = []
        self._ends_at = math.inf
        self._way = ""
        # What was found out about calls on buffers that ran here, by their shapes.
        self._again: dict[Any, tuple[_Entry, int, int]] = {}
        crew.closers.append(self._close)

    # -- objects ---------------------------------------------------------------------------------

    def call(self, kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The callable's result, run where that is done sooner; `kernel` is what a worker is sent of it."""
        if not self._look():
            return self._call_here(None, kernel, args, kwargs, 0.0)
        shape, size, nbytes = _measure(args, kwargs)
        entry = self._entry(("objects", kernel.digest, shape), kernel.name, size, nbytes)
        load, decision = self._decide(entry, size, nbytes)
        if decision.there:
            done, value = self._call_there(entry, kernel, args, kwargs, size, nbytes, load, decision.patience_s)
            if done:
                return value
        elif decision.probe and entry.probe is None:
            make = functools.partial(self._crew.object_request, kernel, *_copied_call(args, kwargs))
            self._probe(entry, size, make, None)
        return self._call_here(entry, kernel, args, kwargs, size)

    def _call_here(self, entry: _Entry | None, kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any],
                   size: float) -> Any:
        run = kernel.fn
        assert run is not None
        args, kwargs = _as_read_only(args, kwargs)
        others = self._begin_here(entry)
        begin = time.perf_counter()
        done = False
        try:
            with local.as_kernel():
                value = run(*args, **kwargs)
            done = True
            return value
        finally:
            self._end_here(entry, size, time.perf_counter() - begin, others, done)

    def _call_there(self, entry: _Entry, kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any], size: float,
                    nbytes: float, load: Load, patience_s: float) -> tuple[bool, Any]:
        """(True, the result), or (False, None) where the worker did not answer in time."""
        begin = time.perf_counter()
        with self._lock:
            self._there += 1
        try:
            future = started(self._crew, (kernel, *with_values(args, kwargs)))
            raw = future._raw
            try:
                try:
                    while True:
                        try:
                            value = future.result(None if patience_s == math.inf else patience_s)
                            break
                        except TimeoutError:
                            if future.done() or not (patience_s := self._patience_left(entry, size, begin)):
                                raise
                except TimeoutError:
                    if not future.done():
                        # Nobody waits for it any more: it writes to nothing of ours.
                        self._crew.pending.pop(future, None)
                        future.cancel()
                        self._late(entry, time.perf_counter() - begin)
                        return False, None
                    # The kernel's own; or it came just now.
                    value = future.result()
            except _LOST:
                # Without fallback; but the rank takes part in this anyway.
                self._late(entry, time.perf_counter() - begin)
                return False, None
            took = time.perf_counter() - begin
            if future._history is None:
                self._learn_there(entry, size, nbytes, took, raw.exec_ns * 1e-9, load)
            return True, value
        finally:
            with self._lock:
                self._there -= 1

    # -- buffers ---------------------------------------------------------------------------------

    def invoke(self, kernel: Kernel, inputs: tuple[np.ndarray, ...], outputs: tuple[np.ndarray, ...],
               timeout_s: float | None, constant: Sequence[bool]) -> None:
        """Runs the kernel on the inputs, where that is done sooner, and fills the outputs.

        `constant` says which inputs are constants: workers have them, once each was sent them.
        """
        crew = self._crew
        if not self._look():
            self._run_here(None, kernel, inputs, outputs, 0.0)
            return
        way = self._way
        locate = crew.invoker.locate if way == "shm" else None
        shape, size, nbytes = _measure_buffers(way, locate, inputs, outputs, constant)
        entry = self._entry(("buffers", kernel.digest, shape), kernel.name, size, nbytes)
        load, decision = self._decide(entry, size, nbytes)
        if not decision.there and not any(constant) and (pattern := _pattern(kernel, inputs, outputs)) is not None:
            if len(self._again) >= _AGAIN:
                self._again.clear()
            self._again[pattern] = entry, size, nbytes
        # From behind somebody else's call, however long, it could be taken back on shared memory alone.
        behind = way != "shm" and load.there >= load.workers and load.there > self._there
        if decision.there and not behind:
            if self._run_there(entry, kernel, inputs, outputs, size, nbytes, load, decision.patience_s, timeout_s):
                return
        elif decision.probe and entry.probe is None:
            try:
                copies = tuple([array if fixed else _copied(crew.memory, array)
                                for array, fixed in zip(inputs, constant, strict=True)])
                outs = tuple([crew.memory.empty(array.shape, array.dtype) for array in outputs])
            except (MemoryError, InvalidBuffer):
                pass        # no room for them, or more than a worker may have
            else:
                make = functools.partial(crew.buffers_request, kernel, copies, outs, False)
                self._probe(entry, size, make, (copies, outs))
        self._run_here(entry, kernel, inputs, outputs, size)

    def invoke_again(self, kernel: Kernel, inputs: Any, out: Any) -> bool:
        """Runs the kernel here, where it ran on such arrays before and no worker could be sooner, wherever they lie.

        False, and nothing is done, where that isn't known: it takes longer to look at a call than to run such a one.
        Raises as `invoke`.
        """
        crew = self._crew
        if crew.closing or crew.busy or self._probing or not self._look():
            return False
        read = inputs if type(inputs) is tuple else (inputs,)
        if (found := self._again.get(_pattern(kernel, read, (out,)))) is None:
            return False
        for value in read:
            if np.may_share_memory(out, value):
                return False
        entry, size, nbytes = found
        # What another thread is learning now may count or not.
        if not entry.choice.surely_here(size, self._here):
            return False
        entry.size, entry.nbytes = size, nbytes
        self._run_here(entry, kernel, read, (out,), size)
        return True

    def _run_here(self, entry: _Entry | None, kernel: Kernel, inputs: tuple[np.ndarray, ...],
                  outputs: tuple[np.ndarray, ...], size: float) -> None:
        others = self._begin_here(entry)
        begin = time.perf_counter()
        done = False
        try:
            with local.as_kernel():
                kernel.run(inputs, outputs)
            done = True
        except KeyboardInterrupt:
            raise
        # As it would be raised had a worker run it.
        except BadKernel as error:
            raise codec.error_for_bind(codec.dumps_error(error)) from error
        except BaseException as error:
            raise codec.error_for_invoke(codec.dumps_error(error)) from error
        finally:
            self._end_here(entry, size, time.perf_counter() - begin, others, done)

    def _run_there(self, entry: _Entry, kernel: Kernel, inputs: tuple[np.ndarray, ...],
                   outputs: tuple[np.ndarray, ...], size: float, nbytes: float, load: Load, patience_s: float,
                   timeout_s: float | None) -> bool:
        """Whether a worker ran it; False where it was lost, or did not answer in time and was given up."""
        begin = time.perf_counter()
        with self._lock:
            self._there += 1
        try:
            request = Request(self._crew, kernel, inputs, outputs, None, timeout_s)
            request._begin()
            try:
                while not (ended := request.Wait(None if patience_s == math.inf else patience_s)):
                    if not (patience_s := self._patience_left(entry, size, begin)):
                        break
                if not ended:
                    invoker = self._crew.invoker
                    others = invoker.in_flight + invoker.queued > 1
                    # Behind somebody else's call it is taken back, which harms nobody. Else only the end of its
                    # worker, or of the way to it, keeps it from writing to the outputs.
                    if not (others and request._raw.cancel()):
                        dismiss(self._crew, request)
                    request.Wait()
            except _LOST:
                self._late(entry, time.perf_counter() - begin)
                return False
            if request._raw.outcome == Outcome.OK and request.worker:
                self._learn_there(entry, size, nbytes, time.perf_counter() - begin, request.exec_ns * 1e-9, load)
            return True
        finally:
            with self._lock:
                self._there -= 1

    # -- what is shared --------------------------------------------------------------------------

    def _look(self) -> list[int]:
        """The workers that are there, asked for once in a while."""
        now = time.monotonic()
        if now - self._looked > _LOOK_S:
            self._looked = now
            crew = self._crew
            crew.check()
            self._workers = crew.workers
            self._ends_at = crew.ends_at
            if (way := crew.transport) != self._way:
                self._way = way
                self._again.clear()
        return self._workers

    def _entry(self, key: Any, name: str, size: float, nbytes: int) -> _Entry:
        found = self._entries.get(key)
        if found is None:
            with self._lock:
                found = self._entries.get(key)
                if found is None:
                    found = self._entries[key] = self._made(key, name)
        found.size, found.nbytes = size, nbytes
        return found

    def _made(self, key: Any, name: str) -> _Entry:
        form, digest, _ = key
        if len(self._entries) >= _KNOWN:
            del self._entries[next(iter(self._entries))]
        if len(self._known) >= _KNOWN:
            del self._known[next(iter(self._known))]
        way = self._way
        known = self._known.setdefault((form, digest, way), Known())
        line = self._ways.setdefault((form, way), Line())
        way_s, byte_s = _WAYS.get(way, _NETWORK)
        return _Entry(name, Choice(known, line, way_s, byte_s, _HAND_S))

    def _load(self) -> Load:
        invoker = self._crew.invoker
        there = invoker.in_flight + invoker.queued
        if there > self._there:
            # What nobody waits for counts as in flight until somebody looks.
            invoker.progress()
            there = max(self._there, invoker.in_flight + invoker.queued)
        left_s = math.inf if self._ends_at == math.inf else self._ends_at - time.monotonic()
        return Load(len(self._workers), self._here, there, left_s)

    def _decide(self, entry: _Entry, size: float, nbytes: float) -> tuple[Load, Any]:
        with self._lock:
            for one in list(self._probing):
                self._harvest(one)
            load = self._load()
            return load, entry.choice.decide(size, nbytes, load)

    def _begin_here(self, entry: _Entry | None) -> int:
        with self._lock:
            others = self._here
            self._here += 1
            if entry is not None:
                entry.here += 1
        return others

    def _end_here(self, entry: _Entry | None, size: float, took_s: float, others: int, done: bool) -> None:
        with self._lock:
            self._here -= 1
            if entry is not None:
                entry.here -= 1
                if done:
                    entry.choice.ran_here(size, took_s, (others + self._here) / 2)

    def _learn_there(self, entry: _Entry, size: float, nbytes: float, took_s: float, exec_s: float,
                     load: Load) -> None:
        with self._lock:
            entry.choice.ran_there(size, nbytes, took_s, exec_s, load.there)

    def _patience_left(self, entry: _Entry, size: float, begin: float) -> float:
        with self._lock:
            return entry.choice.patience_left(size, time.perf_counter() - begin, entry.here)

    def _late(self, entry: _Entry, lost_s: float) -> None:
        with self._lock:
            entry.choice.stalled(lost_s)

    # -- probes ----------------------------------------------------------------------------------

    def _probe(self, entry: _Entry, size: float, make: Callable[[], Any], arrays: Any) -> None:
        """Has a worker run the call, too. What goes wrong with that is told by the call itself, or never."""
        try:
            raw = make()
        except (BadKernel, InvalidBuffer):
            return
        raw.start()
        with self._lock:
            if entry.probe is not None:
                raw.close()     # another thread was quicker
                return
            entry.probe = _Probe(raw, entry.choice, size, arrays)
            self._probing.append(entry)

    def _harvest(self, entry: _Entry) -> None:
        """Learns from a probe that has ended. The caller holds the lock."""
        probe = entry.probe
        if probe is None or not probe.raw.test():
            return
        raw = probe.raw
        if raw.outcome in (Outcome.OK, Outcome.LARGE) and raw.worker:
            probe.choice.probed(probe.size, raw.exec_ns * 1e-9)
        raw.close()
        entry.probe = None
        self._probing.remove(entry)

    def _close(self) -> None:
        with self._lock:
            for entry in self._probing:
                if entry.probe is not None:
                    entry.probe.raw.close()
                    entry.probe = None
            self._probing.clear()
            self._again.clear()

    # -- what is known ---------------------------------------------------------------------------

    def explain(self) -> list[Chosen]:
        """What is known, in the order in which it was first asked for."""
        self._looked = -math.inf
        self._look()
        with self._lock:
            for entry in list(self._probing):
                self._harvest(entry)
            load = self._load()._replace(here=0, there=0)
            found = []
            for entry in self._entries.values():
                choice = entry.choice
                size = entry.size
                there, why = choice.judge(size, entry.nbytes, load)
                found.append(Chosen(
                    kernel=entry.name, nbytes=int(size), workers=load.workers, offload=there, why=why,
                    here_s=choice.here_s(size), there_s=choice.there_s(size, entry.nbytes, load),
                    way_s=choice.travel_s(entry.nbytes), runs_here=choice.runs_here, runs_there=choice.runs_there,
                    probes=choice.probes, stalls=choice.stalls))
            return found


# -- how large a call is --------------------------------------------------------------------------

def _magnitude(value: Any) -> Any:
    """The same for numbers within a factor of two: what a call takes often depends on them."""
    try:
        return math.frexp(value)[1]
    except (TypeError, OverflowError, ValueError):
        return 0


def _measure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int, int]:
    """What calls have in common that cost alike; bytes of all arguments, and bytes that travel."""
    size = travel = 0
    shape: list[Any] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is np.ndarray:
            size += value.nbytes
            travel += value.nbytes
            shape.append((value.dtype.num, value.nbytes.bit_length()))
        elif kind is int or kind is float:
            shape.append(_magnitude(value))
        elif kind is Constant:
            size += value.nbytes
            shape.append((kind, value.nbytes.bit_length()))
        elif isinstance(value, (bytes, bytearray, str, list, tuple, dict, set)):
            size += len(value)
            travel += len(value)
            shape.append((kind, len(value).bit_length()))
        else:
            # Callables by their names: a bound method travels with its object.
            shape.append(getattr(value, "__qualname__", None) or kind)
    return (tuple(shape), tuple(kwargs)), max(size, 1), travel


def _measure_buffers(way: str, locate: Callable[[int, int], Any] | None, inputs: Sequence[np.ndarray],
                     outputs: Sequence[np.ndarray], constant: Sequence[bool]) -> tuple[Any, int, int]:
    """What calls have in common that cost alike; bytes of all arguments, and bytes that travel.

    `locate` finds what workers see where it lies. Constants don't travel: that a worker is sent one
    once is no cost of each call.
    """
    size = travel = 0
    shape: list[Any] = [way]
    for i, array in enumerate((*inputs, *outputs)):
        nbytes = array.nbytes
        size += nbytes
        fixed = i < len(constant) and constant[i]
        if not fixed and (locate is None or locate(array.__array_interface__["data"][0], nbytes) is None):
            travel += nbytes
        shape.append((array.dtype.num, nbytes.bit_length() if array.ndim else _magnitude(array[()])))
    return (tuple(shape), travel.bit_length()), max(size, 1), travel


def _pattern(kernel: Kernel, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> Any:
    """The shapes of arrays that a kernel may be called on as they are; None for what has to be looked at."""
    pattern: list[Any] = [kernel, len(inputs)]
    for value in inputs:
        # A number's value counts, too.
        if type(value) is not np.ndarray or not value.flags.c_contiguous or not (shape := value.shape):
            return None
        pattern += (value.dtype, shape)
    for value in outputs:
        if type(value) is not np.ndarray or not value.flags.carray or not (shape := value.shape):
            return None
        pattern += (value.dtype, shape)
    return tuple(pattern)


def _copied(memory: Any, array: np.ndarray) -> np.ndarray:
    made = memory.empty(array.shape, array.dtype)
    made[...] = array
    return made


def _as_read_only(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call on the values of its constants, and with views of its arrays that can't be written to."""
    def view(value: Any) -> Any:
        if type(value) is np.ndarray and value.flags.writeable:
            value = value.view()
            value.flags.writeable = False
        return value

    args, kwargs = with_values(args, kwargs)
    return tuple([view(value) for value in args]), {name: view(value) for name, value in kwargs.items()}


def _copied_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with copies of the arrays: a probe may still read them when they are the caller's again."""
    def copied(value: Any) -> Any:
        return value.copy() if type(value) is np.ndarray and value.flags.writeable else value

    args, kwargs = with_values(args, kwargs)
    return tuple([copied(value) for value in args]), {name: copied(value) for name, value in kwargs.items()}

"""`rfaas bench payload`: y = 2x from 1 KiB to 64 MiB, locally, between bare processes, and through the product.

    local        the rank's core computes
    bound        two bare processes: the partner computes on memory that both share
    registered   arrays in the executor's memory: nothing is copied
    plain        arrays of the application's own: one copy each way at most
    bound_plain  the two bare processes, where the caller copies x to the partner and y back
    copies       one copy of x and one of y within the rank: what plain may cost more than registered

Untouched: the same arrays again and again. Touched: the rank writes all of x before and reads all of y after each
invocation, and that is part of the time; what crosses between the two cores' caches shows only there.

A copy within the rank (`copies`) is not the copy that plain arrays need: what that one reads, or overwrites, the other
core has used last. `bound_plain` is measured where it really happens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from rfaas_mpi.bench import kernels, measure, raw
from rfaas_mpi.bench.measure import Subject
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, Stage, stage, timed_each
from rfaas_mpi.requests import PersistentRequest

SIZES = tuple(1 << shift for shift in range(10, 27, 2))
CYCLES = 5
# Large payloads: fewer than 200 in a block, so that neighbours are still neighbours in time.
BLOCK_NS = 60_000_000
LEAST = 3
WARM_UP = 3


def measure_payload(options: Options, sizes: tuple[int, ...] = SIZES) -> dict:
    """`rows`: one for each size, each figure untouched and touched, in µs.

    In a row `local_us` is of untouched arrays and `local_touched_us` of touched ones, and so for each way.
    """
    with stage(options, data_bytes=max(sizes)) as here:
        return {"rows": [_row(here, size) for size in sizes], "pinning": here.facts()}


class Bound:
    """Two bare processes: the partner doubles x into y."""

    def __init__(self, partner: raw.Partner, size: int) -> None:
        self.partner, self.size = partner, size
        self.x, self.y = (np.frombuffer(view, dtype=np.float64) for view in partner.buffers(size))

    def arm(self, count: int) -> None:
        self.partner.arm(raw.DOUBLE, WARM_UP + count, self.size)
        self.partner.calls(WARM_UP)

    def arm_copied(self, x: np.ndarray, y: np.ndarray, count: int) -> None:
        self.partner.arm(raw.DOUBLE, WARM_UP + count, self.size)
        self.partner.copied(x.ctypes.data, y.ctypes.data, WARM_UP)


def _row(here: Stage, size: int) -> dict:
    count = size // 8
    here.options.progress(f"payload of {size_text(size)}")
    values = np.arange(float(count))
    bound = Bound(here.partner, size)
    x, y = values.copy(), np.zeros(count)
    px, py = values.copy(), np.zeros(count)
    bx, by = values.copy(), np.zeros(count)
    rx, ry = here.executor.empty(count, np.float64), here.executor.empty(count, np.float64)
    copy_x, copy_y = np.zeros(count), np.zeros(count)
    for array in (bound.x, rx):
        array[:] = values
    local = partial(raw.library().rfm_bench_local, x.ctypes.data, y.ctypes.data, count)
    registered = here.executor.Invoke_init(kernels.native_double(), rx, ry)
    plain = here.executor.Invoke_init(kernels.native_double(), px, py)

    def call(request: PersistentRequest) -> Callable[[], None]:
        start, wait = request.Start, request.Wait

        def once() -> None:
            start()
            wait()
        return once

    def copies() -> None:
        np.copyto(copy_x, x)
        np.copyto(copy_y, y)

    ways = {"local": (local, x, y), "registered": (call(registered), rx, ry), "plain": (call(plain), px, py),
            "copies": (copies, x, y)}
    block = _block(here, local)
    figures: dict[str, dict] = {}
    for touch, kind in ((False, ""), (True, "_touched")):
        subjects = [
            _way("local", *ways["local"], touch=touch), _bare("bound", bound, touch=touch),
            _way("registered", *ways["registered"], touch=touch) if touch else _invoked("registered", registered),
            _way("plain", *ways["plain"], touch=touch) if touch else _invoked("plain", plain),
            _bare_copied("bound_plain", bound, bx, by, touch=touch),
            _way("copies", *ways["copies"], touch=touch), _bare("bound_again", bound, touch=touch),
            _bare_copied("bound_plain_again", bound, bx, by, touch=touch),
        ]
        runs = [measure.interleave(subjects, cycles=here.options.cycles(CYCLES), block=block, between=here.rest)
                for _ in range(here.options.runs)]
        for name in ("local", "bound", "registered", "plain", "bound_plain", "copies"):
            figures[f"{name}{kind}_us"] = measure.latency_figure(runs, name, unit="us", digits=2)
        figures[f"registered{kind}_over_bound"] = measure.ratio(runs, "registered", "bound", "bound_again")
        figures[f"plain{kind}_over_bound"] = measure.ratio(runs, "plain", "bound_plain", "bound_plain_again")
        wanted = 2.0 * x
        for name, got in (("local", y), ("bound", bound.y), ("registered", ry), ("plain", py),
                          ("bound_plain", by)):
            if not np.array_equal(got, wanted):
                raise BenchError(f"y is not 2x after {name} with {size} bytes; no time is worth anything then")
    registered.Free()
    plain.Free()
    return {"size_bytes": size, "block": block, **measure.flat(figures)}


def _block(here: Stage, local: Callable[[], object]) -> int:
    once = statistics.median(timed_each(local)(5))
    # Memory-bound work takes several times as long where caches are cold.
    count = int(min(measure.BLOCK, max(LEAST, BLOCK_NS / (3 * once))))
    return max(LEAST, count // 10) if here.options.quick else count


TOUCHED = 7.0


def _touched(call: Callable[[], object], x: np.ndarray, y: np.ndarray) -> Callable[[int], list[int]]:
    clock = time.perf_counter_ns

    def singles(count: int) -> list[int]:
        times = []
        for _ in range(count):
            start = clock()
            x.fill(TOUCHED)
            call()
            total = y.sum()
            times.append(clock() - start)
            if total != 2.0 * TOUCHED * len(y):
                raise BenchError(f"y sums up to {total}; no time is worth anything then")
        return times
    return singles


def _way(name: str, call: Callable[[], object], x: np.ndarray, y: np.ndarray, *, touch: bool) -> Subject:
    def prepare(_count: int) -> None:
        for _ in range(WARM_UP):
            call()

    return Subject(name, singles=_touched(call, x, y) if touch and name != "copies" else timed_each(call),
                   prepare=prepare)


def _invoked(name: str, request: PersistentRequest) -> Subject:
    """Start and Wait with nothing around them: at 1 KiB a frame in between is a tenth of the time."""
    start, wait, clock = request.Start, request.Wait, time.perf_counter_ns

    def prepare(_count: int) -> None:
        for _ in range(WARM_UP):
            start()
            wait()

    def singles(count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = clock()
            start()
            wait()
            times.append(clock() - begin)
        return times

    return Subject(name, singles=singles, prepare=prepare)


def _bare(name: str, bound: Bound, *, touch: bool) -> Subject:
    singles = _touched(bound.partner.call, bound.x, bound.y) if touch else bound.partner.samples
    return Subject(name, singles=singles, prepare=bound.arm)


def _bare_copied(name: str, bound: Bound, x: np.ndarray, y: np.ndarray, *, touch: bool) -> Subject:
    # Looked up once: that is Python's cost, not the bare processes'.
    copied = partial(bound.partner.copied, x.ctypes.data, y.ctypes.data)
    return Subject(name, singles=_touched(copied, x, y) if touch else copied, prepare=partial(bound.arm_copied, x, y))


def size_text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"

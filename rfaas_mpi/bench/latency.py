"""`rfaas bench latency`: one invocation at a time, beside two bare processes and beside a local call."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from rfaas_mpi import fabric
from rfaas_mpi.bench import kernels, measure, raw
from rfaas_mpi.bench.measure import Subject
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import WARM_UP, Options, Stage, stage, timed_each
from rfaas_mpi.requests import PersistentRequest

CYCLES = 100
IDLE_NS = 5_000_000
IDLE_CYCLES = 2


def measure_latency(options: Options) -> dict:
    """The figures of latency, in ns and µs as their names say."""
    with stage(options) as here:
        figures = {**_hot(here), **_python(here), **_objects(here), **_warm(here)}
        return {**measure.flat(figures), "pinning": here.facts()}


def _check(what: str, got: object, wanted: object) -> None:
    if not np.array_equal(got, wanted):
        raise BenchError(f"{what} gave {got}, not {wanted}; no figure is worth anything then")


def _copy_request(here: Stage, kernel: object, values: list[float]) -> tuple[PersistentRequest, np.ndarray, np.ndarray]:
    x, y = np.array(values), np.zeros(len(values))
    request = here.executor.Invoke_init(kernel, x, y)
    request.Start()
    request.Wait()
    _check(f"{kernel}", y, x)
    return request, x, y


def _calls(name: str, request: PersistentRequest) -> Subject:
    """Start and Wait of a persistent request, by a caller in Python."""
    start, wait, clock = request.Start, request.Wait, time.perf_counter_ns

    def prepare(_count: int) -> None:
        for _ in range(WARM_UP):
            start()
            wait()

    def block(count: int) -> int:
        begin = clock()
        for _ in range(count):
            start()
            wait()
        return clock() - begin

    def singles(count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = clock()
            start()
            wait()
            times.append(clock() - begin)
        return times

    return Subject(name, block, singles, prepare)


def _from_c(name: str, request: PersistentRequest) -> Subject:
    """The same request from a C loop; single ones are C loops of one."""
    bare = request._raw

    def prepare(_count: int) -> None:
        fabric.bench_roundtrips(bare, WARM_UP)

    return Subject(name, lambda count: fabric.bench_roundtrips(bare, count),
                   lambda count: [fabric.bench_roundtrips(bare, 1) for _ in range(count)], prepare)


def _hot(here: Stage) -> dict:
    request, x, y = _copy_request(here, kernels.native_copy(), [1.5])
    runs = here.runs("native kernel beside two bare processes", [
        here.bare("raw"), _from_c("native", request), _calls("native_call", request), here.bare("raw_again"),
    ], cycles=here.options.cycles(CYCLES))
    x[0] = -2.5
    request.Start()
    request.Wait()
    _check("the native kernel, after all runs,", y, x)
    request.Free()
    return {
        "raw_ns": measure.latency_figure(runs, "raw"),
        "native_ns": measure.latency_figure(runs, "native"),
        "native_call_ns": measure.latency_figure(runs, "native_call"),
        "native_over_raw_ns": measure.over(runs, "native", "raw", "raw_again"),
        "native_call_over_raw_ns": measure.over(runs, "native_call", "raw", "raw_again"),
    }


def _called(name: str, call: Callable[[], object]) -> Subject:
    """Whatever is called without arguments."""
    clock = time.perf_counter_ns

    def block(count: int) -> int:
        begin = clock()
        for _ in range(count):
            call()
        return clock() - begin

    def prepare(_count: int) -> None:
        block(WARM_UP)

    return Subject(name, block, timed_each(call), prepare)


def _local_copy(name: str, function: Callable, x: np.ndarray, out: np.ndarray) -> Subject:
    """The function called in place, with no frame of ours around it that the remote side does not have."""
    clock = time.perf_counter_ns

    def block(count: int) -> int:
        begin = clock()
        for _ in range(count):
            function(x, out=out)
        return clock() - begin

    def singles(count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = clock()
            function(x, out=out)
            times.append(clock() - begin)
        return times

    def prepare(_count: int) -> None:
        block(WARM_UP)

    return Subject(name, block, singles, prepare)


def _python(here: Stage) -> dict:
    request, x, y = _copy_request(here, kernels.python_copy, [1.5])
    local_out = np.zeros_like(y)
    # The function itself: a kernel's own __call__ would make the local side look slower.
    function = kernels.python_copy.__wrapped__
    runs = here.runs("Python kernel beside a local call", [
        _local_copy("local", function, x, local_out), _calls("python", request),
        _local_copy("local_again", function, x, local_out),
    ], cycles=here.options.cycles(CYCLES))
    _check("the Python kernel called locally", local_out, x)
    request.Free()
    return {
        "local_ns": measure.latency_figure(runs, "local"),
        "python_ns": measure.latency_figure(runs, "python"),
        "python_over_local_ns": measure.over(runs, "python", "local", "local_again"),
    }


def _objects(here: Stage) -> dict:
    submit = here.executor.submit
    values = np.arange(8.0)
    _check("add(2, 3)", submit(kernels.add, 2, 3).result(), 5)
    _check("double_array", submit(kernels.double_array, values).result(), 2.0 * values)
    runs = here.runs("object kernels", [
        _called("ints", lambda: submit(kernels.add, 2, 3).result()),
        _called("array", lambda: submit(kernels.double_array, values).result()),
    ], cycles=here.options.cycles(CYCLES // 4))
    return {"object_us": measure.latency_figure(runs, "ints", unit="us", digits=2),
            "object_array_us": measure.latency_figure(runs, "array", unit="us", digits=2)}


def _warm(here: Stage) -> dict:
    """Both after 5 ms without an invocation, in which the caller computes; the callee sleeps in a futex."""
    request, _, _ = _copy_request(here, kernels.native_copy(), [1.5])
    bare = request._raw
    partner = here.partner

    def warm(count: int) -> list[int]:
        times = []
        for _ in range(count):
            raw.busy(IDLE_NS)
            times.append(fabric.bench_roundtrips(bare, 1))
        return times

    def futex(count: int) -> list[int]:
        times = []
        for _ in range(count):
            raw.busy(IDLE_NS)
            times.append(partner.call())
        return times

    def arm(count: int) -> None:
        partner.arm(raw.FUTEX, count)

    block = measure.BLOCK // 10 if here.options.quick else measure.BLOCK
    runs = here.runs("warm worker beside a futex", [
        Subject("futex", singles=futex, prepare=arm), Subject("warm", singles=warm),
        Subject("futex_again", singles=futex, prepare=arm),
    ], cycles=IDLE_CYCLES, block=block)
    request.Free()
    return {"warm_us": measure.latency_figure(runs, "warm", unit="us", digits=2),
            "futex_us": measure.latency_figure(runs, "futex", unit="us", digits=2),
            "warm_over_futex": measure.ratio(runs, "warm", "futex", "futex_again")}

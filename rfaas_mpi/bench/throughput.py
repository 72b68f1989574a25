"""`rfaas bench throughput`: invocations per second with many in flight, on one worker."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from rfaas_mpi import fabric
from rfaas_mpi.bench import kernels, measure
from rfaas_mpi.bench.measure import Subject
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, Stage, stage
from rfaas_mpi.requests import PersistentRequest, Startall, Waitall

CYCLES = 50


def measure_throughput(options: Options) -> dict:
    """Rates in 1/s; a block is 200 invocations that were all started before the first is waited for."""
    with stage(options) as here:
        native = _requests(here, kernels.native_copy())
        python = _requests(here, kernels.python_copy)
        subjects = [
            _from_c("native_c", native), _started("native", native), _started("python", python),
            _submitted("object", here),
            # Each a second time: how far apart two measurements of the same are.
            _from_c("native_c_again", native), _started("native_again", native), _started("python_again", python),
            _submitted("object_again", here),
        ]
        runs = here.runs("throughput", subjects, cycles=options.cycles(CYCLES))
        for requests in (native, python):
            _verify(requests)
        figures = {}
        for name in ("native_c", "native", "python", "object"):
            again = measure.rate_figure(runs, f"{name}_again")
            figures[f"{name}_per_s"] = {**measure.rate_figure(runs, name), "aa": again}
        return {**measure.flat(figures), "pinning": here.facts()}


def _requests(here: Stage, kernel: object) -> list[PersistentRequest]:
    """A block's worth of persistent requests, each with arrays of its own."""
    requests = []
    for number in range(measure.BLOCK):
        requests.append(here.executor.Invoke_init(kernel, np.array([float(number)]), np.zeros(1)))
    Startall(requests)
    Waitall(requests)
    _verify(requests)
    return requests


def _verify(requests: list[PersistentRequest]) -> None:
    for number, request in enumerate(requests):
        if request.out[0] != float(number):
            raise BenchError(f"invocation {number} gave {request.out[0]}; no rate is worth anything then")


def _timed(call: Callable[[int], None]) -> Callable[[int], int]:
    def block(count: int) -> int:
        begin = time.perf_counter_ns()
        call(count)
        return time.perf_counter_ns() - begin
    return block


def _from_c(name: str, requests: list[PersistentRequest]) -> Subject:
    bare = [request._raw for request in requests]

    def block(count: int) -> int:
        return fabric.bench_throughput(bare, count)

    return Subject(name, block, prepare=lambda count: _ignore(block(count)))


def _started(name: str, requests: list[PersistentRequest]) -> Subject:
    def call(count: int) -> None:
        Startall(requests[:count])
        Waitall(requests[:count])

    return Subject(name, _timed(call), prepare=call)


def _submitted(name: str, here: Stage) -> Subject:
    submit, add = here.executor.submit, kernels.add

    def call(count: int) -> None:
        futures = [submit(add, number, 1) for number in range(count)]
        if [future.result() for future in futures] != list(range(1, count + 1)):
            raise BenchError("an object kernel gave a wrong sum; no rate is worth anything then")

    return Subject(name, _timed(call), prepare=call)


def _ignore(_value: object) -> None:
    """What a warm-up returns is not measured."""

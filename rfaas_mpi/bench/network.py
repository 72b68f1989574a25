"""`rfaas bench latency|payload --transport tcp|verbs`: the product beside two bare processes that send the same bytes.

Through the loopback device or one RDMA device of one node, the rank and both partners pinned as everywhere here. Bare
and product alternate in one run, block by block; a ratio is taken of two blocks of one cycle. A message of the bare
processes has as many bytes as the product's: over tcp a stream's head, a slot's line, and the data with its descriptor,
over verbs the line, and the data in writes of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache

import numpy as np

from rfaas_mpi import fabric
from rfaas_mpi.bench import environment, kernels, measure, raw
from rfaas_mpi.bench.bare import BarePair, Exchange, VerbsPair
from rfaas_mpi.bench.measure import Subject
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import WARM_UP, Options, Stage, check_quiet
from rfaas_mpi.config import Settings
from rfaas_mpi.config import environment as environment_of_this_process
from rfaas_mpi.executor import Executor
from rfaas_mpi.kernels import Kernel
from rfaas_mpi.requests import PersistentRequest
from rfaas_mpi.session import Session

CYCLES = 100
SIZES = (1 << 20, 16 << 20)
# Small invocations in flight, and how many of them are a block: a stream's beginning doesn't count.
IN_FLIGHT = 64
PIPELINED_BLOCK = 4000
# So many invocations are in flight where data streams: while one is received, one is on its way.
WINDOW = 4
# Of a block of a stream: long enough that its beginning and end don't count, where that takes no longer than BLOCK_S.
BLOCK_BYTES = 64 << 20
BLOCK_S = 0.5
STREAM_CYCLES = 7
# Messages of a bare stream that are sent before it waits for the last answer.
BURST = 64


# --- the stage ------------------------------------------------------------------------------------

@contextmanager
def _environ(name: str, value: str) -> Iterator[None]:
    before = environment_of_this_process().get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _bare_pair(transport: str, data_bytes: int) -> BarePair:
    if transport == "verbs":
        return VerbsPair(device=Settings.load().device, data_bytes=data_bytes)
    return BarePair(data_bytes=data_bytes)


@contextmanager
def stage(options: Options, *, data_bytes: int = 0, spin_us: int | None = None) -> Iterator[tuple[Stage, BarePair]]:
    """The rank on one core; a worker of this node's service, reached over the network, and the bare partner on another.

    `spin_us`: how long both sides look before they sleep. BenchError where no core can be borrowed: there is nothing
    to measure then.
    """
    with ExitStack() as stack:
        if spin_us is not None:
            stack.enter_context(_environ("RFAAS_SPIN_US", str(spin_us)))  # a worker has it from its rank's environment
        cores = stack.enter_context(environment.pinned(options.core))
        # Forked before the executor: its connections are not the partner's to inherit.
        partner = stack.enter_context(raw.Partner())
        # Held, so that the service doesn't leave before the executor comes.
        session = stack.enter_context(Session.open(Settings.load()))
        if options.transport == "tcp":
            session.open_door(["127.0.0.1:0"])
        # Behind whatever starts a service: nothing forks once a device is open.
        bare = stack.enter_context(_bare_pair(options.transport, data_bytes))
        executor = stack.enter_context(Executor(workers=1, transport=options.transport))
        worker_pid = executor.submit(os.getpid).result()
        if worker_pid == os.getpid():
            raise BenchError("no core could be borrowed, so every invocation would run on the rank",
                             hint="`rfaas doctor` says why")
        worker_cores = tuple(sorted(executor.submit(os.sched_getaffinity, 0).result()))
        if cores.rank in worker_cores:
            raise BenchError(f"the worker shares core {cores.rank} with the rank", hint="`rfaas doctor` says why")
        os.sched_setaffinity(bare.pid, set(worker_cores))
        spin_s = Settings.load(transport=options.transport).spin_us * 1e-6
        yield Stage(options, executor, partner, cores.rank, worker_cores, worker_pid, spin_s), bare


def _bare(name: str, pair: BarePair, exchange: Exchange, *, singles: bool = True) -> Subject:
    def prepare(count: int) -> None:
        warm_up = WARM_UP if singles else 1
        pair.arm(exchange, warm_up + count)
        pair.calls(warm_up)

    return Subject(name, pair.calls, pair.samples if singles else None, prepare)


def _invocations(name: str, request: PersistentRequest, *, singles: bool = True) -> Subject:
    """Start and wait from a C loop; single ones are C loops of one."""
    inner = request._raw

    def prepare(_count: int) -> None:
        fabric.bench_roundtrips(inner, WARM_UP)

    def one_by_one(count: int) -> list[int]:
        return [fabric.bench_roundtrips(inner, 1) for _ in range(count)]

    return Subject(name, lambda count: fabric.bench_roundtrips(inner, count), one_by_one if singles else None, prepare)


def _small_request(here: Stage) -> PersistentRequest:
    x, y = np.array([1.5]), np.zeros(1)
    request = here.executor.Invoke_init(kernels.native_copy(), x, y)
    request.Start()
    request.Wait()
    _check("the native kernel", y, x)
    return request


def _check(what: str, got: object, wanted: object) -> None:
    if not np.array_equal(got, wanted):
        raise BenchError(f"{what} gave {got}, not {wanted}; no figure is worth anything then")


# --- latency -----------------------------------------------------------------------------------------

def measure_network_latency(options: Options) -> dict:
    """The figures of 8 bytes each way: hot, with both sides asleep before each message, and many in flight."""
    check_quiet(options.progress)
    name = options.transport
    with stage(options) as (here, pair):
        figures = {**_hot(name, here, pair), **_pipelined(name, here, pair)}
        pinning = here.facts()
    with stage(options, spin_us=0) as (here, pair):
        figures |= _asleep(name, here, pair)
    return {**_flat(name, figures), "pinning": pinning}


def _flat(name: str, figures: dict[str, dict]) -> dict:
    """The figures, and the A/A of the first ratio under a name of its own."""
    return {**measure.flat(figures), f"{name}_aa": figures[f"{name}_over_raw"]["aa"]["p50"]}


def _hot(name: str, here: Stage, pair: BarePair) -> dict:
    request = _small_request(here)
    exchange = Exchange()
    runs = here.runs(f"{name} beside bare processes", [
        _bare("raw", pair, exchange), _invocations("product", request), _bare("raw_again", pair, exchange),
    ], cycles=here.options.cycles(CYCLES))
    request.Free()
    return {f"{name}_raw_us": measure.latency_figure(runs, "raw", unit="us", digits=2),
            f"{name}_latency_us": measure.latency_figure(runs, "product", unit="us", digits=2),
            f"{name}_over_raw": measure.ratio(runs, "product", "raw", "raw_again")}


def _asleep(name: str, here: Stage, pair: BarePair) -> dict:
    """Nobody spins: both sides sleep until a message is there, and so do the bare ones, in recv()."""
    request = _small_request(here)
    exchange = Exchange(sleep=True)
    runs = here.runs(f"{name} beside bare processes, asleep", [
        _bare("raw", pair, exchange), _invocations("product", request), _bare("raw_again", pair, exchange),
    ], cycles=here.options.cycles(CYCLES // 4))
    request.Free()
    return {f"{name}_warm_raw_us": measure.latency_figure(runs, "raw", unit="us", digits=2),
            f"{name}_warm_us": measure.latency_figure(runs, "product", unit="us", digits=2),
            f"{name}_warm_over_raw": measure.ratio(runs, "product", "raw", "raw_again")}


def _pipelined(name: str, here: Stage, pair: BarePair) -> dict:
    """IN_FLIGHT requests, each started again as soon as it has ended, beside one after another; and what bare processes
    gain when they send IN_FLIGHT messages before they wait for the last answer."""
    requests = [_small_request(here) for _ in range(IN_FLIGHT)]
    inner = [request._raw for request in requests]

    def stream(label: str) -> Subject:
        return Subject(label, lambda count: fabric.bench_throughput(inner, count),
                       prepare=lambda count: _ignore(fabric.bench_throughput(inner, count)))

    runs = here.runs(f"{name}, {IN_FLIGHT} in flight", [
        stream("pipelined"), _invocations("sequential", requests[0], singles=False), stream("pipelined_again"),
        _stream("raw_pipelined", pair, Exchange(burst=IN_FLIGHT)), _bare("raw", pair, Exchange(), singles=False),
    ], cycles=here.options.cycles(CYCLES // 4), block=PIPELINED_BLOCK - PIPELINED_BLOCK % IN_FLIGHT)
    for request in requests:
        request.Free()
    again = measure.rate_figure(runs, "pipelined_again")
    return {f"{name}_per_s": {**measure.rate_figure(runs, "pipelined"), "aa": again},
            f"{name}_pipelined_over_sequential": _times_as_fast(runs, "pipelined", "sequential", "pipelined",
                                                                "pipelined_again"),
            f"{name}_raw_pipelined_over_sequential": {key: value for key, value in measure.ratio(
                runs, "raw", "raw_pipelined", "raw_pipelined").items() if key != "aa"}}


def _times_as_fast(runs: list[measure.Run], fast: str, slow: str, base: str, again: str) -> dict:
    """How many times as fast `fast` is as `slow`, block by block of the same cycle; A/A of `base` and `again`."""
    together = measure.ratio(runs, slow, fast, slow)
    return {**together, "aa": measure.ratio(runs, base, base, again)["aa"]}


def _ignore(_value: object) -> None:
    """What a warm-up returns is not measured."""


# --- payload -----------------------------------------------------------------------------------------

@cache
def _swallow() -> Kernel:
    """Takes its input and gives 8 bytes back."""
    return Kernel.from_library(raw.LIBRARY, "rfm_net_swallow")


@cache
def _yield() -> Kernel:
    """Takes 8 bytes and gives its output."""
    return Kernel.from_library(raw.LIBRARY, "rfm_net_yield")


def measure_network_payload(options: Options, sizes: tuple[int, ...] = SIZES) -> dict:
    """Bandwidth each way, beside bare processes through which the same bytes stream.

    Up: a kernel that takes its input and gives 8 bytes back. Down: one that takes 8 bytes and gives its output. WINDOW
    of them are in flight, in arrays of the executor. `…_bandwidth_over_raw_…` is the worse one of the two ways.
    `…_alone_…`: the same, one at a time, and how much longer than bare it takes.
    """
    check_quiet(options.progress)
    name = options.transport
    with stage(options, data_bytes=WINDOW * max(sizes)) as (here, pair):
        figures: dict[str, dict] = {}
        for size in sizes:
            figures |= _streams(name, here, pair, size)
        return {**measure.flat(figures), "pinning": here.facts()}


def _streams(name: str, here: Stage, pair: BarePair, size: int) -> dict:
    text = f"{size >> 20}MiB" if size >= 1 << 20 else f"{size >> 10}KiB"
    count = _stream_block(pair, size)
    burst = min(count, BURST)
    figures: dict[str, dict] = {}
    for way in ("up", "down"):
        stream, alone = (Exchange(**{way: size}, burst=burst, places=WINDOW), Exchange(**{way: size}))
        requests = [_large_request(here, way, size) for _ in range(WINDOW)]
        runs = here.runs(f"{name}, {text} {way}", [
            _stream("raw", pair, stream), _streamed("product", requests), _stream("raw_again", pair, stream),
        ], cycles=here.options.cycles(STREAM_CYCLES), block=count)
        figures[f"{name}_{way}_raw_MB_s_{text}"] = _bandwidth(runs, "raw", size)
        figures[f"{name}_{way}_MB_s_{text}"] = _bandwidth(runs, "product", size)
        figures[f"{name}_{way}_over_raw_{text}"] = _times_as_fast(runs, "product", "raw", "raw", "raw_again")
        runs = here.runs(f"{name}, {text} {way}, one at a time", [
            _stream("raw", pair, alone), _streamed("product", requests[:1]), _stream("raw_again", pair, alone),
        ], cycles=here.options.cycles(STREAM_CYCLES), block=count // 2)
        figures[f"{name}_{way}_alone_us_{text}"] = measure.latency_figure(runs, "product", unit="us")
        figures[f"{name}_{way}_alone_over_raw_{text}"] = measure.ratio(runs, "product", "raw", "raw_again")
        for request in requests:
            request.Free()
    figures[f"{name}_bandwidth_over_raw_{text}"] = min(
        (figures[f"{name}_{way}_over_raw_{text}"] for way in ("up", "down")), key=lambda value: value["p50"])
    return figures


def _stream_block(pair: BarePair, size: int) -> int:
    """So many messages are a block: as many whole bursts as BLOCK_BYTES, fewer where those would take too long."""
    one = Exchange(up=size)
    pair.arm(one, 2)
    pair.calls(1)
    in_time = int(BLOCK_S * 1e9 / max(1, pair.calls(1)))
    count = max(2 * WINDOW, min(measure.BLOCK, BLOCK_BYTES // size, in_time))
    return count - count % min(count, BURST)


def _bandwidth(runs: list[measure.Run], name: str, size: int) -> dict:
    """MB/s (10^6) by block; p99 is what 99 % of the blocks reach."""
    found = measure.rate_figure(runs, name)
    return {"p50": round(found["p50"] * size / 1e6), "p99": round(found["p99"] * size / 1e6), "count": found["count"],
            "unit": "MB/s"}


def _large_request(here: Stage, way: str, size: int) -> PersistentRequest:
    x = here.executor.empty(size if way == "up" else 8, np.uint8)
    y = here.executor.empty(size if way == "down" else 8, np.uint8)
    x[:8] = np.frombuffer(np.array([size], dtype=np.uint64).tobytes(), dtype=np.uint8)
    if way == "up":
        x[8:] = 7
        small_y = np.zeros(8, np.uint8)
        request = here.executor.Invoke_init(_swallow(), x, small_y)
        y = small_y
    else:
        request = here.executor.Invoke_init(_yield(), x[:8].copy(), y)
    y[:] = 0
    request.Start()
    request.Wait()
    _check(f"{size} bytes {way}", y[:8], x[:8])
    return request


def _stream(name: str, pair: BarePair, exchange: Exchange) -> Subject:
    def prepare(count: int) -> None:
        pair.arm(replace(exchange, burst=min(exchange.burst, WINDOW)), 1)
        pair.calls(1)
        pair.arm(exchange, count // exchange.burst)

    return Subject(name, lambda count: pair.calls(count // exchange.burst), prepare=prepare)


def _streamed(name: str, requests: list[PersistentRequest]) -> Subject:
    inner = [request._raw for request in requests]

    def prepare(_count: int) -> None:
        _ignore(fabric.bench_throughput(inner, len(inner)))

    return Subject(name, lambda count: fabric.bench_throughput(inner, count), prepare=prepare)

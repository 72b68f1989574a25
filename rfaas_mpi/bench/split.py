"""`rfaas bench split`: what `Executor.Split` costs beside the same kernel called once, and whether its predictions hold.

Kernels of 1, 4.5 and 20 ms, in C and in numpy, whose time is all computing. They alternate run by run with

    here      run by the rank alone          beside the kernel called once, bare
    divided   as the planner says            beside halves by hand: one request, and the other half here
    once      `Split`, which keeps nothing   beside `Split_init`, set up before
    together  with rowwise=True              beside the kernel called once, bare, and beside halves by hand

`predicted` is what the planner said before each run over what it then took.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from rfaas_mpi.bench import environment, kernels, measure
from rfaas_mpi.bench.measure import Subject
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, check_quiet
from rfaas_mpi.errors import ConfigError
from rfaas_mpi.executor import Executor
from rfaas_mpi.kernels import Kernel

__all__ = ["measure_split"]

SIZES_MS = (1.0, 4.5, 20.0)
ROWS = 20_000
PAIRS = 40                       # of each run
WARM_UP = 12
# What a split may take longer than the kernel itself: so much, and a part of the kernel.
ALLOWED_US, ALLOWED_PART = 5.0, 0.01


def measure_split(options: Options) -> dict:
    """Figures by kernel and size; BenchError where no core can be borrowed, ConfigError for verbs."""
    check_quiet(options.progress)
    figures: dict[str, dict] = {}
    with _executor(options) as executor:
        for kernel in (kernels.native_iterate(), kernels.numpy_iterate):
            for size_ms in SIZES_MS:
                figures |= _measured(options, executor, kernel, size_ms)
    return {**measure.flat(figures), "over": "namespaces" if options.namespaces else options.transport,
            "rows_of_a_split": ROWS, "allowed": {"us": ALLOWED_US, "part": ALLOWED_PART}}


@contextlib.contextmanager
def _executor(options: Options) -> Iterator[Executor]:
    """With one worker, on another core than the rank's."""
    with contextlib.ExitStack() as stack:
        if options.transport == "shm":
            stack.enter_context(environment.pinned(options.core))
            executor = stack.enter_context(Executor(workers=1, transport="shm", fallback=False))
        elif options.transport == "tcp":
            executor = _over_tcp(options, stack)
        else:
            raise ConfigError(f"splits over {options.transport} are not measured", hint="--transport shm or tcp")
        if not executor.workers:
            raise BenchError("no core could be borrowed, so there is nobody to divide with",
                             hint="`rfaas doctor` says why")
        yield executor


def _over_tcp(options: Options, stack: contextlib.ExitStack) -> Executor:
    try:
        from rfaas_mpi.bench.cluster import Cluster
        from rfaas_mpi.bench.namespaces import other_node
    except ImportError as error:
        raise ConfigError(f"a cluster needs {error.name}", hint="pip install 'rfaas_mpi[cluster]'") from None
    directory = Path(tempfile.mkdtemp(prefix="rfaas-b-"))
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    place = stack.enter_context(other_node(wanted=options.namespaces))
    cores = stack.enter_context(environment.pinned(options.core))
    lent = max(core for core in cores.allowed if core != cores.rank)
    cluster = Cluster(directory, place, rank_core=cores.rank, lent=lent, allowed=cores.allowed)
    stack.callback(cluster.close)
    settings = cluster.settings
    return stack.enter_context(Executor(workers=1, fallback=False, transport="tcp", manager=settings.manager,
                                        manager_user=settings.manager_user))


# ---- one kernel of one size ------------------------------------------------------------------------

def _measured(options: Options, executor: Executor, kernel: Kernel, size_ms: float) -> dict[str, dict]:
    name = f"{'numpy' if kernel.fn else 'native'}_{size_ms:g}ms"
    x, out, divided, once, halves, joined = (executor.array(np.linspace(-1.0, 1.0, ROWS)) for _ in range(6))
    rounds = executor.put(np.array([_rounds(kernel, x, out, size_ms)], np.uint64))
    bare = kernel.bind([x, rounds.array], [out])
    middle = ROWS // 2
    near = kernel.bind([x[:middle], rounds.array], [halves[:middle]])
    with contextlib.ExitStack() as stack:
        far = executor.Invoke_init(kernel, (x[middle:], rounds), halves[middle:])
        stack.callback(far.Free)
        here = executor.Split_init(kernel, (x, rounds), out, where="here")
        stack.callback(here.Free)
        both = executor.Split_init(kernel, (x, rounds), divided)
        stack.callback(both.Free)

        together = executor.Split_init(kernel, (x, rounds), joined, rowwise=True)
        stack.callback(together.Free)

        def by_hand() -> None:
            far.Start()
            near()
            far.Wait()

        ratios: list[float] = []

        def predicted(count: int) -> list[int]:
            said = both.predict().predicted_s
            took = _timed(both.Run)(count)
            if said is not None:
                ratios.append(said * 1e9 / took[0])
            return took

        subjects = [
            Subject("bare", singles=_timed(bare)), Subject("here", singles=_timed(here.Run)),
            Subject("by_hand", singles=_timed(by_hand)), Subject("divided", singles=predicted),
            Subject("once", singles=_timed(lambda: executor.Split(kernel, (x, rounds), once))),
            Subject("together", singles=_timed(together.Run)),
            Subject("bare_again", singles=_timed(bare)), Subject("by_hand_again", singles=_timed(by_hand)),
            Subject("divided_again", singles=predicted),
        ]
        for _ in range(WARM_UP):
            for subject in subjects:
                assert subject.singles is not None
                subject.singles(1)
        ratios.clear()
        runs = []
        for number in range(1, options.runs + 1):
            options.progress(f"{name}: run {number} of {options.runs}")
            runs.append(measure.interleave(subjects, cycles=options.cycles(PAIRS), block=1))
        found = both.predict()
    bare()
    for what, array in (("divided", divided), ("in one call", once), ("by hand", halves),
                        ("in fewer calls", joined)):
        if not np.array_equal(array, out):
            raise BenchError(f"{name} {what} gave another result than here; no figure is worth anything then")
    bare_figure = measure.latency_figure(runs, "bare", unit="us")
    allowed = round(ALLOWED_US + ALLOWED_PART * bare_figure["p50"], 1)
    return {
        f"{name}_bare_us": bare_figure,
        f"{name}_here_over_bare_us": {
            **measure.over(runs, "here", "bare", "bare_again", unit="us"), "allowed": allowed},
        f"{name}_divided_us": {**measure.latency_figure(runs, "divided", unit="us"), "said": str(found)},
        f"{name}_divided_over_by_hand_us": {
            **measure.over(runs, "divided", "by_hand", "by_hand_again", unit="us"), "allowed": allowed},
        f"{name}_divided_over_bare": measure.ratio(runs, "divided", "bare", "bare_again"),
        f"{name}_by_hand_over_bare": measure.ratio(runs, "by_hand", "bare", "bare_again"),
        f"{name}_together_over_by_hand_us": measure.over(runs, "together", "by_hand", "by_hand_again", unit="us"),
        f"{name}_together_over_bare": measure.ratio(runs, "together", "bare", "bare_again"),
        f"{name}_once_over_divided_us": measure.over(runs, "once", "divided", "divided_again", unit="us"),
        f"{name}_predicted_over_taken": measure.figure(ratios, unit="x", digits=3),
    }


def _timed(call: Callable[[], object]) -> Callable[[int], list[int]]:
    clock = time.perf_counter_ns

    def singles(count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = clock()
            call()
            times.append(clock() - begin)
        return times
    return singles


def _rounds(kernel: Kernel, x: np.ndarray, out: np.ndarray, size_ms: float) -> int:
    """So many that the kernel takes that long here, about."""
    rounds = 1
    while True:
        call = kernel.bind([x, np.array([rounds], np.uint64)], [out])
        took_ms = min(_timed(call)(5)) * 1e-6
        if took_ms >= size_ms / 2:
            return max(1, round(rounds * size_ms / took_ms))
        rounds *= 2

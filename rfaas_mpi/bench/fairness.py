"""`rfaas bench fairness`: the kernel time that workers serve to each of the ranks that share them.

Ranks of one communicator, each a process of its own with its share of the workers, keep as many invocations in
flight as each other, all the time. Time is cut into windows, in which each rank adds up how long its kernels ran:

    rank 0  ████ 120 ms │ 119 ms │ …      spread of a window = (most - least) / mean
    rank 1  ████ 121 ms │ 120 ms │ …

With `equal` demand all call the same kernel; with `mixed` demand the kernel of one rank at each worker takes four times
as long, and the queues are as full. Two ranks share a worker then, as those of a communicator do; `together` is equal
demand of ranks all of which use both workers. What two workers get of their cores may differ, where somebody else uses
these, too (ranks do, if they have no others): `same_worker` compares ranks of one worker alone. The A/A rows compare
each rank with itself: in windows that follow one another, and odd windows with even ones.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rfaas_mpi.bench import measure
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, check_quiet
from rfaas_mpi.executor import Executor
from rfaas_mpi.kernels import Kernel
from rfaas_mpi.mpi import parts
from rfaas_mpi.requests import Waitany

__all__ = ["DEMANDS", "measure_fairness", "spreads"]

RANKS = 4
WORKERS = 2
DEPTH = 8
WINDOWS = 40
WINDOW_S = 0.25
BEGIN_S = 1.0                        # all ranks are at it by then
GUARD_S = 60.0
SHORT = 5000                         # options: some 500 µs
LONG = 20000
# The ranks of one half use one worker, those of the other half the other one.
DEMANDS: dict[str, tuple[int, ...]] = {"equal": (SHORT,) * RANKS, "mixed": (SHORT, SHORT, LONG, LONG),
                                      "together": (SHORT,) * RANKS}
LIBRARY = Path(__file__).parents[1] / "_native_kernels.so"


# --- one rank -----------------------------------------------------------------------

def _rank() -> None:
    """A rank, in a process of its own: what it is to do comes on its stdin, what it saw goes to stdout."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    task: dict[str, Any] = pickle.load(stdin)
    n = task["options"]
    kernel = Kernel.from_library(str(LIBRARY), "rfm_black_scholes")
    with Executor._join(task["grant"], **task["settings"]) as ex:
        inputs = ex.array(np.full((5, n), 0.5)), ex.array(np.zeros(n, np.uint8))
        requests = [ex.Invoke_init(kernel, inputs, ex.empty(n)) for _ in range(DEPTH)]
        for request in requests:
            request.Start()
            request.Wait()
        pickle.dump("ready", stdout)
        stdout.flush()
        begin: int = pickle.load(stdin)
        served, windows, window_ns = [0] * task["windows"], task["windows"], int(task["window_s"] * 1e9)
        for request in requests:
            request.Start()
        while True:
            number = Waitany(requests)
            at = (time.monotonic_ns() - begin) // window_ns
            if at >= windows:
                break
            if at >= 0:
                served[at] += requests[number].exec_ns
            requests[number].Start()
        pickle.dump(served, stdout)
        stdout.flush()
        # The others' last windows are not over yet.
        stdin.read()


@contextmanager
def _ranks(tasks: Sequence[dict[str, Any]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen([sys.executable, "-c", f"from {__name__} import _rank; _rank()"],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in tasks]
    try:
        for process, task in zip(processes, tasks, strict=True):
            _tell(process, task)
        yield processes
    finally:
        for process in processes:
            assert process.stdin is not None
            try:
                process.stdin.close()
                process.wait(GUARD_S)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _tell(process: subprocess.Popen[bytes], what: object) -> None:
    assert process.stdin is not None
    try:
        pickle.dump(what, process.stdin)
        process.stdin.flush()
    except BrokenPipeError:
        raise BenchError("a rank ended before it was told what to do") from None


def _hear(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    try:
        return pickle.load(process.stdout)
    except EOFError:
        raise BenchError(f"a rank ended with status {process.wait(GUARD_S)} before it had said what it saw") from None


# --- all of them --------------------------------------------------------------------

def measure_fairness(options: Options, *, windows: int = WINDOWS, window_s: float = WINDOW_S) -> dict:
    """The spread of kernel time between ranks, in % of their mean, by window; each rank's share in all.

    BenchError where fewer workers than wanted can be had, or a rank ends early.
    """
    check_quiet(options.progress)
    windows = options.cycles(windows)
    directory = Path(tempfile.mkdtemp(prefix="rfaas-b-"))
    settings: dict[str, Any] = {"runtime_dir": str(directory), "fallback": False, "linger_s": 0.1, "spin_us": 0}
    figures: dict[str, dict] = {}
    rows: dict[str, Any] = {}
    try:
        # Ranks run where the system puts them: there may be more of them than cores.
        lent = sorted(os.sched_getaffinity(0))[-WORKERS:]
        with Executor(workers=(0, WORKERS), cores=tuple(lent), **settings) as lender:
            if len(lender.workers) < WORKERS:
                raise BenchError(f"{len(lender.workers)} workers can be had here, and {WORKERS} are to be shared")
            grant = lender._grant
            shares = parts(grant, RANKS)
            for demand, sizes in DEMANDS.items():
                if options.of and demand not in options.of:
                    continue
                options.progress(f"{demand} demand of {RANKS} ranks on {WORKERS} workers")
                given = [grant] * RANKS if demand == "together" else shares
                served = _serve([{"grant": share, "options": n, "settings": settings, "windows": windows,
                                  "window_s": window_s} for share, n in zip(given, sizes, strict=True)])
                groups: dict[tuple[int, ...], list[int]] = {}
                for rank, share in enumerate(given):
                    groups.setdefault(tuple(worker.number for worker in share.workers), []).append(rank)
                figures |= {f"{demand}_{name}_percent": value
                            for name, value in spreads(served, list(groups.values())).items()}
                totals = [sum(mine) for mine in served]
                rows[demand] = {"served_ms": [[round(ns / 1e6, 3) for ns in mine] for mine in served],
                                "share_percent": [round(100 * total / sum(totals), 2) for total in totals]}
        return {**measure.flat(figures), "demands": rows, "ranks": RANKS, "workers": WORKERS, "depth": DEPTH,
                "windows": windows, "window_s": window_s, "pinning": {"lent": lent}}
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _serve(tasks: Sequence[dict[str, Any]]) -> list[list[int]]:
    """ns of kernels by rank and window."""
    with _ranks(tasks) as processes:
        for process in processes:
            _hear(process)
        begin = time.monotonic_ns() + int(BEGIN_S * 1e9)
        for process in processes:
            _tell(process, begin)
        return [_hear(process) for process in processes]


def spreads(served: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> dict[str, dict]:
    """Figures of the kernel time by rank and window, in % of a mean; `groups` are ranks that share workers.

    `spread`: most less least of all ranks, over all windows; `same_worker_spread`: in that group where it is
    largest; `window_spread`: of all ranks, in each window. `aa` is of each rank against itself.

    BenchError where nothing at all was served in a window.
    """
    if not all(sum(mine) for mine in zip(*served, strict=True)):
        raise BenchError("there is a window in which no kernel ran to its end")
    totals = [sum(mine) for mine in served]
    halves = _figure([max(_spread([sum(mine[::2]), sum(mine[1::2])]) for mine in served)])
    neighbours = _figure([_spread(pair) for mine in served for pair in zip(mine, mine[1:], strict=False) if any(pair)])
    return {"spread": _figure([_spread(totals)], aa=halves),
            "same_worker_spread": _figure([max(_spread([totals[rank] for rank in group]) for group in groups)],
                                          aa=halves),
            "window_spread": _figure([_spread(mine) for mine in zip(*served, strict=True)], aa=neighbours)}


def _figure(values: Sequence[float], **more: object) -> dict:
    return measure.figure(values, unit="%", digits=2, **more)


def _spread(values: Sequence[int]) -> float:
    return 100 * (max(values) - min(values)) * len(values) / max(1, sum(values))

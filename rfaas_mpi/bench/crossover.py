"""`rfaas bench crossover`: kernel cost by bytes; at each point where the planner runs it, and where it takes least.

At each point the same rows are run by the rank alone, by the worker alone, and divided by fixed parts that were chosen
beforehand; all of them and the planner's own (`Split`; `together`, which is `Split` with rowwise=True; `Offload`) take
turns in each round. What it lost is a ratio of medians: its own to the best of the fixed ways, whichever that is: nobody
knows that beforehand.

    here · quarter · half · three_quarters · there · split · together · here_again
    call_here · call_there · offload · call_here_again
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rfaas_mpi.bench import environment
from rfaas_mpi.bench.cluster import Cluster
from rfaas_mpi.bench.namespaces import other_node
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options, check_quiet
from rfaas_mpi.executor import Executor
from rfaas_mpi.kernels import kernel

__all__ = ["measure_crossover", "summary"]

ROWS = 4096
# What travels for each row, there and back.
ROW_BYTES = (16, 512, 8192)
WORK_S = (30e-6, 100e-6, 300e-6, 1e-3, 3e-3, 10e-3, 30e-3, 100e-3)
QUICK_ROW_BYTES = (16, 8192)
QUICK_WORK_S = (30e-6, 30e-3)
# Rounds of a point end after so many, or so long.
ROUNDS = 31
POINT_S = 4.0
# The planner learns in as many runs, or as much time.
LEARN = 60
LEARN_S = 2.0
PARTS = {"quarter": 0.25, "half": 0.5, "three_quarters": 0.75}
# Less than this is not told from nothing.
_NEAR = 1.02


@kernel
def works(x: np.ndarray, turns: float, out: np.ndarray) -> None:
    """y = 2x, and so many turns of a loop in the first cache for each row."""
    np.multiply(x, 2.0, out=out)
    block = np.ones(64)
    for _ in range(int(turns * len(x))):
        np.multiply(block, 1.0, out=block)


@contextlib.contextmanager
def _borrowed(options: Options) -> Iterator[tuple[Executor, dict]]:
    """An executor with one worker, on a core that is not the rank's, of a manager and an agent of our own."""
    directory = Path(tempfile.mkdtemp(prefix="rfaas-b-"))
    try:
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(other_node(wanted=options.namespaces))
            cores = stack.enter_context(environment.pinned(options.core))
            lent = max(core for core in cores.allowed if core != cores.rank)
            cluster = Cluster(directory, place, rank_core=cores.rank, lent=lent, allowed=cores.allowed,
                              transport=options.transport)
            stack.callback(cluster.close)
            executor = stack.enter_context(Executor(
                workers=1, manager=cluster.settings.manager, manager_user=cluster.settings.manager_user,
                transport=options.transport))
            yield executor, {"rank_core": cores.rank, "worker_core": lent,
                             "over": "namespaces" if options.namespaces else "this node"}
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _turn_s() -> float:
    """What a turn of the kernel's loop takes here."""
    x, out = np.ones(1), np.ones(1)
    found = []
    for _ in range(7):
        begin = time.perf_counter()
        works(x, 20_000.0, out=out)
        found.append((time.perf_counter() - begin) / 20_000)
    return statistics.median(found)


class _Point:
    """One cost and one number of bytes: all ways to run it on the same arrays."""

    def __init__(self, executor: Executor, row_bytes: int, turns: float) -> None:
        width = max(1, row_bytes // 16)
        self.executor = executor
        self._order = random.Random(1)
        self.x = executor.array(np.random.default_rng(1).random((ROWS, width)))
        self.out = executor.zeros((ROWS, width))
        self.turns = np.array(turns)
        self.made = [self._split("here"), self._split("workers"), self._split("both"), self._split("both", rowwise=True)]
        here, there, split, together = (made.Run for made in self.made)
        whole = executor.Invoke_init(works, (self.x, self.turns), self.out)
        self.made.append(whole)
        self.ways: dict[str, Callable[[], object]] = {
            "here": here, **{name: self._part(part) for name, part in PARTS.items()}, "there": there, "split": split,
            "together": together, "here_again": here, "call_here": lambda: works(self.x, turns, out=self.out),
            "call_there": lambda: (whole.Start(), whole.Wait()),
            "offload": lambda: executor.Offload(works, (self.x, self.turns), self.out),
            "call_here_again": lambda: works(self.x, turns, out=self.out)}

    def _split(self, where: str, *, rowwise: bool = False) -> object:
        return self.executor.Split_init(works, (self.x, self.turns), self.out, where=where, rowwise=rowwise)

    def _part(self, part: float) -> Callable[[], object]:
        """The first rows at the worker in one invocation, and the others here."""
        cut = round(ROWS * part)
        request = self.executor.Invoke_init(works, (self.x[:cut], self.turns), self.out[:cut])
        self.made.append(request)
        x, out, turns = self.x[cut:], self.out[cut:], float(self.turns)

        def run() -> None:
            request.Start()
            works(x, turns, out=out)
            request.Wait()
        return run

    def check(self, name: str) -> None:
        """Runs it once. Raises BenchError where the answer is wrong."""
        self.out.fill(np.nan)
        self.ways[name]()
        if not np.array_equal(self.out, 2 * self.x):
            raise BenchError(f"{name} gave a wrong answer; no figure is worth anything then")

    def learn(self, seconds: float) -> None:
        """Has the planner see both sides, as it does in the runs of an application."""
        for name in ("split", "together", "offload"):
            begin = time.perf_counter()
            for _ in range(LEARN):
                self.ways[name]()
                if time.perf_counter() - begin > seconds:
                    break

    def round(self, times: Mapping[str, list[float]]) -> None:
        # In an order of its own: what ran before has filled the caches with other data, or with the same.
        for name, run in self._order.sample(sorted(self.ways.items()), len(self.ways)):
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)

    def close(self) -> None:
        for made in self.made:
            made.Free()


def measure_crossover(options: Options) -> dict:
    """Each point with what each way took, what the planner chose and what that lost."""
    check_quiet(options.progress)
    sizes, works_s = (QUICK_ROW_BYTES, QUICK_WORK_S) if options.quick else (ROW_BYTES, WORK_S)
    rounds, point_s, learn_s = (5, 0.5, 0.5) if options.quick else (ROUNDS, POINT_S, LEARN_S)
    with _borrowed(options) as (executor, pinning):
        turn_s = _turn_s()
        points = []
        for row_bytes in sizes:
            for work_s in works_s:
                options.progress(f"{work_s * 1e6:g} µs of work on {ROWS * row_bytes >> 10} KiB")
                points.append(_measure(executor, row_bytes, work_s, work_s / turn_s / ROWS, rounds, point_s, learn_s))
    return {"figures": _figures(points), "points": points, "turn_ns": turn_s * 1e9, "n_rows": ROWS, "pinning": pinning,
            "right": sum(point["split"]["right"] for point in points), "of": len(points)}


def _measure(executor: Executor, row_bytes: int, work_s: float, turns: float, rounds: int, point_s: float,
             learn_s: float) -> dict:
    point = _Point(executor, row_bytes, turns)
    try:
        for name in point.ways:
            point.check(name)
        point.learn(learn_s)
        times: dict[str, list[float]] = {name: [] for name in point.ways}
        predicted: list[float] = []
        gc.collect()
        begin = time.perf_counter()
        for done in range(rounds):
            told = point.made[2].predict()
            if told.predicted_s is not None:
                predicted.append(told.predicted_s)
            point.round(times)
            if done >= 4 and time.perf_counter() - begin > point_s:
                break
        for name in ("split", "together", "offload"):
            point.check(name)
        found, joined = point.made[2].predict(), point.made[3].predict()
        called = [one for one in executor.explain() if type(one).__name__ == "Chosen"][-1]
    finally:
        point.close()
    return {"row_bytes": row_bytes, "bytes": ROWS * row_bytes, "work_s": work_s,
            **summary(times, predicted, found.offload, called.offload, joined.offload),
            "why": {"split": found.why, "together": joined.why, "offload": called.why}, "times_s": times}


def summary(times: Mapping[str, Sequence[float]], predicted: Sequence[float], split: bool | None,
            offload: bool, together: bool | None = None) -> dict:
    """What a point's times say, pure: medians, the best of the fixed ways, what was chosen and what that lost.

    `split`, `offload` and `together` are the planner's decisions; `together` may run all by one call on the rank, and so
    stands beside that. A decision is right if it is that of the best way, or if no
    other way gains more than the A/A of this point, and 2 %.
    """
    middle = {name: statistics.median(values) for name, values in times.items()}

    def judged(chosen: str, ways: Sequence[str], here: str, again: str, decided: bool | None) -> dict:
        best = min(ways, key=lambda way: middle[way])
        aa = _ratio(times[again], times[here])
        near = max(_NEAR, aa, 1 / aa)
        helps = middle[best] * near < middle[here]
        hurts = min(middle[way] for way in ways if way != here) > middle[here] * near
        return {"best": best, "best_s": middle[best], "chosen_s": middle[chosen], "decided": decided,
                "should": True if helps else False if hurts else None,
                "right": not (helps and decided is False or hurts and decided is True),
                "regret": _ratio(times[chosen], times[best]) - 1, "over_here": _ratio(times[chosen], times[here]),
                "aa": aa}

    told = judged("split", ("here", *PARTS, "there"), "here", "here_again", split)
    told["predicted"] = statistics.median(predicted) / middle["split"] if predicted else None
    return {"median_s": middle, "rounds": len(times["here"]), "split": told,
            "together": judged("together", ("call_here", *PARTS, "there"), "call_here", "call_here_again", together),
            "offload": judged("offload", ("call_here", "call_there"), "call_here", "call_here_again", offload)}


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def _figures(points: Sequence[dict]) -> dict:
    """Over all points: what was lost, %."""
    found = {}
    for who in ("split", "together", "offload"):
        lost = sorted(100 * point[who]["regret"] for point in points)
        aa = sorted(100 * abs(point[who]["aa"] - 1) for point in points)
        found[f"{who}_regret_percent"] = {
            "p50": round(statistics.median(lost), 2), "p99": round(lost[-1], 2), "count": len(lost), "unit": "%",
            "aa": {"p50": round(statistics.median(aa), 2), "p99": round(aa[-1], 2)}}
    ratios = [point["split"]["predicted"] for point in points if point["split"]["predicted"] is not None]
    if ratios:
        off = sorted(100 * abs(math.log(ratio)) for ratio in ratios)
        found["prediction_off_percent"] = {"p50": round(statistics.median(off), 2), "p99": round(off[-1], 2),
                                           "count": len(off), "unit": "%"}
    return found

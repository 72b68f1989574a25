"""What the apps share: arguments, ranks and modes, rounds in turn, a verdict before any number, JSON.

An app is a class; see `App`. It runs in these modes, with the same arguments:

    local   the rank's core alone
    remote  all of it on borrowed cores
    split   divided between both, as the planner of `Executor.Split` says
    mpi     ranks alone: `mpiexec -n 2`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import rfaas_mpi as rf

WHERE = {"local": "here", "remote": "workers", "split": "both", "mpi": "here"}
PAUSE_NS = 50_000_000   # before bare processes begin: both have long read when


class App(ABC):
    """One rank's part of an app."""

    name = ""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the app's own arguments."""

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        """Makes the arrays, in the executor's memory."""

    @abstractmethod
    def prepare(self, turn: int) -> None:
        """The inputs of round `turn`, which differ from the last one's; forgets all results."""

    @abstractmethod
    def split(self, where: str) -> Any:
        """A split (`Split_init`) of the whole work."""

    @abstractmethod
    def part(self, index: int, of: int) -> Callable[[], object]:
        """Runs one of `of` equal parts by the bare kernel, for the bound."""

    @abstractmethod
    def check(self, turn: int) -> str:
        """What is wrong with the results of round `turn`; empty where they are right."""

    @abstractmethod
    def work(self) -> tuple[float, str]:
        """How much all ranks do in a round, and its unit."""

    @abstractmethod
    def told(self) -> str:
        """How it was checked, in a few words."""


class Turns:
    """One split for each of the constants that an app has one after another; `now()` says which it is."""

    def __init__(self, splits: Sequence[Any], now: Callable[[], int]) -> None:
        self.splits = splits
        self._now = now

    @property
    def split(self) -> Any:
        return self.splits[self._now()]

    def Run(self) -> Any:
        return self.split.Run()

    def predict(self) -> Any:
        return self.split.predict()

    def Free(self) -> None:
        for split in self.splits:
            split.Free()


class Steps(Turns):
    """Splits of which a round runs so many, one after another; `done()` is called after each."""

    def __init__(self, splits: Sequence[Any], now: Callable[[], int], steps: int, done: Callable[[], None]) -> None:
        super().__init__(splits, now)
        self.steps = steps
        self._done = done

    def Run(self) -> None:
        for _ in range(self.steps):
            self.split.Run()
            self._done()

    def predict(self) -> Any:
        one = self.split.predict()
        return dataclasses.replace(one, **{name: value * self.steps for name in ("here_s", "split_s")
                                           if (value := getattr(one, name)) is not None})


def total(value: float, ranks: int) -> float:
    """The sum of all ranks' values."""
    if ranks == 1:
        return value
    from mpi4py import MPI

    return MPI.COMM_WORLD.allreduce(value)


@dataclasses.dataclass(frozen=True)
class Unforeseen:
    """What is known beforehand of work that no planner divides: nothing."""

    predicted_s: None = None


class Mapped:
    """In a split's place: workers are sent items by `Executor.starmap`, and answer in any order.

    `items()` are a run's, tuples of arguments; `take` is given each answer, and
    has to find out from it what it answers.
    """

    def __init__(self, executor: rf.Executor, call: Callable[..., Any], items: Callable[[], Iterable[Sequence[Any]]],
                 take: Callable[[Any], None], chunksize: int = 1) -> None:
        self._executor, self._call, self._items, self._take, self._chunksize = executor, call, items, take, chunksize

    def Run(self) -> None:
        for answer in self._executor.starmap(self._call, self._items(), chunksize=self._chunksize, unordered=True):
            self._take(answer)

    def predict(self) -> Unforeseen:
        return Unforeseen()

    def Free(self) -> None:
        """It holds nothing."""


def compiled(source: Path, symbol: str) -> rf.Kernel:
    """The kernel `symbol` of a C file, compiled for this machine."""
    if shutil.which("gcc") is None:
        raise SystemExit(f"there is no gcc, which {source.name} needs: install it, or choose another --kernel")
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch, "kernel.so")
        subprocess.run(["gcc", "-O3", "-march=native", "-std=c11", "-fPIC", "-shared", f"-I{rf.get_include()}",
                        "-o", str(library), str(source), "-lm"], check=True)
        return rf.Kernel.from_library(library, symbol)


def pin(index: int) -> int:
    """Binds this process to one of its cores; returns which."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[index % len(cores)]
    os.sched_setaffinity(0, {core})
    return core


def where_am_i(_: int) -> tuple[int, int]:
    return os.getpid(), min(os.sched_getaffinity(0))


# --- the bound -----------------------------------------------------------------------

def bare(app: type[App], args: argparse.Namespace, core: int, index: int, of: int) -> None:
    """A bare process: at each line `TURN NS` on stdin runs its part at that time; answers `start end`."""
    os.sched_setaffinity(0, {core})
    with rf.Executor(transport="inline") as executor:
        mine = app(args, 0, 1, executor)
        run = mine.part(index, of)
        print("ready", flush=True)
        for line in sys.stdin:
            turn, begin = map(int, line.split())
            mine.prepare(turn)
            while time.monotonic_ns() < begin:
                pass
            start = time.monotonic_ns()
            run()
            print(start, time.monotonic_ns(), flush=True)


class Bound:
    """As many bare pinned processes as there are cores in use, each with an equal part and no communication."""

    def __init__(self, argv: Sequence[str], cores: Sequence[int]) -> None:
        self.processes = [
            subprocess.Popen([sys.executable, sys.argv[0], *argv, "--bare", f"{core},{index},{len(cores)}"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for index, core in enumerate(cores)]
        for process in self.processes:
            self._answer(process)

    def _answer(self, process: subprocess.Popen[str]) -> str:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a bare process ended with status {process.wait()}")
        return line

    def run(self, turn: int, setup_s: float) -> float:
        """Seconds from the first start to the last end; `setup_s` is what they need to prepare."""
        begin = time.monotonic_ns() + PAUSE_NS + int(4e9 * setup_s)
        for process in self.processes:
            process.stdin.write(f"{turn} {begin}\n")
            process.stdin.flush()
        answers = [self._answer(process).split() for process in self.processes]
        return (max(int(end) for _, end in answers) - min(int(start) for start, _ in answers)) / 1e9

    def close(self) -> None:
        """Ends the processes. Safe to call twice."""
        for process in self.processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()
        self.processes = []


# --- the run -------------------------------------------------------------------------

def main(app: type[App], doc: str, argv: Sequence[str] | None = None) -> int:
    """Runs an app; the exit status. Prints no rate where a result is wrong."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", action="append", choices=list(WHERE),
                        help="what to run, in turn; may be repeated (default: local and split)")
    parser.add_argument("--workers", type=int, default=1, help="cores to borrow (default: 1)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bound", action="store_true", help="also time two bare pinned processes")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    app.arguments(parser)
    args = parser.parse_args(given)
    if args.bare:
        bare(app, args, *map(int, args.bare.split(",")))
        return 0
    modes = list(dict.fromkeys(args.mode or ["local", "split"]))
    if "mpi" in modes and modes != ["mpi"]:
        parser.error("--mode mpi goes with no other: it is for several ranks")

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if args.bound and comm.size > 1:
        parser.error("--bound is for one rank")
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    core = pin(local.rank)
    local.Free()
    borrow = args.workers if {"remote", "split"} & set(modes) else 0
    with rf.Executor(workers=(0, borrow)) if borrow else rf.Executor(transport="inline") as executor:
        return _run(app, args, given, modes, comm, core, executor)


def _run(app: type[App], args: argparse.Namespace, given: list[str], modes: list[str], comm: Any, core: int,
         executor: rf.Executor) -> int:
    from mpi4py import MPI

    def say(text: str, where: Any = sys.stdout) -> None:
        if comm.rank == 0:
            print(text, file=where, flush=True)

    workers = dict(executor.map(where_am_i, range(16))) if executor.workers else {}
    workers.pop(os.getpid(), None)
    config = {"app": app.name, **{key: value for key, value in vars(args).items() if key not in ("bare", "json")},
              "mode": modes, "ranks": comm.size, "cores": comm.gather(core),
              "worker_cores": comm.gather(sorted(workers.values()))}
    say(f"config   {app.name}: {' '.join(given) or 'defaults'}; {comm.size} rank(s) on core(s) {config['cores']}, "
        f"workers on {config['worker_cores']}")
    if not workers and {"remote", "split"} & set(modes):
        say("         no core is spare here: the rank does all of it", sys.stderr)
    mine = app(args, comm.rank, comm.size, executor)
    splits = {mode: mine.split(WHERE[mode]) for mode in modes}
    bound = Bound(given, [core, *sorted(workers.values())]) if args.bound and workers else None
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    predicted: list[float | None] = []
    wrong: list[str] = []
    runs = 0
    try:
        # The first round is to learn from: kernels are loaded, the planner knows nothing.
        for turn in range(args.rounds + 1):
            say(f"  round {turn} of {args.rounds}", sys.stderr)
            setup = 0.0
            for mode, split in splits.items():
                start = time.perf_counter()
                mine.prepare(turn)
                setup = time.perf_counter() - start
                comm.Barrier()
                said = split.predict().predicted_s
                start = time.perf_counter()
                split.Run()
                took = comm.allreduce(time.perf_counter() - start, MPI.MAX)
                runs += 1
                if problem := mine.check(turn):
                    wrong.append(f"{mode}, round {turn}: {problem}")
                if turn:
                    seconds[mode].append(took)
                    if mode == "split":
                        predicted.append(said)
            if bound is not None:
                took = bound.run(turn, setup)
                if turn:
                    seconds.setdefault("bound", []).append(took)
        plan = str(splits["split"].predict()) if "split" in splits else None
    finally:
        if bound is not None:
            bound.close()
        for split in splits.values():
            split.Free()
    wrong = [line for lines in comm.allgather(wrong) for line in lines]
    for line in wrong:
        say(f"verdict  WRONG {line}")
    if wrong:
        return 1
    say(f"verdict  all {runs} runs are right: {mine.told()}")
    amount, unit = mine.work()
    median = {mode: statistics.median(values) for mode, values in seconds.items()}
    first = median[modes[0]]
    for mode, value in median.items():
        say(f"{'rate   ' if mode == modes[0] else '       '}  {mode:<8} {amount / value:10.3g} {unit}/s"
            f"   {value * 1e3:9.2f} ms   {first / value:5.2f}x")
    of_bound = prediction = None
    if "bound" in seconds and "split" in seconds:
        of_bound = statistics.median(b / s for b, s in zip(seconds["bound"], seconds["split"]))
        say(f"         split reaches {of_bound:.1%} of the bound (median of the rounds)")
    if predicted and None not in predicted:
        prediction = statistics.median(p / s for p, s in zip(predicted, seconds["split"]))
        say(f"         predicted: {prediction:.0%} of what a split took (median of the rounds)")
    if plan:
        say(f"plan     {plan}")
    if args.json and comm.rank == 0:
        Path(args.json).write_text(json.dumps({
            "config": config, "verdict": {"correct": True, "runs": runs, "how": mine.told()}, "seconds": seconds,
            "median_s": median, "of_bound": of_bound, "predicted_s": predicted, "of_prediction": prediction,
            "plan": plan}))
    return 0

"""What the apps share: arguments, ranks and modes, rounds in turn, a verdict before any number, JSON, a picture.

An app is a class; see `App`. It runs in these modes, with the same arguments:

    local   the rank's core alone
    remote  all of it on borrowed cores
    split   divided between both, as the planner of `Executor.Split` says
    mpi     ranks alone: `mpiexec -n 2`

Each round runs all modes, forwards and backwards by turns and each time another one
first. In between, if wanted, come what they are compared with:

    --bound    bare pinned processes, one a core in use, with equal parts and no word between them
    --ranks N  the same app as N MPI ranks on those cores, which block until it is their turn
    --again    the split once more: what is measured where there is no difference
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import threadpoolctl

import rfaas_mpi as rf

WHERE = {"local": "here", "remote": "workers", "split": "both", "mpi": "here"}
PAUSE_NS = 50_000_000   # between the inputs and a run: what was just written lies in caches
PATIENCE_S = 60.0       # of resident ranks that are to end
AGAIN = " again"        # what a mode is called the second time
DISTURBED = 1.2         # the bound's slowest round over its fastest, above which this is no quiet machine


class App(ABC):
    """One rank's part of an app."""

    name = ""
    # Arguments of the smallest run that says something (`--small`), and of those whose figures are published.
    small: Sequence[str] = ()
    figures: Sequence[str] = ()
    # Modes of its own, which `split` is asked for by their names; and what is run where no mode is given.
    modes: Sequence[str] = ()
    default: Sequence[str] = ("local", "split")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the app's own arguments."""

    @staticmethod
    def runs_on(ranks: int) -> bool:
        """Whether its work can be divided among so many MPI ranks."""
        return ranks > 0

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        """Makes the arrays, in the executor's memory."""

    @abstractmethod
    def prepare(self, turn: int) -> None:
        """The inputs of round `turn`, which differ from the last one's; forgets all results."""

    @abstractmethod
    def split(self, where: str) -> Any:
        """A split (`Split_init`) of the whole work; anything with its Run, predict and Free."""

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

    def more(self) -> tuple[str, dict[str, Any]]:
        """Runs what comes after the rounds: what is wrong with it, if anything, and what the JSON has of it."""
        return "", {}


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
                 take: Callable[[Any], None]) -> None:
        self._executor, self._call, self._items, self._take = executor, call, items, take

    def Run(self) -> None:
        for answer in self._executor.starmap(self._call, self._items(), unordered=True):
            self._take(answer)

    def predict(self) -> Unforeseen:
        return Unforeseen()

    def Free(self) -> None:
        """It holds nothing."""


def compiled_all(source: Path, *symbols: str) -> list[rf.Kernel]:
    """The kernels of a C file, compiled for this machine."""
    if shutil.which("gcc") is None:
        raise SystemExit(f"there is no gcc, which {source.name} needs: install it, or choose another --kernel")
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch, "kernel.so")
        subprocess.run(["gcc", "-O3", "-march=native", "-std=c11", "-fPIC", "-shared", f"-I{rf.get_include()}",
                        "-o", str(library), str(source), "-lm"], check=True)
        return [rf.Kernel.from_library(library, symbol) for symbol in symbols]


def compiled(source: Path, symbol: str) -> rf.Kernel:
    """The kernel `symbol` of a C file, compiled for this machine."""
    return compiled_all(source, symbol)[0]


def bind(core: int) -> None:
    """Binds this process to a core, and BLAS to one thread: others, which it has already, would run elsewhere."""
    os.sched_setaffinity(0, {core})
    threadpoolctl.threadpool_limits(limits=1)


def pin(index: int) -> int:
    """Binds this process to one of its cores; returns which."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[index % len(cores)]
    bind(core)
    return core


def where_am_i(_: int) -> tuple[int, int]:
    return os.getpid(), min(os.sched_getaffinity(0))


def workers_of(executor: rf.Executor) -> dict[int, int]:
    """pid → core of the workers; none where kernels run on the rank."""
    found = dict(executor.map(where_am_i, range(16 * max(1, len(executor.workers))))) if executor.workers else {}
    found.pop(os.getpid(), None)
    return found


def wait_for(begin_ns: int) -> None:
    """Until then, awake: a core that sleeps wakes up slowly."""
    while time.monotonic_ns() < begin_ns:
        pass


def timed(app: App, split: Any, turn: int, comm: Any) -> tuple[float, float | None, str]:
    """One run of all ranks: seconds of the slowest, what was predicted, and what is wrong with it."""
    from mpi4py import MPI

    app.prepare(turn)
    wait_for(time.monotonic_ns() + PAUSE_NS)
    comm.Barrier()
    said = split.predict()
    start = time.perf_counter()
    split.Run()
    took = comm.allreduce(time.perf_counter() - start, MPI.MAX)
    return took, said.predicted_s if said is not None else None, app.check(turn)


# --- the bound: bare processes -------------------------------------------------------

def bare(app: type[App], args: argparse.Namespace, core: int, index: int, of: int) -> None:
    """A bare process: at a line `TURN` on stdin prepares, at `NS` runs its part at that time; answers `start end`."""
    bind(core)
    with rf.Executor(transport="inline") as executor:
        mine = app(args, 0, 1, executor)
        run = mine.part(index, of)
        print("ready", flush=True)
        for line in sys.stdin:
            mine.prepare(int(line))
            print("ready", flush=True)
            wait_for(int(sys.stdin.readline()))
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
        self._answers()

    def _tell(self, word: int) -> list[list[int]]:
        for process in self.processes:
            process.stdin.write(f"{word}\n")
            process.stdin.flush()
        return self._answers()

    def _answers(self) -> list[list[int]]:
        lines = []
        for process in self.processes:
            lines.append(process.stdout.readline())
            if not lines[-1]:
                raise RuntimeError(f"a bare process ended with status {process.wait()}")
        return [[int(word) for word in line.split() if word != "ready"] for line in lines]

    def run(self, turn: int) -> float:
        """Seconds from the first start to the last end."""
        self._tell(turn)
        times = self._tell(time.monotonic_ns() + PAUSE_NS)
        return (max(end for _, end in times) - min(start for start, _ in times)) / 1e9

    def close(self) -> None:
        """Ends the processes. Safe to call twice."""
        for process in self.processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()
        self.processes = []


# --- the same app as MPI ranks -------------------------------------------------------

def resident(app: type[App], args: argparse.Namespace, address: str, cores: Sequence[int]) -> None:
    """A resident rank: at each line `TURN` from that socket runs the round; answers [seconds, what is wrong].

    It waits for lines in the kernel: MPI's own waiting would take a core from others.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    bind(cores[comm.rank % len(cores)])
    with socket.socket(socket.AF_UNIX) as line, rf.Executor(transport="inline") as executor:
        line.connect(address)
        with line.makefile("rw") as stream:
            mine = app(args, comm.rank, comm.size, executor)
            split = mine.split("here")
            print("ready", file=stream, flush=True)
            for word in stream:
                took, _, problem = timed(mine, split, int(word), comm)
                print(json.dumps([took, problem]), file=stream, flush=True)
            split.Free()


class Ranks:
    """An `mpiexec -n N` of the same app beside this one, which rests but for its rounds."""

    def __init__(self, argv: Sequence[str], ranks: int, cores: Sequence[int]) -> None:
        from rfaas_mpi import config
        from rfaas_mpi.cli.apps import launcher

        self._streams: list[IO[str]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="rfaas-ranks-")
        address = str(Path(self._directory.name, "socket"))
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(address)
        self._door.listen(ranks)
        self._door.settimeout(0.5)
        # What this rank's own launcher gave it is not theirs.
        self._process = subprocess.Popen(
            [launcher(), "-n", str(ranks), sys.executable, sys.argv[0], *argv,
             "--resident", f"{address},{','.join(map(str, cores))}"],
            env=config.scrubbed(config.environment()), stdin=subprocess.DEVNULL, stdout=sys.stderr)
        try:
            while len(self._streams) < ranks:
                try:
                    connection, _ = self._door.accept()
                except TimeoutError:
                    self._alive()
                    continue
                # So that its stream alone holds it.
                with connection:
                    connection.settimeout(None)
                    self._streams.append(connection.makefile("rw"))
            # All are here: a rank that is killed later leaves no file.
            self._door.close()
            self._directory.cleanup()
            for stream in self._streams:
                self._answer(stream)
        except BaseException:
            self.close()
            raise

    def _alive(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"the MPI ranks ended with status {self._process.returncode}")

    def _answer(self, stream: IO[str]) -> str:
        line = ""
        # Reset where it had not read all, else an end.
        with contextlib.suppress(ConnectionError):
            line = stream.readline()
        if not line:
            raise RuntimeError(f"an MPI rank went away; its mpiexec ended with status {self._process.wait(PATIENCE_S)}")
        return line

    def run(self, turn: int) -> tuple[float, str]:
        """Seconds of the slowest rank, and what is wrong with any."""
        for stream in self._streams:
            with contextlib.suppress(ConnectionError):
                stream.write(f"{turn}\n")
                stream.flush()
        answers = [json.loads(self._answer(stream)) for stream in self._streams]
        return max(took for took, _ in answers), "; ".join(problem for _, problem in answers if problem)

    def close(self) -> None:
        """Ends the ranks. Safe to call twice."""
        for stream in self._streams:
            # One that is gone does not get what was not sent yet.
            with contextlib.suppress(ConnectionError):
                stream.close()
        self._streams = []
        self._door.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._directory.cleanup()


# --- figures -------------------------------------------------------------------------

def summary(values: Iterable[float]) -> dict[str, Any] | None:
    """Median of rounds, where it lies (95 %, by order statistics), quartiles and how many; None of nothing."""
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        return None
    # The k-th of each end: a binomial of one half lies between them.
    k = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if count > 1 else ordered * 3
    return {"median": statistics.median(ordered), "median_between": [ordered[k], ordered[-1 - k]],
            "quartiles": [quartiles[0], quartiles[2]], "count": count}


def ratios(seconds: dict[str, list[float]], predicted: Sequence[float | None]) -> dict[str, Any]:
    """Round by round, one time divided by another: `summary` of each.

    `speedup_M` of each mode over local; of those with workers `M_of_bound`, the
    bound over the mode, and `M_over_mpi`; `predicted_of_split`; `again`, a mode
    over itself.
    """
    series: dict[str, Sequence[float | None]] = {**seconds, "predicted": predicted}
    pairs = {"predicted_of_split": ("predicted", "split")}
    for mode in seconds:
        pairs[f"speedup_{mode}"] = ("local", mode)
        if mode.endswith(AGAIN):
            del pairs[f"speedup_{mode}"]
            pairs["again"] = (mode.removesuffix(AGAIN), mode)
        elif mode not in ("local", "mpi", "bound"):
            pairs[f"{mode}_of_bound"] = ("bound", mode)
            pairs[f"{mode}_over_mpi"] = ("mpi", mode)
    found = {name: summary(one / two for one, two in zip(series[a], series[b], strict=True)
                           if one is not None and two is not None)
             for name, (a, b) in pairs.items() if series.get(a) and series.get(b) and a != b}
    return {name: value for name, value in found.items() if value is not None}


def lines_of(found: dict[str, Any], mode: str, ranks: int) -> Iterator[str]:
    """What the ratios say of a mode, for people."""
    texts = {f"{mode}_of_bound": f"{mode} reaches {{:.1%}} of the bound's speed-up",
             f"{mode}_over_mpi": f"{mode} is {{:.3f}} times as fast as {ranks} MPI ranks",
             "predicted_of_split": "predicted: {:.0%} of what a split took",
             "again": "the same twice: {:.3f}"}
    for name, text in texts.items():
        if name in found:
            low, high = found[name]["median_between"]
            spread = f"{low:.1%} to {high:.1%}" if "%" in text else f"{low:.3f} to {high:.3f}"
            yield f"{text.format(found[name]['median'])} ({spread}; median of {found[name]['count']} rounds)"


class Progress:
    """How far the rounds are, on stderr: a bar on a terminal, lines elsewhere."""

    WIDTH = 32

    def __init__(self, rounds: int, quiet: bool) -> None:
        self._rounds = rounds
        self._quiet = quiet
        self._bar = sys.stderr.isatty()
        self._begin = time.monotonic()

    def show(self, turn: int, what: str) -> None:
        """Before round `turn` of so many; round 0 is not counted."""
        if self._quiet:
            return
        if not self._bar:
            print(f"  round {turn} of {self._rounds}", file=sys.stderr, flush=True)
            return
        done = turn / (self._rounds + 1)
        left = ""
        if turn:
            left = f", {(time.monotonic() - self._begin) * (1 - done) / done:.0f} s left"
        marks = round(done * self.WIDTH)
        print(f"\r{what} [{'#' * marks}{'.' * (self.WIDTH - marks)}] {turn} of {self._rounds}{left}\033[K", end="",
              file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar away. Safe to call twice."""
        if self._bar and not self._quiet:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


COLOURS = {"local": "#3b6ea8", "remote": "#4f9d69", "split": "#e08a2b", "mpi": "#8e6bb0", "bound": "#9aa0a6"}
OTHER = "#c2a04a"


def draw(report: dict[str, Any], axes: Any) -> None:
    """Speed-up of each mode over the first, a tick for each round."""
    seconds, median = report["seconds"], report["median_s"]
    first = next(iter(median))
    shown = [mode for mode in [*COLOURS, *seconds] if mode in seconds]
    shown = [mode for mode in dict.fromkeys(shown) if not mode.endswith(AGAIN)]
    for row, mode in enumerate(shown):
        speedup = median[first] / median[mode]
        axes.barh(row, speedup, height=0.62, color=COLOURS.get(mode, OTHER))
        axes.plot([median[first] / value for value in seconds[mode]], [row] * len(seconds[mode]), "|", color="black",
                  alpha=0.4, markersize=9)
    if "bound" in median:
        axes.axvline(median[first] / median["bound"], color="black", linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(shown)), [f"{mode}: {median[mode] * 1e3:.3g} ms, {median[first] / median[mode]:.2f}x"
                                        for mode in shown])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(report["config"]["app"], loc="left", fontweight="bold")


def plot(report: dict[str, Any], file: Path) -> None:
    """The picture of one app, as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    draw(report, axes)
    axes.set_xlabel(f"speed-up, median of {report['config']['rounds']} rounds; a tick is one round, "
                    "the dotted line is the bound")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


# --- the run -------------------------------------------------------------------------

def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is so much or more. Of nothing every verdict would be right."""
    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value
    return number


def to_be_written(text: str) -> str:
    """The type of an argument that names a file: whether it can be written is known before the first round."""
    file = Path(text).absolute()
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {file.parent}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written")
    return text


def main(app: type[App], doc: str, argv: Sequence[str] | None = None) -> int:
    """Runs an app; the exit status. Prints no rate where a result is wrong."""
    given = list(sys.argv[1:] if argv is None else argv)
    for option, words in (("--small", app.small), ("--figures", app.figures)):
        if option in given:
            given = [*words, *(word for word in given if word != option)]
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", action="append", choices=[*WHERE, *app.modes],
                        help="what to run, in turn; may be repeated (default: " + " and ".join(app.default) + ")")
    parser.add_argument("--workers", type=at_least(0), default=1, help="cores to borrow (default: 1)")
    parser.add_argument("--rounds", type=at_least(1), default=9)
    parser.add_argument("--seed", type=at_least(0), default=1)
    parser.add_argument("--small", action="store_true",
                        help=f"the smallest run that says something: {' '.join(app.small) or 'the defaults'}")
    parser.add_argument("--figures", action="store_true",
                        help=f"as where figures are published: {' '.join(app.figures) or 'the defaults'}")
    parser.add_argument("--bound", action="store_true", help="also time bare pinned processes, one a core in use")
    parser.add_argument("--ranks", type=at_least(1), metavar="N",
                        help="also time the same app as N MPI ranks on the same cores, without workers")
    parser.add_argument("--again", action="store_true",
                        help="the split twice in each round: what is measured where there is no difference")
    parser.add_argument("--plot", metavar="FILE", type=to_be_written, help="draw the modes as PNG (needs matplotlib)")
    parser.add_argument("--json", metavar="FILE", type=to_be_written)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    app.arguments(parser)
    args = parser.parse_args(given)
    if args.bare:
        bare(app, args, *map(int, args.bare.split(",")))
        return 0
    if args.resident:
        address, *cores = args.resident.split(",")
        resident(app, args, address, [int(core) for core in cores])
        return 0
    modes = list(dict.fromkeys(args.mode or app.default))
    if "mpi" in modes and modes != ["mpi"]:
        parser.error("--mode mpi goes with no other: it is for several ranks; --ranks 2 has them take turns")

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if (args.bound or args.ranks) and comm.size > 1:
        parser.error("--bound and --ranks are for one rank")
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    allowed = sorted(os.sched_getaffinity(0))
    core = pin(local.rank)
    local.Free()
    borrow = args.workers if set(modes) - {"local", "mpi"} else 0
    with rf.Executor(workers=(0, borrow)) if borrow else rf.Executor(transport="inline") as executor:
        return _run(app, args, given, modes, comm, core, allowed, executor)


def _run(app: type[App], args: argparse.Namespace, given: list[str], modes: list[str], comm: Any, core: int,
         allowed: list[int], executor: rf.Executor) -> int:
    def say(text: str, where: Any = sys.stdout) -> None:
        if comm.rank == 0:
            print(text, file=where, flush=True)

    begin = time.monotonic()
    workers = workers_of(executor)
    hidden = ("bare", "resident", "json", "plot", "small", "figures")
    config = {"app": app.name, **{key: value for key, value in vars(args).items() if key not in hidden},
              "mode": modes, "arguments": given, "ranks": comm.size, "mpi_ranks": args.ranks,
              "cores": comm.gather(core), "worker_cores": comm.gather(sorted(workers.values())),
              "executor": repr(executor)}
    say(f"config   {app.name}: {' '.join(given) or 'defaults'}; {comm.size} rank(s) on core(s) {config['cores']}, "
        f"workers on {config['worker_cores']}")
    if not workers and args.workers and set(modes) - {"local", "mpi"}:
        say("         no core is spare here: the rank does all of it", sys.stderr)
    mine = app(args, comm.rank, comm.size, executor)
    splits = {mode: mine.split(WHERE.get(mode, mode)) for mode in modes}
    used = [core, *sorted(workers.values())]
    bound = ranks = None
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    predicted: list[float | None] = []
    wrong: list[str] = []
    runs = 0
    judged = "split" if "split" in modes else modes[-1]
    progress = Progress(args.rounds, quiet=comm.rank != 0)

    def take(mode: str, turn: int) -> None:
        nonlocal runs
        took, said, problem = timed(mine, splits[mode.removesuffix(AGAIN)], turn, comm)
        runs += 1
        if problem:
            wrong.append(f"{mode}, round {turn}: {problem}")
        if turn:
            seconds[mode].append(took)
            if mode == "split":
                predicted.append(said)

    def take_bound(turn: int) -> None:
        took = bound.run(turn)
        if turn:
            seconds["bound"].append(took)

    def take_ranks(turn: int) -> None:
        nonlocal runs
        took, problem = ranks.run(turn)
        runs += 1
        if problem:
            wrong.append(f"{args.ranks} MPI ranks, round {turn}: {problem}")
        if turn:
            seconds["mpi"].append(took)

    # A default argument, since each one is for its own mode.
    ways: list[Callable[[int], None]] = [lambda turn, mode=mode: take(mode, turn) for mode in modes]
    try:
        if args.again:
            twice = judged
            seconds[f"{twice}{AGAIN}"] = []
            ways.append(lambda turn: take(f"{twice}{AGAIN}", turn))
        if args.ranks and not app.runs_on(args.ranks):
            say(f"         {app.name} can't be divided among {args.ranks} MPI ranks", sys.stderr)
        elif args.ranks:
            others = [other for other in allowed if other not in used]
            ranks = Ranks(given, args.ranks, [*used, *others])
            seconds["mpi"] = []
            ways.append(take_ranks)
        if args.bound and workers:
            bound = Bound(given, used)
            seconds["bound"] = []
            ways.append(take_bound)
        # The first round is to learn from: kernels are loaded, the planner knows nothing.
        for turn in range(args.rounds + 1):
            progress.show(turn, app.name)
            # Forwards and backwards, and another one first: what comes before and after is no mode's own.
            order = [*ways[turn // 2 % len(ways):], *ways[:turn // 2 % len(ways)]]
            for way in order if turn % 2 == 0 else reversed(order):
                way(turn)
        progress.close()
        plan = str(said) if "split" in splits and (said := splits["split"].predict()) is not None else None
        problem, more = mine.more()
        if problem:
            wrong.append(problem)
    finally:
        progress.close()
        for other in (bound, ranks):
            if other is not None:
                other.close()
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
        say(f"{'rate   ' if mode == modes[0] else '       '}  {mode:<11} {amount / value:10.3g} {unit}/s"
            f"   {value * 1e3:9.2f} ms   {first / value:5.2f}x")
    found = ratios(seconds, predicted)
    for line in lines_of(found, judged, args.ranks or 0):
        say(f"         {line}")
    disturbed = "bound" in seconds and max(seconds["bound"]) > DISTURBED * min(seconds["bound"])
    if disturbed:
        say("         the bare processes took now more, now less: this machine has other work to do")
    if plan:
        say(f"plan     {plan}")
    if comm.rank == 0 and (args.json or args.plot):
        from rfaas_mpi.bench import environment

        report = {
            "config": config, "verdict": {"correct": True, "runs": runs, "how": mine.told()}, "seconds": seconds,
            "median_s": median, "ratios": found, "of_bound": found.get(f"{judged}_of_bound", {}).get("median"),
            "predicted_s": predicted, "of_prediction": found.get("predicted_of_split", {}).get("median"),
            "work": {"amount": amount, "unit": unit}, "plan": plan, "disturbed": disturbed, **more,
            "took_s": round(time.monotonic() - begin, 1), "environment": environment.facts()}
        if args.json:
            Path(args.json).write_text(json.dumps(report))
        if args.plot:
            plot(report, Path(args.plot))
    return 0

"""NAME
    blackscholes.py: price European options on the rank's core and on borrowed ones

PURPOSE
    Black and Scholes (1973) over distinct seeded options, as many as PARSEC's
    native input. Each MPI rank owns a block of the options. It cuts the block
    into cells, hands cells to its workers and prices others itself, until none
    is left. Every price is checked against scipy before a rate is printed.

USAGE
    mpiexec -n 1 python apps/blackscholes.py [--options 10000000] [--workers 0|1]
        [--mode local|remote|split|mpi]... [--rounds 9] [--bound] [--bound-shared]
        [--kill] [--json FILE]

    --mode M     what to run, in turn; may be repeated. local: the rank's core alone;
                 remote: all on borrowed cores; split: Executor.Split, which divides the
                 work as its planner says; mpi: ranks alone, for `mpiexec -n 2`. By
                 default local, and the rank and its workers with the work divided by
                 this program ("shared").
    --workers N  cores to borrow; 0: the rank's core alone
    --bound      also time two bare pinned processes that price half each (one
                 rank only): no borrowed core can do better than that
    --bound-shared
                 the same on memory that processes can share, on pages of the
                 size that the system gives such memory by itself
    --kill       one more run, in which a worker is killed half-way
    --json FILE  write what was printed, and the killed run's timeline, to FILE:
                 of_bound and of_bound_shared are medians over the rounds of
                 (seconds of the bound / seconds with borrowed cores)

    Ends with status 1, and prints no rate, where a price is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import rfaas_mpi as rf

BLOCK = 1 << 16       # options that are drawn together: the same for any number of ranks
ALIGN = 64            # cells are multiples of this, so each starts on a cache line
SMALLEST = 16384      # options of a cell: what a call costs is little beside that
TOLERANCE = 1e-10     # of a price; prices are up to 126, so 1e-14 is one rounding
AHEAD = 2             # cells at a worker: one that runs, one so that it never waits for the rank
PAUSE_NS = 100_000_000  # between wiping the prices and a run: what was just written lies in caches
PASSES = 5            # of the run with a killed worker: long enough to see its replacement


# --- the options and their prices ------------------------------------------------

class Options(NamedTuple):
    """n options: float64[n] each, but `put`: uint8[n], 0 is a call, 1 a put."""

    spot: np.ndarray
    strike: np.ndarray
    rate: np.ndarray
    volatility: np.ndarray
    years: np.ndarray
    put: np.ndarray

    def part(self, cell: slice) -> Options:
        return Options(*(column[cell] for column in self))


def make_options(first: int, count: int, seed: int,
                 empty: Callable[[int, str], np.ndarray]) -> Options:
    """Options number `first` to `first + count`, in arrays that `empty(n, dtype)` gives."""
    options = Options(*(empty(count, dtype) for dtype in ("f8",) * 5 + ("u1",)))
    for block in range(first // BLOCK, -(-(first + count) // BLOCK)):
        random = np.random.default_rng([seed, block])
        spot = random.uniform(20.0, 180.0, BLOCK)
        drawn = (spot, spot * random.uniform(0.7, 1.3, BLOCK),
                 random.uniform(0.01, 0.10, BLOCK), random.uniform(0.10, 0.60, BLOCK),
                 random.uniform(0.05, 2.0, BLOCK), random.integers(0, 2, BLOCK, "u1"))
        start = block * BLOCK
        low, high = max(first, start), min(first + count, start + BLOCK)
        for column, values in zip(options, drawn):
            column[low - first:high - first] = values[low - start:high - start]
    return options


def black_scholes_ref(options: Options) -> np.ndarray:
    """The prices by numpy and scipy, float64[n]: the kernel's plain twin.

    Source: F. Black, M. Scholes, The Pricing of Options and Corporate
    Liabilities, J. Political Economy 81 (1973), equation 13.
    """
    from scipy.special import ndtr

    spot, strike, rate, volatility, years, put = options
    spread = volatility * np.sqrt(years)
    d1 = (np.log(spot / strike) + (rate + volatility**2 / 2) * years) / spread
    sign = np.where(put, -1.0, 1.0)
    discounted = strike * np.exp(-rate * years)
    return sign * (spot * ndtr(sign * d1) - discounted * ndtr(sign * (d1 - spread)))


def largest_error(options: Options, prices: np.ndarray) -> float:
    """The largest difference from the twin, over all options; NaN if one is NaN."""
    worst = 0.0
    for start in range(0, len(prices), 16 * BLOCK):
        cell = slice(start, start + 16 * BLOCK)
        error = np.max(np.abs(black_scholes_ref(options.part(cell)) - prices[cell]))
        worst = float(np.maximum(worst, error))
    return worst


def grid(count: int) -> list[slice]:
    """The cells of `count` options: large ones first, smaller ones towards the end.

    It depends on `count` alone, so that any division of the work gives the same
    bits; small cells come last, so that rank and workers end together. About 30
    of them: each that the rank prices itself costs it some 40 µs around the
    kernel, with caches full of options; 55 cells cost 1 % more (measured).
    """
    cells, start = [], 0
    while start < count:
        size = max(min((count - start) // 5, count // 12), SMALLEST)
        size = min(-(-size // ALIGN) * ALIGN, count - start)
        cells.append(slice(start, start + size))
        start += size
    return cells


# --- one run: the rank and its workers ---------------------------------------------

def run_shared(cells: Sequence[Any], requests: Sequence[Any],
               price_here: Callable[[Any], None], workers: int) -> None:
    """Prices every cell once: here, or by the cell's request on a worker."""
    flying: list[Any] = []
    cell = 0
    while cell < len(cells):
        flying = [request for request in flying if not request.Test()]
        while len(flying) < AHEAD * workers and cell < len(cells):
            requests[cell].Start()
            flying.append(requests[cell])
            cell += 1
        if cell < len(cells):
            price_here(cells[cell])
            cell += 1
    for request in flying:
        request.Wait()


class Traced:
    """A request that notes when it was started and when its end was seen."""

    def __init__(self, request: Any) -> None:
        self.request = request
        self.started_ns = self.seen_ns = 0

    def Start(self) -> None:
        self.started_ns = time.monotonic_ns()
        self.request.Start()

    def Test(self) -> bool:
        if not self.request.Test():
            return False
        self.seen_ns = time.monotonic_ns()
        return True

    def Wait(self) -> None:
        self.request.Wait()
        self.seen_ns = time.monotonic_ns()


# --- the bound: bare processes -----------------------------------------------------

class _Buf(ctypes.Structure):
    _fields_ = [("ptr", ctypes.c_void_p), ("size", ctypes.c_uint64),
                ("capacity", ctypes.c_uint64)]


class _Call(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("n_in", ctypes.c_uint32),
                ("n_out", ctypes.c_uint32), ("n_const", ctypes.c_uint32),
                ("inputs", ctypes.POINTER(_Buf)), ("outputs", ctypes.POINTER(_Buf)),
                ("constants", ctypes.POINTER(_Buf)), ("scratch", ctypes.c_void_p),
                ("scratch_bytes", ctypes.c_uint64), ("invocation", ctypes.c_uint64)]


def shared_empty(count: int, dtype: str) -> np.ndarray:
    """An array in memory that could be shared, with whatever pages the system gives that."""
    kind = np.dtype(dtype)
    fd = os.memfd_create("blackscholes")
    try:
        os.posix_fallocate(fd, 0, count * kind.itemsize)
        return np.frombuffer(mmap.mmap(fd, count * kind.itemsize), kind)
    finally:
        os.close(fd)


def bare(library: str, memory: str, core: int, first: int, count: int, seed: int) -> None:
    """A bare process: at each line `NS` on stdin prices its options at that time.

    Answers `start end digest`, times in CLOCK_MONOTONIC ns. Nothing of the
    product runs here but the kernel's own machine code.
    """
    os.sched_setaffinity(0, {core})
    kernel = ctypes.CDLL(library).rfm_black_scholes
    empty = {"private": np.empty, "shared": shared_empty}[memory]
    options = make_options(first, count, seed, empty)
    prices = empty(count, "f8")
    buffers = [_Buf(array.ctypes.data, array.nbytes, array.nbytes)
               for array in (*options, prices)]
    call = _Call(1, 6, 1, 0, (_Buf * 6)(*buffers[:6]), (_Buf * 1)(buffers[6]), None, None, 0, 0)
    prices.fill(np.nan)
    print("ready", flush=True)
    for line in sys.stdin:
        prices.fill(np.nan)
        begin = int(line)
        while time.monotonic_ns() < begin:
            pass
        start = time.monotonic_ns()
        status = kernel(ctypes.byref(call))
        end = time.monotonic_ns()
        assert status == 0, f"the kernel returned {status}"
        print(start, end, hashlib.blake2b(prices).hexdigest(), flush=True)


class BareProcesses:
    """One bare process on each core, each with an equal share of the options in `private` or `shared` memory."""

    def __init__(self, library: str, memory: str, cores: Sequence[int], count: int, seed: int) -> None:
        edges = [count * k // len(cores) // ALIGN * ALIGN for k in range(len(cores))] + [count]
        self.parts = [slice(low, high) for low, high in zip(edges, edges[1:])]
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--bare", library, memory, str(core), str(part.start),
                 str(part.stop - part.start), str(seed)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for core, part in zip(cores, self.parts)]
        for process in self.processes:
            self._answer(process)

    def _answer(self, process: subprocess.Popen[str]) -> str:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"a bare process ended with status {process.wait()}")
        return line

    def run(self) -> tuple[float, list[str]]:
        """Seconds from the first start to the last end, and each part's digest."""
        begin = time.monotonic_ns() + PAUSE_NS
        for process in self.processes:
            process.stdin.write(f"{begin}\n")
            process.stdin.flush()
        answers = [self._answer(process).split() for process in self.processes]
        first = min(int(answer[0]) for answer in answers)
        last = max(int(answer[1]) for answer in answers)
        return (last - first) / 1e9, [answer[2] for answer in answers]

    def close(self) -> None:
        """Ends the processes. Safe to call twice."""
        for process in self.processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()
        self.processes = []


# --- the job -----------------------------------------------------------------------

def whereabouts(_: int) -> tuple[int, int]:
    """pid and first core of the process that runs this."""
    return os.getpid(), min(os.sched_getaffinity(0))


def pin(local_rank: int) -> int:
    """Binds this rank to one core, if its launcher has not; returns the core."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[local_rank % len(cores)]
    os.sched_setaffinity(0, {core})
    return core


class Pricing:
    """One rank's block of the options, and the ways to price it."""

    def __init__(self, first: int, count: int, seed: int, workers: int) -> None:
        self.library = str(Path(rf.__file__).with_name("_native_kernels.so"))
        self.kernel = rf.Kernel.from_library(self.library, "rfm_black_scholes")
        # At least none: where no core is spare, the rank does all of it.
        self.executor = rf.Executor(workers=(0, workers)) if workers else None
        self.empty = self.executor.empty if self.executor else np.empty
        self.options = make_options(first, count, seed, self.empty)
        self.prices = self.empty(count, "f8")
        self.cells = grid(count)
        # Cut once, as the requests are made once.
        self.pieces = [(self.options.part(cell), self.prices[cell]) for cell in self.cells]
        self.workers: dict[int, int] = {}
        self.requests: list[Any] = []
        self.splits: dict[str, Any] = {}
        if self.executor:
            places = dict(self.executor.map(whereabouts, range(16 * workers), chunksize=1))
            self.workers = {pid: core for pid, core in places.items() if pid != os.getpid()}
            self.requests = self.make_requests(self.prices)

    def make_requests(self, prices: np.ndarray) -> list[Any]:
        """A persistent request for each cell, into `prices`."""
        return [self.executor.Invoke_init(self.kernel, tuple(self.options.part(cell)), prices[cell])
                for cell in self.cells]

    def divide(self, mode: str) -> Any:
        """The split that runs the block as `mode` says, made once."""
        if mode not in self.splits:
            self.splits[mode] = self.executor.Split_init(
                self.kernel, tuple(self.options), self.prices, grain=SMALLEST,
                where={"remote": "workers", "split": "both"}[mode])
        return self.splits[mode]

    def divided(self, mode: str) -> float:
        """Seconds to price the block as a split."""
        split = self.divide(mode)
        self.wipe()
        start = time.perf_counter()
        split.Run()
        return time.perf_counter() - start

    def wipe(self) -> None:
        """Forgets all prices; the next run begins as the bare processes begin, some time later."""
        begin = time.monotonic_ns() + PAUSE_NS
        self.prices.fill(np.nan)
        while time.monotonic_ns() < begin:
            pass

    def alone(self) -> float:
        """Seconds to price the block on the rank's core."""
        self.wipe()
        start = time.perf_counter()
        self.kernel(*self.options, out=self.prices)
        return time.perf_counter() - start

    def shared(self) -> float:
        """Seconds to price the block together with the workers."""
        def price_here(piece: tuple[Options, np.ndarray]) -> None:
            self.kernel(*piece[0], out=piece[1])

        self.wipe()
        start = time.perf_counter()
        run_shared(self.pieces, self.requests, price_here, len(self.workers))
        return time.perf_counter() - start

    def killed(self) -> tuple[dict[str, Any], np.ndarray]:
        """Prices the block PASSES times over while a worker is killed: timeline in ns, float64[PASSES, n].

        The rank's bars are measured. A worker's are as long as its kernel ran and
        lie behind one another, as a worker runs its cells.
        """
        prices = self.empty((PASSES, len(self.prices)), "f8")
        prices.fill(np.nan)
        requests = [Traced(request) for row in prices for request in self.make_requests(row)]
        places = [(row, cell) for row in prices for cell in self.cells]
        killed_ns = 0
        rank: list[tuple[int, int]] = []

        def price_here(place: tuple[np.ndarray, slice]) -> None:
            nonlocal killed_ns
            if not killed_ns and len(rank) >= len(self.cells) // 2:
                os.kill(min(self.workers), signal.SIGKILL)
                killed_ns = time.monotonic_ns()
            row, cell = place
            start = time.monotonic_ns()
            self.kernel(*self.options.part(cell), out=row[cell])
            rank.append((start, time.monotonic_ns()))

        begin = time.monotonic_ns()
        run_shared(places, requests, price_here, len(self.workers))
        end = time.monotonic_ns()
        bars = timeline([traced for traced in requests if traced.seen_ns], killed_ns)
        for traced in requests:
            traced.request.Free()
        return {"begin_ns": begin, "end_ns": end, "killed_ns": killed_ns, "passes": PASSES,
                "rank": rank, "workers": bars}, prices

    def close(self) -> None:
        """Frees the requests and gives the cores back. Safe to call twice."""
        for held in (*self.requests, *self.splits.values()):
            held.Free()
        self.requests, self.splits = [], {}
        if self.executor:
            self.executor.shutdown()


def timeline(requests: Sequence[Traced], killed_ns: int) -> dict[int, list[tuple[int, int]]]:
    """Worker number → its bars (start, end), laid out from what the rank saw."""
    workers: dict[int, list[tuple[int, int]]] = {}
    for traced in sorted(requests, key=lambda traced: traced.seen_ns):
        bars = workers.setdefault(traced.request.worker, [])
        exec_ns = traced.request.exec_ns
        if bars:
            start = max(traced.started_ns, bars[-1][1])
        elif traced.started_ns < killed_ns < traced.seen_ns:
            start = traced.seen_ns - exec_ns  # handed on by the worker that was killed
        else:
            start = traced.started_ns
        bars.append((start, start + exec_ns))
    return dict(sorted(workers.items()))


class Verdict:
    """Checks run after run: the first against scipy, the others against the first, bit by bit."""

    def __init__(self) -> None:
        self.expected: np.ndarray | None = None
        self.error = 0.0
        self.runs = 0
        self.wrong: list[str] = []

    def check(self, what: str, options: Options, prices: np.ndarray) -> None:
        self.runs += 1
        if self.expected is None:
            self.error = largest_error(options, prices)
            if not self.error <= TOLERANCE:
                self.wrong.append(f"{what}: off by {self.error:.3g} (allowed {TOLERANCE:g})")
            self.expected = prices.copy()
        elif not np.array_equal(prices, self.expected):
            count = int(np.sum(prices != self.expected))
            self.wrong.append(f"{what}: {count} prices differ from those that scipy confirmed")

    def check_digests(self, what: str, parts: Sequence[slice], digests: Sequence[str]) -> None:
        self.runs += 1
        for part, digest in zip(parts, digests):
            if hashlib.blake2b(self.expected[part]).hexdigest() != digest:
                self.wrong.append(f"{what}: options {part.start} to {part.stop} differ")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--mode", action="append", choices=["local", "remote", "split", "mpi"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1973)
    parser.add_argument("--bound", action="store_true")
    parser.add_argument("--bound-shared", action="store_true")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(arguments)

    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    modes = args.mode or []
    if "mpi" in modes:
        if modes != ["mpi"]:
            parser.error("--mode mpi goes with no other: it is for several ranks")
        args.workers = 0
    if (args.bound or args.bound_shared) and comm.size > 1:
        parser.error("--bound and --bound-shared are for one rank")
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    core = pin(local.rank)
    local.Free()

    def say(text: str, where: Any = sys.stdout) -> None:
        if comm.rank == 0:
            print(text, file=where, flush=True)

    edges = [args.options * k // comm.size // ALIGN * ALIGN for k in range(comm.size)]
    first = edges[comm.rank]
    count = [*edges, args.options][comm.rank + 1] - first
    pricing = Pricing(first, count, args.seed, args.workers)
    bounds: dict[str, BareProcesses] = {}
    try:
        worker_cores = sorted(pricing.workers.values())
        config = {"options": args.options, "seed": args.seed, "ranks": comm.size,
                  "cores": comm.gather(core), "worker_cores": comm.gather(worker_cores),
                  "kernel": "rfm_black_scholes", "rounds": args.rounds}
        say(f"config   {args.options:,} distinct options, {comm.size} rank(s) on core(s) "
            f"{config['cores']}, workers on {config['worker_cores']}, {args.rounds} rounds")
        if args.workers and not pricing.workers:
            print(f"rank {comm.rank}: no core is spare here; it works alone", file=sys.stderr)

        ways: dict[str, Callable[[], float]] = {"mpi" if "mpi" in modes else "alone": pricing.alone}
        # All ranks take part in the same rounds, also one for which no core was left.
        lent = comm.allreduce(bool(pricing.workers), MPI.LOR)
        if lent and not modes:
            ways["shared"] = pricing.shared
        for mode in dict.fromkeys(modes):
            if mode in ("remote", "split") and lent:
                ways[mode] = partial(pricing.divided, mode)
        for name, memory, wanted in (("bound", "private", args.bound),
                                     ("bound_shared", "shared", args.bound_shared)):
            if wanted and pricing.workers:
                bounds[name] = BareProcesses(pricing.library, memory, [core, *worker_cores], count, args.seed)
        verdict = Verdict()
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        predicted: list[float | None] = []
        if "split" in ways:
            say("  a run to learn from", sys.stderr)
            ways["split"]()
            verdict.check("split, first", pricing.options, pricing.prices)
        # Taken in turn, so that what disturbs the machine disturbs all alike.
        for turn in range(args.rounds):
            say(f"  round {turn + 1} of {args.rounds}", sys.stderr)
            for way, run in ways.items():
                comm.Barrier()
                if way == "split":
                    predicted.append(pricing.divide(way).predict().predicted_s)
                elapsed = run()
                seconds[way].append(comm.allreduce(elapsed, MPI.MAX))
                verdict.check(way, pricing.options, pricing.prices)
            for name, processes in bounds.items():
                elapsed, digests = processes.run()
                seconds.setdefault(name, []).append(elapsed)
                verdict.check_digests(name, processes.parts, digests)
        plan = str(pricing.divide("split").predict()) if "split" in ways else None
        kill = None
        if args.kill and pricing.workers:
            say("  once more, with a worker killed in mid-run", sys.stderr)
            kill, passes = pricing.killed()
            for prices in passes:
                verdict.check("killed", pricing.options, prices)
    finally:
        for processes in bounds.values():
            processes.close()
        pricing.close()

    wrong = [line for lines in comm.allgather(verdict.wrong) for line in lines]
    error = comm.allreduce(verdict.error, MPI.MAX)
    for line in wrong:
        say(f"verdict  WRONG {line}")
    if wrong:
        return 1
    say(f"verdict  every price agrees with scipy to {error:.1g} (allowed {TOLERANCE:g}), "
        f"all {verdict.runs} runs to the last bit")
    if kill:
        say(f"         the last {PASSES} lost a worker by SIGKILL after "
            f"{(kill['killed_ns'] - kill['begin_ns']) / 1e6:.0f} ms: no price is missing")
    median = {way: statistics.median(values) for way, values in seconds.items()}
    first_way = next(iter(median))
    names = {"alone": "rank's core alone", "mpi": f"{comm.size} rank(s) alone",
             "remote": f"on {len(pricing.workers)} borrowed, alone", "split": f"split with {len(pricing.workers)}",
             "shared": f"with {len(pricing.workers)} borrowed",
             "bound": "bound: bare processes", "bound_shared": "bound, shared memory"}
    label = "rate   "
    for way, value in median.items():
        say(f"{label}  {names[way]:<22} {args.options / value / 1e6:8.1f} M options/s"
            f"   {value * 1e3:8.1f} ms   {median[first_way] / value:5.2f}x")
        label = "       "
    prediction = None
    if predicted and None not in predicted:
        prediction = statistics.median(p / s for p, s in zip(predicted, seconds["split"]))
        say(f"         predicted: {prediction:.0%} of what a split took (median of the rounds)")
    disturbed = False
    of: dict[str, float | None] = {}
    for name, where in (("bound", ""), ("bound_shared", " on shared memory")):
        of[name] = None
        if name in median:
            with_workers = next(way for way in ("shared", "split", "remote", "alone") if way in seconds)
            of[name] = statistics.median(b / s for b, s in zip(seconds[name], seconds[with_workers]))
            say(f"         {of[name]:.1%} of the bound's speed-up{where} (median of the rounds)")
    if "bound" in median:
        disturbed = max(seconds["bound"]) > 1.2 * min(seconds["bound"])
        if disturbed:
            say("         the bare processes took now more, now less: this machine has other work to do")
    if args.json and comm.rank == 0:
        report = {"config": config, "verdict": {"correct": True, "largest_error": error,
                                                "allowed": TOLERANCE, "runs": verdict.runs},
                  "seconds": seconds, "median_s": median, "of_bound": of["bound"],
                  "of_bound_shared": of["bound_shared"],
                  "predicted_s": predicted, "of_prediction": prediction, "plan": plan,
                  "disturbed": disturbed, "kill": kill}
        Path(args.json).write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        bare(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:8]))
    else:
        sys.exit(main())

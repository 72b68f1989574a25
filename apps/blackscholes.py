"""NAME
    blackscholes.py: price European options on the rank's core and on borrowed ones

PURPOSE
    Black and Scholes (1973) over distinct seeded options, as many as PARSEC's
    native input. Each MPI rank owns a block of the options, which is priced by
    its core, its workers, or both.

USAGE
    mpiexec -n 1 python apps/blackscholes.py [--options 10000000] [--kernel native|numpy]
        [--mode local|remote|split|mpi|shared]... [--workers 1] [--rounds 9] [--bound]
        [--kill] [--json FILE]

    split is divided by Executor.Split. shared is divided by this program: it cuts
    the block into cells, hands cells to its workers and prices others itself,
    until none is left; --kill kills a worker in one more such run. By default
    local and shared.

VERDICT
    In every other round calls are puts and puts are calls. Every price of the
    first round of each kind agrees with scipy, has the bits that the rank gets by
    itself, and both agree with put-call parity,
    call - put = spot - strike e^(-rate years). Later ones have the same bits.
    Nothing is constant here, so that no constant can be an older one.

    Ends with status 1, and prints no rate, where a price is wrong.

SOURCE
    F. Black, M. Scholes, The Pricing of Options and Corporate Liabilities,
    J. Political Economy 81 (1973), equation 13.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np

import rfaas_mpi as rf

BLOCK = 1 << 16       # options that are drawn together: the same for any number of ranks
ALIGN = 64            # cells are multiples of this, so each starts on a cache line
SMALLEST = 16384      # options of a cell: what a call costs is little beside that
TOLERANCE = 1e-10     # of a price; prices are up to 126, so 1e-14 is one rounding
AHEAD = 2             # cells at a worker: one that runs, one so that it never waits for the rank
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
    """The prices by numpy and scipy, float64[n]: the kernels' plain twin."""
    from scipy.special import ndtr

    spot, strike, rate, volatility, years, put = options
    spread = volatility * np.sqrt(years)
    d1 = (np.log(spot / strike) + (rate + volatility**2 / 2) * years) / spread
    sign = np.where(put, -1.0, 1.0)
    discounted = strike * np.exp(-rate * years)
    return sign * (spot * ndtr(sign * d1) - discounted * ndtr(sign * (d1 - spread)))


@rf.kernel
def black_scholes(spot: np.ndarray, strike: np.ndarray, rate: np.ndarray, volatility: np.ndarray, years: np.ndarray,
                  put: np.ndarray, out: np.ndarray) -> None:
    """The same otherwise: a call by the complementary error function, and a put by parity."""
    from scipy.special import erfc

    spread = volatility * np.sqrt(years)
    d1 = (np.log(spot / strike) + (rate + volatility**2 / 2) * years) / spread
    discounted = strike * np.exp(-rate * years)
    out[...] = (spot * erfc(d1 * -np.sqrt(0.5)) - discounted * erfc((d1 - spread) * -np.sqrt(0.5))) / 2
    out -= (spot - discounted) * put


def largest_error(options: Options, prices: np.ndarray) -> float:
    """The largest difference from the twin, over all options; NaN if one is NaN."""
    worst = 0.0
    for start in range(0, len(prices), 16 * BLOCK):
        cell = slice(start, start + 16 * BLOCK)
        error = np.max(np.abs(black_scholes_ref(options.part(cell)) - prices[cell]))
        worst = float(np.maximum(worst, error))
    return worst


def parity_error(options: Options, calls: np.ndarray, puts: np.ndarray) -> float:
    """The largest difference from put-call parity, over all options; NaN if one is NaN."""
    worst = 0.0
    for start in range(0, len(calls), 16 * BLOCK):
        cell = slice(start, start + 16 * BLOCK)
        spot, strike, rate, _, years, _ = options.part(cell)
        error = np.max(np.abs(calls[cell] - puts[cell] - spot + strike * np.exp(-rate * years)))
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


class ByHand:
    """In a split's place: the division that `run_shared` makes, with requests that are made once."""

    def __init__(self, app: BlackScholes) -> None:
        self.app = app
        # Cut once, too.
        self.pieces = [(app.options.part(cell), app.prices[cell]) for cell in app.cells]
        self.requests = app.make_requests(app.prices)

    def Run(self) -> None:
        def price_here(piece: tuple[Options, np.ndarray]) -> None:
            self.app.kernel(*piece[0], out=piece[1])

        run_shared(self.pieces, self.requests, price_here, len(self.app.executor.workers))

    def predict(self) -> common.Unforeseen:
        return common.Unforeseen()

    def Free(self) -> None:
        for request in self.requests:
            request.Free()


# --- the app -----------------------------------------------------------------------

class BlackScholes(common.App):
    """One rank's block of the options, and the ways to price it."""

    name = "blackscholes"
    small = ("--options", "100000")
    modes = ("shared",)
    default = ("local", "shared")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--options", type=common.at_least(1), default=10_000_000)
        parser.add_argument("--kernel", choices=["native", "numpy"], default="native")
        parser.add_argument("--kill", action="store_true", help="one more run, in which a worker is killed half-way")
        parser.set_defaults(seed=1973)

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        edges = [*(args.options * k // ranks // ALIGN * ALIGN for k in range(ranks)), args.options]
        first, count = edges[rank], edges[rank + 1] - edges[rank]
        self.args, self.ranks = args, ranks
        self.executor = executor
        self.kernel = black_scholes
        if args.kernel == "native":
            library = Path(rf.__file__).with_name("_native_kernels.so")
            self.kernel = rf.Kernel.from_library(library, "rfm_black_scholes")
        # The checks', which must not be those that the prices come from.
        self.local = self.kernel
        self.options = make_options(first, count, args.seed, executor.empty)
        self.put = self.options.put.copy()
        self.prices = executor.empty(count, "f8")
        self.cells = grid(count)
        # Kind of round → its prices, once scipy has confirmed them.
        self.confirmed: dict[int, np.ndarray] = {}
        self.error = 0.0
        self.kill: dict[str, Any] | None = None

    def prepare(self, turn: int) -> None:
        self.kind = turn % 2
        np.bitwise_xor(self.put, self.kind, out=self.options.put)
        self.prices.fill(np.nan)

    def split(self, where: str) -> Any:
        if where == "shared":
            return ByHand(self)
        return self.executor.Split_init(self.kernel, tuple(self.options), self.prices, grain=SMALLEST, where=where)

    def make_requests(self, prices: np.ndarray) -> list[Any]:
        """A persistent request for each cell, into `prices`."""
        return [self.executor.Invoke_init(self.kernel, tuple(self.options.part(cell)), prices[cell])
                for cell in self.cells]

    def part(self, index: int, of: int) -> Callable[[], object]:
        edges = [*(len(self.prices) * k // of // ALIGN * ALIGN for k in range(of)), len(self.prices)]
        mine = slice(edges[index], edges[index + 1])
        return self.kernel.bind(tuple(self.options.part(mine)), (self.prices[mine],))

    def check(self, turn: int) -> str:
        return self.wrong(turn % 2, self.prices)

    def wrong(self, kind: int, prices: np.ndarray) -> str:
        """What is wrong with the prices of a round of this kind; empty if nothing."""
        if kind in self.confirmed:
            count = int(np.sum(prices != self.confirmed[kind]))
            return f"{count} prices differ from those that scipy confirmed" if count else ""
        error = largest_error(self.options, prices)
        if not error <= TOLERANCE:
            return f"off by {error:.3g} (allowed {TOLERANCE:g})"
        # What is allowed is more than a millionth of the lowest prices.
        own = np.empty_like(prices)
        self.local(*self.options, out=own)
        if count := int(np.sum(prices != own)):
            return f"{count} prices are not the rank's own"
        self.error = max(self.error, error)
        self.confirmed[kind] = prices.copy()
        if len(self.confirmed) == 2:
            drawn, other = self.confirmed[0], self.confirmed[1]
            error = parity_error(self.options, np.where(self.put, other, drawn), np.where(self.put, drawn, other))
            if not error <= 2 * TOLERANCE:
                return f"calls and puts are off parity by {error:.3g} (allowed {2 * TOLERANCE:g})"
        return ""

    def work(self) -> tuple[float, str]:
        return 1e-6 * self.args.options, "M options"

    def told(self) -> str:
        text = (f"every price agrees with scipy to {self.error:.1g} (allowed {TOLERANCE:g}), "
                "calls and puts with parity, all runs of a kind to the last bit")
        if self.kill is not None:
            text += (f"\n         and {PASSES} more passes lost a worker by SIGKILL after "
                     f"{(self.kill['killed_ns'] - self.kill['begin_ns']) / 1e6:.0f} ms: no price is missing")
        return text

    def more(self) -> tuple[str, dict[str, Any]]:
        """With --kill, the timeline of a run that loses a worker."""
        problem = ""
        if self.args.kill and (pids := common.workers_of(self.executor)):
            self.kill, passes = self.killed(min(pids))
            problems = [found for prices in passes if (found := self.wrong(self.kind, prices))]
            problem = f"with a worker killed: {problems[0]}" if problems else ""
        if self.ranks > 1:
            from mpi4py import MPI

            self.error = MPI.COMM_WORLD.allreduce(self.error, MPI.MAX)
        return problem, {"kill": self.kill, "largest_error": self.error, "allowed": TOLERANCE}

    def killed(self, pid: int) -> tuple[dict[str, Any], np.ndarray]:
        """Prices the block PASSES times over while that worker is killed: timeline in ns, float64[PASSES, n].

        The rank's bars are measured. A worker's are as long as its kernel ran and
        lie behind one another, as a worker runs its cells.
        """
        prices = self.executor.empty((PASSES, len(self.prices)), "f8")
        prices.fill(np.nan)
        requests = [Traced(request) for row in prices for request in self.make_requests(row)]
        places = [(row, cell) for row in prices for cell in self.cells]
        killed_ns = 0
        rank: list[tuple[int, int]] = []

        def price_here(place: tuple[np.ndarray, slice]) -> None:
            nonlocal killed_ns
            if not killed_ns and len(rank) >= len(self.cells) // 2:
                os.kill(pid, signal.SIGKILL)
                killed_ns = time.monotonic_ns()
            row, cell = place
            start = time.monotonic_ns()
            self.kernel(*self.options.part(cell), out=row[cell])
            rank.append((start, time.monotonic_ns()))

        begin = time.monotonic_ns()
        run_shared(places, requests, price_here, len(self.executor.workers))
        end = time.monotonic_ns()
        bars = timeline([traced for traced in requests if traced.seen_ns], killed_ns)
        for traced in requests:
            traced.request.Free()
        return {"begin_ns": begin, "end_ns": end, "killed_ns": killed_ns, "passes": PASSES,
                "rank": rank, "workers": bars}, prices

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


if __name__ == "__main__":
    sys.exit(common.main(BlackScholes, __doc__))

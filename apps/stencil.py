"""NAME
    stencil.py: a star-shaped stencil on a grid, with borrowed cores where memory is shared

PURPOSE
    Each point of a square grid gets the weighted sum of its neighbours in rows and
    columns, iteration after iteration: finite differences, halo exchange and all.
    Rows are divided; ranks exchange `radius` rows with their neighbours by MPI.
    A point needs some ten operations, and its share of the arrays is 48 bytes.
    Where rank and workers share memory nothing of that travels. Over a network it
    costs more than it saves, so that the planner has to refuse.

    As the Parallel Research Kernels do it: the weights take the divergence, results
    of all iterations are added up, and the grid grows by one after each. But an
    iteration writes to another grid and another sum than it reads from: a part that
    is lost with its worker is run again, and must not be added twice. And the grid
    begins as a polynomial of degree two, so that each point has a result of its own.

USAGE
    mpiexec -n 1 python apps/stencil.py [--n 2000] [--radius 2] [--iterations 10] [--kernel native|numpy]
        [--mode local|remote|split|mpi]... [--workers 1] [--rounds 9] [--bound]
        [--json FILE]

VERDICT
    The divergence of such a polynomial is known, and the stencil has no error but
    that of rounding. In each run:
      - each point of the sum has the bits that the rank gets by itself, from a grid
        that no worker sees, and each point of the last grid is exact;
      - each point of the sum is the formula's but for rounding, and so is the mean
        of their absolute values, which is what the Parallel Research Kernels check.
    The polynomial differs in each round, the weights from the middle on, so that
    neither a result nor a constant of earlier passes for a new one.

    Ends with status 1, and prints no rate, where one of them is wrong.

SOURCE
    R. F. Van der Wijngaart and T. G. Mattson, The Parallel Research Kernels, IEEE
    High Performance Extreme Computing Conference 2014: stencil.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import rfaas_mpi as rf

LARGEST = 4         # the largest radius that stencil.c is compiled for
SCALES = (1.0, 2.0)     # what weights are times as large as: until the middle of the rounds, and after it


def star(radius: int, scale: float) -> np.ndarray:
    """The weights of the neighbours in the same column and in the same row, float64[2, 2 radius + 1]."""
    away = np.arange(-radius, radius + 1, dtype=float)
    weights = np.zeros(2 * radius + 1)
    np.divide(scale, 2 * radius * away, out=weights, where=away != 0)
    return np.stack([weights, weights])


@rf.kernel
def iteration(weights: np.ndarray, place: np.ndarray, old: np.ndarray, *rest: Any,
              out: tuple[np.ndarray, np.ndarray]) -> None:
    """The next sum and the next grid of some rows; `rest` is the grid's rows from `radius` above, and the number."""
    *rows, first = rest
    across, along = weights
    n, begin = int(place[0]), int(place[1] + first)
    radius = len(rows) // 2
    new, grown = out
    new[...] = old
    # Points that have room for the star.
    high, wide = slice(max(radius - begin, 0), max(n - radius - begin, 0)), slice(radius, n - radius)
    inner = new[high, wide]
    for k in range(-radius, radius + 1):
        if k:
            inner += across[radius + k] * rows[radius + k][high, wide]
            inner += along[radius + k] * rows[radius][high, radius + k:n - radius + k]
    np.add(rows[radius], 1.0, out=grown)


def iteration_ref(weights: np.ndarray, grid: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kernels' plain twin on a whole grid: equal but for rounding."""
    across, along = weights
    radius = len(across) // 2
    square = np.zeros((2 * radius + 1, 2 * radius + 1))
    square[:, radius] = across
    square[radius, :] += along
    new = old.copy()
    new[radius:-radius, radius:-radius] += np.einsum("ijkl,kl->ij", sliding_window_view(grid, square.shape), square)
    return new, grid + 1.0


class Polynomial:
    """The first grid of round `turn` and its divergence, at these rows and columns."""

    def __init__(self, seed: int, turn: int) -> None:
        self.a, self.b, self.c = map(int, np.random.default_rng([seed, turn]).integers(1, 5, 3))
        self.d, self.e = 100 + turn, 100

    def __call__(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (self.a * i + self.d) * i + (self.b * j + self.e) * j + self.c * i * j

    def divergence(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (2 * self.a + self.c) * i + ((2 * self.b + self.c) * j + (self.d + self.e))


class Stencil(common.App):
    name = "stencil"
    small = ("--n", "200", "--iterations", "4")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--n", type=common.at_least(1), default=2000, help="rows and columns")
        parser.add_argument("--radius", type=int, default=2, choices=range(1, LARGEST + 1), metavar="POINTS",
                            help=f"at most {LARGEST} (default: 2)")
        parser.add_argument("--iterations", type=common.at_least(1), default=10)
        parser.add_argument("--kernel", choices=["native", "numpy"], default="native")

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        n = self.n = args.n
        radius = self.radius = args.radius
        self.iterations = args.iterations
        self.rank, self.ranks = rank, ranks
        self.low, self.high = n * rank // ranks, n * (rank + 1) // ranks
        if n // ranks < radius or n <= 2 * radius:
            raise SystemExit(f"{n} rows on {ranks} rank(s) are too few for a radius of {radius}: take a larger --n")
        self.seed = args.seed
        self.middle = args.rounds // 2
        self.kernel = (common.compiled(Path(__file__).with_name("stencil.c"), "stencil_iteration")
                       if args.kernel == "native" else iteration)
        # The checks', which must not be those that the iterations are made with.
        self.local = self.kernel
        self.executor = executor
        self.weights = [star(radius, scale) for scale in SCALES]
        self.place = np.array([n, self.low])
        self.constants = [executor.put(weights) for weights in self.weights]
        self.where = executor.put(self.place)
        m = self.high - self.low
        # An iteration reads one grid and one sum, and writes the others. Grids have the neighbours' rows, too.
        self.grids = executor.empty((m + 2 * radius, n)), executor.empty((m + 2 * radius, n))
        self.sums = executor.empty((m, n)), executor.empty((m, n))
        self.turn = self.done = 0
        self._known: tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def which(self) -> int:
        """Which constant the round has."""
        return int(self.turn > self.middle)

    def first(self, turn: int) -> np.ndarray:
        """The rank's part of the first grid, with `radius` rows more at both ends."""
        return Polynomial(self.seed, turn)(*self._at(-self.radius, self.radius))

    def _at(self, above: int = 0, below: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The rank's rows and columns."""
        return (np.arange(self.low + above, self.high + below, dtype=float)[:, None],
                np.arange(self.n, dtype=float))

    def prepare(self, turn: int) -> None:
        self.turn, self.done = turn, 0
        self.grids[0][...] = self.first(turn)
        self.sums[0].fill(0.0)
        self.grids[1].fill(np.nan)
        self.sums[1].fill(np.nan)

    def _shifted(self, grid: np.ndarray, rows: slice) -> list[np.ndarray]:
        """These rows of the rank's from `radius` rows above to `radius` below: views of the same memory."""
        return [grid[rows.start + k:rows.stop + k] for k in range(2 * self.radius + 1)]

    def _inner(self, grid: np.ndarray) -> np.ndarray:
        return grid[self.radius:-self.radius]

    def exchange(self) -> None:
        """The grid that was computed gets its neighbours' rows."""
        self.done += 1
        if self.ranks == 1 or self.done == self.iterations:
            return
        from mpi4py import MPI

        comm, r, grid = MPI.COMM_WORLD, self.radius, self.grids[self.done % 2]
        above = self.rank - 1 if self.rank else MPI.PROC_NULL
        below = self.rank + 1 if self.rank + 1 < self.ranks else MPI.PROC_NULL
        comm.Sendrecv(grid[r:2 * r], above, 0, grid[-r:], below, 0)
        comm.Sendrecv(grid[-2 * r:-r], below, 1, grid[:r], above, 1)

    def split(self, where: str) -> Any:
        whole = slice(0, self.high - self.low)
        splits = [self.executor.Split_init(
            self.kernel, (constant, self.where, self.sums[k], *self._shifted(self.grids[k], whole)),
            (self.sums[1 - k], self._inner(self.grids[1 - k])), index=True, where=where)
            for constant in self.constants for k in (0, 1)]
        return common.Steps(splits, lambda: 2 * self.which() + self.done % 2, self.iterations, self.exchange)

    def part(self, index: int, of: int) -> Callable[[], object]:
        m = self.high - self.low
        rows = slice(m * index // of, m * (index + 1) // of)
        # Without communication, each one's neighbours' rows stay what they were.
        runs = [[self.kernel.bind(
            (weights, self.place, self.sums[k][rows], *self._shifted(self.grids[k], rows), np.array(rows.start)),
            (self.sums[1 - k][rows], self._inner(self.grids[1 - k])[rows])) for k in (0, 1)]
            for weights in self.weights]

        def run() -> None:
            both = runs[self.which()]
            for done in range(self.iterations):
                both[done % 2]()

        return run

    def known(self, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What must come of a round: the last grid, the sum by its formula, and the sum as the rank gets it itself."""
        if self._known is None or self._known[0] != turn:
            grid = self.first(turn)     # before each iteration, it is known
            old, new = np.zeros((2, self.high - self.low, self.n))
            scratch = np.empty_like(old)
            for _ in range(self.iterations):
                self.local(self.weights[self.which()], self.place, old,
                           *self._shifted(grid, slice(0, len(old))), 0, out=(new, scratch))
                grid += 1.0
                old, new = new, old
            formula = np.zeros_like(old)
            active = (slice(max(self.radius - self.low, 0), max(min(self.high, self.n - self.radius) - self.low, 0)),
                      slice(self.radius, self.n - self.radius))
            formula[active] = self.scale() * Polynomial(self.seed, turn).divergence(*self._at())[active]
            self._known = turn, (self._inner(grid), formula, old)
        return self._known[1]

    def scale(self) -> float:
        """What the sum is times as large as the divergence."""
        return self.iterations * SCALES[self.which()]

    def check(self, turn: int) -> str:
        last = self.iterations % 2
        found, grid = self.sums[last], self._inner(self.grids[last])
        mean = common.total(float(np.abs(found).sum()), self.ranks) / (self.n - 2 * self.radius)**2
        last_grid, formula, own = self.known(turn)
        if (bad := ~(grid == last_grid)).any():
            return f"{_first(bad, self.low)} of the grid is wrong"
        # All weights' absolute values add up to no more than twice the scale.
        rounded = 2 * self.scale() * (4 * self.radius + 4) * np.finfo(float).eps * last_grid.max()
        if (bad := ~(np.abs(found - formula) <= rounded)).any():
            return f"{_first(bad, self.low)} is not the divergence"
        if (bad := found.view(np.uint64) != own.view(np.uint64)).any():
            return f"{_first(bad, self.low)} is not the rank's own"
        middle = np.array((self.n - 1) / 2)
        wanted = self.scale() * float(Polynomial(self.seed, turn).divergence(middle, middle))
        if not abs(mean - wanted) <= 1e-12 * wanted + rounded:
            return f"the mean is {mean:.17g}, and should be {wanted:.17g}"
        return ""

    def work(self) -> tuple[float, str]:
        # As the Parallel Research Kernels count it: two operations for each point of the star, and one.
        operations = 2 * (4 * self.radius + 1) + 1
        return 1e-9 * operations * (self.n - 2 * self.radius)**2 * self.iterations, "Gflop"

    def told(self) -> str:
        return "each point has the bits of the rank's own and is the divergence, and so is their mean"


def _first(bad: np.ndarray, low: int) -> str:
    i, j = map(int, np.argwhere(bad)[0])
    return f"{bad.sum()} of {bad.size} points, the first at {(low + i, j)},"


if __name__ == "__main__":
    sys.exit(common.main(Stencil, __doc__))

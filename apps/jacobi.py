"""NAME
    jacobi.py: solve a dense linear system by Jacobi's method, with borrowed cores

PURPOSE
    x <- x + D^-1 (b - A x), sweep after sweep: iterative solvers, which use one
    matrix many times. Rows are divided. The matrix is a constant that workers
    are sent once; in a sweep only vectors travel. A sweep reads each entry of A
    once, so that memory bounds it, and not arithmetic.

USAGE
    mpiexec -n 1 python apps/jacobi.py [--n 2000] [--sweeps 40] [--kernel native|numpy]
        [--mode local|remote|split|mpi]... [--workers 1] [--rounds 9] [--bound]
        [--json FILE]

VERDICT
    b is made from a solution that is known. The rank keeps each iterate, and
    checks with a copy of the matrix that no worker sees:
      - each iterate has the bits that the rank gets by itself from the one before;
      - its distance from the solution shrinks as it must: a row's off-diagonal
        entries add up to half of its diagonal, so by half in a sweep;
      - the last one's residual b - A x, by BLAS, is within what follows from that.
    b differs in each round, the matrix from the middle on, so that neither a
    result nor a constant of earlier passes for a new one.

    Ends with status 1, and prints no rate, where one of them is wrong.

SOURCE
    Y. Saad, Iterative Methods for Sparse Linear Systems, 2nd edition, SIAM 2003,
    sections 4.1 and 4.2: the method, and why it converges.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

import rfaas_mpi as rf

SHRINKS = 0.5       # an error's largest entry, in a sweep, at least so much
MOST_SWEEPS = 45    # later ones wouldn't change x any more, and an older one would pass for them


@rf.kernel
def sweep(matrix: np.ndarray, x: np.ndarray, b: np.ndarray, low: int, first: int, out: np.ndarray) -> None:
    """Rows `first` and following of the rank's, whose own begin at row `low` of the whole."""
    rows = matrix[first:first + len(out)]
    own = low + first + np.arange(len(out))
    # Not BLAS: the bits of a row would depend on how many are asked for at once.
    np.einsum("ij,j->i", rows, x, out=out)
    np.subtract(b, out, out=out)
    out /= rows[np.arange(len(out)), own]
    out += x[own]


def sweep_ref(matrix: np.ndarray, x: np.ndarray, b: np.ndarray, low: int) -> np.ndarray:
    """The kernels' plain twin, float64[m]: equal but for rounding, since it sums as BLAS does."""
    return x[low:low + len(b)] + (b - matrix @ x) / np.diagonal(matrix, low)


def rows_of(n: int, low: int, high: int, key: list[int]) -> np.ndarray:
    """Rows low..high of a matrix, float64: the same ones however ranks divide it."""
    rows = np.empty((high - low, n))
    for i in range(low, high):
        row = rows[i - low]
        np.random.default_rng([*key, i]).random(n, out=row)
        row[i] = 0.0
        row[i] = row.sum() / SHRINKS
    return rows


class Jacobi(common.App):
    name = "jacobi"
    small = ("--n", "200", "--sweeps", "10")
    figures = ("--n", "6000", "--sweeps", "20")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--n", type=common.at_least(2), default=2000, help="unknowns")
        parser.add_argument("--sweeps", type=int, default=40, choices=range(1, MOST_SWEEPS + 1), metavar="COUNT",
                            help=f"at most {MOST_SWEEPS} (default: 40)")
        parser.add_argument("--kernel", choices=["native", "numpy"], default="native")

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        n = self.n = args.n
        self.sweeps = args.sweeps
        self.ranks = ranks
        self.edges = [n * i // ranks for i in range(ranks + 1)]
        self.low, self.high = self.edges[rank], self.edges[rank + 1]
        self.seed = args.seed
        self.middle = args.rounds // 2
        self.kernel = (common.compiled(Path(__file__).with_name("jacobi.c"), "jacobi_sweep")
                       if args.kernel == "native" else sweep)
        # The checks', which must not be those that the sweeps are made with.
        self.local = self.kernel
        self.own = [rows_of(n, self.low, self.high, [args.seed, n, which]) for which in (0, 1)]
        self.executor = executor
        self.constants = [executor.put(matrix) for matrix in self.own]
        self.x, self.b = executor.empty(n), executor.empty(self.high - self.low)
        self.next = executor.empty(self.high - self.low)
        self.iterates = np.empty((self.sweeps + 1, n))

    def now(self, turn: int) -> int:
        """Which matrix a round has."""
        return int(turn > self.middle)

    def problem(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """The solution of a round, float64[n], and the rank's part of b, from the rank's own matrix."""
        solution = 1.0 + np.random.default_rng([self.seed, self.n, 2, turn]).random(self.n)
        return solution, self.own[self.now(turn)] @ solution

    def prepare(self, turn: int) -> None:
        self.turn = turn
        self.b[...] = self.problem(turn)[1]
        self.x.fill(0.0)
        self.next.fill(np.nan)
        self.iterates.fill(np.nan)
        self.iterates[0] = self.x

    def exchange(self, done: int) -> None:
        """All ranks' rows of the iterate that was computed last become the next sweep's x."""
        if self.ranks > 1:
            from mpi4py import MPI

            counts = np.diff(self.edges)
            MPI.COMM_WORLD.Allgatherv(self.next, [self.x, counts, self.edges[:-1], MPI.DOUBLE])
        else:
            self.x[...] = self.next
        self.iterates[done] = self.x

    def split(self, where: str) -> Any:
        return Sweeps(self, [self.executor.Split_init(
            self.kernel, (constant, self.x, self.b, self.low), self.next, whole=(1,), index=True, grain=1,
            where=where) for constant in self.constants])

    def part(self, index: int, of: int) -> Callable[[], object]:
        first, last = len(self.b) * index // of, len(self.b) * (index + 1) // of
        runs = [self.kernel.bind((constant.array, self.x, self.b[first:last], np.array(self.low), np.array(first)),
                                 (self.next[first:last],)) for constant in self.constants]

        def run() -> None:
            # Without communication, all sweeps are of the same x.
            once = runs[self.now(self.turn)]
            for _ in range(self.sweeps):
                once()

        return run

    def check(self, turn: int) -> str:
        matrix = self.own[self.now(turn)]
        solution, b = self.problem(turn)
        mine = slice(self.low, self.high)
        if self.iterates[0].any():
            return "it did not begin with zeros"
        expected = np.empty(len(b))
        largest = solution.max()
        # Each sweep rounds a sum of n products, and the errors halve as x's does.
        rounded = 4 * (self.n + 8) * np.finfo(float).eps * largest
        for k in range(1, self.sweeps + 1):
            before, after = self.iterates[k - 1:k + 1]
            self.local(matrix, before, b, self.low, 0, out=expected)
            bad = expected.view(np.uint64) != after[mine].view(np.uint64)
            if bad.any():
                return (f"sweep {k}: {bad.sum()} of {bad.size} values are not the rank's own, "
                        f"the first at {self.low + int(bad.argmax())}")
            if not (error := np.abs(after - solution).max()) <= SHRINKS**k * largest + rounded:
                return f"sweep {k}: the error is {error:.2g}, and should be below {SHRINKS**k * largest:.2g}"
        left = np.abs(b - matrix @ self.iterates[-1])
        bound = (1 + SHRINKS) * np.diagonal(matrix, self.low) * (SHRINKS**self.sweeps * largest + 2 * rounded)
        if not (left <= bound).all():
            return f"the residual is {left.max():.2g}, which is not what {self.sweeps} sweeps leave"
        return ""

    def work(self) -> tuple[float, str]:
        return 2e-9 * self.n**2 * self.sweeps, "Gflop"

    def told(self) -> str:
        return (f"each of {self.sweeps} iterates has the bits of the rank's own, errors halve, "
                "and the residual is what is left")


class Sweeps(common.Turns):
    """The sweeps of a round: those of its matrix, one after another."""

    def __init__(self, app: Jacobi, splits: list[Any]) -> None:
        super().__init__(splits, lambda: app.now(app.turn))
        self.app = app

    def Run(self) -> None:
        for done in range(1, self.app.sweeps + 1):
            self.split.Run()
            self.app.exchange(done)

    def predict(self) -> Any:
        one = self.split.predict()
        return dataclasses.replace(one, **{name: value * self.app.sweeps for name in ("here_s", "split_s")
                                           if (value := getattr(one, name)) is not None})


if __name__ == "__main__":
    sys.exit(common.main(Jacobi, __doc__))

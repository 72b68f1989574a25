"""NAME
    matmul.py: multiply dense matrices on the rank's core and on borrowed ones

PURPOSE
    C = A B, the kernel of dense linear algebra. Rows of A and C are divided, B is
    a constant that workers are sent once. By BLAS (numpy), or by three plain
    loops in C. Offloading a row saves 2 n^2 operations and, over a network, costs
    16 n bytes: it pays where the matrix is large for the network.

USAGE
    mpiexec -n 1 python apps/matmul.py [--n 1000] [--kernel naive|blas]
        [--mode local|remote|split|mpi]... [--workers 1] [--rounds 9] [--bound]
        [--json FILE]

VERDICT
    Entries are whole numbers, so that every order of summation gives the same
    bits. Up to n = 2000 each entry is compared with a product that the rank made
    of its own matrices; above it, by Freivalds' check with three random vectors
    (a wrong product passes with probability below 2^-48). A differs in each
    round, B from the middle on, so that neither a result nor a constant of
    earlier passes for a new one.

    Ends with status 1, and prints no rate, where an entry is wrong.

SOURCE
    R. Freivalds, Probabilistic machines can use less running time, IFIP
    Congress 1977.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

import rfaas_mpi as rf

EXACT = 2000        # up to this n every entry is compared
LARGEST = 8         # entries are whole, from -8 to 8: sums stay below 2^53


def product_ref(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The kernels' plain twin, float64[m, n]: exact, since the entries are whole numbers."""
    return a @ b


@rf.kernel
def product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    np.matmul(a, b, out=out)


def freivalds(a: np.ndarray, b: np.ndarray, c: np.ndarray, random: np.random.Generator) -> bool:
    """True if c is a b; False if it isn't, but for a chance of 2^-48."""
    for _ in range(3):
        # All whole and below 2^53, so that nothing is rounded.
        x = random.integers(0, 1 << 16, b.shape[1]).astype(float)
        if not np.array_equal(c @ x, a @ (b @ x)):
            return False
    return True


def wrong(a: np.ndarray, b: np.ndarray, c: np.ndarray, random: np.random.Generator) -> str:
    """What is wrong with c as the product of a and b; empty if nothing."""
    if len(b) > EXACT:
        return "" if freivalds(a, b, c, random) else "it is not the product (Freivalds)"
    bad = ~(c == product_ref(a, b))
    if not bad.any():
        return ""
    return f"{bad.sum()} of {c.size} entries are wrong, the first at {tuple(map(int, np.argwhere(bad)[0]))}"


class Matmul(common.App):
    name = "matmul"
    small = ("--n", "200")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--n", type=common.at_least(1), default=1000, help="rows and columns")
        parser.add_argument("--kernel", choices=["naive", "blas"], default="naive")

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        n = self.n = args.n
        low, high = n * rank // ranks, n * (rank + 1) // ranks
        random = np.random.default_rng([args.seed, n])
        whole = random.integers(-LARGEST, LARGEST + 1, (2, n, n)).astype(float)
        self.random = np.random.default_rng()
        self.base, self.b_base = whole[0][low:high], whole[1]
        self.kernel = (common.compiled(Path(__file__).with_name("matmul.c"), "matmul_naive")
                       if args.kernel == "naive" else product)
        self.executor = executor
        self.middle = args.rounds // 2
        self.a, self.c = executor.empty(self.base.shape), executor.empty(self.base.shape)
        # Two constants: the second is another one, not the first with other contents.
        self.constants = [executor.put(self.b(turn)) for turn in (0, self.middle + 1)]

    def b(self, turn: int) -> np.ndarray:
        """B of a round, of the rank's own."""
        return self.b_base if turn <= self.middle else np.ascontiguousarray(self.b_base.T)

    def prepare(self, turn: int) -> None:
        self.turn = turn
        self.a[...] = np.roll(self.base, turn, axis=1)
        self.c.fill(np.nan)

    def split(self, where: str) -> Any:
        splits = [self.executor.Split_init(self.kernel, (self.a, constant), self.c, grain=1, where=where)
                  for constant in self.constants]
        return common.Turns(splits, lambda: int(self.turn > self.middle))

    def part(self, index: int, of: int) -> Callable[[], object]:
        rows = slice(len(self.a) * index // of, len(self.a) * (index + 1) // of)
        runs = [self.kernel.bind((self.a[rows], constant.array), (self.c[rows],)) for constant in self.constants]
        return lambda: runs[self.turn > self.middle]()

    def check(self, turn: int) -> str:
        return wrong(self.a, self.b(turn), self.c, self.random)

    def work(self) -> tuple[float, str]:
        return 2e-9 * self.n**3, "Gflop"

    def told(self) -> str:
        return "every entry equals" if self.n <= EXACT else "Freivalds' check with three vectors"


if __name__ == "__main__":
    sys.exit(common.main(Matmul, __doc__))

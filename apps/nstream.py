"""NAME
    nstream.py: add long vectors, with borrowed cores where memory is shared

PURPOSE
    A <- A + B + s C, pass after pass: what does nothing but move memory. It is the
    hardest case for borrowed cores. Where rank and workers share memory, nothing
    travels, and a second core adds as much bandwidth as the machine has left for
    it. Over a network 32 bytes would travel for two additions and a product, so
    that the planner has to refuse.

    As the Parallel Research Kernels do it, but for two things. A pass writes to
    another A than it reads from: a part that is lost with its worker is run again,
    and must not be added twice. B and C differ between elements, so that parts
    that change places are seen.

USAGE
    mpiexec -n 1 python apps/nstream.py [--length 4000000] [--passes 10] [--kernel native|numpy]
        [--mode local|remote|split|mpi]... [--workers 1] [--rounds 9] [--bound]
        [--json FILE]

VERDICT
    All are whole numbers, so that nothing is rounded: each element must have the
    bits that its number, and that of the passes, say, and the sum must be what the
    formula for all of them says. B and C differ in each round, s from the middle
    on, so that neither a result nor a constant of earlier passes for a new one.

    Ends with status 1, and prints no rate, where one of them is wrong.

SOURCE
    R. F. Van der Wijngaart and T. G. Mattson, The Parallel Research Kernels, IEEE
    High Performance Extreme Computing Conference 2014: nstream, after J. D.
    McCalpin's STREAM.
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

SCALARS = (3.0, 5.0)    # s until the middle of the rounds, and after it


@rf.kernel
def one_pass(s: np.ndarray, old: np.ndarray, b: np.ndarray, c: np.ndarray, out: np.ndarray) -> None:
    np.multiply(c, s[0], out=out)
    out += b
    out += old


def one_pass_ref(s: float, old: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The kernels' plain twin: exact, since all are whole numbers."""
    return old + b + s * c


def vectors(low: int, high: int, length: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """Elements low..high of B and C in round `turn`, float64: the same ones however ranks divide them."""
    b = np.arange(low + turn + 1, high + turn + 1, dtype=float)
    c = np.arange(length - low, length - high, -1, dtype=float)
    return b, c


def sum_of_all(length: int, turn: int, s: float, passes: int) -> float:
    """What all elements of A add up to: sums of the numbers that `vectors` counts, in a formula."""
    b = length * (length + 1) // 2 + length * turn
    c = length * (length + 1) // 2
    return float(passes * (b + int(s) * c))


class Nstream(common.App):
    name = "nstream"
    small = ("--length", "20000", "--passes", "4")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--length", type=common.at_least(1), default=4_000_000, help="elements of each vector")
        parser.add_argument("--passes", type=common.at_least(1), default=10)
        parser.add_argument("--kernel", choices=["native", "numpy"], default="native")

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        length = self.length = args.length
        self.passes = args.passes
        self.ranks = ranks
        self.low, self.high = length * rank // ranks, length * (rank + 1) // ranks
        self.middle = args.rounds // 2
        self.kernel = (common.compiled(Path(__file__).with_name("nstream.c"), "nstream_pass")
                       if args.kernel == "native" else one_pass)
        self.executor = executor
        self.constants = [executor.put(np.array([s])) for s in SCALARS]
        size = self.high - self.low
        # Passes read one A and write the other.
        self.a = executor.empty(size), executor.empty(size)
        self.b, self.c = executor.empty(size), executor.empty(size)
        self.turn = self.done = 0

    def which(self) -> int:
        """Which constant the round has."""
        return int(self.turn > self.middle)

    def prepare(self, turn: int) -> None:
        self.turn, self.done = turn, 0
        self.b[...], self.c[...] = vectors(self.low, self.high, self.length, turn)
        self.a[0].fill(0.0)
        self.a[1].fill(np.nan)

    def passed(self) -> None:
        self.done += 1

    def split(self, where: str) -> Any:
        splits = [self.executor.Split_init(self.kernel, (constant, old, self.b, self.c), new, where=where)
                  for constant in self.constants for old, new in (self.a, self.a[::-1])]
        return common.Steps(splits, lambda: 2 * self.which() + self.done % 2, self.passes, self.passed)

    def part(self, index: int, of: int) -> Callable[[], object]:
        mine = slice(len(self.b) * index // of, len(self.b) * (index + 1) // of)
        runs = [[self.kernel.bind((constant.array, old[mine], self.b[mine], self.c[mine]), (new[mine],))
                 for old, new in (self.a, self.a[::-1])] for constant in self.constants]

        def run() -> None:
            both = runs[self.which()]
            for done in range(self.passes):
                both[done % 2]()

        return run

    def check(self, turn: int) -> str:
        found = self.a[self.passes % 2]
        s = SCALARS[self.which()]
        total = common.total(float(found.sum()), self.ranks)
        bad = ~(found == self.passes * one_pass_ref(s, np.zeros(()), *vectors(self.low, self.high, self.length, turn)))
        if bad.any():
            return f"{bad.sum()} of {bad.size} elements are wrong, the first at {self.low + int(bad.argmax())}"
        expected = sum_of_all(self.length, turn, s, self.passes)
        # Sums above 2^53 are rounded.
        if not abs(total - expected) <= 1e-12 * expected:
            return f"the sum is {total:.17g}, and should be {expected:.17g}"
        return ""

    def work(self) -> tuple[float, str]:
        # As the Parallel Research Kernels count it: A twice, B and C.
        return 32e-9 * self.length * self.passes, "GB"

    def told(self) -> str:
        return "each element is exact, and their sum is the formula's"


if __name__ == "__main__":
    sys.exit(common.main(Nstream, __doc__))

"""NAME
    transport.py: how many neutrons a neutron begets in a slab, by Monte Carlo

PURPOSE
    Particle transport, the kind of criticality that reactor codes compute: bare
    slabs of Pu-239 with leakage, one energy group, isotropic scattering, of the
    thickness at which k = 1. Histories are divided; nothing travels but what they
    counted. Each starts with a neutron that is followed with all that descends
    from it for some generations, of which the first ones, whose places are not
    yet those of a chain reaction, don't count:

        k = (nu Sigma_f / Sigma_t) * collisions / neutrons

USAGE
    mpiexec -n 1 python apps/transport.py [--histories 200] [--batches 512]
        [--generations 24] [--skip 6] [--sigma 5e-4] [--kernel native|numpy]
        [--mode local|remote|split|mpi]... [--workers 1] [--rounds 9] [--bound]
        [--json FILE]

VERDICT
    Each neutron has a stream of random numbers of its own, which follows from the
    round, the history's number and its descent; tallies are whole numbers. So any
    division gives the same bits, and each batch's tallies must have those that
    the rank gets by itself. All neutrons have leaked, were captured or split.
    Rounds have streams of their own; from the middle on the material is another.
    When a material's rounds are done, |k - 1| must be at most 3 sigma, and sigma
    at most 5e-4 (one run in two hundred is unlucky; another --seed tells).

    Ends with status 1, and prints no rate, where one of them is wrong.

SOURCE
    A. Sood, R. A. Forster, D. K. Parsons, Analytical benchmark test set for
    criticality code verification, Progress in Nuclear Energy 42 (2003) 55-106:
    problems 2 and 6, PUa-1-0-SL and PUb-1-0-SL.
    G. L. Steele, D. Lea, C. H. Flood, Fast splittable pseudorandom number
    generators, OOPSLA 2014: the streams.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

import rfaas_mpi as rf

GAMMA = 0x9E3779B97F4A7C15
TALLIES = 8     # a row's; whole cache lines
ENOUGH = 1000   # histories of a batch, over all rounds of a slab: sigma is below 5e-4 then
NEUTRONS, COLLISIONS, LEAKS, CAPTURES, FISSIONS, ALL, CHILDREN = range(7)


@dataclasses.dataclass(frozen=True)
class Slab:
    """A bare slab that is critical: cross-sections per cm, half of its thickness in cm."""

    name: str
    nu: float
    fission: float
    scatter: float
    total: float
    half: float


# Problems 2 and 6 of the source.
SLABS = (Slab("PUa-1-0-SL", 3.24, 0.081600, 0.225216, 0.32640, 1.853722),
         Slab("PUb-1-0-SL", 2.84, 0.081600, 0.225216, 0.32640, 2.256751))


def mix(z: np.ndarray) -> np.ndarray:
    """64 bits from 64 bits, each of which depends on all."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The next state and number, in [0, 1), of each stream."""
    state = state + np.uint64(GAMMA)
    return state, (mix(state) >> np.uint64(11)) * 2.0**-53


@rf.kernel
def families(params: np.ndarray, key: np.ndarray, low: int, first: int, out: np.ndarray) -> None:
    """Tallies of the rank's rows from `first` on, whose own begin at row `low` of all."""
    nu, fission, scatter, total, half = params[:5]
    histories, skipped, generations = map(int, params[5:])
    numbers = np.uint64((low + first) * histories) + np.arange(1, len(out) * histories + 1, dtype=np.uint64)
    state, u = draw(mix(np.uint64(GAMMA) * numbers + key))
    x = half * (2.0 * u - 1.0)
    row = np.repeat(np.arange(len(out)), histories)
    out.fill(0)

    def count(tally: int, rows: np.ndarray) -> None:
        out[:, tally] += np.bincount(rows, minlength=len(out))

    for generation in range(generations):
        active = generation >= skipped
        born = [(x[:0], state[:0], row[:0])]
        count(ALL, row)
        if active:
            count(NEUTRONS, row)
        while len(x):
            state, u = draw(state)
            mu = 2.0 * u - 1.0
            state, u = draw(state)
            x = x + mu * (-np.log(1.0 - u) / total)
            inside = np.abs(x) <= half
            count(LEAKS, row[~inside])
            x, state, row = x[inside], state[inside], row[inside]
            if active:
                count(COLLISIONS, row)
            state, u = draw(state)
            scattered = u < scatter / total
            split = ~scattered & (u < (scatter + fission) / total)
            count(CAPTURES, row[~scattered & ~split])
            at, stream, of = x[split], state[split], row[split]
            count(FISSIONS, of)
            stream, u = draw(stream)
            children = (nu + u).astype(int)
            for child in range(children.max(initial=0)):
                has = children > child
                stream = stream + np.uint64(GAMMA)
                count(CHILDREN, of[has])
                born.append((at[has], mix(stream[has]), of[has]))
            x, state, row = x[scattered], state[scattered], row[scattered]
        x, state, row = (np.concatenate(parts) for parts in zip(*born))


def criticality(sums: Any, slab: Slab) -> tuple[float, float]:
    """k and its standard deviation, from sums over n batches: n, sums of N, C, N*N, N*C and C*C.

    Batches are independent; the ratio's deviation is the first-order one, so the
    batches should be many.
    """
    n, neutrons, collisions, nn, nc, cc = map(int, sums)
    ratio = collisions / neutrons
    # Whole numbers up to here: what cancels does so exactly.
    spread = (cc * neutrons**2 - 2 * nc * neutrons * collisions + nn * collisions**2) / neutrons**2
    factor = slab.nu * slab.fission / slab.total
    return factor * ratio, factor * math.sqrt(n / (n - 1) * spread) / neutrons


class Transport(common.App):
    name = "transport"
    small = ("--histories", "40", "--batches", "64", "--sigma", "0.02")
    # The default number of histories is for all rounds together, of which there are many then.
    figures = ("--batches", "1536")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--histories", type=common.at_least(1),
                            help=f"of a batch (default: those that make {ENOUGH} of it in a slab's rounds)")
        parser.add_argument("--batches", type=common.at_least(2), default=512,
                            help="of a round, at least 2 (default: 512)")
        parser.add_argument("--generations", type=common.at_least(1), default=24, help="at most 64 (default: 24)")
        parser.add_argument("--skip", type=common.at_least(0), default=6,
                            help="generations that don't count (default: 6)")
        parser.add_argument("--sigma", type=float, default=5e-4, help="the largest that is good enough")
        parser.add_argument("--kernel", choices=["native", "numpy"], default="native")

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        self.middle = args.rounds // 2
        self.histories = args.histories or -(-ENOUGH // max(1, min(self.middle + 1, args.rounds - self.middle)))
        if not 0 <= args.skip < args.generations <= 64 or args.batches < 2 or self.histories < 1:
            raise SystemExit("transport: 0 <= --skip < --generations <= 64, 2 <= --batches and 1 <= --histories")
        self.args = args
        self.ranks = ranks
        self.low = args.batches * rank // ranks
        rows = args.batches * (rank + 1) // ranks - self.low
        self.kernel = (common.compiled(Path(__file__).with_name("transport.c"), "transport_families")
                       if args.kernel == "native" else families)
        # The checks', which must not be those that the tallies come from.
        self.local = self.kernel
        self.params = [np.array([slab.nu, slab.fission, slab.scatter, slab.total, slab.half,
                                 self.histories, args.skip, args.generations], float) for slab in SLABS]
        self.executor = executor
        self.constants = [executor.put(params) for params in self.params]
        self.key = executor.zeros(1, np.uint64)
        self.tallies = executor.empty((rows, TALLIES), np.int64)
        # What the rank got by itself, of the round that is checked now.
        self.expected: tuple[int, np.ndarray] | None = None
        # round → what `criticality` needs of it.
        self.sums: dict[int, np.ndarray] = {}
        self.found: dict[str, str] = {}
        self.followed: list[int] = []

    def now(self, turn: int) -> int:
        """Which slab a round has."""
        return int(turn > self.middle)

    def key_of(self, turn: int) -> np.ndarray:
        return np.random.SeedSequence([self.args.seed, turn]).generate_state(1, np.uint64)

    def prepare(self, turn: int) -> None:
        self.turn = turn
        self.key[...] = self.key_of(turn)
        self.tallies.fill(-1)

    def split(self, where: str) -> Any:
        return common.Turns([self.executor.Split_init(
            self.kernel, (constant, self.key, self.low), self.tallies, whole=(1,), index=True, grain=1,
            where=where) for constant in self.constants], lambda: self.now(self.turn))

    def part(self, index: int, of: int) -> Callable[[], object]:
        first, last = len(self.tallies) * index // of, len(self.tallies) * (index + 1) // of
        runs = [self.kernel.bind((constant.array, self.key, np.array(self.low), np.array(first)),
                                 (self.tallies[first:last],)) for constant in self.constants]
        return lambda: runs[self.now(self.turn)]()

    def check(self, turn: int) -> str:
        got = self.tallies.copy()
        if self.expected is None or self.expected[0] != turn:
            expected = np.empty_like(got)
            self.local(self.params[self.now(turn)], self.key_of(turn), self.low, 0, out=expected)
            self.expected = turn, expected
        # All ranks take part in the sums, whatever one of them finds.
        self.sums[turn], followed = self.all_ranks(got)
        self.followed.append(followed)
        k = self.judged(turn)
        bad = (got != self.expected[1]).any(axis=1)
        if bad.any():
            return (f"{bad.sum()} of {bad.size} batches are not the rank's own, "
                    f"the first is {self.low + int(bad.argmax())}")
        if (got[:, ALL] != got[:, LEAKS] + got[:, CAPTURES] + got[:, FISSIONS]).any():
            return "neutrons were lost"
        return k

    def all_ranks(self, got: np.ndarray) -> tuple[np.ndarray, int]:
        """What `criticality` needs of a round, and how many neutrons were followed, over all ranks."""
        # Python's whole numbers: those of numpy may overflow.
        n, c = got[:, NEUTRONS].astype(object), got[:, COLLISIONS].astype(object)
        mine = np.array([len(got), n.sum(), c.sum(), n @ n, n @ c, c @ c, int(got[:, ALL].sum())], object)
        if self.ranks > 1:
            from mpi4py import MPI

            mine = sum(MPI.COMM_WORLD.allgather(mine))
        return mine[:-1], mine[-1]

    def judged(self, turn: int) -> str:
        """What is wrong with k, once the rounds of a slab are done."""
        if turn not in (self.middle, self.args.rounds):
            return ""
        slab = SLABS[self.now(turn)]
        of_slab = [sums for other, sums in self.sums.items() if self.now(other) == self.now(turn)]
        if any(sums[1] <= 0 for sums in of_slab):
            return f"{slab.name}: rounds without a neutron"
        k, sigma = criticality(sum(of_slab), slab)
        self.found[slab.name] = f"k = {k:.5f} +- {sigma:.5f} ({slab.name})"
        if not abs(k - 1.0) <= 3.0 * sigma:
            return f"{self.found[slab.name]} is not 1"
        if sigma > self.args.sigma:
            return f"{self.found[slab.name]} is not good enough: more --histories or --rounds, or a larger --sigma"
        return ""

    def work(self) -> tuple[float, str]:
        return 1e-6 * sum(self.followed) / len(self.followed), "million neutrons"

    def told(self) -> str:
        return f"{', '.join(self.found.values())}; each batch's tallies are the rank's own"


if __name__ == "__main__":
    sys.exit(common.main(Transport, __doc__))

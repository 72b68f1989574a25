"""NAME
    ensemble.py: the periods of thousands of pendulums, each a small run of its own

PURPOSE
    Parameter studies: many small ordinary differential equations, or molecules,
    that have nothing to do with each other. Each member is a pendulum with an
    amplitude and a length of its own, released at rest and integrated by a
    symplectic method of fourth order, for as many steps as all others. It answers
    with its key (amplitude, length, gravity), the period that it was seen to have,
    how far its energy went astray, and where it ended.

    Members are rows of a split; in remote mode they go through Executor.map, a few
    together, and each answer finds its place by its key.

USAGE
    mpiexec -n 1 python apps/ensemble.py [--members 2000] [--steps 1024]
        [--period-steps 64] [--kernel native|numpy] [--remote map|split] [--chunk 32]
        [--mode local|remote|split|mpi]... [--workers 1] [--rounds 9] [--bound]
        [--json FILE]

    --period-steps N  steps in the period of small swings: sets the step's length
    --remote HOW      how remote mode reaches the workers
    --chunk N         members in an item of Executor.map

VERDICT
    Each answer must carry the key of the member that it is for, have the bits that
    the rank gets by itself, and agree with what is known without any integration:
      - the period is 4 K(k) / omega, k = sin(amplitude / 2), within 5e-8;
      - the energy stays within 1.5e-6 of the pendulum's own, however long it swings;
      - it ends where Jacobi's elliptic functions say.
    These hold for 64 steps in a period, and go with the fourth power of a step.
    Members differ in each round, gravity from the middle on, so that neither a
    result nor a constant of earlier passes for a new one.

    Ends with status 1, and prints no rate, where one of them is wrong.

SOURCE
    I. P. Omelyan, I. M. Mryglod, R. Folk, Optimized Forest-Ruth- and Suzuki-like
    algorithms for integration of motion in many-body systems, Computer Physics
    Communications 146 (2002) 188-202: the method (PEFRL).
    L. D. Landau, E. M. Lifshitz, Mechanics, 3rd edition, 1976, paragraph 11,
    problem 1: the period.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from scipy.special import ellipj, ellipk

import rfaas_mpi as rf

GRAVITIES = (9.80665, 1.625)    # m/s^2: here, and on the moon
KEY, PERIOD, DRIFT, ANGLE, VELOCITY, SWINGS = slice(0, 3), 3, 4, 5, 6, 7
RESULTS = 8                     # a row's; whole cache lines
AMPLITUDES, LENGTHS = (0.1, 2.6), (0.2, 2.0)    # rad and m: from so much to so much
XI, LAMBDA, CHI = 0.1786178958448091, -0.2123418310626054, -0.06626458266981849

# What the method leaves with this step, about twice what was found for any amplitude:
# of the period; of the energy, in units of m g l; of the end, in rad, for each period.
STEPS_A_PERIOD = 64
PERIOD_OFF, DRIFT_OFF, END_OFF = 5e-8, 1.5e-6, 5e-7


def step(angle: np.ndarray, velocity: np.ndarray, pull: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angle and velocity a time h later; pull is g / l."""
    outer, inner = (0.5 - LAMBDA) * h * pull, LAMBDA * h * pull
    for drift, kick in ((XI, outer), (CHI, inner), (1.0 - 2.0 * (CHI + XI), inner), (CHI, outer)):
        angle = angle + drift * h * velocity
        velocity = velocity - kick * np.sin(angle)
    return angle + XI * h * velocity, velocity


def lowest(state: np.ndarray, pull: np.ndarray) -> np.ndarray:
    """When pendulums that have just gone through their lowest points were there: float64[3, n], angle first."""
    angle, velocity, time = state
    for _ in range(3):
        h = -angle / velocity
        angle, velocity = step(angle, velocity, pull, h)
        time = time + h
    return time


@rf.kernel
def swings(params: np.ndarray, members: np.ndarray, out: np.ndarray) -> None:
    """Members float64[n, 2] side by side."""
    gravity, steps, a_period = params
    amplitude, length = members.T
    pull = gravity / length
    h = 2.0 * np.pi / (a_period * np.sqrt(pull))
    energy = -np.cos(amplitude)
    angle, velocity, drift = amplitude, np.zeros(len(out)), np.zeros(len(out))
    passed = np.zeros(len(out))
    first, last = np.zeros((3, len(out))), np.zeros((3, len(out)))
    for i in range(1, int(steps) + 1):
        before = angle
        angle, velocity = step(angle, velocity, pull, h)
        drift = np.maximum(drift, np.abs(velocity * velocity / (2.0 * pull) - np.cos(angle) - energy))
        through = (before < 0.0) & (angle >= 0.0)
        if through.any():
            state = np.stack([angle, velocity, i * h])
            first = np.where(through & (passed == 0.0), state, first)
            last = np.where(through, state, last)
            passed += through
    out[:, 0], out[:, 1], out[:, 2] = amplitude, length, gravity
    out[:, PERIOD] = (lowest(last, pull) - lowest(first, pull)) / (passed - 1.0)
    out[:, DRIFT], out[:, ANGLE], out[:, VELOCITY], out[:, SWINGS] = drift, angle, velocity, passed


def exact(gravity: float, members: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Period, and angle and velocity at a time, from elliptic functions: float64[n] each."""
    amplitude, length = members.T
    omega = np.sqrt(gravity / length)
    k = np.sin(amplitude / 2)
    sn, cn, dn, _ = ellipj(omega * time, k * k)
    return (4.0 * ellipk(k * k) / omega, 2.0 * np.arcsin(k * cn / dn),
            -2.0 * k * omega * np.cos(amplitude / 2) * sn / dn)


def mapped(kernel: rf.Kernel) -> Callable[..., np.ndarray]:
    """The stateless function that map is given: some members' rows of results."""

    def run(params: np.ndarray, members: np.ndarray) -> np.ndarray:
        out = np.empty((len(members), RESULTS))
        kernel(params, members, out=out)
        return out

    return run


class Ensemble(common.App):
    name = "ensemble"
    small = ("--members", "200", "--steps", "512")

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--members", type=common.at_least(1), default=2000, help="pendulums")
        parser.add_argument("--steps", type=common.at_least(1), default=1024, help="of each")
        parser.add_argument("--period-steps", type=common.at_least(1), default=STEPS_A_PERIOD, metavar="STEPS",
                            help=f"in the period of small swings (default: {STEPS_A_PERIOD})")
        parser.add_argument("--kernel", choices=["native", "numpy"], default="native")
        parser.add_argument("--remote", choices=["map", "split"], default="map",
                            help="how remote mode reaches the workers (default: map)")
        parser.add_argument("--chunk", type=common.at_least(1), default=32,
                            help="members in an item of Executor.map (default: 32)")

    def __init__(self, args: argparse.Namespace, rank: int, ranks: int, executor: rf.Executor) -> None:
        # The widest swing takes 1.7 of the small one's periods, and begins to count after three quarters of it.
        if args.period_steps < 24 or args.steps < 8 * args.period_steps or min(args.members, args.chunk) < 1:
            raise SystemExit("ensemble: 24 <= --period-steps, 8 times as many --steps, 1 <= --members and --chunk")
        self.args = args
        self.ranks = ranks
        self.low, self.high = (args.members * (rank + i) // ranks for i in (0, 1))
        self.middle = args.rounds // 2
        self.kernel = (common.compiled(Path(__file__).with_name("ensemble.c"), "ensemble_swings")
                       if args.kernel == "native" else swings)
        # The checks', which must not be those that the results come from.
        self.local = self.kernel
        self.params = [np.array([gravity, args.steps, args.period_steps], float) for gravity in GRAVITIES]
        self.executor = executor
        self.constants = [executor.put(params) for params in self.params]
        count = self.high - self.low
        self.members, self.results = executor.empty((count, 2)), executor.empty((count, RESULTS))
        # Members' keys → rows, where answers come in any order, and what came for nobody.
        self.rows: dict[bytes, int] = {}
        self.strays = 0
        # What the rank got by itself, of the round that is checked now.
        self.expected: tuple[int, np.ndarray] | None = None
        # By how much the results were off at most, which the verdict allowed.
        self.found = dict.fromkeys(("period", "energy", "last angle", "last velocity"), 0.0)

    def now(self, turn: int) -> int:
        """Which gravity a round has."""
        return int(turn > self.middle)

    def members_of(self, turn: int) -> np.ndarray:
        """The rank's members of a round, float64[n, 2]: the same ones however ranks divide them."""
        random = np.random.default_rng([self.args.seed, turn])
        columns = [random.uniform(*limits, self.args.members) for limits in (AMPLITUDES, LENGTHS)]
        return np.stack(columns, axis=1)[self.low:self.high]

    def keys(self, turn: int) -> np.ndarray:
        """What each answer of a round has to carry, float64[n, 3]."""
        members = self.members_of(turn)
        return np.column_stack([members, np.full(len(members), GRAVITIES[self.now(turn)])])

    def prepare(self, turn: int) -> None:
        self.turn = turn
        self.members[...] = self.members_of(turn)
        self.results.fill(np.nan)
        self.rows = {key.tobytes(): row for row, key in enumerate(self.keys(turn))}
        self.strays = 0

    def split(self, where: str) -> Any:
        if where == "workers" and self.args.remote == "map":
            return common.Mapped(self.executor, mapped(self.kernel), self.items, self.take)
        # In a call numpy spends a time on each step that is the same for few members and for many.
        grain = 8 if self.args.kernel == "native" else max(8, len(self.members) // 16)
        return common.Turns([self.executor.Split_init(self.kernel, (constant, self.members), self.results, grain=grain,
                                                      where=where) for constant in self.constants],
                            lambda: self.now(self.turn))

    def items(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        params, chunk = self.params[self.now(self.turn)], self.args.chunk
        return ((params, self.members[i:i + chunk]) for i in range(0, len(self.members), chunk))

    def take(self, answers: np.ndarray) -> None:
        for answer in answers:
            row = self.rows.pop(answer[KEY].tobytes(), None)
            if row is None:
                self.strays += 1
            else:
                self.results[row] = answer

    def part(self, index: int, of: int) -> Callable[[], object]:
        mine = slice(len(self.members) * index // of, len(self.members) * (index + 1) // of)
        runs = [self.kernel.bind((constant.array, self.members[mine]), (self.results[mine],))
                for constant in self.constants]
        return lambda: runs[self.now(self.turn)]()

    def check(self, turn: int) -> str:
        if self.strays:
            return f"{self.strays} answers are for no member, or for one that was answered already"
        got, now = self.results, self.now(turn)
        bad = (got[:, KEY] != self.keys(turn)).any(axis=1)
        if bad.any():
            return f"{bad.sum()} of {bad.size} answers have another's key, the first is {self.low + int(bad.argmax())}"
        if self.expected is None or self.expected[0] != turn:
            expected = np.empty_like(got)
            self.local(self.params[now], self.members_of(turn), out=expected)
            self.expected = turn, expected
        bad = (got.view(np.uint64) != self.expected[1].view(np.uint64)).any(axis=1)
        if bad.any():
            return (f"{bad.sum()} of {bad.size} answers are not the rank's own, "
                    f"the first is {self.low + int(bad.argmax())}")
        return self.known(turn)

    def known(self, turn: int) -> str:
        """What is wrong by what is known without integration."""
        args, gravity, members = self.args, GRAVITIES[self.now(turn)], self.members_of(turn)
        small = 2.0 * np.pi * np.sqrt(members[:, 1] / gravity)
        period, angle, velocity = exact(gravity, members, args.steps / args.period_steps * small)
        # Of fourth order, and rounded in each step.
        finer = (STEPS_A_PERIOD / args.period_steps)**4
        rounded = args.steps * np.finfo(float).eps
        end = (END_OFF * finer + rounded) * args.steps / args.period_steps
        results = self.results
        for what, off, limit in (
                ("period", np.abs(results[:, PERIOD] / period - 1.0), PERIOD_OFF * finer + rounded),
                ("energy", results[:, DRIFT], DRIFT_OFF * finer + rounded),
                ("last angle", np.abs(results[:, ANGLE] - angle), end),
                ("last velocity", np.abs(results[:, VELOCITY] - velocity) * small / (2.0 * np.pi), end)):
            bad = ~(off <= limit)
            if bad.any():
                row = int(bad.argmax())
                return (f"the {what} of {bad.sum()} members is off by more than {limit:.1e}, "
                        f"first {self.low + row}, by {off[row]:.1e}")
            self.found[what] = max(self.found[what], float(off.max(initial=0.0)))
        return ""

    def more(self) -> tuple[str, dict[str, Any]]:
        if self.ranks > 1:
            from mpi4py import MPI

            self.found = {what: MPI.COMM_WORLD.allreduce(off, MPI.MAX) for what, off in self.found.items()}
        return "", {"off": self.found}

    def work(self) -> tuple[float, str]:
        return 1e-6 * self.args.members * self.args.steps, "million steps"

    def told(self) -> str:
        return (f"answers have their members' keys and the rank's own bits; periods are 4 K(k) / omega within "
                f"{self.found['period']:.1e}, energies are kept within {self.found['energy']:.1e}")


if __name__ == "__main__":
    sys.exit(common.main(Ensemble, __doc__))

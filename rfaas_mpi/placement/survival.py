"""How long an idle window lives on, given how long it has lived: the risk that a worker is evicted.

A window is the time in which a node is spare. Its *age* is known, its end mostly isn't: time limits of jobs are bounds
that tell little. Two things do: old windows live longer than young ones, and windows that began together end together.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol

__all__ = ["DAINT", "PROMETHEUS_FIB", "PROMETHEUS_VAR", "Learned", "LogNormals", "Survival", "Window",
           "cohort_stretch"]

# Nothing older was seen often enough to say more of it.
_LEAST_SURVIVAL = 1e-6


class Survival(Protocol):
    """A model of idle windows: a fact, so that it has a hash."""

    def __hash__(self) -> int: ...

    def of(self, partition: str) -> Survival:
        """The model of that partition's windows: itself, where it tells none apart."""

    def ends_within(self, age_s: float, for_s: float, cohort_size: int = 1) -> float:
        """The probability that a window of this age ends within the next `for_s` seconds."""


def cohort_stretch(cohort_size: int) -> float:
    """How long the windows of a cohort last, beside all windows: by its size, 1.2 · size^-0.31, from 16 on the same.

    Fitted to the published node states of HPC-Whisk (Przybylski et al., SC'22; two days of Prometheus, 3,616 windows):
    median idle time 137–161 s where one node was freed alone, 31–93 s where 16 or more were, 124 s over a week.
    """
    return 1.2 * min(max(cohort_size, 1), 16) ** -0.31


@dataclass(frozen=True)
class LogNormals:
    """Windows whose lengths are a mixture of log-normals: (weight, median in s, sigma of the logarithm) each.

        S(x) = Σ w · ½ erfc(ln(x / median) / (σ √2))
        P(ends within t | age a) = 1 − S(a + t) / S(a),    x scaled by cohort_stretch

    The hazard of such a mixture rises first and falls later; age helps once it falls. ValueError for weights that
    don't add up to 1, and for medians or sigmas that aren't above 0.
    """

    parts: tuple[tuple[float, float, float], ...]

    def __post_init__(self) -> None:
        if not math.isclose(sum(weight for weight, _, _ in self.parts), 1.0, abs_tol=1e-6):
            raise ValueError(f"the weights of {self.parts} must add up to 1")
        if any(weight < 0 or median <= 0 or sigma <= 0 for weight, median, sigma in self.parts):
            raise ValueError(f"weights of {self.parts} can't be negative, medians and sigmas must be above 0")

    def of(self, partition: str) -> Survival:
        """See Survival."""
        return self

    def survival(self, x: float) -> float:
        """The share of windows longer than x seconds."""
        if x <= 0:
            return 1.0
        log = math.log(x)
        total, erfc = 0.0, math.erfc
        for weight, middle, scale in self._fast:
            total += weight * 0.5 * erfc((log - middle) / scale)
        return total

    def ends_within(self, age_s: float, for_s: float, cohort_size: int = 1) -> float:
        """See Survival; a window older than all but one in a million counts as that old."""
        stretch = cohort_stretch(cohort_size)
        age = min(max(age_s, 0.0) / stretch, self._oldest)
        return 1.0 - self.survival(age + max(for_s, 0.0) / stretch) / self.survival(age)

    @cached_property
    def _fast(self) -> tuple[tuple[float, float, float], ...]:
        return tuple((weight, math.log(median), sigma * math.sqrt(2.0)) for weight, median, sigma in self.parts)

    @cached_property
    def _oldest(self) -> float:
        low, high = 0.0, 1.0
        while self.survival(high) > _LEAST_SURVIVAL:
            low, high = high, 2 * high
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.survival(middle) > _LEAST_SURVIVAL else (low, middle)
        return low


# Fitted to published traces. Prometheus: HPC-Whisk's two days (filler jobs of fixed lengths, of variable ones). Piz
# Daint: two weeks of sinfo samples in the artifact of Copik et al., IPDPS 2024; sampled each 100 s, so that the
# shortest windows are missing.
PROMETHEUS_FIB = LogNormals(((0.848, 94.0, 1.25), (0.152, 2300.0, 0.73)))
PROMETHEUS_VAR = LogNormals(((0.693, 68.0, 1.17), (0.307, 287.0, 1.34)))
DAINT = LogNormals(((0.927, 278.0, 0.95), (0.073, 3424.0, 0.72)))


@dataclass(frozen=True)
class Window:
    """A window as a manager saw it: from one age to another, and whether it ended there."""

    end_age_s: float
    ended: bool = True                         # False: still open, or given up for a reason of ours
    seen_from_s: float = 0.0                   # older than 0 where it was open before anybody looked
    cohort_size: int = 1
    share: float = 1.0                         # of the node that it ended for


@dataclass(frozen=True)
class Learned:
    """What this cluster's own windows say, and a prior model where they say little yet.

    Piecewise exponential: the hazard is one number in each bucket of (age, cohort size). With a Gamma prior its
    posterior mean is (Gelman et al., Bayesian Data Analysis, §2.6; with right-censored and left-truncated windows,
    since only events and time at risk count)

        λ = (k + ends) / (k / λ₀ + seconds at risk)

    where λ₀ is the prior model's mean hazard in the bucket and k, `strength`, says how many ends it is worth.
    """

    prior: Survival = PROMETHEUS_FIB
    strength: float = 5.0
    ends: tuple[tuple[float, ...], ...] = ()
    at_risk_s: tuple[tuple[float, ...], ...] = ()

    AGES = (0.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0)
    SIZES = (1, 2, 4, 8, 16)

    def observe(self, windows: Iterable[Window], keep: float = 1.0) -> Learned:
        """The model that knows these too; `keep` < 1 has what it knew before fade.

        ValueError for a window that ends before it begins, and for a share that is none.
        """
        ends = [[keep * value for value in row] for row in self.ends or self._zeros]
        at_risk = [[keep * value for value in row] for row in self.at_risk_s or self._zeros]
        for window in windows:
            if not 0 <= window.seen_from_s <= window.end_age_s:
                raise ValueError(f"{window} ends before it begins")
            if not 0 < window.share <= 1:
                raise ValueError(f"{window}: its share is above 0 and at most 1")
            row = self._row(window.cohort_size)
            for bucket in range(bisect_right(self.AGES, window.seen_from_s) - 1,
                                bisect_right(self.AGES, window.end_age_s)):
                inside = min(window.end_age_s, self._upper(bucket)) - max(window.seen_from_s, self.AGES[bucket])
                if inside > 0:
                    at_risk[row][bucket] += inside
            if window.ended:
                ends[row][bisect_right(self.AGES, window.end_age_s) - 1] += window.share
        return replace(self, ends=tuple(map(tuple, ends)), at_risk_s=tuple(map(tuple, at_risk)))

    def of(self, partition: str) -> Survival:
        """See Survival."""
        return self

    def ends_within(self, age_s: float, for_s: float, cohort_size: int = 1) -> float:
        """See Survival."""
        rates = self._rates[self._row(cohort_size)]
        age, until = max(age_s, 0.0), max(age_s, 0.0) + max(for_s, 0.0)
        hazard = 0.0
        for bucket in range(bisect_right(self.AGES, age) - 1, len(self.AGES)):
            begin, end = max(age, self.AGES[bucket]), min(until, self._upper(bucket))
            if begin >= until:
                break
            hazard += rates[bucket] * (end - begin)
        return -math.expm1(-hazard)

    @property
    def _zeros(self) -> tuple[tuple[float, ...], ...]:
        return ((0.0,) * len(self.AGES),) * len(self.SIZES)

    def _row(self, cohort_size: int) -> int:
        return max(0, bisect_right(self.SIZES, cohort_size) - 1)

    def _upper(self, bucket: int) -> float:
        return self.AGES[bucket + 1] if bucket + 1 < len(self.AGES) else math.inf

    @cached_property
    def _rates(self) -> tuple[tuple[float, ...], ...]:
        ends, at_risk, prior = self.ends or self._zeros, self.at_risk_s or self._zeros, _mean_rates(self.prior)
        return tuple(
            tuple((self.strength + ends[row][bucket]) / (self.strength / prior[row][bucket] + at_risk[row][bucket])
                  for bucket in range(len(self.AGES)))
            for row in range(len(self.SIZES)))


@lru_cache(maxsize=16)
def _mean_rates(prior: Survival) -> tuple[tuple[float, ...], ...]:
    """The prior's mean hazard in each bucket, by size of the cohort: the same for all that learn from it."""
    rates = []
    for size in Learned.SIZES:
        row = []
        for bucket, begin in enumerate(Learned.AGES):
            end = Learned.AGES[bucket + 1] if bucket + 1 < len(Learned.AGES) else math.inf
            width = min(end, 2 * begin + 1.0) - begin if bucket else Learned.AGES[1]
            left = 1.0 - prior.ends_within(begin, width, size)
            row.append(max(-math.log(max(left, 1e-12)) / width, 1e-9))
        rates.append(tuple(row))
    return tuple(rates)

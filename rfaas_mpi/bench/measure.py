"""The arithmetic of the benchmarks: blocks that alternate, paired differences, percentiles. Pure, but for `interleave`.

One run is a row of cycles; in each cycle every subject does one block:

    cycle 1        cycle 2        cycle 3
    raw native …   raw native …   raw native …

Neighbours in a cycle meet the same machine (same frequency, same neighbours
on the host), so the difference of two blocks of one cycle is worth more than
the difference of two averages.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# Blocks of this many invocations alternate.
BLOCK = 200


@dataclass(frozen=True)
class Subject:
    """Something that is measured.

    `block(n)` does n invocations and returns the ns of all of them; `singles(n)` returns the ns of each. `prepare(n)`
    comes before each of the two and is not measured. Without `block` a block stands for the median of its singles:
    where few fit into a block, one that the machine disturbed would be all that a mean tells.
    """

    name: str
    block: Callable[[int], int] | None = None
    singles: Callable[[int], Sequence[int]] | None = None
    prepare: Callable[[int], None] | None = None

    def once(self, count: int, run: Run) -> None:
        """One block, and the single invocations that go with it, into `run`."""
        if self.block is not None:
            self._prepared(count)
            run.blocks[self.name].append(self.block(count) / count)
        if self.singles is not None:
            self._prepared(count)
            each = self.singles(count)
            run.singles[self.name].extend(each)
            if self.block is None:
                run.blocks[self.name].append(float(statistics.median(each)))

    def _prepared(self, count: int) -> None:
        if self.prepare is not None:
            self.prepare(count)


@dataclass
class Run:
    """What one run measured: per subject, the ns per invocation of each block, and the ns of single invocations."""

    blocks: dict[str, list[float]] = field(default_factory=dict)
    singles: dict[str, list[float]] = field(default_factory=dict)


def interleave(subjects: Sequence[Subject], *, cycles: int, block: int = BLOCK,
               between: Callable[[], None] = lambda: None) -> Run:
    """One run. `between` is called before each block: it lets the side that was measured last come to rest."""
    run = Run({s.name: [] for s in subjects}, {s.name: [] for s in subjects if s.singles is not None})
    for _ in range(cycles):
        for subject in subjects:
            between()
            subject.once(block, run)
    return run


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values don't exceed (nearest rank). ValueError if empty."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no value was measured")
    rank = max(1, math.ceil(percent / 100 * len(ordered)))
    return ordered[rank - 1]


def figure(values: Sequence[float], *, unit: str, scale: float = 1.0, digits: int = 1, **more: object) -> dict:
    """p50, p99 and the count of what was measured, in `unit` (value * scale)."""
    return {"p50": round(statistics.median(values) * scale, digits),
            "p99": round(percentile(values, 99) * scale, digits),
            "count": len(values), "unit": unit, **more}


def flat(figures: Mapping[str, dict]) -> dict:
    """Plain numbers for who reads a figure by its name, and all that is known of it beside them.

    `name` is its p50 (of a difference: that of the best run), `name_p99` and `name_count` stand beside it; the figure
    itself, with its unit, its runs and its A/A, lies in `figures` under the same name.
    """
    plain: dict = {}
    for name, value in figures.items():
        plain |= {name: value["p50"], f"{name}_p99": value["p99"], f"{name}_count": value["count"]}
    return {**plain, "figures": dict(figures)}


def latency_figure(runs: Sequence[Run], name: str, *, unit: str = "ns", digits: int = 1) -> dict:
    """Single invocations of all runs; `in_blocks` is the median per invocation where only whole blocks were timed."""
    scale = {"ns": 1.0, "us": 1e-3}[unit]
    blocks = [value for run in runs for value in run.blocks[name]]
    singles = [value for run in runs for value in run.singles.get(name, [])]
    in_blocks = round(statistics.median(blocks) * scale, digits)
    return figure(singles or blocks, unit=unit, scale=scale, digits=digits, in_blocks=in_blocks)


def rate_figure(runs: Sequence[Run], name: str) -> dict:
    """Invocations per second, by block. p99 is the rate that 99 % of the blocks reach."""
    rates = [1e9 / value for run in runs for value in run.blocks[name]]
    return {"p50": round(statistics.median(rates)), "p99": round(-percentile((-rate for rate in rates), 99)),
            "count": len(rates), "unit": "1/s"}


def differences(run: Run, name: str, base: str) -> list[float]:
    """name minus base, block by block of the same cycle."""
    return [a - b for a, b in zip(run.blocks[name], run.blocks[base], strict=True)]


def over(runs: Sequence[Run], name: str, base: str, again: str, *, unit: str = "ns", digits: int = 1) -> dict:
    """What `name` costs more than `base`: the median of paired block differences of the best run.

    `again` is `base` measured a second time in the same cycles. Its difference (`aa`) should be 0: what it shows
    instead is what this machine can't resolve.
    """
    scale = {"ns": 1.0, "us": 1e-3}[unit]
    by_run = [differences(run, name, base) for run in runs]
    best = min(by_run, key=statistics.median)
    aa_by_run = [differences(run, again, base) for run in runs]
    aa = min(aa_by_run, key=lambda values: abs(statistics.median(values)))
    return figure(best, unit=unit, scale=scale, digits=digits, of="paired block differences of the best run",
                  runs=[round(statistics.median(values) * scale, digits) for values in by_run],
                  aa={**figure(aa, unit=unit, scale=scale, digits=digits),
                      "runs": [round(statistics.median(values) * scale, digits) for values in aa_by_run]})


def ratio(runs: Sequence[Run], name: str, base: str, again: str) -> dict:
    """`name` / `base`, block by block of the same cycle, with the A/A ratio beside it; of all runs.

    Not of the best one: its ratio may be small because its base was disturbed.
    """
    def ratios(run: Run, top: str) -> list[float]:
        return [a / b for a, b in zip(run.blocks[top], run.blocks[base], strict=True)]

    by_run = [ratios(run, name) for run in runs]
    aa_by_run = [ratios(run, again) for run in runs]

    def together(found: list[list[float]]) -> dict:
        return figure([value for values in found for value in values], unit="x", digits=3,
                      runs=[round(statistics.median(values), 3) for values in found])

    return {**together(by_run), "aa": together(aa_by_run)}

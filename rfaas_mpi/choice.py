"""Whether one call is run here or at a worker, from what it took before at either place. Pure: no clock.

    here  = alone * (1 + crowding * calls that run here)
    there = way + exec * (1 + calls ahead / workers)

A `Choice` is what is known of one kernel on arguments of one size. `decide` says
where the next call goes; what it took is told with `ran_here`, `ran_there` and
`probed`. Times are seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from rfaas_mpi.planner import BUDGET, COLD_PATIENCE_S, PATIENCE_S, Line

__all__ = ["Choice", "Decision", "Known", "Load"]

# Less gain than this is within what is known of it.
_GAIN = 0.97
_LEARN = 0.3
# Probes that change nothing are sent less and less often, down to this part of what may be spent on them.
_SELDOM = 64
_SPREAD_MAX = 100.0
# What the first call on the rank took may have been loading and compiling.
_SEEN_HERE = 2


class Load(NamedTuple):
    """What goes on at the moment of a call."""

    workers: int
    here: int = 0
    """Calls that run on the rank, in other threads."""
    there: int = 0
    """Calls that the workers have, or that wait for them."""
    left_s: float = math.inf
    """Until the last lease ends."""


class Decision(NamedTuple):
    """What to do with a call."""

    there: bool
    probe: bool = False
    """Run here, but have a worker run it, too: what it takes there becomes known."""
    patience_s: float = math.inf
    """How long to wait for the worker before the rank runs it after all."""


@dataclass
class Known:
    """What one kernel's calls have in common, and all of an executor's: shared by its choices."""

    pace: float = 1.0
    """How many times as long as here a kernel takes at a worker; 1 as long as nothing is known."""
    paced: bool = False
    crowding: float = 1.0
    """By how much one call that runs here makes another one longer: 1 where they share a core."""
    crowded: bool = False


_HERE = Decision(False)
_PROBE = Decision(False, probe=True)


@dataclass
class Choice:
    """What a kernel costs on arguments of one size. Not for several threads at once.

    `way` is what all such calls of an executor cost besides their kernel, by
    bytes; `way_s`, `byte_s` and `hand_s` (the rank's own part of it) are expected before that is seen.
    """

    known: Known
    way: Line = field(default_factory=Line)
    way_s: float = 60e-6
    byte_s: float = 1e-9
    hand_s: float = 100e-6
    alone: Line = field(default_factory=Line)
    there: Line = field(default_factory=Line)
    own_way: Line = field(default_factory=Line)
    runs_here: int = 0
    runs_there: int = 0
    probes: int = 0
    stalls: int = 0
    # The longest that a call lately took there, as a multiple of what was expected.
    _spread: float = 1.0
    _budget_s: float = 0.0
    # What stalls have cost: until it is earned again nothing is handed over.
    _debt_s: float = 0.0
    _seldom: int = 1

    # -- what it takes --------------------------------------------------------------------------

    def here_s(self, size: float, here: int = 0) -> float | None:
        """On the rank, beside `here` other calls; None: not known yet."""
        if not self.alone.known:
            return None
        return self.alone.at(size) * (1.0 + self.known.crowding * here)

    def exec_s(self, size: float) -> float | None:
        """The kernel alone, at a worker."""
        if self.there.known:
            return self.there.at(size)
        return self.known.pace * self.alone.at(size) if self.alone.known else None

    def travel_s(self, nbytes: float) -> float:
        """The way to a worker and back."""
        for line in (self.own_way, self.way):
            if line.known:
                return line.at(nbytes)
        return self.way_s + self.byte_s * nbytes

    def there_s(self, size: float, nbytes: float, load: Load) -> float | None:
        """At the workers, behind what they have already; None: not known yet."""
        exec_s = self.exec_s(size)
        if exec_s is None or not load.workers:
            return None
        return self.travel_s(nbytes) + exec_s * (1 + load.there // load.workers)

    # -- before a call --------------------------------------------------------------------------

    def decide(self, size: float, nbytes: float, load: Load) -> Decision:
        """Where the next call goes, with `nbytes` that travel. What it may spend on a probe is spent."""
        here = self.here_s(size, load.here)
        travel = self.travel_s(nbytes)
        if here is not None and here < travel:
            return _HERE    # whatever the kernel takes there
        there = self.there_s(size, nbytes, load)
        if not self._why_not(here, there, load):
            if here is not None and there is not None and self._budget_s > max(here - there, 0.0):
                # What the rank takes may have changed, too.
                self._budget_s = 0.0
                return _HERE
            return Decision(True, patience_s=self._patience(here, there))
        if here is None or load.there >= load.workers:
            return _HERE
        # What is known stays true for longer the more often it was seen to be.
        cost = self.hand_s + self.byte_s * nbytes
        if self._budget_s + BUDGET * here < cost * self._seldom:
            return _HERE
        self._budget_s = min(self._budget_s, cost) - cost
        self.probes += 1
        return _PROBE

    def _why_not(self, here: float | None, there: float | None, load: Load) -> str:
        """Why the rank runs the next call; "" if a worker does."""
        if not load.workers:
            return "no worker is there"
        if here is None or there is None:
            # Whoever comes while the rank is busy finds out what it takes there, once.
            first = load.here and load.there < load.workers and not self.there.known and not self._debt_s
            return "" if first else "too little is known"
        if there >= _GAIN * here:
            return "too little gained" if self.there.known or self.known.paced else "if a worker is as fast as the rank"
        if self._debt_s > 0.0:
            return "a worker did not answer in time lately"
        if self.runs_here < _SEEN_HERE and not load.here:
            return "seen only once here"
        if there > load.left_s:
            return f"the lease ends in {_time(max(load.left_s, 0.0))}"
        return ""

    def surely_here(self, size: float, here: int) -> bool:
        """Whether `decide` says so however little travels, and whatever the workers do."""
        alone = self.alone
        if not alone.known:
            return False
        way = self.own_way if self.own_way.known else self.way
        took = (alone.fixed + alone.slope * size) * (1.0 + self.known.crowding * here)
        return took < (way.fixed if way.known else self.way_s)

    def judge(self, size: float, nbytes: float, load: Load) -> tuple[bool, str]:
        """Whether a worker is expected to be done sooner, and why; nothing is changed."""
        here, there = self.here_s(size, load.here), self.there_s(size, nbytes, load)
        why = self._why_not(here, there, load)
        if here is not None and there is not None:
            if why and here < self.travel_s(nbytes):
                why = "less than the way there and back takes"
            why = f"{_time(here)} here, {_time(there)} at a worker" + (f"; {why}" if why else "")
        return not (self._why_not(here, there, load)), why

    def _patience(self, here: float | None, there: float | None) -> float:
        # To wait as long again as it takes here is at most twice of what the better of the two would have cost.
        once = max(here or 0.0, PATIENCE_S)
        if there is None:
            return once + COLD_PATIENCE_S
        # A worker that has not run it may still have to load it.
        return 2 * self._spread * there + once + (0.0 if self.there.known else COLD_PATIENCE_S)

    def patience_left(self, size: float, waited_s: float, here: int) -> float:
        """How much longer to wait for a call that a worker has had for so long, while `here` like it run on the rank.

        0: no longer. Where nothing is known, nobody is late as long as the rank has not done the same either.
        """
        known = self.here_s(size)
        if known is None:
            return waited_s if here else 0.0
        return max(0.0, self._patience(known, self.exec_s(size) if self.there.known else None) - waited_s)

    # -- after it -------------------------------------------------------------------------------

    def ran_here(self, size: float, took_s: float, others: float = 0.0) -> None:
        """The rank took this, while `others` more calls ran here on average."""
        known = self.known
        self.runs_here += 1
        self._earn(took_s)
        if others <= 0.0:
            self.alone.add(size, took_s)
        elif not self.alone.known:
            self.alone.add(size, took_s / (1.0 + known.crowding * others))
        elif (expected := self.alone.at(size)) > 0.0:
            now = min(max((took_s / expected - 1.0) / others, 0.0), 2.0)
            known.crowding += (now - known.crowding) * (_LEARN if known.crowded else 0.5)
            known.crowded = True

    def ran_there(self, size: float, nbytes: float, took_s: float, exec_s: float, ahead: int = 0) -> None:
        """A call at a worker took this in all, and its kernel that."""
        self.runs_there += 1
        self._earn(took_s)
        expected = self.exec_s(size)
        if expected:
            self._spread = max(1.0 + (self._spread - 1.0) * 0.98, min(exec_s / expected, _SPREAD_MAX))
        self._heard(size, exec_s)
        if not ahead:
            for line in (self.own_way, self.way):
                line.add(nbytes, max(took_s - exec_s, 0.0))

    def probed(self, size: float, exec_s: float) -> None:
        """What a probe's kernel took; the worker lives."""
        before = self.exec_s(size)
        self._heard(size, exec_s)
        self._debt_s = 0.0
        # Much news: look again soon.
        changed = before is None or not 0.8 * before <= exec_s <= 1.25 * before
        self._seldom = 1 if changed else min(2 * self._seldom, _SELDOM)

    def stalled(self, lost_s: float) -> None:
        """A worker did not answer in time; that was lost."""
        self.stalls += 1
        self._debt_s += lost_s
        self._seldom = 1

    def _heard(self, size: float, exec_s: float) -> None:
        self.there.add(size, exec_s)
        if self.alone.known and (here := self.alone.at(size)) > 0.0:
            known = self.known
            now = min(max(exec_s / here, 1e-3), 1e3)
            known.pace += (now - known.pace) * (_LEARN if known.paced else 1.0)
            known.paced = True

    def _earn(self, took_s: float) -> None:
        self._budget_s += BUDGET * took_s
        self._debt_s = max(0.0, self._debt_s - BUDGET * took_s)

    def guess(self, other: Choice) -> None:
        """Begins with what is known of another size: its kernel's time for each byte."""
        self.alone.guess(other.alone)
        self.there.guess(other.there)


def _time(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"

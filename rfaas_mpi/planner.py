"""How much to offload: the grid of cells, what a cell costs here and there, and who runs which. Pure.

A kernel's rows are cut into cells by its shape alone (`grid`). `Costs` learns
from live measurements what a cell takes on the rank and at a worker:

    here  = fixed + slope * rows
    there = T0 + bytes / B + fixed + slope * rows

and says before a run whether offloading pays, and how long either will take. A
`Race` decides during a run, step by step, from what has happened so far. Neither
has a clock: times come in as seconds. `simulate` runs a race against a world
that is made up, which is how predictions are tested.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Costs", "Forecast", "Grid", "Link", "Race", "Step", "What", "World", "default_grain", "grid", "simulate"]

# The largest cell and the smallest one are these parts of all rows: the first so
# that 16 workers are busy to the end, the second so that all end together.
_LARGEST = 32
_SMALLEST = 512
_TAPER = 5
# What a call on fewer bytes costs is mostly the call.
_GRAIN_BYTES = 4096

# The rank looks at what is in flight no more often than this: a look costs a few µs.
_GROUP_S = 50e-6
# A part of what workers are expected to run, handed over before the rank begins.
_AT_ONCE = 0.7
# What is learned of a cell costs the rank a few µs.
_LEARN_S = 200e-6
# And while it isn't known what a worker takes, which may become known.
_GROUP_UNKNOWN_S = 2e-3
# How long beyond its time a cell may take before it is taken for stuck, and where
# its worker may still be loading the kernel.
PATIENCE_S = 0.010
COLD_PATIENCE_S = 1.0
# A worker's first probe is the smallest cell, and cold: one that takes so many times of what the rank takes says little.
_FIRST = 4.0
# Less gain than this is within what is known of it.
_GAIN = 0.97
_LEAST_T0_S = 1e-7
# Where several cells are run by one call, it takes at least this, and so many times what one costs that does nothing.
_CALL_S = 30e-6
_CALL_FIXED = 16.0
# How many calls they are in all, before that was seen.
_CALLS = 8.0
# A kernel that takes so many times as long as before does so because of its data.
_OTHER_DATA = 1.5
# And one that takes so many times as long is other work.
_OTHER_WORK = 2.5
# Probes and second tries spend at most this part of the time; one that is disturbed is paid for as so many runs.
BUDGET = 0.01
_MOST_PAID = 4.0
# Before it is seen how much a second try loses, this part of a run is feared at the most.
_MOST_FEARED = 0.25
# By so much at the most a hand-over is believed to take longer than others.
_LATE_HAND = 1.5
# The rank alone is tried again when this part of a run with workers is spared, beyond what that is expected to lose.
_LEAST_TRY = 0.1


# --- the grid -----------------------------------------------------------------------

@dataclass(frozen=True)
class Grid:
    """Cells of rows: cell k is rows edges[k] to edges[k + 1]."""

    edges: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.edges[-1]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def cell(self, k: int) -> slice:
        return slice(self.edges[k], self.edges[k + 1])

    def size(self, k: int) -> int:
        return self.edges[k + 1] - self.edges[k]


def grid(rows: int, row_bytes: int = 0, grain: int | None = None) -> Grid:
    """The cells of `rows` rows: large ones first, smaller ones towards the end.

    They depend on the arguments alone, never on timing, workers or faults, so
    that any division of the work gives the same bits. `row_bytes` are those that
    a row has in all arrays that are divided; `grain` is the least number of rows
    of a cell (see `default_grain`). Cells but the last are multiples of it.
    """
    if grain is None:
        grain = default_grain(row_bytes)
    least = max(grain, rows // _SMALLEST)
    edges = [0]
    while edges[-1] < rows:
        left = rows - edges[-1]
        size = max(min(rows // _LARGEST, left // _TAPER), least)
        size = -(-size // grain) * grain
        # A rest that is smaller than a cell may be goes to the last one.
        edges.append(rows if left - size < least else edges[-1] + size)
    return Grid(tuple(edges))


def default_grain(row_bytes: int) -> int:
    """The least rows of a cell where nothing is said: those that make 4 KiB."""
    return max(1, _GRAIN_BYTES // row_bytes) if row_bytes else 1


# --- what things cost ------------------------------------------------------------------

class Line:
    """y = fixed + slope * x, by least squares; what is older counts less."""

    __slots__ = ("_late", "_n", "_x", "_xx", "_xy", "_y", "fixed", "slope")

    _KEEP = 0.9
    # A sample this many times as long as expected says more about the machine than
    # about the kernel; if it is the kernel, those after it say so too.
    _OUTLIER = 4.0
    _LATE = 1.5

    def __init__(self) -> None:
        self._late = False
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self.fixed = self.slope = 0.0

    @property
    def known(self) -> bool:
        return self._n > 0.0

    def add(self, x: float, y: float, weight: float = 1.0) -> None:
        """One more sample, or `weight` like it."""
        if self._n > 0.0:
            expected = self.fixed + self.slope * x
            if y * self._OUTLIER < expected:
                # Nothing is quicker than it can be by chance: what was there before was disturbed.
                self._n = self._x = self._y = self._xx = self._xy = 0.0
            else:
                # One that is late alone was disturbed; the second in succession is believed.
                late = self._n > 3.0 and y > self._LATE * expected + 1e-9
                y = min(y, (self._LATE if late and not self._late else self._OUTLIER) * expected + 1e-9)
                self._late = late
        keep = self._KEEP
        n = self._n = self._n * keep + weight
        sx = self._x = self._x * keep + weight * x
        sy = self._y = self._y * keep + weight * y
        sxx = self._xx = self._xx * keep + weight * x * x
        sxy = self._xy = self._xy * keep + weight * x * y
        spread = n * sxx - sx * sx
        # Sizes that hardly differ say nothing about what is fixed.
        if spread > 0.01 * n * sxx:
            slope = (n * sxy - sx * sy) / spread
            fixed = (sy - slope * sx) / n
            if slope >= 0.0 and fixed >= 0.0:
                self.slope, self.fixed = slope, fixed
                return
            if slope < 0.0:
                self.slope, self.fixed = 0.0, sy / n
                return
        self.fixed = 0.0 if sxx else sy / n
        self.slope = sxy / sxx if sxx else 0.0

    def forget(self) -> None:
        """Nothing was seen."""
        Line.__init__(self)

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x

    def scale(self, factor: float) -> None:
        """All that was seen was `factor` times as long."""
        self._y *= factor
        self._xy *= factor
        self.fixed *= factor
        self.slope *= factor

    def tilt(self, slope: float) -> None:
        """All that was seen was longer, by so much for each x."""
        self._y += slope * self._x
        self._xy += slope * self._xx
        self.slope += slope

    def guess(self, other: Line) -> None:
        """Takes what another line knows for a beginning, as one sample says it."""
        if other.known:
            self.fixed, self.slope = other.fixed, other.slope
            self._n, self._x, self._y, self._xx, self._xy = (
                value / other._n for value in (other._n, other._x, other._y, other._xx, other._xy))


class Link:
    """What the way to the workers costs: T0 and seconds a byte.

    An end is seen late, when the rank looks; so what is learned are bounds:
    a figure within them stays, one outside moves to the nearer one.
    """

    def __init__(self, t0_s: float = 3e-6, byte_s: float = 0.0) -> None:
        self.t0_s = t0_s
        self.byte_s = byte_s
        # What the last cells took at least: a machine that is disturbed makes some slower, hardly each of them.
        self._least = deque([t0_s], 2)

    def travelled(self, nbytes: float, least_s: float, most_s: float) -> None:
        """A cell with so many bytes was under way for at least and at most this, its kernel's time not counted."""
        wire = nbytes * self.byte_s
        self._least.append(least_s - wire)
        longer = max(self.t0_s, min(self._least))
        self.t0_s = max(_LEAST_T0_S, min(longer, most_s - wire))

    def streamed(self, nbytes: float, least_s: float, most_s: float) -> None:
        """Behind another one, a cell with so many bytes came at least and at most this later."""
        wire = nbytes * self.byte_s
        if wire < least_s:
            self.byte_s += (least_s - wire) / nbytes / 2
        elif wire > most_s:
            self.byte_s *= most_s / wire


class Forecast(NamedTuple):
    """What a run will take, in seconds."""

    here_s: float
    split_s: float
    share: float
    """The part of the cells' time that workers take."""


class _Course:
    """How one way to run has gone: by how much predictions were wrong, and how often it was gone."""

    __slots__ = ("_ratios", "last_s", "ratio", "runs")

    def __init__(self) -> None:
        self.forget()
        self.runs = 0
        self.last_s = 0.0

    def forget(self) -> None:
        """What was predicted so far says nothing of what will be."""
        # Three wrong ones in succession say that it is so: it isn't run again soon then, and nothing else would.
        self._ratios = deque([1.0, 1.0, 1.0], 5)
        self.ratio = 1.0

    def ran(self, predicted_s: float, took_s: float) -> None:
        self.last_s = took_s
        self.runs += 1
        if predicted_s > 0.0:
            # The middle one: a run that was disturbed says nothing of the next.
            self._ratios.append(min(max(took_s / predicted_s, 0.25), 4.0))
            last = sorted(self._ratios)
            self.ratio = (last[(len(last) - 1) // 2] + last[len(last) // 2]) / 2


@dataclass
class Costs:
    """What one kernel on one shape of rows costs, learned from each run. Not for several threads at once.

    `row_bytes` are what travels for each row, `cell_bytes` for each cell; 0 where
    memory is shared.
    """

    link: Link
    row_bytes: float = 0.0
    cell_bytes: float = 0.0
    hand_s: float = 2e-6
    """What the rank is expected to spend on a cell to hand it over, before that was seen."""
    hand_byte_s: float = 0.0
    """And on each of its bytes."""
    board: bool = False
    """Cells are taken from a board by rank and workers, and none is handed over."""
    rowwise: bool = False
    """One call may run several cells that follow each other."""
    alone: Line = field(default_factory=Line)
    beside: Line = field(default_factory=Line)
    there: Line = field(default_factory=Line)
    handing: Line = field(default_factory=Line)
    # What the first of a run takes longer: a worker that has slept is woken.
    waking: Line = field(default_factory=Line)
    # How much longer than `there` each worker takes.
    pace: dict[int, float] = field(default_factory=dict)
    # By how many calls a run on a board was done, where one may run several cells.
    calls: float = _CALLS
    stalls: int = 0
    here: _Course = field(default_factory=_Course)
    split: _Course = field(default_factory=_Course)
    _budget_s: float = 0.0
    # The last decision was to try again what seemed not to pay: workers, or the rank alone.
    _tried: bool = False
    _tried_here: bool = False
    # Lines whose last sample of a whole run was much later than expected.
    _late: set[Line] = field(default_factory=set)
    # Of the lines `beside` and `there`, when `alone` was last seen or followed them.
    _level: tuple[float, ...] = ()
    # Of cells of so many rows: those of another run may have fewer.
    _level_rows: float = 0.0
    # What the rank alone was expected to take when `split` was last gone.
    _split_level: float = 0.0
    # Of the line `alone`, for the cells of a run, when one was divided last.
    _divided_s: float = 0.0
    _said: tuple[str, Forecast | None, int] = ("nothing is known of it yet", None, 0)

    @property
    def why(self) -> str:
        """Why the last decision was what it was."""
        text, found, workers = self._said
        if found is None:
            return text
        if not self.there.known:
            return f"{_time(found.here_s)} here; {text}"
        what = f"{_time(found.here_s)} here, {_time(found.split_s)} with {workers} worker{'s' if workers > 1 else ''}"
        return f"{what}; {text}" if text else what

    def said_s(self, *, offload: bool) -> float:
        """What the last decision expected a run to take; 0: it was not known."""
        found = self._said[1]
        return 0.0 if found is None else found.split_s if offload else found.here_s

    def guess(self, other: Costs) -> None:
        """Begins with what is known of another number of such rows."""
        for mine, its in ((self.alone, other.alone), (self.beside, other.beside), (self.there, other.there),
                          (self.handing, other.handing), (self.waking, other.waking)):
            mine.guess(its)

    def bytes_of(self, rows: float) -> float:
        return self.cell_bytes + self.row_bytes * rows

    @property
    def local(self) -> Line:
        """What a cell takes on the rank while workers are busy."""
        return self.beside if self.beside.known else self.alone

    @property
    def begin_s(self) -> float:
        """Seconds of the rank's until its workers are told of a run."""
        return self.waking.at(0.0) if self.waking.known else self.hand_s

    def hand(self, nbytes: float) -> float:
        """Seconds of the rank's to hand a cell over and take its end."""
        return self.handing.at(nbytes) if self.handing.known else self.hand_s + self.hand_byte_s * nbytes

    def handed_over(self, nbytes: float, seconds: float) -> None:
        """The rank has spent this on handing a cell over."""
        # Those to a worker that slept take many times as long, and wherever that is believed none is handed over any
        # more that would say otherwise. Where it is the way that is slow, many say so.
        expected = self.hand(nbytes)
        if not self.handing.known:
            self.handing.add(nbytes, expected)
        self.handing.add(nbytes, min(seconds, _LATE_HAND * expected))

    def ran_alone(self, rows: float, seconds: float, count: int) -> None:
        """The rank has run all of it, `count` cells of so many rows on average."""
        alone = self.alone
        before, slope = alone.at(rows), alone.slope
        alone.add(rows, seconds / count)
        if before <= 0.0:
            return
        # What makes the kernel slower here, such as other data, does so there: nobody else would ever find out. It is
        # its rows that take longer, and not what a call costs whatever it does.
        now = alone.at(rows)
        for line in (self.beside, self.there):
            if now <= before:
                line.scale(now / before)
            elif line.known:
                alike = min(max(line.slope / slope, 0.25), 4.0) if slope > 0.0 and line.slope > 0.0 else 1.0
                line.tilt((now - before) / rows * alike)
        if self._level:
            self._level = self._levels()
        if self._divided_s > 0.0 and now > _OTHER_DATA * self._divided_s:
            # By how much predictions were wrong when it took so much less.
            self.split.forget()
            self._divided_s = now

    def ran_there(self, worker: int, rows: float, exec_s: float) -> None:
        """A cell of so many rows took this at a worker."""
        if self.there.known and (expected := self.there.at(rows)) > 0.0:
            now = min(max(exec_s / expected, 0.1), 10.0)
            pace = self.pace.get(worker, 1.0)
            self.pace[worker] = pace + (now - pace) * 0.3
        self.there.add(rows, exec_s)

    def probed(self, worker: int, rows: float, exec_s: float, *, cold: bool) -> None:
        """A probe of so many rows took this at a worker; `cold` if it was the kernel's first there."""
        if self.there.known or not cold or exec_s <= _FIRST * self.alone.at(rows):
            self.ran_there(worker, rows, exec_s)

    def ran_some(self, rows: int, cells: int, seconds: float, *, worker: int | None, beside: bool = True) -> None:
        """So many cells of so many rows took this in all: at a worker, or on the rank, `beside` workers or alone."""
        self._ran(((rows / cells, seconds / cells, max(1.0, cells / 2)),), worker, beside)

    def ran_calls(self, calls: Sequence[tuple[int, float]], *, worker: int | None, beside: bool = True) -> None:
        """As `ran_some`: calls of so many rows each took so long."""
        # The longest one, and the others: what a call costs whatever it does shows in how they differ.
        longest = max(calls)
        samples = [(float(longest[0]), longest[1], 1.0)]
        if (others := len(calls) - 1) > 0:
            rows = sum([call[0] for call in calls]) - longest[0]
            seconds = sum([call[1] for call in calls]) - longest[1]
            samples.append((rows / others, seconds / others, max(1.0, others / 2)))
        self._ran(samples, worker, beside)

    def _ran(self, samples: Sequence[tuple[float, float, float]], worker: int | None, beside: bool) -> None:
        """Rows, seconds and weight of each sample."""
        line = self.there if worker is not None else self.beside if beside else self.alone
        took = sum([y for _, y, _ in samples])
        expected = sum([line.at(x) for x, _, _ in samples])
        if worker is not None and expected > 0.0:
            pace = self.pace.get(worker, 1.0)
            self.pace[worker] = pace + (min(max(took / expected, 0.1), 10.0) - pace) * 0.3
        # What is late once was disturbed; twice, it is how things are now.
        late = line.known and took > _OTHER_DATA * expected
        if late and line in self._late:
            line.forget()
            self.split.forget()
            late = False
        (self._late.add if late else self._late.discard)(line)
        for sample in samples:
            line.add(*sample)

    def least_rows(self, rows: int, workers: int) -> int:
        """Where one call may run several cells: the rows that it has at least, of so many in all; 0: not known.

        So many that what a call costs whatever it does is little of it; and few enough that the slowest of those who
        take part is not waited for, if it takes twice what is expected.
        """
        mine, theirs = self.local, self.there
        if not self.rowwise or not mine.known or not theirs.known:
            return 0
        slower = self.slowest()
        # Workers that are not alike say little of what a call costs.
        want = max(_CALL_S, _CALL_FIXED * mine.fixed) / max(mine.slope, 1e-12)
        here, there = max(mine.at(rows), 1e-9), max(theirs.at(rows), 1e-9)
        part = 1 / max(here, there * slower) / (1 / here + workers / there)
        return int(min(want, rows * part / 2))

    def slowest(self) -> float:
        """How much longer than expected the slowest worker takes."""
        return max(1.0, *list(self.pace.values())) if self.pace else 1.0

    def forget(self, workers: Sequence[int]) -> None:
        """Only these workers are there now."""
        for worker in [known for known in self.pace if known not in workers]:
            del self.pace[worker]

    def forecast(self, cells: Grid, workers: int) -> Forecast | None:
        """How long it takes here and divided, as if workers were many small ones; None where too little is known."""
        if not self.alone.known:
            return None
        count, rows = 1 if self.rowwise else len(cells), cells.rows
        if not len(cells):
            return Forecast(0.0, 0.0, 0.0)
        here = count * self.alone.fixed + self.alone.slope * rows
        if self.beside.known and not self.here.runs:
            # Nothing is slower alone. Of a kernel that was always divided only its first cell was run so, with much
            # that was done for the first time.
            here = min(here, count * self.beside.fixed + self.beside.slope * rows)
        if not self.there.known or not workers:
            return Forecast(here * self.here.ratio, here * self.here.ratio, 0.0)
        mine = count * self.local.fixed + self.local.slope * rows
        if self.board:
            begin = self.begin_s
            if self.rowwise:
                mine += (self.calls - 1) * self.local.fixed
                count = self.calls
            theirs = (count * self.there.fixed + self.there.slope * rows) / workers
            split = (1 + begin / max(mine, 1e-9) + (begin + self.link.t0_s) / max(theirs, 1e-9)) / (
                1 / max(mine, 1e-9) + 1 / max(theirs, 1e-9))
            share = min(max(1 - (split - begin) / max(mine, 1e-9), 0.0), 1.0)
            return Forecast(here * self.here.ratio, (split if share else here) * self.split.ratio, share)
        # It is the large cells that are handed over.
        large = cells.edges[1]
        handed = rows / large
        nbytes = self.bytes_of(large)
        hand = handed * self.hand(nbytes)
        wire = nbytes * self.link.byte_s
        pool = handed * max(self.there.at(large) / workers, wire)
        begin = self.link.t0_s + wire
        share = (mine - begin) / (mine - hand + pool) if mine > max(begin, hand) else 0.0
        share = min(max(share, 0.0), 1.0)
        split = self.waking.at(0.0) + (1 - share) * mine + share * hand if share else here
        return Forecast(here * self.here.ratio, split * self.split.ratio, share)

    def decide(self, cells: Grid, workers: int) -> bool | None:
        """Whether to offload; None where that isn't known yet. `why` says why."""
        self._tried = self._tried_here = False
        if not workers:
            self._said = "no worker is there", None, 0
            return False
        if not len(cells):
            self._said = "there are no rows", None, 0
            return False
        found = self.forecast(cells, workers)
        if found is None or not self.there.known:
            if found is not None and found.here_s < 4 * (self.link.t0_s + self.hand(0.0)):
                self._said = "that is less than the way there and back takes", found, workers
                return False
            self._said = "what it takes at a worker is not known yet", found, workers
            return None
        if found.split_s < _GAIN * found.here_s and found.share > 0.0:
            # Where cells are handed over nothing is seen of the rank alone any more.
            self._tried_here = not self.board and self._budget_s > found.here_s - found.split_s + _LEAST_TRY * found.split_s
            self._said = "run here again, to see" if self._tried_here else "", found, workers
            return not self._tried_here
        text = "too little gained" if found.share > 0.0 else "to hand a cell over takes as long as to run it"
        costs = self.begin_s + self.link.t0_s if self.board else 2 * self.hand(self.bytes_of(cells.edges[1]))
        costs += min(max(found.split_s - found.here_s, 0.0), _MOST_FEARED * found.here_s)
        self._tried = self._budget_s > costs
        if self._tried:
            # What it really loses is paid when that is known.
            self._budget_s = costs
            self._said = f"{text}, but tried again", found, workers
            return True
        self._said = text, found, workers
        return False

    def foresee(self, cells: Grid, workers: int) -> tuple[bool | None, str]:
        """What `decide` would say now, and why; nothing is changed."""
        kept = self._said, self._budget_s, self._tried, self._tried_here
        try:
            return self.decide(cells, workers), self.why
        finally:
            self._said, self._budget_s, self._tried, self._tried_here = kept

    def may_probe(self, cells: Grid, cost_s: float) -> bool:
        """Whether there is time to spend on a probe; if so, it is spent."""
        if not self.can_probe(cells, cost_s):
            return False
        self._budget_s -= cost_s
        return True

    def can_probe(self, cells: Grid, cost_s: float) -> bool:
        """What `may_probe` would say; nothing is spent."""
        found = self.forecast(cells, 0)
        return found is not None and self._budget_s + BUDGET * found.here_s >= cost_s

    def _follow(self, rows: float) -> None:
        """What the rank takes alone changes with what it takes beside workers and they take, where both change by much.

        One of them alone says more about how they disturb each other than about the kernel.
        """
        if not self._level:
            self._level_rows = rows
        levels = self._levels()
        if not self._level or min(levels) <= 0.0 or min(self._level) <= 0.0:
            self._level = levels
            return
        least, most = sorted(now / before for now, before in zip(levels, self._level, strict=True))
        changed = least if least > 1.0 else most if most < 1.0 else 1.0
        if not 1 / _OTHER_DATA < changed < _OTHER_DATA:
            self.alone.scale(changed)
            self._level = levels

    def _levels(self) -> tuple[float, float]:
        return self.beside.at(self._level_rows), self.there.at(self._level_rows)

    def ran(self, cells: Grid, workers: int, took_s: float, *, offloaded: bool, stalled: bool = False,
            before_s: float = 0.0, once_s: float = 0.0) -> None:
        """A run is over: `offloaded` if workers ran some of it. Those before it that were not told took `before_s`.

        `once_s`: of its time, what was spent on what needs no doing again.
        """
        tried, tried_here = self._tried, self._tried_here
        self._tried = self._tried_here = False
        self._budget_s += BUDGET * (took_s + before_s)
        self.stalls += stalled
        found = self.forecast(cells, workers)
        if found is None:
            return
        if tried:
            self._budget_s -= min(max(took_s - found.here_s, 0.0), _MOST_PAID * found.here_s)
        elif tried_here:
            self._budget_s = -min(max(took_s - found.split_s, 0.0), _MOST_PAID * found.split_s)
        took_s -= once_s
        level = found.here_s / self.here.ratio
        if not 1 / _OTHER_WORK < level / max(self._split_level, 1e-12) < _OTHER_WORK:
            # How far predictions were off for much less or much more work says nothing.
            self.split.forget()
            self._split_level = level
        if offloaded:
            self._divided_s = self.alone.at(cells.rows if self.rowwise else cells.rows / len(cells))
            self._follow(cells.rows / (self.calls if self.rowwise else len(cells)))
            if self.split.runs == 0:
                # It began with nothing known: what it took says nothing of the next one.
                self.split.runs, self.split.last_s = 1, took_s
            else:
                self.split.ran(found.split_s / self.split.ratio, took_s)
        else:
            if tried:
                # Nothing was handed over after all, since that is said to cost so much; those who said so were cold.
                self.handing.scale(0.5)
            self.here.ran(found.here_s / self.here.ratio, took_s)


def _time(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"


# --- one run ------------------------------------------------------------------------------

class What(enum.Enum):
    """What to do next."""

    RUN = 1      # cells first to stop, here
    HAND = 2     # cells first to stop, to the workers
    TAKE = 3     # cell first, back from them if none has begun it, to run it here
    WAIT = 4     # until one in flight has ended, or for at most `wait_s`
    GIVE_UP = 5  # on what is in flight: stop who runs it, and run it here
    DONE = 6


class Step(NamedTuple):
    what: What
    first: int = 0
    stop: int = 0
    wait_s: float = 0.0


_DONE = Step(What.DONE)
_GIVE_UP = Step(What.GIVE_UP)


class Race:
    """Who runs which cell of one run: the rank, or a worker.

    Cells are handed over in order; each goes to whoever is free, so that workers
    that are slower, farther or shared get fewer. One is handed over only if it is
    expected back before the rank alone could have finished the rest without it.
    Ask `next`, do it, and report with `ran`, `handed`, `ended` or `taken`.
    """

    def __init__(self, cells: Grid, costs: Costs, workers: int, *, use: bool | None = None, cold: bool = False,
                 can_take: bool = False) -> None:
        """`can_take`: what no worker has begun can be taken back, so that many may be handed over at once."""
        self.can_take = can_take
        self.cells = cells
        self.costs = costs
        self.workers = workers
        self.cold = cold
        self.offloaded = False
        self.stalled = False
        # None: not known yet; asked again as soon as more is known.
        self.use = use
        self._edges = cells.edges
        self._head, self._tail = 0, len(cells)
        self._slowest = costs.slowest()
        # Cells in flight, oldest first, and what each is expected to take of the workers.
        self._flying: dict[int, float] = {}
        self._handed_at: dict[int, float] = {}
        # The one that had nothing ahead of it.
        self._first = -1
        self._asked: set[int] = set()
        self._ends = 0
        # Calls that are not of this run, and keep workers busy from which nothing can be taken back.
        self.others = 0
        # Time that the workers need for what is in flight, as of `_as_of`.
        self._backlog = 0.0
        self._as_of = 0.0
        # When the last end was seen, and when the rank had looked before that.
        self._progress = 0.0
        self._before = 0.0

    @property
    def flying(self) -> dict[int, float]:
        return self._flying

    def next(self, now: float) -> Step:
        """What to do at this moment."""
        head, tail = self._head, self._tail
        costs = self.costs
        if head < tail:
            if not costs.alone.known and not self._flying:
                return Step(What.RUN, tail - 1, tail)
            if self.use is None and costs.there.known:
                self.use = costs.decide(self.cells, self.workers)
            if self.use and self.workers:
                if self.can_take and not self.offloaded and (many := self._at_once()):
                    return Step(What.HAND, head, head + many)
                cell = self._to_hand(now)
                if cell >= 0:
                    return Step(What.HAND, cell, cell + 1)
            return Step(What.RUN, head, self._group(now))
        if not self._flying:
            return _DONE
        backlog = self._drained(now)
        for cell in reversed(self._flying):
            if cell not in self._asked and costs.alone.at(self.cells.size(cell)) < backlog:
                self._asked.add(cell)
                return Step(What.TAKE, cell, cell + 1)
            break
        left = self._progress + self._patience() - now
        if left <= 0.0:
            self.stalled = True
            return _GIVE_UP
        return Step(What.WAIT, wait_s=left)

    def _patience(self) -> float:
        costs = self.costs
        longest = max(self.cells.size(cell) for cell in self._flying)
        once = costs.there.at(longest) + costs.link.t0_s + costs.bytes_of(longest) * costs.link.byte_s
        return 2 * once + PATIENCE_S + (COLD_PATIENCE_S if self.cold else 0.0)

    def _local(self, first: int, stop: int) -> float:
        line = self.costs.local
        calls = min(1, stop - first) if self.costs.rowwise else stop - first
        return calls * line.fixed + line.slope * (self._edges[stop] - self._edges[first])

    def _at_once(self) -> int:
        """How many cells to begin with: most of what workers are expected to run; each later look costs more."""
        costs, cells = self.costs, self.cells
        if not costs.there.known or self.cold:
            return 0
        found = costs.forecast(cells, self.workers)
        if found is None or costs.local.at(cells.edges[1]) <= costs.hand(costs.bytes_of(cells.edges[1])):
            return 0
        # What a slow worker holds the others can't have before it is taken back.
        part = found.share * _AT_ONCE / (1.0 if self.workers == 1 else self._slowest)
        return max(0, bisect_right(self._edges, part * cells.rows, hi=self._tail + 1) - 1 - self._head)

    def _group(self, now: float) -> int:
        """Where the cells end that the rank runs before it looks again."""
        head, tail = self._head, self._tail
        if self.use is False and not self._flying:
            return tail
        if not self.costs.alone.known:
            return head + 1
        rest = self._local(head, tail)
        if self.use:
            # While the workers have enough to do, nothing is lost by not looking.
            most = min(max(_GROUP_S, self._drained(now) / 2) if self.can_take else _GROUP_S, rest / 4)
        else:
            most = max(_GROUP_S, min(rest / 8, _GROUP_UNKNOWN_S))
        line, edges = self.costs.local, self._edges
        fixed, slope = line.fixed, line.slope
        stop, left = head + 1, most - fixed - slope * (edges[head + 1] - edges[head])
        fixed = 0.0 if self.costs.rowwise else fixed
        while stop < tail:
            left -= fixed + slope * (edges[stop + 1] - edges[stop])
            if left < 0.0:
                break
            stop += 1
        return stop

    def _drained(self, now: float) -> float:
        passed = now - self._as_of
        if passed > 0.0:
            self._backlog = max(0.0, self._backlog - passed)
            self._as_of = now
        return self._backlog

    def _to_hand(self, now: float) -> int:
        """The cell to hand over now, or -1."""
        costs, link = self.costs, self.costs.link
        head, tail = self._head, self._tail
        if self.others and len(self._flying) >= self.workers - self.others:
            return -1
        backlog = self._drained(now) + max(0.0, self._as_of - now)
        size = self._edges[head + 1] - self._edges[head]
        nbytes = costs.bytes_of(size)
        group = max(self._local(head, head + 1), _GROUP_S)
        if len(self._flying) >= 2 * self.workers and backlog > 1.5 * (group + link.t0_s + nbytes * link.byte_s):
            return -1
        # The rank alone could do the rest without it in this time, and with the other workers in that.
        alone = together = self._local(head, tail)
        if self.workers > 1:
            there = costs.there
            all_there = (tail - head) * there.fixed + there.slope * (self._edges[tail] - self._edges[head])
            together = (alone + backlog) / (1.0 + (self.workers - 1) * alone / max(all_there, 1e-9))
        # The next one; or the smallest, where the next would keep a slow worker too long.
        for cell in (head, tail - 1):
            size = self._edges[cell + 1] - self._edges[cell]
            nbytes = costs.bytes_of(size)
            hand = costs.hand(nbytes)
            if costs.local.at(size) <= hand:
                continue
            # Where a worker is free it begins at once; else after its part of what is in flight.
            queued = backlog if len(self._flying) >= self.workers else 0.0
            exec_s = costs.there.at(size)
            slower = exec_s * (self._slowest - 1.0)
            if queued + hand + link.t0_s + nbytes * link.byte_s + exec_s + slower < alone and slower < 2 * together:
                return cell
        return -1

    def handed(self, cell: int, now: float) -> None:
        """The cell was handed over."""
        if cell == self._head:
            self._head += 1
        else:
            self._tail -= 1
        costs = self.costs
        size = self.cells.size(cell)
        wire = costs.bytes_of(size) * costs.link.byte_s
        if not self._flying:
            self._progress = self._before = now
            self._first = cell
            self._backlog = 0.0
            self._as_of = now + costs.link.t0_s + wire
        need = max(costs.there.at(size) / self.workers, wire)
        self._drained(now)
        self._backlog += need
        self._flying[cell] = need
        self._handed_at[cell] = now
        self.offloaded = True

    def ended(self, cell: int, now: float, looked: float, worker: int = 0, exec_s: float = 0.0,
              anew: bool = False) -> None:
        """A cell came back from a worker; `looked` is when it was last seen in flight.

        `anew`: it had to be set up there, so that its way says nothing of others'.
        """
        self._drained(now)
        self._flying.pop(cell)
        handed = self._handed_at.pop(cell)
        if not self._flying:
            self._backlog = 0.0
        if exec_s > 0.0:
            costs, size = self.costs, self.cells.size(cell)
            nbytes = costs.bytes_of(size)
            self._ends += 1
            # To learn from a cell takes time, too; of many small ones a few say what there is to know.
            if exec_s > _LEARN_S or self._ends % 4 == 1:
                costs.ran_there(worker, size, exec_s)
            if anew:
                pass
            elif cell == self._first:
                costs.link.travelled(nbytes, looked - handed - exec_s, now - handed - exec_s)
            elif handed < self._progress:
                least = looked - self._progress
                # It waited for what was ahead of it: longer than for a worker means for the way.
                most = now - self._before
                if nbytes and (least > exec_s / max(1, self.workers) or most < nbytes * costs.link.byte_s):
                    costs.link.streamed(nbytes, least, most)
        self._progress = now
        self._before = looked

    def taken(self, cell: int, now: float, back: bool) -> None:
        """Whether the cell came back without having been run. The rank runs it then."""
        if back:
            self._drained(now)
            self._backlog = max(0.0, self._backlog - self._flying.pop(cell))
            self._handed_at.pop(cell)

    def ran(self, first: int, stop: int, seconds: float) -> None:
        """The rank has run these cells, in this time."""
        if first == self._head:
            self._head = stop
        elif stop == self._tail:
            self._tail = first
        count = 1 if self.costs.rowwise else stop - first
        rows = (self._edges[stop] - self._edges[first]) / count
        line = self.costs.beside if self._flying else self.costs.alone
        line.add(rows, seconds / count)

    def workers_are(self, count: int) -> None:
        """Workers came or went."""
        self.workers = count


# --- a world that is made up ----------------------------------------------------------------

@dataclass
class World:
    """What things really take in a simulation, in seconds.

    `speeds`: of each worker, how many times as long as here a kernel takes there.
    `stops`: (worker, from, until) in which it does nothing; until infinity: it vanishes.
    """

    fixed_s: float = 0.0
    row_s: float = 1e-6
    speeds: Sequence[float] = (1.0,)
    t0_s: float = 2e-6
    byte_s: float = 0.0
    hand_s: float = 1e-6
    hand_byte_s: float = 0.0
    beside: float = 1.0
    step_s: float = 1e-6
    kill_s: float = 0.002
    can_take: bool = True
    stops: Sequence[tuple[int, float, float]] = ()

    def here(self, rows: float) -> float:
        return self.fixed_s + self.row_s * rows

    def end(self, worker: int, begin: float, seconds: float) -> float:
        """When a worker is done that begins then."""
        for who, since, until in self.stops:
            if who == worker and begin < until and begin + seconds > since:
                if begin >= since:
                    begin = until
                else:
                    seconds, begin = seconds - (since - begin), until
        return begin + seconds


@dataclass
class Simulated:
    """What came of it."""

    end: float
    on_rank: int
    away: int
    died_s: float = 0.0
    took: list[tuple[int, str]] = field(default_factory=list)


def simulate(race: Race, world: World, now: float = 0.0, on_step: Callable[[float], None] | None = None) -> Simulated:
    """Runs a race against a world. The workers take cells as the data plane gives them: to whoever is free."""
    cells, costs = race.cells, race.costs
    result = Simulated(now, 0, 0)
    free = [(now, w) for w in range(len(world.speeds))]
    heapq.heapify(free)
    wire_free = now
    # cell → (begins, ends, worker, seconds of its kernel)
    flying: dict[int, tuple[float, float, int, float]] = {}
    looked = now

    def here(first: int, stop: int) -> float:
        edges = cells.edges
        seconds = (1 if costs.rowwise else stop - first) * world.fixed_s + world.row_s * (edges[stop] - edges[first])
        idle = {who for who, since, until in world.stops if since <= now < until}
        busy = any(begin <= now < end and worker not in idle for begin, end, worker, _ in flying.values())
        return seconds * (world.beside if busy else 1.0)

    for _ in itertools.count():
        for cell in [c for c, (_, end, _, _) in flying.items() if end <= now]:
            _, _, worker, seconds = flying.pop(cell)
            race.ended(cell, now, looked, worker, seconds)
            result.away += 1
        looked = now
        if on_step is not None:
            on_step(now)
        step = race.next(now)
        now += world.step_s
        match step.what:
            case What.RUN:
                seconds = here(step.first, step.stop)
                now += seconds
                race.ran(step.first, step.stop, seconds)
                result.on_rank += step.stop - step.first
                result.took.extend((cell, "here") for cell in range(step.first, step.stop))
            case What.HAND:
                for cell in range(step.first, step.stop):
                    size = cells.size(cell)
                    nbytes = costs.bytes_of(size)
                    spent = world.hand_s + world.hand_byte_s * nbytes
                    now += spent
                    wire_free = max(now, wire_free) + nbytes * world.byte_s
                    since, worker = heapq.heappop(free)
                    seconds = world.here(size) * world.speeds[worker]
                    begin = max(since, wire_free + world.t0_s / 2)
                    done = world.end(worker, begin, seconds)
                    heapq.heappush(free, (done, worker))
                    flying[cell] = (begin, done + world.t0_s / 2, worker, seconds)
                    costs.handed_over(nbytes, spent)
                    race.handed(cell, now)
                    result.took.append((cell, "there"))
            case What.TAKE:
                begin, end, worker, seconds = flying[step.first]
                back = world.can_take and begin > now
                race.taken(step.first, now, back)
                if back:
                    del flying[step.first]
                    free = [(since - seconds if w == worker else since, w) for since, w in free]
                    heapq.heapify(free)
                    now += here(step.first, step.first + 1)
                    result.on_rank += 1
                    result.took.append((step.first, "back"))
            case What.WAIT:
                now = min(min(end for _, end, _, _ in flying.values()), now + step.wait_s)
            case What.GIVE_UP:
                now += world.kill_s
                for cell in list(flying):
                    begin, _, _, seconds = flying.pop(cell)
                    race.taken(cell, now, True)
                    if begin < now:
                        result.died_s += seconds
                    now += here(cell, cell + 1)
                    result.on_rank += 1
                    result.took.append((cell, "again"))
            case What.DONE:
                break
    result.end = now
    return result

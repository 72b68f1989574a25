"""Splits: a data-parallel kernel divided between the rank and its workers, as the planner says.

`planner.py` decides who runs which cell; here the cells are made of arrays,
started, looked at and waited for.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any, Literal, TypeVar

import numpy as np

from rfaas_mpi import codec, local, planner
from rfaas_mpi.arrays import Constant, arguments, as_input, as_outputs, check_overlap
from rfaas_mpi.boards import LOST, Shared, can_share
from rfaas_mpi.cells import Cells
from rfaas_mpi.crew import Crew
from rfaas_mpi.errors import BadKernel, ClosedError, InvalidBuffer
from rfaas_mpi.kernels import Kernel
from rfaas_mpi.planner import Costs, Link, Race, What
from rfaas_mpi.requests import PersistentRequest, Request, check_peers, dismiss
from rfaas_mpi.types import Outcome


__all__ = ["Explained", "Split", "Splits", "Where"]

_T = TypeVar("_T")

Where = Literal["both", "here", "workers"]
"""Who runs a split's cells: whoever the planner says, the rank, or the workers."""

# What a probe costs the rank: two requests' worth of Python, and a copy of what it reads.
_PROBE_S = 200e-6
_COPY_BYTE_S = 0.5e-9
# How often the rank asks who its workers are.
_LOOK_S = 1e-3
# Runs on a board, or on the rank alone, that take less than this are learned from now and then, once there were so many
# of them: after so many others, and after ever more of them.
_SHORT_S = 10e-3
_SETTLED = 8
_AGAIN = 3
_MOST_AGAIN = 15
_OTHER = 1.3
# How many kernels and sizes are remembered.
_KNOWN = 1024

# What is expected of a way before it was used: T0 and seconds a byte.
_WAYS = {"shm": (3e-6, 0.0), "verbs": (10e-6, 0.2e-9)}
_NETWORK = (60e-6, 1e-9)
# To hand a cell over, where its request is there already, and where it is made anew; over a network each byte is
# copied, too.
_HAND_S = 2e-6
_HAND_ANEW_S = 60e-6
_HAND_AWAY_S = 15e-6
_HAND_BYTE_S = 0.05e-9


@dataclasses.dataclass(frozen=True)
class Explained:
    """What is known of a kernel's split, what would be done now, and why. Times are seconds."""

    kernel: str
    rows: int
    cells: int
    workers: int
    offload: bool | None
    """None: too little is known; workers are tried while the rank runs cells."""
    why: str
    here_s: float | None
    """Predicted for all of it on the rank."""
    split_s: float | None
    """Predicted with the workers; as `here_s` where that isn't known yet."""
    share: float
    """The part of the cells that workers are expected to run."""
    row_here_s: float
    row_there_s: float
    t0_s: float
    byte_s: float
    stalls: int

    @property
    def predicted_s(self) -> float | None:
        """What the next run is expected to take."""
        return self.split_s if self.offload else self.here_s

    def __str__(self) -> str:
        what = {True: f"offload {self.share:.0%}", False: "run here", None: "find out"}[self.offload]
        return f"{self.kernel}, {self.rows:,} rows in {self.cells} cells: {what} ({self.why})"


class Splits:
    """What an executor has learned of the kernels that it divides."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self._links: dict[str, Link] = {}
        self._costs: dict[Any, tuple[str, planner.Grid, Costs]] = {}
        # kernel → workers that have run it: they have loaded it.
        self._warm: dict[bytes, set[int]] = {}
        self.probes: list[_Probe] = []

    def link(self) -> Link:
        """What is known of the way to the workers."""
        way = self.crew.transport
        found = self._links.get(way)
        if found is None:
            found = self._links[way] = Link(*_WAYS.get(way, _NETWORK))
        return found

    def costs(self, kind: Any, name: str, cells: planner.Grid, row_bytes: float, cell_bytes: float,
              hand_s: float, hand_byte_s: float, board: bool, rowwise: bool) -> Costs:
        """What is known of a kernel on so many rows of this kind, within a factor of two."""
        key = (kind, self.crew.transport, cells.rows.bit_length())
        found = self._costs.get(key)
        if found is None:
            if len(self._costs) >= _KNOWN:
                del self._costs[next(iter(self._costs))]
            made = Costs(self.link(), row_bytes, cell_bytes, hand_s, hand_byte_s, board, rowwise)
            similar = [(abs(other[2] - key[2]), known[2]) for other, known in list(self._costs.items())
                       if other[:2] == key[:2]]
            if similar:
                made.guess(min(similar, key=lambda pair: pair[0])[1])
            found = self._costs[key] = name, cells, made
        return found[2]

    def warm(self, digest: bytes) -> set[int]:
        """The workers that have run this kernel before."""
        if len(self._warm) >= _KNOWN and digest not in self._warm:
            del self._warm[next(iter(self._warm))]
        return self._warm.setdefault(digest, set())

    def probe(self, probe: _Probe) -> None:
        """Waits for nothing: what a probe says is heard when it has ended."""
        self.probes.append(probe)

    def harvest(self) -> None:
        """Learns from the probes that have ended."""
        for probe in list(self.probes):
            if probe.request._raw.test() and _settled(probe.request, wait=False):
                self._learn(probe)

    def _learn(self, probe: _Probe) -> None:
        try:
            self.probes.remove(probe)
        except ValueError:
            return      # by another thread
        request = probe.request
        if request._raw.outcome == Outcome.OK and request._error is None and request.worker:
            cold = request.worker not in probe.warm
            probe.warm.add(request.worker)
            probe.costs.probed(request.worker, probe.rows, request.exec_ns * 1e-9, cold=cold)

    def explain(self) -> list[Explained]:
        """What is known, in the order in which it was first asked for."""
        workers = len(self.crew.workers)
        return [explained(name, cells, costs, workers) for name, cells, costs in list(self._costs.values())]


def explained(name: str, cells: planner.Grid, costs: Costs, workers: int) -> Explained:
    offload, why = costs.foresee(cells, workers)
    found = costs.forecast(cells, workers)
    return Explained(
        kernel=name, rows=cells.rows, cells=len(cells), workers=workers, offload=offload, why=why,
        here_s=found.here_s if found else None, split_s=found.split_s if found else None,
        share=found.share if found else 0.0, row_here_s=costs.alone.slope, row_there_s=costs.there.slope,
        t0_s=costs.link.t0_s, byte_s=costs.link.byte_s, stalls=costs.stalls)


@dataclasses.dataclass(eq=False)
class _Probe:
    """A cell run once more, at a worker and into memory of its own: nobody has to wait for it."""

    request: Request
    rows: int
    costs: Costs
    warm: set[int]
    arrays: Any


class Split:
    """A kernel on arrays, cut into cells that rank and workers share. Made by `Executor.Split_init`.

    Run it as often as you like; not from several threads at once. `Free` gives
    back what it holds.
    """

    def __init__(self, splits: Splits, kernel: Kernel, inputs: Any, out: Any, *, whole: Sequence[int] = (),
                 rows: int | None = None, index: bool = False, reduce: Callable[..., Any] | None = None,
                 grain: int | None = None, rowwise: bool = False, timeout_s: float | None = None,
                 where: Where = "both", persistent: bool = True) -> None:
        crew = splits.crew
        crew.check()
        if not isinstance(kernel, Kernel):
            raise TypeError(f"{kernel!r} is no kernel; make it one with @rfaas_mpi.kernel or Kernel.from_library")
        rows = None if rows is None else operator.index(rows)
        grain = None if grain is None else operator.index(grain)
        if grain is not None and grain < 1:
            raise ValueError(f"grain={grain} is no number of rows")
        if where not in ("both", "here", "workers"):
            raise ValueError(f"where={where!r} is not possible; one of both, here, workers")
        if reduce is not None and not callable(reduce):
            raise TypeError(f"reduce={reduce!r} can't combine two results; give it a function of two, such as numpy.add")
        if isinstance(whole, int):
            raise TypeError(f"whole={whole} is no list of inputs; give whole=({whole},)")
        if rowwise and reduce is not None:
            raise ValueError("rowwise=True and reduce= exclude each other: what is combined is each cell's own result")
        self.out = out
        self._splits = splits
        self._crew = crew
        self._kernel = kernel
        self._timeout_s = timeout_s
        self._persistent = persistent
        self._where = where
        self._index = index
        # A native kernel's call costs next to nothing.
        self._rowwise = rowwise and kernel.native() is None
        self._reduce = reduce
        given = arguments(inputs)
        self._read = tuple([as_input(value, f"input {i} of {kernel.name}") for i, value in enumerate(given)])
        self._written = as_outputs(out, kernel.name)
        check_overlap(self._read, self._written)
        for i in whole:
            if not -len(given) <= i < len(given):
                raise InvalidBuffer(f"whole={tuple(whole)} names input {i}, and {kernel.name} has {len(given)}")
        named = {i % len(given) for i in whole} if given else set()
        self._whole = [i in named or isinstance(value, Constant) or self._read[i].ndim == 0
                       for i, value in enumerate(given)]
        count = self._count(rows)
        divided = [array for array, is_whole in zip(self._read, self._whole, strict=True) if not is_whole]
        outs = () if reduce else self._written
        row_bytes = sum(array[:1].nbytes for array in (*divided, *outs)) if count else 0
        self._cells = planner.grid(count, row_bytes, _aligned(grain, row_bytes, outs)) if count else None
        # Results of the cells, where they are to be combined.
        self._partials: tuple[np.ndarray, ...] = ()
        if reduce is not None and self._cells is None and getattr(reduce, "identity", None) is None:
            raise InvalidBuffer(f"{kernel.name} has no rows, so that there is nothing for {reduce!r} to combine",
                                hint="leave the call out then, or reduce by what has an identity, as numpy.add has")
        if reduce is not None and self._cells is not None:
            self._partials = tuple([crew.memory.empty((len(self._cells), *array.shape), array.dtype)
                                    for array in self._written])
        changing = [array for i, array in enumerate(self._read)
                    if self._whole[i] and not isinstance(given[i], Constant)]
        # In place on memory that is shared: nothing travels.
        shared = crew.transport in ("shm", "inline", "auto") and not crew.inline and all(
            crew.invoker.locate(*_span(array)) is not None or array.nbytes < 4096
            for array in (*divided, *outs, *changing))
        part = 0.0 if shared else float(row_bytes)
        whole_bytes = 0.0 if shared else float(sum(array.nbytes for array in changing)
                                               + (sum(array.nbytes for array in self._written) if reduce else 0))
        # What a probe copies: its inputs are the caller's again before it has ended.
        self._constant = [isinstance(value, Constant) for value in given]
        self._probe_s = _PROBE_S + _COPY_BYTE_S * sum(array.nbytes for array in changing)
        # A time limit is each call's own: one call that runs many cells can't keep it.
        self._shares = (shared and crew.transport == "shm" and where == "both" and timeout_s is None
                        and self._cells is not None and can_share(crew, self._read, self._partials or self._written))
        kind = (kernel.digest, tuple((a.dtype.str, a.shape[1:]) for a in (*divided, *outs)),
               tuple((a.dtype.str, a.shape) for a in changing), grain, shared, persistent, self._shares,
               self._rowwise)
        hand_s = _HAND_ANEW_S if not persistent else _HAND_S if crew.transport in _WAYS else _HAND_AWAY_S
        self._costs = splits.costs(kind, kernel.name, self._cells or planner.Grid((0,)), part, whole_bytes,
                                   hand_s, 0.0 if shared else _HAND_BYTE_S, self._shares, self._rowwise)
        self._warm = splits.warm(kernel.digest)
        # Both are made when they are needed first.
        self._parts: Cells | None = None
        self._shared: Shared | None = None
        # So many more runs as the last one, with the same workers.
        self._again = 0
        self._often = _AGAIN
        self._away = False
        # What those on the rank took, of which a part may be spent on trying workers again.
        self._unlearned_s = 0.0
        self._lately: list[int] = []
        self._requests: dict[int, Request] = {}
        self._flying: dict[int, Request] = {}
        self._anew: set[int] = set()
        self._begun = 0.0
        # What was spent on setting cells up in this run.
        self._once_s = 0.0
        self._freed = False
        if peers := crew.peers(self._read, self._written):
            check_peers(kernel, peers)

    def _count(self, rows: int | None) -> int:
        """How many rows there are. Raises InvalidBuffer where the arguments don't agree."""
        name = self._kernel.name
        lengths = {f"input {i}": len(array) for i, array in enumerate(self._read) if not self._whole[i]}
        if self._reduce is None:
            for j, array in enumerate(self._written):
                if array.ndim == 0:
                    raise InvalidBuffer(f"output {j} of {name} has the shape (), which has no rows to divide",
                                        hint="give Split a reduce, such as numpy.add, where cells are to be combined")
                lengths[f"output {j}"] = len(array)
        if rows is not None:
            lengths["rows="] = rows
        if not lengths:
            raise InvalidBuffer(f"nothing says how many rows {name} has to be divided by", hint="pass rows=")
        count = next(reversed(lengths.values()))
        for what, length in lengths.items():
            if length != count:
                raise InvalidBuffer(
                    f"{what} of {name} has {length} rows, and {next(reversed(lengths))} has {count}",
                    hint="an input that each cell needs as a whole is named in whole=, or made a constant with put")
        if count < 0:
            raise InvalidBuffer(f"rows={count} of {name} is no number of rows")
        return count

    # -- what users call -----------------------------------------------------------------------

    def Run(self) -> Any:
        """Runs all cells, here and at the workers, fills `out` and returns it.

        Raises KernelError where the kernel fails, wherever it ran; what happens
        to a worker costs time and no result.
        """
        crew, cells, costs = self._crew, self._cells, self._costs
        crew.check()
        if self._freed:
            raise ClosedError("this split was freed; make another with Split_init")
        if cells is None:
            if self._reduce is not None:
                for array in self._written:
                    array[...] = self._reduce.identity  # type: ignore[attr-defined]
            return self.out
        splits = self._splits
        if splits.probes:
            splits.harvest()
        workers = crew.workers
        if self._again and workers == self._lately:
            self._run_again(workers)
            if self._partials:
                self._combine()
            return self.out
        begin = self._begun = time.perf_counter()
        use = costs.decide(cells, len(workers)) if self._where == "both" else False
        decided = use is not None
        if use is None and costs.said_s(offload=False) < _SHORT_S and costs.alone.known:
            # Nobody is asked before there is time for that, and until then there is nothing to decide.
            use = None if costs.can_probe(cells, self._probe_s) else False
        if self._where == "workers" and not crew.inline:
            self._guarded(self._run_there)
        elif use is False:
            self._run_here(0, len(cells))
            took = time.perf_counter() - begin
            calls = 1 if self._rowwise else len(cells)
            costs.ran_alone(cells.rows / calls, took, calls)
            costs.ran(cells, len(workers), took, offloaded=False, before_s=self._unlearned_s)
            self._unlearned_s = 0.0
            if decided:
                self._repeat(costs.here.runs, took, workers, away=False)
        elif self._shares and crew.transport == "shm" and not self._warm.isdisjoint(workers):
            # One of them at least has run it: the first call of a kernel may compile or import for seconds, which
            # a probe waits for, and a cell that was taken from a board would not.
            shared = self._shared or self._share()
            taken = self._guarded(lambda: shared.run(self._here, costs, self._warm, workers))
            took = time.perf_counter() - begin
            costs.ran(cells, len(workers), took, offloaded=taken.away or use is True, stalled=taken.stalled)
            if use and taken.away and not taken.stalled:
                self._repeat(costs.split.runs, took, workers, away=True)
        else:
            # What a worker on this node has not begun can be taken back.
            race = Race(cells, costs, len(workers), use=use, cold=not self._warm.issuperset(workers),
                        can_take=crew.transport == "shm")
            self._guarded(lambda: self._run(race, workers, begin))
            took = time.perf_counter() - begin
            costs.ran(cells, race.workers, took, offloaded=race.offloaded, stalled=race.stalled, once_s=self._once_s)
        if self._partials:
            self._combine()
        return self.out

    def _repeat(self, runs: int, took_s: float, workers: list[int], *, away: bool) -> None:
        """Short runs one after the other are decided and learned once for a few of them, if they take what was said."""
        said_s = self._costs.said_s(offload=away) if self._where == "both" else took_s
        if runs > _SETTLED and took_s < _SHORT_S and 1 / _OTHER < took_s / max(said_s, 1e-9) < _OTHER:
            if away != self._away:
                self._often = _AGAIN
            self._again, self._lately, self._away = self._often, workers, away
            self._often = min(2 * self._often + 1, _MOST_AGAIN)

    def _run_again(self, workers: list[int]) -> None:
        """As the last run: nothing is decided, and nothing learned but whether it took as long."""
        assert self._cells is not None
        costs, begin, usual = self._costs, time.perf_counter(), True
        if self._away:
            shared = self._shared
            assert shared is not None
            taken = self._guarded(lambda: shared.run(self._here, costs, self._warm, workers, learn=False))
            costs.stalls += taken.stalled
            usual = not taken.stalled
            took, last = time.perf_counter() - begin, costs.split.last_s
        else:
            self._run_here(0, len(self._cells))
            took, last = time.perf_counter() - begin, costs.here.last_s
            self._unlearned_s += took
        if usual and 1 / _OTHER < took / last < _OTHER:
            self._again -= 1
        else:
            self._again, self._often = 0, _AGAIN

    def predict(self) -> Explained:
        """What the next run will do, how long it is expected to take, and why."""
        return explained(self._kernel.name, self._cells or planner.Grid((0,)), self._costs, len(self._crew.workers))

    def Free(self) -> None:
        """Gives back what the split holds; safe to call twice."""
        self._freed = True
        for request in self._requests.values():
            request.Free()
        self._requests.clear()
        if self._shared is not None:
            self._shared.free()
        self._shared = self._parts = None
        self._again = 0

    def __repr__(self) -> str:
        count = len(self._cells) if self._cells else 0
        return f"<Split of {self._kernel!r} in {count} cells>"

    # -- cells -----------------------------------------------------------------------------------

    @property
    def _laid_out(self) -> Cells:
        """The cells' arrays, as the rank runs them."""
        if self._parts is None:
            assert self._cells is not None
            self._parts = Cells(self._kernel.native() or self._kernel.bind, self._cells.edges, self._read, self._whole,
                                self._partials or self._written, index=self._index, by_cell=bool(self._partials),
                                rowwise=self._rowwise)
        return self._parts

    def _share(self) -> Shared:
        assert self._cells is not None
        self._shared = Shared(self._crew, self._kernel, self._laid_out, self._cells, self._read, self._whole,
                              self._partials or self._written, index=self._index, by_cell=bool(self._partials),
                              rowwise=self._rowwise)
        return self._shared

    def _run_here(self, first: int, stop: int) -> None:
        self._here(self._laid_out.run, first, stop)

    def _here(self, run: Callable[..., Any], *args: Any) -> Any:
        """Calls it as a kernel. Raises as if a worker had run it."""
        try:
            with local.as_kernel():
                return run(*args)
        except KeyboardInterrupt:
            raise
        except BadKernel as error:
            raise codec.error_for_bind(codec.dumps_error(error)) from error
        except BaseException as error:
            raise codec.error_for_invoke(codec.dumps_error(error)) from error

    def _request(self, cell: int) -> Request:
        found = self._requests.get(cell)
        if found is None:
            read, written = self._laid_out.arguments(cell)
            if self._persistent:
                found = PersistentRequest(self._crew, self._kernel, read, written, None, self._timeout_s)
                self._requests[cell] = found
            else:
                found = Request(self._crew, self._kernel, read, written, None, self._timeout_s)
        return found

    def _guarded(self, run: Callable[[], _T]) -> _T:
        """Whatever happens, nothing is in flight afterwards."""
        try:
            return run()
        except BaseException as error:
            # Ctrl-C waits for no kernel.
            self._stop(force=not isinstance(error, Exception))
            raise

    # -- one run ---------------------------------------------------------------------------------

    def _run(self, race: Race, workers: Sequence[int], begin: float) -> None:
        cells, costs, crew, splits = race.cells, self._costs, self._crew, self._splits
        clock = time.perf_counter
        flying: dict[int, Request] = {}
        self._flying = flying
        self._anew = set()
        self._once_s = 0.0
        looked = asked = begin
        # One at a time of each kernel: a worker that loads it has no use for a second.
        probed = (not workers or (costs.there.known and not race.cold)
                  or any(probe.warm is self._warm for probe in splits.probes))
        while True:
            now = clock()
            if flying:
                for cell in [cell for cell, request in flying.items() if request._raw.test()]:
                    self._land(race, cell, now, looked)
                looked = now
            if splits.probes:
                splits.harvest()
            if now - asked > _LOOK_S:
                asked = now
                workers = crew.workers
                if len(workers) != race.workers:
                    race.workers_are(len(workers))
            if not probed and costs.alone.known:
                probed = True
                if race.use is None and costs.decide(cells, race.workers) is False:
                    race.use = False
                elif costs.may_probe(cells, self._probe_s):
                    self._send_probes(workers)
            if not race.can_take:
                # A cell that is sent behind somebody else's call can't be taken back from there.
                race.others = max(0, crew.invoker.in_flight + crew.invoker.queued - len(flying) - len(splits.probes))
            step = race.next(now)
            first = step.first
            match step.what:
                case What.RUN:
                    start = clock()
                    self._run_here(first, step.stop)
                    race.ran(first, step.stop, clock() - start)
                case What.HAND:
                    self._hand(race, first, step.stop, now)
                case What.TAKE:
                    back = self._take(flying[first])
                    race.taken(first, clock(), back)
                    if back:
                        del flying[first]
                        self._run_here(first, first + 1)
                case What.WAIT:
                    crew.wait_any([request._raw for request in flying.values()], step.wait_s)
                case What.GIVE_UP:
                    self._give_up(race)
                case What.DONE:
                    return

    def _hand(self, race: Race, first: int, stop: int, now: float) -> None:
        """Sends these cells to the workers; `now` is when the rank began with it."""
        costs, flying, clock = self._costs, self._flying, time.perf_counter
        count, spent, rows = 0, 0.0, 0
        for cell in range(first, stop):
            # What is set up once is no cost of a call.
            anew = self._persistent and cell not in self._requests
            request = self._request(cell)
            request._error = None
            # Noted before it is begun: what is begun must be ended.
            flying[cell] = request
            request._begin()
            done = clock()
            if anew:
                self._anew.add(cell)
                self._once_s += max(0.0, done - now - costs.hand(costs.bytes_of(race.cells.size(cell))))
            elif not race.offloaded:
                costs.waking.add(0.0, max(0.0, done - now - costs.hand(costs.bytes_of(race.cells.size(cell)))))
            else:
                count, spent, rows = count + 1, spent + done - now, rows + race.cells.size(cell)
            race.handed(cell, done)
            now = done
        if count:
            costs.handed_over(costs.bytes_of(rows / count), spent / count)

    def _run_there(self) -> None:
        """Has the workers run all of it; the rank runs what none of them is left for."""
        assert self._cells is not None
        flying = self._flying = {cell: self._request(cell) for cell in range(len(self._cells))}
        for request in flying.values():
            request._error = None
            request._begin()
        for cell, request in flying.items():
            try:
                request.Wait()
            except LOST:
                self._run_here(cell, cell + 1)
        flying.clear()

    def _land(self, race: Race, cell: int, now: float, looked: float) -> None:
        """Takes the end of a cell that was in flight; it may be sent to another worker instead."""
        request = self._flying[cell]
        try:
            if not request.Test():
                return
        except LOST:
            race.taken(cell, now, True)
            del self._flying[cell]
            self._run_here(cell, cell + 1)
            return
        del self._flying[cell]
        there = request._raw.outcome == Outcome.OK
        if there:
            self._warm.add(request.worker)
        race.ended(cell, now, looked, request.worker, request.exec_ns * 1e-9 if there else 0.0, cell in self._anew)

    def _take(self, request: Request) -> bool:
        """True if the request was cancelled, so that nothing writes to its outputs any more."""
        if not request.Cancel():
            return False
        try:
            request.Wait()
        except LOST:
            return True
        return False

    def _give_up(self, race: Race) -> None:
        """Ends what is in flight, at the price of the workers that run it, and runs it here."""
        flying = self._flying
        for request in flying.values():
            # Those that have not begun are taken back; whoever runs the others is stopped.
            if not request._raw.cancel():
                dismiss(self._crew, request)
        for cell, request in list(flying.items()):
            try:
                request.Wait()
            except LOST:
                race.taken(cell, time.perf_counter(), True)
                del flying[cell]
                self._run_here(cell, cell + 1)
                continue
            del flying[cell]
            now = time.perf_counter()
            race.ended(cell, now, now)

    def _stop(self, *, force: bool) -> None:
        """Nothing of ours is in flight any more when this returns."""
        if self._shared is not None:
            for request in self._shared.stop(self._costs, force=force):
                _settled(request)
        flying, self._flying = self._flying, {}
        left = [request for request in flying.values() if request._active and not request._raw.cancel()]
        if not force and left:
            # A worker that stopped never says so: those in flight have twice the time that they should take.
            costs, cells = self._costs, self._cells
            assert cells is not None
            each = max(costs.there.at(cells.size(0)), costs.local.at(cells.size(0)), time.perf_counter() - self._begun)
            until = time.monotonic() + planner.COLD_PATIENCE_S + 2 * len(left) * each
            for request in left:
                force |= not request._raw.wait(max(0.0, until - time.monotonic()))
        if force:
            for request in left:
                dismiss(self._crew, request)
        for request in flying.values():
            _settled(request)

    def _combine(self) -> None:
        """The cells' results in the grid's order, so that any split gives the same bits."""
        assert self._reduce is not None
        for out, parts in zip(self._written, self._partials, strict=True):
            out[...] = parts[0]
            for part in parts[1:]:
                out[...] = self._reduce(out, part)

    # -- probes ------------------------------------------------------------------------------------

    def _send_probes(self, workers: Sequence[int]) -> None:
        """Has the smallest cell run by each worker that has not run the kernel yet, into memory of its own."""
        assert self._cells is not None
        cell = len(self._cells) - 1
        copies: list[np.ndarray] | None = None
        memory = self._crew.memory
        for worker in workers:
            if worker in self._warm and (self._costs.there.known or worker != workers[0]):
                continue
            read, written = self._laid_out.arguments(cell)
            try:
                if copies is None:
                    # Of all that may be changed, or be gone, while a worker still loads the kernel.
                    copies = [array if i < len(self._constant) and self._constant[i] else _copied(memory, array)
                              for i, array in enumerate(read)]
                outs = tuple([memory.empty(array.shape, array.dtype) for array in written])
            except (MemoryError, InvalidBuffer):
                return      # no room for them, or more than a worker may have
            request = Request(self._crew, self._kernel, tuple(copies), outs, None, self._timeout_s)
            request._begin()
            # Nobody else uses its arrays, and nobody waits for it, the executor's end neither.
            self._crew.leave(request, request._entry)
            self._splits.probe(_Probe(request, self._cells.size(cell), self._costs, self._warm, (copies, outs)))


def _settled(request: Request, *, wait: bool = True) -> bool:
    """True once the request has ended, however; what it ended with is nobody's concern."""
    try:
        return request.Wait() if wait else request.Test()
    except (Exception, CancelledError):
        # A probe's failure is told by the same cell's own run; after an error there is one to raise already.
        return True


def _copied(memory: Any, array: np.ndarray) -> np.ndarray:
    made = memory.empty(array.shape, array.dtype)
    made[...] = array
    return made


def _span(array: np.ndarray) -> tuple[int, int]:
    return array.__array_interface__["data"][0], array.nbytes


def _aligned(grain: int | None, row_bytes: int, outs: Sequence[np.ndarray]) -> int:
    """Rows that a cell has at least: whole cache lines of each output, so that no two write to one."""
    grain = planner.default_grain(row_bytes) if grain is None else grain
    for array in outs:
        size = array[:1].nbytes
        if size:
            grain = math.lcm(grain, 64 // math.gcd(64, size))
    return grain

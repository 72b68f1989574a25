"""Runs in which the rank and its workers take a kernel's cells from a board: whoever is free, the next one.

Nothing is handed over and nothing is decided in advance: each worker gets one
request, for as many cells as it comes to. What a worker had when it was lost, or
was given up, is run here in the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

import msgspec
import numpy as np

from rfaas_mpi import codec, planner
from rfaas_mpi.cells import Cells
from rfaas_mpi.crew import Crew
from rfaas_mpi.errors import LeaseExpired, LeaseRevoked, ServiceLost, WorkerLost
from rfaas_mpi.kernels import Kernel
from rfaas_mpi.planner import Costs
from rfaas_mpi.requests import PersistentRequest, Request, dismiss

__all__ = ["LOST", "Shared", "Taken", "can_share"]

# What happened to a worker. Its cells are run on the rank, which takes part anyway.
LOST = (CancelledError, WorkerLost, LeaseRevoked, LeaseExpired, ServiceLost)

# How long the rank takes cells before it looks at its workers.
_LOOK_NS = 2_000_000
# It leaves a cell to them that it would need so many times longer for than they need for all that is left.
_MARGIN = 1.5
# A worker's turn ends after a while; in a run of this length the next one lies there already.
_LONG_S = 5e-3
# Who ran a cell is told in a byte.
_MOST = 250
# Smaller inputs may travel with each call, and tiny arrays always do.
_SMALL_BYTES = 4096
_TINY_BYTES = 32
_MAX_ARRAYS = 63

Here = Callable[..., Any]
"""Calls a function as a kernel on the rank: errors are those that a worker would raise."""


class Taken(NamedTuple):
    """What came of a run: whether workers ran some of it, and whether one was given up."""

    away: bool
    stalled: bool


def can_share(crew: Crew, read: Sequence[np.ndarray], written: Sequence[np.ndarray]) -> bool:
    """Whether all of these arrays lie where workers can take cells of them."""
    return (not crew.inline and len(read) + len(written) < _MAX_ARRAYS
            and all(_is_placed(crew, array) for array in written)
            and all(_is_placed(crew, array) or array.nbytes <= _SMALL_BYTES for array in read))


def _is_placed(crew: Crew, array: np.ndarray) -> bool:
    """Whether it stays where it is at each call."""
    return array.nbytes > _TINY_BYTES and crew.invoker.locate(
        array.__array_interface__["data"][0], array.nbytes) is not None


class _Turn(PersistentRequest):
    """One worker's turn at the board. The arrays are those of all of them."""

    __slots__ = ()

    def __init__(self, crew: Crew, kernel: Kernel, read: tuple[np.ndarray, ...], written: tuple[np.ndarray, ...],
                 division: codec.Division, turns: Sequence[_Turn]) -> None:
        raw = crew.divided_request(kernel, read, written, division)
        Request.__init__(self, crew, kernel, read, written, None, None, raw=raw)
        self._active = False
        # They write to the same arrays, and never to the same cells: with many of them that would take long to look at.
        mine = set(turns)
        with crew.lock:
            for turn in turns:
                turn._peers = [peer for peer in turn._peers if peer() is not self]
            self._peers = [peer for peer in self._peers if peer() not in mine]

    def _run_on_rank(self) -> BaseException | None:
        return None     # it takes cells itself, and has those that are left in the end


class Shared:
    """A kernel on arrays, whose cells are taken from a board in each run."""

    def __init__(self, crew: Crew, kernel: Kernel, cells: Cells, grid: planner.Grid, read: tuple[np.ndarray, ...],
                 whole: Sequence[bool], written: tuple[np.ndarray, ...], *, index: bool, by_cell: bool,
                 rowwise: bool = False) -> None:
        from rfaas_mpi.fabric import Board
        self._crew = crew
        self._kernel = kernel
        self._cells = cells
        self._grid = grid
        self._read = read
        self._words = crew.memory.empty(Board.words(len(grid)), np.uint64)
        self._written = (*written, self._words)
        self._division = codec.Division(
            grid.edges, tuple(whole), tuple([not _is_placed(crew, array) for array in read]), index, by_cell, 0, rowwise)
        self._board = Board(self._words, grid.edges, 0, _MARGIN)
        # Rows that are run by one call at least, where one may run several cells.
        self._least = 0
        self._turns: list[_Turn] = []
        self._flying: dict[int, _Turn] = {}
        self._progress = self._begun = 0.0

    def run(self, here: Here, costs: Costs, warm: set[int], workers: Sequence[int], learn: bool = True) -> Taken:
        """Runs all cells, and learns what they cost. Raises KernelError where the kernel fails, wherever that is."""
        clock = time.perf_counter
        board, crew, flying = self._board, self._crew, self._flying
        stalled = False
        if self._cells.rowwise:
            if learn:
                self._least = costs.least_rows(self._grid.rows, len(workers))
            board.open(least=self._least, parts=len(workers) + 1)
        else:
            board.open()
        if not costs.alone.known and (cell := board.take()) >= 0:
            # Once, before anybody else makes it slower.
            start = clock()
            here(self._cells.run, cell, cell + 1)
            took = clock() - start
            board.done(cell, round(took * 1e9))
            costs.alone.add(self._grid.size(cell), took)
        start = self._begun = self._progress = clock()
        self._send(len(workers))
        looked = clock()
        if learn:
            costs.waking.add(0.0, looked - start)
        while not here(self._cells.share, board, time.monotonic_ns() + _LOOK_NS):
            looked = clock()
            self._land(warm)
            workers = crew.workers
            self._send(len(workers) * (2 if looked - start > _LONG_S else 1))
        if learn:
            costs.forget(workers)
            self._learn_here(costs)
        # What no worker has begun is no use any more; those that have are at their last cells.
        for who in [who for who, turn in flying.items() if not turn._raw.test() and turn._raw.cancel()]:
            self._settle(who, warm)
        if flying:
            crew.wait_any([turn._raw for turn in flying.values()], planner.PATIENCE_S)
            self._land(warm)
        while flying:
            left = self._progress + self._patience(costs, not warm.issuperset(workers)) - clock()
            if left <= 0.0:
                stalled = True
                self._give_up(warm)
                break
            crew.wait_any([turn._raw for turn in flying.values()], left)
            self._land(warm)
        away = self._learn(costs) if learn else True
        # Those that were lost, or left to workers that had their turn.
        for cell in board.left:
            here(self._cells.run, cell, cell + 1)
        return Taken(away, stalled)

    # -- workers' turns -------------------------------------------------------------------------

    def _send(self, count: int) -> None:
        """Has so many requests in flight, if there is anything left for them."""
        count = min(count, _MOST)
        if len(self._flying) >= count or self._board.empty:
            return
        turns = self._turns
        while len(turns) < count:
            division = msgspec.structs.replace(self._division, who=len(turns) + 1)
            turns.append(_Turn(self._crew, self._kernel, self._read, self._written, division, turns))
        for who in range(count):
            if who not in self._flying:
                turn = turns[who]
                turn._error = None
                # Noted before it is begun: what is begun must be ended.
                self._flying[who] = turn
                turn._begin()

    def _land(self, warm: set[int]) -> None:
        for who in [who for who, turn in self._flying.items() if turn._raw.test()]:
            self._settle(who, warm, wait=False)

    def _settle(self, who: int, warm: set[int], *, wait: bool = True) -> None:
        """Takes the end of a turn; it may go on at another worker instead."""
        turn = self._flying[who]
        try:
            if not (turn.Wait() if wait else turn.Test()):
                return
            if turn.worker:
                warm.add(turn.worker)
        except LOST:
            pass        # its cells are run here in the end; the others' patience doesn't run out with it
        del self._flying[who]
        self._progress = time.perf_counter()

    def _patience(self, costs: Costs, cold: bool) -> float:
        """How long the workers' last cells may take before they are taken for stuck."""
        left = self._board.left
        sizes = [self._grid.size(cell) for cell in left]
        size = sum(sizes) if self._cells.rowwise else max(sizes, default=0)
        once = max(costs.there.at(size) * costs.slowest(), costs.local.at(size))
        return 2 * once + planner.PATIENCE_S + (planner.COLD_PATIENCE_S if cold else 0.0)

    def _give_up(self, warm: set[int]) -> None:
        """Ends what is in flight, at the price of the workers that run it."""
        self._board.close()
        for turn in self._flying.values():
            if not turn._raw.cancel():
                dismiss(self._crew, turn)
        for who in list(self._flying):
            self._settle(who, warm)

    def stop(self, costs: Costs, *, force: bool) -> Collection[Request]:
        """After an error: nothing of ours is in flight any more when this returns."""
        self._board.close()
        flying = list(self._flying.values())
        left = [turn for turn in flying if turn._active and not turn._raw.cancel()]
        if not force and left:
            # Each ends with the cell that it runs; a worker that stopped never says so.
            size = self._grid.rows if self._cells.rowwise else self._grid.size(0)
            each = max(costs.there.at(size), costs.local.at(size), time.perf_counter() - self._begun)
            until = time.monotonic() + planner.COLD_PATIENCE_S + 2 * each
            for turn in left:
                force |= not turn._raw.wait(max(0.0, until - time.monotonic()))
        if force:
            for turn in left:
                dismiss(self._crew, turn)
        self._flying.clear()
        return flying

    # -- what they took -------------------------------------------------------------------------

    def _learn_here(self, costs: Costs) -> None:
        cells, rows, ns = self._board.ran
        if not cells:
            return
        beside = cells < len(self._grid)
        if self._cells.rowwise:
            costs.ran_calls(self._calls_by(0), worker=None, beside=beside)
        else:
            costs.ran_some(rows, cells, ns * 1e-9, worker=None, beside=beside)

    def _learn(self, costs: Costs) -> bool:
        away, rowwise = False, self._cells.rowwise
        count = len(self._calls_by(0)) if rowwise else 0
        for who, turn in enumerate(self._turns, 1):
            if rowwise:
                if calls := self._calls_by(who):
                    away, count = True, count + len(calls)
                    costs.ran_calls(calls, worker=turn.worker)
                continue
            cells, rows, ns = self._board.ran_by(who)
            if cells:
                away = True
                costs.ran_some(rows, cells, ns * 1e-9, worker=turn.worker)
        if away and rowwise:
            costs.calls += (count - costs.calls) * 0.3
        return away

    def _calls_by(self, who: int) -> list[tuple[int, float]]:
        return [(rows, ns * 1e-9) for rows, ns in self._board.calls_by(who)]

    def free(self) -> None:
        """Gives back what it holds. Safe to call twice."""
        for turn in self._turns:
            turn.Free()
        self._turns.clear()

"""Boards: each cell is run, wherever, and what nobody has run to its end is known."""

from __future__ import annotations

import heapq
import math
import os
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest

import rfaas_mpi as rf
from rfaas_mpi import Executor, boards, codec, splitting
from rfaas_mpi.errors import KernelError
from rfaas_mpi.fabric import Board, Calls
from rfaas_mpi.planner import Costs, Link, grid
from rfaas_mpi.worker import handlers
from rfaas_mpi.worker.handlers import Handlers

EDGES = grid(10_000).edges
N = len(EDGES) - 1
US = 1_000


def board(words: np.ndarray | None = None, who: int = 0, margin: float = 1.0, edges=EDGES) -> Board:
    return Board(np.zeros(Board.words(len(edges) - 1), np.uint64) if words is None else words, edges, who, margin)


# --- a board ---------------------------------------------------------------------------------

def test_each_cell_is_taken_once_and_in_order():
    one = board()
    one.open()
    assert [one.take() for _ in range(N)] == list(range(N)) and one.empty
    assert one.take() == -1 and one.left == list(range(N)) and one.ran == (0, 0, 0)


def test_what_was_run_and_by_whom_is_told_and_forgotten_with_the_next_piece_of_work():
    words = np.zeros(Board.words(N), np.uint64)
    rank, worker = board(words), board(words, 7)
    rank.open()
    rank.done(rank.take(), 5 * US)
    worker.done(worker.take(), 3 * US)
    assert rank.left == list(range(2, N))
    assert rank.ran == rank.ran_by(0) == (1, EDGES[1], 5 * US)
    assert rank.ran_by(7) == worker.ran == (1, EDGES[2] - EDGES[1], 3 * US)
    rank.open()
    worker.join()
    assert rank.left == list(range(N)) and worker.ran == (0, 0, 0)


def test_nobody_takes_from_a_board_that_was_closed():
    words = np.zeros(Board.words(N), np.uint64)
    one, other = board(words), board(words, 1)
    one.open()
    other.close()
    other.close()
    assert one.take() == other.take() == -1 and one.empty and len(one.left) == N
    one.open()
    assert other.take() == 0


def test_cells_that_are_taken_at_once_are_those_of_a_call_and_are_done_together():
    words = np.zeros(Board.words(N), np.uint64)
    rank, worker = board(words), board(words, 7)
    start = 10**9
    rank.open(start, least=EDGES[4], parts=2)
    assert rank.take_some(start) == (0, 4) and worker.take_some(start) == (4, 8)
    rank.done_some(0, 4, 40 * US)
    worker.done_some(4, 8, 60 * US)
    assert rank.left == list(range(8, N)) and rank.ran == (4, EDGES[4], 40 * US)
    assert rank.calls_by(0) == [(EDGES[4], 40 * US)] and rank.calls_by(7) == [(EDGES[8] - EDGES[4], 60 * US)]
    # About half of its part of what is left.
    assert rank.take_some(start + 60 * US) == (8, 16)
    rank.done_some(8, 16, 8 * US)
    rank.done(rank.take(), 5 * US)
    (one, _), (two, took), three = rank.calls_by(0)
    assert (one, two, three) == (EDGES[4], EDGES[16] - EDGES[8], (EDGES[17] - EDGES[16], 5 * US))
    assert took == pytest.approx(8 * US, abs=8), "each cell has its part of it"
    assert rank.ran_by(0)[:2] == rank.ran[:2] == (13, EDGES[4] + EDGES[17] - EDGES[8])


@pytest.mark.parametrize("n", [1, 2, 3, 45, 47, 64])
@pytest.mark.parametrize("least", [0, 1, 5, 1000])
def test_what_is_taken_at_once_is_each_cell_once_whatever_calls_have_at_least(n, least):
    words = np.zeros(Board.words(n), np.uint64)
    there = [board(words, who, margin=1e9, edges=tuple(range(n + 1))) for who in range(3)]
    now = 10**9
    there[0].open(now, least=least, parts=3)
    found = []
    while (cells := there[len(found) % 3].take_some(now))[0] >= 0:
        now += 100
        there[len(found) % 3].done_some(*cells, 100 * (cells[1] - cells[0]))
        found.append(cells)
    assert [k for first, stop in found for k in range(first, stop)] == list(range(n)) and there[0].left == []
    assert all(stop == n or stop - first >= least or first % (2 * (stop - first)) for first, stop in found)
    assert all(first % (stop - first) == 0 or stop == n for first, stop in found)


def test_no_more_is_taken_at_once_than_others_may_wait_for():
    one = board(edges=(0, *range(100, 6500, 100)))
    one.open(10**9, parts=1)
    assert one.take_some(10**9) == (0, 1)
    one.done_some(0, 1, 10**6)
    first, stop = one.take_some(10**9 + 10**6)
    one.done_some(first, stop, (stop - first) * 10**6)
    first, stop = one.take_some(10**9 + 2 * 10**6)
    assert (first, stop) == (2, 4), "a cell takes a millisecond, and half of the rest would be 31"


def test_who_would_need_longer_for_a_call_than_the_others_for_the_rest_leaves_it_to_them():
    edges = tuple(range(0, 1700, 100))
    words = np.zeros(Board.words(16), np.uint64)
    slow, quick = board(words, 1, edges=edges), board(words, 2, edges=edges)
    start = 10**9
    slow.open(start, least=400, parts=2)
    assert slow.take_some(start) == (0, 4) and quick.take_some(start) == (4, 8)
    quick.done_some(4, 8, 100)
    slow.done_some(0, 4, 10**6)
    assert slow.take_some(start + 200) == (-1, -1) and quick.take_some(start + 200)[0] == 8


@pytest.mark.parametrize("first, stop", [(-1, 1), (0, N + 1), (3, 3), (5, 4)])
def test_cells_that_are_none_were_not_run(first, stop):
    with pytest.raises(IndexError):
        board().done_some(first, stop, 1)


def test_who_is_slow_leaves_a_cell_to_the_others_and_who_is_alone_takes_it():
    edges = (0, 100, 200, 300, 400)
    words = np.zeros(Board.words(4), np.uint64)
    slow, quick = board(words, 1, edges=edges), board(words, 2, edges=edges)
    slow.open()
    # Hours for a hundred rows: nothing that is measured here takes so long.
    slow.done(slow.take(), 10**13)
    assert slow.take() == 1, "nobody else has run anything"
    slow.done(1, 10**13)
    quick.done(quick.take(), 10)
    assert slow.take() == -1 and not slow.empty
    assert quick.take() == 3


TAKES = """
import sys
import numpy as np
from rfaas_mpi.fabric import Board
path, who, n, some = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "some"
words = np.memmap(path, np.uint64, "r+")
mine = Board(words[:Board.words(n)], range(n + 1), who, 1e9)
count = words[Board.words(n):]
while not some and (cell := mine.take()) >= 0:
    count[cell] += 1        # lost, or twice, if anybody else had it
    mine.done(cell, 1)
while some and (cells := mine.take_some())[0] >= 0:
    count[slice(*cells)] += 1
    # So that some are taken one by one, and some many at once.
    mine.done_some(*cells, 1 if cells[0] % 3 else 10**9)
"""


@pytest.mark.parametrize("how", ["one", "some"])
def test_processes_that_take_at_the_same_time_never_have_the_same_cell(tmp_path, how):
    n = 100_000
    words = np.memmap(tmp_path / "words", np.uint64, "w+", shape=(Board.words(n) + n,))
    head = Board(words[:Board.words(n)], range(n + 1), 0, 1.0)
    head.open(parts=3)
    there = [subprocess.Popen([sys.executable, "-c", TAKES, str(tmp_path / "words"), str(who), str(n), how])
             for who in (1, 2, 3)]
    assert [one.wait(120) for one in there] == [0, 0, 0]
    assert head.left == [] and (words[Board.words(n):] == 1).all()
    assert sum(head.ran_by(who)[0] for who in (1, 2, 3)) == n


@pytest.mark.parametrize("words, edges", [
    (np.zeros(3, np.uint64), EDGES), (np.zeros(500, np.uint64), (0, 5, 3)),
    (np.zeros(8 * 500 + 1, np.uint8)[1:], EDGES), (np.zeros(500, np.uint64), ())])
def test_what_is_no_board_is_refused(words, edges):
    with pytest.raises(ValueError, match=r"board|before the one|no edges"):
        Board(words, edges, 0, 1.0)


def test_a_read_only_buffer_is_refused():
    with pytest.raises((BufferError, ValueError)):
        Board(bytes(8 * Board.words(N)), EDGES, 0, 1.0)


def test_a_board_of_other_cells_is_refused():
    array = np.zeros(10)
    there = Calls(1, False, "none", (0, 5, 10), [(array.ctypes.data, 80, 8, 0)], 0, array)
    with pytest.raises(ValueError, match="and calls of 2"):
        there.share(board(), 10**18)
    with pytest.raises(IndexError):
        board().done(N, 1)


# --- how long it takes, in worlds that are made up -----------------------------------------------

def played(work_ns: float, paces: tuple[float, ...], rows: int = 100_000, asleep: tuple[int, float, float] | None = None,
           late_ns: float = 3e3, call_ns: float = 20.0, rowwise: bool = False) -> float:
    """How long the rank and workers of these paces take with one board, in ns; the rank's pace is 1.

    `asleep`: who does nothing from when until when; for ever: it is lost, and the rank runs what it had in the end.
    `call_ns`: what each call costs. `rowwise`: one may run several cells, and what calls cost was learned before.
    """
    cells = grid(rows)
    words = np.zeros(Board.words(len(cells)), np.uint64)
    start = 10**9
    there = [Board(words, cells.edges, who, handlers._MARGIN if who else boards._MARGIN) for who in range(len(paces))]
    least = 0
    if rowwise:
        costs = Costs(Link(3e-6), board=True, rowwise=True)
        for who, pace in 8 * list(enumerate(paces)):
            row_s = work_ns * 1e-9 / rows * pace
            calls = [(part, call_ns * 1e-9 * pace + row_s * part) for part in (rows // 4, rows // 8, rows // 8)]
            costs.ran_calls(calls, worker=who or None)
        least = costs.least_rows(rows, len(paces) - 1)
    there[0].open(start, least=least, parts=len(paces))
    events = [(start + (late_ns if who else 0.0), who, (-1, -1), 0) for who in range(len(paces))]
    end = start
    while events:
        now, who, taken, took = heapq.heappop(events)
        if taken[0] >= 0:
            there[who].done_some(*taken, took)
            end = max(end, now)
        if rowwise:
            taken = there[who].take_some(round(now))
        else:
            cell = there[who].take(round(now))
            taken = cell, cell + 1
        if taken[0] < 0:
            continue
        took = round((work_ns * (cells.edges[taken[1]] - cells.edges[taken[0]]) / rows + call_ns) * paces[who])
        until = now + took
        if asleep is not None and who == asleep[0] and now < start + asleep[2] and until > start + asleep[1]:
            if asleep[2] == math.inf:
                continue
            until = start + asleep[2] + took
        heapq.heappush(events, (until, who, taken, took))
    # What nobody wanted, or somebody was lost with.
    return end - start + sum(work_ns * cells.size(cell) / rows for cell in there[0].left)


PACES = [(1.0, 1.0), (1.0,) * 5, (1.0,) * 17, (1.0, 2.1), (1.0, 20.0), (1.0, 1.0, 1.5, 4.0), (1.0, 0.2),
         (1.0, 1.0, 10.0)]


@pytest.mark.parametrize("work_ms", [1.0, 4.0, 30.0, 500.0])
@pytest.mark.parametrize("paces", PACES)
def test_a_board_takes_as_long_as_the_best_that_there_could_be_within_five_per_cent(work_ms, paces):
    best = work_ms * 1e6 / sum(1.0 / pace for pace in paces)
    # Of 17, one has two or three cells of 44 in all.
    assert played(work_ms * 1e6, paces) <= best * (1.05 if len(paces) < 17 else 1.07) + 5e3


@pytest.mark.parametrize("work_ms", [1.0, 4.0, 30.0, 500.0])
@pytest.mark.parametrize("paces", PACES)
def test_where_cells_may_be_run_together_a_call_costs_hardly_anything(work_ms, paces):
    best = work_ms * 1e6 / sum(1.0 / pace for pace in paces)
    together, one_by_one = (played(work_ms * 1e6, paces, call_ns=5e3, rowwise=how) for how in (True, False))
    assert together <= best * (1.05 if len(paces) < 17 else 1.07) + 100e3
    # Some wait a little longer for the last one, and none for so many calls.
    assert together <= one_by_one + 65e3


@pytest.mark.parametrize("work_us", [100.0, 300.0, 1000.0])
def test_fewer_calls_take_less_time_where_a_call_costs_much(work_us):
    """20 µs a call, as of a kernel that makes twenty of its own."""
    one_by_one, together = (played(work_us * US, (1.0, 1.0), call_ns=20e3, rowwise=how) for how in (False, True))
    assert together < 0.8 * one_by_one and together < (work_us / 2 + 70) * 1.15 * US


@pytest.mark.parametrize("work_ms", [4.0, 30.0, 500.0])
def test_a_worker_that_is_lost_costs_what_it_had(work_ms):
    work = work_ms * 1e6
    cell = work * grid(100_000).size(0) / 100_000
    for at in (0.1, 0.3, 0.6):
        # The rank does alone what is left then, and once more what was lost.
        alone = at * work / 2 + (1 - at) * work
        assert played(work, (1.0, 1.0), asleep=(1, at * work / 2, math.inf)) <= alone + 2 * cell + 5e3


def test_a_call_has_rows_enough_for_what_it_costs_and_not_too_many_for_who_is_slow():
    costs = Costs(Link(3e-6), board=True, rowwise=True)
    assert costs.least_rows(10_000, 1) == 0, "nothing is known"
    for worker in (None, 1):
        costs.ran_calls([(1000, 1.010e-3), (2000, 2.010e-3)], worker=worker)
    assert costs.least_rows(10_000, 1) == pytest.approx(160, abs=1), "16 times 10 µs"
    assert costs.least_rows(100, 1) == pytest.approx(25, abs=1), "half of an even part"
    for _ in range(40):
        costs.ran_calls([(1000, 10.10e-3), (2000, 20.10e-3)], worker=1)
    assert costs.least_rows(100, 1) < 8
    assert Costs(Link(3e-6), board=True).least_rows(10_000, 1) == 0


# --- what a worker is told ----------------------------------------------------------------------

def _meta(read: np.ndarray, out: np.ndarray, words: np.ndarray, **changes: object) -> bytes:
    how = {"edges": (0, 8, 16), "whole": (False,), "moves": (False,), "index": False, "by_cell": False, "who": 1}
    return codec.encode_binding((read,), (out, words), codec.Division(**{**how, **changes}))


@pytest.mark.parametrize("changes", [{"edges": (0, 8, 17)}, {"edges": (8, 0)}, {"whole": ()}, {"moves": (True, True)},
                                     {"by_cell": True, "edges": tuple(range(18))}, {"edges": (2**61 - 2, 2**61 - 1)}])
def test_a_division_of_more_than_there_is_is_refused_before_anything_is_run(changes):
    from rfaas_mpi.kernels import Kernel
    library = str(os.path.join(os.path.dirname(rf.__file__), "_native_kernels.so"))
    function = Kernel.from_library(library, "rfm_scale2").native()
    read, out, words = np.ones(16), np.zeros(16), np.zeros(Board.words(20), np.uint64)
    with pytest.raises((ValueError, rf.BadKernel)):
        target = Handlers(lambda: False).bind(function, _meta(read, out, words, **changes), 1, 2)
        target.views((memoryview(read),), (memoryview(out), memoryview(words)))()
    assert not out.any()


def test_a_division_from_before_cells_were_run_together_is_one_of_cells():
    whole = codec.Division((0, 8, 16), (False,), (False,), False, False, 1, True)
    packed = msgspec.json.encode(whole)
    assert msgspec.json.decode(packed, type=codec.Division) == whole
    before = msgspec.json.encode(msgspec.json.decode(packed)[:-1])
    assert not msgspec.json.decode(before, type=codec.Division).rowwise


# --- splits on boards ------------------------------------------------------------------------------

@rf.kernel
def whose(x, out):
    """Each row needs a while on any core."""
    result, who = out
    for row in range(len(x)):
        total = x[row]
        for _ in range(300):
            total = total * 1.0
        result[row] = total * 2
    who[...] = os.getpid()


@pytest.fixture
def ex():
    with Executor(workers=1, transport="shm", fallback=False) as executor:
        yield executor


def _both(ex, rows: int = 4096, **how):
    x = ex.array(np.arange(rows, dtype=float))
    result, who = ex.zeros(rows), ex.zeros(rows, np.int64)
    split = ex.Split_init(whose, (x,), (result, who), grain=1, **how)
    for _ in range(500):
        split.Run()
        if split._shared is not None and split._shared._board.ran_by(1)[0]:
            return split, x, result, who
    raise AssertionError("the worker never took a cell")


def test_workers_take_cells_without_one_being_handed_to_them(ex):
    split, x, result, who = _both(ex)
    assert np.array_equal(result, 2 * x) and os.getpid() in who
    handed, hand = [], split._hand
    split._hand = lambda *what: (handed.append(what), hand(*what))
    shared = 0
    for turn in range(500):
        x[...] = np.arange(len(x)) + turn
        result.fill(np.nan)
        handed.clear()
        begun = split._shared._begun
        split.Run()
        assert np.array_equal(result, 2 * x)
        if split._shared._begun != begun:       # it may be decided otherwise on a busy machine
            assert not handed
            shared += 1
            if shared == 20:
                break
    assert shared


@pytest.mark.parametrize("rowwise", [False, True])
def test_the_cells_of_a_worker_that_was_killed_in_mid_run_are_run_here(ex, rowwise):
    split, x, result, who = _both(ex, rowwise=rowwise)
    pid = next(pid for pid in who if pid != os.getpid())
    shared = split._shared
    land, struck = shared._land, []

    def strike(warm):
        if not struck and shared._board.ran_by(1)[0]:
            struck.append(os.kill(pid, signal.SIGKILL))
        land(warm)
    shared._land = strike
    for turn in range(200):
        x[...] = np.arange(len(x)) + turn
        result.fill(np.nan)
        split.Run()
        assert np.array_equal(result, 2 * x)
        if struck:
            break
    assert struck
    result.fill(np.nan)
    split.Run()
    assert np.array_equal(result, 2 * x)


def test_a_split_goes_on_from_turn_to_turn_where_it_takes_longer(ex):
    split, x, result, who = _both(ex, 10_000)
    sent = []
    send = split._shared._send
    split._shared._send = lambda count: (sent.append(count), send(count))
    for _ in range(50):
        result.fill(np.nan)
        split.Run()
        assert np.array_equal(result, 2 * x)
        if 2 in sent:
            break
    assert 2 in sent, "the next turn lies behind the one that runs"


def test_small_inputs_that_lie_in_the_rank_s_own_memory_are_those_of_each_run(ex):
    x, out = ex.array(np.ones(50_000)), ex.empty(50_000)
    factor, table = np.array(0.0), np.zeros(8)
    split = ex.Split_init(_scaled, (x, factor, table), out, whole=(1, 2))
    shared = 0
    for turn in range(500):
        factor[...], table[:] = turn, turn + 1
        split.Run()
        assert (out == turn + turn + 1).all()
        shared += split._shared is not None and split._shared._board.ran_by(1)[0] > 0
        if shared > 80:         # more than there are slots
            break
    assert shared


@rf.kernel
def _scaled(x, factor, table, out):
    for _ in range(100):
        np.multiply(x, factor, out=out)
    out += table[3]


def test_a_time_limit_is_each_call_s_own_so_that_cells_are_handed_over(ex):
    x, out = ex.array(np.ones(50_000)), ex.empty(50_000)
    split = ex.Split_init(_scaled, (x, np.array(2.0), np.zeros(8)), out, whole=(1, 2), timeout_s=60.0)
    split.Run()
    assert (out == 2.0).all() and split._shared is None


@rf.kernel
def slow_at_first(x, out):
    """As one that compiles itself in its first call."""
    global _compiled
    if not globals().get("_compiled") and os.getpid() != int(x[0]):
        time.sleep(2.5)
    _compiled = True
    out[...] = x + np.array([total for _ in range(300) for total in (0.0,)]).sum()


def test_a_kernel_that_compiles_in_its_first_call_costs_no_worker(ex):
    workers = ex.workers
    x, out = ex.array(np.full(40_000, float(os.getpid()))), ex.empty(40_000)
    split = ex.Split_init(slow_at_first, x, out)
    until = time.monotonic() + 60.0
    while split._shared is None and time.monotonic() < until:
        split.Run()
        assert np.array_equal(out, x)
    split.Run()
    assert split._shared is not None and ex.workers == workers and np.array_equal(out, x)


@rf.kernel
def adds(x, out):
    out += x


@pytest.mark.parametrize("rowwise", [False, True])
def test_each_cell_is_run_once_as_long_as_no_worker_is_lost(ex, rowwise):
    x, out = ex.array(np.ones(200_000)), ex.zeros(200_000)
    split = ex.Split_init(adds, x, out, rowwise=rowwise)
    for turn in range(1, 30):
        split.Run()
        assert (out == turn).all()


@rf.kernel
def sized(x, first, out):
    """Each row, how many rows its call had, and where they begin."""
    result, count, begin = out
    total = x * 1.0
    for _ in range(200):
        np.multiply(total, 1.0, out=total)
    result[...], count[...], begin[...] = total, len(x), first


def test_cells_are_run_together_where_rows_don_t_depend_on_each_other(ex):
    rows = 50_000
    x, out = ex.array(np.linspace(0.0, 1.0, rows)), (ex.zeros(rows), ex.zeros(rows, np.int64), ex.zeros(rows, np.int64))
    here = ex.Split_init(sized, x, out, index=True, rowwise=True, where="here")
    here.Run()
    assert np.array_equal(out[0], x) and (out[1] == rows).all() and (out[2] == 0).all()
    split = ex.Split_init(sized, x, out, index=True, rowwise=True)
    edges, together = split._cells.edges, 0
    for _ in range(500):
        for array in out:
            array.fill(-1)
        split.Run()
        assert np.array_equal(out[0], x)
        at = 0
        while at < rows:        # calls lie behind each other, and each has whole cells
            assert out[2][at] == at and at in edges
            together += (edges.index(at + out[1][at]) - edges.index(at)) > 1
            at += out[1][at]
        if together and split._shared is not None and split._shared._board.calls_by(1):
            break
    assert together and split._shared._board.calls_by(1)


def test_results_of_cells_are_combined_cell_by_cell(ex):
    x = ex.array(np.ones(5000))
    with pytest.raises(ValueError, match="rowwise"):
        ex.Split_init(adds, x, np.zeros(1), reduce=np.add, rowwise=True)


@pytest.mark.parametrize("other, fewest, most", [(math.inf, 12, 30), (1.0, 200, 200)])
def test_short_runs_that_stay_here_are_learned_from_now_and_then(ex, monkeypatch, other, fewest, most):
    monkeypatch.setattr(splitting, "_OTHER", other)
    monkeypatch.setattr(splitting, "_SHORT_S", math.inf)
    x, out = ex.array(np.ones(512)), ex.zeros(512)
    split = ex.Split_init(adds, x, out, where="here")
    told, ran = [], split._costs.ran
    split._costs.ran = lambda *what, **how: (told.append(how["before_s"]), ran(*what, **how))
    for _ in range(200):
        split.Run()
    assert (out == 200).all() and fewest <= len(told) <= most
    assert (sum(told) > 0.0) == (len(told) < 200), "what the others took is earned all the same"


def test_a_short_run_that_has_no_time_to_ask_a_worker_is_run_here_in_one_go(ex, monkeypatch):
    x, out = ex.array(np.ones(400_000)), ex.zeros(400_000)
    split, raced = ex.Split_init(adds, x, out), []
    run = splitting.Split._run
    monkeypatch.setattr(splitting.Split, "_run", lambda self, *what: (raced.append(1), run(self, *what)))
    split.Run()
    assert len(raced) == 1, "nothing was known of it"
    for _ in range(25):
        split._costs._budget_s = -1.0
        split.Run()
    assert len(raced) == 1 and (out == 26).all()
    # As soon as there is time it is asked.
    split._costs._budget_s = 1.0
    split.Run()
    assert len(raced) == 2 and (out == 27).all()
    until = time.monotonic() + 60.0
    while ex._splits.probes and time.monotonic() < until:
        ex._splits.harvest()
    assert not ex._splits.probes


def test_sizes_that_share_what_is_known_don_t_confuse_each_other():
    costs = Costs(Link(3e-6), board=True)
    grids = [grid(66_000), grid(130_000)]
    for _ in range(6):
        for cells in grids:
            costs.ran_some(cells.rows, len(cells), cells.rows * 1e-6, worker=None, beside=False)
            for worker in (None, 1):
                costs.ran_some(cells.rows // 2, len(cells) // 2, cells.rows // 2 * 1e-6, worker=worker)
            costs.ran(cells, 1, cells.rows / 2 * 1e-6, offloaded=True)
    for cells in grids:
        assert costs.forecast(cells, 1).here_s == pytest.approx(cells.rows * 1e-6, rel=0.1)


def test_an_error_of_the_rank_s_own_ends_the_workers_turns(ex):
    split, x, result, who = _both(ex)
    here = split._here

    def fails(run, *args):
        if len(split._shared._flying):
            raise KernelError("here alone")
        return here(run, *args)
    split._here = fails
    with pytest.raises(KernelError, match="here alone"):
        split.Run()
    assert not split._shared._flying and not any(turn.active for turn in split._shared._turns)
    split._here = here
    result.fill(np.nan)
    split.Run()
    assert np.array_equal(result, 2 * x)


# --- what is expected of it -----------------------------------------------------------------------

def _known(here_s: float, there_s: float) -> tuple[Costs, object]:
    cells = grid(10_000)
    costs = Costs(Link(3e-6), board=True)
    for worker, seconds in ((None, here_s), (1, there_s)):
        costs.ran_some(cells.rows, len(cells), seconds, worker=worker, beside=worker is None)
    costs.ran_some(cells.rows, len(cells), here_s, worker=None, beside=False)
    costs.ran(cells, 1, costs.forecast(cells, 1).split_s, offloaded=True)
    return costs, cells


def test_two_that_are_alike_are_expected_to_take_half_as_long_and_one_that_is_slow_helps_as_it_can():
    costs, cells = _known(10e-3, 10e-3)
    found = costs.forecast(cells, 1)
    assert found.split_s == pytest.approx(5e-3, rel=0.01) and found.share == pytest.approx(0.5, rel=0.01)
    assert costs.decide(cells, 1) is True
    costs, cells = _known(10e-3, 40e-3)
    assert costs.forecast(cells, 1).split_s == pytest.approx(8e-3, rel=0.01)
    assert costs.forecast(cells, 4).split_s == pytest.approx(5e-3, rel=0.01)


def test_how_wrong_predictions_were_says_nothing_of_data_that_takes_much_longer():
    costs, cells = _known(100e-6, 100e-6)
    for _ in range(5):
        costs.ran(cells, 1, 4 * costs.forecast(cells, 1).split_s / costs.split.ratio, offloaded=True)
    assert costs.split.ratio > 3.0 and costs.decide(cells, 1) is False
    for _ in range(60):
        costs.ran_alone(cells.rows / len(cells), 2e-3, len(cells))
    found = costs.forecast(cells, 1)
    assert found.split_s < 1.2e-3 < found.here_s and costs.decide(cells, 1) is True


def test_data_that_takes_longer_makes_rows_slower_and_not_what_a_call_costs():
    """A worker's call that costs 20 µs still does, when the rows of another piece of work take ten times as long."""
    cells = grid(4096, 16)
    costs = Costs(Link(3e-6), board=True)
    for _ in range(5):
        for worker, call_s in ((None, 5e-6), (1, 20e-6)):
            for rows in (1024, 2048):
                costs.ran_some(rows, 8, 8 * call_s + rows * 10e-9, worker=worker)
    costs.alone.guess(costs.beside)
    for _ in range(60):
        costs.ran_alone(256, len(cells) * (5e-6 + 256 * 200e-9), len(cells))
    assert costs.there.fixed == pytest.approx(20e-6, rel=0.1)
    assert costs.there.slope == pytest.approx(200e-9, rel=0.25)
    for _ in range(60):
        costs.ran_alone(256, len(cells) * (5e-6 + 256 * 10e-9), len(cells))
    assert costs.there.at(256) < 30e-6


def test_a_first_run_that_was_slow_is_no_reason_to_ask_for_help_for_ever():
    """What touches its memory first takes many times as long, and a kernel that is divided is never run alone again."""
    cells = grid(10_000)
    costs = Costs(Link(3e-6), board=True)
    costs.ran_some(cells.rows, len(cells), 20e-3, worker=None, beside=False)
    for worker in (None, 1):
        costs.ran_some(cells.rows, len(cells), 200e-6, worker=worker)
    costs.waking.add(0.0, 200e-6)
    assert costs.forecast(cells, 1).here_s == pytest.approx(200e-6, rel=0.01)
    assert costs.decide(cells, 1) is False


def test_what_takes_less_than_to_ask_for_help_is_run_here():
    costs, cells = _known(4e-6, 4e-6)
    assert costs.decide(cells, 1) is False


def test_what_takes_longer_for_its_data_is_noticed_on_both_sides_at_once():
    costs, cells = _known(1e-3, 1e-3)
    for _ in range(8):
        costs.decide(cells, 1)
        for worker in (None, 1):
            costs.ran_some(cells.rows // 2, len(cells) // 2, 10e-3, worker=worker)
        costs.ran(cells, 1, 10e-3, offloaded=True)
    found = costs.forecast(cells, 1)
    assert costs.decide(cells, 1) is True
    assert found.split_s == pytest.approx(10e-3, rel=0.1) and found.here_s > 12e-3

"""Split: a kernel divided between the rank and its workers gives the answer that it gives in one place."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import kernels_for_tests as k
import numpy as np
import pytest
import transports

import rfaas_mpi as rf
from rfaas_mpi import CancelledError, ClosedError, Executor, InvalidBuffer, KernelError, splitting
from rfaas_mpi.planner import grid

WHERE = ("both", "here", "workers")


@rf.kernel
def cubes(x, out):
    np.multiply(x * x, x, out=out)


@rf.kernel
def naps(x, out):
    """As a kernel that takes 2 ms a row, on any core and beside any number of others."""
    time.sleep(0.002 * len(x))
    result, who = out
    result[...] = x * 3
    who[...] = os.getpid()


@rf.kernel
def rotated(x, matrix, factor, out):
    np.matmul(x, matrix * factor, out=out)


@rf.kernel
def numbers(first, out):
    out[...] = first + np.arange(len(out))


@rf.kernel
def tally(x, out):
    out[0] = x.sum()
    out[1] = (x * x).sum()


@rf.kernel
def refuses(x, out):
    if (x < 0).any():
        raise ValueError("a row is negative")
    out[...] = x


@rf.kernel
def leaves(x, out):
    sys.exit(3)


@rf.kernel
def nests(x, out):
    Executor(transport="inline")


@pytest.fixture(params=["inline", *transports.OVER])
def ex(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


@pytest.fixture(params=transports.OVER)
def worker(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


def napping(executor: Executor, rows: int = 96) -> tuple[rf.splitting.Split, np.ndarray, np.ndarray, np.ndarray]:
    """A split of 2 ms a row; its input and outputs."""
    x = executor.array(np.arange(rows, dtype=float))
    result, who = executor.zeros(rows), executor.zeros(rows, np.int64)
    return executor.Split_init(naps, x, (result, who), grain=1), x, result, who


# --- the same bits -----------------------------------------------------------------------

def test_every_row_is_there_wherever_it_was_run(ex):
    for where in WHERE:
        for rows in (0, 1, 7, 8, 1000, 100_003):
            for array in (np.array, ex.array):
                x, out = array(np.linspace(-1.0, 1.0, rows)), array(np.full(rows, np.nan))
                assert ex.Split(cubes, x, out, where=where) is out
                assert np.array_equal(out, x * x * x)


def test_what_is_whole_goes_to_each_cell(ex):
    random = np.random.default_rng(3)
    x, matrix = random.random((5000, 8)), random.random((8, 8))
    expected = np.empty((5000, 8))
    for k in range(len(cells := grid(5000, 128, 64))):
        part = cells.cell(k)
        np.matmul(x[part], matrix * 1.5, out=expected[part])
    for given, whole in ((matrix, (1,)), (matrix, (-2,)), (ex.put(matrix), ())):
        for where in WHERE:
            out = np.full((5000, 8), np.nan)
            ex.Split(rotated, (x, given, 1.5), out, whole=whole, grain=64, where=where)
            assert np.array_equal(out, expected)


@pytest.mark.parametrize("how, said", [({"reduce": "plus"}, "reduce='plus' can't combine"), ({"whole": 0}, r"give whole=\(0,\)")])
def test_how_is_looked_at_before_anything_runs(ex, how, said):
    with pytest.raises(TypeError, match=said):
        ex.Split(rotated, np.ones(3), np.empty(3), **how)


def test_a_cell_knows_where_it_begins(ex):
    for where in WHERE:
        out = ex.zeros(10_000, np.int64)
        ex.Split(numbers, (), out, index=True, where=where)
        assert np.array_equal(out, np.arange(10_000))


def test_results_are_combined_in_one_order_whoever_had_them_first(ex):
    x = ex.array(np.random.default_rng(5).standard_normal(200_000))
    found = {where: ex.Split(tally, x, np.empty(2), reduce=np.add, where=where).tobytes() for where in WHERE}
    assert len(set(found.values())) == 1
    cells = grid(200_000, 8)
    total = x[cells.cell(0)].sum()
    for k in range(1, len(cells)):
        total = total + x[cells.cell(k)].sum()
    assert np.frombuffer(found["here"])[0] == total


def test_no_rows_are_reduced_to_what_changes_nothing(ex):
    for where in WHERE:
        out = np.full(2, np.nan)
        assert ex.Split(tally, np.empty(0), out, reduce=np.add, where=where) is out
        assert np.array_equal(out, [0.0, 0.0])
    with pytest.raises(InvalidBuffer, match="no rows"):
        ex.Split(tally, np.empty(0), np.empty(2), reduce=np.maximum)


def test_a_split_runs_again_on_what_its_arrays_hold_now(ex):
    x, out = ex.empty(50_000), ex.empty(50_000)
    split = ex.Split_init(cubes, x, out)
    for turn in range(5):
        x[...] = turn + np.arange(50_000)
        assert split.Run() is out
        assert np.array_equal(out, x * x * x)
    split.Free()
    split.Free()
    with pytest.raises(ClosedError, match="freed"):
        split.Run()


NATIVE = str(Path(rf.__file__).with_name("_native_kernels.so"))


def native(symbol: str, abi: str = "rfm") -> rf.Kernel:
    return rf.Kernel.from_library(NATIVE, symbol, abi=abi)


def test_native_kernels_are_called_once_for_each_cell_wherever_they_run(ex):
    random = np.random.default_rng(8)
    for rows in (1, 100, 50_001):
        x, plain = random.standard_normal(rows), ex.array(random.standard_normal(rows))
        for where in WHERE:
            for given in (x, plain):
                out = ex.empty(rows)
                ex.Split(native("rfm_scale2"), given, out, where=where)
                assert np.array_equal(out, 2 * given)
                out = np.full(rows, np.nan)
                ex.Split(native("rfm_plain_echo", "plain"), given, out, where=where)
                assert np.array_equal(out, given)
    x = random.standard_normal(200_000)
    cells = grid(200_000, 8)
    for where in WHERE:
        total, count = np.empty(()), np.empty((), np.uint64)
        ex.Split(native("rfm_sum"), (x, np.array(7.0)), (total, count), whole=(1,), reduce=np.add, where=where)
        one = np.empty(1), np.empty(1, np.uint64)
        expected = None
        for k in range(len(cells)):
            native("rfm_sum").run((x[cells.cell(k)], np.array(7.0)), one)
            expected = one[0][0] if expected is None else expected + one[0][0]
        assert total == expected


def test_a_native_kernel_s_cells_are_told_where_they_begin(ex):
    cells = grid(10_000, 8)
    for where in WHERE:
        out = ex.array(np.full(10_000, -1))
        ex.Split(native("rfm_echo"), (), out, index=True, where=where)
        assert all(out[k] == k for k in cells.edges[:-1]) and (out < 0).sum() == 10_000 - len(cells)


@pytest.mark.parametrize("symbol, said", [("rfm_bad_negative", "returned -"), ("rfm_bad_length", "says that it wrote")])
def test_a_native_kernel_that_fails_raises_wherever_it_ran(ex, symbol, said):
    x, out = np.ones(20_000), np.empty(20_000)
    for where in WHERE:
        with pytest.raises(KernelError, match=said):
            ex.Split(native(symbol), x, out, where=where)


# --- who runs what -------------------------------------------------------------------------

def test_workers_are_used_where_that_pays(worker):
    split, x, result, who = napping(worker)
    for _ in range(20):
        split.Run()
        assert np.array_equal(result, x * 3)
        if len(set(who)) > 1:
            break
    assert len(set(who)) == 2 and os.getpid() in who
    found = split.predict()
    assert found.offload is True and found.split_s < found.here_s
    assert 0.2 < found.share < 0.8
    assert "with 1 worker" in found.why
    assert found in worker.explain() and "offload" in str(found)


def test_workers_are_not_used_where_that_can_t_pay(worker):
    x, out = worker.array(np.arange(16.0)), worker.empty(16)
    split = worker.Split_init(cubes, x, out, grain=1)
    for _ in range(50):
        split.Run()
    assert split.predict().offload is not True


def test_a_run_is_predicted_before_it_runs(worker):
    split = napping(worker)[0]
    assert split.predict().offload is None and split.predict().predicted_s is None
    for _ in range(6):
        split.Run()
    assert split.predict().predicted_s > 0.0
    # What was seen on few rows tells of more of them.
    assert napping(worker, 400)[0].predict().here_s > 0.7


def test_no_rows_of_a_kernel_that_is_known_need_nobody(worker):
    split, x, result, who = napping(worker)
    for _ in range(20):
        split.Run()
        if split.predict().offload is not None:
            break
    none = worker.Split_init(naps, x[:0], (result[:0], who[:0]), grain=1)
    none.Run()
    assert none.predict().offload is False and none.predict().why == "there are no rows"
    assert [found.rows for found in worker.explain()] == [96, 0]


def test_a_kernel_that_loads_for_long_is_not_waited_for_and_costs_no_worker(worker, tmp_path):
    go = tmp_path / "go"

    class Loads:
        def __reduce__(self):
            return k.wait_for, (go, 1)

    held = Loads()

    @rf.kernel
    def shifted(x, table, out):
        time.sleep(0.001 * len(x))
        out[...] = x + table[0] if held else x

    x, table, out = worker.array(np.arange(96.0)), worker.array(np.ones(100)), worker.empty(96)
    workers = worker.workers
    split = worker.Split_init(shifted, (x, table), out, whole=(1,), grain=1)
    for turn in range(3):
        table[0] = turn
        split.Run()
        assert np.array_equal(out, x + turn)
    assert worker.workers == workers and split.predict().offload is None
    go.touch()
    for _ in range(200):
        split.Run()
        if split.predict().offload is not None:
            break
    assert split.predict().offload is True and worker.workers == workers


def test_without_a_worker_all_of_it_runs_here():
    with Executor(transport="inline") as ex:
        split, x, result, who = napping(ex, 16)
        split.Run()
        assert set(who) == {os.getpid()} and np.array_equal(result, x * 3)
        assert "no worker" in split.predict().why


# --- faults --------------------------------------------------------------------------------

def test_a_kernel_that_fails_raises_and_leaves_nothing_in_flight(ex):
    x, out = ex.array(np.arange(50_000.0)), ex.empty(50_000)
    for where in WHERE:
        split = ex.Split_init(refuses, x, out, where=where)
        for bad in (0, 25_000, 49_999):
            x[bad] = -1.0
            with pytest.raises(KernelError, match="a row is negative"):
                split.Run()
            x[bad] = bad
            split.Run()
            assert np.array_equal(out, x)
        split.Free()


@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_gone_or_stopped_costs_no_row(worker, deed):
    split, x, result, who = napping(worker)
    for _ in range(20):
        split.Run()
        if len(set(who)) > 1:
            break
    pid = next(pid for pid in who if pid != os.getpid())
    result.fill(np.nan)
    timer = threading.Timer(0.03, os.kill, (pid, deed))
    timer.start()
    split.Run()
    timer.join()
    assert np.array_equal(result, x * 3)
    for _ in range(3):
        result.fill(np.nan)
        split.Run()
        assert np.array_equal(result, x * 3)


def test_a_worker_that_is_stopped_all_along_is_not_waited_for(worker):
    split, x, result, who = napping(worker)
    for _ in range(20):
        split.Run()
        if len(set(who)) > 1:
            break
    os.kill(next(pid for pid in who if pid != os.getpid()), signal.SIGSTOP)
    result.fill(np.nan)
    split.Run()
    assert np.array_equal(result, x * 3) and set(who) == {os.getpid()}
    # On this node what it has not begun was taken back; over a network it had to be given up.
    assert split.predict().stalls >= ("transport=shm" not in repr(worker))


def test_a_kernel_that_fails_here_raises_though_a_worker_has_stopped(worker):
    split, x, result, who = napping(worker)
    for _ in range(20):
        split.Run()
        if len(set(who)) > 1:
            break
    os.kill(next(pid for pid in who if pid != os.getpid()), signal.SIGSTOP)
    split._here = fails
    caught = []
    end = threading.Thread(target=lambda: caught.append(pytest.raises(KernelError, split.Run)))
    end.start()
    end.join(60.0)
    assert caught and "here alone" in str(caught[0].value)


def fails(*_call):
    raise KernelError("here alone")


def test_a_split_sends_nothing_behind_a_long_call_that_can_t_be_taken_back(worker):
    split, x, result, who = napping(worker)
    for _ in range(20):
        split.Run()
        if len(set(who)) > 1:
            break
    workers = worker.workers
    long = worker.submit(time.sleep, 2.0)
    result.fill(np.nan)
    split.Run()
    assert np.array_equal(result, x * 3)
    long.result()
    assert worker.workers == workers


def test_who_is_given_up_is_given_no_time_to_let_go(worker):
    x, result, who = worker.array(np.ones(8)), worker.empty(8), worker.empty(8, np.int64)
    worker.Invoke(naps, x, (result, who))
    os.kill(int(who[0]), signal.SIGSTOP)
    request = worker.Iinvoke(naps, x, (result, who))
    splitting.dismiss(worker._crew, request)
    assert request._raw.wait(1.0)
    with pytest.raises(CancelledError):
        request.Wait()


def test_an_executor_ends_though_a_worker_that_stopped_never_said_what_it_takes(worker):
    pid = worker.submit(os.getpid).result()
    os.kill(pid, signal.SIGSTOP)
    split, x, result, who = napping(worker)
    split.Run()
    assert np.array_equal(result, x * 3) and set(who) == {os.getpid()}
    end = threading.Thread(target=worker.shutdown)
    end.start()
    end.join(60.0)
    ended = not end.is_alive()
    if not ended:
        os.kill(pid, signal.SIGCONT)
        end.join()
    assert ended


@pytest.mark.parametrize("where", ["here", "workers"])
def test_a_kernel_is_one_wherever_it_runs(worker, where):
    x, out = worker.array(np.ones(96)), worker.zeros(96)
    with pytest.raises(KernelError, match="sys.exit"):
        worker.Split(leaves, x, out, where=where)
    with pytest.raises(KernelError, match="inside a kernel"):
        worker.Split(nests, x, out, where=where)


# --- arguments -------------------------------------------------------------------------------

@pytest.mark.parametrize("inputs, out, how, said", [
    ((np.ones(4), np.ones(5)), np.ones(4), {}, "input 1"),
    (np.ones(4), np.ones(5), {}, "has 4 rows"),
    (np.ones(4), np.array(1.0), {}, "no rows to divide"),
    (1.0, np.ones(2), {"reduce": np.add}, "nothing says how many rows"),
    (np.ones(4), np.ones(4), {"whole": (1,)}, "names input 1"),
    (np.ones(4), np.ones(4), {"rows": 5}, "has 4 rows"),
    (np.ones(4), np.ones(4), {"rows": np.int64(5)}, "has 4 rows"),
    (np.ones(8)[::2], np.ones(4), {}, "not C-contiguous")])
def test_arguments_that_can_t_be_divided_are_named(inputs, out, how, said):
    with Executor(transport="inline") as ex, pytest.raises(InvalidBuffer, match=said):
        ex.Split(cubes, inputs, out, **how)


def test_wrong_words_are_refused():
    with Executor(transport="inline") as ex:
        for how in ({"grain": 0}, {"where": "there"}):
            with pytest.raises(ValueError):
                ex.Split(cubes, np.ones(4), np.ones(4), **how)
        with pytest.raises(TypeError, match="is no kernel"):
            ex.Split(np.sqrt, np.ones(4), np.ones(4))


def test_arrays_of_a_call_in_flight_are_refused(worker):
    x, result, who = worker.array(np.ones(200)), worker.empty(200), worker.empty(200)
    request = worker.Iinvoke(naps, x, (result, who))
    with pytest.raises(InvalidBuffer, match="in flight"):
        worker.Split(cubes, x, result)
    request.Wait()
    worker.Split(cubes, x, result)
    assert (result == 1.0).all()


def test_inputs_are_the_caller_s_again_when_a_split_returns(worker):
    # A probe may still read what is whole: it is over, too.
    x, table, out = worker.array(np.ones((3000, 8))), worker.array(np.eye(8)), worker.empty((3000, 8))
    for turn in range(30):
        table[...] = np.eye(8) * turn
        worker.Split(rotated, (x, table, 1.0), out, whole=(1,))
        assert (out == turn).all()
        worker.Invoke(cubes, np.ones(64), table.reshape(-1))

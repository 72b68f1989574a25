"""Futures are concurrent.futures', whoever looks at them and in whatever order."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import traceback
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION, CancelledError, InvalidStateError

import kernels_for_tests as k
import numpy as np
import pytest
import transports

from rfaas_mpi import Executor, KernelError


@pytest.fixture(params=["inline", *transports.OVER])
def ex(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


@pytest.fixture(params=transports.OVER)
def worker(request, executor_over):
    """An executor whose one worker is another process."""
    with executor_over(request.param) as executor:
        yield executor


# --- results and errors -------------------------------------------------------------

def test_a_result_can_be_asked_for_again(ex):
    future = ex.submit(k.add, 1, b=2)
    assert isinstance(future, concurrent.futures.Future)
    assert [future.result() for _ in range(3)] == [3, 3, 3]
    assert future.exception() is None
    assert future.done()
    assert not future.running()
    assert not future.cancelled()
    assert not future.cancel()
    assert "finished returned int" in repr(future)


def test_the_kernels_own_exception_arrives_with_its_remote_traceback(ex):
    future = ex.submit(k.raise_key_error, "nose")
    with pytest.raises(KeyError, match="nose") as caught:
        future.result()
    assert future.exception() is caught.value
    text = "".join(traceback.format_exception(caught.value))
    assert "raise KeyError(key)" in text
    assert "in raise_key_error" in text


def test_an_exception_that_cannot_travel_arrives_as_its_repr(ex):
    error = ex.submit(k.raise_unpicklable).exception()
    assert isinstance(error, KernelError)
    assert "this and that" in str(error)
    assert "raise Unpicklable" in str(error.__cause__)


def test_a_result_that_cannot_travel_arrives_as_its_repr(ex):
    error = ex.submit(k.return_unpicklable).exception()
    assert isinstance(error, KernelError)
    assert "generator" in str(error)


def test_only_the_executor_ends_its_futures(ex):
    future = ex.submit(k.add, 1)
    for change in (future.set_running_or_notify_cancel, lambda: future.set_result(1),
                   lambda: future.set_exception(None)):
        with pytest.raises(InvalidStateError):
            change()
    assert future.result() == 1


# --- concurrent.futures' functions --------------------------------------------------

def test_as_completed_gives_each_future_once(ex):
    futures = [ex.submit(k.add, n, n) for n in range(50)]
    found = list(concurrent.futures.as_completed(futures, timeout=60))
    assert len(found) == 50
    assert sorted(future.result() for future in found) == [2 * n for n in range(50)]


def test_wait_returns_when_it_was_asked_to(ex):
    futures = [ex.submit(k.add, n) for n in range(10)] + [ex.submit(k.raise_key_error, 1)]
    for when in (FIRST_COMPLETED, FIRST_EXCEPTION, ALL_COMPLETED):
        done, not_done = concurrent.futures.wait(futures, timeout=60, return_when=when)
        assert done
        assert done | not_done == set(futures)
    assert not not_done


def test_wait_wakes_for_the_first_and_leaves_the_others(worker, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    futures = [worker.submit(k.wait_for, first), worker.submit(k.wait_for, second)]
    assert concurrent.futures.wait(futures, timeout=0.0).done == set()
    threading.Timer(0.02, first.touch).start()
    done, not_done = concurrent.futures.wait(futures, timeout=60, return_when=FIRST_COMPLETED)
    assert done == {futures[0]}
    assert not_done == {futures[1]}
    second.touch()
    assert concurrent.futures.wait(futures, timeout=60).done == set(futures)


def test_callbacks_run_once_before_and_after_the_end(worker, tmp_path):
    flag = tmp_path / "flag"
    heard: list[object] = []
    all_heard = threading.Event()
    future = worker.submit(k.wait_for, flag, 7)
    for name in ("a", "b"):
        future.add_done_callback(lambda f, name=name: heard.append((name, f.result())))
    future.add_done_callback(lambda f: all_heard.set())
    assert not heard
    flag.touch()
    assert all_heard.wait(60)
    assert heard == [("a", 7), ("b", 7)]
    future.add_done_callback(lambda f: heard.append("late"))
    assert heard[2:] == ["late"]


def test_a_callback_that_raises_stops_nobody(worker, tmp_path, caplog):
    flag, heard = tmp_path / "flag", threading.Event()
    future = worker.submit(k.wait_for, flag)
    future.add_done_callback(lambda f: 1 / 0)
    future.add_done_callback(lambda f: heard.set())
    flag.touch()
    assert heard.wait(60)
    assert "ZeroDivisionError" in caplog.text


def test_asyncio_can_wait_for_futures(ex):
    async def gather() -> list[int]:
        return await asyncio.gather(*(asyncio.wrap_future(ex.submit(k.add, n)) for n in range(5)))
    assert asyncio.run(gather()) == [0, 1, 2, 3, 4]


def test_run_in_executor_works(ex):
    async def run() -> int:
        return await asyncio.get_running_loop().run_in_executor(ex, k.add, 40, 2)
    assert asyncio.run(run()) == 42


def test_many_threads_may_wait_for_one_future(worker, tmp_path):
    flag = tmp_path / "flag"
    future = worker.submit(k.wait_for, flag, list(range(100)))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(future.result, 60) for _ in range(8)]
        flag.touch()
        results = [each.result(60) for each in waiting]
    assert all(result is results[0] for result in results)


# --- time-outs and cancelling ---------------------------------------------------------

def test_result_raises_after_its_timeout_and_the_call_goes_on(worker, tmp_path):
    flag = tmp_path / "flag"
    future = worker.submit(k.wait_for, flag, "there")
    with pytest.raises(TimeoutError):
        future.result(0.01)
    with pytest.raises(TimeoutError):
        future.exception(0)
    assert not future.done()
    flag.touch()
    assert future.result(60) == "there"


def test_what_still_waits_for_a_slot_can_be_cancelled(tmp_path):
    flag, touched = tmp_path / "flag", tmp_path / "touched"
    with Executor(workers=1, slots=2) as executor:
        first = [executor.submit(k.wait_for, flag, n) for n in range(2)]
        later = [executor.submit(k.touch, touched) for _ in range(20)]
        assert later[-1].cancel()
        assert all(future.cancel() for future in later[5:])
        assert later[-1].cancelled()
        assert later[-1].done()
        with pytest.raises(CancelledError):
            later[-1].result()
        with pytest.raises(CancelledError):
            later[-1].exception()
        assert later[-1] in concurrent.futures.wait([later[-1], first[0]], return_when=FIRST_COMPLETED).done
        for future in later:
            future.cancel()
        flag.touch()
        assert [future.result(60) for future in first] == [0, 1]


def test_what_runs_is_not_cancelled_without_force(worker, tmp_path):
    started, flag = tmp_path / "started", tmp_path / "flag"
    future = worker.submit(k.start_and_wait_for, started, flag, 5)
    k.wait_for(started)
    assert not future.cancel()
    assert future.running()
    flag.touch()
    assert future.result(60) == 5


def test_force_cancels_what_runs_and_its_neighbours_run_again(tmp_path):
    started, flag = tmp_path / "started", tmp_path / "flag"
    with Executor(workers=1) as executor:
        future = executor.submit(k.start_and_wait_for, started, flag)
        neighbours = [executor.submit(k.add, n) for n in range(5)]
        k.wait_for(started)
        assert future.cancel(force=True)
        with pytest.raises(CancelledError):
            future.result(60)
        assert future.cancelled()
        assert [neighbour.result(60) for neighbour in neighbours] == [0, 1, 2, 3, 4]


# --- arrays -----------------------------------------------------------------------------

def test_arrays_travel_both_ways_unchanged(ex):
    for x in (np.arange(8.0), np.arange(100_000).reshape(100, 1000), np.zeros((0, 3)), np.float32(2.5),
              np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(["a", "bc"])):
        again = ex.submit(k.identity, {"x": [x]}).result()["x"][0]
        assert again.dtype == x.dtype
        np.testing.assert_array_equal(again, x)


def test_a_kernels_argument_is_its_own_copy_and_results_are_writable(ex):
    x = np.zeros(10_000)
    result = ex.submit(k.set_item, x, 0, 5).result()
    assert x[0] == 0
    assert result[0] == 5
    result[0] = 6


def test_arrays_of_the_executor_arrive_read_only_and_uncopied(worker):
    x = worker.zeros(100_000)
    before = worker.submit(k.add, x).result()
    assert before.sum() == 0
    assert not worker.submit(k.is_writable, x).result()
    constant = worker.put(np.ones(100_000))
    assert worker.submit(k.add, constant, 1).result().sum() == 200_000
    assert worker.submit(k.identity, {"deep": [constant]}).result()["deep"][0].sum() == 100_000

"""A kernel that misbehaves fails alone: its neighbours on all workers are right, and the next call works."""

from __future__ import annotations

import concurrent.futures
import os
import time

import faults
import numpy as np
import pytest
from faults import native

from rfaas_mpi import CancelledError, Executor, KernelError, KernelTimeout, Startall, Waitall

MEMORY = "1G"


@pytest.fixture
def ex():
    """Two workers, one of which most tests here lose."""
    with Executor(workers=2, cores=(0, 1), memory_per_worker=MEMORY) as executor:
        yield executor


class Neighbours:
    """Calls of both kinds around a fault, on both workers; `check` says that all of them were right."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._futures: list[tuple[int, concurrent.futures.Future]] = []
        self._requests: list[tuple[int, object]] = []
        self._count = 0

    def start(self) -> None:
        for _ in range(30):
            n = self._count = self._count + 1
            self._futures.append((n, self._executor.submit(faults.plus_one, n)))
            self._requests.append((n, self._executor.Iinvoke(faults.adds_one, np.full(20, float(n)), np.zeros(20))))

    def check(self) -> None:
        for n, future in self._futures:
            assert future.result() == n + 1
        for n, request in self._requests:
            assert request.Wait()
            assert request.out.tolist() == [n + 1.0] * 20


def call(executor: Executor, api: str, deed: str):
    """Starts the deed; a function that waits for its result."""
    if api == "submit":
        return executor.submit(faults.do, deed, 1.0).result
    request = executor.Iinvoke(faults.does, (faults.text(deed), 1.0), np.zeros(1))

    def result() -> float:
        request.Wait()
        return request.out[0]
    return result


def fail(executor: Executor, api: str, deed: str) -> BaseException | None:
    """What a misbehaving call raises, among neighbours that must not notice."""
    neighbours = Neighbours(executor)
    neighbours.start()
    result = call(executor, api, deed)
    neighbours.start()
    error = None
    try:
        assert result() == 2.0
    except BaseException as caught:
        error = caught
    neighbours.check()
    assert executor.submit(faults.plus_one, 1).result() == 2, "the next invocation works"
    assert executor.Invoke(faults.adds_one, np.ones(2), np.zeros(2)).tolist() == [2, 2]
    return error


@pytest.mark.parametrize("api", ["submit", "Invoke"])
@pytest.mark.parametrize(("deed", "kind", "says"), [
    ("raise", ValueError, "no number"),
    ("raise KeyboardInterrupt", None, "KeyboardInterrupt"),
    ("raise GeneratorExit", None, "GeneratorExit"),
    ("sys.exit", None, "that is all"),
    ("recurse", RecursionError, "recursion"),
    ("take too much memory", MemoryError, ""),
])
def test_what_a_kernel_raises_reaches_its_caller_alone(ex, api, deed, kind, says):
    before = faults.worker_pids(ex)
    error = fail(ex, api, deed)
    if kind is not None and api == "submit":
        assert isinstance(error, kind)
    else:
        assert isinstance(error, KernelError)
        assert kind is None or isinstance(error.__cause__, kind)
    assert says in str(error)
    assert faults.worker_pids(ex) == before, "no worker was lost to it"


@pytest.mark.parametrize("api", ["submit", "Invoke"])
@pytest.mark.parametrize(("deed", "number", "says"), [
    ("segfault", 11, "SIGSEGV"),
    ("abort", 6, "SIGABRT"),
    ("kill -BUS", 7, "SIGBUS"),
    ("kill -FPE", 8, "SIGFPE"),
    ("kill -ILL", 4, "SIGILL"),
    ("os._exit", 0, "exit code 3"),
])
def test_a_kernel_that_ends_its_worker_fails_alone_and_tells_how(ex, api, deed, number, says):
    error = fail(ex, api, deed)
    assert isinstance(error, KernelError)
    assert says in str(error)
    assert error.signal == number
    assert error.exit_code == (None if number else 3)
    assert f"now: {deed}" in error.last_lines


@pytest.mark.parametrize("api", ["submit", "Invoke"])
@pytest.mark.parametrize("deed", ["leave a child", "leave a thread", "be deaf", "close all"])
def test_what_a_kernel_leaves_behind_harms_nobody(ex, api, deed, wait_until):
    pids = faults.worker_pids(ex)
    error = fail(ex, api, deed)
    assert error is None or isinstance(error, KernelError)
    assert deed == "close all" or error is None
    ex.shutdown()
    wait_until(lambda: not any(faults.alive(pid) for pid in pids.values()), "the workers have gone")


@pytest.mark.parametrize("api", ["submit", "Invoke"])
@pytest.mark.parametrize("deed", ["close all", "close all and stay"])
def test_a_kernel_that_closes_all_descriptors_fails_alone_over_tcp(executor_over, api, deed, wait_until):
    """Its result can't be sent, so that it ends with its worker; over shared memory it arrives (above)."""
    with executor_over("tcp", fallback=False) as ex:
        (worker, pid), = faults.worker_pids(ex).items()
        assert ex.submit(faults.plus_one, 1).result() == 2
        result = call(ex, api, deed)
        behind = [ex.submit(faults.plus_one, n) for n in range(20)]
        with pytest.raises(KernelError) as caught:
            result()
        assert [future.result() for future in behind] == list(range(1, 21))
        assert f"now: {deed}" in caught.value.last_lines
        if deed == "close all":
            assert caught.value.exit_code == os.EX_IOERR
            assert "closed by its own kernel" in str(caught.value)
        wait_until(lambda: not faults.alive(pid), "its worker has ended")
        assert worker not in ex.workers


def test_a_child_that_a_kernel_leaves_ends_with_the_executor(wait_until):
    with Executor(workers=1) as executor:
        child = executor.submit(_fork_child).result()
        assert faults.alive(child)
        assert executor.submit(faults.plus_one, 1).result() == 2
    wait_until(lambda: not faults.alive(child), "the kernel's child is gone")


def _fork_child() -> int:
    child = os.fork()
    if child == 0:
        os.setsid()
        time.sleep(600)
    return child


@pytest.mark.parametrize("api", ["submit", "Invoke"])
def test_a_hundred_megabytes_of_output_are_cut_and_the_result_arrives(ex, api, stderr_kept, wait_until):
    with stderr_kept() as said:
        assert fail(ex, api, "shout") is None
        wait_until(lambda: "left out" in said(), "how much is left out")
        assert len(said()) < 64 << 20


# --- loops --------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [
    lambda: faults.loops, lambda: faults.sleeps, lambda: native("rfm_bad_loop")], ids=["Python", "sleep", "native"])
@pytest.mark.parametrize("how", ["Invoke", "Iinvoke", "persistent"])
def test_a_kernel_that_loops_is_stopped_at_its_time_limit_alone(ex, make, how):
    neighbours = Neighbours(ex)
    kernel, x, out = make(), np.ones(1), np.zeros(1)
    neighbours.start()
    with pytest.raises(KernelTimeout, match="time limit"):
        if how == "Invoke":
            ex.Invoke(kernel, x, out, timeout_s=0.2)
        elif how == "Iinvoke":
            request = ex.Iinvoke(kernel, x, out, timeout_s=0.2)
            neighbours.start()
            request.Wait()
        else:
            request = ex.Invoke_init(kernel, x, out, timeout_s=0.2)
            request.Start()
            neighbours.start()
            Waitall([request])
    neighbours.check()
    assert out[0] == 0
    assert ex.Invoke(faults.adds_one, x, out)[0] == 2


def test_a_call_that_loops_can_be_cancelled_with_force_alone(ex, tmp_path):
    neighbours = Neighbours(ex)
    begun = tmp_path / "begun"
    neighbours.start()
    future = ex.submit(faults.begin_then_wait, begun, tmp_path / "never", 1)
    neighbours.start()
    faults.wait_for(begun)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0.05)
    assert future.cancel(force=True)
    with pytest.raises(CancelledError):
        future.result()
    neighbours.check()
    assert ex.submit(faults.plus_one, 1).result() == 2


def test_many_loops_at_once_are_stopped_each(ex):
    outs = [np.zeros(1) for _ in range(6)]
    requests = [ex.Iinvoke(native("rfm_bad_loop"), np.ones(1), out, timeout_s=0.3) for out in outs]
    for request in requests:
        with pytest.raises(KernelTimeout):
            request.Wait()
    assert not np.any(outs)


# --- lengths and writes past the end ----------------------------------------------------------

# In the slot's line, in the slot, in the slot with more room, too large for a slot.
SIZES = [1, 4, 100, 2000, 300_000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", ["plain", "arena"])
@pytest.mark.parametrize(("symbol", "says"), [
    ("rfm_bad_overrun", "past the end of output 0"), ("rfm_bad_length", "which holds")])
def test_a_wrong_length_and_a_write_past_the_end_are_told_and_touch_nothing_else(ex, size, where, symbol, says):
    make = ex.full if where == "arena" else np.full
    neighbours = Neighbours(ex)
    before, out, after = make(size, 3.0), make(size, 3.0), make(size, 3.0)
    neighbours.start()
    with pytest.raises(KernelError, match=says):
        ex.Invoke(native(symbol), np.ones(1), out)
    assert (before == 3).all()
    assert (after == 3).all()
    neighbours.check()
    for array in (before, out, after):
        assert (ex.Invoke(native("rfm_scale2"), np.full(size, 2.0), array) == 4).all()


@pytest.mark.parametrize("size", [2, 100, 300_000])
def test_a_write_past_the_end_of_one_of_several_outputs_is_told(ex, size):
    first, second = ex.zeros(size), np.full(size, 3.0)
    with pytest.raises(KernelError, match="past the end of output 0"):
        ex.Invoke(native("rfm_bad_overrun"), np.ones(1), (first, second))
    assert (second == 3).all()


def test_an_array_that_a_kernel_overran_before_its_end_is_checked_again(ex):
    """A part of an array has no guard of its own: its neighbour is the rest of the same array."""
    whole = ex.zeros(1000)
    with pytest.raises(KernelError, match="past the end"):
        ex.Invoke(native("rfm_bad_overrun"), np.ones(1), whole)
    for _ in range(2):
        with pytest.raises(KernelError, match="past the end"):
            ex.Invoke(native("rfm_bad_overrun"), np.ones(1), whole)
    assert (ex.Invoke(native("rfm_scale2"), np.ones(1000), whole) == 2).all()


def test_a_shorter_result_leaves_the_rest_as_it_was(ex):
    for out in (np.full(100, 1.0), np.full(300_000, 1.0)):
        request = ex.Iinvoke(native("rfm_half"), np.ones(1), out)
        assert request.Wait()
        assert request.out_sizes == (out.nbytes // 2,)
        half = len(out) // 2
        assert (out[half:] == 1).all()
        assert not (out[:half] == 1).any()


def test_a_redzone_that_an_old_array_left_is_not_taken_for_the_end_of_a_new_one():
    with Executor(workers=1) as ex:
        old = [ex.empty(8) for _ in range(64)]
        del old
        x, y = ex.empty((64, 8)), ex.empty((64, 8))      # on the same memory
        requests = [ex.Invoke_init(native("rfm_scale2"), a, b) for a, b in zip(x, y, strict=True)]
        x[...], y[...] = 1, 0
        Startall(requests)
        Waitall(requests)
        assert (y == 2).all()

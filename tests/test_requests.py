"""Buffers: Invoke, requests, persistent requests, and MPI's words on several of them."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import faults
import kernels_for_tests as k
import numpy as np
import pytest
import transports

from rfaas_mpi import (
    UNDEFINED,
    ClosedError,
    Executor,
    InvalidBuffer,
    KernelError,
    KernelTimeout,
    PersistentRequest,
    Request,
    Startall,
    Testall,
    Testany,
    Testsome,
    Waitall,
    Waitany,
    Waitsome,
)

# pytest takes what is named Test… for tests.
Testall.__test__ = Testany.__test__ = Testsome.__test__ = False


@pytest.fixture(params=["inline", *transports.OVER])
def ex(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


@pytest.fixture(params=transports.OVER)
def worker(request, executor_over):
    """An executor whose one worker is another process."""
    with executor_over(request.param) as executor:
        yield executor


def text(path) -> np.ndarray:
    return np.frombuffer(str(path).encode(), np.uint8)


# --- Invoke ----------------------------------------------------------------------------

@pytest.mark.parametrize("size", [0, 1, 4, 5, 1000, 100_000, 3_000_000])
@pytest.mark.parametrize("own", [False, True], ids=["plain", "executor's"])
def test_invoke_fills_out_and_returns_it(ex, size, own):
    x = np.arange(size, dtype=float)
    y = np.full(size, -1.0)
    if own:
        x, y = ex.array(x), ex.array(y)
    assert ex.Invoke(k.double, x, y) is y
    np.testing.assert_array_equal(y, 2 * x)


def test_invoke_takes_several_inputs_and_outputs(ex):
    x, y = np.arange(6.0).reshape(2, 3), np.ones((2, 3))
    plus, minus = ex.empty((2, 3)), np.empty((2, 3))
    ex.Invoke(k.sum_and_difference, (x, y), (plus, minus))
    np.testing.assert_array_equal(plus, x + 1)
    np.testing.assert_array_equal(minus, x - 1)


def test_scalars_and_constants_are_inputs(ex):
    x, out = np.arange(4.0), np.empty(4)
    assert ex.Invoke(k.scaled, (x, 2.5), out).tolist() == [0, 2.5, 5, 7.5]
    assert ex.Invoke(k.scaled, (ex.put(x), np.float32(2)), out).tolist() == [0, 2, 4, 6]
    total = np.empty(())
    assert ex.Invoke(k.total, ex.put(x), total) == 6


def test_a_result_without_a_parameter_out_is_stored(ex):
    x, out = np.arange(10_000.0), np.empty(1)
    assert ex.Invoke(k.total, x, out)[0] == x.sum()


def test_mpi4py_buffer_lists_work_on_both_sides(ex):
    x, y = np.arange(10.0), np.zeros(10)
    spec = [y, (3, 1), "d"]
    assert ex.Invoke(k.double, [x, 3, "d"], spec) is spec
    assert y.tolist() == [0, 0, 2, 4] + [0] * 6


def test_a_kernel_that_raises_gives_a_kernel_error_with_the_cause(ex):
    x, y = np.array([7.0]), np.empty(1)
    with pytest.raises(KernelError, match="no good: 7") as caught:
        ex.Invoke(k.fails, x, y)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "in fails" in str(caught.value.__cause__.__cause__)
    assert ex.Invoke(k.double, x, y)[0] == 14


def test_a_result_of_the_wrong_shape_is_a_kernel_error(ex):
    with pytest.raises(KernelError, match="shape"):
        ex.Invoke(k.wrong_shape, np.zeros(3), np.empty(3))


def test_what_runs_past_its_time_is_stopped_and_the_next_one_runs():
    with Executor(workers=1) as executor:
        x, y = np.ones(1), np.empty(1)
        with pytest.raises(KernelTimeout):
            executor.Invoke(k.spins, x, y, timeout_s=0.2)
        assert executor.Invoke(k.double, x, y)[0] == 2


def test_the_neighbours_of_a_crash_run_again(tmp_path):
    with Executor(workers=1) as executor:
        x, out = np.arange(3.0), np.empty(1)
        crash = executor.Iinvoke(k.segfaults_once, text(tmp_path / "crashed"), out)
        others = [executor.Iinvoke(k.double, x + n, np.empty(3)) for n in range(5)]
        with pytest.raises(KernelError) as caught:
            crash.Wait()
        assert caught.value.signal == 11
        for n, other in enumerate(others):
            assert other.Wait()
            assert other.out.tolist() == (2 * (x + n)).tolist()


# --- requests -----------------------------------------------------------------------------

def test_a_request_is_active_until_its_end_was_told(ex):
    x, y = np.arange(3.0), np.empty(3)
    request = ex.Iinvoke(k.double, x, y)
    assert request.active
    while not request.Test():
        pass
    assert not request.active
    assert y.tolist() == [0, 2, 4]
    assert request.Wait()
    assert request.Test()
    assert request.out is y
    assert request.exec_ns >= 0


def test_a_failure_is_told_as_often_as_one_asks(ex):
    request = ex.Iinvoke(k.fails, np.ones(1), np.empty(1))
    for _ in range(3):
        with pytest.raises(KernelError, match="no good"):
            request.Wait()
    with pytest.raises(KernelError, match="no good"):
        request.Test()


def test_wait_gives_up_after_its_timeout(worker, tmp_path):
    flag = tmp_path / "flag"
    request = worker.Iinvoke(k.waits_for, text(flag), np.empty(()))
    assert not request.Wait(timeout_s=0.01)
    assert not request.Test()
    assert request.active
    flag.touch()
    assert request.Wait(timeout_s=60)


def test_a_queued_request_can_be_cancelled(tmp_path):
    flag = tmp_path / "flag"
    with Executor(workers=1, slots=2) as executor:
        first = [executor.Iinvoke(k.waits_for, text(flag), np.empty(())) for _ in range(2)]
        later = [executor.Iinvoke(k.double, np.ones(1), np.empty(1)) for _ in range(4)]
        assert later[-1].Cancel()
        with pytest.raises(CancelledError):
            later[-1].Wait()
        assert not first[0].Cancel()
        flag.touch()
        assert Waitall([*first, *later[:-1]])


def test_a_running_request_can_be_cancelled_with_force(tmp_path):
    with Executor(workers=1) as executor:
        request = executor.Iinvoke(k.spins, np.ones(1), np.empty(1))
        neighbour = executor.Iinvoke(k.double, np.ones(1), np.empty(1))
        assert request.Cancel(force=True)
        with pytest.raises(CancelledError):
            request.Wait()
        assert neighbour.Wait()
        assert neighbour.out[0] == 2


# --- persistent requests -----------------------------------------------------------------

def test_a_persistent_request_runs_as_often_as_it_is_started(ex):
    x, y = ex.zeros(8), ex.empty(8)
    request = ex.Invoke_init(k.double, x, y)
    assert not request.active
    assert request.Wait()
    for n in range(200):
        x[:] = n
        request.Start()
        assert request.Wait()
        assert y[7] == 2 * n
    request.Free()
    request.Free()
    with pytest.raises(ClosedError, match="Invoke_init"):
        request.Start()


def test_plain_arrays_are_read_at_start_and_written_at_wait(ex):
    x, y = np.zeros(5000), np.empty(5000)
    request = ex.Invoke_init(k.double, x, y)
    for n in range(20):
        x[:] = n
        request.Start()
        request.Wait()
        assert (y == 2 * n).all()


def test_256_persistent_requests_share_two_slots():
    with Executor(workers=1, slots=2) as executor:
        inputs = [np.full(4, float(n)) for n in range(256)]
        requests = [executor.Invoke_init(k.double, x, np.empty(4)) for x in inputs]
        for _ in range(3):
            Startall(requests)
            assert Waitall(requests)
        assert [request.out[0] for request in requests] == [2.0 * n for n in range(256)]


class Message:
    """Looks like a persistent request of MPI's."""

    def __init__(self) -> None:
        self.started = 0

    def Testany(self, requests): ...
    def Get_status(self): ...

    def Start(self) -> None:
        self.started += 1


def test_messages_and_invocations_are_started_together_or_not_at_all(ex):
    message, request = Message(), ex.Invoke_init(k.double, np.ones(1), np.empty(1))
    once = ex.Iinvoke(k.double, np.ones(1), np.empty(1))
    once.Wait()
    for wrong in (once, 3):
        with pytest.raises(TypeError, match="is no"):
            Startall([message, request, wrong])
    request.Start()
    with pytest.raises(InvalidBuffer, match="still active"):
        Startall([message, request])
    assert message.started == 0
    request.Wait()
    Startall([message, request])
    assert message.started == 1 and request.Wait() and request.out[0] == 2


def test_a_persistent_request_works_again_after_a_failure(ex):
    x, y = np.ones(1), np.empty(1)
    fails, works = ex.Invoke_init(k.fails, x, y), ex.Invoke_init(k.double, x, y)
    for _ in range(3):
        fails.Start()
        with pytest.raises(KernelError, match="no good"):
            fails.Wait()
        works.Start()
        assert works.Wait()
        assert y[0] == 2


def test_starting_twice_is_refused_and_harmless(worker, tmp_path):
    flag = tmp_path / "flag"
    request = worker.Invoke_init(k.waits_for, text(flag), np.empty(()))
    request.Start()
    with pytest.raises(InvalidBuffer, match="still active"):
        request.Start()
    flag.touch()
    assert request.Wait()


# --- several requests -----------------------------------------------------------------------

def started(ex, count=4):
    return [ex.Iinvoke(k.double, np.full(2, float(n)), np.empty(2)) for n in range(count)]


def test_waitall_waits_for_all(ex):
    requests = started(ex)
    assert Waitall(requests)
    assert [request.out[0] for request in requests] == [0, 2, 4, 6]
    assert Waitall(requests)
    assert Waitall([])


def test_waitall_raises_the_first_failure_after_all_have_ended(ex):
    requests = started(ex, 2)
    requests.insert(1, ex.Iinvoke(k.fails, np.full(1, 5.0), np.empty(1)))
    requests.append(ex.Iinvoke(k.fails, np.full(1, 6.0), np.empty(1)))
    with pytest.raises(KernelError, match="no good: 5"):
        Waitall(requests)
    assert not any(request.active for request in requests)


def test_waitall_gives_up_after_its_timeout(worker, tmp_path):
    flag = tmp_path / "flag"
    requests = [worker.Iinvoke(k.waits_for, text(flag), np.empty(())), *started(worker)]
    assert not Waitall(requests, timeout_s=0.01)
    assert not Testall(requests)
    flag.touch()
    assert Waitall(requests, timeout_s=60)
    assert Testall(requests)


def test_waitany_tells_each_end_once(ex):
    requests = started(ex, 5)
    assert sorted(Waitany(requests) for _ in range(5)) == [0, 1, 2, 3, 4]
    assert Waitany(requests) == UNDEFINED
    assert Waitany([]) == UNDEFINED


def test_waitany_finds_the_one_that_ends(tmp_path):
    flag = tmp_path / "flag"
    with Executor(workers=1) as executor:
        slow = executor.Iinvoke(k.waits_for, text(flag), np.empty(()))
        assert Waitany([slow], timeout_s=0.01) == -1
        threading.Timer(0.02, flag.touch).start()
        assert Waitany([slow], timeout_s=60) == 0


def test_waitsome_and_testsome_tell_all_that_ended(ex):
    requests = started(ex, 5)
    told: list[int] = []
    while len(told) < 5:
        told += Waitsome(requests)
    assert sorted(told) == [0, 1, 2, 3, 4]
    assert Waitsome(requests) is None
    assert Testsome(requests) is None


def test_testany_and_testall_never_wait(worker, tmp_path):
    flag = tmp_path / "flag"
    requests = [worker.Iinvoke(k.waits_for, text(flag), np.empty(())), *started(worker, 1)]
    assert Testany(requests) == (UNDEFINED, False)
    assert Testsome(requests) == []
    assert not Testall(requests)
    flag.touch()
    assert Waitany(requests) in (0, 1)
    assert Waitany(requests) in (0, 1)
    assert Testany(requests) == (UNDEFINED, True)


def test_testall_tells_of_none_as_long_as_one_begins_again(worker, tmp_path, wait_until):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    requests = [*started(worker, 2), worker.Iinvoke(faults.fills_when, (text(begun), text(flag)), np.zeros(1))]
    wait_until(begun.exists, "the last one has begun")
    os.kill(int(begun.read_text()), signal.SIGKILL)
    wait_until(requests[2]._raw.test, "the worker's end is seen")
    assert not Testall(requests)
    assert all(request.active for request in requests)
    assert Testsome(requests) == [0, 1]
    flag.touch()
    assert Waitsome(requests) == [2]


def test_testall_tells_a_failure_like_the_others_and_again(worker, wait_until):
    requests = [*started(worker, 1), worker.Iinvoke(k.fails, np.full(1, 5.0), np.empty(1))]
    wait_until(lambda: all(request._raw.test() for request in requests), "both have ended")
    for _ in range(2):
        with pytest.raises(KernelError, match="no good: 5"):
            Testall(requests)
        assert not any(request.active for request in requests)


def test_the_functions_are_methods_too_as_in_mpi4py(ex):
    requests = started(ex, 2)
    assert Request.Waitall(requests)
    assert Request.Testall(requests)
    assert Request.Waitany(requests) == UNDEFINED
    persistent = [ex.Invoke_init(k.double, np.ones(1), np.empty(1))]
    PersistentRequest.Startall(persistent)
    PersistentRequest.Waitall(persistent)
    assert persistent[0].out[0] == 2


def test_requests_of_several_executors_can_be_waited_for_together(worker):
    with Executor(transport="inline") as other:
        requests = [*started(worker, 2), *started(other, 2)]
        assert sorted(Waitany(requests) for _ in range(4)) == [0, 1, 2, 3]


# --- arrays in flight -------------------------------------------------------------------------

def test_an_array_that_is_being_written_is_not_given_to_another_request(worker, tmp_path):
    flag = tmp_path / "flag"
    memory = np.zeros(10)
    slow = worker.Iinvoke(k.waits_for, text(flag), memory[:1].reshape(()))
    for inputs, out in ((np.ones(4), memory[:4]), (memory, np.empty(10))):
        with pytest.raises(InvalidBuffer, match="still in flight"):
            worker.Iinvoke(k.double, inputs, out)
    beside = worker.Iinvoke(k.double, np.ones(4), memory[1:5])
    persistent = worker.Invoke_init(k.double, np.ones(4), memory[:4])
    with pytest.raises(InvalidBuffer, match="still in flight"):
        persistent.Start()
    flag.touch()
    assert slow.Wait()
    assert beside.Wait()
    persistent.Start()
    assert persistent.Wait()
    assert memory.tolist() == [2, 2, 2, 2, 2, 0, 0, 0, 0, 0]


def test_requests_that_read_the_same_array_run_together(worker):
    x = worker.array(np.arange(5.0))
    requests = [worker.Iinvoke(k.double, x, np.empty(5)) for _ in range(8)]
    assert Waitall(requests)


# --- threads ------------------------------------------------------------------------------------

def test_eight_threads_may_use_one_executor(ex):
    def calls(seed: int) -> int:
        x, y = np.empty(16), np.empty(16)
        persistent = ex.Invoke_init(k.double, x, y)
        for n in range(100):
            x[:] = seed * 1000 + n
            persistent.Start()
            persistent.Wait()
            assert (y == 2 * x).all()
            z = ex.Invoke(k.double, x, np.empty(16))
            assert (z == 2 * x).all()
            assert ex.submit(k.add, seed, n).result() == seed + n
        return seed
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(calls, range(8))) == list(range(8))


def test_eight_threads_may_wait_for_one_request(worker, tmp_path):
    flag = tmp_path / "flag"
    request = worker.Iinvoke(k.waits_for, text(flag), np.empty(()))
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(request.Wait, 60) for _ in range(8)]
        flag.touch()
        assert all(each.result(60) for each in waiting)

"""Bad input gives an exception that names the thing and the way out, never a crash or a hang."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable

import kernels_for_tests as k
import numpy as np
import pytest
import transports

import rfaas_mpi
from rfaas_mpi import (
    BadKernel,
    ClosedError,
    ConfigError,
    Executor,
    ForkedError,
    InvalidBuffer,
    NestedError,
)


@pytest.fixture(params=["inline", *transports.OVER])
def ex(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


@pytest.fixture(params=transports.OVER)
def worker(request, executor_over):
    """An executor whose one worker is another process."""
    with executor_over(request.param) as executor:
        yield executor


# --- buffers ------------------------------------------------------------------------------

READ_ONLY = np.zeros(4)
READ_ONLY.flags.writeable = False
X, Y = np.zeros(4), np.zeros(4)


@pytest.mark.parametrize(("inputs", "out", "says"), [
    (np.zeros(8)[::2], Y, "input 0 of double is not C-contiguous.*ascontiguousarray"),
    (np.zeros((4, 4)).T[:, 1:], Y, "not C-contiguous"),
    (X, np.zeros(8)[::2], "output 0 of double is not C-contiguous"),
    (X, READ_ONLY, "output 0 of double is read-only"),
    (np.array([None]), Y, "input 0 of double has dtype object.*submit"),
    (X, np.array([None]), "output 0 of double has dtype object"),
    (X, X, "output 0 and input 0 overlap"),
    (X, X[2:], "output 0 and input 0 overlap"),
    (X, (Y, Y[:2]), "outputs 0 and 1 overlap"),
    ("text", Y, "input 0 of double is a str"),
    (X, None, "output 0 of double is None"),
    (X, 3.0, "needs a writable array"),
    ([X, 100], Y, "asks for 100"),
])
@pytest.mark.parametrize("how", ["Invoke", "Iinvoke", "Invoke_init"])
def test_arrays_that_cannot_be_used_are_refused_by_name(ex, how, inputs, out, says):
    with pytest.raises(InvalidBuffer, match=says):
        getattr(ex, how)(k.double, inputs, out)
    assert ex.Invoke(k.double, np.ones(1), np.empty(1))[0] == 2


def test_a_buffer_that_is_no_kernel_is_refused(ex):
    with pytest.raises(TypeError, match="rfaas_mpi.kernel"):
        ex.Invoke(np.sin, X, Y)


def test_arrays_without_bytes_work(ex):
    assert ex.Invoke(k.double, np.zeros((0, 3)), np.empty((0, 3))).shape == (0, 3)
    assert ex.empty(0).nbytes == 0
    assert ex.put(np.zeros(0)).nbytes == 0


def test_more_than_the_granted_memory_is_refused_with_both_numbers():
    with Executor(workers=1, memory_per_worker="256M") as executor:
        huge = np.broadcast_to(np.zeros(1), (1,)).copy()
        with pytest.raises(InvalidBuffer, match=r"needs 8000000000 bytes.*granted 268435456"):
            executor.empty(10**9)
        with pytest.raises(InvalidBuffer, match=r"output 0 of total needs 400000000 bytes.*268435456"):
            executor.Invoke(k.total, huge, np.empty(50_000_000))


def test_an_array_may_be_dropped_in_flight(worker, tmp_path):
    flag = tmp_path / "flag"
    x = np.frombuffer(str(flag).encode(), np.uint8).copy()
    slow = worker.Iinvoke(k.waits_for, x, np.empty(()))
    sums = [worker.Iinvoke(k.total, np.full(50_000, float(n)), np.empty(1)) for n in range(20)]
    constant = worker.put(np.ones(50_000))
    last = worker.Iinvoke(k.total, constant, np.empty(1))
    del x
    constant.close()
    flag.touch()
    assert slow.Wait()
    for n, request in enumerate(sums):
        assert request.Wait()
        assert request.out[0] == 50_000 * n
    assert last.Wait()
    assert last.out[0] == 50_000


def test_a_closed_constant_is_refused(ex):
    constant = ex.put(np.ones(3))
    constant.close()
    with pytest.raises(ClosedError, match="closed"):
        ex.Invoke(k.total, constant, np.empty(1))
    with pytest.raises(ClosedError, match="closed"):
        ex.submit(k.add, constant)


# --- objects --------------------------------------------------------------------------------

@pytest.mark.parametrize("argument", [threading.Lock(), (n for n in range(3))])
def test_an_argument_that_cannot_travel_is_refused_by_name(ex, argument):
    with pytest.raises(BadKernel, match="argument 1") as caught:
        ex.submit(k.add, 1, argument)
    assert isinstance(caught.value, TypeError)


def test_a_function_that_cannot_travel_is_refused_by_name(ex):
    lock = threading.Lock()

    def locked() -> None:
        lock.acquire()

    with pytest.raises(BadKernel, match="lock"):
        ex.submit(locked)


def test_what_cannot_be_called_is_refused(ex):
    with pytest.raises(TypeError, match="callable"):
        ex.submit(3)
    with pytest.raises(TypeError):
        ex.submit()
    with pytest.raises(ValueError, match="chunksize"):
        ex.map(k.add, [1], chunksize=0)


def test_an_executor_cannot_be_pickled(ex):
    with pytest.raises(TypeError):
        pickle.dumps(ex)


# --- settings -------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {"workers": 0}, {"workers": (2, 1)}, {"workers": (-1, 1)}, {"workers": "two"}, {"workers": True},
    {"workers": (1, 2, 3)}, {"workers": 1.5}, {"cores_per_worker": 0}, {"workers": 1, "max_workers": 1},
    {"slots": 1}, {"slots": 3}, {"slot_bytes": 100}, {"slot_bytes": "a lot"}, {"transport": "carrier pigeon"},
    {"no_such_setting": 1}, {"memory_per_worker": "much"},
])
def test_a_setting_that_is_not_possible_is_refused_by_name(settings):
    with pytest.raises(ConfigError) as caught:
        Executor(**settings)
    assert next(iter(settings)) in str(caught.value)


def test_max_workers_is_checked_as_in_the_standard_library():
    for number in (0, -1):
        with pytest.raises(ValueError, match="max_workers must be greater than 0"):
            Executor(max_workers=number)
    with pytest.raises(TypeError, match="initializer must be a callable"):
        Executor(initializer=3)


# --- after the end ---------------------------------------------------------------------------

@pytest.mark.parametrize("transport", ["inline", "shm"])
def test_an_executor_that_was_shut_down_says_so(transport):
    executor = Executor(workers=1, transport=transport)
    request = executor.Invoke_init(k.double, np.ones(1), np.empty(1))
    executor.shutdown()
    uses: list[Callable[[], object]] = [
        lambda: executor.submit(k.add, 1), lambda: executor.map(k.add, [1]),
        lambda: executor.Invoke(k.double, np.ones(1), np.empty(1)),
        lambda: executor.Iinvoke(k.double, np.ones(1), np.empty(1)),
        lambda: executor.Invoke_init(k.double, np.ones(1), np.empty(1)),
        lambda: executor.empty(1), lambda: executor.put([1]), request.Start]
    for use in uses:
        with pytest.raises(ClosedError) as caught:
            use()
        assert isinstance(caught.value, RuntimeError)
    executor.shutdown()
    request.Free()


# --- forks and kernels ------------------------------------------------------------------------

def in_child(action: Callable[[], None]) -> str:
    """What `action` raised in a forked child, as text."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "nothing raised"
        try:
            action()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        text = answer.read().decode()
    assert os.waitpid(pid, 0)[1] == 0
    return text


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_told_to_make_its_own(ex):
    future = ex.submit(k.add, 1, 1)
    request = ex.Invoke_init(k.double, np.ones(1), np.empty(1))
    for use in (lambda: ex.submit(k.add, 1), lambda: ex.Invoke(k.double, np.ones(1), np.empty(1)),
                lambda: ex.empty(3), request.Start, lambda: list(ex.map(k.add, [1]))):
        assert in_child(use).startswith("ForkedError")
    assert in_child(ex.shutdown) == "nothing raised"
    assert future.result() == 2
    request.Start()
    assert request.Wait()


def test_a_future_that_was_pending_at_a_fork_does_not_hang_the_child(worker, tmp_path):
    flag = tmp_path / "flag"
    future = worker.submit(k.wait_for, flag, 3)
    assert in_child(future.result).startswith("ForkedError")
    flag.touch()
    assert future.result(60) == 3
    assert issubclass(ForkedError, RuntimeError)


def test_an_executor_inside_a_kernel_is_refused(ex):
    assert isinstance(ex.submit(k.make_executor).exception(), NestedError)


# --- importing ---------------------------------------------------------------------------------

def test_importing_starts_nothing_and_needs_no_mpi():
    code = ("import sys, threading, rfaas_mpi\n"
            "for name in rfaas_mpi.__all__: getattr(rfaas_mpi, name)\n"
            "assert 'mpi4py' not in sys.modules\n"
            "assert threading.active_count() == 1\n"
            "assert 'rfaas_mpi.executor' in sys.modules\n")
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_names_are_loaded_when_they_are_used():
    code = "import sys, rfaas_mpi; assert 'numpy' not in sys.modules; rfaas_mpi.no_such_name"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert "AttributeError: module 'rfaas_mpi' has no attribute 'no_such_name'" in done.stderr
    assert set(rfaas_mpi.__all__) <= set(dir(rfaas_mpi))

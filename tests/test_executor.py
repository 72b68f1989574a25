"""The executor as a whole: calls, many calls, its end, and what it does when workers, service or ranks go."""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import kernels_for_tests as k
import numpy as np
import pytest
import transports

from rfaas_mpi import (
    CancelledError,
    ClosedError,
    Executor,
    KernelError,
    LeaseDenied,
    LeaseRevoked,
    RFaaSError,
    ServiceLost,
    VersionMismatch,
    Waitall,
    WorkerLost,
    __version__,
)
from rfaas_mpi import messages as msg
from rfaas_mpi.config import Settings
from rfaas_mpi.crew import Crew

TESTS = Path(__file__).parent


@pytest.fixture(params=["inline", *transports.OVER])
def ex(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


@pytest.fixture(params=transports.OVER)
def worker(request, executor_over):
    """An executor whose one worker is another process."""
    with executor_over(request.param) as executor:
        yield executor


def run(script: str, *args: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a script in another interpreter, beside the tests' kernels."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, args)],
                          env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=timeout,
                          check=False)


def end_worker(executor: Executor, reason: str) -> None:
    """Has the service take the executor's worker, as it does for its own reasons."""
    lending = executor._crew.lending
    for lease in lending.grant.leases:
        for number in lending.workers:
            assert lending.session.kill(lease, number, reason)


def test_another_version_on_the_other_side_is_told_with_both_whatever_the_transport(worker, monkeypatch):
    """Before anything else is: who dials a worker says hello to its service first."""
    settings = worker._settings
    monkeypatch.setattr(msg, "version_number", lambda version="9.9.9": 9 << 16 | 9 << 8 | 9)
    monkeypatch.setattr("rfaas_mpi.session.__version__", "9.9.9")
    lending = worker._crew.lending
    lease, = lending.grant.leases
    for knock in (lambda: Executor(workers=1, transport=worker._crew.transport, device=settings.device),
                  lambda: lending.session.reach(lease, lease.workers[0].number, worker._crew.transport)):
        with pytest.raises(VersionMismatch, match=rf"version {re.escape(__version__)}, this rank 9\.9\.9"):
            knock()


# --- calls -------------------------------------------------------------------------------

def test_it_is_an_executor_of_the_standard_library(ex):
    assert isinstance(ex, concurrent.futures.Executor)
    assert ex.submit(pow, 2, 10).result() == 1024
    assert ex.submit(k.add, a=1, b=2).result() == 3
    assert list(ex.map(pow, [1, 2, 3], [2, 2, 2])) == [1, 4, 9]


def test_any_callable_can_be_submitted(ex):
    offset = 10
    x = np.arange(3)
    assert ex.submit(lambda v: v + offset, 1).result() == 11
    assert ex.submit(x.sum).result() == 3
    assert ex.submit(int, "7").result() == 7
    assert ex.submit(k.scaled, x, 2).result().tolist() == [0, 2, 4]
    assert ex.submit(np.add, 1, 2).result() == 3


def test_what_runs_is_what_a_callable_is_now(ex):
    box = [1]
    values = []
    for n in range(3):
        box[0] = n
        values.append(ex.submit(lambda: box[0]).result())
    closures = [ex.submit(lambda n=n: n) for n in range(600)]
    assert values == [0, 1, 2]
    assert [future.result() for future in closures] == list(range(600))


def test_submit_never_waits_for_a_slot(worker, tmp_path):
    flag = tmp_path / "flag"
    first = worker.submit(k.wait_for, flag)
    rest = [worker.submit(k.add, n) for n in range(2000)]
    assert not first.done()
    flag.touch()
    assert [future.result() for future in rest] == list(range(2000))


def warm_up(executor: Executor) -> None:
    """From here on the workers are known to be quick, and calls are posted to them ahead."""
    for n in range(100):
        assert executor.submit(k.add, n).result() == n


@pytest.mark.parametrize("worker", ["shm"], indirect=True)
def test_a_call_that_a_worker_has_but_did_not_begin_can_be_cancelled(worker, tmp_path):
    """On shared memory: what was sent over a network is the worker's."""
    flag = tmp_path / "flag"
    warm_up(worker)
    first = worker.submit(k.wait_for, flag)
    rest = [worker.submit(k.add, n) for n in range(10)]
    assert [future.cancel() for future in rest[1:]] == [True] * 9
    flag.touch()
    first.result()
    assert rest[0].result() == 0
    assert all(future.cancelled() for future in rest[1:])
    assert worker.submit(k.add, 7).result() == 7


def test_short_calls_do_not_wait_behind_a_long_one_while_another_worker_is_idle(tmp_path):
    flag = tmp_path / "flag"
    # RFAAS_CORES says that both cores may be lent, so the ranks share one of them.
    with Executor(workers=2, cores=(0, 1)) as executor:
        warm_up(executor)
        first = executor.submit(k.wait_for, flag)
        rest = [executor.submit(k.add, n) for n in range(40)]
        # The flag comes only after these, so none of them may depend on it.
        assert [future.result() for future in rest] == list(range(40))
        assert not first.done()
        flag.touch()
        first.result()


def test_a_worker_is_another_process(worker):
    assert worker.submit(k.pid).result() not in (os.getpid(), os.getppid())
    assert len(worker.workers) == 1


def test_results_larger_than_a_slot_arrive(ex):
    x = np.arange(2_000_000.0)
    np.testing.assert_array_equal(ex.submit(k.identity, x).result(), x)
    assert len(ex.submit(k.identity, b"x" * 5_000_000).result()) == 5_000_000
    error = ex.submit(k.raise_key_error, "x" * 300_000).exception()
    assert isinstance(error, KeyError)


# --- map ---------------------------------------------------------------------------------

@pytest.mark.parametrize("chunksize", [1, 7, 1000])
def test_map_gives_results_in_order(ex, chunksize):
    assert list(ex.map(k.add, range(100), range(100), chunksize=chunksize)) == [2 * n for n in range(100)]
    assert list(ex.starmap(k.add, ((n, n) for n in range(100)), chunksize=chunksize)) == [2 * n for n in range(100)]
    assert list(ex.map(k.add, [], chunksize=chunksize)) == []


@pytest.mark.parametrize("chunksize", [1, 7])
def test_map_unordered_gives_every_result_once(ex, chunksize):
    found = list(ex.map(k.add, range(100), chunksize=chunksize, unordered=True))
    assert sorted(found) == list(range(100))


@pytest.mark.parametrize("unordered", [False, True])
def test_map_reads_no_more_than_a_window_ahead(ex, unordered):
    read = itertools.count()
    taken = 0

    def items():
        while True:
            yield next(read)

    for _ in itertools.islice(ex.map(k.identity, items(), unordered=unordered), 300):
        taken += 1
    ahead = next(read) - taken
    assert taken == 300
    assert ahead <= 100


def test_unordered_does_not_wait_for_the_slow_one(worker, tmp_path):
    flag = tmp_path / "flag"
    results = worker.map(k.wait_for, [flag, tmp_path], [1, 2], unordered=True)
    flag.touch()
    assert sorted(results) == [1, 2]


def test_map_raises_at_the_place_of_the_failure_and_then_ends(ex):
    results = ex.starmap(k.scaled, [(1, 2), (3, "x", 5), (4, 5)])
    assert next(results) == 2
    with pytest.raises(TypeError):
        next(results)
    assert list(results) == []


def test_map_raises_timeout_error_as_the_standard_library_does(worker, tmp_path):
    flag = tmp_path / "flag"
    results = worker.map(k.wait_for, [flag], timeout=0.05)
    with pytest.raises(TimeoutError):
        next(results)
    flag.touch()


def test_map_that_nobody_reads_still_runs(tmp_path):
    path = tmp_path / "log"
    with Executor(workers=1, slots=2) as executor:
        executor.map(k.append, [path] * 200, "x" * 200)
    assert path.read_text() == "x" * 200


def test_map_that_is_abandoned_half_way_stops(worker):
    read = itertools.count()
    for value in worker.map(k.identity, read):
        if value == 5:
            break
    gc.collect()
    before = next(read)
    assert worker.submit(k.add, 1).result() == 1
    assert next(read) == before + 1


# --- initializer ---------------------------------------------------------------------------

def test_the_initializer_runs_once_in_each_worker():
    with Executor(workers=1, initializer=k.remember, initargs=("ready",)) as executor:
        assert [executor.submit(k.remembered).result() for _ in range(3)] == [["ready"]] * 3
        assert list(executor.map(len, [[1], [1, 2]], chunksize=2)) == [1, 2]
        assert executor.submit(k.remembered).result() == ["ready"]
        end_worker(executor, "revoked")
        assert executor.submit(k.remembered).result() == ["ready"]


def test_an_initializer_that_raises_fails_the_calls():
    with Executor(workers=1, initializer=k.raise_key_error, initargs=("no",)) as executor:
        for _ in range(2):
            with pytest.raises(KeyError, match="no"):
                executor.submit(k.add, 1).result()


# --- what workers print --------------------------------------------------------------------

def test_what_a_kernel_prints_reaches_stderr_with_its_worker(capfd):
    with Executor(workers=1) as executor:
        number = executor.workers[0]
        executor.submit(k.write_to_stdout, "out here\nand here").result()
        executor.submit(k.write_to_stderr, "err there").result()
    error = capfd.readouterr().err
    for line in ("out here", "and here", "err there"):
        assert re.search(rf"^\[rfaas worker {number}, invocation \d+\] {line}$", error, re.MULTILINE)


# --- where no worker is ------------------------------------------------------------------------

def test_without_a_worker_kernels_run_on_the_rank_and_one_warning_says_why(worker):
    assert len(worker.workers) == 1          # the only spare core of this node, or
    with pytest.warns(RuntimeWarning, match="run on the rank") as warned:
        other = Executor(workers=(0, 64), cores_per_worker=64)
    assert len(warned) == 1
    with other:
        assert other.workers == []
        assert other.submit(k.pid).result() == os.getpid()
        assert sorted(future.result() for future in concurrent.futures.as_completed(
            [other.submit(k.add, n) for n in range(20)])) == list(range(20))
        x = np.arange(5.0)
        request = other.Invoke_init(k.double, x, np.empty(5))
        for _ in range(3):
            request.Start()
            assert request.Wait()
        assert other.Invoke(k.double, other.array(x), other.empty(5)).tolist() == [0, 2, 4, 6, 8]
        tested = other.Iinvoke(k.double, x, np.empty(5))
        assert tested.Test()
        assert tested.out.tolist() == [0, 2, 4, 6, 8]
        with pytest.raises(KernelError, match="no good"):
            other.Invoke(k.fails, x, np.empty(1))
        with pytest.raises(KeyError):
            other.submit(k.raise_key_error, 1).result()
        heard = threading.Event()
        other.submit(k.add, 1).add_done_callback(lambda future: heard.set())
        assert heard.wait(60)


def test_without_a_worker_a_call_that_nobody_waits_for_runs_too(tmp_path):
    with pytest.warns(RuntimeWarning, match="run on the rank"):
        other = Executor(workers=(0, 64), cores_per_worker=64)
    with other:
        futures = [other.submit(k.append, tmp_path / "log", "x") for _ in range(10)]
    assert (tmp_path / "log").read_text() == "x" * 10
    assert all(future.done() for future in futures)


@pytest.mark.filterwarnings("ignore:kernels run on the rank:RuntimeWarning")
def test_without_fallback_nothing_runs_on_the_rank():
    with Executor(workers=(0, 64), cores_per_worker=64, fallback=False) as executor:
        with pytest.raises(WorkerLost):
            executor.submit(k.pid).result()
        with pytest.raises(WorkerLost):
            executor.Invoke(k.double, np.ones(1), np.empty(1))


def test_more_workers_than_can_be_had_are_denied():
    with pytest.raises(LeaseDenied):
        Executor(workers=500, lease_timeout_s=0)


# --- workers that end --------------------------------------------------------------------------

def test_a_crash_fails_only_the_call_that_crashed(worker):
    before = [worker.submit(k.add, n) for n in range(5)]
    crash = worker.submit(k.crash, signal.SIGSEGV)
    after = [worker.submit(k.add, n) for n in range(5)]
    with pytest.raises(KernelError, match="SIGSEGV") as caught:
        crash.result()
    assert caught.value.signal == signal.SIGSEGV
    assert [future.result() for future in before + after] == [0, 1, 2, 3, 4] * 2


def test_a_kernel_that_exits_fails_only_its_call(worker):
    with pytest.raises(KernelError) as caught:
        worker.submit(k.leave, 3).result()
    assert caught.value.exit_code == 3
    with pytest.raises(KernelError, match="sys.exit"):
        worker.submit(sys.exit, 4).result()
    assert worker.submit(k.add, 1).result() == 1


def test_a_sigkill_from_nowhere_is_tried_once_more_then_it_is_the_kernels(worker, tmp_path):
    log = tmp_path / "log"

    def killed():
        with open(log, "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(KernelError, match="SIGKILL"):
        worker.submit(killed).result()
    assert log.read_text() == "xx"


def test_a_worker_that_infrastructure_takes_costs_no_result(worker, tmp_path):
    started, flag = tmp_path / "started", tmp_path / "flag"
    future = worker.submit(k.start_and_wait_for, started, flag, "there")
    request = worker.Iinvoke(k.double, np.arange(3.0), np.empty(3))
    k.wait_for(started)
    end_worker(worker, "revoked")
    flag.touch()
    assert future.result() == "there"
    assert request.Wait()
    assert request.out.tolist() == [0, 2, 4]


def test_callbacks_survive_the_loss_of_a_worker(worker, tmp_path):
    started, flag, heard = tmp_path / "started", tmp_path / "flag", threading.Event()
    future = worker.submit(k.start_and_wait_for, started, flag, "there")
    future.add_done_callback(lambda f: heard.set())
    k.wait_for(started)
    end_worker(worker, "revoked")
    flag.touch()
    assert heard.wait(60)
    assert future.result() == "there"


def kill_service(executor: Executor) -> None:
    os.kill(executor._crew.lending.session.service_pid, signal.SIGKILL)


def test_a_killed_service_is_a_clear_error_and_a_new_executor_works(tmp_path):
    started, never = tmp_path / "started", tmp_path / "never"
    with Executor(workers=1, fallback=False) as executor:
        future = executor.submit(k.start_and_wait_for, started, never)
        request = executor.Iinvoke(k.double, np.ones(3), np.empty(3))
        k.wait_for(started)
        kill_service(executor)
        with pytest.raises(ServiceLost, match="new Executor"):
            future.result()
        with pytest.raises(ServiceLost, match="new Executor"):
            request.Wait()
        with pytest.raises(ServiceLost, match="new Executor"):
            executor.submit(k.add, 1).result()
    with Executor(workers=1) as again:
        assert again.submit(k.add, 1, 1).result() == 2


def test_with_fallback_a_killed_service_costs_no_result(tmp_path):
    started, flag = tmp_path / "started", tmp_path / "flag"
    with Executor(workers=1) as executor:
        future = executor.submit(k.start_and_wait_for, started, flag)
        request = executor.Iinvoke(k.double, np.ones(3), np.empty(3))
        k.wait_for(started)
        kill_service(executor)
        flag.touch()
        assert future.result() is None
        assert request.Wait()
        assert request.out.tolist() == [2, 2, 2]
        assert executor.submit(k.add, 1).result() == 1


# --- two ranks on one worker --------------------------------------------------------------------

def test_two_executors_can_share_one_worker(worker):
    with Executor._join(worker._grant) as other:
        assert other.workers == worker.workers
        assert other.submit(k.pid).result() == worker.submit(k.pid).result()
        x, mine, theirs = np.arange(1000.0), np.empty(1000), np.empty(1000)
        for n in range(50):
            assert Waitall([worker.Iinvoke(k.double, x + n, mine), other.Iinvoke(k.double, x - n, theirs)])
            assert (mine == 2 * (x + n)).all()
            assert (theirs == 2 * (x - n)).all()
    assert worker.submit(k.add, 1).result() == 1


def test_a_crash_by_one_rank_does_not_fail_the_other(worker, tmp_path):
    flag = tmp_path / "flag"
    with Executor._join(worker._grant) as other:
        first = worker.submit(k.wait_for, flag)
        crash = worker.submit(k.crash, signal.SIGSEGV)
        theirs = [other.submit(k.add, n) for n in range(5)]
        flag.touch()
        first.result()
        with pytest.raises(KernelError):
            crash.result()
        assert [future.result() for future in theirs] == [0, 1, 2, 3, 4]


# --- memory -----------------------------------------------------------------------------------

def test_arrays_stay_valid_after_the_executor_has_gone():
    with Executor(workers=1) as executor:
        x = executor.array(np.arange(100_000.0))
        y = executor.Invoke(k.double, x, executor.empty_like(x))
        constant = executor.put(x)
    del executor
    gc.collect()
    assert (y == 2 * x).all()
    assert constant.array.sum() == x.sum()


@pytest.mark.parametrize("make", [
    lambda ex: ex.empty((2, 3), "f4"), lambda ex: ex.zeros((2, 3), "f4"), lambda ex: ex.full((2, 3), 7, "f4"),
    lambda ex: ex.array(np.ones((2, 3)), "f4"), lambda ex: ex.empty_like(np.ones((2, 3), "f4")),
    lambda ex: ex.zeros_like(np.ones((2, 3)), "f4")])
def test_arrays_are_made_as_numpy_makes_them(ex, make):
    made = make(ex)
    assert made.shape == (2, 3)
    assert made.dtype == "f4"
    assert made.flags.writeable
    assert made.ctypes.data % 64 == 0
    made[:] = 1


def test_large_arrays_begin_at_different_lines_of_a_page_without_workers_too():
    with Executor(transport="inline") as executor:
        made = [executor.empty(size, "u1") for size in (4 << 20, 4 << 20, 5_000_000)]
    assert len({array.ctypes.data % 4096 for array in made}) == len(made)
    assert all(array.ctypes.data % 64 == 0 for array in made)


def test_made_arrays_hold_what_was_asked_for(ex):
    assert not ex.zeros(1000).any()
    assert (ex.full(10, 2.5) == 2.5).all()
    assert ex.full(3, 2).dtype == np.asarray(2).dtype
    assert ex.array([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]


def test_memory_is_given_back_with_the_arrays(worker):
    for _ in range(200):
        worker.empty(1_000_000)[:] = 1
    assert worker.stats()["arena_bytes"] < 200 << 20


# --- its end ----------------------------------------------------------------------------------

def test_shutdown_waits_for_what_was_accepted(tmp_path):
    log = tmp_path / "log"
    executor = Executor(workers=1)
    futures = [executor.submit(k.append, log, "x") for _ in range(50)]
    request = executor.Iinvoke(k.double, np.ones(1), np.empty(1))
    executor.shutdown()
    assert log.read_text() == "x" * 50
    assert all(future.done() for future in futures)
    assert request.Wait()
    assert request.out[0] == 2


def test_close_is_shutdown_and_may_come_twice(tmp_path):
    log = tmp_path / "log"
    executor = Executor(workers=1)
    future = executor.submit(k.append, log, "x")
    executor.close()
    assert future.done() and log.read_text() == "x"
    executor.close()
    with pytest.raises(ClosedError):
        executor.submit(k.append, log, "y")


def test_shutdown_without_waiting_still_finishes(tmp_path):
    flag = tmp_path / "flag"
    executor = Executor(workers=1)
    futures = [executor.submit(k.wait_for, flag, n) for n in range(3)]
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError):
        executor.submit(k.add, 1)
    flag.touch()
    assert [future.result(60) for future in futures] == [0, 1, 2]


def test_shutdown_can_cancel_what_has_not_begun(tmp_path):
    flag = tmp_path / "flag"
    executor = Executor(workers=1, slots=2)
    futures = [executor.submit(k.start_and_wait_for, tmp_path / f"begun{n}", flag, n) for n in range(20)]
    k.wait_for(tmp_path / "begun0")
    threading.Timer(0.05, flag.touch).start()
    executor.shutdown(cancel_futures=True)
    assert futures[0].result() == 0
    assert all(future.cancelled() for future in futures[1:])
    with pytest.raises(CancelledError):
        futures[-1].result()


def test_leaving_on_an_exception_cancels_what_has_not_begun(tmp_path):
    flag = tmp_path / "flag"
    with pytest.raises(ZeroDivisionError), Executor(workers=1, slots=2) as executor:
        futures = [executor.submit(k.wait_for, flag) for _ in range(20)]
        threading.Timer(0.05, flag.touch).start()
        1 / 0  # noqa: B018
    assert sum(future.cancelled() for future in futures) >= 17


def test_leaving_on_ctrl_c_waits_for_nobody(tmp_path):
    with pytest.raises(KeyboardInterrupt), Executor(workers=1) as executor:
        future = executor.submit(k.wait_for, tmp_path / "never")
        request = executor.Iinvoke(k.spins, np.ones(1), np.empty(1))
        raise KeyboardInterrupt
    for wait in (future.result, request.Wait):
        with pytest.raises((CancelledError, RFaaSError)):
            wait()


def test_a_dropped_executor_finishes_its_calls_and_goes(tmp_path, wait_until):
    log = tmp_path / "log"
    executor = Executor(workers=1)
    gone = weakref.ref(executor)
    future = executor.submit(k.append, log, "x")
    crew = executor._crew
    del executor
    gc.collect()
    assert gone() is None
    assert future.result(60) is None
    wait_until(lambda: crew.closed, "the dropped executor has closed")
    assert log.read_text() == "x"


def test_a_forgotten_executor_ends_quietly_and_soon_with_its_program():
    done = run("""
        import time, kernels_for_tests as k, rfaas_mpi, numpy as np
        ex = rfaas_mpi.Executor(workers=1)
        done = ex.submit(k.add, 1, 1).result()
        never = ex.submit(k.wait_for, "/no/such/file")
        request = ex.Invoke_init(k.double, np.ones(1), np.empty(1))
        request.Start()
        print(done, flush=True)
        """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_ctrl_c_interrupts_a_wait(worker, tmp_path):
    flag = tmp_path / "flag"
    future = worker.submit(k.wait_for, flag, 1)
    request = worker.Iinvoke(k.double, np.ones(1), np.empty(1))
    for wait in (future.result, request.Wait, lambda: Waitall([request])):
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
        timer.join()
    flag.touch()
    assert future.result() == 1
    assert request.Wait()


def test_a_lost_worker_can_be_named(worker):
    error = LeaseRevoked("x")
    assert isinstance(error, RFaaSError)
    with pytest.raises(ClosedError):
        executor = Executor(transport="inline")
        executor.shutdown()
        executor.stats()


# --- a long stream ------------------------------------------------------------------------------

def test_a_long_generator_keeps_few_calls_alive(worker):
    high = 0
    for count, value in enumerate(worker.map(k.identity, range(20_000))):
        assert value == count
        if not count % 100:
            high = max(high, len(worker._crew.pending))
    assert high <= 64


def test_results_that_nobody_reads_do_not_pile_up(worker):
    for n in range(5000):
        worker.submit(k.add, n)
    last = worker.submit(k.add, 0)
    assert last.result() == 0
    deadline = time.monotonic() + 60
    while len(worker._crew.pending) > 300 and time.monotonic() < deadline:
        worker.submit(k.add, 0).result()
    assert len(worker._crew.pending) <= 300


def test_a_session_that_opens_after_the_end_is_closed_again():
    crew = Crew(Settings.load(cores=(0, 1)))
    crew.close()
    with pytest.raises(ClosedError):
        crew.open()
    assert crew.lending is None
    assert not [thread for thread in threading.enumerate() if thread.name in ("rfaas-lending", "rfaas-session")]

"""Workers killed and stopped from outside: no result is lost, none comes twice, and nothing written after its end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator

import faults
import numpy as np
import pytest
from faults import native

from rfaas_mpi import CancelledError, Executor, KernelError, KernelTimeout, Startall, Waitall, Waitany


@pytest.fixture
def ex():
    with Executor(workers=1) as executor:
        yield executor


@pytest.fixture
def two():
    with Executor(workers=2, cores=(0, 1)) as executor:
        yield executor


def send(pid: int, number: int) -> None:
    """The signal, if the process is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_one(executor: Executor, chance: random.Random) -> None:
    """SIGKILL for one worker, from nobody's hand."""
    pids = list(faults.worker_pids(executor).values())
    if pids:
        send(chance.choice(pids), signal.SIGKILL)


# --- killed under a stream ------------------------------------------------------------------

# In each round one worker is killed once, at a random moment of 500 invocations,
# and all of them are waited for: no invocation can lose two workers, which the
# policy would rightly call the kernel's fault.
ROUNDS, EACH = 20 if "RFAAS_SOAK_FAULTS" in os.environ else 8, 500


def rounds(executor: Executor, seed: int, count: int = ROUNDS) -> Iterator[Callable[[int], None]]:
    """A function for each round, to be called after each of its results: it kills once."""
    chance = random.Random(seed)
    for _ in range(count):
        moment = chance.randrange(EACH)
        kill = threading.Event()

        def strike(kill: threading.Event = kill) -> None:
            assert kill.wait(60)
            kill_one(executor, chance)
        killer = threading.Thread(target=strike)
        killer.start()

        def step(count: int, moment: int = moment, kill: threading.Event = kill) -> None:
            if count == moment:
                kill.set()
        yield step
        kill.set()
        killer.join()


@pytest.mark.parametrize("kernel", [faults.adds_one, native("rfm_scale2")], ids=["Python", "native"])
def test_invoke_loses_no_result_to_killed_workers(two, kernel):
    wanted = (lambda x: x + 1) if kernel is faults.adds_one else (lambda x: 2 * x)
    out = np.zeros(50)
    for number, step in enumerate(rounds(two, 1, ROUNDS // 2)):
        for n in range(EACH):
            x = np.full(50, float(number * EACH + n))
            two.Invoke(kernel, x, out)
            assert (out == wanted(x)).all()
            step(n)


@pytest.mark.parametrize("where", ["plain", "arena", "staged"])
def test_iinvoke_loses_no_result_to_killed_workers(two, where):
    size = 5000 if where == "staged" else 20
    make = two.empty if where == "arena" else np.empty
    xs, outs = make((EACH, size)), make((EACH, size))
    for number, step in enumerate(rounds(two, 2)):
        xs[...] = np.arange(EACH)[:, None] + number
        outs[...] = -1
        requests = [two.Iinvoke(faults.adds_one, xs[n], outs[n]) for n in range(EACH)]
        for n, request in enumerate(requests):
            assert request.Wait()
            step(n)
        assert (outs == xs + 1).all()


def test_persistent_requests_lose_no_result_to_killed_workers(two):
    xs, outs = two.empty((EACH, 20)), two.empty((EACH, 20))
    requests = [two.Invoke_init(faults.adds_one, xs[n], outs[n]) for n in range(EACH)]
    for number, step in enumerate(rounds(two, 3)):
        xs[...] = np.arange(EACH)[:, None] + number
        outs[...] = -1
        Startall(requests)
        if number % 2:
            for n in range(0, EACH, 2):
                step(n), step(n + 1)
                requests[n].Wait()
            assert Waitall(requests)
        else:
            found = []
            for n in range(EACH):
                found.append(Waitany(requests))
                step(n)
            assert sorted(found) == list(range(EACH)), "each end is told once"
        assert (outs == xs + 1).all()


@pytest.mark.parametrize("how", ["result", "as_completed"])
def test_submit_loses_no_result_to_killed_workers_and_tells_each_once(two, how):
    for number, step in enumerate(rounds(two, 4)):
        told: list[int] = []
        futures = {two.submit(faults.plus_one, number * EACH + n): n for n in range(EACH)}
        if how == "result":
            for future, n in futures.items():
                assert future.result() == number * EACH + n + 1
                step(n)
            continue
        for future in futures:
            future.add_done_callback(lambda f, told=told, futures=futures: told.append(futures[f]))
        for count, future in enumerate(concurrent.futures.as_completed(futures, 60)):
            assert future.result() == number * EACH + futures[future] + 1
            step(count)
        assert sorted(told) == list(range(EACH)), "each callback was called once"


@pytest.mark.parametrize("chunksize", [1, 10])
@pytest.mark.parametrize("unordered", [False, True])
def test_map_loses_no_result_to_killed_workers(two, chunksize, unordered):
    for step in rounds(two, 5):
        found = []
        for n, value in enumerate(two.map(faults.plus_one, range(EACH), chunksize=chunksize, unordered=unordered)):
            found.append(value)
            step(n)
        assert (sorted(found) if unordered else found) == list(range(1, EACH + 1))


def test_results_larger_than_a_slot_survive_killed_workers(two):
    for step in rounds(two, 6, 5):
        for n in range(0, EACH, 20):
            for count in range(20):
                step(n + count)
            futures = [two.submit(faults.make_array, 5000 + n + i) for i in range(5)]
            for i, future in enumerate(futures):
                np.testing.assert_array_equal(future.result(), np.arange(5000.0 + n + i))


def test_an_executor_may_lose_hundreds_of_workers(ex, wait_until):
    """The service's own kills, since it makes a seat wait whose workers die of themselves."""
    lending = ex._crew.lending
    [lease] = lending.grant.leases
    for n in range(270):
        assert ex.submit(faults.plus_one, n).result() == n + 1
        [(number, pid)] = faults.worker_pids(ex).items()
        assert lending.session.kill(lease, number, "cancel")
        assert ex.submit(faults.plus_one, n).result() == n + 1
        # On another core it may just have had the time to answer that, too.
        wait_until(lambda pid=pid: set(faults.worker_pids(ex).values()) - {pid} and ex.workers,
                   f"the worker is replaced after {n} were killed")


# --- killed or stopped in one known invocation ---------------------------------------------------

class Running:
    """An invocation that has begun on a worker, and ends when it is told to."""

    def __init__(self, executor: Executor, api: str, tmp_path, *, timeout_s: float | None = None,
                 kernel=faults.fills_when, out: np.ndarray | None = None) -> None:
        self._begun, self._flag = tmp_path / "begun", tmp_path / "flag"
        self.out = np.zeros(3) if out is None else out
        self.future = self.request = None
        self.result: Callable[[], object]
        if api == "submit":
            self.future = executor.submit(faults.begin_then_wait, self._begun, self._flag, 5)
            self.result = self.future.result
        else:
            self.request = executor.Iinvoke(kernel, (faults.text(self._begun), faults.text(self._flag)), self.out,
                                            timeout_s)
            self.result = self._filled

    def _filled(self) -> object:
        self.request.Wait()
        assert (self.out == self.out[0]).all()
        return self.out[0]

    def cancel(self) -> bool:
        return self.future.cancel(force=True) if self.future is not None else self.request.Cancel(force=True)

    def worker(self) -> int:
        """The pid of the worker that runs it now, told once for each attempt."""
        faults.wait_for(self._begun)
        pid = int(self._begun.read_text())
        self._begun.unlink()
        return pid

    def finish(self) -> None:
        self._flag.touch()


APIS = pytest.mark.parametrize("api", ["submit", "Iinvoke"])


@APIS
def test_a_kill_from_nowhere_costs_no_result_the_first_time_and_the_second_is_the_kernels(two, tmp_path, api):
    for kills in (1, 2):
        running = Running(two, api, tmp_path)
        with concurrent.futures.ThreadPoolExecutor(1) as waiter:
            result = waiter.submit(running.result)
            for _ in range(kills):
                send(running.worker(), signal.SIGKILL)
            if kills == 1:
                running.worker()
                running.finish()
                assert result.result(60) == 5
            else:
                error = result.exception(60)
                assert isinstance(error, KernelError)
                assert error.signal == signal.SIGKILL
                assert "SIGKILL" in str(error)
        (tmp_path / "flag").unlink(missing_ok=True)
        assert two.submit(faults.plus_one, 1).result() == 2


@APIS
def test_what_waits_behind_a_killed_invocation_runs_elsewhere(ex, tmp_path, api):
    running = Running(ex, api, tmp_path)
    pid = running.worker()
    behind = [ex.submit(faults.plus_one, n) for n in range(50)]
    requests = [ex.Iinvoke(faults.adds_one, np.full(9, float(n)), np.zeros(9)) for n in range(50)]
    send(pid, signal.SIGKILL)
    running.finish()
    assert running.result() == 5
    assert [future.result() for future in behind] == list(range(1, 51))
    assert Waitall(requests)
    assert [request.out[0] for request in requests] == list(range(1, 51))


# --- stopped ------------------------------------------------------------------------------------

def stays(array: np.ndarray, value: float) -> None:
    """Looks often enough to see a writer that lives on, who writes all the time."""
    for _ in range(2000):
        assert (array == value).all()


@pytest.mark.parametrize("where", ["plain", "arena", "staged"])
@pytest.mark.parametrize("end", ["deadline", "cancel"])
def test_a_stopped_worker_that_is_continued_after_its_end_writes_no_byte(two, tmp_path, where, end):
    """The kernel writes to its output all the time, so that every moment after the end would show it."""
    size = 50_000 if where == "staged" else 100
    out = two.zeros(size) if where == "arena" else np.zeros(size)
    begun = tmp_path / "begun"
    request = two.Iinvoke(faults.scribbles, (faults.text(begun), 0.0), out, 0.3 if end == "deadline" else None)
    behind = [two.submit(faults.plus_one, n) for n in range(20)]
    faults.wait_for(begun)
    pid = int(begun.read_text())
    os.kill(pid, signal.SIGSTOP)
    if end == "deadline":
        with pytest.raises(KernelTimeout):
            request.Wait()
    else:
        assert request.Cancel(force=True)
        with pytest.raises(CancelledError):
            request.Wait()
    out[...] = 7
    send(pid, signal.SIGCONT)
    stays(out, 7)
    assert not faults.alive(pid)
    assert [future.result() for future in behind] == list(range(1, 21))
    assert (two.Invoke(faults.adds_one, np.full(size, 1.0), out) == 2).all()


@APIS
def test_a_stopped_worker_that_is_continued_in_time_delivers(two, tmp_path, api):
    running = Running(two, api, tmp_path)
    pid = running.worker()
    os.kill(pid, signal.SIGSTOP)
    others = [two.submit(faults.plus_one, n) for n in range(100)]
    assert [future.result() for future in others] == list(range(1, 101)), "the other worker goes on"
    running.finish()
    if running.request is not None:
        assert not running.request.Wait(0.05)
    else:
        with pytest.raises(TimeoutError):
            running.future.result(0.05)
    os.kill(pid, signal.SIGCONT)
    assert running.result() == 5
    assert pid in faults.worker_pids(two).values(), "nobody killed it"


@APIS
def test_a_stopped_call_can_be_cancelled_with_force(two, tmp_path, api):
    running = Running(two, api, tmp_path)
    pid = running.worker()
    os.kill(pid, signal.SIGSTOP)
    assert running.cancel()
    with pytest.raises(CancelledError):
        running.result()
    send(pid, signal.SIGCONT)
    assert not faults.alive(pid)
    assert two.submit(faults.plus_one, 1).result() == 2


def test_an_invocation_that_a_stopped_worker_never_began_ends_at_its_limit(ex):
    ex.Invoke(faults.adds_one, np.ones(3), np.zeros(3))
    [pid] = faults.worker_pids(ex).values()
    os.kill(pid, signal.SIGSTOP)
    out = np.zeros(3)
    request = ex.Iinvoke(faults.adds_one, np.ones(3), out, timeout_s=0.2)
    # Nobody can know whether it began: its end is the limit's, or it ran elsewhere.
    try:
        request.Wait()
        assert (out == 2).all()
    except KernelTimeout:
        assert (out == 0).all()
    send(pid, signal.SIGCONT)
    assert not faults.alive(pid)
    assert ex.submit(faults.plus_one, 1).result() == 2


def test_a_stopped_worker_does_not_keep_an_executor_from_its_end(tmp_path, wait_until):
    executor = Executor(workers=2, cores=(0, 1))
    pids = faults.worker_pids(executor).values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    executor.shutdown()
    wait_until(lambda: not any(faults.alive(pid) for pid in pids), "the stopped workers are gone")
    with Executor(workers=2, cores=(0, 1)) as again:
        assert again.submit(faults.plus_one, 1).result() == 2


def test_a_kernel_that_stops_its_own_worker_is_ended_by_its_limit(ex):
    with pytest.raises(KernelTimeout):
        ex.Invoke(faults.stops_itself, np.ones(1), np.zeros(1), timeout_s=0.2)
    assert ex.submit(faults.plus_one, 1).result() == 2


# --- zygotes ---------------------------------------------------------------------------------------

def zygotes(executor: Executor) -> list[int]:
    return [zygote["pid"] for zygote in executor._crew.lending.session.status()["zygotes"] if zygote["workers"]]


@APIS
def test_a_killed_zygote_costs_its_workers_and_no_result(two, tmp_path, api):
    running = Running(two, api, tmp_path)
    running.worker()
    behind = [two.submit(faults.plus_one, n) for n in range(200)]
    [zygote] = zygotes(two)
    os.kill(zygote, signal.SIGKILL)
    running.finish()
    assert running.result() == 5
    assert [future.result() for future in behind] == list(range(1, 201))
    assert zygotes(two) != [zygote]


def test_what_changes_with_each_test_starts_no_zygote_of_its_own(ex, monkeypatch):
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "another one")
    with Executor(workers=1, cores=(0, 1)) as other:
        assert other.submit(os.getppid).result() == ex.submit(os.getppid).result()

"""offload: one call, run here or at a worker, whichever is done sooner; first against worlds that are made up."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from dataclasses import dataclass, field

import faults
import numpy as np
import pytest
import transports
from hypothesis import given, settings
from hypothesis import strategies as st

import rfaas_mpi as rf
from rfaas_mpi import ClosedError, Executor, InvalidBuffer, KernelError, NestedError
from rfaas_mpi import choice as choice_module
from rfaas_mpi.choice import Choice, Known, Load
from rfaas_mpi.kernels import object_kernel
from rfaas_mpi.offloading import _measure_buffers
from rfaas_mpi.planner import BUDGET

RANK = os.getpid()

# What is lost to what nobody can know before: a first call, and ways that are longer than expected.
GRACE_S = 0.02


# --- worlds that are made up -------------------------------------------------------------------

@dataclass
class World:
    """What things really take, in seconds; `pace` is a worker's. `stops`: in which time it answers nothing."""

    kernel_s: float = 1e-3
    pace: float = 1.0
    way_s: float = 50e-6
    byte_s: float = 0.0
    hand_s: float = 50e-6
    busy: int = 0
    stops: tuple[float, float] = (math.inf, math.inf)


@dataclass
class Rank:
    """Calls the same kernel again and again, one call after another, as a rank does."""

    world: World
    nbytes: int = 0
    choice: Choice = field(default_factory=lambda: Choice(Known()))
    now: float = 0.0
    alone_s: float = 0.0
    probe: tuple[float, float] | None = None
    probed_s: float = 0.0

    def call(self, kernel_s: float | None = None, left_s: float = math.inf) -> bool:
        """One call; whether a worker ran it."""
        world, choice = self.world, self.choice
        kernel_s = world.kernel_s if kernel_s is None else kernel_s
        if self.probe is not None and self.now >= self.probe[0]:
            choice.probed(max(self.nbytes, 1), self.probe[1])
            self.probe = None
        busy = int(self.probe is not None)
        decision = choice.decide(max(self.nbytes, 1), self.nbytes, Load(1, world.busy, busy, left_s))
        here_s = kernel_s * (1 + world.busy)
        self.alone_s += here_s
        if decision.there:
            begin = max(self.now, world.stops[1]) if self.now >= world.stops[0] else self.now
            took = begin - self.now + world.way_s + world.byte_s * self.nbytes + kernel_s * world.pace
            if took > decision.patience_s:
                choice.stalled(decision.patience_s)
                self.now += decision.patience_s
            else:
                choice.ran_there(max(self.nbytes, 1), self.nbytes, took, kernel_s * world.pace, busy)
                self.now += took
                return True
        elif decision.probe:
            spent = world.hand_s + world.byte_s * self.nbytes
            self.now += spent
            self.probed_s += spent
            if self.now < world.stops[0]:
                self.probe = self.now + world.way_s + kernel_s * world.pace, kernel_s * world.pace
        choice.ran_here(max(self.nbytes, 1), here_s, world.busy)
        self.now += here_s
        return False


@pytest.mark.parametrize("way_s", [5e-6, 50e-6, 2e-3])
@pytest.mark.parametrize("pace", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("kernel_s", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1])
def test_a_call_is_run_where_it_is_done_sooner_on_both_sides_of_the_crossover(kernel_s, pace, way_s):
    rank = Rank(World(kernel_s, pace, way_s))
    there_s = way_s + pace * kernel_s
    calls = max(200, min(int(0.02 / kernel_s), 5000))
    for _ in range(calls):
        rank.call()
    assert rank.now <= 1.02 * rank.alone_s + GRACE_S
    before, workers = rank.now, 0
    for _ in range(calls):
        workers += rank.call()
    best = min(kernel_s, there_s) * calls
    # Less than 3 % of gain isn't taken: it may not be there.
    if not 0.9 < there_s / kernel_s < 1.0 and (calls * kernel_s > 0.5 or there_s > kernel_s):
        assert rank.now - before <= 1.05 * best + GRACE_S
        assert workers > 0.9 * calls if there_s < kernel_s else workers < 0.1 * calls


@given(kernel_s=st.floats(1e-6, 0.1), pace=st.floats(0.05, 50.0), way_s=st.floats(1e-6, 0.01),
       byte_s=st.floats(0.0, 1e-8), nbytes=st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_calls_take_hardly_longer_than_without_workers(kernel_s, pace, way_s, byte_s, nbytes):
    rank = Rank(World(kernel_s, pace, way_s, byte_s), nbytes)
    for _ in range(500):
        rank.call()
    # A way that is far longer than expected is found out by going it, four times as long at a time.
    assert rank.now <= 1.02 * rank.alone_s + GRACE_S + 3 * (way_s + byte_s * nbytes)
    assert rank.probed_s <= BUDGET * rank.alone_s + rank.world.hand_s + byte_s * nbytes


def test_what_is_less_than_the_way_there_and_back_asks_for_no_probe():
    rank = Rank(World(kernel_s=1e-6))
    for _ in range(20_000):
        assert not rank.call()
    assert rank.choice.probes == 0
    assert "less than the way" in rank.choice.judge(1, 0, Load(1))[1]


def test_a_rank_that_is_busy_has_workers_run_what_would_wait():
    rank = Rank(World(kernel_s=1e-3, pace=1.0, busy=1))
    assert sum(rank.call() for _ in range(100)) > 90
    slow = Rank(World(kernel_s=1e-3, pace=5.0, busy=1))
    assert sum(slow.call() for _ in range(1000)) < 50


def test_a_worker_that_others_use_is_not_waited_for():
    choice = Choice(Known())
    for _ in range(4):
        choice.ran_here(1, 1e-3)
    choice.probed(1, 0.6e-3)
    assert choice.decide(1, 0, Load(1)).there
    assert not choice.decide(1, 0, Load(1, there=1)).there
    assert choice.decide(1, 0, Load(2, there=1)).there


def test_a_worker_that_stops_for_two_seconds_costs_what_is_earned_again_first():
    rank = Rank(World(kernel_s=10e-3, pace=0.1))
    for _ in range(100):
        rank.call()
    rank.world.stops = rank.now, rank.now + 2.0
    before, since = rank.now, rank.alone_s
    for _ in range(50):
        rank.call()
    assert rank.choice.stalls == 1
    assert rank.now - before <= 1.02 * (rank.alone_s - since) + 0.1
    for _ in range(300):
        rank.call()
    assert rank.call()


def test_a_worker_that_vanished_is_tried_less_and_less():
    rank = Rank(World(kernel_s=10e-3, pace=0.1))
    for _ in range(100):
        rank.call()
    rank.world.stops = rank.now, math.inf
    before, since = rank.now, rank.alone_s
    for _ in range(2000):
        rank.call()
    assert rank.now - before <= 1.02 * (rank.alone_s - since) + 0.1


def test_a_call_that_a_lease_is_too_short_for_runs_here():
    rank = Rank(World(kernel_s=1.0, pace=0.5))
    for _ in range(10):
        rank.call()
    assert rank.call() and rank.call(left_s=0.6)
    assert not rank.call(left_s=0.3)
    assert "lease ends in 300 ms" in rank.choice.judge(1, 0, Load(1, left_s=0.3))[1]


def test_a_first_call_that_compiled_says_little_of_the_next():
    rank = Rank(World(kernel_s=1e-3, pace=1.0))
    rank.call(kernel_s=1.0)
    assert not any(rank.call() for _ in range(500))


# --- real workers ------------------------------------------------------------------------------

# Workers import this module, too: who the rank is they are told.

def quick_there(x, rank):
    """As a function that is quicker on a worker."""
    time.sleep(0.02 if os.getpid() == rank else 0.001)
    return x + 1, os.getpid()


def where(x):
    return os.getpid()


def fails(x):
    raise KeyError(x)


def nests():
    Executor(transport="inline")



def writes(x):
    x[0] = 7.0


def dozes(seconds):
    time.sleep(seconds)
    return os.getpid()


def takes_time(rank):
    """Raises on a worker what would be raised for one that is late."""
    if os.getpid() != rank:
        raise TimeoutError("its own")
    time.sleep(0.02)


def total(x, factor=1.0):
    return float(np.sum(x)) * factor


@rf.kernel
def doubled(x, rank, out):
    time.sleep(0.02 if os.getpid() == rank else 0.001)
    values, who = out
    values[...] = x * 2
    who[...] = os.getpid()


@rf.kernel
def negative(x, out):
    if (x < 0).any():
        raise ValueError("a row is negative")
    out[...] = x


@pytest.fixture(params=transports.OVER)
def worker(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


@pytest.fixture(params=["inline", *transports.OVER])
def ex(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


# On a busy machine what was seen first may be far from what comes after it.
TRIES = 20


def until_there(call, turns: int = 3000) -> int:
    """Calls until a worker has run it; the worker's pid."""
    for _ in range(turns):
        if (pid := call()) != RANK:
            return pid
    raise AssertionError(f"no worker ran any of {turns} calls")


def test_a_call_goes_where_it_is_done_sooner(worker):
    for _ in range(TRIES):
        until_there(lambda: worker.offload(quick_there, 8, RANK)[1])
        found = [worker.offload(quick_there, 8, RANK) for _ in range(50)]
        assert {value for value, _ in found} == {9}
        [known] = worker.explain()
        if known.offload and sum(pid != RANK for _, pid in found) > 25:
            break
    assert sum(pid != RANK for _, pid in found) > 25
    assert known.offload and known.kernel.endswith("quick_there") and known.there_s < known.here_s
    assert known.runs_there > 25 and "offload" in str(known)


def test_a_call_that_is_less_than_the_way_runs_here(worker):
    assert {worker.offload(where, 3) for _ in range(500)} == {RANK}
    [known] = worker.explain()
    assert not known.offload and known.probes == 0 and known.runs_here == 500


def test_buffers_go_where_they_are_done_sooner_too(worker):
    x = worker.array(np.arange(100.0))
    values, who = worker.empty(100), worker.empty(1, np.int64)

    def call() -> int:
        values.fill(np.nan)
        assert worker.Offload(doubled, (x, RANK), (values, who))[0] is values
        assert np.array_equal(values, x * 2)
        return int(who[0])

    for _ in range(TRIES):
        until_there(call)
        there = sum(call() != RANK for _ in range(40))
        [known] = worker.explain()
        if known.offload and there > 20:
            break
    assert there > 20
    assert known.offload and known.nbytes == 1616


@rf.kernel
def counted(x, out):
    """Writes to its input, where it is told to."""
    if x[0] < 0:
        x[0] = 0
    out[...] = x + 1


def test_a_call_on_shapes_that_ran_here_is_not_looked_at_again_and_checked_like_the_first(worker):
    x, out = np.arange(8.0), np.empty(8)
    for _ in range(50):
        worker.Offload(counted, x, out)
    offloads = worker._offloads
    assert offloads.invoke_again(counted, x, out), "it is known to run here"
    for n in range(50):
        fresh = np.full(8, float(n))
        assert (worker.Offload(counted, (fresh,), np.empty(8)) == n + 1).all()
    both = np.zeros(12)
    for given, result in ((both[:8], both[4:]), (x, both[::2][:4]), (x, np.broadcast_to(0.0, 8)), (x, None)):
        with pytest.raises(InvalidBuffer):
            worker.Offload(counted, given, result)
    with pytest.raises(KernelError, match="read-only"):
        worker.Offload(counted, -np.ones(8), out)
    with pytest.raises(KernelError, match="shape"):
        worker.Offload(counted, x, np.empty(9))
    assert (worker.Offload(counted, (x,), out) == x + 1).all()
    [known] = [known for known in worker.explain() if known.nbytes == 128]
    assert known.runs_here > 100 and not known.runs_there
    worker.shutdown()
    with pytest.raises(ClosedError):
        worker.Offload(counted, x, out)


def test_an_array_of_a_request_in_flight_is_refused_where_the_call_would_run_here(worker, tmp_path):
    x, out = np.arange(8.0), np.empty(8)
    for _ in range(50):
        worker.Offload(counted, x, out)
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    request = worker.Iinvoke(faults.fills_when, (faults.text(begun), faults.text(flag)), out)
    try:
        with pytest.raises(InvalidBuffer, match="in flight"):
            worker.Offload(counted, x, out)
    finally:
        flag.touch()
    request.Wait()
    assert (worker.Offload(counted, x, out) == x + 1).all()


def test_shapes_that_ran_here_go_to_a_worker_once_that_is_sooner(worker):
    rank, took, out = np.array([RANK]), np.zeros(1), np.zeros(1, np.int64)

    def call(here_s: float) -> int:
        took[0] = here_s
        worker.Offload(slow_on_the_rank, (rank, took), out)
        return int(out[0])

    for _ in range(50):
        assert call(0.0) == RANK
    until_there(lambda: call(0.003))


@rf.kernel
def slow_on_the_rank(rank, seconds, out):
    if os.getpid() == rank[0]:
        time.sleep(seconds[0])
    out[...] = os.getpid()


@rf.kernel
def looked_up(table, rank, out):
    time.sleep(0.02 if os.getpid() == rank else 0.001)
    out[:] = table[-1], os.getpid()


def test_a_constant_is_no_byte_that_travels_with_a_call():
    table, x, out = np.zeros(1 << 20), np.zeros(1000), np.zeros(10)
    everything = table.nbytes + x.nbytes + out.nbytes
    for way in ("tcp", "verbs"):
        _, size, travel = _measure_buffers(way, None, (table, x), (out,), (True, False))
        assert (size, travel) == (everything, x.nbytes + out.nbytes)
        assert _measure_buffers(way, None, (table, x), (out,), (False, False))[1:] == (everything, everything)
    # Nor is it where workers see some of the rest, or all, where it lies.
    where = {x.__array_interface__["data"][0]: (1, 0)}
    assert _measure_buffers("shm", lambda at, _: where.get(at), (table, x), (out,), (True, False))[2] == out.nbytes


def test_a_call_with_a_large_constant_goes_where_it_is_done_sooner(executor_over):
    """Sending it with each call would take longer than the call does here; nor does a probe send a copy of it."""
    with executor_over("tcp") as worker:
        constant, out = worker.put(np.arange(5e6)), np.empty(2)

        def call() -> int:
            worker.Offload(looked_up, (constant, RANK), out)
            assert out[0] == 5e6 - 1
            return int(out[1])

        until_there(call)
        assert sum(call() != RANK for _ in range(40)) > 20
        assert worker._crew.invoker.stats()["constants_sent"] == constant.nbytes


def test_as_long_as_nobody_knows_what_it_takes_a_worker_is_not_late_before_the_rank_is():
    choice = Choice(Known())
    decision = choice.decide(8.0, 8, Load(1, here=1))
    assert decision.there and decision.patience_s < 2
    for waited in (1.5, 3.0, 60.0):
        assert choice.patience_left(8.0, waited, here=1) == waited, "as long again, while the rank runs the same"
        assert choice.patience_left(8.0, waited, here=0) == 0, "the rank does something else, or failed"
    choice.ran_here(8.0, 5.0)
    assert choice.patience_left(8.0, 3.0, here=0) >= 2.0
    assert choice.patience_left(8.0, 60.0, here=1) == 0


@pytest.mark.parametrize("call", ["objects", "buffers"])
def test_a_kernel_that_takes_longer_than_is_waited_for_an_unknown_one_is_not_taken_from_its_worker(
        worker, call, monkeypatch, tmp_path, wait_until):
    monkeypatch.setattr(choice_module, "COLD_PATIENCE_S", 0.001)
    asked, patience_left = [], Choice.patience_left
    monkeypatch.setattr(Choice, "patience_left", lambda *known: (asked.append(known), patience_left(*known))[1])
    flag = tmp_path / "flag"
    begun = [tmp_path / "one", tmp_path / "two"]
    who: list[int] = []

    def run(name) -> None:
        if call == "objects":
            who.append(worker.offload(begins_and_waits, str(name), str(flag)))
        else:
            out = np.zeros(1, np.int64)
            worker.Offload(begun_and_waited, (faults.text(name), faults.text(flag)), out)
            who.append(int(out[0]))

    threads = []
    for name in begun:
        threads.append(threading.Thread(target=run, args=(name,)))
        threads[-1].start()
        faults.wait_for(name)
    wait_until(lambda: len(asked) > 3, "it is over again and again how long an unknown kernel is waited for")
    flag.touch()
    for thread in threads:
        thread.join(60)
    assert len(set(who)) == 2 and RANK in who
    [known] = worker.explain()
    assert (known.runs_here, known.runs_there, known.stalls) == (1, 1, 0)


def begins_and_waits(name, flag):
    faults.begin(name)
    faults.wait_for(flag)
    return os.getpid()


@rf.kernel
def begun_and_waited(name, flag, out):
    out[...] = begins_and_waits(name.tobytes().decode(), flag.tobytes().decode())


def test_threads_that_would_wait_for_each_other_use_the_worker(worker):
    seen: set[int] = set()
    lock = threading.Lock()
    begin = threading.Barrier(2)

    def calls() -> None:
        begin.wait()
        for _ in range(40):
            pid = worker.offload(dozes, 0.01)
            with lock:
                seen.add(pid)

    for _ in range(20):
        threads = [threading.Thread(target=calls) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(seen) == 2:
            break
    assert len(seen) == 2 and RANK in seen


def test_results_and_errors_are_those_of_a_plain_call(ex):
    x = np.arange(1000.0)
    constant = ex.put(x)
    for given_x in (x, ex.array(x), constant):
        assert ex.offload(total, given_x) == x.sum()
        assert ex.offload(total, given_x, factor=2.0) == 2 * x.sum()
    assert ex.offload("abc".upper) == "ABC"
    with pytest.raises(KeyError, match="5"):
        ex.offload(fails, 5)
    with pytest.raises(NestedError):
        ex.offload(nests)
    with pytest.raises(ValueError, match="read-only"):
        ex.offload(writes, x)
    assert x[0] == 0.0
    with pytest.raises(TypeError, match="not callable"):
        ex.offload(3)
    out = ex.empty(1000)
    assert ex.Offload(negative, x, out) is out and np.array_equal(out, x)
    with pytest.raises(KernelError, match="a row is negative"):
        ex.Offload(negative, -1 - x, out)
    with pytest.raises(TypeError, match="is no kernel"):
        ex.Offload(total, x, out)
    assert ex.offload(total, x) == x.sum()


def test_an_error_of_the_kernel_s_own_is_no_sign_of_a_late_worker(worker):
    worker.offload(takes_time, RANK)
    # A probe that fails says nothing, so that nobody would be asked again. Patience for a machine that is busy.
    choice = next(iter(worker._offloads._entries.values())).choice
    choice.probed(1, 1e-3)
    choice._spread = 1e5
    with pytest.raises(TimeoutError, match="its own"):
        for _ in range(1000):
            worker.offload(takes_time, RANK)
    assert worker.explain()[0].stalls == 0


def test_a_result_that_comes_when_patience_ends_is_no_error(worker):
    worker.offload(dozes, 0.0)
    pid = worker.submit(dozes, 0.0).result()
    offloads = worker._offloads
    [entry] = offloads._entries.values()
    late = 0
    for turn in range(1000):
        patience_s = 150e-6 + turn % 100 * 2e-6
        found = offloads._call_there(entry, object_kernel(dozes), (1e-4,), {}, 1, 1, Load(1), patience_s)
        assert found in ((True, pid), (False, None))
        late += not found[0]
    assert worker.explain()[0].stalls == late


def test_a_call_of_somebody_else_s_is_not_given_up_with_ours(worker):
    x, values, who = worker.array(np.arange(10.0)), worker.empty(10), worker.empty(1, np.int64)

    def call() -> int:
        worker.Offload(doubled, (x, RANK), (values, who))
        assert np.array_equal(values, x * 2)
        return int(who[0])

    pid = until_there(call)
    long = worker.submit(dozes, 1.0)
    while not long.running():
        pass
    for _ in range(5):
        call()
    assert long.result() == pid == worker.submit(os.getpid).result()


@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_gone_or_stopped_costs_no_result(worker, deed):
    x, values, who = worker.array(np.arange(10.0)), worker.empty(10), worker.empty(1, np.int64)

    def call() -> int:
        values.fill(np.nan)
        worker.Offload(doubled, (x, RANK), (values, who))
        assert np.array_equal(values, x * 2)
        return int(who[0])

    pid = until_there(call)
    os.kill(pid, deed)
    for _ in range(5):
        call()
    pid = until_there(lambda: worker.offload(quick_there, 8, RANK)[1])
    os.kill(pid, deed)
    assert {worker.offload(quick_there, 8, RANK)[0] for _ in range(5)} == {9}


def test_an_executor_ends_though_a_worker_that_stopped_never_said_what_it_takes(worker):
    pid = worker.submit(os.getpid).result()
    os.kill(pid, signal.SIGSTOP)
    for _ in range(5):
        assert worker.offload(quick_there, 8, RANK) == (9, RANK)
        worker.Offload(doubled, (np.ones(4), RANK), (np.empty(4), np.empty(1, np.int64)))
    end = threading.Thread(target=worker.shutdown)
    end.start()
    end.join(60.0)
    ended = not end.is_alive()
    if not ended:
        os.kill(pid, signal.SIGCONT)
        end.join()
    assert ended
    with pytest.raises(rf.ClosedError):
        worker.offload(quick_there, 8, RANK)
    with pytest.raises(rf.ClosedError):
        worker.Offload(doubled, (np.ones(4), RANK), (np.empty(4), np.empty(1, np.int64)))

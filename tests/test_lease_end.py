"""Where no time limit is given, a lease's hard end is an invocation's: it is told, or run elsewhere, and never lost."""

from __future__ import annotations

import math
import os
import signal
import time

import faults
import numpy as np
import pytest
import transports

import rfaas_mpi as rf
from rfaas_mpi import Executor, KernelTimeout, LeaseExpired

RANK = os.getpid()
LEASE_S = 1.0
# Longer than any lease here; whoever waits for it is told long before.
LONG_S = 120.0


def outlives(rank, seconds):
    """Ends on a worker only after its lease; on the rank at once."""
    if os.getpid() != rank:
        time.sleep(seconds)
    return os.getpid()


@rf.kernel
def outlasts(rank, seconds, out):
    if os.getpid() != rank:
        time.sleep(float(seconds))
    out[...] = os.getpid()


@pytest.fixture(params=transports.OVER)
def over(request, executor_over):
    return lambda **settings: executor_over(request.param, lease_duration_s=LEASE_S, **settings)


def test_what_can_t_end_before_its_lease_is_run_by_the_rank(over):
    with over() as ex:
        assert ex.workers
        out, later = np.zeros(1, np.int64), np.zeros(1, np.int64)
        persistent = ex.Invoke_init(outlasts, (RANK, LONG_S), later)
        persistent.Start()
        future = ex.submit(outlives, RANK, LONG_S)
        ex.Invoke(outlasts, (RANK, LONG_S), out)
        assert out[0] == RANK and future.result() == RANK
        persistent.Wait()
        assert later[0] == RANK
        assert not ex.workers
        # And what is started after the end is no worse off.
        later.fill(0)
        persistent.Start()
        persistent.Wait()
        assert later[0] == RANK and ex.submit(outlives, RANK, LONG_S).result() == RANK
        assert ex.offload(outlives, RANK, LONG_S) == RANK


def test_where_the_rank_must_not_run_it_the_error_says_that_the_lease_ended(over):
    with over(fallback=False) as ex:
        out = np.zeros(1, np.int64)
        future = ex.submit(outlives, RANK, LONG_S)
        queued = ex.submit(outlives, RANK, LONG_S)
        with pytest.raises(LeaseExpired):
            ex.Invoke(outlasts, (RANK, LONG_S), out)
        for one in (future, queued):
            with pytest.raises(LeaseExpired, match="hard end|expired"):
                one.result()
        assert out[0] == 0


def test_a_time_limit_that_comes_first_is_told_as_one():
    with Executor(workers=1, lease_duration_s=600.0) as ex, pytest.raises(KernelTimeout):
        ex.Invoke(outlasts, (RANK, LONG_S), np.zeros(1, np.int64), timeout_s=0.2)


def test_a_time_limit_beyond_the_lease_doesn_t_keep_its_worker():
    with Executor(workers=1, lease_duration_s=LEASE_S) as ex:
        out = np.zeros(1, np.int64)
        ex.Invoke(outlasts, (RANK, LONG_S), out, timeout_s=LONG_S / 2)
        assert out[0] == RANK


def test_cells_of_a_split_outlive_the_lease(over):
    with over() as ex:
        x, out = ex.array(np.arange(64.0)), ex.zeros(64)
        ex.Split(tripled, (x, RANK), out, whole=(1,), grain=1, where="workers")
        assert np.array_equal(out, x * 3)


@rf.kernel
def tripled(x, rank, out):
    if os.getpid() != rank:
        time.sleep(0.1 * len(x))
    out[...] = x * 3


def test_without_a_hard_end_nothing_ends_a_call():
    with Executor(workers=1) as ex:
        assert ex._crew.ends_at == math.inf
    with Executor(workers=1, lease_duration_s=600.0) as ex:
        left_s = ex._crew.ends_at - time.monotonic()
        assert 0.0 < left_s <= 600.0
        assert ex.submit(outlives, 0, 0.0).result() != RANK


@pytest.mark.parametrize(("transport", "fallback"), [("shm", True), ("tcp", False)])
def test_a_lease_ends_although_the_service_is_stopped(executor_over, transport, fallback):
    """Nobody tells that it has ended, and nobody takes the worker: the rank itself knows the hour."""
    with executor_over(transport, lease_duration_s=LEASE_S, fallback=fallback) as ex:
        service = faults.service_pid(ex)
        future = ex.submit(outlives, RANK, LONG_S)
        os.kill(service, signal.SIGSTOP)
        try:
            if fallback:
                assert future.result(60.0) == RANK
            else:
                with pytest.raises(LeaseExpired, match="did not say so"):
                    future.result(60.0)
        finally:
            os.kill(service, signal.SIGCONT)

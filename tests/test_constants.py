"""Constants: what they hold names them, and a worker gets them once, whichever comes when."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import transports

import rfaas_mpi as rf


@rf.kernel
def summed(table, factor, out):
    out[0] = table.sum() * factor
    out[1] = os.getpid()


@pytest.fixture(params=["inline", *transports.OVER])
def ex(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


@pytest.fixture(params=transports.OVER)
def worker(request, executor_over):
    with executor_over(request.param) as executor:
        yield executor


def address(constant: rf.Constant) -> int:
    return constant.array.__array_interface__["data"][0]


def test_what_is_put_twice_is_there_once(ex):
    values = np.arange(10_000.0)
    first, again = ex.put(values), ex.put(values.copy())
    assert address(first) == address(again)
    others = [ex.put(values.reshape(100, 100)), ex.put(values.view(np.int64)), ex.put(values + 1)]
    assert len({address(one) for one in (first, *others)}) == 4
    # One handle's end is not the other's.
    first.close()
    out = np.empty(2)
    assert ex.Invoke(summed, (again, 2.0), out)[0] == 2 * values.sum()


def test_what_changed_is_another_constant(ex):
    values, out = np.ones(5000), np.empty(2)
    before = ex.put(values)
    values[0] = 0.0
    now = ex.put(values)
    for _ in range(3):
        assert ex.Invoke(summed, (before, 1.0), out)[0] == 5000.0
        assert ex.Invoke(summed, (now, 1.0), out)[0] == 4999.0
    with pytest.raises(rf.InvalidBuffer, match="read-only"):
        ex.Invoke(summed, (np.ones(4), 1.0), now)


def test_what_nobody_holds_any_more_is_no_constant(ex):
    values, out = np.full(50_000, 3.0), np.empty(2)
    for turn in range(200):
        constant = ex.put(values + turn)
        assert ex.Invoke(summed, (constant, 1.0), out)[0] == 50_000 * (3.0 + turn)
        constant.close()
    del constant
    assert len(ex._crew.memory._constants) <= 1


def test_a_worker_that_comes_later_gets_it_too(worker, wait_until):
    constant, out = worker.put(np.arange(100_000.0)), np.empty(2)
    pids = set()
    for _ in range(3):
        [before] = worker.workers
        assert worker.Invoke(summed, (constant, 1.0), out)[0] == constant.array.sum()
        pids.add(int(out[1]))
        os.kill(int(out[1]), signal.SIGKILL)
        wait_until(lambda: worker.workers not in ([], [before]), "another worker came")
    assert len(pids) == 3 and os.getpid() not in pids

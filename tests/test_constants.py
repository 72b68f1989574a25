"""Constants: what they hold names them, and a worker gets them once, or again after it had to let go of them."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Iterator

import numpy as np
import proxies
import pytest
import transports

import rfaas_mpi as rf
from rfaas_mpi.config import Settings
from rfaas_mpi.remote import Address
from rfaas_mpi.session import Session


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


# --- what travels ----------------------------------------------------------------------------------------------------

TABLE = 256 * 1024                  # bytes of one


@rf.kernel
def held(table, out):
    """The sum, and how much memory the worker has of its mirrors and all else."""
    out[0] = table.sum()
    with open("/proc/self/statm") as file:
        out[1] = int(file.read().split()[1]) * mmap.PAGESIZE


def tables(executor, n: int, nbytes: int = TABLE) -> list[rf.Constant]:
    return [executor.put(np.full(nbytes // 8, 1.0 + i)) for i in range(n)]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@contextlib.contextmanager
def relayed(**settings: object) -> Iterator[tuple[rf.Executor, bytearray]]:
    """An executor with one worker over tcp, and all bytes that the rank sent so far."""
    with Session.open(Settings.load()) as session:
        said = session.open_door(["127.0.0.1:0"])
        with (proxies.proxy(Address.parse(said.addresses[0])) as (address, seen),
              rf.Executor(workers=1, transport="tcp", service=str(address), key_file=os.fsdecode(said.key_file),
                          fallback=False, **settings) as executor):
            yield executor, seen


def sent_for(seen: bytearray, executor: rf.Executor, constant: rf.Constant) -> int:
    """How many tables' worth of bytes the rank sends for a call with this constant."""
    before, out = len(seen), np.empty(2)
    executor.Invoke(held, constant, out)
    assert out[0] == constant.array.sum()
    return round((len(seen) - before) / TABLE)


def test_a_constant_is_sent_once(stack):
    executor, seen = stack.enter_context(relayed())
    constants = tables(executor, 3)
    assert [sent_for(seen, executor, constant) for constant in constants] == [1, 1, 1]
    assert [sent_for(seen, executor, constant) for constant in constants * 3] == [0] * 9
    # In what objects refer to as well.
    before = len(seen)
    assert executor.submit(np.sum, constants[1]).result() == constants[1].array.sum()
    assert len(seen) - before < TABLE / 4


def test_it_is_sent_again_to_a_worker_that_takes_another_s_place(stack, wait_until):
    executor, seen = stack.enter_context(relayed())
    [constant] = tables(executor, 1)
    assert [sent_for(seen, executor, constant) for _ in range(3)] == [1, 0, 0]
    [before] = executor.workers
    os.kill(executor.submit(os.getpid).result(), signal.SIGKILL)
    wait_until(lambda: executor.workers not in ([], [before]), "another worker came")
    assert [sent_for(seen, executor, constant) for _ in range(3)] == [1, 0, 0]


def test_beyond_the_limit_what_was_not_used_for_longest_goes_and_is_sent_again(stack):
    executor, seen = stack.enter_context(relayed(constants_bytes=2 * TABLE))
    a, b, c = tables(executor, 3)
    assert [sent_for(seen, executor, constant) for constant in (a, b, a, b, a)] == [1, 1, 0, 0, 0]
    assert [sent_for(seen, executor, constant) for constant in (c, a, c, a)] == [1, 0, 0, 0]
    # b went for c, a for b.
    assert [sent_for(seen, executor, constant) for constant in (c, b, c, a)] == [0, 1, 0, 1]
    assert executor._crew.invoker.stats()["constants_dropped"] == 3 * TABLE


def test_what_calls_in_flight_use_stays(stack):
    """Also where all of it is more than the limit."""
    executor, _ = stack.enter_context(relayed(constants_bytes=1))
    constants = tables(executor, 20)
    outs = np.empty((200, 2))
    for request in [executor.Iinvoke(held, constants[i % 20], outs[i]) for i in range(200)]:
        request.Wait()
    assert [out[0] for out in outs] == [constants[i % 20].array.sum() for i in range(200)]


def test_what_goes_frees_memory_at_the_worker(executor_over):
    nbytes = 8 << 20
    with executor_over("tcp", constants_bytes=2 * nbytes) as executor:
        constants, out, most = tables(executor, 12, nbytes), np.empty(2), []
        for constant in constants * 2:
            executor.Invoke(held, constant, out)
            most.append(out[1])
        # From the second one on: no more than one at a time came to it.
        assert max(most) - most[1] < 2 * nbytes


def test_a_result_that_is_made_of_one_is_there_until_it_was_fetched(stack):
    """It is too large for a slot: the worker keeps it, as a part of the constant."""
    executor, _ = stack.enter_context(relayed(constants_bytes=1))
    a, b = tables(executor, 2)
    for _ in range(10):
        futures = [executor.submit(_rows, constant) for constant in (a, b, a, b)]
        for future, constant in zip(futures, (a, b, a, b), strict=True):
            assert np.array_equal(future.result(), constant.array[10:-10])


def _rows(table):
    return table[10:-10]

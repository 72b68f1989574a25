"""Executors of communicators, in worlds of 1, 2, 3 and 4 ranks: `mpiexec -n N python -m pytest --with-mpi` this.

Each assertion is on what all ranks saw, so that none waits for one that failed.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import kernels_for_tests as k
import numpy as np
import pytest
from mpi4py import MPI

from rfaas_mpi import (
    UNDEFINED,
    ClosedError,
    ConfigError,
    Executor,
    KernelError,
    LeaseDenied,
    Startall,
    Testall,
    Testany,
    Testsome,
    Waitall,
    Waitany,
    Waitsome,
)
from rfaas_mpi.session import Session

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
LAST = SIZE - 1
pytestmark = pytest.mark.mpi


def on_all(fact: object) -> bool:
    return COMM.allreduce(bool(fact), op=MPI.LAND)


def gang(workers=(1, 2), comm=COMM, **changes) -> Executor:
    return Executor(comm=comm, workers=workers, **{"cores": (0, 1), **changes})


def leases() -> int:
    with Session.open(observer=True) as watcher:
        return len(watcher.status()["leases"])


def works(ex: Executor) -> bool:
    x, y = ex.array(np.arange(1000.0) + RANK), ex.empty(1000)
    ex.Invoke(k.double, x, y)
    return bool((y == 2 * x).all()) and ex.submit(k.add, RANK, 1).result() == RANK + 1


def raised(kind: type[Exception], act) -> str:
    """What an error of that kind says; "" if there is none."""
    try:
        act()
    except kind as error:
        return str(error)
    return ""


@pytest.mark.parametrize("count", [1, 2])
def test_the_ranks_of_a_communicator_share_the_workers_of_one_lease(count):
    with gang(count) as ex:
        held = leases()
        COMM.Barrier()
        pids = set().union(*COMM.allgather({ex.submit(k.pid).result() for _ in range(16)}))
        assert on_all(works(ex)) and on_all(ex.workers)
        assert on_all(held == 1) and len(pids) == count
        COMM.Barrier()


def test_every_rank_has_as_many_workers_as_the_others():
    with gang(2) as ex:
        assert set(COMM.allgather(len(ex.workers))) == {{1: 2, 2: 1, 3: 2, 4: 1}[SIZE]}
        COMM.Barrier()


def test_the_rank_that_asked_may_end_first():
    ex = gang(1)
    if RANK == 0:
        ex.shutdown()
    COMM.Barrier()
    assert on_all(raised(ClosedError, lambda: works(ex)) if RANK == 0 else works(ex))
    COMM.Barrier()
    ex.shutdown()
    ex.shutdown()
    COMM.Barrier()
    with gang((1, 2)) as ex:
        assert on_all(works(ex))


def test_each_part_of_a_split_communicator_has_an_executor_of_its_own():
    half = COMM.Split(RANK % 2, -RANK)
    with gang(1, half) as ex:
        pids = COMM.allgather((RANK % 2, ex.submit(k.pid).result()))
        assert len({pid for _, pid in pids}) == len({part for part, _ in pids}) == len(set(pids))
        assert on_all(works(ex))
    half.Free()
    COMM.Barrier()


def test_a_topology_is_a_communicator_as_any_other():
    line = COMM.Create_cart([SIZE])
    with gang(1, line) as ex:
        line.Free()
        assert on_all(works(ex))
    COMM.Barrier()


def test_ranks_that_ask_for_different_things_all_hear_who_differs():
    said = raised(ConfigError, lambda: gang((1, 2), slots=4 if RANK == LAST else 8))
    if SIZE == 1:
        assert not said
    else:
        assert on_all(f"slots is 4 on rank {LAST}" in said or (SIZE == 2 and "slots is 8 on rank 0" in said))
    with gang() as ex:
        assert on_all(works(ex))


@pytest.mark.parametrize("wrong", [{"workers": (3, 2)}, {"spin_us": -1}, {"initializer": 3}])
def test_an_argument_that_is_wrong_on_one_rank_is_an_error_on_all(wrong):
    said = raised((ConfigError, TypeError), lambda: gang(**(wrong if RANK == LAST else {})))
    assert on_all(said and (RANK == LAST or f"rank {LAST}" in said))
    with gang() as ex:
        assert on_all(works(ex))


def test_a_demand_that_is_denied_is_denied_to_all_ranks():
    said = raised(LeaseDenied, lambda: gang(99, lease_timeout_s=0))
    assert on_all("99 workers" in said)


def test_ranks_without_workers_run_their_kernels_themselves():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ex = gang((0, 1), lend="no")
    with ex:
        assert on_all(works(ex) and not ex.workers)
        assert on_all(["run on the rank" in str(one.message) for one in caught] == [True])


# ---- that grow and shrink ---------------------------------------------------------------------------

@pytest.fixture
def common_directory() -> Iterator[Path]:
    # One's own `tmp_path` in each rank is no use, and ranks that clean up at the same time get into each other's way.
    with tempfile.TemporaryDirectory() as mine:
        yield Path(COMM.bcast(mine))
        COMM.Barrier()


def until(condition) -> bool:
    """True once all ranks' conditions hold; False after a minute in which they don't."""
    deadline = time.monotonic() + 60.0
    while not condition():
        if time.monotonic() > deadline:
            return on_all(False)
        time.sleep(0.005)
    return on_all(True)


def test_who_has_too_much_to_do_gets_a_worker_of_its_own_and_gives_it_back(common_directory):
    go = common_directory / "go"
    told: list[int] = []
    with gang((0, 2), idle_s=0.3, slots=2, fallback=False) as ex:
        ex.on_change(lambda workers: told.append(len(workers)))
        begun = COMM.allgather((len(ex.workers), leases()))
        COMM.Barrier()
        # What is left beyond the common worker is another rank's than the one that would replace that.
        busy = RANK == min(1, LAST)
        futures = [ex.submit(k.wait_for, go, n) for n in range(12)] if busy else []
        grown = until(lambda: len(ex.workers) == 1 + busy), COMM.allgather(leases())
        COMM.Barrier()
        go.touch()
        assert on_all([future.result(60) for future in futures] == list(range(12)) * busy and works(ex))
        shrunk = until(lambda: leases() == 1 and len(ex.workers) == 1), until(lambda: told == [2, 1] * busy)
        assert begun == [(1, 1)] * SIZE and grown == (True, [2] * SIZE) and shrunk == (True, True)
        COMM.Barrier()


def test_one_rank_replaces_what_all_have_lost():
    with gang(1, idle_s=60.0) as ex:
        [first] = ex.workers
        COMM.Barrier()
        if RANK == 0:
            ex._crew.lending.session.reclaim()
        assert until(lambda: ex.workers not in ([], [first]) if RANK == 0 else not ex.workers)
        assert on_all(works(ex)) and on_all(leases() == 1)
        COMM.Barrier()


def test_inline_executors_are_collective_as_well():
    with gang(transport="inline") as ex:
        assert on_all(works(ex) and not ex.workers)


def test_what_is_no_communicator_is_refused():
    assert on_all(raised(TypeError, lambda: gang(comm=4711)) and raised(ConfigError, lambda: gang(comm=MPI.COMM_NULL)))


@pytest.mark.mpi(min_size=2)
def test_an_inter_communicator_is_refused():
    half = COMM.Split(min(RANK, 1))
    between = half.Create_intercomm(0, COMM, 1 if RANK == 0 else 0)
    assert on_all("inter-communicator" in raised(ConfigError, lambda: gang(comm=between)))
    between.Free()
    half.Free()


def test_collectives_of_the_application_may_be_under_way():
    mine, total = np.ones(1), np.empty(1)
    request = COMM.Iallreduce(mine, total)
    with gang() as ex:
        request.Wait()
        assert on_all(works(ex)) and total[0] == SIZE
    COMM.Barrier()


# ---- MPI's requests beside ours --------------------------------------------------------------------

NEXT, BEFORE = (RANK + 1) % SIZE, (RANK - 1) % SIZE


class Neighbours:
    """A message to the next rank, one from the rank before, and an invocation."""

    def __init__(self, ex: Executor) -> None:
        self.sent, self.got = np.full(4, float(RANK)), np.zeros(4)
        self.x, self.y = np.full(4, RANK + 0.5), np.zeros(4)
        self.receive = COMM.Irecv(self.got, BEFORE, 7)
        self.call = ex.Iinvoke(k.double, self.x, self.y)
        self.requests = [self.receive, self.call]

    def send(self) -> None:
        self.requests.append(COMM.Isend(self.sent, NEXT, 7))

    @property
    def right(self) -> bool:
        return bool((self.got == BEFORE).all() and (self.y == 2 * RANK + 1).all())


def test_one_wait_is_for_messages_and_invocations():
    with gang() as ex:
        both = Neighbours(ex)
        both.send()
        assert on_all(Waitall(both.requests) and both.right)
        assert on_all(Waitall(both.requests) and Testall(both.requests)), "of what isn't active nothing is awaited"
        assert on_all(Waitany(both.requests) == UNDEFINED and Waitsome(both.requests) is None)
        COMM.Barrier()


def test_one_loop_takes_each_as_it_ends():
    with gang() as ex:
        both = Neighbours(ex)
        both.send()
        ended = [Waitany(both.requests) for _ in range(3)]
        assert on_all(sorted(ended) == [0, 1, 2] and both.right)
        both = Neighbours(ex)
        both.send()
        ended = []
        while (some := Waitsome(both.requests)) is not None:
            ended += some
        assert on_all(sorted(ended) == [0, 1, 2] and both.right)
        COMM.Barrier()


def test_a_message_that_does_not_come_keeps_nobody_from_an_invocation():
    with gang() as ex:
        both = Neighbours(ex)
        first = Waitany(both.requests)
        late = Waitany(both.requests, 0.01), Waitall(both.requests, 0.01), Waitsome(both.requests, 0.01)
        tested = Testall(both.requests), Testany(both.requests), Testsome(both.requests)
        COMM.Barrier()
        both.send()
        assert on_all(Waitall(both.requests) and both.right)
        assert on_all(first == 1 and late == (-1, False, []) and tested == (False, (UNDEFINED, False), []))


def test_an_invocation_that_fails_is_told_once_every_message_has_come():
    with gang() as ex:
        got, sent = np.zeros(1), np.ones(1)
        requests = [ex.Iinvoke(k.fails, np.ones(1), np.ones(1)), COMM.Irecv(got, BEFORE, 8), COMM.Isend(sent, NEXT, 8)]
        said = raised(KernelError, lambda: Waitall(requests))
        again = raised(KernelError, lambda: Waitall(requests))
        assert on_all(said and again and got[0] == 1)
        COMM.Barrier()


def test_persistent_requests_of_both_kinds_are_started_again_and_again():
    with gang() as ex:
        sent, got, x, y = np.zeros(4), np.zeros(4), np.zeros(4), np.zeros(4)
        call = ex.Invoke_init(k.double, x, y)
        messages = [COMM.Send_init(sent, NEXT, 9), COMM.Recv_init(got, BEFORE, 9)]
        right = Waitany([call, *messages]) == UNDEFINED
        for i in range(50):
            sent[:], x[:] = 100 * RANK + i, i
            Startall([messages[0], call, messages[1]])
            right &= Waitall([messages[0], call, messages[1]]) and bool((got == 100 * BEFORE + i).all()
                                                                        and (y == 2 * i).all())
        assert on_all(right)
        for message in messages:
            message.Free()
        COMM.Barrier()


def test_what_is_no_request_is_refused():
    assert on_all(all(raised(TypeError, lambda wait=wait: wait([3])) for wait in (Waitall, Waitany, Testall, Testsome)))

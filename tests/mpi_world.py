"""Ranks of one MPI world, run by test_mpi.py as `mpiexec -n 2 python -m pytest --with-mpi tests/mpi_world.py`.

Each assertion is on what all ranks saw, so that none waits for one that failed.
"""

from __future__ import annotations

import kernels_for_tests as k
import numpy as np
import pytest
from mpi4py import MPI

from rfaas_mpi import Executor, Startall, Waitall

COMM = MPI.COMM_WORLD
pytestmark = pytest.mark.mpi(min_size=2)


def on_all(fact: bool) -> bool:
    return COMM.allreduce(bool(fact), op=MPI.LAND)


def test_each_rank_has_a_worker_of_its_own():
    with Executor(workers=1, cores=(0, 1)) as ex:
        x, y = ex.array(np.arange(1000.0) + COMM.rank), ex.empty(1000)
        ex.Invoke(k.double, x, y)
        pids = COMM.allgather(ex.submit(k.pid).result())
        assert on_all((y == 2 * x).all()) and len(set(pids)) == COMM.size
        COMM.Barrier()


def test_two_ranks_share_one_worker():
    ex = Executor(workers=1, cores=(1,)) if COMM.rank == 0 else None
    grant = COMM.bcast(ex._grant if ex is not None else None)
    if ex is None:
        ex = Executor._join(grant)
    with ex:
        outs = [np.empty(8) for _ in range(50)]
        requests = [ex.Invoke_init(k.double, np.full(8, 1000.0 * COMM.rank + i), out) for i, out in enumerate(outs)]
        for _ in range(20):
            Startall(requests)
            Waitall(requests)
        right = all((out == 2 * (1000.0 * COMM.rank + i)).all() for i, out in enumerate(outs))
        pids = COMM.allgather(ex.submit(k.pid).result())
        assert on_all(right) and len(set(pids)) == 1
        if COMM.rank == 0:
            COMM.Barrier()
    if COMM.rank != 0:
        COMM.Barrier()


def test_collectives_go_on_while_a_worker_computes():
    with Executor(workers=1, cores=(0, 1)) as ex:
        out = np.empty(4)
        request = ex.Iinvoke(k.double, np.full(4, float(COMM.rank)), out)
        total = COMM.allreduce(COMM.rank)
        request.Wait()
        assert on_all(total == sum(range(COMM.size)) and (out == 2.0 * COMM.rank).all())
        COMM.Barrier()

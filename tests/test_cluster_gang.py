"""Ranks of one communicator over a cluster: one demand, leases of several nodes, and nobody special."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster, wait_until
from mpi_launch import World


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """Two agents of two cores each: one is reached on a Unix socket, too."""
    with Cluster(["0-1", "0-1"], sockets=[0]) as cluster:
        yield cluster


@pytest.mark.parametrize(("ranks", "workers"), [(3, 4), (4, 2)])
def test_ranks_share_what_one_demand_gets_on_several_nodes(pair, ranks, workers):
    said = World("mpich").run(ranks, """
        MPI, COMM = comm_world()
        from rfaas_mpi.cluster import ClusterSession
        asked, ask = [], ClusterSession._ask
        ClusterSession._ask = lambda self, demand: asked.append(demand) or ask(self, demand)
        ex = Executor(comm=COMM, workers=int(sys.argv[1]), fallback=False)
        demands = COMM.gather(len(asked))
        pids = COMM.gather({ex.submit(os.getpid).result() for _ in range(64)})
        assert sum(ex.map(k.add, range(100))) == 4950
        COMM.Barrier()
        if COMM.rank == 0:
            say(len(set().union(*pids)), sum(demands))
            ex.shutdown()
        COMM.Barrier()
        if COMM.rank:
            # Who asked has gone.
            say(sum(ex.map(k.add, range(100))))
        COMM.Barrier()
        ex.shutdown()
        """, workers, **pair.environment)
    assert said == sorted([f"{workers} 1", *["4950"] * (ranks - 1)])
    wait_until(lambda: pair.free() == 4 and not pair.leases(), "every core came back")


def test_ranks_grow_beyond_what_they_share_and_give_it_back_each_for_itself(pair, tmp_path):
    said = World("openmpi").run(3, """
        MPI, COMM = comm_world()
        here = Path(sys.argv[1])
        def wait(condition):
            while not condition():
                time.sleep(0.005)
        ex = Executor(comm=COMM, workers=(1, 4), idle_s=0.3, slots=2, fallback=False)
        begun = len(ex.workers)
        futures = [ex.submit(k.wait_for, here / "go", n) for n in range(12)]
        wait(lambda: len(ex.workers) == 2)
        COMM.Barrier()
        (here / "go").touch()
        say(begun, [future.result() for future in futures] == list(range(12)), sum(ex.map(k.add, range(100))))
        wait(lambda: len(ex.workers) == 1)
        COMM.Barrier()
        say(sum(ex.map(k.add, range(100))))
        COMM.Barrier()
        ex.shutdown()
        """, tmp_path, **pair.environment)
    assert said == sorted(["1 True 4950"] * 3 + ["4950"] * 3)
    wait_until(lambda: pair.free() == 4 and not pair.leases(), "every core came back")


def test_an_agent_that_is_killed_is_gone_for_all_ranks_and_no_call_is():
    with Cluster(["0-1", "0-1"]) as cluster:
        said = World("mpich").run(2, """
            MPI, COMM = comm_world()
            ex = Executor(comm=COMM, workers=4, fallback=False)
            futures = [ex.submit(k.add, n) for n in range(200)]
            COMM.Barrier()
            if COMM.rank == 0:
                os.kill(int(sys.argv[1]), signal.SIGKILL)
            say(sum(future.result() for future in futures), sum(ex.map(k.add, range(200))))
            COMM.Barrier()
            ex.shutdown()
            """, cluster.agents[1].pid, **cluster.environment)
        assert said == ["19900 19900"] * 2
        wait_until(lambda: cluster.free() == 2, "what is left came back")

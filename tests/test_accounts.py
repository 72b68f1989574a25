"""What ranks of a cluster used is in its accounts: by kernel, within what clocks say, and whoever is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, wait_until

from rfaas_mpi import Executor, api
from rfaas_mpi.agent.core import Meter
from rfaas_mpi.agent.daemon import Agent
from rfaas_mpi.errors import ServiceLost

METER = {"RFAAS_METER_S": "0.2"}
BURN_S = 4.0
WITHIN = 0.01                        # design: allocation and CPU time within 1 % of the clock on the wall
ENDING_S = 0.1                       # of CPU time, that a worker may need to begin and to end


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """One agent with one core, which tells often what its workers have used."""
    with Cluster(["0"], sockets=[0], **METER) as cluster:
        yield cluster


def executor(cluster: Cluster) -> Executor:
    return Executor(1, manager=cluster.environment["RFAAS_MANAGER"],
                    manager_user=cluster.environment["RFAAS_MANAGER_USER"])


def usage(cluster: Cluster, by: str = "uid") -> list[dict]:
    def answer() -> api.UsageSums | None:
        with contextlib.suppress(ServiceLost):
            return cluster.call("usage", by=by)
        return None
    return list(wait_until(answer, "the manager answers").rows)


def settled(cluster: Cluster) -> dict:
    """The one user's sums, once nothing more comes: an agent that ends has told everything."""
    wait_until(lambda: not cluster.leases(), "nothing is lent")
    assert cluster.agents[0].stop() == 0
    [row] = usage(cluster)
    return row


def gone(pid: int) -> float:
    """When it was."""
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the worker is gone")
    return time.monotonic()


def burn(seconds: float) -> tuple[float, float]:
    """CPU time that the worker had used before and after this much more."""
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        sum(range(1000))
    return begin, time.process_time()


def wait_for(path: str) -> int:
    while not os.path.exists(path):
        time.sleep(0.005)
    return os.getpid()


def test_allocation_and_cpu_time_are_what_the_clocks_say_and_survive_the_manager_s_kill(cluster):
    asked = time.monotonic()
    with executor(cluster) as ex:
        pid = ex.submit(os.getpid).result()
        had = time.monotonic()
        _, cpu_s = ex.submit(burn, BURN_S).result()
        cluster.manager.kill()
        given_back = time.monotonic()
    ended = gone(pid)
    cluster.restart_manager()
    row = settled(cluster)
    assert given_back - had <= row["core_s"] <= (ended - asked) * (1 + WITHIN)
    assert cpu_s <= row["cpu_s"] <= cpu_s * (1 + WITHIN) + ENDING_S
    assert row["workers"] == 1 and row["invocations"] == 2 and row["exec_s"] <= row["core_s"]
    # Whichever way the manager ends, the accounts are the same after it.
    cluster.manager.kill()
    cluster.manager.start()
    assert usage(cluster) == [row]


def test_each_kernel_has_its_name_its_time_and_its_calls(cluster):
    with executor(cluster) as ex:
        for _ in range(3):
            ex.submit(burn, 0.1).result()
        ex.submit(os.getpid).result()
    total = settled(cluster)
    rows = {row["kernel"]: row for row in usage(cluster, "kernel")}
    [burned] = [row for name, row in rows.items() if name.endswith("burn")]
    [pid] = [row for name, row in rows.items() if name.endswith("getpid")]
    assert burned["invocations"] == 3 and pid["invocations"] == 1
    assert 0.3 <= burned["exec_s"] <= total["exec_s"] and burned["cpu_s"] <= total["cpu_s"]
    for name in ("core_s", "cpu_s", "exec_s", "invocations"):
        assert sum(row[name] for row in rows.values()) == pytest.approx(total[name]), name


def test_what_running_workers_have_used_is_told_before_they_end(cluster, tmp_path):
    end = tmp_path / "end"
    with executor(cluster) as ex:
        ex.submit(burn, 0.5).result()
        running = ex.submit(wait_for, str(end))
        [row] = wait_until(lambda: [row for row in usage(cluster) if row["invocations"]], "it is in the accounts")
        assert row["cpu_s"] >= 0.5
        assert cluster.leases() and row["workers"] == 1
        held = row["core_s"]
        wait_until(lambda: usage(cluster)[0]["core_s"] > held, "it goes on being told")
        end.touch()
        running.result()
    assert settled(cluster)["workers"] == 1


def test_an_agent_s_kill_loses_nothing_that_it_has_told(cluster):
    asked = time.monotonic()
    ex = executor(cluster)
    try:
        ex.submit(burn, 0.5).result()
        [told] = wait_until(lambda: [row for row in usage(cluster) if row["invocations"]], "it is in the accounts")
        assert told["cpu_s"] >= 0.5
        cluster.agents[0].kill()
        cluster.agents[0].start()
        wait_until(lambda: not cluster.leases(), "the new agent has said that nothing of it is left")
        wait_until(lambda: cluster.free() == 1, "the core is lent again")
        [row] = usage(cluster)
        assert row["workers"] == 1 and row["cpu_s"] >= told["cpu_s"]
        assert told["core_s"] <= row["core_s"] <= time.monotonic() - asked
        [kernel] = [row for row in usage(cluster, "kernel") if row["kernel"].endswith("burn")]
        assert kernel["invocations"] == 1
    finally:
        ex.shutdown()


def test_a_worker_s_kill_loses_nothing_at_all(cluster):
    with executor(cluster) as ex:
        pid, (_, cpu_s) = ex.submit(os.getpid).result(), ex.submit(burn, 0.3).result()
        os.kill(pid, signal.SIGKILL)
        gone(pid)
        ex.submit(os.getpid).result()
    row = settled(cluster)
    assert row["workers"] == 2 and row["cpu_s"] >= cpu_s and row["invocations"] == 3


def test_an_agent_that_got_another_number_tells_of_a_worker_under_the_one_in_which_its_lease_began():
    agent = Agent.__new__(Agent)
    agent._terms = {7: (1 << 20, 3)}
    told = agent._line(Meter(lease=7, worker=1, session=1, cores=1, held_s=2.0, cpu_s=1.0, exec_ns=0, poll_ns=0,
                             count=0))
    assert (told.incarnation, told.memory_bytes) == (3, 1 << 20)

"""A manager that stands by takes over: ranks and agents find it, what runs runs on, and nothing is granted twice."""

from __future__ import annotations

import signal

import faults
import pytest
from cluster import Cluster, wait_until

from rfaas_mpi import Executor, api


@pytest.mark.timeout(300)
def test_ranks_and_agents_go_on_with_the_manager_that_takes_over(postgres):
    with Cluster(["0", "0"], store=postgres.database()) as cluster:
        cluster.stand_by()
        settings = {"manager": cluster.environment["RFAAS_MANAGER"],
                    "manager_user": cluster.environment["RFAAS_MANAGER_USER"]}
        with Executor(1, fallback=False, **settings) as before:
            assert before.submit(faults.plus_one, 1).result() == 2
            [held] = cluster.leases()
            cluster.manager.kill()
            # Asked in the very moment in which nobody leads.
            with Executor(1, fallback=False, **settings) as after:
                assert after.submit(faults.plus_one, 2).result() == 3
                assert before.submit(faults.plus_one, 3).result() == 4, "the lease that ran runs on"
                leases = {lease.id: lease for lease in cluster.leases()}
                assert len(leases) == 2 and leases[held.id].node == held.node
                assert len({lease.node for lease in leases.values()}) == 2, "no core is lent twice"
        wait_until(lambda: cluster.free() == 2 and not cluster.leases(), "every core came back")
        # The first one comes back, and stands by; the second is frozen, which no connection tells.
        cluster.manager.start()
        wait_until(lambda: cluster.manager.said().count("stands by") == 1, "the first manager stands by")
        cluster.standby.signal(signal.SIGSTOP)
        wait_until(lambda: cluster.manager.said().count("in term") == 2, "the first manager leads")
        cluster.standby.signal(signal.SIGCONT)
        assert cluster.standby.wait() == 1 and "another manager" in cluster.standby.said()
        wait_until(lambda: cluster.free() == 2, "its agents have found it")
        answer = cluster.call("ask", api.AskLease("s", 1, 2, 2))
        assert len({lent.node for lent in answer.leases}) == 2

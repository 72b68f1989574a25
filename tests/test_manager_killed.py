"""`rfaas manager` killed at any moment: what was granted stays granted, once, with the same grant and secret."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from pathlib import Path

from rfaas_manager import RfaasManager

from rfaas_mpi import api
from rfaas_mpi.client import ManagerClient, ManagerRefused
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ServiceLost
from rfaas_mpi.leases import LiveLease
from rfaas_mpi.leases.grants import Admission, AgentKey, GrantBody

KILLS = int(os.environ.get("RFAAS_SOAK_MANAGER_KILLS", "3"))
GRANTS_BETWEEN = 12
CORES = 4
RANKS = 6
GUARD_S = 60.0


class Agent:
    """Believes grants as a real agent does, and reports; nothing runs."""

    def __init__(self, cluster: Cluster, node: str) -> None:
        self.cluster, self.node, self.key = cluster, node, AgentKey()
        self.start = api.StartAgent(node, secrets.token_hex(8), "boot", self.key.public, (f"tcp://{node}:1",), node)
        self.begun: dict[int, GrantBody] = {}
        self._lock = threading.Lock()
        self.admitted = cluster.call("start_agent", self.start)
        self.admission = Admission(self.admitted.node, "boot", self.admitted.incarnation, self.admitted.keys)

    def begin(self, lent: api.LentLease) -> None:
        """Its rank shows the grant; GrantRefused where a core would be lent twice."""
        with self._lock:
            in_use = {core for body in self.begun.values() for core in body.cores}
            body = self.admission.admit(lent.grant, time.monotonic_ns(), range(CORES), in_use)
            assert self.key.open(body.sealed, lent.id, lent.epoch) == lent.secret
            self.begun[lent.id] = body

    def report(self) -> None:
        with self._lock:                     # clocks rise from one report to the next
            live = tuple(LiveLease(body.lease, body.epoch, body.workers) for body in self.begun.values())
            orders = self.cluster.call("report", api.Report(
                self.admitted.incarnation, time.monotonic_ns(), tuple(range(CORES)), 1 << 33, live), node=self.node)
            assert not orders.superseded and not orders.register
            for order in orders.stop:
                self.begun.pop(order.lease_id, None)


class Cluster:
    """A manager that is killed, agents, and ranks that take and give back leases."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.client = ManagerClient(Settings.load({}, manager=f"unix:{directory}/manager.sock",
                                                  manager_user=str(os.geteuid())))
        self.grown = threading.Condition()
        self.granted = 0
        self.ended = False
        self.failures: list[BaseException] = []

    def call(self, name: str, body: object = None, **parameters: object) -> object:
        """As long as it takes: the manager may be dead, or just have started."""
        deadline = time.monotonic() + GUARD_S
        while True:
            try:
                return self.client.call(name, body, **parameters)
            except ServiceLost:
                assert time.monotonic() < deadline, "the manager does not come back"
                with self.grown:
                    self.grown.wait(0.02)
            except ManagerRefused as problem:
                if problem.status != 503:
                    raise

    def rank(self, number: int, agents: dict[str, Agent]) -> None:
        request = 0
        while not self.ended:
            request += 1
            ask = api.AskLease(f"rank {number}", request, 1, 2, timeout_s=GUARD_S)
            granted = self.call("ask", ask)
            again = self.call("ask", ask)
            assert [(one.id, one.epoch, one.secret, one.workers) for one in granted.leases] == [
                (one.id, one.epoch, one.secret, one.workers) for one in again.leases]
            for lent in granted.leases:
                agents[lent.node].begin(lent)
                agents[lent.node].report()
                self.call("release", lease=lent.id)
                agents[lent.node].report()       # hears that it has to stop
                agents[lent.node].report()       # says that it has
            with self.grown:
                self.granted += len(granted.leases)
                self.grown.notify_all()

    def run(self, what, *arguments: object) -> None:
        try:
            what(*arguments)
        except BaseException as error:
            self.failures.append(error)
            with self.grown:
                self.ended = True
                self.grown.notify_all()

    def until(self, granted: int) -> None:
        with self.grown:
            assert self.grown.wait_for(lambda: self.ended or self.granted >= granted, GUARD_S), "nothing is granted"


def test_killed_at_any_moment_it_forgets_no_grant_and_repeats_none(tmp_path):
    cluster = Cluster(tmp_path / "state")
    manager = RfaasManager(tmp_path / "state").__enter__()
    threads = []
    try:
        agents = {node: Agent(cluster, node) for node in ("nid1", "nid2")}
        for agent in agents.values():
            agent.report()
        threads = [threading.Thread(target=cluster.run, args=(cluster.rank, number, agents)) for number in range(RANKS)]
        for thread in threads:
            thread.start()
        for kill in range(1, KILLS + 1):
            cluster.until(kill * GRANTS_BETWEEN)
            manager.stop(signal.SIGKILL)
            manager = RfaasManager(tmp_path / "state").__enter__()
            for agent in agents.values():
                agent.report()
        cluster.until((KILLS + 1) * GRANTS_BETWEEN)
    finally:
        cluster.ended = True
        for thread in threads:
            thread.join(GUARD_S)
        left = cluster.call("leases").leases if not cluster.failures else ()
        cluster.client.close()
        manager.stop()
    assert not cluster.failures, cluster.failures[0]
    assert cluster.granted >= (KILLS + 1) * GRANTS_BETWEEN
    assert left == (), "a lease that was given back and ended is still there"

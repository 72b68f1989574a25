"""Workers come near their rank: its node, its switch, its NUMA node, by what agents and ranks say of themselves.

Through a real manager, with agents that are played and with real ones, each on a host with a name of its own.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
from cluster import Cluster, finished, tell
from managed import Managed
from mpi_launch import PRELUDE, World

from rfaas_mpi import api
from rfaas_mpi.client import ManagerClient, here
from rfaas_mpi.config import Settings
from rfaas_mpi.leases.grants import AgentKey

GIB = 1 << 30
TREE = {"node0": "west,top", "node1": "west,top", "node2": "east,top", "node3": "east,top"}
_ids = itertools.count(1)


# --- agents that are played ---------------------------------------------------------------------

class Played:
    """Four nodes with two cores each below two leaf switches; their hosts have names of their own."""

    def __init__(self, client: ManagerClient) -> None:
        self.call = client.call
        for number, (node, switches) in enumerate(TREE.items()):
            start = api.StartAgent(node=node, agent=f"{node}-played", boot_id="boot", key=AgentKey().public,
                                   addresses=(f"tcp://{node}:1",), host=f"host{number}")
            incarnation = self.call("start_agent", start).incarnation
            self.call("report", api.Report(
                incarnation=incarnation, clock_ns=next(_ids), spare=(0, 1), memory_bytes=8 * GIB, live=(),
                numa={0: 0, 1: 1}, traits=api.Traits(switches=tuple(switches.split(",")))), node=node)

    def ask(self, place: api.Place | None, workers: int = 1,
            others: tuple[api.Place, ...] = ()) -> list[tuple[str, tuple[int, ...]]]:
        """Where they are lent: node and cores of each."""
        found = self.call("ask", api.AskLease(session="locality", request_id=next(_ids), workers_min=workers,
                                              workers_max=workers, place=place, others=others)).leases
        for lease in found:
            self.call("release", lease=lease.id)
        return sorted((lease.node, worker.cores) for lease in found for worker in lease.workers)


@pytest.fixture
def played(tmp_path) -> Iterator[Played]:
    with Managed(tmp_path) as manager, ManagerClient(
            Settings.load(manager=manager.address, manager_user=str(os.geteuid()))) as client:
        yield Played(client)


@pytest.mark.parametrize("number", range(4))
def test_a_worker_comes_to_its_rank_s_node(played, number):
    assert [node for node, _ in played.ask(api.Place(node=f"host{number}"))] == [f"node{number}"]
    assert [node for node, _ in played.ask(api.Place(node=f"node{number}"))] == [f"node{number}"], "as people call it"


@pytest.mark.parametrize("leaf", ["west", "east"])
def test_what_the_rank_s_node_has_not_got_comes_from_below_its_switch(played, leaf):
    near = [node for node, switches in TREE.items() if switches.startswith(leaf)]
    found = played.ask(api.Place(node="login", switches=(leaf, "top")), 4)
    assert [node for node, _ in found] == [near[0], near[0], near[1], near[1]]


@pytest.mark.parametrize("numa", [0, 1])
def test_a_worker_comes_to_its_rank_s_numa_node(played, numa):
    assert played.ask(api.Place(node="host2", numa=numa)) == [("node2", (numa,))]


@pytest.mark.parametrize(("counts", "chosen"), [((1, 0, 0, 1), [0, 3]), ((1, 1, 0, 0), [0, 1]), ((0, 1, 2, 2), [2, 3])])
def test_workers_come_to_all_nodes_of_a_communicator(played, counts, chosen):
    first, *others = (api.Place(node=f"host{number}", ranks=count) for number, count in enumerate(counts) if count)
    assert [node for node, _ in played.ask(first, 2, tuple(others))] == [f"node{number}" for number in chosen]


def test_ranks_of_several_nodes_that_lend_nothing_count_by_their_switches(played):
    places = [api.Place(node=f"login{number}", switches=(leaf, "top"), ranks=count)
              for number, (leaf, count) in enumerate((("west", 1), ("east", 3)))]
    east = [node for node, switches in TREE.items() if switches.startswith("east")]
    assert sorted({node for node, _ in played.ask(places[0], 4, (places[1],))}) == east


def test_a_rank_says_which_switches_are_above_it():
    assert here(switches=("leaf", "top")) == api.Place(node=socket.gethostname(), numa=here().numa,
                                                       switches=("leaf", "top"))


# --- real ones ----------------------------------------------------------------------------------

class Host:
    """A host's name, and what its configuration says, for whatever is started there."""

    address = "127.0.0.1"

    def __init__(self, name: str, switches: str) -> None:
        self.name, self.switches = name, switches

    def command(self, words: Sequence[object]) -> list[str]:
        return ["unshare", "--uts", "--", "sh", "-c", 'hostname "$0" && exec "$@"', self.name,
                "env", f"RFAAS_SWITCHES={self.switches}", *map(str, words)]


class Hosts:
    """One for each agent; ranks run on `rank`."""

    def __init__(self) -> None:
        self.agents = [Host(f"host{number}", switches) for number, switches in enumerate(TREE.values())]
        self.rank = self.agents[0]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    made = subprocess.run(["unshare", "--uts", "true"], capture_output=True, text=True)
    if os.geteuid() != 0 or made.returncode != 0:
        pytest.skip(f"only root gives hosts other names: {made.stderr.strip()}")
    with Cluster([str(number % min(2, os.cpu_count())) for number in range(4)], star=Hosts()) as cluster:
        yield cluster


RANK = """
    with Executor(1, fallback=False) as ex:
        assert ex.submit(faults.plus_one, 1).result() == 2
        say("up")
        sys.stdin.readline()
"""


def where(cluster: Cluster, rank: Host) -> str:
    """The node of the worker that a rank on this host has got."""
    cluster.star.rank = rank
    with cluster.running(RANK) as process:
        assert process.stdout.readline() == "up\n", process.stderr.read()
        (lease,) = cluster.leases()
        tell(process, "end")
        finished(process)
    return lease.node


def test_of_four_agents_the_one_on_the_rank_s_node_is_chosen(hosts):
    for number in (2, 0, 3):
        assert where(hosts, hosts.star.agents[number]) == f"node{number}"


def test_of_four_agents_one_below_the_rank_s_switch_is_chosen_where_its_node_lends_nothing(hosts):
    assert where(hosts, Host("login", "east,top")) in ("node2", "node3")
    assert where(hosts, Host("login", "west,top")) in ("node0", "node1")


# Each rank is on a host of its own: the one that its number among the arguments says.
APART = """number=$(eval "echo \\${$((PMI_RANK + 1))}") && shift 2
exec unshare --uts -- sh -c 'hostname "$0" && exec "$@"' "host$number" "$@" """
RANKS = PRELUDE + """
MPI, COMM = comm_world()
with Executor(comm=COMM, workers=2, fallback=False) as ex:
    assert ex.submit(k.add, 1, 1).result() == 2
    say(socket.gethostname(), *sorted(lease.host for lease in ex._crew.lending.grant.leases))
    COMM.Barrier()
"""


@pytest.mark.parametrize("apart", [(1, 3), (2, 0)])
def test_each_rank_of_a_communicator_finds_a_worker_on_its_own_host(hosts, apart):
    done = World("mpich").launch(2, ["sh", "-c", APART, "-", *apart, sys.executable, "-c", "import socket\n" + RANKS],
                                 **hosts.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(f"host{number} host{number}" for number in apart)

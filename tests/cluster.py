"""A cluster to test on: a real `rfaas manager`, real `rfaas agent`s, and ranks, everything ended by close().

    on loopback                              on a star of network namespaces (root)
    ranks ──Unix, 127.0.0.1──▶ agents        rank node ──198.51.100.0/30──▶ agent's node 0
      └──── Unix socket ────▶ manager            ├──────198.51.100.4/30──▶ agent's node 1 …

The manager and each agent are processes of their own. Namespaces share the file
system, and so the manager's Unix socket. Agents are told which cores they lend;
several may be told the same one, and then their workers share it: what is tested
here is who gets what and what becomes of it, not how fast it is.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import faults
import netns
from netns import Node

from rfaas_mpi.api import LentLease
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ServiceLost
from rfaas_mpi.leases import Lease, NodeView

SLOW = float(os.environ.get("RFAAS_TEST_SLOW", "1"))  # how many times slower this machine is than it might be
GUARD_S = 60.0 * SLOW
ENDS_S = 20.0 * SLOW                 # a daemon that is told to end may need so long
# A dead network is noticed soon, so that nobody waits for it here.
IMPATIENT = {"RFAAS_TCP_IDLE_S": "1", "RFAAS_TCP_PROBE_S": "1", "RFAAS_TCP_PROBES": "2", "RFAAS_TCP_TIMEOUT_S": "2"}


def wait_until(condition: Callable[[], object], what: str, guard_s: float = GUARD_S) -> object:
    """The condition's first true value."""
    deadline, pause = time.monotonic() + guard_s, 0.001
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not so after {guard_s:g} s: {what}"
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    return value


class Star:
    """A node for ranks and one for each agent, with a link of its own to each; close() ends what runs on them."""

    def __init__(self, agents: int) -> None:
        self.rank = Node("")
        self.agents: list[Node] = []
        try:
            netns.ip("link", "set", "lo", "up", node=self.rank)
            for number in range(agents):
                # A network of documentation (RFC 5737): nobody's real one is hidden.
                node = Node(f"198.51.100.{4 * number + 1}")
                self.agents.append(node)
                netns.ip("link", "add", f"to{number}", "netns", self.rank.pid, "type", "veth",
                         "peer", "name", "rank0", "netns", node.pid)
                for where, device, last in ((node, "rank0", 1), (self.rank, f"to{number}", 2)):
                    netns.ip("address", "add", f"198.51.100.{4 * number + last}/30", "dev", device, node=where)
                netns.ip("link", "set", "lo", "up", node=node)
                self.link(number, "up")
        except BaseException:
            self.close()
            raise

    def link(self, agent: int, state: str) -> None:
        """Takes one agent's link "up" or "down", as when its cable is pulled."""
        netns.ip("link", "set", f"to{agent}", state, node=self.rank)
        netns.ip("link", "set", "rank0", state, node=self.agents[agent])

    def lose(self, agent: int) -> None:
        """Has every packet of a link get lost, while both ends see it up: each sends to a device that is not there."""
        for node, device, last in ((self.rank, f"to{agent}", 1), (self.agents[agent], "rank0", 2)):
            netns.ip("neighbour", "replace", f"198.51.100.{4 * agent + last}", "lladdr", "02:00:00:00:00:99",
                     "nud", "permanent", "dev", device, node=node)

    def heal(self) -> None:
        """Every link is whole again."""
        for number, node in enumerate(self.agents):
            for where, device in ((self.rank, f"to{number}"), (node, "rank0")):
                netns.ip("neighbour", "flush", "dev", device, "nud", "permanent", node=where)
            self.link(number, "up")

    def close(self) -> None:
        """Safe to call twice."""
        for node in (self.rank, *self.agents):
            node.close()


class Daemon:
    """A process of the cluster, perhaps on a node of its own; what it says is kept in a file."""

    def __init__(self, log: Path, words: Sequence[object], node: Node | None = None, **changes: str) -> None:
        self.log = log
        # Tests that are killed close nothing: it ends with them.
        self.command = ["setpriv", "--pdeathsig", "TERM", "--", sys.executable, "-m", "rfaas_mpi.cli",
                        *map(str, words)]
        self._node = node
        # Where one hangs, SIGABRT has it say where.
        self._environment = faults.environment(PYTHONFAULTHANDLER="1", **changes)
        self._process: subprocess.Popen[bytes] | None = None

    def changes(self, **changes: str) -> None:
        """Of its environment, from its next start on."""
        self._environment.update(changes)

    def start(self) -> None:
        assert self._process is None, "it runs already"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command if self._node is None else self._node.command(self.command), env=self._environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"it does not run: {self.said()}"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def ended(self) -> bool:
        """It was told to end, or was never started."""
        return self._process is None

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; gone when it returns."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """SIGTERM; its exit status, once it is gone."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Its exit status, once it has ended; it must be about to."""
        assert self._process is not None
        try:
            return self._process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)
            self._process.wait()
            raise AssertionError(f"it did not end when it was told to:\n{self.said()}") from None
        finally:
            self._process = None

    def close(self) -> None:
        """Ends it. Safe to call twice."""
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self.stop()


class Cluster:
    """A manager and agents `node0`, `node1`, …; `cores[n]` are those that agent n lends.

    `star`: agent n runs on its node n, and ranks on its node for ranks. The agents in
    `sockets` listen on a Unix socket, too, where ranks reach them by shared memory. With a
    `store` (the URL of a PostgreSQL database) there is a second manager, `standby`, whom
    ranks and agents know; `stand_by` starts it.
    """

    def __init__(self, cores: Sequence[str], *, star: Star | None = None, sockets: Collection[int] = (),
                 store: str = "", **changes: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rfaas-t-"))
        self.socket = self.directory / "manager.sock"
        self.star = star
        managers = f"unix:{self.socket}" + (f",unix:{self.directory}/standby.sock" if store else "")
        self.environment = {"RFAAS_MANAGER": managers, "RFAAS_MANAGER_USER": str(os.geteuid()), **changes}
        self.names = [f"node{number}" for number in range(len(cores))]
        self.manager = Daemon(self.directory / "manager.log", [
            "manager", "--directory", self.directory / "manager", "--socket", self.socket,
            *(["--store", store] if store else [])], **changes)
        self.standby = Daemon(self.directory / "standby.log", [
            "manager", "--directory", self.directory / "standby", "--socket", self.directory / "standby.sock",
            "--store", store], **changes)
        self.agents = []
        for number, (name, lent) in enumerate(zip(self.names, cores, strict=True)):
            node = None if star is None else star.agents[number]
            words = ["agent", "--manager", managers, "--node", name, "--cores", lent,
                     "--directory", self.directory / name,
                     "--listen", f"{'127.0.0.1' if node is None else node.address}:0"]
            if number not in sockets:
                words += ["--socket", "none"]
            # Their own: nodes are other machines, and don't lock each other's cores.
            self.agents.append(Daemon(self.directory / f"{name}.log", words, node, **{
                "RFAAS_RUNTIME_DIR": str(self.directory / name), **self.environment}))

    def start(self) -> Cluster:
        """Returns when all agents' cores can be had."""
        try:
            self.manager.start()
            for agent in self.agents:
                agent.start()
            wait_until(lambda: sum(bool(view.free) for view in self.nodes()) == len(self.agents) or self._check(),
                       "all agents have reported")
        except BaseException:
            self.close()
            raise
        return self

    def stand_by(self) -> None:
        """Starts the second manager, with the first one's keys; returns when it stands by."""
        (self.directory / "standby").mkdir(mode=0o700, exist_ok=True)
        for key in ("secret.key", "grant.key"):
            shutil.copy(self.directory / "manager" / key, self.directory / "standby" / key)
        self.standby.start()
        wait_until(lambda: "stands by" in self.standby.said(), "the second manager stands by")

    def restart_manager(self) -> None:
        """Starts it again; returns when it has heard of all agents that live."""
        self.manager.start()
        wait_until(lambda: sum(not view.silent for view in self.nodes()) == sum(agent.alive for agent in self.agents),
                   "it has heard of all agents")

    def _check(self) -> None:
        for daemon in (self.manager, *self.agents):
            assert daemon.alive, f"{daemon.log.name} ended:\n{daemon.said()}"

    # ---- what it looks like --------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """As a rank's."""
        return Settings.load({**os.environ, **self.environment})

    def call(self, name: str, *arguments: object, **parameters: object) -> object:
        """Asks the manager, as this user."""
        with ManagerClient(self.settings) as client:
            return client.call(name, *arguments, **parameters)

    def nodes(self) -> tuple[NodeView, ...]:
        """The nodes that the manager knows; none while it can't be asked."""
        with contextlib.suppress(ServiceLost):
            return self.call("nodes").nodes
        return ()

    def free(self) -> int:
        """Cores that could be lent now."""
        return sum(len(view.free) for view in self.nodes())

    def leases(self) -> tuple[Lease, ...]:
        """Live leases."""
        return self.call("leases").leases

    def waiting(self) -> int:
        """Demands that wait for cores, by the manager's figures."""
        with socket.socket(socket.AF_UNIX) as connection, contextlib.closing(http.client.HTTPConnection("m")) as http_:
            connection.connect(str(self.socket))
            http_.sock = connection
            http_.request("GET", "/metrics")
            figures = dict(line.rsplit(" ", 1) for line in http_.getresponse().read().decode().splitlines()
                           if not line.startswith("#"))
        return int(float(figures["rfaas_manager_demands_waiting"]))

    def agent_of(self, lease: Lease | LentLease) -> Daemon:
        return self.agents[self.names.index(lease.node.partition("/")[0])]

    def workers_of(self, agent: int) -> list[int]:
        """Processes that an agent started and that are left: pids."""
        return descendants(self.agents[agent].pid)

    # ---- ranks -----------------------------------------------------------------------------------------

    def command(self, body: str, *arguments: object) -> list[str]:
        words = faults.command(body, *arguments)
        return words if self.star is None else self.star.rank.command(words)

    @contextlib.contextmanager
    def running(self, body: str, *arguments: object, **changes: str) -> Iterator[subprocess.Popen[str]]:
        """A rank that runs a script; killed in the end if it has not ended."""
        process = subprocess.Popen(self.command(body, *arguments),
                                   env=faults.environment(**self.environment, **changes), stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def run(self, body: str, *arguments: object, **changes: str) -> str:
        """The same to its end; what it said."""
        with self.running(body, *arguments, **changes) as process:
            return finished(process)

    # ---- the end -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends everything. Safe to call twice."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(self.manager.close)
            stack.callback(self.standby.close)
            for agent in self.agents:
                stack.callback(agent.close)

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


def descendants(pid: int) -> list[int]:
    """Living processes that a process started, and that these did."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return sorted(found)


def children(pid: int) -> list[int]:
    """Those of them that it started itself."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if faults.parent_of(child) == pid:
                found.append(child)
    return found


def finished(process: subprocess.Popen[str]) -> str:
    """What it said, once it has ended well."""
    out, err = process.communicate(timeout=100 * SLOW)
    assert process.returncode == 0, out + err
    return out


def tell(process: subprocess.Popen[str], word: str) -> None:
    """A line on its stdin."""
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()

"""Two nodes on one machine: network namespaces with a veth pair between them, and everything in them ended in the end.

Each namespace belongs to a process that waits for the end of its stdin: when
the tests end, however, both go, and the pair of devices with them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

TOOLS = ("unshare", "nsenter", "ip")
PREFIX = 30


def why_not() -> str:
    """Why there can't be two nodes here; empty if there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"there is no {missing[0]}: apt-get install util-linux iproute2"
    if os.geteuid() != 0:
        return "only root makes network namespaces here"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return "" if made.returncode == 0 else f"unshare --net: {made.stderr.strip()}"


class Node:
    """One network namespace."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._owner = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        mine, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 30
        while os.readlink(f"/proc/{self._owner.pid}/ns/net") == mine:
            assert time.monotonic() < deadline, "unshare made no namespace"
            time.sleep(0.001)
        self.namespace = os.readlink(f"/proc/{self._owner.pid}/ns/net")

    @property
    def pid(self) -> int:
        """The process whose namespace it is."""
        return self._owner.pid

    def command(self, command: Sequence[object]) -> list[str]:
        """The same command, in this node."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *map(str, command)]

    def run(self, *command: object, timeout: float = 100, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs it in this node to its end."""
        return subprocess.run(self.command(command), env={**os.environ, **changes}, capture_output=True, text=True,
                              timeout=timeout, stdin=subprocess.DEVNULL, check=False)

    def processes(self) -> list[int]:
        """Everything that runs here, but for the process that the node belongs to."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.pid:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                    if os.readlink(entry / "ns" / "net") == self.namespace:
                        found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Ends everything that runs here, and the node. Safe to call twice."""
        if self._owner.poll() is None:
            deadline = time.monotonic() + 30
            while left := self.processes():
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                assert time.monotonic() < deadline, f"can't end {left}"
                time.sleep(0.002)
        self._owner.stdin.close()
        self._owner.wait()


class TwoNodes:
    """`agent` and `rank`, joined by a link that can be taken down."""

    def __init__(self) -> None:
        # A network of documentation (RFC 5737): nobody's real one is hidden.
        self.agent, self.rank = Node("192.0.2.1"), Node("192.0.2.2")
        try:
            ip("link", "add", "rfaas0", "netns", self.agent.pid, "type", "veth",
               "peer", "name", "rfaas0", "netns", self.rank.pid)
            for node in (self.agent, self.rank):
                ip("address", "add", f"{node.address}/{PREFIX}", "dev", "rfaas0", node=node)
                ip("link", "set", "lo", "up", node=node)
            self.link("up")
        except BaseException:
            self.close()
            raise

    def link(self, state: str) -> None:
        """Takes the link "up" or "down", as when its cable is pulled."""
        ip("link", "set", "rfaas0", state, node=self.agent)
        ip("link", "set", "rfaas0", state, node=self.rank)

    def lose(self, everything: bool) -> None:
        """Has every packet get lost, while both ends see the link up: each sends to a device that is not there."""
        for node in (self.agent, self.rank):
            address = self.other(node).address
            if everything:
                ip("neighbour", "replace", address, "lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", "rfaas0",
                   node=node)
            else:
                ip("neighbour", "del", address, "dev", "rfaas0", node=node)

    def other(self, node: Node) -> Node:
        return self.rank if node is self.agent else self.agent

    def close(self) -> None:
        """Safe to call twice."""
        for node in (self.rank, self.agent):
            node.close()


def ip(*words: object, node: Node | None = None) -> None:
    command = ["ip", *map(str, words)]
    done = subprocess.run(command if node is None else node.command(command), capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodes]:
    if reason := why_not():
        pytest.skip(reason)
    nodes = TwoNodes()
    try:
        yield nodes
    finally:
        nodes.close()

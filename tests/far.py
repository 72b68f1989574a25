"""A service on one node and a rank on another: what tests of two nodes share, whatever joins the nodes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import faults

from rfaas_mpi.config import Settings
from rfaas_mpi.session import Session

# A guest is emulated, and some fifteen times slower.
GUARD_S = 300 if "RFAAS_GUEST_NODES" in os.environ else 100


class Node(Protocol):
    """Where processes run."""

    address: str

    def command(self, command: Sequence[object]) -> list[str]:
        """The same command, in this node."""

    def run(self, *command: object, timeout: float = GUARD_S, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs it in this node to its end."""


class Nodes(Protocol):
    """Two nodes that reach each other: the service's, and the rank's."""

    agent: Node
    rank: Node


@dataclass
class Far:
    """The service on the agent's node, and how a rank on the other one uses it."""

    nodes: Nodes
    home: Settings
    pid: int
    environment: dict[str, str]

    def status(self) -> dict[str, Any]:
        """As its own node sees it: that way is never cut."""
        with Session.open(self.home, start=False, observer=True) as session:
            return session.status()

    def worker(self) -> int:
        """The pid of its worker, 0 if it has none now."""
        return next((worker["pid"] for worker in self.status()["workers"] if worker["state"] == "serving"), 0)

    @contextlib.contextmanager
    def running(self, body: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """A rank on the other node that runs a script."""
        process = subprocess.Popen(self.nodes.rank.command(faults.command(textwrap.dedent(body), *arguments)),
                                   env=faults.environment(**self.environment), stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def run(self, body: str, *arguments: object) -> str:
        """The same to its end; what it said."""
        with self.running(body, *arguments) as process:
            return finished(process)


def finished(process: subprocess.Popen[str]) -> str:
    """What it said, once it has ended well."""
    out, err = process.communicate(timeout=GUARD_S)
    assert process.returncode == 0, out + err
    return out


def tell(process: subprocess.Popen[str], word: str) -> None:
    """A line on its stdin."""
    process.stdin.write(word + "\n")
    process.stdin.flush()


@contextlib.contextmanager
def serving(nodes: Nodes, **changes: str) -> Iterator[Far]:
    """A service of one core on the agent's node that listens on TCP, ended in the end."""
    with tempfile.TemporaryDirectory(prefix="rfaas-t-") as directory:
        there = {"RFAAS_RUNTIME_DIR": directory, "RFAAS_CORES": "1", **changes}
        started = nodes.agent.run(sys.executable, "-m", "rfaas_mpi.cli", "up", "--json", "--listen",
                                  f"{nodes.agent.address}:0", **there)
        assert started.returncode == 0, started.stderr
        said = json.loads(started.stdout)
        here = {"RFAAS_RUNTIME_DIR": directory + "-rank", "RFAAS_SERVICE": said["listen"][0],
                "RFAAS_KEY_FILE": said["key_file"], **changes}
        far = Far(nodes, Settings.load(runtime_dir=directory), said["pid"], here)
        try:
            yield far
        finally:
            if faults.alive(said["pid"]):
                with Session.open(far.home, start=False, observer=True) as session:
                    session.down()

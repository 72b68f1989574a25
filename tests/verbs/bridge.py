"""The guest's two devices as two nodes: who uses which, and what may happen to the wire between them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from verbs import support

# How long anything may take in the guest, which is emulated, on a machine that is busy with other things.
PATIENT = {"RFAAS_START_TIMEOUT_S": "100"}


class Node:
    """One device and the address of its interface. Processes of both nodes run side by side."""

    def __init__(self, number: int, device: support.Node) -> None:
        assert device.address is not None, f"{device.device} has no IPv4 address"
        self.interface = f"node{number}"
        self.port = f"port{number}"
        self.device = device.device
        self.address = device.address

    def command(self, command: Sequence[object]) -> list[str]:
        """The command itself."""
        return [*map(str, command)]

    def run(self, *command: object, timeout: float = 300, **changes: str) -> subprocess.CompletedProcess[str]:
        """Runs it with this node's device to its end."""
        return subprocess.run(self.command(command), env={**os.environ, "RFAAS_DEVICE": self.device, **changes},
                              capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False)

    def sent(self) -> int:
        """Packets that left by its interface."""
        return int(Path(f"/sys/class/net/{self.interface}/statistics/tx_packets").read_text())

    def state(self) -> str:
        """What its device says of its port, like `4: ACTIVE`."""
        return Path(f"/sys/class/infiniband/{self.device}/ports/1/state").read_text().strip()


class TwoDevices:
    """`rank` on the first device, `agent` on the second, joined by a bridge."""

    def __init__(self, nodes: Sequence[support.Node]) -> None:
        self.rank, self.agent = (Node(number, device) for number, device in enumerate(nodes))

    @contextlib.contextmanager
    def packets_lost(self) -> Iterator[None]:
        """What either node sends gets lost, while both ports stay up."""
        ip("link", "set", "wire", "down")
        try:
            yield
        finally:
            ip("link", "set", "wire", "up")

    @contextlib.contextmanager
    def unplugged(self, node: Node) -> Iterator[None]:
        """The cable at this node's device is pulled, so that its port goes down."""
        ip("link", "set", node.port, "down")
        try:
            support.wait_until(lambda: "DOWN" in node.state(), f"the port of {node.device} goes down")
            yield
        finally:
            ip("link", "set", node.port, "up")
            support.wait_until(lambda: "ACTIVE" in node.state(), f"the port of {node.device} comes up")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"

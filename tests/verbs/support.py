"""Facts about verbs devices, and small things that tests of them share."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

DEVICES = Path("/sys/class/infiniband")
DEBIAN_PACKAGES = Path("/usr/lib/python3/dist-packages")


@dataclasses.dataclass(frozen=True)
class Node:
    """An active port of a verbs device, and the GID to reach it by."""

    device: str
    port: int
    gid_index: int
    gid: str
    address: str | None  # where the GID was made from an IPv4 address


def active_nodes() -> list[Node]:
    """One node for each device with an active port; [] without RDMA."""
    nodes = []
    for device in sorted(DEVICES.iterdir()) if DEVICES.is_dir() else []:
        for port in sorted((device / "ports").iterdir(), key=lambda path: int(path.name)):
            if "ACTIVE" in (port / "state").read_text():
                index, gid = _best_gid(port)
                mapped = ipaddress.IPv6Address(gid).ipv4_mapped
                nodes.append(Node(device.name, int(port.name), index, gid, str(mapped) if mapped else None))
                break
    return nodes


def _best_gid(port: Path) -> tuple[int, str]:
    """The RoCE v2 GID of an IPv4 address, else the first."""
    for entry in sorted((port / "gids").iterdir(), key=lambda path: int(path.name)):
        try:
            kind = (port / "gid_attrs" / "types" / entry.name).read_text().strip()
        except OSError:  # an unused entry has no type
            continue
        gid = entry.read_text().strip()
        if kind == "RoCE v2" and ipaddress.IPv6Address(gid).ipv4_mapped:
            return int(entry.name), gid
    return 0, (port / "gids" / "0").read_text().strip()


def wait_until(condition: Callable[[], object], what: str, guard_s: float = 100.0) -> None:
    """Returns once the condition is true; AssertionError with `what` after the hang guard."""
    deadline = time.monotonic() + guard_s
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {guard_s:g} s: {what}"
        time.sleep(0.01)


def listens(port: int) -> bool:
    """Whether somebody on this machine listens on a TCP port."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def pyverbs(directory: Path) -> tuple[str, dict[str, str]]:
    """(interpreter, environment) of a process that can import Debian's pyverbs.

    This interpreter where the binary interface is the same, with a link in
    `directory`: all of Debian's packages on its path would hide its own.
    """
    package = DEBIAN_PACKAGES / "pyverbs"
    assert package.is_dir(), "no pyverbs; as root: apt-get install python3-pyverbs"
    if not list(package.glob(f"device*{sysconfig.get_config_var('EXT_SUFFIX')}")):
        return "/usr/bin/python3", dict(os.environ)
    link = directory / "pyverbs"
    if not link.is_symlink():
        link.symlink_to(package)
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    return sys.executable, {**os.environ, "PYTHONPATH": path}

"""Virtual nodes of a cluster: a host name, a network, processes and files that are temporary of their own (root).

    head  ── bridge ──┬── n1   eth0 203.0.113.1
    (network only)    └── n2   eth0 203.0.113.2 …

What runs on one node sees neither processes nor memory of another, and reaches it over its link, which can be pulled.
Everything on a node ends with it, and it ends with the tests, however they end. Kernel, cores and all files but those of
/tmp, /run and /dev/shm are this machine's; the root of each hierarchy of control groups (version 1) is one below it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import netns

GUARD_S = 30.0
REPOSITORY = Path(__file__).resolve().parent.parent
# A network of documentation (RFC 5737): nobody's real one is hidden.
NETWORK, PREFIX = "203.0.113", 24
CGROUPS = Path("/sys/fs/cgroup")


def why_not() -> str:
    """Why there can be none here; empty if they can."""
    return netns.why_not()


def _below(top: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of them that lie there, without those within others."""
    found: list[Path] = []
    for path in sorted({path.resolve() for path in paths}):
        if path.is_relative_to(top) and not any(path.is_relative_to(each) for each in found):
            found.append(path)
    return found


class VirtualNode:
    """One of them; `shared` are directories that all see, wherever they are."""

    def __init__(self, name: str, address: str, place: Path, shared: Sequence[Path]) -> None:
        self.name, self.address = name, address
        self._groups = [top / name for top in CGROUPS.iterdir() if os.path.ismount(top) and top.name != "systemd"]
        for group in self._groups:
            group.mkdir()
            for file in ("cpuset.cpus", "cpuset.mems"):       # of version 1: nobody may enter one without
                if (group.parent / file).exists():
                    (group / file).write_text((group.parent / file).read_text())
        place.mkdir(parents=True)
        place = place.resolve()
        lines = ["set -e", "mount -t proc proc /proc", f"hostname {name}", f"mount -t tmpfs -o mode=755 tmpfs {place}"]
        for top in (Path(tempfile.gettempdir()).resolve(), Path("/tmp"), Path("/run"), Path("/dev/shm")):
            new = place / "-".join(top.parts[1:])
            lines.append(f"mkdir -p -m 1777 {new}")
            for path in _below(top, [*shared, REPOSITORY, Path(sys.prefix)]):
                inside = shlex.quote(str(new / path.relative_to(top)))
                lines += [f"mkdir -p {inside}", f"mount --bind {shlex.quote(str(path))} {inside}"]
            # Not its mounts' originals: they stay where nobody looks.
            lines.append(f"mount --rbind {new} {top}")
        lines += [f"mount --bind {group} {group.parent}" for group in self._groups]
        lines += ["ip link set lo up", "echo ready", "trap '' CHLD", "exec cat"]
        # The first process of its namespace: as it doesn't wait for children, they leave no zombies.
        self._owner = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork",
             "--kill-child=KILL", "sh", "-c", "\n".join(lines)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._owner.stdout is not None
        assert self._owner.stdout.readline() == b"ready\n", f"node {name} can't be made"
        children = Path(f"/proc/{self._owner.pid}/task/{self._owner.pid}/children").read_text().split()
        self.pid = int(children[0])
        self._pids = os.readlink(f"/proc/{self.pid}/ns/pid")

    def command(self, words: Sequence[object]) -> list[str]:
        """The same command, on this node."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--ipc", "--mount", "--pid", "--",
                *map(str, words)]

    def path(self, inside: str | Path) -> Path:
        """Where a file of this node is found from without."""
        return Path(f"/proc/{self.pid}/root", str(inside).lstrip("/"))

    def processes(self) -> dict[int, str]:
        """Everything that runs here, but for the first of all: pids as without, and commands."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.pid:
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns" / "pid") == self._pids and (words := (entry / "cmdline").read_bytes()):
                        found[int(entry.name)] = words.replace(b"\0", b" ").decode(errors="replace").strip()
        return found

    def left(self) -> list[str]:
        """What is on this node beside Slurm's daemon: processes, files, segments, control groups."""
        found = [f"{pid}: {words}" for pid, words in self.processes().items() if not words.startswith("slurmd ")]
        mounts = _mounts(self.pid)
        for top in ("/tmp", "/run", "/dev/shm"):
            for directory, names, files in os.walk(self.path(top)):
                here = "/" + os.path.relpath(directory, self.path("/"))
                names[:] = [name for name in names if f"{here}/{name}" not in {*mounts, "/run/mount"}]
                # (The way to what is mounted is no file of anybody's.)
                found += [f"{here}/{name}" for name in files]
                found += [f"{here}/{name}" for name in names if not any(
                    mount.startswith(f"{here}/{name}/") for mount in mounts)]
        shown = subprocess.run(self.command(["cat", "/proc/sysvipc/shm"]), capture_output=True, text=True, check=True)
        found += [f"System V segment {line}" for line in shown.stdout.splitlines()[1:]]
        for group in self._groups:
            found += map(str, [*group.glob("rfaas-*"), *group.glob("slurm*/uid_*/job_*")])
        return found

    def close(self) -> None:
        """Ends everything that runs here, and the node. Safe to call twice."""
        self._owner.kill()
        self._owner.communicate()
        deadline = time.monotonic() + GUARD_S
        while left := self.processes():
            assert time.monotonic() < deadline, f"can't end {left}"
            time.sleep(0.002)
        for group in self._groups:
            _remove(group)
        self._groups.clear()


def _remove(group: Path) -> None:
    """A control group, with all below it."""
    for path in sorted((path for path in (group, *group.rglob("*")) if path.is_dir()), reverse=True):
        path.rmdir()


def names(count: int) -> list[str]:
    """What so many nodes may be called: groups of nodes of tests that were killed are removed, nobody else's."""
    for group in CGROUPS.glob("*/v*n*"):
        found = re.fullmatch(r"v(\d+)n\d+", group.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(group)
    return [f"v{os.getpid()}n{number}" for number in range(1, count + 1)]


def _mounts(pid: int) -> set[str]:
    """What is mounted for a process."""
    return {line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()}


class Network:
    """Virtual nodes, and the network between them, with one more place in it: that of Slurm's controller and of users."""

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        self.nodes: dict[str, VirtualNode] = {}
        self.head = netns.Node(f"{NETWORK}.254")
        try:
            for words in (("link", "add", "bridge", "type", "bridge"), ("link", "set", "bridge", "up"),
                          ("address", "add", f"{self.head.address}/{PREFIX}", "dev", "bridge"),
                          ("link", "set", "lo", "up")):
                netns.ip(*words, node=self.head)
            for number, name in enumerate(names, 1):
                node = VirtualNode(name, f"{NETWORK}.{number}", directory / "nodes" / name, [directory])
                self.nodes[name] = node
                netns.ip("link", "add", f"to-{name}", "netns", self.head.pid, "type", "veth",
                         "peer", "name", "eth0", "netns", node.pid)
                netns.ip("link", "set", f"to-{name}", "master", "bridge", node=self.head)
                netns.ip("link", "set", f"to-{name}", "up", node=self.head)
                for words in (("address", "add", f"{node.address}/{PREFIX}", "dev", "eth0"),
                              ("link", "set", "eth0", "up")):
                    subprocess.run(node.command(["ip", *words]), check=True)
        except BaseException:
            self.close()
            raise

    def cut(self, name: str) -> None:
        """Pulls a node's cable."""
        netns.ip("link", "set", f"to-{name}", "down", node=self.head)

    def lose(self, name: str) -> None:
        """Has every packet from and to a node get lost, while both ends see the link up."""
        netns.ip("link", "set", f"to-{name}", "nomaster", node=self.head)

    def heal(self) -> None:
        """Every link is whole again."""
        for name in self.nodes:
            netns.ip("link", "set", f"to-{name}", "master", "bridge", "up", node=self.head)

    def close(self) -> None:
        """Ends all that runs there. Safe to call twice."""
        for node in self.nodes.values():
            node.close()
        self.head.close()

"""Formats of /proc and /sys that several readers here need: CPU lists, cgroup mounts, topology."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

__all__ = ["V1_NO_LIMIT", "CgroupMount", "Topology", "cgroup_mounts", "cpu_list", "memory_total", "pid_of",
           "ranges", "read_text", "read_topology"]

# cgroup v1 says "no limit" with the largest multiple of its page size.
V1_NO_LIMIT = 1 << 60


class CgroupMount(msgspec.Struct, frozen=True):
    """One mounted hierarchy; version 2 has no controllers of its own."""

    top: str                         # what of the hierarchy is mounted
    point: str                       # where
    controllers: frozenset[str]


class Topology(msgspec.Struct, frozen=True):
    """The node's CPUs that are online, and what they share."""

    cpus: tuple[int, ...]
    core_of: dict[int, int] = {}     # CPU → lowest CPU of its physical core
    numa: dict[int, int] = {}        # CPU → NUMA node
    memory_bytes: int = 0

    def physical(self, cpu: int) -> int:
        """The physical core that the CPU is a thread of."""
        return self.core_of.get(cpu, cpu)


def read_text(path: Path) -> str:
    """The file's text, or an empty one: what isn't there limits nothing."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def cpu_list(text: str) -> list[int]:
    """The kernel's `0-3,8` as numbers; [] for an empty list."""
    cpus: list[int] = []
    for part in text.replace("\n", ",").split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is not None:
            cpus += range(int(match[1]), int(match[2] or match[1]) + 1)
    return cpus


def ranges(cpus: Iterable[int]) -> str:
    """CPUs as people write them: 0-3,8."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def cgroup_mounts(mountinfo: str) -> Iterator[CgroupMount]:
    """Each cgroup mount in the text of /proc/self/mountinfo."""
    for line in mountinfo.splitlines():
        left, dash, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not dash or len(fields) < 5 or not kind:
            continue
        top, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in fields[3:5])
        if kind[0] == "cgroup2":
            yield CgroupMount(top, point, frozenset())
        elif kind[0] == "cgroup" and len(kind) > 2:
            yield CgroupMount(top, point, frozenset(kind[2].split(",")))


def memory_total(meminfo: str) -> int:
    """Bytes of memory, by the text of /proc/meminfo; 0 if it doesn't say."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def read_topology(root: Path = Path("/"), cpus: Iterable[int] | None = None) -> Topology:
    """Of these CPUs, else of all that are online. Where the kernel says nothing, each is a core on node 0."""
    cpu_files = root / "sys/devices/system/cpu"
    wanted = tuple(sorted(set(cpu_list(read_text(cpu_files / "online")) if cpus is None else cpus)))
    core_of = {}
    for cpu in wanted:
        topology = cpu_files / f"cpu{cpu}/topology"
        siblings = cpu_list(read_text(topology / "core_cpus_list") or read_text(topology / "thread_siblings_list"))
        core_of[cpu] = min(siblings, default=cpu)
    numa = {}
    for node in (root / "sys/devices/system/node").glob("node[0-9]*"):
        for cpu in cpu_list(read_text(node / "cpulist")):
            numa[cpu] = int(node.name.removeprefix("node"))
    return Topology(wanted, core_of, {cpu: numa.get(cpu, 0) for cpu in wanted},
                    memory_total(read_text(root / "proc/meminfo")))


def pid_of(pidfd: int) -> int:
    """The process that a pidfd is for. ValueError for another descriptor, ProcessLookupError if it was reaped."""
    # Of other descriptors it may have names of files, in any bytes.
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_bytes().split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"Pid":
            if int(value) <= 0:
                raise ProcessLookupError(errno.ESRCH, "the process is gone")
            return int(value)
    raise ValueError("the descriptor is no pidfd")

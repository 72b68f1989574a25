"""Where a figure was measured: processor, kernel, versions, pinning, and how quiet the machine was."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rfaas_mpi.bench import raw
from rfaas_mpi.bench.raw import BenchError


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # absent in this kernel, or not for us: said as null
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.machine()


def stolen_ticks() -> int | None:
    """Ticks of all cores that the hypervisor gave to others; None where the kernel doesn't say."""
    first = (_text("/proc/stat") or "").split("\n", 1)[0].split()
    return int(first[8]) if len(first) > 8 else None


def facts() -> dict:
    """One JSON object: everything that a reader needs to judge a figure."""
    flags = _text("/proc/cpuinfo") or ""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "cores_online": os.cpu_count(),
        "virtual": " hypervisor" in flags,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "huge_pages_shared": _text("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "versions": {name: _version(name) for name in ("numpy", "msgspec", "cloudpickle")},
        "clock_ns": raw.clock_ns(),
        "load_average": list(os.getloadavg()),
    }


@dataclass(frozen=True)
class Cores:
    """The two cores of a measurement: the rank's, and the one that is lent."""

    rank: int
    allowed: tuple[int, ...]


@contextmanager
def pinned(core: int | None = None) -> Iterator[Cores]:
    """Pins this process to one core (the first it may use, or `core`); undone on leaving.

    BenchError where the process may use one core only: then nothing can be lent.
    """
    before = os.sched_getaffinity(0)
    allowed = tuple(sorted(before))
    rank = allowed[0] if core is None else core
    if rank not in before:
        raise BenchError(f"this process may not use core {rank}", hint=f"choose one of {list(allowed)}")
    if len(allowed) < 2:
        raise BenchError(f"this process may use core {rank} only, and a benchmark needs two",
                         hint="start it with at least two cores, for instance `taskset -c 0,1`")
    os.sched_setaffinity(0, {rank})
    try:
        yield Cores(rank, allowed)
    finally:
        os.sched_setaffinity(0, before)

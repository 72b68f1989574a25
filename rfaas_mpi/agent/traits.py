"""What a report tells of a node besides what it lends: what the detector found, and what its site says. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from rfaas_mpi import api
from rfaas_mpi.agent.classes import CoreClass

if TYPE_CHECKING:
    from rfaas_mpi.agent.detector import Report

__all__ = ["cpu_type", "owners_of", "traits_of"]

_CPU_TYPE_CHARS = 128


def cpu_type(cpuinfo: str) -> str:
    """The processor's name in /proc/cpuinfo, its spaces made one; "" where it has none (not on every architecture)."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "cpu model", "cpu"):
            return " ".join(value.split())[:_CPU_TYPE_CHARS]
    return ""


def traits_of(report: Report | None, now: float, site: api.Traits = api.Traits()) -> api.Traits:
    """What the site says of the node, with what was found there (None: nobody looks).

    Classes and physical cores of what is lent, where owners' work may run, and how old
    the node's window is: as old as the core that has been spare the longest.
    """
    if report is None:
        return site
    spare = [core for core in report.cores if core.spare]
    since = [core.since for core in spare if core.since is not None]
    # Without hardware threads each CPU is its own core, and nothing has to be said.
    threads = len({core.physical for core in report.cores}) < len(report.cores)
    return msgspec.structs.replace(
        site, window_age_s=max(0.0, now - min(since)) if since else None,
        classes={core.cpu: str(core.which) for core in spare if core.which is not CoreClass.FREE},
        physical={core.cpu: core.physical for core in report.cores} if threads else {},
        busy=tuple(core.cpu for core in report.cores if core.which is CoreClass.OWNED))


def owners_of(report: Report | None) -> dict[int, int]:
    """Core that is lent → the user whose job it is of, where that is known: the manager's credit for lenders."""
    if report is None:
        return {}
    return {core.cpu: core.uid for core in report.cores if core.spare and core.uid is not None}

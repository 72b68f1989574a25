"""What a report tells of a node besides what it lends, from what the detector found. Pure."""

from __future__ import annotations

from rfaas_mpi import api
from rfaas_mpi.agent.detector import CoreClass, Report

__all__ = ["traits_of"]


def traits_of(report: Report, now: float) -> api.Traits:
    """Classes and physical cores of what is lent, where owners' work may run, and how old the node's window is.

    The window is as old as the core that has been spare the longest.
    """
    spare = [core for core in report.cores if core.spare]
    since = [core.since for core in spare if core.since is not None]
    # Without hardware threads each CPU is its own core, and nothing has to be said.
    threads = len({core.physical for core in report.cores}) < len(report.cores)
    return api.Traits(
        window_age_s=max(0.0, now - min(since)) if since else None,
        classes={core.cpu: str(core.which) for core in spare if core.which is not CoreClass.FREE},
        physical={core.cpu: core.physical for core in report.cores} if threads else {},
        busy=tuple(core.cpu for core in report.cores if core.which is CoreClass.OWNED))

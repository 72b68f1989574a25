"""Low priority for a worker: of its scheduling group, since that of a thread counts only inside its group.

The scheduler first shares a core between groups: cgroups of the cpu controller and, for what is in none, sessions
(autogroups). A SCHED_IDLE thread alone in its group has the group's whole share. So a worker gets a group of its own,
which weighs next to nothing, right below the root of the hierarchy: within a group of ordinary weight it would have
that one's share again.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

from rfaas_mpi.agent.kernel_files import cgroup_mounts, read_text

__all__ = ["LowGroup", "Means", "lower_session", "make_group", "session_can_be_lowered"]

AUTOGROUP_NICE = 19


class Means(StrEnum):
    """What makes a group's priority low; the best first."""

    IDLE = "cpu.idle"
    WEIGHT = "cpu.weight"
    SHARES = "cpu.shares"
    AUTOGROUP = "autogroup"


class LowGroup:
    """A cgroup whose processes run when nobody else wants the core. close() removes it once it is empty."""

    def __init__(self, directory: Path, means: Means) -> None:
        self.directory = directory
        self.means = means

    def enter(self, pid: int = 0) -> None:
        """Moves a process there, for good; 0 is the caller. OSError if it is gone or isn't ours to move."""
        (self.directory / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Safe to call twice. OSError while something runs in it."""
        try:
            self.directory.rmdir()
        except FileNotFoundError:
            pass                     # closed already


def make_group(name: str, root: Path = Path("/"), parent: Path | None = None) -> LowGroup | None:
    """A new group of low priority; None where this process can make none.

    Below the root of the cpu controller's hierarchy, else below `parent`, which has to be of low priority itself.
    """
    where = parent or _cpu_root(root)
    if where is None:
        return None
    directory = where / name
    try:
        directory.mkdir()
    except OSError:
        return None                  # read-only, or not ours: then there is autogroup
    for means, value in ((Means.IDLE, "1"), (Means.WEIGHT, "1"), (Means.SHARES, "2")):
        try:
            with open(directory / means, "r+") as file:      # never made where it is missing
                file.write(value)
        except OSError:
            continue
        if read_text(directory / means).strip() == value:
            return LowGroup(directory, means)
    directory.rmdir()
    return None


def _cpu_root(root: Path) -> Path | None:
    """The root of the hierarchy that has the cpu controller, if its groups can use it."""
    mounts = list(cgroup_mounts(read_text(root / "proc/self/mountinfo")))
    for mount in mounts:
        if "cpu" in mount.controllers:
            return root / mount.point.lstrip("/")
    for mount in mounts:
        point = root / mount.point.lstrip("/")
        if not mount.controllers and "cpu" in read_text(point / "cgroup.subtree_control").split():
            return point
    return None


def session_can_be_lowered(root: Path = Path("/")) -> bool:
    """Whether a session of its own would have a scheduling group of its own: it is in no cgroup of the cpu controller."""
    if read_text(root / "proc/sys/kernel/sched_autogroup_enabled").strip() != "1":
        return False
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if "cpu" in controllers.split(","):
            return path == "/"
    return all(line.endswith(":/") for line in read_text(root / "proc/self/cgroup").splitlines()
               if line.startswith("0:"))


def lower_session(root: Path = Path("/")) -> bool:
    """Gives the caller, which must lead a session of its own, a scheduling group of low priority; False if it can't.

    For those who may make no cgroup. Never taken back: without privileges it couldn't be.
    """
    if os.getsid(0) != os.getpid() or not session_can_be_lowered(root):
        return False
    try:
        (root / "proc/self/autogroup").write_text(str(AUTOGROUP_NICE))
    except OSError:
        return False
    return read_text(root / "proc/self/autogroup").split()[-1:] == [str(AUTOGROUP_NICE)]

"""Low priority for a worker: of its scheduling group, since that of a thread counts only inside its group.

The scheduler first shares a core between groups: cgroups of the cpu controller and, for what is in none, sessions
(autogroups). A SCHED_IDLE thread alone in its group has the group's whole share. So a worker gets a group of its own,
which weighs next to nothing, right below the root of the hierarchy: within a group of ordinary weight it would have
that one's share again.
"""

from __future__ import annotations

import errno
import os
import re
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rfaas_mpi.agent.kernel_files import cgroup_mounts, read_text

__all__ = ["NO_PRIORITY", "LowGroup", "LowPriority", "Lowering", "Means", "can_be_had", "is_root", "lift",
           "lower_session", "make_group", "remove_stale_groups", "session_can_be_lowered"]

AUTOGROUP_NICE = 19
_LEAVE_S = 2.0
LOWER_WITHIN_S = 1.0                 # without privileges the kernel lets one session on the node be lowered each 100 ms


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

    def entrance(self) -> int:
        """A descriptor by which a process with one thread may enter itself, whoever it is: the caller's to close."""
        # v1 takes a single thread in without a lock that all forks of the node share.
        tasks = self.directory / "tasks"
        return os.open(tasks if tasks.exists() else self.directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

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
    means = lower(directory)
    if means is not None:
        return LowGroup(directory, means)
    directory.rmdir()
    return None


def lower(directory: Path) -> Means | None:
    """Gives a group low priority; by what, None if it can't."""
    for means, value in ((Means.IDLE, "1"), (Means.WEIGHT, "1"), (Means.SHARES, "2")):
        try:
            with open(directory / means, "r+") as file:      # never made where it is missing
                file.write(value)
        except OSError:
            continue
        if read_text(directory / means).strip() == value:
            return means
    return None


def lift(directory: Path) -> None:
    """Takes low priority from a group: for what was killed there, and has yet to end. OSError if it is gone."""
    for means, value in ((Means.IDLE, "0"), (Means.WEIGHT, "100"), (Means.SHARES, "1024")):
        if (directory / means).exists():
            (directory / means).write_text(value)
            return


def _cpu_root(root: Path) -> Path | None:
    """The root of the hierarchy that has the cpu controller, if its groups can use it."""
    mounts = list(cgroup_mounts(read_text(root / "proc/self/mountinfo")))
    for mount in mounts:
        if "cpu" in mount.controllers:
            return root / mount.point.lstrip("/")
    for mount in mounts:
        point = root / mount.point.lstrip("/")
        if (not mount.controllers and is_root(point)
                and "cpu" in read_text(point / "cgroup.subtree_control").split()):
            return point
    return None


def is_root(group: Path) -> bool:
    """Whether a group of version 2 is the root of all: in a container the topmost that is seen need not be."""
    return not (group / "cgroup.events").exists()


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


def lower_session(root: Path = Path("/"), within_s: float = 0.0) -> bool:
    """Gives the caller, which must lead a session of its own, a scheduling group of low priority; False if it can't.

    For those who may make no cgroup. Never taken back: without privileges it couldn't be. Where the kernel wants its
    pause between two such requests, it is asked again for `within_s`.
    """
    if os.getsid(0) != os.getpid() or not session_can_be_lowered(root):
        return False
    deadline = time.monotonic() + within_s
    while True:
        try:
            (root / "proc/self/autogroup").write_text(str(AUTOGROUP_NICE))
        except OSError as error:
            if error.errno != errno.EAGAIN or time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
            continue
        return _session_is_low(root, "self")


def _session_is_low(root: Path, pid: int | str) -> bool:
    return read_text(root / f"proc/{pid}/autogroup").split()[-1:] == [str(AUTOGROUP_NICE)]


@dataclass(frozen=True)
class LowPriority:
    """How workers get low priority before they run anything: by a group whose entrance they inherit, by their session,
    or not at all."""

    means: Means | None = None
    group: str = ""                  # its name
    entrance: int = -1

    def take(self, root: Path = Path("/")) -> bool:
        """The caller, a process with one thread that leads its session, has low priority from now on; False if not."""
        match self.means:
            case None:
                return False
            case Means.AUTOGROUP:
                return lower_session(root, LOWER_WITHIN_S)
            case _:
                try:
                    return os.write(self.entrance, b"0") > 0
                except OSError:
                    return False      # the group was removed, or its hierarchy has rules of its own

    def has(self, pid: int, root: Path = Path("/")) -> bool:
        """Whether that process took it, as the kernel tells; False if it is gone."""
        match self.means:
            case None:
                return False
            case Means.AUTOGROUP:
                return _session_is_low(root, pid)
            case _:
                return any(line.endswith(f"/{self.group}") or f"/{self.group}/" in line
                           for line in read_text(root / f"proc/{pid}/cgroup").splitlines())


NO_PRIORITY = LowPriority()

_GROUP = re.compile(r"rfaas-low-(\d+)-(\d+)-(\d+)")


def can_be_had(root: Path = Path("/")) -> tuple[Means | None, str]:
    """What low priority this process could give to workers, and where or why not. Makes nothing."""
    where = _cpu_root(root)
    if where is not None and os.access(where, os.W_OK):
        version = 2 if (where / "cgroup.subtree_control").exists() else 1
        # Version 2 shows in its groups only what they have, and none may be there.
        seen = (means for means in (Means.IDLE, Means.WEIGHT, Means.SHARES)
                if (where / means).exists() or any(where.glob(f"*/{means}")))
        return (next(seen, Means.WEIGHT if version == 2 else Means.SHARES),
                f"a group below {where} (cgroup v{version})")
    no_group = f"{where} is not ours to make groups in" if where is not None else "no cgroup here has the cpu controller"
    if session_can_be_lowered(root):
        return Means.AUTOGROUP, f"the session's autogroup, since {no_group}"
    return None, f"{no_group}, and sessions have no group of their own"


class Lowering:
    """Low priority for all workers of an agent: one group, if it may make one. close() removes it."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._group = make_group(_group_name(os.getpid()), root)
        if self._group is not None:
            self.priority = LowPriority(self._group.means, self._group.directory.name, self._group.entrance())
        elif session_can_be_lowered(root):
            self.priority = LowPriority(Means.AUTOGROUP)
        else:
            self.priority = NO_PRIORITY

    @property
    def directory(self) -> Path | None:
        """Where the group is; None: there is none."""
        return None if self._group is None else self._group.directory

    def close(self) -> None:
        """Returns when killed workers have left it. Safe to call twice. OSError if one doesn't."""
        if self._group is None:
            return
        if self.priority.entrance >= 0:
            os.close(self.priority.entrance)
            self.priority = NO_PRIORITY
        deadline = time.monotonic() + _LEAVE_S
        while True:
            try:
                self._group.close()
                return
            except OSError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(0.002)


def _group_name(pid: int) -> str:
    return f"rfaas-low-{os.stat('/proc/self/ns/pid').st_ino}-{pid}-{_began(pid)}"


def _began(pid: int) -> str:
    """The tick at which a process began: with it, its number is never used twice. "" if there is none."""
    return "".join(read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[19:20])


def remove_stale_groups(root: Path = Path("/")) -> list[str]:
    """Removes the groups of agents that were killed; their names. What is still in one is left alone."""
    where = _cpu_root(root)
    removed = []
    for directory in where.glob("rfaas-low-*") if where is not None else ():
        made = _GROUP.fullmatch(directory.name)
        # Who is in another namespace can't be seen from here.
        if made is None or int(made[1]) != os.stat("/proc/self/ns/pid").st_ino or _began(int(made[2])) == made[3]:
            continue
        try:
            directory.rmdir()
        except OSError:
            continue                  # not ours, not empty, or somebody else was faster
        removed.append(directory.name)
    return removed

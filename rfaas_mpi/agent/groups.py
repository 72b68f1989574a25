"""A worker's own control groups: its memory bounded, and a handle on everything that it ever starts.

 v2   /sys/fs/cgroup/NAME             memory.max, memory.oom.group, pids.max, cgroup.kill
 v1   /sys/fs/cgroup/memory/NAME      memory.limit_in_bytes, and memory.memsw… where swap is counted
      /sys/fs/cgroup/pids/NAME        pids.max
      /sys/fs/cgroup/cpu/NAME         cpu.idle, else cpu.shares, where it is of low priority (on v2 above)

Where the root of v2 isn't ours, but our own group is (systemd's Delegate=yes, a container), they are made in that one:

      OURS/rfaas-own                 we, since a group that gives its controllers on may have no processes
      OURS/NAME                      memory.max … as above, but no low priority: that counts right below the root only

Names carry who made them, so that what a killed maker left behind can be told and removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rfaas_mpi.agent.kernel_files import CgroupMount, cgroup_mounts, read_text
from rfaas_mpi.agent.priority import is_root, lift, lower

__all__ = ["Group", "Roots", "maker", "remove_stale"]

log = logging.getLogger("rfaas_mpi.groups")

PIDS_MAX = 4096                      # processes and threads of one worker, or of one zygote with its spare fork
OWN = "rfaas-own"                    # where those are who make groups beside it
END_S = 5.0                          # killed processes need so long at the most to leave their group

_NAME = re.compile(r"rfaas-(\d+)\.(\d+)\.(\d+)-[a-z]\d+")


@dataclass(frozen=True)
class Roots:
    """Where groups with a memory controller can be made; `why_not` says why there is no such place."""

    memory: Path | None = None
    pids: Path | None = None
    cpu: Path | None = None          # for low priority; version 2 has one hierarchy for all
    unified: bool = False
    delegated: bool = False          # it is our own group, which settle() has to divide first
    why_not: str = ""

    @classmethod
    def find(cls, root: Path = Path("/"), *, to_look: bool = False) -> Roots:
        """By this process' mounts and, unless it is only to look, what it may write there; makes nothing."""
        mounts = list(cgroup_mounts(read_text(root / "proc/self/mountinfo")))
        v1 = {controller: root / mount.point.lstrip("/") for mount in mounts for controller in mount.controllers}
        if "memory" in v1:
            memory, pids, cpu, unified = v1["memory"], v1.get("pids"), v1.get("cpu"), False
        else:
            tops = [root / mount.point.lstrip("/") for mount in mounts if not mount.controllers]
            top = next((top for top in tops if "memory" in read_text(top / "cgroup.subtree_control").split()), None)
            if top is None or not (to_look or os.access(top, os.W_OK)):
                own = _own_group(root, [mount for mount in mounts if not mount.controllers])
                if own is not None:
                    pids = own if "pids" in read_text(own / "cgroup.controllers").split() else None
                    return cls(own, pids, None, True, delegated=True)
            if top is None:
                return cls(why_not="no hierarchy of control groups here has the memory controller")
            memory, unified = top, True
            controllers = read_text(top / "cgroup.subtree_control").split()
            pids = top if "pids" in controllers else None
            cpu = top if "cpu" in controllers and is_root(top) else None
        if to_look:
            return cls(memory, pids, cpu, unified)
        if not os.access(memory, os.W_OK):
            return cls(why_not=f"{memory} is not ours to make control groups in")
        pids, cpu = (path if path is not None and os.access(path, os.W_OK) else None for path in (pids, cpu))
        return cls(memory, pids, cpu, unified)

    def settle(self, *pids: int) -> Roots:
        """Roots in which groups can be made, or that say why not: of a delegated group its controllers are given on.

        These processes are the only ones that may be in it; they leave it for one below, for good.
        """
        place = self.memory
        if not self.delegated or place is None:
            return self
        leaf, moved = place / OWN, []
        controllers = [name for name, where in (("memory", self.memory), ("pids", self.pids)) if where is not None]
        try:
            there = (place / "cgroup.procs").read_text().split()
            leaf.mkdir(exist_ok=True)
            for pid in pids:
                if str(pid) in there:
                    (leaf / "cgroup.procs").write_text(str(pid))
                    moved.append(pid)
            (place / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
        except OSError as error:
            with contextlib.suppress(OSError):
                for pid in moved:
                    (place / "cgroup.procs").write_text(str(pid))
                leaf.rmdir()
            others = len(set(there) - set(map(str, pids))) if error.errno == errno.EBUSY else 0
            why = f"{others} other processes are in it" if others else error.strerror
            return Roots(why_not=f"{place} is delegated to us, but can't be divided into control groups: {why}")
        return self


def _own_group(root: Path, mounts: Iterable[CgroupMount]) -> Path | None:
    """The group of version 2 that this process is in, if it was delegated to us with the memory controller.

    The root of all groups is nobody's to divide.
    """
    path = next((line[3:] for line in read_text(root / "proc/self/cgroup").splitlines() if line.startswith("0::")), "")
    for mount in mounts:
        top = mount.top.rstrip("/")
        if not f"{path}/".startswith(f"{top}/"):
            continue
        own = root / mount.point.lstrip("/") / path[len(top):].lstrip("/")
        if own.name == OWN:
            own = own.parent
        ours = all(os.access(own / name, os.W_OK) for name in ("", "cgroup.procs", "cgroup.subtree_control"))
        if ours and not is_root(own) and "memory" in read_text(own / "cgroup.controllers").split():
            return own
    return None


def maker(pid: int = 0) -> str:
    """The first part of the names of all groups that this process makes."""
    pid = pid or os.getpid()
    return f"rfaas-{os.stat('/proc/self/ns/pid').st_ino}.{pid}.{_started(pid)}"


def _started(pid: int) -> str:
    """The tick at which the process began, which no two processes with the same number share; "" if none lives."""
    state, *facts = read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or "X"
    return "" if state in "ZX" else facts[18]


def _has_one_thread(pid: int) -> bool:
    try:
        return len(os.listdir(f"/proc/{pid or 'self'}/task")) == 1
    except FileNotFoundError:
        return False                 # gone: who tries to move it hears that


def _open_as(file: Path, uid: int | None) -> int:
    """To write to. Whom a group lets in depends on who has opened its file, and not on who writes."""
    if uid is None:
        return os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    before = os.geteuid()
    os.chown(file, uid, -1)
    try:
        os.seteuid(uid)
        try:
            return os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        finally:
            os.seteuid(before)
    finally:
        os.chown(file, before, -1)


class Group:
    """One group, in each hierarchy that it needs. close() ends what is in it and removes it."""

    def __init__(self, name: str, roots: Roots, low: bool = False) -> None:
        """One that make() has made. OSError where there can be none."""
        if roots.memory is None:
            raise OSError(roots.why_not)
        self.name = name
        self.unified = roots.unified
        self.memory = roots.memory / name
        self.pids = roots.pids / name if roots.pids is not None else None
        self.cpu = roots.cpu / name if roots.cpu is not None and (low or roots.unified) else None
        self._directories = tuple(dict.fromkeys(path for path in (self.memory, self.pids, self.cpu)
                                                if path is not None))

    @classmethod
    def make(cls, name: str, roots: Roots, memory_bytes: int = 0, *, low: bool = False) -> Group:
        """A new one, whose processes run when nobody else wants the core if it is to be `low`.

        Without `memory_bytes` memory is only counted. OSError where it can't be made.
        """
        group = cls(name, roots, low)
        made = []
        try:
            for directory in group._directories:
                directory.mkdir()
                made.append(directory)
            if group.pids is not None:
                (group.pids / "pids.max").write_text(str(PIDS_MAX))
            if group.unified:
                (group.memory / "memory.oom.group").write_text("1")
            if low and (group.cpu is None or lower(group.cpu) is None):
                raise OSError("no hierarchy of control groups here can give low priority")
            if memory_bytes:
                group.limit(memory_bytes)
        except BaseException:
            for directory in made:
                directory.rmdir()
            raise
        return group

    def limit(self, memory_bytes: int) -> None:
        """Bounds what its processes take from now on, swap included. OSError if they hold more already."""
        if self.unified:
            (self.memory / "memory.max").write_text(str(memory_bytes))
            swap = self.memory / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
            return
        files = [self.memory / "memory.limit_in_bytes", self.memory / "memory.memsw.limit_in_bytes"]
        # The first may never be above the second.
        if memory_bytes > int(read_text(files[0]) or 0):
            files.reverse()
        for file in files:
            if file.exists():         # swap may not be counted
                file.write_text(str(memory_bytes))

    def enter(self, pid: int = 0) -> None:
        """Moves a process there with all of its threads; 0 is the caller. OSError if it is gone.

        Its main thread may run where it could before: with the cpuset controller of version 2, kernels before 6.2
        open every core of the group to it.
        """
        mask = os.sched_getaffinity(pid) if self.unified else set()
        self._enter(pid)
        if mask and os.sched_getaffinity(pid) != mask:
            os.sched_setaffinity(pid, mask)

    def _enter(self, pid: int) -> None:
        for directory in self._directories:
            if not self.unified and pid == 0 and _has_one_thread(pid):
                # In v1 the thread itself enters without the lock that all forks of the
                # node share, and that takes 10 ms to have.
                (directory / "tasks").write_text("0")
                continue              # what it begins from now on begins here
            (directory / "cgroup.procs").write_text(str(pid))

    def entrances(self, uid: int | None = None) -> list[int]:
        """Descriptors, the caller's to close, by which a process with one thread enters it: it writes `0` to each.

        In v1 that needs no lock, while somebody else moves it in 10 ms. None in v2, where it has no advantage. They
        are for nobody but our own user; with `uid` for that one, who may let in any process that is his and no other.
        """
        fds: list[int] = []
        if self.unified:
            return fds
        try:
            for directory in self._directories:
                fds.append(_open_as(directory / "tasks", uid))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def holds(self, pid: int) -> bool:
        """Whether that process is in it, in every hierarchy; False if it is gone."""
        # By controller: in systemd's own hierarchy of version 1 users may make groups of any name.
        places: dict[str, str] = {}
        for line in read_text(Path(f"/proc/{pid}/cgroup")).splitlines():
            _, controllers, place = line.split(":", 2)
            places |= dict.fromkeys(controllers.split(","), place)
        wanted = [""] if self.unified else [name for name, where in (("memory", self.memory), ("pids", self.pids),
                                                                     ("cpu", self.cpu)) if where is not None]
        return all(places.get(name, "").endswith(f"/{self.name}") for name in wanted)

    def members(self) -> list[int]:
        """Processes that are in it now, in whichever hierarchy: who enters it himself need not enter all of them."""
        return sorted({int(word) for directory in self._directories
                       for word in read_text(directory / "cgroup.procs").split()})

    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed because the group was at its limit."""
        file = "memory.events" if self.unified else "memory.oom_control"
        return next((int(line.split()[1]) for line in read_text(self.memory / file).splitlines()
                     if line.startswith("oom_kill ")), 0)

    def anonymous_bytes(self) -> int:
        """What its processes hold that is in no file; 0 once it is removed."""
        names = ("anon", "shmem") if self.unified else ("rss", "shmem")
        return sum(int(line.split()[1]) for line in read_text(self.memory / "memory.stat").splitlines()
                   if line.split()[0] in names)

    def hurry(self) -> None:
        """What was killed there ends as soon as anything would: on a busy core low priority would keep it for long."""
        if self.cpu is not None:
            with contextlib.suppress(FileNotFoundError):         # it is removed
                lift(self.cpu)

    def kill(self) -> None:
        """SIGKILL for all that is in it; nothing new can begin there."""
        if self.unified and (self.memory / "cgroup.kill").exists():
            (self.memory / "cgroup.kill").write_text("1")
            return
        if self.pids is not None and self.pids.exists():
            (self.pids / "pids.max").write_text("0")
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def remove(self) -> bool:
        """Kills what is in it and removes it; False while something there has not ended yet."""
        for directory in self._directories:
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue              # removed already
            except OSError:
                self.kill()
                return False
        return True

    def close(self) -> None:
        """Safe to call twice. OSError if something killed doesn't end."""
        deadline = time.monotonic() + END_S
        while not self.remove():
            if time.monotonic() > deadline:
                raise OSError(f"what is in the control group {self.name} was killed and does not end")
            time.sleep(0.001)


def remove_stale(roots: Roots) -> list[str]:
    """Ends what makers that live no more left behind; the names of groups that were removed.

    One that stays, since what is in it does not end, is logged: it keeps nobody from starting.
    """
    removed = []
    for name in _stale(roots):
        try:
            Group(name, roots, low=True).close()
        except OSError as error:
            log.error("%s", error)
            continue
        removed.append(name)
    return removed


def _stale(roots: Roots) -> Iterator[str]:
    ours = str(os.stat("/proc/self/ns/pid").st_ino)
    names: set[str] = set()
    for root in (roots.memory, roots.pids, roots.cpu):
        names.update(os.listdir(root) if root is not None else ())
    for name in sorted(names):
        found = _NAME.fullmatch(name)
        # Who is in another namespace can't be seen from here.
        if found is not None and found[1] == ours and _started(int(found[2])) != found[3]:
            yield name

"""Reads what the detector decides on: the batch jobs' cgroups, their tasks' masks, and what each CPU does.

The tree of cgroups is read once; from then on inotify says what changed. Control files tell of changes that a process
makes by writing to them, which is how batch systems make them. Nothing tells of a mask that a task changes itself: all
masks are read again every two seconds, and a job's at once when its tasks were moved.

      v1   <mount>/slurm[_NODE]/uid_N/job_N/step_N[/task_N]                      each controller has a tree of its own
      v2   <mount>/[*.slice/]*[NODE_]slurmstepd.scope/job_N/step_N/{slurm,user/task_N}
      hybrid is both; a job is the union of what all trees know of it. Since Slurm 26.05 a job's directory in v2 is
      named by its SLUID.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import os
import re
import select
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rfaas_mpi.agent.detector import SAMPLE_S, Detector, Job, Load, Observed, Report
from rfaas_mpi.agent.kernel_files import (
    V1_NO_LIMIT,
    Topology,
    cgroup_mounts,
    cpu_list,
    read_text,
    read_topology,
)
from rfaas_mpi.agent.reading import reading

__all__ = ["MASKS_S", "Inotify", "LoadReader", "NodeWatch", "Observer", "cpus_of_mask", "own_step", "task_mask"]

log = logging.getLogger("rfaas_mpi.agent")

MASKS_S = 2.0                        # every mask is read so often

_NODE_V1 = re.compile(r"slurm(?:_(.+))?")
_NODE_V2 = re.compile(r"(?:(.+)_)?slurmstepd\.scope")
_JOB = re.compile(r"job_(\d+)|(s[0-9A-Z]{13})")
# The hierarchies of v1 in which every task of a job is listed, if they are used at all.
_LIST_TASKS = ("freezer", "cpuset")
_LIMITS = {"cpuset.cpus", "memory.limit_in_bytes", "memory.max"}
_TASKS = {"tasks", "cgroup.procs", "cgroup.threads", "cgroup.events"}


# --- the kernel's calls ------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_MASK_WORDS = 128                    # 8192 CPUs
_mask_buffer = (ctypes.c_char * 128)()         # grows with the kernel's own


def task_mask(tid: int) -> int | None:
    """The CPUs on which a task may run, one bit each; None if it is gone. -1, all of them, where it can't be told."""
    global _mask_buffer
    got = _libc.syscall(_SYS_GETAFFINITY, tid, len(_mask_buffer), _mask_buffer)
    if got > 0:
        return int.from_bytes(_mask_buffer.raw[:got], "little")
    match ctypes.get_errno():
        case errno.ESRCH:
            return None
        case errno.EINVAL if len(_mask_buffer) < 1 << 16:
            _mask_buffer = (ctypes.c_char * (2 * len(_mask_buffer)))()
            return task_mask(tid)
    return -1


_SYS_GETAFFINITY = {"x86_64": 204, "aarch64": 123, "ppc64le": 223, "riscv64": 123}.get(os.uname().machine, 123)


def cpus_of_mask(mask: int, every: Collection[int]) -> frozenset[int]:
    """The CPUs in a mask, among all that there are."""
    return frozenset(cpu for cpu in every if mask >> cpu & 1)


def _union_of_masks(files: Sequence[str]) -> tuple[int, int]:
    """The masks of all tasks that the files list, and how many tasks those are."""
    words = (ctypes.c_uint64 * _MASK_WORDS)()
    count = reading.rfm_read_masks("\0".join([*files, ""]).encode(errors="surrogateescape"), words, _MASK_WORDS)
    if count < 0:
        raise OSError(-count, f"{files[0]} and others can't be read: {os.strerror(-count)}")
    return int.from_bytes(bytes(words), "little"), count


def _tids(file: str) -> Iterator[int]:
    """The tasks in a list; none if it is gone."""
    try:
        with open(file, "rb") as opened:
            yield from map(int, opened.read().split())
    except FileNotFoundError:
        pass                         # its removal is in inotify's list
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise


class Inotify:
    """The kernel's list of what changed in some directories. close() ends it."""

    MODIFY, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x40, 0x80, 0x100, 0x200
    OVERFLOW, IGNORED, ISDIR = 0x4000, 0x8000, 0x40000000
    ONLYDIR = 0x01000000

    def __init__(self) -> None:
        self.fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"no inotify: {os.strerror(number)}; see /proc/sys/fs/inotify/max_user_instances")
        self._poll = select.poll()   # cheaper than the error of an empty read
        self._poll.register(self.fd, select.POLLIN)

    def add(self, directory: str) -> int | None:
        """The watch's number; None if the directory is gone. OSError says what the node lacks."""
        mask = (self.MODIFY | self.MOVED_FROM | self.MOVED_TO | self.CREATE | self.DELETE | self.ONLYDIR)
        watch = _libc.inotify_add_watch(self.fd, os.fsencode(directory), mask)
        if watch >= 0:
            return int(watch)
        number = ctypes.get_errno()
        if number in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise OSError(number, f"{directory} can't be watched: {os.strerror(number)}; see "
                              "/proc/sys/fs/inotify/max_user_watches")

    def read(self) -> Iterator[tuple[int, int, str]]:
        """(watch, what happened, name) of everything since the last call."""
        while self._poll.poll(0):
            data = os.read(self.fd, 1 << 16)
            at = 0
            while at < len(data):
                watch, what, _, length = struct.unpack_from("iIII", data, at)
                at += 16 + length
                yield watch, what, data[at - length:at].rstrip(b"\0").decode(errors="replace")

    def close(self) -> None:
        """Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


# --- the load ----------------------------------------------------------------

class LoadReader:
    """What each CPU has done, from /proc/stat. close() closes the file."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._fd = os.open(root / "proc/stat", os.O_RDONLY | os.O_CLOEXEC)
        self._names, self._known = b"", np.empty(0, np.int64)     # the CPUs as they were the last time
        self._make_room(256)

    def _make_room(self, cpus: int) -> None:
        self._text = bytearray(cpus * 256)
        self._text_at = ctypes.addressof((ctypes.c_char * len(self._text)).from_buffer(self._text))
        self._cpus, self._ticks = np.empty(cpus, np.int64), np.empty(cpus, np.int64)
        self._tables_at = self._cpus.ctypes.data, self._ticks.ctypes.data

    def read(self, now: float, ours_s: dict[int, float] | None = None) -> Load:
        """Ticks that each CPU was busy; `ours_s` is what workers of ours did of that."""
        while True:
            most = len(self._cpus)
            # What follows the CPUs in it is long, and of no interest.
            size = os.preadv(self._fd, [self._text], 0)
            self._text[size - 1] = 0
            count = reading.rfm_read_ticks(self._text_at, *self._tables_at, most)
            if count < most:
                if (names := self._cpus[:count].tobytes()) != self._names:
                    self._names, self._known = names, self._cpus[:count].copy()
                return Load(now, self._known, self._ticks[:count].copy(), ours_s or {})
            self._make_room(2 * most)

    def close(self) -> None:
        """Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


# --- the tree ----------------------------------------------------------------

Key = tuple[str, str]                # (node, job)


@dataclass(eq=False)
class _Directory:
    """One cgroup that we watch."""

    path: str
    controllers: frozenset[str]      # empty in v2
    place: str                       # "top", "slice", "node", "uid", "job", "step" and whatever lies below
    job: Key | None = None
    node: str = ""
    uid: int | None = None
    step: str = ""
    leaf: str = ""
    watch: int = -1
    children: set[str] = field(default_factory=set)

    @property
    def tasks_file(self) -> str:
        return f"{self.path}/{'tasks' if self.controllers else 'cgroup.threads'}"


@dataclass(eq=False)
class _JobState:
    directories: dict[str, _Directory] = field(default_factory=dict)
    limits_due: bool = True
    tasks_due: bool = True
    cpus: frozenset[int] | None = None
    memory_bytes: int | None = None
    uid: int | None = None
    mask: int | None = None          # None: no task of the job was seen


def own_step(root: Path = Path("/")) -> tuple[str, str] | None:
    """(job, step) of a Slurm job that this process runs in: its tasks there aren't an owner's."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)[-1].split("/")
        for job, step in zip(parts, parts[1:]):
            if (match := _JOB.fullmatch(job)) and step.startswith("step_"):
                return match[1] or match[2], step
    return None


class Observer:
    """The node's jobs as they are now. Wait for `fileno`, then `read`; close() ends it.

    `usable` is where the agent may run, `specialised` what the administrator keeps from jobs; `nodes` are the names
    of the slurmd whose jobs count (None: all), `ours` the job and step whose tasks are our own. `mask_of` says a task's
    mask in place of the kernel. OSError where the node has too few inotify watches.
    """

    def __init__(self, root: Path = Path("/"), *, usable: Collection[int] | None = None,
                 specialised: Collection[int] = (), nodes: Collection[str] | None = None,
                 ours: tuple[str, str] | None = None, mask_of: Callable[[int], int | None] | None = None) -> None:
        self._root = root
        self._usable = None if usable is None else frozenset(usable)
        self._specialised = frozenset(specialised)
        self._nodes = nodes
        self._ours = ours
        self._mask_of = mask_of
        self._inotify = Inotify()
        self._by_watch: dict[int, _Directory] = {}
        self._by_path: dict[str, _Directory] = {}
        self._jobs: dict[Key, _JobState] = {}
        self._systems: dict[str, frozenset[int]] = {}      # Slurm's own groups → their cpusets
        self._owners_tasks: set[int] = set()               # tids that are none of Slurm's own
        self._topology = Topology(())
        self._online = ""
        self._next_masks = -math.inf
        self._masks_at = -math.inf
        self._observed: Observed | None = None
        self._mounts = [(str(root / mount.point.lstrip("/")), mount.controllers)
                        for mount in cgroup_mounts(read_text(root / "proc/self/mountinfo"))]
        try:
            self._read_tree()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Readable when the tree has changed."""
        return self._inotify.fd

    def next_deadline(self) -> float:
        """When to call read() although nothing has changed."""
        return self._next_masks

    def read(self, now: float) -> Observed:
        """The node as it is; the same object where nothing is new. Reads only what changed, and masks that are due."""
        changed = self._drain()
        if now >= self._next_masks:
            self._next_masks = now + MASKS_S
            self._masks_at = now
            changed = True
            self._read_topology()
            known: set[int] = set()
            for key, state in self._jobs.items():
                known |= self._read_tasks(key, state)
            self._owners_tasks &= known
        for key, state in self._jobs.items():
            changed |= state.limits_due or state.tasks_due
            if state.limits_due:
                self._read_limits(state)
            if state.tasks_due:
                self._read_tasks(key, state)
        if changed or self._observed is None:
            self._observed = self._facts()
        return self._observed

    def close(self) -> None:
        """Safe to call twice."""
        self._inotify.close()

    # ---- the tree as it changes ------------------------------------------------------------------

    def _read_tree(self) -> None:
        for point, controllers in self._mounts:
            if not controllers or controllers & {"cpuset", "memory", *_LIST_TASKS}:
                self._add(_Directory(point, controllers, "top"))

    def _drain(self) -> bool:
        """Takes what inotify knows; True if anything of it concerns us."""
        changed = False
        for watch, what, name in self._inotify.read():
            if what & Inotify.OVERFLOW:
                log.warning("more changed in the cgroups than inotify keeps; reading them all again")
                self._start_again()
                return True
            directory = self._by_watch.get(watch)
            if directory is None:
                continue             # of a directory that is gone
            if what & Inotify.IGNORED:
                self._forget(directory.path)
                changed = True
            elif what & Inotify.ISDIR:
                path = f"{directory.path}/{name}"
                if what & (Inotify.CREATE | Inotify.MOVED_TO):
                    # Of the same name as one that was removed, maybe.
                    self._forget(path)
                    changed |= self._found(directory, name)
                elif what & (Inotify.DELETE | Inotify.MOVED_FROM):
                    changed |= self._forget(path)
            elif directory.job is not None:
                state = self._jobs[directory.job]
                state.limits_due |= directory.place == "job" and name in _LIMITS
                # A cpuset that changes takes the masks of its tasks along.
                state.tasks_due |= name in _TASKS or name == "cpuset.cpus"
            elif name in _LIMITS and directory.path in self._systems:
                self._read_system(directory)
                changed = True
        return changed

    def _start_again(self) -> None:
        for path in list(self._by_path):
            self._forget(path)
        self._inotify.close()
        self._inotify = Inotify()
        self._read_tree()
        self._next_masks = -math.inf

    def _add(self, directory: _Directory) -> None:
        watch = self._inotify.add(directory.path)
        if watch is None:
            return
        directory.watch = watch
        self._by_watch[watch] = directory
        self._by_path[directory.path] = directory
        if directory.place == "system":
            self._read_system(directory)
        if directory.job is not None:
            state = self._jobs.setdefault(directory.job, _JobState())
            state.directories[directory.path] = directory
            state.limits_due = state.tasks_due = True
            if state.uid is None:
                state.uid = directory.uid
        # What was made before the watch was there. After it, inotify tells, and telling twice does no harm.
        with suppress(FileNotFoundError):
            with os.scandir(directory.path) as entries:
                for name in [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]:
                    self._found(directory, name)

    def _found(self, parent: _Directory, name: str) -> bool:
        """A directory in one that we watch; True if it concerns us."""
        directory = self._describe(parent, name)
        if directory is None or directory.path in self._by_path:
            return False
        parent.children.add(name)
        self._add(directory)
        return True

    def _describe(self, parent: _Directory, name: str) -> _Directory | None:
        path, controllers = f"{parent.path}/{name}", parent.controllers
        match parent.place:
            case "top" | "slice":
                found = (_NODE_V1 if controllers else _NODE_V2).fullmatch(name)
                if found:
                    node = found[1] or ""
                    if self._nodes is not None and node not in self._nodes:
                        return None
                    return _Directory(path, controllers, "node", node=node)
                if not controllers and name.endswith(".slice"):
                    return _Directory(path, controllers, "slice")
                return None
            case "node" | "uid":
                if name == "system":
                    return _Directory(path, controllers, "system", node=parent.node)
                if found := re.fullmatch(r"uid_(\d+)", name):
                    return _Directory(path, controllers, "uid", node=parent.node, uid=int(found[1]))
                if found := _JOB.fullmatch(name):
                    return _Directory(path, controllers, "job", job=(parent.node, found[1] or found[2]),
                                      node=parent.node, uid=parent.uid)
                return None
            case "system":
                return None
            case place:
                step = name if place == "job" else parent.step
                return _Directory(path, controllers, "step" if place == "job" else "below", job=parent.job,
                                  node=parent.node, uid=parent.uid, step=step, leaf=name)

    def _forget(self, path: str) -> bool:
        """The directory is gone, with all below it; True if we knew it."""
        directory = self._by_path.pop(path, None)
        if directory is None:
            return False
        for name in directory.children:
            self._forget(f"{path}/{name}")
        self._by_watch.pop(directory.watch, None)
        self._systems.pop(path, None)
        if directory.job is not None and (state := self._jobs.get(directory.job)) is not None:
            state.directories.pop(path, None)
            state.limits_due = state.tasks_due = True
            if not state.directories:
                del self._jobs[directory.job]
        return True

    # ---- what the files say ----------------------------------------------------------------------

    def _read_topology(self) -> None:
        online = read_text(self._root / "sys/devices/system/cpu/online")
        if online != self._online or not self._topology.cpus:
            self._topology = read_topology(self._root)
            self._online = online

    def _read_system(self, directory: _Directory) -> None:
        """Slurm keeps its own daemons, and so the CPUs that are kept from jobs, in a group of their own."""
        if not directory.controllers or "cpuset" in directory.controllers:
            self._systems[directory.path] = frozenset(cpu_list(read_text(Path(directory.path, "cpuset.cpus"))))

    def _read_limits(self, state: _JobState) -> None:
        state.limits_due = False
        cpus: set[int] = set()
        memory: list[int] = []
        for directory in list(state.directories.values()):
            if directory.place != "job":
                continue
            if not directory.controllers or "cpuset" in directory.controllers:
                # Empty: in v1 not yet set, in v2 whatever its parent has.
                cpus.update(cpu_list(read_text(Path(directory.path, "cpuset.cpus"))))
            if not directory.controllers or "memory" in directory.controllers:
                file = "memory.limit_in_bytes" if directory.controllers else "memory.max"
                text = read_text(Path(directory.path, file)).strip()
                if text.isdecimal() and int(text) < V1_NO_LIMIT:
                    memory.append(int(text))
        state.cpus = frozenset(cpus) or None
        state.memory_bytes = max(memory, default=None)

    def _read_tasks(self, key: Key, state: _JobState) -> set[int]:
        """Reads the masks of all of a job's tasks."""
        state.tasks_due = False
        union, count = 0, 0
        tids: set[int] = set()
        mask_of = self._mask_of or task_mask
        all_of_it = []
        for directory in self._task_lists(key, state):
            # Slurm's own helpers are in none of these.
            plain = directory.leaf.startswith("task_") and directory.step != "step_extern"
            if plain and self._mask_of is None:
                all_of_it.append(directory.tasks_file)
                continue
            for tid in _tids(directory.tasks_file):
                if tid in tids:
                    continue
                tids.add(tid)
                if not plain and self._is_helper(tid, directory.step):
                    continue
                # 0: a task that another pid namespace hides from us.
                mask = mask_of(tid) if tid else -1
                if mask is not None:
                    union |= mask
                    count += 1
        if all_of_it:
            mask, more = _union_of_masks(all_of_it)
            union, count = union | mask, count + more
        state.mask = union if count else None
        return tids

    def _task_lists(self, key: Key, state: _JobState) -> list[_Directory]:
        """The directories whose lists together name every task of the job that is an owner's."""
        own_step = self._ours[1] if self._ours is not None and self._ours[0] == key[1] else ""
        lists = [directory for directory in state.directories.values()
                 if directory.leaf not in ("slurm", "system") and (not own_step or directory.step != own_step)]
        telling = [directory for directory in lists
                   if not directory.controllers or directory.controllers & {*_LIST_TASKS}]
        return telling or lists

    def _is_helper(self, tid: int, step: str) -> bool:
        """Slurm's own: its step daemon, and what keeps the step open that stands for the allocation."""
        if tid in self._owners_tasks:
            return False
        name = self._name(tid)
        helper = name == "slurmstepd" or (step == "step_extern" and name == "sleep")
        if helper or self._leader_s_name(tid) == "slurmstepd":
            return True              # not for ever: a daemon's fork becomes the user's program
        self._owners_tasks.add(tid)
        return False

    def _name(self, tid: int) -> str:
        return read_text(self._root / f"proc/{tid}/comm").strip()

    def _leader_s_name(self, tid: int) -> str:
        """Of the process that the thread is of: the daemon's own threads have other names (acctg, acctg_prof)."""
        for line in read_text(self._root / f"proc/{tid}/status").splitlines():
            name, _, value = line.partition(":")
            if name == "Tgid" and value.strip().isdecimal() and int(value) != tid:
                return self._name(int(value))
        return ""

    def _facts(self) -> Observed:
        jobs = []
        for (node, number), state in sorted(self._jobs.items()):
            seen = state.mask is not None
            jobs.append(Job(
                name=f"{node}/{number}" if node else number, uid=state.uid, cpus=state.cpus,
                mask=cpus_of_mask(state.mask, self._topology.cpus) if state.mask is not None else None,
                memory_bytes=state.memory_bytes, pending=state.cpus is None and not seen))
        return Observed(topology=self._topology, jobs=tuple(jobs), usable=self._usable, masks_at=self._masks_at,
                        specialised=self._specialised.union(*self._systems.values()))


# --- all of it ---------------------------------------------------------------

class NodeWatch:
    """The detector on what is read here. Call `step` when `fileno` is readable or `next_deadline` has come."""

    def __init__(self, detector: Detector, observer: Observer, root: Path = Path("/")) -> None:
        self.detector = detector
        self.observer = observer
        self.jobs: frozenset[str] = frozenset()      # numbers of those whose groups say what is theirs
        self._load = LoadReader(root)
        self._next_load = -math.inf

    def fileno(self) -> int:
        """Readable when the tree has changed."""
        return self.observer.fileno()

    def next_deadline(self) -> float:
        """When to call step() although nothing has changed."""
        masks = self.observer.next_deadline()
        return min(masks, self._next_load) if self.detector.wants_load else masks

    def step(self, now: float, ours_s: dict[int, float] | None = None) -> Report:
        """What may be lent now; `ours_s` is the CPU time that our workers used on each CPU so far."""
        observed = self.observer.read(now)
        self.jobs = frozenset(job.name.rpartition("/")[2] for job in observed.jobs if not job.pending)
        self.detector.observe(observed)
        if now >= self._next_load and self.detector.wants_load:
            # Missed samples aren't made up for.
            self._next_load = max(self._next_load + SAMPLE_S, now + SAMPLE_S / 2)
            self.detector.sample(self._load.read(now, ours_s))
        return self.detector.report(now)

    def close(self) -> None:
        """Safe to call twice."""
        self._load.close()
        self.observer.close()

"""Real owners in real cgroups, a detector that lends their cores, and a watcher that reads only /proc and judges it.

    python tests/owners.py [--seconds S] [--seed N] [--blind]

Prints one JSON object: what was judged, and every core that was lent outside the rule of its class. `--blind` runs a
detector that takes every mask for CPU 0, which the watcher must notice. Needs root and a cpuset controller.

      owners (forked)                 detector (forked)              watcher (this process)
      move, spin, change their ─────▶ cgroup files, masks,  ──pipe─▶ /proc/PID/cgroup, /proc/PID/task/*,
      masks, come and go              /proc/stat                     before and after each report
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import select
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from rfaas_mpi.agent.classes import CoreClass  # noqa: E402
from rfaas_mpi.agent.detector import Detector, Policy  # noqa: E402
from rfaas_mpi.agent.kernel_files import cgroup_mounts, cpu_list, ranges  # noqa: E402
from rfaas_mpi.agent.observer import NodeWatch, Observer  # noqa: E402

CPUS = sorted(os.sched_getaffinity(0))
# Samples further apart say nothing about what was in between; a slow machine needs more. Owners change no faster.
PACE = float(os.environ.get("RFAAS_OWNERS_PACE", "1"))
CLOSE_S = 0.25 * PACE
HELD_S = 0.3 * PACE                  # what an owner lets a mask stand at the least


# --- the owners' cgroups -----------------------------------------------------

class Groups:
    """The tree that Slurm would make for one slurmd of this name, on v1 or v2."""

    def __init__(self, name: str) -> None:
        self.name = name
        mounts = list(cgroup_mounts(Path("/proc/self/mountinfo").read_text()))
        v1 = {controller: mount.point for mount in mounts for controller in mount.controllers}
        self.v2 = "cpuset" not in v1
        if self.v2:
            top = Path(next(mount.point for mount in mounts if not mount.controllers))
            self.tops = {"": top / "system.slice" / f"{name}_slurmstepd.scope"}
        else:
            self.tops = {controller: Path(v1[controller]) / f"slurm_{name}" for controller in ("cpuset", "freezer")
                         if controller in v1}
        for top in self.tops.values():
            self._make(top, CPUS)
            if not self.v2:
                self._make(top / "uid_0", CPUS)

    def _make(self, directory: Path, cpus: list[int] | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if self.v2:
            if directory.name != "task_0":
                parent = directory.parent / "cgroup.subtree_control"
                for file in (parent, directory / "cgroup.subtree_control"):
                    file.write_text("+cpuset")
        elif "/cpuset/" in str(directory) and cpus is not None:
            (directory / "cpuset.mems").write_text((directory.parent / "cpuset.mems").read_text())
            (directory / "cpuset.cpus").write_text(ranges(cpus))

    def _chain(self, top: Path, job: int) -> list[Path]:
        base = top / f"job_{job}" if self.v2 else top / "uid_0" / f"job_{job}"
        inner = ("step_0", "user", "task_0") if self.v2 else ("step_0", "task_0")
        return [base, *(base.joinpath(*inner[:depth]) for depth in range(1, len(inner) + 1))]

    def begin(self, job: int, cpus: list[int] | None) -> None:
        """A job with this cpuset; None: without any."""
        for controller, top in self.tops.items():
            if controller == "cpuset" and cpus is None:
                continue
            for directory in self._chain(top, job):
                self._make(directory, cpus)
            if self.v2 and cpus is not None:
                (self._chain(top, job)[0] / "cpuset.cpus").write_text(ranges(cpus))

    def resize(self, job: int, cpus: list[int]) -> None:
        """Another cpuset for the job: first what its groups have in common with it, then the rest."""
        top = self.tops["" if self.v2 else "cpuset"]
        if self.v2:
            (self._chain(top, job)[0] / "cpuset.cpus").write_text(ranges(cpus))
            return
        chain = self._chain(top, job)
        now = cpu_list((chain[0] / "cpuset.cpus").read_text())
        for directory in chain:
            (directory / "cpuset.cpus").write_text(ranges({*now, *cpus}))
        for directory in reversed(chain):
            (directory / "cpuset.cpus").write_text(ranges(cpus))

    def enter(self, job: int) -> None:
        """Moves the caller there."""
        for top in self.tops.values():
            directory = self._chain(top, job)[-1]
            if directory.is_dir():
                (directory / "cgroup.procs").write_text(str(os.getpid()))

    def end(self, job: int) -> None:
        for top in self.tops.values():
            for directory in reversed(self._chain(top, job)):
                self._remove(directory)

    def close(self) -> None:
        for top in self.tops.values():
            for directory in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
                self._remove(directory)
            self._remove(top)

    @staticmethod
    def _remove(directory: Path) -> None:
        # A process that has ended is still in its group for a moment.
        for _ in range(200):
            try:
                directory.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.01)
        directory.rmdir()


# --- the owners ---------------------------------------------------------------

def child(body: Callable[[], None]) -> int:
    """A forked process that runs `body`, and ends with us."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # PR_SET_PDEATHSIG
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() == parent:
            body()
    finally:
        os._exit(0)


def owner(groups: Groups, job: int, seed: int) -> None:
    """A task with a thread, each of which goes where it likes within its job."""
    chance = random.Random(seed)
    groups.enter(job)

    def live(chance: random.Random) -> None:
        while True:
            # Mostly all of a job's tasks are in one place, and leave the rest of its cpuset.
            mask = [CPUS[job % len(CPUS)]] if chance.random() < 0.9 else chance.sample(
                CPUS, chance.randint(1, len(CPUS)))
            with suppress(OSError):          # the cpuset has none of these
                os.sched_setaffinity(0, mask)
            if chance.random() < 0.2:
                until = time.monotonic() + 0.4
                while time.monotonic() < until:
                    pass
            time.sleep(chance.choice((HELD_S, 1.0, 5.0, 9.0)))

    threading.Thread(target=live, args=(random.Random(chance.random()),), daemon=True).start()
    live(chance)


def owners(groups: Groups, seed: int) -> None:
    """Jobs come, are resized and go, for ever."""
    chance = random.Random(seed)
    jobs: dict[int, tuple[list[int] | None, list[int]]] = {}
    number = 0
    while True:
        what = chance.choice(("begin", "begin", "end", "resize", "nothing", "nothing"))
        if what == "begin" and len(jobs) < 2:
            number += 1
            # Most with a part of the node: the rest of it is free.
            cpus = None if chance.random() < 0.15 and not groups.v2 else chance.sample(
                CPUS, chance.choice((len(CPUS), len(CPUS), chance.randint(1, len(CPUS)))))
            groups.begin(number, cpus)
            pids = [child(lambda seed=chance.random(), job=number: owner(groups, job, seed))
                    for _ in range(chance.choice((1, 1, 2)))]
            jobs[number] = (cpus, pids)
        elif what == "end" and jobs:
            job = chance.choice(list(jobs))
            for pid in jobs[job][1]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            groups.end(job)
            del jobs[job]
        elif what == "resize" and jobs and jobs[job := chance.choice(list(jobs))][0] is not None:
            groups.resize(job, chance.sample(CPUS, chance.randint(1, len(CPUS))))
        time.sleep(chance.choice((0.4, 1.0, 4.0)))


# --- the detector ---------------------------------------------------------------

def detect(name: str, out: int, blind: bool) -> None:
    """Reports for ever: a line (begin, end, begin and end of the last reading of all masks, CPU → class) each."""
    observer = Observer(nodes=[name], mask_of=(lambda tid: 1 << CPUS[0]) if blind else None)
    policy = Policy(by_default=frozenset((CoreClass.UNUSED, CoreClass.IDLE)), low_priority=True,
                    buffer_share=0.0, buffer_least=0)
    watch = NodeWatch(Detector(policy), observer)
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    masks_at, masks_end = -math.inf, -math.inf
    while True:
        begin = time.monotonic()
        report = watch.step(begin)
        end = time.monotonic()
        if watch.detector._observed.masks_at != masks_at:
            masks_at, masks_end = watch.detector._observed.masks_at, end
        lent = {core.cpu: core.which for core in report.cores if core.spare}
        os.write(out, json.dumps([begin, end, masks_at, masks_end, lent]).encode() + b"\n")
        poll.poll(max(0.0, 1000 * (watch.next_deadline() - time.monotonic())))


# --- the watcher ------------------------------------------------------------------

@dataclass
class Sample:
    """What /proc said of the owners' tasks, between two times."""

    begin: float
    end: float = 0.0
    masks: dict[int, frozenset[int]] = field(default_factory=dict)
    ticks: dict[int, int] = field(default_factory=dict)


def look(name: str) -> Sample:
    """All tasks of owners, found by the cgroups that they say they are in."""
    sample = Sample(time.monotonic())
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with suppress(FileNotFoundError, ProcessLookupError):
            if name not in Path(entry.path, "cgroup").read_text():
                continue
            for task in os.scandir(f"{entry.path}/task"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    status = Path(task.path, "status").read_text()
                    if re.search(r"^State:\s+[ZX]", status, re.MULTILINE):
                        continue
                    found = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.MULTILINE)
                    stat = Path(task.path, "stat").read_text().rpartition(")")[2].split()
                    sample.masks[int(task.name)] = frozenset(cpu_list(found[1])) if found else frozenset(CPUS)
                    sample.ticks[int(task.name)] = int(stat[11]) + int(stat[12])
    sample.end = time.monotonic()
    return sample


class Judge:
    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=2000)
        self.judged: Counter[str] = Counter()
        self.unknown = 0
        self.violations: list[str] = []
        self.masks_age_s = 0.0
        self.gap_s = 0.0
        self.reports = 0
        self._last = 0.0

    def judge(self, begin: float, end: float, masks_at: float, masks_end: float, lent: dict[int, str]) -> None:
        self.reports += 1
        self.masks_age_s = max(self.masks_age_s, begin - masks_at)
        if self._last:
            self.gap_s = max(self.gap_s, begin - self._last)
        self._last = begin
        for cpu, which in lent.items():
            first, last = (masks_at, masks_end) if which == CoreClass.UNUSED else (begin, end)
            around = self._around(first, last)
            if around is None:
                self.unknown += 1
                continue
            self.judged[which] += 1
            everywhere = set.intersection(*({tid for tid, mask in sample.masks.items() if cpu in mask}
                                            for sample in around))
            if which == CoreClass.IDLE:
                everywhere = {tid for tid in everywhere if self._ran(tid, cpu, begin)}
            if everywhere:
                self.violations.append(f"{cpu} was lent as {which} at {begin:.3f} (masks of {masks_at:.3f}): tasks "
                                       f"{sorted(everywhere)} may run there")

    def _around(self, first: float, last: float) -> list[Sample] | None:
        """The samples from the last one before to the first one after, if they are close to each other."""
        before = [sample for sample in self.samples if sample.end <= first]
        after = [sample for sample in self.samples if sample.begin >= last]
        if not before or not after:
            return None
        around = [before[-1], *(sample for sample in self.samples
                                if sample.begin > before[-1].begin and sample.end < after[0].end), after[0]]
        return around if around[-1].end - around[0].begin < CLOSE_S else None

    def _ran(self, tid: int, cpu: int, until: float) -> bool:
        """The task, which may run there only, was busy in the last while."""
        window = [sample for sample in self.samples if until - 1.9 <= sample.begin and sample.end <= until]
        if len(window) < 2 or any(sample.masks.get(tid) != frozenset((cpu,)) for sample in window):
            return False
        return window[-1].ticks[tid] - window[0].ticks[tid] > 8


def run(seconds: float, seed: int, blind: bool, least: int) -> dict:
    """At least so long, and until so many cores of each kind were judged, but no longer than thirty times as long."""
    name = f"rfaastest{os.getpid()}"
    groups = Groups(name)
    reading, writing = os.pipe()
    pids: list[int] = []
    judge = Judge()
    try:
        pids.append(child(lambda: detect(name, writing, blind)))
        # Owners of their own session: killed as one.
        pids.append(child(lambda: (os.setsid(), owners(groups, seed))))
        os.close(writing)
        os.set_blocking(reading, False)
        waiting: deque[list] = deque()
        rest = b""
        began = time.monotonic()
        while True:
            took = time.monotonic() - began
            enough = all(judge.judged[which] >= least for which in (CoreClass.FREE, CoreClass.UNUSED))
            if (took > seconds and (enough or judge.violations)) or took > 30 * seconds:
                break
            judge.samples.append(look(name))
            with suppress(BlockingIOError):
                data = os.read(reading, 1 << 16)
                if not data:
                    raise RuntimeError("the detector has ended")
                *lines, rest = (rest + data).split(b"\n")
                waiting.extend(json.loads(line) for line in lines)
            while waiting and waiting[0][1] < judge.samples[-1].begin:
                *times, lent = waiting.popleft()
                judge.judge(*times, {int(cpu): which for cpu, which in lent.items()})
            time.sleep(0.02)
        return {"seconds": round(took, 1), "cgroups": "v2" if groups.v2 else "v1", "reports": judge.reports,
                "judged": dict(judge.judged), "unknown": judge.unknown, "masks_age_s": round(judge.masks_age_s, 3),
                "gap_s": round(judge.gap_s, 3), "samples": len(judge.samples), "violations": judge.violations[:20],
                "violations_count": len(judge.violations)}
    finally:
        os.close(reading)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        groups.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--least", type=int, default=20, help="so many cores of each kind must have been judged")
    parser.add_argument("--blind", action="store_true")
    options = parser.parse_args()
    print(json.dumps(run(options.seconds, options.seed, options.blind, options.least)))

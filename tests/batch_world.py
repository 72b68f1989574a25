"""A batch node that lives at random, as files: jobs, their cgroups in every layout, tasks, masks and loads.

It knows the truth, and judges a detector's reports by the rules of the classes, written down here once more.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rfaas_mpi.agent.classes import CoreClass
from rfaas_mpi.agent.detector import Detector, Load, Policy, Report, Told
from rfaas_mpi.agent.kernel_files import ranges
from rfaas_mpi.agent.observer import Observer

LAYOUTS = ("v1", "v1 without cpusets", "v2", "v2 without cpusets", "v2 by SLUID", "hybrid")
MEMORY = 64 << 30
SAMPLES = 20
SETTLED_S = 1.4
ANYTHING = frozenset((CoreClass.UNUSED, CoreClass.IDLE))


@dataclass
class Task:
    tid: int
    step: str
    group: str
    masks: list[tuple[float, frozenset[int]]] = field(default_factory=list)   # since when it had which

    def mask_at(self, when: float) -> frozenset[int] | None:
        """Its mask at that time; None if it did not exist yet."""
        return next((mask for since, mask in reversed(self.masks) if since <= when), None)


@dataclass
class TheJob:
    number: int
    name: str
    born: float
    cpus: frozenset[int] | None = None          # its cpuset
    memory: int | None = None
    tasks: dict[int, Task] = field(default_factory=dict)


class World:
    """One node, its files below `root`, and the truth about it."""

    def __init__(self, root: Path, seed: int, layout: str) -> None:
        self.random = random.Random(seed)
        self.root, self.layout = root, layout
        self.now = 100.0
        threads = self.random.choice((1, 2))
        cores = self.random.choice((2, 4, 8))
        self.cpus = tuple(range(cores * threads))
        self.core_of = {cpu: cpu % cores for cpu in self.cpus}
        self.jobs: dict[int, TheJob] = {}
        self.helpers: dict[int, tuple[str, frozenset[int]]] = {}
        self.ticks = dict.fromkeys(self.cpus, 0)
        self.busy = dict.fromkeys(self.cpus, 0)              # ticks that owners use in each sample from now on
        self.used: list[dict[int, int]] = []                 # the last samples
        self.specialised: frozenset[int] = frozenset()
        self.numbers = iter(range(1, 1 << 40))
        self.tids = iter(range(1000, 1 << 40))
        self.policy = Policy(memory_reserve=1 << 30)
        self.told: dict[str, Told] = {}
        self.events: Counter[str] = Counter()
        self.lent: Counter[CoreClass] = Counter()
        self.on_tick: Callable[[], None] = lambda: None
        self._write_machine()

    # ---- files -----------------------------------------------------------------------------------

    def _write_machine(self) -> None:
        cpu_files = self.root / "sys/devices/system/cpu"
        for cpu in self.cpus:
            (cpu_files / f"cpu{cpu}/topology").mkdir(parents=True)
            siblings = [other for other in self.cpus if self.core_of[other] == self.core_of[cpu]]
            (cpu_files / f"cpu{cpu}/topology/core_cpus_list").write_text(ranges(siblings) + "\n")
        (cpu_files / "online").write_text(f"0-{self.cpus[-1]}\n")
        proc = self.root / "proc/self"
        proc.mkdir(parents=True)
        (self.root / "proc/meminfo").write_text(f"MemTotal: {MEMORY >> 10} kB\n")
        lines, number = [], 30
        for controllers, point in self._mounts():
            (self.root / point).mkdir(parents=True, exist_ok=True)
            kind = f"cgroup cgroup rw,{controllers}" if controllers else "cgroup2 cgroup2 rw"
            lines.append(f"{number} 1 0:{number} / /{point} rw,relatime - {kind}\n")
            number += 1
        (proc / "mountinfo").write_text("".join(lines))

    def _mounts(self) -> list[tuple[str, str]]:
        base = "sys/fs/cgroup"
        v1 = [(name, f"{base}/{name}") for name in ("cpuset", "memory", "freezer")]
        if self.layout.startswith("v2"):
            return [("", base)]
        return [*v1, ("", f"{base}/unified")] if self.layout == "hybrid" else v1

    def _tops(self, job: TheJob) -> list[tuple[str, Path]]:
        """(controllers, directory) of a job in each hierarchy."""
        found = []
        for controllers, point in self._mounts():
            if controllers == "cpuset" and "without" in self.layout:
                continue
            if not controllers and self.layout == "hybrid":
                continue
            inside = (f"slurm/uid_1000/job_{job.number}" if controllers
                      else f"system.slice/slurmstepd.scope/{'job_' if 'SLUID' not in self.layout else ''}{job.name}")
            found.append((controllers, self.root / point / inside))
        return found

    def _group(self, job: TheJob, controllers: str, top: Path, step: str, group: str) -> Path:
        return top / step / group if controllers else top / step / "user" / group

    def _write_job(self, job: TheJob) -> None:
        for controllers, top in self._tops(job):
            top.mkdir(parents=True, exist_ok=True)
            if controllers == "cpuset" or (not controllers and "without" not in self.layout):
                (top / "cpuset.cpus").write_text(ranges(job.cpus or ()) + "\n")
            if controllers in ("memory", ""):
                none = "max" if not controllers else "9223372036854771712"
                name = "memory.limit_in_bytes" if controllers else "memory.max"
                (top / name).write_text(f"{none if job.memory is None else job.memory}\n")

    def _write_group(self, job: TheJob, step: str, group: str) -> None:
        for controllers, top in self._tops(job):
            directory = self._group(job, controllers, top, step, group)
            directory.mkdir(parents=True, exist_ok=True)
            tids = [task.tid for task in job.tasks.values() if (task.step, task.group) == (step, group)]
            if group == "task_special":
                tids += [tid for tid, (name, _) in self.helpers.items() if name == f"{job.name} sleep"]
            (directory / ("tasks" if controllers else "cgroup.threads")).write_text(
                "".join(f"{tid}\n" for tid in tids))

    # ---- what happens ----------------------------------------------------------------------------

    def mask_of(self, tid: int) -> int | None:
        """As the kernel would say it."""
        for job in self.jobs.values():
            if tid in job.tasks:
                return sum(1 << cpu for cpu in job.tasks[tid].masks[-1][1])
        return sum(1 << cpu for cpu in self.helpers[tid][1]) if tid in self.helpers else None

    def some(self, of: tuple[int, ...] | frozenset[int], least: int = 1) -> frozenset[int]:
        cpus = sorted(of)
        return frozenset(self.random.sample(cpus, self.random.randint(min(least, len(cpus)), len(cpus))))

    def step(self) -> str:
        """One event; what it was."""
        self.now += 0.001
        choices = {"time": 12, "job": 1 if len(self.jobs) < 3 else 0, "policy": 1, "load": 3, "specialised": 0.1}
        if self.jobs:
            choices.update(task=4, end_task=2, mask=4, cpuset=1.5, memory=0.5, end_job=0.6, told=0.5)
        what = self.random.choices(list(choices), list(choices.values()))[0]
        job = self.random.choice(list(self.jobs.values())) if self.jobs else None
        match what:
            case "time":
                # Long enough now and then for idle cores and settled masks.
                for _ in range(self.random.choice((1, 1, 3, 25))):
                    self.tick()
                    self.on_tick()
            case "job":
                self._new_job()
            case "policy":
                self._new_policy()
            case "load":
                self.busy[self.random.choice(self.cpus)] = self.random.choice((0, 0, 1, 2, 5, 10))
            case "specialised":
                self.specialised = self.some(self.cpus, 0)
                inside = ("system.slice/slurmstepd.scope" if self.layout.startswith("v2") else "cpuset/slurm")
                system = self.root / "sys/fs/cgroup" / inside / "system"
                system.mkdir(parents=True, exist_ok=True)
                (system / "cpuset.cpus").write_text(ranges(self.specialised) + "\n")
            case "task" if job is not None:
                self._new_task(job)
            case "end_task" if job is not None and job.tasks:
                task = self.random.choice(list(job.tasks.values()))
                del job.tasks[task.tid]
                self._write_group(job, task.step, task.group)
            case "mask" if job is not None and job.tasks:
                task = self.random.choice(list(job.tasks.values()))
                task.masks.append((self.now, self.some(self._within(job))))
            case "cpuset" if job is not None and "without" not in self.layout:
                self._set_cpuset(job)
            case "memory" if job is not None:
                job.memory = self.random.choice((None, 1 << 30, 8 << 30, 60 << 30))
                self._write_job(job)
            case "told" if job is not None:
                told = self.random.choice((None, Told(self.some(self.cpus), 4 << 30)))
                self.told.pop(job.name, None)
                if told is not None:
                    self.told[job.name] = told
            case "end_job" if job is not None:
                del self.jobs[job.number]
                self.told.pop(job.name, None)
                self.helpers = {tid: helper for tid, helper in self.helpers.items()
                                if helper[0] != f"{job.name} sleep"}
                for _, top in self._tops(job):
                    shutil.rmtree(top)
        self.events[what] += 1
        return what

    def tick(self) -> None:
        """A tenth of a second passes."""
        self.now += 0.1
        used = {}
        for cpu in self.cpus:
            used[cpu] = min(10, self.busy[cpu] + (self.random.random() < 0.01))
            self.ticks[cpu] += used[cpu]
        self.used = [*self.used[-(SAMPLES - 1):], used]

    def _within(self, job: TheJob) -> frozenset[int]:
        return frozenset(self.cpus) if job.cpus is None else job.cpus

    def _new_job(self) -> None:
        number = next(self.numbers)
        name = f"s{number:013d}" if "SLUID" in self.layout else str(number)
        job = self.jobs[number] = TheJob(number, name, self.now)
        if "without" not in self.layout and self.random.random() < 0.9:
            job.cpus = self.some(self.cpus)
        job.memory = self.random.choice((None, 1 << 30, 8 << 30))
        self._write_job(job)
        if self.random.random() < 0.5:
            # What stands for the allocation: no task of the owner's.
            tid = next(self.tids)
            self.helpers[tid] = (f"{job.name} sleep", frozenset(self.cpus))
            (self.root / f"proc/{tid}").mkdir()
            (self.root / f"proc/{tid}/comm").write_text("sleep\n")
            self._write_group(job, "step_extern", "task_special")

    def _new_task(self, job: TheJob) -> None:
        step = f"step_{self.random.choice(('batch', '0', '1'))}"
        group = self.random.choice(("task_0", "task_1", "task_2", ""))
        if self.random.random() < 0.1:
            step, group = "step_extern", "task_special"        # somebody who came by ssh
        task = Task(next(self.tids), step, group, [(self.now, self.some(self._within(job)))])
        job.tasks[task.tid] = task
        self._write_group(job, step, group)

    def _set_cpuset(self, job: TheJob) -> None:
        job.cpus = self.some(self.cpus)
        # The kernel moves the tasks with it.
        for task in job.tasks.values():
            mask = task.masks[-1][1] & job.cpus or job.cpus
            if mask != task.masks[-1][1]:
                task.masks.append((self.now, mask))
        self._write_job(job)

    def _new_policy(self) -> None:
        chance = self.random.random
        some = [frozenset(), frozenset((CoreClass.UNUSED,)), frozenset((CoreClass.IDLE,)), ANYTHING]
        self.policy = Policy(
            never=self.some(self.cpus, 0) if chance() < 0.1 else frozenset(),
            specialised=chance() < 0.5, by_default=self.random.choice(some[1:] if chance() < 0.7 else some),
            opted_in={job.name: self.random.choice(some) for job in self.jobs.values() if chance() < 0.3},
            low_priority=chance() < 0.8, buffer_least=self.random.choice((0, 1, 2)), buffer_share=0.1,
            memory_reserve=1 << 30)

    # ---- the judge -------------------------------------------------------------------------------

    def judge(self, report: Report, masks_at: float) -> None:
        """AssertionError names a core that is lent outside the rule of its class, or a free one that isn't lent."""
        by_cpu = {core.cpu: core for core in report.cores}
        assert sorted(by_cpu) == list(self.cpus)
        assert len(set(report.spare)) == len(report.spare)
        needs_idle: set[int] = set()
        for cpu in self.cpus:
            lent = cpu in report.spare
            assert lent == by_cpu[cpu].spare
            parts = [self._truth(thread, masks_at) for thread in self.cpus
                     if self.core_of[thread] == self.core_of[cpu]]
            kinds = {kind for kind, _ in parts}
            if not lent:
                assert by_cpu[cpu].why
                assert kinds != {"free"} or cpu in self.policy.never, (
                    f"{cpu} is free and not lent: {by_cpu[cpu]}")
                continue
            which = by_cpu[cpu].which
            self.lent[which] += 1
            assert cpu not in self.policy.never, f"{cpu} is never to be lent"
            for kind, owners in parts:
                match kind:
                    case "specialised":
                        assert self.policy.specialised, f"{cpu} is specialised"
                    case "unused" if which is CoreClass.UNUSED:
                        assert self._leave(owners, CoreClass.UNUSED), f"{cpu}: nobody gave leave for unused"
                        for thread in self.cpus:
                            if self.core_of[thread] == self.core_of[cpu]:
                                self._is_settled(thread, masks_at)
                    case "masked" | "unused":
                        names = [job.name for job in owners]
                        assert which is CoreClass.IDLE, f"{cpu} may be run on by {names}: {which}"
                        allowed = [CoreClass.IDLE, *([CoreClass.UNUSED] if kind == "unused" else [])]
                        assert any(self._leave(owners, one) for one in allowed), f"{cpu}: no leave for idle"
            if which is CoreClass.IDLE:
                assert self.policy.low_priority, f"{cpu} is lent at full priority"
                for thread in self.cpus:
                    if self.core_of[thread] == self.core_of[cpu] and self._truth(thread, masks_at)[0] == "masked":
                        self._is_quiet(thread)
                needs_idle.add(self.core_of[cpu])
        self._judge_buffers(report, needs_idle, masks_at)
        assert report.memory_bytes <= max(0, MEMORY - (1 << 30) - sum(map(self._memory, self._alive())))

    def _alive(self) -> list[TheJob]:
        return [job for job in self.jobs.values() if job.cpus is not None or job.tasks]

    def _memory(self, job: TheJob) -> int:
        if job.memory is not None:
            return job.memory
        told = self.told.get(job.name)
        return MEMORY if told is None or told.memory_bytes is None else told.memory_bytes

    def _owns(self, job: TheJob) -> frozenset[int]:
        told = self.told.get(job.name)
        if job.cpus is not None:
            return job.cpus
        return frozenset(self.cpus) if told is None or told.cpus is None else told.cpus

    def _truth(self, cpu: int, masks_at: float) -> tuple[str, list[TheJob]]:
        owners, masked = [], False
        for job in self._alive():
            # Masks that were changed since the last reading are unknown to anybody.
            masks = [mask for task in job.tasks.values() if (mask := task.mask_at(masks_at)) is not None]
            now = [task.masks[-1][1] for task in job.tasks.values()]
            reached = any(cpu in mask for mask in masks) and any(cpu in mask for mask in now)
            if cpu in self._owns(job) or reached:
                owners.append(job)
                masked |= reached or not job.tasks
        if owners:
            return ("masked" if masked else "unused"), owners
        # A mask that was not known to have gone may still count.
        if any(cpu in mask for job in self._alive() for task in job.tasks.values() for _, mask in task.masks):
            return "left", []
        return ("specialised" if cpu in self.specialised else "free"), []

    def _leave(self, owners: list[TheJob], which: CoreClass) -> bool:
        return all(which in self.policy.opted_in.get(job.name, self.policy.by_default) for job in owners)

    def _is_settled(self, cpu: int, masks_at: float) -> None:
        for job in self._alive():
            if cpu not in self._owns(job):
                continue
            assert job.born <= masks_at - SETTLED_S, f"{cpu} is lent as unused of job {job.name} that has just begun"
            for task in job.tasks.values():
                for when in (masks_at, masks_at - SETTLED_S):
                    assert cpu not in (task.mask_at(when) or ()), f"{cpu} is lent as unused, and was not at {when}"

    def _is_quiet(self, cpu: int) -> None:
        used = [sample[cpu] for sample in self.used]
        assert len(used) == SAMPLES and max(used) < 2, f"{cpu} is lent as idle, but did {used}"
        assert sum(used) <= 10, f"{cpu} is lent as idle, but did {used}"
        assert not (used[-1] and used[-2]), f"{cpu} is lent as idle, but did {used}"

    def _judge_buffers(self, report: Report, needs_idle: set[int], masks_at: float) -> None:
        for job in self._alive():
            reached = [mask for task in job.tasks.values() for mask in (task.mask_at(masks_at), task.masks[-1][1])]
            mine = {self.core_of[cpu] for cpu in self._owns(job).union(*filter(None, reached))}
            lent = mine & needs_idle
            if not lent:
                continue
            left = {core.physical for core in report.cores if core.which is CoreClass.IDLE and not core.spare}
            keeps = max(self.policy.buffer_least, -(-len(mine) // 10))
            assert len(mine & left) >= keeps, f"job {job.name} keeps {mine & left} of its idle cores, lends {lent}"


class Run:
    """A world with a detector that watches it."""

    def __init__(self, root: Path, seed: int, layout: str) -> None:
        self.world = World(root, seed, layout)
        self.observer = Observer(root, mask_of=self.world.mask_of)
        self.detector = Detector(self.world.policy)
        self.world.on_tick = self._after_tick
        self.judged = 0

    def _look(self) -> None:
        world = self.world
        world.now += 0.0001
        observed = self.observer.read(world.now)
        self.detector.observe(observed)
        report = self.detector.report(world.now)
        world.judge(report, observed.masks_at)
        self.judged += 1

    def _after_tick(self) -> None:
        # What the service does ten times a second.
        self.detector.sample(Load(self.world.now, np.array(self.world.cpus), np.array(list(self.world.ticks.values()))))
        self._look()

    def event(self) -> None:
        what = self.world.step()
        if what == "policy":
            self.detector.configure(self.world.policy)
        if what in ("told", "end_job"):
            for name in {*self.detector.told, *self.world.told}:
                self.detector.tell(name, self.world.told.get(name))
        self._look()

    def close(self) -> None:
        self.observer.close()

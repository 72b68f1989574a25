"""What `rfaas doctor` finds inside a Slurm job: the job, how its ranks find each other, what they are bound to, its nodes."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from rfaas_mpi.cli.checks import Check
from rfaas_mpi.cli.output import core_ranges
from rfaas_mpi.errors import RFaaSError
from rfaas_mpi.slurm import facts
from rfaas_mpi.slurm import run as slurm

__all__ = ["binding", "nodes", "release", "slurm_checks", "world"]

OVERLAP = (20, 11)               # steps share cores only if they are told to, from then on
SKEW_S = 3.0                     # as between a node and its manager

# What a rank is told by the side of Slurm that its MPI library speaks with.
_PMI = ("PMI_RANK", "PMI_FD", "PMIX_RANK", "PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK")


def slurm_checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Nothing outside a job."""
    if not environ.get("SLURM_JOB_ID"):
        return
    try:
        job = facts.allocation(environ)
        said = slurm.ask(["srun", "--version"])
        yield release(said, job)
        step = in_step(environ)
        if step:
            yield world(environ)
            settings = slurm.ask(["scontrol", "show", "config"])
            ids = facts.core_ids(slurm.ask(["scontrol", "show", "job", "-d", "-o", str(job.job)]))
            mine = ids.get(environ.get("SLURMD_NODENAME", ""), ())
            yield binding(os.sched_getaffinity(0), len(mine), environ,
                          "task/affinity" in facts.config_value(settings, "TaskPlugin"))
        else:
            yield nodes(job, _look(job))
    except RFaaSError as error:
        yield Check("slurm job", False, Exception.__str__(error), error.hint)


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether this is a task that srun started, and not the batch script."""
    return environ.get("SLURM_STEP_ID", "").isdigit() and int(environ["SLURM_STEP_ID"]) < 0xFFFFFFF0


def release(said: str, job: facts.Allocation) -> Check:
    """Which Slurm, and which job; whether agents can run beside ranks."""
    found = re.search(r"(\d+)\.(\d+)\S*", said)
    version = found[0] if found else "unknown"
    cores = ", ".join(f"{node} {cpus}" for node, cpus in list(zip(job.nodes, job.cpus, strict=True))[:8])
    more = " …" if len(job.nodes) > 8 else ""
    ok = found is not None and (int(found[1]), int(found[2])) >= OVERLAP
    return Check("slurm job", ok, f"job {job.job} of Slurm {version}, CPUs: {cores}{more}",
                 "`rfaas slurm run` needs srun --overlap, of Slurm 20.11 or newer",
                 facts={"job": job.job, "version": version, "nodes": len(job.nodes)})


def world(environ: Mapping[str, str]) -> Check:
    """Whether a step's tasks are ranks of one world, or each a world of its own."""
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1")
    found = [name for name in _PMI if name in environ]
    told = {"tasks": tasks, "pmi": found[0].partition("_")[0] if found else ""}
    if found or tasks == 1:
        way = f" by {told['pmi']}" if found else ""
        return Check("slurm ranks", True, f"{tasks} task{'' if tasks == 1 else 's, ranks of one world'}{way}", facts=told)
    return Check("slurm ranks", False, f"{tasks} tasks, and Slurm tells them nothing of each other: to MPI each is a "
                                       "world of one rank",
                 "srun --mpi=pmi2 with MPICH, --mpi=pmix with Open MPI (`srun --mpi=list`), or the library's own mpiexec",
                 facts=told)


def binding(usable: Collection[int], job_cores: int, environ: Mapping[str, str], binds: bool) -> Check:
    """Whether a rank has cores of its own: one that may use all of its job's leaves none that could be lent."""
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or "1")
    told = {"cores": sorted(usable), "job_cores": job_cores}
    where = f"this task may use cores {core_ranges(usable)}"
    if job_cores == 0 or len(usable) < job_cores:
        return Check("slurm binding", True, where, facts=told)
    if job_cores == 1:
        return Check("slurm binding", True, f"{where}, the only one of its job here", facts=told)
    way = ("srun --cpus-per-task=N --cpu-bind=cores, or --cpu-bind=map_cpu:0" if binds else
           "Slurm binds nothing here (no task/affinity)")
    return Check("slurm binding", False, f"{where}: all {job_cores} that its job has on this node, so that none is spare",
                 f"`rfaas slurm run -- …` binds ranks and lends the others; by hand: {way}",
                 facts={**told, "tasks": tasks})


def nodes(job: facts.Allocation, seen: Mapping[str, tuple[float, bool, bool]]) -> Check:
    """Of each node its clock's distance from ours in seconds, and whether it sees our interpreter and home."""
    wrong = [f"{node} sees no {sys.executable}" for node, (_, python, _) in seen.items() if not python]
    wrong += [f"{node} sees no home directory" for node, (_, _, home) in seen.items() if not home]
    wrong += [f"the clock of {node} is {skew:+.1f} s from ours" for node, (skew, _, _) in seen.items()
              if abs(skew) > SKEW_S]
    wrong += [f"{node} said nothing" for node in job.nodes if node not in seen]
    told = {"skew_s": {node: skew for node, (skew, _, _) in seen.items()}}
    if wrong:
        return Check("slurm nodes", False, "; ".join(wrong[:8]),
                     "rfaas_mpi has to be under the same path on all nodes of a job, and NTP should set their clocks",
                     facts=told)
    return Check("slurm nodes", True, f"{len(seen)} see this interpreter and your home; clocks within "
                                      f"{max(abs(skew) for skew, _, _ in seen.values()):.1f} s", facts=told)


def _look(job: facts.Allocation) -> dict[str, tuple[float, bool, bool]]:
    """Has each node of the job look, by a step of its own."""
    count = str(len(job.nodes))
    python, home = shlex.quote(sys.executable), shlex.quote(str(Path.home()))
    begun = time.time()
    said = slurm.ask(["srun", "--overlap", "--mem=0", "--mpi=none", f"--nodes={count}", f"--ntasks={count}",
                      "--ntasks-per-node=1", "sh", "-c",
                      f'test -x {python}; p=$?; test -d {home}; echo "rfaas $SLURMD_NODENAME $(date +%s.%N) $p $?"'])
    ended = time.time()
    found = {}
    for name, clock, python_status, home_status in re.findall(r"^rfaas (\S+) (\S+) (\d) (\d)$", said, re.MULTILINE):
        # It was read between these two.
        early, late = float(clock) - begun, float(clock) - ended
        skew = 0.0 if late <= 0 <= early else min(early, late, key=abs)
        found[name] = (skew, python_status == "0", home_status == "0")
    return found

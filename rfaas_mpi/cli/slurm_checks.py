"""What `rfaas doctor` finds inside a Slurm job: the job, how its ranks find each other, what they are bound to, its nodes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rfaas_mpi.cli.checks import Check
from rfaas_mpi.cli.output import core_ranges
from rfaas_mpi.errors import RFaaSError
from rfaas_mpi.slurm import facts
from rfaas_mpi.slurm import run as slurm

__all__ = ["Seen", "binding", "confinement", "memlock", "nodes", "release", "slurm_checks", "world"]

OVERLAP = (20, 11)               # steps share cores only if they are told to, from then on
SKEW_S = 3.0                     # as between a node and its manager

MEMLOCK_ENOUGH_KIB = 256 << 10
_LIBRARY_S = 30.0

# What a rank is told by whoever started it, and by which interface.
_PMI = {"PMI_RANK": "PMI", "PMI_FD": "PMI", "PMIX_RANK": "PMIX", "PMIX_NAMESPACE": "PMIX",
        "OMPI_COMM_WORLD_RANK": "PMIX"}
# Which of them a library listens to, by how it calls itself.
_LISTENS = {"MPICH": "PMI", "Open MPI": "PMIX"}
_WAYS = {"PMI": "srun --mpi=pmi2", "PMIX": "srun --mpi=pmix"}


class Seen(NamedTuple):
    """What a node of the job says of itself.

    Its clock's distance from ours in seconds; whether it sees our interpreter and home; what a process may lock, in KiB
    (None: all); and the control groups of a job's step there: "v1", "v2", or "" where it has none.
    """

    skew_s: float
    python: bool
    home: bool
    memlock_kib: int | None = None
    groups: str = ""


def slurm_checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Nothing outside a job."""
    if not environ.get("SLURM_JOB_ID"):
        return
    try:
        job = facts.allocation(environ)
        said = slurm.ask(["srun", "--version"])
        ends = facts.end_of(slurm.read(["squeue", "-h", "-j", str(job.job), "-o", facts.ENDS]), job.job)
        yield release(said, job, None if ends is None else ends - time.time())
        settings = slurm.read(["scontrol", "show", "config"])
        if is_rank(environ):
            yield world(environ, _library())
            ids = facts.core_ids(slurm.read(["scontrol", "show", "job", "-d", "-o", str(job.job)]))
            mine = ids.get(environ.get("SLURMD_NODENAME", ""), ())
            yield binding(os.sched_getaffinity(0), len(mine), environ,
                          "task/affinity" in facts.config_value(settings, "TaskPlugin"))
        else:
            seen = _look(job)
            yield Check("slurm overlap", True, "a step runs beside others on the job's nodes")
            yield nodes(job, seen)
            yield memlock(seen, os.geteuid() == 0)
            yield confinement(seen, settings)
    except RFaaSError as error:
        yield Check("slurm job", False, Exception.__str__(error), error.hint)


def is_rank(environ: Mapping[str, str]) -> bool:
    """Whether this is a task that srun or an mpiexec started, and not the batch script."""
    step = environ.get("SLURM_STEP_ID", "")
    return (step.isdigit() and int(step) < 0xFFFFFFF0) or any(name in environ for name in _PMI)


def release(said: str, job: facts.Allocation, left_s: float | None = None) -> Check:
    """Which Slurm, and which job, with what time left; whether agents can run beside ranks."""
    found = re.search(r"(\d+)\.(\d+)\S*", said)
    version = found[0] if found else "unknown"
    cores = ", ".join(f"{node} {cpus}" for node, cpus in list(zip(job.nodes, job.cpus, strict=True))[:8])
    more = " …" if len(job.nodes) > 8 else ""
    ends = "" if left_s is None else f"; ends in {max(0.0, left_s):.0f} s"
    ok = found is not None and (int(found[1]), int(found[2])) >= OVERLAP
    return Check("slurm job", ok, f"job {job.job} of Slurm {version}, CPUs: {cores}{more}{ends}",
                 "`rfaas slurm run` needs srun --overlap, of Slurm 20.11 or newer",
                 facts={"job": job.job, "version": version, "nodes": len(job.nodes), "left_s": left_s})


def world(environ: Mapping[str, str], library: str = "") -> Check:
    """Whether the tasks are ranks of one world, or each a world of its own; `library` is what MPI's says it is."""
    tasks = int(environ.get("OMPI_COMM_WORLD_SIZE") or environ.get("PMI_SIZE") or environ.get("SLURM_STEP_NUM_TASKS")
                or environ.get("SLURM_NTASKS") or "1")
    told = sorted({way for name, way in _PMI.items() if name in environ})
    name = next((each for each in _LISTENS if library.startswith(each)), "")
    launcher = ("mpiexec of Open MPI" if "OMPI_COMM_WORLD_SIZE" in environ else
                "mpiexec of MPICH" if "MPI_LOCALNRANKS" in environ else "srun")
    known = {"tasks": tasks, "pmi": told[0] if told else "", "launcher": launcher, "library": name}
    count = f"{tasks} task{'' if tasks == 1 else 's'} of {launcher}"
    fix = "srun --mpi=pmi2 with MPICH, --mpi=pmix with Open MPI (`srun --mpi=list`), or the library's own mpiexec"
    if tasks == 1:
        return Check("slurm ranks", True, count + (f", told by {told[0]}" if told else ""), facts=known)
    if not told:
        return Check("slurm ranks", False, f"{count}, which are told nothing of each other: to MPI each is a world of one "
                                           "rank", fix, facts=known)
    if name and _LISTENS[name] not in told:
        heard = _LISTENS[name]
        return Check("slurm ranks", False, f"{count}, told of each other by {told[0]}, and {name} listens to {heard}: each is "
                                           "a world of one rank, or doesn't start",
                     f"{_WAYS[heard]}, or the mpiexec of {name}", facts=known)
    return Check("slurm ranks", True, f"{count}, ranks of one world by {told[0]}" + (f"; {name}" if name else ""),
                 facts=known)


def _library() -> str:
    """What MPI's library, as mpi4py finds it, says that it is; "" where there is none. Nothing is initialised."""
    look = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    try:
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, timeout=_LIBRARY_S, check=False,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


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


def nodes(job: facts.Allocation, seen: Mapping[str, Seen]) -> Check:
    """Whether each node sees our interpreter and home, and how far its clock is from ours."""
    wrong = [f"{node} sees no {sys.executable}" for node, one in seen.items() if not one.python]
    wrong += [f"{node} sees no home directory" for node, one in seen.items() if not one.home]
    wrong += [f"the clock of {node} is {one.skew_s:+.1f} s from ours" for node, one in seen.items()
              if abs(one.skew_s) > SKEW_S]
    wrong += [f"{node} said nothing" for node in job.nodes if node not in seen]
    told = {"skew_s": {node: one.skew_s for node, one in seen.items()}}
    if wrong:
        return Check("slurm nodes", False, "; ".join(wrong[:8]),
                     "rfaas_mpi has to be under the same path on all nodes of a job, and NTP should set their clocks",
                     facts=told)
    return Check("slurm nodes", True, f"{len(seen)} see this interpreter and your home; clocks within "
                                      f"{max(abs(one.skew_s) for one in seen.values()):.1f} s", facts=told)


def memlock(seen: Mapping[str, Seen], root: bool) -> Check:
    """Whether what verbs registers may be locked on all nodes; Slurm may hand on the limit of the node for logins."""
    limits = {node: one.memlock_kib for node, one in seen.items()}
    least = min((limit for limit in limits.values() if limit is not None), default=None)
    told = {"memlock_kib": limits}
    if least is None:
        return Check("slurm memlock", True, "a step's processes may lock any memory", facts=told)
    tight = [node for node, limit in limits.items() if limit is not None and limit < MEMLOCK_ENOUGH_KIB]
    where = f"a step's processes may lock {least} KiB" + (f" on {', '.join(tight[:8])}" if tight else "")
    return Check("slurm memlock", root or not tight, where + ("; root's are not bound by it" if root else ""),
                 "only verbs needs it: PropagateResourceLimitsExcept=MEMLOCK in slurm.conf, LimitMEMLOCK=infinity in "
                 "slurmd's unit", facts=told)


def confinement(seen: Mapping[str, Seen], settings: str) -> Check:
    """By which control groups a job's steps are held together, and kept on its cores."""
    kinds = sorted({one.groups for one in seen.values()})
    keeps = ("task/cgroup" in facts.config_value(settings, "TaskPlugin")
             and facts.config_value(settings, "ConstrainCores") == "yes")
    told = {"groups": {node: one.groups for node, one in seen.items()}, "cores": keeps}
    if kinds == [""]:
        return Check("slurm confinement", True, "steps have no control group of their own: nothing but their binding keeps "
                                                "them on their job's cores", facts=told)
    return Check("slurm confinement", "" not in kinds,
                 f"steps have control groups {', '.join(kind or 'of nobody' for kind in kinds)}, which "
                 f"{'keep' if keeps else 'do not keep'} them on their job's cores",
                 "some nodes have them and others don't: is cgroup.conf the same on all?", facts=told)


# Its clock, what it sees, what may be locked, and its own control groups: v2 has the hierarchy 0 alone.
_SCRIPT = """test -x {python}; p=$?; test -d {home}; h=$?
g=-; while IFS=: read -r n c path; do case "$path" in *job_"$SLURM_JOB_ID"*)
case "$n" in 0) [ $g = v1 ] || g=v2;; *) g=v1;; esac;; esac; done </proc/self/cgroup
echo "rfaas $SLURMD_NODENAME $(date +%s.%N) $p $h $(ulimit -l) $g"
"""


def _look(job: facts.Allocation) -> dict[str, Seen]:
    """Has each node of the job look, by a step of its own."""
    count = str(len(job.nodes))
    script = _SCRIPT.format(python=shlex.quote(sys.executable), home=shlex.quote(str(Path.home())))
    begun = time.time()
    said = slurm.ask(["srun", "--overlap", "--mem=0", "--mpi=none", f"--nodes={count}", f"--ntasks={count}",
                      "--ntasks-per-node=1", "sh", "-c", script])
    ended = time.time()
    found = {}
    for name, clock, python, home, limit, groups in re.findall(
            r"^rfaas (\S+) (\S+) (\d) (\d) (unlimited|\d+) (\S+)$", said, re.MULTILINE):
        # It was read between these two.
        early, late = float(clock) - begun, float(clock) - ended
        skew = 0.0 if late <= 0 <= early else min(early, late, key=abs)
        found[name] = Seen(skew, python == "0", home == "0", int(limit) if limit.isdigit() else None,
                           groups.removeprefix("-"))
    return found

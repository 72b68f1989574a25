"""Which cores and how much memory of this node may be lent, and why not the rest.

The functions that decide are pure and take `NodeFacts`; `read_node_facts` reads
those from /proc and /sys, `launcher_pid` looks at a rank's ancestors. All the
rest here takes an environment as an argument.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from rfaas_mpi.agent.kernel_files import V1_NO_LIMIT, cgroup_mounts, cpu_list, ranges, read_text, read_topology

__all__ = [
    "MEMORY_RESERVE", "NodeFacts", "Rank", "SlurmFacts", "SpareCores", "launch_key",
    "launcher_pid", "lendable_memory", "local_ranks", "read_node_facts",
    "slurm_facts", "spare_cores",
]

MEMORY_RESERVE = 512 << 20

# How many ranks of this launch run on this node: MPICH and Intel MPI (Hydra),
# Open MPI, MVAPICH, Cray PALS, Flux, MPT.
_LOCAL_SIZE = (
    "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE",
    "PALS_LOCAL_SIZE", "MPI_LOCALRANKSIZE", "FLUX_TASK_LOCAL_SIZE",
)
# What a launcher sets for a rank alone, the most telling first: in a batch script
# SLURM_PROCID is inherited by every mpiexec and all below it.
_LAUNCHED = (*_LOCAL_SIZE, "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")

_SLURM_CONF = (
    "etc/slurm/slurm.conf", "etc/slurm-llnl/slurm.conf", "etc/slurm-wlm/slurm.conf",
    "usr/local/etc/slurm.conf", "opt/slurm/etc/slurm.conf",
    "run/slurm/conf/slurm.conf",
)


# --- facts ------------------------------------------------------------------

class NodeFacts(msgspec.Struct, frozen=True):
    """This node as this process may use it."""

    cpuset: tuple[int, ...]             # CPUs that this process may be moved to
    online: int = 0                     # CPUs of the whole node (0: as the cpuset)
    quota_cpus: float | None = None     # cpu.max or cfs quota, in CPUs
    core_of: dict[int, int] = {}        # CPU → lowest CPU of its physical core
    numa: dict[int, int] = {}           # CPU → NUMA node
    memory_total: int = 0
    memory_limit: int | None = None     # the tightest cgroup limit
    slurm_node: bool = False            # Slurm is configured here


class SlurmFacts(msgspec.Struct, frozen=True):
    """What Slurm told a rank about its job."""

    configured: bool = False            # SLURM_CONF is set
    in_job: bool = False                # on a node of a job, started by Slurm
    cpus: int | None = None             # the job's CPUs on this node
    memory_bytes: int | None = None     # the job's memory on this node


class Rank(msgspec.Struct, frozen=True):
    """A rank that joined, as its session announced it."""

    pid: int
    mask: tuple[int, ...]               # its affinity mask
    local_ranks: int = 1                # local_ranks(its environment)
    launch: str = ""                    # launch_key(its environment, …)


class SpareCores(msgspec.Struct, frozen=True):
    """What may be lent, in the order in which to lend it, and why not the rest.

    Lent cores are among `cores`: what is lent already is the lease book's
    knowledge, not this one's.
    """

    cores: tuple[int, ...]
    kept: dict[int, str]                # core → why it is not lent
    numa: dict[int, int] = {}           # of `cores`
    reason: str = ""                    # one line with the way out, if none is lent


# --- what a launcher says ---------------------------------------------------

def local_ranks(environ: Mapping[str, str]) -> int:
    """How many ranks of this launch run on this node, by the launcher's variables.

    1 where no launcher says anything. Where Slurm doesn't say which node of the
    job this is, the largest number of any node.
    """
    for name in _LOCAL_SIZE:
        if (count := _positive(environ.get(name))) is not None:
            return count
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        counts = _per_node(environ.get(name, ""))
        if counts:
            node = environ.get("SLURM_NODEID", "")
            if node.isdecimal() and int(node) < len(counts):
                return counts[int(node)]
            return max(counts)
    return 1


def launch_key(environ: Mapping[str, str], pid: int, parent_pid: int) -> str:
    """What the ranks of one launch on this node have in common, and no other has.

    `parent_pid` is the launcher's process on this node (`launcher_pid` finds it
    behind wrapper scripts). A process that no launcher started is a launch of
    its own.
    """
    if namespace := environ.get("PMIX_NAMESPACE"):
        return f"pmix {namespace}"
    step = environ.get("SLURM_STEP_ID")
    if step and "SLURM_STEP_TASKS_PER_NODE" in environ and not any(
            name in environ for name in _LOCAL_SIZE):
        return f"slurm {environ.get('SLURM_JOB_ID', '')}.{step}"
    if any(name in environ for name in _LAUNCHED):
        return f"parent {parent_pid}"
    return f"pid {pid}"


def slurm_facts(environ: Mapping[str, str]) -> SlurmFacts:
    """What SLURM_* variables say about the job around this process.

    In the shell of an `salloc` on a login node SLURM_JOB_ID is set, but the node
    isn't the job's: slurmd's own variables tell the difference.
    """
    by_slurmd = any(name in environ for name in (
        "SLURMD_NODENAME", "SLURM_NODEID", "SLURM_PROCID", "SLURM_STEP_ID"))
    in_job = bool(environ.get("SLURM_JOB_ID")) and by_slurmd
    if not in_job:
        return SlurmFacts(configured="SLURM_CONF" in environ)

    # Not indexed by SLURM_NODEID: that one counts the step's nodes, not the job's.
    counts = _per_node(environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    counts = [min(counts)] if counts else []
    if (here := _positive(environ.get("SLURM_CPUS_ON_NODE"))) is not None:
        counts.append(here)
    cpus = max(counts, default=None)

    memory = None
    if (per_node := _positive(environ.get("SLURM_MEM_PER_NODE"))) is not None:
        memory = per_node << 20
    elif (per_cpu := _positive(environ.get("SLURM_MEM_PER_CPU"))) is not None and cpus:
        memory = (per_cpu << 20) * cpus
    return SlurmFacts(configured="SLURM_CONF" in environ, in_job=True, cpus=cpus,
                      memory_bytes=memory)


def _positive(text: str | None) -> int | None:
    """A number above 0, or None: also for what isn't a number at all."""
    if text is None or not text.strip().isdecimal():
        return None
    return int(text) or None


def _per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]; [] if it isn't such a list."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


# --- what may be lent -------------------------------------------------------

def spare_cores(facts: NodeFacts, ranks: Sequence[Rank] = (),
                slurm: SlurmFacts = SlurmFacts(), *, lend: str = "auto",
                only: Collection[int] = (), lent: Collection[int] = (),
                expected: int = 1) -> SpareCores:
    """The cores of the own cpuset that no rank needs, best to lend first.

    Kept are the cores that ranks are bound to, one for each local rank that may
    float (as many as the launchers say, whoever has joined; `expected` where
    nobody has), the SMT siblings of both, and what the CPU quota doesn't allow. First
    come cores near the ranks, one hardware thread of each physical core, then
    the second threads; the physical core of CPU 0 comes last, since the kernel
    and ranks without a place run there.

    `lent` cores stay spare when another rank that may float comes: it makes
    fewer cores free for the next lease, it takes none back. A rank that is
    bound to a lent core does.

    `lend`: "no" lends nothing, "yes" lends on a login node of a cluster too.
    `only` lends exactly these cores (as far as they are in the cpuset), which
    whoever says it must know to be free. Raises ValueError for another `lend`.
    """
    if lend not in ("auto", "yes", "no"):
        raise ValueError(f"lend is {lend!r}; it is 'auto', 'yes' or 'no'")
    if lend == "no":
        return _none(facts, "lending is turned off here",
                     "RFAAS_LEND=no is set; unset it to lend this node's spare cores")
    if only:
        return _exactly(facts, only)
    if ((facts.slurm_node or slurm.configured) and not slurm.in_job
            and lend != "yes"):
        return _none(facts, "this is a login node",
                     "this is a login node of a Slurm cluster: start the ranks in a "
                     "job, or set RFAAS_LEND=yes to lend its cores all the same")
    if _unconfined(facts, slurm):
        return _none(facts, "may belong to another job",
                     f"Slurm gave this job {slurm.cpus} of {len(facts.cpuset)} CPUs, "
                     "but no cgroup says which: name those to lend with RFAAS_CORES, "
                     "or ask for the node with --exclusive")

    kept = _kept_for_ranks(facts, ranks, lent, expected)
    needed = sum(1 for why in kept.values() if why in (_BOUND, _FLOATS))
    cores = _in_order(facts, kept)
    if facts.quota_cpus is not None:
        # A worker beyond the quota would throttle the ranks with it.
        most = max(0, math.floor(facts.quota_cpus) - needed)
        for core in cores[most:]:
            kept[core] = (f"the CPU quota is {facts.quota_cpus:g} CPUs and the ranks "
                          f"need {needed}")
        cores = cores[:most]
    return SpareCores(
        cores=tuple(cores), kept=dict(sorted(kept.items())),
        numa={core: facts.numa.get(core, 0) for core in cores},
        reason="" if cores else _why_none(facts, ranks, kept, needed))


def lendable_memory(facts: NodeFacts, slurm: SlurmFacts = SlurmFacts(), *,
                    reserve: int = MEMORY_RESERVE) -> int:
    """Bytes that may be lent: the node's or the tightest limit's, less a reserve.

    Never what happens to be unused now: that is the page cache's and the ranks'.
    """
    limits = [limit for limit in (facts.memory_total, facts.memory_limit,
                                  slurm.memory_bytes) if limit]
    return max(0, min(limits, default=0) - reserve)


_BOUND = "a rank is bound to it"
_FLOATS = "kept for a rank that may float"
_SIBLING = "shares its physical core with a core that a rank needs"


def _none(facts: NodeFacts, why: str, reason: str) -> SpareCores:
    return SpareCores(cores=(), kept=dict.fromkeys(facts.cpuset, why), reason=reason)


def _exactly(facts: NodeFacts, only: Collection[int]) -> SpareCores:
    cores = tuple(core for core in dict.fromkeys(only) if core in facts.cpuset)
    kept = {core: "not among the cores that RFAAS_CORES names"
            for core in facts.cpuset if core not in cores}
    reason = "" if cores else (
        f"none of the cores {ranges(only)} is among those that may be used here "
        f"({ranges(facts.cpuset)}); correct RFAAS_CORES")
    return SpareCores(cores=cores, kept=kept, reason=reason,
                      numa={core: facts.numa.get(core, 0) for core in cores})


def _unconfined(facts: NodeFacts, slurm: SlurmFacts) -> bool:
    """True where the job has a part of the node, but can run on all of it."""
    if slurm.cpus is None or 0 < len(facts.cpuset) < facts.online:
        return False
    # Sites count either hardware threads or physical cores as CPUs.
    return slurm.cpus < len({facts.core_of.get(cpu, cpu) for cpu in facts.cpuset})


def _bound_mask(facts: NodeFacts, rank: Rank) -> frozenset[int]:
    """The cores that the rank is bound to; empty if it may run on all of ours."""
    mask = frozenset(rank.mask).intersection(facts.cpuset)
    return mask if len(mask) < len(facts.cpuset) else frozenset()


def _floating(facts: NodeFacts, ranks: Sequence[Rank], expected: int) -> int:
    """How many local ranks may float: all but those that are known to be bound."""
    if not ranks:
        return expected
    launches: dict[str, dict[int, Rank]] = {}
    for rank in ranks:
        launches.setdefault(rank.launch or f"pid {rank.pid}", {})[rank.pid] = rank
    count = 0
    for joined in launches.values():
        local = max(len(joined), max(rank.local_ranks for rank in joined.values()))
        count += local - sum(1 for rank in joined.values() if _bound_mask(facts, rank))
    return count


def _kept_for_ranks(facts: NodeFacts, ranks: Sequence[Rank], lent: Collection[int],
                    expected: int) -> dict[int, str]:
    """Core → why a rank needs it, or needs it left alone."""
    bound = frozenset[int]().union(*(_bound_mask(facts, rank) for rank in ranks))
    kept = dict.fromkeys(sorted(bound), _BOUND)
    physical: dict[int, list[int]] = {}
    for cpu in sorted(facts.cpuset):
        physical.setdefault(facts.core_of.get(cpu, cpu), []).append(cpu)

    floating = _floating(facts, ranks, expected)
    for cpus in physical.values():
        if not bound.isdisjoint(cpus):
            kept.update((cpu, _SIBLING) for cpu in cpus if cpu not in bound)
        elif floating > 0 and not any(cpu in lent for cpu in cpus):
            # The lowest core, where the scheduler and the launcher begin too.
            floating -= 1
            kept[cpus[0]] = _FLOATS
            kept.update((cpu, _SIBLING) for cpu in cpus[1:])
    return kept


def _in_order(facts: NodeFacts, kept: Mapping[int, str]) -> list[int]:
    """The cores that aren't kept, best to lend first."""
    near = {facts.numa.get(core, 0) for core in kept}
    threads: dict[int, int] = {}
    rank_of: dict[int, tuple[bool, int, bool, int, int]] = {}
    for core in sorted(set(facts.cpuset).difference(kept)):
        physical = facts.core_of.get(core, core)
        thread = threads.get(physical, 0)
        threads[physical] = thread + 1
        numa = facts.numa.get(core, 0)
        rank_of[core] = (physical == 0, thread, numa not in near, numa, core)
    return sorted(rank_of, key=rank_of.__getitem__)


def _why_none(facts: NodeFacts, ranks: Sequence[Rank], kept: Mapping[int, str],
              needed: int) -> str:
    total = len(facts.cpuset)
    cores = "1 core" if total == 1 else f"{total} cores"
    if facts.quota_cpus is not None and math.floor(facts.quota_cpus) <= needed < total:
        return (f"the CPU quota here is {facts.quota_cpus:g} CPUs and the ranks need "
                f"{needed}: raise it (cpu.max of the cgroup or container)")
    if _SIBLING in kept.values() and needed < total:
        return (f"of {cores} the ranks need {needed} and the others share a physical "
                "core with those: start fewer ranks, or name cores to lend with "
                "RFAAS_CORES")
    if any(len(_bound_mask(facts, rank)) > 1 for rank in ranks):
        return (f"the ranks are bound to all of {cores}: bind each to one core "
                "(--bind-to core), or start fewer ranks")
    return (f"the ranks may use all of {cores}: start fewer ranks than cores, "
            "or name cores to lend with RFAAS_CORES")


# --- reading /proc and /sys -------------------------------------------------

def read_node_facts(root: Path = Path("/"),
                    affinity: Collection[int] | None = None) -> NodeFacts:
    """This node's facts as they are now; a file that isn't there is no limit.

    `affinity` is every CPU that this process may be moved to; None asks the
    kernel, without changing where the caller runs.
    """
    online = cpu_list(read_text(root / "sys/devices/system/cpu/online"))
    allowed = set(_widest_affinity(root) if affinity is None else affinity)
    groups = _Cgroups(root)
    # The mask may be wider than the cgroup: a cpuset that was shrunk since.
    for limit in (groups.cpuset(), set(online)):
        if not allowed.isdisjoint(limit):
            allowed &= limit
    cpuset = tuple(sorted(allowed))

    topology = read_topology(root, cpuset)
    return NodeFacts(
        cpuset=cpuset, online=len(online) or len(cpuset),
        quota_cpus=groups.quota_cpus(), core_of=topology.core_of,
        numa=topology.numa, memory_total=topology.memory_bytes,
        memory_limit=groups.memory_limit(),
        slurm_node=any((root / path).exists() for path in _SLURM_CONF))


def launcher_pid(environ: Mapping[str, str], pid: int, root: Path = Path("/")) -> int:
    """The launcher's process above a rank: for `launch_key`.

    Wrapper scripts between launcher and rank carry the variable by which the
    rank (`environ`, `pid`) was told its place, the launcher doesn't. The parent
    where no launcher started it; 0 if the process is gone.
    """
    mark = next((name for name in _LAUNCHED if name in environ), None)
    for _ in range(64):
        pid = _parent(pid, root)
        if pid <= 1 or mark is None:
            break
        # Another user's process can't be read, and is no wrapper of ours.
        entries = read_text(root / f"proc/{pid}/environ").split("\0")
        if not any(entry.startswith(f"{mark}=") for entry in entries):
            break
    return pid


def _parent(pid: int, root: Path) -> int:
    # The command's name stands in parentheses and may hold anything, also those.
    fields = read_text(root / f"proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _widest_affinity(root: Path) -> set[int]:
    """What the kernel leaves of the wish to run on every CPU.

    Asked by a thread of its own: a mask belongs to a thread, and the caller's is
    never touched. Its own mask may be narrow, since a bound rank starts us.
    """
    possible = cpu_list(read_text(root / "sys/devices/system/cpu/possible"))
    wish = possible or range(os.cpu_count() or 1)
    found: set[int] = set(os.sched_getaffinity(0))

    def ask() -> None:
        try:
            os.sched_setaffinity(0, wish)
        except OSError:
            return  # forbidden here: then our own mask is all that we may use
        found.update(os.sched_getaffinity(0))

    thread = threading.Thread(target=ask, name="rfaas-affinity")
    thread.start()
    thread.join()
    return found


class _Cgroups:
    """The directories of this process' cgroups: v1, v2 or both at once."""

    def __init__(self, root: Path) -> None:
        self._unified: list[Path] = []                 # own directory first, then up
        self._by_controller: dict[str, list[Path]] = {}
        mounts = list(cgroup_mounts(read_text(root / "proc/self/mountinfo")))
        for line in read_text(root / "proc/self/cgroup").splitlines():
            _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
            names = set(controllers.split(",")) if controllers else set()
            for mount in mounts:
                if names and not names & mount.controllers or bool(names) != bool(mount.controllers):
                    continue
                chain = _chain(root / mount.point.lstrip("/"), mount.top, path)
                if not names:
                    self._unified = chain
                for name in names:
                    self._by_controller[name] = chain
                break

    def _values(self, controller: str, v1: str, v2: str) -> list[str]:
        """A file's text in the own group and in each above it, own first."""
        paths = [directory / v1 for directory in self._by_controller.get(controller, ())]
        paths += [directory / v2 for directory in self._unified]
        return [text for path in paths if (text := read_text(path).strip())]

    def cpuset(self) -> set[int]:
        """The nearest effective cpuset; empty if no controller says."""
        nearest = self._values(
            "cpuset", "cpuset.effective_cpus", "cpuset.cpus.effective")[:1]
        return set(cpu_list("".join(nearest)))

    def quota_cpus(self) -> float | None:
        """The tightest CPU quota of the own group and all above it."""
        pairs = [(read_text(directory / "cpu.cfs_quota_us").strip(),
                  read_text(directory / "cpu.cfs_period_us").strip())
                 for directory in self._by_controller.get("cpu", ())]
        for directory in self._unified:
            quota, _, period = read_text(directory / "cpu.max").strip().partition(" ")
            pairs.append((quota, period))
        # "max" and -1 say that there is none.
        return min((int(quota) / int(period) for quota, period in pairs
                    if quota.isdecimal() and period.isdecimal() and int(period) > 0),
                   default=None)

    def memory_limit(self) -> int | None:
        """The tightest memory limit of the own group and all above it."""
        limits = [int(text) for text in self._values(
            "memory", "memory.limit_in_bytes", "memory.max") if text.isdecimal()]
        return min((limit for limit in limits if limit < V1_NO_LIMIT), default=None)


def _chain(point: Path, top: str, path: str) -> list[Path]:
    """The own group's directory and all above it that this mount shows."""
    top = top.rstrip("/")
    inside = path[len(top):] if path == top or path.startswith(top + "/") else ""
    parts = [part for part in inside.split("/") if part]
    if ".." in parts:
        parts = []  # outside our cgroup namespace: the mount's own root must do
    own = point.joinpath(*parts)
    if not own.is_dir():
        own = point
    return [own, *(parent for parent in own.parents
                   if parent == point or point in parent.parents)]

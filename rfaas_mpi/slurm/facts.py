"""What Slurm says, as facts. Pure: text and environments in, frozen structs out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import msgspec

from rfaas_mpi.errors import ConfigError

__all__ = ["COMMENTS", "ENDS", "HAS_NODES", "JOBS", "LEAD_S", "NODES", "PLANNED", "Allocation", "Job", "Nodes", "Seen",
           "Until", "allocation", "lending",
           "config_value", "core_ids", "counts", "end_of", "hosts", "jobs", "node_addresses", "nodes", "physical", "planned", "records",
           "reserved", "seconds", "step_of", "whole_cores"]

# What squeue and sinfo are asked to print of a job, and of nodes of one kind. A name may hold anything: it is last.
JOBS = "%i|%u|%P|%t|%r|%N|%x|%l|%L|%j"
NODES = "%P|%T|%N|%l"
# Leases end so long before what ends their node's window: nothing of them is left then.
LEAD_S = 5.0
# When a job ends; where a job that waits is to start, and when. Times are seconds since the epoch (run.read has them so).
ENDS = "%A|%e"
PLANNED = "%i|%S|%Y"
# Of a job that has nodes, in whatever state: what its owner says of it, which may be anything and is last.
COMMENTS = "%A|%N|%k"
HAS_NODES = "RUNNING,SUSPENDED,STOPPED,COMPLETING,CONFIGURING"
LEND = "lend"                        # among the words of a job's comment: what it leaves idle may be lent


class Seen(msgspec.Struct, frozen=True):
    """What a cluster's manager reads: node → when it is needed next (seconds since the epoch), and → jobs that lend."""

    starts: dict[str, float] = {}
    lending: dict[str, tuple[str, ...]] = {}


class Allocation(msgspec.Struct, frozen=True):
    """What a job has: its nodes, and of each how many CPUs; `tasks` is how many of them the job's tasks are to have."""

    job: int
    nodes: tuple[str, ...]
    cpus: tuple[int, ...]
    tasks: tuple[int, ...]


def hosts(names: str) -> tuple[str, ...]:
    """`n[1-3,07]` as n1, n2, n3, n07. ConfigError where it is no list of hosts, or python-hostlist is missing."""
    try:
        import hostlist
    except ImportError:
        raise ConfigError("reading Slurm's lists of nodes needs python-hostlist, which isn't installed",
                          hint="pip install 'rfaas_mpi[slurm]'") from None
    try:
        return tuple(hostlist.expand_hostlist(names))
    except hostlist.BadHostlist as error:
        raise ConfigError(f"{names!r} is no list of nodes: {error}", hint="it comes from Slurm: is SLURM_JOB_NODELIST set "
                                                                         "by anything else?") from None


def counts(text: str) -> tuple[int, ...]:
    """One number for each node: `2(x3),1` as 2, 2, 2, 1. ConfigError where it is something else."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(f"{text!r} is not what Slurm says of its nodes, like 2(x3),1",
                              hint="is SLURM_TASKS_PER_NODE or SLURM_JOB_CPUS_PER_NODE set by anything else?")
        found += [int(match[1])] * int(match[2] or 1)
    return tuple(found)


def allocation(environ: Mapping[str, str], ranks: int | None = None) -> Allocation:
    """The job in which this runs. With `ranks`, so many tasks, spread over its nodes as evenly as can be.

    Raises ConfigError outside a job.
    """
    job, names = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_NODELIST")
    if not job or not names:
        raise ConfigError("this is no Slurm job (SLURM_JOB_ID and SLURM_JOB_NODELIST are not set)",
                          hint="run it in a script given to sbatch, or in a shell of salloc")
    nodes = hosts(names)
    cpus = counts(environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    if len(cpus) != len(nodes):
        raise ConfigError(f"Slurm names {len(nodes)} nodes ({names}), and the CPUs of {len(cpus)}",
                          hint="is SLURM_JOB_CPUS_PER_NODE set by anything else?")
    if ranks is not None:
        each, more = divmod(ranks, len(nodes))
        tasks = tuple(each + (number < more) for number in range(len(nodes)))
    elif "SLURM_NTASKS" in environ:
        # It may name fewer nodes than the job has: the others have none.
        said = counts(environ.get("SLURM_TASKS_PER_NODE", ""))
        tasks = (*said, *[0] * (len(nodes) - len(said)))[:len(nodes)]
    else:
        tasks = (1,) * len(nodes)
    return Allocation(int(job), nodes, cpus, tasks)


def core_ids(shown: str) -> dict[str, tuple[int, ...]]:
    """Of each node the CPUs that a job has there, by Slurm's own numbers, from `scontrol show job -d -o`."""
    found: dict[str, tuple[int, ...]] = {}
    for match in re.finditer(r"\bNodes=(\S+) CPU_IDs=(\S+)", shown):
        ids: list[int] = []
        for part in match[2].split(","):
            low, _, high = part.partition("-")
            ids += range(int(low), int(high or low) + 1)
        found.update(dict.fromkeys(hosts(match[1]), tuple(ids)))
    return found


def node_addresses(shown: str) -> dict[str, str]:
    """How Slurm's daemons reach each node, from `scontrol show node -o`."""
    return dict(re.findall(r"^NodeName=(\S+).*?\bNodeAddr=(\S+)", shown, re.MULTILINE))


def physical(ids: Iterable[int], cpus: Iterable[tuple[int, int, int]]) -> tuple[int, ...]:
    """Linux's numbers of CPUs for Slurm's, which count package by package, core by core, thread by thread.

    `cpus` has of each of a node's CPUs its package, its core there, and its number. Those that
    the node doesn't have are left out.
    """
    ordered = [cpu for _, _, cpu in sorted(cpus)]
    return tuple(sorted(ordered[number] for number in ids if number < len(ordered)))


def whole_cores(cpus: Iterable[int], here: Iterable[tuple[int, int, int]]) -> tuple[int, ...]:
    """Of these CPUs one of each core, the first: its other threads would slow down whoever has it.

    `here` as for `physical`; a CPU that isn't in it is a core of its own.
    """
    core_of = {cpu: (package, core) for package, core, cpu in here}
    first: dict[object, int] = {}
    for cpu in sorted(cpus):
        first.setdefault(core_of.get(cpu, cpu), cpu)
    return tuple(sorted(first.values()))


def config_value(shown: str, name: str) -> str:
    """A setting of the cluster, from `scontrol show config`; "" where there is none of that name."""
    match = re.search(rf"^{name}\s*=\s*(.*)$", shown, re.MULTILINE)
    return match[1].strip() if match else ""


def step_of(shown: str, pid: int) -> str:
    """The step that the srun with this number started, from `scontrol show step -o`; "" if there is none yet."""
    match = re.search(rf"^StepId=(\S+) .*\bSrunHost:Pid=\S+:{pid}\s*$", shown, re.MULTILINE)
    return match[1] if match else ""


class Job(msgspec.Struct, frozen=True):
    """A job in the queue. `limit_s` and `left_s` are None where it has no limit, `excluded` are nodes that it won't have."""

    id: str
    user: str
    partitions: tuple[str, ...]
    state: str
    reason: str
    nodes: str
    excluded: tuple[str, ...]
    limit_s: int | None
    left_s: int | None
    name: str


class Nodes(msgspec.Struct, frozen=True):
    """Nodes of a partition that are in the same state; `limit_s` is how long a job may run in that partition."""

    partition: str
    state: str
    nodes: tuple[str, ...]
    limit_s: int | None


class Until(msgspec.Struct, frozen=True):
    """A job ends then (None: no end is known); read by somebody whose clock said `sent`. Seconds since the epoch."""

    ends: float | None
    sent: float


def end_of(shown: str, job: int) -> float | None:
    """When a job ends, from `squeue -h -o` with the format ENDS, for one task of an array, too; None: it has no limit."""
    for line in shown.splitlines():
        number, _, text = line.partition("|")
        if number == str(job) and text.strip().isdigit():
            return float(text)
    return None


def planned(shown: str) -> dict[str, float]:
    """Of each node that a job waits for the first start that is planned, from `squeue -h -t PENDING -o` with PLANNED."""
    found: dict[str, float] = {}
    for line in shown.splitlines():
        parts = line.split("|")
        if len(parts) == 3 and parts[1].isdigit() and parts[2] not in ("", "(null)", "N/A"):
            _first(found, parts[2], float(parts[1]))
    return found


def lending(shown: str) -> dict[str, tuple[str, ...]]:
    """Node → jobs there whose owners lend what they leave idle, from `squeue -h -t HAS_NODES -o` with COMMENTS.

    A comment may hold ends of lines, and so a line that says so of somebody else's job: each about a job has to.
    """
    says: dict[str, list[bool]] = {}
    where: dict[str, str] = {}
    for line in shown.splitlines():
        job, _, rest = line.partition("|")
        names, bar, comment = rest.partition("|")
        if job.isdecimal() and bar:
            says.setdefault(job, []).append(LEND in re.split(r"[\s,;]+", comment))
            where.setdefault(job, names)
    found: dict[str, list[str]] = {}
    for job, all_of_them in says.items():
        if all(all_of_them) and where[job] not in ("", "(null)"):
            for node in hosts(where[job]):
                found.setdefault(node, []).append(job)
    return {node: tuple(jobs) for node, jobs in found.items()}


def reserved(shown: str) -> dict[str, float]:
    """Of each node the first begin of a reservation that hasn't begun, from `scontrol show reservation -o`."""
    found: dict[str, float] = {}
    for each in records(shown):
        if each.get("State") == "INACTIVE" and each.get("StartTime", "").isdigit() and each.get("Nodes", "(null)") != "(null)":
            _first(found, each["Nodes"], float(each["StartTime"]))
    return found


def _first(found: dict[str, float], names: str, at: float) -> None:
    for node in hosts(names):
        found[node] = min(at, found.get(node, at))


def seconds(text: str) -> int | None:
    """A time as squeue and sinfo print it (1-02:03:04, 30:00, 0:05); None where it is none, like `infinite`."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def jobs(shown: str, mark: str = "") -> tuple[Job, ...]:
    """From `squeue -h -o` with the format JOBS. Lines that aren't like that are left out.

    A name may hold what looks like another job's line: with a `mark` that its owner couldn't know each true one begins.
    """
    found = []
    for line in shown.split("\n"):
        parts = line.removeprefix(mark).split("|", 9)
        if len(parts) == 10 and line.startswith(mark):
            name, user, partitions, state, reason, where, excluded, limit, left, title = parts
            found.append(Job(name, user, tuple(partitions.split(",")), state, reason, where,
                             hosts(excluded) if excluded else (), seconds(limit), seconds(left), title))
    return tuple(found)


def nodes(shown: str) -> tuple[Nodes, ...]:
    """From `sinfo -h -o` with the format NODES. Lines that aren't like that are left out."""
    found = []
    for line in shown.splitlines():
        parts = line.split("|")
        if len(parts) == 4:
            partition, state, names, limit = parts
            found.append(Nodes(partition.removesuffix("*"), state.lower(), hosts(names) if names else (),
                               seconds(limit)))
    return tuple(found)


def records(shown: str) -> tuple[dict[str, str], ...]:
    """One for each line of `Name=value …`, as scontrol's --oneliner prints it."""
    return tuple(dict(re.findall(r"(?:^|\s)([A-Za-z:]+)=(\S*)", line)) for line in shown.splitlines() if line.strip())

"""Which pilot jobs to queue and which to take out again. Pure: what Slurm says and the time in, actions out.

    squeue, sinfo ──▶ Filling.look ──▶ Submit, Cancel
    a node's agent has left ──▶ Filling.left ──▶ Submit

A pilot job has one node and a fixed length. Slurm starts one where it fits into the hole that
a node has until its next job, so that lengths are mixed: each pilot too long for the holes that
there are is replaced by a shorter one. No more are queued and running together than may run,
so that Slurm, which starts them when it likes, can't start too many.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from rfaas_mpi.slurm import facts
from rfaas_mpi.slurm.facts import Job, Nodes

__all__ = ["LENGTHS", "Action", "Cancel", "Filling", "Preemption", "Submit", "Wanted", "batch_options", "left_alone",
           "preemption"]

# Minutes; of the mixes that were tried on a large machine, the one that covered most of its idle time.
LENGTHS = (2, 4, 6, 8, 14, 22, 34, 56, 90)
# A pilot that waits for so long while nodes are idle is too long for them.
PASSED_OVER_S = 20.0
# What ends so long before its time was not ended by its time.
EARLY_S = 90.0
# Slurm sends the warning up to half a minute sooner.
WARN_S = 5

_FOR_RESOURCES = frozenset(("Resources", "Priority"))
_RUNNING = frozenset(("R", "CF"))
# Switched off or being switched, about to restart, or in a reservation for maintenance.
_FLAGS = "~#!%@^$"
_STATES = ("maint", "reserved", "resv", "drain", "drng", "fail", "power", "pow_", "reboot")
# An administrator waits until nothing runs there. (About to restart as soon as that is so: @.)
_WANTED = ("maint", "drain", "drng", "fail")


class Wanted(msgspec.Struct, frozen=True):
    """What the user wants: minutes in `lengths` and `time_min`; at most `queued_max` pilots wait.

    They wait only while at most `busy_max` other jobs wait for resources.
    """

    partition: str
    nodes_max: int
    lengths: tuple[int, ...] = LENGTHS
    time_min: int | None = None
    queued_max: int = 20
    busy_max: int = 0
    account: str | None = None
    qos: str | None = None


class Submit(msgspec.Struct, frozen=True):
    """Queue a pilot of so many minutes, which runs on none of the nodes in `exclude`."""

    minutes: int
    exclude: tuple[str, ...] = ()


class Cancel(msgspec.Struct, frozen=True):
    """Take a pilot out, and why."""

    job: str
    why: str


Action = Submit | Cancel


def left_alone(state: str) -> bool:
    """Whether pilots keep off a node in this state, as sinfo names it; what is planned for is another matter."""
    return state.lower().startswith(_STATES) or any(flag in state for flag in _FLAGS)


def _planned(state: str) -> bool:
    return state.startswith(("plan", "plnd")) or state.endswith("-")


class Filling:
    """Keeps one partition's idle nodes filled with the pilots of one user that bear `name`."""

    def __init__(self, wanted: Wanted, user: str, name: str) -> None:
        self.wanted = wanted
        self._user, self._name = user, name
        self._waits: dict[str, float] = {}           # pilot → since when it waits beside idle nodes
        self._known: list[Job] = []                  # pilots that run, by the last look
        self._looked = 0.0
        self._waited: frozenset[str] | None = None   # others' jobs, at the last look
        self._may_queue = False
        self._exclude: tuple[str, ...] = ()
        self.busy = False                            # others wait for resources
        self.lengths: tuple[int, ...] = ()           # that the partition allows, from the shortest up
        self.queued = 0
        self.running = 0

    def look(self, jobs: Sequence[Job], nodes: Sequence[Nodes], now: float) -> list[Action]:
        """What is to be done, by what Slurm has just said. `now` in seconds, rising."""
        wanted = self.wanted
        mine = [job for job in jobs if job.user == self._user and job.name == self._name]
        ours = [each for each in nodes if each.partition == wanted.partition]
        running = [job for job in mine if job.state in _RUNNING]
        queued = [job for job in mine if job.state == "PD"]
        # Its agent has left, and it waits only to be resumed.
        actions: list[Action] = [Cancel(job.id, "it is suspended") for job in mine if job.state == "S"]
        emptied = {node for each in ours if each.state.startswith(_WANTED) or "@" in each.state for node in each.nodes}
        actions += [Cancel(job.id, "its node is to be empty") for job in running if job.nodes in emptied]
        waiting = Counter(_number(job) for job in filter(self._waits_for_ours(nodes), jobs))
        # One that has just come may be about to start: whom it needs gone Slurm has told by then.
        self.busy = sum(count for number, count in waiting.items()
                        if self._waited is None or number in self._waited) > wanted.busy_max
        self._waited = frozenset(waiting)
        exclude = self._avoided(ours, queued)
        all_nodes = {node for each in ours for node in each.nodes}
        stay = []
        for job in queued:
            if self.busy:
                actions.append(Cancel(job.id, "others wait for resources"))
            elif set(job.excluded) != exclude:
                actions.append(Cancel(job.id, "other nodes are to be left alone"))
            else:
                stay.append(job)
        lengths = self.lengths = self._lengths(ours)
        again: list[int] = []
        for job in self._passed_over(stay, ours, exclude, now):
            if (shorter := _shorter(lengths, _minutes(job))) is not None:
                actions.append(Cancel(job.id, "it is too long for the nodes that are idle"))
                stay.remove(job)
                again.append(shorter)
        self._may_queue = not self.busy and bool(all_nodes - exclude) and bool(lengths)
        self._exclude = tuple(sorted(exclude))
        self._known, self._looked = running, now
        room = min(wanted.nodes_max - len(running), wanted.queued_max) - len(stay)
        if room < 0:
            # The user has some more that he started with another number.
            surplus = sorted(stay, key=_minutes)[room:]
            actions += [Cancel(job.id, "there are too many") for job in surplus]
            stay = [job for job in stay if job not in surplus]
        new: list[int] = []
        if self._may_queue:
            new = again[:max(0, room)]
            while len(new) < room:
                new.append(_next_length(lengths, [_minutes(job) for job in stay] + new))
        self.running, self.queued = len(running), len(stay) + len(new)
        return [*actions, *(Submit(minutes, self._exclude) for minutes in new)]

    def left(self, node: str, now: float) -> list[Action]:
        """What is to be done when the agent of this node has left.

        If it was its pilot's time, the next one is queued at once; else somebody wants the
        node, and Slurm has to be asked first.
        """
        for job in self._known:
            if job.nodes == node and job.left_s is not None and now >= self._looked + job.left_s - EARLY_S:
                self._known.remove(job)
                self.running -= 1
                if self._may_queue and self.queued + self.running < self.wanted.nodes_max:
                    self.queued += 1
                    # Slurm may have shortened it.
                    minutes = _minutes(job) if _minutes(job) in self.lengths else max(self.lengths)
                    return [Submit(minutes, self._exclude)]
        return []

    def _waits_for_ours(self, nodes: Sequence[Nodes]) -> Callable[[Job], bool]:
        """Whether a job waits for resources that pilots might take."""
        mine = {node for each in nodes if each.partition == self.wanted.partition for node in each.nodes}
        shared = {each.partition for each in nodes if not mine.isdisjoint(each.nodes)}

        def waits(job: Job) -> bool:
            return (job.state == "PD" and job.reason in _FOR_RESOURCES and not shared.isdisjoint(job.partitions)
                    and not (job.user == self._user and job.name == self._name))
        return waits

    def _avoided(self, ours: Iterable[Nodes], queued: Sequence[Job]) -> set[str]:
        """Nodes that are to be left alone.

        What is planned may be planned for a pilot that waits, and is left alone if none does,
        or those that do leave it alone already.
        """
        already = {node for job in queued for node in job.excluded}
        found: set[str] = set()
        for each in ours:
            if left_alone(each.state):
                found.update(each.nodes)
            elif _planned(each.state):
                found.update(each.nodes if self.busy or not queued else already.intersection(each.nodes))
        return found

    def _lengths(self, ours: Iterable[Nodes]) -> tuple[int, ...]:
        limits = [each.limit_s for each in ours if each.limit_s is not None]
        return tuple(sorted(each for each in set(self.wanted.lengths) if all(each * 60 <= most for most in limits)))

    def _passed_over(self, queued: Sequence[Job], ours: Iterable[Nodes], exclude: set[str], now: float) -> list[Job]:
        idle = any(each.state.startswith("idle") and set(each.nodes) - exclude for each in ours)
        if not idle or self.wanted.time_min is not None:
            self._waits = {}
            return []
        self._waits = {job.id: self._waits.get(job.id, now) for job in queued}
        return [job for job in queued if now - self._waits[job.id] >= PASSED_OVER_S]


def _number(job: Job) -> str:
    """An array's tasks have the same one."""
    return job.id.partition("_")[0]


def _minutes(job: Job) -> int:
    return (job.limit_s or 0) // 60


def _shorter(lengths: Sequence[int], minutes: int) -> int | None:
    """The one in the middle of those that are shorter."""
    shorter = [length for length in lengths if length < minutes]
    return shorter[len(shorter) // 2] if shorter else None


def _next_length(lengths: Sequence[int], have: Iterable[int]) -> int:
    """That of which there are fewest, the longest one of several."""
    count = Counter(have)
    return min(lengths, key=lambda length: (count[length], -length))


def batch_options(submit: Submit, wanted: Wanted, name: str, log: str) -> list[str]:
    """How sbatch is asked for a pilot: a whole node, and never put back into the queue. Longer ones go first."""
    options = [f"--job-name={name}", f"--partition={wanted.partition}", "--nodes=1", "--ntasks=1", "--exclusive",
               "--no-requeue", f"--time={submit.minutes}", f"--nice={max(wanted.lengths) - submit.minutes}",
               f"--signal=USR1@{WARN_S}", f"--output={log}", "--open-mode=append"]
    if wanted.time_min is not None:
        options.append(f"--time-min={min(wanted.time_min, submit.minutes)}")
    if submit.exclude:
        options.append(f"--exclude={','.join(submit.exclude)}")
    asked = (("account", wanted.account), ("qos", wanted.qos))
    return options + [f"--{option}={value}" for option, value in asked if value is not None]


# --- whether pilots can be preempted -------------------------------------------------------------

class Preemption(msgspec.Struct, frozen=True):
    """Whether others' jobs take the nodes of pilots back (None: that can't be told), by what, and what a pilot costs.

    `advice` is what an administrator would add to the configuration.
    """

    partition: str
    preemptible: bool | None
    why: str
    charges: tuple[str, ...]
    advice: tuple[str, ...]


def preemption(partition: str, config: str, partitions: str, qos: str, own_qos: str | None) -> Preemption:
    """By what scontrol shows of the configuration and partitions (--oneliner), and sacctmgr of QOSes; qos "": not told.

    `qos` has lines `Name|Preempt|PreemptMode|UsageFactor`. A partition that isn't there is not preemptible.
    """
    known = {each["PartitionName"]: each for each in facts.records(partitions) if "PartitionName" in each}
    of_qos = {line[0]: line for line in (each.split("|") for each in qos.splitlines()) if len(line) == 4}
    # No line of slurm.conf is made of what can't be a partition's name.
    advice = _advice(partition, known) if re.fullmatch(r"[\w.+-]+", partition) else ()
    mine = known.get(partition)
    if mine is None:
        there_are = ", ".join(known) or "none"
        return Preemption(partition, False, f"there is no partition {partition}; there are {there_are}", (), advice)
    effective = own_qos or (mine["QoS"] if mine.get("QoS", "N/A") != "N/A" else None)
    charges = _charges(mine, None if effective is None else of_qos.get(effective))
    kind = facts.config_value(config, "PreemptType")
    if kind == "preempt/partition_prio":
        can, why = _by_partition(mine, known)
    elif kind == "preempt/qos":
        can, why = _by_qos(effective, of_qos)
    else:
        can, why = False, f"nothing is preempted here (PreemptType={kind or 'unknown'})"
    return Preemption(partition, can, why, charges, () if can else advice)


def _by_partition(mine: Mapping[str, str], known: Mapping[str, Mapping[str, str]]) -> tuple[bool, str]:
    name = mine["PartitionName"]
    if mine.get("PreemptMode", "OFF").upper() == "OFF":
        return False, f"the partition {name} has PreemptMode=OFF"
    nodes = set(facts.hosts(mine["Nodes"])) if mine.get("Nodes", "(null)") != "(null)" else set()
    above = sorted(other for other, each in known.items() if each.get("Nodes", "(null)") != "(null)"
                   and int(each.get("PriorityTier", "1")) > int(mine.get("PriorityTier", "1"))
                   and not nodes.isdisjoint(facts.hosts(each["Nodes"])))
    if not above:
        return False, f"no partition with nodes of {name} has a higher PriorityTier"
    grace = int(mine.get("GraceTime", "0"))
    return True, (f"jobs of {', '.join(above)} preempt those of {name} (PreemptMode={mine['PreemptMode']}"
                  + (f", GraceTime={grace} s)" if grace else ")"))


def _by_qos(effective: str | None, of_qos: Mapping[str, Sequence[str]]) -> tuple[bool | None, str]:
    if not of_qos:
        return None, "QOSes preempt here, and sacctmgr doesn't say which"
    if effective is None:
        can = sorted({name for line in of_qos.values() for name in line[1].split(",") if name})
        return None, f"QOSes preempt here: say --qos {' or '.join(can)}" if can else "no QOS preempts another one here"
    above = sorted(name for name, line in of_qos.items() if effective in line[1].split(","))
    if above:
        return True, f"jobs of the QOS {', '.join(above)} preempt those of {effective}"
    return False, f"no QOS preempts {effective}"


def _charges(partition: Mapping[str, str], qos: Sequence[str] | None) -> tuple[str, ...]:
    weights = partition.get("TRESBillingWeights")
    found = [f"TRESBillingWeights={weights}" if weights else "each CPU counts as usual (no TRESBillingWeights)"]
    if qos is not None and re.fullmatch(r"[\d.]+", qos[3]):
        found.append(f"UsageFactor={qos[3]} (QOS {qos[0]})")
    return tuple(found)


def _advice(partition: str, known: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    others = [name for name in known if name != partition]
    nodes = next((each["Nodes"] for each in known.values() if each.get("Nodes")), "ALL")
    return ("PreemptType=preempt/partition_prio", "PreemptMode=CANCEL",
            f"PartitionName={partition} Nodes={nodes} PriorityTier=1 PreemptMode=CANCEL GraceTime=0 MaxTime=2:00:00 "
            "TRESBillingWeights=CPU=0.0 State=UP",
            *(f"PartitionName={name} … PriorityTier=10 PreemptMode=OFF" for name in others))

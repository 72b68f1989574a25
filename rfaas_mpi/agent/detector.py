"""Which cores of a batch node may be lent, by which rule, and since when. Pure: facts and `now` in, a report out.

A CPU's class says whose it is:

    free          in no job's cpuset, and no job's task may run there
    specialised   kept from jobs by the batch system or the administrator
    unused        a job's, but in no affinity mask of its tasks
    idle          a job's, and it has hardly run anything of the job's for two seconds
    owned         a job's

A physical core is as good as the worst of its hardware threads, since a worker on one of them slows all the others:
each thread has to be lendable by the rule of its own class. What isn't known counts against lending: a job without a
cpuset has every CPU of the node, a job whose tasks nobody has seen may run anywhere in its cpuset.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from rfaas_mpi.agent.classes import CoreClass
from rfaas_mpi.agent.kernel_files import Topology
from rfaas_mpi.agent.reading import reading

__all__ = ["Core", "Detector", "Job", "Load", "Observed", "Policy", "Report", "Told"]

QUIET_SAMPLES = 20                   # so many in a row make a core idle …
QUIET = 0.02                         # … if the owner used less than this share of them
LOUD = 0.10                          # more than this in one sample ends it …
MURMUR = 0.05                        # … and more than this in two in a row
SAMPLE_S = 0.1                       # how long a sample is meant to be
BACK_OFF_S = 2.0                     # a core whose owner came back isn't idle again before that, doubled each time …
BACK_OFF_MOST_S = 64.0               # … up to this; the doubling ends when it has been idle for so long
# Masks are read every two seconds: a core is unused when two readings say so.
SETTLE_S = 1.5
STALE_S = 10.0                       # masks that were read longer ago say nothing any more
TICK_S = 0.01                        # what the kernel counts CPU time in
_NEVER = 1 << 62


# --- facts ------------------------------------------------------------------

class Job(msgspec.Struct, frozen=True):
    """A batch job on this node, as its cgroups and tasks show it."""

    name: str
    uid: int | None = None
    cpus: frozenset[int] | None = None     # its cpuset; None: nothing confines it
    mask: frozenset[int] | None = None     # the union of its tasks' masks; None: no task was seen
    memory_bytes: int | None = None        # its limit; None: there is none
    pending: bool = False                  # neither cpuset nor task yet: nothing of it can run


class Told(msgspec.Struct, frozen=True):
    """What the batch system says of a job, for what its cgroups don't."""

    cpus: frozenset[int] | None = None
    memory_bytes: int | None = None


class Observed(msgspec.Struct, frozen=True):
    """The node as it was read."""

    topology: Topology
    jobs: tuple[Job, ...] = ()
    specialised: frozenset[int] = frozenset()
    usable: frozenset[int] | None = None   # where the agent may run; None: everywhere
    masks_at: float = -math.inf            # when the last reading of all masks began


class Load(msgspec.Struct, frozen=True, eq=False):
    """What each CPU has done so far."""

    at: float
    cpus: np.ndarray
    busy_ticks: np.ndarray                 # of each of `cpus`
    ours_s: dict[int, float] = {}          # CPU time of workers of ours


class Policy(msgspec.Struct, frozen=True):
    """What the site and the owners allow."""

    never: frozenset[int] = frozenset()    # the agent's own cores, say
    specialised: bool = False              # the administrator lends these
    opted_in: dict[str, frozenset[CoreClass]] = {}  # job, or its number → which of its cores it lends
    by_default: frozenset[CoreClass] = frozenset()  # for jobs that aren't named
    low_priority: bool = False             # a worker's scheduling group can be given a low one
    buffer_share: float = 0.1              # of a job's physical cores, kept idle for it …
    buffer_least: int = 1                  # … and at least so many
    memory_reserve: int = 512 << 20


class Core(msgspec.Struct, frozen=True):
    """One CPU and what may be done with it."""

    cpu: int
    physical: int                          # the lowest CPU of its physical core
    numa: int
    which: CoreClass                       # of the worst thread of its physical core
    spare: bool
    why: str = ""                          # why it isn't spare
    owners: tuple[str, ...] = ()           # the jobs whose leave counts
    since: float | None = None             # begin of its window: spare ever since
    uid: int | None = None                 # of those jobs, where all are one user's and that is known


class Report(msgspec.Struct, frozen=True):
    """What may be lent: explicit cores, best to lend first, and memory."""

    cores: tuple[Core, ...]                # all CPUs in order of their numbers
    spare: tuple[int, ...]                 # in the order in which to lend them
    memory_bytes: int

    def of(self, which: CoreClass) -> tuple[int, ...]:
        """The spare CPUs of this class."""
        classes = {core.cpu: core.which for core in self.cores}
        return tuple(cpu for cpu in self.spare if classes[cpu] is which)

    def age_s(self, cpu: int, now: float) -> float:
        """How long the CPU has been spare; 0 if it isn't."""
        return next((max(0.0, now - core.since) for core in self.cores if core.cpu == cpu and core.since is not None),
                    0.0)


# --- load -------------------------------------------------------------------

class _Quiet:
    """How quiet the CPUs have been: the rule of `idle`. One number of each array for each of `cpus`.

    Ten times a second for each CPU of a large node: the loop over them is in C, and here what follows from it.
    """

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._load: Load | None = None
        self._number = 0                               # of the sample
        self._resize(np.empty(0, np.int64))

    def idle_since(self, cpu: int) -> float | None:
        """Since when the CPU is idle; None if it isn't."""
        place = self._place.get(cpu)
        return None if place is None or not self._idle[place] else float(self._idle_since[place])

    def sample(self, load: Load) -> bool:
        """Takes one sample; True if a CPU has become idle, or is so no longer."""
        last = self._load
        if last is not None and load.at - last.at < SAMPLE_S / 2:
            return False             # too short to mean anything: with the next one
        self._load = load
        if last is None or not (last.cpus is load.cpus or np.array_equal(last.cpus, load.cpus)):
            self._resize(load.cpus)
            return True
        self._number += 1
        took = (load.at - last.at) / TICK_S
        owner = np.subtract(load.busy_ticks, last.busy_ticks, out=self._owner)
        for cpu, ours_s in load.ours_s.items():
            # Less than before: a worker there has ended.
            if (place := self._place.get(cpu)) is not None and ours_s >= (before := last.ours_s.get(cpu, 0.0)):
                owner[place] -= (ours_s - before) / TICK_S
        # A tick is a whole sample's tenth: less than two are not "more than a tenth".
        if not reading.rfm_quiet_sample(self._owner_at, len(owner), LOUD * took + 0.5, MURMUR * took, self._number,
                                        QUIET_SAMPLES, *self._arrays):
            return False
        changed = False
        for place in np.flatnonzero(self._news).tolist():
            if self._news[place] == 2:
                changed |= self._begin(place, load.at)
                continue
            changed = True
            self._idle[place] = False
            if load.at - self._idle_since[place] >= BACK_OFF_MOST_S:
                self._back_off_s[place] = BACK_OFF_S
            self._not_before[place] = load.at + self._back_off_s[place]
            self._back_off_s[place] = min(BACK_OFF_MOST_S, 2 * self._back_off_s[place])
        return changed

    def _begin(self, place: int, now: float) -> bool:
        """A CPU was loud in none of the last samples; True if it is idle from now on."""
        used, self._used[place] = self._used[place], 0
        if used >= QUIET * QUIET_SAMPLES * SAMPLE_S / TICK_S + 1:
            self._ready[place] = self._number + QUIET_SAMPLES
            return False
        if now < self._not_before[place]:
            self._ready[place] = self._number + QUIET_SAMPLES
            return False
        self._ready[place] = _NEVER
        self._idle[place] = True
        self._idle_since[place] = now
        return True

    def _resize(self, cpus: np.ndarray) -> None:
        """Other CPUs are online than before: all of them begin anew."""
        self._place = {int(cpu): place for place, cpu in enumerate(cpus)}
        count = len(cpus)
        self._ready = np.full(count, self._number + QUIET_SAMPLES)   # the sample after which it may be idle
        self._used = np.zeros(count)                   # ticks since the last loud sample, or the last judgement
        self._murmured = np.zeros(count, np.uint8)     # used more than a little of the last sample
        self._idle = np.zeros(count, np.uint8)
        self._news = np.zeros(count, np.uint8)
        self._owner = np.zeros(count)                  # ticks of the last sample that were the owner's
        # Asking an array for its address takes longer than the loop over it.
        self._owner_at = self._owner.ctypes.data
        self._arrays = tuple(array.ctypes.data for array in (self._ready, self._used, self._murmured, self._idle,
                                                             self._news))
        self._idle_since = np.zeros(count)
        self._back_off_s = np.full(count, BACK_OFF_S)
        self._not_before = np.full(count, -math.inf)


# --- the detector -----------------------------------------------------------

@dataclass
class _Standing:
    """One CPU before anybody's leave is asked."""

    which: CoreClass
    owners: tuple[str, ...] = ()


@dataclass
class Detector:
    """Knows the node as it was last read, and gives the report that follows from it.

    Call `observe` when something changed, `sample` ten times a second where idle cores may be lent, then `report`.
    """

    policy: Policy = Policy()
    told: dict[str, Told] = field(default_factory=dict)
    _observed: Observed | None = None
    _quiet: _Quiet = field(default_factory=_Quiet)
    # CPU → its owners, and since when no task of theirs may run there
    _candidate: dict[int, tuple[frozenset[str], float]] = field(default_factory=dict)
    _since: dict[int, float] = field(default_factory=dict)       # CPU → since when it is spare
    _settling: bool = False                # a core waits for masks to be read again
    _due: float = -math.inf                # when the report may change by time alone
    _report: Report = Report((), (), 0)

    def configure(self, policy: Policy) -> None:
        """From now on this is allowed."""
        self.policy = policy
        self._due = -math.inf

    def tell(self, job: str, told: Told | None) -> None:
        """The batch system says so of a job; None: it says nothing (any more)."""
        if told is None:
            self.told.pop(job, None)
        else:
            self.told[job] = told
        self._due = -math.inf

    def observe(self, observed: Observed) -> None:
        """The node was read."""
        last, self._observed = self._observed, observed
        if observed is last:
            return
        # Masks that were read once more and are the same matter only to who waits for that.
        if (last is None or self._settling or observed.jobs != last.jobs or observed.topology is not last.topology
                or observed.specialised != last.specialised or observed.usable != last.usable):
            self._due = -math.inf

    @property
    def wants_load(self) -> bool:
        """Whether idle cores could be lent, so that `sample` has a use."""
        lent = (self.policy.by_default, *self.policy.opted_in.values())
        return self.policy.low_priority and any(CoreClass.IDLE in classes for classes in lent)

    def sample(self, load: Load) -> None:
        """What the CPUs did since the last sample."""
        if self._quiet.sample(load):
            self._due = -math.inf

    def report(self, now: float) -> Report:
        """What may be lent now; the same object as long as nothing changes."""
        if now < self._due or self._observed is None:
            return self._report
        self._due = math.inf
        self._settling = False
        report = self._decide(self._observed, now)
        if report != self._report:
            self._report = report
        return self._report

    # ---- the rules -------------------------------------------------------------------------------

    def _decide(self, observed: Observed, now: float) -> Report:
        topology = observed.topology
        jobs = [self._known(job, topology) for job in observed.jobs if not job.pending]
        standing = self._standings(observed, jobs, now)
        threads: dict[int, list[int]] = {}
        for cpu in topology.cpus:
            threads.setdefault(topology.physical(cpu), []).append(cpu)

        worst: dict[int, _Standing] = {}
        refusal: dict[int, str] = {}
        for physical, cpus in threads.items():
            parts = [standing[cpu] for cpu in cpus]
            worst[physical] = _Standing(max((part.which for part in parts), key=lambda which: which.badness),
                                        tuple(dict.fromkeys(name for part in parts for name in part.owners)))
            refusal[physical] = next(filter(None, (self._refused(part) for part in parts)), "")
        for physical in self._buffers(jobs, worst, refusal, threads):
            refusal[physical] = "kept idle for its owner"

        uids = {job.name: job.uid for job in jobs}
        usable = frozenset(topology.cpus) if observed.usable is None else observed.usable
        cores = []
        for cpu in topology.cpus:
            physical = topology.physical(cpu)
            why = refusal[physical]
            if cpu not in usable:
                why = "outside the agent's cpuset"
            elif cpu in self.policy.never:
                why = "kept by the site"
            elif why and standing[cpu].which is not worst[physical].which:
                why = f"shares its physical core: {why}"
            if why:
                self._since.pop(cpu, None)
            else:
                self._since.setdefault(cpu, now)
            cores.append(Core(cpu=cpu, physical=physical, numa=topology.numa.get(cpu, 0), which=worst[physical].which,
                              spare=not why, why=why, owners=worst[physical].owners, since=self._since.get(cpu),
                              uid=_one({uids.get(name) for name in worst[physical].owners})))
        for cpu in self._since.keys() - set(topology.cpus):
            del self._since[cpu]
        return Report(tuple(cores), _in_order(cores, threads), self._memory(topology, jobs))

    def _known(self, job: Job, topology: Topology) -> Job:
        """The job with what the batch system says of it; whatever neither knows is all there is."""
        told = self.told.get(job.name, Told())
        cpus = job.cpus if job.cpus is not None else told.cpus
        everything = frozenset(topology.cpus)
        cpus = everything if cpus is None else cpus & everything
        mask = cpus if job.mask is None else job.mask & everything
        memory = job.memory_bytes if job.memory_bytes is not None else told.memory_bytes
        # A task may run outside of its job's cpuset, moved there by hand.
        return Job(job.name, job.uid, cpus | mask, mask, memory)

    def _standings(self, observed: Observed, jobs: Collection[Job], now: float) -> dict[int, _Standing]:
        owners: dict[int, list[str]] = {}
        masked: set[int] = set()
        for job in jobs:
            for cpu in job.cpus or ():
                owners.setdefault(cpu, []).append(job.name)
            masked |= job.mask or frozenset()
        standing = {}
        for cpu in observed.topology.cpus:
            names = tuple(owners.get(cpu, ()))
            if not names:
                self._candidate.pop(cpu, None)
                which = CoreClass.SPECIALISED if cpu in observed.specialised else CoreClass.FREE
            elif self._settled(cpu, frozenset(names), cpu in masked, observed.masks_at, now):
                which = CoreClass.UNUSED
            elif self._quiet.idle_since(cpu) is not None:
                which = CoreClass.IDLE
            else:
                which = CoreClass.OWNED
            standing[cpu] = _Standing(which, names)
        return standing

    def _settled(self, cpu: int, owners: frozenset[str], masked: bool, masks_at: float, now: float) -> bool:
        """No owner's task may run there, by all readings of the last while."""
        if masked or now - masks_at > STALE_S:
            self._candidate.pop(cpu, None)
            return False
        known, since = self._candidate.get(cpu, (frozenset(), now))
        if not owners <= known:
            since = now              # a newcomer among them may not be where it wants to be yet
        self._candidate[cpu] = owners, since
        self._due = min(self._due, masks_at + STALE_S)
        settled = masks_at >= since + SETTLE_S
        self._settling |= not settled
        return settled

    def _refused(self, standing: _Standing) -> str:
        """Why a thread of this standing mustn't run or be slowed by a worker."""
        match standing.which:
            case CoreClass.FREE:
                return ""
            case CoreClass.SPECIALISED:
                return "" if self.policy.specialised else "specialised, and the site doesn't lend these"
            case CoreClass.OWNED:
                return f"job {_names(standing.owners)} may run there"
        refusing = [name for name in standing.owners if standing.which not in self._lent_by(name)]
        if refusing:
            return f"{standing.which}, but job {_names(refusing)} doesn't lend it"
        if standing.which is CoreClass.IDLE and not self.policy.low_priority:
            return "idle, but no low priority can be given to a worker here"
        return ""

    def _lent_by(self, job: str) -> frozenset[CoreClass]:
        opted_in = self.policy.opted_in
        return opted_in.get(job, opted_in.get(job.rpartition("/")[2], self.policy.by_default))

    def _buffers(self, jobs: Iterable[Job], worst: Mapping[int, _Standing], refusal: Mapping[int, str],
                 threads: Mapping[int, Collection[int]]) -> set[int]:
        """The idle physical cores that stay with their owners: the last to become idle."""
        def idle_since(physical: int) -> float:
            return max((since for cpu in threads[physical] if (since := self._quiet.idle_since(cpu)) is not None),
                       default=-math.inf)

        idle: dict[str, list[int]] = {}
        for physical, standing in worst.items():
            if standing.which is CoreClass.IDLE and not refusal[physical]:
                for name in standing.owners:
                    idle.setdefault(name, []).append(physical)
        kept: set[int] = set()
        for job in jobs:
            own = sum(1 for cpus in threads.values() if not (job.cpus or frozenset()).isdisjoint(cpus))
            least = max(self.policy.buffer_least, math.ceil(self.policy.buffer_share * own))
            candidates = sorted(idle.get(job.name, ()), key=lambda physical: (-idle_since(physical), physical))
            kept.update(candidates[:least])
        return kept

    def _memory(self, topology: Topology, jobs: Iterable[Job]) -> int:
        """What the batch system has not allocated, less the reserve."""
        left = topology.memory_bytes - self.policy.memory_reserve
        for job in jobs:
            # Without a limit it may take all of it.
            left -= topology.memory_bytes if job.memory_bytes is None else job.memory_bytes
        return max(0, left)


def _one(users: set[int | None]) -> int | None:
    return users.pop() if len(users) == 1 else None


def _names(owners: Iterable[str]) -> str:
    return ", ".join(owners)


def _in_order(cores: Iterable[Core], threads: Mapping[int, list[int]]) -> tuple[int, ...]:
    """Better classes first, whole physical cores before second threads, long windows before short ones."""
    def key(core: Core) -> tuple[int, int, float, int]:
        return core.which.badness, threads[core.physical].index(core.cpu), core.since or 0.0, core.cpu

    return tuple(core.cpu for core in sorted((core for core in cores if core.spare), key=key))

"""What a worker at one place costs, in seconds, and which nodes can't have one at all.

    score = queueing + transfer + slowdown + eviction risk + fairness debt        (all in seconds of one worker's time)

A `Room` is one node as a demand sees it: how many workers fit, what the next one costs, and which cores it gets. What
the next one costs never falls while workers are placed, so that a policy may keep rooms in a heap; only a gang's falls,
where a node, or another of its cohort, gets the first worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from rfaas_mpi.placement.facts import ClusterView, Needs, NodeFacts, Placed, Terms
from rfaas_mpi.placement.survival import PROMETHEUS_FIB, Survival

__all__ = ["Room", "Scorer", "Settings", "fits", "refusals"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the site measures or decides. Each default says where it is from; docs/placement.md has the whole table."""

    survival: Survival = PROMETHEUS_FIB
    # Bytes per second between rank and worker: on one node, below one leaf switch, one switch higher, and so on; the
    # last holds for everything farther, and for what isn't known. Assumed: 100 Gbit/s links, 2:1 at each level, and
    # twice a link on one node, where what is in shared memory isn't moved at all: also from the other NUMA node's
    # memory it is nearer than any other node's.
    bandwidth: tuple[float, ...] = (20e9, 10e9, 5e9, 2.5e9)
    far_numa: float = 1.5                      # so many times longer from another NUMA node's memory; assumed
    # `rfaas bench cold` on two cores of a virtual machine: first lease of an environment, one with a warm zygote, and
    # what each further worker adds, since they are attached one after the other.
    cold_s: float = 0.18
    warm_s: float = 0.009
    next_s: float = 0.005
    # Slowdown beside busy neighbours, fitted to runs of NAS benchmarks on 32 of a node's 36 cores (artifact of Copik
    # et al., IPDPS 2024): EP keeps 85 % of its speed, CG 36 %.
    contention: float = 0.2
    memory_contention: float = 1.8
    guessed_pressure: float = 0.3              # of a busy core whose bandwidth nobody measured; assumed
    idle_class: float = 1.05                   # an owner may use up to a tenth of an idle core before it is taken back
    # Two nodes of one cohort end together with p = 0.70, others with 0.12–0.19 (HPC-Whisk's traces, as in survival.py).
    same_cohort: float = 0.70
    other_cohort: float = 0.15
    horizon_s: float = 60.0                    # for a demand that doesn't say how long
    learn_half_life_s: float = 604_800.0       # what was seen of windows counts half then; 0: nothing is learned
    min_age_s: float = 0.0                     # younger windows aren't lent
    silent_after_s: float = 30.0               # three heartbeats of ten seconds
    assumed_bytes_per_s: float = 1e8           # of a rank whose place is known and its traffic isn't; assumed
    exact_to: int = 64                         # clusters up to so many nodes are searched whole …
    sample: int = 8                            # … larger ones by a sample, or as many as have room for it

    def __post_init__(self) -> None:
        if not self.bandwidth or min(self.bandwidth) <= 0:
            raise ValueError(f"bandwidth is {self.bandwidth}; it needs a rate above 0 for each level")


def refusals(facts: NodeFacts, needs: Needs, settings: Settings, now: float) -> Iterator[str]:
    """Each reason for which the node can't have even one worker of the demand, in words; none if it can."""
    if facts.draining:
        yield f"draining ({facts.draining})"
    if facts.closed:
        yield facts.closed
    if facts.heard_at is not None and now - facts.heard_at > settings.silent_after_s:
        yield f"not heard of for {_s(now - facts.heard_at)}, {_s(settings.silent_after_s)} are the most"
    if facts.lends_to_uid is not None and facts.lends_to_uid != needs.uid:
        yield f"another user's: it lends to user {facts.lends_to_uid} only"
    if facts.node in needs.avoid:
        yield "left out by the demand"
    if needs.cpu_type and facts.cpu_type != needs.cpu_type:
        yield f"its CPU is {facts.cpu_type or 'of no known type'}, {needs.cpu_type} wanted"
    if settings.min_age_s > 0:
        age = now - facts.since if facts.since is not None else 0.0
        if age < settings.min_age_s:
            yield f"window younger than {_s(settings.min_age_s)}: {_s(age)}"
    if facts.hard_end is not None and facts.hard_end - now <= needs.least_s:
        yield f"its window ends in {_s(max(0.0, facts.hard_end - now))}, {_s(needs.least_s)} wanted"
    free = sum(map(len, facts.usable(needs.whole_cores, needs.classes).values()))
    if free < needs.cores_per_worker:
        yield f"{_cores(free)} free, {needs.cores_per_worker} wanted{_unusable(facts, needs)}"
    if facts.memory_bytes < needs.memory_per_worker:
        yield f"memory: {_gib(facts.memory_bytes)} free, {_gib(needs.memory_per_worker)} wanted"


def fits(facts: NodeFacts, needs: Needs, settings: Settings, now: float) -> int:
    """How many workers of the demand the node can have: 0 where `refusals` has a reason, for much less than those."""
    if not facts.spare or facts.draining or facts.closed:
        return 0
    if facts.lends_to_uid not in (None, needs.uid) or facts.node in needs.avoid:
        return 0
    if facts.hard_end is not None and facts.hard_end - now <= needs.least_s:
        return 0
    if facts.heard_at is not None and now - facts.heard_at > settings.silent_after_s:
        return 0
    if needs.cpu_type and facts.cpu_type != needs.cpu_type:
        return 0
    if settings.min_age_s > 0 and (facts.since is None or now - facts.since < settings.min_age_s):
        return 0
    most = facts.count_usable(needs.whole_cores, needs.classes) // needs.cores_per_worker
    if needs.memory_per_worker > 0:
        most = max(0, min(most, facts.memory_bytes // needs.memory_per_worker))
    return most


def _unusable(facts: NodeFacts, needs: Needs) -> str:
    """Why spare cores aren't usable, in brackets; "" if all are."""
    parts = []
    if shared := len(facts.spare) - len(facts.unshared):
        parts.append(f"{shared} beside another lease on a physical core")
    of_class = [core for core in facts.unshared
                if needs.classes is None or facts.classes.get(core, "free") in needs.classes]
    if other := len(facts.unshared) - len(of_class):
        parts.append(f"{other} of other classes")
    if needs.whole_cores and (second := len(of_class) - len({facts.physical.get(core, core) for core in of_class})):
        parts.append(f"{second} second thread{'s' if second != 1 else ''}")
    return f" ({', '.join(parts)})" if parts else ""


class Scorer:
    """One search: the demand, the cluster and what has been placed so far."""

    def __init__(self, needs: Needs, view: ClusterView, settings: Settings, now: float) -> None:
        self.needs = needs
        self.view = view
        self.settings = settings
        self.now = now
        self.duration_s = needs.duration_s if needs.duration_s is not None else settings.horizon_s
        self.bytes = (needs.transfer_bytes if needs.transfer_bytes is not None
                      else needs.bytes_per_s * self.duration_s)
        self.rate = self.bytes / self.duration_s
        self.placed = 0
        self.by_cohort: dict[str, int] = {}
        self._paths = [(rank, view.path(rank.node) or rank.switches, rank.count)
                       for rank in needs.ranks if rank.count > 0]
        self._ranks = sum(count for _, _, count in self._paths)
        # A communicator may have a thousand nodes, and each room asks: what many of them share is looked at once.
        self.homes: dict[str, list[tuple[int | None, tuple[str, ...], int]]] = {}
        below: dict[tuple[str, ...], int] = {}
        for rank, path, count in self._paths:
            self.homes.setdefault(rank.node, []).append((rank.numa, path, count))
            below[path] = below.get(path, 0) + count
        self._below = [(path, _heights(path), count) for path, count in below.items()]
        self._heights = _heights(self._paths[0][1]) if self._paths else {}
        self._per_byte = [1.0 / bandwidth for bandwidth in settings.bandwidth]
        self._last = len(settings.bandwidth) - 1
        self.link = settings.bandwidth[min(1, len(settings.bandwidth) - 1)]
        # Of a window, to the second: what was found for a node holds for all demands of that second.
        self._second = math.floor(now)
        self._until = now + self.duration_s
        self._redo_s = needs.call_s / 2 + needs.constants_bytes / settings.bandwidth[-1]
        # What the first worker's eviction costs, of whichever node.
        self._alone_s = self._redo_s + settings.cold_s
        # What the slowdown of a NUMA node is made of: its share of cores that others use and that we use, its pressure.
        self.contention = settings.contention
        self.memory_contention = settings.memory_contention * needs.memory_bound
        self.slow_key = (self.duration_s, needs.memory_bound, settings.contention, settings.memory_contention,
                         settings.guessed_pressure, needs.whole_cores, needs.classes)
        self.others_wait = (min(1.0, view.waiting_cores / max(1, view.free_cores))
                             if view.waiting_cores > 0 and needs.debt_s > 0 else 0.0)

    # ---- transfer --------------------------------------------------------------------------------

    def far_per_byte(self, facts: NodeFacts) -> float:
        """Seconds for each byte that the ranks of other nodes exchange with a worker there, weighed by their number."""
        paths = self._paths
        if len(paths) == 1:
            # How demands are mostly; this is asked of each node that one looks at.
            return 0.0 if (facts.host or facts.node) in self.homes else self._per_byte[
                self._level(facts.switches, self._heights)]
        if not paths:
            return self._per_byte[-1]
        own: dict[tuple[str, ...], int] = {}
        for _, path, count in self.homes.get(facts.home, ()):
            own[path] = own.get(path, 0) + count
        return sum((count - own.get(path, 0)) / self.settings.bandwidth[self._level(facts.switches, heights)]
                   for path, heights, count in self._below) / self._ranks

    def _level(self, switches: tuple[str, ...], heights: Mapping[str, int]) -> int:
        for height, switch in enumerate(switches, 1):
            if switch in heights:
                other = heights[switch]
                return min(height if height > other else other, self._last)
        return self._last

    def near(self, facts: NodeFacts) -> list[tuple[int | None, float]]:
        """Ranks of the node itself: their NUMA node, and their share of all ranks."""
        return [(numa, count / self._ranks) for numa, _, count in self.homes.get(facts.home, ())]

    # ---- risk ------------------------------------------------------------------------------------

    def ends_within(self, facts: NodeFacts) -> float:
        """The probability that the node's window ends while the demand lasts."""
        if facts.hard_end is not None and facts.hard_end < self._until:
            return 1.0
        return facts.ends_within(self.settings.survival, self._second, self.duration_s)

    def eviction_s(self, facts: NodeFacts, risk: float, here: int, left: int) -> float:
        """What the next worker's eviction is likely to cost.

        risk · (half a call + the constants again + a cold start · (1 + those that are likely to be lost with it, since
        replacements start one after the other)).

        In a gang all wait for the lost ones, however many were lost at once: what costs is each further node that may
        end. Its first worker pays, for as many as will come: risk · all workers · (the same) / workers that go there;
        those of a cohort that the gang depends on already end apart from it with 1 − same_cohort only.
        """
        settings, placed = self.settings, self.placed
        if self.needs.gang:
            if here > 0:
                return 0.0
            together = self.by_cohort.get(facts.cohort, 0) if facts.cohort else here
            apart = 1.0 - settings.same_cohort if together > 0 else 1.0
            most = self.needs.workers_max
            return risk * apart * most * self._alone_s / max(1, min(left, most - placed))
        if not placed:
            return risk * self._alone_s
        # The node's own workers are lost for sure if its window ends.
        together = self.by_cohort.get(facts.cohort, 0) if facts.cohort else here
        lost_too = here + settings.same_cohort * (together - here) + settings.other_cohort * (placed - together)
        return risk * (self._redo_s + settings.cold_s * (1.0 + lost_too))

    def fairness_s(self, facts: NodeFacts) -> float:
        """What the others wait for this lease, weighed by how far its user is ahead.

        duration · (share of the free cores that others wait for) · debt / (debt + duration). Nodes that lend to this
        user only cost nobody anything.
        """
        if not self.others_wait or facts.lends_to_uid is not None:
            return 0.0
        debt = self.needs.debt_s
        return self.duration_s * self.others_wait * debt / (debt + self.duration_s)


class Room:
    """One node as the demand sees it; None of its workers is placed yet."""

    __slots__ = ("_apart", "_begin_s", "_cores", "_far", "_fixed_s", "_free", "_near", "_risk", "_seat", "_slow",
                 "_slow_s", "_start_s", "_transfer_s", "_used", "facts", "here", "key", "left", "scorer")

    def __init__(self, facts: NodeFacts, scorer: Scorer, left: int) -> None:
        needs = scorer.needs
        self.facts = facts
        self.key = facts.node
        self.scorer = scorer
        self.left = left                       # workers that fit still
        self.here = 0                          # workers of the demand that were placed here
        self._free = facts.free_by_domain(needs.whole_cores, needs.classes)
        self._used: dict[int, int] = {}        # NUMA node → how many of its usable cores are taken
        self._cores: dict[int, Iterator[int]] = {}    # NUMA node → those that are left
        self._slow: dict[int, float] | None = None    # NUMA node → slowdown of a worker there; None: not looked at
        # The next worker's seat, once it is found, and all of its cost but for the eviction and what never changes.
        self._seat: tuple[int, ...] = ()
        self._begin_s = self._transfer_s = self._slow_s = 0.0

    @property
    def cores_left(self) -> int:
        """Usable cores that no worker has yet."""
        return sum(self._free.values()) - sum(self._used.values())

    def cost(self) -> Terms:
        """What the next worker here costs. ValueError if none fits."""
        if not self._seat:
            self._find_seat()
        scorer = self.scorer
        return Terms(
            queueing_s=self._start_s + self.here * scorer.settings.next_s,
            transfer_s=self._transfer_s, slowdown_s=self._slow_s,
            eviction_s=scorer.eviction_s(self.facts, self._risk, self.here, self.left), fairness_s=self._fixed_s)

    def total_s(self) -> float:
        """The sum of `cost`, without the object."""
        if not self._seat:
            self._find_seat()
        return (self._begin_s + self.scorer.eviction_s(self.facts, self._risk, self.here, self.left)
                + self._fixed_s)

    def lost_s(self) -> float:
        """That sum without the slowdown."""
        return self.total_s() - self._slow_s

    def take(self) -> Placed:
        """Places the next worker. ValueError if none fits."""
        terms = self.cost()
        return Placed(self.facts.node, self.seat(), terms)

    def seat(self) -> tuple[int, ...]:
        """The same, the cores only."""
        if not self._seat:
            self._find_seat()
        scorer, facts = self.scorer, self.facts
        needs = scorer.needs
        wanted = needs.cores_per_worker
        cores: tuple[int, ...] = ()
        for domain in self._seat:
            if (left := self._cores.get(domain)) is None:
                left = self._cores[domain] = facts.cores(domain, needs.whole_cores, needs.classes)
            some = tuple(islice(left, wanted - len(cores)))
            self._used[domain] = self._used.get(domain, 0) + len(some)
            cores += some
        self.left -= 1
        self.here += 1
        if self.left > 0 and self._slow is not None:
            if self.here == 1:
                self._slow = dict(self._slow)  # others may look at the first ones still
            self._find_slow(self._seat)
        self._seat = ()
        scorer.placed += 1
        if cohort := facts.cohort:
            scorer.by_cohort[cohort] = scorer.by_cohort.get(cohort, 0) + 1
        return cores

    # ---- inside ----------------------------------------------------------------------------------

    def _look(self) -> dict[int, float]:
        """Finds what placing workers here doesn't change, and the first slowdowns."""
        scorer, facts, settings = self.scorer, self.facts, self.scorer.settings
        self._risk = scorer.ends_within(facts)
        self._start_s = (settings.warm_s if facts.warm else settings.cold_s) + facts.starting * settings.next_s
        self._fixed_s = scorer.fairness_s(facts) if scorer.others_wait else 0.0
        self._near = scorer.near(facts) if (facts.host or facts.node) in scorer.homes else []
        self._far = scorer.far_per_byte(facts)
        # Without a rank or a network card on one side all NUMA nodes are equally far.
        self._apart = bool(self._near) or facts.nic_numa is not None
        # Few nodes change from one demand to the next; a factor of classes depends on more than this.
        kept = facts.__dict__
        if "_slow" in kept and kept["_slow"][0] == scorer.slow_key:
            slow = self._slow = kept["_slow"][1]
        else:
            slow = self._slow = {}
            self._find_slow(self._free)
            if not facts.classes:
                kept["_slow"] = (scorer.slow_key, slow)
        return slow

    def _find_seat(self) -> None:
        """The NUMA nodes that the next worker is on (one, if any has room), its transfer and its slowdown."""
        if self.left < 1:
            raise ValueError(f"no further worker fits on {self.facts.node}")
        slow = self._slow or self._look()
        wanted, used, apart = self.scorer.needs.cores_per_worker, self._used, self._apart
        transfer_s = 0.0 if apart else self._find_transfer_s(0)
        best: int | None = None
        best_s = best_transfer_s = 0.0
        for domain, free in self._free.items():
            if free - used.get(domain, 0) < wanted:
                continue
            if apart:
                transfer_s = self._find_transfer_s(domain)
            costs_s = transfer_s + slow[domain]
            if best is None or costs_s < best_s or (costs_s == best_s and domain < best):
                best, best_s, best_transfer_s = domain, costs_s, transfer_s
        if best is None:
            self._straddle(slow)
        else:
            self._seat, self._transfer_s, self._slow_s = (best,), best_transfer_s, slow[best]
        self._begin_s = self._start_s + self.here * self.scorer.settings.next_s + self._transfer_s + self._slow_s

    def _straddle(self, slow: Mapping[int, float]) -> None:
        """No NUMA node has enough: the fullest ones together, as slow as the slowest of all and far from each."""
        missing = self.scorer.needs.cores_per_worker
        free = {domain: free - self._used.get(domain, 0) for domain, free in self._free.items()}
        domains = []
        for domain in sorted(free, key=lambda domain: (-free[domain], domain)):
            domains.append(domain)
            missing -= free[domain]
            if missing <= 0:
                break
        self._seat = tuple(domains)
        self._transfer_s = max(self._find_transfer_s(domain, far=True) for domain in domains)
        # One seat less to choose from never makes the next one cheaper.
        self._slow_s = max(slow.values())

    def _find_transfer_s(self, domain: int, far: bool = False) -> float:
        scorer, facts, settings = self.scorer, self.facts, self.scorer.settings
        if not scorer.bytes:
            return 0.0
        seconds = 0.0
        for numa, share in self._near:
            other = far or (numa is not None and numa != domain)
            seconds += share / settings.bandwidth[0] * (settings.far_numa if other else 1.0)
        if self._far:
            other = far or (facts.nic_numa is not None and facts.nic_numa != domain)
            load = facts.network_load + self.here * scorer.rate / scorer.link
            seconds += self._far * (settings.far_numa if other else 1.0) / (1.0 - (load if load < 0.95 else 0.95))
        return scorer.bytes * seconds

    def _find_slow(self, domains: Iterable[int]) -> None:
        """How much longer kernels take on each of these NUMA nodes than on a quiet node's free core, over the whole
        duration."""
        scorer, facts, slow, used = self.scorer, self.facts, self._slow, self._used
        contention, memory_contention, bound = scorer.contention, scorer.memory_contention, scorer.needs.memory_bound
        guessed, duration_s, speed = scorer.settings.guessed_pressure, scorer.duration_s, facts.speed
        measured, loads, classes = facts.memory_pressure, facts.domain_load, facts.classes
        for domain in domains:
            size, busy = loads.get(domain, (1, 0))
            others, ours = busy / size, used.get(domain, 0) / size
            pressure = guessed * others
            if measured is not None:
                pressure = measured.get(domain, pressure)
            busy = others + ours
            factor = (1.0 + contention * (busy if busy < 1.0 else 1.0)
                      + memory_contention * (pressure + bound * ours))
            if classes:
                factor *= self._class_factor(domain)
            slow[domain] = duration_s * (factor / speed - 1.0)

    def _class_factor(self, domain: int) -> float:
        """Of the worst core of the next worker there: idle cores come last, so that it never falls."""
        needs = self.scorer.needs
        cores = self.facts.usable(needs.whole_cores, needs.classes)[domain]
        last = min(self._used.get(domain, 0) + needs.cores_per_worker, len(cores)) - 1
        return self.scorer.settings.idle_class if self.facts.classes.get(cores[last]) == "idle" else 1.0


def _heights(path: tuple[str, ...]) -> dict[str, int]:
    """Switch → how high it is above its node; the lower one where it is there twice."""
    return {switch: len(path) - position for position, switch in enumerate(reversed(path))}


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _cores(count: int) -> str:
    return f"{count} core{'s' if count != 1 else ''}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.3g} GiB"

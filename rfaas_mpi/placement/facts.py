"""What placement is told, and what it answers: frozen facts, no clock behind them.

Times are seconds on the caller's monotonic clock (`since`, `hard_end`, `now`) or plain durations (`…_s`). A core is a
CPU as the kernel numbers it; a *physical core* is the set of CPUs (SMT siblings) that share one pipeline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

from rfaas_mpi.placement.survival import Survival

__all__ = ["Asked", "AskedFrom", "ClusterView", "CoreClass", "Needs", "NodeFacts", "Placed", "Placement", "RankPlace",
           "Refusal", "Terms", "Verdict"]

CoreClass: TypeAlias = Literal["free", "specialised", "unused", "idle"]
"""Whose a spare core is, in the detector's words: in no job's cpuset · kept from jobs · a job's, in no task's mask ·
a job's, and idle."""


_T = TypeVar("_T")


class _kept(Generic[_T]):
    """functools.cached_property without its lock: to find the same thing twice does no harm, and waiting costs."""

    def __init__(self, find: Callable[[Any], _T]) -> None:
        self.find = find
        self.name = find.__name__
        self.__doc__ = find.__doc__

    def __get__(self, facts: Any, owner: type | None = None) -> _T:
        value = facts.__dict__[self.name] = self.find(facts)
        return value


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What is known of one batch node. What is left out counts neither for nor against it, unless said so here.

    ValueError for a core that is listed twice, or is both spare and lent. Don't change the mappings afterwards: what
    follows from them is kept.
    """

    node: str
    spare: tuple[int, ...]                     # lendable now, best first; lent ones are not among them
    memory_bytes: int = 0                      # lendable now
    lent: frozenset[int] = frozenset()         # held by leases of ours
    busy: frozenset[int] = frozenset()         # where anything runs, owners' work and ours
    numa: Mapping[int, int] = field(default_factory=dict)       # core → NUMA node; a missing core is on 0
    physical: Mapping[int, int] = field(default_factory=dict)   # core → physical core; a missing one is its own
    classes: Mapping[int, str] = field(default_factory=dict)    # core → CoreClass; a missing one is "free"
    cpu_type: str = ""
    host: str = ""                             # the machine that it is; "": its name says so
    partition: str = ""
    lends_to_uid: int | None = None            # the only user it lends to; None: to all
    draining: str = ""                         # why nothing new may start there; "": it isn't draining
    closed: str = ""                           # why else it lends nothing, in words; "": it does
    heard_at: float | None = None              # when its agent last reported
    since: float | None = None                 # begin of its idle window; None: as if it began now
    hard_end: float | None = None              # known end of its idle window
    cohort: str = ""                           # nodes that became spare together have one name; "": alone
    cohort_size: int = 1                       # how many they were
    switches: tuple[str, ...] = ()             # the path up from its leaf switch
    network_load: float = 0.0                  # share of its link that is in use, 0 … 1
    nic_numa: int | None = None                # the NUMA node that its network card is on
    memory_pressure: Mapping[int, float] | None = None  # NUMA node → share of its memory bandwidth in use, if measured
    speed: float = 1.0                         # measured on it: a kernel takes 1/speed of its time elsewhere
    warm: bool = False                         # a zygote of the demand's environment is up there
    starting: int = 0                          # workers that are being started there right now

    def __post_init__(self) -> None:
        if len(set(self.spare)) != len(self.spare):
            raise ValueError(f"node {self.node}: a core is listed twice among the spare ones: {list(self.spare)}")
        if twice := self.lent.intersection(self.spare):
            raise ValueError(f"node {self.node}: core {min(twice)} is said to be both spare and lent")

    def lending(self, spare: tuple[int, ...], lent: frozenset[int], memory_bytes: int) -> NodeFacts:
        """The same node with other ones of its cores lent, for much less than a new one; unchecked."""
        other = object.__new__(NodeFacts)
        facts = other.__dict__
        facts.update(self.__dict__)
        facts["spare"], facts["lent"], facts["memory_bytes"] = spare, lent, memory_bytes
        # What follows from those three; the rest of what is kept still holds.
        for stale in ("domain_load", "domain_free", "unshared", "_usable", "_slow"):
            facts.pop(stale, None)
        taken, back = lent - self.lent, self.lent - lent
        if bool(taken) != bool(back) and len(self.spare) - len(taken) + len(back) == len(spare):
            # Spare ones were lent, or lent ones are spare, and nothing else: counting all again takes longer.
            free, load, numa, busy = dict(self.domain_free), dict(self.domain_load), self.numa, self.busy
            more = 1 if taken else -1
            for core in taken or back:
                domain = numa.get(core, 0)
                free[domain] = free.get(domain, 0) - more
                if not free[domain]:
                    del free[domain]
                if core not in busy:
                    size, used = load[domain]
                    load[domain] = size, used + more
            facts["domain_free"], facts["domain_load"] = free, load
        return other

    def ends_within(self, survival: Survival, at: float, for_s: float) -> float:
        """The probability that its window ends within so long from then; the last one that was asked for is kept."""
        kept = self.__dict__
        asked = (at, for_s, self.cohort_size)
        if "_risk" in kept and (known := kept["_risk"])[1] == asked and known[0] is survival:
            return known[2]
        age = at - self.since if self.since is not None else 0.0
        risk = survival.of(self.partition).ends_within(age, for_s, self.cohort_size)
        kept["_risk"] = (survival, asked, risk)
        return risk

    @property
    def home(self) -> str:
        """The machine that it is."""
        return self.host or self.node

    @_kept
    def domain_size(self) -> Mapping[int, int]:
        """NUMA node → how many of its cores are known."""
        sizes: dict[int, int] = dict(Counter(self.numa.values()))
        if missing := {*self.spare, *self.busy, *self.lent} - self.numa.keys():
            sizes[0] = sizes.get(0, 0) + len(missing)
        return sizes

    @_kept
    def domain_load(self) -> Mapping[int, tuple[int, int]]:
        """NUMA node → how many cores it has, and on how many of them something runs."""
        busy = Counter(map(self.numa.get, self.busy | self.lent if self.busy else self.lent, repeat(0)))
        return {domain: (size, busy.get(domain, 0)) for domain, size in self.domain_size.items()}

    @_kept
    def domain_free(self) -> Mapping[int, int]:
        """NUMA node → how many of its cores are spare; none where none is."""
        return Counter(map(self.numa.get, self.spare, repeat(0)))

    @_kept
    def unshared(self) -> tuple[int, ...]:
        """The spare cores whose physical core no lease holds a part of, in order."""
        of = self.physical
        if not of or not self.lent:
            return self.spare
        held = {of.get(core, core) for core in self.lent}
        return tuple(core for core in self.spare if of.get(core, core) not in held)

    def usable(self, whole_cores: bool, classes: frozenset[str] | None) -> Mapping[int, tuple[int, ...]]:
        """NUMA node → the cores that a worker may get, best first.

        First threads of physical cores come before second ones, which are left out with `whole_cores`; idle cores come
        last.
        """
        key = (whole_cores, classes)
        if (known := self._usable.get(key)) is None:
            known = self._usable[key] = self._find_usable(whole_cores, classes)
        return known

    @_kept
    def _usable(self) -> dict[tuple[bool, frozenset[str] | None], Mapping[int, tuple[int, ...]]]:
        return {}

    def cores(self, domain: int, whole_cores: bool, classes: frozenset[str] | None) -> Iterator[int]:
        """What `usable` has for that NUMA node, each found when it is asked for."""
        if classes is None and not self.physical and not self.classes:
            numa = self.numa
            return (core for core in self.spare if numa.get(core, 0) == domain)
        return iter(self.usable(whole_cores, classes)[domain])

    def count_usable(self, whole_cores: bool, classes: frozenset[str] | None) -> int:
        """How many cores `usable` has."""
        if classes is None and not self.physical:
            return len(self.spare)
        return sum(map(len, self.usable(whole_cores, classes).values()))

    def free_by_domain(self, whole_cores: bool, classes: frozenset[str] | None) -> Mapping[int, int]:
        """NUMA node → how many cores `usable` has there."""
        if classes is None and not self.physical:
            return self.domain_free
        return {domain: len(cores) for domain, cores in self.usable(whole_cores, classes).items()}

    def _find_usable(self, whole_cores: bool, classes: frozenset[str] | None) -> Mapping[int, tuple[int, ...]]:
        first: list[int] = []
        second: list[int] = []
        seen: set[int] = set()
        # The loop's result, where there is nothing to tell apart.
        plain = not self.physical and classes is None
        for core in () if plain else self.unshared:
            if classes is not None and self.classes.get(core, "free") not in classes:
                continue
            physical = self.physical.get(core, core)
            (second if physical in seen else first).append(core)
            seen.add(physical)
        chosen = list(self.spare) if plain else first if whole_cores else [*first, *second]
        if self.classes:
            # An owner may come back to an idle core at any time: those are the last resort, also within a NUMA node.
            chosen.sort(key=lambda core: self.classes.get(core) == "idle")
        domains: dict[int, list[int]] = {}
        for core, domain in zip(chosen, map(self.numa.get, chosen, repeat(0)), strict=True):
            if domain in domains:
                domains[domain].append(core)
            else:
                domains[domain] = [core]
        return {domain: tuple(cores) for domain, cores in domains.items()}


@dataclass(frozen=True)
class RankPlace:
    """Ranks of the demand that run on one node."""

    node: str
    count: int = 1
    numa: int | None = None                    # the NUMA node that they are bound to
    switches: tuple[str, ...] = ()             # above it, leaf first, for a node that isn't in the view


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a demand needs of placement.

    `transfer_bytes` is what each worker and its rank exchange in all; where it is None it is `bytes_per_s` times the
    duration. ValueError for bounds that are negative or out of order, and for a worker without a core.
    """

    workers_min: int
    workers_max: int
    cores_per_worker: int = 1
    memory_per_worker: int = 0
    uid: int = 0
    ranks: tuple[RankPlace, ...] = ()
    duration_s: float | None = None            # how long the workers are likely to be kept
    least_s: float = 0.0                       # a window with a known end must last so long
    call_s: float = 0.1                        # one invocation
    transfer_bytes: float | None = None
    bytes_per_s: float = 0.0                   # between one worker and its rank
    constants_bytes: int = 0                   # sent again to a worker that replaces another
    memory_bound: float = 0.3                  # 0: computes only … 1: waits for memory only
    gang: bool = False                         # all workers wait for a lost one
    whole_cores: bool = True                   # no two workers on one physical core
    classes: frozenset[str] | None = None      # the CoreClasses that it takes; None: all
    cpu_type: str = ""                         # "": any; results are the same bits on one type only
    avoid: frozenset[str] = frozenset()        # nodes that have failed it
    debt_s: float = 0.0                        # how far its user is ahead of the share, see fairness.debt_s

    def __post_init__(self) -> None:
        if not 0 <= self.workers_min <= self.workers_max:
            raise ValueError(f"workers are ({self.workers_min}, {self.workers_max}); 0 <= min <= max must hold")
        if self.cores_per_worker < 1:
            raise ValueError(f"cores_per_worker is {self.cores_per_worker}; a worker needs at least one core")
        if self.memory_per_worker < 0:
            raise ValueError(f"memory_per_worker is {self.memory_per_worker}; it can't be negative")
        if self.duration_s is not None and not self.duration_s > 0:
            raise ValueError(f"duration_s is {self.duration_s}; it must be above 0")


class AskedFrom(Protocol):
    """Where ranks of a demand run, as the lease book has it."""

    @property
    def node(self) -> str: ...
    @property
    def numa(self) -> int | None: ...
    @property
    def switches(self) -> tuple[str, ...]: ...
    @property
    def ranks(self) -> int: ...


class Asked(Protocol):
    """A demand as the lease book has it."""

    @property
    def request_id(self) -> int: ...
    @property
    def session(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def workers_min(self) -> int: ...
    @property
    def workers_max(self) -> int: ...
    @property
    def cores_per_worker(self) -> int: ...
    @property
    def memory_per_worker(self) -> int | None: ...
    @property
    def duration_s(self) -> float | None: ...
    @property
    def least_s(self) -> float: ...
    @property
    def place(self) -> AskedFrom | None: ...
    @property
    def bytes_per_s(self) -> float | None: ...
    @property
    def others(self) -> Sequence[AskedFrom]: ...


@dataclass(frozen=True)
class ClusterView:
    """All nodes at one time; make it with `of`, whose order of nodes doesn't matter."""

    nodes: Mapping[str, NodeFacts]
    names: tuple[str, ...]                     # of all nodes, in order
    by_switch: Mapping[str, tuple[str, ...]]   # leaf switch → names of its nodes
    by_host: Mapping[str, tuple[str, ...]]     # machine → names of its nodes, where those are others
    paths: Mapping[str, tuple[str, ...]]       # switches above nodes that lend nothing; ranks run there, say
    waiting_cores: int = 0                     # wanted by demands that wait

    @classmethod
    def of(cls, nodes: Iterable[NodeFacts], *, paths: Mapping[str, tuple[str, ...]] | None = None,
           waiting_cores: int = 0) -> ClusterView:
        """The view of these nodes. ValueError for a name that comes twice."""
        by_name: dict[str, NodeFacts] = {}
        for facts in nodes:
            if facts.node in by_name:
                raise ValueError(f"node {facts.node} is listed twice")
            by_name[facts.node] = facts
        names = tuple(sorted(by_name))
        by_switch: dict[str, list[str]] = {}
        by_host: dict[str, list[str]] = {}
        for name in names:
            if switches := by_name[name].switches:
                by_switch.setdefault(switches[0], []).append(name)
            if (host := by_name[name].home) != name:
                by_host.setdefault(host, []).append(name)
        return cls(by_name, names, {switch: tuple(below) for switch, below in by_switch.items()},
                   {host: tuple(there) for host, there in by_host.items()}, paths or {}, waiting_cores)

    def with_node(self, facts: NodeFacts) -> ClusterView:
        """The view with newer facts of one of its nodes, for much less than a new view.

        ValueError for a node that isn't in it, or has moved to another switch.
        """
        known = self.nodes.get(facts.node)
        if known is None or (known.switches, known.host) != (facts.switches, facts.host):
            raise ValueError(f"node {facts.node} is new here or has moved; make a new view with ClusterView.of")
        return replace(self, nodes={**self.nodes, facts.node: facts})

    def path(self, node: str) -> tuple[str, ...]:
        """The switches above a node, from its leaf up; () where they aren't known."""
        facts = self.nodes.get(node)
        return facts.switches if facts is not None and facts.switches else self.paths.get(node, ())

    @cached_property
    def free_cores(self) -> int:
        """Spare cores of all nodes together."""
        return sum(len(facts.spare) for facts in self.nodes.values())


# --- answers ------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Terms:
    """What a worker at one place costs, in seconds of its time."""

    queueing_s: float = 0.0
    transfer_s: float = 0.0
    slowdown_s: float = 0.0
    eviction_s: float = 0.0
    fairness_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.queueing_s + self.transfer_s + self.slowdown_s + self.eviction_s + self.fairness_s

    @property
    def lost_s(self) -> float:
        """The seconds in which the worker does nothing for its rank; a slow worker still works."""
        return self.total_s - self.slowdown_s


@dataclass(frozen=True)
class Placed:
    """One worker: its node, its cores, and what the place costs."""

    node: str
    cores: tuple[int, ...]
    terms: Terms


@dataclass(frozen=True)
class Placement:
    """Where the workers go, in the order in which they were placed.

    `reason` is empty where all of `workers_max` were placed, else it says in one line why not.
    """

    workers: tuple[Placed, ...]
    reason: str = ""

    @property
    def by_node(self) -> dict[str, list[tuple[int, ...]]]:
        """Node → the cores of each of its workers."""
        nodes: dict[str, list[tuple[int, ...]]] = {}
        for worker in self.workers:
            nodes.setdefault(worker.node, []).append(worker.cores)
        return nodes

    @property
    def score_s(self) -> float:
        """What all workers cost together."""
        return sum(worker.terms.total_s for worker in self.workers)


@dataclass(frozen=True)
class Verdict:
    """One node's part of an explanation: why it is refused, or how many workers fit and what the next one costs."""

    node: str
    refused: tuple[str, ...] = ()
    workers: int = 0
    terms: Terms | None = None

    def __str__(self) -> str:
        if self.refused:
            return f"{self.node}: {', '.join(self.refused)}"
        fit = f"{self.workers} worker{'s' if self.workers != 1 else ''} fit{'s' if self.workers == 1 else ''}"
        if self.terms is None:
            return f"{self.node}: {fit}"
        parts = ", ".join(f"{name.removesuffix('_s')} {value:.3g}" for name, value in (
            ("queueing_s", self.terms.queueing_s), ("transfer_s", self.terms.transfer_s),
            ("slowdown_s", self.terms.slowdown_s), ("eviction_s", self.terms.eviction_s),
            ("fairness_s", self.terms.fairness_s)) if value > 0)
        return f"{self.node}: {fit}, {self.terms.total_s:.3g} s" + (f" ({parts})" if parts else "")


@dataclass(frozen=True)
class Refusal:
    """Not even `workers_min` can be placed: `reason` in one line, and what each node could have done."""

    asked: int
    available: int
    reason: str
    nodes: tuple[Verdict, ...]

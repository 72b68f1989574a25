"""The default policy for who decides thousands of times in a second: what `policies.least_cost` chooses, for less.

A `Spot` is a node between two demands. What its next worker costs hardly changes from one demand to the next, so a spot
keeps what follows from the node alone (cores free on each NUMA node, how slow it is beside its neighbours, how long its
window may live) until the node changes, and a demand adds what follows from itself.

`least_cost` stays the rule: the same additions in the same order, the same draws. What is rare (gangs, ranks of several
nodes, workers that straddle NUMA nodes, idle cores, a sample without enough room) is left to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heapreplace
from itertools import chain, islice
from typing import Any, TypeAlias

from rfaas_mpi.placement.chance import Chance
from rfaas_mpi.placement.facts import Asked, ClusterView, Needs, NodeFacts
from rfaas_mpi.placement.score import Settings

__all__ = ["Spot", "cheapest"]

_Seats: TypeAlias = dict[str, list[tuple[int, ...]]]

# What a lease book doesn't say of its demands.
_CALL_S = Needs(workers_min=0, workers_max=0).call_s
_MEMORY_BOUND = Needs(workers_min=0, workers_max=0).memory_bound


class Spot:
    """A node as it stands, and what its next worker costs as far as that follows from the node."""

    __slots__ = ("_facts", "_held", "_size_of", "_stale", "_used_of", "cohort", "count", "free", "free_of", "hard_end",
                 "home", "lends_to_uid", "load", "memory_bytes", "nic_numa", "odd", "rest", "risk", "risk_key", "since",
                 "slow", "slow_key", "speed", "start_s", "switches")

    def __init__(self, facts: NodeFacts, settings: Settings) -> None:
        self._used_of: dict[int, int] = {}
        self.risk_key: tuple[Any, ...] | None = None
        self.slow: dict[int, float] = {}
        self.slow_key: tuple[float, ...] | None = None
        self.know(facts, settings)

    def know(self, facts: NodeFacts, settings: Settings) -> None:
        """These are the facts now."""
        self._facts, self._stale = facts, False
        self._held = set(facts.lent)
        self.free, self.memory_bytes = facts.spare, facts.memory_bytes
        self.home, self.switches, self.nic_numa = facts.home, facts.switches, facts.nic_numa
        self.lends_to_uid, self.hard_end, self.since = facts.lends_to_uid, facts.hard_end, facts.since
        self.cohort, self.load, self.speed = facts.cohort, facts.network_load, facts.speed
        self.rest = 1.0 - (facts.network_load if facts.network_load < 0.95 else 0.95)
        self.start_s = (settings.warm_s if facts.warm else settings.cold_s) + facts.starting * settings.next_s
        # Costs that depend on more than is kept here.
        self.odd = (bool(facts.draining or facts.closed) or facts.heard_at is not None
                    or facts.memory_pressure is not None or "idle" in facts.classes.values())
        self.risk_key, self.risk = None, 0.0
        self._count(facts)

    def move(self, cores: Iterable[int], free: tuple[int, ...], memory_bytes: int) -> None:
        """These cores were lent, or came back; nothing else has changed."""
        facts = self._facts
        taken = len(free) < len(self.free)
        self.free, self.memory_bytes, self._stale = free, memory_bytes, True
        if taken:
            self._held.update(cores)
        else:
            self._held.difference_update(cores)
        if facts.physical:
            self._count(self.facts)
            return
        one = 1 if taken else -1
        numa, busy, free_of, used_of = facts.numa, facts.busy, self.free_of, self._used_of
        for core in cores:
            domain = numa.get(core, 0)
            free_of[domain] = free_of.get(domain, 0) - one
            if core not in busy:
                used_of[domain] = used_of.get(domain, 0) + one
        self.count = len(free)
        self.slow_key = None

    def _count(self, facts: NodeFacts) -> None:
        self.free_of = dict(facts.free_by_domain(True, None))
        self.count = facts.count_usable(True, None)
        self._size_of = facts.domain_size
        self._used_of = {domain: used for domain, (_, used) in facts.domain_load.items()}
        self.slow_key = None

    @property
    def facts(self) -> NodeFacts:
        """The same in full."""
        if self._stale:
            self._facts, self._stale = self._facts.lending(self.free, frozenset(self._held), self.memory_bytes), False
        return self._facts

    def ends_within(self, key: tuple[Any, ...]) -> float:
        """Scorer.ends_within of a window whose end isn't known; `key`: model, second, duration."""
        if self.risk_key == key:
            return self.risk
        self.risk_key = key
        self.risk = self._facts.ends_within(*key)
        return self.risk

    def find_slow(self, key: tuple[float, ...]) -> dict[int, float]:
        """Room._find_slow of all NUMA nodes with free cores; the dictionary is the spot's own."""
        duration_s, contention, memory_contention, guessed = key
        used_of, size_of, speed = self._used_of, self._size_of, self.speed
        slow = {}
        for domain in self.free_of:
            busy = used_of.get(domain, 0) / size_of.get(domain, 1)
            factor = 1.0 + contention * (busy if busy < 1.0 else 1.0) + memory_contention * (guessed * busy)
            slow[domain] = duration_s * (factor / speed - 1.0)
        self.slow, self.slow_key = slow, key
        return slow

    def slow_beside(self, domain: int, ours: int, key: tuple[float, ...]) -> float:
        """The same of one, beside so many cores of the demand itself."""
        duration_s, contention, memory_contention, guessed = key
        size = self._size_of.get(domain, 1)
        others, own = self._used_of.get(domain, 0) / size, ours / size
        busy = others + own
        factor = (1.0 + contention * (busy if busy < 1.0 else 1.0)
                  + memory_contention * (guessed * others + _MEMORY_BOUND * own))
        return duration_s * (factor / self.speed - 1.0)

    def cores(self, domain: int) -> Iterator[int]:
        """Those for workers there, best first."""
        facts = self._facts
        if facts.physical or facts.classes:
            return self.facts.cores(domain, True, None)
        numa = facts.numa
        return (core for core in self.free if numa.get(core, 0) == domain)


class _Stay:
    """What a demand has on a node already."""

    __slots__ = ("cores", "found", "here", "slow", "used")

    def __init__(self, spot: Spot) -> None:
        self.here = 0
        self.used: dict[int, int] = {}
        self.slow = dict(spot.slow)
        self.cores: dict[int, Iterator[int]] = {}
        self.found: list[tuple[int, ...]] = []


@lru_cache(maxsize=1 << 16)
def _per_byte(switches: tuple[str, ...], path: tuple[str, ...], bandwidth: tuple[float, ...]) -> float:
    """Scorer.far_per_byte of a node below these switches and a rank below that path."""
    last = level = len(bandwidth) - 1
    for height, switch in enumerate(switches, 1):
        if switch in path:
            level = min(max(height, path.index(switch) + 1), last)
            break
    return 1.0 / bandwidth[level]


def cheapest(demand: Asked, now: float, seed: int, spots: Mapping[str, Spot], likely: Sequence[str],
             view: ClusterView, settings: Settings) -> _Seats | None:
    """Node → the cores of each worker, as by the default policy; None where `least_cost` has to be asked.

    Of the view its names, switches and machines count only. `likely`: the names of all spots with something free.
    """
    missing = most = demand.workers_max
    wanted, uid, least_s, place = demand.cores_per_worker, demand.uid, demand.least_s, demand.place
    memory = demand.memory_per_worker or 0
    duration_s = demand.duration_s if demand.duration_s is not None else settings.horizon_s
    if most < 1 or demand.others or (place is not None and place.ranks < 1):
        return None
    until, min_age_s = now + duration_s, settings.min_age_s
    redo_s, cold_s = _CALL_S / 2, settings.cold_s
    alone_s = redo_s + cold_s
    slow_key = (duration_s, settings.contention, settings.memory_contention * _MEMORY_BOUND, settings.guessed_pressure)
    risk_key = (settings.survival, math.floor(now), duration_s)
    bandwidth, far_numa = settings.bandwidth, settings.far_numa
    home, at_home, home_s, home_away_s, exchange = None, None, 0.0, 0.0, 0.0
    path: tuple[str, ...] = ()
    if place is not None:
        home = place.node
        exchange = (settings.assumed_bytes_per_s if demand.bytes_per_s is None else demand.bytes_per_s) * duration_s
        path = view.path(place.node) or place.switches
        at_home, home_s = place.numa, exchange * (1.0 / bandwidth[0])
        home_away_s = exchange * (1.0 / bandwidth[0] * settings.far_numa)

    # ---- what the first worker costs on each node that is looked at --------------------------------
    chance = Chance(seed)
    offers: list[tuple[float, str, Spot, int, int, float, float, float, _Stay | None]] = []
    seen: set[str] = set()
    sample = settings.sample
    near_home = max(sample // 2, 0 if place is None else 1)
    everywhere = len(likely) <= settings.exact_to
    rounds: tuple[tuple[int, bool, Iterable[str]], ...] = ((len(likely), False, likely),) if everywhere else (
        (near_home, False, () if place is None else chain(
            (place.node,) if place.node in view.nodes else (), view.by_host.get(place.node, ()),
            chance.shuffled(view.by_switch.get(path[0], ())) if path else ())),
        (near_home + sample - sample // 2, True, chance.shuffled(likely)))
    for enough, for_all, names in rounds:
        for name in names:
            if len(seen) >= enough and not (for_all and missing > 0):
                break
            spot = spots[name]
            if spot.count < wanted or name in seen:
                continue
            if spot.odd:
                return None
            if spot.lends_to_uid is not None and spot.lends_to_uid != uid:
                continue
            if min_age_s > 0.0 and (spot.since is None or now - spot.since < min_age_s):
                continue
            if (end := spot.hard_end) is None:
                risk = spot.risk if spot.risk_key == risk_key else spot.ends_within(risk_key)
            elif end - now <= least_s:
                continue
            else:
                risk = 1.0 if end < until else spot.ends_within(risk_key)
            left = spot.count // wanted
            if memory > 0 and (left := min(left, spot.memory_bytes // memory)) < 1:
                continue
            near, here_s, away_s = None, 0.0, 0.0
            if exchange:
                if spot.home == home:
                    near, here_s, away_s = at_home, home_s, home_away_s
                else:
                    seconds = _per_byte(spot.switches, path, bandwidth)
                    here_s = exchange * (seconds / spot.rest)
                    if (near := spot.nic_numa) is not None:
                        away_s = exchange * (seconds * far_numa / spot.rest)
            slow = spot.slow if spot.slow_key == slow_key else spot.find_slow(slow_key)
            best, best_s, moved_s = -1, math.inf, 0.0
            for domain, free in spot.free_of.items():
                if free >= wanted:
                    moving_s = here_s if near is None or near == domain else away_s
                    costs_s = moving_s + slow[domain]
                    if costs_s < best_s or (costs_s == best_s and domain < best):
                        best, best_s, moved_s = domain, costs_s, moving_s
            if best < 0:
                return None                    # it would straddle NUMA nodes
            begin_s = spot.start_s + moved_s + slow[best]
            offers.append((begin_s + risk * alone_s, name, spot, left, best, begin_s, risk, slow[best], None))
            seen.add(name)
            missing -= left

    # ---- the cheapest each time; an old cost is a bound -------------------------------------------
    found: _Seats = {}
    by_cohort: dict[str, int] = {}
    placed, least = 0, demand.workers_min
    same, other = settings.same_cohort, settings.other_cohort
    heapify(offers)
    while offers:
        cost_s, name, spot, left, domain, begin_s, risk, slow_s, stay = offers[0]
        cohort = spot.cohort
        if placed:
            here = stay.here if stay is not None else 0
            together = by_cohort.get(cohort, 0) if cohort else here
            lost_too = here + same * (together - here) + other * (placed - together)
            fresh_s = begin_s + risk * (redo_s + cold_s * (1.0 + lost_too))
            if fresh_s > cost_s:
                heapreplace(offers, (fresh_s, name, spot, left, domain, begin_s, risk, slow_s, stay))
                continue
            cost_s = fresh_s
        if placed >= least and cost_s - slow_s >= duration_s:
            return None                        # too dear: perhaps no other node is
        placed += 1
        if stay is None:
            if placed == most:
                # Nearly half of all demands are for one worker.
                found[name] = [tuple(islice(spot.cores(domain), wanted))]
                return found
            stay = _Stay(spot)
            found[name] = stay.found
        if (cores := stay.cores.get(domain)) is None:
            cores = stay.cores[domain] = spot.cores(domain)
        stay.found.append(tuple(islice(cores, wanted)))
        if placed == most:
            return found
        if cohort:
            by_cohort[cohort] = by_cohort.get(cohort, 0) + 1
        stay.here += 1
        left -= 1
        if left == 0:
            heappop(offers)
            continue
        used, slow = stay.used, stay.slow
        used[domain] = used.get(domain, 0) + wanted
        slow[domain] = spot.slow_beside(domain, used[domain], slow_key)
        near, here_s, away_s = None, 0.0, 0.0
        if exchange and spot.home == home:
            near, here_s, away_s = at_home, home_s, home_away_s
        elif exchange:
            load = spot.load + stay.here * (exchange / duration_s) / bandwidth[min(1, len(bandwidth) - 1)]
            rest = 1.0 - (load if load < 0.95 else 0.95)
            near, seconds = spot.nic_numa, _per_byte(spot.switches, path, bandwidth)
            here_s, away_s = exchange * (seconds / rest), exchange * (seconds * far_numa / rest)
        best, best_s, moved_s = -1, math.inf, 0.0
        for domain, free in spot.free_of.items():
            if free - used.get(domain, 0) >= wanted:
                moving_s = here_s if near is None or near == domain else away_s
                costs_s = moving_s + slow[domain]
                if costs_s < best_s or (costs_s == best_s and domain < best):
                    best, best_s, moved_s = domain, costs_s, moving_s
        if best < 0:
            return None
        begin_s = spot.start_s + stay.here * settings.next_s + moved_s + slow[best]
        heapreplace(offers, (cost_s, name, spot, left, best, begin_s, risk, slow[best], stay))
    return None


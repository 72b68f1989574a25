"""`python -m rfaas_mpi.bench.placement`: placement's policies side by side, and how long a decision takes.

`compare` replays one synthetic trace (idle windows and demands, from a seed) with each policy, through the same code
that places leases. What it reports of evictions and waits is what happened in the replay; transfer and slowdown are
what the model of placement/score.py says of the places that were chosen, since no bytes move here.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from rfaas_mpi._version import __version__
from rfaas_mpi.bench import environment
from rfaas_mpi.bench.suite import check_writable, keep
from rfaas_mpi.placement import (
    POLICIES,
    ClusterView,
    LogNormals,
    Needs,
    NodeFacts,
    Placement,
    RankPlace,
    Settings,
    fill,
    place,
)
from rfaas_mpi.placement.survival import DAINT, PROMETHEUS_FIB, cohort_stretch

__all__ = ["SCENARIOS", "Scenario", "compare", "measure_decisions", "replay", "tables", "trace"]

# Share of all windows that begin in a cohort of so many (HPC-Whisk's traces, as in placement/survival.py).
_COHORTS = ((1, 1, 0.30), (2, 3, 0.17), (4, 7, 0.27), (8, 15, 0.14), (16, 32, 0.12))
_CORES = 32


@dataclass(frozen=True)
class Scenario:
    """What is replayed: a cluster of `nodes` with `switch` of them below each leaf switch, for `seconds`."""

    name: str
    windows: LogNormals = PROMETHEUS_FIB
    nodes: int = 400
    switch: int = 16
    seconds: float = 3600.0
    idle_nodes: float = 30.0                   # at a time, on average
    load: float = 0.5                          # of the idle cores, if every demand got its most
    duration_s: float = 120.0                  # mean, exponential
    call_s: float = 0.1
    constants_bytes: int = 0
    neighbours: bool = True                    # kernels slow each other down
    gang: bool = False                         # all workers of a demand wait for a lost one
    memory_bound: tuple[float, ...] = (0.1, 0.9)
    bytes_per_s: tuple[float, float] = (1e5, 3e8)
    gives_up_s: float = 300.0

    def facts(self) -> dict[str, Any]:
        return {"windows": self.windows.parts, **{name: getattr(self, name) for name in (
            "nodes", "switch", "seconds", "idle_nodes", "load", "duration_s", "call_s", "constants_bytes",
            "neighbours", "gang", "memory_bound", "bytes_per_s", "gives_up_s")}}


# An eviction costs half a call of 20 s and 2 GB of constants; kernels that compute, and little to transfer.
_DEAR: dict[str, Any] = {"call_s": 20.0, "constants_bytes": 2_000_000_000, "memory_bound": (0.1,),
                         "bytes_per_s": (1e5, 1e7)}
SCENARIOS = (
    # An eviction costs next to nothing here: memory and links decide.
    Scenario("short calls"),
    Scenario("gangs, long calls", gang=True, **_DEAR),
    Scenario("long calls, neighbours don't matter", neighbours=False, **_DEAR),
    Scenario("the same, windows of Piz Daint", windows=DAINT, neighbours=False, **_DEAR))


# --- the trace ----------------------------------------------------------------

@dataclass(frozen=True)
class _IdleWindow:
    node: int
    begin: float
    end: float
    cohort: str
    cohort_size: int


@dataclass(frozen=True)
class _Demand:
    at: float
    needs: Needs
    seed: int


@dataclass(frozen=True)
class Trace:
    """Windows and demands in order of their times; the same for every policy."""

    windows: tuple[_IdleWindow, ...]
    demands: tuple[_Demand, ...]


def trace(scenario: Scenario, seed: int) -> Trace:
    """The trace of a seed. Before its time 0 windows come and go for a while, so that it begins with old ones too."""
    chance = random.Random(seed)
    return Trace(tuple(_windows(scenario, chance)), tuple(_demands(scenario, chance)))


def _windows(scenario: Scenario, chance: random.Random) -> list[_IdleWindow]:
    mean_s = sum(weight * median * math.exp(sigma**2 / 2) for weight, median, sigma in scenario.windows.parts)
    # By events, not by windows: a cohort of eight is one event and eight windows.
    weights = [share / ((low + high) / 2) for low, high, share in _COHORTS]
    per_event = sum(weight * (low + high) / 2 for weight, (low, high, _) in zip(weights, _COHORTS, strict=True))
    stretch = sum(share * cohort_stretch((low + high) // 2) for low, high, share in _COHORTS)
    gap_s = per_event / sum(weights) * mean_s * stretch / scenario.idle_nodes
    taken_until = [-math.inf] * scenario.nodes
    windows = []
    now = -3600.0
    while (now := now + chance.expovariate(1 / gap_s)) < scenario.seconds:
        low, high, _ = chance.choices(_COHORTS, weights)[0]
        size, start = chance.randint(low, high), chance.randrange(scenario.nodes)
        # A job's nodes lie side by side, mostly.
        free = [node % scenario.nodes for node in range(start, start + scenario.nodes)
                if taken_until[node % scenario.nodes] < now][:size]
        together_s = _length(scenario, chance, len(free))
        for node in free:
            # Two of a cohort end together with p = 0.70.
            own = chance.random() > math.sqrt(0.70)
            length = _length(scenario, chance, len(free)) if own else together_s
            taken_until[node] = now + length
            windows.append(_IdleWindow(node, now, now + length, f"{now:.3f}", len(free)))
    return [window for window in windows if window.end > 0]


def _length(scenario: Scenario, chance: random.Random, cohort_size: int) -> float:
    parts = scenario.windows.parts
    _, median, sigma = chance.choices(parts, [weight for weight, _, _ in parts])[0]
    return chance.lognormvariate(math.log(median), sigma) * cohort_stretch(cohort_size)


def _demands(scenario: Scenario, chance: random.Random) -> list[_Demand]:
    # Up to 4, 8 or 16 workers with 1, 2 or 4 cores: 21.8 cores on average.
    gap_s = scenario.duration_s * 9.333 * 2.333 / (scenario.load * scenario.idle_nodes * _CORES)
    demands = []
    now = 0.0
    while (now := now + chance.expovariate(1 / gap_s)) < scenario.seconds:
        most = chance.choice((4, 8, 16))
        demands.append(_Demand(now, Needs(
            workers_min=most // 4, workers_max=most, cores_per_worker=chance.choice((1, 2, 4)),
            ranks=(RankPlace(_name(chance.randrange(scenario.nodes)), 4),),
            duration_s=chance.expovariate(1 / scenario.duration_s) + 1.0, call_s=scenario.call_s,
            constants_bytes=scenario.constants_bytes, gang=scenario.gang,
            bytes_per_s=math.exp(chance.uniform(*map(math.log, scenario.bytes_per_s))),
            memory_bound=chance.choice(scenario.memory_bound)), chance.randrange(1 << 30)))
    return demands


def _name(node: int) -> str:
    return f"n{node:04}"


def _path(scenario: Scenario, node: int) -> tuple[str, ...]:
    leaf = node // scenario.switch
    return (f"leaf{leaf}", f"pod{leaf // 8}", "top")


# --- the replay ---------------------------------------------------------------

@dataclass
class _Sums:
    wanted: int = 0                            # workers of all demands, at most
    workers: int = 0
    evicted: int = 0
    refused: int = 0                           # demands that gave up
    waits: list[float] = field(default_factory=list)
    transfer_s: float = 0.0
    slowdown_s: float = 0.0
    redo_s: float = 0.0
    work_s: float = 0.0


def replay(scenario: Scenario, data: Trace, policy: str, settings: Settings, *, clairvoyant: bool = False) -> dict:
    """What happens to the trace's demands with a policy; `clairvoyant` tells it when each window will end."""
    sums = _Sums()
    order = count()
    events: list[tuple[float, int, int, Callable[[], None]]] = []
    open_nodes: dict[str, NodeFacts] = {}
    paths = {_name(node): _path(scenario, node) for node in range(scenario.nodes)}
    view = ClusterView.of((), paths=paths)
    lent: dict[str, set[int]] = {}             # node → leases with workers there
    leases: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    waiting: list[_Demand] = []
    now = 0.0

    def at(when: float, rank: int, what: Callable[[], None]) -> None:
        heapq.heappush(events, (when, rank, next(order), what))

    def opens(window: _IdleWindow) -> None:
        nonlocal view
        name = _name(window.node)
        open_nodes[name] = NodeFacts(
            node=name, spare=tuple(range(_CORES)), numa={core: core // 16 for core in range(_CORES)}, nic_numa=0,
            since=window.begin, hard_end=window.end if clairvoyant else None, cohort=window.cohort,
            cohort_size=window.cohort_size, switches=_path(scenario, window.node), memory_bytes=1 << 36)
        view = ClusterView.of(open_nodes.values(), paths=paths)
        serve()

    def closes(name: str) -> None:
        nonlocal view
        del open_nodes[name]
        view = ClusterView.of(open_nodes.values(), paths=paths)
        for lease in lent.pop(name, ()):
            lost = [place for place in leases[lease] if place[0] == name]
            leases[lease] = [place for place in leases[lease] if place[0] != name]
            sums.evicted += len(lost)
            waits = len(leases[lease]) if scenario.gang else 0
            sums.redo_s += (len(lost) + waits) * (scenario.call_s / 2 + settings.cold_s
                                                  + scenario.constants_bytes / settings.bandwidth[-1])

    def ends(lease: int) -> None:
        nonlocal view
        back: dict[str, set[int]] = {}
        for name, cores in leases.pop(lease):
            back.setdefault(name, set()).update(cores)
        for name, freed in back.items():
            lent[name].discard(lease)
            facts = open_nodes[name]
            open_nodes[name] = replace(facts, spare=(*facts.spare, *sorted(freed)), lent=facts.lent - freed)
            view = view.with_node(open_nodes[name])
        serve()

    def serve() -> None:
        while waiting and answer(waiting[0]):
            waiting.pop(0)

    def comes(demand: _Demand) -> None:
        sums.wanted += demand.needs.workers_max
        if waiting or not answer(demand):
            waiting.append(demand)
            at(demand.at + scenario.gives_up_s, 2, lambda: gives_up(demand))

    def gives_up(demand: _Demand) -> None:
        if demand in waiting:
            waiting.remove(demand)
            sums.refused += 1
            serve()

    def answer(demand: _Demand) -> bool:
        nonlocal view
        found = Placement(tuple(fill(demand.needs, view, policy, now=now, seed=demand.seed, settings=settings)))
        if len(found.workers) < demand.needs.workers_min:
            return False
        lease = next(order)
        leases[lease] = [(worker.node, worker.cores) for worker in found.workers]
        for name, workers in found.by_node.items():
            taken = {core for cores in workers for core in cores}
            facts = open_nodes[name]
            open_nodes[name] = replace(facts, lent=facts.lent | taken,
                                       spare=tuple(core for core in facts.spare if core not in taken))
            view = view.with_node(open_nodes[name])
            lent.setdefault(name, set()).add(lease)
        sums.workers += len(found.workers)
        sums.waits.append(now - demand.at)
        sums.transfer_s += sum(worker.terms.transfer_s for worker in found.workers)
        sums.slowdown_s += sum(worker.terms.slowdown_s for worker in found.workers)
        assert demand.needs.duration_s is not None
        sums.work_s += len(found.workers) * demand.needs.duration_s
        at(now + demand.needs.duration_s, 1, lambda: ends(lease))
        return True

    for window in data.windows:
        at(max(0.0, window.begin), 0, lambda window=window: opens(window))
        at(window.end, 3, lambda name=_name(window.node): closes(name))
    for demand in data.demands:
        at(demand.at, 2, lambda demand=demand: comes(demand))
    while events and events[0][0] < scenario.seconds:
        now, _, _, what = heapq.heappop(events)
        what()

    workers = max(1, sums.workers)
    waits = sorted(sums.waits) or [0.0]
    return {
        "workers": sums.workers, "granted": sums.workers / max(1, sums.wanted), "evicted": sums.evicted / workers,
        "gave_up": sums.refused / max(1, len(data.demands)), "wait_s": statistics.fmean(waits),
        "wait_p95_s": waits[int(0.95 * (len(waits) - 1))], "transfer_s": sums.transfer_s / workers,
        "slowdown_s": sums.slowdown_s / workers, "redo_s": sums.redo_s / workers,
        "lost_s": (sums.transfer_s + sums.slowdown_s + sums.redo_s) / workers, "duration_s": sums.work_s / workers}


# --- the comparison -----------------------------------------------------------

def compare(scenario: Scenario, seeds: Sequence[int], progress: Callable[[str], None] = lambda line: None) -> dict:
    """Row → figure → mean over the seeds, and 1.96 standard errors of it; all rows see the same traces.

    With few seeds that is less than a 95 % interval: 2.36 of them would be one for eight.
    """
    right = Settings(survival=scenario.windows)
    if not scenario.neighbours:
        right = replace(right, contention=0.0, memory_contention=0.0)
    wrong = replace(right, survival=DAINT if scenario.windows is not DAINT else PROMETHEUS_FIB)
    rows = {name: (name, right, False) for name in ("first-fit", "random", "pack", "spread", "two-choices", "default")}
    rows["default, another cluster's windows"] = ("default", wrong, False)
    rows["default, ends known"] = ("default", right, True)
    runs: dict[str, list[dict]] = {row: [] for row in rows}
    for seed in seeds:
        progress(f"{scenario.name}: seed {seed}")
        data = trace(scenario, seed)
        for row, (policy, settings, clairvoyant) in rows.items():
            runs[row].append(replay(scenario, data, policy, settings, clairvoyant=clairvoyant))
    return {row: {figure: _mean([run[figure] for run in found]) for figure in found[0]} for row, found in runs.items()}


def _mean(values: list[float]) -> dict[str, float]:
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(f"{statistics.fmean(values):.5g}"), "half_95": float(f"{half:.3g}")}


def tables(data: dict) -> str:
    """What `main` wrote, as Markdown: a table for each scenario, and one of decisions."""
    lines = []
    columns = {"evicted": ("evicted", "{:.1%}"), "wait_s": ("wait, s", "{:.2f}"),
               "transfer_s": ("transfer, s", "{:.2f}"), "slowdown_s": ("slowdown, s", "{:.1f}"),
               "redo_s": ("evictions, s", "{:.2f}"), "lost_s": ("sum, s", "{:.1f}")}
    for name, found in data.get("comparison", {}).items():
        lines += [f"**{name}**", "", "| policy | " + " | ".join(title for title, _ in columns.values()) + " |",
                  "|---|" + "---:|" * len(columns)]
        for row, figures in found["rows"].items():
            cells = (f"{form.format(figures[key]['mean'])} ± {form.format(figures[key]['half_95'])}"
                     for key, (_, form) in columns.items())
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    if decisions := data.get("decisions"):
        lines += [f"| decision over {decisions['nodes']} nodes | p50, µs | p99, µs |", "|---|---:|---:|"]
        lines += [f"| {name} | {figure['p50_us']:.0f} | {figure['p99_us']:.0f} |"
                  for name, figure in decisions.items() if name != "nodes"]
    return "\n".join(lines)


# --- decisions ----------------------------------------------------------------

def measure_decisions(nodes: int = 1000, rounds: int = 300) -> dict:
    """Policy → microseconds of one decision over so many nodes, for one worker and for eight.

    Each decision follows a change of the node that the one before took cores from, as in a manager. Placing only: no
    lease book, no message.
    """
    figures: dict[str, dict[str, float]] = {}
    for policy in POLICIES:
        for workers in (1, 8):
            chance = random.Random(1)
            view = ClusterView.of(_idle_nodes(nodes))
            took = []
            gc.collect()
            for seed in range(rounds + 20):
                needs = Needs(workers_min=1, workers_max=workers, duration_s=60.0, bytes_per_s=1e7,
                              ranks=(RankPlace(_name(chance.randrange(nodes)), 4),))
                begin = time.perf_counter_ns()
                answer = place(needs, view, policy, now=0.0, seed=seed)
                took.append(time.perf_counter_ns() - begin)
                assert isinstance(answer, Placement) and answer.workers
                facts = view.nodes[answer.workers[0].node]
                view = view.with_node(replace(facts, starting=1 - facts.starting))
            took = sorted(took[20:])
            figures[f"{policy}, {workers} worker{'s' if workers > 1 else ''}"] = {
                "p50_us": took[len(took) // 2] / 1e3, "p99_us": took[int(0.99 * (len(took) - 1))] / 1e3,
                "count": len(took)}
    return figures


def _idle_nodes(nodes: int) -> list[NodeFacts]:
    numa = {core: core // 16 for core in range(_CORES)}
    scenario = Scenario("")
    return [NodeFacts(node=_name(number), spare=tuple(range(number % 9, _CORES)), numa=numa, memory_bytes=1 << 36,
                      since=-3.0 * number, cohort=f"c{number // 7}", cohort_size=7, switches=_path(scenario, number))
            for number in range(nodes)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: prints the object, or writes it with --out."""
    parser = argparse.ArgumentParser(prog="python -m rfaas_mpi.bench.placement", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the object to this file")
    parser.add_argument("--seeds", type=int, default=20, help="how many traces of each scenario; 0: no comparison")
    parser.add_argument("--scenario", type=int, choices=range(len(SCENARIOS)), help="replay this one only")
    parser.add_argument("--decisions", type=int, default=300, help="decisions of each kind; 0: time none")
    parser.add_argument("--nodes", type=int, default=1000, help="nodes of the cluster that decisions are timed on")
    parser.add_argument("--tables", type=Path, help="measure nothing: print what is in this file as Markdown")
    options = parser.parse_args(arguments)
    if options.tables is not None:
        print(tables(json.loads(options.tables.read_text(encoding="utf-8"))))
        return
    if options.out is not None:
        check_writable(options.out)
    begin = time.monotonic()
    data: dict[str, Any] = {"bench": "placement", "version": __version__,
                            "command": ["python", "-m", "rfaas_mpi.bench.placement",
                                        *(sys.argv[1:] if arguments is None else arguments)],
                            "environment": environment.facts()}
    if options.seeds > 0:
        data["comparison"] = {
            scenario.name: {"scenario": scenario.facts(), "seeds": options.seeds, "rows": compare(
                scenario, range(options.seeds), lambda line: print(line, file=sys.stderr, flush=True))}
            for scenario in (SCENARIOS if options.scenario is None else (SCENARIOS[options.scenario],))}
    if options.decisions > 0:
        data["decisions"] = {"nodes": options.nodes, **measure_decisions(options.nodes, options.decisions)}
    data["seconds"] = round(time.monotonic() - begin, 1)
    if options.out is not None:
        keep(data, options.out)
    else:
        print(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()

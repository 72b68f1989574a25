"""`rfaas bench faults`: what faults cost each app, in seconds beside the same work undisturbed.

    stopped   a worker is stopped for 2 s, and goes on
    killed    a worker is killed every second, by SIGKILL
    manager   the manager is killed half-way; leases run on
    revoked   all workers are revoked half-way; the rank goes on alone

The app runs in this process, on a cluster of its own: rounds of its split, each checked by the app's own
verdict and compared bit by bit with the results of the same round undisturbed. Before each fault there is
a pass over all rounds without any. Time lost is what the rounds with faults took beyond what the same
rounds take without, in the median; beside it (A/A) stands the most by which those passes differ, over as
many rounds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rfaas_mpi import api
from rfaas_mpi.bench import environment
from rfaas_mpi.bench.cluster import Cluster
from rfaas_mpi.bench.namespaces import other_node
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.rounds import GUARD_S, Rounds
from rfaas_mpi.bench.stage import Options, check_quiet
from rfaas_mpi.executor import Executor

__all__ = ["KINDS", "QUICK", "Plan", "disturbed", "measure_faults", "world"]

KINDS = {"stopped": "a worker is stopped for a while", "killed": "workers are killed, again and again",
         "manager": "the manager is killed half-way", "revoked": "all workers are revoked half-way"}
MISSES = 2                           # after so many that met no round under way, one comes just before a round


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    where: Literal["both", "workers"] = "both"
    rounds: int = 5
    least_s: float = 5.0             # so long an app is run under repeated faults, at least
    every_s: float = 1.0             # a worker is killed so often
    stop_s: float = 2.0
    small: bool = False              # the app's smallest size, else the one that it has by itself


QUICK = Plan(rounds=1, least_s=0.0, every_s=0.0, stop_s=0.2, small=True)


# ---- what goes wrong -------------------------------------------------------------------------------

class _Fault(ABC):
    """Something that goes wrong while an app runs: once, or until `over()`."""

    again = False                    # it can be tried again where it met no round under way

    def __init__(self, executor: Executor, cluster: Cluster, plan: Plan) -> None:
        self.executor, self.cluster, self.plan = executor, cluster, plan
        self.times = 0

    def ready(self, half_way: bool) -> bool:
        """It is to happen in the round that begins now."""
        return half_way and (self.again or not self.times)

    @abstractmethod
    def strike(self) -> None:
        """It happens now."""

    def after(self) -> None:
        """What follows it."""

    def over(self) -> bool:
        """All of it has happened."""
        return self.times > 0

    def heal(self) -> None:
        """The executor may be used for the next one."""

    def victim(self) -> int:
        """The pid of a worker."""
        deadline = time.monotonic() + GUARD_S
        while time.monotonic() < deadline:
            self.executor.wait_workers(1, GUARD_S)
            # Where it was lost meanwhile the rank says its own.
            if (pid := self.executor.submit(os.getpid).result()) != os.getpid():
                return pid
        raise BenchError("no worker came back after it was killed")


class _Stopped(_Fault):
    again = True

    def ready(self, half_way: bool) -> bool:
        if half_way:
            self._pid = self.victim()
        return half_way

    def strike(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        self.times += 1

    def after(self) -> None:
        time.sleep(self.plan.stop_s)
        # Who waits for it too long has it killed.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCONT)


class _Killed(_Fault):
    """At most once in a round: no call sees two of them, and so none is taken for the kernel's own fault."""

    TIMES = 2
    again = True

    def __init__(self, executor: Executor, cluster: Cluster, plan: Plan) -> None:
        super().__init__(executor, cluster, plan)
        self._begin = self._last = time.monotonic()

    def ready(self, half_way: bool) -> bool:
        if time.monotonic() - self._last < self.plan.every_s:
            return False
        self._pid = self.victim()
        return True

    def strike(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._last = time.monotonic()
        self.times += 1

    def over(self) -> bool:
        return self.times >= self.TIMES and time.monotonic() - self._begin >= self.plan.least_s

    def heal(self) -> None:
        self.victim()


class _Manager(_Fault):
    def strike(self) -> None:
        self.cluster.kill_manager()
        self.times = 1

    def heal(self) -> None:
        self.cluster.restart_manager()


class _Revoked(_Fault):
    def strike(self) -> None:
        for lease in self.cluster.client.call("leases").leases:
            self.cluster.client.call("revoke", api.RevokeLease(grace_s=0.0), lease=lease.id)
        self.times = 1

    def over(self) -> bool:
        return self.times > 0 and not self.executor.workers


_FAULTS: dict[str, type[_Fault]] = {
    "stopped": _Stopped, "killed": _Killed, "manager": _Manager, "revoked": _Revoked}


# ---- figures ---------------------------------------------------------------------------------------

@dataclass
class _Pass:
    """Rounds that were run: (round, seconds), what was wrong, and how many faults met a round under way, or came just
    before one.
    """

    took: list[tuple[int, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    mid_run: int = 0
    just_before: int = 0

    def add(self, turn: int, found: tuple[float, str]) -> None:
        self.took.append((turn, found[0]))
        if found[1]:
            self.wrong.append(f"round {turn}: {found[1]}")

    @property
    def seconds(self) -> float:
        return sum(took for _, took in self.took)


def disturbed(path: Path, cluster: Cluster, plan: Plan, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Any]:
    """What each kind of fault did to one app: answer and time. Raises BenchError where no worker can be had."""
    settings = cluster.settings
    with contextlib.ExitStack() as stack:
        executor = stack.enter_context(Executor(workers=1, manager=settings.manager,
                                                manager_user=settings.manager_user, transport=settings.transport))
        app = Rounds(path, executor, plan.where, rounds=plan.rounds, small=plan.small)
        stack.callback(app.close)
        _calm(app)                   # to learn from
        calm, under = [_calm(app)], {}
        # A lease that was revoked is not given again: that comes last.
        for kind in sorted(kinds, key=list(_FAULTS).index):
            calm.append(_calm(app))
            fault = _FAULTS[kind](executor, cluster, plan)
            one = _under(fault, app, _usual(calm))
            under[kind] = fault.times, one
        usual, passes = _usual(calm), [one.seconds for one in calm]
        differ_s = (max(passes) - min(passes)) / len(app.turns)
        found = {}
        for kind, (times, one) in under.items():
            expected = sum(usual[turn] for turn, _ in one.took)
            found[kind] = {
                "right": not one.wrong, "wrong": one.wrong, "same_bits": (not one.wrong) if app.compared else None,
                "faults": times, "faults_in_mid_run": one.mid_run,
                "faults_just_before_a_round": one.just_before, "rounds": len(one.took),
                "undisturbed_s": expected, "disturbed_s": one.seconds, "lost_s": one.seconds - expected,
                "lost_s_per_fault": (one.seconds - expected) / times, "lost_s_aa": differ_s * len(one.took)}
        return {"verdict": app.told, "where": plan.where, "passes_without_faults": len(calm), "faults": found}


def _calm(app: Rounds) -> _Pass:
    """A pass without faults. Raises BenchError where an answer is wrong."""
    one = _Pass()
    for turn in app.turns:
        one.add(turn, app.run(turn))
    if one.wrong:
        raise BenchError(f"without any fault: {one.wrong[0]}")
    return one


def _usual(calm: Sequence[_Pass]) -> dict[int, float]:
    """Seconds of each round without faults."""
    passes = [dict(one.took) for one in calm]
    return {turn: statistics.median(took[turn] for took in passes) for turn in passes[0]}


def _under(fault: _Fault, app: Rounds, undisturbed: dict[int, float]) -> _Pass:
    """Whole passes, until all that is to go wrong has."""
    one = _Pass()
    deadline = time.monotonic() + GUARD_S + fault.plan.least_s
    while not fault.over() or (fault.again and not (one.mid_run or one.just_before)):
        if time.monotonic() > deadline:
            raise BenchError(f"{type(fault).__name__}: it has not happened after {GUARD_S:g} s")
        for turn in app.turns:
            if not fault.ready(turn == len(app.turns) // 2):
                one.add(turn, app.run(turn))
                continue
            if fault.times >= MISSES and not (one.mid_run or one.just_before):
                fault.strike()
                one.just_before += 1
                one.add(turn, app.run(turn, fault.after))
                continue
            # When half of it is done, as far as one can say.
            half_s = undisturbed[turn] / 2

            def strike() -> None:
                app.begun.wait(GUARD_S)
                time.sleep(half_s)
                one.mid_run += app.running
                fault.strike()
                fault.after()

            one.add(turn, app.run(turn, strike))
    fault.heal()
    return one


@contextlib.contextmanager
def world(transport: str = "shm", core: int | None = None) -> Iterator[tuple[Cluster, environment.Cores]]:
    """A cluster whose agent lends a core, and this process on another one."""
    directory = Path(tempfile.mkdtemp(prefix="rfaas-b-"))
    try:
        with other_node(wanted=False) as place, environment.pinned(core) as cores:
            lent = max(other for other in cores.allowed if other != cores.rank)
            cluster = Cluster(directory, place, rank_core=cores.rank, lent=lent, allowed=cores.allowed,
                              transport=transport)
            try:
                yield cluster, cores
            finally:
                cluster.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure_faults(options: Options) -> dict:
    """Each app of `options.apps` under each kind of `options.of`."""
    check_quiet(options.progress)
    plan = QUICK if options.quick else Plan()
    found = {}
    with world(options.transport, options.core) as (cluster, cores):
        for path in options.apps:
            options.progress(f"{path.stem}: {', '.join(options.of or KINDS)}")
            found[path.stem] = disturbed(path, cluster, plan, options.of or tuple(KINDS))
            cluster.rest()
    return {"apps": found, "right": all(kind["right"] for app in found.values() for kind in app["faults"].values()),
            "stopped_for_s": plan.stop_s, "killed_every_s": plan.every_s, "rank_core": cores.rank}

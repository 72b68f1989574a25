"""Faults at random in a running cluster, and a judge of what was written down meanwhile.

    seed ──▶ plan: so many (fault, target, size) ──▶ done to a cluster under ranks (counted_rank.py)
                                                      │
    journals of ranks, what workers ran, agents' logs, leases, the ledger ──▶ verdict

The same seed gives the same plan; what it meets is up to the kernel's scheduler.
A fault is healed some faults later, so that they overlap.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import struct
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faults
from cluster import IMPATIENT, Cluster, Daemon, Star, children, tell, wait_until

from rfaas_mpi import api
from rfaas_mpi.errors import RFaaSError
from rfaas_mpi.manager.ledger import Ledger

RANKS = 3
PAUSE_S = 0.4                        # so long a process is stopped, or ranks are waited for while something is broken
GUARD_S = 240.0
HOUR_S = 3600


def shifted_clock(directory: Path) -> Path:
    """A library that gives a process a wall clock that a file of its own sets (CLOCK_SHIFT)."""
    library = directory / "clock_shift.so"
    if not library.exists():
        subprocess.run(["gcc", "-std=c11", "-O1", "-shared", "-fPIC", "-o", library, faults.TESTS / "clock_shift.c"],
                       check=True)
    return library


class Clock:
    """One process's wall clock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.shift(0)

    def shift(self, seconds: int) -> None:
        """Jumps: from now on it is so much off."""
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.write(struct.pack("<q", seconds))

    def environment(self, library: Path) -> dict[str, str]:
        return {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(self._path)}


def with_clocks(cluster: Cluster) -> dict[str, Clock]:
    """Gives each daemon that is not yet started a wall clock of its own: by name, "manager" and the agents'."""
    library, clocks = shifted_clock(cluster.directory), {}
    for name, daemon in (("manager", cluster.manager), *zip(cluster.names, cluster.agents, strict=True)):
        clocks[name] = Clock(cluster.directory / f"{name}.clock")
        daemon.changes(**clocks[name].environment(library))
    return clocks


@contextlib.contextmanager
def full_disk(manager: Daemon, directory: Path, overwrite: bool):
    """The manager's files can't grow, or can't be written at all, as on a disk that is full or broken; needs no root."""
    soft, hard = resource.prlimit(manager.pid, resource.RLIMIT_FSIZE)
    most = max(path.stat().st_size for path in directory.iterdir() if path.is_file()) if overwrite else 0
    resource.prlimit(manager.pid, resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(manager.pid, resource.RLIMIT_FSIZE, (soft, hard))


# --- what is done ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fault:
    what: str
    target: int                      # which agent, rank or lease: modulo their number
    size: int                        # how much of it
    healed_after: int                # faults


KINDS = ("kill worker", "kill worker", "stop worker", "kill zygote", "kill agent", "stop agent", "end agent",
         "kill manager", "stop manager", "end manager", "drain", "revoke", "kill rank", "full disk", "clock")
LINK_KINDS = ("cut link", "lose packets", "blink link")


def plan(seed: int, count: int, links: bool) -> list[Fault]:
    chance = random.Random(seed)
    kinds = KINDS + LINK_KINDS * links
    return [Fault(chance.choice(kinds), chance.randrange(1 << 20), chance.randrange(1 << 20), chance.randrange(3))
            for _ in range(count)]


class Disorder:
    """A cluster, its ranks, and what is done to them. close() ends all of it."""

    def __init__(self, seed: int, count: int, *, star: Star | None = None) -> None:
        self.seed = seed
        self.plan = plan(seed, count, star is not None)
        self.done: Counter[str] = Counter()
        self.cluster = Cluster(["0", "1", "0-1"] if star is None else ["0", "1", "0", "1"], star=star,
                               sockets=() if star else (0,), **IMPATIENT)
        self.clocks = with_clocks(self.cluster)
        self.node_of: dict[int, str] = {}            # pid of each agent that ever was → its node
        self.journals = self.cluster.directory / "journals"
        self.journals.mkdir()
        self.ranks: list[subprocess.Popen[str]] = []
        self.killed_ranks: set[str] = set()
        self._names: list[str] = []
        self._born = 0
        self._wounds: list[tuple[int, Callable[[], None]]] = []
        self._step = 0
        self.epochs: dict[tuple[str, int], int] = {}

    def start(self) -> None:
        self.cluster.start()
        self._note_agents()
        for _ in range(RANKS):
            self._start_rank(len(self.ranks))

    def run(self) -> None:
        """All of the plan; everything is healed in the end and every rank has ended well."""
        for self._step, fault in enumerate(self.plan):
            for due, heal in [wound for wound in self._wounds if wound[0] <= self._step]:
                self._wounds.remove((due, heal))
                heal()
            self._do(fault)
            self.done[fault.what] += 1
            self._watch_ranks()
            self._progress(1 + fault.size % 40)
            self._look()
        self._heal_all()
        self._progress(40)
        for rank in self.ranks:
            tell(rank, "end")
        for number, rank in enumerate(self.ranks):
            try:
                rank.communicate(timeout=GUARD_S)
            except subprocess.TimeoutExpired:
                rank.send_signal(signal.SIGABRT)
                rank.wait()
            assert rank.returncode == 0, f"rank {self._names[number]}: {self._err(self._names[number])}"
        wait_until(lambda: self.cluster.free() == sum(len(cores.split("-")) for cores in self._lent())
                   and not self.cluster.leases(), "every core came back", 120)
        self._look()

    # ---- faults ------------------------------------------------------------------------------------

    def _do(self, fault: Fault) -> None:
        number = fault.target % len(self.cluster.agents)
        agent, name, manager = self.cluster.agents[number], self.cluster.names[number], self.cluster.manager
        match fault.what:
            case "kill worker" | "stop worker" | "kill zygote":
                self._hurt_process(fault, number)
            case "kill agent" | "end agent":
                if agent.alive:
                    agent.kill() if fault.what == "kill agent" else agent.stop()
                    self._later(fault, lambda: self._again(agent))
            case "stop agent" | "stop manager":
                hurt = agent if fault.what == "stop agent" else manager
                if hurt.alive:
                    hurt.signal(signal.SIGSTOP)
                    self._progress(1 << 30, PAUSE_S)
                    hurt.signal(signal.SIGCONT)
            case "kill manager" | "end manager":
                if manager.alive:
                    manager.kill() if fault.what == "kill manager" else manager.stop()
                    self._later(fault, lambda: self._again(manager))
            case "drain":
                if self._ask("drain", api.DrainNodes((name,), grace_s=fault.size % 2 * 0.1)):
                    self._later(fault, lambda: wait_until(
                        lambda: self._ask("undrain", api.UndrainNodes((name,))) or self._revive_manager(), "undrained"))
            case "revoke":
                leases = self._leases()
                if leases:
                    self._ask("revoke", api.RevokeLease(grace_s=fault.size % 2 * 0.1),
                              lease=leases[fault.target % len(leases)].id)
            case "kill rank":
                which = fault.target % RANKS
                self.killed_ranks.add(self._names[which])
                self.ranks[which].kill()
                self.ranks[which].communicate()
                self._start_rank(which)
            case "full disk":
                # One that is still starting would end, and say so: who started it does it again, but not here.
                if manager.alive and self._ask("nodes"):
                    with full_disk(manager, self.cluster.directory / "manager", bool(fault.size % 2)):
                        self._progress(1 << 30, PAUSE_S)
            case "clock":
                clock = list(self.clocks.values())[fault.target % len(self.clocks)]
                clock.shift((-HOUR_S, HOUR_S)[fault.size % 2])
                self._later(fault, lambda: clock.shift(0))
            case "cut link":
                self.cluster.star.link(number, "down")
                self._later(fault, lambda: self.cluster.star.link(number, "up"))
            case "blink link":
                self.cluster.star.link(number, "down")
                self.cluster.star.link(number, "up")
            case "lose packets":
                self.cluster.star.lose(number)
                self._later(fault, self.cluster.star.heal)

    def _hurt_process(self, fault: Fault, number: int) -> None:
        agent = self.cluster.agents[number]
        if not agent.alive:
            return
        zygotes = children(agent.pid)
        found = zygotes if fault.what == "kill zygote" else [pid for zygote in zygotes for pid in children(zygote)]
        if not found:
            return
        pid = found[fault.size % len(found)]
        with contextlib.suppress(ProcessLookupError):
            if fault.what != "stop worker":
                os.kill(pid, signal.SIGKILL)
                return
            os.kill(pid, signal.SIGSTOP)
            self._progress(1 << 30, PAUSE_S)
            os.kill(pid, signal.SIGCONT)

    def _later(self, fault: Fault, heal: Callable[[], None]) -> None:
        self._wounds.append((self._step + 1 + fault.healed_after, heal))

    def _again(self, daemon: Daemon) -> None:
        assert daemon.alive or daemon.ended, f"{daemon.log.name} ended by itself:\n{daemon.said()[-6000:]}"
        if not daemon.alive:
            daemon.start()
            self._note_agents()

    def _revive_manager(self) -> bool:
        self._again(self.cluster.manager)
        return False

    def _heal_all(self) -> None:
        for _, heal in self._wounds:
            heal()
        self._wounds.clear()
        for daemon in (self.cluster.manager, *self.cluster.agents):
            self._again(daemon)
        if self.cluster.star is not None:
            self.cluster.star.heal()

    # ---- what goes on --------------------------------------------------------------------------------

    def _start_rank(self, number: int) -> None:
        self._born += 1
        name = f"rank{self._born}"
        command = self.cluster.command("""
            import counted_rank
            counted_rank.main(*sys.argv[1:])
            """, self.journals, name, self.seed + self._born)
        with (self.journals / f"{name}.err").open("wb") as said:
            rank = subprocess.Popen(command, env=faults.environment(**self.cluster.environment, PYTHONFAULTHANDLER="1"),
                                    stdin=subprocess.PIPE, stdout=said, stderr=said, text=True, start_new_session=True)
        self.ranks[number:number + 1] = [rank]
        self._names[number:number + 1] = [name]

    def _watch_ranks(self) -> None:
        for name, rank in zip(self._names, self.ranks, strict=True):
            if rank.poll() is not None:
                raise AssertionError(f"{name} ended with {rank.returncode}:\n{self._err(name)}")

    def _said(self) -> int:
        return sum(path.stat().st_size for path in self.journals.glob("*.journal"))

    def _progress(self, lines: int, patience_s: float | None = None) -> None:
        """Returns once the ranks have gone on by so many lines; while something is broken, soon anyway."""
        least = self._said() + 16 * lines
        patience_s = patience_s or (PAUSE_S if self._wounds else GUARD_S)
        deadline = time.monotonic() + patience_s
        while self._said() < least and time.monotonic() < deadline:
            time.sleep(0.005)
            self._watch_ranks()
        if patience_s == GUARD_S and self._said() < least:
            for rank in self.ranks:
                rank.send_signal(signal.SIGABRT)
                rank.wait()
            said = "".join(self._err(name) for name in self._names)
            raise AssertionError(f"nothing goes on though nothing is broken:\n{said}")

    def _err(self, name: str) -> str:
        return (self.journals / f"{name}.err").read_text(errors="replace")[-6000:]

    def _note_agents(self) -> None:
        for name, agent in zip(self.cluster.names, self.cluster.agents, strict=True):
            if agent.alive:
                self.node_of[agent.pid] = name

    def _lent(self) -> list[str]:
        return [agent.command[agent.command.index("--cores") + 1] for agent in self.cluster.agents]

    def _ask(self, name: str, *arguments: object, **parameters: object) -> bool:
        try:
            self.cluster.call(name, *arguments, **parameters)
        except RFaaSError:
            return False             # no manager, or no such lease any more
        return True

    def _leases(self) -> tuple[api.LeaseView, ...]:
        with contextlib.suppress(RFaaSError):
            return self.cluster.leases() if self.cluster.manager.alive else ()
        return ()

    # ---- the judge -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """No core is in two leases that the manager has."""
        for (node, core), count in Counter((lease.node, core) for lease in self._leases()
                                           for worker in lease.workers for core in worker.cores).items():
            assert count == 1, f"core {core} of {node} is lent {count} times"

    def verdict(self) -> str:
        """AssertionError with what was lost or doubled; else what was counted. After the manager has ended."""
        ends: dict[str, list[str]] = defaultdict(list)
        submitted: list[str] = []
        none = 0
        for path in self.journals.glob("*.journal"):
            for line in path.read_text().splitlines():
                word, _, rest = line.partition(" ")
                if word == "sub":
                    submitted.append(rest)
                elif word == "end":
                    key, _, how = rest.partition(" ")
                    ends[key].append(how)
                else:
                    none += word == "none"
        ran, finished, begun = self._executions()
        assert len(set(submitted)) == len(submitted)
        assert ends.keys() <= set(submitted)
        doubled = {key: how for key, how in ends.items() if len(how) > 1}
        assert not doubled, f"ended twice: {doubled}"
        lost = [key for key in submitted if key not in ends and key.partition(".")[0] not in self.killed_ranks]
        assert not lost, f"never ended: {lost}"
        without = [key for key, [how] in ends.items() if how == "result" and not finished[key]]
        assert not without, f"a result that nobody has found: {without}"
        errors = {key: how for key, [how] in ends.items() if how.startswith("error")}
        for key, how in errors.items():
            # A worker that somebody kills in a call is replaced once; the second time it is the kernel's fault.
            assert begun[key] - finished[key] >= 2, f"{key} began {begun[key]} times, and ended as {how}"
        self._judge_overlaps(ran)
        for agent in self.cluster.agents:
            judge_log(agent.said())
        kept = Ledger(self.cluster.directory / "manager" / "ledger.db")
        try:
            state = kept.load()
            live = [lease for lease in state.leases if lease.state.live]
            assert not live, f"still lent: {live}"
        finally:
            kept.close()
        counts = Counter(how.partition(" ")[0] for [how] in ends.values())
        again = sum(count > 1 for count in begun.values())
        return (f"seed {self.seed}: {sum(self.done.values())} faults, {len(submitted)} invocations: {dict(counts)}, "
                f"{len(submitted) - len(ends)} of {len(self.killed_ranks)} killed ranks; {again} ran more than once; "
                f"{none} times without workers; {dict(sorted(self.done.items()))}")

    def _executions(self) -> tuple[dict[tuple[str, int], list[tuple[int, int, str]]], Counter[str], Counter[str]]:
        """(node, core) → (begin, end, worker and key) of each call; how often each ended, and began."""
        ran: dict[tuple[str, int], list[tuple[int, int, str]]] = defaultdict(list)
        finished: Counter[str] = Counter()
        begun: Counter[str] = Counter()
        for path in self.journals.glob("ran-*"):
            now = None
            for line in path.read_text().splitlines():
                match line.split():
                    case ["b", key, agent, cores, at]:
                        begun[key] += 1
                        now = key, int(agent), cores, int(at)
                    case ["e", key, at]:
                        finished[key] += 1
                        if now is not None and now[0] == key and now[1]:
                            assert now[1] in self.node_of, f"{path.name} {now} is no agent's"
                            for core in now[2].split(","):
                                ran[self.node_of[now[1]], int(core)].append((now[3], int(at), f"{path.name} {key}"))
        return ran, finished, begun

    def _judge_overlaps(self, ran: dict[tuple[str, int], list[tuple[int, int, str]]]) -> None:
        for (node, core), calls in ran.items():
            calls.sort()
            for (_, end, before), (begin, _, after) in zip(calls, calls[1:]):
                assert end <= begin, f"core {core} of {node} ran {before} and {after} at the same time"

    def close(self) -> None:
        """Safe to call twice."""
        for rank in self.ranks:
            rank.kill()
            rank.communicate()
        self.cluster.close()


def judge_log(said: str) -> None:
    """What an agent says of leases: no core begins in one while it is in another."""
    held: dict[int, int] = {}
    for line in said.splitlines():
        if "listens at" in line:
            held.clear()             # another process, and what the one before ran has ended with it
        elif found := re.search(r"lease=(\d+) session=\d+ uid=\d+ cores=\(([\d, ]*)\) begins", line):
            for core in cores_of(found[2]):
                assert core not in held, f"core {core} of lease {held[core]} is lent again: {line}"
                held[core] = int(found[1])
        elif found := re.search(r"lease=(\d+) seat=\d+ cores=\(([\d, ]*)\) are free", line):
            for core in cores_of(found[2]):
                held.pop(core, None)
        elif found := re.search(r"lease=(\d+) ended", line):
            held = {core: lease for core, lease in held.items() if lease != int(found[1])}


def cores_of(text: str) -> list[int]:
    return [int(core) for core in text.replace(" ", "").split(",") if core]

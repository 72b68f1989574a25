#!/usr/bin/env python3
"""What pilots and hooks cost and gain on a real Slurm of virtual nodes: one JSON, and a timeline of its nodes.

USAGE: python benchmarks/slurm.py run [--quick] [--part NAME]... [--calls N] [--hung N] [--starts N]
                                      [--other DIRECTORY] [--with NAME=FILE.json]... [--out slurm-report.json]
       python benchmarks/slurm.py report [--docs docs/benchmarks.md] [--plot docs/slurm-report.png] slurm-report.json

`run` starts clusters by tests/slurm_cluster.py, as root, and measures these parts, one after another:

    hook        a job's Prolog while an agent lends, and while it hangs
    start       one pilot after another, until its node may be had
    leave       pilots that are sent SIGTERM, SIGTSTP and SIGUSR1 while their workers run endless kernels
    preemption  a job that preempts two pilots beside one that preempts two `sleep`s, in turn
    coverage    how much of the holes between jobs is lent, and how soon a pilot lends

How busy the machine was with other things is in the JSON as load. `--with` adds a part that was measured elsewhere: a
JSON object with `rows` like those here. `report` replaces what is between two marks of the page and draws the timeline;
that needs matplotlib (`pip install 'rfaas_mpi[demo]'`).
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import json
import os
import random
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
REPOSITORY = HERE.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from slurm_cluster import Slurm, why_not  # noqa: E402

from rfaas_mpi._version import __version__  # noqa: E402
from rfaas_mpi.bench import environment  # noqa: E402
from rfaas_mpi.bench.measure import percentile  # noqa: E402
from rfaas_mpi.client import ManagerClient  # noqa: E402
from rfaas_mpi.config import Settings  # noqa: E402
from rfaas_mpi.errors import RFaaSError  # noqa: E402
from rfaas_mpi.slurm import pilots  # noqa: E402

BEGIN, END = "<!-- slurm: begin -->", "<!-- slurm: end -->"
GUARD_S = 60.0
LOOK_S = 0.05
SIGNALS = ("TERM", "TSTP", "USR1")
# Idle times of a large machine's nodes, a mixture of log-normals: weight, median in seconds, sigma (a fit of our own
# to what its batch system said every 100 s for two weeks); and how much shorter they are here.
IDLE = ((0.927, 278.0, 0.95), (0.073, 3424.0, 0.72))
SHORTER = 10.0
BUSY_S = (10.0, 30.0)


@dataclass(frozen=True)
class Amount:
    """How much is done."""

    calls: int = 200                 # of the Prolog's hook
    hung: int = 20
    starts: int = 14
    rounds: int = 10                 # in which two pilots are sent each signal
    pairs: int = 12
    sleeps: int = 3                  # rounds, before the holes and after them
    seconds: float = 600.0           # of holes
    shorter: float = SHORTER
    busy_s: tuple[float, float] = BUSY_S
    other: Path | None = None        # a checkout whose pilots start beside ours


QUICK = Amount(calls=5, hung=1, starts=2, rounds=1, pairs=1, sleeps=1, seconds=12.0, shorter=100.0, busy_s=(1.0, 2.0))


# --- pure --------------------------------------------------------------------------------------

Span = tuple[float, float]


def idle_times(seed: str, shorter: float) -> Iterator[float]:
    """Lengths of holes in seconds, for ever, the same ones for the same seed."""
    chance = random.Random(seed)
    while True:
        [(_, median, sigma)] = chance.choices(IDLE, [weight for weight, *_ in IDLE])
        yield median * chance.lognormvariate(0.0, sigma) / shorter


def overlap(spans: Iterable[Span], others: Collection[Span]) -> float:
    """For how long one of the spans and one of the others were there at once; those of each kind don't overlap."""
    return sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in spans for start, stop in others)


def row(what: str, value: float, unit: str, count: int, limit: float | None = None, *, least: bool = False,
        **more: Any) -> dict[str, Any]:
    """One figure beside what was wanted of it."""
    reached = None if limit is None else value >= limit if least else value <= limit
    return {"figure": what, "value": round(value, 4), "unit": unit, "count": count, "limit": limit,
            "wanted": "" if limit is None else f"{'≥' if least else '≤'} {limit:g}", "reached": reached, **more}


def spread(what: str, seconds: Sequence[float], limits: Mapping[float, float], scale: float = 1e3, unit: str = "ms",
           ) -> list[dict[str, Any]]:
    """Percentiles of times, 50 and those of which something was wanted."""
    return [row(f"{what}, p{percent:g}", percentile(seconds, percent) * scale, unit, len(seconds), limits.get(percent))
            for percent in sorted({50.0, *limits})]


def between(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and where it lies (95 %, by order statistics)."""
    ordered = sorted(values)
    k = max(0, int((len(ordered) - 1.96 * len(ordered) ** 0.5) / 2))
    return statistics.median(ordered), ordered[k], ordered[-1 - k]


# --- clusters and what runs there ----------------------------------------------------------------

@functools.cache
def installed(repository: Path = REPOSITORY) -> Path:
    """The package with its bytecode beside it, as it is installed, until this process ends."""
    directory = tempfile.TemporaryDirectory(prefix="rfaas-installed-")
    atexit.register(directory.cleanup)
    shutil.copytree(repository / "rfaas_mpi", Path(directory.name, "rfaas_mpi"),
                    ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "compileall", "-q", directory.name], check=True)
    return Path(directory.name)


class Cluster:
    """One whose jobs in `low` give way to those in `high`; when each job's script began is on record."""

    def __init__(self, nodes: int) -> None:
        self.slurm = Slurm(nodes, 2, settings={
            "PreemptType": "preempt/partition_prio", "PreemptMode": "CANCEL"}, partitions=(
            "low PriorityTier=1 PreemptMode=CANCEL GraceTime=0", "high PriorityTier=10 PreemptMode=OFF"))
        self.began = self.slurm.directory / "began"
        self.began.touch()
        self.temporary = self.slurm.directory / "t"
        self.temporary.mkdir()
        tells = self.slurm.directory / "task-prolog"
        tells.write_text(f'#!/bin/bash\necho "$EPOCHREALTIME $SLURM_JOB_ID $SLURMD_NODENAME" >>{self.began}\n')
        tells.chmod(0o755)
        with (self.slurm.directory / "slurm.conf").open("a") as conf:
            conf.write(f"TaskProlog={tells}\n")

    def __enter__(self) -> Cluster:
        self.slurm.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.slurm.close()

    def starts(self) -> dict[int, tuple[float, str]]:
        """Job → when the first thing in it began, and on which node."""
        found: dict[int, tuple[float, str]] = {}
        for line in self.began.read_text().splitlines():
            at, job, node = line.split()
            found.setdefault(int(job), (float(at), node))
        return found

    def started(self, job: int) -> float:
        """When it began, once it has."""
        self.slurm.wait_until(lambda: job in self.starts(), f"job {job} begins")
        return self.starts()[job][0]

    def submit(self, partition: str, script: str, *options: object) -> tuple[int, float]:
        """The job and when it was asked for. It has whole nodes."""
        asked = time.time()
        job = self.slurm.submit(f"#!/bin/bash\n{script}\n", f"--partition={partition}", "--exclusive", *options)
        return job, asked

    def running(self) -> list[int]:
        return [int(word) for word in
                self.slurm.run("squeue", "-h", "-p", "low", "-t", "RUNNING", "-o", "%i").split()]


class Pilots:
    """`rfaas slurm pilots` on that cluster, and what its manager says of each node, asked over and over again."""

    def __init__(self, cluster: Cluster, count: int, *options: str) -> None:
        self.cluster, slurm = cluster, cluster.slurm
        self._files = [slurm.directory / f"pilots.{name}" for name in ("out", "err")]
        words = [sys.executable, "-m", "rfaas_mpi.cli", "slurm", "pilots", "--json", "--partition", "low",
                 "--directory", str(slurm.directory / "pilots"), "--nodes-max", str(count), *options]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                             cwd=slurm.directory, env=self._environment())
        self.lent: dict[str, list[list[float]]] = {}         # node → spans; the last one may go on
        self.borrowed: dict[str, list[list[float]]] = {}
        self._now: tuple[set[str], set[str]] = (set(), set())
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            slurm.wait_until(lambda: self._process.poll() is not None or self._files[0].read_text().endswith("}\n"),
                             "pilots are queued")
            if self._process.poll() is not None:
                raise RuntimeError(self._files[1].read_text())
            self.environment: dict[str, str] = json.loads(self._files[0].read_text())["environment"]
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        except BaseException:
            self.close()
            raise

    def _environment(self) -> dict[str, str]:
        return {**self.cluster.slurm.environment, "PYTHONPATH": str(installed()),
                "TMPDIR": str(self.cluster.temporary)}

    def _look(self) -> None:
        given = {name.removeprefix("RFAAS_").lower(): value for name, value in self.environment.items()}
        with ManagerClient(Settings.load(**given)) as client:
            while not self._end.wait(LOOK_S):
                with contextlib.suppress(RFaaSError):
                    views = client.call("nodes").nodes
                    there = [view for view in views if view.spare and not view.silent]
                    name = {view.node: view.node.partition("/")[0] for view in there}
                    self._note(time.time(), {name[view.node] for view in there},
                               {name[view.node] for view in there if view.lent})
            self._note(time.time(), set(), set())

    def _note(self, now: float, lent: set[str], borrowed: set[str]) -> None:
        for spans, were, are in ((self.lent, self._now[0], lent), (self.borrowed, self._now[1], borrowed)):
            for node in are - were:
                spans.setdefault(node, []).append([now, now])
            for node in are | were:
                spans[node][-1][1] = now
        self._now = lent, borrowed

    def lending(self, count: int) -> None:
        """Returns when so many nodes lend."""
        self.cluster.slurm.wait_until(lambda: len(self._now[0]) == count, f"{count} nodes lend")

    @contextlib.contextmanager
    def borrower(self, program: str, *words: object) -> Iterator[subprocess.Popen[str]]:
        """A rank of the same user's, killed in the end if it still runs."""
        # Which leases it loses it says, too.
        with (self.cluster.slurm.directory / "log" / "borrower").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], cwd="/", text=True,
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                                       env={**self._environment(), **self.environment})
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def close(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self._process.terminate()
        self._process.wait(GUARD_S)

    def __enter__(self) -> Pilots:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def said(process: subprocess.Popen[str], wanted: str) -> None:
    """Its next line; RuntimeError if that is another one."""
    assert process.stdout is not None
    if (line := process.stdout.readline().strip()) != wanted:
        raise RuntimeError(f"the borrower says {line!r}, not {wanted!r}")


# Every worker is in the midst of a kernel that has no end.
ENDLESS = """
import sys, time
import rfaas_mpi as rf
def endless(number):
    while True:
        pass
count = int(sys.argv[1])
with rf.Executor(workers=(count, count), fallback=False, lease_timeout_s=60) as executor:
    list(executor.map(abs, range(4 * count)))
    calls = [executor.submit(endless, number) for number in range(count)]
    time.sleep(0.3)
    print("busy", flush=True)
    ends = {type(call.exception()).__name__ for call in calls}
    print(*sorted(ends), flush=True)
"""

# Borrows what there is until it is told that it's enough, and compares every answer. Its kernels sleep: all nodes have
# the same two cores, and what begins on one node must not wait for what another one computes.
BORROWER = """
import os, sys, time
import rfaas_mpi as rf
def work(number):
    time.sleep(0.02)
    return number * number
most = int(sys.argv[2])
with rf.Executor(workers=(1, most), lease_timeout_s=60, idle_s=60) as executor:
    begun = False
    while not os.path.exists(sys.argv[1]):
        assert list(executor.map(work, range(4 * most))) == [n * n for n in range(4 * most)]
        if not begun:
            begun = True
            print("begun", flush=True)
    print("right", flush=True)
"""


# --- parts ---------------------------------------------------------------------------------------

def hook(amount: Amount, seed: int) -> dict[str, Any]:
    """A Prolog's hook, on a node whose agent lends to a rank and which has one job after another; then it hangs."""
    import signal

    from cluster import wait_until
    from lending_node import HOOK, LendingNode

    with tempfile.TemporaryDirectory(prefix="rfaas-report-") as directory:
        node = LendingNode(Path(directory))
        times = Path(directory, "times")
        times.touch()
        Path(directory, "prolog").write_text(
            f"#!/bin/bash\nbegan=$EPOCHREALTIME\n'{HOOK}' prolog '{node.directory}'\n"
            f"echo $began $EPOCHREALTIME >>'{times}'\nexit 0\n")

        def call() -> tuple[float, bool]:
            before = len(times.read_text().splitlines())
            there = node.workers() > 0
            node.slurm.run("srun", "-n1", "-c2", "true")
            began, ended = map(float, times.read_text().splitlines()[before].split())
            return ended - began, there

        with node:
            with node.borrowing():
                answered = []
                for number in range(amount.calls):
                    # Its rank asks for another one, later and later: each second job waits until it is there.
                    if number % 2 == 0 and wait_for(node.workers, 10.0):
                        time.sleep(0.1)
                    answered.append(call())
            hung = []
            for _ in range(amount.hung):
                with node.borrowing():
                    agent = node.site.agent.pid
                    os.kill(agent, signal.SIGSTOP)
                    try:
                        hung.append(call())
                    finally:
                        os.kill(agent, signal.SIGCONT)
                    wait_until(lambda: node.slurm.run("sinfo", "-h", "-o", "%T").strip() == "idle", "the node is idle")
    with_worker = [took for took, there in answered if there]
    ends = bare_ends(max(1, amount.calls // 2))
    return {"rows": [*spread("a job's Prolog, hook and all", [took for took, _ in answered], {50: 10.0, 99: 100.0}),
                     *(spread("the same where a worker was there", with_worker, {50: 10.0, 99: 100.0})
                       if with_worker else ()),
                     *spread("a fork of an interpreter, killed until it has ended", ends, {}),
                     *(spread("with a hung agent", [took for took, _ in hung], {99: 300.0}) if hung else ())],
            "answered_s": answered, "ends_s": ends, "hung_s": hung}


# Forks of an interpreter with numpy, each on the last CPU and as busy as can be, are killed by one on the first: how
# long until the kernel says that they have ended.
ENDS = """
import os, select, signal, sys, time
import numpy
first, *_, last = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {first})
for _ in range(int(sys.argv[1])):
    there, here = os.pipe()
    if not (pid := os.fork()):
        os.sched_setaffinity(0, {last})
        os.write(here, b"x")
        while True:
            pass
    pidfd = os.pidfd_open(pid)
    os.read(there, 1)
    time.sleep(0.02)
    began = time.perf_counter()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [])
    print(time.perf_counter() - began)
    os.waitpid(pid, 0)
    for descriptor in (there, here, pidfd):
        os.close(descriptor)
"""


def bare_ends(count: int) -> list[float]:
    """What it takes here to end a process like a worker, with nobody who starts, moves or accounts for it."""
    done = subprocess.run([sys.executable, "-c", ENDS, str(count)], check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _processes() -> dict[int, int]:
    """pid → its parent."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def _below(pid: int, parents: Mapping[int, int]) -> set[int]:
    children = {child for child, parent in parents.items() if parent == pid}
    return children.union(*(_below(child, parents) for child in children))


def _of_job(job: int, cluster: Cluster, parents: Mapping[int, int]) -> tuple[int, int]:
    """Of a pilot job the process of its script, and its agent's."""
    script = agent = 0
    mark = f"SLURM_JOB_ID={job}".encode()
    conf = f"SLURM_CONF={cluster.slurm.directory}/slurm.conf".encode()
    for pid in sorted(parents):
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if mark not in variables or conf not in variables or not words:
                continue
            if words.startswith(b"srun\0") and not script:
                script = pid
            elif b"\0slurm\0pilot\0" in words and not words.startswith(b"srun\0"):
                agent = agent or pid
    return script, agent


def start(amount: Amount, seed: int) -> dict[str, Any]:
    """One pilot lends all the time; its script is submitted again and again, for the other node.

    With another checkout its pilots start beside ours, two of ours and one of its in each round, in an order that is
    drawn.
    """
    chance = random.Random(f"{seed} start")
    ready: dict[str, list[float]] = {"ours": [], "again": [], "other": []}
    with Cluster(2) as cluster, Pilots(cluster, 1, "--lengths", "30") as filling:
        filling.lending(1)
        [first] = cluster.running()
        script = cluster.slurm.run("scontrol", "write", "batch_script", first, "-")
        options = pilots.batch_options(pilots.Submit(30), pilots.Wanted("low", 1), "again",
                                       f"{cluster.slurm.directory}/again.log")
        for _ in range(amount.starts):
            for which in chance.sample([*ready], 3) if amount.other is not None else ["ours"]:
                package = installed(REPOSITORY if which != "other" or amount.other is None else amount.other)
                job = cluster.slurm.submit(script, *options, PYTHONPATH=str(package))
                filling.lending(2)
                at, node = cluster.starts()[job]
                ready[which].append(filling.lent[node][-1][0] - at)
                cluster.slurm.run("scancel", job)
                cluster.slurm.ended(job)
                filling.lending(1)
    rows = spread("a pilot's script begins to leasable, one at a time", ready["ours"] + ready["again"],
                  {50: 1.0, 99: 1.0}, 1.0, "s")
    if amount.other is not None:
        rows += spread("the same with the other checkout", ready["other"], {}, 1.0, "s")
        for what, later in (("later with the other checkout, median of the pairs", "other"), ("A/A of that", "again")):
            middle, low, high = between([(one - other) * 1e3
                                         for one, other in zip(ready[later], ready["ours"], strict=True)])
            rows.append(row(what, middle, "ms", amount.starts, between=[round(low, 2), round(high, 2)]))
    return {"rows": rows, "ready_s": ready}


def _watch(watched: dict[int, tuple[int, bool]], ends: dict[tuple[int, bool], float]) -> None:
    """Notes when the last process of each kind ends; RuntimeError if one doesn't."""
    poll = select.poll()
    for descriptor in watched:
        poll.register(descriptor, select.POLLIN)
    while watched:
        if not (found := poll.poll(GUARD_S * 1e3)):
            raise RuntimeError("pilots don't leave")
        now = time.monotonic()
        for descriptor, _ in found:
            ends[watched.pop(descriptor)] = now
            poll.unregister(descriptor)
            os.close(descriptor)


def leave(amount: Amount, seed: int) -> dict[str, Any]:
    """Six pilots whose workers all run an endless kernel are sent a signal each."""
    count = 2 * len(SIGNALS)
    gone: dict[str, list[tuple[float, float]]] = {name: [] for name in SIGNALS}
    with Cluster(count) as cluster, Pilots(cluster, count, "--lengths", "30") as filling:
        for _ in range(amount.rounds):
            filling.lending(count)
            with filling.borrower(ENDLESS, count) as rank:
                said(rank, "busy")
                parents = _processes()
                watched: dict[int, tuple[int, bool]] = {}        # descriptor → job, is it the script
                for job in (jobs := cluster.running()):
                    script, agent = _of_job(job, cluster, parents)
                    for pid in (script, *_below(agent, parents)):
                        watched[os.pidfd_open(pid)] = job, pid == script
                ends: dict[tuple[int, bool], float] = {}
                watcher = threading.Thread(target=_watch, args=(watched, ends))
                watcher.start()
                sent = {}
                kinds = dict(zip(jobs, [*SIGNALS, *SIGNALS], strict=True))
                for job, name in kinds.items():
                    sent[job] = time.monotonic()
                    cluster.slurm.run("scancel", f"--signal={name}", job)
                watcher.join()
                said(rank, "LeaseRevoked")
                for job, name in kinds.items():
                    gone[name].append((ends[job, False] - sent[job], ends[job, True] - sent[job]))
    rows = []
    for name, times in gone.items():
        rows += spread(f"SIG{name} to workers gone", [workers for workers, _ in times], {99: 300.0})
        rows += spread(f"SIG{name} to script ended", [script for _, script in times], {99: 500.0})
    return {"rows": rows, "gone_s": gone}


def preemption(amount: Amount, seed: int) -> dict[str, Any]:
    """A job of two nodes on four that pilots have, and on four that `sleep`s have, twice; in an order that changes."""
    chance = random.Random(seed)
    delays: dict[str, list[float]] = {"pilots": [], "sleep": [], "sleep again": []}
    with Cluster(4) as other, Cluster(4) as cluster, Pilots(cluster, 4, "--lengths", "30") as filling:
        enough = cluster.slurm.directory / "enough"

        def start(where: Cluster) -> float:
            job, asked = where.submit("high", "exec sleep 600", "--nodes=2")
            delay = where.started(job) - asked
            where.slurm.run("scancel", job)
            where.slurm.ended(job)
            return delay

        def fill() -> None:
            for _ in range(4 - len(other.running())):
                other.submit("low", "exec sleep 3600", "--nodes=1", "--no-requeue")
            other.slurm.wait_until(lambda: len(other.running()) == 4, "all nodes are busy")

        filling.lending(4)
        with filling.borrower(BORROWER, enough, 4) as rank:
            said(rank, "begun")
            for _ in range(amount.pairs):
                for name in chance.sample(sorted(delays), 3):
                    if name == "pilots":
                        filling.lending(4)
                        delays[name].append(start(cluster))
                    else:
                        fill()
                        delays[name].append(start(other))
            enough.touch()
            said(rank, "right")
    more = [one - two for one, two in zip(delays["pilots"], delays["sleep"], strict=True)]
    again = [one - two for one, two in zip(delays["sleep again"], delays["sleep"], strict=True)]
    rows = [row(f"a job that preempts two {name} starts after", statistics.median(delays[key]) * 1e3, "ms", len(more))
            for key, name in (("pilots", "pilots"), ("sleep", "`sleep`s"))]
    for what, found in (("later than with `sleep`s, median of the pairs", more), ("A/A of that", again)):
        middle, low, high = between(found)
        rows.append(row(what, middle * 1e3, "ms", len(found), between=[round(low * 1e3, 2), round(high * 1e3, 2)]))
    return {"rows": rows, "delays_s": delays, "borrower": "right"}


@dataclass
class Owners:
    """What owners did on one node."""

    asked: list[float] = field(default_factory=list)
    jobs: list[int] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)


def coverage(amount: Amount, seed: int) -> dict[str, Any]:
    """Jobs come and go on four nodes by a plan that was drawn before; pilots lend between them, and a rank borrows."""
    count = 4
    wanted = pilots.Wanted("low", count)
    with Cluster(count) as cluster:
        names = cluster.slurm.names
        sleeps = list(_sleeps(cluster, names, amount.sleeps, wanted))
        before = set(cluster.starts())
        with Pilots(cluster, count) as filling:
            filling.lending(count)
            enough = cluster.slurm.directory / "enough"
            with filling.borrower(BORROWER, enough, count) as rank:
                said(rank, "begun")
                began = time.time()
                stop = began + amount.seconds
                found = {name: Owners() for name in names}
                threads = [threading.Thread(target=_own, args=(cluster, name, found[name], seed, amount, stop))
                           for name in names]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                stopped = max(stop, time.time())
                enough.touch()
                said(rank, "right")
            starts = cluster.starts()
        sleeps += _sleeps(cluster, names, amount.sleeps, wanted)
    own_s = statistics.median(sleeps)
    bound = covered = idle = 0.0
    holes = []
    owned = {job for owners in found.values() for job in owners.jobs}
    timeline: dict[str, dict[str, list[Span]]] = {}
    for name, owners in found.items():
        lent = [(a, b) for a, b in filling.lent.get(name, ())]
        # The last job has no next one: its hole ends with the run.
        ends = [*owners.asked[1:], stop][:len(owners.ended)]
        for hole in zip(owners.ended, ends, strict=True):
            if (length := hole[1] - hole[0]) > 0:
                holes.append(length)
                idle += length
                bound += max(0.0, length - own_s)
                covered += overlap([hole], lent)
        back = [next((end for begin, end in lent if begin < asked <= end), asked) for asked in owners.asked]
        timeline[name] = {
            "owners": [(starts[job][0], end) for job, end in zip(owners.jobs, owners.ended, strict=True)],
            "lent": lent, "borrowed": [(a, b) for a, b in filling.borrowed.get(name, ())],
            "reclaimed": [*zip(owners.asked, back, strict=True)]}
    # Until the next job on that node begins: some pilots have to go before they lend.
    ready = []
    for job, (at, name) in starts.items():
        if job not in owned | before:
            then = min((begin for begin, where in starts.values() if where == name and begin > at), default=stopped)
            ready += [begin - at for begin, _ in filling.lent.get(name, ()) if at < begin < then][:1]
    share = covered / bound if bound else 0.0
    waits = [starts[job][0] - asked for owners in found.values()
             for job, asked in zip(owners.jobs, owners.asked, strict=True)]
    return {
        "rows": [
            *spread("pilot's script begins to leasable", ready, {99: 1.0}, 1.0, "s"),
            row("Slurm's own time from a node's end of job to the start of a `sleep`, median", own_s, "s", len(sleeps)),
            row("holes lent, of what a clairvoyant would with that time", share, "", len(holes), 0.95, least=True),
            row("holes lent, of all", covered / idle if idle else 0.0, "", len(holes)),
            row("owners' jobs start after, p50", statistics.median(waits), "s", len(waits)),
        ],
        "ready_s": ready, "sleeps_s": sleeps, "holes_s": holes, "bound_s": bound, "covered_s": covered,
        "waits_s": waits, "borrower": "right",
        "timeline": {"seconds": stopped - began, "nodes": {
            name: {what: [[round(max(a, began) - began, 3), round(min(b, stopped) - began, 3)] for a, b in spans
                          if b > began and a < stopped] for what, spans in each.items()}
            for name, each in timeline.items()}}}


def _sleeps(cluster: Cluster, names: Sequence[str], rounds: int, wanted: pilots.Wanted) -> Iterator[float]:
    """How long after a job's end on its node one begins that sbatch was asked for as for a pilot, and only sleeps."""
    for number in range(rounds):
        ends, waiting = {}, {}
        for name in names:
            ends[name] = cluster.slurm.directory / f"end-{name}-{number}-{time.time_ns()}"
            job, _ = cluster.submit("high", f"sleep 1.5; echo $EPOCHREALTIME >{ends[name]}", f"--nodelist={name}")
            cluster.started(job)
            options = pilots.batch_options(pilots.Submit(10), wanted, "sleep", "/dev/null")
            waiting[name] = int(cluster.slurm.run("sbatch", "--parsable", f"--nodelist={name}", *options,
                                                  "--wrap=exec sleep 600"))
        for name, job in waiting.items():
            yield cluster.started(job) - float(ends[name].read_text())
        cluster.slurm.run("scancel", *waiting.values())
        for job in waiting.values():
            cluster.slurm.ended(job)


def _own(cluster: Cluster, name: str, found: Owners, seed: int, amount: Amount, stop: float) -> None:
    """Owners' jobs on this node until the run's end, each one to its end."""
    lengths, chance = idle_times(f"{seed} {name}", amount.shorter), random.Random(f"{seed} {name} busy")
    # Not all at once in the beginning.
    time.sleep(chance.uniform(0.0, min(amount.busy_s)))
    while time.time() < stop:
        end = cluster.slurm.directory / f"owner-{name}-{len(found.jobs)}"
        busy_s = chance.uniform(*amount.busy_s)
        job, asked = cluster.submit("high", f"sleep {busy_s:.3f}; echo $EPOCHREALTIME >{end}.new; mv {end}.new {end}",
                                    f"--nodelist={name}")
        found.jobs.append(job)
        found.asked.append(asked)
        cluster.slurm.wait_until(end.exists, f"job {job} ends on {name}")
        found.ended.append(float(end.read_text()))
        time.sleep(max(0.0, min(found.ended[-1] + next(lengths), stop) - time.time()))


PARTS: dict[str, Callable[[Amount, int], dict[str, Any]]] = {
    "hook": hook, "start": start, "leave": leave, "preemption": preemption, "coverage": coverage}


def run(given: argparse.Namespace) -> int:
    """Measures; the exit status."""
    if os.geteuid() != 0 or (why := why_not()):
        print(f"slurm: {'only root can start such a cluster' if os.geteuid() != 0 else why}", file=sys.stderr)
        return 1
    amount = replace(QUICK if given.quick else Amount(), other=given.other)
    if given.calls is not None:
        amount = replace(amount, calls=given.calls)
    if given.hung is not None:
        amount = replace(amount, hung=given.hung)
    if given.starts is not None:
        amount = replace(amount, starts=given.starts)
    report: dict[str, Any] = {"version": __version__, "environment": environment.facts(), "quick": given.quick,
                              "seed": given.seed,
                              "amount": {**asdict(amount), "other": given.other and given.other.name}, "parts": {
                                  name: json.loads(file.read_text(encoding="utf-8")) for name, file in given.beside}}
    for name in given.part or PARTS:
        since, before = time.monotonic(), os.getloadavg()
        part = PARTS[name](amount, given.seed)
        if "timeline" in part:
            report["timeline"] = part.pop("timeline")
        report["parts"][name] = {**part, "took_s": round(time.monotonic() - since, 1),
                                 "load_average": [round(before[0], 2), round(os.getloadavg()[0], 2)]}
        print(f"  {name}: {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)
        # What comes next may fail.
        given.out.write_text(json.dumps(report, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(table(report)))
    return 0


# --- for people ------------------------------------------------------------------------------------

def table(report: Mapping[str, Any]) -> Iterator[str]:
    """One line a figure."""
    for part in report["parts"].values():
        for each in part["rows"]:
            verdict = {True: "reached", False: "MISSED", None: ""}[each["reached"]]
            yield (f"{each['figure']:<82}{each['value']:>10.4g} {each['unit']:<3}{each['count']:>5}  "
                   f"{each['wanted']:<7} {verdict}").rstrip()


def render(report: Mapping[str, Any], source: str, plot: str | None) -> str:
    """The part of the page that is made of a report, as markdown."""
    where = report["environment"]
    lines = [BEGIN, "", f"{where['cpu']}, {where['cores_online']} cores{', virtual' if where['virtual'] else ''}, "
             f"Linux {where['kernel']}; {where['when'][:10]}; seed {report['seed']}; raw: "
             f"[{source.rpartition('/')[2]}]({source}).", "",
             "| part | figure | | of | wanted | | load |", "|---|---|--:|--:|--:|---|--:|"]
    for name, part in report["parts"].items():
        for each in part["rows"]:
            verdict = {True: "reached", False: "**missed**", None: ""}[each["reached"]]
            value = f"{each['value']:.4g} {each['unit']}".strip()
            if low_high := each.get("between"):
                value += " ({:.3g} to {:.3g})".format(*low_high)
            load = "" if "load_average" not in part else " to ".join(f"{one:.1f}" for one in part["load_average"])
            lines.append(f"| {name} | {each['figure']} | {value} | {each['count']} | {each['wanted']} | {verdict} | "
                         f"{load} |")
    if plot:
        lines += ["", f"![What each node did: owners' jobs, lent, borrowed, taken back]({plot})"]
    return "\n".join([*lines, "", END])


COLOURS = {"owners": "#5b6572", "lent": "#bcd9ec", "borrowed": "#2f7fb5", "reclaimed": "#c8452f"}


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Nodes × time, as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    line = report["timeline"]
    names = sorted(line["nodes"])
    figure, axes = pyplot.subplots(figsize=(12.4, 0.9 + 0.62 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        for what, colour in COLOURS.items():
            spans = [(begin, end - begin) for begin, end in line["nodes"][name][what]]
            thin = {"owners": 0.7, "lent": 0.7, "borrowed": 0.35, "reclaimed": 0.9}[what]
            axes.broken_barh(spans, (place - thin / 2, thin), facecolors=colour, label=what if place == 0 else None,
                             linewidth=1.5 if what == "reclaimed" else 0.0, edgecolor=colour)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0.0, line["seconds"])
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(COLOURS), frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def report(given: argparse.Namespace) -> int:
    """Renders what is asked for; the exit status."""
    found = json.loads(given.json.read_text(encoding="utf-8"))
    home = given.docs.resolve().parent if given.docs else Path.cwd()
    if given.plot:
        draw(found, given.plot)
    part = render(found, relative(given.json, home), relative(given.plot, home) if given.plot else None)
    if given.docs is None:
        print(part)
        return 0
    page = given.docs.read_text(encoding="utf-8")
    if not re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", page, re.DOTALL):
        raise ValueError(f"{given.docs} has no {BEGIN} … {END}")
    given.docs.write_text(page[:page.index(BEGIN)] + part + page[page.index(END) + len(END):], encoding="utf-8")
    return 0


def relative(file: Path, home: Path) -> str:
    return Path(os.path.relpath(file.resolve(), home)).as_posix()


def named_file(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError("NAME=FILE.json")
    return name, Path(file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure")
    one.add_argument("--quick", action="store_true", help="hardly anything of each, to see that it works")
    one.add_argument("--part", action="append", default=[], choices=[*PARTS], help="may be repeated (default: all)")
    one.add_argument("--with", dest="beside", action="append", default=[], type=named_file, metavar="NAME=FILE.json",
                     help="a part that was measured elsewhere; may be repeated")
    one.add_argument("--calls", type=int, default=None, help="how often a job's Prolog finds an agent that answers")
    one.add_argument("--hung", type=int, default=None, help="and how often one that hangs")
    one.add_argument("--starts", type=int, default=None, help="how many pilots start, or rounds of three")
    one.add_argument("--other", type=Path, default=None, metavar="DIRECTORY",
                     help="another checkout, built, whose pilots start beside ours")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--out", type=Path, default=Path("slurm-report.json"))
    two = commands.add_parser("report", help="render what was measured")
    two.add_argument("json", type=Path)
    two.add_argument("--docs", type=Path, help="page whose part to replace")
    two.add_argument("--plot", type=Path, help="PNG to draw")
    given = parser.parse_args(arguments)
    return run(given) if given.command == "run" else report(given)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""What owners of a node pay that the site's service lends: jobs whose cores were lent, beside jobs without the service.

USAGE: python benchmarks/slurm_owner.py [--seconds S] [--out FILE.json]      one piece, added to what FILE holds
       python benchmarks/slurm_owner.py --report FILE.json

As root, on a machine with two CPUs and nothing else to do. A real Slurm has one node, whose jobs get CPU 1. On CPU 0,
which is specialised, is all the rest: Slurm, manager, agent, this script, and a rank that computes all the time. In
each round, in an order drawn anew:

    none, again   a job without agent and hook, twice: how much two alike differ
    lent          a job while a worker computes on CPU 1, which is taken back; its rank goes on alone
    stopped       the same, and the agent is stopped (SIGSTOP) before: the hook takes the worker back

A job's first task says when it begins, how many processes of workers there are (if any, there is no figure), and then
does slices of work that are always the same: a loop, and a copy of memory. It does them with 256 times the weight of
others on its CPU, so that little of what else this machine does is measured. Nothing of the service may run there then,
or there is no figure either: manager, agent with all that it started, and rank. Of each job is kept

    queue_s       from before sbatch is started to the beginning of the job's Prolog. What runs on the node has no
                  part in it, and it depends on when Slurm last looked at its queue: it isn't compared
    start_s       from there to the first line of the job's script
    early_s       from there to the end of the first slice: an interpreter starts, too
    work_s        all slices, by the wall clock
    loop_s, copy_s    the median slice's two parts, which a disturbance now and then doesn't change
    cpu_s         the process' time on a CPU, from its start to the end of its work
    waited_s      its time on CPU 1's queue, while something else ran there
    stolen_s      what the host took from CPU 1 meanwhile

and each but the first is compared with that of `none` in the same round: the median of all rounds, and where it lies
(95 %, by order statistics).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(HERE)]

import faults  # noqa: E402
from cluster import tell, wait_until  # noqa: E402
from lending_node import LOOK, LendingNode  # noqa: E402
from site_of_users import ALICE, interpreter  # noqa: E402
from slurm_job import between  # noqa: E402

from rfaas_mpi.bench import environment  # noqa: E402

WAYS = ("none", "again", "lent", "stopped")
# Of times that the work takes, the ratio; of those that pass before, or that something else takes, the difference.
RATIOS = ("work_s", "early_s", "loop_s", "copy_s", "cpu_s")
DIFFERENCES = ("start_s", "waited_s", "stolen_s")
# By how much the upper bound of what an owner pays may exceed what two alike differ by.
ALLOWED = 0.02
STOPPED_MS = 300.0
# Version 1 of control groups; where there is none a job has the weight of all others.
WEIGHTS = Path("/sys/fs/cgroup/cpu")
WEIGHT = 256 * 1024

Job = Mapping[str, float]
Round = Mapping[str, Job]

WORK = """
import json, statistics, sys, time
from pathlib import Path
began = float(sys.argv[1])
here, there = bytearray(16 << 20), bytearray(16 << 20)
def stolen():
    lines = Path("/proc/stat").read_text().splitlines()
    return next(int(line.split()[8]) for line in lines if line.startswith("cpu1 ")) / 100
def loop():
    value = 0
    for number in range(160_000):
        value ^= number * 3
def copy():
    for _ in range(2):
        here[:] = there
loops, copies, early, was = [], [], 0.0, stolen()
begin = time.perf_counter()
for _ in range(80):
    at = time.perf_counter()
    loop()
    then = time.perf_counter()
    copy()
    loops.append(then - at)
    copies.append(time.perf_counter() - then)
    early = early or time.time() - began
work = time.perf_counter() - begin
ran, waited = (int(word) / 1e9 for word in Path("/proc/self/schedstat").read_text().split()[:2])
status = Path("/proc/self/status").read_text().splitlines()
allowed = next(line.split()[1] for line in status if line.startswith("Cpus_allowed_list:"))
print(json.dumps({"early_s": early, "work_s": work, "loop_s": statistics.median(loops),
                  "copy_s": statistics.median(copies), "cpu_s": ran, "waited_s": waited, "stolen_s": stolen() - was}))
print(allowed)
"""
# Computes all the time, with and without a worker beside it; in the end it says how many calls were right.
RANK = """
    import threading
    os.sched_setaffinity(0, {0})
    threads = [os.sched_setaffinity(int(name), {0}) for name in os.listdir("/proc/self/task")]
    def work(count):
        value = 0
        for number in range(count):
            value ^= number * 3
        return value
    ends = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ends.set()), daemon=True).start()
    right = work(200_000)
    if sys.argv[1] == "alone":
        say("began")
        while not ends.is_set():
            assert work(200_000) == right
    else:
        with Executor(workers=1) as ex:
            assert ex.submit(work, 200_000).result() == right
            say("began")
            while not ends.is_set():
                call = ex.submit(work, 200_000)
                assert work(200_000) == right == call.result()
    say("right")
"""


# --- pure --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Median:
    """Of what one way's jobs have beside those of `none`, round by round; it lies between `low` and `high`."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def beside_none(rounds: Sequence[Round], way: str, what: str) -> Median:
    """A ratio, or a difference in ms; see RATIOS and DIFFERENCES."""
    pairs = [(one[way][what], one["none"][what]) for one in rounds]
    each = [mine / none if what in RATIOS else 1e3 * (mine - none) for mine, none in pairs]
    return Median(statistics.median(each), *between(each))


def verdict(paid: Median, alike: Median) -> str:
    """Whether an owner pays no more than is allowed. Where both could be true, it isn't resolved."""
    most = alike.value + ALLOWED
    return "reached" if paid.high <= most else "missed" if paid.low > most else "not resolved here"


def started(later_ms: Median) -> str:
    """Whether a job whose agent was stopped begins soon enough."""
    return ("reached" if later_ms.high <= STOPPED_MS else "missed" if later_ms.low > STOPPED_MS
            else "not resolved here")


def summary(rounds: Sequence[Round]) -> dict[str, object]:
    """Medians of each kind; what is compared; what was wanted."""
    found: dict[str, object] = {"rounds": len(rounds)}
    compared = {way: {what: beside_none(rounds, way, what) for what in RATIOS + DIFFERENCES} for way in WAYS[1:]}
    found["medians_ms"] = {way: {what: round(1e3 * statistics.median(one[way][what] for one in rounds), 3)
                                 for what in ("queue_s", *DIFFERENCES, *RATIOS)} for way in WAYS}
    found["beside none (ratio; ms later or more)"] = {
        way: {what: str(median) for what, median in each.items()} for way, each in compared.items()}
    for way in ("lent", "stopped"):
        found[f"work, {way}: high <= A/A + {ALLOWED}"] = verdict(compared[way]["work_s"], compared["again"]["work_s"])
    found[f"start, stopped: high <= {STOPPED_MS:g} ms later"] = started(compared["stopped"]["start_s"])
    return found


# --- what runs ---------------------------------------------------------------------------------

@contextlib.contextmanager
def weighty() -> Iterator[Path | None]:
    """A control group whose processes come before others, until the caller has ended them."""
    if not (WEIGHTS / "tasks").exists():
        yield None
        return
    group = WEIGHTS / f"rfaas-owner-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.shares").write_text(str(WEIGHT))
        yield group
    finally:
        wait_until(lambda: not (group / "tasks").read_text(), "no job is left")
        group.rmdir()


def descendants(pid: int) -> Iterator[int]:
    """That process and all that it has started; who ends meanwhile is none."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in children.read_text().split():
                yield from descendants(int(child))


def elsewhere(pids: Sequence[int]) -> list[str]:
    """What of them and of all that they started may run on another CPU than 0."""
    found = []
    for pid in {each for pid in pids for each in descendants(pid)}:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
                if words["State"][0] not in "ZX" and words["Cpus_allowed_list"] != "0":
                    found.append(f"{words['Name']} ({pid}) on {words['Cpus_allowed_list']}")
    return found


class Owners:
    """The node, and jobs on it, one at a time."""

    def __init__(self, directory: Path, group: Path | None) -> None:
        self._without = directory / "without"
        self._done = directory / "done"
        self._prolog = directory / "prolog-began"
        leaves = f"[ -e '{self._without}' ] && exit 0"
        self.node = LendingNode(directory, words=["--keep", "0"], epilog=leaves,
                                prolog=f"date +%s.%N >'{self._prolog}'\n{leaves}")
        conf = self.node.slurm.directory / "slurm.conf"
        conf.write_text(conf.read_text().replace(" RealMemory=", " CpuSpecList=0 RealMemory="))
        program = directory / "work.py"
        program.write_text(WORK)
        enters = "" if group is None else f"echo 0 >'{group}/tasks'"
        self._script = (f"#!/bin/bash\nfirst=$EPOCHREALTIME\n{enters}\n{LOOK}\n"
                        f"workers=$(count '{self.node.directory}')\n"
                        f"said=$('{interpreter()}' -S '{program}' $first)\n"
                        f"echo $first $workers $said >'{self._done}.new'; mv '{self._done}.new' '{self._done}'\n")

    def _job(self, ours: Sequence[int]) -> dict[str, float]:
        self._done.unlink(missing_ok=True)
        begun = time.time()
        job = self.node.slurm.submit(self._script, "--ntasks=1", "--cpus-per-task=1")
        # Not by asking slurmctld, which would then have less time for the job.
        wait_until(self._done.exists, "the job has done its work")
        assert not (found := elsewhere(ours)), found
        assert self.node.slurm.ended(job) == "COMPLETED", self.node.slurm.said()
        first, workers, said = self._done.read_text().split(maxsplit=2)
        said, _, allowed = said.strip().rpartition(" ")
        assert workers == "0" and allowed == "1", f"{workers} workers' processes; the job may run on {allowed}"
        prolog = float(self._prolog.read_text())
        found = {"queue_s": prolog - begun, "start_s": float(first) - prolog, **json.loads(said)}
        return {what: round(value, 6) for what, value in found.items()}

    def sample(self, way: str) -> dict[str, float]:
        """One job in that way; the agent runs afterwards only if it did before."""
        agent = self.node.site.agent
        with_agent = way in ("lent", "stopped")
        if with_agent:
            self._without.unlink(missing_ok=True)
            if not agent.alive:
                admitted = agent.said().count("is admitted as")
                agent.start()
                # Before that its predecessor's cores count as free.
                wait_until(lambda: agent.said().count("is admitted as") > admitted, "the agent has registered")
            wait_until(lambda: self.node.site.free() == 1, "CPU 1 is lent")
        else:
            if agent.alive:
                agent.kill()
            self._without.touch()
        with self.node.site.running(ALICE, RANK, "borrow" if with_agent else "alone") as rank:
            assert faults.line(rank) == "began"
            if with_agent:
                wait_until(self.node.workers, "a worker runs")
            if way == "stopped":
                agent.signal(signal.SIGSTOP)
            try:
                found = self._job([rank.pid, self.node.site.manager.pid, *([agent.pid] if with_agent else [])])
            finally:
                if agent.alive:
                    agent.signal(signal.SIGCONT)
            tell(rank, "end")
            assert faults.line(rank) == "right"
        return found


def measure(seconds: float) -> list[dict[str, dict[str, float]]]:
    """Whole rounds, of which the last one begins before that time is over."""
    rounds = []
    with tempfile.TemporaryDirectory(prefix="rfaas-owner-") as directory, weighty() as group:
        Path(directory).chmod(0o755)
        # And with us all that we start, but jobs and workers, which have cores of their own.
        os.sched_setaffinity(0, {0})
        owners = Owners(Path(directory), group)
        until = time.monotonic() + seconds
        with owners.node:
            while time.monotonic() < until:
                rounds.append({way: owners.sample(way) for way in random.sample(WAYS, len(WAYS))})
                print(*(f"{way} {rounds[-1][way]['work_s']:.4f}" for way in WAYS), flush=True)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    if given.report is not None:
        print(json.dumps(summary(json.loads(given.report.read_text())["rounds"]), indent=1))
        return
    if os.geteuid() != 0:
        sys.exit("it starts a Slurm and control groups: run it as root")
    kept = {"what": __doc__.splitlines()[0], "pieces": [], "rounds": []}
    if given.out is not None and given.out.exists():
        kept = json.loads(given.out.read_text())
    facts, load = environment.facts(), os.getloadavg()
    rounds = measure(given.seconds)
    kept["pieces"].append({"machine": facts, "load": load, "rounds": len(rounds)})
    kept["rounds"] += rounds
    kept["summary"] = summary(kept["rounds"])
    if given.out is not None:
        given.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept["summary"], indent=1))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What owners of a node pay that the site's service lends: jobs whose cores were lent, beside jobs without the service.

USAGE: python benchmarks/slurm_owner.py [--seconds S] [--out FILE.json]      one piece, added to what FILE holds
       python benchmarks/slurm_owner.py --report FILE.json

As root, on a machine with two CPUs and nothing else to do. A real Slurm has one node, whose jobs get CPU 1 (CPU 0 is
specialised: there are Slurm, the agent and a rank that computes all the time). In each round, in an order drawn anew:

    none, again   a job without agent, twice: how much two alike differ
    lent          a job while a worker runs on CPU 1, and its rank goes on alone when it is taken back
    stopped       the same, and the agent is stopped (SIGSTOP): the hook takes the worker back

A job's first task does fixed work and says how long that took, and when it began: `start_s` is from sbatch to there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import faults  # noqa: E402
from cluster import tell, wait_until  # noqa: E402
from lending_node import LendingNode  # noqa: E402
from site_of_users import ALICE, interpreter  # noqa: E402

from rfaas_mpi.bench import environment  # noqa: E402

WAYS = ("none", "again", "lent", "stopped")
WORK = """
import time
wall, begin, value = time.time(), time.perf_counter(), 0
for number in range(4_000_000):
    value ^= number * 3
print(wall, time.perf_counter() - begin)
"""
# Computes as much whoever does it: on a worker where there is one, else in the rank, which stays on CPU 0.
RANK = """
    os.sched_setaffinity(0, {0})
    threads = [os.sched_setaffinity(int(name), {0}) for name in os.listdir("/proc/self/task")]
    def work(count):
        value = 0
        for number in range(count):
            value ^= number * 3
        return value
    ends = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ends.set()), daemon=True).start()
    def go_on(run):
        say("began")
        while not ends.is_set():
            run(200_000)
    if sys.argv[1] == "alone":
        go_on(work)
    else:
        with Executor(workers=1) as ex:
            ex.submit(work, 1).result()
            go_on(lambda count: ex.submit(work, count).result())
"""


def job(node: LendingNode) -> dict[str, float]:
    begun = time.time()
    said = node.slurm.finish(f"#!/bin/sh\nexec {interpreter()} -S -c '{WORK}'\n", "--ntasks=1", "--cpus-per-task=1")
    wall, took = map(float, said.split())
    return {"start_s": wall - begun, "work_s": took}


def sample(node: LendingNode, way: str) -> dict[str, float]:
    """One job in that way; the agent runs afterwards only if it did before."""
    agent = node.site.agent
    if way in ("none", "again"):
        if agent.alive:
            agent.kill()
        with node.site.running(ALICE, RANK, "alone") as rank:
            assert faults.line(rank) == "began"
            return job(node)
    if not agent.alive:
        admitted = agent.said().count("is admitted as")
        agent.start()
        # Before that its predecessor's cores count as free.
        wait_until(lambda: agent.said().count("is admitted as") > admitted, "the agent has registered")
    wait_until(lambda: node.site.free() == 1, "CPU 1 is lent")
    with node.site.running(ALICE, RANK, "borrow") as rank:
        assert faults.line(rank) == "began"
        wait_until(node.workers, "a worker runs")
        if way == "stopped":
            agent.signal(signal.SIGSTOP)
        try:
            found = job(node)
        finally:
            agent.signal(signal.SIGCONT)
        tell(rank, "end")
        rank.wait(60)
    return found


def measure(seconds: float) -> list[dict[str, dict[str, float]]]:
    directory = Path(tempfile.mkdtemp(prefix="rfaas-owner-"))
    directory.chmod(0o755)
    node = LendingNode(directory, words=["--keep", "0"])
    conf = node.slurm.directory / "slurm.conf"
    conf.write_text(conf.read_text().replace(" RealMemory=", " CpuSpecList=0 RealMemory="))
    rounds = []
    until = time.monotonic() + seconds
    with node:
        while time.monotonic() < until:
            ways = random.sample(WAYS, len(WAYS))
            rounds.append({way: sample(node, way) for way in ways})
    return rounds


def bound(values: Sequence[float], of: random.Random) -> tuple[float, float, float]:
    """The median, and the ends of what 95 of 100 such samples have for theirs."""
    medians = sorted(statistics.median(of.choices(values, k=len(values))) for _ in range(10_000))
    return statistics.median(values), medians[250], medians[9750]


def summary(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, object]:
    of = random.Random(1)
    found: dict[str, object] = {"rounds": len(rounds)}
    for way in WAYS[1:]:
        for what in ("work_s", "start_s"):
            if what == "work_s":
                each = [one[way][what] / one["none"][what] for one in rounds]
            else:
                each = [1e3 * (one[way][what] - one["none"][what]) for one in rounds]
            name = f"{way}: {'work, times that of none' if what == 'work_s' else 'start, ms later than none'}"
            median, low, high = bound(each, of)
            found[name] = {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    if given.report is not None:
        print(json.dumps(summary(json.loads(given.report.read_text())["raw"]), indent=1))
        return
    if os.geteuid() != 0:
        sys.exit("it starts a Slurm and control groups: run it as root")
    raw = json.loads(given.out.read_text())["raw"] if given.out is not None and given.out.exists() else []
    raw += measure(given.seconds)
    found = {"what": __doc__.splitlines()[0], "machine": environment.facts(), "summary": summary(raw), "raw": raw}
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()

"""A job's time: leases end before it, also where it is changed meanwhile, on a real Slurm."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from cluster import Cluster, wait_until
from slurm_cluster import GUARD_S, Slurm
from test_agent_window import end_of_a_lease
from test_apps import needs_two_cores
from test_slurm_pilots import Pilots

REPOSITORY = Path(__file__).resolve().parent.parent
RFAAS = Path(sys.executable).with_name("rfaas")

# A look at a job that ends in a minute is less than this apart.
SOON_S = 18 * slurm_cluster.SLOW

# Borrows, says until when, and has calls run until it is told that it's enough.
PROGRAM = r"""
import os, signal, sys, time
import rfaas_mpi as rf
signal.signal(signal.SIGUSR1, lambda *_: print("warned", flush=True))
def square(number):
    return number * number
with rf.Executor(workers=(0, 4), lease_timeout_s=2) as executor:
    ends = executor._crew.ends_at
    print("borrowed", len(executor.workers), "ends", int(time.time() + ends - time.monotonic()) if ends < 1e9 else "-",
          flush=True)
    while not os.path.exists(sys.argv[1]):
        assert list(executor.map(square, range(64))) == [n * n for n in range(64)]
        if not executor.workers:
            print("alone", int(time.time()), flush=True)
            break
    assert list(executor.map(square, range(64))) == [n * n for n in range(64)]
    print("right", flush=True)
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    settings = {"OverTimeLimit": 5, "PreemptType": "preempt/partition_prio", "PreemptMode": "CANCEL"}
    partitions = ("low PriorityTier=1 PreemptMode=CANCEL GraceTime=0 MaxTime=30", "high PriorityTier=10 PreemptMode=OFF")
    with slurm_cluster.cluster(2, 2, settings=settings, partitions=partitions) as found:
        (found.directory / "program.py").write_text(PROGRAM)
        yield found


def script(enough: Path) -> str:
    return (f"#!/bin/bash\nexport PYTHONPATH='{REPOSITORY}'\n"
            f"exec '{RFAAS}' slurm run -- '{sys.executable}' program.py '{enough}'\n")


def ends(slurm: Slurm, job: int) -> int:
    """When Slurm says that the job ends."""
    return int(slurm.run("squeue", "-h", "-j", job, "-o", "%e", SLURM_TIME_FORMAT="%s"))


def said(slurm: Slurm, job: int, pattern: str) -> re.Match[str]:
    found = slurm.wait_until(lambda: re.search(pattern, slurm.output(job)), f"job {job} says {pattern}")
    assert isinstance(found, re.Match)
    return found


@needs_two_cores
def test_leases_end_before_their_job_also_where_its_end_is_changed_and_a_warning_ends_none_of_them(slurm):
    enough = slurm.directory / "enough"
    job = slurm.submit(script(enough), "--nodes=1", "--exclusive", "--time=1", "--signal=USR1@60")
    until = int(said(slurm, job, r"borrowed 1 ends (\d+)\n")[1])
    assert ends(slurm, job) - 6 <= until < ends(slurm, job) - 3, "five seconds before the job's end"
    # As Slurm warns: all steps.
    slurm.run("scancel", "--signal=USR1", job)
    said(slurm, job, "warned")
    assert "alone" not in slurm.output(job)
    slurm.run("scontrol", "update", f"jobid={job}", f"endtime=now+{SOON_S:.0f}")
    alone = int(said(slurm, job, r"alone (\d+)\n")[1])
    assert alone < ends(slurm, job) < until
    said(slurm, job, "right")


@needs_two_cores
def test_leases_end_before_the_pilot_that_they_are_of(slurm):
    with Pilots(slurm, "--nodes-max", 1, "--lengths", "1") as pilots:
        environment = pilots.environment()
        pilots.until(lambda: len(pilots.lending()) == 1, "a node lends")
        (pilot,) = slurm.run("squeue", "-h", "-p", "low", "-t", "RUNNING", "-o", "%i").split()
        borrower = subprocess.run(
            [sys.executable, "program.py", slurm.directory], cwd=slurm.directory, capture_output=True, text=True,
            timeout=GUARD_S, env={**slurm.environment, **environment, "PYTHONPATH": str(REPOSITORY)})
        found = re.search(r"borrowed 1 ends (\d+)\n", borrower.stdout)
        assert found is not None and "right" in borrower.stdout, borrower
        assert int(found[1]) < ends(slurm, int(pilot))
        pilots.close()


@needs_two_cores
def test_a_manager_that_reads_slurm_ends_leases_before_the_job_that_is_planned_for_their_node(slurm):
    sleep = "#!/bin/bash\nexec sleep 600\n"
    first = slurm.submit(sleep, "--partition=batch", "--nodelist=n1", "--exclusive", "--time=2")
    slurm.wait_until(lambda: slurm.state(first) == "RUNNING", "a job has the node")
    planned = slurm.submit(sleep, "--partition=batch", "--nodelist=n1", "--exclusive", "--time=1")

    def start() -> int:
        said = slurm.run("squeue", "-h", "-j", planned, "-o", "%S|%Y", SLURM_TIME_FORMAT="%s").strip()
        return int(said.removesuffix("|n1")) if said.endswith("|n1") else 0

    slurm.wait_until(start, "the next one is planned for it")
    # As a site's agent would, where the first job leaves cores.
    cluster = Cluster(["0-1"], SLURM_CONF=slurm.environment["SLURM_CONF"], PATH=slurm.environment["PATH"])
    cluster.manager.command.append("--slurm")
    words = cluster.agents[0].command
    words[words.index("node0")] = "n1"
    try:
        with cluster:
            def planned_end() -> bool:
                end = end_of_a_lease(cluster)
                return end is not None and time.time() + end < start()

            wait_until(planned_end, "leases end before it begins")
    finally:
        cluster.close()
        slurm.run("scancel", first, planned)

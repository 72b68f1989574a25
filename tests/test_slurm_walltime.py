"""A job's time: leases end before it, also where it is changed meanwhile, on a real Slurm."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Slurm
from test_apps import needs_two_cores

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
    with slurm_cluster.cluster(2, 2, settings={"OverTimeLimit": 5}) as found:
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

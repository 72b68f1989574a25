"""`rfaas doctor` inside a Slurm job: which world its ranks are in, what they are bound to, what its nodes see."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Slurm

from rfaas_mpi.cli import slurm_checks
from rfaas_mpi.slurm.facts import Allocation

REPOSITORY = Path(__file__).resolve().parent.parent
JOB = Allocation(7, ("n1", "n2"), (2, 2), (1, 1))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with slurm_cluster.cluster(2, 2, bound=True) as found:
        yield found


def reports(said: str) -> list[dict[str, dict]]:
    """The checks of each `rfaas doctor --json` that ran, by name."""
    decoder, found, rest = json.JSONDecoder(), [], said.strip()
    while rest:
        report, end = decoder.raw_decode(rest)
        found.append({check["name"]: check for check in report["checks"]})
        rest = rest[end:].lstrip()
    return found


def doctor(slurm: Slurm, launch: str, *options: str) -> list[dict[str, dict]]:
    return reports(slurm.finish(
        f"#!/bin/bash\nexport PYTHONPATH='{REPOSITORY}'\n"
        # One after another: what they say is not to be mixed.
        f"{launch} flock '{slurm.directory}/lock' '{sys.executable}' -m rfaas_mpi.cli doctor --json\n", *options))


def test_in_a_batch_script_it_tells_the_job_and_what_its_nodes_see(slurm):
    report, = doctor(slurm, "", "--nodes=2", "--exclusive")
    assert report["slurm job"]["ok"] and report["slurm job"]["facts"]["nodes"] == 2
    assert report["slurm nodes"]["ok"], report["slurm nodes"]
    assert set(report["slurm nodes"]["facts"]["skew_s"]) == {"n1", "n2"}
    assert "slurm ranks" not in report


def test_tasks_that_know_nothing_of_each_other_and_share_all_cores_are_told_what_to_do(slurm):
    for report in doctor(slurm, "srun -n2 --mpi=none --cpu-bind=none", "--nodes=1", "--ntasks=2", "--exclusive"):
        assert not report["slurm ranks"]["ok"] and "--mpi=pmi2" in report["slurm ranks"]["fix"]
        assert not report["slurm binding"]["ok"] and "--cpu-bind=cores" in report["slurm binding"]["fix"]


def test_ranks_of_one_world_with_cores_of_their_own_are_well(slurm):
    found = doctor(slurm, "srun -n2 --mpi=pmi2 --cpu-bind=map_cpu:0,1", "--nodes=1", "--ntasks=2", "--exclusive")
    assert len(found) == 2
    for report in found:
        assert report["slurm ranks"]["ok"] and report["slurm ranks"]["facts"] == {"tasks": 2, "pmi": "PMI"}
        assert report["slurm binding"]["ok"], report["slurm binding"]
    assert sorted(report["slurm binding"]["facts"]["cores"] for report in found) == [[0], [1]]


def test_outside_a_job_nothing_is_said_of_slurm():
    assert list(slurm_checks.slurm_checks({"PATH": "/usr/bin"})) == []


def test_a_slurm_without_overlap_is_too_old():
    assert slurm_checks.release("slurm 22.05.8", JOB).ok
    assert not slurm_checks.release("slurm 20.02.7", JOB).ok
    assert not slurm_checks.release("who knows", JOB).ok


def test_nodes_that_see_less_than_this_one_are_named():
    well = (0.1, True, True)
    assert slurm_checks.nodes(JOB, {"n1": well, "n2": well}).ok
    for wrong, said in (((0.0, False, True), "n2 sees no /"), ((0.0, True, False), "n2 sees no home"),
                        ((-7.5, True, True), "clock of n2 is -7.5 s")):
        check = slurm_checks.nodes(JOB, {"n1": well, "n2": wrong})
        assert not check.ok and said in check.reason
    assert "n2 said nothing" in slurm_checks.nodes(JOB, {"n1": well}).reason

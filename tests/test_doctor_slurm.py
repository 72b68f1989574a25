"""`rfaas doctor` inside a Slurm job: which world its ranks are in, what they are bound to, what its nodes see."""

from __future__ import annotations

import json
import resource
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from mpi_launch import World
from slurm_cluster import Slurm
from test_slurm_run import no_groups

from rfaas_mpi.cli import slurm_checks
from rfaas_mpi.cli.slurm_checks import Seen
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
    report, = doctor(slurm, "", "--nodes=2", "--exclusive", "--time=5")
    assert report["slurm job"]["ok"] and report["slurm job"]["facts"]["nodes"] == 2
    assert 0 < report["slurm job"]["facts"]["left_s"] <= 300, "the job's time"
    assert report["slurm overlap"]["ok"]
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert report["slurm memlock"]["facts"]["memlock_kib"] == dict.fromkeys(
        ("n1", "n2"), None if limit == resource.RLIM_INFINITY else limit >> 10)
    # Slurm makes no groups here.
    assert report["slurm confinement"]["facts"] == {"groups": {"n1": "", "n2": ""}, "cores": False}
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
        assert report["slurm ranks"]["ok"] and report["slurm ranks"]["facts"] == {
            "tasks": 2, "pmi": "PMI", "launcher": "srun", "library": "MPICH"}
        assert report["slurm binding"]["ok"], report["slurm binding"]
    assert sorted(report["slurm binding"]["facts"]["cores"] for report in found) == [[0], [1]]


@pytest.mark.parametrize("library, name, pmi", [("mpich", "MPICH", "PMI"), ("openmpi", "Open MPI", "PMIX")])
def test_ranks_of_a_library_s_own_launcher_are_known_by_it(slurm, library, name, pmi):
    world = World(library)
    changes = {**world.changes, **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")}
    launch = " ".join(["env", *(shlex.quote(f"{key}={value}") for key, value in changes.items()),
                       shlex.quote(str(world.mpiexec)), "-n", "2", "--bind-to" if library == "openmpi" else "-bind-to",
                       "none"])
    found = doctor(slurm, launch, "--nodes=1", "--ntasks=2", "--exclusive")
    assert len(found) == 2
    for report in found:
        assert report["slurm ranks"]["ok"], report["slurm ranks"]
        assert report["slurm ranks"]["facts"] == {"tasks": 2, "pmi": pmi, "launcher": f"mpiexec of {name}",
                                                  "library": name}
        assert not report["slurm binding"]["ok"], "they may use all of the job's cores"


def test_a_library_that_does_not_listen_to_what_tells_its_ranks_is_named_with_the_way_out():
    by_pmi2 = {"SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "0", "PMI_FD": "3"}
    wrong = slurm_checks.world(by_pmi2, "Open MPI v5.0.11, package: ...")
    assert not wrong.ok and "Open MPI listens to PMIX" in wrong.reason and "srun --mpi=pmix" in wrong.fix
    by_pmix = {"SLURM_STEP_NUM_TASKS": "2", "PMIX_RANK": "0", "PMIX_NAMESPACE": "s"}
    wrong = slurm_checks.world(by_pmix, "MPICH Version: 5.0.2")
    assert not wrong.ok and "MPICH listens to PMI:" in wrong.reason and "srun --mpi=pmi2" in wrong.fix
    assert slurm_checks.world(by_pmix, "Open MPI v5").ok and slurm_checks.world(by_pmi2).ok
    assert slurm_checks.world({"SLURM_STEP_NUM_TASKS": "1"}).ok


def test_outside_a_job_nothing_is_said_of_slurm():
    assert list(slurm_checks.slurm_checks({"PATH": "/usr/bin"})) == []


def test_a_slurm_without_overlap_is_too_old():
    assert slurm_checks.release("slurm 22.05.8", JOB).ok
    assert not slurm_checks.release("slurm 20.02.7", JOB).ok
    assert not slurm_checks.release("who knows", JOB).ok


def test_nodes_that_see_less_than_this_one_are_named():
    well = Seen(0.1, True, True)
    assert slurm_checks.nodes(JOB, {"n1": well, "n2": well}).ok
    for wrong, said in (((0.0, False, True), "n2 sees no /"), ((0.0, True, False), "n2 sees no home"),
                        ((-7.5, True, True), "clock of n2 is -7.5 s")):
        check = slurm_checks.nodes(JOB, {"n1": well, "n2": Seen(*wrong)})
        assert not check.ok and said in check.reason
    assert "n2 said nothing" in slurm_checks.nodes(JOB, {"n1": well}).reason


def test_memory_that_may_not_be_locked_on_a_node_is_told_but_to_root():
    seen = {"n1": Seen(0.0, True, True, None), "n2": Seen(0.0, True, True, 64)}
    tight = slurm_checks.memlock(seen, False)
    assert not tight.ok and "64 KiB on n2" in tight.reason and "MEMLOCK" in tight.fix
    assert slurm_checks.memlock(seen, True).ok
    assert slurm_checks.memlock({"n1": seen["n1"]}, False).ok


def test_which_groups_hold_a_job_s_steps_is_told_and_nodes_that_differ_are_named():
    def seen(*groups: str) -> dict[str, Seen]:
        return {f"n{number}": Seen(0.0, True, True, None, group) for number, group in enumerate(groups)}

    keeps = "TaskPlugin = task/cgroup,task/affinity\nConstrainCores = yes\n"
    found = slurm_checks.confinement(seen("v2", "v2"), keeps)
    assert found.ok and "groups v2, which keep them" in found.reason
    assert "do not keep" in slurm_checks.confinement(seen("v1"), "TaskPlugin = task/affinity\n").reason
    assert not slurm_checks.confinement(seen("v1", ""), keeps).ok


def test_where_slurm_confines_steps_their_groups_are_found():
    assert not (reason := no_groups()), reason
    with slurm_cluster.cluster(1, 2, confined=True) as slurm:
        report, = doctor(slurm, "", "--nodes=1", "--exclusive")
        assert report["slurm confinement"]["facts"] == {"groups": {"n1": "v1"}, "cores": True}

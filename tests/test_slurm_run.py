"""Inside a user's own job: ranks on some of its cores and workers on the others, on a real Slurm."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from mpi_launch import LIBRARIES, World
from slurm_cluster import Slurm
from test_apps import needs_two_cores

REPOSITORY = Path(__file__).resolve().parent.parent
RFAAS = Path(sys.executable).with_name("rfaas")

# Says where each rank and its workers run; the nodes are one machine, so names tell them apart.
PROGRAM = r"""
import os, sys
from mpi4py import MPI
import rfaas_mpi as rf
comm = MPI.COMM_WORLD
def where(_):
    return tuple(sorted(os.sched_getaffinity(0)))
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())
with rf.Executor(workers=(0, 4), comm=comm, lease_timeout_s=2) as executor:
    cores = set(executor.map(where, range(4))) if executor.workers else set()
    say("rank", comm.rank, "of", comm.size, "on", *sorted(os.sched_getaffinity(0)), "workers", len(executor.workers),
        "on", *sorted(core for each in cores for core in each))
sys.exit(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with slurm_cluster.cluster(2, 2) as found:
        (found.directory / "program.py").write_text(PROGRAM)
        yield found


def script(*options: object, arguments: str = "", before: str = "") -> str:
    words = " ".join(map(str, options if "--launcher" in options else ("--mpi", "pmi2", *options)))
    return (f"#!/bin/bash\n{before}\nexport PYTHONPATH='{REPOSITORY}'\n"
            f"exec '{RFAAS}' slurm run {words} -- '{sys.executable}' program.py {arguments}\n")


def left(slurm: Slurm) -> list[Path]:
    """What a job leaves in the directory for what is temporary."""
    return [path for path in Path(tempfile.gettempdir()).glob(f"rfaas-slurm-{os.geteuid()}-*") if path.is_dir()]


@needs_two_cores
def test_each_node_of_a_job_lends_what_its_rank_leaves(slurm):
    said = slurm.finish(script(), "--nodes=2", "--ntasks=2", "--exclusive")
    assert {line for line in said.splitlines() if line.startswith("rank")} == {
        f"rank {rank} of 2 on 0 workers 1 on 1" for rank in (0, 1)}, said
    assert {line for line in said.splitlines() if line.startswith("rfaas:")} == {
        f"rfaas: {node}: ranks on 0; lent: 1" for node in slurm.names}, said
    assert left(slurm) == []


@needs_two_cores
@pytest.mark.parametrize("library", LIBRARIES)
def test_either_librarys_own_launcher_starts_the_ranks(slurm, library):
    world = World(library)
    changes = {**world.changes, **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")}
    before = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in changes.items())
    said = slurm.finish(script("--launcher", shlex.quote(str(world.mpiexec)), before=before),
                        "--nodes=2", "--ntasks=2", "--exclusive")
    assert {line for line in said.splitlines() if line.startswith("rank")} == {
        f"rank {rank} of 2 on 0 workers 1 on 1" for rank in (0, 1)}, said


@needs_two_cores
def test_no_more_is_lent_than_is_asked_for_and_threads_of_ranks_count(slurm):
    said = slurm.finish(script("--workers", 0), "--nodes=1", "--exclusive")
    assert "rank 0 of 1 on 0 workers 0 on" in said, said
    said = slurm.finish(script(before="export OMP_NUM_THREADS=2"), "--nodes=1", "--exclusive")
    assert "rank 0 of 1 on 0 1 workers 0 on" in said, said


def test_the_status_of_the_ranks_is_the_jobs_and_nothing_is_left(slurm):
    job = slurm.submit(script(arguments="3"), "--nodes=1", "--exclusive")
    assert slurm.ended(job) == "FAILED", slurm.output(job)
    assert "ExitCode=3:0" in slurm.run("scontrol", "show", "job", "-o", job), slurm.output(job)
    assert left(slurm) == []


def test_ranks_that_need_more_cores_than_the_job_has_are_an_error_that_says_so(slurm):
    job = slurm.submit(script("--ranks", 2, before="export OMP_NUM_THREADS=2"), "--nodes=1", "--exclusive")
    assert slurm.ended(job) == "FAILED"
    assert "2 ranks of 2 threads need 4 cores, and the job has 2 on n1" in slurm.output(job)


@needs_two_cores
def test_a_job_that_is_cancelled_leaves_no_process(slurm):
    """Its script gets no time to end anything: Slurm stops every step of it."""
    job = slurm.submit(
        f"#!/bin/bash\nexport PYTHONPATH='{REPOSITORY}'\n'{RFAAS}' slurm run -- sh -c 'echo began; exec sleep 600'\n",
        "--nodes=2", "--ntasks=2", "--exclusive")
    slurm.wait_until(lambda: slurm.output(job).count("began") == 2, "both ranks have begun")
    mine = re.compile(rb"rfaas-slurm-%d-%d\b" % (os.geteuid(), job))
    assert processes(mine)
    slurm.run("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    slurm.wait_until(lambda: not processes(mine), "its processes are gone")
    slurm.wait_until(lambda: not left(slurm), "its files are gone")


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_ranks_that_are_sent_a_signal_have_the_time_to_end_by_themselves(slurm, name):
    job = slurm.submit(
        f"#!/bin/bash\nexport PYTHONPATH='{REPOSITORY}'\nexec '{RFAAS}' slurm run -- bash -c '"
        f"trap \"sleep 0.3; echo saved; exit 5\" {name}; echo began; while :; do sleep 0.1; done'\n",
        "--nodes=2", "--ntasks=2", "--exclusive")
    slurm.wait_until(lambda: slurm.output(job).count("began") == 2, "both ranks have begun")
    slurm.run("scancel", "--batch", f"--signal={name}", job)
    assert slurm.ended(job) == "FAILED"
    assert slurm.output(job).count("saved") == 2, slurm.output(job)
    assert "ExitCode=5:0" in slurm.run("scontrol", "show", "job", "-o", job), slurm.output(job)


def test_a_shell_of_salloc_need_not_be_on_a_node_of_the_job(slurm):
    said = slurm.run("salloc", "--nodes=1", "--ntasks=1", "--exclusive", RFAAS, "slurm", "run", "--",
                     "sh", "-c", 'echo "manager at $RFAAS_MANAGER"', PYTHONPATH=str(REPOSITORY))
    assert "manager at http://127.0.0.1:" in said, said
    assert left(slurm) == []


def test_each_node_removes_its_files_itself_also_where_nothing_is_lent(slurm):
    """The nodes here share one directory: which of them removed it is written down as they do."""
    removed = slurm.directory / "removed"
    (slurm.directory / "sitecustomize.py").write_text(
        "import os, shutil\nremove = shutil.rmtree\ndef rmtree(path, *rest, **options):\n"
        "    if 'rfaas-slurm-' in str(path):\n"
        f"        with open({str(removed)!r}, 'a') as found:\n"
        "            found.write(f\"{os.environ['SLURMD_NODENAME']} {os.environ.get('SLURM_STEP_ID')}\\n\")\n"
        "    return remove(path, *rest, **options)\nshutil.rmtree = rmtree\n")
    slurm.finish(f"#!/bin/bash\nexport PYTHONPATH='{slurm.directory}:{REPOSITORY}'\n"
                 f"exec '{RFAAS}' slurm run --workers 1 -- true\n", "--nodes=2", "--ntasks=2", "--exclusive")
    assert {"n1 0", "n2 0"} <= set(removed.read_text().splitlines())
    assert left(slurm) == []


def test_a_second_run_beside_the_first_one_is_refused_and_harms_nothing(slurm):
    said = slurm.finish(
        f"#!/bin/bash\nexport PYTHONPATH='{REPOSITORY}' SRUN_CPUS_PER_TASK=1\n"
        f"'{RFAAS}' slurm run -- sh -c 'touch began; while [ ! -e end ]; do sleep 0.1; done; echo first is done' &\n"
        "until [ -e began ]; do sleep 0.1; done\n"
        f"'{RFAAS}' slurm run -- echo second\necho status $?\ntouch end\nwait %1\n", "--nodes=1", "--exclusive")
    assert "has an `rfaas slurm run` already" in said and "status 1" in said, said
    assert "first is done" in said and "lent: 1" in said, said
    assert left(slurm) == []


@needs_two_cores
def test_where_slurm_confines_jobs_ranks_and_workers_stay_in_their_own():
    assert not (reason := no_groups()), reason
    with slurm_cluster.cluster(1, 2, confined=True) as slurm:
        (slurm.directory / "program.py").write_text(PROGRAM)
        # Both cores, though not the node …
        said = slurm.finish(script(), "--ntasks=1", "--cpus-per-task=2")
        assert "rank 0 of 1 on 0 workers 1 on 1" in said, said
        # … and one core, with another job beside it that has the first one.
        other = slurm.submit("#!/bin/bash\nexec sleep 600\n", "--ntasks=1")
        slurm.wait_until(lambda: slurm.state(other) == "RUNNING", "the other job runs")
        said = slurm.finish(script(), "--ntasks=1")
        assert "rank 0 of 1 on 1 workers 0 on" in said and "lent: none" in said, said


def no_groups() -> str:
    """Why Slurm can't confine jobs here; empty if it can."""
    missing = [name for name in ("freezer", "cpuset", "cpuacct") if not os.access(f"/sys/fs/cgroup/{name}/tasks", os.W_OK)]
    return f"no control group v1 {missing[0]} that may be changed" if missing else ""


def processes(pattern: re.Pattern[bytes]) -> list[int]:
    """Those whose command or environment has it."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            except OSError:
                continue
            if pattern.search(text):
                found.append(int(path.name))
    return found

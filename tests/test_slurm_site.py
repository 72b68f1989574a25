"""A site whose nodes lend while jobs come and go: owners have their cores, borrowers their answers.

RFAAS_SOAK_SITE_SECONDS has jobs come for so long.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import slurm_cluster
from cluster import wait_until
from lending_node import GUARD_S, HOOK, WHERE, LendingNode
from site_of_users import ALICE
from test_apps import needs_two_cores

from rfaas_mpi.config import core_list

SECONDS = float(os.environ.get("RFAAS_SOAK_SITE_SECONDS", "2"))
SEED = int(os.environ.get("RFAAS_SOAK_SITE_SEED", "1"))

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="makes control groups: needs root"), needs_two_cores]

# All that a user runs ends with a job, as where only whose job it is may be on a node. His rank is on another one.
EPILOG = """
if [ -e '{top}/rank' ]; then
    ps -o pid=,sid= -u {uid} | awk -v rank="$(cat '{top}/rank')" '$2 != rank {{print $1}}' | xargs -r kill -KILL
    echo ended >>'{top}/ends'
fi
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory) -> Iterator[LendingNode]:
    assert not (reason := slurm_cluster.why_not()), reason
    directory = tmp_path_factory.mktemp("site")
    directory.chmod(0o755)
    with LendingNode(directory, prolog=f"if [ -p '{directory}/gate' ]; then read -r line <'{directory}/gate'; fi",
                     epilog=EPILOG.format(top=directory, uid=ALICE)) as found:
        yield found


def run_hook(node: LendingNode, which: str, job: int) -> None:
    subprocess.run([HOOK, which, node.directory], env={"SLURM_JOB_ID": str(job), "SLURM_JOB_UID": "0"}, check=True,
                   timeout=GUARD_S)


def seen_by(said: str) -> tuple[set[int], set[int]]:
    """Where a job may run, and where workers could when it started."""
    lines = [line.split() for line in said.splitlines()]
    assert lines and lines[-1] == ["seen"], said
    own = {cpu for words in lines if words[0] == "job" for cpu in core_list(words[1])}
    assert own, said
    return own, {cpu for words in lines if words[0] == "worker" for cpu in core_list(words[2])}


def jobs_at_random(node: LendingNode, chance: random.Random) -> tuple[list[int], int]:
    """Jobs that come and go for a while; their numbers, and how many found workers when they were submitted."""
    jobs: list[int] = []
    met = 0
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        met += node.workers() > 0
        jobs.append(node.slurm.submit(
            f'#!/bin/bash\n{WHERE}\nwhere "{node.directory}"\nsleep {chance.choice((0, 0.1, 0.5, 1))}\n',
            "--ntasks=1", f"--cpus-per-task={chance.choice((1, 1, 2))}"))
        pause = time.monotonic() + chance.choice((0, 0.3, 1, 2))
        wait_until(lambda pause=pause: time.monotonic() >= pause and node.slurm.run("squeue", "-h").count("\n") < 3,
                   "it is time for the next one")
    for job in jobs:
        assert node.slurm.ended(job) == "COMPLETED", node.slurm.said()
    return jobs, met


def check(node: LendingNode, jobs: list[int]) -> None:
    told = node.site.agent.said()
    for job in jobs:
        own, workers = seen_by(node.slurm.output(job))
        assert not own & workers, f"job {job} has {own}, workers {workers}:\n{node.slurm.output(job)}\n{told}"
        assert f"job={job} is about to start" in told, "the agent was told, and answered itself"


def test_no_worker_is_on_a_core_of_a_job_that_starts_whenever_jobs_come_and_go(node):
    with node.borrowing():
        jobs, met = jobs_at_random(node, random.Random(SEED))
        check(node, jobs)
        assert met, "there was something to take back"


def test_an_epilog_that_kills_all_that_a_user_runs_costs_him_no_answer(node):
    ends = node.top / "ends"
    with node.borrowing() as rank:
        (node.top / "rank").write_text(str(os.getsid(rank.pid)))
        try:
            jobs, met = jobs_at_random(node, random.Random(SEED + 1))
        finally:
            (node.top / "rank").unlink()
        check(node, jobs)
        assert met and ends.read_text().count("ended") >= len(jobs) - 1


def drained(node: LendingNode) -> bool:
    return node.slurm.run("sinfo", "-h", "-N", "-o", "%T").strip() not in ("idle", "completing", "mixed", "allocated")


def test_a_job_that_starts_when_the_agent_is_killed_finds_no_worker(node):
    with node.borrowing():
        node.site.agent.kill()
        try:
            job = node.job()
            assert node.end(job) == "workers 0\n" and not drained(node)
        finally:
            node.site.agent.start()
        wait_until(node.workers, "its cores are lent again")


def test_an_agent_that_was_not_there_for_a_job_s_prolog_lends_nothing_before_the_job_has_its_group(node):
    with node.borrowing():
        admitted = node.site.agent.said().count("is admitted as")
        node.site.agent.kill()
        run_hook(node, "prolog", 98)
        assert node.workers() == 0
        node.site.agent.start()
        wait_until(lambda: node.site.agent.said().count("is admitted as") > admitted, "it has registered")
        assert " lends nothing, " in node.site.agent.said().rpartition("job=98 has begun before this agent")[2]
        assert node.site.free() == 0 and node.workers() == 0
        run_hook(node, "epilog", 98)
        wait_until(node.workers, "its cores are lent again")


def test_an_agent_that_is_killed_and_begins_anew_during_a_prolog_leaves_the_job_its_cores(node):
    gate = node.top / "gate"
    os.mkfifo(gate)
    with node.borrowing():
        try:
            job = node.job()
            # The Prolog opens it once it runs, and goes on when it is closed.
            fd = os.open(gate, os.O_WRONLY)
            node.site.agent.kill()
            node.site.agent.start()
            wait_until(node.workers, "it knows of no job, and lends")
            os.close(fd)
        finally:
            gate.unlink()
        assert node.end(job) == "workers 0\n" and not drained(node)


def test_a_site_whose_epilog_kills_what_a_user_runs_is_told_of_it_and_of_the_pool(node):
    said = node.slurm.run(sys.executable, "-m", "rfaas_mpi.cli", "slurm", "install", PYTHONPATH=str(HOOK.parents[2]))
    assert f"{node.top}/epilog:" in said and "xargs -r kill" in said
    assert "RFAAS_WORKER_IDENTITY=pool" in said and "RFAAS_WORKER_POOL=" in said

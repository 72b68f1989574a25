"""Jobs whose owners lend what they leave idle: who says so, and what is lent then."""

from __future__ import annotations

import os
import re

import faults
import pytest
import slurm_cluster
from cluster import tell, wait_until
from lending_node import BORROWS, LendingNode
from site_of_users import ALICE
from test_apps import needs_two_cores

from rfaas_mpi.agent.classes import CoreClass
from rfaas_mpi.agent.detector import Detector, Job, Observed, Policy
from rfaas_mpi.agent.kernel_files import Topology
from rfaas_mpi.slurm import facts

OWNERS = frozenset((CoreClass.UNUSED, CoreClass.IDLE))


# --- what Slurm says -----------------------------------------------------------

def test_the_word_lend_in_a_job_s_comment_says_so_for_all_of_its_nodes():
    shown = "7|n[1-2]|lend\n8|n1|\n9|n1|project=x; lend\n10|n2|lender\n11||lend\n12|n3|(null)\n"
    assert facts.lending(shown) == {"n1": ("7", "9"), "n2": ("7",)}
    assert facts.lending("") == {}


@pytest.mark.parametrize("shown", ["7|n1|x\n8|n1|lend\n8|n1|\n", "8|n1|\n7|n1|x\n8|n1|lend\n",
                                   "8|n1|other\n8|n2|lend\n"])
def test_nobody_says_it_of_another_one_s_job_by_a_comment_of_several_lines(shown):
    assert facts.lending(shown) == {}


# --- what is lent --------------------------------------------------------------

def reports(policy: Policy) -> list[tuple[int, ...]]:
    """What is spare of a job with CPUs 0 and 1 whose tasks keep to 0, and of one with 2 and 3 that keep to 2."""
    topology = Topology(cpus=(0, 1, 2, 3), memory_bytes=1 << 30)
    jobs = tuple(Job(name, 1000, frozenset(cpus), frozenset(cpus[:1]), 1 << 20)
                 for name, cpus in (("n1/7", (0, 1)), ("8", (2, 3))))
    detector = Detector(policy)
    found = []
    for now in (0.0, 2.0, 4.0):
        detector.observe(Observed(topology, jobs, masks_at=now))
        found.append(detector.report(now).spare)
    return found


@pytest.mark.parametrize("policy,spare", [
    (Policy(), ()), (Policy(opted_in={"7": OWNERS}), (1,)), (Policy(opted_in={"8": OWNERS}), (3,)),
    (Policy(opted_in={"n1/7": OWNERS, "n2/8": OWNERS}), (1,)), (Policy(by_default=OWNERS), (1, 3))])
def test_what_a_job_leaves_is_lent_where_its_owner_or_the_site_says_so(policy, spare):
    assert reports(policy)[-1] == spare


# --- with Slurm ----------------------------------------------------------------

# Keeps to its first core until it is told to use both.
JOB = """#!/bin/bash
taskset -cp 0 $$ >/dev/null
until [ -e "{top}/both" ]; do sleep 0.05; done
taskset -cp 0,1 $$ >/dev/null
until [ -e "{top}/end" ]; do sleep 0.05; done
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes control groups: needs root")
@needs_two_cores
def test_what_a_job_with_comment_lend_leaves_idle_is_lent_until_it_wants_it(tmp_path):
    assert not (reason := slurm_cluster.why_not()), reason
    tmp_path.chmod(0o755)
    # Memory that is nobody's can't be told where jobs have no limit.
    node = LendingNode(tmp_path, words=["--node", "n1"],
                       settings={"SelectTypeParameters": "CR_Core_Memory", "DefMemPerCPU": 100})
    conf = node.slurm.directory / "cgroup.conf"
    conf.write_text(conf.read_text().replace("ConstrainRAMSpace=no", "ConstrainRAMSpace=yes"))
    environment = node.slurm.environment
    node.site.manager.add("--slurm", SLURM_CONF=environment["SLURM_CONF"], PATH=environment["PATH"])
    top = node.slurm.directory
    with node.slurm:
        try:
            job = node.slurm.submit(JOB.format(top=top), "--ntasks=1", "--cpus-per-task=2", "--comment=lend")
            node.slurm.wait_until(lambda: node.slurm.state(job) == "RUNNING", "the job has both cores")
            node.site.start()         # returns when there is something to lend
            assert f"jobs that lend what they leave idle: {job}" in node.site.agent.said()
            with node.site.running(ALICE, BORROWS) as rank:
                assert faults.line(rank) == "began"
                (worker, *_) = wait_until(node.members, "a worker runs")
                assert os.sched_getaffinity(worker) == {1}
                (top / "both").touch()
                wait_until(lambda: not node.workers(), "the owner has it back")
                assert re.search(r"seats=\(0,\) stop: revoked", node.site.agent.said())
                tell(rank, "end")
                assert faults.line(rank) == "right"
            (top / "end").touch()
            assert node.slurm.ended(job) == "COMPLETED"
        finally:
            node.site.close()

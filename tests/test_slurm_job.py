"""An app in a user's own job of two nodes: ranks on some cores, workers on the others, its work done there, nothing left.

How much sooner such a job is done, `benchmarks/slurm_job.py` says.
"""

from __future__ import annotations

import json
import sys

import pytest
import slurm_cluster
import slurm_nodes
from test_apps import needs_two_cores
from test_slurm_faults import REPOSITORY, RFAAS, nothing_left

pytestmark = [needs_two_cores,
              pytest.mark.skipif(bool(slurm_nodes.why_not()), reason=f"no virtual nodes: {slurm_nodes.why_not()}")]

# apps/transport.py, whose batches are counted by where they were followed.
PROGRAM = r"""
import collections, os, sys
sys.path.insert(0, "REPOSITORY/apps")
import common, transport
import rfaas_mpi as rf
from mpi4py import MPI
UNUSED = transport.TALLIES - 1

@rf.kernel
def families(params, key, low, first, out):
    transport.families(params, key, low, first, out=out)
    out[:, UNUSED] = 1000 * int(os.uname().nodename.rpartition("n")[2]) + min(os.sched_getaffinity(0))

class Counted(transport.Transport):
    def __init__(self, *words):
        super().__init__(*words)
        self.kernel, self.counted = families, collections.Counter()

    def check(self, turn):
        self.counted.update(divmod(int(mark), 1000) for mark in self.tallies[:, UNUSED])
        self.tallies[:, UNUSED] = 0
        return super().check(turn)

    def more(self):
        counted = sum(MPI.COMM_WORLD.allgather(self.counted), collections.Counter())
        return "", {"counted": {"n%d core %d" % place: count for place, count in counted.items()}}

sys.exit(common.main(Counted, ""))
""".replace("REPOSITORY", str(REPOSITORY))
BATCHES, ROUNDS = 64, 2
ARGUMENTS = (f"--kernel numpy --batches {BATCHES} --histories 20 --generations 6 --skip 2 --sigma 0.1 --rounds {ROUNDS} "
             "--mode split --mode remote --workers 1")


def test_an_app_of_two_ranks_has_its_work_done_by_the_workers_of_both_nodes_and_leaves_nothing():
    with slurm_cluster.cluster(2, 2, apart=True, confined=True) as slurm:
        (slurm.directory / "program.py").write_text(PROGRAM)
        report = slurm.directory / "report.json"
        said = slurm.finish(
            f"#!/bin/bash\nexport PYTHONPATH='{REPOSITORY}' OMP_NUM_THREADS=1\n"
            f"exec '{RFAAS}' slurm run --mpi pmi2 -- '{sys.executable}' program.py {ARGUMENTS} --json '{report}'\n",
            "--nodes=2", "--ntasks=2", "--exclusive")
        assert {line for line in said.splitlines() if line.startswith("rfaas:")} == {
            f"rfaas: {node}: ranks on 0; lent: 1" for node in slurm.names}, said
        found = json.loads(report.read_text())
        runs = 2 * (ROUNDS + 1)
        assert found["verdict"]["correct"] and found["verdict"]["runs"] == runs, said
        assert found["config"]["ranks"] == 2 and found["config"]["cores"] == [0, 0], said
        assert found["config"]["worker_cores"] == [[1], [1]], said
        # Each batch of each run, once: half of the runs are all the workers' own.
        counted = dict.fromkeys([f"n{node} core {core}" for node in (1, 2) for core in (0, 1)], 0) | found["counted"]
        assert len(counted) == 4 and sum(counted.values()) == runs * BATCHES, counted
        workers = [counted[f"n{node} core 1"] for node in (1, 2)]
        assert sum(workers) >= runs / 2 * BATCHES and all(workers), counted
        nothing_left(slurm)

"""Each app gives the same answer, bit by bit, whatever happens to its workers or the manager; the time lost is told."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_cli import rfaas

from rfaas_mpi import kernels
from rfaas_mpi.bench import faults
from rfaas_mpi.bench.cluster import Cluster
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.rounds import bits_of
from rfaas_mpi.cli import apps

CORES = os.sched_getaffinity(0)
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="one core for the rank, one to borrow")

# All on workers: whatever happens to one, happens to the whole of the work.
PLAN = dataclasses.replace(faults.QUICK, where="workers")
APPS = {name: app.path for name, app in apps.find().items() if app.common}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with faults.world() as (cluster, _):
        yield cluster
    # Functions that were submitted are remembered, and with them the libraries that they call.
    kernels._objects.clear()


@pytest.mark.filterwarnings("ignore:kernels now run on the rank:RuntimeWarning")
@pytest.mark.parametrize("name", APPS)
def test_the_answer_survives_each_fault_and_the_time_lost_is_told(cluster, name):
    found = faults.disturbed(APPS[name], cluster, PLAN)
    cluster.rest()
    assert set(found["faults"]) == set(faults.KINDS) and found["verdict"]
    for kind, one in found["faults"].items():
        assert one["right"] and not one["wrong"], (kind, one["wrong"])
        assert one["faults"] >= 1 and one["rounds"] >= len(range(PLAN.rounds + 1)), kind
        assert one["undisturbed_s"] > 0 and one["disturbed_s"] > 0, kind
        assert math.isclose(one["lost_s"], one["disturbed_s"] - one["undisturbed_s"], abs_tol=1e-9), kind
        assert one["faults_in_mid_run"] + one["faults_just_before_a_round"] <= one["faults"], kind


def test_the_command_answers_in_json(tmp_path):
    file = tmp_path / "faults.json"
    done = rfaas("bench", "faults", "--quick", "--app", "matmul", "--of", "killed", "--json", "--out", str(file),
                 # This process may be the rank of the tests beside it, on one core.
                 preexec_fn=lambda: os.sched_setaffinity(0, CORES))
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data == json.loads(file.read_text()) and data["right"] is True
    one = data["apps"]["matmul"]["faults"]["killed"]
    assert one["right"] and one["same_bits"] and one["faults"] >= 2 and "lost_s" in one


def test_an_app_that_there_isn_t_is_a_wrong_command_line():
    done = rfaas("bench", "faults", "--app", "nosuch")
    assert done.returncode == 2 and "no app 'nosuch'" in done.stderr


# --- the judge itself --------------------------------------------------------------------------

FORGETFUL = '''
"""An app whose results depend on who computes them."""
import os

import common
import numpy as np

import rfaas_mpi as rf


@rf.kernel
def who(x, out):
    out[...] = {what}


class Forgetful(common.App):
    small = ("--scale", "2")

    @staticmethod
    def arguments(parser):
        parser.add_argument("--scale", type=float)

    def __init__(self, args, rank, ranks, executor):
        self.executor, self.x, self.out = executor, executor.full(8, args.scale), executor.empty(8)

    def prepare(self, turn):
        self.out.fill(np.nan)

    def split(self, where):
        return self.executor.Split_init(who, self.x, self.out, grain=1, where=where)

    def part(self, index, of):
        raise NotImplementedError

    def check(self, turn):
        return "a result is missing" if np.isnan(self.out).any() else ""

    def work(self):
        return 1.0, "thing"

    def told(self):
        return "nothing is missing"
'''


def forgetful(directory: Path, what: str) -> Path:
    (directory / "common.py").write_text((apps.apps_directory() / "common.py").read_text())
    path = directory / "forgetful.py"
    path.write_text(FORGETFUL.replace("{what}", what))
    return path


def test_other_bits_after_a_fault_are_found_even_where_the_app_s_own_verdict_is_content(cluster, tmp_path):
    found = faults.disturbed(forgetful(tmp_path, "x * os.getpid()"), cluster, PLAN, ["killed"])["faults"]["killed"]
    cluster.rest()
    assert not found["right"] and "other bits than without faults" in found["wrong"][0]


def test_an_app_that_is_wrong_without_any_fault_is_an_error(cluster, tmp_path):
    with pytest.raises(BenchError, match="without any fault: round 0: a result is missing"):
        faults.disturbed(forgetful(tmp_path, "np.nan"), cluster, PLAN, ["killed"])
    cluster.rest()


def test_results_are_compared_by_their_bits():
    class Some:
        out = (np.zeros(2), np.zeros(3))

    before = bits_of(Some())
    Some.out[1][0] = -0.0
    assert before is not None and bits_of(Some()) != before
    assert bits_of(object()) is None

"""The benchmark of fairness lets ranks share workers, and does its sums right; no test here judges a time."""

from __future__ import annotations

import os

import pytest

from rfaas_mpi.bench import fairness
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to lend")
def test_ranks_that_share_workers_are_all_served():
    found = fairness.measure_fairness(Options(quick=True, of=("mixed",)), windows=20, window_s=1.0)
    [demand] = found["demands"].values()
    assert len(demand["served_ms"]) == fairness.RANKS and all(sum(mine) > 0 for mine in demand["served_ms"])
    assert sum(demand["share_percent"]) == pytest.approx(100, abs=0.1)
    assert set(found["figures"]) == {"mixed_spread_percent", "mixed_same_worker_spread_percent",
                                     "mixed_window_spread_percent"}


def test_spreads_are_of_all_ranks_of_those_at_one_worker_and_of_windows():
    found = fairness.spreads([[10, 10], [20, 20], [10, 12], [19, 19]], [[0, 2], [1, 3]])
    assert found["spread"]["p50"] == pytest.approx(100 * 20 / 30, abs=0.01)
    assert found["same_worker_spread"]["p50"] == pytest.approx(100 * 2 / 21, abs=0.01)
    assert found["spread"]["aa"]["p50"] == pytest.approx(100 * 2 / 11, abs=0.01)
    assert found["window_spread"]["count"] == 2 and found["window_spread"]["aa"]["count"] == 4


def test_a_window_without_any_kernel_is_no_figure():
    with pytest.raises(BenchError, match="no kernel"):
        fairness.spreads([[1, 0], [1, 0]], [[0, 1]])


def test_the_command_knows_what_can_be_measured():
    from rfaas_mpi.cli.app import app
    [of] = [option for option in app.commands["bench"].commands["fairness"].params if option.name == "of"]
    assert list(of.type.choices) == list(fairness.DEMANDS)

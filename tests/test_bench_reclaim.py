"""The benchmark of reclaim takes cores from real workers, and from all of them; no test here judges a time."""

from __future__ import annotations

import os

import pytest

from rfaas_mpi.bench import reclaim
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core to lend and one to keep")
def test_each_kind_of_worker_is_taken_back_with_and_without_grace():
    found = reclaim.measure_reclaim(Options(runs=1, quick=True), reclaims=20)
    for kind in ("spin", "threads", "memory"):
        for grace in ("", "_grace"):
            told, core, memory = (found["figures"][f"{kind}{grace}_{what}_us"]
                                  for what in ("rank_told", "core_free", "memory_free"))
            assert told["count"] == core["count"] == memory["count"] == 2
            assert core["p50"] <= memory["p50"] and told["p50"] > 0
    assert found["bare_memory_free_us"] > 0
    assert found["pinning"]["rank"] not in found["pinning"]["lent"]


def test_only_what_was_asked_for_is_measured():
    found = reclaim.measure_reclaim(Options(runs=1, quick=True, of=("spin",)), reclaims=20)
    assert set(found["figures"]) == {"spin_rank_told_us", "spin_core_free_us", "spin_memory_free_us"}


def test_the_command_knows_what_can_be_measured():
    from rfaas_mpi.cli.app import app
    [of] = [option for option in app.commands["bench"].commands["reclaim"].params if option.name == "of"]
    assert list(of.type.choices) == list(reclaim.KINDS)


def test_a_rank_that_is_never_told_is_an_error_and_no_figure(monkeypatch):
    monkeypatch.setattr(reclaim, "BEGIN_S", 0.01)
    with pytest.raises(BenchError, match="was not told"):
        reclaim._Heard().wait()

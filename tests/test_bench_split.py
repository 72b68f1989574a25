"""`rfaas bench split` has every figure, and gives none for a wrong answer."""

from __future__ import annotations

import gc

import pytest

from rfaas_mpi.bench import kernels, split
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options

QUICK = Options(runs=1, quick=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(split, "SIZES_MS", (0.3,))
    yield
    # The kernel was loaded here, too, and is remembered.
    kernels.native_iterate.cache_clear()
    gc.collect()


def test_splits_have_a_figure_for_each_way_and_an_a_a_beside_what_is_compared():
    figures = split.measure_split(QUICK)["figures"]
    for kernel in ("native", "numpy"):
        for name in ("here_over_bare_us", "divided_over_by_hand_us", "once_over_divided_us"):
            assert "aa" in figures[f"{kernel}_0.3ms_{name}"]
        assert figures[f"{kernel}_0.3ms_bare_us"]["p50"] > 0
        assert figures[f"{kernel}_0.3ms_predicted_over_taken"]["count"] > 0


def test_a_split_that_gives_another_answer_gets_no_figure(monkeypatch):
    ran = split.Executor.Split

    def lies(self, kernel, inputs, out, **how):
        ran(self, kernel, inputs, out, **how)
        out[7] += 1.0
        return out

    monkeypatch.setattr(split.Executor, "Split", lies)
    with pytest.raises(BenchError, match="another result"):
        split.measure_split(QUICK)

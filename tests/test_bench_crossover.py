"""The crossover's benchmark: each way's answer is right, and a decision is judged by what was measured beside it."""

from __future__ import annotations

import pytest

from rfaas_mpi.bench import crossover, report, suite
from rfaas_mpi.bench.crossover import summary
from rfaas_mpi.bench.stage import Options

WAYS = ("here", "quarter", "half", "three_quarters", "there", "split", "together", "here_again",
        "call_here", "call_there", "offload", "call_here_again")


def times(**medians: float) -> dict[str, list[float]]:
    every = dict.fromkeys(WAYS, 1.0) | medians
    return {name: [0.9 * value, value, 1.1 * value] for name, value in every.items()}


def test_what_divided_work_gains_has_to_be_taken():
    found = summary(times(half=0.5, split=0.52), [0.5], True, False)
    assert found["split"]["best"] == "half" and found["split"]["right"] and found["split"]["should"] is True
    assert found["split"]["regret"] == pytest.approx(0.04) and found["split"]["predicted"] == pytest.approx(0.5 / 0.52)
    assert not summary(times(half=0.5, split=1.0), [], False, False)["split"]["right"]
    assert summary(times(half=0.5, split=1.0), [], False, False)["split"]["regret"] == pytest.approx(1.0)
    # Not decided yet is no wrong decision.
    assert summary(times(half=0.5), [], None, False)["split"]["right"]


def test_what_divided_work_loses_has_to_be_refused():
    slower = {"quarter": 2.0, "half": 2.0, "three_quarters": 2.0, "there": 3.0, "call_there": 3.0}
    found = summary(times(**slower), [], False, False)
    assert found["split"]["right"] and found["split"]["should"] is False and found["offload"]["right"]
    assert found["split"]["best"] == "here" and found["split"]["regret"] == 0.0
    assert not summary(times(**slower), [], True, True)["split"]["right"]
    assert not summary(times(**slower), [], True, True)["offload"]["right"]


def test_cells_that_may_be_run_together_stand_beside_one_call():
    slower = {"quarter": 1.5, "half": 1.5, "three_quarters": 1.5, "there": 3.0}
    found = summary(times(here=3.0, call_here=1.0, together=1.2, **slower), [], False, False, False)["together"]
    assert found["best"] == "call_here" and found["regret"] == pytest.approx(0.2) and found["right"]
    assert not summary(times(half=0.5), [], True, False, False)["together"]["right"]


def test_what_is_within_the_a_a_is_no_wrong_decision():
    for decided in (True, False, None):
        assert summary(times(half=0.99), [], decided, False)["split"]["right"]
        assert summary(times(half=0.9, here_again=1.2), [], decided, False)["split"]["right"]
    assert summary(times(half=0.99), [], True, False)["split"]["should"] is None


def test_each_way_gives_the_right_answer(monkeypatch):
    monkeypatch.setattr(crossover, "QUICK_ROW_BYTES", (16,))
    monkeypatch.setattr(crossover, "QUICK_WORK_S", (2e-3,))
    data = suite.measure("crossover", Options(transport="tcp", quick=True))
    assert data["of"] == len(data["points"]) == 1
    for point in data["points"]:
        assert set(point["times_s"]) == set(WAYS) == set(point["median_s"])
        assert all(len(each) == point["rounds"] and min(each) > 0.0 for each in point["times_s"].values())
        for who in ("split", "together", "offload"):
            assert point[who]["best"] in WAYS and point["why"][who]
            assert point[who]["regret"] > -1.0
    assert any("best way" in line for line in report.as_text(data))

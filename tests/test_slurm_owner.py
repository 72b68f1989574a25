"""What owners pay for what their node lends: what its report makes of the jobs' times."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from types import ModuleType

import pytest
from test_apps import needs_two_cores
from test_apps_table import load


@pytest.fixture(scope="module")
def owner() -> ModuleType:
    return load("benchmarks/slurm_owner.py", "slurm_owner_report")


def made(owner: ModuleType, *, lent: float = 1.0, again: float = 1.0, later_s: float = 0.0, noise: float = 0.001,
         count: int = 40) -> list[dict[str, dict[str, float]]]:
    """Rounds on a machine that gets slower and slower, twice as slow in the end."""
    chance, rounds = random.Random(1), []
    for number in range(count):
        slower = 1 + number / count
        factors = {"none": 1.0, "again": again, "lent": lent, "stopped": lent}
        rounds.append({way: {
            **{what: slower * factor * (1 + chance.uniform(-noise, noise)) for what in owner.RATIOS},
            **dict.fromkeys(("queue_s", *owner.DIFFERENCES), slower * 0.1)} for way, factor in factors.items()})
        rounds[-1]["stopped"]["start_s"] += later_s + chance.uniform(-noise, noise)
    return rounds


def test_what_an_owner_pays_is_told_round_by_round_from_what_the_machine_did(owner):
    found = owner.beside_none(made(owner, lent=1.01), "lent", "work_s")
    assert 1.009 < found.low < found.value < found.high < 1.011
    found = owner.beside_none(made(owner, later_s=0.2), "stopped", "start_s")
    assert 199 < found.low < found.value < found.high < 201


def test_where_a_median_lies_is_what_order_statistics_say(owner):
    # Of 30 throws of a coin, 9 or fewer are heads in 2.14 of 100 times, 10 or fewer in 4.94.
    assert owner.between([float(number) for number in range(1, 31)]) == (10.0, 21.0)


@pytest.mark.parametrize("lent, again, noise, expected", [
    (1.01, 1.0, 0.001, "reached"), (1.03, 1.0, 0.001, "missed"), (1.03, 1.015, 0.001, "reached"),
    (1.01, 0.985, 0.001, "missed"), (1.02, 1.0, 0.1, "not resolved here")])
def test_it_is_said_whether_more_is_paid_than_allowed_beyond_what_two_alike_differ_by(owner, lent, again, noise,
                                                                                      expected):
    found = owner.summary(made(owner, lent=lent, again=again, noise=noise))
    assert found["work, lent: high <= A/A + 0.02"] == expected


@pytest.mark.parametrize("later_s, noise, expected", [(0.25, 0.01, "reached"), (0.35, 0.01, "missed"),
                                                      (0.3, 0.1, "not resolved here")])
def test_it_is_said_whether_a_job_whose_agent_was_stopped_begins_soon_enough(owner, later_s, noise, expected):
    found = owner.summary(made(owner, later_s=later_s, noise=noise))
    assert found["start, stopped: high <= 300 ms later"] == expected


def test_the_report_is_of_all_rounds_that_are_kept(owner, tmp_path, monkeypatch, capsys):
    rounds = made(owner)
    (tmp_path / "kept.json").write_text(json.dumps({"rounds": rounds}))
    monkeypatch.setattr(sys, "argv", ["slurm_owner.py", "--report", str(tmp_path / "kept.json")])
    owner.main()
    assert json.loads(capsys.readouterr().out) == owner.summary(rounds)


@needs_two_cores
def test_a_job_s_work_says_all_that_is_compared(owner):
    said, allowed = subprocess.run(
        [sys.executable, "-W", "error", "-S", "-c", owner.WORK.replace("range(80)", "range(2)"), "0"], check=True,
        capture_output=True, text=True, timeout=60).stdout.splitlines()
    assert {*json.loads(said), "start_s"} == {*owner.RATIOS, *owner.DIFFERENCES} and allowed

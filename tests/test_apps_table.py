"""All apps in one table, and their page: no figure where a verdict is wrong, and no difference that can't be told."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import netns
import pytest
from test_apps import needs_two_cores

from rfaas_mpi.cli import apps

REPOSITORY = Path(__file__).resolve().parent.parent


def load(file: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module      # which dataclasses look into
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load("benchmarks/apps.py", "tables")


@pytest.fixture(scope="module")
def common() -> ModuleType:
    return load("apps/common.py", "common_of_table")


@needs_two_cores
@pytest.mark.parametrize("over", ["shm", "tcp"])
def test_the_table_has_each_mode_of_an_app_and_its_verdict(tables, capsys, tmp_path, over):
    if over == "tcp" and (reason := netns.why_not()):
        pytest.skip(reason)
    assert tables.main(["run", "--over", over, "--app", "matmul", "--small", "--rounds", "1",
                        "--out", str(tmp_path), "--machine", "test"]) == 0
    head, line = (text.split() for text in capsys.readouterr().out.splitlines() if text.startswith(("app ", "matmul ")))
    assert head[1:6] == ["local", "remote", "split", "mpi", "bound"]
    assert line[0] == "matmul" and line[-1] == "right" and all(float(cell) > 0 for cell in line[1:6])
    kept, = tmp_path.iterdir()
    assert kept.name == f"app-matmul{'' if over == 'shm' else '-tcp'}-test.json"
    report = json.loads(kept.read_text())
    assert tables.over_of(report) == over and len(report["config"]["worker_cores"][0]) == 1
    page = tables.render([report], [kept.name], None)
    assert tables.OVER[over] in page and "--n 200" in page and f"[matmul]({kept.name})" in page


def test_a_wrong_verdict_has_no_figures_and_is_the_status(tables, capsys, monkeypatch, tmp_path):
    liar = tmp_path / "liar.py"
    liar.write_text("print('verdict  WRONG split, round 1: 3 of 4 are wrong')\nraise SystemExit(1)\n")
    app = apps.App("liar", "lies", "", liar, common=True, missing=())
    monkeypatch.setattr(tables.apps, "find", lambda: {"liar": app})
    assert tables.main(["run", "--rounds", "1"]) == 1
    said = capsys.readouterr()
    assert "3 of 4 are wrong" in said.err and "wrong, or failed: liar" in said.err
    line, = (text for text in said.out.splitlines() if text.startswith("liar"))
    assert line.split() == ["liar", "WRONG"]


def test_an_app_that_is_not_there_is_said_to(tables, capsys):
    assert tables.main(["run", "--app", "nosuch"]) == 1
    assert "there is no app nosuch" in capsys.readouterr().err


def report_of(name: str, of_bound: float, again: tuple[float, float]) -> dict[str, Any]:
    def around(value: float) -> dict[str, Any]:
        return {"median": value, "median_between": [value, value], "quartiles": [value, value], "count": 30}

    ratios = {"speedup_split": around(1.9), "split_of_bound": around(of_bound), "split_over_mpi": around(1.001),
              "predicted_of_split": around(1.2), "again": {**around(1.0), "median_between": list(again)}}
    return {"config": {"app": name, "rounds": 30, "worker_cores": [[1]], "n": 5, "mode": ["local"],
                       "executor": "<Executor transport=shm workers=[1]>"},
            "median_s": {"local": 2.0, "split": 1.0}, "ratios": ratios, "disturbed": False,
            "environment": {"cpu": "a processor", "cores_online": 2, "virtual": True, "kernel": "6", "python": "3",
                            "when": "2026-01-01T00:00:00", "load_average": [0.0, 0.0, 0.0]}}


@pytest.mark.parametrize("of_bound, again, said", [
    (0.98, (0.999, 1.001), "reached"), (0.96, (0.98, 1.01), "not resolved here"), (0.96, (0.995, 1.005), "**missed**")])
def test_what_was_wanted_is_reached_missed_or_not_resolved(tables, of_bound, again, said):
    page = tables.render([report_of("matmul", of_bound, again)], ["m.json"], "apps.png")
    row, = (line for line in page.splitlines() if line.startswith("| matmul"))
    assert f"| ≥ 97 % | {said} |" in row
    assert "120.0 % (120.0 to 120.0), **missed**" in row
    assert ("1.001x (1.001 to 1.001), not resolved here" in row) == (max(abs(edge - 1) for edge in again) >= 0.001)
    assert "--n 5" in page and "![" in page


@pytest.mark.parametrize("name", ["matmul", "stencil"])
def test_a_prediction_that_is_too_far_off_is_said_to_be_of_any_app(tables, name):
    page = tables.render([report_of(name, 0.98, (0.999, 1.001))], ["one.json"], None)
    assert "120.0 % (120.0 to 120.0), **missed**" in page


def test_only_what_is_between_the_marks_is_replaced(tables):
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    assert tables.insert(page, f"{tables.BEGIN}\nnew\n{tables.END}") == page.replace("old", "new")
    with pytest.raises(ValueError, match="no <!-- apps"):
        tables.insert("no marks", "")
    assert tables.BEGIN in (REPOSITORY / "docs" / "benchmarks.md").read_text()


# --- figures -------------------------------------------------------------------------------

def test_the_median_lies_where_order_statistics_say(common):
    found = common.summary(range(30, 0, -1))
    # Of 30, the 10th and the 21st: Conover, Practical Nonparametric Statistics, section 3.2.
    assert found == {"median": 15.5, "median_between": [10, 21], "quartiles": [8.25, 22.75], "count": 30}
    assert common.summary([3.0])["median_between"] == [3.0, 3.0]
    assert common.summary([]) is None


def test_ratios_are_of_the_same_round(common):
    seconds = {"local": [2.0, 4.0, 6.0], "split": [1.0, 4.0, 2.0], "split again": [1.0, 2.0, 4.0],
               "bound": [1.0, 2.0, 2.0]}
    found = common.ratios(seconds, [None, 2.0, 3.0])
    assert {name: ratio["median"] for name, ratio in found.items()} == {
        "speedup_split": 2.0, "speedup_bound": 2.0, "split_of_bound": 1.0, "again": 1.0, "predicted_of_split": 1.0}
    assert found["predicted_of_split"]["count"] == 2

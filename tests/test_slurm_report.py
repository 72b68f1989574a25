"""The report of what pilots and hooks cost under Slurm: its arithmetic, its page, and that it is made."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_apps import needs_two_cores
from test_apps_table import load

REPOSITORY = Path(__file__).resolve().parent.parent
# A part that takes some seconds, or all of them.
PARTS = ["preemption"] if "RFAAS_SOAK_SLURM_REPORT" not in os.environ else []


@pytest.fixture(scope="module")
def slurm() -> ModuleType:
    return load("benchmarks/slurm.py", "slurm_report")


def test_holes_are_those_of_their_seed_and_as_long_as_the_fit_says(slurm):
    def lengths(seed: str, count: int) -> list[float]:
        return list(itertools.islice(slurm.idle_times(seed, 10.0), count))
    assert lengths("1 n1", 50) == lengths("1 n1", 50) != lengths("2 n1", 50)
    assert statistics.median(lengths("1 n1", 20_000)) == pytest.approx(30.3, rel=0.05)
    long = sum(each > 100.0 for each in lengths("1 n2", 20_000)) / 20_000
    assert long == pytest.approx(0.148, abs=0.02)


@pytest.mark.parametrize("spans, others, seconds", [
    ([(0.0, 10.0)], [(2.0, 3.0), (8.0, 12.0)], 3.0), ([(0.0, 1.0)], [(1.0, 2.0)], 0.0), ([], [(0.0, 1.0)], 0.0),
    ([(0.0, 2.0), (4.0, 6.0)], [(1.0, 5.0)], 2.0)])
def test_time_counts_where_a_hole_is_lent(slurm, spans, others, seconds):
    assert slurm.overlap(spans, others) == seconds


def test_a_figure_says_whether_what_was_wanted_was_reached(slurm):
    assert slurm.row("", 9.0, "ms", 1, 10.0)["reached"] is True
    assert slurm.row("", 11.0, "ms", 1, 10.0)["reached"] is False
    assert slurm.row("", 0.96, "", 1, 0.95, least=True)["reached"] is True
    assert slurm.row("", 1.0, "s", 1)["reached"] is None
    rows = slurm.spread("x", [0.001] * 98 + [0.5] * 2, {99: 100.0})
    assert [(each["figure"], each["value"], each["reached"]) for each in rows] == [("x, p50", 1.0, None),
                                                                                   ("x, p99", 500.0, False)]


def report(slurm: ModuleType) -> dict[str, Any]:
    spans = {"owners": [[1.0, 2.0]], "lent": [[0.0, 1.0]], "borrowed": [[0.2, 0.9]], "reclaimed": [[0.8, 1.0]]}
    return {"environment": {"cpu": "one", "cores_online": 2, "virtual": False, "kernel": "6", "when": "2026-01-02T"},
            "seed": 1, "quick": False,
            "parts": {"leave": {"rows": [slurm.row("x", 3.0, "ms", 9, 2.0, between=[1, 4])],
                                "load_average": [0.1, 0.2]},
                      "owners": {"rows": [slurm.row("y", 1.0, "", 30)]}},
            "timeline": {"seconds": 3.0, "nodes": {"n1": spans, "n2": {what: [] for what in spans}}}}


def test_the_page_has_each_figure_with_what_was_wanted_and_the_timeline(slurm, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report(slurm)))
    page, plot = tmp_path / "page.md", tmp_path / "plot.png"
    page.write_text(f"before\n{slurm.BEGIN} old {slurm.END}\nafter\n")
    assert slurm.main(["report", str(tmp_path / "report.json"), "--docs", str(page), "--plot", str(plot)]) == 0
    text = page.read_text()
    assert "| leave | x | 3 ms (1 to 4) | 9 | ≤ 2 | **missed** | 0.1 to 0.2 |" in text and "old" not in text
    assert "| owners | y | 1 | 30 |  |  |  |" in text and "](plot.png)" in text
    assert text.startswith("before\n") and text.endswith("after\n") and plot.read_bytes().startswith(b"\x89PNG")


def test_the_page_of_benchmarks_has_a_place_for_it(slurm):
    page = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert page.index(slurm.BEGIN) < page.index(slurm.END)


@needs_two_cores
@pytest.mark.skipif(os.geteuid() != 0, reason="has a Slurm with control groups: needs root")
def test_it_is_made_on_a_real_slurm_with_what_others_have_measured_beside_it(slurm, tmp_path, capsys):
    (tmp_path / "owners.json").write_text(json.dumps({"rows": [slurm.row("slower", 1.01, "x", 30, 1.02)]}))
    words = ["run", "--quick", "--out", tmp_path / "made.json", "--with", f"owners={tmp_path}/owners.json"]
    assert slurm.main([*map(str, words), *(word for part in PARTS for word in ("--part", part))]) == 0
    made = json.loads((tmp_path / "made.json").read_text())
    assert set(made["parts"]) == {*(PARTS or slurm.PARTS), "owners"}
    for name, part in made["parts"].items():
        assert part["rows"] and all(each["count"] >= 1 and each["value"] >= 0 or "between" in each
                                    for each in part["rows"]), (name, part)
    assert made["parts"]["preemption"]["borrower"] == "right"
    if not PARTS:
        assert set(made["timeline"]["nodes"]) == {"n1", "n2", "n3", "n4"}
        assert all(set(each) == set(slurm.COLOURS) for each in made["timeline"]["nodes"].values())
    assert "a job that preempts two pilots starts after" in capsys.readouterr().out

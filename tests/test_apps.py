"""The apps give the right answer, alone and with a borrowed core, and no rate for a wrong one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

APPS = Path(__file__).resolve().parent.parent / "apps"
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2,
                                     reason="one core for the rank, one to borrow")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, APPS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def blackscholes() -> ModuleType:
    return load("blackscholes")


def mpiexec(ranks: int, app: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = Path(sys.executable).with_name("mpiexec")
    command = [str(launcher) if launcher.exists() else "mpiexec", "-n", str(ranks), sys.executable,
               str(APPS / app), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100,
                          stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("count", [1, 63, 64, 16384, 16385, 1_000_003, 10_000_000])
def test_the_grid_covers_every_option_once_in_aligned_cells(blackscholes, count):
    cells = blackscholes.grid(count)
    assert cells[0].start == 0 and cells[-1].stop == count
    assert all(a.stop == b.start for a, b in zip(cells, cells[1:]))
    assert all(cell.start % blackscholes.ALIGN == 0 and cell.stop > cell.start for cell in cells)


def test_options_are_the_same_for_any_number_of_ranks(blackscholes):
    whole = blackscholes.make_options(0, 200_000, 7, np.empty)
    part = blackscholes.make_options(65_000, 70_000, 7, np.empty)
    for a, b in zip(whole, part):
        assert np.array_equal(a[65_000:135_000], b)


def test_options_are_distinct(blackscholes):
    options = blackscholes.make_options(0, 200_000, 7, np.empty)
    assert len(np.unique(options.spot)) == 200_000


def test_the_twin_gives_the_textbook_price(blackscholes):
    # Hull, Options, Futures, and Other Derivatives, example 15.6: 4.76 and 0.81.
    put = np.array([0, 1], "u1")
    columns = (np.full(2, value) for value in (42.0, 40.0, 0.1, 0.2, 0.5))
    prices = blackscholes.black_scholes_ref(blackscholes.Options(*columns, put))
    assert prices == pytest.approx([4.7594, 0.8086], abs=1e-4)


def test_one_wrong_price_among_many_is_found(blackscholes):
    options = blackscholes.make_options(0, 50_000, 7, np.empty)
    prices = blackscholes.black_scholes_ref(options)
    verdict = blackscholes.Verdict()
    verdict.check("right", options, prices)
    assert verdict.wrong == []
    prices[31_337] = np.nextafter(prices[31_337], np.inf)
    verdict.check("one bit off", options, prices)
    assert len(verdict.wrong) == 1
    prices[31_337] = np.nan
    fresh = blackscholes.Verdict()
    fresh.check("missing", options, prices)
    assert len(fresh.wrong) == 1


@needs_two_cores
def test_a_killed_worker_loses_no_price(tmp_path):
    report = tmp_path / "report.json"
    done = mpiexec(1, "blackscholes.py", "--options", 500_000, "--rounds", 2, "--bound", "--kill",
                   "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) == {"alone", "shared", "bound"}
    kill = data["kill"]
    assert kill["begin_ns"] < kill["killed_ns"] < kill["end_ns"]
    assert done.stdout.index("verdict") < done.stdout.index("rate")


def test_the_rank_alone_needs_no_worker():
    done = mpiexec(1, "blackscholes.py", "--options", 100_000, "--workers", 0, "--rounds", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "borrowed" not in done.stdout


def test_two_ranks_share_the_options(tmp_path):
    report = tmp_path / "report.json"
    done = mpiexec(2, "blackscholes.py", "--options", 100_001, "--workers", 0, "--rounds", 1,
                   "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["config"]["ranks"] == 2


@needs_two_cores
def test_the_planner_s_division_gives_the_same_prices(tmp_path):
    report = tmp_path / "report.json"
    done = mpiexec(1, "blackscholes.py", "--options", 500_000, "--rounds", 2, "--bound",
                   "--mode", "local", "--mode", "remote", "--mode", "split", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) == {"alone", "remote", "split", "bound"}
    assert len(data["predicted_s"]) == 2 and "cells" in data["plan"]


def test_ranks_alone_are_a_mode(tmp_path):
    report = tmp_path / "report.json"
    done = mpiexec(2, "blackscholes.py", "--options", 100_000, "--rounds", 1, "--mode", "mpi", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(report.read_text())["seconds"]) == {"mpi"}


LIES = {
    "a cell of zeros": lambda prices: np.put(prices, range(20_000, 30_000), 0.0),
    "two cells swapped": lambda prices: np.put(prices, range(40_000), np.roll(prices[:40_000], 20_000)),
    "an older result": lambda prices: np.put(prices, range(10_000), prices[:10_000] * 1.01),
    "one price off by a millionth": lambda prices: np.put(prices, [4_711], prices[4_711] * (1 + 1e-6)),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("later", [False, True], ids=["first run", "later run"])
def test_each_lie_of_a_worker_is_found(blackscholes, lie, later):
    options = blackscholes.make_options(0, 50_000, 7, np.empty)
    prices = blackscholes.black_scholes_ref(options)
    verdict = blackscholes.Verdict()
    if later:
        verdict.check("right", options, prices)
    LIES[lie](prices)
    verdict.check(lie, options, prices)
    assert len(verdict.wrong) == 1

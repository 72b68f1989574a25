"""The apps give the right answer, alone and with a borrowed core, and no rate for a wrong one."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import verdicts
from verdicts import first_failed

import rfaas_mpi as rf

APPS = Path(__file__).resolve().parent.parent / "apps"
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2,
                                     reason="one core for the rank, one to borrow")


@pytest.fixture(scope="module")
def blackscholes() -> Iterator[ModuleType]:
    with verdicts.loaded("blackscholes") as module:
        yield module


def pricing(blackscholes: ModuleType, executor: rf.Executor, **changed: object) -> object:
    args = {"options": 50_000, "seed": 7, "rounds": 3, "kernel": "native", "kill": False, **changed}
    return blackscholes.BlackScholes(argparse.Namespace(**args), 0, 1, executor)


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
    with rf.Executor(transport="inline") as executor:
        app = pricing(blackscholes, executor)
        app.local = lambda *columns, out: np.copyto(out, blackscholes.black_scholes_ref(blackscholes.Options(*columns)))
        app.prepare(0)
        app.prices[...] = blackscholes.black_scholes_ref(app.options)
        assert app.check(0) == ""
        app.prices[31_337] = np.nextafter(app.prices[31_337], np.inf)
        assert app.check(2).startswith("1 prices differ")
        app.prepare(1)
        app.prices[...] = blackscholes.black_scholes_ref(app.options)
        app.prices[31_337] = np.nan
        assert "nan" in app.check(1)


def test_calls_and_puts_are_held_against_parity(blackscholes, monkeypatch):
    """As where kernel and twin agree on what is wrong: both price calls too high."""
    right = blackscholes.black_scholes_ref

    def wrong(options):
        return right(options) * np.where(options.put, 1.0, 1.0 + 1e-9)

    monkeypatch.setattr(blackscholes, "black_scholes_ref", wrong)
    with rf.Executor(transport="inline") as executor:
        app = pricing(blackscholes, executor)
        app.local = lambda *_, out: np.copyto(out, app.prices)
        found = []
        for turn in (0, 1):
            app.prepare(turn)
            app.prices[...] = wrong(app.options)
            found.append(app.check(turn))
        assert found[0] == "" and found[1].startswith("calls and puts are off parity")


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_each_kernel_gives_the_twin_s_prices(blackscholes, kernel):
    with rf.Executor(transport="inline") as executor:
        app = pricing(blackscholes, executor, kernel=kernel)
        for turn in (0, 1):
            app.prepare(turn)
            app.part(0, 2)(), app.part(1, 2)()
            assert app.check(turn) == ""


@needs_two_cores
def test_a_killed_worker_loses_no_price(tmp_path):
    report = tmp_path / "report.json"
    done = mpiexec(1, "blackscholes.py", "--options", 500_000, "--rounds", 2, "--bound", "--kill",
                   "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) == {"local", "shared", "bound"}
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
    assert set(data["seconds"]) == {"local", "remote", "split", "bound"}
    assert len(data["predicted_s"]) == 2 and "cells" in data["plan"]


def test_ranks_alone_are_a_mode(tmp_path):
    report = tmp_path / "report.json"
    done = mpiexec(2, "blackscholes.py", "--options", 100_000, "--rounds", 1, "--mode", "mpi", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(report.read_text())["seconds"]) == {"mpi"}


@needs_two_cores
def test_what_is_compared_is_compared_round_by_round(tmp_path):
    """With MPI ranks that take turns with it, the same twice, and a picture."""
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"
    done = mpiexec(1, "blackscholes.py", "--small", "--rounds", 3, "--mode", "local", "--mode", "split", "--bound",
                   "--ranks", 2, "--again", "--json", report, "--plot", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert set(data["seconds"]) == {"local", "split", "split again", "mpi", "bound"}
    assert all(len(values) == 3 for values in data["seconds"].values())
    for name in ("speedup_split", "speedup_mpi", "split_of_bound", "split_over_mpi", "again"):
        found = data["ratios"][name]
        low, high = found["median_between"]
        assert found["count"] == 3 and low <= found["median"] <= high
    assert data["verdict"]["runs"] == 4 * 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_two_cores
def test_nobody_who_is_measured_has_another_core_by_threads_of_its_blas(tmp_path):
    """The rank, bare processes and MPI ranks alike: numpy has threads for all cores before they are bound to one."""
    app = tmp_path / "alone.py"
    app.write_text(ALONE)
    (tmp_path / "common.py").write_text((APPS / "common.py").read_text())
    done = mpiexec(1, str(app), "--rounds", 1, "--mode", "local", "--mode", "split", "--bound", "--ranks", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bound" in done.stdout and "mpi" in done.stdout


ALONE = '''
import sys

import common
import numpy as np
import threadpoolctl

import rfaas_mpi as rf


@rf.kernel
def twice(x, out):
    np.multiply(x, 2.0, out=out)


class Alone(common.App):
    def __init__(self, args, rank, ranks, executor):
        threads = [library["num_threads"] for library in threadpoolctl.threadpool_info()]
        if max(threads) != 1:
            raise SystemExit(f"{threads} threads")
        self.executor, self.x, self.out = executor, executor.zeros(8), executor.empty(8)

    def prepare(self, turn):
        self.x.fill(turn)
        self.out.fill(np.nan)

    def split(self, where):
        return self.executor.Split_init(twice, self.x, self.out, grain=1, where=where)

    def part(self, index, of):
        return twice.bind((self.x,), (self.out,))

    def check(self, turn):
        return "" if (self.out == 2.0 * turn).all() else "they are not twice as large"

    def work(self):
        return 1.0, "thing"

    def told(self):
        return "all are twice as large"


if __name__ == "__main__":
    sys.exit(common.main(Alone, ""))
'''


def test_mpi_ranks_that_end_are_missed(blackscholes, monkeypatch):
    common = blackscholes.common
    monkeypatch.setattr(sys, "argv", [str(APPS / "blackscholes.py")])
    with pytest.raises(RuntimeError, match="ended with status"):
        common.Ranks(["--options", "none"], 2, [0])
    ranks = common.Ranks(["--options", "1000"], 2, [0])
    try:
        took, problem = ranks.run(0)
        assert took > 0 and problem == ""
        os.kill(ranks._process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="went away"):
            while True:
                ranks.run(0)
    finally:
        ranks.close()
        ranks.close()


# --- lies ----------------------------------------------------------------------------------

def lying(lie: str, honest: rf.Kernel) -> rf.Kernel:
    """The prices, but for what a worker of this kind does with them."""
    plain = honest._function
    kept: dict[str, np.ndarray] = {}

    @rf.kernel
    def prices(spot, strike, rate, volatility, years, put, out):
        plain(spot, strike, rate, volatility, years, put, out)
        match lie:
            case "a zeroed cell":
                out.fill(0.0)
            case "swapped cells":
                # The cell before's, as far as it goes.
                before = kept.get("before", out[::-1].copy())
                kept["before"] = out.copy()
                out[...] = np.resize(before, out.shape)
            case "an older result":
                # The same cell's of the round before.
                key = str(spot[0])
                before = kept.get(key, out.copy())
                kept[key] = out.copy()
                out[...] = before
            case "a value off by a millionth":
                out[np.argmax(out)] *= 1 + 1e-6
            case "a low value off by a millionth":
                out[np.argmin(np.abs(out - 1e-6))] *= 1 + 1e-6
    return prices


@needs_two_cores
@pytest.mark.parametrize("lie, first", [("none", None), ("a zeroed cell", 0), ("swapped cells", 0),
                                        ("an older result", 1), ("a value off by a millionth", 0),
                                        ("a low value off by a millionth", 0)])
def test_a_worker_that_lies_fails_the_verdict(blackscholes, lie, first):
    with rf.Executor(workers=1) as executor:
        app = pricing(blackscholes, executor, kernel="numpy")
        app.kernel = lying(lie, app.kernel)
        found, _ = first_failed(app, rounds=4)
    assert found == first


@needs_two_cores
def test_a_worker_that_lies_once_the_prices_are_confirmed_fails_the_verdict(blackscholes):
    with rf.Executor(workers=1) as executor:
        app = pricing(blackscholes, executor, kernel="numpy")
        assert first_failed(app, rounds=2) == (None, "")
        app.kernel = lying("a value off by a millionth", app.kernel)
        found, why = first_failed(app, rounds=2)
    assert found == 0 and "differ from those" in why

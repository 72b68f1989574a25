"""matmul: right answers in each mode, and a verdict that finds each lie of a worker."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from test_apps import mpiexec, needs_two_cores
from verdicts import first_failed, loaded

import rfaas_mpi as rf
from rfaas_mpi.planner import grid


@pytest.fixture(scope="module")
def matmul() -> Iterator[ModuleType]:
    with loaded("matmul") as module:
        yield module


@needs_two_cores
@pytest.mark.parametrize("kernel", ["naive", "blas"])
def test_each_mode_gives_the_product(tmp_path, kernel):
    report = tmp_path / "report.json"
    modes = [word for mode in ("local", "remote", "split") for word in ("--mode", mode)]
    done = mpiexec(1, "matmul.py", "--n", 200, "--kernel", kernel, "--rounds", 3, "--bound", *modes, "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) == {"local", "remote", "split", "bound"}
    assert all(len(values) == 3 for values in data["seconds"].values())
    assert done.stdout.index("verdict") < done.stdout.index("rate")


def test_ranks_share_the_rows(tmp_path):
    report = tmp_path / "report.json"
    done = mpiexec(2, "matmul.py", "--n", 101, "--rounds", 1, "--mode", "mpi", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["config"]["ranks"] == 2


# --- lies ----------------------------------------------------------------------------------

def lying(lie: str, cells: int) -> rf.Kernel:
    """The product, but for what a worker of this kind does with it; `cells` are a round's calls."""
    kept: dict[object, np.ndarray] = {}
    calls: list[int] = []

    @rf.kernel
    def product(a, b, out):
        match lie:
            case "a zeroed cell":
                out.fill(0.0)
            case "swapped cells":
                np.matmul(a[::-1].copy(), b, out=out)
            case "an older result":
                # The same cell's of the first round: one worker runs them in order.
                calls.append(0)
                np.matmul(kept.setdefault((len(calls) - 1) % cells, a.copy()), b, out=out)
            case "an older constant":
                np.matmul(a, kept.setdefault("b", b.copy()), out=out)
            case "a value off by a millionth":
                np.matmul(a, b, out=out)
                row, column = np.argwhere(out)[0]
                out[row, column] *= 1 + 1e-6
            case _:
                np.matmul(a, b, out=out)
    return product


@needs_two_cores
@pytest.mark.parametrize("exact", [True, False], ids=["every entry", "freivalds"])
@pytest.mark.parametrize("lie, first", [
    ("none", None), ("a zeroed cell", 0), ("swapped cells", 0), ("an older result", 1), ("an older constant", 2),
    ("a value off by a millionth", 0)])
def test_a_worker_that_lies_fails_the_verdict(matmul, monkeypatch, lie, first, exact):
    if not exact:
        monkeypatch.setattr(matmul, "EXACT", 0)
    # B changes after round 1.
    args = argparse.Namespace(n=96, kernel="blas", seed=1, rounds=2)
    with rf.Executor(workers=1) as executor:
        app = matmul.Matmul(args, 0, 1, executor)
        app.kernel = lying(lie, len(grid(96, 2 * 96 * 8, 1)))
        found, _ = first_failed(app)
    assert found == first


def test_the_check_is_exact_for_a_right_product(matmul):
    random = np.random.default_rng(2)
    a, b = random.integers(-8, 9, (2, 300, 300)).astype(float)
    assert matmul.wrong(a, b, a @ b, random) == ""
    assert matmul.freivalds(a, b, a @ b, random)

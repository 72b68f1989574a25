"""jacobi: right answers in each mode, and a verdict that finds each lie of a worker."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import transports
from test_apps import mpiexec, needs_two_cores
from verdicts import first_failed, loaded

import rfaas_mpi as rf

N, SWEEPS = 64, 40


@pytest.fixture(scope="module")
def jacobi() -> Iterator[ModuleType]:
    with loaded("jacobi") as module:
        yield module


def arguments(kernel: str = "numpy") -> argparse.Namespace:
    # The matrix changes after round 1.
    return argparse.Namespace(n=N, sweeps=SWEEPS, kernel=kernel, seed=1, rounds=2)


@needs_two_cores
@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_each_mode_solves_the_system(tmp_path, kernel):
    report = tmp_path / "report.json"
    modes = [word for mode in ("local", "remote", "split") for word in ("--mode", mode)]
    done = mpiexec(1, "jacobi.py", "--n", 200, "--kernel", kernel, "--rounds", 2, "--bound", *modes, "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) == {"local", "remote", "split", "bound"}
    assert done.stdout.index("verdict") < done.stdout.index("rate")


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_ranks_share_the_rows(tmp_path, kernel):
    report = tmp_path / "report.json"
    done = mpiexec(2, "jacobi.py", "--n", 101, "--kernel", kernel, "--rounds", 1, "--mode", "mpi", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["config"]["ranks"] == 2


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_a_sweep_is_what_its_plain_twin_says_in_the_same_bits_for_any_rows(jacobi, kernel):
    random = np.random.default_rng(3)
    with rf.Executor(transport="inline") as executor:
        app = jacobi.Jacobi(argparse.Namespace(n=75, sweeps=2, kernel=kernel, seed=4, rounds=1), 1, 3, executor)
        (matrix, _), low, x, b = app.own, app.low, random.random(75), random.random(25)
        whole = np.empty(25)
        app.kernel(matrix, x, b, low, 0, out=whole)
        assert low == 25 and whole == pytest.approx(jacobi.sweep_ref(matrix, x, b, low), rel=1e-13)
        for first, last in ((0, 1), (3, 4), (1, 9), (7, 24), (24, 25)):
            part = np.empty(last - first)
            app.kernel(matrix, x, b[first:last], low, first, out=part)
            assert np.array_equal(part, whole[first:last])


def test_the_matrix_is_the_same_for_any_number_of_ranks(jacobi):
    whole = jacobi.rows_of(50, 0, 50, [1, 2])
    assert np.array_equal(jacobi.rows_of(50, 17, 31, [1, 2]), whole[17:31])
    diagonal = np.diagonal(whole)
    assert (whole.sum(axis=1) - diagonal) / diagonal == pytest.approx(np.full(50, jacobi.SHRINKS))


@needs_two_cores
@pytest.mark.parametrize("over", transports.OVER)
def test_a_worker_that_is_killed_between_sweeps_changes_no_bit(jacobi, over):
    with transports.executor_over(over) as executor:
        app = jacobi.Jacobi(arguments("native"), 0, 1, executor)
        exchange, pid = app.exchange, executor.submit(os.getpid).result()

        def killing(done: int) -> None:
            if (app.turn, done) == (1, SWEEPS // 2):
                os.kill(pid, signal.SIGKILL)
            exchange(done)

        app.exchange = killing
        split = app.split("workers")
        for turn in range(3):
            app.prepare(turn)
            split.Run()
            assert app.check(turn) == ""
        split.Free()


# --- lies ----------------------------------------------------------------------------------

def lying(lie: str, honest: rf.Kernel) -> rf.Kernel:
    """The sweep, but for what a worker of this kind does with it."""
    plain = honest._function
    kept: dict[object, np.ndarray] = {}
    calls: dict[int, int] = {}

    @rf.kernel
    def sweep(matrix, x, b, low, first, out):
        call = calls[first] = calls.get(first, 0) + 1
        if lie == "an older constant":
            matrix = kept.setdefault("matrix", matrix.copy())
        plain(matrix, x, b, low, first, out)
        match lie:
            case "a zeroed cell" if first == 8:
                out.fill(0.0)
            case "swapped cells" if first in (8, 16):
                # What the other one of the two has to answer, but for b, which it isn't given.
                kept[first] = out.copy()
                out[...] = kept.get(24 - first, out[::-1].copy())
            case "the sweep before" if first == 8:
                kept["new"] = out.copy()
                out[...] = kept.get("old", out)
                kept["old"] = kept["new"]
            case "the round before" if first == 8:
                out[...] = kept.setdefault(call % SWEEPS, out.copy())
            case "a value off by a millionth" if first == 8 and call == SWEEPS - 1:
                out[3] *= 1 + 1e-6
            case "a bit" if first == 8 and call == SWEEPS:
                out[3] = np.nextafter(out[3], np.inf)
    return sweep


@needs_two_cores
@pytest.mark.parametrize("lie, first", [
    ("none", None), ("a zeroed cell", 0), ("swapped cells", 0), ("the sweep before", 0), ("the round before", 1),
    ("an older constant", 2), ("a value off by a millionth", 0), ("a bit", 0)])
def test_a_worker_that_lies_fails_the_verdict(jacobi, lie, first):
    with rf.Executor(workers=1) as executor:
        app = jacobi.Jacobi(arguments(), 0, 1, executor)
        app.kernel = lying(lie, app.kernel)
        found, _ = first_failed(app)
    assert found == first


def test_kernels_that_are_wrong_here_too_fail_the_verdict(jacobi):
    """As where all agree on the wrong bits: the solution is known, however they were computed."""
    with rf.Executor(transport="inline") as executor:
        app = jacobi.Jacobi(arguments(), 0, 1, executor)
        honest = app.kernel

        @rf.kernel
        def halved(matrix, x, b, low, first, out):
            honest._function(matrix, x, b * 0.5, low, first, out)

        app.kernel = app.local = halved
        split = app.split("here")
        app.prepare(0)
        split.Run()
        split.Free()
        assert "the error is" in app.check(0)

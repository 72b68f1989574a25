"""nstream: exact sums in each mode, refused over a network, and a verdict that finds each lie of a worker."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import transports
from test_apps import mpiexec, needs_two_cores
from verdicts import first_failed, loaded, settled

import rfaas_mpi as rf
from rfaas_mpi.planner import grid

LENGTH, PASSES = 20_000, 4
CELL = grid(LENGTH, 32).size(0)
CELLS = len(grid(LENGTH, 32))


@pytest.fixture(scope="module")
def nstream() -> Iterator[ModuleType]:
    with loaded("nstream") as module:
        yield module


def arguments(**changed: object) -> argparse.Namespace:
    # s is another one after round 1.
    return argparse.Namespace(**{"length": LENGTH, "passes": PASSES, "kernel": "numpy", "seed": 1, "rounds": 2,
                                 **changed})


@needs_two_cores
@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_each_mode_adds_the_vectors(tmp_path, kernel):
    report = tmp_path / "report.json"
    modes = [word for mode in ("local", "remote", "split") for word in ("--mode", mode)]
    done = mpiexec(1, "nstream.py", "--length", 100_000, "--passes", 3, "--kernel", kernel, "--rounds", 3, "--bound",
                   *modes, "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) == {"local", "remote", "split", "bound"}
    assert done.stdout.index("verdict") < done.stdout.index("rate")


def test_ranks_share_the_elements(tmp_path):
    report = tmp_path / "report.json"
    done = mpiexec(3, "nstream.py", "--length", 10_001, "--rounds", 1, "--mode", "mpi", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["config"]["ranks"] == 3


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_a_pass_is_what_its_plain_twin_says(nstream, kernel):
    with rf.Executor(transport="inline") as executor:
        app = nstream.Nstream(arguments(kernel=kernel), 1, 3, executor)
        app.prepare(1)
        old, new = np.arange(float(len(app.b))), np.empty(len(app.b))
        app.kernel(np.array([5.0]), old, app.b, app.c, out=new)
        assert np.array_equal(new, nstream.one_pass_ref(5.0, old, app.b, app.c))


def test_vectors_and_their_sum_are_the_same_for_any_number_of_ranks(nstream):
    b, c = nstream.vectors(0, 1000, 1000, 7)
    for low, high in ((0, 300), (300, 999), (999, 1000)):
        assert [part.tolist() for part in nstream.vectors(low, high, 1000, 7)] == [b[low:high].tolist(),
                                                                                   c[low:high].tolist()]
    assert nstream.sum_of_all(1000, 7, 5.0, 3) == (3 * (b + 5.0 * c)).sum()


@needs_two_cores
@pytest.mark.parametrize("over", transports.OVER)
def test_a_worker_that_is_killed_between_passes_adds_nothing_twice(nstream, over):
    with transports.executor_over(over) as executor:
        app = nstream.Nstream(arguments(kernel="native"), 0, 1, executor)
        passed, pid = app.passed, executor.submit(os.getpid).result()

        def killing() -> None:
            if (app.turn, app.done) == (1, PASSES // 2):
                os.kill(pid, signal.SIGKILL)
            passed()

        app.passed = killing
        split = app.split("workers")
        for turn in range(3):
            app.prepare(turn)
            split.Run()
            assert app.check(turn) == ""
        split.Free()


# --- who runs it --------------------------------------------------------------------------------

@needs_two_cores
def test_it_is_divided_where_memory_is_shared(nstream):
    """With what a pass costs made up, so that a busy machine changes nothing of it."""
    with rf.Executor(workers=1, transport="shm") as executor:
        app = nstream.Nstream(arguments(length=400_000), 0, 1, executor)
        plain = app.kernel._function

        @rf.kernel
        def slowly(s, old, b, c, out):
            plain(s, old, b, c, out)
            time.sleep(len(out) * 1e-7)

        app.kernel = slowly
        found = settled(app, wanted=True)
    assert 0.2 < found.share < 0.8


@needs_two_cores
def test_it_is_refused_over_a_network(nstream):
    """Over tcp an element's 32 bytes cost the rank several times what its two additions do."""
    with transports.executor_over("tcp") as executor:
        app = nstream.Nstream(arguments(length=1_000_000, kernel="native"), 0, 1, executor)
        assert settled(app, wanted=False).offload is False


# --- lies ---------------------------------------------------------------------------------------

def lying(lie: str, honest: rf.Kernel) -> rf.Kernel:
    """The pass, but for what a worker of this kind does with it."""
    plain = honest._function
    kept: dict[object, np.ndarray] = {}
    calls: list[int] = []

    @rf.kernel
    def one_pass(s, old, b, c, out):
        # One worker runs a pass's cells in order.
        calls.append(0)
        cell, done = (len(calls) - 1) % CELLS, (len(calls) - 1) // CELLS % PASSES
        if lie == "an older constant":
            s = kept.setdefault("s", s.copy())
        if lie == "swapped cells" and cell in (0, 1):
            # Exactly what the other one has to answer.
            there = CELL if cell == 0 else -CELL
            b, c = b + there, c - there
        plain(s, old, b, c, out)
        match lie:
            case "a zeroed cell" if (cell, done) == (3, 0):
                out.fill(0.0)
            case "a cell that wasn't written" if (cell, done) == (3, PASSES - 1):
                out[...] = old
            case "the round before" if cell == 3:
                out[...] = kept.setdefault(done, out.copy())
            case "a value off by a millionth" if (cell, done) == (3, 0):
                out[3] *= 1 + 1e-6
            case "a bit" if (cell, done) == (3, PASSES - 1):
                out[3] = np.nextafter(out[3], np.inf)
    return one_pass


@needs_two_cores
@pytest.mark.parametrize("lie, first", [
    ("none", None), ("a zeroed cell", 0), ("swapped cells", 0), ("a cell that wasn't written", 0),
    ("the round before", 1), ("an older constant", 2), ("a value off by a millionth", 0), ("a bit", 0)])
def test_a_worker_that_lies_fails_the_verdict(nstream, lie, first):
    with rf.Executor(workers=1) as executor:
        app = nstream.Nstream(arguments(), 0, 1, executor)
        app.kernel = lying(lie, app.kernel)
        found, problem = first_failed(app)
    assert found == first
    if lie == "swapped cells":
        # Those two, and nothing else: their sum is the same.
        assert f"{2 * CELL} of {LENGTH} elements are wrong, the first at 0" == problem


def test_a_wrong_formula_is_found_by_the_sum_of_all(nstream, monkeypatch):
    """As where a mistake in a formula of the check's passes for a result: the sum is reckoned another way."""
    with rf.Executor(transport="inline") as executor:
        app = nstream.Nstream(arguments(), 0, 1, executor)
        split = app.split("here")
        honest = nstream.vectors
        monkeypatch.setattr(nstream, "vectors", lambda *rank: tuple(part + 1.0 for part in honest(*rank)))
        app.prepare(0)
        split.Run()
        split.Free()
        assert "the sum is" in app.check(0)

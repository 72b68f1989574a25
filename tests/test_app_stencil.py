"""stencil: the divergence in each mode, refused over a network, and a verdict that finds each lie of a worker."""

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

N, ITERATIONS = 64, 4
# What is divided of a row: five of the grid, the sum, and both outputs.
CELLS = grid(N, 8 * 8 * N)


@pytest.fixture(scope="module")
def stencil() -> Iterator[ModuleType]:
    with loaded("stencil") as module:
        yield module


def arguments(**changed: object) -> argparse.Namespace:
    # The weights are others after round 1.
    return argparse.Namespace(**{"n": N, "radius": 2, "iterations": ITERATIONS, "kernel": "numpy", "seed": 1,
                                 "rounds": 2, **changed})


@needs_two_cores
@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_each_mode_takes_the_divergence(tmp_path, kernel):
    report = tmp_path / "report.json"
    modes = [word for mode in ("local", "remote", "split") for word in ("--mode", mode)]
    done = mpiexec(1, "stencil.py", "--n", 150, "--iterations", 3, "--kernel", kernel, "--rounds", 3, "--bound",
                   *modes, "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) == {"local", "remote", "split", "bound"}
    assert done.stdout.index("verdict") < done.stdout.index("rate")


@pytest.mark.parametrize("ranks, kernel", [(2, "native"), (3, "numpy")])
def test_ranks_exchange_their_neighbours_rows(tmp_path, ranks, kernel):
    """Three ranks: one has neighbours at both ends, and all have as few rows as the radius lets them."""
    report = tmp_path / "report.json"
    done = mpiexec(ranks, "stencil.py", "--n", 13, "--radius", 4, "--kernel", kernel, "--rounds", 1, "--mode", "mpi",
                   "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["config"]["ranks"] == ranks


def test_too_few_rows_for_the_radius_are_refused():
    done = mpiexec(1, "stencil.py", "--n", 8, "--radius", 4, "--mode", "local")
    assert done.returncode == 1
    assert "take a larger --n" in done.stderr


@pytest.mark.parametrize("kernel", ["native", "numpy"])
@pytest.mark.parametrize("radius", range(1, 5))
def test_an_iteration_is_what_its_plain_twin_says_in_the_same_bits_for_any_rows(stencil, kernel, radius):
    n = 2 * radius + 21
    random = np.random.default_rng(radius)
    field, old = random.random((n, n)), random.random((n, n))
    padded = np.full((n + 2 * radius, n), np.nan)
    padded[radius:-radius] = field
    weights = random.random((2, 2 * radius + 1))
    weights[:, radius] = 0.0
    with rf.Executor(transport="inline") as executor:
        app = stencil.Stencil(arguments(n=n, radius=radius, kernel=kernel), 0, 1, executor)
        whole, grown = np.empty((2, n, n))

        def run(first: int, last: int, out: tuple[np.ndarray, np.ndarray]) -> None:
            app.kernel(weights, np.array([n, 0]), old[first:last], *app._shifted(padded, slice(first, last)), first,
                       out=out)

        run(0, n, (whole, grown))
        expected, next_field = stencil.iteration_ref(weights, field, old)
        assert whole == pytest.approx(expected, rel=1e-13)
        assert np.array_equal(grown, next_field)
        for first, last in ((0, 1), (radius - 1, radius + 3), (radius, n - radius), (n - radius - 1, n), (n - 1, n)):
            part, rest = np.empty((2, last - first, n))
            run(first, last, (part, rest))
            assert np.array_equal(part, whole[first:last]) and np.array_equal(rest, grown[first:last])


def test_the_weights_take_the_divergence_of_any_such_polynomial(stencil):
    i, j = np.arange(30.0)[:, None], np.arange(30.0)
    for radius in (1, 3, 4):
        polynomial = stencil.Polynomial(5, radius)
        field, divergence = polynomial(i, j), polynomial.divergence(i, j)
        inner = slice(radius, 30 - radius)
        new, _ = stencil.iteration_ref(stencil.star(radius, 2.0), field, np.zeros((30, 30)))
        assert new[inner, inner] == pytest.approx(2 * divergence[inner, inner], rel=1e-12)


@needs_two_cores
@pytest.mark.parametrize("over", transports.OVER)
def test_a_worker_that_is_killed_between_iterations_changes_no_bit(stencil, over):
    with transports.executor_over(over) as executor:
        app = stencil.Stencil(arguments(kernel="native"), 0, 1, executor)
        exchange, pid = app.exchange, executor.submit(os.getpid).result()

        def killing() -> None:
            if (app.turn, app.done) == (1, ITERATIONS // 2):
                os.kill(pid, signal.SIGKILL)
            exchange()

        app.exchange = killing
        split = app.split("workers")
        for turn in range(3):
            app.prepare(turn)
            split.Run()
            assert app.check(turn) == ""
        split.Free()


# --- who runs it --------------------------------------------------------------------------------

@needs_two_cores
def test_it_is_divided_where_memory_is_shared(stencil):
    """With what an iteration costs made up, so that a busy machine changes nothing of it."""
    with rf.Executor(workers=1, transport="shm") as executor:
        app = stencil.Stencil(arguments(n=256, iterations=2), 0, 1, executor)
        plain = app.kernel._function

        @rf.kernel
        def slowly(weights, place, old, *rest, out):
            plain(weights, place, old, *rest, out=out)
            time.sleep(len(old) * 3e-4)

        app.kernel = slowly
        found = settled(app, wanted=True)
    assert 0.2 < found.share < 0.8


@needs_two_cores
def test_it_is_refused_over_a_network(stencil):
    """Over tcp a point's 64 bytes cost the rank several times what its nine products do."""
    with transports.executor_over("tcp") as executor:
        app = stencil.Stencil(arguments(n=700, iterations=2, kernel="native"), 0, 1, executor)
        assert settled(app, wanted=False).offload is False


# --- lies ---------------------------------------------------------------------------------------

def lying(lie: str, honest: rf.Kernel) -> rf.Kernel:
    """The iteration, but for what a worker of this kind does with it."""
    plain = honest._function
    kept: dict[object, np.ndarray] = {}
    calls: dict[int, int] = {}
    one, other = CELLS.edges[3], CELLS.edges[4]

    @rf.kernel
    def iteration(weights, place, old, *rest, out):
        first = int(rest[-1])
        done = calls[first] = calls.get(first, -1) + 1
        at = (first, done % ITERATIONS)
        if lie == "an older constant":
            weights = kept.setdefault("weights", weights.copy())
        plain(weights, place, old, *rest, out=out)
        new, grown = out
        match lie:
            case "a zeroed cell" if at == (one, 0):
                new.fill(0.0)
            case "swapped cells" if first in (one, other):
                # Exactly what the other one has to answer: the divergence grows by the same from row to row.
                added = new - old
                new[:, 2:-2] += (added[1, 2:-2] - added[0, 2:-2]) * (other - one) * (1 if first == one else -1)
            case "the iteration before" if at == (one, ITERATIONS - 1):
                new[...] = old
            case "the round before" if first == one:
                new[...] = kept.setdefault(at, new.copy())
            case "a value off by a millionth" if at == (one, 0):
                new[0, 20] *= 1 + 1e-6
            case "a bit" if at == (one, ITERATIONS - 1):
                new[0, 20] = np.nextafter(new[0, 20], np.inf)
            case "a grid that doesn't grow" if at == (one, ITERATIONS - 1):
                grown[...] -= 1.0
    return iteration


@needs_two_cores
@pytest.mark.parametrize("lie, first", [
    ("none", None), ("a zeroed cell", 0), ("swapped cells", 0), ("the iteration before", 0), ("the round before", 1),
    ("an older constant", 2), ("a value off by a millionth", 0), ("a bit", 0), ("a grid that doesn't grow", 0)])
def test_a_worker_that_lies_fails_the_verdict(stencil, lie, first):
    assert CELLS.size(3) == CELLS.size(4) > 1
    with rf.Executor(workers=1) as executor:
        app = stencil.Stencil(arguments(), 0, 1, executor)
        app.kernel = lying(lie, app.kernel)
        found, problem = first_failed(app)
    assert found == first
    if lie == "swapped cells":
        # Those two, and nothing else.
        assert f"{2 * CELLS.size(3) * (N - 4)} of {N * N} points" in problem and "not the divergence" in problem


@pytest.mark.parametrize("deed, said", [("weights", "not the divergence"), ("mean", "the mean is")])
def test_kernels_and_formulas_that_are_wrong_here_too_fail_the_verdict(stencil, monkeypatch, deed, said):
    """As where all agree on the wrong bits, or a mistake in the check's formula passes for a result."""
    with rf.Executor(transport="inline") as executor:
        app = stencil.Stencil(arguments(), 0, 1, executor)
        honest = app.kernel

        @rf.kernel
        def halved(weights, place, old, *rest, out):
            honest._function(weights * 0.5, place, old, *rest, out=out)

        if deed == "weights":
            app.kernel = app.local = halved
        else:
            honest_formula = stencil.Polynomial.divergence
            monkeypatch.setattr(stencil.Polynomial, "divergence", lambda its, i, j: (
                honest_formula(its, i, j) + (0.0 if i.ndim else 1.0)))
        split = app.split("here")
        app.prepare(0)
        split.Run()
        split.Free()
        assert said in app.check(0)

"""hydro: what is conserved, where Sedov has the shock, the same bits everywhere, a verdict that finds each lie."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import transports
from test_apps import mpiexec, needs_two_cores
from verdicts import first_failed

import rfaas_mpi as rf

APPS = Path(__file__).resolve().parent.parent / "apps"
N, STEPS = 12, 12   # two cells of nodes, at least


@pytest.fixture(scope="module")
def hydro() -> ModuleType:
    sys.path.insert(0, str(APPS))
    try:
        spec = importlib.util.spec_from_file_location("hydro", APPS / "hydro.py")
        # Its dataclasses look for their module.
        module = sys.modules["hydro"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        module.native.cache_clear()
        sys.path.remove(str(APPS))
        for name in ("hydro", "common"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def worker() -> Iterator[rf.Executor]:
    with rf.Executor(workers=1) as executor:
        yield executor


def arguments(kernel: str = "native", n: int = N, steps: int | None = STEPS, rounds: int = 2) -> argparse.Namespace:
    # The masses change after half of the rounds, here after round 1.
    return argparse.Namespace(n=n, steps=steps, kernel=kernel, seed=1, rounds=rounds)


def state(told: str) -> str:
    """What stands for all bits of a run's results."""
    return re.search(r"own \(([0-9a-f]{16})\)", told)[1]


def alone(hydro: ModuleType, args: argparse.Namespace) -> str:
    """The state that one rank gets by itself."""
    with rf.Executor(transport="inline") as executor:
        app = hydro.Hydro(args, 0, 1, executor)
        split = app.split("here")
        for turn in range(args.rounds + 1):
            app.prepare(turn)
            split.Run()
            assert app.check(turn) == ""
        split.Free()
        return state(app.told())


# --- right answers ---------------------------------------------------------------------------

@needs_two_cores
@pytest.mark.parametrize("kernel, n", [("native", 8), ("numpy", 5)])
def test_each_mode_gives_the_same_bits(tmp_path, kernel, n):
    report = tmp_path / "report.json"
    modes = [word for mode in ("local", "remote", "split") for word in ("--mode", mode)]
    done = mpiexec(1, "hydro.py", "--n", n, "--steps", 8, "--kernel", kernel, "--rounds", 1, "--bound", *modes,
                   "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert {"local", "remote", "split", "bound"} <= set(data["seconds"])
    assert done.stdout.index("verdict") < done.stdout.index("rate")


@pytest.mark.parametrize("ranks, kernel, modes", [
    (8, "numpy", ["mpi"]), pytest.param(2, "native", ["remote", "split"], marks=needs_two_cores)])
def test_ranks_get_the_bits_of_one(hydro, ranks, kernel, modes):
    # 9 elements along an edge: not as many for each rank.
    words = [word for mode in modes for word in ("--mode", mode)]
    done = mpiexec(ranks, "hydro.py", "--n", 9, "--steps", 6, "--rounds", 1, "--kernel", kernel, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert state(done.stdout) == alone(hydro, arguments(kernel, n=9, steps=6, rounds=1))


@pytest.mark.parametrize("n", [10, 15, 20])
def test_energy_is_kept_and_the_shock_where_sedov_s_is(hydro, n):
    with rf.Executor(transport="inline") as executor:
        app = hydro.Hydro(arguments(n=n, steps=None), 0, 1, executor)
        split = app.split("here")
        app.prepare(0)
        split.Run()
        split.Free()
        assert app.check(0) == ""
        radius, off, energy = app.found[0]
        assert radius > n / 2 and off <= 2.0 and energy <= 1e-12


def test_the_radius_is_that_of_the_published_solution(hydro):
    # An octant has an eighth of the blast.
    assert hydro.radius_of(0.851072 / 8.0, 1.0, 1.0) == pytest.approx(1.0)
    assert hydro.radius_of(1.0, 1.0, 4.0) / hydro.radius_of(1.0, 1.0, 1.0) == pytest.approx(4.0**0.4)


# --- kernels ---------------------------------------------------------------------------------

def shaken(hydro: ModuleType, app: object) -> list[np.ndarray]:
    """Gas that is not at rest, on a mesh that is not straight: what `hydro_elements` reads."""
    random = np.random.default_rng(5)
    gas = app.checked
    app.begin(gas, 0)
    for array, size in ((gas.x[0], 0.2 / app.n), (gas.v[0], 1.0), (gas.v[1], 1.0), (gas.force[1], 1.0)):
        array += size * random.uniform(-1.0, 1.0, array.shape)
    for energy in gas.energy:
        energy[...] = 10.0 * random.random(energy.shape)
    gas.times[...] = 0.01, 0.02
    return [array.copy() for array in gas.of_elements(0, app.own[0][0])[0]]


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_elements_do_what_their_plain_twin_says_in_the_same_bits_for_any_rows(hydro, kernel):
    with rf.Executor(transport="inline") as executor:
        # More than one block of elements side by side, and one that isn't full.
        app = hydro.Hydro(arguments(kernel, n=18), 0, 1, executor)
        read = shaken(hydro, app)
        *common, force_before, energy_before = read
        gas = app.checked
        outs = [np.full_like(array, np.nan) for array in gas.of_elements(0, app.own[0][0])[1]]
        app.kernels[0](*read, 0, out=tuple(outs))
        for first, last in ((0, 1), (1, 2), (3, 20), (17, 61), (339, 360)):
            rows = slice(first, last)
            parts = [np.full_like(array[rows], np.nan) for array in outs]
            app.kernels[0](*common, force_before[rows], energy_before[rows], first, out=tuple(parts))
            assert all(np.array_equal(part, whole[rows]) for part, whole in zip(parts, outs))
        x, v, before = map(hydro.corners_of, common[:3])
        mass = gas.inner(common[3])
        n = app.n

        def of_elements(rows: np.ndarray) -> np.ndarray:
            return np.moveaxis(rows.reshape(n, n + 2, 8, 3, -1)[:, 1:-1], -1, 2)

        work = (of_elements(force_before)[:, :, 1:-1] * 0.5 * (v + before)).sum(axis=(3, 4))
        energy = gas.inner(energy_before) - 0.01 * work / mass
        force, density, limit = hydro.forces_ref(x, v, mass, energy, 0.02)
        found = of_elements(outs[0])
        assert not found[:, :, 0].any() and not found[:, :, -1].any()
        assert found[:, :, 1:-1] == pytest.approx(force, rel=1e-9, abs=1e-11 * np.abs(force).max())
        assert gas.inner(outs[1]) == pytest.approx(energy, rel=1e-9)
        assert gas.inner(outs[2]) == pytest.approx(density, rel=1e-12)
        assert outs[3].reshape(n, n + 2)[:, 1:-1] == pytest.approx(limit.min(axis=-1), rel=1e-9)


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_nodes_move_by_the_sum_of_their_elements_forces_in_the_same_bits_for_any_rows(hydro, kernel):
    with rf.Executor(transport="inline") as executor:
        app = hydro.Hydro(arguments(kernel, n=5), 0, 1, executor)
        shaken(hydro, app)
        gas, (_, masses, mobility) = app.checked, app.own[0]
        gas.force[0][...] = 0.0
        gas.force[0][1:-1, 1:-1, :, 1:-1] = np.random.default_rng(6).random((5, 5, 24, 5))
        (force, _, times, sizes, x, v), _ = gas.of_nodes(0, mobility)
        outs = np.empty_like(x), np.empty_like(v)
        app.kernels[1](force, mobility, times, sizes, x, v, 0, out=outs)
        for first, last in ((0, 1), (5, 19), (30, 36)):
            rows = slice(first, last)
            parts = np.empty_like(x[rows]), np.empty_like(v[rows])
            app.kernels[1](force, mobility, times, sizes, x[rows], v[rows], first, out=parts)
            assert all(np.array_equal(part, whole[rows]) for part, whole in zip(parts, outs))
        sums = np.zeros((6, 6, 3, 6))
        for c, (a, b, k) in enumerate(hydro.CORNERS):
            sums[a:a + 5, b:b + 5, :, k:k + 5] += force[1:-1, 1:-1, 3 * c:3 * c + 3, 1:-1]
        push = sums / masses[:, :, None, :]
        # Walls hold what would leave the cube.
        push[[0, -1], :, 0] = push[:, [0, -1], 1] = push[:, :, 2, [0, -1]] = 0.0
        after = gas.shaped(v) + 0.02 * push
        assert gas.shaped(outs[1]) == pytest.approx(after, rel=1e-12)
        assert gas.shaped(outs[0]) == pytest.approx(gas.shaped(x) + 0.01 * (gas.shaped(v) + after), rel=1e-12)


def test_volumes_are_those_of_their_derivatives_that_forces_follow(hydro):
    """Inner energy changes by exactly what the volume does: the mesh is pushed by -dE/dx."""
    x = hydro.CORNERS + np.random.default_rng(7).uniform(-0.2, 0.2, (1, 8, 3))
    force, *_ = hydro.forces_ref(x, np.zeros((1, 8, 3)), np.array([1.0]), np.array([2.5]), 0.0)
    pressure = 0.4 * 2.5 / hydro.volumes_ref(x)[0]
    for c, axis in ((0, 0), (3, 2), (6, 1)):
        moved = np.zeros_like(x)
        moved[0, c, axis] = 1e-5
        change = (hydro.volumes_ref(x + moved) - hydro.volumes_ref(x - moved))[0] / 2e-5
        assert force[0, c, axis] == pytest.approx(pressure * change, rel=1e-8)


# --- faults ----------------------------------------------------------------------------------

@needs_two_cores
@pytest.mark.parametrize("over", transports.OVER)
def test_a_worker_that_is_killed_between_steps_changes_no_bit(hydro, over):
    with transports.executor_over(over) as executor:
        app = hydro.Hydro(arguments(), 0, 1, executor)
        exchange, pid = app.neighbours.exchange, executor.submit(os.getpid).result()
        steps = iter(range(1000))

        def killing(force: np.ndarray) -> None:
            if next(steps) == STEPS // 2:
                os.kill(pid, signal.SIGKILL)
            exchange(force)

        app.neighbours.exchange = killing
        split = app.split("workers")
        for turn in range(3):
            app.prepare(turn)
            split.Run()
            assert app.check(turn) == ""
        split.Free()


# --- lies ------------------------------------------------------------------------------------

def lying(lie: str, plain: rf.Kernel, index: int) -> rf.Kernel:
    """The kernel of elements (0) or nodes (1), but for what a worker of this kind does with it."""
    kept: dict[object, object] = {}
    calls: dict[int, int] = {}

    def lies(*args):
        *read, first, out = args
        call = calls[first] = calls.get(first, 0) + 1
        if lie == "an older constant":
            which = 1 if index else 3
            read[which] = kept.setdefault("constant", read[which].copy())
        plain(*read, first, out=out)
        answer = [array.copy() for array in out]
        # Those of a cell in which something happens.
        match lie:
            case "a zeroed cell" if first == 0:
                answer = [np.zeros_like(array) for array in out]
            case "swapped cells" if len(calls) > 1 and first in list(calls)[:2]:
                other = next(cell for cell in calls if cell != first)
                answer, kept[first] = kept.get(other, [array[::-1] for array in answer]), answer
            case "the step before" if first == 0:
                answer, kept["old"] = kept.get("old", answer), answer
            case "the round before" if first == 0:
                answer = kept.setdefault(call % (STEPS + 1 - index), answer)
            case "a value off by a millionth" if first == 0 and call == STEPS // 2:
                answer[1].flat[np.abs(answer[1]).argmax()] *= 1 + 1e-6
            case "a bit" if first == 0 and call == STEPS:
                worst = np.abs(answer[1]).argmax()
                answer[1].flat[worst] = np.nextafter(answer[1].flat[worst], np.inf)
            case "a shorter step" if first == 0:
                answer[-1] *= 0.01
        for array, said in zip(out, answer):
            array[:len(said)] = said[:len(array)]

    if index:
        @rf.kernel
        def nodes(force, mobility, times, sizes, x, v, first, out):
            lies(force, mobility, times, sizes, x, v, first, out)
        return nodes

    @rf.kernel
    def elements(x, v, v_before, mass, times, sizes, force_before, energy_before, first, out):
        lies(x, v, v_before, mass, times, sizes, force_before, energy_before, first, out)
    return elements


LIES = [("none", None), ("a zeroed cell", 0), ("swapped cells", 0), ("the step before", 0), ("the round before", 1),
        ("an older constant", 2), ("a value off by a millionth", 0), ("a bit", 0)]


@needs_two_cores
@pytest.mark.parametrize("index, lie, first", [(index, *lie) for index in (0, 1) for lie in LIES]
                         + [(0, "a shorter step", 0)])
def test_a_worker_that_lies_fails_the_verdict(hydro, worker, index, lie, first):
    app = hydro.Hydro(arguments(), 0, 1, worker)
    app.kernels[index] = lying(lie, app.kernels[index], index)
    found, _ = first_failed(app)
    assert found == first


@pytest.mark.parametrize("wrong, why", [("energy of its own", "energy was"), ("a slow clock", "the shock is"),
                                        ("mass of its own", "mass was"), ("a slack wall", "volume was")])
def test_kernels_that_are_wrong_here_too_fail_the_verdict(hydro, wrong, why):
    """As where all agree on the wrong bits: what has to be is known, however it was computed."""
    with rf.Executor(transport="inline") as executor:
        app = hydro.Hydro(arguments(n=12, steps=80), 0, 1, executor)
        of_elements, of_nodes = app.kernels

        @rf.kernel
        def elements(x, v, v_before, mass, times, sizes, force_before, energy_before, first, out):
            times = times / 5.0 if wrong == "a slow clock" else times
            of_elements(x, v, v_before, mass, times, sizes, force_before, energy_before, first, out=out)
            if wrong == "energy of its own":
                out[1][...] *= 1 + 1e-11
            if wrong == "mass of its own":
                out[2][...] *= 1 + 1e-11

        @rf.kernel
        def nodes(force, mobility, times, sizes, x, v, first, out):
            times = times / 5.0 if wrong == "a slow clock" else times
            of_nodes(force, mobility, times, sizes, x, v, first, out=out)
            if wrong == "a slack wall":
                out[0][:, 2, -1] += 1e-11

        app.kernels = app.local = [elements, nodes]
        split = app.split("here")
        app.prepare(0)
        split.Run()
        split.Free()
        assert why in app.check(0)

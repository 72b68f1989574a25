"""ensemble: the periods that are known, in each mode, and a verdict that finds each lie of a worker."""

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
from scipy.integrate import solve_ivp
from scipy.special import ellipk
from test_apps import mpiexec, needs_two_cores
from verdicts import first_failed, loaded

import rfaas_mpi as rf

SMALL = ("--members", 101, "--steps", 256, "--period-steps", 32)


@pytest.fixture(scope="module")
def ensemble() -> Iterator[ModuleType]:
    with loaded("ensemble") as module:
        yield module


def arguments(**changed: object) -> argparse.Namespace:
    # Gravity is another one after round 1.
    return argparse.Namespace(**{"members": 32, "steps": 256, "period_steps": 32, "kernel": "numpy", "remote": "split",
                                 "chunk": 8, "seed": 1, "rounds": 2, **changed})


@needs_two_cores
@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_each_mode_finds_the_periods(tmp_path, kernel):
    report = tmp_path / "report.json"
    modes = [word for mode in ("local", "remote", "split") for word in ("--mode", mode)]
    done = mpiexec(1, "ensemble.py", *SMALL, "--kernel", kernel, "--rounds", 2, *modes, "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) >= {"local", "remote", "split"}
    assert done.stdout.index("verdict") < done.stdout.index("rate")


def test_ranks_share_the_members_and_what_they_found(tmp_path):
    report = tmp_path / "report.json"
    # The first one has no member, and tells what the other one found.
    done = mpiexec(2, "ensemble.py", *SMALL, "--members", 1, "--rounds", 1, "--mode", "mpi", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["config"]["ranks"] == 2 and 0 < data["off"]["period"] < 1e-6 and data["off"]["last angle"] > 0


def test_too_few_steps_to_see_a_period_are_refused(ensemble):
    with rf.Executor(transport="inline") as executor, pytest.raises(SystemExit, match="8 times as many --steps"):
        ensemble.Ensemble(arguments(steps=200), 0, 1, executor)


@needs_two_cores
@pytest.mark.parametrize("remote", ["map", "split"])
@pytest.mark.parametrize("over", transports.OVER)
def test_a_worker_that_was_killed_changes_no_bit(ensemble, over, remote):
    with transports.executor_over(over) as executor:
        app = ensemble.Ensemble(arguments(kernel="native", remote=remote), 0, 1, executor)
        pid = executor.submit(os.getpid).result()
        split = app.split("workers")
        for turn in range(3):
            app.prepare(turn)
            if turn == 1:
                os.kill(pid, signal.SIGKILL)
            split.Run()
            assert app.check(turn) == ""
        split.Free()


# --- the physics ---------------------------------------------------------------------------

def swung(ensemble: ModuleType, **changed: object) -> tuple[np.ndarray, np.ndarray]:
    """A round's members and their results, by the rank."""
    with rf.Executor(transport="inline") as executor:
        app = ensemble.Ensemble(arguments(**changed), 0, 1, executor)
        split = app.split("here")
        app.prepare(0)
        split.Run()
        split.Free()
        return app.members.copy(), app.results.copy()


def test_numpy_and_c_say_the_same(ensemble):
    (members, one), (_, other) = (swung(ensemble, kernel=kernel) for kernel in ("numpy", "native"))
    assert np.array_equal(one[:, :2], members)
    # They may be compiled to other roundings, and a step's are kept until the end.
    assert one == pytest.approx(other, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_results_are_the_same_bits_for_any_rows_and_ranks(ensemble, kernel):
    with rf.Executor(transport="inline") as executor:
        app = ensemble.Ensemble(arguments(kernel=kernel), 0, 1, executor)
        members = app.members_of(3)
        whole = np.empty((32, ensemble.RESULTS))
        app.kernel(app.params[0], members, out=whole)
        for first, last in ((0, 1), (3, 4), (1, 10), (7, 32)):
            part = np.empty((last - first, ensemble.RESULTS))
            app.kernel(app.params[0], members[first:last], out=part)
            assert np.array_equal(part, whole[first:last])
        of_three = [ensemble.Ensemble(arguments(), rank, 3, executor).members_of(3) for rank in range(3)]
        assert np.array_equal(np.concatenate(of_three), members)


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_errors_fall_with_the_fourth_power_of_the_step_and_stay_within_what_is_allowed(ensemble, kernel):
    off = []
    for per in (32, 64):
        members, results = swung(ensemble, steps=8 * per, period_steps=per, kernel=kernel)
        gravity = ensemble.GRAVITIES[0]
        period = 4 * ellipk(np.sin(members[:, 0] / 2)**2) / np.sqrt(gravity / members[:, 1])
        off.append((np.abs(results[:, ensemble.PERIOD] / period - 1).max(), results[:, ensemble.DRIFT].max()))
    (period_coarse, drift_coarse), (period, drift) = off
    assert 12 < period_coarse / period < 20 and 12 < drift_coarse / drift < 20
    assert ensemble.PERIOD_OFF / 5 < period < ensemble.PERIOD_OFF
    assert ensemble.DRIFT_OFF / 5 < drift < ensemble.DRIFT_OFF


def test_energy_stays_however_long_it_swings(ensemble):
    _, short = swung(ensemble, steps=512, period_steps=32, kernel="native")
    _, long = swung(ensemble, steps=65536, period_steps=32, kernel="native")
    assert (long[:, ensemble.DRIFT] < 1.2 * short[:, ensemble.DRIFT]).all()


def test_the_end_that_is_known_is_that_of_another_method_too(ensemble):
    members = np.array([[0.1, 0.5], [1.3, 1.0], [2.6, 2.0]])
    time = np.array([3.1, 2.7, 8.9])
    period, angle, velocity = ensemble.exact(9.80665, members, time)
    for i, (amplitude, length) in enumerate(members):
        def moved(_: float, y: np.ndarray, pull: float = 9.80665 / length) -> list[float]:
            return [y[1], -pull * np.sin(y[0])]

        found = solve_ivp(moved, (0, time[i]), [amplitude, 0.0], method="DOP853", rtol=1e-12, atol=1e-13)
        assert found.y[:, -1] == pytest.approx([angle[i], velocity[i]], abs=1e-9)
        back = solve_ivp(moved, (0, period[i]), [amplitude, 0.0], method="DOP853", rtol=1e-12, atol=1e-13)
        assert back.y[:, -1] == pytest.approx([amplitude, 0.0], abs=1e-8)


# --- lies ----------------------------------------------------------------------------------

def lying(lie: str, honest: rf.Kernel, marked: np.ndarray) -> rf.Kernel:
    """The swings, but for what a worker of this kind does with a cell: that of rows 8 to 16 of a round, or all.

    `marked`: the first members of these rows, in each round.
    """
    plain = honest._function
    kept: dict[object, np.ndarray] = {}
    firsts = {first.tobytes() for first in marked}

    @rf.kernel
    def swings(params, members, out):
        if lie == "an older constant":
            params = kept.setdefault("params", params.copy())
        here = members[0].tobytes() in firsts
        if lie == "the round before" and here:
            members = kept.setdefault("members", members.copy())
        plain(params, members, out)
        match lie:
            case "a zeroed cell" if here:
                out.fill(0.0)
            case "zeros under a key" if here:
                out[:, 3:] = 0.0
            case "swapped members" if here:
                out[[0, 5]] = out[[5, 0]]
            case "swapped answers" if here:
                # Each says that it is the other.
                out[[0, 5], 3:] = out[[5, 0], 3:]
            case "the round before, under a key" if here:
                out[:, 3:] = kept.setdefault("out", out.copy())[:, 3:]
            case "a value off by a millionth" if here:
                out[3, 3] *= 1 + 1e-6
            case "a bit" if here:
                out[3, 5] = np.nextafter(out[3, 5], np.inf)
    return swings


@needs_two_cores
@pytest.mark.parametrize("remote", ["map", "split"])
@pytest.mark.parametrize("lie, first", [
    ("none", None), ("a zeroed cell", 0), ("zeros under a key", 0), ("swapped members", 0), ("swapped answers", 0),
    ("the round before", 1), ("the round before, under a key", 1), ("an older constant", 2),
    ("a value off by a millionth", 0), ("a bit", 0)])
def test_a_worker_that_lies_fails_the_verdict(ensemble, lie, first, remote):
    if (lie, remote) == ("swapped members", "map"):
        first = None    # they are told by their keys, and go to the right places
    with rf.Executor(workers=1) as executor:
        app = ensemble.Ensemble(arguments(remote=remote), 0, 1, executor)
        app.kernel = lying(lie, app.kernel, np.array([app.members_of(turn)[8] for turn in range(3)]))
        found, problem = first_failed(app)
    assert found == first, problem


def test_kernels_that_are_wrong_here_too_fail_the_verdict(ensemble):
    """As where all agree on the wrong bits: periods are known, however they were computed."""
    for column, what in ((3, "period"), (4, "energy"), (5, "last angle"), (6, "last velocity")):
        with rf.Executor(transport="inline") as executor:
            app = ensemble.Ensemble(arguments(kernel="native", period_steps=64, steps=512), 0, 1, executor)
            honest = app.kernel

            @rf.kernel
            def off(params, members, out, honest=honest, column=column):
                honest(params, members, out=out)
                out[:, column] += 1e-4

            app.kernel = app.local = off
            split = app.split("here")
            app.prepare(0)
            split.Run()
            split.Free()
            assert f"the {what} of" in app.check(0)

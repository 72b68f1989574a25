"""thumbnails: the same ones in each mode and by any right way, and a verdict that finds each lie of a worker."""

from __future__ import annotations

import argparse
import json
import os
import signal
from fractions import Fraction
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import transports
from PIL import Image
from test_apps import mpiexec, needs_two_cores
from verdicts import first_failed, loaded

import rfaas_mpi as rf

APPS = Path(__file__).resolve().parent.parent / "apps"


@pytest.fixture(scope="module")
def thumbnails() -> Iterator[ModuleType]:
    with loaded("thumbnails") as module:
        module.PHOTOGRAPHS = ("chelsea.png", "coins.png")
        yield module


def arguments(**changed: object) -> argparse.Namespace:
    # The photographs are others after round 1.
    return argparse.Namespace(**{"repeat": 4, "kernel": "numpy", "remote": "split", "save": None, "seed": 1,
                                 "rounds": 2, **changed})


@needs_two_cores
@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_each_mode_makes_the_same_thumbnails(tmp_path, kernel):
    report, saved = tmp_path / "report.json", tmp_path / "saved.npz"
    modes = [word for mode in ("local", "remote", "split") for word in ("--mode", mode)]
    done = mpiexec(1, "thumbnails.py", "--repeat", 1, "--kernel", kernel, "--rounds", 2, *modes,
                   "--json", report, "--save", saved)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) >= {"local", "remote", "split"}
    assert done.stdout.index("verdict") < done.stdout.index("rate")
    with np.load(saved) as largest:
        assert len(largest.files) == 8
        assert largest["astronaut"].shape == (160, 160, 3) and largest["coins"].shape == (125, 160)
        assert all(largest[name].dtype == np.uint8 and np.ptp(largest[name]) > 100 for name in largest.files)


def test_ranks_share_the_windows(tmp_path):
    report = tmp_path / "report.json"
    done = mpiexec(2, "thumbnails.py", "--repeat", 1, "--rounds", 1, "--mode", "mpi", "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["config"]["ranks"] == 2


@needs_two_cores
@pytest.mark.parametrize("remote", ["map", "split"])
@pytest.mark.parametrize("over", transports.OVER)
def test_a_worker_that_was_killed_changes_no_thumbnail(thumbnails, over, remote):
    with transports.executor_over(over) as executor:
        app = thumbnails.Thumbnails(arguments(kernel="native", remote=remote), 0, 1, executor)
        pid = executor.submit(os.getpid).result()
        split = app.split("workers")
        for turn in range(3):
            app.prepare(turn)
            if turn == 1:
                os.kill(pid, signal.SIGKILL)
            split.Run()
            assert app.check(turn) == ""
        split.Free()


# --- pictures ------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(300, 451), (48, 97), (161, 40), (3, 200), (160, 160)], ids=str)
def test_three_ways_give_the_same_bits(thumbnails, size):
    picture = np.random.default_rng(4).integers(0, 256, (*size, 3), np.uint8)
    job = np.zeros((1, thumbnails.JOB), np.int64)
    job[0, :5] = 0, 3 * size[1], *size, 3
    native = thumbnails.common.compiled(APPS / "thumbnails.c", "thumbnails_shrink")
    one, other = np.empty((2, 1, sum(thumbnails.ROOMS)), np.uint8)
    thumbnails.shrink(picture.ravel(), job, out=one)
    native(picture.ravel(), job, out=other)
    assert np.array_equal(one, other)
    sums, begin = thumbnails.RunningSums(picture), 0
    for edge, room in zip(thumbnails.EDGES, thumbnails.ROOMS):
        small = sums.thumbnail(0, 0, *size, edge)
        assert np.array_equal(one[0, begin:begin + small.size], small.ravel())
        assert not one[0, begin + small.size:begin + room].any()
        begin += room


def test_a_pixel_is_the_mean_of_the_area_that_it_covers(thumbnails):
    picture = np.random.default_rng(5).integers(0, 256, (7, 100, 1), np.uint8)
    small = thumbnails.RunningSums(picture).thumbnail(0, 0, 7, 100, 48)
    assert small.shape == (3, 48, 1)
    for y, x in ((0, 0), (1, 17), (2, 47)):
        def covered(i: int, j: int, scale: Fraction) -> Fraction:
            return max(Fraction(0), min(Fraction(i + 1), (j + 1) * scale) - max(Fraction(i), j * scale))

        down, right = Fraction(7, 3), Fraction(100, 48)
        total = sum(covered(i, y, down) * covered(k, x, right) * int(picture[i, k, 0])
                    for i in range(7) for k in range(100))
        assert small[y, x, 0] == int(total / (down * right) + Fraction(1, 2))


def test_thumbnails_are_those_of_another_library_but_for_its_rounding(thumbnails):
    for picture in thumbnails.photographs().values():
        high, wide = thumbnails.scaled(*picture.shape[:2], 96)
        theirs = np.asarray(Image.fromarray(picture.squeeze()).resize((wide, high), Image.Resampling.BOX), int)
        ours = thumbnails.RunningSums(picture).thumbnail(0, 0, *picture.shape[:2], 96).squeeze()
        # A box takes whole pixels there: one is in or out, and not in by a part.
        assert np.abs(ours - theirs).mean() < 4


def test_no_two_windows_of_rounds_have_the_same_thumbnails(thumbnails):
    with rf.Executor(transport="inline") as executor:
        app = thumbnails.Thumbnails(arguments(), 0, 1, executor)
        found = [thumbnails.digest(app.expect(turn, row)) for turn in range(3) for row in range(len(app.rows))]
    assert len(app.rows) == 8 and len(set(found)) == len(found)


def test_the_windows_are_the_same_for_any_number_of_ranks(thumbnails):
    with rf.Executor(transport="inline") as executor:
        def windows(rank: int, ranks: int) -> list[tuple[int, ...]]:
            app = thumbnails.Thumbnails(arguments(), rank, ranks, executor)
            return [app.window(1, row) for row in range(len(app.rows))]

        assert windows(0, 3) + windows(1, 3) + windows(2, 3) == windows(0, 1)


def test_more_windows_than_there_are_are_refused(thumbnails):
    with rf.Executor(transport="inline") as executor, pytest.raises(SystemExit, match="--repeat <= 289"):
        thumbnails.Thumbnails(arguments(repeat=290), 0, 1, executor)


@pytest.mark.parametrize("changed", [
    {"HEIGHT": 400}, {"WIDTH": 1025}, {"CHANNELS": 4}, {"CHANNELS": 0}, {"OFFSET": 1 << 40}, {"OFFSET": -1},
    {"STRIDE": -1}, {"STRIDE": 1 << 60}, {"HEIGHT": 0}, {"HEIGHT": -1}], ids=str)
def test_the_native_kernel_refuses_windows_that_leave_the_photographs(thumbnails, changed):
    job = np.zeros((1, thumbnails.JOB), np.int64)
    job[0, :5] = 0, 300, 100, 100, 3
    native = thumbnails.common.compiled(APPS / "thumbnails.c", "thumbnails_shrink")
    out = np.empty((1, sum(thumbnails.ROOMS)), np.uint8)
    pixels = np.zeros(30_000, np.uint8)
    native(pixels, job, out=out)
    for name, value in changed.items():
        job[0, getattr(thumbnails, name)] = value
    with pytest.raises(rf.KernelError):
        native(pixels, job, out=out)


# --- lies ----------------------------------------------------------------------------------

def lying(lie: str, honest: rf.Kernel, marked: np.ndarray) -> rf.Kernel:
    """The thumbnails, but for what a worker of this kind does with a window.

    `marked`: the sizes, and the rows of photographs, of two.
    """
    plain = honest._function
    kept: dict[object, np.ndarray] = {}
    calls: dict[bytes, int] = {}
    spots = [bytes(spot) for spot in marked]

    @rf.kernel
    def shrink(pixels, jobs, out):
        if lie == "an older constant":
            pixels = kept.setdefault(("pixels", pixels.shape), pixels.copy())
        plain(pixels, jobs, out)
        # Offsets are the whole's or a photograph's own, and differ in each round; sizes are a photograph's.
        spot = jobs[0, 1:5].tobytes()
        call = calls[spot] = calls.get(spot, 0) + 1
        if spot not in spots:
            return
        match lie:
            case "a zeroed window" if call == 2:
                out[0].fill(0)
            case "two windows swapped" if call in (2, 3):
                # The second is given what the one before it was to be given.
                kept[call] = out[0].copy()
                out[0] = kept.get(call - 1, out[0, ::-1])
            case "the round before" if call % 4 == 2:
                out[0] = kept.setdefault("out", out[0].copy())
            case "a pixel off by one" if call == 2:
                # No byte could be as little off: a millionth of it is less than one.
                out[0, 4711] ^= 1
            case "a byte beyond" if call == 2:
                out[0, -1] = 1
    return shrink


@needs_two_cores
@pytest.mark.parametrize("remote", ["map", "split"])
@pytest.mark.parametrize("lie, first", [
    ("none", None), ("a zeroed window", 0), ("two windows swapped", 0), ("the round before", 1),
    ("an older constant", 2), ("a pixel off by one", 0), ("a byte beyond", 0)])
def test_a_worker_that_lies_fails_the_verdict(thumbnails, lie, first, remote):
    with rf.Executor(workers=1) as executor:
        app = thumbnails.Thumbnails(arguments(remote=remote), 0, 1, executor)
        app.prepare(0)
        app.kernel = lying(lie, app.kernel, app.jobs[:1, 1:5])
        found, problem = first_failed(app)
    assert found == first, problem


@needs_two_cores
def test_an_answer_for_another_window_fails_the_verdict(thumbnails):
    with rf.Executor(workers=1) as executor:
        app = thumbnails.Thumbnails(arguments(remote="map"), 0, 1, executor)
        items = app.items

        def wrong() -> object:
            for i, (pixels, job) in enumerate(items()):
                yield pixels, (job if i else np.add(job, [3, 0, 0, 0, 0, 0, 0, 0]))

        app.items = wrong
        assert first_failed(app)[1].startswith("1 answers are for no window")

"""transport: k = 1 where it is published to be 1, and a verdict that finds each lie of a worker."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import transports
from scipy.special import expn
from test_apps import mpiexec, needs_two_cores
from verdicts import first_failed

import rfaas_mpi as rf

APPS = Path(__file__).resolve().parent.parent / "apps"
SMALL = ("--batches", 64, "--histories", 20, "--generations", 6, "--skip", 2, "--sigma", 0.1)


@pytest.fixture(scope="module")
def transport() -> ModuleType:
    sys.path.insert(0, str(APPS))
    try:
        spec = importlib.util.spec_from_file_location("transport", APPS / "transport.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["transport"] = module       # which dataclasses look into
        spec.loader.exec_module(module)
        del sys.modules["transport"]            # so that kernels travel by value
        yield module
    finally:
        sys.path.remove(str(APPS))
        sys.modules.pop("common", None)


def arguments(**changed: object) -> argparse.Namespace:
    # The slab is another one after round 1.
    return argparse.Namespace(**{"batches": 32, "histories": 20, "generations": 6, "skip": 2, "sigma": 0.1,
                                 "kernel": "numpy", "seed": 1, "rounds": 2, **changed})


@needs_two_cores
@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_each_mode_gives_the_same_tallies(tmp_path, kernel):
    report = tmp_path / "report.json"
    modes = [word for mode in ("local", "remote", "split") for word in ("--mode", mode)]
    done = mpiexec(1, "transport.py", *SMALL, "--kernel", kernel, "--rounds", 2, "--bound", *modes, "--json", report)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert set(data["seconds"]) == {"local", "remote", "split", "bound"}
    assert done.stdout.index("verdict") < done.stdout.index("rate")


def test_ranks_share_the_batches_and_find_the_same_k(tmp_path):
    told = set()
    for ranks in (1, 2):
        report = tmp_path / f"{ranks}.json"
        done = mpiexec(ranks, "transport.py", *SMALL, "--batches", 63, "--rounds", 1, "--mode", "mpi", "--json", report)
        assert done.returncode == 0, done.stdout + done.stderr
        data = json.loads(report.read_text())
        assert data["config"]["ranks"] == ranks
        told.add(data["verdict"]["how"])
    assert len(told) == 1


@needs_two_cores
@pytest.mark.parametrize("over", transports.OVER)
def test_a_worker_that_was_killed_changes_no_tally(transport, over):
    with transports.executor_over(over) as executor:
        app = transport.Transport(arguments(kernel="native"), 0, 1, executor)
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

def test_the_published_slabs_are_critical_by_the_integral_equation_too(transport):
    """Collisions at x come from those at y by E1(|x - y|) / 2: cells' averages, whose error is of second order."""
    for slab in transport.SLABS:
        found = []
        for cells in (100, 200):
            width = 2 * slab.half * slab.total / cells
            e3 = expn(3, np.arange(cells + 1) * width)
            row = np.concatenate([[2 * width - 1 + 2 * e3[1]], e3[:-2] - 2 * e3[1:-1] + e3[2:]]) / (2 * width)
            index = np.arange(cells)
            reached = np.linalg.eigvalsh(row[np.abs(index[:, None] - index)])[-1]
            found.append(slab.nu * slab.fission * reached / (slab.total - slab.scatter * reached))
        assert found[1] == pytest.approx(1.0, abs=1e-5) and abs(found[1] - 1) < abs(found[0] - 1)


def test_k_is_one_within_three_sigma_and_sigma_is_small(transport):
    with rf.Executor(transport="inline") as executor:
        app = transport.Transport(arguments(kernel="native", rounds=1, batches=512, histories=None, generations=24,
                                            skip=6, sigma=5e-4), 0, 1, executor)
        split = app.split("here")
        for turn in range(2):
            app.prepare(turn)
            split.Run()
            app.sums[turn], _ = app.all_ranks(app.tallies)
            assert app.judged(turn) == ""
        split.Free()
    assert set(app.found) == {"PUa-1-0-SL", "PUb-1-0-SL"}


def test_a_slab_that_is_not_critical_fails_the_verdict(transport, monkeypatch):
    thick = transport.dataclasses.replace(transport.SLABS[0], half=1.05 * transport.SLABS[0].half)
    monkeypatch.setattr(transport, "SLABS", (thick, thick))
    with rf.Executor(transport="inline") as executor:
        app = transport.Transport(arguments(kernel="native", rounds=1, batches=128, histories=300), 0, 1, executor)
        split = app.split("here")
        app.prepare(0)
        split.Run()
        split.Free()
        assert "is not 1" in app.check(0)


def test_sigma_that_is_too_large_is_no_verdict(transport):
    with rf.Executor(transport="inline") as executor:
        app = transport.Transport(arguments(kernel="native", rounds=1, sigma=1e-5), 0, 1, executor)
        split = app.split("here")
        app.prepare(0)
        split.Run()
        split.Free()
        assert "is not good enough" in app.check(0)


def test_the_deviation_is_that_of_independent_batches(transport):
    random = np.random.default_rng(5)
    slab = transport.SLABS[0]
    factor = slab.nu * slab.fission / slab.total
    found, told = [], []
    for _ in range(400):
        neutrons = random.integers(80, 120, 100)
        collisions = random.poisson(neutrons * 1.25)
        n, c = neutrons.astype(object), collisions.astype(object)
        k, sigma = transport.criticality([100, n.sum(), c.sum(), n @ n, n @ c, c @ c], slab)
        found.append(k)
        told.append(sigma)
    assert np.mean(found) == pytest.approx(factor * 1.25, rel=2e-3)
    assert np.mean(told) == pytest.approx(np.std(found), rel=0.15)


# --- streams -------------------------------------------------------------------------------

def test_numpy_and_c_follow_the_same_neutrons(transport):
    with rf.Executor(transport="inline") as executor:
        tallies = []
        for kernel in ("numpy", "native"):
            app = transport.Transport(arguments(kernel=kernel), 0, 1, executor)
            split = app.split("here")
            app.prepare(0)
            split.Run()
            split.Free()
            tallies.append(app.tallies.copy())
    assert np.array_equal(*tallies)
    assert (tallies[0][:, transport.ALL] >= 20).all()


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_tallies_are_the_same_for_any_rows_and_ranks(transport, kernel):
    with rf.Executor(transport="inline") as executor:
        app = transport.Transport(arguments(kernel=kernel, batches=12), 0, 1, executor)
        key = app.key_of(3)
        whole, part = np.empty((12, 8), np.int64), np.empty((3, 8), np.int64)
        app.kernel(app.params[0], key, 0, 0, out=whole)
        for low, first in ((0, 0), (0, 5), (9, 0), (4, 3)):
            app.kernel(app.params[0], key, low, first, out=part)
            assert np.array_equal(part, whole[low + first:low + first + 3])


def test_streams_are_even_and_not_alike(transport):
    streams = transport.mix(np.uint64(transport.GAMMA) * np.arange(1, 20_001, dtype=np.uint64))
    state, first = transport.draw(streams)
    _, second = transport.draw(state)
    assert first.min() >= 0 and first.max() < 1
    # Six deviations of what independent even numbers show.
    assert abs(first.mean() - 1 / 2) < 6 / np.sqrt(12 * 20_000)
    for other in (second, np.roll(first, 1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 6 / np.sqrt(20_000)


# --- lies ----------------------------------------------------------------------------------

def lying(lie: str, honest: rf.Kernel) -> rf.Kernel:
    """The tallies, but for what a worker of this kind does with them."""
    plain = honest._function
    kept: dict[object, np.ndarray] = {}

    @rf.kernel
    def families(params, key, low, first, out):
        if lie == "an older constant":
            params = kept.setdefault("params", params.copy())
        match lie:
            case "swapped cells" if first in (8, 9):
                plain(params, key, low, 17 - first, out)
            case _:
                plain(params, key, low, first, out)
        match lie:
            case "a zeroed cell" if first == 8:
                out.fill(0)
            case "the round before" if first == 8:
                out[...] = kept.setdefault(first, out.copy())
            case "a tally off by one" if first == 8:
                # No float could be as little off: a millionth of these is less than one.
                out[0, 1] += 1
    return families


@needs_two_cores
@pytest.mark.parametrize("lie, first", [
    ("none", None), ("a zeroed cell", 0), ("swapped cells", 0), ("the round before", 1), ("an older constant", 2),
    ("a tally off by one", 0)])
def test_a_worker_that_lies_fails_the_verdict(transport, lie, first):
    with rf.Executor(workers=1) as executor:
        app = transport.Transport(arguments(), 0, 1, executor)
        app.kernel = lying(lie, app.kernel)
        found, problem = first_failed(app)
    assert found == first
    assert found is None or "are not the rank's own" in problem

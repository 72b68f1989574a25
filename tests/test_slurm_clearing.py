"""What is left on a node of a job is removed by whoever may, and by nobody who is disturbed at it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cluster import wait_until

from rfaas_mpi.slurm import run
from rfaas_mpi.slurm.facts import Until
from rfaas_mpi.slurm.layout import NodeLayout


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A job's on a node, with an agent's files."""
    (tmp_path / "job" / "n1").mkdir(parents=True)
    (tmp_path / "job" / "n1" / "socket").touch()
    return tmp_path / "job"


def test_what_a_killed_agent_left_is_removed(directory):
    assert run.clear(directory, "n1")
    assert not directory.exists()
    assert run.clear(directory, "n1"), "there is nothing to remove"


def test_what_is_the_jobs_own_stays_while_it_runs(directory):
    with run.held(directory):
        assert run.clear(directory, "n1")
        assert directory.exists() and not (directory / "n1").exists()


def test_what_a_living_agent_uses_stays(directory):
    with run.held(directory / "n1"):
        assert not run.clear(directory, "n1"), "it is to be tried again"
        assert (directory / "n1" / "socket").exists()


@pytest.mark.parametrize("first", [True, False], ids=["told before", "not told before"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_end_does_not_disturb_a_clean_up(first, number):
    done, before = [], signal.getsignal(number)

    def clean_up() -> None:
        os.kill(os.getpid(), number)
        done.append(True)
    with pytest.raises(SystemExit) if first else contextlib.nullcontext(), \
            run.told_to_end() as undisturbed, contextlib.ExitStack() as stack, undisturbed:
        stack.callback(clean_up)
        if first:
            os.kill(os.getpid(), number)
    assert done == [True]
    assert signal.getsignal(number) is before


# --- what `rfaas slurm run` has removed ---------------------------------------

# Agents serve at once, and end with status 9 when they are told to: at once, or at their input's end. Nodes are cleared as
# the files `clear-1`, `clear-2`, … say.
SRUN = """#!/bin/sh
cd {directory}
echo "$@" >>calls
case "$*" in
    *"slurm clear"*) cat "clear-$(grep -c 'slurm clear' calls)" ;;
    *) cat said; {until_then}; exit 9 ;;
esac
"""
NODES = {name: run.NodePlan((0, 1), "127.0.0.1", 1, 1, None) for name in ("n1", "n2")}
Start = Callable[..., run._Agents]


@pytest.fixture
def agents(tmp_path: Path, monkeypatch) -> Start:
    """Of two nodes, with an srun of the test's own."""
    def start(until_then: str, *cleared: str) -> run._Agents:
        (tmp_path / "srun").write_text(SRUN.format(directory=tmp_path, until_then=until_then))
        (tmp_path / "srun").chmod(0o755)
        (tmp_path / "said").write_bytes(b"".join(msgspec.json.encode(
            run.Said(layout=NodeLayout(name, ((0,),), (1,)), ready=name)) + b"\n" for name in NODES))
        for number, nodes in enumerate(cleared, 1):
            (tmp_path / f"clear-{number}").write_text(nodes)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(run, "EVERY_S", 0.01)
        plan = run.Plan("unix:/nowhere", str(tmp_path), b"", Until(None, 0.0), NODES)
        started = run._Agents(plan, tmp_path, False, os.environ)
        assert len(started.wait()) == 2
        return started
    return start


def clearings(tmp_path: Path) -> list[str]:
    return [line for line in (tmp_path / "calls").read_text().splitlines() if "slurm clear" in line]


def test_a_node_that_could_not_be_cleared_beside_the_ranks_is_cleared_later(agents, tmp_path):
    with agents("true", "n1\n", "", "n2\n") as started:
        wait_until(lambda: not started._watcher.is_alive(), "all nodes are clear")
    first, *later = clearings(tmp_path)
    assert "--nodes=2 " in first and "--nodelist" not in first
    assert len(later) == 2 and all("--nodes=1 --nodelist=n2 " in each for each in later)


def test_what_agents_leave_that_are_killed_as_they_end_is_removed_once(agents, tmp_path):
    started = agents("cat >/dev/null", "n1\n")
    started.close()
    started.close()
    assert len(clearings(tmp_path)) == 1
    assert started._watcher not in threading.enumerate()

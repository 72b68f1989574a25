"""Low priority is that of a worker's scheduling group, and is there before it runs anything."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid

import pytest

from rfaas_mpi.agent.priority import (
    NO_PRIORITY,
    Lowering,
    LowPriority,
    Means,
    can_be_had,
    lower_session,
    make_group,
    remove_stale_groups,
    session_can_be_lowered,
)

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="makes cgroups: needs root")


@root_only
def test_a_process_that_enters_a_group_is_in_it_with_all_that_it_starts():
    group = make_group(f"rfaas-test-{uuid.uuid4().hex[:8]}")
    assert group is not None
    try:
        assert (group.directory / group.means).read_text().strip() == ("2" if group.means is Means.SHARES else "1")
        code = "import os, sys; open(sys.argv[1], 'w').write('0'); os.execvp('cat', ['cat', '/proc/self/cgroup'])"
        done = subprocess.run([sys.executable, "-c", code, group.directory / "cgroup.procs"], capture_output=True,
                              text=True, timeout=60, check=True)
        assert f"/{group.directory.name}\n" in done.stdout
    finally:
        group.close()
        group.close()
    assert not group.directory.exists()


def fake(root, controllers: str, *files: str):
    """A hierarchy where groups have these files, as mkdir there makes them."""
    (root / "proc/self").mkdir(parents=True)
    point = root / "sys/fs/cgroup"
    (point / "low").mkdir(parents=True)
    kind = f"cgroup cgroup rw,{controllers}" if controllers else "cgroup2 cgroup2 rw"
    (root / "proc/self/mountinfo").write_text(f"30 1 0:30 / /sys/fs/cgroup rw - {kind}\n")
    return point


def test_where_groups_have_no_weight_none_is_made_and_nothing_is_left(tmp_path):
    point = fake(tmp_path, "cpu,cpuacct")
    assert make_group("x", tmp_path) is None
    assert not (point / "x").exists()


def test_without_the_cpu_controller_there_is_no_group(tmp_path):
    point = fake(tmp_path, "")
    (point / "cgroup.subtree_control").write_text("memory pids\n")
    assert make_group("x", tmp_path) is None


def test_what_could_be_had_is_told_without_making_anything(tmp_path):
    point = fake(tmp_path, "cpu,cpuacct")
    before = sorted(point.iterdir())
    assert can_be_had(tmp_path) == (Means.SHARES, f"a group below {point} (cgroup v1)")
    assert sorted(point.iterdir()) == before
    (point / "cpu.idle").write_text("0\n")
    assert can_be_had(tmp_path)[0] == Means.IDLE
    (tmp_path / "proc/self/mountinfo").write_text("")
    how, why = can_be_had(tmp_path)
    assert how is None and "cpu controller" in why and "sessions" in why
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/sched_autogroup_enabled").write_text("1\n")
    assert can_be_had(tmp_path)[0] == Means.AUTOGROUP


def test_what_could_be_had_on_version_2_is_read_off_a_group_that_is_there(tmp_path):
    point = fake(tmp_path, "")
    (point / "cgroup.subtree_control").write_text("cpu memory\n")
    assert can_be_had(tmp_path) == (Means.WEIGHT, f"a group below {point} (cgroup v2)")
    (point / "system.slice").mkdir()
    (point / "system.slice/cpu.idle").write_text("0\n")
    assert can_be_had(tmp_path)[0] == Means.IDLE


@pytest.mark.parametrize("groups, enabled, can", [
    ("1:cpu,cpuacct:/\n0::/\n", "1", True), ("1:cpu:/slurm/job_1\n0::/\n", "1", False), ("0::/\n", "1", True),
    ("0::/user.slice\n", "1", False), ("0::/\n", "0", False)])
def test_a_session_is_a_group_only_outside_of_all_cgroups(groups, enabled, can, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    (tmp_path / "proc/sys/kernel/sched_autogroup_enabled").write_text(f"{enabled}\n")
    assert session_can_be_lowered(tmp_path) is can


def test_whoever_leads_no_session_is_not_lowered_since_others_would_be_too():
    if os.getsid(0) != os.getpid():
        assert not lower_session()
    code = "import os; from rfaas_mpi.agent.priority import lower_session; print(lower_session())"
    forked = ["setsid", "--fork", "--wait", sys.executable, "-c", code]
    said = subprocess.run(forked, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    assert said == str(session_can_be_lowered())


def in_a_fork(*body) -> list[bool]:
    """What these say, one after another, in a forked process that leads a session of its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.write(writing, bytes(int(said()) for said in body))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answer:
        said = [bool(byte) for byte in answer.read()]
    os.waitpid(pid, 0)
    assert len(said) == len(body)
    return said


@root_only
def test_workers_enter_the_one_group_of_their_agent_and_the_agent_can_tell():
    lowering = Lowering()
    priority = lowering.priority
    try:
        assert priority.means is not None
        assert in_a_fork(lambda: priority.has(os.getpid()), priority.take, lambda: priority.has(os.getpid())) == [
            False, True, True]
        assert not priority.has(os.getpid())
    finally:
        lowering.close()
        lowering.close()
    assert priority.group not in remove_stale_groups(), "it was gone before"
    assert in_a_fork(priority.take) == [False], "its agent is gone"


def test_a_session_takes_low_priority_where_there_is_no_group():
    priority = LowPriority(Means.AUTOGROUP)
    assert in_a_fork(priority.take, lambda: priority.has(os.getpid())) == [session_can_be_lowered()] * 2
    assert in_a_fork(NO_PRIORITY.take, lambda: NO_PRIORITY.has(os.getpid())) == [False, False]


@root_only
def test_the_group_of_a_killed_agent_is_removed_by_the_next_one():
    code = ("import os; from rfaas_mpi.agent.priority import Lowering; "
            "print(Lowering().priority.group, flush=True); os.kill(os.getpid(), 9)")
    left = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True).stdout.strip()
    ours = Lowering()
    try:
        removed = remove_stale_groups()
        assert left in removed and ours.priority.group not in removed
        assert left not in remove_stale_groups()
    finally:
        ours.close()

"""A worker that takes more memory than it was granted fails its call with an error that says so, whatever bounds it."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import faults
import numpy as np
import pytest

from rfaas_mpi import Executor, KernelError
from rfaas_mpi.agent.memory import BASE_BYTES, MemoryGuard, held_bytes
from rfaas_mpi.errors import ServiceError

MIB = 1 << 20


def hold(size: int) -> None:
    data = bytearray(size)
    data[::4096] = b"x" * len(data[::4096])
    time.sleep(600)


def take_in_children(size: int) -> None:
    """Each is within its own limit; all of them together are not."""
    for _ in range(8):
        if os.fork() == 0:
            hold(size // 4)
    time.sleep(600)


def take_in_a_mapping(size: int) -> None:
    """Shared memory is nobody's private data."""
    with mmap.mmap(-1, size) as memory:
        for at in range(0, size, 4096):
            memory[at] = 1
    time.sleep(600)


def pid() -> int:
    return os.getpid()


@pytest.fixture(params=["cgroup", "watch"])
def ex(request, tmp_path, monkeypatch):
    if request.param == "cgroup" and MemoryGuard("auto").why_no_groups:
        pytest.skip(MemoryGuard("auto").why_no_groups)
    monkeypatch.setenv("RFAAS_MEMORY_LIMIT", request.param)
    with Executor(workers=1, memory_per_worker="128M", runtime_dir=str(tmp_path), linger_s=0.2) as executor:
        executor.means = request.param
        yield executor


def test_what_a_kernel_starts_counts_with_it(ex):
    before = ex.submit(pid).result()
    with pytest.raises(KernelError, match="memory.*134217728 bytes.*memory_per_worker"):
        ex.submit(take_in_children, 256 * MIB).result()
    after = ex.submit(pid).result()
    assert after != before and not faults.alive(before)
    assert not groups_of(before)


# An agent that looks can't tell it from the rank's arrays.
@pytest.mark.parametrize("ex", ["cgroup"], indirect=True)
def test_memory_that_is_shared_counts_in_a_control_group(ex):
    with pytest.raises(KernelError, match="memory.*134217728 bytes"):
        ex.submit(take_in_a_mapping, 400 * MIB).result()
    assert ex.submit(pid).result()


def groups_of(number: int) -> list[str]:
    try:
        with open(f"/proc/{number}/cgroup") as file:
            return [line for line in file if "rfaas" in line]
    except FileNotFoundError:
        return []


def test_memory_within_the_limit_is_nobodys_business(ex):
    array = np.ones(12 * MIB)         # 96 MiB, in the rank's memory
    for _ in range(3):
        assert ex.submit(len, bytes(20 * MIB)).result() == 20 * MIB
    assert ex.submit(np.sum, array).result() == 12 * MIB
    first = ex.submit(pid).result()
    assert ex.submit(len, bytes(20 * MIB)).result() == 20 * MIB and ex.submit(pid).result() == first


def test_workers_that_are_forked_when_they_are_ordered_are_in_their_groups_when_a_kernel_begins(
        tmp_path, monkeypatch):
    monkeypatch.setenv("RFAAS_MEMORY_LIMIT", "cgroup")       # the embedded service makes none by itself
    cores = tuple(sorted(os.sched_getaffinity(0))[:2])
    if MemoryGuard("auto").why_no_groups or len(cores) < 2:
        pytest.skip(MemoryGuard("auto").why_no_groups or "no second core")
    with Executor(workers=2, memory_per_worker="128M", runtime_dir=str(tmp_path), linger_s=0.2, lend="yes",
                  cores=cores) as two:
        groups = set(two.map(own_groups, range(8)))
    assert len(groups) == 2 and all(groups)


def own_groups(_: int) -> str:
    return "".join(groups_of(os.getpid()))


def test_who_has_not_entered_his_group_is_moved_there():
    with contextlib.closing(MemoryGuard("auto")) as guard:
        if guard.why_no_groups or guard.moves:
            pytest.skip(guard.why_no_groups or "processes are moved in version 2")
        zygote = SimpleNamespace(spawner=None, number=0)
        for fd in guard.expect(zygote, 7, 64 * MIB):
            os.close(fd)
        process = subprocess.Popen(["sleep", "600"])
        try:
            worker = SimpleNamespace(number=7, pid=process.pid, pidfd=-1, memory_bytes=64 * MIB, zygote=zygote)
            guard.begin(worker)
            assert not groups_of(process.pid)
            guard.check(worker)
            assert groups_of(process.pid)
            assert not guard.end(7)
            assert process.wait(30) == -9, "what is in a group ends with it"
        finally:
            process.kill()
            process.wait()


def test_the_group_of_a_worker_that_never_came_is_removed():
    with contextlib.closing(MemoryGuard("auto")) as guard:
        if guard.why_no_groups or guard.moves:
            pytest.skip(guard.why_no_groups or "processes are moved in version 2")
        before = set(os.listdir(guard._roots.memory))
        for fd in guard.expect(SimpleNamespace(spawner=None, number=0), 8, 64 * MIB):
            os.close(fd)
        assert {name for name in set(os.listdir(guard._roots.memory)) - before if f".{os.getpid()}." in name}
        assert not guard.end(8)
        assert not [name for name in os.listdir(guard._roots.memory) if f".{os.getpid()}." in name]


def test_what_bounds_memory_is_told(ex):
    from rfaas_mpi.session import Session
    with Session.open(ex._settings, on_event=None, start=False, observer=True) as session:
        told = session.status()["memory_limit"]
    assert told["means"] == ex.means and bool(told["why"]) == (ex.means == "watch")
    assert bool(groups_of(ex.submit(pid).result())) == (ex.means == "cgroup")


def test_a_limit_that_can_not_be_kept_is_refused_by_name(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("30 1 0:30 / /sys/fs/cgroup rw - cgroup cgroup rw,cpu\n")
    with pytest.raises(ServiceError, match="memory_limit=cgroup.*memory controller"):
        MemoryGuard("cgroup", root=tmp_path)
    guard = MemoryGuard("auto", root=tmp_path)
    assert guard.means == "watch" and "memory controller" in guard.status()["why"]


def test_what_is_held_is_counted_with_what_was_started(wait_until):
    code = ("import os, sys, time; data = bytearray(50 << 20)\n"
            "data[::4096] = b'x' * len(data[::4096])\n"
            "if os.fork() == 0: data[::4096] = b'y' * len(data[::4096])\n"
            "print(1, flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        process.stdout.readline(), process.stdout.readline()
        wait_until(lambda: 100 * MIB < held_bytes(process.pid) < 100 * MIB + 2 * BASE_BYTES, "both are counted")
    finally:
        os.killpg(process.pid, 9)
        process.communicate()
    assert held_bytes(process.pid) == 0

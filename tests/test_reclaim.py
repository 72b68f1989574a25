"""Cores that are wanted back: the rungs in their order, nothing left on a core that is said to be free, nothing lost."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rfaas_mpi.agent.core import AgentCore, Exit, Fork, Freed, Halt, Kill, Move, Page, Quit, Stopped, Tell
from rfaas_mpi.agent.reclaim import Clearing, threads
from rfaas_mpi.messages import Revoking

LEASE, OWNER, OTHER = 7, 100, 200
CORES = sorted(os.sched_getaffinity(0))


# --- the ladder, decided ---------------------------------------------------------------------

def serving(seats: int = 1, own_cores: tuple[int, ...] = (0,), low: bool = True) -> tuple[AgentCore, list[int]]:
    """An agent with core 0 of its own, and the workers of one lease, which are up, on the cores from 1 on."""
    core = AgentCore()
    core.own_cores = own_cores
    numbers, _ = core.start(LEASE, OWNER, {seat: (seat + 1,) for seat in range(seats)}, 1 << 20, now=0.0)
    for number in numbers.values():
        core.forked(number, 1000 + number)
        core.ready(number)
        if low:
            core.low(number)
    return core, list(numbers.values())


def rungs(actions: list) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_without_grace_ranks_are_told_then_all_workers_are_killed_then_moved():
    core, workers = serving(2)
    actions = core.stop(LEASE, [0, 1], "revoked", 0.0, 1.0)
    assert actions == [Tell((OWNER,), Revoking(LEASE, tuple(workers), "revoked", 0.0)), *map(Kill, workers),
                       *map(Move, workers)]


def test_with_grace_a_kernel_may_finish_before_it_is_killed():
    core, [worker] = serving()
    tell, quit_ = core.stop(LEASE, [0], "revoked", 0.5, 10.0)
    assert tell.event.grace_s == 0.5 and quit_ == Quit(worker)
    assert core.next_deadline(10.0) == 10.5
    assert core.tick(10.49) == []
    assert core.tick(10.5) == [Kill(worker), Move(worker)]
    assert core.tick(20.0) == []


def test_a_worker_that_ends_within_its_grace_is_not_killed():
    core, [worker] = serving()
    core.stop(LEASE, [0], "revoked", 0.5, 10.0)
    actions = core.ended(worker, Exit(), Page(), 10.1)
    assert [Freed(LEASE, 0, (1,)), Stopped(LEASE, 0)] == actions[-2:]
    assert core.tick(11.0) == []


def test_a_second_wish_can_only_shorten_the_grace():
    core, [worker] = serving()
    core.stop(LEASE, [0], "revoked", 5.0, 10.0)
    assert core.stop(LEASE, [0], "revoked", 9.0, 10.0) == []
    assert core.next_deadline(10.0) == 15.0
    assert core.stop(LEASE, [0], "revoked", 0.0, 11.0) == [Kill(worker), Move(worker)]


def test_beside_its_owner_a_worker_without_low_priority_is_stopped_first_and_has_no_grace():
    core, [worker] = serving(low=False)
    assert rungs(core.stop(LEASE, [0], "revoked", 0.5, 1.0, owned=True)) == ["Halt", "Tell", "Kill", "Move"]
    assert Halt(worker) in serving(low=False)[0].stop(LEASE, [0], "revoked", 0.5, 1.0, owned=True)


def test_beside_its_owner_a_worker_of_low_priority_has_its_grace():
    core, _ = serving(low=True)
    assert rungs(core.stop(LEASE, [0], "revoked", 0.5, 1.0, owned=True)) == ["Tell", "Quit"]


def test_where_nobody_waits_for_the_core_no_priority_is_needed_for_a_grace():
    core, _ = serving(low=False)
    assert rungs(core.stop(LEASE, [0], "revoked", 0.5, 1.0)) == ["Tell", "Quit"]


@pytest.mark.parametrize("own", [(), (1,)], ids=["none", "the worker's"])
def test_an_agent_without_a_core_of_its_own_kills_where_the_worker_is(own):
    core, [worker] = serving(own_cores=own)
    assert rungs(core.stop(LEASE, [0], "revoked", 0.0, 1.0)) == ["Tell", "Kill"]
    assert Freed(LEASE, 0, (1,)) in core.ended(worker, Exit(signal=9), Page(), 1.1)


def test_a_lease_that_was_given_back_is_not_told_of_and_its_workers_end_where_they_are():
    core, [worker] = serving()
    assert core.stop(LEASE, [0], "released", 0.0, 1.0) == [Kill(worker)]


def test_cores_that_are_wanted_while_a_released_worker_ends_are_taken_from_it():
    core, [worker] = serving()
    core.stop(LEASE, [0], "released", 0.3, 1.0)
    assert core.stop(LEASE, [0], "revoked", 0.0, 1.1) == [Kill(worker), Move(worker)]


def test_a_worker_that_was_killed_for_another_reason_still_leaves_its_core_at_once():
    core, [worker] = serving()
    core.kill(worker, LEASE, "cancel", 5, Page(invocation=5))
    assert rungs(core.stop(LEASE, [0], "revoked", 3.0, 1.0)) == ["Tell", "Move"]


def test_a_worker_that_has_no_process_yet_leaves_as_soon_as_it_has_one():
    core = AgentCore()
    core.own_cores = (0,)
    numbers, _ = core.start(LEASE, OWNER, {0: (1,)}, 0, 0.0)
    assert rungs(core.stop(LEASE, [0], "revoked", 0.0, 0.0)) == ["Tell"]
    assert set(rungs(core.forked(numbers[0], 55))) == {"Kill", "Move"}


def test_each_core_is_said_to_be_free_once_and_before_its_worker_is_gone():
    core, [worker] = serving()
    core.stop(LEASE, [0], "revoked", 0.0, 1.0)
    assert core.cleared(worker) == [Freed(LEASE, 0, (1,))]
    assert core.cleared(worker) == []
    actions = core.ended(worker, Exit(signal=signal.SIGKILL), Page(), 1.2)
    assert "Freed" not in rungs(actions) and Stopped(LEASE, 0) in actions


def test_a_core_that_was_not_cleared_is_free_once_its_worker_is_gone():
    core, [worker] = serving()
    core.stop(LEASE, [0], "revoked", 0.0, 1.0)
    actions = core.ended(worker, Exit(signal=signal.SIGKILL), Page(), 1.2)
    assert actions[-2:] == [Freed(LEASE, 0, (1,)), Stopped(LEASE, 0)]


def test_cores_of_workers_that_stay_are_never_said_to_be_free():
    core, [worker] = serving()
    assert core.cleared(worker) == []
    [fork] = [action for action in core.ended(worker, Exit(signal=11), Page(invocation=1), 1.0)
              if isinstance(action, Fork)]
    assert fork.cores == (1,)


def test_every_session_that_uses_a_worker_is_told_of_it_once():
    core, (first, second) = serving(2)
    core.attach(second, LEASE, OTHER)
    told = {session: tell.event.workers for tell in core.stop(LEASE, [0, 1], "revoked", 1.0, 1.0)
            if isinstance(tell, Tell) for session in tell.sessions if second in tell.event.workers}
    assert told == {OWNER: (second,), OTHER: (second,)}
    assert not any(isinstance(action, Tell) for action in core.stop(LEASE, [0, 1], "revoked", 0.0, 2.0))
    assert first != second


# --- real processes ----------------------------------------------------------------------------

SPINS = "while True: pass"
MANY_THREADS = """
import hashlib, threading
def spin():      # without the interpreter's lock
    together.wait()
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
together = threading.Barrier(64)
for _ in range(63): threading.Thread(target=spin, daemon=True).start()
spin()
"""
HOLDS_MEMORY = "import mmap; m = mmap.mmap(-1, 1 << 28); m[::4096] = b'x' * (1 << 16)\nwhile True: pass"
LEAVES_CHILDREN = """
import os
for detached in (False, True):
    if os.fork() == 0:
        if detached:
            os.setsid()
        if os.fork():
            os._exit(0)
        while True: pass
while True: pass
"""


@pytest.fixture
def spun() -> Iterator[object]:
    """spun(code): a process that leads a session of its own, pinned to the last core, and has printed nothing yet."""
    begun: list[subprocess.Popen] = []

    def start(code: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{CORES[-1]}}})\n{code}"],
                                   start_new_session=True)
        begun.append(process)
        return process

    yield start
    for process in begun:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass                      # nothing of it is left
        process.wait()


def may_run_on(pid: int, core: int) -> list[int]:
    """Threads of the process that have this core in their masks, as /proc tells, and have not ended."""
    found = []
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except (FileNotFoundError, ProcessLookupError):
            continue
        mask = int(lines["Cpus_allowed"].strip().replace(",", ""), 16)
        if mask >> core & 1 and lines["State"].split()[0] not in "ZX":
            found.append(int(status.parent.name))
    return found


def children_of(pid: int) -> set[int]:
    return {int(word) for task in Path(f"/proc/{pid}/task").iterdir()
            for word in task.joinpath("children").read_text().split()}


two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs a core to lend and one to keep")


@two_cores
@pytest.mark.parametrize("code, count", [(SPINS, 1), (MANY_THREADS, 64), (HOLDS_MEMORY, 1)],
                         ids=["a spinning one", "one of 64 threads", "one that holds memory"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_is_off_its_cores_at_once_and_for_ever(spun, wait_until, code, count, stopped):
    process = spun(code)
    wait_until(lambda: len(threads(process.pid)) >= count and may_run_on(process.pid, CORES[-1]) and
               not may_run_on(process.pid, CORES[0]), "it runs, on its core")
    if stopped:
        process.send_signal(signal.SIGSTOP)
    leaving = Clearing(process.pid, CORES[-1:], CORES[:1])
    try:
        assert leaving.cleared()
        assert len(may_run_on(process.pid, CORES[0])) >= count, "all of it is on the agent's core"
        process.kill()
        assert leaving.cleared()
        assert may_run_on(process.pid, CORES[-1]) == []
        assert process.wait(30) == -signal.SIGKILL
        assert leaving.cleared()
    finally:
        leaving.close()
        leaving.close()


@two_cores
def test_a_killed_process_ends_on_other_cores_than_its_own(spun, wait_until):
    process = spun(MANY_THREADS)
    wait_until(lambda: len(may_run_on(process.pid, CORES[-1])) == 64, "all of it runs")
    process.kill()
    leaving = Clearing(process.pid, CORES[-1:], CORES[:1])
    assert leaving.cleared()
    assert may_run_on(process.pid, CORES[-1]) == []
    leaving.close()


@two_cores
def test_what_a_process_started_and_left_behind_leaves_the_core_with_it(spun, wait_until):
    libc = ctypes.CDLL(None, use_errno=True)
    subreaper = 36
    assert libc.prctl(subreaper, 1, 0, 0, 0) == 0, "this process is what a zygote is to workers"
    left: set[int] = set()
    try:
        process = spun(LEAVES_CHILDREN)

        def ours() -> set[int]:
            return {pid for pid in children_of(os.getpid()) - {process.pid} if may_run_on(pid, CORES[-1])}
        wait_until(lambda: len(ours()) == 2, "both grandchildren lost their parents and came to us")
        left = ours()
        leaving = Clearing(process.pid, CORES[-1:], CORES[:1], parent=os.getpid())
        process.kill()
        assert leaving.cleared()
        assert not any(may_run_on(pid, CORES[-1]) for pid in left)
        for pid in left:
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        left = set()
        leaving.close()
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        libc.prctl(subreaper, 0, 0, 0, 0)

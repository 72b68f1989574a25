"""Cores that are wanted back: the rungs in their order, nothing left on a core that is said to be free, nothing lost."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
import tiny
from tiny import Rank

from rfaas_mpi import Executor
from rfaas_mpi import messages as msg
from rfaas_mpi.agent import reclaim
from rfaas_mpi.agent.core import AgentCore, Exit, Fork, Freed, Halt, Kill, Move, Page, Quit, Stopped, Tell
from rfaas_mpi.agent.reclaim import Clearing, started_by, threads
from rfaas_mpi.errors import ServiceError
from rfaas_mpi.messages import Revoking
from rfaas_mpi.session import Session

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


def test_a_worker_that_was_told_to_end_may_close_its_socket_first():
    core, [worker] = serving()
    core.stop(LEASE, [0], "revoked", 0.5, 10.0)
    assert core.cut_off(worker) == []
    assert core.tick(10.5) == [Kill(worker), Move(worker)]


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
    assert rungs(core.stop(LEASE, [0], "revoked", 0.0, 0.0)) == ["Tell", "Withdraw"]
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


def test_processes_that_start_each_other_are_found_however_deep_they_go(monkeypatch):
    deepest = 3 * sys.getrecursionlimit()
    monkeypatch.setattr(reclaim, "threads", lambda pid: [pid])
    monkeypatch.setattr(reclaim, "_children", lambda pid, _thread: [pid + 1] if pid < deepest else [])
    assert list(started_by(1)) == list(range(2, deepest + 1))
    assert list(started_by(1, but={4})) == [2, 3]


@two_cores
def test_what_a_process_started_and_left_behind_leaves_the_core_with_it(spun, wait_until):
    libc = ctypes.CDLL(None, use_errno=True)
    subreaper = 36
    assert libc.prctl(subreaper, 1, 0, 0, 0) == 0, "this process is what a zygote is to workers"
    left: set[int] = set()
    try:
        process = spun(LEAVES_CHILDREN)

        def came() -> bool:
            nonlocal left
            # Not whatever else this process has started, a database server say, which may run on any core.
            left = {pid for pid in children_of(os.getpid()) - {process.pid}
                    if may_run_on(pid, CORES[-1]) and not may_run_on(pid, CORES[0])}
            return len(left) == 2
        wait_until(came, "both grandchildren lost their parents and came to us")
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


# --- a service and its workers --------------------------------------------------------------------

@pytest.fixture
def small(tmp_path_factory, monkeypatch):
    """Workers serve lines instead of kernels."""
    monkeypatch.syspath_prepend(str(tiny.make_view(tmp_path_factory.mktemp("view"))))


@pytest.fixture
def rank(small) -> Iterator[Rank]:
    """With the last core lent, so that the service keeps the others to itself."""
    with Rank(tiny.settings(cores=CORES[-1:])) as rank:
        yield rank


def loops_in(rank: Rank, first: str = "") -> int:
    """The worker's pid; it runs a kernel that never ends."""
    line = rank.dial()
    pid = line.ask("os.getpid()")
    line.do(f"{first}; tiny.run(5); [0 for _ in iter(int, 1)]" if first else "tiny.run(5); [0 for _ in iter(int, 1)]")
    return pid


def running(rank: Rank) -> bool:
    return any(worker["running"] for worker in rank.session.status()["workers"])


@two_cores
@pytest.mark.parametrize("first", [
    "", "[__import__('threading').Thread(target=time.sleep, args=(600,), daemon=True).start() for _ in range(8)]",
    "os.fork() or time.sleep(600)", "os.kill(os.getpid(), signal.SIGSTOP)"],
    ids=["one that spins", "one with threads", "one with a child", "one that is stopped"])
def test_no_thread_of_a_worker_may_run_on_a_core_that_was_taken_back(rank, wait_until, first):
    line = rank.dial()
    pid = line.ask("os.getpid()")
    line.do(f"tiny.run(5); {first or 'None'}; [0 for _ in iter(int, 1)]")
    wait_until(lambda: running(rank), "the kernel runs")
    started = children_of(pid)
    assert rank.session.reclaim(CORES[-1:]).cores == tuple(CORES[-1:])
    assert not any(may_run_on(each, CORES[-1]) for each in {pid, *started})
    told = rank.events.wait(msg.WorkerEnded)
    assert (told.cause, told.reason) == ("infrastructure", "revoked")
    wait_until(lambda: not any(faults.alive(each) for each in {pid, *started}), "all of it has ended")


def test_ranks_are_told_before_their_worker_ends_and_that_the_lease_is_over(rank):
    loops_in(rank)
    rank.session.reclaim()
    rank.events.wait(msg.WorkerEnded)
    kinds = [type(event) for event in rank.events.seen if not isinstance(event, msg.Log)]
    assert kinds.index(msg.Revoking) < kinds.index(msg.WorkerEnded)
    assert rank.events.wait(msg.LeaseEnded).cause == "revoked"
    assert rank.events.wait(msg.Revoking).workers == (rank.worker,)


def test_the_memory_of_a_worker_is_free_once_its_end_is_told(rank, wait_until):
    line = rank.dial()
    pid = line.ask("os.getpid()")
    line.do("tiny.run(5); held = bytearray(1 << 28); [0 for _ in iter(int, 1)]")
    wait_until(lambda: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) > 1 << 15, "it holds 256 MiB")
    rank.session.reclaim()
    rank.events.wait(msg.WorkerEnded)
    assert not faults.alive(pid)


def test_a_kernel_that_goes_on_and_on_ends_with_its_grace(rank, wait_until):
    pid = loops_in(rank)
    wait_until(lambda: running(rank), "the kernel runs")
    rank.session.reclaim(grace_s=0.2)
    assert rank.events.wait(msg.Revoking).grace_s == 0.2
    assert rank.events.wait(msg.WorkerEnded).signal == signal.SIGKILL
    assert not faults.alive(pid)


def test_an_idle_worker_leaves_without_waiting_for_its_grace(rank):
    rank.dial().connection.close()
    rank.session.reclaim(grace_s=3600)
    assert rank.events.wait(msg.WorkerEnded).signal == 0


def test_beside_an_owner_a_worker_of_ordinary_priority_has_no_grace(rank, wait_until):
    loops_in(rank)
    wait_until(lambda: running(rank), "the kernel runs")
    rank.session.reclaim(grace_s=3600, owned=True)
    assert rank.events.wait(msg.WorkerEnded).signal == signal.SIGKILL


def test_nothing_ends_where_nothing_is_lent(rank):
    assert rank.session.reclaim([4095]).cores == (4095,)
    assert rank.dial().ask("1") == 1


@pytest.mark.parametrize("grace_s", [-1.0, float("inf"), 1e9])
def test_a_grace_that_makes_no_sense_is_an_error_and_takes_nothing(rank, grace_s):
    with pytest.raises(ValueError, match="grace"):
        rank.session.reclaim(grace_s=grace_s)
    request = msg.ReclaimRequest(next(rank.session._ids), grace_s=grace_s if grace_s > 1 and grace_s < 1e300 else -1.0)
    with pytest.raises(ServiceError, match="grace"):
        rank.session._ask(request, msg.Reclaimed)
    assert rank.dial().ask("1") == 1


def test_cores_that_were_taken_back_can_be_lent_again(rank):
    rank.session.reclaim()
    rank.events.wait(msg.WorkerEnded)
    assert rank.session.request(1, 1).workers


# --- what becomes of invocations --------------------------------------------------------------------

def over(executor: Executor) -> Session:
    """Another session with the executor's service."""
    return Session.open(executor._crew.lending.session.settings, start=False, observer=True)


def test_a_kernel_that_ends_within_the_grace_delivers_its_result(tmp_path, wait_until):
    with Executor(workers=1) as executor, over(executor) as owner:
        begun, flag = tmp_path / "begun", tmp_path / "flag"
        future = executor.submit(faults.begin_then_wait, begun, flag, 7)
        wait_until(begun.exists, "the kernel runs")
        pid = int(begun.read_text())
        taken = threading.Thread(target=owner.reclaim, kwargs={"grace_s": 60.0})
        taken.start()
        wait_until(lambda: not faults.worker_pids(executor), "the rank sends it nothing more")
        assert faults.alive(pid)
        flag.touch()
        assert future.result() == 7
        assert int(begun.read_text()) == pid, "it ran once"
        taken.join(60)
        wait_until(lambda: not faults.alive(pid), "the worker is gone")


@pytest.mark.parametrize("workers", [1, 2], ids=["on the rank", "elsewhere"])
def test_what_ran_on_cores_that_were_taken_back_runs_elsewhere(workers, wait_until):
    with Executor(workers=workers, cores=CORES[-workers:]) as executor, over(executor) as owner:
        futures = [executor.submit(slow_square, number) for number in range(40)]
        wait_until(lambda: any(future.done() for future in futures), "some ran")
        owner.reclaim(CORES[-1:])
        assert [future.result() for future in futures] == [number ** 2 for number in range(40)]


def slow_square(number: int) -> int:
    time.sleep(0.005)
    return number ** 2


# --- low priority ------------------------------------------------------------------------------------

@pytest.mark.skipif(os.geteuid() != 0, reason="makes cgroups: needs root")
def test_every_worker_is_of_low_priority_before_it_runs_anything_and_its_successor_too(small, wait_until):
    with Rank(tiny.settings(cores=CORES[-1:], low_priority="yes")) as rank:
        [facts] = rank.session.status()["workers"]
        line = rank.dial()
        group = line.ask("open('/proc/self/cgroup').read()")
        assert "/rfaas-low-" in group
        assert rank.session.status()["workers"][0]["low_priority"]
        assert rank.session.status()["low_priority"].startswith("cpu.")
        line.do("tiny.run(5); os._exit(1)")
        line = rank.dial(rank.events.wait(msg.WorkerReady).worker)
        assert line.ask("open('/proc/self/cgroup').read()") == group
        assert line.ask("__import__('subprocess').check_output(['cat', '/proc/self/cgroup'])").decode() == group
        assert facts["cores"] == CORES[-1:]
        name = next(part for text in group.splitlines() if (part := text.rpartition("/")[2]).startswith("rfaas-low-"))
    wait_until(lambda: not list(Path("/sys/fs/cgroup").glob(f"**/{name}")), "its service took the group with it")


@pytest.mark.skipif(os.geteuid() != 0, reason="makes cgroups: needs root")
def test_beside_an_owner_a_worker_of_low_priority_has_its_grace(small, wait_until, tmp_path):
    with Rank(tiny.settings(cores=CORES[-1:], low_priority="yes")) as rank:
        line = rank.dial()
        flag = tmp_path / "flag"
        line.do(f"tiny.run(5); [time.sleep(0.002) for _ in iter(lambda: os.path.exists({str(flag)!r}), True)]; "
                "tiny.idle(); os._exit(0)")
        wait_until(lambda: running(rank), "the kernel runs")
        taken = threading.Thread(target=rank.session.reclaim, kwargs={"grace_s": 60.0, "owned": True})
        taken.start()
        rank.events.wait(msg.Revoking)
        flag.touch()
        assert rank.events.wait(msg.WorkerEnded).signal == 0
        taken.join(60)

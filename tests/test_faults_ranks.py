"""Ranks that are killed, interrupted, forked or badly ended: their cores are free again, and nothing stays behind."""

from __future__ import annotations

import base64
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import faults
import numpy as np
import pytest

from rfaas_mpi import CancelledError, Executor
from rfaas_mpi.config import Settings
from rfaas_mpi.session import Session


@pytest.fixture
def watcher():
    """A session that sees what the service of these tests holds, and keeps it alive meanwhile."""
    with Session.open(Settings.load()) as session:
        yield session


def nothing_is_left(watcher: Session, pids: list[int], wait_until) -> None:
    """No worker, no core taken, no memory of ours but the service's own, and the next rank gets the cores."""
    wait_until(lambda: not any(faults.alive(pid) for pid in pids), "rank and workers are gone", 10)
    wait_until(lambda: watcher.status()["leases"] == [] and watcher.status()["workers"] == [], "no core is taken", 10)
    status = watcher.status()
    left = faults.memory_of([status["pid"], *(zygote["pid"] for zygote in status["zygotes"])])
    assert not {held for held in left if "arena" in held or "channel" in held or "door" in held}
    with Executor(workers=2, cores=(0, 1), lease_timeout_s=0) as again:
        assert list(again.map(faults.plus_one, range(10))) == list(range(1, 11))


# --- killed ---------------------------------------------------------------------------------

BUSY = """
ex = Executor(workers=2, cores=(0, 1))
x = ex.zeros(500_000)
"""


@pytest.mark.parametrize("state", ["idle", "looping", "streaming", "spinning"])
def test_a_killed_rank_leaves_nothing(watcher, wait_until, state):
    body = BUSY + {
        "idle": "say(os.getpid(), *faults.worker_pids(ex).values()); time.sleep(600)",
        "looping": "requests = [ex.Iinvoke(faults.loops, x, np.zeros(1)) for _ in range(50)]\n"
                   "say(os.getpid(), *faults.worker_pids(ex).values()); time.sleep(600)",
        "streaming": "say(os.getpid(), *faults.worker_pids(ex).values())\n"
                     "for _ in ex.map(faults.plus_one, iter(int, 1)): pass",
        "spinning": "say(os.getpid(), *faults.worker_pids(ex).values()); ex.Invoke(faults.loops, x, np.zeros(1))",
    }[state]
    with faults.rank(body) as other:
        pids = [int(word) for word in faults.line(other).split()]
        assert len(pids) == 3
        other.kill()
        nothing_is_left(watcher, pids, wait_until)


MOMENTS = {
    "joined": ("rfaas_mpi.session.Session", "request", "before"),
    "granted": ("rfaas_mpi.session.Session", "request", "after"),
    "dialled": ("rfaas_mpi.session.Session", "reach", "after"),
    "about to attach": ("rfaas_mpi.lending.Lending", "_attach", "before"),
    "attached": ("rfaas_mpi.lending.Lending", "_attach", "after"),
    "releasing": ("rfaas_mpi.session.Session", "release", "before"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_killed_while_it_gets_its_workers_leaves_nothing(watcher, wait_until, moment):
    where, name, when = MOMENTS[moment]
    body = f"""
        import importlib
        module, _, owner = {where!r}.rpartition(".")
        owner = getattr(importlib.import_module(module), owner)
        real = owner.{name}
        def last(*args, **kwargs):
            if {when!r} == "after":
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        owner.{name} = last
        with Executor(workers=2, cores=(0, 1)) as ex:
            ex.submit(faults.plus_one, 1).result()
        say("it lives")
        """
    done = faults.run(body)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
    nothing_is_left(watcher, [], wait_until)


def test_a_rank_killed_in_the_middle_of_a_handshake_leaves_nothing(watcher, wait_until):
    """At any moment between a rank's start and its first result, and some after."""
    body = """
        def end():
            time.sleep(float(sys.argv[1]))
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=end, daemon=True).start()
        while True:
            with Executor(workers=2, cores=(0, 1)) as ex:
                ex.submit(faults.plus_one, 1).result()
        """
    ranks = [subprocess.Popen(faults.command(body, delay), env=faults.environment(), stderr=subprocess.DEVNULL)
             for delay in (0.003, 0.007, 0.015, 0.03, 0.05, 0.08)]
    for other in ranks:
        assert other.wait(60) == -signal.SIGKILL
    nothing_is_left(watcher, [other.pid for other in ranks], wait_until)


# --- ends without shutdown ----------------------------------------------------------------------

ENDS = {
    "the end of the script": ("", 0, ""),
    "sys.exit": ("sys.exit(3)", 3, ""),
    "an exception": ("raise ValueError('my own mistake')", 1, "my own mistake"),
    "os._exit": ("os._exit(4)", 4, ""),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    "sys.exit inside with": ("with ex: sys.exit(3)", 3, ""),
    "sys.exit while a thread waits":
        ("threading.Thread(target=faults.swallow, args=[future.result], daemon=True).start(); sys.exit(3)", 3, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_rank_that_ends_without_shutdown_is_quiet_and_leaves_nothing(watcher, wait_until, end):
    action, status, says = ENDS[end]
    body = BUSY + f"""
future = ex.submit(time.sleep, 600)
request = ex.Iinvoke(faults.loops, x, np.zeros(1))
persistent = ex.Invoke_init(faults.adds_one, x, np.empty_like(x))
say(os.getpid(), *faults.worker_pids(ex).values())
{action}
"""
    done = faults.run(body)
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("Traceback", "  "))]
    assert lines == ([f"ValueError: {says}"] if says else [])
    nothing_is_left(watcher, [int(word) for word in done.stdout.split()], wait_until)


# --- Ctrl-C ----------------------------------------------------------------------------------------

WAITS = {
    "result": "ex.submit(faults.begin_then_wait, begun, flag, 5).result()",
    "Wait": "ex.Iinvoke(faults.fills_when, (faults.text(begun), faults.text(flag)), out).Wait()",
    "Invoke": "ex.Invoke(faults.fills_when, (faults.text(begun), faults.text(flag)), out)",
    "Waitall": "rfaas_mpi.Waitall([ex.Iinvoke(faults.fills_when, (faults.text(begun), faults.text(flag)), out)])",
    "Waitany": "rfaas_mpi.Waitany([ex.Iinvoke(faults.fills_when, (faults.text(begun), faults.text(flag)), out)])",
    "map": "list(ex.map(faults.begin_then_wait, [begun], [flag], [5]))",
    "shutdown": "ex.submit(faults.begin_then_wait, begun, flag, 5); ex.shutdown()",
}


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_interrupts_a_waiting_rank_and_not_its_worker(tmp_path, wait):
    """To the whole group, as a terminal sends it."""
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    body = f"""
        begun, flag = sys.argv[1:]
        out = np.zeros(3)
        ex = Executor(workers=1)
        try:
            {WAITS[wait]}
        except KeyboardInterrupt:
            say("interrupted")
        else:
            say("not interrupted")
        if {wait!r} == "shutdown":
            Path(flag).touch()
            ex.shutdown()
        else:
            say(*faults.worker_pids(ex).values())
            Path(flag).touch()
            say(ex.submit(os.getpid).result(), ex.Invoke(faults.adds_one, out, np.zeros(3)).shape)
            ex.shutdown()
        say("the end")
        """
    with faults.rank(body, begun, flag) as other:
        faults.wait_for(begun)
        worker = begun.read_text()
        os.killpg(other.pid, signal.SIGINT)
        assert faults.line(other) == "interrupted"
        if wait != "shutdown":
            assert faults.line(other) == worker
            assert faults.line(other) == f"{worker} (3,)"
        assert faults.line(other) == "the end"
        assert other.wait(60) == 0
        assert other.stderr.read() == ""


# --- two ranks on one worker -----------------------------------------------------------------------

JOIN = """
import base64
ex = Executor._join(pickle.loads(base64.b64decode(sys.argv[1])))
say("joined", *ex.workers)
"""


def joined(executor: Executor, body: str, *arguments: object):
    return faults.rank(JOIN + textwrap.dedent(body),
                       base64.b64encode(pickle.dumps(executor._grant)).decode(), *arguments)


def test_two_ranks_on_one_worker_are_both_right_and_one_killed_spares_the_other(wait_until):
    stream = """
        for n in range(10**9):
            assert ex.submit(faults.plus_one, n).result() == n + 1
            x = np.full(100, float(n))
            assert (ex.Invoke(faults.adds_one, x, np.zeros(100)) == n + 1).all()
            if n in (0, 200):
                say(n)
        """
    with Executor(workers=1) as executor:
        pids = faults.worker_pids(executor)
        for _ in range(3):
            with joined(executor, stream) as other:
                assert faults.line(other) == f"joined {executor.workers[0]}"
                assert faults.line(other) == "0"
                for n in range(300):
                    assert executor.submit(faults.plus_one, n).result() == n + 1
                    assert executor.Invoke(faults.adds_one, np.full(50, float(n)), np.zeros(50))[0] == n + 1
                assert faults.line(other) == "200"
                other.kill()
                other.wait()
                for n in range(300):
                    assert executor.submit(faults.plus_one, n).result() == n + 1
        assert faults.worker_pids(executor) == pids, "the worker served on"

        def connections() -> int:
            return sum(worker["connections"] for worker in executor._crew.lending.session.status()["workers"])
        wait_until(lambda: connections() == 1, "the killed ranks' connections are forgotten")
        [pid] = pids.values()
        wait_until(lambda: len(faults.memory_of([pid])) <= len(faults.memory_of([os.getpid()])) + 4,
                   "the worker let go of the killed ranks' memory")


def test_a_rank_killed_in_its_kernel_does_not_keep_its_neighbour_waiting(tmp_path):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    with Executor(workers=1) as executor:
        with joined(executor, """
                ex.submit(faults.begin_then_wait, *sys.argv[2:], 5)
                time.sleep(600)
                """, begun, flag) as other:
            faults.wait_for(begun)
            mine = [executor.submit(faults.plus_one, n) for n in range(20)]
            other.kill()
            flag.touch()
            assert [future.result() for future in mine] == list(range(1, 21))


def test_a_forced_cancel_by_one_rank_costs_its_neighbour_no_result(tmp_path):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    with Executor(workers=1) as executor:
        with joined(executor, """
                for n in range(20):
                    assert ex.submit(faults.plus_one, n).result() == n + 1
                x = np.ones(10)
                say("ready")
                faults.wait_for(sys.argv[2])
                request = ex.Iinvoke(faults.adds_one, x, np.zeros(10))
                say("behind")
                request.Wait()
                assert (request.out == 2).all()
                say("right", ex.submit(os.getpid).result())
                """, begun) as other:
            assert faults.line(other).startswith("joined")
            assert faults.line(other) == "ready"
            future = executor.submit(faults.begin_then_wait, begun, flag, 5)
            faults.wait_for(begun)
            before = int(begun.read_text())
            assert faults.line(other) == "behind"
            assert future.cancel(force=True)
            with pytest.raises(CancelledError):
                future.result()
            word, _, pid = faults.line(other).partition(" ")
            assert word == "right"
            assert int(pid) != before
        assert executor.submit(faults.plus_one, 1).result() == 2


# --- mpiexec ---------------------------------------------------------------------------------------

def test_mpiexec_returns_although_the_service_lingers_and_a_rank_without_a_worker_falls_back(tmp_path):
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    assert mpiexec, "the test extra brings mpich"
    script = tmp_path / "ranks.py"
    script.write_text(faults.PRELUDE + textwrap.dedent("""
        from mpi4py import MPI
        import warnings
        comm = MPI.COMM_WORLD
        assert comm.size == 2
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if comm.rank == 1:
                comm.Barrier()
            ex = Executor(workers=(0, 1))
            if comm.rank == 0:
                comm.Barrier()
            x = np.full(1000, float(comm.rank))
            for n in range(20):
                assert (ex.Invoke(faults.adds_one, x, np.zeros(1000)) == comm.rank + 1).all()
                assert ex.submit(faults.plus_one, n).result() == n + 1
            own = ex.submit(os.getpid).result() == os.getpid()
        facts = comm.gather((len(ex.workers), own, [str(w.message) for w in told]), root=0)
        comm.Barrier()
        if comm.rank == 0:
            (workers, own, told), (none, on_rank, warned) = facts
            assert (workers, own, told) == (1, False, []), facts
            assert (none, on_rank) == (0, True), facts
            assert len(warned) == 1 and "run on the rank" in warned[0], facts
            print(faults.service_pid(ex), flush=True)
        ex.shutdown()
        """))
    # It returns when everybody has closed its stdout: a service that had inherited it would keep it open.
    done = subprocess.run([mpiexec, "-n", "2", sys.executable, "-W", "error", str(script)], capture_output=True,
                          text=True, timeout=100, check=False,
                          env=faults.environment(RFAAS_CORES="1", RFAAS_LEASE_TIMEOUT_S="0.2", RFAAS_LINGER_S="20"))
    assert (done.returncode, done.stderr) == (0, "")
    service = int(done.stdout)
    assert faults.alive(service)
    with Session.open(Settings.load(), start=False, observer=True) as session:
        if session.service_pid == service:
            session.down()
    assert not faults.alive(service)

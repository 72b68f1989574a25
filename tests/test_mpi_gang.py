"""Communicators that lease for all of their ranks: what is promised inside a world is in mpi/gang_world.py.

What ends MPI, or a rank, has a world of its own. They share the runtime directory of
this test run, and so one service.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest
from mpi_launch import LIBRARIES, PRELUDE, World

from rfaas_mpi import Executor
from rfaas_mpi.session import Session

SOAK = "RFAAS_SOAK_GANG" in os.environ
# Who isn't heard of is missed sooner than by default.
HASTY = """
from rfaas_mpi import mpi
mpi._BEAT_S = 0.3
mpi._World._wait.__defaults__ = (mpi._SILENT_S,) = (2.5,)
"""
INSIDE = Path(__file__).parent / "mpi" / "gang_world.py"


@pytest.fixture(params=LIBRARIES)
def world(request) -> World:
    return World(request.param)


@pytest.fixture
def nothing_is_leased(wait_until):
    """Afterwards no lease is left, whoever died."""
    yield
    with Session.open(observer=True) as watcher:
        wait_until(lambda: not watcher.status()["leases"], "no lease is left")


@pytest.mark.parametrize(("library", "ranks"), [
    ("mpich", 1), ("openmpi", 2), ("mpich", 4), *[("openmpi", 1), ("mpich", 3), ("openmpi", 4)] * SOAK])
def test_ranks_lease_as_one(library, ranks):
    done = World(library).launch(ranks, [
        sys.executable, "-m", "pytest", "--with-mpi", "--noconftest", "-q", "--color=no", "-p", "no:cacheprovider",
        INSIDE])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed") == ranks, done.stdout
    assert ("skipped" in done.stdout) == (ranks == 1), done.stdout


def test_importing_the_package_has_nothing_to_do_with_mpi():
    program = """
import sys, rfaas_mpi, rfaas_mpi.executor, rfaas_mpi.mpi
from rfaas_mpi import Executor
try:
    Executor(comm=3)
except TypeError as error:
    assert "no communicator" in str(error)
assert "mpi4py" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], env=faults.environment(), check=True, timeout=60)


def test_mpi_that_has_not_begun_or_is_over_is_an_error(world):
    assert world.run(1, """
        MPI, COMM = comm_world(initialize=False)
        from rfaas_mpi import ConfigError
        def refused():
            try:
                Executor(comm=COMM, workers=1)
            except ConfigError as error:
                say(error)
        refused()
        MPI.Init()
        MPI.Finalize()
        refused()
        """) == ["MPI is finalized already; make the Executor before MPI.Finalize()",
                 "MPI is not initialized; call MPI.Init() (or MPI.Init_thread()) first"]


def test_the_main_thread_is_enough():
    assert World("mpich").run(2, """
        MPI, COMM = comm_world(thread_level="funneled")
        from rfaas_mpi import ConfigError
        def elsewhere():
            try:
                Executor(comm=COMM, workers=1)
            except ConfigError as error:
                say("main thread" in str(error))
        thread = threading.Thread(target=elsewhere)
        if MPI.Query_thread() == MPI.THREAD_FUNNELED:
            thread.start()
            thread.join()
        else:
            say(True)
        with Executor(comm=COMM, workers=1, cores=(0, 1)) as ex:
            say(ex.submit(k.add, 1, 1).result())
        """) == ["2", "2", "True", "True"]


@pytest.mark.usefixtures("nothing_is_leased")
def test_the_end_of_mpi_is_the_executors_end(world):
    assert world.run(2, """
        MPI, COMM = comm_world()
        from rfaas_mpi import ClosedError
        ex = Executor(comm=COMM, workers=1, cores=(0, 1))
        say(ex.submit(k.add, 1, 1).result())
        MPI.Finalize()
        try:
            ex.submit(k.add, 1, 1)
        except ClosedError:
            say("closed")
        ex.shutdown()
        """) == ["2", "2", "closed", "closed"]


@pytest.mark.usefixtures("nothing_is_leased")
def test_a_program_may_just_end(world):
    assert world.run(2, """
        MPI, COMM = comm_world()
        ex = Executor(comm=COMM, workers=1, cores=(0, 1))
        say(ex.submit(k.add, 1, 1).result())
        """) == ["2", "2"]


@pytest.mark.usefixtures("nothing_is_leased")
def test_a_rank_that_raises_takes_nobody_s_workers_along(world):
    done = world.launch(3, [sys.executable, "-c", PRELUDE + """
from mpi4py import MPI
with Executor(comm=MPI.COMM_WORLD, workers=1, cores=(0, 1)) as ex:
    ex.submit(k.pid).result()
    if MPI.COMM_WORLD.rank == 0:
        raise ValueError("on rank 0")
    say(sum(ex.map(k.add, range(100))))
"""])
    assert done.returncode != 0 and "on rank 0" in done.stderr
    assert done.stdout.split() == ["4950"] * 2, done.stdout + done.stderr


@pytest.mark.usefixtures("nothing_is_leased")
def test_a_rank_that_is_killed_takes_nobody_s_workers_along(tmp_path, wait_until):
    world = World("openmpi", goes_on=True)
    done = world.launch(3, [sys.executable, "-c", PRELUDE + """
from mpi4py import MPI
rank, here = MPI.COMM_WORLD.rank, Path(sys.argv[1])
def wait_for(*names):
    while not all((here / name).exists() for name in names):
        time.sleep(0.01)
ex = Executor(comm=MPI.COMM_WORLD, workers=1, cores=(0, 1), fallback=False)
ex.submit(k.pid).result()
(here / f"ready{rank}").touch()
if rank == 0:
    (here / "pid.new").write_text(str(os.getpid()))
    (here / "pid.new").rename(here / "pid")
    wait_for("ready1", "ready2")
    os.kill(os.getpid(), signal.SIGKILL)
wait_for("pid")
while Path("/proc", (here / "pid").read_text(), "exe").exists():
    time.sleep(0.01)
(here / f"sum{rank}").write_text(f"{sum(ex.map(k.add, range(100)))}.")
ex.shutdown()
os._exit(0)      # MPI has no end any more
""", tmp_path])
    for rank in (1, 2):
        wait_until(lambda said=tmp_path / f"sum{rank}": said.exists() and said.read_text() == "4950.",
                   f"rank {rank} has its workers: {done.stdout + done.stderr}")


@pytest.mark.usefixtures("nothing_is_leased")
@pytest.mark.parametrize(("library", "does"), [("mpich", "Lending.take"), ("openmpi", "Lending.__init__")])
def test_a_rank_that_stops_during_the_set_up_is_missed_however_long_the_others_may_wait(library, does):
    done = World(library).launch(3, [sys.executable, "-c", PRELUDE + HASTY + """
from mpi4py import MPI
from rfaas_mpi import ServiceError, lending
if MPI.COMM_WORLD.rank == 1:
    setattr(lending.Lending, sys.argv[1].split(".")[1], lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
try:
    Executor(comm=MPI.COMM_WORLD, workers=1, cores=(0, 1), lease_timeout_s=600.0, start_timeout_s=600.0)
except ServiceError as error:
    say("not heard of" in str(error))
    MPI.COMM_WORLD.Abort(3)
""", does])
    assert "True" in done.stdout, done.stdout + done.stderr


@pytest.mark.usefixtures("nothing_is_leased")
@pytest.mark.parametrize("dies", [0, 2])
def test_a_rank_that_is_killed_while_the_others_wait_for_a_grant_is_missed(dies):
    with Executor(workers=2, cores=(0, 1)) as holder:
        assert len(holder.workers) == 2
        done = World("openmpi", goes_on=True).launch(3, [sys.executable, "-c", PRELUDE + HASTY + """
from mpi4py import MPI
from rfaas_mpi import ServiceError, mpi
if MPI.COMM_WORLD.rank == int(sys.argv[1]):
    # All have come by then, and the others are about to ask or to wait for who does.
    mpi._at_finalize = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
try:
    Executor(comm=MPI.COMM_WORLD, workers=1, cores=(0, 1), lease_timeout_s=600.0)
except ServiceError as error:
    say("not heard of" in str(error))
os._exit(0)      # MPI has no end any more
""", dies])
        assert done.stdout.split() == ["True"] * 2, done.stdout + done.stderr


@pytest.mark.usefixtures("nothing_is_leased")
def test_a_rank_that_gets_stuck_is_named_by_the_others(world):
    done = world.launch(3, [sys.executable, "-c", PRELUDE + """
from mpi4py import MPI
from rfaas_mpi import ServiceError, lending, mpi
mpi._LATE_S = 0.5
if MPI.COMM_WORLD.rank == 1:
    lending.Lending.take = lambda *_: threading.Event().wait()
try:
    Executor(comm=MPI.COMM_WORLD, workers=1, cores=(0, 1), lease_timeout_s=0.1, start_timeout_s=2.0)
except ServiceError as error:
    say("rank 1 took longer" in str(error))
"""])
    assert done.stdout.split() == ["True"] * 3, done.stdout + done.stderr


@pytest.mark.usefixtures("nothing_is_leased")
def test_what_one_rank_fails_with_is_heard_by_those_that_still_connect(world):
    done = world.launch(3, [sys.executable, "-c", PRELUDE + """
from mpi4py import MPI
from rfaas_mpi import TransportError, lending
def fails(*_):
    raise TransportError("no way")
if MPI.COMM_WORLD.rank == 1:
    lending.Lending.take = fails
if MPI.COMM_WORLD.rank == 2:
    lending.Lending.take = lambda *_: threading.Event().wait()
try:
    Executor(comm=MPI.COMM_WORLD, workers=1, cores=(0, 1), lease_timeout_s=600.0, start_timeout_s=600.0)
except TransportError as error:
    say(MPI.COMM_WORLD.rank, "rank 1 failed" in str(error))
"""])
    assert sorted(done.stdout.splitlines()) == ["0 True", "1 False", "2 True"], done.stdout + done.stderr


def test_all_ranks_hear_the_same_of_one_that_takes_too_long():
    """Their clocks differ: one of them finds it too long before the others do."""
    assert World("mpich").run(3, """
        MPI, COMM = comm_world()
        from rfaas_mpi import ServiceError, mpi
        try:
            mpi._World(COMM).together(threading.Event().wait if COMM.rank == 0 else None, 0.1 if COMM.rank else 60.0)
        except ServiceError as error:
            say("rank 0 took longer" in str(error))
        """) == ["True"] * 3


SPLIT = """
from mpi4py import MPI
comm = MPI.COMM_WORLD
rank, here = comm.rank, Path(sys.argv[1])
def wait_for(*names):
    while not all((here / name).exists() for name in names):
        time.sleep(0.01)
x = np.arange(4000.0) + rank
y, expected = np.empty_like(x), np.sqrt(x) / 3
ex = Executor(comm=comm, workers=2, cores=(0, 1))
@rfaas_mpi.kernel
def roots(x, out):
    np.divide(np.sqrt(x), 3, out=out)
def right():
    y[:] = 0
    ex.Split(roots, x, y, grain=256, where="both")
    return (y == expected).all()
"""


def test_ranks_that_share_workers_split_to_the_same_bits_also_when_those_are_killed(world, tmp_path):
    assert world.run(4, SPLIT + """
before = [right() for _ in range(20)]
pid = ex.submit(os.getpid).result()
comm.Barrier()
if rank == 1 and pid != os.getpid():
    os.kill(pid, signal.SIGKILL)
say(all(before), all(right() for _ in range(50)))
comm.Barrier()
ex.shutdown()
""", tmp_path) == ["True True"] * 4


@pytest.mark.usefixtures("nothing_is_leased")
def test_a_rank_that_is_killed_in_the_midst_of_a_split_spoils_no_other_s(tmp_path, wait_until):
    done = World("openmpi", goes_on=True).launch(4, [sys.executable, "-c", PRELUDE + SPLIT + """
assert right()
(here / f"ready{rank}").touch()
wait_for(*(f"ready{other}" for other in range(4)))
if rank == 2:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
    (here / "pid.new").write_text(str(os.getpid()))
    (here / "pid.new").rename(here / "pid")
    while True:
        right()
wait_for("pid")
begun = all(right() for _ in range(20))
while Path("/proc", (here / "pid").read_text(), "exe").exists():
    begun &= right()
begun &= all(right() for _ in range(20))
(here / f"said{rank}").write_text(f"{begun}.")
ex.shutdown()
os._exit(0)      # MPI has no end any more
""", tmp_path])
    for rank in (0, 1, 3):
        wait_until(lambda said=tmp_path / f"said{rank}": said.exists() and said.read_text() == "True.",
                   f"rank {rank} has the right bits: {done.stdout + done.stderr}")

"""The service killed, stopped, ended or attacked: no call hangs, a new executor works, no core is lent twice."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import venv
from pathlib import Path

import faults
import numpy as np
import pytest

import rfaas_mpi
from rfaas_mpi import Executor, ServiceError, ServiceLost, Startall, Waitall
from rfaas_mpi.config import Settings
from rfaas_mpi.session import Session, service_directory

APIS = pytest.mark.parametrize("fallback", [True, False], ids=["fallback", "no fallback"])


def end(executor: Executor, how: str) -> None:
    """Ends the service under an executor."""
    pid = faults.service_pid(executor)
    if how == "rfaas down":
        done = subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "down"], env=faults.environment(),
                              capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    else:
        os.kill(pid, {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}[how])


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "rfaas down"])
@APIS
def test_calls_pending_at_the_services_end_end_on_the_rank_or_with_a_clear_error(tmp_path, how, fallback):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    executor = Executor(workers=2, cores=(0, 1), fallback=fallback)
    workers = faults.worker_pids(executor).values()
    xs, outs = executor.full((40, 30), 1.0), executor.zeros((40, 30))
    persistent = [executor.Invoke_init(faults.adds_one, xs[n], outs[n]) for n in range(40)]
    held = [executor.submit(faults.begin_then_wait, begun, flag, 5) for _ in range(2)]
    faults.wait_for(begun)
    futures = [executor.submit(faults.plus_one, n) for n in range(100)]
    requests = [executor.Iinvoke(faults.adds_one, np.full(9, float(n)), np.zeros(9)) for n in range(100)]
    Startall(persistent)
    called: list[int] = []
    for n, future in enumerate(futures):
        future.add_done_callback(lambda _, n=n: called.append(n))
    end(executor, how)
    if fallback:
        flag.touch()
        assert [future.result() for future in held] == [5, 5]
        assert [future.result() for future in futures] == list(range(1, 101))
        assert Waitall(requests)
        assert Waitall(persistent)
        assert (outs == 2).all()
        assert [request.out[0] for request in requests] == list(range(1, 101))
        assert list(executor.map(faults.plus_one, range(20))) == list(range(1, 21))
    else:
        for wait in [future.result for future in (*held, *futures)] + [r.Wait for r in (*requests, *persistent)]:
            with pytest.raises(ServiceLost, match="make a new Executor"):
                wait()
        with pytest.raises(ServiceLost):
            executor.Invoke(faults.adds_one, np.ones(3), np.zeros(3))
    executor.shutdown()
    assert sorted(called) == list(range(100)), "each callback was called once"
    assert not any(faults.alive(pid) for pid in workers)
    with Executor(workers=2, cores=(0, 1)) as again:
        assert list(again.map(faults.plus_one, range(20))) == list(range(1, 21))
        assert faults.service_pid(again) != 0


def test_eight_threads_that_wait_when_the_service_is_killed_all_return(tmp_path):
    executor = Executor(workers=1)
    ready = threading.Barrier(9)

    def call(number: int) -> list[int]:
        ready.wait()
        found = list(executor.map(faults.plus_one, range(500)))
        out = np.zeros(5)
        for n in range(200):
            assert (executor.Invoke(faults.adds_one, np.full(5, float(n)), out) == n + 1).all()
        return found
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(call, number) for number in range(8)]
        ready.wait()
        end(executor, "SIGKILL")
        for found in calls:
            assert found.result(60) == list(range(1, 501))
    executor.shutdown()


def test_a_stopped_service_is_not_on_the_path_of_a_call(tmp_path):
    executor = Executor(workers=1)
    executor.submit(faults.plus_one, 1).result()
    pid = faults.service_pid(executor)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert list(executor.map(faults.plus_one, range(1000))) == list(range(1, 1001))
        assert (executor.Invoke(faults.adds_one, executor.zeros(9), np.zeros(9)) == 1).all()
    finally:
        os.kill(pid, signal.SIGCONT)
    executor.shutdown()


@pytest.mark.parametrize("when", ["while it starts", "while it is joined"])
def test_a_service_killed_while_executors_start_costs_at_most_an_error(when):
    """Many ranks at once, and somebody who kills every service that he finds."""
    body = """
        import warnings
        warnings.simplefilter("ignore")
        for _ in range(4):
            try:
                with Executor(workers=(0, 2), cores=(0, 1)) as ex:
                    assert ex.submit(faults.plus_one, 1).result() == 2
            except rfaas_mpi.RFaaSError as error:
                assert isinstance(error, (rfaas_mpi.ServiceError, rfaas_mpi.TransportError)), repr(error)
        """
    directory = service_directory(Settings.load())
    ranks = [subprocess.Popen(faults.command(body), env=faults.environment(), stderr=subprocess.PIPE, text=True)
             for _ in range(3)]
    kills = 0
    while kills < 6 and any(other.poll() is None for other in ranks):
        try:
            pid = int((directory / "life.lock").read_text())
        except (FileNotFoundError, ValueError):
            continue
        if when == "while it is joined" and not (directory / "socket").exists():
            continue
        if faults.alive(pid) and str(directory) in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
            kills += 1
    for other in ranks:
        _, error = other.communicate(timeout=90)
        assert other.returncode == 0, error
    assert kills
    with Executor(workers=1) as executor:
        assert executor.submit(faults.plus_one, 1).result() == 2


# --- two at once ------------------------------------------------------------------------------------

def other_python(tmp_path: Path) -> str:
    """An interpreter of another virtual environment that finds the same packages."""
    home = tmp_path / "other"
    venv.create(home, with_pip=False, symlinks=True)
    [site] = home.glob("lib/python*/site-packages")
    found = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site / "same.pth").write_text("\n".join([str(Path(rfaas_mpi.__file__).parent.parent), *found]) + "\n")
    return str(home / "bin" / "python")


def other_version(tmp_path: Path) -> str:
    """A directory with this package as another version of it."""
    package = tmp_path / "view" / "rfaas_mpi"
    package.mkdir(parents=True)
    for entry in Path(rfaas_mpi.__file__).parent.iterdir():
        if entry.name not in ("_version.py", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "_version.py").write_text('__version__ = "99.1.2"\n')
    return str(package.parent)


@pytest.mark.parametrize("kind", ["virtual environment", "package version", "Slurm job"])
def test_two_services_of_one_user_never_lend_the_same_core(tmp_path, kind):
    body = """
        ex = Executor(workers=(0, 2), cores=(0, 1), lease_timeout_s=0)
        cores = sorted(core for lease in ex._crew.lending.grant.leases for w in lease.workers for core in w.cores)
        assert ex.submit(faults.plus_one, 1).result() == 2
        say(faults.service_pid(ex), rfaas_mpi.__version__, sys.prefix, cores)
        sys.stdin.readline()
        """
    python, changes = sys.executable, {}
    match kind:
        case "virtual environment":
            python = other_python(tmp_path)
        case "package version":
            changes = {"PYTHONPATH": os.pathsep.join([other_version(tmp_path), str(faults.TESTS)])}
        case "Slurm job":
            changes = {"SLURM_JOB_ID": "4711", "SLURM_NODEID": "0"}
    with Executor(workers=1, cores=(0, 1)) as executor:
        [lease] = executor._crew.lending.grant.leases
        [mine] = lease.workers
        script = ["-W", "ignore", *faults.command(body)[3:]]
        for workers in (executor, None):
            if workers is None:
                executor.shutdown()
            other = subprocess.Popen([python, *script], env={**faults.environment(), **changes}, cwd=tmp_path,
                                     text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            with other:
                service, version, prefix, cores = faults.line(other).split(maxsplit=3)
                assert int(service) != faults.service_pid(executor)
                assert (version != rfaas_mpi.__version__) == (kind == "package version")
                assert (prefix != sys.prefix) == (kind == "virtual environment")
                lent = {0, 1} - set(mine.cores) if workers is not None else {0, 1}
                assert cores == str(sorted(lent))
                other.communicate("end\n", timeout=60)
                assert other.returncode == 0


# --- what lies in the runtime directory -----------------------------------------------------------------

def test_files_that_a_killed_service_left_harm_nobody(tmp_path):
    with Executor(workers=1) as executor:
        directory = service_directory(Settings.load())
        os.kill(faults.service_pid(executor), signal.SIGKILL)
    assert (directory / "socket").exists()
    assert (directory / "life.lock").exists()
    with Executor(workers=1) as executor:
        assert executor.submit(faults.plus_one, 1).result() == 2


@pytest.mark.parametrize("trouble", ["a damaged store", "a socket that is a file", "a lock with nonsense"])
def test_damaged_files_in_the_runtime_directory_harm_nobody(tmp_path, monkeypatch, trouble):
    monkeypatch.setenv("RFAAS_RUNTIME_DIR", str(Path(os.environ["RFAAS_RUNTIME_DIR"]) / trouble.replace(" ", "")[:20]))
    directory = service_directory(Settings.load())
    match trouble:
        case "a damaged store":
            (directory / "store.db").write_bytes(b"no database" * 1000)
        case "a socket that is a file":
            (directory / "socket").write_text("no socket")
        case "a lock with nonsense":
            (directory / "life.lock").write_text("no number")
    with Executor(workers=1, linger_s=0.2) as executor:
        assert executor.submit(faults.plus_one, 1).result() == 2


@pytest.mark.parametrize("trouble", ["a link", "a file", "open to others", "not ours"])
def test_a_runtime_directory_that_others_could_change_is_refused_by_name(tmp_path, monkeypatch, trouble):
    given = tmp_path / "given"
    match trouble:
        case "a link":
            (tmp_path / "real").mkdir(0o700)
            given.symlink_to(tmp_path / "real")
        case "a file":
            given.write_text("")
        case "open to others":
            given.mkdir()
            given.chmod(0o770)
        case "not ours" if os.geteuid() == 0:
            given.mkdir()
            os.chown(given, 12345, 12345)
        case "not ours":
            given = Path("/usr")
    monkeypatch.setenv("RFAAS_RUNTIME_DIR", str(given))
    with pytest.raises(ServiceError, match=str(given)):
        Executor(workers=1)


@pytest.mark.parametrize("trouble", ["a link", "not ours"])
def test_the_directory_of_a_service_inside_an_honest_one_is_checked_too(tmp_path, monkeypatch, trouble):
    """Somebody who could write there once, through a mistake since corrected."""
    given = tmp_path / "given"
    given.mkdir(0o700)
    monkeypatch.setenv("RFAAS_RUNTIME_DIR", str(given))
    directory = service_directory(Settings.load())
    directory.rmdir()
    if trouble == "a link" or os.geteuid() != 0:
        (tmp_path / "elsewhere").mkdir()
        directory.symlink_to(tmp_path / "elsewhere")
    else:
        directory.mkdir()
        os.chown(directory, 12345, 12345)
    with pytest.raises(ServiceError, match=str(directory)):
        Executor(workers=1)


def test_an_impostor_who_listens_on_the_services_socket_is_told_apart(tmp_path, monkeypatch):
    """A process of this user that speaks another protocol: an error, not a hang."""
    monkeypatch.setenv("RFAAS_RUNTIME_DIR", str(Path(os.environ["RFAAS_RUNTIME_DIR"]) / "imp"))
    directory = service_directory(Settings.load())
    body = """
        import socket
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(sys.argv[1])
            listener.listen()
            say("listens")
            while True:
                connection, _ = listener.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request" * 10)
        """
    with faults.rank(body, directory / "socket") as impostor:
        assert faults.line(impostor) == "listens"
        with pytest.raises(ServiceError, match="protocol"):
            Executor(workers=1)
    (directory / "socket").unlink()
    with Session.open(Settings.load(linger_s=0.2)) as session:
        assert session.service_pid

"""Joining and starting the service: where its files are, who is let in, and what a rank is told when it fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
import tiny
from tiny import Rank, other_rank

from rfaas_mpi import messages as msg
from rfaas_mpi import session as session_module
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import (
    AuthError,
    ClosedError,
    ConfigError,
    ForkedError,
    NestedError,
    NoService,
    ServiceError,
    ServiceLost,
    TransportError,
    VersionMismatch,
)
from rfaas_mpi.session import FileLock, Session, runtime_directory, service_directory, service_key


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> Path:
    return tiny.make_view(tmp_path_factory.mktemp("view"))


@pytest.fixture(autouse=True)
def tiny_workers(view, monkeypatch):
    monkeypatch.syspath_prepend(str(view))


@pytest.fixture(scope="module")
def shared():
    return tiny.settings()


# --- settings -----------------------------------------------------------------------

def test_an_argument_wins_over_the_environment_and_that_over_the_default():
    environment = {"RFAAS_LINGER_S": "7", "RFAAS_SPIN_US": "5"}
    chosen = Settings.load(environment, linger_s=3.0)
    assert (chosen.linger_s, chosen.spin_us, chosen.slots) == (3.0, 5, Settings().slots)


@pytest.mark.parametrize(("variable", "text"), [
    ("RFAAS_LINGER_S", "-1"), ("RFAAS_SLOTS", "1"), ("RFAAS_SLOTS", "many"), ("RFAAS_LEND", "perhaps"),
    ("RFAAS_CORES", "3-1"), ("RFAAS_SLOT_BYTES", "16 parsecs"), ("RFAAS_TRANSPORT", "pigeon"),
    ("RFAAS_FALLBACK", "maybe"), ("RFAAS_LINGER_S", "nan")])
def test_an_impossible_setting_names_its_variable(variable, text):
    with pytest.raises(ConfigError, match=variable):
        Settings.load({variable: text})


def test_a_misspelt_setting_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'linger_s'"):
        Settings.load({}, linger=1)


@pytest.mark.parametrize(("text", "size"), [("1024", 1024), ("16k", 16384), ("0.5 MiB", 1 << 19), ("1M", 1 << 20)])
def test_sizes_have_units(text, size):
    assert Settings.load({"RFAAS_SLOT_BYTES": text}).slot_bytes == size


def test_cores_are_a_list():
    assert Settings.load({"RFAAS_CORES": "0-2,7"}).cores == (0, 1, 2, 7)
    assert Settings.load({}, cores=[1, 3]).cores == (1, 3)


# --- runtime files --------------------------------------------------------------------

def directory_with(monkeypatch, **environment) -> Path:
    for name in ("RFAAS_RUNTIME_DIR", "XDG_RUNTIME_DIR", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return runtime_directory(Settings.load())


FALLBACK = Path(f"/tmp/rfaas-{os.geteuid()}")


def test_the_users_runtime_directory_is_used(monkeypatch, tmp_path):
    tmp_path.chmod(0o700)
    found = directory_with(monkeypatch, XDG_RUNTIME_DIR=tmp_path, HOME="/nonexistent")
    assert found == tmp_path / "rfaas" and found.stat().st_mode & 0o777 == 0o700


def test_runtime_files_are_never_in_the_home_directory(monkeypatch, tmp_path):
    inside = tmp_path / "run"
    inside.mkdir(0o700)
    assert directory_with(monkeypatch, XDG_RUNTIME_DIR=inside, HOME=tmp_path) == FALLBACK


@pytest.mark.parametrize("trouble", ["missing", "open to others", "a file", "a link", "too long"])
def test_an_unusable_xdg_runtime_dir_is_passed_over(monkeypatch, tmp_path, trouble):
    xdg = tmp_path / "xdg"
    match trouble:
        case "open to others":
            xdg.mkdir()
            xdg.chmod(0o777)
        case "a file":
            xdg.write_text("")
        case "a link":
            (tmp_path / "real").mkdir(0o700)
            xdg.symlink_to(tmp_path / "real")
        case "too long":
            xdg = tmp_path / ("x" * 100)
            xdg.mkdir(0o700)
    assert directory_with(monkeypatch, XDG_RUNTIME_DIR=xdg, HOME="/nonexistent") == FALLBACK


def test_a_given_directory_wins_and_is_made(monkeypatch, tmp_path):
    given = Path(f"/tmp/rfaas-t{os.getpid()}")
    try:
        assert directory_with(monkeypatch, RFAAS_RUNTIME_DIR=given, XDG_RUNTIME_DIR=tmp_path) == given
        assert given.stat().st_mode & 0o777 == 0o700
    finally:
        given.rmdir()


def test_a_given_directory_that_is_too_long_for_a_socket_is_replaced_and_kept_apart(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    assert directory_with(monkeypatch, RFAAS_RUNTIME_DIR=long) == FALLBACK
    one = service_key(Settings.load())
    monkeypatch.setenv("RFAAS_RUNTIME_DIR", str(long) + "y")
    assert service_key(Settings.load()) != one


@pytest.mark.parametrize("trouble", ["a link", "a file", "open to others", "not ours"])
def test_a_given_directory_that_others_could_change_is_refused(monkeypatch, tmp_path, trouble):
    given = tmp_path / "given"
    match trouble:
        case "a link":
            (tmp_path / "real").mkdir(0o700)
            given.symlink_to(tmp_path / "real")
        case "a file":
            given.write_text("")
        case "open to others":
            given.mkdir()
            given.chmod(0o777)
        case "not ours":
            if os.geteuid() != 0:
                given = Path("/etc")
            else:
                given.mkdir()
                os.chown(given, 12345, 12345)
    with pytest.raises(ServiceError, match=str(given)):
        directory_with(monkeypatch, RFAAS_RUNTIME_DIR=given)


def test_what_keeps_services_apart_is_in_the_key(monkeypatch):
    base = service_key(Settings())
    keys = {base}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "1")
        keys.add(service_key(Settings()))
        patch.setenv("SLURM_JOB_ID", "2")
        keys.add(service_key(Settings()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "prefix", "/another/venv")
        keys.add(service_key(Settings()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "__version__", "99.0.0")
        keys.add(service_key(Settings()))
    assert len(keys) == 5 and service_key(Settings()) == base


def test_a_lock_on_a_file_that_was_replaced_is_no_lock(tmp_path):
    path = tmp_path / "lock"
    with FileLock(path) as first:
        assert first.take()
        path.unlink()
        with FileLock(path) as second:
            assert second.take()
        assert path.exists()


# --- joining ----------------------------------------------------------------------------

def test_many_ranks_at_once_share_one_service(view, shared):
    found, errors = [], []

    def join() -> None:
        try:
            with Session.open(shared) as session:
                found.append(session.service_pid)
                barrier.wait(30)
        except BaseException as error:
            errors.append(error)

    barrier = threading.Barrier(12)
    threads = [threading.Thread(target=join) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(found) == 12 and len(set(found)) == 1


def test_many_processes_at_once_start_one_service(view):
    chosen = tiny.settings(linger_s=5)
    body = "s = Session.open(settings); say(s.service_pid); sys.stdin.read()"
    with (other_rank(view, chosen, body) as a, other_rank(view, chosen, body) as b, other_rank(view, chosen, body) as c,
          other_rank(view, chosen, body) as d):
        pids = {int(process.stdout.readline()) for process in (a, b, c, d)}
    assert len(pids) == 1
    os.kill(pids.pop(), signal.SIGTERM)


def test_a_socket_left_by_a_killed_service_is_replaced():
    chosen = tiny.settings()
    with Session.open(chosen) as session:
        first = session.service_pid
        os.kill(first, signal.SIGKILL)
        assert (service_directory(chosen) / "socket").exists()
    with Session.open(chosen) as session:
        assert session.service_pid != first and session.status()["pid"] == session.service_pid


def test_joining_while_the_last_service_leaves_always_works():
    chosen = tiny.settings().with_(linger_s=0.0)
    for _ in range(8):
        with Session.open(chosen) as session:
            assert session.status()["pid"] == session.service_pid


def test_a_rank_without_a_service_starts_none_when_told_so():
    with pytest.raises(NoService, match="no service runs"):
        Session.open(tiny.settings(), start=False)


def test_the_service_holds_none_of_its_starters_descriptors(view):
    chosen = tiny.settings(linger_s=5)
    keep, give = os.pipe()
    os.set_inheritable(give, True)
    try:
        code = ("import sys; sys.path.insert(0, %r); sys.path.insert(1, %r)\n"
                "from rfaas_mpi.session import Session; from rfaas_mpi.config import Settings\n"
                "s = Session.open(Settings.load(runtime_dir=%r, linger_s=5)); print(s.service_pid)")
        code %= (str(view), str(Path(__file__).parent), chosen.runtime_dir)
        rank = subprocess.run([sys.executable, "-c", code],
                              pass_fds=(give,), capture_output=True, text=True, timeout=60, check=True)
        # Its end of file, with the service still there, is what mpiexec waits for.
        os.close(give)
        assert os.read(keep, 1) == b""
        pid = int(rank.stdout)
        assert os.getsid(pid) != os.getsid(0)
        assert os.readlink(f"/proc/{pid}/fd/1") == "/dev/null"
        os.kill(pid, signal.SIGTERM)
    finally:
        os.close(keep)


def test_the_service_may_use_every_core_although_its_starter_may_not(view):
    chosen = tiny.settings()
    own = os.sched_getaffinity(0)
    body = "import os; os.sched_setaffinity(0, {0}); s = Session.open(settings); say(s.service_pid); sys.stdin.read()"
    with other_rank(view, chosen, body) as other:
        assert os.sched_getaffinity(int(other.stdout.readline())) >= own


def test_nothing_listens_on_tcp(shared):
    with Session.open(shared) as session:
        inodes = {os.readlink(link).removeprefix("socket:[").removesuffix("]")
                  for link in Path(f"/proc/{session.service_pid}/fd").iterdir() if link.exists() or link.is_symlink()}
    tcp = {line.split()[9] for name in ("tcp", "tcp6", "udp", "udp6") if Path(f"/proc/net/{name}").exists()
           for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]}
    assert inodes.isdisjoint(tcp)


def test_a_service_that_does_not_start_says_why(monkeypatch):
    chosen = tiny.settings()
    directory = service_directory(chosen)
    (directory / "store.db").mkdir()
    with pytest.raises(ServiceError, match="did not start"):
        Session.open(chosen)


def test_a_stopped_service_is_an_error_that_says_so():
    chosen = tiny.settings()
    with Session.open(chosen) as session:
        os.kill(session.service_pid, signal.SIGSTOP)
        try:
            with pytest.raises(ServiceError, match="no answer"):
                Session.open(chosen.with_(start_timeout_s=0.2))
        finally:
            os.kill(session.service_pid, signal.SIGCONT)


# --- hello ------------------------------------------------------------------------------

def knock(chosen, hello: bytes) -> msg.Hello | None:
    """The answer to these bytes, None if the connection is closed without one."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(service_directory(chosen) / "socket"))
        connection.sendall(hello)
        data = connection.recv(64, socket.MSG_WAITALL)
        return msg.Hello.unpack(data) if len(data) == 64 else None


@pytest.mark.parametrize(("changes", "status"), [
    ({"magic": b"GET / HT"}, msg.HELLO_BAD_MAGIC), ({"protocol": 9}, msg.HELLO_PROTOCOL),
    ({"version": 9 << 16}, msg.HELLO_VERSION), ({"kind": 7}, msg.HELLO_REFUSED),
    ({"kind": msg.KIND_WORKER, "lease": 1 << 60, "worker": 1}, msg.HELLO_UNKNOWN)])
def test_a_hello_that_makes_no_sense_is_answered_with_its_status(shared, changes, status):
    with Session.open(shared):
        hello = msg.Hello.make(msg.KIND_SESSION, bytes(16))._replace(**changes)
        assert knock(shared, hello.pack()).status == status


def test_another_version_is_told_so(shared, monkeypatch):
    with Session.open(shared):
        monkeypatch.setattr(msg, "version_number", lambda version="9.9.9": 9 << 16 | 9 << 8 | 9)
        with pytest.raises(VersionMismatch, match="rfaas down"):
            Session.open(shared)


def test_garbage_in_a_session_ends_that_session_only(shared):
    with Session.open(shared) as good:
        for garbage in (b"\xff" * 64, msg.pack_frame(msg.FRAME_JSON, b"{}"), msg.pack_frame(3, b"x"),
                        msg.pack_frame(msg.FRAME_JSON, b'{"t":"lease","id":"no"}')):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(30)
                connection.connect(str(service_directory(shared) / "socket"))
                connection.sendall(msg.Hello.make(msg.KIND_SESSION, bytes(16)).pack())
                assert len(connection.recv(64, socket.MSG_WAITALL)) == 64
                connection.sendall(garbage)
                assert connection.recv(1) == b""
        assert good.status()["pid"] == good.service_pid


def test_who_does_not_know_the_secret_reaches_no_worker(shared):
    with Rank(shared) as rank:
        wrong = msg.GrantLease(rank.lease.id, rank.lease.epoch, bytes(16), rank.lease.workers, 1)
        with pytest.raises(AuthError, match=f"lease {rank.lease.id}"):
            rank.session.dial(wrong, rank.worker)
        gone = msg.GrantLease(rank.lease.id + 1000, 1, rank.lease.secret, rank.lease.workers, 1)
        with pytest.raises(TransportError, match="can't be reached"):
            rank.session.dial(gone, rank.worker)
        with pytest.raises(TransportError):
            rank.session.dial(rank.lease, rank.worker + 1000)
        assert rank.dial().ask("1 + 1") == 2


# --- life of a session --------------------------------------------------------------------

def test_a_closed_session_says_so_and_closes_twice(shared):
    session = Session.open(shared)
    session.close()
    session.close()
    for use in (lambda: session.request(1, 1), session.status, lambda: session.verdict(1, 1)):
        with pytest.raises(ClosedError, match="closed"):
            use()


def test_closing_gives_everything_back(shared, wait_until):
    with Session.open(shared) as watcher:
        with Rank(shared):
            assert watcher.status()["leases"]
        wait_until(lambda: not watcher.status()["leases"] and not watcher.status()["workers"], "the lease is gone")


def test_a_lease_lives_until_the_last_session_that_keeps_it_lets_go_of_it(shared, wait_until):
    with Session.open(shared) as watcher:
        def leases() -> list[int]:
            return [found["id"] for found in watcher.status()["leases"]]

        owner, second, third = (Session.open(shared) for _ in range(3))
        lease, _ = (owner.request(1, 1).leases[0] for _ in range(2))
        for session in (second, third):
            session.hold(lease)
        owner.close()
        wait_until(lambda: leases() == [lease.id], "what nobody else keeps is gone")
        second.release(lease)
        second.close()
        assert leases() == [lease.id]
        os.close(third.dial(lease, lease.workers[0].number))
        third.close()
        wait_until(lambda: not leases(), "it is gone with the last one")


def test_who_gives_back_what_others_keep_goes_on_and_the_last_release_is_waited_for(shared):
    with Session.open(shared) as owner, Session.open(shared) as second:
        lease = owner.request(1, 1).leases[0]
        second.hold(lease)
        owner.release(lease)
        owner.release(lease)
        assert [found["id"] for found in owner.status()["leases"]] == [lease.id]
        second.release(lease)
        assert not owner.status()["leases"]
        assert owner.request(1, 1).leases[0].id > lease.id


def test_a_service_forgets_who_asked_for_leases_that_others_keep_with_the_last_of_them(shared, wait_until):
    with Session.open(shared) as watcher, Session.open(shared) as second:
        def owners() -> int:
            return watcher.status()["outlived"]

        for revoked in (False, True):
            with Session.open(shared) as owner:
                lease = owner.request(1, 1).leases[0]
                second.hold(lease)
            wait_until(lambda: owners() == 1, "its owner has gone")
            if revoked:
                watcher.reclaim()
            else:
                second.release(lease)
            wait_until(lambda: not owners(), "and is forgotten")


@pytest.mark.parametrize("changes", [{"secret": bytes(16)}, {"id": 4711}])
def test_who_does_not_know_a_lease_s_secret_can_t_keep_it(shared, changes):
    with Session.open(shared) as owner, Session.open(shared) as second:
        lease = owner.request(1, 1).leases[0]
        with pytest.raises(ServiceError, match="there is no lease"):
            second.hold(msgspec.structs.replace(lease, **changes))
        second.release(lease)
        assert [found["id"] for found in owner.status()["leases"]] == [lease.id]


def test_a_forked_child_can_not_use_its_parents_session(shared):
    with Session.open(shared) as session:
        context = multiprocessing.get_context("fork")
        told = context.SimpleQueue()

        def child() -> None:
            try:
                session.status()
            except ForkedError as error:
                told.put(str(error))
            session.close()

        process = context.Process(target=child)
        process.start()
        process.join(30)
        assert process.exitcode == 0 and "new Executor" in told.get()
        assert session.status()["pid"] == session.service_pid


@pytest.mark.parametrize("demand", [(2, 1, 1), (-1, 1, 1), (1, 1, 0), (0, 0, 1)])
def test_a_demand_that_makes_no_sense_is_refused(shared, demand):
    with Session.open(shared) as session, pytest.raises(ConfigError, match="no demand"):
        session.request(*demand)


def test_a_session_inside_a_worker_is_refused(shared, monkeypatch):
    monkeypatch.setenv("RFAAS_INSIDE_WORKER", "1")
    with pytest.raises(NestedError, match="inside a kernel"):
        Session.open(shared)


def test_a_failing_event_handler_does_not_stop_the_session(shared, caplog):
    def handler(event: object) -> None:
        raise ValueError("not today")

    with Session.open(shared, on_event=handler) as session:
        grant = session.request(1, 1)
        session.kill(grant.leases[0], grant.leases[0].workers[0].number)
        assert session.verdict(grant.leases[0], grant.leases[0].workers[0].number).reason == "cancel"
        assert session.status()["pid"] == session.service_pid
    assert "not today" in caplog.text


def test_a_verdict_that_does_not_come_is_a_timeout(shared):
    with Rank(shared) as rank, pytest.raises(TimeoutError, match="has not ended"):
        rank.session.verdict(rank.lease, rank.worker, timeout_s=0.01)


def test_eight_threads_may_use_one_session(shared):
    with Session.open(shared) as session:
        failures = []

        def use() -> None:
            try:
                for _ in range(20):
                    assert session.status()["pid"] == session.service_pid
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures


def test_requests_in_flight_when_the_service_dies_are_answered(wait_until):
    chosen = tiny.settings()
    with Rank(chosen, workers=2) as rank:
        seen: list[BaseException] = []

        def ask() -> None:
            try:
                rank.session.request(1, 1, timeout_s=600)
            except ServiceLost as error:
                seen.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        with Session.open(chosen, observer=True) as watcher:
            wait_until(lambda: watcher.status()["waiting"] == 1, "the demand waits")
        os.kill(rank.session.service_pid, signal.SIGKILL)
        thread.join(30)
        assert not thread.is_alive() and len(seen) == 1
    with Session.open(chosen) as session:        # takes the dead one's socket away
        assert session.status()["leases"] == []


# --- messages ---------------------------------------------------------------------------

def test_frames_come_out_as_they_went_in_however_they_were_cut():
    frames = [(64, b"{}"), (48, b""), (3, bytes(range(256)) * 40)]
    stream = b"".join(msg.pack_frame(kind, body, cookie=7) for kind, body in frames)
    for size in (1, 15, 16, 17, 1000, len(stream)):
        reader = msg.FrameReader()
        out = [frame for at in range(0, len(stream), size) for frame in reader.feed(stream[at:at + size])]
        assert [(frame.type, frame.body, frame.cookie) for frame in out] == [(k, b, 7) for k, b in frames]


def test_a_frame_above_the_limit_is_refused_before_it_is_read():
    with pytest.raises(ServiceError, match="limit"):
        list(msg.FrameReader().feed(msg.FRAME.pack(msg.MAX_BODY + 1, 64, 0, 0)))


def test_a_hello_is_64_bytes_and_comes_back():
    hello = msg.Hello.make(msg.KIND_WORKER, bytes(range(16)), lease=1 << 40, worker=3, session=9)
    assert len(hello.pack()) == 64 and msg.Hello.unpack(hello.pack()) == hello and hello.problem() == 0


def test_a_proof_depends_on_everything_that_it_binds():
    base = (b"s" * 16, b"rank", b"a" * 16, b"b" * 16, 1, 2)
    proofs = {msg.proof(*base)}
    for at, other in enumerate((b"t" * 16, b"worker", b"c" * 16, b"c" * 16, 9, 9)):
        proofs.add(msg.proof(*base[:at], other, *base[at + 1:]))
    assert len(proofs) == 7

"""A service that listens on TCP: who is let in with the shared key, who is not, and what a rank of another node gets."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import msgspec
import pytest
import tiny
from proxies import proxy
from tiny import Events, Line, Rank

from rfaas_mpi import Executor, remote
from rfaas_mpi import messages as msg
from rfaas_mpi.agent import door
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import (
    AuthError,
    ConfigError,
    NoService,
    ServiceError,
    ServiceLost,
    TransportError,
    VersionMismatch,
)
from rfaas_mpi.lending import choose_transport
from rfaas_mpi.remote import Address
from rfaas_mpi.sealing import RECORD_BYTES, Opener, Sealer
from rfaas_mpi.session import Session, service_directory

REPOSITORY = Path(__file__).resolve().parent.parent
GUARD_S = 60.0


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> Path:
    return tiny.make_view(tmp_path_factory.mktemp("view"))


@pytest.fixture(autouse=True)
def tiny_workers(view, monkeypatch):
    """Workers serve lines instead of kernels: they adopt two connections as the real one does."""
    monkeypatch.syspath_prepend(str(view))


@contextlib.contextmanager
def serving(listen: str = "127.0.0.1:0", key_file: Path | None = None, **changes: object) -> Iterator[Settings]:
    """Settings of a rank that uses a service of its own over TCP."""
    # Long enough for every test, and no service that outlives tests which were killed.
    home = tiny.settings(**{"linger_s": 60, **changes})
    with Session.open(home, observer=True) as session:
        said = session.open_door([listen], key_file)
        try:
            yield home.with_(service=said.addresses[0], key_file=os.fsdecode(said.key_file))
        finally:
            session.down()


@pytest.fixture(scope="module")
def over_tcp() -> Iterator[Settings]:
    """One service for all tests that don't break it."""
    with serving() as settings:
        yield settings


@pytest.fixture
def rank(over_tcp) -> Iterator[Rank]:
    with Rank(over_tcp) as rank:
        yield rank


def address_of(settings: Settings) -> Address:
    return Address.parse(settings.service)


def key_of(settings: Settings) -> bytes:
    return remote.read_key(settings.key_file)


def dial(settings: Settings) -> socket.socket:
    connection = remote.connect(address_of(settings), settings.tcp, time.monotonic() + GUARD_S)
    connection.settimeout(GUARD_S)
    return connection


def answer_to(connection: socket.socket, data: bytes) -> msg.Hello | None:
    """The hello with which these bytes are answered, None if the connection is closed without one."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)
        answer = connection.recv(msg.HELLO.size, socket.MSG_WAITALL)
        return msg.Hello.unpack(answer) if len(answer) == msg.HELLO.size else None
    return None


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def door_counts(settings: Settings) -> dict[str, int]:
    with Session.open(settings, observer=True) as session:
        return session.status()["door"]


# --- addresses ------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "host", "port"), [
    ("tcp://10.0.0.7:4711", "10.0.0.7", 4711), ("nid0042:1", "nid0042", 1), ("[::1]:65535", "::1", 65535),
    ("tcp://[fe80::1%eth0]:9", "fe80::1%eth0", 9)])
def test_an_address_is_a_host_and_a_port(text, host, port):
    found = Address.parse(text)
    assert found == (host, port)
    assert Address.parse(str(found)) == found


@pytest.mark.parametrize("text", [
    "", "tcp://", "tcp://host", "host:", ":80", "host:0", "host:65536", "host:-1", "host:x", "host:1\N{SUPERSCRIPT TWO}",
    "::1:80", "[]:80", "http://host:80", "[::1]", "unix:/tmp/socket"])
def test_what_is_no_address_is_said_to_be_none(text):
    with pytest.raises(ConfigError, match="address|port"):
        Address.parse(text)


def test_port_0_is_for_listening_only():
    assert Address.parse("[::1]:0", port_0=True) == ("::1", 0)


def test_a_host_that_nobody_knows_is_a_clear_error(over_tcp):
    with pytest.raises(ConfigError, match="no-such-host.invalid"):
        Session.open(over_tcp.with_(service="tcp://no-such-host.invalid:1"))


# --- the key file -----------------------------------------------------------------------

def test_a_new_key_is_ours_alone_and_made_once(tmp_path):
    path = tmp_path / "key"
    key = remote.make_key(path)
    assert len(key) == remote.KEY_BYTES and path.stat().st_mode & 0o777 == 0o600
    assert remote.make_key(path) == key == remote.read_key(path)
    assert os.listdir(tmp_path) == ["key"]
    assert remote.make_key(tmp_path / "other") != key


def test_many_who_make_a_key_at_once_get_the_same(tmp_path):
    barrier, keys = threading.Barrier(8), []

    def make() -> None:
        barrier.wait()
        keys.append(remote.make_key(tmp_path / "key"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    assert len(keys) == 8 and len(set(keys)) == 1


@pytest.mark.parametrize("trouble", ["missing", "readable by the group", "readable by others", "writable by others",
                                     "too short", "too long", "empty", "a directory", "a pipe", "not ours"])
def test_a_key_file_that_proves_nothing_is_refused_by_name(tmp_path, trouble):
    path = tmp_path / "key"
    size = {"too short": 31, "too long": 33, "empty": 0}.get(trouble, 32)
    if trouble == "a directory":
        path.mkdir(0o700)
    elif trouble == "a pipe":
        os.mkfifo(path, 0o600)
    elif trouble != "missing":
        path.write_bytes(bytes(size))
        path.chmod({"readable by the group": 0o640, "readable by others": 0o604,
                    "writable by others": 0o602}.get(trouble, 0o600))
    if trouble == "not ours":
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345)
        else:
            path = Path("/etc/hostname")
    with pytest.raises(AuthError, match=str(path)):
        remote.read_key(path)


def test_the_service_refuses_a_key_file_that_others_can_read(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(bytes(32))
    path.chmod(0o644)
    with Session.open(tiny.settings(), observer=True) as session:
        with pytest.raises(ServiceError, match="others may read"):
            session.open_door(["127.0.0.1:0"], path)
        assert session.status()["listen"] == []


def test_the_key_is_in_no_argument_environment_log_or_answer(tmp_path):
    with serving(key_file=tmp_path / "key") as settings, Rank(settings) as rank:
        line = rank.dial()
        key = key_of(settings)
        with pytest.raises(AuthError):
            wrong = tmp_path / "wrong"
            remote.make_key(wrong)
            Session.open(settings.with_(key_file=str(wrong)))
        status = repr(rank.session.status())
        directory = service_directory(settings)
        texts = [(directory / "log").read_bytes(), status.encode()]
        pids = [rank.session.service_pid, line.ask("os.getpid()"), line.ask("os.getppid()")]
        for pid in pids:
            texts += [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
        for text in texts:
            for secret in (key, rank.lease.secret):
                assert secret not in text and secret.hex().encode() not in text
                assert repr(secret)[2:-1].encode() not in text
        assert b"did not know the key" in texts[0]


# --- joining ------------------------------------------------------------------------------

def test_a_rank_with_the_key_gets_a_worker_over_tcp(rank):
    assert rank.session.remote
    line = rank.dial()
    assert line.ask("6 * 7") == 42
    assert line.connection.family == socket.AF_INET
    assert set(line.ask("os.sched_getaffinity(0)")) == set(rank.lease.workers[0].cores)
    assert rank.session.status()["sessions"][0]["where"].startswith("127.0.0.1:")


def test_ipv6_does_too():
    with serving("[::1]:0") as settings, Rank(settings) as rank:
        assert settings.service.startswith("tcp://[::1]:")
        assert rank.dial().ask("6 * 7") == 42


def test_the_settings_come_from_the_environment(over_tcp, monkeypatch):
    monkeypatch.setenv("RFAAS_SERVICE", over_tcp.service)
    monkeypatch.setenv("RFAAS_KEY_FILE", over_tcp.key_file)
    with Session.open(Settings.load(), observer=True) as session:
        assert session.remote and session.status()["listen"] == [over_tcp.service]


def test_a_service_without_listen_has_no_socket_on_the_network_and_knows_no_key():
    chosen = tiny.settings()
    with Session.open(chosen) as session:
        assert session.status()["listen"] == [] and session.listen == ()
        assert not (service_directory(chosen) / "key").exists()


def test_several_addresses_share_one_port_and_are_opened_once():
    with Session.open(tiny.settings(), observer=True) as session:
        one = session.open_door(["127.0.0.1:0"])
        both = session.open_door(["127.0.0.1:0", "[::1]:0"])
        assert both.addresses[0] == one.addresses[0] and len(both.addresses) == 2
        assert len({Address.parse(address).port for address in both.addresses}) == 1
        assert session.open_door(both.addresses).addresses == both.addresses


def test_a_port_in_use_is_said_with_its_address_and_changes_nothing():
    with socket.create_server(("127.0.0.1", 0)) as taken, Session.open(tiny.settings(), observer=True) as session:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServiceError, match=f"{where}.*in use"):
            session.open_door(["127.0.0.1:0", where])
        assert session.status()["listen"] == []


def test_a_second_key_is_refused(tmp_path, over_tcp):
    home = over_tcp.with_(service=None)
    with Session.open(home, observer=True) as session, pytest.raises(ServiceError, match=over_tcp.key_file):
        session.open_door(["127.0.0.1:0"], tmp_path / "another")


def test_only_its_own_node_tells_a_service_where_to_listen(over_tcp):
    with Session.open(over_tcp, observer=True) as session, pytest.raises(ServiceError, match="own node"):
        session.open_door(["127.0.0.1:0"])


def test_nobody_listening_is_told_with_the_address():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(NoService, match=f"127.0.0.1:{port}.*rfaas up --listen"):
        Session.open(Settings.load(service=f"tcp://127.0.0.1:{port}", key_file=os.devnull)
                     .with_(key_file=str(a_key())))


def a_key() -> Path:
    path = Path(os.environ["RFAAS_RUNTIME_DIR"]) / "a-key"
    remote.make_key(path)
    return path


def test_a_listener_that_never_answers_is_an_error_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = tiny.settings(start_timeout_s=0.2).with_(
            service=f"tcp://127.0.0.1:{silent.getsockname()[1]}", key_file=str(a_key()))
        with pytest.raises(ServiceError, match="no answer"):
            Session.open(settings)


def test_a_listener_that_answers_by_the_byte_is_an_error_in_time():
    with socket.create_server(("127.0.0.1", 0)) as slow:
        stop = threading.Event()

        def drip() -> None:
            connection, _ = slow.accept()
            with connection, contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    connection.send(b"R")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(ServiceError, match="no answer"):
                Session.open(tiny.settings(start_timeout_s=0.3).with_(
                    service=f"tcp://127.0.0.1:{slow.getsockname()[1]}", key_file=str(a_key())))
        finally:
            stop.set()
            thread.join(GUARD_S)


def test_a_service_without_a_key_named_says_which_setting_is_missing(over_tcp):
    with pytest.raises(ConfigError, match="RFAAS_KEY_FILE"):
        Session.open(over_tcp.with_(key_file=None))


def test_another_key_is_refused_and_both_files_are_the_way_out(over_tcp, tmp_path):
    path = tmp_path / "key"
    remote.make_key(path)
    with pytest.raises(AuthError, match=f"{path}.*rfaas up --listen"):
        Session.open(over_tcp.with_(key_file=str(path)))


def test_who_listens_without_the_key_is_found_out(over_tcp):
    """It answers as a service would, but for the proof."""
    with socket.create_server(("127.0.0.1", 0)) as fake:
        def serve() -> None:
            connection, _ = fake.accept()
            with connection:
                hello = msg.Hello.unpack(connection.recv(64, socket.MSG_WAITALL))
                connection.sendall(msg.Hello.make(hello.kind, os.urandom(16)).pack())
                theirs = connection.recv(32, socket.MSG_WAITALL)
                # What the rank itself has just proved, sent back to it.
                connection.sendall(msg.PROOF_ANSWER.pack(msg.HELLO_OK, theirs))
                assert is_closed(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(AuthError, match="does not know the key"):
            Session.open(over_tcp.with_(service=f"tcp://127.0.0.1:{fake.getsockname()[1]}"))
        thread.join(GUARD_S)
        assert not thread.is_alive()


def test_another_version_is_told_so(over_tcp, monkeypatch):
    monkeypatch.setattr(msg, "version_number", lambda version="9.9.9": 9 << 16 | 9 << 8 | 9)
    with pytest.raises(VersionMismatch, match=r"0\.1\.0.*same version"):
        Session.open(over_tcp)


# --- what a rank of another node is given ------------------------------------------------------

def test_the_secret_of_a_lease_never_travels(over_tcp):
    with proxy(address_of(over_tcp)) as (address, seen):
        with Rank(over_tcp.with_(service=str(address))) as rank:
            secret = rank.lease.secret
            # Its worker's connection goes through the proxy, too.
            assert rank.dial().ask("1 + 1") == 2
    assert len(secret) == 32 and secret not in seen and key_of(over_tcp) not in seen


def test_nothing_of_a_join_can_be_read_on_its_way(over_tcp, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "correct horse battery staple")
    with proxy(address_of(over_tcp)) as (address, seen), Rank(over_tcp.with_(service=str(address))) as rank:
        line = rank.dial()
        assert line.ask("os.environ['MY_PASSWORD']") == "correct horse battery staple"
        assert b"RFAASMPI" in seen
        sealed = bytes(seen).partition(b"eval os.environ")[0]
    assert b"horse" not in sealed and b"PATH" not in sealed


@pytest.mark.parametrize("at", [200, 300, 1000])
def test_a_bit_turned_on_the_way_ends_the_session_and_nothing_else(over_tcp, at):
    with proxy(address_of(over_tcp), turn_bit_at=at) as (address, _):
        with pytest.raises((ServiceError, TransportError)):
            Session.open(over_tcp.with_(service=str(address), start_timeout_s=5))
    with Session.open(over_tcp, observer=True) as session:
        assert session.status()["pid"] == session.service_pid


def test_a_session_that_is_repeated_word_for_word_is_refused(over_tcp):
    with proxy(address_of(over_tcp)) as (address, seen), Session.open(over_tcp.with_(service=str(address))) as session:
        session.status()
        recorded = bytes(seen)
    with dial(over_tcp) as connection:
        answer = answer_to(connection, recorded[:64])
        assert answer is not None and answer.status == msg.HELLO_OK
        connection.sendall(recorded[64:96])
        status, proof = msg.PROOF_ANSWER.unpack(connection.recv(msg.PROOF_ANSWER.size, socket.MSG_WAITALL))
        assert (status, proof) == (msg.HELLO_REFUSED, bytes(32))
        assert is_closed(connection)


def test_cores_that_the_rank_is_bound_to_are_spare_on_the_services_node(view):
    """Both are this machine here: what counts is that the service does not keep the rank's cores."""
    with serving(cores=()) as settings:
        with Session.open(settings) as session:
            mine = tuple(sorted(os.sched_getaffinity(0)))
            assert set(session.cores) == set(mine)


def test_the_services_node_says_which_cores_it_lends_not_the_rank():
    with serving(cores=(1,)) as settings, Session.open(settings.with_(cores=(0,))) as session:
        assert session.cores == (1,)


@pytest.mark.parametrize("missing", ["executable", "directory", "package"])
def test_a_path_that_the_services_node_lacks_is_named_with_the_node(over_tcp, monkeypatch, tmp_path, missing):
    lacking = f"/nowhere/{missing}"
    real = msg.Join
    monkeypatch.setattr(msg, "Join", lambda **facts: real(**{**facts, missing: os.fsencode(lacking)}))
    with pytest.raises(ServiceError, match=f"{socket.gethostname()}.*{lacking}"):
        Session.open(over_tcp)


def test_a_forced_cancel_works_over_tcp(rank):
    line = rank.dial()
    assert line.ask("tiny.run(46)") is None
    assert rank.session.kill(rank.lease, rank.worker, "cancel", 46)
    ended = rank.session.verdict(rank.lease, rank.worker)
    assert (ended.cause, ended.reason, ended.invocation) == ("infrastructure", "cancel", 46)
    ready = rank.events.wait(msg.WorkerReady)
    assert rank.dial(ready.worker).ask("2") == 2


def test_output_of_a_worker_comes_over_tcp(rank):
    rank.dial().ask("print('said far away', flush=True)")
    assert rank.events.wait(msg.Log).lines == ("said far away",)


def test_a_large_message_comes_whole_over_tcp(rank):
    rank.dial().ask("print(('x' * 99 + '\\n') * 40000, flush=True)")
    rank.session.release(rank.lease)
    assert rank.events.lines().count("x" * 99) >= 20000


def test_the_end_of_the_connection_gives_everything_back(over_tcp, wait_until):
    with Session.open(over_tcp, observer=True) as watcher:
        with Rank(over_tcp) as rank:
            assert watcher.status()["leases"]
            # As when its node goes down: the process lives on, and says nothing.
            rank.session._connection.shutdown(socket.SHUT_RDWR)
            wait_until(lambda: not watcher.status()["leases"] and not watcher.status()["workers"], "the lease is gone")
            rank.events.wait(msg.ServiceEnded)


def test_a_killed_rank_gives_everything_back(over_tcp, view, wait_until):
    with Session.open(over_tcp, observer=True) as watcher:
        with tiny.other_rank(view, over_tcp, "r = tiny.Rank(settings); say('in'); time.sleep(600)") as other:
            assert other.stdout.readline() == "in\n"
            assert watcher.status()["leases"]
            other.kill()
            wait_until(lambda: not watcher.status()["leases"], "the lease is gone")


def test_a_killed_service_is_told_at_once_with_its_address():
    with serving() as settings, Rank(settings) as rank:
        os.kill(rank.session.service_pid, signal.SIGKILL)
        ended = rank.events.wait(msg.ServiceEnded)
        assert settings.service in ended.message
        with pytest.raises(ServiceLost, match="runs there again"):
            rank.session.status()
        with pytest.raises(ServiceLost):
            rank.dial()
    # As the next service there would.
    (service_directory(settings) / "socket").unlink()


def test_down_over_tcp_returns_when_everything_has_ended():
    with serving() as settings, Rank(settings) as rank:
        line = rank.dial()
        pid = line.ask("os.getpid()")
        # so that its end takes the kernel a while
        assert line.ask("len(globals().setdefault('held', b'x' * (512 << 20)))") == 512 << 20
        with Session.open(settings, observer=True) as other:
            other.down()
        assert not faults.alive(pid)
        rank.events.wait(msg.ServiceEnded)
        with pytest.raises(NoService):
            Session.open(settings, observer=True)


# --- connections to workers ----------------------------------------------------------------------

def both(rank: Rank) -> tuple[Line, socket.socket]:
    """A control and a data connection to its worker."""
    control, data = (socket.socket(fileno=fd) for fd in rank.session.reach(rank.lease, rank.worker, "tcp"))
    for connection in (control, data):
        connection.settimeout(GUARD_S)
        rank._open.append(connection)
    return Line(control), data


def test_a_worker_gets_a_control_and_a_data_connection_in_one(rank):
    line, data = both(rank)
    assert line.ask("tiny.data.getpeername()[1]") == data.getsockname()[1]
    data.sendall(b"over here")
    assert line.ask("tiny.data.recv(9, socket.MSG_WAITALL)") == b"over here"


OPTIONS = ("TCP_NODELAY", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")


def test_every_connection_has_the_options_that_find_a_dead_peer(rank):
    line, data = both(rank)
    session = rank.session._connection
    expected = [1, 5, 2, 3, 15000]
    for connection in (line.connection, data, session):
        assert [connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in OPTIONS] == expected
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    told = line.ask("[tiny.data.getsockopt(*option) for tiny in [tiny] for option in "
                    f"{[(socket.IPPROTO_TCP, getattr(socket, name)) for name in OPTIONS]!r}]")
    assert told == expected
    assert line.ask("tiny.data.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)") == 1


def test_the_options_are_settings_of_both_ends():
    with serving(tcp_idle_s=7, tcp_timeout_s=3.5) as settings, Rank(settings.with_(tcp_idle_s=9)) as rank:
        line, data = both(rank)
        assert line.ask("tiny.data.getsockopt(6, socket.TCP_KEEPIDLE)") == 7
        assert line.ask("tiny.data.getsockopt(6, socket.TCP_USER_TIMEOUT)") == 3500
        assert data.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 9


def test_a_rank_of_the_services_own_node_may_dial_over_tcp_too(over_tcp):
    with Rank(over_tcp.with_(service=None, key_file=None)) as rank:
        assert not rank.session.remote and len(rank.lease.secret) == 16
        line, data = both(rank)
        data.sendall(b"x")
        assert line.ask("tiny.data.recv(1)") == b"x"
        assert line.connection.family == socket.AF_INET


def test_without_a_tcp_listener_that_is_a_clear_error():
    with Rank(tiny.settings()) as rank, pytest.raises(ConfigError, match="rfaas up --listen"):
        rank.session.reach(rank.lease, rank.worker, "tcp")


def test_a_lease_of_another_node_is_not_dialled_over_shared_memory(rank, over_tcp):
    with Session.open(over_tcp.with_(service=None)) as home, pytest.raises(ConfigError, match="RFAAS_SERVICE=tcp://"):
        home.reach(rank.lease, rank.worker, "shm")


def test_a_worker_s_end_is_told_to_the_session_that_dialled(over_tcp):
    with Rank(over_tcp) as rank, Session.open(over_tcp, on_event=(told := Events())) as other:
        fds = other.reach(rank.lease, rank.worker, "tcp")
        line = Line(socket.socket(fileno=fds[0]))
        with line.connection, socket.socket(fileno=fds[1]):
            line.connection.settimeout(GUARD_S)
            line.do("tiny.run(7); os._exit(3)")
            assert told.wait(msg.WorkerEnded).invocation == 7
        assert rank.events.wait(msg.WorkerEnded).invocation == 0


def test_who_does_not_know_the_secret_reaches_no_worker(rank, over_tcp):
    wrong = changed(rank.lease, secret=bytes(32))
    for transport in ("verbs", "tcp"):
        with pytest.raises(AuthError, match=f"lease {rank.lease.id}"):
            rank.session.reach(wrong, rank.worker, transport)
        with pytest.raises(TransportError, match="can't be reached"):
            rank.session.reach(rank.lease, rank.worker + 1000, transport)
    # The shared key lets in, but to no worker.
    with pytest.raises(AuthError):
        rank.session.reach(changed(rank.lease, secret=key_of(over_tcp)), rank.worker, "verbs")
    assert both(rank)[0].ask("1") == 1


def changed(lease: msg.GrantLease, **changes: object) -> msg.GrantLease:
    return msgspec.structs.replace(lease, **changes)


class Half:
    """A connection to a worker, step by step."""

    def __init__(self, rank: Rank, settings: Settings, hello: msg.Hello) -> None:
        self.lease, self.hello = rank.lease, hello
        self.connection = dial(settings)
        rank._open.append(self.connection)
        answer = answer_to(self.connection, hello.pack())
        assert answer is not None
        self.answer = answer

    def prove(self, secret: bytes | None = None) -> int:
        """The status of the answer to our proof."""
        role = msg.ROLE_RANK if self.hello.kind == msg.KIND_WORKER else msg.ROLE_DATA_RANK + self.hello.pairing
        proof = msg.proof(self.lease.secret if secret is None else secret, role, self.hello.nonce, self.answer.nonce,
                          self.hello.lease, self.hello.worker)
        self.connection.sendall(proof)
        return msg.PROOF_ANSWER.unpack(self.connection.recv(msg.PROOF_ANSWER.size, socket.MSG_WAITALL))[0]


def control_half(rank: Rank, settings: Settings) -> Half:
    half = Half(rank, settings, msg.Hello.make(msg.KIND_WORKER, os.urandom(16), lease=rank.lease.id,
                                               worker=rank.worker, session=rank.session.number, data=1))
    assert half.answer.status == msg.HELLO_OK
    return half


def data_half(rank: Rank, settings: Settings, pairing: bytes, **changes: int) -> Half:
    return Half(rank, settings, msg.Hello.make_data(os.urandom(16), pairing, lease=rank.lease.id,
                                                    worker=rank.worker)._replace(**changes))


def test_a_data_connection_belongs_to_one_control_connection(rank, over_tcp):
    first, second = control_half(rank, over_tcp), control_half(rank, over_tcp)
    assert first.prove() == second.prove() == msg.HELLO_OK
    assert data_half(rank, over_tcp, os.urandom(16)).answer.status == msg.HELLO_UNKNOWN
    assert data_half(rank, over_tcp, first.answer.nonce, worker=rank.worker + 1).answer.status == msg.HELLO_UNKNOWN
    pair = data_half(rank, over_tcp, second.answer.nonce)
    assert pair.prove() == msg.HELLO_OK
    assert Line(second.connection).ask("tiny.data.getpeername()[1]") == pair.connection.getsockname()[1]
    assert data_half(rank, over_tcp, second.answer.nonce).answer.status == msg.HELLO_UNKNOWN, "it has one already"


def test_a_data_connection_before_its_control_connection_has_proved_is_refused(rank, over_tcp):
    control = control_half(rank, over_tcp)
    assert data_half(rank, over_tcp, control.answer.nonce).answer.status == msg.HELLO_UNKNOWN
    assert control.prove() == msg.HELLO_OK


def test_a_data_connection_proves_the_secret_too(rank, over_tcp):
    control = control_half(rank, over_tcp)
    assert control.prove() == msg.HELLO_OK
    half = data_half(rank, over_tcp, control.answer.nonce)
    assert half.prove(bytes(32)) == msg.HELLO_REFUSED
    assert is_closed(half.connection)
    assert data_half(rank, over_tcp, control.answer.nonce).prove() == msg.HELLO_OK, "the pair can still be made"


def test_two_data_connections_for_one_control_connection_give_one_pair(rank, over_tcp):
    control = control_half(rank, over_tcp)
    assert control.prove() == msg.HELLO_OK
    one, two = (data_half(rank, over_tcp, control.answer.nonce) for _ in range(2))
    assert one.answer.status == two.answer.status == msg.HELLO_OK
    assert one.prove() == msg.HELLO_OK
    assert two.prove() == msg.HELLO_UNKNOWN
    assert Line(control.connection).ask("tiny.data.getpeername()[1]") == one.connection.getsockname()[1]


def test_who_speaks_before_its_data_connection_is_there_is_cut_off(rank, over_tcp):
    control = control_half(rank, over_tcp)
    assert control.prove() == msg.HELLO_OK
    control.connection.sendall(b"already?")
    assert is_closed(control.connection)


def test_a_proof_of_one_kind_is_none_of_another(rank, over_tcp):
    control = control_half(rank, over_tcp)
    for role in (msg.ROLE_WORKER, msg.ROLE_SESSION_RANK, msg.ROLE_SESSION_SERVICE, msg.ROLE_DATA_RANK):
        half = control_half(rank, over_tcp)
        half.connection.sendall(msg.proof(rank.lease.secret, role, half.hello.nonce, half.answer.nonce,
                                          rank.lease.id, rank.worker))
        assert msg.PROOF_ANSWER.unpack(half.connection.recv(36, socket.MSG_WAITALL))[0] == msg.HELLO_REFUSED
    # Made for one connection, used on another.
    other = control_half(rank, over_tcp)
    other.connection.sendall(msg.proof(rank.lease.secret, msg.ROLE_RANK, control.hello.nonce, control.answer.nonce,
                                       rank.lease.id, rank.worker))
    assert msg.PROOF_ANSWER.unpack(other.connection.recv(36, socket.MSG_WAITALL))[0] == msg.HELLO_REFUSED


@pytest.mark.parametrize("changes", [{"kind": msg.KIND_DATA}, {"data": 1}])
def test_the_unix_socket_takes_no_data_connections(over_tcp, changes):
    with Rank(over_tcp) as rank, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(GUARD_S)
        connection.connect(str(service_directory(over_tcp) / "socket"))
        hello = msg.Hello.make(msg.KIND_WORKER, bytes(16), lease=rank.lease.id, worker=rank.worker)
        assert answer_to(connection, hello._replace(**changes).pack()).status == msg.HELLO_REFUSED


# --- strangers -------------------------------------------------------------------------------------

def good_hello() -> msg.Hello:
    return msg.Hello.make(msg.KIND_SESSION, os.urandom(16))


FIELDS = {"magic": [b"GET / HT", bytes(8), b"\xff" * 8], "protocol": [0, 2, 0xFFFF],
          "kind": [0, 4, 0xFFFF], "version": [99 << 8, 99 << 16, 0xFFFFFFFF]}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_a_hello_that_makes_no_sense_is_answered_with_its_status_and_closed(over_tcp, field, value):
    with dial(over_tcp) as connection:
        answer = answer_to(connection, good_hello()._replace(**{field: value}).pack())
        assert answer is not None and answer.status < 0
        assert is_closed(connection)


@pytest.mark.parametrize("kind", [msg.KIND_WORKER, msg.KIND_DATA])
def test_ids_of_leases_and_workers_at_their_limits_are_unknown(over_tcp, kind):
    for lease in (0, 1, (1 << 63) - 1, (1 << 64) - 1):
        for worker in (0, (1 << 32) - 1):
            with dial(over_tcp) as connection:
                hello = good_hello()._replace(kind=kind, lease=lease, worker=worker)
                assert answer_to(connection, hello.pack()).status == msg.HELLO_UNKNOWN
                assert is_closed(connection)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 63])
def test_a_truncated_hello_is_given_up(over_tcp, length):
    with dial(over_tcp) as connection:
        connection.sendall(good_hello().pack()[:length])
        connection.shutdown(socket.SHUT_WR)
        assert is_closed(connection)


def test_nothing_behind_a_hello_is_read_before_the_proof(over_tcp):
    """A frame with a join behind a wrong proof never reaches who reads frames."""
    before = door_counts(over_tcp)["refused"]
    with dial(over_tcp) as connection:
        join = msg.pack_message(msg.DownRequest(1))
        answer = answer_to(connection, good_hello().pack() + bytes(32) + join * 1000)
        assert answer is not None and answer.status == msg.HELLO_OK
        with contextlib.suppress(ConnectionError):
            status, proof = msg.PROOF_ANSWER.unpack(connection.recv(msg.PROOF_ANSWER.size, socket.MSG_WAITALL))
            assert (status, proof) == (msg.HELLO_REFUSED, bytes(32))
        assert is_closed(connection)
    assert door_counts(over_tcp)["refused"] == before + 1


def test_a_right_proof_with_another_role_opens_no_session(over_tcp):
    key = key_of(over_tcp)
    for role in (msg.ROLE_SESSION_SERVICE, msg.ROLE_RANK, b""):
        with dial(over_tcp) as connection:
            hello = good_hello()
            answer = answer_to(connection, hello.pack())
            connection.sendall(msg.proof(key, role, hello.nonce, answer.nonce, 0, 0))
            assert msg.PROOF_ANSWER.unpack(connection.recv(36, socket.MSG_WAITALL))[0] == msg.HELLO_REFUSED


def test_frames_that_are_not_sealed_end_a_session(over_tcp):
    with dial(over_tcp) as connection:
        hello = good_hello()
        answer = answer_to(connection, hello.pack())
        connection.sendall(msg.proof(key_of(over_tcp), msg.ROLE_SESSION_RANK, hello.nonce, answer.nonce, 0, 0))
        assert msg.PROOF_ANSWER.unpack(connection.recv(36, socket.MSG_WAITALL))[0] == msg.HELLO_OK
        connection.sendall(msg.pack_message(msg.DownRequest(1)) * 10)
        assert is_closed(connection)
    assert door_counts(over_tcp)


def test_a_thousand_connections_with_garbage_do_no_harm(over_tcp):
    chance = random.Random(1973)
    with Rank(over_tcp) as rank:
        line = both(rank)[0]
        before = door_counts(over_tcp)["accepted"]
        for number in range(1000):
            with dial(over_tcp) as connection:
                size = chance.choice((0, 1, 63, 64, 65, 96, 4096))
                data = chance.randbytes(size)
                if chance.random() < 0.5:
                    data = good_hello().pack()[:chance.randrange(65)] + data
                with contextlib.suppress(OSError):
                    connection.sendall(data)
                    if number % 3:
                        connection.shutdown(socket.SHUT_WR)
                        is_closed(connection)
        assert line.ask("1 + 1") == 2, "who was in before stays in"
        after = door_counts(over_tcp)
        assert after["accepted"] >= before + 1000
    with Rank(over_tcp) as rank:
        assert both(rank)[0].ask("2 + 2") == 4, "and others may come"


def test_a_door_full_of_silent_strangers_lets_a_rank_in(over_tcp):
    silent = [dial(over_tcp) for _ in range(door.REMOTE_MAX + 50)]
    try:
        with Rank(over_tcp) as rank:
            assert both(rank)[0].ask("1") == 1
        assert door_counts(over_tcp)["crowded_out"] >= 50
    finally:
        for connection in silent:
            connection.close()


def test_who_fills_the_door_does_not_fill_the_log(over_tcp):
    log_file = service_directory(over_tcp.with_(service=None)) / "log"
    before = log_file.stat().st_size
    for _ in range(300):
        with dial(over_tcp) as connection:
            answer_to(connection, bytes(64))
    door_counts(over_tcp)
    assert log_file.stat().st_size - before < 20_000


@contextlib.contextmanager
def impatient_door(monkeypatch) -> Iterator[tuple[door.Door, _Host, Settings]]:
    """The door alone, in this process, with a short limit and nobody who looks at it but the test."""
    monkeypatch.setattr(door, "HELLO_S", 0.05)
    key = bytes(range(32))
    selector, host = selectors.DefaultSelector(), _Host()
    mine = door.Door(selector, host)
    host.turn = lambda: [key.data(mask) for key, mask in selector.select(0.01)]
    try:
        mine.listen_tcp([Address("127.0.0.1", 0)], key, Settings().tcp)
        yield mine, host, Settings().with_(service=str(mine.addresses[0]))
    finally:
        mine.close()
        selector.close()


class _Host:
    """A service with one lease."""

    SECRET = b"s" * 32

    def __init__(self) -> None:
        self.came: list[object] = []
        self.turn = list

    def secret_of(self, lease: int, worker: int) -> bytes | None:
        return self.SECRET if (lease, worker) == (1, 1) else None

    def session_came(self, guest: door.Guest) -> None:
        guest.connection.close()
        self.came.append("session")

    def worker_came(self, guest: door.Guest, hello: msg.Hello, connections: list[socket.socket]) -> None:
        self.came.append(len(connections))


@pytest.mark.parametrize("said", ["nothing", "half a hello", "a hello", "half a proof", "half a pair"])
def test_who_takes_too_long_is_sent_away_at_each_stage(monkeypatch, wait_until, said):
    with impatient_door(monkeypatch) as (mine, host, settings), dial(settings) as connection:
        hello = msg.Hello.make(msg.KIND_WORKER, bytes(16), lease=1, worker=1, data=1)

        def hear(size: int) -> bytes:
            connection.setblocking(False)
            heard = b""

            def more() -> bool:
                nonlocal heard
                host.turn()
                with contextlib.suppress(BlockingIOError):
                    heard += connection.recv(size - len(heard))
                return len(heard) == size

            wait_until(more, "the door answered")
            return heard

        if said == "half a hello":
            connection.sendall(hello.pack()[:32])
        elif said != "nothing":
            connection.sendall(hello.pack())
            nonce = msg.Hello.unpack(hear(64)).nonce
            proof = msg.proof(host.SECRET, msg.ROLE_RANK, hello.nonce, nonce, 1, 1)
            if said == "half a proof":
                connection.sendall(proof[:16])
            elif said == "half a pair":
                connection.sendall(proof)
                assert msg.PROOF_ANSWER.unpack(hear(36))[0] == msg.HELLO_OK

        def away() -> bool:
            host.turn()
            mine.tick(time.monotonic())
            return mine.counts["late"] == 1

        wait_until(away, "the guest is sent away")
        connection.settimeout(GUARD_S)
        assert is_closed(connection)
        assert mine.next_deadline() is None and not host.came


def test_a_partner_that_goes_takes_the_half_pair_along(rank, over_tcp, wait_until):
    control = control_half(rank, over_tcp)
    assert control.prove() == msg.HELLO_OK
    half = data_half(rank, over_tcp, control.answer.nonce)
    broken = door_counts(over_tcp)["broken"]
    control.connection.close()
    wait_until(lambda: door_counts(over_tcp)["broken"] > broken, "the half pair is noticed")
    assert half.prove() == msg.HELLO_UNKNOWN


# --- sealing ----------------------------------------------------------------------------------------

NONCES = bytes(16), bytes(range(16))


def sealed_pair(key: bytes = bytes(32), role: bytes = b"rank") -> tuple[Sealer, Opener]:
    return Sealer(key, role, NONCES), Opener(key, role, NONCES)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 4096, RECORD_BYTES, RECORD_BYTES + 1, 3 * RECORD_BYTES + 5])
def test_what_is_sealed_comes_out_however_it_was_cut(size):
    sealer, opener = sealed_pair()
    data = random.Random(size).randbytes(size)
    records = sealer.seal(data) + sealer.seal(b"and more")
    step = max(1, len(records) // 7)
    out = b"".join(opener.feed(records[at:at + step]) for at in range(0, len(records), step))
    assert out == data + b"and more"


def test_the_same_words_never_look_the_same():
    sealer, _ = sealed_pair()
    first, second = sealer.seal(b"attack at dawn"), sealer.seal(b"attack at dawn")
    assert first != second and b"attack" not in first
    other, _ = sealed_pair(role=b"service")
    assert other.seal(b"attack at dawn") != first


@pytest.mark.parametrize("trouble", ["a bit", "the tag", "the length", "repeated", "left out", "swapped", "reflected",
                                     "another key", "too long", "nothing in it"])
def test_a_record_that_was_tampered_with_is_refused(trouble):
    sealer, opener = sealed_pair()
    first, second = bytearray(sealer.seal(b"one")), bytearray(sealer.seal(b"two"))
    match trouble:
        case "a bit":
            first[5] ^= 1
        case "the tag":
            first[-1] ^= 1
        case "the length":
            first[0] ^= 1
        case "repeated":
            second = first
        case "left out":
            first = bytearray()
        case "swapped":
            first, second = second, first
        case "reflected":
            opener = Opener(bytes(32), b"service", NONCES)
        case "another key":
            opener = Opener(bytes(31) + b"\1", b"rank", NONCES)
        case "too long":
            first[:4] = (RECORD_BYTES + 1).to_bytes(4, "little")
        case "nothing in it":
            first[:4] = bytes(4)
    with pytest.raises(ServiceError):
        opener.feed(bytes(first + second))
        opener.feed(bytes(64))


def test_a_lease_s_secret_depends_on_everything_that_it_binds():
    base = (b"k" * 32, 1, 2, b"a" * 16, b"b" * 16)
    made = {msg.lease_secret(*base)}
    for at, other in enumerate((b"l" * 32, 9, 9, b"c" * 16, b"c" * 16)):
        made.add(msg.lease_secret(*base[:at], other, *base[at + 1:]))
    assert len(made) == 6


# --- connections that end although their worker lives -----------------------------------------------

@pytest.fixture
def real_workers(view, monkeypatch):
    """Workers that run kernels after all."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(view)])


def links(settings: Settings) -> set[int]:
    """This process' connections to a service, its sessions' among them."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=int(name))
            try:
                if connection.family == socket.AF_INET and connection.getpeername() == address_of(settings):
                    found.add(int(name))
            finally:
                connection.detach()
    return found


def end_links(fds: set[int]) -> None:
    """As a network that forgets connections would."""
    assert len(fds) == 2, "a control and a data connection"
    for fd in fds:
        # Who sees the end of the first may close the second.
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=fd)
            try:
                connection.shutdown(socket.SHUT_RDWR)
            finally:
                connection.detach()


def session_of(executor: Executor) -> Session:
    return executor._crew.lending.session


@pytest.mark.parametrize("fallback", [True, False], ids=["fallback", "no fallback"])
def test_a_connection_that_ends_without_its_worker_costs_no_result(over_tcp, real_workers, tmp_path, fallback):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    with Executor(workers=1, service=over_tcp.service, key_file=over_tcp.key_file, fallback=fallback) as executor:
        [first] = executor.workers
        held = executor.submit(faults.begin_then_wait, begun, flag, 5)
        faults.wait_for(begun)
        futures = [executor.submit(faults.plus_one, n) for n in range(20)]
        end_links(links(over_tcp) - {session_of(executor)._connection.fileno()})
        flag.touch()
        assert held.result(GUARD_S) == 5
        assert [future.result(GUARD_S) for future in futures] == list(range(1, 21))
        assert executor.submit(os.getpid).result() != os.getpid(), "not by the rank"
        assert executor.workers != [first]
        ended = session_of(executor).verdict(*next(iter(session_of(executor)._ended)))
        assert (ended.cause, ended.reason) == ("infrastructure", "link")


def test_an_idle_worker_whose_connection_ended_is_replaced_before_the_next_call(over_tcp, real_workers, wait_until):
    with Executor(workers=1, service=over_tcp.service, key_file=over_tcp.key_file, fallback=False) as executor:
        [first] = executor.workers
        end_links(links(over_tcp) - {session_of(executor)._connection.fileno()})
        wait_until(lambda: executor.workers not in ([], [first]), "another worker is there")
        assert executor.submit(faults.plus_one, 1).result(GUARD_S) == 2


def test_who_joined_a_lease_dials_again_and_ends_nobody_s_worker(over_tcp, real_workers, wait_until):
    with Executor(workers=1, service=over_tcp.service, key_file=over_tcp.key_file, fallback=False) as owner:
        pid = owner.submit(os.getpid).result()
        before = links(over_tcp)
        with Executor._join(owner._grant, service=over_tcp.service, key_file=over_tcp.key_file,
                            fallback=False) as other:
            assert other.submit(os.getpid).result() == pid
            end_links(links(over_tcp) - before - {session_of(other)._connection.fileno()})
            assert other.submit(os.getpid).result(GUARD_S) == pid
            # The first answer may be faster than the note that the connection is there.
            wait_until(lambda: other.workers == owner.workers, "it has its worker again")
        assert owner.submit(os.getpid).result() == pid


# --- transports ------------------------------------------------------------------------------------

@dataclasses.dataclass
class Facts:
    """What choose_transport asks of a session."""

    remote: bool
    transports: tuple[str, ...] = ()
    listen: tuple[str, ...] = ()
    host: str = "there"
    name: str = "the service at tcp://there:1"


def test_a_session_of_this_node_uses_shared_memory_unless_told_otherwise():
    assert choose_transport("auto", Facts(remote=False)) == "shm"
    assert choose_transport("shm", Facts(remote=False)) == "shm"


def test_shared_memory_does_not_reach_another_node():
    with pytest.raises(ConfigError, match="another one's"):
        choose_transport("shm", Facts(remote=True, transports=("shm", "tcp")))


def test_a_strict_sandbox_that_keeps_workers_from_devices_keeps_them_from_verbs(monkeypatch):
    monkeypatch.setattr("rfaas_mpi.fabric.transports", lambda: ("shm", "tcp", "verbs"))
    there = Facts(remote=True, transports=("shm", "tcp", "verbs"))
    assert choose_transport("auto", there) == "verbs"
    assert choose_transport("auto", there, strict=True) == "tcp"
    assert choose_transport("verbs", there) == "verbs"
    with pytest.raises(ConfigError, match="opens no device.*RFAAS_SANDBOX"):
        choose_transport("verbs", there, strict=True)


def test_tcp_on_one_node_needs_a_listener():
    with pytest.raises(ConfigError, match="rfaas up --listen"):
        choose_transport("tcp", Facts(remote=False))


def test_the_hello_of_c_and_of_python_are_the_same_bytes(tmp_path):
    fields = ("magic", "protocol", "kind", "version", "lease", "worker", "status", "nonce", "session",
              "data")
    source = tmp_path / "offsets.c"
    source.write_text('#include <stdio.h>\n#include "rfm_wire.h"\nint main(void)\n{\n'
                      + "".join(f'    printf("%zu ", offsetof(struct rfm_hello, {name}));\n' for name in fields)
                      + '    printf("%zu %u\\n", sizeof(struct rfm_hello), RFM_PROTOCOL);\n    return 0;\n}\n')
    subprocess.run(["gcc", f"-I{REPOSITORY / 'csrc'}", "-o", tmp_path / "offsets", source], check=True, timeout=60)
    told = subprocess.run([tmp_path / "offsets"], capture_output=True, text=True, check=True, timeout=60).stdout.split()
    hello = msg.Hello(b"RFAASMPI", 0x0102, 0x0304, 0x05060708, 0x1112131415161718, 0x21222324, -2,
                      bytes(range(0x30, 0x40)), 0x4142434445464748, 0x5152535455565758)
    data = hello.pack()
    parts = [hello.magic, *(value.to_bytes(size, "little", signed=value < 0) for value, size in (
        (hello.protocol, 2), (hello.kind, 2), (hello.version, 4), (hello.lease, 8), (hello.worker, 4),
        (hello.status, 4))), hello.nonce, hello.session.to_bytes(8, "little"), hello.data.to_bytes(8, "little")]
    at = [data.index(part) for part in parts]
    assert [int(text) for text in told] == [*at, len(data), msg.PROTOCOL]
    assert msg.Hello.make_data(bytes(16), data[48:], lease=1, worker=1).pairing == data[48:]


# --- the command line --------------------------------------------------------------------------------

def rfaas(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", *arguments], capture_output=True, text=True,
                          timeout=100, env={**os.environ, **environment})


def test_up_listens_and_status_doctor_and_down_work_from_elsewhere(tmp_path):
    home = tiny.settings()
    there = {"RFAAS_RUNTIME_DIR": home.runtime_dir}
    elsewhere = {"RFAAS_RUNTIME_DIR": tiny.settings().runtime_dir}
    key = tmp_path / "key"
    started = rfaas("up", "--json", "--listen", "127.0.0.1:0", "--listen", "[::1]:0", "--key-file", str(key), **there)
    assert started.returncode == 0, started.stderr
    data = json.loads(started.stdout)
    try:
        assert len(data["listen"]) == 2 and data["key_file"] == str(key) and data["stay"]
        which = ("--service", data["listen"][1], "--key-file", str(key))
        seen = rfaas("status", "--json", *which, **elsewhere)
        assert json.loads(seen.stdout)["pid"] == data["pid"], seen.stderr
        for_people = rfaas("status", *which, **elsewhere).stdout
        assert data["listen"][0] in for_people and str(key) in for_people
        report = rfaas("doctor", "--json", *which, **elsewhere)
        checks = {check["name"]: check for check in json.loads(report.stdout)["checks"]}
        assert checks["key"]["ok"] and checks["service"]["ok"] and checks["tcp"]["ok"]
        assert data["listen"][1] in checks["service"]["reason"]
        # By the environment as well.
        by_setting = {**elsewhere, "RFAAS_SERVICE": data["listen"][0], "RFAAS_KEY_FILE": str(key)}
        assert json.loads(rfaas("status", "--json", **by_setting).stdout)["pid"] == data["pid"]
        key.chmod(0o644)
        refused = rfaas("status", *which, **elsewhere)
        assert refused.returncode == 1 and "chmod 600" in refused.stderr
        report = rfaas("doctor", "--json", *which, **elsewhere)
        checks = {check["name"]: check for check in json.loads(report.stdout)["checks"]}
        assert not checks["key"]["ok"] and not checks["service"]["ok"]
        key.chmod(0o600)
    finally:
        ended = rfaas("down", "--json", *which, **elsewhere)
    assert json.loads(ended.stdout) == {"running": False, "was_running": True}
    assert rfaas("status", *which, **elsewhere).returncode == 3
    assert json.loads(rfaas("status", "--json", **there).stdout)["running"] is False


def test_a_port_in_use_is_an_error_of_the_command(tmp_path):
    chosen = tiny.settings()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = rfaas("up", "--listen", where, RFAAS_RUNTIME_DIR=chosen.runtime_dir)
    assert done.returncode == 1
    assert where in done.stderr and os.strerror(errno.EADDRINUSE) in done.stderr and "fix:" in done.stderr


def test_a_key_file_without_listen_is_a_wrong_command_line():
    done = rfaas("up", "--key-file", "/tmp/key")
    assert done.returncode == 2 and "--listen" in done.stderr

"""Calling a manager: real sockets, a real manager, and what is said when there is none."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from managed import GUARD_S, ME, Managed

from rfaas_mpi import api, skew
from rfaas_mpi._version import __version__
from rfaas_mpi.client import (
    ManagerAddress,
    ManagerClient,
    ManagerRefused,
    ManagerUnreachable,
    read_challenge,
    target,
)
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import (
    AuthError,
    ClosedError,
    ConfigError,
    LeaseDenied,
    ServiceError,
    ServiceLost,
    VersionMismatch,
)
from rfaas_mpi.remote import make_key

GIB = 1 << 30
KEY = X25519PrivateKey.generate().public_key().public_bytes_raw()
START = api.StartAgent("nid1", "agent 1", "boot", KEY, ("tcp://127.0.0.1:9",), "nid1")


@pytest.fixture
def manager(tmp_path) -> Iterator[Managed]:
    with Managed(tmp_path) as served:
        yield served


def client(manager: Managed, **settings: object) -> ManagerClient:
    return ManagerClient(Settings(manager=manager.address, **settings))


def lends(call: ManagerClient, cores: int = 4) -> int:
    """A node that lends so many cores; the number of its agent."""
    number = call.call("start_agent", START).incarnation
    call.call("report", api.Report(number, time.monotonic_ns(), tuple(range(cores)), 8 * GIB, ()), node="nid1")
    return number


def demand(workers: int, request: int = 1, **more: object) -> api.AskLease:
    return api.AskLease("s", request, workers, workers, **more)


def test_answers_come_as_the_interface_s_types(manager):
    with client(manager) as call:
        assert isinstance(call.call("start_agent", START), api.Admitted)
        lends(call)
        granted = call.call("ask", demand(2))
        assert isinstance(granted, api.LeaseGrant) and len(granted.leases[0].workers) == 2
        assert [lease.id for lease in call.call("leases").leases] == [granted.leases[0].id]
        assert call.call("release", lease=granted.leases[0].id) == api.Done()
        assert call.call("usage", by="node").rows == ()
        assert call.call("events", after=0).first >= 1
        assert call.call("end_session", session="a/b c%20").done


def test_many_threads_call_at_once(manager):
    with client(manager) as call, ThreadPoolExecutor(16) as pool:
        lends(call, cores=64)
        granted = list(pool.map(lambda number: call.call("ask", demand(1, number)), range(64)))
        assert sorted(core for grant in granted for lease in grant.leases for worker in lease.workers
                      for core in worker.cores) == list(range(64))


def test_a_demand_that_can_t_be_met_is_denied_with_the_manager_s_reason(manager):
    with client(manager) as call:
        lends(call)
        with pytest.raises(LeaseDenied, match="9 workers.*; ask for fewer"):
            call.call("ask", demand(9))


def test_other_refusals_have_their_status_and_the_way_out(manager):
    with client(manager) as call:
        with pytest.raises(ManagerRefused, match="has no lease 7.*rfaas lease ls") as error:
            call.call("release", lease=7)
        assert error.value.status == 404
        with pytest.raises(ManagerRefused, match=r"workers_min") as error:
            call.call("ask", demand(-1))
        assert error.value.status == 400


def test_who_may_not_gets_an_auth_error(tmp_path):
    from rfaas_mpi.manager.cluster import Policy
    with Managed(tmp_path, policy=Policy(lenders=frozenset(), admins=frozenset())) as manager, client(manager) as call:
        with pytest.raises(AuthError, match=f"only an administrator .*uid {ME} is none"):
            call.call("drain", api.DrainNodes())


def test_a_demand_that_waits_is_ended_by_close(manager, wait_until):
    with client(manager) as call, client(manager) as other, ThreadPoolExecutor(1) as pool:
        lends(other)
        waits = pool.submit(call.call, "ask", demand(9, timeout_s=GUARD_S))
        wait_until(lambda: manager.do(lambda server: server.cluster.manager.waiting), "the demand waits")
        call.close()
        with pytest.raises(ClosedError):
            waits.result(GUARD_S)
        with pytest.raises(ClosedError):
            call.call("leases")
        other.call("end_session", session="s")


def test_no_manager_is_an_error_that_names_the_address_and_the_way_out(tmp_path):
    with ManagerClient(Settings(manager=f"unix:{tmp_path}/nobody")) as call:
        with pytest.raises(ServiceLost, match=f"unix:{tmp_path}/nobody can't be reached: No such file.*rfaas manager"):
            call.call("nodes")


def speaking(path: Path, said: bytes) -> threading.Thread:
    """Something else that answers there once, and closes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(said)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize("said, error, text", [
    (b"", ServiceLost, "broke the connection"),
    (b"SSH-2.0-nothing\r\n", ServiceLost, "broke the connection"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", ServiceLost, "broke the connection"),
    (b"HTTP/1.1 200 OK\r\n\r\n{}", ServiceError, "says not how long"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n{}", ServiceError, "999999999999 bytes"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", ServiceError, "doesn't understand.*same version"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n" + b'{"nodes":[{"node":"\xff"}]}', ServiceError,
     "doesn't understand"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n" + b'{"x":' + b"[" * 8995, ServiceError,
     "doesn't understand"),
    (b"HTTP/1.1 409 Conflict\r\nContent-Length: 13\r\n\r\n" + b'{"error":"\xff"}', ManagerRefused, "HTTP status 409"),
    (b"HTTP/1.1 200 OK\r\nRFaaS-Version: 99.1.0\r\nContent-Length: 12\r\n\r\n" + b'{"nodes":[]}', VersionMismatch,
     r"the manager at .* runs rfaas_mpi 99\.1\.0, its caller on .* runs .*one minor number apart"),
    (b"HTTP/1.1 200 OK\r\nRFaaS-Version: newest\r\nContent-Length: 12\r\n\r\n" + b'{"nodes":[]}', ServiceError,
     "no manager.*'newest'"),
    (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\nno", ManagerRefused, "HTTP status 502")])
def test_what_is_no_manager_s_answer_is_an_error_and_no_hang(tmp_path, said, error, text):
    thread = speaking(tmp_path / "s", said)
    with ManagerClient(Settings(manager=f"unix:{tmp_path}/s")) as call, pytest.raises(error, match=text):
        call.call("nodes", wait_s=GUARD_S)
    thread.join(GUARD_S)


@pytest.mark.parametrize("answer", [b"", b'{"challenge":"AAAA","means":["\xff"]}', b'{"x":' + b"[" * 9000])
def test_what_is_no_challenge_is_a_service_error(answer):
    with pytest.raises(ServiceError, match="gives no challenge"):
        read_challenge(ManagerAddress.parse("http://m:1"), 200, answer)


def test_a_manager_that_never_answers_is_given_up(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener, ManagerClient(Settings(manager=f"unix:{tmp_path}/s")) as call:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(ServiceLost, match="has not answered for 0.01 s"):
            call.call("nodes", wait_s=0.01)


@pytest.mark.skipif(ME != 0, reason="only root can let somebody else listen")
def test_a_manager_of_another_user_is_not_believed_unless_he_is_named(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        # The kernel names who called listen().
        subprocess.run([sys.executable, "-c", "import os, socket; os.setresuid(4711, 4711, 4711); "
                        f"socket.socket(fileno={listener.fileno()}).listen()"],
                       pass_fds=[listener.fileno()], check=True)
        with pytest.raises(AuthError, match="runs as uid 4711.*RFAAS_MANAGER_USER=4711"):
            ManagerClient(Settings(manager=f"unix:{tmp_path}/s")).call("nodes")
        with pytest.raises(ServiceLost, match="has not answered"):
            ManagerClient(Settings(manager=f"unix:{tmp_path}/s", manager_user="4711")).call("nodes", wait_s=0.01)


@pytest.mark.parametrize("text, said", [
    ("unix:/run/m.sock", ("unix", "/run/m.sock", "", 0)), ("http://Nid1:80", ("http", "", "nid1", 80)),
    ("https://[::1]:8443/", ("https", "", "::1", 8443))])
def test_addresses_are_read_and_written(text, said):
    address = ManagerAddress.parse(text)
    assert tuple(address) == said and ManagerAddress.parse(str(address)) == address


@pytest.mark.parametrize("text", ["", "unix:", "unix:relative", "http://", "http://host", "http://host:0",
                                  "http://host:70000", "http://user@host:1", "http://host:1/path", "tcp://host:1",
                                  "http://[::1:1", "http://host:1?x", "http://::1:80"])
def test_what_is_no_address_is_named(text):
    with pytest.raises(ConfigError, match="no address of a manager|is no"):
        ManagerAddress.parse(text)


def test_of_several_managers_the_one_that_answers_is_called(manager, tmp_path):
    nobody = f"unix:{tmp_path}/nobody"
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))              # refuses who comes: nobody listens yet
        refusing = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        key = tmp_path / "key"
        make_key(key)
        settings = Settings.load({}, manager=f"{nobody}, {refusing},{manager.address}", manager_user=str(ME),
                                 manager_key_file=str(key))
        with ManagerClient(settings) as call:
            assert str(call.address) == nobody
            assert call.call("nodes") == api.Nodes(()) and str(call.address) == manager.address
        with ManagerClient(Settings.load({}, manager=f"{nobody},{nobody}2")) as call:
            with pytest.raises(ManagerUnreachable, match="none of the managers.*nobody2"):
                call.call("nodes")


def test_where_one_of_several_managers_can_t_reach_its_store_the_others_are_asked(manager, tmp_path):
    thread = speaking(tmp_path / "s", b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}")
    with ManagerClient(Settings.load({}, manager=f"unix:{tmp_path}/s,{manager.address}")) as call:
        assert call.call("nodes", wait_s=GUARD_S) == api.Nodes(()) and str(call.address) == manager.address
    thread.join(GUARD_S)


def test_after_one_of_several_managers_fell_silent_the_next_one_is_asked_first(manager, tmp_path):
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(tmp_path / "s"))
        frozen.listen()
        with ManagerClient(Settings.load({}, manager=f"unix:{tmp_path}/s,{manager.address}")) as call:
            with pytest.raises(ServiceLost, match="has not answered"):
                call.call("nodes", wait_s=0.01)
            assert call.call("nodes", wait_s=GUARD_S) == api.Nodes(()) and str(call.address) == manager.address


def test_of_several_managers_the_one_of_another_version_is_named(tmp_path):
    thread = speaking(tmp_path / "s", b"HTTP/1.1 200 OK\r\nRFaaS-Version: 99.1.0\r\nContent-Length: 2\r\n\r\n{}")
    with ManagerClient(Settings.load({}, manager=f"unix:{tmp_path}/nobody,unix:{tmp_path}/s")) as call:
        with pytest.raises(VersionMismatch, match=f"the manager at unix:{tmp_path}/s runs rfaas_mpi 99.1.0"):
            call.call("nodes", wait_s=GUARD_S)
    thread.join(GUARD_S)


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/nothing-of-the-kind", 404), ("PUT", "/v1/leases", 405), ("GET", "/v1/nodes", 200)])
def test_a_manager_says_its_version_with_whatever_it_answers(manager, method, path, status):
    """Also where it hasn't got what only another version has."""
    connection = http.client.HTTPConnection("manager")
    with socket.socket(socket.AF_UNIX) as dialled:
        dialled.settimeout(GUARD_S)
        dialled.connect(manager.address.removeprefix("unix:"))
        connection.sock = dialled
        connection.request(method, path)
        with connection.getresponse() as response:
            assert (response.status, response.headers[skew.HEADER]) == (status, __version__)


def test_nobody_named_is_an_error_that_names_the_setting():
    with pytest.raises(ConfigError, match="RFAAS_MANAGER"):
        ManagerClient(Settings())


def test_parameters_are_quoted_and_wrong_ones_refused():
    routes = {route.name: route for route in api.ROUTES}
    assert target(routes["end_session"], {"session": "a/b ?#%"}) == "/v1/sessions/a%2Fb%20%3F%23%25"
    assert target(routes["events"], {"after": 3}) == "/v1/events?after=3"
    assert target(routes["events"], {}) == "/v1/events"
    for name, given in (("release", {}), ("release", {"lease": 1, "x": 2}), ("leases", {"by": "uid"})):
        with pytest.raises(TypeError, match=name):
            target(routes[name], given)

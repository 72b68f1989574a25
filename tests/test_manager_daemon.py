"""`rfaas manager`: one for a directory, found again after any end, and clear about what it can't start with."""

from __future__ import annotations

import base64
import contextlib
import os
import resource
import secrets
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from rfaas_manager import RfaasManager, environment, rfaas

from rfaas_mpi import api
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.leases import LiveLease
from rfaas_mpi.leases.grants import AgentKey
from rfaas_mpi.remote import make_key

GIB = 1 << 30


def client(manager: RfaasManager) -> ManagerClient:
    return ManagerClient(Settings.load({}, manager=manager.address, manager_user=str(os.geteuid())))


class Agent:
    """An agent that lends as many cores as it is told, and runs nothing."""

    def __init__(self, asked: ManagerClient, node: str = "nid1", cores: int = 4) -> None:
        self.asked, self.node, self.cores = asked, node, cores
        self.incarnation = asked.call("start_agent", api.StartAgent(
            node, secrets.token_hex(8), "boot", AgentKey().public, (f"tcp://{node}:4711",), node)).incarnation

    def report(self, *live: api.LentLease) -> api.Orders:
        begun = tuple(LiveLease(one.id, one.epoch, one.workers) for one in live)
        return self.asked.call("report", api.Report(
            incarnation=self.incarnation, clock_ns=time.monotonic_ns(), spare=tuple(range(self.cores)),
            memory_bytes=8 * GIB, live=begun), node=self.node)


def ask(asked: ManagerClient, request: int = 1, workers: int = 1) -> api.LeaseGrant:
    return asked.call("ask", api.AskLease("s", request, workers, workers))


def refused(directory: Path, *options: object) -> str:
    """What it says where it doesn't start."""
    done = rfaas("manager", "--directory", directory, *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "fix: " in done.stderr, done.stderr
    return done.stderr


# --- life -----------------------------------------------------------------------

def test_it_says_where_it_listens_and_ends_cleanly_with_sigterm(tmp_path):
    state = tmp_path / "state"
    with RfaasManager(state) as manager:
        assert manager.facts["listening"] == [f"unix:{state}/manager.sock"]
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        with client(manager) as asked:
            assert asked.call("nodes").nodes == ()
        assert manager.stop() == 0
        assert f"listening on unix:{state}/manager.sock" in manager.said
        assert "Traceback" not in manager.said and "Error" not in manager.said, manager.said
    assert sorted(path.name for path in state.iterdir() if path.is_socket()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_one_that_ended_in_any_way_is_followed_by_one_that_knows_its_leases(tmp_path, number):
    with RfaasManager(tmp_path / "state") as manager:
        with client(manager) as asked:
            agent = Agent(asked)
            agent.report()
            granted = ask(asked)
        manager.stop(number)
    with RfaasManager(tmp_path / "state") as manager, client(manager) as asked:
        [lease] = asked.call("leases").leases
        assert (lease.id, lease.epoch) == (granted.leases[0].id, granted.leases[0].epoch)
        again = ask(asked)
        assert again.leases[0].secret == granted.leases[0].secret
        # It is heard before it lends again, and needs not register.
        agent.asked = asked
        orders = agent.report(*granted.leases)
        assert not orders.register and not orders.superseded and orders.stop == ()
        assert asked.call("lease", lease=lease.id).state == "active"
        assert ask(asked, 2).leases[0].id > lease.id


def test_it_ends_at_once_while_somebody_waits_for_cores(tmp_path):
    with RfaasManager(tmp_path / "state") as manager:
        path = manager.address.removeprefix("unix:")
        body = b'{"session": "s", "request_id": 1, "workers_min": 9, "workers_max": 9, "timeout_s": 3600}'
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(path)
            waiting.sendall(b"POST /v1/leases HTTP/1.1\r\nHost: m\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            with client(manager) as asked:
                while b"rfaas_manager_demands_waiting 1.0" not in metrics(path):
                    asked.call("nodes")
            assert manager.stop() == 0
            assert b"503" in waiting.recv(65536)


def test_a_thousand_agents_may_come_at_once(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    agents = min(1500, hard - 200)
    with contextlib.ExitStack() as stack, RfaasManager(tmp_path / "state") as manager:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        os.kill(manager.pid, signal.SIGSTOP)
        coming = []
        try:
            for _ in range(agents):
                # Refused at once (EAGAIN) where there is no room to wait.
                coming.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                coming[-1].setblocking(False)
                coming[-1].connect(manager.address.removeprefix("unix:"))
                coming[-1].send(b"GET /v1/nodes HTTP/1.1\r\nHost: m\r\n\r\n")
        finally:
            os.kill(manager.pid, signal.SIGCONT)
        for one in coming:
            one.settimeout(60)
            assert one.recv(4096).startswith(b"HTTP/1.1 200")


def metrics(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as asked:
        asked.connect(path)
        asked.sendall(b"GET /metrics HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := asked.recv(65536):
            answer += part
        return answer


def test_one_directory_has_one_manager(tmp_path):
    with RfaasManager(tmp_path / "state") as manager:
        said = refused(tmp_path / "state")
        assert f"a manager works in {tmp_path / 'state'} already (pid {manager.pid})" in said
        said = refused(tmp_path / "other", "--socket", tmp_path / "state" / "manager.sock")
        assert "somebody listens" in said
        with client(manager) as asked:
            asked.call("nodes")


# --- what it can't start with -----------------------------------------------------

@pytest.mark.parametrize("name", ["grant.key", "secret.key"])
def test_keys_that_others_may_read_are_refused(tmp_path, name):
    (tmp_path / "state").mkdir(0o700)
    key = tmp_path / "state" / name
    key.write_bytes(b"k" * 32)
    key.chmod(0o644)
    assert f"others may read or change the key file {key}" in refused(tmp_path / "state")


def test_a_directory_that_others_may_change_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    assert "others could change the state directory" in refused(tmp_path / "state")


def test_a_place_that_is_no_socket_or_too_long_for_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is there and no socket" in refused(tmp_path / "state", "--socket", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert "too long for a socket" in refused(tmp_path / "state", "--socket", tmp_path / ("x" * 120))


def test_a_damaged_ledger_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "state").mkdir(0o700)
    (tmp_path / "state" / "ledger.db").write_bytes(b"no database at all, but long enough to be looked at" * 20)
    assert "is damaged" in refused(tmp_path / "state")


def test_a_store_on_a_network_file_system_is_refused(tmp_path):
    code = ("import sys; from rfaas_mpi.manager import sqlite; sqlite.file_system_magic = lambda path: 0x6969\n"
            "from rfaas_mpi.cli import main; sys.exit(main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "manager", "--directory", str(tmp_path / "state")],
                          capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == 1 and "network file system (nfs)" in done.stderr and "Traceback" not in done.stderr


def test_without_its_libraries_it_says_what_to_install(tmp_path):
    code = ("import sys; sys.modules['prometheus_client'] = None\n"
            "from rfaas_mpi.cli import main; sys.exit(main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "manager", "--directory", str(tmp_path / "state")],
                          capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == 1 and "pip install 'rfaas_mpi[cluster]'" in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("options, said", [
    (["--listen", "nonsense"], "is no address"),
    (["--tls-cert", "nowhere.pem"], "there is none"),
    (["--listen", "127.0.0.1:0", "--tls-cert", "nowhere.pem"], "nowhere.pem"),
    (["--tls-key", "nowhere.pem"], "--tls-cert"),
    (["--key", "nobody-of-this-name=file"], "knows no user"),
    (["--key", "file"], "names no key of a user"),
    (["--metrics", "127.0.0.1"], "is no address")])
def test_options_that_make_no_sense_are_refused_by_name(tmp_path, options, said):
    assert said in refused(tmp_path / "state", *options)


# --- on a network -----------------------------------------------------------------

def test_without_a_proof_there_is_no_listening_on_a_network(tmp_path):
    assert "nobody could prove there who he is" in refused(tmp_path / "state", "--listen", "127.0.0.1:0")


def test_who_knows_a_user_s_key_calls_as_that_user(tmp_path):
    key, wrong = tmp_path / "my.key", tmp_path / "wrong.key"
    make_key(wrong)
    with RfaasManager(tmp_path / "state", "--listen", "127.0.0.1:0", "--key", f"{os.geteuid()}={key}") as manager:
        _, address = manager.facts["listening"]
        assert address.startswith("http://127.0.0.1:") and stat.S_IMODE(key.stat().st_mode) == 0o600
        named = {"RFAAS_MANAGER": address, "RFAAS_MANAGER_USER": str(os.geteuid())}
        with ManagerClient(Settings.load({}, manager=address, manager_key_file=str(key),
                                         manager_user=str(os.geteuid()))) as asked:
            agent = Agent(asked)
            agent.report()
            [lease] = ask(asked).leases
            assert len(lease.secret) == 32
        done = rfaas("lease", "ls", "--json", RFAAS_MANAGER_KEY_FILE=str(key), **named)
        assert done.returncode == 0 and f'"id": {lease.id}' in done.stdout, done.stderr
        done = rfaas("lease", "ls", "--json", RFAAS_MANAGER_KEY_FILE=str(wrong), **named)
        assert done.returncode == 1 and '"type": "AuthError"' in done.stdout, done.stdout
        assert manager.stop() == 0
    audit = (tmp_path / "state" / "audit.log").read_text()
    assert '"ask"' in audit and lease.secret.hex() not in audit and base64.b64encode(lease.secret).decode() not in audit


# --- figures --------------------------------------------------------------------

def test_prometheus_has_a_door_of_its_own_behind_which_there_is_nothing_else(tmp_path):
    with RfaasManager(tmp_path / "state", "--metrics", "127.0.0.1:0") as manager:
        url = manager.facts["metrics"]
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert b"rfaas_manager_leases" in answer.read()
        for path in ("/v1/leases", "/v1/nodes", "/openapi.json"):
            with pytest.raises(urllib.error.HTTPError) as missing:
                urllib.request.urlopen(url.removesuffix("/metrics") + path, timeout=30)
            assert missing.value.code == 404
            missing.value.close()


# --- keys -----------------------------------------------------------------------

def test_a_running_manager_signs_with_the_next_key_for_agents_that_know_it(tmp_path):
    state = tmp_path / "state"
    with RfaasManager(state) as manager, client(manager) as asked:
        agent = Agent(asked)
        (old,) = agent.report().keys
        done = rfaas("manager", "key", "rotate", "--directory", state)
        assert done.returncode == 0, done.stderr
        while len(keys := agent.report().keys) < 2:
            asked.call("nodes")
        assert keys[0] == old
        done = rfaas("manager", "--directory", state, "key", "retire")
        assert done.returncode == 0, done.stderr
        while (keys := agent.report().keys)[-1:] != keys[:1]:
            asked.call("nodes")
        assert keys != (old,)

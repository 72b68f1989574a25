"""Managers that share a PostgreSQL database: one leads, and what an earlier one still wants to write is not written."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from cluster import wait_until
from postgres_server import PortTaken, PostgresServer, free_ports, ledger_at
from rfaas_manager import RfaasManager, rfaas

from rfaas_mpi import api
from rfaas_mpi.client import ManagerClient, ManagerRefused
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import ConfigError, NotLeading, ServiceLost, StoreError
from rfaas_mpi.leases import Changes
from rfaas_mpi.manager import postgres as postgres_module
from rfaas_mpi.manager.keys import Keys
from rfaas_mpi.manager.postgres import Postgres

GUARD_S = 60.0


@pytest.fixture
def server():
    """A server of the test's own, to be stopped and changed."""
    own = PostgresServer()
    yield own
    own.close()


@pytest.fixture
def managers():
    """Makes stores, each as a manager of its own has one."""
    with contextlib.ExitStack() as stack:
        def make(url: str, keys: str = "") -> Postgres:
            store = Postgres(url, keys=keys)
            stack.callback(store.close)
            return store
        yield make


def test_a_server_of_the_tests_passes_over_a_port_that_somebody_has():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        own = PostgresServer(itertools.chain([number], free_ports()))
        try:
            assert own.port != number and own.answers()
            with pytest.raises(PortTaken, match=str(own.port)):
                own.stop()
                with socket.create_server(("127.0.0.1", own.port)):
                    own.start()
            own.start()
            assert own.answers()
        finally:
            own.close()


# --- who leads ----------------------------------------------------------------

def test_one_of_two_managers_leads_and_the_other_one_says_who(postgres, managers):
    url = postgres.database()
    first, second = managers(url), managers(url)
    assert first.leader() == ""
    assert first.try_lead() and first.try_lead() and not second.try_lead()
    assert str(os.getpid()) in second.leader()
    with pytest.raises(StoreError, match="led by another manager"):
        second.prepare("", 1, {})
    first.close()
    wait_until(second.try_lead, "the second leads")


def test_what_an_earlier_leader_still_wants_to_write_is_not_written(postgres, managers):
    url = postgres.database()
    first = ledger_at(url)
    second = managers(url)
    first.write([Changes(epoch=first.epoch + 1)])
    epoch = first.epoch
    postgres.end_sessions()
    wait_until(lambda: _leads(second), "the second leads")
    with pytest.raises(StoreError):
        first.write([Changes(epoch=epoch + 1)])
    with pytest.raises(NotLeading, match="another manager.*stand by"):
        first.write([Changes(epoch=epoch + 1)])
    with pytest.raises(NotLeading):
        first.keep()
    first.close()
    second.close()
    with contextlib.closing(ledger_at(url)) as third:
        assert third.epoch == epoch


def test_the_term_keeps_out_a_session_that_lives_on(postgres, managers):
    """Without its lock a session could still write: the term is in each transaction."""
    url = postgres.database()
    with contextlib.closing(ledger_at(url)) as first:
        first._db.execute("SELECT pg_advisory_unlock_all()")
        assert managers(url).try_lead()
        with pytest.raises(NotLeading):
            first.write([Changes(epoch=first.epoch + 1)])


def test_a_leader_whose_session_ended_goes_on_where_nobody_took_over(postgres):
    with contextlib.closing(ledger_at(postgres.database())) as ledger:
        postgres.end_sessions()
        with pytest.raises(StoreError, match="can't be reached"):
            ledger.write([Changes(epoch=ledger.epoch + 1)])
        # The server lets go of the lock a moment after it has said so.
        _written(ledger, ledger.epoch + 1)


def test_a_leader_that_shows_no_life_is_given_up_by_the_server(postgres, managers, monkeypatch):
    monkeypatch.setattr(postgres_module, "SILENT_S", 1.0)
    url = postgres.database()
    second = managers(url)
    with contextlib.closing(ledger_at(url)) as first:
        first.keep()
        wait_until(lambda: _leads(second), "the second leads")
        with pytest.raises(StoreError):
            first.keep()
        with pytest.raises(NotLeading):
            first.keep()


_LEADS = """
import signal, sys
from rfaas_mpi.manager import postgres
postgres.SILENT_S, postgres.KEEP_S, postgres.STARTS_S = 1.0, 0.1, 3600.0
store = postgres.Postgres(sys.argv[1])
assert store.try_lead()
print("leads", flush=True)
signal.pause()
"""


def test_a_leader_that_freezes_while_it_starts_is_given_up_as_soon(postgres, managers):
    url = postgres.database()
    second = managers(url)
    with subprocess.Popen([sys.executable, "-c", _LEADS, url], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "leads\n"
            assert not second.try_lead()
            first.send_signal(signal.SIGSTOP)
            wait_until(lambda: _leads(second), "the second leads")
        finally:
            first.kill()


def test_a_leader_may_be_busy_with_what_it_found_for_longer_than_it_may_be_silent(postgres, managers, monkeypatch):
    monkeypatch.setattr(postgres_module, "SILENT_S", 1.5)
    monkeypatch.setattr(postgres_module, "KEEP_S", 0.05)
    url = postgres.database()
    first, second = managers(url), managers(url)
    assert first.try_lead()
    began = _clock(postgres)
    wait_until(lambda: _clock(postgres) - began > 3.0, "twice as long has passed")
    assert not second.try_lead()
    first.keep()


def test_who_shows_no_sign_of_having_started_loses_its_place(postgres, managers, monkeypatch):
    for name, value in (("SILENT_S", 0.5), ("KEEP_S", 0.05), ("STARTS_S", 0.2)):
        monkeypatch.setattr(postgres_module, name, value)
    url = postgres.database()
    first, second = managers(url), managers(url)
    assert first.try_lead()
    wait_until(lambda: _leads(second), "the second leads")


def _clock(server: PostgresServer) -> float:
    [(now,)] = server.ask("SELECT extract(epoch FROM clock_timestamp())::float8")
    return now


def _leads(store: Postgres) -> bool:
    with contextlib.suppress(StoreError):
        return store.try_lead()
    return False


def test_managers_with_other_keys_are_refused(postgres, managers):
    url = postgres.database()
    first = managers(url, Keys(bytes(32), [bytes(32)]).mark)
    assert first.try_lead()
    with pytest.raises(StoreError, match="another secret.key.*copy secret.key"):
        managers(url, Keys(bytes(31) + b"1", [bytes(32)]).mark).try_lead()
    assert not managers(url, Keys(bytes(32), [bytes(32)]).mark).try_lead()


# --- what is promised about what is written -------------------------------------

def test_commits_wait_for_the_disk_whatever_the_user_is_set_to(postgres):
    url = postgres.database()
    name = url.partition("?")[0].rpartition("/")[2]
    postgres.ask(f"ALTER DATABASE {name} SET synchronous_commit = off")
    with contextlib.closing(ledger_at(url)) as ledger:
        assert ledger._db.execute("SHOW synchronous_commit").fetchone() == ("on",)


def test_readers_can_write_nothing(postgres, managers):
    with contextlib.closing(ledger_at(postgres.database())) as ledger:
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            with ledger._db.reading() as db:
                db.execute("DELETE FROM leases")
        assert ledger.usage() == []
        postgres.end_sessions()
        assert ledger.usage() == [], "a session that the server has ended is no reason to refuse"


def test_a_database_of_a_later_version_is_refused_untouched(postgres):
    url = postgres.database()
    with contextlib.closing(ledger_at(url)) as ledger:
        ledger._db.execute("UPDATE format SET version = 99")
    with pytest.raises(StoreError, match="later version"):
        ledger_at(url)


def test_a_database_that_is_read_only_or_down_is_written_to_again_once_it_can_be(server):
    url = server.database()
    with contextlib.closing(ledger_at(url)) as ledger:
        epoch = ledger.epoch
        name = url.partition("?")[0].rpartition("/")[2]
        server.ask(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        server.end_sessions()
        _refused(ledger, "can't be written: it is read-only.*target_session_attrs")
        server.ask(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        server.end_sessions()
        _written(ledger, epoch + 1)
        server.stop(signal.SIGQUIT)
        _refused(ledger, "can't be reached")
        server.start()
        _written(ledger, epoch + 2)
        server.stop()
        server.start(fsync="off")
        _refused(ledger, "fsync = off.*set fsync = on")


def _refused(ledger, said: str) -> None:
    """It says so, perhaps after it has said that its session is gone."""
    def why() -> str:
        with pytest.raises(StoreError) as caught:
            ledger.write([Changes(epoch=ledger.epoch + 1000)])
        return str(caught.value)
    wait_until(lambda: re.search(said, why()), said)


def _written(ledger, epoch: int) -> None:
    def write() -> bool:
        with contextlib.suppress(StoreError):
            ledger.write([Changes(epoch=epoch)])
            return True
        return False
    wait_until(write, "it can be written again")
    assert ledger.epoch == epoch


# --- how it is named ------------------------------------------------------------

@pytest.mark.parametrize("url", [
    "postgresql://rfaas:sesame@db/rfaas", "postgresql://db/rfaas?password=sesame",
    "postgresql://rfaas:sesame@[db/rfaas", "host=db password=sesame", "mysql://rfaas:sesame@db/rfaas"])
def test_a_password_in_the_address_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as caught:
        Postgres(url)
    assert "sesame" not in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("url, more, said", [
    ("postgresql://rfaas:sesame@db/rfaas", {}, "the store's address holds a password"),
    ("postgresql://rfaas@db/rfaas", {"PGPASSWORD": "sesame"}, "PGPASSWORD holds a password")])
def test_a_manager_that_is_told_a_password_doesn_t_start_and_says_where_it_belongs(tmp_path, url, more, said):
    done = rfaas("manager", "--directory", tmp_path / "state", "--store", url, **more)
    assert done.returncode == 1 and said in done.stderr and "sesame" not in done.stderr, done.stderr


def test_a_password_comes_from_a_file(postgres, tmp_path, monkeypatch):
    name = postgres.database().partition("?")[0].rpartition("/")[2]
    postgres.ask("ALTER USER rfaas PASSWORD 'sesame'")
    url = f"postgresql://rfaas@127.0.0.1:{postgres.port}/{name}"
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
    with pytest.raises(StoreError, match="can't be reached: .*password"):
        ledger_at(url)
    (tmp_path / "pgpass").write_text(f"127.0.0.1:{postgres.port}:{name}:rfaas:sesame\n")
    (tmp_path / "pgpass").chmod(0o600)
    with contextlib.closing(ledger_at(url)) as ledger:
        assert ledger.name == url


def test_a_server_that_is_not_there_is_an_error_that_says_so(tmp_path):
    done = rfaas("manager", "--directory", tmp_path / "state", "--store", "postgresql://rfaas@127.0.0.1:1/rfaas")
    assert done.returncode == 1 and "can't be reached" in done.stderr and "Traceback" not in done.stderr, done.stderr


# --- managers -------------------------------------------------------------------

def test_a_manager_that_stands_by_takes_over_from_one_that_is_frozen(postgres, tmp_path):
    """And that one ends when it wakes up, with nothing granted."""
    url = postgres.database()
    addresses = ",".join(f"unix:{tmp_path}/{name}/manager.sock" for name in ("one", "two"))
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(RfaasManager(tmp_path / "one", "--store", url))
        asked = stack.enter_context(ManagerClient(Settings.load(
            {}, manager=addresses, manager_user=str(os.geteuid()))))
        assert asked.call("nodes").nodes == () and str(asked.address) == addresses.split(",")[0]
        (tmp_path / "two").mkdir(mode=0o700)
        for key in ("secret.key", "grant.key"):
            (tmp_path / "two" / key).write_bytes((tmp_path / "one" / key).read_bytes())
            (tmp_path / "two" / key).chmod(0o600)
        os.kill(one.pid, signal.SIGSTOP)
        stack.callback(_continue, one)
        two = stack.enter_context(RfaasManager(tmp_path / "two", "--store", url))       # once it leads
        os.kill(one.pid, signal.SIGCONT)
        assert one.ended() == 1
        assert "another manager" in one.said and "Traceback" not in one.said, one.said
        assert asked.call("nodes").nodes == () and str(asked.address) == two.address
        assert rfaas("status", RFAAS_MANAGER=addresses, RFAAS_MANAGER_USER=str(os.geteuid())).returncode == 0


def _continue(manager: RfaasManager) -> None:
    with contextlib.suppress(AssertionError, ProcessLookupError):
        os.kill(manager.pid, signal.SIGCONT)


def test_one_that_stands_by_ends_with_sigterm(postgres, tmp_path):
    url = postgres.database()
    with contextlib.closing(ledger_at(url)) as ledger:
        ledger._db._keys = ""
        ledger._db.execute("UPDATE term SET keys = ?", (Keys.of(_made(tmp_path / "state")).mark,))
        waiting = RfaasManager(tmp_path / "state", "--store", url)
        waiting.start()
        wait_until(lambda: "stands by" in (tmp_path / "state.stderr").read_text(), "it stands by")
        assert waiting.stop() == 0 and "Traceback" not in waiting.said, waiting.said


def _made(directory: Path) -> Path:
    directory.mkdir(mode=0o700)
    return directory


def test_a_database_that_is_restarted_under_a_manager_costs_a_while_and_nothing_else(server, tmp_path):
    with RfaasManager(tmp_path / "state", "--store", server.database()) as manager:
        with ManagerClient(Settings.load({}, manager=manager.address, manager_user=str(os.geteuid()))) as asked:
            server.stop(signal.SIGQUIT)
            with pytest.raises(ManagerRefused) as caught:
                asked.call("start_agent", _agent("nid1"))
            assert caught.value.status == 503
            server.start()

            def admitted() -> bool:
                with contextlib.suppress(ManagerRefused, ServiceLost):
                    return bool(asked.call("start_agent", _agent("nid2")))
                return False
            wait_until(admitted, "an agent is admitted", GUARD_S)


def _agent(node: str) -> api.StartAgent:
    from rfaas_mpi.leases.grants import AgentKey
    return api.StartAgent(node, "a" * 16, "boot", AgentKey().public, (f"tcp://{node}:1",), node)

"""Who believes whom in a cluster: keys that rotate, grants that are shown again, secrets that are seen nowhere.

A real manager and a real agent; tests/test_lease_session.py has the handshake itself.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faults
import msgspec
import pytest
from cluster import Cluster, descendants, wait_until

from rfaas_mpi import Executor, api
from rfaas_mpi.errors import AuthError, LeaseDenied, ServiceError
from rfaas_mpi.leases.grants import GrantBody, GrantSigner, key_id
from rfaas_mpi.session import Session

HEAD_BYTES = 1 + 8 + 64
_asked = itertools.count(1)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(["0-1"], sockets=[0]) as cluster:
        yield cluster


def lend(cluster: Cluster) -> api.LentLease:
    """A lease of one worker that nobody has used."""
    ask = api.AskLease(session=f"test-{os.getpid()}", request_id=next(_asked), workers_min=1, workers_max=1)
    [lent] = cluster.call("ask", ask).leases
    return lent


def opened(cluster: Cluster, lent: api.LentLease, **changes: object) -> Session:
    return Session.open_lease(msgspec.structs.replace(lent, **changes), cluster.settings)


def give_back(cluster: Cluster, lent: api.LentLease) -> None:
    """Ends a lease, used or not; returns when its core is free."""
    with contextlib.suppress(ServiceError):
        cluster.call("release", lease=lent.id)
    wait_until(lambda: lent.id not in [lease.id for lease in cluster.leases()], "its core came back")


def body_of(lent: api.LentLease) -> GrantBody:
    return msgspec.msgpack.decode(lent.grant[HEAD_BYTES:], type=GrantBody)


def manager_key(cluster: Cluster, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "manager", "key", *words, "--directory",
                    str(cluster.directory / "manager")], check=True, env=faults.environment(), capture_output=True)


def signer(cluster: Cluster, name: str) -> GrantSigner:
    return GrantSigner((cluster.directory / "manager" / name).read_bytes())


# --- keys rotate --------------------------------------------------------------------------------

def test_keys_rotate_and_no_lease_notices(cluster):
    old = signer(cluster, "grant.key")
    first = lend(cluster)
    assert first.grant[1:9] == key_id(old.public)
    with opened(cluster, first) as session:
        lease = session.use()
        manager_key(cluster, "rotate")
        new = signer(cluster, "grant.key.next")

        def use_another() -> api.LentLease:
            """A lease works, whichever key has signed it; and the agent reports, and hears of keys."""
            lent = lend(cluster)
            with opened(cluster, lent) as other:
                assert other.use().id == lent.id
            give_back(cluster, lent)
            return lent

        wait_until(lambda: use_another().grant[1:9] == key_id(new.public),
                   "the agent knows the new key, and the manager that it does")
        # What the old one signed is believed for as long as it isn't retired.
        lent = use_another()
        by_old = old.sign(body_of(lent))
        opened(cluster, lent, grant=by_old).close()

        manager_key(cluster, "retire")

        def old_is_refused() -> bool:
            use_another()
            try:
                opened(cluster, lent, grant=by_old).close()
            except AuthError:
                return True
            return False

        wait_until(old_is_refused, "the agent believes the old key no more")
        assert use_another().grant[1:9] == key_id(new.public)
        assert session.use() == lease, "a lease of the old key's lives on"
        with socket.socket(fileno=session.dial(lease, lease.workers[0].number)):
            pass


# --- grants that are shown again --------------------------------------------------------------------

def test_a_grant_is_used_once(cluster):
    lent = lend(cluster)
    with opened(cluster, lent) as session:
        session.use()
    give_back(cluster, lent)
    with opened(cluster, lent) as session, pytest.raises(LeaseDenied, match="used before"):
        session.use()
    with pytest.raises(AuthError):
        opened(cluster, lent, grant=b"")


def test_a_grant_without_its_secret_is_worth_nothing(cluster):
    lent = lend(cluster)
    for secret in (bytes(32), lend(cluster).secret):
        with pytest.raises(AuthError, match="does not believe"):
            opened(cluster, lent, secret=secret)
    with opened(cluster, lent) as session:
        assert session.use().id == lent.id


def test_a_grant_for_an_agent_that_was_restarted_is_refused(cluster):
    lent = lend(cluster)
    agent = cluster.agents[0]
    agent.kill()
    agent.start()

    def refused() -> bool:
        try:
            opened(cluster, lent).close()
        except AuthError:
            return True
        except ServiceError:
            return False
        pytest.fail("it was let in")

    # It may have another port now, but the same socket.
    wait_until(refused, "the new agent listens")


def test_a_lease_s_session_is_about_that_lease_and_nothing_else(cluster):
    mine, other = lend(cluster), lend(cluster)
    with opened(cluster, mine) as session, opened(cluster, other) as theirs:
        lease, worker = session.use(), theirs.use().workers[0].number
        for ask in (session.status, session.down, session.stay, lambda: session.open_door(["127.0.0.1:0"]),
                    lambda: session.request(1, 1), lambda: session.kill(other.id, worker)):
            with pytest.raises(ServiceError):
                ask()
        assert theirs.use().workers[0].number == worker and session.use() == lease


# --- secrets are seen nowhere -----------------------------------------------------------------------

def test_a_lease_s_secret_is_in_no_file_log_argument_or_environment(cluster, monkeypatch):
    open_lease, leases = Session.open_lease, []

    def remembering(lent: api.LentLease, *arguments: object, **named: object) -> Session:
        leases.append(lent)
        return open_lease(lent, *arguments, **named)

    monkeypatch.setattr(Session, "open_lease", remembering)
    with Executor(2, manager=cluster.environment["RFAAS_MANAGER"],
                  manager_user=cluster.environment["RFAAS_MANAGER_USER"], fallback=False) as ex:
        assert ex.submit(faults.plus_one, 41).result() == 42
        secrets = [lent.secret for lent in leases]
        assert secrets and all(len(secret) == 32 for secret in secrets)
        keys = [(cluster.directory / "manager" / name).read_bytes() for name in ("grant.key", "secret.key")]
        pids = [cluster.manager.pid, *(agent.pid for agent in cluster.agents)]
        pids += [pid for agent in cluster.agents for pid in descendants(agent.pid)]
        texts = {f"{name} of {pid}": Path(f"/proc/{pid}/{name}").read_bytes()
                 for pid in pids for name in ("cmdline", "environ")}
        texts |= {str(path): path.read_bytes() for path in cluster.directory.rglob("*")
                  if path.is_file() and path.suffix != ".key" and not path.name.endswith(".key.next")}
        texts |= {f"text of lease {lent.id}": repr(lent).encode() for lent in leases}
        assert any(name.endswith("ledger.db") for name in texts)
        for where, text in texts.items():
            for secret in (*secrets, *keys):
                seen = (secret, secret.hex().encode(), repr(secret)[2:-1].encode())
                assert not any(form in text for form in seen), where


def test_the_manager_s_keys_are_for_its_user_alone(cluster):
    for name in ("grant.key", "secret.key"):
        assert (cluster.directory / "manager" / name).stat().st_mode & 0o777 == 0o600

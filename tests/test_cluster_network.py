"""A cluster whose manager is called over a network alone: real daemons, by MUNGE, by a key, within TLS."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import faults
import pytest
from cluster import Daemon, wait_until
from munged import Munged
from test_identity import certificate

from rfaas_mpi import Executor
from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import AuthError

ME = os.geteuid()


@pytest.fixture(scope="module")
def munged() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rfaas-munge-") as top:
        Path(top).chmod(0o755)
        daemon = Munged(Path(top) / "a", secrets.token_bytes(128))
        wait_until(daemon.serves, "munged serves")
        yield daemon.socket
        daemon.close()


@contextlib.contextmanager
def cluster(words: Sequence[object], means: dict[str, str]) -> Iterator[dict[str, str]]:
    """A manager and one agent of two cores; what a rank's environment has to say."""
    directory = Path(tempfile.mkdtemp(prefix="rfaas-t-"))
    own = {**means, "RFAAS_MANAGER_USER": str(ME)}
    manager = Daemon(directory / "manager.log", [
        "manager", "--directory", directory / "m", "--socket", directory / "s", "--listen", "127.0.0.1:0", *words],
        **own)
    agent: Daemon | None = None
    try:
        manager.start()
        found = wait_until(lambda: manager.alive and re.search(r"(https?://127\.0\.0\.1:[0-9]+)", manager.said()),
                           "the manager listens")
        own["RFAAS_MANAGER"] = found[1]
        # Nobody goes by the socket.
        (directory / "s").unlink()
        agent = Daemon(directory / "agent.log", [
            "agent", "--node", "node0", "--cores", "0-1", "--directory", directory / "a", "--listen", "127.0.0.1:0",
            "--socket", "none"], **own)
        agent.start()
        with ManagerClient(settings(own)) as call:
            wait_until(lambda: any(view.free for view in call.call("nodes").nodes) or not agent.alive,
                       "the agent has reported")
        assert agent.alive, agent.said()
        yield own
    finally:
        for daemon in (agent, manager):
            if daemon is not None:
                daemon.close()
        shutil.rmtree(directory, ignore_errors=True)


def settings(means: dict[str, str]) -> Settings:
    return Settings.load({**os.environ, **means})


def as_arguments(means: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix("RFAAS_").lower(): value for name, value in means.items()}


def rfaas(means: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", *words], env=faults.environment(**means),
                          capture_output=True, text=True, timeout=100)


def works(means: dict[str, str]) -> None:
    with Executor(2, fallback=False, **as_arguments(means)) as ex:
        assert list(ex.map(faults.plus_one, range(100))) == list(range(1, 101))
        listed = rfaas(means, "lease", "ls", "--json")
        assert listed.returncode == 0, listed.stderr
        assert len(json.loads(listed.stdout)["leases"]) == 1


def test_by_munge_a_rank_its_agent_and_the_command_line_reach_the_manager(munged):
    with cluster(["--munge"], {"RFAAS_MUNGE_SOCKET": munged}) as means:
        works(means)


def test_by_a_key_and_nobody_gets_in_with_another(tmp_path):
    key, other = tmp_path / "my.key", tmp_path / "other.key"
    with cluster(["--key", f"{ME}={key}"], {"RFAAS_MANAGER_KEY_FILE": str(key)}) as means:
        works(means)
        other.write_bytes(secrets.token_bytes(32))
        other.chmod(0o600)
        wrong = {**means, "RFAAS_MANAGER_KEY_FILE": str(other)}
        with pytest.raises(AuthError, match="holds no key"):
            Executor(1, **as_arguments(wrong))
        found = {check["name"]: check for check in json.loads(rfaas(means, "doctor", "--json").stdout)["checks"]}
        assert found["manager"]["ok"] and "by key; cores that you could have now: 2" in found["manager"]["reason"]
        assert found["agents"]["ok"] and found["agents"]["reason"] == "1 of 1 report"
        found = {check["name"]: check for check in json.loads(rfaas(wrong, "doctor", "--json").stdout)["checks"]}
        assert not found["manager"]["ok"] and "holds no key" in found["manager"]["reason"]
        refused = rfaas(wrong, "lease", "ls")
        assert refused.returncode != 0 and "holds no key" in refused.stderr and "Traceback" not in refused.stderr


def test_within_tls(tmp_path):
    key = tmp_path / "my.key"
    certificate(tmp_path)
    (tmp_path / "key.pem").chmod(0o600)
    given = ["--key", f"{ME}={key}", "--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem"]
    means = {"RFAAS_MANAGER_KEY_FILE": str(key), "RFAAS_CA_FILE": str(tmp_path / "cert.pem")}
    with cluster(given, means) as means:
        assert means["RFAAS_MANAGER"].startswith("https://")
        works(means)

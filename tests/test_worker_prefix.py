"""Workers inside of a container: a command that they are started through, here a real bubblewrap."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import faults
import numpy as np
import pytest

from rfaas_mpi import ConfigError, Executor, KernelError, RFaaSError, ServiceError
from rfaas_mpi.config import Settings

BWRAP = shutil.which("bwrap")
INSIDE = "--dev-bind / / --unshare-pid --proc /proc --die-with-parent --setenv SEEN_FROM bwrap --"


def why_not() -> str:
    """Why there can be no container here; empty if there can."""
    if BWRAP is None:
        return "there is no bwrap: apt-get install bubblewrap"
    done = subprocess.run([BWRAP, *INSIDE.split(), "true"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"bwrap: {done.stderr.strip()}"


@pytest.fixture
def ex(tmp_path, monkeypatch):
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setenv("RFAAS_WORKER_PREFIX", f"{BWRAP} {INSIDE}")
    with Executor(workers=2, cores=(0, 1), runtime_dir=str(tmp_path), linger_s=0.2) as executor:
        yield executor


def where() -> tuple[int, str, str]:
    return os.getpid(), os.readlink("/proc/self/ns/pid"), Path("/proc/1/comm").read_text().strip()


def test_kernels_run_inside_and_their_answers_are_right(ex):
    pid, namespace, first = ex.submit(where).result()
    assert namespace != os.readlink("/proc/self/ns/pid") and first == "bwrap" and pid < 1000
    x = np.arange(100_000.0)
    assert (ex.Invoke(faults.adds_one, x, np.empty_like(x)) == x + 1).all()
    assert list(ex.map(faults.plus_one, range(50))) == list(range(1, 51))


def workers(executor) -> list[int]:
    """Their pids, as they are seen from outside."""
    return [worker["pid"] for worker in executor._crew.lending.session.status()["workers"]]


def test_the_service_knows_workers_by_their_pids_outside_and_replaces_one_that_ends(ex):
    pids = workers(ex)
    assert len(pids) == 2
    assert all(Path(f"/proc/{pid}/comm").read_text().startswith("rfaas-worker") for pid in pids)
    with pytest.raises(KernelError, match="SIGSEGV"):
        ex.submit(faults.do, "segfault").result()
    assert ex.submit(faults.plus_one, 1).result() == 2


def test_a_forced_cancel_reaches_inside(ex, tmp_path):
    future = ex.submit(faults.begin_then_wait, str(tmp_path / "begun"), str(tmp_path / "never"), 1)
    faults.wait_for(tmp_path / "begun")
    assert future.cancel(force=True)
    assert ex.submit(faults.plus_one, 2).result() == 3


def test_nothing_stays_inside_when_the_service_is_killed(ex, wait_until):
    pids = workers(ex)
    os.kill(faults.service_pid(ex), 9)
    wait_until(lambda: not any(faults.alive(pid) for pid in pids), "workers end with the service")


def test_a_container_that_does_not_start_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("RFAAS_WORKER_PREFIX", "/bin/false --")
    with pytest.raises(RFaaSError, match="did not start|revoked"), \
            Executor(workers=1, runtime_dir=str(tmp_path), linger_s=0.2) as executor:
        executor.submit(faults.plus_one, 1).result()
    monkeypatch.setenv("RFAAS_WORKER_PREFIX", "/no/such/program")
    with pytest.raises(ServiceError, match=f"{socket.gethostname()}.*/no/such/program"), \
            Executor(workers=1, runtime_dir=str(tmp_path), linger_s=0.2) as executor:
        executor.submit(faults.plus_one, 1).result()


def test_a_prefix_names_its_program_by_a_path():
    assert Settings.load({"RFAAS_WORKER_PREFIX": "/usr/bin/bwrap --bind 'a b' /"}).worker_prefix
    with pytest.raises(ConfigError, match="path"):
        Settings.load({"RFAAS_WORKER_PREFIX": "bwrap --ro-bind / /"})

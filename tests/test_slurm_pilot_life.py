"""A pilot without Slurm: where its files are (and a job's), and what it says when it ends by itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from manager_process import ManagerProcess

from rfaas_mpi.remote import make_key
from rfaas_mpi.slurm import facts, filling, run

GUARD_S = 60.0
REPOSITORY = Path(__file__).resolve().parent.parent


def test_pilots_that_begin_together_keep_nobody_out_of_what_is_his(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name = f"rfaas-pilot-{os.geteuid()}"
    others = {number: run.private(tmp_path / f"{name}-{number}") for number in ("1", "2", "3")}
    for number in "23":
        os.utime(others[number], times=(0, 0))
    tried: list[Path] = []
    held = run.held

    def seen(path: Path) -> contextlib.AbstractContextManager[None]:
        tried.append(path)
        return held(path)

    with held(others["3"]):
        monkeypatch.setattr(run, "held", seen)
        with filling.pilot_directory("4") as own:
            assert others["1"] not in tried, "its pilot was just about to hold it, and would have ended"
            assert sorted(tmp_path.iterdir()) == [others["1"], others["3"], own]
    assert not own.exists()


def test_jobs_that_begin_together_keep_nobody_out_of_what_is_his_either(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    new, old, used = (run.private(tmp_path / f"rfaas-slurm-{os.geteuid()}-{number}") for number in (1, 2, 3))
    for each in (old, used):
        os.utime(each, times=(0, 0))
    tried: list[Path] = []
    held = run.held

    def seen(path: Path) -> contextlib.AbstractContextManager[None]:
        tried.append(path)
        return held(path)

    with held(used):
        monkeypatch.setattr(run, "held", seen)
        run.clear_killed()
    assert new not in tried, "its job was just about to hold it, and would have been refused"
    assert sorted(tmp_path.iterdir()) == [new, used]


def test_a_log_is_begun_anew_once_it_is_long(tmp_path):
    long, short = tmp_path / "pilot-n1.log", tmp_path / "pilot-n2.log"
    long.write_bytes(bytes(filling._LOG_BYTES + 1))
    short.write_text("rfaas: pilot 7 leaves: its time is over\n")
    with long.open("ab") as pilot:
        filling.shorten_logs(tmp_path)
        pilot.write(b"on it goes\n")
    assert long.read_bytes() == b"on it goes\n" and short.stat().st_size > 0


@pytest.mark.parametrize("key, status, why", [("key", 0, "rfaas: pilot 7 leaves: its time is over"),
                                              ("nowhere", 1, "the key file ")])
def test_a_pilot_that_ends_by_itself_says_which_it_was_and_why(tmp_path, key, status, why):
    make_key(tmp_path / "key")
    with ManagerProcess(tmp_path, port=0, keys={os.geteuid(): tmp_path / "key"}) as manager:
        done = subprocess.run(
            [sys.executable, "-m", "rfaas_mpi.cli", "slurm", "pilot", "--manager", manager.network, "--auth", "key",
             "--manager-user", str(os.geteuid()), "--manager-key-file", tmp_path / key], cwd=REPOSITORY,
            capture_output=True, text=True, timeout=GUARD_S, env={
                **os.environ, "TMPDIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1",
                "SLURM_JOB_CPUS_PER_NODE": str(os.cpu_count()),
                "SLURM_JOB_END_TIME": str(int(time.time() + facts.LEAD_S + 2))})
    assert done.returncode == status and why in done.stderr, done.stderr
    assert "rfaas: pilot 7 begins\n" in done.stderr
    assert not list(tmp_path.glob("rfaas-pilot-*")), "it leaves nothing"

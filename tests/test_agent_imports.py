"""What an agent has imported by the time it lends: a pilot's lives for minutes, and its start is most of what it costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster import GUARD_S, wait_until
from manager_process import ManagerProcess

from rfaas_mpi.client import ManagerClient
from rfaas_mpi.config import Settings
from rfaas_mpi.remote import make_key

# Each takes as long as a fifth of all the rest, or longer.
HEAVY = {"aiohttp", "numpy", "prometheus_client"}
REPOSITORY = Path(__file__).resolve().parent.parent

# The command, in a process that says on request what it has imported.
PROGRAM = """
import json, sys, threading
def answer():
    sys.stdin.readline()
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), flush=True)
threading.Thread(target=answer, daemon=True).start()
from rfaas_mpi.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def imported(manager: ManagerProcess, directory: Path, *words: str, **variables: str) -> set[str]:
    """The packages that this command's agent has imported once the manager knows what it lends."""
    agent = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, cwd=REPOSITORY,
                             env={**os.environ, "TMPDIR": str(directory), "RFAAS_RUNTIME_DIR": str(directory),
                                  **variables})
    try:
        with ManagerClient(Settings(manager=manager.unix)) as client:
            wait_until(lambda: agent.poll() is not None or any(node.spare for node in client.call("nodes").nodes),
                       "it lends")
        assert agent.poll() is None
        assert agent.stdin is not None and agent.stdout is not None
        agent.stdin.write("\n")
        agent.stdin.flush()
        return set(json.loads(agent.stdout.readline()))
    finally:
        agent.send_signal(signal.SIGTERM)
        try:
            agent.communicate(timeout=GUARD_S)
        finally:
            agent.kill()


def test_a_pilot_lends_before_anything_heavy_is_imported(tmp_path):
    key = tmp_path / "key"
    make_key(key)
    with ManagerProcess(tmp_path, port=0, keys={os.geteuid(): key}) as manager:
        found = imported(manager, tmp_path, "slurm", "pilot", "--manager", manager.network, "--auth", "key",
                         "--manager-user", str(os.geteuid()), "--manager-key-file", str(key),
                         SLURM_JOB_ID="7", SLURM_JOB_CPUS_PER_NODE=str(os.cpu_count()), SLURMD_NODENAME="n1",
                         SLURM_JOB_END_TIME=str(int(time.time()) + 3600))
    assert "cryptography" in found, "it is an agent that was asked"
    assert not found & HEAVY


def test_an_agent_that_looks_after_jobs_and_shows_figures_imports_what_that_takes(tmp_path):
    # So that the other test would see it.
    with ManagerProcess(tmp_path) as manager:
        found = imported(manager, tmp_path, "agent", "--manager", manager.unix, "--directory", str(tmp_path / "a"),
                         "--metrics", f"unix:{tmp_path}/figures")
    assert {"numpy", "prometheus_client"} <= found

"""The benchmark from lease to first result measures whole rounds of a real manager and agent; no test judges a time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from rfaas_mpi.bench import first
from rfaas_mpi.bench.namespaces import other_node
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options

LISTENS = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
server.accept()[0].sendall(sys.argv[1].encode())
"""
STEPS = ["ask", "open", "use", "dial", "attach", "first_call"]


@pytest.fixture(scope="module")
def figures() -> dict:
    return first.measure_first(Options(runs=1, quick=True))


def test_each_step_of_a_lease_through_manager_and_agent_is_timed_and_they_add_up(figures):
    assert list(figures["first_timeline_ms"]) == STEPS
    ends = list(figures["first_timeline_ms"].values())
    assert ends[0] > 0 and ends == sorted(ends)
    assert figures["first_ms"] > max(figures[f"first_{name}_ms"] for name in STEPS)


def test_beside_it_stand_itself_again_the_embedded_service_and_an_environment_s_first_lease(figures):
    assert figures["figures"]["first_ms"]["aa"]["count"] == figures["first_ms_count"] > 0
    assert figures["first_embedded_ms"] > 0 and figures["first_executor_ms"] > 0 and figures["first_at_once_ms"] > 0
    assert figures["first_cold_zygote_ms_count"] == 2 and figures["first_cold_zygote_ms"] > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace: needs root")
def test_other_nodes_are_namespaces_that_can_be_reached_and_are_gone_in_the_end():
    """Two at a time: somebody else may measure on this machine."""
    with other_node() as one, other_node() as two:
        namespaces = {subprocess.run([*prefix, "readlink", "/proc/self/ns/net"], capture_output=True).stdout
                      for prefix in ((), one.prefix, two.prefix)}
        assert len(namespaces) == 3 and one.host != two.host
        assert {one.device, two.device} <= set(os.listdir("/sys/class/net"))
        for node in (one, two):
            with subprocess.Popen([*node.prefix, sys.executable, "-c", LISTENS, node.host], stdout=subprocess.PIPE,
                                  text=True) as process:
                assert process.stdout is not None
                port = int(process.stdout.readline())
                with socket.create_connection((node.host, port), timeout=30) as connection:
                    assert connection.recv(100).decode() == node.host
    assert not {one.device, two.device} & set(os.listdir("/sys/class/net"))


def test_where_no_namespace_can_be_made_it_is_said_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="there is no unshare|isn't root"), other_node():
        raise AssertionError("there is no other node")

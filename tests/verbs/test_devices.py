"""The machine that these tests run on has what tests of verbs count on."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest

from verbs import support


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_node_has_an_active_port_and_a_gid(nodes):
    for node in nodes:
        assert "PORT_ACTIVE" in run("ibv_devinfo", "-d", node.device, "-i", node.port)
        assert node.gid != "0000:0000:0000:0000:0000:0000:0000:0000"


@pytest.mark.guest
def test_the_nodes_of_the_guest_have_devices_and_addresses_of_their_own(nodes):
    assert [(node.device, node.gid_index, node.address) for node in support.active_nodes()] == \
        [("rxe0", 1, "10.77.0.1"), ("rxe1", 1, "10.77.0.2")]


def test_all_memory_may_be_registered():
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.mark.guest
def test_the_guest_has_control_groups_of_version_2_with_controllers():
    group = Path("/sys/fs/cgroup/of-a-test")
    group.mkdir()
    try:
        assert {"cpu", "cpuset", "memory", "pids"} <= set((group / "cgroup.controllers").read_text().split())
        (group / "cpu.idle").write_text("1")
        assert (group / "cpu.idle").read_text() == "1\n"
    finally:
        group.rmdir()


@pytest.mark.guest
def test_the_guest_has_user_namespaces():
    assert run("unshare", "--user", "--map-root-user", "--net", "id", "-u") == "0\n"


@pytest.mark.guest
def test_the_guest_can_be_written_to_everywhere():
    beside = Path(__file__).with_suffix(".written")
    beside.write_text("not on the host")
    assert beside.read_text() == "not on the host"
    for directory in ("/dev/shm", "/run", "/tmp"):
        assert os.access(directory, os.W_OK), directory

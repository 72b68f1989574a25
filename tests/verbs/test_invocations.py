"""The data plane keeps its promises over a real verbs device: the tests in C that all transports run."""

from __future__ import annotations

import os
import subprocess

import pytest

from verbs import conftest, support

PLUGIN = conftest.REPOSITORY / "rfaas_mpi" / "_verbs.so"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", conftest.SUITE)
def test_what_the_suite_promises_holds_over_verbs(name, program, nodes):
    program("")  # built, if that was not done on the host
    # Emulated, a guest is some fifteen times slower.
    pace = {"RFM_TEST_SCALE": "0.2", "RFM_TEST_SLOW": "15"} if conftest.IN_GUEST else {}
    done = subprocess.run([conftest.REPOSITORY / "build" / "plain" / f"{name}.run"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=880,
                          env={**os.environ, "T_TRANSPORT": "verbs", "T_PLUGIN": str(PLUGIN), **pace})
    assert done.returncode == 0, done.stdout


def test_doctor_shows_the_device(nodes):
    from rfaas_mpi.cli import doctor

    checks = {check.name: check for check in doctor.examine()}
    verbs = checks["verbs"]
    assert verbs.ok, verbs.reason
    assert nodes[0].device in verbs.reason
    assert "active" in verbs.reason
    assert "inline" in checks["verbs limits"].reason
    assert "locked memory" in checks


def test_transports_name_verbs_where_a_port_is_active(nodes):
    from rfaas_mpi import fabric

    assert fabric.transports() == ("shm", "tcp", "verbs")
    assert support.active_nodes()

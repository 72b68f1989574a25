"""What a node may lack for verbs is said by name: locked memory, a port that is up, the same version on both sides."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile

import pytest

from verbs import bridge
from verbs.bridge import TwoDevices

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

# As a user who may lock only so much, whoever runs the tests: the limit does not hold for who has this capability.
LIMITED = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "--")
WAYS_OUT = ("`ulimit -l unlimited`", "LimitMEMLOCK=infinity", "* - memlock unlimited", "/etc/security/limits.conf")

SCRIPT = """
import sys
import numpy as np
import faults
from rfaas_mpi import Executor, InvalidBuffer, TransportError

def tell(error):
    print(f"{type(error).__name__}: {error}", flush=True)

try:
    with Executor(workers=1, transport="verbs", fallback=False) as ex:
        assert ex.submit(faults.plus_one, 1).result() == 2
        print("small: right", flush=True)
        try:
            x, out = ex.full(1_000_000, 1.0), ex.zeros(1_000_000)
            ex.Invoke(faults.adds_one, x, out)
        except InvalidBuffer as error:
            tell(error)
        assert ex.submit(faults.plus_one, 2).result() == 3
        print("small: still right", flush=True)
except TransportError as error:
    tell(error)
"""


def limited(kib: int) -> subprocess.CompletedProcess[str]:
    """The script as a rank, with a service of its own, where both may lock so many KiB."""
    with tempfile.TemporaryDirectory(prefix="rfaas-t-") as directory:
        environment = {**os.environ, **bridge.PATIENT, "RFAAS_RUNTIME_DIR": directory, "RFAAS_LINGER_S": "0"}
        return subprocess.run([*LIMITED, "prlimit", f"--memlock={kib << 10}", sys.executable, "-W", "error", "-c",
                               SCRIPT], env=environment, capture_output=True, text=True, timeout=880, check=False)


def test_a_failed_registration_names_limit_need_and_way_out_when_a_worker_is_connected(nodes):
    done = limited(64)
    assert done.returncode == 0, done.stderr
    assert re.match(r"TransportError: worker 1 of lease 1 over verbs: [0-9]+ KiB could not be registered", done.stdout)
    assert "the limit of locked memory is 64 KiB" in done.stdout
    assert all(line in done.stdout for line in WAYS_OUT)


def test_an_array_that_cannot_be_registered_fails_its_own_call_with_limit_need_and_way_out(nodes):
    done = limited(4096)
    assert done.returncode == 0, done.stderr
    assert re.match(r"small: right\nInvalidBuffer: .*: [0-9]+ KiB could not be registered", done.stdout), done.stdout
    assert done.stdout.endswith("small: still right\n")
    assert "the limit of locked memory is 4096 KiB" in done.stdout
    assert all(line in done.stdout for line in WAYS_OUT)


def test_doctor_names_the_address_of_a_device_and_a_port_that_is_down(nodes):
    from rfaas_mpi.cli import doctor

    two = TwoDevices(nodes)
    says = {check.name: check for check in doctor._verbs()}
    assert f"{two.rank.device}, port 1 (RoCE v2, active), GID 1 ::ffff:{two.rank.address}" in says["verbs"].reason
    with two.unplugged(two.rank), two.unplugged(two.agent):
        says = {check.name: check for check in doctor._verbs()}
        assert not says["verbs"].ok
        assert "has no port that is up" in says["verbs"].reason


def test_a_device_that_is_not_there_is_named(nodes):
    from rfaas_mpi import Executor, TransportError
    with pytest.raises(TransportError, match="there is no RDMA device mlx5_9"):
        Executor(workers=1, transport="verbs", device="mlx5_9", start_timeout_s=100)

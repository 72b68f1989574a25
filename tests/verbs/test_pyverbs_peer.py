"""A rank that was written from docs/wire.md alone, with pyverbs, gets right results from a real worker over verbs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from verbs import peer, support

OVER_VERBS = [name for name in peer.CHECKS if not name.startswith("tcp_")]
GUARD_S = 300.0


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """The file that tells the peer of a service, which listens on TCP."""
    import rfaas_mpi
    from rfaas_mpi import messages
    from rfaas_mpi.config import Settings
    from rfaas_mpi.remote import Address
    from rfaas_mpi.session import Session

    package = Path(rfaas_mpi.__file__).parent
    # Sockets have short paths.
    with tempfile.TemporaryDirectory(prefix="rfaas-t-") as directory:
        # Its only ranks are the peers, which come one after the other; and it goes where a killed test doesn't end it.
        home = Settings.load(runtime_dir=directory, cores=(0, 1), start_timeout_s=GUARD_S, linger_s=GUARD_S)
        with Session.open(home, observer=True) as session:
            said = session.open_door(["127.0.0.1:0"])
            address = Address.parse(said.addresses[0])
            facts = peer.Place(address.host, address.port, os.fsdecode(said.key_file), messages.version_number(),
                               str(package), str(package / "_native_kernels.so"), sys.executable,
                               [os.path.abspath(entry) for entry in sys.path])
            file = Path(directory) / "place.json"
            file.write_text(json.dumps(dataclasses.asdict(facts)))
            try:
                yield file
            finally:
                session.down()


@pytest.mark.parametrize("check", OVER_VERBS)
def test_the_peer_of_the_page_over_verbs(nodes, place, tmp_path, check):
    python, environment = support.pyverbs(tmp_path)
    node = nodes[1]
    done = subprocess.run([python, peer.__file__, "--device", node.device, "--gid-index", str(node.gid_index),
                           str(place), check], env=environment, capture_output=True, text=True, timeout=GUARD_S)
    log = "".join(path.read_text() for path in place.parent.rglob("log"))
    assert (done.returncode, done.stdout) == (0, f"ok {check}\n"), f"{done.stdout}{done.stderr}{log}"

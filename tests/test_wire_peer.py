"""A rank that was written from docs/wire.md alone gets right results from a real worker, over tcp."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from verbs import peer

import rfaas_mpi
from rfaas_mpi import messages
from rfaas_mpi.config import Settings
from rfaas_mpi.remote import Address
from rfaas_mpi.session import Session

PACKAGE = Path(rfaas_mpi.__file__).parent
OVER_TCP = [name for name in peer.CHECKS if not name.startswith("verbs_")]


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """With a service that stays for all of these tests."""
    # Its only ranks are the peers, which come one after the other.
    home = Settings.load(runtime_dir=str(Path(os.environ["RFAAS_RUNTIME_DIR"]) / "peer"), cores=(0, 1), linger_s=60.0)
    with Session.open(home, observer=True) as opened:
        try:
            yield opened
        finally:
            opened.down()


@pytest.fixture(scope="module")
def place(session) -> peer.Place:
    """Where that service listens on TCP, and what its peers have to know."""
    said = session.open_door(["127.0.0.1:0"])
    address = Address.parse(said.addresses[0])
    return peer.Place(address.host, address.port, os.fsdecode(said.key_file), messages.version_number(),
                      str(PACKAGE), str(PACKAGE / "_native_kernels.so"), sys.executable,
                      [os.path.abspath(entry) for entry in sys.path])


@pytest.mark.parametrize("check", OVER_TCP)
def test_the_peer_of_the_page_over_tcp(place, check):
    peer.CHECKS[check](place, argparse.Namespace(device=""))


@pytest.mark.parametrize("check, least", [("tcp_region_outside", 3), ("tcp_crc", 2)])
def test_what_makes_no_sense_is_counted_where_an_administrator_looks(place, session, wait_until, check, least):
    before = session.status()["refused"]
    peer.CHECKS[check](place, argparse.Namespace(device=""))
    wait_until(lambda: session.status()["refused"] >= before + least, f"{least} more are counted")


def test_the_peer_imports_nothing_of_ours():
    tree = ast.parse(Path(peer.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {*sys.stdlib_module_names, "pyverbs"}

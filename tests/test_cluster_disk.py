"""A real manager whose disk is full, under ranks: leases run on, nothing is granted, nothing is forgotten."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import faults
import netns
import pytest
from cluster import Cluster, wait_until
from cluster_faults import full_disk

from rfaas_mpi import Executor
from rfaas_mpi.errors import LeaseDenied, ServiceError

# Who waits for the disk, for who waits for it, or for a grant that nobody takes, does so for a shorter time.
HASTY = """
import sys
from rfaas_mpi.agent import link
from rfaas_mpi.cli import main
from rfaas_mpi.manager import server
from rfaas_mpi.manager.registry import Registry
Registry.__init__.__kwdefaults__["begin_within_s"] = 3.0
server.WRITE_RETRY_S, server.WRITE_WAIT_S, link.RETRY_MAX_S = 0.1, 0.5, 0.5
sys.exit(main())
"""

Filled = Callable[[], AbstractContextManager[None]]


# The other way takes root, and as long again.
SOAK = "RFAAS_SOAK_CLUSTER" in os.environ
WAYS = ["its files may not grow", *["its file system is full"] * SOAK]


@pytest.fixture(params=WAYS)
def filling(request) -> Iterator[tuple[Cluster, Filled]]:
    """A cluster, and how the disk below its manager's ledger is filled for a while."""
    cluster = Cluster(["0-1"])
    for daemon in (cluster.manager, *cluster.agents) if not SOAK else ():
        at = daemon.command.index("-m")
        daemon.command[at:at + 2] = ["-c", HASTY]
    state = cluster.directory / "manager"
    if request.param == "its files may not grow":
        @contextlib.contextmanager
        def filled() -> Iterator[None]:
            with full_disk(cluster.manager, state, overwrite=False):
                yield
    else:
        if reason := netns.why_not():
            pytest.skip(reason)
        state.mkdir(mode=0o700)
        # In a mount namespace that ends with the manager.
        cluster.manager.command[:0] = ["unshare", "--mount", "--propagation", "private", "sh", "-c",
                                       f'mount -t tmpfs -o size=1m,mode=700 tmpfs {state} && exec "$@"', "sh"]

        @contextlib.contextmanager
        def filled() -> Iterator[None]:
            other = Path(f"/proc/{cluster.manager.pid}/root{state}/other")
            with open(other, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            yield
            other.unlink()
    with cluster:
        yield cluster, filled


def executor(cluster: Cluster, **settings: object) -> Executor:
    return Executor(1, manager=cluster.environment["RFAAS_MANAGER"], fallback=False,
                    manager_user=cluster.environment["RFAAS_MANAGER_USER"], **settings)


def used(cluster: Cluster) -> int:
    return sum(row["invocations"] for row in cluster.call("usage", by="uid").rows)


def test_on_a_full_disk_leases_run_on_nothing_is_granted_and_all_of_it_is_made_up_for_when_there_is_room(filling):
    cluster, filled = filling
    with executor(cluster) as held:
        assert held.submit(faults.plus_one, 1).result() == 2
        [first] = cluster.leases()
        with executor(cluster) as leaves:
            assert leaves.submit(faults.plus_one, 1).result() == 2
            with filled():
                assert sum(held.map(faults.plus_one, range(50))) == 1275
                leaves.shutdown()
                # The manager says so, and the rank asks no longer than it was told to.
                with pytest.raises((ServiceError, LeaseDenied), match="can't write to its disk|0 of 2 spare"):
                    executor(cluster, lease_timeout_s=1.0, start_timeout_s=0.1)
                assert [lease.state for lease in cluster.leases() if lease.id == first.id] == ["active"]
                assert sum(held.map(faults.plus_one, range(50))) == 1275
        def room_for_another() -> bool:
            # What it was granted after all, and nobody waited for, holds its core until its grant is late.
            for lease in cluster.leases():
                if lease.id != first.id and lease.state == "granted":
                    cluster.call("release", lease=lease.id)
            return cluster.free() == 1

        wait_until(room_for_another, "what the disk had no room for is made up for")
        with executor(cluster) as after:
            assert after.submit(faults.plus_one, 2).result() == 3
        wait_until(lambda: len(cluster.leases()) == 1, "what was given back on the full disk has ended")
        assert [lease.id for lease in cluster.leases()] == [first.id]
        if "unshare" not in cluster.manager.command:         # whose disk ends with it
            cluster.manager.kill()
            cluster.restart_manager()
            assert [lease.id for lease in cluster.leases()] == [first.id]
        assert sum(held.map(faults.plus_one, range(50))) == 1275
    wait_until(lambda: cluster.free() == 2 and not cluster.leases(), "every core came back")
    wait_until(lambda: used(cluster) == 1 + 1 + 1 + 3 * 50, "what was used is accounted")

"""One user's services on one node never lend the same core: an agent of a cluster, and his embedded service."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
from cluster import GUARD_S, Cluster, wait_until

from rfaas_mpi import api
from rfaas_mpi.config import Settings
from rfaas_mpi.errors import LeaseDenied
from rfaas_mpi.session import Session

_ids = itertools.count(1)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """An agent that lends what the embedded service lends, of the same user on the same node."""
    with Cluster(["0-1"], sockets=[0], RFAAS_RUNTIME_DIR=os.environ["RFAAS_RUNTIME_DIR"]) as cluster:
        yield cluster


@pytest.fixture
def embedded() -> Iterator[Session]:
    with Session.open(Settings.load(lend="yes", cores=(0, 1))) as session:
        yield session
        session.down()


def ask(cluster: Cluster, workers: int) -> api.LentLease:
    (lent,) = cluster.call("ask", api.AskLease(session="locks", request_id=next(_ids), workers_min=workers,
                                               workers_max=workers, timeout_s=GUARD_S)).leases
    return lent


def lent_by(session: Session) -> tuple[int, int]:
    """A lease of the embedded service with one worker: its number, and the core."""
    (lease,) = session.request(1, 1).leases
    (core,) = lease.workers[0].cores
    return lease.id, core


def test_what_the_embedded_service_lends_the_agent_does_not_and_lends_again_after_it(cluster, embedded):
    lease, core = lent_by(embedded)
    wait_until(lambda: [view.free for view in cluster.nodes()] == [(1 - core,)], "the agent lends the other core only")
    embedded.release(lease)
    wait_until(lambda: cluster.free() == 2, "it lends both again")


def test_what_an_agent_has_lent_the_embedded_service_does_not_lend(cluster, embedded):
    with Session.open_lease(ask(cluster, 2), cluster.settings) as rank:
        rank.use()
        with pytest.raises(LeaseDenied, match="another service of this user lends every spare core"):
            embedded.request(1, 1, timeout_s=0.0)
    wait_until(lambda: cluster.free() == 2 and not cluster.leases(), "every core came back")
    assert embedded.request(1, 1, timeout_s=GUARD_S).leases


def test_a_lease_of_a_core_that_was_lent_meanwhile_does_not_begin(cluster, embedded):
    lent = ask(cluster, 2)
    _, core = lent_by(embedded)
    with Session.open_lease(lent, cluster.settings) as rank:
        with pytest.raises(LeaseDenied, match=f"another service of uid {os.geteuid()} on node0 lends core {core}"):
            rank.use()
    wait_until(lambda: [view.free for view in cluster.nodes()] == [(1 - core,)] and not cluster.leases(),
               "what is left is free at once")

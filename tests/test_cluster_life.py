"""At each step of a lease's life, seen from its rank, somebody dies or a link is pulled: no result is lost, no core kept.

`make soak` has every pair of a step and a deed, `make test` those that differ most.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator

import faults
import netns
import pytest
from cluster import IMPATIENT, Cluster, Star, tell, wait_until

CLUSTER, SESSION, LENDING = ("rfaas_mpi.cluster.ClusterSession", "rfaas_mpi.session.Session",
                             "rfaas_mpi.lending.Lending")
STEPS = {
    "about to ask": (CLUSTER, "_ask", "before"),
    "granted": (CLUSTER, "_ask", "after"),
    "let in by the agent": (SESSION, "_show_grant", "after"),
    "joined": (SESSION, "use", "before"),
    "begun": (SESSION, "use", "after"),
    "a worker is dialled": (SESSION, "reach", "after"),
    "a worker is attached": (LENDING, "_attach", "after"),
    "all is there": (LENDING, "hire", "after"),
    "about to give back": (SESSION, "release", "before"),
    "given back": (SESSION, "release", "after"),
}
DEEDS = ("the rank is killed", "an agent is killed", "the manager is killed", "a link is pulled")
# A grant that nobody will use holds its cores until it is late: half a minute.
SLOW = {(step, "the rank is killed") for step in ("granted", "let in by the agent", "joined")}
SHORT = {(step, deed) for step in STEPS for deed in DEEDS[:2]} - SLOW | {
    ("about to ask", "the manager is killed"), ("granted", "the manager is killed"),
    ("joined", "a link is pulled"), ("all is there", "a link is pulled")}
PAIRS = [(step, deed) for deed in DEEDS for step in STEPS
         if (step, deed) in SHORT or os.environ.get("RFAAS_SOAK_CLUSTER")]

RANK = """
    import importlib
    where, name, when = sys.argv[1:4]
    module, _, owner = where.rpartition(".")
    owner = getattr(importlib.import_module(module), owner)
    real, first = getattr(owner, name), [True]
    def step(*args, **kwargs):
        found = real(*args, **kwargs) if when == "after" else None
        # Leases are begun side by side: one of them stops here.
        try:
            first.pop()
        except IndexError:
            pass
        else:
            say("here")
            sys.stdin.readline()
        return real(*args, **kwargs) if when == "before" else found
    setattr(owner, name, step)
    with Executor(workers=(1, 4)) as ex:
        right = list(ex.map(faults.plus_one, range(50))) == list(range(1, 51))
    say("right" if right else "wrong")
    """


@pytest.fixture(scope="module")
def here() -> Iterator[Cluster]:
    """Two agents of two cores on the loopback."""
    with Cluster(["0-1", "0-1"]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def apart() -> Iterator[Cluster]:
    """The same on nodes of their own."""
    if reason := netns.why_not():
        pytest.skip(reason)
    star = Star(2)
    try:
        with Cluster(["0-1", "0-1"], star=star, **IMPATIENT) as cluster:
            yield cluster
    finally:
        star.close()


def all_back(cluster: Cluster) -> None:
    """Whatever was ended runs again, and nothing is lent."""
    if cluster.star is not None:
        cluster.star.heal()
    for daemon in (cluster.manager, *cluster.agents):
        if not daemon.alive:
            daemon.close()
            daemon.start()
    wait_until(lambda: cluster.free() == 4 and not cluster.leases(), "every core came back", 120)


@pytest.mark.parametrize(("step", "deed"), PAIRS, ids=[f"{step}, {deed}" for step, deed in PAIRS])
def test_whatever_ends_at_any_step_costs_no_result_and_keeps_no_core(request, step, deed):
    cluster: Cluster = request.getfixturevalue("apart" if deed == "a link is pulled" else "here")
    try:
        with cluster.running(textwrap.dedent(RANK), *STEPS[step]) as rank:
            assert faults.line(rank) == "here"
            match deed:
                case "the rank is killed":
                    rank.kill()
                    rank.wait()
                case "an agent is killed":
                    cluster.agents[0].kill()
                case "the manager is killed":
                    cluster.manager.kill()
                case "a link is pulled":
                    cluster.star.link(0, "down")
            if rank.poll() is None:
                tell(rank, "go on")
                if deed == "the manager is killed":
                    cluster.manager.start()
                assert faults.line(rank) == "right"
                assert rank.wait(60) == 0
    finally:
        all_back(cluster)

"""At each step of a lease's life, seen from its rank, somebody dies or a link is cut: no result is lost, no core kept.

`make soak` has every pair of a step and a deed, `make test` those that differ most.
"""

from __future__ import annotations

import contextlib
import os
import signal
import textwrap
import threading
from collections.abc import Iterator

import faults
import netns
import pytest
from cluster import IMPATIENT, Cluster, Star, children, tell, wait_until

from rfaas_mpi import api

# A time-out ends the whole run: what waits for two minutes, and says for what, has to come first.
pytestmark = pytest.mark.timeout(300)

CLUSTER, SESSION, LENDING, EXECUTOR = ("rfaas_mpi.cluster.ClusterSession", "rfaas_mpi.session.Session",
                                       "rfaas_mpi.lending.Lending", "rfaas_mpi.executor.Executor")
# What is called then, and what comes with it if not every call is meant.
STEPS = {
    "about to ask": (CLUSTER, "_ask", "before"),
    "granted": (CLUSTER, "_ask", "after"),
    "let in by the agent": (SESSION, "_show_grant", "after"),
    "joined": (SESSION, "use", "before"),
    "begun": (SESSION, "use", "after"),
    "a worker is dialled": (SESSION, "reach", "after"),
    "a worker is attached": (LENDING, "_attach", "after"),
    "all is there": (LENDING, "hire", "after"),
    "called for the first time": (EXECUTOR, "map", "after"),
    "running": (EXECUTOR, "running", "after"),
    "revoked": (LENDING, "_handle", "before", "Revoking"),
    "at its hard end": (LENDING, "_handle", "before", "LeaseEnded"),
    "about to give back": (SESSION, "release", "before"),
    "given back": (SESSION, "release", "after"),
}
DEEDS = ("the rank is killed", "an agent is killed", "the manager is killed", "a worker is killed",
         "an agent hangs for a while", "a link is pulled", "a link is pulled and put back")
WORKS = ("begun", "a worker is dialled", "a worker is attached", "all is there", "called for the first time", "running",
         "revoked", "at its hard end", "about to give back")
# A grant that nobody will use holds its cores until it is late: half a minute.
SLOW = {(step, "the rank is killed") for step in ("granted", "let in by the agent", "joined")}
SHORT = {(step, deed) for deed, steps in {
    "the rank is killed": ("about to ask", "begun", "a worker is attached", "running", "at its hard end", "given back"),
    "an agent is killed": ("granted", "let in by the agent", "joined", "begun", "all is there", "running", "revoked",
                           "about to give back"),
    "the manager is killed": ("about to ask", "granted", "revoked", "at its hard end"),
    "a worker is killed": ("begun", "a worker is attached", "running", "revoked"),
    "an agent hangs for a while": ("joined", "running"),
    "a link is pulled": ("joined", "all is there", "running"),
    "a link is pulled and put back": ("granted", "running")}.items() for step in steps}
PAIRS = [(step, deed) for deed in DEEDS for step in STEPS
         if ((step, deed) in SHORT or os.environ.get("RFAAS_SOAK_CLUSTER"))
         and (deed != "a worker is killed" or step in WORKS)]
HANGS_S = 1.0

RANK = """
    import importlib
    from concurrent.futures import ThreadPoolExecutor
    where, name, when, kind, flag = sys.argv[1:6]
    # All workers may be gone: then the rank does the work, and says so once.
    import warnings
    warnings.filterwarnings("ignore", "kernels run on the rank", RuntimeWarning)

    def running(ex):
        begun = [Path(f"{flag}-{n}") for n in range(4)]
        futures = [ex.submit(faults.begin_then_wait, name, flag, n) for n, name in enumerate(begun)]
        for name in begun:
            faults.wait_for(name)
        return futures

    Executor.running = running
    module, _, owner = where.rpartition(".")
    owner = getattr(importlib.import_module(module), owner)
    real, first, passed = getattr(owner, name), [True], threading.Event()
    def step(*args, **kwargs):
        found = real(*args, **kwargs) if when == "after" else None
        # Leases are begun side by side: one of them stops here.
        try:
            if not kind or type(args[1]).__name__ == kind:
                first.pop()
                say("here")
                sys.stdin.readline()
                passed.set()
        except IndexError:
            pass
        return real(*args, **kwargs) if when == "before" else found
    setattr(owner, name, step)
    with Executor(workers=(1, 4), lease_duration_s=1.5 if kind == "LeaseEnded" else None) as ex:
        futures = ex.running() if name == "running" else []
        Path(flag).touch()
        right = [future.result() for future in futures] == list(range(len(futures)))
        if kind:
            right = list(ex.map(faults.plus_one, range(50))) == list(range(1, 51))
            say("has them")
            assert passed.wait(60)
        right = right and list(ex.map(faults.plus_one, range(50))) == list(range(1, 51))
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
    with contextlib.suppress(AssertionError):
        cluster.agents[0].signal(signal.SIGCONT)
    for daemon in (cluster.manager, *cluster.agents):
        if not daemon.alive:
            daemon.close()
            daemon.start()
    wait_until(lambda: cluster.free() == 4 and not cluster.leases(), "every core came back", 120)


def revoke_all(cluster: Cluster) -> None:
    for lease in cluster.leases():
        cluster.call("revoke", api.RevokeLease(), lease=lease.id)


@pytest.mark.parametrize(("step", "deed"), PAIRS, ids=[f"{step}, {deed}" for step, deed in PAIRS])
def test_whatever_ends_at_any_step_costs_no_result_and_keeps_no_core(request, tmp_path, step, deed):
    cluster: Cluster = request.getfixturevalue("apart" if "link" in deed else "here")
    where, name, when, *kind = STEPS[step]
    try:
        with cluster.running(textwrap.dedent(RANK), where, name, when, *(kind or [""]), tmp_path / "flag") as rank:
            said = faults.line(rank)
            if kind:
                assert said == "has them"
                if step == "revoked":
                    revoke_all(cluster)
                said = faults.line(rank)
            assert said == "here"
            match deed:
                case "the rank is killed":
                    rank.kill()
                    rank.wait()
                case "an agent is killed":
                    cluster.agents[0].kill()
                case "the manager is killed":
                    cluster.manager.kill()
                case "a worker is killed":
                    kill_a_worker(cluster)
                case "an agent hangs for a while":
                    cluster.agents[0].signal(signal.SIGSTOP)
                case "a link is pulled":
                    cluster.star.link(0, "down")
                case "a link is pulled and put back":
                    cluster.star.link(0, "down")
                    cluster.star.link(0, "up")
            if rank.poll() is None:
                tell(rank, "go on")
                if deed == "the manager is killed":
                    cluster.manager.start()
                if deed == "an agent hangs for a while":
                    threading.Event().wait(HANGS_S)
                    cluster.agents[0].signal(signal.SIGCONT)
                assert faults.line(rank) == "right"
                assert rank.wait(60) == 0
    finally:
        all_back(cluster)


def kill_a_worker(cluster: Cluster) -> None:
    """One of the first agent's, if it has any left: a lease that is being taken back loses them."""
    for worker in [pid for zygote in children(cluster.agents[0].pid) for pid in children(zygote)][:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)

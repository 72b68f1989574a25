"""A cluster of four nodes: agents in network namespaces, ranks in another, and the main job while nodes are lost.

The namespaces share the two cores of a small machine, so that agents lend the same ones: their workers get in each
other's way, and answers have to be right all the same.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faults
import netns
import pytest
from cluster import GUARD_S, IMPATIENT, Cluster, Star, finished, tell, wait_until

APPS = faults.TESTS.parent / "apps"
AGENTS = 4
CORES = [str(min(number % 2, os.cpu_count() - 1)) for number in range(AGENTS)]


@pytest.fixture(scope="module")
def star() -> Iterator[Star]:
    if reason := netns.why_not():
        pytest.skip(reason)
    star = Star(AGENTS)
    try:
        yield star
    finally:
        star.close()


@pytest.fixture
def nodes(star) -> Iterator[Cluster]:
    """Four agents of one core each; dead connections are noticed soon."""
    with Cluster(CORES, star=star, **IMPATIENT) as cluster:
        try:
            yield cluster
        finally:
            star.heal()


def all_free(cluster: Cluster, cores: int = AGENTS) -> None:
    wait_until(lambda: cluster.free() == cores and not cluster.leases(), "every core came back")


def main_job(cluster: Cluster, report: Path, *more: object, ranks: int = 1) -> list[str]:
    """Black-Scholes under mpiexec on the ranks' node, with a worker of each agent."""
    launcher = Path(sys.executable).with_name("mpiexec")
    return cluster.star.rank.command([
        launcher if launcher.exists() else "mpiexec", "-n", ranks, sys.executable, APPS / "blackscholes.py",
        "--options", 200_000, "--workers", AGENTS // ranks, "--json", report, *more])


def test_agents_and_ranks_reach_each_other_by_their_links_alone(nodes, star):
    for number, node in enumerate(star.agents):
        devices = node.run("ip", "-o", "link").stdout.splitlines()
        assert [line.split(":")[1].strip().partition("@")[0] for line in devices] == ["lo", "rank0"], number
    assert nodes.run("""
        with Executor(workers=4, fallback=False) as ex:
            say(ex)
        """) == "<Executor transport=tcp workers=[1, 2, 3, 4]>\n"


def test_the_main_job_has_a_worker_of_each_node_and_survives_one_that_is_killed(nodes, tmp_path):
    report = tmp_path / "report.json"
    done = subprocess.run(main_job(nodes, report, "--rounds", 2, "--kill"),
                          env=faults.environment(**nodes.environment), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(report.read_text())
    assert data["verdict"]["correct"] is True
    assert len(data["config"]["worker_cores"][0]) == AGENTS
    all_free(nodes)


def test_the_main_job_is_right_while_nodes_are_killed_drained_cut_off_and_the_manager_is_away(nodes, star, tmp_path):
    """One fault in each round of two ranks, until no worker is left."""
    def kill_a_worker() -> None:
        os.kill(max(nodes.workers_of(1)), signal.SIGKILL)

    def drain() -> None:
        done = subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "drain", nodes.names[1]],
                              env=faults.environment(**nodes.environment), capture_output=True, text=True,
                              timeout=GUARD_S)
        assert done.returncode == 0, done.stdout + done.stderr

    deeds = [kill_a_worker, nodes.agents[0].kill, nodes.manager.kill, lambda: star.link(2, "down"),
             nodes.restart_manager, drain, nodes.agents[3].kill]
    report = tmp_path / "report.json"
    said = []
    process = subprocess.Popen(main_job(nodes, report, "--rounds", len(deeds) + 3, ranks=2),
                               env=faults.environment(**nodes.environment), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            said.append(line)
            if line.strip().startswith("round ") and len(said) > 1 and deeds:
                deeds.pop(0)()
        out = process.stdout.read()
        assert process.wait(GUARD_S) == 0, out + "".join(said)
    finally:
        process.kill()
        process.communicate()
    assert not deeds, "".join(said)
    assert json.loads(report.read_text())["verdict"]["correct"] is True


IN_FLIGHT = """
    flag, begun = Path(sys.argv[1]), [Path(f"{sys.argv[1]}-{n}") for n in range(4)]
    with Executor(workers=4, fallback=False) as ex:
        futures = [ex.submit(faults.begin_then_wait, name, flag, n) for n, name in enumerate(begun)]
        for name in begun:
            faults.wait_for(name)
        say("in flight")
        sys.stdin.readline()
        while len(ex.workers) > 3:
            time.sleep(0.01)
        flag.touch()
        say([future.result() for future in futures])
        say(sum(ex.map(faults.plus_one, range(50))))
        sys.stdin.readline()
        say(len(ex.workers))
    """


@pytest.mark.parametrize("how", ["its link is pulled", "its packets get lost",
                                 "its agent dies, and its workers are stopped"])
def test_what_was_in_flight_on_a_node_that_is_cut_off_runs_elsewhere(nodes, star, tmp_path, how):
    cut = {"its link is pulled": lambda: star.link(1, "down"),
           "its packets get lost": lambda: star.lose(1),
           "its agent dies, and its workers are stopped": lambda: [os.kill(pid, signal.SIGSTOP) for pid in
                                                                   nodes.workers_of(1)]}[how]
    with nodes.running(IN_FLIGHT, tmp_path / "flag") as rank:
        assert faults.line(rank) == "in flight"
        cut()
        if how.startswith("its agent"):
            nodes.agents[1].kill()
        tell(rank, "cut")
        assert faults.line(rank) == "[0, 1, 2, 3]"
        assert faults.line(rank) == "1275"
        star.heal()
        if how.startswith("its agent"):
            nodes.agents[1].start()
        # The lease is over; what the node lends can be had again, by whoever asks now.
        wait_until(lambda: nodes.free() == 1, "the node's core came back")
        assert nodes.run("""
            with Executor(workers=1, fallback=False) as ex:
                say(ex.submit(faults.plus_one, 1).result())
            """) == "2\n"
        tell(rank, "healed")
        assert faults.line(rank) == "3"
    all_free(nodes)


def test_a_manager_that_is_away_for_long_costs_nothing(nodes):
    away_s = float(os.environ.get("RFAAS_SOAK_AWAY_SECONDS", "3"))
    with nodes.running("""
            with Executor(workers=4, fallback=False) as ex:
                before = ex.workers
                say("has them")
                sys.stdin.readline()
                until, calls = time.monotonic() + float(sys.argv[1]), 0
                while time.monotonic() < until or not calls:
                    assert sum(ex.map(faults.plus_one, range(50))) == 1275
                    calls += 50
                assert ex.workers == before
                say("right")
                sys.stdin.readline()
            """, away_s) as rank:
        assert faults.line(rank) == "has them"
        before = {lease.id for lease in nodes.leases()}
        nodes.manager.kill()
        tell(rank, "the manager is away")
        assert faults.line(rank) == "right"
        nodes.restart_manager()
        assert {lease.id for lease in nodes.leases()} == before, "no lease was forgotten"
        tell(rank, "the manager is back")
        finished(rank)
    all_free(nodes)


def test_ranks_that_are_killed_or_cut_off_give_back_what_they_had(nodes, star):
    body = """
        ex = Executor(workers=2, fallback=False)
        say(sum(ex.map(faults.plus_one, range(50))))
        ex.submit(time.sleep, 600)
        sys.stdin.readline()
        """
    with nodes.running(body) as killed, nodes.running(body) as cut:
        assert (faults.line(killed), faults.line(cut)) == ("1275", "1275")
        assert not nodes.free()
        killed.kill()
        wait_until(lambda: nodes.free() == 2, "the killed rank's cores came back")
        for number in range(AGENTS):
            star.lose(number)
        cut.kill()
        all_free(nodes)

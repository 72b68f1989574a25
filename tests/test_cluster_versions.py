"""Managers, agents and ranks one minor version apart work together; further apart they say so, and nothing hangs.

The other version is this package with another number, that says more than ours knows and leaves out what may be left
out (versions.py). See docs/decisions/0018-one-minor-version-apart.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import faults
import msgspec
import pytest
import versions
from cluster import GUARD_S, Cluster, tell, wait_until

from rfaas_mpi import Executor, api, skew
from rfaas_mpi._version import __version__
from rfaas_mpi.errors import VersionMismatch
from rfaas_mpi.manager.bodies import Bodies, check_version

NEXT, AFTER_NEXT = versions.apart(1), versions.apart(2)
APPS = faults.TESTS.parent / "apps"

MAIN_JOB = """
    with Executor(workers=2, fallback=False) as ex:
        x = np.arange(300_000.0)
        outs = [np.empty_like(x) for _ in range(8)]
        requests = [ex.Iinvoke(faults.adds_one, x, out) for out in outs]
        assert list(ex.map(faults.plus_one, range(200))) == list(range(1, 201))
        for request in requests:
            request.Wait()
        assert all((out == x + 1).all() for out in outs)
        [versions] = {future.result() for future in [ex.submit(lambda: rfaas_mpi.__version__) for _ in range(32)]}
        say(rfaas_mpi.__version__, versions, len(ex.workers))
    """


@pytest.fixture(scope="module")
def following(tmp_path_factory) -> dict[str, str]:
    """The environment of the next minor version."""
    return versions.other(tmp_path_factory.mktemp("next") / "path", NEXT, versions.RICHER)


@pytest.fixture(scope="module")
def too_new(tmp_path_factory) -> dict[str, str]:
    """That of the one after it."""
    return versions.other(tmp_path_factory.mktemp("after") / "path", AFTER_NEXT, versions.RICHER)


def two_nodes() -> Cluster:
    return Cluster(["0", "1" if (os.cpu_count() or 1) > 1 else "0"])


def blackscholes(cluster: Cluster, report: Path, **changes: str) -> None:
    """The main job with a worker of each node; its verdict is checked."""
    launcher = Path(sys.executable).with_name("mpiexec")
    environment = faults.environment(**cluster.environment, **changes)
    # What the apps share lies beside them, and isn't looked for there where a path of another version is safe.
    environment["PYTHONPATH"] = os.pathsep.join((environment["PYTHONPATH"], str(APPS)))
    done = subprocess.run([str(launcher) if launcher.exists() else "mpiexec", "-n", "1", sys.executable,
                           str(APPS / "blackscholes.py"), "--options", "100000", "--workers", "2", "--rounds", "1",
                           "--json", str(report)],
                          env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text())["verdict"]["correct"] is True


# --- one apart ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("manager", ["ours", "next"])
def test_manager_agents_and_ranks_one_minor_version_apart_serve_the_main_job(following, tmp_path, manager):
    cluster = two_nodes()
    if manager == "next":
        cluster.manager.changes(**following)
    cluster.agents[1].changes(**following)
    with cluster:
        versions_of = cluster.call("nodes").versions
        assert versions_of == {"node0": __version__, "node1": NEXT}
        # Workers are always of their rank's own version.
        assert cluster.run(MAIN_JOB) == f"{__version__} {__version__} 2\n"
        assert cluster.run(MAIN_JOB, **following) == f"{NEXT} {NEXT} 2\n"
        blackscholes(cluster, tmp_path / "report.json", **(following if manager == "ours" else {}))
        wait_until(lambda: cluster.free() == 2 and not cluster.leases(), "every core came back")
        status = subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "status"], capture_output=True, text=True,
                                env=faults.environment(**cluster.environment), timeout=GUARD_S)
        assert status.returncode == 0 and f"version {NEXT}" in status.stdout, status.stdout + status.stderr


def test_a_cluster_goes_to_the_next_version_while_leases_run(following):
    """Manager first, then agents one by one, each drained before; what runs elsewhere runs on."""
    with two_nodes() as cluster, cluster.running("""
            with Executor(workers=1, fallback=False) as ex:
                say(ex.submit(os.getpid).result() > 0)
                for line in sys.stdin:
                    say(ex.submit(faults.plus_one, int(line)).result())
            """) as rank:
        def works(number: int) -> None:
            tell(rank, str(number))
            assert faults.line(rank) == str(number + 1), "the lease that ran runs on"

        assert faults.line(rank) == "True"
        [held] = cluster.leases()
        cluster.manager.stop()
        works(1)
        cluster.manager.changes(**following)
        cluster.restart_manager()
        works(2)
        assert [lease.id for lease in cluster.leases()] == [held.id]
        other = 1 - cluster.names.index(held.node)
        cluster.call("drain", api.DrainNodes((cluster.names[other],)))
        cluster.agents[other].stop()
        cluster.agents[other].changes(**following)
        cluster.agents[other].start()
        cluster.call("undrain", api.UndrainNodes((cluster.names[other],)))
        wait_until(lambda: cluster.call("nodes").versions[cluster.names[other]] == NEXT, "its agent is the next one")
        works(3)
        with Executor(1, manager=cluster.environment["RFAAS_MANAGER"], fallback=False,
                      manager_user=cluster.environment["RFAAS_MANAGER_USER"], lease_timeout_s=GUARD_S) as ex:
            assert ex.submit(faults.plus_one, 41).result() == 42
            assert {lease.node for lease in cluster.leases()} == set(cluster.names)
        assert "forgot" not in cluster.manager.said()


@pytest.mark.timeout(300)
def test_managers_that_share_a_database_go_to_the_next_version_one_by_one_and_not_back(postgres, tmp_path):
    """The one that stands by first; the older one then refuses what the newer one has made of the database."""
    store = postgres.database()
    later = {**versions.RICHER, "manager/ledger.py": [
        ("\nVERSION = ", "\nVERSION = 1 + "),
        ("self._db.prepare(_SCHEMA, VERSION, {",
         "self._db.prepare(_SCHEMA, VERSION, {VERSION - 1: 'CREATE TABLE weather (wind REAL)', ")]}
    with Cluster(["0"], store=store) as cluster:
        cluster.standby.changes(**versions.other(tmp_path / "next", NEXT, later))
        cluster.stand_by()
        with Executor(1, fallback=False, manager=cluster.environment["RFAAS_MANAGER"],
                      manager_user=cluster.environment["RFAAS_MANAGER_USER"]) as ex:
            assert ex.submit(faults.plus_one, 1).result() == 2
            [held] = cluster.leases()
            cluster.manager.stop()
            wait_until(lambda: [node for node in cluster.nodes() if not node.silent], "the agent has found the next one")
            assert ex.submit(faults.plus_one, 2).result() == 3
            assert [lease.id for lease in cluster.leases()] == [held.id]
            cluster.standby.stop()
            cluster.manager.start()
            assert cluster.manager.wait() != 0
            assert "was written by a later version" in cluster.manager.said()
            assert ex.submit(faults.plus_one, 3).result() == 4, "the lease that ran runs on"
            cluster.standby.start()
            wait_until(lambda: [node for node in cluster.nodes() if not node.silent], "the agent is back")
        wait_until(lambda: cluster.free() == 1 and not cluster.leases(), "its core came back")


# --- too far apart -----------------------------------------------------------------------------------

def test_who_is_two_minor_versions_away_is_told_so_and_nothing_hangs(too_new, following):
    cluster = Cluster(["0"])
    cluster.agents[0].changes(**too_new)
    cluster.manager.start()
    try:
        wait_until(lambda: "listens" in cluster.manager.said() or cluster.socket.exists(), "the manager listens")
        cluster.agents[0].start()
        agent = cluster.agents[0]
        wait_until(lambda: "is broken" in agent.said(), "the agent has heard why")
        for said in (agent.said(), cluster.manager.said()):
            assert f"the agent of node0 runs rfaas_mpi {AFTER_NEXT}, this manager runs {__version__}" in said
            assert "one minor number apart" in said
        assert cluster.call("nodes").nodes == ()
        assert agent.stop() == 0, "it ends when it is told to"

        told = cluster.run("""
            from rfaas_mpi.errors import VersionMismatch
            try:
                Executor(workers=1, lease_timeout_s=60)
            except VersionMismatch as error:
                say(error)
            """, **too_new)
        assert f"runs rfaas_mpi {AFTER_NEXT}" in told and f"this manager runs {__version__}" in told
        assert "the rank on " in told and skew.HINT in told
        done = subprocess.run([sys.executable, "-m", "rfaas_mpi.cli", "status"], capture_output=True, text=True,
                              env=faults.environment(**cluster.environment, **too_new), timeout=GUARD_S)
        assert done.returncode != 0 and AFTER_NEXT in done.stderr and __version__ in done.stderr

        # Both work with the manager, but not with each other.
        cluster.manager.stop()
        cluster.manager.changes(**following)
        agent.changes(PYTHONPATH=faults.environment()["PYTHONPATH"])
        cluster.manager.start()
        agent.start()
        wait_until(lambda: cluster.free() == 1, "the agent has reported")
        told = cluster.run("""
            from rfaas_mpi.errors import VersionMismatch
            import logging
            logging.disable()
            try:
                Executor(workers=1)
            except VersionMismatch as error:
                say(error)
            """, **too_new)
        assert f"runs version {__version__}, this rank {AFTER_NEXT}" in told and "the agent on " in told
        wait_until(lambda: cluster.free() == 1 and not cluster.leases(), "its core came back")
    finally:
        cluster.close()


def test_a_worker_that_would_be_of_another_version_than_its_rank_is_refused_with_both():
    with Cluster(["0"]) as cluster:
        told = cluster.run("""
            import logging
            from rfaas_mpi import messages, skew
            from rfaas_mpi.errors import RFaaSError
            logging.disable()
            # As where the node has another package under the rank's paths.
            messages.version_number = lambda version="": skew.number(sys.argv[1])
            try:
                with Executor(workers=1, fallback=False) as ex:
                    ex.submit(faults.plus_one, 1).result()
            except RFaaSError as error:
                say(error)
            """, NEXT)
        assert f"would run rfaas_mpi {__version__}" in told and f"their rank runs {NEXT}" in told, told
        wait_until(lambda: cluster.free() == 1 and not cluster.leases(), "its core came back")


# --- pure --------------------------------------------------------------------------------------------

def test_versions_work_together_within_one_minor_of_one_major():
    for one, other, works in (("0.4.0", "0.5.9", True), ("0.4.1", "0.3.0", True), ("0.4.0", "0.4.7", True),
                              ("0.4.0", "0.6.0", False), ("1.0.0", "0.9.0", False), ("0.4.0.dev3", "0.5.0", True)):
        for a, b in ((one, other), (other, one)):
            assert skew.near(skew.number(a), skew.number(b)) is works, (a, b)
    assert skew.text(skew.number("12.34.5")) == "12.34.5"


@pytest.mark.parametrize(("version", "number"), [
    ("0.4rc1", "0.4.0"), ("0.4.0rc1", "0.4.0"), ("0.4.dev3", "0.4.0"), ("0.4+site.5", "0.4.0"), ("0.4.2+1", "0.4.2"),
    ("0.4.2.post1", "0.4.2"), ("1", "1.0.0"), ("unknown", "0.0.0")])
def test_what_follows_a_version_s_numbers_changes_none_of_them(version, number):
    assert skew.text(skew.number(version)) == number


@pytest.mark.parametrize("suffix", ["rc1", ".dev3+gabc123", "+1.site", ".post1"])
def test_a_version_with_a_suffix_works_with_its_neighbours(suffix):
    skew.check(f"{NEXT}{suffix}", "an agent", "this manager")
    with pytest.raises(VersionMismatch):
        skew.check(f"{AFTER_NEXT}{suffix}", "an agent", "this manager")


@pytest.mark.parametrize("theirs", ["banana", "1", "0.1.0\n", "0.1.0 or so", "9" * 100, "-1.0.0"])
def test_what_is_no_version_or_far_from_ours_is_refused(theirs):
    with pytest.raises((ValueError, VersionMismatch)):
        check_version(theirs, {}, b"")


def test_whose_version_it_is_that_doesn_t_work_is_said():
    far = AFTER_NEXT
    for path, body, who in (
            ({"node": "n7"}, b"", "the agent of n7"), ({}, b'{"node": "n8", "agent": "a"}', "the agent of n8"),
            ({}, b'{"place": {"node": "host", "new": 1}}', "the rank on host"), ({}, b"\xff", "who calls"),
            ({}, b'{"node": 7}', "who calls")):
        with pytest.raises(VersionMismatch, match=f"^{who} runs rfaas_mpi {far}, this manager runs {__version__}"):
            check_version(far, path, body)
    check_version(NEXT, {}, b"")
    check_version("", {}, b"")


@pytest.mark.parametrize(("path", "body"), [
    ({"node": "n1\nERROR forged\x1b[2J"}, b""), ({}, b'{"node": "n1\\nERROR forged\\u001b[2J", "agent": "a"}'),
    ({}, b'{"place": {"node": "n1\\nERROR forged\\u001b[2J"}}')])
def test_who_is_refused_for_his_version_writes_no_line_of_his_own_into_the_log(path, body):
    with pytest.raises(VersionMismatch) as refused:
        check_version(AFTER_NEXT, path, body)
    assert "n1?ERROR forged?[2J runs" in str(refused.value) and str(refused.value).isprintable()


def test_a_newer_caller_may_say_what_we_don_t_know_and_nobody_else():
    bodies = Bodies([api.AskLease])
    known = {"session": "s", "request_id": 1, "workers_min": 1, "workers_max": 2, "place": {"node": "n", "numa": 1}}
    more = {**known, "colour": "green", "place": {**known["place"], "shoes": {"size": 43}}}
    plain = bodies.read(api.AskLease, msgspec.json.encode(known))
    assert bodies.read(api.AskLease, msgspec.json.encode(more), NEXT) == plain
    for theirs in ("", __version__, versions.apart(0)):
        with pytest.raises(msgspec.ValidationError, match="unknown field"):
            bodies.read(api.AskLease, msgspec.json.encode(more), theirs)
    # What is known is checked as ever.
    with pytest.raises(msgspec.ValidationError, match="workers_max"):
        bodies.read(api.AskLease, msgspec.json.encode({**more, "workers_max": -1}), NEXT)

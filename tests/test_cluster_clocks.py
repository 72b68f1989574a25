"""Wall clocks that jump, of a real manager and of real agents: no lease ends, none lives longer, no core is kept.

Each daemon's wall clock is set by a file (clock_shift.c, preloaded: nobody may set the machine's own in a test). Their
monotonic clocks are left alone, as an administrator or NTP leaves them.
"""

from __future__ import annotations

from collections.abc import Iterator

import faults
import pytest
from cluster import Cluster, wait_until
from cluster_faults import HOUR_S, Clock, with_clocks

from rfaas_mpi import Executor

LIVES_S = 1200.0                     # less than the clocks jump by


@pytest.fixture(scope="module")
def shifted() -> Iterator[tuple[Cluster, dict[str, Clock]]]:
    cluster = Cluster(["0-1"])
    clocks = with_clocks(cluster)
    with cluster:
        yield cluster, clocks


def executor(cluster: Cluster, **settings: object) -> Executor:
    return Executor(1, manager=cluster.environment["RFAAS_MANAGER"], fallback=False,
                    manager_user=cluster.environment["RFAAS_MANAGER_USER"], **settings)


def test_a_process_s_wall_clock_is_what_its_file_says(shifted, tmp_path):
    cluster, _ = shifted
    clock = Clock(tmp_path / "clock")
    with cluster.running("""
            before, monotonic = time.time(), time.monotonic()
            say("here")
            sys.stdin.readline()
            say(round((time.time() - before) / 3600), round((time.monotonic() - monotonic) / 3600))
            """, **clock.environment(cluster.directory / "clock_shift.so")) as rank:
        assert faults.line(rank) == "here"
        clock.shift(-HOUR_S)
        rank.stdin.write("\n")
        rank.stdin.flush()
        assert faults.line(rank) == "-1 0"


@pytest.mark.parametrize("whose", ["manager", "node0"])
@pytest.mark.parametrize("by_s", [HOUR_S, -HOUR_S], ids=["forward", "back"])
def test_a_clock_that_jumps_by_an_hour_changes_no_lease_and_keeps_none_from_beginning(shifted, whose, by_s):
    cluster, clocks = shifted
    try:
        with executor(cluster, lease_duration_s=LIVES_S) as ex:
            assert ex.submit(faults.plus_one, 1).result() == 2
            [before] = cluster.leases()
            clocks[whose].shift(by_s)
            with executor(cluster, lease_duration_s=LIVES_S) as other:
                assert other.submit(faults.plus_one, 2).result() == 3
            wait_until(lambda: len(cluster.leases()) == 1, "what was given back has ended")
            [now] = cluster.leases()
            assert now.id == before.id and 0 < before.hard_end_in_s - now.hard_end_in_s < LIVES_S
            assert sum(ex.map(faults.plus_one, range(50))) == 1275
            clocks[whose].shift(0)
            assert sum(ex.map(faults.plus_one, range(50))) == 1275
            assert [lease.id for lease in cluster.leases()] == [before.id]
        wait_until(lambda: cluster.free() == 2 and not cluster.leases(), "every core came back")
    finally:
        clocks[whose].shift(0)


@pytest.mark.parametrize("by_s", [HOUR_S, -HOUR_S], ids=["forward", "back"])
def test_a_manager_that_is_started_with_another_wall_clock_knows_its_leases_as_they_were(shifted, by_s):
    cluster, clocks = shifted
    try:
        with executor(cluster, lease_duration_s=LIVES_S) as ex:
            [before] = cluster.leases()
            cluster.manager.kill()
            clocks["manager"].shift(by_s)
            cluster.restart_manager()
            [now] = cluster.leases()
            assert now.id == before.id and now.state == "active"
            assert 0 < before.hard_end_in_s - now.hard_end_in_s < LIVES_S
            assert sum(ex.map(faults.plus_one, range(50))) == 1275
            with executor(cluster) as other:
                assert other.submit(faults.plus_one, 2).result() == 3
        wait_until(lambda: cluster.free() == 2 and not cluster.leases(), "every core came back")
    finally:
        clocks["manager"].shift(0)


def test_a_short_lease_ends_at_its_hard_end_though_the_clocks_went_back(shifted):
    cluster, clocks = shifted
    try:
        with executor(cluster, lease_duration_s=1.0) as ex:
            for clock in clocks.values():
                clock.shift(-HOUR_S)
            wait_until(lambda: not ex.workers, "its hard end has come")
            wait_until(lambda: cluster.free() == 2 and not cluster.leases(), "its core came back")
    finally:
        for clock in clocks.values():
            clock.shift(0)

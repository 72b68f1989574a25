"""The benchmark of the control plane measures whole lives, and only right ones; no test here judges a time."""

from __future__ import annotations

import pytest

from rfaas_mpi.bench import control, manager
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.bench.stage import Options


def test_the_control_plane_s_figures_are_there_with_a_second_measurement_beside():
    figures = control.measure_book(Options(runs=1, quick=True), nodes=10, live=60)
    assert figures["book_grants_per_s"] > 0 and figures["book_grant_us"] > 0 and figures["book_reports_per_s"] > 0
    assert figures["figures"]["book_grants_per_s"]["aa"]["count"] == figures["book_grants_per_s_count"]
    assert (figures["cluster"]["nodes"], figures["cluster"]["live_grants"]) == (10, 60)
    assert figures["cluster"]["leases_per_grant"]["shelves"] == 1.0 and figures["shelves_grants_per_s"] > 0


def test_a_life_ends_for_each_that_begins():
    cluster = control.Cluster(nodes=4, live=20)
    before = {lease.id for lease in cluster.book.leases}
    cluster.lives(50)
    cluster.check()
    after = {lease.id for lease in cluster.book.leases}
    assert len(cluster.granted) == 20 and after == {lease.id for leases in cluster.granted for lease in leases}
    assert not before & after


def test_a_rate_of_wrong_grants_is_no_rate():
    cluster = control.Cluster(nodes=1, live=1)
    with pytest.raises(BenchError, match="was answered with"):
        while True:
            cluster.grant()


def test_leases_through_a_real_manager_are_timed_and_all_of_them_end():
    figures = manager.measure_http(Options(runs=1, quick=True), agents=5, rates=(20,))
    (level,) = figures["http_levels"]
    assert level["count"] == 20 and 0 < level["p50_ms"] <= level["p99_ms"] <= level["max_ms"]
    assert figures["http_agents"] == 5 and figures["manager_rss_bytes"] > 0


def test_a_manager_s_start_is_timed_with_as_many_records_as_were_asked_for():
    figures = manager.measure_restart(Options(runs=1, quick=True), records=100)
    assert figures["restart_live"] > 0 and figures["restart_records"] == 10
    assert figures["restart_s_runs"] == [figures["restart_s"]] and figures["start_s"] > 0

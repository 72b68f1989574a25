"""What a report tells of a node besides what it lends."""

from __future__ import annotations

from rfaas_mpi import api
from rfaas_mpi.agent.detector import Core, CoreClass, Report
from rfaas_mpi.agent.traits import traits_of


def core(cpu: int, which: CoreClass = CoreClass.FREE, *, physical: int | None = None,
         since: float | None = None) -> Core:
    return Core(cpu, cpu if physical is None else physical, 0, which, since is not None, since=since)


def test_a_report_tells_classes_of_what_is_lent_where_owners_work_and_the_windows_age():
    found = Report((core(0, CoreClass.OWNED), core(1, since=40.0), core(2, CoreClass.IDLE, since=90.0)), (1, 2), 0)
    assert traits_of(found, 100.0) == api.Traits(window_age_s=60.0, classes={2: "idle"}, busy=(0,))


def test_hardware_threads_of_one_core_are_told():
    found = Report((core(0, since=1.0), core(1, physical=0, since=1.0)), (0, 1), 0)
    assert traits_of(found, 1.0).physical == {0: 0, 1: 0}


def test_a_node_that_lends_nothing_has_no_window():
    assert traits_of(Report((core(0, CoreClass.OWNED),), (), 0), 1.0) == api.Traits(busy=(0,))

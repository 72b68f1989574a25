"""What a report tells of a node besides what it lends."""

from __future__ import annotations

import msgspec

from rfaas_mpi import api
from rfaas_mpi.agent.classes import CoreClass
from rfaas_mpi.agent.detector import Core, Report
from rfaas_mpi.agent.traits import cpu_type, owners_of, traits_of


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


def test_whose_job_s_core_is_lent_is_told_where_it_is_known():
    found = Report((core(0, CoreClass.OWNED), msgspec.structs.replace(core(1, CoreClass.IDLE, since=1.0), uid=1000),
                    msgspec.structs.replace(core(2, CoreClass.IDLE), uid=1001), core(3, since=1.0)), (1, 3), 0)
    assert owners_of(found) == {1: 1000} and owners_of(None) == {}


SITE = api.Traits(cpu_type="fast", partition="day", switches=("leaf", "top"))


def test_what_the_site_says_of_a_node_is_in_each_report_whether_or_not_anybody_looks():
    assert traits_of(None, 1.0, SITE) == SITE
    found = traits_of(Report((core(0, CoreClass.OWNED),), (), 0), 1.0, SITE)
    assert found == api.Traits(cpu_type="fast", partition="day", switches=("leaf", "top"), busy=(0,))


def test_a_processor_s_name_is_told_as_the_kernel_has_it_and_none_where_it_has_none():
    assert cpu_type("processor\t: 0\ncpu family\t: 25\nmodel name\t: EPYC   7763  64-Core\n") == "EPYC 7763 64-Core"
    assert cpu_type("processor\t: 0\ncpu\t\t: POWER9, altivec supported\n") == "POWER9, altivec supported"
    assert cpu_type("processor\t: 0\nBogoMIPS\t: 50.00\n") == ""
    assert len(cpu_type("model name : " + "x" * 1000)) == 128

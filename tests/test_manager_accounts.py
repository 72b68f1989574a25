"""Prices and sums are right, and nothing that a worker says of itself makes them wrong."""

from __future__ import annotations

import pytest

from rfaas_mpi.manager.accounts import OTHERS, KernelUse, Prices, Usage, believable, by_kernel
from rfaas_mpi.manager.days import moment

GIB = 1 << 30
SUMS = {"core_s": 7200.0, "memory_byte_s": 3600.0 * 4 * GIB, "cpu_s": 3600.0, "poll_s": 900.0}


def used(**more: object) -> Usage:
    return Usage(**{"node": "n0", "incarnation": 1, "number": 1, "lease": 9, "uid": 1000, "cores": 2,
                    "memory_bytes": GIB, "held_s": 10.0, "cpu_s": 4.0, **more})


@pytest.mark.parametrize(("prices", "cost"), [
    ({}, 0.0), ({"core_h": 3.0}, 6.0), ({"gib_h": 0.5}, 2.0), ({"compute_h": 8.0}, 6.0), ({"poll_h": 2.0}, 0.5),
    ({"core_h": 3.0, "gib_h": 0.5, "compute_h": 8.0, "poll_h": 2.0}, 14.5)])
def test_each_price_counts_for_its_own_amount_and_costs_add_up(prices, cost):
    assert Prices(**prices).cost(SUMS) == pytest.approx(cost)


def test_two_prices_alike_make_it_useless_to_call_work_polling():
    honest, liar = dict(SUMS), {**SUMS, "poll_s": SUMS["cpu_s"]}
    prices = Prices(compute_h=2.0, poll_h=2.0)
    assert prices.cost(honest) == prices.cost(liar)


def test_a_worker_s_word_counts_for_no_more_than_it_can_have_had():
    seen = believable(used(exec_s=1e6, poll_s=1e6, kernels=(
        KernelUse("a", 4.0, 1), KernelUse("b", 1e6, 2), KernelUse("c", 5.0, 3))), ())
    assert (seen.exec_s, seen.poll_s) == (10.0, 4.0)
    assert seen.kernels == (KernelUse("a", 4.0, 1), KernelUse("b", 6.0, 2), KernelUse("c", 0.0, 3))


def test_the_same_name_twice_is_one_kernel_and_names_beyond_the_bound_are_the_others():
    line = used(exec_s=9.0, kernels=tuple(KernelUse(name, 1.0, 1) for name in "abacdb"))
    assert [each.kernel for each in believable(line, ()).kernels] == ["a", "b", "c", "d"]
    assert believable(line, {"a"}, most=2).kernels == (
        KernelUse("a", 2.0, 2), KernelUse("b", 2.0, 2), KernelUse(OTHERS, 2.0, 2))


def test_without_any_use_there_is_no_line_by_kernel():
    assert by_kernel([], None) == []


@pytest.mark.parametrize("text, seconds", [
    ("", None), ("2026-11-23", 1795392000.0), ("P1D", 1795305600.0), ("P1W", 1794787200.0), ("PT1H", 1795426200.0),
    ("PT90M", 1795424400.0), ("PT1H30M", 1795424400.0), ("PT0M", 1795429800.0)])
def test_a_moment_is_the_begin_of_a_day_or_some_hours_ago(text, seconds):
    assert moment("since", text, 1795429800.0) == seconds         # 10:30 on 2026-11-23


@pytest.mark.parametrize("text", ["PT", "PT1", "PT1D", "P1DT1H", "PT-1H", "1h", "yesterday", "PT9999999H", "2026-02-30"])
def test_what_is_no_moment_is_refused_with_the_field_s_name(text):
    with pytest.raises(ValueError, match="^since is .*P7D.*PT12H"):
        moment("since", text, 1795429800.0)

"""Placement: which cores each worker gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfaas_mpi.placement import pick_cores

TWO_SOCKETS = {core: core // 4 for core in range(8)}


def test_cores_are_taken_in_the_order_of_preference():
    assert pick_cores([3, 1, 2], 0, 2, 1) == [(3,), (1,)]


def test_as_many_workers_as_fit_up_to_the_maximum():
    assert len(pick_cores(range(5), 0, 9, 2)) == 2
    assert len(pick_cores(range(8), 0, 3, 2)) == 3


def test_too_few_cores_for_the_minimum_give_no_worker_at_all():
    assert pick_cores(range(5), 3, 9, 2) == []


def test_a_worker_stays_on_one_numa_node_while_one_has_room():
    # By preference alone the second worker would straddle both nodes.
    picked = pick_cores([1, 2, 3, 4, 5, 6], 0, 2, 2, TWO_SOCKETS)
    assert picked == [(1, 2), (4, 5)]


def test_cores_left_over_on_several_numa_nodes_still_make_a_worker():
    assert pick_cores([1, 2, 3, 4, 5, 6], 0, 3, 2, TWO_SOCKETS) == [
        (1, 2), (4, 5), (3, 6)]


def test_a_worker_larger_than_a_numa_node_spans_as_few_as_possible():
    numa = {core: core // 2 for core in range(8)}
    picked = pick_cores([0, 2, 3, 4, 5, 6], 1, 1, 4, numa)
    assert {numa[core] for core in picked[0]} == {1, 2}


@pytest.mark.parametrize("spare, low, high, cores", [
    ([1, 1], 0, 1, 1), ([1], 2, 1, 1), ([1], -1, 1, 1), ([1], 0, 1, 0)])
def test_senseless_arguments_are_refused(spare, low, high, cores):
    with pytest.raises(ValueError):
        pick_cores(spare, low, high, cores)


@given(spare=st.lists(st.integers(0, 40), unique=True, max_size=30),
       low=st.integers(0, 6), more=st.integers(0, 6), cores=st.integers(1, 5),
       nodes=st.integers(1, 4))
def test_every_pick_is_disjoint_spare_whole_and_repeatable(
        spare, low, more, cores, nodes):
    numa = {core: core % nodes for core in spare}
    picked = pick_cores(spare, low, low + more, cores, numa)
    flat = [core for worker in picked for core in worker]
    possible = len(spare) // cores
    expected = 0 if possible < low else min(possible, low + more)
    assert len(picked) == expected
    assert all(len(worker) == cores for worker in picked)
    assert len(set(flat)) == len(flat) and set(flat) <= set(spare)
    assert pick_cores(spare, low, low + more, cores, numa) == picked
    if len(picked) * cores < len(spare):
        # While a node had room for a whole worker, nobody straddled two.
        left = [core for core in spare if core not in flat]
        by_node = [sum(numa[core] == node for core in left) for node in range(nodes)]
        straddles = [len({numa[core] for core in worker}) > 1 for worker in picked]
        assert not (any(straddles) and max(by_node) >= cores)
        assert straddles == sorted(straddles)

"""Who of the ranks that lease together gets which workers, and what they are told where they don't agree."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfaas_mpi.gang import allowances, disagreement, owners, ranks_text, shares

HOSTS = st.sampled_from(["a", "b", "c"])


@pytest.mark.parametrize(("ranks", "text"), [
    ([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([4, 2], "ranks 2, 4"), ([0, 1], "ranks 0-1")])
def test_ranks_are_named_in_few_words(ranks, text):
    assert ranks_text(ranks) == text


def test_who_differs_is_named_the_fewest_first():
    same = {"workers": "(1, 2)", "slots": "8"}
    assert disagreement([same, same, same]) == ""
    assert disagreement([same, same, {**same, "slots": "4"}]) == "slots is 4 on rank 2, 8 on ranks 0-1"
    assert disagreement([same, {"workers": "(1, 2)"}]) == "slots is 8 on rank 0, nothing on rank 1"
    assert disagreement([{"slots": str(n)} for n in range(6)]).endswith("2 on rank 2, and 3 other values")


@pytest.mark.parametrize(("ranks", "workers", "found"), [
    ("a", "aa", [(0, 1)]),
    ("aabb", "ba", [(1,), (1,), (0,), (0,)]),
    ("ab", "bbaa", [(2, 3), (0, 1)]),
    ("aaa", "ab", [(0, 1), (0, 1), (0, 1)]),
    ("ab", "aaa", [(0, 2), (1, 2)]),
    ("abc", "", [(), (), ()])])
def test_workers_of_the_own_host_come_first(ranks, workers, found):
    assert shares(ranks, workers) == found


@given(st.lists(HOSTS, min_size=1, max_size=150), st.lists(HOSTS, max_size=40), st.integers(1, 64))
def test_shares_are_fair_and_no_worker_is_idle_or_has_too_many_ranks(ranks, workers, most):
    given = shares(ranks, workers, most)
    assert len(given) == len(ranks)
    assert all(len(set(mine)) == len(mine) for mine in given)
    users = Counter(number for mine in given for number in mine)
    assert set(users) == set(range(len(workers))), "each worker has somebody"
    assert not users or max(users.values()) <= most
    if len(ranks) <= most:
        # Each worker divides itself by those who use it.
        parts = [sum(1 / users[number] for number in mine) for mine in given]
        assert max(parts) == pytest.approx(min(parts)), "equal shares"
    elif workers and len(ranks) <= most * len(workers):
        assert all(given), "nobody has none"


@given(st.lists(HOSTS, min_size=1, max_size=60))
def test_ranks_with_a_worker_each_on_their_host_stay_there(ranks):
    for rank, mine in enumerate(shares(ranks, ranks)):
        assert [ranks[number] for number in mine] == [ranks[rank]]


@given(st.lists(HOSTS, min_size=1, max_size=60), st.lists(HOSTS, max_size=40), st.none() | st.integers(0, 100))
def test_what_ranks_may_lease_alone_is_no_more_than_all_may_have(ranks, workers, more):
    mine = shares(ranks, workers)
    owned = owners(mine, len(workers))
    assert all(number in mine[rank] for number, rank in enumerate(owned)), "who replaces a worker has used it"
    allowed = allowances(more, len(ranks), owned)
    if more is None:
        assert allowed == [None] * len(ranks)
    else:
        numbers = [number for number in allowed if number is not None]
        assert sum(numbers) == more and max(numbers) - min(numbers) <= 1


def test_what_can_t_be_divided_goes_to_those_who_own_least():
    assert owners([(0, 1), (0, 1), (2,)], 3) == [0, 1, 2]
    assert allowances(2, 3, [0]) == [0, 1, 1]
    assert allowances(4, 3, [0, 2]) == [1, 2, 1]
    assert allowances(-1, 2, [0, 1, 1]) == [0, 0]

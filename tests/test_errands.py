"""Side by side, and one after the other in a thread of its own."""

from __future__ import annotations

import threading

import pytest

from rfaas_mpi.errands import Errands, each
from rfaas_mpi.errors import ServiceError

GUARD_S = 60.0


def test_each_is_done_at_the_same_time_and_answers_in_order():
    together = threading.Barrier(5)

    def act(number: int) -> int:
        together.wait(GUARD_S)          # breaks unless all five are here
        return number * number

    assert each(act, range(5)) == [0, 1, 4, 9, 16]
    assert each(act, []) == []


def test_one_that_fails_leaves_the_others_their_answers():
    def act(number: int) -> int:
        if number % 2:
            raise ServiceError(f"not {number}")
        return number

    found = each(act, range(4))
    assert found[0::2] == [0, 2]
    assert [str(error) for error in found[1::2]] == ["not 1", "not 3"]


@pytest.mark.parametrize("wrong", [0, 2])
def test_what_is_no_error_of_ours_goes_through(wrong):
    def act(number: int) -> None:
        if number == wrong:
            raise ZeroDivisionError(number)

    with pytest.raises(ZeroDivisionError):
        each(act, range(3))


def test_one_thing_is_done_where_the_caller_is():
    assert each(lambda _: threading.current_thread(), [0]) == [threading.current_thread()]


def test_errands_are_done_in_order_in_a_thread_that_ends():
    done: list[int] = []
    threads: set[threading.Thread] = set()
    over = threading.Event()
    errands = Errands("errands")
    for number in range(20):
        errands.do(number, lambda number=number: (done.append(number), threads.add(threading.current_thread())))
    errands.do("last", over.set)
    assert over.wait(GUARD_S)
    errands.close(GUARD_S)
    assert done == list(range(20))
    assert threading.current_thread() not in threads


def test_the_same_errand_is_not_done_twice_while_it_waits_or_is_done():
    begun, go, count = threading.Event(), threading.Event(), []

    def act() -> None:
        count.append(1)
        begun.set()
        assert go.wait(GUARD_S)

    errands = Errands("errands")
    errands.do("it", act)
    assert begun.wait(GUARD_S)
    errands.do("it", act)
    errands.do("other", lambda: count.append(2))
    errands.do("other", lambda: count.append(3))
    go.set()
    errands.do("end", (end := threading.Event()).set)
    assert end.wait(GUARD_S)
    assert count == [1, 2]
    errands.do("it", (again := threading.Event()).set)
    assert again.wait(GUARD_S), "it was done before, and is not being done"
    errands.close()


def test_one_that_fails_does_not_keep_the_next_one(caplog):
    over = threading.Event()
    errands = Errands("errands")
    errands.do("bad", lambda: 1 // 0)
    errands.do("good", over.set)
    assert over.wait(GUARD_S)
    errands.close()
    assert "could not do bad" in caplog.text


def test_after_close_nothing_is_done():
    errands = Errands("errands")
    errands.close()
    errands.close()
    errands.do("it", (done := threading.Event()).set)
    assert not done.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "errands"]

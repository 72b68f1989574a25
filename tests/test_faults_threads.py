"""Forks and threads: eight of them on one executor while kernels fail, and while it closes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading

import faults
import numpy as np
import pytest

from rfaas_mpi import Executor, KernelError, Waitall


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_may_have_an_executor_of_its_own_while_its_parent_works(tmp_path):
    read, write = os.pipe()
    with Executor(workers=1, cores=(0, 1)) as executor:
        futures = [executor.submit(faults.plus_one, n) for n in range(2000)]
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                with Executor(workers=1, cores=(0, 1)) as mine:
                    assert mine.submit(faults.plus_one, 1).result() == 2
                    assert (mine.Invoke(faults.adds_one, mine.zeros(9), np.zeros(9)) == 1).all()
                status = 0
            os._exit(status)
        os.close(write)
        assert [future.result() for future in futures] == list(range(1, 2001))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert executor.submit(faults.plus_one, 1).result() == 2
    os.close(read)


def test_eight_threads_use_all_styles_while_kernels_fail_around_them():
    errors: list[BaseException] = []
    with Executor(workers=2, cores=(0, 1)) as executor:
        def styles(number: int) -> None:
            x, out = executor.full(30, float(number)), executor.empty(30)
            persistent = executor.Invoke_init(faults.adds_one, x, out)
            for n in range(40):
                persistent.Start()
                persistent.Wait()
                assert (out == number + 1).all()
                assert executor.submit(faults.plus_one, n).result() == n + 1
                requests = [executor.Iinvoke(faults.adds_one, x, np.zeros(30)) for _ in range(4)]
                assert Waitall(requests)
                assert all((request.out == number + 1).all() for request in requests)
                assert list(executor.map(faults.plus_one, range(9), chunksize=3)) == list(range(1, 10))
                if n % 20 == number:
                    with pytest.raises(KernelError, match="SIGSEGV"):
                        executor.submit(faults.do, "segfault").result()
                if n % 10 == number:
                    with pytest.raises(ValueError, match="no number"):
                        executor.submit(faults.do, "raise").result()

        def guarded(number: int) -> None:
            try:
                styles(number)
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=guarded, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_closing_while_eight_threads_call_ends_each_call_with_a_result_or_a_clear_error():
    ended: list[str] = []
    executor = Executor(workers=1)
    begun = threading.Barrier(9)

    def calls(number: int) -> None:
        begun.wait()
        try:
            while True:
                if number % 2:
                    assert executor.submit(faults.plus_one, 1).result() == 2
                else:
                    assert executor.Invoke(faults.adds_one, np.ones(3), np.zeros(3))[0] == 2
        except Exception as error:
            ended.append(type(error).__name__)
    threads = [threading.Thread(target=calls, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    executor.shutdown()
    for thread in threads:
        thread.join(60)
    assert len(ended) == 8
    assert set(ended) <= {"ClosedError", "CancelledError"}


class Pausing(dict):
    """The futures that are not over yet; the thread that takes one out stops there until it is let go."""

    def __init__(self, pending: dict) -> None:
        super().__init__(pending)
        self.reached, self.go = threading.Event(), threading.Event()

    def pop(self, *args):
        self.reached.set()
        assert self.go.wait(60)
        return super().pop(*args)


def test_as_completed_that_looks_while_an_end_is_being_told_gets_it_once(tmp_path):
    with Executor(workers=2, cores=(0, 1)) as executor:
        others = [executor.submit(faults.plus_one, n) for n in range(40)]
        assert [future.result() for future in others] == list(range(1, 41))
        flags = tmp_path / "one", tmp_path / "two"
        one, two = (executor.submit(faults.begin_then_wait, tmp_path / "begun", flag, 5) for flag in flags)
        executor._crew.pending = pending = Pausing(executor._crew.pending)
        told = threading.Event()
        one.add_done_callback(lambda future: told.set())     # from here on another thread takes its end
        flags[0].touch()
        assert pending.reached.wait(60)
        completed = concurrent.futures.as_completed([*others, one, two], 60)
        first = next(completed)
        pending.go.set()
        assert told.wait(60)
        flags[1].touch()
        assert {first, *completed} == {*others, one, two}

"""What a network changes for who calls: memory at the worker has a limit, and what was sent is the worker's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import faults
import numpy as np
import pytest

from rfaas_mpi import CancelledError, Executor, InvalidBuffer
from rfaas_mpi.config import Settings
from rfaas_mpi.session import Session

MIB = 1 << 20


@pytest.fixture
def remote(executor_over) -> Iterator[Executor]:
    with executor_over("tcp", fallback=False) as executor:
        yield executor


def warm_up(executor: Executor) -> None:
    """From here on the workers are known to be quick, and calls are sent to them ahead."""
    for n in range(200):
        assert executor.submit(faults.plus_one, n).result() == n + 1


# --- memory --------------------------------------------------------------------------------------

@pytest.fixture
def small(executor_over) -> Iterator[Executor]:
    """Its worker has room for one array of 100 MiB, and not for two."""
    with executor_over("tcp", fallback=False, memory_per_worker=180 * MIB) as executor:
        yield executor


CALLS = {
    "an argument": lambda ex, x: ex.submit(np.sum, x).result(),
    "an input": lambda ex, x: ex.Invoke(faults.adds_one, x[:10], np.zeros(10)),
    "an output": lambda ex, x: ex.Invoke(faults.adds_one, np.ones(10), x[:10]),
    "with a time limit": lambda ex, x: ex.Invoke(faults.adds_one, x[:10], np.zeros(10), timeout_s=60),
    "a persistent input": lambda ex, x: start_and_wait(ex.Invoke_init(faults.adds_one, x[:10], np.zeros(10))),
    "a plain input": lambda ex, x: ex.Invoke(faults.adds_one, np.ones(x.size), np.zeros(x.size)),
}


def start_and_wait(request) -> None:
    request.Start()
    request.Wait()


@pytest.mark.parametrize("what", CALLS)
def test_an_array_that_a_worker_has_no_room_for_fails_its_own_call_alone(small, what):
    before = faults.worker_pids(small)
    first = small.full(100 * MIB // 8, 1.0)
    calls = [small.submit(faults.plus_one, n) for n in range(20)]
    second = small.full(100 * MIB // 8, 2.0)
    calls += [small.submit(faults.plus_one, n) for n in range(20)]
    for _ in range(2):
        with pytest.raises(InvalidBuffer) as caught:
            CALLS[what](small, second)
        assert f"granted {180 * MIB} bytes" in str(caught.value), "the limit"
        assert f"needs {second.nbytes // 4096 * 4096 + 4096} bytes" in str(caught.value), "and the need"
        assert "memory_per_worker" in str(caught.value), "and the way out"
    assert [call.result() for call in calls] == [*range(1, 21)] * 2
    assert small.submit(np.sum, first).result() == first.size
    assert small.Invoke(faults.adds_one, first[:10], np.zeros(10)).tolist() == [2.0] * 10
    assert faults.worker_pids(small) == before, "its worker is the same"


def test_room_that_became_free_is_used_again(small):
    before = faults.worker_pids(small)
    for value in range(1, 6):
        array = small.full(100 * MIB // 8, float(value))
        assert small.submit(np.sum, array).result() == value * array.size
        del array
    assert faults.worker_pids(small) == before


def test_many_small_arrays_fill_a_workers_memory_to_its_limit(small):
    """Although arrays share arenas that double in size, and the next one would be too large."""
    arrays = [small.full(10 * MIB // 8, float(n)) for n in range(14)]
    for n, array in enumerate(arrays):
        assert small.submit(np.sum, array).result() == n * array.size


# --- what was sent ---------------------------------------------------------------------------------

def test_a_call_that_was_sent_is_not_cancelled_and_delivers(remote, tmp_path):
    flag, begun = tmp_path / "flag", tmp_path / "begun"
    warm_up(remote)
    first = remote.submit(faults.begin_then_wait, begun, flag, 7)
    faults.wait_for(begun)
    sent = [remote.submit(faults.plus_one, n) for n in range(2)]
    request = remote.Iinvoke(faults.adds_one, np.ones(3), np.zeros(3))
    assert [future.cancel() for future in sent] == [False, False]
    assert not request.Cancel()
    flag.touch()
    assert first.result() == 7
    assert [future.result() for future in sent] == [1, 2]
    assert request.Wait()
    assert request.out.tolist() == [2.0] * 3


def test_a_call_that_was_sent_is_cancelled_with_force_once_it_is_its_turn(remote, tmp_path):
    flag, begun, never = tmp_path / "flag", tmp_path / "begun", tmp_path / "never"
    warm_up(remote)
    first = remote.submit(faults.begin_then_wait, begun, flag, 7)
    faults.wait_for(begun)
    sent = remote.submit(faults.begin_then_wait, tmp_path / "sent", never, 8)
    behind = [remote.submit(faults.plus_one, n) for n in range(5)]
    assert sent.cancel(force=True)
    flag.touch()
    assert first.result() == 7, "what ran before it is not its victim"
    with pytest.raises(CancelledError):
        sent.result()
    assert [future.result() for future in behind] == [1, 2, 3, 4, 5]


def test_a_call_that_waits_for_a_slot_can_be_cancelled(executor_over, tmp_path):
    flag, begun = tmp_path / "flag", tmp_path / "begun"
    with executor_over("tcp", fallback=False, slots=2) as executor:
        first = executor.submit(faults.begin_then_wait, begun, flag, 7)
        faults.wait_for(begun)
        rest = [executor.submit(faults.plus_one, n) for n in range(10)]
        assert [future.cancel() for future in rest[2:]] == [True] * 8
        flag.touch()
        assert first.result() == 7
        assert rest[0].result() == 1


@contextlib.contextmanager
def two_workers() -> Iterator[Executor]:
    # The session is held, so that the service does not leave before the executor comes.
    with contextlib.closing(Session.open(Settings.load())) as session:
        session.open_door(["127.0.0.1:0"])
        with Executor(workers=2, transport="tcp", cores=(0, 1), fallback=False) as executor:
            yield executor


def test_what_was_sent_waits_for_its_worker_and_nothing_else_does(tmp_path, wait_until):
    """On shared memory it would move to the worker that is idle."""
    flag, begun = tmp_path / "flag", tmp_path / "begun"
    with two_workers() as executor:
        warm_up(executor)
        first = executor.submit(faults.begin_then_wait, begun, flag, 7)
        faults.wait_for(begun)
        rest = [executor.submit(faults.plus_one, n) for n in range(40)]
        busy = first._raw.worker
        wait_until(lambda: all(future.done() or future._raw.worker == busy for future in rest), "all others have ended")
        assert any(future.done() for future in rest)
        flag.touch()
        assert first.result() == 7
        assert [future.result() for future in rest] == list(range(1, 41))

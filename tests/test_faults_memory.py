"""Payloads beyond 4 GiB, beyond the memory granted, and buffers that go or change in flight."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import faults
import numpy as np
import pytest

from rfaas_mpi import BadKernel, Executor, InvalidBuffer, kernel

GIB = 1 << 30
LARGE = (4 << 30) + (300 << 20)
FITS = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10
MARKS = (0, 1, (1 << 31) + 5, (1 << 32) - 1, 1 << 32, (1 << 32) + 7, LARGE - 1)


@kernel
def reads_marks(x):
    """Its length and what stands at the marks."""
    return np.array([x.nbytes, *(x[at] for at in MARKS)], np.int64)


@kernel
def reads_ends(x):
    return np.array([x.nbytes, x[0], x[-1]], np.int64)


@kernel
def writes_marks(value, out):
    for number, at in enumerate(MARKS):
        out[at] = value + number


def marked(array: np.ndarray) -> np.ndarray:
    for number, at in enumerate(MARKS):
        array[at] = 10 + number
    return array


@pytest.fixture
def ex():
    with Executor(workers=1, memory_per_worker=6 * GIB) as executor:
        yield executor


def first_and_last(array: np.ndarray) -> tuple[int, int, int]:
    return array.nbytes, int(array[0]), int(array[-1])


@pytest.mark.timeout(300)
def test_more_than_4_gib_of_the_executors_memory_are_input_argument_and_output(ex):
    array = marked(ex.empty(LARGE, np.uint8))
    found = ex.Invoke(reads_marks, array, np.zeros(1 + len(MARKS), np.int64))
    assert found.tolist() == [LARGE, *range(10, 10 + len(MARKS))]
    assert ex.submit(first_and_last, array).result() == (LARGE, 10, 9 + len(MARKS))
    request = ex.Iinvoke(writes_marks, 20, array)
    assert request.Wait()
    assert request.out_sizes == (LARGE,)
    assert [array[at] for at in MARKS] == list(range(20, 20 + len(MARKS)))


# A plain array that large travels as a copy, for which not every machine has the memory.
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [LARGE if FITS > 2 * LARGE + 2 * GIB else GIB])
def test_a_plain_array_of_more_than_4_gib_arrives(ex, size):
    array = np.zeros(size, np.uint8)
    array[0], array[-1] = 3, 4
    assert ex.Invoke(reads_ends, array, np.zeros(3, np.int64)).tolist() == [size, 3, 4]


def test_memory_of_large_arrays_is_given_back(ex):
    for _ in range(3):
        x = ex.zeros(GIB, np.uint8)
        assert ex.submit(first_and_last, x).result() == (GIB, 0, 0)
        del x
        gc.collect()
    assert ex.stats()["arena_bytes"] < GIB


# --- more than was granted --------------------------------------------------------------------

def test_more_than_was_granted_is_refused_with_both_numbers_in_every_way():
    with Executor(workers=1, memory_per_worker="64M") as executor:
        large = np.zeros(70_000_000, np.uint8)
        numbers = "70000000 bytes.*67108864"
        for use in (lambda: executor.empty(70_000_000, np.uint8), lambda: executor.zeros(70_000_000, np.uint8),
                    lambda: executor.array(large), lambda: executor.put(large),
                    lambda: executor.Invoke(reads_marks, large, np.zeros(1)),
                    lambda: executor.Iinvoke(writes_marks, 1, large),
                    lambda: executor.Invoke_init(writes_marks, 1, large)):
            with pytest.raises(InvalidBuffer, match=numbers):
                use()
        assert executor.submit(faults.plus_one, 1).result() == 2


def test_a_payload_that_the_worker_can_not_hold_fails_alone():
    """Arguments of objects become the worker's own memory, which is bounded."""
    with Executor(workers=1, memory_per_worker="64M") as executor:
        pid = executor.submit(os.getpid).result()
        with pytest.raises((MemoryError, InvalidBuffer, BadKernel)):
            executor.submit(len, bytes(200_000_000)).result()
        with pytest.raises(MemoryError):
            executor.submit(bytes, 200_000_000).result()
        assert executor.submit(os.getpid).result() == pid


# --- buffers that go or change in flight ----------------------------------------------------------

def test_a_request_keeps_its_arrays_alive(ex):
    requests = []
    for n in range(50):
        x, out = ex.full(20_000, float(n)), ex.empty(20_000)
        requests.append((n, ex.Iinvoke(faults.adds_one, x, out)))
        del x, out
        gc.collect()
    for n, request in requests:
        assert request.Wait()
        assert (request.out == n + 1).all()


def test_a_bytearray_can_not_be_resized_in_flight(ex, tmp_path):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    memory = bytearray(24)
    request = ex.Iinvoke(faults.fills_when, (faults.text(begun), faults.text(flag)), memory)
    faults.wait_for(begun)
    with pytest.raises(BufferError):
        memory.extend(b"more")
    flag.touch()
    assert request.Wait()
    assert memory == bytes([5] * 24)


def test_a_dropped_request_never_writes_into_memory_that_is_used_again(ex, tmp_path):
    begun, flag = tmp_path / "begun", tmp_path / "flag"
    request = ex.Iinvoke(faults.fills_when, (faults.text(begun), faults.text(flag)), ex.zeros(5000))
    faults.wait_for(begun)
    del request
    gc.collect()
    fresh = [ex.zeros(5000) for _ in range(50)]
    flag.touch()
    assert ex.submit(faults.plus_one, 1).result() == 2, "the worker is past the dropped one"
    assert not any(array.any() for array in fresh)

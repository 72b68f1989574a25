"""What may be an argument, and which arrays of several requests clash."""

from __future__ import annotations

import array
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfaas_mpi import ClosedError, InvalidBuffer
from rfaas_mpi.arrays import Constant, Memory, Spans, arguments, as_input, as_output, check_overlap


class Heap:
    """Plain memory, where the promise is not about where it lies."""

    def alloc(self, nbytes: int, *, zero: bool = False) -> bytearray:
        return bytearray(nbytes)


# --- inputs and outputs -----------------------------------------------------------

def test_a_contiguous_array_is_used_in_place():
    x = np.arange(6.0).reshape(2, 3)
    assert as_input(x) is x
    assert as_output(x) is x


@pytest.mark.parametrize(("value", "dtype", "size"), [
    (b"abc", "u1", 3),
    (bytearray(b"abcd"), "u1", 4),
    (memoryview(np.arange(3, dtype="f4")), "f4", 3),
    (array.array("d", [1, 2]), "f8", 2),
    (3, "i8", 1),
    (2.5, "f8", 1),
    (True, "?", 1),
    (1j, "c16", 1),
    (np.float32(1), "f4", 1),
    (Constant(np.arange(4)), "i8", 4),
])
def test_buffers_and_scalars_are_inputs(value, dtype, size):
    found = as_input(value)
    assert found.dtype == dtype
    assert found.size == size


def test_mpi4py_buffer_lists_choose_elements_and_type():
    x = np.arange(10.0)
    assert as_input([x, 4]).tolist() == [0, 1, 2, 3]
    assert as_input([x, (2, 5)]).tolist() == [5, 6]
    assert as_input([x, 3, "d"]).tolist() == [0, 1, 2]
    assert as_input([bytearray(16), "d"]).shape == (2,)
    as_output([x, (2, 5)])[:] = -1
    assert x[5:7].tolist() == [-1, -1]


def test_one_argument_or_several():
    x, y = np.zeros(1), np.zeros(1)
    assert arguments(x) == (x,)
    assert arguments((x, y)) == (x, y)
    assert arguments([x, y]) == (x, y)
    assert len(arguments([x, 1])) == 1


@pytest.mark.parametrize(("value", "says"), [
    (np.arange(6)[::2], "np.ascontiguousarray"),
    (np.zeros((3, 3)).T[1:], "np.ascontiguousarray"),
    (np.array([object()]), "Python objects"),
    (10**40, "64 bits"),
    ("text", r"x\.encode\(\)"),
    (np.ma.masked_array([1, 2], [0, 1]), "filled"),
    (object(), "not an array or buffer"),
    (None, "not an array or buffer"),
    ([1, 2, 3], "np.asarray"),
    ([], "a list of 0"),
    ([np.zeros(2), 5], "asks for 5"),
    ([np.zeros(2), -1], "asks for -1"),
    ([np.zeros(2), 1, object()], "datatype"),
    ([np.zeros(2), True], "count"),
    ([np.zeros(3, "u1"), "d"], "datatype"),
])
def test_what_cannot_be_an_input_is_refused_with_the_way_out(value, says):
    with pytest.raises(InvalidBuffer, match=says) as caught:
        as_input(value, "input 2 of f")
    assert "input 2 of f" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("value", "says"), [
    (b"abc", "read-only"),
    (np.broadcast_to(np.zeros(1), (3,)), "contiguous"),
    (Constant(np.zeros(2)), "put"),
    (3.0, "writable array"),
    (None, "writable array"),
    (np.float64(3), "writable array"),
    (np.arange(6)[::2], "contiguous"),
])
def test_what_cannot_be_an_output_is_refused_with_the_way_out(value, says):
    with pytest.raises(InvalidBuffer, match=says):
        as_output(value, "out")


def test_memory_of_a_gpu_is_refused_by_name():
    class OnGpu:
        __cuda_array_interface__ = {}
    with pytest.raises(InvalidBuffer, match="GPU"):
        as_input(OnGpu())


def test_arguments_that_overlap_are_refused():
    x = np.zeros(10)
    with pytest.raises(InvalidBuffer, match="output 0 and input 1"):
        check_overlap((np.zeros(1), x[:6]), (x[5:],))
    with pytest.raises(InvalidBuffer, match="outputs 0 and 1"):
        check_overlap((), (x[:6], x[5:]))
    check_overlap((x, x), (np.zeros(1),))
    check_overlap((x[:5],), (x[5:],))


# --- the executor's memory --------------------------------------------------------

def test_arrays_of_any_shape_and_dtype_can_be_made():
    memory = Memory(Heap())
    assert memory.empty(3).shape == (3,)
    assert memory.empty(()).shape == ()
    assert memory.empty((0, 5)).nbytes == 0
    assert memory.empty((2, 3), [("a", "i4"), ("b", "f8")]).dtype.names == ("a", "b")
    assert memory.empty(np.int64(4), "f4").shape == (4,)


def test_more_than_was_granted_is_refused_with_both_numbers():
    memory = Memory(Heap(), limit=1000)
    assert memory.empty(125).nbytes == 1000
    with pytest.raises(InvalidBuffer, match=r"1008 bytes.*1000.*memory_per_worker"):
        memory.empty(126)


@pytest.mark.parametrize(("shape", "dtype", "says"), [
    (3, object, "Python objects"),
    (-1, float, "negative"),
    ((2, -3), float, "negative"),
])
def test_arrays_that_cannot_be_shared_are_refused(shape, dtype, says):
    with pytest.raises(InvalidBuffer, match=says):
        Memory(Heap()).empty(shape, dtype)


def test_a_constant_is_a_read_only_copy():
    x = np.arange(3)
    constant = Memory(Heap()).put(x)
    x[:] = 9
    assert constant.array.tolist() == [0, 1, 2]
    assert np.asarray(constant).sum() == 3
    assert len(constant) == 3
    with pytest.raises(ValueError, match="read-only"):
        constant.array[0] = 1


def test_a_constant_travels_as_its_values():
    again = pickle.loads(pickle.dumps({"c": Memory(Heap()).put([1.5, 2.5])}))["c"]
    assert again.tolist() == [1.5, 2.5]
    assert not again.flags.writeable


def test_a_closed_constant_says_so():
    constant = Memory(Heap()).put([1])
    constant.close()
    constant.close()
    with pytest.raises(ClosedError, match="put"):
        as_input(constant)


# --- arrays of several requests -----------------------------------------------------

span = st.tuples(st.integers(0, 60), st.integers(1, 12))
request_spans = st.tuples(st.lists(span, max_size=3), st.lists(span, max_size=2))


@given(st.lists(st.tuples(request_spans, st.booleans()), max_size=12))
def test_clashes_are_exactly_shared_bytes_that_somebody_writes(history):
    ground = np.zeros(80, np.uint8)
    spans = Spans()
    alive: dict[int, tuple] = {}
    for owner, ((reads, writes), drop) in enumerate(history):
        inputs = [ground[a:a + n] for a, n in reads]
        outputs = [ground[a:a + n] for a, n in writes]
        read = {i for a, n in reads for i in range(a, a + n)}
        written = {i for a, n in writes for i in range(a, a + n)}
        expected = {other for other, (_, _, r, w, _) in alive.items()
                    if written & (r | w) or read & w}
        assert set(spans.clashes(inputs, outputs)) == expected
        entry, clashes = spans.add(owner, inputs, outputs)
        assert set(clashes) == expected
        assert len(clashes) == len(expected)
        alive[owner] = inputs, outputs, read, written, entry
        if drop:
            victim = min(alive)
            gone = alive.pop(victim)
            spans.remove(gone[4])
            spans.remove(gone[4])
    assert len(spans) == len(alive)
    assert set(spans.owners()) == set(alive)

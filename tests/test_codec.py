"""Objects, errors and bindings survive the way between rank and worker."""

from __future__ import annotations

import functools
import pickle
import threading
import traceback

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfaas_mpi import codec
from rfaas_mpi.errors import BadKernel, InvalidBuffer, KernelChanged, KernelError, NestedError


def shipped(parts):
    """The parts as the other side has them: private and writable."""
    return [memoryview(bytearray(part)) for part in parts]


def call_and_back(*args, locate=None, refs_of=None, **kwargs):
    parts, refs = codec.dumps_call(args, kwargs, locate)
    return codec.loads_call(shipped(parts), [refs_of(ref) for ref in refs] if refs_of else ())


def result_and_back(value):
    return codec.loads_result(shipped(codec.dumps_result(value)))


class Arena:
    """One stretch of memory that passes for an arena."""

    def __init__(self, nbytes: int) -> None:
        self.memory = np.zeros(nbytes, np.uint8)
        self.start = self.memory.ctypes.data

    def locate(self, address: int, nbytes: int) -> tuple[int, int] | None:
        offset = address - self.start
        return (7, offset) if 0 <= offset and offset + nbytes <= self.memory.nbytes else None

    def view(self, ref: tuple[int, int, int]) -> memoryview:
        arena, offset, nbytes = ref
        assert arena == 7
        return self.memory[offset:offset + nbytes].data.toreadonly()


# --- calls ------------------------------------------------------------------------

objects = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
    | st.tuples(inner, inner), max_leaves=8)


@settings(deadline=None, max_examples=60)
@given(st.lists(objects, max_size=4), st.dictionaries(st.text(min_size=1), objects, max_size=2))
def test_arguments_arrive_as_they_were(args, kwargs):
    parts, refs = codec.dumps_call(tuple(args), kwargs)
    assert codec.loads_call(shipped(parts), refs) == (tuple(args), kwargs)


DTYPES = ["?", "i1", "u8", "f2", "f4", "f8", "g", "c8", "c16", ">f8", "S5", "U3", "M8[ns]", "m8[s]",
          [("a", "i4"), ("b", "f8")]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 0, 4), (3000,), (60, 70)], ids=str)
def test_arrays_arrive_with_dtype_shape_and_values_and_can_be_written(dtype, shape):
    array = np.zeros(shape, dtype)
    array[...] = np.ones(shape, "i1").astype(dtype) if not isinstance(dtype, list) else np.ones(shape, dtype)
    for wrap in (lambda a: a, lambda a: [a], lambda a: {"deep": (a,)}):
        (got,), _ = call_and_back(wrap(array))
        found = got if isinstance(got, np.ndarray) else got[0] if isinstance(got, list) else got["deep"][0]
        assert found.dtype == array.dtype and found.shape == array.shape
        np.testing.assert_array_equal(found, array)
        assert found.flags.writeable
        back = result_and_back(array)
        assert back.dtype == array.dtype and back.flags.writeable
        np.testing.assert_array_equal(back, array)


def test_arrays_without_one_block_of_memory_arrive():
    base = np.arange(10000.0).reshape(100, 100)
    views = (base[::2, ::3], base.T, np.asfortranarray(base), np.broadcast_to(np.float64(3), (50, 50)), base[:, 5:6])
    got, _ = call_and_back(*views)
    for view, found in zip(views, got, strict=True):
        np.testing.assert_array_equal(found, view)


def test_numpy_scalars_keep_their_type():
    for value in (np.float64(1.5), np.int64(7), np.int8(-3), np.complex64(1j), np.bool_(True),
                  np.float32(2)):
        (got,), _ = call_and_back(value)
        assert type(got) is type(value) and got == value
        back = result_and_back(value)
        assert type(back) is type(value) and back == value
    assert result_and_back(np.bool_(True)) is np.True_


def test_a_large_array_is_not_copied_on_the_rank():
    array = np.arange(100_000.0)
    parts, _ = codec.dumps_call((1, array), {})
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), array) for part in parts[1:])
    parts = codec.dumps_result({"x": array})
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), array) for part in parts[1:])


def test_a_large_result_lies_in_the_memory_that_brought_it():
    parts = shipped(codec.dumps_result(np.arange(100_000.0)))
    assert np.shares_memory(codec.loads_result(parts), np.frombuffer(parts[1], np.uint8))


def test_arrays_in_an_arena_travel_as_references_at_every_depth():
    arena = Arena(1 << 20)
    inside = arena.memory[4096:4096 + 80_000].view(np.float64)
    inside[:] = np.arange(10_000)
    deeper = arena.memory[200_000:200_000 + 40_000].view(np.int32)
    outside = np.full(10_000, 5.0)
    args = (inside, outside, {"deep": [deeper, outside]}, 3)
    parts, refs = codec.dumps_call(args, {"key": inside}, arena.locate)
    assert sorted(refs) == sorted([(7, 4096, 80_000), (7, 4096, 80_000), (7, 200_000, 40_000)])
    assert sum(memoryview(part).nbytes for part in parts) < 2 * outside.nbytes + 2000
    got, kwargs = codec.loads_call(shipped(parts), [arena.view(ref) for ref in refs])
    np.testing.assert_array_equal(got[0], inside)
    np.testing.assert_array_equal(got[1], outside)
    np.testing.assert_array_equal(got[2]["deep"][0], deeper)
    np.testing.assert_array_equal(got[2]["deep"][1], outside)
    np.testing.assert_array_equal(kwargs["key"], inside)
    assert got[3] == 3
    assert not got[0].flags.writeable and not got[2]["deep"][0].flags.writeable
    assert np.shares_memory(got[0], arena.memory) and np.shares_memory(got[2]["deep"][0], arena.memory)


def test_the_arguments_themselves_are_left_alone():
    array = np.arange(5.0)
    kwargs = {"a": array, "n": 1}
    args = (array, 2)
    codec.dumps_call(args, kwargs)
    assert args[0] is array and kwargs == {"a": array, "n": 1} and kwargs["a"] is array


def test_functions_and_closures_travel_as_arguments():
    base = 10
    got, _ = call_and_back(lambda x: x + base, functools.partial(max, 3))
    assert got[0](1) == 11 and got[1](2) == 3


def test_an_argument_that_can_not_be_pickled_is_named():
    with pytest.raises(BadKernel, match=r"argument 1 \(_thread.lock\).*cannot pickle"):
        codec.dumps_call((1, threading.Lock()), {})
    with pytest.raises(TypeError, match=r"argument 'key' \(list\)"):
        codec.dumps_call((1,), {"key": [threading.Lock()]})


class Touchy:
    """Pickles well and can't be rebuilt."""

    def __reduce__(self):
        return _refuse, ("not here",)


def _refuse(why):
    raise RuntimeError(why)


def test_what_can_not_be_rebuilt_is_a_kernel_error_that_says_so():
    parts, refs = codec.dumps_call((Touchy(),), {})
    with pytest.raises(KernelError, match="arguments arrived but can't be rebuilt.*RuntimeError: not here"):
        codec.loads_call(shipped(parts), refs)
    with pytest.raises(KernelError, match="result arrived but can't be rebuilt.*RuntimeError: not here"):
        result_and_back(Touchy())


def test_an_unpicklable_result_is_a_kernel_error_with_its_repr():
    for value in ((item for item in ()), [threading.Lock()]):
        with pytest.raises(KernelError) as caught:
            codec.dumps_result(value)
        assert repr(value)[:60] in str(caught.value)
        assert "return arrays, numbers" in caught.value.hint


def test_a_result_whose_repr_fails_is_still_described():
    class Sly:
        def __repr__(self):
            raise ValueError("no repr")

        def __reduce__(self):
            raise TypeError("no pickle")

    with pytest.raises(KernelError, match="Sly, whose repr raised ValueError.*no pickle"):
        codec.dumps_result(Sly())


# --- errors -------------------------------------------------------------------------

class Custom(Exception):
    def __init__(self, code, detail):
        super().__init__(code, detail)
        self.code = code
        self.detail = detail


class Forgetful(Exception):
    """Can't be rebuilt from its args."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def raised(make) -> BaseException:
    try:
        raise make()
    except BaseException as error:
        return error


def test_a_future_gets_the_users_own_exception_with_the_remote_traceback_as_its_cause():
    error = codec.error_for_future(codec.dumps_error(raised(lambda: Custom(5, "no good"))))
    assert type(error) is Custom and (error.code, error.detail) == (5, "no good")
    assert isinstance(error.__cause__, codec.RemoteTraceback)
    assert "in raised" in str(error.__cause__) and "Custom: (5, 'no good')" in str(error.__cause__)
    shown = "".join(traceback.format_exception(error))
    assert shown.index("in raised") < shown.index("direct cause") < shown.rindex("Custom")


def test_notes_chains_and_groups_are_told():
    def fail():
        try:
            try:
                raise KeyError("inner")
            except KeyError as inner:
                raise ValueError("outer") from inner
        except ValueError as error:
            error.add_note("look here")
            raise
    try:
        fail()
    except ValueError as error:
        got = codec.error_for_future(codec.dumps_error(error))
    assert got.__notes__ == ["look here"]
    assert "KeyError: 'inner'" in str(got.__cause__) and "look here" in str(got.__cause__)
    group = codec.loads_error(codec.dumps_error(ExceptionGroup("two", [ValueError(1), KeyError(2)])))
    assert isinstance(group, ExceptionGroup) and len(group.exceptions) == 2


@pytest.mark.parametrize("make", [
    lambda: Forgetful(1, 2),
    lambda: Custom(threading.Lock(), "unpicklable"),
    lambda: Custom(Touchy(), "does not unpickle"),
    lambda: ValueError("x" * 2_000_000),
], ids=["args", "unpicklable", "not rebuilt", "too long"])
def test_an_exception_that_does_not_survive_arrives_as_a_kernel_error_with_its_text(make):
    error = raised(make)
    data = codec.dumps_error(error)
    assert len(data) < 15_000
    got = codec.error_for_future(data)
    assert type(got) is KernelError
    assert type(error).__name__ in str(got)
    assert "in raised" in str(got.__cause__)


def test_describing_an_error_never_fails():
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError("no str")

        __repr__ = __str__

        def __reduce__(self):
            raise RuntimeError("no pickle")

    got = codec.error_for_future(codec.dumps_error(raised(Broken)))
    assert isinstance(got, KernelError) and "Broken" in str(got)

    def deep(n):
        return deep(n + 1)
    try:
        deep(0)
    except RecursionError as error:
        got = codec.error_for_future(codec.dumps_error(error))
    assert isinstance(got, RecursionError)
    surrogate = codec.error_for_future(codec.dumps_error(raised(lambda: ValueError("\udcff"))))
    assert isinstance(surrogate, ValueError)


@pytest.mark.parametrize(("leave", "says"), [
    (SystemExit, "sys.exit("), (lambda: SystemExit("bye"), "sys.exit('bye')"), (KeyboardInterrupt, "KeyboardInterrupt"),
    (GeneratorExit, "GeneratorExit"),
])
def test_leaving_from_a_kernel_is_a_kernel_error_that_says_so(leave, says):
    data = codec.dumps_error(raised(leave))
    for error in (codec.error_for_future(data), codec.error_for_invoke(data)):
        assert type(error) is KernelError and says in str(error)
        assert "in raised" in str(error.__cause__)


def test_invoke_gets_a_kernel_error_caused_by_the_remote_exception():
    data = codec.dumps_error(raised(lambda: Custom(5, "no good")))
    error = codec.error_for_invoke(data, "double")
    assert type(error) is KernelError and "double" in str(error) and "(5, 'no good')" in str(error)
    assert type(error.__cause__) is Custom
    assert isinstance(error.__cause__.__cause__, codec.RemoteTraceback)
    # what is a KernelError already is not wrapped once more
    told = codec.error_for_invoke(codec.dumps_error(raised(lambda: KernelError("wrong shape"))), "double")
    assert str(told) == "wrong shape" and isinstance(told.__cause__, codec.RemoteTraceback)


def test_text_of_the_data_plane_is_a_kernel_error():
    assert str(codec.error_for_invoke(b"the kernel returned -5")) == "the kernel returned -5"
    assert str(codec.error_for_invoke(b"the kernel returned -5", "echo")) == "kernel echo: the kernel returned -5"
    assert type(codec.error_for_future(b"")) is KernelError


@pytest.mark.parametrize("keep", [0, 3, 20, 60, 200, 600])
def test_an_error_cut_off_anywhere_is_still_an_error(keep):
    data = codec.dumps_error(raised(lambda: Custom(5, "no good")))
    assert isinstance(codec.loads_error(data[:keep]), Exception)


def test_binding_errors_are_bad_kernels():
    changed = codec.error_for_bind(codec.dumps_error(raised(lambda: KernelChanged("edited"))))
    assert type(changed) is KernelChanged and isinstance(changed.__cause__, codec.RemoteTraceback)
    missing = codec.error_for_bind(codec.dumps_error(raised(lambda: ModuleNotFoundError("no m"))), "m.f")
    assert type(missing) is BadKernel and "m.f" in str(missing) and "no m" in str(missing)
    nested = codec.error_for_bind(codec.dumps_error(raised(lambda: NestedError("MPI"))))
    assert type(nested) is BadKernel and type(nested.__cause__) is NestedError


def test_remote_tracebacks_can_be_pickled():
    again = pickle.loads(pickle.dumps(codec.RemoteTraceback("text")))
    assert str(again) == str(codec.RemoteTraceback("text"))


# --- bindings -------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype([("a", "i1"), ("b", "f8", (2,))], align=True)], ids=str)
def test_a_binding_survives_with_every_dtype(dtype):
    array = np.zeros((2, 3), dtype)
    binding = codec.decode_binding(codec.encode_binding([array, array[0, 0:0]], [array]))
    assert [arg.shape for arg in binding.inputs] == [(2, 3), (0,)]
    for arg in (*binding.inputs, *binding.outputs):
        found = codec.dtype_of(arg.dtype)
        assert found == array.dtype and found.itemsize == array.dtype.itemsize


def test_arrays_of_objects_are_refused_by_name():
    with pytest.raises(InvalidBuffer, match="Python objects"):
        codec.encode_binding([np.array([{}, None])], [])


def test_a_damaged_binding_is_a_bad_kernel():
    with pytest.raises(BadKernel, match="damaged"):
        codec.decode_binding(b'{"no": 1}')

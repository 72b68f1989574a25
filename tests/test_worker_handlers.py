"""What a worker's Python side does with kernels: first alone, then in a real worker."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import rfaas_mpi
from rfaas_mpi import Executor, codec, kernels
from rfaas_mpi.errors import BadKernel, KernelChanged, KernelError, KernelTimeout, NestedError
from rfaas_mpi.kernels import Kernel, kernel, object_kernel
from rfaas_mpi.worker.handlers import Handlers

LIBRARY = Path(rfaas_mpi.__file__).parent / "_native_kernels.so"


@pytest.fixture
def handlers():
    return Handlers(lambda: False)


def load(handlers: Handlers, made: Kernel):
    return handlers.load_kernel(made.kind, made.digest, memoryview(made.blob))


def bind(handlers: Handlers, made: Kernel, inputs, outputs):
    """A thunk on copies of the arrays, and the copies of the outputs."""
    bound = handlers.bind(load(handlers, made), made.meta(inputs, outputs), len(inputs), len(outputs))
    memory = [bytearray(array.tobytes()) for array in (*inputs, *outputs)]
    ins = tuple(memoryview(piece) for piece in memory[:len(inputs)])
    outs = tuple(memoryview(piece) for piece in memory[len(inputs):])
    arrays = [np.ndarray(array.shape, array.dtype, piece) for array, piece in zip(outputs, outs, strict=True)]
    return bound.views(ins, outs), arrays


# --- alone ----------------------------------------------------------------------------------

def test_a_bound_python_kernel_writes_into_the_memory_it_was_given(handlers):
    thunk, (out,) = bind(handlers, kernel(lambda x, y: x + y), (np.arange(3.0), np.array(2.0)), (np.zeros(3),))
    assert thunk() is None
    assert out.tolist() == [2, 3, 4]

    def both(x, out):
        out[0][...] = x[::-1]
        out[1][...] = x.sum()
    thunk, (first, second) = bind(handlers, kernel(both), (np.arange(4),), (np.zeros(4, int), np.zeros((), int)))
    thunk()
    assert first.tolist() == [3, 2, 1, 0] and second == 6


@pytest.mark.parametrize("dtype", ["?", "f2", ">i4", "c16", "S3", "M8[s]", [("a", "u1"), ("b", "f8")]], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_every_dtype_and_shape_reaches_a_kernel(handlers, dtype, shape):
    x = np.frombuffer(bytes(range(1, 241)), np.uint8)[:int(np.prod(shape)) * np.dtype(dtype).itemsize]
    x = (x & 1).view(dtype).reshape(shape)
    thunk, (out,) = bind(handlers, kernel(lambda a: a), (x,), (np.zeros(shape, dtype),))
    thunk()
    assert out.tobytes() == x.tobytes()


def test_inputs_can_not_be_written_even_where_their_memory_could(handlers):
    def spoil(x):
        x[...] = 9
    thunk, _ = bind(handlers, kernel(spoil), (np.zeros(3),), ())
    with pytest.raises(ValueError, match="read-only"):
        thunk()


def test_what_was_announced_must_be_what_came(handlers):
    made = kernel(lambda x: x)
    with pytest.raises(BadKernel, match="digest"):
        handlers.load_kernel(made.kind, bytes(32), memoryview(made.blob))
    with pytest.raises(BadKernel, match="of kind 1 was announced as one of kind 5"):
        handlers.load_kernel(kernels.KIND_OBJECT, made.digest, memoryview(made.blob))
    x = np.zeros(1)
    with pytest.raises(BadKernel, match="2 inputs and 1 outputs were announced, and 1 and 1 described"):
        handlers.bind(load(handlers, made), made.meta((x,), (x,)), 2, 1)


def test_native_kernels_bind_to_an_address(handlers):
    scale = load(handlers, Kernel.from_library(LIBRARY, "rfm_scale2"))
    again = load(handlers, Kernel.from_library(LIBRARY, "rfm_scale2"))
    assert handlers.bind(scale, b"", 1, 1) == handlers.bind(again, b"", 1, 1) > 0
    plain = load(handlers, Kernel.from_library(LIBRARY, "rfm_plain_echo", abi="plain"))
    assert isinstance(handlers.bind(plain, b"", 1, 1), int)
    with pytest.raises(BadKernel, match="one input and one output"):
        handlers.bind(plain, b"", 2, 1)


def test_objects_are_called_with_what_was_sent(handlers):
    function = load(handlers, object_kernel(lambda a, *, b: {"sum": a + b}))
    parts, refs = codec.dumps_call((np.arange(1000.0),), {"b": 2})
    found = codec.loads_result([memoryview(bytearray(part)) for part in handlers.run_object(
        function, [memoryview(bytearray(part)) for part in parts], refs)])
    np.testing.assert_array_equal(found["sum"], np.arange(1000.0) + 2)


def test_a_kernels_own_traceback_starts_with_the_kernel(handlers):
    def fails(x):
        raise ValueError("no good")
    thunk, _ = bind(handlers, kernel(fails), (np.zeros(1),), (np.zeros(1),))
    with pytest.raises(ValueError) as caught:
        thunk()
    error = caught.value
    error.__traceback__ = error.__traceback__.tb_next      # this test's own frame
    text = str(codec.error_for_future(handlers.format_error(error)).__cause__)
    assert text.count("File ") == 1 and "in fails" in text


# --- in a worker ---------------------------------------------------------------------------------

@pytest.fixture
def ex():
    with Executor(workers=1) as executor:
        yield executor


def test_each_form_of_kernel_runs_in_a_worker(ex):
    x, out = np.arange(5.0), np.zeros(5)
    for made in (kernel(lambda a: 2 * a), kernel(np.add), Kernel.from_library(LIBRARY, "rfm_scale2")):
        inputs = (x, x) if made.fn is np.add else x
        out[:] = 0
        ex.Invoke(made, inputs, out)
        np.testing.assert_array_equal(out, 2 * x)
    raw = np.zeros(40, np.uint8)
    ex.Invoke(Kernel.from_library(LIBRARY, "rfm_plain_echo", abi="plain"), x.view(np.uint8), raw)
    assert raw.tobytes() == x.tobytes()


def test_a_numba_kernel_runs_in_a_worker(ex):
    numba = pytest.importorskip("numba")

    def triple(x, size, out):
        for i in range(size // 8):
            out[i] = 3 * x[i]
        return size
    made = kernel(numba.cfunc("uint32(CPointer(float64), uint32, CPointer(float64))")(triple))
    assert ex.Invoke(made, np.arange(4.0), np.zeros(4)).tolist() == [0, 3, 6, 9]


def test_what_a_kernel_writes_warns_or_logs_reaches_the_rank(stderr_kept, wait_until):
    def talks(x):
        import ctypes
        import logging
        import os
        import warnings
        print("printed", x[0])
        print("to stderr", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        logging.getLogger("k").warning("logged")
        ctypes.CDLL(None).puts(b"from C")
        os.write(1, b"raw\n")
        print("no end of line", end="")
        return x
    with stderr_kept() as said, Executor(workers=1) as ex:
        ex.Invoke(kernel(talks), np.ones(1), np.zeros(1))
        for words in ("printed 1.0", "to stderr", "UserWarning: warned", "logged", "from C", "raw", "no end of line"):
            wait_until(lambda words=words: words in said(), words)
        ex.shutdown()
        for line in said().splitlines():
            assert line.startswith("[rfaas worker"), line


def test_a_crash_names_the_python_line_and_keeps_what_was_printed(ex):
    def crashes(x):
        import ctypes
        print("about to crash")
        ctypes.string_at(0)
    with pytest.raises(KernelError) as caught:
        ex.Invoke(kernel(crashes), np.ones(1), np.zeros(1))
    lines = "\n".join(caught.value.last_lines)
    assert caught.value.signal == 11
    assert "about to crash" in lines and "in crashes" in lines


@pytest.mark.parametrize(("leave", "says"), [
    ("raise SystemExit(3)", r"sys.exit\(3\)"), ("raise KeyboardInterrupt", "KeyboardInterrupt")])
def test_leaving_a_kernel_fails_its_invocation_and_not_its_worker(ex, leave, says):
    scope = {"__name__": "__main__"}
    exec(f"def leaves(*_):\n    {leave}\n", scope)
    ex.submit(int).result()
    before = ex.workers
    with pytest.raises(KernelError, match=says):
        ex.submit(scope["leaves"]).result()
    with pytest.raises(KernelError, match=says):
        ex.Invoke(kernel(scope["leaves"]), np.ones(1), np.zeros(1))
    assert ex.submit(int, "3").result() == 3
    assert ex.workers == before


def test_an_exception_class_of_main_arrives_as_itself(ex):
    scope = {"__name__": "__main__"}
    exec("class Mine(Exception):\n    pass\ndef f():\n    raise Mine('own')\n", scope)
    error = ex.submit(scope["f"]).exception()
    assert type(error) is scope["Mine"] and error.args == ("own",)
    assert "in f" in str(error.__cause__)


def test_an_exception_larger_than_a_slot_arrives_whole(ex):
    def fails():
        raise ValueError("x" * 100_000)
    error = ex.submit(fails).exception()
    assert type(error) is ValueError and len(str(error)) == 100_000


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A kernel in a module beside the script, and the module's file."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"beside_{tmp_path.name}"
    file = tmp_path / f"{name}.py"
    file.write_text("from rfaas_mpi import kernel\n@kernel\ndef f(x):\n    return x * 2\n")
    importlib.invalidate_caches()
    yield importlib.import_module(name).f, file
    sys.modules.pop(name, None)


def test_a_new_worker_refuses_a_module_that_was_edited_since(edited):
    made, file = edited
    out = np.zeros(2)
    with Executor(workers=1) as ex:
        assert ex.Invoke(made, np.ones(2), out).tolist() == [2, 2]
        file.write_text(file.read_text().replace("* 2", "* 3"))
        assert ex.Invoke(made, np.ones(2), out).tolist() == [2, 2], "a worker that has it goes on"
    with Executor(workers=1) as ex:
        with pytest.raises(KernelChanged, match=f"{file}.*edited.*start the program again"):
            ex.Invoke(made, np.ones(2), out)
        with pytest.raises(KernelChanged, match="edited"):
            ex.submit(made, 1).result()
        assert ex.submit(int, "3").result() == 3


def test_a_kernel_that_can_not_be_loaded_says_why_each_time(ex, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "only_here.py").write_text(
        "import os\nif 'RFAAS_INSIDE_WORKER' in os.environ:\n    raise OSError('not in a worker')\n"
        "def f(x):\n    return x\n")
    importlib.invalidate_caches()
    only_here = importlib.import_module("only_here")
    for _ in range(2):
        with pytest.raises(BadKernel, match=r"only_here\.f can't be imported in a worker: OSError: not in a worker"):
            ex.submit(only_here.f, 1).result()
    sys.modules.pop("only_here")


def test_an_executor_inside_a_kernel_is_a_clear_error(ex):
    def nests():
        return rfaas_mpi.Executor()
    with pytest.raises(NestedError, match="inside a kernel"):
        ex.submit(nests).result()


def test_mpi_inside_a_kernel_is_a_clear_error(ex):
    pytest.importorskip("mpi4py")

    def communicates():
        from mpi4py import MPI
        return MPI.COMM_WORLD.Get_rank()
    with pytest.raises(NestedError, match="MPI.COMM_WORLD"):
        ex.submit(communicates).result()


@pytest.mark.parametrize(("symbol", "abi", "says", "facts"), [
    ("rfm_bad_negative", "rfm", "returned -1", {"signal": 0}),
    ("rfm_bad_segfault", "rfm", "SIGSEGV", {"signal": 11}),
    ("rfm_bad_abort", "rfm", "SIGABRT", {"signal": 6}),
    ("rfm_bad_exit", "rfm", "7", {"exit_code": 7}),
    ("rfm_bad_quick_exit", "rfm", "8", {"exit_code": 8}),
    ("rfm_bad_overrun", "rfm", "past the end of output 0", {"signal": 0}),
    ("rfm_bad_length", "rfm", "33 bytes to output 0, which holds 32", {"signal": 0}),
    ("rfm_bad_plain_length", "plain", "4294967295 bytes to output 0, which holds 32", {"signal": 0}),
])
def test_a_native_kernel_that_misbehaves_fails_alone_and_says_how(ex, symbol, abi, says, facts):
    x = np.zeros(4)
    for out in (np.zeros(4), ex.empty(4)):
        with pytest.raises(KernelError, match=says) as caught:
            ex.Invoke(Kernel.from_library(LIBRARY, symbol, abi=abi), x, out)
        for name, value in facts.items():
            assert getattr(caught.value, name) == value
        assert ex.Invoke(Kernel.from_library(LIBRARY, "rfm_scale2"), np.ones(4), out).tolist() == [2] * 4


def test_a_native_kernel_that_loops_is_stopped_at_its_time_limit(ex):
    with pytest.raises(KernelTimeout):
        ex.Invoke(Kernel.from_library(LIBRARY, "rfm_bad_loop"), np.zeros(1), np.zeros(1), timeout_s=0.3)
    assert ex.submit(int, "3").result() == 3

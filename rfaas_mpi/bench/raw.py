"""Two bare processes and nothing of the product between them: csrc/bench.c, through ctypes."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Self

from rfaas_mpi.errors import ClosedError, RFaaSError

MAILBOX, DOUBLE, FUTEX = 1, 2, 3  # enum rfm_bench_mode

LIBRARY = Path(__file__).with_name("_bench.so")


class BenchError(RFaaSError):
    """The bare processes could not be started, or one of them ended."""


@cache
def library() -> ctypes.CDLL:
    """The library of the baselines; BenchError where it was not built."""
    try:
        lib = ctypes.CDLL(os.fspath(LIBRARY), use_errno=True)
    except OSError as error:
        raise BenchError(f"the library of the baselines can't be loaded: {error}",
                         hint="build the package again with `pip install .`") from error
    partner, i64, u64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
    for name, result, arguments in (
        ("rfm_bench_open", ctypes.c_int, [u64, ctypes.c_int, ctypes.POINTER(partner)]),
        ("rfm_bench_close", None, [partner]),
        ("rfm_bench_pid", ctypes.c_int, [partner]),
        ("rfm_bench_x", partner, [partner]),
        ("rfm_bench_y", partner, [partner, u64]),
        ("rfm_bench_arm", ctypes.c_int, [partner, ctypes.c_int, u64, u64]),
        ("rfm_bench_call", i64, [partner]),
        ("rfm_bench_calls", i64, [partner, u64, ctypes.POINTER(i64)]),
        ("rfm_bench_copied_calls", i64, [partner, ctypes.c_void_p, ctypes.c_void_p, u64, ctypes.POINTER(i64)]),
        ("rfm_bench_local", ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, u64]),
        ("rfm_bench_busy", None, [i64]),
        ("rfm_bench_clock_ns", i64, []),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def check(value: int) -> int:
    if value >= 0:
        return value
    match value:
        case -1:
            raise ValueError("the bare partner was asked for something out of range")
        case -2:
            code = ctypes.get_errno()
            raise BenchError(f"the bare partner could not be started: {os.strerror(code)}")
        case -3:
            raise BenchError("the bare partner has ended", hint="run the benchmark again")
        case _:
            raise BenchError("the bare partner answered something else than what it was sent")


class Partner:
    """A bare process on a core of its own that answers calls through shared memory.

    It sleeps in the kernel except between `arm` and the last armed call. It ends with close() or with this process.
    """

    def __init__(self, *, data_bytes: int = 0, cpu: int = -1) -> None:
        self._lib = library()
        self._ptr: ctypes.c_void_p | None = None
        self.data_bytes = data_bytes
        pointer = ctypes.c_void_p()
        check(self._lib.rfm_bench_open(data_bytes, cpu, ctypes.byref(pointer)))
        self._ptr = pointer

    def _live(self) -> ctypes.c_void_p:
        if self._ptr is None:
            raise ClosedError("the bare partner was used after close()")
        return self._ptr

    @property
    def pid(self) -> int:
        return self._lib.rfm_bench_pid(self._live())

    def buffers(self, size_bytes: int) -> tuple[memoryview, memoryview]:
        """x and y of that size, shared with the partner, writable bytes; not to be used after close().

        ValueError if there is less room than that.
        """
        pointer = self._live()
        if not 0 < size_bytes <= self.data_bytes:
            raise ValueError(f"{size_bytes} bytes, and room for {self.data_bytes}")
        kind = ctypes.c_char * size_bytes
        return (memoryview(kind.from_address(self._lib.rfm_bench_x(pointer))).cast("B"),
                memoryview(kind.from_address(self._lib.rfm_bench_y(pointer, size_bytes))).cast("B"))

    def arm(self, mode: int, count: int, size_bytes: int = 0) -> None:
        """Wakes the partner for the next `count` calls; ValueError while calls are still armed."""
        check(self._lib.rfm_bench_arm(self._live(), mode, count, size_bytes))

    def call(self) -> int:
        """One armed call; ns from the first store to the answer seen."""
        return check(self._lib.rfm_bench_call(self._live()))

    def calls(self, count: int) -> int:
        """`count` armed calls from a C loop; ns of all of them."""
        return check(self._lib.rfm_bench_calls(self._live(), count, None))

    def samples(self, count: int) -> list[int]:
        """`count` armed calls from a C loop; ns of each."""
        values = (ctypes.c_int64 * count)()
        check(self._lib.rfm_bench_calls(self._live(), count, values))
        return list(values)

    def copied(self, x: int, y: int, count: int = 1) -> list[int]:
        """`count` armed calls that begin with a copy of x to the partner's and end with one of y back; ns of each.

        x and y are the addresses of as many bytes as were armed.
        """
        values = (ctypes.c_int64 * count)()
        check(self._lib.rfm_bench_copied_calls(self._live(), x, y, count, values))
        return list(values)

    def close(self) -> None:
        """Ends the partner. Safe to call twice."""
        if self._ptr is not None:
            self._lib.rfm_bench_close(self._ptr)
            self._ptr = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def busy(ns: int) -> None:
    """Computes for `ns` without a system call, as a rank does between two invocations."""
    library().rfm_bench_busy(ns)


def clock_ns() -> int:
    """What reading the clock twice costs: part of every figure of single invocations."""
    return library().rfm_bench_clock_ns()

"""Two bare processes that send each other what the product's would: through a socket (csrc/bench_net.c) or a queue pair
(csrc/verbs/bench/pair.c), both through ctypes."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from rfaas_mpi.bench import raw
from rfaas_mpi.bench.raw import BenchError
from rfaas_mpi.errors import ClosedError


class _Order(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint64), ("up", ctypes.c_uint64), ("down", ctypes.c_uint64),
                ("burst", ctypes.c_uint32), ("places", ctypes.c_uint32), ("sleep", ctypes.c_uint32),
                ("reserved", ctypes.c_uint32)]


def _declare(lib: ctypes.CDLL, prefix: str, *open_arguments: Any) -> None:
    pair, i64, u64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
    for name, result, arguments in (
        ("open", ctypes.c_int, [*open_arguments, u64, ctypes.c_int, ctypes.POINTER(pair)]),
        ("close", None, [pair]),
        ("pid", ctypes.c_int, [pair]),
        ("arm", ctypes.c_int, [pair, ctypes.POINTER(_Order)]),
        ("calls", i64, [pair, u64, ctypes.POINTER(i64)]),
    ):
        function = getattr(lib, f"{prefix}_{name}")
        function.restype, function.argtypes = result, arguments


@cache
def _library() -> ctypes.CDLL:
    lib = raw.library()
    _declare(lib, "rfm_net")
    return lib


# What is compared with verbs, built where its headers are; the other one is the same over a device that is none.
VERBS_LIBRARY = raw.LIBRARY.with_name("_verbs_bench.so")
NULL_LIBRARY = raw.LIBRARY.with_name("_verbs_null.so")


@cache
def verbs_library(path: Path = VERBS_LIBRARY) -> ctypes.CDLL:
    """The library of the bare verbs processes; BenchError where it was not built, or there is no libibverbs."""
    try:
        lib = ctypes.CDLL(os.fspath(path), use_errno=True)
    except OSError as error:
        raise BenchError(f"what verbs is compared with can't be loaded: {error}",
                         hint="install libibverbs and its headers (Debian: libibverbs-dev) and build the package again"
                         ) from error
    _declare(lib, "rfm_pair", ctypes.c_char_p)
    lib.rfm_pair_why.restype, lib.rfm_pair_why.argtypes = ctypes.c_char_p, []
    return lib


@dataclass(frozen=True)
class Exchange:
    """What one bare call is: `burst` messages of `up` bytes of data to the partner, each answered with `down`.

    Data lies in `places` places in turn, each way. `sleep`: both sides sleep in the socket instead of spinning on it.
    """

    up: int = 0
    down: int = 0
    burst: int = 1
    places: int = 1
    sleep: bool = False


class BarePair:
    """This process and a bare one, joined by a TCP connection through the loopback device.

    The other one sleeps in the kernel except between `arm` and the last armed call. It ends with close() or with this
    process. BenchError where it can't be started, or has ended.
    """

    def __init__(self, *, data_bytes: int = 0, cpu: int = -1) -> None:
        self._ptr: ctypes.c_void_p | None = None
        self._ptr = self._open(data_bytes, cpu)

    def _open(self, data_bytes: int, cpu: int) -> ctypes.c_void_p:
        lib = _library()
        self._use(lib, "rfm_net")
        pointer = ctypes.c_void_p()
        raw.check(lib.rfm_net_open(data_bytes, cpu, ctypes.byref(pointer)))
        return pointer

    def _use(self, lib: ctypes.CDLL, prefix: str) -> None:
        self._close_c, self._pid, self._arm, self._calls = (
            getattr(lib, f"{prefix}_{name}") for name in ("close", "pid", "arm", "calls"))

    def _live(self) -> ctypes.c_void_p:
        if self._ptr is None:
            raise ClosedError("the bare processes were used after close()")
        return self._ptr

    @property
    def pid(self) -> int:
        return self._pid(self._live())

    def arm(self, exchange: Exchange, count: int) -> None:
        """Wakes the partner for the next `count` calls; ValueError while calls are still armed."""
        order = _Order(count=count, up=exchange.up, down=exchange.down, burst=exchange.burst, places=exchange.places,
                       sleep=int(exchange.sleep))
        raw.check(self._arm(self._live(), ctypes.byref(order)))

    def calls(self, count: int) -> int:
        """`count` armed calls from a C loop; ns of all of them."""
        return raw.check(self._calls(self._live(), count, None))

    def samples(self, count: int) -> list[int]:
        """`count` armed calls from a C loop; ns of each."""
        values = (ctypes.c_int64 * count)()
        raw.check(self._calls(self._live(), count, values))
        return list(values)

    def close(self) -> None:
        """Ends the partner. Safe to call twice."""
        if self._ptr is not None:
            self._close_c(self._ptr)
            self._ptr = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class VerbsPair(BarePair):
    """The same, joined by a queue pair, through one RDMA device; each of the two opens it for itself.

    `device` as in the settings. BenchError also where there is no device, or no library of libibverbs.
    """

    def __init__(self, *, device: str = "", data_bytes: int = 0, cpu: int = -1, library: Path = VERBS_LIBRARY) -> None:
        self._device, self._library = device, library
        super().__init__(data_bytes=data_bytes, cpu=cpu)

    def _open(self, data_bytes: int, cpu: int) -> ctypes.c_void_p:
        lib = verbs_library(self._library)
        self._use(lib, "rfm_pair")
        pointer = ctypes.c_void_p()
        status = lib.rfm_pair_open(self._device.encode(), data_bytes, cpu, ctypes.byref(pointer))
        if status < 0 and (why := lib.rfm_pair_why()):
            raise BenchError(f"the bare processes can't be joined by a queue pair: {why.decode(errors='replace')}",
                             hint="`rfaas doctor` says what verbs needs")
        raw.check(status)
        return pointer

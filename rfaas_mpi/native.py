"""Native kernels as bytes: what a shared library exports, how it is loaded, how its kernels are called here."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import struct
import weakref
from _ctypes import dlclose
from collections.abc import Callable, Sequence

import numpy as np

from rfaas_mpi.errors import BadKernel, KernelError

__all__ = ["ABIS", "Library", "NativeFunction", "check_symbol", "load", "read_library"]

ABIS = ("rfm", "plain")
"""`rfm`: `int32_t f(const struct rfm_call *)`; `plain`: `uint32_t f(void *in, uint32_t size, void *out)`."""

_MACHINES = {62: "x86_64", 183: "aarch64"}
_SYMBOL = struct.Struct("<IBBHQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_DYNSYM = 11
_FUNCTIONS = (2, 10)      # STT_FUNC, STT_GNU_IFUNC


# --- what a library exports -----------------------------------------------------

def _exported(data: bytes) -> list[str] | None:
    """Functions that an ELF library exports; None where its section table was stripped.

    Raises ValueError that says what the bytes are instead. Nothing of the
    library is run, which dlopen would do.
    """
    if data[:4] != b"\x7fELF" or len(data) < 64:
        raise ValueError("it is no ELF shared library")
    if data[4:6] != b"\x02\x01":
        raise ValueError("it is not a 64-bit little-endian library")
    kind, machine = struct.unpack_from("<HH", data, 16)
    if kind != 3:
        raise ValueError("it is an ELF file, but no shared library (build it with -shared -fPIC)")
    name = _MACHINES.get(machine, f"machine {machine}")
    if machine in _MACHINES and name != platform.machine():
        raise ValueError(f"it was built for {name}, this is {platform.machine()}")
    try:
        (table,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        sections = [_SECTION.unpack_from(data, table + index * size) for index in range(count)]
        for section in sections:
            if section[1] == _DYNSYM:
                start, length, link = section[4], section[5], section[6]
                names_at = sections[link][4]
                return [_text(data, names_at + name)
                        for name, info, _, index, _, _ in _SYMBOL.iter_unpack(data[start:start + length])
                        if index != 0 and info & 15 in _FUNCTIONS]
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise ValueError(f"its tables are damaged ({error})") from error
    return None


def _text(data: bytes, at: int) -> str:
    return data[at:data.index(b"\0", at)].decode()


def check_symbol(path: str, data: bytes, symbol: str) -> None:
    """BadKernel if the library's bytes are no library for this machine, or do not export `symbol`."""
    try:
        names = _exported(data)
    except ValueError as error:
        raise BadKernel(f"{path} can't be used as a library of kernels: {error}") from error
    if names is None or symbol in names:
        return
    mangled = [name for name in names if name.startswith("_Z") and f"{len(symbol)}{symbol}" in name]
    if mangled:
        hint = f'it exports the C++ function {mangled[0]}: declare it extern "C"'
    elif names:
        hint = f"it exports {', '.join(sorted(names)[:12])}{', …' if len(names) > 12 else ''}"
    else:
        hint = "it exports no function at all: don't declare the kernel static or hidden"
    raise BadKernel(f"{path} has no function {symbol}", hint=hint)


# --- loading --------------------------------------------------------------------

class Library:
    """A shared library loaded from its bytes, through memory that has no name in any file system.

    Owns it: `close()` unloads it, and so does the end of the last reference.
    """

    def __init__(self, data: bytes, name: str) -> None:
        fd = os.memfd_create(name[:200], os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(data)
            self._handle = ctypes.CDLL(f"/proc/self/fd/{fd}", mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            os.close(fd)
            raise BadKernel(f"{name} can't be loaded: {error}",
                            hint="the libraries that it needs must be found without $ORIGIN: link them "
                                 "statically or set LD_LIBRARY_PATH") from error
        # The descriptor stays open as long as the library: the loader knows a
        # library by its path, and would take another one behind the same number
        # for this one.
        self.close = weakref.finalize(self, _unload, self._handle._handle, fd)
        self.close.atexit = False

    def address(self, symbol: str) -> int:
        """Where `symbol` lies; BadKernel if there is none."""
        try:
            found = ctypes.cast(self._handle[symbol], ctypes.c_void_p).value
        except AttributeError as error:
            raise BadKernel(f"the library has no function {symbol}: {error}") from error
        assert found is not None
        return found


def _unload(handle: int, fd: int) -> None:
    dlclose(handle)
    os.close(fd)


_libraries: weakref.WeakValueDictionary[bytes, Library] = weakref.WeakValueDictionary()


def load(data: bytes, name: str) -> Library:
    """The library with these bytes, loaded once however many kernels are in it."""
    key = hashlib.sha256(data).digest()
    found = _libraries.get(key)
    if found is None:
        found = _libraries[key] = Library(data, name)
    return found


# --- calling it here ------------------------------------------------------------

class _Buf(ctypes.Structure):
    _fields_ = [("ptr", ctypes.c_void_p), ("size", ctypes.c_uint64), ("capacity", ctypes.c_uint64)]


class _Call(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("n_in", ctypes.c_uint32), ("n_out", ctypes.c_uint32),
                ("n_const", ctypes.c_uint32), ("inputs", ctypes.POINTER(_Buf)), ("outputs", ctypes.POINTER(_Buf)),
                ("constants", ctypes.POINTER(_Buf)), ("scratch", ctypes.c_void_p), ("scratch_bytes", ctypes.c_uint64),
                ("invocation", ctypes.c_uint64)]


assert ctypes.sizeof(_Buf) == 24 and ctypes.sizeof(_Call) == 64, "as in rfm_call.h"

_RFM = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(_Call))
_PLAIN = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)


class NativeFunction:
    """The address of a native kernel, and what keeps it valid."""

    def __init__(self, address: int, abi: str, name: str, owner: object) -> None:
        self.address = address
        self.abi = abi
        self.name = name
        self._owner = owner

    def __call__(self, *inputs: object, out: np.ndarray | Sequence[np.ndarray]) -> object:
        """Runs it on arrays here, without the GIL, and returns `out`.

        Raises KernelError as a worker would; a crash is a crash of this process.
        """
        outputs = (out,) if isinstance(out, np.ndarray) else tuple(out)
        for index, array in enumerate(outputs):
            if not isinstance(array, np.ndarray) or not array.flags.c_contiguous or not array.flags.writeable:
                raise BadKernel(f"output {index} of kernel {self.name} is no writable contiguous array",
                                hint="pass out=numpy.empty(…)")
        self.bind([np.ascontiguousarray(value) for value in inputs], outputs)()
        return out

    def bind(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Callable[[], tuple[int, ...]]:
        """A function that runs it once on these contiguous arrays and returns the bytes of each output."""
        if self.abi == "plain":
            return self._bind_plain(inputs, outputs)
        function = _RFM(self.address)
        ins, outs = _bufs(inputs), _bufs(outputs)
        call = _Call(version=1, n_in=len(inputs), n_out=len(outputs), inputs=ins, outputs=outs)
        capacities = [array.nbytes for array in outputs]
        keep = (inputs, outputs)

        def run() -> tuple[int, ...]:
            assert keep
            for buf, capacity in zip(outs, capacities, strict=True):
                buf.size = capacity
            status = function(ctypes.byref(call))
            if status < 0:
                raise KernelError(f"kernel {self.name} returned {status}")
            sizes = tuple(buf.size for buf in outs)
            self._check(sizes, capacities)
            return sizes
        return run

    def _bind_plain(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Callable[[], tuple[int, ...]]:
        if len(inputs) != 1 or len(outputs) != 1:
            raise BadKernel(f"kernel {self.name} has the plain ABI, which takes one input and one output, "
                            f"not {len(inputs)} and {len(outputs)}", hint='write it for the "rfm" ABI')
        function = _PLAIN(self.address)
        given, out = inputs[0], outputs[0]

        def run() -> tuple[int, ...]:
            sizes = (function(given.ctypes.data, given.nbytes, out.ctypes.data),)
            self._check(sizes, [out.nbytes])
            return sizes
        return run

    def _check(self, sizes: Sequence[int], capacities: Sequence[int]) -> None:
        for index, (size, capacity) in enumerate(zip(sizes, capacities, strict=True)):
            if size > capacity:
                raise KernelError(f"kernel {self.name} says that it wrote {size} bytes to output {index}, "
                                  f"which holds {capacity}")


def _bufs(arrays: Sequence[np.ndarray]) -> ctypes.Array[_Buf]:
    return (_Buf * len(arrays))(*[_Buf(array.ctypes.data, array.nbytes, array.nbytes) for array in arrays])


def read_library(path: str) -> bytes:
    """The bytes of a library; BadKernel if they can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadKernel(f"the library {path} can't be read: {error.strerror or error}") from error

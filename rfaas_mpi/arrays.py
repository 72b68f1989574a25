"""Arrays as arguments: what may be one, arrays in the executor's memory, constants."""

from __future__ import annotations

import array
import hashlib
import itertools
import weakref
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from rfaas_mpi.errors import ClosedError, InvalidBuffer

__all__ = ["Constant", "Memory", "Spans", "arguments", "as_input", "as_inputs", "as_output", "as_outputs",
           "check_overlap", "with_values"]

Shape = int | Sequence[int]


class Allocator(Protocol):
    """The part of the fabric's Invoker that makes memory."""

    def alloc(self, nbytes: int, *, zero: bool = False) -> Any: ...


class Constant:
    """A read-only copy of an array that the executor's workers see without another copy.

    Made by `Executor.put`; used like an array, as an input of `Invoke` or
    anywhere in the arguments of `submit`. `array` raises ClosedError after
    `close()`, which frees the memory once no invocation uses it any more.
    """

    __slots__ = ("__weakref__", "_array", "dtype", "nbytes", "shape")

    def __init__(self, array: np.ndarray) -> None:
        array.flags.writeable = False
        self._array: np.ndarray | None = array
        self.dtype = array.dtype
        self.shape = array.shape
        self.nbytes = array.nbytes

    @property
    def array(self) -> np.ndarray:
        """The values, read-only."""
        if self._array is None:
            raise ClosedError("this constant was closed; make another with Executor.put")
        return self._array

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        values = self.array
        if dtype is not None and np.dtype(dtype) != values.dtype:
            if copy is False:
                raise ValueError(f"a constant of {values.dtype} is no {np.dtype(dtype)} without a copy")
            return values.astype(dtype)
        return values.copy() if copy else values

    def __len__(self) -> int:
        return len(self.array)

    def __repr__(self) -> str:
        state = "closed " if self._array is None else ""
        return f"<{state}Constant {self.dtype} {self.shape}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Whoever pickles a constant outside an executor gets the values.
        return _restore, (np.array(self.array),)

    def close(self) -> None:
        """Gives the memory back. Safe to call twice."""
        self._array = None


def with_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the arrays of its constants in their places."""
    for value in args:
        if type(value) is Constant:
            args = tuple([v.array if type(v) is Constant else v for v in args])
            break
    if kwargs:
        kwargs = {k: v.array if type(v) is Constant else v for k, v in kwargs.items()}
    return args, kwargs


def _restore(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values


class Memory:
    """Makes arrays in memory that the executor's workers share.

    Arrays live as long as anything refers to them, also after the executor has
    closed. `limit` bytes is what a worker was granted (0: no limit known).
    """

    def __init__(self, allocator: Allocator, limit: int = 0) -> None:
        self._allocator = allocator
        self.limit = limit
        # Constants by what they hold, for as long as somebody has one.
        self._constants: weakref.WeakValueDictionary[tuple[Any, ...], np.ndarray] = weakref.WeakValueDictionary()

    def empty(self, shape: Shape, dtype: DTypeLike = float, *, zero: bool = False) -> np.ndarray:
        """An uninitialised array.

        Raises InvalidBuffer for a dtype with Python objects and for more bytes
        than a worker was granted, MemoryError where the machine has no more.
        """
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise InvalidBuffer(f"an array of dtype {kind} holds Python objects, which can't be "
                                "shared with a worker; use a numeric dtype")
        if isinstance(shape, (int, np.integer)):
            shape = (int(shape),)
        dims = tuple(int(n) for n in shape)
        if any(n < 0 for n in dims):
            raise InvalidBuffer(f"shape {dims} has a negative dimension")
        nbytes = kind.itemsize
        for n in dims:
            nbytes *= n
        check_memory(nbytes, self.limit, f"an array of shape {dims} and dtype {kind}")
        block = self._allocator.alloc(nbytes, zero=zero)
        return np.ndarray(dims, kind, buffer=block)

    def put(self, values: ArrayLike) -> Constant:
        """A constant with these values, copied once; what has been put already and is still there isn't copied again.

        Raises InvalidBuffer as `empty` does.
        """
        source = np.asarray(values)
        copy = self.empty(source.shape, source.dtype)
        copy[...] = source
        # Of the copy: what the caller changes meanwhile is no matter then.
        key = copy.shape, copy.dtype, hashlib.sha256(copy.reshape(-1).view(np.uint8)).digest()
        known = self._constants.get(key)
        if known is not None:
            return Constant(known)
        self._constants[key] = copy
        # Workers on other nodes get it once; without workers there is nobody to tell.
        if hasattr(copy.base, "freeze"):
            copy.base.freeze()
        return Constant(copy)


def check_memory(nbytes: int, limit: int, what: str) -> None:
    """Raises InvalidBuffer where `nbytes` are more than the `limit` granted (0: no limit)."""
    if limit and nbytes > limit:
        raise InvalidBuffer(
            f"{what} needs {nbytes} bytes, but a worker was granted {limit}",
            hint="ask for more with Executor(memory_per_worker=...), or call with smaller pieces")


def as_inputs(given: Any, kernel: str) -> tuple[np.ndarray, ...]:
    """The inputs of an invocation, one or a tuple, as arrays; see `as_input`."""
    if type(given) is np.ndarray and given.flags.c_contiguous and not given.dtype.hasobject:
        return (given,)
    return tuple([value if type(value) is np.ndarray and value.flags.c_contiguous and not value.dtype.hasobject
                  else as_input(value, f"input {i} of {kernel}") for i, value in enumerate(arguments(given))])


def as_outputs(given: Any, kernel: str) -> tuple[np.ndarray, ...]:
    """The outputs of an invocation, one or a tuple, as arrays; see `as_output`."""
    return tuple([value if type(value) is np.ndarray and value.flags.carray and not value.dtype.hasobject
                  else as_output(value, f"output {i} of {kernel}") for i, value in enumerate(arguments(given))])


def as_input(value: Any, name: str = "the input") -> np.ndarray:
    """`value` as a C-contiguous array without a copy of an array's bytes.

    Accepts arrays, constants, anything with the buffer protocol, Python and
    numpy scalars. Raises InvalidBuffer that names the argument, what it is, and
    how to make it usable.
    """
    if type(value) is not np.ndarray:
        value = _convert(value, name)
    if value.dtype.hasobject:
        raise _holds_objects(value, name)
    if not value.flags.c_contiguous:
        raise _not_contiguous(value, name)
    return value


def as_output(value: Any, name: str = "out") -> np.ndarray:
    """`value` as a writable C-contiguous array over the caller's memory.

    Raises InvalidBuffer for everything that a result can't be written into.
    """
    if type(value) is not np.ndarray:
        if isinstance(value, Constant):
            raise InvalidBuffer(f"{name} is a constant made by put, which is read-only; "
                                "use an array, such as ex.empty(shape, dtype)")
        if value is None or isinstance(value, (bool, int, float, complex, str, np.generic)):
            raise InvalidBuffer(f"{name} is {value!r:.60}; a result needs a writable array, such as "
                                "ex.empty(shape, dtype)")
        value = _convert(value, name)
    if value.dtype.hasobject:
        raise _holds_objects(value, name)
    if not value.flags.c_contiguous:
        raise _not_contiguous(value, name, output=True)
    if not value.flags.writeable:
        raise InvalidBuffer(f"{name} is read-only (dtype {value.dtype}, shape {value.shape}); "
                            "a result needs a writable array, such as x.copy()")
    return value


def _holds_objects(value: np.ndarray, name: str) -> InvalidBuffer:
    return InvalidBuffer(f"{name} has dtype {value.dtype}, which holds Python objects; use a numeric "
                         "dtype (x.astype(float)), or send objects with submit")


def _not_contiguous(value: np.ndarray, name: str, *, output: bool = False) -> InvalidBuffer:
    what = f"{name} is not C-contiguous (shape {value.shape}, strides {value.strides})"
    if output:
        return InvalidBuffer(f"{what}; use a contiguous array as output and copy from it afterwards")
    return InvalidBuffer(f"{what}; use np.ascontiguousarray(x)")


def _convert(value: Any, name: str) -> np.ndarray:
    match value:
        case np.ma.MaskedArray():
            raise InvalidBuffer(f"{name} is a masked array and its mask would be lost; "
                                "use x.filled(value)")
        case np.ndarray():
            return value.view(np.ndarray)
        case Constant():
            return value.array
        case bytes() | bytearray():
            return np.frombuffer(value, np.uint8)
        case memoryview() | array.array():
            return _from_buffer(value, name)
        case bool() | int() | float() | complex() | np.generic():
            number = np.asarray(value)
            if number.dtype.hasobject:
                raise InvalidBuffer(f"{name} is {value!r:.40}, which does not fit 64 bits; send it with submit")
            return number
        case list():
            return _from_spec(value, name)
        case str():
            raise InvalidBuffer(f"{name} is a str; send text as bytes (x.encode()), or with submit")
    if hasattr(value, "__cuda_array_interface__"):
        raise InvalidBuffer(f"{name} is in a GPU's memory ({type(value).__name__}); copy it to the "
                            "host first, such as with cupy.asnumpy(x) or x.cpu()")
    if hasattr(value, "__array_interface__") or hasattr(value, "__array__"):
        found = np.asarray(value)
        if isinstance(found, np.ndarray):
            return found
    return _from_buffer(value, name)


def _from_buffer(value: Any, name: str) -> np.ndarray:
    try:
        view = memoryview(value)
    except TypeError:
        raise InvalidBuffer(f"{name} is a {type(value).__name__}, not an array or buffer; use "
                            "np.asarray(x), or send objects with submit") from None
    except ValueError as error:
        raise InvalidBuffer(f"{name} can't be read: {error}") from None
    return np.asarray(view)


def _from_spec(spec: list[Any], name: str) -> np.ndarray:
    """mpi4py's [buffer, count, datatype], each but the first optional."""
    needed = "[buffer, count, datatype], or a tuple of arrays"
    if not spec or len(spec) > 3:
        raise InvalidBuffer(f"{name} is a list of {len(spec)}; give {needed}")
    base = spec[0]
    if isinstance(base, (int, float, complex, str, list)) or base is None:
        raise InvalidBuffer(f"{name} is a list; give np.asarray(x), {needed}")
    values = _convert(base, name) if type(base) is not np.ndarray else base
    if not values.flags.c_contiguous:
        raise _not_contiguous(values, name)
    count: int | None = None
    start = 0
    for part in spec[1:]:
        match part:
            case bool():
                raise InvalidBuffer(f"{name} has {part!r} as its count; give {needed}")
            case int() | np.integer():
                count = int(part)
            case (int() | np.integer(), int() | np.integer()):
                count, start = int(part[0]), int(part[1])
            case None:
                pass
            case _:
                values = _viewed(values, part, name)
    if count is None:
        return values if len(spec) < 2 or start == 0 else values[start:]
    flat = values.reshape(-1)
    if count < 0 or start < 0 or start + count > flat.size:
        raise InvalidBuffer(f"{name} has {flat.size} elements of {flat.dtype}, but the list asks "
                            f"for {count} from element {start}")
    return flat[start:start + count]


def _viewed(values: np.ndarray, datatype: Any, name: str) -> np.ndarray:
    """The same bytes as elements of an mpi4py datatype or a type code, seen from outside mpi4py."""
    code = getattr(datatype, "typestr", None) or getattr(datatype, "typechar", None) or datatype
    try:
        dtype = np.dtype(code)
    except TypeError:
        raise InvalidBuffer(f"{name} has {datatype!r} as its datatype; give a numpy dtype, its code, or "
                            "a basic MPI datatype") from None
    if dtype.hasobject or not dtype.itemsize or values.nbytes % dtype.itemsize:
        raise InvalidBuffer(f"{name} has {values.nbytes} bytes, which are no whole number of elements of "
                            f"the datatype {dtype}")
    return values.reshape(-1).view(dtype)


def arguments(value: Any) -> tuple[Any, ...]:
    """One argument or several, always as a tuple."""
    if type(value) is tuple:
        return value
    if type(value) is list and value and not _looks_like_spec(value):
        return tuple(value)
    return (value,)


def _looks_like_spec(value: list[Any]) -> bool:
    return not all(isinstance(part, (np.ndarray, Constant, np.generic)) for part in value)


def check_overlap(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """Raises InvalidBuffer where an output shares bytes with another argument."""
    for j, out in enumerate(outputs):
        for i, value in enumerate(inputs):
            if np.may_share_memory(out, value):
                raise InvalidBuffer(f"output {j} and input {i} overlap in memory; a kernel reads its "
                                    "inputs while it writes, so give it another output array")
        for k, other in enumerate(outputs[:j]):
            if np.may_share_memory(out, other):
                raise InvalidBuffer(f"outputs {k} and {j} overlap in memory; give each its own array")


Span = tuple[int, int, int]
Entry = tuple[int, list[Span], list[Span]]


class Spans:
    """Which spans of memory are known requests' arguments; finds those that clash.

    Two spans clash where they share a byte and at least one of them is written.
    Not for several threads at once: the owner holds a lock.
    """

    def __init__(self) -> None:
        self._read = _Sorted()
        self._written = _Sorted()
        self._owners: dict[int, Any] = {}
        self._numbers = itertools.count(1)

    def add(self, owner: Any, inputs: Sequence[np.ndarray],
            outputs: Sequence[np.ndarray]) -> tuple[Entry, list[Any]]:
        """Enters an owner's arguments; what `remove` takes, and the owners whose spans clash with them."""
        number = next(self._numbers)
        read, written = _spans(inputs, number), _spans(outputs, number)
        clashes = self._clashes(read, written)
        self._read.add(read)
        self._written.add(written)
        self._owners[number] = owner
        return (number, read, written), clashes

    def clashes(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> list[Any]:
        """The owners whose spans clash with these arguments, which are not entered."""
        return self._clashes(_spans(inputs, 0), _spans(outputs, 0)) if self._owners else []

    def remove(self, entry: Entry) -> None:
        """Forgets an owner. Safe to call twice."""
        number, read, written = entry
        if self._owners.pop(number, None) is not None:
            self._read.remove(read)
            self._written.remove(written)

    def owners(self) -> list[Any]:
        """Everybody who is entered."""
        return list(self._owners.values())

    def __len__(self) -> int:
        return len(self._owners)

    def _clashes(self, read: list[Span], written: list[Span]) -> list[Any]:
        found: set[int] = set()
        for span in written:
            found.update(self._read.touching(span))
            found.update(self._written.touching(span))
        for span in read:
            found.update(self._written.touching(span))
        return [self._owners[number] for number in found]


class _Sorted:
    """Spans by their first byte."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._longest = 0

    def add(self, spans: list[Span]) -> None:
        for span in spans:
            insort(self._spans, span)
            self._longest = max(self._longest, span[1] - span[0])

    def remove(self, spans: list[Span]) -> None:
        for span in spans:
            del self._spans[bisect_left(self._spans, span)]
        if not self._spans:
            self._longest = 0

    def touching(self, span: Span) -> list[int]:
        """Numbers of the owners of spans that share a byte with this one."""
        if not self._spans:
            return []
        start, end, _ = span
        found = []
        # Nothing longer than the longest can reach from before this into the span.
        reach = start - self._longest
        for at in range(bisect_left(self._spans, (end, 0, 0)) - 1, -1, -1):
            first, last, number = self._spans[at]
            if first < reach:
                break
            if last > start:
                found.append(number)
        return found


def _spans(arrays: Sequence[np.ndarray], number: int) -> list[Span]:
    found = []
    for values in arrays:
        size = values.nbytes
        if size:
            start = values.__array_interface__["data"][0]
            found.append((start, start + size, number))
    return found

"""Bytes for objects, errors and bindings: what rank and worker say to each other about Python things.

An object travels as a list of parts. The first is a pickle (protocol 5); the
others are large buffers, written as they lie in memory. Arrays that already lie
in an arena travel as references (arena, offset, size) and are not copied.

A pickle ends in `.`; what follows it here says that there is more:

    pickle .                                  nothing else
    pickle . A                                [value, keywords, arrays]: arrays were taken out of the top level
    pickle . A|V  mask  len(mask):u32  B      buffers from deeper inside; mask: 0 a part, 1 a reference

numpy's own pickling of an array takes 5 µs and 3 µs back; taking the arrays out
of the top level brings both to about 1 µs.
"""

from __future__ import annotations

import ast
import pickle
import struct
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cloudpickle
import msgspec
import numpy as np

from rfaas_mpi.errors import BadKernel, InvalidBuffer, KernelError, NestedError, RFaaSError

__all__ = [
    "Argument", "Binding", "Locate", "RemoteTraceback", "decode_binding", "dtype_of", "dtype_text", "dumps_call",
    "dumps_error", "dumps_result", "encode_binding", "error_for_bind", "error_for_future", "error_for_invoke",
    "loads_call", "loads_error", "loads_result",
]

Locate = Callable[[int, int], "tuple[int, int] | None"]
"""(address, bytes) → (arena, offset) if they lie in an arena, else None."""

Ref = tuple[int, int, int]
"""(arena, offset, bytes)."""

# A copy into the pickle is cheaper than one more part up to about this size.
_IN_BAND_BYTES = 2048

# What can't refer to `__main__`, and needs no buffers of its own.
_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None)})

_PLAIN_END = ord(".")

# dtypes with one letter; all others travel inside the pickle.
_LETTERS = {np.dtype(letter): letter for letter in "?bBhHiIlLefdgFDG"}
_DTYPES = {letter: dtype for dtype, letter in _LETTERS.items()}
_SCALARS = {dtype.type: letter for dtype, letter in _LETTERS.items()}
_SCALARS.pop(np.bool_)  # singletons; pickle keeps their identity


# --- objects ------------------------------------------------------------------

def dumps_call(args: tuple[Any, ...], kwargs: Mapping[str, Any],
               locate: Locate | None = None) -> tuple[list[Any], Sequence[Ref]]:
    """Parts and references of the arguments of one call, for `loads_call`.

    The parts may share memory with arrays in the arguments. Raises BadKernel,
    a TypeError, that names the argument which can't be pickled.
    """
    if not kwargs:
        for arg in args:
            if type(arg) not in _ATOMS:
                break
        else:
            return [pickle.dumps(args, 5)], ()
    return _dumps(args, dict(kwargs) if kwargs else None, locate, _bad_argument)


def loads_call(parts: Sequence[Any], refs: Sequence[Any] = ()) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of `dumps_call`; arrays lie in `parts` (writable if those are) and `refs`.

    Raises KernelError if they do not survive the way here.
    """
    first = parts[0]
    try:
        if first[-1] == _PLAIN_END:
            return pickle.loads(first), {}
        value, keywords = _loads(first, parts, refs)
    except Exception as error:  # anything: the user's own __setstate__ runs in there
        raise KernelError(f"the arguments arrived but can't be rebuilt in the worker: {_describe(error)}",
                          hint="what they refer to must be importable there too") from error
    return value, keywords or {}


def dumps_result(value: Any) -> list[Any]:
    """Parts of what a kernel returned, for `loads_result`.

    Raises KernelError with the value's repr where it can't be pickled.
    """
    if type(value) in _ATOMS:
        return [pickle.dumps(value, 5)]
    parts, _ = _dumps(value, None, None, _bad_result)
    return parts


def loads_result(parts: Sequence[Any]) -> Any:
    """The value that `dumps_result` was given; its arrays lie in `parts`, which they keep alive.

    Raises KernelError if it does not survive the way here.
    """
    first = parts[0]
    try:
        if first[-1] == _PLAIN_END:
            return pickle.loads(first)
        value, _ = _loads(first, parts, ())
    except Exception as error:  # anything: the user's own __setstate__ runs in there
        raise KernelError(
            f"the kernel's result arrived but can't be rebuilt here: {_describe(error)}",
            hint="return arrays, numbers, strings or instances of importable classes") from error
    return value


def _bad_argument(value: Any, error: Exception) -> Exception:
    args, keywords = value
    named = [(f"argument {index}", arg) for index, arg in enumerate(args)]
    named += [(f"argument {name!r}", arg) for name, arg in (keywords or {}).items()]
    for name, arg in named:
        problem = _pickle_problem(arg)
        if problem is not None:
            return BadKernel(f"{name} ({_type_name(arg)}) can't be sent to a worker: {problem}",
                             hint="pass what pickle takes, or make it inside the kernel")
    return BadKernel(f"the arguments can't be sent to a worker: {_describe(error)}",
                     hint="pass what pickle takes, or make it inside the kernel")


def _bad_result(value: Any, error: Exception) -> Exception:
    value, _ = value
    return KernelError(
        f"the kernel returned what can't be sent back, {_short(_safe_repr(value))} ({_type_name(value)}): "
        f"{_describe(error)}", hint="return arrays, numbers, strings or other things that pickle takes")


def _pickle_problem(value: Any) -> str | None:
    try:
        cloudpickle.dumps(value, 5)
    except Exception as error:
        return _describe(error)
    return None


def _take_tops(value: Any, keywords: dict[str, Any] | None, parts: list[Any], refs: list[Ref],
               locate: Locate | None) -> tuple[Any, list[Any], bool]:
    """Takes contiguous arrays and numpy's scalars out of the top level.

    Returns the value without them, a list of (place, letter, shape, data), and
    whether only atoms are left. Place is an index, a keyword, or None for the
    value itself; data is the bytes, the index of a part, or -1 - the index of a
    reference.
    """
    taken: list[Any] = []
    if type(value) is not tuple:
        record = _take(None, value, parts, refs, locate)
        if record is None:
            return value, taken, False
        taken.append(record)
        return None, taken, True
    atoms = True
    rest: Any = value
    for place, item in enumerate(value):
        if type(item) in _ATOMS:
            continue
        record = _take(place, item, parts, refs, locate)
        if record is None:
            atoms = False
            continue
        taken.append(record)
        if rest is value:
            rest = list(value)
        rest[place] = None
    if keywords is not None:
        for name, item in list(keywords.items()):
            if type(item) in _ATOMS:
                continue
            record = _take(name, item, parts, refs, locate)
            if record is None:
                atoms = False
                continue
            taken.append(record)
            keywords[name] = None
    return rest, taken, atoms


def _take(place: Any, item: Any, parts: list[Any], refs: list[Ref], locate: Locate | None) -> tuple | None:
    if type(item) is np.ndarray:
        letter = _LETTERS.get(item.dtype)
        if letter is None or not item.flags.c_contiguous:
            return None
        size = item.nbytes
        # The size first: asking for an address takes longer than copying little.
        if size <= _IN_BAND_BYTES:
            # Not bytearray(item): one integer would count as a length.
            return place, letter, item.shape, bytearray(item.tobytes())
        where = locate(item.ctypes.data, size) if locate is not None else None
        if where is not None:
            refs.append((*where, size))
            return place, letter, item.shape, -len(refs)
        parts.append(pickle.PickleBuffer(item).raw())
        return place, letter, item.shape, len(parts) - 1
    letter = _SCALARS.get(type(item))
    if letter is not None:
        return place, letter, None, item.tobytes()
    return None


def _dumps(value: Any, keywords: dict[str, Any] | None, locate: Locate | None,
           problem: Callable[[Any, Exception], Exception]) -> tuple[list[Any], Sequence[Ref]]:
    parts: list[Any] = [b""]
    refs: list[Ref] = []
    original = value, None if keywords is None else dict(keywords)
    rest, taken, atoms = _take_tops(value, keywords, parts, refs, locate)
    packed = bool(taken) or keywords is not None
    thing = [rest, keywords, taken] if packed else rest
    if atoms:
        parts[0] = pickle.dumps(thing, 5) + b"A" if packed else pickle.dumps(thing, 5)
        return parts, refs
    top_parts, top_refs = len(parts), len(refs)
    mask = bytearray()

    def buffer(picklebuffer: pickle.PickleBuffer) -> bool:
        raw = picklebuffer.raw()
        if raw.nbytes <= _IN_BAND_BYTES:
            return True
        where = None
        if locate is not None:
            where = locate(np.frombuffer(raw, np.uint8).ctypes.data, raw.nbytes)
        if where is not None:
            refs.append((*where, raw.nbytes))
            mask.append(1)
        else:
            parts.append(raw)
            mask.append(0)
        return False

    try:
        data = pickle.dumps(thing, 5, buffer_callback=buffer)
        # What lives in `__main__` here is not in the worker's: by value then.
        again = b"__main__" in data
    except Exception:  # a user's __reduce__ may raise anything; cloudpickle has the last word
        again = True
    if again:
        del parts[top_parts:], refs[top_refs:], mask[:]
        try:
            data = cloudpickle.dumps(thing, 5, buffer_callback=buffer)
        except Exception as error:
            raise problem(original, error) from error
    if mask:
        data += (b"A" if packed else b"V") + mask + len(mask).to_bytes(4, "little") + b"B"
    elif packed:
        data += b"A"
    parts[0] = data
    return parts, refs


def _loads(first: Any, parts: Sequence[Any], refs: Sequence[Any]) -> tuple[Any, dict[str, Any] | None]:
    if first[-1] == ord("A"):
        value, keywords, taken = pickle.loads(first)
    else:
        count = int.from_bytes(first[-5:-1], "little")
        mask = first[-5 - count:-5]
        packed = first[-6 - count] == ord("A")
        # Those of the top level come first, so the deeper ones are the last.
        part = len(parts) - count + sum(mask)
        ref = len(refs) - sum(mask)
        buffers = []
        for is_ref in mask:
            if is_ref:
                buffers.append(refs[ref])
                ref += 1
            else:
                buffers.append(parts[part])
                part += 1
        thing = pickle.loads(first, buffers=buffers)
        if not packed:
            return thing, None
        value, keywords, taken = thing
    if not taken:
        return value, keywords
    for place, letter, shape, data in taken:
        dtype = _DTYPES[letter]
        if shape is None:
            item = np.ndarray((), dtype, data)[()]
        else:
            if type(data) is int:
                data = parts[data] if data >= 0 else refs[-1 - data]
            item = np.ndarray(shape, dtype, data)
        if type(place) is int:
            value[place] = item
        elif place is None:
            value = item
        else:
            keywords[place] = item
    return (tuple(value) if type(value) is list else value), keywords


# --- errors ---------------------------------------------------------------------

_ERROR_MAGIC = b"\x00rfe1"
# magic, then text, pickled exception and traceback, each behind its length. Where
# it says why a kernel can't be loaded, what does not fit a slot is cut off: the
# traceback stands last because it can lose its end.
_ERROR_HEAD = struct.Struct("<5sIII")
_TRACEBACK_BYTES = 10_000
_TEXT_CHARACTERS = 2000
_PICKLE_BYTES = 1 << 20
_OWN = __name__.partition(".")[0]


class RemoteTraceback(Exception):
    """The traceback of an exception that a kernel raised in its worker, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class _ErrorRecord(NamedTuple):
    text: str           # one line: type and message
    pickled: bytes      # empty where it does not survive a round trip
    traceback: str


def _safe_repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:  # a user's __repr__ may raise anything
        return f"<{_type_name(value)}, whose repr raised {type(error).__name__}>"


def _type_name(value: Any) -> str:
    kind = type(value)
    module = kind.__module__
    return kind.__qualname__ if module in ("builtins", "__main__") else f"{module}.{kind.__qualname__}"


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as second:  # a user's __str__ may raise anything
        text = f"<its str raised {type(second).__name__}>"
    return f"{_type_name(error)}: {text}" if text else _type_name(error)


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def _middle_out(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


def _without_our_frames(error: BaseException) -> Any:
    """The traceback from the kernel's own first frame on, or all of it if there is none."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == _OWN:
        trace = trace.tb_next
    return trace if trace is not None else error.__traceback__


def _as_kernel_error(error: BaseException) -> BaseException:
    if isinstance(error, Exception):
        return error
    if isinstance(error, SystemExit):
        what = f"the kernel called sys.exit({'' if error.code is None else _safe_repr(error.code)})"
    elif isinstance(error, KeyboardInterrupt):
        what = "the kernel raised KeyboardInterrupt"
    else:
        what = f"the kernel raised {_describe(error)}, which is no Exception"
    return KernelError(what, hint="return a value, or raise an ordinary exception instead")


def _pickle_error(error: BaseException) -> bytes:
    """The exception pickled, or nothing where a round trip does not give its like."""
    try:
        data = pickle.dumps(error, 5)
        if b"__main__" in data:
            data = cloudpickle.dumps(error, 5)
        twin = pickle.loads(data)
    except Exception:
        try:
            data = cloudpickle.dumps(error, 5)
            twin = pickle.loads(data)
        except Exception:  # many exceptions can't be rebuilt from their args; the repr then travels
            return b""
    if type(twin) is not type(error) or len(data) > _PICKLE_BYTES:
        return b""
    return data


def dumps_error(error: BaseException) -> bytes:
    """Text, traceback and, if it survives a round trip, the exception itself. Never raises."""
    try:
        raised = error
        error = _as_kernel_error(raised)
        lines = traceback.format_exception(type(raised), raised, _without_our_frames(raised))
        text = _utf8(_short(_describe(error), _TEXT_CHARACTERS))
        pickled = _pickle_error(error)
        trace = _utf8(_middle_out("".join(lines), _TRACEBACK_BYTES))
        return _ERROR_HEAD.pack(_ERROR_MAGIC, len(text), len(pickled), len(trace)) + text + pickled + trace
    except BaseException as second:  # this is the last stop: a worker must answer with something
        return (f"the kernel raised {type(error).__name__}, and describing it raised "
                f"{type(second).__name__}").encode("utf-8", "backslashreplace")


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _read_error(data: Any) -> _ErrorRecord | str:
    data = bytes(data)
    if data.startswith(_ERROR_MAGIC) and len(data) >= _ERROR_HEAD.size:
        _, text, pickled, trace = _ERROR_HEAD.unpack_from(data)
        body = data[_ERROR_HEAD.size:]
        whole = len(body) >= text + pickled
        return _ErrorRecord(
            body[:text].decode("utf-8", "replace"),
            body[text:text + pickled] if whole else b"",
            body[text + pickled:text + pickled + trace].decode("utf-8", "replace") if whole else "")
    return data.rstrip(b"\0").decode("utf-8", "replace") or "the kernel failed"


def loads_error(data: Any) -> Exception:
    """What the kernel raised, with the remote traceback as `__cause__`.

    A KernelError with its repr where it could not be rebuilt, and one with the
    text where a native kernel failed or the worker's C side spoke.
    """
    record = _read_error(data)
    if isinstance(record, str):
        return KernelError(record)
    error: Exception | None = None
    if record.pickled:
        try:
            error = pickle.loads(record.pickled)
        except Exception:  # its class is not here, or its constructor wants something else
            error = None
    if not isinstance(error, Exception):
        error = KernelError(f"the kernel raised {record.text}",
                            hint="the exception itself can't be pickled; its traceback follows")
    error.__cause__ = RemoteTraceback(record.traceback)
    return error


def _called(name: str) -> str:
    return f"kernel {name}" if name else "the kernel"


def error_for_future(data: Any, name: str = "") -> Exception:
    """For `Future.exception()`: the user's own exception, as `concurrent.futures` gives it."""
    error = loads_error(data)
    if name and isinstance(error, KernelError) and error.__cause__ is None:
        return KernelError(f"kernel {name}: {error}")
    return error


def error_for_invoke(data: Any, name: str = "") -> KernelError:
    """For the buffers API: a KernelError whose `__cause__` is the remote exception."""
    error = loads_error(data)
    if isinstance(error, KernelError):
        return error if error.__cause__ is not None or not name else KernelError(f"kernel {name}: {error}")
    wrapped = KernelError(f"{_called(name)} raised {_describe(error)}")
    wrapped.__cause__ = error
    return wrapped


def error_for_bind(data: Any, name: str = "") -> RFaaSError:
    """For a kernel that a worker could not load or bind: always a BadKernel, KernelChanged where it is one."""
    error = loads_error(data)
    if isinstance(error, BadKernel):
        return error
    text = str(error) if isinstance(error, (KernelError, NestedError)) else _describe(error)
    wrapped = BadKernel(f"{_called(name)} can't be loaded by the worker: {text}")
    wrapped.__cause__ = error
    return wrapped


# --- bindings -------------------------------------------------------------------

class Argument(msgspec.Struct, frozen=True, array_like=True):
    """dtype (see `dtype_text`) and shape of one argument."""

    dtype: str
    shape: tuple[int, ...]


class Division(msgspec.Struct, frozen=True, array_like=True):
    """How one call's arrays are cut into cells that are taken from a board, its last output (see `rfaas_mpi.cells`)."""

    edges: tuple[int, ...]
    whole: tuple[bool, ...]
    moves: tuple[bool, ...]
    """Of each input: whether it lies elsewhere at each call. No large one does."""
    index: bool
    by_cell: bool
    who: int
    """Of those who take from the board; the rank is 0."""
    rowwise: bool = False
    """One call may run several cells that follow each other."""


class Binding(msgspec.Struct, frozen=True, array_like=True):
    """What does not change between the calls of a binding: the `meta` of a request."""

    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    division: Division | None = None


def dtype_text(dtype: np.dtype) -> str:
    """The dtype as text, for `dtype_of`; structured ones with their offsets.

    Raises InvalidBuffer for dtypes that hold Python objects.
    """
    if dtype.hasobject:
        raise InvalidBuffer(f"arrays of dtype {dtype} hold Python objects, not bytes",
                            hint="convert it to numbers, or use submit")
    if dtype.fields is None:
        return dtype.str
    return repr(np.lib.format.dtype_to_descr(dtype))


def dtype_of(text: str) -> np.dtype:
    """The dtype of `dtype_text`."""
    if text.startswith("["):
        return np.lib.format.descr_to_dtype(ast.literal_eval(text))
    return np.dtype(text)


def encode_binding(inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray],
                   division: Division | None = None) -> bytes:
    """`meta` for a request on such arrays. Raises InvalidBuffer for arrays of Python objects."""
    return msgspec.json.encode(Binding(
        tuple(Argument(dtype_text(array.dtype), array.shape) for array in inputs),
        tuple(Argument(dtype_text(array.dtype), array.shape) for array in outputs), division))


def decode_binding(meta: Any) -> Binding:
    """The Binding that `encode_binding` wrote; BadKernel if it is none."""
    try:
        return msgspec.json.decode(bytes(meta), type=Binding)
    except msgspec.MsgspecError as error:
        raise BadKernel(f"the description of the arguments is damaged: {error}",
                        hint="rank and worker must run the same version of rfaas_mpi") from error

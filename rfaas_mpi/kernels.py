"""Kernels: stateless functions, how they travel to a worker, and how both ends call them.

What is shipped is a blob: kind, form and content. It is addressed by its
SHA-256, shipped to a worker once, and checked there before anything else.

    form R   reference: module, name, and the SHA-256 of the module's source file
    form V   value: the pickled callable (functions of `__main__`, lambdas, closures, numba's)
    form L   library: the bytes of a shared library, and the symbol in it
    form N   numba: function, signature and options; compiled where it is loaded
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import io
import os
import pickle
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec
import numpy as np

from rfaas_mpi import codec, native
from rfaas_mpi.calling import PythonCall, Thunk
from rfaas_mpi.errors import BadKernel, KernelChanged
from rfaas_mpi.types import Initialised

__all__ = [
    "KIND_NATIVE", "KIND_NUMBA", "KIND_OBJECT", "KIND_PLAIN", "KIND_PYTHON", "Kernel",
    "kernel", "load_blob", "object_kernel", "short_name", "takes_out",
]

# The fabric's numbers. A numba kernel is of the kind of its ABI, since it is
# called in the same way as a library's.
KIND_PYTHON = 1
KIND_NATIVE = 2
KIND_PLAIN = 3
KIND_NUMBA = 4
KIND_OBJECT = 5

_NATIVE_KINDS = {"rfm": KIND_NATIVE, "plain": KIND_PLAIN}
_ABI_OF = {kind: abi for abi, kind in _NATIVE_KINDS.items()}
_MAINS = ("__main__", "__mp_main__")

# Functions that are not decorated are remembered; the oldest is forgotten.
_REMEMBERED = 256


# --- references to importable functions -------------------------------------------

class _Reference(msgspec.Struct, frozen=True):
    """A function that can be imported, and the source that it came from here."""

    module: str
    qualname: str
    file: str = ""
    sha256: str = ""      # of `file`; empty where a module has none
    path: str = ""        # the entry of sys.path that leads to it


# module name → (its spec, file, digest). A reload replaces the spec, so the
# digest is always that of the source which was executed last.
_sources: dict[str, tuple[Any, str, str]] = {}


def _digest_of(file: str) -> str:
    try:
        with open(file, "rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    except OSError:
        return ""         # inside a zip, or deleted since: nothing to compare with


def _source(module: types.ModuleType) -> tuple[str, str]:
    """File and digest of a module's source, as it was when first asked for."""
    spec = getattr(module, "__spec__", None)
    known = _sources.get(module.__name__)
    if known is None or known[0] is not spec:
        file = getattr(module, "__file__", None) or ""
        file = os.path.abspath(file) if file else ""
        known = _sources[module.__name__] = spec, file, _digest_of(file) if file else ""
    return known[1], known[2]


def _import_root(module: types.ModuleType, file: str) -> str:
    """The directory that has to be on sys.path to import the module."""
    if not file:
        return ""
    levels = module.__name__.count(".") + (1 if Path(file).name == "__init__.py" else 0)
    return str(Path(file).parents[levels])


def _by_value(module: str) -> bool:
    """Whether the user told cloudpickle to ship this module's functions by value."""
    registered = cloudpickle.list_registry_pickle_by_value()
    while module:
        if module in registered:
            return True
        module = module.rpartition(".")[0]
    return False


def _follow(module: types.ModuleType, qualname: str) -> Any:
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found._function if isinstance(found, Kernel) else found


def _reference(function: Any) -> _Reference | None:
    """How to import `function`; None if that is not possible or gives another object."""
    module_name = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not isinstance(module_name, str) or not isinstance(qualname, str):
        return None
    if module_name in _MAINS or "<" in qualname or _by_value(module_name):
        return None
    module = sys.modules.get(module_name)
    if module is None or _follow(module, qualname) is not function:
        return None
    file, digest = _source(module)
    return _Reference(module_name, qualname, file, digest, _import_root(module, file))


def _note_source(function: Any) -> None:
    """Remembers a module's source while it is surely what is being executed."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if module is not None and module.__name__ not in _MAINS:
        _source(module)


def _resolve(ref: _Reference) -> Callable[..., Any]:
    """The function, from the source that the rank had.

    Raises KernelChanged if the source differs by now, BadKernel if it can't be
    imported.
    """
    module = _import(ref)
    file, digest = _source(module)
    if ref.sha256 and digest != ref.sha256:
        if file and _digest_of(file) == ref.sha256:
            # The rank reloaded it, so its own functions run the new code too.
            module = importlib.reload(module)
        else:
            raise _changed(ref, file)
    function = _follow(module, ref.qualname)
    if not callable(function):
        raise BadKernel(f"module {ref.module} ({file}) has no function {ref.qualname} when it is imported in a worker",
                        hint="define it at the top level of the module, unconditionally")
    return function


def _import(ref: _Reference) -> types.ModuleType:
    try:
        return importlib.import_module(ref.module)
    except ModuleNotFoundError as error:
        top = ref.module.partition(".")[0]
        if not ref.path or ref.path in sys.path or error.name is None or error.name.partition(".")[0] != top:
            raise _not_importable(ref, error) from error
    except Exception as error:  # a module's top level may raise anything
        raise _not_importable(ref, error) from error
    # The rank found it in a directory that it added to sys.path later.
    sys.path.append(ref.path)
    try:
        return importlib.import_module(ref.module)
    except Exception as error:
        raise _not_importable(ref, error) from error


def _not_importable(ref: _Reference, error: Exception) -> BadKernel:
    return BadKernel(f"kernel {ref.module}.{ref.qualname} can't be imported in a worker: {_why(error)}",
                     hint="its module must be importable from the worker's sys.path without MPI or an Executor at "
                          "its top level")


def _changed(ref: _Reference, file: str) -> KernelChanged:
    if file and ref.file and file != ref.file:
        return KernelChanged(f"module {ref.module} of kernel {ref.qualname} is {ref.file} in the rank and {file} in "
                             f"a worker, with different contents", hint="rename one of them, or mend sys.path")
    return KernelChanged(f"module {ref.module} ({ref.file or file}) was edited since kernel {ref.qualname} was first "
                         f"used: rank and worker would run different code",
                         hint=f"start the program again, or call importlib.reload({ref.module}) in it")


# --- functions by value ---------------------------------------------------------------

_pickling = threading.local()

_ATOMS = (int, float, complex, bool, str, bytes, type(None), type(...), np.dtype, np.ufunc, range)
_MISSING = object()


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


class _Capture:
    """What a function by value has captured, so that a later change is noticed.

    `exact`: everything in it is immutable, so identity is equality. Otherwise a
    change inside of a captured object goes unnoticed by `unchanged`.
    """

    def __init__(self, function: Any) -> None:
        self.exact = True
        self._functions: list[tuple[types.FunctionType, Any, Any]] = []
        self._keyword_defaults: list[tuple[types.FunctionType, dict[str, Any]]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._globals: list[tuple[dict[str, Any], str, Any]] = []
        self._seen: set[int] = set()
        self._look(function)

    def _look(self, value: Any) -> None:
        if isinstance(value, Kernel):
            value = value._function
        if isinstance(value, types.FunctionType):
            if id(value) not in self._seen:
                self._seen.add(id(value))
                if _reference(value) is None:
                    self._look_into(value)
        elif isinstance(value, types.ModuleType):
            self.exact &= sys.modules.get(value.__name__) is value
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            self.exact &= isinstance(value.__self__, (types.ModuleType, type(None)))
        elif isinstance(value, type):
            self.exact &= value.__module__ == "builtins" or _reference(value) is not None
        elif isinstance(value, (tuple, frozenset)) and type(value) in (tuple, frozenset):
            for item in value:
                self._look(item)
        elif isinstance(value, Initialised):
            # Its arguments are taken once, as `concurrent.futures` does.
            self._look(value.fn)
            self._look(value.initializer)
        elif type(value) not in _ATOMS and not isinstance(value, (np.dtype, np.generic)):
            self.exact = False

    def _look_into(self, function: types.FunctionType) -> None:
        self._functions.append((function, function.__code__, function.__defaults__))
        for value in function.__defaults__ or ():
            self._look(value)
        if function.__kwdefaults__:
            self._keyword_defaults.append((function, dict(function.__kwdefaults__)))
            for value in function.__kwdefaults__.values():
                self._look(value)
        if function.__dict__:
            self.exact = False
        for cell in function.__closure__ or ():
            value = _cell(cell)
            self._cells.append((cell, value))
            if value is not _MISSING:
                self._look(value)
        scope = function.__globals__
        for name in _names(function.__code__):
            value = scope.get(name, _MISSING)
            self._globals.append((scope, name, value))
            if value is not _MISSING:
                self._look(value)

    def unchanged(self) -> bool:
        """Whether all names still mean the same objects."""
        for function, code, defaults in self._functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
        for cell, value in self._cells:
            if _cell(cell) is not value:
                return False
        for scope, name, value in self._globals:
            if scope.get(name, _MISSING) is not value:
                return False
        for function, defaults in self._keyword_defaults:
            now = function.__kwdefaults__ or {}
            if now.keys() != defaults.keys() or any(now[name] is not value for name, value in defaults.items()):
                return False
        return True


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:        # not assigned yet
        return _MISSING


def _pickled(function: Any) -> bytes:
    """A callable by value, or by whatever pickle makes of it.

    Raises BadKernel that names what can't be pickled.
    """
    outer = getattr(_pickling, "active", False)
    _pickling.active = True
    try:
        if not isinstance(function, types.FunctionType):
            try:
                data = pickle.dumps(function, 5)
                if b"__main__" not in data:
                    return data
            except Exception:  # whatever a user's __reduce__ raises; cloudpickle has the last word
                data = b""
        file = io.BytesIO()
        cloudpickle.Pickler(file, 5).dump(function)
        return file.getvalue()
    except Exception as error:
        why = _culprit(function) or f"{type(error).__name__}: {error}"
        raise BadKernel(
            f"{_name_of(function)} can't be shipped to a worker: {why}",
            hint="make it inside the kernel, or pass what it is made from as an argument") from error
    finally:
        _pickling.active = outer


def _culprit(function: Any) -> str:
    """Which of the things that a callable refers to can't be pickled; empty if none alone."""
    found: list[tuple[str, Any]] = []
    if isinstance(function, functools.partial):
        found += [("its function", function.func)]
        found += [(f"its argument {index}", value) for index, value in enumerate(function.args)]
        found += [(f"its argument {name!r}", value) for name, value in function.keywords.items()]
    elif isinstance(function, types.MethodType):
        found += [("the object it is a method of", function.__self__)]
    elif isinstance(function, types.FunctionType):
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            found.append((f"its closure's variable {name!r}", _cell(cell)))
        for name in sorted(_names(code)):
            if name in function.__globals__:
                found.append((f"the global {name!r}", function.__globals__[name]))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            found.append(("the default of a parameter", value))
    else:
        found += [(f"its attribute {name!r}", value) for name, value in getattr(function, "__dict__", {}).items()]
    for name, value in found:
        if value is _MISSING or value is function:
            continue
        try:
            cloudpickle.dumps(value, 5)
        except Exception as error:
            return f"{name} ({type(value).__module__}.{type(value).__qualname__}): {error}"
    return ""


def _name_of(function: Any) -> str:
    if isinstance(function, functools.partial):
        return f"partial of {_name_of(function.func)}"
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module and module != "builtins" else name


# --- Kernel -----------------------------------------------------------------------------

class Kernel:
    """A stateless function that workers can run; call it and it runs here.

    Made by `@rfaas_mpi.kernel` and `Kernel.from_library`. A Python kernel takes
    its inputs as positional arguments, read-only arrays (numpy scalars for
    inputs of shape ()). With a parameter `out` it writes its result there (a
    tuple of arrays if there are several), else it returns it.

    What a kernel by value refers to is captured when it is first used; names
    that are bound to other objects later make it a new kernel (another
    `digest`), changes inside of captured objects are not noticed.
    """

    # `__call__` is a slot of the instance: the interpreter finds the function
    # itself in it, and a local call has no frame of ours around it.
    __slots__ = ("__call__", "__dict__", "__weakref__")

    __call__: Callable[..., Any]
    kind: int
    name: str
    wants_out: bool

    def __init__(self, source: Any, kind: int, name: str, wants_out: bool) -> None:
        self._origin = source
        self.kind = kind
        self.name = name
        self.wants_out = wants_out
        self._function = source.function
        self._calls: dict[Any, PythonCall] = {}      # by which inputs are numbers, and how many outputs there are
        if self._function is not None:
            functools.update_wrapper(self, self._function, updated=())
        if kind in _ABI_OF:
            # Loaded (or compiled by numba) only if it is called here.
            self.__call__ = lambda *args, **kwargs: source.local()(*args, **kwargs)
        else:
            self.__call__ = self._function

    @classmethod
    def from_library(cls, path: str | os.PathLike[str], symbol: str, abi: str = "rfm",
                     name: str | None = None) -> Kernel:
        """The function `symbol` of a shared library, as the file is now.

        `abi`: "rfm", `int32_t f(const struct rfm_call *)` (see rfm_call.h), or
        "plain", rFaaS' `uint32_t f(void *in, uint32_t size, void *out)`. The
        bytes travel: the file may change or vanish afterwards. Raises BadKernel
        if it is no library for this machine or has no such function.
        """
        if abi not in native.ABIS:
            raise BadKernel(f"{abi!r} is no ABI of kernels", hint=f"one of {', '.join(native.ABIS)}")
        path = os.fspath(path)
        data = native.read_library(path)
        native.check_symbol(path, data, symbol)
        return cls(_Library(data, symbol, abi, os.path.basename(path)), _NATIVE_KINDS[abi], name or symbol, True)

    @property
    def blob(self) -> bytes:
        """What is shipped to a worker."""
        return self._origin.pack(self.kind, self.name)[0]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the blob, 32 bytes."""
        return self._origin.pack(self.kind, self.name)[1]

    @property
    def fn(self) -> Callable[..., Any] | None:
        """The Python callable; None for native kernels."""
        return self._function if self.kind not in _ABI_OF else None

    @property
    def settled(self) -> bool:
        """Whether a worker may keep it: it is for certain what the function is now, and will be used again.

        False if the function is by value, and something that it refers to was
        bound anew or is mutable, or `object_kernel` has seen it only once: a
        loop that makes a lambda for each call must not fill the workers.
        """
        return self._origin.settled()

    def meta(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> bytes:
        """What a worker must know to bind it to such arrays; nothing for native kernels."""
        return b"" if self.kind in _ABI_OF else codec.encode_binding(inputs, outputs)

    def run(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> tuple[int, ...] | None:
        """Runs it here once, on arrays as a worker would: bytes written to each output, None if all.

        Raises what the kernel raises, and KernelError where a worker would.
        """
        views = [_read_only(array) for array in inputs]
        return self.bind(views, outputs)()

    def bind(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Thunk:
        """A function without parameters that runs it here on these arrays."""
        if self.kind in _ABI_OF:
            return self._origin.local().bind(inputs, outputs)
        pattern = tuple([array.ndim == 0 for array in inputs]), len(outputs)
        call = self._calls.get(pattern)
        if call is None:
            call = self._calls[pattern] = PythonCall(self._function, self.name, self.wants_out, *pattern)
        return call.bind(inputs, outputs)

    def native(self) -> native.NativeFunction | None:
        """The function itself, loaded here; None for Python kernels."""
        return self._origin.local() if self.kind in _ABI_OF else None

    def __repr__(self) -> str:
        form = {KIND_NATIVE: "native", KIND_PLAIN: "plain native", KIND_OBJECT: "object"}.get(self.kind, "Python")
        return f"<{form} kernel {self.name}>"

    def __reduce__(self) -> Any:
        if self.kind in _ABI_OF:
            return _from_blob, (self.blob, self.name)
        if getattr(_pickling, "active", False):
            # Inside another kernel's pickle, perhaps our own: the bare function
            # lets the pickler see that it has been there before.
            return _from_function, (self._function, self.kind, self.name)
        module, qualname = getattr(self, "__module__", None), getattr(self, "__qualname__", None)
        if module not in _MAINS and module in sys.modules and isinstance(qualname, str):
            found: Any = sys.modules[module]
            for part in qualname.split("."):
                found = getattr(found, part, None)
            if found is self:
                return qualname
        return _from_blob, (self.blob, self.name)


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _from_function(function: Any, kind: int, name: str) -> Kernel:
    return Kernel(_Python(function), kind, name, takes_out(function))


def _from_blob(blob: bytes, name: str) -> Kernel:
    kind, loaded = load_blob(hashlib.sha256(blob).digest(), blob)
    if kind in _ABI_OF:
        return Kernel(_Blob(blob), kind, name, True)
    return _from_function(loaded, kind, name)


class _Python:
    """A Python callable, by reference if it can be imported, else by value."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._packed: tuple[bytes, bytes] | None = None
        self._capture: _Capture | None = None
        self.used_again = False
        _note_source(function)

    def pack(self, kind: int, name: str) -> tuple[bytes, bytes]:
        if self._packed is not None and (self._capture is None or self._capture.unchanged()):
            return self._packed
        if self._packed is None and (ref := _reference(self.function)) is not None:
            self._packed = _pack(kind, "R", msgspec.json.encode(ref))
            return self._packed
        # Taken before pickling: a change in between then shows next time.
        self._capture = _Capture(self.function)
        self._packed = _pack(kind, "V", _pickled(self.function))
        return self._packed

    def is_current(self) -> bool:
        """Whether what was packed is for certain what the callable is now."""
        capture = self._capture
        return self._packed is not None and (capture is None or (capture.exact and capture.unchanged()))

    def settled(self) -> bool:
        return (self._capture is None or self.used_again) and self.is_current()


class _Library:
    """A function in a shared library, by the library's bytes."""

    function = None

    def __init__(self, data: bytes, symbol: str, abi: str, file: str) -> None:
        head = msgspec.json.encode({"symbol": symbol, "file": file})
        self._packed = _pack(_NATIVE_KINDS[abi], "L", struct.pack("<I", len(head)) + head + data)
        self._local: native.NativeFunction | None = None

    def pack(self, kind: int, name: str) -> tuple[bytes, bytes]:
        return self._packed

    def settled(self) -> bool:
        return True

    def local(self) -> native.NativeFunction:
        if self._local is None:
            self._local = load_blob(self._packed[1], self._packed[0])[1]
        return self._local


class _Blob(_Library):
    """The same, from a blob that came from elsewhere."""

    def __init__(self, blob: bytes) -> None:
        self._packed = blob, hashlib.sha256(blob).digest()
        self._local = None


class _Numba:
    """numba's `@cfunc`: the function and its signature."""

    def __init__(self, cfunc: Any, abi: str) -> None:
        self.function = cfunc._pyfunc
        self._cfunc = cfunc
        self._abi = abi
        self._packed: tuple[bytes, bytes] | None = None

    def pack(self, kind: int, name: str) -> tuple[bytes, bytes]:
        if self._packed is None:
            compiler = self._cfunc._compiler
            options = {key: value for key, value in compiler.targetoptions.items() if key != "pipeline_class"}
            self._packed = _pack(kind, "N", _pickled(
                _NumbaBlob(self.function, self._cfunc._sig, dict(compiler.locals), options)))
        return self._packed

    def settled(self) -> bool:
        return True           # numba compiled it with what it referred to then

    def local(self) -> native.NativeFunction:
        return native.NativeFunction(self._cfunc.address, self._abi, self.function.__qualname__, self._cfunc)


class _NumbaBlob:
    def __init__(self, function: Any, signature: Any, locals: dict[str, Any], options: dict[str, Any]) -> None:
        self.function, self.signature, self.locals, self.options = function, signature, locals, options
        self.__qualname__ = function.__qualname__

    def compile(self) -> Any:
        """The compiled CFunc; BadKernel where numba is not installed or refuses."""
        try:
            import numba
        except ImportError as error:
            raise BadKernel(f"kernel {self.__qualname__} needs numba, which can't be imported in the worker: {error}",
                            hint="install rfaas_mpi[numba] in the interpreter that runs the application") from error
        try:
            return numba.cfunc(self.signature, locals=self.locals, **self.options)(self.function)
        except Exception as error:  # numba has a wide choice of errors
            raise BadKernel(f"numba can't compile kernel {self.__qualname__} in the worker: {error}") from error


def _pack(kind: int, form: str, content: bytes) -> tuple[bytes, bytes]:
    # The kind is part of the content: the same function as a Python kernel and
    # as an object's callable are two kernels.
    blob = bytes((kind, ord(form))) + content
    return blob, hashlib.sha256(blob).digest()


# --- making kernels -------------------------------------------------------------------

def kernel(function: Any = None, /, *, name: str | None = None) -> Any:
    """Makes a Kernel of a function, or of numba's `@cfunc`; with or without parentheses.

    Raises BadKernel if it is neither callable nor compiled with a signature
    that kernels have.
    """
    if function is None:
        return functools.partial(kernel, name=name)
    if isinstance(function, Kernel):
        return function
    if _is_cfunc(function):
        abi = _cfunc_abi(function)
        return Kernel(_Numba(function, abi), _NATIVE_KINDS[abi], name or function.__qualname__, True)
    if not callable(function):
        raise BadKernel(f"{function!r} is no kernel: it can't be called",
                        hint="decorate a function, or use Kernel.from_library")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function) \
            or inspect.isasyncgenfunction(function):
        raise BadKernel(f"{_name_of(function)} is a generator or coroutine function, which can't be a kernel",
                        hint="return the result instead of yielding or awaiting it")
    return Kernel(_Python(function), KIND_PYTHON, name or short_name(function), takes_out(function))


def short_name(function: Any) -> str:
    """What a callable is called in messages."""
    return getattr(function, "__name__", None) or type(function).__name__


def full_name(kernel: Any) -> str:
    """What a loaded kernel is called in accounts: with its module, if that isn't the rank's own script."""
    if isinstance(kernel, native.NativeFunction):
        return kernel.name
    name = getattr(kernel, "__qualname__", None) or short_name(kernel)
    module = getattr(kernel, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) and module not in ("__main__", "builtins") else str(name)


def takes_out(function: Any) -> bool:
    """Whether a callable has a parameter `out` that can be passed by name."""
    if isinstance(function, np.ufunc):
        return True
    try:
        parameter = inspect.signature(function).parameters.get("out")
    except (TypeError, ValueError):     # builtins without a signature
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _is_cfunc(thing: Any) -> bool:
    # By name: numba is no dependency, and importing it takes a second.
    kind = type(thing)
    return kind.__name__ == "CFunc" and kind.__module__ == "numba.core.ccallback"


def _cfunc_abi(cfunc: Any) -> str:
    from numba.core import types as numba_types
    pointers = (numba_types.CPointer, numba_types.RawPointer)
    signature = cfunc._sig
    args = signature.args
    if signature.return_type == numba_types.int32 and len(args) == 1 and isinstance(args[0], pointers):
        return "rfm"
    if signature.return_type == numba_types.uint32 and len(args) == 3 and isinstance(args[0], pointers) \
            and args[1] == numba_types.uint32 and isinstance(args[2], pointers):
        return "plain"
    raise BadKernel(f"numba's {cfunc.__qualname__} has the signature {signature}, which no kernel has",
                    hint="use uint32(CPointer(…), uint32, CPointer(…)) for one input and one output, "
                         "or int32(voidptr) for struct rfm_call")


# --- callables for submit -----------------------------------------------------------------

# By id, since a callable may define equality; the oldest is forgotten.
_objects: dict[int, Kernel] = {}


def object_kernel(function: Any) -> Kernel:
    """The kernel for `submit(function, …)`: any callable, also a Kernel of a Python function.

    The same one each time if the function can be imported, or if all that it
    refers to is immutable and unchanged; else it is pickled again, so that what
    runs is what the function is now. Raises BadKernel that names what can't be
    pickled.
    """
    if isinstance(function, Kernel):
        if function.fn is None:
            raise BadKernel(f"{function!r} takes buffers, not objects", hint="use Invoke")
        function = function.fn
    known = _objects.get(id(function))
    if known is not None and known.fn is function and known._origin.is_current():
        known._origin.used_again = True
        return known
    if not callable(function):
        raise BadKernel(f"{function!r} can't be called")
    source = _Python(function)
    made = Kernel(source, KIND_OBJECT, _name_of(function), False)
    _ = made.blob             # what can't be pickled is told now
    if source.is_current():
        while len(_objects) >= _REMEMBERED:
            _objects.pop(next(iter(_objects)), None)
        _objects[id(function)] = made
    return made


# --- loading blobs --------------------------------------------------------------------

def load_blob(digest: bytes, blob: Any) -> tuple[int, Any]:
    """Kind, and what is called: a callable, or a NativeFunction.

    Raises BadKernel if the blob is not what its digest says, or what it holds
    can't be imported, rebuilt, loaded or compiled here; KernelChanged if its
    module is not what it was.
    """
    view = memoryview(blob)
    if hashlib.sha256(view).digest() != bytes(digest):
        raise BadKernel("a kernel's code arrived damaged: it is not what its digest says")
    kind, form, content = view[0], chr(view[1]), view[2:]
    match form:
        case "R":
            return kind, _resolve(msgspec.json.decode(content, type=_Reference))
        case "V":
            return kind, _unpickled(content)
        case "L":
            (size,) = struct.unpack_from("<I", content)
            head = msgspec.json.decode(content[4:4 + size])
            library = native.load(bytes(content[4 + size:]), head["file"])
            return kind, native.NativeFunction(library.address(head["symbol"]), _ABI_OF[kind], head["symbol"], library)
        case "N":
            return kind, _compiled(_unpickled(content), _ABI_OF[kind])
    raise BadKernel(f"a kernel of the unknown form {form!r}", hint="rank and worker must run the same version")


def _why(error: Exception) -> str:
    """The error; of a module that is missing also where, and where it was looked for."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError):
        text += f" on node {socket.gethostname()}, where {sys.executable} looks in {', '.join(filter(None, sys.path))}"
    return text


def _unpickled(data: Any) -> Any:
    try:
        return pickle.loads(data)
    except BadKernel:
        raise
    except Exception as error:  # unpickling imports modules and runs constructors
        raise BadKernel(f"the kernel can't be rebuilt in a worker: {_why(error)}",
                        hint="what it refers to must be importable there too") from error


def _compiled(blob: Any, abi: str) -> native.NativeFunction:
    cfunc = blob.compile()
    return native.NativeFunction(cfunc.address, abi, blob.__qualname__, cfunc)

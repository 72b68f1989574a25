"""Calls Python kernels on arrays: the same code in a worker, on the rank, and inline.

A kernel with a parameter `out` writes its result there; for any other,
`out[...] = kernel(*inputs)`, where that loses nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rfaas_mpi.errors import KernelError

__all__ = ["PythonCall", "Thunk"]

Thunk = Callable[[], "tuple[int, ...] | None"]
"""Runs a kernel once on the arrays it was bound to; bytes of each output, or None: all of them."""


class PythonCall:
    """A Python function and what is known of its arguments before there are any.

    `scalar`: which inputs have the shape () and are passed as numpy's scalars,
    read anew at each call.
    """

    def __init__(self, function: Callable[..., Any], name: str, wants_out: bool, scalar: tuple[bool, ...],
                 n_out: int) -> None:
        self._function = function
        self._name = name
        self._wants_out = wants_out
        self._n_out = n_out
        self._make = _template(scalar, n_out, wants_out)

    def bind(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Thunk:
        """A function without parameters that runs the kernel once on these arrays.

        It raises what the kernel raises, and KernelError where a result has not
        its output's shape, or would lose more than precision in its dtype.
        """
        if self._wants_out:
            out: Any = outputs[0] if self._n_out == 1 else tuple(outputs)
            check = functools.partial(_check_returned, self._name, tuple(outputs))
            return self._make(self._function, inputs, out, check, None, None)
        if self._n_out == 1:
            out = outputs[0]
            store = functools.partial(_store, self._name, "its result", out)
            return self._make(self._function, inputs, out, store, out.dtype, out.shape)
        store_all = functools.partial(_store_all, self._name, tuple(outputs))
        return self._make(self._function, inputs, None, store_all, None, None)


@functools.lru_cache(maxsize=256)
def _template(scalar: tuple[bool, ...], n_out: int, wants_out: bool) -> Callable[..., Thunk]:
    """A maker of thunks for this pattern of arguments.

    As source, because a call with its arguments spelled out takes half the time
    of one with `*inputs`, and this is the path of a microsecond.
    """
    names = [f"a{index}" for index in range(len(scalar))]
    call = ", ".join(f"{arg}[()]" if is_scalar else arg for arg, is_scalar in zip(names, scalar, strict=True))
    if wants_out:
        body = f"""
        r = function({call}{", " if call else ""}out=out)
        if r is not None and r is not out:
            check(r)"""
    elif n_out == 1:
        body = f"""
        r = function({call})
        if type(r) is ndarray and r.dtype is dtype and r.shape == shape:
            out[...] = r
        else:
            check(r)"""
    else:
        body = f"""
        check(function({call}))"""
    source = f"""
def make(function, inputs, out, check, dtype, shape):
    {"".join(f"{arg}, " for arg in names)}{"= inputs" if names else "pass"}
    def thunk():{body}
    return thunk
"""
    # Under our own name, so that remote tracebacks begin with the kernel.
    scope: dict[str, Any] = {"__name__": __name__, "ndarray": np.ndarray}
    exec(compile(source, f"<thunk of {__name__}>", "exec"), scope)
    return scope["make"]


def _store(name: str, what: str, out: np.ndarray, result: Any) -> None:
    """out[...] = result where that loses nothing; KernelError otherwise."""
    if result is None:
        raise KernelError(f"kernel {name} returned None for {what}",
                          hint="return an array, or give the kernel a parameter named out and write to it")
    try:
        array = np.asarray(result)
    except ValueError as error:
        raise KernelError(f"kernel {name} returned for {what} what is no array: {error}") from error
    if array.shape != out.shape and not array.size == out.size == 1:
        raise KernelError(f"kernel {name} returned shape {array.shape} for {what}, and the output has {out.shape}",
                          hint="return exactly that shape, or write to a parameter named out")
    try:
        if type(result) is int or type(result) is bool:
            out[...] = result                # numpy checks the range of Python's own integers
        else:
            np.copyto(out, array.reshape(out.shape), casting="same_kind")
    except (TypeError, OverflowError, ValueError) as error:
        raise KernelError(f"kernel {name} returned {array.dtype} for {what}, which does not fit the output's "
                          f"{out.dtype}: {error}",
                          hint="convert it in the kernel, or pass an output of its dtype") from error


def _store_all(name: str, outputs: tuple[np.ndarray, ...], result: Any) -> None:
    if not outputs:
        return
    if not isinstance(result, (tuple, list)) or len(result) != len(outputs):
        got = f"{len(result)} results" if isinstance(result, (tuple, list)) else f"one {type(result).__name__}"
        raise KernelError(f"kernel {name} returned {got} for {len(outputs)} outputs",
                          hint=f"return a tuple of {len(outputs)} arrays")
    for index, (out, item) in enumerate(zip(outputs, result, strict=True)):
        _store(name, f"result {index}", out, item)


def _check_returned(name: str, outputs: tuple[np.ndarray, ...], result: Any) -> None:
    """A kernel with a parameter `out` may return out; an array of its own would be lost in silence."""
    for item in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(item, np.ndarray) and not any(np.may_share_memory(item, out) for out in outputs):
            raise KernelError(f"kernel {name} has a parameter out, but returned another array of shape {item.shape}",
                              hint="write the result with out[...] = result, or drop the parameter")

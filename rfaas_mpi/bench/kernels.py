"""The kernels that are measured: as little work as possible, so that what is left is the invocation."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from rfaas_mpi.bench import raw
from rfaas_mpi.kernels import Kernel, kernel


@cache
def native_copy() -> Kernel:
    """Copies its input to its output, in C."""
    return Kernel.from_library(raw.LIBRARY, "rfm_bench_copy")


@cache
def native_double() -> Kernel:
    """y = 2x, in C: the machine code that the bare processes run too."""
    return Kernel.from_library(raw.LIBRARY, "rfm_bench_double")


@cache
def native_iterate() -> Kernel:
    """As many rounds of a multiplication and an addition for each value as its second input says, in C."""
    return Kernel.from_library(raw.LIBRARY, "rfm_bench_iterate")


@kernel
def numpy_iterate(x: np.ndarray, rounds: np.ndarray, out: np.ndarray) -> None:
    """The same in numpy, a few thousand values at a time."""
    out[:] = x
    for first in range(0, len(out), 4096):
        part = out[first:first + 4096]
        for _ in range(int(rounds[0])):
            np.multiply(part, 0.5, out=part)
            np.add(part, 1.0, out=part)


@kernel
def python_copy(x: np.ndarray, out: np.ndarray) -> None:
    """Copies its input to its output, in Python."""
    out[:] = x


def add(a: int, b: int) -> int:
    """An object kernel: two ints there, one back."""
    return a + b


def double_array(values: np.ndarray) -> Any:
    """An object kernel: an array there, an array back."""
    return 2.0 * values

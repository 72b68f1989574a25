"""Runs kernels in this process, with the semantics that they have in a worker."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rfaas_mpi import codec
from rfaas_mpi.errors import BadKernel
from rfaas_mpi.types import Outcome

if TYPE_CHECKING:
    from rfaas_mpi.kernels import Kernel

__all__ = ["as_kernel", "inside_kernel", "run_buffers", "run_object"]

_here = threading.local()


def inside_kernel() -> bool:
    """True in a thread that is running a kernel for an executor of this process."""
    return getattr(_here, "depth", 0) > 0


class as_kernel:
    """What is run here is a kernel: `inside_kernel` is true meanwhile."""

    __slots__ = ()

    def __enter__(self) -> None:
        _here.depth = getattr(_here, "depth", 0) + 1

    def __exit__(self, *_error: object) -> None:
        _here.depth -= 1


def run_buffers(kernel: Kernel, inputs: tuple[Any, ...],
                outputs: tuple[np.ndarray, ...]) -> tuple[Outcome, bytes]:
    """Runs a kernel on buffers; its outcome and, where it failed, the error as bytes.

    Ctrl-C goes through: it is meant for the rank.
    """
    try:
        with as_kernel():
            kernel.run(inputs, outputs)
    except KeyboardInterrupt:
        raise
    except BadKernel as error:
        return Outcome.BAD_KERNEL, codec.dumps_error(error)
    except BaseException as error:
        return Outcome.KERNEL_ERROR, codec.dumps_error(error)
    return Outcome.OK, b""


def run_object(fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Outcome, Any]:
    """Calls `fn` with copies of the arguments; its outcome, and the result's parts or the error as bytes."""
    try:
        parts, _ = codec.dumps_call(args, kwargs)
        copied_args, copied_kwargs = codec.loads_call([bytearray(part) for part in parts])
        with as_kernel():
            value = fn(*copied_args, **copied_kwargs)
        # A copy: a kernel may return what it, or somebody else here, still holds.
        return Outcome.OK, [bytearray(part) for part in codec.dumps_result(value)]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Outcome.KERNEL_ERROR, codec.dumps_error(error)

"""What the data plane asks of Python in a worker: load kernels, bind them, run them, describe errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rfaas_mpi import codec, fabric, kernels
from rfaas_mpi.calling import PythonCall, Thunk
from rfaas_mpi.cells import Cells
from rfaas_mpi.errors import BadKernel
from rfaas_mpi.native import NativeFunction

__all__ = ["Handlers"]


class _Bound:
    """A Python kernel and the shapes it was bound to."""

    def __init__(self, function: Callable[..., Any], binding: codec.Binding) -> None:
        self._inputs = tuple((arg.shape, codec.dtype_of(arg.dtype)) for arg in binding.inputs)
        self._outputs = tuple((arg.shape, codec.dtype_of(arg.dtype)) for arg in binding.outputs)
        self._call = PythonCall(function, kernels.short_name(function), kernels.takes_out(function),
                                tuple(shape == () for shape, _ in self._inputs), len(self._outputs))

    def views(self, inputs: Sequence[memoryview], outputs: Sequence[memoryview]) -> Thunk:
        """Runs the kernel once on this memory; inputs become read-only arrays."""
        return self._call.bind(
            [np.ndarray(shape, dtype, memory.toreadonly())
             for (shape, dtype), memory in zip(self._inputs, inputs, strict=True)],
            [np.ndarray(shape, dtype, memory) for (shape, dtype), memory in zip(self._outputs, outputs, strict=True)])


# How long a call takes cells from its board before it ends, so that others have their turn.
_TURN_NS = 20_000_000
# It leaves a cell to the others that it would need longer for than they need for all that is left.
_MARGIN = 1.25


class _Divided:
    """A kernel, and the arrays of which it runs the cells that nobody else does; their board is the last output."""

    def __init__(self, kernel: Callable[..., Any] | NativeFunction, binding: codec.Binding,
                 division: codec.Division) -> None:
        self._kernel = kernel
        self._division = division
        self._inputs = tuple((arg.shape, codec.dtype_of(arg.dtype)) for arg in binding.inputs)
        self._outputs = tuple((arg.shape, codec.dtype_of(arg.dtype)) for arg in binding.outputs)
        if len(division.whole) != len(self._inputs) or len(division.moves) != len(self._inputs):
            raise BadKernel("a division says something of other inputs than there are")
        # Inputs that lie elsewhere at each call are copied to where cells look for them.
        self._kept: list[np.ndarray | None] = []
        self._run: tuple[Cells, fabric.Board] | None = None

    def views(self, inputs: Sequence[memoryview], outputs: Sequence[memoryview]) -> Thunk:
        """Runs cells of these arrays until there is none for it."""
        read = [np.ndarray(shape, dtype, memory.toreadonly())
                for (shape, dtype), memory in zip(self._inputs, inputs, strict=True)]
        written = [np.ndarray(shape, dtype, memory)
                   for (shape, dtype), memory in zip(self._outputs, outputs, strict=True)]
        cells, board = self._run = self._run or self._made(read, written)
        fresh = [(kept, array) for kept, array in zip(self._kept, read, strict=True) if kept is not None]

        def thunk() -> None:
            for kept, array in fresh:
                kept[...] = array
            board.join()
            cells.share(board, fabric.monotonic_ns() + _TURN_NS)
        return thunk

    def _made(self, read: Sequence[np.ndarray], written: Sequence[np.ndarray]) -> tuple[Cells, fabric.Board]:
        division, kernel = self._division, self._kernel
        self._kept = [np.empty_like(array) if moves else None
                      for array, moves in zip(read, division.moves, strict=True)]
        read = [array if kept is None else kept for array, kept in zip(read, self._kept, strict=True)]
        *outs, words = written
        how: Any = kernel
        if not isinstance(kernel, NativeFunction):
            scalar = tuple([array.ndim == 0 for array in read] + [True] * division.index)
            how = PythonCall(kernel, kernels.short_name(kernel), kernels.takes_out(kernel), scalar, len(outs)).bind
        return (Cells(how, division.edges, read, division.whole, outs, index=division.index, by_cell=division.by_cell,
                      rowwise=division.rowwise),
                fabric.Board(words, division.edges, division.who, _MARGIN))


class Handlers:
    """Implements fabric's WorkerHandlers. `flush` is called after each kernel that is not native, and says if it wrote."""

    def __init__(self, flush: Callable[[], bool]) -> None:
        self.after_call = flush
        # Libraries stay loaded until the worker ends: they may have left
        # threads and pointers of theirs behind.
        self._libraries: list[NativeFunction] = []

    def load_kernel(self, kind: int, digest: bytes, blob: memoryview) -> object:
        """The callable or NativeFunction in a blob. Raises BadKernel as `kernels.load_blob` does."""
        packed, loaded = kernels.load_blob(digest, blob)
        if packed != kind:
            raise BadKernel(f"a kernel of kind {packed} was announced as one of kind {kind}")
        if isinstance(loaded, NativeFunction):
            self._libraries.append(loaded)
        return loaded

    def kernel_name(self, kernel: object) -> bytes:
        """What the accounts call it."""
        return kernels.full_name(kernel).encode(errors="replace")

    def bind(self, kernel: object, meta: bytes, n_in: int, n_out: int) -> int | object:
        """A native kernel's address, or an object with `views`. BadKernel where kernel and arguments don't fit."""
        if isinstance(kernel, NativeFunction) and not meta:
            if kernel.abi == "plain" and (n_in, n_out) != (1, 1):
                raise BadKernel(f"kernel {kernel.name} has the plain ABI, which takes one input and one output, not "
                                f"{n_in} and {n_out}", hint='write it for the "rfm" ABI')
            return kernel.address
        assert callable(kernel)
        binding = codec.decode_binding(meta)
        if (len(binding.inputs), len(binding.outputs)) != (n_in, n_out):
            raise BadKernel(f"{n_in} inputs and {n_out} outputs were announced, and {len(binding.inputs)} and "
                            f"{len(binding.outputs)} described")
        if binding.division is not None:
            return _Divided(kernel, binding, binding.division)
        return _Bound(kernel, binding)

    def run_object(self, kernel: object, parts: Sequence[memoryview], refs: Sequence[memoryview]) -> list[Any]:
        """The parts of what the callable returns. Raises what it raises."""
        assert callable(kernel)
        args, kwargs = codec.loads_call(parts, refs)
        return codec.dumps_result(kernel(*args, **kwargs))

    def format_error(self, error: BaseException) -> bytes:
        """The error as bytes for the rank; never raises."""
        return codec.dumps_error(error)

"""Cells: the parts of a kernel's arrays that are run one by one, laid out once, wherever they are run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rfaas_mpi.calling import Thunk
from rfaas_mpi.native import NativeFunction

if TYPE_CHECKING:
    from rfaas_mpi.fabric import Board, Calls

__all__ = ["Cells"]

# Different calls of a kernel that are kept laid out.
_MOST_THUNKS = 4096


class Cells:
    """A kernel on arrays that are cut along their first axis: cell k is rows edges[k] to edges[k + 1].

    `whole` says which inputs go to each cell as they are. With `index` each cell
    has one more input, the number of its first row. `by_cell`: outputs have a row
    for each cell, instead of being cut as the inputs are. `rowwise`: cells that
    follow each other are run by one call, as no row's result depends on which
    other rows its call has; native kernels, whose calls cost next to nothing,
    are called for each cell all the same. `kernel` is a native function, or what
    binds a Python one to arrays.
    """

    def __init__(self, kernel: NativeFunction | Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], Thunk],
                 edges: Sequence[int], read: Sequence[np.ndarray], whole: Sequence[bool],
                 written: Sequence[np.ndarray], *, index: bool, by_cell: bool,
                 rowwise: bool = False) -> None:
        self.edges = edges
        self.rowwise = rowwise and not isinstance(kernel, NativeFunction)
        self._kernel = kernel
        self._read = tuple(read)
        self._whole = tuple(whole)
        self._written = tuple(written)
        self._index = index
        self._by_cell = by_cell
        self._calls = self._laid_out(kernel) if isinstance(kernel, NativeFunction) else None
        # Of a Python kernel, by the first cell and the one behind the last.
        self._thunks: dict[tuple[int, int], Thunk] = {}

    def __len__(self) -> int:
        return len(self.edges) - 1

    def arguments(self, cell: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Inputs and outputs of a cell: views, never copies."""
        return self._arguments(cell, cell + 1)

    def _arguments(self, first: int, stop: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        part = slice(self.edges[first], self.edges[stop])
        read = [array if is_whole else array[part] for array, is_whole in zip(self._read, self._whole, strict=True)]
        if self._index:
            read.append(np.array(part.start, np.int64))
        if self._by_cell:
            # One row of results; a cell of shape () is still an array to write to.
            return tuple(read), tuple([array[first:stop].reshape(array.shape[1:] or (1,))
                                       for array in self._written])
        return tuple(read), tuple([array[part] for array in self._written])

    def run(self, first: int, stop: int) -> None:
        """Runs cells first to stop, one after the other or by one call. Raises what the kernel raises."""
        if self._calls is not None:
            self._calls.run(first, stop)
        elif self.rowwise:
            if first < stop:
                self._thunk(first, stop)()
        else:
            for cell in range(first, stop):
                self._thunk(cell, cell + 1)()

    def share(self, board: Board, until_ns: int) -> bool:
        """Runs cells that it takes from the board until there is none for it (True), or that moment has come (False).

        Raises what the kernel raises; nobody takes another cell then.
        """
        if self._calls is not None:
            return self._calls.share(board, until_ns)
        clock, thunks = time.monotonic_ns, self._thunks
        now = clock()
        try:
            if self.rowwise:
                while now < until_ns:
                    first, stop = cells = board.take_some(now)
                    if first < 0:
                        return True
                    (thunks.get(cells) or self._thunk(first, stop))()
                    end = clock()
                    board.done_some(first, stop, end - now)
                    now = end
                return False
            while now < until_ns:
                cell = board.take(now)
                if cell < 0:
                    return True
                (thunks.get((cell, cell + 1)) or self._thunk(cell, cell + 1))()
                end = clock()
                board.done(cell, end - now)
                now = end
        except BaseException:
            board.close()
            raise
        return False

    def _thunk(self, first: int, stop: int) -> Thunk:
        thunk = self._thunks.get((first, stop))
        if thunk is None:
            read, written = self._arguments(first, stop)
            assert not isinstance(self._kernel, NativeFunction)
            if len(self._thunks) >= _MOST_THUNKS:
                self._thunks.clear()
            thunk = self._thunks[first, stop] = self._kernel([_read_only(array) for array in read], written)
        return thunk

    def _laid_out(self, function: NativeFunction) -> Calls:
        """All calls of a native kernel, which run without a step of Python's between them."""
        from rfaas_mpi.fabric import Calls
        given = [(*_span(array), 0 if is_whole else _row_bytes(array), 0)
                 for array, is_whole in zip(self._read, self._whole, strict=True)]
        keep = [function, *self._read, *self._written]
        if self._index:
            starts = np.array(self.edges[:-1], np.int64)
            given.append((*_span(starts), 0, 8))
            keep.append(starts)
        outs = [(*_span(array), 0, _row_bytes(array)) if self._by_cell else (*_span(array), _row_bytes(array), 0)
                for array in self._written]
        return Calls(function.address, function.abi == "plain", function.name, self.edges, [*given, *outs],
                     len(outs), keep)


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _row_bytes(array: np.ndarray) -> int:
    return array.nbytes // len(array)


def _span(array: np.ndarray) -> tuple[int, int]:
    return array.__array_interface__["data"][0], array.nbytes

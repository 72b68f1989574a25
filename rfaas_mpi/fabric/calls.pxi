# Native kernels on the rank: calls whose arguments were laid out before, run in a row without the GIL.

cdef uint64_t CALLS_NS = 20000000      # how long calls follow each other without looking for signals
cdef int32_t OVERRUN = -2147483648     # no status of a kernel's: `failed` looks at what it wrote


@cython.final
@cython.no_gc
cdef class Calls:
    """A native kernel's calls on memory of this process, one for each cell of a grid.

    `arguments`: inputs, then `n_out` outputs, each (address, bytes, bytes for each row of the grid, bytes for
    each cell): cut as the grid is, or one piece for each cell, or, with neither, the same for each cell as it
    is. `keep` is what keeps them where they are, and the kernel.
    """

    cdef c.rfm_call *calls
    cdef c.rfm_buf *bufs
    cdef Py_ssize_t n_cells
    cdef uint32_t n_in
    cdef uint32_t n_out
    cdef uintptr_t address
    cdef bint plain
    cdef object keep
    cdef str name

    def __cinit__(self, uintptr_t address, bint plain, str name not None, edges, arguments, uint32_t n_out, object keep):
        cdef Py_ssize_t n_args = len(arguments)
        cdef Py_ssize_t cells = len(edges) - 1
        cdef Py_ssize_t k, i
        cdef uint64_t first, size, by_row, by_cell, begin, stop
        cdef c.rfm_buf *buf
        self.n_out = n_out
        self.n_in = <uint32_t>(n_args - n_out)
        self.n_cells = cells
        self.address = address
        self.plain = plain
        self.name = name
        self.keep = keep
        if plain and (self.n_in != 1 or n_out != 1):
            raise errors.BadKernel(
                f"kernel {name} has the plain ABI, which takes one input and one output, not {self.n_in} and {n_out}",
                hint='write it for the "rfm" ABI')
        self.calls = <c.rfm_call *>PyMem_Calloc(cells + 1, sizeof(c.rfm_call))
        self.bufs = <c.rfm_buf *>PyMem_Calloc(cells * n_args + 1, sizeof(c.rfm_buf))
        if self.calls == NULL or self.bufs == NULL:
            raise MemoryError()
        for i in range(n_args):
            first, size, by_row, by_cell = arguments[i]
            begin = 0
            stop = 0
            for k in range(cells):
                buf = &self.bufs[k * n_args + i]
                if by_row:
                    begin = stop if k else <uint64_t>edges[0]
                    stop = <uint64_t>edges[k + 1]
                    buf.ptr = <void *>(first + begin * by_row)
                    buf.capacity = (stop - begin) * by_row
                elif by_cell:
                    buf.ptr = <void *>(first + <uint64_t>k * by_cell)
                    buf.capacity = by_cell
                else:
                    buf.ptr = <void *>first
                    buf.capacity = size
                if (by_row and stop > size // by_row) or <uint64_t>buf.ptr + buf.capacity > first + size:
                    raise ValueError(f"argument {i} has no rows for cell {k}")
                buf.size = buf.capacity
        for k in range(cells):
            self.calls[k].version = 1
            self.calls[k].n_in = self.n_in
            self.calls[k].n_out = n_out
            self.calls[k].inputs = &self.bufs[k * n_args]
            self.calls[k].outputs = &self.bufs[k * n_args + self.n_in]

    def run(self, Py_ssize_t first, Py_ssize_t stop):
        """Runs the kernel on cells first to stop, one after the other; KernelError as a worker would raise it."""
        cdef uint64_t until
        cdef int32_t status = 0
        cdef Py_ssize_t at = first
        if not 0 <= first <= stop <= self.n_cells:
            raise IndexError(f"cells {first} to {stop} of {self.n_cells}")
        while at < stop:
            with nogil:
                until = c.rfm_now_ns() + CALLS_NS
                while at < stop:
                    status = self.one(&self.calls[at])
                    at += 1
                    if status < 0 or c.rfm_now_ns() >= until:
                        break
            if status < 0:
                self.failed(at - 1, status)
            PyErr_CheckSignals()

    def share(self, Board board not None, uint64_t until_ns):
        """Runs cells that it takes from the board, until there is none for it (True) or that moment has come (False).

        KernelError as a worker would raise it; nobody takes another cell then.
        """
        cdef uint64_t n = board.share.n
        cdef uint64_t now, end, until, at = n
        cdef int32_t status = 0
        if <Py_ssize_t>n != self.n_cells:
            raise ValueError(f"a board of {n} cells, and calls of {self.n_cells}")
        now = c.rfm_now_ns()
        while now < until_ns:
            with nogil:
                until = min(until_ns, now + CALLS_NS)
                while now < until:
                    at = c.rfm_share_take(&board.share, now)
                    if at >= n:
                        break
                    status = self.one(&self.calls[at])
                    if status < 0:
                        break
                    end = c.rfm_now_ns()
                    c.rfm_share_done(&board.share, at, end - now)
                    now = end
            if status < 0:
                board.close()
                self.failed(at, status)
            PyErr_CheckSignals()
            if at >= n:
                return True
        return False

    cdef inline int32_t one(self, c.rfm_call *call) noexcept nogil:
        """What the kernel returned; OVERRUN if it says that it wrote more than there was room for."""
        cdef int32_t status
        cdef uint32_t i
        for i in range(self.n_out):
            call.outputs[i].size = call.outputs[i].capacity
        if self.plain:
            call.outputs[0].size = (<c.rfm_plain_fn *>self.address)(
                call.inputs[0].ptr, <uint32_t>call.inputs[0].size, call.outputs[0].ptr)
        else:
            status = (<c.rfm_kernel_fn *>self.address)(call)
            if status < 0:
                return status
        for i in range(self.n_out):
            if call.outputs[i].size > call.outputs[i].capacity:
                return OVERRUN
        return 0

    cdef int failed(self, Py_ssize_t at, int32_t status) except -1:
        cdef c.rfm_buf *out
        for i in range(self.n_out):
            out = &self.calls[at].outputs[i]
            if status == OVERRUN and out.size > out.capacity:
                raise errors.KernelError(f"kernel {self.name} says that it wrote {out.size} bytes to output {i}, "
                                         f"which holds {out.capacity}")
        raise errors.KernelError(f"kernel {self.name} returned {status}")

    def __dealloc__(self):
        PyMem_Free(self.calls)
        PyMem_Free(self.bufs)

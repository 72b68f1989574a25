# Boards: cells that a rank and its workers take from, in memory that they share.

cdef enum:
    BOARD_HEAD_WORDS = 8


@cython.final
@cython.no_gc
cdef class Board:
    """A board, as one of those sees it who take cells from it. Not for several threads at once.

    `words`: a writable buffer of `Board.words(cells)` uint64, shared. `edges`: cell k is rows edges[k] to
    edges[k + 1]. `who`: 0 is the rank. `margin`: it leaves a cell to the others if it would need so many times what
    they need for all that is left.
    """

    cdef c.rfm_share share
    cdef uint64_t *edges
    cdef object keep

    def __cinit__(self, words, edges, uint64_t who, double margin):
        cdef Py_ssize_t n = len(edges) - 1
        cdef Py_ssize_t k
        cdef Py_buffer view
        if n < 0:
            raise ValueError("no edges are no board")
        self.edges = <uint64_t *>PyMem_Calloc(n + 1, sizeof(uint64_t))
        if self.edges == NULL:
            raise MemoryError()
        for k in range(n + 1):
            self.edges[k] = edges[k]
            if k and self.edges[k] < self.edges[k - 1]:
                raise ValueError(f"edges[{k}] = {edges[k]} lies before the one before it")
        PyObject_GetBuffer(words, &view, PyBUF_WRITABLE)
        try:
            if <uint64_t>view.len < (BOARD_HEAD_WORDS + n) * sizeof(uint64_t) or <uintptr_t>view.buf % 8:
                raise ValueError(f"{view.len} bytes at {<uintptr_t>view.buf:#x} are no board of {n} cells")
            self.share.board = <c.rfm_board *>view.buf
        finally:
            PyBuffer_Release(&view)
        self.keep = words
        self.share.edges = self.edges
        self.share.n = n
        self.share.who = who
        self.share.margin = margin

    @staticmethod
    def words(cells):
        """How many uint64 a board of so many cells has."""
        return BOARD_HEAD_WORDS + cells

    def open(self, uint64_t now_ns=0, *, uint64_t least=0, uint64_t parts=0):
        """A new piece of work. Nobody may be taking from the board. `now_ns`: 0 is the clock's (CLOCK_MONOTONIC).

        For those who take several cells at once: `least` rows, and `parts` who take.
        """
        c.rfm_share_open(&self.share, now_ns or c.rfm_now_ns(), least, parts)
        self.join()

    def join(self):
        """Begins to take cells: what was run before counts no more."""
        self.share.cells = self.share.rows = self.share.ns = 0

    def close(self):
        """Nobody takes another cell. Safe to call twice."""
        c.rfm_share_close(&self.share)

    def take(self, uint64_t now_ns=0):
        """The cell that is to be run now; -1: none."""
        cdef uint64_t k = c.rfm_share_take(&self.share, now_ns or c.rfm_now_ns())
        return k if k < self.share.n else -1

    def done(self, Py_ssize_t k, uint64_t ns):
        """Cell k was run, in so many ns."""
        if not 0 <= k < <Py_ssize_t>self.share.n:
            raise IndexError(f"cell {k} of {self.share.n}")
        c.rfm_share_done(&self.share, k, ns)

    def take_some(self, uint64_t now_ns=0):
        """The cells that are to be run now, by one call: the first and where they end; (-1, -1): none."""
        cdef uint64_t count = 0
        cdef uint64_t k = c.rfm_share_take_some(&self.share, now_ns or c.rfm_now_ns(), &count)
        if k >= self.share.n:
            return -1, -1
        return k, k + count

    def done_some(self, Py_ssize_t first, Py_ssize_t stop, uint64_t ns):
        """These cells were run by one call, in so many ns."""
        if not 0 <= first < stop <= <Py_ssize_t>self.share.n:
            raise IndexError(f"cells {first} to {stop} of {self.share.n}")
        c.rfm_share_done_some(&self.share, first, stop - first, ns)

    @property
    def left(self):
        """The cells that nobody has run to their end."""
        cdef uint64_t k
        return [k for k in range(self.share.n) if c.rfm_share_look(&self.share, k) == 0]

    @property
    def empty(self):
        """Each cell was taken."""
        return self.share.board.next >= self.share.n

    @property
    def ran(self):
        """Cells, their rows and ns that this one has run since `join`."""
        return self.share.cells, self.share.rows, self.share.ns

    def ran_by(self, uint64_t who):
        """Cells, their rows and ns that somebody has run."""
        cdef uint64_t k, word, cells = 0, rows = 0, ns = 0
        for k in range(self.share.n):
            word = c.rfm_share_look(&self.share, k)
            if word >> c.RFM_BOARD_WHO_SHIFT == who + 1:
                cells += 1
                rows += self.edges[k + 1] - self.edges[k]
                ns += word & c.RFM_BOARD_NS
        return cells, rows, ns

    def calls_by(self, uint64_t who):
        """(rows, ns) of each call by which somebody has run cells, in the cells' order."""
        cdef uint64_t k, word, rows = 0, ns = 0
        cdef list found = []
        for k in range(self.share.n):
            word = c.rfm_share_look(&self.share, k)
            if word >> c.RFM_BOARD_WHO_SHIFT != who + 1:
                continue
            if not word & c.RFM_BOARD_SAME_CALL and rows:
                found.append((rows, ns))
                rows = ns = 0
            rows += self.edges[k + 1] - self.edges[k]
            ns += word & c.RFM_BOARD_NS
        if rows:
            found.append((rows, ns))
        return found

    def __dealloc__(self):
        PyMem_Free(self.edges)

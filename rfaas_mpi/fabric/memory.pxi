# Blocks: pieces of an executor's arenas, as Python buffers.

@cython.final
@cython.no_gc
cdef class Block:
    """A piece of an arena: 64-byte aligned, writable, freed with its last reference.

    Stays valid after Invoker.close().
    """

    cdef c.rfm_block block
    cdef bint live
    cdef int exports
    cdef object __weakref__

    def __init__(self):
        raise TypeError("blocks come from Invoker.alloc")

    @property
    def nbytes(self):
        return self.block.size

    @property
    def arena(self):
        return self.block.arena_id

    @property
    def offset(self):
        return self.block.offset

    @property
    def address(self):
        return <uintptr_t>self.block.address

    def __len__(self):
        return self.block.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        if not self.live:
            raise errors.ClosedError("this block was closed")
        PyBuffer_FillInfo(view, self, self.block.address, <Py_ssize_t>self.block.size, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    def freeze(self):
        """Its bytes stay as they are from now on: workers on other nodes get them once, not with each call."""
        if not self.live:
            raise errors.ClosedError("this block was closed")
        check(c.rfm_heap_constant(&self.block), "a constant")

    def close(self):
        """Give the memory back. Safe to call twice; BufferError while arrays use it."""
        if self.exports:
            raise BufferError("arrays on this block are still in use")
        if self.live:
            self.live = False
            c.rfm_heap_free(&self.block)

    def __dealloc__(self):
        if self.live:
            self.live = False
            c.rfm_heap_free(&self.block)


cdef Block new_block(c.rfm_heap *heap, uint64_t nbytes):
    cdef Block block = Block.__new__(Block)
    cdef int status
    with nogil:
        status = c.rfm_heap_alloc(heap, nbytes, &block.block)
    check(status, f"{nbytes} bytes of memory shared with the workers")
    block.live = True
    return block

# Requests: one invocation at a time, from start to its end.

@cython.final
@cython.no_gc_clear
cdef class Parcel:
    """What an invocation needs while it is in flight: the C request, buffers, staging blocks.

    Outlives the Request that made it if that goes while it is in flight.
    """

    cdef c.rfm_request req
    cdef Binding binding
    cdef Invoker invoker
    cdef c.rfm_reqarg *args
    cdef uint64_t *sizes
    cdef Py_buffer *views
    cdef uint32_t n_views
    cdef uint32_t n_args
    cdef list blocks
    cdef uint8_t *payload

    cdef bint over(self) noexcept:
        return self.req.state != c.RFM_QUEUED and self.req.state != c.RFM_POSTED

    cdef int setup(self, Invoker invoker, uint32_t n_args) except -1:
        self.invoker = invoker
        self.blocks = []
        self.n_args = n_args
        self.args = <c.rfm_reqarg *>PyMem_Calloc(n_args + 1, sizeof(c.rfm_reqarg))
        self.sizes = <uint64_t *>PyMem_Calloc(n_args + 1, sizeof(uint64_t))
        self.views = <Py_buffer *>PyMem_Calloc(n_args + 1, sizeof(Py_buffer))
        if self.args == NULL or self.sizes == NULL or self.views == NULL:
            raise MemoryError()
        return 0

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.n_views):
            PyBuffer_Release(&self.views[i])
        c.rfm_request_fini(&self.req)
        PyMem_Free(self.args)
        PyMem_Free(self.sizes)
        PyMem_Free(self.views)
        free(self.payload)


@cython.no_gc_clear
cdef class Request:
    """One invocation at a time; made by Invoker.request and Invoker.object_request.

    A persistent one can be started again whenever it is not active. Its buffers
    are held from the time it was made until close().
    """

    cdef Parcel parcel
    cdef c.rfm_request *req
    cdef Invoker invoker
    cdef bint staged               # copies before and after each call
    cdef bint finished             # what comes after the end was done
    cdef bint an_object
    cdef bint live
    cdef Block fetched
    cdef object __weakref__

    def __init__(self):
        raise TypeError("requests come from an Invoker")

    # -- facts ------------------------------------------------------------------------------

    @property
    def active(self):
        return self.req.state == c.RFM_QUEUED or self.req.state == c.RFM_POSTED

    @property
    def outcome(self):
        if not c.rfm_request_ended(self.req):
            return c.RFM_PENDING
        if not self.finished:
            self.finish()
        return self.req.outcome

    @property
    def id(self):
        return self.req.id

    @property
    def worker(self):
        return self.req.worker

    @property
    def attempts(self):
        return self.req.attempts

    @property
    def expired(self):
        """Its time limit passed while a worker had it."""
        return self.req.expired != 0

    @property
    def exec_ns(self):
        return self.req.exec_ns

    @property
    def out_bytes(self):
        return self.req.out_bytes

    @property
    def out_sizes(self):
        cdef uint32_t i
        if self.an_object:
            return (self.req.out_bytes,)
        return tuple([self.parcel.sizes[i] for i in range(self.req.binding.n_out)])

    @property
    def detail(self):
        """What the worker says about a failure."""
        if self.fetched is not None:
            return bytes(self.fetched)
        if self.req.result_bytes == 0:
            return b""
        if self.req.result != NULL and self.req.result_bytes > 192:
            return (<char *>self.req.result)[:self.req.result_bytes]
        return (<char *>self.req.small)[:self.req.result_bytes]

    # -- its life ---------------------------------------------------------------------------

    cdef int ready(self) except -1:
        if self.invoker.born != generation:
            raise forked()
        if not self.live or self.invoker.closed:
            raise errors.ClosedError("the request or its executor was closed", hint="make a new one")
        return 0

    cpdef int start(self, object timeout_s=None) except -1:
        """Never blocks: posts to a free slot or queues.

        Raises ClosedError, ForkedError, InvalidBuffer when it is active.
        """
        cdef uint64_t timeout_ns = 0
        cdef int status
        if self.invoker.born != generation or not self.live or self.invoker.closed:
            self.ready()
        if self.req.state == c.RFM_QUEUED or self.req.state == c.RFM_POSTED:
            raise error_of(c.RFM_ERR_BUSY, "this request")
        if timeout_s is not None:
            timeout_ns = nanoseconds(timeout_s)
        if self.staged:
            self.stage_in()
        if self.fetched is not None:
            self.fetched = None
        self.finished = False
        status = c.rfm_request_start(self.req, timeout_ns)
        if status != 0:
            check(status, "this request")
        return 0

    def restart(self):
        """Re-issue after LOST, BUSY or NO_WORKER, with the same id and attempts + 1."""
        self.ready()
        if self.staged:
            self.stage_in()
        self.fetched = None
        self.finished = False
        check(c.rfm_request_restart(self.req), "this request")

    cpdef bint test(self) except -1:
        """Makes progress; True once ended."""
        if not c.rfm_request_ended(self.req):
            if self.req.state == c.RFM_IDLE:
                return False
            if not self.invoker.usable():
                raise forked()
            c.rfm_invoker_progress(self.invoker.ptr)
            if not c.rfm_request_ended(self.req):
                return False
        if not self.finished:
            self.finish()
        return True

    cpdef bint wait(self, object timeout_s=None) except -1:
        """True once ended, False on time-out; interruptible by signals."""
        cdef int i
        if not c.rfm_request_ended(self.req):
            if self.invoker.born != generation:
                raise forked()
            if self.req.state == c.RFM_IDLE:
                raise errors.ClosedError("this request was never started")
            # a few looks with the GIL: cheaper than to give it away for a short kernel
            for i in range(24):
                c.rfm_invoker_progress(self.invoker.ptr)
                if c.rfm_request_ended(self.req):
                    break
            else:
                if not wait_for(self.invoker, &self.req, 1, c.RFM_WAIT_ALL, timeout_s):
                    return False
        if not self.finished:
            self.finish()
        return True

    def cancel(self):
        """True if it was still queued and has now ended CANCELLED."""
        return self.invoker.usable() and c.rfm_request_cancel(self.req) == 0

    def watch(self):
        """Invoker.next_watched will return it once it ended."""
        self.req.owner = <void *>self
        Py_INCREF(self)
        if not c.rfm_request_watch(self.req):
            Py_DECREF(self)

    cdef int stage_in(self) except -1:
        cdef c.rfm_reqarg *arg
        cdef uint32_t i
        for i in range(self.req.binding.n_in):
            arg = &self.req.args[i]
            if arg.stage != NULL:
                if arg.size < COPY_NOGIL:
                    c.rfm_copy(arg.stage, arg.user, arg.size)
                else:
                    with nogil:
                        c.rfm_copy(arg.stage, arg.user, arg.size)
        return 0

    cdef int finish(self) except -1:
        """After the end: staged results to where they belong. Any thread may come first."""
        cdef c.rfm_reqarg *arg
        cdef uint64_t size
        cdef uint32_t i
        if self.staged and self.req.outcome == c.RFM_DONE:
            for i in range(self.req.binding.n_in, self.parcel.n_args):
                arg = &self.req.args[i]
                size = self.parcel.sizes[i - self.req.binding.n_in]
                if arg.stage != NULL and size != 0:
                    if size < COPY_NOGIL:
                        c.rfm_copy(arg.user, arg.stage, size)
                    else:
                        with nogil:
                            c.rfm_copy(arg.user, arg.stage, size)
        self.finished = True
        return 0

    # -- objects ----------------------------------------------------------------------------

    def result(self):
        """Parts of an object result, writable and private."""
        cdef uint64_t n = self.req.result_bytes
        if self.fetched is not None:
            return split_object(self.fetched)
        if n > 192:
            return split_object(bytearray((<char *>self.req.result)[:n]))
        return split_object(bytearray((<char *>self.req.small)[:n]))

    def fetch(self, object timeout_s=None):
        """After LARGE: brings the result here, then the outcome is what the kernel made it.

        False on time-out; the outcome is LOST if the worker ended meanwhile.
        """
        cdef c.rfm_desc into
        if self.req.outcome == c.RFM_LARGE and c.rfm_request_ended(self.req):
            self.ready()
            self.fetched = new_block(self.invoker.heap, self.req.out_bytes)
            into.arena = self.fetched.block.arena_id
            into.flags = 0
            into.offset = self.fetched.block.offset
            into.size = self.fetched.block.size
            check(c.rfm_request_fetch(self.req, &into), "this request")
        return self.wait(timeout_s)

    # -- its end ----------------------------------------------------------------------------

    def close(self):
        """Frees binding, staging memory and buffers; what is in flight is cancelled or ends unseen.

        Safe to call twice.
        """
        if self.live:
            self.live = False
            self.drop()

    cdef void drop(self):
        if not self.invoker.usable():
            return
        if not self.parcel.over():
            c.rfm_request_cancel(self.req)
        if not self.parcel.over():
            self.invoker.orphans.append(self.parcel)
        else:
            c.rfm_request_discard(self.req)

    def __dealloc__(self):
        if self.live and self.invoker is not None:
            self.live = False
            self.drop()


cdef uint64_t aligned_part(uint64_t at, uint64_t size) noexcept nogil:
    if size >= 64:
        return (at + 63) & ~<uint64_t>63
    return (at + 7) & ~<uint64_t>7


cdef list split_object(object owner):
    """The parts of an object payload; owner is a writable buffer that holds it."""
    cdef Py_buffer view
    cdef const uint8_t *base
    cdef uint16_t n_parts, n_refs
    cdef uint64_t at, size
    cdef uint32_t i
    cdef list parts = []
    memory = memoryview(owner)
    PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
    try:
        base = <const uint8_t *>view.buf
        if <uint64_t>view.len < 8:
            raise errors.TransportError("an object payload that is too short")
        memcpy(&n_parts, base, 2)
        memcpy(&n_refs, base + 2, 2)
        at = 8 + 8 * <uint64_t>n_parts + 24 * <uint64_t>n_refs
        if at > <uint64_t>view.len:
            raise errors.TransportError("an object payload that is too short")
        for i in range(n_parts):
            memcpy(&size, base + 8 + 8 * i, 8)
            at = aligned_part(at, size)
            if at > <uint64_t>view.len or size > <uint64_t>view.len - at:
                raise errors.TransportError("an object payload that is too short")
            parts.append(memory[at:at + size])
            at += size
    finally:
        PyBuffer_Release(&view)
    return parts


@cython.final
@cython.no_gc
cdef class PartList:
    """Buffers of the parts of an object, pinned while it is written."""

    cdef Py_buffer *views
    cdef uint32_t n
    cdef uint64_t total
    cdef uint32_t n_refs
    cdef c.rfm_desc *refs

    def __cinit__(self, parts, refs):
        cdef uint32_t n_parts = len(parts)
        cdef c.rfm_desc *ref
        if n_parts > 65535 or len(refs) > 65535:
            raise errors.InvalidBuffer(f"an object of {n_parts} buffers", hint="pass fewer arrays at once")
        self.views = <Py_buffer *>PyMem_Calloc(n_parts + 1, sizeof(Py_buffer))
        self.refs = <c.rfm_desc *>PyMem_Calloc(len(refs) + 1, sizeof(c.rfm_desc))
        if self.views == NULL or self.refs == NULL:
            raise MemoryError()
        self.total = 8 + 8 * <uint64_t>n_parts + 24 * <uint64_t>len(refs)
        for part in parts:
            PyObject_GetBuffer(part, &self.views[self.n], PyBUF_SIMPLE)
            self.total = aligned_part(self.total, self.views[self.n].len) + self.views[self.n].len
            self.n += 1
        for arena, offset, nbytes in refs:
            ref = &self.refs[self.n_refs]
            ref.arena = arena
            ref.offset = offset
            ref.size = nbytes
            self.n_refs += 1

    cdef void write(self, uint8_t *to) noexcept nogil:
        cdef uint16_t counts[4]
        cdef uint64_t at
        cdef uint64_t size
        cdef uint32_t i
        counts[0] = <uint16_t>self.n
        counts[1] = <uint16_t>self.n_refs
        counts[2] = 0
        counts[3] = 0
        memcpy(to, counts, 8)
        at = 8 + 8 * <uint64_t>self.n
        memcpy(to + at, self.refs, 24 * <uint64_t>self.n_refs)
        at += 24 * <uint64_t>self.n_refs
        for i in range(self.n):
            size = self.views[i].len
            memcpy(to + 8 + 8 * i, &size, 8)
            at = aligned_part(at, size)
            memcpy(to + at, self.views[i].buf, size)
            at += size

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.n):
            PyBuffer_Release(&self.views[i])
        PyMem_Free(self.views)
        PyMem_Free(self.refs)


cdef Request new_request(Invoker invoker, Parcel parcel, Binding binding):
    cdef Request request = Request.__new__(Request)
    parcel.binding = binding
    c.rfm_request_init(&parcel.req, invoker.ptr, binding.ptr, parcel.args, parcel.sizes)
    request.parcel = parcel
    request.req = &parcel.req
    request.invoker = invoker
    request.live = True
    return request


cdef Request make_object_request(Invoker invoker, KernelRef kernel, parts, refs):
    cdef PartList list_ = PartList(parts, refs)
    cdef Parcel parcel = Parcel.__new__(Parcel)
    cdef c.rfm_desc *desc
    cdef c.rfm_arg args[2]
    cdef Request request
    cdef Binding binding
    cdef Block block
    cdef bint stage = list_.total > invoker.slot_bytes
    cdef uint8_t *to
    parcel.setup(invoker, 2)
    memset(args, 0, sizeof(args))
    binding = invoker.shared_binding(kernel, c.RFM_BIND_OBJECT, 1, 1, args, b"")
    request = new_request(invoker, parcel, binding)
    request.an_object = True
    parcel.payload = <uint8_t *>malloc(sizeof(c.rfm_desc) if stage else list_.total)
    if parcel.payload == NULL:
        raise MemoryError()
    if stage:
        block = new_block(invoker.heap, list_.total)
        parcel.blocks.append(block)
        to = <uint8_t *>block.block.address
        if list_.total < COPY_NOGIL:
            list_.write(to)
        else:
            with nogil:
                list_.write(to)
        desc = <c.rfm_desc *>parcel.payload
        desc.arena = block.block.arena_id
        desc.flags = 0
        desc.offset = block.block.offset
        desc.size = block.block.size
        parcel.req.wire_flags = c.RFM_REQ_OBJECT | c.RFM_REQ_STAGED
        parcel.req.payload_bytes = sizeof(c.rfm_desc)
    else:
        list_.write(parcel.payload)
        parcel.req.wire_flags = c.RFM_REQ_OBJECT
        parcel.req.payload_bytes = list_.total
    parcel.req.payload = parcel.payload
    return request


cdef Request buffers_request(Invoker invoker, KernelRef kernel, tuple inputs, tuple outputs,
                             bytes meta, bint persistent):
    cdef uint32_t n_in = len(inputs)
    cdef uint32_t n_out = len(outputs)
    cdef uint32_t n = n_in + n_out
    cdef c.rfm_arg args[64]
    cdef Parcel parcel
    cdef Request request
    cdef Binding binding
    cdef Py_buffer *view
    cdef Block block
    cdef bint staged = False
    cdef uint64_t budget
    cdef uint32_t arena = 0
    cdef uint64_t offset = 0
    cdef cbool at_end = False
    cdef uint32_t i
    if n > c.RFM_MAX_ARGS:
        raise errors.InvalidBuffer(f"{n} arrays in one invocation; at most {c.RFM_MAX_ARGS} are possible",
                                   hint="put them into fewer arrays")
    parcel = Parcel.__new__(Parcel)
    parcel.setup(invoker, n)
    memset(args, 0, sizeof(args))
    for i in range(n):
        view = &parcel.views[i]
        if i < n_in:
            PyObject_GetBuffer(inputs[i], view, PyBUF_SIMPLE)
        else:
            PyObject_GetBuffer(outputs[i - n_in], view, PyBUF_WRITABLE)
        parcel.n_views = i + 1
        parcel.args[i].user = view.buf
        parcel.args[i].size = view.len
        args[i].size = view.len
        # each direction shares its slot; the rest is for alignment and descriptors
        budget = (invoker.slot_bytes - 24 * n) // (n_in if i < n_in else n_out)
        budget = budget - 128 if budget > 128 else 0
        if args[i].size <= c.RFM_INLINE_BYTES:
            args[i].place = c.RFM_INLINE
        elif c.rfm_heap_locate(invoker.heap, view.buf, view.len, &arena, &offset, &at_end):
            args[i].place = c.RFM_BOUND if persistent else c.RFM_CALL
            parcel.args[i].desc.arena = arena
            parcel.args[i].desc.offset = offset
            parcel.args[i].desc.flags = c.RFM_ARG_CANARY if at_end and i >= n_in else 0
        elif args[i].size <= budget:
            args[i].place = c.RFM_INLINE
        else:
            block = new_block(invoker.heap, args[i].size)
            parcel.blocks.append(block)
            staged = True
            args[i].place = c.RFM_BOUND if persistent else c.RFM_CALL
            parcel.args[i].stage = block.block.address
            parcel.args[i].desc.arena = block.block.arena_id
            parcel.args[i].desc.offset = block.block.offset
            parcel.args[i].desc.flags = c.RFM_ARG_CANARY if i >= n_in else 0
        parcel.args[i].desc.size = args[i].size
        if args[i].place == c.RFM_BOUND:
            args[i].arena = parcel.args[i].desc.arena
            args[i].offset = parcel.args[i].desc.offset
            args[i].flags = parcel.args[i].desc.flags
    if persistent:
        binding = invoker.bind(kernel, 0, n_in, n_out, args, meta)
    else:
        binding = invoker.shared_binding(kernel, 0, n_in, n_out, args, meta)
    request = new_request(invoker, parcel, binding)
    request.staged = staged
    return request

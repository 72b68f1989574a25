# The worker side: events of the C loop, handed to Python handlers.

cdef enum:
    SAME_IN_ALL_SLOTS = 0x100


@cython.final
@cython.no_gc_clear
cdef class _Bound:
    """A binding of a kernel that isn't native: its views, made once where they can be."""

    cdef object kernel
    cdef object target             # has views(inputs, outputs) -> thunk
    cdef list thunks               # by slot

    cdef object make(self, c.rfm_event *ev):
        cdef uint32_t i
        cdef list inputs = []
        cdef list outputs = []
        for i in range(ev.n_in):
            inputs.append(view_of(&ev.bufs[i], False))
        for i in range(ev.n_in, <uint32_t>ev.n_in + ev.n_out):
            outputs.append(view_of(&ev.bufs[i], True))
        return self.target.views(tuple(inputs), tuple(outputs))

    cdef object thunk(self, c.rfm_event *ev):
        cdef uint32_t index = 0 if (ev.flags & SAME_IN_ALL_SLOTS) else ev.slot
        if not ev.fixed:
            return self.make(ev)
        if self.thunks is None:
            self.thunks = [None] * 64
        found = self.thunks[index]
        if found is None:
            found = self.thunks[index] = self.make(ev)
        return found


cdef uint8_t nowhere = 0


cdef object view_of(c.rfm_buf *buf, bint writable):
    # 0x100 / 0x200: PyBUF_READ / PyBUF_WRITE
    if buf.ptr == NULL or buf.capacity == 0:
        return PyMemoryView_FromMemory(<char *>&nowhere, 0, 0x200 if writable else 0x100)
    return PyMemoryView_FromMemory(<char *>buf.ptr, buf.capacity, 0x200 if writable else 0x100)


cdef class Worker:
    """Runs kernels for the ranks that the agent hands over; see WorkerHandlers in _fabric.pyi."""

    cdef c.rfm_worker *ptr
    cdef object handlers
    cdef dict objects              # (connection, 'k' | 'b', number) -> kept alive for C
    cdef dict kept                 # (connection, id) -> result that the rank will fetch

    def __init__(self, int agent_fd, int page_fd, handlers, *, unsigned int spin_us=1000, int cpu=-1,
                 int output_fd=0):
        cdef c.rfm_worker_attr attr
        attr.agent_fd = agent_fd
        attr.page_fd = page_fd
        attr.spin_us = spin_us
        attr.output_fd = output_fd
        if cpu >= 0:
            os.sched_setaffinity(0, {cpu})
        self.handlers = handlers
        self.objects = {}
        self.kept = {}
        check(c.rfm_worker_create(&attr, &self.ptr), "the worker's data plane")

    def run(self):
        """Serves until told to end; the exit status of the process."""
        cdef c.rfm_event ev
        memset(&ev, 0, sizeof(ev))
        while True:
            with nogil:
                c.rfm_worker_next(self.ptr, True, &ev)
            if ev.type == c.RFM_EV_CALL:
                if ev.flags & c.RFM_REQ_OBJECT:
                    self.call_object(&ev)
                else:
                    self.call_buffers(&ev)
            elif ev.type == c.RFM_EV_FETCH:
                self.fetch(&ev)
            elif ev.type == c.RFM_EV_KERNEL:
                self.load(&ev)
            elif ev.type == c.RFM_EV_BIND:
                self.bind(&ev)
            elif ev.type == c.RFM_EV_UNBIND:
                self.objects.pop((ev.conn_number, "b", ev.number), None)
                c.rfm_worker_release(self.ptr, &ev)
            elif ev.type == c.RFM_EV_DROP:
                self.kept.pop((ev.conn_number, ev.id), None)
                c.rfm_worker_release(self.ptr, &ev)
            elif ev.type == c.RFM_EV_GONE:
                self.forget(ev.conn_number)
                c.rfm_worker_release(self.ptr, &ev)
            elif ev.type == c.RFM_EV_END:
                return 0

    cdef int flush(self) except -1:
        if self.handlers.after_call():
            c.rfm_worker_printed(self.ptr)
        return 0

    cdef int forget(self, uint32_t conn) except -1:
        self.objects = {key: value for key, value in self.objects.items() if key[0] != conn}
        self.kept = {key: value for key, value in self.kept.items() if key[0] != conn}
        return 0

    cdef int load(self, c.rfm_event *ev) except -1:
        cdef bytes text, name
        try:
            kernel = self.handlers.load_kernel(
                ev.kind, (<char *>ev.digest)[:32],
                memoryview((<char *>ev.blob)[:ev.blob_bytes]))
            name = self.handlers.kernel_name(kernel)
            self.objects[ev.conn_number, "k", ev.number] = kernel
            c.rfm_worker_name(self.ptr, ev, <char *>name, len(name))
            c.rfm_worker_loaded(self.ptr, ev, <void *>kernel, NULL, 0)
        except BaseException as error:
            text = self.handlers.format_error(error)
            c.rfm_worker_loaded(self.ptr, ev, NULL, <char *>text, len(text))
        self.flush()
        c.rfm_worker_release(self.ptr, ev)
        return 0

    cdef int bind(self, c.rfm_event *ev) except -1:
        cdef c.rfm_kernel_fn *native = NULL
        cdef c.rfm_plain_fn *plain = NULL
        cdef uintptr_t address
        cdef _Bound bound = _Bound.__new__(_Bound)
        cdef bytes text
        try:
            bound.kernel = <object>ev.user
            if ev.flags & c.RFM_BIND_OBJECT:
                bound.target = bound.kernel
            else:
                bound.target = self.handlers.bind(bound.kernel, (<char *>ev.blob)[:ev.blob_bytes], ev.n_in,
                                                  ev.n_out)
            if isinstance(bound.target, int):
                address = bound.target
                if ev.kind == KIND_PLAIN:
                    if ev.n_in != 1 or ev.n_out != 1:
                        raise errors.BadKernel(
                            f"a kernel with rFaaS' plain ABI has one input and one output, not {ev.n_in} and "
                            f"{ev.n_out}", hint="give it the rfm_call ABI")
                    plain = <c.rfm_plain_fn *>address
                else:
                    native = <c.rfm_kernel_fn *>address
            self.objects[ev.conn_number, "b", ev.number] = bound
            c.rfm_worker_bound(self.ptr, ev, <void *>bound, native, plain, NULL, 0)
        except BaseException as error:
            text = self.handlers.format_error(error)
            c.rfm_worker_bound(self.ptr, ev, NULL, NULL, NULL, <char *>text, len(text))
        self.flush()
        c.rfm_worker_release(self.ptr, ev)
        return 0

    cdef int call_buffers(self, c.rfm_event *ev) except -1:
        cdef _Bound bound = <_Bound>ev.user
        cdef uint64_t sizes[64]
        cdef uint32_t i = 0
        try:
            written = bound.thunk(ev)()
            if written is not None:
                for size in written:
                    sizes[i] = size
                    i += 1
            self.flush()
        except BaseException as error:
            self.fail(ev, error)
            return 0
        c.rfm_worker_reply(self.ptr, ev, c.RFM_ST_OK, 0, 0, sizes if i == ev.n_out and i > 0 else NULL)
        return 0

    cdef int fail(self, c.rfm_event *ev, error) except -1:
        cdef bytes text = self.handlers.format_error(error)
        self.flush()
        if <uint64_t>len(text) <= ev.out_capacity:
            c.rfm_worker_reply_bytes(self.ptr, ev, c.RFM_ST_KERNEL, <char *>text, len(text))
        else:
            self.keep(ev, text, len(text), c.RFM_ST_KERNEL)
        return 0

    cdef int keep(self, c.rfm_event *ev, what, uint64_t nbytes, uint32_t status) except -1:
        self.kept[ev.conn_number, ev.id] = what
        c.rfm_worker_reply(self.ptr, ev, status, c.RFM_REP_KEPT, nbytes, NULL)
        return 0

    cdef int call_object(self, c.rfm_event *ev) except -1:
        cdef _Bound bound = <_Bound>ev.user
        cdef uint8_t small[32]
        cdef PartList result
        try:
            # A private copy: a kernel may change its arguments, and keep them.
            parts, refs = self.open_object(ev)
            result = PartList(self.handlers.run_object(bound.kernel, parts, refs), ())
            self.flush()
        except BaseException as error:
            self.fail(ev, error)
            return 0
        if result.total <= sizeof(small):
            result.write(small)
            c.rfm_worker_reply_bytes(self.ptr, ev, c.RFM_ST_OK, small, result.total)
        elif result.total <= ev.out_capacity:
            result.write(ev.out)
            c.rfm_worker_reply(self.ptr, ev, c.RFM_ST_OK, 0, result.total, NULL)
        else:
            self.keep(ev, result, result.total, c.RFM_ST_OK)
        return 0

    cdef tuple open_object(self, c.rfm_event *ev):
        cdef uint64_t n = ev.blob_bytes
        cdef uint16_t n_parts, n_refs
        cdef c.rfm_desc ref
        cdef uint32_t i
        cdef uint64_t at
        cdef void *address
        payload = bytearray(n)
        cdef uint8_t *to = payload
        if n < COPY_NOGIL:
            memcpy(to, ev.blob, n)
        else:
            with nogil:
                memcpy(to, ev.blob, n)
        memcpy(&n_parts, to, 2)
        memcpy(&n_refs, to + 2, 2)
        parts = split_object(payload)          # checks all lengths
        if n_refs == 0:
            return tuple(parts), ()
        refs = []
        at = 8 + 8 * <uint64_t>n_parts
        for i in range(n_refs):
            memcpy(&ref, to + at + 24 * i, 24)
            address = c.rfm_event_resolve(ev, &ref)
            if address == NULL:
                raise errors.TransportError("an array that lies in none of the rank's arenas")
            refs.append(PyMemoryView_FromMemory(<char *>address, ref.size, 0x100))
        return tuple(parts), tuple(refs)

    cdef int fetch(self, c.rfm_event *ev) except -1:
        cdef uint64_t kept_id = ev.blob_bytes
        cdef PartList parts
        cdef bytes text
        what = self.kept.pop((ev.conn_number, kept_id), None)
        if isinstance(what, PartList):
            parts = <PartList>what
            if parts.total == ev.out_capacity:
                with nogil:
                    parts.write(ev.out)
                c.rfm_worker_reply(self.ptr, ev, c.RFM_ST_OK, 0, parts.total, NULL)
                return 0
        elif what is not None:
            text = what
            if <uint64_t>len(text) == ev.out_capacity:
                memcpy(ev.out, <char *>text, len(text))
                c.rfm_worker_reply(self.ptr, ev, c.RFM_ST_OK, 0, len(text), NULL)
                return 0
        text = b"a result that isn't kept here"
        c.rfm_worker_reply_bytes(self.ptr, ev, c.RFM_ST_KERNEL, <char *>text, len(text))
        return 0

    def __dealloc__(self):
        if self.ptr != NULL:
            c.rfm_worker_destroy(self.ptr)
            self.ptr = NULL

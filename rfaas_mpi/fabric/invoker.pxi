# The rank side: memory, channels, kernels, bindings.

@cython.final
@cython.no_gc_clear
cdef class KernelRef:
    """A kernel as this invoker knows it: shipped to a worker with its first binding there."""

    cdef c.rfm_kernel *ptr
    cdef Invoker invoker
    cdef readonly bytes digest

    @property
    def number(self):
        return self.ptr.number

    @property
    def kind(self):
        return self.ptr.kind


@cython.final
@cython.no_gc_clear
cdef class Channel:
    """The connection to one worker. Owned by its invoker, which keeps it in memory."""

    cdef c.rfm_channel *ptr
    cdef Invoker invoker

    cdef c.rfm_channel_info_t info(self) except *:
        cdef c.rfm_channel_info_t info
        memset(&info, 0, sizeof(info))
        if self.invoker.ptr != NULL:
            c.rfm_channel_info(self.ptr, &info)
        return info

    @property
    def worker(self):
        return self.info().worker

    @property
    def lease(self):
        return self.info().lease

    @property
    def pid(self):
        return self.info().pid

    @property
    def alive(self):
        """It takes invocations."""
        return self.info().alive != 0

    @property
    def fenced(self):
        """Its worker can't write to our memory any more."""
        return self.invoker.ptr == NULL or self.info().fenced != 0

    @property
    def in_flight(self):
        return self.info().in_flight

    @property
    def why(self):
        """What went wrong on it, in a line; "" if nothing did (a worker's own words may be among it)."""
        cdef const char *text = NULL
        if self.invoker.ptr != NULL:
            text = c.rfm_channel_why(self.ptr)
        return "" if text == NULL else (<bytes>text).decode("ascii", "replace")

    def close(self):
        """Let go of the worker; what is in flight ends LOST once it can't write any more."""
        if self.invoker.usable():
            c.rfm_channel_close(self.ptr)

    def drain(self):
        """No new invocations; what is in flight ends as it will."""
        if self.invoker.usable():
            c.rfm_channel_drain(self.ptr)

    def kill(self):
        """SIGKILL to the worker; False if it is gone or not ours to kill."""
        return self.invoker.usable() and c.rfm_channel_kill(self.ptr) == 0


@cython.final
@cython.no_gc_clear
cdef class Binding:
    """What doesn't change between calls; ends with the last request that uses it."""

    cdef c.rfm_binding *ptr
    cdef Invoker invoker
    cdef KernelRef kernel

    def __dealloc__(self):
        if self.ptr != NULL and self.invoker is not None and self.invoker.usable():
            c.rfm_binding_destroy(self.invoker.ptr, self.ptr)
        self.ptr = NULL


cdef enum:
    MAX_CACHED_BINDINGS = 1024


@cython.final
cdef class Invoker:
    """Rank side of the data plane: memory, channels, queue and the C service thread."""

    cdef c.rfm_invoker *ptr
    cdef c.rfm_heap *heap
    cdef unsigned int born
    cdef readonly bint closed
    cdef uint32_t slot_bytes
    cdef list all_channels
    cdef dict refs
    cdef dict bindings
    cdef unsigned int wakes
    cdef list orphans              # in flight, but their Request objects are gone
    cdef object __weakref__

    def __init__(self, *, unsigned int slots=32, unsigned int slot_bytes=16384,
                 unsigned int spin_us=1000, uint64_t memory_limit=0):
        cdef c.rfm_invoker_attr attr
        cdef int status
        if self.ptr != NULL:
            raise TypeError("an Invoker is made once")
        attr.slots = slots
        attr.slot_bytes = slot_bytes
        attr.spin_us = spin_us
        attr.memory_limit = memory_limit
        with nogil:
            status = c.rfm_invoker_create(&attr, &self.ptr)
        check(status, f"an invoker with slots={slots} (a power of two, 2 to 64), "
                      f"slot_bytes={slot_bytes} (a multiple of 64, 256 to 1048576)")
        self.heap = c.rfm_invoker_heap(self.ptr)
        self.born = generation
        self.slot_bytes = slot_bytes
        self.all_channels = []
        self.refs = {}
        self.bindings = {}
        self.orphans = []

    cdef bint usable(self) noexcept:
        return self.ptr != NULL and self.born == generation

    cdef int live(self) except -1:
        if self.born != generation:
            raise forked()
        if self.ptr == NULL or self.closed:
            raise errors.ClosedError("the executor was closed", hint="make a new Executor")
        return 0

    @property
    def channels(self):
        return [channel for channel in self.all_channels if (<Channel>channel).alive]

    @property
    def queued(self):
        return c.rfm_invoker_queued(self.ptr) if self.usable() else 0

    @property
    def in_flight(self):
        return c.rfm_invoker_in_flight(self.ptr) if self.usable() else 0

    def alloc(self, uint64_t nbytes, *, bint zero=False):
        """A Block of so many bytes (0 is allowed). Raises MemoryError."""
        self.live()
        cdef Block block = new_block(self.heap, nbytes)
        if zero:
            with nogil:
                memset(block.block.address, 0, nbytes)
        return block

    def locate(self, uintptr_t address, uint64_t nbytes):
        """(arena, offset) of bytes that lie in an arena of ours, else None."""
        cdef uint32_t arena = 0
        cdef uint64_t offset = 0
        cdef cbool at_end = False
        self.live()
        if c.rfm_heap_locate(self.heap, <void *>address, nbytes, &arena, &offset, &at_end):
            return arena, offset
        return None

    def attach(self, int fd, *, uint64_t lease, uint32_t worker, double timeout_s=10.0, str transport="shm",
               int data_fd=-1, bint integrity=False, str device=""):
        """Take over an authenticated control connection; fd and data_fd are ours from here on, also on failure.

        `transport` is "shm" (fd is a Unix socket), "tcp" (data_fd is a second connection, for data;
        with `integrity` each message carries a crc32c) or "verbs" (on `device`, any if empty).

        Raises TransportError; ValueError for a transport that there is not.
        """
        cdef Channel channel = Channel.__new__(Channel)
        cdef c.rfm_attach_attr attr
        cdef bytes name = device.encode()
        cdef int status
        memset(&attr, 0, sizeof(attr))
        attr.fd = fd
        attr.data_fd = data_fd
        attr.lease = lease
        attr.worker = worker
        attr.timeout_ns = nanoseconds(timeout_s)
        attr.flags = 1 if integrity else 0
        attr.device = name
        try:
            attr.transport = TRANSPORTS.index(transport)
            self.live()
        except BaseException:
            os.close(fd)
            if data_fd >= 0:
                os.close(data_fd)
            raise
        with nogil:
            status = c.rfm_invoker_attach_over(self.ptr, &attr, &channel.ptr)
        if status < 0 and c.rfm_attach_why() != NULL:
            raise errors.TransportError(f"worker {worker} of lease {lease} over {transport}: "
                                        f"{text_of(status, c.rfm_attach_why())}")
        check(status, f"worker {worker} of lease {lease} over {transport}")
        channel.invoker = self
        self.all_channels = [kept for kept in self.all_channels if not (<Channel>kept).fenced]
        self.all_channels.append(channel)
        return channel

    def kernel(self, uint32_t kind, bytes digest not None, bytes blob not None):
        """A ref for this code; the same kind and digest give the same one."""
        cdef KernelRef ref
        key = (kind, digest)
        found = self.refs.get(key)
        if found is not None:
            return found
        self.live()
        if len(digest) != 32:
            raise ValueError("a digest has 32 bytes")
        ref = KernelRef.__new__(KernelRef)
        check(c.rfm_invoker_kernel(self.ptr, kind, <const uint8_t *><char *>digest, <char *>blob,
                                   len(blob), &ref.ptr), f"a kernel of {len(blob)} bytes")
        ref.invoker = self
        ref.digest = digest
        self.refs[key] = ref
        return ref

    cdef Binding bind(self, KernelRef kernel, uint32_t flags, uint16_t n_in, uint16_t n_out,
                      c.rfm_arg *args, bytes meta):
        cdef Binding binding = Binding.__new__(Binding)
        binding.invoker = self
        binding.kernel = kernel
        check(c.rfm_binding_create(self.ptr, kernel.ptr, flags, n_in, n_out, args, <char *>meta,
                                   len(meta), &binding.ptr), "a binding")
        return binding

    cdef Binding shared_binding(self, KernelRef kernel, uint32_t flags, uint16_t n_in, uint16_t n_out,
                                c.rfm_arg *args, bytes meta):
        """As bind, but the same arguments give the same binding as long as it is in use often."""
        cdef uint32_t n = <uint32_t>n_in + n_out
        cdef Binding binding
        key = (kernel.ptr.number, flags, n_in, meta,
               (<char *>args)[:n * sizeof(c.rfm_arg)] if n else b"")
        found = self.bindings.pop(key, None)
        if found is None:
            binding = self.bind(kernel, flags, n_in, n_out, args, meta)
            if len(self.bindings) >= MAX_CACHED_BINDINGS:
                del self.bindings[next(iter(self.bindings))]
        else:
            binding = <Binding>found
        self.bindings[key] = binding           # the one used last is the last to go
        return binding

    def request(self, KernelRef kernel not None, inputs, outputs, bytes meta not None, *,
                bint persistent=False, bint reclaimable=False):
        """A request on contiguous buffers; see Request.

        `reclaimable`: on this node it can always be cancelled until a worker begins it, at the price of a cache
        line; else only where it waits behind another one.
        """
        cdef Request request
        self.live()
        self.sweep()
        request = buffers_request(self, kernel, tuple(inputs), tuple(outputs), meta, persistent)
        if reclaimable:
            request.req.wire_flags |= c.RFM_REQ_CLAIM
        return request

    def object_request(self, KernelRef kernel not None, parts, refs=()):
        """A request whose payload is an object: parts (bytes-like) and refs (arena, offset, nbytes)."""
        self.live()
        if self.orphans:
            self.sweep()
        return make_object_request(self, kernel, parts, refs)

    cdef int sweep(self) except -1:
        """Forget what ended after its Request was gone."""
        if self.orphans:
            self.orphans = [parcel for parcel in self.orphans if not (<Parcel>parcel).over()]
        return 0

    def next_watched(self, timeout_s=None):
        """Watched requests that ended; [] after the time-out, or wake()."""
        cdef uint64_t deadline = 0
        cdef uint64_t slice_end
        cdef unsigned int wakes
        cdef int status
        self.live()
        if timeout_s is not None:
            deadline = c.rfm_now_ns() + nanoseconds(timeout_s)
        while True:
            ended = self.take_watched()
            if ended or self.closed:
                return ended
            # Others' completions wake this thread too; it needs no GIL to sleep on.
            wakes = self.wakes
            slice_end = c.rfm_now_ns() + WATCH_NS
            with nogil:
                while True:
                    status = c.rfm_wait(self.ptr, NULL, 0, c.RFM_WAIT_WATCHED, deadline, WATCH_NS, False, NULL)
                    if (status != c.RFM_ERR_AGAIN or self.wakes != wakes or self.closed
                            or c.rfm_now_ns() >= slice_end):
                        break
            if status == c.RFM_ERR_TIMEOUT:
                return self.take_watched()
            PyErr_CheckSignals()
            if status == c.RFM_ERR_AGAIN:
                return self.take_watched()

    cdef list take_watched(self):
        cdef c.rfm_request *at = c.rfm_invoker_take_ended(self.ptr)
        cdef c.rfm_request *following
        cdef Request request
        cdef list ended = []
        while at != NULL:
            request = <Request>at.owner
            following = c.rfm_request_unlist(at)
            if at.state == c.RFM_QUEUED or at.state == c.RFM_POSTED:
                request.watch()                # started again since; or its end is being written now
            else:
                ended.append(request)
            Py_DECREF(request)                 # what watch() held
            at = following
        ended.reverse()
        return ended

    def wake(self):
        """Makes everybody who waits look again."""
        self.wakes += 1
        if self.usable():
            c.rfm_invoker_wake(self.ptr)

    def progress(self):
        """One look at all channels; how many completions were moved."""
        self.live()
        return max(0, c.rfm_invoker_progress(self.ptr))

    def abandon(self):
        """Ends all queued invocations with NO_WORKER; a later attach makes it usable again."""
        if self.usable():
            with nogil:
                c.rfm_invoker_abandon(self.ptr)

    def limit_constants(self, uint64_t nbytes):
        """At most so much of constants stays at a worker on another node, over tcp (0: any amount).

        What was not used for longest goes first, never what a call in flight uses; what is used again is sent again.
        """
        self.live()
        c.rfm_invoker_limit_constants(self.ptr, nbytes)

    def stats(self):
        cdef uint64_t sent, dropped
        self.live()
        c.rfm_invoker_constants(self.ptr, &sent, &dropped)
        return {"constants_sent": sent, "constants_dropped": dropped, "queued": self.queued, "in_flight": self.in_flight, "channels": len(self.channels),
                "arena_bytes": c.rfm_heap_bytes(self.heap), "orphans": len(self.orphans),
                "bindings": len(self.bindings), "kernels": len(self.refs)}

    def close(self, double timeout_s=2.0):
        """Lets go of every worker and ends what is in flight with LOST. Safe to call twice.

        A worker that does not let go in time is killed.
        """
        cdef uint64_t timeout_ns = nanoseconds(timeout_s)
        if not self.usable() or self.closed:
            return
        self.closed = True
        with nogil:
            c.rfm_invoker_close(self.ptr, timeout_ns)
        self.bindings.clear()
        self.take_watched()
        self.orphans = []

    def __dealloc__(self):
        # Requests and bindings hold a reference, so none is left here.
        if self.ptr != NULL and self.born == generation:
            if not self.closed:
                with nogil:
                    c.rfm_invoker_close(self.ptr, 2000000000)
            c.rfm_invoker_destroy(self.ptr)
            self.ptr = NULL

# Waiting for several, and loops in C for the benchmarks.

cdef bint wait_for(Invoker invoker, c.rfm_request **reqs, uint32_t n, c.rfm_wait_mode mode,
                   object timeout_s) except -1:
    """False on time-out. Looks for signals now and then."""
    return wait_index(invoker, reqs, n, mode, timeout_s) >= 0


cdef int wait_index(Invoker invoker, c.rfm_request **reqs, uint32_t n, c.rfm_wait_mode mode,
                    object timeout_s) except -2:
    cdef uint64_t deadline = 0
    cdef uint32_t first = 0
    cdef int status
    if timeout_s is not None:
        deadline = c.rfm_now_ns() + nanoseconds(timeout_s)
    while True:
        with nogil:
            status = c.rfm_wait(invoker.ptr, reqs, n, mode, deadline, SLICE_NS, True, &first)
        if status >= 0:
            return status
        if status == c.RFM_ERR_TIMEOUT:
            return -1
        PyErr_CheckSignals()
        if status != c.RFM_ERR_AGAIN:
            check(status, "waiting")


cdef class _Many:
    """Pointers to the C side of several requests."""

    cdef c.rfm_request **reqs
    cdef uint32_t n
    cdef Invoker invoker

    def __cinit__(self, requests):
        cdef Request request
        self.reqs = <c.rfm_request **>PyMem_Calloc(len(requests) + 1, sizeof(void *))
        if self.reqs == NULL:
            raise MemoryError()
        for item in requests:
            request = <Request?>item
            if self.invoker is None:
                self.invoker = request.invoker
            elif self.invoker is not request.invoker:
                raise ValueError("requests of different executors can't be waited for together here")
            self.reqs[self.n] = request.req
            self.n += 1

    def __dealloc__(self):
        PyMem_Free(self.reqs)


def start_all(requests):
    """Start each of them, in order."""
    cdef Request request
    for item in requests:
        request = <Request?>item
        request.start(None)


def wait_all(requests, timeout_s=None):
    """True once all have ended; False on time-out."""
    cdef _Many many = _Many(requests)
    cdef Request request
    if many.n == 0:
        return True
    if many.invoker.born != generation:
        raise forked()
    if not wait_for(many.invoker, many.reqs, many.n, c.RFM_WAIT_ALL, timeout_s):
        return False
    for item in requests:
        request = <Request>item
        if not request.finished:
            request.finish()
    return True


def wait_any(requests, timeout_s=None):
    """Index of one that has ended; -1 on time-out."""
    cdef _Many many = _Many(requests)
    cdef Request request
    cdef int index
    if many.n == 0:
        return -1
    if many.invoker.born != generation:
        raise forked()
    index = wait_index(many.invoker, many.reqs, many.n, c.RFM_WAIT_ANY, timeout_s)
    if index >= 0:
        request = <Request>requests[index]
        if not request.finished:
            request.finish()
    return index


cdef uint64_t _roundtrips(c.rfm_invoker *inv, c.rfm_request **req, uint64_t count) noexcept nogil:
    cdef uint64_t t0 = c.rfm_now_ns()
    cdef uint64_t i
    for i in range(count):
        if c.rfm_request_start(req[0], 0) != 0:
            return 0
        while c.rfm_wait(inv, req, 1, c.RFM_WAIT_ALL, 0, 1000000000, True, NULL) < 0:
            pass
        if req[0].outcome != c.RFM_DONE:
            return 0
    return c.rfm_now_ns() - t0


def bench_roundtrips(Request request not None, uint64_t count):
    """Nanoseconds for so many start-and-wait round trips in C. RuntimeError if one failed."""
    cdef uint64_t ns
    request.ready()
    with nogil:
        ns = _roundtrips(request.invoker.ptr, &request.req, count)
    if ns == 0:
        raise RuntimeError(f"an invocation ended with outcome {request.outcome}: {request.detail!r}")
    return ns


cdef uint64_t _throughput(c.rfm_invoker *inv, c.rfm_request **reqs, uint32_t n,
                          uint64_t count) noexcept nogil:
    cdef uint64_t t0 = c.rfm_now_ns()
    cdef uint64_t i
    for i in range(count + n):
        if i >= n:
            while c.rfm_wait(inv, &reqs[i % n], 1, c.RFM_WAIT_ALL, 0, 1000000000, True, NULL) < 0:
                pass
            if reqs[i % n].outcome != c.RFM_DONE:
                return 0
        if i < count and c.rfm_request_start(reqs[i % n], 0) != 0:
            return 0
    return c.rfm_now_ns() - t0


def bench_throughput(requests, uint64_t count):
    """Nanoseconds for so many invocations in C, with all the requests in flight."""
    cdef _Many many = _Many(requests)
    cdef uint64_t ns
    if many.n == 0 or count < many.n:
        raise ValueError("at least one request, and at least as many invocations")
    many.invoker.live()
    with nogil:
        ns = _throughput(many.invoker.ptr, many.reqs, many.n, count)
    if ns == 0:
        raise RuntimeError("an invocation failed")
    return ns

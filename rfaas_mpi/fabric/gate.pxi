# The one error gate: every status of a C call passes check().

cdef uint64_t SLICE_NS = 50000000      # how long a wait runs without looking for signals
cdef uint64_t WATCH_NS = 5000000000    # the same where no signal is expected
cdef uint64_t COPY_NOGIL = 32768            # from here a copy is worth releasing the GIL

# A forked child has the memory but not the service thread: whatever was made
# before the fork must not be used, and not be closed, in it.
cdef unsigned int generation = 0


def _after_fork():
    global generation
    generation += 1


os.register_at_fork(after_in_child=_after_fork)
c.rfm_ticks_init()                     # once, so that forks of the zygote have it already


cdef int check(int status, str what="") except? -1000:
    if status >= 0:
        return status
    raise error_of(status, what)


cdef object error_of(int status, str what):
    cdef str text = c.rfm_status_text(status).decode()
    if what:
        text = f"{what}: {text}"
    if status == c.RFM_ERR_NO_MEMORY:
        return MemoryError(text)
    if status == c.RFM_ERR_TOO_LARGE:
        return MemoryError(f"{text} for the memory that was granted")
    if status == c.RFM_ERR_CLOSED:
        return errors.ClosedError(text, hint="make a new Executor")
    if status == c.RFM_ERR_BUSY:
        return errors.InvalidBuffer(text, hint="Wait for it before it is started again")
    if status == c.RFM_ERR_NO_RESOURCE:
        return errors.Backpressure(text)
    if status == c.RFM_ERR_SYSTEM:
        return errors.TransportError(f"{text}: {os.strerror(errno)}")
    if status == c.RFM_ERR_INVALID:
        return ValueError(text)
    return errors.TransportError(text)


cdef object forked():
    return errors.ForkedError("this executor was made before a fork and can't be used in the child",
                              hint="make a new Executor in the child")


cdef uint64_t nanoseconds(object timeout_s) except? 0:
    """For a time-out that may be None (then it is not called): at least 1."""
    cdef double seconds = timeout_s
    if seconds <= 0:
        return 1
    if seconds > 1e9:
        return 1000000000000000000
    return <uint64_t>(seconds * 1e9) + 1


def monotonic_ns():
    """CLOCK_MONOTONIC, in nanoseconds."""
    return c.rfm_now_ns()

# Which transports this process can use. verbs is a plug-in: loaded when it is first asked for, it opens no device
# before the first attach over it (what forks must not have opened one).

TRANSPORTS = ("shm", "tcp", "verbs")   # by their numbers (enum rfm_transport_number)

cdef uint32_t VERBS = 2
c.rfm_transport_plugin(VERBS, os.fsencode(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                                                       "_verbs.so")))


def transports():
    """The names of those that can be used here: shm and tcp, and verbs where its library and an active port are."""
    cdef const char *why = NULL
    return TRANSPORTS if c.rfm_transport_usable(VERBS, &why) == 0 else TRANSPORTS[:2]


def load_verbs(path=None):
    """Load the verbs transport, of another file if a path is given before it is first used.

    Raises TransportError that says why it can't be used here.
    """
    cdef const char *why = NULL
    cdef int status
    if path is not None:
        check(c.rfm_transport_plugin(VERBS, os.fsencode(path)), f"the verbs plug-in {path}")
    status = c.rfm_transport_usable(VERBS, &why)
    if status < 0:
        raise errors.TransportError(f"verbs can't be used here: {text_of(status, why)}", hint="`rfaas doctor` says more")


def verbs_report(str device=""):
    """Facts about an RDMA device as {name: text}; the device that would be chosen if none is named.

    `device` is name[:port[:gid index]]. It is opened for that, so a process that forks later must not ask. Raises
    TransportError that says why there is none to use.
    """
    cdef char text[2048]
    cdef const char *why = NULL
    cdef bytes name = device.encode()
    cdef const char *named = name
    cdef int status
    with nogil:
        status = c.rfm_transport_describe(VERBS, named, text, sizeof(text), &why)
    if status < 0:
        raise errors.TransportError(f"verbs can't be used here: {text_of(status, why)}")
    lines = (<bytes>text).decode("utf-8", "replace").splitlines()
    return dict(line.split("=", 1) for line in lines)


cdef str text_of(int status, const char *why):
    return (<bytes>(why if why != NULL else c.rfm_status_text(status))).decode("utf-8", "replace")

# Mirrors csrc/rfm.h, nothing more.
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libcpp cimport bool as cbool


cdef extern from "rfm.h" nogil:
    int RFM_OK
    int RFM_ERR_INVALID
    int RFM_ERR_NO_MEMORY
    int RFM_ERR_NO_RESOURCE
    int RFM_ERR_AGAIN
    int RFM_ERR_TIMEOUT
    int RFM_ERR_CLOSED
    int RFM_ERR_BUSY
    int RFM_ERR_PROTOCOL
    int RFM_ERR_SYSTEM
    int RFM_ERR_PEER
    int RFM_ERR_TOO_LARGE
    const char *rfm_status_text(int status)

    enum:
        RFM_INLINE
        RFM_BOUND
        RFM_CALL
        RFM_ARG_CANARY
        RFM_BIND_OBJECT
        RFM_REQ_OBJECT
        RFM_REQ_STAGED
        RFM_REQ_CLAIM
        RFM_REP_KEPT
        RFM_ST_OK
        RFM_ST_KERNEL
        RFM_ST_BAD_KERNEL
        RFM_INLINE_BYTES
        RFM_MAX_ARGS
        RFM_REDZONE

    struct rfm_heap:
        pass

    struct rfm_block:
        uint32_t arena_id
        uint64_t offset
        uint64_t size
        void *address

    int rfm_heap_alloc(rfm_heap *heap, uint64_t size, rfm_block *b)
    void rfm_heap_free(rfm_block *block)
    bint rfm_heap_locate(rfm_heap *heap, const void *address, uint64_t size,
                         uint32_t *arena_p, uint64_t *offset_p, cbool *at_end_p)
    uint64_t rfm_heap_bytes(rfm_heap *heap)

    struct rfm_invoker:
        pass

    struct rfm_channel:
        pass

    struct rfm_invoker_attr:
        uint32_t slots
        uint32_t slot_bytes
        uint32_t spin_us
        uint64_t memory_limit

    struct rfm_kernel:
        uint32_t number
        uint32_t kind

    struct rfm_arg:
        uint32_t place
        uint32_t flags
        uint32_t arena
        uint64_t offset
        uint64_t size
        uint64_t at

    struct rfm_layout:
        uint64_t in_bytes
        uint64_t out_bytes

    struct rfm_binding:
        uint32_t number
        uint16_t n_in
        uint16_t n_out
        rfm_layout layout

    enum:
        RFM_IDLE
        RFM_QUEUED
        RFM_POSTED
        RFM_ENDED

    enum:
        RFM_PENDING
        RFM_DONE
        RFM_KERNEL_ERROR
        RFM_BAD_KERNEL
        RFM_LARGE
        RFM_LOST
        RFM_TIMED_OUT
        RFM_CANCELLED
        RFM_NO_WORKER
        RFM_BUSY
        RFM_NO_ROOM

    struct rfm_desc:
        uint32_t arena
        uint32_t flags
        uint64_t offset
        uint64_t size

    struct rfm_reqarg:
        void *user
        void *stage
        uint64_t size
        rfm_desc desc

    struct rfm_request:
        uint32_t state
        uint32_t outcome
        uint64_t id
        rfm_binding *binding
        rfm_channel *chan
        rfm_reqarg *args
        uint64_t exec_ns
        uint64_t out_bytes
        uint64_t *out_sizes
        uint32_t worker
        uint32_t attempts
        uint32_t watch
        uint32_t wire_flags
        uint32_t kept_status
        uint32_t expired
        const uint8_t *payload
        uint64_t payload_bytes
        uint8_t *result
        uint64_t result_bytes
        uint8_t *small
        rfm_request *next_ended
        void *owner

    int rfm_invoker_create(const rfm_invoker_attr *attr, rfm_invoker **inv_p)
    void rfm_invoker_limit_constants(rfm_invoker *inv, uint64_t bytes)
    void rfm_invoker_constants(rfm_invoker *inv, uint64_t *sent_p, uint64_t *dropped_p)
    void rfm_invoker_close(rfm_invoker *inv, uint64_t timeout_ns)
    void rfm_invoker_destroy(rfm_invoker *inv)
    rfm_heap *rfm_invoker_heap(rfm_invoker *inv)
    struct rfm_attach_attr:
        uint32_t transport
        int fd
        int data_fd
        uint32_t worker
        uint64_t lease
        uint64_t timeout_ns
        uint32_t flags
        const char *device

    int rfm_heap_constant(rfm_block *block)
    int rfm_invoker_attach_over(rfm_invoker *inv, const rfm_attach_attr *attr, rfm_channel **chan_p)
    const char *rfm_attach_why()
    const char *rfm_channel_why(rfm_channel *chan)
    int rfm_invoker_kernel(rfm_invoker *inv, uint32_t kind, const uint8_t *digest,
                           const void *blob, uint64_t blob_bytes, rfm_kernel **kernel_p)
    int rfm_invoker_progress(rfm_invoker *inv)
    void rfm_invoker_wake(rfm_invoker *inv)
    void rfm_invoker_abandon(rfm_invoker *inv)
    rfm_request *rfm_invoker_take_ended(rfm_invoker *inv)
    uint64_t rfm_invoker_queued(rfm_invoker *inv)
    uint64_t rfm_invoker_in_flight(rfm_invoker *inv)
    uint32_t rfm_invoker_slot_bytes(rfm_invoker *inv)

    struct rfm_channel_info_t "rfm_channel_info":
        uint64_t lease
        uint32_t worker
        uint32_t pid
        uint32_t alive
        uint32_t fenced
        uint64_t in_flight

    void rfm_channel_info(rfm_channel *chan, rfm_channel_info_t *info)
    void rfm_channel_close(rfm_channel *chan)
    void rfm_channel_drain(rfm_channel *chan)
    int rfm_channel_kill(rfm_channel *chan)

    int rfm_binding_create(rfm_invoker *inv, rfm_kernel *kernel, uint32_t flags,
                           uint16_t n_in, uint16_t n_out, const rfm_arg *args,
                           const void *meta, uint64_t meta_bytes, rfm_binding **binding_p)
    void rfm_binding_destroy(rfm_invoker *inv, rfm_binding *binding)
    int rfm_layout_fn "rfm_layout"(rfm_arg *args, uint16_t n_in, uint16_t n_out,
                                   uint32_t slot_bytes, rfm_layout *layout)

    void rfm_request_init(rfm_request *req, rfm_invoker *inv, rfm_binding *binding,
                          rfm_reqarg *args, uint64_t *out_sizes)
    void rfm_request_fini(rfm_request *req)
    int rfm_request_start(rfm_request *req, uint64_t timeout_ns)
    int rfm_request_restart(rfm_request *req)
    int rfm_request_fetch(rfm_request *req, const rfm_desc *into)
    int rfm_request_cancel(rfm_request *req)
    bint rfm_request_watch(rfm_request *req)
    rfm_request *rfm_request_unlist(rfm_request *req)
    void rfm_request_discard(rfm_request *req)

    enum rfm_wait_mode:
        RFM_WAIT_ALL
        RFM_WAIT_ANY
        RFM_WAIT_WATCHED

    int rfm_wait(rfm_invoker *inv, rfm_request **reqs, uint32_t n, rfm_wait_mode mode,
                 uint64_t deadline_ns, uint64_t slice_ns, bint may_spin, uint32_t *first_p)
    bint rfm_request_ended(const rfm_request *req)

    int rfm_transport_plugin(uint32_t number, const char *path)
    int rfm_transport_usable(uint32_t number, const char **why_p)
    int rfm_transport_describe(uint32_t number, const char *device, char *text, uint64_t bytes,
                               const char **why_p)

    struct rfm_worker:
        pass

    struct rfm_conn:
        pass

    struct rfm_buf:
        void *ptr
        uint64_t size
        uint64_t capacity

    struct rfm_call:
        uint32_t version
        uint32_t n_in
        uint32_t n_out
        const rfm_buf *inputs
        rfm_buf *outputs

    ctypedef int32_t rfm_kernel_fn(const rfm_call *call)
    ctypedef uint32_t rfm_plain_fn(void *data, uint32_t size, void *out)

    enum:
        RFM_EV_NONE
        RFM_EV_END
        RFM_EV_KERNEL
        RFM_EV_BIND
        RFM_EV_UNBIND
        RFM_EV_CALL
        RFM_EV_FETCH
        RFM_EV_DROP
        RFM_EV_GONE

    struct rfm_event:
        uint32_t type
        uint32_t conn_number
        rfm_conn *conn
        uint64_t id
        uint32_t number
        uint32_t kind
        uint32_t slot
        uint32_t flags
        uint16_t n_in
        uint16_t n_out
        const uint8_t *digest
        const uint8_t *blob
        uint64_t blob_bytes
        void *user
        rfm_buf *bufs
        bint fixed
        uint8_t *out
        uint64_t out_capacity

    struct rfm_worker_attr:
        int agent_fd
        int page_fd
        uint32_t spin_us
        int output_fd

    int rfm_worker_create(const rfm_worker_attr *attr, rfm_worker **worker_p)
    void rfm_worker_destroy(rfm_worker *w)
    int rfm_worker_next(rfm_worker *w, bint wait, rfm_event *ev)
    void rfm_worker_release(rfm_worker *w, rfm_event *ev)
    void rfm_worker_name(rfm_worker *w, rfm_event *ev, const char *name, uint64_t name_bytes)
    void rfm_worker_loaded(rfm_worker *w, rfm_event *ev, void *user, const char *error,
                           uint64_t error_bytes)
    void rfm_worker_bound(rfm_worker *w, rfm_event *ev, void *user, rfm_kernel_fn *native,
                          rfm_plain_fn *plain, const char *error, uint64_t error_bytes)
    void *rfm_event_resolve(const rfm_event *ev, const rfm_desc *desc)
    void rfm_worker_printed(rfm_worker *w)
    void rfm_worker_reply(rfm_worker *w, rfm_event *ev, uint32_t status, uint32_t flags,
                          uint64_t out_bytes, const uint64_t *sizes)
    void rfm_worker_reply_bytes(rfm_worker *w, rfm_event *ev, uint32_t status,
                                const void *bytes, uint64_t n)


cdef extern from "copy.h" nogil:
    void rfm_copy(void *to, const void *from_, uint64_t bytes)


cdef extern from "poller.h" nogil:
    uint64_t rfm_now_ns()
    void rfm_ticks_init()


cdef extern from "board.h" nogil:
    enum:
        RFM_BOARD_WHO_SHIFT
    const uint64_t RFM_BOARD_SAME_CALL
    const uint64_t RFM_BOARD_NS

    struct rfm_board:
        uint64_t next
        uint64_t begun_ns

    struct rfm_share:
        rfm_board *board
        const uint64_t *edges
        uint64_t n
        uint64_t who
        double margin
        uint64_t cells
        uint64_t rows
        uint64_t ns

    uint64_t rfm_share_take(rfm_share *share, uint64_t now_ns)
    void rfm_share_done(rfm_share *share, uint64_t k, uint64_t ns)
    uint64_t rfm_share_look(const rfm_share *share, uint64_t k)
    void rfm_share_close(rfm_share *share)
    void rfm_share_open(rfm_share *share, uint64_t now_ns, uint64_t least, uint64_t parts)
    uint64_t rfm_share_take_some(rfm_share *share, uint64_t now_ns, uint64_t *count_p)
    void rfm_share_done_some(rfm_share *share, uint64_t k, uint64_t count, uint64_t ns)

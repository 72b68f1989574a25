/*
 * The C API of the data plane.
 *
 * Contract
 * - Functions return a count >= 0 or an enum rfm_status < 0; outputs come last
 *   and are written only on success.
 * - Rank side: an invoker owns memory (heap), channels, a queue and one service
 *   thread. Any thread may start, test and wait for requests. Starting never
 *   blocks and never fails for want of a slot: the request is queued.
 * - A request's memory (arguments, result) stays in use from start until its
 *   state is RFM_ENDED; it ends LOST only when its writer can't write any more.
 * - Worker side: one thread calls rfm_worker_next() and runs what it is given;
 *   native kernels run inside that call.
 * - Between hot peers nothing allocates, makes a system call or waits for a
 *   lock.
 */
#ifndef RFM_H
#define RFM_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "rfm_call.h"
#include "rfm_wire.h"

enum rfm_status {
    RFM_OK              = 0,
    RFM_ERR_INVALID     = -1,
    RFM_ERR_NO_MEMORY   = -2,
    RFM_ERR_NO_RESOURCE = -3,   /* full: backpressure, not failure */
    RFM_ERR_AGAIN       = -4,   /* nothing yet: look for signals, come back */
    RFM_ERR_TIMEOUT     = -5,
    RFM_ERR_CLOSED      = -6,
    RFM_ERR_BUSY        = -7,   /* in flight */
    RFM_ERR_PROTOCOL    = -8,
    RFM_ERR_SYSTEM      = -9,   /* errno says more */
    RFM_ERR_PEER        = -10,  /* the other side is gone */
    RFM_ERR_TOO_LARGE   = -11,
};

const char *rfm_status_text(int status);

/* --- memory --------------------------------------------------------------- */

struct rfm_heap;
struct rfm_arena;

struct rfm_block {
    struct rfm_arena *arena;
    uint32_t          arena_id;
    uint64_t          offset;
    uint64_t          size;     /* as asked for */
    uint64_t          span;     /* with redzone and rounding */
    void             *address;
};

int  rfm_heap_create(uint64_t limit, struct rfm_heap **heap_p);
/* Arenas live on while blocks do; the heap goes with the last of them. */
void rfm_heap_close(struct rfm_heap *heap);
int  rfm_heap_alloc(struct rfm_heap *heap, uint64_t size, struct rfm_block *b);
void rfm_heap_free(struct rfm_block *block);
bool rfm_heap_locate(struct rfm_heap *heap, const void *address, uint64_t size,
                     uint32_t *arena_p, uint64_t *offset_p, bool *at_end_p);
/* The reverse; NULL if it isn't wholly in an arena. */
void *rfm_heap_address(struct rfm_heap *heap, uint32_t arena, uint64_t offset,
                       uint64_t size);
uint64_t rfm_heap_bytes(struct rfm_heap *heap);
/* From now on until it is freed, the block's bytes stay as they are: a worker
 * on another node gets them once. */
int  rfm_heap_constant(struct rfm_block *block);

/* --- rank side ------------------------------------------------------------ */

struct rfm_invoker;
struct rfm_channel;

struct rfm_invoker_attr {
    uint32_t slots;             /* per channel: power of two, 2..64 */
    uint32_t slot_bytes;        /* multiple of 64 */
    uint32_t spin_us;
    uint64_t memory_limit;      /* of the heap; 0: none */
};

struct rfm_kernel {
    uint32_t number;
    uint32_t kind;
    uint8_t  digest[RFM_DIGEST_BYTES];
    uint8_t *blob;
    uint64_t blob_bytes;
    struct rfm_kernel *next;
};

struct rfm_arg {
    uint32_t place;             /* enum rfm_place */
    uint32_t flags;
    uint32_t arena;
    uint64_t offset;
    uint64_t size;
    uint64_t at;                /* INLINE: where in the payload; CALL: its desc */
};

/* Where the arguments of a binding lie in the payloads; both ends compute it. */
struct rfm_layout {
    uint64_t in_bytes;          /* payload of the request                    */
    uint64_t out_bytes;         /* payload of the reply, canaries included   */
    bool     out_in_line;       /* outputs share the header's line           */
    uint64_t n_inline_out;
};

struct rfm_binding {
    uint32_t number;
    uint32_t flags;             /* RFM_BIND_OBJECT */
    struct rfm_kernel *kernel;
    uint16_t n_in;
    uint16_t n_out;
    struct rfm_arg *args;       /* [n_in + n_out] */
    struct rfm_layout layout;
    uint8_t *meta;
    uint64_t meta_bytes;
};

enum rfm_state {
    RFM_IDLE   = 0,
    RFM_QUEUED = 1,
    RFM_POSTED = 2,
    RFM_ENDED  = 3,
};

/* Same numbers as in _fabric.pyi. */
enum rfm_outcome {
    RFM_PENDING      = 0,
    RFM_DONE         = 1,
    RFM_KERNEL_ERROR = 2,
    RFM_BAD_KERNEL   = 3,
    RFM_LARGE        = 4,
    RFM_LOST         = 5,
    RFM_TIMED_OUT    = 6,
    RFM_CANCELLED    = 7,
    RFM_NO_WORKER    = 8,
    RFM_BUSY         = 9,
    RFM_NO_ROOM      = 10,      /* no worker has memory for one of its arenas */
};

#define RFM_RESULT_INLINE 192u

struct rfm_reqarg {
    void    *user;              /* the caller's memory                     */
    void    *stage;             /* staging block, or NULL                  */
    uint64_t size;
    struct rfm_desc desc;       /* for RFM_CALL                            */
};

struct rfm_request {
    uint32_t state;             /* atomic: enum rfm_state                  */
    uint32_t outcome;           /* enum rfm_outcome, once ended            */
    uint64_t id;
    uint64_t wire_id;           /* differs from id while fetching          */
    struct rfm_invoker *inv;
    struct rfm_binding *binding;
    struct rfm_channel *chan;   /* the last that it was posted to          */
    struct rfm_channel *pin;    /* only this one will do (fetch)           */
    struct rfm_reqarg  *args;
    uint64_t exec_ns;
    uint64_t out_bytes;
    uint64_t *out_sizes;        /* [n_out]                                 */
    uint32_t worker;
    uint32_t attempts;
    uint32_t watch;             /* atomic bits                             */
    uint32_t wire_flags;
    uint32_t kept_status;
    uint32_t slot;              /* where it was posted                     */
    uint32_t expired;           /* its deadline passed while posted        */
    bool     batched;           /* others are posted with it               */
    /* an object: payload in the slot, or staged */
    const uint8_t *payload;
    uint64_t       payload_bytes;
    /* result of unknown size, or error text */
    uint8_t *result;
    uint64_t result_bytes;
    uint8_t  small[RFM_RESULT_INLINE];
    struct rfm_desc into;       /* fetch */
    /* queue and deadlines: under the invoker's queue lock */
    struct rfm_request *next;
    struct rfm_request *prev;
    uint64_t deadline_ns;       /* 0: in no list of deadlines */
    uint64_t limit_ns;          /* as given to start; outlives re-issues */
    struct rfm_request *later;
    struct rfm_request *sooner;
    struct rfm_request *next_ended;
    void *owner;                /* the binding language's object           */
};

int  rfm_invoker_create(const struct rfm_invoker_attr *attr,
                        struct rfm_invoker **inv_p);
/* Fences every channel (kills a worker that does not let go in time). */
void rfm_invoker_close(struct rfm_invoker *inv, uint64_t timeout_ns);
void rfm_invoker_destroy(struct rfm_invoker *inv);
struct rfm_heap *rfm_invoker_heap(struct rfm_invoker *inv);

/* fd: an authenticated control connection; it is the channel's from now on,
 * also on failure. */
int  rfm_invoker_attach(struct rfm_invoker *inv, int fd, uint64_t lease,
                        uint32_t worker, uint64_t timeout_ns,
                        struct rfm_channel **chan_p);

struct rfm_attach_attr {
    uint32_t transport;         /* enum rfm_transport_number */
    int      fd;                /* as above */
    int      data_fd;           /* tcp: for data; else -1. Taken over, too */
    uint32_t worker;
    uint64_t lease;
    uint64_t timeout_ns;
    uint32_t flags;             /* tcp: RFM_STREAM_CRC */
    const char *device;         /* verbs: NULL or empty for any */
};
/* RFM_ERR_INVALID: no such transport here. */
int  rfm_invoker_attach_over(struct rfm_invoker *inv,
                             const struct rfm_attach_attr *attr,
                             struct rfm_channel **chan_p);
/* Why the last attach of this thread failed, if more is known than the status:
 * a text that stays until the next one, or NULL. */
const char *rfm_attach_why(void);
/* What went wrong last on this channel: a static text, or NULL. */
const char *rfm_channel_why(struct rfm_channel *chan);
int  rfm_invoker_kernel(struct rfm_invoker *inv, uint32_t kind,
                        const uint8_t *digest, const void *blob,
                        uint64_t blob_bytes, struct rfm_kernel **kernel_p);
int  rfm_invoker_progress(struct rfm_invoker *inv);
void rfm_invoker_wake(struct rfm_invoker *inv);
void rfm_invoker_abandon(struct rfm_invoker *inv);
/* Watched requests that ended, linked by next_ended; each is given back with
 * rfm_request_unlist() before it may be listed again. */
struct rfm_request *rfm_invoker_take_ended(struct rfm_invoker *inv);
struct rfm_request *rfm_request_unlist(struct rfm_request *req);
uint32_t rfm_invoker_channels(struct rfm_invoker *inv,
                              struct rfm_channel **out, uint32_t max);
uint64_t rfm_invoker_queued(struct rfm_invoker *inv);
uint64_t rfm_invoker_in_flight(struct rfm_invoker *inv);
uint32_t rfm_invoker_slot_bytes(struct rfm_invoker *inv);
/* So much of constants stays at a worker on another node (tcp; 0: any amount);
 * beyond that it lets go of those that were not used for longest, and of none
 * that is in use. */
void rfm_invoker_limit_constants(struct rfm_invoker *inv, uint64_t bytes);
/* Bytes of constants sent to workers so far, and of those that were let go. */
void rfm_invoker_constants(struct rfm_invoker *inv, uint64_t *sent_p,
                           uint64_t *dropped_p);

struct rfm_channel_info {
    uint64_t lease;
    uint32_t worker;
    uint32_t pid;
    uint32_t alive;             /* accepts invocations */
    uint32_t fenced;            /* its worker can't write any more */
    uint64_t in_flight;
};
void rfm_channel_info(struct rfm_channel *chan, struct rfm_channel_info *info);
void rfm_channel_close(struct rfm_channel *chan);
void rfm_channel_drain(struct rfm_channel *chan);
int  rfm_channel_kill(struct rfm_channel *chan);

/* args: places and sizes; computes the layout. RFM_ERR_TOO_LARGE if inline
 * arguments don't fit a slot. */
int  rfm_binding_create(struct rfm_invoker *inv, struct rfm_kernel *kernel,
                        uint32_t flags, uint16_t n_in, uint16_t n_out,
                        const struct rfm_arg *args, const void *meta,
                        uint64_t meta_bytes, struct rfm_binding **binding_p);
void rfm_binding_destroy(struct rfm_invoker *inv, struct rfm_binding *binding);
int  rfm_layout(struct rfm_arg *args, uint16_t n_in, uint16_t n_out,
                uint32_t slot_bytes, struct rfm_layout *layout);

void rfm_request_init(struct rfm_request *req, struct rfm_invoker *inv,
                      struct rfm_binding *binding, struct rfm_reqarg *args,
                      uint64_t *out_sizes);
void rfm_request_fini(struct rfm_request *req);
int  rfm_request_start(struct rfm_request *req, uint64_t timeout_ns);
/* Again, with the same id and what is left of its time limit: after LOST, BUSY
 * or NO_WORKER. */
int  rfm_request_restart(struct rfm_request *req);
int  rfm_request_fetch(struct rfm_request *req, const struct rfm_desc *into);
int  rfm_request_cancel(struct rfm_request *req);
/* True if it was not watched before (the watcher holds it until unlisted). One
 * that is taken from the list may not have ENDED yet: its end is just being
 * written, or it was started again. Then watch it again. */
bool rfm_request_watch(struct rfm_request *req);
void rfm_request_discard(struct rfm_request *req);

enum rfm_wait_mode { RFM_WAIT_ALL, RFM_WAIT_ANY, RFM_WAIT_WATCHED };

/*
 * Waits until all / one of the requests ended, or a watched one did. Returns
 * the index of an ended one (ANY), 0 (ALL, WATCHED), RFM_ERR_AGAIN after
 * `slice_ns` or a signal, RFM_ERR_TIMEOUT at the deadline (0: none).
 * *first_p: how many at the start are known to have ended (ALL).
 */
int  rfm_wait(struct rfm_invoker *inv, struct rfm_request *const *reqs,
              uint32_t n, enum rfm_wait_mode mode, uint64_t deadline_ns,
              uint64_t slice_ns, bool may_spin, uint32_t *first_p);

static inline bool rfm_request_ended(const struct rfm_request *req)
{
    return __atomic_load_n(&req->state, __ATOMIC_ACQUIRE) == RFM_ENDED;
}

/* --- transports ------------------------------------------------------------ */

/* Where the plug-in of a transport (enum rfm_transport_number) is; it is loaded
 * when it is first needed. */
int rfm_transport_plugin(uint32_t number, const char *path);
/* RFM_OK, or *why_p says why it can't be used in this process. Opens no device. */
int rfm_transport_usable(uint32_t number, const char **why_p);
/* Lines of name=value about its device; NULL or empty: the one that it would
 * choose. Their length, or *why_p (NULL: the status says it). */
int rfm_transport_describe(uint32_t number, const char *device, char *text,
                           uint64_t bytes, const char **why_p);

/* --- worker side ---------------------------------------------------------- */

struct rfm_worker;
struct rfm_conn;

enum rfm_event_type {
    RFM_EV_NONE   = 0,
    RFM_EV_END    = 1,
    RFM_EV_KERNEL = 2,          /* load: blob, digest, kind               */
    RFM_EV_BIND   = 3,          /* bind: kernel, args, meta               */
    RFM_EV_UNBIND = 4,          /* forget `user` of a binding             */
    RFM_EV_CALL   = 5,          /* run a kernel that isn't native         */
    RFM_EV_FETCH  = 6,          /* copy a kept result                     */
    RFM_EV_DROP   = 7,          /* drop a kept result                     */
    RFM_EV_GONE   = 8,          /* a rank left: forget all of its objects */
};

struct rfm_event {
    uint32_t type;
    uint32_t conn_number;
    struct rfm_conn *conn;
    uint64_t id;                /* of the invocation, or of a kept result */
    uint32_t number;            /* of kernel or binding                   */
    uint32_t kind;
    uint32_t slot;
    uint32_t flags;             /* RFM_REQ_*                              */
    uint16_t n_in;
    uint16_t n_out;
    const uint8_t *digest;
    const uint8_t *blob;        /* or meta; or object payload             */
    uint64_t blob_bytes;
    void    *user;              /* what was given for kernel or binding   */
    struct rfm_buf *bufs;       /* [n_in + n_out]                         */
    bool     fixed;             /* bufs are the same at each call         */
    uint8_t *out;               /* objects: reply payload                 */
    uint64_t out_capacity;
    struct rfm_desc into;       /* fetch: where the rank wants it */
    uint64_t start_ticks;
    void    *frame;             /* freed by rfm_worker_release            */
};

struct rfm_worker_attr {
    int      agent_fd;
    int      page_fd;
    uint32_t spin_us;
    int      output_fd;         /* the pipe that kernels print into, or 0 */
};

int  rfm_worker_create(const struct rfm_worker_attr *attr,
                       struct rfm_worker **worker_p);
void rfm_worker_destroy(struct rfm_worker *w);
/* One event; RFM_ERR_AGAIN when there is none and `wait` is false. */
int  rfm_worker_next(struct rfm_worker *w, bool wait, struct rfm_event *ev);
void rfm_worker_release(struct rfm_worker *w, struct rfm_event *ev);

/* Before KERNEL is answered: the name under which the page counts what it takes;
 * too long a one is cut, and one too many counts with all the others. */
void rfm_worker_name(struct rfm_worker *w, struct rfm_event *ev,
                     const char *name, uint64_t name_bytes);
/* Answers to KERNEL and BIND; a failed one carries a text that every
 * invocation on it is answered with. */
void rfm_worker_loaded(struct rfm_worker *w, struct rfm_event *ev, void *user,
                       const char *error, uint64_t error_bytes);
void rfm_worker_bound(struct rfm_worker *w, struct rfm_event *ev, void *user,
                      rfm_kernel_fn *native, rfm_plain_fn *plain,
                      const char *error, uint64_t error_bytes);
/* Where a piece of the rank's arenas is mapped; NULL if it is in none. */
void *rfm_event_resolve(const struct rfm_event *ev, const struct rfm_desc *desc);
/* The call that is to be answered has printed something. */
void rfm_worker_printed(struct rfm_worker *w);
/* Answers to CALL and FETCH. sizes may be NULL (all outputs full). */
void rfm_worker_reply(struct rfm_worker *w, struct rfm_event *ev,
                      uint32_t status, uint32_t flags, uint64_t out_bytes,
                      const uint64_t *sizes);
/* Answers with a text or a pickled error that fits ev->out_capacity. */
void rfm_worker_reply_bytes(struct rfm_worker *w, struct rfm_event *ev,
                            uint32_t status, const void *bytes, uint64_t n);

#endif

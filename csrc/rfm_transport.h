/*
 * What a transport implements: one link between a rank and a worker, its
 * request slots at the worker, its reply slots at the rank.
 *
 * Ops tables are const and full. The invoker and the worker own all policy
 * (tickets, bindings, queues, deadlines, arenas); a transport moves slots, and
 * where the peer does not share our memory, the pieces of arenas that belong
 * to a slot.
 *
 * Remote links. The worker has a mirror of each arena of the rank: memory of
 * the same size under the same number, so that offsets mean the same on both
 * sides. The inputs of a request travel before its slot is seen, the outputs
 * before its reply is. What an output holds before the call is not sent.
 *
 * A side is what all links of one process share (a protection domain, an epoll
 * set). One thread or several may call its `progress`.
 */
#ifndef RFM_TRANSPORT_H
#define RFM_TRANSPORT_H

#include "rfm.h"

struct rfm_transport;
struct rfm_side;

/* What travels beside an ATTACH or ATTACHED: descriptors on a Unix socket, or
 * the transport's own bytes. */
struct rfm_parcel {
    uint32_t n_fds;
    uint32_t n_bytes;
    int      fds[RFM_MAX_FRAME_FDS];
    uint8_t  bytes[RFM_MAX_PARCEL];
};

/* A piece of an arena that belongs to a slot. */
struct rfm_region {
    uint32_t arena;
    uint32_t flags;             /* RFM_REGION_DROP: of a request over tcp */
    uint64_t offset;
    uint64_t size;
    uint8_t *address;           /* of it, on this side */
};

/* Stays as it is until the slot's reply was polled, or the link is fenced. */
struct rfm_traffic {
    struct rfm_region *push;    /* inputs: travel with the request */
    struct rfm_region *pull;    /* outputs: may travel with the reply; in the
                                 * order and of no more than the sizes here */
    uint32_t n_push;
    uint32_t n_pull;
    bool     batched;           /* rank_push follows: it may wait for that */
};

struct rfm_side_attr {
    bool        rank;
    const char *device;         /* NULL or empty: the transport chooses */
    uint32_t    spin_us;        /* worker: look so long before you sleep */
};

struct rfm_side {
    const struct rfm_transport *ops;
};

struct rfm_link_attr {
    struct rfm_side *side;
    uint32_t slots;
    uint32_t slot_bytes;
    int      door_fd;           /* shm: of this side */
    int      event_fd;          /* shm, rank: rings the service thread */
    int      data_fd;           /* tcp: the link's, also on failure; else -1 */
    uint32_t flags;             /* tcp, rank: RFM_STREAM_CRC */
};

struct rfm_link {
    const struct rfm_transport *ops;
    struct rfm_side *side;
    uint32_t slots;             /* power of two */
    uint32_t slot_bytes;
    bool     remote;            /* as ops->remote: read on the hot path */
    bool     more;              /* worker: the reply to the next request, which
                                 * is there, follows this one in no time */
    bool     robbed;            /* worker, before `failed`: something in this
                                 * process closed its descriptors */
    int32_t  failed;            /* atomic: RFM_ERR_*, once it can't go on */
    const char *why;            /* atomic: a static text, set before `failed` */
};

struct rfm_transport {
    const char *name;
    uint32_t number;            /* enum rfm_transport_number */
    bool     remote;            /* arenas are mirrored, the pidfd isn't known */
    uint64_t last_words_ns;     /* remote: what was answered before the control
                                 * connection ended may still come so long */

    /* What went wrong last in this thread, for people: it stays until the next
     * call. NULL if nothing did; the op is NULL if it is always the status. */
    const char *(*why)(void);
    /* Lines of name=value about the device, for doctor, which it opens for that;
     * NULL if there is none. A length, or what went wrong. */
    int  (*describe)(const char *device, char *text, uint64_t bytes);

    /* Sides. A transport that needs none has NULL in all of these. */
    int  (*side_open)(const struct rfm_side_attr *attr, struct rfm_side **side_p);
    void (*side_close)(struct rfm_side *side);
    /* Moves what has come into the slots of its links, and what waits onto the
     * wire. From any thread; never waits. > 0: something came, or a link
     * failed just now. */
    int  (*side_progress)(struct rfm_side *side);
    /* Readable while something waits to be moved, between side_arm and
     * side_woken, which come in pairs; several threads may have armed it, and
     * it may be woken without having been readable. After arming look once more
     * before sleeping on it. */
    int  (*side_fd)(struct rfm_side *side);
    void (*side_arm)(struct rfm_side *side);
    void (*side_woken)(struct rfm_side *side);
    /* rank: a new arena, known to all of its links; out: what the other side
     * needs to write into it. */
    int  (*side_arena)(struct rfm_side *side, uint32_t arena, uint8_t *base,
                       uint64_t bytes, struct rfm_parcel *out);
    void (*side_arena_drop)(struct rfm_side *side, uint32_t arena);

    /* rank: makes what ATTACH carries (descriptors stay the link's or the
     * caller's), then takes what ATTACHED brought (and owns it). */
    int  (*rank_open)(const struct rfm_link_attr *attr, struct rfm_link **link_p,
                      struct rfm_ctl_attach *body, struct rfm_parcel *out);
    int  (*rank_attached)(struct rfm_link *link, const struct rfm_parcel *in);
    /* remote: the worker's mirror is there; in: what it said about it */
    int  (*rank_arena)(struct rfm_link *link, uint32_t arena,
                       const struct rfm_parcel *in);
    /* remote: afterwards the slot's payload and traffic may be written again.
     * Its last reply was polled, but who sent the request before it may still
     * be about to say that it is sent. */
    void (*rank_ready)(struct rfm_link *link, uint32_t slot);
    /* where the payload of a slot is written when it doesn't fit the line */
    uint8_t *(*rank_payload)(struct rfm_link *link, uint32_t slot);
    /* Never waits; traffic is NULL on a link that isn't remote. False: a part
     * is still to be sent, by side_progress. */
    bool (*rank_post)(struct rfm_link *link, uint32_t slot,
                      const struct rfm_request_line *line,
                      const struct rfm_traffic *traffic);
    /* What was posted as part of a batch goes now; false: a part is still to be
     * sent, by side_progress. NULL: it never waits. */
    bool (*rank_push)(struct rfm_link *link);
    /* true once the reply to `id` is there: *line_p is a copy of the line */
    bool (*rank_poll)(struct rfm_link *link, uint32_t slot, uint64_t id,
                      struct rfm_reply_line *line_p, const uint8_t **payload_p);
    /* an old reply in this slot must not be taken for the next one, nor an old
     * claim; before anybody can take the next one back */
    void (*rank_forget)(struct rfm_link *link, uint32_t slot);
    /* true if what says CLAIM was not begun, and now won't be; NULL: never */
    bool (*rank_take_back)(struct rfm_link *link, uint32_t slot);
    /* ring the event once so many tickets are done; NULL on remote links */
    void (*rank_wake_at)(struct rfm_link *link, uint64_t done);
    /* Afterwards no byte is written into our memory any more, nor read from
     * it, whatever the worker does; replies that had come whole may still be
     * polled. NULL: it has to have ended. Waits for the hardware at most. */
    void (*rank_fence)(struct rfm_link *link);
    void (*rank_close)(struct rfm_link *link);

    /* worker: `out` is what ATTACHED carries, beside door and pidfd (shm) */
    int  (*worker_open)(const struct rfm_link_attr *attr,
                        const struct rfm_ctl_attach *body,
                        const struct rfm_parcel *in, struct rfm_link **link_p,
                        struct rfm_parcel *out);
    /* Remote: a mirror was made; from another thread than the one that polls.
     * in: what the rank said about its arena. base is NULL when it is going:
     * afterwards nothing is written there. RFM_ERR_BUSY if something just is. */
    int  (*worker_arena)(struct rfm_link *link, uint32_t arena, uint8_t *base,
                         uint64_t bytes, const struct rfm_parcel *in,
                         struct rfm_parcel *out);
    bool (*worker_poll)(struct rfm_link *link, uint32_t slot, uint64_t last_id,
                        struct rfm_request_line *line_p,
                        const uint8_t **payload_p);
    /* false if the rank took it back; NULL: it never does */
    bool (*worker_begin)(struct rfm_link *link, uint32_t slot);
    uint8_t *(*worker_payload)(struct rfm_link *link, uint32_t slot);
    /* payload_bytes: so much was written to worker_payload(). regions: what
     * of the outputs was written, remote only; when it returns they may be
     * written again. */
    void (*worker_reply)(struct rfm_link *link, uint32_t slot,
                         const struct rfm_reply_line *line,
                         uint64_t payload_bytes,
                         const struct rfm_region *regions, uint32_t n);
    /* after one or more replies: wake whoever sleeps; `done` tickets so far;
     * NULL on remote links */
    void (*worker_knock)(struct rfm_link *link, uint64_t done);
    void (*worker_close)(struct rfm_link *link);
};

extern const struct rfm_transport rfm_shm;
extern const struct rfm_transport rfm_tcp;

/* NULL if it is none, or one that is not there. */
const struct rfm_transport *rfm_transport_find(uint32_t number);

/* --- plug-ins ---------------------------------------------------------------
 *
 * A transport that needs a library which may be missing is a shared object of
 * its own. It has no undefined symbol of ours: it gets what it needs in one
 * table, checks the version, and answers with its ops. It is never unloaded.
 */
#define RFM_PLUGIN_VERSION 2u
#define RFM_PLUGIN_ENTRY   "rfm_plugin_open"

struct rfm_core {
    uint32_t version;           /* RFM_PLUGIN_VERSION */
    uint32_t protocol;          /* RFM_PROTOCOL */
    uint64_t transport_bytes;   /* sizeof(struct rfm_transport) */
    uint64_t (*now_ns)(void);
};

/* NULL, and why, if it can't be used here. */
typedef const struct rfm_transport *rfm_plugin_fn(const struct rfm_core *core,
                                                  const char **why_p);

/* Adds a transport; RFM_OK also if it is there already. *why_p: a text that
 * stays. Its library is loaded, and no device is opened. */
int rfm_transport_load(const char *path, const char **why_p);

static inline void rfm_link_fail(struct rfm_link *link, int status,
                                 const char *why)
{
    const char *nothing = NULL;
    int32_t none = 0;

    /* who sends and who receives may both find it broken */
    if (__atomic_compare_exchange_n(&link->why, &nothing, why, false,
                                    __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        (void)__atomic_compare_exchange_n(&link->failed, &none, status, false,
                                          __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    }
}

#endif

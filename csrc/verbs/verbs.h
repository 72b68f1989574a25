/*
 * What the parts of the verbs plug-in share; nobody else includes it.
 *
 * device.c: which device, port and address · side.c: the completion queue that
 * all links of a process share, their memory · link.c: a queue pair, from
 * set-up to fence · verbs.c: posting, polling, the ops table.
 *
 * Locks, in the order in which they are taken: side->arenas_lock (registering
 * memory), side->lock (the completion queue; try-lock on the hot path),
 * link->send_lock (the send queue; try-lock on the hot path).
 */
#ifndef RFM_VERBS_H
#define RFM_VERBS_H

#include <infiniband/verbs.h>
#include <pthread.h>
#include <sched.h>

#include "../poller.h"
#include "../rfm_transport.h"

#define RFM_VERBS_LINKS   256u
#define RFM_VERBS_WHY     320u

/* --- device.c --------------------------------------------------------------- */

struct verbs_device {
    struct ibv_context *ctx;
    char     name[64];
    uint8_t  port;
    uint8_t  path;              /* enum rfm_verbs_path */
    int      gid_index;
    union ibv_gid gid;
    struct ibv_port_attr attr;
    struct ibv_device_attr limits;
};

/* spec: name[:port[:gid index]]; NULL or empty: what RFAAS_DEVICE says, else the
 * first port that is up. */
int  rfm_verbs_open(const char *spec, struct verbs_device *dev);
void rfm_verbs_close(struct verbs_device *dev);
int  rfm_verbs_describe(const char *spec, char *text, uint64_t bytes);

/* Why it is no use to load this plug-in here, or NULL. Opens nothing. */
const char *rfm_verbs_unusable(void);
/* What went wrong since `begin` in this thread: a text for people, or NULL. */
void rfm_verbs_begin(void);
const char *rfm_verbs_why(void);
int rfm_verbs_fail(int status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* for what ibv_reg_mr said of so many bytes; errno says why */
int rfm_verbs_no_memory(uint64_t bytes);

/* --- side.c ----------------------------------------------------------------- */

/* An arena of the rank and its mirror, as the one side knows both. */
struct verbs_arena {
    uint32_t arena;
    uint32_t lkey;
    uint32_t rkey;              /* of the other side's */
    uint8_t *base;
    uint64_t bytes;
    uint64_t address;           /* of the other side's */
    struct ibv_mr *mr;          /* NULL at a rank's link: it is its side's */
};

struct verbs_side {
    struct rfm_side side;
    bool     rank;
    struct verbs_device dev;
    struct ibv_pd *pd;
    struct ibv_comp_channel *events;
    struct ibv_cq *cq;
    int      nudge_fd;          /* wakes who sleeps without a completion */
    int      fd;                /* readable if one of these or the device is */

    pthread_mutex_t arenas_lock;
    uint32_t n_arenas;
    struct verbs_arena *arenas; /* rank */
    uint32_t n_dropped;
    struct ibv_mr **dropped;    /* may still be read by what is not acknowledged */

    uint32_t lock __attribute__((aligned(RFM_CACHE_LINE)));
    bool     flushed;           /* a link was, in what is just polled */
    uint32_t arms;              /* who sleeps on it, or may */
    uint32_t cq_used;           /* entries that its links may need at most */
    uint32_t n_links;           /* highest index + 1 */
    struct verbs_link *links[RFM_VERBS_LINKS];
};

int  rfm_verbs_side_open(const struct rfm_side_attr *attr,
                         struct rfm_side **side_p);
void rfm_verbs_side_close(struct rfm_side *side);
int  rfm_verbs_side_progress(struct rfm_side *side);
int  rfm_verbs_side_fd(struct rfm_side *side);
void rfm_verbs_side_arm(struct rfm_side *side);
void rfm_verbs_side_woken(struct rfm_side *side);
int  rfm_verbs_side_arena(struct rfm_side *side, uint32_t arena, uint8_t *base,
                          uint64_t bytes, struct rfm_parcel *out);
void rfm_verbs_side_arena_drop(struct rfm_side *side, uint32_t arena);
/* with side->lock held: everything that has completed */
int  rfm_verbs_drain(struct verbs_side *side);
/* room for so many completions; side->lock held */
int  rfm_verbs_cq_reserve(struct verbs_side *side, uint32_t entries);
/* Wakes who sleeps on the side. */
void rfm_verbs_nudge(struct verbs_side *side);

/* --- link.c ----------------------------------------------------------------- */

/* wr_id: what it was · index of its link · for sends, how many went before */
enum verbs_kind { VERBS_RECV = 1, VERBS_SEND = 2, VERBS_LAST = 3 };

static inline uint64_t verbs_wr_id(enum verbs_kind kind, uint32_t index,
                                   uint32_t count)
{
    return ((uint64_t)kind << 56) | ((uint64_t)index << 32) | count;
}

struct verbs_link {
    struct rfm_link link;
    bool     rank;
    bool     connected;         /* the queue pair could move data */
    uint32_t index;             /* in its side's table */
    uint32_t qp_number;
    struct ibv_qp *qp;
    uint64_t stride;
    uint8_t *memory;            /* ring, then stage */
    uint64_t ring_bytes;        /* of each; whole pages */
    uint8_t *ring;              /* the other side writes here */
    uint8_t *stage;             /* what is too long to be sent inline */
    struct ibv_mr *ring_mr;
    struct ibv_mr *stage_mr;
    uint64_t peer_ring;
    uint32_t peer_key;
    uint32_t psn;
    uint32_t inline_bytes;      /* what the queue pair granted */
    uint32_t depth;             /* of the send queue, without the last one */
    uint32_t interval;          /* so many sends have one completion */
    uint64_t max_write;         /* in one work request */

    /* what came; words of who polls, atomic */
    uint64_t ready[RFM_MAX_SLOTS];      /* rank: id answered; worker: 1 */
    uint64_t asked[RFM_MAX_SLOTS];      /* rank: id that may be answered */
    uint32_t length[RFM_MAX_SLOTS];     /* so many bytes were written */

    /* under the side's lock */
    uint32_t received __attribute__((aligned(RFM_CACHE_LINE)));
    uint32_t batch;             /* receives are posted so many at once */
    uint32_t to_flush;          /* receives that are posted */
    bool     last_seen;         /* nothing follows it in the send queue */
    bool     flushed;           /* nobody asked for it: something went wrong */
    struct ibv_recv_wr *recvs;  /* [slots + batch], linked */

    /* sending: done is atomic, the rest under send_lock */
    uint64_t done __attribute__((aligned(RFM_CACHE_LINE)));
    uint32_t send_lock __attribute__((aligned(RFM_CACHE_LINE)));
    bool     fenced;
    uint64_t posted;
    uint64_t signalled;
    uint64_t mapped;            /* posted, when memory of an arena was last used */
    struct ibv_sge sge;
    struct ibv_send_wr write;   /* a piece of an arena */
    struct ibv_send_wr slot;    /* with immediate */
    uint32_t n_arenas;
    struct verbs_arena *arenas;

    /* rank: slots that wait to be sent */
    uint32_t queue_lock;
    uint64_t queue_head;        /* atomic */
    uint64_t queue_tail;        /* atomic */
    bool     stuck;             /* under send_lock: there was no room */
    uint32_t region;            /* of the slot at the tail: what is sent of it */
    uint64_t sent;
    uint8_t  queue[RFM_MAX_SLOTS];
    uint32_t queued[RFM_MAX_SLOTS];     /* atomic: its sender isn't done */
    const struct rfm_traffic *traffic[RFM_MAX_SLOTS];
};

int  rfm_verbs_link_make(const struct rfm_link_attr *attr, bool rank,
                         struct verbs_link **link_p);
void rfm_verbs_parcel_out(struct verbs_link *v, struct rfm_parcel *out);
/* To what the parcel names; nothing is sent before. */
int  rfm_verbs_connect(struct verbs_link *v, const struct rfm_parcel *in);
void rfm_verbs_fence(struct rfm_link *link);
void rfm_verbs_link_close(struct rfm_link *link);
struct verbs_arena *rfm_verbs_arena(struct verbs_link *v, uint32_t arena);
/* send_lock held */
int  rfm_verbs_arena_add(struct verbs_link *v, const struct verbs_arena *arena);
/* Checked; false if it makes no sense. */
bool rfm_verbs_memory_in(const struct rfm_parcel *in, uint64_t bytes,
                         struct verbs_arena *arena);
void rfm_verbs_memory_out(const struct ibv_mr *mr, struct rfm_parcel *out);

/* --- verbs.c ---------------------------------------------------------------- */

extern const struct rfm_transport rfm_verbs;

/* One completion of this link; side->lock held. > 0: a slot is ready. */
int  rfm_verbs_completed(struct verbs_link *v, const struct ibv_wc *wc);
/* Sends what waits; false if there is no room for all of it now. */
bool rfm_verbs_send_queued(struct verbs_link *v);
/* Unlocks a link that was locked for something else than to send: who found it so
 * has left what he queued to its holder. */
void rfm_verbs_let_go(struct verbs_link *v);

/* --- small things ----------------------------------------------------------- */

static inline bool verbs_try_lock(uint32_t *lock)
{
    return (rfm_load_relaxed(lock) == 0) &&
           (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE) == 0);
}

static inline void verbs_take_lock(uint32_t *lock)
{
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE) != 0) {
        sched_yield();
    }
}

static inline void verbs_unlock(uint32_t *lock)
{
    rfm_store_release(lock, 0);
}

#endif

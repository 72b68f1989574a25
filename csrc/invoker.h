/* What invoker.c, channel.c and service.c share; nobody else includes it. */
#ifndef RFM_INVOKER_H
#define RFM_INVOKER_H

#include <unistd.h>

#include "arena.h"
#include "frame.h"
#include "known.h"
#include "poller.h"
#include "rfm_transport.h"

#define RFM_MAX_CHANNELS 256u
#define RFM_HEAD_CLOSED  (1ull << 63)

/* after a deadline: the agent should have killed the worker by then */
#define RFM_LATE_KILL_NS 250000000ull

#define RFM_WATCH_ASKED  0x1u
#define RFM_WATCH_ENDED  0x2u
#define RFM_WATCH_LISTED 0x4u

enum rfm_channel_state {
    RFM_CH_NEW,         /* shaking hands: nobody else knows it             */
    RFM_CH_OPEN,        /* takes invocations                               */
    RFM_CH_DRAINING,    /* takes none, what is in flight ends              */
    RFM_CH_CLOSING,     /* told the worker to let go; waits until it did   */
    RFM_CH_DEAD,        /* fenced: unmapped, all of its requests ended     */
};

/* An arena of ours that the worker of a channel has no mirror of. */
struct rfm_lack {
    uint32_t arena;
    char     why[2 * RFM_MAX_PARCEL];
};

struct rfm_inflight {
    uint64_t id;                /* atomic; 0: not posted yet */
    struct rfm_request *req;
    bool may_take_back;
};

/*
 * Tickets: head is the next one to give out, tail the oldest that isn't done.
 * A ticket's slot is ticket % slots; the worker serves them in order.
 */
struct rfm_channel {
    struct rfm_invoker *inv;
    bool     remote;            /* its worker shares no memory with us */
    struct rfm_channel *next_buried;
    struct rfm_link *link;      /* NULL once dead; under reap_lock */
    struct rfm_link *remote_link;       /* the same, for who hears frames */
    struct rfm_side *side;
    bool     may_claim;         /* what it has not begun can be taken back */
    int      fd;                /* -1 once dead; under control */
    int      pidfd;             /* -1 once dead, or remote; under pid_lock */
    uint32_t pid;
    uint32_t worker;
    uint64_t lease;
    uint32_t slots;
    uint32_t state;             /* atomic: enum rfm_channel_state */
    bool     registered;        /* service thread only: in its epoll */
    bool     let_go;            /* we shut our half down */
    uint64_t kill_at_ns;
    bool     peer_ended;        /* service thread only: it closed its end */
    uint32_t severed;           /* atomic: remote, to be fenced and ended */
    const char *why;            /* atomic: what went wrong, if it did */
    char     reason[320];       /* the worker's own words, or the transport's */

    uint64_t head   __attribute__((aligned(RFM_CACHE_LINE)));
    uint64_t published;
    uint32_t depth;             /* how many tickets may be out */

    uint32_t reap_lock __attribute__((aligned(RFM_CACHE_LINE)));
    uint32_t reap_again;        /* remote: somebody found it taken */
    bool     broken;            /* its worker lies: nothing more is taken */
    uint64_t tail;
    uint64_t mean_exec_ns;
    struct rfm_inflight inflight[RFM_MAX_SLOTS];
    /* remote: the pieces of arenas that belong to each slot */
    struct rfm_traffic traffic[RFM_MAX_SLOTS];
    struct rfm_region *regions[RFM_MAX_SLOTS];
    uint32_t n_regions[RFM_MAX_SLOTS];  /* room for so many */
    uint32_t bulky;             /* large outputs were asked for */
    bool     refilling;         /* under the queue lock */
    uint32_t batch;             /* atomic: something waits for rfm_channel_push */
    /* Remote: the constants that its worker has. Who sends one, or says which
     * to let go of, holds the lock until that is queued to be sent: whatever is
     * decided later, or put where a constant was, is sent later, too. After the
     * heap's lock, before its list's. */
    pthread_mutex_t known_lock;
    struct rfm_known known;
    bool     may_evict;
    uint32_t n_kept;            /* atomic: results that the worker keeps for us */

    pthread_mutex_t control;    /* sending; what was sent */
    pthread_mutex_t pid_lock;   /* held for one system call */
    uint8_t *bound;             /* [RFM_MAX_BINDINGS], atomic */
    uint8_t *shipped;           /* by number of kernel */
    uint32_t shipped_size;
    uint32_t n_frames;          /* atomic: sent on the control connection */
    uint32_t arena_ready;       /* atomic: number of the last mirror + 1 */
    int32_t  arena_status;      /* of one that we could not announce */
    uint32_t arena_asked;       /* atomic: number of the last one + 1 */
    pthread_mutex_t lack_lock;
    struct rfm_lack *lacks;     /* remote */
    uint32_t n_lacks;           /* atomic */
    struct rfm_rx rx;
};

struct rfm_invoker {
    struct rfm_invoker_attr attr;
    struct rfm_heap *heap;
    struct rfm_door *door;
    int      door_fd;
    int      event_fd;
    int      epoll_fd;
    int      bell_fd;           /* wakes the leader (below) */
    uint64_t spin_ticks;
    bool     closed;

    /* By number of transport; made at its first attach. */
    struct rfm_side *sides[RFM_TRANSPORTS];
    uint32_t n_sides;
    uint32_t n_local;           /* channels that ever were on shared memory */
    uint32_t watching[RFM_TRANSPORTS];  /* atomic: the service thread looks at sides */
    uint32_t ticking;           /* atomic: it looks whether it has to, often */
    uint32_t waited;            /* atomic: how often somebody has waited */
    /* The one sleeper that waits on the sides themselves; others sleep on the
     * door, which it rings. */
    uint32_t leader;

    uint64_t constants_limit;   /* atomic: bytes at each worker; 0: any amount */
    uint64_t constants_sent;    /* atomic: bytes */
    uint64_t constants_dropped; /* atomic: bytes that workers were to let go of */

    uint64_t next_id __attribute__((aligned(RFM_CACHE_LINE)));

    uint32_t n_channels __attribute__((aligned(RFM_CACHE_LINE)));
    uint32_t next_channel;
    /* Dead ones give their places to new ones, but stay in memory: anybody
     * may still look at them. */
    struct rfm_channel *channels[RFM_MAX_CHANNELS];
    struct rfm_channel *buried;

    uint64_t queued __attribute__((aligned(RFM_CACHE_LINE)));
    uint32_t pollers;
    uint32_t abandoned;         /* nobody will serve the queue */

    pthread_mutex_t queue_lock __attribute__((aligned(RFM_CACHE_LINE)));
    struct rfm_request *first;
    struct rfm_request *last;
    struct rfm_request *soonest;        /* deadlines, unsorted list */
    struct rfm_request *ended;          /* atomic stack of watched requests */

    pthread_mutex_t admin;      /* channels, kernels, bindings */
    struct rfm_kernel *kernels;
    uint32_t next_kernel;
    uint32_t next_binding;
    uint32_t n_free_numbers;
    uint32_t *free_numbers;     /* [RFM_MAX_BINDINGS] */

    pthread_t service;
    bool      service_runs;
    uint32_t  stop;             /* atomic */
    uint32_t  fork_generation;
};

/* channel.c */
int  rfm_channel_create(struct rfm_invoker *inv,
                        const struct rfm_attach_attr *attr,
                        const struct rfm_transport *ops,
                        struct rfm_channel **chan_p);
void rfm_channel_destroy(struct rfm_channel *chan);
/* RFM_ERR_NO_RESOURCE: full; RFM_ERR_CLOSED: takes none; RFM_ERR_TOO_LARGE: its
 * worker has no mirror of an arena that the request needs, which says so in its
 * result */
int  rfm_channel_post(struct rfm_channel *chan, struct rfm_request *req);
/* What was posted batched is on its way afterwards. No lock may be held. */
void rfm_channel_push(struct rfm_channel *chan);
/* Replies moved, or RFM_ERR_BUSY when somebody else is at it. */
int  rfm_channel_reap(struct rfm_channel *chan);
/* What the worker hasn't begun, and now won't: `req`, or the newest one if it
 * is NULL. It is nowhere then; NULL if there is none. */
struct rfm_request *rfm_channel_take_back(struct rfm_channel *chan,
                                          struct rfm_request *req);
/* The same for what was posted to this slot under this id, if it still is. */
struct rfm_request *rfm_channel_take_back_at(struct rfm_channel *chan,
                                             uint32_t slot, uint64_t id);
/* The same, and from now on the worker wakes the service thread once half of
 * what it has is done. */
int  rfm_channel_arm(struct rfm_channel *chan);
/* Its worker can't write any more: ends what was in flight, unmaps. */
void rfm_channel_dead(struct rfm_channel *chan);
/* On remote channels it waits until the mirror is there. False: the worker has
 * no room for it; what else goes wrong ends the channel. */
bool rfm_channel_send_arena(struct rfm_channel *chan,
                            const struct rfm_arena_info *arena);
/* It is dropped: nobody lacks it any more. */
void rfm_channel_forget_arena(struct rfm_channel *chan, uint32_t arena);
/* It is no constant any more; from a hook of the heap. */
void rfm_channel_melted(struct rfm_channel *chan, uint32_t serial);
/* For rfm_attach_why(); NULL: nothing is known. */
void rfm_attach_said(const char *text);
/* Fences it and has the service thread end it, from any thread (remote). */
void rfm_channel_sever(struct rfm_channel *chan, const char *why);
/* A frame of its worker (service thread, or before it is registered). */
int  rfm_channel_heard(struct rfm_channel *chan);
void rfm_channel_send_number(struct rfm_channel *chan, uint16_t type,
                             uint32_t number, uint64_t cookie);
/* Some requests are for workers of this node alone, whatever else is there: their
 * arguments are shared, and none of them travels. */
static inline bool rfm_channel_suits(const struct rfm_channel *chan,
                                     const struct rfm_request *req)
{
    return ((req->wire_flags & RFM_REQ_CLAIM) == 0) || chan->may_claim;
}

static inline uint64_t rfm_channel_in_flight(struct rfm_channel *chan)
{
    uint64_t tail = rfm_load_acquire(&chan->tail);
    uint64_t head = rfm_load_acquire(&chan->head) & ~RFM_HEAD_CLOSED;

    return head - tail;
}

static inline struct rfm_channel *rfm_channel_at(struct rfm_invoker *inv,
                                                uint32_t i)
{
    return rfm_load_acquire(&inv->channels[i]);
}

/* invoker.c */
void rfm_request_end(struct rfm_request *req, enum rfm_outcome outcome);
void rfm_invoker_pump(struct rfm_invoker *inv);
/* Ends what is overdue and still queued, kills workers that hold on to what
 * is overdue; when to look again. */
uint64_t rfm_invoker_expire(struct rfm_invoker *inv, uint64_t now);

/* Wakes whoever sleeps, on the door or on the sides. */
static inline void rfm_invoker_knock(struct rfm_invoker *inv)
{
    rfm_door_knock(inv->door);
    if (__builtin_expect(rfm_load_relaxed(&inv->leader) != 0, 0)) {
        uint64_t one = 1;

        if (write(inv->bell_fd, &one, sizeof(one)) < 0) {
            return;             /* full: it is ringing already */
        }
    }
}

/* service.c */
/* The service thread looks at the sides once, when something comes. */
void rfm_service_watch(struct rfm_invoker *inv);
/* Something large is to come, and nobody waits for it: if that stays so for a
 * while, the service thread takes it. Cheap if that was said just before. */
void rfm_service_mind(struct rfm_invoker *inv);
/* The same, for large replies: without a reader their workers wait for us. */
void rfm_service_expect(struct rfm_invoker *inv);
int  rfm_service_start(struct rfm_invoker *inv);
void rfm_service_stop(struct rfm_invoker *inv);
void rfm_service_kick(struct rfm_invoker *inv);

#endif

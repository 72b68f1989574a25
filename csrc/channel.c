/*
 * A channel: one rank, one worker. Tickets, posting, reaping, and its end.
 *
 * Posting: take a ticket (one compare-and-swap), fill the slot, publish.
 * Reaping: whoever holds the try-lock moves replies into their requests, in
 * order. The end: no new tickets, wait for the last publisher, reap what
 * arrived, end the rest LOST, unmap. All of it is safe from any thread.
 */
#define _GNU_SOURCE
#include "invoker.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "arena.h"

#define AHEAD_NS     256000ull      /* this much work is sent ahead          */
#define LEAST_AHEAD  2u             /* one runs, one follows without us      */
#define CLAIM_NS     20000ull       /* waiting behind this is worth a claim  */
#define LONGEST_NS   (1ull << 56)   /* two years                             */
#define BRIEF_NS     3000u          /* a message costs more                   */
#define LEAST_BATCHED 8u
#define MIRROR_NS    10000000000ull /* a worker may take so long for a mirror */
#define MOST_DROPPED 16u            /* constants that one request lets go of */
#define BULKY        65536u         /* more won't fit a socket's buffer       */

/* --- reasons --------------------------------------------------------------- */

static _Thread_local char attach_why[sizeof(((struct rfm_channel *)0)->reason)];

const char *rfm_attach_why(void)
{
    return (attach_why[0] != 0) ? attach_why : NULL;
}

/* The first one counts; NULL: a better one may come. */
static void settle_why(struct rfm_channel *chan, const char *why)
{
    const char *none = NULL;

    (void)__atomic_compare_exchange_n(&chan->why, &none, why, false,
                                      __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

/* printable, whatever it was */
static void take_text(char *to, uint64_t room, const uint8_t *from, uint64_t n)
{
    if (n >= room) {
        n = room - 1;
    }
    for (uint64_t i = 0; i < n; i++) {
        to[i] = ((from[i] >= 32) && (from[i] < 127)) ? (char)from[i] : '?';
    }
    to[n] = 0;
}

void rfm_attach_said(const char *text)
{
    if (text == NULL) {
        text = "";
    }
    take_text(attach_why, sizeof(attach_why), (const uint8_t *)text,
              strlen(text));
}

/* The first one counts; it is what a channel ends with. */
static void take_reason(struct rfm_channel *chan, const uint8_t *from,
                        uint64_t n)
{
    const char *none = NULL;

    if ((n == 0) || (chan->reason[0] != 0)) {
        return;
    }
    take_text(chan->reason, sizeof(chan->reason), from, n);
    (void)__atomic_compare_exchange_n(&chan->why, &none, chan->reason, false,
                                      __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

/* what our own transport said of its last failure */
static const char *words_of(const struct rfm_transport *ops)
{
    return (ops->why != NULL) ? ops->why() : NULL;
}

/* --- setting up ----------------------------------------------------------- */

static int await_readable(int fd, uint64_t deadline_ns)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };

    for (;;) {
        uint64_t now = rfm_now_ns();
        int rc;

        if (now >= deadline_ns) {
            return RFM_ERR_TIMEOUT;
        }
        rc = poll(&p, 1, (int)((deadline_ns - now) / 1000000ull) + 1);
        if (rc > 0) {
            return RFM_OK;
        }
        if ((rc < 0) && (errno != EINTR)) {
            return RFM_ERR_SYSTEM;
        }
    }
}

/* Counted, because a remote worker gets requests on another way: each says how
 * many frames were sent before it. Under chan->control, or before anybody else
 * knows the channel. */
static int send_frame(struct rfm_channel *chan, uint16_t type, uint64_t cookie,
                      const struct iovec *iov, uint32_t n_iov, const int *fds,
                      uint32_t n_fds)
{
    rfm_store_release(&chan->n_frames, chan->n_frames + 1);
    return rfm_frame_send(chan->fd, type, cookie, iov, n_iov, fds, n_fds);
}

/* A peer that is gone shows by its pidfd. One that doesn't read, or that may
 * have seen half a frame, can't be used any more. */
static void sent(struct rfm_channel *chan, int rc)
{
    if ((rc < 0) && (rc != RFM_ERR_PEER)) {
        (void)rfm_channel_kill(chan);
    }
}

static void send_arena(void *ctx, const struct rfm_arena_info *arena)
{
    (void)rfm_channel_send_arena(ctx, arena);
}

/* --- arenas that the worker has no mirror of ------------------------------- */

/* with the lock held */
static const struct rfm_lack *find_lack(const struct rfm_channel *chan,
                                        uint32_t arena)
{
    for (uint32_t i = 0; i < chan->n_lacks; i++) {
        if (chan->lacks[i].arena == arena) {
            return &chan->lacks[i];
        }
    }
    return NULL;
}

/* Why it has none of this one; what it says of others is not asked for. */
static int note_lack(struct rfm_channel *chan, uint32_t arena,
                     const uint8_t *why, size_t n_bytes)
{
    struct rfm_lack *more;
    int rc = RFM_OK;

    if (arena + 1 != rfm_load_acquire(&chan->arena_asked)) {
        return RFM_ERR_PROTOCOL;
    }
    pthread_mutex_lock(&chan->lack_lock);
    if (find_lack(chan, arena) != NULL) {
        rc = RFM_ERR_PROTOCOL;
        goto out;
    }
    more = realloc(chan->lacks, (chan->n_lacks + 1) * sizeof(*more));
    if (more == NULL) {
        rc = RFM_ERR_NO_MEMORY;
        goto out;
    }
    chan->lacks = more;
    more += chan->n_lacks;
    more->arena = arena;
    take_text(more->why, sizeof(more->why), why, n_bytes);
    rfm_store_release(&chan->n_lacks, chan->n_lacks + 1);
out:
    pthread_mutex_unlock(&chan->lack_lock);
    return rc;
}

void rfm_channel_forget_arena(struct rfm_channel *chan, uint32_t arena)
{
    pthread_mutex_lock(&chan->lack_lock);
    for (uint32_t i = 0; i < chan->n_lacks; i++) {
        if (chan->lacks[i].arena == arena) {
            chan->lacks[i] = chan->lacks[chan->n_lacks - 1];
            rfm_store_release(&chan->n_lacks, chan->n_lacks - 1);
            break;
        }
    }
    pthread_mutex_unlock(&chan->lack_lock);
}

static bool is_lacked(struct rfm_channel *chan, uint32_t arena)
{
    bool lacked;

    pthread_mutex_lock(&chan->lack_lock);
    lacked = find_lack(chan, arena) != NULL;
    pthread_mutex_unlock(&chan->lack_lock);
    return lacked;
}

/* We could not announce it: what needs it can't be done here, all else can. */
static int note_own_lack(struct rfm_channel *chan, uint32_t arena)
{
    const char *words = words_of(chan->side->ops);
    const char *why = (words != NULL) ? words : "it could not be announced";

    rfm_store_release(&chan->arena_asked, arena + 1);
    return note_lack(chan, arena, (const uint8_t *)why, strlen(why));
}

static void sever_without_arena(struct rfm_channel *chan, int status)
{
    const char *words = words_of(chan->side->ops);

    chan->arena_status = status;
    if (words != NULL) {
        take_reason(chan, (const uint8_t *)words, strlen(words));
    }
    rfm_channel_sever(chan, "an arena could not be announced");
}

/* Before it is registered nobody else reads its connection. */
static void await_mirror(struct rfm_channel *chan, uint32_t arena)
{
    uint64_t deadline = rfm_now_ns() + MIRROR_NS;

    while (rfm_load_acquire(&chan->arena_ready) != arena + 1) {
        bool mine = rfm_load_acquire(&chan->state) == RFM_CH_NEW;
        struct timespec ts = { 0, 50000 };
        int rc = RFM_OK;

        if (mine) {
            rc = await_readable(chan->fd, deadline);
            if (rc == RFM_OK) {
                rc = rfm_rx_read(&chan->rx, chan->fd);
                rc = (rc == RFM_OK) ? rfm_channel_heard(chan)
                                    : ((rc == RFM_ERR_AGAIN) ? RFM_OK : rc);
            }
        } else if ((rfm_load_acquire(&chan->severed) != 0) ||
                   (rfm_load_acquire(&chan->state) >= RFM_CH_CLOSING)) {
            return;
        } else {
            nanosleep(&ts, NULL);
        }
        if ((rc < 0) || (rfm_now_ns() > deadline)) {
            rfm_channel_sever(chan, "the worker made no mirror of an arena");
            return;
        }
    }
}

bool rfm_channel_send_arena(struct rfm_channel *chan,
                            const struct rfm_arena_info *arena)
{
    struct rfm_ctl_arena body = { .arena = arena->id, .bytes = arena->bytes };
    struct rfm_parcel parcel = { 0 };
    struct iovec iov[2] = { { &body, sizeof(body) }, { parcel.bytes, 0 } };
    int fd = arena->fd;
    bool wait = false;

    pthread_mutex_lock(&chan->control);
    if (chan->fd >= 0) {
        if (chan->remote) {
            int rc = chan->side->ops->side_arena(chan->side, arena->id,
                                                 arena->base, arena->bytes,
                                                 &parcel);

            iov[1].iov_len = parcel.n_bytes;
            if (rc == RFM_OK) {
                rfm_store_release(&chan->arena_asked, arena->id + 1);
                rc = send_frame(chan, RFM_CTL_ARENA, 0, iov, 2, NULL, 0);
            }
            if (rc == RFM_ERR_NO_MEMORY) {
                rc = note_own_lack(chan, arena->id);
            }
            if ((rc < 0) && (rc != RFM_ERR_PEER)) {
                sever_without_arena(chan, rc);
            }
            wait = (rc == RFM_OK) && !is_lacked(chan, arena->id);
        } else {
            sent(chan, send_frame(chan, RFM_CTL_ARENA, 0, iov, 1, &fd, 1));
        }
    }
    pthread_mutex_unlock(&chan->control);
    if (wait) {
        await_mirror(chan, arena->id);
    }
    return (rfm_load_acquire(&chan->n_lacks) == 0) ||
           !is_lacked(chan, arena->id);
}

int rfm_channel_heard(struct rfm_channel *chan)
{
    struct rfm_ctl_arena_ready body;
    struct rfm_parcel parcel = { 0 };
    int rc = RFM_OK;

    if (chan->rx.head.type == RFM_CTL_DRAIN) {
        rfm_channel_drain(chan);
    } else if ((chan->rx.head.type == RFM_CTL_ARENA_READY) && chan->remote) {
        uint32_t n = chan->rx.head.length;

        if ((n < sizeof(body)) || (n - sizeof(body) > sizeof(parcel.bytes))) {
            rc = RFM_ERR_PROTOCOL;
        } else {
            memcpy(&body, chan->rx.body, sizeof(body));
            parcel.n_bytes = n - (uint32_t)sizeof(body);
            memcpy(parcel.bytes, chan->rx.body + sizeof(body), parcel.n_bytes);
            rc = (body.status == RFM_OK)
                     ? chan->remote_link->ops->rank_arena(chan->remote_link,
                                                          body.arena, &parcel)
                     : note_lack(chan, body.arena, parcel.bytes,
                                 parcel.n_bytes);
            rfm_store_release(&chan->arena_ready, body.arena + 1);
        }
    } else if (chan->rx.head.type == RFM_CTL_REFUSED) {
        take_reason(chan, chan->rx.body, chan->rx.head.length);
    }
    rfm_rx_fini(&chan->rx);
    return rc;
}

void rfm_channel_send_number(struct rfm_channel *chan, uint16_t type,
                             uint32_t number, uint64_t cookie)
{
    struct rfm_ctl_number body = { .number = number };
    struct iovec iov = { &body, sizeof(body) };

    pthread_mutex_lock(&chan->control);
    if (chan->fd < 0) {
        pthread_mutex_unlock(&chan->control);
        return;
    }
    if (type == RFM_CTL_UNBIND) {
        uint8_t *bound = &chan->bound[number % RFM_MAX_BINDINGS];

        if (*bound == 0) {
            pthread_mutex_unlock(&chan->control);
            return;
        }
        rfm_store_release(bound, 0);
    }
    if (type == RFM_CTL_DISCARD) {
        (void)__atomic_fetch_sub(&chan->n_kept, 1, __ATOMIC_RELEASE);
    }
    sent(chan, send_frame(chan, type, cookie, &iov, 1, NULL, 0));
    pthread_mutex_unlock(&chan->control);
}

static int send_signal(int pidfd, int signal)
{
    if (syscall(SYS_pidfd_send_signal, pidfd, signal, NULL, 0) != 0) {
        return (errno == ESRCH) ? RFM_ERR_PEER : RFM_ERR_SYSTEM;
    }
    return RFM_OK;
}

/* what ATTACHED brought; the descriptors are the channel's, or the link's */
static int take_attached(struct rfm_channel *chan, struct rfm_link *link)
{
    uint32_t want_fds = chan->remote ? 0 : 2;
    struct rfm_parcel parcel = { 0 };
    struct rfm_ctl_attached answer;
    uint32_t n = chan->rx.head.length;
    int rc;

    if ((chan->rx.head.type != RFM_CTL_ATTACHED) || (n < sizeof(answer)) ||
        (n - sizeof(answer) > sizeof(parcel.bytes)) ||
        (chan->rx.n_fds != want_fds)) {
        return RFM_ERR_PROTOCOL;
    }
    memcpy(&answer, chan->rx.body, sizeof(answer));
    parcel.n_bytes = n - (uint32_t)sizeof(answer);
    memcpy(parcel.bytes, chan->rx.body + sizeof(answer), parcel.n_bytes);
    free(chan->rx.body);
    chan->pid = answer.pid;
    if (!chan->remote) {
        parcel.n_fds  = 1;
        parcel.fds[0] = chan->rx.fds[0];
        chan->pidfd   = chan->rx.fds[1];
    }
    rfm_rx_next(&chan->rx);
    if (chan->remote && (answer.status < 0)) {
        take_text(attach_why, sizeof(attach_why), parcel.bytes, parcel.n_bytes);
        return answer.status;   /* there is nothing to connect to */
    }
    rc = link->ops->rank_attached(link, &parcel);
    if (rc < 0) {
        rfm_attach_said(words_of(link->ops));
        return rc;
    }
    if (answer.status < 0) {
        return answer.status;
    }
    if (chan->remote) {
        return RFM_OK;
    }
    /* the fence hangs on it: it must be a process, and one that we may kill */
    rc = send_signal(chan->pidfd, 0);
    if (rc < 0) {
        return (rc == RFM_ERR_PEER) ? RFM_ERR_PEER : RFM_ERR_PROTOCOL;
    }
    return RFM_OK;
}

/* ATTACH, then ATTACHED */
static int shake_hands(struct rfm_channel *chan, const struct rfm_transport *ops,
                       const struct rfm_attach_attr *given,
                       uint64_t deadline_ns)
{
    struct rfm_invoker *inv = chan->inv;
    struct rfm_link_attr attr = {
        .side       = chan->side,
        .slots      = inv->attr.slots,
        .slot_bytes = inv->attr.slot_bytes,
        .door_fd    = inv->door_fd,
        .event_fd   = inv->event_fd,
        .data_fd    = given->data_fd,
        .flags      = given->flags,
    };
    struct rfm_parcel parcel = { 0 };
    struct rfm_ctl_attach body;
    struct rfm_link *link;
    struct iovec iov[2] = { { &body, sizeof(body) }, { parcel.bytes, 0 } };
    int rc;

    rc = ops->rank_open(&attr, &link, &body, &parcel);
    if (rc < 0) {
        rfm_attach_said(words_of(ops));
        return rc;
    }
    body.memory_limit = inv->attr.memory_limit;
    body.transport    = ops->number;
    iov[1].iov_len    = parcel.n_bytes;
    rc = send_frame(chan, RFM_CTL_ATTACH, 0, iov, 2, parcel.fds,
                        parcel.n_fds);
    if (rc < 0) {
        goto err_link;
    }
    do {
        rc = await_readable(chan->fd, deadline_ns);
        if (rc < 0) {
            goto err_link;
        }
        rc = rfm_rx_read(&chan->rx, chan->fd);
    } while (rc == RFM_ERR_AGAIN);
    if (rc < 0) {
        goto err_link;
    }
    rc = take_attached(chan, link);
    if (rc < 0) {
        goto err_link;
    }
    chan->link        = link;
    chan->may_claim   = ops->rank_take_back != NULL;
    chan->remote_link = chan->remote ? link : NULL;
    return RFM_OK;

err_link:
    ops->rank_close(link);
    return rc;
}

int rfm_channel_create(struct rfm_invoker *inv,
                       const struct rfm_attach_attr *attr,
                       const struct rfm_transport *ops,
                       struct rfm_channel **chan_p)
{
    struct rfm_channel *chan;
    int rc;

    chan = aligned_alloc(RFM_CACHE_LINE, sizeof(*chan));
    if (chan == NULL) {
        close(attr->fd);
        if (attr->data_fd >= 0) {
            close(attr->data_fd);
        }
        return RFM_ERR_NO_MEMORY;
    }
    memset(chan, 0, sizeof(*chan));
    chan->inv    = inv;
    chan->remote = ops->remote;
    chan->side   = inv->sides[ops->number];
    chan->state  = RFM_CH_NEW;
    chan->fd     = attr->fd;
    chan->pidfd  = -1;
    chan->lease  = attr->lease;
    chan->worker = attr->worker;
    chan->slots  = inv->attr.slots;
    chan->depth  = LEAST_AHEAD;
    chan->bound = calloc(RFM_MAX_BINDINGS, 1);
    pthread_mutex_init(&chan->control, NULL);
    pthread_mutex_init(&chan->pid_lock, NULL);
    pthread_mutex_init(&chan->lack_lock, NULL);
    pthread_mutex_init(&chan->known_lock, NULL);
    /* What a device has pinned does not go by letting go of it, and what it
     * writes keeps no order with what is said on the way. */
    chan->may_evict = ops->number == RFM_TRANSPORT_TCP;
    rfm_rx_init(&chan->rx, 4096);
    if (chan->bound == NULL) {
        if (attr->data_fd >= 0) {
            close(attr->data_fd);
        }
        rfm_channel_destroy(chan);
        return RFM_ERR_NO_MEMORY;
    }
    rc = shake_hands(chan, ops, attr, rfm_now_ns() + attr->timeout_ns);
    if (rc < 0) {
        rfm_channel_destroy(chan);
        return rc;
    }
    /* under the heap's lock no arena is missed, and none comes twice */
    rfm_heap_lock(inv->heap);
    rfm_heap_each(inv->heap, send_arena, chan);
    if (rfm_load_acquire(&chan->severed) != 0) {
        rfm_heap_unlock(inv->heap);
        rc = (chan->arena_status < 0) ? chan->arena_status : RFM_ERR_PEER;
        rfm_attach_said(rfm_channel_why(chan));
        rfm_channel_destroy(chan);
        return rc;
    }
    rfm_store_release(&chan->state, RFM_CH_OPEN);
    *chan_p = chan;
    return RFM_OK;      /* with the lock held: the caller publishes the channel */
}

void rfm_channel_destroy(struct rfm_channel *chan)
{
    if (chan->link != NULL) {
        chan->link->ops->rank_close(chan->link);
    }
    if (chan->fd >= 0) {
        close(chan->fd);
    }
    if (chan->pidfd >= 0) {
        close(chan->pidfd);
    }
    rfm_rx_fini(&chan->rx);
    pthread_mutex_destroy(&chan->control);
    pthread_mutex_destroy(&chan->pid_lock);
    pthread_mutex_destroy(&chan->lack_lock);
    pthread_mutex_destroy(&chan->known_lock);
    free(chan->lacks);
    for (uint32_t i = 0; i < RFM_MAX_SLOTS; i++) {
        free(chan->regions[i]);
    }
    free(chan->bound);
    free(chan->shipped);
    rfm_known_fini(&chan->known);
    free(chan);
}

/* --- binding -------------------------------------------------------------- */

/* under chan->control */
static bool was_shipped(struct rfm_channel *chan, uint32_t kernel)
{
    if (kernel >= chan->shipped_size) {
        uint32_t grown = (kernel + 64) * 2;
        uint8_t *more  = realloc(chan->shipped, grown);

        if (more == NULL) {
            return false;
        }
        memset(more + chan->shipped_size, 0, grown - chan->shipped_size);
        chan->shipped      = more;
        chan->shipped_size = grown;
    }
    return chan->shipped[kernel] != 0;
}

static int send_kernel(struct rfm_channel *chan, const struct rfm_kernel *kernel)
{
    struct rfm_ctl_kernel body = {
        .kernel     = kernel->number,
        .kind       = kernel->kind,
        .blob_bytes = kernel->blob_bytes,
    };
    struct iovec iov[2] = {
        { &body, sizeof(body) },
        { kernel->blob, kernel->blob_bytes },
    };
    int rc;

    if (was_shipped(chan, kernel->number)) {
        return RFM_OK;
    }
    memcpy(body.digest, kernel->digest, sizeof(body.digest));
    rc = send_frame(chan, RFM_CTL_KERNEL, 0, iov, 2, NULL, 0);
    if ((rc == RFM_OK) && (kernel->number < chan->shipped_size)) {
        chan->shipped[kernel->number] = 1;
    }
    return rc;
}

static int send_binding(struct rfm_channel *chan,
                        const struct rfm_binding *binding)
{
    struct rfm_wire_arg args[RFM_MAX_ARGS];
    struct rfm_ctl_bind body = {
        .binding    = binding->number,
        .kernel     = binding->kernel->number,
        .n_in       = binding->n_in,
        .n_out      = binding->n_out,
        .flags      = binding->flags,
        .meta_bytes = binding->meta_bytes,
    };
    uint32_t n = (uint32_t)binding->n_in + binding->n_out;
    struct iovec iov[3] = {
        { &body, sizeof(body) },
        { args, n * sizeof(args[0]) },
        { binding->meta, binding->meta_bytes },
    };
    uint8_t *bound = &chan->bound[binding->number % RFM_MAX_BINDINGS];
    int rc = RFM_OK;

    memset(args, 0, n * sizeof(args[0]));
    for (uint32_t i = 0; i < n; i++) {
        args[i].place  = (uint8_t)binding->args[i].place;
        args[i].flags  = (uint8_t)binding->args[i].flags;
        args[i].arena  = binding->args[i].arena;
        args[i].offset = binding->args[i].offset;
        args[i].size   = binding->args[i].size;
    }
    pthread_mutex_lock(&chan->control);
    if (*bound == 0) {
        rc = send_kernel(chan, binding->kernel);
        if (rc == RFM_OK) {
            rc = send_frame(chan, RFM_CTL_BIND, 0, iov, 3, NULL, 0);
        }
        if (rc == RFM_OK) {
            rfm_store_release(bound, 1);
        }
        sent(chan, rc);
    }
    pthread_mutex_unlock(&chan->control);
    return rc;
}

/* --- posting -------------------------------------------------------------- */

static void write_payload(const struct rfm_request *req, uint8_t *to)
{
    const struct rfm_binding *binding = req->binding;
    uint32_t n = (uint32_t)binding->n_in + binding->n_out;

    for (uint32_t i = 0; i < n; i++) {
        const struct rfm_arg *arg = &binding->args[i];

        if (arg->place == RFM_CALL) {
            memcpy(to + arg->at, &req->args[i].desc, sizeof(struct rfm_desc));
        } else if ((arg->place == RFM_INLINE) && (i < binding->n_in)) {
            memcpy(to + arg->at, req->args[i].user, arg->size);
        }
    }
}

static void fill_slot(struct rfm_channel *chan, struct rfm_request *req,
                      uint32_t slot, bool may_take_back,
                      struct rfm_request_line *line)
{
    const struct rfm_transport *ops = chan->link->ops;
    uint8_t *to = line->payload;

    line->id        = req->wire_id;
    line->binding   = req->binding->number;
    line->flags     = req->wire_flags | (may_take_back ? RFM_REQ_CLAIM : 0);
    if (chan->remote) {
        line->flags |= rfm_load_acquire(&chan->n_frames) << RFM_REQ_AFTER_SHIFT;
    }
    line->budget_ns = 0;
    if ((req->wire_flags & RFM_REQ_FETCH) != 0) {
        struct rfm_wire_fetch fetch = { req->id, req->into };

        line->in_bytes = sizeof(fetch);
        memcpy(to, &fetch, sizeof(fetch));
    } else if ((req->wire_flags & (RFM_REQ_OBJECT | RFM_REQ_STAGED)) != 0) {
        line->in_bytes = req->payload_bytes;
        if (req->payload_bytes > RFM_INLINE_BYTES) {
            to = ops->rank_payload(chan->link, slot);
        }
        memcpy(to, req->payload, req->payload_bytes);
    } else {
        line->in_bytes = req->binding->layout.in_bytes;
        if (line->in_bytes > RFM_INLINE_BYTES) {
            to = ops->rank_payload(chan->link, slot);
        }
        write_payload(req, to);
    }
    if (req->deadline_ns != 0) {
        uint64_t now = rfm_now_ns();

        line->budget_ns = (now < req->deadline_ns) ? req->deadline_ns - now : 1;
    }
    if ((req->attempts > 1) || ((line->flags & RFM_REQ_CLAIM) != 0)) {
        ops->rank_forget(chan->link, slot);
    }
}

/* To claim costs the worker a cache line: not for what it begins at once, nor
 * behind kernels so short that waiting for them is no matter. */
static bool waits_behind(struct rfm_channel *chan, struct rfm_request *req,
                         uint64_t ticket)
{
    uint64_t mean = rfm_load_relaxed(&chan->mean_exec_ns);

    if (((req->wire_flags & RFM_REQ_FETCH) != 0) || !chan->may_claim) {
        return false;
    }
    return ((req->wire_flags & (RFM_REQ_OBJECT | RFM_REQ_CLAIM)) != 0) ||
           ((ticket != rfm_load_relaxed(&chan->tail)) &&
            ((mean == 0) || (mean > CLAIM_NS)));
}

/* --- what travels with a slot (remote) ------------------------------------ */

static struct rfm_region *room_for(struct rfm_channel *chan, uint32_t slot,
                                   uint32_t n)
{
    if (n > chan->n_regions[slot]) {
        struct rfm_region *more = realloc(chan->regions[slot],
                                          (n + 16) * sizeof(*more));

        if (more == NULL) {
            return NULL;
        }
        chan->regions[slot]   = more;
        chan->n_regions[slot] = n + 16;
    }
    return chan->regions[slot];
}

/* --- constants: sent whole, once, until they are let go of ------------------- */

void rfm_channel_melted(struct rfm_channel *chan, uint32_t serial)
{
    if (chan->remote) {
        pthread_mutex_lock(&chan->known_lock);
        rfm_known_drop(&chan->known, serial);
        pthread_mutex_unlock(&chan->known_lock);
    }
}

/* What a request says of constants, while it is put together. */
struct news {
    uint64_t ticket;
    bool     any;               /* it brings or drops one */
    bool     open;              /* there are constants: the lock is held */
};

/* A piece of a constant that the worker has is not sent; of another one, all of
 * it is. False: nothing is to be sent. */
static bool still_to_send(struct rfm_channel *chan, struct rfm_region *region,
                          struct news *news)
{
    struct rfm_constant found;

    if (!news->open ||
        !rfm_heap_find_constant(chan->inv->heap, region->arena, region->offset,
                                region->size, &found)) {
        return true;
    }
    if (rfm_known_use(&chan->known, found.serial, news->ticket)) {
        return false;
    }
    (void)rfm_known_add(&chan->known, &found, news->ticket);
    (void)__atomic_fetch_add(&chan->inv->constants_sent, found.size,
                             __ATOMIC_RELAXED);
    news->any       = true;
    region->offset  = found.offset;
    region->size    = found.size;
    region->address = found.address;
    return true;
}

/* After all that it uses was looked at. There is room for MOST_DROPPED. */
static void drop_constants(struct rfm_channel *chan, struct rfm_traffic *traffic,
                           struct news *news)
{
    uint64_t limit = rfm_load_relaxed(&chan->inv->constants_limit);
    struct rfm_constant what;
    uint64_t tail;

    if (!news->open || !chan->may_evict || (chan->known.bytes <= limit)) {
        return;
    }
    /* in this order: a result is kept before its ticket is done */
    tail = rfm_load_acquire(&chan->tail);
    if (rfm_load_acquire(&chan->n_kept) != 0) {
        return;                 /* it may be made of them */
    }
    for (uint32_t n = 0; (n < MOST_DROPPED) &&
                         rfm_known_evict(&chan->known, limit, tail, &what);
         n++) {
        traffic->push[traffic->n_push++] = (struct rfm_region){
            .arena   = what.arena,
            .flags   = RFM_REGION_DROP,
            .offset  = what.offset,
            .size    = what.size,
            .address = what.address,
        };
        (void)__atomic_fetch_add(&chan->inv->constants_dropped, what.size,
                                 __ATOMIC_RELAXED);
        news->any = true;
    }
}

static bool region_at(struct rfm_channel *chan, const struct rfm_desc *desc,
                      struct rfm_region *region)
{
    region->arena   = desc->arena;
    region->flags   = 0;
    region->offset  = desc->offset;
    region->size    = desc->size;
    region->address = rfm_heap_address(chan->inv->heap, desc->arena,
                                       desc->offset, desc->size);
    return region->address != NULL;
}

/* the staged object, and the arrays that it refers to */
static bool gather_object(struct rfm_channel *chan, const struct rfm_request *req,
                          uint32_t slot, struct news *news)
{
    struct rfm_traffic *traffic = &chan->traffic[slot];
    const uint8_t *from = req->payload;
    uint64_t n = req->payload_bytes;
    struct rfm_region staged = { 0 };
    struct rfm_region *regions;
    struct rfm_object head;
    struct rfm_desc desc;
    uint64_t at;

    if ((req->wire_flags & RFM_REQ_STAGED) != 0) {
        memcpy(&desc, req->payload, sizeof(desc));
        if (!region_at(chan, &desc, &staged)) {
            return false;
        }
        from = staged.address;
        n    = staged.size;
    }
    if (n < sizeof(head)) {
        return true;            /* whoever opens it will say so */
    }
    memcpy(&head, from, sizeof(head));
    at = sizeof(head) + head.n_parts * sizeof(uint64_t);
    if (at + head.n_refs * sizeof(desc) > n) {
        head.n_refs = 0;
    }
    regions = room_for(chan, slot, head.n_refs + 1u + MOST_DROPPED);
    if (regions == NULL) {
        return false;
    }
    traffic->push = regions;
    if (staged.size != 0) {
        regions[traffic->n_push++] = staged;
    }
    for (uint32_t i = 0; i < head.n_refs; i++) {
        memcpy(&desc, from + at + i * sizeof(desc), sizeof(desc));
        /* what is in none of our arenas is refused by the worker */
        if (region_at(chan, &desc, &regions[traffic->n_push]) &&
            still_to_send(chan, &regions[traffic->n_push], news)) {
            traffic->n_push++;
        }
    }
    drop_constants(chan, traffic, news);
    return true;
}

/* The arena that a request needs first of those that its worker lacks; 0: none
 * of them, for arenas are counted from 1. */
static uint32_t lacked_by(struct rfm_channel *chan, const struct rfm_request *req)
{
    const struct rfm_binding *binding = req->binding;
    struct rfm_object head;
    struct rfm_desc desc;
    const uint8_t *from = req->payload;
    uint64_t n = req->payload_bytes;
    uint64_t at;

    if ((req->wire_flags & RFM_REQ_FETCH) != 0) {
        return is_lacked(chan, req->into.arena) ? req->into.arena : 0;
    }
    if ((req->wire_flags & RFM_REQ_OBJECT) == 0) {
        for (uint32_t i = 0; i < (uint32_t)binding->n_in + binding->n_out; i++) {
            const struct rfm_arg *arg = &binding->args[i];
            uint32_t arena = (arg->place == RFM_BOUND)
                                 ? arg->arena
                                 : req->args[i].desc.arena;

            if ((arg->place != RFM_INLINE) && is_lacked(chan, arena)) {
                return arena;
            }
        }
        return 0;
    }
    if ((req->wire_flags & RFM_REQ_STAGED) != 0) {
        memcpy(&desc, from, sizeof(desc));
        if (is_lacked(chan, desc.arena)) {
            return desc.arena;
        }
        from = rfm_heap_address(chan->inv->heap, desc.arena, desc.offset,
                                desc.size);
        n    = desc.size;
    }
    if ((from == NULL) || (n < sizeof(head))) {
        return 0;
    }
    memcpy(&head, from, sizeof(head));
    at = sizeof(head) + head.n_parts * sizeof(uint64_t);
    for (uint32_t i = 0; (i < head.n_refs) && (at + sizeof(desc) <= n); i++) {
        memcpy(&desc, from + at, sizeof(desc));
        if (is_lacked(chan, desc.arena)) {
            return desc.arena;
        }
        at += sizeof(desc);
    }
    return 0;
}

static bool gather(struct rfm_channel *chan, const struct rfm_request *req,
                   uint32_t slot, struct news *news)
{
    struct rfm_traffic *traffic = &chan->traffic[slot];
    const struct rfm_binding *binding = req->binding;
    struct rfm_region *regions;
    uint64_t pulled = binding->layout.out_bytes;
    uint32_t n;

    memset(traffic, 0, sizeof(*traffic));
    traffic->batched = req->batched && (chan->link->ops->rank_push != NULL);
    if ((req->wire_flags & RFM_REQ_FETCH) != 0) {
        regions = room_for(chan, slot, 1);
        if ((regions == NULL) || !region_at(chan, &req->into, &regions[0])) {
            return false;
        }
        traffic->pull   = regions;
        traffic->n_pull = 1;
        pulled          = req->into.size;
    } else if ((req->wire_flags & RFM_REQ_OBJECT) != 0) {
        if (!gather_object(chan, req, slot, news)) {
            return false;
        }
        pulled = chan->link->slot_bytes;
    } else {
        n       = (uint32_t)binding->n_in + binding->n_out;
        regions = room_for(chan, slot, n + MOST_DROPPED);
        if (regions == NULL) {
            return false;
        }
        traffic->push = regions;
        for (uint32_t i = 0; i < n; i++) {
            const struct rfm_arg *arg = &binding->args[i];
            const struct rfm_reqarg *given = &req->args[i];
            struct rfm_region *region;

            if (i == binding->n_in) {
                drop_constants(chan, traffic, news);
                traffic->pull = regions + traffic->n_push;
            }
            if (arg->place == RFM_INLINE) {
                continue;
            }
            region  = (i < binding->n_in) ? &traffic->push[traffic->n_push++]
                                          : &traffic->pull[traffic->n_pull++];
            *region = (struct rfm_region){
                .arena   = (arg->place == RFM_BOUND) ? arg->arena
                                                     : given->desc.arena,
                .offset  = (arg->place == RFM_BOUND) ? arg->offset
                                                     : given->desc.offset,
                .size    = arg->size,
                .address = (given->stage != NULL) ? given->stage : given->user,
            };
            if (i >= binding->n_in) {
                pulled += arg->size;
            } else if (!still_to_send(chan, region, news)) {
                traffic->n_push--;
            }
        }
        if (binding->n_out == 0) {
            drop_constants(chan, traffic, news);
        }
    }
    if (pulled * rfm_channel_in_flight(chan) > BULKY) {
        rfm_store_relaxed(&chan->bulky, 1);
    }
    return true;
}

/* Nobody may be looking when it comes, and it won't fit the socket's buffer: the
 * worker would wait. What we have not sent yet goes on at once. */
static void watch_if_alone(struct rfm_channel *chan, bool gone)
{
    if ((rfm_load_relaxed(&chan->bulky) != 0) &&
        (rfm_load_acquire(&chan->inv->pollers) == 0)) {
        if (gone) {
            rfm_service_mind(chan->inv);
        } else {
            rfm_service_watch(chan->inv);
        }
    }
}

static void post_remote(struct rfm_channel *chan, uint32_t slot,
                        const struct rfm_request_line *line)
{
    bool batched = chan->traffic[slot].batched;
    bool gone = chan->link->ops->rank_post(chan->link, slot, line,
                                           &chan->traffic[slot]);

    if (batched) {
        rfm_store_release(&chan->batch, 1);
    } else if (!gone) {
        rfm_store_relaxed(&chan->bulky, 1);
        if (rfm_load_acquire(&chan->link->failed) != 0) {
            rfm_service_kick(chan->inv);    /* who sleeps won't hear of it */
        }
    }
    watch_if_alone(chan, gone);
}

/* Where sending costs more than the kernel does, what is queued goes half a
 * channel at a time: whoever reaps pumps, so it goes when that half is done. With
 * the invoker's queue lock held. */
static bool may_refill(struct rfm_channel *chan, const struct rfm_request *req,
                       uint64_t out)
{
    uint32_t depth = rfm_load_relaxed(&chan->depth);

    if (!chan->remote || (depth < LEAST_BATCHED) ||
        ((req->wire_flags & RFM_REQ_FETCH) != 0) ||
        (rfm_load_relaxed(&chan->mean_exec_ns) > BRIEF_NS)) {
        return true;
    }
    if (out <= depth / 2) {
        chan->refilling = true;
    }
    return chan->refilling;
}

static void keep_bytes(struct rfm_request *req, const uint8_t *from, uint64_t n);

/* false, and why in its result, if the worker lacks what it needs */
static bool fits(struct rfm_channel *chan, struct rfm_request *req)
{
    uint32_t arena = lacked_by(chan, req);
    const struct rfm_lack *lack;

    if (arena == 0) {
        return true;
    }
    pthread_mutex_lock(&chan->lack_lock);
    lack = find_lack(chan, arena);
    if (lack != NULL) {
        keep_bytes(req, (const uint8_t *)lack->why, strlen(lack->why));
        req->worker = chan->worker;
    }
    pthread_mutex_unlock(&chan->lack_lock);
    return lack == NULL;
}

int rfm_channel_post(struct rfm_channel *chan, struct rfm_request *req)
{
    uint64_t head = rfm_load_acquire(&chan->head);
    struct rfm_request_line line;
    struct news news = { 0 };
    bool may_take_back;
    bool known = true;
    uint32_t slot;

    if (__builtin_expect(!rfm_channel_suits(chan, req), 0)) {
        return RFM_ERR_NO_RESOURCE;
    }
    if (__builtin_expect(rfm_load_acquire(&chan->n_lacks) != 0, 0) &&
        ((head & RFM_HEAD_CLOSED) == 0) && !fits(chan, req)) {
        return RFM_ERR_TOO_LARGE;
    }
    do {
        uint64_t out;

        if ((head & RFM_HEAD_CLOSED) != 0) {
            return RFM_ERR_CLOSED;
        }
        out = head - rfm_load_acquire(&chan->tail);
        /* a tail beyond head: others moved on meanwhile, and the exchange
         * will say so; that is not a full channel */
        if ((out >= rfm_load_relaxed(&chan->depth)) && (out <= chan->slots)) {
            if (req->batched) {
                chan->refilling = false;
            }
            return RFM_ERR_NO_RESOURCE;
        }
        if (req->batched && !may_refill(chan, req, out)) {
            return RFM_ERR_NO_RESOURCE;
        }
    } while (!__atomic_compare_exchange_n(&chan->head, &head, head + 1, true,
                                          __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    /* from here until `published`, the channel can't be taken down */
    slot = (uint32_t)head & (chan->slots - 1);
    if ((req->wire_flags & RFM_REQ_FETCH) == 0) {
        uint32_t number = req->binding->number % RFM_MAX_BINDINGS;

        if (rfm_load_acquire(&chan->bound[number]) == 0) {
            known = send_binding(chan, req->binding) == RFM_OK;
        }
    }
    rfm_store_relaxed(&req->chan, chan);
    rfm_store_relaxed(&req->slot, slot);
    req->worker = chan->worker;
    rfm_store_release(&req->state, RFM_POSTED);
    chan->inflight[slot].req = req;
    if (chan->remote && known) {
        chan->link->ops->rank_ready(chan->link, slot);
        news.ticket = head;
        news.open   = rfm_heap_constants(chan->inv->heap) != 0;
        if (news.open) {
            pthread_mutex_lock(&chan->known_lock);
        }
        known = gather(chan, req, slot, &news);
        if (news.open && !news.any) {
            pthread_mutex_unlock(&chan->known_lock);
        }
    }
    if (known) {
        may_take_back = waits_behind(chan, req, head);
        chan->inflight[slot].may_take_back = may_take_back;
        fill_slot(chan, req, slot, may_take_back, &line);
        /* From here on it may end, and req with it, even if its answer came
         * before its question; but it can't be before the worker is asked. */
        rfm_store_release(&chan->inflight[slot].id, line.id);
        if (__builtin_expect(chan->remote, 0)) {
            post_remote(chan, slot, &line);
        } else {
            (void)chan->link->ops->rank_post(chan->link, slot, &line, NULL);
        }
    } else {
        /* the peer is gone, or soon will be: it ends LOST with the channel */
        rfm_store_release(&chan->inflight[slot].id, UINT64_MAX);
        if (chan->remote) {
            rfm_channel_sever(chan, "an invocation could not be sent");
        }
        rfm_service_kick(chan->inv);
    }
    if (news.any) {
        pthread_mutex_unlock(&chan->known_lock);
    }
    (void)__atomic_fetch_add(&chan->published, 1, __ATOMIC_RELEASE);
    return RFM_OK;
}

/* --- reaping -------------------------------------------------------------- */

static void keep_bytes(struct rfm_request *req, const uint8_t *from, uint64_t n)
{
    req->result_bytes = 0;
    if (n > sizeof(req->small)) {
        free(req->result);
        req->result = malloc(n);
        if (req->result == NULL) {
            return;
        }
        memcpy(req->result, from, n);
    } else {
        memcpy(req->small, from, n);
    }
    req->result_bytes = n;
}

static enum rfm_outcome take_outputs(struct rfm_request *req,
                                     const struct rfm_reply_line *line,
                                     const uint8_t *payload)
{
    const struct rfm_binding *binding = req->binding;
    const uint8_t *from = binding->layout.out_in_line ? line->payload : payload;

    /* all of them are checked before one byte is written */
    for (uint32_t i = 0; i < binding->n_out; i++) {
        const struct rfm_arg *arg = &binding->args[binding->n_in + i];
        uint64_t size = arg->size;

        if (i == 0) {
            size = line->out_bytes;
        }
        if ((line->flags & RFM_REP_SIZES) != 0) {
            memcpy(&size, from + i * sizeof(size), sizeof(size));
        }
        if (size > arg->size) {
            return RFM_LOST;    /* a worker that lies about sizes */
        }
        req->out_sizes[i] = size;
    }
    for (uint32_t i = 0; i < binding->n_out; i++) {
        const struct rfm_arg *arg = &binding->args[binding->n_in + i];
        uint64_t size = req->out_sizes[i];

        if ((arg->place == RFM_INLINE) && (size > 0)) {
            memcpy(req->args[binding->n_in + i].user, from + arg->at, size);
        }
    }
    return RFM_DONE;
}

/* RFM_LOST: no worker of ours says that */
static enum rfm_outcome take_reply(struct rfm_channel *chan,
                                   struct rfm_request *req,
                                   const struct rfm_reply_line *line,
                                   const uint8_t *payload)
{
    /* RFM_ST_TAKEN_BACK comes to none that is still here */
    static const enum rfm_outcome outcomes[RFM_ST_LAST + 1] = {
        [RFM_ST_OK]         = RFM_DONE,
        [RFM_ST_KERNEL]     = RFM_KERNEL_ERROR,
        [RFM_ST_BAD_KERNEL] = RFM_BAD_KERNEL,
        [RFM_ST_BUSY]       = RFM_BUSY,
        [RFM_ST_PROTOCOL]   = RFM_KERNEL_ERROR,
    };
    uint64_t limit = chan->link->slot_bytes;
    const uint8_t *from;

    if ((line->status > RFM_ST_LAST) || (line->status == RFM_ST_TAKEN_BACK)) {
        return RFM_LOST;
    }
    req->out_bytes = line->out_bytes;
    if ((req->wire_flags & RFM_REQ_FETCH) != 0) {
        (void)__atomic_fetch_sub(&chan->n_kept, 1, __ATOMIC_RELEASE);
        return (line->status == RFM_ST_OK) ? outcomes[req->kept_status]
                                           : RFM_LOST;
    }
    req->exec_ns = line->exec_ns;
    if ((line->flags & RFM_REP_KEPT) != 0) {
        req->kept_status = line->status;
        (void)__atomic_fetch_add(&chan->n_kept, 1, __ATOMIC_RELEASE);
        return RFM_LARGE;
    }
    if ((line->status == RFM_ST_OK) &&
        ((req->binding->flags & RFM_BIND_OBJECT) == 0)) {
        return take_outputs(req, line, payload);
    }
    if (line->status == RFM_ST_BUSY) {
        return RFM_BUSY;
    }
    if (line->out_bytes > limit) {
        return RFM_LOST;
    }
    from = (line->out_bytes > RFM_INLINE_BYTES) ? payload : line->payload;
    keep_bytes(req, from, line->out_bytes);
    return outcomes[line->status];
}

/* How far ahead to post: enough to hide the way to and fro, and that the rank
 * is busy with something else when a kernel ends. What waits behind a long
 * kernel can be taken back when another worker is free sooner. */
static void adapt_depth(struct rfm_channel *chan, uint64_t exec_ns)
{
    uint64_t mean = chan->mean_exec_ns;
    uint64_t depth;

    /* the worker's word: it must not make the sum wrap to nothing */
    if (exec_ns > LONGEST_NS) {
        exec_ns = LONGEST_NS;
    }
    mean = (mean == 0) ? exec_ns + 1 : mean + 1 - mean / 8 + exec_ns / 8;
    rfm_store_relaxed(&chan->mean_exec_ns, mean);
    depth = LEAST_AHEAD + AHEAD_NS / mean;
    if (depth > chan->slots) {
        depth = chan->slots;
    }
    if (depth != chan->depth) {
        rfm_store_relaxed(&chan->depth, (uint32_t)depth);
    }
}

/* with the reap lock held */
static int reap_locked(struct rfm_channel *chan)
{
    uint64_t tail = chan->tail;
    int n = 0;

    while ((chan->link != NULL) && !chan->broken) {
        uint32_t slot = (uint32_t)tail & (chan->slots - 1);
        uint64_t id = rfm_load_acquire(&chan->inflight[slot].id);
        /* before the look: what came before it failed counts */
        int failed = chan->remote ? rfm_load_acquire(&chan->link->failed) : 0;
        struct rfm_reply_line line;
        struct rfm_request *req;
        enum rfm_outcome outcome;
        const uint8_t *payload;

        if ((id == 0) || (id == UINT64_MAX) ||
            !chan->link->ops->rank_poll(chan->link, slot, id, &line,
                                        &payload)) {
            if (failed < 0) {
                chan->broken = true;
                /* who hung up may have said why */
                rfm_channel_sever(chan, (failed == RFM_ERR_PEER)
                                            ? NULL
                                            : chan->link->why);
            } else if (id == 0) {
                rfm_store_relaxed(&chan->bulky, 0);
            }
            break;
        }
        req = chan->inflight[slot].req;
        if (req == NULL) {      /* taken back: nobody waits for the reply */
            rfm_store_relaxed(&chan->inflight[slot].id, 0);
            tail++;
            rfm_store_release(&chan->tail, tail);
            n++;
            continue;
        }
        outcome = take_reply(chan, req, &line, payload);
        if (outcome == RFM_LOST) {
            /* Who lies may write, too: it ends with the channel, fenced. */
            chan->broken = true;
            rfm_channel_drain(chan);
            if (chan->remote) {
                rfm_channel_sever(chan, "a reply that made no sense");
            } else {
                (void)rfm_channel_kill(chan);
            }
            break;
        }
        if (outcome == RFM_BUSY) {
            /* no id comes to a channel twice: elsewhere, not here again */
            rfm_channel_drain(chan);
        }
        if ((line.status == RFM_ST_OK) &&
            ((req->wire_flags & RFM_REQ_FETCH) == 0)) {
            adapt_depth(chan, line.exec_ns);
        }
        rfm_store_relaxed(&chan->inflight[slot].id, 0);
        tail++;
        rfm_store_release(&chan->tail, tail);
        rfm_request_end(req, outcome);
        n++;
    }
    return n;
}

/* A side's completion is taken once, and who took it may find another reaping,
 * who has passed that slot already: then it is he who looks again. */
static bool may_reap(struct rfm_channel *chan)
{
    if ((rfm_load_relaxed(&chan->reap_lock) == 0) &&
        (__atomic_exchange_n(&chan->reap_lock, 1, __ATOMIC_ACQUIRE) == 0)) {
        return true;
    }
    if (!chan->remote) {
        return false;
    }
    rfm_store_release(&chan->reap_again, 1);
    rfm_fence();
    return (rfm_load_relaxed(&chan->reap_lock) == 0) &&
           (__atomic_exchange_n(&chan->reap_lock, 1, __ATOMIC_ACQUIRE) == 0);
}

int rfm_channel_reap(struct rfm_channel *chan)
{
    int n = 0;

    if (!may_reap(chan)) {
        return RFM_ERR_BUSY;
    }
    do {
        /* A plain store might reach memory after the looks that follow, and
         * undo the word of somebody whose completion they did not see. */
        if (rfm_load_relaxed(&chan->reap_again) != 0) {
            (void)__atomic_exchange_n(&chan->reap_again, 0, __ATOMIC_SEQ_CST);
        }
        n += reap_locked(chan);
        rfm_store_release(&chan->reap_lock, 0);
        if (!chan->remote) {
            break;
        }
        rfm_fence();
    } while ((rfm_load_relaxed(&chan->reap_again) != 0) && may_reap(chan));
    return n;
}

/* for who held the reap lock for something else */
static void unlock_reap(struct rfm_channel *chan)
{
    rfm_store_release(&chan->reap_lock, 0);
    rfm_fence();
    if (rfm_load_relaxed(&chan->reap_again) != 0) {
        rfm_service_kick(chan->inv);
    }
}

/* The lock keeps the link from being closed meanwhile. */
void rfm_channel_push(struct rfm_channel *chan)
{
    bool gone = true;

    if ((rfm_load_relaxed(&chan->batch) == 0) ||
        (__atomic_exchange_n(&chan->batch, 0, __ATOMIC_ACQ_REL) == 0)) {
        return;
    }
    while (__atomic_exchange_n(&chan->reap_lock, 1, __ATOMIC_ACQUIRE) != 0) {
        sched_yield();
    }
    if (chan->link != NULL) {
        gone = chan->link->ops->rank_push(chan->link);
    }
    unlock_reap(chan);
    if (!gone) {
        rfm_store_relaxed(&chan->bulky, 1);
        watch_if_alone(chan, false);
    }
}

/* with the reap lock held */
static bool take_back_locked(struct rfm_channel *chan, uint32_t slot,
                             struct rfm_request *req)
{
    uint64_t id = rfm_load_acquire(&chan->inflight[slot].id);

    if ((id == 0) || (id == UINT64_MAX) || (req == NULL) ||
        (chan->inflight[slot].req != req) || (req->wire_id != id) ||
        !chan->inflight[slot].may_take_back ||
        (chan->link->ops->rank_take_back == NULL) ||
        !chan->link->ops->rank_take_back(chan->link, slot)) {
        return false;
    }
    chan->inflight[slot].req = NULL;
    return true;
}

struct rfm_request *rfm_channel_take_back(struct rfm_channel *chan,
                                          struct rfm_request *req)
{
    struct rfm_request *got = NULL;
    uint64_t head;

    while (__atomic_exchange_n(&chan->reap_lock, 1, __ATOMIC_ACQUIRE) != 0) {
        sched_yield();
    }
    if ((chan->link == NULL) || chan->broken) {
        goto out;
    }
    if (req != NULL) {
        /* if it just moves elsewhere, it isn't found here */
        if (take_back_locked(chan, rfm_load_relaxed(&req->slot), req)) {
            got = req;
        }
        goto out;
    }
    head = rfm_load_acquire(&chan->head) & ~RFM_HEAD_CLOSED;
    /* somebody is posting just now: those slots are not ours to look at */
    if (rfm_load_acquire(&chan->published) != head) {
        goto out;
    }
    while ((got == NULL) && (head > chan->tail + 1)) {
        uint32_t slot = (uint32_t)--head & (chan->slots - 1);

        req = chan->inflight[slot].req;
        if (take_back_locked(chan, slot, req)) {
            got = req;
        } else if (req != NULL) {
            break;              /* begun, or soon done */
        }
    }
out:
    unlock_reap(chan);
    return got;
}

struct rfm_request *rfm_channel_take_back_at(struct rfm_channel *chan,
                                             uint32_t slot, uint64_t id)
{
    struct rfm_request *got = NULL;

    while (__atomic_exchange_n(&chan->reap_lock, 1, __ATOMIC_ACQUIRE) != 0) {
        sched_yield();
    }
    if ((chan->link != NULL) && !chan->broken &&
        (rfm_load_acquire(&chan->inflight[slot].id) == id)) {
        /* its request can't end while we hold the lock */
        struct rfm_request *req = chan->inflight[slot].req;

        if (take_back_locked(chan, slot, req)) {
            got = req;
        }
    }
    unlock_reap(chan);
    return got;
}

int rfm_channel_arm(struct rfm_channel *chan)
{
    int n = 0;

    if (__atomic_exchange_n(&chan->reap_lock, 1, __ATOMIC_ACQUIRE) != 0) {
        return RFM_ERR_BUSY;
    }
    if (chan->link != NULL) {
        uint64_t in_flight = rfm_channel_in_flight(chan);

        if (chan->remote) {
            if (in_flight != 0) {
                rfm_service_watch(chan->inv);
            }
        } else {
            chan->link->ops->rank_wake_at(chan->link,
                                          chan->tail + ((in_flight + 1) / 2));
        }
        n = reap_locked(chan);
    }
    unlock_reap(chan);
    return n;
}

/* --- its end -------------------------------------------------------------- */

/* What only a living channel needs; the rest stays for whoever looks at it. */
static void strip(struct rfm_channel *chan)
{
    pthread_mutex_lock(&chan->control);
    close(chan->fd);
    chan->fd = -1;
    free(chan->bound);
    chan->bound = NULL;
    free(chan->shipped);
    chan->shipped      = NULL;
    chan->shipped_size = 0;
    rfm_rx_fini(&chan->rx);
    pthread_mutex_unlock(&chan->control);
    pthread_mutex_lock(&chan->known_lock);
    rfm_known_fini(&chan->known);
    pthread_mutex_unlock(&chan->known_lock);
    pthread_mutex_lock(&chan->pid_lock);
    if (chan->pidfd >= 0) {
        close(chan->pidfd);
    }
    chan->pidfd = -1;
    pthread_mutex_unlock(&chan->pid_lock);
}

/* takes no tickets from now on: how many it gave out */
static uint64_t no_more(struct rfm_channel *chan, uint32_t state)
{
    uint32_t at = rfm_load_acquire(&chan->state);
    uint64_t head = __atomic_fetch_or(&chan->head, RFM_HEAD_CLOSED,
                                      __ATOMIC_ACQ_REL);

    while ((at < state) &&
           !__atomic_compare_exchange_n(&chan->state, &at, state, false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    }
    return head & ~RFM_HEAD_CLOSED;
}

/* Its control connection has ended, but replies come another way: what was
 * answered before counts. With the reap lock held. */
static void hear_last_words(struct rfm_channel *chan)
{
    uint64_t deadline = rfm_now_ns() + chan->link->ops->last_words_ns;

    while ((rfm_channel_in_flight(chan) != 0) && !chan->broken &&
           (rfm_load_acquire(&chan->link->failed) == 0)) {
        struct timespec ts = { 0, 50000 };

        (void)chan->side->ops->side_progress(chan->side);
        if (reap_locked(chan) == 0) {
            if (rfm_now_ns() > deadline) {
                return;
            }
            nanosleep(&ts, NULL);
        }
    }
}

void rfm_channel_dead(struct rfm_channel *chan)
{
    struct rfm_link *link;
    uint64_t head = no_more(chan, RFM_CH_DRAINING);
    uint64_t tail;

    while (rfm_load_acquire(&chan->published) != head) {
        sched_yield();
    }
    while (__atomic_exchange_n(&chan->reap_lock, 1, __ATOMIC_ACQUIRE) != 0) {
        sched_yield();
    }
    if (chan->remote && (chan->link != NULL)) {
        if (chan->peer_ended) {
            hear_last_words(chan);
        }
        chan->link->ops->rank_fence(chan->link);
    }
    (void)reap_locked(chan);    /* what was answered in time counts */
    link = chan->link;
    if ((rfm_load_acquire(&chan->severed) != 0) && (link != NULL)) {
        settle_why(chan, link->why);
    }
    chan->link = NULL;
    for (tail = chan->tail; tail != head; tail++) {
        uint32_t slot = (uint32_t)tail & (chan->slots - 1);
        struct rfm_request *req = chan->inflight[slot].req;

        rfm_store_relaxed(&chan->inflight[slot].id, 0);
        rfm_store_release(&chan->tail, tail + 1);
        if (req != NULL) {
            rfm_request_end(req, RFM_LOST);
        }
    }
    rfm_store_release(&chan->reap_lock, 0);
    strip(chan);                /* nobody hears ARENA_READY any more */
    if (link != NULL) {
        link->ops->rank_close(link);
    }
    /* last: its place may be given away from now on */
    rfm_store_release(&chan->state, RFM_CH_DEAD);
    rfm_invoker_knock(chan->inv);
}

static void close_head(struct rfm_channel *chan, uint32_t state)
{
    no_more(chan, state);
    rfm_service_kick(chan->inv);
}

void rfm_channel_close(struct rfm_channel *chan)
{
    close_head(chan, RFM_CH_CLOSING);
}

void rfm_channel_drain(struct rfm_channel *chan)
{
    close_head(chan, RFM_CH_DRAINING);
}

void rfm_channel_sever(struct rfm_channel *chan, const char *why)
{
    settle_why(chan, why);
    no_more(chan, RFM_CH_DRAINING);
    rfm_store_release(&chan->severed, 1);
    rfm_service_kick(chan->inv);
}

const char *rfm_channel_why(struct rfm_channel *chan)
{
    return rfm_load_acquire(&chan->why);
}

int rfm_channel_kill(struct rfm_channel *chan)
{
    int rc = RFM_ERR_PEER;

    if (chan->remote) {
        if (rfm_load_acquire(&chan->state) == RFM_CH_DEAD) {
            return RFM_ERR_PEER;
        }
        /* it is its agent that can kill it; we see to it that it can't write */
        rfm_channel_sever(chan, "given up: it did not let go in time");
        return RFM_OK;
    }
    /* so that the number isn't another file's by the time it is used */
    pthread_mutex_lock(&chan->pid_lock);
    if (chan->pidfd >= 0) {
        rc = send_signal(chan->pidfd, SIGKILL);
    }
    pthread_mutex_unlock(&chan->pid_lock);
    return rc;
}

void rfm_channel_info(struct rfm_channel *chan, struct rfm_channel_info *info)
{
    uint32_t state = rfm_load_acquire(&chan->state);

    info->lease     = chan->lease;
    info->worker    = chan->worker;
    info->pid       = chan->pid;
    info->alive     = state == RFM_CH_OPEN;
    info->fenced    = state == RFM_CH_DEAD;
    info->in_flight = rfm_channel_in_flight(chan);
}

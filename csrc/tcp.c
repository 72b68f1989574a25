/*
 * Sockets: nodes without RDMA.
 *
 * A link has a stream of its own beside the control connection. What belongs
 * to a slot follows its line on the stream and is received where it belongs:
 * inputs in the worker's mirrors, outputs in the rank's arrays. Nothing is
 * copied but by the kernel, and the first bytes that came along with a line.
 *
 * Receiving: whoever holds the side's try-lock receives for all of its links.
 * Sending: a rank queues slots, and whoever holds the link's try-lock sends
 * what is queued, as far as the socket takes it; the rest goes when the side
 * says that there is room. A worker's replies are sent by its main thread, which
 * waits a little for room; what a rank that doesn't read still has to get is
 * copied, and goes when there is room, and until then that rank is not served.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "crc32c.h"
#include "pages.h"
#include "poller.h"
#include "rfm_transport.h"

#define MAX_LINKS    256u
#define HOLD_BYTES   2048u          /* several small messages in one recv */
#define TURN_BYTES   (4u << 20)     /* then the other links have their turn */
#define MAX_IOV      64u
#define PATIENCE_MS  5              /* then a reply's rest is put aside */
#define STUCK_MS     60000          /* where there is no memory to do so */
#define FEW_LINKS    2u             /* so many are asked without epoll */

struct mirror {
    uint32_t arena;
    uint8_t *base;
    uint64_t bytes;
};

enum stage { AT_HEAD, AT_DESCS, AT_PAYLOAD, AT_DATA, AT_CRC };

/* what is being received */
struct incoming {
    enum stage stage;
    uint32_t region;            /* at DATA: which, and how much of it is there */
    uint64_t got;
    uint32_t crc;
    struct rfm_stream_head head;
    union {
        struct rfm_request_line request;
        struct rfm_reply_line reply;
    } line;
    uint32_t start;             /* of what is held */
    uint32_t end;
    uint8_t  hold[HOLD_BYTES];
};

/* what is to be sent for a slot */
struct outgoing {
    struct {
        struct rfm_stream_head head;
        uint8_t line[RFM_CACHE_LINE];
    } first;
    struct rfm_desc *descs;
    uint32_t n_descs;
    uint32_t room;              /* for so many descs */
    const uint8_t *payload;
    const struct rfm_region *regions;
    uint32_t crc;
    uint32_t queued;            /* atomic: until its sender has done with it */
};

struct tcp_link {
    struct rfm_link link;
    bool     rank;
    int      fd;
    uint64_t stride;
    uint8_t *requests;          /* rank: payloads to send; worker: received */
    uint8_t *replies;           /* the other way round */
    uint32_t flags;             /* what we send: RFM_STREAM_CRC */
    uint32_t peer_flags;        /* atomic: what the other one says it sends */
    uint32_t expected;          /* rank, atomic: replies that are to come */
    uint64_t posted[RFM_MAX_SLOTS];     /* rank: the id that was asked */
    const struct rfm_traffic *traffic[RFM_MAX_SLOTS];
    bool     given[RFM_MAX_SLOTS];      /* worker: not answered yet */
    /* worker: what is left of a reply; under the side's lock, but for the look
     * whether there is any (atomic) */
    uint8_t *rest;
    uint64_t rest_bytes;
    uint64_t rest_sent;

    struct incoming in;         /* under the side's lock */
    struct rfm_desc *descs;
    uint32_t room;
    struct mirror *mirrors;     /* worker */
    uint32_t n_mirrors;

    uint32_t queue_lock __attribute__((aligned(RFM_CACHE_LINE)));
    uint32_t send_lock;
    bool     wants_room;        /* written under send_lock: waits for EPOLLOUT */
    bool     fenced;            /* under send_lock */
    uint64_t queue_head;        /* atomic */
    uint64_t queue_tail;
    uint8_t  queue[RFM_MAX_SLOTS];
    uint32_t segment;           /* of the slot at the tail: what is sent of it */
    uint64_t sent;
    struct outgoing out[RFM_MAX_SLOTS];
};

struct tcp_side {
    struct rfm_side side;
    int      epoll_fd;
    uint32_t lock;
    uint32_t arms;              /* who sleeps on the epoll set, or may */
    uint64_t spin_ticks;
    uint32_t n_links;
    struct tcp_link *links[MAX_LINKS];
};

/* --- locks ---------------------------------------------------------------- */

static bool try_lock(uint32_t *lock)
{
    return (rfm_load_relaxed(lock) == 0) &&
           (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE) == 0);
}

static void take_lock(uint32_t *lock)
{
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE) != 0) {
        sched_yield();
    }
}

static void unlock(uint32_t *lock)
{
    rfm_store_release(lock, 0);
}

/* --- slots ---------------------------------------------------------------- */

static inline uint8_t *request_at(struct tcp_link *tcp, uint32_t slot)
{
    return tcp->requests + slot * tcp->stride;
}

static inline uint8_t *reply_at(struct tcp_link *tcp, uint32_t slot)
{
    return tcp->replies + slot * tcp->stride;
}

static void set_interest(struct tcp_link *tcp, int op, uint32_t events)
{
    struct tcp_side *side = (struct tcp_side *)tcp->link.side;
    struct epoll_event ev = { .events = events };

    ev.data.ptr = tcp;
    (void)epoll_ctl(side->epoll_fd, op, tcp->fd, &ev);
}

/* Being in an epoll set costs each packet a few microseconds. So a few links
 * are in it only while somebody sleeps on it; many are asked through it. */
static bool is_listened(const struct tcp_side *side)
{
    return (side->arms != 0) || (side->n_links > FEW_LINKS);
}

/* With the side's lock held. Who finds no room meanwhile changes what we
 * listen for if we do already; else we see it when we look again. */
static void listen_to(struct tcp_link *tcp)
{
    set_interest(tcp, EPOLL_CTL_ADD, EPOLLIN);
    rfm_fence();
    if (rfm_load_relaxed(&tcp->wants_room)) {
        set_interest(tcp, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
}

static int fail(struct tcp_link *tcp, int status, const char *why)
{
    /* its end would be readable for ever */
    set_interest(tcp, EPOLL_CTL_DEL, 0);
    rfm_link_fail(&tcp->link, status, why);
    return status;
}

static int broke(struct tcp_link *tcp, int error)
{
    switch (error) {
    case EBADF:
    case ENOTSOCK:
        rfm_store_relaxed(&tcp->link.robbed, true);
        return fail(tcp, RFM_ERR_SYSTEM, "something here closed our socket");
    case ETIMEDOUT:
        return fail(tcp, RFM_ERR_PEER, "the connection timed out");
    default:
        return fail(tcp, RFM_ERR_PEER, "the connection broke");
    }
}

/* --- receiving: with the side's lock held --------------------------------- */

static const struct mirror *find_mirror(struct tcp_link *tcp, uint32_t arena)
{
    for (uint32_t i = 0; i < tcp->n_mirrors; i++) {
        if (tcp->mirrors[i].arena == arena) {
            return &tcp->mirrors[i];
        }
    }
    return NULL;
}

/* Where a region's bytes go; NULL if they may not go there. */
static uint8_t *region_target(struct tcp_link *tcp, uint32_t i)
{
    const struct rfm_desc *desc = &tcp->descs[i];
    const struct mirror *m;

    if (tcp->rank) {
        const struct rfm_traffic *traffic = tcp->traffic[tcp->in.head.slot];

        return ((i < traffic->n_pull) && (desc->size <= traffic->pull[i].size))
                   ? traffic->pull[i].address
                   : NULL;
    }
    m = find_mirror(tcp, desc->arena);
    if ((m == NULL) || (desc->offset > m->bytes) ||
        (desc->size > m->bytes - desc->offset)) {
        return NULL;
    }
    return m->base + desc->offset;
}

static bool send_queued(struct tcp_link *tcp);

/* Of what a reply came to. Else its memory could be used again while it still
 * is to be sent. */
static bool is_sent(struct tcp_link *tcp, uint32_t slot)
{
    bool sent = rfm_load_acquire(&tcp->out[slot].queued) == 0;

    if (!sent) {
        /* who sends it may be about to say so */
        take_lock(&tcp->send_lock);
        sent = rfm_load_acquire(&tcp->out[slot].queued) == 0;
        unlock(&tcp->send_lock);
        /* who found it locked has left it to us to send what he queued */
        rfm_fence();
        (void)send_queued(tcp);
    }
    return sent;
}

static int take_head(struct tcp_link *tcp)
{
    const struct rfm_stream_head *head = &tcp->in.head;
    uint16_t type = tcp->rank ? RFM_STREAM_REPLY : RFM_STREAM_REQUEST;
    uint32_t limit = tcp->rank ? RFM_MAX_ARGS : RFM_MAX_REGIONS;

    if ((head->magic != RFM_STREAM_MAGIC) || (head->type != type) ||
        (head->flags != rfm_load_relaxed(&tcp->peer_flags)) ||
        (head->slot >= tcp->link.slots) || (head->n_regions > limit) ||
        (head->payload_bytes > tcp->stride - RFM_CACHE_LINE)) {
        return fail(tcp, RFM_ERR_PROTOCOL, "a message that made no sense");
    }
    if (tcp->rank) {
        if ((rfm_load_acquire(&tcp->traffic[head->slot]) == NULL) ||
            (tcp->in.line.reply.id != tcp->posted[head->slot])) {
            return fail(tcp, RFM_ERR_PROTOCOL, "a reply that nobody asked for");
        }
        if (!is_sent(tcp, head->slot)) {
            return fail(tcp, RFM_ERR_PROTOCOL,
                        "a reply to what was not sent yet");
        }
    } else if (rfm_load_acquire(&tcp->given[head->slot])) {
        return fail(tcp, RFM_ERR_PROTOCOL, "a request in a slot that is in use");
    }
    if (head->n_regions > tcp->room) {
        struct rfm_desc *more = realloc(tcp->descs,
                                        head->n_regions * sizeof(*more));

        if (more == NULL) {
            return fail(tcp, RFM_ERR_NO_MEMORY, "no memory for a message");
        }
        tcp->descs = more;
        tcp->room  = head->n_regions;
    }
    return RFM_OK;
}

/* A request's region that brings nothing: the rank says what it has no use for. */
static bool is_drop(const struct tcp_link *tcp, uint32_t i)
{
    return !tcp->rank && ((tcp->descs[i].flags & RFM_REGION_DROP) != 0);
}

/* its bytes that follow */
static uint64_t region_bytes(const struct tcp_link *tcp, uint32_t i)
{
    return is_drop(tcp, i) ? 0 : tcp->descs[i].size;
}

/* The pages that hold nothing else go, before anything that comes later, or with
 * the same message, is written there. What the rank says wrongly costs it alone:
 * the mirror is its own. False: that is in no mirror. */
static bool let_go(struct tcp_link *tcp, uint32_t i)
{
    const struct mirror *m = find_mirror(tcp, tcp->descs[i].arena);
    uint64_t page = RFM_PAGE_SIZE;
    uint64_t from;
    uint64_t to;

    if (m == NULL) {
        return true;            /* all of it went, on the other connection */
    }
    if (region_target(tcp, i) == NULL) {
        return false;
    }
    from = (tcp->descs[i].offset + page - 1) & ~(page - 1);
    to   = (tcp->descs[i].offset + tcp->descs[i].size) & ~(page - 1);
    if (to > from) {
        (void)madvise(m->base + from, to - from, MADV_DONTNEED);
    }
    return true;
}

static int check_descs(struct tcp_link *tcp)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < tcp->in.head.n_regions; i++) {
        if (is_drop(tcp, i) ? !let_go(tcp, i) : (region_target(tcp, i) == NULL)) {
            return fail(tcp, RFM_ERR_PROTOCOL,
                        "data for memory that was not granted");
        }
        sum += region_bytes(tcp, i);
    }
    if (sum != tcp->in.head.region_bytes) {
        return fail(tcp, RFM_ERR_PROTOCOL, "a message whose lengths differ");
    }
    return RFM_OK;
}

static void deliver(struct tcp_link *tcp)
{
    uint32_t slot = tcp->in.head.slot;

    if (tcp->rank) {
        struct rfm_reply_line *at = (struct rfm_reply_line *)reply_at(tcp, slot);

        memcpy((uint8_t *)at + sizeof(at->id),
               (uint8_t *)&tcp->in.line + sizeof(at->id),
               sizeof(*at) - sizeof(at->id));
        tcp->traffic[slot] = NULL;
        (void)__atomic_fetch_sub(&tcp->expected, 1, __ATOMIC_RELAXED);
        rfm_store_release(&at->id, tcp->in.line.reply.id);
    } else {
        struct rfm_request_line *at =
            (struct rfm_request_line *)request_at(tcp, slot);

        memcpy((uint8_t *)at + sizeof(at->id),
               (uint8_t *)&tcp->in.line + sizeof(at->id),
               sizeof(*at) - sizeof(at->id));
        rfm_store_relaxed(&tcp->given[slot], true);
        rfm_store_release(&at->id, tcp->in.line.request.id);
    }
}

/* The bytes that are due next go to `to`; from what is held first, then
 * straight from the socket. > 0: so many; 0: none are there yet. */
static ssize_t receive(struct tcp_link *tcp, uint8_t *to, uint64_t want)
{
    struct incoming *in = &tcp->in;
    uint64_t held = in->end - in->start;
    ssize_t got;

    if (held > 0) {
        uint64_t n = (want < held) ? want : held;

        memcpy(to, in->hold + in->start, n);
        in->start += (uint32_t)n;
        return (ssize_t)n;
    }
    in->start = 0;
    in->end   = 0;
    /* small pieces come together with what follows them */
    got = recv(tcp->fd, (want < HOLD_BYTES) ? in->hold : to,
               (want < HOLD_BYTES) ? HOLD_BYTES : want, MSG_DONTWAIT);
    if (got < 0) {
        if ((errno == EAGAIN) || (errno == EWOULDBLOCK) || (errno == EINTR)) {
            return 0;
        }
        return broke(tcp, errno);
    }
    if (got == 0) {
        return fail(tcp, RFM_ERR_PEER, "the other side closed the connection");
    }
    if (want < HOLD_BYTES) {
        in->end = (uint32_t)got;
        return receive(tcp, to, want);
    }
    return got;
}

/* where the next bytes of this stage go, and how many; 0: it is complete */
static uint64_t due(struct tcp_link *tcp, uint8_t **to_p)
{
    struct incoming *in = &tcp->in;
    uint64_t size;

    switch (in->stage) {
    case AT_HEAD:
        if (in->got < sizeof(in->head)) {
            *to_p = (uint8_t *)&in->head + in->got;
            return sizeof(in->head) - in->got;
        }
        *to_p = (uint8_t *)&in->line + (in->got - sizeof(in->head));
        return sizeof(in->head) + sizeof(in->line) - in->got;
    case AT_DESCS:
        size = in->head.n_regions * sizeof(*tcp->descs) - in->got;
        if (size != 0) {        /* else there may be no memory for any */
            *to_p = (uint8_t *)tcp->descs + in->got;
        }
        return size;
    case AT_PAYLOAD:
        *to_p = (tcp->rank ? reply_at(tcp, in->head.slot)
                           : request_at(tcp, in->head.slot)) +
                RFM_CACHE_LINE + in->got;
        return in->head.payload_bytes - in->got;
    case AT_DATA:
        while (in->region < in->head.n_regions) {
            size = region_bytes(tcp, in->region);
            if (in->got < size) {
                *to_p = region_target(tcp, in->region) + in->got;
                return size - in->got;
            }
            in->region++;
            in->got = 0;
        }
        return 0;
    default:
        *to_p = (uint8_t *)&in->crc + in->got;
        return ((in->head.flags & RFM_STREAM_CRC) != 0)
                   ? sizeof(in->crc) - in->got
                   : 0;
    }
}

static uint32_t crc_of_incoming(struct tcp_link *tcp)
{
    struct incoming *in = &tcp->in;
    const uint8_t *payload = tcp->rank ? reply_at(tcp, in->head.slot)
                                       : request_at(tcp, in->head.slot);
    uint32_t crc;

    crc = rfm_crc32c(0, &in->head, sizeof(in->head));
    crc = rfm_crc32c(crc, &in->line, sizeof(in->line));
    crc = rfm_crc32c(crc, tcp->descs, in->head.n_regions * sizeof(*tcp->descs));
    crc = rfm_crc32c(crc, payload + RFM_CACHE_LINE, in->head.payload_bytes);
    for (uint32_t i = 0; i < in->head.n_regions; i++) {
        if (region_bytes(tcp, i) != 0) {
            crc = rfm_crc32c(crc, region_target(tcp, i), tcp->descs[i].size);
        }
    }
    return crc;
}

/* a stage is complete: 1 if a message is, too */
static int next_stage(struct tcp_link *tcp)
{
    struct incoming *in = &tcp->in;
    int rc = RFM_OK;

    in->got = 0;
    switch (in->stage) {
    case AT_HEAD:
        rc        = take_head(tcp);
        in->stage = AT_DESCS;
        break;
    case AT_DESCS:
        rc         = check_descs(tcp);
        in->stage  = AT_PAYLOAD;
        in->region = 0;
        break;
    case AT_PAYLOAD:
        in->stage = AT_DATA;
        break;
    case AT_DATA:
        in->stage = AT_CRC;
        break;
    default:
        if (((in->head.flags & RFM_STREAM_CRC) != 0) &&
            (in->crc != crc_of_incoming(tcp))) {
            return fail(tcp, RFM_ERR_PROTOCOL,
                        "a message was changed on its way (crc32c)");
        }
        deliver(tcp);
        in->stage = AT_HEAD;
        return 1;
    }
    return rc;
}

/* messages that are complete now */
static int progress_link(struct tcp_link *tcp)
{
    uint64_t moved = 0;
    int n = 0;

    while (rfm_load_relaxed(&tcp->link.failed) == 0) {
        uint8_t *to = NULL;
        uint64_t want = due(tcp, &to);
        ssize_t got;
        int rc;

        if (want == 0) {
            rc = next_stage(tcp);
            if (rc < 0) {
                break;
            }
            n += rc;
            if ((rc > 0) && (tcp->in.start == tcp->in.end)) {
                break;          /* it can be used: don't ask for more first */
            }
            continue;
        }
        /* Only what is still in the socket wakes us: what is held, or has come
         * whole, can't wait for the next turn. */
        if ((moved >= TURN_BYTES) && (tcp->in.start == tcp->in.end)) {
            break;
        }
        if (want > TURN_BYTES) {
            want = TURN_BYTES;
        }
        got = receive(tcp, to, want);
        if (got <= 0) {
            break;
        }
        tcp->in.got += (uint64_t)got;
        moved       += (uint64_t)got;
    }
    return n;
}

/* --- sending -------------------------------------------------------------- */

static uint64_t bytes_sent(const struct rfm_region *region)
{
    return ((region->flags & RFM_REGION_DROP) != 0) ? 0 : region->size;
}

/* the k-th piece of a message; false when there is none */
static bool segment_of(struct outgoing *out, uint32_t k, struct iovec *iov)
{
    switch (k) {
    case 0:
        *iov = (struct iovec){ &out->first, sizeof(out->first) };
        return true;
    case 1:
        *iov = (struct iovec){ out->descs, out->n_descs * sizeof(*out->descs) };
        return true;
    case 2:
        *iov = (struct iovec){ (void *)(uintptr_t)out->payload,
                               out->first.head.payload_bytes };
        return true;
    default:
        break;
    }
    k -= 3;
    if (k < out->n_descs) {
        *iov = (struct iovec){ out->regions[k].address,
                               bytes_sent(&out->regions[k]) };
        return true;
    }
    if ((k == out->n_descs) &&
        ((out->first.head.flags & RFM_STREAM_CRC) != 0)) {
        *iov = (struct iovec){ &out->crc, sizeof(out->crc) };
        return true;
    }
    return false;
}

static int prepare(struct tcp_link *tcp, uint32_t slot, uint16_t type,
                   const void *line, const uint8_t *payload,
                   uint64_t payload_bytes, const struct rfm_region *regions,
                   uint32_t n)
{
    struct outgoing *out = &tcp->out[slot];
    uint64_t sum = 0;

    if (n > out->room) {
        struct rfm_desc *more = realloc(out->descs, n * sizeof(*more));

        if (more == NULL) {
            return fail(tcp, RFM_ERR_NO_MEMORY, "no memory for a message");
        }
        out->descs = more;
        out->room  = n;
    }
    for (uint32_t i = 0; i < n; i++) {
        out->descs[i] = (struct rfm_desc){
            .arena  = regions[i].arena,
            .flags  = regions[i].flags & RFM_REGION_DROP,
            .offset = regions[i].offset,
            .size   = regions[i].size,
        };
        sum += bytes_sent(&regions[i]);
    }
    out->n_descs    = n;
    out->regions    = regions;
    out->payload    = payload;
    out->first.head = (struct rfm_stream_head){
        .magic         = RFM_STREAM_MAGIC,
        .type          = type,
        .flags         = (uint16_t)tcp->flags,
        .slot          = slot,
        .n_regions     = n,
        .payload_bytes = payload_bytes,
        .region_bytes  = sum,
    };
    memcpy(out->first.line, line, sizeof(out->first.line));
    if ((tcp->flags & RFM_STREAM_CRC) != 0) {
        struct iovec iov = { 0 };

        out->crc = 0;
        for (uint32_t k = 0; (k < n + 3) && segment_of(out, k, &iov); k++) {
            out->crc = rfm_crc32c(out->crc, iov.iov_base, iov.iov_len);
        }
    }
    return RFM_OK;
}

/* RFM_OK: all of it is with the kernel; RFM_ERR_AGAIN: no room. `more`: another
 * message follows at once, and the kernel may wait for it (no more than 200 ms,
 * should it not come). */
static int send_some(struct tcp_link *tcp, struct outgoing *out, bool more)
{
    int flags = MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0);

    for (;;) {
        struct iovec iov[MAX_IOV];
        struct msghdr msg = { .msg_iov = iov };
        uint32_t k = tcp->segment;
        uint64_t skip = tcp->sent;
        uint32_t n = 0;
        ssize_t sent;

        while ((n < MAX_IOV) && segment_of(out, k, &iov[n])) {
            if (iov[n].iov_len > skip) {
                iov[n].iov_base = (uint8_t *)iov[n].iov_base + skip;
                iov[n].iov_len -= skip;
                n++;
            }
            skip = 0;
            k++;
        }
        if (n == 0) {
            tcp->segment = 0;
            tcp->sent    = 0;
            return RFM_OK;
        }
        msg.msg_iovlen = n;
        sent = sendmsg(tcp->fd, &msg, flags);
        if (sent < 0) {
            if (errno == EINTR) {
                continue;
            }
            if ((errno == EAGAIN) || (errno == EWOULDBLOCK)) {
                return RFM_ERR_AGAIN;
            }
            return broke(tcp, errno);
        }
        tcp->sent += (uint64_t)sent;
        for (;;) {
            struct iovec at;

            if (!segment_of(out, tcp->segment, &at)) {
                tcp->segment = 0;
                tcp->sent    = 0;
                return RFM_OK;
            }
            if (tcp->sent < at.iov_len) {
                break;
            }
            tcp->sent -= at.iov_len;
            tcp->segment++;
        }
    }
}

/* worker: true once all of it is gone */
static bool send_rest(struct tcp_link *tcp)
{
    while (tcp->rest_sent < tcp->rest_bytes) {
        ssize_t sent = send(tcp->fd, tcp->rest + tcp->rest_sent,
                            tcp->rest_bytes - tcp->rest_sent,
                            MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent < 0) {
            if ((errno != EAGAIN) && (errno != EWOULDBLOCK) &&
                (errno != EINTR)) {
                (void)broke(tcp, errno);
            }
            return false;
        }
        tcp->rest_sent += (uint64_t)sent;
    }
    free(tcp->rest);
    tcp->wants_room = false;
    set_interest(tcp, EPOLL_CTL_MOD, EPOLLIN);
    rfm_store_release(&tcp->rest, NULL);
    return true;
}

/* The reply that is being sent goes on by itself; false: no memory for that. */
static bool put_aside(struct tcp_link *tcp, struct outgoing *out)
{
    struct tcp_side *side = (struct tcp_side *)tcp->link.side;
    uint64_t skip = tcp->sent;
    uint64_t bytes = 0;
    uint64_t at = 0;
    struct iovec iov;
    uint8_t *rest;

    for (uint32_t k = tcp->segment; segment_of(out, k, &iov); k++) {
        bytes += iov.iov_len;
    }
    bytes -= skip;
    rest = malloc(bytes);
    if (rest == NULL) {
        return false;
    }
    for (uint32_t k = tcp->segment; segment_of(out, k, &iov); k++) {
        if (iov.iov_len > skip) {
            memcpy(rest + at, (uint8_t *)iov.iov_base + skip, iov.iov_len - skip);
            at += iov.iov_len - skip;
        }
        skip = 0;
    }
    tcp->segment = 0;
    tcp->sent    = 0;
    take_lock(&side->lock);
    tcp->rest_bytes = bytes;
    tcp->rest_sent  = 0;
    tcp->wants_room = true;
    rfm_store_release(&tcp->rest, rest);
    set_interest(tcp, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    unlock(&side->lock);
    return true;
}

/* true if nothing waits any more */
static bool send_queued(struct tcp_link *tcp)
{
    bool empty = true;

    /* Who finds the lock taken leaves: its holder looks again. */
    while (empty &&
           (rfm_load_acquire(&tcp->queue_head) !=
            rfm_load_acquire(&tcp->queue_tail)) &&
           try_lock(&tcp->send_lock)) {
        while (!tcp->fenced && (rfm_load_relaxed(&tcp->link.failed) == 0) &&
               (tcp->queue_tail != rfm_load_acquire(&tcp->queue_head))) {
            uint32_t slot = tcp->queue[tcp->queue_tail & (RFM_MAX_SLOTS - 1)];
            bool more = tcp->queue_tail + 1 !=
                        rfm_load_acquire(&tcp->queue_head);
            int rc = send_some(tcp, &tcp->out[slot], more);

            if (rc == RFM_ERR_AGAIN) {
                empty = false;
                if (!tcp->wants_room) {
                    rfm_store_relaxed(&tcp->wants_room, true);
                    rfm_fence();
                    set_interest(tcp, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
                }
                break;
            }
            if (rc < 0) {
                break;
            }
            rfm_store_release(&tcp->queue_tail, tcp->queue_tail + 1);
            rfm_store_release(&tcp->out[slot].queued, 0);
        }
        if (empty && tcp->wants_room) {
            rfm_store_relaxed(&tcp->wants_room, false);
            set_interest(tcp, EPOLL_CTL_MOD, EPOLLIN);
        }
        empty = empty && !tcp->fenced &&
                (rfm_load_relaxed(&tcp->link.failed) == 0);
        unlock(&tcp->send_lock);
        rfm_fence();
    }
    return empty;
}

/* --- the side ------------------------------------------------------------- */

static int side_open(const struct rfm_side_attr *attr, struct rfm_side **side_p)
{
    struct tcp_side *side = calloc(1, sizeof(*side));

    if (side == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    side->side.ops   = &rfm_tcp;
    side->spin_ticks = rfm_ns_to_ticks((uint64_t)attr->spin_us * 1000ull);
    side->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (side->epoll_fd < 0) {
        free(side);
        return RFM_ERR_SYSTEM;
    }
    *side_p = &side->side;
    return RFM_OK;
}

static void side_close(struct rfm_side *side)
{
    close(((struct tcp_side *)side)->epoll_fd);
    free(side);
}

/* `sure`: there is something, or somebody will sleep on it: what nobody asked
 * for, and its end, would not let him. */
static int progress_one(struct tcp_link *tcp, bool sure)
{
    int n = 0;

    if (rfm_load_relaxed(&tcp->link.failed) != 0) {
        return 0;
    }
    if (tcp->rank) {
        (void)send_queued(tcp);
        if (!sure && (rfm_load_relaxed(&tcp->expected) == 0) &&
            (tcp->in.stage == AT_HEAD) && (tcp->in.got == 0)) {
            return 0;
        }
    } else if (tcp->rest != NULL) {
        n = send_rest(tcp);     /* its next request can be served */
    }
    n += progress_link(tcp);
    /* whoever sleeps has to see to that, and it is in no epoll set any more */
    return n + (rfm_load_relaxed(&tcp->link.failed) != 0);
}

static int side_progress(struct rfm_side *base)
{
    struct tcp_side *side = (struct tcp_side *)base;
    struct epoll_event events[16];
    int n = 0;

    if (!try_lock(&side->lock)) {
        return RFM_ERR_BUSY;
    }
    if (side->n_links <= FEW_LINKS) {
        for (uint32_t i = 0; i < side->n_links; i++) {
            n += progress_one(side->links[i], side->arms != 0);
        }
    } else {
        int ready = epoll_wait(side->epoll_fd, events, 16, 0);

        /* a link that is no more is not in the set any more, either */
        for (int i = 0; i < ready; i++) {
            n += progress_one(events[i].data.ptr, true);
        }
        for (uint32_t i = 0; i < side->n_links; i++) {
            struct tcp_link *tcp = side->links[i];

            if (tcp->in.start != tcp->in.end) {
                n += progress_link(tcp);    /* held, so not seen by epoll */
            }
        }
    }
    unlock(&side->lock);
    return n;
}

static int side_fd(struct rfm_side *side)
{
    return ((struct tcp_side *)side)->epoll_fd;
}

static void side_arm(struct rfm_side *base)
{
    struct tcp_side *side = (struct tcp_side *)base;
    bool was;

    take_lock(&side->lock);
    was = is_listened(side);
    side->arms++;
    for (uint32_t i = 0; !was && (i < side->n_links); i++) {
        listen_to(side->links[i]);
    }
    unlock(&side->lock);
}

static void side_woken(struct rfm_side *base)
{
    struct tcp_side *side = (struct tcp_side *)base;

    take_lock(&side->lock);
    side->arms--;
    for (uint32_t i = 0; !is_listened(side) && (i < side->n_links); i++) {
        set_interest(side->links[i], EPOLL_CTL_DEL, 0);
    }
    unlock(&side->lock);
}

static int side_arena(struct rfm_side *side, uint32_t arena, uint8_t *base,
                      uint64_t bytes, struct rfm_parcel *out)
{
    (void)side;
    (void)arena;
    (void)base;
    (void)bytes;
    out->n_bytes = 0;
    return RFM_OK;
}

static void side_arena_drop(struct rfm_side *side, uint32_t arena)
{
    (void)side;
    (void)arena;
}

/* --- a link --------------------------------------------------------------- */

static void set_option(int fd, int level, int option, int value)
{
    /* a Unix socket knows none of them, and needs none */
    (void)setsockopt(fd, level, option, &value, sizeof(value));
}

static void link_free(struct tcp_link *tcp)
{
    for (uint32_t i = 0; i < RFM_MAX_SLOTS; i++) {
        free(tcp->out[i].descs);
    }
    free(tcp->descs);
    free(tcp->mirrors);
    free(tcp->requests);
    free(tcp->replies);
    free(tcp->rest);
    close(tcp->fd);
    free(tcp);
}

static int link_make(const struct rfm_link_attr *attr, bool rank,
                     struct tcp_link **tcp_p)
{
    struct tcp_side *side = (struct tcp_side *)attr->side;
    struct tcp_link *tcp;
    int rc = RFM_ERR_NO_MEMORY;
    bool was;
    int flags;

    if (attr->data_fd < 0) {
        return RFM_ERR_INVALID;
    }
    tcp = aligned_alloc(RFM_CACHE_LINE, (sizeof(*tcp) + RFM_CACHE_LINE - 1) &
                                            ~(size_t)(RFM_CACHE_LINE - 1));
    if (tcp == NULL) {
        close(attr->data_fd);
        return RFM_ERR_NO_MEMORY;
    }
    memset(tcp, 0, sizeof(*tcp));
    tcp->link.ops        = &rfm_tcp;
    tcp->link.side       = attr->side;
    tcp->link.slots      = attr->slots;
    tcp->link.slot_bytes = attr->slot_bytes;
    tcp->link.remote     = true;
    tcp->rank            = rank;
    tcp->fd              = attr->data_fd;
    tcp->flags           = attr->flags & RFM_STREAM_CRC;
    /* a rank hears what its worker will send, and until then it sends nothing */
    tcp->peer_flags      = rank ? UINT32_MAX : tcp->flags;
    /* like a slot in shared memory: a line more, for the last canary */
    tcp->stride   = 2u * RFM_CACHE_LINE + (uint64_t)attr->slot_bytes;
    tcp->requests = aligned_alloc(RFM_CACHE_LINE, attr->slots * tcp->stride);
    tcp->replies  = aligned_alloc(RFM_CACHE_LINE, attr->slots * tcp->stride);
    if ((tcp->requests == NULL) || (tcp->replies == NULL)) {
        goto err_free;
    }
    memset(tcp->requests, 0, attr->slots * tcp->stride);
    memset(tcp->replies, 0, attr->slots * tcp->stride);
    rc    = RFM_ERR_SYSTEM;
    flags = fcntl(tcp->fd, F_GETFL);
    if ((flags < 0) || (fcntl(tcp->fd, F_SETFL, flags | O_NONBLOCK) < 0)) {
        goto err_free;
    }
    set_option(tcp->fd, IPPROTO_TCP, TCP_NODELAY, 1);
    take_lock(&side->lock);
    if (side->n_links >= MAX_LINKS) {
        unlock(&side->lock);
        rc = RFM_ERR_NO_RESOURCE;
        goto err_free;
    }
    was = is_listened(side);
    side->links[side->n_links++] = tcp;
    for (uint32_t i = was ? side->n_links - 1 : 0;
         is_listened(side) && (i < side->n_links); i++) {
        listen_to(side->links[i]);
    }
    unlock(&side->lock);
    *tcp_p = tcp;
    return RFM_OK;

err_free:
    link_free(tcp);
    return rc;
}

/* Nobody receives for it, sends for it or finds it afterwards. */
static void link_fence(struct rfm_link *link)
{
    struct tcp_side *side = (struct tcp_side *)link->side;
    struct tcp_link *tcp = (struct tcp_link *)link;
    bool was;

    take_lock(&side->lock);
    for (uint32_t i = 0; i < side->n_links; i++) {
        if (side->links[i] == tcp) {
            was            = is_listened(side);
            side->links[i] = side->links[--side->n_links];
            set_interest(tcp, EPOLL_CTL_DEL, 0);
            for (i = 0; was && !is_listened(side) && (i < side->n_links); i++) {
                set_interest(side->links[i], EPOLL_CTL_DEL, 0);
            }
            break;
        }
    }
    unlock(&side->lock);
    take_lock(&tcp->send_lock);
    tcp->fenced = true;
    unlock(&tcp->send_lock);
    (void)shutdown(tcp->fd, SHUT_RDWR);
}

static void link_close(struct rfm_link *link)
{
    link_fence(link);
    link_free((struct tcp_link *)link);
}

static void parcel_out(const struct tcp_link *tcp, struct rfm_parcel *out)
{
    struct rfm_tcp_parcel body = { .flags = tcp->flags };

    memcpy(out->bytes, &body, sizeof(body));
    out->n_bytes = sizeof(body);
}

/* --- rank ----------------------------------------------------------------- */

static int rank_open(const struct rfm_link_attr *attr, struct rfm_link **link_p,
                     struct rfm_ctl_attach *body, struct rfm_parcel *out)
{
    struct tcp_link *tcp;
    int rc = link_make(attr, true, &tcp);

    if (rc < 0) {
        return rc;
    }
    memset(body, 0, sizeof(*body));
    body->slots      = attr->slots;
    body->slot_bytes = attr->slot_bytes;
    parcel_out(tcp, out);
    *link_p = &tcp->link;
    return RFM_OK;
}

static bool parcel_in(const struct rfm_parcel *in, uint32_t *flags_p)
{
    struct rfm_tcp_parcel body;

    if ((in->n_bytes != sizeof(body)) || (in->n_fds != 0)) {
        return false;
    }
    memcpy(&body, in->bytes, sizeof(body));
    *flags_p = body.flags;
    return (body.flags & ~RFM_STREAM_CRC) == 0;
}

static int rank_attached(struct rfm_link *link, const struct rfm_parcel *in)
{
    struct tcp_link *tcp = (struct tcp_link *)link;
    uint32_t flags;

    if (!parcel_in(in, &flags)) {
        return RFM_ERR_PROTOCOL;
    }
    rfm_store_relaxed(&tcp->peer_flags, flags);
    return RFM_OK;
}

static int rank_arena(struct rfm_link *link, uint32_t arena,
                      const struct rfm_parcel *in)
{
    (void)link;
    (void)arena;
    return (in->n_bytes == 0) ? RFM_OK : RFM_ERR_PROTOCOL;
}

static void rank_ready(struct rfm_link *link, uint32_t slot)
{
    struct tcp_link *tcp = (struct tcp_link *)link;

    while ((rfm_load_acquire(&tcp->out[slot].queued) != 0) &&
           (rfm_load_relaxed(&link->failed) == 0)) {
        sched_yield();
    }
}

static uint8_t *rank_payload(struct rfm_link *link, uint32_t slot)
{
    return request_at((struct tcp_link *)link, slot) + RFM_CACHE_LINE;
}

static bool rank_post(struct rfm_link *link, uint32_t slot,
                      const struct rfm_request_line *line,
                      const struct rfm_traffic *traffic)
{
    struct tcp_link *tcp = (struct tcp_link *)link;
    uint64_t more = (line->in_bytes > RFM_INLINE_BYTES) ? line->in_bytes : 0;
    bool batched = traffic->batched;    /* soon it may be another's */

    if (prepare(tcp, slot, RFM_STREAM_REQUEST, line, rank_payload(link, slot),
                more, traffic->push, traffic->n_push) < 0) {
        return true;
    }
    rfm_store_relaxed(&tcp->out[slot].queued, 1);
    tcp->posted[slot] = line->id;
    rfm_store_release(&tcp->traffic[slot], traffic);
    (void)__atomic_fetch_add(&tcp->expected, 1, __ATOMIC_RELAXED);
    take_lock(&tcp->queue_lock);
    tcp->queue[tcp->queue_head & (RFM_MAX_SLOTS - 1)] = (uint8_t)slot;
    rfm_store_release(&tcp->queue_head, tcp->queue_head + 1);
    unlock(&tcp->queue_lock);
    if (batched) {
        return true;
    }
    rfm_fence();
    (void)send_queued(tcp);
    /* also if somebody else found no room for it */
    return rfm_load_acquire(&tcp->out[slot].queued) == 0;
}

static bool rank_push(struct rfm_link *link)
{
    struct tcp_link *tcp = (struct tcp_link *)link;

    rfm_fence();
    (void)send_queued(tcp);
    return rfm_load_acquire(&tcp->queue_head) ==
           rfm_load_acquire(&tcp->queue_tail);
}

static bool rank_poll(struct rfm_link *link, uint32_t slot, uint64_t id,
                      struct rfm_reply_line *line_p, const uint8_t **payload_p)
{
    struct rfm_reply_line *at =
        (struct rfm_reply_line *)reply_at((struct tcp_link *)link, slot);

    if (rfm_load_acquire(&at->id) != id) {
        return false;
    }
    memcpy(line_p, at, sizeof(*line_p));
    *payload_p = (const uint8_t *)at + RFM_CACHE_LINE;
    return true;
}

static void rank_forget(struct rfm_link *link, uint32_t slot)
{
    struct rfm_reply_line *at =
        (struct rfm_reply_line *)reply_at((struct tcp_link *)link, slot);

    rfm_store_release(&at->id, 0);
}

/* --- worker --------------------------------------------------------------- */

static int worker_open(const struct rfm_link_attr *attr,
                       const struct rfm_ctl_attach *body,
                       const struct rfm_parcel *in, struct rfm_link **link_p,
                       struct rfm_parcel *out)
{
    struct rfm_link_attr mine = *attr;
    struct tcp_link *tcp;
    int rc;

    (void)body;
    /* what the rank wants checked is so both ways */
    if (!parcel_in(in, &mine.flags)) {
        if (attr->data_fd >= 0) {
            close(attr->data_fd);
        }
        return RFM_ERR_PROTOCOL;
    }
    rc = link_make(&mine, false, &tcp);
    if (rc < 0) {
        return rc;
    }
    parcel_out(tcp, out);
    *link_p = &tcp->link;
    return RFM_OK;
}

static int worker_arena(struct rfm_link *link, uint32_t arena, uint8_t *base,
                        uint64_t bytes, const struct rfm_parcel *in,
                        struct rfm_parcel *out)
{
    struct tcp_side *side = (struct tcp_side *)link->side;
    struct tcp_link *tcp = (struct tcp_link *)link;
    const struct mirror *found;
    struct mirror *more;
    int rc = RFM_OK;

    take_lock(&side->lock);
    found = find_mirror(tcp, arena);
    if (base == NULL) {
        if ((tcp->in.stage == AT_DATA) || (tcp->in.stage == AT_PAYLOAD) ||
            (tcp->in.stage == AT_CRC)) {
            for (uint32_t i = 0; i < tcp->in.head.n_regions; i++) {
                if (!is_drop(tcp, i) && (tcp->descs[i].arena == arena)) {
                    rc = RFM_ERR_BUSY;
                }
            }
        }
        if ((rc == RFM_OK) && (found != NULL)) {
            tcp->mirrors[found - tcp->mirrors] = tcp->mirrors[--tcp->n_mirrors];
        }
        goto out;
    }
    if ((found != NULL) || (in->n_bytes != 0)) {
        rc = RFM_ERR_PROTOCOL;
        goto out;
    }
    more = realloc(tcp->mirrors, (tcp->n_mirrors + 1) * sizeof(*more));
    if (more == NULL) {
        rc = RFM_ERR_NO_MEMORY;
        goto out;
    }
    tcp->mirrors = more;
    more[tcp->n_mirrors++] = (struct mirror){ arena, base, bytes };
    out->n_bytes = 0;
out:
    unlock(&side->lock);
    return rc;
}

static bool worker_poll(struct rfm_link *link, uint32_t slot, uint64_t last_id,
                        struct rfm_request_line *line_p,
                        const uint8_t **payload_p)
{
    struct rfm_request_line *at =
        (struct rfm_request_line *)request_at((struct tcp_link *)link, slot);

    if ((rfm_load_acquire(&at->id) == last_id) ||
        (rfm_load_acquire(&((struct tcp_link *)link)->rest) != NULL)) {
        return false;
    }
    memcpy(line_p, at, sizeof(*line_p));
    *payload_p = (const uint8_t *)at + RFM_CACHE_LINE;
    return true;
}

static uint8_t *worker_payload(struct rfm_link *link, uint32_t slot)
{
    return reply_at((struct tcp_link *)link, slot) + RFM_CACHE_LINE;
}

/* As send_some(), and looks again for a while: a rank that reads makes room in
 * less time than it takes to fall asleep and wake up. */
static int send_soon(struct tcp_link *tcp, struct outgoing *out, bool more)
{
    uint64_t spin = ((struct tcp_side *)tcp->link.side)->spin_ticks;
    uint64_t since = rfm_ticks();
    int rc;

    for (;;) {
        uint32_t segment = tcp->segment;
        uint64_t sent = tcp->sent;

        rc = send_some(tcp, out, more);
        if (rc != RFM_ERR_AGAIN) {
            return rc;
        }
        if ((tcp->segment != segment) || (tcp->sent != sent)) {
            since = rfm_ticks();
        } else if (rfm_ticks() - since >= spin) {
            return rc;
        }
        rfm_spin_pause();
    }
}

static void worker_reply(struct rfm_link *link, uint32_t slot,
                         const struct rfm_reply_line *line,
                         uint64_t payload_bytes,
                         const struct rfm_region *regions, uint32_t n)
{
    struct tcp_link *tcp = (struct tcp_link *)link;
    int rc;

    rfm_store_release(&tcp->given[slot], false);
    if (rfm_load_acquire(&link->failed) != 0) {
        return;                 /* part of another one may be its last word */
    }
    rc = prepare(tcp, slot, RFM_STREAM_REPLY, line, worker_payload(link, slot),
                 payload_bytes, regions, n);
    while (rc == RFM_OK) {
        struct pollfd p = { .fd = tcp->fd, .events = POLLOUT };
        int ready;

        rc = send_soon(tcp, &tcp->out[slot], link->more);
        if (rc != RFM_ERR_AGAIN) {
            break;
        }
        do {
            ready = poll(&p, 1, PATIENCE_MS);
        } while ((ready < 0) && (errno == EINTR));
        if (ready > 0) {
            rc = RFM_OK;
        } else if (put_aside(tcp, &tcp->out[slot])) {
            return;
        } else if (poll(&p, 1, STUCK_MS) > 0) {
            rc = RFM_OK;
        } else {
            rc = fail(tcp, RFM_ERR_TIMEOUT, "the rank takes no reply");
        }
    }
}

const struct rfm_transport rfm_tcp = {
    .name            = "tcp",
    .number          = RFM_TRANSPORT_TCP,
    .remote          = true,
    .last_words_ns   = 100000000,
    .side_open       = side_open,
    .side_close      = side_close,
    .side_progress   = side_progress,
    .side_fd         = side_fd,
    .side_arm        = side_arm,
    .side_woken      = side_woken,
    .side_arena      = side_arena,
    .side_arena_drop = side_arena_drop,
    .rank_open       = rank_open,
    .rank_attached   = rank_attached,
    .rank_arena      = rank_arena,
    .rank_ready      = rank_ready,
    .rank_payload    = rank_payload,
    .rank_post       = rank_post,
    .rank_push       = rank_push,
    .rank_poll       = rank_poll,
    .rank_forget     = rank_forget,
    .rank_take_back  = NULL,
    .rank_wake_at    = NULL,
    .rank_fence      = link_fence,
    .rank_close      = link_close,
    .worker_open     = worker_open,
    .worker_arena    = worker_arena,
    .worker_poll     = worker_poll,
    .worker_begin    = NULL,
    .worker_payload  = worker_payload,
    .worker_reply    = worker_reply,
    .worker_knock    = NULL,
    .worker_close    = link_close,
};

/*
 * RDMA: nodes with InfiniBand or RoCE.
 *
 * A request is one RDMA write with immediate into the worker's ring, a reply
 * one into the rank's; what belongs to them goes before, in plain writes on the
 * same queue pair, straight from one side's arena into the other's. Who waits
 * polls the completion queue; a completion makes a slot's word ready, and only
 * such words are looked at.
 *
 * This is a shared object of its own (see rfm_transport.h), because libibverbs
 * may be missing.
 */
#define _GNU_SOURCE
#include "verbs.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define STUCK_NS 60000000000ull     /* a rank that takes no reply for so long */
#define DROP_NS   1000000000ull

/* --- completions: with the side's lock held --------------------------------- */

static const char *text_of(enum ibv_wc_status status, int *rc_p)
{
    *rc_p = RFM_ERR_PEER;
    switch (status) {
    case IBV_WC_RETRY_EXC_ERR:
        return "the other side's device does not answer (retry count exceeded)";
    case IBV_WC_RNR_RETRY_EXC_ERR:
        *rc_p = RFM_ERR_PROTOCOL;
        return "the other side had no receive for a slot (receiver not ready)";
    case IBV_WC_REM_ACCESS_ERR:
        *rc_p = RFM_ERR_PROTOCOL;
        return "the other side's device refused a write (remote access error)";
    case IBV_WC_REM_INV_REQ_ERR:
        *rc_p = RFM_ERR_PROTOCOL;
        return "the other side's device refused a request (invalid request)";
    case IBV_WC_REM_OP_ERR:
        return "the other side's device failed (remote operation error)";
    case IBV_WC_REM_ABORT_ERR:
        return "the other side's device aborted a write";
    case IBV_WC_LOC_PROT_ERR:
        return "our device refused our memory (local protection error)";
    case IBV_WC_LOC_LEN_ERR:
        return "our device refused a length (local length error)";
    case IBV_WC_LOC_QP_OP_ERR:
        return "our device failed (local queue pair operation error)";
    case IBV_WC_LOC_ACCESS_ERR:
        return "our device refused a write to our memory (local access error)";
    case IBV_WC_FATAL_ERR:
        return "our device failed (fatal error)";
    case IBV_WC_RESP_TIMEOUT_ERR:
        return "the other side's device does not answer (response timeout)";
    default:
        return "a work request failed";
    }
}

static int violated(struct verbs_link *v, const char *text)
{
    rfm_link_fail(&v->link, RFM_ERR_PROTOCOL, text);
    return 0;
}

static void post_receives(struct verbs_link *v)
{
    struct ibv_recv_wr *bad;

    v->received -= v->batch;
    v->to_flush += v->batch;
    if (__builtin_expect(ibv_post_recv(v->qp, v->recvs, &bad) != 0, 0)) {
        rfm_link_fail(&v->link, RFM_ERR_SYSTEM, "receives can't be posted");
    }
}

static int received(struct verbs_link *v, const struct ibv_wc *wc)
{
    uint32_t slot = ntohl(wc->imm_data);

    v->to_flush--;
    if (++v->received >= v->batch) {
        post_receives(v);
    }
    if ((wc->opcode != IBV_WC_RECV_RDMA_WITH_IMM) || (slot >= v->link.slots) ||
        (wc->byte_len < RFM_CACHE_LINE) || (wc->byte_len > v->stride)) {
        return violated(v, "a slot that made no sense");
    }
    if (v->rank) {
        uint64_t id = rfm_load_acquire(&v->asked[slot]);

        if (id == 0) {
            return violated(v, "a reply that nobody asked for");
        }
        rfm_store_relaxed(&v->asked[slot], 0);
        rfm_store_relaxed(&v->length[slot], wc->byte_len);
        rfm_store_release(&v->ready[slot], id);
    } else {
        if (rfm_load_acquire(&v->ready[slot]) != 0) {
            return violated(v, "a request in a slot that is in use");
        }
        rfm_store_relaxed(&v->length[slot], wc->byte_len);
        rfm_store_release(&v->ready[slot], 1);
    }
    return 1;
}

static int went_wrong(struct verbs_link *v, const struct ibv_wc *wc,
                      uint32_t kind)
{
    if (kind == VERBS_RECV) {
        v->to_flush--;
    } else if (kind == VERBS_LAST) {
        v->last_seen = true;
    }
    if (wc->status == IBV_WC_WR_FLUSH_ERR) {
        /* what caused it is said by another completion, which may follow */
        v->flushed = true;
        ((struct verbs_side *)v->link.side)->flushed = true;
    } else if (!rfm_load_acquire(&v->fenced)) {
        int rc;
        const char *text = text_of(wc->status, &rc);

        rfm_link_fail(&v->link, rc, text);
        return 1;               /* whoever sleeps has to see to that */
    }
    return 0;
}

int rfm_verbs_completed(struct verbs_link *v, const struct ibv_wc *wc)
{
    uint32_t kind = (uint32_t)(wc->wr_id >> 56);

    if (__builtin_expect(wc->status != IBV_WC_SUCCESS, 0)) {
        return went_wrong(v, wc, kind);
    }
    if (kind == VERBS_RECV) {
        return received(v, wc);
    }
    if (kind == VERBS_SEND) {
        uint64_t done = rfm_load_relaxed(&v->done);

        done += (uint32_t)wc->wr_id - (uint32_t)done;
        rfm_store_release(&v->done, done);
        if (v->rank && (rfm_load_acquire(&v->queue_head) !=
                        rfm_load_acquire(&v->queue_tail))) {
            (void)rfm_verbs_send_queued(v);
        }
    } else {
        v->last_seen = true;
    }
    return 0;
}

/* --- sending: with the link's send_lock held -------------------------------- */

static inline bool has_room(struct verbs_link *v)
{
    return v->posted - rfm_load_acquire(&v->done) < v->depth;
}

static inline unsigned int signal_flag(struct verbs_link *v, bool always)
{
    v->posted++;
    if (!always && (v->posted - v->signalled < v->interval)) {
        return 0;
    }
    v->signalled = v->posted;
    return IBV_SEND_SIGNALED;
}

static void post(struct verbs_link *v, struct ibv_send_wr *wr)
{
    struct ibv_send_wr *bad;

    wr->wr_id = verbs_wr_id(VERBS_SEND, v->index, (uint32_t)v->posted);
    if (__builtin_expect(ibv_post_send(v->qp, wr, &bad) != 0, 0)) {
        rfm_link_fail(&v->link, RFM_ERR_SYSTEM, "a write could not be posted");
    }
}

/* line: in the stage, or wherever it is if it is sent inline */
static void post_slot(struct verbs_link *v, uint32_t slot, const void *line,
                      uint64_t bytes, bool always)
{
    uint64_t at = slot * v->stride;
    unsigned int flags = IBV_SEND_SOLICITED | signal_flag(v, always);

    if (bytes <= v->inline_bytes) {
        flags |= IBV_SEND_INLINE;
    } else if ((const uint8_t *)line != v->stage + at) {
        memcpy(v->stage + at, line, RFM_CACHE_LINE);
        line = v->stage + at;
    }
    v->sge.addr   = (uint64_t)(uintptr_t)line;
    v->sge.length = (uint32_t)bytes;
    v->sge.lkey   = v->stage_mr->lkey;
    v->slot.send_flags          = flags;
    v->slot.imm_data            = htonl(slot);
    v->slot.wr.rdma.remote_addr = v->peer_ring + at;
    post(v, &v->slot);
}

/* The next piece of a region; how much of it. 0: it is in no arena that the
 * other side has. */
static uint64_t post_piece(struct verbs_link *v, const struct rfm_region *region,
                           uint64_t from)
{
    const struct verbs_arena *a = rfm_verbs_arena(v, region->arena);
    uint64_t n = region->size - from;

    if ((a == NULL) || (region->offset > a->bytes) ||
        (region->size > a->bytes - region->offset)) {
        rfm_link_fail(&v->link, RFM_ERR_INVALID,
                      "data of an arena that the other side does not have");
        return 0;
    }
    if (n > v->max_write) {
        n = v->max_write;
    }
    v->write.send_flags = signal_flag(v, false);
    if (n <= v->inline_bytes) {
        v->write.send_flags |= IBV_SEND_INLINE;
    }
    v->mapped     = v->posted;
    v->sge.addr   = (uint64_t)(uintptr_t)(region->address + from);
    v->sge.length = (uint32_t)n;
    v->sge.lkey   = a->lkey;
    v->write.wr.rdma.remote_addr = a->address + region->offset + from;
    v->write.wr.rdma.rkey        = a->rkey;
    post(v, &v->write);
    return n;
}

static inline bool is_over(struct verbs_link *v)
{
    return v->fenced || (rfm_load_relaxed(&v->link.failed) != 0);
}

/* --- rank ------------------------------------------------------------------- */

static int rank_open(const struct rfm_link_attr *attr, struct rfm_link **link_p,
                     struct rfm_ctl_attach *body, struct rfm_parcel *out)
{
    struct verbs_link *v;
    int rc = rfm_verbs_link_make(attr, true, &v);

    if (rc < 0) {
        return rc;
    }
    memset(body, 0, sizeof(*body));
    body->slots      = attr->slots;
    body->slot_bytes = attr->slot_bytes;
    rfm_verbs_parcel_out(v, out);
    *link_p = &v->link;
    return RFM_OK;
}

static int rank_attached(struct rfm_link *link, const struct rfm_parcel *in)
{
    return rfm_verbs_connect((struct verbs_link *)link, in);
}

static int rank_arena(struct rfm_link *link, uint32_t arena,
                      const struct rfm_parcel *in)
{
    struct verbs_side *side = (struct verbs_side *)link->side;
    struct verbs_link *v = (struct verbs_link *)link;
    struct verbs_arena both = { 0 };
    int rc = RFM_ERR_PROTOCOL;

    pthread_mutex_lock(&side->arenas_lock);
    for (uint32_t i = 0; i < side->n_arenas; i++) {
        if (side->arenas[i].arena == arena) {
            both = side->arenas[i];
        }
    }
    both.mr = NULL;             /* its side's */
    if ((both.bytes != 0) && rfm_verbs_memory_in(in, both.bytes, &both)) {
        verbs_take_lock(&v->send_lock);
        rc = rfm_verbs_arena_add(v, &both);
        rfm_verbs_let_go(v);
    }
    pthread_mutex_unlock(&side->arenas_lock);
    return rc;
}

static inline uint8_t *stage_at(struct verbs_link *v, uint32_t slot)
{
    return v->stage + slot * v->stride;
}

static uint8_t *rank_payload(struct rfm_link *link, uint32_t slot)
{
    return stage_at((struct verbs_link *)link, slot) + RFM_CACHE_LINE;
}

static inline uint64_t bytes_of(const struct rfm_request_line *line)
{
    return RFM_CACHE_LINE +
           ((line->in_bytes > RFM_INLINE_BYTES) ? line->in_bytes : 0);
}

/* send_lock held; false: there is no room for the rest of it */
static bool send_slot(struct verbs_link *v, uint32_t slot)
{
    const struct rfm_traffic *traffic = v->traffic[slot];
    struct rfm_request_line line;

    while (v->region < traffic->n_push) {
        const struct rfm_region *region = &traffic->push[v->region];
        uint64_t n;

        if (v->sent == region->size) {
            v->region++;
            v->sent = 0;
            continue;
        }
        if (!has_room(v)) {
            return false;
        }
        n = post_piece(v, region, v->sent);
        if (n == 0) {
            return true;
        }
        v->sent += n;
    }
    if (!has_room(v)) {
        return false;
    }
    memcpy(&line, stage_at(v, slot), sizeof(line));
    rfm_store_release(&v->asked[slot], line.id);
    v->region = 0;
    v->sent   = 0;
    post_slot(v, slot, stage_at(v, slot), bytes_of(&line), traffic->n_push != 0);
    return true;
}

static inline bool queue_is_empty(struct verbs_link *v)
{
    return rfm_load_acquire(&v->queue_head) == rfm_load_acquire(&v->queue_tail);
}

bool rfm_verbs_send_queued(struct verbs_link *v)
{
    /* Who finds the lock taken leaves: its holder looks again. */
    while (!queue_is_empty(v) && verbs_try_lock(&v->send_lock)) {
        bool full = false;
        bool was = v->stuck;

        while (!full && !is_over(v) && !queue_is_empty(v)) {
            uint64_t tail = v->queue_tail;
            uint32_t slot = v->queue[tail & (RFM_MAX_SLOTS - 1)];

            full = !send_slot(v, slot);
            if (!full) {
                rfm_store_release(&v->queue_tail, tail + 1);
                rfm_store_release(&v->queued[slot], 0);
            }
        }
        v->stuck = full;
        full     = full || is_over(v);
        verbs_unlock(&v->send_lock);
        rfm_fence();
        if (full) {
            /* who sleeps waits for replies only, and now there is more */
            if (!was) {
                rfm_verbs_nudge((struct verbs_side *)v->link.side);
            }
            return false;
        }
    }
    return true;
}

void rfm_verbs_let_go(struct verbs_link *v)
{
    verbs_unlock(&v->send_lock);
    rfm_fence();
    (void)rfm_verbs_send_queued(v);
}

static bool rank_post(struct rfm_link *link, uint32_t slot,
                      const struct rfm_request_line *line,
                      const struct rfm_traffic *traffic)
{
    struct verbs_link *v = (struct verbs_link *)link;
    uint64_t bytes = bytes_of(line);

    if ((traffic->n_push == 0) && queue_is_empty(v) &&
        verbs_try_lock(&v->send_lock)) {
        bool mine = queue_is_empty(v) && !is_over(v) && has_room(v);

        if (mine) {
            const void *from = line;

            if (bytes > RFM_CACHE_LINE) {
                from = memcpy(stage_at(v, slot), line, RFM_CACHE_LINE);
            }
            rfm_store_release(&v->asked[slot], line->id);
            rfm_store_relaxed(&v->queued[slot], 1);
            post_slot(v, slot, from, bytes, false);
            rfm_store_release(&v->queued[slot], 0);
        }
        verbs_unlock(&v->send_lock);
        if (mine) {
            rfm_fence();
            return queue_is_empty(v) || rfm_verbs_send_queued(v);
        }
    }
    memcpy(stage_at(v, slot), line, RFM_CACHE_LINE);
    v->traffic[slot] = traffic;
    rfm_store_relaxed(&v->queued[slot], 1);
    verbs_take_lock(&v->queue_lock);
    v->queue[v->queue_head & (RFM_MAX_SLOTS - 1)] = (uint8_t)slot;
    rfm_store_release(&v->queue_head, v->queue_head + 1);
    verbs_unlock(&v->queue_lock);
    rfm_fence();
    return rfm_verbs_send_queued(v);
}

static void rank_ready(struct rfm_link *link, uint32_t slot)
{
    struct verbs_link *v = (struct verbs_link *)link;

    while ((rfm_load_acquire(&v->queued[slot]) != 0) &&
           (rfm_load_relaxed(&link->failed) == 0)) {
        sched_yield();
    }
}

static bool rank_poll(struct rfm_link *link, uint32_t slot, uint64_t id,
                      struct rfm_reply_line *line_p, const uint8_t **payload_p)
{
    struct verbs_link *v = (struct verbs_link *)link;
    const uint8_t *at = v->ring + slot * v->stride;

    if (rfm_load_acquire(&v->ready[slot]) != id) {
        return false;
    }
    memcpy(line_p, at, sizeof(*line_p));
    if (__builtin_expect(line_p->id != id, 0)) {
        (void)violated(v, "a reply to another invocation");
        return false;
    }
    *payload_p = at + RFM_CACHE_LINE;
    return true;
}

static void rank_forget(struct rfm_link *link, uint32_t slot)
{
    rfm_store_release(&((struct verbs_link *)link)->ready[slot], 0);
}

/* --- worker ----------------------------------------------------------------- */

static int worker_open(const struct rfm_link_attr *attr,
                       const struct rfm_ctl_attach *body,
                       const struct rfm_parcel *in, struct rfm_link **link_p,
                       struct rfm_parcel *out)
{
    struct verbs_link *v;
    int rc;

    (void)body;
    rc = rfm_verbs_link_make(attr, false, &v);
    if (rc < 0) {
        return rc;
    }
    rc = rfm_verbs_connect(v, in);
    if (rc < 0) {
        rfm_verbs_link_close(&v->link);
        return rc;
    }
    rfm_verbs_parcel_out(v, out);
    *link_p = &v->link;
    return RFM_OK;
}

static int add_mirror(struct verbs_link *v, uint32_t arena, uint8_t *base,
                      uint64_t bytes, const struct rfm_parcel *in,
                      struct rfm_parcel *out)
{
    struct verbs_side *side = (struct verbs_side *)v->link.side;
    struct verbs_arena both = { .arena = arena, .base = base, .bytes = bytes };
    int rc;

    rfm_verbs_begin();
    if (!rfm_verbs_memory_in(in, bytes, &both)) {
        return RFM_ERR_PROTOCOL;
    }
    both.mr = ibv_reg_mr(side->pd, base, bytes,
                         IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    if (both.mr == NULL) {
        return rfm_verbs_no_memory(bytes);
    }
    both.lkey = both.mr->lkey;
    verbs_take_lock(&v->send_lock);
    rc = rfm_verbs_arena_add(v, &both);
    verbs_unlock(&v->send_lock);
    if (rc < 0) {
        (void)ibv_dereg_mr(both.mr);
        return rc;
    }
    rfm_verbs_memory_out(both.mr, out);
    return RFM_OK;
}

/* Its results have arrived, but our device may still have to hear of it. */
static int drop_mirror(struct verbs_link *v, uint32_t arena)
{
    uint64_t deadline = rfm_now_ns() + DROP_NS;
    struct verbs_arena *found;
    struct ibv_mr *mr = NULL;

    while (rfm_load_acquire(&v->done) < v->mapped) {
        if ((rfm_load_relaxed(&v->link.failed) != 0) ||
            (rfm_now_ns() > deadline)) {
            return RFM_ERR_BUSY;
        }
        (void)rfm_verbs_side_progress(v->link.side);
    }
    verbs_take_lock(&v->send_lock);
    found = rfm_verbs_arena(v, arena);
    if (found != NULL) {
        mr     = found->mr;
        *found = v->arenas[--v->n_arenas];
    }
    verbs_unlock(&v->send_lock);
    if (mr != NULL) {
        (void)ibv_dereg_mr(mr);
    }
    return RFM_OK;
}

static int worker_arena(struct rfm_link *link, uint32_t arena, uint8_t *base,
                        uint64_t bytes, const struct rfm_parcel *in,
                        struct rfm_parcel *out)
{
    struct verbs_link *v = (struct verbs_link *)link;

    return (base == NULL) ? drop_mirror(v, arena)
                          : add_mirror(v, arena, base, bytes, in, out);
}

static bool worker_poll(struct rfm_link *link, uint32_t slot, uint64_t last_id,
                        struct rfm_request_line *line_p,
                        const uint8_t **payload_p)
{
    struct verbs_link *v = (struct verbs_link *)link;
    const uint8_t *at = v->ring + slot * v->stride;

    if (rfm_load_acquire(&v->ready[slot]) == 0) {
        return false;
    }
    memcpy(line_p, at, sizeof(*line_p));
    if (__builtin_expect((line_p->id == last_id) || (line_p->id == 0), 0)) {
        (void)violated(v, "a request that was made before");
        return false;
    }
    if (__builtin_expect((line_p->in_bytes > link->slot_bytes) ||
                             (rfm_load_relaxed(&v->length[slot]) <
                              bytes_of(line_p)), 0)) {
        (void)violated(v, "a request shorter than it says");
        return false;
    }
    *payload_p = at + RFM_CACHE_LINE;
    return true;
}

static uint8_t *worker_payload(struct rfm_link *link, uint32_t slot)
{
    return stage_at((struct verbs_link *)link, slot) + RFM_CACHE_LINE;
}

/* With send_lock held, but not while it waits: the rank's device takes
 * what is in our queue, or the link fails. */
static bool await_room(struct verbs_link *v)
{
    uint64_t deadline = 0;

    while (!has_room(v)) {
        verbs_unlock(&v->send_lock);
        if (deadline == 0) {
            deadline = rfm_now_ns() + STUCK_NS;
        } else if (rfm_now_ns() > deadline) {
            rfm_link_fail(&v->link, RFM_ERR_TIMEOUT, "the rank takes no reply");
        }
        (void)rfm_verbs_side_progress(v->link.side);
        verbs_take_lock(&v->send_lock);
        if (is_over(v)) {
            return false;
        }
    }
    return !is_over(v);
}

static bool reply_regions(struct verbs_link *v, const struct rfm_region *regions,
                          uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint64_t sent = 0;

        while (sent < regions[i].size) {
            uint64_t piece;

            if (!await_room(v)) {
                return false;
            }
            piece = post_piece(v, &regions[i], sent);
            if (piece == 0) {
                return false;
            }
            sent += piece;
        }
    }
    return true;
}

static void worker_reply(struct rfm_link *link, uint32_t slot,
                         const struct rfm_reply_line *line,
                         uint64_t payload_bytes,
                         const struct rfm_region *regions, uint32_t n)
{
    struct verbs_link *v = (struct verbs_link *)link;
    const void *from = line;

    rfm_store_release(&v->ready[slot], 0);
    verbs_take_lock(&v->send_lock);
    if (reply_regions(v, regions, n) && await_room(v)) {
        if (payload_bytes > 0) {
            from = memcpy(stage_at(v, slot), line, RFM_CACHE_LINE);
        }
        post_slot(v, slot, from, RFM_CACHE_LINE + payload_bytes, n != 0);
    }
    verbs_unlock(&v->send_lock);
}

/* --- the table -------------------------------------------------------------- */

const struct rfm_transport rfm_verbs = {
    .name            = "verbs",
    .number          = RFM_TRANSPORT_VERBS,
    .remote          = true,
    .last_words_ns   = 5000000,
    .why             = rfm_verbs_why,
    .describe        = rfm_verbs_describe,
    .side_open       = rfm_verbs_side_open,
    .side_close      = rfm_verbs_side_close,
    .side_progress   = rfm_verbs_side_progress,
    .side_fd         = rfm_verbs_side_fd,
    .side_arm        = rfm_verbs_side_arm,
    .side_woken      = rfm_verbs_side_woken,
    .side_arena      = rfm_verbs_side_arena,
    .side_arena_drop = rfm_verbs_side_arena_drop,
    .rank_open       = rank_open,
    .rank_attached   = rank_attached,
    .rank_arena      = rank_arena,
    .rank_ready      = rank_ready,
    .rank_payload    = rank_payload,
    .rank_post       = rank_post,
    .rank_poll       = rank_poll,
    .rank_forget     = rank_forget,
    .rank_take_back  = NULL,
    .rank_wake_at    = NULL,
    .rank_fence      = rfm_verbs_fence,
    .rank_close      = rfm_verbs_link_close,
    .worker_open     = worker_open,
    .worker_arena    = worker_arena,
    .worker_poll     = worker_poll,
    .worker_begin    = NULL,
    .worker_payload  = worker_payload,
    .worker_reply    = worker_reply,
    .worker_knock    = NULL,
    .worker_close    = rfm_verbs_link_close,
};

__attribute__((visibility("default"))) const struct rfm_transport *
rfm_plugin_open(const struct rfm_core *core, const char **why_p);

const struct rfm_transport *rfm_plugin_open(const struct rfm_core *core,
                                            const char **why_p)
{
    if ((core->version != RFM_PLUGIN_VERSION) ||
        (core->protocol != RFM_PROTOCOL) ||
        (core->transport_bytes != sizeof(struct rfm_transport))) {
        *why_p = "the verbs plug-in is of another version: build both again";
        return NULL;
    }
    *why_p = rfm_verbs_unusable();
    return (*why_p == NULL) ? &rfm_verbs : NULL;
}

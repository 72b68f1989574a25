/*
 * A queue pair, from set-up to fence.
 *
 *   RESET ─▶ INIT ─▶ RTR ─▶ RTS ─────────▶ ERR ─▶ destroyed
 *           receives  peer's parcel,        fence: flushed,
 *           posted    moves data            nothing comes or goes
 *
 * Each side has a ring that the other writes slots into, and a stage of the
 * same size from which it sends what is too long for an inline send. A write
 * takes one receive; there are always enough: `slots` may be under way, and
 * receives are posted again, `batch` at once, before `slots` are left. So a
 * receiver that is not ready is a violation, and is not retried.
 *
 * No acknowledgement is waited for before memory is used again: the answer to a
 * write proves that it arrived, and what the hardware may still send again is
 * then a duplicate, which the other side's hardware drops.
 */
#define _GNU_SOURCE
#include "verbs.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#define PAGE         4096u
#define MAX_DEPTH    256u
#define MAX_WRITE    (1ull << 30)
#define DRAIN_NS     1000000000ull
#define FAREWELL_NS  250000000ull
/* 4.096 us << 16 = 0.27 s, a few times: packets that are lost cost little more
 * than that, and a peer that vanished is noticed within seconds. Not 7 times,
 * which Linux's software device takes for ever. */
#define ACK_TIMEOUT  16
#define RETRIES      6
#define HOP_LIMIT    64

/* largest first; what is granted is read back */
static const uint32_t INLINE_WISHES[] = { 256, 128, 64, 0 };

static uint64_t page_up(uint64_t n)
{
    return (n + PAGE - 1) & ~(uint64_t)(PAGE - 1);
}

/* --- memory ----------------------------------------------------------------- */

static int make_memory(struct verbs_link *v, struct verbs_side *side)
{
    v->ring_bytes = page_up(v->link.slots * v->stride);
    v->memory = mmap(NULL, 2 * v->ring_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (v->memory == MAP_FAILED) {
        v->memory = NULL;
        return rfm_verbs_fail(RFM_ERR_NO_MEMORY,
                              "no memory for the slots of a connection");
    }
    (void)madvise(v->memory, 2 * v->ring_bytes, MADV_DONTFORK);
    v->ring    = v->memory;
    v->stage   = v->memory + v->ring_bytes;
    v->ring_mr = ibv_reg_mr(side->pd, v->ring, v->ring_bytes,
                            IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    if (v->ring_mr == NULL) {
        return rfm_verbs_no_memory(v->ring_bytes);
    }
    v->stage_mr = ibv_reg_mr(side->pd, v->stage, v->ring_bytes, 0);
    if (v->stage_mr == NULL) {
        return rfm_verbs_no_memory(v->ring_bytes);
    }
    return RFM_OK;
}

/* --- making ----------------------------------------------------------------- */

static uint32_t n_receives(const struct verbs_link *v)
{
    return v->link.slots + v->batch;
}

/* completions that may be there at once, if all of them fail */
static uint32_t cq_entries(const struct verbs_link *v)
{
    return n_receives(v) + v->depth + 1;
}

static int create_qp(struct verbs_link *v, struct verbs_side *side)
{
    uint32_t n = sizeof(INLINE_WISHES) / sizeof(INLINE_WISHES[0]);

    for (uint32_t i = 0; (i < n) && (v->qp == NULL); i++) {
        struct ibv_qp_init_attr attr = {
            .qp_context = v,
            .send_cq    = side->cq,
            .recv_cq    = side->cq,
            .cap = {
                .max_send_wr     = v->depth + 1,
                .max_recv_wr     = n_receives(v),
                .max_send_sge    = 1,
                .max_recv_sge    = 1,
                .max_inline_data = INLINE_WISHES[i],
            },
            .qp_type = IBV_QPT_RC,
        };
        struct ibv_qp_attr now;
        struct ibv_qp_init_attr made;

        v->qp = ibv_create_qp(side->pd, &attr);
        if (v->qp == NULL) {
            continue;
        }
        v->inline_bytes = attr.cap.max_inline_data;
        /* providers differ in which of the two they keep right */
        if ((ibv_query_qp(v->qp, &now, IBV_QP_CAP, &made) == 0) &&
            (made.cap.max_inline_data < v->inline_bytes)) {
            v->inline_bytes = made.cap.max_inline_data;
        }
    }
    if (v->qp == NULL) {
        return rfm_verbs_fail((errno == ENOMEM) ? RFM_ERR_NO_MEMORY
                                                : RFM_ERR_NO_RESOURCE,
                              "%s gives no queue pair of %u sends and %u "
                              "receives: %s",
                              side->dev.name, v->depth + 1, n_receives(v),
                              strerror(errno));
    }
    v->qp_number = v->qp->qp_num;
    return RFM_OK;
}

static int join(struct verbs_link *v, struct verbs_side *side)
{
    uint32_t i = 0;
    int rc;

    verbs_take_lock(&side->lock);
    while ((i < RFM_VERBS_LINKS) && (side->links[i] != NULL)) {
        i++;
    }
    rc = (i < RFM_VERBS_LINKS)
             ? rfm_verbs_cq_reserve(side, cq_entries(v))
             : rfm_verbs_fail(RFM_ERR_NO_RESOURCE,
                              "a process has at most %u connections",
                              RFM_VERBS_LINKS);
    if (rc == RFM_OK) {
        v->index       = i;
        side->links[i] = v;
        if (i == side->n_links) {
            side->n_links++;
        }
    }
    verbs_unlock(&side->lock);
    return rc;
}

static void leave(struct verbs_link *v, struct verbs_side *side)
{
    verbs_take_lock(&side->lock);
    if (side->links[v->index] == v) {
        side->links[v->index] = NULL;
        side->cq_used        -= cq_entries(v);
        while ((side->n_links > 0) && (side->links[side->n_links - 1] == NULL)) {
            side->n_links--;
        }
    }
    verbs_unlock(&side->lock);
}

static int initialise(struct verbs_link *v, struct verbs_side *side)
{
    struct ibv_qp_attr attr = {
        .qp_state        = IBV_QPS_INIT,
        .port_num        = side->dev.port,
        .qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
    };
    struct ibv_recv_wr *bad;
    uint32_t n = n_receives(v);
    int rc;

    rc = ibv_modify_qp(v->qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX |
                                         IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
    if (rc != 0) {
        return rfm_verbs_fail(RFM_ERR_SYSTEM, "%s: a queue pair can't be "
                              "initialised: %s", side->dev.name, strerror(rc));
    }
    /* the link has joined: its receives are the side's lock's, as in received() */
    verbs_take_lock(&side->lock);
    for (uint32_t i = 0; i < n; i++) {
        v->recvs[i].wr_id = verbs_wr_id(VERBS_RECV, v->index, 0);
        v->recvs[i].next  = (i + 1 < n) ? &v->recvs[i + 1] : NULL;
    }
    v->to_flush = n;
    rc = ibv_post_recv(v->qp, v->recvs, &bad);
    v->recvs[v->batch - 1].next = NULL;
    verbs_unlock(&side->lock);
    if (rc != 0) {
        return rfm_verbs_fail(RFM_ERR_SYSTEM,
                              "%s: receives can't be posted: %s", side->dev.name,
                              strerror(rc));
    }
    return RFM_OK;
}

static uint32_t random_psn(void)
{
    uint32_t psn = 0;

    if (getrandom(&psn, sizeof(psn), 0) != (ssize_t)sizeof(psn)) {
        psn = (uint32_t)rfm_now_ns();
    }
    return psn & 0xffffffu;
}

static void free_link(struct verbs_link *v)
{
    if (v->qp != NULL) {
        (void)ibv_destroy_qp(v->qp);
    }
    if (v->ring_mr != NULL) {
        (void)ibv_dereg_mr(v->ring_mr);
    }
    if (v->stage_mr != NULL) {
        (void)ibv_dereg_mr(v->stage_mr);
    }
    for (uint32_t i = 0; i < v->n_arenas; i++) {
        if (v->arenas[i].mr != NULL) {
            (void)ibv_dereg_mr(v->arenas[i].mr);
        }
    }
    if (v->memory != NULL) {
        munmap(v->memory, 2 * v->ring_bytes);
    }
    free(v->recvs);
    free(v->arenas);
    free(v);
}

int rfm_verbs_link_make(const struct rfm_link_attr *attr, bool rank,
                        struct verbs_link **link_p)
{
    struct verbs_side *side = (struct verbs_side *)attr->side;
    uint32_t most = (uint32_t)side->dev.limits.max_qp_wr;
    struct verbs_link *v;
    int rc = RFM_ERR_NO_MEMORY;

    rfm_verbs_begin();
    if (attr->data_fd >= 0) {
        close(attr->data_fd);   /* it is ours, and we need none */
    }
    v = aligned_alloc(RFM_CACHE_LINE, (sizeof(*v) + RFM_CACHE_LINE - 1) &
                                          ~(size_t)(RFM_CACHE_LINE - 1));
    if (v == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    memset(v, 0, sizeof(*v));
    v->link.ops        = &rfm_verbs;
    v->link.side       = attr->side;
    v->link.slots      = attr->slots;
    v->link.slot_bytes = attr->slot_bytes;
    v->link.remote     = true;
    v->rank            = rank;
    v->index           = RFM_VERBS_LINKS - 1;
    /* like a slot in shared memory: a line more, for the last canary */
    v->stride    = 2u * RFM_CACHE_LINE + (uint64_t)attr->slot_bytes;
    v->batch     = attr->slots / 2;
    v->depth     = 2 * attr->slots + 64;
    v->max_write = (side->dev.attr.max_msg_sz != 0) &&
                           (side->dev.attr.max_msg_sz < MAX_WRITE)
                       ? side->dev.attr.max_msg_sz
                       : MAX_WRITE;
    if (v->depth > MAX_DEPTH) {
        v->depth = MAX_DEPTH;
    }
    if (v->depth + 1 > most) {
        v->depth = (most > 1) ? most - 1 : 1;
    }
    v->interval = (v->depth >= 4) ? v->depth / 4 : 1;
    v->recvs    = calloc(n_receives(v), sizeof(*v->recvs));
    if (v->recvs == NULL) {
        goto err_free;
    }
    rc = make_memory(v, side);
    if (rc < 0) {
        goto err_free;
    }
    rc = create_qp(v, side);
    if (rc < 0) {
        goto err_free;
    }
    rc = join(v, side);
    if (rc < 0) {
        goto err_free;
    }
    rc = initialise(v, side);
    if (rc < 0) {
        goto err_leave;
    }
    v->psn   = random_psn();
    v->write = (struct ibv_send_wr){
        .sg_list = &v->sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE,
    };
    v->slot = (struct ibv_send_wr){
        .sg_list = &v->sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
    };
    *link_p = v;
    return RFM_OK;

err_leave:
    leave(v, side);
err_free:
    free_link(v);
    return rc;
}

/* --- what the other side has to know ---------------------------------------- */

void rfm_verbs_parcel_out(struct verbs_link *v, struct rfm_parcel *out)
{
    const struct verbs_side *side = (const struct verbs_side *)v->link.side;
    struct rfm_verbs_parcel body = {
        .version = RFM_VERBS_VERSION,
        .path    = side->dev.path,
        .mtu     = (uint8_t)side->dev.attr.active_mtu,
        .qp      = v->qp_number,
        .psn     = v->psn,
        .lid     = side->dev.attr.lid,
        .address = (uint64_t)(uintptr_t)v->ring,
        .bytes   = v->link.slots * v->stride,
        .rkey    = v->ring_mr->rkey,
    };

    memcpy(body.gid, side->dev.gid.raw, sizeof(body.gid));
    memcpy(out->bytes, &body, sizeof(body));
    out->n_bytes = sizeof(body);
}

static bool is_zero(const uint8_t *bytes, size_t n)
{
    uint8_t any = 0;

    for (size_t i = 0; i < n; i++) {
        any |= bytes[i];
    }
    return any == 0;
}

static bool makes_sense(const struct verbs_link *v,
                        const struct rfm_verbs_parcel *said)
{
    return (said->qp != 0) && (said->qp <= 0xffffffu) &&
           (said->psn <= 0xffffffu) && (said->mtu >= IBV_MTU_256) &&
           (said->mtu <= IBV_MTU_4096) && (said->lid <= 0xffffu) &&
           (said->reserved == 0) && (said->address != 0) &&
           (said->address % RFM_CACHE_LINE == 0) &&
           (said->bytes == v->link.slots * v->stride) &&
           (said->address <= UINT64_MAX - said->bytes) &&
           ((said->path == RFM_VERBS_INFINIBAND)
                ? (said->lid != 0) || !is_zero(said->gid, sizeof(said->gid))
                : !is_zero(said->gid, sizeof(said->gid)));
}

static int to_rtr(struct verbs_link *v, const struct verbs_side *side,
                  const struct rfm_verbs_parcel *said)
{
    enum ibv_mtu mine = side->dev.attr.active_mtu;
    struct ibv_qp_attr attr = {
        .qp_state    = IBV_QPS_RTR,
        .path_mtu    = (said->mtu < mine) ? (enum ibv_mtu)said->mtu : mine,
        .dest_qp_num = said->qp,
        .rq_psn      = said->psn,
        .ah_attr = {
            .dlid     = (uint16_t)said->lid,
            .port_num = side->dev.port,
        },
    };

    /* in a subnet of InfiniBand the LID does, unless there is a router */
    if ((said->path != RFM_VERBS_INFINIBAND) || (said->lid == 0) ||
        (memcmp(said->gid, side->dev.gid.raw, 8) != 0)) {
        attr.ah_attr.is_global      = 1;
        attr.ah_attr.grh.sgid_index = (uint8_t)side->dev.gid_index;
        attr.ah_attr.grh.hop_limit  = HOP_LIMIT;
        memcpy(attr.ah_attr.grh.dgid.raw, said->gid, sizeof(said->gid));
    }
    return ibv_modify_qp(v->qp, &attr,
                         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU |
                             IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                             IBV_QP_MAX_DEST_RD_ATOMIC |
                             IBV_QP_MIN_RNR_TIMER);
}

static int to_rts(struct verbs_link *v)
{
    struct ibv_qp_attr attr = {
        .qp_state  = IBV_QPS_RTS,
        .timeout   = ACK_TIMEOUT,
        .retry_cnt = RETRIES,
        .rnr_retry = 0,
        .sq_psn    = v->psn,
    };

    return ibv_modify_qp(v->qp, &attr,
                         IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                             IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                             IBV_QP_MAX_QP_RD_ATOMIC);
}

int rfm_verbs_connect(struct verbs_link *v, const struct rfm_parcel *in)
{
    struct verbs_side *side = (struct verbs_side *)v->link.side;
    struct rfm_verbs_parcel said;
    int rc;

    rfm_verbs_begin();
    if ((in->n_bytes != sizeof(said)) || (in->n_fds != 0)) {
        return rfm_verbs_fail(RFM_ERR_PROTOCOL,
                              "the other side's verbs parcel is %u bytes, not "
                              "%zu", in->n_bytes, sizeof(said));
    }
    memcpy(&said, in->bytes, sizeof(said));
    if (said.version != RFM_VERBS_VERSION) {
        return rfm_verbs_fail(RFM_ERR_PROTOCOL, "the other side speaks version "
                              "%u of verbs, we speak %u", said.version,
                              RFM_VERBS_VERSION);
    }
    if (said.path != side->dev.path) {
        return rfm_verbs_fail(RFM_ERR_NO_RESOURCE, "the other side's device is "
                              "of another kind of network than %s",
                              side->dev.name);
    }
    if (!makes_sense(v, &said)) {
        return rfm_verbs_fail(RFM_ERR_PROTOCOL,
                              "the other side's verbs parcel makes no sense");
    }
    v->peer_ring       = said.address;
    v->peer_key        = said.rkey;
    v->slot.wr.rdma.rkey = said.rkey;
    rc = to_rtr(v, side, &said);
    if (rc == 0) {
        v->connected = true;
        rc           = to_rts(v);
    }
    if (rc != 0) {
        return rfm_verbs_fail(RFM_ERR_SYSTEM, "%s can't connect a queue pair: "
                              "%s", side->dev.name, strerror(rc));
    }
    return RFM_OK;
}

/* --- arenas ----------------------------------------------------------------- */

struct verbs_arena *rfm_verbs_arena(struct verbs_link *v, uint32_t arena)
{
    for (uint32_t i = 0; i < v->n_arenas; i++) {
        if (v->arenas[i].arena == arena) {
            return &v->arenas[i];
        }
    }
    return NULL;
}

int rfm_verbs_arena_add(struct verbs_link *v, const struct verbs_arena *arena)
{
    struct verbs_arena *more;

    if (rfm_verbs_arena(v, arena->arena) != NULL) {
        return RFM_ERR_PROTOCOL;
    }
    more = realloc(v->arenas, (v->n_arenas + 1) * sizeof(*more));
    if (more == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    v->arenas           = more;
    more[v->n_arenas++] = *arena;
    return RFM_OK;
}

bool rfm_verbs_memory_in(const struct rfm_parcel *in, uint64_t bytes,
                         struct verbs_arena *arena)
{
    struct rfm_verbs_memory said;

    if ((in->n_bytes != sizeof(said)) || (in->n_fds != 0)) {
        return false;
    }
    memcpy(&said, in->bytes, sizeof(said));
    if ((said.address == 0) || (said.bytes != bytes) || (said.reserved != 0) ||
        (said.address > UINT64_MAX - said.bytes)) {
        return false;
    }
    arena->address = said.address;
    arena->rkey    = said.rkey;
    return true;
}

void rfm_verbs_memory_out(const struct ibv_mr *mr, struct rfm_parcel *out)
{
    struct rfm_verbs_memory body = {
        .address = (uint64_t)(uintptr_t)mr->addr,
        .bytes   = mr->length,
        .rkey    = mr->rkey,
    };

    memcpy(out->bytes, &body, sizeof(body));
    out->n_bytes = sizeof(body);
}

/* --- the end ---------------------------------------------------------------- */

/* the last thing in the send queue; also flushed if the queue pair is in error */
static bool post_last(struct verbs_link *v)
{
    struct ibv_send_wr *bad;
    struct ibv_send_wr last = {
        .wr_id      = verbs_wr_id(VERBS_LAST, v->index, 0),
        .opcode     = IBV_WR_RDMA_WRITE,
        .send_flags = IBV_SEND_SIGNALED,
    };

    last.wr.rdma.remote_addr = v->peer_ring;
    last.wr.rdma.rkey        = v->peer_key;
    return ibv_post_send(v->qp, &last, &bad) == 0;
}

static void await(struct verbs_link *v, bool flush, uint64_t ns)
{
    struct verbs_side *side = (struct verbs_side *)v->link.side;
    uint64_t deadline = rfm_now_ns() + ns;
    bool over = false;

    while (!over && (rfm_now_ns() < deadline)) {
        verbs_take_lock(&side->lock);
        (void)rfm_verbs_drain(side);
        over = v->last_seen && (!flush || (v->to_flush == 0));
        verbs_unlock(&side->lock);
        if (!over) {
            sched_yield();
        }
    }
}

/*
 * In the error state nothing is sent any more, and what comes is dropped; what
 * was posted is flushed. Then the queue pair goes, so that no hardware is left
 * that could write, whatever it may think.
 */
void rfm_verbs_fence(struct rfm_link *link)
{
    struct verbs_side *side = (struct verbs_side *)link->side;
    struct verbs_link *v = (struct verbs_link *)link;
    struct ibv_qp_attr attr = { .qp_state = IBV_QPS_ERR };
    bool before;
    bool last = false;

    verbs_take_lock(&v->send_lock);
    before    = v->fenced;
    rfm_store_release(&v->fenced, true);
    verbs_unlock(&v->send_lock);
    if (before) {
        return;
    }
    if (v->connected && !v->rank && (rfm_load_acquire(&link->failed) == 0)) {
        /* the last reply may still be in the queue */
        last = post_last(v);
        if (last) {
            await(v, false, FAREWELL_NS);
        }
    }
    if (v->connected && (ibv_modify_qp(v->qp, &attr, IBV_QP_STATE) == 0) &&
        (last || post_last(v))) {
        await(v, true, DRAIN_NS);
    }
    leave(v, side);
    (void)ibv_destroy_qp(v->qp);
    v->qp = NULL;
}

void rfm_verbs_link_close(struct rfm_link *link)
{
    rfm_verbs_fence(link);
    free_link((struct verbs_link *)link);
}

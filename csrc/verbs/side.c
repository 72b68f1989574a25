/*
 * What all links of a process share: the device, one completion queue, and at
 * the rank the registrations of its arenas.
 *
 * Whoever holds the side's lock takes completions for everybody. A sleeper
 * arms under the same lock, and looks once more: either he sees what came
 * before that, or whoever holds the lock does, having got it later; and what
 * comes afterwards makes the descriptor readable. So no wake-up is lost.
 */
#define _GNU_SOURCE
#include "verbs.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define POLL_AT_ONCE 16
#define FIRST_CQE    512u

/* --- making and ending ------------------------------------------------------ */

static int set_nonblocking(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    return ((flags >= 0) && (fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0))
               ? RFM_OK
               : RFM_ERR_SYSTEM;
}

/* one descriptor to sleep on: completions, and what happens to the device */
static int make_fd(struct verbs_side *side)
{
    int fds[3] = { side->events->fd, side->dev.ctx->async_fd, -1 };
    int fd;

    fds[2] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (fds[2] < 0) {
        return RFM_ERR_SYSTEM;
    }
    fd = epoll_create1(EPOLL_CLOEXEC);
    if (fd < 0) {
        close(fds[2]);
        return RFM_ERR_SYSTEM;
    }
    for (int i = 0; i < 3; i++) {
        struct epoll_event ev = { .events = EPOLLIN, .data.fd = fds[i] };

        if ((set_nonblocking(fds[i]) < 0) ||
            (epoll_ctl(fd, EPOLL_CTL_ADD, fds[i], &ev) != 0)) {
            close(fds[2]);
            close(fd);
            return RFM_ERR_SYSTEM;
        }
    }
    side->nudge_fd = fds[2];
    side->fd       = fd;
    return RFM_OK;
}

int rfm_verbs_side_open(const struct rfm_side_attr *attr,
                        struct rfm_side **side_p)
{
    struct verbs_side *side = aligned_alloc(
        RFM_CACHE_LINE, (sizeof(*side) + RFM_CACHE_LINE - 1) &
                            ~(size_t)(RFM_CACHE_LINE - 1));
    int rc;

    if (side == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    memset(side, 0, sizeof(*side));
    side->side.ops = &rfm_verbs;
    side->rank     = attr->rank;
    rc = rfm_verbs_open(attr->device, &side->dev);
    if (rc < 0) {
        goto err_free;
    }
    side->pd = ibv_alloc_pd(side->dev.ctx);
    if (side->pd == NULL) {
        rc = rfm_verbs_fail(RFM_ERR_NO_RESOURCE,
                            "%s has no protection domain left: %s",
                            side->dev.name, strerror(errno));
        goto err_device;
    }
    side->events = ibv_create_comp_channel(side->dev.ctx);
    if (side->events == NULL) {
        rc = rfm_verbs_fail(RFM_ERR_NO_RESOURCE,
                            "%s has no completion channel left: %s",
                            side->dev.name, strerror(errno));
        goto err_pd;
    }
    side->cq = ibv_create_cq(side->dev.ctx, FIRST_CQE, NULL, side->events, 0);
    if (side->cq == NULL) {
        rc = rfm_verbs_no_memory(FIRST_CQE * 64ull);
        goto err_events;
    }
    rc = make_fd(side);
    if (rc < 0) {
        goto err_cq;
    }
    pthread_mutex_init(&side->arenas_lock, NULL);
    *side_p = &side->side;
    return RFM_OK;

err_cq:
    (void)ibv_destroy_cq(side->cq);
err_events:
    (void)ibv_destroy_comp_channel(side->events);
err_pd:
    (void)ibv_dealloc_pd(side->pd);
err_device:
    rfm_verbs_close(&side->dev);
err_free:
    free(side);
    return rc;
}

static bool take_wakeups(struct verbs_side *side);

static void free_dropped(struct verbs_side *side)
{
    for (uint32_t i = 0; i < side->n_dropped; i++) {
        (void)ibv_dereg_mr(side->dropped[i]);
    }
    side->n_dropped = 0;
}

void rfm_verbs_side_close(struct rfm_side *base)
{
    struct verbs_side *side = (struct verbs_side *)base;

    (void)take_wakeups(side);
    for (uint32_t i = 0; i < side->n_arenas; i++) {
        (void)ibv_dereg_mr(side->arenas[i].mr);
    }
    free_dropped(side);
    free(side->arenas);
    free(side->dropped);
    close(side->fd);
    close(side->nudge_fd);
    (void)ibv_destroy_cq(side->cq);
    (void)ibv_destroy_comp_channel(side->events);
    (void)ibv_dealloc_pd(side->pd);
    rfm_verbs_close(&side->dev);
    pthread_mutex_destroy(&side->arenas_lock);
    free(side);
}

/* --- completions ------------------------------------------------------------ */

int rfm_verbs_cq_reserve(struct verbs_side *side, uint32_t entries)
{
    uint32_t need = side->cq_used + entries;
    uint32_t have = (uint32_t)side->cq->cqe;
    uint32_t most = (uint32_t)side->dev.limits.max_cqe;

    if (need > have) {
        uint32_t want = (need < most / 2) ? need * 2 : most;

        if ((need > most) || (ibv_resize_cq(side->cq, (int)want) != 0)) {
            return rfm_verbs_fail(
                RFM_ERR_NO_RESOURCE,
                "%s can't keep track of one more connection: its completion "
                "queue has %u entries, and %u are needed",
                side->dev.name, have, need);
        }
    }
    side->cq_used = need;
    return RFM_OK;
}

static void fail_flushed(struct verbs_side *side)
{
    for (uint32_t i = 0; i < side->n_links; i++) {
        struct verbs_link *v = side->links[i];

        if ((v != NULL) && v->flushed && !rfm_load_acquire(&v->fenced)) {
            rfm_link_fail(&v->link, RFM_ERR_PEER, "the queue pair was flushed");
        }
    }
}

int rfm_verbs_drain(struct verbs_side *side)
{
    struct ibv_wc wc[POLL_AT_ONCE];
    int ready = 0;
    int n;

    do {
        n = ibv_poll_cq(side->cq, POLL_AT_ONCE, wc);
        for (int i = 0; i < n; i++) {
            uint32_t index = (uint32_t)(wc[i].wr_id >> 32) & 0xffffu;
            struct verbs_link *v = (index < RFM_VERBS_LINKS)
                                       ? side->links[index]
                                       : NULL;

            /* of a queue pair that is no more: some providers leave them */
            if ((v == NULL) || (v->qp_number != wc[i].qp_num)) {
                continue;
            }
            ready += rfm_verbs_completed(v, &wc[i]);
        }
    } while (n == POLL_AT_ONCE);
    if (__builtin_expect(side->flushed, 0)) {
        side->flushed = false;
        fail_flushed(side);
    }
    if (__builtin_expect(n < 0, 0)) {
        for (uint32_t i = 0; i < side->n_links; i++) {
            if (side->links[i] != NULL) {
                rfm_link_fail(&side->links[i]->link, RFM_ERR_SYSTEM,
                              "the completion queue failed");
            }
        }
    }
    return ready;
}

int rfm_verbs_side_progress(struct rfm_side *base)
{
    struct verbs_side *side = (struct verbs_side *)base;
    int ready;

    if (!verbs_try_lock(&side->lock)) {
        return RFM_ERR_BUSY;
    }
    ready = rfm_verbs_drain(side);
    verbs_unlock(&side->lock);
    return ready;
}

/* --- sleeping --------------------------------------------------------------- */

int rfm_verbs_side_fd(struct rfm_side *side)
{
    return ((struct verbs_side *)side)->fd;
}

/* Requests and replies are solicited, what was sent is not; errors always. Who
 * armed when nothing waited for room is nudged when something does. With the
 * lock held. */
static void arm(struct verbs_side *side)
{
    bool room = false;

    for (uint32_t i = 0; side->rank && (i < side->n_links); i++) {
        struct verbs_link *v = side->links[i];

        room = room || ((v != NULL) && (rfm_load_acquire(&v->queue_head) !=
                                        rfm_load_acquire(&v->queue_tail)));
    }
    (void)ibv_req_notify_cq(side->cq, room ? 0 : 1);
}

void rfm_verbs_side_arm(struct rfm_side *base)
{
    struct verbs_side *side = (struct verbs_side *)base;

    verbs_take_lock(&side->lock);
    side->arms++;
    arm(side);
    verbs_unlock(&side->lock);
}

void rfm_verbs_nudge(struct verbs_side *side)
{
    uint64_t one = 1;

    if (write(side->nudge_fd, &one, sizeof(one)) < 0) {
        return;                 /* full: it is readable already */
    }
}

static void fail_all(struct verbs_side *side, const char *text)
{
    for (uint32_t i = 0; i < side->n_links; i++) {
        if (side->links[i] != NULL) {
            rfm_link_fail(&side->links[i]->link, RFM_ERR_PEER, text);
        }
    }
}

static void fail_one(struct verbs_side *side, const struct ibv_qp *qp,
                     const char *text)
{
    for (uint32_t i = 0; i < side->n_links; i++) {
        if ((side->links[i] != NULL) && (side->links[i]->qp == qp)) {
            rfm_link_fail(&side->links[i]->link, RFM_ERR_PEER, text);
        }
    }
}

static void take_event(struct verbs_side *side, const struct ibv_async_event *ev)
{
    switch (ev->event_type) {
    case IBV_EVENT_PORT_ERR:
        if (ev->element.port_num == side->dev.port) {
            fail_all(side, "the port of the RDMA device went down");
        }
        break;
    case IBV_EVENT_DEVICE_FATAL:
        fail_all(side, "the RDMA device failed");
        break;
    case IBV_EVENT_CQ_ERR:
        fail_all(side, "the completion queue overran");
        break;
    case IBV_EVENT_QP_FATAL:
        fail_one(side, ev->element.qp, "the queue pair failed");
        break;
    case IBV_EVENT_QP_REQ_ERR:
        fail_one(side, ev->element.qp, "the other side sent what no queue pair "
                                       "understands");
        break;
    case IBV_EVENT_QP_ACCESS_ERR:
        fail_one(side, ev->element.qp, "the other side wrote where it may not");
        break;
    default:
        break;
    }
}

static bool take_completion_event(struct verbs_side *side)
{
    struct ibv_cq *cq;
    void *context;

    if (ibv_get_cq_event(side->events, &cq, &context) != 0) {
        return false;
    }
    ibv_ack_cq_events(cq, 1);
    return true;
}

/* Takes what made it readable; true if there was something. */
static bool take_wakeups(struct verbs_side *side)
{
    struct epoll_event ready[3];
    struct ibv_async_event ev;
    uint64_t count;
    int n = epoll_wait(side->fd, ready, 3, 0);

    for (int i = 0; i < n; i++) {
        if (ready[i].data.fd == side->nudge_fd) {
            if (read(side->nudge_fd, &count, sizeof(count)) < 0) {
                count = 0;      /* somebody else was quicker */
            }
            continue;
        }
        if (ready[i].data.fd == side->events->fd) {
            while (take_completion_event(side)) {
            }
            continue;
        }
        /* under the lock no queue pair is destroyed, which waits for what was
         * got and not acknowledged */
        verbs_take_lock(&side->lock);
        while (ibv_get_async_event(side->dev.ctx, &ev) == 0) {
            take_event(side, &ev);
            ibv_ack_async_event(&ev);
        }
        verbs_unlock(&side->lock);
    }
    return n > 0;
}

/* A wake-up is for all who sleep, and only one of them takes it. He looks
 * afterwards, and the others need another one. The lock is taken in any case: a
 * poller that he then finds at work has seen what there was to see. */
void rfm_verbs_side_woken(struct rfm_side *base)
{
    struct verbs_side *side = (struct verbs_side *)base;
    /* Nearly always it is a completion; what else there is leaves the descriptor
     * readable, for the next one who sleeps on it. */
    bool taken = take_completion_event(side) || take_wakeups(side);

    verbs_take_lock(&side->lock);
    side->arms--;
    if (taken && (side->arms > 0)) {
        arm(side);
    }
    verbs_unlock(&side->lock);
}

/* --- the rank's arenas ------------------------------------------------------ */

/* arenas_lock held */
static struct verbs_arena *find_arena(struct verbs_side *side, uint32_t arena)
{
    for (uint32_t i = 0; i < side->n_arenas; i++) {
        if (side->arenas[i].arena == arena) {
            return &side->arenas[i];
        }
    }
    return NULL;
}

/* True once nothing that was sent may still be read from an arena's memory: a
 * reply came, so it has arrived, but its acknowledgement may be under way. */
static bool all_arrived(struct verbs_side *side)
{
    bool all = true;

    verbs_take_lock(&side->lock);
    if (rfm_verbs_drain(side) > 0) {
        rfm_verbs_nudge(side);  /* it is none of ours, and who waits may have looked */
    }
    for (uint32_t i = 0; i < side->n_links; i++) {
        struct verbs_link *v = side->links[i];

        if (v != NULL) {
            verbs_take_lock(&v->send_lock);
            all = all && (v->fenced || (rfm_load_acquire(&v->done) >= v->mapped));
            rfm_verbs_let_go(v);
        }
    }
    verbs_unlock(&side->lock);
    return all;
}

static int register_arena(struct verbs_side *side, uint32_t arena,
                          uint8_t *base, uint64_t bytes,
                          struct verbs_arena **arena_p)
{
    struct verbs_arena *more;
    struct ibv_mr *mr;

    more = realloc(side->arenas, (side->n_arenas + 1) * sizeof(*more));
    if (more == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    side->arenas = more;
    mr = ibv_reg_mr(side->pd, base, bytes,
                    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    if (mr == NULL) {
        return rfm_verbs_no_memory(bytes);
    }
    *arena_p  = &more[side->n_arenas++];
    **arena_p = (struct verbs_arena){
        .arena = arena,
        .lkey  = mr->lkey,
        .base  = base,
        .bytes = bytes,
        .mr    = mr,
    };
    return RFM_OK;
}

int rfm_verbs_side_arena(struct rfm_side *base, uint32_t arena, uint8_t *at,
                         uint64_t bytes, struct rfm_parcel *out)
{
    struct verbs_side *side = (struct verbs_side *)base;
    struct verbs_arena *found;
    int rc = RFM_OK;

    rfm_verbs_begin();
    pthread_mutex_lock(&side->arenas_lock);
    if ((side->n_dropped != 0) && all_arrived(side)) {
        free_dropped(side);
    }
    found = find_arena(side, arena);
    if (found == NULL) {
        rc = register_arena(side, arena, at, bytes, &found);
    }
    if (rc == RFM_OK) {
        rfm_verbs_memory_out(found->mr, out);
    }
    pthread_mutex_unlock(&side->arenas_lock);
    return rc;
}

void rfm_verbs_side_arena_drop(struct rfm_side *base, uint32_t arena)
{
    struct verbs_side *side = (struct verbs_side *)base;
    struct verbs_arena *found;

    pthread_mutex_lock(&side->arenas_lock);
    verbs_take_lock(&side->lock);
    for (uint32_t i = 0; i < side->n_links; i++) {
        struct verbs_link *v = side->links[i];
        struct verbs_arena *known;

        if (v != NULL) {
            verbs_take_lock(&v->send_lock);
            known = rfm_verbs_arena(v, arena);
            if (known != NULL) {
                *known = v->arenas[--v->n_arenas];
            }
            rfm_verbs_let_go(v);
        }
    }
    verbs_unlock(&side->lock);
    found = find_arena(side, arena);
    if (found != NULL) {
        struct ibv_mr *mr = found->mr;
        struct ibv_mr **more;

        *found = side->arenas[--side->n_arenas];
        more   = realloc(side->dropped, (side->n_dropped + 1) * sizeof(*more));
        if (more != NULL) {
            side->dropped = more;
            more[side->n_dropped++] = mr;
        } else {
            (void)ibv_dereg_mr(mr);     /* at worst a link fails */
        }
    }
    if (all_arrived(side)) {
        free_dropped(side);
    }
    pthread_mutex_unlock(&side->arenas_lock);
}

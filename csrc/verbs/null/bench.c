/*
 * What the verbs transport itself costs: invocations over the device that is
 * none, both sides in one thread, beside the bare work requests that they take.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../verbs.h"
#include "provider.h"

#define SLOTS      8u
#define SLOT_BYTES 4096u

struct pair {
    struct rfm_side *rank_side;
    struct rfm_side *worker_side;
    struct rfm_link *rank;
    struct rfm_link *worker;
};

static void close_pair(struct pair *p)
{
    if (p->worker != NULL) {
        rfm_verbs.worker_close(p->worker);
    }
    if (p->rank != NULL) {
        rfm_verbs.rank_close(p->rank);
    }
    if (p->worker_side != NULL) {
        rfm_verbs.side_close(p->worker_side);
    }
    if (p->rank_side != NULL) {
        rfm_verbs.side_close(p->rank_side);
    }
}

static int open_pair(struct pair *p)
{
    struct rfm_side_attr rank = { .rank = true };
    struct rfm_side_attr worker = { .rank = false };
    struct rfm_link_attr attr = { .slots = SLOTS, .slot_bytes = SLOT_BYTES,
                                  .data_fd = -1 };
    struct rfm_ctl_attach body;
    struct rfm_parcel there = { 0 };
    struct rfm_parcel back = { 0 };
    int rc;

    memset(p, 0, sizeof(*p));
    rc = rfm_verbs.side_open(&rank, &p->rank_side);
    if (rc == RFM_OK) {
        rc = rfm_verbs.side_open(&worker, &p->worker_side);
    }
    attr.side = p->rank_side;
    if (rc == RFM_OK) {
        rc = rfm_verbs.rank_open(&attr, &p->rank, &body, &there);
    }
    attr.side = p->worker_side;
    if (rc == RFM_OK) {
        rc = rfm_verbs.worker_open(&attr, &body, &there, &p->worker, &back);
    }
    if (rc == RFM_OK) {
        rc = rfm_verbs.rank_attached(p->rank, &back);
    }
    if (rc < 0) {
        close_pair(p);
    }
    return rc;
}

/* ns per invocation that does nothing, or what went wrong */
static double time_calls(struct pair *p, uint64_t count, uint64_t bytes)
{
    static const struct rfm_traffic nothing;
    struct rfm_request_line request = { .in_bytes = bytes };
    struct rfm_reply_line reply = { 0 };
    struct rfm_request_line asked;
    struct rfm_reply_line answered;
    const uint8_t *payload;
    uint64_t behind = (bytes > RFM_INLINE_BYTES) ? bytes : 0;
    uint64_t start = rfm_now_ns();
    uint64_t last[SLOTS] = { 0 };

    for (uint64_t i = 0; i < count; i++) {
        uint32_t slot = i % SLOTS;

        request.id = i + 1;
        rfm_verbs.rank_ready(p->rank, slot);
        (void)rfm_verbs.rank_post(p->rank, slot, &request, &nothing);
        (void)rfm_verbs.side_progress(p->worker_side);
        if (!rfm_verbs.worker_poll(p->worker, slot, last[slot], &asked,
                                   &payload)) {
            return RFM_ERR_PROTOCOL;
        }
        last[slot] = asked.id;
        reply.id   = asked.id;
        rfm_verbs.worker_reply(p->worker, slot, &reply, behind, NULL, 0);
        (void)rfm_verbs.side_progress(p->rank_side);
        if (!rfm_verbs.rank_poll(p->rank, slot, i + 1, &answered, &payload)) {
            return RFM_ERR_PROTOCOL;
        }
    }
    return (double)(rfm_now_ns() - start) / (double)count;
}

/* the same work requests, on the same queue pairs, and nothing else */
static double time_raw(struct pair *p, uint64_t count, uint64_t bytes)
{
    struct verbs_link *ends[2] = { (struct verbs_link *)p->rank,
                                   (struct verbs_link *)p->worker };
    uint64_t length = RFM_CACHE_LINE +
                      ((bytes > RFM_INLINE_BYTES) ? bytes : 0);
    uint64_t start = rfm_now_ns();
    uint32_t sent = 0;

    for (uint64_t i = 0; i < count; i++) {
        sent++;
        for (int from = 0; from < 2; from++) {
            struct verbs_link *v = ends[from];
            struct verbs_link *to = ends[1 - from];
            struct ibv_sge sge = {
                .addr   = (uint64_t)(uintptr_t)v->stage,
                .length = (uint32_t)length,
                .lkey   = v->stage_mr->lkey,
            };
            struct ibv_send_wr wr = {
                .sg_list    = &sge,
                .num_sge    = 1,
                .opcode     = IBV_WR_RDMA_WRITE_WITH_IMM,
                .send_flags = IBV_SEND_SOLICITED |
                              ((length <= v->inline_bytes) ? IBV_SEND_INLINE : 0) |
                              ((sent % v->interval == 0) ? IBV_SEND_SIGNALED : 0),
            };
            struct ibv_send_wr *bad_send;
            struct ibv_recv_wr *bad_recv;
            struct ibv_wc wc[2];
            bool came = false;

            wr.wr.rdma.remote_addr = v->peer_ring;
            wr.wr.rdma.rkey        = v->peer_key;
            if (ibv_post_send(v->qp, &wr, &bad_send) != 0) {
                return RFM_ERR_SYSTEM;
            }
            while (!came) {
                int n = ibv_poll_cq(to->qp->recv_cq, 2, wc);

                for (int k = 0; k < n; k++) {
                    if (wc[k].status != IBV_WC_SUCCESS) {
                        return RFM_ERR_PEER;
                    }
                    came = came || (wc[k].opcode == IBV_WC_RECV_RDMA_WITH_IMM);
                }
            }
            if ((sent % to->batch == 0) &&
                (ibv_post_recv(to->qp, to->recvs, &bad_recv) != 0)) {
                return RFM_ERR_SYSTEM;
            }
        }
    }
    return (double)(rfm_now_ns() - start) / (double)count;
}

int rfm_null_bench(uint64_t count, uint64_t bytes, double *call_ns_p,
                   double *raw_ns_p)
{
    struct pair p;
    double call;
    double raw;
    int rc;

    if (bytes > SLOT_BYTES) {
        return RFM_ERR_TOO_LARGE;
    }
    rfm_null_alone(true);
    rc = open_pair(&p);
    if (rc < 0) {
        goto out;
    }
    call = time_calls(&p, count, bytes);
    close_pair(&p);
    rc = (call < 0) ? (int)call : open_pair(&p);
    if (rc < 0) {
        goto out;
    }
    raw = time_raw(&p, count, bytes);
    close_pair(&p);
    rc = (raw < 0) ? (int)raw : RFM_OK;
    if (rc == RFM_OK) {
        *call_ns_p = call;
        *raw_ns_p  = raw;
    }
out:
    rfm_null_alone(false);
    return rc;
}

/*
 * rfm_bench_net.h: what a transport over a network is compared with: two bare
 * processes that send the same bytes through a socket, and nothing of the
 * product between them.
 *
 *   caller                                 partner (a pinned process of its own)
 *   ──────                                 ─────────────────────────────────────
 *   arm(order) ───── futex ──────────────▶ wakes, serves order.count calls
 *   call: `burst` messages of order.up ──▶ receives each, and answers each with
 *         `burst` messages of order.down ◀ a message of order.down
 *
 * A message is RFM_NET_HEAD bytes and its data, sent and received by one system
 * call as long as the socket takes it. Both sides spin on the socket, or sleep
 * in it (order.sleep). The caller's data lies in memory as an executor's, the
 * partner's as a mirror of it. Between two blocks the partner sleeps in the
 * kernel.
 *
 * One thread uses a net at a time. Nothing here is linked into the product.
 */
#ifndef RFM_BENCH_NET_H
#define RFM_BENCH_NET_H

#include <stdint.h>

#include "rfm_wire.h"

/* of every message: a stream's head and a slot's line */
#define RFM_NET_HEAD \
    (sizeof(struct rfm_stream_head) + sizeof(struct rfm_request_line))
/* of a message with data, more: where it belongs */
#define RFM_NET_DESC sizeof(struct rfm_desc)

struct rfm_net;

struct rfm_net_order {
    uint64_t count;             /* calls */
    uint64_t up;                /* bytes of data of a message to the partner */
    uint64_t down;              /* the other way */
    uint32_t burst;             /* messages of a call, 1 to RFM_NET_BURST */
    uint32_t places;            /* in memory that the messages have in turn */
    uint32_t sleep;             /* 0: both sides spin */
    uint32_t reserved;
};

#define RFM_NET_BURST 64u

/*
 * Forks the partner, with room for data_bytes each way, joined by a TCP
 * connection through this node's own address. cpu < 0 leaves its affinity as
 * it is. Results of all of these are those of rfm_bench.h.
 */
int  rfm_net_open(uint64_t data_bytes, int cpu, struct rfm_net **net_p);
void rfm_net_close(struct rfm_net *net);
int  rfm_net_pid(const struct rfm_net *net);
int  rfm_net_arm(struct rfm_net *net, const struct rfm_net_order *order);

/* As rfm_bench_calls. */
int64_t rfm_net_calls(struct rfm_net *net, uint64_t count, int64_t *samples);

/* Takes its input and gives nothing back; gives its output and takes nothing:
 * what is left is the way of the data. */
struct rfm_call;
int32_t rfm_net_swallow(const struct rfm_call *call);
int32_t rfm_net_yield(const struct rfm_call *call);

#endif

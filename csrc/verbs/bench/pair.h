/*
 * What verbs is compared with: two bare processes joined by a queue pair, which
 * write the same bytes, and nothing of the product between them.
 *
 *   caller                                 partner (a pinned process of its own)
 *   ──────                                 ─────────────────────────────────────
 *   arm(order) ───── futex ──────────────▶ wakes, serves order.count calls
 *   call: `burst` messages of order.up ──▶ receives each, and answers each with
 *         `burst` messages of order.down ◀ a message of order.down
 *
 * A message is its data, in plain writes, and then one write with immediate of
 * a slot's line, inline as far as the queue pair grants it. Both sides poll the
 * completion queue, or sleep on its channel (order.sleep). One of 32 sends is
 * signalled, and receives are posted 32 at a time; sends have a completion queue
 * of their own, which is looked at when the send queue is full only. Each side
 * waits for nothing but the other's messages.
 *
 * The device is chosen as the product does. The caller's data lies in memory as
 * an executor's, the partner's as a mirror of it. One thread uses a pair at a
 * time; another one sleeps until the partner ends, and then ends its waiting.
 */
#ifndef RFM_VERBS_BENCH_PAIR_H
#define RFM_VERBS_BENCH_PAIR_H

#include "../../rfm_bench_net.h"

struct rfm_pair;

/*
 * Forks the partner, with room for data_bytes each way. The caller must not
 * have opened a device before. device: as RFAAS_DEVICE, which holds if it
 * is NULL or empty. cpu < 0 leaves the partner's affinity as it is. Results of
 * all of these are those of rfm_bench.h, orders those of rfm_net_arm().
 */
int  rfm_pair_open(const char *device, uint64_t data_bytes, int cpu,
                   struct rfm_pair **pair_p);
void rfm_pair_close(struct rfm_pair *pair);
int  rfm_pair_pid(const struct rfm_pair *pair);
int  rfm_pair_arm(struct rfm_pair *pair, const struct rfm_net_order *order);
/* why there is none, for people; NULL if only errno says it */
const char *rfm_pair_why(void);

/* As rfm_bench_calls. */
int64_t rfm_pair_calls(struct rfm_pair *pair, uint64_t count, int64_t *samples);

#endif

/*
 * rfm_bench.h: what the data plane is compared with: two bare processes and
 * nothing of the product between them.
 *
 * A partner process is forked; it shares one mapping with the caller:
 *
 *   caller                         partner (a pinned process of its own)
 *   ──────                         ─────────────────────────────────────
 *   arm(mode, count) ── futex ───▶ wakes, serves `count` calls hot, sleeps
 *   call: to   = {seq, data} ────▶ spins (or sleeps, mode FUTEX) on to.seq
 *         from = {seq, data} ◀──── answers; in mode DOUBLE y = 2x comes first
 *
 * Between two blocks the partner sleeps in the kernel, so that it takes no
 * time from the worker that is measured on the same core.
 *
 * One thread uses a bench at a time. Nothing here is linked into the product.
 */
#ifndef RFM_BENCH_H
#define RFM_BENCH_H

#include <stddef.h>
#include <stdint.h>

#include "rfm_call.h"

enum rfm_bench_mode {
    RFM_BENCH_MAILBOX = 1, /* answers at once                       */
    RFM_BENCH_DOUBLE  = 2, /* applies y = 2x to the shared data     */
    RFM_BENCH_FUTEX   = 3, /* sleeps before each call, answers then */
};

/* Negative results of every function below. */
enum rfm_bench_status {
    RFM_BENCH_OK       = 0,
    RFM_BENCH_INVALID  = -1, /* an argument is out of range             */
    RFM_BENCH_SYSTEM   = -2, /* a system call failed, errno says why    */
    RFM_BENCH_LOST     = -3, /* the partner has ended                   */
    RFM_BENCH_WRONG    = -4, /* the answer was not what the call sent   */
};

struct rfm_bench;

/*
 * Forks the partner with room for `data_bytes` of each of x and y: a sealed
 * memfd that each side maps with all pages present, as arenas are. cpu < 0
 * leaves the partner's affinity as it is.
 */
int rfm_bench_open(uint64_t data_bytes, int cpu, struct rfm_bench **bench_p);

/* Ends the partner and waits for it. NULL is allowed. */
void rfm_bench_close(struct rfm_bench *bench);

int   rfm_bench_pid(const struct rfm_bench *bench);

/*
 * Where x lies, and y behind an x of `bytes`, as two blocks in an arena would;
 * NULL without data, or where it is larger than the room.
 */
void *rfm_bench_x(const struct rfm_bench *bench);
void *rfm_bench_y(const struct rfm_bench *bench, uint64_t bytes);

/* The next `count` calls are served in `mode`, on the first `bytes` of x. */
int rfm_bench_arm(struct rfm_bench *bench, int mode, uint64_t count,
                  uint64_t bytes);

/* One armed call: ns from the first store to the answer seen, or < 0. */
int64_t rfm_bench_call(struct rfm_bench *bench);

/*
 * `count` armed calls one after another: ns of all of them together, or < 0.
 * Where samples is not NULL it receives the ns of each call, timed one by one;
 * the total is then their sum.
 */
int64_t rfm_bench_calls(struct rfm_bench *bench, uint64_t count,
                        int64_t *samples);

/*
 * The same with x and y of the caller's own, of the armed size: each call
 * begins with a copy of x into the shared memory and ends with one of y out of
 * it. Either may be NULL: nothing is copied then.
 */
int64_t rfm_bench_copied_calls(struct rfm_bench *bench, const void *x, void *y,
                               uint64_t count, int64_t *samples);

/* The kernels that are measured; the same machine code at both ends. */
int32_t rfm_bench_copy(const struct rfm_call *call);   /* out = in, bytes   */
int32_t rfm_bench_double(const struct rfm_call *call); /* y = 2x, float64   */
/* rounds of y = y / 2 + 1 for each float64; the second input says how many */
int32_t rfm_bench_iterate(const struct rfm_call *call);

/* y = 2x called in place, in the caller: what a rank does without a worker. */
int rfm_bench_local(const double *x, double *y, uint64_t count);

/* Spends `ns` on the caller's core without a system call. */
void rfm_bench_busy(int64_t ns);

/* What reading the clock twice costs: the floor of a figure of one call. */
int64_t rfm_bench_clock_ns(void);

#endif

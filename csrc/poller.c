/* Sleeping and waking on a door, and a cheap clock for short intervals. */
#define _GNU_SOURCE
#include "poller.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

static double ns_per_tick = 1.0;
static pthread_once_t ticks_once = PTHREAD_ONCE_INIT;

static void measure_ticks(void)
{
#if defined(__x86_64__) || defined(__aarch64__)
    double best = 0.0;

    /* the shortest of three windows was disturbed least */
    for (int i = 0; i < 3; i++) {
        uint64_t t0 = rfm_now_ns();
        uint64_t c0 = rfm_ticks();
        uint64_t t1;
        uint64_t c1;

        do {
            t1 = rfm_now_ns();
        } while (t1 - t0 < 150000ull);
        c1 = rfm_ticks();
        if (c1 > c0) {
            double rate = (double)(t1 - t0) / (double)(c1 - c0);

            if ((best == 0.0) || (rate < best)) {
                best = rate;
            }
        }
    }
    if (best > 0.0) {
        ns_per_tick = best;
    }
#endif
}

void rfm_ticks_init(void)
{
    pthread_once(&ticks_once, measure_ticks);
}

uint64_t rfm_ticks_to_ns(uint64_t ticks)
{
    return (uint64_t)((double)ticks * ns_per_tick);
}

uint64_t rfm_ns_to_ticks(uint64_t ns)
{
    return (uint64_t)((double)ns / ns_per_tick);
}

void rfm_door_ring(struct rfm_door *door)
{
    (void)__atomic_fetch_add(&door->word, 1, __ATOMIC_SEQ_CST);
    (void)syscall(SYS_futex, &door->word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

int rfm_door_sleep(struct rfm_door *door, uint32_t word, uint64_t timeout_ns)
{
    struct timespec ts;
    struct timespec *tsp = NULL;

    if (timeout_ns != UINT64_MAX) {
        ts.tv_sec  = (time_t)(timeout_ns / 1000000000ull);
        ts.tv_nsec = (long)(timeout_ns % 1000000000ull);
        tsp        = &ts;
    }
    if (syscall(SYS_futex, &door->word, FUTEX_WAIT, word, tsp, NULL, 0) == 0) {
        return 0;
    }
    switch (errno) {
    case EINTR:
        return -EINTR;
    case ETIMEDOUT:
        return -ETIMEDOUT;
    default:
        return 0;           /* the word had moved on */
    }
}

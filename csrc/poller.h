/*
 * Waiting: spin first, then arm and sleep. Both sides do it alike.
 *
 *   sleeper                          poster
 *   v = word                         publish
 *   sleepers += 1     (seq_cst)      fence   (seq_cst)
 *   look again: nothing              sleepers != 0 ?
 *   futex_wait(word, v)              word += 1; futex_wake(word)
 *
 * Either the poster sees the sleeper, or the sleeper's second look sees what
 * was posted: a wake-up is never lost.
 */
#ifndef RFM_POLLER_H
#define RFM_POLLER_H

#include <stdint.h>
#include <time.h>

#include "rfm_wire.h"

static inline void rfm_spin_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield" ::: "memory");
#endif
}

static inline uint64_t rfm_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ((uint64_t)ts.tv_sec * 1000000000ull) + (uint64_t)ts.tv_nsec;
}

/* A cheap counter for short intervals; rfm_ticks_to_ns() converts. */
static inline uint64_t rfm_ticks(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t v;

    __asm__ __volatile__("mrs %0, cntvct_el0" : "=r"(v));
    return v;
#else
    return rfm_now_ns();
#endif
}

/* Measures the counter's rate once (about 0.5 ms); safe from any thread. */
void rfm_ticks_init(void);
uint64_t rfm_ticks_to_ns(uint64_t ticks);
uint64_t rfm_ns_to_ticks(uint64_t ns);

#define rfm_load_acquire(p)      __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define rfm_load_relaxed(p)      __atomic_load_n((p), __ATOMIC_RELAXED)
#define rfm_store_release(p, v)  __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define rfm_store_relaxed(p, v)  __atomic_store_n((p), (v), __ATOMIC_RELAXED)

/*
 * ThreadSanitizer does not model fences; an atomic read-modify-write of a
 * private word orders just as well there.
 */
static inline void rfm_fence(void)
{
#if defined(__SANITIZE_THREAD__)
    static uint32_t word;

    (void)__atomic_fetch_add(&word, 1, __ATOMIC_SEQ_CST);
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* Wakes everybody who sleeps on the door; call it after a fence. */
void rfm_door_ring(struct rfm_door *door);

static inline void rfm_door_knock(struct rfm_door *door)
{
    rfm_fence();
    if (__builtin_expect(rfm_load_relaxed(&door->sleepers) != 0, 0)) {
        rfm_door_ring(door);
    }
}

/* Before the second look: returns the word to sleep on. */
static inline uint32_t rfm_door_arm(struct rfm_door *door)
{
    uint32_t word = rfm_load_acquire(&door->word);

    (void)__atomic_fetch_add(&door->sleepers, 1, __ATOMIC_SEQ_CST);
    rfm_fence();
    return word;
}

static inline void rfm_door_disarm(struct rfm_door *door)
{
    (void)__atomic_fetch_sub(&door->sleepers, 1, __ATOMIC_SEQ_CST);
}

/* Sleeps until rung, a signal or the time-out. 0, or -EINTR, -ETIMEDOUT. */
int rfm_door_sleep(struct rfm_door *door, uint32_t word, uint64_t timeout_ns);

#endif

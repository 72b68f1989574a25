/* Any thread may start, test and wait: every invocation ends once, with its
 * own result, and the queue never waits for anybody in particular.
 * Run over every transport. */
#define _GNU_SOURCE
#include "harness.h"

#include <pthread.h>
#include <sched.h>

#include "poller.h"

static struct t_worker workers[2];
static struct rfm_invoker *inv;

static void up(uint32_t n, bool thread, uint32_t slots, uint32_t spin_us)
{
    for (uint32_t i = 0; i < n; i++) {
        t_worker_start(&workers[i], thread, spin_us);
    }
    inv = t_invoker(slots, T_SLOT_BYTES, spin_us);
    for (uint32_t i = 0; i < n; i++) {
        (void)t_worker_attach(&workers[i], inv);
    }
}

static void down(uint32_t n)
{
    CHECK_EQ(rfm_invoker_queued(inv), 0);
    CHECK_EQ(rfm_invoker_in_flight(inv), 0);
    t_invoker_end(inv);
    for (uint32_t i = 0; i < n; i++) {
        t_worker_end(&workers[i]);
    }
}

/* --- more requests than slots --------------------------------------------- */

#define MANY 256

static struct t_call many[MANY];

static void make_many(void)
{
    for (uint32_t i = 0; i < MANY; i++) {
        uint32_t places[2] = { i % 3, (i / 3) % 3 };
        uint64_t sizes[2] = { 8 + i, 8 + i };

        t_call_make(&many[i], inv, "echo", 1, 1, places, sizes);
    }
}

static void start_many(uint64_t round)
{
    for (uint32_t i = 0; i < MANY; i++) {
        t_fill(t_in(&many[i], 0), 8 + i, round * MANY + i);
        memset(t_out(&many[i], 0), 0xcc, 8 + i);
        t_start(&many[i]);
    }
}

static void check_many(uint64_t round)
{
    for (uint32_t i = 0; i < MANY; i++) {
        CHECK_EQ(many[i].req.outcome, RFM_DONE);
        CHECK(t_filled(t_out(&many[i], 0), 8 + i, round * MANY + i));
    }
}

static void end_many(void)
{
    for (uint32_t i = 0; i < MANY; i++) {
        t_call_end(&many[i]);
    }
}

static void wait_many(enum rfm_wait_mode mode)
{
    struct rfm_request *reqs[MANY];
    uint32_t n = MANY;
    uint32_t first = 0;

    for (uint32_t i = 0; i < MANY; i++) {
        reqs[i] = &many[i].req;
    }
    if (mode == RFM_WAIT_ALL) {
        while (rfm_wait(inv, reqs, n, mode, 0, T_FOREVER, true, &first) < 0) {
        }
        return;
    }
    while (n > 0) {
        int i = rfm_wait(inv, reqs, n, mode, 0, T_FOREVER, true, NULL);

        if (i >= 0) {
            CHECK(rfm_request_ended(reqs[i]));
            reqs[i] = reqs[--n];
        }
    }
}

static void many_persistent_requests_share_two_slots(bool thread)
{
    uint32_t rounds = t_scaled(60, 4);

    up(1, thread, 2, 50);
    make_many();
    for (uint64_t round = 0; round < rounds; round++) {
        start_many(round);
        wait_many((round % 2 == 0) ? RFM_WAIT_ALL : RFM_WAIT_ANY);
        check_many(round);
    }
    end_many();
    down(1);
}

static void two_hundred_and_fifty_six_persistent_requests_work_on_two_slots(void)
{
    many_persistent_requests_share_two_slots(false);
}

static void so_they_do_with_a_worker_in_a_thread(void)
{
    many_persistent_requests_share_two_slots(true);
}

/* The service thread alone: this one looks only at the states. */
static void a_long_queue_drains_though_nobody_waits(void)
{
    uint32_t rounds = t_scaled(60, 4);

    for (uint32_t slots = 2; slots <= 64; slots *= 2) {
        up(1, false, slots, (slots % 3 == 1) ? 0 : 50);
        make_many();
        for (uint64_t round = 0; round < rounds / 6 + 1; round++) {
            start_many(round);
            for (uint32_t i = 0; i < MANY; i++) {
                t_behold(&many[i]);
            }
            while (rfm_invoker_queued(inv) != 0) {
                sched_yield();      /* the last one was posted just now */
            }
            wait_many(RFM_WAIT_ALL);
            check_many(round);
        }
        end_many();
        down(1);
    }
}

struct looker {
    uint32_t stop;
    uint32_t looks;
};

static void *look_now_and_then(void *arg)
{
    struct looker *looker = arg;

    while (rfm_load_acquire(&looker->stop) == 0) {
        (void)rfm_invoker_progress(inv);
        looker->looks++;
        if (looker->looks % 7 == 0) {
            sched_yield();
        }
    }
    return NULL;
}

/* Threads that look once and go away may hold the lock of the reaper just when
 * the queue is to be armed; they owe nobody anything. */
static void lookers_that_leave_do_not_strand_the_queue(void)
{
    struct looker lookers[3] = { { 0, 0 }, { 0, 0 }, { 0, 0 } };
    uint32_t rounds = t_scaled(150, 10);
    pthread_t threads[3];

    up(1, false, 2, 0);
    make_many();
    for (uint64_t round = 0; round < rounds; round++) {
        for (int i = 0; i < 3; i++) {
            lookers[i].stop = 0;
            CHECK_EQ(pthread_create(&threads[i], NULL, look_now_and_then,
                                    &lookers[i]), 0);
        }
        for (uint32_t i = 0; i < 40; i++) {
            t_fill(t_in(&many[i], 0), 8 + i, round + i);
            t_start(&many[i]);
        }
        for (int i = 0; i < 3; i++) {
            rfm_store_release(&lookers[i].stop, 1);
            pthread_join(threads[i], NULL);
        }
        for (uint32_t i = 0; i < 40; i++) {
            t_behold(&many[i]);
        }
        for (uint32_t i = 0; i < 40; i++) {
            CHECK_EQ(t_wait(&many[i]), RFM_DONE);
            CHECK(t_filled(t_out(&many[i], 0), 8 + i, round + i));
        }
    }
    end_many();
    down(1);
}

/* --- threads -------------------------------------------------------------- */

struct user {
    pthread_t thread;
    uint64_t  seed;
    uint32_t  rounds;
    uint32_t  done;
};

/* Up to three in flight, of any size and place; now and then it lets the
 * service thread do the waiting. */
static void *invoke_and_check(void *arg)
{
    struct user *user = arg;
    struct t_random r = { user->seed };
    struct t_call calls[3];
    uint64_t seeds[3];

    for (uint32_t i = 0; i < 3; i++) {
        uint32_t places[2] = { (uint32_t)t_below(&r, 3), (uint32_t)t_below(&r, 3) };
        uint64_t size = t_below(&r, 200);
        uint64_t sizes[2] = { size, size };

        t_call_make(&calls[i], inv, "echo", 1, 1, places, sizes);
    }
    while (user->done < user->rounds) {
        uint32_t n = 1 + (uint32_t)t_below(&r, 3);

        for (uint32_t i = 0; i < n; i++) {
            uint64_t size = calls[i].args[0].size;

            seeds[i] = t_random(&r);
            t_fill(t_in(&calls[i], 0), size, seeds[i]);
            if (size > 0) {
                memset(t_out(&calls[i], 0), 0, size);
            }
            t_start(&calls[i]);
        }
        for (uint32_t i = n; i-- > 0;) {
            uint64_t size = calls[i].args[0].size;

            if (t_below(&r, 50) == 0) {
                t_behold(&calls[i]);
            }
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
            CHECK(t_filled(t_out(&calls[i], 0), size, seeds[i]));
            CHECK_EQ(calls[i].sizes[0], size);
            user->done++;
        }
    }
    for (uint32_t i = 0; i < 3; i++) {
        t_call_end(&calls[i]);
    }
    return NULL;
}

static void eight_threads(uint32_t n_workers, bool thread, uint32_t slots,
                          uint32_t spin_us, uint32_t rounds)
{
    struct user users[8];

    up(n_workers, thread, slots, spin_us);
    for (uint64_t i = 0; i < 8; i++) {
        users[i] = (struct user){ .seed = i + 1, .rounds = rounds };
        CHECK_EQ(pthread_create(&users[i].thread, NULL, invoke_and_check,
                                &users[i]), 0);
    }
    for (int i = 0; i < 8; i++) {
        pthread_join(users[i].thread, NULL);
        CHECK(users[i].done >= rounds);
    }
    down(n_workers);
}

static void eight_threads_get_their_own_results_from_a_process(void)
{
    eight_threads(1, false, 8, 20, t_scaled(10000, 300));
}

static void eight_threads_get_their_own_results_from_a_thread(void)
{
    eight_threads(1, true, 2, 20, t_scaled(2500, 300));
}

static void eight_threads_get_their_own_results_from_two_workers(void)
{
    eight_threads(2, false, 4, 0, t_scaled(2500, 300));
}

/* --- watched requests ----------------------------------------------------- */

#define WATCHED 40

static void *take_watched(void *arg)
{
    uint32_t *counts = arg;     /* of each; and the sum of all at the end */
    uint32_t total = 0;
    uint32_t expected = counts[WATCHED];

    while (total < expected) {
        struct rfm_request *at = rfm_invoker_take_ended(inv);

        while (at != NULL) {
            struct t_call *call = (struct t_call *)at->owner;
            struct rfm_request *next = rfm_request_unlist(at);

            if (rfm_request_ended(at)) {
                uint32_t i = (uint32_t)(call - many);

                CHECK(i < WATCHED);
                /* the starter waits for it, so it can't have come twice */
                (void)__atomic_fetch_add(&counts[i], 1, __ATOMIC_RELEASE);
                total++;
            } else {
                (void)rfm_request_watch(at);
            }
            at = next;
        }
        if (total < expected) {
            (void)rfm_wait(inv, NULL, 0, RFM_WAIT_WATCHED, 0, T_FOREVER, false,
                           NULL);
        }
    }
    return NULL;
}

static void each_watched_end_is_told_exactly_once(void)
{
    static uint32_t counts[WATCHED + 1];
    uint32_t rounds = t_scaled(500, 30);
    pthread_t watcher;

    memset(counts, 0, sizeof(counts));
    counts[WATCHED] = WATCHED * rounds;
    up(2, false, 4, 0);
    make_many();
    CHECK_EQ(pthread_create(&watcher, NULL, take_watched, counts), 0);
    for (uint32_t round = 1; round <= rounds; round++) {
        for (uint32_t i = 0; i < WATCHED; i++) {
            many[i].req.owner = &many[i];
            /* sometimes before it is started, sometimes at once after */
            if ((i + round) % 2 == 0) {
                t_start(&many[i]);
                CHECK(rfm_request_watch(&many[i].req));
            } else {
                many[i].req.owner = &many[i];
                t_start(&many[i]);
                sched_yield();
                CHECK(rfm_request_watch(&many[i].req));
            }
        }
        for (uint32_t i = 0; i < WATCHED; i++) {
            while (rfm_load_acquire(&counts[i]) != round) {
                CHECK(rfm_load_acquire(&counts[i]) <= round);
                sched_yield();
            }
        }
    }
    pthread_join(watcher, NULL);
    end_many();
    down(2);
}

/* --- taken back ------------------------------------------------------------ */

#define OBJECTS 100

struct canceller {
    struct t_call *calls;
    uint32_t go;
    uint32_t cancelled;
};

static void *cancel_every_third(void *arg)
{
    struct canceller *c = arg;

    (void)t_await_not(&c->go, 0);
    for (int pass = 0; pass < 20; pass++) {
        for (uint32_t i = 0; i < OBJECTS; i += 3) {
            /* as soon as it is posted, and before, and after */
            c->cancelled += rfm_request_cancel(&c->calls[i].req) == RFM_OK;
        }
    }
    return NULL;
}

/* What waits behind another moves to an idle worker, too: still each runs once. */
static void what_was_cancelled_never_runs_and_all_else_runs_once(void)
{
    static struct t_call calls[OBJECTS];
    uint32_t rounds = t_scaled(200, 20);
    uint64_t ran = 0;
    uint64_t cancelled = 0;

    for (int i = 0; i < 2; i++) {
        t_worker_start(&workers[i], false, 20);
    }
    for (uint32_t round = 0; round < rounds; round++) {
        struct canceller c = { calls, 0, 0 };
        uint64_t asks[OBJECTS][2];
        uint64_t before = workers[0].page->count + workers[1].page->count;
        uint64_t done = 0;
        /* now and then nearly all of it queues behind one call, on any machine */
        bool held = (round % 4) == 0;
        int n_workers = held ? 1 : 2;
        struct t_gate gate;
        pthread_t thread;

        /* new channels: slots that were never used */
        inv = t_invoker(held ? 2 : 64, T_SLOT_BYTES, 20);
        for (int i = 0; i < n_workers; i++) {
            (void)t_worker_attach(&workers[i], inv);
        }
        if (held) {
            t_gate_shut(&gate, &workers[0], inv);
            t_gate_runs(&gate);
        }
        for (uint64_t i = 0; i < OBJECTS; i++) {
            asks[i][0] = 8 + i;
            asks[i][1] = round + i;
            if ((i + round) % 4 < 2) {
                t_call_object(&calls[i], inv, "pattern", asks[i], 16);
            } else {
                /* so long that it is worth to be taken back */
                t_call_inline(&calls[i], inv, "nap", 8, 8);
                memcpy(t_in(&calls[i], 0), asks[i], 8);
            }
        }
        CHECK_EQ(pthread_create(&thread, NULL, cancel_every_third, &c), 0);
        rfm_store_release(&c.go, 1);
        for (uint32_t i = 0; i < OBJECTS; i++) {
            t_start(&calls[i]);
        }
        pthread_join(thread, NULL);
        if (held) {
            /* the last one is behind the gate still: it was cancelled or is now */
            c.cancelled += rfm_request_cancel(&calls[OBJECTS - 1].req) == RFM_OK;
            CHECK_EQ(t_wait(&calls[OBJECTS - 1]), RFM_CANCELLED);
            t_gate_open(&gate);
            done++;
        }
        for (uint32_t i = 0; i < OBJECTS; i++) {
            if (t_wait(&calls[i]) == RFM_CANCELLED) {
                CHECK_EQ(i % 3, 0);
                c.cancelled--;
                cancelled++;
            } else {
                CHECK_EQ(calls[i].req.outcome, RFM_DONE);
                if (calls[i].n == 0) {
                    CHECK(t_filled(calls[i].req.small, 8 + i, round + i));
                } else {
                    CHECK(memcmp(t_out(&calls[i], 0), asks[i], 8) == 0);
                }
                done++;
            }
        }
        CHECK_EQ(c.cancelled, 0);
        /* what a worker was still told of it has passed it by now */
        for (uint32_t i = 0; i < OBJECTS; i++) {
            t_call_end(&calls[i]);
        }
        t_invoker_end(inv);
        for (int i = 0; i < n_workers; i++) {
            (void)t_worker_expect(&workers[i], RFM_AGENT_GONE);
        }
        CHECK_EQ(workers[0].page->count + workers[1].page->count - before, done);
        ran += done;
    }
    CHECK(cancelled > 0);
    CHECK(ran > 0);
    for (int i = 0; i < 2; i++) {
        t_worker_end(&workers[i]);
    }
}

/* Deadlines, moves and ends meet in any order: each call ends as one of them,
 * and no worker is killed for what it had not begun. */
static void time_limits_that_pass_on_the_way_take_only_their_own_call(void)
{
    static struct t_call calls[OBJECTS];
    uint32_t rounds = t_scaled(100, 15);
    uint64_t ends[10] = { 0 };
    struct t_random r = { 8 };

    up(2, false, 8, 0);
    for (uint32_t i = 0; i < OBJECTS; i++) {
        uint64_t us = t_below(&r, 60);

        t_call_inline(&calls[i], inv, "nap", 8, 8);
        memcpy(t_in(&calls[i], 0), &us, 8);
    }
    for (uint32_t round = 0; round < rounds; round++) {
        for (uint32_t i = 0; i < OBJECTS; i++) {
            /* short ones may pass at any place; none passes within a kernel
             * for as long as it takes to be killed for it */
            CHECK_OK(rfm_request_start(&calls[i].req,
                                       (i % 4 == 0) ? 1 + t_below(&r, 2000000)
                                                    : 0));
        }
        for (uint32_t i = OBJECTS; i-- > 0;) {
            enum rfm_outcome outcome = t_wait(&calls[i]);

            CHECK((outcome == RFM_DONE) ||
                  ((outcome == RFM_TIMED_OUT) && (i % 4 == 0)));
            ends[outcome]++;
        }
    }
    CHECK(ends[RFM_TIMED_OUT] > 0);
    CHECK(ends[RFM_DONE] > 0);
    for (uint32_t i = 0; i < OBJECTS; i++) {
        t_call_end(&calls[i]);
    }
    /* a call that was taken back has ended before its worker passes its slot */
    while (rfm_invoker_in_flight(inv) != 0) {
        rfm_invoker_progress(inv);
        sched_yield();
    }
    down(2);
}

/* --- channels come and go meanwhile ---------------------------------------- */

static void *come_and_go(void *arg)
{
    uint32_t rounds = t_scaled(150, 10);
    struct rfm_channel *old = NULL;

    (void)arg;
    for (uint32_t i = 0; i < rounds; i++) {
        struct rfm_channel *chan = t_worker_attach(&workers[1], inv);

        if (old != NULL) {
            rfm_channel_drain(old);
            while (1) {
                struct rfm_channel_info info;

                rfm_channel_info(old, &info);
                if (info.in_flight == 0) {
                    break;
                }
                sched_yield();
            }
            rfm_channel_close(old);
            (void)t_worker_expect(&workers[1], RFM_AGENT_GONE);
        }
        old = chan;
    }
    return NULL;
}

static void invocations_go_on_while_channels_come_and_go(void)
{
    uint32_t rounds = t_scaled(2000, 100);
    struct user users[3];
    pthread_t changer;

    up(2, false, 4, 20);
    CHECK_EQ(pthread_create(&changer, NULL, come_and_go, NULL), 0);
    for (uint64_t i = 0; i < 3; i++) {
        users[i] = (struct user){ .seed = i + 9, .rounds = rounds };
        CHECK_EQ(pthread_create(&users[i].thread, NULL, invoke_and_check,
                                &users[i]), 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(users[i].thread, NULL);
    }
    pthread_join(changer, NULL);
    down(2);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 100);
    RUN(two_hundred_and_fifty_six_persistent_requests_work_on_two_slots);
    RUN(so_they_do_with_a_worker_in_a_thread);
    RUN(a_long_queue_drains_though_nobody_waits);
    RUN(lookers_that_leave_do_not_strand_the_queue);
    RUN(eight_threads_get_their_own_results_from_a_process);
    RUN(eight_threads_get_their_own_results_from_a_thread);
    RUN(eight_threads_get_their_own_results_from_two_workers);
    RUN(each_watched_end_is_told_exactly_once);
    RUN(what_was_cancelled_never_runs_and_all_else_runs_once);
    RUN(time_limits_that_pass_on_the_way_take_only_their_own_call);
    RUN(invocations_go_on_while_channels_come_and_go);
    return t_finish();
}

/* A wake-up is never lost: both sides sleep at once (spin_us = 0), and every
 * wait here has no end but its event's. Run over every transport. */
#define _GNU_SOURCE
#include "harness.h"

#include <pthread.h>
#include <sched.h>

#include "invoker.h"

static struct t_worker worker;
static struct rfm_invoker *inv;
static struct rfm_channel *chan;

static void up(bool thread, uint32_t slots)
{
    t_worker_start(&worker, thread, 0);
    inv  = t_invoker(slots, T_SLOT_BYTES, 0);
    chan = t_worker_attach(&worker, inv);
}

static void down(void)
{
    t_invoker_end(inv);
    t_worker_end(&worker);
}

/* A delay that moves the posting about within the other side's going to bed. */
static void tarry(struct t_random *r)
{
    uint64_t n = (t_below(r, 4) == 0) ? t_below(r, 20000) : t_below(r, 300);

    for (volatile uint64_t i = 0; i < n; i++) {
    }
}

static void ping_pong(uint64_t seed, uint32_t rounds)
{
    struct t_random r = { seed };
    struct t_call call;

    t_call_inline(&call, inv, "echo", 8, 8);
    for (uint64_t i = 0; i < rounds; i++) {
        t_fill(t_in(&call, 0), 8, seed + i);
        tarry(&r);
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), 8, seed + i));
    }
    t_call_end(&call);
}

static void two_sleepers_wake_each_other_every_time(void)
{
    up(false, 2);
    ping_pong(1, t_scaled(60000, 3000));
    down();
}

static void so_they_do_within_one_process(void)
{
    up(true, 2);
    ping_pong(2, t_scaled(30000, 1500));
    down();
}

static void *ping_pong_thread(void *arg)
{
    ping_pong((uintptr_t)arg, t_scaled(1200, 100));
    return NULL;
}

static void every_one_of_many_sleepers_is_woken(void)
{
    pthread_t threads[16];

    for (uint32_t slots = 2; slots <= 16; slots *= 8) {
        up(false, slots);
        for (uintptr_t i = 0; i < 16; i++) {
            CHECK_EQ(pthread_create(&threads[i], NULL, ping_pong_thread,
                                    (void *)(i + 3)), 0);
        }
        for (int i = 0; i < 16; i++) {
            pthread_join(threads[i], NULL);
        }
        down();
    }
}

/* --- what else ends an invocation wakes its waiter ------------------------- */

struct sleeper {
    pthread_t thread;
    struct t_call *call;
    enum rfm_outcome outcome;
};

static void *sleep_for_it(void *arg)
{
    struct sleeper *s = arg;

    s->outcome = t_wait(s->call);
    return NULL;
}

static void go_to_bed(struct sleeper *s, struct t_call *call)
{
    s->call = call;
    CHECK_EQ(pthread_create(&s->thread, NULL, sleep_for_it, s), 0);
    /* near enough: whether asleep or on the way, it must see the end */
    for (int i = 0; (i < 1000) && (rfm_load_acquire(&inv->door->sleepers) == 0) &&
                    (rfm_load_acquire(&inv->leader) == 0); i++) {
        sched_yield();
    }
}

static enum rfm_outcome wake_up(struct sleeper *s)
{
    pthread_join(s->thread, NULL);
    return s->outcome;
}

static void a_cancel_an_abandon_and_a_deadline_wake_who_sleeps_on_the_queue(void)
{
    uint32_t rounds = t_scaled(100, 10);

    for (uint32_t round = 0; round < rounds; round++) {
        struct t_call calls[5];
        struct sleeper sleepers[3];
        struct t_gate gate;

        up(true, 2);
        t_gate_shut(&gate, &worker, inv);
        for (int i = 0; i < 5; i++) {
            t_call_inline(&calls[i], inv, "echo", 8, 8);
            t_fill(t_in(&calls[i], 0), 8, round);
        }
        /* one slot is the gate's, and none is to be free */
        t_start(&calls[0]);
        t_start(&calls[1]);
        t_start(&calls[2]);
        CHECK_OK(rfm_request_start(&calls[3].req, 1000000));
        t_start(&calls[4]);
        CHECK_EQ(rfm_load_acquire(&calls[2].req.state), RFM_QUEUED);
        for (int i = 0; i < 3; i++) {
            go_to_bed(&sleepers[i], &calls[2 + i]);
        }
        CHECK_EQ(wake_up(&sleepers[1]), RFM_TIMED_OUT);
        CHECK_OK(rfm_request_cancel(&calls[2].req));
        CHECK_EQ(rfm_request_cancel(&calls[2].req), RFM_ERR_BUSY);
        CHECK_EQ(wake_up(&sleepers[0]), RFM_CANCELLED);
        rfm_invoker_abandon(inv);
        CHECK_EQ(wake_up(&sleepers[2]), RFM_NO_WORKER);
        t_gate_open(&gate);
        for (int i = 0; i < 5; i++) {
            (void)t_wait(&calls[i]);
            t_call_end(&calls[i]);
        }
        down();
    }
}

static void the_death_of_its_worker_wakes_who_sleeps_on_a_fetch(void)
{
    uint64_t ask[2] = { 5000, 1 };
    struct rfm_block block;
    struct rfm_desc into;
    struct sleeper sleepers[2];
    struct t_call call;
    struct t_gate gates[2];

    up(false, 2);
    t_call_object(&call, inv, "pattern", ask, sizeof(ask));
    CHECK_EQ(t_invoke(&call), RFM_LARGE);
    CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), 5000, &block));
    into = (struct rfm_desc){ block.arena_id, 0, block.offset, 5000 };
    /* both slots, so that the fetch has to queue */
    t_gate_shut(&gates[0], &worker, inv);
    t_gate_shut(&gates[1], &worker, inv);
    CHECK_OK(rfm_request_fetch(&call.req, &into));
    CHECK_EQ(rfm_load_acquire(&call.req.state), RFM_QUEUED);
    go_to_bed(&sleepers[0], &call);
    go_to_bed(&sleepers[1], &gates[0].call);
    CHECK_OK(rfm_channel_kill(chan));
    CHECK_EQ(wake_up(&sleepers[0]), RFM_LOST);
    CHECK_EQ(wake_up(&sleepers[1]), RFM_LOST);
    /* the other gate was only queued, if the channel took one at a time */
    rfm_invoker_abandon(inv);
    (void)t_wait(&gates[1].call);
    t_call_end(&gates[0].call);
    t_call_end(&gates[1].call);
    t_call_end(&call);
    rfm_heap_free(&block);
    t_invoker_end(inv);
    t_worker_was_killed(&worker);
}

static void *watch(void *arg)
{
    struct rfm_request **found = arg;

    while (*found == NULL) {
        (void)rfm_wait(inv, NULL, 0, RFM_WAIT_WATCHED, 0, T_FOREVER, false, NULL);
        *found = rfm_invoker_take_ended(inv);
    }
    return NULL;
}

static void a_watcher_is_woken_by_each_kind_of_end(void)
{
    struct rfm_request *found;
    struct t_call call;
    pthread_t watcher;

    up(false, 2);
    t_call_inline(&call, inv, "echo", 8, 8);
    t_fill(t_in(&call, 0), 8, 1);
    for (int how = 0; how < 6; how++) {
        found = NULL;
        CHECK_EQ(pthread_create(&watcher, NULL, watch, &found), 0);
        switch (how) {
        case 0:                 /* watched first, then done */
            t_start(&call);
            CHECK(rfm_request_watch(&call.req));
            break;
        case 1:                 /* done first, then watched */
            CHECK_EQ(t_invoke(&call), RFM_DONE);
            CHECK(rfm_request_watch(&call.req));
            CHECK(!rfm_request_watch(&call.req));
            break;
        case 2:                 /* cancelled in the queue */
            rfm_channel_drain(chan);
            t_start(&call);
            CHECK(rfm_request_watch(&call.req));
            CHECK_OK(rfm_request_cancel(&call.req));
            break;
        case 3:
            CHECK_OK(rfm_request_start(&call.req, 1));
            CHECK(rfm_request_watch(&call.req));
            break;
        case 4:
            t_start(&call);
            CHECK(rfm_request_watch(&call.req));
            rfm_invoker_abandon(inv);
            break;
        default:                /* watched before it is refused at once */
            call.req.watch |= 1u;
            t_start(&call);
            break;
        }
        pthread_join(watcher, NULL);
        CHECK(found == &call.req);
        while (!rfm_request_ended(&call.req)) {
            sched_yield();
        }
        CHECK(rfm_request_unlist(found) == NULL);
    }
    t_call_end(&call);
    down();
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(two_sleepers_wake_each_other_every_time);
    RUN(so_they_do_within_one_process);
    RUN(every_one_of_many_sleepers_is_woken);
    RUN(a_cancel_an_abandon_and_a_deadline_wake_who_sleeps_on_the_queue);
    RUN(the_death_of_its_worker_wakes_who_sleeps_on_a_fetch);
    RUN(a_watcher_is_woken_by_each_kind_of_end);
    return t_finish();
}

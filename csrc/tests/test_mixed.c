/* Shared memory and a network at once: an executor with workers on both, a
 * worker with ranks on both; whoever sleeps is woken by either. */
#define _GNU_SOURCE
#include "harness.h"

#include <pthread.h>
#include <sched.h>

#include "poller.h"

static struct t_worker workers[4];
static struct rfm_invoker *inv;

/* tcp, or what T_TRANSPORT says */
static uint32_t network(void)
{
    return t_remote() ? t_transport() : RFM_TRANSPORT_TCP;
}

static struct rfm_channel *attach(struct t_worker *w, uint32_t transport)
{
    struct rfm_attach_attr attr = t_dial(w, transport);

    return t_attach(inv, &attr);
}

static void up(uint32_t n, uint32_t slots, uint32_t spin_us)
{
    inv = t_invoker(slots, T_SLOT_BYTES, spin_us);
    for (uint32_t i = 0; i < n; i++) {
        t_worker_start(&workers[i], false, spin_us);
        (void)attach(&workers[i], (i % 2 == 0) ? RFM_TRANSPORT_SHM
                                               : network());
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

struct user {
    pthread_t thread;
    struct rfm_invoker *inv;
    uint64_t  seed;
    uint32_t  rounds;
};

static void *invoke_and_check(void *arg)
{
    struct user *user = arg;
    struct t_random r = { user->seed };
    struct t_call calls[3];

    for (uint32_t i = 0; i < 3; i++) {
        uint64_t size = (i == 2) ? 30000 : 1 + t_below(&r, 200);
        uint32_t places[2] = { (i == 2) ? RFM_CALL : (uint32_t)t_below(&r, 3),
                               (i == 2) ? RFM_BOUND : (uint32_t)t_below(&r, 3) };
        uint64_t sizes[2] = { size, size };

        t_call_make(&calls[i], user->inv, "echo", 1, 1, places, sizes);
    }
    for (uint32_t done = 0; done < user->rounds;) {
        uint32_t n = 1 + (uint32_t)t_below(&r, 3);
        uint64_t seeds[3];

        for (uint32_t i = 0; i < n; i++) {
            seeds[i] = t_random(&r);
            t_fill(t_in(&calls[i], 0), calls[i].args[0].size, seeds[i]);
            t_start(&calls[i]);
        }
        for (uint32_t i = n; i-- > 0; done++) {
            if (t_below(&r, 30) == 0) {
                t_behold(&calls[i]);
            }
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
            CHECK(t_filled(t_out(&calls[i], 0), calls[i].args[0].size,
                           seeds[i]));
        }
    }
    for (uint32_t i = 0; i < 3; i++) {
        t_call_end(&calls[i]);
    }
    return NULL;
}

static void threads(struct rfm_invoker *const *invs, uint32_t n_invs, uint32_t n,
                    uint32_t rounds)
{
    struct user users[12];

    CHECK(n <= 12);
    for (uint32_t i = 0; i < n; i++) {
        users[i] = (struct user){ .inv = invs[i % n_invs], .seed = i + 1,
                                  .rounds = rounds };
        CHECK_EQ(pthread_create(&users[i].thread, NULL, invoke_and_check,
                                &users[i]), 0);
    }
    for (uint32_t i = 0; i < n; i++) {
        pthread_join(users[i].thread, NULL);
    }
}

/* --- an executor ------------------------------------------------------------ */

static void sleepers_are_woken_by_workers_of_either_kind(void)
{
    for (uint32_t n = 2; n <= 4; n += 2) {
        up(n, 4, 0);
        threads(&inv, 1, 1, t_scaled(2000, 200));
        threads(&inv, 1, 8, t_scaled(1000, 100));
        down(n);
    }
}

static void spinners_get_their_results_from_either_kind(void)
{
    up(4, 4, 50);
    threads(&inv, 1, 6, t_scaled(1500, 100));
    down(4);
}

static void each_kind_gets_its_share(void)
{
    struct t_call calls[40];
    uint64_t most = 0;

    up(2, 2, 0);
    for (int i = 0; i < 40; i++) {
        uint64_t us = 500;

        t_call_inline(&calls[i], inv, "nap", 8, 8);
        memcpy(t_in(&calls[i], 0), &us, 8);
        t_start(&calls[i]);
    }
    for (int i = 0; i < 40; i++) {
        CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
        t_call_end(&calls[i]);
    }
    for (int i = 0; i < 2; i++) {
        most = (workers[i].page->count > most) ? workers[i].page->count : most;
    }
    CHECK(most < 40);
    down(2);
}

static void a_queue_drains_over_both_though_nobody_waits(void)
{
    static struct t_call calls[200];

    up(4, 2, 0);
    for (uint64_t i = 0; i < 200; i++) {
        uint32_t places[2] = { (uint32_t)(i % 3), (uint32_t)(i / 3 % 3) };
        uint64_t sizes[2] = { 8 + i, 8 + i };

        t_call_make(&calls[i], inv, "echo", 1, 1, places, sizes);
    }
    for (uint64_t round = 0; round < t_scaled(20, 4); round++) {
        for (uint64_t i = 0; i < 200; i++) {
            t_fill(t_in(&calls[i], 0), 8 + i, round + i);
            t_start(&calls[i]);
        }
        for (int i = 0; i < 200; i++) {
            t_behold(&calls[i]);
        }
        for (uint64_t i = 0; i < 200; i++) {
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
            CHECK(t_filled(t_out(&calls[i], 0), 8 + i, round + i));
        }
    }
    for (int i = 0; i < 200; i++) {
        t_call_end(&calls[i]);
    }
    down(4);
}

/* --- who came too early ------------------------------------------------------ */

struct early {
    pthread_t thread;
    struct t_call call;
    uint32_t waits;
};

static void *wait_early(void *arg)
{
    struct early *e = arg;

    rfm_store_release(&e->waits, 1);
    CHECK_EQ(t_wait(&e->call), RFM_DONE);
    return NULL;
}

/* Whatever it sleeps on: nothing yet, workers here, workers elsewhere. */
static void who_sleeps_before_a_worker_of_another_kind_comes_is_served(void)
{
    const uint32_t kinds[][2] = {
        { RFM_TRANSPORTS, RFM_TRANSPORT_SHM },
        { RFM_TRANSPORTS, network() },
        { RFM_TRANSPORT_SHM, network() },
        { network(), RFM_TRANSPORT_SHM },
        { network(), network() },
    };
    uint32_t rounds = t_scaled(20, 3);

    for (uint32_t round = 0; round < rounds; round++) {
        for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++) {
            bool first = kinds[k][0] != RFM_TRANSPORTS;
            struct early early[3] = { 0 };
            struct t_call filler;
            struct t_gate gate;

            inv = t_invoker(2, T_SLOT_BYTES, 0);
            if (first) {
                /* it has its hands full */
                t_worker_start(&workers[0], false, 0);
                (void)attach(&workers[0], kinds[k][0]);
                t_gate_shut(&gate, &workers[0], inv);
                t_gate_runs(&gate);
                t_call_inline(&filler, inv, "echo", 8, 8);
                memset(t_in(&filler, 0), 1, 8);
                t_start(&filler);
            }
            for (uint64_t i = 0; i < 3; i++) {
                t_call_inline(&early[i].call, inv, "echo", 8, 8);
                t_fill(t_in(&early[i].call, 0), 8, i);
                t_start(&early[i].call);
                CHECK_EQ(pthread_create(&early[i].thread, NULL, wait_early,
                                        &early[i]), 0);
                (void)t_await_not(&early[i].waits, 0);
            }
            for (uint32_t i = 0; i < 50 * round; i++) {
                sched_yield();
            }
            t_worker_start(&workers[1], false, 0);
            (void)attach(&workers[1], kinds[k][1]);
            for (uint64_t i = 0; i < 3; i++) {
                pthread_join(early[i].thread, NULL);
                CHECK(t_filled(t_out(&early[i].call, 0), 8, i));
                t_call_end(&early[i].call);
            }
            if (first) {
                t_gate_open(&gate);
                CHECK_EQ(t_wait(&filler), RFM_DONE);
                t_call_end(&filler);
            }
            t_invoker_end(inv);
            t_worker_end(&workers[1]);
            if (first) {
                t_worker_end(&workers[0]);
            }
        }
    }
}

static void workers_of_both_kinds_come_and_go_under_sleepers(void)
{
    struct user users[4];
    uint32_t rounds = t_scaled(30, 4);

    up(2, 2, 0);
    for (uint32_t i = 0; i < 4; i++) {
        users[i] = (struct user){ .inv = inv, .seed = i + 50,
                                  .rounds = t_scaled(3000, 200) };
        CHECK_EQ(pthread_create(&users[i].thread, NULL, invoke_and_check,
                                &users[i]), 0);
    }
    for (uint32_t i = 0; i < rounds; i++) {
        struct rfm_channel_info info;
        struct rfm_channel *chan = attach(&workers[i % 2], i % 3 % 2);

        for (int k = 0; k < 200; k++) {
            sched_yield();
        }
        rfm_channel_drain(chan);
        do {
            rfm_channel_info(chan, &info);
            sched_yield();
        } while (info.in_flight != 0);
        rfm_channel_close(chan);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(users[i].thread, NULL);
    }
    down(2);
}

/* --- a worker ---------------------------------------------------------------- */

static void one_worker_serves_ranks_of_both_kinds(void)
{
    for (uint32_t spin_us = 0; spin_us <= 30; spin_us += 30) {
        struct rfm_invoker *invs[4];

        t_worker_start(&workers[0], false, spin_us);
        for (uint32_t i = 0; i < 4; i++) {
            inv = invs[i] = t_invoker(4, T_SLOT_BYTES, spin_us);
            (void)attach(&workers[0], (i % 2 == 0) ? RFM_TRANSPORT_SHM
                                                   : network());
        }
        threads(invs, 4, 8, t_scaled(800, 100));
        for (int i = 0; i < 4; i++) {
            t_invoker_end(invs[i]);
        }
        t_worker_end(&workers[0]);
    }
}

/* Asleep on the door for ranks here, it hears of those elsewhere, one by one. */
static void a_sleeping_worker_hears_each_rank_of_either_kind(void)
{
    struct rfm_invoker *invs[2];
    struct t_call calls[2];
    struct t_random r = { 4 };

    t_worker_start(&workers[0], false, 0);
    for (uint32_t i = 0; i < 2; i++) {
        inv = invs[i] = t_invoker(2, T_SLOT_BYTES, 0);
        (void)attach(&workers[0], i);
        t_call_inline(&calls[i], inv, "echo", 8, 8);
    }
    for (uint64_t round = 0; round < t_scaled(5000, 500); round++) {
        uint32_t i = (uint32_t)t_below(&r, 2);

        t_fill(t_in(&calls[i], 0), 8, round);
        for (volatile uint64_t k = t_below(&r, 3000); k > 0; k--) {
        }
        CHECK_EQ(t_invoke(&calls[i]), RFM_DONE);
        CHECK(t_filled(t_out(&calls[i], 0), 8, round));
    }
    for (int i = 0; i < 2; i++) {
        t_call_end(&calls[i]);
        t_invoker_end(invs[i]);
    }
    t_worker_end(&workers[0]);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(sleepers_are_woken_by_workers_of_either_kind);
    RUN(spinners_get_their_results_from_either_kind);
    RUN(each_kind_gets_its_share);
    RUN(a_queue_drains_over_both_though_nobody_waits);
    RUN(who_sleeps_before_a_worker_of_another_kind_comes_is_served);
    RUN(workers_of_both_kinds_come_and_go_under_sleepers);
    RUN(one_worker_serves_ranks_of_both_kinds);
    RUN(a_sleeping_worker_hears_each_rank_of_either_kind);
    return t_finish();
}

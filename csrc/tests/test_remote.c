/* What is large, slow, many, or gone in the middle of something: the others
 * don't wait for it, and it ends as it should. Run over every transport. */
#define _GNU_SOURCE
#include "harness.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frame.h"
#include "poller.h"

#define MS    t_ms()
#define LARGE (16u << 20)

static struct t_worker worker;
static struct rfm_invoker *inv;
static struct rfm_channel *chan;

static void hire(uint32_t spin_us)
{
    t_worker_start(&worker, false, spin_us);
    chan = t_worker_attach(&worker, inv);
}

static void up(uint32_t slots, uint32_t spin_us)
{
    inv = t_invoker(slots, T_SLOT_BYTES, spin_us);
    hire(spin_us);
}

static void down(void)
{
    t_invoker_end(inv);
    t_worker_end(&worker);
}

/* Input and output in arenas. */
static void make_large(struct t_call *call, const char *kernel, uint64_t size)
{
    uint32_t places[2] = { RFM_CALL, RFM_BOUND };
    uint64_t sizes[2] = { size, size };

    t_call_make(call, inv, kernel, 1, 1, places, sizes);
}

static void until_fenced(void)
{
    struct rfm_channel_info info;

    do {
        rfm_channel_info(chan, &info);
        sched_yield();
    } while (!info.fenced);
}

/* Another rank, that needs little. */
static void the_worker_serves_another(void)
{
    struct rfm_invoker *mine = inv;
    struct t_call call;

    inv = t_invoker(2, T_SLOT_BYTES, 0);
    (void)t_worker_attach(&worker, inv);
    t_call_inline(&call, inv, "echo", 8, 8);
    for (uint64_t i = 0; i < 5; i++) {
        t_fill(t_in(&call, 0), 8, i);
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), 8, i));
    }
    t_call_end(&call);
    t_invoker_end(inv);
    inv = mine;
}

/* --- large ---------------------------------------------------------------- */

#define FEW 4

static void large_results_hold_up_no_worker_though_nobody_looks(void)
{
    struct t_call calls[FEW];

    up(2, 0);
    for (uint64_t i = 0; i < FEW; i++) {
        make_large(&calls[i], "echo", LARGE);
        memset(t_in(&calls[i], 0), (int)i, LARGE);
        t_start(&calls[i]);
    }
    /* two were sent; the others follow as these come back */
    while (rfm_load_acquire(&worker.page->count) < FEW) {
        sched_yield();
    }
    the_worker_serves_another();
    for (uint64_t i = 0; i < FEW; i++) {
        CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
        CHECK(memcmp(t_out(&calls[i], 0), t_in(&calls[i], 0), LARGE) == 0);
        t_call_end(&calls[i]);
    }
    down();
}

struct mixer {
    pthread_t thread;
    uint64_t  seed;
    uint64_t  size;
    uint32_t  rounds;
};

static void *mix(void *arg)
{
    struct mixer *m = arg;
    struct t_call call;

    make_large(&call, "echo", m->size);
    for (uint32_t i = 0; i < m->rounds; i++) {
        t_fill(t_in(&call, 0), m->size, m->seed + i);
        memset(t_out(&call, 0), 0, m->size);
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), m->size, m->seed + i));
    }
    t_call_end(&call);
    return NULL;
}

static void large_and_small_ones_of_several_threads_mix(void)
{
    static const uint64_t sizes[] = { 8, 5u << 20, 100, 70000, 1u << 20, 4096 };
    struct mixer mixers[6];

    for (uint32_t spin_us = 0; spin_us <= 50; spin_us += 50) {
        up(4, spin_us);
        for (uint64_t i = 0; i < 6; i++) {
            mixers[i] = (struct mixer){
                .seed   = i * 1000,
                .size   = sizes[i],
                .rounds = t_scaled((sizes[i] > 65536) ? 10 : 300,
                                   (sizes[i] > 65536) ? 3 : 50),
            };
            CHECK_EQ(pthread_create(&mixers[i].thread, NULL, mix, &mixers[i]), 0);
        }
        for (int i = 0; i < 6; i++) {
            pthread_join(mixers[i].thread, NULL);
        }
        down();
    }
}

/* --- arenas that come and go ------------------------------------------------ */

#define STAGED 60

struct objects {
    pthread_t thread;
    uint32_t stop;
    uint32_t done;
};

/* More than there are slots, so that the service thread sends some. */
static void *start_objects(void *arg)
{
    struct objects *o = arg;
    struct t_call calls[STAGED];
    struct rfm_block blocks[STAGED];
    struct rfm_desc descs[STAGED];

    for (uint64_t i = 0; i < STAGED; i++) {
        uint64_t ask[2] = { 40, i };

        CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), 200, &blocks[i]));
        memset(blocks[i].address, 0, 200);
        memcpy(blocks[i].address, ask, sizeof(ask));
        descs[i] = (struct rfm_desc){ blocks[i].arena_id, 0, blocks[i].offset,
                                      200 };
        t_call_object(&calls[i], inv, "pattern", &descs[i], sizeof(descs[i]));
        calls[i].req.wire_flags |= RFM_REQ_STAGED;
    }
    while ((rfm_load_acquire(&o->stop) == 0) || (o->done == 0)) {
        for (int i = 0; i < STAGED; i++) {
            t_start(&calls[i]);
        }
        for (uint64_t i = 0; i < STAGED; i++) {
            t_behold(&calls[i]);
        }
        for (uint64_t i = 0; i < STAGED; i++) {
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
            CHECK(t_filled(calls[i].req.small, 40, i));
        }
        o->done++;
    }
    for (uint64_t i = 0; i < STAGED; i++) {
        t_call_end(&calls[i]);
        rfm_heap_free(&blocks[i]);
    }
    return NULL;
}

static void arenas_come_and_go_while_invocations_are_sent(void)
{
    uint64_t own = (64u << 20) + 1;     /* an arena of its own */
    uint32_t rounds = t_scaled(20, 4);
    struct objects objects = { 0 };
    struct rfm_channel_info info;

    up(2, 0);
    CHECK_EQ(pthread_create(&objects.thread, NULL, start_objects, &objects), 0);
    for (uint64_t i = 0; i < rounds; i++) {
        struct rfm_block block;
        struct t_call call;
        struct rfm_desc into;
        uint64_t ask[2] = { 5000, i };

        t_call_object(&call, inv, "pattern", ask, sizeof(ask));
        CHECK_EQ(t_invoke(&call), RFM_LARGE);
        CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), own, &block));
        into = (struct rfm_desc){ block.arena_id, 0, block.offset + own - 5000,
                                  5000 };
        CHECK_OK(rfm_request_fetch(&call.req, &into));
        CHECK_EQ(t_wait(&call), RFM_DONE);
        CHECK(t_filled((uint8_t *)block.address + own - 5000, 5000, i));
        rfm_heap_free(&block);
        t_call_end(&call);
    }
    rfm_store_release(&objects.stop, 1);
    pthread_join(objects.thread, NULL);
    rfm_channel_info(chan, &info);
    CHECK(info.alive);
    down();
}

/* --- slow and stopped ranks ------------------------------------------------- */

static int slow_rank(const uint64_t *args, const int *fds)
{
    struct rfm_attach_attr attr = t_dialled(fds + 1);
    uint32_t *told = t_map(fds[0], 4096);
    struct t_call calls[3];

    inv = t_invoker(2, T_SLOT_BYTES, 0);
    (void)t_attach(inv, &attr);
    for (int i = 0; i < 3; i++) {
        make_large(&calls[i], "echo", LARGE);
        t_fill(t_in(&calls[i], 0), LARGE, (uint64_t)i);
    }
    for (uint64_t round = 0; round < args[0]; round++) {
        for (int i = 0; i < 3; i++) {
            memset(t_out(&calls[i], 0), 0, 4096);
            t_start(&calls[i]);
        }
        rfm_store_release(told, (uint32_t)round + 1);
        for (int i = 2; i >= 0; i--) {
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
            CHECK(memcmp(t_out(&calls[i], 0), t_in(&calls[i], 0), LARGE) == 0);
        }
    }
    for (int i = 0; i < 3; i++) {
        t_call_end(&calls[i]);
    }
    t_invoker_end(inv);
    return 0;
}

static void a_rank_that_is_stopped_holds_up_no_other(void)
{
    uint64_t args[4] = { t_scaled(30, 6) };
    struct t_random r = { 12 };
    struct rfm_attach_attr attr;
    uint32_t *told;
    uint32_t at = 0;
    int fds[3];
    uint32_t n;
    pid_t pid;

    t_worker_start(&worker, false, 0);
    attr = t_dial(&worker, t_transport());
    n    = t_dial_fds(&attr, fds + 1);
    told = t_shared(4096, &fds[0]);
    pid  = t_spawn(slow_rank, args, fds, n + 1);
    t_hang_up(&attr);
    while (at < args[0]) {
        at = t_await_not(told, at);
        for (volatile uint64_t k = t_below(&r, 3000000); k > 0; k--) {
        }
        t_kill(pid, SIGSTOP);
        the_worker_serves_another();
        t_kill(pid, SIGCONT);
    }
    CHECK_EQ(t_reap(pid), 0);
    t_unshare(told, 4096, fds[0]);
    t_worker_end(&worker);
}

/* --- workers that end in the middle ----------------------------------------- */

struct attaching {
    pthread_t thread;
    struct rfm_attach_attr attr;
    int rc;
};

static void *attach_it(void *arg)
{
    struct attaching *a = arg;
    struct rfm_channel *none;

    a->rc = rfm_invoker_attach_over(inv, &a->attr, &none);
    return NULL;
}

/* at any moment of it, and before */
static void a_worker_killed_while_a_rank_attaches_is_an_error_there(void)
{
    uint32_t rounds = t_scaled(60, 10);
    struct t_random r = { 5 };
    uint32_t failed = 0;

    inv = t_invoker(2, T_SLOT_BYTES, 0);
    for (uint32_t i = 0; i < rounds; i++) {
        struct rfm_block blocks[3];
        struct attaching a = { 0 };

        t_worker_start(&worker, false, 0);
        for (int k = 0; k < 3; k++) {
            CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), 4096, &blocks[k]));
        }
        if (i % 4 == 0) {
            t_kill(worker.pid, SIGSTOP);        /* it never answers */
        }
        a.attr = t_dial(&worker, t_transport());
        CHECK_EQ(pthread_create(&a.thread, NULL, attach_it, &a), 0);
        for (volatile uint64_t k = t_below(&r, 400000); k > 0; k--) {
        }
        t_kill(worker.pid, SIGKILL);
        CHECK_EQ(t_worker_bury(&worker), SIGKILL);
        pthread_join(a.thread, NULL);
        CHECK((a.rc == RFM_OK) || (a.rc == RFM_ERR_PEER));
        CHECK((i % 4 != 0) || (a.rc == RFM_ERR_PEER));
        failed += a.rc < 0;
        for (int k = 0; k < 3; k++) {
            rfm_heap_free(&blocks[k]);
        }
    }
    CHECK(failed > 0);
    t_invoker_end(inv);
}

struct allocating {
    pthread_t thread;
    uint32_t  ended;
    struct rfm_block block;
};

static void *allocate(void *arg)
{
    struct allocating *a = arg;

    CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), 3u << 20, &a->block));
    rfm_store_release(&a->ended, 1);
    return NULL;
}

static void memory_is_there_though_a_worker_died_before_it_heard_of_it(void)
{
    struct allocating a = { 0 };

    up(2, 0);
    t_kill(worker.pid, SIGSTOP);
    CHECK_EQ(pthread_create(&a.thread, NULL, allocate, &a), 0);
    for (int i = 0; i < 1000; i++) {
        sched_yield();
    }
    t_kill(worker.pid, SIGKILL);
    pthread_join(a.thread, NULL);
    memset(a.block.address, 1, 3u << 20);
    until_fenced();
    CHECK_EQ(t_worker_bury(&worker), SIGKILL);
    hire(0);
    rfm_heap_free(&a.block);
    down();
}

struct shipping {
    pthread_t thread;
    struct t_call *call;
};

static void *ship(void *arg)
{
    struct shipping *s = arg;

    t_start(s->call);
    return NULL;
}

static void a_worker_killed_while_a_kernel_is_shipped_loses_the_invocation(void)
{
    uint64_t n = 32u << 20;
    uint8_t digest[RFM_DIGEST_BYTES] = { 1 };
    uint8_t *blob = calloc(1, n);
    struct rfm_binding *small;
    struct rfm_binding *large;
    struct rfm_channel_info info;
    struct rfm_kernel *kernel;
    struct shipping shipping;
    struct t_call call;

    CHECK(blob != NULL);
    up(2, 0);
    CHECK_OK(rfm_invoker_kernel(inv, 2, digest, blob, n, &kernel));
    t_call_inline(&call, inv, "echo", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    small = call.binding;
    CHECK_OK(rfm_binding_create(inv, kernel, 0, 1, 1, small->args, NULL, 0,
                                &large));
    t_kill(worker.pid, SIGSTOP);
    call.req.binding = large;
    shipping.call    = &call;
    CHECK_EQ(pthread_create(&shipping.thread, NULL, ship, &shipping), 0);
    do {                        /* else nobody would ever end it */
        rfm_channel_info(chan, &info);
        sched_yield();
    } while (info.in_flight == 0);
    for (int i = 0; i < 2000; i++) {
        sched_yield();
    }
    t_kill(worker.pid, SIGKILL);
    pthread_join(shipping.thread, NULL);
    CHECK_EQ(t_wait(&call), RFM_LOST);
    until_fenced();
    CHECK_EQ(t_worker_bury(&worker), SIGKILL);
    rfm_binding_destroy(inv, large);
    call.req.binding = small;
    t_call_end(&call);
    t_invoker_end(inv);
    free(blob);
}

/* Data under way to it, in it, and from it. */
static void workers_killed_while_data_travels_lose_only_what_they_had(void)
{
    uint32_t rounds = t_scaled(40, 8);
    struct t_random r = { 9 };
    uint32_t ends[10] = { 0 };
    struct t_call calls[4];

    inv = t_invoker(2, T_SLOT_BYTES, 0);
    for (uint64_t i = 0; i < 4; i++) {
        make_large(&calls[i], "echo", (i % 2 == 0) ? 8u << 20 : 100000);
        t_fill(t_in(&calls[i], 0), calls[i].args[0].size, i);
    }
    for (uint32_t round = 0; round < rounds; round++) {
        hire(0);
        for (int i = 0; i < 4; i++) {
            memset(t_out(&calls[i], 0), 0xcc, calls[i].args[1].size);
            t_start(&calls[i]);
        }
        for (volatile uint64_t k = t_below(&r, 6000000); k > 0; k--) {
        }
        t_kill(worker.pid, SIGKILL);
        until_fenced();
        rfm_invoker_abandon(inv);
        for (uint64_t i = 0; i < 4; i++) {
            enum rfm_outcome outcome = t_wait(&calls[i]);
            const uint8_t *in = t_in(&calls[i], 0);
            const uint8_t *out = t_out(&calls[i], 0);

            CHECK((outcome == RFM_DONE) || (outcome == RFM_LOST) ||
                  (outcome == RFM_NO_WORKER));
            CHECK((outcome != RFM_DONE) ||
                  (memcmp(in, out, calls[i].args[1].size) == 0));
            ends[outcome]++;
        }
        CHECK_EQ(t_worker_bury(&worker), SIGKILL);
    }
    CHECK(ends[RFM_LOST] > 0);
    for (int i = 0; i < 4; i++) {
        t_call_end(&calls[i]);
    }
    t_invoker_end(inv);
}

static void a_worker_killed_while_it_is_let_go_is_no_hang(void)
{
    for (int round = 0; round < 3; round++) {
        struct t_call call;

        up(2, 0);
        t_call_inline(&call, inv, "echo", 8, 8);
        memset(t_in(&call, 0), 0, 8);
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        t_kill(worker.pid, SIGSTOP);
        if (round > 0) {
            t_start(&call);
        }
        rfm_channel_close(chan);
        for (int i = 0; i < 500 * round; i++) {
            sched_yield();
        }
        t_kill(worker.pid, SIGKILL);
        until_fenced();
        CHECK_EQ(t_wait(&call), (round > 0) ? RFM_LOST : RFM_DONE);
        CHECK_EQ(t_worker_bury(&worker), SIGKILL);
        t_call_end(&call);
        t_invoker_end(inv);
    }
}

/* --- many ------------------------------------------------------------------- */

#define WORKERS 40

static void one_rank_keeps_forty_workers_busy(void)
{
    static struct t_worker workers[WORKERS];
    static struct t_call calls[3 * WORKERS];
    uint32_t rounds = t_scaled(30, 4);
    uint32_t idle = 0;

    inv = t_invoker(4, T_SLOT_BYTES, 0);
    for (int i = 0; i < WORKERS; i++) {
        t_worker_start(&workers[i], false, 0);
        (void)t_worker_attach(&workers[i], inv);
    }
    for (uint64_t i = 0; i < 3 * WORKERS; i++) {
        uint64_t size = (i % 10 == 0) ? 200000 : 8 + i;
        uint32_t places[2] = { (size > 1000) ? RFM_CALL : (uint32_t)(i % 3),
                               (size > 1000) ? RFM_BOUND
                                             : (uint32_t)(i / 3 % 3) };
        uint64_t sizes[2] = { size, size };

        t_call_make(&calls[i], inv, "echo", 1, 1, places, sizes);
    }
    for (uint64_t round = 0; round < rounds; round++) {
        for (uint64_t i = 0; i < 3 * WORKERS; i++) {
            t_fill(t_in(&calls[i], 0), calls[i].args[0].size, round + i);
            t_start(&calls[i]);
        }
        for (uint64_t i = 3 * WORKERS; i-- > 0;) {
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
            CHECK(t_filled(t_out(&calls[i], 0), calls[i].args[0].size,
                           round + i));
        }
    }
    for (int i = 0; i < 3 * WORKERS; i++) {
        t_call_end(&calls[i]);
    }
    t_invoker_end(inv);
    for (int i = 0; i < WORKERS; i++) {
        idle += workers[i].page->count == 0;
        t_worker_end(&workers[i]);
    }
    CHECK_EQ(idle, 0);
}

#define RANKS_EACH 16

/* Several ranks in this process, each with an invoker of its own. */
static int sixteen_ranks(const uint64_t *args, const int *fds)
{
    struct rfm_invoker *invs[RANKS_EACH];
    struct t_call calls[RANKS_EACH][2];
    int sock = fds[0];

    for (uint32_t i = 0; i < RANKS_EACH; i++) {
        struct rfm_attach_attr attr;
        struct rfm_rx rx;
        int got[2] = { -1, -1 };

        rfm_rx_init(&rx, 4096);
        while (rfm_rx_read(&rx, sock) == RFM_ERR_AGAIN) {
            sched_yield();
        }
        memcpy(got, rx.fds, rx.n_fds * sizeof(int));
        rx.n_fds = 0;
        attr       = t_dialled(got);
        attr.flags = (uint32_t)rx.head.cookie;
        rfm_rx_fini(&rx);
        invs[i] = t_invoker(2, T_SLOT_BYTES, 0);
        (void)t_attach(invs[i], &attr);
        for (int k = 0; k < 2; k++) {
            uint32_t places[2] = { RFM_INLINE, k ? RFM_BOUND : RFM_INLINE };
            uint64_t sizes[2] = { 50, 50 };

            t_call_make(&calls[i][k], invs[i], "echo", 1, 1, places, sizes);
        }
    }
    for (uint64_t round = 0; round < args[1]; round++) {
        for (uint64_t i = 0; i < 2 * RANKS_EACH; i++) {
            struct t_call *call = &calls[i / 2][i % 2];

            t_fill(t_in(call, 0), 50, args[0] + round + i);
            t_start(call);
        }
        for (uint64_t i = 0; i < 2 * RANKS_EACH; i++) {
            struct t_call *call = &calls[i / 2][i % 2];

            CHECK_EQ(t_wait(call), RFM_DONE);
            CHECK(t_filled(t_out(call, 0), 50, args[0] + round + i));
        }
    }
    for (int i = 0; i < RANKS_EACH; i++) {
        t_call_end(&calls[i][0]);
        t_call_end(&calls[i][1]);
        t_invoker_end(invs[i]);
    }
    close(sock);
    return 0;
}

static void one_worker_serves_sixty_four_ranks_in_four_processes(void)
{
    uint32_t rounds = t_scaled(40, 5);
    pid_t pids[RFM_MAX_RANKS / RANKS_EACH];

    t_worker_start(&worker, false, 0);
    for (uint64_t p = 0; p < RFM_MAX_RANKS / RANKS_EACH; p++) {
        uint64_t args[4] = { p * 1000003, rounds };
        int pair[2];

        t_socketpair(pair);
        pids[p] = t_spawn(sixteen_ranks, args, &pair[1], 1);
        for (int i = 0; i < RANKS_EACH; i++) {
            struct rfm_attach_attr attr = t_dial(&worker, t_transport());
            int fds[2];
            uint32_t n = t_dial_fds(&attr, fds);

            CHECK_OK(rfm_frame_send(pair[0], 1, attr.flags, NULL, 0, fds, n));
            t_hang_up(&attr);
        }
        close(pair[0]);
        close(pair[1]);
    }
    for (uint64_t p = 0; p < RFM_MAX_RANKS / RANKS_EACH; p++) {
        CHECK_EQ(t_reap(pids[p]), 0);
    }
    for (uint32_t i = 0; i < RFM_MAX_RANKS; i++) {
        (void)t_worker_expect(&worker, RFM_AGENT_GONE);
    }
    CHECK_EQ(worker.page->count, 2ull * RFM_MAX_RANKS * rounds);
    t_worker_end(&worker);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 100);
    RUN(large_results_hold_up_no_worker_though_nobody_looks);
    RUN(large_and_small_ones_of_several_threads_mix);
    RUN(arenas_come_and_go_while_invocations_are_sent);
    /* the device that is none is memory with a lock in it: who is stopped may
     * hold it, which no device's user can */
    if ((t_transport() != RFM_TRANSPORT_VERBS) ||
        (getenv("RFM_NULL_DEVICE") == NULL)) {
        RUN(a_rank_that_is_stopped_holds_up_no_other);
    }
    RUN(a_worker_killed_while_a_rank_attaches_is_an_error_there);
    RUN(memory_is_there_though_a_worker_died_before_it_heard_of_it);
    RUN(a_worker_killed_while_a_kernel_is_shipped_loses_the_invocation);
    RUN(workers_killed_while_data_travels_lose_only_what_they_had);
    RUN(a_worker_killed_while_it_is_let_go_is_no_hang);
    RUN(one_rank_keeps_forty_workers_busy);
    RUN(one_worker_serves_sixty_four_ranks_in_four_processes);
    return t_finish();
}

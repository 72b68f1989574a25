/* Several ranks on one worker, and what either side leaves behind: nothing. */
#define _GNU_SOURCE
#include "harness.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frame.h"
#include "poller.h"

static struct t_worker worker;

/* Echoes on an invoker of its own, over this connection. */
static void be_a_rank(int fd, uint64_t seed, uint32_t rounds)
{
    struct rfm_invoker *inv = t_invoker(4, T_SLOT_BYTES, 20);
    struct t_random r = { seed };
    struct rfm_channel *chan;
    struct t_call calls[4];

    CHECK_OK(rfm_invoker_attach(inv, fd, 1, 1, T_FOREVER, &chan));
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t places[2] = { (uint32_t)t_below(&r, 3), (uint32_t)t_below(&r, 3) };
        uint64_t sizes[2] = { 100, 100 };

        t_call_make(&calls[i], inv, "echo", 1, 1, places, sizes);
    }
    for (uint64_t round = 0; round < rounds; round++) {
        for (uint64_t i = 0; i < 4; i++) {
            t_fill(t_in(&calls[i], 0), 100, seed * 1000000 + round + i);
            t_start(&calls[i]);
        }
        for (uint64_t i = 0; i < 4; i++) {
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
            CHECK(t_filled(t_out(&calls[i], 0), 100, seed * 1000000 + round + i));
        }
    }
    for (int i = 0; i < 4; i++) {
        t_call_end(&calls[i]);
    }
    t_invoker_end(inv);
}

static int rank_process(const uint64_t *args, const int *fds)
{
    be_a_rank(fds[0], args[0], (uint32_t)args[1]);
    return 0;
}

static void two_ranks_in_two_processes_get_their_own_results(void)
{
    uint64_t args[2][4] = { { 1, t_scaled(3000, 200) }, { 2, t_scaled(3000, 200) } };
    pid_t pids[2];

    t_worker_start(&worker, false, 20);
    for (int i = 0; i < 2; i++) {
        int fd = t_worker_dial(&worker);

        pids[i] = t_spawn(rank_process, args[i], &fd, 1);
        close(fd);
    }
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(t_reap(pids[i]), 0);
        (void)t_worker_expect(&worker, RFM_AGENT_GONE);
    }
    CHECK_EQ(worker.page->count, 8 * t_scaled(3000, 200));
    t_worker_end(&worker);
}

struct rank {
    pthread_t thread;
    uint64_t seed;
    int fd;
};

static void *rank_thread(void *arg)
{
    struct rank *rank = arg;

    be_a_rank(rank->fd, rank->seed, t_scaled(1500, 200));
    return NULL;
}

static void several_ranks_in_one_process_get_their_own_results(void)
{
    for (int in_thread = 0; in_thread < 2; in_thread++) {
        struct rank ranks[3];

        t_worker_start(&worker, in_thread != 0, 20);
        for (uint64_t i = 0; i < 3; i++) {
            ranks[i].seed = i;
            ranks[i].fd   = t_worker_dial(&worker);
            CHECK_EQ(pthread_create(&ranks[i].thread, NULL, rank_thread,
                                    &ranks[i]), 0);
        }
        for (int i = 0; i < 3; i++) {
            pthread_join(ranks[i].thread, NULL);
        }
        t_worker_end(&worker);
    }
}

/* --- rotation ------------------------------------------------------------- */

#define EACH 8

static uint64_t in_flight(struct rfm_channel *chan)
{
    struct rfm_channel_info info;

    rfm_channel_info(chan, &info);
    return info.in_flight;
}

/* While a gate holds the worker, both fill their slots; after it, they are
 * served in turn: each one's n-th is stamped right beside the other's n-th. */
static void ranks_are_served_in_rotation(void)
{
    struct rfm_invoker *inv[2];
    struct rfm_channel *chan[2];
    struct t_call calls[2][EACH];
    uint32_t places[2] = { RFM_BOUND, RFM_INLINE };
    uint64_t sizes[2] = { 64, 64 };
    uint32_t rounds = 5;

    t_worker_start(&worker, false, 20);
    for (int k = 0; k < 2; k++) {
        inv[k]  = t_invoker(16, T_SLOT_BYTES, 20);
        chan[k] = t_worker_attach(&worker, inv[k]);
        for (int i = 0; i < EACH; i++) {
            t_call_inline(&calls[k][i], inv[k], "stamp", 8, 8);
            memset(t_in(&calls[k][i], 0), 0, 8);
        }
        /* until it trusts its kernels to be short, it sends few ahead */
        for (bool ahead = false; !ahead;) {
            for (int i = 0; i < EACH; i++) {
                t_start(&calls[k][i]);
            }
            ahead = rfm_invoker_queued(inv[k]) == 0;
            for (int i = 0; i < EACH; i++) {
                CHECK_EQ(t_wait(&calls[k][i]), RFM_DONE);
            }
        }
    }
    for (uint32_t done = 0; done < rounds;) {
        uint64_t stamps[2][EACH];
        struct t_call gate;
        uint64_t queued;

        t_call_make(&gate, inv[0], "gate", 1, 1, places, sizes);
        memset(t_in(&gate, 0), 0, 64);
        t_start(&gate);
        while (rfm_load_acquire(&worker.page->id) != gate.req.id) {
            sched_yield();
        }
        for (int i = 0; i < EACH; i++) {
            for (int k = 0; k < 2; k++) {
                t_start(&calls[k][i]);
            }
        }
        queued = rfm_invoker_queued(inv[0]) + rfm_invoker_queued(inv[1]);
        if (queued == 0) {
            CHECK_EQ(in_flight(chan[0]), EACH + 1);
            CHECK_EQ(in_flight(chan[1]), EACH);
        }
        rfm_store_release((uint32_t *)t_in(&gate, 0), 1);
        CHECK_EQ(t_wait(&gate), RFM_DONE);
        t_call_end(&gate);
        for (int k = 0; k < 2; k++) {
            for (int i = 0; i < EACH; i++) {
                CHECK_EQ(t_wait(&calls[k][i]), RFM_DONE);
                memcpy(&stamps[k][i], t_out(&calls[k][i], 0), 8);
            }
        }
        if (queued != 0) {
            /* the gate took long and made this rank careful: trust again */
            for (int k = 0; k < 20 * EACH; k++) {
                CHECK_EQ(t_invoke(&calls[k % 2][k % EACH]), RFM_DONE);
            }
            continue;
        }
        for (int i = 0; i < EACH; i++) {
            int64_t apart = (int64_t)(stamps[0][i] - stamps[1][i]);

            CHECK((apart == 1) || (apart == -1));
            CHECK((i == 0) || (stamps[0][i] == stamps[0][i - 1] + 2));
        }
        done++;
    }
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < EACH; i++) {
            t_call_end(&calls[k][i]);
        }
        t_invoker_end(inv[k]);
    }
    t_worker_end(&worker);
}

/* --- how many ------------------------------------------------------------- */

static void a_worker_takes_64_ranks_and_refuses_one_more(void)
{
    struct rfm_invoker *inv = t_invoker(2, 256, 0);
    struct rfm_channel *chans[RFM_MAX_RANKS];
    struct rfm_channel *more;
    struct t_call calls[RFM_MAX_RANKS];

    t_worker_start(&worker, false, 0);
    for (uint32_t i = 0; i < RFM_MAX_RANKS; i++) {
        chans[i] = t_worker_attach(&worker, inv);
    }
    CHECK_EQ(rfm_invoker_attach(inv, t_worker_dial(&worker), 1, 1, T_FOREVER,
                                &more), RFM_ERR_NO_RESOURCE);
    for (uint32_t i = 0; i < RFM_MAX_RANKS; i++) {
        t_call_inline(&calls[i], inv, "echo", 40, 40);
        t_fill(t_in(&calls[i], 0), 40, i);
        t_start(&calls[i]);
    }
    for (uint32_t i = 0; i < RFM_MAX_RANKS; i++) {
        CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
        CHECK(t_filled(t_out(&calls[i], 0), 40, i));
        t_call_end(&calls[i]);
    }
    /* the refused one and a closed one make room */
    CHECK_EQ(t_worker_expect(&worker, RFM_AGENT_GONE), RFM_MAX_RANKS + 1);
    rfm_channel_close(chans[3]);
    CHECK_EQ(t_worker_expect(&worker, RFM_AGENT_GONE), 4);
    (void)t_worker_attach(&worker, inv);
    t_invoker_end(inv);
    t_worker_end(&worker);
}

/* More than there are places at once, in turn, and nothing piles up. */
static void an_invoker_outlives_any_number_of_channels(void)
{
    struct rfm_invoker *inv = t_invoker(2, 256, 0);
    uint32_t rounds = t_scaled(600, 300);
    uint32_t fds = 0;
    struct t_call call;

    t_worker_start(&worker, false, 0);
    t_call_inline(&call, inv, "echo", 40, 40);
    for (uint32_t i = 0; i < rounds; i++) {
        struct rfm_channel *chan = t_worker_attach(&worker, inv);
        struct rfm_channel_info info;

        t_fill(t_in(&call, 0), 40, i);
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), 40, i));
        rfm_channel_close(chan);
        CHECK_EQ(t_worker_expect(&worker, RFM_AGENT_GONE), i + 1);
        do {
            rfm_channel_info(chan, &info);
            sched_yield();
        } while (!info.fenced);
        if (i == 0) {
            fds = t_open_fds();
        }
    }
    CHECK_EQ(t_open_fds(), fds);
    t_call_end(&call);
    t_invoker_end(inv);
    t_worker_end(&worker);
}

/* --- ends ----------------------------------------------------------------- */

static uint32_t mappings_of(pid_t pid, const char *what)
{
    char line[512];
    uint32_t n = 0;
    FILE *maps;

    snprintf(line, sizeof(line), "/proc/%d/maps", (int)pid);
    maps = fopen(line, "re");
    CHECK(maps != NULL);
    while (fgets(line, sizeof(line), maps) != NULL) {
        n += strstr(line, what) != NULL;
    }
    fclose(maps);
    return n;
}

static int doomed_rank(const uint64_t *args, const int *fds)
{
    struct rfm_invoker *inv = t_invoker(4, T_SLOT_BYTES, 0);
    struct rfm_channel *chan;
    struct t_call calls[6];
    uint32_t *told = t_map(fds[1], 4096);

    CHECK_OK(rfm_invoker_attach(inv, fds[0], 1, 1, T_FOREVER, &chan));
    for (uint64_t i = 0; i < 6; i++) {
        uint32_t places[2] = { RFM_CALL, RFM_BOUND };
        uint64_t sizes[2] = { 8, 8 };
        uint64_t us = args[0];

        t_call_make(&calls[i], inv, "nap", 1, 1, places, sizes);
        memcpy(t_in(&calls[i], 0), &us, 8);
    }
    for (;;) {
        for (int i = 0; i < 6; i++) {
            t_start(&calls[i]);
        }
        rfm_store_release(told, 1);
        for (int i = 0; i < 6; i++) {
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
        }
    }
    return 0;
}

static void a_killed_rank_leaves_nothing_at_the_worker(void)
{
    struct rfm_invoker *inv;
    struct t_random r = { 3 };
    struct t_call call;
    uint32_t rounds = t_scaled(60, 6);

    t_worker_start(&worker, false, 0);
    inv = t_invoker(2, T_SLOT_BYTES, 0);
    (void)t_worker_attach(&worker, inv);
    t_call_inline(&call, inv, "echo", 40, 40);
    for (uint32_t i = 0; i < rounds; i++) {
        uint64_t args[4] = { t_below(&r, 300) };
        int fds[2] = { t_worker_dial(&worker), -1 };
        uint32_t *told = t_shared(4096, &fds[1]);
        pid_t pid = t_spawn(doomed_rank, args, fds, 2);

        (void)t_await_not(told, 0);
        for (volatile uint64_t n = t_below(&r, 100000); n > 0; n--) {
        }
        t_kill(pid, SIGKILL);
        CHECK_EQ(t_reap(pid), SIGKILL);
        close(fds[0]);
        CHECK_EQ(t_worker_expect(&worker, RFM_AGENT_GONE), i + 2);
        CHECK_EQ(mappings_of(worker.pid, "rfaas-channel"), 1);
        CHECK_EQ(mappings_of(worker.pid, "rfaas-arena"), 0);
        t_unshare(told, 4096, fds[1]);
        /* the other rank doesn't notice */
        t_fill(t_in(&call, 0), 40, i);
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), 40, i));
    }
    t_call_end(&call);
    t_invoker_end(inv);
    t_worker_end(&worker);
}

static void a_worker_ends_with_its_agent(void)
{
    struct rfm_invoker *inv;
    struct t_call call;

    t_worker_start(&worker, false, 50);
    inv = t_invoker(2, T_SLOT_BYTES, 50);
    (void)t_worker_attach(&worker, inv);
    t_call_inline(&call, inv, "stuck", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    t_start(&call);
    while (rfm_load_acquire(&worker.page->id) == 0) {
        sched_yield();
    }
    /* even in the middle of a kernel */
    CHECK(shutdown(worker.agent_fd, SHUT_RDWR) == 0);
    CHECK_EQ(t_wait(&call), RFM_LOST);
    t_call_end(&call);
    t_invoker_end(inv);
    CHECK_EQ(t_worker_bury(&worker), 0);
}

static void a_worker_that_is_told_to_quit_ends_after_its_kernel(void)
{
    uint32_t places[2] = { RFM_BOUND, RFM_BOUND };
    uint64_t sizes[2] = { 64, 64 };
    struct rfm_invoker *inv;
    struct t_call call;

    t_worker_start(&worker, false, 50);
    inv = t_invoker(2, T_SLOT_BYTES, 50);
    (void)t_worker_attach(&worker, inv);
    t_call_make(&call, inv, "gate", 1, 1, places, sizes);
    memset(t_in(&call, 0), 0, 64);
    t_start(&call);
    while (rfm_load_acquire(&worker.page->id) == 0) {
        sched_yield();
    }
    CHECK_OK(rfm_frame_send(worker.agent_fd, RFM_AGENT_QUIT, 0, NULL, 0, NULL, 0));
    rfm_store_release((uint32_t *)t_in(&call, 0), 1);
    CHECK_EQ(t_wait(&call), RFM_DONE);
    CHECK_EQ(t_worker_bury(&worker), 0);
    t_call_end(&call);
    t_invoker_end(inv);
}

static void connections_that_are_adopted_and_never_used_leave_nothing(void)
{
    struct rfm_invoker *inv;
    int fds[10];

    t_worker_start(&worker, false, 0);
    for (int i = 0; i < 10; i++) {
        fds[i] = t_worker_dial(&worker);
    }
    for (int i = 0; i < 5; i++) {
        close(fds[i]);
        CHECK_EQ(t_worker_expect(&worker, RFM_AGENT_GONE), i + 1);
    }
    /* it sees the rest only when it ends: a leak would be its exit status */
    inv = t_invoker(2, 256, 0);
    (void)t_worker_attach(&worker, inv);
    t_invoker_end(inv);
    t_worker_end(&worker);
    for (int i = 5; i < 10; i++) {
        close(fds[i]);
    }
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(two_ranks_in_two_processes_get_their_own_results);
    RUN(several_ranks_in_one_process_get_their_own_results);
    RUN(ranks_are_served_in_rotation);
    RUN(a_worker_takes_64_ranks_and_refuses_one_more);
    RUN(an_invoker_outlives_any_number_of_channels);
    RUN(a_killed_rank_leaves_nothing_at_the_worker);
    RUN(a_worker_ends_with_its_agent);
    RUN(a_worker_that_is_told_to_quit_ends_after_its_kernel);
    RUN(connections_that_are_adopted_and_never_used_leave_nothing);
    return t_finish();
}

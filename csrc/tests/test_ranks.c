/* Several ranks on one worker, and what either side leaves behind: nothing.
 * Run over every transport. */
#define _GNU_SOURCE
#include "harness.h"

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frame.h"
#include "poller.h"

static struct t_worker worker;

/* Echoes on an invoker of its own, over this connection. */
static void be_a_rank(const struct rfm_attach_attr *attr, uint64_t seed,
                      uint32_t rounds)
{
    struct rfm_invoker *inv = t_invoker(4, T_SLOT_BYTES, 20);
    struct t_random r = { seed };
    struct t_call calls[4];

    (void)t_attach(inv, attr);
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
    struct rfm_attach_attr attr = t_dialled(fds);

    be_a_rank(&attr, args[0], (uint32_t)args[1]);
    return 0;
}

static void two_ranks_in_two_processes_get_their_own_results(void)
{
    uint64_t args[2][4] = { { 1, t_scaled(3000, 200) }, { 2, t_scaled(3000, 200) } };
    pid_t pids[2];

    t_worker_start(&worker, false, 20);
    for (int i = 0; i < 2; i++) {
        struct rfm_attach_attr attr = t_dial(&worker, t_transport());
        int fds[2];
        uint32_t n = t_dial_fds(&attr, fds);

        pids[i] = t_spawn(rank_process, args[i], fds, n);
        t_hang_up(&attr);
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
    struct rfm_attach_attr attr;
};

static void *rank_thread(void *arg)
{
    struct rank *rank = arg;

    be_a_rank(&rank->attr, rank->seed, t_scaled(1500, 200));
    return NULL;
}

static void several_ranks_in_one_process_get_their_own_results(void)
{
    for (int in_thread = 0; in_thread < 2; in_thread++) {
        struct rank ranks[3];

        t_worker_start(&worker, in_thread != 0, 20);
        for (uint64_t i = 0; i < 3; i++) {
            ranks[i].seed = i;
            ranks[i].attr = t_dial(&worker, t_transport());
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

/* Two ranks that fill their slots while a gate of another one holds the worker,
 * and how their calls were stamped. */
struct contest {
    struct rfm_invoker *inv[3];
    struct rfm_channel *chan[3];
    struct t_call calls[2][EACH];
    uint64_t stamps[2][EACH];
    uint64_t took[2];           /* ns, of all kernels of a rank */
    uint64_t held;              /* by the gate */
};

static void contest_begin(struct contest *c)
{
    t_worker_start(&worker, false, 20);
    for (int k = 0; k < 3; k++) {
        c->inv[k]  = t_invoker(16, T_SLOT_BYTES, 20);
        c->chan[k] = t_worker_attach(&worker, c->inv[k]);
    }
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < EACH; i++) {
            t_call_inline(&c->calls[k][i], c->inv[k], "stamp", 8, 8);
            memset(t_in(&c->calls[k][i], 0), 0, 8);
        }
        /* until it trusts its kernels to be short, it sends few ahead */
        for (bool ahead = false; !ahead;) {
            for (int i = 0; i < EACH; i++) {
                t_start(&c->calls[k][i]);
            }
            ahead = rfm_invoker_queued(c->inv[k]) == 0;
            for (int i = 0; i < EACH; i++) {
                CHECK_EQ(t_wait(&c->calls[k][i]), RFM_DONE);
            }
        }
    }
}

/* The gate is `holder`'s and holds for so long. false: a rank was careful, and
 * did not fill its slots. */
static bool contest_round(struct contest *c, uint32_t holder, uint64_t hold_ns)
{
    struct t_gate gate;
    uint64_t begin;
    uint64_t queued;

    t_gate_shut(&gate, &worker, c->inv[holder]);
    t_gate_runs(&gate);
    begin = rfm_now_ns();
    for (int i = 0; i < EACH; i++) {
        for (int k = 0; k < 2; k++) {
            t_start(&c->calls[k][i]);
        }
    }
    queued = rfm_invoker_queued(c->inv[0]) + rfm_invoker_queued(c->inv[1]);
    if (queued == 0) {
        CHECK_EQ(in_flight(c->chan[0]), EACH + (holder == 0));
        CHECK_EQ(in_flight(c->chan[1]), EACH);
    }
    while (rfm_now_ns() - begin < hold_ns) {
        sched_yield();
    }
    c->held = rfm_now_ns() - begin;
    t_gate_open(&gate);
    for (int k = 0; k < 2; k++) {
        c->took[k] = 0;
        for (int i = 0; i < EACH; i++) {
            CHECK_EQ(t_wait(&c->calls[k][i]), RFM_DONE);
            memcpy(&c->stamps[k][i], t_out(&c->calls[k][i], 0), 8);
            c->took[k] += c->calls[k][i].req.exec_ns;
        }
    }
    if (queued != 0) {
        /* the gate took long and made this rank careful: trust again */
        for (int k = 0; k < 20 * EACH; k++) {
            CHECK_EQ(t_invoke(&c->calls[k % 2][k / 2 % EACH]), RFM_DONE);
        }
    }
    return queued == 0;
}

static void contest_end(struct contest *c)
{
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < EACH; i++) {
            t_call_end(&c->calls[k][i]);
        }
    }
    for (int k = 0; k < 3; k++) {
        t_invoker_end(c->inv[k]);
    }
    t_worker_end(&worker);
}

/* Each one's n-th is stamped right beside the other's n-th; but for rounds in
 * which the machine had one of them take long, which counts. */
static void ranks_are_served_in_rotation(void)
{
    struct contest c;
    uint32_t done = 0;

    contest_begin(&c);
    for (uint32_t i = 0; done < 5; i++) {
        bool in_turn = contest_round(&c, 2, 0);

        CHECK(i < 100000);
        for (int n = 0; n < EACH; n++) {
            int64_t apart = (int64_t)(c.stamps[0][n] - c.stamps[1][n]);

            in_turn = in_turn && ((apart == 1) || (apart == -1)) &&
                      ((n == 0) ||
                       (c.stamps[0][n] == c.stamps[0][n - 1] + 2));
        }
        done += in_turn;
    }
    contest_end(&c);
}

static void whose_kernel_took_long_waits_for_the_others(void)
{
    struct contest c;
    uint32_t done = 0;

    contest_begin(&c);
    for (uint32_t i = 0; done < 5; i++) {
        CHECK(i < 10000);
        if (!contest_round(&c, 0, 5000000) || (c.took[1] > c.held / 2)) {
            continue;           /* the machine had the other one take long, too */
        }
        for (int n = 0; n < EACH; n++) {
            CHECK(c.stamps[1][n] < c.stamps[0][0]);
        }
        done++;
    }
    contest_end(&c);
}

/* --- how many ------------------------------------------------------------- */

static void a_worker_takes_64_ranks_and_refuses_one_more(void)
{
    struct rfm_invoker *inv = t_invoker(2, 256, 0);
    struct rfm_channel *chans[RFM_MAX_RANKS];
    struct t_call calls[RFM_MAX_RANKS];
    struct rfm_channel *more;
    struct rfm_attach_attr attr;

    t_worker_start(&worker, false, 0);
    for (uint32_t i = 0; i < RFM_MAX_RANKS; i++) {
        chans[i] = t_worker_attach(&worker, inv);
    }
    attr = t_dial(&worker, t_transport());
    CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &more), RFM_ERR_NO_RESOURCE);
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

/* What a worker has of its ranks. */
struct holdings {
    uint32_t fds;
    uint32_t segments;
    uint32_t arenas;            /* mapped, or mirrored */
};

static struct holdings holdings_of(pid_t pid)
{
    struct holdings h = { 0 };
    char line[512];
    DIR *dir;
    FILE *maps;

    snprintf(line, sizeof(line), "/proc/%d/fd", (int)pid);
    dir = opendir(line);
    CHECK(dir != NULL);
    while (readdir(dir) != NULL) {
        h.fds++;
    }
    closedir(dir);
    snprintf(line, sizeof(line), "/proc/%d/maps", (int)pid);
    maps = fopen(line, "re");
    CHECK(maps != NULL);
    while (fgets(line, sizeof(line), maps) != NULL) {
        unsigned long from;
        unsigned long to;
        char mode[8];

        CHECK(sscanf(line, "%lx-%lx %7s", &from, &to, mode) == 3);
        h.segments += strstr(line, "rfaas-channel") != NULL;
        /* a mirror has no name, but the size of an executor's first arena */
        h.arenas += (strstr(line, "rfaas-arena") != NULL) ||
                    ((to - from == (4u << 20)) && (strcmp(mode, "rw-p") == 0));
    }
    fclose(maps);
    return h;
}

static int doomed_rank(const uint64_t *args, const int *fds)
{
    struct rfm_invoker *inv = t_invoker(4, T_SLOT_BYTES, 0);
    struct rfm_attach_attr attr = t_dialled(fds + 1);
    struct t_call calls[6];
    uint32_t *told = t_map(fds[0], 4096);

    (void)t_attach(inv, &attr);
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
        for (int i = 0; i < 6; i++) {
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
        }
        rfm_store_release(told, 1);
    }
    return 0;
}

static void a_killed_rank_leaves_nothing_at_the_worker(void)
{
    struct rfm_invoker *inv;
    struct t_random r = { 3 };
    struct holdings before;
    struct t_call call;
    uint32_t rounds = t_scaled(60, 6);

    t_worker_start(&worker, false, 0);
    inv = t_invoker(2, T_SLOT_BYTES, 0);
    (void)t_worker_attach(&worker, inv);
    t_call_inline(&call, inv, "echo", 40, 40);
    CHECK_EQ(t_invoke(&call), RFM_DONE);
    before = holdings_of(worker.pid);
    for (uint32_t i = 0; i < rounds; i++) {
        struct rfm_attach_attr attr = t_dial(&worker, t_transport());
        uint64_t args[4] = { t_below(&r, 300) };
        struct holdings after;
        uint32_t *told;
        int fds[3];
        uint32_t n = t_dial_fds(&attr, fds + 1);
        pid_t pid;

        told = t_shared(4096, &fds[0]);
        pid  = t_spawn(doomed_rank, args, fds, n + 1);
        t_hang_up(&attr);
        (void)t_await_not(told, 0);
        CHECK_EQ(holdings_of(worker.pid).arenas, before.arenas + 1);
        for (volatile uint64_t k = t_below(&r, 100000); k > 0; k--) {
        }
        t_kill(pid, SIGKILL);
        CHECK_EQ(t_reap(pid), SIGKILL);
        CHECK_EQ(t_worker_expect(&worker, RFM_AGENT_GONE), i + 2);
        after = holdings_of(worker.pid);
        CHECK_EQ(after.fds, before.fds);
        CHECK_EQ(after.segments, t_remote() ? 0 : 1);
        CHECK_EQ(after.arenas, before.arenas);
        t_unshare(told, 4096, fds[0]);
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
    t_worker_runs(&worker, &call.req);
    /* even in the middle of a kernel */
    CHECK(shutdown(worker.agent_fd, SHUT_RDWR) == 0);
    CHECK_EQ(t_wait(&call), RFM_LOST);
    t_call_end(&call);
    t_invoker_end(inv);
    CHECK_EQ(t_worker_bury(&worker), 0);
}

static void a_worker_that_is_told_to_quit_ends_after_its_kernel(void)
{
    struct rfm_invoker *inv;
    struct t_gate gate;

    t_worker_start(&worker, false, 50);
    inv = t_invoker(2, T_SLOT_BYTES, 50);
    (void)t_worker_attach(&worker, inv);
    t_gate_shut(&gate, &worker, inv);
    t_gate_runs(&gate);
    CHECK_OK(rfm_frame_send(worker.agent_fd, RFM_AGENT_QUIT, 0, NULL, 0, NULL, 0));
    t_gate_open(&gate);
    CHECK_EQ(t_worker_bury(&worker), 0);
    t_invoker_end(inv);
}

static void connections_that_are_adopted_and_never_used_leave_nothing(void)
{
    struct rfm_attach_attr attrs[10];
    struct rfm_invoker *inv;

    t_worker_start(&worker, false, 0);
    for (int i = 0; i < 10; i++) {
        attrs[i] = t_dial(&worker, t_transport());
    }
    for (int i = 0; i < 5; i++) {
        t_hang_up(&attrs[i]);
        CHECK_EQ(t_worker_expect(&worker, RFM_AGENT_GONE), i + 1);
    }
    /* it sees the rest only when it ends: a leak would be its exit status */
    inv = t_invoker(2, 256, 0);
    (void)t_worker_attach(&worker, inv);
    t_invoker_end(inv);
    t_worker_end(&worker);
    for (int i = 5; i < 10; i++) {
        t_hang_up(&attrs[i]);
    }
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(two_ranks_in_two_processes_get_their_own_results);
    RUN(several_ranks_in_one_process_get_their_own_results);
    RUN(ranks_are_served_in_rotation);
    RUN(whose_kernel_took_long_waits_for_the_others);
    RUN(a_worker_takes_64_ranks_and_refuses_one_more);
    RUN(an_invoker_outlives_any_number_of_channels);
    RUN(a_killed_rank_leaves_nothing_at_the_worker);
    RUN(a_worker_ends_with_its_agent);
    RUN(a_worker_that_is_told_to_quit_ends_after_its_kernel);
    RUN(connections_that_are_adopted_and_never_used_leave_nothing);
    return t_finish();
}

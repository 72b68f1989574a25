/* A worker elsewhere is sent a constant once, and again only after it had to let
 * go of it; whatever comes and goes meanwhile, a kernel sees its values. Run over
 * every transport. */
#define _GNU_SOURCE
#include "harness.h"

#include <pthread.h>

#include "known.h"
#include "pages.h"

#define BYTES   (5 * RFM_PAGE_SIZE + 100)
#define CALLS   6u
#define THREADS 3u

/* --- which one goes -------------------------------------------------------- */

static struct rfm_constant constant(uint32_t serial, uint64_t size)
{
    return (struct rfm_constant){ .serial = serial, .size = size };
}

static void learn(struct rfm_known *known, uint32_t serial, uint64_t size,
                  uint64_t ticket)
{
    struct rfm_constant one = constant(serial, size);

    CHECK_OK(rfm_known_add(known, &one, ticket));
}

/* the serial of what goes, or -1 */
static int64_t evict(struct rfm_known *known, uint64_t limit, uint64_t tail)
{
    struct rfm_constant gone;

    return rfm_known_evict(known, limit, tail, &gone) ? (int64_t)gone.serial : -1;
}

static void what_was_not_used_for_longest_goes_until_the_rest_fits(void)
{
    struct rfm_known known = { 0 };

    for (uint32_t i = 0; i < 5; i++) {
        learn(&known, i, 10, i);
    }
    CHECK(rfm_known_use(&known, 0, 5));
    CHECK_EQ(evict(&known, 30, 9), 1);
    CHECK_EQ(evict(&known, 30, 9), 2);
    CHECK_EQ(evict(&known, 30, 9), -1);
    CHECK_EQ(known.bytes, 30);
    CHECK(!rfm_known_use(&known, 1, 6));
    CHECK(rfm_known_use(&known, 3, 6));
    CHECK_EQ(evict(&known, 1, 9), 4);
    CHECK_EQ(evict(&known, 1, 9), 0);
    CHECK_EQ(evict(&known, 1, 9), 3);
    CHECK_EQ(evict(&known, 1, 9), -1);
    rfm_known_fini(&known);
}

static void what_a_call_in_flight_uses_stays(void)
{
    struct rfm_known known = { 0 };

    learn(&known, 7, 10, 3);
    learn(&known, 8, 10, 4);
    CHECK_EQ(evict(&known, 1, 3), -1);
    CHECK_EQ(evict(&known, 1, 4), 7);
    CHECK_EQ(evict(&known, 1, 4), -1);
    /* the later ticket counts, whoever looks first */
    CHECK(rfm_known_use(&known, 8, 6));
    CHECK(rfm_known_use(&known, 8, 5));
    CHECK_EQ(evict(&known, 1, 6), -1);
    CHECK_EQ(evict(&known, 1, 7), 8);
    rfm_known_fini(&known);
}

static void without_a_limit_all_stay(void)
{
    struct rfm_known known = { 0 };

    learn(&known, 0, 1ull << 40, 0);
    CHECK_EQ(evict(&known, 0, 9), -1);
    rfm_known_fini(&known);
}

static void what_is_no_constant_any_more_is_not_let_go_of(void)
{
    struct rfm_known known = { 0 };

    for (uint32_t i = 0; i < 100; i++) {
        learn(&known, 3 * i, 10, i);
        rfm_known_drop(&known, 3 * i);
        rfm_known_drop(&known, 3 * i);
        rfm_known_drop(&known, 5000);
    }
    CHECK_EQ(known.bytes, 0);
    CHECK_EQ(evict(&known, 1, 999), -1);
    learn(&known, 1, 10, 0);
    CHECK_EQ(evict(&known, 1, 1), 1);
    rfm_known_fini(&known);
}

/* --- at a worker ------------------------------------------------------------ */

static struct t_worker worker;
static struct rfm_invoker *inv;

static void up(uint64_t limit)
{
    inv = t_invoker(T_SLOTS, T_SLOT_BYTES, 20);
    rfm_invoker_limit_constants(inv, limit);
    t_worker_start(&worker, false, 20);
    (void)t_worker_attach(&worker, inv);
}

static void down(void)
{
    t_invoker_end(inv);
    t_worker_end(&worker);
}

static bool evicts(void)
{
    return t_transport() == RFM_TRANSPORT_TCP;
}

/* its input is a constant if `freeze` */
static void make(struct t_call *call, uint64_t bytes, uint64_t seed, bool freeze)
{
    uint32_t places[2] = { RFM_CALL, RFM_BOUND };
    uint64_t sizes[2] = { bytes, bytes };

    t_call_make(call, inv, "echo", 1, 1, places, sizes);
    t_fill(t_in(call, 0), bytes, seed);
    if (freeze) {
        CHECK_OK(rfm_heap_constant(&call->blocks[0]));
    }
}

static void check(struct t_call *call, uint64_t bytes, uint64_t seed)
{
    CHECK_EQ(t_wait(call), RFM_DONE);
    CHECK(t_filled(t_out(call, 0), bytes, seed));
    memset(t_out(call, 0), 0, bytes);
}

static uint64_t sent(void)
{
    uint64_t n;
    uint64_t dropped;

    rfm_invoker_constants(inv, &n, &dropped);
    return n;
}

static uint64_t dropped(void)
{
    uint64_t n;
    uint64_t out;

    rfm_invoker_constants(inv, &n, &out);
    return out;
}

static void a_constant_is_sent_once_and_again_after_it_was_let_go(void)
{
    struct t_call calls[4];

    up(2 * BYTES);
    for (uint32_t i = 0; i < 4; i++) {
        make(&calls[i], BYTES, i, true);
    }
    for (uint32_t turn = 0; turn < 3; turn++) {
        for (uint32_t i = 0; i < 2; i++) {
            t_start(&calls[i]);
            check(&calls[i], BYTES, i);
        }
    }
    CHECK_EQ(sent(), t_remote() ? 2 * BYTES : 0);
    CHECK_EQ(dropped(), 0);
    for (uint32_t turn = 0; turn < 3; turn++) {
        for (uint32_t i = 0; i < 4; i++) {
            t_start(&calls[i]);
            check(&calls[i], BYTES, i);
        }
    }
    if (evicts()) {
        /* of four in turn none is there any more when it is used again; but the
         * first round found the first two */
        CHECK_EQ(sent(), (2 + 2 + 4 + 4) * BYTES);
        CHECK_EQ(dropped(), (2 + 4 + 4) * BYTES);
    } else {
        CHECK_EQ(sent(), t_remote() ? 4 * BYTES : 0);
        CHECK_EQ(dropped(), 0);
    }
    for (uint32_t i = 0; i < 4; i++) {
        t_call_end(&calls[i]);
    }
    down();
}

static void one_that_is_larger_than_the_limit_is_sent_once_while_it_is_used(void)
{
    struct t_call call;

    up(RFM_PAGE_SIZE);
    make(&call, BYTES, 1, true);
    for (uint32_t turn = 0; turn < 20; turn++) {
        t_start(&call);
        check(&call, BYTES, 1);
    }
    CHECK_EQ(sent(), t_remote() ? BYTES : 0);
    t_call_end(&call);
    down();
}

struct user {
    pthread_t thread;
    uint64_t  seed;
    uint32_t  rounds;
};

/* Constants and others, of several sizes, in flight together; each of them goes
 * now and then, and something else comes to be where it was. */
static void *come_and_go(void *arg)
{
    struct user *user = arg;
    struct t_random r = { user->seed };
    struct t_call calls[CALLS];
    uint64_t bytes[CALLS];
    uint64_t seeds[CALLS];
    uint64_t next = user->seed << 32;

    for (uint32_t i = 0; i < CALLS; i++) {
        bytes[i] = 1 + t_below(&r, 8 * RFM_PAGE_SIZE);
        seeds[i] = next++;
        make(&calls[i], bytes[i], seeds[i], true);
    }
    for (uint32_t round = 0; round < user->rounds; round++) {
        uint32_t first = (uint32_t)t_below(&r, CALLS);
        uint32_t n = 1 + (uint32_t)t_below(&r, CALLS);
        uint32_t gone = (uint32_t)t_below(&r, CALLS);

        for (uint32_t i = 0; i < n; i++) {
            t_start(&calls[(first + i) % CALLS]);
        }
        for (uint32_t i = 0; i < n; i++) {
            uint32_t k = (first + i) % CALLS;

            check(&calls[k], bytes[k], seeds[k]);
        }
        if (t_below(&r, 2) == 0) {
            t_call_end(&calls[gone]);
            bytes[gone] = 1 + t_below(&r, 8 * RFM_PAGE_SIZE);
            seeds[gone] = next++;
            make(&calls[gone], bytes[gone], seeds[gone], t_below(&r, 4) != 0);
        }
    }
    for (uint32_t i = 0; i < CALLS; i++) {
        t_call_end(&calls[i]);
    }
    return NULL;
}

static void kernels_see_their_values_whatever_comes_and_goes(void)
{
    struct user users[THREADS];

    up(6 * BYTES);
    for (uint32_t i = 0; i < THREADS; i++) {
        users[i] = (struct user){ .seed = i + 1, .rounds = t_scaled(1500, 100) };
        CHECK_EQ(pthread_create(&users[i].thread, NULL, come_and_go, &users[i]),
                 0);
    }
    for (uint32_t i = 0; i < THREADS; i++) {
        pthread_join(users[i].thread, NULL);
    }
    CHECK_EQ(dropped() != 0, evicts());
    down();
}

/* The arena of a large one goes with it, on another way than what was said of it. */
static void one_with_an_arena_of_its_own_may_go_at_any_time(void)
{
    uint64_t large = 65u << 20;
    struct t_call calls[2];

    up(RFM_PAGE_SIZE);
    make(&calls[1], BYTES, 5, true);
    for (uint32_t turn = 0; turn < 3; turn++) {
        make(&calls[0], large, turn, true);
        t_start(&calls[0]);
        check(&calls[0], large, turn);
        t_start(&calls[1]);     /* lets go of the large one */
        check(&calls[1], BYTES, 5);
        t_call_end(&calls[0]);
        t_start(&calls[1]);
        check(&calls[1], BYTES, 5);
    }
    t_call_end(&calls[1]);
    down();
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 100);
    RUN(what_was_not_used_for_longest_goes_until_the_rest_fits);
    RUN(what_a_call_in_flight_uses_stays);
    RUN(without_a_limit_all_stay);
    RUN(what_is_no_constant_any_more_is_not_let_go_of);
    RUN(a_constant_is_sent_once_and_again_after_it_was_let_go);
    RUN(one_that_is_larger_than_the_limit_is_sent_once_while_it_is_used);
    RUN(kernels_see_their_values_whatever_comes_and_goes);
    RUN(one_with_an_arena_of_its_own_may_go_at_any_time);
    return t_finish();
}

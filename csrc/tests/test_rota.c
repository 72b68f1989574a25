/* Ranks that share a worker have as much of its time as each other, whatever
 * their kernels take. */
#define _GNU_SOURCE
#include "harness.h"

#include "rota.h"

#define SLACK   20u
#define RANKS   8u

struct rank {
    struct rfm_had had;
    uint64_t cost;              /* of a call; varied by up to as much again */
    uint64_t served;            /* time, in all */
    uint64_t calls;
    bool     wants;
};

/* One look, as the worker's: the number of who was served, or n. */
static uint32_t serve_one(struct rfm_rota *rota, struct rank *ranks, uint32_t n,
                          uint32_t *turn, uint64_t cost)
{
    uint32_t at = *turn;

    rfm_rota_begin(rota);
    do {
        for (uint32_t k = 0; k < n; k++) {
            struct rank *r;

            if (at >= n) {
                at = 0;
            }
            r = &ranks[at++];
            if (!rfm_rota_is_due(rota, &r->had) || !r->wants) {
                continue;
            }
            rfm_rota_charge(rota, &r->had, cost + r->cost);
            r->served += cost + r->cost;
            r->calls++;
            *turn = at;
            return (uint32_t)(r - ranks);
        }
    } while (rfm_rota_rise(rota));
    return n;
}

static void equal_demand_is_served_in_rotation(void)
{
    struct rank ranks[4] = { 0 };
    struct rfm_rota rota = { .slack = SLACK };
    uint32_t turn = 0;

    for (uint32_t i = 0; i < 4; i++) {
        ranks[i].cost  = 7;
        ranks[i].wants = true;
    }
    for (uint32_t i = 0; i < 400; i++) {
        CHECK_EQ(serve_one(&rota, ranks, 4, &turn, 0), i % 4);
    }
}

static void time_is_shared_equally_whatever_a_call_costs(void)
{
    struct t_random random = { 0 };
    struct rank ranks[RANKS];
    struct rfm_rota rota;

    for (uint32_t trial = 0; trial < 200; trial++) {
        uint32_t n = 2 + (uint32_t)t_below(&random, RANKS - 1);
        uint64_t most = 0;
        uint64_t least = UINT64_MAX;
        uint64_t dearest = 0;
        uint32_t turn = 0;

        memset(&ranks, 0, sizeof(ranks));
        memset(&rota, 0, sizeof(rota));
        rota.slack = SLACK;
        for (uint32_t i = 0; i < n; i++) {
            ranks[i].cost  = 1 + t_below(&random, 1000);
            ranks[i].wants = true;
            dearest = (ranks[i].cost > dearest) ? ranks[i].cost : dearest;
        }
        for (uint32_t i = 0; i < 20000; i++) {
            CHECK(serve_one(&rota, ranks, n, &turn,
                            t_below(&random, 10)) < n);
        }
        for (uint32_t i = 0; i < n; i++) {
            most  = (ranks[i].served > most) ? ranks[i].served : most;
            least = (ranks[i].served < least) ? ranks[i].served : least;
        }
        CHECK(most - least <= dearest + 10 + SLACK);
    }
}

static void who_comes_back_has_no_claim_to_the_time_that_it_did_not_use(void)
{
    struct rank ranks[2] = { { .cost = 5, .wants = true },
                             { .cost = 50, .wants = true } };
    struct rfm_rota rota = { .slack = SLACK };
    uint64_t before[2];
    uint32_t turn = 0;

    for (uint32_t i = 0; i < 100; i++) {
        (void)serve_one(&rota, ranks, 2, &turn, 0);
    }
    ranks[0].wants = false;
    for (uint32_t i = 0; i < 1000; i++) {
        CHECK_EQ(serve_one(&rota, ranks, 2, &turn, 0), 1);
    }
    ranks[0].wants = true;
    before[0] = ranks[0].served;
    before[1] = ranks[1].served;
    for (uint32_t i = 0; i < 1100; i++) {
        (void)serve_one(&rota, ranks, 2, &turn, 0);
    }
    before[0] = ranks[0].served - before[0];
    before[1] = ranks[1].served - before[1];
    CHECK(before[0] <= before[1] + 2 * (50 + SLACK));
    CHECK(before[1] <= before[0] + 2 * (50 + SLACK));
}

static void whoever_wants_something_is_found_in_one_look(void)
{
    struct t_random random = { 0 };
    struct rank ranks[RANKS] = { 0 };
    struct rfm_rota rota = { .slack = SLACK };
    uint32_t turn = 0;

    for (uint32_t i = 0; i < RANKS; i++) {
        ranks[i].cost = 1 + i * i;
    }
    for (uint32_t i = 0; i < 100000; i++) {
        uint32_t wanting = 0;
        uint32_t found;

        for (uint32_t r = 0; r < RANKS; r++) {
            ranks[r].wants = t_below(&random, 4) == 0;
            wanting += ranks[r].wants;
        }
        found = serve_one(&rota, ranks, RANKS, &turn, 0);
        CHECK((found < RANKS) == (wanting > 0));
        CHECK((found == RANKS) || ranks[found].wants);
    }
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(equal_demand_is_served_in_rotation);
    RUN(time_is_shared_equally_whatever_a_call_costs);
    RUN(who_comes_back_has_no_claim_to_the_time_that_it_did_not_use);
    RUN(whoever_wants_something_is_found_in_one_look);
    return t_finish();
}

/* A worker that spins, and has nothing to run, leaves its core now and then to
 * the thread that receives for it. Run over every transport. */
#define _GNU_SOURCE
#include "harness.h"

#include <sched.h>
#include <time.h>

#include "invoker.h"

#define SPINS_US 600000000u     /* longer than this test may take: it never sleeps */

static uint32_t n_yields;

/* libc's, for all that this program is linked from. */
int sched_yield(void)
{
    __atomic_fetch_add(&n_yields, 1, __ATOMIC_RELAXED);
    return 0;
}

static void wait_for_yields(uint32_t more)
{
    const struct timespec ms = { .tv_nsec = 1000000 };
    uint32_t until = __atomic_load_n(&n_yields, __ATOMIC_RELAXED) + more;

    while ((int32_t)(__atomic_load_n(&n_yields, __ATOMIC_RELAXED) - until) < 0) {
        nanosleep(&ms, NULL);
    }
}

static void who_waits_yields_and_still_runs_what_comes(void)
{
    struct t_worker worker;
    struct rfm_invoker *inv;
    struct t_call call;

    t_worker_start(&worker, true, SPINS_US);
    wait_for_yields(3);         /* nobody is there yet */
    inv = t_invoker(2, T_SLOT_BYTES, 0);
    (void)t_worker_attach(&worker, inv);
    t_call_inline(&call, inv, "echo", 8, 8);
    for (uint64_t seed = 1; seed <= 20; seed++) {
        wait_for_yields(2);     /* between calls */
        t_fill(t_in(&call, 0), 8, seed);
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), 8, seed));
    }
    t_call_end(&call);
    t_invoker_end(inv);
    t_worker_end(&worker);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(who_waits_yields_and_still_runs_what_comes);
    return t_finish();
}

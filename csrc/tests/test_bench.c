/* The bare processes answer, end, and refuse; see rfm_bench.h. */
#define _GNU_SOURCE
#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rfm_bench.h"

static void every_armed_call_is_answered_in_every_mode(void)
{
    struct rfm_bench *bench;
    int64_t           samples[8];

    assert(rfm_bench_open(4096, -1, &bench) == RFM_BENCH_OK);
    for (int mode = RFM_BENCH_MAILBOX; mode <= RFM_BENCH_FUTEX; mode++) {
        assert(rfm_bench_arm(bench, mode, 20, 64) == RFM_BENCH_OK);
        assert(rfm_bench_calls(bench, 11, NULL) > 0);
        assert(rfm_bench_calls(bench, 8, samples) > 0);
        assert(rfm_bench_call(bench) > 0);
    }
    rfm_bench_close(bench);
}

static void shared_values_are_doubled(void)
{
    struct rfm_bench *bench;
    double           *x;
    double           *y;

    assert(rfm_bench_open(4096, -1, &bench) == RFM_BENCH_OK);
    x = rfm_bench_x(bench);
    y = rfm_bench_y(bench, 4096);
    for (int i = 0; i < 512; i++) {
        x[i] = i;
    }
    assert(rfm_bench_arm(bench, RFM_BENCH_DOUBLE, 1, 4096) == RFM_BENCH_OK);
    assert(rfm_bench_call(bench) > 0);
    for (int i = 0; i < 512; i++) {
        assert(y[i] == 2.0 * i);
    }
    rfm_bench_close(bench);
}

static void what_makes_no_sense_is_refused(void)
{
    struct rfm_bench *bench = NULL;

    assert(rfm_bench_open(UINT64_C(1) << 60, -1, &bench) == RFM_BENCH_INVALID);
    assert(bench == NULL);
    assert(rfm_bench_open(0, -1, NULL) == RFM_BENCH_INVALID);

    assert(rfm_bench_open(0, -1, &bench) == RFM_BENCH_OK);
    assert(rfm_bench_call(bench) == RFM_BENCH_INVALID);
    assert(rfm_bench_arm(bench, 0, 1, 0) == RFM_BENCH_INVALID);
    assert(rfm_bench_arm(bench, RFM_BENCH_DOUBLE, 1, 8) == RFM_BENCH_INVALID);
    assert(rfm_bench_arm(bench, RFM_BENCH_MAILBOX, 1, 0) == RFM_BENCH_OK);
    assert(rfm_bench_calls(bench, 2, NULL) == RFM_BENCH_INVALID);
    rfm_bench_close(bench);
}

static void a_killed_partner_is_an_error_and_no_hang(void)
{
    struct rfm_bench *bench;
    siginfo_t         info;

    assert(rfm_bench_open(0, -1, &bench) == RFM_BENCH_OK);
    assert(rfm_bench_arm(bench, RFM_BENCH_MAILBOX, 5, 0) == RFM_BENCH_OK);
    assert(rfm_bench_call(bench) > 0);
    assert(kill(rfm_bench_pid(bench), SIGKILL) == 0);
    assert(waitid(P_PID, (id_t)rfm_bench_pid(bench), &info,
                  WEXITED | WNOWAIT) == 0);
    assert(rfm_bench_call(bench) == RFM_BENCH_LOST);
    rfm_bench_close(bench);
}

static void a_closed_partner_is_gone(void)
{
    struct rfm_bench *bench;
    int               pid;

    assert(rfm_bench_open(0, -1, &bench) == RFM_BENCH_OK);
    pid = rfm_bench_pid(bench);
    rfm_bench_close(bench);
    assert((kill(pid, 0) == -1) && (errno == ESRCH));
    rfm_bench_close(NULL);
}

int main(void)
{
    every_armed_call_is_answered_in_every_mode();
    shared_values_are_doubled();
    what_makes_no_sense_is_refused();
    a_killed_partner_is_an_error_and_no_hang();
    a_closed_partner_is_gone();
    puts("bench: ok");
    return 0;
}

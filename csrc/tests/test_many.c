/* Many workers of one rank, asleep before each invocation: every round each of
 * them has one, and all results are right. Run over every transport. */
#define _GNU_SOURCE
#include "harness.h"

#include <dirent.h>
#include <limits.h>
#include <unistd.h>

#define WORKERS 32u

/* What the machine's devices have counted of receivers that were not ready: no
 * credits were left there, and ours are to make that impossible. */
static uint64_t not_ready(void)
{
    static const char root[] = "/sys/class/infiniband";
    static const char *const names[] = { "rcvd_rnr_err", "send_rnr_err",
                                         "rnr_nak_retry_err",
                                         "retry_rnr_exceeded_err" };
    DIR *devices = opendir(root);
    struct dirent *device;
    uint64_t sum = 0;

    while ((devices != NULL) && ((device = readdir(devices)) != NULL)) {
        for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
            unsigned long long count = 0;
            char path[PATH_MAX];
            FILE *file;

            snprintf(path, sizeof(path), "%s/%s/ports/1/hw_counters/%s", root,
                     device->d_name, names[i]);
            file = fopen(path, "re");
            if (file != NULL) {
                CHECK_EQ(fscanf(file, "%llu", &count), 1);
                fclose(file);
                sum += count;
            }
        }
    }
    if (devices != NULL) {
        closedir(devices);
    }
    return sum;
}

static void thirty_two_workers_that_sleep_have_one_invocation_each_every_round(
    void)
{
    static struct t_worker workers[WORKERS];
    static struct t_call calls[WORKERS];
    uint32_t rounds = t_scaled(1000, 100);
    uint64_t before = not_ready();
    struct rfm_invoker *inv = t_invoker(4, T_SLOT_BYTES, 0);

    for (uint32_t i = 0; i < WORKERS; i++) {
        struct rfm_attach_attr attr;

        t_worker_start(&workers[i], false, 0);
        attr        = t_dial(&workers[i], t_transport());
        attr.worker = i + 1;
        (void)t_attach(inv, &attr);
        /* some in the line, some behind it */
        t_call_inline(&calls[i], inv, "echo", 8 + 40 * (i % 4),
                      8 + 40 * (i % 4));
    }
    for (uint64_t round = 0; round < rounds; round++) {
        uint64_t had = 0;

        for (uint32_t i = 0; i < WORKERS; i++) {
            t_fill(t_in(&calls[i], 0), calls[i].args[0].size,
                   round * WORKERS + i);
            t_start(&calls[i]);
        }
        for (uint32_t i = 0; i < WORKERS; i++) {
            CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
            CHECK(t_filled(t_out(&calls[i], 0), calls[i].args[0].size,
                           round * WORKERS + i));
            had |= UINT64_C(1) << (calls[i].req.worker - 1);
        }
        CHECK_EQ(had, (UINT64_C(1) << WORKERS) - 1);
    }
    for (uint32_t i = 0; i < WORKERS; i++) {
        t_call_end(&calls[i]);
    }
    t_invoker_end(inv);
    for (uint32_t i = 0; i < WORKERS; i++) {
        CHECK_EQ(workers[i].page->count, rounds);
        t_worker_end(&workers[i]);
    }
    CHECK_EQ(not_ready(), before);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 200);
    RUN(thirty_two_workers_that_sleep_have_one_invocation_each_every_round);
    return t_finish();
}

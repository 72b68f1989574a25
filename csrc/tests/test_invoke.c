/* One rank, one worker in a process of its own: results are exact wherever the
 * arguments lie, and a kernel that misbehaves fails alone. Run over every
 * transport. */
#define _GNU_SOURCE
#include "harness.h"

#include <signal.h>

#include "poller.h"

static struct t_worker worker;
static struct rfm_invoker *inv;

static void up(uint32_t slots)
{
    t_worker_start(&worker, false, 50);
    inv = t_invoker(slots, T_SLOT_BYTES, 50);
    (void)t_worker_attach(&worker, inv);
}

static void down(void)
{
    t_invoker_end(inv);
    CHECK_EQ(t_worker_expect(&worker, RFM_AGENT_GONE), 1);
    t_worker_end(&worker);
}

/* --- exactness ------------------------------------------------------------ */

static const uint64_t SIZES[] = {
    0,  1,  7,  8,  15, 16, 24, 31, 32, 33, 47,
    48, 63, 64, 65, 100, 128, 500, T_SLOT_BYTES - 1, T_SLOT_BYTES,
};
#define N_SIZES (sizeof(SIZES) / sizeof(SIZES[0]))

static void a_call_is_exact(const char *kernel, uint32_t in, uint32_t out,
                            uint64_t size)
{
    uint32_t places[2] = { in, out };
    uint64_t sizes[2] = { size, size };
    struct t_call call;

    t_call_make(&call, inv, kernel, 1, 1, places, sizes);
    for (uint64_t round = 0; round < 3; round++) {
        t_fill(t_in(&call, 0), size, size + round);
        if (size > 0) {
            memset(t_out(&call, 0), 0xcc, size);
        }
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), size, size + round));
        CHECK_EQ(call.sizes[0], size);
        CHECK_EQ(call.req.out_bytes, size);
    }
    t_call_end(&call);
}

static void every_size_from_every_place_to_every_place_arrives_exactly(void)
{
    up(2);
    for (size_t i = 0; i < N_SIZES; i++) {
        for (uint32_t in = RFM_INLINE; in <= RFM_CALL; in++) {
            for (uint32_t out = RFM_INLINE; out <= RFM_CALL; out++) {
                if ((in == RFM_INLINE) && (out == RFM_CALL) &&
                    (SIZES[i] > T_SLOT_BYTES - RFM_CACHE_LINE)) {
                    continue;   /* the output's address needs a line too */
                }
                a_call_is_exact("echo", in, out, SIZES[i]);
            }
        }
    }
    down();
}

static void what_is_larger_than_a_slot_goes_through_arenas(void)
{
    /* the last one has an arena of its own */
    static const uint64_t sizes[] = { T_SLOT_BYTES + 1, 4096, 65537, 3u << 20,
                                      (65u << 20) + 1 };
    size_t n = sizeof(sizes) / sizeof(sizes[0]) - ((T_TSAN || t_slow()) ? 1 : 0);

    up(2);
    for (size_t i = 0; i < n; i++) {
        a_call_is_exact("echo", RFM_BOUND, RFM_CALL, sizes[i]);
        a_call_is_exact("echo", RFM_CALL, RFM_BOUND, sizes[i]);
    }
    down();
}

static void the_other_kinds_of_kernel_are_exact_too(void)
{
    up(4);
    for (size_t i = 0; i < N_SIZES; i++) {
        a_call_is_exact("plain", RFM_INLINE, RFM_INLINE, SIZES[i]);
        a_call_is_exact("plain", RFM_CALL, RFM_BOUND, SIZES[i]);
        a_call_is_exact("event", RFM_INLINE, RFM_INLINE, SIZES[i]);
        a_call_is_exact("event", RFM_BOUND, RFM_CALL, SIZES[i]);
    }
    down();
}

static const struct rfm_page_kernel *counted(const char *name)
{
    for (uint32_t i = 1; i < RFM_PAGE_KERNELS; i++) {
        if (strcmp(worker.page->kernels[i].name, name) == 0) {
            return &worker.page->kernels[i];
        }
    }
    return NULL;
}

static void the_page_counts_what_each_kernel_took(void)
{
    uint64_t count = 0;
    uint64_t exec_ns = 0;

    up(4);
    a_call_is_exact("plain", RFM_INLINE, RFM_INLINE, 8);
    a_call_is_exact("event", RFM_INLINE, RFM_INLINE, 8);
    a_call_is_exact("echo", RFM_INLINE, RFM_INLINE, 8);
    a_call_is_exact("echo", RFM_BOUND, RFM_BOUND, 8);
    CHECK_EQ(counted("plain")->count, 3);
    CHECK_EQ(counted("event")->count, 3);
    CHECK_EQ(counted("echo")->count, 6);
    CHECK(counted("nap") == NULL);
    for (uint32_t i = 0; i < RFM_PAGE_KERNELS; i++) {
        count += worker.page->kernels[i].count;
        exec_ns += worker.page->kernels[i].exec_ns;
    }
    CHECK_EQ(count, worker.page->count);
    CHECK_EQ(exec_ns, worker.page->exec_ns);
    down();
}

/* Any number of arguments, each anywhere, each of another size. */
static void random_signatures_are_exact(void)
{
    struct t_random r = { 42 };
    uint32_t rounds = t_scaled(600, 60);
    uint32_t done = 0;

    up(8);
    while (done < rounds) {
        uint16_t n_in = (uint16_t)t_below(&r, 6);
        uint16_t n_out = (uint16_t)t_below(&r, 7);
        uint32_t n = (uint32_t)n_in + n_out;
        uint64_t most = (t_below(&r, 3) == 0) ? 12 : 150;
        struct rfm_arg args[T_ARGS];
        uint32_t places[T_ARGS];
        uint64_t sizes[T_ARGS];
        struct rfm_layout layout;
        struct t_call call;

        memset(args, 0, sizeof(args));
        for (uint32_t i = 0; i < n; i++) {
            places[i]     = (uint32_t)t_below(&r, 3);
            sizes[i]      = t_below(&r, most);
            args[i].place = places[i];
            args[i].size  = sizes[i];
        }
        if (rfm_layout(args, n_in, n_out, T_SLOT_BYTES, &layout) < 0) {
            continue;
        }
        t_call_make(&call, inv, "mix", n_in, n_out, places, sizes);
        for (uint32_t i = 0; i < n_in; i++) {
            t_fill(t_in(&call, i), sizes[i], done + i);
        }
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        for (uint32_t j = 0; j < n_out; j++) {
            const uint8_t *out = t_out(&call, j);

            CHECK_EQ(call.sizes[j], sizes[n_in + j]);
            for (uint64_t b = 0; b < sizes[n_in + j]; b++) {
                uint8_t sum = (uint8_t)j;

                for (uint32_t k = 0; k < n_in; k++) {
                    if (b < sizes[k]) {
                        sum += ((const uint8_t *)t_in(&call, k))[b];
                    }
                }
                CHECK_EQ(out[b], sum);
            }
        }
        t_call_end(&call);
        done++;
    }
    down();
}

static void a_kernel_that_writes_less_says_how_much(void)
{
    static const uint64_t sizes[] = { 0, 8, 32, 33, 600 };

    up(2);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        for (uint32_t place = RFM_INLINE; place <= RFM_CALL; place++) {
            uint32_t places[3] = { RFM_INLINE, place, RFM_INLINE };
            uint64_t n[3] = { 8, sizes[i], 20 };
            struct t_call call;

            t_call_make(&call, inv, "half", 1, 2, places, n);
            memset(t_in(&call, 0), 0, 8);
            if (n[1] > 0) {
                memset(t_out(&call, 0), 0xcc, n[1]);
            }
            memset(t_out(&call, 1), 0xcc, n[2]);
            CHECK_EQ(t_invoke(&call), RFM_DONE);
            CHECK_EQ(call.sizes[0], n[1] / 2);
            CHECK_EQ(call.sizes[1], 10);
            for (uint64_t b = 0; b < n[1]; b++) {
                CHECK_EQ(((uint8_t *)t_out(&call, 0))[b],
                         (b < n[1] / 2) ? 0x5a : 0xcc);
            }
            CHECK_EQ(((uint8_t *)t_out(&call, 1))[10], 0xcc);
            t_call_end(&call);
        }
    }
    down();
}

/* --- misbehaviour --------------------------------------------------------- */

static void the_worker_still_works(void)
{
    a_call_is_exact("echo", RFM_INLINE, RFM_INLINE, 77);
}

static void a_kernel_that_fails_says_so_and_the_worker_goes_on(void)
{
    struct t_call call;

    up(2);
    t_call_inline(&call, inv, "fail", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(t_invoke(&call), RFM_KERNEL_ERROR);
        CHECK(strcmp(t_text(&call), "the kernel returned -7") == 0);
    }
    t_call_end(&call);
    t_call_inline(&call, inv, "grumble", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    CHECK_EQ(t_invoke(&call), RFM_KERNEL_ERROR);
    CHECK(strcmp(t_text(&call), "this kernel grumbles") == 0);
    t_call_end(&call);
    the_worker_still_works();
    down();
}

static void a_write_past_an_output_is_caught_wherever_it_lies(void)
{
    static const uint64_t sizes[] = { 0, 1, 8, 20, 32, 33, 64, 333 };

    up(2);
    for (uint32_t place = RFM_INLINE; place <= RFM_CALL; place++) {
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            for (uint8_t bad = 0; bad < 3; bad++) {
                uint32_t places[4] = { RFM_INLINE, place, RFM_INLINE, place };
                uint64_t n[4] = { 8, sizes[i], 5, sizes[i] };
                struct t_call call;
                char text[32];

                if ((place == RFM_INLINE) && (sizes[i] <= 20) && (bad != 2)) {
                    continue;   /* in the line, only the last is guarded */
                }
                t_call_make(&call, inv, "overrun", 1, 3, places, n);
                memset(t_in(&call, 0), bad, 8);
                CHECK_EQ(t_invoke(&call), RFM_KERNEL_ERROR);
                snprintf(text, sizeof(text), "past the end of output %d", bad);
                if (strstr(t_text(&call), text) == NULL) {
                    fprintf(stderr, "place %u, %llu bytes, output %u: %s\n",
                            place, (unsigned long long)sizes[i], bad,
                            t_text(&call));
                    CHECK(false);
                }
                /* the guard is mended: an honest kernel is not blamed */
                if (place != RFM_INLINE) {
                    CHECK_EQ(t_invoke(&call), RFM_KERNEL_ERROR);
                }
                t_call_end(&call);
            }
        }
    }
    the_worker_still_works();
    down();
}

static void a_mended_redzone_does_not_blame_the_next_kernel(void)
{
    uint32_t places[2] = { RFM_INLINE, RFM_BOUND };
    uint64_t sizes[2] = { 8, 40 };
    struct rfm_arg args[2];
    struct rfm_binding *honest;
    struct t_call call;

    up(2);
    t_call_make(&call, inv, "overrun", 1, 1, places, sizes);
    memset(t_in(&call, 0), 0, 8);
    CHECK_EQ(t_invoke(&call), RFM_KERNEL_ERROR);
    /* the same memory for a kernel that keeps to it */
    memcpy(args, call.binding->args, sizeof(args));
    CHECK_OK(rfm_binding_create(inv, t_kernel(inv, "echo"), 0, 1, 1, args, NULL,
                                0, &honest));
    rfm_binding_destroy(inv, call.binding);
    call.binding = call.req.binding = honest;
    CHECK_EQ(t_invoke(&call), RFM_DONE);
    t_call_end(&call);
    down();
}

static void a_size_that_is_too_large_is_an_error_of_the_kernel(void)
{
    up(2);
    for (uint32_t place = RFM_INLINE; place <= RFM_CALL; place++) {
        uint32_t places[3] = { RFM_INLINE, RFM_INLINE, place };
        uint64_t n[3] = { 8, 8, 100 };
        struct t_call call;

        t_call_make(&call, inv, "lies", 1, 2, places, n);
        memset(t_in(&call, 0), 0, 8);
        memset(t_out(&call, 0), 0xcc, 8);
        CHECK_EQ(t_invoke(&call), RFM_KERNEL_ERROR);
        CHECK(strstr(t_text(&call), "101 bytes to output 1, which holds 100") !=
              NULL);
        CHECK_EQ(((uint8_t *)t_out(&call, 0))[0], 0xcc);
        t_call_end(&call);
    }
    the_worker_still_works();
    down();
}

static void a_kernel_that_does_not_exist_or_fit_is_a_bad_kernel(void)
{
    uint32_t places[2] = { RFM_INLINE, RFM_INLINE };
    uint64_t sizes[2] = { 8, 8 };
    struct t_call call;

    up(2);
    t_call_inline(&call, inv, "unheard of", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    CHECK_EQ(t_invoke(&call), RFM_BAD_KERNEL);
    CHECK(strcmp(t_text(&call), "there is no such kernel") == 0);
    t_call_end(&call);
    t_call_inline(&call, inv, "refused", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    CHECK_EQ(t_invoke(&call), RFM_BAD_KERNEL);
    CHECK(strcmp(t_text(&call), "this kernel can't be bound so") == 0);
    t_call_end(&call);
    t_call_make(&call, inv, "plain", 2, 0, places, sizes);
    memset(t_in(&call, 0), 0, 8);
    memset(t_in(&call, 1), 0, 8);
    CHECK_EQ(t_invoke(&call), RFM_BAD_KERNEL);
    t_call_end(&call);
    the_worker_still_works();
    down();
}

static void an_error_does_not_leave_its_text_to_the_next_invocation(void)
{
    struct rfm_channel *chan[1];
    struct t_call call;

    up(2);
    t_call_inline(&call, inv, "fail", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    CHECK_EQ(t_invoke(&call), RFM_KERNEL_ERROR);
    CHECK(call.req.result_bytes > 0);
    CHECK_EQ(rfm_invoker_channels(inv, chan, 1), 1);
    rfm_channel_drain(chan[0]);
    t_start(&call);
    rfm_invoker_abandon(inv);
    CHECK_EQ(t_wait(&call), RFM_NO_WORKER);
    CHECK_EQ(call.req.result_bytes, 0);
    t_call_end(&call);
    down();
}

static void a_wild_write_ends_the_worker_and_loses_only_what_it_had(void)
{
    struct t_call call;

    t_worker_start(&worker, false, 50);
    inv = t_invoker(2, T_SLOT_BYTES, 50);
    (void)t_worker_attach(&worker, inv);
    t_call_inline(&call, inv, "far", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    memset(t_out(&call, 0), 0xcc, 8);
    CHECK_EQ(t_invoke(&call), RFM_LOST);
    CHECK_EQ(((uint8_t *)t_out(&call, 0))[7], 0xcc);
    /* it says in which invocation it died */
    CHECK_EQ(rfm_load_acquire(&worker.page->id), call.req.id);
    t_call_end(&call);
    t_invoker_end(inv);
    CHECK_EQ(t_worker_bury(&worker), SIGSEGV);
}

static void a_kernel_that_ends_the_worker_loses_the_invocation(void)
{
    static const char *const names[] = { "segv", "quit" };

    for (int i = 0; i < 2; i++) {
        struct t_call call;

        t_worker_start(&worker, false, 50);
        inv = t_invoker(2, T_SLOT_BYTES, 50);
        (void)t_worker_attach(&worker, inv);
        t_call_inline(&call, inv, names[i], 8, 8);
        memset(t_in(&call, 0), 0, 8);
        CHECK_EQ(t_invoke(&call), RFM_LOST);
        CHECK_EQ(rfm_load_acquire(&worker.page->id), call.req.id);
        CHECK_EQ(rfm_load_acquire(&worker.page->state), RFM_PAGE_RUNNING);
        t_call_end(&call);
        t_invoker_end(inv);
        CHECK_EQ(t_worker_bury(&worker), (i == 0) ? SIGSEGV : 3 << 8);
    }
}

/* --- objects -------------------------------------------------------------- */

static void results_of_any_size_arrive_and_large_ones_are_fetched(void)
{
    static const uint64_t sizes[] = { 0,    1,    8,    31,   32,  33,
                                      192,  193,  1000, T_SLOT_BYTES,
                                      T_SLOT_BYTES + 1, 100000, 9u << 20 };
    static const char *const names[] = { "pattern", "complain" };

    up(2);
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            uint64_t ask[2] = { sizes[i], i + 7 };
            enum rfm_outcome after = (k == 0) ? RFM_DONE : RFM_KERNEL_ERROR;
            struct rfm_block block;
            struct rfm_desc into;
            struct t_call call;

            t_call_object(&call, inv, names[k], ask, sizeof(ask));
            if (sizes[i] <= T_SLOT_BYTES) {
                CHECK_EQ(t_invoke(&call), after);
                CHECK_EQ(call.req.result_bytes, sizes[i]);
                CHECK(t_filled((sizes[i] > RFM_RESULT_INLINE) ? call.req.result
                                                              : call.req.small,
                               sizes[i], ask[1]));
                t_call_end(&call);
                continue;
            }
            CHECK_EQ(t_invoke(&call), RFM_LARGE);
            CHECK_EQ(call.req.out_bytes, sizes[i]);
            CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), sizes[i], &block));
            into = (struct rfm_desc){ block.arena_id, 0, block.offset, sizes[i] };
            CHECK_OK(rfm_request_fetch(&call.req, &into));
            CHECK_EQ(t_wait(&call), after);
            CHECK(t_filled(block.address, sizes[i], ask[1]));
            rfm_heap_free(&block);
            t_call_end(&call);
        }
    }
    down();
}

static void an_object_may_lie_in_an_arena(void)
{
    uint64_t ask[2] = { 50, 3 };
    struct rfm_block block;
    struct rfm_desc desc;
    struct t_call call;

    up(2);
    CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), 5000, &block));
    memset(block.address, 0, 5000);
    memcpy(block.address, ask, sizeof(ask));
    desc = (struct rfm_desc){ block.arena_id, 0, block.offset, 5000 };
    t_call_object(&call, inv, "pattern", &desc, sizeof(desc));
    call.req.wire_flags |= RFM_REQ_STAGED;
    CHECK_EQ(t_invoke(&call), RFM_DONE);
    CHECK(t_filled(call.req.small, 50, 3));
    t_call_end(&call);
    rfm_heap_free(&block);
    down();
}

static void a_discarded_result_is_gone_and_asking_for_it_is_no_hang(void)
{
    uint64_t ask[2] = { 5000, 3 };
    struct t_call call;
    struct t_call other;

    up(2);
    t_call_object(&call, inv, "pattern", ask, sizeof(ask));
    t_call_object(&other, inv, "pattern", ask, sizeof(ask));
    for (int i = 0; i < 20; i++) {
        CHECK_EQ(t_invoke(&call), RFM_LARGE);
        rfm_request_discard(&call.req);
    }
    /* something else comes and goes meanwhile */
    the_worker_still_works();
    t_call_end(&call);
    t_call_end(&other);
    down();
}

static void what_is_started_again_is_another_invocation(void)
{
    struct t_call call;
    uint64_t last = 0;

    up(2);
    t_call_inline(&call, inv, "echo", 40, 40);
    for (uint64_t i = 0; i < t_scaled(20000, 500); i++) {
        t_fill(t_in(&call, 0), 40, i);
        CHECK_EQ(t_invoke(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), 40, i));
        CHECK(call.req.id > last);
        last = call.req.id;
    }
    t_start(&call);
    CHECK(rfm_request_ended(&call.req) ||
          (rfm_request_start(&call.req, 0) == RFM_ERR_BUSY) ||
          rfm_request_ended(&call.req));
    CHECK_EQ(t_wait(&call), RFM_DONE);
    CHECK_EQ(worker.page->count, t_scaled(20000, 500) + 1);
    t_call_end(&call);
    down();
}

/* More bindings than a worker keeps apart by their index at once. */
static void numbers_of_bindings_are_never_mixed_up(void)
{
    struct t_random r = { 5 };

    up(4);
    for (uint32_t i = 0; i < t_scaled(400, 100); i++) {
        struct t_call calls[5];

        for (int k = 0; k < 5; k++) {
            uint64_t size = 1 + t_below(&r, 90);

            t_call_inline(&calls[k], inv, "flip", size, size);
            t_fill(t_in(&calls[k], 0), size, i + (uint64_t)k);
            t_start(&calls[k]);
        }
        for (int k = 4; k >= 0; k--) {
            uint8_t *in = t_in(&calls[k], 0);
            uint8_t *out = t_out(&calls[k], 0);

            CHECK_EQ(t_wait(&calls[k]), RFM_DONE);
            for (uint64_t b = 0; b < calls[k].args[0].size; b++) {
                CHECK_EQ(out[b], (uint8_t)~in[b]);
            }
            t_call_end(&calls[k]);
        }
    }
    down();
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(every_size_from_every_place_to_every_place_arrives_exactly);
    RUN(what_is_larger_than_a_slot_goes_through_arenas);
    RUN(the_other_kinds_of_kernel_are_exact_too);
    RUN(the_page_counts_what_each_kernel_took);
    RUN(random_signatures_are_exact);
    RUN(a_kernel_that_writes_less_says_how_much);
    RUN(a_kernel_that_fails_says_so_and_the_worker_goes_on);
    RUN(a_write_past_an_output_is_caught_wherever_it_lies);
    RUN(a_mended_redzone_does_not_blame_the_next_kernel);
    RUN(a_size_that_is_too_large_is_an_error_of_the_kernel);
    RUN(a_kernel_that_does_not_exist_or_fit_is_a_bad_kernel);
    RUN(an_error_does_not_leave_its_text_to_the_next_invocation);
    RUN(a_wild_write_ends_the_worker_and_loses_only_what_it_had);
    RUN(a_kernel_that_ends_the_worker_loses_the_invocation);
    RUN(results_of_any_size_arrive_and_large_ones_are_fetched);
    RUN(an_object_may_lie_in_an_arena);
    RUN(a_discarded_result_is_gone_and_asking_for_it_is_no_hang);
    RUN(what_is_started_again_is_another_invocation);
    RUN(numbers_of_bindings_are_never_mixed_up);
    return t_finish();
}

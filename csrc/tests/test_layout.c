/* The wire, and where arguments lie in it: both ends compute the same. */
#define _GNU_SOURCE
#include "harness.h"

static void wire_structs_have_the_sizes_of_protocol_1(void)
{
    CHECK_EQ(RFM_PROTOCOL, 1);
    CHECK_EQ(sizeof(struct rfm_hello), 64);
    CHECK_EQ(sizeof(struct rfm_frame), 16);
    CHECK_EQ(sizeof(struct rfm_ctl_attach), 32);
    CHECK_EQ(sizeof(struct rfm_ctl_attached), 16);
    CHECK_EQ(sizeof(struct rfm_ctl_arena), 16);
    CHECK_EQ(sizeof(struct rfm_ctl_kernel), 48);
    CHECK_EQ(sizeof(struct rfm_wire_arg), 24);
    CHECK_EQ(sizeof(struct rfm_ctl_bind), 24);
    CHECK_EQ(sizeof(struct rfm_ctl_number), 8);
    CHECK_EQ(sizeof(struct rfm_ctl_adopt), 16);
    CHECK_EQ(sizeof(struct rfm_request_line), 64);
    CHECK_EQ(sizeof(struct rfm_reply_line), 64);
    CHECK_EQ(sizeof(struct rfm_desc), 24);
    CHECK_EQ(sizeof(struct rfm_wire_fetch), 32);
    CHECK_EQ(sizeof(struct rfm_object), 8);
    CHECK_EQ(sizeof(struct rfm_page), 2048);
    CHECK_EQ(sizeof(struct rfm_page_kernel), 128);
    CHECK_EQ(offsetof(struct rfm_page, start_ns), 16);
    CHECK_EQ(offsetof(struct rfm_page, limit_ns), 24);
    CHECK_EQ(offsetof(struct rfm_page, count), 48);
    CHECK_EQ(offsetof(struct rfm_page, kernels), 64);
    CHECK_EQ(offsetof(struct rfm_page, output), 1984);
    CHECK_EQ(offsetof(struct rfm_page_kernel, name), 16);
    CHECK_EQ(sizeof(struct rfm_call), 64);
}

static struct rfm_layout one_each_way(uint64_t in, uint64_t out)
{
    struct rfm_arg args[2] = { { .size = in }, { .size = out } };
    struct rfm_layout layout;

    CHECK_OK(rfm_layout(args, 1, 1, 256, &layout));
    return layout;
}

static void what_fits_32_bytes_shares_the_headers_line(void)
{
    CHECK_EQ(one_each_way(32, 8).in_bytes, 32);
    CHECK_EQ(one_each_way(33, 8).in_bytes, 33);
    CHECK(one_each_way(8, 32).out_in_line);
    CHECK(!one_each_way(8, 33).out_in_line);
    CHECK_EQ(one_each_way(8, 32).out_bytes, 32);
    CHECK_EQ(one_each_way(8, 33).out_bytes, 33 + RFM_CANARY_BYTES);
}

static void several_small_outputs_have_a_canary_each(void)
{
    struct rfm_arg args[2] = { { .size = 4 }, { .size = 4 } };
    struct rfm_layout layout;

    CHECK_OK(rfm_layout(args, 0, 2, 256, &layout));
    CHECK(!layout.out_in_line);
    CHECK(args[1].at - args[0].at >= 4 + RFM_CANARY_BYTES);
}

static void a_slot_holds_what_it_says_and_no_more(void)
{
    struct rfm_arg args[3] = { { .size = 256 } };
    struct rfm_layout layout;

    CHECK_OK(rfm_layout(args, 1, 0, 256, &layout));
    CHECK_OK(rfm_layout(args, 0, 1, 256, &layout));
    args[0].size = 257;
    CHECK_EQ(rfm_layout(args, 1, 0, 256, &layout), RFM_ERR_TOO_LARGE);
    CHECK_EQ(rfm_layout(args, 0, 1, 256, &layout), RFM_ERR_TOO_LARGE);
    args[0].size = UINT64_MAX;
    CHECK_EQ(rfm_layout(args, 1, 0, 256, &layout), RFM_ERR_TOO_LARGE);
    /* in an arena any size will do */
    args[0].place = RFM_BOUND;
    CHECK_OK(rfm_layout(args, 1, 0, 256, &layout));
    args[0].place = RFM_CALL;
    CHECK_OK(rfm_layout(args, 0, 1, 256, &layout));
    CHECK_EQ(layout.in_bytes, sizeof(struct rfm_desc));
    args[0].place = 3;
    CHECK_EQ(rfm_layout(args, 1, 0, 256, &layout), RFM_ERR_PROTOCOL);
    /* together too much */
    args[0] = (struct rfm_arg){ .size = 100 };
    args[1] = args[2] = args[0];
    CHECK_EQ(rfm_layout(args, 3, 0, 256, &layout), RFM_ERR_TOO_LARGE);
    CHECK_EQ(rfm_layout(args, 0, 3, 256, &layout), RFM_ERR_TOO_LARGE);
    CHECK_OK(rfm_layout(args, 2, 1, 256, &layout));
}

/* Pieces of one direction lie inside, apart, aligned, canaries between. */
static void check_pieces(const struct rfm_arg *args, uint32_t from, uint32_t to,
                         uint64_t begin, uint64_t bytes, uint64_t canary,
                         uint64_t align)
{
    for (uint32_t i = from; i < to; i++) {
        if (args[i].place != RFM_INLINE) {
            continue;
        }
        CHECK(args[i].at >= begin);
        CHECK(args[i].at + args[i].size + canary <= bytes);
        CHECK_EQ(args[i].at % align, 0);
        for (uint32_t k = from; k < i; k++) {
            if (args[k].place == RFM_INLINE) {
                CHECK(args[k].at + args[k].size + canary <= args[i].at);
            }
        }
    }
}

static void any_layout_is_sound_and_the_same_at_both_ends(void)
{
    static const uint32_t slots[] = { 256, 320, 1024, 16384, 1u << 20 };
    struct t_random r = { 11 };
    uint32_t refused = 0;
    uint32_t rounds = t_scaled(50000, 5000);

    for (uint32_t round = 0; round < rounds; round++) {
        uint16_t n_in = (uint16_t)t_below(&r, 33);
        uint16_t n_out = (uint16_t)t_below(&r, 32);
        uint32_t n = (uint32_t)n_in + n_out;
        uint32_t slot = slots[t_below(&r, 5)];
        uint64_t most = 1 + t_below(&r, (t_below(&r, 2) == 0) ? 24 : slot);
        struct rfm_arg rank[RFM_MAX_ARGS];
        struct rfm_arg worker[RFM_MAX_ARGS];
        struct rfm_layout a;
        struct rfm_layout b;
        uint64_t descs = 0;
        int rc;

        if (t_below(&r, 3) != 0) {
            n_in  = (uint16_t)(n_in % 4);
            n_out = (uint16_t)(n_out % 4);
            n     = (uint32_t)n_in + n_out;
        }
        memset(rank, 0xff, sizeof(rank));
        for (uint32_t i = 0; i < n; i++) {
            rank[i].place = (uint32_t)t_below(&r, 3);
            rank[i].size  = t_below(&r, most);
        }
        memcpy(worker, rank, sizeof(rank));
        for (uint32_t i = 0; i < n; i++) {
            worker[i].at = 0;
        }
        rc = rfm_layout(rank, n_in, n_out, slot, &a);
        CHECK_EQ(rfm_layout(worker, n_in, n_out, slot, &b), rc);
        if (rc < 0) {
            CHECK_EQ(rc, RFM_ERR_TOO_LARGE);
            refused++;
            continue;
        }
        CHECK_EQ(a.in_bytes, b.in_bytes);
        CHECK_EQ(a.out_bytes, b.out_bytes);
        CHECK_EQ(a.out_in_line, b.out_in_line);
        for (uint32_t i = 0; i < n; i++) {
            if (rank[i].place != RFM_BOUND) {
                CHECK_EQ(rank[i].at, worker[i].at);
            }
            if (rank[i].place == RFM_CALL) {
                CHECK_EQ(rank[i].at, descs);
                descs += sizeof(struct rfm_desc);
            }
        }
        CHECK(a.in_bytes <= slot);
        CHECK(a.in_bytes >= descs);
        /* a slot has a line more than it says */
        CHECK(a.out_bytes <= (uint64_t)slot + RFM_CACHE_LINE);
        check_pieces(rank, 0, n_in, descs, a.in_bytes, 0,
                     (a.in_bytes <= RFM_INLINE_BYTES) ? 8 : RFM_CACHE_LINE);
        check_pieces(rank, n_in, n, (n_out > 1) ? n_out * 8u : 0, a.out_bytes,
                     a.out_in_line ? 0 : RFM_CANARY_BYTES,
                     a.out_in_line ? 8 : RFM_CACHE_LINE);
        if (a.out_in_line) {
            CHECK(a.out_bytes <= RFM_INLINE_BYTES);
        }
    }
    CHECK(refused > rounds / 100);
    CHECK(refused < rounds * 9 / 10);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 30);
    RUN(wire_structs_have_the_sizes_of_protocol_1);
    RUN(what_fits_32_bytes_shares_the_headers_line);
    RUN(several_small_outputs_have_a_canary_each);
    RUN(a_slot_holds_what_it_says_and_no_more);
    RUN(any_layout_is_sound_and_the_same_at_both_ends);
    return t_finish();
}

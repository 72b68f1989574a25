/* The rank's memory: blocks never overlap, and outlive the heap's close. */
#define _GNU_SOURCE
#include "harness.h"

#include <pthread.h>

#include "arena.h"
#include "pages.h"

#define MOST 400u

struct piece {
    struct rfm_block block;
    uint64_t seed;
};

static void take(struct rfm_heap *heap, struct piece *p, uint64_t size,
                 uint64_t seed)
{
    CHECK_OK(rfm_heap_alloc(heap, size, &p->block));
    CHECK_EQ((uintptr_t)p->block.address % RFM_CACHE_LINE, 0);
    CHECK_EQ(p->block.offset % RFM_CACHE_LINE, 0);
    CHECK_EQ(p->block.size, size);
    CHECK(rfm_redzone_intact((uint8_t *)p->block.address + size));
    p->seed = seed;
    t_fill(p->block.address, size, seed);
}

static void give(struct piece *p)
{
    /* nobody wrote here, or behind it: no two blocks overlap */
    CHECK(t_filled(p->block.address, p->block.size, p->seed));
    CHECK(rfm_redzone_intact((uint8_t *)p->block.address + p->block.size));
    rfm_heap_free(&p->block);
    CHECK(p->block.arena == NULL);
    rfm_heap_free(&p->block);   /* once is enough, twice does no harm */
}

static uint64_t any_size(struct t_random *r)
{
    switch (t_below(r, 8)) {
    case 0:
        return t_below(r, 3);
    case 1:
        return t_below(r, 20000);
    case 2:
        return 64 * t_below(r, 40);
    default:
        return t_below(r, 2000);
    }
}

static void random_blocks_are_aligned_and_never_overlap(void)
{
    static struct piece pieces[MOST];
    uint32_t rounds = t_scaled(100000, 10000);
    struct t_random r = { 1 };
    struct rfm_heap *heap;
    uint64_t full;

    memset(pieces, 0, sizeof(pieces));
    CHECK_OK(rfm_heap_create(0, &heap));
    for (uint32_t i = 0; i < rounds; i++) {
        struct piece *p = &pieces[t_below(&r, MOST)];

        if (p->block.arena != NULL) {
            give(p);
        } else {
            take(heap, p, any_size(&r), i);
        }
    }
    full = rfm_heap_bytes(heap);
    for (uint32_t i = 0; i < MOST; i++) {
        if (pieces[i].block.arena != NULL) {
            give(&pieces[i]);
        }
    }
    /* all of it came together again: as much fits without another arena */
    take(heap, &pieces[0], (4u << 20) - RFM_PAGE_SIZE - RFM_REDZONE, 3);
    CHECK_EQ(rfm_heap_bytes(heap), full);
    give(&pieces[0]);
    rfm_heap_close(heap);
}

static void freed_neighbours_become_one(void)
{
    static const uint32_t orders[6][3] = {
        { 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 },
        { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 },
    };
    uint64_t third = (((4u << 20) - RFM_PAGE_SIZE) / 4) - RFM_REDZONE;
    struct rfm_heap *heap;
    struct rfm_block b[4];
    struct rfm_block all;
    uint64_t bytes;

    CHECK_OK(rfm_heap_create(0, &heap));
    for (int k = 0; k < 6; k++) {
        for (int i = 0; i < 4; i++) {
            CHECK_OK(rfm_heap_alloc(heap, third, &b[i]));
        }
        bytes = rfm_heap_bytes(heap);
        for (int i = 0; i < 3; i++) {
            rfm_heap_free(&b[orders[k][i]]);
        }
        CHECK_OK(rfm_heap_alloc(heap, 3 * third, &all));
        CHECK_EQ(rfm_heap_bytes(heap), bytes);
        rfm_heap_free(&all);
        rfm_heap_free(&b[3]);
    }
    rfm_heap_close(heap);
}

static void a_byte_too_far_is_seen_in_the_redzone(void)
{
    struct rfm_heap *heap;

    CHECK_OK(rfm_heap_create(0, &heap));
    for (uint64_t size = 0; size < 200; size++) {
        struct rfm_block b;
        uint8_t *end;

        CHECK_OK(rfm_heap_alloc(heap, size, &b));
        end = (uint8_t *)b.address + size;
        for (uint32_t i = 0; i < RFM_CANARY_BYTES; i++) {
            uint8_t was = end[i];

            end[i] ^= 1;
            CHECK(!rfm_redzone_intact(end));
            end[i] = was;
        }
        CHECK(rfm_redzone_intact(end));
        rfm_heap_free(&b);
    }
    rfm_heap_close(heap);
}

static void blocks_outlive_the_close_of_their_heap(void)
{
    struct piece pieces[20];
    struct rfm_heap *heap;
    struct rfm_block b;
    uint32_t before = t_open_fds();

    CHECK_OK(rfm_heap_create(0, &heap));
    for (uint64_t i = 0; i < 20; i++) {
        take(heap, &pieces[i], 1 + (i * 300000), i);
    }
    rfm_heap_close(heap);
    for (uint32_t i = 0; i < 20; i++) {
        if (i == 10) {
            CHECK(t_open_fds() > before);
        }
        give(&pieces[i]);
    }
    CHECK_EQ(t_open_fds(), before);     /* and the heap with the last */

    CHECK_OK(rfm_heap_create(0, &heap));
    CHECK_OK(rfm_heap_alloc(heap, 1, &b));
    rfm_heap_close(heap);
    CHECK_EQ(rfm_heap_alloc(heap, 1, &pieces[0].block), RFM_ERR_CLOSED);
    rfm_heap_free(&b);
}

static void more_than_the_limit_is_refused_and_less_still_fits(void)
{
    struct rfm_heap *heap;
    struct rfm_block a;
    struct rfm_block b;

    CHECK_OK(rfm_heap_create(10u << 20, &heap));
    memset(&b, 0x77, sizeof(b));
    CHECK_EQ(rfm_heap_alloc(heap, 11u << 20, &b), RFM_ERR_TOO_LARGE);
    CHECK_EQ(b.size, 0x7777777777777777ull);    /* written only on success */
    CHECK_EQ(rfm_heap_bytes(heap), 0);
    CHECK_OK(rfm_heap_alloc(heap, 3u << 20, &a));
    CHECK_OK(rfm_heap_alloc(heap, 5u << 20, &b));
    CHECK(rfm_heap_bytes(heap) <= 10u << 20);
    rfm_heap_free(&b);
    CHECK_OK(rfm_heap_alloc(heap, 5u << 20, &b));
    CHECK_EQ(rfm_heap_alloc(heap, UINT64_MAX, &a), RFM_ERR_NO_MEMORY);
    CHECK_EQ(rfm_heap_alloc(heap, UINT64_MAX / 4, &a), RFM_ERR_TOO_LARGE);
    rfm_heap_free(&a);
    rfm_heap_free(&b);
    rfm_heap_close(heap);
}

static void what_lies_in_an_arena_is_found_there(void)
{
    struct rfm_heap *heap;
    struct rfm_block b;
    uint64_t offset = 0;
    uint32_t arena = 0;
    bool at_end = false;
    int local = 0;

    CHECK_OK(rfm_heap_create(0, &heap));
    CHECK_OK(rfm_heap_alloc(heap, 1000, &b));
    CHECK(rfm_heap_locate(heap, b.address, 1000, &arena, &offset, &at_end));
    CHECK_EQ(arena, b.arena_id);
    CHECK_EQ(offset, b.offset);
    CHECK(at_end);
    CHECK(rfm_heap_locate(heap, (uint8_t *)b.address + 10, 90, &arena, &offset,
                          &at_end));
    CHECK_EQ(offset, b.offset + 10);
    CHECK(!at_end);
    /* the arena's last bytes, and one more */
    CHECK(rfm_heap_locate(heap, (uint8_t *)b.address - b.offset, 4u << 20,
                          &arena, &offset, &at_end));
    CHECK(!at_end);
    CHECK(!rfm_heap_locate(heap, (uint8_t *)b.address - b.offset,
                           (4u << 20) + 1, &arena, &offset, &at_end));
    CHECK(!rfm_heap_locate(heap, b.address, UINT64_MAX, &arena, &offset,
                           &at_end));
    CHECK(!rfm_heap_locate(heap, &local, 4, &arena, &offset, &at_end));
    rfm_heap_free(&b);
    rfm_heap_close(heap);
}

/* A kernel that streams through them would find them in one set of a cache. */
static void arrays_with_an_arena_each_begin_at_different_lines_of_a_page(void)
{
    struct rfm_block blocks[4];
    uint64_t lines[4];
    struct rfm_heap *heap;

    CHECK_OK(rfm_heap_create(0, &heap));
    for (uint32_t i = 0; i < 4; i++) {
        CHECK_OK(rfm_heap_alloc(heap, 65u << 20, &blocks[i]));
        lines[i] = (uintptr_t)blocks[i].address % RFM_PAGE_SIZE /
                   RFM_CACHE_LINE;
        for (uint32_t k = 0; k < i; k++) {
            CHECK(blocks[i].arena_id != blocks[k].arena_id);
            CHECK(lines[i] != lines[k]);
        }
    }
    for (uint32_t i = 0; i < 4; i++) {
        rfm_heap_free(&blocks[i]);
    }
    rfm_heap_close(heap);
}

/* --- hooks ---------------------------------------------------------------- */

struct seen {
    uint32_t made;
    uint32_t dropped;
    uint32_t last_id;
    uint64_t room;              /* for an arena of so many bytes */
};

static bool on_made(void *ctx, const struct rfm_arena_info *arena)
{
    struct seen *seen = ctx;

    seen->made++;
    CHECK(arena->id > seen->last_id);
    seen->last_id = arena->id;
    return arena->bytes <= seen->room;
}

static void on_dropped(void *ctx, uint32_t arena)
{
    struct seen *seen = ctx;

    CHECK(arena > 0);
    seen->dropped++;
}

static void every_arena_is_announced_once_and_large_ones_leave_at_once(void)
{
    struct seen seen = { .room = UINT64_MAX };
    struct rfm_heap_hooks hooks = { .made = on_made, .dropped = on_dropped,
                                    .ctx = &seen };
    struct rfm_heap *heap;
    struct rfm_block small;
    struct rfm_block b;

    CHECK_OK(rfm_heap_create(0, &heap));
    rfm_heap_set_hooks(heap, &hooks);
    CHECK_OK(rfm_heap_alloc(heap, 5, &small));
    for (int i = 0; i < 5; i++) {
        CHECK_OK(rfm_heap_alloc(heap, 70u << 20, &b));
        CHECK_EQ(seen.made, 2 + i);
        rfm_heap_free(&b);
        CHECK_EQ(seen.dropped, 1 + i);
    }
    rfm_heap_free(&small);
    CHECK_EQ(seen.dropped, 5);      /* kept for the next ones */
    rfm_heap_close(heap);
}

static void an_arena_that_somebody_has_no_room_for_gives_way_to_a_smaller_one(void)
{
    struct seen seen = { .room = 1u << 20 };
    struct rfm_heap_hooks hooks = { .made = on_made, .dropped = on_dropped,
                                    .ctx = &seen };
    struct rfm_heap *heap;
    struct rfm_block blocks[6];

    CHECK_OK(rfm_heap_create(0, &heap));
    rfm_heap_set_hooks(heap, &hooks);
    for (uint32_t i = 0; i < 3; i++) {
        CHECK_OK(rfm_heap_alloc(heap, 100000, &blocks[i]));
        CHECK_EQ(seen.made, 2 * (i + 1));
        CHECK_EQ(seen.dropped, i + 1);
    }
    CHECK(rfm_heap_bytes(heap) < 3u << 20);
    /* what is too large whatever we do is there none the less */
    CHECK_OK(rfm_heap_alloc(heap, 2u << 20, &blocks[3]));
    memset(blocks[3].address, 1, 2u << 20);
    /* and with more room, they share one again */
    seen.room = UINT64_MAX;
    CHECK_OK(rfm_heap_alloc(heap, 100000, &blocks[4]));
    CHECK_OK(rfm_heap_alloc(heap, 100000, &blocks[5]));
    CHECK_EQ(blocks[4].arena_id, blocks[5].arena_id);
    for (int i = 0; i < 6; i++) {
        rfm_heap_free(&blocks[i]);
    }
    rfm_heap_close(heap);
}

/* --- threads -------------------------------------------------------------- */

static void *churn(void *arg)
{
    struct rfm_heap *heap = arg;
    struct t_random r = { (uintptr_t)&r };
    static _Thread_local struct piece pieces[32];
    uint32_t rounds = t_scaled(5000, 500);

    memset(pieces, 0, sizeof(pieces));
    for (uint32_t i = 0; i < rounds; i++) {
        struct piece *p = &pieces[t_below(&r, 32)];

        if (p->block.arena != NULL) {
            give(p);
        } else {
            take(heap, p, t_below(&r, 3000), t_random(&r));
        }
    }
    for (uint32_t i = 0; i < 32; i++) {
        if (pieces[i].block.arena != NULL) {
            give(&pieces[i]);
        }
    }
    return NULL;
}

static void threads_share_a_heap(void)
{
    struct rfm_heap *heap;
    pthread_t threads[4];

    CHECK_OK(rfm_heap_create(0, &heap));
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(pthread_create(&threads[i], NULL, churn, heap), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    rfm_heap_close(heap);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(random_blocks_are_aligned_and_never_overlap);
    RUN(freed_neighbours_become_one);
    RUN(a_byte_too_far_is_seen_in_the_redzone);
    RUN(blocks_outlive_the_close_of_their_heap);
    RUN(more_than_the_limit_is_refused_and_less_still_fits);
    RUN(what_lies_in_an_arena_is_found_there);
    RUN(arrays_with_an_arena_each_begin_at_different_lines_of_a_page);
    RUN(every_arena_is_announced_once_and_large_ones_leave_at_once);
    RUN(an_arena_that_somebody_has_no_room_for_gives_way_to_a_smaller_one);
    RUN(threads_share_a_heap);
    return t_finish();
}

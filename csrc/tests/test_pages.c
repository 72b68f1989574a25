/* Large memory: where it lies, on what pages, and how it is copied. */
#define _GNU_SOURCE
#include "harness.h"

#include <sys/mman.h>
#include <unistd.h>

#include "copy.h"
#include "pages.h"
#include "shm.h"

static bool mapped(const uint8_t *page)
{
    unsigned char there;

    return mincore((void *)page, RFM_PAGE_SIZE, &there) == 0;
}

static void large_memory_begins_where_a_huge_page_may(void)
{
    static const uint64_t sizes[] = { RFM_PAGE_SIZE, RFM_HUGE_PAGE,
                                      RFM_HUGE_PAGE + RFM_PAGE_SIZE,
                                      3 * RFM_HUGE_PAGE };

    for (uint32_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        uint64_t size = sizes[i];
        uint8_t *base = rfm_pages_reserve(size);

        CHECK(base != NULL);
        CHECK_EQ((uintptr_t)base % RFM_PAGE_SIZE, 0);
        if (size >= RFM_HUGE_PAGE) {
            CHECK_EQ((uintptr_t)base % RFM_HUGE_PAGE, 0);
        }
        /* the guard pages are part of it, to the last byte */
        CHECK(mapped(base - RFM_PAGE_SIZE));
        CHECK(mapped(base + size));
        rfm_pages_release(base, size);
        CHECK(!mapped(base - RFM_PAGE_SIZE));
        CHECK(!mapped(base + size));
    }
    rfm_pages_release(NULL, RFM_PAGE_SIZE);
}

static void collapsing_changes_no_byte_and_whoever_maps_sees_them(void)
{
    const uint64_t size = 2 * RFM_HUGE_PAGE + 5 * RFM_PAGE_SIZE;
    uint8_t *one;
    uint8_t *two;
    int fd;

    CHECK_OK(rfm_memfd_create("rfaas-test", size, &fd));
    CHECK_OK(rfm_memfd_map(fd, size, true, &one));
    t_fill(one, size, 7);
    rfm_pages_collapse(fd, size);
    CHECK(t_filled(one, size, 7));
    CHECK_OK(rfm_memfd_map(fd, size, true, &two));
    CHECK(t_filled(two, size, 7));
    t_fill(two, size, 8);
    CHECK(t_filled(one, size, 8));
    rfm_memfd_unmap(one, size);
    rfm_memfd_unmap(two, size);
    close(fd);
}

static void what_can_not_be_collapsed_is_left_alone(void)
{
    int fd;

    CHECK_OK(rfm_memfd_create("rfaas-test", RFM_PAGE_SIZE, &fd));
    rfm_pages_collapse(fd, RFM_PAGE_SIZE);
    rfm_pages_collapse(-1, RFM_HUGE_PAGE);
    close(fd);
}

/* The byte in front and the one behind must stay what they are. */
static void copy_at(uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    to[0]         = 0xa5;
    to[bytes + 1] = 0x5a;
    memset(to + 1, 0, bytes);
    rfm_copy(to + 1, from, bytes);
    CHECK(memcmp(to + 1, from, bytes) == 0);
    CHECK_EQ(to[0], 0xa5);
    CHECK_EQ(to[bytes + 1], 0x5a);
}

static void every_byte_is_copied_and_none_beside_it(void)
{
    const uint64_t most = RFM_COPY_STREAM + (1u << 17);
    uint8_t *from = malloc(most + 256);
    uint8_t *to   = malloc(most + 256);
    struct t_random r = { 3 };

    CHECK((from != NULL) && (to != NULL));
    t_fill(from, most + 256, 11);
    copy_at(to, from, 0);
    copy_at(to, from, 1);
    copy_at(to, from, RFM_COPY_STREAM - 1);
    for (uint32_t i = 0; i < 12; i++) {
        copy_at(to + t_below(&r, 65), from + t_below(&r, 65),
                RFM_COPY_STREAM + t_below(&r, 1u << 16));
    }
    free(from);
    free(to);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(large_memory_begins_where_a_huge_page_may);
    RUN(collapsing_changes_no_byte_and_whoever_maps_sees_them);
    RUN(what_can_not_be_collapsed_is_left_alone);
    RUN(every_byte_is_copied_and_none_beside_it);
    return t_finish();
}

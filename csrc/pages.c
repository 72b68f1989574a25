/*
 * Huge pages where two processes share large memory.
 *
 * The heap of a process gets huge pages by itself; a memfd only where the
 * administrator changed shmem_enabled, which is `never` by default. A kernel
 * that streams through several arrays then pays some 3 % for its page walks
 * (docs/benchmarks.md). MADV_COLLAPSE asks for them in so many words, needs no
 * setting and no right, and also makes the mapping at the other side cheaper:
 * one entry for 512 pages.
 */
#define _GNU_SOURCE
#include "pages.h"

#include <stddef.h>
#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25        /* glibc knows it from 2.37 */
#endif

uint8_t *rfm_pages_reserve(uint64_t bytes)
{
    uint64_t  align = (bytes >= RFM_HUGE_PAGE) ? RFM_HUGE_PAGE : RFM_PAGE_SIZE;
    uint64_t  room  = bytes + RFM_PAGE_SIZE + align;
    uintptr_t first;            /* the guard page in front */
    uintptr_t base;
    uintptr_t end;
    void     *area;

    area = mmap(NULL, room, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) {
        return NULL;
    }
    base  = ((uintptr_t)area + RFM_PAGE_SIZE + align - 1) & ~(align - 1);
    first = base - RFM_PAGE_SIZE;
    end   = base + bytes + RFM_PAGE_SIZE;
    if (first > (uintptr_t)area) {
        munmap(area, first - (uintptr_t)area);
    }
    if ((uintptr_t)area + room > end) {
        munmap((void *)end, (uintptr_t)area + room - end);
    }
    return (uint8_t *)base;
}

void rfm_pages_release(uint8_t *base, uint64_t bytes)
{
    if (base != NULL) {
        munmap(base - RFM_PAGE_SIZE, bytes + 2 * RFM_PAGE_SIZE);
    }
}

void rfm_pages_collapse(int fd, uint64_t bytes)
{
    uint64_t whole = bytes & ~(uint64_t)(RFM_HUGE_PAGE - 1);
    uint8_t *base;

    if (whole == 0) {
        return;
    }
    base = rfm_pages_reserve(whole);
    if (base == NULL) {
        return;
    }
    /* A mapping of its own: whoever maps the memfd next finds huge pages. */
    if (mmap(base, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
             0) != MAP_FAILED) {
        (void)madvise(base, whole, MADV_COLLAPSE);
    }
    rfm_pages_release(base, whole);
}

/*
 * One large copy, next to what the other core does with the same bytes.
 *
 * An invocation on plain arrays of n bytes has 4n in play: the application's
 * two and the two staged. Where that exceeds a core's share of the caches, an
 * ordinary store first reads the line that it is about to overwrite, and its
 * line pushes out another that somebody still wants. Stores past the caches
 * save both. The C library does this from 3/4 of the L3 that the processor
 * claims to have on, but a core gets a fraction of that, a virtual machine a
 * smaller one still. Ordinary stores win up to 8 MiB, streaming ones from
 * 12 MiB on, where it was measured (docs/benchmarks.md).
 */
#include "copy.h"

#include <string.h>

#ifdef __x86_64__

#include <emmintrin.h>

#define LINE  64u
#define PAGE  4096u
/* Prefetchers stop at a page's end: with four at once, three go on. */
#define PAGES 4u
#define AHEAD 512u

static void stream_line(uint8_t *to, const uint8_t *from)
{
    for (uint32_t i = 0; i < LINE; i += sizeof(__m128i)) {
        _mm_stream_si128((__m128i *)(to + i),
                         _mm_loadu_si128((const __m128i *)(from + i)));
    }
}

static void stream(uint8_t *to, const uint8_t *from, uint64_t bytes)
{
    uint64_t head  = -(uintptr_t)to & (LINE - 1);
    uint64_t whole = (bytes - head) & ~(uint64_t)(PAGES * PAGE - 1);

    memcpy(to, from, head);
    to   += head;
    from += head;
    for (uint64_t at = 0; at < whole; at += PAGES * PAGE) {
        for (uint64_t line = at; line < at + PAGE; line += LINE) {
            for (uint64_t i = line; i < line + PAGES * PAGE; i += PAGE) {
                _mm_prefetch((const char *)from + i + AHEAD, _MM_HINT_T0);
                stream_line(to + i, from + i);
            }
        }
    }
    memcpy(to + whole, from + whole, bytes - head - whole);
    /* Such stores are not ordered by the release store that posts the slot. */
    _mm_sfence();
}

void rfm_copy(void *to, const void *from, uint64_t bytes)
{
    if (bytes < RFM_COPY_STREAM) {
        memcpy(to, from, bytes);
    } else {
        stream(to, from, bytes);
    }
}

#else

void rfm_copy(void *to, const void *from, uint64_t bytes)
{
    memcpy(to, from, bytes);
}

#endif

/*
 * What kernels print goes into one pipe, which the agent reads. Here the worker
 * marks in it which invocation of which connection has written what stands
 * before the mark:
 *
 *   line\nline\n<mark 17>line\n<mark 21>...
 *
 * A call that printed nothing leaves no mark, and a short one makes no system
 * call to know that: whether it printed is found out later, when there is time.
 * If several calls lie between two marks then, the mark says that it is not
 * known (0). What stands behind the last mark is the running invocation's while
 * no other call has ended since (`clean` is `count`, see struct rfm_page_output).
 */
#ifndef RFM_OUTPUT_H
#define RFM_OUTPUT_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "poller.h"
#include "rfm_wire.h"

struct rfm_output {
    struct rfm_page_output *page;
    int      fd;                /* -1: nothing is marked */
    dev_t    dev;
    ino_t    ino;
    uint64_t long_ticks;        /* a call of so long is always looked at */
    uint64_t idle_ticks;        /* after so long without work there is time */
    uint64_t wait_ticks;        /* for the agent, which is just reading … */
    uint64_t waited;            /* … once: the page's `heard` then */
    uint64_t heard;             /* the page's, as of the last look */
    uint64_t written;           /* into the pipe, as of the last look */
    uint64_t clean;             /* as the page's */
    uint64_t last;              /* the invocation that ended last, … */
    uint32_t last_conn;         /* … and whose it was */
    uint32_t eager;             /* look at so many calls, however short */
    int      room_ms;           /* for a mark, where the pipe is full, … */
    bool     stuck;             /* … once: there was none */
    bool     told;              /* the one that ends has printed */
};

/* `fd` is copied; where it is no pipe nothing is ever marked. */
void rfm_output_open(struct rfm_output *out, struct rfm_page_output *page,
                     int fd);
void rfm_output_close(struct rfm_output *out);

/* It printed, by what its caller knows. */
void rfm_output_printed(struct rfm_output *out);

/* `calls` have ended, `id` the last one of them, as it was told. */
void rfm_output_look(struct rfm_output *out, uint64_t id, uint64_t calls);

/* What was printed meanwhile is no invocation's. */
void rfm_output_nobodys(struct rfm_output *out, uint64_t calls);

/* At a call's end, after `ticks`; before the page stops naming it. */
static inline void rfm_output_ended(struct rfm_output *out, uint64_t id,
                                    uint32_t conn, uint64_t calls,
                                    uint64_t ticks)
{
    out->last      = id;
    out->last_conn = conn;
    if (__builtin_expect((ticks >= out->long_ticks) || (out->eager != 0) ||
                             (rfm_load_relaxed(&out->page->heard) != out->heard),
                         0)) {
        rfm_output_look(out, id, calls);
    }
}

/* Whether calls have ended that nobody has looked at. */
static inline bool rfm_output_is_due(const struct rfm_output *out,
                                     uint64_t calls)
{
    return (calls != out->clean) && (out->fd >= 0);
}

#endif

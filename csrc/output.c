/* What a kernel printed, and which invocation it was: see output.h. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "output.h"

/* To look takes 200 ns: one part in a hundred of such a call. */
#define LONG_NS  20000ull
#define IDLE_NS  20000ull

/* To read what is there takes the agent less, unless it is kept from it. */
#define WAIT_NS  50000ull

/* Who fills the pipe has waited for the agent to read. For so long its mark
 * does, too; without it nobody knows whose what the next call prints is. */
#define ROOM_MS  50

/* Who prints prints again. */
#define EAGER    1024u

/* Above what kernels may expect to be free. */
#define FD_FROM  64

static void stop(struct rfm_output *out)
{
    out->fd         = -1;
    out->eager      = 0;
    out->long_ticks = UINT64_MAX;
    rfm_store_release(&out->page->marks, 0);
}

void rfm_output_open(struct rfm_output *out, struct rfm_page_output *page,
                     int fd)
{
    struct stat facts;

    memset(out, 0, sizeof(*out));
    out->page  = page;
    out->heard = rfm_load_acquire(&page->heard);
    stop(out);
    if ((fd <= 0) || (fstat(fd, &facts) != 0) || !S_ISFIFO(facts.st_mode)) {
        return;
    }
    out->fd = fcntl(fd, F_DUPFD_CLOEXEC, FD_FROM);
    if (out->fd < 0) {
        return;
    }
    out->dev        = facts.st_dev;
    out->ino        = facts.st_ino;
    out->long_ticks = rfm_ns_to_ticks(LONG_NS);
    out->idle_ticks = rfm_ns_to_ticks(IDLE_NS);
    out->wait_ticks = rfm_ns_to_ticks(WAIT_NS);
    out->room_ms    = ROOM_MS;
    rfm_store_release(&page->marks, 1);
}

/* A kernel may have closed it, and opened something else in its place. */
static bool is_ours(const struct rfm_output *out)
{
    struct stat facts;

    return (fstat(out->fd, &facts) == 0) && (facts.st_dev == out->dev) &&
           (facts.st_ino == out->ino);
}

void rfm_output_close(struct rfm_output *out)
{
    if ((out->fd >= 0) && is_ours(out)) {
        close(out->fd);
    }
    stop(out);
}

void rfm_output_printed(struct rfm_output *out)
{
    if (out->fd >= 0) {
        out->eager += (out->eager == 0);
        out->told   = true;
    }
}

/* What C holds back without an end of line; a thread that holds the lock keeps
 * it. */
static void flush_stdio(void)
{
    if ((__fpending(stdout) != 0) && (ftrylockfile(stdout) == 0)) {
        (void)fflush_unlocked(stdout);
        funlockfile(stdout);
    }
}

/* False: there is no room, which is waited for once, until a mark gets in. */
static bool put_mark(struct rfm_output *out, uint64_t id)
{
    struct pollfd p = { .fd = out->fd, .events = POLLOUT };
    struct rfm_mark mark = { .magic = RFM_MARK_MAGIC };
    char digits[sizeof(mark.id) + sizeof(mark.conn) + 1];

    snprintf(digits, sizeof(digits), "%016llx%08x", (unsigned long long)id,
             (id != 0) ? out->last_conn : 0);
    memcpy(mark.id, digits, sizeof(mark.id));
    memcpy(mark.conn, digits + sizeof(mark.id), sizeof(mark.conn));
    out->stuck = (poll(&p, 1, out->stuck ? 0 : out->room_ms) != 1) ||
                 (p.revents != POLLOUT) ||
                 (write(out->fd, &mark, sizeof(mark)) != (ssize_t)sizeof(mark));
    return !out->stuck;
}

/* What the page's `heard` is when the agent reads no more; odd if it still does
 * after a moment, for which it is waited once. */
static uint64_t heard_at_rest(struct rfm_output *out)
{
    uint64_t heard = rfm_load_acquire(&out->page->heard);
    uint64_t since;

    if (((heard & 1) == 0) || (heard == out->waited) || out->told) {
        return heard;
    }
    out->waited = heard;
    since = rfm_ticks();
    do {
        rfm_spin_pause();
        heard = rfm_load_acquire(&out->page->heard);
    } while (((heard & 1) != 0) && (rfm_ticks() - since < out->wait_ticks));
    return heard;
}

/*
 * Something was printed since the last look if more has gone into the pipe than
 * then and our mark: what the agent has taken of it and what is still there.
 * While the agent reads (`heard` is odd) that can't be known, and something may
 * have been: a mark too many does no harm. But it is read, too, so that it must
 * not be what the next one is made for.
 */
static bool was_printed(struct rfm_output *out)
{
    uint64_t heard = heard_at_rest(out);
    uint64_t written;
    int bytes = 0;

    if (ioctl(out->fd, FIONREAD, &bytes) != 0) {
        stop(out);              /* a kernel closed it */
        return false;
    }
    written    = rfm_load_acquire(&out->page->taken) + (uint64_t)bytes;
    out->heard = heard & ~1ull;     /* while it reads, look again */
    if (((heard & 1) != 0) ||
        (rfm_load_acquire(&out->page->heard) != heard)) {
        return true;
    }
    if (written == out->written) {
        return false;
    }
    out->written = written;
    return true;
}

static void look(struct rfm_output *out, uint64_t id, uint64_t calls)
{
    bool printed;

    if (out->fd < 0) {
        out->heard = rfm_load_acquire(&out->page->heard);
        return;
    }
    if (out->eager != 0) {
        out->eager--;
    }
    flush_stdio();
    printed   = was_printed(out);
    out->told = false;
    if (printed) {
        if (!is_ours(out)) {
            stop(out);
            return;
        }
        out->eager = EAGER;
        if (!put_mark(out, id)) {
            /* later, and then nobody may know whose it was */
            out->written = UINT64_MAX;
            return;
        }
        out->written += sizeof(struct rfm_mark);
    }
    out->clean = calls;
    rfm_store_release(&out->page->clean, calls);
}

void rfm_output_look(struct rfm_output *out, uint64_t id, uint64_t calls)
{
    look(out, (calls - out->clean == 1) ? id : 0, calls);
}

void rfm_output_nobodys(struct rfm_output *out, uint64_t calls)
{
    look(out, 0, calls);
}

/* Who printed what: a call that prints leaves its mark, no other call leaves
 * one, and what isn't known is not said. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "harness.h"
#include "output.h"

#define LONG  UINT64_MAX        /* takes long enough to be looked at */

struct printer {
    struct rfm_output out;
    struct rfm_page_output page;
    uint64_t calls;
    int ends[2];
};

static void printer_open(struct printer *p)
{
    memset(p, 0, sizeof(*p));
    CHECK(pipe2(p->ends, O_CLOEXEC | O_NONBLOCK) == 0);
    rfm_output_open(&p->out, &p->page, p->ends[1]);
    CHECK_EQ(p->page.marks, 1);
}

static void printer_close(struct printer *p)
{
    rfm_output_close(&p->out);
    CHECK_EQ(p->page.marks, 0);
    rfm_output_close(&p->out);
    close(p->ends[0]);
    close(p->ends[1]);
}

static void print(struct printer *p, const char *text)
{
    CHECK_EQ(write(p->ends[1], text, strlen(text)), strlen(text));
}

static void call(struct printer *p, uint64_t id, const char *text, uint64_t ticks)
{
    if (text != NULL) {
        print(p, text);
    }
    rfm_output_ended(&p->out, id, (uint32_t)id + 1000, p->calls + 1, ticks);
    p->calls++;
}

static void idle(struct printer *p)
{
    if (rfm_output_is_due(&p->out, p->calls)) {
        rfm_output_look(&p->out, p->out.last, p->calls);
    }
}

/* What stands in the pipe, each mark as "<17>"; as the agent reads. */
static const char *heard(struct printer *p)
{
    static char said[1024];
    char raw[512];
    size_t n = 0;
    ssize_t got;

    rfm_store_release(&p->page.heard, p->page.heard | 1);
    got = read(p->ends[0], raw, sizeof(raw));
    p->page.taken += (got > 0) ? (uint64_t)got : 0;
    rfm_store_release(&p->page.heard, p->page.heard + 1);
    for (ssize_t i = 0; i < got;) {
        if ((got - i >= (ssize_t)sizeof(struct rfm_mark)) &&
            (memcmp(raw + i, RFM_MARK_MAGIC, 8) == 0)) {
            char digits[17] = { 0 };
            char conn[9] = { 0 };

            memcpy(digits, raw + i + 8, 16);
            memcpy(conn, raw + i + 24, 8);
            /* a rank's number with its rank, and nobody's with none */
            CHECK_EQ(strtoull(conn, NULL, 16),
                     (strtoull(digits, NULL, 16) != 0)
                         ? strtoull(digits, NULL, 16) + 1000 : 0);
            n += (size_t)snprintf(said + n, sizeof(said) - n, "<%llu>",
                                  strtoull(digits, NULL, 16));
            i += (ssize_t)sizeof(struct rfm_mark);
        } else {
            said[n++] = raw[i++];
        }
    }
    said[n] = 0;
    return said;
}

#define CHECK_HEARD(p, expected) CHECK(strcmp(heard(p), (expected)) == 0)

static void a_call_that_prints_leaves_its_mark(void)
{
    struct printer p;

    printer_open(&p);
    call(&p, 7, "seven\n", LONG);
    call(&p, 8, NULL, LONG);
    call(&p, 9, "nine\n", LONG);
    CHECK_EQ(p.page.clean, 3);
    CHECK_HEARD(&p, "seven\n<7>nine\n<9>");
    printer_close(&p);
}

static void a_short_call_is_looked_at_when_there_is_time(void)
{
    struct printer p;

    printer_open(&p);
    call(&p, 7, "seven\n", 0);
    CHECK_EQ(p.page.clean, 0);
    idle(&p);
    CHECK_EQ(p.page.clean, 1);
    CHECK_HEARD(&p, "seven\n<7>");
    printer_close(&p);
}

static void whose_it_is_of_several_short_calls_is_not_said(void)
{
    struct printer p;

    printer_open(&p);
    call(&p, 7, "seven\n", 0);
    call(&p, 8, NULL, 0);
    idle(&p);
    CHECK_HEARD(&p, "seven\n<0>");
    /* who prints is looked at from then on */
    call(&p, 9, "nine\n", 0);
    call(&p, 10, NULL, 0);
    CHECK_HEARD(&p, "nine\n<9>");
    printer_close(&p);
}

static void what_its_caller_knows_needs_no_time(void)
{
    struct printer p;

    printer_open(&p);
    call(&p, 6, NULL, 0);
    idle(&p);
    rfm_output_printed(&p.out);
    call(&p, 7, "seven\n", 0);
    CHECK_HEARD(&p, "seven\n<7>");
    printer_close(&p);
}

static void what_was_read_before_the_end_has_its_mark_too(void)
{
    struct printer p;

    printer_open(&p);
    print(&p, "be");
    CHECK_HEARD(&p, "be");
    call(&p, 7, NULL, 0);
    CHECK_HEARD(&p, "<7>");
    /* the agent reads just now: whatever the pipe holds */
    p.page.heard++;
    call(&p, 9, NULL, 0);
    call(&p, 10, NULL, 0);
    p.page.heard++;
    CHECK_HEARD(&p, "<9><10>");
    printer_close(&p);
}

static void a_mark_that_was_read_makes_no_other_one(void)
{
    struct printer p;

    printer_open(&p);
    call(&p, 7, "seven\n", LONG);
    CHECK_HEARD(&p, "seven\n<7>");
    call(&p, 8, NULL, LONG);
    call(&p, 9, NULL, 0);
    CHECK_EQ(p.page.clean, 3);
    CHECK_HEARD(&p, "");
    /* as long as the text that was read, and as a mark */
    call(&p, 10, "eleven", LONG);
    CHECK_HEARD(&p, "eleven<10>");
    call(&p, 11, "twenty-four characters..", LONG);
    CHECK_HEARD(&p, "twenty-four characters..<11>");
    /* one that was made while the agent read */
    p.page.heard++;
    call(&p, 12, NULL, LONG);
    p.page.heard++;
    CHECK_HEARD(&p, "<12>");
    call(&p, 13, NULL, LONG);
    CHECK_HEARD(&p, "");
    printer_close(&p);
}

static void what_nobody_called_for_is_nobodys(void)
{
    struct printer p;

    printer_open(&p);
    print(&p, "loaded\n");
    rfm_output_nobodys(&p.out, p.calls);
    call(&p, 7, "seven\n", LONG);
    CHECK_HEARD(&p, "loaded\n<0>seven\n<7>");
    printer_close(&p);
}

/* how much went into it */
static int fill(struct printer *p)
{
    char block[4096];
    int bytes = 0;

    memset(block, 'x', sizeof(block));
    while (write(p->ends[1], block, sizeof(block)) > 0) {
        bytes += (int)sizeof(block);
    }
    return bytes;
}

/* so many bytes, as the agent does */
static void drain(struct printer *p, int bytes)
{
    char block[4096];

    rfm_store_release(&p->page.heard, p->page.heard + 1);
    for (int left = bytes; left > 0; left -= (int)sizeof(block)) {
        CHECK_EQ(read(p->ends[0], block, sizeof(block)), sizeof(block));
    }
    rfm_store_release(&p->page.taken, p->page.taken + (uint64_t)bytes);
    rfm_store_release(&p->page.heard, p->page.heard + 1);
}

static void a_full_pipe_is_waited_for_once(void)
{
    struct printer p;
    int bytes;

    printer_open(&p);
    bytes = fill(&p);
    p.out.room_ms = 1;
    call(&p, 7, NULL, LONG);
    p.out.room_ms = -1;             /* for ever */
    call(&p, 8, NULL, LONG);
    CHECK_EQ(p.page.clean, 0);
    drain(&p, bytes);
    call(&p, 9, "nine\n", LONG);
    CHECK_HEARD(&p, "nine\n<0>");
    call(&p, 10, "ten\n", LONG);
    CHECK_HEARD(&p, "ten\n<10>");
    printer_close(&p);
}

struct reader {
    struct printer *p;
    int bytes;
};

static void *read_it(void *arg)
{
    struct reader *reader = arg;

    drain(reader->p, reader->bytes);
    return NULL;
}

static void what_comes_after_a_flood_is_known_too(void)
{
    struct printer p;
    struct reader reader = { &p, 0 };
    pthread_t thread;

    printer_open(&p);
    reader.bytes = fill(&p);
    p.out.room_ms = 30000;
    CHECK(pthread_create(&thread, NULL, read_it, &reader) == 0);
    call(&p, 7, NULL, LONG);
    CHECK(pthread_join(thread, NULL) == 0);
    call(&p, 8, "eight\n", LONG);
    CHECK_HEARD(&p, "<7>eight\n<8>");
    printer_close(&p);
}

static void no_mark_gets_into_anything_else(void)
{
    struct printer p;
    struct rfm_output out;
    struct rfm_page_output page = { 0 };
    int other[2];
    int bytes = 0;
    int fd;
    int file = memfd_create("file", MFD_CLOEXEC);

    rfm_output_open(&out, &page, file);
    rfm_output_ended(&out, 7, 1, 1, LONG - 1);
    CHECK_EQ(page.marks, 0);
    CHECK_EQ(lseek(file, 0, SEEK_END), 0);
    rfm_output_close(&out);
    close(file);

    /* a kernel closed it, and opened something else */
    printer_open(&p);
    CHECK(pipe2(other, O_CLOEXEC | O_NONBLOCK) == 0);
    fd = p.out.fd;
    CHECK(dup3(other[1], fd, O_CLOEXEC) == fd);
    CHECK_EQ(write(other[1], "mine", 4), 4);
    call(&p, 7, NULL, LONG);
    CHECK_EQ(p.page.marks, 0);
    CHECK_OK(ioctl(other[0], FIONREAD, &bytes));
    CHECK_EQ(bytes, 4);
    close(fd);
    close(other[0]);
    close(other[1]);
    printer_close(&p);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    rfm_ticks_init();
    RUN(a_call_that_prints_leaves_its_mark);
    RUN(a_short_call_is_looked_at_when_there_is_time);
    RUN(whose_it_is_of_several_short_calls_is_not_said);
    RUN(what_its_caller_knows_needs_no_time);
    RUN(what_was_read_before_the_end_has_its_mark_too);
    RUN(a_mark_that_was_read_makes_no_other_one);
    RUN(what_nobody_called_for_is_nobodys);
    RUN(a_full_pipe_is_waited_for_once);
    RUN(what_comes_after_a_flood_is_known_too);
    RUN(no_mark_gets_into_anything_else);
    return t_finish();
}

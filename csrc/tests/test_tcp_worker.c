/* A worker that lies over tcp: the rank takes nothing that it did not ask for,
 * not one byte outside of that, and what it had ends LOST, with a reason. */
#define _GNU_SOURCE
#include "harness.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "frame.h"
#include "invoker.h"
#include "stream.h"

#define MS         1000000ull
#define SLOTS      4u
#define SLOT_BYTES 256u
#define PAYLOAD    (SLOT_BYTES + 64u)   /* the most that a slot takes */
#define GUARD      4096u

static struct rfm_invoker *inv;
static struct rfm_channel *chan;
static struct {
    int      fd;
    int      data;
    uint32_t flags;
    struct s_message request;   /* the last one that it took */
} liar;

/* Memory before, between and behind what the worker may write. */
static struct rfm_block guards[3];
static struct t_call call;      /* 200 bytes in the slot each way, 64 beside it */

static void make_guard(int i)
{
    CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), GUARD, &guards[i]));
    t_fill(guards[i].address, GUARD, (uint64_t)i + 77);
}

static void check_guards(void)
{
    for (uint64_t i = 0; i < 3; i++) {
        CHECK(t_filled(guards[i].address, GUARD, i + 77));
    }
}

static void begin(void)
{
    uint32_t places[4] = { RFM_BOUND, RFM_INLINE, RFM_BOUND, RFM_INLINE };
    uint64_t sizes[4] = { 64, 200, 64, 100 };

    inv = t_invoker(SLOTS, SLOT_BYTES, 0);
    make_guard(0);
    make_guard(1);
    rfm_heap_free(&guards[1]);
    t_call_make(&call, inv, "echo", 2, 2, places, sizes);
    make_guard(1);
    make_guard(2);
    t_fill(t_in(&call, 0), 64, 1);
    t_fill(t_in(&call, 1), 200, 2);
}

static void end(void)
{
    check_guards();
    t_call_end(&call);
    for (int i = 0; i < 3; i++) {
        rfm_heap_free(&guards[i]);
    }
    t_invoker_end(inv);
}

/* What it will say on its control connection; a rank reads it when it asks. */
static void say(int fd, uint16_t type, const void *body, uint64_t n)
{
    struct iovec iov = { (void *)(uintptr_t)body, n };
    int rc = rfm_frame_send(fd, type, 0, &iov, 1, NULL, 0);

    CHECK((rc == RFM_OK) || (rc == RFM_ERR_PEER));
}

static void say_attached(int fd, int32_t status, const void *parcel, uint32_t n)
{
    struct rfm_ctl_attached body = { .status = status, .pid = 1 };
    uint8_t bytes[sizeof(body) + 512];

    memcpy(bytes, &body, sizeof(body));
    memcpy(bytes + sizeof(body), parcel, n);
    say(fd, RFM_CTL_ATTACHED, bytes, sizeof(body) + n);
}

static struct rfm_attach_attr dial(uint32_t flags)
{
    struct rfm_attach_attr attr = {
        .transport  = RFM_TRANSPORT_TCP,
        .lease      = 1,
        .worker     = 1,
        .timeout_ns = T_FOREVER,
        .flags      = flags,
    };
    int control[2];
    int data[2];

    t_tcp_pair(control);
    t_tcp_pair(data);
    memset(&liar, 0, sizeof(liar));
    liar.flags   = flags;
    liar.fd      = control[1];
    liar.data    = data[1];
    attr.fd      = control[0];
    attr.data_fd = data[0];
    return attr;
}

static void up(uint32_t flags)
{
    struct rfm_tcp_parcel parcel = { .flags = flags };
    struct rfm_ctl_arena_ready ready = { .arena = 1 };
    struct rfm_attach_attr attr = dial(flags);

    say_attached(liar.fd, RFM_OK, &parcel, sizeof(parcel));
    say(liar.fd, RFM_CTL_ARENA_READY, &ready, sizeof(ready));
    chan = t_attach(inv, &attr);
    memset(t_out(&call, 0), 0xcc, 64);
    memset(t_out(&call, 1), 0xcc, 100);
}

static void down(void)
{
    close(liar.fd);
    close(liar.data);
}

static void until_fenced(void)
{
    struct rfm_channel_info info;

    do {
        rfm_channel_info(chan, &info);
        sched_yield();
    } while (!info.fenced);
}

/* The next request, as the worker sees it. */
static void take(void)
{
    CHECK(s_read(liar.data, &liar.request));
    CHECK_EQ(liar.request.head.type, RFM_STREAM_REQUEST);
    CHECK_EQ(liar.request.head.flags, liar.flags);
}

/* An honest answer to it. */
static struct s_message an_answer(void)
{
    struct s_message m;

    memset(&m, 0, sizeof(m));
    m.n_descs   = 1;
    m.n_payload = 64 + 100 + 16;        /* two sizes, the output, its canary */
    m.n_data    = 64;
    m.descs[0]  = (struct rfm_desc){
        .arena = call.blocks[2].arena_id, .offset = call.blocks[2].offset,
        .size  = 64,
    };
    m.head = (struct rfm_stream_head){
        .magic = RFM_STREAM_MAGIC,
        .type  = RFM_STREAM_REPLY,
        .flags = (uint16_t)liar.flags,
        .slot  = liar.request.head.slot,
    };
    m.line.reply = (struct rfm_reply_line){
        .id        = liar.request.line.request.id,
        .out_bytes = 64,
        .flags     = RFM_REP_SIZES,
    };
    memcpy(m.payload, (uint64_t[]){ 64, 100 }, 16);
    t_fill(m.payload + 64, 100, 3);
    t_fill(m.data, 64, 4);
    s_count(&m);
    return m;
}

static void answer(const struct s_message *m)
{
    uint8_t bytes[S_BYTES];

    (void)s_send(liar.data, bytes, s_pack(m, bytes));
}

static void is_served(void)
{
    struct s_message m;

    t_start(&call);
    take();
    CHECK_EQ(liar.request.n_descs, 1);
    CHECK_EQ(liar.request.n_payload, 200);
    CHECK(t_filled(liar.request.data, 64, 1));
    CHECK(t_filled(liar.request.payload, 200, 2));
    m = an_answer();
    answer(&m);
    CHECK_EQ(t_wait(&call), RFM_DONE);
    CHECK(t_filled(t_out(&call, 0), 64, 4));
    CHECK(t_filled(t_out(&call, 1), 100, 3));
    CHECK_EQ(call.sizes[1], 100);
}

/* What it was lost for; nothing was written outside, and nothing that comes by
 * way of the slot. */
static void is_refused(const char *why)
{
    CHECK_EQ(t_wait(&call), RFM_LOST);
    until_fenced();
    CHECK(rfm_channel_why(chan) != NULL);
    if (strstr(rfm_channel_why(chan), why) == NULL) {
        fprintf(stderr, "ended with: %s\n", rfm_channel_why(chan));
        CHECK(!why);
    }
    for (int i = 0; i < 100; i++) {
        CHECK_EQ(((uint8_t *)t_out(&call, 1))[i], 0xcc);
    }
    check_guards();
    down();
}

static void an_honest_worker_by_hand_is_believed(void)
{
    begin();
    for (uint32_t flags = 0; flags <= RFM_STREAM_CRC; flags++) {
        up(flags);
        for (int i = 0; i < 20; i++) {
            is_served();
        }
        rfm_channel_close(chan);
        down();
        until_fenced();
    }
    end();
}

static void heads_that_make_no_sense_end_the_channel(void)
{
    static const char nonsense[] = "a message that made no sense";
    static const char unasked[] = "a reply that nobody asked for";
    static const struct {
        struct rfm_stream_head xor;
        const char *why;
    } cases[] = {
        { { .magic = 1 }, nonsense },
        { { .magic = 1u << 31 }, nonsense },
        { { .magic = RFM_STREAM_MAGIC }, nonsense },
        { { .type = 1 }, nonsense },
        { { .type = 2 }, nonsense },
        { { .type = RFM_STREAM_REQUEST ^ RFM_STREAM_REPLY }, nonsense },
        { { .type = 0xfffd }, nonsense },
        { { .flags = RFM_STREAM_CRC }, nonsense },
        { { .flags = 2 }, nonsense },
        { { .flags = 0xfffe }, nonsense },
        { { .slot = 1 }, unasked },
        { { .slot = SLOTS }, nonsense },
        { { .slot = UINT32_MAX }, nonsense },
        { { .n_regions = 64 }, nonsense },
        { { .n_regions = UINT32_MAX }, nonsense },
        { { .payload_bytes = 180 ^ (PAYLOAD + 1) }, nonsense },
        { { .payload_bytes = 1ull << 63 }, nonsense },
        { { .payload_bytes = UINT64_MAX }, nonsense },
        { { .region_bytes = 1 }, "whose lengths differ" },
        { { .region_bytes = 64 }, "whose lengths differ" },
        { { .region_bytes = UINT64_MAX }, "whose lengths differ" },
    };

    begin();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct s_message m;

        up((uint32_t)(i % 2));
        t_start(&call);
        take();
        m = an_answer();
        m.head.magic         ^= cases[i].xor.magic;
        m.head.type          ^= cases[i].xor.type;
        m.head.flags         ^= cases[i].xor.flags;
        m.head.slot          ^= cases[i].xor.slot;
        m.head.n_regions     ^= cases[i].xor.n_regions;
        m.head.payload_bytes ^= cases[i].xor.payload_bytes;
        m.head.region_bytes  ^= cases[i].xor.region_bytes;
        answer(&m);
        is_refused(cases[i].why);
    }
    end();
}

static void more_than_was_asked_for_is_not_taken(void)
{
    static const char outside[] = "memory that was not granted";
    static const uint64_t sizes[] = { 65, 128, 4096, 1ull << 32, 1ull << 63,
                                      UINT64_MAX };

    begin();
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct s_message m;

        up(0);
        t_start(&call);
        take();
        m = an_answer();
        m.descs[0].size = sizes[i];
        m.n_data = S_DATA;
        s_count(&m);
        answer(&m);
        is_refused(outside);
    }
    /* one more than there are outputs in arenas, or three, and none of it */
    for (uint32_t n = 2; n <= S_DESCS; n++) {
        for (uint64_t size = 0; size <= 64; size += 64) {
            struct s_message m;

            up(0);
            t_start(&call);
            take();
            m = an_answer();
            m.n_descs = n;
            for (uint32_t k = 1; k < n; k++) {
                m.descs[k] = (struct rfm_desc){ .arena = 1, .size = size };
            }
            s_count(&m);
            m.n_data = (uint32_t)m.head.region_bytes;
            answer(&m);
            is_refused(outside);
        }
    }
    /* where it goes is the rank's affair, whatever the worker says */
    up(0);
    t_start(&call);
    take();
    {
        struct s_message m = an_answer();

        m.descs[0].arena  = UINT32_MAX;
        m.descs[0].offset = guards[2].offset;
        answer(&m);
    }
    CHECK_EQ(t_wait(&call), RFM_DONE);
    CHECK(t_filled(t_out(&call, 0), 64, 4));
    check_guards();
    rfm_channel_close(chan);
    down();
    until_fenced();
    end();
}

static void lines_that_make_no_sense_end_the_channel(void)
{
    static const char nonsense[] = "a reply that made no sense";
    static const struct rfm_reply_line lines[] = {
        { .status = RFM_ST_TAKEN_BACK },
        { .status = RFM_ST_LAST + 1 },
        { .status = UINT32_MAX },
        { .out_bytes = 65 },
        { .out_bytes = UINT64_MAX },
        { .status = RFM_ST_KERNEL, .out_bytes = SLOT_BYTES + 1 },
        { .status = RFM_ST_KERNEL, .out_bytes = UINT64_MAX },
        { .status = RFM_ST_BAD_KERNEL, .out_bytes = 1ull << 63 },
        { .status = RFM_ST_PROTOCOL, .out_bytes = 100000 },
    };

    begin();
    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        struct s_message m;

        up(0);
        t_start(&call);
        take();
        m = an_answer();
        m.line.reply    = lines[i];
        m.line.reply.id = liar.request.line.request.id;
        answer(&m);
        is_refused(nonsense);
    }
    for (uint64_t bad = 0; bad < 2; bad++) {
        for (uint64_t size = 101; size != 0; size = (size >> 63) ? 0 : size << 8) {
            struct s_message m;

            up(0);
            t_start(&call);
            take();
            m = an_answer();
            memcpy(m.payload + 8 * bad, &size, 8);
            answer(&m);
            is_refused(nonsense);
        }
    }
    end();
}

static void ids_that_were_not_asked_for_end_the_channel(void)
{
    static const uint64_t xors[] = { 1, 2, 1ull << 32, 1ull << 63, UINT64_MAX };

    begin();
    for (size_t i = 0; i <= sizeof(xors) / sizeof(xors[0]); i++) {
        struct s_message m;

        up(0);
        is_served();
        memset(t_out(&call, 1), 0xcc, 100);
        t_start(&call);
        take();
        m = an_answer();
        /* the last one: an id that was answered before */
        m.line.reply.id ^= (i < 5) ? xors[i]
                                   : m.line.reply.id ^ (m.line.reply.id - 1);
        answer(&m);
        is_refused("a reply that nobody asked for");
    }
    end();
}

/* Asleep for something else, and not awake all the time for that. */
static void sleep_until_fenced(void)
{
    struct rfm_channel_info info;

    do {
        (void)rfm_wait(inv, NULL, 0, RFM_WAIT_WATCHED, 0, T_FOREVER, false, NULL);
        rfm_channel_info(chan, &info);
    } while (!info.fenced);
}

static void what_nobody_asked_for_ends_the_channel_of_a_sleeper(void)
{
    begin();
    for (int times = 0; times < 3; times++) {
        uint8_t bytes[S_BYTES];
        struct s_message m;
        uint32_t n;

        up(0);
        is_served();
        m = an_answer();
        n = s_pack(&m, bytes);
        switch (times) {
        case 0:                 /* the same again */
            CHECK(s_send(liar.data, bytes, n));
            break;
        case 1:                 /* the beginning of it, then no more */
            CHECK(s_send(liar.data, bytes, 20));
            CHECK(shutdown(liar.data, SHUT_WR) == 0);
            break;
        default:
            CHECK(shutdown(liar.data, SHUT_WR) == 0);
            break;
        }
        sleep_until_fenced();
        CHECK(strstr(rfm_channel_why(chan), (times == 0)
                                                ? "nobody asked for"
                                                : "closed the connection") !=
              NULL);
        check_guards();
        down();
    }
    /* behind a good one, in one piece */
    up(0);
    t_start(&call);
    take();
    {
        struct s_message m = an_answer();
        uint8_t bytes[2 * S_BYTES];
        uint32_t n = s_pack(&m, bytes);

        memcpy(bytes + n, bytes, n);
        CHECK(s_send(liar.data, bytes, 2 * n));
    }
    CHECK_EQ(t_wait(&call), RFM_DONE);
    memset(t_out(&call, 0), 0x11, 64);
    sleep_until_fenced();
    CHECK_EQ(((uint8_t *)t_out(&call, 0))[0], 0x11);
    down();
    end();
}

/* Its memory would be free for other use while it still is to be sent. */
static void a_reply_to_what_was_not_sent_yet_ends_the_channel(void)
{
    uint32_t places[2] = { RFM_BOUND, RFM_INLINE };
    uint64_t sizes[2] = { 32u << 20, 8 };
    struct t_call large;

    begin();
    t_call_make(&large, inv, "echo", 1, 1, places, sizes);
    memset(t_in(&large, 0), 7, sizes[0]);
    {
        struct rfm_tcp_parcel parcel = { 0 };
        struct rfm_attach_attr attr = dial(0);

        say_attached(liar.fd, RFM_OK, &parcel, sizeof(parcel));
        for (uint32_t i = 2; i > 0; i--) {
            struct rfm_ctl_arena_ready ready = { .arena = i };

            say(liar.fd, RFM_CTL_ARENA_READY, &ready, sizeof(ready));
        }
        chan = t_attach(inv, &attr);
    }
    t_start(&large);
    CHECK(s_receive(liar.data, &liar.request.head, sizeof(liar.request.head)));
    CHECK(s_receive(liar.data, &liar.request.line, sizeof(liar.request.line)));
    CHECK_EQ(liar.request.head.region_bytes, sizes[0]);
    {
        struct s_message m = an_answer();

        m.n_descs = m.n_payload = m.n_data = 0;
        m.line.reply.flags     = 0;
        m.line.reply.out_bytes = 8;
        s_count(&m);
        answer(&m);
    }
    CHECK_EQ(t_wait(&large), RFM_LOST);
    until_fenced();
    CHECK(strstr(rfm_channel_why(chan), "not sent yet") != NULL);
    t_call_end(&large);
    down();
    end();
}

static void a_flipped_bit_is_never_taken_where_it_is_checked(void)
{
    uint32_t n = 1;

    begin();
    for (uint32_t bit = 0; bit < 8 * n; bit += T_TSAN ? 61 : 11) {
        uint8_t bytes[S_BYTES];
        struct s_message m;

        up(RFM_STREAM_CRC);
        t_start(&call);
        take();
        m = an_answer();
        n = s_pack(&m, bytes);
        bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        (void)s_send(liar.data, bytes, n);
        (void)shutdown(liar.data, SHUT_WR);
        is_refused("");
    }
    end();
}

static void an_answer_cut_at_any_byte_is_none(void)
{
    begin();
    for (uint32_t flags = 0; flags <= RFM_STREAM_CRC; flags++) {
        uint32_t n = 1;

        for (uint32_t cut = 0; cut < n; cut += (cut < 120) ? 1 : 13) {
            uint8_t bytes[S_BYTES];
            struct s_message m;

            up(flags);
            t_start(&call);
            take();
            m = an_answer();
            n = s_pack(&m, bytes);
            CHECK(s_send(liar.data, bytes, cut));
            CHECK(shutdown(liar.data, SHUT_WR) == 0);
            is_refused("closed the connection");
        }
    }
    end();
}

static void bytes_that_come_one_by_one_are_taken(void)
{
    begin();
    up(RFM_STREAM_CRC);
    for (int i = 0; i < 3; i++) {
        uint8_t bytes[S_BYTES];
        struct s_message m;
        uint32_t n;

        t_start(&call);
        take();
        m = an_answer();
        n = s_pack(&m, bytes);
        for (uint32_t k = 0; k < n; k++) {
            CHECK(s_send(liar.data, bytes + k, 1));
        }
        CHECK_EQ(t_wait(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), 64, 4));
        CHECK(t_filled(t_out(&call, 1), 100, 3));
    }
    rfm_channel_close(chan);
    down();
    until_fenced();
    end();
}

/* Stopped in the middle of its answer; its time limit passed; the memory is used
 * again; then it goes on. */
static void after_its_time_limit_not_one_byte_of_an_answer_is_written(void)
{
    begin();
    for (uint32_t part = 0; part < 4; part++) {
        uint8_t bytes[S_BYTES];
        struct s_message m;
        uint32_t sent;
        uint32_t n;

        up(0);
        CHECK_OK(rfm_request_start(&call.req, 10 * MS));
        take();
        CHECK(liar.request.line.request.budget_ns > 0);
        CHECK(liar.request.line.request.budget_ns <= 10 * MS);
        m    = an_answer();
        n    = s_pack(&m, bytes);
        /* nothing; some of the head; all but the region; half of that */
        sent = (uint32_t[]){ 0, 40, n - 64, n - 32 }[part];
        CHECK(s_send(liar.data, bytes, sent));
        CHECK_EQ(t_wait(&call), RFM_LOST);
        CHECK_EQ(call.req.expired, 1);
        t_fill(t_out(&call, 0), 64, 9);
        t_fill(t_out(&call, 1), 100, 10);
        (void)s_send(liar.data, bytes + sent, n - sent);
        (void)s_send(liar.data, bytes, n);
        until_fenced();
        CHECK(strstr(rfm_channel_why(chan), "did not let go in time") != NULL);
        CHECK(t_filled(t_out(&call, 0), 64, 9));
        CHECK(t_filled(t_out(&call, 1), 100, 10));
        check_guards();
        down();
    }
    end();
}

/* --- control connection ------------------------------------------------------ */

static void attaches_that_make_no_sense_are_errors_and_leave_nothing(void)
{
    static const struct {
        int32_t status;
        uint32_t n;
        uint32_t flags;
        int rc;
    } cases[] = {
        { 0, 0, 0, RFM_ERR_PROTOCOL },
        { 0, 4, 0, RFM_ERR_PROTOCOL },
        { 0, 7, 0, RFM_ERR_PROTOCOL },
        { 0, 9, 0, RFM_ERR_PROTOCOL },
        { 0, 256, 0, RFM_ERR_PROTOCOL },
        { 0, 257, 0, RFM_ERR_PROTOCOL },
        { 0, 500, 0, RFM_ERR_PROTOCOL },
        { 0, 8, 2, RFM_ERR_PROTOCOL },
        { 0, 8, UINT32_MAX, RFM_ERR_PROTOCOL },
        { RFM_ERR_NO_RESOURCE, 0, 0, RFM_ERR_NO_RESOURCE },
        { RFM_ERR_NO_MEMORY, 8, 0, RFM_ERR_NO_MEMORY },
    };
    uint8_t bytes[512] = { 0 };
    struct rfm_channel *none;
    uint32_t fds;

    begin();
    up(0);                      /* so that there is a side */
    is_served();
    fds = t_open_fds() - 2;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        int ours[2] = { liar.fd, liar.data };
        struct rfm_attach_attr attr = dial(0);

        memcpy(bytes, &cases[i].flags, 4);
        say_attached(liar.fd, cases[i].status, bytes, cases[i].n);
        CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &none), cases[i].rc);
        down();
        liar.fd   = ours[0];
        liar.data = ours[1];
        liar.flags = 0;
    }
    /* other frames, pieces of frames, and no frame */
    for (uint16_t type = 0; type < 70; type++) {
        int ours[2] = { liar.fd, liar.data };
        struct rfm_attach_attr attr;

        if (type == RFM_CTL_ATTACHED) {
            continue;
        }
        attr = dial(0);
        say(liar.fd, type, bytes, type);
        CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &none), RFM_ERR_PROTOCOL);
        down();
        liar.fd   = ours[0];
        liar.data = ours[1];
    }
    for (uint32_t cut = 0; cut < 40; cut++) {
        int ours[2] = { liar.fd, liar.data };
        struct rfm_attach_attr attr = dial(0);
        struct rfm_frame head = { .length = 24, .type = RFM_CTL_ATTACHED };

        memset(bytes, 0, sizeof(bytes));
        memcpy(bytes, &head, sizeof(head));
        CHECK(s_send(liar.fd, bytes, cut));
        CHECK(shutdown(liar.fd, SHUT_WR) == 0);
        CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &none), RFM_ERR_PEER);
        down();
        liar.fd   = ours[0];
        liar.data = ours[1];
    }
    CHECK_EQ(t_open_fds(), fds + 2);
    is_served();
    rfm_channel_close(chan);
    down();
    until_fenced();
    end();
}

/* All but the first, until the rank lets go. */
static void *refuse_arenas(void *arg)
{
    static uint8_t body[65536];
    struct rfm_frame head;

    while (s_receive(liar.fd, &head, sizeof(head))) {
        struct rfm_ctl_arena_ready ready = { .status = RFM_ERR_NO_MEMORY };

        CHECK(head.length <= sizeof(body));
        CHECK(s_receive(liar.fd, body, head.length));
        memcpy(&ready.arena, body, sizeof(ready.arena));
        if ((head.type == RFM_CTL_ARENA) && (ready.arena != 1)) {
            say(liar.fd, RFM_CTL_ARENA_READY, &ready, sizeof(ready));
        }
    }
    return arg;
}

static void mirrors_that_can_not_be_made_fail_what_needs_them_alone(void)
{
    static const char text[] = "needs 4194304 bytes, and 17 are left";
    struct {
        struct rfm_ctl_arena_ready ready;
        char why[sizeof(text)];
    } no = { .ready = { .arena = 1 } };
    uint64_t bytes = sizeof(no.ready) + sizeof(text) - 1;
    struct rfm_tcp_parcel parcel = { 0 };

    memcpy(no.why, text, sizeof(text));
    begin();
    for (int32_t status = -12; status < 0; status++) {
        struct rfm_attach_attr attr = dial(0);
        struct t_call small;

        no.ready.status = status;
        say_attached(liar.fd, RFM_OK, &parcel, sizeof(parcel));
        say(liar.fd, RFM_CTL_ARENA_READY, &no, bytes);
        chan = t_attach(inv, &attr);
        CHECK_EQ(t_invoke(&call), RFM_NO_ROOM);
        CHECK(strcmp(t_text(&call), text) == 0);
        /* again, and with a time limit */
        CHECK_OK(rfm_request_start(&call.req, T_FOREVER));
        CHECK_EQ(t_wait(&call), RFM_NO_ROOM);
        /* what lies in none is sent as ever */
        t_call_inline(&small, inv, "echo", 8, 8);
        t_start(&small);
        take();
        CHECK_EQ(liar.request.n_descs, 0);
        rfm_channel_close(chan);
        down();
        CHECK_EQ(t_wait(&small), RFM_LOST);
        until_fenced();
        t_call_end(&small);
    }
    /* for those that come later: the first one serves as before */
    up(0);
    {
        uint32_t places[2] = { RFM_BOUND, RFM_BOUND };
        uint64_t sizes[2] = { 8u << 20, 8 };
        struct t_call large;
        pthread_t thread;

        CHECK_EQ(pthread_create(&thread, NULL, refuse_arenas, NULL), 0);
        t_call_make(&large, inv, "echo", 1, 1, places, sizes);
        CHECK_EQ(t_invoke(&large), RFM_NO_ROOM);
        is_served();
        t_call_end(&large);
        is_served();
        rfm_channel_close(chan);        /* its end is the thread's */
        pthread_join(thread, NULL);
        down();
    }
    until_fenced();
    end();
}

static void a_refusal_of_what_was_not_asked_ends_the_channel(void)
{
    static const struct rfm_ctl_arena_ready lies[] = {
        { .arena = 2, .status = -1 },
        { .arena = 0, .status = -1 },
        { .arena = UINT32_MAX, .status = -1 },
    };

    begin();
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        up(0);
        t_start(&call);
        take();
        say(liar.fd, RFM_CTL_ARENA_READY, &lies[i], sizeof(lies[i]));
        is_refused("its control connection failed");
    }
    end();
}

static void nonsense_on_the_control_connection_ends_the_channel(void)
{
    static const struct rfm_frame heads[] = {
        { .length = 5000, .type = RFM_CTL_DRAIN },      /* too long */
        { .length = UINT32_MAX, .type = 77 },
        { .type = RFM_CTL_DRAIN, .n_fds = 1 },
        { .type = RFM_CTL_DRAIN, .n_fds = 65535 },
        { .type = RFM_CTL_ARENA_READY },
    };

    begin();
    for (size_t i = 0; i < sizeof(heads) / sizeof(heads[0]); i++) {
        up(0);
        t_start(&call);
        take();
        CHECK(s_send(liar.fd, &heads[i], sizeof(heads[i])));
        is_refused("control connection");
    }
    /* too long a parcel */
    {
        uint8_t bytes[8 + RFM_MAX_PARCEL + 1] = { 0 };

        up(0);
        t_start(&call);
        take();
        say(liar.fd, RFM_CTL_ARENA_READY, bytes, sizeof(bytes));
        is_refused("control connection");
    }
    end();
}

static void its_last_words_are_a_text_whatever_it_says(void)
{
    begin();
    for (uint32_t n = 1; n < 4000; n = n * 3 + 1) {
        uint8_t words[4000];

        up(0);
        t_start(&call);
        take();
        t_fill(words, n, n);
        say(liar.fd, RFM_CTL_REFUSED, words, n);
        say(liar.fd, RFM_CTL_REFUSED, "and more", 8);
        close(liar.data);
        liar.data = dup(liar.fd);
        CHECK_EQ(t_wait(&call), RFM_LOST);
        until_fenced();
        CHECK(rfm_channel_why(chan) != NULL);
        CHECK(strlen(rfm_channel_why(chan)) <= n);
        for (const char *c = rfm_channel_why(chan); *c != 0; c++) {
            CHECK((*c >= 32) && (*c < 127));
            CHECK((c[0] == (char)words[c - rfm_channel_why(chan)]) ||
                  (c[0] == '?'));
        }
        down();
    }
    end();
}

/* Whichever connection ends first, what it said is known. */
static void why_it_hung_up_is_known_whichever_connection_ends_first(void)
{
    begin();
    for (int first = 0; first < 2; first++) {
        up(0);
        t_start(&call);
        take();
        say(liar.fd, RFM_CTL_REFUSED, "no more of that", 15);
        CHECK(shutdown((first == 0) ? liar.data : liar.fd, SHUT_RDWR) == 0);
        is_refused("no more of that");
    }
    for (int first = 0; first < 2; first++) {
        up(0);
        t_start(&call);
        take();
        CHECK(shutdown((first == 0) ? liar.data : liar.fd, SHUT_RDWR) == 0);
        is_refused((first == 0) ? "closed the connection"
                                : "the worker is gone");
    }
    end();
}

static void an_answer_right_before_the_end_counts(void)
{
    begin();
    for (int how = 0; how < 60; how++) {
        struct s_message m;

        up(0);
        t_start(&call);
        take();
        m = an_answer();
        answer(&m);
        if (how % 3 != 1) {
            (void)shutdown(liar.data, SHUT_WR);
        }
        if (how % 3 != 0) {
            (void)shutdown(liar.fd, SHUT_WR);
        }
        CHECK_EQ(t_wait(&call), RFM_DONE);
        CHECK(t_filled(t_out(&call, 0), 64, 4));
        down();
        (void)rfm_channel_kill(chan);
        until_fenced();
    }
    end();
}

/* --- at random ----------------------------------------------------------------- */

static void random_answers_never_harm_a_rank(void)
{
    static const uint64_t edges[] = { 0, 1, 8, 63, 64, 65, 100, 180, SLOT_BYTES,
                                      PAYLOAD, PAYLOAD + 1, 1ull << 32,
                                      1ull << 63, UINT64_MAX };
    uint32_t rounds = t_scaled(4000, 400);
    struct t_random r = { 13 };
    uint32_t ends[10] = { 0 };

    begin();
    for (uint32_t round = 0; round < rounds;) {
        struct rfm_channel_info info = { .alive = 1 };

        up((uint32_t)t_below(&r, 2));
        for (; (info.alive != 0) && (round < rounds); round++) {
            uint64_t value = edges[t_below(&r, 14)] + t_below(&r, 3) - 1;
            uint8_t bytes[S_BYTES];
            struct s_message m;
            uint32_t n;

            t_start(&call);
            if (!s_read(liar.data, &liar.request)) {
                break;
            }
            m = an_answer();
            switch (t_below(&r, 24)) {
            case 0:
                m.descs[0].size = value;
                break;
            case 1:
                m.head.n_regions = (uint32_t)value;
                break;
            case 2:
                m.head.region_bytes = value;
                break;
            case 3:
                m.head.payload_bytes = value;
                break;
            case 4:
                m.head.slot = (uint32_t)value;
                break;
            case 5:
                m.line.reply.out_bytes = value;
                break;
            case 6:
                m.line.reply.status = (uint32_t)value;
                break;
            case 7:
                m.line.reply.flags = (uint32_t)value;
                break;
            case 8:
                m.line.reply.id ^= value;
                break;
            case 9:
                memcpy(m.payload + 8 * t_below(&r, 2), &value, 8);
                break;
            case 10:
                m.line.reply.exec_ns = value;
                break;
            case 11:
                m.n_descs = (uint32_t)t_below(&r, S_DESCS + 1);
                s_count(&m);
                break;
            default:
                break;
            }
            n = s_pack(&m, bytes);
            if (t_below(&r, 20) == 0) {
                bytes[t_below(&r, n)] ^= (uint8_t)(1u << t_below(&r, 8));
            }
            if (t_below(&r, 30) == 0) {
                n = (uint32_t)t_below(&r, n);
            }
            (void)s_send(liar.data, bytes, n);
            if ((m.head.region_bytes != m.n_data) ||
                (m.head.payload_bytes != m.n_payload) ||
                (n != s_pack(&m, bytes)) || (t_below(&r, 40) == 0)) {
                (void)shutdown(liar.data, SHUT_WR);     /* no more comes */
            }
            while (!rfm_request_ended(&call.req)) {
                struct rfm_request *req = &call.req;

                /* what an error text cut off is never made up for */
                if (rfm_wait(inv, &req, 1, RFM_WAIT_ALL, 0, 20 * MS, false,
                             NULL) < 0) {
                    (void)shutdown(liar.data, SHUT_WR);
                }
            }
            ends[call.req.outcome]++;
            check_guards();
            rfm_channel_info(chan, &info);
        }
        rfm_invoker_abandon(inv);
        (void)t_wait(&call);
        (void)rfm_channel_kill(chan);
        until_fenced();
        down();
    }
    CHECK(ends[RFM_DONE] > 0);
    CHECK(ends[RFM_LOST] > 0);
    CHECK(ends[RFM_KERNEL_ERROR] > 0);
    end();
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(an_honest_worker_by_hand_is_believed);
    RUN(heads_that_make_no_sense_end_the_channel);
    RUN(more_than_was_asked_for_is_not_taken);
    RUN(lines_that_make_no_sense_end_the_channel);
    RUN(ids_that_were_not_asked_for_end_the_channel);
    RUN(what_nobody_asked_for_ends_the_channel_of_a_sleeper);
    RUN(a_reply_to_what_was_not_sent_yet_ends_the_channel);
    RUN(a_flipped_bit_is_never_taken_where_it_is_checked);
    RUN(an_answer_cut_at_any_byte_is_none);
    RUN(bytes_that_come_one_by_one_are_taken);
    RUN(after_its_time_limit_not_one_byte_of_an_answer_is_written);
    RUN(attaches_that_make_no_sense_are_errors_and_leave_nothing);
    RUN(mirrors_that_can_not_be_made_fail_what_needs_them_alone);
    RUN(a_refusal_of_what_was_not_asked_ends_the_channel);
    RUN(nonsense_on_the_control_connection_ends_the_channel);
    RUN(its_last_words_are_a_text_whatever_it_says);
    RUN(why_it_hung_up_is_known_whichever_connection_ends_first);
    RUN(an_answer_right_before_the_end_counts);
    RUN(random_answers_never_harm_a_rank);
    return t_finish();
}

/* A rank that lies over tcp: what makes no sense is refused with a reason, and
 * the worker serves the others as before. */
#define _GNU_SOURCE
#include "harness.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "frame.h"
#include "invoker.h"
#include "stream.h"

#define MS         1000000ull
#define SLOTS      4u
#define SLOT_BYTES 256u
#define PAYLOAD    (SLOT_BYTES + 64u)   /* the most that a slot takes */
#define ARENA      8192u

static struct t_worker worker;
static struct rfm_invoker *inv;

/* --- control frames by hand ------------------------------------------------ */

static void send_frame(int fd, uint16_t type, const void *body, uint64_t n)
{
    struct iovec iov = { (void *)(uintptr_t)body, n };
    int rc = rfm_frame_send(fd, type, 0, &iov, 1, NULL, 0);

    CHECK((rc == RFM_OK) || (rc == RFM_ERR_PEER));
}

/* The next one; RFM_ERR_PEER at the end. */
static int read_frame(int fd, struct rfm_rx *rx)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };
    int rc;

    rfm_rx_init(rx, RFM_MAX_FRAME);
    while ((rc = rfm_rx_read(rx, fd)) == RFM_ERR_AGAIN) {
        (void)poll(&p, 1, -1);
    }
    return rc;
}

/* --- a rank that lies -------------------------------------------------------- */

static struct {
    int      fd;
    int      data;
    uint32_t flags;
    uint32_t frames;            /* sent on the control connection */
    uint64_t ticket;
    uint64_t id;
} rank;

static struct t_call honest;

static void the_others_are_served(void)
{
    static uint64_t seed;

    t_fill(t_in(&honest, 0), 40, ++seed);
    CHECK_EQ(t_invoke(&honest), RFM_DONE);
    CHECK(t_filled(t_out(&honest, 0), 40, seed));
}

static void up(void)
{
    struct rfm_attach_attr attr;

    t_worker_start(&worker, false, 20);
    inv  = t_invoker(2, T_SLOT_BYTES, 20);
    attr = t_dial(&worker, RFM_TRANSPORT_TCP);
    (void)t_attach(inv, &attr);
    t_call_inline(&honest, inv, "echo", 40, 40);
    the_others_are_served();
}

static uint32_t fds_of(pid_t pid)
{
    char path[64];
    uint32_t n = 0;
    DIR *dir;

    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    dir = opendir(path);
    CHECK(dir != NULL);
    while (readdir(dir) != NULL) {
        n++;
    }
    closedir(dir);
    return n;
}

static void down(void)
{
    the_others_are_served();
    t_call_end(&honest);
    t_invoker_end(inv);
    t_worker_end(&worker);
}

static void rank_frame(uint16_t type, const void *body, uint64_t n)
{
    send_frame(rank.fd, type, body, n);
    rank.frames++;
}

static void rank_dial(uint32_t flags)
{
    struct rfm_attach_attr attr = t_dial(&worker, RFM_TRANSPORT_TCP);

    memset(&rank, 0, sizeof(rank));
    rank.fd    = attr.fd;
    rank.data  = attr.data_fd;
    rank.flags = flags;
}

static int rank_attach_with(const struct rfm_ctl_attach *body, const void *parcel,
                            uint32_t n)
{
    uint8_t bytes[sizeof(*body) + 512];
    struct rfm_ctl_attached answer;
    struct rfm_rx rx;
    int rc;

    memcpy(bytes, body, sizeof(*body));
    memcpy(bytes + sizeof(*body), parcel, n);
    rank_frame(RFM_CTL_ATTACH, bytes, sizeof(*body) + n);
    rc = read_frame(rank.fd, &rx);
    if (rc < 0) {               /* shm: descriptors don't come this way */
        rfm_rx_fini(&rx);
        return rc;
    }
    CHECK_EQ(rx.head.type, RFM_CTL_ATTACHED);
    memcpy(&answer, rx.body, sizeof(answer));
    rfm_rx_fini(&rx);
    return answer.status;
}

static struct rfm_ctl_attach good_attach(void)
{
    return (struct rfm_ctl_attach){
        .slots      = SLOTS,
        .slot_bytes = SLOT_BYTES,
        .transport  = RFM_TRANSPORT_TCP,
    };
}

static void rank_arena(uint32_t number)
{
    struct rfm_ctl_arena body = { .arena = number, .bytes = ARENA };
    struct rfm_ctl_arena_ready ready;
    struct rfm_rx rx;

    rank_frame(RFM_CTL_ARENA, &body, sizeof(body));
    CHECK_OK(read_frame(rank.fd, &rx));
    CHECK_EQ(rx.head.type, RFM_CTL_ARENA_READY);
    CHECK_EQ(rx.head.length, sizeof(ready));
    memcpy(&ready, rx.body, sizeof(ready));
    CHECK_EQ(ready.arena, number);
    CHECK_OK(ready.status);
    rfm_rx_fini(&rx);
}

static void rank_kernel(uint32_t number, const char *name)
{
    uint8_t bytes[128];
    struct rfm_ctl_kernel body = { .kernel = number, .kind = 2,
                                   .blob_bytes = strlen(name) };

    memcpy(bytes, &body, sizeof(body));
    memcpy(bytes + sizeof(body), name, strlen(name));
    rank_frame(RFM_CTL_KERNEL, bytes, sizeof(body) + strlen(name));
}

static void rank_bind(uint32_t number, uint32_t kernel, uint16_t n_in,
                      uint16_t n_out, const struct rfm_wire_arg *args)
{
    uint8_t bytes[256];
    struct rfm_ctl_bind body = { .binding = number, .kernel = kernel,
                                 .n_in = n_in, .n_out = n_out };
    uint64_t n = ((uint64_t)n_in + n_out) * sizeof(*args);

    memcpy(bytes, &body, sizeof(body));
    memcpy(bytes + sizeof(body), args, n);
    rank_frame(RFM_CTL_BIND, bytes, sizeof(body) + n);
}

static const struct rfm_wire_arg args[3] = {
    { .place = RFM_BOUND, .arena = 1, .offset = 128, .size = 64 },
    { .place = RFM_INLINE, .size = 200 },
    { .place = RFM_BOUND, .arena = 1, .offset = ARENA - 64, .size = 64 },
};

/* Binding 7 echoes 64 bytes of arena 1 into another place of it; 200 more
 * travel in the slot. */
static void rank_up(uint32_t flags)
{
    struct rfm_tcp_parcel parcel = { .flags = flags };
    struct rfm_ctl_attach attach = good_attach();

    rank_dial(flags);
    CHECK_OK(rank_attach_with(&attach, &parcel, sizeof(parcel)));
    rank_arena(1);
    rank_kernel(0, "echo");
    rank_bind(7, 0, 2, 1, args);
}

static void rank_down(void)
{
    close(rank.fd);
    close(rank.data);
    (void)t_worker_expect(&worker, RFM_AGENT_GONE);
}

/* The next one, with the next id. */
static struct s_message a_request(void)
{
    struct s_message m;

    memset(&m, 0, sizeof(m));
    m.n_descs   = 1;
    m.n_payload = 200;
    m.n_data    = 64;
    m.descs[0]  = (struct rfm_desc){ .arena = 1, .offset = 128, .size = 64 };
    m.head      = (struct rfm_stream_head){
        .magic = RFM_STREAM_MAGIC,
        .type  = RFM_STREAM_REQUEST,
        .flags = (uint16_t)rank.flags,
        .slot  = (uint32_t)(rank.ticket % SLOTS),
    };
    m.line.request = (struct rfm_request_line){
        .id       = rank.id + 1,
        .binding  = 7,
        .flags    = rank.frames << RFM_REQ_AFTER_SHIFT,
        .in_bytes = 200,
    };
    t_fill(m.payload, 200, rank.id);
    t_fill(m.data, 64, rank.id + 1);
    s_count(&m);
    return m;
}

static void rank_send(const struct s_message *m)
{
    uint8_t bytes[S_BYTES];

    (void)s_send(rank.data, bytes, s_pack(m, bytes));
}

static void rank_reads(struct s_message *answer)
{
    CHECK(s_read(rank.data, answer));
    CHECK_EQ(answer->head.magic, RFM_STREAM_MAGIC);
    CHECK_EQ(answer->head.type, RFM_STREAM_REPLY);
    CHECK_EQ(answer->head.flags, rank.flags);
    CHECK_EQ(answer->head.slot, rank.ticket % SLOTS);
    CHECK_EQ(answer->line.reply.id, rank.id + 1);
    rank.ticket++;
    rank.id++;
}

static void rank_is_served(void)
{
    struct s_message m = a_request();
    struct s_message answer;

    rank_send(&m);
    rank_reads(&answer);
    CHECK_EQ(answer.line.reply.status, RFM_ST_OK);
    CHECK_EQ(answer.n_descs, 1);
    CHECK_EQ(answer.descs[0].size, 64);
    CHECK_EQ(answer.descs[0].offset, ARENA - 64);
    CHECK(memcmp(answer.data, m.data, 64) == 0);
}

/* It hears why, and then nothing more. */
static void rank_is_refused(const char *why)
{
    bool said = false;
    struct rfm_rx rx;
    int rc;

    while ((rc = read_frame(rank.fd, &rx)) == RFM_OK) {
        CHECK_EQ(rx.head.type, RFM_CTL_REFUSED);
        if (strstr((char *)rx.body, why) == NULL) {
            fprintf(stderr, "refused with: %s\n", (char *)rx.body);
            CHECK(!why);
        }
        why  = "";
        said = true;
        rfm_rx_fini(&rx);
    }
    rfm_rx_fini(&rx);
    CHECK_EQ(rc, RFM_ERR_PEER);
    CHECK(said);
    rank_down();
}

static void an_honest_rank_by_hand_is_served(void)
{
    up();
    for (uint32_t flags = 0; flags <= RFM_STREAM_CRC; flags++) {
        rank_up(flags);
        for (int i = 0; i < 30; i++) {
            rank_is_served();
        }
        rank_down();
    }
    down();
}

static void heads_that_make_no_sense_are_refused(void)
{
    static const char nonsense[] = "a message that made no sense";
    static const struct rfm_stream_head xors[] = {
        { .magic = 1 }, { .magic = 1u << 31 }, { .magic = RFM_STREAM_MAGIC },
        { .magic = ~RFM_STREAM_MAGIC },
        { .type = 1 }, { .type = RFM_STREAM_REQUEST ^ RFM_STREAM_REPLY },
        { .type = 2 }, { .type = 0xfffe },
        { .flags = RFM_STREAM_CRC }, { .flags = 2 }, { .flags = 0xffff },
        { .slot = SLOTS }, { .slot = RFM_MAX_SLOTS }, { .slot = 1u << 31 },
        { .slot = UINT32_MAX },
        { .n_regions = RFM_MAX_REGIONS }, { .n_regions = 1u << 31 },
        { .n_regions = UINT32_MAX },
        { .payload_bytes = 200 ^ (PAYLOAD + 1) }, { .payload_bytes = 1ull << 63 },
        { .payload_bytes = UINT64_MAX }, { .payload_bytes = 1ull << 32 },
    };

    up();
    for (uint32_t flags = 0; flags <= RFM_STREAM_CRC; flags++) {
        for (size_t i = 0; i < sizeof(xors) / sizeof(xors[0]); i++) {
            struct s_message m;

            rank_up(flags);
            rank_is_served();
            m = a_request();
            m.head.magic         ^= xors[i].magic;
            m.head.type          ^= xors[i].type;
            m.head.flags         ^= xors[i].flags;
            m.head.slot          ^= xors[i].slot;
            m.head.n_regions     ^= xors[i].n_regions;
            m.head.payload_bytes ^= xors[i].payload_bytes;
            rank_send(&m);
            rank_is_refused(nonsense);
        }
    }
    down();
}

static void regions_outside_of_mirrors_are_refused(void)
{
    static const char outside[] = "memory that was not granted";
    static const char lengths[] = "whose lengths differ";
    static const struct {
        struct rfm_desc desc;
        const char *why;
    } cases[] = {
        { { .arena = 0, .size = 64 }, outside },
        { { .arena = 2, .size = 64 }, outside },
        { { .arena = UINT32_MAX, .size = 64 }, outside },
        { { .arena = 1, .offset = ARENA + 1 }, outside },
        { { .arena = 1, .offset = ARENA + 1, .size = 64 }, outside },
        { { .arena = 1, .offset = ARENA - 63, .size = 64 }, outside },
        { { .arena = 1, .offset = UINT64_MAX, .size = 64 }, outside },
        { { .arena = 1, .offset = UINT64_MAX - 63, .size = 64 }, outside },
        { { .arena = 1, .offset = UINT64_MAX, .size = 2 }, outside },
        { { .arena = 1, .size = ARENA + 1 }, outside },
        { { .arena = 1, .size = UINT64_MAX }, outside },
        { { .arena = 1, .offset = 64, .size = UINT64_MAX - 63 }, outside },
        { { .arena = 1, .size = 63 }, lengths },
        { { .arena = 1, .size = 65 }, lengths },
        { { .arena = 1, .size = 0 }, lengths },
        { { .arena = 1, .size = ARENA }, lengths },
        { { .arena = 1, .offset = ARENA, .size = 0 }, lengths },
    };
    static const uint64_t sums[] = { 0, 1, 63, 65, UINT64_MAX, 1ull << 32,
                                     (1ull << 63) + 64 };

    up();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct s_message m;

        rank_up(0);
        m = a_request();
        m.descs[0] = cases[i].desc;
        rank_send(&m);
        rank_is_refused(cases[i].why);
    }
    for (size_t i = 0; i < sizeof(sums) / sizeof(sums[0]); i++) {
        struct s_message m;

        rank_up(0);
        m = a_request();
        m.head.region_bytes = sums[i];
        rank_send(&m);
        rank_is_refused(lengths);
    }
    /* a sum that wraps to what is said */
    for (uint32_t n = 2; n <= S_DESCS; n++) {
        struct s_message m;

        rank_up(0);
        m = a_request();
        m.n_descs = n;
        for (uint32_t k = 0; k < n; k++) {
            m.descs[k] = (struct rfm_desc){ .arena = 1, .size = 64 };
        }
        m.descs[n - 1].size = 0ull - 64u * (n - 1);
        s_count(&m);
        CHECK_EQ(m.head.region_bytes, 0);
        rank_send(&m);
        rank_is_refused(outside);
    }
    down();
}

static void the_end_of_an_arena_can_be_written_and_not_more(void)
{
    struct s_message m;
    struct s_message answer;

    up();
    rank_up(0);
    m = a_request();
    m.n_descs  = 3;
    m.descs[1] = (struct rfm_desc){ .arena = 1, .offset = ARENA - 8, .size = 8 };
    m.descs[2] = (struct rfm_desc){ .arena = 1, .offset = ARENA, .size = 0 };
    m.n_data   = 72;
    s_count(&m);
    rank_send(&m);
    rank_reads(&answer);
    CHECK_EQ(answer.line.reply.status, RFM_ST_OK);
    rank_is_served();
    rank_down();
    down();
}

/* A request whose own bytes, if it has any, come with what the rank drops; what
 * the kernel found at its input. */
static void rank_drops(struct rfm_desc desc, bool with_data, uint8_t found[64])
{
    struct s_message m = a_request();
    struct s_message answer;

    desc.flags = RFM_REGION_DROP;
    if (with_data) {
        m.n_descs  = 2;
        m.descs[1] = desc;
    } else {
        m.descs[0] = desc;
        m.n_data   = 0;
    }
    s_count(&m);
    m.head.region_bytes = m.n_data;
    rank_send(&m);
    rank_reads(&answer);
    CHECK_EQ(answer.line.reply.status, RFM_ST_OK);
    memcpy(found, answer.data, 64);
    if (with_data) {
        CHECK(memcmp(found, m.data, 64) == 0);
    }
}

static void what_a_rank_drops_is_gone_and_what_comes_with_it_or_later_is_not(void)
{
    static const struct rfm_desc none[] = {
        { .arena = 1, .offset = 1, .size = 4095 },      /* no whole page */
        { .arena = 1, .offset = 0, .size = 4095 },
        { .arena = 1, .offset = 128, .size = 0 },
        { .arena = 1, .offset = 64, .size = ARENA - 64 },
        { .arena = 2, .offset = 0, .size = 4096 },
        { .arena = UINT32_MAX, .offset = UINT64_MAX, .size = UINT64_MAX },
    };
    static const struct rfm_desc outside[] = {
        { .arena = 1, .offset = ARENA - 63, .size = 64 },
        { .arena = 1, .offset = UINT64_MAX, .size = 2 },
        { .arena = 1, .offset = 4096, .size = UINT64_MAX - 4095 },
    };
    const struct rfm_desc all = { .arena = 1, .offset = 0, .size = ARENA };
    uint8_t zeros[64] = { 0 };
    uint8_t before[64];
    uint8_t found[64];

    up();
    for (uint32_t flags = 0; flags <= RFM_STREAM_CRC; flags++) {
        rank_up(flags);
        rank_is_served();
        rank_drops(all, false, found);
        CHECK(memcmp(found, zeros, 64) == 0);
        rank_drops(all, true, before);
        for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
            rank_drops(none[i], false, found);
            CHECK(memcmp(found, before, 64) == 0);
        }
        rank_is_served();
        rank_down();
    }
    for (size_t i = 0; i < sizeof(outside) / sizeof(outside[0]); i++) {
        struct s_message m;

        rank_up(0);
        m = a_request();
        m.descs[0]       = outside[i];
        m.descs[0].flags = RFM_REGION_DROP;
        m.n_data         = 0;
        m.head.region_bytes = 0;
        rank_send(&m);
        rank_is_refused("memory that was not granted");
    }
    down();
}

static void a_message_cut_at_any_byte_is_none(void)
{
    up();
    for (uint32_t flags = 0; flags <= RFM_STREAM_CRC; flags++) {
        uint32_t n = 1;

        for (uint32_t cut = 0; cut < n; cut += (cut < 120) ? 1 : 13) {
            uint8_t bytes[S_BYTES];
            struct s_message m;

            rank_up(flags);
            m = a_request();
            n = s_pack(&m, bytes);
            CHECK(s_send(rank.data, bytes, cut));
            CHECK(shutdown(rank.data, SHUT_WR) == 0);
            rank_is_refused("closed the connection");
        }
    }
    down();
}

static void spliced_and_replayed_messages_are_refused(void)
{
    struct s_message m;
    uint8_t one[S_BYTES];
    uint8_t two[S_BYTES];
    uint32_t n;

    up();
    for (uint32_t cut = 8; cut < 160; cut += 8) {
        /* the head of one, the rest of another */
        rank_up(0);
        m = a_request();
        n = s_pack(&m, one);
        memcpy(two, one, n);
        memcpy(two + cut, one, n - cut);
        CHECK(s_send(rank.data, two, n));
        CHECK(shutdown(rank.data, SHUT_WR) == 0);
        rank_is_refused("");
    }
    /* twice at once: the slot is in use, or its answer is on the way */
    rank_up(0);
    m = a_request();
    n = s_pack(&m, one);
    memcpy(two, one, n);
    CHECK(s_send(rank.data, one, n));
    CHECK(s_send(rank.data, two, n));
    CHECK(s_send(rank.data, two, n));
    rank_is_refused("in a slot that is in use");
    /* later: one that was answered is not run again */
    rank_up(0);
    rank_is_served();
    m = a_request();
    m.head.slot = 0;
    m.line.request.id = rank.id;
    rank_send(&m);
    for (int i = 0; i < 3; i++) {
        rank_is_served();
    }
    rank_send(&m);
    rank_is_refused("in a slot that is in use");
    down();
}

static void a_flipped_bit_is_never_served_where_it_is_checked(void)
{
    uint32_t n = 1;

    up();
    for (uint32_t bit = 0; bit < 8 * n; bit += T_TSAN ? 61 : 11) {
        uint8_t bytes[S_BYTES];
        struct s_message m;
        struct s_message none;

        rank_up(RFM_STREAM_CRC);
        m = a_request();
        n = s_pack(&m, bytes);
        bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        (void)s_send(rank.data, bytes, n);
        (void)shutdown(rank.data, SHUT_WR);
        CHECK(!s_read(rank.data, &none));
        rank_is_refused("");
    }
    down();
}

/* Answered as nonsense, or not looked at; what follows is served. */
static void lines_that_make_no_sense_are_no_end(void)
{
    static const struct rfm_request_line lines[] = {
        { .binding = 7, .in_bytes = 199 },
        { .binding = 7, .in_bytes = 201 },
        { .binding = 7, .in_bytes = 0 },
        { .binding = 7, .in_bytes = UINT64_MAX },
        { .binding = 7, .in_bytes = 1ull << 32 },
        { .binding = 8, .in_bytes = 200 },
        { .binding = 0, .in_bytes = 200 },
        { .binding = 7 + (1u << 16), .in_bytes = 200 },
        { .binding = UINT32_MAX, .in_bytes = 200 },
        { .binding = 7, .in_bytes = 32, .flags = RFM_REQ_FETCH },
        { .binding = 7, .in_bytes = 33, .flags = RFM_REQ_FETCH },
    };

    up();
    rank_up(0);
    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        struct s_message m = a_request();
        struct s_message answer;
        uint32_t flags = m.line.request.flags;

        m.line.request        = lines[i];
        m.line.request.id     = rank.id + 1;
        m.line.request.flags |= flags;
        memset(m.line.request.payload, 0xff, RFM_INLINE_BYTES);
        rank_send(&m);
        rank_reads(&answer);
        CHECK_EQ(answer.line.reply.status, RFM_ST_PROTOCOL);
        rank_is_served();
    }
    /* what it is told for itself only */
    for (uint64_t budget = 1; budget != 0; budget <<= 9) {
        struct s_message m = a_request();
        struct s_message answer;

        m.line.request.budget_ns = budget;
        rank_send(&m);
        rank_reads(&answer);
        CHECK_EQ(answer.line.reply.status, RFM_ST_OK);
    }
    rank_down();
    /* ids that are none: it waits for its turn, which never comes */
    rank_up(0);
    {
        struct s_message m = a_request();

        m.line.request.id = 0;
        rank_send(&m);
        rank_send(&m);
        rank_is_refused("in a slot that is in use");
    }
    down();
}

/* Dropped in the middle of a message, and before one. */
static void an_arena_that_is_dropped_takes_nothing_more(void)
{
    struct rfm_ctl_number drop = { .number = 1 };
    struct s_message answer;
    struct s_message m;
    uint8_t bytes[S_BYTES];
    uint32_t n;

    up();
    /* half of the region's bytes are there */
    rank_up(0);
    rank_is_served();
    m = a_request();
    n = s_pack(&m, bytes);
    CHECK(s_send(rank.data, bytes, n - 30));
    for (int left = 1; left > 0;) {
        CHECK(ioctl(rank.data, TIOCOUTQ, &left) == 0);
    }
    the_others_are_served();
    rank_frame(RFM_CTL_ARENA_DROP, &drop, sizeof(drop));
    rank_is_refused("");
    /* none of them is */
    rank_up(0);
    rank_frame(RFM_CTL_ARENA_DROP, &drop, sizeof(drop));
    m = a_request();
    m.line.request.binding = 99;
    m.n_descs = m.n_data = 0;
    s_count(&m);
    rank_send(&m);
    rank_reads(&answer);        /* now it has heard all of them */
    CHECK_EQ(answer.line.reply.status, RFM_ST_PROTOCOL);
    m = a_request();
    rank_send(&m);
    rank_is_refused("memory that was not granted");
    down();
}

static void a_waiting_request_of_a_dropped_arena_is_an_error(void)
{
    struct rfm_ctl_number drop = { .number = 1 };
    struct s_message answer;
    struct s_message m;
    struct t_gate gate;

    up();
    rank_up(0);
    rank_is_served();
    t_gate_shut(&gate, &worker, inv);
    t_gate_runs(&gate);
    m = a_request();
    rank_send(&m);
    for (int left = 1; left > 0;) {
        CHECK(ioctl(rank.data, TIOCOUTQ, &left) == 0);
    }
    rank_frame(RFM_CTL_ARENA_DROP, &drop, sizeof(drop));
    for (int left = 1; left > 0;) {
        CHECK(ioctl(rank.fd, TIOCOUTQ, &left) == 0);
    }
    t_gate_open(&gate);
    /* whichever it met first */
    if (s_read(rank.data, &answer)) {
        CHECK((answer.line.reply.status == RFM_ST_BAD_KERNEL) ||
              (answer.line.reply.status == RFM_ST_OK));
        rank_down();
    } else {
        rank_is_refused("");
    }
    down();
}

static void attaches_that_make_no_sense_are_refused_and_leave_nothing(void)
{
    static const struct {
        uint32_t flags;
        uint32_t n;
    } parcels[] = {
        { 0, 0 }, { 0, 4 }, { 0, 7 }, { 0, 9 }, { 0, 256 }, { 0, 257 },
        { 0, 500 }, { 2, 8 }, { 1u << 31, 8 }, { UINT32_MAX, 8 },
    };
    static const uint32_t transports[] = { RFM_TRANSPORT_SHM, RFM_TRANSPORT_VERBS,
                                           RFM_TRANSPORTS, 7, UINT32_MAX };
    uint8_t bytes[512] = { 0 };
    uint32_t before;

    up();
    before = fds_of(worker.pid);
    for (size_t i = 0; i < sizeof(parcels) / sizeof(parcels[0]); i++) {
        struct rfm_ctl_attach body = good_attach();

        memcpy(bytes, &parcels[i].flags, 4);
        rank_dial(0);
        CHECK_EQ(rank_attach_with(&body, bytes, parcels[i].n), RFM_ERR_PROTOCOL);
        rank_is_refused("made no sense");
    }
    memset(bytes, 0, sizeof(bytes));
    for (size_t i = 0; i < sizeof(transports) / sizeof(transports[0]); i++) {
        struct rfm_ctl_attach body = good_attach();

        body.transport = transports[i];
        rank_dial(0);
        CHECK(rank_attach_with(&body, bytes, 8) < 0);
        rank_is_refused("made no sense");
    }
    /* without a connection for data */
    {
        struct rfm_ctl_attach body = good_attach();

        memset(&rank, 0, sizeof(rank));
        rank.fd   = t_worker_dial(&worker);
        rank.data = dup(rank.fd);
        CHECK_EQ(rank_attach_with(&body, bytes, 8), RFM_ERR_INVALID);
        rank_is_refused("made no sense");
    }
    /* twice */
    rank_up(0);
    {
        struct rfm_ctl_attach body = good_attach();

        send_frame(rank.fd, RFM_CTL_ATTACH, &body, sizeof(body));
        rank_is_refused("made no sense");
    }
    CHECK_EQ(fds_of(worker.pid), before);
    down();
}

static void arenas_that_are_none_are_not_mirrored(void)
{
    static const uint64_t sizes[] = { 0, (1ull << 46) + 1, 1ull << 63,
                                      UINT64_MAX, UINT64_MAX - 4095 };
    struct rfm_ctl_arena body = { .arena = 2, .bytes = ARENA };
    struct rfm_rx rx;

    up();
    rank_up(0);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct rfm_ctl_arena_ready ready;

        body.bytes = sizes[i];
        rank_frame(RFM_CTL_ARENA, &body, sizeof(body));
        CHECK_OK(read_frame(rank.fd, &rx));
        CHECK_EQ(rx.head.type, RFM_CTL_ARENA_READY);
        memcpy(&ready, rx.body, sizeof(ready));
        CHECK(ready.status < 0);
        rfm_rx_fini(&rx);
        rank_is_served();
    }
    /* a number that is used: the first one stays what it is */
    body = (struct rfm_ctl_arena){ .arena = 1, .bytes = 1u << 20 };
    rank_frame(RFM_CTL_ARENA, &body, sizeof(body));
    CHECK_OK(read_frame(rank.fd, &rx));
    CHECK_EQ(((struct rfm_ctl_arena_ready *)(void *)rx.body)->status,
             RFM_ERR_PROTOCOL);
    rfm_rx_fini(&rx);
    rank_is_served();
    rank_down();
    for (uint32_t n = 0; n < 300; n += (n < 20) ? 1 : 31) {
        uint8_t bytes[512] = { 0 };

        if ((n == sizeof(body)) || ((n > sizeof(body)) &&
                                    (n <= sizeof(body) + RFM_MAX_PARCEL))) {
            continue;           /* a parcel that tcp has no use for */
        }
        rank_up(0);
        rank_frame(RFM_CTL_ARENA, bytes, n);
        rank_is_refused("");
    }
    down();
}

static void bytes_that_come_one_by_one_are_served(void)
{
    struct s_message answer;
    uint8_t bytes[S_BYTES];

    up();
    rank_up(RFM_STREAM_CRC);
    for (int i = 0; i < 3; i++) {
        struct s_message m = a_request();
        uint32_t n = s_pack(&m, bytes);

        for (uint32_t k = 0; k < n; k++) {
            CHECK(s_send(rank.data, bytes + k, 1));
        }
        rank_reads(&answer);
        CHECK_EQ(answer.line.reply.status, RFM_ST_OK);
    }
    rank_down();
    down();
}

static void random_requests_never_harm_a_worker(void)
{
    static const uint64_t edges[] = { 0, 1, 63, 64, 65, 200, ARENA - 64,
                                      ARENA - 1, ARENA, ARENA + 1, 1ull << 31,
                                      1ull << 32, 1ull << 63, UINT64_MAX };
    uint32_t rounds = t_scaled(1200, 300);
    struct t_random r = { 31 };
    uint32_t served = 0;
    uint32_t fds;

    up();
    fds = fds_of(worker.pid);
    for (uint32_t round = 0; round < rounds;) {
        bool alive = true;

        rank_up((uint32_t)t_below(&r, 2));
        for (; alive && (round < rounds); round++) {
            struct s_message m = a_request();
            struct s_message answer;
            uint8_t bytes[S_BYTES];
            uint64_t value = edges[t_below(&r, 14)] + t_below(&r, 3) - 1;
            uint32_t n;
            int left = 1;

            m.n_descs = (uint32_t)t_below(&r, S_DESCS + 1);
            for (uint32_t k = 1; k < m.n_descs; k++) {
                uint64_t offset = t_below(&r, ARENA);

                m.descs[k] = (struct rfm_desc){
                    .arena = 1, .offset = offset, .size = t_below(&r, 200),
                };
            }
            s_count(&m);
            m.n_data = (uint32_t)m.head.region_bytes;
            for (uint32_t k = 1; k < m.n_descs; k++) {
                if (t_below(&r, 8) == 0) {
                    m.descs[k].flags     = RFM_REGION_DROP;
                    m.head.region_bytes -= m.descs[k].size;
                    m.n_data            -= (uint32_t)m.descs[k].size;
                }
            }
            switch (t_below(&r, 20)) {
            case 0:
                m.descs[0].size = value;
                break;
            case 1:
                m.descs[0].offset = value;
                break;
            case 2:
                m.head.region_bytes = value;
                break;
            case 3:
                m.head.n_regions = (uint32_t)value;
                break;
            case 4:
                m.head.slot = (uint32_t)value;
                break;
            case 5:
                m.head.payload_bytes = value;
                break;
            case 6:
                m.line.request.binding = (uint32_t)value;
                break;
            case 7:
                m.line.request.in_bytes = value;
                break;
            case 8:
                m.line.request.budget_ns = value;
                break;
            default:
                break;
            }
            if (m.n_data > S_DATA) {
                continue;
            }
            n = s_pack(&m, bytes);
            if (t_below(&r, 15) == 0) {
                bytes[t_below(&r, n)] ^= (uint8_t)(1u << t_below(&r, 8));
            }
            if (t_below(&r, 25) == 0) {
                n = (uint32_t)t_below(&r, n);
            }
            alive = s_send(rank.data, bytes, n);
            while (alive && (left > 0)) {
                alive = ioctl(rank.data, TIOCOUTQ, &left) == 0;
            }
            if (t_below(&r, 4) != 0) {
                /* is it still there? who waits for more hears no more */
                (void)shutdown(rank.data, (t_below(&r, 30) == 0) ? SHUT_WR
                                                                 : SHUT_RD);
                alive = false;
            }
            if (alive) {
                struct pollfd p[2] = { { .fd = rank.data, .events = POLLIN },
                                       { .fd = rank.fd, .events = POLLIN } };

                alive = (poll(p, 2, 2) > 0) && ((p[0].revents & POLLIN) != 0) &&
                        s_read(rank.data, &answer) &&
                        (answer.line.reply.id == rank.id + 1);
                served      += alive;
                rank.id     += alive;
                rank.ticket += alive;
            }
        }
        rank_down();
        the_others_are_served();
    }
    CHECK(served > 0);
    CHECK_EQ(fds_of(worker.pid), fds);
    down();
}

/* The one that takes its time: it waits for frames that never come. */
static void frames_that_are_said_to_come_are_not_waited_for_for_ever(void)
{
    struct s_message answer;
    struct s_message m;

    up();
    rank_up(0);
    m = a_request();
    m.line.request.binding = 99;
    m.line.request.flags   = (rank.frames + 1) << RFM_REQ_AFTER_SHIFT;
    rank_send(&m);
    for (int i = 0; i < 50; i++) {
        the_others_are_served();
    }
    rank_reads(&answer);
    CHECK_EQ(answer.line.reply.status, RFM_ST_PROTOCOL);
    rank_is_served();
    /* that one was late says nothing of others, which come in time */
    m = a_request();
    m.line.request.binding = 8;
    m.line.request.flags   = (rank.frames + 1) << RFM_REQ_AFTER_SHIFT;
    rank_send(&m);
    for (int i = 0; i < 50; i++) {
        the_others_are_served();
    }
    rank_bind(8, 0, 2, 1, args);
    rank_reads(&answer);
    CHECK_EQ(answer.line.reply.status, RFM_ST_OK);
    rank_down();
    down();
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(an_honest_rank_by_hand_is_served);
    RUN(heads_that_make_no_sense_are_refused);
    RUN(regions_outside_of_mirrors_are_refused);
    RUN(the_end_of_an_arena_can_be_written_and_not_more);
    RUN(what_a_rank_drops_is_gone_and_what_comes_with_it_or_later_is_not);
    RUN(a_message_cut_at_any_byte_is_none);
    RUN(spliced_and_replayed_messages_are_refused);
    RUN(a_flipped_bit_is_never_served_where_it_is_checked);
    RUN(lines_that_make_no_sense_are_no_end);
    RUN(an_arena_that_is_dropped_takes_nothing_more);
    RUN(a_waiting_request_of_a_dropped_arena_is_an_error);
    RUN(attaches_that_make_no_sense_are_refused_and_leave_nothing);
    RUN(arenas_that_are_none_are_not_mirrored);
    RUN(bytes_that_come_one_by_one_are_served);
    RUN(random_requests_never_harm_a_worker);
    RUN(frames_that_are_said_to_come_are_not_waited_for_for_ever);
    return t_finish();
}

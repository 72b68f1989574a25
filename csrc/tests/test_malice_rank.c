/* A rank that lies: the worker reads nothing that isn't there, writes nowhere
 * that it was not given, refuses or hangs up, and serves the others as before. */
#define _GNU_SOURCE
#include "harness.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "arena.h"
#include "frame.h"
#include "poller.h"
#include "shm.h"

#define SLOTS      4u
#define SLOT_BYTES 256u
#define STRIDE     (SLOT_BYTES + 128u)
#define SEGMENT    8192u        /* 4096 + 2 * SLOTS * STRIDE, whole pages */
#define ARENA      8192u

/* The rank's side by hand. */
static struct {
    int fd;
    int segment_fd;
    int door_fd;
    int event_fd;
    int arena_fd;
    uint8_t *segment;
    uint8_t *arena;
    struct rfm_door *door;      /* the worker's */
    uint64_t ticket;
    uint64_t id;
} liar;

static struct t_worker worker;
static struct rfm_invoker *inv; /* an honest rank beside it */
static struct t_call honest;

static void up(void)
{
    t_worker_start(&worker, false, 20);
    inv = t_invoker(2, T_SLOT_BYTES, 20);
    (void)t_worker_attach(&worker, inv);
    t_call_inline(&honest, inv, "echo", 40, 40);
}

static void the_others_are_served(void)
{
    static uint64_t seed;

    t_fill(t_in(&honest, 0), 40, ++seed);
    CHECK_EQ(t_invoke(&honest), RFM_DONE);
    CHECK(t_filled(t_out(&honest, 0), 40, seed));
}

static void down(void)
{
    the_others_are_served();
    t_call_end(&honest);
    t_invoker_end(inv);
    t_worker_end(&worker);
}

static void send_frame(uint16_t type, const void *body, uint64_t n,
                       const int *fds, uint32_t n_fds)
{
    struct iovec iov = { (void *)(uintptr_t)body, n };
    int rc = rfm_frame_send(liar.fd, type, 0, &iov, 1, fds, n_fds);

    CHECK((rc == RFM_OK) || (rc == RFM_ERR_PEER));
}

/* The next answer's status; RFM_ERR_PEER if it hung up instead. Why is said
 * before that, and is a text. */
static int read_answer(int fds[2])
{
    struct pollfd p = { .fd = liar.fd, .events = POLLIN };
    struct rfm_ctl_attached answer;
    struct rfm_rx rx;
    int rc;

    rfm_rx_init(&rx, 4096);
    while ((rc = rfm_rx_read(&rx, liar.fd)) == RFM_ERR_AGAIN) {
        (void)poll(&p, 1, -1);
    }
    if ((rc == RFM_OK) && (rx.head.type == RFM_CTL_REFUSED)) {
        CHECK(strstr((char *)rx.body, "made no sense") != NULL);
        rfm_rx_fini(&rx);
        return read_answer(NULL);
    }
    if (rc == RFM_OK) {
        CHECK_EQ(rx.head.type, RFM_CTL_ATTACHED);
        CHECK_EQ(rx.n_fds, 2);
        memcpy(&answer, rx.body, sizeof(answer));
        rc = answer.status;
        if (fds != NULL) {
            memcpy(fds, rx.fds, 2 * sizeof(int));
            rx.n_fds = 0;
        }
    }
    rfm_rx_fini(&rx);
    return rc;
}

static void it_hung_up(void)
{
    CHECK_EQ(read_answer(NULL), RFM_ERR_PEER);
}

static struct rfm_ctl_attach good_attach(void)
{
    return (struct rfm_ctl_attach){
        .slots         = SLOTS,
        .slot_bytes    = SLOT_BYTES,
        .segment_bytes = SEGMENT,
    };
}

static void make_things(void)
{
    memset(&liar, 0, sizeof(liar));
    liar.fd = t_worker_dial(&worker);
    CHECK_OK(rfm_memfd_create("segment", SEGMENT, &liar.segment_fd));
    CHECK_OK(rfm_memfd_map(liar.segment_fd, SEGMENT, true, &liar.segment));
    CHECK_OK(rfm_memfd_create("arena", ARENA, &liar.arena_fd));
    CHECK_OK(rfm_memfd_map(liar.arena_fd, ARENA, true, &liar.arena));
    CHECK_OK(rfm_memfd_create("door", RFM_DOOR_BYTES, &liar.door_fd));
    liar.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(liar.event_fd >= 0);
    ((struct rfm_channel_page *)liar.segment)->wake_at = UINT64_MAX;
}

static void drop_things(void)
{
    if (liar.door != NULL) {
        rfm_memfd_unmap((uint8_t *)liar.door, RFM_DOOR_BYTES);
    }
    rfm_memfd_unmap(liar.segment, SEGMENT);
    rfm_memfd_unmap(liar.arena, ARENA);
    close(liar.fd);
    close(liar.segment_fd);
    close(liar.arena_fd);
    close(liar.door_fd);
    close(liar.event_fd);
    (void)t_worker_expect(&worker, RFM_AGENT_GONE);
}

static void attach(void)
{
    struct rfm_ctl_attach body = good_attach();
    uint8_t *base;
    int fds[3];

    make_things();
    fds[0] = liar.segment_fd;
    fds[1] = liar.door_fd;
    fds[2] = liar.event_fd;
    send_frame(RFM_CTL_ATTACH, &body, sizeof(body), fds, 3);
    CHECK_OK(read_answer(fds));
    CHECK_OK(rfm_memfd_map(fds[0], RFM_DOOR_BYTES, true, &base));
    liar.door = (struct rfm_door *)base;
    close(fds[0]);
    close(fds[1]);
}

static void send_arena(uint32_t number)
{
    struct rfm_ctl_arena body = { .arena = number, .bytes = ARENA };

    send_frame(RFM_CTL_ARENA, &body, sizeof(body), &liar.arena_fd, 1);
}

static void send_number(uint16_t type, uint32_t number)
{
    struct rfm_ctl_number body = { .number = number };

    send_frame(type, &body, sizeof(body), NULL, 0);
}

static void send_kernel(uint32_t number, const char *name)
{
    uint8_t bytes[128];
    struct rfm_ctl_kernel body = { .kernel = number, .blob_bytes = strlen(name) };

    memcpy(bytes, &body, sizeof(body));
    memcpy(bytes + sizeof(body), name, strlen(name));
    send_frame(RFM_CTL_KERNEL, bytes, sizeof(body) + strlen(name), NULL, 0);
}

static void send_bind(uint32_t number, uint32_t kernel, uint32_t flags,
                      uint16_t n_in, uint16_t n_out,
                      const struct rfm_wire_arg *args)
{
    uint8_t bytes[64 + (RFM_MAX_ARGS * sizeof(*args))];
    struct rfm_ctl_bind body = {
        .binding = number, .kernel = kernel, .n_in = n_in, .n_out = n_out,
        .flags = flags,
    };
    uint64_t n = ((uint64_t)n_in + n_out) * sizeof(*args);

    memcpy(bytes, &body, sizeof(body));
    if (n > 0) {
        memcpy(bytes + sizeof(body), args, n);
    }
    send_frame(RFM_CTL_BIND, bytes, sizeof(body) + n, NULL, 0);
}

static struct rfm_reply_line *reply_line(uint32_t slot)
{
    return (struct rfm_reply_line *)(liar.segment + RFM_CONTROL_BYTES +
                                     (SLOTS + slot) * STRIDE);
}

static uint8_t *request_at(uint32_t slot)
{
    return liar.segment + RFM_CONTROL_BYTES + slot * STRIDE;
}

static uint32_t next_slot(void)
{
    return (uint32_t)(liar.ticket % SLOTS);
}

/* Posts the line with the next id and waits for the answer's status. */
/* how many answers were "that made no sense" */
static uint32_t told_so;

static uint32_t ask(struct rfm_request_line line)
{
    uint32_t slot = next_slot();
    struct rfm_request_line *at = (struct rfm_request_line *)request_at(slot);

    line.id = ++liar.id;
    liar.ticket++;
    memcpy((uint8_t *)at + 8, (const uint8_t *)&line + 8, sizeof(*at) - 8);
    rfm_store_release(&at->id, line.id);
    rfm_door_knock(liar.door);
    while (rfm_load_acquire(&reply_line(slot)->id) != line.id) {
        sched_yield();
    }
    CHECK(reply_line(slot)->status <= RFM_ST_LAST);
    told_so += reply_line(slot)->status == RFM_ST_PROTOCOL;
    return reply_line(slot)->status;
}

/* --- attaching ------------------------------------------------------------ */

static void refuses(struct rfm_ctl_attach body, const int *fds, uint32_t n_fds)
{
    make_things();
    send_frame(RFM_CTL_ATTACH, &body, sizeof(body), fds, n_fds);
    CHECK(read_answer(NULL) < 0);
    it_hung_up();
    drop_things();
    the_others_are_served();
}

static void a_channel_of_absurd_dimensions_is_refused(void)
{
    static const uint32_t slots[] = { 0, 1, 3, 5, 128, 1u << 31, UINT32_MAX };
    static const uint32_t bytes[] = { 0, 1, 63, 65, 255, (1u << 20) + 64,
                                      1u << 31, UINT32_MAX, UINT32_MAX - 63 };
    static const uint64_t segments[] = { 0, 1, SEGMENT - 4096, SEGMENT - 1,
                                         SEGMENT + 4096, UINT64_MAX,
                                         UINT64_MAX - 4095, 1ull << 63 };
    int fds[3];

    up();
    make_things();
    fds[0] = liar.segment_fd;
    fds[1] = liar.door_fd;
    fds[2] = liar.event_fd;
    for (int i = 0; i < 3; i++) {
        fds[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, 3);
    }
    drop_things();
    for (size_t i = 0; i < sizeof(slots) / sizeof(slots[0]); i++) {
        struct rfm_ctl_attach body = good_attach();

        body.slots = slots[i];
        refuses(body, fds, 3);
    }
    for (size_t i = 0; i < sizeof(bytes) / sizeof(bytes[0]); i++) {
        struct rfm_ctl_attach body = good_attach();

        body.slot_bytes = bytes[i];
        refuses(body, fds, 3);
    }
    for (size_t i = 0; i < sizeof(segments) / sizeof(segments[0]); i++) {
        struct rfm_ctl_attach body = good_attach();

        body.segment_bytes = segments[i];
        refuses(body, fds, 3);
    }
    for (uint32_t n = 0; n < 3; n++) {
        refuses(good_attach(), fds, n);
    }
    for (int i = 0; i < 3; i++) {
        close(fds[i]);
    }
    down();
}

static void descriptors_of_another_kind_are_refused(void)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    int unsealed = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int blocking = eventfd(0, EFD_CLOEXEC);
    int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int tube[2];
    int segment;
    int small;
    int door;

    up();
    CHECK(pipe2(tube, O_CLOEXEC | O_NONBLOCK) == 0);
    CHECK(ftruncate(unsealed, SEGMENT) == 0);
    CHECK_OK(rfm_memfd_create("segment", SEGMENT, &segment));
    CHECK_OK(rfm_memfd_create("small", SEGMENT - 4096, &small));
    CHECK_OK(rfm_memfd_create("door", RFM_DOOR_BYTES, &door));
    {
        const int cases[][3] = {
            { null, door, event },      { unsealed, door, event },
            { small, door, event },     { tube[1], door, event },
            { segment, null, event },   { segment, unsealed, event },
            { segment, segment, event }, { segment, event, event },
            { segment, door, null },    { segment, door, tube[1] },
            { segment, door, blocking }, { segment, door, door },
        };

        for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
            refuses(good_attach(), cases[i], 3);
        }
    }
    close(null);
    close(unsealed);
    close(blocking);
    close(event);
    close(tube[0]);
    close(tube[1]);
    close(segment);
    close(small);
    close(door);
    down();
}

static void nobody_attaches_twice_or_clogs_the_worker_with_refusals(void)
{
    struct rfm_ctl_attach body = good_attach();
    int fds[3];

    up();
    attach();
    fds[0] = liar.segment_fd;
    fds[1] = liar.door_fd;
    fds[2] = liar.event_fd;
    send_frame(RFM_CTL_ATTACH, &body, sizeof(body), fds, 3);
    it_hung_up();
    drop_things();
    the_others_are_served();

    /* answers that nobody reads must not fill the worker's side */
    make_things();
    for (int i = 0; i < 3000; i++) {
        struct iovec iov = { &body, 3 };

        if (rfm_frame_send(liar.fd, RFM_CTL_ATTACH, 0, &iov, 1, NULL, 0) < 0) {
            break;
        }
    }
    the_others_are_served();
    drop_things();
    down();
}

/* --- control frames ------------------------------------------------------- */

static void frames_of_the_wrong_shape_end_or_do_nothing(void)
{
    uint8_t junk[256];

    up();
    t_fill(junk, sizeof(junk), 5);
    for (uint16_t type = 0; type < 64; type++) {
        for (uint32_t n = 0; n < 80; n += 7) {
            for (int attached = 0; attached < 2; attached++) {
                if (type == RFM_CTL_ATTACH) {
                    continue;
                }
                if (attached) {
                    attach();
                } else {
                    make_things();
                }
                send_frame(type, junk, n, &liar.arena_fd, n % 2);
                send_frame(type, junk + 100, n, &liar.arena_fd, (n / 2) % 2);
                drop_things();
            }
        }
        the_others_are_served();
    }
    down();
}

static void half_a_frame_and_the_end_is_an_end(void)
{
    uint8_t bytes[64] = { 0 };
    struct rfm_frame head = { .length = 40, .type = RFM_CTL_KERNEL };

    up();
    memcpy(bytes, &head, sizeof(head));
    for (size_t n = 1; n < 56; n += 5) {
        attach();
        CHECK_EQ(send(liar.fd, bytes, n, MSG_NOSIGNAL), n);
        drop_things();
    }
    /* more than 64 MiB are not waited for */
    attach();
    head.length = (64u << 20) + 1;
    CHECK_EQ(send(liar.fd, &head, sizeof(head), MSG_NOSIGNAL), sizeof(head));
    it_hung_up();
    drop_things();
    CHECK_EQ(worker.n_refused, 1);
    down();
}

static void arenas_that_are_none_are_not_mapped(void)
{
    static const uint64_t sizes[] = { 0, 1, ARENA - 4096, ARENA + 1, 1ull << 40,
                                      UINT64_MAX, UINT64_MAX - 4095 };
    struct rfm_wire_arg args[2] = {
        { .place = RFM_CALL, .size = 8 }, { .size = 8 },
    };
    struct rfm_request_line line = { .binding = 7, .in_bytes = 24 };
    int unsealed = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);

    up();
    CHECK(ftruncate(unsealed, ARENA) == 0);
    attach();
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct rfm_ctl_arena body = { .arena = 1, .bytes = sizes[i] };

        send_frame(RFM_CTL_ARENA, &body, sizeof(body), &liar.arena_fd, 1);
    }
    {
        struct rfm_ctl_arena body = { .arena = 1, .bytes = ARENA };

        send_frame(RFM_CTL_ARENA, &body, sizeof(body), &unsealed, 1);
        send_frame(RFM_CTL_ARENA, &body, sizeof(body), &null, 1);
        send_frame(RFM_CTL_ARENA, &body, sizeof(body), NULL, 0);
        send_frame(RFM_CTL_ARENA, &body, sizeof(body) - 1, &liar.arena_fd, 1);
    }
    send_kernel(0, "mix");
    send_bind(7, 0, 0, 1, 1, args);
    {
        struct rfm_desc desc = { .arena = 1, .size = 8 };

        memcpy(line.payload, &desc, sizeof(desc));
    }
    CHECK_EQ(ask(line), RFM_ST_PROTOCOL);
    send_arena(1);
    CHECK_EQ(ask(line), RFM_ST_OK);
    /* the same number again changes nothing */
    {
        struct rfm_ctl_arena body = { .arena = 1, .bytes = SEGMENT };

        send_frame(RFM_CTL_ARENA, &body, sizeof(body), &liar.segment_fd, 1);
    }
    CHECK_EQ(ask(line), RFM_ST_OK);
    drop_things();
    close(unsealed);
    close(null);
    down();
}

/* BINDs: what the binding is answered with, or a hung-up connection. */
static void bindings_that_make_no_sense_are_refused(void)
{
    static const struct {
        uint16_t n_in;
        uint16_t n_out;
        struct rfm_wire_arg arg;
    } cases[] = {
        { 1, 0, { .place = 3 } },
        { 1, 0, { .place = 255 } },
        { 1, 0, { .place = RFM_INLINE, .size = SLOT_BYTES + 1 } },
        { 0, 1, { .place = RFM_INLINE, .size = SLOT_BYTES + 1 } },
        { 1, 0, { .place = RFM_INLINE, .size = UINT64_MAX } },
        { 0, 1, { .place = RFM_INLINE, .size = UINT64_MAX } },
        { 1, 0, { .place = RFM_BOUND, .arena = 2, .size = 8 } },
        { 1, 0, { .place = RFM_BOUND, .arena = 1, .size = ARENA + 1 } },
        { 1, 0, { .place = RFM_BOUND, .arena = 1, .offset = ARENA + 1 } },
        { 1, 0, { .place = RFM_BOUND, .arena = 1, .offset = 8, .size = ARENA } },
        { 1, 0, { .place = RFM_BOUND, .arena = 1, .offset = UINT64_MAX,
                  .size = 8 } },
        { 1, 0, { .place = RFM_BOUND, .arena = 1, .offset = 8,
                  .size = UINT64_MAX } },
        { 1, 0, { .place = RFM_BOUND, .arena = 1, .offset = UINT64_MAX - 7,
                  .size = 8 } },
        /* a guard that would lie outside */
        { 0, 1, { .place = RFM_BOUND, .flags = RFM_ARG_CANARY, .arena = 1,
                  .size = ARENA } },
        { 0, 1, { .place = RFM_BOUND, .flags = RFM_ARG_CANARY, .arena = 1,
                  .offset = ARENA - 8, .size = 8 } },
        { 0, 1, { .place = RFM_BOUND, .flags = RFM_ARG_CANARY, .arena = 1,
                  .offset = ARENA - 71, .size = 8 } },
    };

    up();
    attach();
    send_arena(1);
    send_kernel(0, "mix");
    for (uint32_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct rfm_request_line line = { .binding = i };

        send_bind(i, 0, 0, cases[i].n_in, cases[i].n_out, &cases[i].arg);
        for (uint64_t n = 0; n < 3; n++) {
            line.in_bytes = n * 4;
            CHECK_EQ(ask(line), RFM_ST_BAD_KERNEL);
        }
    }
    /* the last bytes without a guard, and with a guard that just fits */
    {
        struct rfm_wire_arg arg = { .place = RFM_BOUND, .arena = 1,
                                    .offset = ARENA - 8, .size = 8 };
        struct rfm_request_line line = { .binding = 100 };

        send_bind(100, 0, 0, 0, 1, &arg);
        CHECK_EQ(ask(line), RFM_ST_OK);
        arg.flags    = RFM_ARG_CANARY;
        arg.offset   = ARENA - 72;
        line.binding = 101;
        rfm_redzone_fill(liar.arena + ARENA - 64);
        send_bind(101, 0, 0, 0, 1, &arg);
        CHECK_EQ(ask(line), RFM_ST_OK);
    }
    drop_things();
    down();
}

static void broken_kernels_and_bindings_end_the_connection(void)
{
    up();
    for (int i = 0; i < 9; i++) {
        struct rfm_ctl_kernel kernel = { .kernel = 1, .blob_bytes = 0 };
        struct rfm_ctl_bind bind = { .binding = 1, .kernel = 0 };

        attach();
        send_kernel(0, "mix");
        switch (i) {
        case 0:
            send_kernel(0, "mix");              /* loaded twice */
            break;
        case 1:
            kernel.blob_bytes = 1;
            send_frame(RFM_CTL_KERNEL, &kernel, sizeof(kernel), NULL, 0);
            break;
        case 2:
            kernel.kernel = (1u << 20) + 1;
            send_frame(RFM_CTL_KERNEL, &kernel, sizeof(kernel), NULL, 0);
            break;
        case 3:
            kernel.blob_bytes = UINT64_MAX;
            send_frame(RFM_CTL_KERNEL, &kernel, sizeof(kernel), NULL, 0);
            break;
        case 4:
            bind.kernel = 5;                    /* there is no such kernel */
            send_frame(RFM_CTL_BIND, &bind, sizeof(bind), NULL, 0);
            break;
        case 5:
            bind.n_in  = 65535;
            bind.n_out = 65535;
            send_frame(RFM_CTL_BIND, &bind, sizeof(bind), NULL, 0);
            break;
        case 6:
            bind.meta_bytes = UINT64_MAX;
            send_frame(RFM_CTL_BIND, &bind, sizeof(bind), NULL, 0);
            break;
        case 7:
            bind.n_in = 1;
            send_frame(RFM_CTL_BIND, &bind, sizeof(bind), NULL, 0);
            break;
        default:
            send_bind(3, 0, 0, 0, 0, NULL);
            send_bind(3 + 65536, 0, 0, 0, 0, NULL);     /* bound twice */
            break;
        }
        it_hung_up();
        drop_things();
        the_others_are_served();
    }
    down();
}

/* --- requests ------------------------------------------------------------- */

static void requests_that_make_no_sense_are_answered_so(void)
{
    struct rfm_wire_arg args[2] = {
        { .place = RFM_CALL, .size = 8 },
        { .place = RFM_CALL, .size = 16 },
    };
    struct rfm_wire_arg small = { .size = 8 };
    const struct rfm_desc lies[] = {
        { .arena = 2, .size = 16 },
        { .arena = 1, .size = 15 },
        { .arena = 1, .size = 17 },
        { .arena = 1, .size = UINT64_MAX },
        { .arena = 1, .offset = ARENA - 15, .size = 16 },
        { .arena = 1, .offset = UINT64_MAX - 15, .size = 16 },
        { .arena = 1, .offset = UINT64_MAX, .size = 16 },
        { .arena = 1, .flags = RFM_ARG_CANARY, .offset = ARENA - 16, .size = 16 },
        { .arena = 1, .flags = RFM_ARG_CANARY, .offset = ARENA - 79, .size = 16 },
    };
    struct rfm_desc good[2] = {
        { .arena = 1, .size = 8 }, { .arena = 1, .offset = 64, .size = 16 },
    };
    struct rfm_request_line line = { .binding = 0, .in_bytes = 48 };

    up();
    attach();
    told_so = 0;
    send_arena(1);
    send_kernel(0, "mix");
    send_kernel(1, "pattern");
    send_bind(0, 0, 0, 1, 1, args);
    send_bind(1, 0, 0, 1, 1, (struct rfm_wire_arg[]){ small, small });
    send_bind(2, 1, RFM_BIND_OBJECT, 0, 0, NULL);
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        memcpy(request_at(next_slot()) + 64, good, 48);
        CHECK_EQ(ask(line), RFM_ST_OK);
        memcpy(request_at(next_slot()) + 64, good, 24);
        memcpy(request_at(next_slot()) + 64 + 24, &lies[i], 24);
        CHECK_EQ(ask(line), RFM_ST_PROTOCOL);
    }
    for (uint64_t n = 0; n < 100; n += 9) {     /* other lengths than bound */
        CHECK_EQ(ask((struct rfm_request_line){ .binding = 0, .in_bytes = n }),
                 RFM_ST_PROTOCOL);
        CHECK_EQ(ask((struct rfm_request_line){ .binding = 1, .in_bytes = n + 9 }),
                 RFM_ST_PROTOCOL);
    }
    CHECK_EQ(ask((struct rfm_request_line){ .binding = 1,
                                            .in_bytes = UINT64_MAX }),
             RFM_ST_PROTOCOL);
    /* bindings that were never made */
    for (uint32_t i = 3; i < 3000000000u; i += 100000007) {
        CHECK_EQ(ask((struct rfm_request_line){ .binding = i }),
                 RFM_ST_PROTOCOL);
    }
    CHECK_EQ(ask((struct rfm_request_line){ .binding = UINT32_MAX }),
             RFM_ST_PROTOCOL);
    CHECK_EQ(ask((struct rfm_request_line){ .binding = 65536 }),
             RFM_ST_PROTOCOL);
    /* objects that are too short, too long, staged nowhere */
    line = (struct rfm_request_line){ .binding = 2, .flags = RFM_REQ_OBJECT };
    for (uint64_t n = 0; n < 8; n++) {
        line.in_bytes = n;
        CHECK_EQ(ask(line), RFM_ST_PROTOCOL);
    }
    line.in_bytes = SLOT_BYTES + 1;
    CHECK_EQ(ask(line), RFM_ST_PROTOCOL);
    line.in_bytes = UINT64_MAX;
    CHECK_EQ(ask(line), RFM_ST_PROTOCOL);
    line.flags |= RFM_REQ_STAGED;
    for (size_t i = 0; i < 7; i++) {
        struct rfm_desc desc = lies[i];

        desc.offset += (desc.size == 15) || (desc.size == 17) ? ARENA : 0;
        line.in_bytes = sizeof(desc);
        memcpy(line.payload, &desc, sizeof(desc));
        CHECK_EQ(ask(line), RFM_ST_PROTOCOL);
    }
    /* fetches */
    line = (struct rfm_request_line){ .flags = RFM_REQ_FETCH, .in_bytes = 32 };
    for (size_t i = 0; i < 7; i++) {
        struct rfm_wire_fetch fetch = { .kept_id = i, .into = lies[i] };

        fetch.into.offset += (fetch.into.size == 15) || (fetch.into.size == 17)
                                 ? ARENA : 0;
        memcpy(line.payload, &fetch, sizeof(fetch));
        CHECK_EQ(ask(line), RFM_ST_PROTOCOL);
        line.in_bytes = 31 + 2 * (i % 2);
        CHECK_EQ(ask(line), RFM_ST_PROTOCOL);
        line.in_bytes = 32;
    }
    drop_things();
    /* none of them is forgotten */
    CHECK_EQ(worker.n_refused, told_so);
    down();
}

static void an_arena_that_is_dropped_under_a_binding_is_an_error(void)
{
    struct rfm_wire_arg args[2] = {
        { .place = RFM_BOUND, .arena = 1, .size = 64 },
        { .place = RFM_BOUND, .flags = RFM_ARG_CANARY, .arena = 1,
          .offset = 64, .size = 64 },
    };
    struct rfm_request_line line = { .binding = 0 };

    up();
    attach();
    send_arena(1);
    send_arena(2);
    send_kernel(0, "mix");
    rfm_redzone_fill(liar.arena + 128);
    send_bind(0, 0, 0, 1, 1, args);
    args[0].arena = args[1].arena = 2;
    send_bind(1, 0, 0, 1, 1, args);
    CHECK_EQ(ask(line), RFM_ST_OK);
    send_number(RFM_CTL_ARENA_DROP, 1);
    send_number(RFM_CTL_ARENA_DROP, 1);
    send_number(RFM_CTL_ARENA_DROP, 99);
    /* an unknown binding makes it read all that was said */
    CHECK_EQ(ask((struct rfm_request_line){ .binding = 55 }), RFM_ST_PROTOCOL);
    CHECK_EQ(ask(line), RFM_ST_BAD_KERNEL);
    CHECK_EQ(ask((struct rfm_request_line){ .binding = 1 }), RFM_ST_OK);
    send_number(RFM_CTL_UNBIND, 0);
    send_number(RFM_CTL_UNBIND, 0);
    send_number(RFM_CTL_UNBIND, 65537);
    send_number(RFM_CTL_DISCARD, 0);
    CHECK_EQ(ask((struct rfm_request_line){ .binding = 55 }), RFM_ST_PROTOCOL);
    CHECK_EQ(ask(line), RFM_ST_PROTOCOL);
    CHECK_EQ(ask((struct rfm_request_line){ .binding = 1 }), RFM_ST_OK);
    drop_things();
    down();
}

/* --- fuzz ----------------------------------------------------------------- */

static void make_bindings(void)
{
    struct rfm_wire_arg in_slot[3] = { { .size = 40 }, { .size = 3 },
                                       { .size = 50 } };
    struct rfm_wire_arg by_call[3] = {
        { .place = RFM_CALL, .size = 20 }, { .size = 8 },
        { .place = RFM_CALL, .size = 100 },
    };
    struct rfm_wire_arg bound[2] = {
        { .place = RFM_BOUND, .arena = 1, .size = 100 },
        { .place = RFM_BOUND, .arena = 1, .offset = 128, .size = 100 },
    };

    send_arena(1);
    send_kernel(0, "mix");
    send_kernel(1, "pattern");
    send_kernel(2, "event");
    send_kernel(3, "plain");
    send_bind(0, 0, 0, 2, 1, in_slot);
    send_bind(1, 0, 0, 2, 1, by_call);
    send_bind(2, 0, 0, 1, 1, bound);
    send_bind(3, 1, RFM_BIND_OBJECT, 0, 0, NULL);
    send_bind(4, 2, 0, 1, 2, by_call);
    send_bind(5, 3, 0, 1, 1, bound);
    send_bind(6, 2, 0, 1, 1, in_slot);
}

/* Somewhere in the arena, mostly. */
static struct rfm_desc any_desc(struct t_random *r)
{
    static const uint64_t sizes[] = { 20, 100, 8, 0, 32, 5000 };
    struct rfm_desc desc = {
        .arena  = 1,
        .flags  = (uint32_t)t_below(r, 2),
        .offset = t_below(r, ARENA),
        .size   = sizes[t_below(r, 6)],
    };

    switch (t_below(r, 12)) {
    case 0:
        desc.arena = (uint32_t)t_random(r) >> t_below(r, 32);
        break;
    case 1:
        desc.offset = t_random(r) >> t_below(r, 64);
        break;
    case 2:
        desc.size = t_random(r) >> t_below(r, 64);
        break;
    default:
        break;
    }
    return desc;
}

static void random_requests_never_harm_the_worker(void)
{
    static const uint64_t in_bytes[] = { 67, 56, 0, 16, 48, 0, 40 };
    uint32_t rounds = t_scaled(100000, 5000);
    struct t_random r = { 19 };
    uint64_t statuses[RFM_ST_LAST + 1] = { 0 };

    up();
    attach();
    make_bindings();
    for (uint32_t round = 0; round < rounds; round++) {
        struct rfm_request_line line;
        uint32_t pick = (uint32_t)t_below(&r, 7);
        uint8_t *payload = request_at(next_slot()) + 64;

        memset(&line, 0, sizeof(line));
        line.binding  = pick;
        line.in_bytes = in_bytes[pick];
        t_fill(payload, SLOT_BYTES + 64, t_random(&r));
        /* an old claim: nobody took this one back */
        memset(payload + SLOT_BYTES, 0, 64);
        t_fill(line.payload, 32, t_random(&r));
        for (uint32_t i = 0; i < 4; i++) {
            struct rfm_desc desc = any_desc(&r);

            memcpy(payload + i * 24, &desc, 24);
            if (i == 0) {
                memcpy(line.payload, &desc, 24);
            }
        }
        if (pick == 3) {
            /* an object asks for little, or for too much */
            uint64_t n = t_random(&r) >> ((t_below(&r, 2) == 0) ? 50 : 10);

            line.flags = RFM_REQ_OBJECT;
            if (t_below(&r, 3) == 0) {
                line.flags |= RFM_REQ_STAGED;
                line.in_bytes = 24;
                memset(liar.arena, 0, ARENA);
            } else {
                memcpy(line.payload, &n, 8);
                memcpy(payload, &n, 8);
                line.in_bytes = 8 + t_below(&r, 60);
            }
        }
        switch (t_below(&r, 10)) {
        case 0:
            line.flags ^= 1u << t_below(&r, 32);
            break;
        case 1:
            line.in_bytes = t_random(&r) >> t_below(&r, 64);
            break;
        case 2:
            line.binding = (uint32_t)t_random(&r) >> t_below(&r, 32);
            break;
        case 3:
            line.flags    = RFM_REQ_FETCH;
            line.in_bytes = 32;
            memmove(line.payload + 8, line.payload, 24);
            break;
        case 4:
            line.budget_ns = UINT64_MAX - t_below(&r, 3);
            break;
        default:
            break;
        }
        statuses[ask(line)]++;
        if (round % 64 == 0) {
            struct rfm_ctl_number body = { 0, 0 };
            struct iovec iov = { &body, sizeof(body) };

            CHECK_OK(rfm_frame_send(liar.fd, RFM_CTL_DISCARD,
                                    liar.id - t_below(&r, 64), &iov, 1, NULL, 0));
        }
        if (round % 4096 == 0) {
            the_others_are_served();
            drop_things();
            attach();
            make_bindings();
        }
    }
    drop_things();
    CHECK(statuses[RFM_ST_OK] > rounds / 10);
    CHECK(statuses[RFM_ST_PROTOCOL] > rounds / 10);
    CHECK(statuses[RFM_ST_KERNEL] > 0);
    down();
}

static uint64_t any_frame(struct t_random *r, uint8_t *bytes, uint16_t *type)
{
    static const uint16_t types[] = {
        RFM_CTL_ARENA, RFM_CTL_ARENA_DROP, RFM_CTL_KERNEL, RFM_CTL_BIND,
        RFM_CTL_BIND,  RFM_CTL_BIND, RFM_CTL_UNBIND, RFM_CTL_DISCARD, RFM_CTL_DRAIN,
    };
    uint64_t n = 8;

    *type = types[t_below(r, 9)];
    t_fill(bytes, 256, t_random(r));
    switch (*type) {
    case RFM_CTL_ARENA: {
        struct rfm_ctl_arena body = { .arena = (uint32_t)t_below(r, 4),
                                      .bytes = ARENA };

        memcpy(bytes, &body, n = sizeof(body));
        break;
    }
    case RFM_CTL_KERNEL: {
        static const char *const names[] = { "mix", "event", "nothing" };
        const char *name = names[t_below(r, 3)];
        struct rfm_ctl_kernel body = { .kernel = 1 + (uint32_t)t_below(r, 100),
                                       .blob_bytes = strlen(name) };

        memcpy(bytes, &body, sizeof(body));
        memcpy(bytes + sizeof(body), name, strlen(name));
        n = sizeof(body) + strlen(name);
        break;
    }
    case RFM_CTL_BIND: {
        struct rfm_ctl_bind body = {
            .binding = (uint32_t)t_below(r, 2000),
            .n_in    = (uint16_t)t_below(r, 4),
            .n_out   = (uint16_t)t_below(r, 4),
            .meta_bytes = t_below(r, 3),
        };
        uint32_t args = (uint32_t)body.n_in + body.n_out;

        memcpy(bytes, &body, sizeof(body));
        for (uint32_t i = 0; i < args; i++) {
            struct rfm_wire_arg arg = {
                .place  = (uint8_t)t_below(r, 3),
                .flags  = (uint8_t)t_below(r, 2),
                .arena  = (uint32_t)t_below(r, 4),
                .offset = t_below(r, ARENA + 100),
                .size   = t_below(r, 100),
            };

            memcpy(bytes + sizeof(body) + i * sizeof(arg), &arg, sizeof(arg));
        }
        n = sizeof(body) + args * sizeof(struct rfm_wire_arg) + body.meta_bytes;
        break;
    }
    case RFM_CTL_ARENA_DROP:
    case RFM_CTL_UNBIND: {
        struct rfm_ctl_number body = { .number = (uint32_t)t_below(r, 10) };

        memcpy(bytes, &body, sizeof(body));
        break;
    }
    default:
        break;
    }
    if (t_below(r, 30) == 0) {
        bytes[t_below(r, n)] ^= (uint8_t)(1u << t_below(r, 8));
    }
    if (t_below(r, 60) == 0) {
        n = t_below(r, 2 * n);
    }
    return n;
}

static void random_control_frames_never_harm_the_worker(void)
{
    uint32_t rounds = t_scaled(60000, 4000);
    struct t_random r = { 7 };
    uint32_t hung_up = 0;
    uint32_t round = 0;

    up();
    while (round < rounds) {
        bool alive = true;
        uint32_t frames = 0;

        attach();
        send_kernel(0, "mix");
        for (; alive && (frames < 500) && (round < rounds); round++, frames++) {
            uint8_t bytes[512];
            uint16_t type;
            uint64_t n = any_frame(&r, bytes, &type);
            struct iovec iov = { bytes, n };
            uint32_t fds = ((type == RFM_CTL_ARENA) != (t_below(&r, 40) == 0))
                               ? 1 : 0;

            alive = rfm_frame_send(liar.fd, type, t_random(&r), &iov, 1,
                                   &liar.arena_fd, fds) == RFM_OK;
            if (alive && (t_below(&r, 10) == 0)) {
                /* whatever was bound: its arguments lie where they may */
                struct rfm_request_line line = { .binding =
                                                     (uint32_t)t_below(&r, 2000) };
                struct pollfd p = { .fd = liar.fd, .events = POLLIN };
                struct rfm_request_line *at =
                    (struct rfm_request_line *)request_at(next_slot());
                uint32_t slot = next_slot();

                line.in_bytes = t_below(&r, 4) * 24;
                line.id = ++liar.id;
                memcpy((uint8_t *)at + 8, (uint8_t *)&line + 8, 56);
                rfm_store_release(&at->id, line.id);
                rfm_door_knock(liar.door);
                while ((rfm_load_acquire(&reply_line(slot)->id) != line.id) &&
                       alive) {
                    alive = poll(&p, 1, 0) == 0;
                    sched_yield();
                }
                liar.ticket++;
            }
        }
        hung_up += !alive;
        drop_things();
        the_others_are_served();
    }
    CHECK(hung_up > 0);
    down();
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(a_channel_of_absurd_dimensions_is_refused);
    RUN(descriptors_of_another_kind_are_refused);
    RUN(nobody_attaches_twice_or_clogs_the_worker_with_refusals);
    RUN(frames_of_the_wrong_shape_end_or_do_nothing);
    RUN(half_a_frame_and_the_end_is_an_end);
    RUN(arenas_that_are_none_are_not_mapped);
    RUN(bindings_that_make_no_sense_are_refused);
    RUN(broken_kernels_and_bindings_end_the_connection);
    RUN(requests_that_make_no_sense_are_answered_so);
    RUN(an_arena_that_is_dropped_under_a_binding_is_an_error);
    RUN(random_requests_never_harm_the_worker);
    RUN(random_control_frames_never_harm_the_worker);
    return t_finish();
}

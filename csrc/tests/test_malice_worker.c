/* A worker that lies: the rank takes nothing that makes no sense, touches no
 * memory that isn't its own, and ends what it had LOST once it is fenced. */
#define _GNU_SOURCE
#include "harness.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "frame.h"
#include "invoker.h"
#include "shm.h"

#define SLOTS 4u

/* The worker's side by hand; what is killed for its lies is a dummy. */
static struct {
    int fd;                     /* of the control connection */
    pid_t pid;
    int pidfd;
    int door_fd;
    uint8_t *segment;
    uint64_t bytes;
    struct rfm_rx rx;
} liar;

static struct rfm_invoker *inv;
static struct rfm_channel *chan;
static uint32_t taken;          /* requests, of this channel */
static uint64_t last_taken;

static void read_frame(void)
{
    struct pollfd p = { .fd = liar.fd, .events = POLLIN };
    int rc;

    rfm_rx_fini(&liar.rx);
    while ((rc = rfm_rx_read(&liar.rx, liar.fd)) == RFM_ERR_AGAIN) {
        (void)poll(&p, 1, -1);
    }
    CHECK_OK(rc);
}

static void *answer_attach(void *arg)
{
    struct rfm_ctl_attached answer = { .pid = (uint32_t)liar.pid };
    struct iovec iov = { &answer, sizeof(answer) };
    int fds[2] = { liar.door_fd, liar.pidfd };
    struct rfm_ctl_attach body;

    (void)arg;
    read_frame();
    CHECK_EQ(liar.rx.head.type, RFM_CTL_ATTACH);
    CHECK_EQ(liar.rx.head.length, sizeof(body));
    memcpy(&body, liar.rx.body, sizeof(body));
    liar.bytes = body.segment_bytes;
    CHECK_OK(rfm_memfd_map(liar.rx.fds[0], liar.bytes, false, &liar.segment));
    CHECK_OK(rfm_frame_send(liar.fd, RFM_CTL_ATTACHED, 0, &iov, 1, fds, 2));
    return NULL;
}

static void up(void)
{
    pthread_t thread;
    int pair[2];

    memset(&liar, 0, sizeof(liar));
    t_socketpair(pair);
    liar.fd  = pair[0];
    liar.pid = t_dummy(&liar.pidfd);
    CHECK_OK(rfm_memfd_create("door", RFM_DOOR_BYTES, &liar.door_fd));
    rfm_rx_init(&liar.rx, RFM_MAX_FRAME);
    if (inv == NULL) {
        inv = t_invoker(SLOTS, 256, 0);
    }
    CHECK_EQ(pthread_create(&thread, NULL, answer_attach, NULL), 0);
    CHECK_OK(rfm_invoker_attach(inv, pair[1], 1, 1, T_FOREVER, &chan));
    pthread_join(thread, NULL);
    taken      = 0;
    last_taken = 0;
}

/* Its end, by whatever hand. */
static void down(void)
{
    (void)kill(liar.pid, SIGKILL);
    CHECK_EQ(t_reap(liar.pid), SIGKILL);
    rfm_memfd_unmap(liar.segment, liar.bytes);
    rfm_rx_fini(&liar.rx);
    close(liar.fd);
    close(liar.pidfd);
    close(liar.door_fd);
}

static void all_down(void)
{
    t_invoker_end(inv);
    inv = NULL;
}

static struct rfm_request_line *request_line(uint32_t slot)
{
    return (struct rfm_request_line *)(liar.segment + RFM_CONTROL_BYTES +
                                       slot * (256u + 128u));
}

static struct rfm_reply_line *reply_line(uint32_t slot)
{
    return (struct rfm_reply_line *)((uint8_t *)request_line(slot) +
                                     SLOTS * (256u + 128u));
}

static void reply(uint32_t slot, const struct rfm_reply_line *line)
{
    struct rfm_reply_line *at = reply_line(slot);

    memcpy((uint8_t *)at + 8, (const uint8_t *)line + 8, sizeof(*at) - 8);
    rfm_store_release(&at->id, line->id);
}

/* The next request's id, as the worker sees it. */
static uint64_t take(void)
{
    struct rfm_request_line *at = request_line(taken % SLOTS);
    uint64_t id;

    while (((id = rfm_load_acquire(&at->id)) == 0) || (id == last_taken)) {
        sched_yield();
    }
    last_taken = id;
    taken++;
    return id;
}

static void answer_honestly(struct t_call *call)
{
    struct rfm_reply_line line = { .out_bytes = 8 };

    t_start(call);
    line.id = take();
    t_fill(line.payload, 8, line.id);
    reply((taken - 1) % SLOTS, &line);
    CHECK_EQ(t_wait(call), RFM_DONE);
    CHECK(t_filled(t_out(call, 0), 8, line.id));
}

/* What the rank says is not of interest, but it must find room. */
static void listen_to_nothing(void)
{
    char bytes[4096];

    while (recv(liar.fd, bytes, sizeof(bytes), MSG_DONTWAIT) > 0) {
    }
}

static void make_call(struct t_call *call, uint32_t n_out, uint64_t size)
{
    uint32_t places[5] = { RFM_INLINE, RFM_INLINE, RFM_INLINE, RFM_INLINE,
                           RFM_INLINE };
    uint64_t sizes[5] = { 8, size, size, size, size };

    listen_to_nothing();
    t_call_make(call, inv, "echo", 1, (uint16_t)n_out, places, sizes);
    memset(t_in(call, 0), 1, 8);
    for (uint32_t i = 0; i < n_out; i++) {
        memset(t_out(call, i), 0xcc, size);
    }
}

static void check_untouched(struct t_call *call, uint32_t n_out, uint64_t size)
{
    for (uint32_t i = 0; i < n_out; i++) {
        for (uint64_t b = 0; b < size; b++) {
            CHECK_EQ(((uint8_t *)t_out(call, i))[b], 0xcc);
        }
    }
}

static void the_fence_holds(struct t_call *call)
{
    struct rfm_channel_info info;

    CHECK_EQ(t_wait(call), RFM_LOST);
    /* it was killed, not just left */
    CHECK_EQ(t_reap(liar.pid), SIGKILL);
    do {
        rfm_channel_info(chan, &info);
        sched_yield();
    } while (!info.fenced);
}

static void down_after_the_fence(void)
{
    rfm_memfd_unmap(liar.segment, liar.bytes);
    rfm_rx_fini(&liar.rx);
    close(liar.fd);
    close(liar.pidfd);
    close(liar.door_fd);
}

/* --- lies ----------------------------------------------------------------- */

static void an_honest_answer_by_hand_is_taken(void)
{
    struct t_call call;

    up();
    make_call(&call, 1, 8);
    for (int i = 0; i < 20; i++) {
        answer_honestly(&call);
    }
    t_call_end(&call);
    down();
    all_down();
}

static void answers_that_make_no_sense_are_lost_behind_a_fence(void)
{
    static const struct rfm_reply_line lies[] = {
        { .status = 5 },
        { .status = 6 },
        { .status = UINT32_MAX },
        { .status = 0, .out_bytes = 9 },
        { .status = 0, .out_bytes = UINT64_MAX },
        { .status = RFM_ST_KERNEL, .out_bytes = 257 },
        { .status = RFM_ST_KERNEL, .out_bytes = UINT64_MAX },
        { .status = RFM_ST_BAD_KERNEL, .out_bytes = 1ull << 63 },
        { .status = RFM_ST_PROTOCOL, .out_bytes = 100000 },
        { .status = 0, .flags = RFM_REP_SIZES,
          .payload = { 9, 0, 0, 0, 0, 0, 0, 0 } },
        { .status = 0, .flags = RFM_REP_SIZES,
          .payload = { 255, 255, 255, 255, 255, 255, 255, 255 } },
    };

    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        struct rfm_reply_line line = lies[i];
        struct t_call call;

        up();
        make_call(&call, 1, 8);
        t_start(&call);
        line.id = take();
        reply(0, &line);
        the_fence_holds(&call);
        check_untouched(&call, 1, 8);
        t_call_end(&call);
        down_after_the_fence();
    }
    all_down();
}

static void one_bad_size_of_several_spoils_no_output(void)
{
    for (uint32_t bad = 0; bad < 3; bad++) {
        struct rfm_reply_line line = { .flags = RFM_REP_SIZES, .out_bytes = 40 };
        struct t_call call;

        up();
        make_call(&call, 3, 40);
        t_start(&call);
        line.id = take();
        for (uint32_t i = 0; i < 3; i++) {
            uint64_t size = (i == bad) ? 41 + (bad * (UINT64_MAX / 4)) : 40;

            memcpy((uint8_t *)reply_line(0) + 64 + (i * 8), &size, 8);
        }
        reply(0, &line);
        the_fence_holds(&call);
        check_untouched(&call, 3, 40);
        t_call_end(&call);
        down_after_the_fence();
    }
    all_down();
}

static void a_claim_of_any_execution_time_is_survived(void)
{
    static const uint64_t times[] = { UINT64_MAX, UINT64_MAX - 1, 1ull << 63, 0,
                                      UINT64_MAX, 7, 1ull << 60, UINT64_MAX - 7 };
    struct t_call call;

    up();
    make_call(&call, 1, 8);
    for (uint32_t i = 0; i < 64; i++) {
        struct rfm_reply_line line = { .out_bytes = 8, .exec_ns = times[i % 8] };

        t_start(&call);
        line.id = take();
        reply((taken - 1) % SLOTS, &line);
        CHECK_EQ(t_wait(&call), RFM_DONE);
    }
    t_call_end(&call);
    down();
    all_down();
}

static void ids_that_were_not_asked_for_are_not_taken(void)
{
    struct rfm_reply_line line = { .out_bytes = 8 };
    struct t_call call;
    uint64_t id;

    up();
    make_call(&call, 1, 8);
    t_start(&call);
    id = take();
    for (uint64_t i = 1; i < 200; i++) {
        line.id = id + i;
        reply(0, &line);
        line.id = id - i;
        reply(0, &line);
        line.id = id;
        reply(1 + (uint32_t)(i % 3), &line);    /* right id, wrong slot */
        CHECK(rfm_invoker_progress(inv) <= 0);
        CHECK(!rfm_request_ended(&call.req));
    }
    line.id = UINT64_MAX;
    reply(0, &line);
    CHECK(rfm_invoker_progress(inv) <= 0);
    t_fill(line.payload, 8, 4);
    line.id = id;
    reply(0, &line);
    CHECK_EQ(t_wait(&call), RFM_DONE);
    CHECK(t_filled(t_out(&call, 0), 8, 4));
    t_call_end(&call);
    down();
    all_down();
}

/* Ids are easy to guess: an answer may be there before its question. */
static void an_answer_before_its_question_hurts_nobody(void)
{
    uint32_t rounds = t_scaled(2000, 300);

    up();
    for (uint32_t i = 0; i < rounds; i++) {
        struct rfm_reply_line line = { .out_bytes = 8 };
        struct t_call *call = malloc(sizeof(*call));

        CHECK(call != NULL);
        make_call(call, 1, 8);
        line.id = i + 1;
        reply(i % SLOTS, &line);
        t_start(call);
        CHECK_EQ(t_wait(call), RFM_DONE);
        /* its memory goes at once: whoever still touches it is seen */
        t_call_end(call);
        free(call);
    }
    down();
    all_down();
}

static struct t_call *volatile prey;

static void *reap_all(void *arg)
{
    uint32_t *stop = arg;

    while (rfm_load_acquire(stop) == 0) {
        struct t_call *call = __atomic_load_n(&prey, __ATOMIC_ACQUIRE);

        (void)rfm_invoker_progress(inv);
        if ((call != NULL) && rfm_request_ended(&call->req)) {
            __atomic_store_n(&prey, NULL, __ATOMIC_RELEASE);
            t_call_end(call);
            free(call);
        }
    }
    return NULL;
}

/* The same with another thread, that frees what ended while it is posted. */
static void nor_if_another_thread_sees_the_end_first(void)
{
    uint32_t rounds = t_scaled(2000, 300);
    uint32_t stop = 0;
    pthread_t thread;

    up();
    CHECK_EQ(pthread_create(&thread, NULL, reap_all, &stop), 0);
    for (uint32_t i = 0; i < rounds; i++) {
        struct rfm_reply_line line = { .id = i + 1, .out_bytes = 8 };
        struct t_call *call = malloc(sizeof(*call));

        CHECK(call != NULL);
        make_call(call, 1, 8);
        reply(i % SLOTS, &line);
        __atomic_store_n(&prey, call, __ATOMIC_RELEASE);
        t_start(call);
        while (__atomic_load_n(&prey, __ATOMIC_ACQUIRE) != NULL) {
            sched_yield();
        }
    }
    rfm_store_release(&stop, 1);
    pthread_join(thread, NULL);
    down();
    all_down();
}

static void a_busy_worker_gets_nothing_more_and_the_request_goes_elsewhere(void)
{
    struct rfm_reply_line line = { .status = RFM_ST_BUSY };
    struct rfm_channel_info info;
    struct t_worker honest;
    struct t_call call;
    uint64_t id;

    up();
    make_call(&call, 1, 8);
    t_start(&call);
    line.id = take();
    reply(0, &line);
    CHECK_EQ(t_wait(&call), RFM_BUSY);
    rfm_channel_info(chan, &info);
    CHECK_EQ(info.alive, 0);
    id = call.req.id;
    CHECK_OK(rfm_request_restart(&call.req));
    CHECK_EQ(rfm_load_acquire(&call.req.state), RFM_QUEUED);
    t_worker_start(&honest, false, 0);
    (void)t_worker_attach(&honest, inv);
    CHECK_EQ(t_wait(&call), RFM_DONE);
    CHECK_EQ(call.req.id, id);
    t_call_end(&call);
    down();
    all_down();
    t_worker_end(&honest);
}

static void a_result_that_is_not_kept_after_all_is_lost_behind_a_fence(void)
{
    struct rfm_reply_line line = { .flags = RFM_REP_KEPT, .out_bytes = 1ull << 62 };
    uint64_t ask[2] = { 1, 1 };
    struct rfm_block block;
    struct rfm_desc into;
    struct t_call call;

    up();
    t_call_object(&call, inv, "pattern", ask, sizeof(ask));
    t_start(&call);
    line.id = take();
    reply(0, &line);
    CHECK_EQ(t_wait(&call), RFM_LARGE);
    CHECK_EQ(call.req.out_bytes, 1ull << 62);
    CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), 100, &block));
    into = (struct rfm_desc){ block.arena_id, 0, block.offset, 100 };
    CHECK_OK(rfm_request_fetch(&call.req, &into));
    line = (struct rfm_reply_line){ .id = take(), .status = RFM_ST_PROTOCOL };
    reply(1, &line);
    the_fence_holds(&call);
    rfm_heap_free(&block);
    t_call_end(&call);
    down_after_the_fence();
    all_down();
}

/* --- control frames ------------------------------------------------------- */

static void nonsense_on_the_control_connection_ends_in_a_fence(void)
{
    static const struct rfm_frame heads[] = {
        { .length = 5000, .type = RFM_CTL_DRAIN },      /* too long */
        { .length = UINT32_MAX, .type = 77 },
        { .length = 0, .type = RFM_CTL_DRAIN, .n_fds = 3 },
        { .length = 0, .type = RFM_CTL_DRAIN, .n_fds = 65535 },
    };

    for (size_t i = 0; i < sizeof(heads) / sizeof(heads[0]); i++) {
        struct t_call call;

        up();
        make_call(&call, 1, 8);
        t_start(&call);
        (void)take();
        CHECK_EQ(send(liar.fd, &heads[i], sizeof(heads[i]), MSG_NOSIGNAL),
                 sizeof(heads[i]));
        the_fence_holds(&call);
        t_call_end(&call);
        down_after_the_fence();
    }
    all_down();
}

static void unknown_frames_and_a_drain_are_no_end(void)
{
    struct rfm_channel_info info;
    struct iovec iov = { "hello", 5 };
    struct t_call call;

    up();
    make_call(&call, 1, 8);
    for (uint16_t type = 0; type < 50; type++) {
        if (type != RFM_CTL_DRAIN) {
            CHECK_OK(rfm_frame_send(liar.fd, type, type, &iov, 1, &liar.pidfd,
                                    type % 2));
        }
        answer_honestly(&call);
    }
    t_start(&call);
    CHECK_OK(rfm_frame_send(liar.fd, RFM_CTL_DRAIN, 0, NULL, 0, NULL, 0));
    do {
        rfm_channel_info(chan, &info);
        sched_yield();
    } while (info.alive);
    {
        struct rfm_reply_line line = { .id = take(), .out_bytes = 8 };

        reply((taken - 1) % SLOTS, &line);
    }
    CHECK_EQ(t_wait(&call), RFM_DONE);
    t_call_end(&call);
    down();
    all_down();
}

static void a_worker_that_hangs_up_but_lives_on_is_killed(void)
{
    struct t_call call;

    up();
    make_call(&call, 1, 8);
    t_start(&call);
    (void)take();
    CHECK(shutdown(liar.fd, SHUT_WR) == 0);
    the_fence_holds(&call);
    t_call_end(&call);
    down_after_the_fence();
    all_down();
}

/* After our goodbye only the end of the connection is its promise to be gone. */
static void nonsense_after_the_goodbye_is_no_fence(void)
{
    struct rfm_frame head = { .length = UINT32_MAX };
    struct pollfd p;
    struct t_call call;

    up();
    make_call(&call, 1, 8);
    t_start(&call);
    (void)take();
    rfm_channel_close(chan);
    p = (struct pollfd){ .fd = liar.fd, .events = POLLRDHUP };
    CHECK_EQ(poll(&p, 1, -1), 1);       /* it let go */
    CHECK_EQ(send(liar.fd, &head, sizeof(head), MSG_NOSIGNAL), sizeof(head));
    the_fence_holds(&call);
    t_call_end(&call);
    down_after_the_fence();
    all_down();
}

/* --- attaching ------------------------------------------------------------ */

static void *answer_with(void *arg)
{
    int *fds = arg;             /* n, then the descriptors */
    struct rfm_ctl_attached answer = { .pid = 1 };
    struct iovec iov = { &answer, sizeof(answer) };

    read_frame();
    CHECK_OK(rfm_frame_send(liar.fd, RFM_CTL_ATTACHED, 0, &iov, 1, fds + 1,
                            (uint32_t)fds[0]));
    return NULL;
}

static void an_attach_that_brings_the_wrong_things_is_refused(void)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    int unsealed = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int closed_pidfd;
    pid_t gone = t_dummy(&closed_pidfd);
    int door;
    int small;
    int pidfd;
    pid_t pid = t_dummy(&pidfd);

    CHECK_OK(rfm_memfd_create("door", RFM_DOOR_BYTES, &door));
    CHECK_OK(rfm_memfd_create("large", 3 * RFM_DOOR_BYTES, &small));
    CHECK(ftruncate(unsealed, RFM_DOOR_BYTES) == 0);
    t_kill(gone, SIGKILL);
    CHECK_EQ(t_reap(gone), SIGKILL);
    {
        const struct {
            int fds[5];
            int rc;
        } cases[] = {
            { { 0 }, RFM_ERR_PROTOCOL },
            { { 1, door }, RFM_ERR_PROTOCOL },
            { { 3, door, pidfd, pidfd }, RFM_ERR_PROTOCOL },
            { { 2, null, pidfd }, RFM_ERR_PROTOCOL },
            { { 2, unsealed, pidfd }, RFM_ERR_PROTOCOL },
            { { 2, small, pidfd }, RFM_ERR_PROTOCOL },
            { { 2, door, null }, RFM_ERR_PROTOCOL },
            { { 2, door, door }, RFM_ERR_PROTOCOL },
            { { 2, pidfd, door }, RFM_ERR_PROTOCOL },
            { { 2, door, closed_pidfd }, RFM_ERR_PEER },
        };

        inv = t_invoker(SLOTS, 256, 0);
        for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
            uint32_t before = t_open_fds();
            pthread_t thread;
            int pair[2];

            t_socketpair(pair);
            liar.fd = pair[0];
            rfm_rx_init(&liar.rx, RFM_MAX_FRAME);
            CHECK_EQ(pthread_create(&thread, NULL, answer_with,
                                    (void *)(uintptr_t)cases[i].fds), 0);
            CHECK_EQ(rfm_invoker_attach(inv, pair[1], 1, 1, T_FOREVER, &chan),
                     cases[i].rc);
            pthread_join(thread, NULL);
            rfm_rx_fini(&liar.rx);
            close(liar.fd);
            CHECK_EQ(t_open_fds(), before);
        }
        all_down();
    }
    t_kill(pid, SIGKILL);
    CHECK_EQ(t_reap(pid), SIGKILL);
    close(null);
    close(unsealed);
    close(closed_pidfd);
    close(door);
    close(small);
    close(pidfd);
}

/* --- fuzz ----------------------------------------------------------------- */

/* Whatever stands in the reply slots, while requests of all kinds come and go. */
static void random_replies_never_harm_the_rank(void)
{
    static const uint32_t plausible[] = { 0, 0, 0, 0, 1, 2, 4 };
    uint32_t rounds = t_scaled(20000, 2000);
    struct t_random r = { 2026 };
    uint64_t ask[2] = { 1, 1 };
    uint64_t outcomes[10] = { 0 };
    struct rfm_block block;
    uint32_t round = 0;

    inv = t_invoker(SLOTS, 256, 0);
    CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), 100, &block));
    while (round < rounds) {
        struct t_call calls[5];
        bool alive = true;

        up();
        make_call(&calls[0], 1, 8);
        make_call(&calls[1], 1, 100);
        make_call(&calls[2], 3, 8);
        make_call(&calls[3], 0, 0);
        t_call_object(&calls[4], inv, "pattern", ask, sizeof(ask));
        for (; alive && (round < rounds); round++) {
            struct t_call *call = &calls[t_below(&r, 5)];
            uint32_t slot = (uint32_t)(rfm_load_acquire(&chan->head) % SLOTS);
            struct rfm_reply_line line;
            struct rfm_channel_info info;

            t_start(call);
            do {
                /* mostly what might be true: a lie ends the channel */
                bool wise = t_below(&r, 16) != 0;

                t_fill(reply_line(slot), 64 + 256 + 64, t_random(&r));
                line.status = wise ? plausible[t_below(&r, 7)]
                                   : (uint32_t)(t_random(&r) >>
                                                (32 + t_below(&r, 32)));
                line.flags  = (uint32_t)(wise ? t_below(&r, 2) * t_below(&r, 2)
                                              : t_random(&r));
                line.out_bytes = wise ? t_below(&r, 1 + calls[1].args[1].size)
                                      : t_random(&r) >> t_below(&r, 64);
                if (wise && (call != &calls[1]) && (call != &calls[4])) {
                    line.out_bytes %= 1 + call->args[1].size;
                }
                line.exec_ns   = t_random(&r) >> t_below(&r, 64);
                t_fill(line.payload, 32, t_random(&r));
                line.id = call->req.wire_id;
                if (t_below(&r, 20) == 0) {
                    line.id ^= 1ull << t_below(&r, 64);
                }
                reply(slot, &line);
                (void)rfm_invoker_progress(inv);
                rfm_channel_info(chan, &info);
                alive = info.alive != 0;
            } while (!rfm_request_ended(&call->req) && alive);
            if (!alive) {
                rfm_invoker_abandon(inv);
            }
            outcomes[t_wait(call)]++;
            if ((call->req.outcome == RFM_LARGE) && alive) {
                struct rfm_desc into = { block.arena_id, 0, block.offset, 100 };

                slot = (uint32_t)(rfm_load_acquire(&chan->head) % SLOTS);
                CHECK_OK(rfm_request_fetch(&call->req, &into));
                line.id     = call->req.wire_id;
                line.status = (t_below(&r, 3) == 0) ? RFM_ST_KERNEL : RFM_ST_OK;
                reply(slot, &line);
                outcomes[t_wait(call)]++;
                rfm_channel_info(chan, &info);
                alive = info.alive != 0;
            }
        }
        down();
        for (int i = 0; i < 5; i++) {
            t_call_end(&calls[i]);
        }
    }
    rfm_heap_free(&block);
    all_down();
    CHECK(outcomes[RFM_DONE] > 0);
    CHECK(outcomes[RFM_LOST] > 0);
    CHECK(outcomes[RFM_LARGE] > 0);
    CHECK(outcomes[RFM_KERNEL_ERROR] > 0);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(an_honest_answer_by_hand_is_taken);
    RUN(answers_that_make_no_sense_are_lost_behind_a_fence);
    RUN(one_bad_size_of_several_spoils_no_output);
    RUN(a_claim_of_any_execution_time_is_survived);
    RUN(ids_that_were_not_asked_for_are_not_taken);
    RUN(an_answer_before_its_question_hurts_nobody);
    RUN(nor_if_another_thread_sees_the_end_first);
    RUN(a_busy_worker_gets_nothing_more_and_the_request_goes_elsewhere);
    RUN(a_result_that_is_not_kept_after_all_is_lost_behind_a_fence);
    RUN(nonsense_on_the_control_connection_ends_in_a_fence);
    RUN(unknown_frames_and_a_drain_are_no_end);
    RUN(a_worker_that_hangs_up_but_lives_on_is_killed);
    RUN(nonsense_after_the_goodbye_is_no_fence);
    RUN(an_attach_that_brings_the_wrong_things_is_refused);
    RUN(random_replies_never_harm_the_rank);
    return t_finish();
}

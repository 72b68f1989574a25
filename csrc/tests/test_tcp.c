/* A real rank and a real worker with somebody in between, who passes bytes on one
 * by one, changes them, or cuts a connection: results are exact or lost. */
#define _GNU_SOURCE
#include "harness.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "poller.h"

#define NEVER UINT64_MAX

static struct t_worker worker;
static struct rfm_invoker *inv;
static struct rfm_channel *chan;

/* --- in between -------------------------------------------------------------- */

/* ways: to the worker on its control and its data connection, then from it */
enum way { CONTROL_TO, DATA_TO, CONTROL_FROM, DATA_FROM, WAYS };

struct between {
    pthread_t thread;
    int       rank[2];          /* our ends: control, data */
    int       worker[2];
    uint32_t  stop;
    uint64_t  at_once;          /* so many bytes in a piece */
    uint64_t  cut_at[WAYS];     /* then this connection ends, both ways */
    uint64_t  flip_at[WAYS];    /* this byte is changed */
    uint64_t  passed[WAYS];     /* atomic */
    uint32_t  held[WAYS];       /* atomic: nothing is passed on */
};

static struct between between;

static int from_of(const struct between *b, int way)
{
    return (way < 2) ? b->rank[way] : b->worker[way - 2];
}

static int to_of(const struct between *b, int way)
{
    return (way < 2) ? b->worker[way] : b->rank[way - 2];
}

static void cut(struct between *b, int connection)
{
    (void)shutdown(b->rank[connection], SHUT_RDWR);
    (void)shutdown(b->worker[connection], SHUT_RDWR);
}

/* false: this way is over */
static bool pass(struct between *b, int way)
{
    static uint8_t bytes[65536];
    uint64_t n = (b->at_once < sizeof(bytes)) ? b->at_once : sizeof(bytes);
    uint64_t at = b->passed[way];
    uint64_t sent = 0;
    ssize_t got;

    if (b->cut_at[way] - at < n) {
        n = b->cut_at[way] - at;
    }
    if (n == 0) {
        cut(b, way % 2);
        return false;
    }
    got = recv(from_of(b, way), bytes, n, MSG_DONTWAIT);
    if (got < 0) {
        return false;
    }
    if (got == 0) {
        (void)shutdown(to_of(b, way), SHUT_WR);
        return false;
    }
    if (b->flip_at[way] - at < (uint64_t)got) {
        bytes[b->flip_at[way] - at] ^= 0x10;
    }
    while (sent < (uint64_t)got) {
        ssize_t m = send(to_of(b, way), bytes + sent, (size_t)got - sent,
                         MSG_NOSIGNAL);

        if (m < 0) {
            return false;
        }
        sent += (uint64_t)m;
    }
    rfm_store_release(&b->passed[way], at + (uint64_t)got);
    if (at + (uint64_t)got == b->cut_at[way]) {
        cut(b, way % 2);
        return false;
    }
    return true;
}

static void *stand_between(void *arg)
{
    struct between *b = arg;
    bool open[WAYS] = { true, true, true, true };

    while (rfm_load_acquire(&b->stop) == 0) {
        struct pollfd p[WAYS];

        for (int way = 0; way < WAYS; way++) {
            bool now = open[way] && (rfm_load_acquire(&b->held[way]) == 0);

            p[way] = (struct pollfd){ .fd = now ? from_of(b, way) : -1,
                                      .events = POLLIN };
        }
        (void)poll(p, WAYS, 5);
        for (int way = 0; way < WAYS; way++) {
            if (open[way] && (p[way].revents != 0)) {
                open[way] = pass(b, way);
            }
        }
    }
    return NULL;
}

static void reset_between(void)
{
    memset(&between, 0, sizeof(between));
    between.at_once = NEVER;
    for (int way = 0; way < WAYS; way++) {
        between.cut_at[way]  = NEVER;
        between.flip_at[way] = NEVER;
    }
}

/* What it does is set before; false if attaching failed. */
static bool attach_through(uint32_t flags)
{
    struct rfm_attach_attr attr = {
        .transport  = RFM_TRANSPORT_TCP,
        .lease      = 1,
        .worker     = 1,
        .timeout_ns = T_FOREVER,
        .flags      = flags,
    };
    int theirs[2];

    for (int i = 0; i < 2; i++) {
        int ours[2];
        int other[2];

        t_tcp_pair(ours);
        t_tcp_pair(other);
        *((i == 0) ? &attr.fd : &attr.data_fd) = ours[0];
        between.rank[i]   = ours[1];
        between.worker[i] = other[0];
        theirs[i]         = other[1];
    }
    t_worker_adopt(&worker, theirs, 2);
    CHECK_EQ(pthread_create(&between.thread, NULL, stand_between, &between), 0);
    return rfm_invoker_attach_over(inv, &attr, &chan) == RFM_OK;
}

/* Both sides have noticed, and nothing is left of it. */
static void end_between(bool attached)
{
    struct rfm_channel_info info = { 0 };

    (void)t_worker_expect(&worker, RFM_AGENT_GONE);
    while (attached && (info.fenced == 0)) {
        rfm_channel_info(chan, &info);
        sched_yield();
    }
    rfm_store_release(&between.stop, 1);
    pthread_join(between.thread, NULL);
    for (int i = 0; i < 2; i++) {
        close(between.rank[i]);
        close(between.worker[i]);
    }
}

static void up(void)
{
    t_worker_start(&worker, false, 0);
    inv = t_invoker(4, T_SLOT_BYTES, 0);
    reset_between();
}

static void down(void)
{
    t_invoker_end(inv);
    t_worker_end(&worker);
}

/* --- calls --------------------------------------------------------------------- */

#define CALLS 3

static struct t_call calls[CALLS];

static void make_calls(void)
{
    for (uint32_t i = 0; i < CALLS; i++) {
        uint32_t places[3] = { i % 3, RFM_INLINE, (i + 1) % 3 };
        uint64_t sizes[3] = { 150, 8, 150 };

        t_call_make(&calls[i], inv, "echo", 2, 1, places, sizes);
    }
}

static void start_calls(uint64_t seed)
{
    for (uint32_t i = 0; i < CALLS; i++) {
        t_fill(t_in(&calls[i], 0), 150, seed + i);
        memset(t_in(&calls[i], 1), 1, 8);
        memset(t_out(&calls[i], 0), 0xcc, 150);
        t_start(&calls[i]);
    }
}

/* Exact, or lost: how many were lost. */
static uint32_t check_calls(uint64_t seed)
{
    uint32_t lost = 0;

    for (uint32_t i = 0; i < CALLS; i++) {
        enum rfm_outcome outcome = t_wait(&calls[i]);

        CHECK((outcome == RFM_DONE) || (outcome == RFM_LOST) ||
              (outcome == RFM_NO_WORKER));
        if (outcome == RFM_DONE) {
            CHECK(t_filled(t_out(&calls[i], 0), 150, seed + i));
        }
        lost += outcome != RFM_DONE;
    }
    return lost;
}

static void end_calls(void)
{
    for (uint32_t i = 0; i < CALLS; i++) {
        t_call_end(&calls[i]);
    }
}

static void connections_that_pass_one_byte_at_a_time_are_only_slow(void)
{
    for (uint32_t flags = 0; flags <= RFM_STREAM_CRC; flags++) {
        up();
        make_calls();
        between.at_once = 1;
        CHECK(attach_through(flags));
        for (uint64_t round = 0; round < 3; round++) {
            start_calls(round);
            CHECK_EQ(check_calls(round), 0);
        }
        end_calls();
        rfm_channel_close(chan);
        end_between(true);
        down();
    }
}

/* A connection that ends after so many bytes of one way, while the other lives. */
static uint32_t cut_everywhere(int way)
{
    uint64_t step = T_TSAN ? 37 : 7;
    uint32_t lost = 0;
    uint64_t at = 0;
    bool whole = false;

    up();
    make_calls();
    while (!whole) {
        uint32_t n = CALLS;
        bool attached;

        reset_between();
        between.cut_at[way] = at;
        attached = attach_through((uint32_t)(at / step) % 2);
        whole    = false;
        if (attached) {
            start_calls(at);
            for (uint32_t i = 0; i < CALLS; i++) {
                /* those that were queued stay so: nobody serves them */
                while (!rfm_request_ended(&calls[i].req)) {
                    struct rfm_request *req = &calls[i].req;
                    struct rfm_channel_info info;

                    (void)rfm_wait(inv, &req, 1, RFM_WAIT_ALL, 0, 1000000ull,
                                   true, NULL);
                    rfm_channel_info(chan, &info);
                    if (info.fenced) {
                        rfm_invoker_abandon(inv);
                    }
                }
            }
            n     = check_calls(at);
            whole = (n == 0) &&
                    (rfm_load_acquire(&between.passed[way]) < at);
            if (n > 0) {
                struct rfm_channel_info info;

                do {
                    rfm_channel_info(chan, &info);
                    sched_yield();
                } while (!info.fenced);
                CHECK(rfm_channel_why(chan) != NULL);
            }
            rfm_channel_close(chan);
        }
        lost += n;
        end_between(attached);
        at += step;
    }
    end_calls();
    down();
    return lost;
}

static void a_data_connection_cut_at_any_byte_loses_what_was_under_way(void)
{
    CHECK(cut_everywhere(DATA_TO) > 0);
    CHECK(cut_everywhere(DATA_FROM) > 0);
}

static void so_does_a_control_connection(void)
{
    CHECK(cut_everywhere(CONTROL_TO) > 0);
    CHECK(cut_everywhere(CONTROL_FROM) > 0);
}

static void a_byte_that_is_changed_on_its_way_is_never_delivered(void)
{
    for (int way = DATA_TO; way <= DATA_FROM; way += 2) {
        uint64_t passed = 1000;
        uint32_t lost = 0;

        up();
        make_calls();
        for (uint64_t at = 0; at < passed; at += T_TSAN ? 61 : 13) {
            uint32_t n;

            reset_between();
            between.flip_at[way] = at;
            CHECK(attach_through(RFM_STREAM_CRC));
            start_calls(at);
            /* a length that grew waits for bytes that never come */
            while (rfm_invoker_in_flight(inv) > 0) {
                struct rfm_request *req = &calls[CALLS - 1].req;

                if (rfm_wait(inv, &req, 1, RFM_WAIT_ALL, 0, 30000000ull, true,
                             NULL) == RFM_ERR_AGAIN) {
                    cut(&between, 1);
                }
            }
            rfm_invoker_abandon(inv);
            n = check_calls(at);
            CHECK(n > 0);
            lost += n;
            passed = rfm_load_acquire(&between.passed[way]);
            rfm_channel_close(chan);
            end_between(true);
        }
        CHECK(lost > 0);
        end_calls();
        down();
    }
}

static void what_was_changed_is_said_to_be(void)
{
    up();
    make_calls();
    for (int way = DATA_TO; way <= DATA_FROM; way += 2) {
        reset_between();
        /* in the payload or the data of the first message */
        between.flip_at[way] = 150;
        CHECK(attach_through(RFM_STREAM_CRC));
        start_calls(1);
        CHECK_EQ(t_wait(&calls[0]), RFM_LOST);
        rfm_invoker_abandon(inv);
        (void)check_calls(1);
        end_between(true);
        CHECK(strstr(rfm_channel_why(chan), "changed on its way") != NULL);
    }
    end_calls();
    down();
}

/* --- while a kernel runs --------------------------------------------------------- */

/* More than both sockets hold is with the worker while it runs another kernel. */
static void the_next_request_is_received_while_a_kernel_runs(void)
{
    uint64_t n = 32u << 20;
    uint32_t places[2] = { RFM_BOUND, RFM_INLINE };
    uint64_t sizes[2] = { n, 8 };
    struct t_call large;
    struct t_gate gate;

    up();
    CHECK(attach_through(0));
    t_call_make(&large, inv, "echo", 1, 1, places, sizes);
    memset(t_in(&large, 0), 5, n);
    t_gate_shut(&gate, &worker, inv);
    t_gate_runs(&gate);
    t_start(&large);
    while (rfm_load_acquire(&between.passed[DATA_TO]) < n) {
        sched_yield();
    }
    for (int left = 1; left > 0;) {
        CHECK(ioctl(between.worker[1], TIOCOUTQ, &left) == 0);
    }
    CHECK_EQ(worker.page->count, 0);
    t_gate_open(&gate);
    CHECK_EQ(t_wait(&large), RFM_DONE);
    CHECK_EQ(((uint8_t *)t_out(&large, 0))[7], 5);
    t_call_end(&large);
    rfm_channel_close(chan);
    end_between(true);
    down();
}

/* A worker whose replies go nowhere for a while serves others, and then goes on. */
static void a_line_that_is_blocked_for_a_while_holds_up_no_other(void)
{
    uint64_t n = 16u << 20;
    uint32_t places[2] = { RFM_INLINE, RFM_BOUND };
    uint64_t sizes[2] = { 8, n };
    struct rfm_invoker *second;
    struct t_call large[2];
    struct t_call small;

    up();
    CHECK(attach_through(RFM_STREAM_CRC));
    for (int i = 0; i < 2; i++) {
        t_call_make(&large[i], inv, "half", 1, 1, places, sizes);
        memset(t_in(&large[i], 0), 0, 8);
    }
    second = t_invoker(2, T_SLOT_BYTES, 0);
    {
        struct rfm_attach_attr attr = t_dial(&worker, RFM_TRANSPORT_TCP);

        (void)t_attach(second, &attr);
    }
    t_call_inline(&small, second, "echo", 8, 8);
    rfm_store_release(&between.held[DATA_FROM], 1);
    t_start(&large[0]);
    t_start(&large[1]);
    while (rfm_load_acquire(&worker.page->count) == 0) {
        sched_yield();          /* then it begins to send what nobody takes */
    }
    for (uint64_t i = 0; i < 50; i++) {
        t_fill(t_in(&small, 0), 8, i);
        CHECK_EQ(t_invoke(&small), RFM_DONE);
        CHECK(t_filled(t_out(&small, 0), 8, i));
    }
    rfm_store_release(&between.held[DATA_FROM], 0);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(t_wait(&large[i]), RFM_DONE);
        CHECK_EQ(large[i].sizes[0], n / 2);
        CHECK_EQ(((uint8_t *)t_out(&large[i], 0))[n / 2 - 1], 0x5a);
        t_call_end(&large[i]);
    }
    t_call_end(&small);
    t_invoker_end(second);
    (void)t_worker_expect(&worker, RFM_AGENT_GONE);
    rfm_channel_close(chan);
    end_between(true);
    down();
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(connections_that_pass_one_byte_at_a_time_are_only_slow);
    RUN(a_data_connection_cut_at_any_byte_loses_what_was_under_way);
    RUN(so_does_a_control_connection);
    RUN(a_byte_that_is_changed_on_its_way_is_never_delivered);
    RUN(what_was_changed_is_said_to_be);
    RUN(the_next_request_is_received_while_a_kernel_runs);
    RUN(a_line_that_is_blocked_for_a_while_holds_up_no_other);
    return t_finish();
}

/*
 * Either side is killed after any byte of a conversation that has everything in
 * it: attach, arenas, kernels, bindings, data, replies, a kept result, the
 * goodbye. What is left ends it in order and goes on with others.
 *
 * Run over every transport.
 */
#define _GNU_SOURCE
#include "harness.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "poller.h"

#define NEVER    UINT64_MAX
#define CALLS    4
#define MOST_FDS 4

static struct t_worker worker;
static struct rfm_invoker *inv;
static struct t_call calls[CALLS];

/* --- who stands between them, and kills ----------------------------------- */

/* ways: to the worker on its control and its data connection, then from it */
enum way { CONTROL_TO, DATA_TO, CONTROL_FROM, DATA_FROM, WAYS };

static struct {
    pthread_t thread;
    int       rank[2];          /* our ends: control, data; -1: none */
    int       worker[2];
    uint32_t  stop;             /* atomic */
    uint64_t  kill_at[WAYS];    /* after so many bytes */
    pid_t     victim;
    uint32_t  killed;           /* atomic */
    uint64_t  passed[WAYS];
} between;

static int from_of(int way)
{
    return (way < 2) ? between.rank[way] : between.worker[way - 2];
}

static int to_of(int way)
{
    return (way < 2) ? between.worker[way] : between.rank[way - 2];
}

static void kill_it(void)
{
    if (between.killed == 0) {
        t_kill(between.victim, SIGKILL);
        rfm_store_release(&between.killed, 1);
    }
}

/* With the descriptors that come along; false: this way is over. */
static bool pass(int way)
{
    static uint8_t bytes[65536];
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(MOST_FDS * sizeof(int))];
    } control;
    uint64_t left = between.kill_at[way] - between.passed[way];
    struct iovec iov = { bytes, (left < sizeof(bytes)) ? left : sizeof(bytes) };
    struct msghdr msg = {
        .msg_iov        = &iov,
        .msg_iovlen     = 1,
        .msg_control    = control.bytes,
        .msg_controllen = sizeof(control.bytes),
    };
    int fds[MOST_FDS];
    uint32_t n_fds = 0;
    ssize_t got;
    bool sent = true;

    if (left == 0) {
        kill_it();
        (void)shutdown(to_of(way), SHUT_WR);    /* what it sent then is lost */
        return false;
    }
    got = recvmsg(from_of(way), &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got <= 0) {
        (void)shutdown(to_of(way), SHUT_WR);
        return false;
    }
    if (CMSG_FIRSTHDR(&msg) != NULL) {
        n_fds = (uint32_t)((CMSG_FIRSTHDR(&msg)->cmsg_len - CMSG_LEN(0)) /
                           sizeof(int));
        memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&msg)), n_fds * sizeof(int));
    } else {
        msg.msg_control    = NULL;
        msg.msg_controllen = 0;
    }
    iov.iov_len = (size_t)got;
    while (sent && (iov.iov_len > 0)) {
        ssize_t m = sendmsg(to_of(way), &msg, MSG_NOSIGNAL);

        sent = m > 0;
        if (sent) {
            iov.iov_base       = (uint8_t *)iov.iov_base + m;
            iov.iov_len       -= (size_t)m;
            msg.msg_control    = NULL;
            msg.msg_controllen = 0;
        }
    }
    for (uint32_t i = 0; i < n_fds; i++) {
        close(fds[i]);
    }
    between.passed[way] += (uint64_t)got;
    if (between.passed[way] == between.kill_at[way]) {
        kill_it();
    }
    return sent;
}

static void *stand_between(void *arg)
{
    bool open[WAYS] = { true, true, true, true };

    (void)arg;
    while (rfm_load_acquire(&between.stop) == 0) {
        struct pollfd p[WAYS];

        for (int way = 0; way < WAYS; way++) {
            p[way] = (struct pollfd){ .fd = open[way] ? from_of(way) : -1,
                                      .events = POLLIN };
        }
        (void)poll(p, WAYS, 5);
        for (int way = 0; way < WAYS; way++) {
            if (open[way] && (p[way].revents != 0)) {
                open[way] = pass(way);
            }
        }
    }
    return NULL;
}

/* A connection of a rank through it; the victim is killed at this byte. */
static struct rfm_attach_attr dial_through(int way, uint64_t at)
{
    bool stream = t_transport() == RFM_TRANSPORT_TCP;
    struct rfm_attach_attr attr = {
        .transport  = t_transport(),
        .fd         = -1,
        .data_fd    = -1,
        .lease      = 1,
        .worker     = 1,
        .timeout_ns = T_FOREVER,
        .flags      = (at % 2 == 0) ? RFM_STREAM_CRC : 0,
    };
    int theirs[2];

    memset(&between, 0, sizeof(between));
    for (int i = 0; i < WAYS; i++) {
        between.kill_at[i] = NEVER;
    }
    between.kill_at[way] = at;
    between.rank[1]   = -1;
    between.worker[1] = -1;
    for (int i = 0; i < (stream ? 2 : 1); i++) {
        int ours[2];
        int other[2];

        (stream ? t_tcp_pair : t_socketpair)(ours);
        (stream ? t_tcp_pair : t_socketpair)(other);
        *((i == 0) ? &attr.fd : &attr.data_fd) = ours[0];
        between.rank[i]   = ours[1];
        between.worker[i] = other[0];
        theirs[i]         = other[1];
    }
    t_worker_adopt(&worker, theirs, stream ? 2 : 1);
    return attr;
}

static void begin_between(pid_t victim)
{
    between.victim = victim;
    CHECK_EQ(pthread_create(&between.thread, NULL, stand_between, NULL), 0);
}

static void end_between(void)
{
    rfm_store_release(&between.stop, 1);
    pthread_join(between.thread, NULL);
    for (int i = 0; i < 2; i++) {
        if (between.rank[i] >= 0) {
            close(between.rank[i]);
            close(between.worker[i]);
        }
    }
}

/* --- a conversation ------------------------------------------------------- */

static uint64_t ask[2] = { 3000, 5 };   /* an object: bytes, seed */
static struct rfm_block result;

static void make_calls(void)
{
    static const uint32_t places[3][3] = {
        { RFM_INLINE, RFM_INLINE, RFM_BOUND },
        { RFM_BOUND, RFM_INLINE, RFM_CALL },
        { RFM_CALL, RFM_INLINE, RFM_INLINE },
    };
    uint64_t sizes[3] = { 150, 8, 150 };

    for (uint32_t i = 0; i + 1 < CALLS; i++) {
        t_call_make(&calls[i], inv, "echo", 2, 1, places[i], sizes);
    }
    t_call_object(&calls[CALLS - 1], inv, "pattern", ask, sizeof(ask));
    CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), ask[0], &result));
}

static void end_calls(void)
{
    rfm_heap_free(&result);
    for (uint32_t i = 0; i < CALLS; i++) {
        t_call_end(&calls[i]);
    }
}

static bool is_fenced(struct rfm_channel *chan)
{
    struct rfm_channel_info info;

    rfm_channel_info(chan, &info);
    return info.fenced != 0;
}

/* Its end; what is queued behind a worker that is gone has none by itself. */
static enum rfm_outcome end_of(struct t_call *call, struct rfm_channel *chan)
{
    struct rfm_request *req = &call->req;

    while (!rfm_request_ended(req)) {
        (void)rfm_wait(inv, &req, 1, RFM_WAIT_ALL, 0, 1000000ull, true, NULL);
        if (is_fenced(chan)) {
            rfm_invoker_abandon(inv);
        }
    }
    return (enum rfm_outcome)req->outcome;
}

/* Exact, or lost: how many were lost. */
static uint32_t converse(struct rfm_channel *chan, uint64_t seed)
{
    struct rfm_desc into = { result.arena_id, 0, result.offset, ask[0] };
    struct t_call *object = &calls[CALLS - 1];
    enum rfm_outcome outcome;
    uint32_t lost = 0;

    for (uint32_t i = 0; i + 1 < CALLS; i++) {
        t_fill(t_in(&calls[i], 0), 150, seed + i);
        memset(t_in(&calls[i], 1), 1, 8);
        memset(t_out(&calls[i], 0), 0xcc, 150);
        t_start(&calls[i]);
    }
    t_start(object);
    for (uint32_t i = 0; i + 1 < CALLS; i++) {
        outcome = end_of(&calls[i], chan);
        CHECK((outcome == RFM_DONE) || (outcome == RFM_LOST) ||
              (outcome == RFM_NO_WORKER));
        if (outcome == RFM_DONE) {
            CHECK(t_filled(t_out(&calls[i], 0), 150, seed + i));
        }
        lost += outcome != RFM_DONE;
    }
    outcome = end_of(object, chan);
    CHECK((outcome == RFM_LARGE) || (outcome == RFM_LOST) ||
          (outcome == RFM_NO_WORKER));
    if (outcome != RFM_LARGE) {
        return lost + 1;
    }
    memset(result.address, 0xcc, ask[0]);
    if (rfm_request_fetch(&object->req, &into) != RFM_OK) {
        rfm_request_discard(&object->req);
        return lost + 1;
    }
    outcome = end_of(object, chan);
    CHECK((outcome == RFM_DONE) || (outcome == RFM_LOST) ||
          (outcome == RFM_NO_WORKER));
    if (outcome != RFM_DONE) {
        rfm_request_discard(&object->req);
        return lost + 1;
    }
    CHECK(t_filled(result.address, ask[0], ask[1]));
    return lost;
}

static void let_go(struct rfm_channel *chan)
{
    rfm_channel_close(chan);
    while (!is_fenced(chan)) {
        sched_yield();
    }
}

/* --- the worker is killed ------------------------------------------------- */

static uint64_t step_of(void)
{
    return T_TSAN ? 101 : 13;
}

/* How many times something was lost. */
static uint32_t kill_workers(int way)
{
    bool whole = false;
    uint32_t lost = 0;

    inv = t_invoker(4, T_SLOT_BYTES, 0);
    make_calls();
    for (uint64_t at = 0; !whole; at += step_of()) {
        struct rfm_attach_attr attr;
        struct rfm_channel *chan;
        uint32_t n = CALLS;

        t_worker_start(&worker, false, 0);
        attr = dial_through(way, at);
        begin_between(worker.pid);
        if (rfm_invoker_attach_over(inv, &attr, &chan) == RFM_OK) {
            n = converse(chan, at);
            let_go(chan);
        }
        /* after the goodbye it has no more to say, but may still be killed:
         * by now, or never */
        end_between();
        whole = rfm_load_acquire(&between.killed) == 0;
        if (whole) {
            (void)t_worker_expect(&worker, RFM_AGENT_GONE);
            CHECK_EQ(n, 0);
            t_worker_end(&worker);
        } else {
            CHECK_EQ(t_worker_bury(&worker), SIGKILL);
            lost += n != 0;
        }
    }
    end_calls();
    t_invoker_end(inv);
    return lost;
}

static void a_worker_killed_after_any_byte_it_gets_loses_only_what_it_had(void)
{
    CHECK(kill_workers(CONTROL_TO) > 0);
    if (t_transport() == RFM_TRANSPORT_TCP) {
        CHECK(kill_workers(DATA_TO) > 0);
    }
}

static void so_does_one_killed_after_any_byte_that_it_sends(void)
{
    CHECK(kill_workers(CONTROL_FROM) > 0);
    if (t_transport() == RFM_TRANSPORT_TCP) {
        CHECK(kill_workers(DATA_FROM) > 0);
    }
}

/* --- the rank is killed --------------------------------------------------- */

/* A rank in a process of its own; `fds` are its connections. */
static int rank_process(const uint64_t *args, const int *fds)
{
    struct rfm_attach_attr attr = t_dialled(fds);
    struct rfm_channel *chan;

    attr.flags = (uint32_t)args[0];
    inv = t_invoker(4, T_SLOT_BYTES, 0);
    make_calls();
    chan = t_attach(inv, &attr);
    CHECK_EQ(converse(chan, args[1]), 0);
    let_go(chan);
    end_calls();
    t_invoker_end(inv);
    return 0;
}

static void is_still_served(void)
{
    struct rfm_invoker *other = t_invoker(2, T_SLOT_BYTES, 0);
    struct t_call call;

    (void)t_worker_attach(&worker, other);
    t_call_inline(&call, other, "echo", 8, 8);
    t_fill(t_in(&call, 0), 8, 77);
    CHECK_EQ(t_invoke(&call), RFM_DONE);
    CHECK(t_filled(t_out(&call, 0), 8, 77));
    t_call_end(&call);
    t_invoker_end(other);
    (void)t_worker_expect(&worker, RFM_AGENT_GONE);
}

static uint32_t kill_ranks(int way)
{
    bool whole = false;
    uint32_t killed = 0;

    t_worker_start(&worker, false, 0);
    for (uint64_t at = 0; !whole; at += step_of()) {
        struct rfm_attach_attr attr = dial_through(way, at);
        uint64_t args[4] = { attr.flags, at };
        int fds[2];
        uint32_t n = t_dial_fds(&attr, fds);
        pid_t rank = t_spawn(rank_process, args, fds, n);
        int status;

        t_hang_up(&attr);
        begin_between(rank);
        status = t_reap(rank);
        CHECK((status == 0) || (status == SIGKILL));
        /* and nothing is left of it */
        (void)t_worker_expect(&worker, RFM_AGENT_GONE);
        whole   = rfm_load_acquire(&between.killed) == 0;
        killed += status == SIGKILL;
        end_between();
        is_still_served();
    }
    t_worker_end(&worker);
    return killed;
}

static void a_rank_killed_after_any_byte_that_it_sends_leaves_nothing(void)
{
    CHECK(kill_ranks(CONTROL_TO) > 0);
    if (t_transport() == RFM_TRANSPORT_TCP) {
        CHECK(kill_ranks(DATA_TO) > 0);
    }
}

static void nor_does_one_killed_after_any_byte_that_it_gets(void)
{
    CHECK(kill_ranks(CONTROL_FROM) > 0);
    if (t_transport() == RFM_TRANSPORT_TCP) {
        CHECK(kill_ranks(DATA_FROM) > 0);
    }
}

/* --- the worker is stopped ------------------------------------------------ */

/* In the midst of writing results; its memory is used again, and it goes on. */
static void a_worker_stopped_while_it_writes_changes_not_one_byte_later(void)
{
    const uint64_t n = 8u << 20;
    uint32_t rounds = t_scaled(12, 3);
    uint32_t places[2] = { RFM_INLINE, RFM_BOUND };
    uint64_t sizes[2] = { 8, n };
    struct t_random r = { 3 };
    uint32_t expired = 0;
    uint32_t torn = 0;

    for (uint32_t round = 0; (round < rounds) || (expired == 0); round++) {
        struct rfm_attach_attr attr;
        struct t_call call;

        inv = t_invoker(2, T_SLOT_BYTES, 0);
        t_worker_start(&worker, false, 0);
        attr = t_dial(&worker, t_transport());
        (void)t_attach(inv, &attr);
        t_call_make(&call, inv, "half", 1, 1, places, sizes);
        memset(t_in(&call, 0), 0, 8);
        memset(t_out(&call, 0), 0xcc, n);
        CHECK_OK(rfm_request_start(&call.req, 40 * t_ms()));
        t_behold(&call);
        /* until the first byte of it is there; TSan would call that a race */
        while (!T_TSAN && !rfm_request_ended(&call.req) &&
               (rfm_load_relaxed((uint8_t *)t_out(&call, 0)) == 0xcc)) {
            sched_yield();
        }
        for (volatile uint64_t k = t_below(&r, T_TSAN ? 4000000 : 200000);
             k > 0; k--) {
        }
        t_kill(worker.pid, SIGSTOP);
        if (t_wait(&call) == RFM_DONE) {
            t_kill(worker.pid, SIGCONT);
            t_call_end(&call);
            t_invoker_end(inv);
            (void)t_worker_expect(&worker, RFM_AGENT_GONE);
            t_worker_end(&worker);
            continue;
        }
        CHECK_EQ(call.req.outcome, RFM_LOST);
        CHECK_EQ(call.req.expired, 1);
        expired++;
        torn += (((uint8_t *)t_out(&call, 0))[0] == 0x5a) &&
                (((uint8_t *)t_out(&call, 0))[n / 2 - 1] == 0xcc);
        memset(t_out(&call, 0), 0x11, n);
        (void)kill(worker.pid, SIGCONT);
        if (t_remote()) {
            (void)t_worker_expect(&worker, RFM_AGENT_GONE);
            t_worker_end(&worker);
        } else {
            CHECK_EQ(t_worker_bury(&worker), SIGKILL);
        }
        for (uint64_t i = 0; i < n; i++) {
            CHECK(((uint8_t *)t_out(&call, 0))[i] == 0x11);
        }
        t_call_end(&call);
        t_invoker_end(inv);
    }
    printf("  %u calls expired, %u of them with half of their result\n",
           expired, torn);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 120);
    /* on shared memory what was sent is there: nobody can stand in between */
    if (t_remote()) {
        RUN(a_worker_killed_after_any_byte_it_gets_loses_only_what_it_had);
        RUN(so_does_one_killed_after_any_byte_that_it_sends);
        RUN(a_rank_killed_after_any_byte_that_it_sends_leaves_nothing);
        RUN(nor_does_one_killed_after_any_byte_that_it_gets);
    }
    /* the device that is none is memory with a lock in it: who is stopped may
     * hold it, which no device's user can */
    if ((t_transport() != RFM_TRANSPORT_VERBS) ||
        (getenv("RFM_NULL_DEVICE") == NULL)) {
        RUN(a_worker_stopped_while_it_writes_changes_not_one_byte_later);
    }
    return t_finish();
}

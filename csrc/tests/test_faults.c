/* Workers that die, stop and hang: every invocation ends exactly once, and
 * after LOST not one byte of its memory changes. Run over every transport. */
#define _GNU_SOURCE
#include "harness.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include "poller.h"

#define MS t_ms()

static struct t_worker worker;
static struct rfm_invoker *inv;
static struct rfm_channel *chan;

static void hire(void)
{
    t_worker_start(&worker, false, 20);
    chan = t_worker_attach(&worker, inv);
}

static void up(uint32_t slots)
{
    inv = t_invoker(slots, T_SLOT_BYTES, 20);
    hire();
}

static void down(void)
{
    t_invoker_end(inv);
    t_worker_end(&worker);
}

/* for one that its rank got rid of */
static void down_after_its_death(void)
{
    t_invoker_end(inv);
    t_worker_was_killed(&worker);
}

static void call_stuck(struct t_call *call)
{
    t_call_inline(call, inv, "stuck", 8, 8);
    memset(t_in(call, 0), 0, 8);
    memset(t_out(call, 0), 0xcc, 8);
}

static void until_it_runs(const struct t_call *call)
{
    t_worker_runs(&worker, &call->req);
}

/* --- sudden death --------------------------------------------------------- */

#define HANDS 12

static void make_hands(struct t_call *calls, struct t_random *r)
{
    for (uint32_t i = 0; i < HANDS; i++) {
        uint32_t places[3] = { (uint32_t)t_below(r, 3), RFM_INLINE,
                               (uint32_t)t_below(r, 3) };
        uint64_t sizes[3] = { 8 + t_below(r, 300), 8, 8 + t_below(r, 300) };

        sizes[2] = sizes[0];
        t_call_make(&calls[i], inv, (t_below(r, 2) == 0) ? "echo" : "nap", 2, 1,
                    places, sizes);
        memset(t_in(&calls[i], 1), 0, 8);
    }
}

static void fill_hand(struct t_call *call, uint64_t seed, struct t_random *r)
{
    uint64_t us = t_below(r, 200);

    t_fill(t_in(call, 0), call->args[0].size, seed);
    memcpy(t_in(call, 0), &us, 8);      /* for nap; echo doesn't mind */
    memset(t_out(call, 0), 0xcc, call->args[2].size);
}

static void check_hand(struct t_call *call, bool lost)
{
    uint64_t n = call->args[2].size;
    const uint8_t *out = t_out(call, 0);

    if (!lost) {
        CHECK_EQ(call->sizes[0], n);
        CHECK(memcmp(out, t_in(call, 0), n) == 0);
        return;
    }
    /* what a kernel had begun to write into an arena may be there; what comes
     * by way of the slot must not */
    for (uint64_t b = 0; b < n; b++) {
        CHECK((out[b] == 0xcc) || ((call->blocks[2].arena != NULL) &&
                                   (out[b] == ((uint8_t *)t_in(call, 0))[b])));
    }
}

static void every_invocation_ends_once_when_its_worker_is_killed(void)
{
    struct t_random r = { 77 };
    uint32_t rounds = t_scaled(200, 25);
    uint32_t lost = 0;
    uint32_t done = 0;

    inv = t_invoker(8, T_SLOT_BYTES, 20);
    for (uint32_t round = 0; round < rounds; round++) {
        uint32_t n = 1 + (uint32_t)t_below(&r, HANDS);
        uint8_t snapshot[HANDS][512];
        uint32_t told[HANDS] = { 0 };
        struct t_call calls[HANDS];
        struct rfm_request *at;
        uint32_t ended = 0;

        hire();
        make_hands(calls, &r);
        for (uint32_t i = 0; i < n; i++) {
            fill_hand(&calls[i], round + i, &r);
            calls[i].req.owner = (void *)(uintptr_t)i;
            (void)rfm_request_watch(&calls[i].req);
            t_start(&calls[i]);
        }
        /* any moment: before, between and after kernels, and within them */
        for (uint64_t k = t_below(&r, n);
             (rfm_load_acquire(&worker.page->count) < k) &&
             (rfm_invoker_in_flight(inv) + rfm_invoker_queued(inv) > 0);) {
            /* some may have gone to the one before, whose end is just seen */
            (void)rfm_invoker_progress(inv);
            sched_yield();
        }
        for (volatile uint64_t k = t_below(&r, 60000); k > 0; k--) {
        }
        t_kill(worker.pid, SIGKILL);
        while (ended < n) {
            while ((at = rfm_invoker_take_ended(inv)) == NULL) {
                /* those that were still queued stay so: nobody serves them */
                if (rfm_invoker_in_flight(inv) == 0) {
                    rfm_invoker_abandon(inv);
                }
                (void)rfm_wait(inv, NULL, 0, RFM_WAIT_WATCHED, 0, 10 * MS, false,
                               NULL);
            }
            while (at != NULL) {
                struct rfm_request *next = rfm_request_unlist(at);

                if (!rfm_request_ended(at)) {
                    (void)rfm_request_watch(at);    /* its end is being written */
                } else {
                    CHECK_EQ(told[(uintptr_t)at->owner], 0);
                    told[(uintptr_t)at->owner] = 1;
                    ended++;
                }
                at = next;
            }
        }
        for (uint32_t i = 0; i < n; i++) {
            enum rfm_outcome outcome = (enum rfm_outcome)calls[i].req.outcome;

            CHECK((outcome == RFM_DONE) || (outcome == RFM_LOST) ||
                  (outcome == RFM_NO_WORKER));
            check_hand(&calls[i], outcome != RFM_DONE);
            lost += outcome == RFM_LOST;
            done += outcome == RFM_DONE;
            memcpy(snapshot[i], t_out(&calls[i], 0), calls[i].args[2].size);
        }
        (void)t_worker_bury(&worker);
        CHECK_EQ(rfm_invoker_in_flight(inv), 0);
        CHECK_EQ(rfm_invoker_queued(inv), 0);
        CHECK(rfm_invoker_take_ended(inv) == NULL);
        for (uint32_t i = 0; i < HANDS; i++) {
            if (i < n) {
                CHECK(memcmp(snapshot[i], t_out(&calls[i], 0),
                             calls[i].args[2].size) == 0);
            }
            t_call_end(&calls[i]);
        }
    }
    CHECK(lost > 0);
    CHECK(done > 0);
    t_invoker_end(inv);
}

static void what_was_lost_is_started_again_elsewhere_under_its_id(void)
{
    struct rfm_channel_info info;
    struct t_worker second;
    struct t_call call;
    uint64_t id;

    up(2);
    call_stuck(&call);
    t_start(&call);
    until_it_runs(&call);
    id = call.req.id;
    CHECK_EQ(rfm_request_restart(&call.req), RFM_ERR_BUSY);
    CHECK_OK(rfm_channel_kill(chan));
    CHECK_EQ(t_wait(&call), RFM_LOST);
    CHECK_EQ(call.req.attempts, 1);
    do {
        rfm_channel_info(chan, &info);
        sched_yield();
    } while (!info.fenced);
    CHECK_EQ(rfm_channel_kill(chan), RFM_ERR_PEER);
    /* queued until there is a worker again */
    CHECK_OK(rfm_request_restart(&call.req));
    CHECK_EQ(rfm_load_acquire(&call.req.state), RFM_QUEUED);
    t_worker_start(&second, false, 20);
    (void)t_worker_attach(&second, inv);
    t_behold(&call);
    while (rfm_load_acquire(&second.page->id) != id) {
        sched_yield();
    }
    CHECK_EQ(call.req.id, id);
    CHECK_EQ(call.req.attempts, 2);
    t_kill(second.pid, SIGKILL);
    CHECK_EQ(t_wait(&call), RFM_LOST);
    t_call_end(&call);
    CHECK_EQ(t_worker_bury(&second), SIGKILL);
    down_after_its_death();
}

static void a_kept_result_is_lost_with_its_worker(void)
{
    uint64_t ask[2] = { 5000, 3 };
    struct rfm_block block;
    struct rfm_desc into;
    struct t_call call;

    up(2);
    t_call_object(&call, inv, "pattern", ask, sizeof(ask));
    CHECK_EQ(t_invoke(&call), RFM_LARGE);
    CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), 5000, &block));
    into = (struct rfm_desc){ block.arena_id, 0, block.offset, 5000 };
    CHECK_OK(rfm_channel_kill(chan));
    CHECK_OK(rfm_request_fetch(&call.req, &into));
    CHECK_EQ(t_wait(&call), RFM_LOST);
    /* it can't be fetched again, only run again */
    CHECK_EQ(rfm_request_fetch(&call.req, &into), RFM_ERR_BUSY);
    rfm_request_discard(&call.req);
    t_worker_was_killed(&worker);
    hire();
    CHECK_OK(rfm_request_restart(&call.req));
    CHECK_EQ(t_wait(&call), RFM_LARGE);
    CHECK_OK(rfm_request_fetch(&call.req, &into));
    CHECK_EQ(t_wait(&call), RFM_DONE);
    CHECK(t_filled(block.address, 5000, 3));
    rfm_heap_free(&block);
    t_call_end(&call);
    down();
}

/* --- time limits ---------------------------------------------------------- */

/* Who shares our memory has to die for that; another one is cut off, and may
 * write what it likes into its mirror. */
static void a_worker_that_stopped_past_the_deadline_writes_no_more(void)
{
    struct t_gate gate;
    struct t_call *call = &gate.call;

    up(2);
    t_gate_make(&gate, &worker, inv);
    memset(t_out(call, 0), 0xcc, 64);
    CHECK_OK(rfm_request_start(&call->req, 20 * MS));
    t_gate_runs(&gate);
    CHECK(rfm_load_acquire(&worker.page->limit_ns) > 0);
    (void)t_worker_expect(&worker, RFM_AGENT_LIMITS);
    t_kill(worker.pid, SIGSTOP);
    CHECK_EQ(t_wait(call), RFM_LOST);
    CHECK_EQ(call->req.expired, 1);
    /* its memory is used again, and then it would go on, if it could */
    memset(t_in(call, 0), 0xff, 64);
    memset(t_out(call, 0), 0x11, 64);
    t_gate_unlock(&gate);
    (void)kill(worker.pid, SIGCONT);
    if (t_remote()) {
        CHECK_EQ(t_worker_expect(&worker, RFM_AGENT_GONE), 1);
        CHECK_EQ(worker.page->count, 1);
        t_worker_end(&worker);
    } else {
        CHECK_EQ(t_worker_bury(&worker), SIGKILL);
    }
    for (int i = 0; i < 64; i++) {
        CHECK_EQ(((uint8_t *)t_out(call, 0))[i], 0x11);
    }
    t_call_end(call);
    t_invoker_end(inv);
}

static void what_waits_too_long_in_the_queue_times_out_and_never_runs(void)
{
    struct t_call stuck;
    struct t_call calls[3];

    up(2);
    call_stuck(&stuck);
    t_start(&stuck);
    until_it_runs(&stuck);
    for (int i = 0; i < 3; i++) {
        t_call_inline(&calls[i], inv, "stamp", 8, 8);
        memset(t_in(&calls[i], 0), 0, 8);
        memset(t_out(&calls[i], 0), 0xcc, 8);
    }
    /* the first one waits in a slot behind the stuck one, the others queue */
    CHECK_OK(rfm_request_start(&calls[0].req, 5 * MS));
    CHECK_EQ(rfm_load_acquire(&calls[0].req.state), RFM_POSTED);
    CHECK_OK(rfm_request_start(&calls[1].req, 1));
    CHECK_OK(rfm_request_start(&calls[2].req, 3 * MS));
    /* over a network, what was sent can't be taken back: who waits behind it
     * has to be cut off */
    for (int i = 0; i < 3; i++) {
        bool sent = t_remote() && (i == 0);

        CHECK_EQ(t_wait(&calls[i]), sent ? RFM_LOST : RFM_TIMED_OUT);
        CHECK_EQ(calls[i].req.expired, sent);
        CHECK_EQ(((uint8_t *)t_out(&calls[i], 0))[0], 0xcc);
    }
    CHECK_EQ(rfm_invoker_queued(inv), 0);
    if (!t_remote()) {
        CHECK_EQ(rfm_load_acquire(&stuck.req.state), RFM_POSTED);
        CHECK_EQ(rfm_request_cancel(&stuck.req), RFM_ERR_BUSY);
        CHECK_OK(rfm_channel_kill(chan));
    }
    CHECK_EQ(t_wait(&stuck), RFM_LOST);
    CHECK_EQ(stuck.req.expired, 0);
    t_call_end(&stuck);
    for (int i = 0; i < 3; i++) {
        t_call_end(&calls[i]);
    }
    down_after_its_death();
}

static void what_was_sent_and_not_begun_is_cancelled_where_that_can_be(void)
{
    struct t_call calls[2];
    struct t_gate gate;
    uint64_t asks[2][2] = { { 8, 1 }, { 8, 2 } };

    up(2);
    t_gate_shut(&gate, &worker, inv);
    t_gate_runs(&gate);
    for (int i = 0; i < 2; i++) {
        t_call_object(&calls[i], inv, "pattern", asks[i], 16);
        t_start(&calls[i]);
    }
    CHECK_EQ(rfm_load_acquire(&calls[0].req.state), RFM_POSTED);
    CHECK_EQ(rfm_load_acquire(&calls[1].req.state), RFM_QUEUED);
    CHECK_EQ(rfm_request_cancel(&gate.call.req), RFM_ERR_BUSY);
    CHECK_EQ(rfm_request_cancel(&calls[0].req),
             t_remote() ? RFM_ERR_BUSY : RFM_OK);
    CHECK_OK(rfm_request_cancel(&calls[1].req));
    t_gate_open(&gate);
    CHECK_EQ(t_wait(&calls[0]), t_remote() ? RFM_DONE : RFM_CANCELLED);
    CHECK_EQ(t_wait(&calls[1]), RFM_CANCELLED);
    for (int i = 0; i < 2; i++) {
        t_call_end(&calls[i]);
    }
    down();
}

static void the_longest_time_limit_is_no_limit(void)
{
    static const uint64_t limits[] = { UINT64_MAX, UINT64_MAX / 2, 1ull << 62 };
    struct t_call call;

    up(2);
    t_call_inline(&call, inv, "echo", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    for (int i = 0; i < 3; i++) {
        CHECK_OK(rfm_request_start(&call.req, limits[i]));
        CHECK_EQ(t_wait(&call), RFM_DONE);
    }
    t_call_end(&call);
    down();
}

static void a_time_limit_holds_for_all_attempts_together(void)
{
    struct t_call call;

    up(2);
    call_stuck(&call);
    /* so long that a busy machine has hired another one by then */
    CHECK_OK(rfm_request_start(&call.req, 2000 * MS));
    until_it_runs(&call);
    t_kill(worker.pid, SIGKILL);
    CHECK_EQ(t_wait(&call), RFM_LOST);
    CHECK_EQ(call.req.expired, 0);
    CHECK_EQ(t_worker_bury(&worker), SIGKILL);
    hire();
    /* the second one is stuck, too: without a limit it would be for ever */
    CHECK_OK(rfm_request_restart(&call.req));
    CHECK_EQ(t_wait(&call), RFM_LOST);
    CHECK_EQ(call.req.expired, 1);
    t_worker_was_killed(&worker);
    /* and now it is over */
    CHECK_OK(rfm_request_restart(&call.req));
    CHECK_EQ(t_wait(&call), RFM_TIMED_OUT);
    t_call_end(&call);
    t_invoker_end(inv);
}

/* --- giving up ------------------------------------------------------------ */

static void what_nobody_will_serve_is_given_back_and_can_start_again(void)
{
    struct t_call calls[4];
    struct t_call stuck;

    up(2);
    call_stuck(&stuck);
    t_start(&stuck);
    until_it_runs(&stuck);
    for (int i = 0; i < 4; i++) {
        t_call_inline(&calls[i], inv, "echo", 8, 8);
        t_fill(t_in(&calls[i], 0), 8, (uint64_t)i);
        t_start(&calls[i]);
    }
    CHECK_OK(rfm_channel_kill(chan));
    CHECK_EQ(t_wait(&stuck), RFM_LOST);
    rfm_invoker_abandon(inv);
    for (int i = 0; i < 4; i++) {
        /* the first was sent ahead, the others were not */
        CHECK_EQ(t_wait(&calls[i]), (i == 0) ? RFM_LOST : RFM_NO_WORKER);
        CHECK_OK(rfm_request_restart(&calls[i].req));   /* still nobody */
        CHECK_EQ(t_wait(&calls[i]), RFM_NO_WORKER);
    }
    t_worker_was_killed(&worker);
    hire();
    for (int i = 0; i < 4; i++) {
        CHECK_OK(rfm_request_restart(&calls[i].req));
        CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
        CHECK(t_filled(t_out(&calls[i], 0), 8, (uint64_t)i));
        t_call_end(&calls[i]);
    }
    t_call_end(&stuck);
    down();
}

static void a_drained_channel_finishes_what_it_has_and_takes_nothing_more(void)
{
    struct rfm_channel_info info;
    struct t_worker second;
    struct t_gate gate;
    struct t_call call;

    up(2);
    t_gate_shut(&gate, &worker, inv);
    t_gate_runs(&gate);
    rfm_channel_drain(chan);
    rfm_channel_info(chan, &info);
    CHECK_EQ(info.alive, 0);
    CHECK_EQ(info.fenced, 0);
    CHECK_EQ(info.in_flight, 1);
    t_call_inline(&call, inv, "echo", 8, 8);
    memset(t_in(&call, 0), 7, 8);
    t_start(&call);
    CHECK_EQ(rfm_load_acquire(&call.req.state), RFM_QUEUED);
    t_gate_open(&gate);
    CHECK_EQ(rfm_load_acquire(&call.req.state), RFM_QUEUED);
    t_worker_start(&second, false, 20);
    (void)t_worker_attach(&second, inv);
    CHECK_EQ(t_wait(&call), RFM_DONE);
    CHECK_EQ(second.page->count, 1);
    t_call_end(&call);
    t_invoker_end(inv);
    t_worker_end(&worker);
    t_worker_end(&second);
}

static void closing_ends_what_is_in_flight_even_if_the_worker_hangs(void)
{
    struct t_call calls[3];

    up(2);
    for (int i = 0; i < 3; i++) {
        call_stuck(&calls[i]);
        t_start(&calls[i]);
    }
    until_it_runs(&calls[0]);
    rfm_invoker_close(inv, 1);
    CHECK_EQ(calls[0].req.outcome, RFM_LOST);
    for (int i = 0; i < 3; i++) {
        CHECK(rfm_request_ended(&calls[i].req));
        CHECK((calls[i].req.outcome == RFM_LOST) ||
              (calls[i].req.outcome == RFM_NO_WORKER));
        CHECK_EQ(rfm_request_start(&calls[i].req, 0), RFM_ERR_CLOSED);
        CHECK_EQ(rfm_request_restart(&calls[i].req), RFM_ERR_CLOSED);
        t_call_end(&calls[i]);
    }
    rfm_invoker_close(inv, 1);      /* twice does no harm */
    rfm_invoker_destroy(inv);
    t_worker_was_killed(&worker);
}

/* The rank's end of a connection over our transport, and the other one's. */
static struct rfm_attach_attr connection(struct rfm_attach_attr *other)
{
    struct rfm_attach_attr attr = {
        .transport  = t_transport(),
        .data_fd    = -1,
        .timeout_ns = T_FOREVER,
    };
    int pair[2];

    t_socketpair(pair);
    *other    = attr;
    attr.fd   = pair[0];
    other->fd = pair[1];
    if (attr.transport == RFM_TRANSPORT_TCP) {
        t_tcp_pair(pair);
        attr.data_fd   = pair[0];
        other->data_fd = pair[1];
    }
    return attr;
}

static void attaching_to_the_dead_or_deaf_is_an_error_and_leaves_nothing(void)
{
    struct rfm_attach_attr attr;
    struct rfm_attach_attr other;
    struct rfm_channel *none;
    uint32_t fds;

    inv  = t_invoker(2, 256, 0);
    attr = connection(&other);
    t_hang_up(&other);
    CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &none), RFM_ERR_PEER);
    fds = t_open_fds();         /* once its side was made, if it has one */
    attr = connection(&other);
    t_hang_up(&other);
    CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &none), RFM_ERR_PEER);
    attr = connection(&other);
    attr.timeout_ns = 3 * MS;
    CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &none), RFM_ERR_TIMEOUT);
    t_hang_up(&other);
    attr = connection(&other);
    attr.transport = RFM_TRANSPORTS;
    CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &none), RFM_ERR_INVALID);
    t_hang_up(&other);
    CHECK_EQ(t_open_fds(), fds);
    rfm_invoker_close(inv, 1);
    attr = connection(&other);
    CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &none), RFM_ERR_CLOSED);
    t_hang_up(&other);
    rfm_invoker_destroy(inv);
}

struct starter {
    pthread_t thread;
    uint32_t started;
};

static void *start_until_closed(void *arg)
{
    struct starter *s = arg;
    struct t_call calls[6];
    int rc = RFM_OK;

    for (int i = 0; i < 6; i++) {
        t_call_inline(&calls[i], inv, "echo", 8, 8);
        memset(t_in(&calls[i], 0), i, 8);
    }
    while (rc == RFM_OK) {
        uint32_t n = 0;

        for (; (n < 6) && (rc == RFM_OK); n += rc == RFM_OK) {
            rc = rfm_request_start(&calls[n].req, 0);
        }
        for (uint32_t i = 0; i < n; i++) {
            enum rfm_outcome outcome = t_wait(&calls[i]);

            CHECK((outcome == RFM_DONE) || (outcome == RFM_LOST) ||
                  (outcome == RFM_NO_WORKER));
        }
        rfm_store_release(&s->started, 1);
    }
    CHECK_EQ(rc, RFM_ERR_CLOSED);
    for (int i = 0; i < 6; i++) {
        t_call_end(&calls[i]);
    }
    return NULL;
}

static void closing_while_threads_start_and_wait_strands_nobody(void)
{
    for (uint32_t round = 0; round < t_scaled(60, 8); round++) {
        struct starter starters[4];

        up(2);
        for (int i = 0; i < 4; i++) {
            starters[i].started = 0;
            CHECK_EQ(pthread_create(&starters[i].thread, NULL,
                                    start_until_closed, &starters[i]), 0);
        }
        for (int i = 0; i < 4; i++) {
            (void)t_await_not(&starters[i].started, 0);
        }
        rfm_invoker_close(inv, T_FOREVER);
        for (int i = 0; i < 4; i++) {
            pthread_join(starters[i].thread, NULL);
        }
        rfm_invoker_destroy(inv);
        t_worker_end(&worker);
    }
}

/* Takes the five seconds after which a reader is held to be stuck. */
static void a_worker_that_stops_reading_can_not_block_its_rank_for_ever(void)
{
    /* more than any socket takes without a reader */
    uint64_t n = 32u << 20;
    uint8_t digest[RFM_DIGEST_BYTES] = { 1 };
    uint8_t *blob = calloc(1, n);
    struct rfm_kernel *kernel;
    struct rfm_binding *large;
    struct rfm_binding *small;
    struct t_call call;

    up(2);
    CHECK(blob != NULL);
    CHECK_OK(rfm_invoker_kernel(inv, 2, digest, blob, n, &kernel));
    t_call_inline(&call, inv, "echo", 8, 8);
    memset(t_in(&call, 0), 0, 8);
    CHECK_EQ(t_invoke(&call), RFM_DONE);
    small = call.binding;
    CHECK_OK(rfm_binding_create(inv, kernel, 0, 1, 1, small->args, NULL, 0,
                                &large));
    t_kill(worker.pid, SIGSTOP);
    call.req.binding = large;
    t_start(&call);
    CHECK_EQ(t_wait(&call), RFM_LOST);
    rfm_binding_destroy(inv, large);
    call.req.binding = small;
    t_call_end(&call);
    free(blob);
    down_after_its_death();
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 100);
    RUN(every_invocation_ends_once_when_its_worker_is_killed);
    RUN(what_was_lost_is_started_again_elsewhere_under_its_id);
    RUN(a_kept_result_is_lost_with_its_worker);
    RUN(a_worker_that_stopped_past_the_deadline_writes_no_more);
    RUN(what_waits_too_long_in_the_queue_times_out_and_never_runs);
    RUN(what_was_sent_and_not_begun_is_cancelled_where_that_can_be);
    RUN(the_longest_time_limit_is_no_limit);
    RUN(a_time_limit_holds_for_all_attempts_together);
    RUN(what_nobody_will_serve_is_given_back_and_can_start_again);
    RUN(a_drained_channel_finishes_what_it_has_and_takes_nothing_more);
    RUN(closing_ends_what_is_in_flight_even_if_the_worker_hangs);
    RUN(attaching_to_the_dead_or_deaf_is_an_error_and_leaves_nothing);
    RUN(closing_while_threads_start_and_wait_strands_nobody);
    RUN(a_worker_that_stops_reading_can_not_block_its_rank_for_ever);
    return t_finish();
}

/*
 * The rank's service thread: asleep in epoll, never in need of the GIL.
 *
 * It refills slots when a worker rings, sees workers end (pidfd), sees control
 * connections end, and keeps deadlines. All it does for an invocation could be
 * done by any waiting thread too; it is there for when nobody waits.
 */
#define _GNU_SOURCE
#include "invoker.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define LET_GO_NS 2000000000ull
#define TICK_MS   1
#define QUIET     20            /* ticks with nothing to mind, then no more */

enum tag { TAG_EVENT = 0, TAG_CONTROL = 1, TAG_PID = 2, TAG_SIDE = 3 };

static uint64_t tagged(uint32_t index, enum tag tag)
{
    return ((uint64_t)index << 8) | (uint64_t)tag;
}

void rfm_service_kick(struct rfm_invoker *inv)
{
    uint64_t one = 1;

    if (write(inv->event_fd, &one, sizeof(one)) < 0) {
        return;                 /* full: it is awake already */
    }
}

static void watch_fd(struct rfm_invoker *inv, int fd, uint64_t data)
{
    struct epoll_event ev = { .events = EPOLLIN | EPOLLRDHUP };

    ev.data.u64 = data;
    (void)epoll_ctl(inv->epoll_fd, EPOLL_CTL_ADD, fd, &ev);
}

/* A side is looked at only when asked, and once: who waits for an invocation
 * looks itself, and should not wake us each time. */
void rfm_service_watch(struct rfm_invoker *inv)
{
    rfm_fence();        /* what we depend on, and then whether it is watched */
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        struct epoll_event ev = { .events = EPOLLIN | EPOLLONESHOT };
        struct rfm_side *side = rfm_load_acquire(&inv->sides[i]);
        int fd;

        if ((side == NULL) ||
            (__atomic_exchange_n(&inv->watching[i], 1, __ATOMIC_ACQ_REL) != 0)) {
            continue;
        }
        fd          = side->ops->side_fd(side);
        ev.data.u64 = tagged(i, TAG_SIDE);
        side->ops->side_arm(side);
        if ((epoll_ctl(inv->epoll_fd, EPOLL_CTL_MOD, fd, &ev) != 0) &&
            (errno == ENOENT)) {
            (void)epoll_ctl(inv->epoll_fd, EPOLL_CTL_ADD, fd, &ev);
        }
        /* what came before it was armed may not show */
        if (side->ops->side_progress(side) > 0) {
            rfm_service_kick(inv);
        }
    }
}

void rfm_service_mind(struct rfm_invoker *inv)
{
    rfm_fence();        /* what is to come, and then whether it is minded */
    if ((rfm_load_relaxed(&inv->ticking) == 0) &&
        (__atomic_exchange_n(&inv->ticking, 1, __ATOMIC_ACQ_REL) == 0)) {
        rfm_service_kick(inv);
    }
}

static bool expects_bulk(struct rfm_invoker *inv)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);

    for (uint32_t i = 0; i < n; i++) {
        struct rfm_channel *chan = rfm_channel_at(inv, i);

        if ((rfm_load_relaxed(&chan->bulky) != 0) &&
            (rfm_channel_in_flight(chan) != 0)) {
            return true;
        }
    }
    return false;
}

void rfm_service_expect(struct rfm_invoker *inv)
{
    if (expects_bulk(inv)) {
        rfm_service_mind(inv);
    }
}

/* To be woken when it comes would cost those who wait for it: they are on the
 * same core. So it is looked at now and then, until there is nothing for long. */
static void stop_ticking(struct rfm_invoker *inv, uint32_t *quiet)
{
    if (expects_bulk(inv)) {
        *quiet = 0;
    } else if (++*quiet >= QUIET) {
        *quiet = 0;
        rfm_store_release(&inv->ticking, 0);
        rfm_fence();
        if (expects_bulk(inv)) {
            rfm_store_release(&inv->ticking, 1);
        }
    }
}

/* true while somebody depends on what comes over the sides and doesn't look;
 * `idle`: nobody has waited for a while */
static bool needs_watch(struct rfm_invoker *inv, bool idle)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);
    bool looks = rfm_load_acquire(&inv->pollers) != 0;
    bool all = rfm_load_acquire(&inv->queued) != 0;

    if (looks && ((rfm_load_acquire(&inv->n_local) == 0) ||
                  (rfm_load_acquire(&inv->door->sleepers) == 0))) {
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        struct rfm_channel *chan = rfm_channel_at(inv, i);

        if (chan->remote && (rfm_channel_in_flight(chan) != 0) &&
            (all || looks ||
             (idle && (rfm_load_relaxed(&chan->bulky) != 0)))) {
            return true;
        }
    }
    return false;
}

static void unwatch(struct rfm_invoker *inv, struct rfm_channel *chan)
{
    if (chan->registered) {
        (void)epoll_ctl(inv->epoll_fd, EPOLL_CTL_DEL, chan->fd, NULL);
        if (!chan->remote) {
            (void)epoll_ctl(inv->epoll_fd, EPOLL_CTL_DEL, chan->pidfd, NULL);
        }
        chan->registered = false;
    }
}

static void end_channel(struct rfm_invoker *inv, struct rfm_channel *chan)
{
    unwatch(inv, chan);
    rfm_channel_dead(chan);
}

/* the worker closed its end: after our own goodbye that is the fence. Nonsense
 * from it is none: it still has everything mapped. */
static void control_ended(struct rfm_invoker *inv, struct rfm_channel *chan,
                          bool closed)
{
    chan->peer_ended = closed;
    if (chan->remote || (chan->let_go && closed)) {
        if (chan->remote && !chan->let_go) {
            /* what it said before is heard: its words count more */
            rfm_channel_sever(chan, closed ? "the worker is gone"
                                           : "its control connection failed");
        }
        end_channel(inv, chan);
        return;
    }
    (void)epoll_ctl(inv->epoll_fd, EPOLL_CTL_DEL, chan->fd, NULL);
    rfm_channel_drain(chan);
    /* a worker that lives on without a connection has no right to write */
    if (chan->kill_at_ns == 0) {
        chan->kill_at_ns = rfm_now_ns() + RFM_LATE_KILL_NS;
    }
}

static void read_control(struct rfm_invoker *inv, struct rfm_channel *chan)
{
    for (;;) {
        int rc = rfm_rx_read(&chan->rx, chan->fd);

        if (rc == RFM_ERR_AGAIN) {
            return;
        }
        if (rc < 0) {
            control_ended(inv, chan, rc == RFM_ERR_PEER);
            return;
        }
        rc = rfm_channel_heard(chan);
        if (rc < 0) {
            control_ended(inv, chan, false);
            return;
        }
    }
}

static bool has_exited(struct rfm_channel *chan)
{
    struct pollfd p = { .fd = chan->pidfd, .events = POLLIN };

    if (chan->remote) {
        return false;           /* its connection says so, or its silence */
    }
    return (poll(&p, 1, 0) > 0) && ((p.revents & POLLIN) != 0);
}

/* Its link broke; what it said before that is there, or on its way. */
static void hear_why(struct rfm_channel *chan)
{
    for (int i = 0; (i < 16) && (rfm_channel_why(chan) == NULL) &&
                    (rfm_rx_read(&chan->rx, chan->fd) == RFM_OK); i++) {
        if (rfm_channel_heard(chan) < 0) {
            return;
        }
    }
}

/* new channels, closing ones, late ones; the time of the next look */
static uint64_t tend_channels(struct rfm_invoker *inv, uint64_t now)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);
    uint64_t next = UINT64_MAX;

    for (uint32_t i = 0; i < n; i++) {
        struct rfm_channel *chan = rfm_channel_at(inv, i);
        uint32_t state = rfm_load_acquire(&chan->state);

        if (state == RFM_CH_DEAD) {
            continue;
        }
        if (!chan->registered) {
            watch_fd(inv, chan->fd, tagged(i, TAG_CONTROL));
            if (!chan->remote) {
                watch_fd(inv, chan->pidfd, tagged(i, TAG_PID));
            }
            chan->registered = true;
        }
        if (rfm_load_acquire(&chan->severed) != 0) {
            hear_why(chan);
            end_channel(inv, chan);
            continue;
        }
        if ((state == RFM_CH_CLOSING) && !chan->let_go) {
            chan->let_go     = true;
            chan->kill_at_ns = now + LET_GO_NS;
            pthread_mutex_lock(&chan->control);
            (void)shutdown(chan->fd, SHUT_WR);
            pthread_mutex_unlock(&chan->control);
        }
        if (chan->kill_at_ns != 0) {
            if (has_exited(chan)) {
                end_channel(inv, chan);
                continue;
            }
            if (now >= chan->kill_at_ns) {
                (void)rfm_channel_kill(chan);
                chan->kill_at_ns = now + RFM_LATE_KILL_NS;
            }
            if (chan->kill_at_ns < next) {
                next = chan->kill_at_ns;
            }
        }
    }
    return next;
}

static void handle(struct rfm_invoker *inv, const struct epoll_event *ev)
{
    enum tag tag = (enum tag)(ev->data.u64 & 0xff);
    struct rfm_channel *chan;
    uint64_t count;

    if (tag == TAG_EVENT) {
        if (read(inv->event_fd, &count, sizeof(count)) < 0) {
            return;
        }
        return;
    }
    if (tag == TAG_SIDE) {
        uint64_t i = ev->data.u64 >> 8;

        inv->sides[i]->ops->side_woken(inv->sides[i]);
        rfm_store_release(&inv->watching[i], 0);
        rfm_fence();
        return;
    }
    chan = rfm_channel_at(inv, (uint32_t)(ev->data.u64 >> 8));
    if (rfm_load_acquire(&chan->state) == RFM_CH_DEAD) {
        return;
    }
    if (tag == TAG_PID) {
        /* the event may be of the one that had this place before */
        if (has_exited(chan)) {
            end_channel(inv, chan);
        }
    } else {
        read_control(inv, chan);
    }
}

static void *service_main(void *arg)
{
    struct rfm_invoker *inv = arg;
    struct epoll_event events[32];
    uint32_t waited = 0;
    uint32_t quiet = 0;

    pthread_setname_np(pthread_self(), "rfaas-service");
    while (rfm_load_acquire(&inv->stop) == 0) {
        uint64_t now = rfm_now_ns();
        uint64_t next = tend_channels(inv, now);
        uint64_t deadline = rfm_invoker_expire(inv, now);
        bool ticking = rfm_load_acquire(&inv->ticking) != 0;
        int timeout = ticking ? TICK_MS : -1;
        bool idle;
        int n;

        if (deadline < next) {
            next = deadline;
        }
        if (next != UINT64_MAX) {
            uint64_t ms = (next <= now) ? 0 : (next - now) / 1000000ull + 1;

            if ((timeout < 0) || (ms < (uint64_t)timeout)) {
                timeout = (ms < 60000) ? (int)ms : 60000;
            }
        }
        n = epoll_wait(inv->epoll_fd, events, 32, timeout);
        for (int i = 0; i < n; i++) {
            handle(inv, &events[i]);
        }
        (void)rfm_invoker_progress(inv);
        if (rfm_load_acquire(&inv->queued) != 0) {
            rfm_invoker_pump(inv);
        }
        if (ticking && (n == 0)) {
            stop_ticking(inv, &quiet);
        }
        idle   = rfm_load_relaxed(&inv->waited) == waited;
        waited = rfm_load_relaxed(&inv->waited);
        if ((rfm_load_acquire(&inv->n_sides) != 0) && needs_watch(inv, idle)) {
            rfm_service_watch(inv);
            /* A looker may have taken a completion before that, and have left
             * it because somebody, perhaps we, was reaping just then. */
            if (rfm_invoker_progress(inv) != 0) {
                rfm_service_kick(inv);
            }
        }
    }
    return NULL;
}

int rfm_service_start(struct rfm_invoker *inv)
{
    pthread_attr_t attr;
    sigset_t all;
    sigset_t old;
    int rc;

    inv->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (inv->epoll_fd < 0) {
        return RFM_ERR_SYSTEM;
    }
    watch_fd(inv, inv->event_fd, tagged(0, TAG_EVENT));
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 256 * 1024);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    rc = pthread_create(&inv->service, &attr, service_main, inv);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    if (rc != 0) {
        close(inv->epoll_fd);
        return RFM_ERR_NO_RESOURCE;
    }
    inv->service_runs = true;
    return RFM_OK;
}

void rfm_service_stop(struct rfm_invoker *inv)
{
    if (inv->service_runs) {
        rfm_store_release(&inv->stop, 1);
        rfm_service_kick(inv);
        pthread_join(inv->service, NULL);
        inv->service_runs = false;
        close(inv->epoll_fd);
    }
}

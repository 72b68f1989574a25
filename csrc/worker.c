/*
 * The worker side: receive, run, reply.
 *
 * One thread (the caller of rfm_worker_next) polls the connections in
 * rotation, runs native kernels itself and hands everything else out as
 * events. A service thread, asleep in epoll, collects control frames while a
 * kernel runs. What a rank wrote into shared memory is copied once (the line),
 * checked against what was bound and granted, and only then used.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "arena.h"
#include "frame.h"
#include "output.h"
#include "poller.h"
#include "rfm_transport.h"
#include "rota.h"
#include "shm.h"

#define FRAMES_A_TURN 64
#define GUARDED_BYTES (RFM_MAX_SLOT_BYTES + RFM_PAGE_SIZE)

/* Kernels longer than this are worth it that the service thread receives what
 * comes meanwhile. */
#define BACKGROUND_NS 20000ull

/* Ranks that share a worker are served in turn as long as none has had so much
 * more of its time than the others, and each call counts as so much at least. */
#define ROTA_SLACK_NS 20000ull
#define ROTA_CALL_NS  200ull

/* A kernel closed our descriptors: we end as it would have by exit(). */
#define EXIT_CLOSED 74          /* EX_IOERR */

/* As long as it takes to send a reply; and so many calls say what a kernel takes. */
#define BRIEF_NS 3000u
#define SETTLED  16u

/* The service thread has the same core, and what it is woken by may be what we
 * wait for: without a word of ours it would run at the next tick, 4 ms later. */
#define YIELD_NS 50000ull

/* A control frame that a remote rank says to have sent is a lie after that. */
#define LATE_NS 10000000000ull

struct mapped {
    uint32_t arena;
    uint8_t *base;
    uint64_t bytes;
};

struct loaded {                 /* a kernel */
    bool     known;
    uint32_t kind;
    uint32_t line;              /* of the page, where it is counted */
    void    *user;
    char    *error;
    uint64_t error_bytes;
};

struct bound {                  /* a binding */
    uint32_t number;
    uint32_t kernel;
    uint32_t flags;
    uint16_t n_in;
    uint16_t n_out;
    bool     has_call;          /* an address travels with each call */
    bool     in_slot;           /* inputs lie in the slot, not its line     */
    bool     out_in_slot;       /* outputs do                               */
    uint8_t *area;              /* native: outputs before they are copied   */
    uint64_t longest_ns;        /* native, of a remote rank: of its last calls */
    uint32_t calls;             /* of which there were so many, or SETTLED */
    struct rfm_layout layout;
    struct rfm_page_kernel *meter;
    struct rfm_arg *args;
    struct rfm_buf *bufs;
    rfm_kernel_fn  *native;
    rfm_plain_fn   *plain;
    void    *user;
    char    *error;
    uint64_t error_bytes;
};

/* A control frame on its way from the service thread to the main one. */
struct control {
    struct control *next;
    struct rfm_conn *conn;
    struct rfm_frame head;
    uint8_t *body;
    int      fds[RFM_MAX_FRAME_FDS];
    uint32_t n_fds;
    uint8_t *mirror;            /* ARENA: made already, by the service thread */
    bool     ended;             /* the connection did */
};

struct rfm_conn {
    struct rfm_conn *next;      /* of all, attached or not; under the lock */
    uint32_t number;
    int      fd;
    int      data_fd;           /* -1, or until the link takes it */
    pthread_mutex_t send_lock;  /* both threads send frames to a remote rank */
    struct rfm_rx rx;           /* service thread only */
    bool     over;              /* service thread only: its end was read */
    uint32_t asked;             /* atomic: the main thread asks to be told */
    uint32_t heard;             /* atomic: all that was sent before was read */
    uint64_t asked_for;         /* ticket + 1; main thread only */
    uint32_t n_taken;           /* control frames; main thread only */
    bool     dropped;           /* main thread only: told why, and shut down */
    uint32_t n_refused;         /* atomic: what came and made no sense */
    uint64_t late_since;        /* remote: what that ticket needs isn't there */
    struct rfm_link *link;      /* atomic: NULL until attached */
    uint64_t ticket;
    uint64_t last_id[RFM_MAX_SLOTS];
    struct rfm_had had;         /* ticks; nothing while nobody shares */
    struct mapped *arenas;
    uint32_t n_arenas;
    struct loaded *kernels;
    uint32_t n_kernels;
    struct bound **bindings;    /* by index */
    uint32_t n_bindings;
};

struct rfm_worker {
    struct rfm_worker_attr attr;
    struct rfm_page *page;
    struct rfm_door *door;
    int      door_fd;
    int      pidfd;
    int      epoll_fd;
    int      event_fd;          /* wakes the service thread */
    int      bell_fd;           /* wakes the main thread from poll() */
    uint64_t spin_ticks;
    uint64_t yield_ticks;
    uint64_t idle_since;
    struct rfm_page_kernel *meter;      /* of the kernel that runs */
    struct rfm_output output;
    bool     limits_told;

    /* By number of transport; made at its first attach. */
    struct rfm_side *sides[RFM_TRANSPORTS];
    uint32_t n_sides;
    uint32_t n_local;           /* connections on shared memory */
    uint64_t mean_ns;           /* of a call */
    uint32_t watching[RFM_TRANSPORTS];  /* atomic: the service thread looks at sides */
    uint32_t polls;             /* atomic: the main thread sleeps in poll() */
    uint32_t busy;              /* atomic: a kernel runs, or a nap */

    struct rfm_conn *conns[RFM_MAX_RANKS];
    uint32_t n_conns;
    uint32_t turn;
    struct rfm_rota rota;
    uint64_t call_ticks;        /* that each call counts as, at least */

    /* private copies, so that nothing is read twice from shared memory */
    struct rfm_request_line line __attribute__((aligned(RFM_CACHE_LINE)));

    /* Small outputs are written here and copied into the reply: a native
     * kernel that writes on meets a canary, then a page that faults, and
     * never another invocation's reply. */
    uint8_t *guarded;           /* GUARDED_BYTES, then the guard page */
    uint8_t *out_line;          /* its last bytes: a line's payload + canary */

    uint32_t control_pending __attribute__((aligned(RFM_CACHE_LINE)));
    uint32_t quit;              /* atomic */
    uint32_t stop;              /* atomic */
    pthread_mutex_t lock;       /* of the lists */
    struct rfm_conn *all;
    struct control *first;
    struct control **last_p;
    pthread_t service;
};

/* --- the service thread --------------------------------------------------- */

static void knock(struct rfm_worker *w)
{
    rfm_door_knock(w->door);
    if (rfm_load_relaxed(&w->polls) != 0) {
        uint64_t one = 1;

        if (write(w->bell_fd, &one, sizeof(one)) < 0) {
            return;             /* full: it is ringing already */
        }
    }
}

static void hand_over(struct rfm_worker *w, struct control *node)
{
    node->next = NULL;
    pthread_mutex_lock(&w->lock);
    *w->last_p = node;
    w->last_p  = &node->next;
    rfm_store_release(&w->control_pending, 1);
    pthread_mutex_unlock(&w->lock);
    knock(w);
}

static struct control *node_of(struct rfm_conn *conn, struct rfm_rx *rx)
{
    struct control *node = calloc(1, sizeof(*node));

    if (node == NULL) {
        return NULL;
    }
    node->conn = conn;
    if (rx != NULL) {
        node->head  = rx->head;
        node->body  = rx->body;
        node->n_fds = rx->n_fds;
        memcpy(node->fds, rx->fds, sizeof(node->fds));
        rfm_rx_next(rx);
    }
    return node;
}

static void conn_ended(struct rfm_worker *w, struct rfm_conn *conn)
{
    struct control *node = node_of(conn, NULL);

    conn->over = true;
    (void)epoll_ctl(w->epoll_fd, EPOLL_CTL_DEL, conn->fd, NULL);
    rfm_rx_fini(&conn->rx);
    if (node == NULL) {
        _exit(70);              /* out of memory: the agent replaces us */
    }
    node->ended = true;
    hand_over(w, node);
}

static void answer_arena(struct rfm_conn *conn, uint32_t arena, int32_t status,
                         const struct rfm_parcel *parcel)
{
    struct rfm_ctl_arena_ready body = { .arena = arena, .status = status };
    struct iovec iov[2] = {
        { &body, sizeof(body) },
        { (void *)(uintptr_t)parcel->bytes, parcel->n_bytes },
    };

    pthread_mutex_lock(&conn->send_lock);
    (void)rfm_frame_send(conn->fd, RFM_CTL_ARENA_READY, 0, iov, 2, NULL, 0);
    pthread_mutex_unlock(&conn->send_lock);
}

/* A refusal's parcel is a text. */
static void say_why(const struct rfm_transport *ops, struct rfm_parcel *out)
{
    const char *why = (ops->why != NULL) ? ops->why() : NULL;
    size_t n = (why != NULL) ? strlen(why) : 0;

    out->n_bytes = (n < sizeof(out->bytes)) ? (uint32_t)n : sizeof(out->bytes);
    memcpy(out->bytes, (why != NULL) ? why : "", out->n_bytes);
}

/* private memory that counts against the limit; 0: not known */
static uint64_t data_bytes(void)
{
    unsigned long long kib = 0;
    FILE *file = fopen("/proc/self/status", "re");
    char line[128];

    while ((file != NULL) && (fgets(line, sizeof(line), file) != NULL)) {
        if (sscanf(line, "VmData: %llu", &kib) == 1) {
            break;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return kib << 10;
}

/* For people: what was asked for, what there is. */
static void say_no_room(uint64_t bytes, struct rfm_parcel *out)
{
    char *text = (char *)out->bytes;
    struct rlimit limit = { RLIM_INFINITY, RLIM_INFINITY };

    (void)getrlimit(RLIMIT_DATA, &limit);
    if (limit.rlim_cur == RLIM_INFINITY) {
        snprintf(text, sizeof(out->bytes),
                 "the worker's node has no %llu bytes of memory for it",
                 (unsigned long long)bytes);
    } else {
        snprintf(text, sizeof(out->bytes),
                 "it needs %llu bytes at the worker, whose limit is %llu with "
                 "what it needs itself, and which has %llu already",
                 (unsigned long long)bytes, (unsigned long long)limit.rlim_cur,
                 (unsigned long long)data_bytes());
    }
    out->n_bytes = (uint32_t)strlen(text);
}

/*
 * A remote rank waits until its arena is mirrored here, also while a kernel
 * runs. The main thread hears of it first: what the rank sends next may use it.
 * False: it made no sense.
 */
static bool make_mirror(struct rfm_worker *w, struct rfm_conn *conn,
                        struct control *node)
{
    struct rfm_link *link = rfm_load_acquire(&conn->link);
    struct rfm_parcel in = { 0 };
    struct rfm_parcel out = { 0 };
    struct rfm_ctl_arena body;
    uint8_t *base = NULL;
    uint32_t n = node->head.length;
    int rc;

    if ((n < sizeof(body)) || (n - sizeof(body) > sizeof(in.bytes)) ||
        (node->n_fds != 0)) {
        return false;
    }
    memcpy(&body, node->body, sizeof(body));
    in.n_bytes = n - (uint32_t)sizeof(body);
    memcpy(in.bytes, node->body + sizeof(body), in.n_bytes);
    rc = rfm_mirror_map(body.bytes, &base);
    if (rc == RFM_OK) {
        rc = link->ops->worker_arena(link, body.arena, base, body.bytes, &in,
                                     &out);
        if (rc < 0) {
            say_why(link->ops, &out);
            rfm_memfd_unmap(base, body.bytes);
            base = NULL;
        }
    } else {
        say_no_room(body.bytes, &out);
    }
    node->mirror = base;
    hand_over(w, node);
    answer_arena(conn, body.arena, rc, &out);
    return true;
}

static bool is_arena_of_remote(struct rfm_conn *conn, const struct control *node)
{
    struct rfm_link *link = rfm_load_acquire(&conn->link);

    return (node->head.type == RFM_CTL_ARENA) && (link != NULL) && link->remote;
}

static void control_free(struct control *node);

static const char bad_frame[] = "a control frame that made no sense";

static void count_refused(struct rfm_conn *conn)
{
    (void)__atomic_fetch_add(&conn->n_refused, 1, __ATOMIC_RELAXED);
}

/* its last word to the rank */
static void say_refused(struct rfm_conn *conn, const char *why)
{
    struct iovec iov = { (void *)(uintptr_t)why, strlen(why) };

    pthread_mutex_lock(&conn->send_lock);
    (void)rfm_frame_send(conn->fd, RFM_CTL_REFUSED, 0, &iov, 1, NULL, 0);
    pthread_mutex_unlock(&conn->send_lock);
}

/* true if all that was there was read; afterwards conn may be gone if not */
static bool read_conn(struct rfm_worker *w, struct rfm_conn *conn)
{
    /* then the others and the agent have their turn */
    for (int i = 0; i < FRAMES_A_TURN; i++) {
        struct control *node;
        int rc = rfm_rx_read(&conn->rx, conn->fd);

        if (rc == RFM_ERR_AGAIN) {
            return true;
        }
        node = (rc == RFM_OK) ? node_of(conn, &conn->rx) : NULL;
        if ((node != NULL) && is_arena_of_remote(conn, node)) {
            if (make_mirror(w, conn, node)) {
                continue;
            }
            control_free(node);
            node = NULL;
        }
        if (node == NULL) {
            if (rc != RFM_ERR_PEER) {
                count_refused(conn);
                say_refused(conn, bad_frame);
            }
            conn_ended(w, conn);
            return false;
        }
        hand_over(w, node);
    }
    return false;
}

/* --- receiving while a kernel runs ---------------------------------------- */

static uint64_t side_tag(struct rfm_worker *w, uint32_t i)
{
    return (uint64_t)(uintptr_t)&w->sides[i];
}

/* The service thread looks at the sides once, when something comes. */
static void watch_sides(struct rfm_worker *w)
{
    rfm_fence();        /* `busy`, and then whether they are watched */
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        struct epoll_event ev = { .events = EPOLLIN | EPOLLONESHOT };
        struct rfm_side *side = rfm_load_acquire(&w->sides[i]);
        int fd;

        if ((side == NULL) || (rfm_load_relaxed(&w->watching[i]) != 0) ||
            (__atomic_exchange_n(&w->watching[i], 1, __ATOMIC_ACQ_REL) != 0)) {
            continue;
        }
        fd          = side->ops->side_fd(side);
        ev.data.u64 = side_tag(w, i);
        side->ops->side_arm(side);
        if ((epoll_ctl(w->epoll_fd, EPOLL_CTL_MOD, fd, &ev) != 0) &&
            (errno == ENOENT)) {
            (void)epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, fd, &ev);
        }
    }
}

/* true if the event was a side's */
static bool read_side(struct rfm_worker *w, uint64_t tag)
{
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        if (tag == side_tag(w, i)) {
            struct rfm_side *side = w->sides[i];

            side->ops->side_woken(side);
            rfm_store_release(&w->watching[i], 0);
            rfm_fence();
            if (rfm_load_acquire(&w->busy) != 0) {
                watch_sides(w);
            }
            (void)side->ops->side_progress(side);
            /* The main thread looks once more after the side was armed: it may
             * have seen that we watch it, and nothing there, just before. Also
             * where nothing came: a link may have failed, and the main thread,
             * asleep on the same descriptor, would not hear of it. */
            knock(w);
            return true;
        }
    }
    return false;
}

static void kick(struct rfm_worker *w)
{
    uint64_t one = 1;

    if (write(w->event_fd, &one, sizeof(one)) < 0) {
        return;                 /* full: it is awake already */
    }
}

/* Reads what the main thread waits for. A connection that isn't over stays:
 * it is the one who reads its end that gives it away. */
static void answer_asked(struct rfm_worker *w)
{
    uint64_t count;

    if (read(w->event_fd, &count, sizeof(count)) < 0) {
        return;
    }
    for (;;) {
        struct rfm_conn *conn;
        uint32_t asked = 0;

        pthread_mutex_lock(&w->lock);
        for (conn = w->all; conn != NULL; conn = conn->next) {
            asked = rfm_load_acquire(&conn->asked);
            if (!conn->over && (asked != rfm_load_relaxed(&conn->heard))) {
                break;
            }
        }
        pthread_mutex_unlock(&w->lock);
        if (conn == NULL) {
            return;
        }
        if (read_conn(w, conn)) {
            rfm_store_release(&conn->heard, asked);
        } else {
            kick(w);            /* it goes on after the others */
            return;
        }
    }
}

static void adopt(struct rfm_worker *w, struct rfm_rx *rx)
{
    struct epoll_event ev = { .events = EPOLLIN };
    struct rfm_ctl_adopt body;
    struct rfm_conn *conn;

    if ((rx->head.length != sizeof(body)) || (rx->n_fds < 1) ||
        (rx->n_fds > 2)) {
        return;
    }
    memcpy(&body, rx->body, sizeof(body));
    conn = calloc(1, sizeof(*conn));
    if (conn == NULL) {
        return;
    }
    conn->number  = body.conn;
    conn->fd      = rx->fds[0];
    conn->data_fd = (rx->n_fds == 2) ? rx->fds[1] : -1;
    rx->n_fds     = 0;          /* they are ours now */
    pthread_mutex_init(&conn->send_lock, NULL);
    rfm_rx_init(&conn->rx, RFM_MAX_FRAME);
    pthread_mutex_lock(&w->lock);
    conn->next = w->all;
    w->all     = conn;
    pthread_mutex_unlock(&w->lock);
    ev.data.ptr = conn;
    if (epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, conn->fd, &ev) != 0) {
        conn_ended(w, conn);
    }
}

static void read_agent(struct rfm_worker *w, struct rfm_rx *rx)
{
    for (;;) {
        int rc = rfm_rx_read(rx, w->attr.agent_fd);

        if (rc == RFM_ERR_AGAIN) {
            return;
        }
        if (rc < 0) {
            _exit(0);           /* no agent, no worker */
        }
        if (rx->head.type == RFM_AGENT_ADOPT) {
            adopt(w, rx);
        } else if (rx->head.type == RFM_AGENT_QUIT) {
            rfm_store_release(&w->quit, 1);
            knock(w);
        }
        rfm_rx_fini(rx);
    }
}

static void *service_main(void *arg)
{
    struct rfm_worker *w = arg;
    struct epoll_event events[16];
    struct rfm_rx agent;

    pthread_setname_np(pthread_self(), "rfaas-control");
    rfm_rx_init(&agent, 4096);
    (void)rfm_frame_send(w->attr.agent_fd, RFM_AGENT_READY, 0, NULL, 0, NULL, 0);
    while (rfm_load_acquire(&w->stop) == 0) {
        int n = epoll_wait(w->epoll_fd, events, 16, -1);
        bool asked = false;

        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == w) {
                read_agent(w, &agent);
            } else if (read_side(w, events[i].data.u64)) {
                continue;
            } else if (events[i].data.ptr != NULL) {
                (void)read_conn(w, events[i].data.ptr);
            } else {
                asked = true;
            }
        }
        if (asked) {
            answer_asked(w);    /* last: it may end what has an event above */
        }
    }
    rfm_rx_fini(&agent);
    return NULL;
}

/* --- making and ending ---------------------------------------------------- */

static int start_service(struct rfm_worker *w)
{
    struct epoll_event agent = { .events = EPOLLIN | EPOLLRDHUP };
    struct epoll_event stop = { .events = EPOLLIN };
    pthread_attr_t attr;
    sigset_t all;
    sigset_t old;
    int rc;

    agent.data.ptr = w;
    stop.data.ptr  = NULL;
    if ((epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, w->attr.agent_fd, &agent) != 0) ||
        (epoll_ctl(w->epoll_fd, EPOLL_CTL_ADD, w->event_fd, &stop) != 0)) {
        return RFM_ERR_SYSTEM;
    }
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 256 * 1024);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    rc = pthread_create(&w->service, &attr, service_main, w);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return (rc == 0) ? RFM_OK : RFM_ERR_NO_RESOURCE;
}

int rfm_worker_create(const struct rfm_worker_attr *attr,
                      struct rfm_worker **worker_p)
{
    struct rfm_worker *w;
    uint8_t *door;
    void *guarded;
    void *page;
    int rc = RFM_ERR_SYSTEM;

    rfm_ticks_init();
    w = aligned_alloc(RFM_CACHE_LINE, (sizeof(*w) + RFM_CACHE_LINE - 1) &
                                          ~(size_t)(RFM_CACHE_LINE - 1));
    if (w == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    memset(w, 0, sizeof(*w));
    w->attr       = *attr;
    w->last_p     = &w->first;
    w->mean_ns    = 16 * BACKGROUND_NS;
    w->spin_ticks = rfm_ns_to_ticks((uint64_t)attr->spin_us * 1000ull);
    w->yield_ticks = rfm_ns_to_ticks(YIELD_NS);
    w->rota.slack = rfm_ns_to_ticks(ROTA_SLACK_NS);
    w->call_ticks = rfm_ns_to_ticks(ROTA_CALL_NS);
    pthread_mutex_init(&w->lock, NULL);
    page = mmap(NULL, RFM_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
                attr->page_fd, 0);
    if (page == MAP_FAILED) {
        goto err_free;
    }
    w->page = page;
    rc      = RFM_ERR_NO_MEMORY;
    guarded = mmap(NULL, GUARDED_BYTES + RFM_PAGE_SIZE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (guarded == MAP_FAILED) {
        goto err_page;
    }
    w->guarded  = guarded;
    w->out_line = w->guarded + GUARDED_BYTES -
                  (RFM_INLINE_BYTES + RFM_CANARY_BYTES);
    if (mprotect(w->guarded + GUARDED_BYTES, RFM_PAGE_SIZE, PROT_NONE) != 0) {
        goto err_guarded;
    }
    rc = rfm_memfd_create("rfaas-door", RFM_DOOR_BYTES, &w->door_fd);
    if (rc < 0) {
        goto err_guarded;
    }
    rc = rfm_memfd_map(w->door_fd, RFM_DOOR_BYTES, false, &door);
    if (rc < 0) {
        goto err_door_fd;
    }
    w->door  = (struct rfm_door *)door;
    rc       = RFM_ERR_SYSTEM;
    w->pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    if (w->pidfd < 0) {
        goto err_door;
    }
    w->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (w->epoll_fd < 0) {
        goto err_pidfd;
    }
    w->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->event_fd < 0) {
        goto err_epoll;
    }
    w->bell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->bell_fd < 0) {
        goto err_event;
    }
    rfm_output_open(&w->output, &w->page->output, attr->output_fd);
    rfm_store_release(&w->page->state, RFM_PAGE_WAITING);
    rc = start_service(w);
    if (rc < 0) {
        goto err_output;
    }
    w->idle_since = rfm_ticks();
    *worker_p = w;
    return RFM_OK;

err_output:
    rfm_output_close(&w->output);
    close(w->bell_fd);
err_event:
    close(w->event_fd);
err_epoll:
    close(w->epoll_fd);
err_pidfd:
    close(w->pidfd);
err_door:
    rfm_memfd_unmap(door, RFM_DOOR_BYTES);
err_door_fd:
    close(w->door_fd);
err_guarded:
    munmap(guarded, GUARDED_BYTES + RFM_PAGE_SIZE);
err_page:
    munmap(page, RFM_PAGE_BYTES);
err_free:
    pthread_mutex_destroy(&w->lock);
    free(w);
    return rc;
}

static void bound_destroy(struct bound *b)
{
    if (b != NULL) {
        free(b->error);
        free(b);
    }
}

static void conn_destroy(struct rfm_conn *conn)
{
    if (conn->link != NULL) {
        conn->link->ops->worker_close(conn->link);
    }
    for (uint32_t i = 0; i < conn->n_arenas; i++) {
        rfm_memfd_unmap(conn->arenas[i].base, conn->arenas[i].bytes);
    }
    for (uint32_t i = 0; i < conn->n_kernels; i++) {
        free(conn->kernels[i].error);
    }
    for (uint32_t i = 0; i < conn->n_bindings; i++) {
        bound_destroy(conn->bindings[i]);
    }
    free(conn->arenas);
    free(conn->kernels);
    free(conn->bindings);
    if (conn->data_fd >= 0) {
        close(conn->data_fd);
    }
    pthread_mutex_destroy(&conn->send_lock);
    /* last: to the rank, the end of this connection is the fence */
    close(conn->fd);
    free(conn);
}

static void control_free(struct control *node)
{
    for (uint32_t i = 0; i < node->n_fds; i++) {
        close(node->fds[i]);
    }
    if (node->mirror != NULL) {
        struct rfm_ctl_arena body;

        memcpy(&body, node->body, sizeof(body));
        rfm_memfd_unmap(node->mirror, body.bytes);
    }
    free(node->body);
    free(node);
}

void rfm_worker_destroy(struct rfm_worker *w)
{
    rfm_store_release(&w->stop, 1);
    kick(w);
    pthread_join(w->service, NULL);
    while (w->all != NULL) {
        struct rfm_conn *conn = w->all;

        w->all = conn->next;
        rfm_rx_fini(&conn->rx);
        conn_destroy(conn);
    }
    /* after the links: they may write into mirrors that wait here */
    while (w->first != NULL) {
        struct control *node = w->first;

        w->first = node->next;
        control_free(node);
    }
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        if (w->sides[i] != NULL) {
            w->sides[i]->ops->side_close(w->sides[i]);
        }
    }
    close(w->bell_fd);
    close(w->event_fd);
    close(w->epoll_fd);
    close(w->pidfd);
    rfm_memfd_unmap((uint8_t *)w->door, RFM_DOOR_BYTES);
    close(w->door_fd);
    rfm_output_close(&w->output);
    rfm_store_release(&w->page->state, RFM_PAGE_ENDING);
    munmap(w->page, RFM_PAGE_BYTES);
    munmap(w->guarded, GUARDED_BYTES + RFM_PAGE_SIZE);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

/* --- control frames, on the main thread ----------------------------------- */

static int open_side(struct rfm_worker *w, const struct rfm_transport *ops)
{
    struct rfm_side_attr attr = { .rank = false, .spin_us = w->attr.spin_us };
    struct rfm_side *side;
    int rc;

    if ((ops->side_open == NULL) || (w->sides[ops->number] != NULL)) {
        return RFM_OK;
    }
    rc = ops->side_open(&attr, &side);
    if (rc < 0) {
        return rc;
    }
    rfm_store_release(&w->sides[ops->number], side);
    w->n_sides++;
    return RFM_OK;
}

static int open_link(struct rfm_worker *w, struct control *node,
                     struct rfm_parcel *out, bool *remote_p)
{
    uint32_t n = node->head.length;
    struct rfm_conn *conn = node->conn;
    const struct rfm_transport *ops;
    struct rfm_parcel in = { 0 };
    struct rfm_ctl_attach body;
    struct rfm_link_attr attr;
    struct rfm_link *link;
    int rc;

    if ((n < sizeof(body)) || (n - sizeof(body) > sizeof(in.bytes))) {
        return RFM_ERR_PROTOCOL;
    }
    memcpy(&body, node->body, sizeof(body));
    ops = rfm_transport_find(body.transport);
    if (ops == NULL) {
        return RFM_ERR_INVALID;
    }
    *remote_p = ops->remote;
    if ((body.slots < 2) || (body.slots > RFM_MAX_SLOTS) ||
        ((body.slots & (body.slots - 1)) != 0) ||
        (body.slot_bytes < RFM_CACHE_LINE) ||
        (body.slot_bytes > RFM_MAX_SLOT_BYTES) ||
        ((body.slot_bytes % RFM_CACHE_LINE) != 0)) {
        return RFM_ERR_PROTOCOL;
    }
    if (w->n_conns >= RFM_MAX_RANKS) {
        return RFM_ERR_NO_RESOURCE;
    }
    rc = open_side(w, ops);
    if (rc < 0) {
        say_why(ops, out);
        return rc;
    }
    in.n_bytes = n - (uint32_t)sizeof(body);
    memcpy(in.bytes, node->body + sizeof(body), in.n_bytes);
    in.n_fds = node->n_fds;
    memcpy(in.fds, node->fds, sizeof(in.fds));
    attr = (struct rfm_link_attr){
        .side       = w->sides[ops->number],
        .slots      = body.slots,
        .slot_bytes = body.slot_bytes,
        .door_fd    = w->door_fd,
        .event_fd   = -1,
        .data_fd    = -1,
    };
    if (ops->number == RFM_TRANSPORT_TCP) {
        attr.data_fd  = conn->data_fd;
        conn->data_fd = -1;     /* the link's, also on failure */
    }
    rc = ops->worker_open(&attr, &body, &in, &link, out);
    if (rc == RFM_OK) {
        rfm_store_release(&conn->link, link);
    } else {
        say_why(ops, out);
    }
    return rc;
}

static int attach(struct rfm_worker *w, struct control *node)
{
    struct rfm_ctl_attached answer = { .pid = (uint32_t)getpid() };
    struct rfm_parcel out = { 0 };
    struct iovec iov[2] = { { &answer, sizeof(answer) }, { out.bytes, 0 } };
    struct rfm_conn *conn = node->conn;
    int fds[2] = { w->door_fd, w->pidfd };
    bool remote = false;

    if (conn->link != NULL) {
        return RFM_ERR_PROTOCOL;        /* answered once already */
    }
    answer.status = open_link(w, node, &out, &remote);
    if (answer.status == RFM_OK) {
        w->conns[w->n_conns++] = conn;
        w->n_local += !remote;
    }
    iov[1].iov_len = out.n_bytes;
    pthread_mutex_lock(&conn->send_lock);
    (void)rfm_frame_send(conn->fd, RFM_CTL_ATTACHED, 0, iov, 2, fds,
                         remote ? 0 : 2);
    pthread_mutex_unlock(&conn->send_lock);
    /* after a refusal there is nothing more to say: no second one, either */
    return (answer.status < 0) ? RFM_ERR_PROTOCOL : RFM_OK;
}

static struct mapped *find_arena(struct rfm_conn *conn, uint32_t arena)
{
    for (uint32_t i = 0; i < conn->n_arenas; i++) {
        if (conn->arenas[i].arena == arena) {
            return &conn->arenas[i];
        }
    }
    return NULL;
}

/* address of a piece of an arena, NULL if it isn't wholly inside */
static uint8_t *resolve(struct rfm_conn *conn, uint32_t arena, uint64_t offset,
                        uint64_t size)
{
    struct mapped *m = find_arena(conn, arena);

    if ((m == NULL) || (offset > m->bytes) || (size > m->bytes - offset)) {
        return NULL;
    }
    return m->base + offset;
}

/* is what lies behind a piece that was resolved in the arena, too? */
static bool has_redzone(struct rfm_conn *conn, uint32_t arena, uint64_t offset,
                        uint64_t size)
{
    return resolve(conn, arena, offset + size, RFM_REDZONE) != NULL;
}

static void map_arena(struct control *node)
{
    struct rfm_conn *conn = node->conn;
    struct rfm_ctl_arena body;
    struct mapped *more;
    uint8_t *base;

    if ((node->mirror == NULL) &&
        ((node->head.length != sizeof(body)) || (node->n_fds != 1))) {
        return;
    }
    memcpy(&body, node->body, sizeof(body));
    if (find_arena(conn, body.arena) != NULL) {
        return;                 /* the first one stays what it is */
    }
    more = realloc(conn->arenas, (conn->n_arenas + 1) * sizeof(*more));
    if (more == NULL) {
        _exit(70);              /* the link may write into the mirror already */
    }
    conn->arenas = more;
    if (node->mirror != NULL) {
        more[conn->n_arenas++] =
            (struct mapped){ body.arena, node->mirror, body.bytes };
        node->mirror = NULL;
        return;
    }
    /* on failure what refers to it is answered with an error */
    if (rfm_memfd_map(node->fds[0], body.bytes, false, &base) == RFM_OK) {
        more[conn->n_arenas++] = (struct mapped){ body.arena, base, body.bytes };
    }
}

static char *copy_text(const char *text, uint64_t n)
{
    char *copy = malloc(n + 1);

    if (copy == NULL) {
        _exit(70);              /* an error that is forgotten is none */
    }
    memcpy(copy, text, n);
    copy[n] = 0;
    return copy;
}

static void set_error(struct bound *b, const char *text, uint64_t n)
{
    free(b->error);
    b->error       = copy_text(text, n);
    b->error_bytes = n;
}

/* a rank that drops what it has bound gets errors, not a fault in a kernel */
static void forget_arena(struct bound *b, uint32_t arena)
{
    static const char text[] = "an array of this binding is in no arena";

    for (uint32_t i = 0; (b != NULL) && (b->error == NULL) &&
                         (i < (uint32_t)b->n_in + b->n_out); i++) {
        if ((b->args[i].place == RFM_BOUND) && (b->args[i].arena == arena)) {
            set_error(b, text, sizeof(text) - 1);
        }
    }
}

static int drop_arena(struct control *node)
{
    struct rfm_conn *conn = node->conn;
    struct rfm_ctl_number body;
    struct mapped *m;

    if (node->head.length != sizeof(body)) {
        return 0;
    }
    memcpy(&body, node->body, sizeof(body));
    m = find_arena(conn, body.number);
    if (m != NULL) {
        if ((conn->link != NULL) && conn->link->remote &&
            (conn->link->ops->worker_arena(conn->link, body.number, NULL, 0,
                                           NULL, NULL) < 0)) {
            return RFM_ERR_PROTOCOL;    /* it is still writing there */
        }
        for (uint32_t i = 0; i < conn->n_bindings; i++) {
            forget_arena(conn->bindings[i], body.number);
        }
        rfm_memfd_unmap(m->base, m->bytes);
        *m = conn->arenas[--conn->n_arenas];
    }
    return 0;
}

/* begin_*: 1 an event for the caller, 0 handled, RFM_ERR_PROTOCOL nonsense */
static int begin_load(struct control *node, struct rfm_event *ev)
{
    struct rfm_conn *conn = node->conn;
    struct rfm_ctl_kernel body;
    struct loaded *more;

    if (node->head.length < sizeof(body)) {
        return RFM_ERR_PROTOCOL;
    }
    memcpy(&body, node->body, sizeof(body));
    if ((body.blob_bytes != node->head.length - sizeof(body)) ||
        (body.kernel > (1u << 20))) {
        return RFM_ERR_PROTOCOL;
    }
    if (body.kernel >= conn->n_kernels) {
        uint32_t n = body.kernel + 16;

        more = realloc(conn->kernels, n * sizeof(*more));
        if (more == NULL) {
            return RFM_ERR_PROTOCOL;
        }
        memset(more + conn->n_kernels, 0, (n - conn->n_kernels) * sizeof(*more));
        conn->kernels   = more;
        conn->n_kernels = n;
    }
    if (conn->kernels[body.kernel].known) {
        return RFM_ERR_PROTOCOL;    /* loaded twice */
    }
    ev->type       = RFM_EV_KERNEL;
    ev->number     = body.kernel;
    ev->kind       = body.kind;
    ev->digest     = node->body + offsetof(struct rfm_ctl_kernel, digest);
    ev->blob       = node->body + sizeof(body);
    ev->blob_bytes = body.blob_bytes;
    return 1;
}

void rfm_worker_name(struct rfm_worker *w, struct rfm_event *ev,
                     const char *name, uint64_t name_bytes)
{
    struct loaded *kernel = &ev->conn->kernels[ev->number];
    size_t n = (name_bytes < RFM_KERNEL_NAME_BYTES) ? name_bytes
                                                    : RFM_KERNEL_NAME_BYTES - 1;

    n = strnlen(name, n);
    kernel->line = 0;
    if (n == 0) {
        return;
    }
    for (uint32_t i = 1; i < RFM_PAGE_KERNELS; i++) {
        char *known = w->page->kernels[i].name;

        if (known[0] == 0) {
            memcpy(known, name, n);     /* the rest of it is zero */
        } else if ((strnlen(known, RFM_KERNEL_NAME_BYTES) != n) ||
                   (memcmp(known, name, n) != 0)) {
            continue;
        }
        kernel->line = i;
        return;
    }
}

void rfm_worker_loaded(struct rfm_worker *w, struct rfm_event *ev, void *user,
                       const char *error, uint64_t error_bytes)
{
    struct loaded *kernel = &ev->conn->kernels[ev->number];

    (void)w;
    kernel->known = true;
    kernel->kind  = ev->kind;
    kernel->user  = user;
    if (error != NULL) {
        kernel->error       = copy_text(error, error_bytes);
        kernel->error_bytes = error_bytes;
    }
}

/* args of a BIND, checked; false if they make no sense */
static bool take_args(struct rfm_conn *conn, struct bound *b,
                      const uint8_t *wire)
{
    uint32_t n = (uint32_t)b->n_in + b->n_out;

    for (uint32_t i = 0; i < n; i++) {
        struct rfm_wire_arg arg;

        memcpy(&arg, wire + i * sizeof(arg), sizeof(arg));
        b->args[i].place  = arg.place;
        b->args[i].flags  = arg.flags;
        b->args[i].arena  = arg.arena;
        b->args[i].offset = arg.offset;
        b->args[i].size   = arg.size;
        b->bufs[i].size     = arg.size;
        b->bufs[i].capacity = arg.size;
        if (arg.place == RFM_BOUND) {
            b->bufs[i].ptr = resolve(conn, arg.arena, arg.offset, arg.size);
            if ((b->bufs[i].ptr == NULL) ||
                ((i >= b->n_in) && ((arg.flags & RFM_ARG_CANARY) != 0) &&
                 !has_redzone(conn, arg.arena, arg.offset, arg.size))) {
                return false;
            }
        } else if (arg.place == RFM_CALL) {
            b->has_call = true;
        }
    }
    return rfm_layout(b->args, b->n_in, b->n_out, conn->link->slot_bytes,
                      &b->layout) == RFM_OK;
}

static void point_at_lines(struct rfm_worker *w, struct bound *b)
{
    uint32_t n = (uint32_t)b->n_in + b->n_out;

    for (uint32_t i = 0; i < n; i++) {
        if (b->args[i].place != RFM_INLINE) {
            continue;
        }
        if (i < b->n_in) {
            if (b->layout.in_bytes <= RFM_INLINE_BYTES) {
                b->bufs[i].ptr = w->line.payload + b->args[i].at;
            } else {
                b->in_slot = true;
            }
        } else if (b->layout.out_in_line) {
            b->bufs[i].ptr = w->out_line + b->args[i].at;
        } else {
            b->out_in_slot = true;
        }
    }
}

/* a native kernel's outputs that don't fit the line: as far back from the
 * guard page as they and their canaries need */
static void point_at_guarded(struct rfm_worker *w, struct bound *b)
{
    uint64_t bytes = (b->layout.out_bytes + RFM_CACHE_LINE - 1) &
                     ~(uint64_t)(RFM_CACHE_LINE - 1);

    b->area = w->guarded + GUARDED_BYTES - bytes;
    for (uint32_t i = b->n_in; i < (uint32_t)b->n_in + b->n_out; i++) {
        if (b->args[i].place == RFM_INLINE) {
            b->bufs[i].ptr = b->area + b->args[i].at;
        }
    }
    b->out_in_slot = false;
}

static const char bad_binding[] = "the binding made no sense to the worker";

static int begin_bind(struct rfm_worker *w, struct control *node,
                       struct rfm_event *ev)
{
    struct rfm_conn *conn = node->conn;
    struct rfm_ctl_bind body;
    struct loaded *kernel;
    struct bound **slot;
    struct bound *b;
    uint32_t index;
    uint32_t n;

    if ((node->head.length < sizeof(body)) || (conn->link == NULL)) {
        return RFM_ERR_PROTOCOL;
    }
    memcpy(&body, node->body, sizeof(body));
    n = (uint32_t)body.n_in + body.n_out;
    if ((n > RFM_MAX_ARGS) || (body.meta_bytes > RFM_MAX_FRAME) ||
        (node->head.length != sizeof(body) + n * sizeof(struct rfm_wire_arg) +
                                  body.meta_bytes) ||
        (body.kernel >= conn->n_kernels) ||
        !conn->kernels[body.kernel].known) {
        return RFM_ERR_PROTOCOL;
    }
    index = body.binding % RFM_MAX_BINDINGS;
    if (index >= conn->n_bindings) {
        uint32_t grown = index + 64;
        struct bound **more = realloc(conn->bindings, grown * sizeof(*more));

        if (more == NULL) {
            return RFM_ERR_PROTOCOL;
        }
        memset(more + conn->n_bindings, 0,
               (grown - conn->n_bindings) * sizeof(*more));
        conn->bindings   = more;
        conn->n_bindings = grown;
    }
    slot = &conn->bindings[index];
    if (*slot != NULL) {
        return RFM_ERR_PROTOCOL;    /* bound twice */
    }
    b = calloc(1, sizeof(*b) + n * (sizeof(*b->args) + sizeof(*b->bufs)));
    if (b == NULL) {
        return RFM_ERR_PROTOCOL;
    }
    b->args   = (struct rfm_arg *)(b + 1);
    b->bufs   = (struct rfm_buf *)(b->args + n);
    b->number = body.binding;
    b->kernel = body.kernel;
    b->flags  = body.flags;
    b->n_in   = body.n_in;
    b->n_out  = body.n_out;
    *slot     = b;
    kernel    = &conn->kernels[body.kernel];
    b->meter  = &w->page->kernels[kernel->line];
    if (kernel->error != NULL) {
        set_error(b, kernel->error, kernel->error_bytes);
        return 0;
    }
    if (!take_args(conn, b, node->body + sizeof(body))) {
        set_error(b, bad_binding, sizeof(bad_binding) - 1);
        return 0;
    }
    point_at_lines(w, b);
    ev->type       = RFM_EV_BIND;
    ev->number     = body.binding;
    ev->kind       = kernel->kind;
    ev->user       = kernel->user;
    ev->n_in       = body.n_in;
    ev->n_out      = body.n_out;
    ev->flags      = body.flags;
    ev->blob       = node->body + node->head.length - body.meta_bytes;
    ev->blob_bytes = body.meta_bytes;
    return 1;
}

void rfm_worker_bound(struct rfm_worker *w, struct rfm_event *ev, void *user,
                      rfm_kernel_fn *native, rfm_plain_fn *plain,
                      const char *error, uint64_t error_bytes)
{
    struct bound *b = ev->conn->bindings[ev->number % RFM_MAX_BINDINGS];

    b->user   = user;
    b->native = native;
    b->plain  = plain;
    if (((native != NULL) || (plain != NULL)) && b->out_in_slot) {
        point_at_guarded(w, b);
    }
    if (error != NULL) {
        set_error(b, error, error_bytes);
    } else if ((plain != NULL) && ((b->n_in != 1) || (b->n_out != 1))) {
        set_error(b, bad_binding, sizeof(bad_binding) - 1);
    }
}

static int begin_unbind(struct control *node, struct rfm_event *ev)
{
    struct rfm_conn *conn = node->conn;
    struct rfm_ctl_number body;
    struct bound *b;
    uint32_t index;

    if (node->head.length != sizeof(body)) {
        return RFM_ERR_PROTOCOL;
    }
    memcpy(&body, node->body, sizeof(body));
    index = body.number % RFM_MAX_BINDINGS;
    b = (index < conn->n_bindings) ? conn->bindings[index] : NULL;
    if ((b == NULL) || (b->number != body.number)) {
        return 0;
    }
    conn->bindings[index] = NULL;
    ev->type   = RFM_EV_UNBIND;
    ev->number = body.number;
    ev->user   = b->user;
    bound_destroy(b);
    return 1;
}

static void remove_conn(struct rfm_worker *w, struct rfm_conn *conn)
{
    struct rfm_conn **at;

    pthread_mutex_lock(&w->lock);
    for (at = &w->all; *at != conn; at = &(*at)->next) {
    }
    *at = conn->next;
    pthread_mutex_unlock(&w->lock);
    for (uint32_t i = 0; i < w->n_conns; i++) {
        if (w->conns[i] == conn) {
            w->conns[i] = w->conns[--w->n_conns];
            w->n_local -= !conn->link->remote;
            return;
        }
    }
}

/* The rank sees the end of its connection, not a silence. */
static void drop_conn(struct rfm_conn *conn, const char *why)
{
    conn->dropped = true;
    say_refused(conn, why);
    (void)shutdown(conn->fd, SHUT_RDWR);
}

/* 1: *ev is for the caller; 0: nothing for it */
static int take_control(struct rfm_worker *w, struct rfm_event *ev)
{
    struct control *node;
    int event = 0;

    pthread_mutex_lock(&w->lock);
    node = w->first;
    if (node != NULL) {
        w->first = node->next;
        if (w->first == NULL) {
            w->last_p = &w->first;
            rfm_store_release(&w->control_pending, 0);
        }
    }
    pthread_mutex_unlock(&w->lock);
    if (node == NULL) {
        return 0;
    }
    memset(ev, 0, sizeof(*ev));
    ev->conn        = node->conn;
    ev->conn_number = node->conn->number;
    ev->frame       = node;
    node->conn->n_taken += !node->ended;
    if (node->ended) {
        remove_conn(w, node->conn);
        ev->type = RFM_EV_GONE;
        return 1;
    }
    switch (node->head.type) {
    case RFM_CTL_ATTACH:
        event = attach(w, node);
        break;
    case RFM_CTL_ARENA:
        map_arena(node);
        break;
    case RFM_CTL_ARENA_DROP:
        event = drop_arena(node);
        break;
    case RFM_CTL_KERNEL:
        event = begin_load(node, ev);
        break;
    case RFM_CTL_BIND:
        event = begin_bind(w, node, ev);
        break;
    case RFM_CTL_UNBIND:
        event = begin_unbind(node, ev);
        break;
    case RFM_CTL_DISCARD:
        ev->type = RFM_EV_DROP;
        ev->id   = node->head.cookie;
        event    = 1;
        break;
    default:
        break;                  /* a later version's: not for us */
    }
    if (event < 0) {
        count_refused(node->conn);
        drop_conn(node->conn, bad_frame);
    }
    if (event != 1) {
        control_free(node);
        return 0;
    }
    return 1;
}

void rfm_worker_release(struct rfm_worker *w, struct rfm_event *ev)
{
    struct control *node = ev->frame;

    if (ev->type == RFM_EV_GONE) {
        uint32_t gone[2] = { ev->conn_number,
                             rfm_load_relaxed(&ev->conn->n_refused) };
        struct iovec iov = { gone, sizeof(gone) };

        conn_destroy(ev->conn);
        (void)rfm_frame_send(w->attr.agent_fd, RFM_AGENT_GONE, 0, &iov, 1, NULL,
                             0);
    }
    if (node != NULL) {
        control_free(node);
        ev->frame = NULL;
    }
    rfm_output_nobodys(&w->output, w->page->count);
    ev->type = RFM_EV_NONE;
}

void rfm_worker_printed(struct rfm_worker *w)
{
    rfm_output_printed(&w->output);
}

/* Whose what was printed is, as long as that can be known. */
static void look_at_output(struct rfm_worker *w)
{
    if (rfm_output_is_due(&w->output, w->page->count)) {
        rfm_output_look(&w->output, w->output.last, w->page->count);
    }
}

/* --- running -------------------------------------------------------------- */

static void begin_call(struct rfm_worker *w, struct rfm_conn *conn,
                       const struct bound *b, uint64_t start)
{
    struct rfm_page *page = w->page;
    uint64_t budget = w->line.budget_ns;

    w->meter = b->meter;
    rfm_store_relaxed(&page->conn, conn->number);
    if (__builtin_expect(budget != 0, 0)) {
        uint64_t now = rfm_now_ns();

        rfm_store_relaxed(&page->start_ns, now);
        rfm_store_relaxed(&page->limit_ns,
                          (budget < UINT64_MAX - now) ? now + budget : 0);
        if (!w->limits_told) {
            w->limits_told = true;
            (void)rfm_frame_send(w->attr.agent_fd, RFM_AGENT_LIMITS, 0, NULL, 0,
                                 NULL, 0);
        }
    }
    rfm_store_relaxed(&page->poll_ns, page->poll_ns +
                                          rfm_ticks_to_ns(start - w->idle_since));
    rfm_store_relaxed(&page->state, RFM_PAGE_RUNNING);
    rfm_store_release(&page->id, w->line.id);
    if (__builtin_expect(w->n_sides != 0, 0) && (w->mean_ns > BACKGROUND_NS)) {
        rfm_store_release(&w->busy, 1);
        watch_sides(w);
    }
}

static uint64_t end_call(struct rfm_worker *w, struct rfm_conn *conn,
                         uint64_t start)
{
    struct rfm_page *page = w->page;
    uint64_t now = rfm_ticks();
    uint64_t exec_ns = rfm_ticks_to_ns(now - start);

    if (__builtin_expect(w->n_conns > 1, 0)) {
        rfm_rota_charge(&w->rota, &conn->had, now - start);
    }
    rfm_output_ended(&w->output, rfm_load_relaxed(&page->id), conn->number,
                     page->count + 1, now - start);
    rfm_store_relaxed(&page->exec_ns, page->exec_ns + exec_ns);
    rfm_store_relaxed(&page->count, page->count + 1);
    rfm_store_relaxed(&w->meter->exec_ns, w->meter->exec_ns + exec_ns);
    rfm_store_relaxed(&w->meter->count, w->meter->count + 1);
    rfm_store_relaxed(&page->limit_ns, 0);
    rfm_store_relaxed(&page->state, RFM_PAGE_WAITING);
    rfm_store_release(&page->id, 0);
    w->idle_since = now;
    if (__builtin_expect(w->n_sides != 0, 0)) {
        rfm_store_release(&w->busy, 0);
        w->mean_ns = w->mean_ns - w->mean_ns / 4 + exec_ns / 4;
    }
    return exec_ns;
}

static bool is_robbed(const struct rfm_conn *conn)
{
    return conn->link->remote &&
           (rfm_load_acquire(&conn->link->failed) != 0) &&
           rfm_load_relaxed(&conn->link->robbed);
}

/* The kernel that did it has just returned. */
static void die_in(struct rfm_worker *w, const struct rfm_conn *conn, uint64_t id)
{
    rfm_store_relaxed(&w->page->conn, conn->number);
    rfm_store_relaxed(&w->page->state, RFM_PAGE_RUNNING);
    rfm_store_release(&w->page->id, id);
    _exit(EXIT_CLOSED);
}

static void publish_with(struct rfm_worker *w, struct rfm_conn *conn,
                         uint32_t slot, struct rfm_reply_line *reply,
                         uint64_t payload_bytes,
                         const struct rfm_region *regions, uint32_t n)
{
    const struct rfm_transport *ops = conn->link->ops;

    conn->last_id[slot] = reply->id;
    conn->ticket++;
    ops->worker_reply(conn->link, slot, reply, payload_bytes, regions, n);
    if (__builtin_expect(is_robbed(conn), 0)) {
        die_in(w, conn, reply->id);
    }
    if (ops->worker_knock != NULL) {
        ops->worker_knock(conn->link, conn->ticket);
    }
}

/* a reply of out_bytes in the line or behind it */
static void publish(struct rfm_worker *w, struct rfm_conn *conn, uint32_t slot,
                    struct rfm_reply_line *reply)
{
    bool behind = (reply->out_bytes > RFM_INLINE_BYTES) &&
                  ((reply->flags & RFM_REP_KEPT) == 0);

    publish_with(w, conn, slot, reply, behind ? reply->out_bytes : 0, NULL, 0);
}

/* the outputs that lie in mirrors go along */
static void publish_outputs(struct rfm_worker *w, struct rfm_conn *conn,
                            struct bound *b, uint32_t slot,
                            struct rfm_reply_line *reply, const uint64_t *sizes)
{
    struct rfm_region regions[RFM_MAX_ARGS];
    uint64_t behind = b->layout.out_in_line ? 0 : b->layout.out_bytes;
    uint32_t n = 0;

    if (__builtin_expect(!conn->link->remote, 1)) {
        publish_with(w, conn, slot, reply, behind, NULL, 0);
        return;
    }
    for (uint32_t i = 0; i < b->n_out; i++) {
        const struct rfm_arg *arg = &b->args[b->n_in + i];

        if (arg->place != RFM_INLINE) {
            regions[n++] = (struct rfm_region){
                .arena   = arg->arena,
                .offset  = arg->offset,
                .size    = sizes[i],
                .address = b->bufs[b->n_in + i].ptr,
            };
        }
    }
    publish_with(w, conn, slot, reply, behind, regions, n);
}

static void set_bytes(struct rfm_conn *conn, uint32_t slot,
                      struct rfm_reply_line *reply, const void *bytes,
                      uint64_t n)
{
    if (n > conn->link->slot_bytes) {
        n = conn->link->slot_bytes;
    }
    reply->out_bytes = n;
    if (n <= RFM_INLINE_BYTES) {
        memcpy(reply->payload, bytes, n);
    } else {
        memcpy(conn->link->ops->worker_payload(conn->link, slot), bytes, n);
    }
}

static void refuse(struct rfm_worker *w, struct rfm_conn *conn, uint32_t slot,
                   uint32_t status, const char *text, uint64_t n)
{
    struct rfm_reply_line reply = { .id = w->line.id, .status = status };

    set_bytes(conn, slot, &reply, text, n);
    publish(w, conn, slot, &reply);
}

/* pointers of this call; false if a descriptor lies */
static bool point(struct rfm_conn *conn, struct bound *b, uint32_t slot,
                  const uint8_t *line, const uint8_t *payload)
{
    uint32_t n = (uint32_t)b->n_in + b->n_out;
    const uint8_t *in = (b->layout.in_bytes <= RFM_INLINE_BYTES) ? line
                                                                 : payload;

    for (uint32_t i = 0; i < n; i++) {
        const struct rfm_arg *arg = &b->args[i];

        if (arg->place == RFM_CALL) {
            struct rfm_desc desc;

            memcpy(&desc, in + arg->at, sizeof(desc));
            if (desc.size != arg->size) {
                return false;
            }
            b->bufs[i].ptr = resolve(conn, desc.arena, desc.offset, desc.size);
            if ((b->bufs[i].ptr == NULL) ||
                ((i >= b->n_in) && ((desc.flags & RFM_ARG_CANARY) != 0) &&
                 !has_redzone(conn, desc.arena, desc.offset, desc.size))) {
                return false;
            }
            /* the redzone flag travels with the address */
            b->args[i].flags  = desc.flags & RFM_ARG_CANARY;
            b->args[i].arena  = desc.arena;
            b->args[i].offset = desc.offset;
        } else if (arg->place == RFM_INLINE) {
            if (i < b->n_in) {
                b->bufs[i].ptr = (uint8_t *)(uintptr_t)in + arg->at;
            } else if (b->out_in_slot) {
                b->bufs[i].ptr =
                    conn->link->ops->worker_payload(conn->link, slot) + arg->at;
            }
        }
    }
    return true;
}

static void set_canaries(struct bound *b, bool remote)
{
    uint64_t words[2] = { RFM_CANARY_WORD, RFM_CANARY_WORD };

    /* in a mirror nobody has put them there */
    for (uint32_t i = b->n_in; remote && (i < (uint32_t)b->n_in + b->n_out);
         i++) {
        if ((b->args[i].place != RFM_INLINE) &&
            ((b->args[i].flags & RFM_ARG_CANARY) != 0)) {
            rfm_redzone_fill((uint8_t *)b->bufs[i].ptr + b->bufs[i].capacity);
        }
    }
    if (b->layout.n_inline_out == 0) {
        return;
    }
    for (uint32_t i = b->n_in; i < (uint32_t)b->n_in + b->n_out; i++) {
        if (b->args[i].place == RFM_INLINE) {
            memcpy((uint8_t *)b->bufs[i].ptr + b->bufs[i].capacity, words,
                   sizeof(words));
        }
    }
}

/* the output that was overrun, or -1 */
static int overrun(const struct bound *b)
{
    for (uint32_t i = b->n_in; i < (uint32_t)b->n_in + b->n_out; i++) {
        uint8_t *end = (uint8_t *)b->bufs[i].ptr + b->bufs[i].capacity;
        bool guarded = (b->args[i].place == RFM_INLINE) ||
                       ((b->args[i].flags & RFM_ARG_CANARY) != 0);

        if (guarded && !rfm_redzone_intact(end)) {
            if (b->args[i].place != RFM_INLINE) {
                rfm_redzone_fill(end);
            }
            return (int)(i - b->n_in);
        }
    }
    return -1;
}

/* sizes of a reply whose outputs are there; what the first output holds */
static void set_sizes(struct rfm_worker *w, struct rfm_conn *conn,
                      struct bound *b, uint32_t slot,
                      struct rfm_reply_line *reply, const uint64_t *sizes)
{
    uint8_t *to;

    reply->out_bytes = (b->n_out > 0) ? sizes[0] : 0;
    if (b->n_out > 1) {
        to = b->layout.out_in_line
                 ? w->out_line
                 : conn->link->ops->worker_payload(conn->link, slot);
        memcpy(to, sizes, b->n_out * sizeof(*sizes));
        reply->flags |= RFM_REP_SIZES;
    }
    if (b->layout.out_in_line) {
        memcpy(reply->payload, w->out_line, sizeof(reply->payload));
    }
}

/* The next request is there, and its kernel takes no longer than to send this
 * one's reply: then both may travel together. */
static bool next_is_brief(struct rfm_worker *w, struct rfm_conn *conn)
{
    uint32_t slot = (uint32_t)(conn->ticket + 1) & (conn->link->slots - 1);
    struct rfm_request_line line;
    const uint8_t *payload;
    struct bound *b;

    if ((rfm_load_relaxed(&w->control_pending) != 0) || (w->n_conns != 1) ||
        !conn->link->ops->worker_poll(conn->link, slot, conn->last_id[slot],
                                      &line, &payload) ||
        ((line.flags & RFM_REQ_FETCH) != 0) ||
        (line.binding % RFM_MAX_BINDINGS >= conn->n_bindings)) {
        return false;
    }
    b = conn->bindings[line.binding % RFM_MAX_BINDINGS];
    return (b != NULL) && (b->number == line.binding) && (b->calls >= SETTLED) &&
           (b->longest_ns <= BRIEF_NS);
}

static void keep_time(struct bound *b, uint64_t exec_ns)
{
    b->longest_ns -= b->longest_ns / 8;
    if (exec_ns > b->longest_ns) {
        b->longest_ns = exec_ns;
    }
    b->calls += b->calls < SETTLED;
}

static void run_native(struct rfm_worker *w, struct rfm_conn *conn,
                       struct bound *b, uint32_t slot, uint64_t start)
{
    struct rfm_reply_line reply = { .id = w->line.id };
    struct rfm_buf *outputs = b->bufs + b->n_in;
    uint64_t sizes[RFM_MAX_ARGS];
    char text[160];
    int32_t rc = 0;
    int bad;

    set_canaries(b, conn->link->remote);
    begin_call(w, conn, b, start);
    if (b->native != NULL) {
        struct rfm_call call = {
            .version    = RFM_CALL_VERSION,
            .n_in       = b->n_in,
            .n_out      = b->n_out,
            .inputs     = b->bufs,
            .outputs    = outputs,
            .invocation = w->line.id,
        };

        for (uint32_t i = 0; i < b->n_out; i++) {
            outputs[i].size = outputs[i].capacity;
        }
        rc = b->native(&call);
    } else {
        outputs[0].size = b->plain(b->bufs[0].ptr, (uint32_t)b->bufs[0].size,
                                   outputs[0].ptr);
    }
    reply.exec_ns = end_call(w, conn, start);
    if (__builtin_expect(conn->link->remote, 0)) {
        keep_time(b, reply.exec_ns);
        conn->link->more = next_is_brief(w, conn);
    }

    text[0] = 0;
    bad = overrun(b);
    if (bad >= 0) {
        snprintf(text, sizeof(text),
                 "the kernel wrote past the end of output %d (%llu bytes)", bad,
                 (unsigned long long)outputs[bad].capacity);
    } else if (rc < 0) {
        snprintf(text, sizeof(text), "the kernel returned %d", (int)rc);
    } else {
        for (uint32_t i = 0; i < b->n_out; i++) {
            sizes[i] = outputs[i].size;
            if (sizes[i] > outputs[i].capacity) {
                snprintf(text, sizeof(text),
                         "the kernel says that it wrote %llu bytes to output "
                         "%u, which holds %llu",
                         (unsigned long long)sizes[i], i,
                         (unsigned long long)outputs[i].capacity);
                break;
            }
        }
    }
    if (text[0] != 0) {
        reply.status = RFM_ST_KERNEL;
        set_bytes(conn, slot, &reply, text, strlen(text));
    } else {
        if (b->area != NULL) {
            memcpy(conn->link->ops->worker_payload(conn->link, slot), b->area,
                   b->layout.out_bytes);
        }
        set_sizes(w, conn, b, slot, &reply, sizes);
        publish_outputs(w, conn, b, slot, &reply, sizes);
        conn->link->more = false;
        return;
    }
    publish(w, conn, slot, &reply);
    conn->link->more = false;
}

static void fill_event(struct rfm_event *ev, struct rfm_conn *conn,
                       uint32_t type, uint64_t id, uint32_t slot,
                       uint64_t start)
{
    memset(ev, 0, sizeof(*ev));
    ev->type         = type;
    ev->conn         = conn;
    ev->conn_number  = conn->number;
    ev->id           = id;
    ev->slot         = slot;
    ev->start_ticks  = start;
    ev->out          = conn->link->ops->worker_payload(conn->link, slot);
    ev->out_capacity = conn->link->slot_bytes;
}

/* What a request needs may still lie in the control connection, into which it
 * was written first. False: look again later. */
static bool heard_all(struct rfm_worker *w, struct rfm_conn *conn)
{
    if (conn->link->remote) {
        uint32_t ahead = (w->line.flags >> RFM_REQ_AFTER_SHIFT) - conn->n_taken;
        uint64_t now;

        if (((ahead & 0xffffffu) == 0) || ((ahead & 0x800000u) != 0)) {
            return true;
        }
        now = rfm_now_ns();
        if (conn->asked_for != conn->ticket + 1) {
            conn->asked_for  = conn->ticket + 1;
            conn->late_since = now;
        }
        return now - conn->late_since > LATE_NS;
    }
    if (conn->asked_for != conn->ticket + 1) {
        conn->asked_for = conn->ticket + 1;
        rfm_store_release(&conn->asked, conn->asked + 1);
        kick(w);
        return false;
    }
    return (rfm_load_acquire(&conn->heard) == conn->asked) &&
           (rfm_load_acquire(&w->control_pending) == 0);
}

/* like serve() */
static int refuse_nonsense(struct rfm_worker *w, struct rfm_conn *conn,
                           uint32_t slot, const char *text, uint64_t n)
{
    if (!heard_all(w, conn)) {
        return -1;
    }
    count_refused(conn);
    refuse(w, conn, slot, RFM_ST_PROTOCOL, text, n);
    return 0;
}

static int serve_fetch(struct rfm_worker *w, struct rfm_conn *conn,
                       uint32_t slot, struct rfm_event *ev, uint64_t start)
{
    static const char text[] = "a fetch that made no sense";
    struct rfm_wire_fetch fetch;
    uint8_t *into;

    memcpy(&fetch, w->line.payload, sizeof(fetch));
    into = resolve(conn, fetch.into.arena, fetch.into.offset, fetch.into.size);
    if ((w->line.in_bytes != sizeof(fetch)) || (into == NULL)) {
        return refuse_nonsense(w, conn, slot, text, sizeof(text) - 1);
    }
    fill_event(ev, conn, RFM_EV_FETCH, w->line.id, slot, start);
    ev->number       = 0;
    ev->blob_bytes   = fetch.kept_id;
    ev->out          = into;
    ev->out_capacity = fetch.into.size;
    ev->into         = fetch.into;
    return 1;
}

/* false if an array that the object refers to is in no arena that we know */
static bool knows_refs(struct rfm_conn *conn, const uint8_t *from, uint64_t n)
{
    struct rfm_object head;
    uint64_t at;

    memcpy(&head, from, sizeof(head));
    at = sizeof(head) + head.n_parts * sizeof(uint64_t);
    for (uint32_t i = 0; i < head.n_refs; i++) {
        struct rfm_desc desc;

        if (at + sizeof(desc) > n) {
            break;              /* whoever opens it will say so */
        }
        memcpy(&desc, from + at, sizeof(desc));
        if (resolve(conn, desc.arena, desc.offset, desc.size) == NULL) {
            return false;
        }
        at += sizeof(desc);
    }
    return true;
}

/* false: the rank took it back, and was told that we know */
static bool begins(struct rfm_worker *w, struct rfm_conn *conn, uint32_t slot)
{
    if (__builtin_expect((w->line.flags & RFM_REQ_CLAIM) == 0, 1) ||
        (conn->link->ops->worker_begin == NULL) ||
        conn->link->ops->worker_begin(conn->link, slot)) {
        return true;
    }
    refuse(w, conn, slot, RFM_ST_TAKEN_BACK, "", 0);
    return false;
}

static int serve_object(struct rfm_worker *w, struct rfm_conn *conn,
                        struct bound *b, uint32_t slot, const uint8_t *payload,
                        struct rfm_event *ev, uint64_t start)
{
    static const char text[] = "an object's payload that made no sense";
    uint64_t n = w->line.in_bytes;
    const uint8_t *from = (n <= RFM_INLINE_BYTES) ? w->line.payload : payload;

    if ((w->line.flags & RFM_REQ_STAGED) != 0) {
        struct rfm_desc desc;

        memcpy(&desc, w->line.payload, sizeof(desc));
        from = (n == sizeof(desc))
                   ? resolve(conn, desc.arena, desc.offset, desc.size)
                   : NULL;
        n = desc.size;
    } else if (n > conn->link->slot_bytes) {
        from = NULL;
    }
    if ((from == NULL) || (n < sizeof(struct rfm_object))) {
        return refuse_nonsense(w, conn, slot, text, sizeof(text) - 1);
    }
    if (!knows_refs(conn, from, n) && !heard_all(w, conn)) {
        return -1;
    }
    if (!begins(w, conn, slot)) {
        return 0;
    }
    fill_event(ev, conn, RFM_EV_CALL, w->line.id, slot, start);
    ev->flags      = RFM_REQ_OBJECT | (w->line.flags & RFM_REQ_STAGED);
    ev->number     = b->number;
    ev->user       = b->user;
    ev->blob       = from;
    ev->blob_bytes = n;
    begin_call(w, conn, b, start);
    return 1;
}

/* 1: an event; 0: done; -1: what it needs is still on the way */
static int serve(struct rfm_worker *w, struct rfm_conn *conn, uint32_t slot,
                 const uint8_t *payload, struct rfm_event *ev)
{
    static const char lies[] = "an argument that is in none of the arenas";
    static const char unbound[] = "a binding that was never made";
    uint64_t start = rfm_ticks();
    uint32_t index = w->line.binding % RFM_MAX_BINDINGS;
    struct bound *b;

    if ((w->line.flags & RFM_REQ_FETCH) != 0) {
        return serve_fetch(w, conn, slot, ev, start);
    }
    b = (index < conn->n_bindings) ? conn->bindings[index] : NULL;
    if ((b == NULL) || (b->number != w->line.binding)) {
        return refuse_nonsense(w, conn, slot, unbound, sizeof(unbound) - 1);
    }
    if (__builtin_expect(b->error != NULL, 0)) {
        refuse(w, conn, slot, RFM_ST_BAD_KERNEL, b->error, b->error_bytes);
        return 0;
    }
    if ((b->flags & RFM_BIND_OBJECT) != 0) {
        return serve_object(w, conn, b, slot, payload, ev, start);
    }
    if ((w->line.in_bytes != b->layout.in_bytes) ||
        ((b->has_call || b->in_slot || b->out_in_slot) &&
         !point(conn, b, slot, w->line.payload, payload))) {
        return refuse_nonsense(w, conn, slot, lies, sizeof(lies) - 1);
    }
    if (!begins(w, conn, slot)) {
        return 0;
    }
    if ((b->native != NULL) || (b->plain != NULL)) {
        run_native(w, conn, b, slot, start);
        return 0;
    }
    fill_event(ev, conn, RFM_EV_CALL, w->line.id, slot, start);
    ev->number = b->number;
    ev->user   = b->user;
    ev->n_in   = b->n_in;
    ev->n_out  = b->n_out;
    ev->bufs   = b->bufs;
    ev->fixed  = !b->has_call;
    if (!b->in_slot && !b->out_in_slot) {
        ev->flags = 0x100;      /* the same memory in every slot */
    }
    begin_call(w, conn, b, start);
    return 1;
}

void *rfm_event_resolve(const struct rfm_event *ev, const struct rfm_desc *desc)
{
    return resolve(ev->conn, desc->arena, desc->offset, desc->size);
}

void rfm_worker_reply(struct rfm_worker *w, struct rfm_event *ev,
                      uint32_t status, uint32_t flags, uint64_t out_bytes,
                      const uint64_t *sizes)
{
    struct rfm_reply_line reply = {
        .id        = ev->id,
        .status    = status,
        .flags     = flags,
        .out_bytes = out_bytes,
    };
    struct rfm_conn *conn = ev->conn;

    if (ev->type == RFM_EV_CALL) {
        reply.exec_ns = end_call(w, conn, ev->start_ticks);
        if ((status == RFM_ST_OK) && ((ev->flags & RFM_REQ_OBJECT) == 0)) {
            struct bound *b = conn->bindings[ev->number % RFM_MAX_BINDINGS];
            uint64_t full[RFM_MAX_ARGS];

            if (sizes == NULL) {
                for (uint32_t i = 0; i < b->n_out; i++) {
                    full[i] = b->bufs[b->n_in + i].capacity;
                }
                sizes = full;
            }
            set_sizes(w, conn, b, ev->slot, &reply, sizes);
            ev->type = RFM_EV_NONE;
            publish_outputs(w, conn, b, ev->slot, &reply, sizes);
            return;
        }
    } else if ((ev->type == RFM_EV_FETCH) && (status == RFM_ST_OK) &&
               conn->link->remote) {
        struct rfm_region region = {
            .arena   = ev->into.arena,
            .offset  = ev->into.offset,
            .size    = out_bytes,
            .address = ev->out,
        };

        ev->type = RFM_EV_NONE;
        publish_with(w, conn, ev->slot, &reply, 0, &region, 1);
        return;
    }
    ev->type = RFM_EV_NONE;
    publish(w, conn, ev->slot, &reply);
}

void rfm_worker_reply_bytes(struct rfm_worker *w, struct rfm_event *ev,
                            uint32_t status, const void *bytes, uint64_t n)
{
    struct rfm_reply_line reply = { .id = ev->id, .status = status };
    struct rfm_conn *conn = ev->conn;

    if (ev->type == RFM_EV_CALL) {
        reply.exec_ns = end_call(w, conn, ev->start_ticks);
    }
    set_bytes(conn, ev->slot, &reply, bytes, n);
    ev->type = RFM_EV_NONE;
    publish(w, conn, ev->slot, &reply);
}

/* --- the loop ------------------------------------------------------------- */

static void progress_sides(struct rfm_worker *w)
{
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        if (w->sides[i] != NULL) {
            (void)w->sides[i]->ops->side_progress(w->sides[i]);
        }
    }
}

/* what broke its link has nothing more to say */
static bool is_to_be_dropped(const struct rfm_conn *conn)
{
    return (rfm_load_acquire(&conn->link->failed) != 0) && !conn->dropped;
}

static void drop_failed(struct rfm_conn *conn)
{
    if (is_to_be_dropped(conn)) {
        if (is_robbed(conn)) {
            _exit(EXIT_CLOSED);     /* by a thread that a kernel left behind */
        }
        if (rfm_load_acquire(&conn->link->failed) == RFM_ERR_PROTOCOL) {
            count_refused(conn);
        }
        drop_conn(conn, conn->link->why);
    }
}

/* one look at everybody: 1 event, 0 served something, -1 nothing there */
static int look(struct rfm_worker *w, struct rfm_event *ev)
{
    uint32_t n = w->n_conns;
    uint32_t turn = w->turn;

    if (__builtin_expect(rfm_load_acquire(&w->control_pending) != 0, 0)) {
        look_at_output(w);
        return take_control(w, ev);
    }
    if (__builtin_expect(w->n_sides != 0, 0)) {
        progress_sides(w);
    }
    rfm_rota_begin(&w->rota);
    do {
        for (uint32_t k = 0; k < n; k++) {
            struct rfm_conn *conn;
            const uint8_t *payload;
            uint32_t slot;
            int rc;

            if (turn >= n) {
                turn = 0;
            }
            conn = w->conns[turn++];
            if (!rfm_rota_is_due(&w->rota, &conn->had)) {
                continue;
            }
            slot = (uint32_t)conn->ticket & (conn->link->slots - 1);
            if (!conn->link->ops->worker_poll(conn->link, slot,
                                              conn->last_id[slot], &w->line,
                                              &payload)) {
                if (__builtin_expect(conn->link->remote, 0)) {
                    drop_failed(conn);
                }
                continue;
            }
            rc = serve(w, conn, slot, payload, ev);
            if (rc >= 0) {
                w->turn = turn;     /* the next one's turn */
                if (__builtin_expect(n > 1, 0)) {
                    rfm_rota_charge(&w->rota, &conn->had, w->call_ticks);
                }
                return rc;
            }
        }
    } while (rfm_rota_rise(&w->rota));
    return -1;
}

/* the second look, after a sleeper was announced */
static bool nothing_there(struct rfm_worker *w)
{
    bool idle = (rfm_load_acquire(&w->control_pending) == 0) &&
                (rfm_load_acquire(&w->quit) == 0);

    if (w->n_sides != 0) {
        progress_sides(w);
    }
    for (uint32_t i = 0; idle && (i < w->n_conns); i++) {
        struct rfm_conn *conn = w->conns[i];
        uint32_t slot = (uint32_t)conn->ticket & (conn->link->slots - 1);
        const uint8_t *payload;

        idle = !conn->link->ops->worker_poll(conn->link, slot,
                                             conn->last_id[slot], &w->line,
                                             &payload) &&
               !is_to_be_dropped(conn);
    }
    return idle;
}

/* all ranks are remote: asleep on the sides themselves */
static void nap_on_sides(struct rfm_worker *w)
{
    struct pollfd p[RFM_TRANSPORTS + 1] = {
        { .fd = w->bell_fd, .events = POLLIN },
    };
    uint64_t before;
    uint64_t count;
    uint32_t n = 1;

    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        if (w->sides[i] != NULL) {
            w->sides[i]->ops->side_arm(w->sides[i]);
            p[n].fd       = w->sides[i]->ops->side_fd(w->sides[i]);
            p[n++].events = POLLIN;
        }
    }
    rfm_store_release(&w->polls, 1);
    rfm_fence();
    if (nothing_there(w)) {
        before = rfm_ticks();
        (void)poll(p, n, -1);
        w->idle_since += rfm_ticks() - before;      /* asleep is not polling */
        if ((p[0].revents != 0) &&
            (read(w->bell_fd, &count, sizeof(count)) < 0)) {
            count = 0;          /* somebody rang twice; look again */
        }
    }
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        if (w->sides[i] != NULL) {
            w->sides[i]->ops->side_woken(w->sides[i]);
        }
    }
    rfm_store_release(&w->polls, 0);
}

static void nap(struct rfm_worker *w)
{
    uint32_t word;
    uint64_t before;

    if ((w->n_sides != 0) && (w->n_local == 0)) {
        nap_on_sides(w);
        return;
    }
    word = rfm_door_arm(w->door);
    if (w->n_sides != 0) {
        /* ranks here ring the door, so the service thread looks at the sides */
        rfm_store_release(&w->busy, 1);
        watch_sides(w);
    }
    if (nothing_there(w)) {
        before = rfm_ticks();
        (void)rfm_door_sleep(w->door, word, UINT64_MAX);
        w->idle_since += rfm_ticks() - before;      /* asleep is not polling */
    }
    if (w->n_sides != 0) {
        rfm_store_release(&w->busy, 0);
    }
    rfm_door_disarm(w->door);
}

/* Told to end before we saw their ends: what they sent still counts. */
static void tell_refused(struct rfm_worker *w)
{
    for (uint32_t i = 0; i < w->n_conns; i++) {
        uint32_t gone[2] = { w->conns[i]->number,
                             rfm_load_relaxed(&w->conns[i]->n_refused) };
        struct iovec iov = { gone, sizeof(gone) };

        if (gone[1] != 0) {
            (void)rfm_frame_send(w->attr.agent_fd, RFM_AGENT_GONE, 0, &iov, 1,
                                 NULL, 0);
        }
    }
}

int rfm_worker_next(struct rfm_worker *w, bool wait, struct rfm_event *ev)
{
    uint64_t since = 0;
    uint64_t yielded = 0;
    uint64_t idle;
    uint32_t turns = 0;

    for (;;) {
        int rc = look(w, ev);

        if (rc > 0) {
            return RFM_OK;
        }
        if (rc == 0) {
            since   = 0;
            yielded = 0;
            turns   = 0;
            continue;
        }
        if (rfm_load_relaxed(&w->quit) != 0) {
            look_at_output(w);
            tell_refused(w);
            memset(ev, 0, sizeof(*ev));
            ev->type = RFM_EV_END;
            return RFM_OK;
        }
        if (!wait) {
            return RFM_ERR_AGAIN;
        }
        if (w->n_sides == 0) {
            rfm_spin_pause();   /* to look at a network takes longer */
        }
        if (((++turns & 31u) != 0) && (w->spin_ticks != 0)) {
            continue;
        }
        if (since == 0) {
            since = rfm_ticks();
        }
        idle = rfm_ticks() - since;
        if ((idle >= w->output.idle_ticks) || (idle >= w->spin_ticks)) {
            look_at_output(w);
        }
        if (idle >= w->spin_ticks) {
            nap(w);
            since   = 0;
            yielded = 0;
            turns   = 0;
        } else if (idle - yielded >= w->yield_ticks) {
            yielded = idle;
            sched_yield();
        }
    }
}

/* Bare processes that are joined by a queue pair, to compare verbs with. */
#define _GNU_SOURCE
#include "pair.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../rfm_bench.h"
#include "../verbs.h"

#define PAIR_API __attribute__((visibility("default")))
#define PAGE     4096u
#define LINES    64u            /* lines of a side, used in turn */
#define RECVS    192u           /* a burst, and what is being posted again */
#define BATCH    32u            /* receives are posted so many at once */
#define DEPTH    256u           /* of the send queue */
#define INTERVAL 32u            /* one of so many sends is signalled */
#define AT_ONCE  16             /* completions taken by one poll */
#define MAX_WRITE   (1ull << 30)
#define ACK_TIMEOUT 16
#define RETRIES     6
#define HOP_LIMIT   64

_Static_assert(RECVS >= RFM_NET_BURST + 2 * BATCH, "enough receives");

/* what one side has to know of the other */
struct address {
    uint32_t qp;
    uint32_t mtu;
    uint32_t lid;
    uint32_t ring_key;
    uint32_t data_key;
    uint32_t path;
    union ibv_gid gid;
    uint64_t ring;
    uint64_t data;
};

/* what both processes map; the partner reads its orders here */
struct shared {
    uint32_t orders;            /* futex: blocks ordered so far */
    uint32_t ready;             /* futex: the partner serves    */
    uint32_t made[2];           /* addresses are there: caller's, partner's */
    struct rfm_net_order order;
    struct address addresses[2];
    char     why[RFM_VERBS_WHY];
};

/* one side of the connection */
struct end {
    struct verbs_device dev;
    struct ibv_pd *pd;
    struct ibv_comp_channel *events;
    struct ibv_cq *recv_cq;
    struct ibv_cq *send_cq;
    struct ibv_qp *qp;
    uint8_t *lines;             /* LINES that we send, then LINES that we get */
    struct ibv_mr *lines_mr;
    uint8_t *data;              /* what goes up, then what comes down */
    uint64_t data_bytes;        /* of both */
    struct ibv_mr *data_mr;
    struct address peer;
    uint64_t max_write;
    uint32_t inline_bytes;      /* granted */
    uint32_t received;          /* since receives were posted last */
    uint64_t posted;
    uint64_t done;
    uint64_t sent;              /* messages */
    uint64_t got;
    struct ibv_recv_wr recvs[BATCH];
};

struct rfm_pair {
    struct shared *shared;
    struct end end;
    uint64_t armed;
    pid_t    pid;
    int      pidfd;
    int      stop_fd;
    bool     watched;
    pthread_t watcher;
};

static void futex_wait(uint32_t *word, uint32_t seen)
{
    (void)syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

static void futex_wake(uint32_t *word)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* --- messages --------------------------------------------------------------- */

static void link_receives(struct end *e)
{
    for (uint32_t i = 0; i < BATCH; i++) {
        e->recvs[i].next = (i + 1 < BATCH) ? &e->recvs[i + 1] : NULL;
    }
}

static int post_receives(struct end *e)
{
    struct ibv_recv_wr *bad;

    return (ibv_post_recv(e->qp, e->recvs, &bad) == 0) ? 0 : -1;
}

/* how many messages came; -1: it is over */
static inline int receive(struct end *e)
{
    struct ibv_wc wc[AT_ONCE];
    int n = ibv_poll_cq(e->recv_cq, AT_ONCE, wc);

    for (int i = 0; i < n; i++) {
        if (wc[i].status != IBV_WC_SUCCESS) {
            return -1;
        }
    }
    if (n > 0) {
        e->got      += (uint32_t)n;
        e->received += (uint32_t)n;
        if (e->received >= BATCH) {
            e->received -= BATCH;
            if (post_receives(e) < 0) {
                return -1;
            }
        }
    }
    return n;
}

/* The same, of at least one message. The channel is armed when there is nothing
 * left to do, so that this takes none of the time of who waits for us. */
static inline int await(struct end *e, bool sleep)
{
    struct ibv_cq *cq;
    void *context;
    int n;

    do {
        n = receive(e);
    } while ((n == 0) && !sleep);
    while (n == 0) {
        if (ibv_req_notify_cq(e->recv_cq, 1) != 0) {
            return -1;
        }
        n = receive(e);
        if (n != 0) {
            break;
        }
        if (ibv_get_cq_event(e->events, &cq, &context) == 0) {
            ibv_ack_cq_events(cq, 1);
        }
        n = receive(e);
    }
    return n;
}

static int await_room(struct end *e)
{
    while (e->posted - e->done >= DEPTH) {
        struct ibv_wc wc[AT_ONCE];
        int n = ibv_poll_cq(e->send_cq, AT_ONCE, wc);

        if (n < 0) {
            return -1;
        }
        for (int i = 0; i < n; i++) {
            if (wc[i].status != IBV_WC_SUCCESS) {
                return -1;
            }
            e->done = wc[i].wr_id;
        }
    }
    return 0;
}

static inline int post(struct end *e, struct ibv_send_wr *wr,
                       struct ibv_sge *sge)
{
    struct ibv_send_wr *bad;

    if ((e->posted - e->done >= DEPTH) && (await_room(e) < 0)) {
        return -1;
    }
    wr->wr_id   = ++e->posted;
    wr->sg_list = sge;
    wr->num_sge = 1;
    if (e->posted % INTERVAL == 0) {
        wr->send_flags |= IBV_SEND_SIGNALED;
    }
    if (sge->length <= e->inline_bytes) {
        wr->send_flags |= IBV_SEND_INLINE;
    }
    return (ibv_post_send(e->qp, wr, &bad) == 0) ? 0 : -1;
}

static int send_data(struct end *e, uint64_t from, uint64_t bytes)
{
    while (bytes > 0) {
        uint64_t n = (bytes < e->max_write) ? bytes : e->max_write;
        struct ibv_send_wr wr = { .opcode = IBV_WR_RDMA_WRITE };
        struct ibv_sge sge = {
            .addr   = (uint64_t)(uintptr_t)(e->data + from),
            .length = (uint32_t)n,
            .lkey   = e->data_mr->lkey,
        };

        wr.wr.rdma.remote_addr = e->peer.data + from;
        wr.wr.rdma.rkey        = e->peer.data_key;
        if (post(e, &wr, &sge) < 0) {
            return -1;
        }
        from  += n;
        bytes -= n;
    }
    return 0;
}

/* data at `from`, if there is any, then a line that says `seq` */
static inline int send_message(struct end *e, uint64_t from, uint64_t bytes,
                               uint64_t seq)
{
    uint64_t at = (e->sent++ % LINES) * RFM_CACHE_LINE;
    struct ibv_send_wr wr = {
        .opcode     = IBV_WR_RDMA_WRITE_WITH_IMM,
        .send_flags = IBV_SEND_SOLICITED,
        .imm_data   = htonl((uint32_t)(at / RFM_CACHE_LINE)),
    };
    struct ibv_sge sge = {
        .addr   = (uint64_t)(uintptr_t)(e->lines + at),
        .length = RFM_CACHE_LINE,
        .lkey   = e->lines_mr->lkey,
    };

    if ((bytes > 0) && (send_data(e, from, bytes) < 0)) {
        return -1;
    }
    memcpy(e->lines + at, &seq, sizeof(seq));
    wr.wr.rdma.remote_addr = e->peer.ring + at;
    wr.wr.rdma.rkey        = e->peer.ring_key;
    return post(e, &wr, &sge);
}

/* what the line of message number n, from 0, says */
static inline uint64_t said(const struct end *e, uint64_t n)
{
    uint64_t seq;

    memcpy(&seq, e->lines + ((LINES + n % LINES) * RFM_CACHE_LINE),
           sizeof(seq));
    return seq;
}

/* --- one side --------------------------------------------------------------- */

static void close_end(struct end *e)
{
    if (e->qp != NULL) {
        (void)ibv_destroy_qp(e->qp);
    }
    if (e->lines_mr != NULL) {
        (void)ibv_dereg_mr(e->lines_mr);
    }
    if (e->data_mr != NULL) {
        (void)ibv_dereg_mr(e->data_mr);
    }
    if (e->recv_cq != NULL) {
        (void)ibv_destroy_cq(e->recv_cq);
    }
    if (e->send_cq != NULL) {
        (void)ibv_destroy_cq(e->send_cq);
    }
    if (e->events != NULL) {
        (void)ibv_destroy_comp_channel(e->events);
    }
    if (e->pd != NULL) {
        (void)ibv_dealloc_pd(e->pd);
    }
    if (e->dev.ctx != NULL) {
        rfm_verbs_close(&e->dev);
    }
    if (e->lines != NULL) {
        munmap(e->lines, 2 * LINES * RFM_CACHE_LINE);
    }
    if (e->data != NULL) {
        munmap(e->data, e->data_bytes);
    }
}

/* memory as an executor's arena, or as a worker's mirror of it */
static int make_data(struct end *e, uint64_t bytes, bool arena)
{
    int fd = arena ? memfd_create("rfaas-bench-pair", MFD_CLOEXEC) : -1;
    void *data = MAP_FAILED;

    if (!arena || ((fd >= 0) && (ftruncate(fd, (off_t)bytes) == 0))) {
        data = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                    MAP_POPULATE | (arena ? MAP_SHARED
                                          : MAP_PRIVATE | MAP_ANONYMOUS),
                    fd, 0);
    }
    if (fd >= 0) {
        close(fd);
    }
    if (data == MAP_FAILED) {
        return -1;
    }
    memset(data, arena ? 1 : 0, bytes);
    e->data       = data;
    e->data_bytes = bytes;
    e->data_mr    = ibv_reg_mr(e->pd, data, bytes,
                               IBV_ACCESS_LOCAL_WRITE |
                                   IBV_ACCESS_REMOTE_WRITE);
    if (e->data_mr == NULL) {
        return rfm_verbs_no_memory(bytes);
    }
    return 0;
}

static int make_qp(struct end *e)
{
    struct ibv_qp_init_attr attr = {
        .send_cq = e->send_cq,
        .recv_cq = e->recv_cq,
        .cap     = {
            .max_send_wr     = DEPTH,
            .max_recv_wr     = RECVS,
            .max_send_sge    = 1,
            .max_recv_sge    = 1,
            .max_inline_data = 256,
        },
        .qp_type = IBV_QPT_RC,
    };
    struct ibv_qp_attr init = {
        .qp_state        = IBV_QPS_INIT,
        .port_num        = e->dev.port,
        .qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
    };

    e->qp = ibv_create_qp(e->pd, &attr);
    while ((e->qp == NULL) && (attr.cap.max_inline_data > 0)) {
        attr.cap.max_inline_data /= 2;
        if (attr.cap.max_inline_data < RFM_CACHE_LINE) {
            attr.cap.max_inline_data = 0;
        }
        e->qp = ibv_create_qp(e->pd, &attr);
    }
    if (e->qp == NULL) {
        return -1;
    }
    e->inline_bytes = attr.cap.max_inline_data;
    if (ibv_modify_qp(e->qp, &init, IBV_QP_STATE | IBV_QP_PKEY_INDEX |
                                        IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) != 0) {
        return -1;
    }
    link_receives(e);
    for (uint32_t i = 0; i < RECVS / BATCH; i++) {
        if (post_receives(e) < 0) {
            return -1;
        }
    }
    return 0;
}

static int open_end(struct end *e, const char *device, uint64_t data_bytes,
                    bool caller, struct address *address)
{
    memset(e, 0, sizeof(*e));
    if (rfm_verbs_open(device, &e->dev) < 0) {
        e->dev.ctx = NULL;
        return -1;
    }
    e->max_write = (e->dev.attr.max_msg_sz != 0) &&
                           (e->dev.attr.max_msg_sz < MAX_WRITE)
                       ? e->dev.attr.max_msg_sz
                       : MAX_WRITE;
    e->pd     = ibv_alloc_pd(e->dev.ctx);
    e->events = ibv_create_comp_channel(e->dev.ctx);
    if ((e->pd == NULL) || (e->events == NULL)) {
        return -1;
    }
    e->recv_cq = ibv_create_cq(e->dev.ctx, RECVS, NULL, e->events, 0);
    e->send_cq = ibv_create_cq(e->dev.ctx, DEPTH, NULL, NULL, 0);
    e->lines   = mmap(NULL, 2 * LINES * RFM_CACHE_LINE, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (e->lines == MAP_FAILED) {
        e->lines = NULL;
    }
    if ((e->recv_cq == NULL) || (e->send_cq == NULL) || (e->lines == NULL)) {
        return -1;
    }
    e->lines_mr = ibv_reg_mr(e->pd, e->lines, 2 * LINES * RFM_CACHE_LINE,
                             IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    if ((e->lines_mr == NULL) ||
        ((data_bytes > 0) && (make_data(e, data_bytes, caller) < 0)) ||
        (make_qp(e) < 0)) {
        return -1;
    }
    *address = (struct address){
        .qp       = e->qp->qp_num,
        .mtu      = e->dev.attr.active_mtu,
        .lid      = e->dev.attr.lid,
        .ring_key = e->lines_mr->rkey,
        .path     = e->dev.path,
        .gid      = e->dev.gid,
        .ring     = (uint64_t)(uintptr_t)(e->lines + LINES * RFM_CACHE_LINE),
    };
    if (e->data_mr != NULL) {
        address->data     = (uint64_t)(uintptr_t)e->data;
        address->data_key = e->data_mr->rkey;
    }
    return 0;
}

static int connect_end(struct end *e, const struct address *peer)
{
    struct ibv_qp_attr rtr = {
        .qp_state    = IBV_QPS_RTR,
        .path_mtu    = (peer->mtu < e->dev.attr.active_mtu)
                           ? (enum ibv_mtu)peer->mtu
                           : e->dev.attr.active_mtu,
        .dest_qp_num = peer->qp,
        .ah_attr     = { .dlid = (uint16_t)peer->lid, .port_num = e->dev.port },
    };
    struct ibv_qp_attr rts = {
        .qp_state  = IBV_QPS_RTS,
        .timeout   = ACK_TIMEOUT,
        .retry_cnt = RETRIES,
    };

    e->peer = *peer;
    if ((peer->path != RFM_VERBS_INFINIBAND) || (peer->lid == 0)) {
        rtr.ah_attr.is_global      = 1;
        rtr.ah_attr.grh.sgid_index = (uint8_t)e->dev.gid_index;
        rtr.ah_attr.grh.hop_limit  = HOP_LIMIT;
        rtr.ah_attr.grh.dgid       = peer->gid;
    }
    errno = ibv_modify_qp(e->qp, &rtr,
                          IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU |
                              IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                              IBV_QP_MAX_DEST_RD_ATOMIC |
                              IBV_QP_MIN_RNR_TIMER);
    if (errno == 0) {
        errno = ibv_modify_qp(e->qp, &rts,
                              IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                  IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                                  IBV_QP_MAX_QP_RD_ATOMIC);
    }
    return (errno == 0) ? 0 : -1;
}

/* --- the partner ------------------------------------------------------------ */

static void serve(struct end *e, const struct rfm_net_order *order)
{
    uint64_t n = order->count * order->burst;
    uint64_t half = e->data_bytes / 2;
    uint64_t i = 0;

    while (i < n) {
        int came = await(e, order->sleep != 0);

        if (came < 0) {
            _exit(0);
        }
        for (int k = 0; k < came; k++, i++) {
            uint64_t place = (i % order->burst) % order->places;
            uint64_t seq = said(e, e->got - (uint32_t)(came - k));

            if (send_message(e, half + place * order->down, order->down,
                             seq) < 0) {
                _exit(0);
            }
        }
    }
}

static _Noreturn void partner_main(struct shared *shared, const char *device,
                                   uint64_t data_bytes, pid_t parent)
{
    static struct end end;
    uint32_t orders = 0;
    int null_fd = open("/dev/null", O_RDWR);

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
        _exit(0);
    }
    /* Ctrl-C is the caller's to handle: it closes the pair. */
    signal(SIGINT, SIG_IGN);
    /* the partner must not hold the caller's pipes open */
    for (int i = 0; (null_fd >= 0) && (i < 3); i++) {
        dup2(null_fd, i);
    }
    syscall(SYS_close_range, 3u, ~0u, 0u);
    prctl(PR_SET_NAME, "rfaas-bench");
    if (open_end(&end, device, data_bytes, false, &shared->addresses[1]) < 0) {
        const char *why = rfm_verbs_why();

        if (why == NULL) {
            why = strerror(errno);
        }
        snprintf(shared->why, sizeof(shared->why), "%s", why);
        _exit(1);
    }
    rfm_store_release(&shared->made[1], 1);
    while (rfm_load_acquire(&shared->made[0]) == 0) {
        futex_wait(&shared->made[0], 0);
    }
    if (connect_end(&end, &shared->addresses[0]) < 0) {
        _exit(1);
    }
    rfm_store_release(&shared->made[1], 2);
    for (;;) {
        while (rfm_load_acquire(&shared->orders) == orders) {
            futex_wait(&shared->orders, orders);
        }
        orders++;
        rfm_store_release(&shared->ready, orders);
        futex_wake(&shared->ready);
        serve(&end, &shared->order);
    }
}

/* --- the caller ------------------------------------------------------------- */

static _Thread_local char pair_why[RFM_VERBS_WHY];

PAIR_API const char *rfm_pair_why(void)
{
    return (pair_why[0] != 0) ? pair_why : NULL;
}

static void explain(const char *why)
{
    if ((pair_why[0] == 0) && (why != NULL)) {
        snprintf(pair_why, sizeof(pair_why), "%s", why);
    }
}

static bool partner_lives(const struct rfm_pair *pair)
{
    struct pollfd p = { .fd = pair->pidfd, .events = POLLIN };

    return poll(&p, 1, 0) == 0;
}

/* Who waits for a partner that has ended gets his receives back, flushed. */
static void *watch(void *argument)
{
    struct rfm_pair *pair = argument;
    struct ibv_qp_attr attr = { .qp_state = IBV_QPS_ERR };
    struct pollfd p[2] = { { .fd = pair->pidfd, .events = POLLIN },
                           { .fd = pair->stop_fd, .events = POLLIN } };

    while ((poll(p, 2, -1) < 0) && (errno == EINTR)) {
    }
    if (p[1].revents == 0) {
        (void)ibv_modify_qp(pair->end.qp, &attr, IBV_QP_STATE);
    }
    return NULL;
}

static int await_made(struct rfm_pair *pair, uint32_t stage)
{
    while (rfm_load_acquire(&pair->shared->made[1]) < stage) {
        if (!partner_lives(pair)) {
            explain(pair->shared->why);
            return -1;
        }
        usleep(100);
    }
    return 0;
}

static int connect_pair(struct rfm_pair *pair, const char *device,
                        uint64_t data_bytes)
{
    struct shared *shared = pair->shared;
    sigset_t all;
    sigset_t before;
    int rc;

    if ((await_made(pair, 1) < 0) ||
        (open_end(&pair->end, device, data_bytes, true,
                  &shared->addresses[0]) < 0) ||
        (connect_end(&pair->end, &shared->addresses[1]) < 0)) {
        return -1;
    }
    rfm_store_release(&shared->made[0], 1);
    futex_wake(&shared->made[0]);
    if (await_made(pair, 2) < 0) {
        return -1;
    }
    pair->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (pair->stop_fd < 0) {
        return -1;
    }
    /* signals are for the caller's own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    rc = pthread_create(&pair->watcher, NULL, watch, pair);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pair->watched = rc == 0;
    errno         = rc;
    return (rc == 0) ? 0 : -1;
}

PAIR_API void rfm_pair_close(struct rfm_pair *pair)
{
    uint64_t one = 1;

    if (pair == NULL) {
        return;
    }
    if (pair->watched && (write(pair->stop_fd, &one, sizeof(one)) > 0)) {
        pthread_join(pair->watcher, NULL);
    }
    kill(pair->pid, SIGKILL);
    while ((waitpid(pair->pid, NULL, 0) < 0) && (errno == EINTR)) {
    }
    close_end(&pair->end);
    if (pair->stop_fd >= 0) {
        close(pair->stop_fd);
    }
    close(pair->pidfd);
    munmap(pair->shared, PAGE);
    free(pair);
}

PAIR_API int rfm_pair_open(const char *device, uint64_t data_bytes, int cpu,
                           struct rfm_pair **pair_p)
{
    uint64_t room = 2 * ((data_bytes + PAGE - 1) & ~(uint64_t)(PAGE - 1));
    pid_t parent = getpid();
    struct rfm_pair *pair;
    cpu_set_t cpus;
    int code;

    pair_why[0] = 0;
    rfm_verbs_begin();
    if ((pair_p == NULL) || (data_bytes > (UINT64_C(1) << 40)) ||
        (cpu >= CPU_SETSIZE)) {
        return RFM_BENCH_INVALID;
    }
    pair = calloc(1, sizeof(*pair));
    if (pair == NULL) {
        return RFM_BENCH_SYSTEM;
    }
    pair->stop_fd = -1;
    pair->shared  = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (pair->shared == MAP_FAILED) {
        free(pair);
        return RFM_BENCH_SYSTEM;
    }
    pair->pid = fork();
    if (pair->pid == 0) {
        partner_main(pair->shared, device, room, parent);
    }
    if (pair->pid < 0) {
        munmap(pair->shared, PAGE);
        free(pair);
        return RFM_BENCH_SYSTEM;
    }
    pair->pidfd = (int)syscall(SYS_pidfd_open, pair->pid, 0u);
    if (pair->pidfd < 0) {
        goto err;
    }
    if (cpu >= 0) {
        CPU_ZERO(&cpus);
        CPU_SET(cpu, &cpus);
        if (sched_setaffinity(pair->pid, sizeof(cpus), &cpus) != 0) {
            goto err;
        }
    }
    if (connect_pair(pair, device, room) < 0) {
        goto err;
    }
    *pair_p = pair;
    return RFM_BENCH_OK;

err:
    code = errno;
    explain(rfm_verbs_why());
    rfm_pair_close(pair);
    errno = code;
    return RFM_BENCH_SYSTEM;
}

PAIR_API int rfm_pair_pid(const struct rfm_pair *pair)
{
    return pair->pid;
}

PAIR_API int rfm_pair_arm(struct rfm_pair *pair,
                          const struct rfm_net_order *order)
{
    struct shared *shared = pair->shared;
    uint64_t room = pair->end.data_bytes / 2;
    uint32_t orders;

    if ((order->burst == 0) || (order->burst > RFM_NET_BURST) ||
        (order->places == 0) || (order->up > room / order->places) ||
        (order->down > room / order->places) || (pair->armed != 0)) {
        return RFM_BENCH_INVALID;
    }
    shared->order = *order;
    orders        = shared->orders + 1;
    rfm_store_release(&shared->orders, orders);
    futex_wake(&shared->orders);
    /* its wake-up is not part of what is measured */
    while (rfm_load_acquire(&shared->ready) != orders) {
        if (!partner_lives(pair)) {
            return RFM_BENCH_LOST;
        }
    }
    pair->armed = order->count;
    return RFM_BENCH_OK;
}

static int call(struct end *e, const struct rfm_net_order *order, uint64_t seq)
{
    uint32_t burst = order->burst;
    uint32_t sent = 0;
    uint32_t got = 0;

    while (got < burst) {
        int n;

        if (sent < burst) {
            if (send_message(e, (sent % order->places) * order->up, order->up,
                             seq) < 0) {
                return RFM_BENCH_LOST;
            }
            sent++;
        }
        n = (sent < burst) ? receive(e) : await(e, order->sleep != 0);
        if (n < 0) {
            return RFM_BENCH_LOST;
        }
        got += (uint32_t)n;
    }
    return (said(e, e->got - 1) == seq) ? RFM_BENCH_OK : RFM_BENCH_WRONG;
}

PAIR_API int64_t rfm_pair_calls(struct rfm_pair *pair, uint64_t count,
                                int64_t *samples)
{
    struct rfm_net_order order = pair->shared->order;
    uint64_t begin = rfm_now_ns();
    int64_t total = 0;

    if (count > pair->armed) {
        return RFM_BENCH_INVALID;
    }
    pair->armed -= count;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t start = (samples != NULL) ? rfm_now_ns() : 0;
        int rc = call(&pair->end, &order, pair->end.sent + 1);

        if (rc != RFM_BENCH_OK) {
            return rc;
        }
        if (samples != NULL) {
            samples[i] = (int64_t)(rfm_now_ns() - start);
            total     += samples[i];
        }
    }
    return (samples != NULL) ? total : (int64_t)(rfm_now_ns() - begin);
}

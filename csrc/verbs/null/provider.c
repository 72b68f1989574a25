/*
 * A device that is none: what libibverbs offers, over this machine's memory.
 *
 * Linked in libibverbs' place, so that the verbs transport runs, is tested and
 * is measured where there is no device and no driver. A write is complete when
 * it was posted: memcpy within a process, process_vm_writev to another one.
 * State that processes share lies in the file that RFM_NULL_DEVICE names;
 * without it, a process talks to itself only. RFM_NULL_INLINE: how much may be
 * sent inline (at most).
 *
 * It is as strict as hardware: keys, bounds, access, states and receives are
 * checked, errors flush queues, and nothing is written to a queue pair that is
 * in the error state. A lock holds the number of its process, so that it can be
 * taken from a dead one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "provider.h"

#undef ibv_reg_mr
#undef ibv_query_port

#define MAX_QPS   1024u
#define MAX_CQS   128u
#define MAX_MRS   8192u
#define MAX_CQE   8192u
#define MAX_WR    512u
#define MOST_INLINE 256u
#define LINE      __attribute__((aligned(64)))

enum armed { ARMED_NOT, ARMED_ANY, ARMED_SOLICITED };

struct shared_qp {
    LINE uint32_t lock;
    uint32_t owner;             /* atomic: pid; 0: free */
    uint32_t number;            /* atomic */
    uint32_t state;             /* atomic: read by who sends without the lock */
    uint32_t peer;
    uint32_t access;
    uint32_t domain;
    uint32_t cq;
    uint32_t head;              /* of the receives */
    uint32_t tail;
    uint64_t receives[MAX_WR];
};

struct shared_cq {
    LINE uint32_t lock;
    uint32_t owner;
    uint32_t armed;
    uint32_t event;             /* number of its channel */
    uint32_t head;              /* atomic */
    LINE uint32_t tail;         /* atomic */
    struct ibv_wc entries[MAX_CQE];
};

struct shared_mr {
    uint32_t owner;             /* atomic: pid; 0: free, 1: being made */
    uint32_t key;               /* atomic */
    uint32_t domain;
    uint32_t access;
    uint64_t base;
    uint64_t bytes;
};

struct shared {
    uint32_t down;              /* the port */
    uint32_t generation;
    uint32_t domains;
    struct shared_mr mrs[MAX_MRS];
    struct shared_qp qps[MAX_QPS];
    struct shared_cq cqs[MAX_CQS];
};

struct null_context {
    struct ibv_context ctx;
    uint32_t me;
};

struct null_pd {
    struct ibv_pd pd;
    uint32_t domain;
};

struct null_mr {
    struct ibv_mr mr;
    struct shared_mr *at;
};

struct null_cq {
    struct ibv_cq cq;
    struct shared_cq *at;
    uint32_t index;
};

struct null_qp {
    struct ibv_qp qp;
    struct shared_qp *at;
    struct ibv_qp_cap cap;
    uint32_t me;
};

static struct shared *shared;   /* never unmapped */
static uint32_t mapped_by;      /* the process that did so */
static pthread_mutex_t map_lock = PTHREAD_MUTEX_INITIALIZER;
static int fail_after;           /* registrations; 0: none is to fail */
static bool alone;              /* rfm_null_alone */
static uint32_t n_contexts;

/* --- locks ------------------------------------------------------------------ */

/* also if nobody has reaped it yet */
static bool is_dead(uint32_t pid)
{
    char path[32];
    char text[512];
    const char *state;
    ssize_t n;
    int fd;

    if (pid <= 1) {
        return false;
    }
    snprintf(path, sizeof(path), "/proc/%u/stat", pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return errno == ENOENT;
    }
    n = read(fd, text, sizeof(text) - 1);
    close(fd);
    text[(n > 0) ? n : 0] = 0;
    state = strrchr(text, ')');
    return (n <= 0) || (state == NULL) || (state[2] == 'Z') || (state[2] == 'X');
}

static void take(uint32_t *lock, uint32_t me)
{
    uint32_t turns = 0;

    while (!alone) {
        uint32_t holder = 0;

        if (__atomic_compare_exchange_n(lock, &holder, me, false,
                                        __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
            return;
        }
        if (++turns % 1024 == 0) {
            if (is_dead(holder) &&
                __atomic_compare_exchange_n(lock, &holder, me, false,
                                            __ATOMIC_ACQUIRE,
                                            __ATOMIC_RELAXED)) {
                return;
            }
        }
        if (turns % 64 == 0) {
            sched_yield();
        }
    }
}

void rfm_null_alone(bool yes)
{
    alone = yes;
}

static void give(uint32_t *lock)
{
    __atomic_store_n(lock, 0, __ATOMIC_RELEASE);
}

/* a free entry, or one whose process is no more */
static bool claim(uint32_t *owner, uint32_t me)
{
    uint32_t was = __atomic_load_n(owner, __ATOMIC_RELAXED);

    return ((was == 0) || is_dead(was)) &&
           __atomic_compare_exchange_n(owner, &was, me, false, __ATOMIC_ACQUIRE,
                                       __ATOMIC_RELAXED);
}

/* --- what processes share --------------------------------------------------- */

static bool map_locked(void)
{
    const char *path = getenv("RFM_NULL_DEVICE");
    void *base;
    int fd = -1;

    if ((shared != NULL) && (mapped_by == (uint32_t)getpid())) {
        return true;
    }
    if (path != NULL) {
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if ((fd < 0) || (ftruncate(fd, sizeof(*shared)) != 0)) {
            return false;
        }
    }
    base = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
                (fd >= 0) ? MAP_SHARED : MAP_SHARED | MAP_ANONYMOUS, fd, 0);
    if (fd >= 0) {
        close(fd);
    }
    if (base == MAP_FAILED) {
        return false;
    }
    shared    = base;
    mapped_by = (uint32_t)getpid();
    return true;
}

static bool map_shared(void)
{
    bool done;

    pthread_mutex_lock(&map_lock);
    done = map_locked();
    pthread_mutex_unlock(&map_lock);
    return done;
}

static socklen_t name_of(struct sockaddr_un *at, const char *what, uint32_t pid,
                         uint32_t index)
{
    int n;

    memset(at, 0, sizeof(*at));
    at->sun_family = AF_UNIX;
    n = snprintf(at->sun_path + 1, sizeof(at->sun_path) - 1,
                 "rfm-null-%s-%u-%u", what, pid, index);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

static int listen_as(const char *what, uint32_t pid, uint32_t index)
{
    struct sockaddr_un at;
    socklen_t n = name_of(&at, what, pid, index);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if ((fd >= 0) && (bind(fd, (struct sockaddr *)&at, n) != 0)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static void tell(const char *what, uint32_t pid, uint32_t index,
                 const void *bytes, size_t length)
{
    struct sockaddr_un at;
    socklen_t n = name_of(&at, what, pid, index);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd >= 0) {
        (void)sendto(fd, bytes, length, MSG_DONTWAIT | MSG_NOSIGNAL,
                     (struct sockaddr *)&at, n);
        close(fd);
    }
}

/* --- devices ---------------------------------------------------------------- */

static struct ibv_device device = {
    .node_type      = IBV_NODE_CA,
    .transport_type = IBV_TRANSPORT_IB,
    .name           = "null0",
};

struct ibv_device **ibv_get_device_list(int *num_devices)
{
    struct ibv_device **list = calloc(2, sizeof(*list));

    if (list != NULL) {
        list[0] = &device;
        if (num_devices != NULL) {
            *num_devices = 1;
        }
    }
    return list;
}

void ibv_free_device_list(struct ibv_device **list)
{
    free(list);
}

const char *ibv_get_device_name(struct ibv_device *dev)
{
    return dev->name;
}

static int poll_cq(struct ibv_cq *cq, int n, struct ibv_wc *wc);
static int req_notify_cq(struct ibv_cq *cq, int solicited_only);
static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr,
                     struct ibv_send_wr **bad_wr);
static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr,
                     struct ibv_recv_wr **bad_wr);

struct ibv_context *ibv_open_device(struct ibv_device *dev)
{
    struct null_context *null = calloc(1, sizeof(*null));
    uint32_t index = __atomic_fetch_add(&n_contexts, 1, __ATOMIC_RELAXED);

    if ((null == NULL) || !map_shared()) {
        free(null);
        return NULL;
    }
    (void)prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    null->me                    = (uint32_t)getpid();
    null->ctx.device            = dev;
    null->ctx.ops.poll_cq       = poll_cq;
    null->ctx.ops.req_notify_cq = req_notify_cq;
    null->ctx.ops.post_send     = post_send;
    null->ctx.ops.post_recv     = post_recv;
    null->ctx.cmd_fd            = -1;
    null->ctx.async_fd          = listen_as("async", null->me, index);
    if (null->ctx.async_fd < 0) {
        free(null);
        return NULL;
    }
    return &null->ctx;
}

int ibv_close_device(struct ibv_context *ctx)
{
    close(ctx->async_fd);
    free(ctx);
    return 0;
}

int ibv_query_device(struct ibv_context *ctx, struct ibv_device_attr *attr)
{
    (void)ctx;
    *attr = (struct ibv_device_attr){
        .fw_ver        = "none",
        .max_mr_size   = UINT64_MAX,
        .max_qp        = MAX_QPS,
        .max_qp_wr     = MAX_WR,
        .max_sge       = 1,
        .max_cq        = MAX_CQS,
        .max_cqe       = MAX_CQE,
        .max_mr        = MAX_MRS,
        .phys_port_cnt = 1,
    };
    return 0;
}

int ibv_query_port(struct ibv_context *ctx, uint8_t port,
                   struct _compat_ibv_port_attr *compat)
{
    struct ibv_port_attr *attr = (struct ibv_port_attr *)compat;

    (void)ctx;
    if (port != 1) {
        return EINVAL;
    }
    attr->state       = (__atomic_load_n(&shared->down, __ATOMIC_ACQUIRE) != 0)
                            ? IBV_PORT_DOWN
                            : IBV_PORT_ACTIVE;
    attr->max_mtu     = IBV_MTU_4096;
    attr->active_mtu  = IBV_MTU_4096;
    attr->gid_tbl_len = 3;
    attr->max_msg_sz  = 1u << 30;
    attr->link_layer  = IBV_LINK_LAYER_ETHERNET;
    return 0;
}

int _ibv_query_gid_ex(struct ibv_context *ctx, uint32_t port, uint32_t index,
                      struct ibv_gid_entry *entry, uint32_t flags, size_t bytes)
{
    static const uint8_t local[16] = { 0xfe, 0x80, [15] = 1 };
    static const uint8_t mapped[16] = { [10] = 0xff, 0xff, 127, 0, 0, 1 };

    (void)ctx;
    (void)flags;
    (void)bytes;
    if ((index >= 3) || (port != 1)) {
        return ENODATA;
    }
    entry->gid_index = index;
    entry->port_num  = port;
    entry->gid_type  = (index == 0) ? IBV_GID_TYPE_ROCE_V1
                                    : IBV_GID_TYPE_ROCE_V2;
    memcpy(entry->gid.raw, (index == 2) ? mapped : local, 16);
    return 0;
}

enum ibv_fork_status ibv_is_fork_initialized(void)
{
    return IBV_FORK_UNNEEDED;
}

int ibv_fork_init(void)
{
    return 0;
}

/* --- memory ----------------------------------------------------------------- */

struct ibv_pd *ibv_alloc_pd(struct ibv_context *ctx)
{
    struct null_pd *null = calloc(1, sizeof(*null));

    if (null == NULL) {
        return NULL;
    }
    null->pd.context = ctx;
    null->domain     = __atomic_add_fetch(&shared->domains, 1, __ATOMIC_RELAXED);
    return &null->pd;
}

int ibv_dealloc_pd(struct ibv_pd *pd)
{
    free(pd);
    return 0;
}

void rfm_null_fail_registration(int skip)
{
    __atomic_store_n(&fail_after, skip + 1, __ATOMIC_RELAXED);
}

static void put(uint32_t *to, uint32_t value)
{
    __atomic_store_n(to, value, __ATOMIC_RELAXED);
}

static uint32_t get(const uint32_t *from)
{
    return __atomic_load_n(from, __ATOMIC_RELAXED);
}

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length,
                                uint64_t iova, unsigned int access)
{
    uint32_t me = ((struct null_context *)pd->context)->me;
    struct null_mr *null;

    (void)iova;
    if ((__atomic_load_n(&fail_after, __ATOMIC_RELAXED) > 0) &&
        (__atomic_sub_fetch(&fail_after, 1, __ATOMIC_RELAXED) == 0)) {
        errno = ENOMEM;
        return NULL;
    }
    null = calloc(1, sizeof(*null));
    for (uint32_t i = 1; (null != NULL) && (i < MAX_MRS); i++) {
        struct shared_mr *at = &shared->mrs[i];

        if (!claim(&at->owner, 1)) {
            continue;
        }
        /* a key that is no more may be looked up just now */
        put(&at->domain, ((struct null_pd *)pd)->domain);
        put(&at->access, access);
        __atomic_store_n(&at->base, (uint64_t)(uintptr_t)addr, __ATOMIC_RELAXED);
        __atomic_store_n(&at->bytes, length, __ATOMIC_RELAXED);
        put(&at->key, i | (__atomic_add_fetch(&shared->generation, 1,
                                              __ATOMIC_RELAXED)
                           << 13));
        __atomic_store_n(&at->owner, me, __ATOMIC_RELEASE);
        null->at         = at;
        null->mr.context = pd->context;
        null->mr.pd      = pd;
        null->mr.addr    = addr;
        null->mr.length  = length;
        null->mr.lkey    = get(&at->key);
        null->mr.rkey    = get(&at->key);
        return &null->mr;
    }
    free(null);
    errno = ENOMEM;
    return NULL;
}

struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length,
                          int access)
{
    return ibv_reg_mr_iova2(pd, addr, length, (uintptr_t)addr,
                            (unsigned int)access);
}

int ibv_dereg_mr(struct ibv_mr *mr)
{
    struct shared_mr *at = ((struct null_mr *)mr)->at;

    __atomic_store_n(&at->key, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&at->owner, 0, __ATOMIC_RELEASE);
    free(mr);
    return 0;
}

/* is this memory of `owner`, for that? */
static bool may(uint32_t key, uint32_t owner, uint32_t domain, uint64_t at,
                uint64_t bytes, uint32_t access)
{
    const struct shared_mr *mr = &shared->mrs[key % MAX_MRS];
    uint64_t base;
    uint64_t size;

    if (__atomic_load_n(&mr->owner, __ATOMIC_ACQUIRE) != owner) {
        return false;
    }
    base = __atomic_load_n(&mr->base, __ATOMIC_RELAXED);
    size = __atomic_load_n(&mr->bytes, __ATOMIC_RELAXED);
    return (get(&mr->key) == key) && (get(&mr->domain) == domain) &&
           ((get(&mr->access) & access) == access) && (at >= base) &&
           (at - base <= size) && (bytes <= size - (at - base));
}

/* --- completion queues ------------------------------------------------------ */

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *ctx)
{
    struct ibv_comp_channel *channel = calloc(1, sizeof(*channel));

    if (channel == NULL) {
        return NULL;
    }
    channel->context = ctx;
    channel->refcnt  = (int)__atomic_add_fetch(&shared->generation, 1,
                                               __ATOMIC_RELAXED);
    channel->fd = listen_as("cq", ((struct null_context *)ctx)->me,
                            (uint32_t)channel->refcnt);
    if (channel->fd < 0) {
        free(channel);
        return NULL;
    }
    return channel;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
    close(channel->fd);
    free(channel);
    return 0;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *ctx, int cqe, void *cq_context,
                             struct ibv_comp_channel *channel, int comp_vector)
{
    struct null_cq *null = calloc(1, sizeof(*null));
    uint32_t me = ((struct null_context *)ctx)->me;

    (void)comp_vector;
    for (uint32_t i = 0; (null != NULL) && (i < MAX_CQS); i++) {
        struct shared_cq *cq = &shared->cqs[i];

        if (!claim(&cq->owner, me)) {
            continue;
        }
        cq->head  = 0;
        cq->tail  = 0;
        cq->armed = ARMED_NOT;
        cq->event = (channel != NULL) ? (uint32_t)channel->refcnt : 0;
        null->at            = cq;
        null->index         = i;
        null->cq.context    = ctx;
        null->cq.channel    = channel;
        null->cq.cq_context = cq_context;
        null->cq.cqe        = cqe;
        return &null->cq;
    }
    free(null);
    errno = ENOMEM;
    return NULL;
}

int ibv_resize_cq(struct ibv_cq *cq, int cqe)
{
    if ((uint32_t)cqe > MAX_CQE) {
        return EINVAL;
    }
    cq->cqe = cqe;
    return 0;
}

int ibv_destroy_cq(struct ibv_cq *cq)
{
    __atomic_store_n(&((struct null_cq *)cq)->at->owner, 0, __ATOMIC_RELEASE);
    free(cq);
    return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq,
                     void **cq_context)
{
    uint64_t at;

    if (recv(channel->fd, &at, sizeof(at), 0) != (ssize_t)sizeof(at)) {
        return -1;
    }
    *cq         = NULL;
    *cq_context = NULL;
    return 0;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned int n)
{
    (void)cq;
    (void)n;
}

static int req_notify_cq(struct ibv_cq *base, int solicited_only)
{
    struct null_cq *null = (struct null_cq *)base;
    uint32_t me = ((struct null_context *)base->context)->me;

    take(&null->at->lock, me);
    if ((solicited_only == 0) || (null->at->armed == ARMED_NOT)) {
        null->at->armed = (solicited_only != 0) ? ARMED_SOLICITED : ARMED_ANY;
    }
    give(&null->at->lock);
    return 0;
}

static void complete(uint32_t index, uint32_t me, const struct ibv_wc *wc,
                     bool solicited)
{
    struct shared_cq *cq = &shared->cqs[index];
    bool wake = false;
    uint32_t owner;
    uint32_t event;

    take(&cq->lock, me);
    owner = cq->owner;
    event = cq->event;
    if (cq->head - __atomic_load_n(&cq->tail, __ATOMIC_ACQUIRE) == MAX_CQE) {
        fprintf(stderr, "null provider: a completion queue overran\n");
        abort();
    }
    cq->entries[cq->head % MAX_CQE] = *wc;
    __atomic_store_n(&cq->head, cq->head + 1, __ATOMIC_RELEASE);
    if ((cq->armed == ARMED_ANY) ||
        ((cq->armed == ARMED_SOLICITED) &&
         (solicited || (wc->status != IBV_WC_SUCCESS)))) {
        cq->armed = ARMED_NOT;
        wake      = true;
    }
    give(&cq->lock);
    if (wake) {
        uint64_t word = index;

        tell("cq", owner, event, &word, sizeof(word));
    }
}

static int poll_cq(struct ibv_cq *base, int n, struct ibv_wc *wc)
{
    struct shared_cq *cq = ((struct null_cq *)base)->at;
    uint32_t tail = __atomic_load_n(&cq->tail, __ATOMIC_RELAXED);
    int got = 0;

    if (__atomic_load_n(&cq->head, __ATOMIC_RELAXED) == tail) {
        return 0;
    }
    take(&cq->lock, ((struct null_context *)base->context)->me);
    tail = cq->tail;
    while ((got < n) && (tail != cq->head)) {
        wc[got++] = cq->entries[tail++ % MAX_CQE];
    }
    __atomic_store_n(&cq->tail, tail, __ATOMIC_RELEASE);
    give(&cq->lock);
    return got;
}

/* --- queue pairs ------------------------------------------------------------ */

static void set_state(struct shared_qp *at, uint32_t state)
{
    __atomic_store_n(&at->state, state, __ATOMIC_RELEASE);
}

static uint32_t state_of(const struct shared_qp *at)
{
    return __atomic_load_n(&at->state, __ATOMIC_ACQUIRE);
}

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
    struct null_qp *null = calloc(1, sizeof(*null));
    uint32_t me = ((struct null_context *)pd->context)->me;
    const char *text = getenv("RFM_NULL_INLINE");
    uint32_t most = (text != NULL) ? (uint32_t)atoi(text) : MOST_INLINE;

    if ((attr->cap.max_inline_data > most) || (attr->cap.max_send_wr > MAX_WR) ||
        (attr->cap.max_recv_wr > MAX_WR)) {
        free(null);
        errno = EINVAL;
        return NULL;
    }
    for (uint32_t i = 1; (null != NULL) && (i < MAX_QPS); i++) {
        struct shared_qp *at = &shared->qps[i];

        if (!claim(&at->owner, me)) {
            continue;
        }
        take(&at->lock, me);
        set_state(at, IBV_QPS_RESET);
        at->peer   = 0;
        at->access = 0;
        at->head   = 0;
        at->tail   = 0;
        at->domain = ((struct null_pd *)pd)->domain;
        at->cq     = ((struct null_cq *)attr->recv_cq)->index;
        at->number = (i | (__atomic_add_fetch(&shared->generation, 1,
                                              __ATOMIC_RELAXED)
                           << 10)) &
                     0xffffffu;
        give(&at->lock);
        null->at            = at;
        null->me            = me;
        null->cap           = attr->cap;
        null->qp.context    = pd->context;
        null->qp.qp_context = attr->qp_context;
        null->qp.pd         = pd;
        null->qp.send_cq    = attr->send_cq;
        null->qp.recv_cq    = attr->recv_cq;
        null->qp.qp_num     = at->number;
        null->qp.qp_type    = attr->qp_type;
        return &null->qp;
    }
    free(null);
    errno = ENOMEM;
    return NULL;
}

int ibv_query_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask,
                 struct ibv_qp_init_attr *init_attr)
{
    (void)mask;
    memset(attr, 0, sizeof(*attr));
    memset(init_attr, 0, sizeof(*init_attr));
    attr->qp_state = (enum ibv_qp_state)state_of(((struct null_qp *)qp)->at);
    attr->cap      = ((struct null_qp *)qp)->cap;
    init_attr->cap = attr->cap;
    return 0;
}

/* its lock is held: nothing is received any more */
static void break_qp(struct shared_qp *at, uint32_t me)
{
    set_state(at, IBV_QPS_ERR);
    while (at->head != at->tail) {
        struct ibv_wc wc = {
            .wr_id  = at->receives[at->tail++ % MAX_WR],
            .status = IBV_WC_WR_FLUSH_ERR,
            .opcode = IBV_WC_RECV,
            .qp_num = at->number,
        };

        complete(at->cq, me, &wc, true);
    }
}

int ibv_modify_qp(struct ibv_qp *base, struct ibv_qp_attr *attr, int mask)
{
    struct null_qp *null = (struct null_qp *)base;
    struct shared_qp *at = null->at;
    int rc = 0;

    take(&at->lock, null->me);
    if (attr->qp_state == IBV_QPS_ERR) {
        break_qp(at, null->me);
    } else if ((attr->qp_state == IBV_QPS_INIT) && (at->state == IBV_QPS_RESET)) {
        at->access = attr->qp_access_flags;
        set_state(at, IBV_QPS_INIT);
    } else if ((attr->qp_state == IBV_QPS_RTR) && (at->state == IBV_QPS_INIT) &&
               ((mask & IBV_QP_AV) != 0) && (attr->ah_attr.is_global == 1)) {
        at->peer = attr->dest_qp_num;
        set_state(at, IBV_QPS_RTR);
    } else if ((attr->qp_state == IBV_QPS_RTS) && (at->state == IBV_QPS_RTR)) {
        set_state(at, IBV_QPS_RTS);
    } else {
        rc = EINVAL;
    }
    give(&at->lock);
    return rc;
}

int ibv_destroy_qp(struct ibv_qp *base)
{
    struct null_qp *null = (struct null_qp *)base;

    take(&null->at->lock, null->me);
    set_state(null->at, IBV_QPS_RESET);
    null->at->number = 0;
    give(&null->at->lock);
    __atomic_store_n(&null->at->owner, 0, __ATOMIC_RELEASE);
    free(null);
    return 0;
}

static int post_recv(struct ibv_qp *base, struct ibv_recv_wr *wr,
                     struct ibv_recv_wr **bad_wr)
{
    struct null_qp *null = (struct null_qp *)base;
    struct shared_qp *at = null->at;
    int rc = 0;

    take(&at->lock, null->me);
    for (; (wr != NULL) && (rc == 0); wr = wr->next) {
        if ((at->state == IBV_QPS_RESET) ||
            (at->head - at->tail >= null->cap.max_recv_wr)) {
            *bad_wr = wr;
            rc      = (at->state == IBV_QPS_RESET) ? EINVAL : ENOMEM;
            break;
        }
        at->receives[at->head++ % MAX_WR] = wr->wr_id;
    }
    if (at->state == IBV_QPS_ERR) {
        break_qp(at, null->me);
    }
    give(&at->lock);
    return rc;
}

/* --- moving data ------------------------------------------------------------ */

static bool copy(uint32_t owner, uint32_t me, uint64_t to, const void *from,
                 uint64_t bytes)
{
    struct iovec here = { (void *)(uintptr_t)from, bytes };
    struct iovec there = { (void *)(uintptr_t)to, bytes };

    if (owner == me) {
        memcpy((void *)(uintptr_t)to, from, bytes);
        return true;
    }
    while (here.iov_len > 0) {
        ssize_t n = process_vm_writev((pid_t)owner, &here, 1, &there, 1, 0);

        if (n <= 0) {
            return false;
        }
        here.iov_base  = (uint8_t *)here.iov_base + n;
        there.iov_base = (uint8_t *)there.iov_base + n;
        here.iov_len  -= (size_t)n;
        there.iov_len -= (size_t)n;
    }
    return true;
}

/* With the receiver's lock held. */
static enum ibv_wc_status deliver(struct null_qp *null, struct shared_qp *peer,
                                  const struct ibv_send_wr *wr, uint64_t bytes)
{
    uint32_t owner = __atomic_load_n(&peer->owner, __ATOMIC_RELAXED);
    bool imm = wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM;

    if (!imm && (wr->opcode != IBV_WR_RDMA_WRITE)) {
        break_qp(peer, null->me);
        return IBV_WC_REM_INV_REQ_ERR;
    }
    if ((peer->number == 0) || (peer->number != null->at->peer) ||
        (peer->peer != null->at->number) ||
        ((peer->state != IBV_QPS_RTR) && (peer->state != IBV_QPS_RTS)) ||
        (__atomic_load_n(&shared->down, __ATOMIC_ACQUIRE) != 0)) {
        return IBV_WC_RETRY_EXC_ERR;
    }
    if ((bytes > 0) &&
        (((peer->access & IBV_ACCESS_REMOTE_WRITE) == 0) ||
         !may(wr->wr.rdma.rkey, owner, peer->domain, wr->wr.rdma.remote_addr,
              bytes, IBV_ACCESS_REMOTE_WRITE))) {
        break_qp(peer, null->me);
        return IBV_WC_REM_ACCESS_ERR;
    }
    if (imm && (peer->head == peer->tail)) {
        return IBV_WC_RNR_RETRY_EXC_ERR;
    }
    if ((bytes > 0) &&
        !copy(owner, null->me, wr->wr.rdma.remote_addr,
              (const void *)(uintptr_t)wr->sg_list[0].addr, bytes)) {
        return IBV_WC_RETRY_EXC_ERR;
    }
    if (imm) {
        struct ibv_wc wc = {
            .wr_id    = peer->receives[peer->tail++ % MAX_WR],
            .status   = IBV_WC_SUCCESS,
            .opcode   = IBV_WC_RECV_RDMA_WITH_IMM,
            .byte_len = (uint32_t)bytes,
            .imm_data = wr->imm_data,
            .qp_num   = peer->number,
            .wc_flags = IBV_WC_WITH_IMM,
        };

        complete(peer->cq, null->me, &wc,
                 (wr->send_flags & IBV_SEND_SOLICITED) != 0);
    }
    return IBV_WC_SUCCESS;
}

static enum ibv_wc_status send_one(struct null_qp *null,
                                   const struct ibv_send_wr *wr)
{
    uint64_t bytes = (wr->num_sge > 0) ? wr->sg_list[0].length : 0;
    struct shared_qp *peer = &shared->qps[null->at->peer % MAX_QPS];
    enum ibv_wc_status status;

    if (state_of(null->at) == IBV_QPS_ERR) {
        return IBV_WC_WR_FLUSH_ERR;
    }
    if (((wr->send_flags & IBV_SEND_INLINE) == 0) && (bytes > 0) &&
        !may(wr->sg_list[0].lkey, null->me, null->at->domain,
             wr->sg_list[0].addr, bytes, 0)) {
        return IBV_WC_LOC_PROT_ERR;
    }
    take(&peer->lock, null->me);
    status = deliver(null, peer, wr, bytes);
    give(&peer->lock);
    return status;
}

static int post_send(struct ibv_qp *base, struct ibv_send_wr *wr,
                     struct ibv_send_wr **bad_wr)
{
    struct null_qp *null = (struct null_qp *)base;

    for (; wr != NULL; wr = wr->next) {
        enum ibv_wc_status status;
        uint32_t state = state_of(null->at);

        if ((state != IBV_QPS_RTS) && (state != IBV_QPS_ERR)) {
            *bad_wr = wr;
            return EINVAL;
        }
        if (((wr->send_flags & IBV_SEND_INLINE) != 0) && (wr->num_sge > 0) &&
            (wr->sg_list[0].length > null->cap.max_inline_data)) {
            *bad_wr = wr;
            return ENOMEM;
        }
        status = send_one(null, wr);
        if ((status != IBV_WC_SUCCESS) ||
            ((wr->send_flags & IBV_SEND_SIGNALED) != 0)) {
            struct ibv_wc wc = {
                .wr_id  = wr->wr_id,
                .status = status,
                .opcode = IBV_WC_RDMA_WRITE,
                .qp_num = null->qp.qp_num,
            };

            complete(((struct null_cq *)base->send_cq)->index, null->me, &wc,
                     false);
        }
        if ((status != IBV_WC_SUCCESS) && (status != IBV_WC_WR_FLUSH_ERR)) {
            take(&null->at->lock, null->me);
            break_qp(null->at, null->me);
            give(&null->at->lock);
        }
    }
    return 0;
}

/* --- what happens to the device --------------------------------------------- */

void rfm_null_port(bool up)
{
    uint32_t n = __atomic_load_n(&n_contexts, __ATOMIC_RELAXED);
    uint64_t event = up ? IBV_EVENT_PORT_ACTIVE : IBV_EVENT_PORT_ERR;

    if (!map_shared()) {
        return;
    }
    __atomic_store_n(&shared->down, up ? 0 : 1, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < n; i++) {
        tell("async", (uint32_t)getpid(), i, &event, sizeof(event));
    }
}

int ibv_get_async_event(struct ibv_context *ctx, struct ibv_async_event *event)
{
    uint64_t what;

    if (recv(ctx->async_fd, &what, sizeof(what), 0) != (ssize_t)sizeof(what)) {
        return -1;
    }
    event->event_type       = (enum ibv_event_type)what;
    event->element.port_num = 1;
    return 0;
}

void ibv_ack_async_event(struct ibv_async_event *event)
{
    (void)event;
}

/*
 * A worker, and a rank that says anything: control frames, a tcp stream, slots
 * in shared memory. The worker is one for all inputs; each input is a
 * connection, which has to leave nothing behind. Kernels look at every byte
 * that they are given, and none of it may lie outside of what was granted.
 */
#include "../worker.c"

#include <sanitizer/asan_interface.h>
#include <sys/stat.h>

#include "fuzz.h"

#define MAX_MAPPED  64u
#define MAX_MEMORY  (1u << 20)      /* of an arena or a segment */
#define MAX_ACTS    48
#define TURNS       200

static struct rfm_worker *worker;
static int agent_fd;
static int lowest_fd;
static uint32_t own_mapped;     /* its door */
static uint32_t next_conn = 1;
static bool gone;

static struct {
    int      fd;                /* the rank's end */
    int      data_fd;
    uint8_t *segment;           /* shm */
    uint64_t bytes;
    uint32_t slots;
    uint32_t slot_bytes;
} rank = { .fd = -1, .data_fd = -1 };

enum { ATTACHED, LOADED, BOUND, REFUSED_BIND, RAN_NATIVE, RAN_EVENT, RAN_OBJECT,
       FETCHED, DROPPED, IN_ARENA, MIRRORED, TAKEN_BACK, PROTOCOL, GOALS };
static struct fuzz_goal goals[GOALS] = {
    { "a link", 0 },             { "a kernel", 0 },
    { "a binding", 0 },          { "a binding that is refused", 0 },
    { "a native kernel's call", 0 }, { "another kernel's call", 0 },
    { "an object's call", 0 },   { "a fetch", 0 },
    { "a discarded result", 0 }, { "an argument in an arena", 0 },
    { "a mirror", 0 },           { "a request that was taken back", 0 },
    { "a request that made no sense", 0 },
};

/* --- memory that was granted ---------------------------------------------- */

static struct {
    uint8_t *base;
    uint64_t bytes;
} mapped[MAX_MAPPED];
static uint32_t n_mapped;

int __real_rfm_memfd_map(int fd, uint64_t bytes, bool inherit,
                         uint8_t **base_p);
int __real_rfm_mirror_map(uint64_t bytes, uint8_t **base_p);
void __real_rfm_memfd_unmap(uint8_t *base, uint64_t bytes);
int __wrap_rfm_memfd_map(int fd, uint64_t bytes, bool inherit,
                         uint8_t **base_p);
int __wrap_rfm_mirror_map(uint64_t bytes, uint8_t **base_p);
void __wrap_rfm_memfd_unmap(uint8_t *base, uint64_t bytes);

static void remember(uint8_t *base, uint64_t bytes)
{
    FUZZ_CHECK(n_mapped < MAX_MAPPED);
    mapped[n_mapped].base    = base;
    mapped[n_mapped++].bytes = bytes;
}

int __wrap_rfm_memfd_map(int fd, uint64_t bytes, bool inherit,
                         uint8_t **base_p)
{
    int rc = __real_rfm_memfd_map(fd, bytes, inherit, base_p);

    if (rc == RFM_OK) {
        remember(*base_p, bytes);
    }
    return rc;
}

/* From the heap, so that one byte too far is seen, too. */
int __wrap_rfm_mirror_map(uint64_t bytes, uint8_t **base_p)
{
    uint8_t *base;
    int rc = __real_rfm_mirror_map(bytes, &base);

    if (rc < 0) {
        return rc;
    }
    __real_rfm_memfd_unmap(base, bytes);
    if ((bytes > MAX_MEMORY) || (n_mapped >= MAX_MAPPED - 8u)) {
        return RFM_ERR_NO_MEMORY;
    }
    *base_p = calloc(1, bytes);
    FUZZ_CHECK(*base_p != NULL);
    remember(*base_p, bytes);
    goals[MIRRORED].times++;
    return RFM_OK;
}

void __wrap_rfm_memfd_unmap(uint8_t *base, uint64_t bytes)
{
    for (uint32_t i = 0; i < n_mapped; i++) {
        if (mapped[i].base == base) {
            FUZZ_CHECK(mapped[i].bytes == bytes);
            mapped[i] = mapped[--n_mapped];
            if (__asan_region_is_poisoned(base - 1, 1) != NULL) {
                free(base);
                return;
            }
            break;
        }
    }
    __real_rfm_memfd_unmap(base, bytes);
}

static bool is_in(const void *at, uint64_t n, const void *from, uint64_t bytes)
{
    const uint8_t *p = at;
    const uint8_t *base = from;

    return (p >= base) && (n <= bytes) && ((uint64_t)(p - base) <= bytes - n);
}

static bool is_granted(struct rfm_conn *conn, const void *at, uint64_t n)
{
    const struct rfm_transport *ops = conn->link->ops;
    const uint8_t *first = ops->worker_payload(conn->link, 0);
    uint64_t stride = (uint64_t)(ops->worker_payload(conn->link, 1) - first);

    for (uint32_t i = 0; i < n_mapped; i++) {
        if (is_in(at, n, mapped[i].base, mapped[i].bytes)) {
            goals[IN_ARENA].times++;
            return true;
        }
    }
    for (uint32_t i = 0; i < conn->link->slots; i++) {
        if (is_in(at, n, first + i * stride, stride - RFM_CACHE_LINE) ||
            (!conn->link->remote &&
             is_in(at, n, first - (conn->link->slots - i) * stride,
                   stride - RFM_CACHE_LINE))) {
            return true;
        }
    }
    /* tcp: what was received lies in the heap */
    return is_in(at, n, worker->line.payload, RFM_INLINE_BYTES) ||
           is_in(at, n, worker->guarded, GUARDED_BYTES) ||
           (conn->link->remote &&
            (__asan_region_is_poisoned((void *)(uintptr_t)at, n) == NULL));
}

/* --- kernels -------------------------------------------------------------- */

static uint8_t use(struct rfm_conn *conn, const struct rfm_buf *bufs,
                   uint32_t n_in, uint32_t n_out)
{
    uint8_t sum = 0;

    for (uint32_t i = 0; i < n_in + n_out; i++) {
        uint64_t n = (i < n_in) ? bufs[i].size : bufs[i].capacity;

        if (n == 0) {
            continue;
        }
        FUZZ_CHECK(is_granted(conn, bufs[i].ptr, n));
        if (i < n_in) {
            sum = (uint8_t)(sum + fuzz_read(bufs[i].ptr, n));
        } else {
            memset(bufs[i].ptr, sum, n);
        }
    }
    return sum;
}

static struct rfm_conn *current(void)
{
    uint32_t number = worker->page->conn;

    for (uint32_t i = 0; i < worker->n_conns; i++) {
        if (worker->conns[i]->number == number) {
            return worker->conns[i];
        }
    }
    FUZZ_CHECK(!"a call of a connection that there is");
    return NULL;
}

static int32_t native(const struct rfm_call *call)
{
    struct rfm_buf bufs[RFM_MAX_ARGS];
    uint8_t sum;

    goals[RAN_NATIVE].times++;
    memcpy(bufs, call->inputs, call->n_in * sizeof(*bufs));
    memcpy(bufs + call->n_in, call->outputs, call->n_out * sizeof(*bufs));
    sum = use(current(), bufs, call->n_in, call->n_out);
    for (uint32_t i = 0; i < call->n_out; i++) {
        if (sum % 3 == 1) {
            call->outputs[i].size = call->outputs[i].capacity / 2;
        } else if (sum % 16 == 5) {
            call->outputs[i].size = call->outputs[i].capacity + 1;
        }
    }
    return (sum % 16 == 3) ? -1 : 0;
}

static uint32_t plain(void *in, uint32_t n, void *out)
{
    uint8_t sum = fuzz_read(in, n);

    goals[RAN_NATIVE].times++;
    (void)out;
    return sum & 1u;
}

static void on_call(struct rfm_event *ev)
{
    uint64_t sizes[RFM_MAX_ARGS];
    uint8_t sum;

    if ((ev->flags & RFM_REQ_OBJECT) != 0) {
        goals[RAN_OBJECT].times++;
        FUZZ_CHECK(is_granted(ev->conn, ev->blob, ev->blob_bytes));
        FUZZ_CHECK(is_granted(ev->conn, ev->out, ev->out_capacity));
        sum = fuzz_read(ev->blob, ev->blob_bytes);
        memset(ev->out, sum, ev->out_capacity);
        if (sum % 2 == 0) {
            rfm_worker_reply(worker, ev, sum % 4 ? RFM_ST_OK : RFM_ST_KERNEL,
                             RFM_REP_KEPT, 1000, NULL);
        } else {
            uint8_t text[RFM_INLINE_BYTES * 2] = { sum };

            rfm_worker_reply_bytes(worker, ev, RFM_ST_OK, text,
                                   sum % sizeof(text));
        }
        return;
    }
    goals[RAN_EVENT].times++;
    sum = use(ev->conn, ev->bufs, ev->n_in, ev->n_out);
    for (uint32_t i = 0; i < ev->n_out; i++) {
        sizes[i] = ev->bufs[ev->n_in + i].capacity / ((sum % 3u) + 1u);
    }
    if (sum % 16 == 3) {
        rfm_worker_reply_bytes(worker, ev, RFM_ST_KERNEL, "it failed", 9);
    } else {
        rfm_worker_reply(worker, ev, RFM_ST_OK, 0, 0,
                         (sum & 1u) ? sizes : NULL);
    }
}

static void on_bind(struct rfm_event *ev)
{
    static const char text[] = "it can't be bound";
    uint8_t meta = fuzz_read(ev->blob, ev->blob_bytes);
    bool refused = meta == 255;

    goals[refused ? REFUSED_BIND : BOUND].times++;
    rfm_worker_bound(worker, ev, NULL, (ev->kind % 4 == 0) ? native : NULL,
                     (ev->kind % 4 == 1) ? plain : NULL, refused ? text : NULL,
                     refused ? sizeof(text) - 1 : 0);
    rfm_worker_release(worker, ev);
}

static void on_event(struct rfm_event *ev)
{
    static const char text[] = "it can't be loaded";
    bool bad;

    switch (ev->type) {
    case RFM_EV_KERNEL:
        bad = (fuzz_read(ev->blob, ev->blob_bytes) == 255) ||
              (fuzz_read(ev->digest, RFM_DIGEST_BYTES) == 255);
        goals[LOADED].times++;
        rfm_worker_name(worker, ev, (const char *)ev->blob, ev->blob_bytes);
        rfm_worker_loaded(worker, ev, NULL, bad ? text : NULL,
                          bad ? sizeof(text) - 1 : 0);
        rfm_worker_release(worker, ev);
        break;
    case RFM_EV_BIND:
        on_bind(ev);
        break;
    case RFM_EV_CALL:
        on_call(ev);
        break;
    case RFM_EV_FETCH:
        goals[FETCHED].times++;
        FUZZ_CHECK(is_granted(ev->conn, ev->out, ev->out_capacity));
        memset(ev->out, 7, ev->out_capacity);
        rfm_worker_reply(worker, ev, (ev->blob_bytes & 1u) ? RFM_ST_OK
                                                           : RFM_ST_KERNEL,
                         0, (ev->blob_bytes & 1u) ? ev->out_capacity : 0, NULL);
        break;
    case RFM_EV_DROP:
        goals[DROPPED].times++;
        rfm_worker_release(worker, ev);
        break;
    case RFM_EV_GONE:
        gone = true;
        rfm_worker_release(worker, ev);
        break;
    default:
        FUZZ_CHECK(ev->type == RFM_EV_UNBIND);
        rfm_worker_release(worker, ev);
        break;
    }
}

/* --- the rank ------------------------------------------------------------- */

/* What the worker answers is not of interest, except how many refused what. */
static void hear(void)
{
    struct rfm_reply_line line;

    for (uint32_t i = 0; (rank.segment != NULL) && (i < rank.slots); i++) {
        memcpy(&line, rank.segment + RFM_CONTROL_BYTES +
                          (rank.slots + i) * (rank.slot_bytes + 128ull),
               sizeof(line));
        goals[TAKEN_BACK].times += line.status == RFM_ST_TAKEN_BACK;
        goals[PROTOCOL].times   += line.status == RFM_ST_PROTOCOL;
    }
    fuzz_discard(agent_fd);
    if (rank.fd >= 0) {
        fuzz_discard(rank.fd);
    }
    if (rank.data_fd >= 0) {
        fuzz_discard(rank.data_fd);
    }
}

/* until nothing moves any more */
static void settle(void)
{
    int idle = 0;

    for (int i = 0; (i < TURNS) && (idle < 2) && !gone; i++) {
        uint64_t before = worker->page->count;
        struct rfm_event ev;
        bool moved = false;

        fuzz_turn();
        while (!gone && (rfm_worker_next(worker, false, &ev) == RFM_OK)) {
            on_event(&ev);
            moved = true;
        }
        hear();
        idle = (moved || (worker->page->count != before)) ? 0 : idle + 1;
    }
}

static void end_segment(void)
{
    if (rank.segment != NULL) {
        munmap(rank.segment, rank.bytes);
        rank.segment = NULL;
    }
}

/* What an attach and an arena say of their memory is at the same place. */
static int make_memory(const struct fuzz_act *act, const uint8_t *bytes)
{
    struct rfm_ctl_attach body = { 0 };
    uint64_t n;
    int fd;

    memcpy(&body, bytes, (act->n < sizeof(body)) ? act->n : sizeof(body));
    n = body.segment_bytes;
    if ((n == 0) || (n > MAX_MEMORY)) {
        n = 8192;
    }
    FUZZ_CHECK(rfm_memfd_create("fuzz", n, &fd) == RFM_OK);
    if ((act->a == RFM_CTL_ATTACH) && (rank.segment == NULL) &&
        (body.slots >= 2) && (body.slots <= RFM_MAX_SLOTS) &&
        (body.slot_bytes <= RFM_MAX_SLOT_BYTES) &&
        (RFM_CONTROL_BYTES + 2ull * body.slots * (body.slot_bytes + 128ull) <=
         n)) {
        rank.bytes      = (n + RFM_PAGE_SIZE - 1) & ~(RFM_PAGE_SIZE - 1ull);
        rank.slots      = body.slots;
        rank.slot_bytes = body.slot_bytes;
        rank.segment    = mmap(NULL, rank.bytes, PROT_READ | PROT_WRITE,
                               MAP_SHARED, fd, 0);
        FUZZ_CHECK(rank.segment != MAP_FAILED);
    }
    return fd;
}

static int make_fd(const struct fuzz_act *act, const uint8_t *bytes,
                   uint32_t kind)
{
    int fd = -1;

    switch (kind) {
    case FUZZ_FD_MEMORY:
        return make_memory(act, bytes);
    case FUZZ_FD_DOOR:
        FUZZ_CHECK(rfm_memfd_create("fuzz", RFM_DOOR_BYTES, &fd) == RFM_OK);
        return fd;
    case FUZZ_FD_EVENT:
        return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    default:
        return open("/dev/null", O_RDWR | O_CLOEXEC);
    }
}

static void send_frame(const struct fuzz_act *act, const uint8_t *bytes)
{
    uint32_t n = act->b % 6u;
    int fds[6];

    for (uint32_t i = 0; i < n; i++) {
        fds[i] = make_fd(act, bytes, (i < 4) ? (act->c >> (2 * i)) & 3u : 3u);
    }
    fuzz_send_frame(rank.fd, act->a, bytes, act->n, fds, n);
    for (uint32_t i = 0; i < n; i++) {
        close(fds[i]);
    }
}

static void send_message(const struct fuzz_act *act, const uint8_t *bytes)
{
    uint8_t message[FUZZ_MESSAGE];

    if (rank.data_fd >= 0) {
        fuzz_send(rank.data_fd, message, fuzz_message(act, bytes, message));
    }
}

static uint8_t *slot_of(const struct fuzz_act *act)
{
    return rank.segment + RFM_CONTROL_BYTES +
           (act->a % rank.slots) * (rank.slot_bytes + 128ull);
}

static void write_slot(const struct fuzz_act *act, const uint8_t *bytes)
{
    struct rfm_request_line line = { 0 };
    uint64_t room = rank.slot_bytes + 64ull;
    uint8_t *at = slot_of(act);
    uint64_t n = act->n;

    memcpy(&line, bytes, (n < sizeof(line)) ? n : sizeof(line));
    if (n > sizeof(line)) {
        n -= sizeof(line);
        memcpy(at + sizeof(line), bytes + sizeof(line), (n < room) ? n : room);
    }
    memcpy(at + 8, (uint8_t *)&line + 8, sizeof(line) - 8);
    rfm_store_release((uint64_t *)at, line.id);
}

static void act_as_rank(const struct fuzz_act *act, const uint8_t *bytes)
{
    switch (act->what % RANK_ACTS) {
    case RANK_FRAME:
        send_frame(act, bytes);
        break;
    case RANK_CONTROL:
        fuzz_send(rank.fd, bytes, act->n);
        break;
    case RANK_DATA:
        if (rank.data_fd >= 0) {
            fuzz_send(rank.data_fd, bytes, act->n);
        }
        break;
    case RANK_MESSAGE:
        send_message(act, bytes);
        break;
    case RANK_SLOT:
        if (rank.segment != NULL) {
            write_slot(act, bytes);
        }
        break;
    case RANK_CLAIM:
        if (rank.segment != NULL) {
            uint32_t *word = (uint32_t *)(slot_of(act) + rank.slot_bytes + 64);

            rfm_store_release(word, act->c ? act->c : RFM_CLAIM_TAKEN_BACK);
        }
        break;
    default:
        settle();
        if (worker->n_conns != 0) {
            goals[ATTACHED].times++;
        }
        break;
    }
}

/* --- an input ------------------------------------------------------------- */

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    struct rfm_worker_attr attr = { 0 };
    int pair[2];
    int page;

    (void)argc;
    (void)argv;
    fuzz_goals(goals, GOALS);
    FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    page = memfd_create("page", MFD_CLOEXEC);
    FUZZ_CHECK((page >= 0) && (ftruncate(page, RFM_PAGE_BYTES) == 0));
    agent_fd     = pair[0];
    attr.agent_fd = pair[1];
    attr.page_fd  = page;
    FUZZ_CHECK(rfm_worker_create(&attr, &worker) == RFM_OK);
    /* the side is made at the first need, and stays */
    FUZZ_CHECK(open_side(worker, &rfm_tcp) == RFM_OK);
    settle();
    own_mapped = n_mapped;
    return 0;
}

static void adopt_rank(bool with_data)
{
    struct rfm_ctl_adopt body = { .lease = 1, .conn = next_conn++ };
    int control[2];
    int data[2] = { -1, -1 };
    int theirs[2];

    FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control) ==
               0);
    if (with_data) {
        FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, data) ==
                   0);
    }
    rank.fd      = control[0];
    rank.data_fd = data[0];
    theirs[0]    = control[1];
    theirs[1]    = data[1];
    fuzz_send_frame(agent_fd, RFM_AGENT_ADOPT, &body, sizeof(body), theirs,
                    with_data ? 2 : 1);
    close(theirs[0]);
    if (with_data) {
        close(theirs[1]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_in in = { data + 1, size - 1 };
    struct fuzz_act act;
    const uint8_t *bytes;

    if (size == 0) {
        return -1;
    }
    gone      = false;
    lowest_fd = fuzz_lowest_fd();
    adopt_rank((data[0] & 1u) != 0);
    for (int i = 0; (i < MAX_ACTS) && fuzz_next(&in, &act, &bytes); i++) {
        act_as_rank(&act, bytes);
    }
    settle();
    /* it goes, and with it everything that it had */
    close(rank.fd);
    rank.fd = -1;
    for (int i = 0; (i < TURNS) && !gone; i++) {
        settle();
    }
    FUZZ_CHECK(gone);
    end_segment();
    if (rank.data_fd >= 0) {
        close(rank.data_fd);
        rank.data_fd = -1;
    }
    hear();
    FUZZ_CHECK(worker->n_conns == 0);
    FUZZ_CHECK(worker->n_local == 0);
    FUZZ_CHECK(worker->all == NULL);
    FUZZ_CHECK(worker->page->id == 0);
    FUZZ_CHECK(n_mapped == own_mapped);
    fuzz_check_fds(lowest_fd);
    return 0;
}

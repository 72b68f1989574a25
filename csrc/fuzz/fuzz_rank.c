/*
 * A rank, and a worker that says anything: the answer to ATTACH, control
 * frames, a tcp stream, reply slots in shared memory. Every input is a worker,
 * whose calls all have to end, and beside what it may write, memory has to stay
 * what it is.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frame.h"
#include "fuzz.h"
#include "invoker.h"
#include "shm.h"

#define SLOTS      4u
#define SLOT_BYTES 256u
#define GUARD      256u
#define CALLS      4u
#define MAX_ACTS   48
#define TURNS      400
#define INPUTS     64u              /* then there is another rank */

static int lowest_fd;
static uint32_t n_inputs;

static struct {
    int      fd;                /* its end of the control connection */
    int      data_fd;
    uint8_t *segment;           /* shm: the rank's */
    uint64_t bytes;
    int      victim;            /* what its pidfd is a copy of */
} worker;

static struct rfm_invoker *inv;
static struct rfm_channel *chan;
static bool tried;              /* to attach */
static struct rfm_block blocks[5];      /* guard, in, guard, out, guard */
static uint8_t behind[5][512];          /* their redzones */

/* Memory of exactly the size, so that a byte too far is seen. */
static struct call {
    struct rfm_request  req;
    struct rfm_binding *binding;
    struct rfm_reqarg   args[4];
    uint64_t            sizes[4];
    uint32_t            n;
    bool                started;
    uint8_t             object[24];
} calls[CALLS];

enum { ATTACHED, NOT_ATTACHED, DONE, FAILED, BUSY, KEPT, FETCHED, LOST, LIED,
       LAST_WORDS, DRAINED, BY_SHM, BY_TCP, GOALS };
static struct fuzz_goal goals[GOALS] = {
    { "a channel", 0 },          { "an attach that failed", 0 },
    { "a result", 0 },           { "a kernel's error", 0 },
    { "a busy worker", 0 },      { "a result that is kept", 0 },
    { "a fetched result", 0 },   { "a lost call", 0 },
    { "a reply that made no sense", 0 }, { "a worker's last words", 0 },
    { "a worker that drains", 0 }, { "a result by shm", 0 },
    { "a result by tcp", 0 },
};

/* --- the rank ------------------------------------------------------------- */

static void guard(const struct rfm_block *block, bool check)
{
    uint8_t *at = block->address;

    for (uint32_t i = 0; i < GUARD; i++) {
        if (check) {
            FUZZ_CHECK(at[i] == (uint8_t)(i * 7 + 1));
        } else {
            at[i] = (uint8_t)(i * 7 + 1);
        }
    }
}

static void make_call(uint32_t k, uint32_t flags, uint16_t n_in, uint16_t n_out,
                      const uint32_t *places, const uint64_t *sizes)
{
    uint8_t digest[RFM_DIGEST_BYTES] = { 1 };
    struct rfm_arg args[4];
    struct call *call = &calls[k];
    struct rfm_kernel *kernel;

    memset(call, 0, sizeof(*call));
    memset(args, 0, sizeof(args));
    call->n = (uint32_t)n_in + n_out;
    for (uint32_t i = 0; i < call->n; i++) {
        const struct rfm_block *block = &blocks[(i < n_in) ? 1 : 3];

        args[i].place      = places[i];
        args[i].size       = sizes[i];
        call->args[i].size = sizes[i];
        if (places[i] == RFM_INLINE) {
            call->args[i].user = calloc(1, sizes[i]);
            continue;
        }
        call->args[i].user = block->address;
        call->args[i].desc = (struct rfm_desc){
            .arena = block->arena_id, .offset = block->offset, .size = sizes[i],
            .flags = (i >= n_in) ? RFM_ARG_CANARY : 0,
        };
        if (places[i] == RFM_BOUND) {
            args[i].arena  = block->arena_id;
            args[i].offset = block->offset;
            args[i].flags  = (i >= n_in) ? RFM_ARG_CANARY : 0;
        }
    }
    FUZZ_CHECK(rfm_invoker_kernel(inv, 2, digest, "echo", 4, &kernel) ==
               RFM_OK);
    FUZZ_CHECK(rfm_binding_create(inv, kernel, flags, n_in, n_out, args, NULL,
                                  0, &call->binding) == RFM_OK);
}

static void init_call(struct call *call)
{
    rfm_request_init(&call->req, inv, call->binding, call->args, call->sizes);
    if (call->n == 0) {
        call->req.wire_flags    = RFM_REQ_OBJECT;
        call->req.payload       = call->object;
        call->req.payload_bytes = sizeof(call->object);
    }
}

/* What is made at the first need, and stays. */
static void open_side(void)
{
    struct rfm_attach_attr attr = { .transport = RFM_TRANSPORT_TCP };
    int control[2];
    int data[2];

    FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control) ==
               0);
    FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, data) == 0);
    close(control[1]);
    close(data[1]);
    attr.fd      = control[0];
    attr.data_fd = data[0];
    FUZZ_CHECK(rfm_invoker_attach_over(inv, &attr, &chan) < 0);
}

static void make_rank(void)
{
    static const uint64_t block_sizes[5] = { GUARD, 64, GUARD, 64, GUARD };
    struct rfm_invoker_attr attr = { .slots = SLOTS, .slot_bytes = SLOT_BYTES };

    FUZZ_CHECK(rfm_invoker_create(&attr, &inv) == RFM_OK);
    for (int i = 0; i < 5; i++) {
        FUZZ_CHECK(rfm_heap_alloc(rfm_invoker_heap(inv), block_sizes[i],
                                  &blocks[i]) == RFM_OK);
        memset(blocks[i].address, 0, block_sizes[i]);
        if (i % 2 == 0) {
            guard(&blocks[i], false);
        }
        FUZZ_CHECK(blocks[i].span - block_sizes[i] <= sizeof(behind[i]));
        memcpy(behind[i], (uint8_t *)blocks[i].address + block_sizes[i],
               blocks[i].span - block_sizes[i]);
    }
    memset(blocks[1].address, 0x77, 64);
    make_call(0, 0, 1, 1, (uint32_t[]){ RFM_INLINE, RFM_INLINE },
              (uint64_t[]){ 8, 8 });
    make_call(1, 0, 2, 2,
              (uint32_t[]){ RFM_BOUND, RFM_INLINE, RFM_BOUND, RFM_INLINE },
              (uint64_t[]){ 64, 100, 64, 100 });
    make_call(2, 0, 1, 1, (uint32_t[]){ RFM_CALL, RFM_CALL },
              (uint64_t[]){ 64, 64 });
    make_call(3, RFM_BIND_OBJECT, 0, 0, NULL, NULL);
    open_side();
}

static void rank_begins(void)
{
    if (n_inputs++ % INPUTS == 0) {
        make_rank();
    }
    for (uint32_t k = 0; k < CALLS; k++) {
        init_call(&calls[k]);
    }
    chan      = NULL;
    tried     = false;
    lowest_fd = fuzz_lowest_fd();
}

static void count_outcome(struct call *call)
{
    switch (call->req.outcome) {
    case RFM_DONE:
        goals[DONE].times++;
        goals[(worker.data_fd >= 0) ? BY_TCP : BY_SHM].times++;
        if ((call->req.wire_flags & RFM_REQ_FETCH) != 0) {
            goals[FETCHED].times++;
        }
        for (uint32_t i = 0; i < call->binding->n_out; i++) {
            FUZZ_CHECK(call->sizes[i] <= call->args[call->n - 1].size);
        }
        break;
    case RFM_KERNEL_ERROR:
    case RFM_BAD_KERNEL:
        goals[FAILED].times++;
        (void)fuzz_read((call->req.result_bytes > RFM_RESULT_INLINE)
                            ? call->req.result
                            : call->req.small,
                        call->req.result_bytes);
        break;
    case RFM_BUSY:
        goals[BUSY].times++;
        break;
    case RFM_LARGE:
        goals[KEPT].times++;
        break;
    default:
        goals[LOST].times++;
        break;
    }
}

static void rank_looks(void)
{
    for (int i = 0; i < 4; i++) {
        fuzz_turn();
        (void)rfm_invoker_progress(inv);
    }
    for (uint32_t k = 0; k < CALLS; k++) {
        if (calls[k].started && rfm_request_ended(&calls[k].req)) {
            calls[k].started = false;
            count_outcome(&calls[k]);
        }
    }
    if (worker.fd >= 0) {
        fuzz_discard(worker.fd);
    }
    if (worker.data_fd >= 0) {
        fuzz_discard(worker.data_fd);
    }
}

static void rank_ends(void)
{
    for (int i = 0; i < 5; i++) {
        if (i % 2 == 0) {
            guard(&blocks[i], true);
        }
        FUZZ_CHECK(memcmp(behind[i],
                          (uint8_t *)blocks[i].address + blocks[i].size,
                          blocks[i].span - blocks[i].size) == 0);
    }
    FUZZ_CHECK(fuzz_read(blocks[1].address, 64) == (uint8_t)(64 * 0x77));
    for (uint32_t k = 0; k < CALLS; k++) {
        if (calls[k].req.outcome == RFM_LARGE) {
            rfm_request_discard(&calls[k].req);
        }
        rfm_request_fini(&calls[k].req);
    }
    fuzz_check_fds(lowest_fd);
}

static void destroy_rank(void)
{
    for (uint32_t k = 0; k < CALLS; k++) {
        struct call *call = &calls[k];

        for (uint32_t i = 0; i < call->n; i++) {
            if (call->binding->args[i].place == RFM_INLINE) {
                free(call->args[i].user);
            }
        }
        rfm_binding_destroy(inv, call->binding);
    }
    rfm_invoker_close(inv, 1000000000ull);
    for (int i = 0; i < 5; i++) {
        rfm_heap_free(&blocks[i]);
    }
    rfm_invoker_destroy(inv);
}

/* --- the worker ----------------------------------------------------------- */

static int make_fd(uint32_t kind)
{
    int fd;

    switch (kind) {
    case FUZZ_FD_MEMORY:
        FUZZ_CHECK(rfm_memfd_create("fuzz", 8192, &fd) == RFM_OK);
        return fd;
    case FUZZ_FD_DOOR:
        FUZZ_CHECK(rfm_memfd_create("fuzz", RFM_DOOR_BYTES, &fd) == RFM_OK);
        return fd;
    case FUZZ_FD_EVENT:
        if (worker.victim < 0) {
            worker.victim = fuzz_victim();
        }
        return fcntl(worker.victim, F_DUPFD_CLOEXEC, 3);
    default:
        return open("/dev/null", O_RDWR | O_CLOEXEC);
    }
}

static void send_frame(const struct fuzz_act *act, const uint8_t *bytes)
{
    uint32_t n = act->b % 6u;
    int fds[6];

    for (uint32_t i = 0; i < n; i++) {
        fds[i] = make_fd((i < 4) ? (act->c >> (2 * i)) & 3u : 3u);
        FUZZ_CHECK(fds[i] >= 0);
    }
    fuzz_send_frame(worker.fd, act->a, bytes, act->n, fds, n);
    for (uint32_t i = 0; i < n; i++) {
        close(fds[i]);
    }
    goals[LAST_WORDS].times += act->a == RFM_CTL_REFUSED;
    goals[DRAINED].times    += act->a == RFM_CTL_DRAIN;
}

/* Id and slot are those of a call if the act says 0. */
static void send_message(const struct fuzz_act *act, const uint8_t *bytes)
{
    const size_t id_at = sizeof(struct rfm_stream_head);
    const size_t slot_at = offsetof(struct rfm_stream_head, slot);
    const struct rfm_request *req = &calls[act->c % CALLS].req;
    uint8_t message[FUZZ_MESSAGE];
    uint8_t copy[FUZZ_MESSAGE / 2];
    struct fuzz_act now = *act;
    uint32_t slot;
    uint64_t id;

    if (act->n > sizeof(copy)) {
        now.n = sizeof(copy);
    }
    memcpy(copy, bytes, now.n);
    if (now.n >= id_at + sizeof(id)) {
        memcpy(&id, copy + id_at, sizeof(id));
        id += req->wire_id;
        memcpy(copy + id_at, &id, sizeof(id));
        memcpy(&slot, copy + slot_at, sizeof(slot));
        slot += req->slot;
        memcpy(copy + slot_at, &slot, sizeof(slot));
    }
    fuzz_send(worker.data_fd, message, fuzz_message(&now, copy, message));
}

static void write_reply(const struct fuzz_act *act, const uint8_t *bytes)
{
    const uint64_t stride = SLOT_BYTES + 128u;
    struct rfm_reply_line line = { 0 };
    struct call *call = &calls[act->c % CALLS];
    uint64_t n = act->n;
    uint8_t *at;

    if (worker.segment == NULL) {
        return;
    }
    at = worker.segment + RFM_CONTROL_BYTES +
         (SLOTS + (act->a + call->req.slot) % SLOTS) * stride;
    memcpy(&line, bytes, (n < sizeof(line)) ? n : sizeof(line));
    if (n > sizeof(line)) {
        n -= sizeof(line);
        memcpy(at + 64, bytes + 64, (n < stride - 64) ? n : stride - 64);
    }
    memcpy(at + 8, (uint8_t *)&line + 8, sizeof(line) - 8);
    rfm_store_release((uint64_t *)at, line.id + call->req.wire_id);
}

/* The rank's segment, out of its ATTACH: what a worker maps. */
static void take_segment(void)
{
    struct rfm_ctl_attach body;
    struct rfm_rx rx;

    rfm_rx_init(&rx, RFM_MAX_FRAME);
    if ((rfm_rx_read(&rx, worker.fd) == RFM_OK) &&
        (rx.head.type == RFM_CTL_ATTACH) && (rx.n_fds == 3)) {
        memcpy(&body, rx.body, sizeof(body));
        worker.bytes   = body.segment_bytes;
        worker.segment = mmap(NULL, worker.bytes, PROT_READ | PROT_WRITE,
                              MAP_SHARED, rx.fds[0], 0);
        FUZZ_CHECK(worker.segment != MAP_FAILED);
    }
    rfm_rx_fini(&rx);
}

static void rank_attaches(uint8_t how, int fd, int data_fd)
{
    struct rfm_attach_attr attr = {
        .transport  = (how & 1u) ? RFM_TRANSPORT_TCP : RFM_TRANSPORT_SHM,
        .fd         = fd,
        .data_fd    = data_fd,
        .lease      = 1,
        .worker     = 1,
        .timeout_ns = 1000000000ull,
        .flags      = (how == FUZZ_TCP_CRC) ? RFM_STREAM_CRC : 0,
    };

    tried = true;
    if (rfm_invoker_attach_over(inv, &attr, &chan) != RFM_OK) {
        chan = NULL;
        goals[NOT_ATTACHED].times++;
        (void)fuzz_read(rfm_attach_why(), (rfm_attach_why() != NULL)
                                              ? strlen(rfm_attach_why())
                                              : 0);
        return;
    }
    goals[ATTACHED].times++;
    if (attr.transport == RFM_TRANSPORT_SHM) {
        take_segment();
    }
}

static void rank_calls(struct call *call)
{
    if (call->started || (call->req.outcome == RFM_LARGE)) {
        return;
    }
    call->started = rfm_request_start(&call->req, 0) == RFM_OK;
}

static void rank_fetches(struct call *call)
{
    struct rfm_desc into = { blocks[3].arena_id, 0, blocks[3].offset, 64 };

    if (!call->started && (call->req.outcome == RFM_LARGE)) {
        call->started = rfm_request_fetch(&call->req, &into) == RFM_OK;
    }
}

static void act_as_worker(const struct fuzz_act *act, const uint8_t *bytes)
{
    switch (act->what % WORKER_ACTS) {
    case WORKER_FRAME:
        send_frame(act, bytes);
        break;
    case WORKER_CONTROL:
        fuzz_send(worker.fd, bytes, act->n);
        break;
    case WORKER_DATA:
        if (worker.data_fd >= 0) {
            fuzz_send(worker.data_fd, bytes, act->n);
        }
        break;
    case WORKER_MESSAGE:
        if (worker.data_fd >= 0) {
            send_message(act, bytes);
        }
        break;
    case WORKER_REPLY:
        write_reply(act, bytes);
        break;
    case WORKER_CALLED:
        rank_calls(&calls[act->a % CALLS]);
        break;
    case WORKER_FETCHED:
        rank_fetches(&calls[3]);
        break;
    default:
        fuzz_pass_ms(act->a * 10ull);
        break;
    }
}

/* --- an input ------------------------------------------------------------- */

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    fuzz_goals(goals, GOALS);
    return 0;
}

static bool is_fenced(void)
{
    struct rfm_channel_info info;

    rfm_channel_info(chan, &info);
    return info.fenced != 0;
}

static void until_all_ended(void)
{
    bool waits = true;

    for (int i = 0; (i < TURNS) && waits; i++) {
        rank_looks();
        rfm_invoker_abandon(inv);       /* nobody else will come */
        fuzz_pass_ms(20);
        waits = (chan != NULL) && !is_fenced();
        for (uint32_t k = 0; k < CALLS; k++) {
            waits = waits || calls[k].started;
        }
    }
    FUZZ_CHECK(!waits);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_in in = { data + 1, size - 1 };
    struct fuzz_act act;
    const uint8_t *bytes;
    int control[2];
    int stream[2] = { -1, -1 };

    if (size == 0) {
        return -1;
    }
    rank_begins();
    worker.victim = -1;
    FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, control) ==
               0);
    if ((data[0] & 1u) != 0) {
        FUZZ_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, stream) ==
                   0);
    }
    worker.fd      = control[1];
    worker.data_fd = stream[1];
    for (int i = 0; (i < MAX_ACTS) && fuzz_next(&in, &act, &bytes); i++) {
        if (!tried && (act.what % WORKER_ACTS > WORKER_CONTROL)) {
            rank_attaches(data[0] & 3u, control[0], stream[0]);
        }
        act_as_worker(&act, bytes);
        if (tried) {
            rank_looks();
        }
    }
    if (!tried) {
        rank_attaches(data[0] & 3u, control[0], stream[0]);
    }
    if ((chan != NULL) && (rfm_channel_why(chan) != NULL)) {
        goals[LIED].times += strstr(rfm_channel_why(chan), "sense") != NULL;
        (void)fuzz_read(rfm_channel_why(chan), strlen(rfm_channel_why(chan)));
    }
    /* it ends, as a process does */
    close(worker.fd);
    worker.fd = -1;
    if (worker.victim >= 0) {
        uint64_t one = 1;

        (void)!write(worker.victim, &one, sizeof(one));
    }
    until_all_ended();
    if (worker.data_fd >= 0) {
        close(worker.data_fd);
        worker.data_fd = -1;
    }
    if (worker.victim >= 0) {
        close(worker.victim);
    }
    if (worker.segment != NULL) {
        munmap(worker.segment, worker.bytes);
        worker.segment = NULL;
    }
    rank_ends();
    if (n_inputs % INPUTS == 0) {
        destroy_rank();
    }
    return 0;
}

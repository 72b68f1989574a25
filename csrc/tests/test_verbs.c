/* The verbs transport by itself, both sides in one process: what a peer may not
 * do ends the link and harms nothing, and what fails says what and why. It runs
 * over any device; what only one that is none can do is tested on that one. */
#define _GNU_SOURCE
#include "harness.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include "arena.h"
#include "shm.h"
#include "verbs/null/provider.h"
#include "verbs/verbs.h"

#define SLOTS       8u
#define SLOT_BYTES  1024u
#define ARENA       7u
#define ARENA_BYTES (1u << 20)

static const struct rfm_transport *ops;

/* --- the device that is none ------------------------------------------------ */

static void *null_function(const char *name)
{
    void *plugin = dlopen(getenv("T_PLUGIN"), RTLD_NOW | RTLD_NOLOAD);
    void *found;

    CHECK(plugin != NULL);
    found = dlsym(plugin, name);
    dlclose(plugin);
    return found;
}

static bool is_null(void)
{
    return null_function("rfm_null_port") != NULL;
}

static void set_port(bool up)
{
    void (*fn)(bool);

    *(void **)&fn = null_function("rfm_null_port");
    fn(up);
}

static void fail_registration(int skip)
{
    void (*fn)(int);

    *(void **)&fn = null_function("rfm_null_fail_registration");
    fn(skip);
}

/* --- two ends ----------------------------------------------------------------- */

struct pair {
    struct rfm_side *rank_side;
    struct rfm_side *worker_side;
    struct rfm_link *rank;
    struct rfm_link *worker;
    uint8_t *arena;             /* the rank's */
    uint8_t *mirror;
    int      arena_fd;
};

static struct verbs_link *end(struct rfm_link *link)
{
    return (struct verbs_link *)link;
}

static void open_sides(struct pair *p)
{
    struct rfm_side_attr rank = { .rank = true };
    struct rfm_side_attr worker = { .rank = false };

    memset(p, 0, sizeof(*p));
    CHECK_OK(ops->side_open(&rank, &p->rank_side));
    CHECK_OK(ops->side_open(&worker, &p->worker_side));
}

static struct rfm_link_attr attr_of(struct rfm_side *side)
{
    return (struct rfm_link_attr){ .side = side, .slots = SLOTS,
                                   .slot_bytes = SLOT_BYTES, .data_fd = -1 };
}

static void connect_ends(struct pair *p)
{
    struct rfm_link_attr rank = attr_of(p->rank_side);
    struct rfm_link_attr worker = attr_of(p->worker_side);
    struct rfm_parcel there = { 0 };
    struct rfm_parcel back = { 0 };
    struct rfm_ctl_attach body;

    CHECK_OK(ops->rank_open(&rank, &p->rank, &body, &there));
    CHECK_EQ(there.n_bytes, sizeof(struct rfm_verbs_parcel));
    CHECK_OK(ops->worker_open(&worker, &body, &there, &p->worker, &back));
    CHECK_OK(ops->rank_attached(p->rank, &back));
}

static void share_arena(struct pair *p)
{
    struct rfm_parcel there = { 0 };
    struct rfm_parcel back = { 0 };

    p->arena = t_shared(ARENA_BYTES, &p->arena_fd);
    CHECK_OK(rfm_mirror_map(ARENA_BYTES, &p->mirror));
    CHECK_OK(ops->side_arena(p->rank_side, ARENA, p->arena, ARENA_BYTES, &there));
    CHECK_OK(ops->worker_arena(p->worker, ARENA, p->mirror, ARENA_BYTES, &there,
                               &back));
    CHECK_OK(ops->rank_arena(p->rank, ARENA, &back));
}

static void up(struct pair *p)
{
    open_sides(p);
    connect_ends(p);
    share_arena(p);
}

static void down(struct pair *p)
{
    if (p->worker != NULL) {
        ops->worker_close(p->worker);
    }
    if (p->rank != NULL) {
        ops->rank_close(p->rank);
    }
    ops->side_close(p->worker_side);
    ops->side_close(p->rank_side);
    if (p->arena != NULL) {
        rfm_memfd_unmap(p->mirror, ARENA_BYTES);
        t_unshare(p->arena, ARENA_BYTES, p->arena_fd);
    }
}

static void look(struct pair *p)
{
    (void)ops->side_progress(p->rank_side);
    (void)ops->side_progress(p->worker_side);
    sched_yield();
}

static const char *until_failed(struct pair *p, struct rfm_link *link,
                                int32_t status)
{
    while (rfm_load_acquire(&link->failed) == 0) {
        look(p);
    }
    CHECK_EQ(link->failed, status);
    CHECK(link->why != NULL);
    return link->why;
}

static const struct rfm_traffic nothing;

static void ask(struct pair *p, uint32_t slot, uint64_t id, uint64_t bytes)
{
    struct rfm_request_line line = { .id = id, .in_bytes = bytes };

    ops->rank_ready(p->rank, slot);
    if (bytes > RFM_INLINE_BYTES) {
        t_fill(ops->rank_payload(p->rank, slot), bytes, id);
    } else {
        t_fill(line.payload, sizeof(line.payload), id);
    }
    CHECK(ops->rank_post(p->rank, slot, &line, &nothing));
}

static void until_asked(struct pair *p, uint32_t slot, uint64_t id,
                        uint64_t bytes)
{
    struct rfm_request_line line;
    const uint8_t *payload;

    while (!ops->worker_poll(p->worker, slot, 0, &line, &payload)) {
        CHECK_EQ(p->worker->failed, 0);
        look(p);
    }
    CHECK_EQ(line.id, id);
    CHECK_EQ(line.in_bytes, bytes);
    CHECK((bytes > RFM_INLINE_BYTES) ? t_filled(payload, bytes, id)
                                     : t_filled(line.payload, 32, id));
}

static void answer(struct pair *p, uint32_t slot, uint64_t id, uint64_t bytes)
{
    struct rfm_reply_line line = { .id = id, .out_bytes = bytes };

    if (bytes > RFM_INLINE_BYTES) {
        t_fill(ops->worker_payload(p->worker, slot), bytes, ~id);
    } else {
        t_fill(line.payload, sizeof(line.payload), ~id);
    }
    ops->worker_reply(p->worker, slot, &line,
                      (bytes > RFM_INLINE_BYTES) ? bytes : 0, NULL, 0);
}

static void until_answered(struct pair *p, uint32_t slot, uint64_t id,
                           uint64_t bytes)
{
    struct rfm_reply_line line;
    const uint8_t *payload;

    while (!ops->rank_poll(p->rank, slot, id, &line, &payload)) {
        CHECK_EQ(p->rank->failed, 0);
        look(p);
    }
    CHECK_EQ(line.id, id);
    CHECK((bytes > RFM_INLINE_BYTES) ? t_filled(payload, bytes, ~id)
                                     : t_filled(line.payload, 32, ~id));
}

static void call(struct pair *p, uint32_t slot, uint64_t id, uint64_t bytes)
{
    ask(p, slot, id, bytes);
    until_asked(p, slot, id, bytes);
    answer(p, slot, id, bytes);
    until_answered(p, slot, id, bytes);
}

/* --- what a peer could post, given a queue pair --------------------------------- */

struct stray {
    enum ibv_wr_opcode opcode;
    const void *from;           /* NULL: the stage */
    uint64_t bytes;
    uint64_t to;
    uint32_t rkey;
    uint32_t imm;
};

static void post_stray(struct verbs_link *v, const struct stray *stray)
{
    struct ibv_send_wr *bad;
    struct ibv_sge sge = {
        .addr   = (uint64_t)(uintptr_t)((stray->from != NULL) ? stray->from
                                                               : v->stage),
        .length = (uint32_t)stray->bytes,
        .lkey   = v->stage_mr->lkey,
    };
    struct ibv_send_wr wr = {
        .wr_id      = verbs_wr_id(VERBS_SEND, v->index, (uint32_t)v->done),
        .sg_list    = &sge,
        .num_sge    = (stray->bytes > 0) ? 1 : 0,
        .opcode     = stray->opcode,
        .send_flags = IBV_SEND_SOLICITED | IBV_SEND_SIGNALED,
        .imm_data   = htonl(stray->imm),
    };

    wr.wr.rdma.remote_addr = stray->to;
    wr.wr.rdma.rkey        = stray->rkey;
    CHECK_EQ(ibv_post_send(v->qp, &wr, &bad), 0);
}

static struct stray slot_write(struct verbs_link *v, uint32_t slot,
                               uint64_t bytes)
{
    return (struct stray){
        .opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
        .bytes  = bytes,
        .to     = v->peer_ring + slot * v->stride,
        .rkey   = v->peer_key,
        .imm    = slot,
    };
}

/* --- exactness ---------------------------------------------------------------- */

static const uint64_t SIZES[] = { 0,   1,   32,  33,  63,  64,  65,  127, 128,
                                  191, 192, 193, 255, 256, 257, 511, SLOT_BYTES };

static void slots_arrive_exactly(void)
{
    struct pair p;
    uint64_t id = 0;

    up(&p);
    for (size_t i = 0; i < sizeof(SIZES) / sizeof(SIZES[0]); i++) {
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            call(&p, slot, ++id, SIZES[i]);
        }
    }
    down(&p);
}

static void every_size_arrives_whatever_the_queue_pair_sends_inline(void)
{
    static const char *const limits[] = { "0", "64", "100", "128" };

    if (!is_null()) {
        return;                 /* a device grants what it likes */
    }
    for (size_t i = 0; i < sizeof(limits) / sizeof(limits[0]); i++) {
        struct pair p;

        CHECK(setenv("RFM_NULL_INLINE", limits[i], 1) == 0);
        up(&p);
        CHECK(end(p.rank)->inline_bytes <= (uint32_t)atoi(limits[i]));
        down(&p);
        slots_arrive_exactly();
    }
    CHECK(unsetenv("RFM_NULL_INLINE") == 0);
}

/* All slots are out, and come back in any order, many times over. */
static void receives_never_run_out_however_full_the_slots_are(void)
{
    uint32_t rounds = t_scaled(2000, 50);
    struct t_random r = { 5 };
    struct pair p;
    uint64_t id = 0;

    up(&p);
    for (uint32_t round = 0; round < rounds; round++) {
        uint32_t first = (uint32_t)t_below(&r, SLOTS);
        uint64_t bytes = t_below(&r, 300);

        for (uint32_t i = 0; i < SLOTS; i++) {
            ask(&p, i, id + i + 1, bytes);
        }
        for (uint32_t i = 0; i < SLOTS; i++) {
            uint32_t slot = (first + i) % SLOTS;

            until_asked(&p, slot, id + slot + 1, bytes);
            answer(&p, slot, id + slot + 1, bytes);
        }
        for (uint32_t i = 0; i < SLOTS; i++) {
            until_answered(&p, i, id + i + 1, bytes);
        }
        id += SLOTS;
    }
    CHECK_EQ(p.rank->failed, 0);
    CHECK_EQ(p.worker->failed, 0);
    down(&p);
}

static void outputs_arrive_before_their_reply_does(void)
{
    uint32_t rounds = t_scaled(500, 20);
    struct pair p;

    up(&p);
    for (uint64_t id = 1; id <= rounds; id++) {
        struct rfm_region pieces[3] = {
            { .arena = ARENA, .offset = 64, .size = 100 },
            { .arena = ARENA, .offset = 4096, .size = 70000 },
            { .arena = ARENA, .offset = 4096 + 70000, .size = 1 },
        };
        struct rfm_reply_line line = { .id = id };
        const uint8_t *payload;

        ask(&p, id % SLOTS, id, 8);
        until_asked(&p, id % SLOTS, id, 8);
        for (int i = 0; i < 3; i++) {
            pieces[i].address = p.mirror + pieces[i].offset;
            t_fill(pieces[i].address, pieces[i].size, id + (uint64_t)i);
        }
        ops->worker_reply(p.worker, id % SLOTS, &line, 0, pieces, 3);
        while (!ops->rank_poll(p.rank, id % SLOTS, id, &line, &payload)) {
            look(&p);
        }
        for (int i = 0; i < 3; i++) {
            CHECK(t_filled(p.arena + pieces[i].offset, pieces[i].size,
                           id + (uint64_t)i));
        }
    }
    down(&p);
}

/* --- more than a send queue holds ----------------------------------------------- */

#define PIECES 1000

static void what_does_not_fit_the_send_queue_goes_on_by_itself(void)
{
    static struct rfm_region pieces[PIECES];
    struct rfm_traffic traffic = { .push = pieces, .n_push = PIECES };
    struct rfm_request_line line = { .id = 1 };
    const uint8_t *payload;
    struct pollfd p;
    struct pair two;

    up(&two);
    p = (struct pollfd){ .fd = ops->side_fd(two.rank_side), .events = POLLIN };
    t_fill(two.arena, ARENA_BYTES, 3);
    for (uint32_t i = 0; i < PIECES; i++) {
        pieces[i] = (struct rfm_region){
            .arena   = ARENA,
            .offset  = i * 1000,
            .size    = (i % 3 == 0) ? 0 : (i % 3 == 1) ? 40 : 900,
            .address = two.arena + i * 1000,
        };
    }
    /* somebody sleeps, and waits for a reply */
    ops->side_arm(two.rank_side);
    CHECK(ops->side_progress(two.rank_side) == 0);
    ops->rank_ready(two.rank, 0);
    CHECK(!ops->rank_post(two.rank, 0, &line, &traffic));
    while (!ops->worker_poll(two.worker, 0, 0, &line, &payload)) {
        /* is woken each time that there is room again */
        CHECK_EQ(poll(&p, 1, -1), 1);
        ops->side_woken(two.rank_side);
        ops->side_arm(two.rank_side);
        (void)ops->side_progress(two.rank_side);
        (void)ops->side_progress(two.worker_side);
        if (rfm_load_acquire(&end(two.rank)->queue_head) ==
            rfm_load_acquire(&end(two.rank)->queue_tail)) {
            break;
        }
    }
    ops->side_woken(two.rank_side);
    while (!ops->worker_poll(two.worker, 0, 0, &line, &payload)) {
        look(&two);
    }
    for (uint32_t i = 0; i < PIECES; i++) {
        CHECK(memcmp(two.mirror + i * 1000, two.arena + i * 1000,
                     pieces[i].size) == 0);
    }
    answer(&two, 0, 1, 8);
    until_answered(&two, 0, 1, 8);
    down(&two);
}

/* --- sleeping ------------------------------------------------------------------- */

static bool readable(struct rfm_side *side, int timeout_ms)
{
    struct pollfd p = { .fd = ops->side_fd(side), .events = POLLIN };
    int rc = poll(&p, 1, timeout_ms);

    CHECK(rc >= 0);
    return rc == 1;
}

static void a_sleeper_is_woken_by_replies_and_not_by_what_it_sent(void)
{
    uint32_t interval;
    struct pair p;
    uint64_t id = 0;

    up(&p);
    interval = end(p.rank)->interval;
    for (int round = 0; round < 3; round++) {
        /* so many that sends have completed, too */
        for (uint32_t i = 0; i < interval; i++) {
            id++;
            call(&p, id % SLOTS, id, 8);
        }
        id++;
        ops->side_arm(p.rank_side);
        while (ops->side_progress(p.rank_side) != 0) {
        }
        ask(&p, id % SLOTS, id, 8);
        until_asked(&p, id % SLOTS, id, 8);
        CHECK(!readable(p.rank_side, 0));
        answer(&p, id % SLOTS, id, 8);
        CHECK(readable(p.rank_side, -1));
        ops->side_woken(p.rank_side);
        until_answered(&p, id % SLOTS, id, 8);
    }
    down(&p);
}

static void a_wake_up_that_another_took_is_passed_on(void)
{
    struct pair p;

    up(&p);
    for (uint64_t id = 1; id < 20; id += 2) {
        ask(&p, id % SLOTS, id, 8);
        ask(&p, (id + 1) % SLOTS, id + 1, 8);
        until_asked(&p, id % SLOTS, id, 8);
        until_asked(&p, (id + 1) % SLOTS, id + 1, 8);
        /* two sleep */
        ops->side_arm(p.rank_side);
        ops->side_arm(p.rank_side);
        answer(&p, id % SLOTS, id, 8);
        CHECK(readable(p.rank_side, -1));
        ops->side_woken(p.rank_side);
        until_answered(&p, id % SLOTS, id, 8);
        /* one is left, and for him there is another event */
        answer(&p, (id + 1) % SLOTS, id + 1, 8);
        CHECK(readable(p.rank_side, -1));
        ops->side_woken(p.rank_side);
        until_answered(&p, (id + 1) % SLOTS, id + 1, 8);
    }
    down(&p);
}

/* --- malice towards a worker ------------------------------------------------------ */

static void refused_by_the_worker(const struct stray *stray, const char *text)
{
    struct pair p;
    struct stray mine = *stray;
    const char *why;

    up(&p);
    mine.to  += end(p.rank)->peer_ring;
    mine.rkey = end(p.rank)->peer_key;
    post_stray(end(p.rank), &mine);
    why = until_failed(&p, p.worker, RFM_ERR_PROTOCOL);
    CHECK(strcmp(why, text) == 0);
    down(&p);
}

static void immediates_that_make_no_sense_end_the_link(void)
{
    static const uint32_t imms[] = { SLOTS, SLOTS + 1, 0xff, 0x7fffffff,
                                     0x80000000, 0xffffffff };
    struct stray stray = { .opcode = IBV_WR_RDMA_WRITE_WITH_IMM, .bytes = 64 };

    for (size_t i = 0; i < sizeof(imms) / sizeof(imms[0]); i++) {
        stray.imm = imms[i];
        refused_by_the_worker(&stray, "a slot that made no sense");
    }
}

static void slots_too_short_or_too_long_end_the_link(void)
{
    static const uint64_t sizes[] = { 0, 1, 63, 2 * RFM_CACHE_LINE + SLOT_BYTES + 1 };
    struct stray stray = { .opcode = IBV_WR_RDMA_WRITE_WITH_IMM };

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        stray.bytes = sizes[i];
        refused_by_the_worker(&stray, "a slot that made no sense");
    }
}

static void a_second_request_in_a_slot_ends_the_link(void)
{
    struct stray stray;
    struct pair p;

    up(&p);
    ask(&p, 2, 1, 8);
    until_asked(&p, 2, 1, 8);
    stray = slot_write(end(p.rank), 2, 64);
    post_stray(end(p.rank), &stray);
    CHECK(strstr(until_failed(&p, p.worker, RFM_ERR_PROTOCOL), "in use"));
    down(&p);
}

static void lines_that_lie_are_not_served(void)
{
    static const struct {
        uint64_t id;
        uint64_t in_bytes;
        uint64_t bytes;         /* that are written */
        const char *text;
    } lies[] = {
        { 0, 8, 64, "made before" },
        { 5, 33, 64 + 32, "shorter" },
        { 5, SLOT_BYTES, 64 + SLOT_BYTES - 1, "shorter" },
        { 5, SLOT_BYTES + 1, 64 + SLOT_BYTES + 1, "shorter" },
        { 5, UINT64_MAX, 64, "shorter" },
        { 5, UINT64_MAX - 63, 64, "shorter" },
        { 4, 8, 64, "made before" },
    };

    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        struct rfm_request_line line = { .id = lies[i].id,
                                         .in_bytes = lies[i].in_bytes };
        struct rfm_request_line got;
        const uint8_t *payload;
        struct stray stray;
        struct pair p;

        up(&p);
        memcpy(end(p.rank)->stage, &line, sizeof(line));
        stray = slot_write(end(p.rank), 1, lies[i].bytes);
        post_stray(end(p.rank), &stray);
        while (rfm_load_acquire(&p.worker->failed) == 0) {
            look(&p);
            CHECK(!ops->worker_poll(p.worker, 1, 4, &got, &payload));
        }
        CHECK_EQ(p.worker->failed, RFM_ERR_PROTOCOL);
        CHECK(strstr(p.worker->why, lies[i].text) != NULL);
        down(&p);
    }
}

/* A worker that serves nothing has so many receives, and no more. */
static void more_requests_than_slots_are_an_error_and_no_wait(void)
{
    struct pair p;
    const char *why;

    up(&p);
    /* the worker does not look: receives run out before slots are in use */
    for (uint32_t i = 0; i <= SLOTS + SLOTS / 2; i++) {
        struct stray stray = slot_write(end(p.rank), i % SLOTS, 64);

        post_stray(end(p.rank), &stray);
    }
    while (rfm_load_acquire(&p.rank->failed) == 0) {
        (void)ops->side_progress(p.rank_side);
    }
    why = p.rank->why;
    CHECK_EQ(p.rank->failed, RFM_ERR_PROTOCOL);
    CHECK(strstr(why, "receiver not ready") != NULL);
    down(&p);
}

/* Nothing but the ring and the mirrors can be written, nothing be read. */
static void writes_to_what_was_not_granted_are_refused_and_change_nothing(void)
{
    enum { BEFORE_RING, BEHIND_RING, STAGE, MIRROR_BY_RING_KEY, BEHIND_MIRROR,
           NO_KEY, READ, CASES };

    /* a device does not even send a read from a queue pair that may have none
     * under way, as ours */
    for (int what = 0; what < (is_null() ? CASES : READ); what++) {
        struct verbs_link *v;
        struct verbs_link *w;
        struct stray stray;
        uint8_t before[256];
        uint8_t *victim;
        struct pair p;

        up(&p);
        v     = end(p.rank);
        w     = end(p.worker);
        stray = slot_write(v, 0, 128);
        stray.opcode = IBV_WR_RDMA_WRITE;
        victim       = w->ring;
        switch (what) {
        case BEFORE_RING:
            stray.to -= 1;
            break;
        case BEHIND_RING:
            victim   = w->ring + w->ring_bytes - 127;
            stray.to = (uint64_t)(uintptr_t)victim;
            break;
        case STAGE:
            victim   = w->stage;
            stray.to = (uint64_t)(uintptr_t)victim;
            break;
        case MIRROR_BY_RING_KEY:
            victim   = p.mirror;
            stray.to = (uint64_t)(uintptr_t)victim;
            break;
        case BEHIND_MIRROR:
            victim     = p.mirror + ARENA_BYTES - 127;
            stray.to   = (uint64_t)(uintptr_t)victim;
            stray.rkey = v->arenas[0].rkey;
            break;
        case NO_KEY:
            stray.rkey ^= 0x5a5a00;
            break;
        default:
            stray.opcode = IBV_WR_RDMA_READ;
            break;
        }
        memset(v->stage, 0xee, 128);
        memcpy(before, victim, 127);
        post_stray(v, &stray);
        (void)until_failed(&p, p.rank, RFM_ERR_PROTOCOL);
        CHECK(memcmp(victim, before, 127) == 0);
        /* and the worker sees that there is no link any more */
        while (rfm_load_acquire(&p.worker->failed) == 0) {
            look(&p);
            ops->side_arm(p.worker_side);
            ops->side_woken(p.worker_side);
        }
        down(&p);
    }
}

/* --- malice towards a rank --------------------------------------------------------- */

static void replies_that_nobody_asked_for_end_the_link(void)
{
    struct pair p;

    up(&p);
    answer(&p, 3, 77, 8);
    CHECK(strstr(until_failed(&p, p.rank, RFM_ERR_PROTOCOL), "nobody asked"));
    down(&p);

    /* a second one */
    up(&p);
    call(&p, 3, 1, 8);
    answer(&p, 3, 1, 8);
    CHECK(strstr(until_failed(&p, p.rank, RFM_ERR_PROTOCOL), "nobody asked"));
    down(&p);
}

static void a_reply_with_another_id_is_not_taken(void)
{
    struct rfm_reply_line line;
    const uint8_t *payload;
    struct pair p;

    up(&p);
    ask(&p, 3, 10, 8);
    until_asked(&p, 3, 10, 8);
    answer(&p, 3, 11, 8);
    while (rfm_load_acquire(&p.rank->failed) == 0) {
        look(&p);
        CHECK(!ops->rank_poll(p.rank, 3, 10, &line, &payload));
        CHECK(!ops->rank_poll(p.rank, 3, 11, &line, &payload));
    }
    CHECK_EQ(p.rank->failed, RFM_ERR_PROTOCOL);
    CHECK(strstr(p.rank->why, "another invocation") != NULL);
    down(&p);
}

static void an_arena_that_is_gone_can_not_be_written_to(void)
{
    struct pair p;
    struct stray stray;

    up(&p);
    stray = (struct stray){
        .opcode = IBV_WR_RDMA_WRITE,
        .bytes  = 64,
        .to     = (uint64_t)(uintptr_t)p.arena,
        .rkey   = end(p.worker)->arenas[0].rkey,
    };
    memset(end(p.worker)->stage, 0xee, 64);
    post_stray(end(p.worker), &stray);
    while (rfm_load_acquire((uint32_t *)p.arena) != 0xeeeeeeee) {
        look(&p);
    }
    memset(p.arena, 0, 64);
    ops->side_arena_drop(p.rank_side, ARENA);
    post_stray(end(p.worker), &stray);
    (void)until_failed(&p, p.worker, RFM_ERR_PROTOCOL);
    CHECK_EQ(*(uint32_t *)p.arena, 0);
    down(&p);
}

static void a_mirror_that_is_gone_can_not_be_written_to(void)
{
    struct pair p;
    struct stray stray;

    up(&p);
    stray = (struct stray){
        .opcode = IBV_WR_RDMA_WRITE,
        .bytes  = 64,
        .to     = (uint64_t)(uintptr_t)p.mirror,
        .rkey   = end(p.rank)->arenas[0].rkey,
    };
    memset(end(p.rank)->stage, 0xee, 64);
    CHECK_OK(ops->worker_arena(p.worker, ARENA, NULL, 0, NULL, NULL));
    post_stray(end(p.rank), &stray);
    (void)until_failed(&p, p.rank, RFM_ERR_PROTOCOL);
    CHECK_EQ(*(uint32_t *)p.mirror, 0);
    down(&p);
}

/* --- the fence ----------------------------------------------------------------------- */

struct scribbler {
    struct pair *p;
    uint32_t stop;
};

/* a worker that writes into the rank's memory as fast as it can */
static void *scribble(void *arg)
{
    struct scribbler *s = arg;
    struct verbs_link *v = end(s->p->worker);
    uint64_t n = rfm_load_acquire(&v->done);

    while (rfm_load_acquire(&s->stop) == 0) {
        if ((rfm_load_acquire(&s->p->worker->failed) == 0) &&
            (n - rfm_load_acquire(&v->done) < v->depth / 2)) {
            struct stray stray = {
                .opcode = IBV_WR_RDMA_WRITE,
                .bytes  = 512,
                .to     = (uint64_t)(uintptr_t)s->p->arena,
                .rkey   = v->arenas[0].rkey,
            };
            struct ibv_send_wr *bad;
            struct ibv_sge sge = { (uint64_t)(uintptr_t)v->stage, 512,
                                   v->stage_mr->lkey };
            struct ibv_send_wr wr = {
                .wr_id = verbs_wr_id(VERBS_SEND, v->index, (uint32_t)++n),
                .sg_list = &sge, .num_sge = 1, .opcode = stray.opcode,
                .send_flags = IBV_SEND_SIGNALED,
            };

            wr.wr.rdma.remote_addr = stray.to;
            wr.wr.rdma.rkey        = stray.rkey;
            memset(v->stage, (int)n, 512);
            CHECK_EQ(ibv_post_send(v->qp, &wr, &bad), 0);
        }
        (void)ops->side_progress(s->p->worker_side);
    }
    return NULL;
}

static void after_the_fence_not_one_byte_changes(void)
{
    uint32_t rounds = t_scaled(20, 2);

    for (uint32_t round = 0; round < rounds; round++) {
        struct scribbler s = { 0 };
        uint64_t before;
        uint8_t after[512];
        pthread_t thread;
        struct pair p;

        up(&p);
        ask(&p, 1, 1, 8);
        until_asked(&p, 1, 1, 8);
        answer(&p, 1, 1, 8);
        until_answered(&p, 1, 1, 8);
        s.p    = &p;
        before = rfm_load_acquire(&end(p.worker)->done);
        CHECK_EQ(pthread_create(&thread, NULL, scribble, &s), 0);
        while (rfm_load_acquire(&end(p.worker)->done) < before + 9) {
            sched_yield();
        }
        ops->rank_fence(p.rank);
        memcpy(after, p.arena, sizeof(after));
        /* until the scribbler itself knows */
        while (rfm_load_acquire(&p.worker->failed) == 0) {
            sched_yield();
        }
        CHECK(memcmp(p.arena, after, sizeof(after)) == 0);
        CHECK_EQ(p.worker->failed, RFM_ERR_PEER);
        rfm_store_release(&s.stop, 1);
        CHECK_EQ(pthread_join(thread, NULL), 0);
        down(&p);
    }
}

static void what_had_come_before_the_fence_counts(void)
{
    struct rfm_reply_line line;
    const uint8_t *payload;
    struct pair p;

    up(&p);
    ask(&p, 1, 1, 300);
    ask(&p, 2, 2, 300);
    until_asked(&p, 1, 1, 300);
    answer(&p, 1, 1, 300);
    until_answered(&p, 1, 1, 300);
    ops->rank_fence(p.rank);
    ops->rank_fence(p.rank);    /* safe twice */
    CHECK(ops->rank_poll(p.rank, 1, 1, &line, &payload));
    CHECK(t_filled(payload, 300, ~1ull));
    CHECK(!ops->rank_poll(p.rank, 2, 2, &line, &payload));
    CHECK_EQ(p.rank->failed, 0);
    down(&p);
}

static void the_last_replies_of_a_worker_that_leaves_arrive(void)
{
    struct pair p;

    up(&p);
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        ask(&p, slot, slot + 1, 700);
    }
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        until_asked(&p, slot, slot + 1, 700);
        answer(&p, slot, slot + 1, 700);
    }
    ops->worker_close(p.worker);
    p.worker = NULL;
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        struct rfm_reply_line line;
        const uint8_t *payload;

        while (!ops->rank_poll(p.rank, slot, slot + 1, &line, &payload)) {
            (void)ops->side_progress(p.rank_side);
        }
        CHECK(t_filled(payload, 700, ~(slot + 1ull)));
    }
    down(&p);
}

/* --- parcels ---------------------------------------------------------------------- */

/* What they say is used only if all of it makes sense. */
static void a_parcel_that_makes_no_sense_is_refused(void)
{
    static const struct {
        uint32_t at;
        uint32_t bytes;
        uint64_t value;
    } lies[] = {
        { offsetof(struct rfm_verbs_parcel, version), 2, 0 },
        { offsetof(struct rfm_verbs_parcel, version), 2, 2 },
        { offsetof(struct rfm_verbs_parcel, version), 2, 0xffff },
        { offsetof(struct rfm_verbs_parcel, path), 1, 0 },
        { offsetof(struct rfm_verbs_parcel, path), 1, 4 },
        { offsetof(struct rfm_verbs_parcel, path), 1, 0xff },
        { offsetof(struct rfm_verbs_parcel, mtu), 1, 0 },
        { offsetof(struct rfm_verbs_parcel, mtu), 1, 6 },
        { offsetof(struct rfm_verbs_parcel, mtu), 1, 0xff },
        { offsetof(struct rfm_verbs_parcel, qp), 4, 0 },
        { offsetof(struct rfm_verbs_parcel, qp), 4, 0x1000000 },
        { offsetof(struct rfm_verbs_parcel, qp), 4, 0xffffffff },
        { offsetof(struct rfm_verbs_parcel, psn), 4, 0x1000000 },
        { offsetof(struct rfm_verbs_parcel, psn), 4, 0xffffffff },
        { offsetof(struct rfm_verbs_parcel, lid), 4, 0x10000 },
        { offsetof(struct rfm_verbs_parcel, lid), 4, 0xffffffff },
        { offsetof(struct rfm_verbs_parcel, address), 8, 0 },
        { offsetof(struct rfm_verbs_parcel, address), 8, 1 },
        { offsetof(struct rfm_verbs_parcel, address), 8, UINT64_MAX - 63 },
        { offsetof(struct rfm_verbs_parcel, address), 8, UINT64_MAX },
        { offsetof(struct rfm_verbs_parcel, bytes), 8, 0 },
        { offsetof(struct rfm_verbs_parcel, bytes), 8, 1 },
        { offsetof(struct rfm_verbs_parcel, bytes), 8, UINT64_MAX },
        { offsetof(struct rfm_verbs_parcel, reserved), 4, 1 },
    };
    static const uint32_t lengths[] = { 0, 1, 55, 57, RFM_MAX_PARCEL };
    struct rfm_link_attr rank_attr;
    struct rfm_link_attr worker_attr;
    struct rfm_ctl_attach body;
    struct rfm_parcel good = { 0 };
    struct rfm_parcel out = { 0 };
    struct pair p;

    open_sides(&p);
    rank_attr   = attr_of(p.rank_side);
    worker_attr = attr_of(p.worker_side);
    CHECK_OK(ops->rank_open(&rank_attr, &p.rank, &body, &good));
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        struct rfm_parcel bad = good;
        struct rfm_link *link;

        memcpy(bad.bytes + lies[i].at, &lies[i].value, lies[i].bytes);
        CHECK(ops->worker_open(&worker_attr, &body, &bad, &link, &out) < 0);
        CHECK(ops->why() != NULL);
        /* the rank, whose link stays as it was: it can still be connected */
        CHECK(ops->rank_attached(p.rank, &bad) < 0);
        CHECK(ops->why() != NULL);
    }
    {
        struct rfm_parcel bad = good;
        struct rfm_link *link;

        memset(bad.bytes + offsetof(struct rfm_verbs_parcel, gid), 0, 16);
        CHECK(ops->worker_open(&worker_attr, &body, &bad, &link, &out) < 0);
    }
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        struct rfm_parcel bad = good;
        struct rfm_link *link;

        bad.n_bytes = lengths[i];
        CHECK(ops->worker_open(&worker_attr, &body, &bad, &link, &out) < 0);
        CHECK(ops->rank_attached(p.rank, &bad) < 0);
    }
    CHECK_OK(ops->worker_open(&worker_attr, &body, &good, &p.worker, &out));
    CHECK_OK(ops->rank_attached(p.rank, &out));
    call(&p, 0, 1, 100);
    down(&p);
}

static void what_is_said_of_an_arena_is_checked(void)
{
    static const struct rfm_verbs_memory lies[] = {
        { 0, ARENA_BYTES, 1, 0 },
        { 4096, ARENA_BYTES - 1, 1, 0 },
        { 4096, ARENA_BYTES + 1, 1, 0 },
        { 4096, 0, 1, 0 },
        { UINT64_MAX - ARENA_BYTES + 1, ARENA_BYTES, 1, 0 },
        { 4096, ARENA_BYTES, 1, 1 },
    };
    struct rfm_parcel good = { 0 };
    struct rfm_parcel out = { 0 };
    struct pair p;

    open_sides(&p);
    connect_ends(&p);
    p.arena = t_shared(ARENA_BYTES, &p.arena_fd);
    CHECK_OK(rfm_mirror_map(ARENA_BYTES, &p.mirror));
    CHECK_OK(ops->side_arena(p.rank_side, ARENA, p.arena, ARENA_BYTES, &good));
    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        struct rfm_parcel bad = { .n_bytes = sizeof(lies[i]) };

        memcpy(bad.bytes, &lies[i], sizeof(lies[i]));
        CHECK_EQ(ops->worker_arena(p.worker, ARENA, p.mirror, ARENA_BYTES, &bad,
                                   &out), RFM_ERR_PROTOCOL);
        CHECK_EQ(ops->rank_arena(p.rank, ARENA, &bad), RFM_ERR_PROTOCOL);
    }
    for (uint32_t n = 0; n < sizeof(struct rfm_verbs_memory); n += 7) {
        struct rfm_parcel bad = good;

        bad.n_bytes = n;
        CHECK_EQ(ops->worker_arena(p.worker, ARENA, p.mirror, ARENA_BYTES, &bad,
                                   &out), RFM_ERR_PROTOCOL);
    }
    /* one that it never heard of; the same one twice */
    CHECK_EQ(ops->rank_arena(p.rank, ARENA + 1, &good), RFM_ERR_PROTOCOL);
    CHECK_OK(ops->worker_arena(p.worker, ARENA, p.mirror, ARENA_BYTES, &good,
                               &out));
    CHECK_EQ(ops->worker_arena(p.worker, ARENA, p.mirror, ARENA_BYTES, &good,
                               &out), RFM_ERR_PROTOCOL);
    CHECK_OK(ops->rank_arena(p.rank, ARENA, &out));
    CHECK_EQ(ops->rank_arena(p.rank, ARENA, &out), RFM_ERR_PROTOCOL);
    call(&p, 0, 1, 100);
    down(&p);
}

/* --- devices and their failures ------------------------------------------------------ */

static void a_device_that_is_not_there_is_named(void)
{
    static const char *const names[] = {
        "nowhere0", "nowhere0:1", ":99", ":1:9999", ":x", "a:1:", "a:1:-1",
        "a:300", ":1:2:3",
        "a-name-that-is-longer-than-any-device-has-and-that-goes-on-and-on-and-on",
    };

    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        struct rfm_side_attr attr = { .rank = true, .device = names[i] };
        struct rfm_side *side;
        char text[2048];

        CHECK(ops->side_open(&attr, &side) < 0);
        CHECK(ops->why() != NULL);
        CHECK(ops->describe(names[i], text, sizeof(text)) < 0);
        CHECK(ops->why() != NULL);
    }
}

static void a_device_describes_itself(void)
{
    static const char *const names[] = {
        "device=", "port=", "state=active", "path=", "gid=", "mtu=",
        "inline_bytes=", "max_qp_wr=", "memlock_bytes=",
    };
    char text[2048];
    int n = ops->describe(NULL, text, sizeof(text));

    CHECK(n > 0);
    CHECK_EQ(strlen(text), n);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        CHECK(strstr(text, names[i]) != NULL);
    }
}

static void a_port_that_goes_down_ends_what_is_in_flight_and_says_so(void)
{
    struct rfm_side_attr attr = { .rank = true };
    struct rfm_side *side;
    struct pair p;

    if (!is_null()) {
        return;                 /* others need the port, too */
    }
    up(&p);
    ask(&p, 0, 1, 8);
    until_asked(&p, 0, 1, 8);
    ops->side_arm(p.rank_side);
    CHECK(!readable(p.rank_side, 0));
    set_port(false);
    CHECK(readable(p.rank_side, -1));
    ops->side_woken(p.rank_side);
    CHECK(strstr(until_failed(&p, p.rank, RFM_ERR_PEER), "port") != NULL);
    CHECK(ops->side_open(&attr, &side) < 0);
    CHECK(strstr(ops->why(), "up") != NULL);
    down(&p);
    set_port(true);
    up(&p);
    call(&p, 0, 1, 8);
    down(&p);
}

static void a_peer_that_vanished_is_noticed_by_the_next_write(void)
{
    struct pair p;

    up(&p);
    call(&p, 0, 1, 8);
    ops->rank_close(p.rank);
    p.rank = NULL;
    answer(&p, 0, 1, 8);
    while (rfm_load_acquire(&p.worker->failed) == 0) {
        (void)ops->side_progress(p.worker_side);
    }
    CHECK_EQ(p.worker->failed, RFM_ERR_PEER);
    CHECK(strstr(p.worker->why, "does not answer") != NULL);
    down(&p);
}

/* Whichever of the four it is that fails: both rings and stages. */
static void memory_that_can_not_be_registered_is_explained(void)
{
    static struct t_worker worker;

    if (!is_null()) {
        return;                 /* root may lock all that there is */
    }
    for (int skip = 0; skip < 4; skip++) {
        struct rfm_invoker *inv = t_invoker(SLOTS, SLOT_BYTES, 20);
        struct rfm_attach_attr attr;
        struct rfm_channel *chan;

        t_worker_start(&worker, true, 20);
        attr = t_dial(&worker, RFM_TRANSPORT_VERBS);
        fail_registration(skip);
        CHECK_EQ(rfm_invoker_attach_over(inv, &attr, &chan), RFM_ERR_NO_MEMORY);
        CHECK(rfm_attach_why() != NULL);
        CHECK(strstr(rfm_attach_why(), "limit of locked memory") != NULL);
        CHECK(strstr(rfm_attach_why(), "ulimit -l") != NULL);
        /* the next one works */
        attr = t_dial(&worker, RFM_TRANSPORT_VERBS);
        CHECK_OK(rfm_invoker_attach_over(inv, &attr, &chan));
        CHECK(rfm_attach_why() == NULL);
        t_invoker_end(inv);
        t_worker_end(&worker);
    }
}

/* what needs it fails and says why, all else is served */
static void lacks_it(struct rfm_invoker *inv, struct t_call *large)
{
    struct t_call small;

    CHECK_EQ(t_invoke(large), RFM_NO_ROOM);
    CHECK(strstr(t_text(large), "limit of locked memory") != NULL);
    t_call_inline(&small, inv, "echo", 8, 8);
    CHECK_EQ(t_invoke(&small), RFM_DONE);
    CHECK_EQ(t_invoke(large), RFM_NO_ROOM);
    t_call_end(&small);
    t_call_end(large);
    t_call_inline(&small, inv, "echo", 8, 8);
    CHECK_EQ(t_invoke(&small), RFM_DONE);
    t_call_end(&small);
}

/* Here or there, before its worker came or after: the channel goes on. */
static void an_arena_that_can_not_be_registered_fails_what_needs_it_alone(void)
{
    static const uint32_t places[2] = { RFM_BOUND, RFM_BOUND };
    static const uint64_t sizes[2] = { 64u << 20, 8 };
    static struct t_worker worker;

    if (!is_null()) {
        return;
    }
    for (int i = 0; i < 4; i++) {
        struct rfm_invoker *inv = t_invoker(SLOTS, SLOT_BYTES, 20);
        struct t_call large;
        int there = i % 2;
        bool later = i >= 2;

        t_worker_start(&worker, true, 20);
        if (later) {
            (void)t_worker_attach(&worker, inv);
            fail_registration(there);
            t_call_make(&large, inv, "echo", 1, 1, places, sizes);
        } else {
            t_call_make(&large, inv, "echo", 1, 1, places, sizes);
            fail_registration(4 + there);
            (void)t_worker_attach(&worker, inv);
        }
        lacks_it(inv, &large);
        t_invoker_end(inv);
        t_worker_end(&worker);
    }
}

/* --- many ------------------------------------------------------------------------------ */

static void one_side_has_many_links_that_come_and_go(void)
{
    struct pair pairs[40];
    uint32_t rounds = t_scaled(3, 1);
    struct pair p;

    open_sides(&p);
    for (uint32_t round = 0; round < rounds; round++) {
        for (uint32_t i = 0; i < 40; i++) {
            pairs[i] = p;
            connect_ends(&pairs[i]);
        }
        for (uint64_t id = 1; id < 30; id++) {
            for (uint32_t i = 0; i < 40; i++) {
                ask(&pairs[i], id % SLOTS, id, 100);
            }
            for (uint32_t i = 0; i < 40; i++) {
                until_asked(&pairs[i], id % SLOTS, id, 100);
                answer(&pairs[i], id % SLOTS, id, 100);
            }
            for (uint32_t i = 0; i < 40; i++) {
                until_answered(&pairs[i], id % SLOTS, id, 100);
            }
        }
        for (uint32_t i = 0; i < 40; i++) {
            ops->worker_close(pairs[i].worker);
            ops->rank_close(pairs[i].rank);
        }
        CHECK_EQ(((struct verbs_side *)p.rank_side)->cq_used, 0);
        CHECK_EQ(((struct verbs_side *)p.worker_side)->cq_used, 0);
    }
    down(&p);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 120);
    CHECK_EQ(t_transport(), RFM_TRANSPORT_VERBS);
    ops = rfm_transport_find(RFM_TRANSPORT_VERBS);
    RUN(slots_arrive_exactly);
    RUN(every_size_arrives_whatever_the_queue_pair_sends_inline);
    RUN(receives_never_run_out_however_full_the_slots_are);
    RUN(outputs_arrive_before_their_reply_does);
    RUN(what_does_not_fit_the_send_queue_goes_on_by_itself);
    RUN(a_sleeper_is_woken_by_replies_and_not_by_what_it_sent);
    RUN(a_wake_up_that_another_took_is_passed_on);
    RUN(immediates_that_make_no_sense_end_the_link);
    RUN(slots_too_short_or_too_long_end_the_link);
    RUN(a_second_request_in_a_slot_ends_the_link);
    RUN(lines_that_lie_are_not_served);
    RUN(more_requests_than_slots_are_an_error_and_no_wait);
    RUN(writes_to_what_was_not_granted_are_refused_and_change_nothing);
    RUN(replies_that_nobody_asked_for_end_the_link);
    RUN(a_reply_with_another_id_is_not_taken);
    RUN(an_arena_that_is_gone_can_not_be_written_to);
    RUN(a_mirror_that_is_gone_can_not_be_written_to);
    RUN(after_the_fence_not_one_byte_changes);
    RUN(what_had_come_before_the_fence_counts);
    RUN(the_last_replies_of_a_worker_that_leaves_arrive);
    RUN(a_parcel_that_makes_no_sense_is_refused);
    RUN(what_is_said_of_an_arena_is_checked);
    RUN(a_device_that_is_not_there_is_named);
    RUN(a_device_describes_itself);
    RUN(a_port_that_goes_down_ends_what_is_in_flight_and_says_so);
    RUN(a_peer_that_vanished_is_noticed_by_the_next_write);
    RUN(memory_that_can_not_be_registered_is_explained);
    RUN(an_arena_that_can_not_be_registered_fails_what_needs_it_alone);
    RUN(one_side_has_many_links_that_come_and_go);
    return t_finish();
}

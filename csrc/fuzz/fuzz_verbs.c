/*
 * The verbs transport, over a device that is none, and a peer that posts
 * anything to its queue pair: parcels, immediates, lengths, lines, keys, what
 * is said of arenas. Each input is a connection; either side may be the liar.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>

#include "fuzz.h"
#include "shm.h"
#include "verbs/null/provider.h"
#include "verbs/verbs.h"

#define SLOTS       8u
#define SLOT_BYTES  1024u
#define ARENA       7u
#define ARENA_BYTES 8192u
#define MAX_ACTS    64
#define MAX_WRITE   4096u

static const struct rfm_transport *const ops = &rfm_verbs;
static struct rfm_side *sides[2];       /* the rank's, the worker's */
static struct rfm_link *links[2];
static uint8_t *arenas[2];              /* the rank's, the worker's mirror */
static uint8_t *others[2];              /* of an arena that is said to be */
static uint32_t other_number;
static uint64_t next_id;
static uint64_t asked[SLOTS];           /* rank: id; 0: free */
static uint64_t taken[SLOTS];           /* worker: id; 0: none is there */
static uint64_t last[SLOTS];

enum { CONNECTED, BAD_PARCEL, ASKED, ANSWERED, LARGE, WITH_DATA, IN_ARENA,
       RANK_BROKE, WORKER_BROKE, BAD_ARENA, GOOD_ARENA, GONE_DOWN, GOALS };
static struct fuzz_goal goals[GOALS] = {
    { "two ends", 0 },             { "a parcel that is refused", 0 },
    { "a request", 0 },            { "a reply", 0 },
    { "a payload beside the line", 0 }, { "outputs in an arena", 0 },
    { "a write into an arena", 0 }, { "a rank that ends its link", 0 },
    { "a worker that ends its link", 0 }, { "an arena that is refused", 0 },
    { "an arena that is taken", 0 }, { "a port that goes down", 0 },
};

static struct verbs_link *end(uint32_t side)
{
    return (struct verbs_link *)links[side];
}

/* --- up and down ---------------------------------------------------------- */

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    fuzz_goals(goals, GOALS);
    rfm_null_alone(true);
    for (uint32_t i = 0; i < 2; i++) {
        struct rfm_side_attr attr = { .rank = i == 0 };

        FUZZ_CHECK(ops->side_open(&attr, &sides[i]) == RFM_OK);
    }
    return 0;
}

static void change(struct rfm_parcel *parcel, const struct fuzz_act *act,
                   const uint8_t *bytes)
{
    for (uint32_t i = 0; (i < act->n) && (i < sizeof(parcel->bytes)); i++) {
        parcel->bytes[i] = (uint8_t)(parcel->bytes[i] + bytes[i]);
    }
    parcel->n_bytes += act->b;      /* 255: one less */
    parcel->n_bytes &= 0xffu;
}

static struct rfm_link_attr attr_of(uint32_t side)
{
    return (struct rfm_link_attr){ .side = sides[side], .slots = SLOTS,
                                   .slot_bytes = SLOT_BYTES, .data_fd = -1 };
}

static bool connect_ends(const struct fuzz_act *lie, const uint8_t *bytes)
{
    struct rfm_link_attr rank = attr_of(0);
    struct rfm_link_attr worker = attr_of(1);
    struct rfm_parcel there = { 0 };
    struct rfm_parcel back = { 0 };
    struct rfm_ctl_attach body;

    FUZZ_CHECK(ops->rank_open(&rank, &links[0], &body, &there) == RFM_OK);
    if ((lie != NULL) && (lie->a == 0)) {
        change(&there, lie, bytes);
    }
    if (ops->worker_open(&worker, &body, &there, &links[1], &back) < 0) {
        links[1] = NULL;
        (void)fuzz_read(ops->why(), strlen(ops->why()));
        return false;
    }
    if ((lie != NULL) && (lie->a != 0)) {
        change(&back, lie, bytes);
    }
    return ops->rank_attached(links[0], &back) == RFM_OK;
}

static void share_arena(void)
{
    struct rfm_parcel there = { 0 };
    struct rfm_parcel back = { 0 };

    FUZZ_CHECK(ops->side_arena(sides[0], ARENA, arenas[0], ARENA_BYTES,
                               &there) == RFM_OK);
    FUZZ_CHECK(ops->worker_arena(links[1], ARENA, arenas[1], ARENA_BYTES,
                                 &there, &back) == RFM_OK);
    FUZZ_CHECK(ops->rank_arena(links[0], ARENA, &back) == RFM_OK);
}

static void down(void)
{
    goals[RANK_BROKE].times   += (links[0]->failed != 0);
    goals[WORKER_BROKE].times += (links[1] != NULL) && (links[1]->failed != 0);
    for (uint32_t i = 0; i < 2; i++) {
        if (links[i] == NULL) {
            continue;
        }
        FUZZ_CHECK((links[i]->failed == 0) == (links[i]->why == NULL));
        if (i == 0) {
            ops->rank_fence(links[0]);
            ops->rank_close(links[0]);
        } else {
            ops->worker_close(links[1]);
        }
        links[i] = NULL;
    }
    ops->side_arena_drop(sides[0], ARENA);
    if (other_number != ARENA) {
        ops->side_arena_drop(sides[0], other_number);
    }
    rfm_null_port(true);
    /* what the device still has to say is of links that are no more */
    for (uint32_t i = 0; i < 2; i++) {
        (void)ops->side_progress(sides[i]);
        ops->side_arm(sides[i]);
        ops->side_woken(sides[i]);
    }
}

/* --- what honest sides do ------------------------------------------------- */

static void look_as_worker(uint32_t slot)
{
    struct rfm_request_line line;
    const uint8_t *payload;

    if ((taken[slot] != 0) ||
        !ops->worker_poll(links[1], slot, last[slot], &line, &payload)) {
        return;
    }
    FUZZ_CHECK((line.id != 0) && (line.id != last[slot]));
    FUZZ_CHECK(line.in_bytes <= SLOT_BYTES);
    (void)fuzz_read((line.in_bytes > RFM_INLINE_BYTES) ? payload : line.payload,
                    line.in_bytes);
    taken[slot] = line.id;
    last[slot]  = line.id;
    goals[ASKED].times++;
}

static void look_as_rank(uint32_t slot)
{
    struct rfm_reply_line line;
    const uint8_t *payload;

    if ((asked[slot] == 0) ||
        !ops->rank_poll(links[0], slot, asked[slot], &line, &payload)) {
        return;
    }
    FUZZ_CHECK(line.id == asked[slot]);
    (void)fuzz_read(payload, SLOT_BYTES);
    asked[slot] = 0;
    goals[ANSWERED].times++;
}

static void look(void)
{
    for (uint32_t i = 0; i < 2; i++) {
        (void)ops->side_progress(sides[i]);
        ops->side_arm(sides[i]);
        ops->side_woken(sides[i]);
    }
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        look_as_worker(slot);
        look_as_rank(slot);
    }
}

static void ask(const struct fuzz_act *act)
{
    static struct rfm_traffic traffic[SLOTS];
    static struct rfm_region regions[SLOTS];
    uint32_t slot = act->b % SLOTS;
    struct rfm_request_line line = { .id = ++next_id };

    if (asked[slot] != 0) {
        return;
    }
    line.in_bytes = (act->c & 3u) * 100u;
    goals[LARGE].times += line.in_bytes > RFM_INLINE_BYTES;
    regions[slot] = (struct rfm_region){
        .arena = ARENA, .offset = 64, .size = 2000, .address = arenas[0] + 64,
    };
    traffic[slot] = (struct rfm_traffic){
        .push = &regions[slot], .n_push = (act->c >> 2) & 1u,
    };
    ops->rank_ready(links[0], slot);
    memset(ops->rank_payload(links[0], slot), 6, line.in_bytes);
    (void)ops->rank_post(links[0], slot, &line, &traffic[slot]);
    asked[slot] = line.id;
}

static void answer(const struct fuzz_act *act)
{
    uint32_t slot = act->b % SLOTS;
    struct rfm_reply_line line = { .id = taken[slot], .out_bytes = 100 };
    struct rfm_region region = {
        .arena = ARENA, .offset = 4096, .size = 3000,
        .address = arenas[1] + 4096,
    };

    if (taken[slot] == 0) {
        return;
    }
    taken[slot] = 0;
    memset(ops->worker_payload(links[1], slot), 8, 100);
    goals[WITH_DATA].times += (act->c & 1u) != 0;
    ops->worker_reply(links[1], slot, &line, 100, &region, act->c & 1u);
}

/* --- what a liar does ----------------------------------------------------- */

static void post(uint32_t side, const struct ibv_send_wr *given,
                 uint32_t length)
{
    struct verbs_link *v = end(side);
    struct ibv_send_wr wr = *given;
    struct ibv_send_wr *bad;
    struct ibv_sge sge = {
        .addr = (uint64_t)(uintptr_t)v->stage, .length = length,
        .lkey = v->stage_mr->lkey,
    };

    wr.wr_id      = verbs_wr_id(VERBS_SEND, v->index, (uint32_t)v->done);
    wr.sg_list    = &sge;
    wr.num_sge    = length > 0;
    wr.send_flags = IBV_SEND_SIGNALED | IBV_SEND_SOLICITED;
    (void)ibv_post_send(v->qp, &wr, &bad);
}

static void stray(const struct fuzz_act *act, const uint8_t *bytes)
{
    struct verbs_link *v = end(act->a & 1u);
    struct fuzz_write how = { 0 };
    struct ibv_send_wr wr = { 0 };
    uint64_t n = act->n;

    memcpy(&how, bytes, (n < sizeof(how)) ? n : sizeof(how));
    if (n > sizeof(how)) {
        n -= sizeof(how);
        memcpy(v->stage, bytes + sizeof(how),
               (n < v->ring_bytes) ? n : v->ring_bytes);
    }
    wr.opcode   = (how.with_imm & 1u) ? IBV_WR_RDMA_WRITE_WITH_IMM
                                      : IBV_WR_RDMA_WRITE;
    wr.imm_data = htonl(how.imm);
    if (((how.into_arena & 1u) != 0) && (v->n_arenas > 0)) {
        wr.wr.rdma.remote_addr = v->arenas[0].address + how.offset;
        wr.wr.rdma.rkey        = v->arenas[0].rkey + how.key;
        goals[IN_ARENA].times++;
    } else {
        wr.wr.rdma.remote_addr = v->peer_ring + how.offset;
        wr.wr.rdma.rkey        = v->peer_key + how.key;
    }
    post(act->a & 1u, &wr, how.length % (MAX_WRITE + 1u));
}

static void slot_as_it_should_be(const struct fuzz_act *act,
                                 const uint8_t *bytes)
{
    uint32_t slot = act->b % SLOTS;
    struct verbs_link *v = end(act->a & 1u);
    struct ibv_send_wr wr = {
        .opcode = IBV_WR_RDMA_WRITE_WITH_IMM, .imm_data = htonl(slot),
    };
    uint64_t id;

    memset(v->stage, 0, v->stride);
    memcpy(v->stage, bytes, (act->n < v->stride) ? act->n : v->stride);
    /* a right id lies at the difference 0 */
    memcpy(&id, v->stage, sizeof(id));
    id += (act->a & 1u) ? asked[slot] : ++next_id;
    memcpy(v->stage, &id, sizeof(id));
    wr.wr.rdma.remote_addr = v->peer_ring + slot * v->stride;
    wr.wr.rdma.rkey        = v->peer_key;
    post(act->a & 1u, &wr, act->n);
}

static void say_arena(const struct fuzz_act *act, const uint8_t *bytes)
{
    struct rfm_parcel said = { 0 };
    struct rfm_parcel out = { 0 };
    struct fuzz_arena how = { 0 };
    struct fuzz_act rest = *act;
    int rc;

    if (act->n < sizeof(how)) {
        return;
    }
    memcpy(&how, bytes, sizeof(how));
    rest.n -= sizeof(how);
    if ((other_number != 0) && (other_number != how.number)) {
        return;                 /* there is memory for one more only */
    }
    if ((act->a & 1u) != 0) {   /* the worker says it of its mirror */
        if (how.honest != 0) {
            rfm_verbs_memory_out(end(1)->ring_mr, &said);
            ((struct rfm_verbs_memory *)said.bytes)->bytes = ARENA_BYTES;
        }
        change(&said, &rest, bytes + sizeof(how));
        rc = ops->rank_arena(links[0], how.number, &said);
    } else {
        if (how.honest != 0) {
            (void)ops->side_arena(sides[0], how.number, others[0], ARENA_BYTES,
                                  &said);
            other_number = how.number;
        }
        change(&said, &rest, bytes + sizeof(how));
        rc = ops->worker_arena(links[1], how.number, others[1], ARENA_BYTES,
                               &said, &out);
    }
    goals[(rc < 0) ? BAD_ARENA : GOOD_ARENA].times++;
}

static void act_as_peer(const struct fuzz_act *act, const uint8_t *bytes)
{
    switch (act->what % QP_ACTS) {
    case QP_WRITE:
        stray(act, bytes);
        break;
    case QP_SLOT:
        slot_as_it_should_be(act, bytes);
        break;
    case QP_ASK:
        ask(act);
        break;
    case QP_ANSWER:
        answer(act);
        break;
    case QP_ARENA:
        say_arena(act, bytes);
        break;
    case QP_DROP:
        (void)ops->worker_arena(links[1], act->b, NULL, 0, NULL, NULL);
        break;
    case QP_PORT:
        rfm_null_port(false);
        goals[GONE_DOWN].times++;
        break;
    default:
        break;                  /* a parcel is said once, at the beginning */
    }
}

/* --- an input ------------------------------------------------------------- */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_in in = { data, size };
    struct fuzz_in first = in;
    struct fuzz_act act;
    const uint8_t *bytes;
    bool lies = fuzz_next(&first, &act, &bytes) && (act.what == QP_PARCEL);
    int lowest = fuzz_lowest_fd();

    memset(asked, 0, sizeof(asked));
    memset(taken, 0, sizeof(taken));
    memset(last, 0, sizeof(last));
    other_number = 0;
    for (uint32_t i = 0; i < 2; i++) {
        /* from the heap, so that a byte too far is seen */
        arenas[i] = calloc(1, ARENA_BYTES);
        others[i] = calloc(1, ARENA_BYTES);
        FUZZ_CHECK((arenas[i] != NULL) && (others[i] != NULL));
    }
    if (connect_ends(lies ? &act : NULL, bytes)) {
        goals[CONNECTED].times++;
        share_arena();
        for (int i = 0; (i < MAX_ACTS) && fuzz_next(&in, &act, &bytes); i++) {
            act_as_peer(&act, bytes);
            if (act.c < 128) {
                look();
            }
        }
        look();
    } else {
        goals[BAD_PARCEL].times++;
    }
    down();
    for (uint32_t i = 0; i < 2; i++) {
        free(arenas[i]);
        free(others[i]);
    }
    fuzz_check_fds(lowest);
    return 0;
}

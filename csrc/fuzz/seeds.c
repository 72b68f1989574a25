/*
 * Writes what the fuzz targets begin with: honest conversations, made of the
 * structures of rfm_wire.h, that reach everything there is to reach.
 *
 *     seeds DIRECTORY        one directory in it for each target
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/stat.h>

#include "crc32c.h"
#include "frame.h"
#include "fuzz.h"
#include "rfm.h"
#include "stream.h"

#define SLOTS      4u
#define SLOT_BYTES 256u
#define ARENA      1u
#define ARENA_BYTES 8192u

static const char *root;
static uint8_t input[1u << 16];
static size_t n_input;

/* --- writing -------------------------------------------------------------- */

static void begin(uint8_t how)
{
    input[0] = how;
    n_input  = 1;
}

static void put(const void *bytes, size_t n)
{
    FUZZ_CHECK(n_input + n <= sizeof(input));
    if (n > 0) {
        memcpy(input + n_input, bytes, n);
        n_input += n;
    }
}

static void act_of(uint8_t what, uint8_t a, uint8_t b, uint8_t c,
                   const void *bytes, size_t n)
{
    struct fuzz_act act = { what, a, b, c, (uint16_t)n };

    put(&act, sizeof(act));
    put(bytes, n);
}

static void save(const char *target, const char *name)
{
    char path[4096];
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s", root, target);
    FUZZ_CHECK((mkdir(path, 0777) == 0) || (errno == EEXIST));
    snprintf(path, sizeof(path), "%s/%s/%s", root, target, name);
    file = fopen(path, "we");
    FUZZ_CHECK(file != NULL);
    FUZZ_CHECK(fwrite(input, 1, n_input, file) == n_input);
    FUZZ_CHECK(fclose(file) == 0);
}

/* --- bodies of frames ----------------------------------------------------- */

static uint8_t body[4096];
static size_t n_body;

static void body_begin(const void *bytes, size_t n)
{
    memcpy(body, bytes, n);
    n_body = n;
}

static void body_more(const void *bytes, size_t n)
{
    if (n > 0) {
        memcpy(body + n_body, bytes, n);
        n_body += n;
    }
}

static void kernel_body(uint32_t number, uint32_t kind, const char *blob)
{
    struct rfm_ctl_kernel head = {
        .kernel = number, .kind = kind, .blob_bytes = strlen(blob),
    };

    body_begin(&head, sizeof(head));
    body_more(blob, strlen(blob));
}

static void bind_body(uint32_t number, uint32_t kernel, uint32_t flags,
                      uint16_t n_in, uint16_t n_out,
                      const struct rfm_wire_arg *args, const char *meta)
{
    struct rfm_ctl_bind head = {
        .binding = number, .kernel = kernel, .n_in = n_in, .n_out = n_out,
        .flags = flags, .meta_bytes = strlen(meta),
    };

    body_begin(&head, sizeof(head));
    body_more(args, (n_in + n_out) * sizeof(*args));
    body_more(meta, strlen(meta));
}

static uint64_t segment_bytes(void)
{
    uint64_t n = RFM_CONTROL_BYTES + 2ull * SLOTS * (SLOT_BYTES + 128u);

    return (n + 4095u) & ~4095ull;
}

/* --- to a worker ---------------------------------------------------------- */

static bool over_tcp;
static bool with_crc;
static uint32_t n_frames;
static uint64_t next_id;
static uint32_t next_slot;

static void frame(uint8_t type, uint8_t n_fds, uint8_t kinds)
{
    act_of(RANK_FRAME, type, n_fds, kinds, body, n_body);
    n_frames++;
}

static void rank_begins(uint8_t how)
{
    struct rfm_tcp_parcel parcel = { 0 };
    struct rfm_ctl_attach attach = {
        .slots = SLOTS, .slot_bytes = SLOT_BYTES,
    };

    begin(how);
    over_tcp  = how != FUZZ_SHM;
    with_crc  = how == FUZZ_TCP_CRC;
    n_frames  = 0;
    next_id   = 1;
    next_slot = 0;
    attach.transport     = over_tcp ? RFM_TRANSPORT_TCP : RFM_TRANSPORT_SHM;
    attach.segment_bytes = over_tcp ? 0 : segment_bytes();
    parcel.flags         = with_crc ? RFM_STREAM_CRC : 0;
    body_begin(&attach, sizeof(attach));
    if (over_tcp) {
        body_more(&parcel, sizeof(parcel));
        frame(RFM_CTL_ATTACH, 0, 0);
    } else {
        frame(RFM_CTL_ATTACH, 3,
              FUZZ_FDS(FUZZ_FD_MEMORY, FUZZ_FD_DOOR, FUZZ_FD_EVENT, 0));
    }
    act_of(RANK_PAUSE, 0, 0, 0, NULL, 0);
}

static void rank_sends_arena(uint32_t number)
{
    struct rfm_ctl_arena arena = { .arena = number, .bytes = ARENA_BYTES };

    body_begin(&arena, sizeof(arena));
    frame(RFM_CTL_ARENA, over_tcp ? 0 : 1, FUZZ_FDS(FUZZ_FD_MEMORY, 0, 0, 0));
}

static void rank_binds(uint32_t number, uint32_t kind, uint32_t flags,
                       uint16_t n_in, uint16_t n_out,
                       const struct rfm_wire_arg *args)
{
    kernel_body(number, kind, "echo");
    frame(RFM_CTL_KERNEL, 0, 0);
    bind_body(number, number, flags, n_in, n_out, args, "meta");
    frame(RFM_CTL_BIND, 0, 0);
}

/* With the data of `n_regions` pieces of the arena, where it is a stream. */
static void rank_asks(uint32_t binding, uint32_t flags, const void *payload,
                      uint64_t n, uint32_t n_regions)
{
    struct s_message m;
    uint8_t bytes[S_BYTES];
    uint32_t slot = next_slot++ % SLOTS;

    memset(&m, 0, sizeof(m));
    m.line.request = (struct rfm_request_line){
        .id       = next_id++,
        .binding  = binding,
        .flags    = flags | (over_tcp ? n_frames << RFM_REQ_AFTER_SHIFT : 0),
        .in_bytes = n,
    };
    if (n <= RFM_INLINE_BYTES) {
        memcpy(m.line.request.payload, payload, n);
    } else {
        m.n_payload = (uint32_t)n;
        memcpy(m.payload, payload, n);
    }
    if (!over_tcp) {
        memcpy(bytes, &m.line, sizeof(m.line));
        memcpy(bytes + sizeof(m.line), m.payload, m.n_payload);
        act_of(RANK_SLOT, (uint8_t)slot, 0, 0, bytes,
               sizeof(m.line) + m.n_payload);
        return;
    }
    m.head = (struct rfm_stream_head){
        .magic = RFM_STREAM_MAGIC, .type = RFM_STREAM_REQUEST,
        .flags = with_crc ? RFM_STREAM_CRC : 0, .slot = slot,
    };
    m.n_descs = n_regions;
    for (uint32_t i = 0; i < n_regions; i++) {
        m.descs[i] = (struct rfm_desc){ .arena = ARENA, .offset = 64ull * i,
                                        .size = 64 };
    }
    m.n_data = 64 * n_regions;
    memset(m.data, 3, m.n_data);
    s_count(&m);
    n = s_pack(&m, bytes);
    /* the target adds the crc, so that a changed message has a right one */
    act_of(RANK_MESSAGE, FUZZ_FIT | (with_crc ? FUZZ_CRC : 0), 0, 0, bytes,
           n - (with_crc ? 4 : 0));
}

static const struct rfm_wire_arg inline_args[2] = {
    { .place = RFM_INLINE, .size = 8 }, { .place = RFM_INLINE, .size = 8 },
};
static const struct rfm_wire_arg large_args[2] = {
    { .place = RFM_INLINE, .size = 150 }, { .place = RFM_INLINE, .size = 120 },
};
static const struct rfm_wire_arg bound_args[3] = {
    { .place = RFM_BOUND, .arena = ARENA, .offset = 0, .size = 64 },
    { .place = RFM_INLINE, .size = 40 },
    { .place = RFM_BOUND, .flags = RFM_ARG_CANARY, .arena = ARENA,
      .offset = 128, .size = 64 },
};
static const struct rfm_wire_arg call_args[2] = {
    { .place = RFM_CALL, .size = 64 },
    { .place = RFM_CALL, .flags = RFM_ARG_CANARY, .size = 64 },
};

static void rank_pauses(void)
{
    act_of(RANK_PAUSE, 0, 0, 0, NULL, 0);
}

static void calls_of_all_places(uint32_t kind)
{
    struct rfm_desc descs[2] = {
        { .arena = ARENA, .offset = 0, .size = 64 },
        { .arena = ARENA, .offset = 1024, .size = 64 },
    };
    struct rfm_desc refused[2] = {
        { .arena = ARENA, .offset = ARENA_BYTES - 63, .size = 64 },
        { .arena = 9, .offset = 0, .size = 64 },
    };
    uint8_t bytes[200];

    memset(bytes, 1, sizeof(bytes));
    rank_binds(1, kind, 0, 1, 1, inline_args);
    rank_asks(1, 0, bytes, 8, 0);
    rank_pauses();
    rank_binds(2, kind, 0, 1, 1, large_args);
    rank_asks(2, 0, bytes, 150, 0);
    rank_pauses();
    rank_sends_arena(ARENA);
    rank_binds(3, kind, 0, 2, 1, bound_args);
    rank_asks(3, 0, bytes, 40, 1);
    rank_asks(3, 0, bytes, 40, 1);
    rank_pauses();
    rank_binds(4, kind, 0, 1, 1, call_args);
    rank_asks(4, 0, descs, sizeof(descs), 1);
    rank_pauses();
    rank_asks(4, 0, refused, sizeof(refused), 0);
    rank_pauses();
    rank_asks(77, 0, bytes, 8, 0);
    rank_pauses();
}

static void objects_and_kept_results(void)
{
    struct {
        struct rfm_object head;
        uint64_t sizes[1];
        struct rfm_desc refs[1];
        uint8_t part[16];
    } object = {
        .head = { .n_parts = 1, .n_refs = 1 }, .sizes = { 16 },
        .refs = { { .arena = ARENA, .offset = 64, .size = 32 } },
    };
    struct rfm_desc staged = { .arena = ARENA, .offset = 0, .size = 64 };
    struct rfm_wire_fetch fetch = {
        .kept_id = 1, .into = { .arena = ARENA, .offset = 2048, .size = 100 },
    };

    rank_sends_arena(ARENA);
    rank_binds(1, 2, RFM_BIND_OBJECT, 0, 0, NULL);
    for (uint8_t i = 0; i < 3; i++) {
        object.part[0] = i;
        rank_asks(1, RFM_REQ_OBJECT | RFM_REQ_CLAIM, &object, sizeof(object),
                  1);
        rank_pauses();
    }
    rank_asks(1, RFM_REQ_OBJECT | RFM_REQ_STAGED, &staged, sizeof(staged), 1);
    rank_asks(0, RFM_REQ_FETCH, &fetch, sizeof(fetch), 0);
    rank_pauses();
    act_of(RANK_FRAME, RFM_CTL_DISCARD, 0, 0, NULL, 0);
    n_frames++;
    rank_pauses();
}

static void what_is_taken_back(void)
{
    struct rfm_ctl_number number = { .number = 1 };
    uint8_t bytes[8] = { 1 };

    rank_binds(1, 2, 0, 1, 1, inline_args);
    act_of(RANK_CLAIM, 0, 0, RFM_CLAIM_TAKEN_BACK, NULL, 0);
    rank_asks(1, RFM_REQ_CLAIM, bytes, 8, 0);
    rank_pauses();
    rank_asks(1, RFM_REQ_CLAIM, bytes, 8, 0);
    rank_pauses();
    body_begin(&number, sizeof(number));
    frame(RFM_CTL_UNBIND, 0, 0);
    rank_asks(1, 0, bytes, 8, 0);
    rank_pauses();
    rank_sends_arena(1);
    rank_sends_arena(2);
    body_begin(&number, sizeof(number));
    frame(RFM_CTL_ARENA_DROP, 0, 0);
    rank_pauses();
}

static void what_can_not_be_bound(void)
{
    uint8_t bytes[8] = { 1 };

    kernel_body(1, 0, "\xff");
    frame(RFM_CTL_KERNEL, 0, 0);
    bind_body(1, 1, 0, 1, 1, inline_args, "");
    frame(RFM_CTL_BIND, 0, 0);
    rank_asks(1, 0, bytes, 8, 0);
    rank_pauses();
    kernel_body(2, 0, "k");
    frame(RFM_CTL_KERNEL, 0, 0);
    bind_body(2, 2, 0, 1, 1, inline_args, "\xff");
    frame(RFM_CTL_BIND, 0, 0);
    rank_asks(2, 0, bytes, 8, 0);
    bind_body(3, 2, 0, 2, 1, bound_args, "");      /* no such arena */
    frame(RFM_CTL_BIND, 0, 0);
    rank_asks(3, 0, bytes, 8, 0);
    rank_pauses();
}

static void seeds_for_workers(void)
{
    static const struct {
        uint8_t how;
        const char *name;
    } ways[] = {
        { FUZZ_SHM, "shm" }, { FUZZ_TCP, "tcp" }, { FUZZ_TCP_CRC, "crc" },
    };

    for (size_t i = 0; i < 3; i++) {
        char name[64];

        for (uint32_t kind = 0; kind < 3; kind++) {
            rank_begins(ways[i].how);
            calls_of_all_places(kind);
            snprintf(name, sizeof(name), "%s-calls-%u", ways[i].name, kind);
            save("worker", name);
        }
        rank_begins(ways[i].how);
        objects_and_kept_results();
        snprintf(name, sizeof(name), "%s-objects", ways[i].name);
        save("worker", name);
        rank_begins(ways[i].how);
        what_is_taken_back();
        snprintf(name, sizeof(name), "%s-claims", ways[i].name);
        save("worker", name);
        rank_begins(ways[i].how);
        what_can_not_be_bound();
        snprintf(name, sizeof(name), "%s-refused", ways[i].name);
        save("worker", name);
    }
}

/* --- to a rank ------------------------------------------------------------ */

static void worker_says(uint8_t type, uint8_t n_fds, uint8_t kinds)
{
    act_of(WORKER_FRAME, type, n_fds, kinds, body, n_body);
}

static void worker_begins(uint8_t how)
{
    struct rfm_ctl_attached attached = { .pid = 1 };
    struct rfm_ctl_arena_ready ready = { .arena = ARENA };
    struct rfm_tcp_parcel parcel = { 0 };

    begin(how);
    over_tcp     = how != FUZZ_SHM;
    with_crc     = how == FUZZ_TCP_CRC;
    parcel.flags = with_crc ? RFM_STREAM_CRC : 0;
    body_begin(&attached, sizeof(attached));
    if (over_tcp) {
        body_more(&parcel, sizeof(parcel));
        worker_says(RFM_CTL_ATTACHED, 0, 0);
        body_begin(&ready, sizeof(ready));
        worker_says(RFM_CTL_ARENA_READY, 0, 0);
    } else {
        worker_says(RFM_CTL_ATTACHED, 2,
                    FUZZ_FDS(FUZZ_FD_DOOR, FUZZ_FD_EVENT, 0, 0));
    }
}

/* Id and slot are those of the call. */
static void worker_answers(uint8_t call, const struct rfm_reply_line *line,
                           const void *payload, uint32_t n, uint32_t n_data)
{
    struct s_message m;
    uint8_t bytes[S_BYTES];
    uint32_t packed;

    memset(&m, 0, sizeof(m));
    m.line.reply = *line;
    m.n_payload  = n;
    if (n > 0) {
        memcpy(m.payload, payload, n);
    }
    if (!over_tcp) {
        memcpy(bytes, &m.line, sizeof(m.line));
        memcpy(bytes + sizeof(m.line), m.payload, n);
        act_of(WORKER_REPLY, 0, 0, call, bytes, sizeof(m.line) + n);
        return;
    }
    m.head = (struct rfm_stream_head){
        .magic = RFM_STREAM_MAGIC, .type = RFM_STREAM_REPLY,
        .flags = with_crc ? RFM_STREAM_CRC : 0,
    };
    if (n_data > 0) {
        m.n_descs  = 1;
        m.n_data   = n_data;
        m.descs[0] = (struct rfm_desc){ .arena = ARENA, .size = n_data };
        memset(m.data, 5, n_data);
    }
    s_count(&m);
    packed = s_pack(&m, bytes);
    act_of(WORKER_MESSAGE, FUZZ_FIT | (with_crc ? FUZZ_CRC : 0), 0, call, bytes,
           packed - (with_crc ? 4 : 0));
}

static void is_called(uint8_t call)
{
    act_of(WORKER_CALLED, call, 0, 0, NULL, 0);
}

static void answers_to_all_calls(void)
{
    struct rfm_reply_line line = { .out_bytes = 8, .exec_ns = 1000 };
    uint8_t payload[64 + 100 + 16] = { 0 };

    is_called(0);
    worker_answers(0, &line, NULL, 0, 0);
    is_called(0);
    is_called(1);
    is_called(2);
    memcpy(payload, (uint64_t[]){ 64, 100 }, 16);
    worker_answers(0, &line, NULL, 0, 0);
    line.out_bytes = 64;
    line.flags     = RFM_REP_SIZES;
    worker_answers(1, &line, payload, sizeof(payload), 64);
    line.flags = 0;
    worker_answers(2, &line, NULL, 0, 64);
    is_called(0);
    line = (struct rfm_reply_line){ .status = RFM_ST_KERNEL, .out_bytes = 5 };
    memcpy(line.payload, "error", 5);
    worker_answers(0, &line, NULL, 0, 0);
    is_called(0);
    line.status    = RFM_ST_BAD_KERNEL;
    line.out_bytes = 60;
    worker_answers(0, &line, payload, 60, 0);
}

static void answers_to_an_object(void)
{
    struct rfm_reply_line line = { .out_bytes = 16 };
    uint8_t payload[200] = { 0 };

    is_called(3);
    worker_answers(3, &line, NULL, 0, 0);
    is_called(3);
    line.out_bytes = 200;
    worker_answers(3, &line, payload, 200, 0);
    is_called(3);
    line.out_bytes = 64;
    line.flags     = RFM_REP_KEPT;
    worker_answers(3, &line, NULL, 0, 0);
    act_of(WORKER_FETCHED, 0, 0, 0, NULL, 0);
    line.flags = 0;
    worker_answers(3, &line, NULL, 0, 64);
}

static void a_worker_that_leaves(void)
{
    static const char words[] = "a core was wanted back";
    struct rfm_reply_line line = { .status = RFM_ST_BUSY };

    is_called(0);
    is_called(1);
    worker_answers(0, &line, NULL, 0, 0);
    n_body = 0;
    worker_says(RFM_CTL_DRAIN, 0, 0);
    body_begin(words, sizeof(words) - 1);
    worker_says(RFM_CTL_REFUSED, 0, 0);
    act_of(WORKER_TIME, 100, 0, 0, NULL, 0);
}

static void a_worker_that_lies(void)
{
    struct rfm_reply_line line = { .status = 77 };

    is_called(0);
    worker_answers(0, &line, NULL, 0, 0);
    act_of(WORKER_TIME, 100, 0, 0, NULL, 0);
}

static void a_worker_that_refuses(uint8_t how)
{
    struct rfm_ctl_attached attached = { .status = RFM_ERR_NO_RESOURCE };

    begin(how);
    body_begin(&attached, sizeof(attached));
    body_more("no room", 7);
    worker_says(RFM_CTL_ATTACHED, 0, 0);
}

static void seeds_for_ranks(void)
{
    static const struct {
        const char *name;
        void (*make)(void);
    } plays[] = {
        { "calls", answers_to_all_calls },
        { "objects", answers_to_an_object },
        { "leaves", a_worker_that_leaves },
        { "lies", a_worker_that_lies },
    };
    static const uint8_t ways[] = { FUZZ_SHM, FUZZ_TCP, FUZZ_TCP_CRC };

    for (size_t i = 0; i < 3; i++) {
        char name[64];

        for (size_t k = 0; k < sizeof(plays) / sizeof(plays[0]); k++) {
            worker_begins(ways[i]);
            plays[k].make();
            snprintf(name, sizeof(name), "%u-%s", ways[i], plays[k].name);
            save("rank", name);
        }
        a_worker_that_refuses(ways[i]);
        snprintf(name, sizeof(name), "%u-refuses", ways[i]);
        save("rank", name);
    }
}

/* --- to a queue pair ------------------------------------------------------ */

static void qp_act(uint8_t what, uint8_t a, uint8_t b, uint8_t c)
{
    act_of(what, a, b, c, NULL, 0);
}

static void qp_parcels(void)
{
    for (uint8_t side = 0; side < 2; side++) {
        struct rfm_verbs_parcel lie = { 0 };
        char name[32];

        n_input = 0;
        act_of(QP_PARCEL, side, 0, 0, &lie, sizeof(lie));
        qp_act(QP_ASK, 0, 0, 0);
        qp_act(QP_ANSWER, 0, 0, 0);
        snprintf(name, sizeof(name), "parcel-%u", side);
        save("verbs", name);
        n_input = 0;
        lie.version = 1;
        act_of(QP_PARCEL, side, 0, 0, &lie, sizeof(lie));
        snprintf(name, sizeof(name), "version-%u", side);
        save("verbs", name);
    }
}

static void qp_calls(void)
{
    n_input = 0;
    for (uint8_t i = 0; i < 16; i++) {
        qp_act(QP_ASK, 0, i, i);
        qp_act(QP_ANSWER, 0, i, i);
    }
    save("verbs", "calls");
    n_input = 0;
    for (uint8_t i = 0; i < 8; i++) {
        qp_act(QP_ASK, 0, i, 128);
    }
    for (uint8_t i = 0; i < 8; i++) {
        qp_act(QP_ANSWER, 0, i, 0);
    }
    save("verbs", "all-slots");
}

static void qp_slots(void)
{
    struct rfm_request_line request = { .in_bytes = 8 };
    struct rfm_reply_line reply = { .out_bytes = 8 };

    n_input = 0;
    act_of(QP_SLOT, 0, 1, 0, &request, sizeof(request));
    qp_act(QP_ANSWER, 0, 1, 0);             /* which nobody asked for */
    save("verbs", "request");
    n_input = 0;
    qp_act(QP_ASK, 0, 2, 0);
    act_of(QP_SLOT, 1, 2, 0, &reply, sizeof(reply));
    act_of(QP_SLOT, 1, 2, 0, &reply, sizeof(reply));
    save("verbs", "reply");
}

static void qp_writes(void)
{
    for (uint8_t side = 0; side < 2; side++) {
        struct fuzz_write write = { .imm = 3, .length = 64, .with_imm = 1 };
        char name[32];

        n_input = 0;
        act_of(QP_WRITE, side, 0, 0, &write, sizeof(write));
        snprintf(name, sizeof(name), "write-%u", side);
        save("verbs", name);
        n_input = 0;
        write.with_imm   = 0;
        write.into_arena = 1;
        act_of(QP_WRITE, side, 0, 0, &write, sizeof(write));
        qp_act(QP_ASK, 0, 1, 4);
        qp_act(QP_ANSWER, 0, 1, 1);
        qp_act(QP_PORT, 0, 0, 0);
        snprintf(name, sizeof(name), "arena-%u", side);
        save("verbs", name);
    }
}

static void qp_arenas(void)
{
    struct {
        struct fuzz_arena how;
        struct rfm_verbs_memory said;
    } arena = { .how = { .number = 8, .honest = 1 } };

    n_input = 0;
    act_of(QP_ARENA, 0, 0, 0, &arena, sizeof(arena));
    act_of(QP_ARENA, 1, 0, 0, &arena, sizeof(arena));
    qp_act(QP_DROP, 0, 8, 0);
    qp_act(QP_DROP, 0, ARENA + 6, 0);
    arena.how.honest   = 0;
    arena.said.address = 4096;
    arena.said.bytes   = 100;
    act_of(QP_ARENA, 0, 0, 0, &arena, sizeof(arena));
    save("verbs", "arenas");
}

int main(int argc, char **argv)
{
    FUZZ_CHECK(argc == 2);
    root = argv[1];
    FUZZ_CHECK((mkdir(root, 0777) == 0) || (errno == EEXIST));
    seeds_for_workers();
    seeds_for_ranks();
    qp_parcels();
    qp_calls();
    qp_slots();
    qp_writes();
    qp_arenas();
    return 0;
}

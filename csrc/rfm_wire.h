/*
 * Bytes that leave a process: hello, control frames, slots, the worker's page.
 *
 * Little-endian, fixed width, explicit padding; every size and every offset
 * that the other side relies on is asserted below. Nothing here is trusted
 * when it is read: a value in shared memory is read once into a local, checked
 * against what was granted, and only then used.
 */
#ifndef RFM_WIRE_H
#define RFM_WIRE_H

#include <stddef.h>
#include <stdint.h>

#if !defined(__BYTE_ORDER__) || (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__)
#error "the wire is little-endian and so far only little-endian hosts are built"
#endif

#define RFM_PROTOCOL        1u
#define RFM_MAGIC           "RFAASMPI"
#define RFM_CACHE_LINE      64u
#define RFM_INLINE_BYTES    32u     /* payload that shares the header's line */
#define RFM_MAX_SLOTS       64u
#define RFM_MAX_SLOT_BYTES  (1u << 20)
#define RFM_MAX_ARGS        64u
#define RFM_MAX_FRAME       (64u << 20)
#define RFM_MAX_FRAME_FDS   4u
#define RFM_MAX_RANKS       64u     /* connections that one worker serves */
#define RFM_MAX_PARCEL      256u    /* a transport's own bytes in a frame */
/* A binding's number is (generation << 16 | index): the index is used again,
 * the number is not, so a late request never meets another's binding. */
#define RFM_MAX_BINDINGS    65536u
#define RFM_DIGEST_BYTES    32u
#define RFM_CANARY_BYTES    16u
#define RFM_REDZONE         64u     /* behind every block of an arena */
#define RFM_CANARY_WORD     0xa5c3f00d5afe7ea1ull

/* --- hello: the first 64 bytes on every connection, both ways ----------- */

enum rfm_hello_kind {
    RFM_HELLO_SESSION = 1,
    RFM_HELLO_WORKER  = 2,
    RFM_HELLO_DATA    = 3,
};

struct rfm_hello {
    char     magic[8];
    uint16_t protocol;
    uint16_t kind;
    uint32_t version;           /* major << 16 | minor << 8 | patch */
    uint64_t lease;
    uint32_t worker;
    int32_t  status;
    uint8_t  nonce[16];
    uint64_t session;           /* worker: of the rank's; 0: none */
    uint64_t data;              /* worker: data connections that follow */
};
_Static_assert(sizeof(struct rfm_hello) == 64, "hello is 64 bytes");
_Static_assert(offsetof(struct rfm_hello, lease) == 16, "hello.lease");
_Static_assert(offsetof(struct rfm_hello, nonce) == 32, "hello.nonce");
_Static_assert(offsetof(struct rfm_hello, session) == 48, "hello.session");

/* --- control frames ------------------------------------------------------ */

enum rfm_frame_type {
    RFM_CTL_ATTACH      = 1,    /* rank -> worker, fds: channel, door, event */
    RFM_CTL_ATTACHED    = 2,    /* worker -> rank, fds: door, pidfd          */
    RFM_CTL_ARENA       = 3,    /* rank -> worker, fd: arena                 */
    RFM_CTL_ARENA_DROP  = 4,
    RFM_CTL_KERNEL      = 5,
    RFM_CTL_BIND        = 6,
    RFM_CTL_UNBIND      = 7,
    RFM_CTL_DISCARD     = 8,    /* a kept result is not wanted               */
    RFM_CTL_DRAIN       = 9,    /* worker -> rank: send nothing new          */
    RFM_CTL_ARENA_READY = 10,   /* worker -> rank, remote: its mirror        */
    RFM_CTL_REFUSED     = 11,   /* worker -> rank, its last: a text          */
    RFM_AGENT_ADOPT     = 40,   /* agent -> worker, fd: a rank's connection  */
    RFM_AGENT_QUIT      = 41,
    RFM_AGENT_READY     = 48,   /* worker -> agent                           */
    RFM_AGENT_LIMITS    = 49,
    RFM_AGENT_GONE      = 50,
    RFM_SESSION_JSON    = 64,
};

struct rfm_frame {
    uint32_t length;            /* of the body */
    uint16_t type;
    uint16_t n_fds;
    uint64_t cookie;
};
_Static_assert(sizeof(struct rfm_frame) == 16, "frame header");

enum rfm_transport_number {
    RFM_TRANSPORT_SHM   = 0,
    RFM_TRANSPORT_TCP   = 1,
    RFM_TRANSPORT_VERBS = 2,
    RFM_TRANSPORTS      = 3,
};

struct rfm_ctl_attach {         /* followed by the transport's bytes */
    uint32_t slots;
    uint32_t slot_bytes;
    uint64_t segment_bytes;     /* shm: of its segment */
    uint64_t memory_limit;
    uint32_t transport;
    uint32_t reserved;
};
_Static_assert(sizeof(struct rfm_ctl_attach) == 32, "attach");

struct rfm_ctl_attached {       /* followed by the transport's bytes */
    int32_t  status;
    uint32_t pid;
    uint64_t reserved;
};
_Static_assert(sizeof(struct rfm_ctl_attached) == 16, "attached");

struct rfm_ctl_arena {          /* remote: followed by the transport's bytes */
    uint32_t arena;
    uint32_t reserved;
    uint64_t bytes;
};
_Static_assert(sizeof(struct rfm_ctl_arena) == 16, "arena");

struct rfm_ctl_arena_ready {    /* followed by the transport's bytes */
    uint32_t arena;
    int32_t  status;
};
_Static_assert(sizeof(struct rfm_ctl_arena_ready) == 8, "arena ready");

struct rfm_ctl_kernel {         /* followed by the blob */
    uint32_t kernel;
    uint32_t kind;
    uint8_t  digest[RFM_DIGEST_BYTES];
    uint64_t blob_bytes;
};
_Static_assert(sizeof(struct rfm_ctl_kernel) == 48, "kernel");

enum rfm_place {
    RFM_INLINE = 0,             /* in the slot                              */
    RFM_BOUND  = 1,             /* in an arena, address fixed at bind time  */
    RFM_CALL   = 2,             /* in an arena, address travels with a call */
};

#define RFM_ARG_CANARY  0x1u    /* a redzone lies right behind this output  */

struct rfm_wire_arg {
    uint8_t  place;
    uint8_t  flags;
    uint16_t reserved;
    uint32_t arena;
    uint64_t offset;            /* BOUND: in the arena; INLINE: in the payload */
    uint64_t size;
};
_Static_assert(sizeof(struct rfm_wire_arg) == 24, "arg");

#define RFM_BIND_OBJECT 0x1u    /* one input, one output, any size */

struct rfm_ctl_bind {           /* followed by args, then meta */
    uint32_t binding;
    uint32_t kernel;
    uint16_t n_in;
    uint16_t n_out;
    uint32_t flags;
    uint64_t meta_bytes;
};
_Static_assert(sizeof(struct rfm_ctl_bind) == 24, "bind");

struct rfm_ctl_number {         /* ARENA_DROP, UNBIND */
    uint32_t number;
    uint32_t reserved;
};
_Static_assert(sizeof(struct rfm_ctl_number) == 8, "number");

struct rfm_ctl_adopt {
    uint64_t lease;
    uint32_t conn;
    uint32_t reserved;
};
_Static_assert(sizeof(struct rfm_ctl_adopt) == 16, "adopt");

/* --- slots --------------------------------------------------------------- */

/*
 * A channel's segment:
 *
 *   0            4096                                    end
 *   | control    | S request slots    | S reply slots     |
 *                | line | payload ... | line | payload ...|
 *
 * A line is a header and RFM_INLINE_BYTES of payload; a payload that is
 * larger starts at the next line. The poll word of both is the invocation's
 * id: ids rise and are never used twice on a channel.
 */

#define RFM_REQ_OBJECT  0x1u    /* payload is an object (struct rfm_object) */
#define RFM_REQ_STAGED  0x2u    /* payload is one rfm_desc: the object      */
#define RFM_REQ_FETCH   0x4u    /* payload: rfm_wire_fetch                  */
#define RFM_REQ_CLAIM   0x8u    /* the rank may take it back: claim it first */

/* Remote links: the upper 24 bits of the flags count the control frames that
 * were sent before (modulo 2^24). The worker has to have them all. */
#define RFM_REQ_AFTER_SHIFT 8u

struct rfm_request_line {
    uint64_t id;
    uint32_t binding;
    uint32_t flags;
    uint64_t in_bytes;          /* bytes of payload in the slot */
    uint64_t budget_ns;         /* 0: none */
    uint8_t  payload[RFM_INLINE_BYTES];
};
_Static_assert(sizeof(struct rfm_request_line) == RFM_CACHE_LINE, "request");
_Static_assert(offsetof(struct rfm_request_line, payload) == 32, "payload");

enum rfm_wire_status {
    RFM_ST_OK           = 0,
    RFM_ST_KERNEL       = 1,    /* the kernel failed; payload says how      */
    RFM_ST_BAD_KERNEL   = 2,    /* could not be loaded or bound             */
    RFM_ST_BUSY         = 3,    /* draining: try elsewhere                  */
    RFM_ST_PROTOCOL     = 4,    /* the request made no sense                */
    RFM_ST_TAKEN_BACK   = 5,    /* by the rank, before it was begun         */
    RFM_ST_LAST         = 5,
};

#define RFM_REP_KEPT    0x1u    /* result is at the worker: fetch it        */
#define RFM_REP_SIZES   0x2u    /* payload begins with one u64 per output   */

struct rfm_reply_line {
    uint64_t id;
    uint64_t out_bytes;         /* first output, object or text             */
    uint64_t exec_ns;
    uint32_t status;
    uint32_t flags;
    uint8_t  payload[RFM_INLINE_BYTES];
};
_Static_assert(sizeof(struct rfm_reply_line) == RFM_CACHE_LINE, "reply");
_Static_assert(offsetof(struct rfm_reply_line, payload) == 32, "payload");

/* --- a slot on a stream (tcp) ---------------------------------------------
 *
 * head · line · n_regions descriptors · payload · the regions' bytes · crc
 *
 * A request's regions are pieces of the worker's mirrors; a reply's are the
 * outputs that are in no slot, in order, none larger than was asked for.
 */
#define RFM_STREAM_MAGIC    0x544d4652u     /* "RFMT" */
#define RFM_MAX_REGIONS     65600u  /* an object refers to at most 65535 arrays */

enum rfm_stream_type {
    RFM_STREAM_REQUEST = 1,
    RFM_STREAM_REPLY   = 2,
};

#define RFM_STREAM_CRC      0x1u    /* a crc32c of all of it comes last (u32) */

struct rfm_stream_head {
    uint32_t magic;
    uint16_t type;
    uint16_t flags;
    uint32_t slot;
    uint32_t n_regions;
    uint64_t payload_bytes;     /* what does not share the line */
    uint64_t region_bytes;      /* of all of them */
};
_Static_assert(sizeof(struct rfm_stream_head) == 32, "stream head");

struct rfm_tcp_parcel {         /* beside ATTACH and ATTACHED */
    uint32_t flags;             /* RFM_STREAM_*: what we will send */
    uint32_t reserved;
};
_Static_assert(sizeof(struct rfm_tcp_parcel) == 8, "tcp parcel");

/* --- what verbs peers tell each other ---------------------------------------
 *
 * Slots lie one behind the other as in a channel's segment; each side has the
 * ring that the other one writes into. A slot is written by one RDMA write with
 * immediate: the line, the payload behind it; the immediate is the slot.
 */
#define RFM_VERBS_VERSION   1u

enum rfm_verbs_path {
    RFM_VERBS_INFINIBAND = 1,
    RFM_VERBS_ROCE_V1    = 2,
    RFM_VERBS_ROCE_V2    = 3,
};

struct rfm_verbs_parcel {       /* beside ATTACH and ATTACHED */
    uint16_t version;
    uint8_t  path;              /* enum rfm_verbs_path */
    uint8_t  mtu;               /* 1 (256 bytes) to 5 (4096), as in verbs */
    uint32_t qp;                /* its number: 24 bits */
    uint32_t psn;               /* of its first packet: 24 bits */
    uint32_t lid;               /* 16 bits; 0: none */
    uint8_t  gid[16];
    uint64_t address;           /* of its ring */
    uint64_t bytes;
    uint32_t rkey;
    uint32_t reserved;
};
_Static_assert(sizeof(struct rfm_verbs_parcel) == 56, "verbs parcel");
_Static_assert(offsetof(struct rfm_verbs_parcel, gid) == 16, "verbs gid");
_Static_assert(offsetof(struct rfm_verbs_parcel, address) == 32, "verbs ring");
_Static_assert(sizeof(struct rfm_verbs_parcel) <= RFM_MAX_PARCEL, "parcel");

struct rfm_verbs_memory {       /* beside ARENA and ARENA_READY */
    uint64_t address;
    uint64_t bytes;
    uint32_t rkey;
    uint32_t reserved;
};
_Static_assert(sizeof(struct rfm_verbs_memory) == 24, "verbs memory");

/* In the desc of a region that follows a request on a stream: it has no bytes.
 * What the mirror holds there is not used any more; its pages may go. */
#define RFM_REGION_DROP 0x2u

struct rfm_desc {
    uint32_t arena;
    uint32_t flags;
    uint64_t offset;
    uint64_t size;
};
_Static_assert(sizeof(struct rfm_desc) == 24, "desc");

struct rfm_wire_fetch {
    uint64_t kept_id;
    struct rfm_desc into;
};
_Static_assert(sizeof(struct rfm_wire_fetch) == 32, "fetch");

/* In the last line of a request slot that says CLAIM: whoever moves it away
 * from zero decides whether the invocation is run here. */
enum rfm_claim {
    RFM_CLAIM_FREE       = 0,
    RFM_CLAIM_BEGUN      = 1,   /* by the worker */
    RFM_CLAIM_TAKEN_BACK = 2,   /* by the rank   */
};

/* Head of an object: then n_parts sizes (u64), n_refs rfm_desc, the parts. */
struct rfm_object {
    uint16_t n_parts;
    uint16_t n_refs;
    uint32_t reserved;
};
_Static_assert(sizeof(struct rfm_object) == 8, "object");

/* The first page of a segment; the rank writes, the worker reads. */
struct rfm_channel_page {
    uint64_t wake_at;           /* done tickets at which to ring the event  */
    uint8_t  pad[56];
};
_Static_assert(sizeof(struct rfm_channel_page) == RFM_CACHE_LINE, "channel");

/* One page per process that sleeps: who posts to it looks at `sleepers`. */
struct rfm_door {
    uint32_t word;              /* futex */
    uint32_t sleepers;
    uint8_t  pad[56];
};
_Static_assert(sizeof(struct rfm_door) == RFM_CACHE_LINE, "door");

#define RFM_DOOR_BYTES      4096u
#define RFM_CONTROL_BYTES   4096u

/* --- the page in which a worker says what it is doing -------------------- */

enum rfm_page_state {
    RFM_PAGE_STARTING = 0,
    RFM_PAGE_WAITING  = 1,
    RFM_PAGE_RUNNING  = 2,
    RFM_PAGE_ENDING   = 3,
};

#define RFM_PAGE_BYTES      4096u
#define RFM_PAGE_KERNELS    15u
#define RFM_KERNEL_NAME_BYTES 112u

/* A part of exec_ns and count; a name ends with a NUL. */
struct rfm_page_kernel {
    uint64_t exec_ns;
    uint64_t count;
    char     name[RFM_KERNEL_NAME_BYTES];
};
_Static_assert(sizeof(struct rfm_page_kernel) == 128, "page kernel");

/* Who printed what: the worker's marks in its output, and what is known of what
 * stands behind the last one (output.h). */
struct rfm_page_output {
    uint64_t heard;             /* the agent's: odd while it reads the output */
    uint64_t clean;             /* what the first so many calls printed has its mark */
    uint64_t marks;             /* 0: there are none, ever */
    uint64_t taken;             /* the agent's: how many bytes it has read */
    uint64_t reserved[4];
};
_Static_assert(sizeof(struct rfm_page_output) == 64, "page output");

#define RFM_MARK_MAGIC      "\0\x1e" "rfaas\x1e"

struct rfm_mark {
    char magic[8];
    char id[16];                /* hexadecimal; 0: nobody's, or not known whose */
    char conn[8];               /* hexadecimal, too: ids are a rank's own */
};
_Static_assert(sizeof(struct rfm_mark) == 32, "mark");

struct rfm_page {
    uint64_t id;
    uint32_t conn;
    uint32_t state;
    uint64_t start_ns;
    uint64_t limit_ns;
    uint64_t exec_ns;
    uint64_t poll_ns;
    uint64_t count;
    uint64_t reserved;
    /* The first one has no name: all that have no line of their own. */
    struct rfm_page_kernel kernels[RFM_PAGE_KERNELS];
    struct rfm_page_output output;
};
_Static_assert(sizeof(struct rfm_page) == 2048, "page");
_Static_assert(sizeof(struct rfm_page) <= RFM_PAGE_BYTES, "page");

#endif

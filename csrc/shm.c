/*
 * Shared memory: the embedded default, and the reference for the others.
 *
 * The rank makes one segment per channel (see rfm_wire.h); both map it. Large
 * data stays where it is, in arenas that both have mapped.
 */
#define _GNU_SOURCE
#include "shm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "poller.h"
#include "rfm_transport.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW)

static uint64_t page_up(uint64_t n)
{
    return (n + RFM_PAGE_SIZE - 1) & ~(uint64_t)(RFM_PAGE_SIZE - 1);
}

int rfm_memfd_create(const char *name, uint64_t bytes, int *fd_p)
{
    int fd;
    int rc;

    fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        return RFM_ERR_SYSTEM;
    }
    bytes = page_up(bytes);
    if (ftruncate(fd, (off_t)bytes) != 0) {
        rc = (errno == EFBIG) || (errno == EINVAL) ? RFM_ERR_NO_MEMORY
                                                   : RFM_ERR_SYSTEM;
        goto err_close;
    }
    /* allocated now, or an error now: never a SIGBUS later */
    do {
        rc = fallocate(fd, 0, 0, (off_t)bytes);
    } while ((rc != 0) && (errno == EINTR));
    if (rc != 0) {
        rc = RFM_ERR_NO_MEMORY;
        goto err_close;
    }
    if (fcntl(fd, F_ADD_SEALS, SEALS | F_SEAL_SEAL) != 0) {
        rc = RFM_ERR_SYSTEM;
        goto err_close;
    }
    *fd_p = fd;
    return RFM_OK;

err_close:
    close(fd);
    return rc;
}

int rfm_memfd_map(int fd, uint64_t bytes, bool inherit, uint8_t **base_p)
{
    struct stat st;
    uint8_t *base;
    int seals;

    bytes = page_up(bytes);
    if (bytes == 0) {
        return RFM_ERR_INVALID;
    }
    seals = fcntl(fd, F_GET_SEALS);
    if ((seals < 0) || ((seals & SEALS) != SEALS)) {
        return RFM_ERR_PROTOCOL;
    }
    if ((fstat(fd, &st) != 0) || ((uint64_t)st.st_size != bytes)) {
        return RFM_ERR_PROTOCOL;
    }
    base = rfm_pages_reserve(bytes);
    if (base == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    if (mmap(base, bytes, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd, 0) == MAP_FAILED) {
        rfm_pages_release(base, bytes);
        return RFM_ERR_NO_MEMORY;
    }
    /* a child that a kernel forks must not be able to write here later */
    if (!inherit) {
        (void)madvise(base, bytes, MADV_DONTFORK);
    }
    *base_p = base;
    return RFM_OK;
}

int rfm_mirror_map(uint64_t bytes, uint8_t **base_p)
{
    uint8_t *area;

    bytes = page_up(bytes);
    if ((bytes == 0) || (bytes > (1ull << 46))) {
        return RFM_ERR_INVALID;
    }
    area = mmap(NULL, bytes + 2 * RFM_PAGE_SIZE, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) {
        return RFM_ERR_NO_MEMORY;
    }
    if (mprotect(area + RFM_PAGE_SIZE, bytes, PROT_READ | PROT_WRITE) != 0) {
        munmap(area, bytes + 2 * RFM_PAGE_SIZE);
        return RFM_ERR_NO_MEMORY;
    }
    (void)madvise(area + RFM_PAGE_SIZE, bytes, MADV_DONTFORK);
    *base_p = area + RFM_PAGE_SIZE;
    return RFM_OK;
}

void rfm_memfd_unmap(uint8_t *base, uint64_t bytes)
{
    rfm_pages_release(base, page_up(bytes));
}

/* --- a link --------------------------------------------------------------- */

struct shm_link {
    struct rfm_link  link;
    uint8_t         *segment;
    uint64_t         bytes;
    uint8_t         *requests;
    uint8_t         *replies;
    uint64_t         stride;
    struct rfm_door *door;      /* of the other side */
    int              segment_fd;
    int              event_fd;  /* worker: rings the rank's service thread */
    uint64_t         woke_at;
};

/* a payload may end in a canary, so each slot has a line more */
static uint64_t slot_stride(uint32_t slot_bytes)
{
    return 2u * RFM_CACHE_LINE + (uint64_t)slot_bytes;
}

static uint64_t segment_bytes(uint32_t slots, uint32_t slot_bytes)
{
    return page_up(RFM_CONTROL_BYTES + 2ull * slots * slot_stride(slot_bytes));
}

static void link_layout(struct shm_link *shm, uint32_t slots,
                        uint32_t slot_bytes)
{
    shm->link.ops        = &rfm_shm;
    shm->link.slots      = slots;
    shm->link.slot_bytes = slot_bytes;
    shm->stride          = slot_stride(slot_bytes);
    shm->requests        = shm->segment + RFM_CONTROL_BYTES;
    shm->replies         = shm->requests + (uint64_t)slots * shm->stride;
}

static inline struct rfm_request_line *request_line(struct shm_link *shm,
                                                    uint32_t slot)
{
    return (struct rfm_request_line *)(shm->requests + slot * shm->stride);
}

static inline struct rfm_reply_line *reply_line(struct shm_link *shm,
                                                uint32_t slot)
{
    return (struct rfm_reply_line *)(shm->replies + slot * shm->stride);
}

static inline uint32_t *claim_word(struct shm_link *shm, uint32_t slot)
{
    return (uint32_t *)((uint8_t *)request_line(shm, slot) + shm->stride -
                        RFM_CACHE_LINE);
}

static bool claim(struct rfm_link *link, uint32_t slot, uint32_t by)
{
    uint32_t was = RFM_CLAIM_FREE;

    return __atomic_compare_exchange_n(
        claim_word((struct shm_link *)link, slot), &was, by, false,
        __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static bool rank_take_back(struct rfm_link *link, uint32_t slot)
{
    return claim(link, slot, RFM_CLAIM_TAKEN_BACK);
}

static bool worker_begin(struct rfm_link *link, uint32_t slot)
{
    return claim(link, slot, RFM_CLAIM_BEGUN);
}

static inline struct rfm_channel_page *channel_page(struct shm_link *shm)
{
    return (struct rfm_channel_page *)shm->segment;
}

static int rank_open(const struct rfm_link_attr *attr, struct rfm_link **link_p,
                     struct rfm_ctl_attach *body, struct rfm_parcel *out)
{
    uint32_t slots      = attr->slots;
    uint32_t slot_bytes = attr->slot_bytes;
    struct shm_link *shm;
    int rc;

    shm = calloc(1, sizeof(*shm));
    if (shm == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    shm->segment_fd = -1;
    shm->event_fd   = -1;
    shm->bytes      = segment_bytes(slots, slot_bytes);
    rc = rfm_memfd_create("rfaas-channel", shm->bytes, &shm->segment_fd);
    if (rc < 0) {
        goto err_free;
    }
    rc = rfm_memfd_map(shm->segment_fd, shm->bytes, false, &shm->segment);
    if (rc < 0) {
        goto err_close;
    }
    link_layout(shm, slots, slot_bytes);
    channel_page(shm)->wake_at = UINT64_MAX;

    memset(body, 0, sizeof(*body));
    body->slots         = slots;
    body->slot_bytes    = slot_bytes;
    body->segment_bytes = shm->bytes;
    out->fds[0] = shm->segment_fd;
    out->fds[1] = attr->door_fd;
    out->fds[2] = attr->event_fd;
    out->n_fds  = 3;
    *link_p     = &shm->link;
    return RFM_OK;

err_close:
    close(shm->segment_fd);
err_free:
    free(shm);
    return rc;
}

static int map_door(int fd, struct rfm_door **door_p)
{
    uint8_t *base;
    int rc;

    rc = rfm_memfd_map(fd, RFM_DOOR_BYTES, false, &base);
    if (rc < 0) {
        return rc;
    }
    *door_p = (struct rfm_door *)base;
    return RFM_OK;
}

static int rank_attached(struct rfm_link *link, const struct rfm_parcel *in)
{
    struct shm_link *shm = (struct shm_link *)link;
    int rc = map_door(in->fds[0], &shm->door);

    close(in->fds[0]);
    close(shm->segment_fd);     /* both sides have it mapped */
    shm->segment_fd = -1;
    return rc;
}

static uint8_t *rank_payload(struct rfm_link *link, uint32_t slot)
{
    struct shm_link *shm = (struct shm_link *)link;

    return (uint8_t *)request_line(shm, slot) + RFM_CACHE_LINE;
}

static bool rank_post(struct rfm_link *link, uint32_t slot,
                      const struct rfm_request_line *line,
                      const struct rfm_traffic *traffic)
{
    struct shm_link *shm = (struct shm_link *)link;
    struct rfm_request_line *at = request_line(shm, slot);

    memcpy((uint8_t *)at + sizeof(at->id), (const uint8_t *)line + sizeof(at->id),
           sizeof(*at) - sizeof(at->id));
    (void)traffic;
    rfm_store_release(&at->id, line->id);
    rfm_door_knock(shm->door);
    return true;
}

static bool rank_poll(struct rfm_link *link, uint32_t slot, uint64_t id,
                      struct rfm_reply_line *line_p, const uint8_t **payload_p)
{
    struct shm_link *shm = (struct shm_link *)link;
    struct rfm_reply_line *at = reply_line(shm, slot);

    if (rfm_load_acquire(&at->id) != id) {
        return false;
    }
    memcpy(line_p, at, sizeof(*line_p));
    *payload_p = (const uint8_t *)at + RFM_CACHE_LINE;
    return true;
}

static void rank_forget(struct rfm_link *link, uint32_t slot)
{
    struct shm_link *shm = (struct shm_link *)link;

    rfm_store_relaxed(claim_word(shm, slot), RFM_CLAIM_FREE);
    rfm_store_release(&reply_line(shm, slot)->id, 0);
}

static void rank_wake_at(struct rfm_link *link, uint64_t done)
{
    struct shm_link *shm = (struct shm_link *)link;

    rfm_store_release(&channel_page(shm)->wake_at, done);
    rfm_fence();
}

static void link_close(struct rfm_link *link)
{
    struct shm_link *shm = (struct shm_link *)link;

    rfm_memfd_unmap(shm->segment, shm->bytes);
    rfm_memfd_unmap((uint8_t *)shm->door, RFM_DOOR_BYTES);
    if (shm->segment_fd >= 0) {
        close(shm->segment_fd);
    }
    if (shm->event_fd >= 0) {
        close(shm->event_fd);
    }
    free(shm);
}

/* A write to it must neither block nor raise SIGPIPE, and a file that isn't
 * one of ours is nothing to write to: an anonymous inode has no type. */
static int take_event(int fd, int *event_p)
{
    struct stat st;
    int flags = fcntl(fd, F_GETFL);

    if ((flags < 0) || ((flags & O_NONBLOCK) == 0) || (fstat(fd, &st) != 0) ||
        ((st.st_mode & S_IFMT) != 0)) {
        return RFM_ERR_PROTOCOL;
    }
    /* the caller closes what was passed; only the event is needed later */
    *event_p = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    return (*event_p >= 0) ? RFM_OK : RFM_ERR_SYSTEM;
}

static int worker_open(const struct rfm_link_attr *attr,
                       const struct rfm_ctl_attach *body,
                       const struct rfm_parcel *in, struct rfm_link **link_p,
                       struct rfm_parcel *out)
{
    uint32_t slots      = body->slots;
    uint32_t slot_bytes = body->slot_bytes;
    struct shm_link *shm;
    int rc;

    (void)attr;
    (void)out;
    if ((in->n_fds != 3) || (in->n_bytes != 0) || (slots < 2) || (slots > RFM_MAX_SLOTS) ||
        ((slots & (slots - 1)) != 0) || (slot_bytes < RFM_CACHE_LINE) ||
        (slot_bytes > RFM_MAX_SLOT_BYTES) ||
        ((slot_bytes % RFM_CACHE_LINE) != 0) ||
        (body->segment_bytes != segment_bytes(slots, slot_bytes))) {
        return RFM_ERR_PROTOCOL;
    }
    shm = calloc(1, sizeof(*shm));
    if (shm == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    shm->segment_fd = -1;
    shm->event_fd   = -1;
    shm->bytes      = body->segment_bytes;
    rc = rfm_memfd_map(in->fds[0], shm->bytes, false, &shm->segment);
    if (rc < 0) {
        goto err_close;
    }
    rc = map_door(in->fds[1], &shm->door);
    if (rc < 0) {
        goto err_close;
    }
    rc = take_event(in->fds[2], &shm->event_fd);
    if (rc < 0) {
        goto err_close;
    }
    link_layout(shm, slots, slot_bytes);
    *link_p = &shm->link;
    return RFM_OK;

err_close:
    link_close(&shm->link);
    return rc;
}

static bool worker_poll(struct rfm_link *link, uint32_t slot, uint64_t last_id,
                        struct rfm_request_line *line_p,
                        const uint8_t **payload_p)
{
    struct shm_link *shm = (struct shm_link *)link;
    struct rfm_request_line *at = request_line(shm, slot);

    if (rfm_load_acquire(&at->id) == last_id) {
        return false;
    }
    memcpy(line_p, at, sizeof(*line_p));
    *payload_p = (const uint8_t *)at + RFM_CACHE_LINE;
    return true;
}

static uint8_t *worker_payload(struct rfm_link *link, uint32_t slot)
{
    struct shm_link *shm = (struct shm_link *)link;

    return (uint8_t *)reply_line(shm, slot) + RFM_CACHE_LINE;
}

static void worker_reply(struct rfm_link *link, uint32_t slot,
                         const struct rfm_reply_line *line,
                         uint64_t payload_bytes,
                         const struct rfm_region *regions, uint32_t n)
{
    struct shm_link *shm = (struct shm_link *)link;
    struct rfm_reply_line *at = reply_line(shm, slot);

    (void)payload_bytes;
    (void)regions;
    (void)n;
    memcpy((uint8_t *)at + sizeof(at->id), (const uint8_t *)line + sizeof(at->id),
           sizeof(*at) - sizeof(at->id));
    rfm_store_release(&at->id, line->id);
}

static void worker_knock(struct rfm_link *link, uint64_t done)
{
    struct shm_link *shm = (struct shm_link *)link;
    uint64_t wake_at;

    rfm_door_knock(shm->door);
    wake_at = rfm_load_relaxed(&channel_page(shm)->wake_at);
    if (__builtin_expect((wake_at <= done) && (wake_at != shm->woke_at), 0)) {
        uint64_t one = 1;

        shm->woke_at = wake_at;
        if (write(shm->event_fd, &one, sizeof(one)) < 0) {
            return;             /* full: it is ringing already */
        }
    }
}

const struct rfm_transport rfm_shm = {
    .name           = "shm",
    .number         = RFM_TRANSPORT_SHM,
    .rank_open      = rank_open,
    .rank_attached  = rank_attached,
    .rank_payload   = rank_payload,
    .rank_post      = rank_post,
    .rank_poll      = rank_poll,
    .rank_forget    = rank_forget,
    .rank_take_back = rank_take_back,
    .rank_wake_at   = rank_wake_at,
    .rank_close     = link_close,
    .worker_open    = worker_open,
    .worker_poll    = worker_poll,
    .worker_begin   = worker_begin,
    .worker_payload = worker_payload,
    .worker_reply   = worker_reply,
    .worker_knock   = worker_knock,
    .worker_close   = link_close,
};

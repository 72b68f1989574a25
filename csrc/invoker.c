/*
 * The rank side: kernels, bindings, requests, the queue, and waiting.
 *
 *   start ──▶ a channel with room? ──▶ posted ──▶ reaped ──▶ ended
 *                 │ no                     ▲
 *                 └──▶ queue ── pump ──────┘
 *
 * Whoever frees a ticket pumps: a waiting thread, or else the service thread,
 * which the worker wakes once half of what it was given is done.
 */
#define _GNU_SOURCE
#include "invoker.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "arena.h"
#include "shm.h"

#define SOON_NS 1000000ull

/* So many looks in which nothing came, and one; then work moves over. */
#define IDLE_LOOKS 255u

const char *rfm_status_text(int status)
{
    switch (status) {
    case RFM_ERR_INVALID:     return "invalid argument";
    case RFM_ERR_NO_MEMORY:   return "out of memory";
    case RFM_ERR_NO_RESOURCE: return "no resource left";
    case RFM_ERR_AGAIN:       return "nothing yet";
    case RFM_ERR_TIMEOUT:     return "timed out";
    case RFM_ERR_CLOSED:      return "closed";
    case RFM_ERR_BUSY:        return "in flight";
    case RFM_ERR_PROTOCOL:    return "the other side broke the protocol";
    case RFM_ERR_SYSTEM:      return "system call failed";
    case RFM_ERR_PEER:        return "the other side is gone";
    case RFM_ERR_TOO_LARGE:   return "too large";
    default:                  return (status >= 0) ? "ok" : "unknown error";
    }
}

/* --- making and ending ---------------------------------------------------- */

static bool arena_made(void *ctx, const struct rfm_arena_info *arena)
{
    struct rfm_invoker *inv = ctx;
    uint32_t n = rfm_load_acquire(&inv->n_channels);
    bool fits = true;

    for (uint32_t i = 0; i < n; i++) {
        struct rfm_channel *chan = rfm_channel_at(inv, i);

        if (rfm_load_acquire(&chan->state) != RFM_CH_DEAD) {
            fits = rfm_channel_send_arena(chan, arena) && fits;
        }
    }
    return fits;
}

static void send_number(struct rfm_invoker *inv, uint16_t type, uint32_t number)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);

    for (uint32_t i = 0; i < n; i++) {
        struct rfm_channel *chan = rfm_channel_at(inv, i);

        if (rfm_load_acquire(&chan->state) != RFM_CH_DEAD) {
            rfm_channel_send_number(chan, type, number, 0);
        }
    }
}

static void arena_dropped(void *ctx, uint32_t arena)
{
    struct rfm_invoker *inv = ctx;

    uint32_t n = rfm_load_acquire(&inv->n_channels);

    send_number(inv, RFM_CTL_ARENA_DROP, arena);
    for (uint32_t i = 0; i < n; i++) {
        rfm_channel_forget_arena(rfm_channel_at(inv, i), arena);
    }
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        struct rfm_side *side = rfm_load_acquire(&inv->sides[i]);

        if (side != NULL) {
            side->ops->side_arena_drop(side, arena);
        }
    }
}

static void constant_melted(void *ctx, uint32_t serial)
{
    struct rfm_invoker *inv = ctx;
    uint32_t n = rfm_load_acquire(&inv->n_channels);

    for (uint32_t i = 0; i < n; i++) {
        rfm_channel_melted(rfm_channel_at(inv, i), serial);
    }
}

void rfm_invoker_limit_constants(struct rfm_invoker *inv, uint64_t bytes)
{
    rfm_store_relaxed(&inv->constants_limit, bytes);
}

void rfm_invoker_constants(struct rfm_invoker *inv, uint64_t *sent_p,
                           uint64_t *dropped_p)
{
    *sent_p    = rfm_load_relaxed(&inv->constants_sent);
    *dropped_p = rfm_load_relaxed(&inv->constants_dropped);
}

int rfm_invoker_create(const struct rfm_invoker_attr *attr,
                       struct rfm_invoker **inv_p)
{
    struct rfm_heap_hooks hooks = { .made = arena_made,
                                    .dropped = arena_dropped,
                                    .melted = constant_melted };
    struct rfm_invoker *inv;
    uint8_t *door;
    int rc;

    if ((attr->slots < 2) || (attr->slots > RFM_MAX_SLOTS) ||
        ((attr->slots & (attr->slots - 1)) != 0) ||
        (attr->slot_bytes < 256) || (attr->slot_bytes > RFM_MAX_SLOT_BYTES) ||
        ((attr->slot_bytes % RFM_CACHE_LINE) != 0)) {
        return RFM_ERR_INVALID;
    }
    rfm_ticks_init();
    inv = aligned_alloc(RFM_CACHE_LINE, sizeof(*inv));
    if (inv == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    memset(inv, 0, sizeof(*inv));
    inv->attr       = *attr;
    inv->next_id    = 1;
    inv->spin_ticks = rfm_ns_to_ticks((uint64_t)attr->spin_us * 1000ull);
    inv->door_fd    = -1;
    inv->event_fd   = -1;
    inv->bell_fd    = -1;
    pthread_mutex_init(&inv->queue_lock, NULL);
    pthread_mutex_init(&inv->admin, NULL);
    inv->free_numbers = calloc(RFM_MAX_BINDINGS, sizeof(uint32_t));
    if (inv->free_numbers == NULL) {
        rc = RFM_ERR_NO_MEMORY;
        goto err_free;
    }
    rc = rfm_heap_create(attr->memory_limit, &inv->heap);
    if (rc < 0) {
        goto err_free;
    }
    rc = rfm_memfd_create("rfaas-door", RFM_DOOR_BYTES, &inv->door_fd);
    if (rc < 0) {
        goto err_heap;
    }
    rc = rfm_memfd_map(inv->door_fd, RFM_DOOR_BYTES, true, &door);
    if (rc < 0) {
        goto err_door_fd;
    }
    inv->door = (struct rfm_door *)door;
    inv->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (inv->event_fd < 0) {
        rc = RFM_ERR_SYSTEM;
        goto err_door;
    }
    inv->bell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (inv->bell_fd < 0) {
        rc = RFM_ERR_SYSTEM;
        goto err_event;
    }
    hooks.ctx = inv;
    rfm_heap_set_hooks(inv->heap, &hooks);
    rc = rfm_service_start(inv);
    if (rc < 0) {
        goto err_bell;
    }
    *inv_p = inv;
    return RFM_OK;

err_bell:
    close(inv->bell_fd);
err_event:
    close(inv->event_fd);
err_door:
    rfm_memfd_unmap(door, RFM_DOOR_BYTES);
err_door_fd:
    close(inv->door_fd);
err_heap:
    rfm_heap_close(inv->heap);
err_free:
    pthread_mutex_destroy(&inv->queue_lock);
    pthread_mutex_destroy(&inv->admin);
    free(inv->free_numbers);
    free(inv);
    return rc;
}

static bool all_dead(struct rfm_invoker *inv)
{
    for (uint32_t i = 0; i < inv->n_channels; i++) {
        if (rfm_load_acquire(&inv->channels[i]->state) != RFM_CH_DEAD) {
            return false;
        }
    }
    return true;
}

void rfm_invoker_close(struct rfm_invoker *inv, uint64_t timeout_ns)
{
    uint64_t deadline = rfm_now_ns() + timeout_ns;
    bool killed = false;

    pthread_mutex_lock(&inv->admin);
    rfm_store_release(&inv->closed, true);
    pthread_mutex_unlock(&inv->admin);
    rfm_invoker_abandon(inv);
    for (uint32_t i = 0; i < inv->n_channels; i++) {
        rfm_channel_close(inv->channels[i]);
    }
    while (!all_dead(inv)) {
        struct timespec ts = { 0, 200000 };

        if (!killed && (rfm_now_ns() > deadline)) {
            for (uint32_t i = 0; i < inv->n_channels; i++) {
                (void)rfm_channel_kill(inv->channels[i]);
            }
            killed = true;
        }
        nanosleep(&ts, NULL);
    }
    rfm_service_stop(inv);
}

void rfm_invoker_destroy(struct rfm_invoker *inv)
{
    struct rfm_kernel *kernel = inv->kernels;
    struct rfm_channel *chan = inv->buried;

    rfm_heap_set_hooks(inv->heap, NULL);
    for (uint32_t i = 0; i < inv->n_channels; i++) {
        rfm_channel_destroy(inv->channels[i]);
    }
    while (chan != NULL) {
        struct rfm_channel *next = chan->next_buried;

        rfm_channel_destroy(chan);
        chan = next;
    }
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        if (inv->sides[i] != NULL) {
            inv->sides[i]->ops->side_close(inv->sides[i]);
        }
    }
    while (kernel != NULL) {
        struct rfm_kernel *next = kernel->next;

        free(kernel->blob);
        free(kernel);
        kernel = next;
    }
    rfm_heap_close(inv->heap);
    rfm_memfd_unmap((uint8_t *)inv->door, RFM_DOOR_BYTES);
    close(inv->door_fd);
    close(inv->event_fd);
    close(inv->bell_fd);
    pthread_mutex_destroy(&inv->queue_lock);
    pthread_mutex_destroy(&inv->admin);
    free(inv->free_numbers);
    free(inv);
}

struct rfm_heap *rfm_invoker_heap(struct rfm_invoker *inv)
{
    return inv->heap;
}

uint32_t rfm_invoker_slot_bytes(struct rfm_invoker *inv)
{
    return inv->attr.slot_bytes;
}

/* --- channels ------------------------------------------------------------- */

/* admin held: a dead one's place, or a new one; RFM_MAX_CHANNELS if none */
static uint32_t find_place(struct rfm_invoker *inv)
{
    uint32_t i = 0;

    while ((i < inv->n_channels) &&
           (rfm_load_acquire(&inv->channels[i]->state) != RFM_CH_DEAD)) {
        i++;
    }
    return i;
}

int rfm_invoker_attach(struct rfm_invoker *inv, int fd, uint64_t lease,
                       uint32_t worker, uint64_t timeout_ns,
                       struct rfm_channel **chan_p)
{
    struct rfm_attach_attr attr = {
        .transport  = RFM_TRANSPORT_SHM,
        .fd         = fd,
        .data_fd    = -1,
        .worker     = worker,
        .lease      = lease,
        .timeout_ns = timeout_ns,
    };

    return rfm_invoker_attach_over(inv, &attr, chan_p);
}

/* admin held: what all links of this transport share, made at the first one */
static int open_side(struct rfm_invoker *inv, const struct rfm_transport *ops,
                     const char *device)
{
    struct rfm_side_attr attr = { .rank = true, .device = device };
    struct rfm_side *side;
    int rc;

    if ((ops->side_open == NULL) || (inv->sides[ops->number] != NULL)) {
        return RFM_OK;
    }
    rc = ops->side_open(&attr, &side);
    if (rc < 0) {
        rfm_attach_said((ops->why != NULL) ? ops->why() : NULL);
        return rc;
    }
    rfm_store_release(&inv->sides[ops->number], side);
    rfm_store_release(&inv->n_sides, inv->n_sides + 1);
    rfm_service_kick(inv);
    return RFM_OK;
}

int rfm_invoker_attach_over(struct rfm_invoker *inv,
                            const struct rfm_attach_attr *given,
                            struct rfm_channel **chan_p)
{
    struct rfm_attach_attr mine = *given;
    const struct rfm_attach_attr *attr = &mine;
    const struct rfm_transport *ops = rfm_transport_find(attr->transport);
    struct rfm_channel *chan;
    uint32_t place = 0;
    int rc;

    rfm_attach_said(NULL);
    if ((attr->transport != RFM_TRANSPORT_TCP) && (attr->data_fd >= 0)) {
        close(mine.data_fd);    /* no other has a use for it */
        mine.data_fd = -1;
    }
    pthread_mutex_lock(&inv->admin);
    if (inv->closed) {
        rc = RFM_ERR_CLOSED;
    } else if (ops == NULL) {
        const char *why = NULL;

        (void)rfm_transport_usable(attr->transport, &why);
        rfm_attach_said(why);
        rc = RFM_ERR_INVALID;
    } else {
        place = find_place(inv);
        rc    = (place < RFM_MAX_CHANNELS) ? open_side(inv, ops, attr->device)
                                           : RFM_ERR_NO_RESOURCE;
    }
    if (rc < 0) {
        close(attr->fd);
        if (attr->data_fd >= 0) {
            close(attr->data_fd);
        }
        goto out;
    }
    rc = rfm_channel_create(inv, attr, ops, &chan);
    if (rc < 0) {
        goto out;
    }
    if (!ops->remote) {
        rfm_store_release(&inv->n_local, inv->n_local + 1);
    }
    if (place < inv->n_channels) {
        inv->channels[place]->next_buried = inv->buried;
        inv->buried = inv->channels[place];
    }
    rfm_store_release(&inv->channels[place], chan);
    if (place == inv->n_channels) {
        rfm_store_release(&inv->n_channels, place + 1);
    }
    rfm_heap_unlock(inv->heap);         /* taken by rfm_channel_create */
    rfm_store_release(&inv->abandoned, 0);
    *chan_p = chan;
out:
    pthread_mutex_unlock(&inv->admin);
    if (rc == RFM_OK) {
        /* who sleeps may do so where this worker wakes nobody */
        rfm_invoker_knock(inv);
        rfm_service_kick(inv);
        rfm_invoker_pump(inv);
    }
    return rc;
}

uint32_t rfm_invoker_channels(struct rfm_invoker *inv, struct rfm_channel **out,
                              uint32_t max)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);

    if (n > max) {
        n = max;
    }
    for (uint32_t i = 0; i < n; i++) {
        out[i] = rfm_channel_at(inv, i);
    }
    return n;
}

uint64_t rfm_invoker_queued(struct rfm_invoker *inv)
{
    return rfm_load_acquire(&inv->queued);
}

uint64_t rfm_invoker_in_flight(struct rfm_invoker *inv)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);
    uint64_t sum = 0;

    for (uint32_t i = 0; i < n; i++) {
        sum += rfm_channel_in_flight(rfm_channel_at(inv, i));
    }
    return sum;
}

/* --- kernels and bindings ------------------------------------------------- */

int rfm_invoker_kernel(struct rfm_invoker *inv, uint32_t kind,
                       const uint8_t *digest, const void *blob,
                       uint64_t blob_bytes, struct rfm_kernel **kernel_p)
{
    struct rfm_kernel *kernel;
    int rc = RFM_OK;

    if (blob_bytes > RFM_MAX_FRAME - sizeof(struct rfm_ctl_kernel)) {
        return RFM_ERR_TOO_LARGE;
    }
    pthread_mutex_lock(&inv->admin);
    for (kernel = inv->kernels; kernel != NULL; kernel = kernel->next) {
        if ((kernel->kind == kind) &&
            (memcmp(kernel->digest, digest, RFM_DIGEST_BYTES) == 0)) {
            goto found;
        }
    }
    kernel = calloc(1, sizeof(*kernel));
    if (kernel == NULL) {
        rc = RFM_ERR_NO_MEMORY;
        goto out;
    }
    kernel->blob = malloc(blob_bytes + 1);
    if (kernel->blob == NULL) {
        free(kernel);
        rc = RFM_ERR_NO_MEMORY;
        goto out;
    }
    memcpy(kernel->blob, blob, blob_bytes);
    memcpy(kernel->digest, digest, RFM_DIGEST_BYTES);
    kernel->kind       = kind;
    kernel->blob_bytes = blob_bytes;
    kernel->number     = inv->next_kernel++;
    kernel->next       = inv->kernels;
    inv->kernels       = kernel;
found:
    *kernel_p = kernel;
out:
    pthread_mutex_unlock(&inv->admin);
    return rc;
}

static uint64_t align_up(uint64_t n, uint64_t to)
{
    return (n + to - 1) & ~(to - 1);
}

/* one pass over the inline arguments of one direction */
static uint64_t lay_out(struct rfm_arg *args, uint32_t from, uint32_t to,
                        uint64_t at, uint64_t align, uint64_t canary)
{
    for (uint32_t i = from; i < to; i++) {
        if (args[i].place == RFM_INLINE) {
            uint64_t small = (args[i].size >= 16) ? 16 : 8;

            at         = align_up(at, (align != 0) ? align : small);
            args[i].at = at;
            at        += args[i].size + canary;
        }
    }
    return at;
}

int rfm_layout(struct rfm_arg *args, uint16_t n_in, uint16_t n_out,
               uint32_t slot_bytes, struct rfm_layout *layout)
{
    uint32_t n = (uint32_t)n_in + n_out;
    uint64_t inline_in = 0;
    uint64_t inline_out = 0;
    uint64_t descs = 0;
    uint64_t sizes = (n_out > 1) ? n_out * sizeof(uint64_t) : 0;

    memset(layout, 0, sizeof(*layout));
    for (uint32_t i = 0; i < n; i++) {
        if (args[i].place == RFM_CALL) {
            args[i].at = descs;
            descs     += sizeof(struct rfm_desc);
        } else if (args[i].place == RFM_INLINE) {
            if (args[i].size > slot_bytes) {
                return RFM_ERR_TOO_LARGE;
            }
            *((i < n_in) ? &inline_in : &inline_out) += args[i].size;
            layout->n_inline_out += i >= n_in;
        } else if (args[i].place != RFM_BOUND) {
            return RFM_ERR_PROTOCOL;
        }
    }
    layout->in_bytes = lay_out(args, 0, n_in, descs, 0, 0);
    if (layout->in_bytes > RFM_INLINE_BYTES) {
        layout->in_bytes = lay_out(args, 0, n_in, descs, RFM_CACHE_LINE, 0);
    }
    layout->out_bytes   = lay_out(args, n_in, n, sizes, 0, 0);
    /* there is no room for canaries between several in one line */
    layout->out_in_line = (layout->out_bytes <= RFM_INLINE_BYTES) &&
                          (layout->n_inline_out <= 1);
    if (!layout->out_in_line) {
        layout->out_bytes = lay_out(args, n_in, n, sizes, RFM_CACHE_LINE,
                                    RFM_CANARY_BYTES);
    }
    /* the slot has a line more than slot_bytes, for the last canary */
    if ((layout->in_bytes > slot_bytes) ||
        (layout->out_bytes > (uint64_t)slot_bytes + RFM_CANARY_BYTES)) {
        return RFM_ERR_TOO_LARGE;
    }
    return RFM_OK;
}

int rfm_binding_create(struct rfm_invoker *inv, struct rfm_kernel *kernel,
                       uint32_t flags, uint16_t n_in, uint16_t n_out,
                       const struct rfm_arg *args, const void *meta,
                       uint64_t meta_bytes, struct rfm_binding **binding_p)
{
    uint32_t n = (uint32_t)n_in + n_out;
    struct rfm_binding *binding;
    int rc;

    if ((n > RFM_MAX_ARGS) || (meta_bytes > (1u << 20))) {
        return RFM_ERR_TOO_LARGE;
    }
    binding = calloc(1, sizeof(*binding) + n * sizeof(*args) + meta_bytes + 1);
    if (binding == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    binding->args       = (struct rfm_arg *)(binding + 1);
    binding->meta       = (uint8_t *)(binding->args + n);
    binding->meta_bytes = meta_bytes;
    binding->kernel     = kernel;
    binding->flags      = flags;
    binding->n_in       = n_in;
    binding->n_out      = n_out;
    if (n > 0) {
        memcpy(binding->args, args, n * sizeof(*args));
    }
    if (meta_bytes > 0) {
        memcpy(binding->meta, meta, meta_bytes);
    }
    rc = rfm_layout(binding->args, n_in, n_out, inv->attr.slot_bytes,
                    &binding->layout);
    if (rc < 0) {
        free(binding);
        return rc;
    }
    pthread_mutex_lock(&inv->admin);
    if (inv->n_free_numbers > 0) {
        binding->number = inv->free_numbers[--inv->n_free_numbers];
    } else if (inv->next_binding < RFM_MAX_BINDINGS) {
        binding->number = inv->next_binding++;
    } else {
        rc = RFM_ERR_NO_RESOURCE;
    }
    pthread_mutex_unlock(&inv->admin);
    if (rc < 0) {
        free(binding);
        return rc;
    }
    *binding_p = binding;
    return RFM_OK;
}

void rfm_binding_destroy(struct rfm_invoker *inv, struct rfm_binding *binding)
{
    send_number(inv, RFM_CTL_UNBIND, binding->number);
    pthread_mutex_lock(&inv->admin);
    /* the next user of this index gets another number */
    inv->free_numbers[inv->n_free_numbers++] =
        binding->number + RFM_MAX_BINDINGS;
    pthread_mutex_unlock(&inv->admin);
    free(binding);
}

/* --- ending --------------------------------------------------------------- */

static void push_ended(struct rfm_request *req)
{
    struct rfm_invoker *inv = req->inv;
    struct rfm_request *top;

    if ((__atomic_fetch_or(&req->watch, RFM_WATCH_LISTED, __ATOMIC_ACQ_REL) &
         RFM_WATCH_LISTED) != 0) {
        return;
    }
    top = rfm_load_relaxed(&inv->ended);
    do {
        req->next_ended = top;
    } while (!__atomic_compare_exchange_n(&inv->ended, &top, req, true,
                                          __ATOMIC_RELEASE, __ATOMIC_RELAXED));
}

struct rfm_request *rfm_request_unlist(struct rfm_request *req)
{
    struct rfm_request *next = req->next_ended;

    (void)__atomic_fetch_and(&req->watch,
                             ~(RFM_WATCH_LISTED | RFM_WATCH_ASKED),
                             __ATOMIC_ACQ_REL);
    return next;
}

struct rfm_request *rfm_invoker_take_ended(struct rfm_invoker *inv)
{
    if (rfm_load_relaxed(&inv->ended) == NULL) {
        return NULL;
    }
    return __atomic_exchange_n(&inv->ended, NULL, __ATOMIC_ACQUIRE);
}

/* queue lock held */
static void forget_deadline(struct rfm_request *req)
{
    struct rfm_invoker *inv = req->inv;

    if (req->deadline_ns == 0) {
        return;
    }
    if (req->sooner != NULL) {
        req->sooner->later = req->later;
    } else if (inv->soonest == req) {
        inv->soonest = req->later;
    }
    if (req->later != NULL) {
        req->later->sooner = req->sooner;
    }
    req->later       = NULL;
    req->sooner      = NULL;
    req->deadline_ns = 0;
}

/* After the last store nothing of req may be touched: its owner may be free
 * to start or to free it. */
static void end_unlisted(struct rfm_request *req, enum rfm_outcome outcome)
{
    uint32_t watch;

    req->outcome = outcome;
    watch = __atomic_fetch_or(&req->watch, RFM_WATCH_ENDED, __ATOMIC_ACQ_REL);
    if ((watch & RFM_WATCH_ASKED) != 0) {
        push_ended(req);
    }
    rfm_store_release(&req->state, RFM_ENDED);
}

void rfm_request_end(struct rfm_request *req, enum rfm_outcome outcome)
{
    struct rfm_invoker *inv = req->inv;

    /* set before it was posted, changed by nobody else while in flight */
    if (__builtin_expect(rfm_load_relaxed(&req->deadline_ns) != 0, 0)) {
        pthread_mutex_lock(&inv->queue_lock);
        forget_deadline(req);
        pthread_mutex_unlock(&inv->queue_lock);
    }
    end_unlisted(req, outcome);
}

bool rfm_request_watch(struct rfm_request *req)
{
    struct rfm_invoker *inv = req->inv;
    uint32_t watch = __atomic_fetch_or(&req->watch, RFM_WATCH_ASKED,
                                       __ATOMIC_ACQ_REL);

    if ((watch & RFM_WATCH_ASKED) != 0) {
        return false;
    }
    if ((watch & RFM_WATCH_ENDED) != 0) {
        push_ended(req);
        rfm_invoker_knock(inv);
    }
    return true;
}

/* --- the queue ------------------------------------------------------------ */

/* The channel that a request goes to: the emptiest one that has room. */
static struct rfm_channel *pick(struct rfm_invoker *inv,
                                const struct rfm_request *req)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);
    struct rfm_channel *best = NULL;
    uint64_t least = UINT64_MAX;
    uint32_t start;

    if (req->pin != NULL) {
        return req->pin;
    }
    if (n == 1) {
        struct rfm_channel *chan = rfm_channel_at(inv, 0);

        return rfm_channel_suits(chan, req) ? chan : NULL;
    }
    start = rfm_load_relaxed(&inv->next_channel);
    for (uint32_t k = 0; k < n; k++) {
        uint32_t i = start + k;
        struct rfm_channel *chan;
        uint64_t in_flight;

        if (i >= n) {
            i %= n;
        }
        chan = rfm_channel_at(inv, i);
        if (((rfm_load_relaxed(&chan->head) & RFM_HEAD_CLOSED) != 0) ||
            !rfm_channel_suits(chan, req)) {
            continue;
        }
        in_flight = rfm_channel_in_flight(chan);
        if ((in_flight < least) &&
            (in_flight < rfm_load_relaxed(&chan->depth))) {
            best  = chan;
            least = in_flight;
            if (in_flight == 0) {
                rfm_store_relaxed(&inv->next_channel, i + 1);
                break;
            }
        }
    }
    return best;
}

/* Afterwards req is its owner's, unless it was refused. */
enum posting { REFUSED, POSTED, OVER, NO_ROOM };

/* What one worker has no room for, another may have. */
static enum posting try_others(struct rfm_invoker *inv, struct rfm_request *req)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);
    enum posting posting = NO_ROOM;

    for (uint32_t i = 0; i < n; i++) {
        int rc = rfm_channel_post(rfm_channel_at(inv, i), req);

        if (rc == RFM_OK) {
            return POSTED;
        }
        if (rc == RFM_ERR_NO_RESOURCE) {
            posting = REFUSED;
        }
    }
    return posting;
}

static enum posting try_post(struct rfm_invoker *inv, struct rfm_request *req)
{
    struct rfm_channel *chan = pick(inv, req);
    int rc;

    if (chan == NULL) {
        return REFUSED;
    }
    rc = rfm_channel_post(chan, req);
    if ((rc == RFM_ERR_CLOSED) && (req->pin != NULL)) {
        /* what it wants is gone with its worker */
        end_unlisted(req, RFM_LOST);
        return OVER;
    }
    if (__builtin_expect(rc == RFM_ERR_TOO_LARGE, 0)) {
        if (req->pin == NULL) {
            return try_others(inv, req);
        }
        /* what it kept for us is of no use any more */
        rfm_channel_send_number(chan, RFM_CTL_DISCARD, 0, req->id);
        return NO_ROOM;
    }
    return (rc == RFM_OK) ? POSTED : REFUSED;
}

/* queue lock held; it still counts as queued */
static void take_out(struct rfm_invoker *inv, struct rfm_request *req)
{
    if (req->prev != NULL) {
        req->prev->next = req->next;
    } else {
        inv->first = req->next;
    }
    if (req->next != NULL) {
        req->next->prev = req->prev;
    } else {
        inv->last = req->prev;
    }
    req->next = NULL;
    req->prev = NULL;
}

static void unlink_queued(struct rfm_invoker *inv, struct rfm_request *req)
{
    take_out(inv, req);
    (void)__atomic_fetch_sub(&inv->queued, 1, __ATOMIC_SEQ_CST);
}

/*
 * Queue lock held: posts what can be posted; true if one ended instead.
 *
 * What is refused must be pumped by whoever makes room. So it counts as queued
 * while it is tried: either try_post sees the room, or who made it sees
 * `queued` (rfm_invoker_progress has a fence in between, too).
 */
static bool post_queued(struct rfm_invoker *inv)
{
    struct rfm_request *req = inv->first;
    bool ended = false;

    while (req != NULL) {
        struct rfm_request *next = req->next;
        /* others may find room where these can't go */
        bool choosy = (req->pin != NULL) ||
                      ((req->wire_flags & RFM_REQ_CLAIM) != 0);
        enum posting posting;

        /* out of the list first: once posted it may end at any moment */
        take_out(inv, req);
        req->batched = true;
        posting = try_post(inv, req);
        if (posting == REFUSED) {
            /* back to where it was */
            req->next = next;
            req->prev = (next != NULL) ? next->prev : inv->last;
            if (req->prev != NULL) {
                req->prev->next = req;
            } else {
                inv->first = req;
            }
            if (next != NULL) {
                next->prev = req;
            } else {
                inv->last = req;
            }
            if (!choosy) {
                break;          /* no room for anybody */
            }
        } else {
            (void)__atomic_fetch_sub(&inv->queued, 1, __ATOMIC_SEQ_CST);
            if (posting == NO_ROOM) {
                forget_deadline(req);
                end_unlisted(req, RFM_NO_ROOM);
            }
            ended |= posting != POSTED;
        }
        req = next;
    }
    return ended;
}

/* Asks each worker to wake the service thread when half of what it has is
 * done. True if the queue is worth another look. */
static bool arm_refill(struct rfm_invoker *inv)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);
    bool moved = false;
    bool busy = false;

    for (uint32_t i = 0; i < n; i++) {
        int rc = rfm_channel_arm(rfm_channel_at(inv, i));

        moved |= rc > 0;
        busy  |= rc < 0;
    }
    if (moved) {
        rfm_invoker_knock(inv);
    }
    if (busy) {
        /* Its reaper may have looked before the last reply came, and leave
         * without a word: then nobody would be woken. */
        sched_yield();
    }
    return moved || busy;
}

static void push_batches(struct rfm_invoker *inv)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);

    for (uint32_t i = 0; i < n; i++) {
        rfm_channel_push(rfm_channel_at(inv, i));
    }
}

void rfm_invoker_pump(struct rfm_invoker *inv)
{
    bool again;

    do {
        bool ended;

        again = false;
        pthread_mutex_lock(&inv->queue_lock);
        ended = post_queued(inv);
        pthread_mutex_unlock(&inv->queue_lock);
        if (rfm_load_relaxed(&inv->n_sides) != 0) {
            push_batches(inv);
        }
        if (ended) {
            rfm_invoker_knock(inv);
        }
        if ((rfm_load_acquire(&inv->queued) != 0) &&
            (rfm_load_acquire(&inv->pollers) == 0)) {
            again = arm_refill(inv);
        }
    } while (again && (rfm_load_acquire(&inv->queued) != 0));
}

static void enqueue(struct rfm_invoker *inv, struct rfm_request *req)
{
    pthread_mutex_lock(&inv->queue_lock);
    req->next = NULL;
    req->prev = inv->last;
    if (inv->last != NULL) {
        inv->last->next = req;
    } else {
        inv->first = req;
    }
    inv->last = req;
    (void)__atomic_fetch_add(&inv->queued, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&inv->queue_lock);
    rfm_invoker_pump(inv);
}

/* A worker has nothing to do while something waits behind another's kernel: one
 * of those moves over. It was not begun, so it is no re-issue, and gets a new id: a
 * channel must never see one twice. */
static void rebalance(struct rfm_invoker *inv)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);
    struct rfm_channel *idle = NULL;
    struct rfm_channel *most = NULL;
    struct rfm_request *req;
    uint64_t out = 1;

    for (uint32_t i = 0; i < n; i++) {
        struct rfm_channel *chan = rfm_channel_at(inv, i);
        uint64_t in_flight = rfm_channel_in_flight(chan);

        if (in_flight > out) {
            most = chan;
            out  = in_flight;
        } else if ((in_flight == 0) &&
                   (rfm_load_acquire(&chan->state) == RFM_CH_OPEN)) {
            idle = chan;
        }
    }
    if ((idle == NULL) || (most == NULL)) {
        return;
    }
    req = rfm_channel_take_back(most, NULL);
    if (req == NULL) {
        return;
    }
    req->id = __atomic_fetch_add(&inv->next_id, 1, __ATOMIC_RELAXED);
    rfm_store_relaxed(&req->wire_id, req->id);      /* expire() may look */
    req->batched = false;
    rfm_store_release(&req->state, RFM_QUEUED);
    if (rfm_channel_post(idle, req) != RFM_OK) {
        enqueue(inv, req);
    }
}

/* what came over the network goes into its slots */
static void progress_sides(struct rfm_invoker *inv)
{
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        struct rfm_side *side = rfm_load_acquire(&inv->sides[i]);

        if (side != NULL) {
            (void)side->ops->side_progress(side);
        }
    }
}

static __thread uint32_t idle_looks;    /* of this thread, in which nothing had come */

int rfm_invoker_progress(struct rfm_invoker *inv)
{
    uint32_t n = rfm_load_acquire(&inv->n_channels);
    bool busy = false;
    int moved = 0;

    if (__builtin_expect(rfm_load_relaxed(&inv->n_sides) != 0, 0)) {
        progress_sides(inv);
    }
    for (uint32_t i = 0; i < n; i++) {
        int rc = rfm_channel_reap(rfm_channel_at(inv, i));

        if (rc > 0) {
            moved += rc;
        } else if (rc < 0) {
            busy = true;
        }
    }
    if (moved > 0) {
        /* other threads' requests may be among them; its fence also keeps the
         * next look from passing the room that was made */
        rfm_invoker_knock(inv);
        if (rfm_load_relaxed(&inv->queued) != 0) {
            rfm_invoker_pump(inv);
        } else if (n > 1) {
            rebalance(inv);
        }
        return moved;
    }
    /* Who was to move over while somebody posted stayed where it was, perhaps
     * behind a kernel that never ends. */
    if (__builtin_expect((n > 1) && ((++idle_looks & IDLE_LOOKS) == 0), 0)) {
        rebalance(inv);
    }
    return busy ? RFM_ERR_BUSY : 0;
}

/* also who isn't asleep yet */
static void ring(struct rfm_invoker *inv)
{
    rfm_door_ring(inv->door);
    rfm_invoker_knock(inv);
}

void rfm_invoker_wake(struct rfm_invoker *inv)
{
    ring(inv);
}

void rfm_invoker_abandon(struct rfm_invoker *inv)
{
    rfm_store_release(&inv->abandoned, 1);
    pthread_mutex_lock(&inv->queue_lock);
    while (inv->first != NULL) {
        struct rfm_request *req = inv->first;

        unlink_queued(inv, req);
        forget_deadline(req);
        end_unlisted(req, RFM_NO_WORKER);
    }
    pthread_mutex_unlock(&inv->queue_lock);
    ring(inv);
}

/* --- requests ------------------------------------------------------------- */

void rfm_request_init(struct rfm_request *req, struct rfm_invoker *inv,
                      struct rfm_binding *binding, struct rfm_reqarg *args,
                      uint64_t *out_sizes)
{
    memset(req, 0, sizeof(*req));
    req->inv       = inv;
    req->binding   = binding;
    req->args      = args;
    req->out_sizes = out_sizes;
}

void rfm_request_fini(struct rfm_request *req)
{
    free(req->result);
    req->result = NULL;
}

static void submit(struct rfm_request *req)
{
    struct rfm_invoker *inv = req->inv;

    req->outcome = RFM_PENDING;
    req->batched = false;
    rfm_store_release(&req->state, RFM_QUEUED);
    if (rfm_load_relaxed(&inv->queued) == 0) {
        enum posting posting = try_post(inv, req);

        if (posting == NO_ROOM) {
            rfm_request_end(req, RFM_NO_ROOM);
        }
        if ((posting == OVER) || (posting == NO_ROOM)) {
            rfm_invoker_knock(inv);
        }
        if (posting != REFUSED) {
            return;
        }
    }
    if (rfm_load_relaxed(&inv->abandoned) != 0) {
        pthread_mutex_lock(&inv->queue_lock);
        forget_deadline(req);
        pthread_mutex_unlock(&inv->queue_lock);
        end_unlisted(req, RFM_NO_WORKER);
        rfm_invoker_knock(inv);
        return;
    }
    (void)rfm_invoker_progress(inv);
    enqueue(inv, req);
    if (rfm_load_acquire(&inv->abandoned) != 0) {
        rfm_invoker_abandon(inv);
    }
}

static void set_deadline(struct rfm_request *req, uint64_t at_ns)
{
    struct rfm_invoker *inv = req->inv;

    pthread_mutex_lock(&inv->queue_lock);
    req->deadline_ns = at_ns;
    req->sooner      = NULL;
    req->later       = inv->soonest;
    if (inv->soonest != NULL) {
        inv->soonest->sooner = req;
    }
    inv->soonest = req;
    pthread_mutex_unlock(&inv->queue_lock);
    rfm_service_kick(inv);
}

static bool is_active(const struct rfm_request *req)
{
    uint32_t state = rfm_load_acquire(&req->state);

    return (state == RFM_QUEUED) || (state == RFM_POSTED);
}

int rfm_request_start(struct rfm_request *req, uint64_t timeout_ns)
{
    struct rfm_invoker *inv = req->inv;

    if (is_active(req)) {
        return RFM_ERR_BUSY;
    }
    if (rfm_load_relaxed(&inv->closed)) {
        return RFM_ERR_CLOSED;
    }
    req->id       = __atomic_fetch_add(&inv->next_id, 1, __ATOMIC_RELAXED);
    req->wire_id  = req->id;
    req->attempts = 1;
    req->pin      = NULL;
    req->expired  = 0;
    req->limit_ns = 0;
    req->result_bytes = 0;
    req->wire_flags &= ~RFM_REQ_FETCH;
    (void)__atomic_fetch_and(&req->watch, ~RFM_WATCH_ENDED, __ATOMIC_ACQ_REL);
    if (timeout_ns != 0) {
        uint64_t now = rfm_now_ns();

        req->limit_ns = (timeout_ns < UINT64_MAX - now) ? now + timeout_ns
                                                        : UINT64_MAX;
        set_deadline(req, req->limit_ns);
    }
    submit(req);
    return RFM_OK;
}

int rfm_request_restart(struct rfm_request *req)
{
    if (is_active(req)) {
        return RFM_ERR_BUSY;
    }
    if (rfm_load_relaxed(&req->inv->closed)) {
        return RFM_ERR_CLOSED;
    }
    req->wire_id = req->id;
    req->attempts++;
    req->pin     = NULL;
    req->expired = 0;
    req->result_bytes = 0;
    req->wire_flags &= ~RFM_REQ_FETCH;
    (void)__atomic_fetch_and(&req->watch, ~RFM_WATCH_ENDED, __ATOMIC_ACQ_REL);
    if (req->limit_ns != 0) {
        if (rfm_now_ns() >= req->limit_ns) {
            struct rfm_invoker *inv = req->inv;

            rfm_store_release(&req->state, RFM_QUEUED);
            end_unlisted(req, RFM_TIMED_OUT);
            rfm_invoker_knock(inv);
            return RFM_OK;
        }
        set_deadline(req, req->limit_ns);
    }
    submit(req);
    return RFM_OK;
}

int rfm_request_fetch(struct rfm_request *req, const struct rfm_desc *into)
{
    struct rfm_invoker *inv = req->inv;

    if (is_active(req) || (req->outcome != RFM_LARGE)) {
        return RFM_ERR_BUSY;
    }
    if (rfm_load_relaxed(&inv->closed)) {
        return RFM_ERR_CLOSED;
    }
    req->wire_id     = __atomic_fetch_add(&inv->next_id, 1, __ATOMIC_RELAXED);
    req->wire_flags |= RFM_REQ_FETCH;
    req->into        = *into;
    req->pin         = req->chan;
    (void)__atomic_fetch_and(&req->watch, ~RFM_WATCH_ENDED, __ATOMIC_ACQ_REL);
    submit(req);
    return RFM_OK;
}

int rfm_request_cancel(struct rfm_request *req)
{
    struct rfm_invoker *inv = req->inv;
    int rc = RFM_ERR_BUSY;

    pthread_mutex_lock(&inv->queue_lock);
    if ((rfm_load_acquire(&req->state) == RFM_QUEUED) &&
        ((inv->first == req) || (req->prev != NULL))) {
        unlink_queued(inv, req);
        forget_deadline(req);
        end_unlisted(req, RFM_CANCELLED);
        rc = RFM_OK;
    }
    pthread_mutex_unlock(&inv->queue_lock);
    if ((rc != RFM_OK) && (rfm_load_acquire(&req->state) == RFM_POSTED) &&
        (rfm_channel_take_back(rfm_load_relaxed(&req->chan), req) != NULL)) {
        rfm_request_end(req, RFM_CANCELLED);
        rc = RFM_OK;
    }
    if (rc == RFM_OK) {
        rfm_invoker_knock(inv);
    }
    return rc;
}

uint64_t rfm_invoker_expire(struct rfm_invoker *inv, uint64_t now)
{
    uint64_t next;
    struct rfm_request *later;
    struct rfm_channel *chan;
    uint32_t slot = 0;
    uint64_t id = 0;
    bool ended = false;

again:
    chan = NULL;
    next = UINT64_MAX;
    pthread_mutex_lock(&inv->queue_lock);
    for (struct rfm_request *req = inv->soonest; req != NULL; req = later) {
        uint64_t at = req->deadline_ns;

        later = req->later;
        if (now >= at) {
            uint32_t state = rfm_load_acquire(&req->state);

            if ((state == RFM_QUEUED) &&
                ((inv->first == req) || (req->prev != NULL))) {
                unlink_queued(inv, req);
                forget_deadline(req);
                end_unlisted(req, RFM_TIMED_OUT);
                ended = true;
                continue;
            }
            if (state != RFM_POSTED) {
                /* just on its way, to the queue or to a slot */
                at = now + SOON_NS;
            } else if (req->expired == 0) {
                /* perhaps not begun: looked at without this lock, which who
                 * ends a request takes last */
                req->expired = 1;
                chan         = rfm_load_relaxed(&req->chan);
                slot         = rfm_load_relaxed(&req->slot);
                id           = rfm_load_relaxed(&req->wire_id);
                break;
            } else {
                at += RFM_LATE_KILL_NS;
                if (now >= at) {
                    /* stopped, or never begun: the agent can't tell */
                    (void)rfm_channel_kill(rfm_load_relaxed(&req->chan));
                    at = now + RFM_LATE_KILL_NS;
                }
            }
        }
        if (at < next) {
            next = at;
        }
    }
    pthread_mutex_unlock(&inv->queue_lock);
    if (chan != NULL) {
        struct rfm_request *req = rfm_channel_take_back_at(chan, slot, id);

        if (req != NULL) {
            req->expired = 0;   /* no worker ever had begun it */
            rfm_request_end(req, RFM_TIMED_OUT);
            ended = true;
        }
        goto again;
    }
    if (ended) {
        rfm_invoker_knock(inv);
    }
    return next;
}

void rfm_request_discard(struct rfm_request *req)
{
    if ((req->outcome == RFM_LARGE) && (req->chan != NULL) &&
        (rfm_load_acquire(&req->chan->state) != RFM_CH_DEAD)) {
        rfm_channel_send_number(req->chan, RFM_CTL_DISCARD, 0, req->id);
    }
}

/* --- waiting -------------------------------------------------------------- */

struct waiter {
    struct rfm_request *const *reqs;
    uint32_t n;
    enum rfm_wait_mode mode;
    uint32_t first;
};

/* >= 0 when there is nothing to wait for any more */
static int is_over(struct rfm_invoker *inv, struct waiter *w)
{
    switch (w->mode) {
    case RFM_WAIT_ALL:
        while ((w->first < w->n) && rfm_request_ended(w->reqs[w->first])) {
            w->first++;
        }
        return (w->first == w->n) ? 0 : -1;
    case RFM_WAIT_ANY:
        for (uint32_t i = 0; i < w->n; i++) {
            if (rfm_request_ended(w->reqs[i])) {
                return (int)i;
            }
        }
        return -1;
    default:
        return (rfm_load_relaxed(&inv->ended) != NULL) ? 0 : -1;
    }
}

/* Those that there are now: another attach may open one meanwhile. */
static void arm_sides(struct rfm_invoker *inv,
                      struct rfm_side *armed[RFM_TRANSPORTS])
{
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        armed[i] = rfm_load_acquire(&inv->sides[i]);
        if (armed[i] != NULL) {
            armed[i]->ops->side_arm(armed[i]);
        }
    }
}

/* Still all that can wake us? A channel that comes later knocks. */
static bool sides_are(struct rfm_invoker *inv,
                      struct rfm_side *const armed[RFM_TRANSPORTS])
{
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        if (rfm_load_acquire(&inv->sides[i]) != armed[i]) {
            return false;
        }
    }
    return rfm_load_acquire(&inv->n_local) == 0;
}

/* Asleep on the sides themselves: one thread less between the wire and it. */
static void sleep_as_leader(struct rfm_invoker *inv, struct waiter *w,
                            uint64_t until_ns)
{
    struct pollfd p[RFM_TRANSPORTS + 1] = {
        { .fd = inv->bell_fd, .events = POLLIN },
    };
    struct rfm_side *armed[RFM_TRANSPORTS];
    uint32_t n = 1;
    uint64_t count;
    uint64_t now;

    arm_sides(inv, armed);
    if ((rfm_invoker_progress(inv) == 0) && (is_over(inv, w) < 0) &&
        sides_are(inv, armed)) {
        for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
            if (armed[i] != NULL) {
                p[n].fd       = armed[i]->ops->side_fd(armed[i]);
                p[n++].events = POLLIN;
            }
        }
        now = rfm_now_ns();
        if (now < until_ns) {
            struct timespec ts = {
                (time_t)((until_ns - now) / 1000000000ull),
                (long)((until_ns - now) % 1000000000ull),
            };

            (void)ppoll(p, n, &ts, NULL);
        }
        if ((p[0].revents != 0) &&
            (read(inv->bell_fd, &count, sizeof(count)) < 0)) {
            count = 0;          /* somebody else's wake-up; look again */
        }
    }
    for (uint32_t i = 0; i < RFM_TRANSPORTS; i++) {
        if (armed[i] != NULL) {
            armed[i]->ops->side_woken(armed[i]);
        }
    }
    /* after that: it may have taken a wake-up that was another's, too */
    (void)rfm_invoker_progress(inv);
    rfm_store_release(&inv->leader, 0);
    rfm_fence();
    /* who sleeps on the door needs somebody who looks at the sides */
    if (rfm_load_relaxed(&inv->door->sleepers) != 0) {
        rfm_door_ring(inv->door);
    }
}

static void sleep_on_door(struct rfm_invoker *inv, struct waiter *w,
                          uint64_t until_ns)
{
    uint32_t word;
    uint64_t now;

    if (__builtin_expect(rfm_load_acquire(&inv->n_sides) != 0, 0) &&
        (rfm_load_acquire(&inv->n_local) == 0) &&
        (__atomic_exchange_n(&inv->leader, 1, __ATOMIC_SEQ_CST) == 0)) {
        sleep_as_leader(inv, w, until_ns);
        return;
    }
    word = rfm_door_arm(inv->door);
    if (__builtin_expect(rfm_load_acquire(&inv->n_sides) != 0, 0) &&
        (rfm_load_acquire(&inv->n_local) != 0)) {
        /* Workers here ring the door, so the service thread has to look at the
         * sides: it goes on only while it sees somebody who sleeps there. */
        rfm_service_watch(inv);
    }
    /* the second look; if somebody else is reaping, look again instead */
    if ((rfm_invoker_progress(inv) == 0) && (is_over(inv, w) < 0) &&
        ((rfm_load_acquire(&inv->n_sides) == 0) ||
         (rfm_load_acquire(&inv->n_local) != 0) ||
         (rfm_load_acquire(&inv->leader) != 0))) {
        now = rfm_now_ns();
        if (now < until_ns) {
            (void)rfm_door_sleep(inv->door, word, until_ns - now);
        }
    }
    rfm_door_disarm(inv->door);
}

int rfm_wait(struct rfm_invoker *inv, struct rfm_request *const *reqs,
             uint32_t n, enum rfm_wait_mode mode, uint64_t deadline_ns,
             uint64_t slice_ns, bool may_spin, uint32_t *first_p)
{
    struct waiter w = { reqs, n, mode, (first_p != NULL) ? *first_p : 0 };
    uint64_t spin = may_spin ? inv->spin_ticks : 0;
    uint64_t start = rfm_ticks();
    uint64_t slice_end = 0;
    uint32_t turns = 0;
    int rc;

    rc = is_over(inv, &w);
    if (rc >= 0) {
        goto over;
    }
    (void)__atomic_fetch_add(&inv->pollers, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        int moved = rfm_invoker_progress(inv);

        rc = is_over(inv, &w);
        if (rc >= 0) {
            break;
        }
        if (moved > 0) {
            start = rfm_ticks();
            turns = 0;
            continue;
        }
        if (rfm_load_relaxed(&inv->n_sides) == 0) {
            rfm_spin_pause();   /* to look at a network takes longer */
        }
        if ((++turns & 63u) != 0 && spin != 0) {
            continue;
        }
        if ((deadline_ns != 0) || (slice_end != 0) || (turns > 4096)) {
            uint64_t now = rfm_now_ns();

            if (slice_end == 0) {
                slice_end = now + slice_ns;
            }
            if ((deadline_ns != 0) && (now >= deadline_ns)) {
                rc = RFM_ERR_TIMEOUT;
                break;
            }
            if (now >= slice_end) {
                rc = RFM_ERR_AGAIN;
                break;
            }
        }
        if (rfm_ticks() - start >= spin) {
            uint64_t until = rfm_now_ns() + slice_ns;

            if ((deadline_ns != 0) && (deadline_ns < until)) {
                until = deadline_ns;
            }
            if (rfm_load_acquire(&inv->n_channels) > 1) {
                rebalance(inv);
            }
            sleep_on_door(inv, &w, until);
            rc = is_over(inv, &w);
            if (rc < 0) {
                rc = ((deadline_ns != 0) && (rfm_now_ns() >= deadline_ns))
                         ? RFM_ERR_TIMEOUT
                         : RFM_ERR_AGAIN;
            }
            break;
        }
    }
    if (__atomic_sub_fetch(&inv->pollers, 1, __ATOMIC_SEQ_CST) == 0) {
        /* nobody looks any more: what is queued must not depend on us */
        if (rfm_load_acquire(&inv->queued) != 0) {
            rfm_invoker_pump(inv);
        }
        if (rfm_load_acquire(&inv->n_sides) != 0) {
            (void)__atomic_fetch_add(&inv->waited, 1, __ATOMIC_RELAXED);
            rfm_service_expect(inv);
        }
    }
over:
    if (first_p != NULL) {
        *first_p = w.first;
    }
    return rc;
}

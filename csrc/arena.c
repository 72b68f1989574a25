/*
 * Arenas and the blocks carved from them.
 *
 * All book-keeping is in this process's own memory: a worker that writes where
 * it should not can spoil data, never the allocator. Blocks are 64-byte
 * aligned; a redzone behind each shows a kernel that wrote past its output.
 */
#define _GNU_SOURCE
#include "arena.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shm.h"

#define FIRST_ARENA   (4ull << 20)
#define LARGEST_ARENA (256ull << 20)    /* of those that blocks share */
#define STEP          25ull             /* odd: 64 arenas begin at 64 lines */

struct span {                           /* free memory, by rising offset */
    uint64_t offset;
    uint64_t size;
    struct span *next;
};

struct rfm_arena {
    struct rfm_heap *heap;
    struct rfm_arena *next;
    struct span *free;
    uint8_t *base;
    uint64_t bytes;
    uint64_t blocks;
    uint32_t id;
    int      fd;
    bool     own;                       /* made for one block */
    bool     refused;                   /* a worker has no room for it */
};

struct rfm_heap {
    pthread_mutex_t lock;               /* held while an arena is announced */
    /* The list, and `bytes`, change under both. Who only looks takes this one:
     * announcing may wait for a worker's answer, which the service thread has
     * to hear, and it looks, too. */
    pthread_mutex_t list;
    struct rfm_arena *arenas;
    struct rfm_heap_hooks hooks;
    uint64_t limit;
    uint64_t bytes;
    uint64_t next_size;
    uint32_t next_id;
    bool     closed;
    /* by arena and offset */
    struct rfm_constant *constants;
    uint32_t n_constants;               /* atomic */
    uint32_t room;                      /* for so many */
    uint32_t next_serial;
};

int rfm_heap_create(uint64_t limit, struct rfm_heap **heap_p)
{
    struct rfm_heap *heap = calloc(1, sizeof(*heap));

    if (heap == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    pthread_mutex_init(&heap->lock, NULL);
    pthread_mutex_init(&heap->list, NULL);
    heap->limit     = limit;
    heap->next_size = FIRST_ARENA;
    heap->next_id   = 1;
    *heap_p = heap;
    return RFM_OK;
}

void rfm_heap_lock(struct rfm_heap *heap)
{
    pthread_mutex_lock(&heap->lock);
}

void rfm_heap_unlock(struct rfm_heap *heap)
{
    pthread_mutex_unlock(&heap->lock);
}

void rfm_heap_set_hooks(struct rfm_heap *heap,
                        const struct rfm_heap_hooks *hooks)
{
    rfm_heap_lock(heap);
    if (hooks != NULL) {
        heap->hooks = *hooks;
    } else {
        memset(&heap->hooks, 0, sizeof(heap->hooks));
    }
    rfm_heap_unlock(heap);
}

void rfm_redzone_fill(void *end)
{
    uint64_t word = RFM_CANARY_WORD;

    for (uint32_t i = 0; i < RFM_REDZONE; i += sizeof(word)) {
        memcpy((uint8_t *)end + i, &word, sizeof(word));
    }
}

bool rfm_redzone_intact(const void *end)
{
    uint64_t words[RFM_CANARY_BYTES / sizeof(uint64_t)];

    memcpy(words, end, sizeof(words));
    return (words[0] == RFM_CANARY_WORD) && (words[1] == RFM_CANARY_WORD);
}

/* --- constants: with the list's lock held --------------------------------- */

/* how many lie before it */
static uint32_t constants_before(const struct rfm_heap *heap, uint32_t arena,
                                 uint64_t offset)
{
    uint32_t low = 0;
    uint32_t high = heap->n_constants;

    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        const struct rfm_constant *c = &heap->constants[mid];

        if ((c->arena < arena) || ((c->arena == arena) && (c->offset < offset))) {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    return low;
}

static int add_constant(struct rfm_heap *heap, const struct rfm_block *b)
{
    uint32_t n = heap->n_constants;
    uint32_t at = constants_before(heap, b->arena_id, b->offset);

    if ((at < n) && (heap->constants[at].arena == b->arena_id) &&
        (heap->constants[at].offset == b->offset)) {
        return RFM_OK;
    }
    if (heap->next_serial >= RFM_MAX_SERIAL) {
        return RFM_ERR_NO_RESOURCE;
    }
    if (n == heap->room) {
        uint32_t room = (n == 0) ? 16 : 2 * n;
        struct rfm_constant *more = realloc(heap->constants,
                                            room * sizeof(*more));

        if (more == NULL) {
            return RFM_ERR_NO_MEMORY;
        }
        heap->constants = more;
        heap->room      = room;
    }
    memmove(&heap->constants[at + 1], &heap->constants[at],
            (n - at) * sizeof(heap->constants[0]));
    heap->constants[at] = (struct rfm_constant){
        .arena   = b->arena_id,
        .serial  = heap->next_serial++,
        .offset  = b->offset,
        .size    = b->size,
        .address = b->address,
    };
    __atomic_store_n(&heap->n_constants, n + 1, __ATOMIC_RELEASE);
    return RFM_OK;
}

/* its serial in *serial_p, if it was one */
static bool remove_constant(struct rfm_heap *heap, const struct rfm_block *b,
                            uint32_t *serial_p)
{
    uint32_t n = heap->n_constants;
    uint32_t at = constants_before(heap, b->arena_id, b->offset);

    if ((at < n) && (heap->constants[at].arena == b->arena_id) &&
        (heap->constants[at].offset == b->offset)) {
        *serial_p = heap->constants[at].serial;
        memmove(&heap->constants[at], &heap->constants[at + 1],
                (n - at - 1) * sizeof(heap->constants[0]));
        __atomic_store_n(&heap->n_constants, n - 1, __ATOMIC_RELEASE);
        return true;
    }
    return false;
}

int rfm_heap_constant(struct rfm_block *b)
{
    struct rfm_heap *heap = b->arena->heap;
    int rc;

    pthread_mutex_lock(&heap->list);
    rc = add_constant(heap, b);
    pthread_mutex_unlock(&heap->list);
    return rc;
}

uint32_t rfm_heap_constants(struct rfm_heap *heap)
{
    return __atomic_load_n(&heap->n_constants, __ATOMIC_ACQUIRE);
}

bool rfm_heap_find_constant(struct rfm_heap *heap, uint32_t arena,
                            uint64_t offset, uint64_t size,
                            struct rfm_constant *found)
{
    const struct rfm_constant *c;
    bool inside = false;
    uint32_t n;

    pthread_mutex_lock(&heap->list);
    /* the last one that begins no later */
    n = constants_before(heap, arena, offset + 1);
    if (n > 0) {
        c      = &heap->constants[n - 1];
        inside = (c->arena == arena) && (offset - c->offset <= c->size) &&
                 (size <= c->size - (offset - c->offset));
        if (inside) {
            *found = *c;
        }
    }
    pthread_mutex_unlock(&heap->list);
    return inside;
}

/*
 * Where the first block of the next arena begins: another cache line of its page
 * each time. Arenas begin on a huge page; if large arrays, which have one each,
 * did so, too, a kernel that streams through several of them would take some 4 %
 * more (docs/benchmarks.md).
 */
static uint64_t first_offset(const struct rfm_heap *heap)
{
    return (heap->next_id * STEP * RFM_CACHE_LINE) % RFM_PAGE_SIZE;
}

/* the arena is in no list any more */
static void arena_destroy(struct rfm_arena *arena)
{
    while (arena->free != NULL) {
        struct span *next = arena->free->next;

        free(arena->free);
        arena->free = next;
    }
    rfm_memfd_unmap(arena->base, arena->bytes);
    close(arena->fd);
    free(arena);
}

/* of `bytes` in all, or, if it is for one block, with room for that many */
static int arena_create(struct rfm_heap *heap, uint64_t bytes, bool own,
                        struct rfm_arena **arena_p)
{
    uint64_t first = first_offset(heap);
    struct rfm_arena *arena;
    int rc;

    bytes += own ? first : 0;
    bytes = (bytes + RFM_PAGE_SIZE - 1) & ~(uint64_t)(RFM_PAGE_SIZE - 1);
    if ((heap->limit != 0) && (heap->bytes + bytes > heap->limit)) {
        return RFM_ERR_TOO_LARGE;
    }
    if (heap->next_id >= UINT32_MAX) {
        return RFM_ERR_NO_RESOURCE;
    }
    arena = calloc(1, sizeof(*arena));
    if (arena == NULL) {
        return RFM_ERR_NO_MEMORY;
    }
    arena->free = calloc(1, sizeof(*arena->free));
    if (arena->free == NULL) {
        rc = RFM_ERR_NO_MEMORY;
        goto err_free;
    }
    rc = rfm_memfd_create("rfaas-arena", bytes, &arena->fd);
    if (rc < 0) {
        goto err_free_span;
    }
    rfm_pages_collapse(arena->fd, bytes);
    rc = rfm_memfd_map(arena->fd, bytes, true, &arena->base);
    if (rc < 0) {
        goto err_close;
    }
    arena->heap         = heap;
    arena->bytes        = bytes;
    arena->own          = own;
    arena->id           = heap->next_id++;
    arena->free->offset = first;
    arena->free->size   = bytes - first;
    if (heap->hooks.made != NULL) {
        struct rfm_arena_info info = { arena->id, arena->fd, bytes,
                                       arena->base };

        arena->refused = !heap->hooks.made(heap->hooks.ctx, &info);
    }
    pthread_mutex_lock(&heap->list);
    heap->bytes += bytes;
    arena->next  = heap->arenas;
    heap->arenas = arena;
    pthread_mutex_unlock(&heap->list);
    *arena_p     = arena;
    return RFM_OK;

err_close:
    close(arena->fd);
err_free_span:
    free(arena->free);
err_free:
    free(arena);
    return rc;
}

static void unlink_arena(struct rfm_heap *heap, struct rfm_arena *arena)
{
    struct rfm_arena **at = &heap->arenas;

    pthread_mutex_lock(&heap->list);
    while (*at != arena) {
        at = &(*at)->next;
    }
    *at = arena->next;
    heap->bytes -= arena->bytes;
    pthread_mutex_unlock(&heap->list);
}

/* nothing is carved from it any more */
static void drop_arena(struct rfm_heap *heap, struct rfm_arena *arena)
{
    unlink_arena(heap, arena);
    if (heap->hooks.dropped != NULL) {
        heap->hooks.dropped(heap->hooks.ctx, arena->id);
    }
    arena_destroy(arena);
}

/* For several blocks, or, where that is too much for somebody, for this one. */
static int make_room(struct rfm_heap *heap, uint64_t span,
                     struct rfm_arena **arena_p)
{
    int rc;

    if (span > LARGEST_ARENA / 4) {
        return arena_create(heap, span, true, arena_p);
    }
    while ((heap->next_size < first_offset(heap) + span) &&
           (heap->next_size < LARGEST_ARENA)) {
        heap->next_size *= 2;
    }
    rc = arena_create(heap, heap->next_size, false, arena_p);
    if ((rc == RFM_OK) && (*arena_p)->refused) {
        drop_arena(heap, *arena_p);
        if (heap->next_size > FIRST_ARENA) {
            heap->next_size /= 2;
        }
        rc = RFM_ERR_TOO_LARGE;
    } else if ((rc == RFM_OK) && (heap->next_size < LARGEST_ARENA)) {
        heap->next_size *= 2;
    }
    if (rc == RFM_ERR_TOO_LARGE) {
        rc = arena_create(heap, span, true, arena_p);
    }
    return rc;
}

/* first fit */
static bool carve(struct rfm_arena *arena, uint64_t span_bytes,
                  uint64_t *offset_p)
{
    for (struct span **at = &arena->free; *at != NULL; at = &(*at)->next) {
        struct span *span = *at;

        if (span->size < span_bytes) {
            continue;
        }
        *offset_p     = span->offset;
        span->offset += span_bytes;
        span->size   -= span_bytes;
        if (span->size == 0) {
            *at = span->next;
            free(span);
        }
        arena->blocks++;
        return true;
    }
    return false;
}

int rfm_heap_alloc(struct rfm_heap *heap, uint64_t size, struct rfm_block *b)
{
    struct rfm_arena *arena;
    uint64_t offset = 0;
    uint64_t span;
    int rc = RFM_OK;

    if (size > (UINT64_MAX >> 2)) {
        return RFM_ERR_NO_MEMORY;
    }
    span = ((size + RFM_CACHE_LINE - 1) & ~(uint64_t)(RFM_CACHE_LINE - 1)) +
           RFM_REDZONE;
    rfm_heap_lock(heap);
    if (heap->closed) {
        rc = RFM_ERR_CLOSED;
        goto out;
    }
    for (arena = heap->arenas; arena != NULL; arena = arena->next) {
        if (!arena->own && carve(arena, span, &offset)) {
            goto found;
        }
    }
    rc = make_room(heap, span, &arena);
    if (rc < 0) {
        goto out;
    }
    (void)carve(arena, span, &offset);
found:
    b->arena    = arena;
    b->arena_id = arena->id;
    b->offset   = offset;
    b->size     = size;
    b->span     = span;
    b->address  = arena->base + offset;
    rfm_redzone_fill((uint8_t *)b->address + size);
out:
    rfm_heap_unlock(heap);
    return rc;
}

static void give_back(struct rfm_arena *arena, uint64_t offset, uint64_t size)
{
    struct span *before = NULL;
    struct span *after  = arena->free;
    struct span *fresh;

    while ((after != NULL) && (after->offset < offset)) {
        before = after;
        after  = after->next;
    }
    if ((before != NULL) && (before->offset + before->size == offset)) {
        before->size += size;
        if ((after != NULL) &&
            (before->offset + before->size == after->offset)) {
            before->size += after->size;
            before->next  = after->next;
            free(after);
        }
        return;
    }
    if ((after != NULL) && (offset + size == after->offset)) {
        after->offset = offset;
        after->size  += size;
        return;
    }
    fresh = malloc(sizeof(*fresh));
    if (fresh == NULL) {
        return;                 /* the span is lost until its arena goes */
    }
    fresh->offset = offset;
    fresh->size   = size;
    fresh->next   = after;
    if (before != NULL) {
        before->next = fresh;
    } else {
        arena->free = fresh;
    }
}

static void heap_destroy(struct rfm_heap *heap)
{
    pthread_mutex_destroy(&heap->lock);
    pthread_mutex_destroy(&heap->list);
    free(heap->constants);
    free(heap);
}

void rfm_heap_free(struct rfm_block *b)
{
    struct rfm_arena *arena = b->arena;
    struct rfm_heap *heap;
    uint32_t serial;
    bool last = false;
    bool melted;

    if (arena == NULL) {
        return;
    }
    b->arena = NULL;
    heap = arena->heap;
    rfm_heap_lock(heap);
    if (rfm_heap_constants(heap) != 0) {
        pthread_mutex_lock(&heap->list);
        melted = remove_constant(heap, b, &serial);
        pthread_mutex_unlock(&heap->list);
        if (melted && (heap->hooks.melted != NULL)) {
            heap->hooks.melted(heap->hooks.ctx, serial);
        }
    }
    /* where a redzone is, a block ends: none may be left inside a later one */
    memset((uint8_t *)b->address + b->size, 0, RFM_REDZONE);
    give_back(arena, b->offset, b->span);
    arena->blocks--;
    if ((arena->blocks == 0) && (arena->own || heap->closed)) {
        drop_arena(heap, arena);
        last = heap->closed && (heap->arenas == NULL);
    }
    rfm_heap_unlock(heap);
    if (last) {
        heap_destroy(heap);
    }
}

void rfm_heap_close(struct rfm_heap *heap)
{
    struct rfm_arena *arena;
    struct rfm_arena *next;
    bool last;

    rfm_heap_lock(heap);
    heap->closed = true;
    memset(&heap->hooks, 0, sizeof(heap->hooks));
    for (arena = heap->arenas; arena != NULL; arena = next) {
        next = arena->next;
        if (arena->blocks == 0) {
            unlink_arena(heap, arena);
            arena_destroy(arena);
        }
    }
    last = heap->arenas == NULL;
    rfm_heap_unlock(heap);
    if (last) {
        heap_destroy(heap);
    }
}

bool rfm_heap_locate(struct rfm_heap *heap, const void *address, uint64_t size,
                     uint32_t *arena_p, uint64_t *offset_p, bool *at_end_p)
{
    uintptr_t at = (uintptr_t)address;
    bool found = false;

    pthread_mutex_lock(&heap->list);
    for (struct rfm_arena *a = heap->arenas; a != NULL; a = a->next) {
        uintptr_t base = (uintptr_t)a->base;

        if ((at >= base) && (at < base + a->bytes) &&
            (size <= a->bytes - (at - base))) {
            *arena_p  = a->id;
            *offset_p = at - base;
            /* a redzone right behind means that a block ends here */
            *at_end_p = (size + RFM_REDZONE <= a->bytes - (at - base)) &&
                        rfm_redzone_intact((const uint8_t *)address + size);
            found = true;
            break;
        }
    }
    pthread_mutex_unlock(&heap->list);
    return found;
}

void *rfm_heap_address(struct rfm_heap *heap, uint32_t arena, uint64_t offset,
                       uint64_t size)
{
    void *address = NULL;

    pthread_mutex_lock(&heap->list);
    for (struct rfm_arena *a = heap->arenas; a != NULL; a = a->next) {
        if (a->id == arena) {
            if ((offset <= a->bytes) && (size <= a->bytes - offset)) {
                address = a->base + offset;
            }
            break;
        }
    }
    pthread_mutex_unlock(&heap->list);
    return address;
}

uint64_t rfm_heap_bytes(struct rfm_heap *heap)
{
    uint64_t bytes;

    pthread_mutex_lock(&heap->list);
    bytes = heap->bytes;
    pthread_mutex_unlock(&heap->list);
    return bytes;
}

void rfm_heap_each(struct rfm_heap *heap,
                   void (*fn)(void *ctx, const struct rfm_arena_info *arena),
                   void *ctx)
{
    for (struct rfm_arena *a = heap->arenas; a != NULL; a = a->next) {
        struct rfm_arena_info info = { a->id, a->fd, a->bytes, a->base };

        fn(ctx, &info);
    }
}

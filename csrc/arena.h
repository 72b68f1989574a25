/* The rank's memory: arenas that workers map, blocks that arrays live in. */
#ifndef RFM_ARENA_H
#define RFM_ARENA_H

#include "rfm.h"

#define RFM_MAX_SERIAL (1u << 24)   /* constants that one heap ever names */

struct rfm_arena_info {
    uint32_t id;
    int      fd;
    uint64_t bytes;
    uint8_t *base;
};

/* Called for each arena before anybody can get a block of it, and before its
 * memory goes; never with the heap's lock held by the caller's own thread only.
 * Announcing happens in order of ids. */
struct rfm_heap_hooks {
    /* false: somebody has no room for it, and something smaller may do */
    bool (*made)(void *ctx, const struct rfm_arena_info *arena);
    void (*dropped)(void *ctx, uint32_t arena);
    /* a constant is none any more; before its memory is anybody else's */
    void (*melted)(void *ctx, uint32_t serial);
    void *ctx;
};

void rfm_heap_set_hooks(struct rfm_heap *heap,
                        const struct rfm_heap_hooks *hooks);
/* All arenas there are, for a worker that comes later; calls `made`-like fn
 * under the heap's lock, so that none is missed and none comes twice. */
void rfm_heap_each(struct rfm_heap *heap,
                   void (*fn)(void *ctx, const struct rfm_arena_info *arena),
                   void *ctx);
/* A constant, and which: no two ever had the same serial. */
struct rfm_constant {
    uint32_t arena;
    uint32_t serial;
    uint64_t offset;
    uint64_t size;
    uint8_t *address;
};
uint32_t rfm_heap_constants(struct rfm_heap *heap);
/* The one that the piece lies in; false if there is none. */
bool rfm_heap_find_constant(struct rfm_heap *heap, uint32_t arena,
                            uint64_t offset, uint64_t size,
                            struct rfm_constant *found);
void rfm_heap_lock(struct rfm_heap *heap);
void rfm_heap_unlock(struct rfm_heap *heap);
void rfm_redzone_fill(void *end);
bool rfm_redzone_intact(const void *end);

#endif

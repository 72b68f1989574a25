/*
 * Which constants a worker has that shares no memory with us, and which of them
 * it is to let go of first: the one whose last use is longest ago.
 *
 *   oldest ◀── ... ──▶ newest      each: its last use, as the ticket of a request
 *
 * A request is in flight while its ticket is not below the channel's tail; what
 * it uses stays. Pure book-keeping: the caller has a lock.
 */
#ifndef RFM_KNOWN_H
#define RFM_KNOWN_H

#include "arena.h"

struct rfm_known_one {
    struct rfm_constant is;
    uint64_t used;              /* the last ticket that used it */
    uint32_t older;
    uint32_t newer;
};

struct rfm_known {
    uint64_t bytes;             /* of all that it has */
    struct rfm_known_one *ones; /* [0] closes the ring */
    uint32_t n_ones;            /* that were ever in use, and [0] */
    uint32_t room;
    uint32_t unused;            /* linked by `newer`; 0: none */
    uint32_t *at;               /* by serial: its index; 0: the worker hasn't it */
    uint32_t n_at;
};

/* All zeros is one that knows nothing. Safe to call twice. */
void rfm_known_fini(struct rfm_known *known);
/* Whether the worker has it; if so it counts as used by this ticket. */
bool rfm_known_use(struct rfm_known *known, uint32_t serial, uint64_t ticket);
/* RFM_ERR_NO_MEMORY: it stays unknown, and is sent once more. */
int  rfm_known_add(struct rfm_known *known, const struct rfm_constant *what,
                   uint64_t ticket);
/* It is no constant any more. */
void rfm_known_drop(struct rfm_known *known, uint32_t serial);
/* While there is more than `limit` (0: any amount): what to let go of now. False
 * if there is no need, or the oldest is in use by a ticket from `tail` on. */
bool rfm_known_evict(struct rfm_known *known, uint64_t limit, uint64_t tail,
                     struct rfm_constant *what);

#endif

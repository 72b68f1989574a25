/*
 * Which constants a worker has: a list by last use, and an index by serial.
 */
#include "known.h"

#include <stdlib.h>
#include <string.h>

void rfm_known_fini(struct rfm_known *known)
{
    free(known->ones);
    free(known->at);
    memset(known, 0, sizeof(*known));
}

static uint32_t index_of(const struct rfm_known *known, uint32_t serial)
{
    return (serial < known->n_at) ? known->at[serial] : 0;
}

static void unlink_one(struct rfm_known *known, uint32_t i)
{
    struct rfm_known_one *ones = known->ones;

    ones[ones[i].older].newer = ones[i].newer;
    ones[ones[i].newer].older = ones[i].older;
}

static void make_newest(struct rfm_known *known, uint32_t i)
{
    struct rfm_known_one *ones = known->ones;

    ones[i].older = ones[0].older;
    ones[i].newer = 0;
    ones[ones[i].older].newer = i;
    ones[0].older = i;
}

static bool has_room_at(struct rfm_known *known, uint32_t serial)
{
    uint32_t grown = 2 * serial + 64;
    uint32_t *more;

    if (serial < known->n_at) {
        return true;
    }
    more = realloc(known->at, grown * sizeof(*more));
    if (more == NULL) {
        return false;
    }
    memset(more + known->n_at, 0, (grown - known->n_at) * sizeof(*more));
    known->at   = more;
    known->n_at = grown;
    return true;
}

/* one that is nobody's; 0: no memory */
static uint32_t take_unused(struct rfm_known *known)
{
    uint32_t i = known->unused;

    if (i != 0) {
        known->unused = known->ones[i].newer;
        return i;
    }
    if (known->n_ones >= known->room) {
        uint32_t room = 2 * known->room + 16;
        struct rfm_known_one *more = realloc(known->ones, room * sizeof(*more));

        if (more == NULL) {
            return 0;
        }
        known->ones = more;
        known->room = room;
        if (known->n_ones == 0) {
            memset(&more[0], 0, sizeof(more[0]));
            known->n_ones = 1;
        }
    }
    return known->n_ones++;
}

bool rfm_known_use(struct rfm_known *known, uint32_t serial, uint64_t ticket)
{
    uint32_t i = index_of(known, serial);

    if (i == 0) {
        return false;
    }
    /* who posts at the same time may be here first with the later ticket */
    if (known->ones[i].used < ticket) {
        known->ones[i].used = ticket;
    }
    unlink_one(known, i);
    make_newest(known, i);
    return true;
}

int rfm_known_add(struct rfm_known *known, const struct rfm_constant *what,
                  uint64_t ticket)
{
    uint32_t i;

    if (!has_room_at(known, what->serial)) {
        return RFM_ERR_NO_MEMORY;
    }
    i = take_unused(known);
    if (i == 0) {
        return RFM_ERR_NO_MEMORY;
    }
    known->ones[i].is   = *what;
    known->ones[i].used = ticket;
    make_newest(known, i);
    known->at[what->serial] = i;
    known->bytes += what->size;
    return RFM_OK;
}

void rfm_known_drop(struct rfm_known *known, uint32_t serial)
{
    uint32_t i = index_of(known, serial);

    if (i == 0) {
        return;
    }
    unlink_one(known, i);
    known->at[serial] = 0;
    known->bytes -= known->ones[i].is.size;
    known->ones[i].newer = known->unused;
    known->unused = i;
}

bool rfm_known_evict(struct rfm_known *known, uint64_t limit, uint64_t tail,
                     struct rfm_constant *what)
{
    uint32_t oldest;

    if ((limit == 0) || (known->bytes <= limit)) {
        return false;
    }
    oldest = known->ones[0].newer;
    if ((oldest == 0) || (known->ones[oldest].used >= tail)) {
        return false;
    }
    *what = known->ones[oldest].is;
    rfm_known_drop(known, what->serial);
    return true;
}

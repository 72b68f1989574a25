/*
 * Whose turn it is among ranks that share a worker: theirs who have had no more
 * of its time than the others that want some.
 *
 *   level ├── slack ──┤
 *         │ A   C     │        B          in turn A, C, A, C, ... until neither
 *   ──────┴───────────┴────────┴──▶ had   has anything; then the level rises to B
 *
 * Who has wanted nothing for a while is put on the level when it is served
 * again: time that was not used is nobody's claim. Who pays most waits for the
 * others, but only as long as these want something: no worker is idle.
 */
#ifndef RFM_ROTA_H
#define RFM_ROTA_H

#include <stdbool.h>
#include <stdint.h>

struct rfm_rota {
    uint64_t level;             /* who has had less counts as having had this */
    uint64_t slack;             /* so much more or less is the same */
    uint64_t looked;            /* at all who have had up to this … */
    bool     risen;             /* … once the level has risen in this look */
    uint64_t next;              /* the least that those had who are passed over */
};

/* What one rank has had, by the same measure. */
struct rfm_had {
    uint64_t time;
};

static inline void rfm_rota_begin(struct rfm_rota *rota)
{
    rota->risen = false;
    rota->next  = UINT64_MAX;
}

/* Whether to look now if it wants anything. */
static inline bool rfm_rota_is_due(struct rfm_rota *rota,
                                   const struct rfm_had *had)
{
    if (__builtin_expect(had->time > rota->level + rota->slack, 0)) {
        if (had->time < rota->next) {
            rota->next = had->time;
        }
        return false;
    }
    return __builtin_expect(!rota->risen, 1) || (had->time > rota->looked);
}

/* All who were due want nothing: whether somebody was passed over that is due
 * now. */
static inline bool rfm_rota_rise(struct rfm_rota *rota)
{
    if (__builtin_expect(rota->next == UINT64_MAX, 1)) {
        return false;
    }
    rota->looked = rota->level + rota->slack;
    rota->risen  = true;
    rota->level  = rota->next;
    rota->next   = UINT64_MAX;
    return true;
}

static inline void rfm_rota_charge(const struct rfm_rota *rota,
                                   struct rfm_had *had, uint64_t time)
{
    if (had->time < rota->level) {
        had->time = rota->level;
    }
    had->time += time;
}

#endif

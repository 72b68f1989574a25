/*
 * A board: cells of one piece of work, which a rank and its workers take from
 * until none is left. It lies in memory that all of them share.
 *
 *   ┌ next ┬ begun ┬ … ┬ cell 0 ┬ cell 1 ┬ cell 2 ┬ … ┐
 *   │   3  │  ns   │   │ done   │        │ done   │   │
 *   └──────┴───────┴───┴────────┴────────┴────────┴───┘
 *                        rank     worker 1  rank
 *
 * Whoever is free takes the next cell; large ones come first. A cell whose word
 * is 0 has not been run to its end: when nobody takes from the board any more,
 * those are the ones that were lost with whoever had them.
 */
#ifndef RFM_BOARD_H
#define RFM_BOARD_H

#include <stdbool.h>
#include <stdint.h>

/* `next` of a board that nobody takes from any more. */
#define RFM_BOARD_CLOSED (1ull << 32)

#define RFM_BOARD_WHO_SHIFT 56u

struct rfm_board {
    uint64_t next;              /* the first cell that nobody has taken */
    uint64_t begun_ns;          /* by CLOCK_MONOTONIC */
    uint64_t reserved[6];
    uint64_t cells[];           /* (who + 1) << 56 | ns that it took, when done */
};

/* One who takes from it. Only `board` is shared. */
struct rfm_share {
    struct rfm_board *board;
    const uint64_t *edges;      /* n + 1: cell k is rows edges[k] to edges[k + 1] */
    uint64_t n;
    uint64_t who;               /* the rank is 0 */
    double   margin;
    uint64_t cells;             /* that it has run … */
    uint64_t rows;              /* … their rows … */
    uint64_t ns;                /* … and what they took */
};

/* What the quickest of the others took for a row, by its cells so far; 0: none
 * of them has run one. */
static inline double rfm_share_quickest(const struct rfm_share *share)
{
    uint64_t mine = (share->who + 1) << RFM_BOARD_WHO_SHIFT;
    uint64_t ns   = (1ull << RFM_BOARD_WHO_SHIFT) - 1;
    double best   = 0.0;

    for (uint64_t k = 0; k < share->n; k++) {
        uint64_t word = __atomic_load_n(&share->board->cells[k],
                                        __ATOMIC_RELAXED);
        uint64_t rows = share->edges[k + 1] - share->edges[k];

        if ((word != 0) && ((word & ~ns) != mine) && (rows != 0)) {
            double pace = (double)(word & ns) / (double)rows;

            best = ((best == 0.0) || (pace < best)) ? pace : best;
        }
    }
    return best;
}

/*
 * Whether it is worth it that this one takes cell k, and not that it is left to
 * the others. By what it took for a row so far it would need `mine` for it; by
 * what all took for theirs, all others need `theirs` for all that is left, and
 * no less than the quickest of them for this cell.
 */
static inline bool rfm_share_pays(const struct rfm_share *share, uint64_t k,
                                  uint64_t now_ns)
{
    uint64_t elapsed = now_ns - share->board->begun_ns;
    uint64_t taken   = share->edges[k];
    uint64_t size    = share->edges[k + 1] - taken;
    double mine, theirs;

    if ((share->ns == 0) || (taken <= share->rows)) {
        return true;            /* nobody else has been seen to run anything */
    }
    mine   = (double)share->ns / (double)share->rows * (double)size;
    theirs = (double)(share->edges[share->n] - taken) * (double)elapsed /
             (double)(taken - share->rows);
    if (__builtin_expect(mine <= share->margin * theirs, 1)) {
        return true;
    }
    theirs = rfm_share_quickest(share) * (double)size;
    return (theirs == 0.0) || (mine <= share->margin * theirs);
}

/* The cell that is now this one's to run; n: there is none for it. */
static inline uint64_t rfm_share_take(struct rfm_share *share, uint64_t now_ns)
{
    uint64_t k = __atomic_load_n(&share->board->next, __ATOMIC_RELAXED);

    if ((k >= share->n) || !rfm_share_pays(share, k, now_ns)) {
        return share->n;
    }
    k = __atomic_fetch_add(&share->board->next, 1, __ATOMIC_ACQ_REL);
    return (k < share->n) ? k : share->n;
}

/* It has run the cell, in this time. */
static inline void rfm_share_done(struct rfm_share *share, uint64_t k,
                                  uint64_t ns)
{
    uint64_t most = (1ull << RFM_BOARD_WHO_SHIFT) - 1;

    share->cells++;
    share->rows += share->edges[k + 1] - share->edges[k];
    share->ns   += ns;
    __atomic_store_n(&share->board->cells[k],
                     ((share->who + 1) << RFM_BOARD_WHO_SHIFT) |
                         ((ns < most) ? ns : most),
                     __ATOMIC_RELEASE);
}

/* 0: not done; else what `cells` says. */
static inline uint64_t rfm_share_look(const struct rfm_share *share, uint64_t k)
{
    return __atomic_load_n(&share->board->cells[k], __ATOMIC_ACQUIRE);
}

/* Nobody takes another cell. */
static inline void rfm_share_close(struct rfm_share *share)
{
    __atomic_store_n(&share->board->next, RFM_BOARD_CLOSED, __ATOMIC_RELEASE);
}

/* A new piece of work; nobody may be taking from the board. */
static inline void rfm_share_open(struct rfm_share *share, uint64_t now_ns)
{
    for (uint64_t k = 0; k < share->n; k++) {
        __atomic_store_n(&share->board->cells[k], 0, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&share->board->begun_ns, now_ns, __ATOMIC_RELAXED);
    __atomic_store_n(&share->board->next, 0, __ATOMIC_RELEASE);
}

#endif

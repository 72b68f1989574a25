/*
 * A board: cells of one piece of work, which a rank and its workers take from
 * until none is left. It lies in memory that all of them share.
 *
 *   ┌ next ┬ begun ┬ least ┬ parts ┬ … ┬ cell 0 ┬ cell 1 ┬ cell 2 ┬ … ┐
 *   │   3  │  ns   │ rows  │       │   │ done   │        │ done   │   │
 *   └──────┴───────┴───────┴───────┴───┴────────┴────────┴────────┴───┘
 *                                        rank     worker 1  rank
 *
 * Whoever is free takes the next cell; large ones come first. A cell whose word
 * is 0 has not been run to its end: when nobody takes from the board any more,
 * those are the ones that were lost with whoever had them.
 *
 * Where it doesn't matter how many rows a call has, several cells are taken at
 * once and run by one call (rfm_share_take_some).
 */
#ifndef RFM_BOARD_H
#define RFM_BOARD_H

#include <stdbool.h>
#include <stdint.h>

/* `next` of a board that nobody takes from any more. */
#define RFM_BOARD_CLOSED (1ull << 32)

#define RFM_BOARD_WHO_SHIFT 56u
/* Of a cell that was run by the same call as the one before it. */
#define RFM_BOARD_SAME_CALL (1ull << 55)
#define RFM_BOARD_NS        (RFM_BOARD_SAME_CALL - 1)

/* Several cells that are taken at once take no longer than this, as far as is
 * known: others want to have a turn, or this one looks at something else. */
#define RFM_BOARD_CALL_NS 2000000.0

struct rfm_board {
    uint64_t next;              /* the first cell that nobody has taken */
    uint64_t begun_ns;          /* by CLOCK_MONOTONIC */
    uint64_t least;             /* rows that are taken at once, if several are */
    uint64_t parts;             /* how many may take from it */
    uint64_t reserved[4];
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
    uint64_t who  = ~((1ull << RFM_BOARD_WHO_SHIFT) - 1);
    double best   = 0.0;

    for (uint64_t k = 0; k < share->n; k++) {
        uint64_t word = __atomic_load_n(&share->board->cells[k],
                                        __ATOMIC_RELAXED);
        uint64_t rows = share->edges[k + 1] - share->edges[k];

        if ((word != 0) && ((word & who) != mine) && (rows != 0)) {
            double pace = (double)(word & RFM_BOARD_NS) / (double)rows;

            best = ((best == 0.0) || (pace < best)) ? pace : best;
        }
    }
    return best;
}

/*
 * Whether it is worth it that this one takes cell k and those behind it, so many
 * in all, and not that they are left to the others. By what it took for a row so
 * far it would need `mine` for them; by what all took for theirs, all others need
 * `theirs` for all that is left, and no less than the quickest of them for these.
 */
static inline bool rfm_share_pays(const struct rfm_share *share, uint64_t k,
                                  uint64_t count, uint64_t now_ns)
{
    uint64_t elapsed = now_ns - share->board->begun_ns;
    uint64_t taken   = share->edges[k];
    uint64_t size    = share->edges[k + count] - taken;
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

    if ((k >= share->n) || !rfm_share_pays(share, k, 1, now_ns)) {
        return share->n;
    }
    k = __atomic_fetch_add(&share->board->next, 1, __ATOMIC_ACQ_REL);
    return (k < share->n) ? k : share->n;
}

/*
 * How many cells from k on one call of this one should run: half of its part of
 * what is left, by what it and all took for theirs so far, so that all end
 * together. No more than an even part, since the others may only be late; and no
 * fewer than `least` rows, so that what a call costs whatever it does is little
 * of it. It is 2^i cells that begin at a multiple of it, or those to the end: so
 * there are few different calls, which are laid out once.
 */
static inline uint64_t rfm_share_many(const struct rfm_share *share, uint64_t k,
                                      uint64_t now_ns)
{
    const uint64_t *edges = share->edges;
    uint64_t taken = edges[k];
    uint64_t left  = edges[share->n] - taken;
    uint64_t least = share->board->least;
    uint64_t parts = share->board->parts;
    uint64_t many  = 1;
    double want    = 0.0;

    if ((share->ns != 0) && (taken != 0)) {
        double pace = (double)share->rows / (double)share->ns;
        double mine = pace * (double)(now_ns - share->board->begun_ns) *
                      (double)left / (double)taken / 2.0;
        double even = (double)left / (double)((parts != 0) ? parts : 1);

        want = (mine < even) ? mine : even;
        want = (want < pace * RFM_BOARD_CALL_NS) ? want
                                                 : pace * RFM_BOARD_CALL_NS;
    }
    while ((k % (2 * many) == 0) && (k + many < share->n)) {
        uint64_t stop = k + 2 * many;

        stop = (stop < share->n) ? stop : share->n;
        if ((edges[k + many] - taken >= least) &&
            ((double)(edges[stop] - taken) > want)) {
            break;
        }
        many *= 2;
    }
    return (k + many < share->n) ? many : share->n - k;
}

/*
 * As rfm_share_take, of several cells that follow each other: the first of them,
 * and how many.
 */
static inline uint64_t rfm_share_take_some(struct rfm_share *share,
                                           uint64_t now_ns, uint64_t *count_p)
{
    uint64_t k = __atomic_load_n(&share->board->next, __ATOMIC_RELAXED);

    while (k < share->n) {
        uint64_t many = rfm_share_many(share, k, now_ns);

        if (!rfm_share_pays(share, k, many, now_ns)) {
            break;
        }
        if (__atomic_compare_exchange_n(&share->board->next, &k, k + many,
                                        false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED)) {
            *count_p = many;
            return k;
        }
    }
    return share->n;
}

/* It has run so many cells by one call, in this time. */
static inline void rfm_share_done_some(struct rfm_share *share, uint64_t k,
                                       uint64_t count, uint64_t ns)
{
    const uint64_t *edges = share->edges;
    uint64_t rows = edges[k + count] - edges[k];

    share->cells += count;
    share->rows  += rows;
    share->ns    += ns;
    for (uint64_t i = k; i < k + count; i++) {
        double part   = (rows != 0) ? (double)(edges[i + 1] - edges[i]) /
                                        (double)rows
                                    : 0.0;
        uint64_t mine = (count == 1) ? ns : (uint64_t)(part * (double)ns);

        __atomic_store_n(&share->board->cells[i],
                         ((share->who + 1) << RFM_BOARD_WHO_SHIFT) |
                             ((i == k) ? 0 : RFM_BOARD_SAME_CALL) |
                             ((mine < RFM_BOARD_NS) ? mine : RFM_BOARD_NS),
                         __ATOMIC_RELEASE);
    }
}

/* It has run the cell, in this time. */
static inline void rfm_share_done(struct rfm_share *share, uint64_t k,
                                  uint64_t ns)
{
    share->cells++;
    share->rows += share->edges[k + 1] - share->edges[k];
    share->ns   += ns;
    __atomic_store_n(&share->board->cells[k],
                     ((share->who + 1) << RFM_BOARD_WHO_SHIFT) |
                         ((ns < RFM_BOARD_NS) ? ns : RFM_BOARD_NS),
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

/* A new piece of work; nobody may be taking from the board. `least` and `parts`
 * are for those who take several cells at once. */
static inline void rfm_share_open(struct rfm_share *share, uint64_t now_ns,
                                  uint64_t least, uint64_t parts)
{
    for (uint64_t k = 0; k < share->n; k++) {
        __atomic_store_n(&share->board->cells[k], 0, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&share->board->begun_ns, now_ns, __ATOMIC_RELAXED);
    __atomic_store_n(&share->board->least, least, __ATOMIC_RELAXED);
    __atomic_store_n(&share->board->parts, parts, __ATOMIC_RELAXED);
    __atomic_store_n(&share->board->next, 0, __ATOMIC_RELEASE);
}

#endif

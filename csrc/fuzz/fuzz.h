/*
 * What fuzz targets share: inputs that are a list of what a peer does, checks,
 * and what has to be reached.
 *
 * An input is a list of acts: a header (below) and bytes. Where a peer says a
 * number that it has to know (an id, a crc), a target may put in the right one,
 * so that what lies behind such a check is reached, too.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fuzz_act {
    uint8_t  what;
    uint8_t  a;
    uint8_t  b;
    uint8_t  c;
    uint16_t n;                 /* bytes that follow */
};
_Static_assert(sizeof(struct fuzz_act) == 6, "act");

/* Of a frame's descriptors: b is how many, c two bits for each of them. */
enum fuzz_fd { FUZZ_FD_MEMORY, FUZZ_FD_DOOR, FUZZ_FD_EVENT, FUZZ_FD_OTHER };
#define FUZZ_FDS(a, b, c, d) ((uint8_t)((a) | (b) << 2 | (c) << 4 | (d) << 6))

/* fuzz_worker: a rank's acts */
enum fuzz_by_rank {
    RANK_FRAME,                 /* a: type; the head says so; see FUZZ_FDS */
    RANK_CONTROL,               /* bytes of the control connection */
    RANK_DATA,                  /* bytes of the data connection */
    RANK_MESSAGE,               /* the same, with FUZZ_CRC and FUZZ_FIT in a */
    RANK_SLOT,                  /* shm, slot a: line, payload */
    RANK_CLAIM,                 /* shm, slot a: takes it back */
    RANK_PAUSE,                 /* until nothing moves at the worker */
    RANK_ACTS,
};
#define FUZZ_CRC     1u         /* a right crc follows */
#define FUZZ_FIT     2u         /* with the bytes that its head says, if few */
#define FUZZ_SHM     0u         /* an input's first byte */
#define FUZZ_TCP     1u
#define FUZZ_TCP_CRC 3u

/* fuzz_rank: a worker's acts; the rank comes with the first that is no frame */
enum fuzz_by_worker {
    WORKER_FRAME,               /* as above */
    WORKER_CONTROL,
    WORKER_DATA,
    WORKER_MESSAGE,             /* the line's id is added to that of call c */
    WORKER_REPLY,               /* shm, slot a, the same; line, payload */
    WORKER_CALLED,              /* the rank makes call a */
    WORKER_FETCHED,             /* the rank fetches a result that is kept */
    WORKER_TIME,                /* so many ms pass */
    WORKER_ACTS,
};

/* fuzz_verbs: a: 1 if it is the worker's side that does it */
enum fuzz_by_queue_pair {
    QP_PARCEL,                  /* first: what its parcel says is changed so */
    QP_WRITE,                   /* struct fuzz_write, bytes */
    QP_SLOT,                    /* b: slot, as it should be; line, payload */
    QP_ASK,                     /* b: slot; honestly: the rank asks */
    QP_ANSWER,                  /* b: slot; the worker answers what is there */
    QP_ARENA,                   /* struct fuzz_arena, what is said of it */
    QP_DROP,                    /* the arena b is dropped */
    QP_PORT,                    /* goes down */
    QP_ACTS,
};

struct fuzz_write {
    uint32_t imm;
    uint32_t length;            /* of what is written, from our memory */
    uint32_t offset;            /* in what the other side said of its memory */
    uint32_t key;               /* is added to the right one */
    uint8_t  with_imm;
    uint8_t  into_arena;
    uint8_t  reserved[6];
};
_Static_assert(sizeof(struct fuzz_write) == 24, "write");

struct fuzz_arena {
    uint32_t number;
    uint32_t honest;            /* what follows is added to the truth */
};

#define FUZZ_CHECK(cond)                                                    \
    do {                                                                    \
        if (!(cond)) {                                                      \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__,      \
                    #cond);                                                 \
            abort();                                                        \
        }                                                                   \
    } while (0)

struct fuzz_in {
    const uint8_t *at;
    size_t left;
};

/* false at the end; what is cut off is taken as far as it goes */
static inline bool fuzz_next(struct fuzz_in *in, struct fuzz_act *act,
                             const uint8_t **bytes_p)
{
    if (in->left < sizeof(*act)) {
        return false;
    }
    memcpy(act, in->at, sizeof(*act));
    in->at   += sizeof(*act);
    in->left -= sizeof(*act);
    if (act->n > in->left) {
        act->n = (uint16_t)in->left;
    }
    *bytes_p  = in->at;
    in->at   += act->n;
    in->left -= act->n;
    return true;
}

/* Every thread that was made runs until it would sleep. */
void fuzz_turn(void);
void fuzz_pass_ms(uint64_t ms);
/* A process that can be killed, as a descriptor that is readable afterwards. */
int  fuzz_victim(void);
/* The lowest free descriptor: none was lost if it is what it was. */
int  fuzz_lowest_fd(void);
void fuzz_check_fds(int lowest);
/* Sends what fits; the other side may have hung up. */
void fuzz_send(int fd, const void *bytes, size_t n);
/* A control frame with descriptors of this side's own, all of which are closed
 * by who called. More than a frame may have is sent as it is. */
void fuzz_send_frame(int fd, uint16_t type, const void *body, uint16_t n,
                     const int *fds, uint32_t n_fds);
void fuzz_discard(int fd);
/* A message of a stream, as an act says: how long it is now. */
#define FUZZ_MESSAGE 8192u
uint32_t fuzz_message(const struct fuzz_act *act, const uint8_t *bytes,
                      uint8_t to[FUZZ_MESSAGE]);
/* A byte of all of it, so that every one of them is looked at. */
uint8_t fuzz_read(const void *at, uint64_t n);

/* What inputs have to reach, or a target is of no use: with $FUZZ_REACH it
 * fails at its end if one of these was never counted. */
struct fuzz_goal {
    const char *name;
    uint64_t    times;
};
void fuzz_goals(struct fuzz_goal *goals, size_t n);

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif

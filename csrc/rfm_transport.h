/*
 * What a transport implements: one link between a rank and a worker, its
 * request slots at the worker, its reply slots at the rank.
 *
 * Ops tables are const and full. The invoker and the worker own all policy
 * (tickets, bindings, queues, deadlines); a transport moves one slot.
 */
#ifndef RFM_TRANSPORT_H
#define RFM_TRANSPORT_H

#include "rfm.h"

struct rfm_transport;

struct rfm_link {
    const struct rfm_transport *ops;
    uint32_t slots;             /* power of two */
    uint32_t slot_bytes;
};

struct rfm_transport {
    const char *name;

    /* rank: makes what ATTACH carries (body and descriptors, which stay the
     * link's or the caller's), then takes what ATTACHED brought (and owns it). */
    int  (*rank_open)(uint32_t slots, uint32_t slot_bytes, int door_fd,
                      int event_fd, struct rfm_link **link_p,
                      struct rfm_ctl_attach *body, int *fds, uint32_t *n_p);
    int  (*rank_attached)(struct rfm_link *link, int door_fd);
    /* where the payload of a slot is written when it doesn't fit the line */
    uint8_t *(*rank_payload)(struct rfm_link *link, uint32_t slot);
    void (*rank_post)(struct rfm_link *link, uint32_t slot,
                      const struct rfm_request_line *line);
    /* true once the reply to `id` is there: *line_p is a copy of the line */
    bool (*rank_poll)(struct rfm_link *link, uint32_t slot, uint64_t id,
                      struct rfm_reply_line *line_p, const uint8_t **payload_p);
    /* an old reply in this slot must not be taken for the next one, nor an old
     * claim; before anybody can take the next one back */
    void (*rank_forget)(struct rfm_link *link, uint32_t slot);
    /* true if what says CLAIM was not begun, and now won't be */
    bool (*rank_take_back)(struct rfm_link *link, uint32_t slot);
    /* ring the event once so many tickets are done */
    void (*rank_wake_at)(struct rfm_link *link, uint64_t done);
    void (*rank_close)(struct rfm_link *link);

    /* worker */
    int  (*worker_open)(const struct rfm_ctl_attach *body, const int *fds,
                        uint32_t n_fds, struct rfm_link **link_p);
    bool (*worker_poll)(struct rfm_link *link, uint32_t slot, uint64_t last_id,
                        struct rfm_request_line *line_p,
                        const uint8_t **payload_p);
    /* false if the rank took it back */
    bool (*worker_begin)(struct rfm_link *link, uint32_t slot);
    uint8_t *(*worker_payload)(struct rfm_link *link, uint32_t slot);
    void (*worker_reply)(struct rfm_link *link, uint32_t slot,
                         const struct rfm_reply_line *line);
    /* after one or more replies: wake whoever sleeps; `done` tickets so far */
    void (*worker_knock)(struct rfm_link *link, uint64_t done);
    void (*worker_close)(struct rfm_link *link);
};

extern const struct rfm_transport rfm_shm;

#endif

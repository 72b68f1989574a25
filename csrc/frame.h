/* Control frames on a stream socket, with descriptors. */
#ifndef RFM_FRAME_H
#define RFM_FRAME_H

#include <stdint.h>
#include <sys/uio.h>

#include "rfm_wire.h"

/* Sends one frame whose body is the concatenation of iov. Waits for room;
 * RFM_ERR_TIMEOUT if the peer reads nothing for some seconds: what was sent
 * may then end in the middle of a frame, and the connection is of no use. */
int rfm_frame_send(int fd, uint16_t type, uint64_t cookie,
                   const struct iovec *iov, uint32_t n_iov, const int *fds,
                   uint32_t n_fds);

/* Collects one frame at a time from a non-blocking socket. */
struct rfm_rx {
    struct rfm_frame head;
    uint32_t head_got;
    uint32_t body_got;
    uint8_t *body;              /* malloc'ed; the taker frees it */
    int      fds[RFM_MAX_FRAME_FDS];
    uint32_t n_fds;
    uint32_t max_body;
};

void rfm_rx_init(struct rfm_rx *rx, uint32_t max_body);
/* RFM_OK: head, body and fds are a whole frame; rfm_rx_next() goes on.
 * RFM_ERR_AGAIN: not yet. RFM_ERR_PEER: end. RFM_ERR_PROTOCOL: nonsense. */
int  rfm_rx_read(struct rfm_rx *rx, int fd);
void rfm_rx_next(struct rfm_rx *rx);        /* after body and fds were taken */
void rfm_rx_fini(struct rfm_rx *rx);

#endif

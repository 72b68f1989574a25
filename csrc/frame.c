/* Sending and collecting control frames; every length is bounded before use. */
#define _GNU_SOURCE
#include "frame.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "rfm.h"

#define MAX_IOV 8u

/* A peer whose control thread reads nothing for so long is stopped or broken;
 * whoever sends may hold locks that others need to deal with that. */
#define STUCK_MS 5000

static int await_room(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLOUT };
    int rc;

    do {
        rc = poll(&p, 1, STUCK_MS);
    } while ((rc < 0) && (errno == EINTR));
    if (rc == 0) {
        return RFM_ERR_TIMEOUT;
    }
    return (rc > 0) ? RFM_OK : RFM_ERR_SYSTEM;
}

int rfm_frame_send(int fd, uint16_t type, uint64_t cookie,
                   const struct iovec *body, uint32_t n_body, const int *fds,
                   uint32_t n_fds)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(RFM_MAX_FRAME_FDS * sizeof(int))];
    } control;
    struct iovec iov[MAX_IOV];
    struct rfm_frame head = { .type = type, .cookie = cookie };
    struct msghdr msg = { .msg_iov = iov };
    uint64_t length = 0;
    uint32_t n = 1;

    if ((n_body >= MAX_IOV) || (n_fds > RFM_MAX_FRAME_FDS)) {
        return RFM_ERR_INVALID;
    }
    for (uint32_t i = 0; i < n_body; i++) {
        length += body[i].iov_len;
        if (body[i].iov_len != 0) {
            iov[n++] = body[i];
        }
    }
    if (length > RFM_MAX_FRAME) {
        return RFM_ERR_TOO_LARGE;
    }
    head.length     = (uint32_t)length;
    head.n_fds      = (uint16_t)n_fds;
    iov[0].iov_base = &head;
    iov[0].iov_len  = sizeof(head);
    msg.msg_iovlen  = n;
    if (n_fds > 0) {
        struct cmsghdr *cmsg;

        memset(&control, 0, sizeof(control));
        msg.msg_control    = control.bytes;
        msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        cmsg               = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level   = SOL_SOCKET;
        cmsg->cmsg_type    = SCM_RIGHTS;
        cmsg->cmsg_len     = CMSG_LEN(n_fds * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, n_fds * sizeof(int));
    }
    while (msg.msg_iovlen > 0) {
        ssize_t sent = sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);

        if (sent < 0) {
            if (errno == EINTR) {
                continue;
            }
            if ((errno == EAGAIN) || (errno == EWOULDBLOCK)) {
                int rc = await_room(fd);

                if (rc < 0) {
                    return rc;
                }
                continue;
            }
            return ((errno == EPIPE) || (errno == ECONNRESET)) ? RFM_ERR_PEER
                                                               : RFM_ERR_SYSTEM;
        }
        /* descriptors went with the first byte */
        msg.msg_control    = NULL;
        msg.msg_controllen = 0;
        while ((msg.msg_iovlen > 0) &&
               ((size_t)sent >= msg.msg_iov->iov_len)) {
            sent -= (ssize_t)msg.msg_iov->iov_len;
            msg.msg_iov++;
            msg.msg_iovlen--;
        }
        if (msg.msg_iovlen > 0) {
            msg.msg_iov->iov_base = (uint8_t *)msg.msg_iov->iov_base + sent;
            msg.msg_iov->iov_len -= (size_t)sent;
        }
    }
    return RFM_OK;
}

void rfm_rx_init(struct rfm_rx *rx, uint32_t max_body)
{
    memset(rx, 0, sizeof(*rx));
    rx->max_body = max_body;
}

static int take_fds(struct rfm_rx *rx, struct msghdr *msg)
{
    int rc = ((msg->msg_flags & MSG_CTRUNC) != 0) ? RFM_ERR_PROTOCOL : RFM_OK;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c != NULL;
         c = CMSG_NXTHDR(msg, c)) {
        size_t n;

        if ((c->cmsg_level != SOL_SOCKET) || (c->cmsg_type != SCM_RIGHTS)) {
            continue;
        }
        n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            if (rx->n_fds < RFM_MAX_FRAME_FDS) {
                rx->fds[rx->n_fds++] = fd;
            } else {
                close(fd);      /* and the rest of them too */
                rc = RFM_ERR_PROTOCOL;
            }
        }
    }
    return rc;
}

/* at most `want` bytes more; the count, or a status */
static ssize_t receive(struct rfm_rx *rx, int fd, void *into, size_t want)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(RFM_MAX_FRAME_FDS * sizeof(int))];
    } control;
    struct iovec iov = { .iov_base = into, .iov_len = want };
    struct msghdr msg = {
        .msg_iov        = &iov,
        .msg_iovlen     = 1,
        .msg_control    = control.bytes,
        .msg_controllen = sizeof(control.bytes),
    };
    ssize_t got;

    do {
        got = recvmsg(fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while ((got < 0) && (errno == EINTR));
    if (got < 0) {
        return ((errno == EAGAIN) || (errno == EWOULDBLOCK)) ? RFM_ERR_AGAIN
                                                             : RFM_ERR_PEER;
    }
    if (got == 0) {
        return RFM_ERR_PEER;
    }
    if (take_fds(rx, &msg) < 0) {
        return RFM_ERR_PROTOCOL;
    }
    return got;
}

int rfm_rx_read(struct rfm_rx *rx, int fd)
{
    while (rx->head_got < sizeof(rx->head)) {
        ssize_t got = receive(rx, fd, (uint8_t *)&rx->head + rx->head_got,
                              sizeof(rx->head) - rx->head_got);

        if (got < 0) {
            return (int)got;
        }
        rx->head_got += (uint32_t)got;
        if ((rx->head_got == sizeof(rx->head)) &&
            ((rx->head.length > rx->max_body) ||
             (rx->head.n_fds > RFM_MAX_FRAME_FDS))) {
            return RFM_ERR_PROTOCOL;
        }
    }
    if (rx->body == NULL) {
        /* one byte more, so that a text in it can be ended */
        rx->body = malloc((size_t)rx->head.length + 1);
        if (rx->body == NULL) {
            return RFM_ERR_NO_MEMORY;
        }
        rx->body[rx->head.length] = 0;
    }
    while (rx->body_got < rx->head.length) {
        ssize_t got = receive(rx, fd, rx->body + rx->body_got,
                              rx->head.length - rx->body_got);

        if (got < 0) {
            return (int)got;
        }
        rx->body_got += (uint32_t)got;
    }
    return (rx->n_fds == rx->head.n_fds) ? RFM_OK : RFM_ERR_PROTOCOL;
}

void rfm_rx_next(struct rfm_rx *rx)
{
    rx->head_got = 0;
    rx->body_got = 0;
    rx->body     = NULL;
    rx->n_fds    = 0;
}

void rfm_rx_fini(struct rfm_rx *rx)
{
    for (uint32_t i = 0; i < rx->n_fds; i++) {
        close(rx->fds[i]);
    }
    free(rx->body);
    rfm_rx_next(rx);
}

/* Messages of a data connection (tcp) by hand: whatever they say. */
#ifndef STREAM_H
#define STREAM_H

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>

#include "crc32c.h"
#include "rfm_wire.h"

#define S_DESCS   4u
#define S_PAYLOAD 512u
#define S_DATA    1024u
#define S_BYTES   (sizeof(struct s_message) + 64u)

struct s_message {
    struct rfm_stream_head head;
    union {
        struct rfm_request_line request;
        struct rfm_reply_line reply;
    } line;
    struct rfm_desc descs[S_DESCS];
    /* what is sent, which need not be what the head says */
    uint32_t n_descs;
    uint32_t n_payload;
    uint32_t n_data;
    uint8_t  payload[S_PAYLOAD];
    uint8_t  data[S_DATA];
};

/* The head says what there is. */
static inline void s_count(struct s_message *m)
{
    m->head.n_regions     = m->n_descs;
    m->head.payload_bytes = m->n_payload;
    m->head.region_bytes  = 0;
    for (uint32_t i = 0; i < m->n_descs; i++) {
        m->head.region_bytes += m->descs[i].size;
    }
}

/* As bytes, with a crc if the head says so: how many. */
static inline uint32_t s_pack(const struct s_message *m, uint8_t *to)
{
    const struct {
        const void *at;
        uint32_t n;
    } pieces[] = {
        { &m->head, sizeof(m->head) },
        { &m->line, sizeof(m->line) },
        { m->descs, m->n_descs * (uint32_t)sizeof(m->descs[0]) },
        { m->payload, m->n_payload },
        { m->data, m->n_data },
    };
    uint32_t n = 0;

    for (size_t i = 0; i < sizeof(pieces) / sizeof(pieces[0]); i++) {
        memcpy(to + n, pieces[i].at, pieces[i].n);
        n += pieces[i].n;
    }
    if ((m->head.flags & RFM_STREAM_CRC) != 0) {
        uint32_t crc = rfm_crc32c(0, to, n);

        memcpy(to + n, &crc, sizeof(crc));
        n += (uint32_t)sizeof(crc);
    }
    return n;
}

/* All of it; false if the other side hung up. */
static inline bool s_send(int fd, const void *bytes, size_t n)
{
    const uint8_t *at = bytes;

    while (n > 0) {
        ssize_t sent = send(fd, at, n, MSG_NOSIGNAL);

        if ((sent < 0) && (errno == EINTR)) {
            continue;
        }
        if (sent <= 0) {
            return false;
        }
        at += sent;
        n  -= (size_t)sent;
    }
    return true;
}

static inline bool s_receive(int fd, void *bytes, size_t n)
{
    uint8_t *at = bytes;

    while (n > 0) {
        ssize_t got = recv(fd, at, n, 0);

        if ((got < 0) && (errno == EINTR)) {
            continue;
        }
        if (got <= 0) {
            return false;
        }
        at += got;
        n  -= (size_t)got;
    }
    return true;
}

/* One that an honest peer sent, and that fits; false if it hung up. */
static inline bool s_read(int fd, struct s_message *m)
{
    uint32_t crc;

    memset(m, 0, sizeof(*m));
    if (!s_receive(fd, &m->head, sizeof(m->head)) ||
        !s_receive(fd, &m->line, sizeof(m->line)) ||
        (m->head.n_regions > S_DESCS) || (m->head.payload_bytes > S_PAYLOAD) ||
        (m->head.region_bytes > S_DATA)) {
        return false;
    }
    m->n_descs   = m->head.n_regions;
    m->n_payload = (uint32_t)m->head.payload_bytes;
    m->n_data    = (uint32_t)m->head.region_bytes;
    return s_receive(fd, m->descs, m->n_descs * sizeof(m->descs[0])) &&
           s_receive(fd, m->payload, m->n_payload) &&
           s_receive(fd, m->data, m->n_data) &&
           (((m->head.flags & RFM_STREAM_CRC) == 0) ||
            s_receive(fd, &crc, sizeof(crc)));
}

#endif

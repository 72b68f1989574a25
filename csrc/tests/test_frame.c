/* Control frames: whole or not at all, and no descriptor is ever lost. */
#define _GNU_SOURCE
#include "harness.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "frame.h"

static int open_null(void)
{
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);

    CHECK(fd >= 0);
    return fd;
}

/* Whatever bytes, with descriptors if n > 0, in one message. */
static void put(int sock, const void *bytes, size_t n, const int *fds,
                uint32_t n_fds)
{
    char control[CMSG_SPACE(16 * sizeof(int))]
        __attribute__((aligned(__alignof__(struct cmsghdr))));
    struct iovec iov = { (void *)(uintptr_t)bytes, n };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

    if (n_fds > 0) {
        struct cmsghdr *cmsg;

        memset(control, 0, sizeof(control));
        msg.msg_control    = control;
        msg.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        cmsg               = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level   = SOL_SOCKET;
        cmsg->cmsg_type    = SCM_RIGHTS;
        cmsg->cmsg_len     = CMSG_LEN(n_fds * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, n_fds * sizeof(int));
    }
    CHECK_EQ(sendmsg(sock, &msg, MSG_NOSIGNAL), n);
}

static uint32_t make_frame(uint8_t *to, uint32_t length, uint16_t n_fds)
{
    struct rfm_frame head = {
        .length = length, .type = 7, .n_fds = n_fds, .cookie = 0x1122334455667788,
    };

    memcpy(to, &head, sizeof(head));
    for (uint32_t i = 0; i < length; i++) {
        to[sizeof(head) + i] = (uint8_t)(i * 7 + 1);
    }
    return (uint32_t)sizeof(head) + length;
}

static void check_frame(const struct rfm_rx *rx, uint32_t length, uint32_t n_fds)
{
    CHECK_EQ(rx->head.length, length);
    CHECK_EQ(rx->head.type, 7);
    CHECK_EQ(rx->head.cookie, 0x1122334455667788);
    CHECK_EQ(rx->n_fds, n_fds);
    for (uint32_t i = 0; i < length; i++) {
        CHECK_EQ(rx->body[i], (uint8_t)(i * 7 + 1));
    }
    CHECK_EQ(rx->body[length], 0);
}

static void a_frame_cut_at_any_byte_arrives_whole(void)
{
    uint8_t bytes[256];
    uint32_t n = make_frame(bytes, 37, 2);
    int fds[2] = { open_null(), open_null() };
    struct rfm_rx rx;
    int pair[2];

    t_socketpair(pair);
    rfm_rx_init(&rx, 1000);
    for (uint32_t cut = 1; cut < n; cut++) {
        put(pair[0], bytes, cut, fds, 2);
        CHECK_EQ(rfm_rx_read(&rx, pair[1]), RFM_ERR_AGAIN);
        put(pair[0], bytes + cut, n - cut, NULL, 0);
        CHECK_OK(rfm_rx_read(&rx, pair[1]));
        check_frame(&rx, 37, 2);
        rfm_rx_fini(&rx);
    }
    for (uint32_t i = 0; i < n; i++) {
        CHECK_EQ(rfm_rx_read(&rx, pair[1]), RFM_ERR_AGAIN);
        put(pair[0], bytes + i, 1, (i == 3) ? fds : NULL, (i == 3) ? 2 : 0);
    }
    CHECK_OK(rfm_rx_read(&rx, pair[1]));
    check_frame(&rx, 37, 2);
    rfm_rx_fini(&rx);
    for (int i = 0; i < 2; i++) {
        close(pair[i]);
        close(fds[i]);
    }
}

static void frames_in_one_piece_stay_apart_with_their_descriptors(void)
{
    struct iovec iov[3] = { { "ab", 2 }, { NULL, 0 }, { "cde", 3 } };
    int fds[4] = { open_null(), open_null(), open_null(), open_null() };
    struct rfm_rx rx;
    int pair[2];

    t_socketpair(pair);
    for (uint32_t n = 0; n <= 4; n++) {
        CHECK_OK(rfm_frame_send(pair[0], 9, n, iov, 3, fds, n));
        CHECK_OK(rfm_frame_send(pair[0], 10, n, NULL, 0, NULL, 0));
    }
    rfm_rx_init(&rx, 5);
    for (uint32_t n = 0; n <= 4; n++) {
        CHECK_OK(rfm_rx_read(&rx, pair[1]));
        CHECK_EQ(rx.head.type, 9);
        CHECK_EQ(rx.head.cookie, n);
        CHECK_EQ(rx.n_fds, n);
        CHECK_EQ(rx.head.length, 5);
        CHECK(memcmp(rx.body, "abcde", 6) == 0);
        for (uint32_t i = 0; i < n; i++) {
            CHECK_EQ(fcntl(rx.fds[i], F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
        }
        rfm_rx_fini(&rx);
        CHECK_OK(rfm_rx_read(&rx, pair[1]));
        CHECK_EQ(rx.head.type, 10);
        CHECK_EQ(rx.head.length, 0);
        CHECK_EQ(rx.n_fds, 0);
        rfm_rx_fini(&rx);
    }
    CHECK_EQ(rfm_rx_read(&rx, pair[1]), RFM_ERR_AGAIN);
    close(pair[0]);
    CHECK_EQ(rfm_rx_read(&rx, pair[1]), RFM_ERR_PEER);
    rfm_rx_fini(&rx);
    close(pair[1]);
    for (int i = 0; i < 4; i++) {
        close(fds[i]);
    }
}

/* What comes of these bytes and descriptors; nothing of it may stay open. */
static int fate(const void *bytes, size_t n, const int *fds, uint32_t n_fds)
{
    uint32_t before = t_open_fds();
    struct rfm_rx rx;
    int pair[2];
    int rc;

    t_socketpair(pair);
    put(pair[0], bytes, n, fds, n_fds);
    rfm_rx_init(&rx, 100);
    rc = rfm_rx_read(&rx, pair[1]);
    rfm_rx_fini(&rx);
    close(pair[0]);
    close(pair[1]);
    CHECK_EQ(t_open_fds(), before);
    return rc;
}

static void a_body_longer_than_allowed_is_refused_before_it_comes(void)
{
    uint8_t bytes[256];

    CHECK_OK(fate(bytes, make_frame(bytes, 100, 0), NULL, 0));
    CHECK_EQ(fate(bytes, make_frame(bytes, 101, 0), NULL, 0), RFM_ERR_PROTOCOL);
    (void)make_frame(bytes, 0, 0);
    memset(bytes, 0xff, 4);
    CHECK_EQ(fate(bytes, 16, NULL, 0), RFM_ERR_PROTOCOL);
    CHECK_EQ(fate(bytes, 15, NULL, 0), RFM_ERR_AGAIN);
}

static void too_many_descriptors_are_refused_and_none_stays_open(void)
{
    uint8_t bytes[256];
    int fds[16];

    for (int i = 0; i < 16; i++) {
        fds[i] = open_null();
    }
    for (uint16_t said = 0; said <= 6; said++) {
        for (uint32_t sent = 0; sent <= 16; sent++) {
            uint32_t n = make_frame(bytes, 8, said);

            CHECK_EQ(fate(bytes, n, fds, sent),
                     ((said == sent) && (said <= 4)) ? RFM_OK : RFM_ERR_PROTOCOL);
        }
    }
    for (int i = 0; i < 16; i++) {
        close(fds[i]);
    }
}

static void descriptors_that_come_in_pieces_are_counted_together(void)
{
    uint8_t bytes[64];
    uint32_t n = make_frame(bytes, 20, 4);
    int fds[4] = { open_null(), open_null(), open_null(), open_null() };

    for (uint32_t first = 0; first <= 4; first++) {
        for (uint32_t second = 0; second <= 4; second++) {
            uint32_t before = t_open_fds();
            struct rfm_rx rx;
            int pair[2];
            int rc;

            t_socketpair(pair);
            rfm_rx_init(&rx, 100);
            put(pair[0], bytes, 10, fds, first);
            (void)rfm_rx_read(&rx, pair[1]);
            put(pair[0], bytes + 10, n - 10, fds, second);
            rc = rfm_rx_read(&rx, pair[1]);
            CHECK_EQ(rc, (first + second == 4) ? RFM_OK : RFM_ERR_PROTOCOL);
            rfm_rx_fini(&rx);
            close(pair[0]);
            close(pair[1]);
            CHECK_EQ(t_open_fds(), before);
        }
    }
    for (int i = 0; i < 4; i++) {
        close(fds[i]);
    }
}

static void *read_large(void *arg)
{
    int fd = *(int *)arg;
    struct rfm_rx rx;
    int rc;

    rfm_rx_init(&rx, RFM_MAX_FRAME);
    do {
        rc = rfm_rx_read(&rx, fd);
    } while (rc == RFM_ERR_AGAIN);
    CHECK_OK(rc);
    CHECK(t_filled(rx.body, rx.head.length, 99));
    rfm_rx_fini(&rx);
    return NULL;
}

/* Sockets that somebody set a time-out on in Python are non-blocking. */
static void a_large_frame_arrives_through_a_full_socket_of_either_kind(void)
{
    uint64_t n = 3u << 20;
    uint8_t *bytes = malloc(n);

    CHECK(bytes != NULL);
    t_fill(bytes, n, 99);
    for (int non_blocking = 0; non_blocking < 2; non_blocking++) {
        struct iovec iov = { bytes, n };
        pthread_t reader;
        int pair[2];

        t_socketpair(pair);
        if (non_blocking) {
            CHECK(fcntl(pair[0], F_SETFL, O_NONBLOCK) == 0);
        }
        CHECK_EQ(pthread_create(&reader, NULL, read_large, &pair[1]), 0);
        CHECK_OK(rfm_frame_send(pair[0], 5, 0, &iov, 1, NULL, 0));
        pthread_join(reader, NULL);
        close(pair[0]);
        close(pair[1]);
    }
    free(bytes);
}

static void sending_to_nobody_and_too_much_are_errors(void)
{
    struct iovec iov = { "x", 1 };
    struct iovec huge = { "x", (size_t)RFM_MAX_FRAME + 1 };
    int fds[5] = { 0, 0, 0, 0, 0 };
    int pair[2];

    t_socketpair(pair);
    CHECK_EQ(rfm_frame_send(pair[0], 1, 0, &huge, 1, NULL, 0),
             RFM_ERR_TOO_LARGE);
    CHECK_EQ(rfm_frame_send(pair[0], 1, 0, &iov, 1, fds, 5), RFM_ERR_INVALID);
    close(pair[1]);
    CHECK_EQ(rfm_frame_send(pair[0], 1, 0, &iov, 1, NULL, 0), RFM_ERR_PEER);
    close(pair[0]);
}

/* The one test that takes its time: it waits for the give-up time itself. */
static void a_peer_that_reads_nothing_is_given_up(void)
{
    static uint8_t bytes[4u << 20];
    struct iovec iov = { bytes, sizeof(bytes) };
    int pair[2];

    t_socketpair(pair);
    CHECK_EQ(rfm_frame_send(pair[0], 1, 0, &iov, 1, NULL, 0), RFM_ERR_TIMEOUT);
    close(pair[0]);
    close(pair[1]);
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(a_frame_cut_at_any_byte_arrives_whole);
    RUN(frames_in_one_piece_stay_apart_with_their_descriptors);
    RUN(a_body_longer_than_allowed_is_refused_before_it_comes);
    RUN(too_many_descriptors_are_refused_and_none_stays_open);
    RUN(descriptors_that_come_in_pieces_are_counted_together);
    RUN(a_large_frame_arrives_through_a_full_socket_of_either_kind);
    RUN(sending_to_nobody_and_too_much_are_errors);
    RUN(a_peer_that_reads_nothing_is_given_up);
    return t_finish();
}

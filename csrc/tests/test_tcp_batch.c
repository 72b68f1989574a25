/* Small requests that are posted together travel together over tcp, and none of
 * them waits for another to come. */
#define _GNU_SOURCE
#include "harness.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frame.h"
#include "stream.h"

#define SLOTS 32u
#define CALLS 200u

static struct rfm_invoker *inv;
static struct rfm_channel *chan;
static int fd;                  /* the worker's ends */
static int data;
static int ours;                /* the rank's, of the data connection */
static struct t_call calls[CALLS];

static void say(uint16_t type, const void *body, uint64_t n)
{
    struct iovec iov = { (void *)(uintptr_t)body, n };

    CHECK_OK(rfm_frame_send(fd, type, 0, &iov, 1, NULL, 0));
}

static void up(void)
{
    struct {
        struct rfm_ctl_attached body;
        struct rfm_tcp_parcel parcel;
    } attached = { .body = { .pid = 1 } };
    struct rfm_attach_attr attr = {
        .transport  = RFM_TRANSPORT_TCP,
        .lease      = 1,
        .worker     = 1,
        .timeout_ns = T_FOREVER,
    };
    int control[2];
    int stream[2];

    inv = t_invoker(SLOTS, 256, 0);
    t_tcp_pair(control);
    t_tcp_pair(stream);
    attr.fd      = control[0];
    attr.data_fd = stream[0];
    fd           = control[1];
    data         = stream[1];
    ours         = stream[0];
    say(RFM_CTL_ATTACHED, &attached, sizeof(attached));
    chan = t_attach(inv, &attr);
    for (uint32_t i = 0; i < CALLS; i++) {
        t_call_inline(&calls[i], inv, "echo", 8, 8);
        memset(t_in(&calls[i], 0), (int)i, 8);
    }
}

static void down(void)
{
    for (uint32_t i = 0; i < CALLS; i++) {
        t_call_end(&calls[i]);
    }
    rfm_channel_close(chan);
    close(fd);
    close(data);
    t_invoker_end(inv);
}

/* with data, that have left the rank so far */
static uint32_t segments(void)
{
    struct tcp_info info = { 0 };
    socklen_t n = sizeof(info);

    CHECK(getsockopt(ours, IPPROTO_TCP, TCP_INFO, &info, &n) == 0);
    return info.tcpi_data_segs_out;
}

/* The next request, while the rank does nothing. */
static struct s_message take(void)
{
    struct s_message m;

    CHECK(s_read(data, &m));
    CHECK_EQ(m.head.type, RFM_STREAM_REQUEST);
    return m;
}

static void answer(const struct s_message *asked)
{
    uint8_t bytes[S_BYTES];
    struct s_message m = {
        .head = { .magic = RFM_STREAM_MAGIC, .type = RFM_STREAM_REPLY,
                  .slot = asked->head.slot },
        .line.reply = { .id = asked->line.request.id, .out_bytes = 8,
                        .exec_ns = 100 },
    };

    memcpy(m.line.reply.payload, asked->line.request.payload, 8);
    CHECK(s_send(data, bytes, s_pack(&m, bytes)));
}

static uint32_t in_flight(void)
{
    struct rfm_channel_info info;

    rfm_channel_info(chan, &info);
    return (uint32_t)info.in_flight;
}

static uint32_t ended(void)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < CALLS; i++) {
        n += rfm_request_ended(&calls[i].req);
    }
    return n;
}

static void what_waited_for_room_travels_together_and_arrives_whole(void)
{
    uint32_t most = 0;
    uint32_t done = 0;

    up();
    for (uint32_t i = 0; i < CALLS; i++) {
        t_start(&calls[i]);
    }
    while (done < CALLS) {
        struct s_message asked[SLOTS];
        uint32_t n;

        /* the service thread sends what waits, too */
        do {
            n = in_flight();
        } while (n == 0);
        if (n > most) {
            most = n;
        }
        /* what was posted comes, though nothing follows it */
        for (uint32_t i = 0; i < n; i++) {
            asked[i] = take();
        }
        for (uint32_t i = 0; i < n; i++) {
            answer(&asked[i]);
        }
        done += n;
        while (ended() < done) {
            (void)rfm_invoker_progress(inv);
        }
    }
    CHECK(most > SLOTS / 2);
    /* half of the slots at a time, or all of them; the first two went alone */
    CHECK(segments() <= CALLS / 4);
    for (uint32_t i = 0; i < CALLS; i++) {
        CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
        CHECK(memcmp(t_in(&calls[i], 0), t_out(&calls[i], 0), 8) == 0);
    }
    down();
}

static void what_finds_room_goes_at_once(void)
{
    struct s_message asked;

    up();
    for (uint32_t i = 0; i < CALLS; i++) {
        uint32_t before = segments();

        t_start(&calls[i]);
        CHECK_EQ(segments() - before, 1);
        asked = take();
        answer(&asked);
        CHECK_EQ(t_wait(&calls[i]), RFM_DONE);
    }
    down();
}

int main(int argc, char **argv)
{
    t_init(argc, argv, 60);
    RUN(what_waited_for_room_travels_together_and_arrives_whole);
    RUN(what_finds_room_goes_at_once);
    return t_finish();
}

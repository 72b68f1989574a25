/* Bare processes that talk through a socket, to compare the product with. */
#define _GNU_SOURCE
#include "rfm_bench_net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "poller.h"
#include "rfm_bench.h"

#define NET_API __attribute__((visibility("default")))
#define PAGE    4096u

/* Looks between two checks that the partner still lives. */
#define LOOKS_PER_CHECK (1u << 16)

/* what both processes map; the partner reads its orders here */
struct shared {
    uint32_t orders;            /* futex: blocks ordered so far */
    uint32_t ready;             /* futex: the partner serves    */
    struct rfm_net_order order;
};

/* one direction of the connection, on one side */
struct way {
    int      fd;
    uint64_t done;              /* bytes of the message that is on its way */
    uint64_t n_data;
    uint8_t *base;
    uint8_t *data;              /* of the message: in one of the places at base */
    uint64_t n_head;
    uint8_t  head[RFM_NET_HEAD + RFM_NET_DESC];
};

struct rfm_net {
    struct shared *shared;
    uint8_t       *area;        /* of the caller: what goes up, what comes down */
    uint64_t       data_bytes;
    uint64_t       seq;
    uint64_t       armed;
    struct way     up;
    struct way     down;
    pid_t          pid;
};

static void futex_wait(uint32_t *word, uint32_t seen)
{
    (void)syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

static void futex_wake(uint32_t *word)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* --- one message ----------------------------------------------------------- */

static uint64_t head_bytes(uint64_t data)
{
    return RFM_NET_HEAD + ((data > 0) ? RFM_NET_DESC : 0);
}

static uint32_t rest_of(struct way *way, struct iovec iov[2])
{
    uint32_t n = 0;

    if (way->done < way->n_head) {
        iov[n++] = (struct iovec){ way->head + way->done,
                                   way->n_head - way->done };
        if (way->n_data > 0) {
            iov[n++] = (struct iovec){ way->data, way->n_data };
        }
    } else {
        uint64_t at = way->done - way->n_head;

        iov[n++] = (struct iovec){ way->data + at, way->n_data - at };
    }
    return n;
}

/* 1: the message is complete; 0: not yet; -1: the connection has ended */
static int move(struct way *way, bool out, bool sleep)
{
    int flags = MSG_NOSIGNAL | (sleep ? 0 : MSG_DONTWAIT);
    struct iovec iov[2];
    uint32_t n = rest_of(way, iov);
    ssize_t moved;

    if (n == 1) {
        moved = out ? send(way->fd, iov[0].iov_base, iov[0].iov_len, flags)
                    : recv(way->fd, iov[0].iov_base, iov[0].iov_len, flags);
    } else {
        struct msghdr msg = { .msg_iov = iov, .msg_iovlen = n };

        moved = out ? sendmsg(way->fd, &msg, flags)
                    : recvmsg(way->fd, &msg, flags);
    }
    if (moved <= 0) {
        return ((moved < 0) && ((errno == EAGAIN) || (errno == EINTR))) ? 0 : -1;
    }
    way->done += (uint64_t)moved;
    if (way->done < way->n_head + way->n_data) {
        return 0;
    }
    way->done = 0;
    return 1;
}

/* --- the partner ----------------------------------------------------------- */

static void serve(struct shared *shared, struct way *in, struct way *out)
{
    struct rfm_net_order order = shared->order;
    uint64_t n = order.count * order.burst;

    in->n_head  = head_bytes(order.up);
    in->n_data  = order.up;
    out->n_head = head_bytes(order.down);
    out->n_data = order.down;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t place = (i % order.burst) % order.places;
        int rc;

        in->data  = in->base + place * order.up;
        out->data = out->base + place * order.down;
        do {
            rc = move(in, false, order.sleep != 0);
        } while (rc == 0);
        if (rc < 0) {
            _exit(0);
        }
        memcpy(out->head, in->head, sizeof(uint64_t));
        do {
            rc = move(out, true, order.sleep != 0);
        } while (rc == 0);
        if (rc < 0) {
            _exit(0);
        }
    }
}

static _Noreturn void partner_main(struct shared *shared, int fd,
                                   uint64_t data_bytes, pid_t parent)
{
    struct way in  = { .fd = 3 };
    struct way out = { .fd = 3 };
    uint64_t orders = 0;
    int null_fd;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
        _exit(0);
    }
    /* the partner must not hold the caller's pipes open */
    dup2(fd, 3);
    null_fd = open("/dev/null", O_RDWR);
    for (int i = 0; (null_fd >= 0) && (i < 3); i++) {
        dup2(null_fd, i);
    }
    /* Ctrl-C is the caller's to handle: it closes the net. */
    signal(SIGINT, SIG_IGN);
    syscall(SYS_close_range, 4u, ~0u, 0u);
    prctl(PR_SET_NAME, "rfaas-bench");
    /* as a worker's mirror: nobody else's, paged in by its first use */
    if (data_bytes > 0) {
        in.base  = mmap(NULL, 2 * data_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        out.base = in.base + data_bytes;
        if (in.base == MAP_FAILED) {
            _exit(1);           /* the caller sees that it has ended */
        }
        memset(in.base, 0, 2 * data_bytes);
    }
    for (;;) {
        while (rfm_load_acquire(&shared->orders) == (uint32_t)orders) {
            futex_wait(&shared->orders, (uint32_t)orders);
        }
        orders++;
        rfm_store_release(&shared->ready, (uint32_t)orders);
        futex_wake(&shared->ready);
        serve(shared, &in, &out);
    }
}

/* --- the caller ------------------------------------------------------------- */

static bool partner_lives(const struct rfm_net *net)
{
    siginfo_t info = { .si_pid = 0 };

    return (waitid(P_PID, (id_t)net->pid, &info,
                   WEXITED | WNOHANG | WNOWAIT) == 0) && (info.si_pid == 0);
}

/* both ends of one TCP connection through the loopback device */
static int connect_both(int fds[2])
{
    struct sockaddr_in at = { .sin_family = AF_INET };
    socklen_t len = sizeof(at);
    int one = 1;
    int code;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    fds[0] = fds[1] = -1;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (listener < 0) {
        return -1;
    }
    fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if ((fds[0] < 0) || (bind(listener, (struct sockaddr *)&at, len) != 0) ||
        (listen(listener, 1) != 0) ||
        (getsockname(listener, (struct sockaddr *)&at, &len) != 0) ||
        (connect(fds[0], (struct sockaddr *)&at, len) != 0)) {
        goto err;
    }
    fds[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fds[1] < 0) {
        goto err;
    }
    for (int i = 0; i < 2; i++) {
        if (setsockopt(fds[i], IPPROTO_TCP, TCP_NODELAY, &one,
                       sizeof(one)) != 0) {
            goto err;
        }
    }
    close(listener);
    return 0;

err:
    code = errno;
    close(listener);
    for (int i = 0; i < 2; i++) {
        if (fds[i] >= 0) {
            close(fds[i]);
        }
    }
    errno = code;
    return -1;
}

/* Memory as an executor's arena: a memfd with all its pages. */
static uint8_t *make_area(uint64_t bytes)
{
    int fd = memfd_create("rfaas-bench-net", MFD_CLOEXEC);
    void *area = MAP_FAILED;

    if ((fd >= 0) && (ftruncate(fd, (off_t)bytes) == 0)) {
        area = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_POPULATE, fd, 0);
    }
    if (fd >= 0) {
        close(fd);
    }
    return (area == MAP_FAILED) ? NULL : area;
}

NET_API int rfm_net_open(uint64_t data_bytes, int cpu, struct rfm_net **net_p)
{
    uint64_t room = (data_bytes + PAGE - 1) & ~(uint64_t)(PAGE - 1);
    pid_t parent = getpid();
    struct rfm_net *net;
    cpu_set_t cpus;
    int fds[2];

    if ((net_p == NULL) || (data_bytes > (UINT64_C(1) << 40)) ||
        (cpu >= CPU_SETSIZE)) {
        return RFM_BENCH_INVALID;
    }
    net = calloc(1, sizeof(*net));
    if (net == NULL) {
        return RFM_BENCH_SYSTEM;
    }
    net->data_bytes = room;
    net->shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (net->shared == MAP_FAILED) {
        goto err_free;
    }
    if (connect_both(fds) != 0) {
        goto err_unmap;
    }
    net->pid = fork();
    if (net->pid < 0) {
        goto err_close;
    }
    if (net->pid == 0) {
        close(fds[0]);
        partner_main(net->shared, fds[1], room, parent);
    }
    net->up.fd = net->down.fd = fds[0];
    if (room > 0) {
        net->area = make_area(2 * room);
        if (net->area == NULL) {
            goto err_kill;
        }
        net->up.base   = net->area;
        net->down.base = net->area + room;
    }
    if (cpu >= 0) {
        CPU_ZERO(&cpus);
        CPU_SET(cpu, &cpus);
        if (sched_setaffinity(net->pid, sizeof(cpus), &cpus) != 0) {
            goto err_kill;
        }
    }
    close(fds[1]);
    *net_p = net;
    return RFM_BENCH_OK;

err_kill:
    kill(net->pid, SIGKILL);
    waitpid(net->pid, NULL, 0);
    if (net->area != NULL) {
        munmap(net->area, 2 * room);
    }
err_close:
    close(fds[0]);
    close(fds[1]);
err_unmap:
    munmap(net->shared, PAGE);
err_free:
    free(net);
    return RFM_BENCH_SYSTEM;
}

NET_API void rfm_net_close(struct rfm_net *net)
{
    if (net == NULL) {
        return;
    }
    kill(net->pid, SIGKILL);
    while ((waitpid(net->pid, NULL, 0) < 0) && (errno == EINTR)) {
    }
    close(net->up.fd);
    if (net->area != NULL) {
        munmap(net->area, 2 * net->data_bytes);
    }
    munmap(net->shared, PAGE);
    free(net);
}

NET_API int rfm_net_pid(const struct rfm_net *net)
{
    return net->pid;
}

NET_API int rfm_net_arm(struct rfm_net *net, const struct rfm_net_order *order)
{
    struct shared *shared = net->shared;
    uint32_t looks = 0;
    uint32_t orders;

    if ((order->burst == 0) || (order->burst > RFM_NET_BURST) ||
        (order->places == 0) ||
        (order->up > net->data_bytes / order->places) ||
        (order->down > net->data_bytes / order->places) ||
        (net->armed != 0)) {
        return RFM_BENCH_INVALID;
    }
    shared->order = *order;
    orders        = shared->orders + 1;
    rfm_store_release(&shared->orders, orders);
    futex_wake(&shared->orders);
    /* its wake-up is not part of what is measured */
    while (rfm_load_acquire(&shared->ready) != orders) {
        rfm_spin_pause();
        if ((++looks % LOOKS_PER_CHECK == 0) && !partner_lives(net)) {
            return RFM_BENCH_LOST;
        }
    }
    net->up.n_head   = head_bytes(order->up);
    net->up.n_data   = order->up;
    net->down.n_head = head_bytes(order->down);
    net->down.n_data = order->down;
    net->armed       = order->count;
    return RFM_BENCH_OK;
}

static int call(struct rfm_net *net, const struct rfm_net_order *order)
{
    uint32_t burst  = order->burst;
    uint32_t places = order->places;
    bool sleep      = order->sleep != 0;
    uint32_t sent = 0;
    uint32_t got  = 0;
    uint64_t seq;

    net->seq++;
    memcpy(net->up.head, &net->seq, sizeof(net->seq));
    while (got < burst) {
        int rc;

        if (sent < burst) {
            net->up.data = net->up.base + (sent % places) * net->up.n_data;
            rc = move(&net->up, true, false);
            if (rc < 0) {
                return RFM_BENCH_LOST;
            }
            sent += (uint32_t)rc;
        }
        net->down.data = net->down.base + (got % places) * net->down.n_data;
        /* asleep only when there is nothing to send any more */
        rc = move(&net->down, false, sleep && (sent == burst));
        if (rc < 0) {
            return RFM_BENCH_LOST;
        }
        got += (uint32_t)rc;
    }
    memcpy(&seq, net->down.head, sizeof(seq));
    return (seq == net->seq) ? RFM_BENCH_OK : RFM_BENCH_WRONG;
}

NET_API int64_t rfm_net_calls(struct rfm_net *net, uint64_t count,
                              int64_t *samples)
{
    struct rfm_net_order order = net->shared->order;
    uint64_t begin = rfm_now_ns();
    int64_t total  = 0;

    if (count > net->armed) {
        return RFM_BENCH_INVALID;
    }
    net->armed -= count;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t start = (samples != NULL) ? rfm_now_ns() : 0;
        int rc = call(net, &order);

        if (rc != RFM_BENCH_OK) {
            return rc;
        }
        if (samples != NULL) {
            samples[i] = (int64_t)(rfm_now_ns() - start);
            total     += samples[i];
        }
    }
    return (samples != NULL) ? total : (int64_t)(rfm_now_ns() - begin);
}

/* --- kernels ------------------------------------------------------------------ */

NET_API int32_t rfm_net_swallow(const struct rfm_call *call)
{
    if ((call->n_in != 1) || (call->n_out != 1) ||
        (call->outputs[0].capacity < sizeof(uint64_t)) ||
        (call->inputs[0].size < sizeof(uint64_t))) {
        return -1;
    }
    memcpy(call->outputs[0].ptr, call->inputs[0].ptr, sizeof(uint64_t));
    call->outputs[0].size = sizeof(uint64_t);
    return 0;
}

NET_API int32_t rfm_net_yield(const struct rfm_call *call)
{
    if ((call->n_in != 1) || (call->n_out != 1) ||
        (call->outputs[0].capacity < sizeof(uint64_t)) ||
        (call->inputs[0].size < sizeof(uint64_t))) {
        return -1;
    }
    memcpy(call->outputs[0].ptr, call->inputs[0].ptr, sizeof(uint64_t));
    call->outputs[0].size = call->outputs[0].capacity;
    return 0;
}

/* See fuzz.h and alone.h. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "crc32c.h"
#include "rfm_wire.h"

/* here they are what they are called */
#undef epoll_wait
#undef poll
#undef syscall

#define MAX_THREADS 4u
#define SLEEP_NS    20000000ull     /* so long is every sleep at least */

static struct thread {
    void *(*main)(void *);      /* NULL: a free place */
    void *arg;
} threads[MAX_THREADS];
static bool turning;            /* a thread's turn is it */
static jmp_buf asleep;
static uint64_t now_ns = 1000000000ull;

/* --- threads and time ----------------------------------------------------- */

int fuzz_thread(pthread_t *id, const pthread_attr_t *attr,
                void *(*main)(void *), void *arg)
{
    (void)attr;
    for (uint32_t i = 0; i < MAX_THREADS; i++) {
        if (threads[i].main == NULL) {
            threads[i] = (struct thread){ main, arg };
            *id        = (pthread_t)(i + 1);
            return 0;
        }
    }
    return EAGAIN;
}

static void run(struct thread *thread)
{
    turning = true;
    if (setjmp(asleep) == 0) {
        (void)thread->main(thread->arg);
    }
    turning = false;
}

int fuzz_join(pthread_t id, void **result)
{
    struct thread *thread = &threads[(uintptr_t)id - 1];

    FUZZ_CHECK(!turning);
    run(thread);
    thread->main = NULL;
    if (result != NULL) {
        *result = NULL;
    }
    return 0;
}

void fuzz_turn(void)
{
    for (uint32_t i = 0; i < MAX_THREADS; i++) {
        if (threads[i].main != NULL) {
            run(&threads[i]);
        }
    }
}

int fuzz_epoll(int fd, struct epoll_event *events, int n, int timeout_ms)
{
    int rc = epoll_wait(fd, events, n, 0);

    if ((rc != 0) || (timeout_ms == 0)) {
        return rc;
    }
    /* only threads of their own sleep there, at the top of their loop */
    FUZZ_CHECK(turning);
    longjmp(asleep, 1);
}

int fuzz_poll(struct pollfd *p, nfds_t n, int timeout_ms)
{
    int rc = poll(p, n, 0);

    if ((rc == 0) && (timeout_ms != 0)) {
        FUZZ_CHECK(timeout_ms > 0);     /* nobody would ever wake us */
        fuzz_pass_ms((uint64_t)timeout_ms);
        if (!turning) {
            fuzz_turn();
        }
        rc = poll(p, n, 0);
    }
    return rc;
}

int fuzz_sleep(const struct timespec *ts, struct timespec *left)
{
    (void)ts;
    (void)left;
    now_ns += SLEEP_NS;
    if (!turning) {
        fuzz_turn();
    }
    return 0;
}

int fuzz_clock(clockid_t id, struct timespec *ts)
{
    (void)id;
    now_ns     += 10000;
    ts->tv_sec  = (time_t)(now_ns / 1000000000ull);
    ts->tv_nsec = (long)(now_ns % 1000000000ull);
    return 0;
}

void fuzz_pass_ms(uint64_t ms)
{
    now_ns += ms * 1000000ull;
}

/* --- processes ------------------------------------------------------------ */

int fuzz_victim(void)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);

    FUZZ_CHECK(fd >= 0);
    return fd;
}

/* What else can be written to, a worker may not send as its process. */
static long kill_victim(int fd, int signal)
{
    char path[32];
    char what[64] = "";
    uint64_t one = 1;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    if ((readlink(path, what, sizeof(what) - 1) < 0) ||
        (strcmp(what, "anon_inode:[eventfd]") != 0)) {
        errno = EBADF;
        return -1;
    }
    if ((signal != 0) && (write(fd, &one, sizeof(one)) < 0)) {
        return -1;
    }
    return 0;
}

long fuzz_syscall(long number, ...)
{
    va_list args;
    long rc = 0;

    va_start(args, number);
    if (number == SYS_pidfd_send_signal) {
        int fd = va_arg(args, int);

        rc = kill_victim(fd, va_arg(args, int));
    } else if (number == SYS_pidfd_open) {
        rc = fuzz_victim();
    } else {
        FUZZ_CHECK(number == SYS_futex);    /* nobody sleeps there */
    }
    va_end(args);
    return rc;
}

/* --- sockets -------------------------------------------------------------- */

void fuzz_check_fds(int lowest)
{
    int fd = fuzz_lowest_fd();

    if (fd != lowest) {
        fprintf(stderr, "the lowest free descriptor was %d, is %d\n", lowest,
                fd);
        (void)!system("ls -l /proc/$PPID/fd >&2");
        abort();
    }
}

int fuzz_lowest_fd(void)
{
    int fd = dup(2);

    FUZZ_CHECK(fd >= 0);
    close(fd);
    return fd;
}

void fuzz_send(int fd, const void *bytes, size_t n)
{
    (void)!send(fd, bytes, n, MSG_NOSIGNAL | MSG_DONTWAIT);
}

void fuzz_send_frame(int fd, uint16_t type, const void *body, uint16_t n,
                     const int *fds, uint32_t n_fds)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(8 * sizeof(int))];
    } control;
    struct rfm_frame head = {
        .length = n, .type = type, .n_fds = (uint16_t)n_fds, .cookie = n,
    };
    struct iovec iov[2] = {
        { &head, sizeof(head) }, { (void *)(uintptr_t)body, n },
    };
    struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };

    FUZZ_CHECK(n_fds <= 8);
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
    (void)!sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
}

void fuzz_discard(int fd)
{
    static char bytes[1u << 16];
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(8 * sizeof(int))];
    } control;

    for (;;) {
        struct iovec iov = { bytes, sizeof(bytes) };
        struct msghdr msg = {
            .msg_iov        = &iov,
            .msg_iovlen     = 1,
            .msg_control    = control.bytes,
            .msg_controllen = sizeof(control.bytes),
        };

        if (recvmsg(fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0) {
            return;
        }
        for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c != NULL;
             c = CMSG_NXTHDR(&msg, c)) {
            size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

            for (size_t i = 0; i < n; i++) {
                int got;

                memcpy(&got, CMSG_DATA(c) + i * sizeof(int), sizeof(got));
                close(got);
            }
        }
    }
}

uint32_t fuzz_message(const struct fuzz_act *act, const uint8_t *bytes,
                      uint8_t to[FUZZ_MESSAGE])
{
    struct rfm_stream_head head = { 0 };
    uint32_t n = (act->n < FUZZ_MESSAGE / 2) ? act->n : FUZZ_MESSAGE / 2;
    uint64_t sum = sizeof(head) + RFM_CACHE_LINE;

    memset(to, 0, FUZZ_MESSAGE);
    if (n > 0) {
        memcpy(to, bytes, n);
    }
    memcpy(&head, to, sizeof(head));
    if (((act->a & FUZZ_FIT) != 0) && (head.n_regions <= 8) &&
        (head.payload_bytes <= 2048)) {
        uint64_t data = 0;

        for (uint32_t i = 0; i < head.n_regions; i++) {
            struct rfm_desc desc;

            memcpy(&desc, to + sum, sizeof(desc));
            sum  += sizeof(desc);
            data += (desc.size <= 512) ? desc.size : 0;
        }
        head.region_bytes = data;
        memcpy(to, &head, sizeof(head));
        n = (uint32_t)(sum + head.payload_bytes + data);
    }
    if ((act->a & FUZZ_CRC) != 0) {
        uint32_t crc = rfm_crc32c(0, to, n);

        memcpy(to + n, &crc, sizeof(crc));
        n += (uint32_t)sizeof(crc);
    }
    return n;
}

uint8_t fuzz_read(const void *at, uint64_t n)
{
    const volatile uint8_t *from = at;
    uint8_t sum = 0;

    for (uint64_t i = 0; i < n; i++) {
        sum = (uint8_t)(sum + from[i]);
    }
    return sum;
}

/* --- what has to be reached ----------------------------------------------- */

static struct fuzz_goal *all_goals;
static size_t n_goals;

static void look_at_goals(void)
{
    bool missing = false;

    for (size_t i = 0; i < n_goals; i++) {
        fprintf(stderr, "reached: %s %llu\n", all_goals[i].name,
                (unsigned long long)all_goals[i].times);
        missing = missing || (all_goals[i].times == 0);
    }
    if (missing) {
        fprintf(stderr, "FAILED: some of this was never reached\n");
        _exit(1);
    }
}

void fuzz_goals(struct fuzz_goal *goals, size_t n)
{
    all_goals = goals;
    n_goals   = n;
    if (getenv("FUZZ_REACH") != NULL) {
        (void)atexit(look_at_goals);
    }
}

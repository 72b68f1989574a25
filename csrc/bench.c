/* Bare ping-pongs between two processes, to compare the product with. */
#define _GNU_SOURCE

#include "pages.h"
#include "poller.h"
#include "rfm_bench.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BENCH_API __attribute__((visibility("default")))

/* The line's size is what makes a mailbox cost one cache miss, not two. */
#define LINE RFM_CACHE_LINE

/* Memory for the data is made and laid out as an executor's: see arena.c. */
#define PAGE    RFM_PAGE_SIZE
#define SEALS   (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* Looks between two checks that the partner still lives; about 10 ms. */
#define LOOKS_PER_CHECK (1u << 18)

struct mailbox {
    _Alignas(LINE) _Atomic uint64_t seq;
    uint64_t data;
    uint8_t  pad[LINE - 16];
};

_Static_assert(sizeof(struct mailbox) == LINE, "a mailbox is one line");

/* What both processes map. Each word that is polled has a line of its own. */
struct shared {
    struct mailbox to;
    struct mailbox from;
    _Alignas(LINE) _Atomic uint32_t orders;  /* futex: blocks ordered so far */
    _Atomic uint32_t mode;
    _Atomic uint64_t count;
    _Atomic uint64_t bytes;
    _Alignas(LINE) _Atomic uint32_t bell;    /* futex: rung once per call    */
    _Alignas(LINE) _Atomic uint32_t ready;   /* futex: partner serves hot    */
};

_Static_assert(sizeof(struct shared) <= PAGE, "the mailboxes fill a page");

struct rfm_bench {
    struct shared *shared;
    uint8_t       *data;        /* x, and y behind it; NULL without */
    uint64_t       data_bytes;  /* of each, at most                  */
    uint64_t       seq;
    uint64_t       armed;       /* calls that the partner still expects */
    uint64_t       bytes;       /* of x in those                        */
    int            mode;
    pid_t          pid;
};

/* The product's own pause and clock: the loops differ in nothing else. */
static inline int64_t now_ns(void)
{
    return (int64_t)rfm_now_ns();
}

/* Not FUTEX_PRIVATE: the word is shared between processes, as the product's. */
static long futex_wait(_Atomic uint32_t *word, uint32_t seen)
{
    return syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

static long futex_wake(_Atomic uint32_t *word)
{
    return syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Not inlined: rank, bare partner and worker then run the same machine code. */
static __attribute__((noinline)) void
double_values(const double *restrict x, double *restrict y, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        y[i] = 2.0 * x[i];
    }
}

/* ---- memory ------------------------------------------------------------ */

/* Where y begins: as two arrays lie in an arena, a redzone between them. */
static uint64_t y_offset(uint64_t bytes)
{
    return ((bytes + LINE - 1) & ~(uint64_t)(LINE - 1)) + RFM_REDZONE;
}

static uint64_t data_total(uint64_t data_bytes)
{
    return (y_offset(data_bytes) + data_bytes + PAGE - 1) &
           ~(uint64_t)(PAGE - 1);
}

/* A memfd with all its pages; -1 where there is none, errno says why. */
static int data_create(uint64_t total)
{
    int fd = memfd_create("rfaas-bench", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int code;

    if (fd < 0) {
        return -1;
    }
    if ((ftruncate(fd, (off_t)total) == 0) &&
        (fallocate(fd, 0, 0, (off_t)total) == 0) &&
        (fcntl(fd, F_ADD_SEALS, SEALS) == 0)) {
        rfm_pages_collapse(fd, total);
        return fd;
    }
    code = errno;
    close(fd);
    errno = code;
    return -1;
}

/* Each side maps it itself: fork() would leave the partner's pages to fault. */
static uint8_t *data_map(int fd, uint64_t total)
{
    uint8_t *data = rfm_pages_reserve(total);

    if ((data != NULL) &&
        (mmap(data, total, PROT_READ | PROT_WRITE,
              MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd, 0) == MAP_FAILED)) {
        rfm_pages_release(data, total);
        data = NULL;
    }
    return data;
}

/* ---- the partner ------------------------------------------------------- */

static void serve_call(struct shared *shared, uint8_t *data_area,
                       uint64_t seq, uint32_t mode, uint64_t bytes)
{
    uint64_t data;

    while (atomic_load_explicit(&shared->to.seq, memory_order_acquire) != seq) {
        rfm_spin_pause();
    }

    data = shared->to.data;
    if (mode == RFM_BENCH_DOUBLE) {
        double_values((const double *)data_area,
                      (double *)(data_area + y_offset(bytes)),
                      bytes / sizeof(double));
    }
    shared->from.data = data;
    atomic_store_explicit(&shared->from.seq, seq, memory_order_release);
}

/* Sleeps until the bell differs from what was last seen; returns what it is. */
static uint32_t sleep_on(_Atomic uint32_t *bell, uint32_t seen)
{
    uint32_t value;

    while ((value = atomic_load_explicit(bell, memory_order_acquire)) == seen) {
        futex_wait(bell, seen);
    }
    return value;
}

static _Noreturn void partner_main(struct shared *shared, int data_fd,
                                   uint64_t total, pid_t parent)
{
    uint8_t *data_area = NULL;
    uint64_t seq    = 0;
    uint32_t orders = 0;
    uint32_t rung   = 0;
    int      null_fd;

    /* The partner must not outlive the caller, nor hold its pipes open. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
        _exit(0);
    }
    if (data_fd >= 0) {
        data_area = data_map(data_fd, total);
        if (data_area == NULL) {
            _exit(1);           /* the caller sees that it has ended */
        }
    }
    null_fd = open("/dev/null", O_RDWR);
    if (null_fd >= 0) {
        dup2(null_fd, 0);
        dup2(null_fd, 1);
        dup2(null_fd, 2);
    }
    syscall(SYS_close_range, 3u, ~0u, 0u);
    prctl(PR_SET_NAME, "rfaas-bench");
    /* Ctrl-C is the caller's to handle: it closes the bench. */
    signal(SIGINT, SIG_IGN);

    for (;;) {
        uint64_t count;
        uint64_t bytes;
        uint32_t mode;

        orders = sleep_on(&shared->orders, orders);
        mode   = atomic_load_explicit(&shared->mode, memory_order_relaxed);
        count  = atomic_load_explicit(&shared->count, memory_order_relaxed);
        bytes  = atomic_load_explicit(&shared->bytes, memory_order_relaxed);

        atomic_store_explicit(&shared->ready, orders, memory_order_release);
        futex_wake(&shared->ready);

        for (uint64_t i = 0; i < count; i++) {
            seq++;
            if (mode == RFM_BENCH_FUTEX) {
                rung = sleep_on(&shared->bell, rung);
            }
            serve_call(shared, data_area, seq, mode, bytes);
        }
    }
}

/* ---- the caller -------------------------------------------------------- */

static bool partner_lives(const struct rfm_bench *bench)
{
    siginfo_t info = { .si_pid = 0 };

    if (waitid(P_PID, (id_t)bench->pid, &info,
               WEXITED | WNOHANG | WNOWAIT) != 0) {
        return false;
    }
    return info.si_pid == 0;
}

BENCH_API int rfm_bench_open(uint64_t data_bytes, int cpu,
                             struct rfm_bench **bench_p)
{
    struct rfm_bench *bench;
    cpu_set_t         cpus;
    uint64_t          total   = 0;
    int               data_fd = -1;
    pid_t             parent  = getpid();

    if ((bench_p == NULL) || (data_bytes > (UINT64_C(1) << 40)) ||
        (cpu >= CPU_SETSIZE)) {
        return RFM_BENCH_INVALID;
    }

    bench = calloc(1, sizeof(*bench));
    if (bench == NULL) {
        return RFM_BENCH_SYSTEM;
    }

    bench->data_bytes = data_bytes;
    bench->shared     = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
                             MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (bench->shared == MAP_FAILED) {
        goto err_free;
    }
    if (data_bytes > 0) {
        total   = data_total(data_bytes);
        data_fd = data_create(total);
        if (data_fd < 0) {
            goto err_unmap;
        }
        bench->data = data_map(data_fd, total);
        if (bench->data == NULL) {
            goto err_close;
        }
    }

    bench->pid = fork();
    if (bench->pid < 0) {
        goto err_unmap_data;
    }
    if (bench->pid == 0) {
        partner_main(bench->shared, data_fd, total, parent);
    }

    if (cpu >= 0) {
        CPU_ZERO(&cpus);
        CPU_SET(cpu, &cpus);
        if (sched_setaffinity(bench->pid, sizeof(cpus), &cpus) != 0) {
            goto err_kill;
        }
    }

    if (data_fd >= 0) {
        close(data_fd);         /* both sides map it */
    }
    *bench_p = bench;
    return RFM_BENCH_OK;

err_kill:
    kill(bench->pid, SIGKILL);
    waitpid(bench->pid, NULL, 0);
err_unmap_data:
    rfm_pages_release(bench->data, total);
err_close:
    if (data_fd >= 0) {
        close(data_fd);
    }
err_unmap:
    munmap(bench->shared, PAGE);
err_free:
    free(bench);
    return RFM_BENCH_SYSTEM;
}

BENCH_API void rfm_bench_close(struct rfm_bench *bench)
{
    if (bench == NULL) {
        return;
    }
    kill(bench->pid, SIGKILL);
    while ((waitpid(bench->pid, NULL, 0) < 0) && (errno == EINTR)) {
    }
    rfm_pages_release(bench->data, data_total(bench->data_bytes));
    munmap(bench->shared, PAGE);
    free(bench);
}

BENCH_API int rfm_bench_pid(const struct rfm_bench *bench)
{
    return bench->pid;
}

BENCH_API void *rfm_bench_x(const struct rfm_bench *bench)
{
    return bench->data;
}

BENCH_API void *rfm_bench_y(const struct rfm_bench *bench, uint64_t bytes)
{
    if ((bench->data == NULL) || (bytes > bench->data_bytes)) {
        return NULL;
    }
    return bench->data + y_offset(bytes);
}

BENCH_API int rfm_bench_arm(struct rfm_bench *bench, int mode, uint64_t count,
                            uint64_t bytes)
{
    struct shared *shared = bench->shared;
    uint32_t       orders;
    uint32_t       looks  = 0;

    if ((mode < RFM_BENCH_MAILBOX) || (mode > RFM_BENCH_FUTEX) ||
        (bytes > bench->data_bytes) || (bytes % sizeof(double) != 0) ||
        (bench->armed != 0)) {
        return RFM_BENCH_INVALID;
    }

    atomic_store_explicit(&shared->mode, (uint32_t)mode, memory_order_relaxed);
    atomic_store_explicit(&shared->count, count, memory_order_relaxed);
    atomic_store_explicit(&shared->bytes, bytes, memory_order_relaxed);
    orders = atomic_load_explicit(&shared->orders, memory_order_relaxed) + 1;
    atomic_store_explicit(&shared->orders, orders, memory_order_release);
    futex_wake(&shared->orders);

    /* Its wake-up is not part of what is measured. */
    while (atomic_load_explicit(&shared->ready, memory_order_acquire) !=
           orders) {
        rfm_spin_pause();
        if ((++looks % LOOKS_PER_CHECK == 0) && !partner_lives(bench)) {
            return RFM_BENCH_LOST;
        }
    }
    bench->mode  = mode;
    bench->bytes = bytes;
    bench->armed = count;
    return RFM_BENCH_OK;
}

/* One round trip; the caller has seen to it that it is armed. */
static inline int round_trip(struct rfm_bench *bench)
{
    struct shared *shared = bench->shared;
    uint64_t       seq    = ++bench->seq;
    uint32_t       looks  = 0;

    shared->to.data = seq * 3;
    atomic_store_explicit(&shared->to.seq, seq, memory_order_release);
    if (bench->mode == RFM_BENCH_FUTEX) {
        atomic_fetch_add_explicit(&shared->bell, 1, memory_order_release);
        futex_wake(&shared->bell);
    }

    while (atomic_load_explicit(&shared->from.seq, memory_order_acquire) !=
           seq) {
        rfm_spin_pause();
        if ((++looks % LOOKS_PER_CHECK == 0) && !partner_lives(bench)) {
            return RFM_BENCH_LOST;
        }
    }
    return (shared->from.data == seq * 3) ? RFM_BENCH_OK : RFM_BENCH_WRONG;
}

/* Where the caller has arrays of its own: one copy of each, and no more. */
static inline int one_call(struct rfm_bench *bench, const void *x, void *y)
{
    int ret;

    if (x != NULL) {
        memcpy(bench->data, x, bench->bytes);
    }
    ret = round_trip(bench);
    if ((ret == RFM_BENCH_OK) && (y != NULL)) {
        memcpy(y, bench->data + y_offset(bench->bytes), bench->bytes);
    }
    return ret;
}

BENCH_API int64_t rfm_bench_calls(struct rfm_bench *bench, uint64_t count,
                                  int64_t *samples)
{
    return rfm_bench_copied_calls(bench, NULL, NULL, count, samples);
}

BENCH_API int64_t rfm_bench_copied_calls(struct rfm_bench *bench,
                                         const void *x, void *y,
                                         uint64_t count, int64_t *samples)
{
    int64_t start;
    int64_t total = 0;
    int     ret;

    if (count > bench->armed) {
        return RFM_BENCH_INVALID;
    }
    bench->armed -= count;

    if (samples == NULL) {
        start = now_ns();
        for (uint64_t i = 0; i < count; i++) {
            ret = one_call(bench, x, y);
            if (ret != RFM_BENCH_OK) {
                return ret;
            }
        }
        return now_ns() - start;
    }

    for (uint64_t i = 0; i < count; i++) {
        start = now_ns();
        ret   = one_call(bench, x, y);
        if (ret != RFM_BENCH_OK) {
            return ret;
        }
        samples[i] = now_ns() - start;
        total     += samples[i];
    }
    return total;
}

BENCH_API int64_t rfm_bench_call(struct rfm_bench *bench)
{
    return rfm_bench_calls(bench, 1, NULL);
}

/* ---- kernels ----------------------------------------------------------- */

BENCH_API int32_t rfm_bench_copy(const struct rfm_call *call)
{
    if ((call->n_in != 1) || (call->n_out != 1) ||
        (call->inputs[0].size > call->outputs[0].capacity)) {
        return -1;
    }
    memcpy(call->outputs[0].ptr, call->inputs[0].ptr, call->inputs[0].size);
    call->outputs[0].size = call->inputs[0].size;
    return 0;
}

BENCH_API int32_t rfm_bench_double(const struct rfm_call *call)
{
    if ((call->n_in != 1) || (call->n_out != 1) ||
        (call->inputs[0].size > call->outputs[0].capacity)) {
        return -1;
    }
    double_values(call->inputs[0].ptr, call->outputs[0].ptr,
                  call->inputs[0].size / sizeof(double));
    call->outputs[0].size = call->inputs[0].size;
    return 0;
}

BENCH_API int32_t rfm_bench_iterate(const struct rfm_call *call)
{
    const double *x;
    double       *y;
    uint64_t      rounds, i, r;

    if ((call->n_in != 2) || (call->n_out != 1) ||
        (call->inputs[0].size > call->outputs[0].capacity) ||
        (call->inputs[1].size != sizeof(rounds))) {
        return -1;
    }
    x      = call->inputs[0].ptr;
    y      = call->outputs[0].ptr;
    rounds = *(const uint64_t *)call->inputs[1].ptr;
    for (i = 0; i < call->inputs[0].size / sizeof(*x); i++) {
        double value = x[i];

        /* Each round needs the one before: time in proportion to rounds. */
        for (r = 0; r < rounds; r++) {
            value = value * 0.5 + 1.0;
        }
        y[i] = value;
    }
    call->outputs[0].size = call->inputs[0].size;
    return 0;
}

BENCH_API int rfm_bench_local(const double *x, double *y, uint64_t count)
{
    double_values(x, y, count);
    return RFM_BENCH_OK;
}

BENCH_API void rfm_bench_busy(int64_t ns)
{
    int64_t end = now_ns() + ns;

    while (now_ns() < end) {
        rfm_spin_pause();
    }
}

BENCH_API int64_t rfm_bench_clock_ns(void)
{
    int64_t best = INT64_MAX;

    for (int i = 0; i < 1000; i++) {
        int64_t start = now_ns();
        int64_t took  = now_ns() - start;

        if (took < best) {
            best = took;
        }
    }
    return best;
}

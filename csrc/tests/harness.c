/* See harness.h. */
#define _GNU_SOURCE
#include "harness.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "arena.h"
#include "frame.h"
#include "poller.h"
#include "rfm_transport.h"
#include "shm.h"

static const char *running = "(start)";
static const char *only;
static unsigned guard;
static bool in_child;
static uint32_t n_run;
static int zygote = -1;
static pthread_mutex_t zygote_lock = PTHREAD_MUTEX_INITIALIZER;

/* --- checks --------------------------------------------------------------- */

static void fail_now(void)
{
    fflush(NULL);
    if (getenv("RFM_TEST_ABORT") != NULL) {
        abort();
    }
    _exit(in_child ? 99 : 1);
}

void t_fail(const char *file, int line, const char *what)
{
    fprintf(stderr, "%s: FAILED%s: %s:%d: not so: %s (errno: %s)\n", running,
            in_child ? " in a child" : "", file, line, what, strerror(errno));
    fail_now();
    abort();
}

void t_fail_eq(const char *file, int line, const char *a, long long av,
               const char *b, long long bv)
{
    fprintf(stderr, "%s: FAILED%s: %s:%d: %s is %lld, %s is %lld (errno: %s)\n",
            running, in_child ? " in a child" : "", file, line, a, av, b, bv,
            strerror(errno));
    fail_now();
    abort();
}

/* --- where a test hangs ---------------------------------------------------- */

extern void __sanitizer_print_stack_trace(void) __attribute__((weak));

static uint32_t *told;          /* how many have said it; shared by all */

static void on_tell(int signal)
{
    int was = errno;

    (void)signal;
    fprintf(stderr, "process %d, thread %ld:\n", (int)getpid(),
            syscall(SYS_gettid));
    if (__sanitizer_print_stack_trace != NULL) {
        __sanitizer_print_stack_trace();
    }
    (void)__atomic_fetch_add(told, 1, __ATOMIC_RELEASE);
    errno = was;
}

/* 0 where it can't be read. */
static pid_t parent_of(pid_t pid)
{
    char path[64];
    FILE *stat;
    int parent = 0;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    stat = fopen(path, "re");
    if (stat == NULL) {
        return 0;
    }
    if (fscanf(stat, "%*d (%*[^)]) %*c %d", &parent) != 1) {
        parent = 0;
    }
    fclose(stat);
    return parent;
}

static bool is_ours(pid_t pid)
{
    while ((pid > 1) && (pid != getpid())) {
        pid = parent_of(pid);
    }
    return pid == getpid();
}

/* Each thread of each of our processes says where it is, one after another. */
static void tell_all(void)
{
    DIR *all = opendir("/proc");
    struct dirent *entry;

    while ((all != NULL) && ((entry = readdir(all)) != NULL)) {
        pid_t pid = atoi(entry->d_name);
        char path[64];
        struct dirent *task;
        DIR *tasks;

        if ((pid <= 0) || !is_ours(pid)) {
            continue;
        }
        snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
        tasks = opendir(path);
        while ((tasks != NULL) && ((task = readdir(tasks)) != NULL)) {
            uint32_t before = rfm_load_acquire(told);

            if ((atoi(task->d_name) <= 0) ||
                (syscall(SYS_tgkill, pid, atoi(task->d_name), SIGUSR2) != 0)) {
                continue;
            }
            /* a service thread hears no signals */
            for (int i = 0; (i < 400) && (rfm_load_acquire(told) == before);
                 i++) {
                usleep(10000);
            }
        }
        if (tasks != NULL) {
            closedir(tasks);
        }
    }
    if (all != NULL) {
        closedir(all);
    }
}

/* The end is near: what isn't safe in a handler may do its best here, and a
 * second alarm ends it where that hangs, too. */
static void on_alarm(int sig)
{
    static const char text[] = ": FAILED: it hangs\n";

    (void)sig;
    signal(SIGALRM, SIG_DFL);
    alarm(120);
    if (write(2, running, strlen(running)) < 0 ||
        write(2, text, sizeof(text) - 1) < 0) {
        _exit(4);
    }
    tell_all();
    if (getenv("RFM_TEST_ABORT") != NULL) {
        abort();
    }
    _exit(3);
}

static double slowness(void)
{
    const char *text = getenv("RFM_TEST_SLOW");

    return (text != NULL) ? strtod(text, NULL) : 1.0;
}

uint64_t t_ms(void)
{
    return (uint64_t)(1e6 * slowness());
}

bool t_slow(void)
{
    return slowness() > 1.0;
}

uint32_t t_open_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    uint32_t n = 0;

    CHECK(dir != NULL);
    while (readdir(dir) != NULL) {
        n++;
    }
    closedir(dir);
    return n;
}

void t_run(const char *name, void (*fn)(void))
{
    uint32_t fds;
    uint64_t t0;

    if ((only != NULL) && (strstr(name, only) == NULL)) {
        return;
    }
    running = name;
    fds     = t_open_fds();
    t0      = rfm_now_ns();
    alarm(guard);
    fn();
    alarm(0);
    CHECK_EQ(t_open_fds(), fds);
    printf("%s: ok (%.0f ms)\n", name, (double)(rfm_now_ns() - t0) * 1e-6);
    fflush(stdout);
    n_run++;
}

int t_finish(void)
{
    if (n_run == 0) {
        fprintf(stderr, "FAILED: no test has such a name\n");
        return 1;
    }
    close(zygote);
    return 0;
}

uint32_t t_scaled(uint32_t n, uint32_t least)
{
    const char *text = getenv("RFM_TEST_SCALE");
    double scale = (text != NULL) ? strtod(text, NULL) : 1.0;
    double m = (double)n * scale / (T_TSAN ? 10.0 : 1.0);

    return (m < (double)least) ? least : (uint32_t)m;
}

uint64_t t_random(struct t_random *r)
{
    uint64_t z = (r->state += 0x9e3779b97f4a7c15ull);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

uint64_t t_below(struct t_random *r, uint64_t n)
{
    return t_random(r) % n;
}

void t_fill(void *to, uint64_t n, uint64_t seed)
{
    struct t_random r = { seed };
    uint8_t *at = to;

    for (uint64_t i = 0; i < n; i += 8) {
        uint64_t word = t_random(&r);

        memcpy(at + i, &word, (n - i < 8) ? n - i : 8);
    }
}

bool t_filled(const void *at, uint64_t n, uint64_t seed)
{
    struct t_random r = { seed };
    const uint8_t *from = at;

    for (uint64_t i = 0; i < n; i += 8) {
        uint64_t word = t_random(&r);

        if (memcmp(from + i, &word, (n - i < 8) ? n - i : 8) != 0) {
            return false;
        }
    }
    return true;
}

/* --- processes ------------------------------------------------------------ */

struct errand {
    t_main_fn *fn;              /* NULL: wait for pid */
    uint64_t   args[4];
    uint32_t   n_fds;
    pid_t      pid;
};

union fd_control {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(4 * sizeof(int))];
};

static void run_errand(int sock)
{
    struct errand errand;
    struct iovec iov = { &errand, sizeof(errand) };
    union fd_control control;
    struct msghdr msg = {
        .msg_iov        = &iov,
        .msg_iovlen     = 1,
        .msg_control    = control.bytes,
        .msg_controllen = sizeof(control.bytes),
    };
    ssize_t got = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
    int fds[4] = { -1, -1, -1, -1 };
    int answer = 0;

    if (got != (ssize_t)sizeof(errand)) {
        _exit(0);               /* the test is over */
    }
    if (errand.n_fds > 0) {
        memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&msg)), errand.n_fds * sizeof(int));
    }
    if (errand.fn == NULL) {
        if (waitpid(errand.pid, &answer, 0) != errand.pid) {
            answer = -1;
        }
    } else {
        answer = fork();
        if (answer == 0) {
            close(sock);
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            exit(errand.fn(errand.args, fds));
        }
    }
    for (uint32_t i = 0; i < errand.n_fds; i++) {
        close(fds[i]);
    }
    if (send(sock, &answer, sizeof(answer), MSG_NOSIGNAL) < 0) {
        _exit(0);
    }
}

static int ask(struct errand *errand, const int *fds)
{
    struct iovec iov = { errand, sizeof(*errand) };
    union fd_control control;
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
    int answer;

    if (errand->n_fds > 0) {
        struct cmsghdr *cmsg;

        memset(&control, 0, sizeof(control));
        msg.msg_control    = control.bytes;
        msg.msg_controllen = CMSG_SPACE(errand->n_fds * sizeof(int));
        cmsg               = CMSG_FIRSTHDR(&msg);
        cmsg->cmsg_level   = SOL_SOCKET;
        cmsg->cmsg_type    = SCM_RIGHTS;
        cmsg->cmsg_len     = CMSG_LEN(errand->n_fds * sizeof(int));
        memcpy(CMSG_DATA(cmsg), fds, errand->n_fds * sizeof(int));
    }
    pthread_mutex_lock(&zygote_lock);
    CHECK(sendmsg(zygote, &msg, MSG_NOSIGNAL) == (ssize_t)sizeof(*errand));
    CHECK(recv(zygote, &answer, sizeof(answer), 0) == (ssize_t)sizeof(answer));
    pthread_mutex_unlock(&zygote_lock);
    return answer;
}

pid_t t_spawn(t_main_fn *fn, const uint64_t args[4], const int *fds,
              uint32_t n_fds)
{
    struct errand errand = { .fn = fn, .n_fds = n_fds };
    pid_t pid;

    if (args != NULL) {
        memcpy(errand.args, args, sizeof(errand.args));
    }
    pid = ask(&errand, fds);
    CHECK(pid > 0);
    return pid;
}

int t_reap(pid_t pid)
{
    struct errand errand = { .pid = pid };

    return ask(&errand, NULL);
}

void t_kill(pid_t pid, int signal)
{
    CHECK(kill(pid, signal) == 0);
}

bool t_lives(pid_t pid)
{
    char path[64];
    char state = 'Z';
    FILE *stat;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    stat = fopen(path, "re");
    if (stat == NULL) {
        return false;
    }
    CHECK(fscanf(stat, "%*d (%*[^)]) %c", &state) == 1);
    fclose(stat);
    return state != 'Z';
}

static int doing_nothing(const uint64_t *args, const int *fds)
{
    (void)args;
    (void)fds;
    for (;;) {
        pause();
    }
    return 0;
}

pid_t t_dummy(int *pidfd_p)
{
    pid_t pid = t_spawn(doing_nothing, NULL, NULL, 0);

    *pidfd_p = (int)syscall(SYS_pidfd_open, pid, 0);
    CHECK(*pidfd_p >= 0);
    return pid;
}

void t_init(int argc, char **argv, unsigned guard_s)
{
    struct sigaction action = { .sa_handler = on_alarm };
    struct sigaction tell   = { .sa_handler = on_tell, .sa_flags = SA_RESTART };
    int fds[2];
    pid_t pid;

    only  = (argc > 1) ? argv[1] : NULL;
    guard = guard_s;
    if (getenv("RFM_TEST_SCALE") != NULL) {
        guard = 3600;
    }
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) == 0);
    rfm_ticks_init();
    told = mmap(NULL, sizeof(*told), PROT_READ | PROT_WRITE,
                MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(told != MAP_FAILED);
    sigaction(SIGUSR2, &tell, NULL);
    fflush(NULL);
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        close(fds[0]);
        in_child = true;
        for (;;) {
            run_errand(fds[1]);
        }
    }
    close(fds[1]);
    zygote = fds[0];
    sigaction(SIGALRM, &action, NULL);
}

void t_socketpair(int fds[2])
{
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
}

uint32_t t_await_not(uint32_t *word, uint32_t was)
{
    for (;;) {
        uint32_t is = rfm_load_acquire(word);

        if (is != was) {
            return is;
        }
        sched_yield();
    }
}

void *t_map(int fd, uint64_t bytes)
{
    uint8_t *base;

    CHECK_OK(rfm_memfd_map(fd, bytes, true, &base));
    return base;
}

void *t_shared(uint64_t bytes, int *fd_p)
{
    CHECK_OK(rfm_memfd_create("test", bytes, fd_p));
    return t_map(*fd_p, bytes);
}

void t_unshare(void *base, uint64_t bytes, int fd)
{
    rfm_memfd_unmap(base, bytes);
    close(fd);
}

/* --- kernels -------------------------------------------------------------- */

static int32_t k_echo(const struct rfm_call *call)
{
    uint64_t n = call->inputs[0].size;

    if (n > call->outputs[0].capacity) {
        n = call->outputs[0].capacity;
    }
    if (n > 0) {
        memcpy(call->outputs[0].ptr, call->inputs[0].ptr, n);
    }
    call->outputs[0].size = n;
    return 0;
}

static int32_t k_flip(const struct rfm_call *call)
{
    for (uint32_t j = 0; j < call->n_out; j++) {
        const uint8_t *from = call->inputs[j].ptr;
        uint8_t *to = call->outputs[j].ptr;

        for (uint64_t i = 0; i < call->outputs[j].capacity; i++) {
            to[i] = (uint8_t)~from[i];
        }
    }
    return 0;
}

/* byte i of output j is the sum of bytes i of all inputs that are so long,
 * plus j */
static int32_t k_mix(const struct rfm_call *call)
{
    for (uint32_t j = 0; j < call->n_out; j++) {
        uint8_t *to = call->outputs[j].ptr;

        for (uint64_t i = 0; i < call->outputs[j].capacity; i++) {
            uint8_t sum = (uint8_t)j;

            for (uint32_t k = 0; k < call->n_in; k++) {
                if (i < call->inputs[k].size) {
                    sum += ((const uint8_t *)call->inputs[k].ptr)[i];
                }
            }
            to[i] = sum;
        }
    }
    return 0;
}

static int32_t k_fail(const struct rfm_call *call)
{
    (void)call;
    return -7;
}

static int32_t k_overrun(const struct rfm_call *call)
{
    uint32_t j = *(const uint8_t *)call->inputs[0].ptr;
    struct rfm_buf *out = &call->outputs[j];

    /* volatile: the compiler can't know how much there is */
    for (volatile uint64_t i = 0; i < out->capacity + 16; i++) {
        ((uint8_t *)out->ptr)[i] = 0xee;
    }
    return 0;
}

static int32_t k_segv(const struct rfm_call *call)
{
    (void)call;
    signal(SIGSEGV, SIG_DFL);   /* the sanitizers' report is not asked for */
    raise(SIGSEGV);
    return 0;
}

static int32_t k_far(const struct rfm_call *call)
{
    signal(SIGSEGV, SIG_DFL);
    for (volatile uint64_t i = 0; i < call->outputs[0].capacity + 4096; i++) {
        ((uint8_t *)call->outputs[0].ptr)[i] = 0xee;
    }
    return 0;
}

static int32_t k_lies(const struct rfm_call *call)
{
    call->outputs[call->n_out - 1].size =
        call->outputs[call->n_out - 1].capacity + 1;
    return 0;
}

static int32_t k_half(const struct rfm_call *call)
{
    for (uint32_t j = 0; j < call->n_out; j++) {
        call->outputs[j].size = call->outputs[j].capacity / 2;
        memset(call->outputs[j].ptr, 0x5a, call->outputs[j].size);
    }
    return 0;
}

static int32_t k_nap(const struct rfm_call *call)
{
    uint64_t us;
    struct timespec ts;

    memcpy(&us, call->inputs[0].ptr, sizeof(us));
    ts.tv_sec  = (time_t)(us / 1000000u);
    ts.tv_nsec = (long)(us % 1000000u) * 1000l;
    nanosleep(&ts, NULL);
    return k_echo(call);
}

/* which invocation of this worker it is */
static int32_t k_stamp(const struct rfm_call *call)
{
    static uint64_t stamps;

    stamps++;
    memcpy(call->outputs[0].ptr, &stamps, sizeof(stamps));
    return 0;
}

/* Gates lie in the second half of the worker's page, which it shares with its
 * agent whatever it shares with its ranks. */
#define GATES ((RFM_PAGE_BYTES / 2) / sizeof(uint32_t))

static _Thread_local uint32_t *gates;

static uint32_t *gates_of(void *page)
{
    return (uint32_t *)((uint8_t *)page + RFM_PAGE_BYTES / 2);
}

static int32_t k_gate(const struct rfm_call *call)
{
    uint32_t number;

    memcpy(&number, call->inputs[0].ptr, sizeof(number));
    while (rfm_load_acquire(&gates[number % GATES]) == 0) {
        (void)syscall(SYS_futex, &gates[number % GATES], FUTEX_WAIT, 0, NULL,
                      NULL, 0);
    }
    return k_echo(call);
}

static int32_t k_quit(const struct rfm_call *call)
{
    (void)call;
    _exit(3);
}

static int32_t k_stuck(const struct rfm_call *call)
{
    (void)call;
    for (;;) {
        pause();
    }
    return 0;
}

static uint32_t k_plain(void *in, uint32_t size, void *out)
{
    memcpy(out, in, size);
    return size;
}

enum how { NATIVE, PLAIN, EVENT, OBJECT, REFUSED };

static const struct entry {
    const char    *name;
    enum how       how;
    rfm_kernel_fn *native;
} entries[] = {
    { "echo", NATIVE, k_echo },       { "flip", NATIVE, k_flip },
    { "mix", NATIVE, k_mix },         { "fail", NATIVE, k_fail },
    { "overrun", NATIVE, k_overrun }, { "far", NATIVE, k_far },
    { "lies", NATIVE, k_lies },       { "half", NATIVE, k_half },
    { "nap", NATIVE, k_nap },         { "gate", NATIVE, k_gate },
    { "segv", NATIVE, k_segv },       { "quit", NATIVE, k_quit },
    { "stuck", NATIVE, k_stuck },     { "stamp", NATIVE, k_stamp },
    { "plain", PLAIN, NULL },
    { "event", EVENT, NULL },         { "grumble", EVENT, NULL },
    { "pattern", OBJECT, NULL },      { "complain", OBJECT, NULL },
    { "refused", REFUSED, NULL },
};

/* --- the worker ----------------------------------------------------------- */

struct kept {
    struct kept *next;
    uint32_t conn;
    uint64_t id;
    uint64_t n;
    uint8_t  bytes[];
};

struct crew {
    struct rfm_worker *w;
    struct kept *kept;
};

static void on_kernel(struct crew *crew, struct rfm_event *ev)
{
    static const char text[] = "there is no such kernel";
    const struct entry *found = NULL;

    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        if ((strlen(entries[i].name) == ev->blob_bytes) &&
            (memcmp(entries[i].name, ev->blob, ev->blob_bytes) == 0)) {
            found = &entries[i];
        }
    }
    rfm_worker_name(crew->w, ev, (const char *)ev->blob, ev->blob_bytes);
    rfm_worker_loaded(crew->w, ev, (void *)(uintptr_t)found,
                      (found == NULL) ? text : NULL, sizeof(text) - 1);
    rfm_worker_release(crew->w, ev);
}

static void on_bind(struct crew *crew, struct rfm_event *ev)
{
    static const char text[] = "this kernel can't be bound so";
    const struct entry *entry = ev->user;
    bool bad = (entry->how == REFUSED) ||
               ((entry->how == PLAIN) && ((ev->n_in != 1) || (ev->n_out != 1))) ||
               ((entry->how == OBJECT) != ((ev->flags & RFM_BIND_OBJECT) != 0));

    rfm_worker_bound(crew->w, ev, ev->user, entry->native,
                     (entry->how == PLAIN) ? k_plain : NULL, bad ? text : NULL,
                     sizeof(text) - 1);
    rfm_worker_release(crew->w, ev);
}

static void drop(struct crew *crew, uint32_t conn, uint64_t id, bool all)
{
    struct kept **at = &crew->kept;

    while (*at != NULL) {
        struct kept *kept = *at;

        if ((kept->conn == conn) && (all || (kept->id == id))) {
            *at = kept->next;
            free(kept);
        } else {
            at = &kept->next;
        }
    }
}

static void on_object(struct crew *crew, struct rfm_event *ev,
                      const struct entry *entry)
{
    uint32_t status = (strcmp(entry->name, "complain") == 0) ? RFM_ST_KERNEL
                                                             : RFM_ST_OK;
    uint64_t ask[2] = { 0, 0 };
    struct kept *kept;

    memcpy(ask, ev->blob, (ev->blob_bytes < 16) ? ev->blob_bytes : 16);
    if (ask[0] > (64u << 20)) {
        static const char text[] = "too much was asked for";

        rfm_worker_reply_bytes(crew->w, ev, RFM_ST_KERNEL, text,
                               sizeof(text) - 1);
        return;
    }
    kept = malloc(sizeof(*kept) + ask[0]);
    CHECK(kept != NULL);
    t_fill(kept->bytes, ask[0], ask[1]);
    if (ask[0] <= ev->out_capacity) {
        rfm_worker_reply_bytes(crew->w, ev, status, kept->bytes, ask[0]);
        free(kept);
        return;
    }
    kept->conn = ev->conn_number;
    kept->id   = ev->id;
    kept->n    = ask[0];
    kept->next = crew->kept;
    crew->kept = kept;
    rfm_worker_reply(crew->w, ev, status, RFM_REP_KEPT, ask[0], NULL);
}

static void on_call(struct crew *crew, struct rfm_event *ev)
{
    const struct entry *entry = ev->user;
    static const char text[] = "this kernel grumbles";
    uint64_t sizes[T_ARGS];

    if ((ev->flags & RFM_REQ_OBJECT) != 0) {
        on_object(crew, ev, entry);
    } else if ((strcmp(entry->name, "event") == 0) && (ev->n_in > 0) &&
               (ev->n_out > 0) && (ev->n_out <= T_ARGS)) {
        struct rfm_buf *out = &ev->bufs[ev->n_in];

        for (uint32_t i = 0; i < ev->n_out; i++) {
            sizes[i] = out[i].capacity;
        }
        sizes[0] = (ev->bufs[0].size < out->capacity) ? ev->bufs[0].size
                                                      : out->capacity;
        if (sizes[0] > 0) {
            memcpy(out->ptr, ev->bufs[0].ptr, sizes[0]);
        }
        rfm_worker_reply(crew->w, ev, RFM_ST_OK, 0, sizes[0], sizes);
    } else {
        rfm_worker_reply_bytes(crew->w, ev, RFM_ST_KERNEL, text,
                               sizeof(text) - 1);
    }
}

static void on_fetch(struct crew *crew, struct rfm_event *ev)
{
    static const char text[] = "a result that isn't kept here";
    uint64_t id = ev->blob_bytes;
    uint32_t conn = ev->conn_number;

    for (struct kept *kept = crew->kept; kept != NULL; kept = kept->next) {
        if ((kept->conn == conn) && (kept->id == id) &&
            (kept->n == ev->out_capacity)) {
            memcpy(ev->out, kept->bytes, kept->n);
            rfm_worker_reply(crew->w, ev, RFM_ST_OK, 0, kept->n, NULL);
            drop(crew, conn, id, false);
            return;
        }
    }
    rfm_worker_reply_bytes(crew->w, ev, RFM_ST_KERNEL, text, sizeof(text) - 1);
}

static int serve(int agent_fd, int page_fd, uint32_t spin_us)
{
    struct rfm_worker_attr attr = {
        .agent_fd = agent_fd,
        .page_fd  = page_fd,
        .spin_us  = spin_us,
    };
    struct crew crew = { NULL, NULL };
    struct rfm_event ev;
    bool over = false;
    void *page;

    page = mmap(NULL, RFM_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
                page_fd, 0);
    CHECK(page != MAP_FAILED);
    gates = gates_of(page);
    (void)t_transport();        /* loads it, where it is a plug-in */
    CHECK_OK(rfm_worker_create(&attr, &crew.w));
    while (!over) {
        CHECK_OK(rfm_worker_next(crew.w, true, &ev));
        switch (ev.type) {
        case RFM_EV_CALL:
            on_call(&crew, &ev);
            break;
        case RFM_EV_KERNEL:
            on_kernel(&crew, &ev);
            break;
        case RFM_EV_BIND:
            on_bind(&crew, &ev);
            break;
        case RFM_EV_FETCH:
            on_fetch(&crew, &ev);
            break;
        case RFM_EV_DROP:
            drop(&crew, ev.conn_number, ev.id, false);
            rfm_worker_release(crew.w, &ev);
            break;
        case RFM_EV_GONE:
            drop(&crew, ev.conn_number, 0, true);
            rfm_worker_release(crew.w, &ev);
            break;
        case RFM_EV_END:
            over = true;
            break;
        default:
            rfm_worker_release(crew.w, &ev);
            break;
        }
    }
    while (crew.kept != NULL) {
        drop(&crew, crew.kept->conn, 0, true);
    }
    rfm_worker_destroy(crew.w);
    munmap(page, RFM_PAGE_BYTES);
    return 0;
}

static int worker_process(const uint64_t *args, const int *fds)
{
    int rc = serve(fds[0], fds[1], (uint32_t)args[0]);

    close(fds[0]);
    close(fds[1]);
    return rc;
}

static void *worker_thread(void *arg)
{
    struct t_worker *w = arg;

    (void)serve(w->thread_fds[0], w->thread_fds[1], w->spin_us);
    return NULL;
}

/* --- its agent ------------------------------------------------------------ */

void t_worker_start(struct t_worker *w, bool thread, uint32_t spin_us)
{
    uint64_t args[4] = { spin_us };
    int pair[2];
    int page_fd;

    memset(w, 0, sizeof(*w));
    t_socketpair(pair);
    page_fd = memfd_create("page", MFD_CLOEXEC);
    CHECK(page_fd >= 0);
    CHECK(ftruncate(page_fd, RFM_PAGE_BYTES) == 0);
    w->page = mmap(NULL, RFM_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
                   page_fd, 0);
    CHECK(w->page != MAP_FAILED);
    w->agent_fd      = pair[0];
    w->page_fd       = page_fd;
    w->next_conn     = 1;
    w->spin_us       = spin_us;
    w->thread_fds[0] = pair[1];
    w->thread_fds[1] = page_fd;
    if (thread) {
        CHECK_EQ(pthread_create(&w->thread, NULL, worker_thread, w), 0);
    } else {
        w->pid = t_spawn(worker_process, args, w->thread_fds, 2);
        close(pair[1]);
        w->thread_fds[0] = -1;
    }
    (void)t_worker_expect(w, RFM_AGENT_READY);
}

uint32_t t_worker_expect(struct t_worker *w, uint16_t type)
{
    for (;;) {
        struct rfm_rx rx;
        uint32_t value = 0;
        int rc;

        rfm_rx_init(&rx, 4096);
        while ((rc = rfm_rx_read(&rx, w->agent_fd)) == RFM_ERR_AGAIN) {
            struct pollfd p = { .fd = w->agent_fd, .events = POLLIN };

            (void)poll(&p, 1, -1);
        }
        CHECK_OK(rc);
        if (rx.head.type == type) {
            if (rx.head.length >= sizeof(value)) {
                memcpy(&value, rx.body, sizeof(value));
            }
            if (type == RFM_AGENT_GONE) {
                CHECK_EQ(rx.head.length, 8);
                memcpy(&w->n_refused, rx.body + 4, 4);
            }
            rfm_rx_fini(&rx);
            return value;
        }
        rfm_rx_fini(&rx);
    }
}

void t_worker_runs(struct t_worker *w, const struct rfm_request *req)
{
    while (rfm_load_acquire(&w->page->id) != req->id) {
        sched_yield();
    }
}

/* --- transports ----------------------------------------------------------- */

void t_tcp_pair(int fds[2])
{
    struct sockaddr_in at = { .sin_family = AF_INET };
    socklen_t length = sizeof(at);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int one = 1;

    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(listener >= 0);
    CHECK(bind(listener, (struct sockaddr *)&at, sizeof(at)) == 0);
    CHECK(listen(listener, 1) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&at, &length) == 0);
    fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(fds[0] >= 0);
    CHECK(connect(fds[0], (struct sockaddr *)&at, sizeof(at)) == 0);
    fds[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    CHECK(fds[1] >= 0);
    close(listener);
    for (int i = 0; i < 2; i++) {
        CHECK(setsockopt(fds[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) ==
              0);
    }
}

void t_worker_adopt(struct t_worker *w, const int *fds, uint32_t n)
{
    struct rfm_ctl_adopt body = { .lease = 1, .conn = w->next_conn++ };
    struct iovec iov = { &body, sizeof(body) };

    CHECK_OK(rfm_frame_send(w->agent_fd, RFM_AGENT_ADOPT, 0, &iov, 1, fds, n));
    for (uint32_t i = 0; i < n; i++) {
        close(fds[i]);
    }
}

int t_worker_dial(struct t_worker *w)
{
    int pair[2];

    t_socketpair(pair);
    t_worker_adopt(w, &pair[1], 1);
    return pair[0];
}

static void dial_shm(struct t_worker *w, struct rfm_attach_attr *attr)
{
    attr->fd = t_worker_dial(w);
}

/* Every second one has its data checked. */
static void dial_tcp(struct t_worker *w, struct rfm_attach_attr *attr)
{
    int control[2];
    int data[2];
    int theirs[2];

    t_tcp_pair(control);
    t_tcp_pair(data);
    attr->fd      = control[0];
    attr->data_fd = data[0];
    attr->flags   = (w->next_conn % 2 == 0) ? RFM_STREAM_CRC : 0;
    theirs[0]     = control[1];
    theirs[1]     = data[1];
    t_worker_adopt(w, theirs, 2);
}

static const struct {
    const char *name;
    void (*dial)(struct t_worker *w, struct rfm_attach_attr *attr);
} transports[RFM_TRANSPORTS] = {
    [RFM_TRANSPORT_SHM] = { "shm", dial_shm },
    [RFM_TRANSPORT_TCP] = { "tcp", dial_tcp },
    [RFM_TRANSPORT_VERBS] = { "verbs", dial_shm },
};

uint32_t t_transport(void)
{
    const char *name = getenv("T_TRANSPORT");
    uint32_t i = 0;

    if (name == NULL) {
        return RFM_TRANSPORT_SHM;
    }
    while ((i < RFM_TRANSPORTS) && ((transports[i].name == NULL) ||
                                    (strcmp(name, transports[i].name) != 0))) {
        i++;
    }
    CHECK(i < RFM_TRANSPORTS);
    if (rfm_transport_find(i) == NULL) {
        const char *why = "T_PLUGIN names no plug-in";

        if ((getenv("T_PLUGIN") == NULL) ||
            (rfm_transport_load(getenv("T_PLUGIN"), &why) < 0)) {
            fprintf(stderr, "FAILED: no transport %s: %s\n", name, why);
            fail_now();
        }
    }
    return i;
}

bool t_remote(void)
{
    return rfm_transport_find(t_transport())->remote;
}

struct rfm_attach_attr t_dial(struct t_worker *w, uint32_t transport)
{
    struct rfm_attach_attr attr = {
        .transport  = transport,
        .fd         = -1,
        .data_fd    = -1,
        .lease      = 1,
        .worker     = w->next_conn,
        .timeout_ns = T_FOREVER,
    };

    transports[transport].dial(w, &attr);
    return attr;
}

uint32_t t_dial_fds(const struct rfm_attach_attr *attr, int fds[2])
{
    fds[0] = attr->fd;
    fds[1] = attr->data_fd;
    return (attr->data_fd >= 0) ? 2 : 1;
}

struct rfm_attach_attr t_dialled(const int *fds)
{
    return (struct rfm_attach_attr){
        .transport  = t_transport(),
        .fd         = fds[0],
        .data_fd    = fds[1],
        .lease      = 1,
        .worker     = 1,
        .timeout_ns = T_FOREVER,
    };
}

void t_hang_up(const struct rfm_attach_attr *attr)
{
    close(attr->fd);
    if (attr->data_fd >= 0) {
        close(attr->data_fd);
    }
}

struct rfm_channel *t_attach(struct rfm_invoker *inv,
                             const struct rfm_attach_attr *attr)
{
    struct rfm_channel *chan;

    CHECK_OK(rfm_invoker_attach_over(inv, attr, &chan));
    return chan;
}

struct rfm_channel *t_worker_attach(struct t_worker *w, struct rfm_invoker *inv)
{
    struct rfm_attach_attr attr = t_dial(w, t_transport());

    return t_attach(inv, &attr);
}

static void forget(struct t_worker *w)
{
    munmap(w->page, RFM_PAGE_BYTES);
    close(w->page_fd);
    close(w->agent_fd);
}

void t_worker_end(struct t_worker *w)
{
    CHECK_OK(rfm_frame_send(w->agent_fd, RFM_AGENT_QUIT, 0, NULL, 0, NULL, 0));
    if (w->pid != 0) {
        CHECK_EQ(t_reap(w->pid), 0);
    } else {
        CHECK_EQ(pthread_join(w->thread, NULL), 0);
        close(w->thread_fds[0]);
    }
    forget(w);
}

int t_worker_bury(struct t_worker *w)
{
    int status = t_reap(w->pid);

    forget(w);
    return status;
}

void t_worker_was_killed(struct t_worker *w)
{
    if (t_remote()) {
        CHECK(t_lives(w->pid));
        t_kill(w->pid, SIGKILL);
    }
    CHECK_EQ(t_worker_bury(w), SIGKILL);
}

/* --- a rank --------------------------------------------------------------- */

struct rfm_invoker *t_invoker(uint32_t slots, uint32_t slot_bytes,
                              uint32_t spin_us)
{
    struct rfm_invoker_attr attr = {
        .slots      = slots,
        .slot_bytes = slot_bytes,
        .spin_us    = spin_us,
    };
    struct rfm_invoker *inv;

    CHECK_OK(rfm_invoker_create(&attr, &inv));
    return inv;
}

void t_invoker_end(struct rfm_invoker *inv)
{
    rfm_invoker_close(inv, T_FOREVER);
    rfm_invoker_destroy(inv);
}

struct rfm_kernel *t_kernel(struct rfm_invoker *inv, const char *name)
{
    uint8_t digest[RFM_DIGEST_BYTES] = { 0 };
    struct rfm_kernel *kernel;

    strncpy((char *)digest, name, sizeof(digest) - 1);
    CHECK_OK(rfm_invoker_kernel(inv, 2, digest, name, strlen(name), &kernel));
    return kernel;
}

void t_call_make(struct t_call *call, struct rfm_invoker *inv, const char *kernel,
                 uint16_t n_in, uint16_t n_out, const uint32_t *places,
                 const uint64_t *sizes)
{
    struct rfm_arg args[T_ARGS];

    memset(call, 0, sizeof(*call));
    memset(args, 0, sizeof(args));
    call->n = (uint32_t)n_in + n_out;
    CHECK(call->n <= T_ARGS);
    for (uint32_t i = 0; i < call->n; i++) {
        args[i].place = places[i];
        args[i].size  = sizes[i];
        call->args[i].size = sizes[i];
        if (places[i] == RFM_INLINE) {
            /* exactly so many: a byte too far is seen */
            call->args[i].user = malloc(sizes[i]);
            CHECK((call->args[i].user != NULL) || (sizes[i] == 0));
            continue;
        }
        CHECK_OK(rfm_heap_alloc(rfm_invoker_heap(inv), sizes[i],
                                &call->blocks[i]));
        call->args[i].user = call->blocks[i].address;
        call->args[i].desc = (struct rfm_desc){
            .arena  = call->blocks[i].arena_id,
            .flags  = (i >= n_in) ? RFM_ARG_CANARY : 0,
            .offset = call->blocks[i].offset,
            .size   = sizes[i],
        };
        if (places[i] == RFM_BOUND) {
            args[i].arena  = call->blocks[i].arena_id;
            args[i].offset = call->blocks[i].offset;
            args[i].flags  = (i >= n_in) ? RFM_ARG_CANARY : 0;
        }
    }
    CHECK_OK(rfm_binding_create(inv, t_kernel(inv, kernel), 0, n_in, n_out, args,
                                NULL, 0, &call->binding));
    rfm_request_init(&call->req, inv, call->binding, call->args, call->sizes);
}

void t_call_inline(struct t_call *call, struct rfm_invoker *inv,
                   const char *kernel, uint64_t in, uint64_t out)
{
    uint32_t places[2] = { RFM_INLINE, RFM_INLINE };
    uint64_t sizes[2] = { in, out };

    t_call_make(call, inv, kernel, 1, 1, places, sizes);
}

void t_call_object(struct t_call *call, struct rfm_invoker *inv,
                   const char *kernel, const void *payload, uint64_t n)
{
    memset(call, 0, sizeof(*call));
    CHECK_OK(rfm_binding_create(inv, t_kernel(inv, kernel), RFM_BIND_OBJECT, 0,
                                0, NULL, NULL, 0, &call->binding));
    rfm_request_init(&call->req, inv, call->binding, call->args, call->sizes);
    call->req.wire_flags    = RFM_REQ_OBJECT;
    call->req.payload       = payload;
    call->req.payload_bytes = n;
}

void *t_in(struct t_call *call, uint32_t i)
{
    return call->args[i].user;
}

void *t_out(struct t_call *call, uint32_t i)
{
    return call->args[call->binding->n_in + i].user;
}

void t_call_end(struct t_call *call)
{
    for (uint32_t i = 0; i < call->n; i++) {
        if (call->blocks[i].arena != NULL) {
            rfm_heap_free(&call->blocks[i]);
        } else {
            free(call->args[i].user);
        }
    }
    rfm_binding_destroy(call->req.inv, call->binding);
    rfm_request_fini(&call->req);
}

void t_start(struct t_call *call)
{
    CHECK_OK(rfm_request_start(&call->req, 0));
}

void t_behold(struct t_call *call)
{
    (void)t_await_not(&call->req.state, RFM_QUEUED);
}

enum rfm_outcome t_wait(struct t_call *call)
{
    struct rfm_request *req = &call->req;

    /* one slice: if a wake-up is lost, the hang guard says so */
    while (rfm_wait(req->inv, &req, 1, RFM_WAIT_ALL, 0, T_FOREVER, true,
                    NULL) < 0) {
    }
    return (enum rfm_outcome)req->outcome;
}

enum rfm_outcome t_invoke(struct t_call *call)
{
    t_start(call);
    return t_wait(call);
}

void t_gate_make(struct t_gate *g, struct t_worker *w, struct rfm_invoker *inv)
{
    uint32_t places[2] = { RFM_BOUND, RFM_BOUND };
    uint64_t sizes[2] = { 64, 64 };

    g->worker = w;
    g->number = w->next_gate++ % GATES;
    rfm_store_release(&gates_of(w->page)[g->number], 0);
    t_call_make(&g->call, inv, "gate", 1, 1, places, sizes);
    memset(t_in(&g->call, 0), 0, 64);
    memcpy(t_in(&g->call, 0), &g->number, sizeof(g->number));
}

void t_gate_shut(struct t_gate *g, struct t_worker *w, struct rfm_invoker *inv)
{
    t_gate_make(g, w, inv);
    t_start(&g->call);
}

void t_gate_runs(struct t_gate *g)
{
    t_worker_runs(g->worker, &g->call.req);
}

void t_gate_unlock(struct t_gate *g)
{
    uint32_t *word = &gates_of(g->worker->page)[g->number];

    rfm_store_release(word, 1);
    (void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void t_gate_open(struct t_gate *g)
{
    t_gate_unlock(g);
    CHECK_EQ(t_wait(&g->call), RFM_DONE);
    t_call_end(&g->call);
}

const char *t_text(struct t_call *call)
{
    static _Thread_local char text[256];
    struct rfm_request *req = &call->req;
    uint64_t n = (req->result_bytes < 255) ? req->result_bytes : 255;

    memcpy(text, (req->result_bytes > RFM_RESULT_INLINE) ? req->result
                                                         : req->small, n);
    text[n] = 0;
    return text;
}

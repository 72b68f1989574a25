/*
 * What the tests of the data plane share: checks, a hang guard, processes,
 * a small worker with native kernels, and calls with arguments anywhere.
 *
 * A test is a function named as the promise kept; RUN() runs it, counts the
 * descriptors before and after it, and prints `name: ok`. A failed check ends
 * the program. Nothing sleeps or measures: a test that waits for something
 * that never comes ends by the hang guard.
 *
 * Workers and other peers are processes: a small single-threaded zygote, forked
 * before anything else, forks them, as a fork of a process with threads is
 * nothing that sanitizers (or the product) like.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#include "rfm.h"

#if defined(__SANITIZE_THREAD__)
#define T_TSAN true
#else
#define T_TSAN false
#endif

#define CHECK(cond)                                     \
    do {                                                \
        if (!(cond)) {                                  \
            t_fail(__FILE__, __LINE__, #cond);          \
        }                                               \
    } while (0)
#define CHECK_EQ(a, b)                                                    \
    do {                                                                  \
        long long a_ = (long long)(a);                                    \
        long long b_ = (long long)(b);                                    \
        if (a_ != b_) {                                                   \
            t_fail_eq(__FILE__, __LINE__, #a, a_, #b, b_);                \
        }                                                                 \
    } while (0)
#define CHECK_OK(call) CHECK_EQ(call, RFM_OK)
#define RUN(fn)        t_run(#fn, fn)

void t_fail(const char *file, int line, const char *what)
    __attribute__((noreturn));
void t_fail_eq(const char *file, int line, const char *a, long long av,
               const char *b, long long bv) __attribute__((noreturn));

/* First thing in main(); argv[1], if given, is part of the names to run. */
void t_init(int argc, char **argv, unsigned guard_s);
void t_run(const char *name, void (*fn)(void));
int  t_finish(void);
/* n, times $RFM_TEST_SCALE, a tenth of it under TSan, at least `least`. */
uint32_t t_scaled(uint32_t n, uint32_t least);
/* A millisecond, in ns, on a machine that is $RFM_TEST_SLOW times slower than
 * usual: for time limits. And whether it is. */
uint64_t t_ms(void);
bool     t_slow(void);
uint32_t t_open_fds(void);

struct t_random {
    uint64_t state;
};
uint64_t t_random(struct t_random *r);
uint64_t t_below(struct t_random *r, uint64_t n);
void t_fill(void *to, uint64_t n, uint64_t seed);
bool t_filled(const void *at, uint64_t n, uint64_t seed);

/* --- processes ------------------------------------------------------------ */

typedef int t_main_fn(const uint64_t *args, const int *fds);
/* fds are the child's; the caller keeps (and closes) its own. */
pid_t t_spawn(t_main_fn *fn, const uint64_t args[4], const int *fds,
              uint32_t n_fds);
/* Its wait status, once it ended. */
int  t_reap(pid_t pid);
void t_kill(pid_t pid, int signal);
/* It was not reaped yet: does it still run, or could it? */
bool t_lives(pid_t pid);
/* A process that does nothing until it is killed; *pidfd_p is the caller's. */
pid_t t_dummy(int *pidfd_p);
void t_socketpair(int fds[2]);
/* Waits until *word (of another thread or process) is no longer `was`. */
uint32_t t_await_not(uint32_t *word, uint32_t was);
/* Memory that children may be given: a sealed memfd. */
void *t_shared(uint64_t bytes, int *fd_p);
void t_unshare(void *base, uint64_t bytes, int fd);
void *t_map(int fd, uint64_t bytes);

/* --- a worker and its agent ----------------------------------------------- */

struct t_worker {
    pid_t     pid;              /* 0: a thread of this process */
    pthread_t thread;
    int       agent_fd;
    int       page_fd;
    struct rfm_page *page;
    uint32_t  next_conn;
    uint32_t  next_gate;
    uint32_t  n_refused;        /* of the connection that was gone last */
    uint32_t  spin_us;
    int       thread_fds[2];
};

void t_worker_start(struct t_worker *w, bool thread, uint32_t spin_us);
/* Reads the agent's socket up to a frame of this type; its first u32. */
uint32_t t_worker_expect(struct t_worker *w, uint16_t type);
/* Asks it to end, and checks that it did so without an error. */
void t_worker_end(struct t_worker *w);
/* For one that ends otherwise: its wait status. */
int  t_worker_bury(struct t_worker *w);
/* Until it runs this call. */
void t_worker_runs(struct t_worker *w, const struct rfm_request *req);

/* --- transports ------------------------------------------------------------ *
 *
 * T_TRANSPORT says over which one a program's tests run (shm, tcp); shm if it
 * says nothing. What differs by design is asserted by `if (t_remote())`. To add
 * one, add its name, and what dials it, to `transports` in harness.c.
 */
uint32_t t_transport(void);
bool     t_remote(void);
/* A new connection to the worker, with all that an attach needs. */
struct rfm_attach_attr t_dial(struct t_worker *w, uint32_t transport);
/* Its descriptors, to be given to a child that calls t_dialled(): how many. */
uint32_t t_dial_fds(const struct rfm_attach_attr *attr, int fds[2]);
struct rfm_attach_attr t_dialled(const int *fds);
void t_hang_up(const struct rfm_attach_attr *attr);
struct rfm_channel *t_attach(struct rfm_invoker *inv,
                             const struct rfm_attach_attr *attr);
/* Both in one, over t_transport(). */
struct rfm_channel *t_worker_attach(struct t_worker *w, struct rfm_invoker *inv);
/* A Unix socket to it: the rank's end, for ranks by hand. */
int  t_worker_dial(struct t_worker *w);
/* Gives it these connections of a rank, as its agent does, and closes them. */
void t_worker_adopt(struct t_worker *w, const int *fds, uint32_t n);
/* Two ends of a connection over the loopback interface. */
void t_tcp_pair(int fds[2]);
/* What is left to do with a worker that rfm_channel_kill() was to get rid of:
 * one that shares our memory is dead, another lives, but its link does not. */
void t_worker_was_killed(struct t_worker *w);

/* --- a rank --------------------------------------------------------------- */

#define T_SLOTS      8u
#define T_SLOT_BYTES 1024u
#define T_FOREVER    3600000000000ull

struct rfm_invoker *t_invoker(uint32_t slots, uint32_t slot_bytes,
                              uint32_t spin_us);
void t_invoker_end(struct rfm_invoker *inv);
struct rfm_kernel *t_kernel(struct rfm_invoker *inv, const char *name);

#define T_ARGS 12u

struct t_call {
    struct rfm_request  req;
    struct rfm_binding *binding;
    struct rfm_reqarg   args[T_ARGS];
    uint64_t            sizes[T_ARGS];
    struct rfm_block    blocks[T_ARGS];
    uint32_t            n;
};

/* places[n_in + n_out] of the arguments, sizes[] in bytes. Outputs that lie in
 * arenas are guarded by redzones. */
void t_call_make(struct t_call *call, struct rfm_invoker *inv, const char *kernel,
                 uint16_t n_in, uint16_t n_out, const uint32_t *places,
                 const uint64_t *sizes);
/* One input and one output, both inline. */
void t_call_inline(struct t_call *call, struct rfm_invoker *inv,
                   const char *kernel, uint64_t in, uint64_t out);
/* One object each way; the payload stays the caller's. */
void t_call_object(struct t_call *call, struct rfm_invoker *inv,
                   const char *kernel, const void *payload, uint64_t n);
void *t_in(struct t_call *call, uint32_t i);
void *t_out(struct t_call *call, uint32_t i);
void t_call_end(struct t_call *call);
void t_start(struct t_call *call);
/* Until it left the queue, without so much as a look at the invoker. */
void t_behold(struct t_call *call);
/* Until it ended: its outcome. */
enum rfm_outcome t_wait(struct t_call *call);
enum rfm_outcome t_invoke(struct t_call *call);
const char *t_text(struct t_call *call);

/* Occupies a worker until it is opened. */
struct t_gate {
    struct t_call    call;
    struct t_worker *worker;
    uint32_t         number;
};
void t_gate_make(struct t_gate *g, struct t_worker *w, struct rfm_invoker *inv);
/* The same, and starts its call. */
void t_gate_shut(struct t_gate *g, struct t_worker *w, struct rfm_invoker *inv);
void t_gate_runs(struct t_gate *g);
/* Lets the kernel go; the call is still there. */
void t_gate_unlock(struct t_gate *g);
/* The same; its call ends DONE, and is gone. */
void t_gate_open(struct t_gate *g);

/*
 * Kernels by name, what they do (all inputs and outputs any size):
 *   echo      out[0] = in[0]                 flip      out[j] = ~in[j], each j
 *   mix       every output from all inputs   fail      returns -7
 *   overrun   writes 16 bytes past the output whose number is in[0][0]
 *   far       writes 4096 bytes past out[0]  lies      says capacity + 1
 *   half      fills and says half            nap       echo after in[0] (u64) us
 *   segv, quit, stuck (until killed)         plain     echo, rFaaS' ABI
 *   event     echo, as an event              grumble   an error, as an event
 *   refused   can't be bound                 (any other name: can't be loaded)
 *   pattern   object {n, seed} -> n bytes    complain  the same as an error text
 *   gate      echo once the gate of the number in[0] (u32) is open
 *   stamp     out[0] is a u64 that is one more at each call
 */

#endif

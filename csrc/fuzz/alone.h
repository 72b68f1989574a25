/*
 * Included before everything else in whatever a fuzz target is made of: one
 * thread does everything, and time passes only where somebody waits. So a run
 * depends on its input alone, and no wait costs anything.
 *
 * A thread that would be made is remembered; fuzz_turn() runs it until it would
 * sleep. Who sleeps meanwhile gives the others such a turn.
 */
#ifndef FUZZ_ALONE_H
#define FUZZ_ALONE_H

#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

int  fuzz_thread(pthread_t *id, const pthread_attr_t *attr,
                 void *(*main)(void *), void *arg);
int  fuzz_join(pthread_t id, void **result);
int  fuzz_epoll(int fd, struct epoll_event *events, int n, int timeout_ms);
int  fuzz_poll(struct pollfd *p, nfds_t n, int timeout_ms);
int  fuzz_sleep(const struct timespec *ts, struct timespec *left);
int  fuzz_clock(clockid_t id, struct timespec *ts);
long fuzz_syscall(long number, ...);

#define pthread_create         fuzz_thread
#define pthread_join           fuzz_join
#define pthread_setname_np(t, name) ((void)(t), (void)(name))
#define epoll_wait             fuzz_epoll
#define poll                   fuzz_poll
#define nanosleep              fuzz_sleep
#define clock_gettime          fuzz_clock
#define syscall                fuzz_syscall

#endif

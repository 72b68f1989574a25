/* Process 1 of the RDMA guest: makes a root file system out of the host's, runs
 * one command there, says how it ended and switches the machine off.
 *
 *   /order, /modules/         kernel modules, in the order to load them
 *   /job/argv env cwd         the command; strings that end in NUL
 *   /job/writable             directories that are written through, likewise
 *   /job/network              shell script that makes the devices
 *
 *   port "control"            "failed TEXT" | "started" ... "exit N" | "signal N"
 *   ports "out", "err"        what the command prints
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NINEP "trans=virtio,version=9p2000.L,msize=262144,"
/* What the command leaves running may hold its output open; it gets this long. */
#define LINGER_MS 500

static int control = -1;

static void switch_off(void)
{
    sync();
    reboot(RB_POWER_OFF);
    for (;;) {
        pause();
    }
}

static void say(const char *format, ...)
{
    va_list args;

    if (control < 0) {
        return;
    }
    va_start(args, format);
    vdprintf(control, format, args);
    va_end(args);
}

/* Ends the machine; the reason goes to the harness, or to the console if the
 * way there does not exist yet. */
__attribute__((format(printf, 1, 2), noreturn))
static void fail(const char *format, ...)
{
    const char *why = strerror(errno);
    char text[512];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    printf("guest: %s: %s\n", text, why);
    fflush(stdout);
    say("failed %s: %s\n", text, why);
    switch_off();
    _exit(1);
}

/* A whole file with a NUL behind it. */
static char *slurp(const char *path, size_t *length_p)
{
    size_t room = 4096, length = 0;
    char *text = malloc(room);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got;

    if ((fd < 0) || (text == NULL)) {
        fail("%s", path);
    }
    while ((got = read(fd, text + length, room - length - 1)) > 0) {
        length += (size_t)got;
        if (room - length < 2) {
            room *= 2;
            text = realloc(text, room);
            if (text == NULL) {
                fail("%s", path);
            }
        }
    }
    if (got < 0) {
        fail("%s", path);
    }
    close(fd);
    text[length] = '\0';
    if (length_p != NULL) {
        *length_p = length;
    }
    return text;
}

/* The strings of a file in which each ends in NUL; a NULL follows the last. */
static char **strings(const char *path)
{
    size_t length, count = 0;
    char *text = slurp(path, &length);
    char **list = calloc(length + 1, sizeof(*list));

    if (list == NULL) {
        fail("%s", path);
    }
    for (char *at = text; at < text + length; at += strlen(at) + 1) {
        list[count++] = at;
    }
    return list;
}

static void put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);

    if ((fd < 0) || (write(fd, text, strlen(text)) < 0)) {
        fail("%s", path);
    }
    close(fd);
}

static void attach(const char *what, const char *where, const char *type,
                   unsigned long flags, const char *options)
{
    if ((mkdir(where, 0755) != 0) && (errno != EEXIST)) {
        fail("mkdir %s", where);
    }
    if (mount(what, where, type, flags, options) != 0) {
        fail("mount %s on %s", what, where);
    }
}

static void load_modules(void)
{
    char path[256];
    char *list = slurp("/order", NULL);

    for (char *name = strtok(list, "\n"); name; name = strtok(NULL, "\n")) {
        snprintf(path, sizeof(path), "/modules/%s", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if ((fd < 0) || (syscall(SYS_finit_module, fd, "", 0) != 0)) {
            /* Some are for other processors; what matters is missed later. */
            printf("guest: module %s: %s\n", name, strerror(errno));
        }
        close(fd);
    }
}

static int open_port(const char *wanted)
{
    static const char *ports = "/sys/class/virtio-ports";
    struct dirent *entry;
    char path[512], name[64];
    int found = -1;
    DIR *dir = opendir(ports);

    while ((dir != NULL) && (found < 0) && ((entry = readdir(dir)) != NULL)) {
        snprintf(path, sizeof(path), "%s/%s/name", ports, entry->d_name);
        FILE *file = fopen(path, "re");
        if (file == NULL) {
            continue;
        }
        if (fgets(name, sizeof(name), file) != NULL) {
            name[strcspn(name, "\n")] = '\0';
            if (strcmp(name, wanted) == 0) {
                snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
                found = open(path, O_WRONLY | O_CLOEXEC);
            }
        }
        fclose(file);
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return found;
}

/* Ports appear a moment after the driver that finds them. */
static int wait_for_port(const char *name)
{
    const struct timespec moment = {.tv_nsec = 5000000};
    int fd;

    for (int tries = 0; tries < 2000; tries++) {
        fd = open_port(name);
        if (fd >= 0) {
            return fd;
        }
        nanosleep(&moment, NULL);
    }
    fail("no virtio port %s", name);
}

/* The host's files below, the guest's memory above: everything can be written,
 * nothing of it reaches the host. */
static void build_root(void)
{
    attach("host", "/host", "9p", MS_RDONLY, NINEP "cache=loose");
    attach("upper", "/upper", "tmpfs", 0, "size=75%");
    if ((mkdir("/upper/files", 0755) != 0) ||
        (mkdir("/upper/work", 0755) != 0)) {
        fail("mkdir /upper");
    }
    attach("root", "/root", "overlay", 0,
           "lowerdir=/host,upperdir=/upper/files,workdir=/upper/work");
}

/* Into the new root, by moving it onto the old one: a process that merely had
 * its root changed could not make user namespaces. */
static void enter_root(void)
{
    if ((chdir("/root") != 0) || (mount(".", "/", NULL, MS_MOVE, NULL) != 0) ||
        (chroot(".") != 0) || (chdir("/") != 0)) {
        fail("entering the new root");
    }
}

static void fill_root(char **writable)
{
    static const char *const links[][2] = {
        {"/proc/self/fd", "/dev/fd"},
        {"/proc/self/fd/0", "/dev/stdin"},
        {"/proc/self/fd/1", "/dev/stdout"},
        {"/proc/self/fd/2", "/dev/stderr"},
    };
    char tag[16];

    attach("proc", "/proc", "proc", 0, "");
    attach("sys", "/sys", "sysfs", 0, "");
    attach("debug", "/sys/kernel/debug", "debugfs", 0, "");
    attach("cgroup", "/sys/fs/cgroup", "cgroup2", 0, "nsdelegate");
    attach("dev", "/dev", "devtmpfs", 0, "");
    attach("pts", "/dev/pts", "devpts", 0, "mode=620,ptmxmode=666");
    attach("shm", "/dev/shm", "tmpfs", 0, "mode=1777");
    attach("run", "/run", "tmpfs", 0, "mode=755");
    if ((mkdir("/run/lock", 01777) != 0) || (mkdir("/run/netns", 0755) != 0)) {
        fail("mkdir /run");
    }
    for (size_t i = 0; i < sizeof(links) / sizeof(links[0]); i++) {
        if ((symlink(links[i][0], links[i][1]) != 0) && (errno != EEXIST)) {
            fail("%s", links[i][1]);
        }
    }
    for (int i = 0; writable[i] != NULL; i++) {
        snprintf(tag, sizeof(tag), "rw%d", i);
        if (mount(tag, writable[i], "9p", 0, NINEP "cache=none") != 0) {
            fail("mount %s", writable[i]);
        }
    }
}

/* All controllers for the groups that tests make. */
static void delegate_controllers(void)
{
    char change[64];
    char *list = slurp("/sys/fs/cgroup/cgroup.controllers", NULL);

    for (char *name = strtok(list, " \n"); name; name = strtok(NULL, " \n")) {
        snprintf(change, sizeof(change), "+%s", name);
        put("/sys/fs/cgroup/cgroup.subtree_control", change);
    }
}

/* The scheduler turns to another thread soon. Programs that poll fill the
 * processors; with the usual slices, the kernel's own threads that move rxe's
 * packets would wait some milliseconds for their turn. */
static void shorten_slices(void)
{
    static const char *const settings[][2] = {
        {"latency_ns", "400000"},
        {"min_granularity_ns", "100000"},
        {"wakeup_granularity_ns", "100000"},
        {"base_slice_ns", "100000"},
    };
    char path[64];

    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        snprintf(path, sizeof(path), "/sys/kernel/debug/sched/%s",
                 settings[i][0]);
        if (access(path, W_OK) == 0) { /* which there are depends on its age */
            put(path, settings[i][1]);
        }
    }
}

static void make_devices(char *script)
{
    char *const argv[] = {"sh", "-euc", script, NULL};
    char *const env[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL};
    int status = -1;
    pid_t child = fork();

    if (child == 0) {
        execve("/bin/sh", argv, env);
        printf("guest: /bin/sh: %s\n", strerror(errno));
        _exit(127);
    }
    if ((child < 0) || (waitpid(child, &status, 0) != child) || (status != 0)) {
        errno = ENODEV;
        fail("the network script ended with status %#x", (unsigned)status);
    }
}

static pid_t start(char **argv, char **env, const char *cwd, int out, int err)
{
    const struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
    sigset_t none;
    pid_t child = fork();

    if (child != 0) {
        return child;
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    int null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    dup2(out, 1);
    dup2(err, 2);
    close(null);
    if (setrlimit(RLIMIT_MEMLOCK, &all) != 0) {
        dprintf(2, "guest: memlock limit: %s\n", strerror(errno));
        _exit(126);
    }
    if (chdir(cwd) != 0) {
        dprintf(2, "guest: %s: %s\n", cwd, strerror(errno));
        _exit(126);
    }
    environ = env;
    execvp(argv[0], argv);
    dprintf(2, "guest: %s: %s\n", argv[0], strerror(errno));
    _exit((errno == ENOENT) ? 127 : 126);
}

static bool pass_on(int from, int to)
{
    char buffer[65536];
    ssize_t got = read(from, buffer, sizeof(buffer));

    for (ssize_t done = 0; done < got;) {
        ssize_t put_now = write(to, buffer + done, (size_t)(got - done));
        if (put_now < 0) {
            return false;
        }
        done += put_now;
    }
    return got > 0;
}

static long now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Passes output on until the command has ended and its output too; returns the
 * command's wait status. Orphans of others are collected on the way. A harness
 * that is gone hangs up the control port: nobody waits for us any more. */
static int attend(pid_t child, int signals, struct pollfd *from, const int *to)
{
    struct signalfd_siginfo news;
    bool ended = false;
    int status, result = 0;
    long until = 0;
    pid_t pid;

    for (;;) {
        long left = ended ? until - now_ms() : -1;
        if (ended && ((left <= 0) || ((from[0].fd < 0) && (from[1].fd < 0)))) {
            return result;
        }
        from[2] = (struct pollfd){.fd = signals, .events = POLLIN};
        from[3] = (struct pollfd){.fd = control};
        if (poll(from, 4, (int)left) < 0) {
            fail("poll");
        }
        if (from[3].revents & POLLHUP) {
            switch_off();
        }
        for (int i = 0; i < 2; i++) {
            if (from[i].revents && !pass_on(from[i].fd, to[i])) {
                close(from[i].fd);
                from[i].fd = -1;
            }
        }
        if (from[2].revents &&
            (read(signals, &news, sizeof(news)) == sizeof(news))) {
            while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
                if (pid == child) {
                    ended = true;
                    result = status;
                    until = now_ms() + LINGER_MS;
                }
            }
        }
    }
}

int main(void)
{
    struct pollfd from[4] = {{.events = POLLIN}, {.events = POLLIN}};
    int out[2], err[2], to[2], signals, status;
    sigset_t children;

    attach("proc", "/proc", "proc", 0, "");
    attach("sys", "/sys", "sysfs", 0, "");
    attach("dev", "/dev", "devtmpfs", 0, "");
    load_modules();
    control = wait_for_port("control");
    to[0] = wait_for_port("out");
    to[1] = wait_for_port("err");

    char **argv = strings("/job/argv"), **env = strings("/job/env");
    char *cwd = slurp("/job/cwd", NULL), *network = slurp("/job/network", NULL);
    char **writable = strings("/job/writable");
    build_root();
    enter_root();
    fill_root(writable);
    delegate_controllers();
    shorten_slices();
    make_devices(network);

    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    signals = signalfd(-1, &children, SFD_CLOEXEC);
    if ((signals < 0) || (pipe2(out, O_CLOEXEC) != 0) ||
        (pipe2(err, O_CLOEXEC) != 0)) {
        fail("pipes");
    }
    say("started\n");
    pid_t child = start(argv, env, cwd, out[1], err[1]);
    if (child < 0) {
        fail("fork");
    }
    close(out[1]);
    close(err[1]);
    from[0].fd = out[0];
    from[1].fd = err[0];
    status = attend(child, signals, from, to);
    if (WIFSIGNALED(status)) {
        say("signal %d\n", WTERMSIG(status));
    } else {
        say("exit %d\n", WEXITSTATUS(status));
    }
    switch_off();
    return 0;
}

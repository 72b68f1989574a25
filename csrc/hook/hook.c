/* Slurm's Prolog and Epilog on a node whose spare cores are lent: has the agent
 * take all of them back before a job starts, and lend again after it.
 *
 *     rfaas-hook [prolog | epilog [DIRECTORY]]
 *
 *     "prolog JOB UID\n" -> DIRECTORY/socket -> "free\n", once nothing is lent
 *     "epilog JOB UID\n" -> DIRECTORY/socket
 *     no answer within 200 ms: what DIRECTORY/groups names is killed here
 *
 * From its Prolog to its Epilog there is a file DIRECTORY/starting-JOB: an agent
 * that begins meanwhile knows by it what it was not told. Of a job whose Epilog
 * Slurm never ran the next job's hook removes it.
 *
 * A job waits for this, and Slurm drains a node whose Prolog fails: it calls
 * nothing, bounds its time, and always exits 0.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define ANSWER_MS 200
#define END_MS    2000
#define HOLD_S    60            /* no agent waits longer for a job's group */
#define NOTE      "starting-"
#define DIRECTORY "/run/rfaas-hook"
#define OURS      "rfaas-"

/* What the agent has written when it started, and no user may change:
 *
 *     group PREFIX        groups whose path begins so are what runs for others
 *     agent PID START     whose end is that of all it started
 */
static char g_groups[16384];

static long now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void rest(void)
{
    const struct timespec pause = {0, 1000000};

    nanosleep(&pause, NULL);
}

/* A number as Slurm gave it, or "0": it goes into a line of others' words. */
static const char *number(const char *name)
{
    const char *text = getenv(name);

    if ((text == NULL) || (*text == '\0') || (strlen(text) > 20) ||
        (text[strspn(text, "0123456789")] != '\0')) {
        return "0";
    }
    return text;
}

/* The agent's socket, or -1. Waits for nobody. */
static int dial(const char *directory)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int                length, fd;

    length = snprintf(address.sun_path, sizeof(address.sun_path), "%s/socket",
                      directory);
    if ((length < 0) || ((size_t)length >= sizeof(address.sun_path))) {
        return -1;
    }

    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return -1;
    }

    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Whether the agent says that nothing is lent any more. */
static int hears_free(int fd, long until)
{
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    char          answer[8];
    size_t        have = 0;
    ssize_t       got;
    long          left;

    while (have < 5) {
        left = until - now_ms();
        if (left <= 0) {
            return 0;
        }

        if ((poll(&ready, 1, (int)left) < 0) && (errno != EINTR)) {
            return 0;
        }

        got = recv(fd, answer + have, sizeof(answer) - have, 0);
        if (got > 0) {
            have += (size_t)got;
        } else if ((got == 0) || ((errno != EAGAIN) && (errno != EINTR))) {
            return 0;
        }
    }
    return memcmp(answer, "free\n", 5) == 0;
}

/* Whether the agent has done what there is to do. */
static int told(const char *directory, const char *what, int waits, long until)
{
    char line[64];
    int  fd, length, done;

    fd = dial(directory);
    if (fd < 0) {
        return 0;
    }

    length = snprintf(line, sizeof(line), "%s %s %s\n", what,
                      number("SLURM_JOB_ID"), number("SLURM_JOB_UID"));
    done = send(fd, line, (size_t)length, MSG_NOSIGNAL) == length;
    if (done && waits) {
        done = hears_free(fd, until);
    }
    close(fd);
    return done;
}

/* Reads a file to its end, or as much as fits. */
static int read_all(int dir, const char *path, char *text, size_t size)
{
    size_t  have = 0;
    ssize_t got;
    int     fd;

    fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return -1;
    }

    while (have + 1 < size) {
        got = read(fd, text + have, size - have - 1);
        if (got <= 0) {
            break;
        }
        have += (size_t)got;
    }
    close(fd);
    text[have] = '\0';
    return 0;
}

/* The agent's list, if it is root's (or ours) and nobody else can write it. */
static int read_groups(const char *directory)
{
    struct stat facts;
    char        path[PATH_MAX];
    int         length;

    length = snprintf(path, sizeof(path), "%s/groups", directory);
    if ((length < 0) || ((size_t)length >= sizeof(path)) ||
        (lstat(path, &facts) != 0) || !S_ISREG(facts.st_mode) ||
        ((facts.st_uid != 0) && (facts.st_uid != geteuid())) ||
        ((facts.st_mode & (S_IWGRP | S_IWOTH)) != 0)) {
        return -1;
    }
    return read_all(AT_FDCWD, path, g_groups, sizeof(g_groups));
}

static int write_to(int dir, const char *name, const char *text)
{
    ssize_t put;
    int     fd;

    fd = openat(dir, name, O_WRONLY | O_CLOEXEC);
    if (fd < 0) {
        return -1;
    }

    put = write(fd, text, strlen(text));
    close(fd);
    return (put < 0) ? -1 : 0;
}

/* SIGKILL for all that is in a group; how many there were. */
static int kill_members(int group)
{
    static char text[65536];
    char       *at, *end;
    long        pid;
    int         count = 0;

    if (read_all(group, "cgroup.procs", text, sizeof(text)) != 0) {
        return 0;
    }

    for (at = text; ; at = end) {
        pid = strtol(at, &end, 10);
        if (end == at) {
            return count;
        }

        /* 0 is one that our namespace doesn't see, and kill(0) would be us. */
        if (pid > 1) {
            kill((pid_t)pid, SIGKILL);
            count++;
        }
    }
}

/* Ends a group's processes: at once in version 2, in version 1 one by one; the
 * pids controller, where it counts them, lets no other one begin. */
static int kill_group(int parent, const char *name)
{
    int group, count;

    group = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW |
                   O_CLOEXEC);
    if (group < 0) {
        return 0;
    }

    write_to(group, "pids.max", "0");
    /* With low priority it might not come to its end while others run. */
    write_to(group, "cpu.idle", "0");
    write_to(group, "cpu.shares", "1024");
    write_to(group, "cpu.weight", "100");
    write_to(group, "cgroup.kill", "1");
    count = kill_members(group);
    close(group);
    return count;
}

/* Kills in all groups whose path begins so; how many processes there were. */
static int kill_groups(const char *prefix)
{
    char           parent[PATH_MAX];
    struct dirent *entry;
    const char    *name;
    size_t         length;
    DIR           *directory;
    int            count = 0;

    name = strrchr(prefix, '/');
    if ((prefix[0] != '/') || (name == prefix) ||
        (strncmp(name + 1, OURS, strlen(OURS)) != 0)) {
        return 0;
    }

    length = (size_t)(name - prefix);
    if (length >= sizeof(parent)) {
        return 0;
    }

    memcpy(parent, prefix, length);
    parent[length] = '\0';
    name++;
    directory = opendir(parent);
    if (directory == NULL) {
        return 0;
    }

    while ((entry = readdir(directory)) != NULL) {
        if (strncmp(entry->d_name, name, strlen(name)) == 0) {
            count += kill_group(dirfd(directory), entry->d_name);
        }
    }
    closedir(directory);
    return count;
}

/* Ends the agent, if it still is the process that it was. */
static int kill_agent(const char *pid_and_start)
{
    char               path[64], stat[1024], *at, *end;
    unsigned long long start;
    long               pid;
    int                field;

    pid = strtol(pid_and_start, &end, 10);
    start = strtoull(end, NULL, 10);
    snprintf(path, sizeof(path), "/proc/%ld/stat", pid);
    if ((pid <= 1) || (read_all(AT_FDCWD, path, stat, sizeof(stat)) != 0)) {
        return 0;
    }

    /* Its name may hold anything, blanks and brackets too. */
    at = strrchr(stat, ')');
    for (field = 2; (at != NULL) && (field < 22); field++) {
        at = strchr(at + 1, ' ');
    }
    if ((at == NULL) || (strtoull(at, NULL, 10) != start)) {
        return 0;
    }

    kill((pid_t)pid, SIGKILL);
    return 1;
}

/* One round of what the agent didn't do; how much there was still to kill. */
static int take_back(void)
{
    char *line, *next, text[sizeof(g_groups)], *agent = NULL;
    int   groups = 0, count = 0;

    memcpy(text, g_groups, sizeof(text));
    for (line = strtok_r(text, "\n", &next); line != NULL;
         line = strtok_r(NULL, "\n", &next)) {
        if (strncmp(line, "group ", 6) == 0) {
            count += kill_groups(line + 6);
            groups++;
        } else if (strncmp(line, "agent ", 6) == 0) {
            agent = line + 6;
        }
    }

    /* Where its workers are in no group they end with it. */
    if ((groups == 0) && (agent != NULL)) {
        kill_agent(agent);
    }
    return count;
}

/* slurmd may have been killed as a job ended: it then runs no Epilog of it. */
static void forget(int dir)
{
    struct dirent *entry;
    struct stat    facts;
    DIR           *all;
    int            copy = fcntl(dir, F_DUPFD_CLOEXEC, 0);

    all = (copy >= 0) ? fdopendir(copy) : NULL;
    if (all == NULL) {
        if (copy >= 0) {
            close(copy);
        }
        return;
    }

    while ((entry = readdir(all)) != NULL) {
        if ((strncmp(entry->d_name, NOTE, strlen(NOTE)) == 0) &&
            (fstatat(dir, entry->d_name, &facts, AT_SYMLINK_NOFOLLOW) == 0) &&
            (facts.st_mtime + HOLD_S < time(NULL))) {
            unlinkat(dir, entry->d_name, 0);
        }
    }
    closedir(all);
}

/* For an agent that begins while the job does. Where others may write there
 * nothing is said: they could have made the file another one's. */
static void note(const char *directory, int starts)
{
    struct stat facts;
    const char *job = number("SLURM_JOB_ID");
    char        name[64];
    int         dir, fd;

    dir = open(directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0) {
        return;
    }

    if ((fstat(dir, &facts) == 0) && (facts.st_uid == geteuid()) &&
        ((facts.st_mode & (S_IWGRP | S_IWOTH)) == 0) &&
        (strcmp(job, "0") != 0)) {
        snprintf(name, sizeof(name), NOTE "%s", job);
        if (!starts) {
            unlinkat(dir, name, 0);
        } else if ((fd = openat(dir, name, O_WRONLY | O_CREAT | O_NOFOLLOW |
                                O_NONBLOCK | O_CLOEXEC, 0644)) >= 0) {
            futimens(fd, NULL);     /* it may be there, of its first time */
            close(fd);
        }
        forget(dir);
    }
    close(dir);
}

/* By its words; without them as Slurm says, else by the program's name. */
static int is_epilog(int argc, char **argv)
{
    const char *what = getenv("SLURM_SCRIPT_CONTEXT");
    const char *name;

    if (argc > 1) {
        what = argv[1];
    } else if (what == NULL) {
        name = (argc > 0) ? strrchr(argv[0], '/') : NULL;
        what = (name != NULL) ? name + 1 : "";
    }
    return strncmp(what, "epilog", 6) == 0;
}

int main(int argc, char **argv)
{
    const char *directory = (argc > 2) ? argv[2] : DIRECTORY;
    long        begun     = now_ms();

    if (is_epilog(argc, argv)) {
        note(directory, 0);
        told(directory, "epilog", 0, begun);
        return 0;
    }

    note(directory, 1);
    if (told(directory, "prolog", 1, begun + ANSWER_MS) ||
        (read_groups(directory) != 0)) {
        return 0;
    }

    begun = now_ms();
    while ((take_back() > 0) && (now_ms() - begun < END_MS)) {
        rest();
    }
    return 0;
}

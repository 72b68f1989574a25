/*
 * What the node agent reads many times a second: the masks of all tasks in
 * some cgroups, and what each CPU has done. A library of its own, no part of
 * the data plane.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WORDS_MOST 128 /* of a mask: 8192 CPUs */

struct masks {
    uint64_t *all;
    size_t    words;
    int64_t   tasks;
};

static void add_task(struct masks *masks, uint64_t tid)
{
    uint64_t mask[WORDS_MOST];
    size_t i;
    long got;

    /* 0 stands for a task that another pid namespace hides from us. */
    got = (tid == 0) ? -1 :
          syscall(SYS_sched_getaffinity, (pid_t)tid,
                  masks->words * sizeof(mask[0]), mask);
    if ((got < 0) && (tid != 0) && (errno == ESRCH)) {
        return;
    }

    masks->tasks++;
    if (got < 0) {
        memset(masks->all, 0xff, masks->words * sizeof(mask[0]));
        return;
    }

    for (i = 0; i < (size_t)got / sizeof(mask[0]); i++) {
        masks->all[i] |= mask[i];
    }
}

static int add_list(struct masks *masks, const char *path)
{
    char text[4096];
    bool digits = false;
    uint64_t tid = 0;
    ssize_t got, i;
    int fd, error = 0;

    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return (errno == ENOENT) ? 0 : -errno;
    }

    while ((got = read(fd, text, sizeof(text))) > 0) {
        for (i = 0; i < got; i++) {
            if ((text[i] >= '0') && (text[i] <= '9')) {
                tid    = tid * 10 + (uint64_t)(text[i] - '0');
                digits = true;
            } else if (digits) {
                add_task(masks, tid);
                tid    = 0;
                digits = false;
            }
        }
    }
    if (got < 0) {
        error = errno;
    }
    close(fd);
    if (digits) {
        add_task(masks, tid);
    }
    /* ENODEV: the group was removed while we read. */
    return ((error == 0) || (error == ENODEV)) ? 0 : -error;
}

/*
 * Adds the masks of all tasks that the files list to `all`. The paths follow
 * each other, each ended by a 0, an empty one after the last. Returns how many
 * tasks there are, or a negative errno. A file that is gone lists nobody; a
 * task whose mask can't be read may run anywhere.
 */
__attribute__((visibility("default")))
int64_t rfm_read_masks(const char *paths, uint64_t *all, size_t words)
{
    struct masks masks = {.all = all, .words = words, .tasks = 0};
    int error;

    if (words > WORDS_MOST) {
        return -EINVAL;
    }

    for (; *paths != '\0'; paths += strlen(paths) + 1) {
        error = add_list(&masks, paths);
        if (error < 0) {
            return error;
        }
    }
    return masks.tasks;
}

/*
 * The CPUs of /proc/stat and the ticks in which each did something: user,
 * nice, system, irq, softirq and steal, which is what other guests take.
 * `text` is its text, ended by a 0. Returns how many CPUs, at most `most`.
 */
__attribute__((visibility("default")))
int64_t rfm_read_ticks(const char *text, int64_t *cpus, int64_t *busy,
                       size_t most)
{
    static const bool counts[] = {true, true, true, false, false, true, true,
                                  true};
    int64_t numbers[9], number;
    size_t found = 0, column;

    /* The first line is of all CPUs. */
    while ((found < most) && ((text = strchr(text, '\n')) != NULL)
           && (strncmp(text, "\ncpu", 4) == 0)) {
        text += 4;
        memset(numbers, 0, sizeof(numbers));
        for (column = 0; (column < 9) && (*text >= '0') && (*text <= '9');
             column++) {
            for (number = 0; (*text >= '0') && (*text <= '9'); text++) {
                number = number * 10 + (*text - '0');
            }
            numbers[column] = number;
            text += (*text == ' ');
        }
        cpus[found] = numbers[0];
        busy[found] = 0;
        for (column = 0; column < 8; column++) {
            if (counts[column]) {
                busy[found] += numbers[column + 1];
            }
        }
        found++;
    }
    return (int64_t)found;
}

/*
 * One sample of the rule of idle cores, for `count` CPUs: what it says of each
 * lies in `ready` (the number of the sample after which it may be idle), `used`
 * (ticks since it was last loud), `murmured` (more than a little in the last
 * sample) and `idle`. `owner` are the ticks of this sample that its owner used.
 * Writes 1 to `news` where an idle CPU is so no longer, 2 where one may become
 * so, else 0; returns how many aren't 0.
 */
__attribute__((visibility("default")))
int64_t rfm_quiet_sample(const double *owner, size_t count, double loud,
                         double murmur, int64_t number, int64_t wait,
                         int64_t *ready, double *used, uint8_t *murmured,
                         const uint8_t *idle, uint8_t *news)
{
    int64_t found = 0;
    bool murmurs, is_loud;
    size_t i;

    for (i = 0; i < count; i++) {
        murmurs     = (owner[i] > murmur);
        is_loud     = (owner[i] > loud) || (murmurs && murmured[i]);
        murmured[i] = murmurs;
        news[i]     = 0;
        if (is_loud) {
            used[i]  = 0;
            ready[i] = number + wait;
            news[i]  = idle[i];
        } else {
            used[i] += owner[i];
            if (ready[i] <= number) {
                news[i] = 2;
            }
        }
        found += (news[i] != 0);
    }
    return found;
}

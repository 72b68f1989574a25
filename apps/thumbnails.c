/* Thumbnails of windows of photographs, by the mean of the area that each pixel covers. */

#include <rfm_call.h>
#include <stddef.h>
#include <string.h>

/* What a row of the jobs is; thumbnails.py has the same names. */
enum { OFFSET, STRIDE, HEIGHT, WIDTH, CHANNELS, JOB = 8 };

#define MOST_SIDE     1024
#define MOST_CHANNELS 3

/* Of the longer sides. All of a window's thumbnails are in one row. */
static const uint64_t edges[] = {160, 96, 48};
#define EDGES (sizeof(edges) / sizeof(edges[0]))

static uint64_t least(uint64_t a, uint64_t b)
{
    return (a < b) ? a : b;
}

static uint64_t room(uint64_t edge)
{
    return edge * edge * MOST_CHANNELS;
}

static uint64_t scaled(uint64_t side, uint64_t edge, uint64_t longer)
{
    const uint64_t to = (2 * side * edge + longer) / (2 * longer);

    return (to == 0) ? 1 : to;
}

/*
 * `from` pixels become `to`, on a ruler with from * to marks: the first pixel
 * that pixel j covers a part of, and how much it covers of pixel i.
 */
static uint64_t first(uint64_t j, uint64_t from, uint64_t to)
{
    return j * from / to;
}

static uint32_t covered(uint64_t i, uint64_t j, uint64_t from, uint64_t to)
{
    const uint64_t low = (i * to > j * from) ? i * to : j * from;

    return (uint32_t)(least((i + 1) * to, (j + 1) * from) - low);
}

static void shrink(const uint8_t *pixels, const uint64_t *job, uint64_t height,
                   uint64_t width, uint8_t *out)
{
    const uint64_t channels = job[CHANNELS];
    const uint64_t line     = job[WIDTH] * channels;
    const uint64_t area     = job[HEIGHT] * job[WIDTH];
    uint32_t sums[MOST_SIDE * MOST_CHANNELS];

    for (uint64_t y = 0; y < height; y++) {
        memset(sums, 0, line * sizeof(*sums));
        for (uint64_t i = first(y, job[HEIGHT], height);
             i * height < (y + 1) * job[HEIGHT]; i++) {
            const uint32_t part = covered(i, y, job[HEIGHT], height);
            const uint8_t *row  = pixels + i * job[STRIDE];

            for (uint64_t x = 0; x < line; x++) {
                sums[x] += part * row[x];
            }
        }
        for (uint64_t x = 0; x < width; x++) {
            uint64_t total[MOST_CHANNELS] = {0};

            for (uint64_t i = first(x, job[WIDTH], width);
                 i * width < (x + 1) * job[WIDTH]; i++) {
                const uint64_t part = covered(i, x, job[WIDTH], width);

                for (uint64_t c = 0; c < channels; c++) {
                    total[c] += part * sums[i * channels + c];
                }
            }
            for (uint64_t c = 0; c < channels; c++) {
                *out++ = (uint8_t)((2 * total[c] + area) / (2 * area));
            }
        }
    }
}

/*
 * inputs: pixels, uint8; jobs, int64[count][JOB]: where a window begins, bytes
 * from one of its lines to the next, its size. output: its thumbnails, one
 * after another with room for a square each, the rest zeros: uint8[count][].
 */
int32_t thumbnails_shrink(const struct rfm_call *call)
{
    const uint8_t *pixels;
    const uint64_t *job;
    uint8_t *out;
    uint64_t count;
    uint64_t size = 0;

    if ((call->n_in != 2) || (call->n_out != 1)) {
        return -1;
    }
    for (uint64_t i = 0; i < EDGES; i++) {
        size += room(edges[i]);
    }
    pixels = call->inputs[0].ptr;
    job    = call->inputs[1].ptr;
    out    = call->outputs[0].ptr;
    count  = call->inputs[1].size / (JOB * sizeof(*job));
    if (call->outputs[0].capacity < count * size) {
        return -2;
    }
    memset(out, 0, count * size);
    for (; count > 0; count--, job += JOB) {
        const uint64_t longer = job[HEIGHT] + job[WIDTH] -
                                least(job[HEIGHT], job[WIDTH]);

        if ((job[HEIGHT] == 0) || (job[WIDTH] == 0) || (longer > MOST_SIDE) ||
            (job[CHANNELS] == 0) || (job[CHANNELS] > MOST_CHANNELS) ||
            (job[STRIDE] > call->inputs[0].size) ||
            (job[OFFSET] > call->inputs[0].size) ||
            ((job[HEIGHT] - 1) * job[STRIDE] + job[WIDTH] * job[CHANNELS] >
             call->inputs[0].size - job[OFFSET])) {
            return -3;
        }
        for (uint64_t i = 0; i < EDGES; i++) {
            shrink(pixels + job[OFFSET], job,
                   scaled(job[HEIGHT], edges[i], longer),
                   scaled(job[WIDTH], edges[i], longer), out);
            out += room(edges[i]);
        }
    }
    call->outputs[0].size = call->inputs[1].size / (JOB * sizeof(*job)) * size;
    return 0;
}

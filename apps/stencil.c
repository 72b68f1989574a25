/* One iteration of a star-shaped stencil over some rows of a square grid. */

#include <rfm_call.h>
#include <stddef.h>

/* The largest radius that is compiled for. */
#define LARGEST 4

struct star {
    const double *weights;                  /* [2][2 * radius + 1]           */
    const double *rows[2 * LARGEST + 1];    /* row i - radius to i + radius  */
    uint64_t n;
};

/*
 * out is old and the star around each point that has room for it. Called with
 * a radius that the compiler knows, so that its loops are unrolled.
 */
static inline __attribute__((always_inline)) void
add_star(const struct star *star, const double *restrict old,
         double *restrict out, const uint64_t radius)
{
    const double *across = star->weights;
    const double *along  = star->weights + 2 * radius + 1;
    const double *row    = star->rows[radius];
    const uint64_t last  = star->n - radius;

    for (uint64_t j = radius; j < last; j++) {
        double sum = 0.0;

        for (uint64_t k = 1; k <= radius; k++) {
            sum += across[radius - k] * star->rows[radius - k][j] +
                   across[radius + k] * star->rows[radius + k][j];
            sum += along[radius - k] * row[j - k] +
                   along[radius + k] * row[j + k];
        }
        out[j] = old[j] + sum;
    }
}

#define RADIUS(r) case r: add_star(star, old, out, r); return

static void add_star_of(const struct star *star, const double *old,
                        double *out, uint64_t radius)
{
    switch (radius) {
        RADIUS(1);
        RADIUS(2);
        RADIUS(3);
        RADIUS(4);
    }
}

/*
 * inputs: the weights across rows and along them, float64[2][2 r + 1]; n and
 * which row of the whole grid the rank's first one is, int64[2]; the rows of
 * the sum so far, float64[count][n]; the same rows of the grid 2 r + 1 times,
 * from r rows above to r rows below, float64[count][n] each; which of the
 * rank's rows is the first one of these, int64.
 * outputs: the rows of the next sum, and those of the next grid, which is one
 * larger everywhere, float64[count][n] each.
 */
int32_t stencil_iteration(const struct rfm_call *call)
{
    const struct rfm_buf *in = call->inputs;
    const double *old;
    double *sum;
    double *next;
    struct star star;
    uint64_t radius;
    uint64_t first;
    uint64_t count;
    uint64_t n;

    if ((call->n_in < 7) || (call->n_out != 2) ||
        (in[1].size != 2 * sizeof(n)) ||
        (in[call->n_in - 1].size != sizeof(first))) {
        return -1;
    }
    radius = (call->n_in - 5) / 2;
    n      = ((const uint64_t *)in[1].ptr)[0];
    first  = ((const uint64_t *)in[1].ptr)[1] +
             *(const uint64_t *)in[call->n_in - 1].ptr;
    if ((radius > LARGEST) || (call->n_in != 2 * radius + 5) || (n == 0) ||
        (n < 2 * radius) ||
        (in[0].size != 2 * (2 * radius + 1) * sizeof(double))) {
        return -2;
    }
    count = in[2].size / sizeof(double) / n;
    for (uint64_t k = 0; k <= 2 * radius; k++) {
        if (in[3 + k].size < count * n * sizeof(double)) {
            return -3;
        }
    }
    for (uint32_t k = 0; k < 2; k++) {
        if (call->outputs[k].capacity < count * n * sizeof(double)) {
            return -4;
        }
        call->outputs[k].size = count * n * sizeof(double);
    }

    old          = in[2].ptr;
    sum          = call->outputs[0].ptr;
    next         = call->outputs[1].ptr;
    star.weights = in[0].ptr;
    star.n       = n;
    for (uint64_t i = 0; i < count; i++) {
        for (uint64_t k = 0; k <= 2 * radius; k++) {
            star.rows[k] = (const double *)in[3 + k].ptr + i * n;
        }
        if ((first + i < radius) || (first + i >= n - radius)) {
            /* No room for the star. */
            for (uint64_t j = 0; j < n; j++) {
                sum[i * n + j] = old[i * n + j];
            }
        } else {
            for (uint64_t j = 0; j < radius; j++) {
                const uint64_t right = n - 1 - j;

                sum[i * n + j]     = old[i * n + j];
                sum[i * n + right] = old[i * n + right];
            }
            add_star_of(&star, old + i * n, sum + i * n, radius);
        }
        for (uint64_t j = 0; j < n; j++) {
            next[i * n + j] = star.rows[radius][j] + 1.0;
        }
    }
    return 0;
}

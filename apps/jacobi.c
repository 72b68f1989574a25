/* One sweep of Jacobi's method over some rows of a dense matrix. */

#include <rfm_call.h>
#include <stddef.h>

/* Sums side by side: vectors without another order of summation. */
#define LANES 8

static double dot(const double *a, const double *x, uint64_t n)
{
    double sums[LANES] = {0.0};
    double sum         = 0.0;
    uint64_t j         = 0;

    for (; j + LANES <= n; j += LANES) {
        for (uint64_t lane = 0; lane < LANES; lane++) {
            sums[lane] += a[j + lane] * x[j + lane];
        }
    }
    for (; j < n; j++) {
        sum += a[j] * x[j];
    }
    for (uint64_t lane = 0; lane < LANES; lane++) {
        sum += sums[lane];
    }
    return sum;
}

/*
 * inputs: the rank's rows of the matrix, float64[m][n]; x, float64[n]; b of
 * the rows wanted, float64[count]; which row of the whole matrix the rank's
 * first one is, int64; which of the rank's rows is the first one wanted, int64.
 * output: those rows of the next x, float64[count].
 *
 * A row's bits depend on that row alone, not on which others are wanted.
 */
int32_t jacobi_sweep(const struct rfm_call *call)
{
    const double *matrix;
    const double *x;
    const double *b;
    double *next;
    uint64_t low;
    uint64_t first;
    uint64_t n;
    uint64_t m;
    uint64_t count;

    if ((call->n_in != 5) || (call->n_out != 1) ||
        (call->inputs[1].size < sizeof(*x)) ||
        (call->inputs[3].size != sizeof(low)) ||
        (call->inputs[4].size != sizeof(first))) {
        return -1;
    }
    low   = *(const uint64_t *)call->inputs[3].ptr;
    first = *(const uint64_t *)call->inputs[4].ptr;
    n     = call->inputs[1].size / sizeof(*x);
    m     = call->inputs[0].size / sizeof(*matrix) / n;
    count = call->inputs[2].size / sizeof(*b);
    if ((m > n) || (low > n - m) || (count > m) || (first > m - count) ||
        (call->outputs[0].capacity < count * sizeof(*next))) {
        return -2;
    }
    matrix = call->inputs[0].ptr;
    x      = call->inputs[1].ptr;
    b      = call->inputs[2].ptr;
    next   = call->outputs[0].ptr;
    for (uint64_t i = 0; i < count; i++) {
        const double *row   = matrix + (first + i) * n;
        const uint64_t self = low + first + i;

        next[i] = x[self] + (b[i] - dot(row, x, n)) / row[self];
    }
    call->outputs[0].size = count * sizeof(*next);
    return 0;
}

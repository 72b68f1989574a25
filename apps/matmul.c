/* A dense matrix product without blocking: what costs as much as no BLAS. */

#include <rfm_call.h>
#include <stddef.h>

/*
 * inputs: a, float64[m][n]; b, float64[n][n]. output: c, float64[m][n].
 * n is what makes b square.
 */
int32_t matmul_naive(const struct rfm_call *call)
{
    const double *a;
    const double *b;
    double *c;
    uint64_t count;
    uint64_t n = 1;
    uint64_t m;

    if ((call->n_in != 2) || (call->n_out != 1)) {
        return -1;
    }
    count = call->inputs[1].size / sizeof(*b);
    while (n * n < count) {
        n++;
    }
    m = call->inputs[0].size / sizeof(*a) / n;
    if ((n * n != count) || (call->outputs[0].capacity < m * n * sizeof(*c))) {
        return -2;
    }
    a = call->inputs[0].ptr;
    b = call->inputs[1].ptr;
    c = call->outputs[0].ptr;
    for (uint64_t i = 0; i < m; i++) {
        double *row = c + i * n;

        for (uint64_t j = 0; j < n; j++) {
            row[j] = 0.0;
        }
        for (uint64_t k = 0; k < n; k++) {
            const double factor = a[i * n + k];

            for (uint64_t j = 0; j < n; j++) {
                row[j] += factor * b[k * n + j];
            }
        }
    }
    call->outputs[0].size = m * n * sizeof(*c);
    return 0;
}

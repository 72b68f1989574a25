/* One pass over some elements of four vectors: a <- a + b + s c. */

#include <rfm_call.h>
#include <stddef.h>

/*
 * inputs: s, float64[1]; the old a, b and c, float64[count] each.
 * output: the new a, float64[count].
 */
int32_t nstream_pass(const struct rfm_call *call)
{
    const double *restrict old;
    const double *restrict b;
    const double *restrict c;
    double *restrict a;
    double s;
    uint64_t size;

    if ((call->n_in != 4) || (call->n_out != 1) ||
        (call->inputs[0].size != sizeof(s))) {
        return -1;
    }
    size = call->inputs[1].size;
    if ((call->inputs[2].size != size) || (call->inputs[3].size != size) ||
        (call->outputs[0].capacity < size)) {
        return -2;
    }
    s   = *(const double *)call->inputs[0].ptr;
    old = call->inputs[1].ptr;
    b   = call->inputs[2].ptr;
    c   = call->inputs[3].ptr;
    a   = call->outputs[0].ptr;
    for (uint64_t i = 0; i < size / sizeof(*a); i++) {
        a[i] = old[i] + b[i] + s * c[i];
    }
    call->outputs[0].size = size;
    return 0;
}

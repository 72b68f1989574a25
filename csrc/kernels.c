/*
 * kernels.c: a small library of native kernels, for examples, benchmarks and
 * tests, built like a user's own: a plain shared library without Python.h.
 *
 * Build:  cc -std=c11 -O3 -fPIC -ffast-math -Wall -Wextra -c kernels.c
 *         cc -shared -o _native_kernels.so kernels.o -lm
 *
 * Compile with -ffast-math (only then does glibc declare the vector forms of
 * log, exp and erfc), but never link with it: gcc < 13 then adds start-up code
 * to the library that switches denormals off in the whole process that loads
 * it. -lm also brings libmvec. No -march: target_clones picks at load time.
 */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "rfm_call.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define RFM_WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RFM_WIDEST
#endif

/* Results that only an interval can hold: how a caller got the sizes wrong. */
#define RFM_KERNEL_INVALID (-EINVAL)
#define RFM_KERNEL_TOO_BIG (-EMSGSIZE)

/* ---- echo and scale ---------------------------------------------------- */

int32_t rfm_echo(const struct rfm_call *call)
{
    const struct rfm_buf *in;
    struct rfm_buf       *out;

    if ((call->n_in < 1) || (call->n_out < 1)) {
        return RFM_KERNEL_INVALID;
    }

    in  = &call->inputs[0];
    out = &call->outputs[0];
    if (in->size > out->capacity) {
        return RFM_KERNEL_TOO_BIG;
    }

    memcpy(out->ptr, in->ptr, in->size);
    out->size = in->size;
    return 0;
}

uint32_t rfm_plain_echo(void *in, uint32_t size, void *out)
{
    memcpy(out, in, size);
    return size;
}

RFM_WIDEST
static void scale2(uint64_t n, const double *restrict x, double *restrict y)
{
    for (uint64_t i = 0; i < n; i++) {
        y[i] = 2.0 * x[i];
    }
}

int32_t rfm_scale2(const struct rfm_call *call)
{
    if ((call->n_in < 1) || (call->n_out < 1)) {
        return RFM_KERNEL_INVALID;
    }

    if (call->inputs[0].size > call->outputs[0].capacity) {
        return RFM_KERNEL_TOO_BIG;
    }

    scale2(call->inputs[0].size / sizeof(double), call->inputs[0].ptr,
           call->outputs[0].ptr);
    call->outputs[0].size = call->inputs[0].size;
    return 0;
}

/* ---- Black-Scholes ----------------------------------------------------- */

/*
 * Black and Scholes (1973), European options without dividends:
 *   d1 = (log(S/K) + (r + v^2/2) t) / (v sqrt(t)),  d2 = d1 - v sqrt(t)
 *   call = S N(d1) - K exp(-r t) N(d2),  put = K exp(-r t) N(-d2) - S N(-d1)
 * with N(x) = erfc(-x / sqrt(2)) / 2, which keeps its relative accuracy in the
 * tail where 1 + erf(x) loses it. With w = +1 (call) or -1 (put) both prices
 * are w (S N(w d1) - K exp(-r t) N(w d2)): no branch, so it vectorises.
 */
RFM_WIDEST
static void black_scholes(uint64_t n, const double *restrict spot,
                          const double *restrict strike,
                          const double *restrict rate,
                          const double *restrict volatility,
                          const double *restrict years,
                          const uint8_t *restrict put, double *restrict price)
{
    const double half_root = 0.70710678118654752440;

    for (uint64_t i = 0; i < n; i++) {
        double w        = (put[i] != 0) ? -1.0 : 1.0;
        double spread   = volatility[i] * sqrt(years[i]);
        double d1       = (log(spot[i] / strike[i]) +
                           (rate[i] + 0.5 * volatility[i] * volatility[i]) *
                           years[i]) / spread;
        double d2       = d1 - spread;
        double discount = strike[i] * exp(-rate[i] * years[i]);

        price[i] = 0.5 * w * (spot[i] * erfc(-w * d1 * half_root) -
                              discount * erfc(-w * d2 * half_root));
    }
}

/*
 * Inputs: spot, strike, rate, volatility, years (float64[n] each, or one
 * float64[5][n]), then put (uint8[n]: 0 a call, else a put). Output: price,
 * float64[n].
 */
int32_t rfm_black_scholes(const struct rfm_call *call)
{
    const double  *column[5];
    const uint8_t *put;
    uint64_t       n;

    if (((call->n_in != 2) && (call->n_in != 6)) || (call->n_out != 1)) {
        return RFM_KERNEL_INVALID;
    }

    n   = call->inputs[call->n_in - 1].size;
    put = call->inputs[call->n_in - 1].ptr;
    if (n > call->outputs[0].capacity / sizeof(double)) {
        return RFM_KERNEL_TOO_BIG;
    }

    if (call->n_in == 2) {
        if (call->inputs[0].size != 5 * n * sizeof(double)) {
            return RFM_KERNEL_INVALID;
        }
        for (uint64_t i = 0; i < 5; i++) {
            column[i] = (const double *)call->inputs[0].ptr + i * n;
        }
    } else {
        for (uint64_t i = 0; i < 5; i++) {
            if (call->inputs[i].size != n * sizeof(double)) {
                return RFM_KERNEL_INVALID;
            }
            column[i] = call->inputs[i].ptr;
        }
    }

    black_scholes(n, column[0], column[1], column[2], column[3], column[4],
                  put, call->outputs[0].ptr);
    call->outputs[0].size = n * sizeof(double);
    return 0;
}

/* ---- sums, for tests of several outputs, constants and scratch ---------- */

/* Output 0: sum of all float64 inputs and constants; output 1: their count. */
int32_t rfm_sum(const struct rfm_call *call)
{
    double  sum   = 0.0;
    int64_t count = 0;

    if ((call->n_out < 1) || (call->outputs[0].capacity < sizeof(sum))) {
        return RFM_KERNEL_INVALID;
    }

    for (uint32_t i = 0; i < call->n_in + call->n_const; i++) {
        const struct rfm_buf *buf = (i < call->n_in) ? &call->inputs[i]
                                    : &call->constants[i - call->n_in];
        const double         *x   = buf->ptr;

        for (uint64_t j = 0; j < buf->size / sizeof(*x); j++) {
            sum += x[j];
            count++;
        }
    }

    memcpy(call->outputs[0].ptr, &sum, sizeof(sum));
    call->outputs[0].size = sizeof(sum);
    if ((call->n_out > 1) && (call->outputs[1].capacity >= sizeof(count))) {
        memcpy(call->outputs[1].ptr, &count, sizeof(count));
        call->outputs[1].size = sizeof(count);
    }
    return 0;
}

/* ---- kernels that misbehave: what a worker must survive ---------------- */

/* Returns minus the first byte of its input, or -1. */
int32_t rfm_bad_negative(const struct rfm_call *call)
{
    if ((call->n_in > 0) && (call->inputs[0].size > 0)) {
        uint8_t code = *(const uint8_t *)call->inputs[0].ptr;

        return (code != 0) ? -(int32_t)code : -1;
    }
    return -1;
}

int32_t rfm_bad_segfault(const struct rfm_call *call)
{
    (void)call;
    /* Page 16, never mapped; volatile, else the store is optimised to a trap. */
    *(volatile int *)(uintptr_t)0x10000 = 1;
    return 0;
}

static int32_t overrun(const struct rfm_call *call, uint64_t bytes)
{
    volatile uint8_t *out = call->outputs[0].ptr;

    for (uint64_t i = 0; i < call->outputs[0].capacity + bytes; i++) {
        out[i] = 0xee;
    }
    return 0;
}

/* One number too many. */
int32_t rfm_bad_overrun(const struct rfm_call *call)
{
    return overrun(call, sizeof(double));
}

/* One 64-byte line too many. */
int32_t rfm_bad_overrun_line(const struct rfm_call *call)
{
    return overrun(call, 64);
}

/* Fills its output and claims one byte more than fits. */
int32_t rfm_bad_length(const struct rfm_call *call)
{
    memset(call->outputs[0].ptr, 0x5a, call->outputs[0].capacity);
    call->outputs[0].size = call->outputs[0].capacity + 1;
    return 0;
}

/* Writes, and says that it wrote, half of its output. */
int32_t rfm_half(const struct rfm_call *call)
{
    memset(call->outputs[0].ptr, 0x5a, call->outputs[0].capacity / 2);
    call->outputs[0].size = call->outputs[0].capacity / 2;
    return 0;
}

/* The plain ABI has no capacity: a length of its own making. */
uint32_t rfm_bad_plain_length(void *in, uint32_t size, void *out)
{
    (void)in;
    (void)size;
    (void)out;
    return UINT32_MAX;
}

int32_t rfm_bad_loop(const struct rfm_call *call)
{
    volatile uint64_t turns = 0;

    (void)call;
    for (;;) {
        turns = turns + 1;
    }
    return 0;
}

int32_t rfm_bad_exit(const struct rfm_call *call)
{
    (void)call;
    exit(7);
}

int32_t rfm_bad_quick_exit(const struct rfm_call *call)
{
    (void)call;
    _exit(8);
}

int32_t rfm_bad_abort(const struct rfm_call *call)
{
    (void)call;
    abort();
}

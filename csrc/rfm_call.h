/*
 * rfm_call.h: what a native kernel is given and what it answers.
 *
 * This is the only header a kernel's author needs; it needs nothing but C99
 * or C++11. A kernel is
 *
 *     #include "rfm_call.h"
 *
 *     int32_t scale(const struct rfm_call *call)
 *     {
 *         const double *x = call->inputs[0].ptr;
 *         double       *y = call->outputs[0].ptr;
 *
 *         for (uint64_t i = 0; i < call->inputs[0].size / sizeof(*x); i++) {
 *             y[i] = 2.0 * x[i];
 *         }
 *         return 0;
 *     }
 *
 * built with `cc -O3 -fPIC -shared -o libscale.so scale.c`. In C++ it is
 * declared `extern "C"`.
 *
 * The contract:
 * - It runs without the GIL, on a thread of the worker; it keeps no state.
 * - Inputs and constants are read only. A write to one that lies in an arena
 *   faults or corrupts the rank's own array.
 * - outputs[i].size starts as outputs[i].capacity. A kernel that fills less
 *   stores the number of bytes it wrote; more than the capacity is an error of
 *   the kernel, and so is a write past the capacity.
 * - Zero or a positive number is success; a negative one is a kernel error,
 *   and the number reaches the rank in the KernelError's text.
 * - Nothing here outlives the call.
 */
#ifndef RFM_CALL_H
#define RFM_CALL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define RFM_CALL_ASSERT(cond, text) static_assert(cond, text)
#else
#define RFM_CALL_ASSERT(cond, text) _Static_assert(cond, text)
#endif

/* Grows when a field is added at the end; fields never move or vanish. */
#define RFM_CALL_VERSION 1

struct rfm_buf {
    void    *ptr;      /* 64-byte aligned where it lies in an arena or slot */
    uint64_t size;     /* bytes that are there, or that the kernel wrote    */
    uint64_t capacity; /* bytes that fit                                    */
};

struct rfm_call {
    uint32_t              version;       /* RFM_CALL_VERSION of the caller  */
    uint32_t              n_in;
    uint32_t              n_out;
    uint32_t              n_const;
    const struct rfm_buf *inputs;        /* [n_in]                          */
    struct rfm_buf       *outputs;       /* [n_out]; size may be set        */
    const struct rfm_buf *constants;     /* [n_const]                       */
    void                 *scratch;       /* NULL where scratch_bytes is 0   */
    uint64_t              scratch_bytes; /* contents undefined at each call */
    uint64_t              invocation;    /* id of this invocation, for logs */
};

typedef int32_t rfm_kernel_fn(const struct rfm_call *call);

/* rFaaS' plain ABI: one input, one output; returns the bytes it wrote. */
typedef uint32_t rfm_plain_fn(void *in, uint32_t size, void *out);

RFM_CALL_ASSERT(sizeof(void *) == 8, "rfm_call is laid out for 64 bits");
RFM_CALL_ASSERT(sizeof(struct rfm_buf) == 24, "rfm_buf is 24 bytes");
RFM_CALL_ASSERT(offsetof(struct rfm_buf, size) == 8, "rfm_buf.size");
RFM_CALL_ASSERT(offsetof(struct rfm_buf, capacity) == 16, "rfm_buf.capacity");
RFM_CALL_ASSERT(sizeof(struct rfm_call) == 64, "rfm_call is one line");
RFM_CALL_ASSERT(offsetof(struct rfm_call, inputs) == 16, "rfm_call.inputs");
RFM_CALL_ASSERT(offsetof(struct rfm_call, outputs) == 24, "rfm_call.outputs");
RFM_CALL_ASSERT(offsetof(struct rfm_call, constants) == 32,
                "rfm_call.constants");
RFM_CALL_ASSERT(offsetof(struct rfm_call, scratch) == 40, "rfm_call.scratch");
RFM_CALL_ASSERT(offsetof(struct rfm_call, invocation) == 56,
                "rfm_call.invocation");

#ifdef __cplusplus
}
#endif

#endif

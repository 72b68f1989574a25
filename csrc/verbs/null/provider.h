/* What tests may do to the device that is none; see provider.c. */
#ifndef RFM_NULL_PROVIDER_H
#define RFM_NULL_PROVIDER_H

#include <stdbool.h>
#include <stdint.h>

#define RFM_NULL_API __attribute__((visibility("default")))

/* Its port goes down or comes up, for the whole device; only this process hears
 * of it. */
RFM_NULL_API void rfm_null_port(bool up);
/* The registration of memory after the next `skip` of this process finds none. */
RFM_NULL_API void rfm_null_fail_registration(int skip);
/* Only one thread of one process uses it: it takes no locks, so that what is
 * measured is not its own cost. */
RFM_NULL_API void rfm_null_alone(bool yes);

/* bench.c: `count` invocations that carry `bytes` each way and do nothing, both
 * sides in the calling thread: ns of one, and of the bare work requests (posts
 * and polls) that it takes. < 0: enum rfm_status. One thread at a time. */
RFM_NULL_API int rfm_null_bench(uint64_t count, uint64_t bytes,
                                double *call_ns_p, double *raw_ns_p);

#endif

/* Copies between an application's arrays and staging memory. */
#ifndef RFM_COPY_H
#define RFM_COPY_H

#include <stdint.h>

/* From here on a copy goes past the caches. */
#define RFM_COPY_STREAM (12ull << 20)

/* As memcpy: the two don't overlap. */
void rfm_copy(void *to, const void *from, uint64_t bytes);

#endif

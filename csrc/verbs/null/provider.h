/* What tests may do to the device that is none; see provider.c. */
#ifndef RFM_NULL_PROVIDER_H
#define RFM_NULL_PROVIDER_H

#include <stdbool.h>

/* Its port goes down or comes up, for the whole device; only this process hears
 * of it. */
__attribute__((visibility("default"))) void rfm_null_port(bool up);
/* The next n registrations of memory find none. */
__attribute__((visibility("default"))) void rfm_null_fail_registrations(int n);

#endif

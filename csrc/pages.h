/* Address space and pages for large shared memory. */
#ifndef RFM_PAGES_H
#define RFM_PAGES_H

#include <stdint.h>

#define RFM_PAGE_SIZE 4096u
#define RFM_HUGE_PAGE (2u << 20)

/*
 * Address space for `bytes` (whole pages) with an unmapped guard page on either
 * side; NULL where there is none. What is large begins where a huge page may.
 */
uint8_t *rfm_pages_reserve(uint64_t bytes);
/* Unmaps it, with what was mapped there. NULL is allowed. */
void rfm_pages_release(uint8_t *base, uint64_t bytes);

/*
 * Puts a memfd whose pages are all there on huge pages, as far as the kernel
 * can (Linux 6.1); else it stays as it is. Its content stays in any case.
 */
void rfm_pages_collapse(int fd, uint64_t bytes);

#endif

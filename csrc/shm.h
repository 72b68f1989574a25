/* Sealed, pre-faulted memory that two processes share: memfds, never files. */
#ifndef RFM_SHM_H
#define RFM_SHM_H

#include <stdbool.h>
#include <stdint.h>

#include "pages.h"

/* A memfd of `bytes`, all of it allocated, sealed against resizing. */
int rfm_memfd_create(const char *name, uint64_t bytes, int *fd_p);
/* Maps it between two guard pages; `inherit`: children keep it. The size and
 * the seals are checked: memory that could shrink would be a SIGBUS. */
int rfm_memfd_map(int fd, uint64_t bytes, bool inherit, uint8_t **base_p);
void rfm_memfd_unmap(uint8_t *base, uint64_t bytes);
/* The same without a file: the copy of an arena at a worker on another node.
 * Its pages are there once they are touched. */
int rfm_mirror_map(uint64_t bytes, uint8_t **base_p);

#endif

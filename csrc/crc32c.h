/* CRC-32C (Castagnoli, polynomial 0x1edc6f41, reflected), as in RFC 3720. */
#ifndef RFM_CRC32C_H
#define RFM_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Goes on from `crc`; begin with 0. */
uint32_t rfm_crc32c(uint32_t crc, const void *data, size_t n);

#endif

/* Counts what a thread asks of malloc: preloaded, for tests of what must not allocate. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

static _Thread_local unsigned long count;

/* of the calling thread, so far */
unsigned long malloc_count(void)
{
    return count;
}

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t n, size_t size);
extern void *__libc_realloc(void *block, size_t size);

void *malloc(size_t size)
{
    count++;
    return __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    count++;
    return __libc_calloc(n, size);
}

void *realloc(void *block, size_t size)
{
    count++;
    return __libc_realloc(block, size);
}

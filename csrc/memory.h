/* memory.h -- large blocks of host memory, on huge pages where the system grants them. */
#pragma once
#include <stddef.h>

void *memory_alloc(size_t bytes); /* zero-filled, 64-byte aligned; NULL where the system refuses */
void memory_free(void *p, size_t bytes);
void memory_copy(void *dst, const void *src, size_t bytes);
void memory_zero(void *p, size_t bytes); /* with all threads */

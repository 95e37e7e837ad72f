/* status.c -- a backend's memory, and sentences about what failed. */
#include "status.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include "layout.h"
#include "system.h"

Status failed(char *error, Status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error, ERROR_ROOM, format, args);
    va_end(args);
    return status;
}

Status allocate(const Ops *ops, char *error, void **p, int64_t bytes, const char *purpose) {
    int64_t there = system_memory_free();
    *p = bytes <= there ? ops->alloc((size_t)bytes) : NULL;
    if (*p) return OK;
    return failed(error, NO_MEMORY, "%s: %.2f GiB needed, %.2f GiB free", purpose, (double)bytes / (1 << 30),
                  (double)there / (1 << 30));
}

static size_t angles(const Config *c) { return (size_t)c->context * (size_t)(c->head_size / 2); }

int64_t rope_bytes(const Config *c) { return c->pos == POS_ROPE ? (int64_t)(2 * angles(c) * sizeof(float)) : 0; }

Status rope_tables(const Config *c, const Ops *ops, char *error, float **cos, float **sin) {
    size_t n = angles(c), bytes = 2 * n * sizeof(float);
    float *table = malloc(bytes);
    if (!table) return failed(error, NO_MEMORY, "rope tables: no memory");
    rope_angles(c, table, table + n);
    Status s = allocate(ops, error, (void **)cos, (int64_t)bytes, "rope tables");
    if (!s) *sin = *cos + n, ops->copy_in(*cos, table, bytes);
    free(table);
    return s;
}

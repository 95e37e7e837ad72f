/* status.c -- a backend's memory, and sentences about what failed. */
#include "status.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include "layout.h"

Status failed(char *error, Status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error, ERROR_ROOM, format, args);
    va_end(args);
    return status;
}

int64_t aligned(int64_t bytes) { return (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES; }

Status allocate(const Ops *ops, char *error, void **p, int64_t bytes, const char *purpose) {
    int64_t there = ops->memory_free();
    *p = bytes <= there ? ops->alloc((size_t)bytes) : NULL;
    if (*p) return OK;
    return failed(error, NO_MEMORY, "%s: %.2f GiB needed, %.2f GiB free", purpose, (double)bytes / (1 << 30),
                  (double)there / (1 << 30));
}

Status checked_device(const Ops *ops, char *error, Status s) {
    const char *what = ops->error ? ops->error() : NULL;
    return what ? failed(error, DEVICE, "%s: %s", ops->name, what) : s;
}

/* What lies in a device's memory passes through a part of it as floats. */
enum { AT_ONCE = 1 << 20 };

Status read_acts(const Ops *ops, char *error, float *out, const void *in, int N, int C, int ld) {
    if (ops->on_host) {
        ops->act_read(out, in, N, C, ld);
        return OK;
    }
    const int64_t rows = C < AT_ONCE ? AT_ONCE / C : 1, bytes = rows * C * (int64_t)sizeof(float);
    float *part;
    Status s = allocate(ops, error, (void **)&part, bytes, "activations on their way");
    for (int64_t n = 0; n < N && !s; n += rows) {
        int some = (int)(N - n < rows ? N - n : rows);
        ops->act_read(part, (const char *)in + (size_t)(n * ld) * ops->act_bytes, some, C, ld);
        ops->copy_out(out + n * C, part, (size_t)some * (size_t)C * sizeof *out);
    }
    if (!s) ops->free(part, (size_t)bytes);
    return s;
}

Status write_acts(const Ops *ops, char *error, void *out, const float *in, int64_t n) {
    if (ops->act_bytes == sizeof(float)) {
        ops->copy_in(out, in, (size_t)n * sizeof *in);
        return OK;
    }
    float *part;
    Status s = allocate(ops, error, (void **)&part, AT_ONCE * (int64_t)sizeof *part, "activations on their way");
    for (int64_t at = 0; at < n && !s; at += AT_ONCE) {
        int64_t some = n - at < AT_ONCE ? n - at : AT_ONCE;
        ops->copy_in(part, in + at, (size_t)some * sizeof *in);
        ops->act_write((char *)out + (size_t)at * ops->act_bytes, part, some);
    }
    if (!s) ops->free(part, AT_ONCE * sizeof *part);
    return s;
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

/* linear_ahead.h -- what packing and the epilogue will read comes into the caches while tiles are multiplied: it lies
 * in short pieces of many rows, which no hardware foresees.  Lines are asked for one or a few at a time between the
 * steps of a tile; many at once would keep what follows waiting. */
#pragma once
#include "linear.h"

enum { NEXT_A, NEXT_B, STREAMS, OUTPUTS = 4 };
enum { STEPS_APART = 8 };
typedef struct {
    const char *at; /* a row of so many lines, of which `line` are on their way; so many rows to come */
    int64_t stride;
    int line, lines, rows, each; /* `each` at a time */
} Stream;
typedef struct {
    Stream of[STREAMS];
    const float *out[OUTPUTS]; /* the next row of each array that the epilogue of a tile reads or writes, or NULL */
    int64_t out_stride;
    int out_rows; /* to come */
    int left;     /* whether there is anything to come */
} Ahead;

/* To fetch `rows` rows of so many bytes within `times` times. */
static void begin_stream(Ahead *a, int n, const void *first, int64_t bytes, int64_t stride, int rows, int times) {
    const int aligned = (uintptr_t)first % 64 == 0 && stride % 64 == 0;
    Stream s = {.at = first, .stride = stride, .lines = (int)(aligned ? (bytes + 63) / 64 : (bytes + 62) / 64 + 1)};
    s.rows = bytes > 0 ? rows : 0;
    s.each = times ? (s.lines * rows + times - 1) / times : 0;
    a->of[n] = s, a->left = 1;
}

/* Into L2, for it waits there.  Returns whether there is more. */
INLINE int fetch_some(Stream *s, int lines) {
    for (; lines && s->rows; lines--) {
        fetch((const float *)(s->at + s->line * 64));
        if (++s->line == s->lines) s->line = 0, s->at += s->stride, s->rows--;
    }
    return s->rows;
}

/* One row of every array. */
INLINE void fetch_outputs(Ahead *a) {
    for (int n = 0; n < OUTPUTS; n++) {
        if (!a->out[n]) continue;
        for (int j = 0; j < NR; j += 16) __builtin_prefetch(a->out[n] + j, 1);
        __builtin_prefetch(a->out[n] + NR - 1, 1);
        a->out[n] += a->out_stride;
    }
    a->out_rows--;
}

INLINE void fetch_ahead(Ahead *a) {
    if (!a->left) return;
    if (a->out_rows) fetch_outputs(a);
    a->left = a->out_rows | fetch_some(a->of + NEXT_A, a->of[NEXT_A].each);
    a->left |= fetch_some(a->of + NEXT_B, a->of[NEXT_B].each);
}

/* All at once, where a tile is too small to wait for. */
static void fetch_all(Ahead *a) {
    while (a->out_rows) fetch_outputs(a);
    fetch_some(a->of + NEXT_A, INT32_MAX), fetch_some(a->of + NEXT_B, INT32_MAX);
    a->left = 0;
}

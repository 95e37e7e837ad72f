/* status.h -- a backend's memory, and sentences about what failed, for model.c, session.c and what they are made of. */
#pragma once
#include "barelm.h"

enum { ERROR_ROOM = 512, ALIGN_BYTES = 64 };

/* Writes the sentence to `error` (ERROR_ROOM bytes), returns the status. */
__attribute__((format(printf, 3, 4))) Status failed(char *error, Status status, const char *format, ...);

/* DEVICE where an operator of the backend has failed, with its sentence; else `s`. */
Status checked_device(const Ops *ops, char *error, Status s);

/* Activations of the backend to floats of the host, (N, C) of (N, ld); and n of them back. */
Status read_acts(const Ops *ops, char *error, float *out, const void *in, int N, int C, int ld);
Status write_acts(const Ops *ops, char *error, void *out, const float *in, int64_t n);

/* As many bytes, and so many more that what lies behind them begins on a cache line. */
int64_t aligned(int64_t bytes);

/* *p = that many bytes of the backend, zero; NULL and NO_MEMORY where they are not free.  `purpose` is for the
 * sentence. */
Status allocate(const Ops *ops, char *error, void **p, int64_t bytes, const char *purpose);

/* Angles of every position (layout.h) in the backend's memory: cos and sin (context, HS / 2), one allocation of
 * rope_bytes() at cos. */
int64_t rope_bytes(const Config *c);
Status rope_tables(const Config *c, const Ops *ops, char *error, float **cos, float **sin);

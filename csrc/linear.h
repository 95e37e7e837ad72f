/* linear.h -- what the ways to multiply by a weight share: what happens to a finished sum, and the int8 way. */
#pragma once
#include "gelu.h"

/* A tile: MR rows of NV vectors in registers, and what they are made of. */
enum { MR = REGISTERS == 32 ? 8 : 6, NV = REGISTERS == 32 ? 3 : 2 };
enum { NR = NV * W }; /* columns of a panel: what is packed and multiplied together */
/* Where a weight is read at the speed of memory: many, so that the threads end together. */
enum { TASKS_A_THREAD = 16 };

/* In this order. */
typedef struct {
    float *c;          /* (M, N) */
    const float *bias; /* (N) */
    float *pre;        /* (M, N): what fn is applied to */
    int fn;
    const float *residual; /* (M, N) */
    const float *dpre;     /* (M, N): multiply by fn'(dpre) instead */
} Epilogue;

/* Few rows: what finish_row reads of a panel is fetched while the panel is multiplied.  It comes from memory as the
 * weight does, and would be waited for. */
INLINE void fetch_bias(const Epilogue *e, int N, int j0) {
    for (int j = j0; e->bias && j < min_int(N, j0 + NR); j += 16) __builtin_prefetch(e->bias + j);
}

#define EACH_VECTOR _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++)
#define COUNT (columns < v * W ? 0 : min_int(W, columns - v * W)) /* of what vector v holds */

/* The sums S of row i, columns j0 and on, go to C: NV vectors at once, so that what is to be done is asked once. */
INLINE void finish_columns(const Epilogue *e, int N, const float *S, int i, int j0, const int columns) {
    const int64_t at = (int64_t)i * N + j0;
    vf x[NV];
    EACH_VECTOR x[v] = vload_all(S + v * W);
    if (e->bias) EACH_VECTOR x[v] = x[v] + vload(e->bias + j0 + v * W, COUNT);
    if (e->pre) EACH_VECTOR vstore(e->pre + at + v * W, x[v], COUNT);
    if (e->dpre) EACH_VECTOR x[v] = x[v] * vdfn(e->fn, vload(e->dpre + at + v * W, COUNT));
    else if (e->fn) EACH_VECTOR x[v] = vfn(e->fn, x[v]);
    if (e->residual) EACH_VECTOR x[v] = x[v] + vload(e->residual + at + v * W, COUNT);
    EACH_VECTOR vstore(e->c + at + v * W, x[v], COUNT);
}

#undef EACH_VECTOR
#undef COUNT

static inline void finish_row(const Epilogue *e, int N, const float *S, int i, int j0, int columns) {
    if (columns == NR) finish_columns(e, N, S, i, j0, NR);
    else finish_columns(e, N, S, i, j0, columns);
}

/* out (C) = row o of the weight that was packed, as it was rounded. */
void CAT(packed_row, ISA)(float *out, const void *packed, int prec, int C, int o);

int64_t CAT(int8_bytes, ISA)(int C, int OC);
void CAT(int8_pack, ISA)(void *packed, const float *weight, int C, int OC);
void CAT(int8_row, ISA)(float *out, const void *packed, int C, int o);
void CAT(int8_product, ISA)(const Epilogue *e, const float *in, const void *packed, int N, int C, int OC);

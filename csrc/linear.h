/* linear.h -- what the ways to multiply by a weight share: what happens to a finished sum, and the int8 way. */
#pragma once
#include "gelu.h"

#if defined(__AVX512F__)
enum { NV = 3 };
#else
enum { NV = 2 };
#endif
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
    int accumulate;        /* add to what C holds */
    int streams;           /* past the caches: C is too large for them, and nothing is added to it */
} Epilogue;

/* Few rows: what finish_row reads of a panel is fetched while the panel is multiplied.  It comes from memory as the
 * weight does, and would be waited for. */
INLINE void fetch_bias(const Epilogue *e, int N, int j0) {
    for (int j = j0; e->bias && j < min_int(N, j0 + NR); j += 16) __builtin_prefetch(e->bias + j);
}

/* k finished sums x go to C, at element `at`, column j. */
INLINE void finish(const Epilogue *e, vf x, int64_t at, int j, int k) {
    if (e->bias) x = x + vload(e->bias + j, k);
    if (e->pre) vstore(e->pre + at, x, k);
    if (e->dpre) x = x * vdfn(e->fn, vload(e->dpre + at, k));
    else x = vfn(e->fn, x);
    if (e->residual) x = x + vload(e->residual + at, k);
    if (e->accumulate) x = vload(e->c + at, k) + x;
    if (e->streams && k == W) vstream(e->c + at, x);
    else vstore(e->c + at, x, k);
}

/* The sums S of row i, columns j0 and on, go to C. */
static inline void finish_row(const Epilogue *e, int N, const float *S, int i, int j0, int columns) {
    int64_t at = (int64_t)i * N + j0;
    if (columns == NR) {
#pragma GCC unroll 4
        for (int j = 0; j < NR; j += W) finish(e, vload_all(S + j), at + j, j0 + j, W);
        return;
    }
    for (int j = 0; j < columns; j += W) finish(e, vload_all(S + j), at + j, j0 + j, min_int(W, columns - j));
}

/* out (C) = row o of the weight that was packed, as it was rounded. */
void CAT(packed_row, ISA)(float *out, const void *packed, int prec, int C, int o);

int64_t CAT(int8_bytes, ISA)(int C, int OC);
void CAT(int8_pack, ISA)(void *packed, const float *weight, int C, int OC);
void CAT(int8_row, ISA)(float *out, const void *packed, int C, int o);
void CAT(int8_product, ISA)(const Epilogue *e, const float *in, const void *packed, int N, int C, int OC);

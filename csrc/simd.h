/* simd.h -- the vector words the kernels use, spelled once per instruction set, and what is made of them.
 *
 * Included by files that CMake compiles once per instruction set; the -m flags decide which words are used.  A vector
 * `vf` holds W floats.  vload/vstore take a count k <= W: lanes from k on are read as 0 and not written, so kernels
 * need no tail loop.  vload_all/vstore_all move a whole vector; vstream moves it past the caches, to an address that is
 * a multiple of its size, and whoever streams ends with stream_end, so that other threads see it.  REGISTERS: how many
 * there are that hold a vector.  What the other words mean, simd_avx512.h says. */
#pragma once
#define ACT float
#include <math.h>
#include <string.h>
#include "ops.h"

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define STR_(a) #a
#define STR(a) STR_(a)
#define INLINE static inline __attribute__((always_inline, unused))

#if defined(BARELM_SIMDE) || defined(__ARM_NEON)
#include "simd_neon.h"
#elif defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#error "no vector words for this instruction set: CMake must not compile the kernels for it"
#endif

/* Every operator of this instruction set, so that a definition that strays from the contract does not compile. */
#define OP(name, args) void CAT(name, ISA) args;
#include "ops.def"
#undef OP

INLINE int min_int(int a, int b) { return a < b ? a : b; }

/* From so many floats of an output on, more than caches hold, it is written past them: nobody would find it there. */
enum { BEYOND_CACHES = 1 << 23 };
INLINE int beyond_caches(int64_t rows, int columns) { return rows * columns >= BEYOND_CACHES; }
INLINE int streams(const float *out, int64_t rows, int columns) {
    return beyond_caches(rows, columns) && (uintptr_t)out % 64 == 0 && columns % 16 == 0;
}
/* k lanes, or, past the caches, all. */
INLINE void vput(float *p, vf x, int k, int past) {
    if (past) vstream(p, x);
    else vstore(p, x, k);
}

/* A line that will be needed, into L2: so many rows ahead where rows lie anywhere, or memory waits for arithmetic. */
enum { ROWS_AHEAD = 4 };
INLINE int64_t rows_ahead(int n, int N) { return n + ROWS_AHEAD < N ? ROWS_AHEAD : 0; } /* of row n, if there are any */
INLINE void fetch(const float *p) { __builtin_prefetch(p, 0, 2); }
INLINE void fetch_near(const float *p) { __builtin_prefetch(p, 0, 3); } /* into L1 */

/* Rows of so many floats that one task should take: 64 KB of them, so that a task outweighs its start and a few short
 * rows stay on the calling thread. */
INLINE int rows_per_task(int64_t row) { return row < 16384 ? (int)(16384 / row) : 1; }
INLINE int tasks_for(int N, int rows) { return (int)(((int64_t)N + rows - 1) / rows); }

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* exp(x).  x = n ln2 + r with |r| <= ln2/2, ln2 in two parts so that r is exact; exp(r) by a polynomial of degree 7.
 * Below -87.3 (no normal result) exactly 0, above 88.7 inf, NaN stays NaN. */
INLINE vf vexp(vf x) {
    vf low = vset(-87.33f);
    vf y = vmin(vset(89.0f), vmax(low, x)); /* in this order NaN passes through */
    vf n = vround(y * vset(1.44269504f));
    vf r = vnfma(n, vset(0.693145751953125f), y);
    r = vnfma(n, vset(1.428606765330187e-06f), r);
    vf p = vset(1.9875691500e-4f);
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    p = vfma(p, r * r, r + vset(1.0f));
    return vpick_lt(x, low, vset(0.0f), vscale2(p, n));
}

/* 2^x where x is not much above 0: half the operations of vexp, for what a softmax or GELU does to every value.  x = n
 * + r with |r| <= 1/2 and r exact; 2^r by a polynomial of degree 6, at most 0.94 ulp off.  Below -126 (no normal
 * result) exactly 0, NaN stays NaN. */
#define LOG2_E 1.4426950408889634f
INLINE vf vexp2(vf x) {
    vf n = vround(x), r = x - n, p = vset(1.5353361960e-4f);
    p = vfma(p, r, vset(1.3398873853e-3f));
    p = vfma(p, r, vset(9.6184369177e-3f));
    p = vfma(p, r, vset(5.5503323674e-2f));
    p = vfma(p, r, vset(2.4022647738e-1f));
    p = vfma(p, r, vset(6.9314718246e-1f));
    p = vfma(p, r, vset(1.0f));
    return vpick_lt(x, vset(-126.0f), vset(0.0f), vscale2(p, n));
}

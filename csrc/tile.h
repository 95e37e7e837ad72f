/* tile.h -- the micro-kernel under matmul and attention: a tile of C in registers, one chain per element.
 *
 *   C[i][j] = (add ? C[i][j] : 0) + sum over k of A[i][k] * B[k][j]        i < MR, j < NV * W
 *
 * The sum is one chain of fused multiply-adds in order of k, starting from 0; `add` adds the finished sum.  MR and NV
 * must be literals, so that the tile stays in registers: MR * NV accumulators, NV vectors of B, one broadcast of A.
 * A element (i, k) lies at A[i * rs + k * ks], so A may be packed, read as it is, or read transposed; B row k lies at
 * B + k * ldb.  `pairs`: every 32-bit unit holds two bf16, and a step adds two products (VDPBF16PS). */
#pragma once
#include "simd.h"

#if defined(__AVX512BF16__)
enum { HAVE_PAIRS = 1 };
INLINE vf vdot_pairs(vf a, vf b, vf c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
/* Lane i: low[i] and behind it high[i], rounded. */
INLINE vf vpairs(vf low, vf high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low)));
}
/* W pairs of 2 W values that follow each other, and W / 2 of W */
INLINE vf vpairs_along(vf first, vf second) { return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first)); }
INLINE void vstore_pairs(float *p, vf x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }
/* the first values of W pairs */
INLINE vf vlow(vf pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
#else /* never called: callers ask HAVE_PAIRS */
enum { HAVE_PAIRS = 0 };
INLINE vf vdot_pairs(vf a, vf b, vf c) { return vfma(a, b, c); }
INLINE vf vpairs(vf low, vf high) { return vfma(low, low, high); }
INLINE vf vpairs_along(vf first, vf second) { return vfma(first, first, second); }
INLINE void vstore_pairs(float *p, vf x) { vstore_all(p, x); }
INLINE vf vlow(vf pairs) { return pairs; }
#endif

/* W values of a row of which so many are left, which may be none. */
INLINE vf load_left(const float *p, int left) { return vload(p, left < 0 ? 0 : min_int(left, W)); }
INLINE void store_left(float *p, vf x, int left) { vstore(p, x, left < 0 ? 0 : min_int(left, W)); }

INLINE void tile_clear(const int MR, const int NV, vf c[8][4]) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) c[i][j] = vset(0.0f);
}

/* The chains go on by kc steps. */
INLINE void tile_steps(const int MR, const int NV, const int pairs, int kc, const float *A, int64_t rs, int64_t ks,
                       const float *B, int64_t ldb, vf c[8][4]) {
    const int lanes = LANE_OPERANDS && __builtin_constant_p(rs) && rs == 1 && MR % W == 0;
#pragma GCC unroll 2
    for (int k = 0; k < kc; k++) {
        vf b[4];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) b[j] = vload_all(B + k * ldb + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            vf a = lanes ? vlane(A + k * ks, i) : vset(A[i * rs + k * ks]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) c[i][j] = pairs ? vdot_pairs(a, b[j], c[i][j]) : vfma(a, b[j], c[i][j]);
        }
    }
}

INLINE void tile_chain(const int MR, const int NV, const int pairs, int kc, const float *A, int64_t rs, int64_t ks,
                       const float *B, int64_t ldb, vf c[8][4]) {
    tile_clear(MR, NV, c);
    tile_steps(MR, NV, pairs, kc, A, rs, ks, B, ldb, c);
}

INLINE void tile_put(const int MR, const int NV, float *C, int64_t ldc, int add, vf c[8][4]) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            float *p = C + i * ldc + j * W;
            if (add) c[i][j] = vload_all(p) + c[i][j];
            vstore_all(p, c[i][j]);
        }
}

INLINE void tile(const int MR, const int NV, const int pairs, int kc, const float *A, int64_t rs, int64_t ks,
                 const float *B, int64_t ldb, float *C, int64_t ldc, int add) {
    vf c[8][4];
    tile_chain(MR, NV, pairs, kc, A, rs, ks, B, ldb, c);
    tile_put(MR, NV, C, ldc, add, c);
}

/* simd.h -- the vector words the kernels use, spelled once per instruction set.
 *
 * Included by files that CMake compiles once per instruction set; the -m flags decide which block is used.  A vector
 * `vf` holds W floats.  vload/vstore take a count k <= W: lanes from k on are read as 0 and not written, so kernels
 * need no tail loop.  vload_all/vstore_all move a whole vector; vstream moves it past the caches, to an address that is
 * a multiple of its size, and whoever streams ends with stream_end, so that other threads see it.  A new instruction
 * set (NEON) is one more block. */
#pragma once
#define ACT float
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "ops.h"

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define STR_(a) #a
#define STR(a) STR_(a)
#define INLINE static inline __attribute__((always_inline, unused))

#if defined(__AVX512F__)
#if defined(__AVX512BF16__)
#define ISA avx512_bf16
#else
#define ISA avx512
#endif
enum { W = 16 };
typedef __m512 vf;
INLINE __mmask16 vmask(int k) { return (__mmask16)((1u << k) - 1); }
INLINE vf vload_all(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vstore_all(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE void vstream(float *p, vf x) { _mm512_stream_ps(p, x); }
INLINE vf vload(const float *p, int k) { return k == W ? vload_all(p) : _mm512_maskz_loadu_ps(vmask(k), p); }
INLINE void vstore(float *p, vf x, int k) {
    if (k == W) vstore_all(p, x);
    else _mm512_mask_storeu_ps(p, vmask(k), x);
}
/* lanes 0 .. W/2 - 1, and the others */
INLINE void vstore_halves(float *low, float *high, vf x) {
    _mm256_storeu_ps(low, _mm512_castps512_ps256(x));
    _mm256_storeu_ps(high, _mm512_extractf32x8_ps(x, 1));
}
INLINE vf vset(float a) { return _mm512_set1_ps(a); }
INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }   /* a * b + c */
INLINE vf vnfma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a * b */
INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }              /* b where either is NaN */
INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vsqrt(vf x) { return _mm512_sqrt_ps(x); }
INLINE vf vabs(vf x) { return _mm512_abs_ps(x); }
/* 1 / x of numbers about 1, within 1 ulp: an estimate of 14 bits and a step of Newton's, a third of a division */
INLINE vf vreciprocal(vf x) {
    vf r = _mm512_rcp14_ps(x);
    return vfma(r, vnfma(x, r, vset(1.0f)), r);
}
INLINE vf vround(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* lanes below k from x, the others from `other` */
INLINE vf vfirst(vf x, vf other, int k) { return _mm512_mask_blend_ps(vmask(k), other, x); }
/* yes where a < b, else no */
INLINE vf vpick_lt(vf a, vf b, vf yes, vf no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
/* x * 2^n for integral n; results below the smallest normal number are not exact */
INLINE vf vscale2(vf x, vf n) { return _mm512_scalef_ps(x, n); }
INLINE float vsum(vf x) { return _mm512_reduce_add_ps(x); }
INLINE float vhmax(vf x) { return _mm512_reduce_max_ps(x); }
/* double: the halves of x and back; sum + x^2, W / 2 sums; and their total */
typedef __m512d vd;
INLINE vd vdset(double a) { return _mm512_set1_pd(a); }
INLINE vd vdload(const double *p) { return _mm512_loadu_pd(p); }
INLINE void vdstore(double *p, vd x) { _mm512_storeu_pd(p, x); }
INLINE vd vdlow(vf x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
INLINE vd vdhigh(vf x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
INLINE vf vdround(vd low, vd high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}
INLINE vd vdsquare_add(vd sum, vf x) {
    return _mm512_fmadd_pd(vdhigh(x), vdhigh(x), _mm512_fmadd_pd(vdlow(x), vdlow(x), sum));
}
INLINE double vdsum(vd x) { return _mm512_reduce_add_pd(x); }
/* round to bf16, nearest even, and back: NaN stays NaN */
INLINE vf vbf16(vf x) {
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32((int)0xffff0000u)));
}
/* W 32-bit integers.  vidot: acc + the sum over 4 bytes of each lane of w (unsigned) times the bytes of quad (signed),
 * exact.
 */
typedef __m512i vi;
INLINE vi viset(int32_t a) { return _mm512_set1_epi32(a); }
INLINE vi viload(const void *p) { return _mm512_loadu_si512(p); }
INLINE vf vifloat(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vi vidot(vi acc, vi w, int32_t quad) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(quad));
#else /* bytes 0 and 2, then 1 and 3, as 16 bits: no product of two overflows */
    vi q = _mm512_set1_epi32(quad), low = _mm512_set1_epi16(0xff);
    vi even = _mm512_srai_epi16(_mm512_slli_epi16(q, 8), 8), odd = _mm512_srai_epi16(q, 8);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_and_si512(w, low), even));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_srli_epi16(w, 8), odd));
#endif
}
/* W whole numbers in [-128, 127] as bytes */
INLINE void vstore_int8(int8_t *p, vf x) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
INLINE vf vload_int8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
/* W values of bf16: exact one way; the other way the values must be bf16 already (vbf16) */
INLINE vf vload_bf16(const uint16_t *p) {
    __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
}
INLINE void vstore_bf16(uint16_t *p, vf x) {
    __m512i u = _mm512_srli_epi32(_mm512_castps_si512(x), 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(u));
}
/* r[i][j] <-> r[j][i] */
INLINE void vtranspose(vf r[16]) {
    __m512 t[16], u[16];
    for (int i = 0; i < 8; i++) { /* pairs of rows, then fours, within 128 bits */
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) {
            __m512d a = _mm512_castps_pd(t[4 * i + h]), b = _mm512_castps_pd(t[4 * i + h + 2]);
            u[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 4; i++) { /* then the 128-bit quarters */
        t[i] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
}
#elif defined(__AVX2__)
#define ISA avx2
enum { W = 8 };
typedef __m256 vf;
INLINE __m256i vmask(int k) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf vload_all(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vstore_all(float *p, vf x) { _mm256_storeu_ps(p, x); }
INLINE void vstream(float *p, vf x) { _mm256_stream_ps(p, x); }
/* a masked store is slow microcode on many a CPU: only for the last, partial vector of a row */
INLINE vf vload(const float *p, int k) { return k == W ? vload_all(p) : _mm256_maskload_ps(p, vmask(k)); }
INLINE void vstore(float *p, vf x, int k) {
    if (k == W) vstore_all(p, x);
    else _mm256_maskstore_ps(p, vmask(k), x);
}
INLINE void vstore_halves(float *low, float *high, vf x) {
    _mm_storeu_ps(low, _mm256_castps256_ps128(x));
    _mm_storeu_ps(high, _mm256_extractf128_ps(x, 1));
}
INLINE vf vset(float a) { return _mm256_set1_ps(a); }
INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vnfma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vsqrt(vf x) { return _mm256_sqrt_ps(x); }
INLINE vf vabs(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE vf vreciprocal(vf x) { return vset(1.0f) / x; }
INLINE vf vround(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf vfirst(vf x, vf other, int k) {
    return k == W ? x : _mm256_blendv_ps(other, x, _mm256_castsi256_ps(vmask(k)));
}
INLINE vf vpick_lt(vf a, vf b, vf yes, vf no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INLINE vf vscale2(vf x, vf n) { /* in two steps, so that n down to -252 does not wrap round */
    __m256i e = _mm256_cvtps_epi32(n), h = _mm256_srai_epi32(e, 1), bias = _mm256_set1_epi32(127);
    __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(h, bias), 23));
    __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, h), bias), 23));
    return _mm256_mul_ps(_mm256_mul_ps(x, a), b);
}
INLINE float vsum(vf x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float vhmax(vf x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
typedef __m256d vd;
INLINE vd vdset(double a) { return _mm256_set1_pd(a); }
INLINE vd vdload(const double *p) { return _mm256_loadu_pd(p); }
INLINE void vdstore(double *p, vd x) { _mm256_storeu_pd(p, x); }
INLINE vd vdlow(vf x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
INLINE vd vdhigh(vf x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
INLINE vf vdround(vd low, vd high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(low)), _mm256_cvtpd_ps(high), 1);
}
INLINE vd vdsquare_add(vd sum, vf x) {
    return _mm256_fmadd_pd(vdhigh(x), vdhigh(x), _mm256_fmadd_pd(vdlow(x), vdlow(x), sum));
}
INLINE double vdsum(vd x) {
    __m128d s = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
INLINE vf vbf16(vf x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
    return _mm256_castsi256_ps(_mm256_and_si256(r, _mm256_set1_epi32((int)0xffff0000u)));
}
typedef __m256i vi;
INLINE vi viset(int32_t a) { return _mm256_set1_epi32(a); }
INLINE vi viload(const void *p) { return _mm256_loadu_si256(p); }
INLINE vf vifloat(vi x) { return _mm256_cvtepi32_ps(x); }
INLINE vi vidot(vi acc, vi w, int32_t quad) {
    vi q = _mm256_set1_epi32(quad), low = _mm256_set1_epi16(0xff);
    vi even = _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8), odd = _mm256_srai_epi16(q, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_and_si256(w, low), even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), odd));
}
INLINE void vstore_int8(int8_t *p, vf x) {
    __m256i u = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
}
INLINE vf vload_int8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE vf vload_bf16(const uint16_t *p) {
    __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
}
INLINE void vstore_bf16(uint16_t *p, vf x) {
    __m256i u = _mm256_srli_epi32(_mm256_castps_si256(x), 16);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
    _mm_storeu_si128((__m128i *)p, packed);
}
INLINE void vtranspose(vf r[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int h = 0; h < 2; h++) {
            __m256d a = _mm256_castps_pd(t[4 * i + h]), b = _mm256_castps_pd(t[4 * i + h + 2]);
            u[4 * i + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            u[4 * i + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
#else
#error "no vector words for this instruction set: CMake must not compile the kernels for it"
#endif

/* Every operator of this instruction set, so that a definition that strays from the contract does not compile. */
#define OP(name, args) void CAT(name, ISA) args;
#include "ops.def"
#undef OP

INLINE void stream_end(void) { _mm_sfence(); }

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

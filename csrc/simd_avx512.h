/* simd_avx512.h -- the words of simd.h in AVX-512 (F, BW, VL, DQ; with VNNI where there is BF16). */
#pragma once
#include <immintrin.h>

#if defined(__AVX512BF16__)
#define ISA avx512_bf16
#else
#define ISA avx512
#endif
enum { W = 16, REGISTERS = 32 };
typedef __m512 vf;
INLINE __mmask16 vmask(int k) { return (__mmask16)((1u << k) - 1); }
INLINE vf vload_all(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vstore_all(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE void vstream(float *p, vf x) { _mm512_stream_ps(p, x); }
INLINE void stream_end(void) { _mm_sfence(); }
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
/* p[i] in all lanes.  LANE_OPERANDS: a multiply-add takes it from a vector of p that is loaded once: p[0 .. i] are then
 * read by the vector, to the end of the last. */
enum { LANE_OPERANDS = 0 };
INLINE vf vlane(const float *p, int i) { return vset(p[i]); }
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

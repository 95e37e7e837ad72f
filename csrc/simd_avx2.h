/* simd_avx2.h -- the words of simd.h in AVX2 and FMA; simd_avx512.h says what they mean. */
#pragma once
#include <immintrin.h>

#define ISA avx2
enum { W = 8, REGISTERS = 16 };
typedef __m256 vf;
INLINE __m256i vmask(int k) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(k), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf vload_all(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vstore_all(float *p, vf x) { _mm256_storeu_ps(p, x); }
INLINE void vstream(float *p, vf x) { _mm256_stream_ps(p, x); }
INLINE void stream_end(void) { _mm_sfence(); }
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
enum { LANE_OPERANDS = 0 };
INLINE vf vlane(const float *p, int i) { return vset(p[i]); }
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

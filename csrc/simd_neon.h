/* simd_neon.h -- the words of simd.h in NEON, as every 64-bit ARM has it; simd_avx512.h says what they mean.
 *
 * BARELM_SIMDE: on another machine, for tests, by the text that SIMDe (https://github.com/simd-everywhere/simde) has of
 * its intrinsics. */
#pragma once
#if defined(BARELM_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/arm/neon.h>
#define vsqrtq_f32 _mm_sqrt_ps /* it lacks this one */
#else
#include <arm_neon.h>
#endif

#define ISA neon
enum { W = 4, REGISTERS = 32 };
typedef float32x4_t vf;
INLINE uint32x4_t vmask(int k) {
    const int32_t lanes[] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(k));
}
INLINE vf vload_all(const float *p) { return vld1q_f32(p); }
INLINE void vstore_all(float *p, vf x) { vst1q_f32(p, x); }
INLINE void vstream(float *p, vf x) { vst1q_f32(p, x); } /* intrinsics have no store past the caches */
INLINE void stream_end(void) {}
INLINE vf vload(const float *p, int k) {
    if (k == W) return vload_all(p);
    float x[W] = {0};
    for (int i = 0; i < k; i++) x[i] = p[i];
    return vload_all(x);
}
INLINE void vstore(float *p, vf x, int k) {
    if (k == W) {
        vstore_all(p, x);
        return;
    }
    float all[W];
    vstore_all(all, x);
    for (int i = 0; i < k; i++) p[i] = all[i];
}
INLINE void vstore_halves(float *low, float *high, vf x) {
    vst1_f32(low, vget_low_f32(x));
    vst1_f32(high, vget_high_f32(x));
}
INLINE vf vset(float a) { return vdupq_n_f32(a); }
enum { LANE_OPERANDS = 1 };
INLINE vf vlane(const float *p, int i) {
    const vf x = vld1q_f32(p + i / W * W);
    switch (i % W) {
        case 0:
            return vdupq_laneq_f32(x, 0);
        case 1:
            return vdupq_laneq_f32(x, 1);
        case 2:
            return vdupq_laneq_f32(x, 2);
        default:
            return vdupq_laneq_f32(x, 3);
    }
}
INLINE vf vfma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf vnfma(vf a, vf b, vf c) { return vfmaq_f32(c, vnegq_f32(a), b); }
INLINE vf vmax(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE vf vmin(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE vf vsqrt(vf x) { return vsqrtq_f32(x); }
INLINE vf vabs(vf x) { return vabsq_f32(x); }
INLINE vf vreciprocal(vf x) { return vset(1.0f) / x; }
INLINE vf vround(vf x) { return vrndnq_f32(x); }
INLINE vf vfirst(vf x, vf other, int k) { return vbslq_f32(vmask(k), x, other); }
INLINE vf vpick_lt(vf a, vf b, vf yes, vf no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
INLINE vf vscale2(vf x, vf n) { /* in two steps, so that n down to -252 does not wrap round */
    int32x4_t e = vcvtq_s32_f32(n), h = vshrq_n_s32(e, 1), bias = vdupq_n_s32(127);
    vf a = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(h, bias), 23));
    vf b = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(e, h), bias), 23));
    return x * a * b;
}
INLINE float vsum(vf x) { return vaddvq_f32(x); }
INLINE float vhmax(vf x) { return vmaxvq_f32(x); }
typedef float64x2_t vd;
INLINE vd vdset(double a) { return vdupq_n_f64(a); }
INLINE vd vdload(const double *p) { return vld1q_f64(p); }
INLINE void vdstore(double *p, vd x) { vst1q_f64(p, x); }
INLINE vd vdlow(vf x) { return vcvt_f64_f32(vget_low_f32(x)); }
INLINE vd vdhigh(vf x) { return vcvt_f64_f32(vget_high_f32(x)); }
INLINE vf vdround(vd low, vd high) { return vcombine_f32(vcvt_f32_f64(low), vcvt_f32_f64(high)); }
INLINE vd vdsquare_add(vd sum, vf x) { return vfmaq_f64(vfmaq_f64(sum, vdlow(x), vdlow(x)), vdhigh(x), vdhigh(x)); }
INLINE double vdsum(vd x) { return vaddvq_f64(x); }
INLINE vf vbf16(vf x) {
    uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    r = vbslq_u32(vceqq_f32(x, x), r, vorrq_u32(u, vdupq_n_u32(0x400000)));
    return vreinterpretq_f32_u32(vandq_u32(r, vdupq_n_u32(0xffff0000u)));
}
typedef int32x4_t vi;
INLINE vi viset(int32_t a) { return vdupq_n_s32(a); }
INLINE vi viload(const void *p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)p)); }
INLINE vf vifloat(vi x) { return vcvtq_f32_s32(x); }
INLINE vi vidot(vi acc, vi w, int32_t quad) { /* products fit into 16 bits: 255 * -128 */
    uint8x16_t bytes = vreinterpretq_u8_s32(w);
    int16x8_t q = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(quad)));
    int16x8_t low = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes))), q);
    int16x8_t high = vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(bytes))), q);
    return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
INLINE void vstore_int8(int8_t *p, vf x) {
    int16x4_t words = vmovn_s32(vcvtq_s32_f32(x));
    int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    memcpy(p, &bytes, W);
}
INLINE vf vload_int8(const int8_t *p) {
    int32_t bytes;
    memcpy(&bytes, p, W);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes))))));
}
INLINE vf vload_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE void vstore_bf16(uint16_t *p, vf x) { vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_f32(x), 16)); }
INLINE void vtranspose(vf r[4]) {
    float64x2_t t[4];
    for (int i = 0; i < 2; i++) {
        t[2 * i] = vreinterpretq_f64_f32(vtrn1q_f32(r[2 * i], r[2 * i + 1]));
        t[2 * i + 1] = vreinterpretq_f64_f32(vtrn2q_f32(r[2 * i], r[2 * i + 1]));
    }
    for (int i = 0; i < 2; i++) {
        r[i] = vreinterpretq_f32_f64(vtrn1q_f64(t[i], t[i + 2]));
        r[i + 2] = vreinterpretq_f32_f64(vtrn2q_f64(t[i], t[i + 2]));
    }
}

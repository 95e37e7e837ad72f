/* gelu.cuh -- GELU and its derivative, as csrc/ops_ref.c has them. */
#pragma once
#include "ops.cuh"

namespace {

/* tanh(u) = 2 s - 1 with s = 1 / (1 + exp(-2 u)).  What is rounded to bf16 takes s by one exponential and one division,
 * both quick; tanhf is a dozen instructions more, and twice for each value of a tile they are a third of a product's
 * time where K = 768.  u = sqrt(2 / pi) (x + 0.044715 x^3). */
const bool QUICK = sizeof(act) == sizeof(bf16);

/* 2 u, over log 2. */
__device__ inline float twice_u(float x) { return 2.30220820f * (x + 0.044715f * x * x * x); }
/* du / dx */
__device__ inline float slope_of_u(float x) { return 0.79788456f * (1.0f + 0.134145f * x * x); }

__device__ inline float gelu(int fn, float x) {
    if (fn == FN_GELU_TANH && QUICK) return divide_fast(x, 1.0f + exp2_fast(-twice_u(x)));
    if (fn == FN_GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    if (fn == FN_GELU_ERF) return 0.5f * x * (1.0f + erff(0.70710678f * x));
    return x;
}

/* s + x * s (1 - s) * 2 du/dx, with exp of what is not positive: s (1 - s) is the same for x and -x. */
__device__ inline float quick_slope(float x) {
    const float e = exp2_fast(-fabsf(twice_u(x))), part = divide_fast(1.0f, 1.0f + e), bell = e * part * part;
    return (x >= 0.0f ? part : e * part) + (bell > 0.0f ? x * bell * (2.0f * slope_of_u(x)) : 0.0f);
}

__device__ inline float gelu_slope(int fn, float x) {
    if (fn == FN_GELU_TANH && QUICK) return quick_slope(x);
    if (fn == FN_GELU_TANH) {
        const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
        const float slope = (1.0f - t) * (1.0f + t) * slope_of_u(x);
        return 0.5f * (1.0f + t) + (slope > 0.0f ? 0.5f * x * slope : 0.0f); /* a huge x^2 is not multiplied by 0 */
    }
    if (fn == FN_GELU_ERF) {
        const float bell = 0.39894228f * expf(-0.5f * x * x); /* exp(-x^2 / 2) / sqrt(2 pi) */
        return 0.5f * (1.0f + erff(0.70710678f * x)) + x * bell;
    }
    return 1.0f;
}

}  // namespace

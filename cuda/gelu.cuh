/* gelu.cuh -- GELU and its derivative, as csrc/ops_ref.c has them. */
#pragma once
#include "ops.cuh"

namespace {

__device__ inline float gelu(int fn, float x) {
    if (fn == FN_GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    if (fn == FN_GELU_ERF) return 0.5f * x * (1.0f + erff(0.70710678f * x));
    return x;
}

__device__ inline float gelu_slope(int fn, float x) {
    if (fn == FN_GELU_TANH) {
        const float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
        const float slope = (1.0f - t) * (1.0f + t) * 0.79788456f * (1.0f + 0.134145f * x * x);
        return 0.5f * (1.0f + t) + (slope > 0.0f ? 0.5f * x * slope : 0.0f); /* a huge x^2 is not multiplied by 0 */
    }
    if (fn == FN_GELU_ERF) {
        const float bell = 0.39894228f * expf(-0.5f * x * x); /* exp(-x^2 / 2) / sqrt(2 pi) */
        return 0.5f * (1.0f + erff(0.70710678f * x)) + x * bell;
    }
    return 1.0f;
}

/* `count` sums, at most VEC, from row m, column n. */
}  // namespace

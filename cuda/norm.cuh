/* norm.cuh -- LayerNorm and RMSNorm of a row, forward: for the kernel of their own, and for products that take few rows
 * and make their norm by themselves. */
#pragma once
#include "ops.cuh"

namespace {

/* Sum over the row of x[c] - shift, or of its square; by a warp. */
__device__ inline float row_sum(const act *x, float shift, int C, bool square) {
    float sum = 0.0f;
    for (int c = lane_index() * VEC; c < C; c += WARP * VEC) {
        const Pack<act, VEC> pack = load<VEC>(x + c, C - c);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const float d = pack[i] - shift;
            if (c + i < C) sum += square ? d * d : d;
        }
    }
    return warp_sum(sum);
}

struct Moments {
    float mean, rstd;
};

/* mean: 0 without it. */
__device__ inline Moments row_moments(const act *x, bool with_mean, float eps, int C) {
    const float mean = with_mean ? row_sum(x, 0.0f, C, false) / (float)C : 0.0f;
    return {mean, 1.0f / sqrtf(row_sum(x, mean, C, true) / (float)C + eps)};
}

__device__ inline float normalised(float x, const Moments &m, float gain, float shift) {
    return (x - m.mean) * m.rstd * gain + shift;
}

/* A row of floats that no kernel before writes is on its way while that still runs. */
__device__ inline void prefetch_row(const float *row, int C) {
    const size_t bytes = (size_t)C * sizeof(float) / 16 * 16;
    if (row && bytes && on_16_bytes(row)) prefetch_l2(row, bytes);
}

}  // namespace

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

/* A row on 16 bytes, of at most V whole vectors a lane, which a warp reads once: its moments to the same bits. */
template <int V>
struct KeptRow {
    Pack<act, VEC> x[V];

    __device__ static int column(int v) { return (lane_index() + v * WARP) * VEC; }
    __device__ void read(const act *row, int C) {
#pragma unroll
        for (int v = 0; v < V; v++)
            if (column(v) < C) x[v] = load_all<VEC>(row + column(v));
    }
    template <bool square>
    __device__ float sum(float shift, int C) const {
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < V; v++)
            if (column(v) < C)
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    const float d = x[v][i] - shift;
                    sum += square ? d * d : d;
                }
        return warp_sum(sum);
    }
    __device__ Moments moments(bool with_mean, float eps, int C) const {
        const float mean = with_mean ? sum<false>(0.0f, C) / (float)C : 0.0f;
        return {mean, 1.0f / sqrtf(sum<true>(mean, C) / (float)C + eps)};
    }
};

/* The same of any row: it is read again. */
template <>
struct KeptRow<0> {
    const act *row;

    __device__ void read(const act *row_, int) { row = row_; }
    __device__ Moments moments(bool with_mean, float eps, int C) const { return row_moments(row, with_mean, eps, C); }
};

/* Vectors a lane must keep for rows of C values from p on: 4, 8 or 16; 0: they are too long, or do not lie so. */
inline int kept_vectors(const act *p, int C) {
    if (C % VEC || !on_16_bytes(p)) return 0;
    for (int V = 4; V <= 16; V *= 2)
        if (C <= V * WARP * VEC) return V;
    return 0;
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

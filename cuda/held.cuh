/* held.cuh -- weights as they are held in memory, see `held` in csrc/ops.def: rows of floats, of bf16, or in int8 of
 * groups of 64 values with a scale each. */
#pragma once
#include "ops.cuh"
#include "../csrc/gpu.h"

namespace {

struct Group {
    float scale;
    int8_t q[INT8_GROUP];
};
static_assert(sizeof(Group) == sizeof(float) + INT8_GROUP, "as gpu_held_bytes counts it");

__host__ __device__ inline int groups_of(int C) { return (C + INT8_GROUP - 1) / INT8_GROUP; }

/* Value c of row o. */
__device__ inline float held_value(const void *weight, int held, int C, int64_t o, int c) {
    if (held == PREC_FP32) return ((const float *)weight)[o * C + c];
    if (held == PREC_BF16) return to_float(((const bf16 *)weight)[o * C + c]);
    const Group &g = ((const Group *)weight)[o * groups_of(C) + c / INT8_GROUP];
    return (float)g.q[c % INT8_GROUP] * g.scale;
}

/* The group of a warp's 64 values, of which a lane brings two.  A value that is not finite makes the scale so. */
__device__ inline void write_group(Group &out, const float (&x)[2]) {
    const float most = warp_max(fmaxf(fabsf(x[0]), fabsf(x[1]))), bad = warp_sum(x[0] * 0.0f + x[1] * 0.0f);
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    for (int i = 0; i < 2; i++) {
        const float q = x[i] * inverse;
        out.q[lane_index() + i * WARP] = fabsf(q) <= 127.5f ? (int8_t)rintf(q) : (int8_t)0;
    }
    if (lane_index() == 0) out.scale = most / 127.0f + bad;
}

/* The first `count` of N values from value c of row o on; the others are 0. */
template <int N>
__device__ inline Pack<float, N> load_held(const void *weight, int held, int C, int64_t o, int c, int count) {
    if (held == PREC_FP32) return load<N>((const float *)weight + o * C + c, count);
    Pack<float, N> pack;
#pragma unroll
    for (int i = 0; i < N; i++) pack.x[i] = i < count ? held_value(weight, held, C, o, c + i) : 0.0f;
    return pack;
}

}  // namespace

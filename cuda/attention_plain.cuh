/* attention_plain.cuh -- attention by plain multiply-adds, a warp for each query: fp32, to check with, and heads of
 * more than 128 values.  The order of summation is that of csrc/ops.def to the letter, but for the sum of the weights
 * of a block, which is a tree.  Heads may be as wide as shared memory has room for: 3100 values. */
#pragma once
#include "attention.cuh"

namespace {

template <bool rounded>
__device__ float operand(float x) {
    return rounded ? float_of_bits(pack_bf16(0.0f, x)) : x;
}

/* Of a warp: two rows of a head and the weights of a block of keys. */
inline size_t plain_bytes(int HS) { return TILE_WARPS * (2 * (size_t)HS + KEY_BLOCK) * sizeof(float); }

/* A query at position t sees keys start .. t.  keys.at(side, t, i): value i of the key (side 0) or value (side 1) at
 * position t.  lse may be NULL. */
template <bool rounded, class Keys>
__device__ void plain_query(act *out, float *lse, const act *q, const Keys &keys, int start, int t, int HS,
                            float scale) {
    SHARED_DYNAMIC(float, memory);
    const Shared<float> query = memory + warp_index() * (2 * HS + KEY_BLOCK), sums = query + HS, p = sums + HS;
    float max = -INFINITY, total = 0.0f;
    for (int i = lane_index(); i < HS; i += WARP) query[i] = operand<rounded>(to_float(q[i])), sums[i] = 0.0f;
    __syncwarp();
    for (int k0 = start; k0 <= t; k0 += KEY_BLOCK) {
        const int count = t + 1 - k0 < KEY_BLOCK ? t + 1 - k0 : KEY_BLOCK;
        float score[2], top = -INFINITY, sum = 0.0f;
        for (int j = 0; j < 2; j++) {
            const int k = lane_index() + j * WARP;
            score[j] = k < count ? 0.0f : -INFINITY;
            for (int i = 0; k < count && i < HS; i++) score[j] += query[i] * operand<rounded>(keys.at(0, k0 + k, i));
            score[j] *= scale;
            top = fmaxf(top, score[j]);
        }
        const float new_max = fmaxf(max, warp_max(top)), keep = expf(max - new_max);
        for (int j = 0; j < 2; j++) {
            const float weight = expf(score[j] - new_max);
            sum += weight;
            p[lane_index() + j * WARP] = operand<rounded>(weight);
        }
        total = total * keep + warp_sum(sum);
        max = new_max;
        __syncwarp();
        for (int i = lane_index(); i < HS; i += WARP) {
            float block = 0.0f;
            for (int k = 0; k < count; k++) block += p[k] * operand<rounded>(keys.at(1, k0 + k, i));
            sums[i] = sums[i] * keep + block;
        }
        __syncwarp();
    }
    const float inverse = 1.0f / total;
    for (int i = lane_index(); i < HS; i += WARP) from_float(out[i], sums[i] * inverse);
    if (lse && lane_index() == 0) *lse = max + logf(total);
    __syncwarp(); /* the next query's row */
}

}  // namespace

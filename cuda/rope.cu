/* rope.cu -- rotary positions: a block for each token, pairs (i, i + HS/2) of its query and key heads, 16 bytes of each
 * side at a time.  Bound by memory: each value is read and written once. */
#include "ops.cuh"

namespace {

enum { MOST_THREADS = 256 };

__global__ void __launch_bounds__(MOST_THREADS)
    turn(act *qkv, const float *cos, const float *sin, const int32_t *starts, float direction, int T, int heads,
         int stride, int half) {
    const int64_t bt = blockIdx.x;
    launch_next(), wait_earlier();
    const int64_t position = bt % T - (starts ? starts[bt] : 0);
    const int vectors = (half + VEC - 1) / VEC;
    for (int k = (int)threadIdx.x; k < heads * vectors; k += (int)blockDim.x) {
        const int i = k % vectors * VEC, count = half - i;
        act *x = qkv + bt * stride + (int64_t)(k / vectors) * 2 * half + i, *y = x + half;
        const Pack<act, VEC> a = load<VEC>(x, count), b = load<VEC>(y, count);
        const Pack<float, VEC> c = load<VEC>(cos + position * half + i, count);
        const Pack<float, VEC> s = load<VEC>(sin + position * half + i, count);
        float turned_a[VEC], turned_b[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            turned_a[j] = a[j] * c[j] - b[j] * (direction * s[j]);
            turned_b[j] = b[j] * c[j] + a[j] * (direction * s[j]);
        }
        store(x, turned_a, count);
        store(y, turned_b, count);
    }
}

void rope(act *qkv, const float *cos, const float *sin, const int32_t *starts, float direction, int B, int T, int NH,
          int NKV, int HS, const char *op) {
    const int half = HS / 2, heads = NH + NKV;
    const int threads = threads_for((int64_t)heads * divide_up(half, VEC), MOST_THREADS);
    launch_early(Grid((int64_t)B * T, threads, 0, op), turn, qkv, cos, sin, starts, direction, T, heads,
                 (NH + 2 * NKV) * HS, half);
}

}  // namespace

void OPERATOR(rope_forward)(act *qkv, const float *cos, const float *sin, const int32_t *starts, int B, int T, int NH,
                            int NKV, int HS) {
    rope(qkv, cos, sin, starts, 1.0f, B, T, NH, NKV, HS, "rope_forward");
}

void OPERATOR(rope_backward)(act *dqkv, const float *cos, const float *sin, const int32_t *starts, int B, int T, int NH,
                             int NKV, int HS) {
    rope(dqkv, cos, sin, starts, -1.0f, B, T, NH, NKV, HS, "rope_backward");
}

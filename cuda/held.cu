/* held.cu -- weights in less than floats, written and read.  Bound by memory: those that are not trained once, but a
 * copy in bf16 of those that are after each update (csrc/model.c). */
#include "held.cuh"

namespace {

enum { THREADS = 256, WARPS = THREADS / WARP, EACH = 8 };

/* A block for some values of a matrix. */
__global__ void __launch_bounds__(THREADS) read(float *weight, const void *in, int held, int C, int64_t values) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    launch_next(), wait_earlier();
    if (i < values) weight[i] = held_value(in, held, C, i / C, (int)(i % C));
}

__global__ void __launch_bounds__(THREADS) write_floats(float *out, const float *weight, int64_t values) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    launch_next(), wait_earlier();
    if (i < values) out[i] = weight[i];
}

__global__ void __launch_bounds__(THREADS) write_bf16(bf16 *out, const float *weight, int64_t values) {
    const int64_t at = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH, count = values - at;
    launch_next(), wait_earlier();
    if (count <= 0) return;
    const Pack<float, EACH> pack = load<EACH>(weight + at, count);
    store(out + at, pack.x, count);
}

/* A warp for each group. */
__global__ void __launch_bounds__(THREADS) write_int8(Group *out, const float *weight, int C, int64_t groups) {
    const int64_t g = (int64_t)blockIdx.x * WARPS + warp_index();
    launch_next(), wait_earlier();
    if (g >= groups) return;
    const int64_t o = g / groups_of(C);
    const int first = (int)(g % groups_of(C)) * INT8_GROUP;
    float x[2];
    for (int i = 0; i < 2; i++) {
        const int c = first + lane_index() + i * WARP;
        x[i] = c < C ? weight[o * C + c] : 0.0f;
    }
    write_group(out[g], x);
}

}  // namespace

extern "C" int64_t OPERATOR(held_bytes)(int held, int C, int OC) { return gpu_held_bytes(held, C, OC); }

void OPERATOR(held_write)(void *out, const float *weight, int held, int C, int OC) {
    const int64_t values = (int64_t)OC * C, groups = (int64_t)OC * groups_of(C);
    const Grid each(divide_up(values, THREADS), THREADS);
    if (held == PREC_FP32) launch_early(each, write_floats, (float *)out, weight, values);
    else if (held == PREC_BF16)
        launch_early(Grid(divide_up(values, THREADS * EACH), THREADS), write_bf16, (bf16 *)out, weight, values);
    else launch_early(Grid(divide_up(groups, WARPS), THREADS), write_int8, (Group *)out, weight, C, groups);
}

void OPERATOR(held_read)(float *weight, const void *in, int held, int C, int OC) {
    const int64_t values = (int64_t)OC * C;
    launch_early(Grid(divide_up(values, THREADS), THREADS), read, weight, in, held, C, values);
}

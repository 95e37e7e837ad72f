/* elementwise.cu -- activations to floats and back; GELU by itself.  16 bytes of activations at a time: bound by
 * memory. */
#include "gelu.cuh"

namespace {

enum { THREADS = 256 };

Grid grid_for(int64_t n, const char *op) { return Grid(divide_up(divide_up(n, VEC), THREADS), THREADS, 0, op); }
__device__ int64_t my_place() { return ((int64_t)blockIdx.x * THREADS + threadIdx.x) * VEC; }

/* out (N, C) = the first C of each row of in (N, ld); a row is `vectors` threads' */
__global__ void __launch_bounds__(THREADS) to_floats(float *out, const act *in, int N, int C, int ld, int vectors) {
    const int64_t i = my_place() / VEC, n = i / vectors;
    const int c = (int)(i % vectors) * VEC;
    launch_next(), wait_earlier();
    if (n >= N) return;
    const Pack<act, VEC> x = load<VEC>(in + n * ld + c, C - c);
    float y[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) y[j] = x[j];
    store(out + n * C + c, y, C - c);
}

__global__ void __launch_bounds__(THREADS) to_acts(act *out, const float *in, int64_t n) {
    const int64_t at = my_place();
    launch_next(), wait_earlier();
    if (at >= n) return;
    const Pack<float, VEC> x = load<VEC>(in + at, n - at);
    float y[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) y[i] = x[i];
    store(out + at, y, n - at);
}

/* out = fn(in); with dout: dout * fn'(in) */
__global__ void __launch_bounds__(THREADS) apply(act *out, const act *dout, const act *in, int fn, int64_t n) {
    const int64_t at = my_place();
    launch_next(), wait_earlier();
    if (at >= n) return;
    const Pack<act, VEC> x = load<VEC>(in + at, n - at);
    Pack<act, VEC> d = {};
    if (dout) d = load<VEC>(dout + at, n - at);
    float y[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) y[i] = dout ? d[i] * gelu_slope(fn, x[i]) : gelu(fn, x[i]);
    store(out + at, y, n - at);
}

}  // namespace

void OPERATOR(act_read)(float *out, const act *in, int N, int C, int ld) {
    const int vectors = (int)divide_up(C, VEC);
    launch_early(grid_for((int64_t)N * vectors * VEC, __func__), to_floats, out, in, N, C, ld, vectors);
}

void OPERATOR(act_write)(act *out, const float *in, int64_t n) {
    launch_early(grid_for(n, __func__), to_acts, out, in, n);
}

void OPERATOR(gelu_forward)(act *out, const act *in, int fn, int N, int F) {
    const int64_t n = (int64_t)N * F;
    launch_early(grid_for(n, __func__), apply, out, (const act *)NULL, in, fn, n);
}

void OPERATOR(gelu_backward)(act *din, const act *dout, const act *in, int fn, int N, int F) {
    const int64_t n = (int64_t)N * F;
    launch_early(grid_for(n, __func__), apply, din, dout, in, fn, n);
}

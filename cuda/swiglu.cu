/* swiglu.cu -- SwiGLU: a block for each row, 16 bytes of each array at a time.  Bound by memory. */
#include "ops.cuh"

namespace {

enum { MOST_THREADS = 256 };

__global__ void __launch_bounds__(MOST_THREADS) forward(act *out, const act *in, int F) {
    const int64_t n = blockIdx.x;
    launch_next(), wait_earlier();
    const act *gate = in + n * 2 * F, *up = gate + F;
    for (int f = (int)threadIdx.x * VEC; f < F; f += (int)blockDim.x * VEC) {
        const Pack<act, VEC> g = load<VEC>(gate + f, F - f), u = load<VEC>(up + f, F - f);
        float y[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) y[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
        store(out + n * F + f, y, F - f);
    }
}

/* silu = gate * s, silu' = s + gate * s * (1 - s) */
__global__ void __launch_bounds__(MOST_THREADS) backward(act *din, const act *dout, const act *in, int F) {
    const int64_t n = blockIdx.x;
    launch_next(), wait_earlier();
    const act *gate = in + n * 2 * F, *up = gate + F;
    act *dgate = din + n * 2 * F, *dup = dgate + F;
    for (int f = (int)threadIdx.x * VEC; f < F; f += (int)blockDim.x * VEC) {
        const Pack<act, VEC> g = load<VEC>(gate + f, F - f), u = load<VEC>(up + f, F - f);
        const Pack<act, VEC> d = load<VEC>(dout + n * F + f, F - f);
        float dg[VEC], du[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const float s = 1.0f / (1.0f + expf(-g[i]));
            dg[i] = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
            du[i] = d[i] * g[i] * s;
        }
        store(dgate + f, dg, F - f);
        store(dup + f, du, F - f);
    }
}

}  // namespace

void OPERATOR(swiglu_forward)(act *out, const act *in, int N, int F) {
    launch_early(Grid(N, threads_for(divide_up(F, VEC), MOST_THREADS)), forward, out, in, F);
}

void OPERATOR(swiglu_backward)(act *din, const act *dout, const act *in, int N, int F) {
    launch_early(Grid(N, threads_for(divide_up(F, VEC), MOST_THREADS)), backward, din, dout, in, F);
}

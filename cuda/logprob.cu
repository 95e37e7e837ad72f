/* logprob.cu -- log-probabilities of targets and their gradient: a block for each row.
 *
 * Forward reads the row once: each thread keeps the greatest value it met and two sums relative to it, which it scales
 * down when it meets a greater one; the threads' are then put together the same way.  Bound by memory: bf16 2 bytes a
 * value forward, 4 backward. */
#include "ops.cuh"

namespace {

enum { FORWARD_THREADS = 512, BACKWARD_THREADS = 256 };

/* Over some values y: the greatest, the sum of exp(y - max), and that of exp(y - max) * (y - max). */
struct Tally {
    float max, sum, weighted;
};

/* What the values are measured from: a maximum of -infinity would make -infinity - -infinity. */
__device__ float origin(float max) { return max == -INFINITY ? 0.0f : max; }

/* The tally, seen from another maximum that is no smaller. */
__device__ Tally seen_from(Tally t, float max) {
    if (t.max == -INFINITY) return {max, t.sum, t.weighted}; /* nothing, or what is not a number */
    const float below = t.max - origin(max), scale = expf(below);
    return {max, t.sum * scale, scale > 0.0f ? scale * (t.weighted + t.sum * below) : 0.0f};
}

/* The same bits whichever is first. */
__device__ Tally together(Tally a, Tally b) {
    const float max = fmaxf(a.max, b.max);
    a = seen_from(a, max), b = seen_from(b, max);
    return {max, a.sum + b.sum, a.weighted + b.weighted};
}

__device__ Tally warp_tally(Tally t) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const Tally other = {shuffle_xor(t.max, lanes), shuffle_xor(t.sum, lanes), shuffle_xor(t.weighted, lanes)};
        t = together(t, other);
    }
    return t;
}

__device__ Tally thread_tally(const act *x, float invtemp, int V) {
    Tally t = {-INFINITY, 0.0f, 0.0f};
    for (int v = (int)threadIdx.x * VEC; v < V; v += FORWARD_THREADS * VEC) {
        const Pack<act, VEC> pack = load<VEC>(x + v, V - v);
        float y[VEC], max = t.max;
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            y[i] = v + i < V ? pack[i] * invtemp : -INFINITY;
            max = fmaxf(max, y[i]);
        }
        if (max > t.max) t = seen_from(t, max);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const float below = y[i] - origin(max), e = expf(below);
            t.sum += e;
            if (e > 0.0f) t.weighted += e * below; /* a logit of -infinity would make 0 * infinity */
        }
    }
    return t;
}

__global__ void __launch_bounds__(FORWARD_THREADS)
    forward(float *logprobs, float *lse, float *entropy, const act *logits, const int32_t *targets, float invtemp,
            int V, int Vp) {
    enum { WARPS = FORWARD_THREADS / WARP };
    SHARED(float, parts, 3 * WARPS);
    const int64_t n = blockIdx.x;
    const act *x = logits + n * Vp;
    Tally t = warp_tally(thread_tally(x, invtemp, V));
    if (lane_index() == 0) {
        parts[warp_index()] = t.max;
        parts[WARPS + warp_index()] = t.sum;
        parts[2 * WARPS + warp_index()] = t.weighted;
    }
    __syncthreads();
    if (warp_index() > 0) return;
    const int part = lane_index();
    t = {-INFINITY, 0.0f, 0.0f};
    if (part < WARPS) t = {parts[part], parts[WARPS + part], parts[2 * WARPS + part]};
    t = warp_tally(t);
    if (part > 0) return;
    const int32_t target = targets[n];
    const float log_sum = logf(t.sum), log_all = t.max + log_sum;
    lse[n] = log_all;
    logprobs[n] = target < 0 ? 0.0f : to_float(x[target]) * invtemp - log_all;
    if (entropy) entropy[n] = log_sum - t.weighted / t.sum; /* log p = y - max - log sum */
}

__global__ void __launch_bounds__(BACKWARD_THREADS)
    backward(act *dlogits, const float *dlogprobs, const act *logits, const int32_t *targets, const float *lse,
             float invtemp, int V, int Vp) {
    const int64_t n = blockIdx.x;
    const act *x = logits + n * Vp;
    const int32_t target = targets[n];
    const float d = invtemp * dlogprobs[n], log_all = lse[n];
    for (int v = (int)threadIdx.x * VEC; v < Vp; v += BACKWARD_THREADS * VEC) {
        float dx[VEC];
        const Pack<act, VEC> pack = load<VEC>(x + v, V - v);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const float p = expf(pack[i] * invtemp - log_all);
            dx[i] = target < 0 || v + i >= V ? 0.0f : d * ((v + i == target ? 1.0f : 0.0f) - p);
        }
        store(dlogits + n * Vp + v, dx, Vp - v);
    }
}

}  // namespace

void OPERATOR(logprob_forward)(float *logprobs, float *lse, float *entropy, const act *logits, const int32_t *targets,
                               float invtemp, int N, int V, int Vp) {
    launch(Grid(N, FORWARD_THREADS), forward, logprobs, lse, entropy, logits, targets, invtemp, V, Vp);
}

void OPERATOR(logprob_backward)(act *dlogits, const float *dlogprobs, const act *logits, const int32_t *targets,
                                const float *lse, float invtemp, int N, int V, int Vp) {
    launch(Grid(N, BACKWARD_THREADS), backward, dlogits, dlogprobs, logits, targets, lse, invtemp, V, Vp);
}

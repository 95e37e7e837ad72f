/* logprob.cu -- log-probabilities of targets and their gradient: a block for each row.
 *
 * Forward reads the row once: each thread keeps the greatest value it met and two sums relative to it, which it scales
 * down when it meets a greater one; the threads' are then put together the same way.  Bound by memory: bf16 2 bytes a
 * value forward, 4 backward; and 4 for both at once, whose second reading comes from L2. */
#include "ops.cuh"

namespace {

/* 1024: two blocks on an SM, so that L2 keeps their rows from the first reading to the second. */
enum { FORWARD_THREADS = 1024, BACKWARD_THREADS = 256 };

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

/* Over the block, in its first thread. */
__device__ Tally block_tally(Tally t) {
    enum { WARPS = FORWARD_THREADS / WARP };
    SHARED(float, parts, 3 * WARPS);
    t = warp_tally(t);
    if (lane_index() == 0) {
        parts[warp_index()] = t.max;
        parts[WARPS + warp_index()] = t.sum;
        parts[2 * WARPS + warp_index()] = t.weighted;
    }
    __syncthreads();
    if (warp_index() > 0) return t;
    const int part = lane_index();
    t = {-INFINITY, 0.0f, 0.0f};
    if (part < WARPS) t = {parts[part], parts[WARPS + part], parts[2 * WARPS + part]};
    return warp_tally(t);
}

/* A row of V values, x. */
__device__ void forward_row(float *logprob, float *lse, float *entropy, const act *x, int32_t target, float invtemp,
                            int V) {
    const Tally t = block_tally(thread_tally(x, invtemp, V));
    if (threadIdx.x > 0) return;
    const float log_sum = logf(t.sum), log_all = t.max + log_sum;
    *lse = log_all;
    *logprob = target < 0 ? 0.0f : to_float(x[target]) * invtemp - log_all;
    if (entropy) *entropy = log_sum - t.weighted / t.sum; /* log p = y - max - log sum */
}

template <int THREADS>
__device__ void backward_row(act *dx, float dlogprob, const act *x, int32_t target, float lse, float invtemp, int V,
                             int Vp) {
    const float d = invtemp * dlogprob;
    for (int v = (int)threadIdx.x * VEC; v < Vp; v += THREADS * VEC) {
        float dy[VEC];
        const Pack<act, VEC> pack = load<VEC>(x + v, V - v);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const float p = expf(pack[i] * invtemp - lse);
            dy[i] = target < 0 || v + i >= V ? 0.0f : d * ((v + i == target ? 1.0f : 0.0f) - p);
        }
        store(dx + v, dy, Vp - v);
    }
}

__global__ void __launch_bounds__(FORWARD_THREADS)
    forward(float *logprobs, float *lse, float *entropy, const act *logits, const int32_t *targets, float invtemp,
            int V, int Vp) {
    const int64_t n = blockIdx.x;
    forward_row(logprobs + n, lse + n, entropy ? entropy + n : nullptr, logits + n * Vp, targets[n], invtemp, V);
}

__global__ void __launch_bounds__(BACKWARD_THREADS)
    backward(act *dlogits, const float *dlogprobs, const act *logits, const int32_t *targets, const float *lse,
             float invtemp, int V, int Vp) {
    const int64_t n = blockIdx.x;
    backward_row<BACKWARD_THREADS>(dlogits + n * Vp, dlogprobs[n], logits + n * Vp, targets[n], lse[n], invtemp, V, Vp);
}

__global__ void __launch_bounds__(FORWARD_THREADS)
    both(act *dlogits, float *logprobs, float *lse, const float *dlogprobs, const act *logits, const int32_t *targets,
         float invtemp, int V, int Vp) {
    const int64_t n = blockIdx.x;
    const act *x = logits + n * Vp;
    const int32_t target = targets[n];
    forward_row(logprobs + n, lse + n, nullptr, x, target, invtemp, V);
    __syncthreads(); /* lse is there, and nobody reads the row any more for forward's sake */
    backward_row<FORWARD_THREADS>(dlogits + n * Vp, dlogprobs[n], x, target, lse[n], invtemp, V, Vp);
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

void OPERATOR(logprob_forward_backward)(act *dlogits, float *logprobs, float *lse, const float *dlogprobs,
                                        const act *logits, const int32_t *targets, float invtemp, int N, int V,
                                        int Vp) {
    launch(Grid(N, FORWARD_THREADS), both, dlogits, logprobs, lse, dlogprobs, logits, targets, invtemp, V, Vp);
}

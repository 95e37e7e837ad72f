/* logprob.cu -- log-probabilities of targets and their gradient: a block for each row.
 *
 * Forward reads the row once: each thread keeps the greatest value it met and two sums relative to it, which it scales
 * down when it meets a greater one; the threads' are then put together the same way.  Bound by memory: bf16 2 bytes a
 * value forward, 4 backward; and 4 for both at once, whose second reading comes from L2.
 *
 * That takes few instructions a value: those 4 bytes are the time of 27.  exp(x / temperature) is
 * 2^(x * factor), a multiply-add and an exp2 where expf has ten; and what the end of a row or the entropy needs is not
 * done for every value. */
#include "ops.cuh"

namespace {

/* 768: two blocks on an SM, so that L2 keeps their rows from the first reading to the second.  They have 40 registers a
 * thread, enough for a vector under way while another is worked on. */
enum { FORWARD_THREADS = 768, BACKWARD_THREADS = 256, TOGETHER = 2 };

/* Over some values x: the greatest, and of below = (x - max) * factor the sum of 2^below, and of 2^below * below. */
struct Tally {
    float max, sum, weighted;
};

/* What the values are measured from: a maximum of -infinity would make -infinity - -infinity. */
__device__ float origin(float max) { return max == -INFINITY ? 0.0f : max; }

/* The tally, seen from another maximum that is no smaller. */
__device__ Tally seen_from(Tally t, float max, float factor) {
    if (t.max == -INFINITY) return {max, t.sum, t.weighted}; /* nothing, or what is not a number */
    const float below = (t.max - origin(max)) * factor, scale = exp2_fast(below);
    return {max, t.sum * scale, scale > 0.0f ? scale * (t.weighted + t.sum * below) : 0.0f};
}

/* The same bits whichever is first. */
__device__ Tally together(Tally a, Tally b, float factor) {
    const float max = fmaxf(a.max, b.max);
    a = seen_from(a, max, factor), b = seen_from(b, max, factor);
    return {max, a.sum + b.sum, a.weighted + b.weighted};
}

__device__ Tally warp_tally(Tally t, float factor) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const Tally other = {shuffle_xor(t.max, lanes), shuffle_xor(t.sum, lanes), shuffle_xor(t.weighted, lanes)};
        t = together(t, other, factor);
    }
    return t;
}

/* work(v, vector) for each vector of a row of V values, up to v = end, that is this thread's, with the next one under
 * way.  They take turns in two variables: a vector that is moved is waited for.  Behind the last that one is read
 * again: a load that may or may not happen would have its place moved too.  whole: all vectors of a row are. */
template <int THREADS, bool whole, class Work>
__device__ void each_vector(const act *row, int V, int end, Work work) {
    enum { STEP = THREADS * VEC };
    auto at = [=](int v) {
        const int there = v < end ? v : v - STEP;
        return vector_at<whole>(row + there, V - there);
    };
    int v = (int)threadIdx.x * VEC;
    if (v >= end) return;
    Pack<act, VEC> even = at(v), odd;
#pragma unroll 1
    for (; v < end; v += 2 * STEP) {
        odd = at(v + STEP);
        work(v, even);
        if (v + STEP >= end) return;
        even = at(v + 2 * STEP);
        work(v + STEP, odd);
    }
}

template <bool entropy, bool whole>
__device__ Tally thread_tally(const act *row, float factor, int V) {
    Tally t = {-INFINITY, 0.0f, 0.0f};
    each_vector<FORWARD_THREADS, whole>(row, V, V, [&](int v, const Pack<act, VEC> &pack) {
        float x[VEC], max = t.max;
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = pack[i];
        if (V - v < VEC) {
#pragma unroll
            for (int i = 0; i < VEC; i++)
                if (v + i >= V) x[i] = -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < VEC; i++) max = fmaxf(max, x[i]);
        if (max > t.max) t = seen_from(t, max, factor);
        const float from = origin(max) * factor;
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const float below = fmaf(x[i], factor, -from), e = exp2_fast(below);
            t.sum += e;
            if (entropy && e > 0.0f) t.weighted += e * below; /* a logit of -infinity would make 0 * infinity */
        }
    });
    return t;
}

/* Over the block, in its first thread. */
__device__ Tally block_tally(Tally t, float factor) {
    enum { WARPS = FORWARD_THREADS / WARP };
    SHARED(float, parts, 3 * WARPS);
    t = warp_tally(t, factor);
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
    return warp_tally(t, factor);
}

/* A row of V values, x. */
template <bool with_entropy, bool whole>
__device__ void forward_row(float *logprob, float *lse, float *entropy, const act *x, int32_t target, float invtemp,
                            int V) {
    const float factor = invtemp * LOG2_E;
    const Tally t = block_tally(thread_tally<with_entropy, whole>(x, factor, V), factor);
    if (threadIdx.x > 0) return;
    const float log_sum = logf(t.sum), log_all = t.max * invtemp + log_sum;
    *lse = log_all;
    *logprob = target < 0 ? 0.0f : to_float(x[target]) * invtemp - log_all;
    if (with_entropy) *entropy = log_sum - LN_2 * (t.weighted / t.sum); /* log p = y - max - log sum */
}

template <int THREADS, bool whole>
__device__ void backward_row(act *dx, float dlogprob, const act *x, int32_t target, float lse, float invtemp, int V,
                             int Vp) {
    const float d = target < 0 ? 0.0f : invtemp * dlogprob, factor = invtemp * LOG2_E, from = lse * LOG2_E;
    /* Of the target's logit, by the thread that has it in its vectors, and before dx may take the place of x. */
    const bool has_target = target >= 0 && target / VEC % THREADS == (int)threadIdx.x;
    const float at_target = has_target ? d - d * exp2_fast(fmaf(to_float(x[target]), factor, -from)) : 0.0f;
    each_vector<THREADS, whole>(x, V, Vp, [&](int v, const Pack<act, VEC> &pack) {
        float dy[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) dy[i] = -d * exp2_fast(fmaf(pack[i], factor, -from));
        if (target < 0 || V - v < VEC) { /* 0 whatever is in the row */
#pragma unroll
            for (int i = 0; i < VEC; i++)
                if (target < 0 || v + i >= V) dy[i] = 0.0f;
        }
        vector_to<whole>(dx + v, dy, Vp - v);
    });
    if (has_target) from_float(dx[target], at_target);
}

template <bool with_entropy>
__global__ void __launch_bounds__(FORWARD_THREADS, TOGETHER)
    forward(float *logprobs, float *lse, float *entropy, const act *logits, const int32_t *targets, float invtemp,
            int V, int Vp) {
    const int64_t n = blockIdx.x;
    forward_row<with_entropy, false>(logprobs + n, lse + n, with_entropy ? entropy + n : nullptr, logits + n * Vp,
                                     targets[n], invtemp, V);
}

__global__ void __launch_bounds__(BACKWARD_THREADS)
    backward(act *dlogits, const float *dlogprobs, const act *logits, const int32_t *targets, const float *lse,
             float invtemp, int V, int Vp) {
    const int64_t n = blockIdx.x;
    backward_row<BACKWARD_THREADS, false>(dlogits + n * Vp, dlogprobs[n], logits + n * Vp, targets[n], lse[n], invtemp,
                                          V, Vp);
}

template <bool whole>
__global__ void __launch_bounds__(FORWARD_THREADS, TOGETHER)
    both(act *dlogits, float *logprobs, float *lse, const float *dlogprobs, const act *logits, const int32_t *targets,
         float invtemp, int V, int Vp) {
    const int64_t n = blockIdx.x;
    const act *x = logits + n * Vp;
    const int32_t target = targets[n];
    forward_row<false, whole>(logprobs + n, lse + n, nullptr, x, target, invtemp, V);
    __syncthreads(); /* lse is there, and nobody reads the row any more for forward's sake */
    backward_row<FORWARD_THREADS, whole>(dlogits + n * Vp, dlogprobs[n], x, target, lse[n], invtemp, V, Vp);
}

}  // namespace

void OPERATOR(logprob_forward)(float *logprobs, float *lse, float *entropy, const act *logits, const int32_t *targets,
                               float invtemp, int N, int V, int Vp) {
    launch(Grid(N, FORWARD_THREADS), entropy ? forward<true> : forward<false>, logprobs, lse, entropy, logits, targets,
           invtemp, V, Vp);
}

void OPERATOR(logprob_backward)(act *dlogits, const float *dlogprobs, const act *logits, const int32_t *targets,
                                const float *lse, float invtemp, int N, int V, int Vp) {
    launch(Grid(N, BACKWARD_THREADS), backward, dlogits, dlogprobs, logits, targets, lse, invtemp, V, Vp);
}

void OPERATOR(logprob_forward_backward)(act *dlogits, float *logprobs, float *lse, const float *dlogprobs,
                                        const act *logits, const int32_t *targets, float invtemp, int N, int V,
                                        int Vp) {
    const bool whole = Vp % VEC == 0 && on_16_bytes(dlogits) && on_16_bytes(logits);
    launch(Grid(N, FORWARD_THREADS), whole ? both<true> : both<false>, dlogits, logprobs, lse, dlogprobs, logits,
           targets, invtemp, V, Vp);
}

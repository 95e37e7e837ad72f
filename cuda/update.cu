/* update.cu -- loss, norm of the gradient, clipping, AdamW.  No word from the host: offsets, sums and `hyper` lie on
 * the device.  Bound by memory: 4 bytes a value for the norm, 28 for AdamW. */
#include "ops.cuh"

namespace {

enum { THREADS = 256, WARPS = THREADS / WARP, SHARES = 1024 };
enum { FLOATS = 4 }; /* of one access */

/* Sum over the block, in a fixed order, in thread 0.  `turn` alternates between 0 and 1 from call to call: thread 0 may
 * still read what the last call left, so one barrier a call is enough. */
__device__ double block_sum(double x, int turn) {
    SHARED(double, parts, 2 * WARPS);
    const Shared<double> mine = parts + turn * WARPS;
    x = warp_sum(x);
    if (lane_index() == 0) mine[warp_index()] = x;
    __syncthreads();
    if (threadIdx.x > 0) return 0.0;
    for (int w = 1; w < WARPS; w++) x += mine[w];
    return x;
}

/* The host does not know how long the tensors are.  All values, of one tensor after the other, are cut into SHARES
 * equal shares, of whole accesses and no less than a block does at once. */
__device__ int64_t share_of(const int64_t *offsets, int n) {
    const int64_t least = THREADS * FLOATS, all = offsets[n] - offsets[0];
    const int64_t share = (all + SHARES * FLOATS - 1) / (SHARES * FLOATS) * FLOATS;
    return share < least ? least : share;
}

/* The last tensor that begins at or before `at`. */
__device__ int tensor_at(const int64_t *offsets, int n, int64_t at) {
    int low = 0, high = n;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offsets[middle] <= at) low = middle;
        else high = middle;
    }
    return low;
}

__device__ double squares(const float *x, int64_t begin, int64_t end) {
    double sum = 0.0;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x * FLOATS; i < end; i += THREADS * FLOATS) {
        const Pack<float, FLOATS> pack = load<FLOATS>(x + i, end - i);
#pragma unroll
        for (int k = 0; k < FLOATS; k++) sum = fma((double)pack[k], (double)pack[k], sum);
    }
    return sum;
}

/* What share b has of tensor j goes to partial[b + j]: walking along memory, either b or j grows, so no two are there.
 */
__global__ void __launch_bounds__(THREADS)
    square_parts(double *partial, const float *x, const int64_t *offsets, int n) {
    const int64_t share = share_of(offsets, n), begin = offsets[0] + blockIdx.x * share;
    const int64_t end = begin + share < offsets[n] ? begin + share : offsets[n];
    if (begin >= end) return;
    for (int j = tensor_at(offsets, n, begin); j < n && offsets[j] < end; j++) {
        const int64_t from = offsets[j] > begin ? offsets[j] : begin, to = offsets[j + 1] < end ? offsets[j + 1] : end;
        const double sum = block_sum(squares(x, from, to), j % 2);
        if (threadIdx.x == 0) partial[blockIdx.x + j] = sum;
    }
}

__global__ void __launch_bounds__(THREADS)
    add_parts(double *sums, const double *partial, const int64_t *offsets, int n) {
    const int64_t j = blockIdx.x, share = share_of(offsets, n);
    const int64_t begin = offsets[j] - offsets[0], end = offsets[j + 1] - offsets[0];
    double sum = 0.0;
    for (int64_t b = begin / share + threadIdx.x; b * share < end; b += THREADS)
        sum += begin < end ? partial[b + j] : 0.0;
    sum = block_sum(sum, 0);
    if (threadIdx.x == 0) sums[j] = sum;
}

__global__ void __launch_bounds__(THREADS)
    add_loss(double *loss, const float *logprobs, const float *dlogprobs, int N) {
    double sum = 0.0;
    for (int n = (int)threadIdx.x; n < N; n += THREADS) sum = fma((double)logprobs[n], (double)dlogprobs[n], sum);
    sum = block_sum(sum, 0);
    if (threadIdx.x == 0) *loss += sum;
}

__global__ void __launch_bounds__(THREADS)
    clip(float *hyper, double *norm, const double *loss, const double *sums, int n) {
    double sum = 0.0;
    for (int j = (int)threadIdx.x; j < n; j += THREADS) sum += sums[j];
    sum = block_sum(sum, 0);
    if (threadIdx.x > 0) return;
    const double all = sqrt(sum), most = (double)hyper[HYPER_CLIP];
    *norm = all;
    const bool bad = !isfinite(all) || !isfinite(*loss);
    if (bad || all > (double)hyper[HYPER_NORM_LIMIT] || *loss > (double)hyper[HYPER_LOSS_LIMIT])
        hyper[HYPER_SCALE] = NAN;
    else hyper[HYPER_SCALE] = most > 0.0 && all > most ? (float)(most / all) : 1.0f;
}

struct Adam {
    float *weights, *m, *v;
    bf16 *rounded;
    const float *grads, *hyper;
    const int64_t *offsets;
    const int32_t *decays;
    int n;
};

enum { EACH = 8 }; /* values of a thread, of one tensor or of several: 16 bytes in bf16 */

__global__ void __launch_bounds__(THREADS) adamw(Adam a) {
    const float *hyper = a.hyper;
    const int64_t at = a.offsets[0] + ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
    const int64_t count = a.offsets[a.n] - at;
    if (count <= 0 || isnan(hyper[HYPER_SCALE])) return;
    const float beta1 = hyper[HYPER_BETA1], beta2 = hyper[HYPER_BETA2], lr = hyper[HYPER_LR], eps = hyper[HYPER_EPS];
    const float c1 = hyper[HYPER_C1], c2 = hyper[HYPER_C2], scale = hyper[HYPER_SCALE];
    int j = tensor_at(a.offsets, a.n, at);
    Pack<float, EACH> w = load<EACH>(a.weights + at, count), m1 = load<EACH>(a.m + at, count);
    Pack<float, EACH> m2 = load<EACH>(a.v + at, count), grad = load<EACH>(a.grads + at, count);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        while (j + 1 < a.n && a.offsets[j + 1] <= at + i) j++;
        const float decay = a.decays[j] ? hyper[HYPER_DECAY] : 0.0f, g = grad[i] * scale;
        m1.x[i] = beta1 * m1[i] + (1.0f - beta1) * g;
        m2.x[i] = beta2 * m2[i] + (1.0f - beta2) * g * g;
        const float step = m1[i] / c1 / (sqrtf(m2[i] / c2) + eps);
        w.x[i] -= lr * (step + decay * w[i]);
    }
    store(a.weights + at, w, count);
    store(a.m + at, m1, count);
    store(a.v + at, m2, count);
    if (a.rounded) store(a.rounded + at, w.x, count);
}

}  // namespace

void OPERATOR(square_sums)(double *sums, const float *x, const int64_t *offsets, int n) {
    if (n == 0) return;
    double *partial = (double *)scratch(((size_t)n + SHARES) * sizeof *partial);
    launch(Grid(SHARES, THREADS), square_parts, partial, x, offsets, n);
    launch(Grid(n, THREADS), add_parts, sums, partial, offsets, n);
}

void OPERATOR(loss_add)(double *loss, const float *logprobs, const float *dlogprobs, int N) {
    launch(Grid(1, THREADS), add_loss, loss, logprobs, dlogprobs, N);
}

void OPERATOR(clip_scale)(float *hyper, double *norm, const double *loss, const double *sums, int n) {
    launch(Grid(1, THREADS), clip, hyper, norm, loss, sums, n);
}

void OPERATOR(adamw)(float *weights, float *m, float *v, void *rounded, const float *grads, const float *hyper,
                     const int64_t *offsets, const int32_t *decays, int n, int64_t size) {
    const Adam a = {weights, m, v, (bf16 *)rounded, grads, hyper, offsets, decays, n};
    launch(Grid(divide_up(size, THREADS * EACH), THREADS), adamw, a);
}

/* norm.cu -- LayerNorm and RMSNorm: one text, `with_mean` tells them apart.  What is computed: csrc/ops_ref.c.
 *
 * Forward: a warp for each row.  The row is read from memory once and then twice more from the first cache (mean,
 * variance, result).  Backward: a block for each chunk of rows, one row after the other; a thread owns the same columns
 * of each, so the sums over the chunk's rows need no barrier.  They lie in shared memory, or, where rows are too long
 * for that, at once in their place in working memory; a second kernel adds the chunks in order, in double.  Column
 * VEC k + i lies at (i, k): lanes, which differ in k, touch neighbours and so different banks.  Chunks follow from N
 * alone, so the bits do not know the device.  Bound by memory: bf16 4 bytes a value forward, 8 backward.
 */
#include "norm.cuh"

namespace {

enum { ROWS = 8 }; /* of a block, forward: a warp each */

template <bool with_mean>
__global__ void __launch_bounds__(ROWS *WARP)
    norm_forward(act *out, float *mean, float *rstd, const act *in, const float *weight, const float *bias, float eps,
                 int N, int C) {
    const int64_t n = (int64_t)blockIdx.x * ROWS + warp_index();
    launch_next();
    if (blockIdx.x == 0 && threadIdx.x == 0) prefetch_row(weight, C), prefetch_row(bias, C);
    wait_earlier();
    if (n >= N) return;
    const act *x = in + n * C;
    const Moments m = row_moments(x, with_mean, eps, C);
    for (int c = lane_index() * VEC; c < C; c += WARP * VEC) {
        const Pack<act, VEC> pack = load<VEC>(x + c, C - c);
        const Pack<float, VEC> w = load<VEC>(weight + c, C - c);
        Pack<float, VEC> b = {};
        if (bias) b = load<VEC>(bias + c, C - c);
        float y[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) y[i] = normalised(pack[i], m, w[i], b[i]);
        store(out + n * C + c, y, C - c);
    }
    if (lane_index() > 0) return;
    if (with_mean) mean[n] = m.mean;
    rstd[n] = m.rstd;
}

/* ---- backward ---- */

enum { MOST_THREADS = 256, MOST_WARPS = MOST_THREADS / WARP };
enum { DWEIGHT, DBIAS, DBIAS_IN, SUMS };
enum { CHUNKS = 1024, FEWEST_ROWS = 4, MOST_ROWS = 32 }; /* a chain of floats is no longer than a chunk */

struct Backward {
    act *din;
    float *grads[SUMS]; /* NULL: that sum is not wanted */
    const act *dout, *dres, *in;
    const float *weight, *mean, *rstd;
    float *partial; /* (chunks, SUMS, VEC, vectors) */
    int N, C, rows, chunks, vectors;
};

struct Two {
    float a, b;
};

/* Sums of a and b over the block, the same bits in each thread.  `turn` alternates between 0 and 1 from call to call:
 * a thread may still read what the last call left, so one barrier a call is enough. */
__device__ Two block_sums(Two x, int turn) {
    SHARED(float, parts, 2 * 2 * MOST_WARPS);
    const Shared<float> a = parts + turn * 2 * MOST_WARPS, b = a + MOST_WARPS;
    x.a = warp_sum(x.a), x.b = warp_sum(x.b);
    if (lane_index() == 0) a[warp_index()] = x.a, b[warp_index()] = x.b;
    __syncthreads();
    Two sum = {0.0f, 0.0f};
    for (int w = 0; w < (int)blockDim.x / WARP; w++) sum.a += a[w], sum.b += b[w];
    return sum;
}

/* Where the sum of column VEC k + i lies. */
__device__ int64_t place(const Backward &p, int sum, int i, int k) { return ((int64_t)sum * VEC + i) * p.vectors + k; }

/* With norm = (in - mean) * rstd and dnorm = dout * weight, and averages over the row,
 * din = dres + rstd * (dnorm - average(dnorm) - norm * average(dnorm * norm)).  Behind the end of a row all are 0. */
template <bool with_mean, class Sums>
__device__ void backward_row(const Backward &p, int64_t n, int turn, Sums sums) {
    const act *x = p.in + n * p.C, *dout = p.dout + n * p.C;
    const float mean = with_mean ? p.mean[n] : 0.0f, rstd = p.rstd[n];
    Two two = {0.0f, 0.0f};
    for (int k = (int)threadIdx.x; k < p.vectors; k += (int)blockDim.x) {
        const int c = k * VEC, count = p.C - c;
        const Pack<act, VEC> in = load<VEC>(x + c, count), dy = load<VEC>(dout + c, count);
        const Pack<float, VEC> w = load<VEC>(p.weight + c, count);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const float norm = (in[i] - mean) * rstd, dnorm = dy[i] * w[i];
            two.a += dnorm, two.b += dnorm * norm;
            if (p.grads[DWEIGHT]) sums[place(p, DWEIGHT, i, k)] += dy[i] * norm;
            if (p.grads[DBIAS]) sums[place(p, DBIAS, i, k)] += dy[i];
        }
    }
    two = block_sums(two, turn);
    const float through_mean = with_mean ? two.a / (float)p.C : 0.0f, through_rstd = two.b / (float)p.C;
    for (int k = (int)threadIdx.x; k < p.vectors; k += (int)blockDim.x) {
        const int c = k * VEC, count = p.C - c;
        const Pack<act, VEC> in = load<VEC>(x + c, count), dy = load<VEC>(dout + c, count);
        const Pack<float, VEC> w = load<VEC>(p.weight + c, count);
        Pack<act, VEC> dres = {};
        if (p.dres) dres = load<VEC>(p.dres + n * p.C + c, count);
        float din[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            const float norm = (in[i] - mean) * rstd, dnorm = dy[i] * w[i];
            din[i] = dres[i] + rstd * (dnorm - through_mean - norm * through_rstd);
            if (p.grads[DBIAS_IN]) sums[place(p, DBIAS_IN, i, k)] += din[i];
        }
        store(p.din + n * p.C + c, din, count);
    }
}

template <bool with_mean, class Sums>
__device__ void backward_chunk(const Backward &p, Sums sums) {
    const int64_t begin = (int64_t)blockIdx.x * p.rows, end = begin + p.rows < p.N ? begin + p.rows : p.N;
    for (int k = (int)threadIdx.x; k < p.vectors; k += (int)blockDim.x)
        for (int i = 0; i < SUMS * VEC; i++) sums[place(p, 0, i, k)] = 0.0f;
    for (int64_t n = begin; n < end; n++) backward_row<with_mean>(p, n, (int)(n - begin) % 2, sums);
}

template <bool with_mean, bool in_shared>
__global__ void __launch_bounds__(MOST_THREADS) norm_backward(Backward p) {
    float *partial = p.partial + blockIdx.x * place(p, SUMS, 0, 0);
    launch_next(), wait_earlier();
    if (!in_shared) return backward_chunk<with_mean>(p, partial);
    SHARED_DYNAMIC(float, sums);
    backward_chunk<with_mean>(p, sums);
    for (int k = (int)threadIdx.x; k < p.vectors; k += (int)blockDim.x)
        for (int i = 0; i < SUMS * VEC; i++) partial[place(p, 0, i, k)] = sums[place(p, 0, i, k)];
}

enum { GROUPS = 16 }; /* warps of a block, each with its share of the chunks of 32 places */

/* Add the chunks, and the finished sums to the gradients. */
__global__ void __launch_bounds__(GROUPS *WARP) add_chunks(Backward p) {
    SHARED(double, parts, GROUPS *WARP);
    const int64_t at = (int64_t)blockIdx.x * WARP + lane_index(), width = place(p, SUMS, 0, 0), size = width / SUMS;
    const int sum_index = (int)(at / size), c = (int)(at % p.vectors) * VEC + (int)(at % size / p.vectors);
    float *grad = sum_index == DWEIGHT ? p.grads[DWEIGHT] : sum_index == DBIAS ? p.grads[DBIAS] : p.grads[DBIAS_IN];
    if (at >= width || c >= p.C) grad = NULL;
    const int share = (p.chunks + GROUPS - 1) / GROUPS, begin = warp_index() * share;
    const int end = begin + share < p.chunks ? begin + share : p.chunks;
    double sum = 0.0;
    launch_next(), wait_earlier();
    for (int chunk = begin; grad && chunk < end; chunk++) sum += (double)p.partial[chunk * width + at];
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (warp_index() > 0 || !grad) return;
    for (int g = 1; g < GROUPS; g++) sum += parts[g * WARP + lane_index()];
    grad[c] += (float)sum;
}

template <bool with_mean>
void backward(Backward p, const char *op) {
    int64_t rows = divide_up(p.N, CHUNKS);
    p.rows = rows < FEWEST_ROWS ? FEWEST_ROWS : rows > MOST_ROWS ? MOST_ROWS : (int)rows;
    p.chunks = (int)divide_up(p.N, p.rows);
    if (p.chunks == 0) return;
    p.vectors = (int)divide_up(p.C, VEC);
    const int64_t width = (int64_t)SUMS * VEC * p.vectors;
    const size_t bytes = (size_t)width * sizeof(float);
    p.partial = (float *)scratch((size_t)p.chunks * bytes);
    const int threads = threads_for(p.vectors, MOST_THREADS);
    if (bytes <= 40 << 10) launch_early(Grid(p.chunks, threads, bytes, op), norm_backward<with_mean, true>, p);
    else launch_early(Grid(p.chunks, threads, 0, op), norm_backward<with_mean, false>, p);
    launch_early(Grid(divide_up(width, WARP), GROUPS * WARP, 0, op), add_chunks, p);
}

}  // namespace

void OPERATOR(layernorm_forward)(act *out, float *mean, float *rstd, const act *in, const float *weight,
                                 const float *bias, float eps, int N, int C) {
    launch_early(Grid(divide_up(N, ROWS), ROWS * WARP), norm_forward<true>, out, mean, rstd, in, weight, bias, eps, N,
                 C);
}

void OPERATOR(rmsnorm_forward)(act *out, float *rstd, const act *in, const float *weight, float eps, int N, int C) {
    float *none = NULL;
    launch_early(Grid(divide_up(N, ROWS), ROWS * WARP), norm_forward<false>, out, none, rstd, in, weight, none, eps, N,
                 C);
}

void OPERATOR(layernorm_backward)(act *din, float *dweight, float *dbias, float *dbias_in, const act *dout,
                                  const act *dres, const act *in, const float *weight, const float *mean,
                                  const float *rstd, int N, int C) {
    backward<true>({din, {dweight, dbias, dbias_in}, dout, dres, in, weight, mean, rstd, NULL, N, C, 0, 0, 0},
                   __func__);
}

void OPERATOR(rmsnorm_backward)(act *din, float *dweight, float *dbias_in, const act *dout, const act *dres,
                                const act *in, const float *weight, const float *rstd, int N, int C) {
    backward<false>({din, {dweight, NULL, dbias_in}, dout, dres, in, weight, NULL, rstd, NULL, N, C, 0, 0, 0},
                    __func__);
}

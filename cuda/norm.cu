/* norm.cu -- LayerNorm and RMSNorm: one text, `with_mean` tells them apart.  What is computed: csrc/ops_ref.c.
 *
 * Forward: a warp for each row, which stays in registers, or, where it is long or begins anywhere, is read twice more
 * from the first cache (mean, variance, result).  Backward: a block for each chunk of rows, one row after the other; a
 * thread owns the same columns of each, so the sums over the chunk's rows need no barrier.  They lie in registers where
 * that is one vector, else in shared memory or, where rows are too long for that, at once in their place in working
 * memory; a second kernel adds the chunks in order, in double.  Column VEC k + i lies at (i, k): lanes, which differ in
 * k, touch neighbours and so different banks.  Chunks follow from N alone, so the bits do not know the device.  Bound
 * by memory: bf16 4 bytes a value forward, 8 backward.
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

/* The same, to the same bits, of rows of at most V whole vectors a lane; all arrays lie on 16 bytes. */
template <bool with_mean, int V>
__global__ void __launch_bounds__(ROWS *WARP)
    norm_forward_short(act *out, float *mean, float *rstd, const act *in, const float *weight, const float *bias,
                       float eps, int N, int C) {
    const int64_t n = (int64_t)blockIdx.x * ROWS + warp_index();
    launch_next();
    if (blockIdx.x == 0 && threadIdx.x == 0) prefetch_row(weight, C), prefetch_row(bias, C);
    wait_earlier();
    if (n >= N) return;
    KeptRow<V> row;
    row.read(in + n * C, C);
    const Moments m = row.moments(with_mean, eps, C);
#pragma unroll
    for (int v = 0; v < V; v++) {
        const int c = row.column(v);
        if (c >= C) continue;
        const Pack<float, VEC> w = load_all<VEC>(weight + c);
        Pack<float, VEC> b = {};
        if (bias) b = load_all<VEC>(bias + c);
        float y[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) y[i] = normalised(row.x[v][i], m, w[i], b[i]);
        store_all(out + n * C + c, pack_of(act{}, y));
    }
    if (lane_index() > 0) return;
    if (with_mean) mean[n] = m.mean;
    rstd[n] = m.rstd;
}

template <bool with_mean>
void forward(act *out, float *mean, float *rstd, const act *in, const float *weight, const float *bias, float eps,
             int N, int C, const char *op) {
    const int kept = on_16_bytes(out) && on_16_bytes(weight) && on_16_bytes(bias) ? kept_vectors(in, C) : 0;
    const Grid grid(divide_up(N, ROWS), ROWS * WARP, 0, op);
    auto kernel = norm_forward<with_mean>;
    if (kept == 4) kernel = norm_forward_short<with_mean, 4>;
    else if (kept == 8) kernel = norm_forward_short<with_mean, 8>;
    else if (kept == 16) kernel = norm_forward_short<with_mean, 16>;
    launch_early(grid, kernel, out, mean, rstd, in, weight, bias, eps, N, C);
}

/* ---- backward ---- */

enum { MOST_THREADS = 512, MOST_WARPS = MOST_THREADS / WARP };
enum { DWEIGHT, DBIAS, DBIAS_IN, SUMS };
enum { CHUNKS = 1024, FEWEST_ROWS = 4, MOST_ROWS = 32 }; /* a chain of floats is no longer than a chunk */

struct Backward {
    act *din;
    float *grads[SUMS]; /* NULL: that sum is not wanted */
    const act *dout, *dres, *in;
    const float *weight, *mean, *rstd;
    float *partial; /* (chunks, SUMS, VEC, vectors) */
    int N, C, rows, chunks, vectors;
    float inverse; /* 1 / C: a division would be a call, and a row has two */
};

struct Two {
    float a, b;
};

/* What the warps of a block add up, of this call and the one before: a thread may still read what the last call left,
 * so one barrier a call is enough.  Warps that the block does not have count as 0. */
enum { PARTS = 2 * MOST_WARPS };
__device__ void clear(Shared<Two> parts) {
    if (threadIdx.x < PARTS) parts[threadIdx.x] = Two{0.0f, 0.0f};
    __syncthreads();
}

/* Sums of a and b over the block of at most `warps`, the same bits in each thread.  `turn` alternates between 0 and 1
 * from call to call. */
template <int warps>
__device__ Two block_sums(Two x, Shared<Two> parts, int turn) {
    const Shared<Two> now = parts + turn * MOST_WARPS;
    x.a = warp_sum(x.a), x.b = warp_sum(x.b);
    if (lane_index() == 0) now[warp_index()] = x;
    __syncthreads();
    Two sum = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < warps; w++) {
        const Two part = now[w];
        sum.a += part.a, sum.b += part.b;
    }
    return sum;
}

/* Where the sum of column VEC k + i lies. */
__device__ int64_t place(const Backward &p, int sum, int i, int k) { return ((int64_t)sum * VEC + i) * p.vectors + k; }

__device__ int64_t end_of_chunk(const Backward &p, int64_t begin) {
    return begin + p.rows < p.N ? begin + p.rows : p.N;
}

/* With norm = (in - mean) * rstd and dnorm = dout * weight, and averages over the row,
 * din = dres + rstd * (dnorm - average(dnorm) - norm * average(dnorm * norm)).  Behind the end of a row all are 0. */
template <bool with_mean, class Sums>
__device__ void backward_row(const Backward &p, int64_t n, Shared<Two> parts, int turn, Sums sums) {
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
    two = block_sums<MOST_WARPS>(two, parts, turn);
    const float through_mean = with_mean ? two.a * p.inverse : 0.0f, through_rstd = two.b * p.inverse;
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
    const int64_t begin = (int64_t)blockIdx.x * p.rows, end = end_of_chunk(p, begin);
    for (int k = (int)threadIdx.x; k < p.vectors; k += (int)blockDim.x)
        for (int i = 0; i < SUMS * VEC; i++) sums[place(p, 0, i, k)] = 0.0f;
    SHARED(Two, parts, PARTS);
    clear(parts);
    for (int64_t n = begin; n < end; n++) backward_row<with_mean>(p, n, parts, (int)(n - begin) % 2, sums);
}

template <bool with_mean, bool in_shared>
__global__ void __launch_bounds__(MOST_THREADS, 1) /* 1: as many registers as it likes, else ptxas spills two */
    norm_backward(Backward p) {
    float *partial = p.partial + blockIdx.x * place(p, SUMS, 0, 0);
    launch_next(), wait_earlier();
    if (!in_shared) return backward_chunk<with_mean>(p, partial);
    SHARED_DYNAMIC(float, sums);
    backward_chunk<with_mean>(p, sums);
    for (int k = (int)threadIdx.x; k < p.vectors; k += (int)blockDim.x)
        for (int i = 0; i < SUMS * VEC; i++) partial[place(p, 0, i, k)] = sums[place(p, 0, i, k)];
}

/* ---- backward, of rows of which a thread has no more than one vector: it stays in registers, as the sums do, and the
 * next row is on its way meanwhile ---- */

struct Part {
    Pack<act, VEC> in, dout, dres;
    float mean, rstd;
};

/* Zeros in a thread that has no vector of the row.  whole: all vectors of a row are. */
template <bool whole, class T>
__device__ Pack<T, VEC> vector_of(const T *p, int count) {
    Pack<T, VEC> pack = {};
    if (count > 0) pack = vector_at<whole>(p, count);
    return pack;
}

/* The part of row n at column c; `at` is where that lies. */
template <bool with_mean, bool whole>
__device__ Part part_of_row(const Backward &p, int64_t n, int64_t at, int count) {
    Part part = {};
    part.in = vector_of<whole>(p.in + at, count), part.dout = vector_of<whole>(p.dout + at, count);
    if (p.dres) part.dres = vector_of<whole>(p.dres + at, count);
    if (with_mean) part.mean = p.mean[n];
    part.rstd = p.rstd[n];
    return part;
}

template <bool with_mean, bool whole, int warps>
__global__ void __launch_bounds__(warps *WARP) norm_backward_short(Backward p) {
    const int k = (int)threadIdx.x, c = k * VEC, count = k < p.vectors ? p.C - c : 0;
    const int64_t begin = (int64_t)blockIdx.x * p.rows;
    const int rows = (int)(end_of_chunk(p, begin) - begin);
    int64_t at = begin * p.C + c;
    float sums[SUMS][VEC] = {};
    SHARED(Two, parts, PARTS);
    clear(parts);
    launch_next(), wait_earlier();
    const Pack<float, VEC> w = vector_of<whole>(p.weight + c, count);
    Part next = part_of_row<with_mean, whole>(p, begin, at, count);
#pragma unroll 2 /* so that what comes next needs not be moved */
    for (int r = 0; r < rows; r++, at += p.C) {
        const Part row = next;
        if (r + 1 < rows) next = part_of_row<with_mean, whole>(p, begin + r + 1, at + p.C, count);
        float norm[VEC], dnorm[VEC], din[VEC];
        Two two = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            norm[i] = (row.in[i] - row.mean) * row.rstd, dnorm[i] = row.dout[i] * w[i];
            two.a += dnorm[i], two.b += dnorm[i] * norm[i];
            sums[DWEIGHT][i] += row.dout[i] * norm[i], sums[DBIAS][i] += row.dout[i];
        }
        two = block_sums<warps>(two, parts, r % 2);
        const float through_mean = with_mean ? two.a * p.inverse : 0.0f, through_rstd = two.b * p.inverse;
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            din[i] = row.dres[i] + row.rstd * (dnorm[i] - through_mean - norm[i] * through_rstd);
            sums[DBIAS_IN][i] += din[i];
        }
        if (count > 0) vector_to<whole>(p.din + at, din, count);
    }
    float *partial = p.partial + blockIdx.x * place(p, SUMS, 0, 0);
#pragma unroll
    for (int sum = 0; sum < SUMS; sum++)
        if (count > 0 && p.grads[sum])
            for (int i = 0; i < VEC; i++) partial[place(p, sum, i, k)] = sums[sum][i];
}

enum { GROUPS = 32 }; /* warps of a block, each with its share of the chunks of 32 places */

/* Add the chunks, and the finished sums to the gradients. */
__global__ void __launch_bounds__(GROUPS *WARP) add_chunks(Backward p) {
    SHARED(double, parts, GROUPS *WARP);
    const int64_t at = (int64_t)blockIdx.x * WARP + lane_index(), width = place(p, SUMS, 0, 0), size = width / SUMS;
    const int sum_index = (int)(at / size), c = (int)(at % p.vectors) * VEC + (int)(at % size / p.vectors);
    float *grad = sum_index == DWEIGHT ? p.grads[DWEIGHT] : sum_index == DBIAS ? p.grads[DBIAS] : p.grads[DBIAS_IN];
    if (at >= width || c >= p.C) grad = NULL;
    const int share = (p.chunks + GROUPS - 1) / GROUPS, begin = warp_index() * share;
    const int end = !grad ? begin : begin + share < p.chunks ? begin + share : p.chunks;
    double sum = 0.0;
    launch_next(), wait_earlier();
#pragma unroll 8 /* so many reads are under way at a time */
    for (int chunk = begin; chunk < end; chunk++) sum += (double)p.partial[chunk * width + at];
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (warp_index() > 0 || !grad) return;
    for (int g = 1; g < GROUPS; g++) sum += parts[g * WARP + lane_index()];
    grad[c] += (float)sum;
}

bool all_on_16_bytes(const Backward &p) {
    return on_16_bytes(p.din) && on_16_bytes(p.dout) && on_16_bytes(p.dres) && on_16_bytes(p.in) &&
           on_16_bytes(p.weight);
}

template <bool with_mean>
void backward(Backward p, const char *op) {
    int64_t rows = divide_up(p.N, CHUNKS);
    p.rows = rows < FEWEST_ROWS ? FEWEST_ROWS : rows > MOST_ROWS ? MOST_ROWS : (int)rows;
    p.chunks = (int)divide_up(p.N, p.rows);
    if (p.chunks == 0) return;
    p.vectors = (int)divide_up(p.C, VEC);
    p.inverse = 1.0f / (float)p.C;
    const int64_t width = (int64_t)SUMS * VEC * p.vectors;
    const size_t bytes = (size_t)width * sizeof(float);
    p.partial = (float *)scratch((size_t)p.chunks * bytes);
    const int threads = threads_for(p.vectors, MOST_THREADS);
    const bool is_short = p.vectors <= MOST_THREADS, whole = p.C % VEC == 0 && all_on_16_bytes(p);
    const bool in_shared = !is_short && bytes <= 96 << 10;
    auto kernel = in_shared ? norm_backward<with_mean, true> : norm_backward<with_mean, false>;
    if (is_short && !whole) kernel = norm_backward_short<with_mean, false, MOST_WARPS>;
    else if (is_short && threads <= 4 * WARP) kernel = norm_backward_short<with_mean, true, 4>;
    else if (is_short && threads <= 8 * WARP) kernel = norm_backward_short<with_mean, true, 8>;
    else if (is_short) kernel = norm_backward_short<with_mean, true, MOST_WARPS>;
    launch_early(Grid(p.chunks, threads, in_shared ? bytes : 0, op), kernel, p);
    launch_early(Grid(divide_up(width, WARP), GROUPS * WARP, 0, op), add_chunks, p);
}

}  // namespace

void OPERATOR(layernorm_forward)(act *out, float *mean, float *rstd, const act *in, const float *weight,
                                 const float *bias, float eps, int N, int C) {
    forward<true>(out, mean, rstd, in, weight, bias, eps, N, C, __func__);
}

void OPERATOR(rmsnorm_forward)(act *out, float *rstd, const act *in, const float *weight, float eps, int N, int C) {
    forward<false>(out, NULL, rstd, in, weight, NULL, eps, N, C, __func__);
}

void OPERATOR(layernorm_backward)(act *din, float *dweight, float *dbias, float *dbias_in, const act *dout,
                                  const act *dres, const act *in, const float *weight, const float *mean,
                                  const float *rstd, int N, int C) {
    backward<true>({din, {dweight, dbias, dbias_in}, dout, dres, in, weight, mean, rstd, NULL, N, C, 0, 0, 0, 0.0f},
                   __func__);
}

void OPERATOR(rmsnorm_backward)(act *din, float *dweight, float *dbias_in, const act *dout, const act *dres,
                                const act *in, const float *weight, const float *rstd, int N, int C) {
    backward<false>({din, {dweight, NULL, dbias_in}, dout, dres, in, weight, NULL, rstd, NULL, N, C, 0, 0, 0, 0.0f},
                    __func__);
}

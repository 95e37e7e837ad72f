/* linear.cu -- the three products of a linear layer.
 *
 * PREC_BF16: tiles of bf16 in shared memory, fetched by cp.async in STAGES stages, multiplied by mma.sync; this is the
 * path of every GPU from sm_80 on.  What is not bf16 in memory, or does not lie on 16 bytes, is copied to working
 * memory first; the weights always are.  PREC_FP32: plain multiply-adds, there to check with.
 *
 * No operand is transposed in memory: a tile keeps the order of its matrix, [m or n][k] or [k][m or n], and ldmatrix
 * turns it.  Its rows are cut into chunks of 16 bytes, and chunk j of row r lies at j ^ r % 8, so that neither writing
 * rows nor reading columns of chunks meets the same banks twice.
 *
 * Order of summation, see csrc/ops.def.  Forward and towards the input: a chain of 512 values of k, chains added in
 * order.  Gradients of weights: a chain is one mma, 16 rows; 8 of them are added in float, and those sums in pairs of
 * floats, which keep what a float would lose. */
#include "held.cuh"
#include "linear.cuh"
#include "linear_few.cuh"

namespace {

enum { THREADS = 256, WARPS = THREADS / WARP }; /* of every block here */

/* A tile of sums lies in shared memory before it is written, so that rows go out 16 bytes at a time, and the code of
 * the functions is there once.  PAD floats behind each row: the lanes of an mma's result meet different banks. */
enum { PAD = 8 };

template <Product product, int rows, int columns>
__device__ void write_tile(const Output &o, Shared<float> tile, int m0, int n0, int M, int N) {
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < rows * columns / VEC; i += THREADS) {
        const int r = i / (columns / VEC), c = i % (columns / VEC) * VEC;
        if (m0 + r >= M || n0 + c >= N) continue;
        float x[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) x[j] = tile[r * (columns + PAD) + c + j];
        write<product>(o, x, m0 + r, n0 + c, N, N - (n0 + c));
    }
}

/* ---- bf16 on tensor cores ---- */

enum { STAGES = 3, BK = 64 };

/* A tile of `rows` by `width` values in shared memory. */
template <int rows, int width>
struct Tile {
    static constexpr int size = rows * width;

    __device__ static int place(int r, int c) { return r * width + ((c / CHUNK ^ r % 8) * CHUNK); }

    /* From row r0, column c0 of the matrix, of whole chunks; zeros where it has ended. */
    __device__ static void fetch(Shared<bf16> tile, const Matrix<bf16> &x, int r0, int c0) {
#pragma unroll 1 /* unrolled, its addresses take the registers of the sums */
        for (int i = (int)threadIdx.x; i < size / CHUNK; i += THREADS) {
            const int r = i / (width / CHUNK), c = i % (width / CHUNK) * CHUNK;
            const bool there = r0 + r < x.rows && c0 + c < x.cols;
            copy_async(tile + place(r, c), there ? x.p + (int64_t)(r0 + r) * x.ld + (c0 + c) : x.p, there ? 16 : 0);
        }
    }
};

/* Warps stand in WARPS_M rows; each has MT times NT products of 16 by 8. */
template <Product product>
struct Shape {
    static constexpr int WARPS_M = product == WEIGHT ? 4 : 2, WARPS_N = WARPS / WARPS_M;
    static constexpr int MT = product == WEIGHT ? 2 : 4, NT = 4;
    static constexpr int BM = WARPS_M * MT * 16, BN = WARPS_N * NT * 8;
    static constexpr bool A_BY_K = product == WEIGHT, B_BY_K = product != FORWARD; /* a row of the tile is one k */
    using A = Tile<A_BY_K ? BK : BM, A_BY_K ? BM : BK>;
    using B = Tile<B_BY_K ? BK : BN, B_BY_K ? BN : BK>;
    static constexpr int STAGE = A::size + B::size;
    static constexpr size_t BYTES = STAGES * STAGE * sizeof(bf16);
    static_assert(BM * (BN + PAD) * sizeof(float) <= BYTES, "the sums lie where the stages were");
};

template <Product product>
__device__ void fetch_stage(Shared<bf16> stages, const Matrix<bf16> &a, const Matrix<bf16> &b, int m0, int n0,
                            int step) {
    using S = Shape<product>;
    const Shared<bf16> stage = stages + step % STAGES * S::STAGE;
    const int k0 = step * BK;
    S::A::fetch(stage, a, S::A_BY_K ? k0 : m0, S::A_BY_K ? m0 : k0);
    S::B::fetch(stage + S::A::size, b, S::B_BY_K ? k0 : n0, S::B_BY_K ? n0 : k0);
}

/* The 16 by 16 values of a from (m, k), as multiply_add wants them. */
template <class S>
__device__ void load_a(uint32_t (&part)[4], Shared<bf16> tile, int m, int k) {
    const int lane = lane_index();
    if (S::A_BY_K)
        load_matrices_transposed(part, tile + S::A::place(k + lane / 16 * 8 + lane % 8, m + lane / 8 % 2 * 8));
    else load_matrices(part, tile + S::A::place(m + lane % 16, k + lane / 16 * 8));
}

/* The 16 by 16 values of b from (k, n): two products' worth, [0] and [1], [2] and [3]. */
template <class S>
__device__ void load_b(uint32_t (&part)[4], Shared<bf16> tile, int k, int n) {
    const int lane = lane_index();
    if (S::B_BY_K) load_matrices_transposed(part, tile + S::B::place(k + lane % 16, n + lane / 16 * 8));
    else load_matrices(part, tile + S::B::place(n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
}

/* A warp's products of one step of BK.  WEIGHT: each starts from zero and is then added to the sum. */
template <Product product, int MT, int NT>
__device__ void multiply_stage(float (&sum)[MT][NT][4], Shared<bf16> stage, int m, int n) {
    using S = Shape<product>;
#pragma unroll 2
    for (int k = 0; k < BK; k += 16) {
        uint32_t a[MT][4], b[NT / 2][4];
#pragma unroll
        for (int i = 0; i < MT; i++) load_a<S>(a[i], stage, m + 16 * i, k);
#pragma unroll
        for (int j = 0; j < NT / 2; j++) load_b<S>(b[j], stage + S::A::size, k, n + 16 * j);
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++) {
                if (product == WEIGHT) {
                    float chain[4] = {};
                    multiply_add(chain, a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
#pragma unroll
                    for (int e = 0; e < 4; e++) sum[i][j][e] += chain[e];
                } else {
                    multiply_add(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
                }
            }
    }
}

__device__ void add_to(float &total, float x) { total += x; }
__device__ void add_to(Kahan &total, float x) { total.add(x); }
__device__ float value(float total) { return total; }
__device__ float value(Kahan total) { return total.value(); }

template <Product product>
struct Total {
    using type = float;
};
template <>
struct Total<WEIGHT> {
    using type = Kahan;
};

template <Product product>
__global__ void __launch_bounds__(THREADS, 1)
    product_bf16(Output o, Matrix<bf16> a, Matrix<bf16> b, int M, int N, int K) {
    using S = Shape<product>;
    constexpr int MT = S::MT, NT = S::NT;
    constexpr int BLOCK =
        (product == WEIGHT ? ROW_BLOCK : K_BLOCK) * 2 / BK; /* steps, until the sum goes to the total */
    SHARED_DYNAMIC(bf16, stages);
    const int tiles_m = (M + S::BM - 1) / S::BM, steps = (K + BK - 1) / BK;
    const int m0 = (int)(blockIdx.x % tiles_m) * S::BM, n0 = (int)(blockIdx.x / tiles_m) * S::BN;
    const int m = warp_index() % S::WARPS_M * MT * 16, n = warp_index() / S::WARPS_M * NT * 8; /* in the tile */
    float sum[MT][NT][4] = {};
    typename Total<product>::type total[MT][NT][4] = {};

    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) fetch_stage<product>(stages, a, b, m0, n0, step);
        copy_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads(); /* this step's stage is there for all, and all have read that of the last */
        const int next = step + STAGES - 1;
        if (next < steps) fetch_stage<product>(stages, a, b, m0, n0, next);
        copy_async_commit(); /* nothing, at the end: the count of groups stays right */
        multiply_stage<product>(sum, stages + step % STAGES * S::STAGE, m, n);
        if ((step + 1) % BLOCK > 0 && step + 1 < steps) continue;
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) add_to(total[i][j][e], sum[i][j][e]), sum[i][j][e] = 0.0f;
    }

    __syncthreads(); /* the stages have been read: their place is free */
    const Shared<float> tile = shared_cast<float>(stages);
    const int row = m + lane_index() / 4, column = n + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                tile[(row + 16 * i + e / 2 * 8) * (S::BN + PAD) + column + 8 * j + e % 2] = value(total[i][j][e]);
    __syncthreads();
    write_tile<product, S::BM, S::BN>(o, tile, m0, n0, M, N);
}

/* A chunk of row r, from column c on; zeros where it has ended. */
template <class T>
__device__ void load_chunk(float (&values)[CHUNK], const Matrix<T> &x, int64_t r, int c) {
    const Pack<T, CHUNK> pack = load<CHUNK>(x.p + r * x.ld + c, x.cols - c);
#pragma unroll
    for (int j = 0; j < CHUNK; j++) values[j] = pack[j];
}
__device__ void load_chunk(float (&values)[CHUNK], const Matrix<Group> &x, int64_t r, int c) {
#pragma unroll
    for (int j = 0; j < CHUNK; j++) values[j] = c + j < x.cols ? held_value(x.p, PREC_INT8, x.cols, r, c + j) : 0.0f;
}

/* y (rows, ld) = x, rounded; ld is `cols` up to whole chunks, filled with zeros. */
template <class T>
__global__ void __launch_bounds__(THREADS) round_rows(bf16 *y, Matrix<T> x, int ld) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int64_t r = i / (ld / CHUNK);
    const int c = (int)(i % (ld / CHUNK)) * CHUNK;
    launch_next(), wait_earlier();
    if (r >= x.rows) return;
    float values[CHUNK];
    load_chunk(values, x, r, c);
    store(y + r * ld + c, values, CHUNK);
}

int chunks_of(int cols) { return (int)divide_up(cols, CHUNK) * CHUNK; }

/* Whether cp.async can fetch it where it is. */
template <class T>
bool fits(const Matrix<T> &x) {
    return sizeof(T) == sizeof(bf16) && x.ld == x.cols && x.ld % CHUNK == 0 && on_16_bytes(x.p);
}

template <class T>
size_t room_for(const Matrix<T> &x) {
    return fits(x) ? 0 : (size_t)x.rows * (size_t)chunks_of(x.cols) * sizeof(bf16);
}

/* x in bf16, of whole chunks: itself, or rounded to `room`, which moves on. */
template <class T>
Matrix<bf16> rounded(char *&room, const Matrix<T> &x, const char *op) {
    if (fits(x)) return {(const bf16 *)x.p, x.rows, x.cols, x.ld};
    bf16 *y = (bf16 *)room;
    const int ld = chunks_of(x.cols);
    room += room_for(x);
    launch_early(Grid(divide_up((int64_t)x.rows * (ld / CHUNK), THREADS), THREADS, 0, op), round_rows<T>, y, x, ld);
    return {y, x.rows, x.cols, ld};
}

/* ---- fp32 ---- */

/* Value c of row r. */
template <class T>
__device__ float value_at(const Matrix<T> &x, int r, int c) {
    return to_float(x.p[r * x.ld + c]);
}
__device__ float value_at(const Matrix<Group> &x, int r, int c) { return held_value(x.p, PREC_INT8, x.cols, r, c); }

enum { SIDE = 64, DEPTH = 16, EACH = 4 }; /* a block's tile; of each thread */

/* Of SIDE values m or n, from first, DEPTH of k; zeros where the matrix has ended. */
template <bool by_k, class T>
__device__ void load_part(Shared<float> part, const Matrix<T> &x, int first, int k0) {
    for (int i = (int)threadIdx.x; i < SIDE * DEPTH; i += THREADS) {
        const int k = by_k ? i / SIDE : i % DEPTH, m = by_k ? i % SIDE : i / DEPTH;
        const int r = by_k ? k0 + k : first + m, c = by_k ? first + m : k0 + k;
        part[k * SIDE + m] = r < x.rows && c < x.cols ? value_at(x, r, c) : 0.0f;
    }
}

template <Product product, class TA, class TB>
__global__ void __launch_bounds__(THREADS) product_fp32(Output o, Matrix<TA> a, Matrix<TB> b, int M, int N, int K) {
    using Sum = typename Total<product>::type;
    constexpr int BLOCK = product == WEIGHT ? ROW_CHAIN : K_BLOCK;
    SHARED(float, a_part, DEPTH *SIDE);
    SHARED(float, b_part, DEPTH *SIDE);
    const int tiles_m = (M + SIDE - 1) / SIDE;
    const int m0 = (int)(blockIdx.x % tiles_m) * SIDE, n0 = (int)(blockIdx.x / tiles_m) * SIDE;
    const int m = (int)threadIdx.x / (SIDE / EACH) * EACH, n = (int)threadIdx.x % (SIDE / EACH) * EACH;
    float chain[EACH][EACH] = {};
    Sum total[EACH][EACH] = {};
    for (int k0 = 0; k0 < K; k0 += DEPTH) {
        __syncthreads();
        load_part<product == WEIGHT>(a_part, a, m0, k0);
        load_part<product != FORWARD>(b_part, b, n0, k0);
        __syncthreads();
        for (int k = 0; k < DEPTH; k++) {
            float x[EACH], y[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) x[i] = a_part[k * SIDE + m + i], y[i] = b_part[k * SIDE + n + i];
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) chain[i][j] = fmaf(x[i], y[j], chain[i][j]);
            if ((k0 + k + 1) % BLOCK > 0 && k0 + k + 1 < K) continue;
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) add_to(total[i][j], chain[i][j]), chain[i][j] = 0.0f;
        }
    }
    SHARED(float, tile, SIDE *(SIDE + PAD));
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++) tile[(m + i) * (SIDE + PAD) + n + j] = value(total[i][j]);
    __syncthreads();
    write_tile<product, SIDE, SIDE>(o, tile, m0, n0, M, N);
}

/* ---- one of the three ---- */

/* Whether the product is Hopper's: by the device, and for products of nothing not. */
bool on_sm90(int M, int N, int K) {
    if (sizeof(act) != sizeof(bf16) || !OPERATOR(linear_sm90_room) || !is_sm90()) return false;
    return M > 0 && N > 0 && K > 0;
}

/* Whether a weight is read where it lies.  What writes weights comes before the tokens of the pass, which the host
 * copies in; a copy in bf16 that was made for this product does not. */
template <class T>
bool weight_is_told(const Matrix<T> &b, const Matrix<bf16> &b16) {
    return (const void *)b.p == (const void *)b16.p;
}

template <Product product, class TA, class TB>
void multiply(const Output &o, const Matrix<TA> &a, const Matrix<TB> &b, int prec, int M, int N, int K,
              const char *op) {
    if (prec == PREC_FP32) {
        launch(Grid(divide_up(M, SIDE) * divide_up(N, SIDE), THREADS, 0, op), product_fp32<product, TA, TB>, o, a, b, M,
               N, K);
        return;
    }
    using S = Shape<product>;
    char *room = NULL;
    const bool sm90 = on_sm90(M, N, K);
    const size_t bytes = room_for(a) + room_for(b) + (sm90 ? OPERATOR(linear_sm90_room)(product, M, N, K) : 0);
    if (bytes > 0) room = (char *)scratch(bytes);
    const Matrix<bf16> a16 = rounded(room, a, op), b16 = rounded(room, b, op);
    if constexpr (product == FORWARD)
        if (are_few(M, K)) return multiply_few<PlainRows>(o, a16, b16, weight_is_told(b, b16), M, N, K, op);
    if (sm90)
        return OPERATOR(linear_sm90)({product,       a16.p,  b16.p,  a16.rows, a16.cols, b16.rows,
                                      b16.cols,      a16.ld, b16.ld, o.out,    o.pre,    o.add,
                                      o.given,       o.bias, o.grad, o.dbias,  o.fn,     o.accumulate,
                                      (float *)room, M,      N,      K,        op});
    launch(Grid(divide_up(M, S::BM) * divide_up(N, S::BN), THREADS, S::BYTES, op), product_bf16<product>, o, a16, b16,
           M, N, K);
}

/* ---- column sums ---- */

enum { SUM_ROWS = 256 }; /* of a block: each warp has a chain of 32 */

/* partial (chunks, C) */
__global__ void __launch_bounds__(THREADS) column_parts(double *partial, const act *x, int N, int C, int strips) {
    SHARED(double, parts, WARPS *WARP *VEC);
    const int64_t chunk = blockIdx.x / strips, end = (chunk + 1) * SUM_ROWS < N ? (chunk + 1) * SUM_ROWS : N;
    const int c = ((int)(blockIdx.x % strips) * WARP + lane_index()) * VEC;
    float sum[VEC] = {};
#pragma unroll 4
    for (int64_t n = chunk * SUM_ROWS + warp_index(); n < end; n += WARPS) {
        const Pack<act, VEC> pack = load<VEC>(x + n * C + c, C - c);
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] += pack[i];
    }
    for (int i = 0; i < VEC; i++) parts[(i * WARPS + warp_index()) * WARP + lane_index()] = (double)sum[i];
    __syncthreads();
    for (int i = warp_index(); i < VEC; i += WARPS) {
        double all = 0.0;
        for (int w = 0; w < WARPS; w++) all += parts[(i * WARPS + w) * WARP + lane_index()];
        if (c + i < C) partial[chunk * C + c + i] = all;
    }
}

__global__ void __launch_bounds__(THREADS) add_column_parts(float *sums, const double *partial, int chunks, int C) {
    const int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (c >= C) return;
    double sum = 0.0;
#pragma unroll 8
    for (int64_t chunk = 0; chunk < chunks; chunk++) sum += partial[chunk * C + c];
    sums[c] += (float)sum;
}

/* sums += (C)  those of the columns of x (N, C) */
void add_column_sums(float *sums, const act *x, int N, int C, const char *op) {
    const int64_t chunks = divide_up(N, SUM_ROWS), strips = divide_up(C, WARP * VEC);
    double *partial = (double *)scratch((size_t)chunks * (size_t)C * sizeof *partial);
    launch(Grid(chunks * strips, THREADS, 0, op), column_parts, partial, x, N, C, (int)strips);
    if (chunks > 0)
        launch(Grid(divide_up(C, THREADS), THREADS, 0, op), add_column_parts, sums, partial, (int)chunks, C);
}

/* One of the two with a weight (OC, C), as it is held. */
template <Product product>
void multiply_weight(const Output &o, const Matrix<act> &x, const void *weight, int held, int prec, int M, int N, int K,
                     int C, int OC, const char *op) {
    if (held == PREC_FP32) multiply<product>(o, x, Matrix<float>{(const float *)weight, OC, C, C}, prec, M, N, K, op);
    else if (held == PREC_BF16)
        multiply<product>(o, x, Matrix<bf16>{(const bf16 *)weight, OC, C, C}, prec, M, N, K, op);
    else multiply<product>(o, x, Matrix<Group>{(const Group *)weight, OC, C, groups_of(C)}, prec, M, N, K, op);
}

}  // namespace

void OPERATOR(linear_forward)(act *out, act *pre, const act *in, const void *weight, int held, const float *bias,
                              const act *residual, int fn, int prec, int N, int C, int OC) {
    const Output o = {out, pre, residual, NULL, bias, NULL, NULL, fn, 0};
    multiply_weight<FORWARD>(o, Matrix<act>{in, N, C, C}, weight, held, prec, N, OC, C, C, OC, __func__);
}

void OPERATOR(linear_backward_input)(act *din, const act *dout, const act *dres, const void *weight, int held,
                                     const act *pre, int fn, int prec, int N, int C, int OC) {
    const Output o = {din, NULL, dres, pre, NULL, NULL, NULL, fn, 0};
    multiply_weight<INPUT>(o, Matrix<act>{dout, N, OC, OC}, weight, held, prec, N, C, OC, C, OC, __func__);
}

void OPERATOR(linear_backward_weight)(float *dweight, float *dbias, const act *dout, const act *in, int accumulate,
                                      int prec, int N, int C, int OC) {
    const bool at_once = prec == PREC_BF16 && on_sm90(OC, C, N);
    const Output o = {NULL, NULL, NULL, NULL, NULL, dweight, at_once ? dbias : NULL, FN_NONE, accumulate};
    multiply<WEIGHT>(o, Matrix<act>{dout, N, OC, OC}, Matrix<act>{in, N, C, C}, prec, OC, C, N, __func__);
    if (dbias && !at_once) add_column_sums(dbias, dout, N, OC, __func__);
}

void OPERATOR(norm_linear_packed)(act *out, act *normed, float *moments, const act *in, int norm, const float *gain,
                                  const float *shift, float eps, const void *packed, const float *bias, int fn,
                                  int prec, int N, int C, int OC) {
    if (prec == PREC_BF16 && N <= FEW_NORMED && are_few(N, C)) {
        const Output o = {out, NULL, NULL, NULL, bias, NULL, NULL, fn, 0};
        const Matrix<bf16> weight = {(const bf16 *)packed, OC, C, C};
        char *room = room_for(weight) ? (char *)scratch(room_for(weight)) : NULL;
        const Matrix<bf16> b = rounded(room, weight, __func__);
        const Unnormed rows = {in, gain, shift, eps, C, norm == NORM_LAYERNORM};
        const int kept = on_16_bytes(gain) && on_16_bytes(shift) ? kept_vectors(in, C) : 0;
        if (kept == 4) return multiply_few<NormedRows<4>>(o, rows, b, false, N, OC, C, __func__);
        if (kept == 8) return multiply_few<NormedRows<8>>(o, rows, b, false, N, OC, C, __func__);
        return multiply_few<NormedRows<0>>(o, rows, b, false, N, OC, C, __func__);
    }
    if (norm == NORM_LAYERNORM) OPERATOR(layernorm_forward)(normed, moments, moments + N, in, gain, shift, eps, N, C);
    else OPERATOR(rmsnorm_forward)(normed, moments, in, gain, eps, N, C);
    OPERATOR(linear_packed)(out, normed, packed, bias, NULL, fn, prec, N, C, OC);
}

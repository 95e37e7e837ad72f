/* linear_few.cuh -- the product of a few rows with a weight, bf16: a step of decoding, which reads all weights once and
 * computes little.
 *
 * A tile of product_bf16 would leave most of the GPU idle: of 128 rows one is there, and of 768 columns 12 blocks get
 * 64 each.  Here a block has 8 columns, and each of its warps a block of 512 values of k: 8 KB of weights, all on their
 * way at once; they are asked for, as far as the L2, while the kernel before still runs.  The chains are those of
 * product_bf16, by the same instruction, added in the same order: a row has the bits that it has among many, and by
 * however many warps. */
#pragma once
#include "linear.cuh"
#include "norm.cuh"

namespace {

enum { FEW = 16, FEW_COLUMNS = 8, FEW_K = K_BLOCK * 2, FEW_WARPS = 4, FEW_GROUPS = 4, FEW_MEMORY = 96 << 10 };
enum { FEW_EARLY = 1024, FEW_EARLY_BYTES = 24 << 20 }; /* what is asked for early: by so many blocks, half of an L2 */
enum { FEW_NORMED = 4 }; /* rows whose norm every block makes for itself, sooner than a kernel of its own would */

inline __device__ __host__ int few_blocks(int K) { return (K + FEW_K - 1) / FEW_K; } /* of k */
/* Shared memory: of each warp rows of weights, and of activations; zeros; sums of chains. */
inline size_t few_bytes(int warps, int M, int K) {
    const size_t rows = (size_t)warps * (size_t)(FEW_COLUMNS + M) * FEW_K * sizeof(bf16);
    return rows + CHUNK * sizeof(bf16) + (size_t)few_blocks(K) * FEW * FEW_COLUMNS * sizeof(float);
}
/* As many warps as have something to do and as there is shared memory for; 0: not even for one. */
inline int few_warps(int M, int K) {
    int warps = few_blocks(K) < FEW_WARPS ? few_blocks(K) : FEW_WARPS;
    while (warps > 0 && few_bytes(warps, M, K) > FEW_MEMORY) warps--;
    return warps;
}

__device__ inline int few_place(int r, int c) { return r * FEW_K + ((c / CHUNK ^ r % 8) * CHUNK); }

/* Columns k .. k + FEW_K / FEW_GROUPS of `rows` rows from r0 on, by a warp; zeros where the matrix has ended. */
__device__ inline void few_fetch(Shared<bf16> to, const Matrix<bf16> &x, int r0, int rows, int k0, int k) {
    constexpr int chunks = FEW_K / FEW_GROUPS / CHUNK;
    for (int i = lane_index(); i < rows * chunks; i += WARP) {
        const int r = i / chunks, c = k + i % chunks * CHUNK;
        const bool there = r0 + r < x.rows && k0 + c < x.cols;
        copy_async(to + few_place(r, c), there ? x.p + (r0 + r) * x.ld + k0 + c : x.p, there ? 16 : 0);
    }
}

/* Rows as they are in memory. */
struct PlainRows {
    Matrix<bf16> x;
    __device__ void prefetch() const {}
    __device__ void begin(int) {}
    __device__ void fetch(Shared<bf16> to, int M, int k0, int k) const { few_fetch(to, x, 0, M, k0, k); }
    __device__ void write(Shared<bf16>, int, int) const {}
};

/* The norm of at most FEW_NORMED rows of C values: with the bits of norm.cu, rounded as a product rounds. */
struct NormedRows {
    const act *x;
    const float *gain, *shift; /* shift: or NULL */
    float eps;
    int C;
    bool with_mean;
    Moments of[FEW_NORMED];

    __device__ void prefetch() const { prefetch_row(gain, C), prefetch_row(shift, C); }
    __device__ void begin(int M) {
#pragma unroll
        for (int r = 0; r < FEW_NORMED; r++)
            if (r < M) of[r] = row_moments(x + (int64_t)r * C, with_mean, eps, C);
    }
    __device__ void fetch(Shared<bf16>, int, int, int) const {}
    /* Columns k0 .. k0 + FEW_K, by a warp. */
    __device__ void write(Shared<bf16> to, int M, int k0) const {
        for (int k = lane_index() * CHUNK; k < FEW_K; k += WARP * CHUNK) {
            const int c = k0 + k;
            const Pack<float, CHUNK> w = load<CHUNK>(gain + c, C - c);
            Pack<float, CHUNK> b = {};
            if (shift) b = load<CHUNK>(shift + c, C - c);
#pragma unroll
            for (int r = 0; r < FEW_NORMED; r++) {
                if (r >= M) break;
                const Pack<act, CHUNK> in = load<CHUNK>(x + (int64_t)r * C + c, C - c);
                float y[CHUNK];
#pragma unroll
                for (int i = 0; i < CHUNK; i++) y[i] = normalised(in[i], of[r], w[i], b[i]); /* 0 from C on */
                shared_cast<uint4>(to + few_place(r, k))[0] = {pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]),
                                                               pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7])};
            }
        }
    }
};

/* What this block reads besides the rows, which the kernel before may still be writing: of blocks that may be there
 * before that has ended, as long as the L2 keeps it.  Rows of weights lie one behind the other. */
__device__ inline void few_prefetch(const Output &o, const Matrix<bf16> &b, int n0, int N) {
    if (threadIdx.x > 0 || blockIdx.x >= FEW_EARLY || n0 * b.ld * (int)sizeof(bf16) >= FEW_EARLY_BYTES) return;
    const int columns = N - n0 < FEW_COLUMNS ? N - n0 : FEW_COLUMNS;
    prefetch_l2(b.p + n0 * b.ld, (size_t)(columns * b.ld) * sizeof(bf16));
    if (o.bias && on_16_bytes(o.bias) && columns == FEW_COLUMNS) prefetch_l2(o.bias + n0, FEW_COLUMNS * sizeof(float));
}

/* out (M, N) of M <= FEW rows a and N rows b, by blocks of any number of warps. */
template <class Rows>
__global__ void __launch_bounds__(FEW_WARPS *WARP) product_few(Output o, Rows a, Matrix<bf16> b, int M, int N, int K) {
    SHARED_DYNAMIC(bf16, memory);
    const int blocks = few_blocks(K), warps = (int)blockDim.x / WARP, warp = warp_index(), lane = lane_index();
    const int n0 = (int)blockIdx.x * FEW_COLUMNS;
    const Shared<bf16> zeros = memory + warps * (FEW_COLUMNS + M) * FEW_K,
                       columns = memory + warp * FEW_COLUMNS * FEW_K;
    const Shared<bf16> rows = memory + (warps * FEW_COLUMNS + warp * M) * FEW_K;
    const Shared<float> sums = shared_cast<float>(zeros + CHUNK);
    launch_next();
    few_prefetch(o, b, n0, N);
    if (threadIdx.x == 0 && blockIdx.x == 0) a.prefetch();
    if (threadIdx.x == 0) shared_cast<uint4>(zeros)[0] = {0, 0, 0, 0}; /* rows from M on */
    wait_earlier();
    __syncthreads();
    a.begin(M);
    for (int block = warp; block < blocks; block += warps) {
        const int k0 = block * FEW_K;
        __syncwarp(); /* all lanes have read what is written over */
#pragma unroll
        for (int k = 0; k < FEW_K; k += FEW_K / FEW_GROUPS) {
            few_fetch(columns, b, n0, FEW_COLUMNS, k0, k);
            a.fetch(rows, M, k0, k);
            copy_async_commit();
        }
        a.write(rows, M, k0);
        float sum[4] = {};
#pragma unroll
        for (int group = 0; group < FEW_GROUPS; group++) {
            if (group == 0) copy_async_wait<3>();
            else if (group == 1) copy_async_wait<2>();
            else if (group == 2) copy_async_wait<1>();
            else copy_async_wait<0>();
            __syncwarp();
#pragma unroll
            for (int k = group * (FEW_K / FEW_GROUPS); k < (group + 1) * (FEW_K / FEW_GROUPS); k += 32) {
                uint32_t right[4], left[4];
                load_matrices(right, columns + few_place(lane % 8, k + lane / 8 * CHUNK));
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = lane % 16, c = k + 16 * i + lane / 16 * CHUNK;
                    load_matrices(left, row < M ? rows + few_place(row, c) : zeros);
                    multiply_add(sum, left, right[2 * i], right[2 * i + 1]);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
            sums[(block * FEW + e / 2 * 8 + lane / 4) * FEW_COLUMNS + lane % 4 * 2 + e % 2] = sum[e];
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < M * FEW_COLUMNS / VEC; i += (int)blockDim.x) {
        const int row = i / (FEW_COLUMNS / VEC), c = i % (FEW_COLUMNS / VEC) * VEC;
        if (n0 + c >= N) continue;
        float x[VEC] = {};
        for (int block = 0; block < blocks; block++)
#pragma unroll
            for (int j = 0; j < VEC; j++) x[j] += sums[(block * FEW + row) * FEW_COLUMNS + c + j];
        write<FORWARD>(o, x, row, n0 + c, N, N - (n0 + c));
    }
}

/* Whether there are so few rows that it pays, and few enough sums of chains. */
inline bool are_few(int M, int K) { return M > 0 && M <= FEW && few_warps(M, K) > 0; }

template <class Rows>
inline void multiply_few(const Output &o, const Rows &a, const Matrix<bf16> &b, int M, int N, int K, const char *op) {
    const int warps = few_warps(M, K);
    const Grid grid(divide_up(N, FEW_COLUMNS), warps * WARP, few_bytes(warps, M, K), op);
    launch_early(grid, product_few<Rows>, o, a, b, M, N, K);
}

}  // namespace

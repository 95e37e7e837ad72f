/* linear_few.cuh -- the product of a few rows with a weight, bf16: a step of decoding, which reads all weights once and
 * computes little.
 *
 * A tile of product_bf16 would leave most of the GPU idle: of 128 rows one is there, and of 768 columns 12 blocks get
 * 64 each.  Here a block has 8 columns, and each of its warps a block of 512 values of k: 8 KB of weights, all on their
 * way at once; they are asked for, as far as the L2 or to shared memory, while the kernel before still runs.  The
 * chains are those of product_bf16, by the same instruction, added in the same order: a row has the bits that it has
 * among many, and by however many warps.
 *
 * Time is what follows one upon the other: memory answers after some 300 clocks from the L2, a norm takes 600, and a
 * chain 32 instructions, each waiting for the last, 1,050.  So all that is read is asked for at once, and what can be
 * done before it has come, is. */
#pragma once
#include "linear.cuh"
#include "norm.cuh"

namespace {

enum { FEW = 16, FEW_COLUMNS = 8, FEW_K = K_BLOCK * 2, FEW_WARPS = 8, FEW_GROUPS = 4, FEW_MEMORY = 96 << 10 };
enum { FEW_EARLY = 1024, FEW_EARLY_BYTES = 24 << 20 }; /* what is asked for early: by so many blocks, half of an L2 */
enum { FEW_NORMED = 4 }; /* rows whose norm every block makes for itself, sooner than a kernel of its own would */

inline __device__ __host__ int few_blocks(int K) { return (K + FEW_K - 1) / FEW_K; } /* of k */
/* Shared memory: of each warp rows of weights, and of activations; a row of zeros; sums of chains. */
inline size_t few_bytes(int warps, int M, int K) {
    const size_t rows = (size_t)warps * (size_t)(FEW_COLUMNS + M) * FEW_K * sizeof(bf16);
    return rows + FEW_K * sizeof(bf16) + (size_t)few_blocks(K) * FEW * FEW_COLUMNS * sizeof(float);
}
/* As many warps as have something to do and as there is shared memory for; 0: not even for one. */
inline int few_warps(int M, int K) {
    int warps = few_blocks(K) < FEW_WARPS ? few_blocks(K) : FEW_WARPS;
    while (warps > 0 && few_bytes(warps, M, K) > FEW_MEMORY) warps--;
    return warps;
}

/* Chunk `chunk` of row r of a block of k, in shared memory. */
__device__ inline int few_place(int r, int chunk) { return r * FEW_K + (chunk ^ r % 8) * CHUNK; }

/* Columns k .. k + FEW_K / FEW_GROUPS of a block of FEW_COLUMNS rows of weights, n0 .., by a warp: four lanes a row,
 * for then a lane has one address, and all else is constant.  Zeros where the matrix has ended.  told: before the wait.
 */
template <bool told>
__device__ inline void fetch_columns(Shared<bf16> to, const Matrix<bf16> &b, int n0, int k0, int k) {
    constexpr int LANES = WARP / FEW_COLUMNS;
    const int row = lane_index() / LANES, first = lane_index() % LANES;
    const bf16 *from = b.p + (int64_t)(n0 + row) * b.ld + k0 + first * CHUNK;
    const int left = n0 + row < b.rows ? b.cols - k0 - first * CHUNK : 0;
    auto place = [=](int c) { return row * FEW_K + (c / 8 * 8 + ((first + c % 8) ^ row)) * CHUNK; };
#pragma unroll
    for (int c = k / CHUNK; c < (k + FEW_K / FEW_GROUPS) / CHUNK; c += LANES)
        if constexpr (told) copy_async_told(to + place(c), from + c * CHUNK, c * CHUNK < left ? 16 : 0);
        else copy_async(to + place(c), from + c * CHUNK, c * CHUNK < left ? 16 : 0);
}

/* All of its columns, in FEW_GROUPS groups. */
template <bool told>
__device__ inline void fetch_block(Shared<bf16> to, const Matrix<bf16> &b, int n0, int k0) {
#pragma unroll
    for (int k = 0; k < FEW_K; k += FEW_K / FEW_GROUPS) {
        fetch_columns<told>(to, b, n0, k0, k);
        copy_async_commit();
    }
}

/* All columns of a block of `rows` rows, by a warp. */
__device__ inline void fetch_rows(Shared<bf16> to, const Matrix<bf16> &a, int rows, int k0) {
#pragma unroll 1
    for (int r = 0; r < rows; r++)
#pragma unroll
        for (int c = lane_index(); c < FEW_K / CHUNK; c += WARP)
            copy_async(to + few_place(r, c), a.p + r * a.ld + k0 + c * CHUNK, k0 + c * CHUNK < a.cols ? 16 : 0);
}

/* Rows as they are in memory. */
struct PlainRows {
    using Given = Matrix<bf16>;
    static constexpr bool BEGINS_WITH_WEIGHTS = true;
    Given x;
    __device__ explicit PlainRows(const Given &given) : x(given) {}
    __device__ void prefetch() const {}
    __device__ void ask() {}
    __device__ void ask(int) {}
    __device__ void begin(int) {}
    __device__ void fetch(Shared<bf16> to, int M, int k0) const { fetch_rows(to, x, M, k0); }
    __device__ void write(Shared<bf16>, int, int) const {}
};

/* Rows of C values that wait for their norm. */
struct Unnormed {
    const act *x;
    const float *gain, *shift; /* shift: or NULL */
    float eps;
    int C;
    bool with_mean;
};

/* The norm of at most FEW_NORMED of them: with the bits of norm.cu, rounded as a product rounds.  V: vectors of a row
 * that a lane keeps while it makes the moments, where all begins on 16 bytes; 0: it is read again. */
template <int V>
struct NormedRows : Unnormed {
    using Given = Unnormed;
    static constexpr bool BEGINS_WITH_WEIGHTS = false; /* they come beside the moments, and hold no memory until then */
    static constexpr int EACH = FEW_K / WARP / CHUNK;  /* chunks of a block of k for each lane */
    Moments of[FEW_NORMED];
    KeptRow<V> next;                     /* that a moment is wanted of */
    Pack<float, CHUNK> w[EACH], b[EACH]; /* gain and shift */

    __device__ explicit NormedRows(const Given &given) : Unnormed(given) {}
    __device__ static int column(int i) { return (lane_index() + i * WARP) * CHUNK; }
    __device__ void prefetch() const { prefetch_row(gain, C), prefetch_row(shift, C); }
    __device__ void fetch(Shared<bf16>, int, int) const {}
    template <class T>
    __device__ Pack<T, CHUNK> chunk_of(const T *row, int c) const {
        if constexpr (V > 0) return c < C ? load_all<CHUNK>(row + c) : Pack<T, CHUNK>{};
        else return load<CHUNK>(row + c, C - c);
    }
    __device__ void ask() { next.read(x, C); }
    /* Gain and shift of columns k0 .. k0 + FEW_K. */
    __device__ void ask(int k0) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int c = k0 + column(i);
            w[i] = chunk_of(gain, c);
            b[i] = {};
            if (shift) b[i] = chunk_of(shift, c);
        }
    }
    __device__ void begin(int M) {
#pragma unroll
        for (int r = 0; r < FEW_NORMED; r++) {
            if (r >= M) break;
            const KeptRow<V> row = next;
            if (r + 1 < M) next.read(x + (int64_t)(r + 1) * C, C);
            of[r] = row.moments(with_mean, eps, C);
        }
    }
    /* Those columns, by a warp. */
    __device__ void write(Shared<bf16> to, int M, int k0) const {
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int c = k0 + column(j);
#pragma unroll
            for (int r = 0; r < FEW_NORMED; r++) {
                if (r >= M) break;
                const Pack<act, CHUNK> in = chunk_of(x + (int64_t)r * C, c);
                float y[CHUNK];
#pragma unroll
                for (int i = 0; i < CHUNK; i++) y[i] = normalised(in[i], of[r], w[j][i], b[j][i]); /* 0 from C on */
                shared_cast<uint4>(to + few_place(r, lane_index() + j * WARP))[0] = {
                    pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7])};
            }
        }
    }
};

/* What this block reads besides the rows, which the kernel before may still be writing: of blocks that may be there
 * before that has ended, as long as the L2 keeps it; weights where they do not come at once.  Their rows lie one behind
 * the other. */
template <bool told>
__device__ inline void few_prefetch(const Output &o, const Matrix<bf16> &b, int n0, int N) {
    if (threadIdx.x > 0 || blockIdx.x >= FEW_EARLY || n0 * b.ld * (int)sizeof(bf16) >= FEW_EARLY_BYTES) return;
    const int columns = N - n0 < FEW_COLUMNS ? N - n0 : FEW_COLUMNS;
    if (!told) prefetch_l2(b.p + n0 * b.ld, (size_t)(columns * b.ld) * sizeof(bf16));
    if (o.bias && on_16_bytes(o.bias) && columns == FEW_COLUMNS) prefetch_l2(o.bias + n0, FEW_COLUMNS * sizeof(float));
}

/* Until that group of a warp's copies has come, of FEW_GROUPS under way. */
__device__ inline void wait_for_group(int group) {
    static_assert(FEW_GROUPS == 4, "one word for each");
    if (group == 0) copy_async_wait<3>();
    else if (group == 1) copy_async_wait<2>();
    else if (group == 2) copy_async_wait<1>();
    else copy_async_wait<0>();
    __syncwarp();
}

/* out (M, N) of M <= FEW rows a and N rows b, by blocks of any number of warps.  told: the weights were there before
 * the host last told something, and each warp has one block of k: so it begins with them. */
template <class Rows, bool told>
__global__ void __launch_bounds__(FEW_WARPS *WARP, 1)
    product_few(Output o, typename Rows::Given given, Matrix<bf16> b, int M, int N, int K) {
    SHARED_DYNAMIC(bf16, memory);
    Rows a(given);
    const int blocks = few_blocks(K), warps = (int)blockDim.x / WARP, warp = warp_index(), lane = lane_index();
    const int n0 = (int)blockIdx.x * FEW_COLUMNS;
    const Shared<bf16> zeros = memory + warps * (FEW_COLUMNS + M) * FEW_K,
                       columns = memory + warp * FEW_COLUMNS * FEW_K;
    const Shared<bf16> rows = memory + (warps * FEW_COLUMNS + warp * M) * FEW_K;
    const Shared<float> sums = shared_cast<float>(zeros + FEW_K);
    launch_next();
    few_prefetch<told>(o, b, n0, N);
    if (threadIdx.x == 0 && blockIdx.x == 0) a.prefetch();
    for (int i = (int)threadIdx.x; i < FEW_K / CHUNK; i += (int)blockDim.x) /* rows from M on */
        shared_cast<uint4>(zeros)[i] = {0, 0, 0, 0};
    const Shared<bf16> left_row = lane % 16 < M ? rows + lane % 16 * FEW_K : zeros;
    Shared<bf16> left_at[4], right_at[2]; /* of each 64 columns */
#pragma unroll
    for (int i = 0; i < 4; i++) left_at[i] = left_row + ((2 * i + lane / 16) ^ lane % 8) * CHUNK;
#pragma unroll
    for (int i = 0; i < 2; i++) right_at[i] = columns + few_place(lane % 8, 4 * i + lane / 8);
    if (told) fetch_block<true>(columns, b, n0, warp * FEW_K);
    __syncthreads();
    wait_earlier();
    a.ask();
    Beside<FORWARD> beside;
    const int row = (int)threadIdx.x / (FEW_COLUMNS / VEC), n = n0 + (int)threadIdx.x % (FEW_COLUMNS / VEC) * VEC;
    const bool writes = row < M && n < N; /* one vector, by the first warp */
    static_assert(FEW * FEW_COLUMNS / VEC <= WARP, "which is enough");
    for (int block = warp; block < blocks; block += warps) {
        const int k0 = block * FEW_K;
        __syncwarp(); /* all lanes have read what is written over */
        a.fetch(rows, M, k0);
        if constexpr (told) copy_async_commit();
        else fetch_block<false>(columns, b, n0, k0);
        a.ask(k0);
        if (block == warp) {
            if (writes) beside = Beside<FORWARD>(o, row, n, N, N - n);
            a.begin(M);
        }
        a.write(rows, M, k0);
        float sum[4] = {};
#pragma unroll
        for (int k = 0; k < FEW_K; k += 32) {
            uint32_t right[4], left[4];
            if (told && k == 0) wait_for_group(FEW_GROUPS - 1);
            if (!told && k % (FEW_K / FEW_GROUPS) == 0) wait_for_group(k / (FEW_K / FEW_GROUPS));
            load_matrices(right, right_at[k / 32 % 2] + k / 64 * 64);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                load_matrices(left, left_at[k / 16 % 4 + i] + k / 64 * 64);
                multiply_add(sum, left, right[2 * i], right[2 * i + 1]);
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
            sums[(block * FEW + e / 2 * 8 + lane / 4) * FEW_COLUMNS + lane % 4 * 2 + e % 2] = sum[e];
    }
    __syncthreads();
    if (!writes) return;
    float x[VEC] = {};
    for (int block = 0; block < blocks; block++)
#pragma unroll
        for (int j = 0; j < VEC; j++) x[j] += sums[(block * FEW + row) * FEW_COLUMNS + n - n0 + j];
    write(o, x, beside, row, n, N, N - n);
}

/* Whether there are so few rows that it pays, and few enough sums of chains. */
inline bool are_few(int M, int K) { return M > 0 && M <= FEW && few_warps(M, K) > 0; }

template <class Rows>
inline void multiply_few(const Output &o, const typename Rows::Given &a, const Matrix<bf16> &b, bool told, int M, int N,
                         int K, const char *op) {
    const int warps = few_warps(M, K);
    const Grid grid(divide_up(N, FEW_COLUMNS), warps * WARP, few_bytes(warps, M, K), op);
    auto kernel = product_few<Rows, false>;
    if constexpr (Rows::BEGINS_WITH_WEIGHTS)
        if (told && few_blocks(K) == warps) kernel = product_few<Rows, true>;
    launch_early(grid, kernel, o, a, b, M, N, K);
}

}  // namespace

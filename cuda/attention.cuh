/* attention.cuh -- what attention over a batch and over pages are both made of: tiles of rows in shared memory,
 * products of them on tensor cores, and the online softmax between two products.
 *
 * A warp works on 16 MT rows, MT products of 16 by 8 one below the other.  Of each a lane holds two rows, g = lane / 4
 * and g + 8, and of those the columns 8 n + 2 (lane % 4) and the one behind it: `x[m][n][j]` is row 16 m + g + 8 (j /
 * 2), column 8 n + 2 (lane % 4) + j % 2.  Sums over columns go over the four lanes of a row; and two blocks of 8
 * columns of a result are, rounded, the 16 of a left operand, so that weights go from product to product without being
 * stored. */
#pragma once
#include "ops.cuh"

namespace {

enum { CHUNK = 8 }; /* values of 16 bytes */
enum { MOST_ON_TENSOR_CORES = 128 };

inline float score_scale(int HS) { return 1.0f / sqrtf((float)HS); }

inline bool on_tensor_cores(int prec, int HS) { return prec == PREC_BF16 && HS <= MOST_ON_TENSOR_CORES; }

/* Whether heads are W values in bf16, on 16 bytes. */
inline bool is_fast(int W, int HS, const act *x, const act *y, const act *z = NULL) {
    return sizeof(act) == 2 && HS == W && ((uintptr_t)x | (uintptr_t)y | (uintptr_t)z) % 16 == 0;
}

/* ---- memory ---- */

/* Of 8 values at x the first `count`, or none, rounded; zeros behind them. */
__device__ inline uint4 rounded_chunk(const act *x, int count) {
    const Pack<act, CHUNK> p = load<CHUNK>(x, count);
    return {pack_bf16(p[0], p[1]), pack_bf16(p[2], p[3]), pack_bf16(p[4], p[5]), pack_bf16(p[6], p[7])};
}

/* Two neighbours of a row, of which `count` columns are left; `whole`: two, on 4 bytes. */
template <bool whole>
__device__ void store_two(act *p, float x, float y, int count) {
    if (sizeof(act) == 2 && (whole || (count >= 2 && ((uintptr_t)p & 3) == 0))) {
        *reinterpret_cast<uint32_t *>(p) = pack_bf16(x, y);
        return;
    }
    if (count > 0) from_float(p[0], x);
    if (count > 1) from_float(p[1], y);
}

/* Rows of W values, 64 or 128, or 16 of such; a head that is less wide has zeros behind it.  Chunk c of row r lies at
 * c ^ r % 8: the same chunk of eight rows is in eight different places, whether they are written or multiplied. */
template <int W>
__device__ Shared<bf16> chunk_at(Shared<bf16> tile, int row, int chunk) {
    constexpr int places = W / CHUNK < 8 ? W / CHUNK : 8;
    return tile + (row * W + (chunk ^ (row & (places - 1))) * CHUNK);
}

/* `fast`: heads of W values in bf16, on 16 bytes.  Those come by cp.async, all others through registers. */
template <int W, bool fast, class T>
__device__ void fetch_chunk(Shared<bf16> tile, int row, int chunk, const T *x, int count) {
    const Shared<bf16> to = chunk_at<W>(tile, row, chunk);
    if constexpr (fast) copy_async(to, x, count > 0 ? 16 : 0);
    else shared_cast<uint4>(to)[0] = rounded_chunk(x, count);
}

/* The first `count` of `rows` rows, each `width` values; zeros elsewhere. */
template <int W, bool fast>
__device__ void fetch_rows(Shared<bf16> tile, int rows, const act *x, int64_t stride, int count, int width) {
#pragma unroll 1 /* unrolled, its addresses take the registers of the sums */
    for (int i = (int)threadIdx.x; i < rows * (W / CHUNK); i += (int)blockDim.x) {
        const int row = i / (W / CHUNK), chunk = i % (W / CHUNK), c = chunk * CHUNK;
        const bool there = row < count && c < width;
        fetch_chunk<W, fast>(tile, row, chunk, there ? x + row * stride + c : x, there ? width - c : 0);
    }
}

/* ---- products ---- */

/* Rows row .. row + 15, columns 16 k .. 16 k + 15, as a left operand. */
template <int W>
__device__ void left_operand(uint32_t (&a)[4], Shared<bf16> tile, int row, int k) {
    load_matrices(a, chunk_at<W>(tile, row + lane_index() % 16, 2 * k + lane_index() / 16));
}

/* As right operands of two products, words 0, 1 and 2, 3: of the transpose, columns row .. row + 15 and rows 16 k .. */
template <int W>
__device__ void right_of_transpose(uint32_t (&b)[4], Shared<bf16> tile, int row, int k) {
    const int lane = lane_index();
    load_matrices(b, chunk_at<W>(tile, row + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}

/* ... and rows row .. row + 15, columns 16 n .. 16 n + 15. */
template <int W>
__device__ void right_operand(uint32_t (&b)[4], Shared<bf16> tile, int row, int n) {
    load_matrices_transposed(b, chunk_at<W>(tile, row + lane_index() % 16, 2 * n + lane_index() / 16));
}

/* Where these products may stop early, constants keep them free of branches: what is left out is 0 in any case. */

/* s (16 MT, 8 N) = A B^T: rows from a_row and b_row on, one chain over the head.  Columns from `count` on may stay 0.
 * `steps`: of 16 values, as many as the head has. */
template <int W, int MT, int N>
__device__ void multiply_rows(float (&s)[MT][N][4], Shared<bf16> A, int a_row, Shared<bf16> B, int b_row, int count,
                              int steps) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) s[m][n][j] = 0.0f;
#pragma unroll
    for (int k = 0; k < W / 16; k++) {
        if (k >= steps) break;
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) left_operand<W>(a[m], A, a_row + 16 * m, k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            if (8 * n >= count) break;
            uint32_t b[4];
            right_of_transpose<W>(b, B, b_row + 8 * n, k);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply_add(s[m][n], a[m], b[0], b[1]);
                multiply_add(s[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/* The same numbers as a left operand, rounded: 16 columns a step. */
template <int MT, int N>
__device__ void round_weights(uint32_t (&p)[MT][N / 2][4], const float (&s)[MT][N][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int k = 0; k < N / 2; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                p[m][k][i] = pack_bf16(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
}

/* sums (16 MT, W) += P B, rows of B from b_row on; columns of P from `count` on are 0. */
template <int W, int MT, int K>
__device__ void multiply_columns(float (&sums)[MT][W / 8][4], const uint32_t (&p)[MT][K][4], Shared<bf16> B, int b_row,
                                 int count, int steps) {
#pragma unroll
    for (int k = 0; k < K; k++) {
        if (16 * k >= count) break;
#pragma unroll
        for (int n = 0; n < W / 16; n++) {
            if (n >= steps) break;
            uint32_t b[4];
            right_operand<W>(b, B, b_row + 16 * k, n);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply_add(sums[m][2 * n], p[m][k], b[0], b[1]);
                multiply_add(sums[m][2 * n + 1], p[m][k], b[2], b[3]);
            }
        }
    }
}

/* ---- online softmax: Milakov, Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691 ---- */

/* Of the rows of a lane, over the blocks of keys so far; scores are in factors of 2. */
template <int MT>
struct Softmax {
    float max[MT][2], sum[MT][2];
};

/* What a maximum is subtracted as: where no key was seen, -infinity - -infinity would be no number. */
__device__ float origin(float max) { return max == -INFINITY ? 0.0f : max; }

/* Over the four lanes of a row. */
__device__ float row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
__device__ float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

/* Column of x[..][n][j] */
__device__ int column_of(int n, int j) { return 8 * n + lane_index() % 4 * 2 + j % 2; }

/* Row (m, r) sees the first seen[m][r] keys of the block; the score of any other is -infinity. */
template <int MT, int N>
__device__ void hide(float (&s)[MT][N][4], const int (&seen)[MT][2]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (column_of(n, j) >= seen[m][j / 2]) s[m][n][j] = -INFINITY;
}

/* s = exp(score - the greatest so far), their sum; returns in `keep` the factor of what came before. */
template <int MT, int N>
__device__ void weigh(Softmax<MT> &so_far, float (&keep)[MT][2], float (&s)[MT][N][4], float factor) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = -INFINITY, total = 0.0f;
#pragma unroll
            for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
            const float max = fmaxf(so_far.max[m][r], row_max(top) * factor), from = origin(max);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int j = 2 * r; j < 2 * r + 2; j++) {
                    s[m][n][j] = exp2_fast(fmaf(s[m][n][j], factor, -from));
                    total += s[m][n][j];
                }
            keep[m][r] = exp2_fast(so_far.max[m][r] - from);
            so_far.sum[m][r] = fmaf(so_far.sum[m][r], keep[m][r], row_sum(total));
            so_far.max[m][r] = max;
        }
}

/* c (16 MT, 16) = columns 16 n .. of P V, one chain over the first `count` keys */
template <int W, int MT>
__device__ void values_of_block(float (&c)[MT][2][4], const uint32_t (&p)[MT][KEY_BLOCK / 16][4], Shared<bf16> V, int n,
                                int count) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 8; i++) c[m][i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < KEY_BLOCK / 16; k++) {
        if (16 * k >= count) break;
        uint32_t b[4];
        right_operand<W>(b, V, 16 * k, n);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            multiply_add(c[m][0], p[m][k], b[0], b[1]);
            multiply_add(c[m][1], p[m][k], b[2], b[3]);
        }
    }
}

/* ---- a tile of queries ---- */

/* Queries of one head that lie one behind the other; the first is at position `first` of its keys. */
struct Queries {
    const act *q;
    int64_t stride;
    const int32_t *starts; /* of each, or NULL */
    int first, count, width;
    float factor; /* exp(score) = 2^(factor * q.k) */
};

/* Queries first .. last of a tile that see keys from the same start on. */
struct Run {
    int first, last, start;
};

__device__ Run run_at(const int32_t *starts, int first, int count) {
    if (!starts) return {first, count - 1, 0};
    const int start = starts[first];
    int end = first, same;
    do {
        const int i = end + lane_index();
        same = i < count && starts[i] == start ? WARP : lane_index();
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
            const int other = shuffle_xor(same, lanes);
            same = other < same ? other : same;
        }
        end += same;
    } while (same == WARP);
    return {first, end - 1, start};
}

/* The least of starts[i], i < count; 0 without starts; the same in every lane. */
__device__ inline int least_start(const int32_t *starts, int count) {
    if (!starts) return 0;
    int least = INT32_MAX;
    for (int i = lane_index(); i < count; i += WARP) least = starts[i] < least ? starts[i] : least;
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const int other = shuffle_xor(least, lanes);
        least = other < least ? other : least;
    }
    return least;
}

/* Blocks of keys, run after run. */
struct Walk {
    Run run;
    int k0;

    __device__ Walk(const Queries &x) : run(run_at(x.starts, 0, x.count)), k0(run.start) {}
    __device__ int keys(const Queries &x) const { /* of the block, that any query of the run sees */
        const int left = x.first + run.last + 1 - k0;
        return left < KEY_BLOCK ? left : KEY_BLOCK;
    }
    __device__ bool next(const Queries &x) {
        k0 += KEY_BLOCK;
        if (k0 <= x.first + run.last) return true;
        if (run.last + 1 >= x.count) return false;
        run = run_at(x.starts, run.last + 1, x.count);
        k0 = run.start;
        return true;
    }
};

enum { TILE_WARPS = 4, TILE_THREADS = TILE_WARPS * WARP };
/* Two products of 16 rows a warp read keys and values half as often; more than 64 columns leave no registers for it. */
template <int W>
struct Shape {
    static constexpr int PRODUCTS = W > 64 ? 1 : 2, ROWS = TILE_WARPS * 16 * PRODUCTS;
    static constexpr size_t BYTES = (size_t)(ROWS + 2 * KEY_BLOCK) * W * sizeof(bf16);
};

/* A block of TILE_THREADS, at most Shape<W>::ROWS queries, a block of keys after the other.  While keys are multiplied
 * the values come, and while values are multiplied the next keys.  keys.fetch<W, fast>(tile, side, k0, count) fetches
 * keys (side 0) or values (side 1); out(i) is where the output of query i goes, and save(i, lse) gets the logarithm of
 * its sum. */
template <int W, bool fast, class Keys, class Out, class Save>
__device__ void attend(const Queries &x, const Keys &keys, Out out, Save save) {
    constexpr int MT = Shape<W>::PRODUCTS, ROWS = Shape<W>::ROWS;
    SHARED_DYNAMIC(bf16, memory);
    const Shared<bf16> Q = memory, K = Q + ROWS * W, V = K + KEY_BLOCK * W;
    const int lane = lane_index(), row0 = warp_index() * 16 * MT, steps = fast ? W / 16 : (x.width + 15) / 16;
    const int row_end = row0 + 16 * MT < x.count ? row0 + 16 * MT : x.count;
    Softmax<MT> softmax;
    float sums[MT][W / 8][4] = {};
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) softmax.max[i / 2][i % 2] = -INFINITY, softmax.sum[i / 2][i % 2] = 0.0f;

    Walk walk(x);
    fetch_rows<W, fast>(Q, ROWS, x.q, x.stride, x.count, x.width);
    keys.template fetch<W, fast>(K, 0, walk.k0, walk.keys(x));
    copy_async_commit();
    for (bool more = true; more;) {
        const Run run = walk.run;
        const int k0 = walk.k0, here = walk.keys(x);
        copy_async_wait<0>();
        __syncthreads(); /* the keys are there; nobody reads the values of before */
        keys.template fetch<W, fast>(V, 1, k0, here);
        copy_async_commit();
        /* of this warp: its rows in the run, and the keys that the last of them sees */
        const int first = run.first > row0 ? run.first : row0, last = run.last < row_end - 1 ? run.last : row_end - 1;
        int count = first <= last ? x.first + last + 1 - k0 : 0;
        count = count < here ? count : here;
        float s[MT][KEY_BLOCK / 8][4];
        const int columns = fast ? KEY_BLOCK : count;
        if (count > 0) multiply_rows<W>(s, Q, row0, K, 0, columns, steps);
        copy_async_wait<0>();
        __syncthreads(); /* the values are there; nobody reads the keys */
        more = walk.next(x);
        if (more) keys.template fetch<W, fast>(K, 0, walk.k0, walk.keys(x));
        copy_async_commit();
        if (count <= 0) continue;
        int seen[MT][2];
#pragma unroll
        for (int i = 0; i < 2 * MT; i++) {
            const int row = row0 + i / 2 * 16 + i % 2 * 8 + lane / 4;
            seen[i / 2][i % 2] = row >= first && row <= last ? x.first + row + 1 - k0 : 0;
        }
        if (first > row0 || last < row0 + 16 * MT - 1 || x.first + first + 1 - k0 < KEY_BLOCK) hide(s, seen);
        float keep[MT][2];
        uint32_t p[MT][KEY_BLOCK / 16][4];
        weigh(softmax, keep, s, x.factor);
        round_weights(p, s);
#pragma unroll
        for (int n = 0; n < W / 16; n++) {
            if (n >= steps) break;
            float c[MT][2][4];
            values_of_block<W>(c, p, V, n, count);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int i = 0; i < 8; i++) /* a row of another run keeps what it has: 0 * NaN would be NaN */
                    if (seen[m][i % 4 / 2] > 0)
                        sums[m][2 * n + i / 4][i % 4] =
                            fmaf(sums[m][2 * n + i / 4][i % 4], keep[m][i % 4 / 2], c[m][i / 4][i % 4]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        const int m = i / 2, r = i % 2, row = row0 + 16 * m + 8 * r + lane / 4;
        if (row >= x.count) continue;
        const float inverse = 1.0f / softmax.sum[m][r];
        act *to = out(row);
#pragma unroll
        for (int n = 0; n < W / 8; n++) {
            const int c = column_of(n, 0);
            store_two<fast>(to + c, sums[m][n][2 * r] * inverse, sums[m][n][2 * r + 1] * inverse, x.width - c);
        }
        if (lane % 4 == 0) save(row, LN_2 * softmax.max[m][r] + logf(softmax.sum[m][r]));
    }
}

}  // namespace

/* ---- the seam to Hopper's, which may not be there: then these are NULL.  T, B and NH are not 0 ---- */
extern "C" {
/* heads of 64 or 128 values */
__attribute__((weak)) void OPERATOR(attention_forward_sm90)(act *out, float *lse, const act *qkv, const int32_t *starts,
                                                            int B, int T, int NH, int NKV, int HS, const char *op);
/* of 64; averages (B, NH, T): dout.out of each query and head; sums: so many bytes of working memory as the room */
__attribute__((weak)) size_t OPERATOR(attention_backward_sm90_room)(int B, int T, int NH, int NKV);
__attribute__((weak)) void OPERATOR(attention_backward_sm90)(act *dqkv, const act *dout, const act *qkv,
                                                             const float *lse, const float *averages, float *sums,
                                                             const int32_t *starts, int B, int T, int NH, int NKV,
                                                             const char *op);
}

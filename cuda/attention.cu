/* attention.cu -- causal attention over a whole batch, and its gradient.
 *
 * PREC_BF16, heads of up to 128 values: on tensor cores.  Heads of 64 and 128 values in bf16 come by cp.async; other
 * sizes, and activations in fp32, through registers, with zeros behind them.  Otherwise: plain multiply-adds.
 *
 * Forward: a block of threads for each tile of queries of a head.  Blocks of 64 keys are counted from where a query's
 * keys start, so a tile goes through its queries in runs that start together: one, or one a document.
 *
 * Backward: no sum has two owners.  One kernel owns gradients of queries, a tile a block, and goes over keys; another
 * owns those of keys and values, and goes over the queries of all heads that share them, head by head.  Scores and
 * gradients of weights are so computed twice, 7 products for 5.  For that, nothing is added in global memory, nothing
 * is cleared or added up later, weights never leave registers, there are T / 64 times as many blocks as heads to fill a
 * GPU with, and the bits do not know how many rows share the batch.
 *
 * The longest tiles come first: what is left over at the end is short. */
#include "attention.cuh"
#include "attention_plain.cuh"

namespace {

struct Attention {
    act *out;
    float *lse;
    const act *qkv;
    const int32_t *starts;
    int B, T, NH, NKV, HS;
    float scale, factor; /* 1 / sqrt(HS), and what 2 is raised to a power of */

    __device__ int64_t row() const { return (int64_t)(NH + 2 * NKV) * HS; }
    __device__ const act *head(int b, int h) const { return qkv + b * T * row() + (int64_t)h * HS; }
    __device__ int key_head(int h) const { return NH + h / (NH / NKV); }
    __device__ const int32_t *starts_of(int b) const { return starts ? starts + (int64_t)b * T : NULL; }
};

/* Keys and values of a head in qkv. */
struct Fresh {
    const act *rows[2];
    int64_t stride;
    int width;

    __device__ Fresh(const Attention &a, int b, int h)
        : rows{a.head(b, a.key_head(h)), a.head(b, a.key_head(h) + a.NKV)}, stride(a.row()), width(a.HS) {}
    template <int W, bool fast>
    __device__ void fetch(Shared<bf16> tile, int side, int k0, int count) const {
        fetch_rows<W, fast>(tile, KEY_BLOCK, rows[side] + k0 * stride, stride, count, width);
    }
    __device__ float at(int side, int t, int i) const { return to_float(rows[side][t * stride + i]); }
};

/* A warp for each head of each position: of this one. */
struct Place {
    int64_t bt;
    int b, t, head;

    __device__ Place(int heads, int T) {
        const int parts = (heads + TILE_WARPS - 1) / TILE_WARPS, row = (int)blockIdx.x / parts;
        bt = row, b = row / T, t = row % T, head = (int)blockIdx.x % parts * TILE_WARPS + warp_index();
    }
};

int64_t blocks_for(const Attention &a, int heads) { return divide_up(heads, TILE_WARPS) * a.B * a.T; }

/* ---- forward ---- */

template <int W, bool fast>
__global__ void __launch_bounds__(TILE_THREADS) forward(Attention a) {
    const int heads = a.B * a.NH, tiles = (int)gridDim.x / heads, head = (int)blockIdx.x % heads;
    const int b = head / a.NH, h = head % a.NH, t0 = (tiles - 1 - (int)blockIdx.x / heads) * Shape<W>::ROWS;
    Queries x;
    x.q = a.head(b, h) + t0 * a.row(), x.stride = a.row();
    x.starts = a.starts ? a.starts_of(b) + t0 : NULL;
    x.first = t0, x.count = a.T - t0 < Shape<W>::ROWS ? a.T - t0 : Shape<W>::ROWS;
    x.width = a.HS, x.factor = a.factor;
    /* worked out at the end: as pointers they would take registers all the way */
    auto out = [&](int i) { return a.out + (((int64_t)b * a.T + t0 + i) * a.NH + h) * a.HS; };
    auto save = [&](int i, float lse) { a.lse[(int64_t)head * a.T + t0 + i] = lse; };
    attend<W, fast>(x, Fresh(a, b, h), out, save);
}

template <bool rounded>
__global__ void __launch_bounds__(TILE_THREADS, 4) forward_plain(Attention a) {
    const Place at(a.NH, a.T);
    if (at.head >= a.NH) return;
    plain_query<rounded>(a.out + (at.bt * a.NH + at.head) * a.HS, a.lse + ((int64_t)at.b * a.NH + at.head) * a.T + at.t,
                         a.head(at.b, at.head) + at.t * a.row(), Fresh(a, at.b, at.head),
                         a.starts ? a.starts[at.bt] : 0, at.t, a.HS, a.scale);
}

/* ---- backward: with p = exp(score - lse), dp = dout.v and d = dout.out, the gradient of a score is p (dp - d) ---- */

struct Backward {
    Attention a; /* without outputs */
    act *dqkv;
    const act *dout, *out;
    const float *lse;
    float *averages; /* (B, NH, T) d */

    __device__ act *gradient(int b, int h) const { return dqkv + b * a.T * a.row() + (int64_t)h * a.HS; }
    __device__ const act *dout_of(int b, int h) const { return dout + ((int64_t)b * a.T * a.NH + h) * a.HS; }
    __device__ int64_t dout_row() const { return (int64_t)a.NH * a.HS; }
};

/* Rows of heads that a group of lanes reads at a time. */
enum { AVERAGED = 4 };
/* Lanes of a row of HS values, a vector each. */
int averaging_lanes(int HS) {
    int lanes = 1;
    while (lanes < WARP && lanes * VEC < HS) lanes *= 2;
    return lanes;
}
int64_t averages_of_block(int lanes) { return (int64_t)AVERAGED * TILE_THREADS / lanes; }

template <bool whole>
__global__ void __launch_bounds__(TILE_THREADS) averages(Backward p, int lanes) {
    const int NH = p.a.NH, HS = p.a.HS, apart = WARP / lanes, lane = lane_index() % lanes;
    const int64_t rows = (int64_t)p.a.B * p.a.T * NH;
    const int64_t first = ((int64_t)blockIdx.x * TILE_WARPS + warp_index()) * AVERAGED * apart + lane_index() / lanes;
    float sum[AVERAGED] = {};
    for (int c = lane * VEC; c < HS; c += lanes * VEC) {
        Pack<act, VEC> x[AVERAGED] = {}, y[AVERAGED] = {};
#pragma unroll
        for (int i = 0; i < AVERAGED; i++) {
            const int64_t row = first + i * apart;
            if (row >= rows) continue;
            x[i] = vector_at<whole>(p.dout + row * HS + c, HS - c);
            y[i] = vector_at<whole>(p.out + row * HS + c, HS - c);
        }
#pragma unroll
        for (int i = 0; i < AVERAGED; i++)
#pragma unroll
            for (int j = 0; j < VEC; j++) sum[i] += x[i][j] * y[i][j];
    }
    for (int across = lanes / 2; across > 0; across /= 2)
#pragma unroll
        for (int i = 0; i < AVERAGED; i++) sum[i] += shuffle_xor(sum[i], across);
#pragma unroll
    for (int i = 0; i < AVERAGED; i++) {
        const int64_t row = first + i * apart, bt = row / NH, h = row - bt * NH, b = bt / p.a.T, t = bt - b * p.a.T;
        if (row < rows && lane == 0) p.averages[(b * NH + h) * p.a.T + t] = sum[i];
    }
}

enum { MOST_STRIP = 32 }; /* scores of so many columns are in registers at a time */

/* What comes in two stages: rows of two arrays, as many as shared memory holds beside a tile of two others. */
template <int W>
struct BackwardShape : Shape<W> {
    static constexpr int STAGE = W > 64 ? MOST_STRIP : 2 * MOST_STRIP;
    static constexpr int KEY_STRIP = MOST_STRIP / Shape<W>::PRODUCTS; /* where sums are two */
    static constexpr size_t BYTES = (size_t)(2 * Shape<W>::ROWS + 4 * STAGE) * W * sizeof(bf16);
};

/* sums, the rows of a warp from row0 on, to rows of a head; `count` rows of the tile are there. */
template <int W, bool fast, int MT>
__device__ void store_sums(act *to, int64_t stride, const float (&sums)[MT][W / 8][4], int row0, int count, int width,
                           float scale) {
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        const int row = row0 + i / 2 * 16 + i % 2 * 8 + lane_index() / 4;
        if (row >= count) continue;
#pragma unroll
        for (int n = 0; n < W / 8; n++) {
            const float(&x)[4] = sums[i / 2][n];
            const int c = column_of(n, 0);
            store_two<fast>(to + row * stride + c, x[i % 2 * 2] * scale, x[i % 2 * 2 + 1] * scale, width - c);
        }
    }
}

/* dq += scale * ds K, over the keys that a tile of queries sees */
template <int W, bool fast>
__global__ void __launch_bounds__(TILE_THREADS) query_gradients(Backward p) {
    using S = BackwardShape<W>;
    constexpr int MT = S::PRODUCTS, ROWS = S::ROWS, STAGE = S::STAGE, STRIP = MOST_STRIP;
    SHARED_DYNAMIC(bf16, memory);
    const Shared<bf16> Q = memory, dO = Q + ROWS * W, stages = dO + ROWS * W;
    const Attention &a = p.a;
    const int heads = a.B * a.NH, tiles = (int)gridDim.x / heads, head = (int)blockIdx.x % heads;
    const int b = head / a.NH, h = head % a.NH, t0 = (tiles - 1 - (int)blockIdx.x / heads) * ROWS;
    const int count = a.T - t0 < ROWS ? a.T - t0 : ROWS, row0 = warp_index() * 16 * MT;
    const int steps = fast ? W / 16 : (a.HS + 15) / 16, end = t0 + count;
    const Fresh keys(a, b, h);
    const int32_t *starts = a.starts_of(b);

    float lse[MT][2], average[MT][2];
    int start[MT][2];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        const int t = t0 + row0 + i / 2 * 16 + i % 2 * 8 + lane_index() / 4;
        const bool there = t < end;
        lse[i / 2][i % 2] = there ? p.lse[(int64_t)head * a.T + t] * LOG2_E : 0.0f;
        average[i / 2][i % 2] = there ? p.averages[(int64_t)head * a.T + t] : 0.0f;
        start[i / 2][i % 2] = there && starts ? starts[t] : 0;
    }
    auto fetch = [&](int k0, int stage) {
        const Shared<bf16> K = stages + stage * 2 * STAGE * W;
        for (int side = 0; side < 2; side++)
            fetch_rows<W, fast>(K + side * STAGE * W, STAGE, keys.rows[side] + k0 * keys.stride, keys.stride, end - k0,
                                a.HS);
        copy_async_commit();
    };
    const int first_key = least_start(starts ? starts + t0 : NULL, count) / STAGE * STAGE;
    fetch_rows<W, fast>(Q, ROWS, a.head(b, h) + t0 * a.row(), a.row(), count, a.HS);
    fetch_rows<W, fast>(dO, ROWS, p.dout_of(b, h) + t0 * p.dout_row(), p.dout_row(), count, a.HS);
    fetch(first_key, 0);
    float dq[MT][W / 8][4] = {};
    for (int k0 = first_key, stage = 0; k0 < end; k0 += STAGE, stage ^= 1) {
        copy_async_wait<0>();
        __syncthreads(); /* this stage is there; nobody reads the other */
        if (k0 + STAGE < end) fetch(k0 + STAGE, stage ^ 1);
        const Shared<bf16> K = stages + stage * 2 * STAGE * W, V = K + STAGE * W;
#pragma unroll 1
        for (int strip = 0; strip < STAGE; strip += STRIP) {
            const int k = k0 + strip, last = t0 + row0 + 16 * MT - 1, left = (last < end - 1 ? last : end - 1) + 1 - k;
            const int columns = fast ? STRIP : left;
            if (left <= 0 || row0 >= count) break;
            float s[MT][STRIP / 8][4], dp[MT][STRIP / 8][4];
            multiply_rows<W>(s, Q, row0, K, strip, columns, steps);
            multiply_rows<W>(dp, dO, row0, V, strip, columns, steps);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int n = 0; n < STRIP / 8; n++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int t = t0 + row0 + 16 * m + j / 2 * 8 + lane_index() / 4, key = k + column_of(n, j);
                        const float weight = exp2_fast(fmaf(s[m][n][j], a.factor, -lse[m][j / 2]));
                        const bool seen = key <= t && key >= start[m][j / 2];
                        s[m][n][j] = seen ? weight * (dp[m][n][j] - average[m][j / 2]) : 0.0f;
                    }
            uint32_t ds[MT][STRIP / 16][4];
            round_weights(ds, s);
            multiply_columns<W>(dq, ds, K, strip, columns, steps);
        }
    }
    store_sums<W, fast>(p.gradient(b, h) + t0 * a.row(), a.row(), dq, row0, count, a.HS, a.scale);
}

/* Blocks of queries of the heads of a group that see a tile of keys, head by head. */
struct QueryWalk {
    const int32_t *starts;
    int first, T, last_key, rows, heads, head, t0;

    /* On to the first block, from this one on, that sees a key. */
    __device__ bool here() {
        for (; head < heads; head++, t0 = first)
            for (; t0 < T; t0 += rows)
                if (least_start(starts ? starts + t0 : NULL, T - t0 < rows ? T - t0 : rows) <= last_key) return true;
        return false;
    }
    __device__ bool next() {
        t0 += rows;
        return here();
    }
};

/* dv += p dout, dk += scale * ds q, over the queries that see a tile of keys; scores stand transposed, a row for a key
 */
template <int W, bool fast>
__global__ void __launch_bounds__(TILE_THREADS) key_gradients(Backward p) {
    using S = BackwardShape<W>;
    constexpr int MT = S::PRODUCTS, ROWS = S::ROWS, STAGE = S::STAGE, STRIP = S::KEY_STRIP;
    SHARED_DYNAMIC(bf16, memory);
    SHARED(float, lse, 2 * STAGE);
    SHARED(float, average, 2 * STAGE);
    SHARED(int32_t, start, 2 * STAGE);
    const Shared<bf16> K = memory, V = K + ROWS * W, stages = V + ROWS * W;
    const Attention &a = p.a;
    const int heads = a.B * a.NKV, group = a.NH / a.NKV, head = (int)blockIdx.x % heads, lane = lane_index();
    const int b = head / a.NKV, kv = head % a.NKV, k0 = (int)blockIdx.x / heads * ROWS;
    const int count = a.T - k0 < ROWS ? a.T - k0 : ROWS, row0 = warp_index() * 16 * MT;
    const int steps = fast ? W / 16 : (a.HS + 15) / 16;
    const Fresh keys(a, b, kv * group);
    const int32_t *starts = a.starts_of(b);

    auto fetch = [&](const QueryWalk &walk, int stage) {
        const int h = kv * group + walk.head, left = a.T - walk.t0;
        const Shared<bf16> q = stages + stage * 2 * STAGE * W;
        fetch_rows<W, fast>(q, STAGE, a.head(b, h) + walk.t0 * a.row(), a.row(), left, a.HS);
        fetch_rows<W, fast>(q + STAGE * W, STAGE, p.dout_of(b, h) + walk.t0 * p.dout_row(), p.dout_row(), left, a.HS);
        copy_async_commit();
        for (int i = (int)threadIdx.x; i < STAGE; i += TILE_THREADS) {
            const int64_t at = ((int64_t)b * a.NH + h) * a.T + walk.t0 + i;
            lse[stage * STAGE + i] = i < left ? p.lse[at] * LOG2_E : 0.0f;
            average[stage * STAGE + i] = i < left ? p.averages[at] : 0.0f;
            start[stage * STAGE + i] = i < left && starts ? starts[walk.t0 + i] : 0;
        }
    };
    fetch_rows<W, fast>(K, ROWS, keys.rows[0] + k0 * keys.stride, keys.stride, count, a.HS);
    fetch_rows<W, fast>(V, ROWS, keys.rows[1] + k0 * keys.stride, keys.stride, count, a.HS);
    QueryWalk walk = {starts, k0, a.T, k0 + count - 1, STAGE, group, 0, k0};
    bool more = walk.here(); /* a key sees itself: there is one */
    fetch(walk, 0);
    float dk[MT][W / 8][4] = {}, dv[MT][W / 8][4] = {};
    for (int stage = 0; more; stage ^= 1) {
        const int t0 = walk.t0;
        copy_async_wait<0>();
        __syncthreads(); /* this stage is there; nobody reads the other */
        more = walk.next();
        if (more) fetch(walk, stage ^ 1);
        const Shared<bf16> q = stages + stage * 2 * STAGE * W, dO = q + STAGE * W;
#pragma unroll 1
        for (int strip = 0; strip < STAGE; strip += STRIP) {
            const int t = t0 + strip, left = a.T - t, columns = fast ? STRIP : left;
            if (left <= 0) break;
            if (row0 >= count || t + STRIP <= k0 + row0) continue;
            float s[MT][STRIP / 8][4], dp[MT][STRIP / 8][4];
            multiply_rows<W>(s, K, row0, q, strip, columns, steps);
            multiply_rows<W>(dp, V, row0, dO, strip, columns, steps);
#pragma unroll
            for (int i = 0; i < STRIP / 4; i++) { /* of a lane's columns */
                const int n = i / 2, column = column_of(n, i), at = stage * STAGE + strip + column;
                const float lse_here = lse[at], average_here = average[at];
                const int last = t + column, first = start[at];
#pragma unroll
                for (int k = 0; k < 2 * MT; k++) { /* of its rows */
                    const int m = k / 2, j = k % 2 * 2 + i % 2, key = k0 + row0 + 16 * m + k % 2 * 8 + lane / 4;
                    const bool seen = key >= first && key <= last;
                    const float weight = exp2_fast(fmaf(s[m][n][j], a.factor, -lse_here));
                    s[m][n][j] = seen ? weight : 0.0f;
                    dp[m][n][j] = seen ? weight * (dp[m][n][j] - average_here) : 0.0f;
                }
            }
            uint32_t rounded[MT][STRIP / 16][4];
            round_weights(rounded, s);
            multiply_columns<W>(dv, rounded, dO, strip, columns, steps);
            round_weights(rounded, dp);
            multiply_columns<W>(dk, rounded, q, strip, columns, steps);
        }
    }
    act *to = p.gradient(b, a.NH + kv) + k0 * a.row();
    store_sums<W, fast>(to, a.row(), dk, row0, count, a.HS, a.scale);
    store_sums<W, fast>(to + (int64_t)a.NKV * a.HS, a.row(), dv, row0, count, a.HS, 1.0f);
}

/* ---- backward, plain: a warp for each query, then one for each key ---- */

/* Of a warp: four rows of a head and two weights of WARP keys or queries. */
inline size_t plain_backward_bytes(int HS) { return TILE_WARPS * (4 * (size_t)HS + 2 * WARP) * sizeof(float); }

__device__ Shared<float> plain_space(Shared<float> memory, int HS) {
    return memory + warp_index() * (4 * HS + 2 * WARP);
}

template <bool rounded>
__device__ float dot(Shared<float> a, const act *b, int n) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += a[i] * operand<rounded>(to_float(b[i]));
    return sum;
}

template <bool rounded>
__global__ void __launch_bounds__(TILE_THREADS, 4) query_gradients_plain(Backward p) {
    SHARED_DYNAMIC(float, memory);
    const Attention &a = p.a;
    const int HS = a.HS, lane = lane_index();
    const Shared<float> q = plain_space(memory, HS), dout = q + HS, dq = dout + HS, weights = dq + HS;
    const Place at(a.NH, a.T);
    if (at.head >= a.NH) return;
    const int b = at.b, t = at.t, h = at.head;
    const int64_t saved = ((int64_t)b * a.NH + h) * a.T + t;
    const Fresh keys(a, b, h);
    const float scale = a.scale, lse = p.lse[saved], average = p.averages[saved];
    for (int i = lane; i < HS; i += WARP) {
        q[i] = operand<rounded>(to_float(a.head(b, h)[t * a.row() + i]));
        dout[i] = operand<rounded>(to_float(p.dout_of(b, h)[t * p.dout_row() + i]));
        dq[i] = 0.0f;
    }
    __syncwarp();
    for (int k0 = a.starts ? a.starts[at.bt] : 0; k0 <= t; k0 += WARP) {
        const int count = t + 1 - k0 < WARP ? t + 1 - k0 : WARP;
        if (lane < count) {
            const int64_t key = (k0 + lane) * keys.stride;
            const float weight = expf(scale * dot<rounded>(q, keys.rows[0] + key, HS) - lse);
            weights[lane] = operand<rounded>(weight * (dot<rounded>(dout, keys.rows[1] + key, HS) - average));
        }
        __syncwarp();
        for (int i = lane; i < HS; i += WARP)
            for (int k = 0; k < count; k++) dq[i] += weights[k] * operand<rounded>(keys.at(0, k0 + k, i));
        __syncwarp();
    }
    for (int i = lane; i < HS; i += WARP) from_float(p.gradient(b, h)[t * a.row() + i], dq[i] * scale);
}

template <bool rounded>
__global__ void __launch_bounds__(TILE_THREADS, 4) key_gradients_plain(Backward p) {
    SHARED_DYNAMIC(float, memory);
    const Attention &a = p.a;
    const int HS = a.HS, lane = lane_index(), group = a.NH / a.NKV;
    const Shared<float> k = plain_space(memory, HS), v = k + HS, dk = v + HS, dv = dk + HS;
    const Shared<float> weights = dv + HS, dscores = weights + WARP;
    const Place at(a.NKV, a.T);
    if (at.head >= a.NKV) return;
    const int b = at.b, j = at.t, kv = at.head;
    const int32_t *starts = a.starts_of(b);
    const Fresh keys(a, b, kv * group);
    for (int i = lane; i < HS; i += WARP) {
        k[i] = operand<rounded>(keys.at(0, j, i)), v[i] = operand<rounded>(keys.at(1, j, i));
        dk[i] = 0.0f, dv[i] = 0.0f;
    }
    __syncwarp();
    for (int h = kv * group; h < (kv + 1) * group; h++)
        for (int t0 = j; t0 < a.T; t0 += WARP) {
            const int64_t saved = ((int64_t)b * a.NH + h) * a.T;
            auto sees = [&](int t) { return t < a.T && (!starts || starts[t] <= j); };
            auto query = [&](int t) { return a.head(b, h) + t * a.row(); };
            auto dout = [&](int t) { return p.dout_of(b, h) + t * p.dout_row(); };
            const int mine = t0 + lane;
            if (sees(mine)) {
                const float weight = expf(a.scale * dot<rounded>(k, query(mine), HS) - p.lse[saved + mine]);
                weights[lane] = operand<rounded>(weight);
                const float dp = dot<rounded>(v, dout(mine), HS);
                dscores[lane] = operand<rounded>(weight * (dp - p.averages[saved + mine]));
            }
            __syncwarp();
            for (int n = 0; n < WARP; n++)
                for (int i = lane; sees(t0 + n) && i < HS; i += WARP) {
                    dv[i] += weights[n] * operand<rounded>(to_float(dout(t0 + n)[i]));
                    dk[i] += dscores[n] * operand<rounded>(to_float(query(t0 + n)[i]));
                }
            __syncwarp();
        }
    for (int i = lane; i < HS; i += WARP) {
        act *to = p.gradient(b, a.NH + kv) + j * a.row() + i;
        from_float(to[0], dk[i] * a.scale), from_float(to[(int64_t)a.NKV * HS], dv[i]);
    }
}

/* ---- which ---- */

template <int W, bool fast>
void launch_forward(const Attention &a, const char *op) {
    const int64_t blocks = divide_up(a.T, Shape<W>::ROWS) * a.B * a.NH;
    launch(Grid(blocks, TILE_THREADS, Shape<W>::BYTES, op), forward<W, fast>, a);
}

template <int W, bool fast>
void launch_backward(const Backward &p, const char *op) {
    const int64_t tiles = divide_up(p.a.T, Shape<W>::ROWS) * p.a.B;
    launch(Grid(tiles * p.a.NH, TILE_THREADS, BackwardShape<W>::BYTES, op), query_gradients<W, fast>, p);
    launch(Grid(tiles * p.a.NKV, TILE_THREADS, BackwardShape<W>::BYTES, op), key_gradients<W, fast>, p);
}

}  // namespace

/* Whether attention is Hopper's: by the device, and of no rows not. */
static bool on_sm90(const Attention &a) { return is_sm90() && a.B > 0 && a.T > 0 && a.NH > 0; }

void OPERATOR(attention_forward)(act *out, float *lse, const act *qkv, const int32_t *starts, int prec, int B, int T,
                                 int NH, int NKV, int HS) {
    const Attention a = {out, lse, qkv, starts, B, T, NH, NKV, HS, score_scale(HS), LOG2_E * score_scale(HS)};
    const bool sm90 = OPERATOR(attention_forward_sm90) && on_sm90(a);
    if (!on_tensor_cores(prec, HS)) {
        const Grid grid(blocks_for(a, NH), TILE_THREADS, plain_bytes(HS));
        launch(grid, prec == PREC_BF16 ? forward_plain<true> : forward_plain<false>, a);
    } else if (sm90 && (is_fast(64, HS, qkv, out) || is_fast(128, HS, qkv, out))) {
        OPERATOR(attention_forward_sm90)(out, lse, qkv, starts, B, T, NH, NKV, HS, __func__);
    } else if (is_fast(64, HS, qkv, out)) launch_forward<64, sizeof(act) == 2>(a, __func__);
    else if (HS <= 64) launch_forward<64, false>(a, __func__);
    else if (is_fast(128, HS, qkv, out)) launch_forward<128, sizeof(act) == 2>(a, __func__);
    else launch_forward<128, false>(a, __func__);
}

void OPERATOR(attention_backward)(act *dqkv, const act *dout, const act *qkv, const act *out, const float *lse,
                                  const int32_t *starts, int prec, int B, int T, int NH, int NKV, int HS) {
    const bool sm90 = OPERATOR(attention_backward_sm90) && is_sm90() && B > 0 && T > 0 && NH > 0 &&
                      on_tensor_cores(prec, HS) && is_fast(64, HS, qkv, dout, dqkv);
    const size_t values = ((size_t)B * NH * T + 3) / 4 * 4;
    float *d =
        (float *)scratch(values * sizeof(float) + (sm90 ? OPERATOR(attention_backward_sm90_room)(B, T, NH, NKV) : 0));
    const Attention a = {NULL, NULL, qkv, starts, B, T, NH, NKV, HS, score_scale(HS), LOG2_E * score_scale(HS)};
    const Backward p = {a, dqkv, dout, out, lse, d};
    const int lanes = averaging_lanes(HS);
    const bool whole = HS % VEC == 0 && on_16_bytes(out) && on_16_bytes(dout);
    launch(Grid(divide_up((int64_t)B * T * NH, averages_of_block(lanes)), TILE_THREADS),
           whole ? averages<true> : averages<false>, p, lanes);
    if (!on_tensor_cores(prec, HS)) {
        const size_t bytes = plain_backward_bytes(HS);
        launch(Grid(blocks_for(a, NH), TILE_THREADS, bytes),
               prec == PREC_BF16 ? query_gradients_plain<true> : query_gradients_plain<false>, p);
        launch(Grid(blocks_for(a, NKV), TILE_THREADS, bytes),
               prec == PREC_BF16 ? key_gradients_plain<true> : key_gradients_plain<false>, p);
    } else if (sm90) {
        OPERATOR(attention_backward_sm90)(dqkv, dout, qkv, lse, d, d + values, starts, B, T, NH, NKV, __func__);
    } else if (is_fast(64, HS, qkv, dout, dqkv)) launch_backward<64, sizeof(act) == 2>(p, __func__);
    else if (HS <= 64) launch_backward<64, false>(p, __func__);
    else if (is_fast(128, HS, qkv, dout, dqkv)) launch_backward<128, sizeof(act) == 2>(p, __func__);
    else launch_backward<128, false>(p, __func__);
}

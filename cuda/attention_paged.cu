/* attention_paged.cu -- causal attention of a session's rows: earlier keys and values lie in pages.
 *
 * A page holds, head by head, 64 rows of keys and then 64 of values; a row is the head, in bf16 with zeros up to a
 * multiple of 8 values, or in fp32.  New keys and values are taken from qkv, those before from pages, so that nobody
 * waits for the new ones to be written.
 *
 * How many queries a row has stands in the device's memory, so every launch is made for all rows.  Many queries (a
 * prompt) go tile by tile as in attention.cu.  Few are a matter of how fast keys and values come: their blocks of keys
 * are spread over the GPU, a warp each, and all query heads that share a key meet it together, as rows of one product.
 * To have the bits of one pass over the keys, the weights of a block must know the greatest score of the blocks before,
 * and sums of blocks are added in order.  So it takes three kernels: scores; weights, and their sums of values; the
 * sums over blocks.  Between them pass 4 (64 + HS) bytes a query and block, where keys and values are 256 HS.  Where
 * rows have few pages the last two are one, by blocks that have 16 of the values of all pages; and on Hopper all are
 * one, which is attention_few_sm90.cu's. */
#include "attention_paged.cuh"
#include "attention_plain.cuh"

namespace {

enum { MOST_SLOTS = 16 };
enum { STRIP = 16, STRIP_WARPS = 16, MOST_STRIP_PAGES = 32 }; /* values of a block, its warps, pages it can keep */

/* ---- few queries ---- */

/* Of a warp: a page's keys or values, and 16 queries. */
template <int W>
struct FewShape {
    static constexpr int TILE = (KEY_BLOCK + 16) * W;
    static constexpr size_t FEW_BYTES = TILE_WARPS * TILE * sizeof(bf16);
    static constexpr size_t BYTES = FEW_BYTES > Shape<W>::BYTES ? FEW_BYTES : Shape<W>::BYTES;
};

/* The pages of this warp: the blocks of all heads of a group share them. */
struct PageWalk {
    int page, step;

    __device__ PageWalk(const Paged &p, const Part &part) {
        const int group = p.group();
        page = (part.slot * group + part.h % group) * TILE_WARPS + warp_index();
        step = p.slots * group * TILE_WARPS;
    }
};

template <int W, bool fast>
__device__ void score_pages(const Paged &p, const Part &part, const Cached<bf16> &keys) {
    SHARED_DYNAMIC(bf16, memory);
    const Shared<bf16> K = memory + warp_index() * FewShape<W>::TILE, Q = K + KEY_BLOCK * W;
    const int group = p.group(), rows = part.count * group, steps = fast ? W / 16 : (p.HS + 15) / 16;
    for (PageWalk walk(p, part); walk.page < part.pages(); walk.page += walk.step) {
        const int k0 = walk.page * KEY_BLOCK, count = part.keys(walk.page);
        keys.fetch_share<W, fast>(K, 0, k0, count, lane_index(), WARP);
        for (int row0 = 0; row0 < rows; row0 += 16) {
            for (int i = lane_index(); i < 16 * (W / CHUNK); i += WARP) {
                const int row = row0 + i / (W / CHUNK), c = i % (W / CHUNK) * CHUNK;
                const bool there = row < rows && c < p.HS;
                const act *q = part.head(p, there ? row / group : 0, part.kv * group + (there ? row % group : 0));
                fetch_chunk<W, fast>(Q, row - row0, c / CHUNK, there ? q + c : q, there ? p.HS - c : 0);
            }
            copy_async_commit();
            copy_async_wait<0>();
            __syncwarp();
            float s[1][KEY_BLOCK / 8][4];
            int seen[1][2];
            multiply_rows<W>(s, Q, 0, K, 0, fast ? KEY_BLOCK : count, steps);
            for (int r = 0; r < 2; r++) seen[0][r] = part.past + row_of(row0, r) / group + 1 - k0;
            hide(s, seen);
            float top[2];
            greatest_of_page(top, s, p.factor);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = row_of(row0, r);
                const int64_t at = p.query(part.r, part.kv, row) * p.P + walk.page;
                if (row >= rows) continue;
                p.maxima[at] = top[r]; /* all four lanes write the same */
#pragma unroll
                for (int n = 0; n < KEY_BLOCK / 8; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) p.scores[at * KEY_BLOCK + column_of(n, i)] = s[0][n][2 * r + i];
            }
            __syncwarp(); /* the tiles are free */
        }
    }
}

/* Of 16 queries from row0 on, and a page: the weights of its keys, rounded, and their sum. */
struct PageWeights {
    uint32_t rounded[1][KEY_BLOCK / 16][4];
    float sum[2];

    __device__ PageWeights(const Paged &p, const Part &part, int page, int row0, int rows) {
        Softmax<1> softmax = {};
        float s[1][KEY_BLOCK / 8][4], keep[1][2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = row_of(row0, r);
            const bool there = row < rows;
            const int64_t first = p.query(part.r, part.kv, row) * p.P;
            softmax.max[0][r] = max_before([&](int before) { return p.maxima[first + before]; }, page, there);
#pragma unroll
            for (int n = 0; n < KEY_BLOCK / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    s[0][n][2 * r + i] = there ? p.scores[(first + page) * KEY_BLOCK + column_of(n, i)] : -INFINITY;
        }
        weigh(softmax, keep, s, p.factor);
        round_weights(rounded, s);
        for (int r = 0; r < 2; r++) sum[r] = softmax.sum[0][r];
    }
};

template <int W, bool fast>
__global__ void __launch_bounds__(TILE_THREADS, 4) weigh_pages(Paged p) {
    SHARED_DYNAMIC(bf16, memory);
    launch_next();
    const Part part(p);
    wait_earlier();
    if (part.count > FEW) return;
    const Cached<bf16> keys(p, part);
    const Shared<bf16> V = memory + warp_index() * KEY_BLOCK * W;
    const int rows = part.count * p.group(), steps = fast ? W / 16 : (p.HS + 15) / 16;
    for (PageWalk walk(p, part); walk.page < part.pages(); walk.page += walk.step) {
        const int count = part.keys(walk.page);
        keys.fetch_share<W, fast>(V, 1, walk.page * KEY_BLOCK, count, lane_index(), WARP);
        copy_async_commit();
        copy_async_wait<0>();
        __syncwarp();
        for (int row0 = 0; row0 < rows; row0 += 16) {
            const PageWeights weights(p, part, walk.page, row0, rows);
            int64_t at[2];
            for (int r = 0; r < 2; r++) {
                at[r] = p.query(part.r, part.kv, row_of(row0, r)) * p.P + walk.page;
                if (row_of(row0, r) < rows) p.sums[at[r]] = weights.sum[r];
            }
#pragma unroll
            for (int n = 0; n < W / 16; n++) {
                if (n >= steps) break;
                float c[1][2][4];
                values_of_block<W>(c, weights.rounded, V, n, count);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int r = i % 4 / 2, column = column_of(2 * n + i / 4, i);
                    if (row_of(row0, r) < rows && column < p.HS) p.outputs[at[r] * p.HS + column] = c[0][i / 4][i % 4];
                }
            }
        }
        __syncwarp(); /* the tile is free */
    }
}

/* A block for each of FEW queries of a head of a row, a thread for each value. */
__global__ void __launch_bounds__(MOST_ON_TENSOR_CORES) add_pages(Paged p) {
    const int token = (int)blockIdx.x % FEW, h = (int)blockIdx.x / FEW % p.NH, r = (int)blockIdx.x / FEW / p.NH;
    launch_next(), wait_earlier();
    const int begin = p.first[r], count = p.first[r + 1] - begin, i = (int)threadIdx.x;
    if (count > FEW || token >= count || i >= p.HS) return;
    const int group = p.group(), pages = (p.past[r] + token) / KEY_BLOCK + 1;
    const int64_t at = p.query(r, h / group, token * group + h % group) * p.P;
    const float out = over_pages(
        pages, [&](int page) { return p.maxima[at + page]; }, [&](int page) { return p.sums[at + page]; },
        [&](int page) { return p.outputs[(at + page) * p.HS + i]; });
    from_float(p.out[((int64_t)(begin + token) * p.NH + h) * p.HS + i], out);
}

/* The shared memory of weigh_and_add: a strip of values for each warp; of each page and query STRIP sums of values, and
 * the sum of the weights. */
enum { STRIP_VALUES = KEY_BLOCK * STRIP, STRIP_ROW = STRIP + 1 };
inline size_t strip_bytes(int P) {
    return STRIP_WARPS * STRIP_VALUES * sizeof(bf16) + (size_t)P * 16 * STRIP_ROW * sizeof(float);
}

/* weigh_pages and add_pages of at most MOST_STRIP_PAGES: a block for each STRIP values of a key head of a row, a warp
 * for each page, and then a thread for each value and query. */
template <bool fast>
__global__ void __launch_bounds__(STRIP_WARPS *WARP) weigh_and_add(Paged p) {
    SHARED_DYNAMIC(bf16, memory);
    const Shared<bf16> V = memory + warp_index() * STRIP_VALUES;
    const Shared<float> sums = shared_cast<float>(memory + STRIP_WARPS * STRIP_VALUES);
    const int strips = (p.HS + STRIP - 1) / STRIP, c0 = (int)blockIdx.x % strips * STRIP, group = p.group();
    launch_next();
    const Part part(p, (int)blockIdx.x / strips / p.NKV, (int)blockIdx.x / strips % p.NKV * group, 0);
    wait_earlier();
    if (part.count > FEW) return;
    const Cached<bf16> keys(p, part);
    const int rows = part.count * group;
    for (int row0 = 0; row0 < rows; row0 += 16) {
        for (int page = warp_index(); page < part.pages(); page += STRIP_WARPS) {
            const int count = part.keys(page);
            keys.fetch_share<STRIP, fast>(V, 1, page * KEY_BLOCK, count, lane_index(), WARP, c0);
            copy_async_commit();
            const PageWeights weights(p, part, page, row0, rows);
            copy_async_wait<0>();
            __syncwarp();
            float c[1][2][4];
            values_of_block<STRIP>(c, weights.rounded, V, 0, count);
#pragma unroll
            for (int i = 0; i < 8; i++)
                sums[(page * 16 + row_of(0, i % 4 / 2)) * STRIP_ROW + column_of(i / 4, i)] = c[0][i / 4][i % 4];
            if (lane_index() % 4 == 0)
                for (int r = 0; r < 2; r++) sums[(page * 16 + row_of(0, r)) * STRIP_ROW + STRIP] = weights.sum[r];
            __syncwarp(); /* the strip is free */
        }
        __syncthreads();
        const int i = (int)threadIdx.x / STRIP, row = row0 + i, c = (int)threadIdx.x % STRIP;
        if (i < 16 && row < rows && c0 + c < p.HS) {
            const int token = row / group, pages = (part.past + token) / KEY_BLOCK + 1;
            const float *maxima = p.maxima + p.query(part.r, part.kv, row) * p.P;
            const float out = over_pages(
                pages, [&](int page) { return maxima[page]; },
                [&](int page) -> float { return sums[(page * 16 + i) * STRIP_ROW + STRIP]; },
                [&](int page) -> float { return sums[(page * 16 + i) * STRIP_ROW + c]; });
            from_float(part.head_out(p, token, part.kv * group + row % group)[c0 + c], out);
        }
        __syncthreads(); /* the sums have been read */
    }
}

/* ---- all rows ---- */

template <int W, bool fast>
__global__ void __launch_bounds__(TILE_THREADS, 2) write_and_attend(Paged p) {
    launch_next();
    const Part part(p);
    wait_earlier();
    const Cached<bf16> keys(p, part);
    if (part.count == 0) return;
    if (part.h % p.group() == 0) keys.write(part, p.slots);
    if (part.count <= FEW) return score_pages<W, fast>(p, part, keys);
    attend_tiles<W, fast>(p, part, keys);
}

template <bool rounded, class T>
__global__ void __launch_bounds__(TILE_THREADS, 4) write_and_attend_plain(Paged p) {
    launch_next();
    const Part part(p);
    wait_earlier();
    const Cached<T> keys(p, part);
    if (part.h % p.group() == 0) keys.write(part, p.slots);
    for (int i = part.slot * TILE_WARPS + warp_index(); i < part.count; i += p.slots * TILE_WARPS) {
        plain_query<rounded>(part.head_out(p, i, part.h), NULL, part.head(p, i, part.h), keys, 0, part.past + i, p.HS,
                             p.scale);
    }
}

template <int W, bool fast>
void launch_paged(Paged p, const char *op) {
    const int64_t blocks = (int64_t)p.R * p.NH * p.slots, queries = (int64_t)p.R * p.NH * FEW, pages = queries * p.P;
    p.scores = (float *)scratch((size_t)pages * (KEY_BLOCK + 2 + p.HS) * sizeof(float));
    p.maxima = p.scores + pages * KEY_BLOCK, p.sums = p.maxima + pages, p.outputs = p.sums + pages;
    launch_early(Grid(blocks, TILE_THREADS, FewShape<W>::BYTES, op), write_and_attend<W, fast>, p);
    if (p.P <= MOST_STRIP_PAGES) {
        const int64_t strips = (int64_t)p.R * p.NKV * divide_up(p.HS, STRIP);
        launch_early(Grid(strips, STRIP_WARPS * WARP, strip_bytes(p.P), op), weigh_and_add<fast>, p);
        return;
    }
    launch_early(Grid(blocks, TILE_THREADS, TILE_WARPS * KEY_BLOCK * W * sizeof(bf16), op), weigh_pages<W, fast>, p);
    launch_early(Grid(queries, threads_for(p.HS, MOST_ON_TENSOR_CORES), 0, op), add_pages, p);
}

}  // namespace

extern "C" int64_t OPERATOR(page_bytes)(int prec, int NKV, int HS) {
    const int64_t row = prec == PREC_BF16 ? row_width(bf16{}, HS) * sizeof(bf16) : HS * sizeof(float);
    return row * 2 * KEY_BLOCK * NKV;
}

void OPERATOR(attention_paged)(act *out, void *pages, const act *qkv, const int32_t *table, const int32_t *first,
                               const int32_t *past, int prec, int R, int P, int NH, int NKV, int HS) {
    const bool fast = prec == PREC_BF16 && is_fast(64, HS, qkv, out) && on_16_bytes((const bf16 *)pages);
    if (OPERATOR(attention_few_sm90) && is_sm90() && fast && P <= MOST_CLUSTER_PAGES && R > 0 && NH > 0)
        return OPERATOR(attention_few_sm90)(out, pages, qkv, table, first, past, R, P, NH, NKV, __func__);
    const Paged p = paged(out, pages, qkv, table, first, past, R, P, NH, NKV, HS, P < MOST_SLOTS ? P : MOST_SLOTS);
    if (!on_tensor_cores(prec, HS)) {
        const Grid grid((int64_t)R * NH * p.slots, TILE_THREADS, plain_bytes(HS));
        launch_early(grid,
                     prec == PREC_BF16 ? write_and_attend_plain<true, bf16> : write_and_attend_plain<false, float>, p);
    } else if (is_fast(64, HS, qkv, out)) launch_paged<64, sizeof(act) == 2>(p, __func__);
    else if (HS <= 64) launch_paged<64, false>(p, __func__);
    else if (is_fast(128, HS, qkv, out)) launch_paged<128, sizeof(act) == 2>(p, __func__);
    else launch_paged<128, false>(p, __func__);
}

/* attention_paged.cuh -- what the kernels of attention over pages share: where things lie, prompts, and sums over
 * pages.
 */
#pragma once
#include "attention.cuh"

namespace {

enum { FEW = 4 }; /* tokens of a row: their blocks of keys are spread over the GPU */

struct Paged {
    act *out;
    void *pages;
    const act *qkv;
    const int32_t *table, *first, *past;
    int R, P, NH, NKV, HS, slots;
    float scale, factor;
    /* of each of FEW queries of each head of each row, and each page */
    float *scores;  /* (.., P, 64) */
    float *maxima;  /* (.., P) of the scores, in factors of 2 */
    float *sums;    /* (.., P) of the weights */
    float *outputs; /* (.., P, HS) sums of weights times values */

    __host__ __device__ int group() const { return NH / NKV; }
    __device__ int64_t query(int r, int kv, int row) const { return ((int64_t)r * NKV + kv) * FEW * group() + row; }
};

/* What a block works on: a row and a head of it, shared by `slots` blocks. */
struct Part {
    int r, h, kv, slot, begin, count, past, length;

    __device__ Part(const Paged &p, int r_, int h_, int slot_) : r(r_), h(h_), kv(h_ / p.group()), slot(slot_) {
        begin = told(p.first + r), count = told(p.first + r + 1) - begin;
        past = told(p.past + r), length = past + count;
    }
    __device__ explicit Part(const Paged &p)
        : Part(p, (int)blockIdx.x / p.slots / p.NH, (int)blockIdx.x / p.slots % p.NH, (int)blockIdx.x % p.slots) {}
    __device__ int pages() const { return (length + KEY_BLOCK - 1) / KEY_BLOCK; }
    /* Of a page. */
    __device__ int keys(int page) const {
        const int left = length - page * KEY_BLOCK;
        return left < KEY_BLOCK ? left : KEY_BLOCK;
    }
    __device__ int64_t row(const Paged &p) const { return (int64_t)(p.NH + 2 * p.NKV) * p.HS; }
    /* The head, of all heads, of token i of this row. */
    __device__ const act *head(const Paged &p, int i, int head) const {
        return p.qkv + (begin + i) * row(p) + (int64_t)head * p.HS;
    }
    __device__ act *head_out(const Paged &p, int i, int head) const {
        return p.out + ((int64_t)(begin + i) * p.NH + head) * p.HS;
    }
};

__host__ __device__ inline int row_width(bf16, int HS) { return (HS + CHUNK - 1) / CHUNK * CHUNK; }
__host__ __device__ inline int row_width(float, int HS) { return HS; }

/* Keys and values of a row's head: up to `past` in pages of T. */
template <class T>
struct Cached {
    T *head; /* in page 0 */
    int64_t page;
    const int32_t *table;
    const act *fresh_keys; /* values lie `to_values` behind them */
    int64_t stride, to_values;
    int past, width, HS;

    __device__ Cached(const Paged &p, const Part &part)
        : table(p.table + (int64_t)part.r * p.P),
          fresh_keys(part.head(p, 0, p.NH + part.kv)),
          stride(part.row(p)),
          to_values((int64_t)p.NKV * p.HS),
          past(part.past),
          width(row_width(T{}, p.HS)),
          HS(p.HS) {
        const int64_t values = (int64_t)2 * KEY_BLOCK * width;
        head = (T *)p.pages + part.kv * values, page = p.NKV * values;
    }
    __device__ T *row(int side, int t) const {
        return head + table[t / KEY_BLOCK] * page + (int64_t)(side * KEY_BLOCK + t % KEY_BLOCK) * width;
    }
    __device__ const act *fresh(int side, int t) const { return fresh_keys + side * to_values + (t - past) * stride; }
    __device__ float at(int side, int t, int i) const {
        return t < past ? to_float(row(side, t)[i]) : to_float(fresh(side, t)[i]);
    }
    /* Share `thread` of `threads`; W values of each row from column c0 on. */
    template <int W, bool fast>
    __device__ void fetch_share(Shared<bf16> tile, int side, int k0, int count, int thread, int threads,
                                int c0 = 0) const {
        const bf16 *cached = row(side, k0);
#pragma unroll 1
        for (int i = thread; i < KEY_BLOCK * (W / CHUNK); i += threads) {
            const int r = i / (W / CHUNK), chunk = i % (W / CHUNK), c = c0 + chunk * CHUNK, t = k0 + r;
            const bool there = r < count && c < HS;
            if (there && t < past) copy_async(chunk_at<W>(tile, r, chunk), cached + r * width + c);
            else fetch_chunk<W, fast>(tile, r, chunk, there ? fresh(side, t) + c : fresh_keys, there ? HS - c : 0);
        }
    }
    template <int W, bool fast>
    __device__ void fetch(Shared<bf16> tile, int side, int k0, int count) const {
        fetch_share<W, fast>(tile, side, k0, count, (int)threadIdx.x, (int)blockDim.x);
    }
    /* This block's share of the new ones goes to its pages. */
    __device__ void write(const Part &part, int slots) const {
        const int values = part.count * 2 * width, threads = (int)blockDim.x;
        for (int n = part.slot * threads + (int)threadIdx.x; n < values; n += slots * threads) {
            const int i = n % width, side = n / width % 2, t = past + n / width / 2;
            from_float(row(side, t)[i], i < HS ? to_float(fresh(side, t)[i]) : 0.0f);
        }
    }
};

/* The tiles of a prompt that are this block's. */
template <int W, bool fast>
__device__ void attend_tiles(const Paged &p, const Part &part, const Cached<bf16> &keys) {
    constexpr int ROWS = Shape<W>::ROWS;
    for (int tile = (part.count - 1) / ROWS - part.slot; tile >= 0; tile -= p.slots) {
        const int i = tile * ROWS;
        Queries x;
        x.q = part.head(p, i, part.h), x.stride = part.row(p), x.starts = NULL;
        x.first = part.past + i, x.count = part.count - i < ROWS ? part.count - i : ROWS;
        x.width = p.HS, x.factor = p.factor;
        auto out = [&](int row) { return part.head_out(p, i + row, part.h); };
        attend<W, fast>(x, keys, out, [](int, float) {});
        __syncthreads(); /* the tiles are free */
    }
}

/* Rows are queries token by token, and of each token the heads of the group.  Row g or g + 8 of this lane, from row0.
 */
__device__ int row_of(int row0, int r) { return row0 + 8 * r + lane_index() / 4; }

/* The greatest score of this lane's two rows, in factors of 2. */
__device__ void greatest_of_page(float (&top)[2], const float (&s)[1][KEY_BLOCK / 8][4], float factor) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = -INFINITY;
#pragma unroll
        for (int n = 0; n < KEY_BLOCK / 8; n++) top[r] = fmaxf(top[r], fmaxf(s[0][n][2 * r], s[0][n][2 * r + 1]));
        top[r] = row_max(top[r]) * factor;
    }
}

/* That of a query in the pages before this one, greatest(page) in each; the four lanes of a row share the pages. */
template <class Max>
__device__ float max_before(Max greatest, int pages, bool there) {
    float max = -INFINITY;
#pragma unroll 4
    for (int page = lane_index() % 4; there && page < pages; page += 4) max = fmaxf(max, greatest(page));
    return row_max(max);
}

/* A query's value from those of its pages, in order; of each its greatest score, the sum of the weights, and of them
 * times values. */
template <class Max, class Sum, class Value>
__device__ float over_pages(int pages, Max greatest, Sum sum, Value value) {
    float max = -INFINITY, weights = 0.0f, out = 0.0f;
#pragma unroll 4
    for (int page = 0; page < pages; page++) {
        const float new_max = fmaxf(max, greatest(page)), keep = exp2_fast(max - origin(new_max));
        weights = fmaf(weights, keep, sum(page));
        out = fmaf(out, keep, value(page));
        max = new_max;
    }
    return out * (1.0f / weights);
}

inline Paged paged(act *out, void *pages, const act *qkv, const int32_t *table, const int32_t *first,
                   const int32_t *past, int R, int P, int NH, int NKV, int HS, int slots) {
    Paged p = {};
    p.out = out, p.pages = pages, p.qkv = qkv, p.table = table, p.first = first, p.past = past;
    p.R = R, p.P = P, p.NH = NH, p.NKV = NKV, p.HS = HS, p.slots = slots;
    p.scale = score_scale(HS), p.factor = LOG2_E * p.scale;
    return p;
}

}  // namespace

/* ---- the seam to attention_few_sm90.cu, which may not be there: then it is NULL ---- */

/* Heads of 64 values in bf16, on 16 bytes, and tables of at most MOST_CLUSTER_PAGES pages; R is not 0. */
enum { MOST_CLUSTER_PAGES = 32 };
extern "C"
    __attribute__((weak)) void OPERATOR(attention_few_sm90)(act *out, void *pages, const act *qkv, const int32_t *table,
                                                            const int32_t *first, const int32_t *past, int R, int P,
                                                            int NH, int NKV, const char *op);

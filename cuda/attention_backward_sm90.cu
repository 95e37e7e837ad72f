/* attention_backward_sm90.cu -- the gradient of attention on Hopper, heads of 64 values in bf16: TMA, wgmma, blocks
 * that stay.
 *
 * As in attention.cu no sum has two owners: one kernel owns gradients of queries, another those of keys and values.
 * Both are the same walk.  An item is 128 rows of a head, its own, of which two tiles stay in shared memory; blocks of
 * 64 of the other kind's, its others, pass by in a ring:
 *
 *              own              others           s = own0 others0^T, dp = own1 others1^T, and with the weights p of s
 *   queries    q, dout          k, v             dq += ds k
 *   keys       k, v             q, dout          dv += p^T dout, dk += ds^T q, over all heads of the group
 *
 * p and ds never leave registers: as Sums have them, rounded, they are left operands. */
#include "attention_sm90.cuh"

namespace {

enum Of { QUERIES, KEYS };
enum { W = TILE_WIDTH, STAGES = 4, STATS = 3 * SLICE }; /* of each query: lse, average, start */
enum { TILES = 2 * (STAGES + CONSUMERS * ITEMS), BARRIERS = 2 * STAGES + 2 * ITEMS };
enum {
    BYTES = TILES * TILE * (int)sizeof(bf16) + STAGES * STATS * (int)sizeof(float) + BARRIERS * (int)sizeof(uint64_t)
};
static_assert(BYTES <= 227 << 10, "what a block may have");

struct Work {
    const float *lse, *averages; /* (B, NH, T) */
    const int32_t *starts;
    int B, T, NH, NKV, items;
    float factor, scale;

    __device__ int group() const { return NH / NKV; }
};

/* The shared memory of a block.  Barriers: a stage of others has come, is free; own rows have come, their place is
 * free. */
struct Places {
    Shared<bf16> all;
    Shared<float> stats;
    Shared<uint64_t> full, empty, own_full, own_empty;
    __device__ Places(Shared<bf16> all_)
        : all(all_),
          stats(shared_cast<float>(all + TILES * TILE)),
          full(shared_cast<uint64_t>(stats + STAGES * STATS)),
          empty(full + STAGES),
          own_full(empty + STAGES),
          own_empty(own_full + ITEMS) {}
    __device__ Shared<bf16> others(int stage, int side) const { return all + (2 * stage + side) * TILE; }
    __device__ Shared<bf16> own(int place, int consumer, int side) const {
        return all + (2 * (STAGES + CONSUMERS * place + consumer) + side) * TILE;
    }
};

/* 128 queries of head h, or keys of head h of the keys, from t0 on.  The longest come first. */
template <Of of>
struct Item {
    int b, h, t0;
    __device__ Item(const Work &work, int number) {
        const int each = of == QUERIES ? work.NH : work.NKV, heads = work.B * each;
        const int head = number % heads, tile = number / heads, tiles = work.items / heads;
        b = head / each, h = head % each, t0 = (of == QUERIES ? tiles - 1 - tile : tile) * ROWS;
    }
};

/* The blocks of an item's others, of head h from t on: of keys those that the queries see, of queries those that see a
 * key, head by head. */
template <Of of>
struct Others {
    const int32_t *starts; /* of the batch's row */
    int first, end, own_end, last_head, h, t;

    __device__ Others(const Work &work, const Item<of> &it) {
        starts = work.starts ? work.starts + (int64_t)it.b * work.T : NULL;
        own_end = it.t0 + ROWS < work.T ? it.t0 + ROWS : work.T;
        if (of == QUERIES) {
            h = last_head = it.h / work.group();
            first = least_start(starts ? starts + it.t0 : NULL, own_end - it.t0) / SLICE * SLICE, end = own_end;
        } else {
            h = it.h * work.group(), last_head = h + work.group() - 1;
            first = it.t0, end = work.T;
        }
        t = first;
        settle();
    }
    __device__ bool more() const { return h <= last_head; }
    __device__ void next() {
        t += SLICE;
        settle();
    }

    /* On to a block that there is: of queries, one that sees a key. */
    __device__ void settle() {
        for (; h <= last_head; h++, t = first)
            for (; t < end; t += SLICE)
                if (of == QUERIES || !starts || least_start(starts + t, end - t < SLICE ? end - t : SLICE) < own_end)
                    return;
    }
};

/* ---- the producer, a warp ---- */

/* Of 64 queries: the logarithm of the sum of weights, to the base of 2, dout.out, and where their keys start. */
__device__ inline void fetch_stats(Shared<float> to, const Work &work, int b, int h, int t0) {
    const Shared<int32_t> starts = shared_cast<int32_t>(to + 2 * SLICE);
    for (int i = lane_index(); i < SLICE; i += WARP) {
        const int64_t at = ((int64_t)b * work.NH + h) * work.T + t0 + i;
        const bool there = t0 + i < work.T;
        to[i] = there ? work.lse[at] * LOG2_E : 0.0f;
        to[SLICE + i] = there ? work.averages[at] : 0.0f;
        starts[i] = there && work.starts ? work.starts[(int64_t)b * work.T + t0 + i] : 0;
    }
}

template <Of of>
__device__ void produce(const Places &at, const TensorMap &qkv, const TensorMap &dout, const Work &work) {
    constexpr int bytes = TILE * (int)sizeof(bf16);
    const bool mine = elected();
    Ring<STAGES> ring;
    Ring<ITEMS> place;
    auto fetch_queries = [&](Shared<bf16> q, Shared<bf16> d, Shared<uint64_t> full, int b, int h, int t) {
        fetch<W>(q, qkv, full, b, h, t);
        fetch<W>(d, dout, full, b, h, t);
    };
    auto fetch_keys = [&](Shared<bf16> k, Shared<bf16> v, Shared<uint64_t> full, int b, int h, int t) {
        fetch<W>(k, qkv, full, b, work.NH + h, t);
        fetch<W>(v, qkv, full, b, work.NH + work.NKV + h, t);
    };
    for (int number = (int)blockIdx.x; number < work.items; number += (int)gridDim.x) {
        const Item<of> it(work, number);
        if (mine) {
            const Shared<uint64_t> full = at.own_full + place.stage;
            barrier_wait(at.own_empty + place.stage, place.parity ^ 1);
            barrier_expect(full, 2 * CONSUMERS * bytes);
            for (int i = 0; i < CONSUMERS; i++) {
                const Shared<bf16> a = at.own(place.stage, i, 0), b = at.own(place.stage, i, 1);
                if (of == QUERIES) fetch_queries(a, b, full, it.b, it.h, it.t0 + i * SLICE);
                else fetch_keys(a, b, full, it.b, it.h, it.t0 + i * SLICE);
            }
        }
        place.advance();
        for (Others<of> walk(work, it); walk.more(); walk.next()) {
            const Shared<uint64_t> full = at.full + ring.stage;
            const Shared<bf16> a = at.others(ring.stage, 0), b = at.others(ring.stage, 1);
            barrier_wait(at.empty + ring.stage, ring.parity ^ 1);
            if (of == KEYS) fetch_stats(at.stats + ring.stage * STATS, work, it.b, walk.h, walk.t);
            __syncwarp();
            if (mine) {
                barrier_expect(full, 2 * bytes);
                if (of == QUERIES) fetch_keys(a, b, full, it.b, walk.h, walk.t);
                else fetch_queries(a, b, full, it.b, walk.h, walk.t);
            }
            ring.advance();
        }
    }
}

/* ---- the consumers ---- */

/* A block of others: where it lies, and whether any row of a consumer's own meets it. */
struct Block {
    Ring<STAGES> at;
    int t;
    bool there, met;
};

/* What a lane knows of the queries: of its two rows; where columns are queries it is in shared memory. */
struct RowStats {
    float lse[2], average[2];
    int start[2];
    __device__ RowStats(const Work &work, int b, int h, int t) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int64_t at = ((int64_t)b * work.NH + h) * work.T + t + 8 * r;
            const bool there = t + 8 * r < work.T;
            lse[r] = there ? work.lse[at] * LOG2_E : 0.0f;
            average[r] = there ? work.averages[at] : 0.0f;
            start[r] = there && work.starts ? work.starts[(int64_t)b * work.T + t + 8 * r] : 0;
        }
    }
};

/* s = scores and dp = dout.v of a block: in their place the weights p and the gradients ds of the scores.  `row`: this
 * lane's upper row, `column`: the first of the block. */
template <Of of>
__device__ void differentiate(float (&s)[1][SLICE / 8][4], float (&dp)[1][SLICE / 8][4], const RowStats &rows,
                              Shared<float> columns, int row, int column, float factor) {
    const Shared<int32_t> starts = shared_cast<int32_t>(columns + 2 * SLICE);
#pragma unroll
    for (int i = 0; i < SLICE / 4; i++) { /* of a lane's columns */
        const int n = i / 2, c = column_of(n, i);
        const float lse = of == KEYS ? columns[c] : 0.0f, average = of == KEYS ? columns[SLICE + c] : 0.0f;
        const int start = of == KEYS ? starts[c] : 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int j = 2 * r + i % 2, mine = row + 8 * r, other = column + c;
            const int query = of == QUERIES ? mine : other, key = of == QUERIES ? other : mine;
            const bool seen = key <= query && key >= (of == QUERIES ? rows.start[r] : start);
            const float weight = exp2_fast(fmaf(s[0][n][j], factor, of == QUERIES ? -rows.lse[r] : -lse));
            const float more = dp[0][n][j] - (of == QUERIES ? rows.average[r] : average);
            s[0][n][j] = seen ? weight : 0.0f;
            dp[0][n][j] = seen ? weight * more : 0.0f;
        }
    }
}

template <Of of>
__device__ void consume(const Places &at, const TensorMap &gradient, const Work &work, int consumer) {
    const int warp_row = warp_index() % 4 * 16, lane_row = lane_index() / 4;
    Ring<STAGES> ring;
    Ring<ITEMS> place;
    Sums<SLICE> s, dp, first, second; /* of dq; or of dk and dv */
    for (int number = (int)blockIdx.x; number < work.items; number += (int)gridDim.x) {
        const Item<of> it(work, number);
        const int own0 = it.t0 + consumer * SLICE, own_end = own0 + SLICE < work.T ? own0 + SLICE : work.T;
        const int row = own0 + warp_row + lane_row;
        const Shared<bf16> own[2] = {at.own(place.stage, consumer, 0), at.own(place.stage, consumer, 1)};
        const RowStats rows(work, it.b, of == QUERIES ? it.h : 0, of == QUERIES ? row : work.T);
        Others<of> walk(work, it);

        auto next = [&] {
            const bool there = walk.more(), met = of == QUERIES ? walk.t < own_end : walk.t + SLICE > own0;
            const Block block = {ring, walk.t, there, there && met && own0 < own_end};
            if (there) ring.advance(), walk.next();
            return block;
        };
        auto wait_for = [&](const Block &block) { barrier_wait(at.full + block.at.stage, block.at.parity); };
        /* Once for each warp, and only of what has come: the stage would be let go for what lay there before. */
        auto release = [&](const Block &block) {
            if (lane_index() == 0) barrier_arrive(at.empty + block.at.stage);
        };
        auto begin = [&](const Block &block) {
            wait_for(block);
            wgmma_fence();
            multiply_slices<W>(s, own[0], at.others(block.at.stage, 0));
            multiply_slices<W>(dp, own[1], at.others(block.at.stage, 1));
            wgmma_commit();
        };

#pragma unroll
        for (int i = 0; i < SLICE / 2; i++) first[i] = second[i] = 0.0f;
        barrier_wait(at.own_full + place.stage, place.parity);
        bool begun = false; /* the products of this block */
        for (Block block = next(); block.there;) {
            if (!block.met) {
                wait_for(block);
                release(block);
                block = next();
                continue;
            }
            if (!begun) begin(block);
            wgmma_wait<0>();
            float p[1][SLICE / 8][4], ds[1][SLICE / 8][4];
#pragma unroll
            for (int i = 0; i < SLICE / 2; i++) p[0][i / 4][i % 4] = s[i], ds[0][i / 4][i % 4] = dp[i];
            differentiate<of>(p, ds, rows, at.stats + block.at.stage * STATS, row, block.t, work.factor);
            uint32_t p16[1][SLICE / 16][4], ds16[1][SLICE / 16][4];
            if (of == KEYS) round_weights(p16, p);
            round_weights(ds16, ds);
            wgmma_fence();
            multiply_weights<true>(first, ds16, at.others(block.at.stage, 0));
            if (of == KEYS) multiply_weights<true>(second, p16, at.others(block.at.stage, 1));
            wgmma_commit();
            const Block following = next();
            if (following.met) begin(following); /* while the weights are multiplied */
            wgmma_wait<0>();
            release(block);
            block = following, begun = following.met;
        }

        sync_consumer(consumer); /* nobody multiplies the item's own any more */
        stage_tile(own[0], warp_row, [&](int i) { return first[i]; }, work.scale, work.scale);
        if (of == KEYS) stage_tile(own[1], warp_row, [&](int i) { return second[i]; }, 1.0f, 1.0f);
        fence_async();
        sync_consumer(consumer);
        if (threadIdx.x % WARPGROUP == 0) {
            send<W>(gradient, own[0], it.b, of == QUERIES ? it.h : work.NH + it.h, own0);
            if (of == KEYS) send<W>(gradient, own[1], it.b, work.NH + work.NKV + it.h, own0);
            tile_store_commit();
            tile_store_wait_read<0>();
            barrier_arrive(at.own_empty + place.stage);
        }
        place.advance();
    }
}

template <Of of>
__global__ void __launch_bounds__(THREADS, 1)
    gradients_sm90(const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap dout,
                   const __grid_constant__ TensorMap gradient, Work work) {
    SHARED_TILES(bf16, all);
    const Places at(all);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(at.full + i, 1);
            barrier_init(at.empty + i, CONSUMERS * WARPGROUP / WARP);
        }
        for (int i = 0; i < ITEMS; i++) {
            barrier_init(at.own_full + i, 1);
            barrier_init(at.own_empty + i, CONSUMERS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_give<PRODUCER_REGISTERS>();
        if (warp_index() == 0) produce<of>(at, qkv, dout, work);
    } else {
        registers_take<CONSUMER_REGISTERS>();
        consume<of>(at, gradient, work, warp_index() / 4 - 1);
    }
}

}  // namespace

void OPERATOR(attention_backward_sm90)(act *dqkv, const act *dout, const act *qkv, const float *lse,
                                       const float *averages, const int32_t *starts, int B, int T, int NH, int NKV,
                                       const char *op) {
    if constexpr (sizeof(act) == sizeof(bf16)) {
        const int in = (NH + 2 * NKV) * W, width = NH * W;
        const TensorMap from = tensor_map((const bf16 *)qkv, T, in, in, SLICE, TILE_WIDTH, B);
        const TensorMap d = tensor_map((const bf16 *)dout, T, width, width, SLICE, TILE_WIDTH, B);
        const TensorMap to = tensor_map((const bf16 *)dqkv, T, in, in, SLICE, TILE_WIDTH, B);
        const float scale = score_scale(W);
        auto run = [&](int heads, auto kernel) {
            const int items = (int)(divide_up(T, ROWS) * B * heads);
            const Work work = {lse, averages, starts, B, T, NH, NKV, items, LOG2_E * scale, scale};
            launch(blocks_that_stay(items, BYTES, op), kernel, from, d, to, work);
        };
        run(NH, gradients_sm90<QUERIES>);
        run(NKV, gradients_sm90<KEYS>);
    }
}

#ifndef __CUDACC__
extern "C" void OPERATOR(emulate_attention_backward)(int blocks) { blocks_at_most = blocks; }
#endif

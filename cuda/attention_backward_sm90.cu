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
 * p and ds never leave registers: as Sums have them, rounded, they are left operands.
 *
 * Where heads are many, one kernel does both with 5 products for 7.  A block owns all gradients of a head of the keys,
 * and goes through its tiles of keys in order; a third warpgroup adds ds k to the gradients of queries, which wait in
 * memory as floats from one tile of keys to the next: in the order, and so with the bits, of the kernel that owns
 * queries.  For it ds goes through shared memory. */
#include "attention_sm90.cuh"

namespace {

/* JOINT: KEYS, and gradients of queries beside them. */
enum Of { QUERIES, KEYS, JOINT };
/* Of each query: lse, average, start; and the last of the starts, for its place a chunk of 16 bytes. */
enum { W = TILE_WIDTH, STAGES = 4, LAST_START = 3 * SLICE, STATS = LAST_START + 4 };
enum { SLOTS = 2 }; /* of ds on its way to the third warpgroup */

/* Threads and shared memory of a block. */
template <Of of>
struct Room {
    static constexpr int SLOT_TILES = of == JOINT ? SLOTS * CONSUMERS : 0;
    static constexpr int TILES = 2 * (STAGES + CONSUMERS * ITEMS) + SLOT_TILES;
    static constexpr int BARRIERS = 2 * STAGES + 2 * ITEMS + (of == JOINT ? 2 * SLOTS + 1 : 0);
    static constexpr int BYTES =
        TILES * TILE * (int)sizeof(bf16) + STAGES * STATS * (int)sizeof(float) + BARRIERS * (int)sizeof(uint64_t);
    static_assert(BYTES <= 227 << 10, "what a block may have");
    static constexpr int BLOCK = (of == JOINT ? 4 : 3) * WARPGROUP;
    /* Registers of a thread, all 65,536 of them where there are four warpgroups. */
    static constexpr int CONSUMER = of == JOINT ? 192 : CONSUMER_REGISTERS, ADDER = 88;
    static_assert(of != JOINT || PRODUCER_REGISTERS + ADDER + 2 * CONSUMER == 512, "what there is");
};

struct Work {
    const float *lse, *averages; /* (B, NH, T) */
    const int32_t *starts;
    act *dqkv;
    float *sums; /* of JOINT: gradients of queries so far, (blocks, group, tiles of 64, 64 * 64) */
    int B, T, NH, NKV, items;
    float factor, scale;

    __device__ int group() const { return NH / NKV; }
    /* Of this block, of the 64 queries of head h from t on. */
    __device__ float *sums_of(int h, int t) const {
        const int tiles = (T + SLICE - 1) / SLICE;
        return sums + (((int64_t)blockIdx.x * group() + h % group()) * tiles + t / SLICE) * SLICE * SLICE;
    }
};

/* The shared memory of a block.  Barriers: a stage of others has come, is free; own rows have come, their place is
 * free; ds has come, its slot is free; the own keys of an item are not needed any more. */
template <Of of>
struct Places {
    Shared<bf16> all;
    Shared<float> stats;
    Shared<uint64_t> full, empty, own_full, own_empty, ds_full, ds_empty, keys_done;
    __device__ Places(Shared<bf16> all_)
        : all(all_),
          stats(shared_cast<float>(all + Room<of>::TILES * TILE)),
          full(shared_cast<uint64_t>(stats + STAGES * STATS)),
          empty(full + STAGES),
          own_full(empty + STAGES),
          own_empty(own_full + ITEMS),
          ds_full(own_empty + ITEMS),
          ds_empty(ds_full + SLOTS),
          keys_done(ds_empty + SLOTS) {}
    __device__ Shared<bf16> ds(int slot, int consumer) const {
        return all + (Room<of>::TILES - Room<of>::SLOT_TILES + slot * CONSUMERS + consumer) * TILE;
    }
    __device__ Shared<bf16> others(int stage, int side) const { return all + (2 * stage + side) * TILE; }
    __device__ Shared<bf16> own(int place, int consumer, int side) const {
        return all + (2 * (STAGES + CONSUMERS * place + consumer) + side) * TILE;
    }
};

/* Numbers of the items of this block; of JOINT all tiles of a head, then those of another. */
template <Of of>
__device__ int next_item(const Work &work, int number) {
    if (of != JOINT) return number + (int)gridDim.x;
    const int heads = work.B * work.NKV, next = number + heads;
    if (next < work.items) return next;
    const int head = next - work.items + (int)gridDim.x;
    return head < heads ? head : work.items;
}

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
    const int T, t0;       /* of the item */
    int first, last_head, h, t;

    __device__ Others(const Work &work, const Item<of> &it) : T(work.T), t0(it.t0) {
        starts = work.starts ? work.starts + (int64_t)it.b * T : NULL;
        if (of == QUERIES) {
            h = last_head = it.h / work.group();
            first = least_start(starts ? starts + t0 : NULL, own_end() - t0) / SLICE * SLICE;
        } else {
            h = it.h * work.group(), last_head = h + work.group() - 1;
            first = t0;
        }
        t = first;
        settle();
    }
    __device__ int own_end() const { return t0 + ROWS < T ? t0 + ROWS : T; }
    __device__ int end() const { return of == QUERIES ? own_end() : T; }
    __device__ bool more() const { return h <= last_head; }
    __device__ void next() {
        t += SLICE;
        settle();
    }

    /* On to a block that there is: of queries, one that sees a key. */
    __device__ void settle() {
        for (; h <= last_head; h++, t = of == QUERIES ? first : t0)
            for (; t < end(); t += SLICE)
                if (of == QUERIES || !starts || least_start(starts + t, T - t < SLICE ? T - t : SLICE) < own_end())
                    return;
    }
};

/* ---- the producer, a warp ---- */

/* The greatest of all lanes. */
__device__ inline int last_of_warp(int x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const int other = shuffle_xor(x, lanes);
        x = other > x ? other : x;
    }
    return x;
}

/* Of 64 queries: the logarithm of the sum of weights, to the base of 2, dout.out, and where their keys start. */
__device__ inline void fetch_stats(Shared<float> to, const Work &work, int b, int h, int t0) {
    const Shared<int32_t> starts = shared_cast<int32_t>(to + 2 * SLICE);
    int last = 0;
    for (int i = lane_index(); i < SLICE; i += WARP) {
        const int64_t at = ((int64_t)b * work.NH + h) * work.T + t0 + i;
        const bool there = t0 + i < work.T;
        const int start = there && work.starts ? work.starts[(int64_t)b * work.T + t0 + i] : 0;
        to[i] = there ? work.lse[at] * LOG2_E : 0.0f;
        to[SLICE + i] = there ? work.averages[at] : 0.0f;
        starts[i] = start;
        last = start > last ? start : last;
    }
    last = last_of_warp(last);
    if (lane_index() == 0) shared_cast<int32_t>(to)[LAST_START] = last;
}

template <Of of>
__device__ void produce(const Places<of> &at, const TensorMap &qkv, const TensorMap &dout, const Work &work) {
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
    for (int number = (int)blockIdx.x; number < work.items; number = next_item<of>(work, number)) {
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
            if (of != QUERIES) fetch_stats(at.stats + ring.stage * STATS, work, it.b, walk.h, walk.t);
            __syncwarp();
            if (mine) {
                barrier_expect(full, 2 * bytes);
                if (of == QUERIES) fetch_keys(a, b, full, it.b, walk.h, walk.t);
                else fetch_queries(a, b, full, it.b, walk.h, walk.t);
                /* What all blocks keep there is as much as the L2 holds. */
                if (of == JOINT && it.t0 > 0) prefetch_l2(work.sums_of(walk.h, walk.t), TILE * sizeof(float));
            }
            ring.advance();
        }
    }
}

/* ---- the consumers ---- */

/* A block of others: where it lies, and whether any row of a consumer's own meets it. */
struct Block {
    Ring<STAGES> at;
    int t; /* -1: there is none */
    bool met;
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
    __device__ int last_start() const { return start[0] > start[1] ? start[0] : start[1]; }
};

/* s = scores and dp = dout.v of a block: in their place the weights p and the gradients ds of the scores.  `row`: this
 * lane's upper row, `column`: the first of the block.  whole: all queries see all keys. */
template <Of of, bool whole>
__device__ void differentiate(float (&s)[1][SLICE / 8][4], float (&dp)[1][SLICE / 8][4], const RowStats &rows,
                              Shared<float> columns, int row, int column, float factor) {
    const Shared<int32_t> starts = shared_cast<int32_t>(columns + 2 * SLICE);
#pragma unroll
    for (int i = 0; i < SLICE / 4; i++) { /* of a lane's columns */
        const int n = i / 2, c = column_of(n, i);
        const float lse = of != QUERIES ? columns[c] : 0.0f, average = of != QUERIES ? columns[SLICE + c] : 0.0f;
        const int start = of != QUERIES && !whole ? starts[c] : 0;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int j = 2 * r + i % 2, mine = row + 8 * r, other = column + c;
            const int query = of == QUERIES ? mine : other, key = of == QUERIES ? other : mine;
            const bool seen = whole || (key <= query && key >= (of == QUERIES ? rows.start[r] : start));
            const float weight = exp2_fast(fmaf(s[0][n][j], factor, of == QUERIES ? -rows.lse[r] : -lse));
            const float more = dp[0][n][j] - (of == QUERIES ? rows.average[r] : average);
            s[0][n][j] = seen ? weight : 0.0f;
            dp[0][n][j] = seen ? weight * more : 0.0f;
        }
    }
}

template <Of of>
__device__ void consume(const Places<of> &at, const TensorMap &gradient, const Work &work, int consumer) {
    constexpr bool DP_LATER = of == JOINT; /* 192 registers do not hold it beside the products of weights */
    const int warp_row = warp_index() % 4 * 16, lane_row = lane_index() / 4;
    Ring<STAGES> ring;
    Ring<ITEMS> place;
    Sums<SLICE> s, dp, first, second; /* of dq; or of dk and dv */
    for (int number = (int)blockIdx.x; number < work.items; number = next_item<of>(work, number)) {
        const Item<of> it(work, number);
        const int own0 = it.t0 + consumer * SLICE, own_end = own0 + SLICE < work.T ? own0 + SLICE : work.T;
        const int row = own0 + warp_row + lane_row;
        const int own_place = of_warp(place.stage), mine = of_warp(consumer);
        const Shared<bf16> own[2] = {at.own(own_place, mine, 0), at.own(own_place, mine, 1)};
        const RowStats rows(work, it.b, of == QUERIES ? it.h : 0, of == QUERIES ? row : work.T);
        const int last_start = of == QUERIES ? last_of_warp(rows.last_start()) : 0;
        Others<of> walk(work, it);

        auto next = [&] {
            if (!walk.more()) return Block{ring, -1, false};
            const bool met = of == QUERIES ? walk.t < own_end : walk.t + SLICE > own0;
            const Block block = {ring, walk.t, met && own0 < own_end};
            ring.advance(), walk.next();
            return block;
        };
        auto wait_for = [&](const Block &block) { barrier_wait(at.full + block.at.stage, block.at.parity); };
        /* Whether the queries of this warp and a block, or of both, see all of the keys. */
        auto sees_all = [&](const Block &block) {
            if (of == QUERIES) return last_start <= block.t && block.t + SLICE <= own0 + warp_row;
            return shared_cast<int32_t>(at.stats + block.at.stage * STATS)[LAST_START] <= own0 &&
                   block.t >= own0 + SLICE;
        };
        /* Once for each warp, and only of what has come: the stage would be let go for what lay there before. */
        auto release = [&](const Block &block) {
            if (lane_index() == 0) barrier_arrive(at.empty + block.at.stage);
        };
        /* ds of a block, or none, to the third warpgroup: a row is a key.  Slots go round twice as fast as stages. */
        auto hand_on = [&](const Block &block, const uint32_t(*ds)[4]) {
            static_assert((int)STAGES == 2 * (int)SLOTS && (int)SLOTS == 2, "so a stage tells slot and phase");
            const int slot = block.at.stage % SLOTS, parity = block.at.stage / SLOTS;
            barrier_wait(at.ds_empty + slot, (uint32_t)parity ^ 1);
            if (ds) stage_rounded(at.ds(slot, consumer), warp_row, ds);
            fence_async();
            __syncwarp();
            if (lane_index() == 0) barrier_arrive(at.ds_full + slot);
        };
        /* The products of a block: scores, and dp. */
        auto begin = [&](const Block &block) {
            wait_for(block);
            wgmma_fence();
            const int stage = of_warp(block.at.stage);
            multiply_slices<W>(s, own[0], at.others(stage, 0));
            if (!DP_LATER) multiply_slices<W>(dp, own[1], at.others(stage, 1));
            wgmma_commit();
        };

#pragma unroll
        for (int i = 0; i < SLICE / 2; i++) first[i] = second[i] = 0.0f;
        barrier_wait(at.own_full + place.stage, place.parity);
        bool begun = false; /* the products of this block */
        for (Block block = next(); block.t >= 0;) {
            if (!block.met) {
                wait_for(block);
                release(block);
                if (of == JOINT) hand_on(block, NULL);
                block = next();
                continue;
            }
            const int stage = of_warp(block.at.stage);
            if (!begun) begin(block);
            if (DP_LATER) {
                wgmma_fence();
                multiply_slices<W>(dp, own[1], at.others(stage, 1));
                wgmma_commit();
            }
            wgmma_wait<0>();
            float p[1][SLICE / 8][4], ds[1][SLICE / 8][4];
#pragma unroll
            for (int i = 0; i < SLICE / 2; i++) p[0][i / 4][i % 4] = s[i], ds[0][i / 4][i % 4] = dp[i];
            const Shared<float> stats = at.stats + block.at.stage * STATS;
            if (sees_all(block)) differentiate<of, true>(p, ds, rows, stats, row, block.t, work.factor);
            else differentiate<of, false>(p, ds, rows, stats, row, block.t, work.factor);
            uint32_t p16[1][SLICE / 16][4], ds16[1][SLICE / 16][4];
            if (of != QUERIES) round_weights(p16, p);
            round_weights(ds16, ds);
            if (of == JOINT) hand_on(block, ds16[0]);
            wgmma_fence();
            multiply_weights<true>(first, ds16, at.others(stage, 0));
            if (of != QUERIES) multiply_weights<true>(second, p16, at.others(stage, 1));
            wgmma_commit();
            const Block following = next();
            if (following.met) begin(following); /* while the weights are multiplied */
            wgmma_wait<0>();
            release(block);
            block = following, begun = following.met;
        }

        if (of == JOINT) barrier_wait(at.keys_done, (uint32_t)place.stage); /* which goes 0, 1, 0 .. as its phases do */
        sync_consumer(consumer); /* nobody multiplies the item's own any more */
        stage_tile(own[0], warp_row, [&](int i) { return first[i]; }, work.scale, work.scale);
        if (of != QUERIES) stage_tile(own[1], warp_row, [&](int i) { return second[i]; }, 1.0f, 1.0f);
        fence_async();
        sync_consumer(consumer);
        if (threadIdx.x % WARPGROUP == 0) {
            const Item<of> done(work, from_here(number)); /* said again: registers are few */
            send<W>(gradient, own[0], done.b, of == QUERIES ? done.h : work.NH + done.h, done.t0 + consumer * SLICE);
            if (of != QUERIES)
                send<W>(gradient, own[1], done.b, work.NH + work.NKV + done.h, done.t0 + consumer * SLICE);
            tile_store_commit();
            tile_store_wait_read<0>();
            barrier_arrive(at.own_empty + place.stage);
        }
        place.advance();
    }
}

/* ---- gradients of queries, of JOINT: a warpgroup ---- */

/* As each thread has them: sums (64, 64) of a tile of queries, and how they leave. */
struct QuerySums {
    Sums<SLICE> of;

    __device__ void load(const float *from, bool fresh) {
        from += from_here((int)threadIdx.x) % WARPGROUP * 4;
        if (fresh) {
#pragma unroll
            for (int i = 0; i < SLICE / 2; i++) of[i] = 0.0f;
            return;
        }
#pragma unroll
        for (int i = 0; i < SLICE / 2; i += 4) {
            const Pack<float, 4> four = load_all<4>(from + i * WARPGROUP);
#pragma unroll
            for (int j = 0; j < 4; j++) of[i + j] = four[j];
        }
    }
    __device__ void keep(float *to) {
        to += from_here((int)threadIdx.x) % WARPGROUP * 4;
#pragma unroll
        for (int i = 0; i < SLICE / 2; i += 4) {
            Pack<float, 4> four;
#pragma unroll
            for (int j = 0; j < 4; j++) four.x[j] = of[i + j];
            store_all(to + i * WARPGROUP, four);
        }
    }
    /* Row 0 of the tile is at `to`, of rows that there are. */
    __device__ void write(act *to, int64_t stride, int rows, float scale) {
        const int t = from_here((int)threadIdx.x) % WARPGROUP, row = t / WARP * 16 + t % WARP / 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (row + 8 * r >= rows) continue;
            act *x = to + (row + 8 * r) * stride;
#pragma unroll
            for (int n = 0; n < SLICE / 8; n++)
                store_two<true>(x + column_of(n, 0), of[4 * n + 2 * r] * scale, of[4 * n + 2 * r + 1] * scale, 2);
        }
    }
};

/* sums += A^T B, rows of both tiles being keys */
__device__ inline void multiply_columns_of(Sums<SLICE> &sums, Shared<bf16> A, Shared<bf16> B) {
    const uint64_t a = columns_of(A), b = columns_of(B);
#pragma unroll
    for (int k = 0; k < SLICE / 16; k++)
        wgmma<true, true, true>(sums, operand_behind(a, k * 2 * LINES), operand_behind(b, k * 2 * LINES));
}

__device__ inline void add_queries(const Places<JOINT> &at, const Work &work) {
    const int64_t width = (int64_t)(work.NH + 2 * work.NKV) * W;
    Ring<ITEMS> place;
    Ring<SLOTS> slot;
    QuerySums dq;
    for (int number = (int)blockIdx.x; number < work.items; number = next_item<JOINT>(work, number)) {
        const Item<JOINT> it(work, number);
        barrier_wait(at.own_full + place.stage, place.parity);
        for (Others<JOINT> walk(work, it); walk.more(); walk.next()) {
            const int rows = work.T - walk.t < SLICE ? work.T - walk.t : SLICE;
            const int first_key = least_start(walk.starts ? walk.starts + walk.t : NULL, rows);
            float *sums = work.sums_of(walk.h, walk.t);
            dq.load(sums, it.t0 <= first_key);
            barrier_wait(at.ds_full + slot.stage, slot.parity);
            const int second = it.t0 + SLICE; /* key of the second consumer, whose ds may not be there */
            wgmma_fence();
            multiply_columns_of(dq.of, at.ds(slot.stage, 0), at.own(place.stage, 0, 0));
            wgmma_commit();
            if (second < walk.t + SLICE && second < work.T) {
                wgmma_fence();
                multiply_columns_of(dq.of, at.ds(slot.stage, 1), at.own(place.stage, 1, 0));
                wgmma_commit();
            }
            wgmma_wait<0>();
            if (lane_index() == 0) barrier_arrive(at.ds_empty + slot.stage);
            slot.advance();
            if (walk.t >= it.t0 + ROWS) {
                dq.keep(sums);
            } else { /* no later key is seen */
                act *to = work.dqkv + ((int64_t)it.b * work.T + walk.t) * width + walk.h * W;
                dq.write(to, width, rows, work.scale);
            }
        }
        if (lane_index() == 0) barrier_arrive(at.keys_done);
        place.advance();
    }
}

template <Of of>
__global__ void __launch_bounds__(Room<of>::BLOCK, 1)
    gradients_sm90(const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap dout,
                   const __grid_constant__ TensorMap gradient, Work work) {
    SHARED_TILES(bf16, all);
    const Places<of> at(all);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(at.full + i, 1);
            barrier_init(at.empty + i, CONSUMERS * WARPGROUP / WARP);
        }
        for (int i = 0; i < ITEMS; i++) {
            barrier_init(at.own_full + i, 1);
            barrier_init(at.own_empty + i, CONSUMERS);
        }
        for (int i = 0; of == JOINT && i < SLOTS; i++) {
            barrier_init(at.ds_full + i, CONSUMERS * WARPGROUP / WARP);
            barrier_init(at.ds_empty + i, WARPGROUP / WARP);
        }
        if (of == JOINT) barrier_init(at.keys_done, WARPGROUP / WARP);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_give<PRODUCER_REGISTERS>();
        if (warp_index() == 0) produce<of>(at, qkv, dout, work);
    } else if (of == JOINT && threadIdx.x >= 3 * WARPGROUP) {
        if constexpr (of == JOINT) {
            registers_give<Room<of>::ADDER>();
            add_queries(at, work);
        }
    } else {
        registers_take<Room<of>::CONSUMER>();
        consume<of>(at, gradient, work, warp_index() / 4 - 1);
    }
}

/* Blocks of JOINT; 0: there are so few heads, or sums of so many bytes, that two kernels are better. */
enum { MOST_SUMS = 256 << 20 };
int only_joint = -1; /* -1: by the sizes.  For the tests. */
int joint_blocks(int B, int T, int NH, int NKV) {
    const int64_t heads = (int64_t)B * NKV, most = blocks_at_most(), turns = divide_up(heads, most);
    const int64_t blocks = heads < most ? heads : most;
    const int64_t bytes = blocks * (NH / NKV) * divide_up(T, SLICE) * SLICE * SLICE * (int64_t)sizeof(float);
    const bool busy = heads * 7 >= turns * most * 5; /* in 5 products what two kernels do in 7 */
    return (only_joint < 0 ? busy && bytes <= MOST_SUMS : only_joint > 0) ? (int)blocks : 0;
}

}  // namespace

size_t OPERATOR(attention_backward_sm90_room)(int B, int T, int NH, int NKV) {
    return (size_t)joint_blocks(B, T, NH, NKV) * (NH / NKV) * divide_up(T, SLICE) * SLICE * SLICE * sizeof(float);
}

void OPERATOR(attention_backward_sm90)(act *dqkv, const act *dout, const act *qkv, const float *lse,
                                       const float *averages, float *sums, const int32_t *starts, int B, int T, int NH,
                                       int NKV, const char *op) {
    if constexpr (sizeof(act) == sizeof(bf16)) {
        const int in = (NH + 2 * NKV) * W, width = NH * W;
        const TensorMap from = tensor_map((const bf16 *)qkv, T, in, in, SLICE, TILE_WIDTH, B);
        const TensorMap d = tensor_map((const bf16 *)dout, T, width, width, SLICE, TILE_WIDTH, B);
        const TensorMap to = tensor_map((const bf16 *)dqkv, T, in, in, SLICE, TILE_WIDTH, B);
        const float scale = score_scale(W);
        const int tiles = (int)divide_up(T, ROWS) * B, joint = joint_blocks(B, T, NH, NKV);
        auto run = [&](int heads, int blocks, int threads, size_t bytes, auto kernel) {
            const Work work = {lse, averages, starts, dqkv, sums, B, T, NH, NKV, tiles * heads, LOG2_E * scale, scale};
            Grid grid(blocks ? blocks : blocks_for(tiles * heads), threads, bytes, op);
            grid.sm90 = true;
            launch(grid, kernel, from, d, to, work);
        };
        if (joint) {
            run(NKV, joint, Room<JOINT>::BLOCK, Room<JOINT>::BYTES, gradients_sm90<JOINT>);
            return;
        }
        run(NH, 0, THREADS, Room<QUERIES>::BYTES, gradients_sm90<QUERIES>);
        run(NKV, 0, THREADS, Room<KEYS>::BYTES, gradients_sm90<KEYS>);
    }
}

#ifndef __CUDACC__
extern "C" void OPERATOR(emulate_attention_backward)(int blocks, int joint) {
    emulated_blocks = blocks, only_joint = joint;
}
#endif

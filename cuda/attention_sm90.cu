/* attention_sm90.cu -- causal attention over a whole batch on Hopper, heads of 64 or 128 values in bf16: TMA, wgmma,
 * blocks that stay.
 *
 * A block has three warpgroups and goes from item to item, 128 queries of a head each.  A warp of the first group, the
 * producer, asks TMA for queries, two items' at a time, and for keys and values, in a ring of stages; the other two,
 * the consumers, have 64 queries each.  While a consumer weighs the scores of one block of keys, the tensor cores have
 * those of the next, or work for the other consumer.  Weights go from product to product in registers; what comes out
 * takes the place of the queries, and TMA stores it while the next item is under way.
 *
 * Runs, blocks of keys and order of sums are attention.cu's, see csrc/ops.def: what a block of keys adds is one
 * sequence of wgmma. */
#include "attention_sm90.cuh"

namespace {

template <int W>
struct Sizes {
    static constexpr int COLUMNS = W / TILE_WIDTH, SIDE = COLUMNS * TILE; /* of 64 rows of a head: tiles, values */
    static constexpr int STAGES = W > 64 ? 3 : 4;
    /* The next scores are on their way while these are weighed; else while values are multiplied, in the same
     * registers: more there are not. */
    static constexpr bool AHEAD = W <= 64;
    static constexpr int BARRIERS = 3 * STAGES + 2 * ITEMS + 1;
    static constexpr size_t BYTES =
        (size_t)(2 * STAGES + CONSUMERS * ITEMS) * SIDE * sizeof(bf16) + BARRIERS * sizeof(uint64_t);
    static_assert(BYTES <= 227 << 10, "what a block may have");
};

/* The shared memory of a block.  Barriers: the keys or values of a stage have come; a stage is free; queries have come;
 * their place is free; values have come whose last rows are to be cleared. */
template <int W>
struct Places {
    using S = Sizes<W>;
    Shared<bf16> all;
    Shared<uint64_t> keys_full, values_full, empty, queries_full, queries_empty, landed;
    __device__ Places(Shared<bf16> all_)
        : all(all_),
          keys_full(shared_cast<uint64_t>(all + (2 * S::STAGES + CONSUMERS * ITEMS) * S::SIDE)),
          values_full(keys_full + S::STAGES),
          empty(values_full + S::STAGES),
          queries_full(empty + S::STAGES),
          queries_empty(queries_full + ITEMS),
          landed(queries_empty + ITEMS) {}
    __device__ Shared<bf16> keys(int stage) const { return all + 2 * stage * S::SIDE; }
    __device__ Shared<bf16> values(int stage) const { return keys(stage) + S::SIDE; }
    __device__ Shared<bf16> queries(int place, int consumer) const {
        return all + (2 * S::STAGES + CONSUMERS * place + consumer) * S::SIDE;
    }
};

struct Work {
    float *lse;
    const int32_t *starts;
    int B, T, NH, NKV, items;
    float factor;
};

/* The longest come first. */
struct Item {
    int b, h, t0;
    __device__ Item(const Work &work, int number) {
        const int heads = work.B * work.NH, head = number % heads, tiles = work.items / heads;
        b = head / work.NH, h = head % work.NH, t0 = (tiles - 1 - number / heads) * ROWS;
    }
    __device__ int key_head(const Work &work) const { return work.NH + h / (work.NH / work.NKV); }
    __device__ Queries queries(const Work &work) const {
        Queries x;
        x.q = NULL, x.stride = 0, x.width = 0; /* TMA's */
        x.starts = work.starts ? work.starts + (int64_t)b * work.T + t0 : NULL;
        x.first = t0, x.count = work.T - t0 < ROWS ? work.T - t0 : ROWS, x.factor = work.factor;
        return x;
    }
};

/* ---- the producer, a warp ---- */

/* Of values, those that no query of the run sees: 0 * NaN would be NaN. */
template <int W>
__device__ void clear_rows(Shared<bf16> values, int first) {
    for (int i = first * (TILE_WIDTH / CHUNK) + lane_index(); i < SLICE * (TILE_WIDTH / CHUNK); i += WARP)
        for (int c = 0; c < Sizes<W>::COLUMNS; c++)
            shared_cast<uint4>(values + (c * TILE + i * CHUNK))[0] = {0, 0, 0, 0}; /* a row's chunks in any order */
}

template <int W>
__device__ void produce(const Places<W> &at, const TensorMap &qkv, const Work &work) {
    constexpr int bytes = Sizes<W>::SIDE * (int)sizeof(bf16);
    const bool mine = elected();
    Ring<Sizes<W>::STAGES> ring;
    Ring<ITEMS> place;
    uint32_t landed = 0;
    for (int number = (int)blockIdx.x; number < work.items; number += (int)gridDim.x) {
        const Item it(work, number);
        const Queries x = it.queries(work);
        if (mine) {
            const Shared<uint64_t> full = at.queries_full + place.stage;
            barrier_wait(at.queries_empty + place.stage, place.parity ^ 1);
            barrier_expect(full, CONSUMERS * bytes);
            for (int i = 0; i < CONSUMERS; i++)
                fetch<W>(at.queries(place.stage, i), qkv, full, it.b, it.h, it.t0 + i * SLICE);
        }
        place.advance();
        Walk walk(x);
        do {
            const int here = walk.keys(x), stage = ring.stage;
            if (mine) {
                const Shared<uint64_t> values = here < KEY_BLOCK ? at.landed : at.values_full + stage;
                barrier_wait(at.empty + stage, ring.parity ^ 1);
                barrier_expect(at.keys_full + stage, bytes);
                fetch<W>(at.keys(stage), qkv, at.keys_full + stage, it.b, it.key_head(work), walk.k0);
                barrier_expect(values, bytes);
                fetch<W>(at.values(stage), qkv, values, it.b, it.key_head(work) + work.NKV, walk.k0);
            }
            if (here < KEY_BLOCK) {
                barrier_wait(at.landed, landed);
                landed ^= 1;
                clear_rows<W>(at.values(stage), here);
                fence_async();
                __syncwarp();
                if (mine) barrier_arrive(at.values_full + stage);
            }
            ring.advance();
        } while (walk.next(x));
    }
}

/* ---- the consumers ---- */

/* A block of keys, the stage where it lies, and of a consumer's queries the first and last that are in its run. */
template <int STAGES>
struct Block {
    Ring<STAGES> at;
    int k0, first, last;
    bool there, seen; /* by one of them */
};

/* The blocks of keys of an item. */
template <int W>
struct Blocks {
    using Found = Block<Sizes<W>::STAGES>;
    const Places<W> &at;
    Ring<Sizes<W>::STAGES> &ring;
    const Queries &x;
    int row0, end; /* the consumer's queries */
    Walk walk;
    bool more = true;

    __device__ Blocks(const Places<W> &at_, Ring<Sizes<W>::STAGES> &ring_, const Queries &x_, int row0_)
        : at(at_),
          ring(ring_),
          x(x_),
          row0(row0_),
          end(row0_ + SLICE < x_.count ? row0_ + SLICE : x_.count),
          walk(x_) {}

    __device__ Found next() {
        if (!more) return {ring, 0, 0, 0, false, false};
        const int first = walk.run.first > row0 ? walk.run.first : row0;
        const int last = walk.run.last < end - 1 ? walk.run.last : end - 1;
        const Found found = {ring, walk.k0, first, last, true, first <= last && x.first + last >= walk.k0};
        ring.advance();
        more = walk.next(x);
        return found;
    }
    __device__ void wait_for_keys(const Found &block) const {
        barrier_wait(at.keys_full + block.at.stage, block.at.parity);
    }
    /* Once for each warp: nothing orders the warps of a warpgroup.  Only of keys that have come: the stage would be let
     * go for the block that lay there before. */
    __device__ void release(const Found &block) const {
        if (lane_index() == 0) barrier_arrive(at.empty + block.at.stage);
    }
};

/* What a consumer knows of its queries so far; of its warp's 16 a lane has two rows, as in attention.cuh. */
template <int W>
struct Slice {
    Softmax<1> softmax = {{{-INFINITY, -INFINITY}}, {{0.0f, 0.0f}}};
    float sums[W / 8][4] = {};
    int row; /* of the tile: the first of this warp */

    __device__ int row_of(int r) const { return row + 8 * r + lane_index() / 4; }

    template <class Found>
    __device__ void begin_block(const Places<W> &at, Shared<bf16> queries, Sums<SLICE> &s, const Found &block) {
        if (!block.seen) return;
        barrier_wait(at.keys_full + block.at.stage, block.at.parity);
        wgmma_fence();
        multiply_slices<W>(s, queries, at.keys(block.at.stage));
        wgmma_commit();
    }

    /* Weigh the scores s of a block and add its values; meanwhile the scores of the next, which may be the same Sums
     * where they are not AHEAD. */
    template <class Found>
    __device__ void add_block(const Places<W> &at, Shared<bf16> queries, Sums<SLICE> &s, const Found &block,
                              Sums<SLICE> &s_next, const Found &next, const Queries &x) {
        if (Sizes<W>::AHEAD) begin_block(at, queries, s_next, next);
        float score[1][KEY_BLOCK / 8][4], keep[1][2];
        int seen[1][2];
#pragma unroll
        for (int i = 0; i < KEY_BLOCK / 2; i++) score[0][i / 4][i % 4] = s[i];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int mine = row_of(r);
            seen[0][r] = mine >= block.first && mine <= block.last ? x.first + mine + 1 - block.k0 : 0;
        }
        const bool whole = block.first <= row && row + 15 <= block.last && x.first + row + 1 - block.k0 >= KEY_BLOCK;
        if (!whole) hide(score, seen);
        weigh(softmax, keep, score, x.factor);
        uint32_t p[1][KEY_BLOCK / 16][4];
        round_weights(p, score);
        if (!Sizes<W>::AHEAD) begin_block(at, queries, s_next, next);
        barrier_wait(at.values_full + block.at.stage, block.at.parity);
#pragma unroll
        for (int column = 0; column < Sizes<W>::COLUMNS; column++) {
            Sums<SLICE> c;
            wgmma_fence();
            multiply_weights<false>(c, p, at.values(block.at.stage) + column * TILE);
            wgmma_commit();
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < SLICE / 2; i++) { /* a row of another run keeps what it has */
                float &sum = sums[column * TILE_WIDTH / 8 + i / 4][i % 4];
                if (seen[0][i % 4 / 2] > 0) sum = fmaf(sum, keep[0][i % 4 / 2], c[i]);
            }
        }
    }

    /* The outputs, in the place of the queries. */
    __device__ void stage(Shared<bf16> to) const {
        const float upper = 1.0f / softmax.sum[0][0], lower = 1.0f / softmax.sum[0][1];
#pragma unroll
        for (int c = 0; c < Sizes<W>::COLUMNS; c++)
            stage_tile(
                to + c * TILE, row % SLICE, [&](int i) { return sums[c * TILE_WIDTH / 8 + i / 4][i % 4]; }, upper,
                lower);
    }
};

template <int W>
__device__ void consume(const Places<W> &at, const TensorMap &out, const Work &work, int consumer) {
    Ring<Sizes<W>::STAGES> ring;
    Ring<ITEMS> place;
    Sums<SLICE> a, b; /* the scores of this block of keys and of the next, in turns */
    for (int number = (int)blockIdx.x; number < work.items; number += (int)gridDim.x) {
        const Item it(work, number);
        const Queries x = it.queries(work);
        const Shared<bf16> queries = at.queries(place.stage, consumer);
        Slice<W> slice;
        slice.row = consumer * SLICE + warp_index() % 4 * 16;
        Blocks<W> blocks(at, ring, x, consumer * SLICE);
        /* Those that a consumer sees follow each other. */
        auto block = blocks.next();
        auto skip = [&] {
            blocks.wait_for_keys(block);
            blocks.release(block);
            block = blocks.next();
        };
        auto add = [&](Sums<SLICE> &s, Sums<SLICE> &s_next) {
            const auto next = blocks.next();
            slice.add_block(at, queries, s, block, s_next, next, x);
            blocks.release(block);
            block = next;
        };
        while (block.there && !block.seen) skip();
        barrier_wait(at.queries_full + place.stage, place.parity);
        slice.begin_block(at, queries, a, block);
        wgmma_wait<0>();
        while (block.seen) {
            add(a, Sizes<W>::AHEAD ? b : a);
            if (Sizes<W>::AHEAD && block.seen) add(b, a);
        }
        while (block.there) skip();
        sync_consumer(consumer); /* nobody multiplies the queries any more */
        slice.stage(queries);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = slice.row_of(r);
            if (row < x.count && lane_index() % 4 == 0)
                work.lse[((int64_t)it.b * work.NH + it.h) * work.T + it.t0 + row] =
                    LN_2 * slice.softmax.max[0][r] + logf(slice.softmax.sum[0][r]);
        }
        fence_async();
        sync_consumer(consumer);
        if (threadIdx.x % WARPGROUP == 0) {
            send<W>(out, queries, it.b, it.h, it.t0 + consumer * SLICE);
            tile_store_commit();
            tile_store_wait_read<0>();
            barrier_arrive(at.queries_empty + place.stage);
        }
        place.advance();
    }
}

template <int W>
__global__ void __launch_bounds__(THREADS, 1)
    attention_sm90(const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap out, Work work) {
    SHARED_TILES(bf16, all);
    const Places<W> at(all);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Sizes<W>::STAGES; i++) {
            barrier_init(at.keys_full + i, 1);
            barrier_init(at.values_full + i, 1);
            barrier_init(at.empty + i, CONSUMERS * WARPGROUP / WARP);
        }
        for (int i = 0; i < ITEMS; i++) {
            barrier_init(at.queries_full + i, 1);
            barrier_init(at.queries_empty + i, CONSUMERS);
        }
        barrier_init(at.landed, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_give<PRODUCER_REGISTERS>();
        if (warp_index() == 0) produce<W>(at, qkv, work);
    } else {
        registers_take<CONSUMER_REGISTERS>();
        consume<W>(at, out, work, warp_index() / 4 - 1);
    }
}

template <int W>
void run(const act *out, const act *qkv, const Work &work, const char *op) {
    const int in = (work.NH + 2 * work.NKV) * W, width = work.NH * W;
    const TensorMap from = tensor_map((const bf16 *)qkv, work.T, in, in, SLICE, TILE_WIDTH, work.B);
    const TensorMap to = tensor_map((const bf16 *)out, work.T, width, width, SLICE, TILE_WIDTH, work.B);
    launch(blocks_that_stay(work.items, Sizes<W>::BYTES, op), attention_sm90<W>, from, to, work);
}

}  // namespace

void OPERATOR(attention_forward_sm90)(act *out, float *lse, const act *qkv, const int32_t *starts, int B, int T, int NH,
                                      int NKV, int HS, const char *op) {
    if constexpr (sizeof(act) == sizeof(bf16)) {
        const int64_t items = divide_up(T, ROWS) * B * NH;
        const Work work = {lse, starts, B, T, NH, NKV, (int)items, LOG2_E * score_scale(HS)};
        if (HS == 64) run<64>(out, qkv, work, op);
        else run<128>(out, qkv, work, op);
    }
}

#ifndef __CUDACC__
extern "C" void OPERATOR(emulate_attention)(int blocks) { blocks_at_most = blocks; }
#endif

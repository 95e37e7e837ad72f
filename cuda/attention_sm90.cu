/* attention_sm90.cu -- causal attention over a whole batch on Hopper, heads of 64 or 128 values in bf16: TMA, wgmma,
 * blocks that stay.
 *
 * A block has three warpgroups and goes from item to item, 128 queries of a head each.  A warp of the first group, the
 * producer, asks TMA for queries, two items' at a time, and for keys and values, in a ring of stages; the other two,
 * the consumers, have 64 queries each.  While a consumer weighs the scores of one block of keys, the tensor cores have
 * the values of the block before and, where registers are enough, the scores of the next.  Weights go from product to
 * product in registers; what comes out takes the place of the queries, TMA stores it while the next item is under way,
 * and nobody waits for that.
 *
 * Runs, blocks of keys and order of sums are attention.cu's, see csrc/ops.def: what a block of keys adds is one
 * sequence of wgmma. */
#include "attention_sm90.cuh"

namespace {

template <int W>
struct Sizes {
    static constexpr int COLUMNS = W / TILE_WIDTH, SIDE = COLUMNS * TILE; /* of 64 rows of a head: tiles, values */
    /* A consumer has up to three: where values are multiplied, where it is, and whose scores come.  3 would do. */
    static constexpr int STAGES = W > 64 ? 4 : 6;
    /* The next scores are on their way while these are weighed; else behind, in the same registers: more there are not.
     */
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
    __device__ Shared<bf16> queries(int i) const { return all + (2 * S::STAGES + i) * S::SIDE; }
};

struct Work {
    float *lse;
    const int32_t *starts;
    int B, T, NH, NKV, tiles, items;
    float factor;
};

/* So many heads go through their tiles together, the longest first: their keys and values, 11 MB at T = 1024, are in L2
 * from one tile to the next.  Of a third of the SMs each block has long tiles as well as short ones. */
enum { SECTION = SMS / 3 };

struct Item {
    int b, h, t0;
    __device__ Item(const Work &work, int number) {
        const int before = number / (SECTION * work.tiles) * SECTION, left = work.B * work.NH - before;
        const int heads = left < SECTION ? left : SECTION, i = number - before * work.tiles, head = before + i % heads;
        b = head / work.NH, h = head % work.NH, t0 = (work.tiles - 1 - i / heads) * ROWS;
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
                fetch<W>(at.queries(CONSUMERS * place.stage + i), qkv, full, it.b, it.h, it.t0 + i * SLICE);
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

/* A block of keys: the stage where it lies, and how many of its keys are seen by this lane's two queries, by all of the
 * warp's, and by any of the consumer's; 0 or less: none is. */
template <int W>
struct Block {
    Ring<Sizes<W>::STAGES> at;
    int mine[2], all, any;
    static constexpr int NOWHERE = INT32_MIN; /* in `any` */
    __device__ bool there() const { return any != NOWHERE; }
    __device__ bool seen() const { return any > 0; }
};

/* The blocks of keys of an item. */
template <int W>
struct Blocks {
    const Places<W> &at;
    Ring<Sizes<W>::STAGES> &ring;
    const Queries &x;
    const int row; /* of the tile: the first of this warp */
    Walk walk;
    bool more = true;
    int mine[2], all, any; /* as in a block, but from the beginning of the batch's row on; 0 if not of the run */

    __device__ Blocks(const Places<W> &at_, Ring<Sizes<W>::STAGES> &ring_, const Queries &x_, int row_)
        : at(at_), ring(ring_), x(x_), row(row_), walk(x_) {
        begin_run();
    }
    __device__ void begin_run() {
        const Run run = walk.run;
        const int row0 = row / SLICE * SLICE, last = run.last < row0 + SLICE - 1 ? run.last : row0 + SLICE - 1;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int i = row + 8 * r + lane_index() / 4;
            mine[r] = i >= run.first && i <= run.last ? x.first + i + 1 : 0;
        }
        all = row >= run.first && row + 15 <= run.last ? x.first + row + 1 : 0;
        any = run.first <= last && row0 <= last ? x.first + last + 1 : 0;
    }
    __device__ Block<W> next() {
        const int k0 = walk.k0;
        const Block<W> found = {ring, {mine[0] - k0, mine[1] - k0}, all - k0, more ? any - k0 : Block<W>::NOWHERE};
        if (more) {
            const int first = walk.run.first;
            ring.advance();
            more = walk.next(x);
            if (walk.run.first != first) begin_run();
        }
        return found;
    }
    __device__ void wait_for_keys(const Block<W> &block) const {
        barrier_wait(at.keys_full + block.at.stage, block.at.parity);
    }
    /* Once for each warp: nothing orders the warps of a warpgroup.  Only of keys that have come: the stage would be let
     * go for the block that lay there before. */
    __device__ void release(int stage) const {
        if (lane_index() == 0) barrier_arrive(at.empty + stage);
    }
};

/* What a consumer knows of its queries so far; of its warp's 16 a lane has two rows, as in attention.cuh. */
template <int W>
struct Slice {
    using S = Sizes<W>;
    const int queries, row; /* which of the places; of the tile: the first of this warp */
    Softmax<1> softmax = {{{-INFINITY, -INFINITY}}, {{0.0f, 0.0f}}};
    float sums[W / 8][4] = {};

    /* Of the block whose values are multiplied while the next is weighed: its weights, which must stay until then; the
     * product; the factors of the sums so far, less than 0 for a row of another run; and the stage. */
    uint32_t p[1][KEY_BLOCK / 16][4];
    Sums<SLICE> c[S::COLUMNS];
    float keep[2] = {-1.0f, -1.0f};
    int held = -1;

    __device__ Slice(int queries_, int row_) : queries(queries_), row(row_) {}

    __device__ void begin_scores(const Blocks<W> &blocks, Sums<SLICE> &s, const Block<W> &block) {
        if (!block.seen()) return;
        blocks.wait_for_keys(block);
        wgmma_fence();
        multiply_slices<W>(s, blocks.at.queries(of_warp(queries)), blocks.at.keys(of_warp(block.at.stage)));
        wgmma_commit();
    }

    /* Weigh the scores s of a block, in their place, and begin to multiply its values.  Under way meanwhile are the
     * values of the block before, which are then added, and the scores of the next; where they are not AHEAD those come
     * behind, to the same Sums.  `last`: of the next nothing is seen. */
    template <bool last>
    __device__ void add_block(const Blocks<W> &blocks, Sums<SLICE> &s, const Block<W> &block, Sums<SLICE> &s_next,
                              const Block<W> &next) {
        if (S::AHEAD && !last) begin_scores(blocks, s_next, next);
        float(&score)[1][KEY_BLOCK / 8][4] = reinterpret_cast<float(&)[1][KEY_BLOCK / 8][4]>(s[0]);
        const int seen[1][2] = {{block.mine[0], block.mine[1]}};
        float factor[1][2];
        if (block.all < KEY_BLOCK) hide(score, seen);
        weigh(softmax, factor, score, blocks.x.factor);
        /* First, for it is a loop: ahead of that the compiler cannot wait for products, as it would ahead of weights.
         */
        barrier_wait(blocks.at.values_full + block.at.stage, block.at.parity);
        add_values(blocks);
        round_weights(p, score);
#pragma unroll
        for (int r = 0; r < 2; r++) keep[r] = seen[0][r] > 0 ? factor[0][r] : -1.0f;
        held = block.at.stage;
        if (!S::AHEAD && !last) begin_scores(blocks, s_next, next);
        const Shared<bf16> values = blocks.at.values(of_warp(held));
        wgmma_fence();
#pragma unroll
        for (int column = 0; column < S::COLUMNS; column++)
            multiply_weights<false>(c[column], p, values + column * TILE);
        wgmma_commit();
        if (!S::AHEAD) wgmma_wait<1>(); /* for the scores, which began before */
    }

    /* Those of the block before, if there is one; its stage is free then. */
    __device__ void add_values(const Blocks<W> &blocks) {
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < W / 2; i++) { /* a row of another run keeps what it has */
            float &sum = sums[i / 4][i % 4];
            const float factor = keep[i % 4 / 2];
            if (!(factor < 0.0f)) sum = fmaf(sum, factor, c[i / (SLICE / 2)][i % (SLICE / 2)]);
        }
        if (held >= 0) blocks.release(held);
    }

    /* The outputs, in the place of the queries. */
    __device__ void stage(Shared<bf16> to) const {
        const float upper = 1.0f / softmax.sum[0][0], lower = 1.0f / softmax.sum[0][1];
#pragma unroll
        for (int c = 0; c < S::COLUMNS; c++)
            stage_tile(
                to + c * TILE, row % SLICE, [&](int i) { return sums[c * TILE_WIDTH / 8 + i / 4][i % 4]; }, upper,
                lower);
    }
    /* Of a head at lse, from the tile's first query on. */
    __device__ void save(float *lse, int count) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int i = row + 8 * r + lane_index() / 4;
            if (i < count && lane_index() % 4 == 0) lse[i] = LN_2 * softmax.max[0][r] + logf(softmax.sum[0][r]);
        }
    }
};

template <int W>
__device__ void consume(const Places<W> &at, const TensorMap &out, const Work &work, int consumer) {
    constexpr bool AHEAD = Sizes<W>::AHEAD;
    const bool sends = threadIdx.x % WARPGROUP == 0;
    Ring<Sizes<W>::STAGES> ring;
    Sums<SLICE> a, b; /* the scores of this block of keys and of the next, in turns */
    int turn = 0;     /* items so far */
    for (int number = (int)blockIdx.x; number < work.items; number += (int)gridDim.x, turn++) {
        const Item it(work, number);
        const Queries x = it.queries(work);
        const int place = turn % ITEMS;
        Slice<W> slice(CONSUMERS * place + consumer, consumer * SLICE + warp_index() % 4 * 16);
        Blocks<W> blocks(at, ring, x, slice.row);
        /* Those that a consumer sees follow each other. */
        auto block = blocks.next();
        auto skip = [&] {
            blocks.wait_for_keys(block);
            blocks.release(block.at.stage);
            block = blocks.next();
        };
        /* Whether there is another.  The last has code of its own: in it no scores are written or kept. */
        auto add = [&](Sums<SLICE> &s, Sums<SLICE> &s_next) {
            const auto next = blocks.next();
            if (AHEAD && !next.seen()) slice.template add_block<true>(blocks, s, block, s_next, next);
            else slice.template add_block<false>(blocks, s, block, s_next, next);
            block = next;
            return next.seen();
        };
        /* The place of the item before.  Said when the first scores are under way, for by then TMA has read the outputs
         * there; the producer needs it for the next item. */
        auto hand_back = [&] {
            if (turn == 0 || !sends) return;
            tile_store_wait_read<0>();
            barrier_arrive(at.queries_empty + (turn - 1) % ITEMS);
        };
        while (block.there() && !block.seen()) skip();
        barrier_wait(at.queries_full + place, (uint32_t)(turn / ITEMS % 2));
        if (block.seen()) {
            slice.begin_scores(blocks, a, block);
            hand_back();
            wgmma_wait<0>();
            if constexpr (AHEAD)
                while (add(a, b) && add(b, a)) continue;
            else
                while (add(a, a)) continue;
            slice.add_values(blocks);
        } else {
            hand_back();
        }
        while (block.there()) skip();
        const Item done(work, AHEAD ? number : from_here(number)); /* said again where registers are few */
        const Shared<bf16> outputs = at.queries(slice.queries);
        sync_consumer(consumer); /* nobody multiplies the queries any more */
        slice.stage(outputs);
        slice.save(work.lse + ((int64_t)done.b * work.NH + done.h) * work.T + done.t0, x.count);
        fence_async();
        sync_consumer(consumer);
        if (sends) {
            send<W>(out, outputs, done.b, done.h, done.t0 + consumer * SLICE);
            tile_store_commit();
        }
    }
    if (sends) tile_store_wait_read<0>();
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
        const int64_t tiles = divide_up(T, ROWS), items = tiles * B * NH;
        const Work work = {lse, starts, B, T, NH, NKV, (int)tiles, (int)items, LOG2_E * score_scale(HS)};
        if (HS == 64) run<64>(out, qkv, work, op);
        else run<128>(out, qkv, work, op);
    }
}

#ifndef __CUDACC__
extern "C" void OPERATOR(emulate_attention)(int blocks) { emulated_blocks = blocks; }
#endif

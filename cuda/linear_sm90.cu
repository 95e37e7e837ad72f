/* linear_sm90.cu -- the three products of a linear layer on Hopper: TMA, wgmma, blocks that stay.
 *
 * A block has three warpgroups.  One thread of the first, the producer, asks TMA for tiles of both operands, in a ring
 * of stages; the other two, the consumers, each multiply half of the rows of a tile.  Of each stage two mbarriers:
 * `full` when its bytes have come, `empty` when all warps of the consumers have done with it.  While the consumers
 * write one tile, the stages of the next are on their way.  Two blocks, a cluster, have tiles one below the other, of
 * the same columns: each asks for half of the right operand, which comes to both, so that L2 brings a third less.
 *
 * No operand is transposed in memory: a tile has rows of 64 values of k, or of 64 values of m or n, and the descriptor
 * says which.  TMA masks every tail.
 *
 * Activations leave by TMA: what becomes of a sum is made of it where it is, in registers, and goes through a place in
 * shared memory that each consumer has for the whole of its part.  What is read besides, a residual or what GELU was
 * given, lies in the same place before: another thread of the producer's asks for it while the products are made.
 * Gradients of weights, which are floats, are added to memory by the threads.
 *
 * Order of summation, see csrc/ops.def: a chain is one sequence of wgmma.  Forward and towards the input it is a block
 * of 512 values of k, and blocks are added in order.  Gradients of weights: 128 rows, a block of the contract, 8 wgmma
 * that add 16 rows each: as many roundings as the contract's chains and their sums.  Blocks are added in pairs of
 * floats (Kahan), so a long sum loses no more than those chains do: at most 8 units in the last place of a block's
 * largest partial sum.  Where tiles are few the rows are split, by the sizes alone, and the parts, rounded to float,
 * are added in double in order. */
#include "linear.cuh"
#include "prim_sm90.cuh"

namespace {

enum { CONSUMERS = 2, THREADS = (1 + CONSUMERS) * WARPGROUP, BK = 64, SLICE = 64 };
enum { STRIP = 32, STAGING = SLICE * STRIP }; /* of WEIGHT: columns that a consumer writes at a time; floats for them */
enum { CLUSTER = 2 };                         /* blocks that share the right operand */
enum { SMS = 132 };                           /* of an H100 or H200, by which rows are cut into parts on any device */

/* Of both tiles of a stage, which have TILE_WIDTH values in a row. */
static_assert((int)BK == (int)TILE_WIDTH, "a row of a tile is one step of k, or holds one");

template <Product product_, int BM_, int BN_, int STAGES_>
struct Tiling {
    static constexpr Product product = product_;
    static constexpr int BM = BM_, BN = BN_, STAGES = STAGES_;
    static constexpr int SLICES = BM / CONSUMERS / SLICE; /* of 64 rows, of each consumer */
    static constexpr bool A_BY_K = product == WEIGHT, B_BY_K = product != FORWARD;
    static constexpr int CHAIN = (product == WEIGHT ? ROW_BLOCK : K_BLOCK) * 2 / BK; /* steps */
    static constexpr int B_ROOM = B_BY_K ? (BN + TILE_WIDTH - 1) / TILE_WIDTH * TILE_WIDTH : BN;
    static constexpr int STAGE = (BM + B_ROOM) * BK; /* values */
    static constexpr int EACH = SLICES * BN / 2;     /* sums of a thread */
    static_assert(EACH <= 96, "beside as many of the chains before");
    /* Steps by which the second consumer begins behind the first: while one writes a tile, or adds a chain of WEIGHT,
     * the other multiplies, at twice the speed. */
    static constexpr int LAG = 2;
    static_assert(LAG < STAGES, "the stages between them are held");
    static constexpr int ONES = product == WEIGHT ? 8 * BK : 0; /* values */
    static constexpr int BOX_WIDTH = BN % TILE_WIDTH ? TILE_WIDTH / 2 : TILE_WIDTH;
    static constexpr int BOX = SLICE * BOX_WIDTH; /* values that go out, or come in, by one copy */
    static constexpr int ROW_BOXES = BN / BOX_WIDTH, BOXES = SLICES * ROW_BOXES;
    static constexpr int ROOM = product == WEIGHT ? 2 * STAGING : BOXES * BOX; /* values, of each consumer */
    static constexpr size_t BYTES =
        ((size_t)STAGES * STAGE + ONES + CONSUMERS * ROOM) * sizeof(bf16) + 2 * (STAGES + CONSUMERS) * sizeof(uint64_t);
    static_assert(BYTES <= 227 << 10, "what a block may have");
};

/* The shared memory of a block, by its beginning alone: registers are few. */
template <class S>
struct Places {
    Shared<bf16> all;
    __device__ Shared<bf16> stage(int i) const { return all + i * S::STAGE; }
    __device__ Shared<bf16> ones() const { return all + S::STAGES * S::STAGE; }
    /* Box i of a consumer's. */
    __device__ Shared<bf16> room(int consumer, int i) const {
        return ones() + (S::ONES + consumer * S::ROOM + i * S::BOX);
    }
    __device__ Shared<uint64_t> full(int i) const {
        return shared_cast<uint64_t>(ones() + (S::ONES + CONSUMERS * S::ROOM)) + i;
    }
    __device__ Shared<uint64_t> empty(int i) const { return full(S::STAGES + i); }
    __device__ Shared<uint64_t> room_full(int consumer) const { return empty(S::STAGES + consumer); }
    __device__ Shared<uint64_t> room_empty(int consumer) const { return room_full(CONSUMERS + consumer); }
};

/* What there is to do: pairs of tiles, one below the other, for a cluster; and parts of the steps of k. */
struct Work {
    int M, N, steps, part_steps, parts, pairs_m, tiles_n, items;
    bool lags; /* every part has more steps than the second consumer waits for */
    bool adds; /* of WEIGHT: rows of 16 bytes are added to */
};

struct Item {
    int part, m0, n0, first, last; /* steps first .. last - 1 */
};

/* Pairs go by groups of GROUP in m, for each n: those at work at a time then share rows and columns that lie in L2. */
enum { GROUP = 8 };

__device__ int first_item() { return (int)blockIdx.x / CLUSTER; }
__device__ int clusters() { return (int)gridDim.x / CLUSTER; }

template <class S>
__device__ Item item(const Work &work, int number) {
    const int pairs = work.pairs_m * work.tiles_n;
    const int part = S::product == WEIGHT ? number / pairs : 0, pair = number - part * pairs;
    const int first_m = pair / (GROUP * work.tiles_n) * GROUP, rest = pair % (GROUP * work.tiles_n);
    const int height = work.pairs_m - first_m < GROUP ? work.pairs_m - first_m : GROUP;
    const int tile_m = (first_m + rest % height) * CLUSTER + cluster_rank();
    Item it = {part, tile_m * S::BM, rest / height * S::BN, 0, work.steps};
    if (S::product == WEIGHT) {
        it.first = part * work.part_steps;
        if (it.first + work.part_steps < work.steps) it.last = it.first + work.part_steps;
    }
    return it;
}

/* ---- the producer ---- */

/* `size` values of m or n, from `first`, and BK of k; where a row is one k, as tiles one behind the other. */
template <int size, bool by_k>
__device__ void fetch(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> full, int first, int k) {
    if constexpr (by_k)
        for (int i = 0; i < size; i += TILE_WIDTH) tile_load(to + i * BK, map, full, k, first + i);
    else tile_load(to, map, full, first, k);
}

/* The half that this block brings of the `size` values of n that both multiply with: of n, or where a row is one k of
 * those. */
template <int size, bool by_k>
__device__ void fetch_half(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> full, int first, int k) {
    const int rank = cluster_rank();
    if constexpr (by_k)
        for (int i = 0; i < size; i += TILE_WIDTH)
            tile_load_all(to + (i * BK + rank * BK / 2 * TILE_WIDTH), map, full, k + rank * BK / 2, first + i);
    else tile_load_all(to + rank * size / 2 * BK, map, full, first + rank * size / 2, k);
}

template <class S>
__device__ void produce(const Places<S> &at, const TensorMap &a, const TensorMap &b, const Work &work) {
    Ring<S::STAGES> ring;
    for (int number = first_item(); number < work.items; number += clusters()) {
        const Item it = item<S>(work, number);
        for (int step = it.first; step < it.last; step++) {
            const Shared<bf16> stage = at.stage(ring.stage);
            const Shared<uint64_t> full = at.full(ring.stage);
            barrier_wait(at.empty(ring.stage), ring.parity ^ 1);
            barrier_expect(full, S::STAGE * (int)sizeof(bf16));
            fetch<S::BM, S::A_BY_K>(stage, a, full, it.m0, step * BK);
            fetch_half<S::BN, S::B_BY_K>(stage + S::BM * BK, b, full, it.n0, step * BK);
            ring.advance();
        }
    }
}

/* What each consumer reads besides, one tile after the other, as soon as the tile before has left. */
template <class S>
__device__ void fill_rooms(const Places<S> &at, const TensorMap &in, const Work &work) {
    uint32_t parity = 1;
    for (int number = first_item(); number < work.items; number += clusters()) {
        const Item it = item<S>(work, number);
        for (int consumer = 0; consumer < CONSUMERS; consumer++) {
            barrier_wait(at.room_empty(consumer), parity);
            barrier_expect(at.room_full(consumer), S::ROOM * (int)sizeof(bf16));
            for (int i = 0; i < S::BOXES; i++) {
                const int slice = consumer * S::SLICES + i / S::ROW_BOXES, column = i % S::ROW_BOXES * S::BOX_WIDTH;
                tile_load(at.room(consumer, i), in, at.room_full(consumer), it.m0 + slice * SLICE, it.n0 + column);
            }
        }
        parity ^= 1;
    }
}

/* ---- the consumers ---- */

/* Of a consumer's rows and the columns of its tile; and, where `columns` are asked for, of the left operand alone over
 * k: its product with ones. */
template <class S>
struct TileSums {
    Sums<S::BN> of[S::SLICES];
    Sums<8> ones[S::SLICES];
    __device__ float at(int i) { return of[i / (S::BN / 2)][i % (S::BN / 2)]; }
};

/* An operand's tile from row or column mn on, a multiple of 64. */
template <bool by_k>
__device__ uint64_t part_of(Shared<bf16> tile, int mn) {
    return by_k ? operand(tile + mn * BK, BK * TILE_WIDTH * 2, 8 * TILE_WIDTH * 2)
                : operand(tile + mn * TILE_WIDTH, 16, 8 * TILE_WIDTH * 2);
}
/* The same from k of its step on, a multiple of 16. */
template <bool by_k>
__device__ uint64_t from_k(uint64_t part, int k) {
    return operand_behind(part, by_k ? k * TILE_WIDTH * 2 : k * 2);
}

template <class S, bool columns, bool add>
__device__ void multiply_slice(TileSums<S> &sum, const Places<S> &at, int i, uint64_t a, uint64_t b) {
    wgmma<S::A_BY_K, S::B_BY_K, add>(sum.of[i], a, b);
    if constexpr (columns) wgmma<S::A_BY_K, false, add>(sum.ones[i], a, part_of<false>(at.ones(), 0));
}

/* A stage's products; `fresh`: the sums begin with them. */
template <class S, bool columns, bool fresh>
__device__ void multiply_stage(TileSums<S> &sum, const Places<S> &at, Ring<S::STAGES> &ring, int row) {
    const Shared<bf16> stage = at.stage(ring.stage);
    const uint64_t b_part = part_of<S::B_BY_K>(stage + S::BM * BK, 0);
    uint64_t a_part[S::SLICES];
#pragma unroll
    for (int i = 0; i < S::SLICES; i++) a_part[i] = part_of<S::A_BY_K>(stage, row + i * SLICE);
    barrier_wait(at.full(ring.stage), ring.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
        const uint64_t b = from_k<S::B_BY_K>(b_part, k);
#pragma unroll
        for (int i = 0; i < S::SLICES; i++) {
            const uint64_t a = from_k<S::A_BY_K>(a_part[i], k);
            if (fresh && k == 0) multiply_slice<S, columns, false>(sum, at, i, a, b);
            else multiply_slice<S, columns, true>(sum, at, i, a, b);
        }
    }
    wgmma_commit();
    ring.advance();
}

/* Once for each warp, for nothing orders the warps of a warpgroup; at both blocks, for each writes into the other. */
template <class S>
__device__ void release(const Places<S> &at, int stage) {
    if (lane_index() < CLUSTER) barrier_arrive_at(at.empty(stage), lane_index());
}

struct Nothing {
    __device__ void operator()(int) const {}
};

/* One chain; behind it the sums may be touched, and its stages are free.  beside(step): what there is to do while the
 * products of a step other than the first are made. */
template <class S, bool columns, class F = Nothing>
__device__ void multiply_chain(TileSums<S> &sum, const Places<S> &at, Ring<S::STAGES> &ring, int row, int steps,
                               F beside = {}) {
    int before = ring.stage;
    multiply_stage<S, columns, true>(sum, at, ring, row);
#pragma unroll 1
    for (int step = 1; step < steps; step++) {
        const int stage = ring.stage;
        multiply_stage<S, columns, false>(sum, at, ring, row);
        wgmma_wait<1>(); /* the stage before has been read */
        release<S>(at, before);
        before = stage;
        beside(step);
    }
    wgmma_wait<0>();
    release<S>(at, before);
}

/* The sums of the chains so far, beside those of the chain at work. */
template <class S, Product = S::product>
struct Total {
    float kept[S::EACH];
    __device__ void begin(TileSums<S> &sum) {
#pragma unroll
        for (int i = 0; i < S::EACH; i++) kept[i] = sum.at(i);
    }
    __device__ void add(TileSums<S> &sum) {
#pragma unroll
        for (int i = 0; i < S::EACH; i++) kept[i] += sum.at(i);
    }
    __device__ float read(int i) const { return kept[i]; }
};

template <class S>
struct Total<S, WEIGHT> {
    Kahan kept[S::EACH];
    __device__ void begin() {
#pragma unroll
        for (int i = 0; i < S::EACH; i++) kept[i] = {};
    }
    __device__ void add(TileSums<S> &sum) {
#pragma unroll
        for (int i = 0; i < S::EACH; i++) kept[i].add(sum.at(i));
    }
    __device__ void finish() {
#pragma unroll
        for (int i = 0; i < S::EACH; i++) kept[i].sum = kept[i].value();
    }
    __device__ float read(int i) const { return kept[i].sum; }
};

}  // namespace
#include "linear_write_sm90.cuh"
namespace {

/* The sums of a tile that `columns` asks for, in pairs of floats; each is there in four lanes. */
template <class S>
struct ColumnTotal {
    Kahan kept[S::SLICES][2] = {};
    __device__ void add(TileSums<S> &sum) {
#pragma unroll
        for (int i = 0; i < 2 * S::SLICES; i++) kept[i / 2][i % 2].add(sum.ones[i / 2][i % 2 * 2]);
    }
    /* From m0 on, of M; `fresh`: not added to what was there. */
    __device__ void write(float *out, bool fresh, int m0, int M) {
        const int t = (int)threadIdx.x % WARPGROUP, row = t / WARP * 16 + lane_index() / 4;
        if (lane_index() % 4 > 0) return;
#pragma unroll
        for (int i = 0; i < 2 * S::SLICES; i++) {
            const int m = m0 + i / 2 * SLICE + row + i % 2 * 8;
            const float sum = kept[i / 2][i % 2].value();
            if (m < M) out[m] = fresh ? sum : out[m] + sum;
        }
    }
};

/* Gradients of weights. */
template <class S>
__device__ void consume_rows(const Places<S> &at, const Output &o, const Work &work, int consumer) {
    const int row = consumer * S::SLICES * SLICE;
    Ring<S::STAGES> ring;
    TileSums<S> sum;
    Total<S> total;
    const Writer<S> writer(at, o, work, consumer);
    for (int number = first_item(); number < work.items; number += clusters()) {
        const Item it = item<S>(work, number);
        const bool columns = o.dbias && it.n0 == 0;
        writer.prefetch(it, it.m0 + row);
        ColumnTotal<S> column_total;
        total.begin();
#pragma unroll 2 /* so a sum needs not be moved */
        for (int step = it.first; step < it.last; step += S::CHAIN) {
            const int left = it.last - step, steps = left < S::CHAIN ? left : S::CHAIN;
            if (columns) {
                multiply_chain<S, true>(sum, at, ring, row, steps);
                column_total.add(sum);
            } else {
                multiply_chain<S, false>(sum, at, ring, row, steps);
            }
            total.add(sum);
        }
        total.finish();
        writer.write(total, it, it.m0 + row);
        if (columns) column_total.write(o.dbias + (int64_t)it.part * work.M, work.parts > 1, it.m0 + row, work.M);
    }
}

/* Activations.  Of a tile's boxes the first leaves at once, the others beside the first chain of the next tile, one
 * beside a step, where that chain has so many: for all of them there are no registers. */
template <class S>
__device__ void consume(const Places<S> &at, const Output &o, const Boxes &boxes, const Work &work, int consumer) {
    const int row = consumer * S::SLICES * SLICE;
    const bool beside = work.steps >= S::BOXES;
    static_assert(S::BOXES <= S::CHAIN, "a chain has a step for each");
    Ring<S::STAGES> ring;
    TileSums<S> sum;
    Total<S> total;
    const Writer<S> writer(at, o, boxes, work);
    int m0 = 0, n0 = 0; /* of the tile before */
    for (int tile = 0;; tile++) {
        const int number = tile * clusters() + first_item();
        if (number >= work.items) break;
        const int first = work.steps < S::CHAIN ? work.steps : S::CHAIN;
        multiply_chain<S, false>(sum, at, ring, row, first, [&](int i) {
            if (tile > 0 && beside && i < S::BOXES) writer.template write_box<1>(total, m0, n0, tile - 1, i);
        });
        if (tile > 0) writer.hand_back();
        total.begin(sum);
#pragma unroll 1
        for (int step = S::CHAIN; step < work.steps; step += S::CHAIN) {
            const int left = work.steps - step;
            multiply_chain<S, false>(sum, at, ring, row, left < S::CHAIN ? left : S::CHAIN);
            total.add(sum);
        }
        const Item it = item<S>(work, number);
        m0 = it.m0 + row, n0 = it.n0;
        writer.write(total, m0, n0, tile, beside && number + clusters() < work.items ? 1 : S::BOXES);
    }
    writer.finish();
}

template <class S>
__device__ void make_barriers(const Places<S> &at) {
    for (int i = 0; i < S::STAGES; i++) {
        barrier_init(at.full(i), 1);
        barrier_init(at.empty(i), CLUSTER * CONSUMERS * WARPGROUP / WARP);
    }
    for (int i = 0; i < CONSUMERS; i++) {
        barrier_init(at.room_full(i), 1);
        barrier_init(at.room_empty(i), WARPGROUP / WARP);
    }
    barrier_init_fence();
}

template <class S>
__global__ void __launch_bounds__(THREADS, 1)
    product_sm90(Output o, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                 const __grid_constant__ Boxes boxes, Work work) {
    SHARED_TILES(float, all);
    const Places<S> at = {shared_cast<bf16>(all)};
    if (threadIdx.x == 0) make_barriers<S>(at);
    if (S::ONES > 0) {
        const Shared<uint32_t> ones = shared_cast<uint32_t>(at.ones());
        for (int i = (int)threadIdx.x; i < S::ONES / 2; i += THREADS) ones[i] = pack_bf16(1.0f, 1.0f);
        fence_async();
    }
    cluster_sync();
    if (threadIdx.x >= 2 * WARPGROUP && work.lags) barrier_wait(at.full(S::LAG), 0);
    if (threadIdx.x < WARPGROUP) {
        registers_give<24>();
        if (warp_index() == 0 && elected()) produce<S>(at, a, b, work);
        if (warp_index() == 1 && boxes.come != NOTHING && elected()) fill_rooms<S>(at, boxes.in, work);
    } else {
        registers_take<240>();
        if constexpr (S::product == WEIGHT) consume_rows<S>(at, o, work, warp_index() / 4 - 1);
        else consume<S>(at, o, boxes, work, warp_index() / 4 - 1);
    }
    __syncwarp(); /* one lane of two warps has been away */
    cluster_sync();
}

/* ---- parts of rows ---- */

/* grad (size) = or += the sum of the parts, in order. */
__global__ void __launch_bounds__(256)
    add_parts(float *grad, const float *part, int parts, int64_t size, int accumulate) {
    const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= size) return;
    double sum = 0.0;
    for (int p = 0; p < parts; p++) sum += part[p * size + i];
    grad[i] = accumulate ? grad[i] + (float)sum : (float)sum;
}

/* ---- which tiles ---- */

int only_tiling = -1; /* -1: by the sizes.  For benchmarks and tests. */
#ifdef __CUDACC__
const int least_rows = 512;
int clusters_at_most() { return sm_count() < CLUSTER ? 1 : sm_count() / CLUSTER; }
#else
/* For the tests: several tiles a block, several parts. */
int emulated_clusters = SMS / CLUSTER, least_rows = 512;
int clusters_at_most() { return emulated_clusters; }
#endif

struct Choice {
    int tiling, parts;
};

/* Tilings of all products but WEIGHT, which has the last alone: sides, and the share of the peak that tensor cores
 * reach where L2 must bring (BM + BN) / (BM * BN) values for each product. */
struct Sides {
    int bm, bn;
    double share;
};
constexpr Sides SIDES[] = {{128, 192, 1.0}, {128, 160, 0.95}, {128, 128, 0.9}};
enum { TILINGS = 3 };

/* Steps of k, at the peak, that writing a tile takes. */
const double WRITING = 3.0;

/* Of the rows, and of all tiles together: 64 KB each, so never more than 135 MB. */
enum { MOST_PARTS = 16, MOST_PART_TILES = 16 * SMS };

/* Of products that take as long the first.  The order of sums knows the parts alone, which only WEIGHT has. */
Choice choose(int product, int M, int N, int K) {
    const int64_t steps = divide_up(K, BK), most_parts = product == WEIGHT ? divide_up(K, least_rows) : 1;
    const int blocks = product == WEIGHT ? SMS : CLUSTER * clusters_at_most(); /* the device must not show in sums */
    Choice best = {TILINGS - 1, 1};
    double least = 1e300;
    for (int i = product == WEIGHT ? TILINGS - 1 : 0; i < TILINGS; i++) {
        if (only_tiling >= 0 && i != only_tiling && product != WEIGHT) continue;
        const int64_t tiles = divide_up(M, CLUSTER * SIDES[i].bm) * CLUSTER * divide_up(N, SIDES[i].bn);
        for (int parts = 1; parts <= most_parts && parts <= MOST_PARTS; parts++) {
            if (parts > 1 && tiles * parts > MOST_PART_TILES) break;
            const double waves = (double)divide_up(tiles * parts, blocks);
            const double each = ((double)divide_up(steps, parts) + WRITING * (parts > 1 ? 3 : 1)) / SIDES[i].share;
            const double time = waves * each * SIDES[i].bm * SIDES[i].bn;
            if (time < least) least = time, best = {i, parts};
        }
    }
    return best;
}

/* Steps of a part: whole chains of WEIGHT. */
int part_steps(int K, int parts) {
    const int64_t chain = ROW_BLOCK * 2;
    return parts == 1 ? (int)divide_up(K, BK) : (int)(divide_up(divide_up(K, parts), chain) * chain / BK);
}

/* By TMA where rows lie on 16 bytes: what goes out, and one of what comes in, unless `pre` has a use for its place. */
Boxes boxes_of(const ProductSm90 &p, int width) {
    auto lies_so = [&](const void *x) { return on_16_bytes(x) && p.N % CHUNK == 0; };
    Boxes boxes = {};
    if (p.product == WEIGHT || !lies_so(p.out) || !lies_so(p.pre)) return boxes;
    auto map = [&](const void *x) { return tensor_map((const bf16 *)x, p.M, p.N, p.N, SLICE, width); };
    const bool given = p.product == INPUT && p.fn != FN_NONE;
    const void *in = given ? p.given : p.add;
    boxes.go = true, boxes.out = map(p.out);
    if (p.pre) boxes.pre = map(p.pre);
    else if (in && lies_so(in)) boxes.in = map(in), boxes.come = given ? GIVEN : ADD;
    return boxes;
}

template <Product product, int tiling, int STAGES>
void run(const ProductSm90 &p, const Output &o, int each) {
    using S = Tiling<product, SIDES[tiling].bm, SIDES[tiling].bn, STAGES>;
    const TensorMap a = tensor_map(p.a, p.a_rows, p.a_cols, p.a_ld, S::A_BY_K ? BK : S::BM, TILE_WIDTH);
    const TensorMap b = tensor_map(p.b, p.b_rows, p.b_cols, p.b_ld, (S::B_BY_K ? BK : S::BN) / CLUSTER, TILE_WIDTH);
    Work work = {};
    work.M = p.M, work.N = p.N, work.steps = (int)divide_up(p.K, BK), work.part_steps = each;
    work.parts = (int)divide_up(work.steps, each);
    work.pairs_m = (int)divide_up(p.M, CLUSTER * S::BM), work.tiles_n = (int)divide_up(p.N, S::BN);
    work.items = work.pairs_m * work.tiles_n * work.parts;
    work.adds = product == WEIGHT && o.accumulate && on_16_bytes(o.grad) && p.N % 4 == 0;
    work.lags = work.steps - (work.parts - 1) * each > S::LAG;
    const int most = clusters_at_most(), count = work.items < most ? work.items : most;
    Grid grid(count * CLUSTER, THREADS, S::BYTES, p.op);
    grid.sm90 = true, grid.cluster = CLUSTER;
    launch(grid, product_sm90<S>, o, a, b, boxes_of(p, S::BOX_WIDTH), work);
}

template <Product product>
void run(const ProductSm90 &p, const Output &o) {
    const int each = part_steps(p.K, 1);
    const int tiling = choose(product, p.M, p.N, p.K).tiling;
    if (tiling == 0) run<product, 0, 4>(p, o, each);
    else if (tiling == 1) run<product, 1, product == FORWARD ? 5 : 4>(p, o, each);
    else run<product, 2, 6>(p, o, each);
}

void add_all_parts(float *grad, const float *part, int parts, int64_t size, int accumulate, const char *op) {
    launch(Grid(divide_up(size, 256), 256, 0, op), add_parts, grad, part, parts, size, accumulate);
}

void run_weight(const ProductSm90 &p, Output o) {
    const int each = part_steps(p.K, choose(WEIGHT, p.M, p.N, p.K).parts);
    const int parts = (int)divide_up(divide_up(p.K, BK), each);
    const int64_t size = (int64_t)p.M * p.N;
    float *sums = p.parts + parts * size;
    if (parts > 1) o.grad = p.parts, o.accumulate = 0, o.dbias = p.dbias ? sums : NULL;
    run<WEIGHT, TILINGS - 1, 6>(p, o, each);
    if (parts == 1) return;
    add_all_parts(p.grad, p.parts, parts, size, p.accumulate, p.op);
    if (p.dbias) add_all_parts(p.dbias, sums, parts, p.M, 1, p.op);
}

}  // namespace

size_t OPERATOR(linear_sm90_room)(int product, int M, int N, int K) {
    const int parts = choose(product, M, N, K).parts;
    return parts > 1 ? (size_t)parts * (size_t)M * ((size_t)N + 1) * sizeof(float) : 0; /* and for dbias */
}

void OPERATOR(linear_sm90)(const ProductSm90 &p) {
    if constexpr (sizeof(act) == sizeof(bf16)) {
        const Output o = {(act *)p.out, (act *)p.pre, (const act *)p.add, (const act *)p.given, p.bias, p.grad,
                          p.dbias,      p.fn,         p.accumulate};
        if (p.product == FORWARD) run<FORWARD>(p, o);
        else if (p.product == INPUT) run<INPUT>(p, o);
        else run_weight(p, o);
    }
}

extern "C" int OPERATOR(linear_sm90_tiling)(int tiling) {
    only_tiling = tiling;
    return TILINGS;
}

#ifndef __CUDACC__
extern "C" void OPERATOR(emulate_tiling)(int tiling, int clusters, int rows) {
    only_tiling = tiling, emulated_clusters = clusters, least_rows = rows;
}
#endif

/* linear_sm90.cu -- the three products of a linear layer on Hopper: TMA, wgmma, blocks that stay.
 *
 * A block has three warpgroups.  One thread of the first, the producer, asks TMA for tiles of both operands, in a ring
 * of stages; the other two, the consumers, each multiply half of the rows of a tile.  Of each stage two mbarriers:
 * `full` when its bytes have come, `empty` when all warps of the consumers have done with it.  While the consumers
 * write one tile, the stages of the next are on their way.
 *
 * No operand is transposed in memory: a tile has rows of 64 values of k, or of 64 values of m or n, and the descriptor
 * says which.  TMA masks every tail of the operands; sums go through shared memory and out as in linear.cu.
 *
 * Order of summation, see csrc/ops.def: a chain is one sequence of wgmma.  Forward and towards the input it is a block
 * of 512 values of k, and blocks are added in order.  Gradients of weights: 128 rows, a block of the contract, 8 wgmma
 * that add 16 rows each: as many roundings as the contract's chains and their sums.  Blocks are added in pairs of
 * floats (Exact), so a long sum loses no more than those chains do: at most 8 units in the last place of a block's
 * largest partial sum.  Where tiles are few the rows are split, by the sizes alone, and the parts, rounded to float,
 * are added in double in order. */
#include "linear.cuh"
#include "prim_sm90.cuh"

namespace {

enum { CONSUMERS = 2, THREADS = (1 + CONSUMERS) * WARPGROUP, BK = 64, SLICE = 64 };
enum { STRIP = 32, STAGING = SLICE * STRIP }; /* columns that a consumer writes at a time; floats for them */
enum { SMS = 132 };                           /* of an H100 or H200; fewer or more change the time alone */

/* Of both tiles of a stage, which have TILE_WIDTH values in a row. */
static_assert((int)BK == (int)TILE_WIDTH, "a row of a tile is one step of k, or holds one");

template <Product product_, int BM_, int BN_, int STAGES_>
struct Tiling {
    static constexpr Product product = product_;
    static constexpr int BM = BM_, BN = BN_, STAGES = STAGES_;
    static constexpr int SLICES = BM / CONSUMERS / SLICE; /* of 64 rows, of each consumer */
    static constexpr bool A_BY_K = product == WEIGHT, B_BY_K = product != FORWARD;
    static constexpr int CHAIN = (product == WEIGHT ? ROW_BLOCK : K_BLOCK) * 2 / BK; /* steps */
    static constexpr int STAGE = (BM + BN) * BK;                                     /* values */
    /* The sums of earlier chains: what registers do not hold lies in shared memory. */
    static constexpr int EACH = SLICES * BN / 2, KEPT = EACH > 96 ? 64 : EACH;
    static constexpr int TOTALS = (EACH - KEPT) * CONSUMERS * WARPGROUP; /* floats */
    static constexpr int ONES = product == WEIGHT ? 8 * BK : 0;          /* values */
    static constexpr size_t BYTES = ((size_t)STAGES * STAGE + ONES) * sizeof(bf16) +
                                    (size_t)(CONSUMERS * STAGING + TOTALS) * sizeof(float) +
                                    2 * STAGES * sizeof(uint64_t);
    static_assert(BYTES <= 227 << 10, "what a block may have");
};

/* The shared memory of a block. */
template <class S>
struct Places {
    Shared<bf16> stages, ones;
    Shared<float> staging, totals;
    Shared<uint64_t> full, empty;
    __device__ Places(Shared<float> all)
        : stages(shared_cast<bf16>(all)),
          ones(stages + S::STAGES * S::STAGE),
          staging(shared_cast<float>(ones + S::ONES)),
          totals(staging + CONSUMERS * STAGING),
          full(shared_cast<uint64_t>(totals + S::TOTALS)),
          empty(full + S::STAGES) {}
};

/* What there is to do: tiles, and parts of the steps of k. */
struct Work {
    int M, N, steps, part_steps, parts, tiles_m, tiles_n, items;
};

struct Item {
    int part, m0, n0, first, last; /* steps first .. last - 1 */
};

/* Tiles go by groups of GROUP in m, for each n: those at work at a time then share rows and columns that lie in L2. */
enum { GROUP = 16 };

template <class S>
__device__ Item item(const Work &work, int number) {
    const int tiles = work.tiles_m * work.tiles_n, part = number / tiles, tile = number % tiles;
    const int first_m = tile / (GROUP * work.tiles_n) * GROUP, rest = tile % (GROUP * work.tiles_n);
    const int height = work.tiles_m - first_m < GROUP ? work.tiles_m - first_m : GROUP;
    const int first = part * work.part_steps, last = first + work.part_steps;
    return {part, (first_m + rest % height) * S::BM, rest / height * S::BN, first,
            last < work.steps ? last : work.steps};
}

/* ---- the producer ---- */

/* `size` values of m or n, from `first`, and BK of k; where a row is one k, as tiles one behind the other. */
template <int size, bool by_k>
__device__ void fetch(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> full, int first, int k) {
    if constexpr (by_k)
        for (int i = 0; i < size; i += TILE_WIDTH) tile_load(to + i * BK, map, full, k, first + i);
    else tile_load(to, map, full, first, k);
}

template <class S>
__device__ void produce(const Places<S> &at, const TensorMap &a, const TensorMap &b, const Work &work) {
    Ring<S::STAGES> ring;
    for (int number = (int)blockIdx.x; number < work.items; number += (int)gridDim.x) {
        const Item it = item<S>(work, number);
        for (int step = it.first; step < it.last; step++) {
            const Shared<bf16> stage = at.stages + ring.stage * S::STAGE;
            const Shared<uint64_t> full = at.full + ring.stage;
            barrier_wait(at.empty + ring.stage, ring.parity ^ 1);
            barrier_expect(full, S::STAGE * (int)sizeof(bf16));
            fetch<S::BM, S::A_BY_K>(stage, a, full, it.m0, step * BK);
            fetch<S::BN, S::B_BY_K>(stage + S::BM * BK, b, full, it.n0, step * BK);
            ring.advance();
        }
    }
}

/* ---- the consumers ---- */

/* Of a consumer's rows and the columns of its tile; and, where `columns` are asked for, of the left operand alone over
 * k: its product with ones. */
template <class S>
struct TileSums {
    Sums<S::BN> of[S::SLICES];
    Sums<8> ones[S::SLICES];
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
    if constexpr (columns) wgmma<S::A_BY_K, false, add>(sum.ones[i], a, part_of<false>(at.ones, 0));
}

/* A stage's products; `fresh`: the sums begin with them. */
template <class S, bool columns, bool fresh>
__device__ void multiply_stage(TileSums<S> &sum, const Places<S> &at, Ring<S::STAGES> &ring, int row) {
    const Shared<bf16> stage = at.stages + ring.stage * S::STAGE;
    const uint64_t b_part = part_of<S::B_BY_K>(stage + S::BM * BK, 0);
    uint64_t a_part[S::SLICES];
#pragma unroll
    for (int i = 0; i < S::SLICES; i++) a_part[i] = part_of<S::A_BY_K>(stage, row + i * SLICE);
    barrier_wait(at.full + ring.stage, ring.parity);
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

/* Once for each warp: nothing orders the warps of a warpgroup. */
template <class S>
__device__ void release(const Places<S> &at, int stage) {
    if (lane_index() == 0) barrier_arrive(at.empty + stage);
}

/* One chain; behind it the sums may be touched, and its stages are free. */
template <class S, bool columns>
__device__ void multiply_chain(TileSums<S> &sum, const Places<S> &at, Ring<S::STAGES> &ring, int row, int steps) {
    int before = ring.stage;
    multiply_stage<S, columns, true>(sum, at, ring, row);
    for (int step = 1; step < steps; step++) {
        const int stage = ring.stage;
        multiply_stage<S, columns, false>(sum, at, ring, row);
        wgmma_wait<1>(); /* the stage before has been read */
        release<S>(at, before);
        before = stage;
    }
    wgmma_wait<0>();
    release<S>(at, before);
}

/* The sums of the chains so far, in registers beside those of the chain at work; what has no place there, in shared
 * memory, where each thread has places of its own. */
template <class S, Product = S::product>
struct Total {
    float kept[S::KEPT];
    Shared<float> more;
    __device__ Total(const Places<S> &at, int t) : more(at.totals + t) {}

    __device__ float read(int i) const {
        return i < S::KEPT ? kept[i] : (float)more[(i - S::KEPT) * CONSUMERS * WARPGROUP];
    }
    __device__ void write(int i, float x) {
        if (i < S::KEPT) kept[i] = x;
        else more[(i - S::KEPT) * CONSUMERS * WARPGROUP] = x;
    }
    __device__ void add(int i, float x, bool first) { write(i, first ? x : read(i) + x); }
    __device__ void begin() {}
    __device__ void finish() {}
};

template <class S>
struct Total<S, WEIGHT> {
    static_assert(S::TOTALS == 0, "pairs stay in registers");
    Exact kept[S::KEPT];
    __device__ Total(const Places<S> &, int) {}
    __device__ void begin() {
#pragma unroll
        for (int i = 0; i < S::KEPT; i++) kept[i] = {};
    }
    __device__ void add(int i, float x, bool) { kept[i].add(x); }
    __device__ void finish() {
#pragma unroll
        for (int i = 0; i < S::KEPT; i++) kept[i].high += kept[i].low;
    }
    __device__ float read(int i) const { return kept[i].high; }
};

template <class S>
__device__ void sync_consumer(int consumer) {
    if (consumer == 0) sync_group<1>(WARPGROUP);
    else sync_group<2>(WARPGROUP);
}

/* Where value (r, c) of a chunk lies: groups of 4 change places by row, so that lanes of a row or column of an mma's
 * result meet different banks; 8 values from a multiple of 8 on stay together. */
__device__ int staged(int r, int c) { return r * STRIP + ((c / 4 ^ r % 4 * 2) * 4) + c % 4; }

/* A slice of 64 rows, from m0. */
template <class S>
__device__ void write_slice(const Output &o, Shared<float> staging, const Total<S> &total, int slice, int consumer,
                            int m0, int n0, int M, int N) {
    const int t = (int)threadIdx.x % WARPGROUP, row = t / WARP * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
#pragma unroll 1 /* the code of the functions is there once */
    for (int chunk = 0; chunk < S::BN / STRIP; chunk++) {
        if (n0 + chunk * STRIP >= N || m0 >= M) return;
        sync_consumer<S>(consumer); /* the chunk before has been read */
#pragma unroll
        for (int c = 0; c < S::BN / STRIP; c++) {
            if (c != chunk) continue;
#pragma unroll
            for (int i = 0; i < STRIP / 2; i++)
                staging[staged(row + i % 4 / 2 * 8, i / 4 * 8 + column + i % 2)] =
                    total.read(slice * S::BN / 2 + c * (STRIP / 2) + i);
        }
        sync_consumer<S>(consumer);
#pragma unroll 1
        for (int i = t; i < STAGING / VEC; i += WARPGROUP) {
            const int r = i / (STRIP / VEC), c = i % (STRIP / VEC) * VEC, n = n0 + chunk * STRIP + c;
            if (m0 + r >= M || n >= N) continue;
            float x[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j += 4) {
                const uint4 four = shared_cast<uint4>(staging + (staged(r, c) + j))[0];
                x[j] = float_of_bits(four.x), x[j + 1] = float_of_bits(four.y);
                x[j + 2] = float_of_bits(four.z), x[j + 3] = float_of_bits(four.w);
            }
            write<S::product>(o, x, m0 + r, n, N, N - n);
        }
    }
}

/* The sums of a tile that `columns` asks for, in pairs of floats; each is there in four lanes. */
template <class S>
struct ColumnTotal {
    Exact kept[S::SLICES][2] = {};
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
            const Exact &sum = kept[i / 2][i % 2];
            if (m < M) out[m] = fresh ? sum.high + sum.low : out[m] + (sum.high + sum.low);
        }
    }
};

template <class S>
__device__ void consume(const Places<S> &at, const Output &o, const Work &work, int consumer) {
    const int t = (int)threadIdx.x - WARPGROUP, row = consumer * S::SLICES * SLICE;
    Ring<S::STAGES> ring;
    TileSums<S> sum;
    Total<S> total(at, t);
    for (int number = (int)blockIdx.x; number < work.items; number += (int)gridDim.x) {
        const Item it = item<S>(work, number);
        const bool columns = S::product == WEIGHT && o.dbias && it.n0 == 0;
        ColumnTotal<S> column_total;
        total.begin();
        for (int step = it.first; step < it.last; step += S::CHAIN) {
            const int left = it.last - step;
            const int steps = left < S::CHAIN ? left : S::CHAIN;
            if (columns) {
                multiply_chain<S, true>(sum, at, ring, row, steps);
                column_total.add(sum);
            } else {
                multiply_chain<S, false>(sum, at, ring, row, steps);
            }
#pragma unroll
            for (int i = 0; i < S::EACH; i++) total.add(i, sum.of[i / (S::BN / 2)][i % (S::BN / 2)], step == it.first);
        }
        total.finish();
        Output mine = o;
        if (S::product == WEIGHT) mine.grad += (int64_t)it.part * work.M * work.N;
        if (columns) column_total.write(o.dbias + (int64_t)it.part * work.M, work.parts > 1, it.m0 + row, work.M);
#pragma unroll
        for (int i = 0; i < S::SLICES; i++)
            write_slice<S>(mine, at.staging + consumer * STAGING, total, i, consumer, it.m0 + row + i * SLICE, it.n0,
                           work.M, work.N);
    }
}

template <class S>
__global__ void __launch_bounds__(THREADS, 1)
    product_sm90(Output o, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, Work work) {
    SHARED_TILES(float, all);
    const Places<S> at(all);
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init(at.full + i, 1);
            barrier_init(at.empty + i, CONSUMERS * WARPGROUP / WARP);
        }
        barrier_init_fence();
    }
    if (S::ONES > 0) {
        const Shared<uint32_t> ones = shared_cast<uint32_t>(at.ones);
        for (int i = (int)threadIdx.x; i < S::ONES / 2; i += THREADS) ones[i] = pack_bf16(1.0f, 1.0f);
        fence_async();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_give<24>();
        if (warp_index() == 0 && elected()) produce<S>(at, a, b, work);
    } else {
        registers_take<240>();
        consume<S>(at, o, work, warp_index() / 4 - 1);
    }
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

#ifdef __CUDACC__
const int only_tiling = -1, blocks_at_most = SMS, least_rows = 512;
#else
/* For the tests: small products on every tiling, several tiles a block, several parts. */
int only_tiling = -1, blocks_at_most = SMS, least_rows = 512;
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
constexpr Sides SIDES[] = {{128, 256, 1.0}, {256, 128, 1.0}, {128, 192, 0.97}, {128, 128, 0.88}};
enum { TILINGS = 4 };

/* Steps of k, at the peak, that writing a tile takes. */
const double WRITING = 4.0;

/* Of the rows, and of all tiles together: 64 KB each, so never more than 135 MB. */
enum { MOST_PARTS = 16, MOST_PART_TILES = 16 * SMS };

/* Of products that take as long the first.  The order of sums knows the parts alone, which only WEIGHT has. */
Choice choose(int product, int M, int N, int K) {
    const int64_t steps = divide_up(K, BK), most_parts = product == WEIGHT ? divide_up(K, least_rows) : 1;
    Choice best = {TILINGS - 1, 1};
    double least = 1e300;
    for (int i = product == WEIGHT ? TILINGS - 1 : 0; i < TILINGS; i++) {
        if (only_tiling >= 0 && i != only_tiling && product != WEIGHT) continue;
        const int64_t tiles = divide_up(M, SIDES[i].bm) * divide_up(N, SIDES[i].bn);
        for (int parts = 1; parts <= most_parts && parts <= MOST_PARTS; parts++) {
            if (parts > 1 && tiles * parts > MOST_PART_TILES) break;
            const double waves = (double)divide_up(tiles * parts, SMS);
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

template <Product product, int tiling, int STAGES>
void run(const ProductSm90 &p, const Output &o, int each) {
    using S = Tiling<product, SIDES[tiling].bm, SIDES[tiling].bn, STAGES>;
    const TensorMap a = tensor_map(p.a, p.a_rows, p.a_cols, p.a_ld, S::A_BY_K ? BK : S::BM, TILE_WIDTH);
    const TensorMap b = tensor_map(p.b, p.b_rows, p.b_cols, p.b_ld, S::B_BY_K ? BK : S::BN, TILE_WIDTH);
    Work work = {p.M, p.N, (int)divide_up(p.K, BK), each, 0, (int)divide_up(p.M, S::BM), (int)divide_up(p.N, S::BN), 0};
    work.parts = (int)divide_up(work.steps, each);
    work.items = work.tiles_m * work.tiles_n * work.parts;
    Grid grid(work.items < blocks_at_most ? work.items : blocks_at_most, THREADS, S::BYTES, p.op);
    grid.sm90 = true;
    launch(grid, product_sm90<S>, o, a, b, work);
}

template <Product product>
void run(const ProductSm90 &p, const Output &o) {
    const int each = part_steps(p.K, 1);
    switch (choose(product, p.M, p.N, p.K).tiling) {
        case 0:
            return run<product, 0, 3>(p, o, each);
        case 1:
            return run<product, 1, 3>(p, o, each);
        case 2:
            return run<product, 2, 5>(p, o, each);
        default:
            return run<product, 3, 6>(p, o, each);
    }
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

#ifndef __CUDACC__
extern "C" void OPERATOR(emulate_tiling)(int tiling, int blocks, int rows) {
    only_tiling = tiling, blocks_at_most = blocks, least_rows = rows;
}
#endif

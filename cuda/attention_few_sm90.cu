/* attention_few_sm90.cu -- attention over pages on Hopper where they are few: a step of decoding, one kernel.
 *
 * Weights of a page must know the greatest score of those before, and sums of pages are added in order; that takes
 * attention_paged.cu three kernels, or two.  Here the eight blocks of a cluster have the pages of a row's head, a warp
 * each, and tell each other: first the greatest score of each page, then its sums, of which every block adds those of
 * eight values of the head.  Scores and weights stay in registers.
 *
 * What a kernel of decoding takes is waiting.  Keys and values of earlier steps were there before the host told of this
 * one, so they come by TMA while kernels in front still run; behind the wait for those come only the queries, the new
 * keys and values, two chains of four products, and two times the way from block to block. */
#include "attention_paged.cuh"
#include "prim_sm90.cuh"

namespace {

enum { W = TILE_WIDTH, CLUSTER = 8, QUERIES = 16, STRIP = W / CLUSTER, TILE = KEY_BLOCK * W, FULL = TILE_WARPS };
enum { MAXIMA, OUTPUTS, TOLD }; /* what blocks tell each other of: an mbarrier each */
static_assert(MOST_CLUSTER_PAGES == CLUSTER * TILE_WARPS, "a page a warp");
static_assert((int)KEY_BLOCK == (int)TILE_WIDTH, "a page of a head is a square tile of keys and one of values");

/* The shared memory of a block. */
struct Room {
    Shared<bf16> keys, values;      /* of this warp's page */
    Shared<bf16> queries;           /* QUERIES rows */
    Shared<float> maxima, weights;  /* (page, query): the greatest score, in factors of 2; the sum of the weights */
    Shared<float> outputs;          /* (page, query, STRIP): the sums of this block's values */
    Shared<uint64_t> full, told_of; /* of this warp's page; MAXIMA, OUTPUTS */

    static constexpr size_t ROWS = (size_t)MOST_CLUSTER_PAGES * QUERIES;
    static constexpr size_t TILES = (size_t)(2 * TILE_WARPS * TILE + QUERIES * W) * sizeof(bf16);
    static constexpr size_t BYTES = TILES + ROWS * (2 + STRIP) * sizeof(float) + (FULL + TOLD) * sizeof(uint64_t);

    __device__ explicit Room(Shared<bf16> all)
        : keys(all + warp_index() * 2 * TILE),
          values(keys + TILE),
          queries(all + 2 * TILE_WARPS * TILE),
          maxima(shared_cast<float>(queries + QUERIES * W)),
          weights(maxima + ROWS),
          outputs(weights + ROWS),
          full(shared_cast<uint64_t>(outputs + ROWS * STRIP) + warp_index()),
          told_of(full - warp_index() + FULL) {}
};

/* Of a lane that holds x[r] of row r * 8 + lane / 4: that of row lane % 16, to all blocks. */
__device__ void tell_all(Shared<float> to, const float (&x)[2], int rows, Shared<uint64_t> told_of) {
    const int row = lane_index() % QUERIES;
    const float upper = shuffle(x[0], row % 8 * 4), lower = shuffle(x[1], row % 8 * 4);
    if (row >= rows) return;
#pragma unroll
    for (int rank = lane_index() / QUERIES; rank < CLUSTER; rank += WARP / QUERIES)
        store_async(to + row, row < 8 ? upper : lower, told_of, rank);
}

/* This warp's page was loaded without the new keys and values: they take their places, and zeros those behind the last
 * that a product of 16 keys reads. */
__device__ void add_new(const Room &room, const Cached<bf16> &keys, const Part &part, int k0, int count) {
    const int first = part.past > k0 ? part.past - k0 : 0, end = (count + 15) / 16 * 16;
    for (int i = first * (W / CHUNK) + lane_index(); i < end * (W / CHUNK); i += WARP) {
        const int row = i / (W / CHUNK), chunk = i % (W / CHUNK);
#pragma unroll
        for (int side = 0; side < 2; side++) {
            uint4 x = {0, 0, 0, 0};
            if (row < count) x = *reinterpret_cast<const uint4 *>(keys.fresh(side, k0 + row) + chunk * CHUNK);
            shared_cast<uint4>(chunk_at<W>(side ? room.values : room.keys, row, chunk))[0] = x;
        }
    }
}

/* Queries row0 .. row0 + 15 and this warp's page: their scores; the greatest of each query goes to all blocks. */
__device__ void score(float (&s)[1][KEY_BLOCK / 8][4], const Room &room, const Paged &p, const Part &part, int page,
                      int row0, int rows) {
    float top[2];
    int seen[1][2];
    multiply_rows<W>(s, room.queries, 0, room.keys, 0, KEY_BLOCK, W / 16);
#pragma unroll
    for (int r = 0; r < 2; r++) seen[0][r] = part.past + row_of(row0, r) / p.group() + 1 - page * KEY_BLOCK;
    hide(s, seen);
    greatest_of_page(top, s, p.factor);
    tell_all(room.maxima + page * QUERIES, top, rows, room.told_of + MAXIMA);
}

/* Their weights, and sums of weights and values, to the blocks that add them. */
__device__ void weigh_values(float (&s)[1][KEY_BLOCK / 8][4], const Room &room, const Paged &p, int page, int rows,
                             int count) {
    Softmax<1> softmax = {};
    float keep[1][2];
    uint32_t rounded[1][KEY_BLOCK / 16][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = row_of(0, r);
        auto greatest = [&](int before) -> float { return room.maxima[before * QUERIES + row]; };
        softmax.max[0][r] = max_before(greatest, page, row < rows);
    }
    weigh(softmax, keep, s, p.factor);
    round_weights(rounded, s);
#pragma unroll
    for (int n = 0; n < W / 16; n++) {
        float c[1][2][4];
        values_of_block<W>(c, rounded, room.values, n, count);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                if (row_of(0, r) < rows)
                    store_async(room.outputs + ((page * QUERIES + row_of(0, r)) * STRIP + column_of(0, 0)),
                                c[0][half][2 * r], c[0][half][2 * r + 1], room.told_of + OUTPUTS, 2 * n + half);
        __syncwarp(); /* products want all lanes together */
    }
    const float sums[2] = {softmax.sum[0][0], softmax.sum[0][1]};
    tell_all(room.weights + page * QUERIES, sums, rows, room.told_of + OUTPUTS);
}

/* This block's values of the outputs, a thread each. */
__device__ void add_values(const Room &room, const Paged &p, const Part &part, int row0, int rows) {
    const int i = (int)threadIdx.x / STRIP, c = (int)threadIdx.x % STRIP, token = (row0 + i) / p.group();
    static_assert(TILE_THREADS == QUERIES * STRIP, "as many as there are");
    if (i >= rows) return;
    const float out = over_pages((part.past + token) / KEY_BLOCK + 1,
                                 [&](int page) -> float { return room.maxima[page * QUERIES + i]; },
                                 [&](int page) -> float { return room.weights[page * QUERIES + i]; },
                                 [&](int page) -> float { return room.outputs[(page * QUERIES + i) * STRIP + c]; });
    from_float(part.head_out(p, token, part.kv * p.group() + (row0 + i) % p.group())[part.slot * STRIP + c], out);
}

/* Queries row0 .. of this row's tokens and this head's group, 16 at most, to shared memory: a chunk a thread. */
__device__ void fetch_queries(const Room &room, const Paged &p, const Part &part, int row0, int rows) {
    const int i = (int)threadIdx.x / (W / CHUNK), chunk = (int)threadIdx.x % (W / CHUNK), row = row0 + i;
    static_assert(TILE_THREADS == QUERIES * (W / CHUNK), "as many as there are");
    const act *q = part.head(p, i < rows ? row / p.group() : 0, part.kv * p.group() + (i < rows ? row % p.group() : 0));
    copy_async(chunk_at<W>(room.queries, i, chunk), (const bf16 *)q + chunk * CHUNK, i < rows ? 16 : 0);
    copy_async_commit();
}

__device__ int rows_of_round(int row0, int all) { return all - row0 < QUERIES ? all - row0 : QUERIES; }

/* What the pages bring in the round from row0 on: to be said once a round, by one thread. */
__device__ void expect(const Room &room, int pages, int row0, int all) {
    const int bytes = pages * rows_of_round(row0, all) * (int)sizeof(float);
    barrier_expect(room.told_of + MAXIMA, bytes), barrier_expect(room.told_of + OUTPUTS, (STRIP + 1) * bytes);
}

/* As score_pages of attention_paged.cu and what comes behind it.  The blocks of a cluster begin together: `mine` is
 * there or on its way. */
__device__ void attend_few(const Room &room, const Paged &p, const Part &part, const Cached<bf16> &keys, int page) {
    const bool mine = page < part.pages();
    const int k0 = page * KEY_BLOCK, count = mine ? part.keys(page) : 0, all = part.count * p.group();
    for (int row0 = 0; row0 < all; row0 += QUERIES) {
        const int rows = rows_of_round(row0, all);
        const uint32_t parity = (uint32_t)(row0 / QUERIES % 2);
        fetch_queries(room, p, part, row0, rows);
        if (mine && row0 == 0) {
            barrier_wait(room.full, 0);
            if (k0 + count > part.past) add_new(room, keys, part, k0, count);
        }
        if (row0 == 0) keys.write(part, CLUSTER); /* while the queries come */
        copy_async_wait<0>();
        __syncthreads();
        float s[1][KEY_BLOCK / 8][4];
        if (mine) score(s, room, p, part, page, row0, rows);
        barrier_wait(room.told_of + MAXIMA, parity);
        if (mine) weigh_values(s, room, p, page, rows, count);
        barrier_wait(room.told_of + OUTPUTS, parity);
        add_values(room, p, part, row0, rows);
        if (row0 + QUERIES >= all) return;
        cluster_sync(); /* what all blocks were told is read, and may be written over */
        if (threadIdx.x == 0) expect(room, part.pages(), row0 + QUERIES, all);
    }
}

__global__ void __launch_bounds__(TILE_THREADS, 2)
    write_and_attend_few(const __grid_constant__ TensorMap pages, Paged p) {
    SHARED_TILES(bf16, all);
    const Room room(all);
    launch_next();
    const Part part(p);
    const Cached<bf16> keys(p, part);
    const int page = part.slot + warp_index() * CLUSTER;
    const bool first_head = part.h % p.group() == 0, few = first_head && part.count > 0 && part.count <= FEW;
    if (lane_index() == 0) barrier_init(room.full, 1);
    if (threadIdx.x == 0)
        for (int i = 0; i < TOLD; i++) barrier_init(room.told_of + i, 1);
    if (lane_index() == 0) barrier_init_fence();
    cluster_sync();
    if (few && threadIdx.x == 0) expect(room, part.pages(), 0, part.count * p.group());
    if (few && page < part.pages() && lane_index() == 0) {
        const int row = (told(p.table + (int64_t)part.r * p.P + page) * p.NKV + part.kv) * 2 * KEY_BLOCK;
        barrier_expect(room.full, 2 * TILE * (int)sizeof(bf16));
        tile_load_told(room.keys, pages, room.full, row, 0);
        tile_load_told(room.values, pages, room.full, row + KEY_BLOCK, 0);
    }
    wait_earlier();
    if (few) return attend_few(room, p, part, keys, page);
    if (part.count <= FEW) return;
    if (first_head) keys.write(part, CLUSTER);
    attend_tiles<W, sizeof(act) == 2>(p, part, keys);
}

}  // namespace

extern "C" void OPERATOR(attention_few_sm90)(act *out, void *pages, const act *qkv, const int32_t *table,
                                             const int32_t *first, const int32_t *past, int R, int P, int NH, int NKV,
                                             const char *op) {
    const Paged p = paged(out, pages, qkv, table, first, past, R, P, NH, NKV, W, CLUSTER);
    const size_t bytes = Room::BYTES > Shape<W>::BYTES ? Room::BYTES : Shape<W>::BYTES;
    Grid grid((int64_t)R * NH * CLUSTER, TILE_THREADS, bytes, op);
    grid.sm90 = true, grid.cluster = CLUSTER;
    launch_early(grid, write_and_attend_few, tensor_map((const bf16 *)pages, INT32_MAX, W, W, KEY_BLOCK, W), p);
}

/* attention_sm90.cuh -- what attention on Hopper and its gradient share: tiles of 64 rows of a head, their products,
 * and the seat of each warpgroup. */
#pragma once
#include "attention.cuh"
#include "prim_sm90.cuh"

namespace {

/* A block has a warpgroup with the producer, and consumers of which each has 64 of an item's 128 rows. */
enum { CONSUMERS = 2, THREADS = (1 + CONSUMERS) * WARPGROUP, SLICE = 64, ROWS = CONSUMERS * SLICE };
enum { TILE = SLICE * TILE_WIDTH };  /* values of 64 rows of 64 values */
enum { ITEMS = 2 };                  /* whose rows are there: of the one at work, and of the next */
enum { LINES = 8 * TILE_WIDTH * 2 }; /* bytes of 8 rows of a tile */
enum { SMS = 132 };                  /* of an H100 or H200 */
static_assert((int)KEY_BLOCK == (int)SLICE, "one form of tile for all");

/* Registers of a thread of the producer's group, which goes through runs of documents, and of a consumer. */
enum { PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232 };

/* By one thread: 64 rows of head h, from t on; zeros behind the last of the batch's row b. */
template <int W>
__device__ void fetch(Shared<bf16> to, const TensorMap &map, Shared<uint64_t> full, int b, int h, int t) {
    for (int c = 0; c < W; c += TILE_WIDTH) tile_load(to + c * SLICE, map, full, t, h * W + c, b);
}
/* And the other way; then tile_store_commit. */
template <int W>
__device__ void send(const TensorMap &map, Shared<bf16> from, int b, int h, int t) {
    for (int c = 0; c < W; c += TILE_WIDTH) tile_store(map, from + c * SLICE, t, h * W + c, b);
}

/* The same number, of which the compiler learns here that all lanes of the warp have it: what describes an operand is
 * then computed once for a warp, in half of the instructions. */
__device__ inline int of_warp(int x) { return shuffle(x, 0); }

/* Rows of a tile as an operand whose rows are m or n; and as one whose rows are k. */
__device__ inline uint64_t rows_of(Shared<bf16> tile) { return operand(tile, 16, LINES); }
__device__ inline uint64_t columns_of(Shared<bf16> tile) { return operand(tile, TILE * (int)sizeof(bf16), LINES); }

/* s (64, 64) = A B^T, one chain over W columns */
template <int W>
__device__ void multiply_slices(Sums<SLICE> &s, Shared<bf16> A, Shared<bf16> B) {
#pragma unroll
    for (int k = 0; k < W; k += 16) {
        const int tile = k / TILE_WIDTH * TILE, bytes = k % TILE_WIDTH * 2;
        const uint64_t a = operand_behind(rows_of(A + tile), bytes), b = operand_behind(rows_of(B + tile), bytes);
        if (k == 0) wgmma<false, false, false>(s, a, b);
        else wgmma<false, false, true>(s, a, b);
    }
}

/* c (64, 64) = or += P B, P in registers, one chain over the rows of the tile B */
template <bool add>
__device__ void multiply_weights(Sums<SLICE> &c, const uint32_t (&p)[1][SLICE / 16][4], Shared<bf16> B) {
    const uint64_t b = columns_of(B);
#pragma unroll
    for (int k = 0; k < SLICE / 16; k++) {
        if (!add && k == 0) wgmma_rows<true, false>(c, p[0][k], b);
        else wgmma_rows<true, true>(c, p[0][k], operand_behind(b, k * 2 * LINES));
    }
}

/* This warp's 16 rows of a tile, from `row` on, of which a lane has two as a left operand. */
__device__ inline void stage_rounded(Shared<bf16> tile, int row, const uint32_t (*x)[4]) {
    const int lane = from_here(lane_index()), at = row + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int k = 0; k < TILE_WIDTH / 16; k++) store_matrices(tile + tile_place(at, 16 * k + lane / 16 * 8), x[k]);
}

/* The same of sums: x[4 n + e] as Sums have them, rounded, times the factor of its row. */
template <class X>
__device__ void stage_tile(Shared<bf16> tile, int row, const X &x, float upper, float lower) {
    uint32_t m[TILE_WIDTH / 16][4];
#pragma unroll
    for (int k = 0; k < TILE_WIDTH / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int j = 8 * k + i / 2 * 4 + i % 2 * 2;
            const float factor = i % 2 ? lower : upper;
            m[k][i] = pack_bf16(x(j) * factor, x(j + 1) * factor);
        }
    stage_rounded(tile, row, m);
}

__device__ inline void sync_consumer(int consumer) {
    if (consumer == 0) sync_group<1>(WARPGROUP);
    else sync_group<2>(WARPGROUP);
}

#ifdef __CUDACC__
inline int blocks_at_most() { return sm_count(); }
#else
int emulated_blocks = SMS; /* for the tests: several items a block */
inline int blocks_at_most() { return emulated_blocks; }
#endif

inline int blocks_for(int items) {
    const int most = blocks_at_most();
    return items < most ? items : most;
}

inline Grid blocks_that_stay(int items, size_t bytes, const char *op) {
    Grid grid(blocks_for(items), THREADS, bytes, op);
    grid.sm90 = true;
    return grid;
}

}  // namespace

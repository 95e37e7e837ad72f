/* emulation_sm90.cu -- as emulation.cu, for the words of cuda/prim_sm90.cuh. */
#include "../cuda/runtime.h"
#include "../cuda/prim_sm90.cuh"

namespace {

/* Faults that are planted, see test_emulate_sm90.py; 0 is none. */
enum Fault {
    NONE,
    NO_BARRIER,
    NO_INIT_FENCE,
    NOT_MADE,
    WRONG_PARITY,
    NO_FULL_WAIT,
    NO_EMPTY_WAIT,
    EARLY_RELEASE,
    TOO_FEW_BYTES,
    TOO_MANY_BYTES,
    TOO_MANY_ARRIVALS,
    NOT_ALIGNED,
    SHARED_END,
    BLOCK_ENDS,
    NO_ASYNC_FENCE,
    OVERWRITTEN,
    UNDER_WAY,
    NOT_WRITTEN,
    TOUCHED,
    NO_FENCE,
    NO_COMMIT,
    NO_PRODUCT_WAIT,
    LANES_DIFFER,
    TOO_MUCH_SHARED,
    TOO_MANY_REGISTERS,
    GIVES_MORE,
    ROWS_CHANGED,
    OTHER_RANK,
    OTHER_BLOCK,
    NO_CLUSTER_SYNC,
    LEAVES,
    NOT_TOLD
};

enum { THREADS = 64, ROWS = 8, TILE = ROWS * TILE_WIDTH, STAGES = 2 };
enum { TELLERS = 4 };
enum { BARRIERS = 3 * TILE }; /* values before them: a tile more than the stages, for what is not aligned */

/* to (rows, cols) = from, a tile of 8 rows after the other, by way of a ring of two stages that one thread fills; the
 * tile begins at column `column`, and what the matrix lacks comes as zeros: to is (rounds * 8, width).  which: of
 * several matrices, or -1. */
template <int width>
__global__ void copy_tiles(bf16 *to, const __grid_constant__ TensorMap from, int rounds, int column, int which,
                           int fault) {
    SHARED_TILES(bf16, all);
    const Shared<uint64_t> full = shared_cast<uint64_t>(all + BARRIERS), empty = full + STAGES;
    const int t = (int)threadIdx.x, bytes = ROWS * width * (int)sizeof(bf16);
    if (t == 0) {
        for (int i = 0; i < STAGES; i++) {
            if (fault != NOT_MADE || i == 0) barrier_init(full + i, 1);
            barrier_init(empty + i, THREADS / WARP);
        }
        if (fault != NO_INIT_FENCE) barrier_init_fence();
    }
    if (fault != NO_BARRIER) __syncthreads();
    const auto fetch = [&](int round) {
        const int stage = round % STAGES;
        if (fault != NO_EMPTY_WAIT) barrier_wait(empty + stage, (uint32_t)(round / STAGES % 2 ^ 1));
        barrier_expect(full + stage, fault == TOO_FEW_BYTES ? 16 : fault == TOO_MANY_BYTES ? bytes + 16 : bytes);
        if (fault == TOO_MANY_ARRIVALS) barrier_arrive(full + stage);
        const Shared<bf16> place = all + (fault == SHARED_END ? 3 : stage) * TILE + (fault == NOT_ALIGNED ? 64 : 0);
        if (which < 0) tile_load(place, from, full + stage, round * ROWS, column);
        else tile_load(place, from, full + stage, round * ROWS, column, which);
    };
    if (t == 0) fetch(0);
    for (int round = 0; round < rounds; round++) {
        const int stage = round % STAGES;
        if (t == 0 && round + 1 < rounds) fetch(round + 1);
        if (fault == EARLY_RELEASE && lane_index() == 0) barrier_arrive(empty + stage);
        if (fault != NO_FULL_WAIT)
            barrier_wait(full + stage, (uint32_t)(round / STAGES % 2 ^ (fault == WRONG_PARITY ? 1 : 0)));
        for (int i = t; i < ROWS * width; i += THREADS)
            to[round * ROWS * width + i] = all[stage * TILE + tile_place<width>(i / width, i % width) + i % 8];
        __syncwarp(); /* orders what the lanes read before the arrival of one */
        if (fault != EARLY_RELEASE && lane_index() == 0) barrier_arrive(empty + stage);
    }
    if (fault == BLOCK_ENDS && t == 0) fetch(rounds);
}

/* As copy_tiles, by each of two blocks, which bring every second tile for both: to (2, rounds * 16, 64). */
__global__ void share_tiles(bf16 *to, const __grid_constant__ TensorMap from, int rounds, int fault) {
    SHARED_TILES(bf16, all);
    const Shared<uint64_t> full = shared_cast<uint64_t>(all + 2 * STAGES * TILE), empty = full + STAGES;
    const int t = (int)threadIdx.x, rank = cluster_rank();
    if (t == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + i, 1), barrier_init(empty + i, 2 * THREADS / WARP);
        barrier_init_fence();
    }
    if (fault == NO_CLUSTER_SYNC) __syncthreads();
    else cluster_sync();
    for (int round = 0; round < rounds; round++) {
        const int stage = round % STAGES, parity = round / STAGES % 2;
        const Shared<bf16> place = all + 2 * stage * TILE;
        if (t == 0) {
            if (fault != NO_EMPTY_WAIT) barrier_wait(empty + stage, (uint32_t)(parity ^ 1));
            barrier_expect(full + stage, (fault == TOO_FEW_BYTES ? 1 : 2) * TILE * (int)sizeof(bf16));
            tile_load_all(place + rank * TILE, from, full + stage, (2 * round + rank) * ROWS, 0);
        }
        if (fault != NO_FULL_WAIT) barrier_wait(full + stage, (uint32_t)parity);
        for (int i = t; i < 2 * TILE; i += THREADS)
            to[(rank * rounds + round) * 2 * TILE + i] = place[tile_place(i / TILE_WIDTH, i % TILE_WIDTH) + i % 8];
        __syncwarp();
        if (lane_index() < 2)
            barrier_arrive_at(empty + stage, fault == OTHER_RANK ? 2 : fault == OTHER_BLOCK ? rank : lane_index());
    }
    if (fault != LEAVES) cluster_sync();
}

/* Of four blocks, which begin early, each tells all of the first number x of its tile of `from`, of 2 x and of 3 x: to
 * (4, 4, 3). */
__global__ void tell_numbers(float *to, const __grid_constant__ TensorMap from, int fault) {
    SHARED_TILES(bf16, tile);
    const Shared<float> numbers = shared_cast<float>(tile + TILE);
    const Shared<uint64_t> full = shared_cast<uint64_t>(numbers + 4 * TELLERS), told_of = full + 1;
    const int t = (int)threadIdx.x, rank = cluster_rank();
    if (t == 0) barrier_init(full, 1), barrier_init(told_of, 1), barrier_init_fence();
    if (fault == NO_CLUSTER_SYNC) __syncthreads();
    else cluster_sync();
    if (t == 0) {
        barrier_expect(told_of, (fault == TOO_FEW_BYTES ? 2 : 3) * TELLERS * (int)sizeof(float));
        barrier_expect(full, TILE * (int)sizeof(bf16));
        if (fault == NOT_TOLD) tile_load(tile, from, full, rank * ROWS, 0);
        else tile_load_told(tile, from, full, rank * ROWS, 0);
    }
    wait_earlier();
    barrier_wait(full, 0);
    if (t < TELLERS) {
        const float x = to_float(tile[tile_place(0, 0)]);
        store_async(numbers + 4 * rank, x, 2 * x, told_of, fault == OTHER_RANK ? t + 1 : t);
        store_async(numbers + (4 * rank + 2), 3 * x, told_of, t);
    }
    if (fault == LEAVES && rank == 1) return;
    if (fault != NO_FULL_WAIT) barrier_wait(told_of, 0);
    if (t < 3 * TELLERS) to[3 * TELLERS * rank + t] = numbers[t / 3 * 4 + t % 3];
}

/* to (rows, cols) = from (rounds * 8, width), by way of one tile; what lies outside is not written. */
template <int width>
__global__ void store_tiles(const __grid_constant__ TensorMap to, const bf16 *from, int rounds, int column, int which,
                            int fault) {
    SHARED_TILES(bf16, tile);
    const int t = (int)threadIdx.x;
    for (int round = 0; round < rounds; round++) {
        if (t == 0 && fault != OVERWRITTEN) tile_store_wait_read<0>();
        __syncthreads();
        for (int i = t; i < ROWS * width; i += THREADS)
            if (fault != NOT_WRITTEN || i != 77)
                tile[tile_place<width>(i / width, i % width) + i % 8] = from[round * ROWS * width + i];
        if (fault != NO_ASYNC_FENCE) fence_async();
        if (fault != NO_BARRIER) __syncthreads();
        if (t > 0) continue;
        if (which < 0) tile_store(to, tile, round * ROWS, column);
        else tile_store(to, tile, round * ROWS, column, which);
        tile_store_commit();
    }
    if (t == 0 && fault != UNDER_WAY) tile_store_wait_read<0>();
}

/* d (64, N) = a (64, K) b (K, N), K 64 or 128, two stages; what each lane holds is written as prim_sm90.cuh says.
 * Without TMA: threads write the operands themselves, rows of `a` and columns of `b`, or, by k, rows of their
 * transposes. */
template <int N, bool a_by_k, bool b_by_k>
__global__ void product(float *d, const bf16 *a, const bf16 *b, int K, int fault) {
    SHARED_TILES(bf16, all);
    const Shared<bf16> a_tile = all, b_tile = all + 64 * TILE_WIDTH;
    const int t = (int)threadIdx.x;
    Sums<N> sum;
    for (int k0 = 0; k0 < K; k0 += 64) {
        if (fault != NO_PRODUCT_WAIT) wgmma_wait<0>();
        __syncthreads(); /* all have read what is written over */
        for (int i = t; i < 64 * 64; i += WARPGROUP) {
            const int m = i / 64, k = i % 64;
            a_tile[(a_by_k ? tile_place(k, m) + m % 8 : tile_place(m, k) + k % 8)] = a[m * K + k0 + k];
        }
        for (int i = t; i < N * 64; i += WARPGROUP) {
            const int n = i / 64, k = i % 64;
            b_tile[b_by_k ? n / 64 * 64 * 64 + tile_place(k, n % 64) + n % 8 : tile_place(n, k) + k % 8] =
                b[n * K + k0 + k];
        }
        if (fault != NO_ASYNC_FENCE) fence_async();
        if (fault != NO_BARRIER) __syncthreads();
        const uint64_t a_part = operand(a_tile, a_by_k ? 8192 : 16, 1024), b_part = operand(b_tile, 8192, 1024);
        if (fault != NO_FENCE) wgmma_fence();
        for (int k = 0; k < 64; k += 16) {
            const uint64_t a16 = operand_behind(a_part, a_by_k ? k * 128 : k * 2);
            const uint64_t b16 =
                operand_behind(b_part, (b_by_k ? k * 128 : k * 2) + (fault == LANES_DIFFER ? t / 8 * 16 : 0));
            if (k0 + k == 0) wgmma<a_by_k, b_by_k, false>(sum, a16, b16);
            else wgmma<a_by_k, b_by_k, true>(sum, a16, b16);
        }
        if (fault != NO_COMMIT) wgmma_commit();
    }
    if (fault != TOUCHED) wgmma_wait<0>();
    const int row = t / WARP * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
    for (int i = 0; i < N / 2; i++) d[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = sum[i];
}

/* d (64, 64) = a (64, K) b (K, 64), K 16 or 32, of which a comes in registers and b by k. */
__global__ void product_of_rows(float *d, const bf16 *a, const bf16 *b, int K, int fault) {
    SHARED_TILES(bf16, tile);
    const int t = (int)threadIdx.x, row = t / WARP * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
    for (int i = t; i < 64 * K; i += WARPGROUP) tile[tile_place(i % K, i / K) + i / K % 8] = b[i];
    fence_async();
    __syncthreads();
    uint32_t rows[2][4];
    for (int k = 0; k < K; k += 16)
        for (int i = 0; i < 4; i++)
            memcpy(&rows[k / 16][i], a + (row + i % 2 * 8) * K + k + i / 2 * 8 + column, sizeof rows[0][0]);
    const uint64_t part = operand(tile, 8192, 1024);
    Sums<64> sum;
    wgmma_fence();
    wgmma_rows<true, false>(sum, rows[0], part);
    if (K > 16) wgmma_rows<true, true>(sum, rows[1], operand_behind(part, 16 * 128));
    wgmma_commit();
    if (fault == ROWS_CHANGED) rows[0][3]++;
    wgmma_wait<0>();
    for (int i = 0; i < 32; i++) d[(row + i % 4 / 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = sum[i];
}

/* Row i of `to` (32, 8): the chunk that lane i brings the address of, when each lane gives 4 times its number and 0
 * .. 3. */
__global__ void matrices(uint32_t *to) {
    SHARED_TILES(bf16, all);
    const int lane = lane_index();
    uint32_t m[4];
    for (int i = 0; i < 4; i++) m[i] = (uint32_t)(8 * lane + 2 * i) | (uint32_t)(8 * lane + 2 * i + 1) << 16;
    store_matrices(all + lane * 8, m);
    __syncwarp();
    for (int i = 0; i < 8; i++) {
        const bf16 x = all[lane * 8 + i];
        to[lane * 8 + i] = x.bits;
    }
}

/* to[0] = how many lanes of three warpgroups are elected */
enum { GROUPS = 3 * WARPGROUP };
__global__ void __launch_bounds__(GROUPS, 1) elect(int *to, int fault) {
    SHARED_TILES(int, found);
    if (threadIdx.x < WARPGROUP) {
        if (fault == GIVES_MORE) registers_give<176>();
        registers_give<24>();
    } else if (fault == TOO_MANY_REGISTERS) {
        registers_take<256>();
    } else {
        registers_take<240>();
    }
    found[threadIdx.x] = 0;
    if (elected()) found[threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x > 0) return;
    int sum = 0;
    for (int i = 0; i < GROUPS; i++) sum += found[i];
    to[0] = sum;
}

Grid grid(int threads, size_t shared, const char *op = __builtin_FUNCTION()) {
    Grid g(1, threads, shared, op);
    g.sm90 = true;
    return g;
}

template <int N, bool a_by_k, bool b_by_k>
void run_product(float *d, const bf16 *a, const bf16 *b, int K, int fault, const char *op) {
    const size_t bytes = (64 + (N + 63) / 64 * 64) * TILE_WIDTH * sizeof(bf16);
    launch(grid(WARPGROUP, fault == TOO_MUCH_SHARED ? 233472 : bytes, op), product<N, a_by_k, b_by_k>, d, a, b, K,
           fault);
}

}  // namespace

extern "C" {
/* which: -1, of one matrix; else of three */
void emulation_copy_tiles(bf16 *to, const bf16 *from, int rows, int cols, int ld, int rounds, int column, int which,
                          int width, int fault) {
    const int count = (which < 0) == (fault == OTHER_RANK) ? 3 : 0;
    const TensorMap map = tensor_map(from, rows, cols, ld, ROWS, width, count);
    const auto kernel = width == 64 ? copy_tiles<64> : copy_tiles<32>;
    launch(grid(THREADS, BARRIERS * 2 + 2 * STAGES * 8, __func__), kernel, to, map, rounds, column, which, fault);
}
void emulation_share_tiles(bf16 *to, const bf16 *from, int rows, int rounds, int fault) {
    Grid g = grid(THREADS, 2 * STAGES * TILE * 2 + 2 * STAGES * 8);
    g.blocks = g.cluster = 2;
    launch(g, share_tiles, to, tensor_map(from, rows, 64, 64, ROWS, 64), rounds, fault);
}
void emulation_tell_numbers(float *to, const bf16 *from, int fault) {
    Grid g = grid(THREADS, TILE * 2 + 4 * TELLERS * sizeof(float) + 2 * 8);
    g.blocks = g.cluster = TELLERS;
    launch_early(g, tell_numbers, to, tensor_map(from, TELLERS * ROWS, 64, 64, ROWS, 64), fault);
}
void emulation_store_tiles(bf16 *to, const bf16 *from, int rows, int cols, int ld, int rounds, int column, int which,
                           int width, int fault) {
    const TensorMap map = tensor_map(to, rows, cols, ld, ROWS, width, which < 0 ? 0 : 3);
    const auto kernel = width == 64 ? store_tiles<64> : store_tiles<32>;
    launch(grid(THREADS, TILE * 2, __func__), kernel, map, from, rounds, column, which, fault);
}
void emulation_product(float *d, const bf16 *a, const bf16 *b, int N, int K, int by_k, int fault) {
    const char *op = __func__;
    if (N == 8 && by_k == 3) run_product<8, true, false>(d, a, b, K, fault, op);
    if (N == 64 && by_k == 0) run_product<64, false, false>(d, a, b, K, fault, op);
    if (N == 128 && by_k == 0) run_product<128, false, false>(d, a, b, K, fault, op);
    if (N == 192 && by_k == 1) run_product<192, false, true>(d, a, b, K, fault, op);
    if (N == 160 && by_k == 2) run_product<160, true, true>(d, a, b, K, fault, op);
}
void emulation_product_of_rows(float *d, const bf16 *a, const bf16 *b, int K, int fault) {
    launch(grid(WARPGROUP, 32 * TILE_WIDTH * sizeof(bf16)), product_of_rows, d, a, b, K, fault);
}
void emulation_matrices(uint32_t *to) { launch(grid(WARP, 512), matrices, to); }
void emulation_elect(int *to, int fault) { launch(grid(GROUPS, GROUPS * sizeof(int)), elect, to, fault); }
}

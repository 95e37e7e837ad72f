/* emulation.cu -- small kernels for the tests of the words in cuda/prim.cuh, on a GPU, and of cuda/emulate: each is
 * right, or wrong in the one way that its argument asks for. */
#include "../cuda/runtime.h"

namespace {

enum { THREADS = 64, VEC = 8 };

/* Faults that are planted, see test_cuda.py; 0 is none. */
enum Fault {
    NONE,
    NO_BARRIER,
    NO_WARP_BARRIER,
    NO_WAIT,
    NO_COMMIT,
    NOT_WRITTEN,
    SHARED_END,
    NOT_ALIGNED,
    ARRAY_END,
    LEAVES,
    TWO_BARRIERS,
    HALF_A_WARP,
    TOO_FEW,
    OVERWRITTEN,
    SHUFFLE_ORDERS,
    UNDER_WAY,
    LAST_LEAVES,
    LAST_OVERWRITES,
    ARRAY_FRONT,
    INPUT,
    FORGETS_WAIT,
    LEAVES_EARLY,
    READS_EARLY,
    WRITES_EARLY,
    COPIES_EARLY,
    WAITS_TWICE,
    NOT_EARLY,
    PREFETCH_OFF,
    PREFETCH_SHORT,
    PREFETCH_BEHIND,
    SUM_BEFORE_WRITE,
    SUM_IN_PLAIN,
    SUM_READ_EARLY,
    SUM_OF_NOTHING
};

/* to[i] = from[THREADS - 1 - i] */
__global__ void reverse(int *to, const int *from, int fault) {
    SHARED(int, all, THREADS);
    const int t = (int)threadIdx.x;
    if (fault == LEAVES && t == 5) return;
    if (fault == LAST_LEAVES && t == THREADS - 1) return;
    if (fault != NOT_WRITTEN || t != 7) all[t + (fault == SHARED_END ? 1 : 0)] = from[t + (fault == ARRAY_END ? 1 : 0)];
    if (fault == TWO_BARRIERS && t < WARP) __syncthreads();
    else if (fault != NO_BARRIER) __syncthreads();
    to[t - (fault == ARRAY_FRONT ? 1 : 0)] = all[THREADS - 1 - t];
    if (fault == INPUT && t == 9) const_cast<int *>(from)[t] = 0;
    if (fault == OVERWRITTEN) all[t] = 0;
    if (fault == LAST_OVERWRITES && t == THREADS - 1) all[t] = 0;
}

/* The same within each warp. */
__global__ void reverse_warp(int *to, const int *from, int fault) {
    SHARED(int, all, THREADS);
    const int t = (int)threadIdx.x, other = t / WARP * WARP + WARP - 1 - lane_index();
    all[t] = from[t];
    if (fault == SHUFFLE_ORDERS) shuffle_xor(t, 1);
    else if (fault == HALF_A_WARP && lane_index() < 16) shuffle_xor(t, 1);
    else if (fault != NO_WARP_BARRIER) __syncwarp();
    to[t] = all[other];
}

/* The same through cp.async, `rounds` times THREADS, with two buffers; the last 4 bytes of each round are zeros. */
__global__ void reverse_async(int *to, const int *from, int rounds, int fault) {
    SHARED_DYNAMIC(int, all);
    const int t = (int)threadIdx.x;
    for (int round = 0; round <= rounds; round++) {
        if (round < rounds && t < THREADS / 4)
            copy_async(all + (round % 2 * THREADS + t * 4 + (fault == NOT_ALIGNED ? 1 : 0)),
                       from + round * THREADS + t * 4, t == THREADS / 4 - 1 ? 12 : 16);
        if (fault != NO_COMMIT) copy_async_commit();
        if (round == 0) continue;
        if (fault != NO_WAIT) copy_async_wait<1>();
        if (fault != NO_BARRIER) __syncthreads();
        to[(round - 1) * THREADS + t] = all[(round - 1) % 2 * THREADS + THREADS - 1 - t];
        if (fault != OVERWRITTEN) __syncthreads();
    }
    if (fault == UNDER_WAY && t == 0) copy_async(all, from);
}

/* The first warp writes, the second adds 1; two barriers of the whole block, but by name. */
__global__ void hand_over(int *to, const int *from, int fault) {
    SHARED(int, all, WARP);
    const int lane = lane_index();
    if (warp_index() == 0) all[WARP - 1 - lane] = from[lane];
    if (fault != NO_BARRIER) sync_group<3>(fault == TOO_FEW ? THREADS + WARP : THREADS);
    if (warp_index() == 1) to[lane] = all[lane] + 1;
}

/* to[c] += how many of all blocks' numbers leave c when divided by WARP; behind them the same, counted in 64 bits, and
 * how often a sum was seen on its way, which is once for each number but the first of a class */
__global__ void classes(int *to, const int *from, int fault) {
    SHARED(uint32_t, counts, WARP);
    SHARED(uint32_t, seen, 1);
    const int t = (int)threadIdx.x, c = from[t] % WARP;
    if (t < WARP && (fault != SUM_OF_NOTHING || t != 5)) counts[t] = 0;
    if (t == 0) seen[0] = 0;
    if (fault != SUM_BEFORE_WRITE) __syncthreads();
    if (fault == SUM_IN_PLAIN && t == THREADS - 2) counts[c] += 1;
    else if (add_shared(counts + c, 1) > 0) add_shared(seen, 1);
    if (fault != SUM_READ_EARLY) __syncthreads();
    if (t == 0) add_global((uint32_t *)to + 2 * WARP, seen[0]);
    if (t >= WARP || (fault == SUM_OF_NOTHING && t == 5)) return;
    add_global((uint32_t *)to + t, counts[t]);
    add_global((uint64_t *)to + (WARP + t) / 2, (uint64_t)counts[t] << t % 2 * 32);
}

/* d (16, 8) = a (16, 16) b, where b is (16, 8), or (8, 16) and `flat` */
__global__ void product(float *d, const bf16 *a, const bf16 *b, int flat) {
    SHARED(bf16, a_tile, 16 * 16);
    SHARED(bf16, b_tile, 16 * 16);
    const int lane = lane_index(), width = flat ? 16 : 8;
    for (int i = lane; i < 256; i += WARP) a_tile[i] = a[i], b_tile[i] = bf16{0};
    __syncthreads();
    for (int i = lane; i < 128; i += WARP) b_tile[i / width * 16 + i % width] = b[i];
    __syncthreads();
    uint32_t a_part[4], b_part[4];
    /* matrices: rows 0..7 and 8..15 of columns 0..7, then of columns 8..15 */
    load_matrices(a_part, a_tile + ((lane % 16) * 16 + lane / 16 * 8));
    if (flat) load_matrices(b_part, b_tile + (lane % 8 * 16 + lane / 8 % 2 * 8));
    else load_matrices_transposed(b_part, b_tile + (lane % 16 * 16));
    float sums[4] = {};
    multiply_add(sums, a_part, b_part[0], b_part[1]);
    for (int i = 0; i < 4; i++) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

/* d (16, 8) += a (16, 32) b^T, b (8, 32) */
__global__ void product_of_bytes(int *d, const int8_t *a, const int8_t *b) {
    const int lane = lane_index(), g = lane / 4, q = 4 * (lane % 4);
    auto word = [](const int8_t *p) {
        uint32_t four;
        memcpy(&four, p, sizeof four);
        return four;
    };
    const uint32_t left[4] = {word(a + g * 32 + q), word(a + (g + 8) * 32 + q), word(a + g * 32 + q + 16),
                              word(a + (g + 8) * 32 + q + 16)};
    int sums[4];
    for (int i = 0; i < 4; i++) sums[i] = d[(g + i / 2 * 8) * 8 + q / 2 + i % 2];
    multiply_bytes(sums, left, word(b + g * 32 + q), word(b + g * 32 + q + 16));
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + q / 2 + i % 2] = sums[i];
}

/* Row i of `to` (8, THREADS): what word i makes of from[t], t a thread. */
__global__ void lanes(float *to, const float *from) {
    const int t = (int)threadIdx.x;
    const float x = from[t];
    const float found[8] = {
        shuffle_xor(x, 5), shuffle_up(x, 3),           shuffle(x, 7), (float)shuffle_xor(t, 16),
        warp_sum(x),       (float)warp_sum((double)x), warp_max(x),   (float)(100 * warp_index() + lane_index())};
    for (int i = 0; i < 8; i++) to[i * THREADS + t] = found[i];
}

/* bits = from as bf16, twice: alone, and as the upper of a pair whose lower is 1; power = 2^from */
__global__ void numbers(bf16 *bits, uint32_t *pairs, float *power, const float *from, int n) {
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        from_float(bits[i], from[i]);
        pairs[i] = pack_bf16(1.0f, from[i]);
        power[i] = exp2_fast(from[i]);
    }
}

/* to = from + 1, in packs that begin `skip` values behind the first: of floats, and of bf16 */
template <class T>
__global__ void packs(T *to, const T *from, int skip, int n) {
    for (int i = skip + (int)threadIdx.x * VEC; i < n; i += THREADS * VEC) {
        const Pack<T, VEC> pack = load<VEC>(from + i, n - i);
        float x[VEC];
        for (int j = 0; j < VEC; j++) x[j] = pack[j] + 1.0f;
        store(to + i, x, n - i);
    }
}

/* to[i] = from[i + THREADS, counted in a ring of n] + 1: a block reads what another one of the kernel before wrote. */
__global__ void pass_on(int *to, const int *from, int n, int fault) {
    SHARED(int, all, THREADS);
    const int t = (int)threadIdx.x, begin = (int)blockIdx.x * THREADS, i = begin + t, other = (i + THREADS) % n;
    launch_next();
    if (t == 0) {
        const int bytes = (fault == PREFETCH_SHORT ? THREADS - 1 : THREADS) * (int)sizeof(int);
        prefetch_l2(from + begin + (fault == PREFETCH_OFF ? 1 : 0),
                    (size_t)(fault == PREFETCH_BEHIND ? 2 * bytes : bytes));
    }
    const int early = fault == READS_EARLY ? from[other] : 0;
    if (fault == WRITES_EARLY) to[i] = early;
    if (fault == COPIES_EARLY && t == 0) {
        copy_async(all, from + begin);
        copy_async_commit();
    }
    if (fault == LEAVES_EARLY && t == THREADS - 1) return;
    if (fault != FORGETS_WAIT || t != THREADS - 1) wait_earlier();
    if (fault == WAITS_TWICE) wait_earlier();
    copy_async_wait<0>();
    to[i] = (fault == READS_EARLY ? early : from[other]) + 1;
}

/* From array to array, an odd number of times. */
void pass_along(int *to, const int *from, int n, int times, int fault) {
    int *between = (int *)scratch((size_t)n * sizeof(int));
    for (int i = 0; i < times; i++) {
        Grid grid(n / THREADS, THREADS, 0, "emulation_pass_on");
        grid.early = fault != NOT_EARLY;
        launch(grid, pass_on, i % 2 ? between : to, i == 0 ? from : i % 2 ? (const int *)to : between, n, fault);
    }
}

/* to = 2 from; and behind it, with the other number read before the wait, to += from. */
__global__ void double_of(int *to, const int *from) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    launch_next(), wait_earlier();
    to[i] = 2 * from[i];
}
__global__ void add_told(int *to, const int *from) {
    const int i = (int)(blockIdx.x * THREADS + threadIdx.x);
    launch_next();
    const int x = told(from + i);
    wait_earlier();
    to[i] += x;
}

/* What must not be done: the last block to run is seen. */
__global__ void last_block(int *to) {
    if (threadIdx.x == 0) to[0] = (int)blockIdx.x;
}

}  // namespace

extern "C" {
void emulation_reverse(int *to, const int *from, int fault) { launch(Grid(1, THREADS), reverse, to, from, fault); }
void emulation_reverse_warp(int *to, const int *from, int fault) {
    launch(Grid(1, THREADS), reverse_warp, to, from, fault);
}
void emulation_reverse_async(int *to, const int *from, int rounds, int fault) {
    launch(Grid(1, THREADS, 2 * THREADS * sizeof(int)), reverse_async, to, from, rounds, fault);
}
void emulation_hand_over(int *to, const int *from, int fault) { launch(Grid(1, THREADS), hand_over, to, from, fault); }
void emulation_classes(int *to, const int *from, int fault) { launch(Grid(3, THREADS), classes, to, from, fault); }
void emulation_product(float *d, const bf16 *a, const bf16 *b, int flat) {
    launch(Grid(1, WARP), product, d, a, b, flat);
}
void emulation_product_of_bytes(int *d, const int8_t *a, const int8_t *b) {
    launch(Grid(1, WARP), product_of_bytes, d, a, b);
}
void emulation_lanes(float *to, const float *from) { launch(Grid(1, THREADS), lanes, to, from); }
void emulation_numbers(bf16 *bits, uint32_t *pairs, float *power, const float *from, int n) {
    launch(Grid(1, THREADS), numbers, bits, pairs, power, from, n);
}
void emulation_packs(float *to, const float *from, int skip, int n) {
    launch(Grid(1, THREADS), packs<float>, to, from, skip, n);
}
void emulation_packs_bf16(bf16 *to, const bf16 *from, int skip, int n) {
    launch(Grid(1, THREADS), packs<bf16>, to, from, skip, n);
}
/* Again, of what was recorded: the edges of a graph are as early as the launches were. */
void emulation_pass_on(int *to, const int *from, int n, int times, int fault) {
    pass_along(to, from, n, times, fault);
    cuda_zero(to, (size_t)n * sizeof(int));
    cuda_record();
    pass_along(to, from, n, times, fault);
    void *recording = cuda_recorded();
    if (!recording) return;
    cuda_replay(recording);
    cuda_forget(recording);
}
void emulation_told(int *to, const int *from, int blocks, int written) {
    launch_early(Grid(blocks, THREADS), double_of, to, from);
    launch_early(Grid(blocks, THREADS), add_told, to, written ? (const int *)to : from);
}
void emulation_last_block(int *to) { launch(Grid(20, WARP), last_block, to); }
}

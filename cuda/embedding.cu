/* embedding.cu -- rows of tables looked up, and gradients added to them.
 *
 * Backward without atomics on floats: tokens are sorted (radix sort: stable, so equals stay in the order of (b, t)),
 * and the thread that stands where a run of equals begins adds up its rows, in double.  The sort works on tiles of TILE
 * keys; in each, thread d walks over all keys and counts, then places, those whose digit is d: no ranks to find. */
#include "held.cuh"

namespace {

enum { MOST_THREADS = 256 };

__device__ int64_t position(const int32_t *starts, int64_t bt, int T) { return bt % T - (starts ? starts[bt] : 0); }

__global__ void __launch_bounds__(MOST_THREADS) forward(act *out, const int32_t *tokens, const int32_t *starts,
                                                        const void *wte, int held, const float *wpe, int T, int C) {
    const int64_t bt = blockIdx.x;
    launch_next(), wait_earlier();
    const int64_t p = position(starts, bt, T);
    for (int c = (int)threadIdx.x * VEC; c < C; c += (int)blockDim.x * VEC) {
        const Pack<float, VEC> token = load_held<VEC>(wte, held, C, tokens[bt], c, C - c);
        Pack<float, VEC> place = {};
        if (wpe) place = load<VEC>(wpe + p * C + c, C - c);
        float x[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = token[i] + place[i];
        store(out + bt * C + c, x, C - c);
    }
}

/* ---- sorting ---- */

enum { DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS, TILE = 1024, SCAN_THREADS = 1024 };

/* What is sorted: n in 0 .. N-1 by key.  Read through `order`, the result of the digit before; NULL: as they come. */
struct Keys {
    const int32_t *key, *order;
    int N, shift;
};

__global__ void __launch_bounds__(MOST_THREADS) positions(int32_t *key, const int32_t *starts, int N, int T) {
    const int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    launch_next(), wait_earlier();
    if (n < N) key[n] = (int32_t)position(starts, n, T);
}

/* The digits of this block's tile; returns how many. */
__device__ int load_tile(Shared<int> digits, const Keys &k) {
    const int64_t first = (int64_t)blockIdx.x * TILE;
    const int count = k.N - first < TILE ? (int)(k.N - first) : TILE;
    for (int i = (int)threadIdx.x; i < count; i += DIGITS) {
        const int64_t n = k.order ? k.order[first + i] : first + i;
        digits[i] = k.key[n] >> k.shift & (DIGITS - 1);
    }
    __syncthreads();
    return count;
}

/* counts (DIGITS, tiles) */
__global__ void __launch_bounds__(DIGITS) count_digits(int32_t *counts, Keys k) {
    SHARED(int, digits, TILE);
    launch_next(), wait_earlier();
    const int count = load_tile(digits, k);
    int found = 0;
    for (int i = 0; i < count; i++) found += digits[i] == (int)threadIdx.x;
    counts[(int64_t)threadIdx.x * gridDim.x + blockIdx.x] = found;
}

/* Each of n counts becomes the sum of those in front of it.  One block. */
__global__ void __launch_bounds__(SCAN_THREADS) scan(int32_t *counts, int n) {
    SHARED(int, sums, SCAN_THREADS / WARP);
    const int share = (n + SCAN_THREADS - 1) / SCAN_THREADS, begin = (int)threadIdx.x * share;
    const int end = begin + share < n ? begin + share : n;
    int mine = 0;
    launch_next(), wait_earlier();
    for (int i = begin; i < end; i++) mine += counts[i];
    int up_to = mine; /* in the warp, this lane included */
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const int below = shuffle_up(up_to, lanes);
        if (lane_index() >= lanes) up_to += below;
    }
    if (lane_index() == WARP - 1) sums[warp_index()] = up_to;
    __syncthreads();
    int before = up_to - mine;
    for (int w = 0; w < warp_index(); w++) before += sums[w];
    for (int i = begin; i < end; i++) {
        const int found = counts[i];
        counts[i] = before;
        before += found;
    }
}

__global__ void __launch_bounds__(DIGITS) place(int32_t *sorted, const int32_t *counts, Keys k) {
    SHARED(int, digits, TILE);
    launch_next(), wait_earlier();
    const int count = load_tile(digits, k);
    const int64_t first = (int64_t)blockIdx.x * TILE;
    int to = counts[(int64_t)threadIdx.x * gridDim.x + blockIdx.x];
    for (int i = 0; i < count; i++)
        if (digits[i] == (int)threadIdx.x) sorted[to++] = k.order ? k.order[first + i] : (int32_t)(first + i);
}

/* Working memory of the sort. */
struct Sorting {
    int32_t *order[2], *counts;
};

/* The order of n in 0 .. N-1 by key, all of which are below `keys`. */
const int32_t *sort(const Sorting &w, const int32_t *key, int N, int64_t keys, const char *op) {
    const int64_t tiles = divide_up(N, TILE);
    const int32_t *order = NULL;
    for (int shift = 0, turn = 0; shift == 0 || (keys - 1) >> shift > 0; shift += DIGIT_BITS, turn ^= 1) {
        const Keys k = {key, order, N, shift};
        launch_early(Grid(tiles, DIGITS, 0, op), count_digits, w.counts, k);
        launch_early(Grid(1, SCAN_THREADS, 0, op), scan, w.counts, (int)(tiles * DIGITS));
        launch_early(Grid(tiles, DIGITS, 0, op), place, w.order[turn], w.counts, k);
        order = w.order[turn];
    }
    return order;
}

/* ---- backward ---- */

enum { RUNS = 8 }; /* places of the order a block looks at, a warp each */

/* Each place of the order, and each strip of columns, has a warp; it works where a run of equal keys begins. */
__global__ void __launch_bounds__(RUNS *WARP)
    add_rows(float *dtable, const act *dout, const int32_t *key, const int32_t *order, int N, int C, int strips) {
    const int64_t task = (int64_t)blockIdx.x * RUNS + warp_index(), first = task / strips;
    const int c = ((int)(task % strips) * WARP + lane_index()) * VEC;
    launch_next(), wait_earlier();
    if (first >= N || c >= C) return;
    const int32_t row = key[order[first]];
    if (first > 0 && key[order[first - 1]] == row) return;
    double sum[VEC] = {};
#pragma unroll 4
    for (int64_t at = first; at < N && key[order[at]] == row; at++) {
        const Pack<act, VEC> x = load<VEC>(dout + (int64_t)order[at] * C + c, C - c);
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] += (double)x[i];
    }
    float *d = dtable + (int64_t)row * C + c;
    Pack<float, VEC> old = load<VEC>(d, C - c);
    float x[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) x[i] = old[i] + (float)sum[i];
    store(d, x, C - c);
}

void add_runs(float *dtable, const act *dout, const int32_t *key, const int32_t *order, int N, int C, const char *op) {
    const int64_t strips = divide_up(C, WARP * VEC);
    launch_early(Grid(divide_up(N * strips, RUNS), RUNS * WARP, 0, op), add_rows, dtable, dout, key, order, N, C,
                 (int)strips);
}

}  // namespace

void OPERATOR(embedding_forward)(act *out, const int32_t *tokens, const int32_t *starts, const void *wte, int held,
                                 const float *wpe, int B, int T, int C) {
    launch_early(Grid((int64_t)B * T, threads_for(divide_up(C, VEC), MOST_THREADS)), forward, out, tokens, starts, wte,
                 held, wpe, T, C);
}

void OPERATOR(embedding_backward)(float *dwte, float *dwpe, const act *dout, const int32_t *tokens,
                                  const int32_t *starts, int B, int T, int C, int V) {
    const char *op = "embedding_backward";
    const int N = B * T;
    if (N == 0) return;
    const int64_t counts = divide_up(N, TILE) * DIGITS;
    int32_t *w = (int32_t *)scratch(sizeof *w * ((size_t)N * 3 + (size_t)counts));
    const Sorting sorting = {{w, w + N}, w + 2 * (int64_t)N};
    int32_t *key = w + 2 * (int64_t)N + counts;
    add_runs(dwte, dout, tokens, sort(sorting, tokens, N, V, op), N, C, op);
    if (!dwpe) return;
    launch_early(Grid(divide_up(N, MOST_THREADS), MOST_THREADS), positions, key, starts, N, T);
    add_runs(dwpe, dout, key, sort(sorting, key, N, T, op), N, C, op);
}

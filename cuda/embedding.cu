/* embedding.cu -- rows of tables looked up, and gradients added to them.
 *
 * Backward without atomics on floats: tokens are sorted (radix sort: stable, so equals stay in the order of (b, t)),
 * and a run of equals is added up in double, in pieces: the commonest token of a text is some 4 % of it, thousands of
 * rows.  The sort works on tiles of TILE keys; in each, thread d walks over all keys and counts, then places, those
 * whose digit is d: no ranks to find. */
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

/* Rows of a run that one warp adds up.  A longer run is cut into such pieces, from where it begins, so that a token's
 * sum knows nothing of other tokens; the sums of its pieces are added by another kernel. */
enum { PIECE = 64, WARPS = 8 };

/* The runs of equal keys in an order: of each key that there is, where its run begins and ends. */
struct Runs {
    const int32_t *key, *order;
    int32_t *begin, *end;
    int N;
    __device__ int32_t at(int64_t place) const { return key[order[place]]; }
};

__global__ void __launch_bounds__(MOST_THREADS) find_runs(Runs runs) {
    const int64_t place = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    launch_next(), wait_earlier();
    if (place >= runs.N) return;
    const int32_t key = runs.at(place);
    if (place == 0 || runs.at(place - 1) != key) runs.begin[key] = (int32_t)place;
    if (place == runs.N - 1 || runs.at(place + 1) != key) runs.end[key] = (int32_t)place + 1;
}

/* Where the sum of a piece lies that begins at this place: of PIECE places in a row only two can be the first of a
 * longer run's piece, one of them of its first piece. */
__device__ int64_t place_of_sum(int64_t place, bool begins_run) { return place / PIECE * 2 + begins_run; }
int64_t sums_of_pieces(int N) { return divide_up(N, PIECE) * 2; }

__device__ void add_to(float *d, const double (&sum)[VEC], int count) {
    const Pack<float, VEC> old = load<VEC>(d, count);
    float x[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) x[i] = old[i] + (float)sum[i];
    store(d, x, count);
}

__device__ double value(const Pack<act, VEC> &x, int i) { return (double)x[i]; }
__device__ double value(const Pack<double, VEC> &x, int i) { return x.x[i]; } /* [] gives a float */

enum { AHEAD = 4 };

/* sum += n vectors, one after the other; vector i is the `count` values at(i), or VEC if they are more.  AHEAD of them
 * are asked for before the first is waited for.  whole: as in vector_at. */
template <bool whole, class T, class At>
__device__ void add_vectors(double (&sum)[VEC], int n, int count, At at) {
    for (int first = 0; first < n; first += AHEAD) {
        Pack<T, VEC> x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i < n) x[i] = vector_at<whole>((const T *)at(first + i), count);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i < n)
#pragma unroll
                for (int j = 0; j < VEC; j++) sum[j] += value(x[i], j);
    }
}

/* Each place of the order, and each strip of columns, has a warp, which works where a piece begins. */
template <bool whole>
__global__ void __launch_bounds__(WARPS *WARP)
    add_rows(float *dtable, double *sums, const act *dout, Runs runs, int C, int strips) {
    const int64_t task = (int64_t)blockIdx.x * WARPS + warp_index(), first = task / strips;
    const int c = ((int)(task % strips) * WARP + lane_index()) * VEC;
    launch_next(), wait_earlier();
    if (first >= runs.N || c >= C) return;
    const int32_t key = runs.at(first), begin = runs.begin[key], end = runs.end[key];
    if ((first - begin) % PIECE) return;
    const int rows = end - first < PIECE ? (int)(end - first) : PIECE;
    Pack<double, VEC> sum = {};
    add_vectors<whole, act>(sum.x, rows, C - c, [=](int i) { return dout + (int64_t)runs.order[first + i] * C + c; });
    if (end - begin <= PIECE) add_to(dtable + (int64_t)key * C + c, sum.x, C - c);
    else store(sums + place_of_sum(first, first == begin) * C + c, sum, C - c);
}

/* Of PIECE places of the order at most one begins a longer run: a warp for each strip of its columns adds its pieces.
 */
template <bool whole>
__global__ void __launch_bounds__(WARPS *WARP)
    add_pieces(float *dtable, const double *sums, Runs runs, int C, int strips) {
    const int64_t task = (int64_t)blockIdx.x * WARPS + warp_index(), window = task / strips * PIECE;
    const int c = ((int)(task % strips) * WARP + lane_index()) * VEC;
    launch_next(), wait_earlier();
    if (window >= runs.N) return;
    int found = 0;
    for (int64_t place = window + lane_index(); place < window + PIECE && place < runs.N; place += WARP) {
        const int32_t key = runs.at(place);
        if (runs.begin[key] == place && runs.end[key] - place > PIECE) found = (int)place + 1;
    }
    const int begin = warp_sum(found) - 1;
    if (begin < 0 || c >= C) return;
    const int32_t key = runs.at(begin), end = runs.end[key];
    double sum[VEC] = {};
    add_vectors<whole, double>(sum, (end - begin + PIECE - 1) / PIECE, C - c,
                               [=](int i) { return sums + place_of_sum(begin + (int64_t)i * PIECE, i == 0) * C + c; });
    add_to(dtable + (int64_t)key * C + c, sum, C - c);
}

/* Working memory of both tables' gradients: keys are ids of tokens or positions, whichever are more. */
struct Adding {
    double *sums;
    Sorting sorting;
    int32_t *begin, *end, *positions;
};

Adding working_memory(int N, int C, int64_t keys) {
    const int64_t counts = divide_up(N, TILE) * DIGITS, sums = sums_of_pieces(N) * C;
    Adding w;
    w.sums = (double *)scratch((size_t)sums * sizeof(double) +
                               (size_t)(3 * (int64_t)N + counts + 2 * keys) * sizeof(int32_t));
    int32_t *at = (int32_t *)(w.sums + sums);
    w.sorting.order[0] = at, w.sorting.order[1] = at += N, w.positions = at += N, w.sorting.counts = at += N;
    w.begin = at += counts, w.end = at + keys;
    return w;
}

/* dtable[key] += the rows of dout that have it */
void add_by_key(float *dtable, const act *dout, const Adding &w, const int32_t *key, int N, int C, int64_t keys,
                const char *op) {
    const int64_t strips = divide_up(C, WARP * VEC);
    const bool whole = C % VEC == 0 && on_16_bytes(dout);
    const Runs runs = {key, sort(w.sorting, key, N, keys, op), w.begin, w.end, N};
    launch_early(Grid(divide_up(N, MOST_THREADS), MOST_THREADS, 0, op), find_runs, runs);
    launch_early(Grid(divide_up(N * strips, WARPS), WARPS * WARP, 0, op), whole ? add_rows<true> : add_rows<false>,
                 dtable, w.sums, dout, runs, C, (int)strips);
    if (N > PIECE)
        launch_early(Grid(divide_up(divide_up(N, PIECE) * strips, WARPS), WARPS * WARP, 0, op),
                     whole ? add_pieces<true> : add_pieces<false>, dtable, w.sums, runs, C, (int)strips);
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
    const Adding w = working_memory(N, C, V > T ? V : T);
    add_by_key(dwte, dout, w, tokens, N, C, V, op);
    if (!dwpe) return;
    launch_early(Grid(divide_up(N, MOST_THREADS), MOST_THREADS), positions, w.positions, starts, N, T);
    add_by_key(dwpe, dout, w, w.positions, N, C, T, op);
}

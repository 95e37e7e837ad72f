/* sample.cu -- one token a row, drawn from its logits, without a sort.
 *
 * Every token has a number of its own that says where it stands in the order of falling logits, of equals the lower id
 * first.  What top_k, top_p and min_p keep is each time all from one number on, the border.  It is found from the top:
 * an interval of numbers is cut into pieces, tokens and their weights are added up piece by piece, and the piece in
 * which the target is reached is the next interval, until it has few tokens, which are then compared with each other.
 *
 * Three kernels.  Two have a block for each slice of a row: they find its greatest logit, and add up the pieces of the
 * first interval, or, where neither top_k nor top_p cuts, the weight of each slice.  In the third a block for each row
 * finds the borders and draws.
 *
 * Weights are whole numbers, exp((x - max) / temperature) in steps of at most 2^-30.  So sums are exact, and it does
 * not show in which order threads add to them, nor how a row is cut.
 */
#include <float.h>
#include "ops.cuh"

namespace {

enum {
    SLICE = 4096, /* logits of a block */
    STEP = 4,     /* of a thread at a time */
    MOST_THREADS = SLICE / STEP,
    MOST_WARPS = MOST_THREADS / WARP,
    FEW = 256, /* tokens that are compared with each other */
    SUM_BITS = 62
};

/* What the kernels of a draw have in common.  An interval has as many pieces as a block has threads. */
struct Rows {
    const float *logits, *options;
    int V, Vp, slices;
    float one; /* the weight of the greatest */

    /* of working memory: for each slice its greatest number and the weight that it keeps; for each row what each piece
     * has, from the top */
    uint64_t *tops, *kept, *weights;
    uint32_t *counts;
};

/* ---- a row ---- */

/* Bits in the order of the floats; both zeros are one, and what is no logit is above all. */
__device__ uint32_t key_of(float x) {
    if (!(x < INFINITY)) return UINT32_MAX;
    const uint32_t bits = bits_of_float(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ float of_key(uint32_t key) { return float_of_bits(key >> 31 ? key & 0x7fffffffu : ~key); }

__device__ uint64_t number_of(float logit, int v, int V) { return (uint64_t)key_of(logit) * V + (V - 1 - v); }
__device__ float logit_of(uint64_t number, int V) { return of_key((uint32_t)(number / V)); }

/* The greatest of a warp's numbers. */
__device__ uint64_t warp_greatest(uint64_t x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const uint64_t other = shuffle_xor(x, lanes);
        x = other > x ? other : x;
    }
    return x;
}

/* A row whose greatest number is known. */
struct Row {
    const float *x;
    int V;
    uint64_t top;
    float max, temperature, top_k, top_p, min_p;
    float inverse, one; /* of the temperature, for powers of 2; the weight of the greatest */

    __device__ Row(const Rows &rows, int64_t n) : x(rows.logits + n * rows.Vp), V(rows.V), top(0), one(rows.one) {
        for (int i = lane_index(); i < rows.slices; i += WARP) {
            const uint64_t other = rows.tops[n * rows.slices + i];
            top = other > top ? other : top;
        }
        top = warp_greatest(top);
        max = logit_of(top, V);
        const float *option = rows.options + n * SAMPLE_COUNT;
        temperature = option[SAMPLE_TEMPERATURE], min_p = option[SAMPLE_MIN_P];
        top_k = option[SAMPLE_TOP_K], top_p = option[SAMPLE_TOP_P];
        inverse = fminf(LOG2_E / temperature, FLT_MAX); /* of a tiny one: 0 * infinity is no number */
    }
    __device__ bool has_logits() const { return max > -INFINITY && max < INFINITY; }
    __device__ bool is_drawn() const { return has_logits() && temperature > 0.0f; }
    __device__ bool is_cut_by_k() const { return top_k > 0.0f && top_k < (float)V; }
    __device__ bool is_cut() const { return is_cut_by_k() || top_p < 1.0f; }

    __device__ uint64_t number(float logit, int v) const { return number_of(logit, v, V); }
    __device__ uint64_t weight(float logit) const { return (uint64_t)(exp2_fast((logit - max) * inverse) * one); }
    /* Where what min_p keeps begins. */
    __device__ uint64_t least() const { return min_p > 0.0f ? number_at(log((double)min_p)) : 0; }
    /* The first number of the logit that lies y temperatures above the greatest, or of the next one above that. */
    __device__ uint64_t number_at(double y) const {
        const double exact = fmax((double)max + y * (double)temperature, -(double)FLT_MAX);
        float logit = (float)exact;
        if ((double)logit < exact) logit = nextafterf(logit, INFINITY);
        return number(logit, V - 1);
    }
};

/* f(v, x[v]) for this thread's share of begin .. end - 1 */
template <class F>
__device__ void for_each(const float *x, int begin, int end, F f) {
    for (int v0 = begin + (int)threadIdx.x * STEP; v0 < end; v0 += (int)blockDim.x * STEP) {
        const Pack<float, STEP> some = load<STEP>(x + v0, end - v0);
#pragma unroll
        for (int i = 0; i < STEP; i++)
            if (v0 + i < end) f(v0 + i, some.x[i]);
    }
}

/* The part of a row that is this block's. */
struct Slice {
    int64_t n;
    int begin, end;
    __device__ Slice(const Rows &rows, int64_t block) : n(block / rows.slices) {
        begin = (int)(block % rows.slices) * SLICE;
        end = rows.V - begin < SLICE ? rows.V : begin + SLICE;
    }
};

/* Over the threads in front of this one; all: over all of them. */
__device__ uint64_t sum_before(uint64_t x, uint64_t *all) {
    SHARED(uint64_t, sums, MOST_WARPS);
    uint64_t through = x;
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const uint64_t other = shuffle_up(through, lanes);
        if (lane_index() >= lanes) through += other;
    }
    __syncthreads(); /* a call before has read them */
    if (lane_index() == WARP - 1) sums[warp_index()] = through;
    __syncthreads();
    uint64_t before = through - x;
    *all = 0;
    for (int w = 0; w < (int)blockDim.x / WARP; w++) {
        if (w < warp_index()) before += sums[w];
        *all += sums[w];
    }
    return before;
}

/* ---- pieces of an interval ---- */

/* Some tokens. */
struct Sum {
    uint64_t count, weight;
    __device__ uint64_t of(bool counted) const { return counted ? count : weight; }
};
__device__ Sum operator+(Sum a, Sum b) { return {a.count + b.count, a.weight + b.weight}; }

/* Numbers low .. high, in pieces of 2^shift. */
struct Interval {
    uint64_t low, high;
    int shift = 0;
    __device__ Interval(uint64_t low_, uint64_t high_) : low(low_), high(high_) {
        while ((high - low) >> shift >= blockDim.x) shift++;
    }
    __device__ Interval piece(int i) const {
        const uint64_t begin = low + ((uint64_t)i << shift), last = begin + (((uint64_t)1 << shift) - 1);
        return {begin, last < high ? last : high};
    }
};

/* f(number, weight) for those of the tokens begin .. end - 1 that lie in the interval */
template <class F>
__device__ void for_each_in(const Row &row, const Interval &in, int begin, int end, F f) {
    const float least = logit_of(in.low, row.V), most = logit_of(in.high, row.V);
    for_each(row.x, begin, end, [&](int v, float logit) {
        if (logit < least || logit > most) return;
        const uint64_t number = row.number(logit, v);
        if (number >= in.low && number <= in.high) f(number, row.weight(logit));
    });
}

/* Where all that can come lies: below, weights are 0. */
__device__ Interval whole(const Row &row) { return {row.number_at(-88.0), row.top}; }

/* Of the tokens begin .. end - 1 those in this thread's piece: the first thread has the last piece. */
__device__ Sum sum_of_piece(const Row &row, const Interval &in, int begin, int end) {
    SHARED(uint32_t, counts, MOST_THREADS);
    SHARED(uint32_t, low, MOST_THREADS);
    SHARED(uint32_t, high, MOST_THREADS);
    const int last = (int)blockDim.x - 1, mine = last - (int)threadIdx.x;
    counts[mine] = low[mine] = high[mine] = 0;
    __syncthreads();
    for_each_in(row, in, begin, end, [&](uint64_t number, uint64_t weight) {
        const int piece = (int)((number - in.low) >> in.shift);
        const uint32_t added = (uint32_t)weight, sum = add_shared(low + piece, added) + added;
        const uint32_t carried = (uint32_t)(weight >> 32) + (sum < added ? 1 : 0);
        if (carried > 0) add_shared(high + piece, carried);
        add_shared(counts + piece, 1);
    });
    __syncthreads();
    return {counts[mine], (uint64_t)high[mine] << 32 | low[mine]};
}

/* ---- borders ---- */

/* A number, and all from it on. */
struct Border {
    uint64_t number;
    Sum kept;
};

/* The border lies in `in`, which has few tokens, and `above` are those beyond. */
__device__ Border compare(const Row &row, const Interval &in, Sum above, bool counted, uint64_t target) {
    SHARED(uint64_t, numbers, FEW);
    SHARED(uint64_t, weights, FEW);
    SHARED(uint32_t, count, 1);
    SHARED(uint64_t, found, 3);
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    for_each_in(row, in, 0, row.V, [&](uint64_t number, uint64_t weight) {
        const uint32_t i = add_shared(count, 1);
        numbers[i] = number, weights[i] = weight;
    });
    __syncthreads();
    const int n = (int)count[0];
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        const uint64_t number = numbers[i];
        const Sum own = {1, weights[i]};
        Sum before = above;
        for (int j = 0; j < n; j++)
            if (numbers[j] > number) before = before + Sum{1, weights[j]};
        const Sum through = before + own;
        if (before.of(counted) >= target || through.of(counted) < target) continue;
        found[0] = number, found[1] = through.count, found[2] = through.weight;
    }
    __syncthreads();
    return {found[0], {found[1], found[2]}};
}

/* The greatest number from which on tokens reach the target, in count or in weight; 0 where all do not.  `mine` is what
 * this thread's piece of the row's interval has. */
__device__ Border find_border(const Row &row, Interval in, Sum mine, bool counted, uint64_t target) {
    SHARED(uint64_t, found, 4);
    Sum above = {0, 0}, all;
    for (;;) {
        Sum before;
        before.count = above.count + sum_before(mine.count, &all.count);
        before.weight = above.weight + sum_before(mine.weight, &all.weight);
        if ((above + all).of(counted) < target) return {0, above + all};
        if (before.of(counted) < target && (before + mine).of(counted) >= target) {
            found[0] = blockDim.x - 1 - threadIdx.x, found[1] = mine.count;
            found[2] = before.count, found[3] = before.weight;
        }
        __syncthreads();
        in = in.piece((int)found[0]);
        above = {found[2], found[3]};
        if (found[1] <= FEW) return compare(row, in, above, counted, target);
        mine = sum_of_piece(row, in, 0, row.V);
    }
}

/* A share of a weight, rounded up. */
__device__ uint64_t share_of(uint64_t weight, float share) {
    const uint64_t part = (uint64_t)ceil((double)share * (double)weight);
    return part < 1 ? 1 : part > weight ? weight : part;
}

/* What top_k and top_p keep begins here. */
__device__ uint64_t cut(const Row &row, Sum mine) {
    const Interval in = whole(row);
    Border border = {0, {0, 0}};
    if (row.is_cut_by_k()) border = find_border(row, in, mine, true, (uint64_t)ceilf(row.top_k));
    else sum_before(mine.weight, &border.kept.weight);
    if (row.top_p < 1.0f) border = find_border(row, in, mine, false, share_of(border.kept.weight, row.top_p));
    return border.number;
}

/* ---- kernels ---- */

__global__ void __launch_bounds__(MOST_THREADS) find_greatest(Rows rows) {
    SHARED(uint64_t, parts, MOST_WARPS);
    launch_next(), wait_earlier();
    const Slice slice(rows, blockIdx.x);
    uint64_t top = 0;
    for_each(rows.logits + slice.n * rows.Vp, slice.begin, slice.end, [&](int v, float logit) {
        const uint64_t number = number_of(logit, v, rows.V);
        top = number > top ? number : top;
    });
    top = warp_greatest(top);
    if (lane_index() == 0) parts[warp_index()] = top;
    __syncthreads();
    if (slice.begin == 0) {
        const int64_t piece = slice.n * blockDim.x + threadIdx.x;
        rows.weights[piece] = 0, rows.counts[piece] = 0;
    }
    if (threadIdx.x > 0) return;
    for (int w = 1; w < (int)blockDim.x / WARP; w++) top = parts[w] > top ? (uint64_t)parts[w] : top;
    rows.tops[blockIdx.x] = top;
}

/* Of the slice's tokens from the border on. */
__device__ void weigh(const Row &row, const Slice &slice, uint64_t border, uint64_t *kept) {
    uint64_t sum = 0, all;
    for_each(row.x, slice.begin, slice.end, [&](int v, float logit) {
        if (row.number(logit, v) >= border) sum += row.weight(logit);
    });
    sum_before(sum, &all);
    if (threadIdx.x == 0) *kept = all;
}

__global__ void __launch_bounds__(MOST_THREADS) add_up(Rows rows) {
    launch_next(), wait_earlier();
    const Slice slice(rows, blockIdx.x);
    const Row row(rows, slice.n);
    if (!row.is_drawn()) return;
    if (!row.is_cut()) return weigh(row, slice, row.least(), rows.kept + blockIdx.x);
    const Sum mine = sum_of_piece(row, whole(row), slice.begin, slice.end);
    if (mine.count == 0) return;
    const int64_t piece = slice.n * blockDim.x + threadIdx.x;
    add_global(rows.counts + piece, (uint32_t)mine.count);
    add_global(rows.weights + piece, mine.weight);
}

/* Of all threads, to the one whose share goal falls into. */
__device__ bool falls_into(uint64_t before, uint64_t mine, uint64_t goal) {
    return before <= goal && goal < before + mine;
}

/* The slice in which the running sum is greater than u times all, and that before it. */
__device__ Slice find_slice(const Rows &rows, int64_t n, double u, uint64_t *before, uint64_t *goal, uint64_t *all) {
    SHARED(uint64_t, found, 2);
    const int each = (rows.slices + (int)blockDim.x - 1) / (int)blockDim.x, first = (int)threadIdx.x * each;
    const uint64_t *kept = rows.kept + n * rows.slices;
    uint64_t mine = 0;
    for (int i = first; i < first + each && i < rows.slices; i++) mine += kept[i];
    uint64_t running = sum_before(mine, all);
    *goal = (uint64_t)(u * (double)*all);
    if (*goal >= *all) *goal = *all - 1;
    if (falls_into(running, mine, *goal)) {
        int i = first;
        for (; running + kept[i] <= *goal; i++) running += kept[i];
        found[0] = (uint64_t)i, found[1] = running;
    }
    __syncthreads();
    *before = found[1];
    return {rows, n * rows.slices + (int64_t)found[0]};
}

/* Where what is kept begins; rows.kept then has what each slice has of it. */
__device__ uint64_t find_kept(const Rows &rows, const Row &row, int64_t n) {
    const uint64_t least = row.least();
    if (!row.is_cut()) return least;
    const int64_t piece = n * blockDim.x + threadIdx.x;
    uint64_t border = cut(row, {rows.counts[piece], rows.weights[piece]});
    border = least > border ? least : border;
    for (int64_t i = n * rows.slices; i < (n + 1) * rows.slices; i++) weigh(row, Slice(rows, i), border, rows.kept + i);
    __syncthreads();
    return border;
}

__global__ void __launch_bounds__(MOST_THREADS) draw(int32_t *tokens, float *logprobs, const double *u, Rows rows) {
    launch_next(), wait_earlier();
    const int64_t n = blockIdx.x;
    const Row row(rows, n);
    if (!row.is_drawn()) {
        if (threadIdx.x > 0) return;
        tokens[n] = row.has_logits() ? row.V - 1 - (int)(row.top % row.V) : -1;
        logprobs[n] = row.has_logits() ? 0.0f : NAN;
        return;
    }
    const uint64_t border = find_kept(rows, row, n);
    uint64_t before, goal, all, in_slice;
    const Slice slice = find_slice(rows, n, u[n], &before, &goal, &all);
    /* each thread has STEP tokens that lie side by side */
    const int first = slice.begin + (int)threadIdx.x * STEP;
    const Pack<float, STEP> logits = load<STEP>(row.x + first, slice.end - first);
    uint64_t weights[STEP], mine = 0;
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        const bool kept = first + i < slice.end && row.number(logits.x[i], first + i) >= border;
        weights[i] = kept ? row.weight(logits.x[i]) : 0;
        mine += weights[i];
    }
    uint64_t running = before + sum_before(mine, &in_slice);
    if (!falls_into(running, mine, goal)) return;
#pragma unroll
    for (int i = 0; i < STEP; i++) {
        if (falls_into(running, weights[i], goal)) {
            tokens[n] = first + i;
            logprobs[n] = (float)(((double)logits.x[i] - (double)row.max) / (double)row.temperature -
                                  log((double)all / (double)row.one));
        }
        running += weights[i];
    }
}

}  // namespace

void OPERATOR(sample)(int32_t *tokens, float *logprobs, const float *logits, const float *options, const double *u,
                      int N, int V, int Vp) {
    const int slices = (int)divide_up(V, SLICE), threads = threads_for(divide_up(V, STEP), MOST_THREADS);
    const size_t of_slices = (size_t)N * slices, of_pieces = (size_t)N * threads;
    uint64_t *tops = (uint64_t *)scratch((2 * of_slices + of_pieces) * sizeof *tops + of_pieces * sizeof(uint32_t));
    if (!tops) return;
    int bits = 0;
    while ((int64_t)1 << bits < V) bits++;
    const float one = ldexpf(1.0f, SUM_BITS - bits);
    uint64_t *kept = tops + of_slices, *weights = kept + of_slices;
    const Rows rows = {logits, options, V, Vp, slices, one, tops, kept, weights, (uint32_t *)(weights + of_pieces)};
    launch_early(Grid((int64_t)N * slices, threads), find_greatest, rows);
    launch_early(Grid((int64_t)N * slices, threads), add_up, rows);
    launch_early(Grid(N, threads), draw, tokens, logprobs, u, rows);
}

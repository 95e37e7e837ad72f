/* sample.cu -- one token a row, drawn from its logits, without a sort: a block of threads for each row.
 *
 * Every token has a number of its own that says where it stands in the order of falling logits, of equals the lower id
 * first.  What top_k, top_p and min_p keep is each time all from one number on.  It is found from the top: an interval
 * of numbers is cut into pieces, the weights of its tokens are added piece by piece, and the piece in which the target
 * is reached is the next interval, until one token is left in it.  Each round passes over the row, which lies in the
 * cache; about seven are enough for 50,000 logits.
 *
 * All sums are double.  Their order follows from V alone: each thread adds its tokens in order, threads are added in a
 * tree, warps in another.  The draw itself adds the tokens of each warp's part of the row, and then the parts in order.
 */
#include <float.h>
#include "ops.cuh"

namespace {

enum { MOST_THREADS = 512, MOST_WARPS = MOST_THREADS / WARP, PIECES = 8, STEP = 4 /* logits of a thread at a time */ };

/* Bits in the order of the floats; both zeros are one, and what is no logit is above all. */
__device__ uint32_t key_of(float x) {
    if (!(x < INFINITY)) return UINT32_MAX;
    const uint32_t bits = bits_of_float(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ float of_key(uint32_t key) { return float_of_bits(key >> 31 ? key & 0x7fffffffu : ~key); }

struct Row {
    const float *x;
    int V;
    float max, inverse; /* of the temperature */
    uint64_t from;      /* the number from which on tokens are kept */

    __device__ uint64_t number(float logit, int v) const { return (uint64_t)key_of(logit) * V + (V - 1 - v); }
    __device__ int token(uint64_t number) const { return V - 1 - (int)(number % V); }
    __device__ float logit(uint64_t number) const { return of_key((uint32_t)(number / V)); }
    /* exp((x - max) / temperature) */
    __device__ float weight(float logit) const {
        const float y = (logit - max) * inverse;
        return y < -87.0f ? 0.0f : expf(y);
    }
};

/* f(v, x[v]) for the logits of this thread, in order */
template <class F>
__device__ void for_each(const Row &row, int begin, int end, int stride, F f) {
    for (int v0 = begin; v0 < end; v0 += stride) {
        const Pack<float, STEP> x = load<STEP>(row.x + v0, end - v0);
#pragma unroll
        for (int i = 0; i < STEP; i++)
            if (v0 + i < end) f(v0 + i, x.x[i]);
    }
}
template <class F>
__device__ void for_each(const Row &row, F f) {
    for_each(row, (int)threadIdx.x * STEP, row.V, (int)blockDim.x * STEP, f);
}

/* ---- sums over the block; every thread gets them ---- */

/* The greatest of the numbers. */
__device__ uint64_t greatest(uint64_t x) {
    SHARED(uint64_t, parts, MOST_WARPS);
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const uint64_t other = shuffle_xor(x, lanes);
        x = other > x ? other : x;
    }
    if (lane_index() == 0) parts[warp_index()] = x;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / WARP; w++) x = parts[w] > x ? (uint64_t)parts[w] : x;
    return x;
}

/* Lane l gets the sum of piece l over all warps; each warp brought its own. */
template <class T>
__device__ T over_warps(Shared<T> parts, int piece) {
    const T x = warp_sum(lane_index() < (int)blockDim.x / WARP ? T(parts[lane_index() * PIECES + piece]) : T(0));
    return x;
}

/* Of each piece of an interval, its tokens and their weight. */
struct Pieces {
    double weight[PIECES];
    int count[PIECES];
};

__device__ void add_up(Pieces &p) {
    SHARED(double, weights, MOST_WARPS *PIECES);
    SHARED(int, counts, MOST_WARPS *PIECES);
    SHARED(double, weight, PIECES);
    SHARED(int, count, PIECES);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const double w = warp_sum(p.weight[i]);
        const int n = warp_sum(p.count[i]);
        if (lane_index() == 0) weights[warp_index() * PIECES + i] = w, counts[warp_index() * PIECES + i] = n;
    }
    __syncthreads();
    for (int i = warp_index(); i < PIECES; i += (int)blockDim.x / WARP) {
        const double w = over_warps(weights, i);
        const int n = over_warps(counts, i);
        if (lane_index() == 0) weight[i] = w, count[i] = n;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PIECES; i++) p.weight[i] = weight[i], p.count[i] = count[i];
}

/* ---- borders ---- */

/* The greatest number from which on the tokens weigh at least target, where each weighs 1 (`counted`) or its p;
 * row.from where all do not.  `top` is the greatest number. */
template <bool counted>
__device__ uint64_t border(const Row &row, uint64_t top, double target) {
    uint64_t low = row.from, high = top;
    double above = 0.0;
    for (;;) {
        int shift = 0;
        while ((high - low) >> shift >= PIECES) shift++;
        const float least = row.logit(low), most = row.logit(high);
        Pieces p = {};
        for_each(row, [&](int v, float x) {
            if (x < least || x > most) return;
            const uint64_t number = row.number(x, v);
            if (number < low || number > high) return;
            const int piece = (int)((number - low) >> shift);
            const double weight = counted ? 1.0 : (double)row.weight(x);
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                if (piece == i) p.weight[i] += weight, p.count[i]++;
        });
        add_up(p);
        int piece = PIECES - 1;
        uint64_t count = 0;
#pragma unroll
        for (int i = PIECES - 1; i >= 0; i--)
            if (piece == i) {
                count = p.count[i];
                if (i > 0 && above + p.weight[i] < target) above += p.weight[i], piece--;
            }
        low += (uint64_t)piece << shift;
        if (count <= 1 || shift == 0) return low;
        const uint64_t last = low + (((uint64_t)1 << shift) - 1);
        high = last < high ? last : high;
    }
}

__device__ double kept_weight(const Row &row) {
    Pieces p = {};
    for_each(row, [&](int v, float x) {
        if (row.number(x, v) >= row.from) p.weight[0] += (double)row.weight(x);
    });
    add_up(p);
    return p.weight[0];
}

/* The least logit that is kept: that of the greatest p times min_p. */
__device__ float least_logit(float max, float temperature, float min_p) {
    const double least = fmax((double)max + log((double)min_p) * (double)temperature, -(double)FLT_MAX);
    const float nearest = (float)least;
    return (double)nearest < least ? nextafterf(nearest, INFINITY) : nearest;
}

/* ---- the draw ---- */

/* Of the warp: ids begin .. end - 1. */
struct Part {
    int begin, end;

    __device__ Part(int V, int warp) {
        const int warps = (int)blockDim.x / WARP, step = WARP * STEP,
                  size = (V + warps * step - 1) / (warps * step) * step;
        begin = warp * size < V ? warp * size : V, end = begin + size < V ? begin + size : V;
    }
};

/* By the warp whose part it is: the first token at which the running sum, `running` before the part, is greater than
 * goal; where rounding lets none be, the last of the part that can come. */
__device__ int search(const Row &row, Part part, double running, double goal) {
    int last = -1;
    for (int v0 = part.begin; v0 < part.end; v0 += WARP * STEP) {
        const int begin = v0 + lane_index() * STEP;
        const Pack<float, STEP> x = load<STEP>(row.x + begin, part.end - begin);
        double weights[STEP], sum = 0.0;
        int mine = -1, found = INT32_MAX;
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            const bool kept = begin + i < part.end && row.number(x.x[i], begin + i) >= row.from;
            weights[i] = kept ? (double)row.weight(x.x[i]) : 0.0;
            sum += weights[i];
            if (weights[i] > 0.0) mine = begin + i;
        }
        double before = sum; /* of this lane and those below */
        for (int lanes = 1; lanes < WARP; lanes *= 2) {
            const double other = shuffle_up(before, lanes);
            if (lane_index() >= lanes) before += other;
        }
        const double through = shuffle(before, WARP - 1);
        before = running + (before - sum);
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            before += weights[i];
            if (weights[i] > 0.0 && before > goal && found == INT32_MAX) found = begin + i;
        }
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
            const int other = shuffle_xor(found, lanes), later = shuffle_xor(mine, lanes);
            found = other < found ? other : found;
            mine = later > mine ? later : mine;
        }
        if (found < INT32_MAX) return found;
        running += through;
        last = mine > last ? mine : last;
    }
    return last;
}

__device__ void draw(int32_t *token, float *logprob, const Row &row, double u, float temperature) {
    SHARED(double, parts, MOST_WARPS);
    const Part part(row.V, warp_index());
    double sum = 0.0;
    for_each(row, part.begin + lane_index() * STEP, part.end, WARP * STEP, [&](int v, float x) {
        if (row.number(x, v) >= row.from) sum += (double)row.weight(x);
    });
    sum = warp_sum(sum);
    if (lane_index() == 0) parts[warp_index()] = sum;
    __syncthreads();
    const int warps = (int)blockDim.x / WARP;
    double total = 0.0, running = 0.0;
    for (int w = 0; w < warps; w++) total += parts[w];
    const double goal = u * total;
    int chosen = -1;
    double before = 0.0;
    for (int w = 0; w < warps; w++) {
        if (parts[w] == 0.0) continue;
        chosen = w, before = running;
        running += parts[w];
        if (running > goal) break;
    }
    if (warp_index() != chosen) return;
    const int v = search(row, part, before, goal);
    if (lane_index() > 0) return;
    *token = v;
    *logprob = (float)(((double)row.x[v] - (double)row.max) / (double)temperature - log(total));
}

__global__ void __launch_bounds__(MOST_THREADS) sample(int32_t *tokens, float *logprobs, const float *logits,
                                                       const float *options, const double *u, int V, int Vp) {
    const int64_t n = blockIdx.x;
    launch_next(), wait_earlier();
    const float *option = options + n * SAMPLE_COUNT;
    const float temperature = option[SAMPLE_TEMPERATURE], top_k = option[SAMPLE_TOP_K];
    const float top_p = option[SAMPLE_TOP_P], min_p = option[SAMPLE_MIN_P];
    /* of a tiny temperature the inverse is infinite, and 0 * infinity no number */
    Row row = {logits + n * Vp, V, 0.0f, fminf(1.0f / temperature, FLT_MAX), 0};
    uint64_t top = 0;
    for_each(row, [&](int v, float x) {
        const uint64_t number = row.number(x, v);
        top = number > top ? number : top;
    });
    top = greatest(top);
    row.max = row.logit(top);
    if (!(row.max > -INFINITY && row.max < INFINITY) || temperature == 0.0f) {
        const bool drawn = row.max > -INFINITY && row.max < INFINITY;
        if (threadIdx.x == 0) tokens[n] = drawn ? row.token(top) : -1, logprobs[n] = drawn ? 0.0f : NAN;
        return;
    }
    if (top_k > 0.0f && top_k < (float)V) row.from = border<true>(row, top, (double)top_k);
    if (top_p < 1.0f) row.from = border<false>(row, top, (double)top_p * kept_weight(row));
    if (min_p > 0.0f) {
        const uint64_t least = (uint64_t)key_of(least_logit(row.max, temperature, min_p)) * V;
        row.from = least > row.from ? least : row.from;
    }
    draw(tokens + n, logprobs + n, row, u[n], temperature);
}

}  // namespace

void OPERATOR(sample)(int32_t *tokens, float *logprobs, const float *logits, const float *options, const double *u,
                      int N, int V, int Vp) {
    launch_early(Grid(N, threads_for(divide_up(V, STEP), MOST_THREADS)), ::sample, tokens, logprobs, logits, options, u,
                 V, Vp);
}

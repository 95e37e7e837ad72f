/* packed.cu -- weights that many products read, in a session.  Their form is that of held weights (held.cuh), so a
 * product in fp32 or bf16 is linear_forward's.  In int8 rows are quantised like the weight, and tensor cores multiply
 * bytes: a block has 16 rows and 8 columns, its warps share the groups, and their terms are added in order. */
#include "gelu.cuh"
#include "held.cuh"

namespace {

enum { THREADS = 256, WARPS = THREADS / WARP };

/* A warp for each group of 64 values of a row. */
__global__ void __launch_bounds__(THREADS) quantise_rows(Group *out, const act *in, int C, int64_t groups) {
    const int64_t g = (int64_t)blockIdx.x * WARPS + warp_index();
    launch_next(), wait_earlier();
    if (g >= groups) return;
    const int64_t n = g / groups_of(C);
    const int first = (int)(g % groups_of(C)) * INT8_GROUP;
    float x[2];
    for (int i = 0; i < 2; i++) {
        const int c = first + lane_index() + i * WARP;
        x[i] = c < C ? to_float(in[n * C + c]) : 0.0f;
    }
    write_group(out[g], x);
}

enum { SIDE_M = 16, SIDE_N = 8, TERM = SIDE_M * SIDE_N, TERM_WARPS = TERM / WARP, TERMS = 64 };

/* Of a lane: two rows and a column as multiply_bytes has them; NULL: not there. */
struct Bytes {
    const Group *rows[2], *column;
    /* Word w of four values. */
    __device__ static uint32_t word(const Group *g, int w) {
        return g ? reinterpret_cast<const uint32_t *>(g->q)[w] : 0;
    }
    /* sum += the products of group i */
    __device__ void multiply(int (&sum)[4], int i) const {
        const Group *low = rows[0] ? rows[0] + i : NULL, *high = rows[1] ? rows[1] + i : NULL;
        const Group *right = column ? column + i : NULL;
#pragma unroll
        for (int w = lane_index() % 4; w < INT8_GROUP / 4; w += 8) {
            const uint32_t left[4] = {word(low, w), word(high, w), word(low, w + 4), word(high, w + 4)};
            multiply_bytes(sum, left, word(right, w), word(right, w + 4));
        }
    }
};

/* out (N, OC): a thread for each value of a block's. */
__global__ void __launch_bounds__(TERM)
    product_int8(act *out, const Group *rows, const Group *weight, const float *bias, const act *residual, int fn,
                 int N, int C, int OC) {
    SHARED(float, terms, TERMS *TERM);
    const int G = groups_of(C), strips = (OC + SIDE_N - 1) / SIDE_N, lane = lane_index();
    const int m0 = (int)blockIdx.x / strips * SIDE_M, n0 = (int)blockIdx.x % strips * SIDE_N;
    launch_next();
    if (threadIdx.x == 0 && m0 == 0 && n0 + SIDE_N <= OC && on_16_bytes(weight)) /* 8 rows are whole words */
        prefetch_l2(weight + (int64_t)n0 * G, (size_t)SIDE_N * (size_t)G * sizeof(Group));
    wait_earlier();
    auto row_at = [&](const Group *x, int r, int count) { return r < count ? x + (int64_t)r * G : NULL; };
    const int m = m0 + lane / 4, n = n0 + lane % 4 * 2;
    const Bytes bytes = {{row_at(rows, m, N), row_at(rows, m + 8, N)}, row_at(weight, n0 + lane / 4, OC)};
    const Group *columns[2] = {row_at(weight, n, OC), row_at(weight, n + 1, OC)};
    float sum = 0.0f;
    for (int first = 0; first < G; first += TERMS) {
        const int count = G - first < TERMS ? G - first : TERMS;
        for (int i = warp_index(); i < count; i += TERM_WARPS) {
            int exact[4] = {};
            bytes.multiply(exact, first + i);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const Group *a = bytes.rows[e / 2], *b = columns[e % 2];
                const float scales = a && b ? a[first + i].scale * b[first + i].scale : 0.0f;
                terms[i * TERM + (lane / 4 + e / 2 * 8) * SIDE_N + lane % 4 * 2 + e % 2] = (float)exact[e] * scales;
            }
        }
        __syncthreads();
        for (int i = 0; i < count; i++) sum += terms[i * TERM + (int)threadIdx.x];
        __syncthreads(); /* they have been read */
    }
    const int row = m0 + (int)threadIdx.x / SIDE_N, column = n0 + (int)threadIdx.x % SIDE_N;
    if (row >= N || column >= OC) return;
    const int64_t at = (int64_t)row * OC + column;
    const float y = gelu(fn, bias ? sum + bias[column] : sum);
    from_float(out[at], residual ? y + to_float(residual[at]) : y);
}

}  // namespace

extern "C" int64_t OPERATOR(packed_bytes)(int prec, int C, int OC) { return gpu_held_bytes(prec, C, OC); }

void OPERATOR(linear_pack)(void *packed, const float *weight, int prec, int C, int OC) {
    OPERATOR(held_write)(packed, weight, prec, C, OC);
}

void OPERATOR(embedding_packed)(act *out, const int32_t *tokens, const int32_t *starts, const void *packed,
                                const float *wpe, int prec, int B, int T, int C) {
    OPERATOR(embedding_forward)(out, tokens, starts, packed, prec, wpe, B, T, C);
}

void OPERATOR(linear_packed)(act *out, const act *in, const void *packed, const float *bias, const act *residual,
                             int fn, int prec, int N, int C, int OC) {
    if (prec != PREC_INT8) {
        OPERATOR(linear_forward)(out, NULL, in, packed, prec, bias, residual, fn, prec, N, C, OC);
        return;
    }
    const int64_t groups = (int64_t)N * groups_of(C), blocks = divide_up(N, SIDE_M) * divide_up(OC, SIDE_N);
    Group *rows = (Group *)scratch((size_t)groups * sizeof(Group));
    launch_early(Grid(divide_up(groups, WARPS), THREADS), quantise_rows, rows, in, C, groups);
    launch_early(Grid(blocks, TERM), product_int8, out, rows, (const Group *)packed, bias, residual, fn, N, C, OC);
}

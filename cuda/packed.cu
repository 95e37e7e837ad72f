/* packed.cu -- weights that many products read, in a session.  Their form is that of held weights (held.cuh), so a
 * product in fp32 or bf16 is linear_forward's.  In int8 rows are quantised like the weight; a thread makes one value of
 * the result, group after group: right, and there to be made fast. */
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

__global__ void __launch_bounds__(THREADS)
    product_int8(act *out, const Group *rows, const Group *weight, const float *bias, const act *residual, int fn,
                 int C, int OC, int64_t values) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    launch_next(), wait_earlier();
    if (at >= values) return;
    const int G = groups_of(C);
    const Group *a = rows + at / OC * G, *b = weight + at % OC * G;
    float sum = 0.0f;
    for (int g = 0; g < G; g++) {
        int exact = 0;
        for (int i = 0; i < INT8_GROUP; i++) exact += a[g].q[i] * b[g].q[i];
        sum += (float)exact * (a[g].scale * b[g].scale);
    }
    const float y = gelu(fn, bias ? sum + bias[at % OC] : sum);
    from_float(out[at], residual ? y + to_float(residual[at]) : y);
}

}  // namespace

extern "C" int64_t OPERATOR(packed_bytes)(int prec, int C, int OC) { return bytes_of_held(prec, C, OC); }

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
    const int64_t groups = (int64_t)N * groups_of(C), values = (int64_t)N * OC;
    Group *rows = (Group *)scratch((size_t)groups * sizeof(Group));
    launch_early(Grid(divide_up(groups, WARPS), THREADS), quantise_rows, rows, in, C, groups);
    launch_early(Grid(divide_up(values, THREADS), THREADS), product_int8, out, rows, (const Group *)packed, bias,
                 residual, fn, C, OC, values);
}

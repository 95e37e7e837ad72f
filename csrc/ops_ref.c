/* ops_ref.c -- every operator as plain loops on one thread.  Read this file after ops.def: together they are the whole
 * arithmetic of the models.
 *
 * It is what the fast kernels are compared with, and what runs where none of them can.  It keeps the contract's order
 * of summation; products and sums are rounded one by one (a fused multiply-add without the hardware for it is a slow
 * call).  Row pointers carry their indices in their name: x_n is row n of x. */
#define ACT float
#include "ops.h"
#include <math.h>
#include <string.h>
#include "clock.h"
#include "memory.h"
#include "system.h"
#include "threads.h"

static int min_int(int a, int b) { return a < b ? a : b; }

/* Nearest bf16, ties to even; NaN stays NaN. */
static float bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if (x != x) u |= 0x400000; /* a NaN whose bits are all below would become infinity */
    else u += 0x7fff + (u >> 16 & 1);
    u &= 0xffff0000u;
    memcpy(&x, &u, sizeof u);
    return x;
}

static float operand(float x, int prec) { return prec == PREC_BF16 ? bf16(x) : x; }

/* n floats to memory and back: rounded and in 2 bytes a value where prec says so. */
static void to_memory(void *p, const float *x, int prec, int n) {
    for (int i = 0; i < n; i++) {
        float rounded = operand(x[i], prec);
        uint32_t u;
        memcpy(&u, &rounded, sizeof u);
        if (prec == PREC_BF16) ((uint16_t *)p)[i] = (uint16_t)(u >> 16);
        else ((uint32_t *)p)[i] = u;
    }
}

static void from_memory(float *x, const void *p, int prec, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t u = prec == PREC_BF16 ? (uint32_t)((const uint16_t *)p)[i] << 16 : ((const uint32_t *)p)[i];
        memcpy(&x[i], &u, sizeof u);
    }
}

/* y += a * x.  The one inner loop worth care: it runs at the speed of the first cache, where a chain per element in an
 * array of fixed length made gcc shuffle. */
static void add_scaled(float *restrict y, float a, const float *restrict x, int n) {
    for (int i = 0; i < n; i++) y[i] += a * x[i];
}

/* sums[c] += the sum of column c of x (N, C) */
static void column_sums(float *sums, const float *x, int N, int C) {
    enum { STRIP = 16 }; /* columns at a time: one pass over memory, and the sums stay out of `sums` until finished */
    for (int c0 = 0; c0 < C; c0 += STRIP) {
        int columns = min_int(STRIP, C - c0);
        double sum[STRIP] = {0};
        for (int n = 0; n < N; n++)
            for (int c = 0; c < columns; c++) sum[c] += (double)x[(int64_t)n * C + c0 + c];
        for (int c = 0; c < columns; c++) sums[c0 + c] += (float)sum[c];
    }
}

/* ---- activations as floats: here they are ------------------------------------------------------------------------ */

static void act_read(float *out, const float *in, int N, int C, int ld) {
    for (int64_t n = 0; n < N; n++) memcpy(out + n * C, in + n * ld, (size_t)C * sizeof *out);
}
static void act_write(float *out, const float *in, int64_t n) { memcpy(out, in, (size_t)n * sizeof *out); }

/* ---- weights that are not trained ------------------------------------------------------------------------------- */

/* int8: up to 64 values that share a scale. */
typedef struct {
    float scale;
    int8_t q[INT8_GROUP];
} Group;

static int groups_of(int C) { return (C + INT8_GROUP - 1) / INT8_GROUP; }

/* A value that is not finite makes the scale so. */
static void quantise(Group *groups, const float *x, int C) {
    for (int g = 0; g < groups_of(C); g++, groups++, x += INT8_GROUP) {
        int values = min_int(INT8_GROUP, C - g * INT8_GROUP);
        float max = 0.0f, bad = 0.0f;
        for (int i = 0; i < values; i++) max = fmaxf(max, fabsf(x[i])), bad += x[i] * 0.0f;
        float inverse = max > 0.0f ? 127.0f / max : 0.0f;
        memset(groups->q, 0, sizeof groups->q);
        for (int i = 0; i < values; i++) groups->q[i] = isfinite(x[i] * inverse) ? (int8_t)rintf(x[i] * inverse) : 0;
        groups->scale = max / 127.0f + bad;
    }
}

static int64_t held_bytes(int held, int C, int OC) {
    if (held == PREC_INT8) return (int64_t)OC * groups_of(C) * (int64_t)sizeof(Group);
    return (int64_t)OC * C * (held == PREC_BF16 ? 2 : 4);
}

static void held_write(void *out, const float *weight, int held, int C, int OC) {
    for (int64_t o = 0; o < OC; o++) {
        char *row = (char *)out + held_bytes(held, C, (int)o);
        if (held == PREC_INT8) quantise((Group *)row, weight + o * C, C);
        else to_memory(row, weight + o * C, held, C);
    }
}

/* n values of row o from column c on */
static void held_part(float *out, const void *weight, int held, int C, int64_t o, int c, int n) {
    const char *row = (const char *)weight + held_bytes(held, C, (int)o);
    const Group *groups = (const Group *)row;
    if (held != PREC_INT8) from_memory(out, row + (int64_t)c * (held == PREC_BF16 ? 2 : 4), held, n);
    for (int i = 0; i < n && held == PREC_INT8; i++)
        out[i] = groups[(c + i) / INT8_GROUP].q[(c + i) % INT8_GROUP] * groups[(c + i) / INT8_GROUP].scale;
}

static void held_read(float *weight, const void *in, int held, int C, int OC) {
    for (int64_t o = 0; o < OC; o++) held_part(weight + o * C, in, held, C, o, 0, C);
}

/* ---- embedding ------------------------------------------------------------------------------------------------- */

static int position(const int32_t *starts, int64_t bt, int T) { return (int)(bt % T) - (starts ? starts[bt] : 0); }

static void embedding_forward(float *out, const int32_t *tokens, const int32_t *starts, const void *wte, int held,
                              const float *wpe, int B, int T, int C) {
    for (int64_t bt = 0; bt < (int64_t)B * T; bt++) {
        float *out_bt = out + bt * C;
        held_read(out_bt, (const char *)wte + held_bytes(held, C, tokens[bt]), held, C, 1);
        const float *wpe_p = wpe ? wpe + (int64_t)position(starts, bt, T) * C : NULL;
        for (int c = 0; c < C && wpe; c++) out_bt[c] += wpe_p[c];
    }
}

/* dtable[r] += the sum of the rows of dout whose `row` is r, in order.  The rows that belong to r are a linked list:
 * first[r], then next[...], -1 at its end. */
static void add_rows(float *dtable, const float *dout, const int32_t *row, int32_t *first, int32_t *next, double *sum,
                     int N, int C, int rows) {
    for (int r = 0; r < rows; r++) first[r] = -1;
    for (int n = N - 1; n >= 0; n--) {
        next[n] = first[row[n]];
        first[row[n]] = n;
    }
    for (int r = 0; r < rows; r++) {
        if (first[r] < 0) continue;
        memset(sum, 0, (size_t)C * sizeof *sum);
        for (int n = first[r]; n >= 0; n = next[n])
            for (int c = 0; c < C; c++) sum[c] += (double)dout[(int64_t)n * C + c];
        for (int c = 0; c < C; c++) dtable[(int64_t)r * C + c] += (float)sum[c];
    }
}

static void embedding_backward(float *dwte, float *dwpe, const float *dout, const int32_t *tokens,
                               const int32_t *starts, int B, int T, int C, int V) {
    int N = B * T;
    double *sum = scratch(SCRATCH_CALL);
    int32_t *next = (int32_t *)(sum + C), *positions = next + N, *first = positions + N;
    add_rows(dwte, dout, tokens, first, next, sum, N, C, V);
    if (!dwpe) return;
    for (int n = 0; n < N; n++) positions[n] = position(starts, n, T);
    add_rows(dwpe, dout, positions, first, next, sum, N, C, T);
}

/* ---- norms ----------------------------------------------------------------------------------------------------- */

/* Sums along a row of channels, and along one of the vocabulary, run in double: a single chain of floats would lose
 * digits that the fast kernels, with their many lanes, keep. */

static void layernorm_forward(float *out, float *mean, float *rstd, const float *in, const float *weight,
                              const float *bias, float eps, int N, int C) {
    for (int n = 0; n < N; n++) {
        const float *x = in + (int64_t)n * C;
        double sum = 0.0, squares = 0.0;
        for (int c = 0; c < C; c++) sum += x[c];
        float m = (float)(sum / C);
        for (int c = 0; c < C; c++) squares += (x[c] - m) * (x[c] - m);
        float r = 1.0f / sqrtf((float)(squares / C) + eps);
        for (int c = 0; c < C; c++) out[(int64_t)n * C + c] = (x[c] - m) * r * weight[c] + (bias ? bias[c] : 0.0f);
        mean[n] = m;
        rstd[n] = r;
    }
}

static void rmsnorm_forward(float *out, float *rstd, const float *in, const float *weight, float eps, int N, int C) {
    for (int n = 0; n < N; n++) {
        const float *x = in + (int64_t)n * C;
        double squares = 0.0;
        for (int c = 0; c < C; c++) squares += x[c] * x[c];
        float r = 1.0f / sqrtf((float)(squares / C) + eps);
        for (int c = 0; c < C; c++) out[(int64_t)n * C + c] = x[c] * r * weight[c];
        rstd[n] = r;
    }
}

/* Both norms backwards; RMSNorm is the one whose mean is NULL.  Forward was norm = (in - mean) * rstd and
 * out = norm * weight + bias.  With dnorm = dout * weight, and averages over the row,
 *     din = dres + rstd * (dnorm - average(dnorm) - norm * average(dnorm * norm))
 * where the middle term is what reaches `in` through the mean. */
static void norm_backward(float *din, float *dweight, float *dbias, float *dbias_in, const float *dout,
                          const float *dres, const float *in, const float *weight, const float *mean, const float *rstd,
                          int N, int C) {
    double *sum = scratch(SCRATCH_CALL);
    memset(sum, 0, (size_t)C * sizeof *sum);
    for (int n = 0; n < N; n++) {
        int64_t row = (int64_t)n * C;
        const float *x = in + row, *dy = dout + row;
        float m = mean ? mean[n] : 0.0f, r = rstd[n];
        double dnorm_sum = 0.0, dnorm_norm = 0.0;
        for (int c = 0; c < C; c++) {
            float norm = (x[c] - m) * r, dnorm = dy[c] * weight[c];
            sum[c] += (double)(dy[c] * norm);
            dnorm_sum += dnorm;
            dnorm_norm += dnorm * norm;
        }
        float through_mean = mean ? (float)(dnorm_sum / C) : 0.0f, through_rstd = (float)(dnorm_norm / C);
        for (int c = 0; c < C; c++) {
            float norm = (x[c] - m) * r, dnorm = dy[c] * weight[c];
            float d = r * (dnorm - through_mean - norm * through_rstd);
            din[row + c] = dres ? dres[row + c] + d : d;
        }
    }
    for (int c = 0; c < C && dweight; c++) dweight[c] += (float)sum[c];
    if (dbias) column_sums(dbias, dout, N, C);
    if (dbias_in) column_sums(dbias_in, din, N, C);
}

static void layernorm_backward(float *din, float *dweight, float *dbias, float *dbias_in, const float *dout,
                               const float *dres, const float *in, const float *weight, const float *mean,
                               const float *rstd, int N, int C) {
    norm_backward(din, dweight, dbias, dbias_in, dout, dres, in, weight, mean, rstd, N, C);
}

static void rmsnorm_backward(float *din, float *dweight, float *dbias_in, const float *dout, const float *dres,
                             const float *in, const float *weight, const float *rstd, int N, int C) {
    norm_backward(din, dweight, NULL, dbias_in, dout, dres, in, weight, NULL, rstd, N, C);
}

/* ---- linear layer ---------------------------------------------------------------------------------------------- */

enum { TILE_ROWS = 64, TILE_COLS = 64 };

/* One operand of a product: element (i, j) is value first + i * row + j * col, so that a transpose is a swap.  A weight
 * may be held otherwise than as floats: then its rows have C values. */
typedef struct {
    const void *p;
    int64_t first, row, col;
    int held, C;
} Matrix;

static float element(const Matrix *m, int64_t i, int64_t j) {
    int64_t at = m->first + i * m->row + j * m->col;
    if (m->held == PREC_FP32) return ((const float *)m->p)[at];
    float x;
    held_part(&x, m->p, m->held, m->C, at / m->C, (int)(at % m->C), 1);
    return x;
}

/* sums (rows, cols) = A (rows, K) @ B (K, cols) in the contract's order.  A K block of B is gathered once and then used
 * for every row. */
static void multiply(float sums[][TILE_COLS], Matrix A, Matrix B, int prec, int rows, int cols, int K) {
    enum { LONGEST = 2 * K_BLOCK };
    const int block = prec == PREC_BF16 ? 2 * K_BLOCK : K_BLOCK; /* a unit is one fp32 or a pair of bf16 */
    float a[LONGEST], b[LONGEST][TILE_COLS];
    memset(sums, 0, (size_t)rows * sizeof *sums);
    for (int k0 = 0; k0 < K; k0 += block) {
        int kc = min_int(block, K - k0);
        for (int j = 0; j < cols; j++)
            for (int k = 0; k < kc; k++) b[k][j] = operand(element(&B, k0 + k, j), prec);
        for (int i = 0; i < rows; i++) {
            for (int k = 0; k < kc; k++) a[k] = operand(element(&A, i, k0 + k), prec);
            float chain[TILE_COLS] = {0};
            for (int k = 0; k < kc; k++) add_scaled(chain, a[k], b[k], cols);
            for (int j = 0; j < cols; j++) sums[i][j] += chain[j];
        }
    }
}

static float gelu(int fn, float x) {
    if (fn == FN_GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    if (fn == FN_GELU_ERF) return 0.5f * x * (1.0f + erff(0.70710678f * x));
    return x;
}

static float dgelu(int fn, float x) {
    if (fn == FN_GELU_TANH) {
        float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
        float slope = (1.0f - t) * (1.0f + t) * 0.79788456f * (1.0f + 0.134145f * x * x);
        return 0.5f * (1.0f + t) + (slope > 0.0f ? 0.5f * x * slope : 0.0f); /* a huge x^2 is not multiplied by 0 */
    }
    if (fn == FN_GELU_ERF) {
        float bell = 0.39894228f * expf(-0.5f * x * x); /* exp(-x^2 / 2) / sqrt(2 pi) */
        return 0.5f * (1.0f + erff(0.70710678f * x)) + x * bell;
    }
    return 1.0f;
}

static void linear_forward(float *out, float *pre, const float *in, const void *weight, int held, const float *bias,
                           const float *residual, int fn, int prec, int N, int C, int OC) {
    float sums[TILE_ROWS][TILE_COLS];
    for (int n0 = 0; n0 < N; n0 += TILE_ROWS)
        for (int o0 = 0; o0 < OC; o0 += TILE_COLS) {
            int rows = min_int(TILE_ROWS, N - n0), cols = min_int(TILE_COLS, OC - o0);
            Matrix A = {.p = in, .first = (int64_t)n0 * C, .row = C, .col = 1};
            Matrix B = {.p = weight, .first = (int64_t)o0 * C, .row = 1, .col = C, .held = held, .C = C};
            multiply(sums, A, B, prec, rows, cols, C);
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < cols; j++) {
                    int64_t at = (int64_t)(n0 + i) * OC + o0 + j;
                    float x = bias ? sums[i][j] + bias[o0 + j] : sums[i][j];
                    float y = gelu(fn, x);
                    if (pre) pre[at] = x;
                    out[at] = residual ? y + residual[at] : y;
                }
        }
}

static float int8_dot(const Group *a, const Group *b, int C) {
    float sum = 0.0f;
    for (int g = 0; g < groups_of(C); g++) {
        int32_t exact = 0;
        for (int i = 0; i < INT8_GROUP; i++) exact += a[g].q[i] * b[g].q[i];
        sum += (float)exact * (a[g].scale * b[g].scale);
    }
    return sum;
}

static void int8_product(float *out, const float *in, const Group *weight, const float *bias, const float *residual,
                         int fn, int N, int C, int OC) {
    Group *row = scratch(SCRATCH_CALL);
    for (int n = 0; n < N; n++) {
        quantise(row, in + (int64_t)n * C, C);
        for (int o = 0; o < OC; o++) {
            int64_t at = (int64_t)n * OC + o;
            float x = int8_dot(row, weight + (int64_t)o * groups_of(C), C) + (bias ? bias[o] : 0.0f);
            out[at] = residual ? gelu(fn, x) + residual[at] : gelu(fn, x);
        }
    }
}

/* Plain loops gain nothing from another order: a packed weight is a held one. */
static int64_t packed_bytes(int prec, int C, int OC) { return held_bytes(prec, C, OC); }

static void linear_pack(void *packed, const float *weight, int prec, int C, int OC) {
    held_write(packed, weight, prec, C, OC);
}

static void embedding_packed(float *out, const int32_t *tokens, const int32_t *starts, const void *packed,
                             const float *wpe, int prec, int B, int T, int C) {
    embedding_forward(out, tokens, starts, packed, prec, wpe, B, T, C);
}

static void linear_packed(float *out, const float *in, const void *packed, const float *bias, const float *residual,
                          int fn, int prec, int N, int C, int OC) {
    if (prec == PREC_INT8) int8_product(out, in, packed, bias, residual, fn, N, C, OC);
    else linear_forward(out, NULL, in, packed, prec, bias, residual, fn, prec, N, C, OC);
}

static void norm_linear_packed(float *out, float *normed, float *moments, const float *in, int norm, const float *gain,
                               const float *shift, float eps, const void *packed, const float *bias, int fn, int prec,
                               int N, int C, int OC) {
    if (norm == NORM_LAYERNORM) layernorm_forward(normed, moments, moments + N, in, gain, shift, eps, N, C);
    else rmsnorm_forward(normed, moments, in, gain, eps, N, C);
    linear_packed(out, normed, packed, bias, NULL, fn, prec, N, C, OC);
}

static void linear_backward_input(float *din, const float *dout, const float *dres, const void *weight, int held,
                                  const float *pre, int fn, int prec, int N, int C, int OC) {
    float sums[TILE_ROWS][TILE_COLS];
    for (int n0 = 0; n0 < N; n0 += TILE_ROWS)
        for (int c0 = 0; c0 < C; c0 += TILE_COLS) {
            int rows = min_int(TILE_ROWS, N - n0), cols = min_int(TILE_COLS, C - c0);
            Matrix A = {.p = dout, .first = (int64_t)n0 * OC, .row = OC, .col = 1};
            Matrix B = {.p = weight, .first = c0, .row = C, .col = 1, .held = held, .C = C};
            multiply(sums, A, B, prec, rows, cols, OC);
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < cols; j++) {
                    int64_t at = (int64_t)(n0 + i) * C + c0 + j;
                    float d = fn == FN_NONE ? sums[i][j] : sums[i][j] * dgelu(fn, pre[at]);
                    din[at] = dres ? dres[at] + d : d;
                }
        }
}

static void linear_backward_weight(float *dweight, float *dbias, const float *dout, const float *in, int accumulate,
                                   int prec, int N, int C, int OC) {
    float sums[TILE_ROWS][TILE_COLS];
    double total[TILE_ROWS][TILE_COLS];
    const int chain = prec == PREC_BF16 ? 2 * ROW_CHAIN : ROW_CHAIN;
    for (int o0 = 0; o0 < OC; o0 += TILE_ROWS)
        for (int c0 = 0; c0 < C; c0 += TILE_COLS) {
            int rows = min_int(TILE_ROWS, OC - o0), cols = min_int(TILE_COLS, C - c0);
            memset(total, 0, sizeof total);
            for (int n0 = 0; n0 < N; n0 += chain) {
                Matrix A = {.p = dout, .first = (int64_t)n0 * OC + o0, .row = 1, .col = OC};
                Matrix B = {.p = in, .first = (int64_t)n0 * C + c0, .row = C, .col = 1};
                multiply(sums, A, B, prec, rows, cols, min_int(chain, N - n0));
                for (int i = 0; i < rows; i++)
                    for (int j = 0; j < cols; j++) total[i][j] += (double)sums[i][j];
            }
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < cols; j++) {
                    float *d = dweight + (int64_t)(o0 + i) * C + c0 + j;
                    *d = accumulate ? *d + (float)total[i][j] : (float)total[i][j];
                }
        }
    if (dbias) column_sums(dbias, dout, N, OC);
}

/* ---- GELU by itself, LoRA ---------------------------------------------------------------------------------------- */

static void gelu_forward(float *out, const float *in, int fn, int N, int F) {
    for (int64_t i = 0; i < (int64_t)N * F; i++) out[i] = gelu(fn, in[i]);
}

static void gelu_backward(float *din, const float *dout, const float *in, int fn, int N, int F) {
    for (int64_t i = 0; i < (int64_t)N * F; i++) din[i] = dout[i] * dgelu(fn, in[i]);
}

static void lora_spread(float *dense, const float *blocks, const int32_t *rows, float scale, int J, int r, int OC) {
    int64_t width = (int64_t)J * r;
    memset(dense, 0, (size_t)(OC * width) * sizeof *dense);
    for (int j = 0; j < J; j++)
        for (int o = rows[2 * j]; o < rows[2 * j + 1]; o++)
            for (int i = 0; i < r; i++) dense[o * width + j * r + i] = scale * *blocks++;
}

static void lora_gather(float *dblocks, const float *ddense, const int32_t *rows, float scale, int accumulate, int J,
                        int r, int OC) {
    int64_t width = (int64_t)J * r;
    (void)OC;
    for (int j = 0; j < J; j++)
        for (int o = rows[2 * j]; o < rows[2 * j + 1]; o++)
            for (int i = 0; i < r; i++, dblocks++) {
                float d = scale * ddense[o * width + j * r + i];
                *dblocks = accumulate ? *dblocks + d : d;
            }
}

/* ---- SwiGLU ---------------------------------------------------------------------------------------------------- */

static void swiglu_forward(float *out, const float *in, int N, int F) {
    for (int n = 0; n < N; n++) {
        const float *gate = in + (int64_t)n * 2 * F, *up = gate + F;
        for (int f = 0; f < F; f++) out[(int64_t)n * F + f] = gate[f] / (1.0f + expf(-gate[f])) * up[f];
    }
}

static void swiglu_backward(float *din, const float *dout, const float *in, int N, int F) {
    for (int n = 0; n < N; n++) {
        const float *gate = in + (int64_t)n * 2 * F, *up = gate + F, *dy = dout + (int64_t)n * F;
        float *dgate = din + (int64_t)n * 2 * F, *dup = dgate + F;
        for (int f = 0; f < F; f++) {
            float s = 1.0f / (1.0f + expf(-gate[f])); /* silu = gate * s, silu' = s + gate * s * (1 - s) */
            dgate[f] = dy[f] * up[f] * s * (1.0f + gate[f] * (1.0f - s));
            dup[f] = dy[f] * gate[f] * s;
        }
    }
}

/* ---- positions and attention ----------------------------------------------------------------------------------- */

/* Turn every pair of the query and key heads by its angle; direction -1 turns back. */
static void rope(float *qkv, const float *cos, const float *sin, const int32_t *starts, float direction, int B, int T,
                 int NH, int NKV, int HS) {
    int half = HS / 2;
    for (int64_t bt = 0; bt < (int64_t)B * T; bt++) {
        const float *cos_p = cos + (int64_t)position(starts, bt, T) * half;
        const float *sin_p = sin + (int64_t)position(starts, bt, T) * half;
        for (int h = 0; h < NH + NKV; h++) {
            float *x = qkv + (bt * (NH + 2 * NKV) + h) * HS, *y = x + half;
            for (int i = 0; i < half; i++) {
                float s = direction * sin_p[i], x_i = x[i], y_i = y[i];
                x[i] = x_i * cos_p[i] - y_i * s;
                y[i] = y_i * cos_p[i] + x_i * s;
            }
        }
    }
}

static void rope_forward(float *qkv, const float *cos, const float *sin, const int32_t *starts, int B, int T, int NH,
                         int NKV, int HS) {
    rope(qkv, cos, sin, starts, 1.0f, B, T, NH, NKV, HS);
}

static void rope_backward(float *dqkv, const float *cos, const float *sin, const int32_t *starts, int B, int T, int NH,
                          int NKV, int HS) {
    rope(dqkv, cos, sin, starts, -1.0f, B, T, NH, NKV, HS);
}

static float dot(const float *a, const float *b, int prec, int n) {
    float sum = 0.0f;
    if (prec == PREC_BF16)
        for (int i = 0; i < n; i++) sum += bf16(a[i]) * bf16(b[i]);
    else
        for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* y += a * x on rounded operands */
static void add_product(float *y, float a, const float *x, int prec, int n) {
    if (prec == PREC_BF16)
        for (int i = 0; i < n; i++) y[i] += bf16(a) * bf16(x[i]);
    else add_scaled(y, a, x, n);
}

/* One query against the keys start .. t: online softmax, a block of keys at a time.  Returns the lse. */
static float attend(float *out, float *sum, const float *q, const float *keys, const float *values, int64_t stride,
                    int start, int t, int prec, int HS) {
    float scale = 1.0f / sqrtf((float)HS), max = -INFINITY, total = 0.0f, p[KEY_BLOCK];
    memset(out, 0, (size_t)HS * sizeof *out);
    for (int k0 = start; k0 <= t; k0 += KEY_BLOCK) {
        int count = min_int(KEY_BLOCK, t + 1 - k0);
        float new_max = max, block_total = 0.0f;
        for (int k = 0; k < count; k++) {
            p[k] = scale * dot(q, keys + (k0 + k) * stride, prec, HS);
            new_max = fmaxf(new_max, p[k]);
        }
        memset(sum, 0, (size_t)HS * sizeof *sum);
        for (int k = 0; k < count; k++) {
            p[k] = expf(p[k] - new_max);
            block_total += p[k];
            add_product(sum, p[k], values + (k0 + k) * stride, prec, HS);
        }
        float keep = expf(max - new_max); /* what came before was relative to the old maximum */
        for (int i = 0; i < HS; i++) out[i] = out[i] * keep + sum[i];
        total = total * keep + block_total;
        max = new_max;
    }
    for (int i = 0; i < HS; i++) out[i] /= total;
    return max + logf(total);
}

static void attention_forward(float *out, float *lse, const float *qkv, const int32_t *starts, int prec, int B, int T,
                              int NH, int NKV, int HS) {
    int64_t stride = (int64_t)(NH + 2 * NKV) * HS;
    float *sum = scratch(SCRATCH_CALL);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int t = 0; t < T; t++) {
                int64_t bt = (int64_t)b * T + t;
                const float *qkv_b = qkv + (int64_t)b * T * stride;
                const float *keys = qkv_b + (NH + h / (NH / NKV)) * HS, *values = keys + NKV * HS;
                lse[((int64_t)b * NH + h) * T + t] = attend(out + (bt * NH + h) * HS, sum, qkv_b + t * stride + h * HS,
                                                            keys, values, stride, starts ? starts[bt] : 0, t, prec, HS);
            }
}

/* A page: for each key/value head 64 keys, then 64 values, all (64, HS), in 2 or 4 bytes a value. */
static int64_t page_bytes(int prec, int NKV, int HS) {
    return (int64_t)NKV * 2 * KEY_BLOCK * HS * (prec == PREC_BF16 ? 2 : 4);
}

/* One row of one head (HS) in the page of position t: of the keys (side 0) or the values (side 1). */
static char *cached(void *pages, const int32_t *table_r, int side, int t, int kv, int prec, int NKV, int HS) {
    int64_t row = (int64_t)HS * (prec == PREC_BF16 ? 2 : 4);
    return (char *)pages + table_r[t / KEY_BLOCK] * page_bytes(prec, NKV, HS) +
           ((2LL * kv + side) * KEY_BLOCK + t % KEY_BLOCK) * row;
}

static void attention_paged(float *out, void *pages, const float *qkv, const int32_t *table, const int32_t *first,
                            const int32_t *past, int prec, int R, int P, int NH, int NKV, int HS) {
    int64_t stride = (int64_t)(NH + 2 * NKV) * HS;
    float *sum = scratch(SCRATCH_CALL), *keys = sum + HS, *values = keys + (int64_t)P * KEY_BLOCK * HS;
    for (int r = 0; r < R; r++) {
        const int32_t *table_r = table + (int64_t)r * P;
        for (int kv = 0; kv < NKV; kv++) {
            int before = past[r] - first[r], length = before + first[r + 1];
            for (int n = first[r]; n < first[r + 1]; n++)
                for (int side = 0; side < 2; side++)
                    to_memory(cached(pages, table_r, side, before + n, kv, prec, NKV, HS),
                              qkv + n * stride + (NH + side * NKV + kv) * HS, prec, HS);
            for (int t = 0; t < length; t++) {
                from_memory(keys + (int64_t)t * HS, cached(pages, table_r, 0, t, kv, prec, NKV, HS), prec, HS);
                from_memory(values + (int64_t)t * HS, cached(pages, table_r, 1, t, kv, prec, NKV, HS), prec, HS);
            }
            for (int h = kv * (NH / NKV); h < (kv + 1) * (NH / NKV); h++)
                for (int n = first[r]; n < first[r + 1]; n++)
                    attend(out + ((int64_t)n * NH + h) * HS, sum, qkv + n * stride + h * HS, keys, values, HS, 0,
                           before + n, prec, HS);
        }
    }
}

/* Forward was score = scale * q.k, p = exp(score - lse), out = sum p * v.  So
 *     dv += p * dout      dp = dout.v      dscore = p * (dp - dout.out)      dq += scale * dscore * k      dk alike */
static void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *out, const float *lse,
                               const int32_t *starts, int prec, int B, int T, int NH, int NKV, int HS) {
    int64_t stride = (int64_t)(NH + 2 * NKV) * HS;
    float scale = 1.0f / sqrtf((float)HS);
    memset(dqkv, 0, (size_t)((int64_t)B * T * stride) * sizeof *dqkv);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int t = 0; t < T; t++) {
                int64_t bt = (int64_t)b * T + t, key_head = (NH + h / (NH / NKV)) * HS;
                const float *q = qkv + bt * stride + h * HS, *dy = dout + (bt * NH + h) * HS;
                float *dq = dqkv + bt * stride + h * HS;
                float dout_out = dot(dy, out + (bt * NH + h) * HS, PREC_FP32, HS);
                for (int t2 = starts ? starts[bt] : 0; t2 <= t; t2++) {
                    int64_t at = ((int64_t)b * T + t2) * stride + key_head;
                    const float *k = qkv + at, *v = k + NKV * HS;
                    float *dk = dqkv + at, *dv = dk + NKV * HS;
                    float p = expf(scale * dot(q, k, prec, HS) - lse[((int64_t)b * NH + h) * T + t]);
                    float dscore = p * (dot(dy, v, prec, HS) - dout_out);
                    add_product(dv, p, dy, prec, HS);
                    add_product(dq, dscore, k, prec, HS);
                    add_product(dk, dscore, q, prec, HS);
                }
            }
    for (int64_t bt = 0; bt < (int64_t)B * T; bt++) /* the scale once, at the end: dscore is rounded without it */
        for (int i = 0; i < (NH + NKV) * HS; i++) dqkv[bt * stride + i] *= scale;
}

/* ---- head ------------------------------------------------------------------------------------------------------ */

static void logprob_forward(float *logprobs, float *lse, float *entropy, const float *logits, const int32_t *targets,
                            float invtemp, int N, int V, int Vp) {
    for (int n = 0; n < N; n++) {
        const float *x = logits + (int64_t)n * Vp;
        float max = -INFINITY;
        double sum = 0.0, weighted = 0.0;
        for (int v = 0; v < V; v++) max = fmaxf(max, x[v] * invtemp);
        for (int v = 0; v < V; v++) { /* terms in [0, 1], one of them 1: neither overflow nor log 0 */
            float y = x[v] * invtemp - max, e = expf(y);
            sum += e;
            if (e > 0.0f) weighted += e * y; /* a logit of -infinity would make 0 * infinity */
        }
        lse[n] = (float)(max + log(sum));
        logprobs[n] = targets[n] < 0 ? 0.0f : x[targets[n]] * invtemp - lse[n];
        if (entropy) entropy[n] = (float)(log(sum) - weighted / sum); /* log p = y - log sum */
    }
}

static void logprob_backward(float *dlogits, const float *dlogprobs, const float *logits, const int32_t *targets,
                             const float *lse, float invtemp, int N, int V, int Vp) {
    for (int n = 0; n < N; n++) {
        const float *x = logits + (int64_t)n * Vp;
        float *dx = dlogits + (int64_t)n * Vp, d = invtemp * dlogprobs[n];
        int target = targets[n];
        for (int v = 0; v < Vp; v++) {
            if (target < 0 || v >= V) dx[v] = 0.0f;
            else dx[v] = d * ((v == target ? 1.0f : 0.0f) - expf(x[v] * invtemp - lse[n]));
        }
    }
}

static void logprob_forward_backward(float *dlogits, float *logprobs, float *lse, const float *dlogprobs,
                                     const float *logits, const int32_t *targets, float invtemp, int N, int V, int Vp) {
    logprob_forward(logprobs, lse, NULL, logits, targets, invtemp, N, V, Vp);
    logprob_backward(dlogits, dlogprobs, logits, targets, lse, invtemp, N, V, Vp);
}

/* Whether token a stands before token b: the greater logit, of equals the lower id. */
static int before(const float *x, int a, int b) { return x[a] > x[b] || (x[a] == x[b] && a < b); }

/* Heap whose root is the last of its tokens: let order[root] sink to its place among the first n. */
static void sink(int32_t *order, const float *x, int root, int n) {
    for (int child; (child = 2 * root + 1) < n; root = child) {
        if (child + 1 < n && before(x, order[child], order[child + 1])) child++;
        if (!before(x, order[root], order[child])) return;
        int32_t t = order[root];
        order[root] = order[child], order[child] = t;
    }
}

/* Heapsort (Williams 1964): in place, and no worse on any order of the logits. */
static void sort_tokens(int32_t *order, const float *x, int V) {
    for (int v = 0; v < V; v++) order[v] = v;
    for (int root = V / 2 - 1; root >= 0; root--) sink(order, x, root, V);
    for (int n = V - 1; n > 0; n--) {
        int32_t t = order[0];
        order[0] = order[n], order[n] = t;
        sink(order, x, 0, n);
    }
}

/* What top_k and top_p drop becomes 0 in p. */
static void drop_tail(double *p, const float *x, float top_k, float top_p, int V) {
    int32_t *order = (int32_t *)(p + V);
    int kept = top_k > 0.0f && top_k < (float)V ? (int)top_k : V;
    if (kept == V && top_p >= 1.0f) return;
    sort_tokens(order, x, V);
    if (top_p < 1.0f) {
        double mass = 0.0, sum = 0.0;
        for (int i = 0; i < kept; i++) mass += p[order[i]];
        for (kept = 0; sum < top_p * mass; kept++) sum += p[order[kept]];
    }
    for (int i = kept; i < V; i++) p[order[i]] = 0.0;
}

static void sample_row(int32_t *token, float *logprob, const float *x, const float *option, double u, int V) {
    const double temperature = option[SAMPLE_TEMPERATURE];
    double *p = scratch(SCRATCH_CALL), total = 0.0, sum = 0.0;
    int top = 0, bad = 0;
    for (int v = 0; v < V; v++) {
        if (!(x[v] < INFINITY)) bad = 1;
        if (x[v] > x[top]) top = v;
    }
    *token = -1, *logprob = NAN;
    if (bad || x[top] == -INFINITY) return;
    *token = top, *logprob = 0.0f;
    if (temperature == 0.0) return;
    for (int v = 0; v < V; v++) p[v] = exp(((double)x[v] - x[top]) / temperature);
    drop_tail(p, x, option[SAMPLE_TOP_K], option[SAMPLE_TOP_P], V);
    for (int v = 0; v < V; v++) { /* the greatest p is 1 */
        if (p[v] < option[SAMPLE_MIN_P]) p[v] = 0.0;
        total += p[v];
    }
    for (int v = 0; v < V && sum <= u * total; v++) { /* u * total may round up to total: then the last that can come */
        sum += p[v];
        if (p[v] > 0.0) *token = v;
    }
    *logprob = (float)log(p[*token] / total);
}

static void sample(int32_t *tokens, float *logprobs, const float *logits, const float *options, const double *u, int N,
                   int V, int Vp) {
    for (int n = 0; n < N; n++)
        sample_row(tokens + n, logprobs + n, logits + (int64_t)n * Vp, options + (int64_t)n * SAMPLE_COUNT, u[n], V);
}

/* ---- update ---------------------------------------------------------------------------------------------------- */

static void square_sums(double *sums, const float *x, const int64_t *offsets, int n) {
    for (int j = 0; j < n; j++) {
        double sum = 0.0;
        for (int64_t i = offsets[j]; i < offsets[j + 1]; i++) sum += (double)x[i] * (double)x[i];
        sums[j] = sum;
    }
}

static void loss_add(double *loss, const float *logprobs, const float *dlogprobs, int N) {
    double sum = 0.0;
    for (int n = 0; n < N; n++) sum += (double)logprobs[n] * (double)dlogprobs[n];
    *loss += sum;
}

static void clip_scale(float *hyper, double *norm, const double *loss, const double *sums, int n) {
    const double clip = (double)hyper[HYPER_CLIP];
    double sum = 0.0;
    for (int j = 0; j < n; j++) sum += sums[j];
    *norm = sqrt(sum);
    hyper[HYPER_SCALE] = clip > 0.0 && *norm > clip ? (float)(clip / *norm) : 1.0f;
    if (!isfinite(*norm) || !isfinite(*loss) || *norm > (double)hyper[HYPER_NORM_LIMIT] ||
        *loss > (double)hyper[HYPER_LOSS_LIMIT])
        hyper[HYPER_SCALE] = NAN;
}

static void adamw(float *weights, float *m, float *v, void *rounded, const float *grads, const float *hyper,
                  const int64_t *offsets, const int32_t *decays, int n, int64_t size) {
    const float beta1 = hyper[HYPER_BETA1], beta2 = hyper[HYPER_BETA2];
    (void)size;
    if (isnan(hyper[HYPER_SCALE])) return;
    for (int j = 0; j < n; j++)
        for (int64_t i = offsets[j]; i < offsets[j + 1]; i++) {
            float g = grads[i] * hyper[HYPER_SCALE];
            m[i] = beta1 * m[i] + (1.0f - beta1) * g;
            v[i] = beta2 * v[i] + (1.0f - beta2) * g * g;
            float step = m[i] / hyper[HYPER_C1] / (sqrtf(v[i] / hyper[HYPER_C2]) + hyper[HYPER_EPS]);
            weights[i] -= hyper[HYPER_LR] * (step + (decays[j] ? hyper[HYPER_DECAY] : 0.0f) * weights[i]);
            if (rounded) held_write((uint16_t *)rounded + i, weights + i, PREC_BF16, 1, 1);
        }
}

/* ---- the table ------------------------------------------------------------------------------------------------- */

/* As many independent chains as the innermost loop of multiply() has, on values the compiler cannot know. */
static double peak_flops(int prec, double seconds) {
    enum { STEPS = 1 << 16 };
    (void)prec; /* plain loops round to bf16 by hand and then multiply floats */
    volatile float one = 1.0f, zero = 0.0f;
    double start = now(), best = 0.0;
    do {
        float chain[TILE_COLS], a = one, b = zero;
        for (int j = 0; j < TILE_COLS; j++) chain[j] = zero;
        double t = now();
        for (int i = 0; i < STEPS; i++)
            for (int j = 0; j < TILE_COLS; j++) chain[j] = chain[j] * a + b;
        double rate = 2.0 * STEPS * TILE_COLS / (now() - t);
        for (int j = 0; j < TILE_COLS; j++) zero = chain[j];
        if (rate > best) best = rate;
    } while (now() - start < seconds);
    return best;
}

const Ops ops_ref = {
    .name = "ref",
    .act_bytes = sizeof(float),
    .on_host = 1,
    .head_rows = 2 * K_BLOCK,
    .recompute_above = 0,
    .memory_free = system_memory_free,
    .alloc = memory_alloc,
    .free = memory_free,
    .copy_in = memory_copy,
    .copy_out = memory_copy,
    .copy = memory_copy,
    .zero = memory_zero,
    .packed_bytes = packed_bytes,
    .held_bytes = held_bytes,
    .page_bytes = page_bytes,
    .peak_flops = peak_flops,
#define OP(name, args) .name = name,
#include "ops.def"
#undef OP
};

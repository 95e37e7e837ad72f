/* update.c -- the end of a step: loss, square sums, clipping, AdamW.
 *
 * Square sums and AdamW are one pass over memory each: 4 bytes a value for the first, 28 for AdamW (16 read, 12
 * written), which runs at copy bandwidth.  Partitions are blocks of fixed length, so the bits do not know the threads.
 */
#include "simd.h"
#include "threads.h"

enum { BLOCK = 16384, CHAINS = 4 };

/* The last of n tensors that begins at or before `at`; so never an empty one. */
static int tensor_at(const int64_t *offsets, int n, int64_t at) {
    int low = 0, high = n;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offsets[middle] <= at) low = middle;
        else high = middle;
    }
    return low;
}

/* ---- square sums: blocks of every tensor in one parallel region, then the blocks of a tensor in order ---- */

typedef struct {
    const float *x;
    const int64_t *offsets;
    int n;
    int64_t *first; /* (n + 1) first block of each tensor */
    double *sums;   /* one a block */
} Sums;

static void sum_block(void *context, int block) {
    const Sums *s = context;
    const int j = tensor_at(s->first, s->n, block);
    const int64_t at = s->offsets[j] + (block - s->first[j]) * BLOCK, left = s->offsets[j + 1] - at;
    const int n = left < BLOCK ? (int)left : BLOCK;
    const float *x = s->x + at;
    vd sum[CHAINS] = {vdset(0.0), vdset(0.0), vdset(0.0), vdset(0.0)};
    int i = 0;
    for (; i + CHAINS * W <= n; i += CHAINS * W)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) sum[c] = vdsquare_add(sum[c], vload_all(x + i + c * W));
    for (; i < n; i += W) sum[0] = vdsquare_add(sum[0], vload(x + i, min_int(W, n - i)));
    s->sums[block] = vdsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

void CAT(square_sums, ISA)(double *sums, const float *x, const int64_t *offsets, int n) {
    Sums s = {x, offsets, n, scratch(SCRATCH_CALL), NULL};
    s.first[0] = 0;
    for (int j = 0; j < n; j++) s.first[j + 1] = s.first[j] + (offsets[j + 1] - offsets[j] + BLOCK - 1) / BLOCK;
    s.sums = (double *)(s.first + n + 1);
    parallel_for(sum_block, &s, (int)s.first[n]);
    for (int j = 0; j < n; j++) {
        double sum = 0.0;
        for (int64_t b = s.first[j]; b < s.first[j + 1]; b++) sum += s.sums[b];
        sums[j] = sum;
    }
}

void CAT(loss_add, ISA)(double *loss, const float *logprobs, const float *dlogprobs, int N) {
    double sum = 0.0;
    for (int n = 0; n < N; n++) sum += (double)logprobs[n] * (double)dlogprobs[n];
    *loss += sum;
}

void CAT(clip_scale, ISA)(float *hyper, double *norm, const double *loss, const double *sums, int n) {
    const double clip = (double)hyper[HYPER_CLIP];
    double sum = 0.0;
    for (int j = 0; j < n; j++) sum += sums[j];
    *norm = sqrt(sum);
    hyper[HYPER_SCALE] = clip > 0.0 && *norm > clip ? (float)(clip / *norm) : 1.0f;
    const int bad = !isfinite(*norm) || !isfinite(*loss);
    if (bad || *norm > (double)hyper[HYPER_NORM_LIMIT] || *loss > (double)hyper[HYPER_LOSS_LIMIT])
        hyper[HYPER_SCALE] = NAN;
}

/* ---- AdamW: blocks of all tensors together, cut where a tensor ends ---- */

typedef struct {
    float *weights, *m, *v;
    uint16_t *rounded;
    const float *grads, *hyper;
    const int64_t *offsets;
    const int32_t *decays;
    int n;
} Adam;

/* Values at .. end - 1, of tensor j. */
static void adamw_part(const Adam *a, int j, int64_t at, int64_t end) {
    const float *hyper = a->hyper;
    const vf beta1 = vset(hyper[HYPER_BETA1]), rest1 = vset(1.0f - hyper[HYPER_BETA1]);
    const vf beta2 = vset(hyper[HYPER_BETA2]), rest2 = vset(1.0f - hyper[HYPER_BETA2]);
    const vf inv_c1 = vset(1.0f / hyper[HYPER_C1]), inv_c2 = vset(1.0f / hyper[HYPER_C2]);
    const vf scale = vset(hyper[HYPER_SCALE]), eps = vset(hyper[HYPER_EPS]), lr = vset(hyper[HYPER_LR]);
    const vf decay = vset(a->decays[j] ? hyper[HYPER_DECAY] : 0.0f);
    for (int64_t i = at; i < end; i += W) {
        const int k = end - i < W ? (int)(end - i) : W;
        vf g = vload(a->grads + i, k) * scale;
        vf m = vfma(beta1, vload(a->m + i, k), rest1 * g), v = vfma(beta2, vload(a->v + i, k), rest2 * g * g);
        vstore(a->m + i, m, k);
        vstore(a->v + i, v, k);
        vf w = vload(a->weights + i, k), step = m * inv_c1 / (vsqrt(v * inv_c2) + eps);
        w = vnfma(lr, vfma(decay, w, step), w);
        vstore(a->weights + i, w, k);
        if (!a->rounded) continue;
        uint16_t low[W];
        vstore_bf16(low, vbf16(w));
        memcpy(a->rounded + i, low, (size_t)k * sizeof *low);
    }
}

static void adamw_block(void *context, int block) {
    const Adam *a = context;
    int64_t at = a->offsets[0] + (int64_t)block * BLOCK, end = at + BLOCK;
    if (end > a->offsets[a->n]) end = a->offsets[a->n];
    for (int j = tensor_at(a->offsets, a->n, at); at < end; j++) {
        const int64_t stop = a->offsets[j + 1] < end ? a->offsets[j + 1] : end;
        adamw_part(a, j, at, stop);
        at = stop;
    }
}

void CAT(adamw, ISA)(float *weights, float *m, float *v, void *rounded, const float *grads, const float *hyper,
                     const int64_t *offsets, const int32_t *decays, int n, int64_t size) {
    Adam a = {weights, m, v, rounded, grads, hyper, offsets, decays, n};
    if (isnan(hyper[HYPER_SCALE])) return;
    parallel_for(adamw_block, &a, (int)((size + BLOCK - 1) / BLOCK));
}

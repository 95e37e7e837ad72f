/* update.c -- the end of a step: loss, square sums, clipping, AdamW.
 *
 * Square sums and AdamW are one pass over memory each: 4 bytes a value for the first, 28 for AdamW (16 read, 12
 * written), which runs at copy bandwidth.  Partitions are blocks of fixed length, so the bits do not know the threads.
 */
#include "simd.h"
#include "threads.h"

enum { BLOCK = 16384, CHAINS = 4 };

/* ---- square sums: blocks of every tensor in one parallel region, then the blocks of a tensor in order ---- */

typedef struct {
    const float *x;
    const int64_t *offsets;
    int n;
    int *first;   /* (n + 1) first block of each tensor */
    double *sums; /* one a block */
} Sums;

static void sum_block(void *context, int block) {
    const Sums *s = context;
    int j = 0, after = s->n; /* j: the last tensor that begins at or before this block; so never an empty one */
    while (after - j > 1) {
        int middle = (j + after) / 2;
        if (s->first[middle] <= block) j = middle;
        else after = middle;
    }
    const int64_t at = s->offsets[j] + (int64_t)(block - s->first[j]) * BLOCK, left = s->offsets[j + 1] - at;
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
    for (int j = 0; j < n; j++) s.first[j + 1] = s.first[j] + (int)((offsets[j + 1] - offsets[j] + BLOCK - 1) / BLOCK);
    s.sums = (double *)((char *)s.first + ((size_t)n + 16) / 16 * 64);
    parallel_for(sum_block, &s, s.first[n]);
    for (int j = 0; j < n; j++) {
        double sum = 0.0;
        for (int b = s.first[j]; b < s.first[j + 1]; b++) sum += s.sums[b];
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

/* ---- AdamW ---- */

typedef struct {
    float *weights, *m, *v;
    const float *grads, *hyper;
    float decay;
    int64_t n;
} Adam;

static void adamw_block(void *context, int block) {
    const Adam *a = context;
    const int64_t at = (int64_t)block * BLOCK;
    const int n = a->n - at < BLOCK ? (int)(a->n - at) : BLOCK;
    const float *hyper = a->hyper;
    const vf beta1 = vset(hyper[HYPER_BETA1]), rest1 = vset(1.0f - hyper[HYPER_BETA1]);
    const vf beta2 = vset(hyper[HYPER_BETA2]), rest2 = vset(1.0f - hyper[HYPER_BETA2]);
    const vf inv_c1 = vset(1.0f / hyper[HYPER_C1]), inv_c2 = vset(1.0f / hyper[HYPER_C2]);
    const vf scale = vset(hyper[HYPER_SCALE]), eps = vset(hyper[HYPER_EPS]), lr = vset(hyper[HYPER_LR]);
    const vf decay = vset(a->decay);
    for (int i = 0; i < n; i += W) {
        const int k = min_int(W, n - i);
        float *weights_i = a->weights + at + i, *m_i = a->m + at + i, *v_i = a->v + at + i;
        vf g = vload(a->grads + at + i, k) * scale;
        vf m = vfma(beta1, vload(m_i, k), rest1 * g), v = vfma(beta2, vload(v_i, k), rest2 * g * g);
        vstore(m_i, m, k);
        vstore(v_i, v, k);
        vf w = vload(weights_i, k), step = m * inv_c1 / (vsqrt(v * inv_c2) + eps);
        vstore(weights_i, vnfma(lr, vfma(decay, w, step), w), k);
    }
}

void CAT(adamw, ISA)(float *weights, float *m, float *v, const float *grads, const float *hyper, int decays,
                     int64_t n) {
    Adam a = {weights, m, v, grads, hyper, decays ? hyper[HYPER_DECAY] : 0.0f, n};
    if (isnan(hyper[HYPER_SCALE])) return;
    parallel_for(adamw_block, &a, (int)((n + BLOCK - 1) / BLOCK));
}

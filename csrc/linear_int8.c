/* linear_int8.c -- a product with a weight in 8 bits: little more than a quarter of the bytes of fp32, for decoding.
 *
 * Weights and rows are quantised alike, in groups of 64 values along C (held.h).  The products of a group are added as
 * integers, exactly; the group's sum times both scales is added, group after group, to one float.  So a row's bits
 * depend on that row alone.
 *
 * A packed weight is a row of panels of NR columns; a panel is a row of groups; a group has the scales of its columns,
 * then 16 vectors of NR columns of 4 neighbouring values each.  Weights are stored as q + 128, because the CPU
 * multiplies unsigned by signed bytes: 128 times the sum of a row's group is taken away again. */
#include "held.h"
#include "linear.h"
#include "threads.h"

enum { GROUP = INT8_GROUP, QUADS = GROUP / 4, GROUP_BYTES = NR * (4 + GROUP), ROWS = 4 };

/* ---- packing the weight ---- */

typedef struct {
    uint8_t *packed;
    const float *weight;
    int C, OC;
} Pack;

static void pack_panel(void *context, int panel) {
    const Pack *p = context;
    for (int g = 0; g < groups_of(p->C); g++) {
        uint8_t *group = p->packed + ((int64_t)panel * groups_of(p->C) + g) * GROUP_BYTES;
        for (int j = 0; j < NR; j++) {
            int o = panel * NR + j, values = o < p->OC ? min_int(GROUP, p->C - g * GROUP) : 0;
            int8_t q[GROUP];
            float scale = quantise(q, p->weight + (int64_t)(values ? o : 0) * p->C + g * GROUP, values);
            memcpy(group + 4 * j, &scale, sizeof scale);
            for (int k = 0; k < GROUP; k++) group[4 * NR + ((k / 4) * NR + j) * 4 + k % 4] = (uint8_t)(q[k] + 128);
        }
    }
}

int64_t CAT(int8_bytes, ISA)(int C, int OC) { return (int64_t)((OC + NR - 1) / NR) * groups_of(C) * GROUP_BYTES; }

void CAT(int8_pack, ISA)(void *packed, const float *weight, int C, int OC) {
    Pack p = {packed, weight, C, OC};
    parallel_for(pack_panel, &p, (OC + NR - 1) / NR);
}

void CAT(int8_row, ISA)(float *out, const void *packed, int C, int o) {
    const uint8_t *group = (const uint8_t *)packed + (int64_t)(o / NR) * groups_of(C) * GROUP_BYTES;
    for (int c = 0; c < C; c++) {
        int k = c % GROUP;
        float scale;
        if (c && !k) group += GROUP_BYTES;
        memcpy(&scale, group + 4 * (o % NR), sizeof scale);
        out[c] = (float)(group[4 * NR + ((k / 4) * NR + o % NR) * 4 + k % 4] - 128) * scale;
    }
}

/* ---- the product ---- */

typedef struct {
    const Epilogue *end;
    const float *in;
    const uint8_t *packed;
    int N, C, OC, tasks;
    int8_t *q;       /* (N, groups, 64) */
    float *scales;   /* (N, groups) */
    int32_t *begins; /* (N, groups): -128 times the sum of the group */
} Product;

static void quantise_row(void *context, int n) {
    const Product *p = context;
    for (int g = 0, G = groups_of(p->C); g < G; g++) {
        int64_t at = (int64_t)n * G + g;
        p->scales[at] =
            quantise(p->q + at * GROUP, p->in + (int64_t)n * p->C + g * GROUP, min_int(GROUP, p->C - g * GROUP));
        int32_t sum = 0;
        for (int k = 0; k < GROUP; k++) sum += p->q[at * GROUP + k];
        p->begins[at] = -128 * sum;
    }
}

/* S (rows, NR) = the sums of rows n .. n + rows - 1 over one panel. */
INLINE void panel_sums(const int rows, const Product *p, int n, const uint8_t *panel, float *S) {
    const int G = groups_of(p->C);
    vf sum[ROWS][NV];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sum[i][v] = vset(0.0f);
    for (int g = 0; g < G; g++, panel += GROUP_BYTES) {
        vi acc[ROWS][NV];
        vf scales[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) scales[v] = vload_all((const float *)panel + v * W);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) acc[i][v] = viset(p->begins[(int64_t)(n + i) * G + g]);
        /* CPUs prefetch by the address of the load that steps through memory: unrolled, each would step by a group, and
         * the product would run at three quarters of the speed of memory */
#pragma GCC unroll 1
        for (int k = 0; k < QUADS; k++) {
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) {
                int32_t quad;
                memcpy(&quad, p->q + ((int64_t)(n + i) * G + g) * GROUP + 4 * k, sizeof quad);
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++)
                    acc[i][v] = vidot(acc[i][v], viload(panel + 4 * (NR + k * NR + v * W)), quad);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                vf scale = scales[v] * vset(p->scales[(int64_t)(n + i) * G + g]);
                sum[i][v] = vfma(vifloat(acc[i][v]), scale, sum[i][v]);
            }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) vstore_all(S + i * NR + v * W, sum[i][v]);
}

static void panel_rows(const Product *p, int n, int rows, const uint8_t *panel, float *S) {
    if (rows >= 4) panel_sums(4, p, n, panel, S);
    else if (rows == 3) panel_sums(3, p, n, panel, S);
    else if (rows == 2) panel_sums(2, p, n, panel, S);
    else panel_sums(1, p, n, panel, S);
}

static void product_task(void *context, int task) {
    const Product *p = context;
    const int panels = (p->OC + NR - 1) / NR;
    int begin = (int)((int64_t)panels * task / p->tasks), end = (int)((int64_t)panels * (task + 1) / p->tasks);
    for (int panel = begin; panel < end; panel++) {
        fetch_bias(p->end, p->OC, panel * NR);
        for (int n = 0; n < p->N; n += ROWS) {
            float S[ROWS * NR];
            int rows = min_int(ROWS, p->N - n), j = panel * NR;
            panel_rows(p, n, rows, p->packed + (int64_t)panel * groups_of(p->C) * GROUP_BYTES, S);
            for (int i = 0; i < rows; i++) finish_row(p->end, p->OC, S + i * NR, n + i, j, min_int(NR, p->OC - j));
        }
    }
}

enum { ROWS_AT_ONCE = 4096 };

void CAT(int8_product, ISA)(const Epilogue *e, const float *in, const void *packed, int N, int C, int OC) {
    const int64_t G = groups_of(C);
    for (int n = 0; n < N; n += ROWS_AT_ONCE) {
        int rows = min_int(ROWS_AT_ONCE, N - n);
        Epilogue end = *e;
        end.c += (int64_t)n * OC;
        if (end.residual) end.residual += (int64_t)n * OC;
        Product p = {&end, in + (int64_t)n * C, packed, rows, C, OC, 0, scratch(SCRATCH_CALL), NULL, NULL};
        p.scales = (float *)(p.q + rows * G * GROUP);
        p.begins = (int32_t *)(p.scales + rows * G);
        p.tasks = min_int((OC + NR - 1) / NR, threads_get() * TASKS_A_THREAD);
        parallel_for(quantise_row, &p, rows);
        parallel_for(product_task, &p, p.tasks);
    }
}

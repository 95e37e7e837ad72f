/* held.c -- writing and reading weights that are held in bf16 or int8; see held.h.  Bound by memory. */
#include "held.h"
#include "threads.h"

int64_t CAT(held_bytes, ISA)(int held, int C, int OC) {
    if (held == PREC_INT8) return (int64_t)OC * groups_of(C) * (int64_t)sizeof(Group);
    return (int64_t)OC * C * (held == PREC_BF16 ? 2 : 4);
}

/* ---- reading ---- */

/* At most 64 values of one group, from value c on. */
static void read_group(float *out, const Group *g, int c, int n) {
    const vf scale = vset(g->scale);
    int i = 0;
    for (; i + W <= n; i += W) vstore_all(out + i, vload_int8(g->q + c + i) * scale);
    for (; i < n; i++) out[i] = (float)g->q[c + i] * g->scale;
}

void CAT(held_part, ISA)(float *out, const void *weight, int held, int C, int64_t o, int c, int n) {
    int i = 0;
    if (held == PREC_FP32) {
        memcpy(out, held_at(weight, held, C, o, c), (size_t)n * sizeof *out);
    } else if (held == PREC_BF16) {
        const uint16_t *p = (const uint16_t *)held_at(weight, held, C, o, c);
        for (; i + W <= n; i += W) vstore_all(out + i, vload_bf16(p + i));
        for (; i < n; i++) out[i] = from_bf16(p[i]);
    } else {
        const Group *row = (const Group *)weight + o * groups_of(C);
        for (int count; i < n; i += count) {
            int in_group = (c + i) % INT8_GROUP;
            count = min_int(INT8_GROUP - in_group, n - i);
            read_group(out + i, row + (c + i) / INT8_GROUP, in_group, count);
        }
    }
}

typedef struct {
    float *weight;
    void *held;
    int as, C, OC, rows;
} Job;

static void read_rows(void *context, int task) {
    const Job *job = context;
    for (int o = task * job->rows; o < min_int(job->OC, (task + 1) * job->rows); o++)
        CAT(held_part, ISA)(job->weight + (int64_t)o * job->C, job->held, job->as, job->C, o, 0, job->C);
}

void CAT(held_read, ISA)(float *weight, const void *in, int held, int C, int OC) {
    Job job = {weight, (void *)in, held, C, OC, rows_per_task(C)};
    parallel_for(read_rows, &job, tasks_for(OC, job.rows));
}

/* ---- writing ---- */

static void write_bf16(uint16_t *out, const float *x, int n) {
    int i = 0;
    for (; i + W <= n; i += W) vstore_bf16(out + i, vbf16(vload_all(x + i)));
    uint16_t last[W];
    vstore_bf16(last, vbf16(vload(x + i, n - i)));
    memcpy(out + i, last, (size_t)(n - i) * sizeof *out);
}

static void write_rows(void *context, int task) {
    const Job *job = context;
    const int C = job->C;
    for (int o = task * job->rows; o < min_int(job->OC, (task + 1) * job->rows); o++) {
        const float *x = job->weight + (int64_t)o * C;
        char *row = (char *)job->held + CAT(held_bytes, ISA)(job->as, C, o);
        Group *groups = (Group *)row;
        if (job->as == PREC_FP32) memcpy(row, x, (size_t)C * sizeof *x);
        else if (job->as == PREC_BF16) write_bf16((uint16_t *)row, x, C);
        else
            for (int g = 0; g < groups_of(C); g++)
                groups[g].scale = quantise(groups[g].q, x + g * INT8_GROUP, min_int(INT8_GROUP, C - g * INT8_GROUP));
    }
}

void CAT(held_write, ISA)(void *out, const float *weight, int held, int C, int OC) {
    Job job = {(float *)weight, out, held, C, OC, rows_per_task(C)};
    parallel_for(write_rows, &job, tasks_for(OC, job.rows));
}

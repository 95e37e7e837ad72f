/* rope.c -- rotary positions, in place: as the plain version, a vector of pairs at a time, rows shared out among the
 * threads.  Reads and writes the queries and keys once; bound by memory, from which rows ahead are fetched: the values
 * between a row's keys and the next row end what the processor would fetch by itself. */
#include "simd.h"
#include "threads.h"

typedef struct {
    float *qkv;
    const float *cos, *sin;
    const int32_t *starts;
    float direction; /* 1 turns, -1 turns back */
    int N, T, turned, heads, HS, rows;
} Job;

static void turn_row(const Job *job, int n) {
    const int half = job->HS / 2, p = n % job->T - (job->starts ? job->starts[n] : 0);
    const int64_t ahead = rows_ahead(n, job->N) * job->heads * job->HS;
    const float *cos_p = job->cos + (int64_t)p * half, *sin_p = job->sin + (int64_t)p * half;
    for (int h = 0; h < job->turned; h++) {
        float *x = job->qkv + ((int64_t)n * job->heads + h) * job->HS, *y = x + half;
        for (int i = 0; i < half; i += W) {
            int k = min_int(W, half - i);
            vf c = vload(cos_p + i, k), s = vload(sin_p + i, k) * vset(job->direction);
            vf x_i = vload(x + i, k), y_i = vload(y + i, k);
            fetch(x + ahead + i), fetch(y + ahead + i);
            vstore(x + i, vnfma(y_i, s, x_i * c), k);
            vstore(y + i, vfma(x_i, s, y_i * c), k);
        }
    }
}

static void turn_rows(void *context, int task) {
    const Job *job = context;
    const int end = min_int(job->N, (task + 1) * job->rows);
    for (int n = task * job->rows; n < end; n++) turn_row(job, n);
}

static void rope(float *qkv, const float *cos, const float *sin, const int32_t *starts, float direction, int B, int T,
                 int NH, int NKV, int HS) {
    Job job = {qkv, cos, sin, starts, direction, B * T, T, NH + NKV, NH + 2 * NKV, HS, 0};
    job.rows = rows_per_task((int64_t)job.turned * HS);
    parallel_for(turn_rows, &job, tasks_for(job.N, job.rows));
}

void CAT(rope_forward, ISA)(float *qkv, const float *cos, const float *sin, const int32_t *starts, int B, int T, int NH,
                            int NKV, int HS) {
    rope(qkv, cos, sin, starts, 1.0f, B, T, NH, NKV, HS);
}

void CAT(rope_backward, ISA)(float *dqkv, const float *cos, const float *sin, const int32_t *starts, int B, int T,
                             int NH, int NKV, int HS) {
    rope(dqkv, cos, sin, starts, -1.0f, B, T, NH, NKV, HS);
}

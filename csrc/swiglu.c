/* swiglu.c -- SwiGLU: as the plain version, a vector at a time, rows shared out among the threads.  One exp and one
 * division a value; at the model's sizes bound by memory, from which rows ahead are fetched. */
#include "simd.h"
#include "threads.h"

typedef struct {
    float *out; /* or din */
    const float *dout, *in;
    int N, F, rows, streams;
} Job;

static void forward(void *context, int task) {
    const Job *job = context;
    const int F = job->F, end = min_int(job->N, (task + 1) * job->rows);
    for (int n = task * job->rows; n < end; n++) {
        const int64_t ahead = rows_ahead(n, job->N) * F;
        const float *gate = job->in + (int64_t)n * 2 * F, *up = gate + F;
        float *out = job->out + (int64_t)n * F;
        for (int f = 0; f < F; f += W) {
            int k = min_int(W, F - f);
            vf g = vload(gate + f, k);
            fetch(gate + 2 * ahead + f), fetch(up + 2 * ahead + f);
            vput(out + f, g / (vset(1.0f) + vexp(vset(0.0f) - g)) * vload(up + f, k), k, job->streams);
        }
    }
    if (job->streams) stream_end();
}

static void backward(void *context, int task) {
    const Job *job = context;
    const int F = job->F, end = min_int(job->N, (task + 1) * job->rows);
    for (int n = task * job->rows; n < end; n++) {
        const int64_t ahead = rows_ahead(n, job->N) * F;
        const float *gate = job->in + (int64_t)n * 2 * F, *up = gate + F, *dout = job->dout + (int64_t)n * F;
        float *dgate = job->out + (int64_t)n * 2 * F, *dup = dgate + F;
        for (int f = 0; f < F; f += W) {
            int k = min_int(W, F - f);
            vf g = vload(gate + f, k), dy = vload(dout + f, k);
            fetch(gate + 2 * ahead + f), fetch(up + 2 * ahead + f), fetch(dout + ahead + f);
            vf s = vset(1.0f) / (vset(1.0f) + vexp(vset(0.0f) - g));
            vput(dgate + f, dy * vload(up + f, k) * s * vfma(g, vset(1.0f) - s, vset(1.0f)), k, job->streams);
            vput(dup + f, dy * g * s, k, job->streams);
        }
    }
    if (job->streams) stream_end();
}

void CAT(swiglu_forward, ISA)(float *out, const float *in, int N, int F) {
    Job job = {.out = out, .in = in, .N = N, .F = F, .rows = rows_per_task(2 * (int64_t)F)};
    job.streams = streams(out, N, F);
    parallel_for(forward, &job, tasks_for(N, job.rows));
}

void CAT(swiglu_backward, ISA)(float *din, const float *dout, const float *in, int N, int F) {
    Job job = {.out = din, .dout = dout, .in = in, .N = N, .F = F, .rows = rows_per_task(2 * (int64_t)F)};
    job.streams = streams(din, 2 * (int64_t)N, F);
    parallel_for(backward, &job, tasks_for(N, job.rows));
}

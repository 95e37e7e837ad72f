/* gelu.c -- GELU by itself, where an adapter stands between a linear layer and its function, and where backward makes
 * again what forward has dropped: values shared out among the threads.  Bound by memory. */
#include "gelu.h"
#include "threads.h"

typedef struct {
    float *out; /* or din */
    const float *dout, *in;
    int fn;
    int64_t values;
} Job;

enum { VALUES_A_TASK = 1 << 14 };

static void forward(void *context, int task) {
    const Job *job = context;
    int64_t begin = (int64_t)task * VALUES_A_TASK;
    int n = (int)(job->values - begin < VALUES_A_TASK ? job->values - begin : VALUES_A_TASK);
    for (int i = 0; i < n; i += W) {
        int k = min_int(W, n - i);
        vstore(job->out + begin + i, vfn(job->fn, vload(job->in + begin + i, k)), k);
    }
}

static void backward(void *context, int task) {
    const Job *job = context;
    int64_t begin = (int64_t)task * VALUES_A_TASK;
    int n = (int)(job->values - begin < VALUES_A_TASK ? job->values - begin : VALUES_A_TASK);
    for (int i = 0; i < n; i += W) {
        int k = min_int(W, n - i);
        vf x = vload(job->in + begin + i, k);
        vstore(job->out + begin + i, vload(job->dout + begin + i, k) * vdfn(job->fn, x), k);
    }
}

static int tasks(const Job *job) { return (int)((job->values + VALUES_A_TASK - 1) / VALUES_A_TASK); }

void CAT(gelu_forward, ISA)(float *out, const float *in, int fn, int N, int F) {
    Job job = {.out = out, .in = in, .fn = fn, .values = (int64_t)N * F};
    parallel_for(forward, &job, tasks(&job));
}

void CAT(gelu_backward, ISA)(float *din, const float *dout, const float *in, int fn, int N, int F) {
    Job job = {.out = din, .dout = dout, .in = in, .fn = fn, .values = (int64_t)N * F};
    parallel_for(backward, &job, tasks(&job));
}

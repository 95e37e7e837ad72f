/* logprob.c -- log-probability of the targets.  A row is read twice, once for its maximum and once for the sum of
 * exponentials; the second time it comes from the cache, as does the third for its gradient, and the next row is
 * fetched while exponentials are made.  Rows are shared out among the threads, a row is never split: its sums run in W
 * lanes whatever the batch. */
#include "simd.h"
#include "threads.h"

typedef struct {
    float *logprobs, *lse, *entropy;
    float *dlogits;
    const float *dlogprobs, *logits;
    const int32_t *targets;
    float invtemp;
    int N, V, Vp, rows;
} Job;

static float row_max(const float *x, float invtemp, int V) {
    enum { CHAINS = 4 };
    vf m[CHAINS] = {vset(-INFINITY), vset(-INFINITY), vset(-INFINITY), vset(-INFINITY)};
    int v = 0;
    for (; v + CHAINS * W <= V; v += CHAINS * W)
#pragma GCC unroll 4
        for (int j = 0; j < CHAINS; j++) m[j] = vmax(vload_all(x + v + j * W) * vset(invtemp), m[j]);
    for (; v < V; v += W) {
        int k = min_int(W, V - v);
        m[0] = vmax(vfirst(vload(x + v, k) * vset(invtemp), vset(-INFINITY), k), m[0]);
    }
    return vhmax(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
}

/* exp of what is at most little above 0.  The product is off by 2^-24 of y, as y itself is. */
INLINE vf exp_below(vf y) { return vexp2(y * vset(LOG2_E)); }

/* y = logit * invtemp - max, at least -200: exp is 0 there, and a logit of -infinity does not make 0 * infinity.  In
 * this order NaN passes through. */
INLINE vf shifted(const float *x, vf invtemp, vf max, int k) {
    vf low = vset(-200.0f);
    return vmax(low, vfirst(vload(x, k) * invtemp - max, low, k));
}

typedef struct {
    vf exps, weighted; /* of exp(y) and y exp(y), W lanes */
} Sums;

INLINE void add_exps(Sums *s, vf y, const int with_entropy) {
    vf e = exp_below(y);
    s->exps = s->exps + e;
    if (with_entropy) s->weighted = vfma(e, y, s->weighted);
}

INLINE void forward_row(const Job *job, int n, const int with_entropy) {
    const float *x = job->logits + (int64_t)n * job->Vp;
    const float max = row_max(x, job->invtemp, job->V);
    const int V = job->V, next = n + 1 < job->N ? job->Vp : 0;
    const vf invtemp = vset(job->invtemp), most = vset(max);
    Sums sums = {vset(0.0f), vset(0.0f)};
    int v = 0;
    for (; v + W <= V; v += W) {
        fetch(x + next + v);
        add_exps(&sums, shifted(x + v, invtemp, most, W), with_entropy);
    }
    if (v < V) add_exps(&sums, shifted(x + v, invtemp, most, V - v), with_entropy);
    const float total = vsum(sums.exps), log_total = logf(total);
    const int target = job->targets[n];
    job->lse[n] = max + log_total;
    job->logprobs[n] = target < 0 ? 0.0f : x[target] * job->invtemp - job->lse[n];
    if (with_entropy) job->entropy[n] = log_total - vsum(sums.weighted) / total; /* log p = y - log total */
}

static void forward(void *context, int task) {
    const Job *job = context;
    const int end = min_int(job->N, (task + 1) * job->rows);
    for (int n = task * job->rows; n < end; n++) {
        if (job->entropy) forward_row(job, n, 1);
        else forward_row(job, n, 0);
    }
}

static void backward_row(const Job *job, int n) {
    const float *x = job->logits + (int64_t)n * job->Vp;
    float *dx = job->dlogits + (int64_t)n * job->Vp;
    const int V = job->V, target = job->targets[n];
    if (target < 0) {
        memset(dx, 0, (size_t)job->Vp * sizeof *dx);
        return;
    }
    const float d = job->invtemp * job->dlogprobs[n];
    const vf invtemp = vset(job->invtemp), lse = vset(job->lse[n]), minus_d = vset(-d);
    for (int v = 0; v < V; v += W) {
        int k = min_int(W, V - v);
        vstore(dx + v, minus_d * exp_below(vload(x + v, k) * invtemp - lse), k);
    }
    dx[target] += d;
    memset(dx + V, 0, (size_t)(job->Vp - V) * sizeof *dx);
}

static void backward(void *context, int task) {
    const Job *job = context;
    const int end = min_int(job->N, (task + 1) * job->rows);
    for (int n = task * job->rows; n < end; n++) backward_row(job, n);
}

static void both(void *context, int task) {
    const Job *job = context;
    const int end = min_int(job->N, (task + 1) * job->rows);
    for (int n = task * job->rows; n < end; n++) {
        forward_row(job, n, 0);
        backward_row(job, n);
    }
}

static void over_rows(void (*body)(void *, int), Job job) {
    job.rows = rows_per_task(job.Vp);
    parallel_for(body, &job, tasks_for(job.N, job.rows));
}

void CAT(logprob_forward, ISA)(float *logprobs, float *lse, float *entropy, const float *logits, const int32_t *targets,
                               float invtemp, int N, int V, int Vp) {
    const Job job = {.logprobs = logprobs,
                     .lse = lse,
                     .entropy = entropy,
                     .logits = logits,
                     .targets = targets,
                     .invtemp = invtemp,
                     .N = N,
                     .V = V,
                     .Vp = Vp};
    over_rows(forward, job);
}

void CAT(logprob_backward, ISA)(float *dlogits, const float *dlogprobs, const float *logits, const int32_t *targets,
                                const float *lse, float invtemp, int N, int V, int Vp) {
    const Job job = {.dlogits = dlogits,
                     .dlogprobs = dlogprobs,
                     .logits = logits,
                     .targets = targets,
                     .lse = (float *)lse,
                     .invtemp = invtemp,
                     .N = N,
                     .V = V,
                     .Vp = Vp};
    over_rows(backward, job);
}

void CAT(logprob_forward_backward, ISA)(float *dlogits, float *logprobs, float *lse, const float *dlogprobs,
                                        const float *logits, const int32_t *targets, float invtemp, int N, int V,
                                        int Vp) {
    const Job job = {.logprobs = logprobs,
                     .lse = lse,
                     .dlogits = dlogits,
                     .dlogprobs = dlogprobs,
                     .logits = logits,
                     .targets = targets,
                     .invtemp = invtemp,
                     .N = N,
                     .V = V,
                     .Vp = Vp};
    over_rows(both, job);
}

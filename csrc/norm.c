/* norm.c -- LayerNorm and RMSNorm: one text, `with_mean` tells them apart.
 *
 * Forward: a row is read from memory once and then twice more from the cache (mean, variance, result).  The variance is
 * taken around the mean: the mean of squares less the square of the mean loses all digits where the mean is large.
 * Backward: rows in at most 64 chunks; a chunk gathers its sums for dweight, dbias and dbias_in beside its rows, 16
 * rows in float and those in double, and the chunks are added in order.  They follow from N alone, so the bits do not
 * know the threads.  Bound by memory: 8 bytes a value forward, 16 backward. */
#include "simd.h"
#include "threads.h"

enum { CHAINS = 4 }; /* a sum with one chain would wait for each addition */

/* Sum over c of x[c] - shift, or of its square. */
INLINE float row_sum(const float *x, float shift, int C, const int square) {
    const vf m = vset(shift);
    vf sum[CHAINS] = {vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)};
    int c = 0;
    for (; c + CHAINS * W <= C; c += CHAINS * W)
#pragma GCC unroll 4
        for (int j = 0; j < CHAINS; j++) {
            vf d = vload_all(x + c + j * W) - m;
            if (square) d = d * d;
            sum[j] = sum[j] + d;
        }
    for (; c < C; c += W) {
        int k = min_int(W, C - c);
        vf d = vfirst(vload(x + c, k) - m, vset(0.0f), k);
        if (square) d = d * d;
        sum[0] = sum[0] + d;
    }
    return vsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/* ---- forward ---- */

typedef struct {
    float *out, *mean, *rstd;
    const float *in, *weight, *bias;
    float eps;
    int N, C, rows, streams;
} Forward;

INLINE void forward_row(const Forward *f, int n, const int with_mean) {
    const int C = f->C;
    const float *x = f->in + (int64_t)n * C, *bias = f->bias;
    float *out = f->out + (int64_t)n * C;
    const float mean = with_mean ? row_sum(x, 0.0f, C, 0) / (float)C : 0.0f;
    const float rstd = 1.0f / sqrtf(row_sum(x, mean, C, 1) / (float)C + f->eps);
    for (int c = 0; c < C; c += W) {
        int k = min_int(W, C - c);
        vf y = (vload(x + c, k) - vset(mean)) * vset(rstd) * vload(f->weight + c, k);
        if (bias) y = y + vload(bias + c, k);
        vput(out + c, y, k, f->streams);
    }
    if (with_mean) f->mean[n] = mean;
    f->rstd[n] = rstd;
}

static void forward(void *context, int task) {
    const Forward *f = context;
    const int end = min_int(f->N, (task + 1) * f->rows);
    for (int n = task * f->rows; n < end; n++) {
        if (f->mean) forward_row(f, n, 1);
        else forward_row(f, n, 0);
    }
    if (f->streams) stream_end();
}

void CAT(layernorm_forward, ISA)(float *out, float *mean, float *rstd, const float *in, const float *weight,
                                 const float *bias, float eps, int N, int C) {
    Forward f = {out, mean, rstd, in, weight, bias, eps, N, C, rows_per_task(C), streams(out, N, C)};
    parallel_for(forward, &f, tasks_for(N, f.rows));
}

void CAT(rmsnorm_forward, ISA)(float *out, float *rstd, const float *in, const float *weight, float eps, int N, int C) {
    Forward f = {out, NULL, rstd, in, weight, NULL, eps, N, C, rows_per_task(C), streams(out, N, C)};
    parallel_for(forward, &f, tasks_for(N, f.rows));
}

/* ---- backward ---- */

enum { MAX_CHUNKS = 64, CHAIN = 16, STRIP = 64 };
enum { DWEIGHT, DBIAS, DBIAS_IN, SUMS };

typedef struct {
    float *din, *grads[SUMS]; /* grads[i] NULL: that sum is not wanted */
    const float *dout, *dres, *in, *weight, *mean, *rstd;
    double *partial; /* (chunks, SUMS, C) */
    int N, C, rows, chunks, from_memory, streams;
} Backward;

/* With norm = (in - mean) * rstd and dnorm = dout * weight, and averages over the row,
 * din = dres + rstd * (dnorm - average(dnorm) - norm * average(dnorm * norm)).  `sums`: (SUMS, C).  Rows ahead are
 * fetched: the second pass over a row finds most of it in a cache, and memory would wait for it; and where all comes
 * from memory the next row from L2 as well. */
INLINE void backward_row(const Backward *b, int n, float *sums, const int with_mean) {
    const int C = b->C;
    const int64_t at = (int64_t)n * C, ahead = rows_ahead(n, b->N) * C;
    const int next = n + 1 < b->N ? C : 0;
    const float *x = b->in + at, *dout = b->dout + at, *dres = b->dres ? b->dres + at : NULL;
    const vf mean = vset(with_mean ? b->mean[n] : 0.0f), rstd = vset(b->rstd[n]);
    vf dnorm_sum = vset(0.0f), dnorm_norm = vset(0.0f);
    for (int c = 0; c < C; c += W) {
        int k = min_int(W, C - c);
        vf norm = (vload(x + c, k) - mean) * rstd, dy = vload(dout + c, k), dnorm = dy * vload(b->weight + c, k);
        fetch(x + ahead + c), fetch(dout + ahead + c);
        if (b->from_memory) fetch_near(x + next + c), fetch_near(dout + next + c);
        dnorm_sum = dnorm_sum + dnorm;
        dnorm_norm = vfma(dnorm, norm, dnorm_norm);
        if (b->grads[DWEIGHT]) vstore(sums + c, vfma(dy, norm, vload(sums + c, k)), k);
        if (b->grads[DBIAS]) vstore(sums + C + c, vload(sums + C + c, k) + dy, k);
    }
    const vf through_mean = vset(with_mean ? vsum(dnorm_sum) / (float)C : 0.0f);
    const vf through_rstd = vset(vsum(dnorm_norm) / (float)C);
    for (int c = 0; c < C; c += W) {
        int k = min_int(W, C - c);
        vf norm = (vload(x + c, k) - mean) * rstd, dnorm = vload(dout + c, k) * vload(b->weight + c, k);
        vf din = rstd * vnfma(norm, through_rstd, dnorm - through_mean);
        if (dres) din = din + vload(dres + c, k), fetch(dres + ahead + c);
        if (dres && b->from_memory) fetch_near(dres + next + c);
        vput(b->din + at + c, din, k, b->streams);
        if (b->grads[DBIAS_IN]) vstore(sums + 2 * C + c, vload(sums + 2 * C + c, k) + din, k);
    }
}

/* Sums of CHAIN rows are made in float, what follows in double: a long chain of floats would lose digits. */
static void backward_chunk(void *context, int chunk) {
    const Backward *b = context;
    const int end = min_int(b->N, (chunk + 1) * b->rows), size = b->C * SUMS;
    double *partial = b->partial + (int64_t)chunk * size;
    float *sums = scratch(SCRATCH_TASK);
    memset(partial, 0, (size_t)size * sizeof *partial);
    for (int n0 = chunk * b->rows; n0 < end; n0 += CHAIN) {
        memset(sums, 0, (size_t)size * sizeof *sums);
        for (int n = n0; n < min_int(end, n0 + CHAIN); n++) {
            if (b->mean) backward_row(b, n, sums, 1);
            else backward_row(b, n, sums, 0);
        }
        for (int i = 0; i < size; i++) partial[i] += (double)sums[i];
    }
    if (b->streams) stream_end();
}

/* Add the chunks of one strip of channels, and the finished sums to the gradients. */
static void add_chunks(void *context, int strip) {
    const Backward *b = context;
    const int begin = strip * STRIP, n = min_int(b->C - begin, STRIP);
    for (int i = 0; i < SUMS; i++) {
        if (!b->grads[i]) continue;
        double sums[STRIP] = {0};
        for (int chunk = 0; chunk < b->chunks; chunk++) {
            const double *partial = b->partial + ((int64_t)chunk * SUMS + i) * b->C + begin;
            for (int c = 0; c < n; c++) sums[c] += partial[c];
        }
        for (int c = 0; c < n; c++) b->grads[i][begin + c] += (float)sums[c];
    }
}

static void backward(Backward *b) {
    int rows = (int)(((int64_t)b->N + MAX_CHUNKS - 1) / MAX_CHUNKS);
    b->rows = rows < 1 ? CHAIN : (rows + CHAIN - 1) / CHAIN * CHAIN;
    b->chunks = tasks_for(b->N, b->rows);
    b->partial = scratch(SCRATCH_CALL);
    b->from_memory = beyond_caches(b->N, b->C);
    /* In place the line has just been read: past the caches it would have to leave them. */
    b->streams = b->din != b->dres && streams(b->din, b->N, b->C);
    parallel_for(backward_chunk, b, b->chunks);
    parallel_for(add_chunks, b, tasks_for(b->C, STRIP));
}

void CAT(layernorm_backward, ISA)(float *din, float *dweight, float *dbias, float *dbias_in, const float *dout,
                                  const float *dres, const float *in, const float *weight, const float *mean,
                                  const float *rstd, int N, int C) {
    Backward b = {.din = din,
                  .grads = {dweight, dbias, dbias_in},
                  .dout = dout,
                  .dres = dres,
                  .in = in,
                  .weight = weight,
                  .mean = mean,
                  .rstd = rstd,
                  .N = N,
                  .C = C};
    backward(&b);
}

void CAT(rmsnorm_backward, ISA)(float *din, float *dweight, float *dbias_in, const float *dout, const float *dres,
                                const float *in, const float *weight, const float *rstd, int N, int C) {
    Backward b = {.din = din,
                  .grads = {dweight, NULL, dbias_in},
                  .dout = dout,
                  .dres = dres,
                  .in = in,
                  .weight = weight,
                  .mean = NULL,
                  .rstd = rstd,
                  .N = N,
                  .C = C};
    backward(&b);
}

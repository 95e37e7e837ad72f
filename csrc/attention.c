/* attention.c -- causal attention, forward and backward, without the T x T matrix (FlashAttention: Dao et al. 2022,
 * arXiv:2205.14135): 64 queries meet 64 keys at a time in scratch memory, and only lse is kept for the backward pass.
 *
 * Scores are held transposed, S[key][query], with the queries in the vector lanes: the maximum and the sum of a query
 * then need no step across lanes, and S serves all products as it lies, as the broadcast operand of `tile`:
 *     forward     S = K Q^T     O += S^T V                                   (S is exp(score - max) by then)
 *     backward    S = K Q^T     dS = V dO^T     dV += S dO     dK += dS Q     dQ += dS^T K
 * Only Q and dO are transposed.  The other operands are read where they lie, which makes forward 5-10 % faster than
 * packing them; they are copied only where they must be rounded to bf16 or padded with zeros to whole vectors.
 *
 * A query's bits depend on its start, its position and what it sees: its key blocks are counted from its start, every
 * sum over keys is one chain a block, and what a masked key adds is exactly 0.  So queries may be grouped at will, and
 * products are cut where the triangle ends.  The gradient of a key sums over queries in blocks counted from the first
 * query with that start.  Bound by arithmetic: 4 HS flops for each pair of query and key forward, 10 HS backward. */
#include "attention.h"

enum { CHUNK = 16 }; /* query blocks that the backward pass prepares at once */

/* ---- where things lie in a batch ---- */

static int64_t qkv_at(const Attention *a, int b, int t, int head) {
    return ((int64_t)b * a->T + t) * a->row + (int64_t)head * a->HS;
}
static int64_t out_at(const Attention *a, int b, int t, int h) { return (((int64_t)b * a->T + t) * a->NH + h) * a->HS; }
static int64_t lse_at(const Attention *a, int b, int t, int h) { return ((int64_t)b * a->NH + h) * a->T + t; }
static int blocks_a_row(const Attention *a) { return (a->T + QUERY_BLOCK - 1) / QUERY_BLOCK; }

static int start_of(const Attention *a, int b, int t) { return a->starts ? a->starts[(int64_t)b * a->T + t] : 0; }

/* The end of the queries from t on that have t's start. */
static int run_end(const Attention *a, int b, int t, int limit) {
    if (!a->starts) return limit;
    int end = t + 1, start = start_of(a, b, t);
    while (end < limit && start_of(a, b, end) == start) end++;
    return end;
}

/* The n rows of x and more up to a multiple of STRIP, whose values do not matter: x itself, of which `available` rows
 * may be touched, or a copy in `space` (64, width). */
static Rows readable_rows(const Attention *a, const float *x, int64_t ld, int n, int available, float *space) {
    int padded = (n + STRIP - 1) / STRIP * STRIP;
    if (a->prec == PREC_FP32 && a->HS == a->width && padded <= available) return (Rows){x, ld, 1};
    for (int i = 0; i < padded; i++)
        for (int d = 0; d < a->HS; d += W) {
            vf v = i < n ? vload(x + i * ld + d, min_int(W, a->HS - d)) : vset(0.0f);
            vstore_all(space + (int64_t)i * a->width + d, a->prec == PREC_BF16 ? vbf16(v) : v);
        }
    return (Rows){space, a->width, 1};
}

static Rows rows_of_head(const Attention *a, int b, int t, int head, int n, float *space) {
    return readable_rows(a, a->qkv + qkv_at(a, b, t, head), a->row, n, a->T - t, space);
}

static Block block_of_batch(const Attention *a, int b, int kv, int k0, int nk, float *space) {
    Rows K = rows_of_head(a, b, k0, key_head(a, kv), nk, take(&space, (int64_t)KEY_BLOCK * a->width));
    Rows V = rows_of_head(a, b, k0, value_head(a, kv), nk, space);
    return (Block){K, V};
}

/* A task is 64 positions of one head, cut where `starts` changes; the last positions first, they see most keys.  Head
 * by head, keys are found in L2 (10 % at T = 1024); where heads are fewer than threads, the longest tasks of all heads
 * come first, so that threads end together. */
static void forward_task(void *context, int task) {
    const Attention *a = context;
    int blocks = blocks_a_row(a), heads = a->B * a->NH;
    int head = a->by_head ? task / blocks : task % heads, block = a->by_head ? task % blocks : task / heads;
    int b = head / a->NH, h = head % a->NH;
    int t0 = (blocks - 1 - block) * QUERY_BLOCK, end = min_int(a->T, t0 + QUERY_BLOCK);
    for (int t = t0, next; t < end; t = next) {
        next = run_end(a, b, t, end);
        ForwardQueries f = {.row = b,
                            .kv = h / (a->NH / a->NKV),
                            .t0 = t,
                            .nq = next - t,
                            .start = start_of(a, b, t),
                            .q = a->qkv + qkv_at(a, b, t, h),
                            .out = a->out + out_at(a, b, t, h),
                            .lse = a->lse_out + lse_at(a, b, t, h)};
        forward_queries(a, &f, block_of_batch);
    }
}

void CAT(attention_forward, ISA)(act *out, float *lse, const act *qkv, const int32_t *starts, int prec, int B, int T,
                                 int NH, int NKV, int HS) {
    Attention a = attention(qkv, starts, prec, B, T, NH, NKV, HS);
    a.out = out, a.lse_out = lse, a.by_head = B * NH >= threads_get();
    parallel_for(forward_task, &a, B * NH * blocks_a_row(&a));
}

/* ---- backward ---- */

/* out[key][d] += S X: the queries that see one of a strip's keys. */
static void over_queries(const Attention *a, float *out, const float *S, Rows X, int nk, int nq, int ahead) {
    for (int i = 0; i < nk; i += STRIP) {
        int q = max_int(0, ahead + i);
        if (q >= nq) return;
        strip(a->width / W, nq - q, S + i * QUERY_BLOCK + q, QUERY_BLOCK, 1, X.p + q * X.ld, X.ld,
              out + (int64_t)i * a->width, a->width, 1);
    }
}

/* What the products want of up to 64 queries of one head: prepared once, used for every block of keys. */
typedef struct {
    int t0, nq;
    float *QT, *dOT; /* (HS, 64) */
    Rows Q, dO;
    float *lse, *D; /* (64)  D = dout . out, which is the sum of P * dP over the keys */
} Queries;

typedef struct {
    int b, h;   /* the query head */
    int k0, nk; /* keys k0 .. k0+nk-1 */
    Rows K, V;
    float *dK, *dV; /* (64, width) */
} Keys;

enum { WANT_DQ = 1, WANT_DKV = 2 };

static float dot(const float *x, const float *y, int n) {
    vf sum = vset(0.0f);
    for (int i = 0; i < n; i += W) sum = vfma(vload(x + i, min_int(W, n - i)), vload(y + i, min_int(W, n - i)), sum);
    return vsum(sum);
}

static Queries prepare(const Attention *a, int b, int h, int t0, int nq, float **space) {
    int64_t block = (int64_t)QUERY_BLOCK * a->width, ldo = (int64_t)a->NH * a->HS;
    const float *q = a->qkv + qkv_at(a, b, t0, h), *dout = a->dout + out_at(a, b, t0, h);
    const float *out = a->saved_out + out_at(a, b, t0, h), *lse = a->lse + lse_at(a, b, t0, h);
    Queries r = {.t0 = t0, .nq = nq, .QT = take(space, block), .dOT = take(space, block)};
    r.Q = readable_rows(a, q, a->row, nq, a->T - t0, take(space, block));
    r.dO = readable_rows(a, dout, ldo, nq, a->T - t0, take(space, block));
    r.lse = take(space, QUERY_BLOCK), r.D = take(space, QUERY_BLOCK);
    transpose(a, q, a->row, nq, r.QT);
    transpose(a, dout, ldo, nq, r.dOT);
    for (int i = 0; i < QUERY_BLOCK; i++) {
        r.lse[i] = i < nq ? lse[i] : 0.0f;
        r.D[i] = i < nq ? dot(dout + i * ldo, out + i * ldo, a->HS) : 0.0f;
    }
    return r;
}

/* Forward was P = exp(score - lse), out = P V.  So dP = dout V^T, dscore = P (dP - D), and both products that follow
 * want it times the scale.  S: scores, then P; dS: dP, then the scaled dscore; both exactly 0 where hidden. */
static void probabilities(const Attention *a, float *S, float *dS, const float *lse, const float *D, int rows,
                          int hidden) {
    vf minus_lse = vset(0.0f) - vload_all(lse), minus_D = vset(0.0f) - vload_all(D), scale = vset(a->scale);
    for (int i = 0; i < rows; i++, S += QUERY_BLOCK, dS += QUERY_BLOCK) {
        vf p = vexp(vfma(hide(vload_all(S), hidden + i), scale, minus_lse));
        vf dscore = p * (vload_all(dS) + minus_D) * scale;
        vstore_all(S, a->prec == PREC_BF16 ? vbf16(p) : p);
        vstore_all(dS, a->prec == PREC_BF16 ? vbf16(dscore) : dscore);
    }
}

/* y += x, both n wide, x in whole vectors */
static void add_row(float *y, const float *x, int n) {
    for (int d = 0; d < n; d += W) vstore(y + d, vload(y + d, min_int(W, n - d)) + vload_all(x + d), min_int(W, n - d));
}

/* 64 queries meet 64 keys. */
static void backward_pair(const Attention *a, const Queries *q, const Keys *k, int want, float *space) {
    float *S = take(&space, KEY_BLOCK * QUERY_BLOCK), *dS = take(&space, KEY_BLOCK * QUERY_BLOCK), *dQ = space;
    int ahead = k->k0 - q->t0;
    scores(a, S, k->K, k->nk, q->QT, q->nq, ahead);
    scores(a, dS, k->V, k->nk, q->dOT, q->nq, ahead);
    for (int i = 0; i < q->nq; i += W)
        probabilities(a, S + i, dS + i, q->lse + i, q->D + i, rows_seen(k->nk, i, ahead), ahead - i);
    if (want & WANT_DKV) {
        over_queries(a, k->dV, S, q->dO, k->nk, q->nq, ahead);
        over_queries(a, k->dK, dS, q->Q, k->nk, q->nq, ahead);
    }
    if (want & WANT_DQ)
        for (int i = 0; i < q->nq; i += STRIP) {
            if (!over_keys(a, dQ, 0, dS, k->K, k->nk, i, ahead)) continue;
            float *dq = a->dqkv + qkv_at(a, k->b, q->t0 + i, k->h);
            for (int j = 0; j < min_int(STRIP, q->nq - i); j++)
                add_row(dq + j * a->row, dQ + (int64_t)j * a->width, a->HS);
        }
}

/* Between the rows of dqkv and a padded block of sums. */
static void load_sums(const Attention *a, float *sums, int64_t at, int n) {
    for (int i = 0; i < (n + STRIP - 1) / STRIP * STRIP; i++)
        for (int d = 0; d < a->HS; d += W)
            vstore_all(sums + (int64_t)i * a->width + d,
                       i < n ? vload(a->dqkv + at + i * a->row + d, min_int(W, a->HS - d)) : vset(0.0f));
}
static void store_sums(const Attention *a, const float *sums, int64_t at, int n) {
    for (int i = 0; i < n; i++)
        for (int d = 0; d < a->HS; d += W)
            vstore(a->dqkv + at + i * a->row + d, vload_all(sums + (int64_t)i * a->width + d), min_int(W, a->HS - d));
}

/* Queries t0 .. t1-1 of a head, up to CHUNK blocks of them, with the keys k_begin .. k_end-1 as far as they are seen.
 * Only whole blocks of keys, counted from the queries' start, give dQ; dK and dV may be asked for any range. */
static void backward_chunk(const Attention *a, int b, int h, int t0, int t1, int k_begin, int k_end, int want) {
    int kv = h / (a->NH / a->NKV), blocks = 0;
    int64_t block = (int64_t)QUERY_BLOCK * a->width;
    float *space = scratch(SCRATCH_TASK);
    float *dK = take(&space, block), *dV = take(&space, block);
    float *K_space = take(&space, block), *V_space = take(&space, block);
    Queries queries[CHUNK];
    for (int t = t0; t < t1; t += QUERY_BLOCK)
        queries[blocks++] = prepare(a, b, h, t, min_int(QUERY_BLOCK, t1 - t), &space);
    for (int k0 = k_begin; k0 < min_int(k_end, t1); k0 += KEY_BLOCK) {
        int64_t dk_at = qkv_at(a, b, k0, key_head(a, kv)), dv_at = qkv_at(a, b, k0, value_head(a, kv));
        Keys k = {.b = b, .h = h, .k0 = k0, .nk = min_int(KEY_BLOCK, min_int(k_end, t1) - k0), .dK = dK, .dV = dV};
        k.K = rows_of_head(a, b, k0, key_head(a, kv), k.nk, K_space);
        k.V = rows_of_head(a, b, k0, value_head(a, kv), k.nk, V_space);
        if (want & WANT_DKV) load_sums(a, dK, dk_at, k.nk), load_sums(a, dV, dv_at, k.nk);
        for (int i = 0; i < blocks; i++)
            if (queries[i].t0 + queries[i].nq > k0) backward_pair(a, &queries[i], &k, want, space);
        if (want & WANT_DKV) store_sums(a, dK, dk_at, k.nk), store_sums(a, dV, dv_at, k.nk);
    }
}

/* dqkv = 0 for positions t0 .. t1-1 of `heads` neighbouring heads. */
static void clear(const Attention *a, int b, int t0, int t1, int head, int heads) {
    for (int t = t0; t < t1; t++)
        memset(a->dqkv + qkv_at(a, b, t, head), 0, (size_t)heads * (size_t)a->HS * sizeof(float));
}

/* All queries of a head with the keys of one range: a run of equal starts after the other, a chunk after the other. */
static void backward_head(const Attention *a, int b, int h, int k_begin, int k_end, int want) {
    int chunk = a->width <= 1024 ? CHUNK : 1; /* very wide heads: what is prepared has to fit into scratch */
    for (int t = 0, next; t < a->T; t = next) {
        next = run_end(a, b, t, a->T);
        int first = max_int(k_begin, start_of(a, b, t)), t0 = t;
        while (t0 + QUERY_BLOCK <= first) t0 += QUERY_BLOCK; /* these queries come before all keys */
        for (; t0 < next; t0 += chunk * QUERY_BLOCK)
            backward_chunk(a, b, h, t0, min_int(next, t0 + chunk * QUERY_BLOCK), first, k_end, want);
    }
}

/* A key/value head and the query heads of its group, everything in one go. */
static void backward_group_task(void *context, int task) {
    const Attention *a = context;
    int group = a->NH / a->NKV, b = task / a->NKV, kv = task % a->NKV;
    clear(a, b, 0, a->T, kv * group, group);
    clear(a, b, 0, a->T, key_head(a, kv), 1);
    clear(a, b, 0, a->T, value_head(a, kv), 1);
    for (int h = kv * group; h < (kv + 1) * group; h++) backward_head(a, b, h, 0, a->T, WANT_DQ | WANT_DKV);
}

/* dK and dV of 64 positions. */
static void backward_keys_task(const Attention *a, int b, int kv, int k0) {
    int group = a->NH / a->NKV, end = min_int(a->T, k0 + KEY_BLOCK);
    clear(a, b, k0, end, key_head(a, kv), 1);
    clear(a, b, k0, end, value_head(a, kv), 1);
    for (int h = kv * group; h < (kv + 1) * group; h++) backward_head(a, b, h, k0, end, WANT_DKV);
}

/* dQ of 64 positions of a head. */
static void backward_queries_task(const Attention *a, int b, int h, int t0) {
    int end = min_int(a->T, t0 + QUERY_BLOCK);
    clear(a, b, t0, end, h, 1);
    for (int t = t0, next; t < end; t = next) {
        next = run_end(a, b, t, end);
        backward_chunk(a, b, h, t, next, start_of(a, b, t), next, WANT_DQ);
    }
}

/* For each 64 positions one task a key/value head, the first positions first, for many queries see them; then one a
 * query head, the last positions first. */
static void backward_split_task(void *context, int task) {
    const Attention *a = context;
    int kv_heads = a->B * a->NKV, heads = a->B * a->NH, kv_tasks = kv_heads * blocks_a_row(a);
    if (task < kv_tasks) {
        backward_keys_task(a, task % kv_heads / a->NKV, task % a->NKV, task / kv_heads * QUERY_BLOCK);
        return;
    }
    task -= kv_tasks;
    int block = blocks_a_row(a) - 1 - task / heads;
    backward_queries_task(a, task % heads / a->NH, task % a->NH, block * QUERY_BLOCK);
}

/* One task a key/value head does five products for each pair of blocks; dQ apart from dK and dV need seven, but make
 * many tasks.  Both add the same chains in the same order: the choice may follow the number of threads. */
void CAT(attention_backward, ISA)(act *dqkv, const act *dout, const act *qkv, const act *out, const float *lse,
                                  const int32_t *starts, int prec, int B, int T, int NH, int NKV, int HS) {
    Attention a = attention(qkv, starts, prec, B, T, NH, NKV, HS);
    a.dqkv = dqkv, a.dout = dout, a.saved_out = out, a.lse = lse;
    if (7 * B * NKV >= 5 * threads_get()) parallel_for(backward_group_task, &a, B * NKV);
    else parallel_for(backward_split_task, &a, B * (NH + NKV) * blocks_a_row(&a));
}

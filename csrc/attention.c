/* attention.c -- causal attention, forward and backward, without the T x T matrix (FlashAttention: Dao et al. 2022,
 * arXiv:2205.14135): 64 queries meet 64 keys at a time in scratch memory, and only lse is kept for the backward pass.
 *
 * Scores are held transposed, S[key][query], with the queries in the vector lanes: the maximum and the sum of a query
 * then need no step across lanes, and P = exp(S - max) or dS is the broadcast operand of the products that follow:
 *     forward     S = K Q^T     O += P^T V
 *     backward    S = K Q^T     dP = V dO^T     dV += P dO     dK += dS Q     dQ += dS^T K
 * Q and dO are transposed.  The other operands are read where they lie, which makes forward 5-10 % faster than packing
 * them; they are copied only where they must be padded with zeros to whole vectors or rounded to bf16.  As pairs of
 * bf16 (see attention.h) an operand is copied into each form that its products want: Q, dO and dS into two, K into two
 * backward.
 *
 * A query's bits depend on its start, its position and what it sees: its key blocks are counted from its start, every
 * sum over keys is one chain a block, and what a masked key adds is exactly 0.  So queries may be grouped at will, and
 * products are cut where the triangle ends, a pair of queries or keys where it was counted from the block's first: what
 * the cut adds to the triangle is 0 and leaves a sum as it is.  The gradient of a key sums over queries in blocks
 * counted from the first query with that start.  Bound by arithmetic: 4 HS flops for each pair of query and key
 * forward, 10 HS backward. */
#include "attention.h"

static const float ONES[STRIP] = {1, 1, 1, 1, 1, 1, 1, 1};

enum { TASKS_A_THREAD = 8 };
enum { CHUNK = 16 };  /* query blocks that the backward pass prepares at once */
enum { WIDE = 1024 }; /* heads so wide that scratch does not hold several blocks of queries */

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

/* The n rows of x and more up to a multiple of STRIP, whose values do not matter, where a unit is one value: x itself,
 * of which `available` rows may be touched, or a copy in `space`. */
static Rows rows_of_values(const Attention *a, const float *x, int64_t ld, int n, int available, float *space) {
    int padded = (n + STRIP - 1) / STRIP * STRIP;
    if (a->prec == PREC_FP32 && a->HS == a->width && padded <= available) return (Rows){x, ld, 1};
    for (int i = 0; i < padded; i++)
        for (int d = 0; d < a->HS; d += W) {
            vf v = i < n ? load_left(x + i * ld + d, a->HS - d) : vset(0.0f);
            vstore_all(space + (int64_t)i * a->width + d, a->prec == PREC_BF16 ? vbf16(v) : v);
        }
    return (Rows){space, a->width, 1};
}

/* The same rows of units along the head. */
static Rows rows_along_head(const Attention *a, const float *x, int64_t ld, int n, int available, float *space) {
    if (!a->pairs) return rows_of_values(a, x, ld, n, available, space);
    const int HS = a->HS, width = a->unit_width;
    for (int i = 0; i < (n + STRIP - 1) / STRIP * STRIP; i++, x += ld)
        for (int d = 0; d < HS; d += 2 * W) {
            float *to = space + i * width + d / 2;
            if (i >= n) vstore_all(to, vset(0.0f));
            else if (HS - d >= 2 * W) vstore_all(to, vpairs_along(vload_all(x + d), vload_all(x + d + W)));
            else vstore_all(to, vpairs_along(load_left(x + d, HS - d), load_left(x + d + W, HS - d - W)));
        }
    return (Rows){space, width, 1};
}

/* The units across n rows: row i is rows 2 i and 2 i + 1 where they are pairs. */
static Rows units_across(const Attention *a, const float *x, int64_t ld, int n, int available, float *space) {
    if (!a->pairs) return rows_of_values(a, x, ld, n, available, space);
    const int HS = a->HS, width = a->width;
    for (int i = 0; i < n; i += 2, x += 2 * ld)
        for (int d = 0; d < HS; d += W) {
            vf next = i + 1 < n ? load_left(x + ld + d, HS - d) : vset(0.0f);
            vstore_all(space + i / 2 * width + d, vpairs(load_left(x + d, HS - d), next));
        }
    return (Rows){space, width, 1};
}

static Block block_of_batch(const Attention *a, int b, int kv, int k0, int nk, float *space) {
    const float *k = a->qkv + qkv_at(a, b, k0, key_head(a, kv)), *v = a->qkv + qkv_at(a, b, k0, value_head(a, kv));
    Rows K = rows_along_head(a, k, a->row, nk, a->T - k0, take(&space, operand_size(a)));
    return (Block){K, units_across(a, v, a->row, nk, a->T - k0, space)};
}

static int forward_tasks_a_row(const Attention *a) { return (blocks_a_row(a) + a->together - 1) / a->together; }

/* A task is some blocks of 64 positions of one head, cut where `starts` changes; the last positions first, they see
 * most keys.  Head by head, keys are found in L2 (10 % at T = 1024); where heads are fewer than threads, the longest
 * tasks of all heads come first, so that threads end together. */
static void forward_task(void *context, int task) {
    const Attention *a = context;
    int parts = forward_tasks_a_row(a), heads = a->B * a->NH;
    int head = a->by_head ? task / parts : task % heads, part = a->by_head ? task % parts : task / heads;
    int b = head / a->NH, h = head % a->NH, positions = a->together * QUERY_BLOCK;
    int t0 = (parts - 1 - part) * positions, end = min_int(a->T, t0 + positions);
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

/* Blocks of queries that share what was packed of the keys, as long as every thread has tasks enough.  Keys that are
 * read where they lie need no sharing. */
static int query_blocks_together(const Attention *a) {
    int64_t blocks = (int64_t)a->B * a->NH * blocks_a_row(a);
    if ((a->prec == PREC_FP32 && a->HS == a->width) || a->width > WIDE) return 1;
    int64_t share = blocks / ((int64_t)TASKS_A_THREAD * threads_get());
    return share < 1 ? 1 : share < TOGETHER ? (int)share : TOGETHER;
}

void CAT(attention_forward, ISA)(act *out, float *lse, const act *qkv, const int32_t *starts, int prec, int B, int T,
                                 int NH, int NKV, int HS) {
    Attention a = attention(qkv, starts, prec, B, T, NH, NKV, HS);
    a.out = out, a.lse_out = lse, a.by_head = B * NH >= threads_get();
    a.together = query_blocks_together(&a);
    parallel_for(forward_task, &a, B * NH * forward_tasks_a_row(&a));
}

/* ---- backward ---- */

/* out[key][d] += P X, or `begin`: = P X, for a strip of keys from row i on: the queries that see one of them.  P: rows
 * of units along queries; X: units across queries.  A pair may begin one query early: that one is 0 in P. */
static void over_queries(const Attention *a, float *out, int64_t ldo, const float *P, Rows X, int i, int nq, int ahead,
                         int begin) {
    int per_unit = a->pairs ? 2 : 1, first = max_int(0, ahead + i) / per_unit, ld = QUERY_BLOCK / per_unit;
    int units = units_for(a->pairs, nq) - first;
    if (units <= 0) return;
    X.p += first * X.ld;
    strip(a, a->width / W, units, P + i * ld + first, ld, 1, X, out + i * ldo, ldo, begin ? NULL : ONES);
}

/* What the products want of up to 64 queries of one head: prepared once, used for every block of keys. */
typedef struct {
    int t0, nq;
    float *QT, *dOT; /* (units, 64) */
    Rows Q, dO;      /* across queries */
    float *lse, *D;  /* (64)  D = dout . out, which is the sum of P * dP over the keys */
} Queries;

typedef struct {
    int b, h;            /* the query head */
    int k0, nk;          /* keys k0 .. k0+nk-1 */
    int begin, begin_dQ; /* nothing was added yet to dK and dV, to dQ of any query: the first sums are written */
    Rows K, V, K_across; /* along the head, and across keys */
    float *dK, *dV;      /* in dqkv, or sums (64, width) where a strip of rows or a whole vector would not fit there */
    int64_t ldd;
} Keys;

enum { WANT_DQ = 1, WANT_DKV = 2 };

/* D of W queries, or of the first n of them: their sums lie in the lanes of vectors until a transpose adds them up. */
static void row_dots(const Attention *a, float *D, const float *x, const float *y, int64_t ld, int n) {
    vf sums[W];
    for (int i = 0; i < W; i++) {
        sums[i] = vset(0.0f);
        for (int d = 0; i < n && d < a->HS; d += W)
            sums[i] = vfma(load_left(x + i * ld + d, a->HS - d), load_left(y + i * ld + d, a->HS - d), sums[i]);
    }
    vtranspose(sums);
    for (int step = W / 2; step; step /= 2)
        for (int i = 0; i < step; i++) sums[i] = sums[i] + sums[i + step];
    vstore_all(D, sums[0]);
}

static Queries prepare(const Attention *a, int b, int h, int t0, int nq, float **space) {
    int64_t size = operand_size(a), ldo = (int64_t)a->NH * a->HS;
    const float *q = a->qkv + qkv_at(a, b, t0, h), *dout = a->dout + out_at(a, b, t0, h);
    const float *out = a->saved_out + out_at(a, b, t0, h), *lse = a->lse + lse_at(a, b, t0, h);
    Queries r = {.t0 = t0, .nq = nq, .QT = take(space, size), .dOT = take(space, size)};
    r.Q = units_across(a, q, a->row, nq, a->T - t0, take(space, size));
    r.dO = units_across(a, dout, ldo, nq, a->T - t0, take(space, size));
    r.lse = take(space, QUERY_BLOCK), r.D = take(space, QUERY_BLOCK);
    transpose(a, q, a->row, nq, r.QT);
    transpose(a, dout, ldo, nq, r.dOT);
    for (int i = 0; i < nq; i += W) {
        vstore_all(r.lse + i, load_left(lse + i, nq - i));
        row_dots(a, r.D + i, dout + i * ldo, out + i * ldo, ldo, nq - i);
    }
    return r;
}

/* The matrices of 64 queries and 64 keys; scores and dP strip by strip, so that they never leave the L1 cache. */
typedef struct {
    float *S, *dP;    /* (STRIP, 64)  of one strip of keys */
    float *P, *dS;    /* (64, units of 64)  rows of keys, units along queries */
    float *dS_across; /* (units of 64, 64)  units across keys; dS itself where a unit is one value */
    float *dQ;
} Matrices;

/* Forward was P = exp(score - lse), out = P V.  So dP = dout V^T, dscore = P (dP - D), and both products that follow
 * want it times the scale.  A strip of keys from row i on, W lanes; P and dS are exactly 0 where hidden. */
INLINE void probabilities(const Attention *a, const Matrices *m, const Queries *q, const int pairs, const int masked,
                          int i, int rows, int lane, int hidden) {
    const vf log2_scale = vset(a->log2_scale), scale = vset(a->scale), minus_D = vset(0.0f) - vload_all(q->D + lane);
    const vf minus_lse = vload_all(q->lse + lane) * vset(-LOG2_E);
    const int ld = units_for(pairs, QUERY_BLOCK), round = a->prec == PREC_BF16;
    vf before = vset(0.0f);
    for (int j = 0; j < rows; j++) {
        float *P = m->P + (i + j) * ld, *dS = m->dS + (i + j) * ld;
        vf p = weight(m->S + lane, j, log2_scale, minus_lse, masked, hidden);
        vf dscore = p * (vload_all(m->dP + j * QUERY_BLOCK + lane) + minus_D) * scale;
        if (!pairs) {
            vstore_all(P + lane, round ? vbf16(p) : p), vstore_all(dS + lane, round ? vbf16(dscore) : dscore);
            continue;
        }
        vstore_pairs(P + lane / 2, p), vstore_pairs(dS + lane / 2, dscore);
        float *across = m->dS_across + (i + j) / 2 * QUERY_BLOCK + lane;
        if (j & 1) vstore_all(across, vpairs(before, dscore));
        else if (j == rows - 1) vstore_all(across, vpairs(dscore, vset(0.0f)));
        before = dscore;
    }
}

/* All lanes that see any of the strip's keys. */
static void strip_probabilities(const Attention *a, const Matrices *m, const Queries *q, int i, int rows, int lane,
                                int ahead) {
    for (; lane < q->nq; lane += W) {
        int hidden = ahead + i - lane, masked = clear_rows(STRIP, hidden) < STRIP;
        if (HAVE_PAIRS && a->pairs && masked) probabilities(a, m, q, HAVE_PAIRS, 1, i, rows, lane, hidden);
        else if (HAVE_PAIRS && a->pairs) probabilities(a, m, q, HAVE_PAIRS, 0, i, rows, lane, hidden);
        else probabilities(a, m, q, 0, 1, i, rows, lane, hidden);
    }
}

/* y += x, or `begin`: = x, both n wide, x in whole vectors */
static void add_row(float *y, const float *x, int n, int begin) {
    for (int d = 0; d < n; d += W) {
        vf sum = vload_all(x + d);
        if (!begin) sum = load_left(y + d, n - d) + sum;
        store_left(y + d, sum, n - d);
    }
}

/* dQ of STRIP queries from lane q. */
static void query_gradient(const Attention *a, const Queries *r, const Keys *k, const Matrices *m, int q, int ahead) {
    float *dq = a->dqkv + qkv_at(a, k->b, r->t0 + q, k->h);
    int rows = min_int(STRIP, r->nq - q);
    if (rows == STRIP && a->HS == a->width) {
        over_keys(a, dq, a->row, k->begin_dQ ? NULL : ONES, m->dS_across, k->K_across, k->nk, q, ahead);
    } else if (over_keys(a, m->dQ, a->width, NULL, m->dS_across, k->K_across, k->nk, q, ahead)) {
        for (int i = 0; i < rows; i++) add_row(dq + i * a->row, m->dQ + (int64_t)i * a->width, a->HS, k->begin_dQ);
    }
}

/* 64 queries meet 64 keys. */
static void backward_pair(const Attention *a, const Queries *q, const Keys *k, int want, float *space) {
    int ahead = k->k0 - q->t0, begin = k->begin && ahead >= 0, block = KEY_BLOCK * units_for(a->pairs, QUERY_BLOCK);
    Matrices m = {.S = take(&space, STRIP * QUERY_BLOCK), .dP = take(&space, STRIP * QUERY_BLOCK)};
    m.P = take(&space, block), m.dS = take(&space, block);
    m.dS_across = a->pairs ? take(&space, block) : m.dS, m.dQ = space;
    for (int i = 0; i < k->nk; i += STRIP) {
        int lane = scores(a, m.S, k->K, i, q->QT, q->nq, ahead), rows = min_int(STRIP, k->nk - i);
        scores(a, m.dP, k->V, i, q->dOT, q->nq, ahead);
        strip_probabilities(a, &m, q, i, rows, lane, ahead);
    }
    for (int i = 0; want & WANT_DKV && i < k->nk; i += STRIP) {
        over_queries(a, k->dV, k->ldd, m.P, q->dO, i, q->nq, ahead, begin);
        over_queries(a, k->dK, k->ldd, m.dS, q->Q, i, q->nq, ahead, begin);
    }
    for (int i = 0; want & WANT_DQ && i < q->nq; i += STRIP) query_gradient(a, q, k, &m, i, ahead);
}

/* Between the rows of dqkv and a padded block of sums. */
static void load_sums(const Attention *a, float *sums, int64_t at, int n) {
    for (int i = 0; i < (n + STRIP - 1) / STRIP * STRIP; i++)
        for (int d = 0; d < a->HS; d += W)
            vstore_all(sums + (int64_t)i * a->width + d,
                       i < n ? load_left(a->dqkv + at + i * a->row + d, a->HS - d) : vset(0.0f));
}
static void store_sums(const Attention *a, const float *sums, int64_t at, int n) {
    for (int i = 0; i < n; i++)
        for (int d = 0; d < a->HS; d += W)
            store_left(a->dqkv + at + i * a->row + d, vload_all(sums + (int64_t)i * a->width + d), a->HS - d);
}

/* `rows` of one head in qkv or dqkv, of positions t .. end-1: they lie far apart, where no hardware foresees them. */
INLINE void fetch_rows(const Attention *a, const float *rows, int t, int end) {
    for (; t < end; t++, rows += a->row)
        for (int d = 0; d < a->HS; d += 16) fetch(rows + d);
}

/* While one block of keys is at hand, the next is fetched, and where its gradients go. */
INLINE void fetch_keys(const Attention *a, int b, int kv, int k0, int end, int want) {
    end = min_int(end, k0 + KEY_BLOCK);
    const int64_t k_at = qkv_at(a, b, k0, key_head(a, kv)), v_at = qkv_at(a, b, k0, value_head(a, kv));
    if (k0 >= end) return;
    fetch_rows(a, a->qkv + k_at, k0, end), fetch_rows(a, a->qkv + v_at, k0, end);
    if (want & WANT_DKV) fetch_rows(a, a->dqkv + k_at, k0, end), fetch_rows(a, a->dqkv + v_at, k0, end);
}

/* Queries t0 .. t1-1 of a head, up to CHUNK blocks of them, with the keys k_begin .. k_end-1 as far as they are seen.
 * Only all keys from the queries' start on give dQ, in whole blocks; dK and dV may be asked for any range. */
static void backward_chunk(const Attention *a, int b, int h, int t0, int t1, int k_begin, int k_end, int want) {
    int kv = h / (a->NH / a->NKV), blocks = 0;
    int64_t block = (int64_t)QUERY_BLOCK * a->width, size = operand_size(a);
    float *space = scratch(SCRATCH_TASK);
    float *dK = take(&space, block), *dV = take(&space, block);
    float *K_space = take(&space, size), *V_space = take(&space, size), *across_space = take(&space, size);
    Queries queries[CHUNK];
    for (int t = t0; t < t1; t += QUERY_BLOCK)
        queries[blocks++] = prepare(a, b, h, t, min_int(QUERY_BLOCK, t1 - t), &space);
    for (int k0 = k_begin; k0 < min_int(k_end, t1); k0 += KEY_BLOCK) {
        int64_t dk_at = qkv_at(a, b, k0, key_head(a, kv)), dv_at = qkv_at(a, b, k0, value_head(a, kv));
        Keys k = {.b = b,
                  .h = h,
                  .k0 = k0,
                  .nk = min_int(KEY_BLOCK, min_int(k_end, t1) - k0),
                  .begin = !a->starts && h % (a->NH / a->NKV) == 0 && k0 >= t0,
                  .begin_dQ = k0 == k_begin,
                  .dK = dK,
                  .dV = dV,
                  .ldd = a->width};
        k.K = rows_along_head(a, a->qkv + dk_at, a->row, k.nk, a->T - k0, K_space);
        k.V = rows_along_head(a, a->qkv + dv_at, a->row, k.nk, a->T - k0, V_space);
        k.K_across = a->pairs ? units_across(a, a->qkv + dk_at, a->row, k.nk, a->T - k0, across_space) : k.K;
        int apart = want & WANT_DKV && (a->HS != a->width || k.nk % STRIP);
        if (apart && !k.begin) load_sums(a, dK, dk_at, k.nk), load_sums(a, dV, dv_at, k.nk);
        if (!apart) k.dK = a->dqkv + dk_at, k.dV = a->dqkv + dv_at, k.ldd = a->row;
        fetch_keys(a, b, kv, k0 + KEY_BLOCK, min_int(k_end, t1), want);
        for (int i = 0; i < blocks; i++)
            if (queries[i].t0 + queries[i].nq > k0) backward_pair(a, &queries[i], &k, want, space);
        if (apart) store_sums(a, dK, dk_at, k.nk), store_sums(a, dV, dv_at, k.nk);
    }
}

/* dK and dV of positions t0 .. t1-1 = 0, where starts say who is first to add to them; else these queries themselves
 * are. */
static void clear_keys(const Attention *a, int b, int kv, int t0, int t1) {
    for (int t = t0; a->starts && t < t1; t++) {
        memset(a->dqkv + qkv_at(a, b, t, key_head(a, kv)), 0, (size_t)a->HS * sizeof(float));
        memset(a->dqkv + qkv_at(a, b, t, value_head(a, kv)), 0, (size_t)a->HS * sizeof(float));
    }
}

/* All queries of a head with the keys of one range: a run of equal starts after the other, a chunk after the other. */
static void backward_head(const Attention *a, int b, int h, int k_begin, int k_end, int want) {
    int chunk = a->width <= WIDE ? CHUNK : 1;
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
    clear_keys(a, b, kv, 0, a->T);
    for (int h = kv * group; h < (kv + 1) * group; h++) backward_head(a, b, h, 0, a->T, WANT_DQ | WANT_DKV);
}

/* dK and dV of 64 positions. */
static void backward_keys_task(const Attention *a, int b, int kv, int k0) {
    int group = a->NH / a->NKV, end = min_int(a->T, k0 + KEY_BLOCK);
    clear_keys(a, b, kv, k0, end);
    for (int h = kv * group; h < (kv + 1) * group; h++) backward_head(a, b, h, k0, end, WANT_DKV);
}

/* dQ of 64 positions of a head. */
static void backward_queries_task(const Attention *a, int b, int h, int t0) {
    int end = min_int(a->T, t0 + QUERY_BLOCK);
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

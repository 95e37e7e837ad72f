/* attention_paged.c -- causal attention of a session's rows: earlier keys and values lie in pages.
 *
 * A page holds, head by head, 64 keys as columns of units along the head (units, 64) and then their values, units
 * across keys (units of 64, width).  So a single query, the common case, has the keys in its vector lanes, and reads
 * every key and value once, at the speed of memory.  Many queries, those of a prompt, go through forward_queries.  Both
 * make the same chains, so they have the same bits.  bf16 takes two bytes a value either way: where a unit is one value
 * it lies in the page as 16 bits. */
#include "attention.h"

/* Up to so many queries are cheaper one by one. */
enum { FEW = 4 };

typedef struct {
    Attention a; /* first: block_of_pages finds the rest behind it */
    char *pages;
    const int32_t *table, *first, *past;
    int R, P, most; /* most: blocks of queries in the row that has most, of those that are not few */
    int by_group;   /* there is a row and key/value head for every thread */
} Paged;

/* Rows whose every key/value head is one task.  Both ways make the same bits: the choice may follow the threads. */
static int is_few(const Paged *p, int r) { return p->by_group && p->first[r + 1] - p->first[r] <= FEW; }

static const float *query_of(const Attention *a, int h, int n) { return a->qkv + n * a->row + (int64_t)h * a->HS; }
static float *out_of(const Attention *a, int h, int n) { return a->out + ((int64_t)n * a->NH + h) * a->HS; }

static int64_t keys_a_head(const Attention *a) { return (int64_t)KEY_BLOCK * a->units; }
static int64_t units_a_head(const Attention *a) {
    return keys_a_head(a) + (int64_t)units_for(a->pairs, KEY_BLOCK) * a->width;
}
static int unit_bytes(int prec) { return prec == PREC_BF16 && !HAVE_PAIRS ? 2 : 4; }

int64_t CAT(page_bytes, ISA)(int prec, int NKV, int HS) {
    Attention a = attention(NULL, NULL, prec, 0, 0, NKV, NKV, HS);
    return NKV * units_a_head(&a) * unit_bytes(prec);
}

/* The keys of one head in the page of position t, and the values behind them. */
static char *keys_at(const Paged *p, int r, int kv, int t) {
    int64_t page = p->table[(int64_t)r * p->P + t / KEY_BLOCK];
    return p->pages + (page * p->a.NKV + kv) * units_a_head(&p->a) * unit_bytes(p->a.prec);
}
static char *values_of(const Attention *a, char *keys) { return keys + keys_a_head(a) * unit_bytes(a->prec); }

/* W units, `at` units into the page; and the product that they go into */
INLINE vf load_cached(const char *p, int64_t at, const int prec) {
    return unit_bytes(prec) == 2 ? vload_bf16((const uint16_t *)p + at) : vload_all((const float *)p + at);
}
INLINE void store_cached(char *p, int64_t at, vf x, const int prec) {
    if (unit_bytes(prec) == 2) vstore_bf16((uint16_t *)p + at, x);
    else vstore_all((float *)p + at, x);
}
INLINE vf multiply_add(vf a, vf b, vf c, const int prec) {
    return prec == PREC_BF16 && HAVE_PAIRS ? vdot_pairs(a, b, c) : vfma(a, b, c);
}

/* ---- writing ---- */

/* The key's column. */
static void write_key(const Attention *a, char *K, int lane, const float *k) {
    const int per_unit = a->pairs ? 2 : 1, bytes = unit_bytes(a->prec);
    for (int u = 0; u < a->units; u += W) {
        char lanes[4 * W];
        store_cached(lanes, 0, load_units(a, k + u * per_unit, a->HS - u * per_unit), a->prec);
        for (int i = 0; i < min_int(W, a->units - u); i++)
            memcpy(K + ((int64_t)(u + i) * KEY_BLOCK + lane) * bytes, lanes + i * bytes, (size_t)bytes);
    }
}

/* The value's row.  Of a pair of keys the first comes with a zero behind it: the page may have held anything there. */
static void write_value(const Attention *a, char *V, int lane, const float *v) {
    int64_t row = (int64_t)(a->pairs ? lane / 2 : lane) * a->width;
    for (int d = 0; d < a->HS; d += W) {
        vf x = load_left(v + d, a->HS - d), zero = vset(0.0f);
        int second = a->pairs && lane & 1;
        vf units = second ? unit_of(a, vlow(load_cached(V, row + d, a->prec)), x) : unit_of(a, x, zero);
        store_cached(V, row + d, units, a->prec);
    }
}

static void write_token(const Paged *p, int r, int kv, int n) {
    const Attention *a = &p->a;
    int t = p->past[r] + n - p->first[r];
    char *K = keys_at(p, r, kv, t);
    const float *token = a->qkv + n * a->row;
    write_key(a, K, t % KEY_BLOCK, token + (int64_t)key_head(a, kv) * a->HS);
    write_value(a, values_of(a, K), t % KEY_BLOCK, token + (int64_t)value_head(a, kv) * a->HS);
}

static void write_row(void *context, int task) {
    const Paged *p = context;
    int r = task / p->a.NKV, kv = task % p->a.NKV;
    if (is_few(p, r)) return;
    for (int n = p->first[r]; n < p->first[r + 1]; n++) write_token(p, r, kv, n);
}

/* ---- many queries ---- */

static Block block_of_pages(const Attention *a, int r, int kv, int k0, int nk, float *space) {
    char *K = keys_at((const Paged *)a, r, kv, k0), *V = values_of(a, K);
    if (unit_bytes(a->prec) == 4) return (Block){{(const float *)K, 1, KEY_BLOCK}, {(const float *)V, a->width, 1}};
    float *keys = take(&space, (int64_t)KEY_BLOCK * a->width);
    for (int64_t i = 0; i < (int64_t)KEY_BLOCK * a->HS; i += W) vstore_all(keys + i, load_cached(K, i, PREC_BF16));
    for (int64_t i = 0; i < (int64_t)nk * a->width; i += W) vstore_all(space + i, load_cached(V, i, PREC_BF16));
    return (Block){{keys, 1, KEY_BLOCK}, {space, a->width, 1}};
}

/* ---- one query ---- */

enum { KEY_VECTORS = KEY_BLOCK / W };

typedef struct {
    float max, sum;
} Softmax;

/* score = q . key, of `nv` vectors of keys, from vector v on; 0 in vectors that no key is in. */
INLINE void score_keys(const Attention *a, vf *score, const float *q, const char *K, int v, const int nv, int nk,
                       const int prec) {
    vf sum[4];
#pragma GCC unroll 4
    for (int i = 0; i < nv; i++) sum[i] = vset(0.0f);
    for (int u = 0; u < a->units && v * W < nk; u++)
#pragma GCC unroll 4
        for (int i = 0; i < nv; i++)
            sum[i] = multiply_add(vset(q[u]), load_cached(K, (int64_t)u * KEY_BLOCK + (v + i) * W, prec), sum[i], prec);
#pragma GCC unroll 4
    for (int i = 0; i < nv; i++) score[i] = sum[i];
}

/* P = exp(score - max) of the block's keys, exactly 0 from nk on; factors: their units, as they go into the product
 * with the values.  Returns the factor of what came before. */
INLINE float weigh(const Attention *a, Softmax *s, float *P, float *factors, const float *q, const char *K, int nk,
                   const int prec) {
    vf score[KEY_VECTORS], most = vset(-INFINITY);
    int v = 0;
    for (; v + 4 <= KEY_VECTORS && (v + 3) * W < nk; v += 4) score_keys(a, score + v, q, K, v, 4, nk, prec);
    for (; v < KEY_VECTORS; v++) score_keys(a, score + v, q, K, v, 1, nk, prec);
    for (v = 0; v < KEY_VECTORS; v++) {
        int seen = min_int(W, max_int(0, nk - v * W));
        score[v] = vfirst(score[v], vset(-INFINITY), seen);
        most = vmax(score[v], most);
    }
    const float old_max = s->max, block_max = vhmax(most) * a->log2_scale;
    s->max = block_max > old_max ? block_max : old_max;
    for (int v = 0; v < KEY_VECTORS; v++) {
        vf p = vexp2(vfma(score[v], vset(a->log2_scale), vset(-s->max)));
        vstore_all(P + v * W, p);
        store_along(a, factors, v * W, p);
    }
    float keep[W];
    vstore_all(keep, vexp2(vset(old_max - s->max)));
    return keep[0];
}

static void add_weights(Softmax *s, const float *P, int nk, float keep) {
    float total = 0.0f;
    for (int i = 0; i < nk; i++) total += P[i]; /* one chain, as the contract says */
    s->sum = s->sum * keep + total;
}

/* O = O * keep + P V, `nv` vectors from column d on; O = P V where the keys begin.  P: units. */
INLINE void add_values(const Attention *a, float *O, const float *P, const char *V, int d, const int nv, int nk,
                       float keep, int begin, const int prec) {
    vf sum[4];
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) sum[v] = vset(0.0f);
    for (int i = 0; i < units_for(a->pairs, nk); i++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            sum[v] = multiply_add(vset(P[i]), load_cached(V, (int64_t)i * a->width + d + v * W, prec), sum[v], prec);
#pragma GCC unroll 4
    for (int v = 0; v < nv; v++) {
        float *o = O + d + v * W;
        vstore_all(o, begin ? sum[v] : vfma(vload_all(o), vset(keep), sum[v]));
    }
}

INLINE void one_query_in(const Paged *p, int r, int h, int n, const int prec) {
    const Attention *a = &p->a;
    const int kv = h / (a->NH / a->NKV), t = p->past[r] + n - p->first[r], per_unit = a->pairs ? 2 : 1;
    const float *q = query_of(a, h, n);
    float *space = scratch(SCRATCH_TASK), P[KEY_BLOCK], factors[KEY_BLOCK];
    float *query = take(&space, a->unit_width), *O = take(&space, a->width);
    Softmax s = {-INFINITY, 0.0f};
    for (int u = 0; u < a->units; u += W) vstore_all(query + u, load_units(a, q + u * per_unit, a->HS - u * per_unit));
    for (int k0 = 0; k0 <= t; k0 += KEY_BLOCK) {
        int nk = min_int(KEY_BLOCK, t + 1 - k0), d = 0;
        char *K = keys_at(p, r, kv, k0), *V = values_of(a, K);
        float keep = weigh(a, &s, P, factors, query, K, nk, prec);
        for (; d + 4 * W <= a->width; d += 4 * W) add_values(a, O, factors, V, d, 4, nk, keep, !k0, prec);
        for (; d < a->width; d += W) add_values(a, O, factors, V, d, 1, nk, keep, !k0, prec);
        add_weights(&s, P, nk, keep); /* last: its chain goes on while the next keys come from memory */
    }
    forward_write(a, out_of(a, h, n), O, s.sum);
}

static void one_query(const Paged *p, int r, int h, int n) {
    if (p->a.prec == PREC_BF16) one_query_in(p, r, h, n, PREC_BF16);
    else one_query_in(p, r, h, n, PREC_FP32);
}

/* A task is a row of few queries and a key/value head, whose page it writes to: nobody else reads that. */
static void few_queries(void *context, int task) {
    const Paged *p = context;
    const Attention *a = &p->a;
    const int r = task / a->NKV, kv = task % a->NKV, group = a->NH / a->NKV;
    if (!is_few(p, r)) return;
    for (int n = p->first[r]; n < p->first[r + 1]; n++) write_token(p, r, kv, n);
    for (int h = kv * group; h < (kv + 1) * group; h++)
        for (int n = p->first[r]; n < p->first[r + 1]; n++) one_query(p, r, h, n);
}

/* ---- the operator ---- */

/* A task is 64 queries of one row and head, or nothing where the row has fewer; the longest come first. */
static void many_queries(void *context, int task) {
    const Paged *p = context;
    const Attention *a = &p->a;
    int h = task % a->NH, r = task / a->NH % p->R, block = p->most - 1 - task / a->NH / p->R;
    int n = p->first[r] + block * QUERY_BLOCK, nq = min_int(QUERY_BLOCK, p->first[r + 1] - n);
    if (is_few(p, r) || nq <= 0) return;
    if (nq > FEW) {
        ForwardQueries f = {.row = r,
                            .kv = h / (a->NH / a->NKV),
                            .t0 = p->past[r] + block * QUERY_BLOCK,
                            .nq = nq,
                            .q = query_of(a, h, n),
                            .out = out_of(a, h, n)};
        forward_queries(a, &f, block_of_pages);
        return;
    }
    for (int i = 0; i < nq; i++) one_query(p, r, h, n + i);
}

void CAT(attention_paged, ISA)(act *out, void *pages, const act *qkv, const int32_t *table, const int32_t *first,
                               const int32_t *past, int prec, int R, int P, int NH, int NKV, int HS) {
    Paged p = {.a = attention(qkv, NULL, prec, 0, 0, NH, NKV, HS),
               .pages = pages,
               .table = table,
               .first = first,
               .past = past,
               .R = R,
               .P = P,
               .by_group = R * NKV >= threads_get()};
    p.a.out = out;
    if (p.by_group) parallel_for(few_queries, &p, R * NKV);
    for (int r = 0; r < R; r++)
        if (!is_few(&p, r)) p.most = max_int(p.most, (first[r + 1] - first[r] + QUERY_BLOCK - 1) / QUERY_BLOCK);
    if (!p.most) return;
    parallel_for(write_row, &p, R * NKV);
    parallel_for(many_queries, &p, p.most * R * NH);
}

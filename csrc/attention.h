/* attention.h -- what attention over a batch (attention.c) and over pages (attention_paged.c) share: operands,
 * products, and the forward pass of a block of queries.
 *
 * Operands are made of units, as those of matmul: where the CPU multiplies pairs of bf16 a 32-bit unit holds two values
 * that follow each other in the sum, else it holds one.  So an operand has as many forms as there are sums it goes
 * into: a score sums along the head, the other products sum across rows (keys or queries).  What is left over at the
 * end of an odd sum is paired with zero, in both operands where it could be anything else: 0 * NaN would spoil the sum.
 */
#pragma once
#include "threads.h"
#include "tile.h"

/* Queries a block: one row of S.  STRIP: rows of a product at a time.  NV_MAX vectors wide, a product of 4 rows fills
 * the registers.  LANES: lanes of queries that are begun together, for a product reads those of a whole strip. */
enum { QUERY_BLOCK = 64, STRIP = 8, NV_MAX = REGISTERS == 32 ? 4 : 2, LANES = W / STRIP ? W : STRIP };

#define LN2 0.69314718055994531f

typedef struct {
    float *out, *lse_out; /* forward */
    float *dqkv;          /* backward */
    const float *dout, *qkv, *saved_out, *lse;
    const int32_t *starts;
    int prec, B, T, NH, NKV, HS;
    int pairs;        /* a unit is two values of bf16 */
    int units;        /* of a head */
    int unit_width;   /* they rounded up to whole vectors */
    int width;        /* HS rounded up to whole vectors */
    int64_t row;      /* floats from one position of qkv to the next */
    float scale;      /* 1 / sqrt(HS) */
    float log2_scale; /* the same in units of ln 2, for exp2 */
    int by_head;      /* forward: the order of tasks */
    int together;     /* forward: blocks of queries a task */
} Attention;

/* Up to 64 rows of units, `ld` apart, the units of a row `step` apart. */
typedef struct {
    const float *p;
    int64_t ld, step;
} Rows;

/* Keys and values of one head and one block, as scores and outputs want them: K along the head, V across keys. */
typedef struct {
    Rows K, V;
} Block;

INLINE int units_for(int pairs, int values) { return pairs ? (values + 1) / 2 : values; }
INLINE int whole_vectors(int n) { return (n + W - 1) / W * W; }

static Attention attention(const float *qkv, const int32_t *starts, int prec, int B, int T, int NH, int NKV, int HS) {
    int pairs = prec == PREC_BF16 && HAVE_PAIRS, units = units_for(pairs, HS);
    return (Attention){.qkv = qkv,
                       .starts = starts,
                       .prec = prec,
                       .B = B,
                       .T = T,
                       .NH = NH,
                       .NKV = NKV,
                       .HS = HS,
                       .pairs = pairs,
                       .units = units,
                       .unit_width = whole_vectors(units),
                       .width = whole_vectors(HS),
                       .row = (int64_t)(NH + 2 * NKV) * HS,
                       .scale = 1.0f / sqrtf((float)HS),
                       .log2_scale = LOG2_E / sqrtf((float)HS)};
}

static int max_int(int a, int b) { return a > b ? a : b; }

/* ---- where things lie ---- */

static int key_head(const Attention *a, int kv) { return a->NH + kv; }
static int value_head(const Attention *a, int kv) { return a->NH + a->NKV + kv; }

/* The next n floats of scratch. */
static float *take(float **scratch, int64_t n) {
    float *p = *scratch;
    *scratch += n;
    return p;
}

/* What an operand of 64 rows takes, in any form. */
static int64_t operand_size(const Attention *a) { return (int64_t)QUERY_BLOCK * a->unit_width; }

/* ---- operands ---- */

/* A unit in each lane: of x and, where it is a pair, of next. */
INLINE vf unit_of(const Attention *a, vf x, vf next) {
    if (HAVE_PAIRS && a->pairs) return vpairs(x, next);
    return a->prec == PREC_BF16 ? vbf16(x) : x;
}

/* W units along a row of which so many values are left. */
INLINE vf load_units(const Attention *a, const float *p, int left) {
    vf x = load_left(p, left);
    if (HAVE_PAIRS && a->pairs) return vpairs_along(x, load_left(p + W, left - W));
    return a->prec == PREC_BF16 ? vbf16(x) : x;
}

/* W values -> units of a row that has them along it, from value `lane` on. */
INLINE void store_along(const Attention *a, float *row, int lane, vf x) {
    if (HAVE_PAIRS && a->pairs) vstore_pairs(row + lane / 2, x);
    else vstore_all(row + lane, a->prec == PREC_BF16 ? vbf16(x) : x);
}

/* W rows of x, `rows` of which exist, W units of each -> columns of `to`, zero where no row is. */
INLINE void transpose_units(const Attention *a, const float *x, int64_t ld, int rows, int left, float *to, int units,
                            const int whole) {
    vf r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        r[i] = whole ? load_units(a, x + i * ld, 2 * W) : i < rows ? load_units(a, x + i * ld, left) : vset(0.0f);
    vtranspose(r);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (whole || i < units) vstore_all(to + i * QUERY_BLOCK, r[i]);
}

/* x (n, HS) -> space (units, 64), zero in the lanes from n up to whole vectors. */
static void transpose(const Attention *a, const float *x, int64_t ld, int n, float *space) {
    const int per_unit = a->pairs ? 2 : 1;
    for (int q = 0; q < n; q += W)
        for (int u = 0; u < a->units; u += W) {
            const float *from = x + q * ld + u * per_unit;
            float *to = space + (int64_t)u * QUERY_BLOCK + q;
            int left = a->HS - u * per_unit;
            if (q + W <= n && left >= W * per_unit) transpose_units(a, from, ld, W, left, to, W, 1);
            else transpose_units(a, from, ld, n - q, left, to, a->units - u, 0);
        }
}

/* ---- products ---- */

/* C[i][j] = C[i][j] * old[i] + the chain of A row i and B column j, rounded once; old NULL: the chain alone. */
INLINE void tile_onto(const int MR, const int NV, const int pairs, int kc, const float *A, int64_t rs, int64_t ks,
                      const float *B, int64_t ldb, float *C, int64_t ldc, const float *old) {
    vf c[8][4];
    tile_chain(MR, NV, pairs, kc, A, rs, ks, B, ldb, c);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            float *p = C + i * ldc + j * W;
            vstore_all(p, old ? vfma(vload_all(p), vset(old[i]), c[i][j]) : c[i][j]);
        }
}

/* STRIP rows of a product, `nv` vectors wide: the widest tiles the registers hold, and none much narrower than the
 * rest, because a tile with few chains waits for its own sums. */
INLINE void strip_of(const int pairs, int nv, int kc, const float *A, int64_t rs, int64_t ks, const float *B,
                     int64_t ldb, float *C, int64_t ldc, const float *old) {
#define TILES(MR, NV)                   \
    for (int i = 0; i < STRIP; i += MR) \
    tile_onto(MR, NV, pairs, kc, A + i * rs, rs, ks, B, ldb, C + i * ldc, ldc, old ? old + i : NULL)
    for (int n; nv > 0; nv -= n, B += n * W, C += n * W) {
        n = nv <= NV_MAX ? nv : nv < 2 * NV_MAX ? (nv + 1) / 2 : NV_MAX;
        if (n == 1) TILES(8, 1);
        else if (n == 2 && REGISTERS == 32) TILES(8, 2);
        else if (n == 2) TILES(4, 2);
        else if (n == 3) TILES(8, 3);
        else TILES(4, 4);
    }
#undef TILES
}

static __attribute__((noinline)) void strip_pairs(int nv, int kc, const float *A, int64_t rs, int64_t ks,
                                                  const float *B, int64_t ldb, float *C, int64_t ldc,
                                                  const float *old) {
    strip_of(HAVE_PAIRS, nv, kc, A, rs, ks, B, ldb, C, ldc, old);
}
static __attribute__((noinline)) void strip_values(int nv, int kc, const float *A, int64_t rs, int64_t ks,
                                                   const float *B, int64_t ldb, float *C, int64_t ldc,
                                                   const float *old) {
    strip_of(0, nv, kc, A, rs, ks, B, ldb, C, ldc, old);
}

/* A: row i, unit k at A + i * rs + k * ks.  B: unit k of all columns. */
static void strip(const Attention *a, int nv, int kc, const float *A, int64_t rs, int64_t ks, Rows B, float *C,
                  int64_t ldc, const float *old) {
    if (HAVE_PAIRS && a->pairs) strip_pairs(nv, kc, A, rs, ks, B.p, B.ld, C, ldc, old);
    else strip_values(nv, kc, A, rs, ks, B.p, B.ld, C, ldc, old);
}

/* In what follows query lane q is position t0 + q, key row i is position k0 + i, and `ahead` = k0 - t0: the query sees
 * the key where q >= ahead + i.  So in row i the lanes below ahead + i are hidden. */

/* S[key][query] = keys . queries for a strip of keys from row i on, over the vectors of lanes that see any of them.
 * S (STRIP, 64), QT (units, 64).  Returns the first of these lanes. */
static int scores(const Attention *a, float *S, Rows keys, int i, const float *QT, int nq, int ahead) {
    int lane = max_int(0, ahead + i) / LANES * LANES, nv = (nq + W - 1 - lane) / W;
    strip(a, nv, a->units, keys.p + i * keys.ld, keys.ld, keys.step, (Rows){QT + lane, QUERY_BLOCK, 1}, S + lane,
          QUERY_BLOCK, NULL);
    return lane;
}

/* How many key rows the lanes lane .. lane+W-1 have to look at: all of any strip that one begun with them sees a key
 * of. */
static int rows_seen(int nk, int lane, int ahead) {
    int seen = max_int(0, lane / LANES * LANES + LANES - ahead);
    return min_int(nk, (seen + STRIP - 1) / STRIP * STRIP);
}

/* out[query][d] = out * old + P^T X for STRIP queries from lane q: the keys that one of them sees, which may be none.
 * P: units (keys, 64); X: units across keys.  The partner of an odd last key is 0 in P. */
static int over_keys(const Attention *a, float *out, int64_t ldo, const float *old, const float *P, Rows X, int nk,
                     int q, int ahead) {
    int seen = min_int(nk, q + STRIP - ahead);
    if (seen <= 0) return 0;
    strip(a, a->width / W, units_for(a->pairs, seen), P + q, 1, QUERY_BLOCK, X, out, ldo, old);
    return 1;
}

/* ---- forward ---- */

INLINE vf hide(vf s, int hidden) { return hidden > 0 ? vfirst(vset(-INFINITY), s, min_int(hidden, W)) : s; }

/* ln2 * (max + log2(sum)) of W sums of weights, which lie between 1/2 and the number of keys; a call of logf for each
 * takes 4 % of a forward pass over 64 positions.  The bits of a float, read as an integer, give its log2 to 0.043: y.
 * sum * 2^-y is then 1 + t with |t| <= 0.031, and ln(1 + t) a short series.  ln(sum) is off by 1.3e-7 at most, or by
 * that part of itself where it is above 1. */
INLINE vf log_sum_exp(const float *max, const float *sum) {
    vf y = vfma(vifloat(viload(sum)), vset(0x1p-23f), vset(0.043f - 127.0f));
    vf t = vfma(vload_all(sum), vexp2(vset(0.0f) - y), vset(-1.0f)), series = vfma(t, vset(-0.25f), vset(1 / 3.0f));
    series = vfma(t, series, vset(-0.5f));
    return vfma(vload_all(max) + y, vset(LN2), vfma(t * t, series, t));
}

/* exp(score - max) of key row i, exactly 0 where hidden; scale and max in units of ln 2. */
INLINE vf weight(const float *S, int i, vf scale, vf minus_max, const int masked, int hidden) {
    vf score = vload_all(S + i * QUERY_BLOCK);
    return vexp2(vfma(masked ? hide(score, hidden + i) : score, scale, minus_max));
}

/* How many of so many key rows no lane is hidden from, where the first `hidden` lanes do not see row 0, one more each
 * row; an even number. */
INLINE int clear_rows(int rows, int hidden) { return min_int(rows, max_int(0, 1 - hidden)) & ~1; }

/* P = exp(score - max) in the place of the scores, rows i .. end-1; i is even.  Returns sum + their sum. */
INLINE vf weigh_rows(const Attention *a, float *S, int i, int end, vf minus_max, vf sum, const int pairs,
                     const int masked, int hidden) {
    const vf scale = vset(a->log2_scale);
    const int round = a->prec == PREC_BF16;
    for (; i < end; i++) {
        float *P = S + (pairs ? i / 2 : i) * QUERY_BLOCK;
        vf p = weight(S, i, scale, minus_max, masked, hidden), next = vset(0.0f);
        sum = sum + p;
        if (pairs && ++i < end) {
            next = weight(S, i, scale, minus_max, masked, hidden);
            sum = sum + next;
        }
        vstore_all(P, pairs ? vpairs(p, next) : round ? vbf16(p) : p);
    }
    return sum;
}

/* Online softmax (Milakov, Gimelshein 2018, arXiv:1805.02867) of W queries over one more block of keys.  S, as lanes of
 * rows: scores, then units of P.  keep: the factor of all that came before, exactly 1 for a query that sees nothing
 * new.  The first `hidden` lanes do not see key row 0, one more each row. */
INLINE void softmax(const Attention *a, float *S, float *max, float *sum, float *keep, const int pairs, int rows,
                    int hidden) {
    const int clear = clear_rows(rows, hidden);
    vf old_max = vload_all(max), most = vset(-INFINITY), added = vset(0.0f);
    for (int i = 0; i < clear; i++) most = vmax(vload_all(S + i * QUERY_BLOCK), most);
    for (int i = clear; i < rows; i++) most = vmax(hide(vload_all(S + i * QUERY_BLOCK), hidden + i), most);
    vf new_max = vmax(most * vset(a->log2_scale), old_max), minus_max = vset(0.0f) - new_max;
    added = weigh_rows(a, S, 0, clear, minus_max, added, pairs, 0, hidden);
    added = weigh_rows(a, S, clear, rows, minus_max, added, pairs, 1, hidden);
    vf k = vexp2(old_max - new_max);
    vstore_all(keep, k);
    vstore_all(max, new_max);
    vstore_all(sum, vload_all(sum) * k + added);
}

/* Up to 64 neighbouring queries of a head, and how far their sums are. */
typedef struct {
    int t0, nq;
    float *QT, *O; /* (units, 64), (64, width) */
    float max[QUERY_BLOCK], sum[QUERY_BLOCK];
} QueryBlock;

static void forward_begin(const Attention *a, QueryBlock *q, const float *query, int t0, int nq, float **space) {
    q->t0 = t0, q->nq = nq;
    q->QT = take(space, operand_size(a)), q->O = take(space, (int64_t)QUERY_BLOCK * a->width);
    for (int i = 0; i < QUERY_BLOCK; i++) q->max[i] = -INFINITY, q->sum[i] = 0.0f;
    transpose(a, query, a->row, nq, q->QT);
}

/* They meet the nk keys from k0 on, of which the first block begins their sums. */
static void forward_pair(const Attention *a, QueryBlock *q, const Block *b, int k0, int nk, int begin, float *S) {
    float keep[QUERY_BLOCK];
    int nq = q->nq, ahead = k0 - q->t0;
    for (int i = 0; i < nk; i += STRIP) scores(a, S + i * QUERY_BLOCK, b->K, i, q->QT, nq, ahead);
    for (int i = 0; i < nq; i += W) {
        int rows = rows_seen(nk, i, ahead), hidden = ahead - i;
        if (HAVE_PAIRS && a->pairs) softmax(a, S + i, q->max + i, q->sum + i, keep + i, HAVE_PAIRS, rows, hidden);
        else softmax(a, S + i, q->max + i, q->sum + i, keep + i, 0, rows, hidden);
    }
    for (int i = 0; i < nq; i += STRIP)
        over_keys(a, q->O + (int64_t)i * a->width, a->width, begin ? NULL : keep + i, S, b->V, nk, i, ahead);
}

/* The end of a sum over keys: out = O / sum */
static void forward_write(const Attention *a, float *out, const float *O, float sum) {
    vf factor = vset(1.0f / sum);
    for (int d = 0; d < a->HS; d += W) store_left(out + d, vload_all(O + d) * factor, a->HS - d);
}

/* Up to TOGETHER blocks of neighbouring queries of one head, from position t0 on, with the same start.  `row` finds a
 * block of keys: it is the batch row, or the row of a session. */
enum { TOGETHER = 4 };
typedef struct {
    int row, kv, t0, nq, start;
    const float *q; /* a->row floats apart */
    float *out;     /* NH * HS floats apart */
    float *lse;
} ForwardQueries;

static void forward_end(const Attention *a, const ForwardQueries *f, const QueryBlock *q) {
    int first = q->t0 - f->t0;
    for (int i = 0; i < q->nq; i++) {
        float *out = f->out + (first + i) * (int64_t)a->NH * a->HS;
        forward_write(a, out, q->O + (int64_t)i * a->width, q->sum[i]);
    }
    for (int i = 0; f->lse && i < q->nq; i += W)
        store_left(f->lse + first + i, log_sum_exp(q->max + i, q->sum + i), q->nq - i);
}

static void forward_queries(const Attention *a, const ForwardQueries *f,
                            Block (*block_at)(const Attention *, int row, int kv, int k0, int nk, float *space)) {
    QueryBlock q[TOGETHER];
    int n = 0, end = f->t0 + f->nq;
    float *space = scratch(SCRATCH_TASK), *S = take(&space, KEY_BLOCK * QUERY_BLOCK);
    for (int t = f->t0; t < end; t += QUERY_BLOCK)
        forward_begin(a, &q[n++], f->q + (t - f->t0) * a->row, t, min_int(QUERY_BLOCK, end - t), &space);
    for (int k0 = f->start; k0 < end; k0 += KEY_BLOCK) {
        Block b = block_at(a, f->row, f->kv, k0, min_int(KEY_BLOCK, end - k0), space);
        for (int i = 0; i < n; i++) {
            int nk = min_int(KEY_BLOCK, q[i].t0 + q[i].nq - k0);
            if (nk > 0) forward_pair(a, &q[i], &b, k0, nk, k0 == f->start, S);
        }
    }
    for (int i = 0; i < n; i++) forward_end(a, f, &q[i]);
}

/* attention.h -- what attention over a batch (attention.c) and over pages (attention_paged.c) share: operands,
 * products, and the forward pass of a block of queries. */
#pragma once
#include "threads.h"
#include "tile.h"

/* Queries a block: one row of S.  STRIP: rows of a product at a time.  NV_MAX vectors wide, a product of 4 rows fills
 * the registers. */
enum { QUERY_BLOCK = 64, STRIP = 8, NV_MAX = W == 16 ? 4 : 2 };

typedef struct {
    float *out, *lse_out; /* forward */
    float *dqkv;          /* backward */
    const float *dout, *qkv, *saved_out, *lse;
    const int32_t *starts;
    int prec, B, T, NH, NKV, HS;
    int width;   /* HS rounded up to whole vectors */
    int64_t row; /* floats from one position of qkv to the next */
    float scale; /* 1 / sqrt(HS) */
    int by_head; /* forward: the order of tasks */
} Attention;

/* Up to 64 rows of a matrix, `ld` floats apart, their values `step` apart.  Where step is 1 they can be read in whole
 * vectors up to `width`. */
typedef struct {
    const float *p;
    int64_t ld, step;
} Rows;

/* Keys and values of one head and one block. */
typedef struct {
    Rows K, V;
} Block;

static Attention attention(const float *qkv, const int32_t *starts, int prec, int B, int T, int NH, int NKV, int HS) {
    return (Attention){.qkv = qkv,
                       .starts = starts,
                       .prec = prec,
                       .B = B,
                       .T = T,
                       .NH = NH,
                       .NKV = NKV,
                       .HS = HS,
                       .width = (HS + W - 1) / W * W,
                       .row = (int64_t)(NH + 2 * NKV) * HS,
                       .scale = 1.0f / sqrtf((float)HS)};
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

/* ---- operands ---- */

/* x (n, HS) -> space (HS, 64), zero in the lanes from n up to whole vectors. */
static void transpose(const Attention *a, const float *x, int64_t ld, int n, float *space) {
    for (int q = 0; q < n; q += W)
        for (int d = 0; d < a->HS; d += W) {
            vf r[W];
            int columns = min_int(W, a->HS - d);
            for (int i = 0; i < W; i++) {
                r[i] = q + i < n ? vload(x + (q + i) * ld + d, columns) : vset(0.0f);
                if (a->prec == PREC_BF16) r[i] = vbf16(r[i]);
            }
            vtranspose(r);
            for (int i = 0; i < columns; i++) vstore_all(space + (int64_t)(d + i) * QUERY_BLOCK + q, r[i]);
        }
}

/* ---- products ---- */

/* STRIP rows of a product, `nv` vectors wide: the widest tiles the registers hold, and none much narrower than the
 * rest, because a tile with few chains waits for its own sums. */
static void strip(int nv, int kc, const float *A, int64_t rs, int64_t ks, const float *B, int64_t ldb, float *C,
                  int64_t ldc, int add) {
#define TILES(MR, NV) \
    for (int i = 0; i < STRIP; i += MR) tile(MR, NV, 0, kc, A + i * rs, rs, ks, B, ldb, C + i * ldc, ldc, add)
    for (int n; nv > 0; nv -= n, B += n * W, C += n * W) {
        n = nv <= NV_MAX ? nv : nv < 2 * NV_MAX ? (nv + 1) / 2 : NV_MAX;
        if (n == 1) TILES(8, 1);
        else if (n == 2 && W == 16) TILES(8, 2);
        else if (n == 2) TILES(4, 2);
        else if (n == 3) TILES(8, 3);
        else TILES(4, 4);
    }
#undef TILES
}

/* In what follows query lane q is position t0 + q, key row i is position k0 + i, and `ahead` = k0 - t0: the query sees
 * the key where q >= ahead + i.  So in row i the lanes below ahead + i are hidden. */

/* S[key][query] = keys . queries, over the vectors of lanes that see any of a strip's keys.  S (64, 64), QT (HS, 64) */
static void scores(const Attention *a, float *S, Rows keys, int nk, const float *QT, int nq, int ahead) {
    for (int i = 0; i < nk; i += STRIP) {
        int v = max_int(0, ahead + i) / W, nv = (nq + W - 1) / W;
        strip(nv - v, a->HS, keys.p + i * keys.ld, keys.ld, keys.step, QT + v * W, QUERY_BLOCK,
              S + i * QUERY_BLOCK + v * W, QUERY_BLOCK, 0);
    }
}

/* How many key rows the lanes lane .. lane+W-1 have to look at: all of any strip that one of them sees a key of. */
static int rows_seen(int nk, int lane, int ahead) {
    int seen = max_int(0, lane + W - ahead);
    return min_int(nk, (seen + STRIP - 1) / STRIP * STRIP);
}

/* out[query][d] (+)= S^T X for STRIP queries from lane q: the keys that one of them sees, which may be none. */
static int over_keys(const Attention *a, float *out, int add, const float *S, Rows X, int nk, int q, int ahead) {
    int seen = min_int(nk, q + STRIP - ahead);
    if (seen <= 0) return 0;
    strip(a->width / W, seen, S + q, 1, QUERY_BLOCK, X.p, X.ld, out, a->width, add);
    return 1;
}

/* ---- forward ---- */

INLINE vf hide(vf s, int hidden) { return hidden > 0 ? vfirst(vset(-INFINITY), s, min_int(hidden, W)) : s; }

/* Online softmax (Milakov, Gimelshein 2018, arXiv:1805.02867) of W queries over one more block of keys.  S, as lanes of
 * rows: scores, then exp(score - max), exactly 0 where hidden.  keep: the factor of all that came before, exactly 1
 * for a query that sees nothing new.  The first `hidden` lanes do not see key row 0, one more each row. */
static void softmax(const Attention *a, float *S, float *max, float *sum, float *keep, int rows, int hidden) {
    vf old_max = vload_all(max), block_max = vset(-INFINITY), block_sum = vset(0.0f);
    for (int i = 0; i < rows; i++) block_max = vmax(hide(vload_all(S + i * QUERY_BLOCK), hidden + i), block_max);
    vf new_max = vmax(block_max * vset(a->scale), old_max), minus_max = vset(0.0f) - new_max;
    for (int i = 0; i < rows; i++) {
        vf p = vexp(vfma(hide(vload_all(S + i * QUERY_BLOCK), hidden + i), vset(a->scale), minus_max));
        block_sum = block_sum + p;
        vstore_all(S + i * QUERY_BLOCK, a->prec == PREC_BF16 ? vbf16(p) : p);
    }
    vf k = vexp(old_max - new_max);
    vstore_all(keep, k);
    vstore_all(max, new_max);
    vstore_all(sum, vload_all(sum) * k + block_sum);
}

/* y = x * factor, in whole vectors */
static void scale_row(float *y, const float *x, float factor, int width) {
    for (int d = 0; d < width; d += W) vstore_all(y + d, vload_all(x + d) * vset(factor));
}

/* One block of keys: O and the statistics of nq queries go on. */
static void forward_keys(const Attention *a, float *O, float *S, Rows V, float *max, float *sum, int nk, int nq,
                         int ahead) {
    float keep[QUERY_BLOCK];
    for (int q = 0; q < nq; q += W) softmax(a, S + q, max + q, sum + q, keep + q, rows_seen(nk, q, ahead), ahead - q);
    for (int q = 0; q < nq; q++)
        if (keep[q] != 1.0f) scale_row(O + (int64_t)q * a->width, O + (int64_t)q * a->width, keep[q], a->width);
    for (int q = 0; q < nq; q += STRIP) over_keys(a, O + (int64_t)q * a->width, 1, S, V, nk, q, ahead);
}

/* The end of a sum over keys: out = O / sum */
static void forward_write(const Attention *a, float *out, const float *O, float sum) {
    vf factor = vset(1.0f / sum);
    for (int d = 0; d < a->HS; d += W) vstore(out + d, vload_all(O + d) * factor, min_int(W, a->HS - d));
}

/* nq <= 64 neighbouring queries of one head, from position t0 on, with the same start.  `row` finds a block of keys: it
 * is the batch row, or the row of a session. */
typedef struct {
    int row, kv, t0, nq, start;
    const float *q; /* a->row floats apart */
    float *out;     /* NH * HS floats apart */
    float *lse;
} ForwardQueries;

static void forward_queries(const Attention *a, const ForwardQueries *f,
                            Block (*block_at)(const Attention *, int row, int kv, int k0, int nk, float *space)) {
    const int t0 = f->t0, nq = f->nq;
    int64_t block = (int64_t)QUERY_BLOCK * a->width, out_row = (int64_t)a->NH * a->HS;
    float *space = scratch(SCRATCH_TASK), max[QUERY_BLOCK], sum[QUERY_BLOCK];
    float *QT = take(&space, block), *S = take(&space, KEY_BLOCK * QUERY_BLOCK), *O = take(&space, block);
    for (int q = 0; q < QUERY_BLOCK; q++) max[q] = -INFINITY, sum[q] = 0.0f;
    memset(O, 0, (size_t)block * sizeof *O);
    transpose(a, f->q, a->row, nq, QT);
    for (int k0 = f->start; k0 < t0 + nq; k0 += KEY_BLOCK) {
        int nk = min_int(KEY_BLOCK, t0 + nq - k0);
        Block b = block_at(a, f->row, f->kv, k0, nk, space);
        scores(a, S, b.K, nk, QT, nq, k0 - t0);
        forward_keys(a, O, S, b.V, max, sum, nk, nq, k0 - t0);
    }
    for (int q = 0; q < nq; q++) {
        forward_write(a, f->out + q * out_row, O + (int64_t)q * a->width, sum[q]);
        if (f->lse) f->lse[q] = max[q] + logf(sum[q]);
    }
}

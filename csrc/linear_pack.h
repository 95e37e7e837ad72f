/* linear_pack.h -- operands of a product put in the order in which tiles read them: [k][width], in units of one value,
 * or of a pair of bf16, zero beyond the columns that are there. */
#pragma once
#include "tile.h"

/* W units that follow each other in k, of which `values` values count: from here on a vector of pairs is moved like a
 * vector of floats. */
INLINE vf load_units_along_k(const float *p, int values, int prec) {
    vf x = load_left(p, values);
    if (prec == PREC_FP32) return x;
    return HAVE_PAIRS ? vpairs_along(x, load_left(p + W, values - W)) : vbf16(x);
}

/* The unit of k step `k` for W neighbouring columns: rows p and, where units are pairs, p + next. */
INLINE vf load_units_across_k(const float *p, const float *next, int columns, int prec) {
    vf x = vload(p, columns);
    if (prec == PREC_FP32) return x;
    return HAVE_PAIRS ? vpairs(x, next ? vload(next, columns) : vset(0.0f)) : vbf16(x);
}

/* A vector of units, columns j .. j + W - 1 of k step k.  Two panels of half a vector lie `panel` apart.  A panel that
 * is narrower still is written in whole vectors: what is too much lies where the next step, or panel, will be. */
INLINE void put_units(float *out, const int width, int64_t panel, int64_t k, int j, vf x) {
    float *at = out + k * width + j;
    if (2 * width == W) vstore_halves(at, at + panel, x);
    else vstore_all(at, x);
}

/* W units along k of W columns, `stride` apart, of which `columns` and `values` count: transposed in registers. */
INLINE void pack_square(float *out, const int width, int64_t panel, int k, int j, const float *p, int64_t stride,
                        int columns, int values, const int per_unit, int prec) {
    vf r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) r[i] = i < columns ? load_units_along_k(p + i * stride, values, prec) : vset(0.0f);
    vtranspose(r);
    int rows = min_int(W, (values + per_unit - 1) / per_unit);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (i < rows) put_units(out, width, panel, k + i, j, r[i]);
}

/* Columns lie `stride` apart, k is contiguous.  Whole squares need no masks, which would cost more than the moving. */
INLINE void pack_transposed(float *out, const int width, int64_t panel, const float *p, int64_t stride, int valid,
                            int values, const int per_unit, int prec) {
    const int square = W * per_unit;
    for (int j = 0; j < width; j += W)
        for (int k = 0; k < values; k += square) {
            const float *at = p + j * stride + k;
            int columns = valid - j, left = values - k;
            if (columns >= W && left >= square)
                pack_square(out, width, panel, k / per_unit, j, at, stride, W, square, per_unit, prec);
            else pack_square(out, width, panel, k / per_unit, j, at, stride, columns, left, per_unit, prec);
        }
}

/* sums[i] += lane i of a finished chain. */
INLINE void add_chain(double *sums, vf chain) {
    vdstore(sums, vdload(sums) + vdlow(chain)), vdstore(sums + W / 2, vdload(sums + W / 2) + vdhigh(chain));
}

/* Columns are contiguous, k steps lie `stride` apart; of each so many vectors, `apart` in `out`, or half vectors.
 * Where `sums` are wanted, sums[i] += the values of column i as they are, in chains of `chain`. */
INLINE void pack_straight(float *out, const int width, int64_t panel, const int vectors, int64_t apart, const float *p,
                          int64_t stride, int valid, int values, const int per_unit, int prec, double *sums,
                          int chain) {
    for (int k0 = 0; k0 < values; k0 += chain) {
        vf sum[4];
        const int k1 = min_int(k0 + chain, values);
        for (int v = 0; v < vectors; v++) sum[v] = vset(0.0f);
        for (int k = k0; k < k1; k += per_unit, p += per_unit * stride) {
            const float *next = per_unit == 2 && k + 1 < values ? p + stride : NULL;
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                int columns = min_int(W, valid - v * W);
                if (columns < 0) columns = 0;
                vf x = load_units_across_k(p + v * W, next ? next + v * W : NULL, columns, prec);
                put_units(out + v * apart, width, panel, k / per_unit, 0, x);
                if (sums) sum[v] = sum[v] + vload(p + v * W, columns);
                if (sums && next) sum[v] = sum[v] + vload(next + v * W, columns);
            }
        }
        for (int v = 0; sums && v < vectors; v++) add_chain(sums + v * W, sum[v]);
    }
}

/* The same, without masks where all columns are there. */
INLINE void pack_vectors(float *out, const int width, int64_t panel, const int vectors, int64_t apart, const float *p,
                         int64_t stride, int valid, int values, const int per_unit, int prec, double *sums, int chain) {
    if (valid >= vectors * W && values % per_unit == 0)
        pack_straight(out, width, panel, vectors, apart, p, stride, vectors * W, values, per_unit, prec, sums, chain);
    else pack_straight(out, width, panel, vectors, apart, p, stride, valid, values, per_unit, prec, sums, chain);
}

/* What lies along k. */
INLINE void pack_along(float *out, const int width, int64_t panel, const float *p, int64_t stride, int valid,
                       int values, int per_unit, int prec) {
    if (per_unit == 2) pack_transposed(out, width, panel, p, stride, valid, values, 2, prec);
    else pack_transposed(out, width, panel, p, stride, valid, values, 1, prec);
}

/* What lies across it, for any number of vectors. */
INLINE void pack_across(float *out, const int width, int64_t panel, const int vectors, int64_t apart, const float *p,
                        int64_t stride, int valid, int values, int per_unit, int prec, double *sums, int chain) {
    if (per_unit == 2) pack_vectors(out, width, panel, vectors, apart, p, stride, valid, values, 2, prec, sums, chain);
    else pack_vectors(out, width, panel, vectors, apart, p, stride, valid, values, 1, prec, sums, chain);
}

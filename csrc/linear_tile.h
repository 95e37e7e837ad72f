/* linear_tile.h -- the sums of a tile over one K block, each way A can lie, and between their steps what else is to be
 * done: lines are fetched (linear_ahead.h), and over the rows of a batch earlier sums are added to their totals. */
#pragma once
#include "linear_ahead.h"
#include "tile.h"

enum { ROWS_OF_CHAINS = MR / 2 };

/* A whole tile. */
INLINE void sums_of_tile(const int pairs, int units, const float *A, int64_t rs, int64_t ks, const float *B, float *S,
                         int add, Ahead *ahead) {
    vf c[8][4];
    int k = 0;
    tile_clear(MR, NV, c);
    for (; k + STEPS_APART <= units; k += STEPS_APART) {
        tile_steps(MR, NV, pairs, STEPS_APART, A + k * ks, rs, ks, B + k * NR, NR, c);
        fetch_ahead(ahead);
    }
    tile_steps(MR, NV, pairs, units - k, A + k * ks, rs, ks, B + k * NR, NR, c);
    tile_put(MR, NV, S, NR, add, c);
}

/* Of a packed panel of A the first `rows` count; the rows of S behind them may be written or not. */
INLINE void sums_of_rows(const int pairs, int rows, int units, const float *A, const float *B, float *S, int add,
                         Ahead *ahead) {
    if (rows <= 4) fetch_all(ahead);
    if (rows == 1) tile(1, NV, pairs, units, A, 1, MR, B, NR, S, NR, add);
    else if (rows == 2) tile(2, NV, pairs, units, A, 1, MR, B, NR, S, NR, add);
    else if (rows <= 4) tile(4, NV, pairs, units, A, 1, MR, B, NR, S, NR, add);
    else sums_of_tile(pairs, units, A, 1, MR, B, S, add, ahead);
}
static __attribute__((noinline)) void sums_packed(int rows, int units, const float *A, const float *B, float *S,
                                                  int add, Ahead *ahead) {
    sums_of_rows(0, rows, units, A, B, S, add, ahead);
}
static __attribute__((noinline)) void sums_direct(int units, const float *A, int64_t a_i, const float *B, float *S,
                                                  int add, Ahead *ahead) {
    sums_of_tile(0, units, A, a_i, 1, B, S, add, ahead);
}
static __attribute__((noinline)) void sums_pairs(int rows, int units, const float *A, const float *B, float *S, int add,
                                                 Ahead *ahead) {
    sums_of_rows(HAVE_PAIRS, rows, units, A, B, S, add, ahead);
}

/* ---- over the rows of a batch: short chains, blocks added in double ---------------------------------------------- */

/* Over rows: where the sums of one block of rows go.  The first block waits in S; those behind it are added in double,
 * in D; with the last one the rounded total goes to C. */
typedef struct {
    int n, last; /* which block, and whether none follows */
    int accumulate, streams;
    float *S;
    double *D;
    float *c; /* C at the tile, and how many rows and columns are there */
    int rows, columns;
    int64_t row; /* from row to row of C */
} Total;

/* x and what waits for it: of two floats, a float addition is the rounded double one (Figueroa 1995, "When is double
 * rounding innocuous?"), so that D is not needed before the third block. */
INLINE vf total(const Total *t, vf x, int at) {
    if (t->n == 0) return x;
    if (t->n == 1) return vload_all(t->S + at) + x;
    return vdround(vdload(t->D + at) + vdlow(x), vdload(t->D + at + W / 2) + vdhigh(x));
}

/* x to what waits, from the second block on. */
INLINE void keep_total(const Total *t, vf x, int at) {
    vd low, high;
    if (t->n == 1) low = vdlow(vload_all(t->S + at)), high = vdhigh(vload_all(t->S + at));
    else low = vdload(t->D + at), high = vdload(t->D + at + W / 2);
    vdstore(t->D + at, low + vdlow(x)), vdstore(t->D + at + W / 2, high + vdhigh(x));
}

/* The total, with x the last of it, to C: vector v of a tile. */
INLINE void put_total(const Total *t, vf x, int v) {
    const int row = v / NV, column = v % NV * W, k = min_int(W, t->columns - column);
    float *c = t->c + row * t->row + column;
    if (row >= t->rows || k <= 0) return;
    x = total(t, x, v * W);
    if (t->accumulate) x = vload(c, k) + x;
    if (t->streams && k == W) vstream(c, x);
    else vstore(c, x, k);
}

/* Half a tile, for the sums of chains share the registers with the chain, and half a tile that is multiplied but not
 * yet added to its total.  It is added piece by piece between the chains of the next one: all at once it would keep the
 * multipliers waiting for 60 cycles of 800, more than a core looks ahead, and stores past the caches much longer. */
enum { HALF_TILE = ROWS_OF_CHAINS * NV, LATE_A_CHAIN = 2 };
typedef struct {
    float x[HALF_TILE * W];
    Total to;
    int added; /* vectors of HALF_TILE */
} Late;

INLINE void add_late(Late *late, int vectors) {
    const int end = min_int(HALF_TILE, late->added + vectors);
    if (late->to.last)
        for (int v = late->added; v < end; v++) put_total(&late->to, vload_all(late->x + v * W), v);
    else
        for (int v = late->added; v < end; v++) keep_total(&late->to, vload_all(late->x + v * W), v * W);
    late->added = end;
}

INLINE void store_half_tile(float *x, vf sums[8][4]) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS_OF_CHAINS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) vstore_all(x + i * NR + j * W, sums[i][j]);
}

/* sums += the sums of one more chain; or = them. */
INLINE void one_chain(const int pairs, const int first, int units, const float *A, const float *B, vf sums[8][4]) {
    vf c[8][4];
    tile_chain(ROWS_OF_CHAINS, NV, pairs, units, A, 1, MR, B, NR, c);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS_OF_CHAINS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            if (!first) c[i][j] = sums[i][j] + c[i][j];
            sums[i][j] = c[i][j];
        }
}

/* The finished chains are added in order.  `chain` must be a literal: a loop of unknown length would cost a tenth. */
INLINE void sums_over_rows(const int pairs, const int chain, int units, const float *A, const float *B, Late *late,
                           float *S, double *D, float *c, int rows, Ahead *ahead) {
    for (int i0 = 0; i0 < MR; i0 += ROWS_OF_CHAINS, A += ROWS_OF_CHAINS) {
        vf sums[8][4];
        int k = chain;
        fetch_ahead(ahead);
        if (units >= chain) one_chain(pairs, 1, chain, A, B, sums);
        else one_chain(pairs, 1, units, A, B, sums);
        for (; k + chain <= units; k += chain) {
            add_late(late, LATE_A_CHAIN);
            fetch_ahead(ahead);
            one_chain(pairs, 0, chain, A + k * MR, B + k * NR, sums);
        }
        if (k < units) one_chain(pairs, 0, units - k, A + k * MR, B + k * NR, sums);
        add_late(late, HALF_TILE);
        if (!late->to.n && !late->to.last) {
            store_half_tile(S + i0 * NR, sums);
            continue;
        }
        store_half_tile(late->x, sums);
        late->to.S = S + i0 * NR, late->to.D = D + i0 * NR;
        late->to.c = c + i0 * late->to.row, late->to.rows = rows - i0, late->added = 0;
    }
}

/* A chain is ROW_CHAIN units of the contract: where a pair of bf16 is held as two fp32, twice as many steps. */
static __attribute__((noinline)) void sums_over_rows_fp32(int units, const float *A, const float *B, Late *late,
                                                          float *S, double *D, float *c, int rows, Ahead *ahead) {
    sums_over_rows(0, ROW_CHAIN, units, A, B, late, S, D, c, rows, ahead);
}
static __attribute__((noinline)) void sums_over_rows_bf16(int units, const float *A, const float *B, Late *late,
                                                          float *S, double *D, float *c, int rows, Ahead *ahead) {
    sums_over_rows(HAVE_PAIRS, HAVE_PAIRS ? ROW_CHAIN : 2 * ROW_CHAIN, units, A, B, late, S, D, c, rows, ahead);
}

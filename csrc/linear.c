/* linear.c -- the three products of a linear layer as one packed matrix multiplication.
 *
 *   C (M, N) = A (M, K) @ B (K, N)
 *     forward           out     = in     @ weight^T     M = rows, N = OC, K = C
 *     backward_input    din     = dout   @ weight       M = rows, N = C,  K = OC
 *     backward_weight   dweight = dout^T @ in           M = OC,   N = C,  K = rows
 *
 * Packing, blocking, edges and threads are this portable text; the arithmetic is `tile` (tile.h).  A panel of B, one
 * K block deep and NR wide, is packed into L1/L2 and used at once for all rows of a block.  The finished sums of a
 * block wait in scratch (S), so that every element of C is written once, by the epilogue, whatever it adds.
 * Rows of A are packed just before the first panel of B meets them, so that their lines can be fetched while the tiles
 * before are multiplied.  A is read as it lies where it can be (fp32, k contiguous): packing it would gain nothing.
 * bf16 is rounded while packing: two values a 32-bit unit where the CPU multiplies pairs, else one a unit, held as
 * fp32.  Operands are read once each per block of the other: bound by arithmetic from about 100 rows on.
 *
 * A weight that many products read is packed once (linear_pack): all of its panels, one behind the other, in the order
 * in which they are read.  A product of few rows is then one pass over them at the speed of memory. */
#include "held.h"
#include "linear_pack.h"
#include "linear_tile.h"
#include "threads.h"

enum { MC = 64 * MR, PACKED_A_UNITS = 16 << 20 };
/* Rows of A that are packed together: a vector of whole panels, or a panel of whole vectors; and how often that, where
 * rows lie side by side. */
enum {
    ROWS_PACKED = W / MR ? W / MR * MR : MR,
    VECTORS_PACKED = W / MR ? 1 : MR / W,
    SIDE_BY_SIDE = 2 * MR == W ? 4 : 1
};
_Static_assert(ROWS_PACKED % MR == 0 && ROWS_PACKED <= VECTORS_PACKED * W, "whole panels out of whole vectors");
/* From so many units of A on K is cut; units of A in a piece, half of an L2 cache; and floats of the sums that wait. */
enum { LONG_A = 1 << 20, PIECE_OF_A = 128 << 10, SUMS = 2 << 20 };
/* From so many floats of a gradient on, the size of two L2 caches, it is written past them: it is not read before all
 * others are there. */
enum { STREAMED = 1 << 19 };

typedef struct {
    int M, N, K;
    const float *a; /* element (i, k) of A at a[i * a_i + k * a_k] */
    int64_t a_i, a_k;
    const void *b; /* rows of so many values, held so: row j is column j of B where k runs along them, else row k */
    int b_row, held, k_along;
    const void *packed; /* or all of B, packed before */
    const float *rows;  /* or all of A, packed before, for few rows */
    int prec;
    int over_rows;      /* K are the rows of a batch: short chains, and blocks added in double */
    int grid_m, grid_n; /* tasks along M and N */
    Epilogue end;
    int accumulate, streams; /* over rows: add to what C holds; write past the caches, for C is too large for them */
    float *row_sums;         /* (M) += sums of A over k: A must lie with i contiguous */
} Gemm;

static int pairs_of(const Gemm *g) { return g->prec == PREC_BF16 && HAVE_PAIRS; }
static int values_a_unit(const Gemm *g) { return pairs_of(g) ? 2 : 1; }
static int values_of_units(const Gemm *g, int units) { return units * (g->prec == PREC_BF16 ? 2 : 1); }
static int chain_units(const Gemm *g) { return values_of_units(g, ROW_CHAIN) / values_a_unit(g); }
static int values_a_block(const Gemm *g) { return values_of_units(g, g->over_rows ? ROW_BLOCK : K_BLOCK); }
static int packs_a(const Gemm *g) {
    return LANE_OPERANDS || g->prec == PREC_BF16 || g->a_k != 1 || g->over_rows || g->rows;
}
static int units_of_values(const Gemm *g, int values) { return (values + values_a_unit(g) - 1) / values_a_unit(g); }

/* ---- packing ----------------------------------------------------------------------------------------------------- */

enum { BLOCK_OF_B = 2 * K_BLOCK * NR };

/* `space`: BLOCK_OF_B floats for a block of B that is held otherwise than as floats. */
static __attribute__((noinline)) void pack_b(float *out, float *space, const Gemm *g, int j, int k, int values) {
    const int columns = min_int(NR, g->N - j);
    const float *p = (const float *)held_at(g->b, PREC_FP32, g->b_row, g->k_along ? j : k, g->k_along ? k : j);
    int64_t row = g->b_row;
    if (g->held != PREC_FP32) {
        row = g->k_along ? values_a_block(g) : NR;
        for (int r = 0; r < (g->k_along ? columns : values); r++)
            CAT(held_part, ISA)(space + r * row, g->b, g->held, g->b_row, (g->k_along ? j : k) + r, g->k_along ? k : j,
                                g->k_along ? values : columns);
        p = space;
    }
    if (g->k_along) pack_along(out, NR, 0, p, row, columns, values, values_a_unit(g), g->prec);
    else pack_across(out, NR, 0, NV, W, p, row, columns, values, values_a_unit(g), g->prec, NULL, values);
}

INLINE void pack_columns_of_a(float *out, int64_t panel, const int times, const Gemm *g, int i, int k, int values,
                              double *sums, int chain) {
    const int rows = min_int(times * ROWS_PACKED, g->M - i);
    const int64_t apart = W / MR ? W / MR * panel : W;
    pack_across(out, MR, panel, times * VECTORS_PACKED, apart, g->a + i + k * g->a_k, g->a_k, rows, values,
                values_a_unit(g), g->prec, sums, chain);
}

/* `times` ROWS_PACKED rows of A, 1 or SIDE_BY_SIDE, as panels that lie `panel` apart. */
static __attribute__((noinline)) void pack_a(float *out, int64_t panel, int times, const Gemm *g, int i, int k,
                                             int values, double *sums) {
    const int chain = values_of_units(g, ROW_CHAIN), rows = min_int(ROWS_PACKED, g->M - i);
    if (g->a_i != 1)
        pack_along(out, MR, panel, g->a + i * g->a_i + k * g->a_k, g->a_i, rows, values, values_a_unit(g), g->prec);
    else if (times > 1 && sums) pack_columns_of_a(out, panel, SIDE_BY_SIDE, g, i, k, values, sums, chain);
    else if (times > 1) pack_columns_of_a(out, panel, SIDE_BY_SIDE, g, i, k, values, NULL, values);
    else if (sums) pack_columns_of_a(out, panel, 1, g, i, k, values, sums, chain);
    else pack_columns_of_a(out, panel, 1, g, i, k, values, NULL, values);
}

/* ---- all of B, packed once ----------------------------------------------------------------------------------------
 */

/* Where bf16 is multiplied as fp32, a packed value takes 2 bytes, and is unfolded when it is used. */
static int folded(int prec) { return prec == PREC_BF16 && !HAVE_PAIRS; }
static int64_t units_of(int C, int prec) { return prec == PREC_BF16 && HAVE_PAIRS ? ((int64_t)C + 1) / 2 : C; }
static int64_t panel_bytes(int C, int prec) { return units_of(C, prec) * NR * (folded(prec) ? 2 : 4); }

static void pack_panel(void *context, int panel) {
    const Gemm *g = context;
    char *out = (char *)g->end.c + panel * panel_bytes(g->K, g->prec);
    float *units = folded(g->prec) ? scratch(SCRATCH_TASK) : NULL;
    for (int k = 0, block = values_a_block(g); k < g->K; k += block) {
        int values = min_int(block, g->K - k);
        if (!folded(g->prec)) {
            pack_b((float *)out + (int64_t)(k / values_a_unit(g)) * NR, NULL, g, panel * NR, k, values);
            continue;
        }
        pack_b(units, NULL, g, panel * NR, k, values);
        for (int i = 0; i < values * NR; i += W)
            vstore_bf16((uint16_t *)out + (int64_t)k * NR + i, vload_all(units + i));
    }
}

int64_t CAT(packed_bytes, ISA)(int prec, int C, int OC) {
    return prec == PREC_INT8 ? CAT(int8_bytes, ISA)(C, OC) : (OC + NR - 1) / NR * panel_bytes(C, prec);
}

void CAT(linear_pack, ISA)(void *packed, const float *weight, int prec, int C, int OC) {
    if (prec == PREC_INT8) {
        CAT(int8_pack, ISA)(packed, weight, C, OC);
        return;
    }
    Gemm g = {.N = OC, .K = C, .b = weight, .b_row = C, .k_along = 1, .end = {.c = packed}, .prec = prec};
    parallel_for(pack_panel, &g, (OC + NR - 1) / NR);
}

_Static_assert(PACK_ROWS % NR == 0, "a weight is cut between panels");

/* A row lies across its panel, so that this reads a cache line a value: it is for embeddings, not for products. */
void CAT(packed_row, ISA)(float *out, const void *packed, int prec, int C, int o) {
    const char *panel = (const char *)packed + o / NR * panel_bytes(C, prec);
    const float *f = (const float *)panel + o % NR;
    const uint16_t *single = (const uint16_t *)panel + o % NR, *pair = (const uint16_t *)panel + o % NR * 2;
    if (prec == PREC_INT8) {
        CAT(int8_row, ISA)(out, packed, C, o);
        return;
    }
    for (int64_t c = 0; c < C; c++)
        out[c] = prec == PREC_FP32 ? f[c * NR]
                 : folded(prec)    ? from_bf16(single[c * NR])
                                   : from_bf16(pair[c / 2 * NR * 2 + c % 2]);
}

/* One block of the panel that begins at column j, ready to be multiplied: where it lies, or in `space`. */
static const float *packed_block(const Gemm *g, int j, int k, int values, float *space) {
    const char *panel = (const char *)g->packed + j / NR * panel_bytes(g->K, g->prec);
    if (!folded(g->prec)) return (const float *)panel + (int64_t)(k / values_a_unit(g)) * NR;
    const uint16_t *p = (const uint16_t *)panel + (int64_t)k * NR;
    for (int i = 0; i < values * NR; i += W) vstore_all(space + i, vload_bf16(p + i));
    return space;
}

/* ---- blocks ------------------------------------------------------------------------------------------------------ */

/* What a task has at hand: of its rows of A, up to m1, i0 .. i1 - 1 over the values k0 .. k1 - 1 of K, and its columns.
 */
typedef struct {
    int m1, i0, i1, k0, k1, j0, j1;
    float *S, *b, *unfolded, *a; /* [panels][rows][NR], a block of B, the same before packing, packed rows of A */
    double *D;                   /* [MC][NR]: sums of finished blocks, over rows, from the second on */
    double *row_sums;            /* [rows]: of A over k; or NULL */
    Late *late;
    Ahead *ahead;
} Work;

static Work work_of_task(void) {
    Work w = {.b = scratch(SCRATCH_TASK)};
    w.unfolded = w.b + BLOCK_OF_B; /* where bf16 is held as fp32, a K block has 512 units */
    w.D = (double *)(w.unfolded + BLOCK_OF_B);
    w.row_sums = w.D + MC * NR;
    w.S = (float *)(w.row_sums + MC + W); /* packing adds nothing to as many behind them as fill a vector */
    w.late = (Late *)(w.S + SUMS);
    w.late->added = HALF_TILE;
    w.a = (float *)(w.late + 1);
    return w;
}

/* Where K is so long that the rows of A leave the cache, K is cut, and each piece of A meets all columns while the sums
 * of all columns wait, if that many can.  Returns the values of a piece: K, or a multiple of the block. */
static int piece_of_k(const Gemm *g, int64_t rows, int64_t columns) {
    int block = values_a_block(g);
    int64_t units = g->K / values_a_unit(g), fit = PIECE_OF_A / (rows * block / values_a_unit(g));
    if (g->over_rows || g->packed || units * rows < LONG_A || rows * columns > SUMS) return g->K;
    return fit < 1 ? block : (int)fit * block;
}

/* Rows of one block: fewer where K is very long, so that the packed rows stay within the scratch. */
static int block_rows(const Gemm *g) {
    if (!packs_a(g)) return MC;
    int64_t fit = PACKED_A_UNITS / (g->K / values_a_unit(g) + 1) / MR * MR;
    return fit < MR ? MR : fit > MC ? MC : (int)fit;
}

/* The packed panel of the rows from i on in the K block at k.  The blocks lie one behind the other, in each its panels,
 * so that the tiles of a column read one stream. */
static float *panel_of_a(const Gemm *g, const Work *w, int i, int k) {
    int rows = (w->i1 - w->i0 + ROWS_PACKED - 1) / ROWS_PACKED * ROWS_PACKED;
    int units = units_of_values(g, min_int(values_a_block(g), w->k1 - k));
    return w->a + (int64_t)units_of_values(g, k - w->k0) * rows + (int64_t)(i - w->i0) * units;
}

/* Rows i and on of A, before `end`, that are packed together.  Where values of neighbouring rows follow each other in
 * memory it is several vectors of them: where those of a row lie a multiple of 4 KB apart, as in GPT-2's MLP, they
 * share one place of the cache, and a line would leave it before all of it is read. */
static int times_of_strip(const Gemm *g, int i, int end) {
    return g->a_i == 1 && i + SIDE_BY_SIDE * ROWS_PACKED <= end ? SIDE_BY_SIDE : 1;
}

/* Packs the rows from i on that are packed together, in the K block at k.  Returns where the next ones begin. */
static int pack_strip(const Gemm *g, const Work *w, int i, int k) {
    int values = min_int(values_a_block(g), w->k1 - k), times = times_of_strip(g, i, w->i1);
    double *sums = w->row_sums ? w->row_sums + (i - w->i0) : NULL;
    pack_a(panel_of_a(g, w, i, k), (int64_t)units_of_values(g, values) * MR, times, g, i, k, values, sums);
    return i + times * ROWS_PACKED;
}

static void pack_rows(const Gemm *g, const Work *w) {
    for (int k = 0; k < w->k1; k += values_a_block(g))
        for (int i = 0; i < w->i1;) i = pack_strip(g, w, i, k);
}

/* While columns j are multiplied and the strip is packed that ends at i, in the K block at k: where the next one to be
 * packed begins.  Returns 0 where there is none as long as these columns last. */
static int strip_behind(const Gemm *g, const Work *w, int j, int *i, int *k) {
    const int next = *k + values_a_block(g), first = j == w->j0;
    if (first && *i < w->i1) return 1;
    *i = w->i0;
    if (next < w->k1) {
        *k = next;
        return first;
    }
    if (j + NR < w->j1) return 0;
    if (w->k1 < g->K) *k = w->k1;
    else *k = 0, *i = w->i1;
    return *i < w->m1;
}

/* It is fetched within `times` times. */
static void fetch_strip(const Gemm *g, const Work *w, int j, int i, int k, int times) {
    if (!strip_behind(g, w, j, &i, &k)) return;
    int values = min_int(values_a_block(g), g->K - k),
        rows = min_int(times_of_strip(g, i, w->m1) * ROWS_PACKED, w->m1 - i);
    const float *p = g->a + i * g->a_i + k * g->a_k;
    if (g->a_i != 1) begin_stream(w->ahead, NEXT_A, p, values * 4, g->a_i * 4, rows, times);
    else begin_stream(w->ahead, NEXT_A, p, rows * 4, g->a_k * 4, values, times);
}

/* How often a tile of so many values fetches what comes next. */
static int fetches_of_tile(const Gemm *g, int values) {
    int units = units_of_values(g, values);
    return g->over_rows ? MR / ROWS_OF_CHAINS * units / chain_units(g) : units / STEPS_APART;
}

/* The sums of the tile of rows from i on over one K block, against one packed panel B, added to S. */
static void tile_sums(const Gemm *g, const Work *w, float *S, const float *B, int i, int k, int values) {
    int units = units_of_values(g, values), n = k / values_a_block(g);
    if (packs_a(g)) {
        const float *A = panel_of_a(g, w, i, k);
        int rows = min_int(MR, w->i1 - i);
        if (pairs_of(g)) sums_pairs(rows, units, A, B, S, n > 0, w->ahead);
        else sums_packed(rows, units, A, B, S, n > 0, w->ahead);
    } else if (i + MR <= g->M) {
        sums_direct(units, g->a + i * g->a_i + k, g->a_i, B, S, n > 0, w->ahead);
    } else { /* the last rows are fewer than a tile: reading them where they lie would leave the array */
        pack_a(w->a, values * MR, 1, g, i, k, values, NULL);
        sums_packed(MR, units, w->a, B, S, n > 0, w->ahead);
    }
}

/* The same over rows, to C where the block is the last. */
static void gradient_sums(const Gemm *g, const Work *w, float *S, const float *B, int i, int j, int k, int values) {
    const float *A = panel_of_a(g, w, i, k);
    double *D = w->D + (i - w->i0) * NR;
    float *c = g->end.c + (int64_t)i * g->N + j;
    int units = units_of_values(g, values);
    if (g->prec == PREC_BF16) sums_over_rows_bf16(units, A, B, w->late, S, D, c, w->i1 - i, w->ahead);
    else sums_over_rows_fp32(units, A, B, w->late, S, D, c, w->i1 - i, w->ahead);
}

static void fetch_block_of_b(const Gemm *g, const Work *w, int j, int k, int times) {
    int values = min_int(values_a_block(g), g->K - k), columns = min_int(NR, g->N - j);
    int row = g->k_along ? j : k, first = g->k_along ? k : j;
    int last = first + (g->k_along ? values : columns) - 1;
    const char *p = held_at(g->b, g->held, g->b_row, row, first);
    begin_stream(w->ahead, NEXT_B, p, held_at(g->b, g->held, g->b_row, row, last) - p + 4,
                 held_at(g->b, g->held, g->b_row, row + 1, first) - p, g->k_along ? columns : values, times);
}

/* What leaves the tile at i, j, and what its epilogue reads. */
static void begin_outputs(const Gemm *g, Ahead *a, int i, int j) {
    const Epilogue *e = &g->end;
    const float *arrays[OUTPUTS] = {g->streams ? NULL : e->c, e->pre, e->dpre, e->residual};
    int any = 0;
    for (int n = 0; n < OUTPUTS; n++) {
        a->out[n] = arrays[n] ? arrays[n] + (int64_t)i * g->N + j : NULL;
        any |= arrays[n] != NULL;
    }
    if (any) a->out_stride = g->N, a->out_rows = min_int(MR, g->M - i), a->left = 1;
}

static void finish_tile(const Gemm *g, const Work *w, const float *S, int i, int j, int columns) {
    for (int r = i; r < min_int(i + MR, w->i1); r++) finish_row(&g->end, g->N, S + (r - i) * NR, r, j, columns);
}

/* The block of B at j, k, whatever comes after it, and the rows at hand, which are packed on the way where it is the
 * first to meet them.  A tile is finished when its last block is, so that stores and functions overlap with the next
 * tile's products. */
static void multiply_block(const Gemm *g, const Work *w, float *S, int j, int k, int next_j, int next_k) {
    const int values = min_int(values_a_block(g), g->K - k), columns = min_int(NR, w->j1 - j);
    const int last = k + values == g->K;
    const int tiles = (w->i1 - w->i0 + MR - 1) / MR, times = fetches_of_tile(g, values);
    const int packs = packs_a(g) && !g->rows;
    const float *B = w->b;
    int packed = packs && j == w->j0 ? w->i0 : w->i1;
    if (g->packed) B = packed_block(g, j, k, values, w->b);
    else pack_b(w->b, w->unfolded, g, j, k, values);
    if (next_j >= 0 && !g->packed) fetch_block_of_b(g, w, next_j, next_k, tiles * times);
    if (g->over_rows)
        w->late->to = (Total){.n = k / values_a_block(g),
                              .last = last,
                              .accumulate = g->accumulate,
                              .streams = g->streams,
                              .columns = columns,
                              .row = g->N};
    if (packs && j != w->j0) fetch_strip(g, w, j, w->i1, k, tiles * times);
    for (int i = w->i0; i < w->i1; i += MR, S += MR * NR) {
        if (i >= packed) {
            packed = pack_strip(g, w, i, k);
            fetch_strip(g, w, j, packed, k, (packed - i) / MR * times);
        }
        if (last) begin_outputs(g, w->ahead, i, j);
        if (g->over_rows) gradient_sums(g, w, S, B, i, j, k, values);
        else if (values) tile_sums(g, w, S, B, i, k, values);
        if (last && !g->over_rows) finish_tile(g, w, S, i, j, columns);
    }
    if (g->over_rows) add_late(w->late, HALF_TILE);
}

/* All columns of what is at hand.  Sums wait from one piece of K to the next, each panel's in its place. */
static void multiply_columns(const Gemm *g, const Work *w) {
    const int block = values_a_block(g), rows = (w->i1 - w->i0 + MR - 1) / MR * MR, whole = w->k1 - w->k0 == g->K;
    if (!g->K) memset(w->S, 0, (size_t)rows * NR * sizeof(float));
    for (int j = w->j0; j < w->j1; j += NR) {
        float *S = w->S + (whole ? 0 : (int64_t)(j - w->j0) / NR * rows * NR);
        int k = w->k0;
        do {
            int more = k + block < w->k1, next_j = more ? j : j + NR < w->j1 ? j + NR : -1;
            multiply_block(g, w, S, j, k, next_j, more ? k + block : w->k0);
            k += block;
        } while (k < w->k1);
    }
}

/* The rows at hand, all of K and the task's columns. */
static void multiply_rows(const Gemm *g, Work *w) {
    int panels = (w->j1 - w->j0 + NR - 1) / NR, tiles = (w->i1 - w->i0 + MR - 1) / MR;
    int piece = piece_of_k(g, tiles * MR, panels * NR);
    if (w->row_sums) memset(w->row_sums, 0, (MC + W) * sizeof *w->row_sums);
    w->k1 = 0;
    do {
        w->k0 = w->k1, w->k1 = min_int(w->k0 + piece, g->K);
        multiply_columns(g, w);
    } while (w->k1 < g->K);
    for (int i = w->i0; w->row_sums && i < w->i1; i++) g->row_sums[i] += (float)w->row_sums[i - w->i0];
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

/* Where part p of `parts` begins, in multiples of `step`. */
static int part_begin(int size, int step, int parts, int p) {
    int64_t steps = (size + step - 1) / step, begin = steps * p / parts * step;
    return begin < size ? (int)begin : size;
}

static void gemm_task(void *context, int task) {
    const Gemm *g = context;
    int tm = task / g->grid_n, tn = task % g->grid_n;
    int m0 = part_begin(g->M, MR, g->grid_m, tm), m1 = part_begin(g->M, MR, g->grid_m, tm + 1);
    int j0 = part_begin(g->N, NR, g->grid_n, tn), j1 = part_begin(g->N, NR, g->grid_n, tn + 1);
    if (m0 == m1 || j0 == j1) return; /* more parts than tiles; an empty part must not add row_sums either */
    int rows = block_rows(g);
    Ahead ahead = {.left = 0};
    Work w = work_of_task();
    w.j0 = j0, w.j1 = j1, w.m1 = m1, w.ahead = &ahead;
    if (!g->row_sums || j0) w.row_sums = NULL; /* one of the tasks that share the rows adds their sums */
    for (int i = m0; i < m1; i += rows) {
        w.i0 = i, w.i1 = min_int(i + rows, m1);
        if (g->rows) w.a = (float *)g->rows; /* there is one block of so few */
        multiply_rows(g, &w);
    }
    if (g->streams) stream_end();
}

/* Time of the slowest task for a grid, in multiply-adds a lane: the tiles, and packing, which is done again by every
 * task that shares the rows or columns (the weights are estimates: a transposed value costs about 3 vector operations
 * a lane, a straight one 1). */
static double grid_cost(const Gemm *g, int gm, int gn) {
    double rows = ((g->M + MR - 1) / MR + gm - 1) / gm * MR, columns = ((g->N + NR - 1) / NR + gn - 1) / gn * NR;
    double pack_b = g->packed ? 0 : (g->k_along ? 3 : 1) * columns * ceil(rows / block_rows(g));
    double pack_a = packs_a(g) ? (g->a_k == 1 ? 3 : 2) * rows : 0;
    return rows * columns + pack_b + pack_a;
}

/* ---- few rows against a packed weight ----------------------------------------------------------------------------
 *
 * The weight is read once, at the speed of memory, so the rows are packed before, once for all tasks, and tasks are
 * many, so that the threads end together. */

enum { FEW_ROWS = 64 };

static void pack_one_row(float *out, const Gemm *g) {
    for (int k = 0, per_unit = values_a_unit(g); k < g->K; k += W * per_unit) {
        int values = min_int(W * per_unit, g->K - k);
        vstore(out + k / per_unit, load_units_along_k(g->a + k, values, g->prec), (values + per_unit - 1) / per_unit);
    }
}

/* A single row, packed along k: its sums never leave the registers. */
INLINE void multiply_row(const int pairs, const Gemm *g, Work w, int j0, int j1) {
    const int block = values_a_block(g), per_unit = values_a_unit(g);
    for (int j = j0; j < j1; j += NR) {
        vf total[NV];
        fetch_bias(&g->end, g->N, j);
        for (int v = 0; v < NV; v++) total[v] = vset(0.0f);
        for (int k = 0; k < g->K; k += block) {
            vf sums[8][4];
            int values = min_int(block, g->K - k);
            const float *B = packed_block(g, j, k, values, w.b);
            tile_chain(1, NV, pairs, (values + per_unit - 1) / per_unit, g->rows + k / per_unit, 1, 1, B, NR, sums);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                if (k) sums[0][v] = total[v] + sums[0][v];
                total[v] = sums[0][v];
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) vstore_all(w.S + v * W, total[v]);
        finish_row(&g->end, g->N, w.S, 0, j, min_int(NR, j1 - j));
    }
}

static void row_task(void *context, int task) {
    const Gemm *g = context;
    int j0 = part_begin(g->N, NR, g->grid_n, task), j1 = part_begin(g->N, NR, g->grid_n, task + 1);
    if (pairs_of(g)) multiply_row(HAVE_PAIRS, g, work_of_task(), j0, j1);
    else multiply_row(0, g, work_of_task(), j0, j1);
}

static void gemm_of_few_rows(Gemm *g, int threads) {
    float *rows = scratch(SCRATCH_CALL);
    int single = g->M == 1 && g->K;
    g->rows = rows;
    if (single) pack_one_row(rows, g);
    else pack_rows(g, &(Work){.a = rows, .i1 = g->M, .k1 = g->K});
    g->grid_m = 1;
    g->grid_n = min_int((g->N + NR - 1) / NR, threads * TASKS_A_THREAD);
    parallel_for(single ? row_task : gemm_task, g, g->grid_n);
}

/* Any grid gives the same bits; take the cheapest for this many threads. */
static void gemm(Gemm *g) {
    if (!g->M || !g->N) return;
    int threads = threads_get();
    double small = (double)g->M * g->N * g->K;
    if (small < 2e5) threads = 1; /* less than the time it takes to wake a thread */
    if (g->packed && g->M <= FEW_ROWS) {
        gemm_of_few_rows(g, threads);
        return;
    }
    double best = INFINITY;
    for (int gm = 1; gm <= threads; gm++) {
        double cost = grid_cost(g, gm, threads / gm);
        if (cost < best) best = cost, g->grid_m = gm, g->grid_n = threads / gm;
    }
    parallel_for(gemm_task, g, g->grid_m * g->grid_n);
}

/* ---- the operators ----------------------------------------------------------------------------------------------- */

void CAT(linear_forward, ISA)(float *out, float *pre, const float *in, const void *weight, int held, const float *bias,
                              const float *residual, int fn, int prec, int N, int C, int OC) {
    Gemm g = {.M = N,
              .N = OC,
              .K = C,
              .a = in,
              .a_i = C,
              .a_k = 1,
              .b = weight,
              .b_row = C,
              .held = held,
              .k_along = 1,
              .prec = prec,
              .end = {.c = out, .bias = bias, .pre = pre, .fn = fn, .residual = residual}};
    gemm(&g);
}

void CAT(linear_packed, ISA)(float *out, const float *in, const void *packed, const float *bias, const float *residual,
                             int fn, int prec, int N, int C, int OC) {
    Epilogue end = {.c = out, .bias = bias, .fn = fn, .residual = residual};
    if (prec == PREC_INT8) {
        CAT(int8_product, ISA)(&end, in, packed, N, C, OC);
        return;
    }
    Gemm g = {.M = N, .N = OC, .K = C, .a = in, .a_i = C, .a_k = 1, .packed = packed, .prec = prec, .end = end};
    gemm(&g);
}

/* A product here packs its rows: to read them from a norm costs nothing that would be seen. */
void CAT(norm_linear_packed, ISA)(float *out, float *normed, float *moments, const float *in, int norm,
                                  const float *gain, const float *shift, float eps, const void *packed,
                                  const float *bias, int fn, int prec, int N, int C, int OC) {
    if (norm == NORM_LAYERNORM) CAT(layernorm_forward, ISA)(normed, moments, moments + N, in, gain, shift, eps, N, C);
    else CAT(rmsnorm_forward, ISA)(normed, moments, in, gain, eps, N, C);
    CAT(linear_packed, ISA)(out, normed, packed, bias, NULL, fn, prec, N, C, OC);
}

void CAT(linear_backward_input, ISA)(float *din, const float *dout, const float *dres, const void *weight, int held,
                                     const float *pre, int fn, int prec, int N, int C, int OC) {
    Gemm g = {.M = N,
              .N = C,
              .K = OC,
              .a = dout,
              .a_i = OC,
              .a_k = 1,
              .b = weight,
              .b_row = C,
              .held = held,
              .prec = prec,
              .end = {.c = din, .fn = fn, .dpre = fn == FN_NONE ? NULL : pre, .residual = dres}};
    gemm(&g);
}

void CAT(linear_backward_weight, ISA)(float *dweight, float *dbias, const float *dout, const float *in, int accumulate,
                                      int prec, int N, int C, int OC) {
    const int aligned = (uintptr_t)dweight % 64 == 0 && C % 16 == 0, large = (int64_t)OC * C >= STREAMED;
    Gemm g = {.M = OC,
              .N = C,
              .K = N,
              .a = dout,
              .a_i = 1,
              .a_k = OC,
              .b = in,
              .b_row = C,
              .prec = prec,
              .over_rows = 1,
              .end = {.c = dweight},
              .accumulate = accumulate,
              .streams = !accumulate && aligned && large,
              .row_sums = dbias};
    gemm(&g);
}

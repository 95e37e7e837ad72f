/* embedding.c -- rows of the token and position tables: looked up forward, scattered back.
 *
 * Backward, the rows of one token are a linked list through scratch (V + 2 N ints), built in one pass over the tokens.
 * A task takes whole tokens and sums each list in registers, in double: there is no dense gradient to clear, nothing is
 * added atomically, and the order of the sum is that of (b, t).  Bound by memory: dout is read once. */
#include "held.h"
#include "linear.h"
#include "threads.h"

static int position(const int32_t *starts, int n, int T) { return n % T - (starts ? starts[n] : 0); }

typedef struct {
    float *out;
    const int32_t *tokens, *starts;
    const void *wte;    /* held in `prec` */
    const void *packed; /* or as linear_pack has packed it in `prec` */
    const float *wpe;
    int prec, N, T, C, rows;
} Forward;

static void forward(void *context, int task) {
    const Forward *f = context;
    const int C = f->C, end = min_int(f->N, (task + 1) * f->rows);
    for (int n = task * f->rows; n < end; n++) {
        const float *wpe_p = f->wpe ? f->wpe + (int64_t)position(f->starts, n, f->T) * C : NULL;
        float *out = f->out + (int64_t)n * C;
        const float *wte_v = out;
        if (f->packed) CAT(packed_row, ISA)(out, f->packed, f->prec, C, f->tokens[n]);
        else if (f->prec == PREC_FP32) wte_v = (const float *)f->wte + (int64_t)f->tokens[n] * C;
        else CAT(held_part, ISA)(out, f->wte, f->prec, C, f->tokens[n], 0, C);
        for (int c = 0; c < C; c += W) {
            int k = min_int(W, C - c);
            vf x = vload(wte_v + c, k);
            if (wpe_p) x = x + vload(wpe_p + c, k);
            vstore(out + c, x, k);
        }
    }
}

void CAT(embedding_forward, ISA)(float *out, const int32_t *tokens, const int32_t *starts, const void *wte, int held,
                                 const float *wpe, int B, int T, int C) {
    Forward f = {.out = out, .tokens = tokens, .starts = starts, .wpe = wpe, .N = B * T, .T = T, .C = C};
    f.wte = wte, f.prec = held, f.rows = rows_per_task(C);
    parallel_for(forward, &f, tasks_for(f.N, f.rows));
}

void CAT(embedding_packed, ISA)(float *out, const int32_t *tokens, const int32_t *starts, const void *packed,
                                const float *wpe, int prec, int B, int T, int C) {
    Forward f = {.out = out, .tokens = tokens, .starts = starts, .wpe = wpe, .N = B * T, .T = T, .C = C};
    f.packed = packed, f.prec = prec, f.rows = rows_per_task((int64_t)C * W); /* a value is a cache line */
    parallel_for(forward, &f, tasks_for(f.N, f.rows));
}

/* ---- backward ---- */

typedef struct {
    float *dtable;
    const float *dout;
    int32_t *first; /* (rows of dtable) first row of dout that belongs here, or -1 */
    int32_t *next;  /* (N) the next one of the same row of dtable, or -1 */
    int32_t *used;  /* (count) rows of dtable that have any */
    int C, count, rows;
} Scatter;

/* Channels c .. of one row of dtable: NV whole vectors, or NV = 1 and k lanes of it. */
INLINE void add_list(const Scatter *s, int r, int c, const int NV, int k) {
    vd low[4], high[4];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) low[j] = high[j] = vdset(0.0);
    for (int n = s->first[r]; n >= 0; n = s->next[n])
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            vf x = vload(s->dout + (int64_t)n * s->C + c + j * W, k);
            low[j] = low[j] + vdlow(x), high[j] = high[j] + vdhigh(x);
        }
    float *d = s->dtable + (int64_t)r * s->C + c;
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) vstore(d + j * W, vload(d + j * W, k) + vdround(low[j], high[j]), k);
}

static void add_lists(void *context, int task) {
    const Scatter *s = context;
    const int end = min_int(s->count, (task + 1) * s->rows);
    for (int u = task * s->rows; u < end; u++) {
        int c = 0;
        for (; c + 4 * W <= s->C; c += 4 * W) add_list(s, s->used[u], c, 4, W);
        for (; c < s->C; c += W) add_list(s, s->used[u], c, 1, min_int(W, s->C - c));
    }
}

/* Called for the last row first, so that each list runs in rising order. */
static void link_row(Scatter *s, int n, int r) {
    s->next[n] = s->first[r];
    if (s->first[r] < 0) s->used[s->count++] = r;
    s->first[r] = n;
}

static void clear_lists(Scatter *s, int table_rows) {
    s->count = 0;
    for (int r = 0; r < table_rows; r++) s->first[r] = -1;
}

void CAT(embedding_backward, ISA)(float *dwte, float *dwpe, const float *dout, const int32_t *tokens,
                                  const int32_t *starts, int B, int T, int C, int V) {
    const int N = B * T;
    int32_t *memory = scratch(SCRATCH_CALL);
    Scatter s = {.dout = dout, .next = memory, .used = memory + N, .first = memory + 2 * (int64_t)N, .C = C};
    s.rows = rows_per_task(C);

    s.dtable = dwte;
    clear_lists(&s, V);
    for (int n = N - 1; n >= 0; n--) link_row(&s, n, tokens[n]);
    parallel_for(add_lists, &s, tasks_for(s.count, s.rows));
    if (!dwpe) return;

    s.dtable = dwpe;
    clear_lists(&s, T);
    for (int n = N - 1; n >= 0; n--) link_row(&s, n, position(starts, n, T));
    parallel_for(add_lists, &s, tasks_for(s.count, s.rows));
}

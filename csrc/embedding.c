/* embedding.c -- rows of the token and position tables: looked up forward, scattered back.
 *
 * Backward, the rows are sorted by their token in scratch (V + 3 N ints).  A task takes whole tokens and sums the rows
 * of each in double: there is no dense gradient to clear, nothing is added atomically, and the order of the sum is that
 * of (b, t).  Bound by memory: dout is read once for each table. */
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
    int prec, N, T, C, rows, streams;
} Forward;

static void forward(void *context, int task) {
    const Forward *f = context;
    const int C = f->C, end = min_int(f->N, (task + 1) * f->rows);
    for (int n = task * f->rows; n < end; n++) {
        const float *wpe_p = f->wpe ? f->wpe + (int64_t)position(f->starts, n, f->T) * C : NULL;
        float *out = f->out + (int64_t)n * C;
        const float *wte_v = out, *ahead = NULL, *next = NULL;
        if (f->packed) CAT(packed_row, ISA)(out, f->packed, f->prec, C, f->tokens[n]);
        else if (f->prec == PREC_FP32) {
            wte_v = (const float *)f->wte + (int64_t)f->tokens[n] * C;
            ahead = (const float *)f->wte + (int64_t)f->tokens[min_int(n + ROWS_AHEAD, f->N - 1)] * C;
            if (f->streams) next = (const float *)f->wte + (int64_t)f->tokens[min_int(n + 1, f->N - 1)] * C;
        } else CAT(held_part, ISA)(out, f->wte, f->prec, C, f->tokens[n], 0, C);
        for (int c = 0; c < C; c += W) {
            int k = min_int(W, C - c);
            vf x = vload(wte_v + c, k);
            if (ahead) fetch(ahead + c);
            if (next) fetch_near(next + c);
            if (wpe_p) x = x + vload(wpe_p + c, k);
            vput(out + c, x, k, f->streams);
        }
    }
    if (f->streams) stream_end();
}

void CAT(embedding_forward, ISA)(float *out, const int32_t *tokens, const int32_t *starts, const void *wte, int held,
                                 const float *wpe, int B, int T, int C) {
    Forward f = {.out = out, .tokens = tokens, .starts = starts, .wpe = wpe, .N = B * T, .T = T, .C = C};
    f.wte = wte, f.prec = held, f.rows = rows_per_task(C), f.streams = held == PREC_FP32 && streams(out, f.N, C);
    parallel_for(forward, &f, tasks_for(f.N, f.rows));
}

void CAT(embedding_packed, ISA)(float *out, const int32_t *tokens, const int32_t *starts, const void *packed,
                                const float *wpe, int prec, int B, int T, int C) {
    Forward f = {.out = out, .tokens = tokens, .starts = starts, .wpe = wpe, .N = B * T, .T = T, .C = C};
    f.packed = packed, f.prec = prec, f.rows = rows_per_task((int64_t)C * W); /* a value is a cache line */
    parallel_for(forward, &f, tasks_for(f.N, f.rows));
}

/* ---- backward ---- */

/* The rows of dout ordered by the row of dtable to which they belong: those of rows[u] are order[begin[u]] to
 * order[begin[u + 1] - 1], in rising order. */
typedef struct {
    float *dtable;
    const float *dout;
    int32_t *at; /* (rows of dtable) how many rows of dout belong here, then where the next one goes */
    int32_t *order, *rows, *begin;
    int C, count, at_once, from_memory;
} Scatter;

/* What is fetched while a row is added, for rows lie anywhere and memory would wait for each. */
typedef struct {
    const float *ahead;  /* a later row of dout */
    const float *next;   /* the next one, from L2; or NULL */
    const float *behind; /* of dtable; or NULL */
} Fetched;

/* One row of dout joins `sums`; the last of a list takes them to its row of dtable. */
INLINE void add_row(double *sums, float *d, const float *row, const Fetched *fetched, int C, const int first,
                    const int last) {
    const float *ahead = fetched->ahead, *next = fetched->next, *behind = fetched->behind;
    for (int c = 0; c < C; c += W) {
        const int k = min_int(W, C - c);
        const vf x = vload(row + c, k);
        vd low = first ? vdset(0.0) : vdload(sums + c), high = first ? vdset(0.0) : vdload(sums + c + W / 2);
        fetch(ahead + c);
        if (next) fetch_near(next + c);
        if (behind) fetch(behind + c);
        low = low + vdlow(x), high = high + vdhigh(x);
        if (last) vstore(d + c, vload(d + c, k) + vdround(low, high), k);
        else vdstore(sums + c, low), vdstore(sums + c + W / 2, high);
    }
}

static void add_list(const Scatter *s, int u, const float *behind, double *sums) {
    const int C = s->C, begin = s->begin[u], end = s->begin[u + 1], all = s->begin[s->count];
    float *d = s->dtable + (int64_t)s->rows[u] * C;
    for (int i = begin; i < end; i++) {
        const int first = i == begin, last = i + 1 == end;
        const float *row = s->dout + (int64_t)s->order[i] * C;
        Fetched fetched = {.ahead = s->dout + (int64_t)s->order[min_int(i + ROWS_AHEAD, all - 1)] * C};
        if (s->from_memory) fetched.next = s->dout + (int64_t)s->order[min_int(i + 1, all - 1)] * C;
        if (first) fetched.behind = behind;
        if (first && last) add_row(sums, d, row, &fetched, C, 1, 1);
        else if (first) add_row(sums, d, row, &fetched, C, 1, 0);
        else if (last) add_row(sums, d, row, &fetched, C, 0, 1);
        else add_row(sums, d, row, &fetched, C, 0, 0);
    }
}

static void add_lists(void *context, int task) {
    const Scatter *s = context;
    const int end = min_int(s->count, (task + 1) * s->at_once);
    for (int u = task * s->at_once; u < end; u++)
        add_list(s, u, s->dtable + (int64_t)s->rows[min_int(u + ROWS_AHEAD, s->count - 1)] * s->C,
                 scratch(SCRATCH_TASK));
}

static int table_row(const int32_t *tokens, const int32_t *starts, int n, int T) {
    return tokens ? tokens[n] : position(starts, n, T);
}

/* dtable[r] += the rows of dout that belong to r: those of its token or, without tokens, position. */
static void scatter(Scatter *s, const int32_t *tokens, const int32_t *starts, int N, int T, int table_rows) {
    s->count = 0;
    memset(s->at, 0, (size_t)table_rows * sizeof *s->at);
    for (int n = 0; n < N; n++) {
        int r = table_row(tokens, starts, n, T);
        if (!s->at[r]++) s->rows[s->count++] = r;
    }
    s->begin[0] = 0;
    for (int u = 0; u < s->count; u++) {
        s->begin[u + 1] = s->begin[u] + s->at[s->rows[u]];
        s->at[s->rows[u]] = s->begin[u];
    }
    for (int n = 0; n < N; n++) s->order[s->at[table_row(tokens, starts, n, T)]++] = n;
    parallel_for(add_lists, s, tasks_for(s->count, s->at_once));
}

void CAT(embedding_backward, ISA)(float *dwte, float *dwpe, const float *dout, const int32_t *tokens,
                                  const int32_t *starts, int B, int T, int C, int V) {
    const int N = B * T;
    int32_t *memory = scratch(SCRATCH_CALL);
    Scatter s = {.dtable = dwte, .dout = dout, .C = C, .at_once = rows_per_task(C)};
    s.from_memory = beyond_caches(N, C);
    s.order = memory, s.rows = s.order + N, s.begin = s.rows + N, s.at = s.begin + N + 1;
    scatter(&s, tokens, starts, N, T, V);
    s.dtable = dwpe;
    if (dwpe) scatter(&s, NULL, starts, N, T, T);
}

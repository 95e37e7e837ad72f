/* session.c -- one pass of new tokens through the layers, over the pages that their rows have, and what becomes of the
 * last ones.  As model.c it does no arithmetic on numbers of the model: it walks the layers through the operator table.
 * Its weights are weights.c's, its rows and pages cache.c's. */
#include "session.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cache.h"
#include "repeat.h"
#include "status.h"
#include "weights.h"

/* Tokens that go through the layers at a time: the activations of a long prompt stay within a few MB. */
enum { SLICE = 512 };

/* What one slice of tokens needs, in an arena that grows. */
typedef struct {
    int32_t *tokens, *starts, *first, *past, *table; /* starts: so that t - starts is the position */
    act *x, *norm, *qkv, *att, *mid, *fc, *fch, *low;
    float *moments; /* of norms, 2 N */
} Slice;

struct Session {
    Config c;
    const Ops *ops;
    Weights weights;
    int64_t version; /* of the weights */
    Cache cache;
    float *cos, *sin;

    char *arena, *head; /* of a slice; of the rows' last tokens: residual, norm, logits, ... */
    int64_t arena_bytes, head_bytes;
    int R;           /* rows of the last step */
    Repeats repeats; /* slices: until arrays they use are freed, or weights or an adapter come from elsewhere */
    int (*poll)(void);
    char error[ERROR_ROOM];
};

const char *session_error(const Session *s) { return s->error; }
void session_set_poll(Session *s, int (*poll)(void)) { s->poll = poll; }

/* ---- life -------------------------------------------------------------------------------------------------------- */

SessionMemory session_memory(const Config *c, const Ops *ops, int prec, int pages) {
    SessionMemory memory = {.cache = cache_bytes(c, ops, prec, pages)};
    weights_bytes(c, ops, prec, &memory.packed, &memory.plain);
    return memory;
}

Session *session_create(const Config *c, const Ops *ops, int prec, int pages, char *error, int size) {
    Session *s = calloc(1, sizeof *s);
    if (!s) {
        snprintf(error, (size_t)size, "no memory");
        return NULL;
    }
    *s = (Session){.c = *c, .ops = ops, .repeats = {.ops = ops}};
    Status status = weights_create(&s->weights, c, ops, prec, s->error);
    if (!status) status = cache_create(&s->cache, c, ops, prec, pages, s->error);
    if (!status && c->pos == POS_ROPE) status = rope_tables(c, ops, s->error, &s->cos, &s->sin);
    if (!status) return s;
    snprintf(error, (size_t)size, "%s", s->error);
    session_free(s);
    return NULL;
}

void session_free(Session *s) {
    if (!s) return;
    repeats_forget(&s->repeats);
    weights_free(&s->weights);
    cache_free(&s->cache);
    if (s->cos) s->ops->free(s->cos, (size_t)rope_bytes(&s->c));
    if (s->arena) s->ops->free(s->arena, (size_t)s->arena_bytes);
    if (s->head) s->ops->free(s->head, (size_t)s->head_bytes);
    free(s);
}

/* ---- weights and rows -------------------------------------------------------------------------------------------- */

static void taken(Session *s, int64_t version) {
    s->version = version;
    s->R = 0;
}

Status session_load(Session *s, Model *m, int64_t version) {
    repeats_forget(&s->repeats);
    Status status = weights_load(&s->weights, m);
    if (!status) taken(s, version);
    return status;
}

Status session_begin(Session *s) { return weights_begin(&s->weights); }

void session_put(Session *s, int64_t offset, const float *values, int64_t floats) {
    weights_put(&s->weights, offset, values, floats);
}

void session_end(Session *s, int64_t version) {
    weights_end(&s->weights);
    taken(s, version);
}

int session_add(Session *s) { return cache_add(&s->cache); }
int session_fork(Session *s, int row) { return cache_fork(&s->cache, row); }
void session_drop(Session *s, int row) { cache_drop(&s->cache, row); }
int session_length(const Session *s, int row) { return s->cache.rows[row].length; }
int session_pages(const Session *s) { return s->cache.pages; }
int session_pages_free(const Session *s) { return s->cache.n_free; }
int session_pages_needed(const Session *s, const int *rows, const int *counts, int R) {
    return cache_needs(&s->cache, rows, counts, R);
}

int session_stale(const Session *s, int row) {
    const Row *r = &s->cache.rows[row];
    return r->length && r->version != s->version;
}

/* ---- one slice of tokens through the layers ---------------------------------------------------------------------- */

static const float *weight(const Session *s, int i, int l) { return weights_plain(&s->weights, i, l); }
static const char *packed(const Session *s, int i, int l) { return weights_packed(&s->weights, i, l); }
/* Of the adapter of linear layer w; 0: it has none. */
static int width_of(const Session *s, int w) { return weights_added_width(&s->weights, w); }

typedef struct {
    void *pointer; /* what will point to it */
    int64_t bytes;
} Field;

/* Lay fields out one behind the other; returns the size.  NULL in `arena`: only that is wanted. */
static int64_t place(const Field *list, size_t n, char *arena) {
    int64_t at = 0;
    for (size_t i = 0; i < n; i++) {
        void *p = arena ? arena + at : NULL;
        memcpy(list[i].pointer, &p, sizeof p);
        at += aligned(list[i].bytes);
    }
    return at;
}

/* What the host tells of N tokens of R rows, in tables of so many pages: from the beginning of the arena on. */
static int64_t told_layout(Slice *out, char *arena, int64_t N, int64_t R, int64_t pages) {
    const Field list[] = {{&out->tokens, 4 * N},
                          {&out->starts, 4 * N},
                          {&out->first, 4 * (R + 1)},
                          {&out->past, 4 * R},
                          {&out->table, 4 * R * pages}};
    return place(list, sizeof list / sizeof *list, arena);
}

/* The arena. */
static int64_t slice_layout(const Session *s, Slice *out, char *arena, int64_t N, int64_t R, int64_t pages) {
    const Config *c = &s->c;
    LIST_SIZES;
    const int64_t A = (int64_t)s->ops->act_bytes, told = told_layout(out, arena, N, R, pages);
    const Field list[] = {
        {&out->moments, 8 * N},
        {&out->x, A * C * N},
        {&out->norm, A * C * N},
        {&out->qkv, A * QKV * N},
        {&out->att, A * AO * N},
        {&out->mid, A * C * N},
        {&out->fch, A * F * N},
        {&out->fc, GATED || width_of(s, P_fc_w) ? A * FC * N : 0},
        {&out->low, A * adapter_most(&s->weights.added.of) * N},
    };
    return told + place(list, sizeof list / sizeof *list, arena ? arena + told : NULL);
}

/* A block of at least this many bytes, for content that does not outlive the step. */
static Status grow(Session *s, char **p, int64_t *have, int64_t bytes, const char *purpose) {
    if (bytes <= *have) return OK;
    repeats_forget(&s->repeats);
    if (*p) s->ops->free(*p, (size_t)*have);
    *p = NULL, *have = 0;
    Status status = allocate(s->ops, s->error, (void **)p, bytes, purpose);
    if (!status) *have = bytes;
    return status;
}

/* out += what the adapter of linear layer w makes of `in` */
static void adapter_forward(const Session *s, const Slice *b, int w, int l, act *out, const act *in, int N) {
    const Param *p = &s->weights.layout.p[w];
    const int R = width_of(s, w), prec = s->weights.added.prec;
    const char *A = weights_added(&s->weights, w, ADAPTER_A, l), *B = weights_added(&s->weights, w, ADAPTER_B, l);
    s->ops->linear_packed(b->low, in, A, NULL, NULL, FN_NONE, prec, N, (int)p->columns, R);
    s->ops->linear_packed(out, b->low, B, NULL, out, FN_NONE, prec, N, R, (int)p->rows);
}

/* As in model.c; where the layer has a function b->fc takes what comes before it. */
static void linear(const Session *s, const Slice *b, int w, int bias, int l, act *out, const act *in,
                   const act *residual, int fn, int N) {
    const Param *p = &s->weights.layout.p[w];
    const int apart = width_of(s, w) && fn != FN_NONE;
    act *sum = apart ? b->fc : out;
    s->ops->linear_packed(sum, in, packed(s, w, l), weight(s, bias, l), residual, apart ? FN_NONE : fn, s->weights.prec,
                          N, (int)p->columns, (int)p->rows);
    if (width_of(s, w)) adapter_forward(s, b, w, l, sum, in, N);
    if (apart) s->ops->gelu_forward(out, b->fc, fn, N, (int)p->rows);
}

/* A norm and the linear layer behind it.  An adapter reads what the norm makes, too. */
static void norm_linear(const Session *s, const Slice *b, int gain, int shift, int w, int bias, int l, act *out,
                        const act *in, int fn, int N) {
    const Config *c = &s->c;
    const float *g = weight(s, gain, l), *h = weight(s, shift, l);
    float *rstd = b->moments + N;
    if (!width_of(s, w)) {
        s->ops->norm_linear_packed(out, b->norm, b->moments, in, c->norm, g, h, c->norm_eps, packed(s, w, l),
                                   weight(s, bias, l), fn, s->weights.prec, N, c->n_embd,
                                   (int)s->weights.layout.p[w].rows);
        return;
    }
    if (c->norm == NORM_LAYERNORM)
        s->ops->layernorm_forward(b->norm, b->moments, rstd, in, g, h, c->norm_eps, N, c->n_embd);
    else s->ops->rmsnorm_forward(b->norm, rstd, in, g, c->norm_eps, N, c->n_embd);
    linear(s, b, w, bias, l, out, b->norm, NULL, fn, N);
}

static void embed(const Session *s, const Slice *b, int N) {
    const float *wpe = weight(s, P_wpe, 0);
    if (weights_embeds_packed(&s->weights))
        s->ops->embedding_packed(b->x, b->tokens, b->starts, packed(s, P_wte, 0), wpe, s->weights.prec, 1, N,
                                 s->c.n_embd);
    else
        s->ops->embedding_forward(b->x, b->tokens, b->starts, weight(s, P_wte, 0), s->weights.embedding_held, wpe, 1, N,
                                  s->c.n_embd);
}

/* As block_forward of model.c, nothing kept for a backward pass. */
static void block_forward(const Session *s, const Slice *b, int l, int N, int R, int pages) {
    const Config *c = &s->c;
    const Ops *ops = s->ops;
    int NH = c->n_head, NKV = c->n_kv_head, HS = c->head_size;

    norm_linear(s, b, P_ln1_w, P_ln1_b, P_qkv_w, P_qkv_b, l, b->qkv, b->x, FN_NONE, N);
    if (c->pos == POS_ROPE) ops->rope_forward(b->qkv, s->cos, s->sin, b->starts, 1, N, NH, NKV, HS);
    ops->attention_paged(b->att, cache_layer(&s->cache, l), b->qkv, b->table, b->first, b->past, s->cache.prec, R,
                         pages, NH, NKV, HS);
    linear(s, b, P_proj_w, P_proj_b, l, b->mid, b->att, b->x, FN_NONE, N);

    const int gated = c->act == MLP_SWIGLU;
    norm_linear(s, b, P_ln2_w, P_ln2_b, P_fc_w, P_fc_b, l, gated ? b->fc : b->fch, b->mid,
                gated ? FN_NONE : mlp_function(c), N);
    if (gated) ops->swiglu_forward(b->fch, b->fc, N, c->n_inner);
    linear(s, b, P_fc2_w, P_fc2_b, l, b->x, b->fch, b->mid, FN_NONE, N);
}

/* Which tokens of a step make up a slice: rows from[0] .. from[R-1] of the step, taken[i] tokens of each, behind
 * past[i] that it has; their tables have room for so many pages, and double, for what was recorded of a step serves
 * until then. */
typedef struct {
    int R, N, pages;
    int from[SLICE], taken[SLICE], past[SLICE];
} Plan;

/* The next tokens that have not gone through yet: `row` and `done` say where the last slice ended, and go on. */
static Plan next_slice(const Session *s, const int *rows, const int *counts, int R, int *row, int *done) {
    Plan p = {0};
    while (*row < R && p.N < SLICE) {
        int left = counts[*row] - *done, taken = left < SLICE - p.N ? left : SLICE - p.N;
        int past = s->cache.rows[rows[*row]].length + *done, pages = pages_for(past + taken);
        p.from[p.R] = *row, p.taken[p.R] = taken, p.past[p.R++] = past, p.N += taken;
        while (pages > p.pages) p.pages = p.pages ? 2 * p.pages : 1;
        *done += taken;
        if (*done == counts[*row]) *row += 1, *done = 0;
    }
    return p;
}

/* Token ids, positions and pages of a slice, to the backend: in one piece, for each costs a device some microseconds.
 */
static Status describe(const Session *s, const Slice *b, const Plan *p, const int *rows, const int32_t *tokens) {
    Slice told;
    const size_t bytes = (size_t)told_layout(&told, NULL, p->N, p->R, p->pages);
    char *host = calloc(1, bytes);
    if (!host) return NO_MEMORY;
    told_layout(&told, host, p->N, p->R, p->pages);
    memcpy(told.tokens, tokens, sizeof *tokens * (size_t)p->N);
    memcpy(told.past, p->past, sizeof *p->past * (size_t)p->R);
    for (int i = 0; i < p->R; i++) {
        const Row *r = &s->cache.rows[rows[p->from[i]]];
        told.first[i + 1] = told.first[i] + p->taken[i];
        for (int n = told.first[i]; n < told.first[i + 1]; n++) told.starts[n] = told.first[i] - p->past[i];
        for (int j = 0; j < p->pages && j < r->n_pages; j++) told.table[i * p->pages + j] = r->pages[j];
    }
    s->ops->copy_in(b->tokens, host, bytes);
    free(host);
    return OK;
}

/* ---- the rows' last tokens --------------------------------------------------------------------------------------- */

typedef struct {
    double *u;      /* what a draw is told, */
    float *options; /* (R, SAMPLE_COUNT) */
    int32_t *drawn; /* and what comes of it */
    float *sampled, *logprobs;
    act *last, *hidden, *logits;
    float *moments, *floats, *lse; /* floats: the logits, in a device's memory */
    int32_t *targets;
} Head;

static int64_t told_to_draw(Head *h, char *p, int64_t R) {
    const Field list[] = {{&h->u, 8 * R}, {&h->options, 4 * SAMPLE_COUNT * R}};
    return place(list, sizeof list / sizeof *list, p);
}

static int64_t drawn_layout(Head *h, char *p, int64_t R) {
    const Field list[] = {{&h->drawn, 4 * R}, {&h->sampled, 4 * R}, {&h->logprobs, 4 * R}};
    return place(list, sizeof list / sizeof *list, p);
}

static int64_t head_layout(const Session *s, Head *h, char *p, int64_t R) {
    const int64_t A = (int64_t)s->ops->act_bytes, C = s->c.n_embd, V = s->c.vocab_size,
                  Vp = s->weights.layout.p[P_wte].rows;
    int64_t at = told_to_draw(h, p, R);
    at += drawn_layout(h, p ? p + at : NULL, R);
    const Field list[] = {{&h->last, A * C * R},    {&h->hidden, A * C * R},
                          {&h->logits, A * Vp * R}, {&h->floats, s->ops->on_host ? 0 : 4 * V * R},
                          {&h->moments, 8 * R},     {&h->lse, 4 * R},
                          {&h->targets, 4 * R}};
    return at + place(list, sizeof list / sizeof *list, p ? p + at : NULL);
}

/* From the state of R tokens. */
static void head_forward(const Session *s, const Head *h, const act *state, int R) {
    const int V = s->c.vocab_size, Vp = (int)s->weights.layout.p[P_wte].rows;
    s->ops->norm_linear_packed(h->logits, h->hidden, h->moments, state, s->c.norm, weight(s, P_lnf_w, 0),
                               weight(s, P_lnf_b, 0), s->c.norm_eps, packed(s, head_param(&s->c), 0), NULL, FN_NONE,
                               s->weights.prec, R, s->c.n_embd, Vp);
    if (!s->ops->on_host) s->ops->act_read(h->floats, h->logits, R, V, Vp);
}

/* ---- a step ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const Session *s;
    const Slice *b;
    const Plan *p;
    const Head *h; /* where all tokens are the last of their rows; or NULL */
} SliceWork;

/* On the arrays that describe() filled. */
static Status slice_forward(void *context) {
    const SliceWork *w = context;
    embed(w->s, w->b, w->p->N);
    for (int l = 0; l < w->s->c.n_layer; l++) {
        if (!w->s->ops->record && w->s->poll && w->s->poll()) return INTERRUPTED; /* what is recorded is one whole */
        block_forward(w->s, w->b, l, w->p->N, w->p->R, w->p->pages);
    }
    if (w->h) head_forward(w->s, w->h, w->b->x, w->p->N);
    return OK;
}

/* Leaves the state of every token in b->x, and makes logits of them for h. */
static Status run_slice(Session *s, Slice *b, const Plan *p, const Head *h, const int *rows, const int32_t *tokens) {
    int64_t bytes = slice_layout(s, b, NULL, p->N, p->R, p->pages);
    Status status = grow(s, &s->arena, &s->arena_bytes, bytes, "activations of a step");
    if (status) return status;
    slice_layout(s, b, s->arena, p->N, p->R, p->pages);
    if (describe(s, b, p, rows, tokens)) return failed(s->error, NO_MEMORY, "table of a step: no memory");
    if (s->ops->record && s->poll && s->poll()) return INTERRUPTED;
    SliceWork work = {s, b, p, h};
    /* where its arrays lie follows from these */
    const Repeat key = {.work = h != NULL, .B = p->N, .T = p->R, .live = p->pages};
    return repeat(&s->repeats, &key, slice_forward, &work);
}

/* Of the rows that end in a slice the state of their last tokens. */
static void keep_last(const Session *s, const Head *h, const Slice *b, const Plan *p, int ended) {
    const size_t bytes = (size_t)s->c.n_embd * s->ops->act_bytes;
    for (int i = 0, end = 0; i < p->R; i++) {
        end += p->taken[i];
        if (p->from[i] < ended)
            s->ops->copy((char *)h->last + (size_t)p->from[i] * bytes, (char *)b->x + (size_t)(end - 1) * bytes, bytes);
    }
}

/* All tokens through the layers, and the logits of the last ones. */
static Status through_layers(Session *s, const Head *h, const int *rows, const int *counts, const int32_t *tokens,
                             int R) {
    Slice b;
    for (int row = 0, done = 0, at = 0; row < R;) {
        const Plan p = next_slice(s, rows, counts, R, &row, &done);
        const int all_last = p.R == R && p.N == R; /* decoding: one token a row */
        Status status = run_slice(s, &b, &p, all_last ? h : NULL, rows, tokens + at);
        if (status || all_last) return status;
        keep_last(s, h, &b, &p, row);
        at += p.N;
    }
    head_forward(s, h, h->last, R);
    return OK;
}

Status session_step(Session *s, const int *rows, const int *counts, const int32_t *tokens, int R) {
    for (int i = 0; i < R; i++)
        if (session_stale(s, rows[i]))
            return failed(s->error, STALE, "rows[%d]: its tokens went through older weights, it cannot go on", i);
    Head h;
    Status status = grow(s, &s->head, &s->head_bytes, head_layout(s, &h, NULL, R), "logits of a step");
    if (!status) status = cache_take(&s->cache, rows, counts, R);
    head_layout(s, &h, s->head, R);
    s->R = 0;
    if (!status) status = through_layers(s, &h, rows, counts, tokens, R);
    status = checked_device(s->ops, s->error, status);
    if (status) return status;
    for (int i = 0; i < R; i++) s->cache.rows[rows[i]].length += counts[i], s->cache.rows[rows[i]].version = s->version;
    s->R = R;
    return OK;
}

/* ---- what the last step has left ---- */

static Status head_of_last(Session *s, Head *h, const char *what, int R) {
    if (R != s->R || !R)
        return failed(s->error, NO_FORWARD, "%s: there are %d, the last step had %d rows", what, R, s->R);
    head_layout(s, h, s->head, R);
    return OK;
}

int session_rows(const Session *s) { return s->R; }

Status session_logits(Session *s, float *logits, int R) {
    const int V = s->c.vocab_size, Vp = (int)s->weights.layout.p[P_wte].rows;
    Head h;
    Status status = R ? head_of_last(s, &h, "logits", R) : OK;
    if (status || !R) return status;
    if (s->ops->on_host) s->ops->act_read(logits, h.logits, R, V, Vp);
    else s->ops->copy_out(logits, h.floats, (size_t)R * (size_t)V * sizeof *logits);
    return checked_device(s->ops, s->error, OK);
}

Status session_draw(Session *s, int32_t *tokens, float *logprobs, float *sampled, const float *options, const double *u,
                    int V, int R) {
    const int of_model = s->c.vocab_size, Vp = (int)s->weights.layout.p[P_wte].rows;
    Head h, host;
    Status status = head_of_last(s, &h, "u", R);
    if (status) return status;
    const size_t told = (size_t)told_to_draw(&host, NULL, R), drawn = (size_t)drawn_layout(&host, NULL, R);
    char *both = calloc(1, told + drawn);
    if (!both) return failed(s->error, NO_MEMORY, "a draw: no memory");
    told_to_draw(&host, both, R), drawn_layout(&host, both + told, R);
    memcpy(host.u, u, (size_t)R * sizeof *u);
    memcpy(host.options, options, (size_t)R * SAMPLE_COUNT * sizeof *options);
    s->ops->copy_in(h.u, both, told);
    const float *logits = s->ops->on_host ? h.logits : h.floats;
    s->ops->sample(h.drawn, h.sampled, logits, h.options, h.u, R, V, s->ops->on_host ? Vp : of_model);
    s->ops->logprob_forward(h.logprobs, h.lse, NULL, h.logits, h.drawn, 1, R, of_model, Vp);
    s->ops->copy_out(both + told, h.drawn, drawn);
    memcpy(tokens, host.drawn, (size_t)R * sizeof *tokens);
    memcpy(sampled, host.sampled, (size_t)R * sizeof *sampled);
    memcpy(logprobs, host.logprobs, (size_t)R * sizeof *logprobs);
    free(both);
    return checked_device(s->ops, s->error, OK);
}

Status session_logprobs(Session *s, float *logprobs, const int32_t *targets, float temperature, int R) {
    Head h;
    Status status = head_of_last(s, &h, "tokens", R);
    if (status) return status;
    s->ops->copy_in(h.targets, targets, (size_t)R * sizeof *targets);
    s->ops->logprob_forward(h.logprobs, h.lse, NULL, h.logits, h.targets, 1 / temperature, R, s->c.vocab_size,
                            (int)s->weights.layout.p[P_wte].rows);
    s->ops->copy_out(logprobs, h.logprobs, (size_t)R * sizeof *logprobs);
    return checked_device(s->ops, s->error, OK);
}

/* session.c -- rows of tokens on pages of keys and values: who owns which page, and one pass of new tokens through the
 * layers.  As model.c it does no arithmetic on numbers of the model: it walks the layers through the operator table. */
#include "session.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "adapter.h"
#include "repeat.h"
#include "status.h"

/* Tokens that go through the layers at a time: the activations of a long prompt stay within a few MB. */
enum { SLICE = 512, ALIGN_BYTES = 64 };

typedef struct {
    int32_t *pages;
    int n_pages, room, length; /* pages it has, and its list has room for; tokens */
    int used;
    int64_t version; /* of the weights that wrote to it */
} Row;

/* What one slice of tokens needs, in an arena that grows. */
typedef struct {
    int32_t *tokens, *starts, *first, *past, *table; /* starts: so that t - starts is the position */
    act *x, *norm, *qkv, *att, *mid, *fc, *fch, *low;
    float *moments; /* of norms, 2 N */
} Slice;

/* An adapter's A's and B's (the B's as one matrix each, see adapter.h), packed, layer after layer. */
typedef struct {
    Adapter of; /* of rank 0: none */
    int prec;
    char *packed;
    float *dense; /* one matrix of B's on its way */
    int64_t at[LINEARS][2], layer, bytes, dense_bytes;
} Added;

struct Session {
    Config c;
    const Ops *ops;
    int prec, cache_prec; /* of the packed weights; of keys and values */
    Layout layout;
    int64_t version;
    char *packed; /* the matrices */
    int64_t packed_at[N_PARAMS], packed_layer[N_PARAMS], packed_bytes;
    const float *plain[N_PARAMS]; /* layer 0 of what is read as it is: in another's block, or in `own` */
    int64_t plain_layer[N_PARAMS];
    int embedding_held; /* how the embedding lies there */
    Added added;
    float *own, *part; /* of a session that takes its weights in parts; rows that wait to be packed */
    int64_t own_bytes, part_bytes;
    float *cos, *sin;

    char *pool; /* [layer][page] */
    int64_t page_bytes;
    int pages;
    int32_t *owners, *free_pages; /* rows that share a page; a stack */
    int n_free;
    Row *rows;
    int n_rows;

    char *arena, *head; /* of a slice; of the rows' last tokens: residual, norm, logits, ... */
    int64_t arena_bytes, head_bytes;
    int R;           /* rows of the last step */
    Repeats repeats; /* slices: until arrays they use are freed, or weights or an adapter come from elsewhere */
    int (*poll)(void);
    char error[ERROR_ROOM];
};

const char *session_error(const Session *s) { return s->error; }
void session_set_poll(Session *s, int (*poll)(void)) { s->poll = poll; }
int session_length(const Session *s, int row) { return s->rows[row].length; }
int session_pages(const Session *s) { return s->pages; }
int session_pages_free(const Session *s) { return s->n_free; }
int session_stale(const Session *s, int row) { return s->rows[row].length && s->rows[row].version != s->version; }

static int64_t aligned(int64_t bytes) { return (bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES; }

/* ---- weights ----------------------------------------------------------------------------------------------------- */

static int is_packed(const Session *s, int i) {
    if (i == P_wte && s->prec == PREC_INT8) return 1;
    return i == P_qkv_w || i == P_proj_w || i == P_fc_w || i == P_fc2_w || i == head_param(&s->c);
}

/* Where packing has not rounded the embedding to less than the model's precision, it need not exist twice. */
static int embeds_packed(const Session *s) { return is_packed(s, P_wte) && s->prec != PREC_BF16; }

static int is_plain(const Session *s, int i) {
    return s->layout.p[i].floats && (i == P_wte ? !embeds_packed(s) : !is_packed(s, i));
}

static int layers_of(const Session *s, int i) { return s->layout.p[i].where == LAYERED ? s->c.n_layer : 1; }

/* Where each packed matrix lies, layer after layer of one parameter behind those of another. */
static void pack_layout(Session *s) {
    int64_t at = 0;
    for (int i = 0; i < N_PARAMS; i++) {
        const Param *p = &s->layout.p[i];
        if (!is_packed(s, i)) continue;
        s->packed_at[i] = at;
        s->packed_layer[i] = aligned(s->ops->packed_bytes(s->prec, (int)p->columns, (int)p->rows));
        at += s->packed_layer[i] * layers_of(s, i);
    }
    s->packed_bytes = at;
}

/* Likewise what is not packed, in a block of the session's own; returns its bytes.  NULL: only they are wanted. */
static int64_t own_layout(Session *s, float *own) {
    int64_t at = 0;
    for (int i = 0; i < N_PARAMS; i++) {
        if (!is_plain(s, i)) continue;
        int64_t bytes = aligned(s->layout.p[i].floats * (int64_t)sizeof(float));
        s->plain[i] = own ? own + at / (int64_t)sizeof(float) : NULL;
        s->plain_layer[i] = bytes / (int64_t)sizeof(float);
        at += bytes * layers_of(s, i);
    }
    return at;
}

static const float *weight(const Session *s, int i, int l) {
    return s->layout.p[i].floats ? s->plain[i] + l * s->plain_layer[i] : NULL;
}

static char *packed(const Session *s, int i, int l) { return s->packed + s->packed_at[i] + l * s->packed_layer[i]; }

static void taken(Session *s, int64_t version) {
    s->version = version;
    s->R = 0;
}

/* ---- an adapter ---- */

static void free_added(Session *s) {
    repeats_forget(&s->repeats);
    if (s->added.packed) s->ops->free(s->added.packed, (size_t)s->added.bytes);
    if (s->added.dense) s->ops->free(s->added.dense, (size_t)s->added.dense_bytes);
    s->added = (Added){0};
}

/* Where each part lies; products of an adapter are not rounded to int8. */
static Status place_added(Session *s, const Adapter *adapter) {
    Added *a = &s->added;
    *a = (Added){.of = *adapter, .prec = s->prec == PREC_INT8 ? PREC_BF16 : s->prec};
    for (int slot = 0; slot < LINEARS; slot++) {
        const Param *p = &s->layout.p[P_qkv_w + slot];
        int R = adapter_width(adapter, P_qkv_w + slot);
        a->at[slot][ADAPTER_A] = a->layer;
        a->layer += aligned(s->ops->packed_bytes(a->prec, (int)p->columns, R));
        a->at[slot][ADAPTER_B] = a->layer;
        a->layer += aligned(s->ops->packed_bytes(a->prec, R, (int)p->rows));
    }
    a->bytes = a->layer * s->c.n_layer;
    a->dense_bytes = adapter_dense(adapter, &s->layout) * (int64_t)sizeof(float);
    Status status = allocate(s->ops, s->error, (void **)&a->packed, a->bytes, "packed adapter");
    if (!status) status = allocate(s->ops, s->error, (void **)&a->dense, a->dense_bytes, "adapter");
    if (status) free_added(s);
    return status;
}

static char *added_part(const Session *s, int slot, int part, int l) {
    return s->added.packed + l * s->added.layer + s->added.at[slot][part];
}

static Status load_added(Session *s, Model *m) {
    const Adapter *a = model_adapter(m);
    if (!a) return OK;
    Status status = s->added.of.rank ? OK : place_added(s, a);
    for (int slot = 0; slot < LINEARS && !status; slot++) {
        const int R = adapter_width(a, P_qkv_w + slot), C = (int)s->layout.p[P_qkv_w + slot].columns,
                  OC = (int)s->layout.p[P_qkv_w + slot].rows;
        for (int l = 0; R && l < s->c.n_layer; l++) {
            const float *A = layout_at(&a->layout, model_added(m), 2 * slot + ADAPTER_A, l),
                        *B = layout_at(&a->layout, model_added(m), 2 * slot + ADAPTER_B, l);
            s->ops->linear_pack(added_part(s, slot, ADAPTER_A, l), A, s->added.prec, C, R);
            s->ops->lora_spread(s->added.dense, B, model_groups(m, slot), a->scale, a->J[slot], a->rank, OC);
            s->ops->linear_pack(added_part(s, slot, ADAPTER_B, l), s->added.dense, s->added.prec, R, OC);
        }
    }
    return status;
}

/* ---- weights of a model ---- */

/* Rows of one tensor of the model's block, held so, packed in parts: each is made floats first. */
static void pack_held(Session *s, char *to, const char *from, const Param *p) {
    const int C = (int)p->columns;
    for (int64_t row = 0; row < p->rows; row += PACK_ROWS) {
        int n = (int)(p->rows - row < PACK_ROWS ? p->rows - row : PACK_ROWS);
        s->ops->held_read(s->part, from + s->ops->held_bytes(p->held, C, (int)row), p->held, C, n);
        s->ops->linear_pack(to + s->ops->packed_bytes(s->prec, C, (int)row), s->part, s->prec, C, n);
    }
}

static Status allocate_part(Session *s) {
    int64_t most = 0;
    for (int i = 0; i < N_PARAMS; i++)
        if (is_packed(s, i) && s->layout.p[i].columns > most) most = s->layout.p[i].columns;
    s->part_bytes = most * PACK_ROWS * (int64_t)sizeof(float);
    return allocate(s->ops, s->error, (void **)&s->part, s->part_bytes, "weights that wait to be packed");
}

static void free_part(Session *s) {
    if (s->part) s->ops->free(s->part, (size_t)s->part_bytes);
    s->part = NULL;
}

Status session_load(Session *s, Model *m, int64_t version) {
    repeats_forget(&s->repeats);
    const int held = model_held(m);
    const Layout from = held_layout(&s->c, s->ops, held);
    Status status = held == PREC_FP32 ? OK : allocate_part(s);
    if (!status) status = load_added(s, m);
    for (int i = 0; i < N_PARAMS && !status; i++) {
        const Param *p = &from.p[i];
        s->plain[i] = model_weights(m) + p->offset;
        s->plain_layer[i] = from.layer_floats;
        for (int l = 0; is_packed(s, i) && l < layers_of(s, i); l++) {
            const float *w = weight(s, i, l);
            if (p->held == PREC_FP32) s->ops->linear_pack(packed(s, i, l), w, s->prec, (int)p->columns, (int)p->rows);
            else pack_held(s, packed(s, i, l), (const char *)w, p);
        }
    }
    s->embedding_held = held;
    free_part(s);
    if (!status) taken(s, version);
    return status;
}

/* ---- weights in parts -------------------------------------------------------------------------------------------- */

Status session_begin(Session *s) {
    s->own_bytes = own_layout(s, NULL);
    Status status = allocate(s->ops, s->error, (void **)&s->own, s->own_bytes, "weights that are not packed");
    if (!status) status = allocate_part(s);
    if (!status) own_layout(s, s->own);
    return status;
}

typedef struct {
    int param, layer;
    int64_t at; /* floats from the begin of the layer's tensor */
} Place;

/* What lies at this offset of a block of weights. */
static Place place_of(const Session *s, int64_t offset) {
    for (int i = 0;; i++) {
        const Param *p = &s->layout.p[i];
        int64_t at = offset - p->offset, layer = 0;
        if (p->where == LAYERED && at >= 0) layer = at / s->layout.layer_floats, at %= s->layout.layer_floats;
        if (at >= 0 && at < p->floats && layer < layers_of(s, i)) return (Place){i, (int)layer, at};
    }
}

/* Rows of a matrix gather in s->part; as many as can be packed together, and the last ones, are packed. */
static void gather(Session *s, Place to, const float *values, int64_t floats) {
    const Param *p = &s->layout.p[to.param];
    const int64_t C = p->columns, V = s->c.vocab_size, real = is_vocabulary(to.param) ? V : p->rows;
    int64_t row = to.at / C, end = row + floats / C;
    while (row < end) {
        int64_t first = row / PACK_ROWS * PACK_ROWS, stop = first + PACK_ROWS < real ? first + PACK_ROWS : real;
        int64_t n = (end < stop ? end : stop) - row;
        s->ops->copy_in(s->part + (row - first) * C, values, (size_t)(n * C) * sizeof(float));
        values += n * C, row += n;
        if (row < stop) break;
        if (stop == real) { /* the padding of the vocabulary is zero */
            s->ops->zero(s->part + (real - first) * C, (size_t)((p->rows - real) * C) * sizeof(float));
            stop = p->rows;
        }
        char *to_rows = packed(s, to.param, to.layer) + s->ops->packed_bytes(s->prec, (int)C, (int)first);
        s->ops->linear_pack(to_rows, s->part, s->prec, (int)C, (int)(stop - first));
    }
}

void session_put(Session *s, int64_t offset, const float *values, int64_t floats) {
    Place to = place_of(s, offset);
    if (is_plain(s, to.param)) {
        float *own = (float *)weight(s, to.param, to.layer) + to.at;
        s->ops->copy_in(own, values, (size_t)floats * sizeof(float));
    }
    if (is_packed(s, to.param)) gather(s, to, values, floats);
}

void session_end(Session *s, int64_t version) {
    free_part(s);
    taken(s, version);
}

/* ---- life -------------------------------------------------------------------------------------------------------- */

/* Attention rounds its operands to bf16 wherever weights are less than fp32, so nothing is lost in the cache. */
static int cache_precision(int prec) { return prec == PREC_FP32 ? PREC_FP32 : PREC_BF16; }

static int64_t bytes_of_page(const Config *c, const Ops *ops, int prec) {
    return aligned(ops->page_bytes(cache_precision(prec), c->n_kv_head, c->head_size));
}

SessionMemory session_memory(const Config *c, const Ops *ops, int prec, int pages) {
    Session s = {.c = *c, .ops = ops, .prec = prec, .layout = param_layout(c)};
    pack_layout(&s);
    return (SessionMemory){.packed = s.packed_bytes,
                           .plain = own_layout(&s, NULL),
                           .cache = (int64_t)c->n_layer * pages * bytes_of_page(c, ops, prec)};
}

Session *session_create(const Config *c, const Ops *ops, int prec, int pages, char *error, int size) {
    Session *s = calloc(1, sizeof *s);
    if (!s) {
        snprintf(error, (size_t)size, "no memory");
        return NULL;
    }
    *s = (Session){.c = *c,
                   .ops = ops,
                   .prec = prec,
                   .cache_prec = cache_precision(prec),
                   .layout = param_layout(c),
                   .pages = pages,
                   .n_free = pages,
                   .repeats = {.ops = ops}};
    s->page_bytes = bytes_of_page(c, ops, prec);
    pack_layout(s);
    Status status = OK;
    s->owners = calloc((size_t)pages, sizeof *s->owners);
    s->free_pages = malloc((size_t)pages * sizeof *s->free_pages);
    if (!s->owners || !s->free_pages) status = failed(s->error, NO_MEMORY, "table of pages: no memory");
    for (int i = 0; i < pages && !status; i++) s->free_pages[i] = pages - 1 - i; /* the first page on top */
    if (!status) status = allocate(s->ops, s->error, (void **)&s->packed, s->packed_bytes, "packed weights");
    if (!status) status = allocate(s->ops, s->error, (void **)&s->pool, c->n_layer * s->page_bytes * pages, "KV cache");
    if (!status && c->pos == POS_ROPE) status = rope_tables(c, ops, s->error, &s->cos, &s->sin);
    if (!status) return s;
    snprintf(error, (size_t)size, "%s", s->error);
    session_free(s);
    return NULL;
}

void session_free(Session *s) {
    if (!s) return;
    if (s->packed) s->ops->free(s->packed, (size_t)s->packed_bytes);
    if (s->own) s->ops->free(s->own, (size_t)s->own_bytes);
    free_part(s);
    if (s->pool) s->ops->free(s->pool, (size_t)(s->c.n_layer * s->page_bytes * s->pages));
    if (s->cos) s->ops->free(s->cos, (size_t)rope_bytes(&s->c));
    free_added(s);
    if (s->arena) s->ops->free(s->arena, (size_t)s->arena_bytes);
    if (s->head) s->ops->free(s->head, (size_t)s->head_bytes);
    for (int i = 0; i < s->n_rows; i++) free(s->rows[i].pages);
    free(s->rows);
    free(s->owners);
    free(s->free_pages);
    free(s);
}

/* ---- rows and pages ---------------------------------------------------------------------------------------------- */

static int no_memory(Session *s) {
    failed(s->error, NO_MEMORY, "table of rows: no memory");
    return -1;
}

int session_add(Session *s) {
    int i = 0;
    while (i < s->n_rows && s->rows[i].used) i++;
    if (i == s->n_rows) {
        Row *more = realloc(s->rows, ((size_t)s->n_rows + 1) * sizeof *more);
        if (!more) return no_memory(s);
        s->rows = more;
        s->n_rows++;
    }
    s->rows[i] = (Row){.used = 1};
    return i;
}

static int reserve(Row *r, int n_pages) {
    if (n_pages <= r->room) return 1;
    int32_t *more = realloc(r->pages, (size_t)n_pages * sizeof *more);
    if (!more) return 0;
    r->pages = more, r->room = n_pages;
    return 1;
}

static int pages_for(int tokens) { return (tokens + KEY_BLOCK - 1) / KEY_BLOCK; }

int session_fork(Session *s, int row) {
    int fork = session_add(s);
    if (fork < 0) return -1;
    Row *from = &s->rows[row], *to = &s->rows[fork];
    int n = pages_for(from->length); /* not what a step that was cut off has left behind them */
    if (!reserve(to, n)) {
        to->used = 0;
        return no_memory(s);
    }
    for (int i = 0; i < n; i++) {
        to->pages[i] = from->pages[i];
        s->owners[to->pages[i]]++;
    }
    to->n_pages = n, to->length = from->length, to->version = from->version;
    return fork;
}

static void leave_page(Session *s, int page) {
    if (--s->owners[page] == 0) s->free_pages[s->n_free++] = page;
}

void session_drop(Session *s, int row) {
    Row *r = &s->rows[row];
    for (int i = 0; i < r->n_pages; i++) leave_page(s, r->pages[i]);
    free(r->pages);
    *r = (Row){0};
}

/* The page in which the row's next token belongs, where the row has begun it; -1. */
static int tail_of(const Row *r) { return r->length % KEY_BLOCK ? r->pages[r->length / KEY_BLOCK] : -1; }

/* Whether row rows[i] must copy its tail before it writes.  Of rows that share a page the last one to write keeps it.
 */
static int copies_tail(const Session *s, const int *rows, int i) {
    int tail = tail_of(&s->rows[rows[i]]);
    if (tail < 0 || s->owners[tail] == 1) return 0;
    int owners = s->owners[tail];
    for (int j = 0; j < i; j++) owners -= tail_of(&s->rows[rows[j]]) == tail;
    return owners > 1;
}

int session_pages_needed(const Session *s, const int *rows, const int *counts, int R) {
    int needed = 0;
    for (int i = 0; i < R; i++) {
        const Row *r = &s->rows[rows[i]];
        int more = pages_for(r->length + counts[i]) - r->n_pages;
        needed += (more > 0 ? more : 0) + copies_tail(s, rows, i);
    }
    return needed;
}

static void copy_tail(Session *s, Row *r) {
    int32_t *tail = &r->pages[r->length / KEY_BLOCK], page = s->free_pages[--s->n_free];
    for (int l = 0; l < s->c.n_layer; l++) {
        char *layer = s->pool + l * s->page_bytes * s->pages;
        s->ops->copy(layer + page * s->page_bytes, layer + *tail * s->page_bytes, (size_t)s->page_bytes);
    }
    leave_page(s, *tail);
    s->owners[page] = 1;
    *tail = page;
}

/* Give every row the pages it will write to.  All or nothing. */
static Status take_pages(Session *s, const int *rows, const int *counts, int R) {
    int needed = session_pages_needed(s, rows, counts, R);
    if (needed > s->n_free)
        return failed(s->error, CACHE_FULL, "the cache is full: %d more pages of %d tokens needed, %d of %d free",
                      needed, KEY_BLOCK, s->n_free, s->pages);
    for (int i = 0; i < R; i++) {
        Row *r = &s->rows[rows[i]];
        if (!reserve(r, pages_for(r->length + counts[i])))
            return failed(s->error, NO_MEMORY, "a row's list of pages: no memory");
    }
    for (int i = 0; i < R; i++) {
        Row *r = &s->rows[rows[i]];
        int tail = tail_of(r);
        if (tail >= 0 && s->owners[tail] > 1) copy_tail(s, r);
        while (r->n_pages < pages_for(r->length + counts[i])) {
            int page = s->free_pages[--s->n_free];
            s->owners[page] = 1;
            r->pages[r->n_pages++] = page;
        }
    }
    return OK;
}

/* ---- one slice of tokens through the layers ---------------------------------------------------------------------- */

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

/* Of the adapter of linear layer w; 0: it has none. */
static int width_of(const Session *s, int w) { return s->added.of.rank ? adapter_width(&s->added.of, w) : 0; }

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
        {&out->low, A * adapter_most(&s->added.of) * N},
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
    const Param *p = &s->layout.p[w];
    const int slot = w - P_qkv_w, R = width_of(s, w), prec = s->added.prec;
    s->ops->linear_packed(b->low, in, added_part(s, slot, ADAPTER_A, l), NULL, NULL, FN_NONE, prec, N, (int)p->columns,
                          R);
    s->ops->linear_packed(out, b->low, added_part(s, slot, ADAPTER_B, l), NULL, out, FN_NONE, prec, N, R, (int)p->rows);
}

/* As in model.c; where the layer has a function b->fc takes what comes before it. */
static void linear(const Session *s, const Slice *b, int w, int bias, int l, act *out, const act *in,
                   const act *residual, int fn, int N) {
    const Param *p = &s->layout.p[w];
    const int apart = width_of(s, w) && fn != FN_NONE;
    act *sum = apart ? b->fc : out;
    s->ops->linear_packed(sum, in, packed(s, w, l), weight(s, bias, l), residual, apart ? FN_NONE : fn, s->prec, N,
                          (int)p->columns, (int)p->rows);
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
                                   weight(s, bias, l), fn, s->prec, N, c->n_embd, (int)s->layout.p[w].rows);
        return;
    }
    if (c->norm == NORM_LAYERNORM)
        s->ops->layernorm_forward(b->norm, b->moments, rstd, in, g, h, c->norm_eps, N, c->n_embd);
    else s->ops->rmsnorm_forward(b->norm, rstd, in, g, c->norm_eps, N, c->n_embd);
    linear(s, b, w, bias, l, out, b->norm, NULL, fn, N);
}

static void embed(const Session *s, const Slice *b, int N) {
    const float *wpe = weight(s, P_wpe, 0);
    if (embeds_packed(s))
        s->ops->embedding_packed(b->x, b->tokens, b->starts, packed(s, P_wte, 0), wpe, s->prec, 1, N, s->c.n_embd);
    else
        s->ops->embedding_forward(b->x, b->tokens, b->starts, weight(s, P_wte, 0), s->embedding_held, wpe, 1, N,
                                  s->c.n_embd);
}

/* As block_forward of model.c, nothing kept for a backward pass. */
static void block_forward(const Session *s, const Slice *b, int l, int N, int R, int pages) {
    const Config *c = &s->c;
    const Ops *ops = s->ops;
    int NH = c->n_head, NKV = c->n_kv_head, HS = c->head_size;
    char *layer = s->pool + l * s->page_bytes * s->pages;

    norm_linear(s, b, P_ln1_w, P_ln1_b, P_qkv_w, P_qkv_b, l, b->qkv, b->x, FN_NONE, N);
    if (c->pos == POS_ROPE) ops->rope_forward(b->qkv, s->cos, s->sin, b->starts, 1, N, NH, NKV, HS);
    ops->attention_paged(b->att, layer, b->qkv, b->table, b->first, b->past, s->cache_prec, R, pages, NH, NKV, HS);
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
        int past = s->rows[rows[*row]].length + *done, pages = pages_for(past + taken);
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
        const Row *r = &s->rows[rows[p->from[i]]];
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
    const int64_t A = (int64_t)s->ops->act_bytes, C = s->c.n_embd, V = s->c.vocab_size, Vp = s->layout.p[P_wte].rows;
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
    const int V = s->c.vocab_size, Vp = (int)s->layout.p[P_wte].rows;
    s->ops->norm_linear_packed(h->logits, h->hidden, h->moments, state, s->c.norm, weight(s, P_lnf_w, 0),
                               weight(s, P_lnf_b, 0), s->c.norm_eps, packed(s, head_param(&s->c), 0), NULL, FN_NONE,
                               s->prec, R, s->c.n_embd, Vp);
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
    if (!status) status = take_pages(s, rows, counts, R);
    head_layout(s, &h, s->head, R);
    s->R = 0;
    if (!status) status = through_layers(s, &h, rows, counts, tokens, R);
    status = checked_device(s->ops, s->error, status);
    if (status) return status;
    for (int i = 0; i < R; i++) s->rows[rows[i]].length += counts[i], s->rows[rows[i]].version = s->version;
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
    const int V = s->c.vocab_size, Vp = (int)s->layout.p[P_wte].rows;
    Head h;
    Status status = R ? head_of_last(s, &h, "logits", R) : OK;
    if (status || !R) return status;
    if (s->ops->on_host) s->ops->act_read(logits, h.logits, R, V, Vp);
    else s->ops->copy_out(logits, h.floats, (size_t)R * (size_t)V * sizeof *logits);
    return checked_device(s->ops, s->error, OK);
}

Status session_draw(Session *s, int32_t *tokens, float *logprobs, float *sampled, const float *options, const double *u,
                    int V, int R) {
    const int of_model = s->c.vocab_size, Vp = (int)s->layout.p[P_wte].rows;
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
                            (int)s->layout.p[P_wte].rows);
    s->ops->copy_out(logprobs, h.logprobs, (size_t)R * sizeof *logprobs);
    return checked_device(s->ops, s->error, OK);
}

/* weights.c -- see weights.h. */
#include "weights.h"

/* ---- where they lie ---------------------------------------------------------------------------------------------- */

static int is_packed(const Weights *w, int i) {
    if (i == P_wte && w->prec == PREC_INT8) return 1;
    return i == P_qkv_w || i == P_proj_w || i == P_fc_w || i == P_fc2_w || i == head_param(&w->c);
}

/* Where packing has not rounded the embedding to less than the model's precision, it need not exist twice. */
int weights_embeds_packed(const Weights *w) { return is_packed(w, P_wte) && w->prec != PREC_BF16; }

static int is_plain(const Weights *w, int i) {
    return w->layout.p[i].floats && (i == P_wte ? !weights_embeds_packed(w) : !is_packed(w, i));
}

static int layers_of(const Weights *w, int i) { return w->layout.p[i].where == LAYERED ? w->c.n_layer : 1; }

/* Where each packed matrix lies, layer after layer of one parameter behind those of another. */
static void pack_layout(Weights *w) {
    int64_t at = 0;
    for (int i = 0; i < N_PARAMS; i++) {
        const Param *p = &w->layout.p[i];
        if (!is_packed(w, i)) continue;
        w->packed_at[i] = at;
        w->packed_layer[i] = aligned(w->ops->packed_bytes(w->prec, (int)p->columns, (int)p->rows));
        at += w->packed_layer[i] * layers_of(w, i);
    }
    w->packed_bytes = at;
}

/* Likewise what is not packed, in a block of the session's own; returns its bytes.  NULL: only they are wanted. */
static int64_t own_layout(Weights *w, float *own) {
    int64_t at = 0;
    for (int i = 0; i < N_PARAMS; i++) {
        if (!is_plain(w, i)) continue;
        int64_t bytes = aligned(w->layout.p[i].floats * (int64_t)sizeof(float));
        w->plain[i] = own ? own + at / (int64_t)sizeof(float) : NULL;
        w->plain_layer[i] = bytes / (int64_t)sizeof(float);
        at += bytes * layers_of(w, i);
    }
    return at;
}

const float *weights_plain(const Weights *w, int i, int l) {
    return w->layout.p[i].floats ? w->plain[i] + l * w->plain_layer[i] : NULL;
}

char *weights_packed(const Weights *w, int i, int l) { return w->packed + w->packed_at[i] + l * w->packed_layer[i]; }

/* ---- an adapter -------------------------------------------------------------------------------------------------- */

static void free_added(Weights *w) {
    if (w->added.packed) w->ops->free(w->added.packed, (size_t)w->added.bytes);
    if (w->added.dense) w->ops->free(w->added.dense, (size_t)w->added.dense_bytes);
    w->added = (Added){0};
}

/* Where each part lies; products of an adapter are not rounded to int8. */
static Status place_added(Weights *w, const Adapter *adapter) {
    Added *a = &w->added;
    *a = (Added){.of = *adapter, .prec = w->prec == PREC_INT8 ? PREC_BF16 : w->prec};
    for (int slot = 0; slot < LINEARS; slot++) {
        const Param *p = &w->layout.p[P_qkv_w + slot];
        int R = adapter_width(adapter, P_qkv_w + slot);
        a->at[slot][ADAPTER_A] = a->layer;
        a->layer += aligned(w->ops->packed_bytes(a->prec, (int)p->columns, R));
        a->at[slot][ADAPTER_B] = a->layer;
        a->layer += aligned(w->ops->packed_bytes(a->prec, R, (int)p->rows));
    }
    a->bytes = a->layer * w->c.n_layer;
    a->dense_bytes = adapter_dense(adapter, &w->layout) * (int64_t)sizeof(float);
    Status status = allocate(w->ops, w->error, (void **)&a->packed, a->bytes, "packed adapter");
    if (!status) status = allocate(w->ops, w->error, (void **)&a->dense, a->dense_bytes, "adapter");
    if (status) free_added(w);
    return status;
}

int weights_added_width(const Weights *w, int i) { return w->added.of.rank ? adapter_width(&w->added.of, i) : 0; }

char *weights_added(const Weights *w, int i, int part, int l) {
    return w->added.packed + l * w->added.layer + w->added.at[i - P_qkv_w][part];
}

static Status load_added(Weights *w, Model *m) {
    const Adapter *a = model_adapter(m);
    if (!a) return OK;
    Status status = w->added.of.rank ? OK : place_added(w, a);
    for (int slot = 0; slot < LINEARS && !status; slot++) {
        const int i = P_qkv_w + slot, R = adapter_width(a, i);
        const int C = (int)w->layout.p[i].columns, OC = (int)w->layout.p[i].rows;
        for (int l = 0; R && l < w->c.n_layer; l++) {
            const float *A = layout_at(&a->layout, model_added(m), 2 * slot + ADAPTER_A, l),
                        *B = layout_at(&a->layout, model_added(m), 2 * slot + ADAPTER_B, l);
            w->ops->linear_pack(weights_added(w, i, ADAPTER_A, l), A, w->added.prec, C, R);
            w->ops->lora_spread(w->added.dense, B, model_groups(m, slot), a->scale, a->J[slot], a->rank, OC);
            w->ops->linear_pack(weights_added(w, i, ADAPTER_B, l), w->added.dense, w->added.prec, R, OC);
        }
    }
    return status;
}

/* ---- weights of a model ------------------------------------------------------------------------------------------ */

/* Rows of one tensor of the model's block, held so, packed in parts: each is made floats first. */
static void pack_held(Weights *w, char *to, const char *from, const Param *p) {
    const int C = (int)p->columns;
    for (int64_t row = 0; row < p->rows; row += PACK_ROWS) {
        int n = (int)(p->rows - row < PACK_ROWS ? p->rows - row : PACK_ROWS);
        w->ops->held_read(w->part, from + w->ops->held_bytes(p->held, C, (int)row), p->held, C, n);
        w->ops->linear_pack(to + w->ops->packed_bytes(w->prec, C, (int)row), w->part, w->prec, C, n);
    }
}

static Status allocate_part(Weights *w) {
    int64_t most = 0;
    for (int i = 0; i < N_PARAMS; i++)
        if (is_packed(w, i) && w->layout.p[i].columns > most) most = w->layout.p[i].columns;
    w->part_bytes = most * PACK_ROWS * (int64_t)sizeof(float);
    return allocate(w->ops, w->error, (void **)&w->part, w->part_bytes, "weights that wait to be packed");
}

static void free_part(Weights *w) {
    if (w->part) w->ops->free(w->part, (size_t)w->part_bytes);
    w->part = NULL;
}

Status weights_load(Weights *w, Model *m) {
    const int held = model_held(m);
    const Layout from = held_layout(&w->c, w->ops, held);
    Status status = held == PREC_FP32 ? OK : allocate_part(w);
    if (!status) status = load_added(w, m);
    for (int i = 0; i < N_PARAMS && !status; i++) {
        const Param *p = &from.p[i];
        w->plain[i] = model_weights(m) + p->offset;
        w->plain_layer[i] = from.layer_floats;
        for (int l = 0; is_packed(w, i) && l < layers_of(w, i); l++) {
            const float *values = weights_plain(w, i, l);
            char *to = weights_packed(w, i, l);
            if (p->held == PREC_FP32) w->ops->linear_pack(to, values, w->prec, (int)p->columns, (int)p->rows);
            else pack_held(w, to, (const char *)values, p);
        }
    }
    w->embedding_held = held;
    free_part(w);
    return status;
}

/* ---- weights in parts -------------------------------------------------------------------------------------------- */

Status weights_begin(Weights *w) {
    w->own_bytes = own_layout(w, NULL);
    Status status = allocate(w->ops, w->error, (void **)&w->own, w->own_bytes, "weights that are not packed");
    if (!status) status = allocate_part(w);
    if (!status) own_layout(w, w->own);
    return status;
}

typedef struct {
    int param, layer;
    int64_t at; /* floats from the begin of the layer's tensor */
} Place;

/* What lies at this offset of a block of weights. */
static Place place_of(const Weights *w, int64_t offset) {
    for (int i = 0;; i++) {
        const Param *p = &w->layout.p[i];
        int64_t at = offset - p->offset, layer = 0;
        if (p->where == LAYERED && at >= 0) layer = at / w->layout.layer_floats, at %= w->layout.layer_floats;
        if (at >= 0 && at < p->floats && layer < layers_of(w, i)) return (Place){i, (int)layer, at};
    }
}

/* Rows of a matrix gather in w->part; as many as can be packed together, and the last ones, are packed. */
static void gather(Weights *w, Place to, const float *values, int64_t floats) {
    const Param *p = &w->layout.p[to.param];
    const int64_t C = p->columns, V = w->c.vocab_size, real = is_vocabulary(to.param) ? V : p->rows;
    int64_t row = to.at / C, end = row + floats / C;
    while (row < end) {
        int64_t first = row / PACK_ROWS * PACK_ROWS, stop = first + PACK_ROWS < real ? first + PACK_ROWS : real;
        int64_t n = (end < stop ? end : stop) - row;
        w->ops->copy_in(w->part + (row - first) * C, values, (size_t)(n * C) * sizeof(float));
        values += n * C, row += n;
        if (row < stop) break;
        if (stop == real) { /* the padding of the vocabulary is zero */
            w->ops->zero(w->part + (real - first) * C, (size_t)((p->rows - real) * C) * sizeof(float));
            stop = p->rows;
        }
        char *to_rows = weights_packed(w, to.param, to.layer) + w->ops->packed_bytes(w->prec, (int)C, (int)first);
        w->ops->linear_pack(to_rows, w->part, w->prec, (int)C, (int)(stop - first));
    }
}

void weights_put(Weights *w, int64_t offset, const float *values, int64_t floats) {
    Place to = place_of(w, offset);
    if (is_plain(w, to.param)) {
        float *own = (float *)weights_plain(w, to.param, to.layer) + to.at;
        w->ops->copy_in(own, values, (size_t)floats * sizeof(float));
    }
    if (is_packed(w, to.param)) gather(w, to, values, floats);
}

void weights_end(Weights *w) { free_part(w); }

/* ---- life -------------------------------------------------------------------------------------------------------- */

Status weights_create(Weights *w, const Config *c, const Ops *ops, int prec, char *error) {
    *w = (Weights){.c = *c, .ops = ops, .error = error, .prec = prec, .layout = param_layout(c)};
    pack_layout(w);
    return allocate(ops, error, (void **)&w->packed, w->packed_bytes, "packed weights");
}

void weights_free(Weights *w) {
    if (w->packed) w->ops->free(w->packed, (size_t)w->packed_bytes);
    if (w->own) w->ops->free(w->own, (size_t)w->own_bytes);
    free_part(w);
    free_added(w);
}

void weights_bytes(const Config *c, const Ops *ops, int prec, int64_t *packed, int64_t *plain) {
    Weights w = {.c = *c, .ops = ops, .prec = prec, .layout = param_layout(c)};
    pack_layout(&w);
    *packed = w.packed_bytes, *plain = own_layout(&w, NULL);
}

/* model_create.c -- the memory of a model: how much it takes, its creation, an adapter that joins it, its end. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "model.h"
#include "philox.h"

/* ---- how much memory it takes ------------------------------------------------------------------------------------ */

typedef struct {
    int kept; /* ONCE, LAYERS, BODY, AGAIN, NARROW */
    int64_t bytes;
} Need;

static int64_t kept_bytes(const Need *needs, int kept) {
    int64_t bytes = 0;
    for (int i = 0; i < A_logits; i++)
        if (needs[i].kept == kept) bytes += needs[i].bytes;
    return bytes;
}

/* What the body alone uses lies where the head has its logits: they take turns. */
static void place(Buffers *b, const Need *needs, int64_t layers) {
    int64_t body_bytes = kept_bytes(needs, BODY), body = 0;
    b->bytes = body_bytes > b->head_bytes ? body_bytes : b->head_bytes;
    for (int i = 0; i < A_logits; i++) {
        int64_t *end = needs[i].kept == BODY ? &body : &b->bytes;
        b->offset[i] = *end;
        b->stride[i] = needs[i].kept == LAYERS && layers > 1 ? needs[i].bytes : 0;
        *end += needs[i].bytes + (layers - 1) * b->stride[i];
    }
}

Buffers model_buffers(const Config *c, const Ops *ops, int prec, const Adapter *adapter, int64_t N, int training) {
    LIST_SIZES;
    const int64_t A = (int64_t)ops->act_bytes, LOW = adapter_total(adapter), LOW_MOST = adapter_most(adapter);
    Need needs[A_logits] = {
#define ACT_(field, kept, bytes, ...) [A_##field] = {kept, bytes},
#include "model.def"
#define GRAD_(field, kept, bytes) [A_##field] = {kept, training ? bytes : 0},
#include "model.def"
    };
    for (int i = 0; i < A_logits; i++) needs[i].bytes = aligned(N * needs[i].bytes);
    Buffers b = {.head_bytes = (N < ops->head_rows ? N : ops->head_rows) * Vp * A};
    b.recomputes = training && L * kept_bytes(needs, AGAIN) > ops->recompute_above;
    b.narrows = b.recomputes && prec == PREC_BF16 && ops->act_bytes == sizeof(float);
    for (int i = 0; i < A_logits; i++) {
        if (needs[i].kept == AGAIN) needs[i].kept = b.recomputes ? BODY : LAYERS;
        if (needs[i].kept == NARROW) needs[i].kept = b.narrows ? BODY : LAYERS;
    }
    if (!b.narrows) needs[A_narrow].bytes = 0;
    place(&b, needs, training ? L : 1);
    return b;
}

static int64_t low_bytes(const Ops *ops, const Layout *y, int held) {
    return ops->rounds_weights && held == PREC_FP32 ? ops->held_bytes(PREC_BF16, LOW_ROW, low_rows(y)) : 0;
}

Memory model_memory(const Config *c, const Ops *ops, int prec, int B, int T, int training, int held, const Lora *lora) {
    Layout y = held_layout(c, ops, held);
    Adapter a = lora ? adapter_of(c, lora->rank, lora->scale, lora->chosen) : (Adapter){0};
    Buffers b = model_buffers(c, ops, prec, &a, (int64_t)B * T, training);
    int64_t base = y.floats * (int64_t)sizeof(float), added = a.layout.floats * (int64_t)sizeof(float);
    int64_t trained = !training ? 0 : lora ? added : base;
    return (Memory){
        .weights = base + low_bytes(ops, &y, held) + added,
        .gradients = trained,
        .moments = 2 * trained,
        .activations = b.bytes - b.head_bytes + 2 * adapter_dense(&a, &y) * (int64_t)sizeof(float),
        .head = b.head_bytes,
        .tables = rope_bytes(c),
    };
}

/* ---- what it has ------------------------------------------------------------------------------------------------- */

const char *model_error(const Model *m) { return m->error; }
const Config *model_config(const Model *m) { return &m->c; }
void model_set_poll(Model *m, int (*poll)(void)) { m->poll = poll; }
float *model_weights(Model *m) { return m->base.weights; }
int model_held(const Model *m) { return m->held; }
const Adapter *model_adapter(const Model *m) { return m->adapter.rank ? &m->adapter : NULL; }
float *model_added(Model *m) { return m->added.weights; }
const int32_t *model_groups(const Model *m, int slot) { return m->groups[slot]; }
int model_has_moments(const Model *m) { return m->trained && m->trained->m; }
int64_t model_version(const Model *m) { return m->version; }
const Ops *model_ops(const Model *m) { return m->ops; }
int model_precision(const Model *m) { return m->prec; }
int64_t model_step(const Model *m) { return m->step; }
double model_loss(const Model *m) { return m->loss; }
void model_set_step(Model *m, int64_t step) { m->step = step; }

/* ---- creation ---------------------------------------------------------------------------------------------------- */

int64_t model_widest(const Layout *y) {
    int64_t most = PART;
    for (int i = 0; i < y->n; i++)
        if (y->p[i].columns > most) most = y->p[i].columns;
    return most;
}

/* GPT-2's initial values (Radford et al. 2019): normal with 0.02; what feeds the residual stream less by sqrt(2 L).
 * `host`: room for PART values, or a row. */
static void draw_tensor(Model *m, float *host, int i, int l, uint64_t seed) {
    const Param *p = &m->base.layout.p[i];
    const float residual = 0.02f / sqrtf(2.0f * (float)m->c.n_layer);
    int64_t columns = p->columns ? p->columns : 1, at_once = PART / columns < 1 ? 1 : PART / columns;
    int64_t rows = is_vocabulary(i) ? m->c.vocab_size : p->rows; /* the padding of the vocabulary stays zero */
    for (int64_t row = 0; row < rows; row += at_once) {
        int64_t n = (rows - row < at_once ? rows - row : at_once) * columns;
        if (p->init == ONE)
            for (int64_t j = 0; j < n; j++) host[j] = 1;
        else
            philox_normal(host, row * columns, n, p->init == RESIDUAL ? residual : 0.02f, seed, STREAM_INIT,
                          (uint64_t)l << 32 | (uint64_t)i);
        Tensor t = {.param = i, .layer = l, .row = 0, .columns = p->columns};
        if (model_put(m, WEIGHTS, &t, row, host, n / columns)) return;
    }
}

static Status initial_weights(Model *m, uint64_t seed) {
    float *host = malloc((size_t)model_widest(&m->base.layout) * sizeof *host);
    if (!host) return failed(m->error, NO_MEMORY, "initial weights: no memory");
    for (int i = 0; i < N_PARAMS; i++) {
        const Param *p = &m->base.layout.p[i];
        for (int l = 0; p->init != ZERO && p->floats && l < (p->where == LAYERED ? m->c.n_layer : 1); l++)
            draw_tensor(m, host, i, l, seed);
    }
    free(host);
    return OK;
}

Model *model_create(const Config *c, const Ops *ops, int prec, int held, const uint64_t *seed, char *error, int size) {
    Model *m = calloc(1, sizeof *m);
    if (!m) {
        snprintf(error, (size_t)size, "no memory");
        return NULL;
    }
    *m = (Model){.c = *c, .ops = ops, .prec = prec, .held = held, .low_stale = 1, .repeats = {.ops = ops}};
    const Layout layout = held_layout(c, ops, held);
    Status s = block_create(&m->base, ops, &layout, c->n_layer, m->error);
    const int64_t low = low_bytes(ops, &layout, held);
    if (!s && low) s = allocate(ops, m->error, &m->low, low, "weights in bf16");
    m->base.rounded = m->low;
    if (!s && c->pos == POS_ROPE) s = rope_tables(c, ops, m->error, &m->cos, &m->sin);
    if (!s && seed) s = initial_weights(m, *seed);
    if (held == PREC_FP32) m->trained = &m->base;
    if (!s) return m;
    snprintf(error, (size_t)size, "%s", m->error);
    model_free(m);
    return NULL;
}

static size_t dense_bytes(const Model *m) {
    return (size_t)adapter_dense(&m->adapter, &m->base.layout) * sizeof(float);
}

static size_t groups_bytes(const Model *m, int slot) {
    return (size_t)m->adapter.J[slot] * sizeof m->adapter.rows[slot][0];
}

static void free_adapter(Model *m) {
    if (m->dense) m->ops->free(m->dense, dense_bytes(m));
    if (m->ddense) m->ops->free(m->ddense, dense_bytes(m));
    for (int slot = 0; slot < LINEARS; slot++)
        if (m->groups[slot]) m->ops->free(m->groups[slot], groups_bytes(m, slot)), m->groups[slot] = NULL;
    m->dense = m->ddense = NULL;
    block_free(&m->added);
    m->adapter = (Adapter){0};
}

void model_free(Model *m) {
    if (!m) return;
    repeats_forget(&m->repeats);
    free_adapter(m);
    if (m->low) m->ops->free(m->low, (size_t)low_bytes(m->ops, &m->base.layout, m->held));
    block_free(&m->base);
    if (m->cos) m->ops->free(m->cos, (size_t)rope_bytes(&m->c));
    if (m->arena) m->ops->free(m->arena, (size_t)m->arena_bytes);
    free(m);
}

/* ---- an adapter -------------------------------------------------------------------------------------------------- */

/* As in PEFT: A uniform within 1 / sqrt(C) (He et al. 2015 with a = sqrt(5)), B zero, so that it begins without effect.
 */
static Status initial_adapter(Model *m, uint64_t seed) {
    int n = adapter_tensors(&m->c, &m->adapter, NULL);
    Tensor *all = malloc((size_t)n * sizeof *all);
    float *host = malloc((size_t)(m->adapter.rank * model_widest(&m->base.layout)) * sizeof *host);
    Status s = all && host ? OK : failed(m->error, NO_MEMORY, "initial adapter: no memory");
    if (!s) adapter_tensors(&m->c, &m->adapter, all);
    for (int i = 0; i < n && !s; i += 2) { /* the A's */
        const int64_t values = all[i].rows * all[i].columns;
        const double bound = 1 / sqrt((double)all[i].columns);
        for (int64_t j = 0; j < values; j++)
            host[j] = (float)(bound * (2 * philox_uniform(seed, STREAM_ADAPTER, (uint64_t)i, (uint64_t)j) - 1));
        m->ops->copy_in(m->added.weights + all[i].offset, host, (size_t)values * sizeof *host);
    }
    free(all);
    free(host);
    return s;
}

static Status allocate_adapter(Model *m) {
    Status s = block_create(&m->added, m->ops, &m->adapter.layout, m->c.n_layer, m->error);
    for (int slot = 0; slot < LINEARS && !s; slot++) {
        if (!m->adapter.J[slot]) continue;
        s = allocate(m->ops, m->error, (void **)&m->groups[slot], (int64_t)groups_bytes(m, slot), "adapter");
        if (!s) m->ops->copy_in(m->groups[slot], m->adapter.rows[slot], groups_bytes(m, slot));
    }
    if (!s) s = allocate(m->ops, m->error, (void **)&m->dense, (int64_t)dense_bytes(m), "adapter");
    if (!s) s = allocate(m->ops, m->error, (void **)&m->ddense, (int64_t)dense_bytes(m), "adapter");
    return s;
}

Status model_adapt(Model *m, const Lora *lora, uint64_t seed) {
    m->adapter = adapter_of(&m->c, lora->rank, lora->scale, lora->chosen);
    Status s = allocate_adapter(m);
    if (!s) s = initial_adapter(m, seed);
    if (s) {
        free_adapter(m);
        return s;
    }
    repeats_forget(&m->repeats);
    Block base = m->base; /* its gradients and moments are not needed any more */
    m->base.grads = m->base.m = m->base.v = NULL, m->base.live = 0;
    if (base.grads) m->ops->free(base.grads, (size_t)base.layout.floats * sizeof(float));
    if (base.m) m->ops->free(base.m, 2 * (size_t)base.layout.floats * sizeof(float));
    m->trained = &m->added;
    m->step = 0, m->kept = 0, m->version++;
    return OK;
}

/* model.c -- one transformer: forward, backward, update.
 *
 * It does no arithmetic on numbers of the model: it walks the layers through the operator table, so one text serves
 * GPT-2 and Llama on every backend.  Parameters and activations are listed in model.def.  Either all parameters are
 * trained, or those of an adapter (adapter.h) alone; then nothing else has gradients. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "adapter.h"
#include "block.h"
#include "philox.h"
#include "repeat.h"
#include "status.h"

/* ---- the arena ----------------------------------------------------------------------------------------------------
 */

enum {
#define ACT_(field, ...) A_##field,
#include "model.def"
    N_ACTS,
    BEFORE_GRADS = N_ACTS - 1,
#define GRAD_(field, ...) A_##field,
#include "model.def"
    A_logits,
    N_BUFFERS
};

typedef struct {
    int64_t offset[N_BUFFERS], stride[N_BUFFERS], bytes, head_bytes; /* stride: from one layer to the next */
} Buffers;

/* Where each activation lies in the arena for N tokens.  Inference keeps one layer. */
static Buffers buffer_layout(const Config *c, const Ops *ops, const Adapter *adapter, int64_t N, int training) {
    LIST_SIZES;
    const int64_t A = (int64_t)ops->act_bytes, LOW = adapter_total(adapter), LOW_MOST = adapter_most(adapter);
    const struct {
        int layered;
        int64_t bytes;
    } list[N_BUFFERS] = {
#define ACT_(field, layered_, bytes_, ...) [A_##field] = {layered_, bytes_},
#include "model.def"
#define GRAD_(field, bytes_) [A_##field] = {0, training ? bytes_ : 0},
#include "model.def"
    };
    Buffers b = {.bytes = 0};
    for (int i = 0; i < N_BUFFERS; i++) {
        int64_t bytes = aligned(N * list[i].bytes);
        if (i == A_logits) bytes = b.head_bytes = (N < ops->head_rows ? N : ops->head_rows) * Vp * A;
        b.offset[i] = b.bytes;
        b.stride[i] = list[i].layered && training ? bytes : 0;
        b.bytes += bytes + (L - 1) * b.stride[i];
    }
    return b;
}

/* The base's weights in bf16, at the same places, where the backend's products want them so and an update changes them;
 * as a matrix of rows that every tensor has a whole number of. */
enum { LOW_ROW = ALIGN_BYTES / sizeof(float), LOW_VALUE = sizeof(uint16_t) };
static int low_rows(const Layout *y) { return (int)(y->floats / LOW_ROW); }
static int64_t low_bytes(const Ops *ops, const Layout *y, int held) {
    return ops->rounds_weights && held == PREC_FP32 ? ops->held_bytes(PREC_BF16, LOW_ROW, low_rows(y)) : 0;
}

Memory model_memory(const Config *c, const Ops *ops, int B, int T, int training, int held, const Lora *lora) {
    Layout y = held_layout(c, ops, held);
    Adapter a = lora ? adapter_of(c, lora->rank, lora->scale, lora->chosen) : (Adapter){0};
    Buffers b = buffer_layout(c, ops, &a, (int64_t)B * T, training);
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

/* ---- the model --------------------------------------------------------------------------------------------------- */

struct Model {
    Config c;
    const Ops *ops;
    int prec, held; /* of products; how the base's matrices lie in memory */
    Block base, added;
    Adapter adapter; /* of rank 0: none; its values are `added` */
    float *dense, *ddense;
    int32_t *groups[LINEARS]; /* the adapter's rows, in the backend's memory */
    Block *trained;           /* base, added, or NULL */
    void *low;                /* see low_bytes; NULL where there is none */
    int low_stale;            /* weights were written since it was */
    int64_t step, version;
    double loss; /* of the last update */
    Repeats repeats;
    float *cos, *sin;

    char *arena;
    int64_t arena_bytes;
    Buffers b;
    int B, T, kept, has_starts; /* of the last forward; kept: backward may follow */
    float invtemp;

    int (*poll)(void);
    char error[ERROR_ROOM];
};

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

/* A device is only told what to do, which takes no time; and what is recorded is recorded whole. */
static int interrupted(const Model *m) { return m->ops->on_host && m->poll && m->poll(); }

static void *buffer(const Model *m, int i, int l) { return m->arena + m->b.offset[i] + l * m->b.stride[i]; }

/* Tensors of layer l; NULL where one does not exist or is not trained, which turns the operator's option off. */
#define WEIGHT(field) layout_at(&m->base.layout, m->base.weights, P_##field, l)
#define GRAD(field) layout_at(&m->base.layout, m->base.grads, P_##field, l)
#define AT(field) buffer(m, A_##field, l)

/* ---- creation ---------------------------------------------------------------------------------------------------- */

enum { PART = 1 << 20 }; /* values of a tensor that are on their way at a time */

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

static int64_t widest(const Layout *y) {
    int64_t most = PART;
    for (int i = 0; i < y->n; i++)
        if (y->p[i].columns > most) most = y->p[i].columns;
    return most;
}

static Status initial_weights(Model *m, uint64_t seed) {
    float *host = malloc((size_t)widest(&m->base.layout) * sizeof *host);
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
    float *host = malloc((size_t)(m->adapter.rank * widest(&m->base.layout)) * sizeof *host);
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

/* ---- reading and writing weights --------------------------------------------------------------------------------- */

/* A tensor's row in a block, and how it is held there; the block is made where it does not exist yet. */
static Status row_of(Model *m, int block, const Tensor *t, int64_t row, char **p, int *held) {
    const int C = t->columns ? (int)t->columns : 1;
    float *floats = m->added.weights, *moments[2];
    *held = block == WEIGHTS ? m->base.layout.p[t->param].held : PREC_FP32;
    if (block == WEIGHTS) {
        *p = (char *)layout_at(&m->base.layout, m->base.weights, t->param, t->layer) +
             m->ops->held_bytes(*held, C, (int)(t->row + row));
        return OK;
    }
    Status s = OK;
    if (block == GRADIENTS) s = model_grads(m, &floats);
    if (block == FIRST_MOMENT || block == SECOND_MOMENT) {
        s = model_moments(m, moments);
        if (!s) floats = moments[block - FIRST_MOMENT];
    }
    if (!s) *p = (char *)(floats + t->offset + row * C);
    return s;
}

Status model_put(Model *m, int block, const Tensor *t, int64_t row, const float *values, int64_t rows) {
    const int C = t->columns ? (int)t->columns : 1;
    const int64_t bytes = rows * C * (int64_t)sizeof(float);
    char *p;
    int held;
    Status s = row_of(m, block, t, row, &p, &held);
    if (s) return s;
    if (block == WEIGHTS) m->low_stale = 1;
    if (held == PREC_FP32) {
        m->ops->copy_in(p, values, (size_t)bytes);
        return checked_device(m->ops, m->error, OK);
    }
    float *part;
    if ((s = allocate(m->ops, m->error, (void **)&part, bytes, "part of a weight"))) return s;
    m->ops->copy_in(part, values, (size_t)bytes);
    m->ops->held_write(p, part, held, C, (int)rows);
    m->ops->free(part, (size_t)bytes);
    return checked_device(m->ops, m->error, OK);
}

Status model_get(Model *m, int block, const Tensor *t, int64_t row, float *values, int64_t rows) {
    const int C = t->columns ? (int)t->columns : 1;
    const int64_t bytes = rows * C * (int64_t)sizeof(float);
    char *p;
    int held;
    Status s = row_of(m, block, t, row, &p, &held);
    if (s) return s;
    if (held == PREC_FP32) {
        m->ops->copy_out(values, p, (size_t)bytes);
        return checked_device(m->ops, m->error, OK);
    }
    float *part;
    if ((s = allocate(m->ops, m->error, (void **)&part, bytes, "part of a weight"))) return s;
    m->ops->held_read(part, p, held, C, (int)rows);
    m->ops->copy_out(values, part, (size_t)bytes);
    m->ops->free(part, (size_t)bytes);
    return checked_device(m->ops, m->error, OK);
}

/* ---- what is not finite ------------------------------------------------------------------------------------------ */

/* The name of the tensor that holds the float at this offset of a block of floats. */
static void name_of(const Model *m, const Block *b, int64_t at, char name[64]) {
    const int added = b == &m->added;
    int n = added ? adapter_tensors(&m->c, &m->adapter, NULL) : model_tensors(&m->c, NULL);
    Tensor *all = malloc((size_t)n * sizeof *all);
    snprintf(name, 64, "value %" PRId64, at);
    if (all && added) adapter_tensors(&m->c, &m->adapter, all);
    else if (all) model_tensors(&m->c, all);
    for (int i = 0; all && i < n; i++)
        if (at >= all[i].offset && at < all[i].offset + all[i].rows * (all[i].columns ? all[i].columns : 1))
            snprintf(name, 64, "%s", all[i].name);
    free(all);
}

/* Name the first tensor of the block that holds a value which is not finite; 0 where there is none. */
static int find_not_finite(Model *m, Block *b, const float *values, char name[64]) {
    int64_t at = block_not_finite(b, values);
    if (at >= 0) name_of(m, b, at, name);
    return at >= 0;
}

/* The same for weights that are held otherwise than as floats: row by row. */
static int find_in_held(Model *m, char name[64]) {
    int n = model_tensors(&m->c, NULL), found = 0;
    Tensor *all = malloc((size_t)n * sizeof *all);
    float *row = malloc((size_t)widest(&m->base.layout) * sizeof *row);
    if (all && row) model_tensors(&m->c, all);
    for (int i = 0; all && row && i < n && !found; i++)
        for (int64_t r = 0; r < all[i].rows && !found; r++) {
            int64_t columns = all[i].columns ? all[i].columns : 1;
            if (model_get(m, WEIGHTS, &all[i], r, row, 1)) break;
            for (int64_t c = 0; c < columns && !found; c++) found = !isfinite(row[c]);
            if (found) snprintf(name, 64, "%s", all[i].name);
        }
    free(all);
    free(row);
    return found;
}

static int find_bad_weight(Model *m, char name[64]) {
    if (m->adapter.rank && find_not_finite(m, &m->added, m->added.weights, name)) return 1;
    return m->held == PREC_FP32 ? find_not_finite(m, &m->base, m->base.weights, name) : find_in_held(m, name);
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static void round_weights(Model *m) {
    if (m->low) m->ops->held_write(m->low, m->base.weights, PREC_BF16, LOW_ROW, low_rows(&m->base.layout));
    m->low_stale = 0;
}

static Status prepare(Model *m, int B, int T, int training) {
    m->kept = 0;
    m->b = buffer_layout(&m->c, m->ops, &m->adapter, (int64_t)B * T, training);
    m->B = B, m->T = T;
    if (m->low_stale) round_weights(m);
    if (m->b.bytes <= m->arena_bytes) return OK;
    repeats_forget(&m->repeats);
    if (m->arena) m->ops->free(m->arena, (size_t)m->arena_bytes);
    m->arena = NULL, m->arena_bytes = 0;
    char purpose[96];
    snprintf(purpose, sizeof purpose, "activations of B = %d, T = %d", B, T);
    Status s = allocate(m->ops, m->error, (void **)&m->arena, m->b.bytes, purpose);
    if (!s) m->arena_bytes = m->b.bytes;
    return s;
}

static void copy_ids(Model *m, void *dst, const int32_t *src) {
    m->ops->copy_in(dst, src, (size_t)m->B * (size_t)m->T * 4);
}

static const int32_t *starts_of(const Model *m) { return m->has_starts ? buffer(m, A_starts, 0) : NULL; }

static void norm_forward(const Model *m, act *out, float *mean, float *rstd, const act *in, const float *weight,
                         const float *bias) {
    int N = m->B * m->T, C = m->c.n_embd;
    if (m->c.norm == NORM_LAYERNORM) m->ops->layernorm_forward(out, mean, rstd, in, weight, bias, m->c.norm_eps, N, C);
    else m->ops->rmsnorm_forward(out, rstd, in, weight, m->c.norm_eps, N, C);
}

/* A weight as products read it. */
typedef struct {
    const void *p;
    int held;
} Weight;

static Weight weight_at(const Model *m, int i, int l) {
    const float *p = layout_at(&m->base.layout, m->base.weights, i, l);
    if (!m->low) return (Weight){p, m->base.layout.p[i].held};
    return (Weight){(const char *)m->low + (p - m->base.weights) * LOW_VALUE, PREC_BF16};
}

/* The adapter of linear layer w: its width; 0: it has none. */
static int width_of(const Model *m, int w) { return m->adapter.rank ? adapter_width(&m->adapter, w) : 0; }

static float *adapter_part(const Model *m, float *block, int w, int part, int l) {
    return layout_at(&m->adapter.layout, block, 2 * (w - P_qkv_w) + part, l);
}

/* `low` of linear layer w in layer l. */
static act *low_of(const Model *m, int w, int l) {
    size_t before = (size_t)m->B * (size_t)m->T * (size_t)adapter_before(&m->adapter, w);
    return (char *)AT(low) + before * m->ops->act_bytes;
}

/* The adapter's B's of linear layer w as one matrix. */
static const float *spread(const Model *m, int w, int l) {
    const int slot = w - P_qkv_w;
    m->ops->lora_spread(m->dense, adapter_part(m, m->added.weights, w, ADAPTER_B, l), m->groups[slot], m->adapter.scale,
                        m->adapter.J[slot], m->adapter.rank, (int)m->base.layout.p[w].rows);
    return m->dense;
}

/* out += what the adapter of linear layer w makes of `in` */
static void adapter_forward(const Model *m, int w, int l, act *out, const act *in) {
    const Param *p = &m->base.layout.p[w];
    const int N = m->B * m->T, C = (int)p->columns, OC = (int)p->rows, R = width_of(m, w);
    act *low = low_of(m, w, l);
    m->ops->linear_forward(low, NULL, in, adapter_part(m, m->added.weights, w, ADAPTER_A, l), PREC_FP32, NULL, NULL,
                           FN_NONE, m->prec, N, C, R);
    m->ops->linear_forward(out, NULL, low, spread(m, w, l), PREC_FP32, NULL, out, FN_NONE, m->prec, N, R, OC);
}

/* out = fn(in @ weight^T + bias) + residual of linear layer w, with its adapter.  pre: as in linear_forward. */
static void linear(const Model *m, int w, int b, int l, act *out, act *pre, const act *in, const act *residual,
                   int fn) {
    const Param *p = &m->base.layout.p[w];
    const int N = m->B * m->T, C = (int)p->columns, OC = (int)p->rows, adapted = width_of(m, w) > 0;
    const int apart = adapted && fn != FN_NONE; /* the adapter comes before the function */
    const Weight weight = weight_at(m, w, l);
    const float *bias = layout_at(&m->base.layout, m->base.weights, b, l);
    act *sum = apart ? pre : out;
    m->ops->linear_forward(sum, apart ? NULL : pre, in, weight.p, weight.held, bias, residual, apart ? FN_NONE : fn,
                           m->prec, N, C, OC);
    if (adapted) adapter_forward(m, w, l, sum, in);
    if (apart) m->ops->gelu_forward(out, pre, fn, N, OC);
}

/* x = x + attention(norm(x)); x = x + mlp(norm(x)).  Reads `residual` of layer l, writes `out`. */
static void block_forward(const Model *m, int l, act *out) {
    const Config *c = &m->c;
    const Ops *ops = m->ops;
    int B = m->B, T = m->T, NH = c->n_head, NKV = c->n_kv_head, HS = c->head_size;
    const int32_t *starts = starts_of(m);

    norm_forward(m, AT(ln1), AT(ln1_mean), AT(ln1_rstd), AT(residual), WEIGHT(ln1_w), WEIGHT(ln1_b));
    linear(m, P_qkv_w, P_qkv_b, l, AT(qkv), NULL, AT(ln1), NULL, FN_NONE);
    if (c->pos == POS_ROPE) ops->rope_forward(AT(qkv), m->cos, m->sin, starts, B, T, NH, NKV, HS);
    ops->attention_forward(AT(att), AT(lse), AT(qkv), starts, m->prec, B, T, NH, NKV, HS);
    linear(m, P_proj_w, P_proj_b, l, AT(mid), NULL, AT(att), AT(residual), FN_NONE);

    norm_forward(m, AT(ln2), AT(ln2_mean), AT(ln2_rstd), AT(mid), WEIGHT(ln2_w), WEIGHT(ln2_b));
    if (c->act == MLP_SWIGLU) {
        linear(m, P_fc_w, P_fc_b, l, AT(fc), NULL, AT(ln2), NULL, FN_NONE);
        ops->swiglu_forward(AT(fch), AT(fc), B * T, c->n_inner);
    } else {
        linear(m, P_fc_w, P_fc_b, l, AT(fch), AT(fc), AT(ln2), NULL, mlp_function(c));
    }
    linear(m, P_fc2_w, P_fc2_b, l, out, NULL, AT(fch), AT(mid), FN_NONE);
}

static void put_tokens(Model *m, const int32_t *tokens, const int32_t *starts) {
    copy_ids(m, buffer(m, A_tokens, 0), tokens);
    m->has_starts = starts != NULL;
    if (starts) copy_ids(m, buffer(m, A_starts, 0), starts);
}

/* Tokens to hidden states. */
static Status body_forward(void *context) {
    Model *m = context;
    const int l = 0, L = m->c.n_layer;
    m->ops->embedding_forward(AT(residual), AT(tokens), starts_of(m), WEIGHT(wte), m->held, WEIGHT(wpe), m->B, m->T,
                              m->c.n_embd);
    for (int i = 0; i < L; i++) {
        if (interrupted(m)) return INTERRUPTED;
        block_forward(m, i, i + 1 < L ? buffer(m, A_residual, i + 1) : AT(last));
    }
    norm_forward(m, AT(hidden), AT(lnf_mean), AT(lnf_rstd), AT(last), WEIGHT(lnf_w), WEIGHT(lnf_b));
    return OK;
}

/* ---- the head, in chunks of rows --------------------------------------------------------------------------------- */

typedef struct {
    int row, rows;
    act *hidden, *dhidden, *logits;
    int32_t *targets;
    float *logprobs, *lse, *entropy, *dlogprobs;
} Chunk;

static Chunk head_chunk(const Model *m, int row) {
    const int l = 0, N = m->B * m->T;
    size_t skip = (size_t)row * (size_t)m->c.n_embd * m->ops->act_bytes;
    return (Chunk){.row = row,
                   .rows = N - row < m->ops->head_rows ? N - row : m->ops->head_rows,
                   .hidden = (char *)AT(hidden) + skip,
                   .dhidden = (char *)AT(dnorm) + skip,
                   .logits = AT(logits),
                   .targets = (int32_t *)AT(targets) + row,
                   .logprobs = (float *)AT(logprobs) + row,
                   .lse = (float *)AT(head_lse) + row,
                   .entropy = (float *)AT(entropy) + row,
                   .dlogprobs = (float *)AT(dlogprobs) + row};
}

static int vocab_padded(const Model *m) { return (int)m->base.layout.p[P_wte].rows; }

static void chunk_logits(const Model *m, const Chunk *k) {
    const Weight head = weight_at(m, head_param(&m->c), 0);
    m->ops->linear_forward(k->logits, NULL, k->hidden, head.p, head.held, NULL, NULL, FN_NONE, m->prec, k->rows,
                           m->c.n_embd, vocab_padded(m));
}

static void chunk_logprobs(const Model *m, const Chunk *k, int entropy) {
    m->ops->logprob_forward(k->logprobs, k->lse, entropy ? k->entropy : NULL, k->logits, k->targets, m->invtemp,
                            k->rows, m->c.vocab_size, vocab_padded(m));
}

/* From the gradient of the chunk's logits: adds to the head's weight, and leaves the gradient of hidden in dnorm. */
static void chunk_backward(const Model *m, const Chunk *k, int has_dhidden) {
    const int C = m->c.n_embd, Vp = vocab_padded(m), add = m->trained->live || k->row > 0;
    const Weight head = weight_at(m, head_param(&m->c), 0);
    m->ops->linear_backward_input(k->dhidden, k->logits, has_dhidden ? k->dhidden : NULL, head.p, head.held, NULL,
                                  FN_NONE, m->prec, k->rows, C, Vp);
    if (m->base.grads)
        m->ops->linear_backward_weight(layout_at(&m->base.layout, m->base.grads, head_param(&m->c), 0), NULL, k->logits,
                                       k->hidden, add, m->prec, k->rows, C, Vp);
}

/* Floats that a row has one of. */
static void copy_floats_out(const Model *m, float *out, int buffer_) {
    if (out) m->ops->copy_out(out, buffer(m, buffer_, 0), (size_t)m->B * (size_t)m->T * sizeof(float));
}

static Status check_weights(Model *m) {
    char name[64];
    if (!find_bad_weight(m, name)) return OK;
    return failed(m->error, NOT_FINITE, "weights: %s holds a value that is not finite", name);
}

/* A row whose lse is not finite met a bad weight, or numbers that grew beyond fp32. */
static Status check_finite(Model *m) {
    const int N = m->B * m->T;
    float *lse = malloc((size_t)N * sizeof *lse);
    if (!lse) return failed(m->error, NO_MEMORY, "check of the logits: no memory");
    copy_floats_out(m, lse, A_head_lse);
    int bad = 0;
    while (bad < N && isfinite(lse[bad])) bad++;
    free(lse);
    if (bad == N) return OK;
    m->kept = 0;
    Status s = check_weights(m);
    return s ? s : failed(m->error, NOT_FINITE, "logits of row b = %d, t = %d are not finite", bad / m->T, bad % m->T);
}

/* ---- work that is the same in every step ---- */

enum { FORWARD, BACKWARD, UPDATE };

static Status pass_forward(Model *m) {
    const Repeat key = {.work = FORWARD, .B = m->B, .T = m->T, .has_starts = m->has_starts};
    return repeat(&m->repeats, &key, body_forward, m);
}

Status model_forward(Model *m, float *logprobs, float *hidden, float *entropy, const int32_t *tokens,
                     const int32_t *targets, const int32_t *starts, float temperature, int B, int T) {
    Status s = prepare(m, B, T, 1);
    if (s) return s;
    put_tokens(m, tokens, starts);
    copy_ids(m, buffer(m, A_targets, 0), targets);
    m->invtemp = 1 / temperature;
    if ((s = pass_forward(m))) return s;
    for (int row = 0; row < B * T; row += m->ops->head_rows) {
        if (interrupted(m)) return INTERRUPTED;
        Chunk k = head_chunk(m, row);
        chunk_logits(m, &k);
        chunk_logprobs(m, &k, entropy != NULL);
    }
    if ((s = check_finite(m))) return s;
    m->kept = 1;
    copy_floats_out(m, logprobs, A_logprobs);
    copy_floats_out(m, entropy, A_entropy);
    const int C = m->c.n_embd;
    if (hidden) s = read_acts(m->ops, m->error, hidden, buffer(m, A_hidden, 0), B * T, C, C);
    return checked_device(m->ops, m->error, s);
}

Status model_logits(Model *m, float *logits, const int32_t *tokens, const int32_t *starts, int last, int B, int T) {
    Status s = prepare(m, B, T, 0);
    if (s) return s;
    put_tokens(m, tokens, starts);
    if ((s = body_forward(m))) return s;
    const int V = m->c.vocab_size;
    /* one row at a time where only the last counts, else chunk by chunk */
    int step = last ? T : m->ops->head_rows;
    for (int row = last ? T - 1 : 0; row < B * T && !s; row += step) {
        if (interrupted(m)) return INTERRUPTED;
        Chunk k = head_chunk(m, row);
        if (last) k.rows = 1;
        chunk_logits(m, &k);
        s = read_acts(m->ops, m->error, logits, k.logits, k.rows, V, vocab_padded(m));
        logits += (int64_t)k.rows * V;
    }
    return checked_device(m->ops, m->error, s);
}

/* ---- backward ---------------------------------------------------------------------------------------------------- */

static void norm_backward(const Model *m, float *dweight, float *dbias, float *dbias_in, const act *in,
                          const float *weight, const float *mean, const float *rstd, const act *dres) {
    int N = m->B * m->T, C = m->c.n_embd;
    act *dout = buffer(m, A_dnorm, 0), *din = buffer(m, A_dres, 0);
    if (m->c.norm == NORM_LAYERNORM)
        m->ops->layernorm_backward(din, dweight, dbias, dbias_in, dout, dres, in, weight, mean, rstd, N, C);
    else m->ops->rmsnorm_backward(din, dweight, dbias_in, dout, dres, in, weight, rstd, N, C);
}

/* din += what reaches `in` through the adapter of linear layer w (NULL: it is not wanted); gradients of its A's and B's
 */
static void adapter_backward(const Model *m, int w, int l, act *din, const act *dout, const act *in) {
    const Param *p = &m->base.layout.p[w];
    const int N = m->B * m->T, C = (int)p->columns, OC = (int)p->rows, R = width_of(m, w), slot = w - P_qkv_w;
    const int add = m->added.live;
    const float *A = adapter_part(m, m->added.weights, w, ADAPTER_A, l);
    act *dlow = AT(dlow);
    m->ops->linear_backward_input(dlow, dout, NULL, spread(m, w, l), PREC_FP32, NULL, FN_NONE, m->prec, N, R, OC);
    m->ops->linear_backward_weight(m->ddense, NULL, dout, low_of(m, w, l), 0, m->prec, N, R, OC);
    m->ops->lora_gather(adapter_part(m, m->added.grads, w, ADAPTER_B, l), m->ddense, m->groups[slot], m->adapter.scale,
                        add, m->adapter.J[slot], m->adapter.rank, OC);
    if (din) m->ops->linear_backward_input(din, dlow, din, A, PREC_FP32, NULL, FN_NONE, m->prec, N, C, R);
    m->ops->linear_backward_weight(adapter_part(m, m->added.grads, w, ADAPTER_A, l), NULL, dlow, in, add, m->prec, N, C,
                                   R);
}

/* linear in reverse, without the residual: din = (dout @ weight) * fn'(pre), where `in` was fn(pre), and the gradients
 * of what is trained.  din, dbias NULL: not wanted, or made elsewhere. */
static void linear_backward(const Model *m, int w, int l, act *din, float *dbias, const act *dout, const act *in,
                            const act *pre, int fn) {
    const Param *p = &m->base.layout.p[w];
    const int N = m->B * m->T, C = (int)p->columns, OC = (int)p->rows, adapted = width_of(m, w) > 0;
    const int apart = adapted && fn != FN_NONE;
    const Weight weight = weight_at(m, w, l);
    if (din)
        m->ops->linear_backward_input(din, dout, NULL, weight.p, weight.held, apart ? NULL : pre, apart ? FN_NONE : fn,
                                      m->prec, N, C, OC);
    if (adapted) adapter_backward(m, w, l, din, dout, in);
    if (apart) m->ops->gelu_backward(din, din, pre, fn, N, C);
    if (m->base.grads)
        m->ops->linear_backward_weight(layout_at(&m->base.layout, m->base.grads, w, l), dbias, dout, in, m->base.live,
                                       m->prec, N, C, OC);
}

/* block_forward in reverse; dres holds the gradient of what the block wrote, and then of what it read.  The biases of
 * the two layers that write to the residual stream come out of the norms, which pass over its gradient anyway.  Below
 * an adapter's first layer nothing is trained. */
static void block_backward(const Model *m, int l) {
    const Config *c = &m->c;
    const Ops *ops = m->ops;
    int B = m->B, T = m->T, NH = c->n_head, NKV = c->n_kv_head, HS = c->head_size, ends = m->adapter.rank && l == 0;
    act *dres = AT(dres), *dnorm = AT(dnorm), *dfc = AT(dfc);

    if (c->act == MLP_SWIGLU) {
        linear_backward(m, P_fc2_w, l, AT(dfch), NULL, dres, AT(fch), NULL, FN_NONE);
        ops->swiglu_backward(dfc, AT(dfch), AT(fc), B * T, c->n_inner);
    } else {
        linear_backward(m, P_fc2_w, l, dfc, NULL, dres, AT(fch), AT(fc), mlp_function(c));
    }
    linear_backward(m, P_fc_w, l, dnorm, GRAD(fc_b), dfc, AT(ln2), NULL, FN_NONE);
    norm_backward(m, GRAD(ln2_w), GRAD(ln2_b), GRAD(proj_b), AT(mid), WEIGHT(ln2_w), AT(ln2_mean), AT(ln2_rstd), dres);

    linear_backward(m, P_proj_w, l, AT(datt), NULL, dres, AT(att), NULL, FN_NONE);
    ops->attention_backward(AT(dqkv), AT(datt), AT(qkv), AT(att), AT(lse), starts_of(m), m->prec, B, T, NH, NKV, HS);
    if (c->pos == POS_ROPE) ops->rope_backward(AT(dqkv), m->cos, m->sin, starts_of(m), B, T, NH, NKV, HS);
    linear_backward(m, P_qkv_w, l, ends ? NULL : dnorm, GRAD(qkv_b), AT(dqkv), AT(ln1), NULL, FN_NONE);
    if (ends) return;
    float *below = l > 0 ? layout_at(&m->base.layout, m->base.grads, P_fc2_b, l - 1) : NULL;
    norm_backward(m, GRAD(ln1_w), GRAD(ln1_b), below, AT(residual), WEIGHT(ln1_w), AT(ln1_mean), AT(ln1_rstd), dres);
}

static Status check_trained(Model *m) {
    if (m->trained) return OK;
    return failed(m->error, FROZEN, "the weights are held in less than fp32, so they are not trained; an adapter is");
}

static Status make_grads(Model *m) {
    Status s = check_trained(m);
    return s ? s : block_make_grads(m->trained, m->error);
}

/* Make ready what this backward pass will add to.  Matrices of the layers are written, not added to, by the first pass
 * of a step, and so is the head's where there are dlogprobs. */
static void clear_grads(Model *m, int head_is_written) {
    block_clear_grads(m->trained, head_is_written && m->trained == &m->base ? head_param(&m->c) : -1);
}

/* Gradients of hidden (in dnorm) down to the embedding. */
static Status body_backward(Model *m) {
    const int l = 0, L = m->c.n_layer;
    norm_backward(m, GRAD(lnf_w), GRAD(lnf_b), layout_at(&m->base.layout, m->base.grads, P_fc2_b, L - 1), AT(last),
                  WEIGHT(lnf_w), AT(lnf_mean), AT(lnf_rstd), NULL);
    for (int i = L - 1; i >= 0; i--) {
        if (interrupted(m)) return INTERRUPTED;
        block_backward(m, i);
    }
    if (m->base.grads)
        m->ops->embedding_backward(GRAD(wte), GRAD(wpe), AT(dres), AT(tokens), starts_of(m), m->B, m->T, m->c.n_embd,
                                   vocab_padded(m));
    return OK;
}

/* The second door: forward dropped the logits chunk by chunk, so they are computed again. */
static Status head_backward(Model *m, int has_dhidden) {
    for (int row = 0; row < m->B * m->T; row += m->ops->head_rows) {
        if (interrupted(m)) return INTERRUPTED;
        Chunk k = head_chunk(m, row);
        chunk_logits(m, &k);
        m->ops->logprob_backward(k.logits, k.dlogprobs, k.logits, k.targets, k.lse, m->invtemp, k.rows, m->c.vocab_size,
                                 vocab_padded(m));
        chunk_backward(m, &k, has_dhidden);
    }
    return OK;
}

/* The pass went through, or it was cut off: then the gradients, half made, are dropped. */
static Status end_backward(Model *m, Status s) {
    s = checked_device(m->ops, m->error, s);
    m->trained->live = s == OK;
    return s;
}

Status model_backward(Model *m, const float *dlogprobs, const float *dhidden, int64_t B, int64_t T) {
    const char *name = dlogprobs ? "dlogprobs" : "dhidden";
    if (!m->kept)
        return failed(m->error, NO_FORWARD, "backward: no forward pass is kept (forward comes first, logits drops it)");
    if (B != m->B) return failed(m->error, BAD_SHAPE, "%s: B is %" PRId64 ", the last forward has %d", name, B, m->B);
    if (T != m->T) return failed(m->error, BAD_SHAPE, "%s: T is %" PRId64 ", the last forward has %d", name, T, m->T);
    const int l = 0;
    size_t N = (size_t)m->B * (size_t)m->T;
    Status s = make_grads(m);
    if (s) return s;
    clear_grads(m, dlogprobs != NULL);
    if (dlogprobs) m->ops->copy_in(AT(dlogprobs), dlogprobs, N * sizeof(float));
    if (dhidden) s = write_acts(m->ops, m->error, AT(dnorm), dhidden, (int64_t)N * m->c.n_embd);
    if (dlogprobs && !s) s = head_backward(m, dhidden != NULL);
    if (!s) s = body_backward(m);
    return end_backward(m, s);
}

/* Head and backward pass of model_accumulate. */
static Status joint_backward(void *context) {
    Model *m = context;
    clear_grads(m, 1);
    Status s = OK;
    for (int row = 0; row < m->B * m->T && !s; row += m->ops->head_rows) {
        Chunk k = head_chunk(m, row);
        chunk_logits(m, &k);
        m->ops->logprob_forward_backward(k.logits, k.logprobs, k.lse, k.dlogprobs, k.logits, k.targets, m->invtemp,
                                         k.rows, m->c.vocab_size, vocab_padded(m));
        chunk_backward(m, &k, 0);
        if (interrupted(m)) s = INTERRUPTED;
    }
    m->ops->loss_add(block_loss(m->trained), buffer(m, A_logprobs, 0), buffer(m, A_dlogprobs, 0), m->B * m->T);
    return s ? s : body_backward(m);
}

Status model_accumulate(Model *m, const float *dlogprobs, const int32_t *tokens, const int32_t *targets,
                        const int32_t *starts, float temperature, int B, int T) {
    Status s = prepare(m, B, T, 1);
    if (!s) s = make_grads(m);
    if (s) return s;
    put_tokens(m, tokens, starts);
    copy_ids(m, buffer(m, A_targets, 0), targets);
    m->ops->copy_in(buffer(m, A_dlogprobs, 0), dlogprobs, (size_t)B * (size_t)T * sizeof(float));
    m->invtemp = 1 / temperature;
    if ((s = pass_forward(m))) return s; /* nothing was added yet: what earlier passes left stays */
    const Repeat key = {
        .work = BACKWARD, .B = B, .T = T, .has_starts = m->has_starts, .live = m->trained->live, .invtemp = m->invtemp};
    return end_backward(m, repeat(&m->repeats, &key, joint_backward, m));
}

Status model_forward_backward(Model *m, float *logprobs, const float *dlogprobs, const int32_t *tokens,
                              const int32_t *targets, const int32_t *starts, float temperature, int B, int T) {
    Status s = model_accumulate(m, dlogprobs, tokens, targets, starts, temperature, B, T);
    if (s) return s;
    copy_floats_out(m, logprobs, A_logprobs);
    return end_backward(m, check_finite(m));
}

/* ---- update ------------------------------------------------------------------------------------------------------ */

Status model_grads(Model *m, float **grads) {
    Status s = check_trained(m);
    if (!s) s = block_grads(m->trained, m->error);
    if (!s) *grads = m->trained->grads;
    return s;
}

Status model_moments(Model *m, float *moments[2]) {
    Status s = check_trained(m);
    if (!s) s = block_moments(m->trained, m->error);
    if (!s) moments[0] = m->trained->m, moments[1] = m->trained->v;
    return s;
}

/* The least float that is no less: what is at a limit is not above it. */
static float float_above(double x) {
    const float f = (float)x;
    return (double)f < x ? nextafterf(f, INFINITY) : f;
}

static void put_hyper(Model *m, const Update *u) {
    const double t = (double)m->step + 1;
    const float hyper[HYPER_COUNT] = {
        [HYPER_LR] = u->lr,
        [HYPER_BETA1] = u->beta1,
        [HYPER_BETA2] = u->beta2,
        [HYPER_EPS] = u->eps,
        [HYPER_C1] = (float)(1 - pow((double)u->beta1, t)),
        [HYPER_C2] = (float)(1 - pow((double)u->beta2, t)),
        [HYPER_DECAY] = u->weight_decay,
        [HYPER_CLIP] = u->clip,
        [HYPER_LOSS_LIMIT] = float_above(u->loss_limit),
        [HYPER_NORM_LIMIT] = float_above(u->norm_limit),
    };
    m->ops->copy_in(m->trained->hyper, hyper, sizeof hyper);
}

static Status update_weights(void *context) {
    Model *m = context;
    block_update(m->trained);
    return OK;
}

/* Why there was no update. */
static Status not_finite(Model *m) {
    Status s = check_weights(m);
    if (s) return s;
    char name[64];
    if (!isfinite(m->loss))
        return failed(m->error, NOT_FINITE, "update: the loss is not finite; weights and moments are unchanged");
    if (!find_not_finite(m, m->trained, m->trained->grads, name)) snprintf(name, sizeof name, "the whole");
    return failed(m->error, NOT_FINITE, "update: the gradient of %s is not finite; weights and moments are unchanged",
                  name);
}

Status model_update(Model *m, double *norm, const Update *u) {
    Block *b = m->trained;
    if (!b || !b->live) return failed(m->error, NO_FORWARD, "update: there are no gradients (backward comes first)");
    Status s = block_moments(b, m->error);
    if (s) return s;
    put_hyper(m, u);
    const Repeat key = {.work = UPDATE};
    repeat(&m->repeats, &key, update_weights, m);
    block_results(b, norm, &m->loss);
    b->live = 0;
    if ((s = checked_device(m->ops, m->error, OK))) return s;
    if (!isfinite(*norm) || !isfinite(m->loss)) return not_finite(m);
    if (*norm > (double)float_above(u->norm_limit) || m->loss > (double)float_above(u->loss_limit)) return OK;
    m->step++;
    m->version++;
    m->kept = 0;
    return OK;
}

/* ---- looking inside ---------------------------------------------------------------------------------------------- */

static const struct {
    int buffer, layered;
    const char *name;
} TRACED[] = {
#define ACT_(field, layered, bytes, columns, name) {A_##field, layered, name},
#include "model.def"
};

int model_trace_entries(const Model *m, TraceEntry *out) {
    const Config *c = &m->c;
    LIST_SIZES;
    const int64_t columns[] = {
#define ACT_(field, layered, bytes, columns, name) columns,
#include "model.def"
    };
    int n = (int)(sizeof TRACED / sizeof *TRACED);
    for (int i = 0; out && i < n; i++) out[i] = (TraceEntry){TRACED[i].name, TRACED[i].layered, (int)columns[i]};
    return n;
}

Status model_trace(Model *m, float *out, int i, int layer) {
    if (!m->kept) return failed(m->error, NO_FORWARD, "trace: no forward pass is kept");
    TraceEntry all[N_ACTS];
    model_trace_entries(m, all);
    const int columns = all[i].columns;
    return read_acts(m->ops, m->error, out, buffer(m, TRACED[i].buffer, layer), m->B * m->T, columns, columns);
}

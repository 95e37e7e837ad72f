/* model.c -- one transformer: layout, forward, backward, update.
 *
 * It does no arithmetic on numbers of the model: it walks the layers through the operator table, so one text serves
 * GPT-2 and Llama on every backend.  Parameters and activations are listed in model.def. */
#include "layout.h"
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "philox.h"
#include "system.h"

/* Rows of the head that are worked on at a time: their logits are the largest array of a step.  One K block of the
 * weight's gradient, in both precisions: a chunk adds finished sums. */
enum { HEAD_ROWS = 2 * K_BLOCK, ALIGN_BYTES = 64 };

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
static Buffers buffer_layout(const Config *c, const Ops *ops, int64_t N, int training) {
    LIST_SIZES;
    const int64_t A = (int64_t)ops->act_bytes;
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
        int64_t bytes = (N * list[i].bytes + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
        if (i == A_logits) bytes = b.head_bytes = (N < HEAD_ROWS ? N : HEAD_ROWS) * Vp * A;
        b.offset[i] = b.bytes;
        b.stride[i] = list[i].layered && training ? bytes : 0;
        b.bytes += bytes + (L - 1) * b.stride[i];
    }
    return b;
}

Memory model_memory(const Config *c, const Ops *ops, int B, int T, int training) {
    Layout y = param_layout(c);
    Buffers b = buffer_layout(c, ops, (int64_t)B * T, training);
    int64_t block = y.floats * (int64_t)sizeof(float), half = c->head_size / 2;
    return (Memory){
        .weights = block,
        .gradients = training ? block : 0,
        .moments = training ? 2 * block : 0,
        .activations = b.bytes - b.head_bytes,
        .head = b.head_bytes,
        .tables = c->pos == POS_ROPE ? 2 * (int64_t)sizeof(float) * c->context * half : 0,
    };
}

/* ---- the model --------------------------------------------------------------------------------------------------- */

struct Model {
    Config c;
    const Ops *ops;
    int prec;
    Layout layout;
    float *weights, *grads, *m, *v; /* the moments m and v are one allocation */
    int grads_live;                 /* 0: the block's content is stale and reads as zero */
    int64_t step, version;
    float *cos, *sin;
    double *sums; /* squares of each tensor's gradient, then the norm */
    float *hyper;
    int64_t *ranges, *device_ranges; /* where each tensor of each layer begins, in order of memory; and the end */
    char *decays;
    int n_ranges;

    char *arena;
    int64_t arena_bytes;
    Buffers b;
    int B, T, kept, has_starts; /* of the last forward; kept: backward may follow */
    float invtemp;

    int (*poll)(void);
    char error[512];
};

const char *model_error(const Model *m) { return m->error; }
const Config *model_config(const Model *m) { return &m->c; }
void model_set_poll(Model *m, int (*poll)(void)) { m->poll = poll; }
float *model_weights(Model *m) { return m->weights; }
int model_has_moments(const Model *m) { return m->m != NULL; }
int64_t model_version(const Model *m) { return m->version; }
const Ops *model_ops(const Model *m) { return m->ops; }
int model_precision(const Model *m) { return m->prec; }
int64_t model_step(const Model *m) { return m->step; }
void model_set_step(Model *m, int64_t step) { m->step = step; }

static Status fail(Model *m, Status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(m->error, sizeof m->error, format, args);
    va_end(args);
    return status;
}

static int interrupted(const Model *m) { return m->poll && m->poll(); }

/* Tensor P_x of layer l in a block; NULL where it does not exist, which turns the operator's option off. */
static float *param(const Model *m, float *block, int i, int l) {
    const Param *p = &m->layout.p[i];
    return p->floats ? block + p->offset + (p->where == LAYERED ? l * m->layout.layer_floats : 0) : NULL;
}

static void *buffer(const Model *m, int i, int l) { return m->arena + m->b.offset[i] + l * m->b.stride[i]; }

#define WEIGHT(field) param(m, m->weights, P_##field, l)
#define GRAD(field) param(m, m->grads, P_##field, l)
#define AT(field) buffer(m, A_##field, l)

static Status allocate(Model *m, void **p, int64_t bytes, const char *purpose) {
    int64_t there = system_memory_free();
    *p = bytes <= there ? m->ops->alloc((size_t)bytes) : NULL;
    if (*p) return OK;
    return fail(m, NO_MEMORY, "%s: %.2f GiB needed, %.2f GiB free", purpose, (double)bytes / (1 << 30),
                (double)there / (1 << 30));
}

/* ---- creation ---------------------------------------------------------------------------------------------------- */

static Status rope_tables(Model *m) {
    size_t n = (size_t)m->c.context * (size_t)(m->c.head_size / 2), bytes = n * sizeof(float);
    float *table = malloc(2 * bytes);
    if (!table) return fail(m, NO_MEMORY, "rope tables: no memory");
    rope_angles(&m->c, table, table + n);
    Status s = allocate(m, (void **)&m->cos, (int64_t)bytes, "rope tables");
    if (!s) s = allocate(m, (void **)&m->sin, (int64_t)bytes, "rope tables");
    if (!s) m->ops->copy_in(m->cos, table, bytes), m->ops->copy_in(m->sin, table + n, bytes);
    free(table);
    return s;
}

/* GPT-2's initial values (Radford et al. 2019): normal with 0.02; what feeds the residual stream less by sqrt(2 L). */
static Status initial_weights(Model *m, uint64_t seed) {
    const float residual = 0.02f / sqrtf(2.0f * (float)m->c.n_layer);
    for (int i = 0; i < N_PARAMS; i++) {
        const Param *p = &m->layout.p[i];
        if (p->init == ZERO || !p->floats) continue;
        /* the padding of the vocabulary stays zero */
        int64_t n = is_vocabulary(i) ? m->c.vocab_size * p->columns : p->floats;
        float *host = malloc((size_t)n * sizeof(float));
        if (!host) return fail(m, NO_MEMORY, "initial weights: no memory");
        for (int l = 0; l < (p->where == LAYERED ? m->c.n_layer : 1); l++) {
            if (p->init == ONE)
                for (int64_t j = 0; j < n; j++) host[j] = 1;
            else
                philox_normal(host, n, p->init == RESIDUAL ? residual : 0.02f, seed, STREAM_INIT,
                              (uint64_t)l << 32 | (uint64_t)i);
            m->ops->copy_in(param(m, m->weights, i, l), host, (size_t)n * sizeof(float));
        }
        free(host);
    }
    return OK;
}

/* Each tensor of each layer is one range of the gradient norm, so that a bad one can be named. */
static Status tensor_ranges(Model *m) {
    size_t room = (size_t)N_PARAMS * (size_t)m->c.n_layer + 1;
    m->ranges = malloc(room * sizeof *m->ranges);
    m->decays = malloc(room);
    if (!m->ranges || !m->decays) return fail(m, NO_MEMORY, "table of tensors: no memory");
    int n = 0;
    for (int where = BEFORE; where <= BEHIND; where++)
        for (int l = 0; l < (where == LAYERED ? m->c.n_layer : 1); l++)
            for (int i = 0; i < N_PARAMS; i++) {
                const Param *p = &m->layout.p[i];
                if (p->where != where || !p->floats) continue;
                m->decays[n] = (char)p->decay;
                m->ranges[n++] = param(m, m->weights, i, l) - m->weights;
            }
    m->ranges[n] = m->layout.floats;
    m->n_ranges = n;
    size_t bytes = ((size_t)n + 1) * sizeof *m->ranges;
    Status s = allocate(m, (void **)&m->device_ranges, (int64_t)bytes, "table of tensors");
    if (!s) m->ops->copy_in(m->device_ranges, m->ranges, bytes);
    return s;
}

Model *model_create(const Config *c, const Ops *ops, int prec, uint64_t seed, char *error, int size) {
    Model *m = calloc(1, sizeof *m);
    if (!m) {
        snprintf(error, (size_t)size, "no memory");
        return NULL;
    }
    *m = (Model){.c = *c, .ops = ops, .prec = prec, .layout = param_layout(c)};
    Status s = allocate(m, (void **)&m->weights, m->layout.floats * (int64_t)sizeof(float), "weights");
    if (!s && c->pos == POS_ROPE) s = rope_tables(m);
    if (!s) s = tensor_ranges(m);
    if (!s) s = allocate(m, (void **)&m->sums, (m->n_ranges + 1) * (int64_t)sizeof(double), "gradient norm");
    if (!s) s = allocate(m, (void **)&m->hyper, HYPER_COUNT * sizeof(float), "step sizes");
    if (!s) s = initial_weights(m, seed);
    if (!s) return m;
    snprintf(error, (size_t)size, "%s", m->error);
    model_free(m);
    return NULL;
}

void model_free(Model *m) {
    if (!m) return;
    size_t block = (size_t)m->layout.floats * sizeof(float);
    size_t table = (size_t)m->c.context * (size_t)(m->c.head_size / 2) * sizeof(float);
    if (m->weights) m->ops->free(m->weights, block);
    if (m->grads) m->ops->free(m->grads, block);
    if (m->m) m->ops->free(m->m, 2 * block);
    if (m->cos) m->ops->free(m->cos, table);
    if (m->sin) m->ops->free(m->sin, table);
    if (m->sums) m->ops->free(m->sums, (size_t)(m->n_ranges + 1) * sizeof(double));
    if (m->hyper) m->ops->free(m->hyper, HYPER_COUNT * sizeof(float));
    if (m->arena) m->ops->free(m->arena, (size_t)m->arena_bytes);
    if (m->device_ranges) m->ops->free(m->device_ranges, (size_t)(m->n_ranges + 1) * sizeof *m->ranges);
    free(m->ranges);
    free(m->decays);
    free(m);
}

/* ---- what is not finite ------------------------------------------------------------------------------------------ */

/* Where the first value that is not finite lies between two offsets of a block; -1 where all are finite. */
static int64_t first_not_finite(const Model *m, const float *block, int64_t begin, int64_t end) {
    float x[1024];
    for (int64_t at = begin; at < end; at += 1024) {
        int n = end - at < 1024 ? (int)(end - at) : 1024;
        m->ops->copy_out(x, block + at, (size_t)n * sizeof(float));
        for (int i = 0; i < n; i++)
            if (!isfinite(x[i])) return at + i;
    }
    return -1;
}

/* The name of the tensor that holds the float at this offset. */
static void name_of(const Model *m, int64_t at, char name[64]) {
    Tensor *all = malloc((size_t)model_tensors(&m->c, NULL) * sizeof *all);
    snprintf(name, 64, "value %" PRId64, at);
    int n = all ? model_tensors(&m->c, all) : 0;
    for (int i = 0; i < n; i++)
        if (at >= all[i].offset && at < all[i].offset + all[i].rows * (all[i].columns ? all[i].columns : 1))
            snprintf(name, 64, "%s", all[i].name);
    free(all);
}

/* Name the first tensor of the block that holds a value which is not finite; 0 where there is none. */
static int find_not_finite(Model *m, const float *block, char name[64]) {
    m->ops->square_sums(m->sums, block, m->device_ranges, m->n_ranges);
    for (int i = 0; i < m->n_ranges; i++) {
        double sum;
        m->ops->copy_out(&sum, m->sums + i, sizeof sum);
        int64_t at = isfinite(sum) ? -1 : first_not_finite(m, block, m->ranges[i], m->ranges[i + 1]);
        if (at < 0) continue;
        name_of(m, at, name);
        return 1;
    }
    return 0;
}

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static Status prepare(Model *m, int B, int T, int training) {
    m->kept = 0;
    m->b = buffer_layout(&m->c, m->ops, (int64_t)B * T, training);
    m->B = B, m->T = T;
    if (m->b.bytes <= m->arena_bytes) return OK;
    if (m->arena) m->ops->free(m->arena, (size_t)m->arena_bytes);
    m->arena = NULL, m->arena_bytes = 0;
    char purpose[96];
    snprintf(purpose, sizeof purpose, "activations of B = %d, T = %d", B, T);
    Status s = allocate(m, (void **)&m->arena, m->b.bytes, purpose);
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

/* x = x + attention(norm(x)); x = x + mlp(norm(x)).  Reads `residual` of layer l, writes `out`. */
static void block_forward(const Model *m, int l, act *out) {
    const Config *c = &m->c;
    const Ops *ops = m->ops;
    int B = m->B, T = m->T, N = B * T, C = c->n_embd, NH = c->n_head, NKV = c->n_kv_head, HS = c->head_size,
        F = c->n_inner;
    const int32_t *starts = starts_of(m);

    norm_forward(m, AT(ln1), AT(ln1_mean), AT(ln1_rstd), AT(residual), WEIGHT(ln1_w), WEIGHT(ln1_b));
    ops->linear_forward(AT(qkv), NULL, AT(ln1), WEIGHT(qkv_w), WEIGHT(qkv_b), NULL, FN_NONE, m->prec, N, C,
                        (NH + 2 * NKV) * HS);
    if (c->pos == POS_ROPE) ops->rope_forward(AT(qkv), m->cos, m->sin, starts, B, T, NH, NKV, HS);
    ops->attention_forward(AT(att), AT(lse), AT(qkv), starts, m->prec, B, T, NH, NKV, HS);
    ops->linear_forward(AT(mid), NULL, AT(att), WEIGHT(proj_w), WEIGHT(proj_b), AT(residual), FN_NONE, m->prec, N,
                        NH * HS, C);

    norm_forward(m, AT(ln2), AT(ln2_mean), AT(ln2_rstd), AT(mid), WEIGHT(ln2_w), WEIGHT(ln2_b));
    if (c->act == MLP_SWIGLU) {
        ops->linear_forward(AT(fc), NULL, AT(ln2), WEIGHT(fc_w), WEIGHT(fc_b), NULL, FN_NONE, m->prec, N, C, 2 * F);
        ops->swiglu_forward(AT(fch), AT(fc), N, F);
    } else {
        ops->linear_forward(AT(fch), AT(fc), AT(ln2), WEIGHT(fc_w), WEIGHT(fc_b), NULL, mlp_function(c), m->prec, N, C,
                            F);
    }
    ops->linear_forward(out, NULL, AT(fch), WEIGHT(fc2_w), WEIGHT(fc2_b), AT(mid), FN_NONE, m->prec, N, F, C);
}

/* Tokens to hidden states. */
static Status body_forward(Model *m, const int32_t *tokens, const int32_t *starts) {
    const int l = 0, L = m->c.n_layer;
    copy_ids(m, AT(tokens), tokens);
    m->has_starts = starts != NULL;
    if (starts) copy_ids(m, AT(starts), starts);
    m->ops->embedding_forward(AT(residual), AT(tokens), starts_of(m), WEIGHT(wte), WEIGHT(wpe), m->B, m->T,
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
                   .rows = N - row < HEAD_ROWS ? N - row : HEAD_ROWS,
                   .hidden = (char *)AT(hidden) + skip,
                   .dhidden = (char *)AT(dnorm) + skip,
                   .logits = AT(logits),
                   .targets = (int32_t *)AT(targets) + row,
                   .logprobs = (float *)AT(logprobs) + row,
                   .lse = (float *)AT(head_lse) + row,
                   .entropy = (float *)AT(entropy) + row,
                   .dlogprobs = (float *)AT(dlogprobs) + row};
}

static int vocab_padded(const Model *m) { return (int)m->layout.p[P_wte].rows; }

static void chunk_logits(const Model *m, const Chunk *k) {
    m->ops->linear_forward(k->logits, NULL, k->hidden, param(m, m->weights, head_param(&m->c), 0), NULL, NULL, FN_NONE,
                           m->prec, k->rows, m->c.n_embd, vocab_padded(m));
}

static void chunk_logprobs(const Model *m, const Chunk *k, int entropy) {
    m->ops->logprob_forward(k->logprobs, k->lse, entropy ? k->entropy : NULL, k->logits, k->targets, m->invtemp,
                            k->rows, m->c.vocab_size, vocab_padded(m));
}

/* From the chunk's logits, which it uses up: adds to the head's weight, and leaves the gradient of hidden in dnorm. */
static void chunk_backward(const Model *m, const Chunk *k, int has_dhidden) {
    int C = m->c.n_embd, Vp = vocab_padded(m), head = head_param(&m->c), add = m->grads_live || k->row > 0;
    m->ops->logprob_backward(k->logits, k->dlogprobs, k->logits, k->targets, k->lse, m->invtemp, k->rows,
                             m->c.vocab_size, Vp);
    m->ops->linear_backward_input(k->dhidden, k->logits, has_dhidden ? k->dhidden : NULL, param(m, m->weights, head, 0),
                                  NULL, FN_NONE, m->prec, k->rows, C, Vp);
    m->ops->linear_backward_weight(param(m, m->grads, head, 0), NULL, k->logits, k->hidden, add, m->prec, k->rows, C,
                                   Vp);
}

/* A row whose lse is not finite met a bad weight, or numbers that grew beyond fp32. */
static Status check_finite(Model *m) {
    const int N = m->B * m->T;
    float lse[256];
    for (int at = 0; at < N; at += 256) {
        int n = N - at < 256 ? N - at : 256;
        m->ops->copy_out(lse, (float *)buffer(m, A_head_lse, 0) + at, (size_t)n * sizeof(float));
        for (int i = 0; i < n; i++) {
            if (isfinite(lse[i])) continue;
            char name[64];
            m->kept = 0;
            if (find_not_finite(m, m->weights, name))
                return fail(m, NOT_FINITE, "weights: %s holds a value that is not finite", name);
            return fail(m, NOT_FINITE, "logits of row b = %d, t = %d are not finite", (at + i) / m->T, (at + i) % m->T);
        }
    }
    return OK;
}

static void copy_rows_out(const Model *m, float *out, int buffer_, int64_t columns) {
    if (out)
        m->ops->copy_out(out, buffer(m, buffer_, 0), (size_t)m->B * (size_t)m->T * (size_t)columns * sizeof(float));
}

Status model_forward(Model *m, float *logprobs, float *hidden, float *entropy, const int32_t *tokens,
                     const int32_t *targets, const int32_t *starts, float temperature, int B, int T) {
    Status s = prepare(m, B, T, 1);
    if (!s) s = body_forward(m, tokens, starts);
    if (s) return s;
    m->invtemp = 1 / temperature;
    copy_ids(m, buffer(m, A_targets, 0), targets);
    for (int row = 0; row < B * T; row += HEAD_ROWS) {
        if (interrupted(m)) return INTERRUPTED;
        Chunk k = head_chunk(m, row);
        chunk_logits(m, &k);
        chunk_logprobs(m, &k, entropy != NULL);
    }
    if ((s = check_finite(m))) return s;
    m->kept = 1;
    copy_rows_out(m, logprobs, A_logprobs, 1);
    copy_rows_out(m, hidden, A_hidden, m->c.n_embd);
    copy_rows_out(m, entropy, A_entropy, 1);
    return OK;
}

Status model_logits(Model *m, float *logits, const int32_t *tokens, const int32_t *starts, int last, int B, int T) {
    Status s = prepare(m, B, T, 0);
    if (!s) s = body_forward(m, tokens, starts);
    if (s) return s;
    size_t V = (size_t)m->c.vocab_size, Vp = (size_t)vocab_padded(m), A = m->ops->act_bytes;
    /* one row at a time where only the last counts, else chunk by chunk */
    int step = last ? T : HEAD_ROWS;
    for (int row = last ? T - 1 : 0; row < B * T; row += step) {
        if (interrupted(m)) return INTERRUPTED;
        Chunk k = head_chunk(m, row);
        if (last) k.rows = 1;
        chunk_logits(m, &k);
        for (int i = 0; i < k.rows; i++, logits += V)
            m->ops->copy_out(logits, (char *)k.logits + (size_t)i * Vp * A, V * sizeof(float));
    }
    return OK;
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

/* block_forward in reverse; dres holds the gradient of what the block wrote, and then of what it read.  The biases of
 * the two layers that write to the residual stream come out of the norms, which pass over its gradient anyway. */
static void block_backward(const Model *m, int l) {
    const Config *c = &m->c;
    const Ops *ops = m->ops;
    int B = m->B, T = m->T, N = B * T, C = c->n_embd, NH = c->n_head, NKV = c->n_kv_head, HS = c->head_size,
        F = c->n_inner;
    int QKV = (NH + 2 * NKV) * HS, add = m->grads_live, prec = m->prec;
    act *dres = AT(dres), *dnorm = AT(dnorm), *dfc = AT(dfc);

    if (c->act == MLP_SWIGLU) {
        ops->linear_backward_input(AT(dfch), dres, NULL, WEIGHT(fc2_w), NULL, FN_NONE, prec, N, F, C);
        ops->swiglu_backward(dfc, AT(dfch), AT(fc), N, F);
    } else {
        ops->linear_backward_input(dfc, dres, NULL, WEIGHT(fc2_w), AT(fc), mlp_function(c), prec, N, F, C);
    }
    ops->linear_backward_weight(GRAD(fc2_w), NULL, dres, AT(fch), add, prec, N, F, C);
    int FC = c->act == MLP_SWIGLU ? 2 * F : F;
    ops->linear_backward_input(dnorm, dfc, NULL, WEIGHT(fc_w), NULL, FN_NONE, prec, N, C, FC);
    ops->linear_backward_weight(GRAD(fc_w), GRAD(fc_b), dfc, AT(ln2), add, prec, N, C, FC);
    norm_backward(m, GRAD(ln2_w), GRAD(ln2_b), GRAD(proj_b), AT(mid), WEIGHT(ln2_w), AT(ln2_mean), AT(ln2_rstd), dres);

    ops->linear_backward_input(AT(datt), dres, NULL, WEIGHT(proj_w), NULL, FN_NONE, prec, N, NH * HS, C);
    ops->linear_backward_weight(GRAD(proj_w), NULL, dres, AT(att), add, prec, N, NH * HS, C);
    ops->attention_backward(AT(dqkv), AT(datt), AT(qkv), AT(att), AT(lse), starts_of(m), prec, B, T, NH, NKV, HS);
    if (c->pos == POS_ROPE) ops->rope_backward(AT(dqkv), m->cos, m->sin, starts_of(m), B, T, NH, NKV, HS);
    ops->linear_backward_input(dnorm, AT(dqkv), NULL, WEIGHT(qkv_w), NULL, FN_NONE, prec, N, C, QKV);
    ops->linear_backward_weight(GRAD(qkv_w), GRAD(qkv_b), AT(dqkv), AT(ln1), add, prec, N, C, QKV);
    float *below = l > 0 ? param(m, m->grads, P_fc2_b, l - 1) : NULL;
    norm_backward(m, GRAD(ln1_w), GRAD(ln1_b), below, AT(residual), WEIGHT(ln1_w), AT(ln1_mean), AT(ln1_rstd), dres);
}

static void zero_floats(const Model *m, int64_t begin, int64_t end) {
    m->ops->zero(m->grads + begin, (size_t)(end - begin) * sizeof(float));
}

/* Make ready what this backward pass will add to.  Matrices of the layers are written, not added to, by the first pass
 * of a step, and so is the head's where there are dlogprobs: only the rest is cleared. */
static Status begin_grads(Model *m, int head_is_written) {
    if (!m->grads) {
        Status s = allocate(m, (void **)&m->grads, m->layout.floats * (int64_t)sizeof(float), "gradients");
        if (s) return s;
    }
    if (m->grads_live) return OK;
    const Param *p = m->layout.p;
    for (int i = 0; i < N_PARAMS; i++) {
        if (!p[i].floats || (p[i].where == LAYERED && p[i].columns)) continue;
        if (i == head_param(&m->c) && head_is_written) continue;
        for (int l = 0; l < (p[i].where == LAYERED ? m->c.n_layer : 1); l++) {
            int64_t at = param(m, m->grads, i, l) - m->grads;
            zero_floats(m, at, at + p[i].floats);
        }
    }
    return OK;
}

/* Gradients of hidden (in dnorm) down to the embedding. */
static Status body_backward(Model *m) {
    const int l = 0, L = m->c.n_layer;
    norm_backward(m, GRAD(lnf_w), GRAD(lnf_b), param(m, m->grads, P_fc2_b, L - 1), AT(last), WEIGHT(lnf_w),
                  AT(lnf_mean), AT(lnf_rstd), NULL);
    for (int i = L - 1; i >= 0; i--) {
        if (interrupted(m)) return INTERRUPTED;
        block_backward(m, i);
    }
    m->ops->embedding_backward(GRAD(wte), GRAD(wpe), AT(dres), AT(tokens), starts_of(m), m->B, m->T, m->c.n_embd,
                               vocab_padded(m));
    return OK;
}

/* The second door: forward dropped the logits chunk by chunk, so they are computed again. */
static Status head_backward(Model *m, int has_dhidden) {
    for (int row = 0; row < m->B * m->T; row += HEAD_ROWS) {
        if (interrupted(m)) return INTERRUPTED;
        Chunk k = head_chunk(m, row);
        chunk_logits(m, &k);
        chunk_backward(m, &k, has_dhidden);
    }
    return OK;
}

/* The pass went through, or it was cut off: then the gradients, half made, are dropped. */
static Status end_backward(Model *m, Status s) {
    m->grads_live = s == OK;
    return s;
}

Status model_backward(Model *m, const float *dlogprobs, const float *dhidden, int64_t B, int64_t T) {
    const char *name = dlogprobs ? "dlogprobs" : "dhidden";
    if (!m->kept)
        return fail(m, NO_FORWARD, "backward: no forward pass is kept (forward comes first, logits drops it)");
    if (B != m->B) return fail(m, BAD_SHAPE, "%s: B is %" PRId64 ", the last forward has %d", name, B, m->B);
    if (T != m->T) return fail(m, BAD_SHAPE, "%s: T is %" PRId64 ", the last forward has %d", name, T, m->T);
    const int l = 0;
    size_t N = (size_t)m->B * (size_t)m->T;
    Status s = begin_grads(m, dlogprobs != NULL);
    if (s) return s;
    if (dlogprobs) m->ops->copy_in(AT(dlogprobs), dlogprobs, N * sizeof(float));
    if (dhidden) m->ops->copy_in(AT(dnorm), dhidden, N * (size_t)m->c.n_embd * m->ops->act_bytes);
    if (dlogprobs) s = head_backward(m, dhidden != NULL);
    if (!s) s = body_backward(m);
    return end_backward(m, s);
}

Status model_forward_backward(Model *m, float *logprobs, const float *dlogprobs, const int32_t *tokens,
                              const int32_t *targets, const int32_t *starts, float temperature, int B, int T) {
    Status s = prepare(m, B, T, 1);
    if (!s) s = begin_grads(m, 1);
    if (!s) s = body_forward(m, tokens, starts);
    if (s) return s; /* nothing was added yet: what earlier passes left stays */
    m->invtemp = 1 / temperature;
    copy_ids(m, buffer(m, A_targets, 0), targets);
    m->ops->copy_in(buffer(m, A_dlogprobs, 0), dlogprobs, (size_t)B * (size_t)T * sizeof(float));
    for (int row = 0; row < B * T && !s; row += HEAD_ROWS) {
        Chunk k = head_chunk(m, row);
        chunk_logits(m, &k);
        chunk_logprobs(m, &k, 0);
        chunk_backward(m, &k, 0);
        if (interrupted(m)) s = INTERRUPTED;
    }
    if (!s) s = check_finite(m);
    if (!s) s = body_backward(m);
    if (!s) copy_rows_out(m, logprobs, A_logprobs, 1);
    return end_backward(m, s);
}

/* ---- update ------------------------------------------------------------------------------------------------------ */

Status model_grads(Model *m, float **grads) {
    Status s = begin_grads(m, 0);
    if (s) return s;
    if (!m->grads_live) m->ops->zero(m->grads, (size_t)m->layout.floats * sizeof(float));
    m->grads_live = 1;
    *grads = m->grads;
    return OK;
}

Status model_moments(Model *m, float *moments[2]) {
    Status s = OK;
    if (!m->m) s = allocate(m, (void **)&m->m, 2 * m->layout.floats * (int64_t)sizeof(float), "moments");
    if (!s) m->v = m->m + m->layout.floats;
    moments[0] = m->m, moments[1] = m->v;
    return s;
}

/* Neighbours that decay alike are updated as one range. */
static void adamw_all(Model *m, float weight_decay) {
    for (int i = 0, j; i < m->n_ranges; i = j) {
        for (j = i; j < m->n_ranges && m->decays[j] == m->decays[i];) j++;
        int64_t at = m->ranges[i], n = m->ranges[j] - at;
        m->ops->adamw(m->weights + at, m->m + at, m->v + at, m->grads + at, m->hyper, m->decays[i] ? weight_decay : 0,
                      n);
    }
}

Status model_update(Model *m, double *norm, float lr, float beta1, float beta2, float eps, float weight_decay,
                    float clip, double skip_above) {
    if (!m->grads_live) return fail(m, NO_FORWARD, "update: there are no gradients (backward comes first)");
    float *moments[2];
    Status s = model_moments(m, moments);
    if (s) return s;
    double t = (double)m->step + 1, *device_norm = m->sums + m->n_ranges;
    float hyper[HYPER_COUNT] = {
        [HYPER_LR] = lr,
        [HYPER_BETA1] = beta1,
        [HYPER_BETA2] = beta2,
        [HYPER_EPS] = eps,
        [HYPER_SCALE] = 1,
        [HYPER_C1] = (float)(1 - pow((double)beta1, t)),
        [HYPER_C2] = (float)(1 - pow((double)beta2, t)),
    };
    m->ops->copy_in(m->hyper, hyper, sizeof hyper);
    m->ops->square_sums(m->sums, m->grads, m->device_ranges, m->n_ranges);
    m->ops->clip_scale(m->hyper, device_norm, m->sums, clip, m->n_ranges);
    m->ops->copy_out(norm, device_norm, sizeof *norm);
    if (!isfinite(*norm)) {
        char name[64];
        if (!find_not_finite(m, m->grads, name)) snprintf(name, sizeof name, "the whole");
        m->grads_live = 0;
        return fail(m, NOT_FINITE, "update: the gradient of %s is not finite; weights and moments are unchanged", name);
    }
    m->grads_live = 0;
    if (*norm > skip_above) return OK;
    adamw_all(m, weight_decay);
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
    if (!m->kept) return fail(m, NO_FORWARD, "trace: no forward pass is kept");
    TraceEntry all[N_ACTS];
    model_trace_entries(m, all);
    size_t n = (size_t)m->B * (size_t)m->T * (size_t)all[i].columns;
    m->ops->copy_out(out, buffer(m, TRACED[i].buffer, layer), n * sizeof(float));
    return OK;
}

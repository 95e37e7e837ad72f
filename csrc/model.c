/* model.c -- one transformer: forward, backward, update.
 *
 * It does no arithmetic on numbers of the model: it walks the layers through the operator table, so one text serves
 * GPT-2 and Llama on every backend.  Parameters and activations are listed in model.def.  Either all parameters are
 * trained, or those of an adapter (adapter.h) alone; then nothing else has gradients. */
#include "model.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* A device is only told what to do, which takes no time; and what is recorded is recorded whole. */
static int interrupted(const Model *m) { return m->ops->on_host && m->poll && m->poll(); }

/* Tensors of layer l; NULL where one does not exist or is not trained, which turns the operator's option off. */
#define WEIGHT(field) layout_at(&m->base.layout, m->base.weights, P_##field, l)
#define GRAD(field) layout_at(&m->base.layout, m->base.grads, P_##field, l)
#define AT(field) buffer(m, A_##field, l)

/* ---- forward ----------------------------------------------------------------------------------------------------- */

static void round_weights(Model *m) {
    if (m->low) m->ops->held_write(m->low, m->base.weights, PREC_BF16, LOW_ROW, low_rows(&m->base.layout));
    m->low_stale = 0;
}

static Status prepare(Model *m, int B, int T, int training) {
    m->kept = 0;
    m->b = model_buffers(&m->c, m->ops, m->prec, &m->adapter, (int64_t)B * T, training);
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

/* Behind whatever writes weights: a backend may read those of a pass from here on. */
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

/* What is read by products in bf16 alone, rounded as they will round it. */
static void keep_qkv(const Model *m, int l) {
    m->ops->held_write(AT(narrow), AT(qkv), PREC_BF16, (int)m->base.layout.p[P_qkv_w].rows, m->B * m->T);
}

/* What backward may make again. */
static void make_qkv(const Model *m, int l) {
    m->ops->held_read(AT(qkv), AT(narrow), PREC_BF16, (int)m->base.layout.p[P_qkv_w].rows, m->B * m->T);
}
static void make_ln1(const Model *m, int l) {
    norm_forward(m, AT(ln1), AT(ln1_mean), AT(ln1_rstd), AT(residual), WEIGHT(ln1_w), WEIGHT(ln1_b));
}
static void make_ln2(const Model *m, int l) {
    norm_forward(m, AT(ln2), AT(ln2_mean), AT(ln2_rstd), AT(mid), WEIGHT(ln2_w), WEIGHT(ln2_b));
}
static void make_fch(const Model *m, int l) {
    const int N = m->B * m->T, F = m->c.n_inner;
    if (m->c.act == MLP_SWIGLU) m->ops->swiglu_forward(AT(fch), AT(fc), N, F);
    else m->ops->gelu_forward(AT(fch), AT(fc), mlp_function(&m->c), N, F);
}

/* x = x + attention(norm(x)); x = x + mlp(norm(x)).  Reads `residual` of layer l, writes `out`. */
static void block_forward(const Model *m, int l, act *out) {
    const Config *c = &m->c;
    const Ops *ops = m->ops;
    int B = m->B, T = m->T, NH = c->n_head, NKV = c->n_kv_head, HS = c->head_size;
    const int32_t *starts = starts_of(m);

    make_ln1(m, l);
    linear(m, P_qkv_w, P_qkv_b, l, AT(qkv), NULL, AT(ln1), NULL, FN_NONE);
    if (c->pos == POS_ROPE) ops->rope_forward(AT(qkv), m->cos, m->sin, starts, B, T, NH, NKV, HS);
    ops->attention_forward(AT(att), AT(lse), AT(qkv), starts, m->prec, B, T, NH, NKV, HS);
    if (m->b.narrows) keep_qkv(m, l);
    linear(m, P_proj_w, P_proj_b, l, AT(mid), NULL, AT(att), AT(residual), FN_NONE);

    make_ln2(m, l);
    if (c->act == MLP_SWIGLU) {
        linear(m, P_fc_w, P_fc_b, l, AT(fc), NULL, AT(ln2), NULL, FN_NONE);
        make_fch(m, l);
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
    if (!model_bad_weight(m, name)) return OK;
    return failed(m->error, NOT_FINITE, "weights: %s holds a value that is not finite", name);
}

/* A row whose lse is not finite met a bad weight, or numbers that grew beyond fp32. */
static Status check_finite(Model *m) {
    const int N = m->B * m->T;
    float *lse = malloc((size_t)N * sizeof *lse);
    if (!lse) return failed(m->error, NO_MEMORY, "check of the logits: no memory");
    copy_floats_out(m, lse, A_head_lse);
    Status s = checked_device(m->ops, m->error, OK); /* had it failed, nothing was copied */
    int bad = 0;
    while (!s && bad < N && isfinite(lse[bad])) bad++;
    free(lse);
    if (s || bad == N) return s;
    m->kept = 0;
    s = check_weights(m);
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

    if (m->b.recomputes) make_fch(m, l);
    if (c->act == MLP_SWIGLU) {
        linear_backward(m, P_fc2_w, l, AT(dfch), NULL, dres, AT(fch), NULL, FN_NONE);
        ops->swiglu_backward(dfc, AT(dfch), AT(fc), B * T, c->n_inner);
    } else {
        linear_backward(m, P_fc2_w, l, dfc, NULL, dres, AT(fch), AT(fc), mlp_function(c));
    }
    if (m->b.recomputes) make_ln2(m, l);
    linear_backward(m, P_fc_w, l, dnorm, GRAD(fc_b), dfc, AT(ln2), NULL, FN_NONE);
    norm_backward(m, GRAD(ln2_w), GRAD(ln2_b), GRAD(proj_b), AT(mid), WEIGHT(ln2_w), AT(ln2_mean), AT(ln2_rstd), dres);

    linear_backward(m, P_proj_w, l, AT(datt), NULL, dres, AT(att), NULL, FN_NONE);
    if (m->b.narrows) make_qkv(m, l);
    ops->attention_backward(AT(dqkv), AT(datt), AT(qkv), AT(att), AT(lse), starts_of(m), m->prec, B, T, NH, NKV, HS);
    if (c->pos == POS_ROPE) ops->rope_backward(AT(dqkv), m->cos, m->sin, starts_of(m), B, T, NH, NKV, HS);
    if (m->b.recomputes) make_ln1(m, l);
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
    if (!model_not_finite(m, m->trained, m->trained->grads, name)) snprintf(name, sizeof name, "the whole");
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
    const int columns = all[i].columns, b = TRACED[i].buffer;
    if (m->b.recomputes && b == A_ln1) make_ln1(m, layer);
    if (m->b.narrows && b == A_qkv) make_qkv(m, layer);
    if (m->b.recomputes && b == A_ln2) make_ln2(m, layer);
    if (m->b.recomputes && b == A_fch) make_fch(m, layer);
    return read_acts(m->ops, m->error, out, buffer(m, b, layer), m->B * m->T, columns, columns);
}

/* layout.h -- where the parameters of a Config lie, for the two that walk its layers: training (model.c) and decoding
 * (session.c). */
#pragma once
#include "barelm.h"

/* The letters of model.def. */
#define LIST_SIZES                                                                                                \
    const int64_t L = c->n_layer, C = c->n_embd, V = c->vocab_size, Vp = (V + 63) / 64 * 64, P = c->context,      \
                  NH = c->n_head, NKV = c->n_kv_head, HS = c->head_size, QKV = (NH + 2 * NKV) * HS, AO = NH * HS, \
                  F = c->n_inner, GATED = c->act == MLP_SWIGLU, FC = GATED ? 2 * F : F, B1 = c->bias,             \
                  B2 = c->bias && c->norm == NORM_LAYERNORM, LEARNED = c->pos == POS_LEARNED, TIED = c->tied;     \
    (void)L, (void)C, (void)V, (void)Vp, (void)P, (void)NH, (void)NKV, (void)HS, (void)QKV, (void)AO, (void)F,    \
        (void)GATED, (void)FC, (void)B1, (void)B2, (void)LEARNED, (void)TIED

enum {
#define PARAM(field, ...) P_##field,
#include "model.def"
    N_PARAMS
};
enum { NORMAL, RESIDUAL, ONE, ZERO };
enum { BEFORE, LAYERED, BEHIND };

typedef struct {
    int where, decay, init, held;
    int64_t rows, columns, floats, offset; /* floats of one layer's tensor, or their room; offset of layer 0's */
} Param;

typedef struct {
    Param p[N_PARAMS];
    int n;
    int64_t layer_floats, floats; /* from one layer to the next; of the whole block */
} Layout;

/* A block of floats. */
Layout param_layout(const Config *c);
/* A block of weights that are not trained: what is looked up or multiplied is held so (ops.def). */
Layout held_layout(const Config *c, const Ops *ops, int held);
/* Each tensor begins on 64 bytes. */
int64_t layout_aligned(int64_t floats);
/* Tensor i of layer l in a block; NULL where it does not exist, or the block. */
float *layout_at(const Layout *y, float *block, int i, int l);

/* The linear layers of a block as Hugging Face cuts them. */
enum { MOST_MODULES = 8 };
typedef struct {
    char name[32]; /* "attn.c_attn", "mlp.up_proj" */
    int param;
    int64_t row, rows, columns; /* of the parameter */
} Module;
int model_modules(const Config *c, Module *out);
/* "h" or "layers" */
const char *layer_prefix(const Config *c);

/* The parameter that makes logits. */
int head_param(const Config *c);

/* Whether its rows are tokens: behind the vocabulary's last they are padding, and zero. */
int is_vocabulary(int param);

/* cos, sin (context, HS / 2): row p is the angles of position p, computed in double. */
void rope_angles(const Config *c, float *cos_, float *sin_);

/* The function within the MLP's first linear layer; FN_NONE where a gate follows it. */
int mlp_function(const Config *c);

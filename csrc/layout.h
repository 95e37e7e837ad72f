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
    int where, decay, init;
    int64_t rows, columns, floats, offset; /* floats of one layer's tensor; offset of layer 0's */
} Param;

typedef struct {
    Param p[N_PARAMS];
    int64_t layer_floats, floats; /* from one layer to the next; of the whole block */
} Layout;

Layout param_layout(const Config *c);

/* The parameter that makes logits. */
int head_param(const Config *c);

/* Whether its rows are tokens: behind the vocabulary's last they are padding, and zero. */
int is_vocabulary(int param);

/* cos, sin (context, HS / 2): row p is the angles of position p, computed in double. */
void rope_angles(const Config *c, float *cos_, float *sin_);

/* The function within the MLP's first linear layer; FN_NONE where a gate follows it. */
int mlp_function(const Config *c);

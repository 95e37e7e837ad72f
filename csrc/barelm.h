/* barelm.h -- the C API: one transformer, described by a Config, on any backend.
 *
 * Sizes, pointers and token ids are checked by the caller (bindings*.cpp).  A function that can fail returns a Status
 * and leaves a sentence in model_error(); then nothing of the model has changed, except where it says so. */
#pragma once
#include <stdint.h>
#include "ops.h"

enum { MLP_GELU_TANH, MLP_GELU_ERF, MLP_SWIGLU };
enum { POS_LEARNED, POS_ROPE };

typedef struct {
    int n_layer, n_head, n_kv_head, head_size, n_embd, n_inner, vocab_size, context;
    int norm, act, pos, bias, tied;
    float norm_eps;
    double rope_theta;
    /* Llama-3's stretching of long wavelengths (rope_type "llama3"); factor 0: none */
    double rope_factor, rope_low_freq, rope_high_freq, rope_original_context;
} Config;

typedef enum {
    OK,
    NO_MEMORY,
    NO_FORWARD,
    BAD_SHAPE,
    INTERRUPTED,
    NOT_FINITE,
    CACHE_FULL,
    STALE,
    FROZEN,
    DEVICE
} Status;
typedef struct Model Model;

/* ---- memory ---- */

typedef struct { /* bytes by purpose */
    int64_t weights, gradients, moments, activations, head, tables;
} Memory;

typedef struct { /* an adapter (Hu et al. 2021, arXiv:2106.09685) */
    int rank;
    float scale;
    const char *chosen; /* of each module (model_modules, layout.h) whether it is adapted */
} Lora;

/* What training with batches of B x T takes; with training 0 what inference takes.  `held`: as model_create; lora: NULL
 * where there is none. */
Memory model_memory(const Config *c, const Ops *ops, int prec, int B, int T, int training, int held, const Lora *lora);

/* ---- life ---- */

/* NULL where memory does not suffice; then `error` (of `size` bytes) says how much is needed and how much there is.
 * held: PREC_FP32, or how the matrices lie in memory that are then not trained.  seed: of the initial weights; NULL:
 * they are zero, to be written. */
Model *model_create(const Config *c, const Ops *ops, int prec, int held, const uint64_t *seed, char *error, int size);
void model_free(Model *m);
const char *model_error(const Model *m);
const Config *model_config(const Model *m);
/* `poll` is called every few milliseconds of work; where it returns non-zero the call ends with INTERRUPTED. */
void model_set_poll(Model *m, int (*poll)(void));

/* ---- parameters ---- */

typedef struct { /* some rows of a tensor, under Hugging Face's name */
    char name[64];
    int param, layer;      /* which tensor, */
    int64_t row;           /* and from which of its rows on */
    int64_t offset;        /* floats from the begin of a block of floats */
    int64_t rows, columns; /* columns 0: a vector */
    int transposed;        /* Hugging Face's shape is (columns, rows) */
    int decay;
} Tensor;

/* The parameters of a model of this config, which need not exist: how many; `out` may be NULL. */
int model_tensors(const Config *c, Tensor *out);
/* The block of weights, in the backend's memory and form. */
float *model_weights(Model *m);
int model_held(const Model *m);
/* `rows` rows of a tensor, from its row `row` on, written or read as floats of the host: of the weights, however they
 * are held, or of a block of floats that is laid out as what `t` is from (gradients, moments, an adapter). */
enum { WEIGHTS, ADAPTER, GRADIENTS, FIRST_MOMENT, SECOND_MOMENT };
Status model_put(Model *m, int block, const Tensor *t, int64_t row, const float *values, int64_t rows);
Status model_get(Model *m, int block, const Tensor *t, int64_t row, float *values, int64_t rows);

/* An adapter: from here on its values alone are trained.  The seed is of its A's; its B's are zero. */
typedef struct Adapter Adapter;
Status model_adapt(Model *m, const Lora *lora, uint64_t seed);
/* NULL where there is none; its block of floats, of which adapter_tensors (adapter.h) are the tensors. */
const Adapter *model_adapter(const Model *m);
float *model_added(Model *m);
/* adapter->rows of a linear layer, in the backend's memory */
const int32_t *model_groups(const Model *m, int slot);

/* Rises whenever model_update has changed the weights: who holds something made from them compares. */
int64_t model_version(const Model *m);
const Ops *model_ops(const Model *m);
int model_precision(const Model *m);
/* The blocks of gradients and moments (first, second) of what is trained; allocated here where they do not exist yet.
 */
Status model_grads(Model *m, float **grads);
Status model_moments(Model *m, float *moments[2]);
int model_has_moments(const Model *m);
int64_t model_step(const Model *m);
void model_set_step(Model *m, int64_t step);
/* Of the passes that the last update was made of, see model_accumulate. */
double model_loss(const Model *m);

/* ---- computing ---- */

/* tokens, targets (B, T); starts (B, T) or NULL.  logprobs (B, T), hidden (B, T, C) or NULL, entropy (B, T) or NULL. */
Status model_forward(Model *m, float *logprobs, float *hidden, float *entropy, const int32_t *tokens,
                     const int32_t *targets, const int32_t *starts, float temperature, int B, int T);
/* Gradients of the last forward are added; dlogprobs (B, T), dhidden (B, T, C), each may be NULL.  BAD_SHAPE where B or
 * T is not that of the last forward.  After INTERRUPTED the gradients read as zero. */
Status model_backward(Model *m, const float *dlogprobs, const float *dhidden, int64_t B, int64_t T);
/* Both at once, for dlogprobs that are known before: the head's work is done once.  The same bits as the two calls.
 * Nothing comes back, and a device is not waited for: model_update says whether all was finite, and what the loss was,
 * the sum of logprobs * dlogprobs over all passes since the last update. */
Status model_accumulate(Model *m, const float *dlogprobs, const int32_t *tokens, const int32_t *targets,
                        const int32_t *starts, float temperature, int B, int T);
/* The same, and logprobs (B, T). */
Status model_forward_backward(Model *m, float *logprobs, const float *dlogprobs, const int32_t *tokens,
                              const int32_t *targets, const int32_t *starts, float temperature, int B, int T);
/* Clip (clip > 0), AdamW, gradients read as zero.  A norm or a loss above its limit: no update, step stays, gradients
 * read as zero.  A loss or a gradient that is not finite: so too, and NOT_FINITE; the error names the first tensor. */
typedef struct {
    float lr, beta1, beta2, eps, weight_decay, clip;
    double loss_limit, norm_limit;
} Update;
Status model_update(Model *m, double *norm, const Update *u);
/* logits (B, V) of the last position, or (B, T, V) */
Status model_logits(Model *m, float *logits, const int32_t *tokens, const int32_t *starts, int last, int B, int T);

/* ---- looking inside the last model_forward ---- */

typedef struct {
    const char *name;
    int layered, columns;
} TraceEntry;
int model_trace_entries(const Model *m, TraceEntry *out);
/* (B * T, columns) floats of entry i; NO_FORWARD where no forward pass is kept */
Status model_trace(Model *m, float *out, int i, int layer);

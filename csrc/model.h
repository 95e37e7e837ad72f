/* model.h -- what the files of a model share: model_create.c (its memory, from the beginning to the end),
 * model_values.c (what its tensors hold) and model.c (its passes and updates). */
#pragma once
#include "adapter.h"
#include "block.h"
#include "repeat.h"
#include "status.h"

/* Activations and gradients of them, and one chunk of logits: all in one arena. */
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

enum { ONCE, LAYERS, BODY, AGAIN, NARROW }; /* how long one is kept, see model.def */

typedef struct {
    int64_t offset[N_BUFFERS], stride[N_BUFFERS], bytes, head_bytes; /* stride: from one layer to the next */
    int recomputes, narrows; /* whether backward has to make again what is kept AGAIN, and what is NARROW */
} Buffers;

/* Where each lies for N tokens, where products are of precision prec.  Inference keeps one layer. */
Buffers model_buffers(const Config *c, const Ops *ops, int prec, const Adapter *adapter, int64_t N, int training);

/* The base's weights in bf16, at the same places, where the backend's products want them so and an update changes them;
 * as a matrix of rows that every tensor has a whole number of. */
enum { LOW_ROW = ALIGN_BYTES / sizeof(float), LOW_VALUE = sizeof(uint16_t) };
static inline int low_rows(const Layout *y) { return (int)(y->floats / LOW_ROW); }

struct Model {
    Config c;
    const Ops *ops;
    int prec, held; /* of products; how the base's matrices lie in memory */
    Block base, added;
    Adapter adapter; /* of rank 0: none; its values are `added` */
    float *dense, *ddense;
    int32_t *groups[LINEARS]; /* the adapter's rows, in the backend's memory */
    Block *trained;           /* base, added, or NULL */
    void *low;                /* the base in bf16; NULL where there is none */
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

static inline void *buffer(const Model *m, int i, int l) { return m->arena + m->b.offset[i] + l * m->b.stride[i]; }

/* Values of a tensor that are on their way to or from the backend at a time, or those of the widest row if they are
 * more. */
enum { PART = 1 << 20 };
int64_t model_widest(const Layout *y);

/* Name the first tensor of the block that holds a value which is not finite, of `values` (weights or grads); 0 where
 * there is none.  model_bad_weight: of all weights. */
int model_not_finite(Model *m, Block *b, const float *values, char name[64]);
int model_bad_weight(Model *m, char name[64]);

/* ops.h -- the operator table, made from ops.def, and the words its arguments use. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Activations have the backend's element type.  A file that computes on them names it before this include
 * (`#define ACT float`); everybody else only passes the pointers on. */
#ifdef ACT
typedef ACT act;
#else
typedef void act;
#endif

enum { PREC_FP32, PREC_BF16, PREC_INT8 };
enum { FN_NONE, FN_GELU_TANH, FN_GELU_ERF };
enum { NORM_LAYERNORM, NORM_RMSNORM };
enum { SAMPLE_TEMPERATURE, SAMPLE_TOP_K, SAMPLE_TOP_P, SAMPLE_MIN_P, SAMPLE_COUNT };
/* What an update is told, in floats, in the backend's memory. */
enum {
    HYPER_LR,
    HYPER_BETA1,
    HYPER_BETA2,
    HYPER_EPS,
    HYPER_C1,
    HYPER_C2,
    HYPER_DECAY,
    HYPER_CLIP,
    HYPER_LOSS_LIMIT,
    HYPER_NORM_LIMIT,
    HYPER_SCALE,
    HYPER_COUNT
};

/* The order of summation, see ops.def: units a block; over rows units a block and units a chain; keys a block. */
enum { K_BLOCK = 256, ROW_BLOCK = 64, ROW_CHAIN = 8, KEY_BLOCK = 64 };
/* Values that share a scale in int8. */
enum { INT8_GROUP = 64 };
/* Where a weight may be cut that is packed in parts, see linear_pack: whole panels of every backend. */
enum { PACK_ROWS = 768 };

typedef struct {
    const char *name;
    size_t act_bytes;   /* bytes of one activation */
    int on_host;        /* whether its memory is that of the host */
    int head_rows;      /* rows whose logits a training step holds at a time: a multiple of 2 K_BLOCK */
    int rounds_weights; /* whether its products in bf16 gain from weights that are bf16 already */
    /* Bytes of norms and of the MLP's activations that forward keeps for backward at most; of more it keeps none, and
     * backward makes them again, which takes a little time. */
    int64_t recompute_above;
    /* Called by a thread before whatever it does with the backend, between which no other thread does anything with it.
     * NULL: threads may work side by side. */
    void (*enter)(void);
    int64_t (*memory_free)(void); /* bytes that alloc could still give */
    const char *(*error)(void);   /* the first failure of any operator, which stays; NULL: none.  Or NULL: none fails */
    void *(*alloc)(size_t bytes); /* zero-filled; NULL where there is not enough */
    void (*free)(void *p, size_t bytes);
    void (*copy_in)(void *dst, const void *src, size_t bytes);  /* host to backend */
    void (*copy_out)(void *dst, const void *src, size_t bytes); /* backend to host */
    void (*copy)(void *dst, const void *src, size_t bytes);     /* within the backend */
    void (*zero)(void *p, size_t bytes);
    int64_t (*packed_bytes)(int prec, int C, int OC); /* of a weight, see linear_pack */
    int64_t (*held_bytes)(int held, int C, int OC);   /* of a weight, see held_write; of vectors C is 1 */
    int64_t (*page_bytes)(int prec, int NKV, int HS); /* of 64 keys and values, see attention_paged */
    double (*peak_flops)(int prec, double seconds);   /* multiply-adds of one thread, counted as 2, per second */
    /* Calls that are the same each time, kept and done again at once (repeat.h); or NULL, all four.  What follows
     * `record` is kept and not done, until `recorded` gives it (NULL: it failed, and `error` says why).  `replay` does
     * it; 0: it cannot be done any more and is to be recorded again. */
    void (*record)(void);
    void *(*recorded)(void);
    int (*replay)(const void *recording);
    void (*forget)(void *recording);
#define OP(name, args) void(*name) args;
#include "ops.def"
#undef OP
} Ops;

/* The backends that were compiled in, best first, NULL at the end. */
extern const Ops *const ops_compiled[];
/* Whether this machine can run it. */
int ops_usable(const Ops *ops);
/* The backend of that name; NULL: BARELM_ISA, or the best.  NULL where there is none that can run here. */
const Ops *ops_select(const char *name);

/* block.h -- parameters in one block: their values and, where they are trained, gradients and AdamW's moments, laid out
 * alike.  Gradients and moments exist from their first use on.  `error`: ERROR_ROOM bytes (status.h). */
#pragma once
#include "layout.h"

typedef struct {
    const Ops *ops;
    Layout layout;
    int n_layer;
    float *weights, *grads, *m, *v;  /* the moments m and v are one allocation */
    int live;                        /* 0: the content of grads is stale and reads as zero */
    int64_t *ranges, *device_ranges; /* where each tensor of each layer begins, in order of memory; and the end */
    char *decays;
    int n_ranges;
    double *sums; /* squares of each tensor, then their norm */
    float *hyper;
} Block;

Status block_create(Block *b, const Ops *ops, const Layout *layout, int n_layer, char *error);
void block_free(Block *b);

/* Gradients exist; those that are only ever added to are cleared where a new step begins.  `written`: one of them that
 * the first pass of a step writes (as it does the matrices of layers), or -1. */
Status block_begin_grads(Block *b, int written, char *error);
/* All of them can be read. */
Status block_grads(Block *b, char *error);
Status block_moments(Block *b, char *error);

/* Clip and AdamW with `hyper` of ops.h, all but its scale; no update where the norm is above skip_above or not finite.
 * Returns whether there was one. */
int block_update(Block *b, double *norm, const float *hyper, float weight_decay, float clip, double skip_above);

/* The first tensor of `values` (weights or grads) with a value that is not finite: the offset of that value; -1 where
 * all are. */
int64_t block_not_finite(Block *b, const float *values);

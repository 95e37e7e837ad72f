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
    int32_t *decays, *device_decays; /* of each */
    int n_ranges;
    void *rounded; /* the weights in bf16, which every update writes too; or NULL */
    double *sums;  /* squares of each tensor, then their norm, then the loss that the gradients are of */
    float *hyper;
} Block;

Status block_create(Block *b, const Ops *ops, const Layout *layout, int n_layer, char *error);
void block_free(Block *b);

/* Gradients exist. */
Status block_make_grads(Block *b, char *error);
/* Where a new step begins: what is only ever added to is zero, the loss too.  `written`: a tensor that the first pass
 * of a step writes (as it does the matrices of layers), or -1. */
void block_clear_grads(Block *b, int written);
/* All of them can be read. */
Status block_grads(Block *b, char *error);
Status block_moments(Block *b, char *error);
double *block_loss(const Block *b); /* in the backend's memory */

/* Norm, clip and AdamW with b->hyper, all but its scale. */
void block_update(Block *b);
/* What came of it. */
void block_results(const Block *b, double *norm, double *loss);

/* The first tensor of `values` (weights or grads) with a value that is not finite: the offset of that value; -1 where
 * all are. */
int64_t block_not_finite(Block *b, const float *values);

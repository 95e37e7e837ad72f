/* gpu.h -- what a model takes on a GPU: for the table of the CUDA backend (cuda/table.cu), and for plans that are made
 * where there is none (gpu.c). */
#pragma once
#include "ops.h"

enum { GPU_HEAD_ROWS = 4096 }; /* the gradient of the head's weight is read and written again for each so many */
#define GPU_RECOMPUTE_ABOVE INT64_MAX

/* As Ops has it: rows of floats, of bf16, or of groups of 64 bytes with a scale each. */
static inline int64_t gpu_held_bytes(int held, int C, int OC) {
    const int64_t groups = (C + INT8_GROUP - 1) / INT8_GROUP, group = sizeof(float) + INT8_GROUP;
    return held == PREC_INT8 ? OC * groups * group : (int64_t)OC * C * (held == PREC_BF16 ? 2 : 4);
}

/* The sizes of the backend for products of precision prec, for model_memory: a table without operators. */
const Ops *gpu_sizes(int prec);

/* gpu.c -- see gpu.h. */
#include "gpu.h"

const Ops *gpu_sizes(int prec) {
    static const Ops fp32 = {.act_bytes = sizeof(float),
                             .head_rows = GPU_HEAD_ROWS,
                             .recompute_above = GPU_RECOMPUTE_ABOVE,
                             .held_bytes = gpu_held_bytes};
    static const Ops bf16 = {.act_bytes = 2,
                             .head_rows = GPU_HEAD_ROWS,
                             .rounds_weights = 1,
                             .recompute_above = GPU_RECOMPUTE_ABOVE,
                             .held_bytes = gpu_held_bytes};
    return prec == PREC_BF16 ? &bf16 : &fp32;
}

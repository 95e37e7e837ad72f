/* gpu.c -- see gpu.h. */
#include "gpu.h"

static int64_t held_bytes(int held, int C, int OC) { return gpu_held_bytes(held, C, OC); }

const Ops *gpu_sizes(int prec) {
    static const Ops fp32 = {.act_bytes = sizeof(float),
                             .head_rows = GPU_HEAD_ROWS,
                             .recompute_above = GPU_RECOMPUTE_ABOVE,
                             .held_bytes = held_bytes};
    static const Ops bf16 = {.act_bytes = 2,
                             .head_rows = GPU_HEAD_ROWS,
                             .rounds_weights = 1,
                             .recompute_above = GPU_RECOMPUTE_ABOVE,
                             .held_bytes = held_bytes};
    return prec == PREC_BF16 ? &bf16 : &fp32;
}

/* table.cu -- the operators as the table that model.c and session.c walk. */
#include "ops.cuh"
#include "../csrc/gpu.h"

extern "C" {
int64_t OPERATOR(packed_bytes)(int prec, int C, int OC);
int64_t OPERATOR(held_bytes)(int held, int C, int OC);
int64_t OPERATOR(page_bytes)(int prec, int NKV, int HS);
extern const Ops OPERATOR(ops_cuda);
}

namespace {
double no_peak(int, double) { return 0.0; } /* of a single thread: it says nothing of a GPU */
}  // namespace

/* In the order of csrc/ops.h. */
const Ops OPERATOR(ops_cuda) = {
    sizeof(act) == sizeof(float) ? "cuda, fp32" : "cuda, bf16",
    sizeof(act),
    0,
    GPU_HEAD_ROWS,
    sizeof(act) == sizeof(bf16),
    GPU_RECOMPUTE_ABOVE,
    cuda_enter,
    cuda_memory_free,
    cuda_error,
    cuda_alloc,
    cuda_free,
    cuda_copy_in,
    cuda_copy_out,
    cuda_copy,
    cuda_zero,
    OPERATOR(packed_bytes),
    OPERATOR(held_bytes),
    OPERATOR(page_bytes),
    no_peak,
    cuda_record,
    cuda_recorded,
    cuda_replay,
    cuda_forget,
#define OP(name, args) OPERATOR(name),
#include "../csrc/ops.def"
#undef OP
};

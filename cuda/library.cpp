/* library.cpp -- what csrc/bindings_cuda.cpp asks of the library: its tables, and which contract they keep; and what
 * benchmarks/bench_cuda.py asks. */
#include "../csrc/ops.h"

bool is_sm90(void);

extern "C" {
extern const Ops ops_cuda_float, ops_cuda_bf16;
__attribute__((weak)) int linear_sm90_tiling_bf16(int tiling);

#define EXPORT __attribute__((visibility("default")))

EXPORT const Ops *barelm_cuda_ops(int prec) { return prec == PREC_BF16 ? &ops_cuda_bf16 : &ops_cuda_float; }

/* Let products of activations on Hopper have tiles of that number, or with -1 those that suit their sizes; how many
 * kinds there are, none on another GPU. */
EXPORT int barelm_cuda_tiling(int tiling) {
    return linear_sm90_tiling_bf16 && is_sm90() ? linear_sm90_tiling_bf16(tiling) : 0;
}

/* Of a table: what else it has than operators. */
EXPORT size_t barelm_cuda_table_bytes(void) { return sizeof(Ops); }

EXPORT const char *barelm_cuda_contract(void) {
    return
#define OP(name, args) #name #args
#include "../csrc/ops.def"
#undef OP
        ;
}
}

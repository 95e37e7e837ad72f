/* library.cpp -- what csrc/bindings_cuda.cpp asks of the library: its tables, and which contract they keep. */
#include "../csrc/ops.h"

extern "C" {
extern const Ops ops_cuda_float, ops_cuda_bf16;

#define EXPORT __attribute__((visibility("default")))

EXPORT const Ops *barelm_cuda_ops(int prec) { return prec == PREC_BF16 ? &ops_cuda_bf16 : &ops_cuda_float; }

EXPORT const char *barelm_cuda_contract(void) {
    return
#define OP(name, args) #name #args
#include "../csrc/ops.def"
#undef OP
        ;
}
}

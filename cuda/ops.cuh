/* ops.cuh -- what every file of operators begins with: the type of activations, and the contract.
 *
 * Each file is compiled once for each type, `-DACT=float` and `-DACT=bf16`, as csrc/ is once for each instruction set;
 * OPERATOR(name) is then name_float or name_bf16.  All that is not an operator stands in a nameless namespace, for the
 * other copy has it too. */
#pragma once
#include "prim.cuh"
#include "runtime.h"
#ifndef ACT
#define ACT bf16
#endif
#include "../csrc/ops.h"

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define OPERATOR(name) CAT(name, ACT)

/* An operator whose arguments are not those of the contract does not compile. */
extern "C" {
#define OP(name, args) void OPERATOR(name) args;
#include "../csrc/ops.def"
#undef OP
}

namespace {
/* Activations that one access moves; a thread works on as many. */
enum { VEC = 16 / sizeof(act) };

/* A vector that is read, or written, with or without tests.  whole: all of it is there, and lies on 16 bytes. */
template <bool whole, class T>
__device__ inline Pack<T, VEC> vector_at(const T *p, int count) {
    return whole ? load_all<VEC>(p) : load<VEC>(p, count);
}
template <bool whole>
__device__ inline void vector_to(act *p, const float (&x)[VEC], int count) {
    if (whole) store_all(p, pack_of(act{}, x));
    else store(p, x, count);
}

/* exp(x) is exp2_fast(x * LOG2_E). */
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
}  // namespace

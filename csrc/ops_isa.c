/* ops_isa.c -- the operator table of one instruction set, and its peak. */
#include "linear.h"
#include "tile.h"
#include "memory.h"
#include "system.h"
#include "clock.h"

/* Multiply-adds that never leave the registers: as many independent chains as the micro-kernel of matmul has.  The
 * empty asm makes the compiler believe that the operands change and the result is read, else it would skip the loop. */
static double peak_flops(int prec, double seconds) {
    enum { STEPS = 1 << 16 };
    const int pairs = prec == PREC_BF16 && HAVE_PAIRS;
    float a[MR] = {0}, b[NV * W] = {0}, c[MR * NV * W];
    double start = now(), best = 0;
    do {
        double t = now();
        __asm__ volatile("" : : "r"(a), "r"(b) : "memory");
        if (pairs) tile(MR, NV, HAVE_PAIRS, STEPS, a, 1, 0, b, 0, c, NV * W, 0);
        else tile(MR, NV, 0, STEPS, a, 1, 0, b, 0, c, NV * W, 0);
        __asm__ volatile("" : : "r"(c) : "memory");
        double rate = 2.0 * (pairs ? 2 : 1) * STEPS * MR * NV * W / (now() - t);
        if (rate > best) best = rate;
    } while (now() - start < seconds);
    return best;
}

/* Activations are floats here. */
void CAT(act_read, ISA)(float *out, const float *in, int N, int C, int ld) {
    if (C == ld) memory_copy(out, in, (size_t)N * (size_t)C * sizeof *out);
    else
        for (int64_t n = 0; n < N; n++) memory_copy(out + n * C, in + n * ld, (size_t)C * sizeof *out);
}
void CAT(act_write, ISA)(float *out, const float *in, int64_t n) { memory_copy(out, in, (size_t)n * sizeof *out); }

int64_t CAT(packed_bytes, ISA)(int prec, int C, int OC);
int64_t CAT(held_bytes, ISA)(int held, int C, int OC);
int64_t CAT(page_bytes, ISA)(int prec, int NKV, int HS);

const Ops CAT(ops, ISA) = {
    .name = STR(ISA),
    .act_bytes = sizeof(float),
    .on_host = 1,
    .head_rows = 2 * K_BLOCK,
    .recompute_above = 64 << 20, /* what lies in a cache is cheaper kept */
    .memory_free = system_memory_free,
    .alloc = memory_alloc,
    .free = memory_free,
    .copy_in = memory_copy,
    .copy_out = memory_copy,
    .copy = memory_copy,
    .zero = memory_zero,
    .packed_bytes = CAT(packed_bytes, ISA),
    .held_bytes = CAT(held_bytes, ISA),
    .page_bytes = CAT(page_bytes, ISA),
    .peak_flops = peak_flops,
#define OP(name, args) .name = CAT(name, ISA),
#include "ops.def"
#undef OP
};

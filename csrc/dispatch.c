/* dispatch.c -- choose a backend: the best this machine can run, or the one that is named. */
#include <stdlib.h>
#include <string.h>
#include "ops.h"

/* CMake lists the instruction sets that were compiled, best first: BARELM_ISAS = X(avx512_bf16) X(avx512) X(avx2), or
 * X(neon) */
#define X(isa) extern const Ops ops_##isa;
BARELM_ISAS
#undef X
extern const Ops ops_ref;

#define X(isa) &ops_##isa,
const Ops *const ops_compiled[] = {BARELM_ISAS & ops_ref, NULL};
#undef X

/* The builtin asks the CPU, and whether the operating system saves the registers. */
int ops_usable(const Ops *ops) {
#if defined(__x86_64__)
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(ops->name, "avx2")) return avx2;
    if (!strcmp(ops->name, "avx512")) return avx512;
    if (!strcmp(ops->name, "avx512_bf16"))
        return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
#if defined(BARELM_SIMDE)
    if (!strcmp(ops->name, "neon")) return avx2;
#elif defined(__aarch64__)
    if (!strcmp(ops->name, "neon")) return 1;
#endif
    return ops == &ops_ref;
}

const Ops *ops_select(const char *name) {
    if (!name) name = getenv("BARELM_ISA");
    if (name && !*name) name = NULL;
    for (const Ops *const *p = ops_compiled; *p; p++)
        if (ops_usable(*p) && (!name || !strcmp(name, (*p)->name))) return *p;
    return NULL;
}

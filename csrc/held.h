/* held.h -- weights that are not trained, in less memory than floats: how they lie, and how a part of one is read.
 *
 * Rows lie one behind the other.  A row is of floats; or of bf16; or, in int8, of groups of 64 values along C with a
 * scale each (as LLM.int8() of Dettmers et al. 2022, arXiv:2208.07339, quantises whole rows): x = q * scale,
 * scale = max |x| / 127, q the nearest integer. */
#pragma once
#include "simd.h"

typedef struct {
    float scale;
    int8_t q[INT8_GROUP];
} Group;

INLINE int groups_of(int C) { return (C + INT8_GROUP - 1) / INT8_GROUP; }

/* q[0 .. 63] and the scale of up to 64 values; the rest of q is 0.  A value that is not finite makes the scale so. */
static inline float quantise(int8_t *q, const float *x, int values) {
    vf most = vset(0.0f), bad = vset(0.0f);
    for (int i = 0; i < values; i += W) {
        vf v = vload(x + i, min_int(W, values - i));
        most = vmax(vabs(v), most);
        bad = bad + v * vset(0.0f);
    }
    float max = vhmax(most);
    vf inverse = vset(max > 0 ? 127.0f / max : 0.0f);
    for (int i = 0; i < INT8_GROUP; i += W)
        vstore_int8(q + i, vround(vload(x + i, min_int(W, values > i ? values - i : 0)) * inverse));
    return max / 127.0f + vsum(bad);
}

/* Where value c of row o lies. */
INLINE const char *held_at(const void *weight, int held, int C, int64_t o, int c) {
    if (held == PREC_INT8) {
        const Group *g = (const Group *)weight + o * groups_of(C) + c / INT8_GROUP;
        return (const char *)(g->q + c % INT8_GROUP);
    }
    return (const char *)weight + (o * C + c) * (held == PREC_BF16 ? 2 : 4);
}

int64_t CAT(held_bytes, ISA)(int held, int C, int OC);
/* out[0 .. n-1] = values c .. c + n - 1 of row o, as floats */
void CAT(held_part, ISA)(float *out, const void *weight, int held, int C, int64_t o, int c, int n);

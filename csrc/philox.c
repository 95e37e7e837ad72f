/* philox.c -- see philox.h. */
#include "philox.h"
#include <math.h>
#include "threads.h"

/* The key has 64 bits and the counter 128; seed and stream share the key, row and position the counter.  The seed's
 * high half moves into the counter's top, so that seeds above 2^32 differ as well. */
void philox(uint32_t out[4], uint64_t seed, uint32_t stream, uint64_t row, uint64_t position) {
    uint32_t k0 = (uint32_t)seed, k1 = stream;
    uint32_t c[4] = {(uint32_t)position, (uint32_t)(position >> 32), (uint32_t)row,
                     (uint32_t)(row >> 32) ^ (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t x0 = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, x2 = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
        c[1] = (uint32_t)p1;
        c[3] = (uint32_t)p0;
        c[0] = x0;
        c[2] = x2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++) out[i] = c[i];
}

static double unit(uint32_t high, uint32_t low) { return (double)((uint64_t)high << 21 | low >> 11) * 0x1p-53; }

double philox_uniform(uint64_t seed, uint32_t stream, uint64_t row, uint64_t position) {
    uint32_t r[4];
    philox(r, seed, stream, row, position);
    return unit(r[0], r[1]);
}

typedef struct {
    float *out;
    int64_t n;
    float std;
    uint64_t seed, row;
    uint32_t stream;
} Normal;

enum { NORMALS_A_TASK = 1 << 14 };

/* Box-Muller: two normals from one call, in double so that the tails are right. */
static void normal_task(void *context, int task) {
    const Normal *a = context;
    int64_t begin = (int64_t)task * NORMALS_A_TASK, end = begin + NORMALS_A_TASK < a->n ? begin + NORMALS_A_TASK : a->n;
    for (int64_t i = begin; i < end; i += 2) {
        uint32_t r[4];
        philox(r, a->seed, a->stream, a->row, (uint64_t)i / 2);
        double radius = sqrt(-2 * log(1 - unit(r[0], r[1]))), angle = 6.283185307179586 * unit(r[2], r[3]);
        a->out[i] = (float)(a->std * radius * cos(angle));
        if (i + 1 < end) a->out[i + 1] = (float)(a->std * radius * sin(angle));
    }
}

void philox_normal(float *out, int64_t n, float std, uint64_t seed, uint32_t stream, uint64_t row) {
    Normal a = {out, n, std, seed, row, stream};
    parallel_for(normal_task, &a, (int)((n + NORMALS_A_TASK - 1) / NORMALS_A_TASK));
}

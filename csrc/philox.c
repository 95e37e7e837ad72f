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
    int64_t first, n;
    float std;
    uint64_t seed, row;
    uint32_t stream;
} Normal;

enum { NORMALS_A_TASK = 1 << 14 };

/* Box, Muller 1958: two normals from two uniforms.  In fp32, with 32 random bits each, the tails end at 6.7 standard
 * deviations; in double it would take three times as long, and a 1.5 B model's first weights half a minute. */
static void two_normals(float *x, float *y, uint32_t a, uint32_t b, float std) {
    float radius = std * sqrtf(-2 * logf(((float)a + 1) * 0x1p-32f)), angle = 6.2831853f * ((float)b * 0x1p-32f);
    *x = radius * cosf(angle);
    *y = radius * sinf(angle);
}

static void normal_task(void *context, int task) {
    const Normal *a = context;
    const int64_t end = a->first + a->n;
    int64_t begin = a->first + (int64_t)task * NORMALS_A_TASK, stop = begin + NORMALS_A_TASK;
    if (stop > end) stop = end;
    for (int64_t i = begin / 4 * 4; i < stop; i += 4) { /* four come together */
        uint32_t r[4];
        float x[4];
        philox(r, a->seed, a->stream, a->row, (uint64_t)i / 4);
        two_normals(x, x + 1, r[0], r[1], a->std);
        two_normals(x + 2, x + 3, r[2], r[3], a->std);
        for (int j = 0; j < 4; j++)
            if (i + j >= begin && i + j < stop) a->out[i + j - a->first] = x[j];
    }
}

void philox_normal(float *out, int64_t first, int64_t n, float std, uint64_t seed, uint32_t stream, uint64_t row) {
    Normal a = {out, first, n, std, seed, row, stream};
    parallel_for(normal_task, &a, (int)((n + NORMALS_A_TASK - 1) / NORMALS_A_TASK));
}

/* lora.c -- what an adapter needs beside the products: its B's as one matrix with zeros between them, and the gradient
 * of that matrix back to theirs.  One pass over a small matrix: bound by memory. */
#include "simd.h"
#include "threads.h"

typedef struct {
    float *dense;
    const float *blocks;
    const int32_t *rows;
    float scale;
    int J, r, OC, at_once;
} Spread;

/* Which group row o belongs to, and where it lies among the rows of all groups; -1: to none. */
static int group_of(const int32_t *rows, int J, int o, int64_t *place) {
    int64_t before = 0;
    for (int j = 0; j < J; before += rows[2 * j + 1] - rows[2 * j], j++)
        if (o >= rows[2 * j] && o < rows[2 * j + 1]) {
            *place = before + o - rows[2 * j];
            return j;
        }
    return -1;
}

static void spread(void *context, int task) {
    const Spread *s = context;
    const int64_t width = (int64_t)s->J * s->r;
    for (int o = task * s->at_once; o < min_int(s->OC, (task + 1) * s->at_once); o++) {
        int64_t place;
        int j = group_of(s->rows, s->J, o, &place);
        memset(s->dense + o * width, 0, (size_t)width * sizeof(float));
        for (int i = 0; i < s->r && j >= 0; i++)
            s->dense[o * width + j * s->r + i] = s->scale * s->blocks[place * s->r + i];
    }
}

void CAT(lora_spread, ISA)(float *dense, const float *blocks, const int32_t *rows, float scale, int J, int r, int OC) {
    Spread s = {dense, blocks, rows, scale, J, r, OC, rows_per_task((int64_t)J * r)};
    parallel_for(spread, &s, tasks_for(OC, s.at_once));
}

typedef struct {
    float *dblocks;
    const float *ddense;
    const int32_t *rows;
    float scale;
    int accumulate, J, r, OC, at_once;
} Gather;

static void gather(void *context, int task) {
    const Gather *g = context;
    const int64_t width = (int64_t)g->J * g->r;
    for (int o = task * g->at_once; o < min_int(g->OC, (task + 1) * g->at_once); o++) {
        int64_t place;
        int j = group_of(g->rows, g->J, o, &place);
        for (int i = 0; i < g->r && j >= 0; i++) {
            float *d = g->dblocks + place * g->r + i, x = g->scale * g->ddense[o * width + j * g->r + i];
            *d = g->accumulate ? *d + x : x;
        }
    }
}

void CAT(lora_gather, ISA)(float *dblocks, const float *ddense, const int32_t *rows, float scale, int accumulate, int J,
                           int r, int OC) {
    Gather g = {dblocks, ddense, rows, scale, accumulate, J, r, OC, rows_per_task((int64_t)J * r)};
    parallel_for(gather, &g, tasks_for(OC, g.at_once));
}

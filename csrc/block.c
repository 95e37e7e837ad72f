/* block.c -- parameters in one block, with their gradients and moments: memory, norm, update. */
#include "block.h"
#include <math.h>
#include <stdlib.h>
#include "status.h"

static size_t decays_bytes(const Block *b) { return (size_t)b->n_ranges * sizeof *b->decays; }

/* Each tensor of each layer is one range of the gradient norm, so that a bad one can be named. */
static Status tensor_ranges(Block *b, char *error) {
    size_t room = (size_t)b->layout.n * (size_t)b->n_layer + 1;
    b->ranges = malloc(room * sizeof *b->ranges);
    b->decays = malloc(room * sizeof *b->decays);
    if (!b->ranges || !b->decays) return failed(error, NO_MEMORY, "table of tensors: no memory");
    int n = 0;
    for (int where = BEFORE; where <= BEHIND; where++)
        for (int l = 0; l < (where == LAYERED ? b->n_layer : 1); l++)
            for (int i = 0; i < b->layout.n; i++) {
                const Param *p = &b->layout.p[i];
                if (p->where != where || !p->floats) continue;
                b->decays[n] = p->decay;
                b->ranges[n++] = layout_at(&b->layout, b->weights, i, l) - b->weights;
            }
    b->ranges[n] = b->layout.floats;
    b->n_ranges = n;
    size_t bytes = ((size_t)n + 1) * sizeof *b->ranges;
    Status s = allocate(b->ops, error, (void **)&b->device_ranges, (int64_t)bytes, "table of tensors");
    if (!s) b->ops->copy_in(b->device_ranges, b->ranges, bytes);
    if (!s) s = allocate(b->ops, error, (void **)&b->device_decays, (int64_t)decays_bytes(b), "table of tensors");
    if (!s) b->ops->copy_in(b->device_decays, b->decays, decays_bytes(b));
    return s;
}

static size_t bytes_of(const Block *b) { return (size_t)b->layout.floats * sizeof(float); }
static size_t sums_bytes(const Block *b) { return ((size_t)b->n_ranges + 2) * sizeof(double); }
static double *norm_of(const Block *b) { return b->sums + b->n_ranges; }
double *block_loss(const Block *b) { return b->sums + b->n_ranges + 1; }

Status block_create(Block *b, const Ops *ops, const Layout *layout, int n_layer, char *error) {
    *b = (Block){.ops = ops, .layout = *layout, .n_layer = n_layer};
    Status s = allocate(ops, error, (void **)&b->weights, (int64_t)bytes_of(b), "weights");
    if (!s) s = tensor_ranges(b, error);
    if (!s) s = allocate(ops, error, (void **)&b->sums, (int64_t)sums_bytes(b), "gradient norm");
    if (!s) s = allocate(ops, error, (void **)&b->hyper, HYPER_COUNT * sizeof(float), "step sizes");
    return s;
}

void block_free(Block *b) {
    if (b->weights) b->ops->free(b->weights, bytes_of(b));
    if (b->grads) b->ops->free(b->grads, bytes_of(b));
    if (b->m) b->ops->free(b->m, 2 * bytes_of(b));
    if (b->sums) b->ops->free(b->sums, sums_bytes(b));
    if (b->hyper) b->ops->free(b->hyper, HYPER_COUNT * sizeof(float));
    if (b->device_ranges) b->ops->free(b->device_ranges, (size_t)(b->n_ranges + 1) * sizeof *b->ranges);
    if (b->device_decays) b->ops->free(b->device_decays, decays_bytes(b));
    free(b->ranges);
    free(b->decays);
    *b = (Block){0};
}

/* ---- gradients and moments --------------------------------------------------------------------------------------- */

Status block_make_grads(Block *b, char *error) {
    return b->grads ? OK : allocate(b->ops, error, (void **)&b->grads, (int64_t)bytes_of(b), "gradients");
}

void block_clear_grads(Block *b, int written) {
    if (b->live) return;
    b->ops->zero(block_loss(b), sizeof(double));
    const Param *p = b->layout.p;
    for (int i = 0; i < b->layout.n; i++) {
        if (!p[i].floats || (p[i].where == LAYERED && p[i].columns) || i == written) continue;
        for (int l = 0; l < (p[i].where == LAYERED ? b->n_layer : 1); l++)
            b->ops->zero(layout_at(&b->layout, b->grads, i, l), (size_t)p[i].floats * sizeof(float));
    }
}

Status block_grads(Block *b, char *error) {
    Status s = block_make_grads(b, error);
    if (s || b->live) return s;
    b->ops->zero(b->grads, bytes_of(b));
    b->ops->zero(block_loss(b), sizeof(double));
    b->live = 1;
    return OK;
}

Status block_moments(Block *b, char *error) {
    Status s = OK;
    if (!b->m) s = allocate(b->ops, error, (void **)&b->m, 2 * (int64_t)bytes_of(b), "moments");
    if (!s) b->v = b->m + b->layout.floats;
    return s;
}

/* ---- update ------------------------------------------------------------------------------------------------------ */

void block_update(Block *b) {
    b->ops->square_sums(b->sums, b->grads, b->device_ranges, b->n_ranges);
    b->ops->clip_scale(b->hyper, norm_of(b), block_loss(b), b->sums, b->n_ranges);
    b->ops->adamw(b->weights, b->m, b->v, b->rounded, b->grads, b->hyper, b->device_ranges, b->device_decays,
                  b->n_ranges, b->layout.floats);
}

void block_results(const Block *b, double *norm, double *loss) {
    double both[2];
    b->ops->copy_out(both, norm_of(b), sizeof both);
    *norm = both[0], *loss = both[1];
}

/* ---- what is not finite ------------------------------------------------------------------------------------------ */

/* Where the first value that is not finite lies between two offsets; -1 where all are finite. */
static int64_t first_not_finite(const Block *b, const float *values, int64_t begin, int64_t end) {
    float x[1024];
    for (int64_t at = begin; at < end; at += 1024) {
        int n = end - at < 1024 ? (int)(end - at) : 1024;
        b->ops->copy_out(x, values + at, (size_t)n * sizeof(float));
        for (int i = 0; i < n; i++)
            if (!isfinite(x[i])) return at + i;
    }
    return -1;
}

int64_t block_not_finite(Block *b, const float *values) {
    b->ops->square_sums(b->sums, values, b->device_ranges, b->n_ranges);
    for (int i = 0; i < b->n_ranges; i++) {
        double sum;
        b->ops->copy_out(&sum, b->sums + i, sizeof sum);
        int64_t at = isfinite(sum) ? -1 : first_not_finite(b, values, b->ranges[i], b->ranges[i + 1]);
        if (at >= 0) return at;
    }
    return -1;
}

/* model_values.c -- what the tensors of a model hold: read, written, and searched for what is not finite. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "model.h"

/* ---- reading and writing weights --------------------------------------------------------------------------------- */

/* Some rows of a tensor in a block. */
typedef struct {
    char *p;
    int held, C, rows;
    int64_t bytes; /* as floats */
} Rows;

/* The block is made where it does not exist yet. */
static Status rows_of(Model *m, int block, const Tensor *t, int64_t row, int64_t rows, Rows *r) {
    const int C = t->columns ? (int)t->columns : 1;
    float *floats = m->added.weights, *moments[2];
    *r = (Rows){.held = PREC_FP32, .C = C, .rows = (int)rows, .bytes = rows * C * (int64_t)sizeof(float)};
    if (block == WEIGHTS) {
        r->held = m->base.layout.p[t->param].held;
        r->p = (char *)layout_at(&m->base.layout, m->base.weights, t->param, t->layer) +
               m->ops->held_bytes(r->held, C, (int)(t->row + row));
        return OK;
    }
    Status s = OK;
    if (block == GRADIENTS) s = model_grads(m, &floats);
    if (block == FIRST_MOMENT || block == SECOND_MOMENT) {
        s = model_moments(m, moments);
        if (!s) floats = moments[block - FIRST_MOMENT];
    }
    if (!s) r->p = (char *)(floats + t->offset + row * C);
    return s;
}

Status model_put(Model *m, int block, const Tensor *t, int64_t row, const float *values, int64_t rows) {
    Rows r;
    Status s = rows_of(m, block, t, row, rows, &r);
    if (s) return s;
    if (block == WEIGHTS) m->low_stale = 1;
    if (r.held == PREC_FP32) {
        m->ops->copy_in(r.p, values, (size_t)r.bytes);
        return checked_device(m->ops, m->error, OK);
    }
    float *part;
    if ((s = allocate(m->ops, m->error, (void **)&part, r.bytes, "part of a weight"))) return s;
    m->ops->copy_in(part, values, (size_t)r.bytes);
    m->ops->held_write(r.p, part, r.held, r.C, r.rows);
    m->ops->free(part, (size_t)r.bytes);
    return checked_device(m->ops, m->error, OK);
}

Status model_get(Model *m, int block, const Tensor *t, int64_t row, float *values, int64_t rows) {
    Rows r;
    Status s = rows_of(m, block, t, row, rows, &r);
    if (s) return s;
    if (r.held == PREC_FP32) {
        m->ops->copy_out(values, r.p, (size_t)r.bytes);
        return checked_device(m->ops, m->error, OK);
    }
    float *part;
    if ((s = allocate(m->ops, m->error, (void **)&part, r.bytes, "part of a weight"))) return s;
    m->ops->held_read(part, r.p, r.held, r.C, r.rows);
    m->ops->copy_out(values, part, (size_t)r.bytes);
    m->ops->free(part, (size_t)r.bytes);
    return checked_device(m->ops, m->error, OK);
}

/* ---- what is not finite ------------------------------------------------------------------------------------------ */

/* The name of the tensor that holds the float at this offset of a block of floats. */
static void name_of(const Model *m, const Block *b, int64_t at, char name[64]) {
    const int added = b == &m->added;
    int n = added ? adapter_tensors(&m->c, &m->adapter, NULL) : model_tensors(&m->c, NULL);
    Tensor *all = malloc((size_t)n * sizeof *all);
    snprintf(name, 64, "value %" PRId64, at);
    if (all && added) adapter_tensors(&m->c, &m->adapter, all);
    else if (all) model_tensors(&m->c, all);
    for (int i = 0; all && i < n; i++)
        if (at >= all[i].offset && at < all[i].offset + all[i].rows * (all[i].columns ? all[i].columns : 1))
            snprintf(name, 64, "%s", all[i].name);
    free(all);
}

int model_not_finite(Model *m, Block *b, const float *values, char name[64]) {
    int64_t at = block_not_finite(b, values);
    if (at >= 0) name_of(m, b, at, name);
    return at >= 0;
}

/* The same for weights that are held otherwise than as floats: row by row. */
static int find_in_held(Model *m, char name[64]) {
    int n = model_tensors(&m->c, NULL), found = 0;
    Tensor *all = malloc((size_t)n * sizeof *all);
    float *row = malloc((size_t)model_widest(&m->base.layout) * sizeof *row);
    if (all && row) model_tensors(&m->c, all);
    for (int i = 0; all && row && i < n && !found; i++)
        for (int64_t r = 0; r < all[i].rows && !found; r++) {
            int64_t columns = all[i].columns ? all[i].columns : 1;
            if (model_get(m, WEIGHTS, &all[i], r, row, 1)) break;
            for (int64_t c = 0; c < columns && !found; c++) found = !isfinite(row[c]);
            if (found) snprintf(name, 64, "%s", all[i].name);
        }
    free(all);
    free(row);
    return found;
}

int model_bad_weight(Model *m, char name[64]) {
    if (m->adapter.rank && model_not_finite(m, &m->added, m->added.weights, name)) return 1;
    return m->held == PREC_FP32 ? model_not_finite(m, &m->base, m->base.weights, name) : find_in_held(m, name);
}

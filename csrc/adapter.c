/* adapter.c -- which layers of a model have a LoRA adapter, and where its A's and B's lie. */
#include "adapter.h"
#include <stdio.h>

static int width_of(const Adapter *a, int slot) { return a->J[slot] * a->rank; }

/* One tensor of every layer, behind those before it. */
static void add_param(Layout *y, int at, int64_t rows, int64_t columns) {
    Param *p = &y->p[at];
    *p = (Param){.where = LAYERED, .decay = 1, .rows = rows, .columns = columns, .floats = rows * columns};
    p->offset = y->layer_floats;
    y->layer_floats += layout_aligned(p->floats);
}

Adapter adapter_of(const Config *c, int rank, float scale, const char *chosen) {
    Adapter a = {.rank = rank, .scale = scale};
    const Layout base = param_layout(c);
    Module all[MOST_MODULES];
    int n = model_modules(c, all);
    for (int m = 0; m < n; m++) {
        if (!chosen[m]) continue;
        int slot = all[m].param - P_qkv_w, j = a.J[slot]++;
        a.module[slot][j] = m;
        a.rows[slot][j][0] = (int32_t)all[m].row, a.rows[slot][j][1] = (int32_t)(all[m].row + all[m].rows);
    }
    for (int slot = 0; slot < LINEARS; slot++) {
        int64_t rows = 0;
        for (int j = 0; j < a.J[slot]; j++) rows += a.rows[slot][j][1] - a.rows[slot][j][0];
        add_param(&a.layout, 2 * slot + ADAPTER_A, width_of(&a, slot), base.p[P_qkv_w + slot].columns);
        add_param(&a.layout, 2 * slot + ADAPTER_B, rows, rank);
    }
    a.layout.n = 2 * LINEARS;
    a.layout.floats = a.layout.layer_floats * c->n_layer;
    return a;
}

static void tensor(const Config *c, const Adapter *a, Tensor *t, const Module *m, int l, int part, int slot,
                   int64_t row, int64_t rows) {
    const Param *p = &a->layout.p[2 * slot + part];
    *t = (Tensor){.param = 2 * slot + part, .layer = l, .row = row, .rows = rows, .columns = p->columns, .decay = 1};
    t->offset = p->offset + l * a->layout.layer_floats + row * p->columns;
    snprintf(t->name, sizeof t->name, "%s.%d.%s.lora_%c.weight", layer_prefix(c), l, m->name, "AB"[part]);
}

int adapter_tensors(const Config *c, const Adapter *a, Tensor *out) {
    Module all[MOST_MODULES];
    model_modules(c, all);
    int n = 0;
    for (int l = 0; l < c->n_layer; l++)
        for (int slot = 0; slot < LINEARS; slot++)
            for (int64_t j = 0, before = 0; j < a->J[slot]; j++, n += 2) {
                int64_t rows = a->rows[slot][j][1] - a->rows[slot][j][0];
                const Module *m = &all[a->module[slot][j]];
                if (out) tensor(c, a, out + n, m, l, ADAPTER_A, slot, j * a->rank, a->rank);
                if (out) tensor(c, a, out + n + 1, m, l, ADAPTER_B, slot, before, rows);
                before += rows;
            }
    return n;
}

int adapter_width(const Adapter *a, int i) { return width_of(a, i - P_qkv_w); }

int adapter_before(const Adapter *a, int i) {
    int before = 0;
    for (int slot = 0; slot < i - P_qkv_w; slot++) before += width_of(a, slot);
    return before;
}

int adapter_total(const Adapter *a) { return adapter_before(a, P_qkv_w + LINEARS); }

int adapter_most(const Adapter *a) {
    int most = 0;
    for (int slot = 0; slot < LINEARS; slot++)
        if (width_of(a, slot) > most) most = width_of(a, slot);
    return most;
}

int64_t adapter_dense(const Adapter *a, const Layout *base) {
    int64_t most = 0;
    for (int slot = 0; slot < LINEARS; slot++) {
        int64_t floats = base->p[P_qkv_w + slot].rows * width_of(a, slot);
        if (floats > most) most = floats;
    }
    return most;
}

/* layout.c -- the lists of model.def made into offsets, names and tables. */
#include "layout.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { ALIGN_FLOATS = 16 };

int64_t layout_aligned(int64_t floats) { return (floats + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS; }

/* Position tables and vectors are small, and read as floats. */
static int can_be_held(int param, const Param *p) { return p->columns && param != P_wpe; }

static Layout lay_out(const Config *c, const Ops *ops, int held) {
    LIST_SIZES;
    Layout y = {.n = N_PARAMS,
                .p = {
#define PARAM(field, where_, rows_, columns_, decay_, init_) \
    {.where = where_, .decay = decay_, .init = init_, .rows = rows_, .columns = columns_},
#include "model.def"
                }};
    int64_t at = 0, layers_at = 0;
    for (int i = 0; i < N_PARAMS; i++) {
        Param *p = &y.p[i];
        if (p->where == LAYERED && y.p[i - 1].where == BEFORE) layers_at = at;
        if (p->where == BEHIND && y.p[i - 1].where == LAYERED) {
            y.layer_floats = at - layers_at;
            at += (L - 1) * y.layer_floats;
        }
        p->held = can_be_held(i, p) ? held : PREC_FP32;
        p->floats = p->rows * (p->columns ? p->columns : 1);
        if (p->held != PREC_FP32) p->floats = (ops->held_bytes(p->held, (int)p->columns, (int)p->rows) + 3) / 4;
        p->offset = at;
        at += layout_aligned(p->floats);
    }
    y.floats = at;
    return y;
}

Layout param_layout(const Config *c) { return lay_out(c, NULL, PREC_FP32); }
Layout held_layout(const Config *c, const Ops *ops, int held) { return lay_out(c, ops, held); }

float *layout_at(const Layout *y, float *block, int i, int l) {
    const Param *p = &y->p[i];
    return block && p->floats ? block + p->offset + (p->where == LAYERED ? l * y->layer_floats : 0) : NULL;
}

/* ---- names ------------------------------------------------------------------------------------------------------- */

enum { GPT2, LLAMA };

typedef struct {
    int family, param;
    int64_t row, rows;
    const char *name;
    int transposed;
} Name;

static int family_of(const Config *c) { return c->norm == NORM_LAYERNORM ? GPT2 : LLAMA; }

const char *layer_prefix(const Config *c) { return family_of(c) == GPT2 ? "h" : "layers"; }

/* The names of the model's family whose tensors exist. */
enum { MOST_NAMES = 64 };
static int names_of(const Config *c, const Layout *layout, Name *out) {
    LIST_SIZES;
    const Name list[] = {
#define NAME(family, field, row, rows, name, transposed) {family, P_##field, row, rows, name, transposed},
#include "model.def"
    };
    _Static_assert(sizeof list / sizeof *list <= MOST_NAMES, "room for all names");
    int n = 0;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        if (list[i].family == family_of(c) && list[i].rows && layout->p[list[i].param].floats) out[n++] = list[i];
    return n;
}

int model_tensors(const Config *c, Tensor *out) {
    const Layout layout = param_layout(c);
    Name names[MOST_NAMES];
    int n_names = names_of(c, &layout, names), n = 0;
    for (int i = 0; i < n_names; i++) {
        const Name *name = &names[i];
        const Param *p = &layout.p[name->param];
        for (int l = 0; l < (p->where == LAYERED ? c->n_layer : 1); l++, n++) {
            if (!out) continue;
            Tensor *t = &out[n];
            int64_t columns = p->columns ? p->columns : 1;
            *t = (Tensor){.param = name->param,
                          .layer = l,
                          .row = name->row,
                          .offset = p->offset + l * layout.layer_floats + name->row * columns,
                          .rows = name->rows,
                          .columns = p->columns,
                          .transposed = name->transposed,
                          .decay = p->decay};
            if (p->where == LAYERED) snprintf(t->name, sizeof t->name, "%s.%d.%s", layer_prefix(c), l, name->name);
            else snprintf(t->name, sizeof t->name, "%s", name->name);
        }
    }
    return n;
}

int model_modules(const Config *c, Module *out) {
    const Layout layout = param_layout(c);
    Name names[MOST_NAMES];
    int n_names = names_of(c, &layout, names), n = 0;
    for (int i = 0; i < n_names; i++) {
        const Param *p = &layout.p[names[i].param];
        if (p->where != LAYERED || !p->columns) continue;
        Module *m = &out[n++];
        *m = (Module){.param = names[i].param, .row = names[i].row, .rows = names[i].rows, .columns = p->columns};
        snprintf(m->name, sizeof m->name, "%.*s", (int)(strlen(names[i].name) - strlen(".weight")), names[i].name);
    }
    return n;
}

/* ---- what the config says in numbers ----------------------------------------------------------------------------- */

/* Llama-3 slows the turning of long wavelengths by `factor`, keeps short ones, and blends between the two. */
static double stretch(const Config *c, double frequency) {
    if (c->rope_factor == 0) return frequency;
    double turns = c->rope_original_context * frequency / 6.283185307179586;
    double keep = (turns - c->rope_low_freq) / (c->rope_high_freq - c->rope_low_freq);
    keep = keep < 0 ? 0 : keep > 1 ? 1 : keep;
    return frequency * (keep + (1 - keep) / c->rope_factor);
}

void rope_angles(const Config *c, float *cos_, float *sin_) {
    int half = c->head_size / 2;
    for (int p = 0; p < c->context; p++)
        for (int i = 0; i < half; i++) {
            double angle = p * stretch(c, pow(c->rope_theta, -(double)i / half));
            cos_[(size_t)p * half + i] = (float)cos(angle);
            sin_[(size_t)p * half + i] = (float)sin(angle);
        }
}

int head_param(const Config *c) { return c->tied ? P_wte : P_head; }

int is_vocabulary(int param) { return param == P_wte || param == P_head; }

int mlp_function(const Config *c) {
    return c->act == MLP_GELU_TANH ? FN_GELU_TANH : c->act == MLP_GELU_ERF ? FN_GELU_ERF : FN_NONE;
}

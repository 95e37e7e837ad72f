/* layout.c -- the lists of model.def made into offsets, names and tables. */
#include "layout.h"
#include <math.h>
#include <stdio.h>

enum { ALIGN_FLOATS = 16 }; /* each tensor begins on 64 bytes */

Layout param_layout(const Config *c) {
    LIST_SIZES;
    Layout y = {.p = {
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
        p->floats = p->rows * (p->columns ? p->columns : 1);
        p->offset = at;
        at += (p->floats + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
    }
    y.floats = at;
    return y;
}

/* ---- names ------------------------------------------------------------------------------------------------------- */

enum { GPT2, LLAMA };

int model_tensors(const Config *c, Tensor *out) {
    LIST_SIZES;
    const Layout layout = param_layout(c);
    const struct {
        int family, param;
        int64_t row, rows;
        const char *name;
        int transposed;
    } list[] = {
#define NAME(family, field, row, rows, name, transposed) {family, P_##field, row, rows, name, transposed},
#include "model.def"
    };
    int family = c->norm == NORM_LAYERNORM ? GPT2 : LLAMA, n = 0;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        const Param *p = &layout.p[list[i].param];
        if (list[i].family != family || !list[i].rows || !p->floats) continue;
        for (int l = 0; l < (p->where == LAYERED ? L : 1); l++, n++) {
            if (!out) continue;
            Tensor *t = &out[n];
            int64_t columns = p->columns ? p->columns : 1;
            *t = (Tensor){.offset = p->offset + l * layout.layer_floats + list[i].row * columns,
                          .rows = list[i].rows,
                          .columns = p->columns,
                          .transposed = list[i].transposed,
                          .decay = p->decay};
            if (p->where == LAYERED)
                snprintf(t->name, sizeof t->name, "%s.%d.%s", family == GPT2 ? "h" : "layers", l, list[i].name);
            else snprintf(t->name, sizeof t->name, "%s", list[i].name);
        }
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

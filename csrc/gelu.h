/* gelu.h -- GELU (Hendrycks, Gimpel 2016, arXiv:1606.08415) and its derivative on vectors, as the linear layer applies
 * them while a tile is at hand.
 *
 * gelu(x) = x * Phi(x), Phi the share of a bell curve left of x; exact (erf) or by a tanh.  Only the small lower tail
 * is computed, at a = |x|:
 *
 *     gelu(x) = max(x, 0) - a * Phi(-a)         gelu'(-a) = Phi(-a) - a * Phi'(a)         gelu'(a) = 1 - gelu'(-a)
 *
 * The tail is at most 0.17, so its error hardly shows; it is exactly 0 from a = 14 on, so that x = 30 gives 30, x = -30
 * gives 0 and infinity makes no NaN.  NaN stays NaN. */
#pragma once
#include "simd.h"

INLINE vf gelu_tail_x(vf x) { return vmin(vset(14.0f), vabs(x)); } /* in this order NaN passes through */
INLINE vf gelu_from_tail(vf x, vf a, vf phi) { return vnfma(a, phi, vmax(vset(0.0f), x)); }
INLINE vf dgelu_from_tail(vf x, vf tail) { return vpick_lt(x, vset(0.0f), tail, vset(1.0f) - tail); }

/* tanh form: Phi(x) = sigmoid(2u), 2u = sqrt(8 / pi) * (x + 0.044715 x^3); one exp, one reciprocal.  exp(-2u) = 2^x, x
 * = -2u log2(e). */
INLINE vf gelu_tanh_bell(vf a) { return vexp2(a * vfma(a * a, vset(-0.10294324f), vset(-2.3022082f))); }

INLINE vf vgelu_tanh(vf x) {
    vf a = gelu_tail_x(x), e = gelu_tanh_bell(a);
    return gelu_from_tail(x, a, e * vreciprocal(vset(1.0f) + e));
}

INLINE vf vdgelu_tanh(vf x) {
    vf a = gelu_tail_x(x), e = gelu_tanh_bell(a);
    vf r = vreciprocal(vset(1.0f) + e);
    vf du = vfma(a * a, vset(0.21406445f), vset(1.5957691f)); /* of 2u */
    return dgelu_from_tail(x, e * r * vnfma(a * r, du, vset(1.0f)));
}

/* erf form: Phi(-a) = exp(-a^2 / 2) * t * P(t), t = 1 / (1 + 0.26 a).  P is a minimax fit of degree 8 to the relative
 * error over 0 <= a <= 13.5: 2.2e-8. */
INLINE vf gelu_erf_tail(vf a, vf bell) {
    vf t = vreciprocal(vfma(a, vset(0.26f), vset(1.0f)));
    vf p = vset(0.0307836942f);
    p = vfma(p, t, vset(-0.154189795f));
    p = vfma(p, t, vset(0.254318774f));
    p = vfma(p, t, vset(-0.154207408f));
    p = vfma(p, t, vset(0.163221017f));
    p = vfma(p, t, vset(0.0500467494f));
    p = vfma(p, t, vset(0.103285462f));
    p = vfma(p, t, vset(0.102980211f));
    p = vfma(p, t, vset(0.103761263f));
    return bell * t * p;
}

INLINE vf vgelu_erf(vf x) {
    vf a = gelu_tail_x(x);
    return gelu_from_tail(x, a, gelu_erf_tail(a, vexp2(vset(-0.72134752f) * a * a)));
}

INLINE vf vdgelu_erf(vf x) {
    vf a = gelu_tail_x(x), bell = vexp2(vset(-0.72134752f) * a * a);
    vf slope = a * bell * vset(0.39894228f); /* 1 / sqrt(2 pi) */
    return dgelu_from_tail(x, gelu_erf_tail(a, bell) - slope);
}

/* fn(x), for a layer's fn of ops.h */
INLINE vf vfn(int fn, vf x) {
    if (fn == FN_GELU_TANH) return vgelu_tanh(x);
    if (fn == FN_GELU_ERF) return vgelu_erf(x);
    return x;
}

/* fn'(x) */
INLINE vf vdfn(int fn, vf x) {
    if (fn == FN_GELU_TANH) return vdgelu_tanh(x);
    if (fn == FN_GELU_ERF) return vdgelu_erf(x);
    return vset(1.0f);
}

"""Every operator of csrc/ops.def, on every backend and every case, against tests/reference.py.

`OPERATORS` holds one builder for each operator: from a case it makes the call (arguments by the contract's names and in
its order, what each output is, what the answer must be).  The tests below then run all of them: the values, the bits
for any number of threads, a row alone, no rows at all, and arguments of a wrong kind.

Tolerances are formulas.  EPS is the distance of neighbouring floats at 1, twice the largest relative error of one
rounding.  A sum of K products in one chain has K roundings, each at most EPS/2 of a partial sum.  With signs at random
the partial sums grow like sqrt(K) and the errors walk, so that the whole error is a small part of EPS * sum |a b|:
`DOT` times that is past five standard deviations.  Where all terms are positive the partial sums grow like K, and the
walk of their errors gives sqrt(K) * EPS / 2 of the sum: `positive(K)`.
For PREC_BF16 the reference takes operands rounded to bf16, so the same bounds hold, P of attention included: only where
its own error may turn the rounding of an entry the other way that entry gets a step of bf16.  Of dS the contract does
not say whether the scale is in it when it is rounded: there U16, the largest relative error of the rounding, is added.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pytest
import reference
from barelm import _core
from barelm._core import ops
from cases import CASES, SAMPLE_OPTIONS, Case, case, make_starts
from conftest import guarded, prefilled

EPS = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)
U16 = 2.0**-8
DOT = 4
TINY = 1e-36  # below the smallest normal float: kernels may flush it to 0
FN = {"none": 0, "gelu_tanh": 1, "gelu_erf": 2}
PREC = {"fp32": 0, "bf16": 1}
HELD = {"fp32": 0, "bf16": 1, "int8": 2}
KEY_BLOCK = 64
PRIVATE = {
    "held_write",
    "held_read",
    "linear_pack",
    "linear_packed",
    "norm_linear_packed",
    "embedding_packed",
    "attention_paged",
}  # in a backend's own form: tests/test_packed.py, tests/test_held.py
HYPER = ("lr", "beta1", "beta2", "eps", "c1", "c2", "decay", "clip", "loss_limit", "norm_limit", "scale")


def positive(K):
    return EPS * (2 + math.sqrt(K) / 2)


@dataclass
class Call:
    """One call of an operator.  `args` by name, in the contract's order; an output is an Out.

    want() -> {output: (value, tolerance)}
    batch: the size that counts rows, and the arguments whose first axis it is (a flat row index where B * T are two)
    """

    op: str
    args: dict
    want: object = None
    batch: str | None = None
    batched: tuple = ()
    aliases: tuple = ()  # (output, input) that may be the same array
    outputs: dict = field(init=False)

    def __post_init__(self):
        self.outputs = {name: a.spec for name, a in self.args.items() if isinstance(a, Out)}
        self.args = {
            name: guarded(a, constant=True) if isinstance(a, np.ndarray) else a for name, a in self.args.items()
        }

    def __call__(self, backend, **arrays):
        getattr(ops, self.op)(backend, *(arrays.get(name, a) for name, a in self.args.items()))

    def run(self, backend):
        """The outputs of one run, by name."""
        out = {name: filled(*spec) for name, spec in self.outputs.items()}
        self(backend, **out)
        return out

    def part(self, rows):
        """The call on these rows alone."""
        args = {}
        for name, a in self.args.items():
            if isinstance(a, Out) and name in self.batched:
                shape, *rest = a.spec
                a = Out(shape[rows].copy() if isinstance(shape, np.ndarray) else (len(rows), *shape[1:]), *rest)
            elif name in self.batched and a is not None:
                a = a[rows]
            args[name] = a
        args[self.batch] = len(rows)
        return Call(self.op, args, batch=self.batch, batched=self.batched)


class Out:
    """An output: its shape (or the array it holds before, for "in place"), and what the contract says of it."""

    def __init__(self, shape, mode="=", dtype=np.float32):
        self.spec = (shape, mode, dtype)


def filled(shape, mode, dtype):
    if mode == "in place":
        return guarded(shape)
    old = -77 if np.issubdtype(dtype, np.integer) else np.nan
    return guarded(np.full(shape, 0 if mode == "+=" else old, dtype))


OPERATORS = {}


def operator(build):
    OPERATORS[build.__name__] = build
    return build


def normal(rng, *shape, scale=1.0):
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


def f64(*arrays):
    return [None if a is None else a.astype(np.float64) for a in arrays]


def operands(prec, *arrays):
    """As the kernel multiplies them."""
    return [reference.bf16(a) for a in arrays] if prec == "bf16" else f64(*arrays)


# ---- activations as floats: on a CPU they are


@operator
def act_read(rng, c):
    x = normal(rng, c.N, c.ld)
    x[:, c.C :] = np.nan  # is never read
    return Call(
        "act_read",
        dict(out=Out((c.N, c.C)), in_=x, N=c.N, C=c.C, ld=c.ld),
        want=lambda: dict(out=(x[:, : c.C], 0)),
        batch="N",
        batched=("out", "in_"),
    )


@operator
def act_write(rng, c):
    x = normal(rng, c.n)
    return Call(
        "act_write",
        dict(out=Out((c.n,)), in_=x, n=c.n),
        want=lambda: dict(out=(x, 0)),
        batch="n",
        batched=("out", "in_"),
    )


# ---- embedding: a single addition, and sums in the order of (b, t), so every bit is known


def embedding_arguments(rng, c):
    tokens, starts = rng.integers(0, c.V, (c.B, c.T), dtype=np.int32), make_starts(c.starts, c.B, c.T)
    return tokens, starts


@operator
def embedding_forward(rng, c):
    tokens, starts = embedding_arguments(rng, c)
    wte, wpe = normal(rng, c.V, c.C), normal(rng, c.P, c.C) if c.wpe else None
    return Call(
        "embedding_forward",
        dict(
            out=Out((c.B, c.T, c.C)),
            tokens=tokens,
            starts=starts,
            wte=wte,
            held=HELD["fp32"],
            wpe=wpe,
            B=c.B,
            T=c.T,
            C=c.C,
        ),
        want=lambda: dict(out=(reference.embedding_forward(tokens, wte, wpe, starts), 0)),
        batch="B",
        batched=("out", "tokens", "starts"),
    )


@operator
def embedding_backward(rng, c):
    tokens, starts = embedding_arguments(rng, c)
    dout = normal(rng, c.B, c.T, c.C)

    def want():  # in double, rounded once
        grads = reference.embedding_backward(dout.astype(np.float64), tokens, c.V, c.P, starts)
        dwte, dwpe = (grad.astype(np.float32) for grad in grads)
        return dict(dwte=(dwte, 0)) | (dict(dwpe=(dwpe, 0)) if c.wpe else {})

    return Call(
        "embedding_backward",
        dict(
            dwte=Out((c.V, c.C), "+="),
            dwpe=Out((c.P, c.C), "+=") if c.wpe else None,
            dout=dout,
            tokens=tokens,
            starts=starts,
            B=c.B,
            T=c.T,
            C=c.C,
            V=c.V,
        ),
        want,
        batch="B",
        batched=("dout", "tokens", "starts"),
    )


# ---- norms


def norm_arguments(rng, c):
    x = normal(rng, c.N, c.C, scale=1.7) + np.float32(c.offset)
    return x, normal(rng, c.C), normal(rng, c.C) if c.options else None


@operator
def layernorm_forward(rng, c):
    x, weight, bias = norm_arguments(rng, c)
    eps = 1e-5

    def want():
        x64, w64, b64 = f64(x, weight, bias)
        out, mean, rstd = reference.layernorm_forward(x64, w64, b64, float(np.float32(eps)))
        # the mean is a sum of C terms of one sign at worst; its error and the rounding of x - mean move every xhat
        dmean = positive(c.C) * np.abs(x64).mean(-1)
        dx = dmean[:, None] + EPS * np.abs(x64 - mean[:, None])
        # a positive sum of squares; to first order it does not feel the error of the mean
        drstd = rstd * (positive(c.C) + 2 * EPS) + rstd**3 * dmean**2
        xhat = np.abs(x64 - mean[:, None])
        tol = np.abs(w64) * (dx * rstd[:, None] + xhat * drstd[:, None]) + EPS * (np.abs(out) + np.abs(w64) * xhat * 2)
        return dict(out=(out, tol), mean=(mean, dmean), rstd=(rstd, drstd))

    return Call(
        "layernorm_forward",
        dict(
            out=Out((c.N, c.C)),
            mean=Out((c.N,)),
            rstd=Out((c.N,)),
            in_=x,
            weight=weight,
            bias=bias,
            eps=eps,
            N=c.N,
            C=c.C,
        ),
        want,
        batch="N",
        batched=("out", "mean", "rstd", "in_"),
    )


@operator
def rmsnorm_forward(rng, c):
    x, weight, _ = norm_arguments(rng, c)
    eps = 1e-5

    def want():
        out, rstd = reference.rmsnorm_forward(*f64(x, weight), float(np.float32(eps)))
        drstd = positive(c.C) + 2 * EPS  # relative: a positive sum, a root and a division
        return dict(out=(out, (drstd + 2 * EPS) * np.abs(out)), rstd=(rstd, drstd * rstd))

    return Call(
        "rmsnorm_forward",
        dict(out=Out((c.N, c.C)), rstd=Out((c.N,)), in_=x, weight=weight, eps=eps, N=c.N, C=c.C),
        want,
        batch="N",
        batched=("out", "rstd", "in_"),
    )


def norm_backward_want(c, dout, x, weight, mean, rstd, dres, options):
    d64, x64, w64, r64, res64 = f64(dout, x, weight, rstd, dres)
    if mean is not None:
        din, dweight, dbias, dbias_in = reference.layernorm_backward(d64, x64, w64, *f64(mean), r64, res64)
        xhat = np.abs((x64 - f64(mean)[0][:, None]) * r64[:, None])
    else:
        din, dweight, dbias_in = reference.rmsnorm_backward(d64, x64, w64, r64, res64)
        dbias, xhat = d64.sum(0), np.abs(x64 * r64[:, None])
    # every term of din, as a size; each is a few roundings, the averages are sums with signs at random
    dxhat = np.abs(d64 * w64)
    size = dxhat + xhat * (dxhat * xhat).mean(-1, keepdims=True)
    size += 0 if mean is None else dxhat.mean(-1, keepdims=True)
    dtol = EPS * (DOT * size * r64[:, None] + np.abs(din))
    want = dict(din=(din, dtol))
    if c.dweight:
        want["dweight"] = (dweight, EPS * DOT * np.abs(d64 * xhat).sum(0))
    if options and mean is not None:
        want["dbias"] = (dbias, EPS * DOT * np.abs(d64).sum(0))
    if options:
        want["dbias_in"] = (dbias_in, dtol.sum(0) + EPS * DOT * np.abs(din).sum(0))
    return want


@operator
def layernorm_backward(rng, c):
    x, weight, _ = norm_arguments(rng, c)
    _, *saved = reference.layernorm_forward(*f64(x, weight))
    mean, rstd = (a.astype(np.float32) for a in saved)
    dout, dres = normal(rng, c.N, c.C), normal(rng, c.N, c.C) if c.options else None
    option = Out((c.C,), "+=") if c.options else None
    return Call(
        "layernorm_backward",
        dict(
            din=Out((c.N, c.C)),
            dweight=Out((c.C,), "+=") if c.dweight else None,
            dbias=option,
            dbias_in=option,
            dout=dout,
            dres=dres,
            in_=x,
            weight=weight,
            mean=mean,
            rstd=rstd,
            N=c.N,
            C=c.C,
        ),
        want=lambda: norm_backward_want(c, dout, x, weight, mean, rstd, dres, c.options),
        batch="N",
        batched=("din", "dout", "dres", "in_", "mean", "rstd"),
        aliases=("din", "dres"),
    )


@operator
def rmsnorm_backward(rng, c):
    x, weight, _ = norm_arguments(rng, c)
    rstd = reference.rmsnorm_forward(*f64(x, weight))[1].astype(np.float32)
    dout, dres = normal(rng, c.N, c.C), normal(rng, c.N, c.C) if c.options else None
    return Call(
        "rmsnorm_backward",
        dict(
            din=Out((c.N, c.C)),
            dweight=Out((c.C,), "+=") if c.dweight else None,
            dbias_in=Out((c.C,), "+=") if c.options else None,
            dout=dout,
            dres=dres,
            in_=x,
            weight=weight,
            rstd=rstd,
            N=c.N,
            C=c.C,
        ),
        want=lambda: norm_backward_want(c, dout, x, weight, None, rstd, dres, c.options),
        batch="N",
        batched=("din", "dout", "dres", "in_", "rstd"),
        aliases=("din", "dres"),
    )


# ---- linear layer


def function_tolerance(fn, x):
    """Of fn(x) and fn'(x) as a kernel evaluates them: 1 + tanh and 1 + erf lose their low bits where they are near 0;
    1 - tanh^2 does too and is then multiplied by up to |x|^3."""
    if fn == "none":
        return 0 * x, 0 * x
    a = np.abs(x)
    return 4 * EPS * a, EPS * (4 + 4 * a + np.minimum(a, 6) ** 3)


@operator
def linear_forward(rng, c):
    x, weight = normal(rng, c.N, c.C), normal(rng, c.OC, c.C, scale=1 / math.sqrt(c.C))
    bias, residual = normal(rng, c.OC) if c.bias else None, normal(rng, c.N, c.OC) if c.residual else None

    def want():
        x64, w64 = operands(c.prec, x, weight)
        out, pre = reference.linear_forward(x64, w64, *f64(bias, residual), c.fn)
        dpre = EPS * (DOT * (np.abs(x64) @ np.abs(w64).T) + np.abs(pre))
        dout = 1.13 * dpre + function_tolerance(c.fn, pre)[0] + EPS * np.abs(out)  # 1.13: the steepest slope of GELU
        return dict(out=(out, dout)) | (dict(pre=(pre, dpre)) if c.pre else {})

    return Call(
        "linear_forward",
        dict(
            out=Out((c.N, c.OC)),
            pre=Out((c.N, c.OC)) if c.pre else None,
            in_=x,
            weight=weight,
            held=HELD["fp32"],
            bias=bias,
            residual=residual,
            fn=FN[c.fn],
            prec=PREC[c.prec],
            N=c.N,
            C=c.C,
            OC=c.OC,
        ),
        want,
        batch="N",
        batched=("out", "pre", "in_", "residual"),
        aliases=("out", "residual"),
    )


@operator
def linear_backward_input(rng, c):
    dout, weight = normal(rng, c.N, c.OC), normal(rng, c.OC, c.C, scale=1 / math.sqrt(c.OC))
    pre = normal(rng, c.N, c.C, scale=2) if c.fn != "none" else None
    dres = normal(rng, c.N, c.C) if c.residual else None

    def want():
        d64, w64 = operands(c.prec, dout, weight)
        dx, dtol = d64 @ w64, EPS * DOT * (np.abs(d64) @ np.abs(w64))
        if pre is not None:
            derivative = reference.DERIVATIVES[c.fn](*f64(pre))
            dtol = dtol * np.abs(derivative) + np.abs(dx) * (function_tolerance(c.fn, *f64(pre))[1] + EPS)
        din = reference.linear_backward_input(d64, w64, *f64(pre), c.fn, *f64(dres))
        return dict(din=(din, dtol + EPS * np.abs(din)))

    return Call(
        "linear_backward_input",
        dict(
            din=Out((c.N, c.C)),
            dout=dout,
            dres=dres,
            weight=weight,
            held=HELD["fp32"],
            pre=pre,
            fn=FN[c.fn],
            prec=PREC[c.prec],
            N=c.N,
            C=c.C,
            OC=c.OC,
        ),
        want,
        batch="N",
        batched=("din", "dout", "dres", "pre"),
        aliases=("din", "dres"),
    )


@operator
def linear_backward_weight(rng, c):
    dout, x = normal(rng, c.N, c.OC), normal(rng, c.N, c.C)

    def want():
        d64, x64 = operands(c.prec, dout, x)
        dweight, _ = reference.linear_backward_weight(d64, x64)
        want = dict(dweight=(dweight, EPS * DOT * (np.abs(d64).T @ np.abs(x64))))
        if c.bias:
            (exact,) = f64(dout)  # column sums never see bf16
            want["dbias"] = (exact.sum(0), EPS * DOT * np.abs(exact).sum(0))
        return want

    return Call(
        "linear_backward_weight",
        dict(
            dweight=Out((c.OC, c.C), "+=" if c.accumulate else "="),
            dbias=Out((c.OC,), "+=") if c.bias else None,
            dout=dout,
            in_=x,
            accumulate=int(c.accumulate),
            prec=PREC[c.prec],
            N=c.N,
            C=c.C,
            OC=c.OC,
        ),
        want,
        batch="N",
        batched=("dout", "in_"),
    )


# ---- GELU by itself, LoRA's matrices: no sums


@operator
def gelu_forward(rng, c):
    x = normal(rng, c.N, c.F, scale=3)
    return Call(
        "gelu_forward",
        dict(out=Out((c.N, c.F)), in_=x, fn=FN[c.fn], N=c.N, F=c.F),
        want=lambda: dict(out=(reference.FUNCTIONS[c.fn](*f64(x)), function_tolerance(c.fn, *f64(x))[0])),
        batch="N",
        batched=("out", "in_"),
    )


@operator
def gelu_backward(rng, c):
    x, dout = normal(rng, c.N, c.F, scale=3), normal(rng, c.N, c.F)

    def want():
        derivative, d64 = reference.DERIVATIVES[c.fn](*f64(x)), f64(dout)[0]
        tol = np.abs(d64) * function_tolerance(c.fn, *f64(x))[1] + EPS * np.abs(d64 * derivative)
        return dict(din=(d64 * derivative, tol))

    return Call(
        "gelu_backward",
        dict(din=Out((c.N, c.F)), dout=dout, in_=x, fn=FN[c.fn], N=c.N, F=c.F),
        want,
        batch="N",
        batched=("din", "dout", "in_"),
        aliases=("din", "dout"),
    )


SCALE = 1.7  # one product, rounded once


@operator
def lora_spread(rng, c):
    rows = np.array(c.rows, np.int32)
    blocks = normal(rng, int((rows[:, 1] - rows[:, 0]).sum()), c.r)
    J, scale = len(rows), np.float32(SCALE)
    return Call(
        "lora_spread",
        dict(dense=Out((c.OC, J * c.r)), blocks=blocks, rows=rows, scale=SCALE, J=J, r=c.r, OC=c.OC),
        want=lambda: dict(dense=(reference.lora_spread(scale * blocks, rows, c.OC), 0)),
    )


@operator
def lora_gather(rng, c):
    rows = np.array(c.rows, np.int32)
    J, scale, total = len(rows), np.float32(SCALE), int((rows[:, 1] - rows[:, 0]).sum())
    ddense = normal(rng, c.OC, J * c.r)
    return Call(
        "lora_gather",
        dict(
            dblocks=Out((total, c.r), "+=" if c.accumulate else "="),
            ddense=ddense,
            rows=rows,
            scale=SCALE,
            accumulate=int(c.accumulate),
            J=J,
            r=c.r,
            OC=c.OC,
        ),
        want=lambda: dict(dblocks=(scale * reference.lora_gather(ddense, rows, c.r), 0)),
    )


# ---- SwiGLU: no sums, a few roundings and an exp whose argument is exact


def swiglu_arguments(rng, c):
    x = normal(rng, c.N, 2 * c.F, scale=4)
    x[0, 0] = -100  # exp(100) is past the largest float
    return x


@operator
def swiglu_forward(rng, c):
    x = swiglu_arguments(rng, c)

    def want():
        out = reference.swiglu_forward(*f64(x))
        return dict(out=(out, 8 * EPS * np.abs(out) + TINY))

    return Call(
        "swiglu_forward", dict(out=Out((c.N, c.F)), in_=x, N=c.N, F=c.F), want, batch="N", batched=("out", "in_")
    )


@operator
def swiglu_backward(rng, c):
    x, dout = swiglu_arguments(rng, c), normal(rng, c.N, c.F)

    def want():
        x64, d64 = f64(x, dout)
        gate, up = np.split(np.abs(x64), 2, -1)
        s = reference.sigmoid(x64[:, : c.F])
        tol = np.abs(np.concatenate([d64 * up * s * (1 + gate), d64 * gate * s], -1))
        return dict(din=(reference.swiglu_backward(d64, x64), 8 * EPS * tol + TINY))

    return Call(
        "swiglu_backward",
        dict(din=Out((c.N, 2 * c.F)), dout=dout, in_=x, N=c.N, F=c.F),
        want,
        batch="N",
        batched=("din", "dout", "in_"),
    )


# ---- positions


def rope_call(rng, c, name, argument, turn):
    starts = make_starts(c.starts, c.B, c.T)
    cos, sin = (a.astype(np.float32) for a in reference.rope_tables(c.T + 1, c.HS))
    x = normal(rng, c.B, c.T, (c.NH + 2 * c.NKV) * c.HS)

    def want():
        tables = f64(cos, sin)
        value = turn(*f64(x), *tables, c.NH, c.NKV, starts)
        # two products and their sum, whatever is left of it
        size = reference.rope_forward(np.abs(f64(x)[0]), np.abs(tables[0]), -np.abs(tables[1]), c.NH, c.NKV, starts)
        other = reference.rope_forward(np.abs(f64(x)[0]), np.abs(tables[0]), np.abs(tables[1]), c.NH, c.NKV, starts)
        tol = 1.5 * EPS * np.maximum(size, other)
        tol[..., (c.NH + c.NKV) * c.HS :] = 0  # values are left alone
        return {argument: (value, tol)}

    return Call(
        name,
        {
            argument: Out(x, "in place"),
            "cos": cos,
            "sin": sin,
            "starts": starts,
            "B": c.B,
            "T": c.T,
            "NH": c.NH,
            "NKV": c.NKV,
            "HS": c.HS,
        },
        want,
        batch="B",
        batched=(argument, "starts"),
    )


@operator
def rope_forward(rng, c):
    return rope_call(rng, c, "rope_forward", "qkv", reference.rope_forward)


@operator
def rope_backward(rng, c):
    return rope_call(rng, c, "rope_backward", "dqkv", reference.rope_backward)


# ---- attention


def attention_arguments(rng, c):
    qkv = normal(rng, c.B, c.T, (c.NH + 2 * c.NKV) * c.HS)
    qkv[..., : c.NH * c.HS] *= np.float32(c.scale)
    return qkv, make_starts(c.starts, c.B, c.T)


def attention_pieces(c, qkv, starts):
    """What both tolerances need: q, k, v per query head, probabilities, and the relative error of each exp(score).

    A score is a chain over the head, then a few roundings; the argument of exp is rounded when the maximum (or lse) is
    taken away; each block of keys passed before the end rescales once more.
    """
    q, k, v = reference.split_heads(qkv, c.NH, c.NKV)
    k, v = (np.repeat(x, c.NH // c.NKV, 1) for x in (k, v))
    _, lse, scores, probs = reference.attention_forward(qkv, c.NH, c.NKV, starts)
    size = np.abs(q) @ np.abs(k).swapaxes(-1, -2) / math.sqrt(c.HS)
    largest = np.where(np.isfinite(scores), np.abs(scores), 0).max(-1, keepdims=True)
    error = EPS * (DOT * size + 6 * largest + 8 + c.T / 32)
    return q, k, v, lse, scores, probs, error


def rounded(p, error):
    """bf16(p), and how far off a kernel may come out whose p has this relative error."""
    return reference.bf16(p), reference.bf16(p * (1 + error)) - reference.bf16(p * (1 - error))


def rounded_probabilities(c, scores, starts, error):
    """P as forward rounds it: exp(score - the largest score so far), block by block from `starts`, and its error."""
    first = np.zeros((c.B, c.T), int) if starts is None else starts
    block = np.maximum(np.arange(c.T) - first[..., None], 0)[:, None] // KEY_BLOCK
    p, slack, so_far = np.zeros_like(scores), np.zeros_like(scores), np.full(scores.shape[:3], -np.inf)
    last = scores.max(-1)
    for n in range(block.max() + 1):
        inside = np.where(block == n, scores, -np.inf)
        so_far = np.maximum(so_far, inside.max(-1))
        rescale = np.exp(so_far - last)[..., None]
        for sum_, piece in zip((p, slack), rounded(np.exp(inside - so_far[..., None]), error), strict=True):
            sum_ += piece * rescale
    total = np.exp(scores - last[..., None]).sum(-1, keepdims=True)
    return p / total, slack / total


@operator
def attention_forward(rng, c):
    qkv, starts = attention_arguments(rng, c)

    def want():
        (x,) = operands(c.prec, qkv)
        _, _, v, lse, scores, probs, error = attention_pieces(c, x, starts)
        row = np.where(probs > 0, error, 0).max(-1)
        # the error of a probability in numerator and denominator, and the sums over keys
        tol = (2 * row + EPS * DOT)[..., None] * (probs @ np.abs(v))
        if c.prec == "bf16":
            probs, slack = rounded_probabilities(c, scores, starts, error)
            tol += slack @ np.abs(v)
        return dict(
            out=(reference.merge_heads(probs @ v), reference.merge_heads(tol)), lse=(lse, row + EPS * np.abs(lse))
        )

    return Call(
        "attention_forward",
        dict(
            out=Out((c.B, c.T, c.NH * c.HS)),
            lse=Out((c.B, c.NH, c.T)),
            qkv=qkv,
            starts=starts,
            prec=PREC[c.prec],
            B=c.B,
            T=c.T,
            NH=c.NH,
            NKV=c.NKV,
            HS=c.HS,
        ),
        want,
        batch="B",
        batched=("out", "lse", "qkv", "starts"),
    )


@operator
def attention_backward(rng, c):
    qkv, starts = attention_arguments(rng, c)
    dout = normal(rng, c.B, c.T, c.NH * c.HS)
    x, do = operands(c.prec, qkv, dout)
    out, lse = (a.astype(np.float32) for a in reference.attention_forward(x, c.NH, c.NKV, starts)[:2])

    def want():
        value = reference.attention_backward(do, x, c.NH, c.NKV, starts)
        q, k, v, lse64, _, probs, error = attention_pieces(c, x, starts)
        u16, scale, G = (U16 if c.prec == "bf16" else 0), 1 / math.sqrt(c.HS), c.NH // c.NKV
        heads = [a.reshape(c.B, c.T, c.NH, c.HS).swapaxes(1, 2) for a in (do, *f64(out))]
        dprobs = heads[0] @ v.swapaxes(-1, -2)
        average = (heads[0] * heads[1]).sum(-1, keepdims=True)  # dout.out
        size = np.abs(heads[0]) @ np.abs(v).swapaxes(-1, -2)
        average_size = np.abs(heads[0] * heads[1]).sum(-1, keepdims=True)
        dprob_error = error + EPS * 2 * np.abs(lse64)[..., None]
        dscores = np.abs(probs * (dprobs - average))
        # bf16: dS is rounded as an operand, and dout.out may or may not take a rounded dout
        ds_error = dscores * (dprob_error + u16) + probs * (EPS * DOT * (size + average_size) + u16 * average_size)
        p_error = probs * (dprob_error + EPS * DOT)
        ds_error = scale * (ds_error + EPS * DOT * dscores)
        dq = ds_error @ np.abs(k)
        dk, dv = (a.swapaxes(-1, -2) @ np.abs(b) for a, b in ((ds_error, q), (p_error, heads[0])))
        dk, dv = (a.reshape(c.B, c.NKV, G, c.T, c.HS).sum(2) for a in (dk, dv))
        tol = np.concatenate([reference.merge_heads(a) for a in (dq, dk, dv)], -1) + TINY
        if c.prec == "bf16":
            pair = (
                a.swapaxes(-1, -2) @ b
                for a, b in zip(rounded(probs, dprob_error), (heads[0], np.abs(heads[0])), strict=True)
            )
            dv, slack = (reference.merge_heads(a.reshape(c.B, c.NKV, G, c.T, c.HS).sum(2)) for a in pair)
            value[..., -dv.shape[-1] :] = dv
            tol[..., -dv.shape[-1] :] += slack
        return dict(dqkv=(value, tol))

    return Call(
        "attention_backward",
        dict(
            dqkv=Out(qkv.shape),
            dout=dout,
            qkv=qkv,
            out=out,
            lse=lse,
            starts=starts,
            prec=PREC[c.prec],
            B=c.B,
            T=c.T,
            NH=c.NH,
            NKV=c.NKV,
            HS=c.HS,
        ),
        want,
        batch="B",
        batched=("dqkv", "dout", "qkv", "out", "lse", "starts"),
    )


# ---- head


def logprob_arguments(rng, c):
    """Padding is NaN and infinity: a maximum drops the one, and the other spoils everything."""
    logits = np.full((c.N, c.Vp), np.nan, np.float32)
    logits[:, c.V :: 2] = np.inf
    logits[:, : c.V] = normal(rng, c.N, c.V, scale=8)
    targets = rng.integers(0, c.V, c.N, dtype=np.int32)
    targets[c.N // 2 :: 3] = -1
    targets[-1] = c.V - 1
    return logits, targets, float(np.float32(c.invtemp))


@operator
def logprob_forward(rng, c):
    logits, targets, invtemp = logprob_arguments(rng, c)

    def want():
        (z,) = f64(logits[:, : c.V])
        logprobs, lse, entropy = reference.logprob_forward(z, targets, invtemp)
        z *= invtemp
        size, below = np.abs(z).max(-1), z.max(-1, keepdims=True) - z
        dlse = EPS * (2 * size + 2) + positive(c.V)  # arguments of exp and the result; a positive sum
        p = np.exp(z - lse[:, None])
        # log of the sum minus a mean of distances to the maximum, which are as far off as the logits are
        dentropy = dlse + (positive(c.V) + EPS * (2 * size + 4)) * (1 + (p * below * (1 + below)).sum(-1))
        want = dict(logprobs=(logprobs, np.where(targets < 0, 0, dlse + EPS * 2 * size)), lse=(lse, dlse))
        return want | (dict(entropy=(entropy, dentropy)) if c.entropy else {})

    return Call(
        "logprob_forward",
        dict(
            logprobs=Out((c.N,)),
            lse=Out((c.N,)),
            entropy=Out((c.N,)) if c.entropy else None,
            logits=logits,
            targets=targets,
            invtemp=invtemp,
            N=c.N,
            V=c.V,
            Vp=c.Vp,
        ),
        want,
        batch="N",
        batched=("logprobs", "lse", "entropy", "logits", "targets"),
    )


@operator
def logprob_backward(rng, c):
    logits, targets, invtemp = logprob_arguments(rng, c)
    dlogprobs = normal(rng, c.N)
    lse = reference.logprob_forward(*f64(logits[:, : c.V]), targets, invtemp)[1].astype(np.float32)

    def want():
        z, d = f64(logits[:, : c.V], dlogprobs)
        value = np.zeros((c.N, c.Vp))  # padding and rows without a target: exactly 0
        value[:, : c.V] = reference.logprob_backward(d, z, targets, invtemp)
        # exp turns the absolute error of its argument into a relative error of the probability
        p = np.exp(z * invtemp - f64(lse)[0][:, None])
        tol = np.zeros_like(value)
        tol[:, : c.V] = p * EPS * (4 + 2 * np.abs(z * invtemp) + 2 * np.abs(lse)[:, None]) + TINY
        tol = tol * np.abs(d * invtemp)[:, None] + 2 * EPS * np.abs(value)
        tol[targets < 0] = 0
        return dict(dlogits=(value, tol))

    return Call(
        "logprob_backward",
        dict(
            dlogits=Out((c.N, c.Vp)),
            dlogprobs=dlogprobs,
            logits=logits,
            targets=targets,
            lse=lse,
            invtemp=invtemp,
            N=c.N,
            V=c.V,
            Vp=c.Vp,
        ),
        want,
        batch="N",
        batched=("dlogits", "dlogprobs", "logits", "targets", "lse"),
        aliases=("dlogits", "logits"),
    )


@operator
def logprob_forward_backward(rng, c):
    """Both, of the same arguments."""
    forward = logprob_forward(deepcopy(rng), replace(c, sizes=c.sizes | dict(entropy=False)))
    backward = logprob_backward(rng, c)
    args = {name: np.copy(a) if isinstance(a, np.ndarray) else a for name, a in (forward.args | backward.args).items()}

    def want():
        rows, rest = forward.want(), backward.want()
        value, tol = rest["dlogits"]
        # lse is not the reference's rounded once but has its own error, which is one of the argument of exp
        p = np.exp(f64(args["logits"][:, : c.V] * args["invtemp"])[0] - rows["lse"][0][:, None])
        off = p * np.abs(args["dlogprobs"] * args["invtemp"])[:, None] * rows["lse"][1][:, None]
        tol[:, : c.V] += np.where(args["targets"][:, None] < 0, 0, off)
        return rows | dict(dlogits=(value, tol))

    order = ["dlogits", "logprobs", "lse", "dlogprobs", "logits", "targets", "invtemp", "N", "V", "Vp"]
    outputs = dict(dlogits=Out((c.N, c.Vp)), logprobs=Out((c.N,)), lse=Out((c.N,)))
    return Call(
        "logprob_forward_backward",
        {name: outputs.get(name, args[name]) for name in order},
        want,
        batch="N",
        batched=("dlogits", "logprobs", "lse", "dlogprobs", "logits", "targets"),
        aliases=("dlogits", "logits"),
    )


def sample_rounding(x, temperature, kept):
    """How far a sum of the probabilities `kept` may be off, as a share of their sum: the contract's bound of one p's
    error, for the sum and for what it is divided by."""
    y = (x - x.max())[kept] / temperature
    p = np.exp(y)
    return 2 * EPS * (p * (2 - 2 * np.where(p > 0, y, 0))).sum() / p.sum()


def sample_tolerance(x, temperature, top_k, top_p, min_p, u):
    """Of the log-probability; infinite where a border is so near that rounding decides the token or what is kept."""
    if temperature == 0:
        return 0
    y = (x - x.max()) / temperature
    order = np.argsort(-x, kind="stable")[: int(top_k) or None]
    rounding = sample_rounding(x, temperature, order)
    mass = np.cumsum(np.exp(y[order]))
    near = top_p < 1 and np.abs(mass / mass[-1] - top_p).min() < rounding
    near |= min_p > 0 and np.abs(y - math.log(min_p)).min() < 1e-8  # in double on every backend
    p = reference.sample_probabilities(x, temperature, top_k, top_p, min_p)
    rounding = sample_rounding(x, temperature, p > 0)
    near |= p.max() < 1 and np.abs(np.cumsum(p)[:-1] - u).min() < rounding
    return math.inf if near else rounding


@operator
def sample(rng, c):
    logits = np.full((c.N, c.Vp), np.nan, np.float32)
    logits[:, c.V :: 2] = np.inf
    logits[:, : c.V] = normal(rng, c.N, c.V, scale=3)
    logits[1::3, : c.V] = np.round(logits[1::3, : c.V])  # equals
    logits[2::3, 1 : c.V : 3] = -np.inf
    kinds = SAMPLE_OPTIONS[c.options]
    options = np.array([kinds[n % len(kinds)] for n in range(c.N)], np.float32)
    u = rng.random(c.N)

    def want():
        x, o = f64(logits[:, : c.V], options)
        tokens, logprobs = reference.sample(x, o, u)
        with np.errstate(under="ignore"):
            tol = np.array([sample_tolerance(x[n], *o[n], u[n]) for n in range(c.N)])
        assert np.isfinite(tol).mean() > 0.8  # else this is no test
        return dict(
            tokens=(tokens, np.where(np.isinf(tol), np.inf, 0)), logprobs=(logprobs, tol + EPS * np.abs(logprobs))
        )

    return Call(
        "sample",
        dict(
            tokens=Out((c.N,), dtype=np.int32),
            logprobs=Out((c.N,)),
            logits=logits,
            options=options,
            u=u,
            N=c.N,
            V=c.V,
            Vp=c.Vp,
        ),
        want,
        batch="N",
        batched=("tokens", "logprobs", "logits", "options", "u"),
    )


# ---- update


@operator
def square_sums(rng, c):
    offsets = np.concatenate([[0], np.cumsum(c.lengths)]).astype(np.int64)
    x = normal(rng, int(offsets[-1]), scale=3)

    def want():
        sums = reference.square_sums(*f64(x), offsets)
        # The square of a float is exact in double.  A positive sum, but the low bits of squares are not at random: the
        # errors of 300,000 in one chain were measured at 3 times the bound of a walk, always to one side.
        return dict(sums=(sums, EPS64 * 4 * (2 + np.sqrt(np.diff(offsets)) / 2) * sums))

    return Call(
        "square_sums", dict(sums=Out((len(c.lengths),), dtype=np.float64), x=x, offsets=offsets, n=len(c.lengths)), want
    )


@operator
def loss_add(rng, c):
    logprobs, dlogprobs, loss = normal(rng, c.N), normal(rng, c.N), rng.normal(size=1)

    def want():
        lp, d = f64(logprobs, dlogprobs)
        tolerance = EPS64 * (c.N + 2) * (np.abs(loss) + np.abs(lp * d).sum())  # products of floats are exact
        return dict(loss=(loss + reference.loss(lp, d), tolerance))

    args = dict(loss=Out(loss, "in place"), logprobs=logprobs, dlogprobs=dlogprobs, N=c.N)
    return Call("loss_add", args, want)


def hyper_of(**values):
    """What an update is told; limits are far away."""
    values = dict(loss_limit=1e30, norm_limit=1e30) | values
    return np.array([values.get(name, 7) for name in HYPER], np.float32)


@operator
def clip_scale(rng, c):
    sums, max_norm = rng.uniform(0, 3, c.n), float(np.float32(c.max_norm))
    limits = dict(norm_limit=dict(norm_limit=0.5), loss_limit=dict(loss_limit=0.5)).get(c.bad, {})
    hyper, loss = hyper_of(clip=max_norm, **limits), np.array([np.nan if c.bad == "loss" else 1.0])
    sums[:1] = np.nan if c.bad == "norm" else sums[:1]

    def want():
        scale, norm = reference.clip_scale(sums, max_norm)
        scale = np.nan if c.bad else scale
        new, tol = hyper.astype(np.float64), np.zeros(len(HYPER))  # the others are left alone
        new[HYPER.index("scale")] = scale
        tol[HYPER.index("scale")] = 0 if scale == 1 else 2 * EPS * scale
        return dict(hyper=(new, tol), norm=(np.array([norm]), EPS64 * (2 + math.sqrt(c.n)) * norm))

    return Call(
        "clip_scale",
        dict(hyper=Out(hyper, "in place"), norm=Out((1,), dtype=np.float64), loss=loss, sums=sums, n=c.n),
        want,
    )


@operator
def adamw(rng, c):
    n, offsets = sum(c.lengths), np.cumsum([0, *c.lengths]).astype(np.int64)
    weights, m, grads = normal(rng, n), normal(rng, n, scale=0.1), normal(rng, n)
    v = np.square(normal(rng, n, scale=0.3))
    grads[:1], m[:1], v[:1] = 0, 0, 0  # the root of 0 and eps alone below the line
    lr, beta1, beta2, eps, scale = (float(np.float32(a)) for a in (3e-3, 0.9, 0.95, 1e-8, 0.4 if c.made else np.nan))
    decays = (np.arange(len(c.lengths)) % 2 == 0).astype(np.int32) * (c.weight_decay > 0)
    hyper = hyper_of(lr=lr, beta1=beta1, beta2=beta2, eps=eps, scale=scale, decay=c.weight_decay or 0.3)
    hyper[HYPER.index("c1")], hyper[HYPER.index("c2")] = 1 - beta1**c.step, 1 - beta2**c.step
    decay = np.repeat(decays * float(np.float32(c.weight_decay)), c.lengths)

    def want():
        w64, m64, v64, g64 = f64(weights, m, v, grads)
        if not c.made:
            return dict(weights=(w64, 0), m=(m64, 0), v=(v64, 0))
        new = reference.adamw(w64, m64, v64, g64, lr, (beta1, beta2), eps, decay, c.step, scale)
        dm = 2 * EPS * (np.abs(beta1 * m64) + np.abs((1 - beta1) * g64 * scale))
        dv = 3 * EPS * new[2]
        # the step is a quotient: the relative error of v under a root, and where m nearly cancels that of m
        root = np.sqrt(new[2] / (1 - beta2**c.step)) + eps
        dstep = dm / (1 - beta1**c.step) / root + 8 * EPS * np.abs(new[1] / (1 - beta1**c.step) / root)
        dw = lr * (dstep + 2 * EPS * decay * np.abs(w64)) + EPS * np.maximum(np.abs(new[0]), np.abs(w64))
        return dict(weights=(new[0], dw), m=(new[1], dm), v=(new[2], dv))

    return Call(
        "adamw",
        dict(
            weights=Out(weights, "in place"),
            m=Out(m, "in place"),
            v=Out(v, "in place"),
            rounded=None,
            grads=grads,
            hyper=hyper,
            offsets=offsets,
            decays=decays.astype(np.int32),
            n=len(c.lengths),
            size=n,
        ),
        want,
    )


# ---- the tests


def assert_close(name, got, want, tol):
    """Element by element; a NaN is close to a NaN alone."""
    assert got.shape == want.shape
    error = np.abs(got.astype(np.float64) - want)
    bad = ~(error <= tol) & ~(np.isnan(got) & np.isnan(want))
    if bad.any():
        i = np.unravel_index(np.argmax(np.where(bad & np.isnan(error), np.inf, error / (tol + 1e-300))), got.shape)
        limit = np.broadcast_to(tol, got.shape)[i]
        pytest.fail(
            f"{name}: {bad.sum()} of {bad.size} wrong; at {tuple(map(int, i))} {got[i]!r}, not {want[i]!r}, "
            f"off by {error[i]:.3g}, allowed {limit:.3g}",
            pytrace=False,
        )


def trimmed(c):
    """A big case without what only repeats.  530 rows are more than a row block of any kernel, and as the K of a weight
    gradient more than a K block."""
    most = dict(N=530, OC=3072, T=530, V=50257, n=300_000)
    sizes = {name: min(size, most.get(name, size)) if isinstance(size, int) else size for name, size in c.sizes.items()}
    if "NKV" in sizes:
        sizes |= dict(NH=2, NKV=2) if c.NH == c.NKV else dict(NH=c.NH // c.NKV, NKV=1)
    if "P" in sizes:
        sizes |= dict(V=3000)
    return replace(c, sizes=sizes)


@lru_cache(maxsize=2)  # the tests and backends of one case follow each other
def call_of(which):
    op, number = which
    c = CASES[op][number]
    return OPERATORS[op](np.random.default_rng(number), trimmed(c) if c.big else c)


@lru_cache(maxsize=2)
def answer_of(which):
    return call_of(which).want()


def every_case(keep=lambda op, c: not c.big):
    """The parameter `which`: (operator, number of its case).  Of module scope, so that pytest runs together what
    belongs to one case."""
    found = [(op, i) for op in OPERATORS for i, c in enumerate(CASES[op]) if keep(op, c)]
    return pytest.mark.parametrize("which", found, ids=[f"{op}-{CASES[op][i]}" for op, i in found], scope="module")


def has_rows(op, c):
    return not c.big and op not in ("square_sums", "loss_add", "clip_scale", "adamw", "lora_spread", "lora_gather")


def may_share(op, c):
    """Whether an output may be the same array as an input, and the case has that input."""
    return not c.big and (
        op in ("logprob_backward", "logprob_forward_backward")
        or op == "gelu_backward"
        or (op in ("layernorm_backward", "rmsnorm_backward") and c.options)
        or (op in ("linear_forward", "linear_backward_input") and c.residual)
    )


def same_bits(a, b):
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def test_every_operator_of_the_contract_is_tested():
    named = {name for name in dir(ops) if not name.startswith("_")}
    assert named - PRIVATE == set(OPERATORS) == set(CASES)


@every_case(keep=lambda op, c: True)
def test_values(which, backend):
    c, call = CASES[which[0]][which[1]], call_of(which)
    if c.big and backend == "ref":
        pytest.skip("plain loops: seconds at GPT-2's size")
    # what outputs hold before is tested at the small sizes alone: it takes a second run
    results = call.run(backend) if c.big else prefilled(lambda **out: call(backend, **out), **call.outputs)
    for name, (value, tol) in answer_of(which).items():
        assert_close(name, results[name], value, tol)


@every_case()
def test_same_bits_for_any_number_of_threads(which, backend, threads):
    call, results = call_of(which), []
    for n in 1, 2, 3, 8:
        _core.threads_set(n)
        assert _core.threads_get() == n
        results.append(call.run(backend))
    for other in results[1:]:
        for name in call.outputs:
            assert same_bits(results[0][name], other[name]), name


@every_case(keep=has_rows)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(which, backend):
    call = call_of(which)
    N = call.args[call.batch]
    whole = call.run(backend)
    for rows in {(0,), (N // 2,), (N - 1,), tuple(range(N - N // 3, N)), tuple(range(N // 2))}:
        rows = list(rows)
        part = call.part(rows).run(backend)
        for name in set(call.batched) & set(call.outputs):
            assert same_bits(part[name], whole[name][rows]), (name, rows)


BEYOND_CACHES = {  # of operators that write past the caches what these cannot hold: the sizes of 32 MB
    "layernorm_forward": dict(N=11_000),
    "layernorm_backward": dict(N=11_000),
    "embedding_forward": dict(B=11),
    "swiglu_forward": dict(N=4_200),
    "swiglu_backward": dict(N=2_100),
}


@pytest.mark.parametrize("more", [0, 4])
@pytest.mark.parametrize("op", BEYOND_CACHES)
def test_bits_do_not_change_where_no_cache_holds_them(backend, op, more):
    """Halves, which the caches hold, have them; `more` columns: rows that end within a line are written as before."""
    if backend == "ref":
        pytest.skip("the plain backend writes as it likes, and takes seconds")
    big = next(c for c in CASES[op] if c.big).sizes
    letter = "F" if op.startswith("swiglu") else "C"
    sizes = big | BEYOND_CACHES[op] | {letter: big[letter] + more}
    call = OPERATORS[op](np.random.default_rng(0), case("beyond caches", big=True, **sizes))
    name = next(iter(call.outputs))
    N = call.args[call.batch]
    whole = call.run(backend)[name]
    assert whole.nbytes >= 32 << 20 > whole[: N // 2].nbytes
    for rows in (slice(0, N // 2), slice(N // 2, N)):
        assert same_bits(call.part(list(range(N))[rows]).run(backend)[name], whole[rows])
    if call.aliases:
        check_in_place(call, backend)


def test_embeddings_add_up_where_no_cache_holds_them(backend):
    if backend == "ref":
        pytest.skip("the plain backend fetches nothing, and takes seconds")
    big = next(c for c in CASES["embedding_backward"] if c.big).sizes
    sizes = big | dict(B=11)
    call = OPERATORS["embedding_backward"](np.random.default_rng(0), case("beyond caches", big=True, **sizes))
    assert call.args["dout"].nbytes >= 32 << 20
    results = call.run(backend)
    for name, (value, tol) in call.want().items():
        assert_close(name, results[name], value, tol)


def test_rows_that_begin_between_cache_lines_where_no_cache_holds_them(backend):
    N, C = 11_000, 768
    x, one = np.random.default_rng(0).standard_normal((N, C), np.float32), np.ones(C, np.float32)
    mean, rstd = np.empty(N, np.float32), np.empty(N, np.float32)
    room = guarded(np.empty(N * C + 1, np.float32))
    assert room.ctypes.data % 64 == 60
    out, odd = guarded(np.empty((N, C), np.float32)), room[:-1].reshape(N, C)
    for into in (out, odd):
        ops.layernorm_forward(backend, into, mean, rstd, x, one, None, 1e-5, N, C)
    assert same_bits(odd, out)


@every_case(keep=has_rows)
def test_no_rows(which, backend):
    call = call_of(which).part([])
    results = prefilled(lambda **out: call(backend, **out), **call.outputs)
    for name in results:
        assert (results[name] == 0).all(), name  # "=" is a sum of nothing, "+=" adds nothing


@every_case(keep=may_share)
def test_in_place_where_the_contract_permits(which, backend):
    check_in_place(call_of(which), backend)


def check_in_place(call, backend):
    """An output that is the array of an input has the bits that it has by itself."""
    output, given = call.aliases
    whole = call.run(backend)
    shared = guarded(call.args[given])
    others = {name: filled(*spec) for name, spec in call.outputs.items() if name != output}
    call(backend, **others, **{output: shared, given: shared})
    for name, a in (others | {output: shared}).items():
        assert same_bits(a, whole[name]), name


@every_case(keep=lambda op, c: op == "logprob_forward_backward")
def test_a_head_in_one_pass_has_the_bits_of_two(which, backend):
    call = call_of(which)
    together, a = call.run(backend), call.args
    logprobs, lse, dlogits = (filled(*call.outputs[name]) for name in ("logprobs", "lse", "dlogits"))
    sizes = [a[name] for name in ("invtemp", "N", "V", "Vp")]
    ops.logprob_forward(backend, logprobs, lse, None, a["logits"], a["targets"], *sizes)
    ops.logprob_backward(backend, dlogits, a["dlogprobs"], a["logits"], a["targets"], lse, *sizes)
    for name, x in dict(logprobs=logprobs, lse=lse, dlogits=dlogits).items():
        assert same_bits(together[name], x), name


@every_case(keep=lambda op, c: c == [c for c in CASES[op] if not c.big][-1])
def test_an_array_of_a_wrong_kind_is_an_error_and_never_a_lost_result(which, backend):
    call = call_of(which)
    arrays = [name for name, a in call.args.items() if isinstance(a, np.ndarray)]
    good = {name: filled(*spec) for name, spec in call.outputs.items()}

    def refused(name, a):
        before = a.tobytes()
        with pytest.raises((TypeError, ValueError)):
            call(backend, **good | {name: a})
        assert a.tobytes() == before, name

    for name in [*call.outputs, *arrays]:
        a = good.get(name, call.args[name])
        other = {"f": {4: np.float64, 8: np.float32}, "i": {4: np.int64, 8: np.int32}}[a.dtype.kind][a.dtype.itemsize]
        refused(name, a.astype(other))
        if a.size > 1:  # a single value is contiguous however it lies
            refused(name, np.repeat(a[..., None], 2, -1)[..., 0])  # every second value
        refused(name, a.astype(a.dtype.newbyteorder()))
        if name in call.outputs:
            constant = a.copy()
            constant.flags.writeable = False
            refused(name, constant)
    with pytest.raises(TypeError):
        call(backend, **good | {next(iter(call.outputs)): [0.0, 1.0]})
    with pytest.raises(ValueError, match="nonesuch"):
        call("nonesuch", **good)
    for arguments in ([0] * (len(call.args) - 1), [0] * (len(call.args) + 1)):
        with pytest.raises(TypeError, match=f"takes {len(call.args)} arguments, not {len(arguments)}"):
            getattr(ops, call.op)(backend, *arguments)


# ---- truths of single operators


def attention(backend, qkv, starts, prec, NH, NKV):
    B, T, width = qkv.shape
    HS = width // (NH + 2 * NKV)
    out, lse = guarded(np.full((B, T, NH * HS), np.nan, np.float32)), guarded(np.full((B, NH, T), np.nan, np.float32))
    starts = None if starts is None else guarded(starts, constant=True)
    ops.attention_forward(backend, out, lse, guarded(qkv, constant=True), starts, PREC[prec], B, T, NH, NKV, HS)
    return out, lse


by_prec = pytest.mark.parametrize("prec", PREC)


@by_prec
@pytest.mark.parametrize("HS", [1, 15, 17, 24, 48, 80])
@pytest.mark.parametrize("kind", [None, "packed", "ragged", "window"])
def test_attention_of_a_prefix_does_not_depend_on_what_follows(backend, rng, kind, HS, prec):
    B, T, NH, NKV = 2, 203, 4, 2
    qkv, starts = normal(rng, B, T, (NH + 2 * NKV) * HS, scale=2), make_starts(kind, B, T)
    out, lse = attention(backend, qkv, starts, prec, NH, NKV)
    for k in 1, 2, 31, 64, 65, 128, 130, 202:
        part = attention(backend, qkv[:, :k], None if starts is None else starts[:, :k].copy(), prec, NH, NKV)
        assert same_bits(part[0], out[:, :k]) and same_bits(part[1], lse[..., :k]), k


@by_prec
@pytest.mark.parametrize("kind", ["packed", "ragged"])
def test_attention_of_a_packed_document_has_the_bits_of_the_document_alone(backend, rng, kind, prec):
    B, T, NH, NKV = 2, 240, 4, 2
    qkv, starts = normal(rng, B, T, (NH + 2 * NKV) * 24, scale=2), make_starts(kind, B, T)
    out, lse = attention(backend, qkv, starts, prec, NH, NKV)
    for b in range(B):
        for first in np.unique(starts[b]):
            last = np.flatnonzero(starts[b] == first)[-1] + 1
            alone = attention(backend, qkv[b : b + 1, first:last], None, prec, NH, NKV)
            assert same_bits(alone[0][0], out[b, first:last]) and same_bits(alone[1][0], lse[b, :, first:last]), first


@by_prec
@pytest.mark.parametrize("HS", [1, 15, 17, 48])
def test_attention_hears_nothing_of_its_neighbours(backend, rng, HS, prec):
    """One head of one document, and NaN everywhere else: what an odd head, or an odd number of keys or queries, is
    paired with must be zero and not what lies behind it."""
    B, T, NH = 2, 41, 3
    mine = np.s_[1, 5:38, ..., 1, :]
    starts = np.tile(np.repeat(np.array([0, 5, 38], np.int32), [5, 33, 3]), (B, 1))
    qkv, dout = normal(rng, B, T, 3 * NH * HS), normal(rng, B, T, NH * HS)
    out, lse = attention(backend, qkv, starts, prec, NH, NH)

    def alone(a):
        noisy = np.full((B, T, a.shape[-1] // NH // HS, NH, HS), np.nan, np.float32)
        noisy[mine] = a.reshape(noisy.shape)[mine]
        return noisy.reshape(a.shape)

    def gradient(*arrays):
        dqkv, arrays = guarded(np.full_like(qkv, np.nan)), [guarded(a, constant=True) for a in (*arrays, starts)]
        ops.attention_backward(backend, dqkv, *arrays, PREC[prec], B, T, NH, NH, HS)
        return dqkv.reshape(B, T, 3, NH, HS)[mine]

    noisy_lse = np.full_like(lse, np.nan)
    noisy_lse[1, 1, 5:38] = lse[1, 1, 5:38]
    got, got_lse = attention(backend, alone(qkv), starts, prec, NH, NH)
    shape = B, T, 1, NH, HS
    assert same_bits(got.reshape(shape)[mine], out.reshape(shape)[mine])
    assert same_bits(got_lse[1, 1, 5:38], lse[1, 1, 5:38])
    assert np.isfinite(got.reshape(shape)[mine]).all()
    want = gradient(dout, qkv, out, lse)
    assert same_bits(gradient(alone(dout), alone(qkv), alone(out), noisy_lse), want) and np.isfinite(want).all()


@by_prec
def test_attention_to_one_key_is_its_value(backend, rng, prec):
    """With one key the probability is 1: out is v and dv is dout, rounded where operands are.  The division by the sum
    of probabilities may be a product with its inverse, and exp(score - lse) may miss 1; bf16 rounds it to 1."""
    B, T, NH, HS = 2, 70, 3, 17
    qkv, dout = normal(rng, B, T, 3 * NH * HS), normal(rng, B, T, NH * HS)
    starts = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    out, lse = attention(backend, qkv, starts, prec, NH, NH)
    v, do = operands(prec, qkv[..., 2 * NH * HS :], dout)
    assert_close("out", out, v, 2 * EPS * np.abs(v))
    dqkv = guarded(np.full_like(qkv, np.nan))
    ops.attention_backward(backend, dqkv, dout, qkv, out, lse, starts, PREC[prec], B, T, NH, NH, HS)
    assert_close("dv", dqkv[..., 2 * NH * HS :], do, 0 if prec == "bf16" else 32 * EPS * np.abs(do))


@pytest.mark.parametrize("fn", ["gelu_tanh", "gelu_erf"])
def test_gelu_everywhere(backend, fn):
    """The linear layer of one channel and weight 1 is the function itself."""
    x = np.concatenate([np.linspace(-15, 15, 4001), [-1e4, -40, -1e-20, 0, 1e-20, 40, 1e4]]).astype(np.float32)
    N, one = len(x), np.ones((1, 1), np.float32)
    x = guarded(x[:, None])
    out, pre, din = (guarded(np.full((N, 1), np.nan, np.float32)) for _ in range(3))
    ops.linear_forward(backend, out, pre, x, one, 0, None, None, FN[fn], 0, N, 1, 1)
    ops.linear_backward_input(backend, din, np.ones((N, 1), np.float32), None, one, 0, x, FN[fn], 0, N, 1, 1)
    np.testing.assert_array_equal(pre, x)
    alone = guarded(np.full_like(x, np.nan))
    ops.gelu_forward(backend, alone, pre, FN[fn], N, 1)
    assert same_bits(alone, out)  # so that a model may drop one and make it again by the other
    (x,) = f64(x)
    with np.errstate(under="ignore"):
        want, derivative = reference.FUNCTIONS[fn](x), reference.DERIVATIVES[fn](np.clip(x, -50, 50))
    tol = function_tolerance(fn, x)
    assert_close("out", out, want, tol[0] + TINY)
    assert_close("din", din, derivative, EPS * (4 + 4 * np.minimum(np.abs(x), 15) + np.minimum(np.abs(x), 6) ** 3))


def test_layernorm_of_equal_values_is_the_bias(backend):
    N, C = 3, 37
    x, weight, bias = np.full((N, C), 3.0, np.float32), np.full(C, 2.0, np.float32), np.arange(C, dtype=np.float32)
    out, mean, rstd = guarded(np.empty((N, C), np.float32)), np.empty(N, np.float32), np.empty(N, np.float32)
    ops.layernorm_forward(backend, out, mean, rstd, x, weight, bias, 1e-5, N, C)
    np.testing.assert_array_equal(out, np.tile(bias, (N, 1)))
    np.testing.assert_allclose(rstd, 1 / math.sqrt(1e-5), rtol=4 * EPS)


def test_products_of_small_integers_are_exact(backend, rng):
    """Every partial sum is an integer below 2^24 and every operand has 4 bits: nothing is rounded, in bf16 neither."""
    N, C, OC = 37, 600, 101
    x, weight = (rng.integers(-8, 9, s).astype(np.float32) for s in ((N, C), (OC, C)))
    for prec in PREC.values():
        out, din, dweight = (guarded(np.full(s, np.nan, np.float32)) for s in ((N, OC), (N, C), (OC, C)))
        ops.linear_forward(backend, out, None, x, weight, 0, None, None, 0, prec, N, C, OC)
        np.testing.assert_array_equal(out, x @ weight.T)
        dout = rng.integers(-8, 9, (N, OC)).astype(np.float32)
        ops.linear_backward_input(backend, din, dout, None, weight, 0, None, 0, prec, N, C, OC)
        np.testing.assert_array_equal(din, dout @ weight)
        ops.linear_backward_weight(backend, dweight, None, dout, x, 0, prec, N, C, OC)
        np.testing.assert_array_equal(dweight, dout.T @ x)


@pytest.mark.parametrize(("C", "skew"), [(720, 0), (720, 4), (730, 0)])
def test_a_gradient_beyond_the_caches_lies_anywhere(backend, rng, C, skew):
    """So large a one is written past them where its rows begin on cache lines, and as others are where they do not."""
    N, OC = 3, 740
    x, dout = (rng.integers(-8, 9, s).astype(np.float32) for s in ((N, C), (N, OC)))
    room = np.full(OC * C * 4 + 128, 255, np.uint8)
    first = -room.ctypes.data % 64 + skew
    dweight = room[first : first + OC * C * 4].view(np.float32).reshape(OC, C)
    ops.linear_backward_weight(backend, dweight, None, dout, x, 0, PREC["fp32"], N, C, OC)
    np.testing.assert_array_equal(dweight, dout.T @ x)
    assert (room[:first] == 255).all() and (room[first + OC * C * 4 :] == 255).all()


def test_logprob_of_a_sure_and_of_an_even_distribution(backend):
    V, Vp = 50, 64
    logits = guarded(np.full((2, Vp), np.inf, np.float32))
    logits[0, :V], logits[1, :V] = -1000, 7
    logits[0, 49] = 1000
    logprobs, lse, entropy = (guarded(np.full(2, np.nan, np.float32)) for _ in range(3))
    ops.logprob_forward(backend, logprobs, lse, entropy, logits, np.array([49, 3], np.int32), 1.0, 2, V, Vp)
    assert (logprobs[0], lse[0], entropy[0]) == (0, 1000, 0)
    np.testing.assert_allclose([logprobs[1], entropy[1]], [-math.log(V), math.log(V)], rtol=8 * EPS)


def test_embedding_gradient_of_a_token_that_does_not_occur_is_left_alone(backend):
    dwte = guarded(np.full((5, 3), 0.1, np.float32))
    ops.embedding_backward(
        backend, dwte, None, np.ones((1, 2, 3), np.float32), np.array([[4, 1]], np.int32), None, 1, 2, 3, 5
    )
    np.testing.assert_array_equal(dwte[[0, 2, 3]], np.float32(0.1))
    np.testing.assert_array_equal(dwte[[1, 4]], np.float32(0.1) + np.float32(1))


@pytest.mark.parametrize(
    ("name", "total", "loss", "limits", "made"),
    [
        ("at both limits", 3.0, 2.5, dict(loss_limit=2.5, norm_limit=2.0), True),
        ("a norm above its limit", 3.0, 2.5, dict(norm_limit=1.9999999), False),
        ("a loss above its limit", 3.0, 2.5, dict(loss_limit=2.4999998), False),
        ("a negative loss", 3.0, -2.5, dict(loss_limit=-2.4), True),
        ("a norm that is no number", np.nan, 2.5, {}, False),
        ("a norm without end", np.inf, 2.5, {}, False),
        ("a loss that is no number", 3.0, np.nan, {}, False),
        ("a loss without end", 3.0, -np.inf, {}, False),
    ],
)
def test_an_update_is_made_or_not(backend, name, total, loss, limits, made):
    """The scale says it to AdamW, which then changes nothing."""
    hyper, norm = hyper_of(clip=1, **limits), np.empty(1)
    before = hyper.copy()
    ops.clip_scale(backend, hyper, norm, np.array([loss]), np.array([1.0, total]), 2)
    scale, hyper[-1] = hyper[-1], before[-1]
    np.testing.assert_array_equal(hyper, before)
    np.testing.assert_equal(norm[0], np.sqrt(1 + total))
    assert scale == 0.5 if made else np.isnan(scale)
    hyper[-1] = scale
    arrays = [np.full(37, 0.5, np.float32) for _ in range(4)]
    weights, m, v, grads = arrays
    offsets, decays = np.array([0, 37], np.int64), np.ones(1, np.int32)
    ops.adamw(backend, weights, m, v, None, grads, hyper, offsets, decays, 1, 37)
    assert all((a == 0.5).all() for a in arrays[:3]) != made


@pytest.mark.parametrize("made", [True, False])
def test_an_update_writes_the_weights_in_bf16_too(backend, rng, made, threads):
    """The bits of held_write; and nothing where there is no update."""
    lengths = (3, 1, 40_000, 70)
    call, size = adamw(rng, Case("", False, dict(lengths=lengths, step=2, weight_decay=0.1, made=made))), sum(lengths)
    for n in 1, 3:
        _core.threads_set(n)
        rounded, want = guarded(np.full(size // 2, 7, np.float32)), np.full(size // 2, 7, np.float32)
        arrays = {name: filled(*spec) for name, spec in call.outputs.items()}
        call(backend, rounded=rounded, **arrays)
        if made:
            ops.held_write(backend, want, arrays["weights"], HELD["bf16"], size, 1)
        assert same_bits(rounded, want)

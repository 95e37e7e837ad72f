"""The operators of a session, whose weights and pages lie in a form of each backend's own: they have the bits of the
operators of training, which tests/test_ops.py holds against the reference."""

import numpy as np
import pytest
import reference
from barelm import _core
from barelm._core import ops
from cases import LINEAR
from conftest import guarded
from test_ops import DOT, EPS, FN, assert_close, f64, function_tolerance, normal, same_bits

PREC = {"fp32": 0, "bf16": 1, "int8": 2}
EXACT = ("fp32", "bf16")
NORMS = {"layernorm": 0, "rmsnorm": 1}

SHORT = [c for c in LINEAR if not c.big]


def empty(*shape):
    return guarded(np.full(shape, np.nan, np.float32))


def constant(a):
    return None if a is None else guarded(a, constant=True)


def packed(backend, weight, prec):
    OC, C = weight.shape
    out = empty(-(-_core.packed_bytes(backend, PREC[prec], C, OC) // 4))
    ops.linear_pack(backend, out, constant(weight), PREC[prec], C, OC)
    return constant(out)


def linear_arguments(rng, c, N):
    x, weight = normal(rng, N, c.C), normal(rng, c.OC, c.C)
    bias, residual = normal(rng, c.OC) if c.bias else None, normal(rng, N, c.OC) if c.residual else None
    return x, weight, bias, residual


@pytest.mark.parametrize("c", SHORT, ids=str)
def test_a_packed_product_has_the_bits_of_linear_forward(backend, rng, c, threads):
    for N in {c.N, 1, 2, 3, 5, 9}:  # every tile of few rows
        x, weight, bias, residual = linear_arguments(rng, c, N)
        want, code = np.empty((N, c.OC), np.float32), (FN[c.fn], PREC[c.prec], N, c.C, c.OC)
        ops.linear_forward(backend, want, None, x, weight, 0, bias, residual, *code)
        w = packed(backend, weight, c.prec)
        for n in 1, 3:
            _core.threads_set(n)
            out = empty(N, c.OC)
            ops.linear_packed(backend, out, constant(x), w, constant(bias), constant(residual), *code)
            assert same_bits(out, want), (N, n)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("c", SHORT, ids=str)
def test_a_packed_product_behind_a_norm_has_the_bits_of_the_two(backend, rng, c, norm, threads):
    for N in {0, 1, 3, c.N}:
        x, weight, bias, _ = linear_arguments(rng, c, N)
        gain, shift = normal(rng, c.C), normal(rng, c.C) if norm == "layernorm" and c.bias else None
        normed, sums = np.empty((N, c.C), np.float32), np.empty((2, N), np.float32)
        if norm == "layernorm":
            ops.layernorm_forward(backend, normed, *sums, x, gain, shift, 1e-5, N, c.C)
        else:
            ops.rmsnorm_forward(backend, normed, sums[0], x, gain, 1e-5, N, c.C)
        w, want, code = packed(backend, weight, c.prec), empty(N, c.OC), (FN[c.fn], PREC[c.prec], N, c.C, c.OC)
        ops.linear_packed(backend, want, normed, w, bias, None, *code)
        _core.threads_set(3)
        out, room = empty(N, c.OC), (empty(N, c.C), empty(2, N))
        given = constant(x), NORMS[norm], constant(gain), constant(shift), 1e-5, w, constant(bias)
        ops.norm_linear_packed(backend, out, *room, *given, *code)
        assert same_bits(out, want), N


@pytest.mark.parametrize("prec", EXACT)
def test_a_packed_product_in_place_and_of_no_rows(backend, rng, prec):
    N, C, OC = 5, 70, 50
    x, weight, residual = normal(rng, N, C), normal(rng, OC, C), normal(rng, N, OC)
    w, want, shared = packed(backend, weight, prec), empty(N, OC), guarded(residual)
    ops.linear_packed(backend, want, x, w, None, residual, 0, PREC[prec], N, C, OC)
    ops.linear_packed(backend, shared, x, w, None, shared, 0, PREC[prec], N, C, OC)
    assert same_bits(shared, want)
    ops.linear_packed(backend, empty(0, OC), empty(0, C), w, None, None, 0, PREC[prec], 0, C, OC)


@pytest.mark.parametrize("prec", PREC)
def test_packing_has_the_same_bits_for_any_number_of_threads(backend, rng, prec, threads):
    weight, results = normal(rng, 300, 65), []
    for n in 1, 2, 3, 8:
        _core.threads_set(n)
        results.append(packed(backend, weight, prec))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("prec", PREC)
@pytest.mark.parametrize("C", [1, 7, 64, 65, 300])
def test_the_rows_of_a_packed_embedding(backend, rng, prec, C, threads):
    """Each value as packing has rounded it: one product with a scale in int8, nothing else."""
    V, B, T = 101, 3, 11
    wte, wpe, tokens = normal(rng, V, C), normal(rng, 40, C), rng.integers(0, V, (B, T), dtype=np.int32)
    tokens[0, :2] = 0, V - 1
    starts = -rng.integers(0, 40 - T, (B, T), dtype=np.int32)
    rounded = {"fp32": np.asarray, "bf16": reference.bf16, "int8": int8_values}[prec](wte)
    for positions, where in ((None, None), (wpe, None), (wpe, starts)):
        want = np.empty((B, T, C), np.float32)
        ops.embedding_forward(backend, want, tokens, where, rounded.astype(np.float32), 0, positions, B, T, C)
        for n in 1, 3:
            _core.threads_set(n)
            out = empty(B, T, C)
            w, ids = packed(backend, wte, prec), constant(tokens)
            ops.embedding_packed(backend, out, ids, where, w, constant(positions), PREC[prec], B, T, C)
            assert same_bits(out, want), (n, positions is None, where is None)


def int8_values(weight):
    q, scale = reference.int8(weight)
    values = q.astype(np.float32) * scale[..., None].astype(np.float32)
    return values.reshape(len(weight), -1)[:, : weight.shape[1]]


@pytest.mark.parametrize("prec", PREC)
def test_a_weight_is_packed_in_parts(backend, rng, prec):
    C, OC = 70, 2 * _core.PACK_ROWS + 50
    weight = normal(rng, OC, C)
    whole, parts = (
        np.array(packed(backend, weight, prec)).view(np.uint8),
        empty(-(-_core.packed_bytes(backend, PREC[prec], C, OC) // 4)),
    )
    bytes_ = parts.view(np.uint8)
    for o in range(0, OC, _core.PACK_ROWS):
        rows = weight[o : o + _core.PACK_ROWS]
        begin, end = (_core.packed_bytes(backend, PREC[prec], C, at) for at in (o, o + len(rows)))
        bytes_[begin:end] = np.array(packed(backend, rows, prec)).view(np.uint8)[: end - begin]
    assert (bytes_ == whole).all()


# ---- int8


def int8_product(backend, x, w, bias, residual, fn, C, OC):
    out = empty(len(x), OC)
    ops.linear_packed(
        backend, out, constant(x), w, constant(bias), constant(residual), FN[fn], PREC["int8"], len(x), C, OC
    )
    return out


@pytest.mark.parametrize("c", [c for c in SHORT if c.prec == "fp32"], ids=str)
def test_int8_products(backend, rng, c, threads):
    """A term is rounded three times (the scales' product, the term, its addition); the sum of the terms is a walk."""
    for N in {c.N, 1, 2, 3, 5}:
        x, weight, bias, residual = linear_arguments(rng, c, N)
        x[0, : c.C // 2] = 0  # groups of zeros
        terms = reference.linear_int8(x, weight)
        want, pre = reference.linear_forward(terms.sum(-1), np.eye(c.OC), *f64(bias, residual), c.fn)
        dpre = EPS * (DOT * np.abs(terms).sum(-1) + np.abs(pre))
        tol = 1.13 * dpre + function_tolerance(c.fn, pre)[0] + EPS * np.abs(want)
        w = packed(backend, weight, "int8")
        got = int8_product(backend, x, w, bias, residual, c.fn, c.C, c.OC)
        assert_close("out", got, want, tol)
        _core.threads_set(3)
        assert same_bits(int8_product(backend, x, w, bias, residual, c.fn, c.C, c.OC), got)
        row = None if residual is None else residual[-1:]
        assert same_bits(int8_product(backend, x[-1:], w, bias, row, c.fn, c.C, c.OC), got[-1:])


def test_int8_extremes_are_exact(backend):
    """Every byte at its greatest: a sum of 16-bit products would overflow."""
    C = 320
    for sign in (1, -1):
        x, weight = np.full((3, C), 127, np.float32), np.full((50, C), 127 * sign, np.float32)
        out = int8_product(backend, x, packed(backend, weight, "int8"), None, None, "none", C, 50)
        assert (out == 127 * 127 * C * sign).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_does_not_hide_what_is_not_finite(backend, rng, bad):
    C, OC = 130, 5
    x, weight = normal(rng, 2, C), normal(rng, OC, C)
    clean = packed(backend, weight, "int8")
    x[1, 70] = weight[3, 129] = bad
    assert not np.isfinite(int8_product(backend, x, clean, None, None, "none", C, OC)[1]).any()
    out = int8_product(backend, x[:1], packed(backend, weight, "int8"), None, None, "none", C, OC)
    assert np.isfinite(out[0]).tolist() == [True, True, True, False, True]


def test_int8_loses_little(backend, rng):
    """Of rows and weights drawn at random: a relative error of 1 % of the result's size."""
    x, weight = normal(rng, 20, 768), normal(rng, 100, 768)
    out = int8_product(backend, x, packed(backend, weight, "int8"), None, None, "none", 768, 100)
    want = x.astype(np.float64) @ weight.T.astype(np.float64)
    assert np.sqrt(np.mean((out - want) ** 2)) < 0.01 * np.sqrt(np.mean(want**2))


# ---- attention


HEADS = [(1, 1, 1), (3, 3, 7), (2, 1, 17), (4, 2, 20), (2, 2, 64), (1, 1, 129)]  # NH, NKV, HS


def attention(backend, qkv, NH, NKV, HS, prec):
    T = len(qkv)
    out, lse = np.empty((1, T, NH * HS), np.float32), np.empty((1, NH, T), np.float32)
    ops.attention_forward(backend, out, lse, qkv[None].copy(), None, PREC[prec], 1, T, NH, NKV, HS)
    return out[0]


class Cache:
    """Pages in an order of their own, at first full of NaN, and rows that take tokens in chunks."""

    def __init__(self, backend, rng, rows, NH, NKV, HS, prec, P=4):
        self.backend, self.heads, self.prec, self.P = backend, (NH, NKV, HS), prec, P
        size = _core.page_bytes(backend, PREC[prec], NKV, HS)
        assert size % 4 == 0
        self.pages = empty(rows * P * size // 4)
        self.table = rng.permutation(rows * P).reshape(rows, P).astype(np.int32)
        self.past = np.zeros(rows, np.int32)

    def step(self, rows, chunks):
        """chunks: qkv (n, (NH + 2 NKV) HS) of each row; returns out (n, NH HS) of each."""
        NH, _, HS = self.heads
        first = np.cumsum([0] + [len(chunk) for chunk in chunks]).astype(np.int32)
        out = empty(first[-1], NH * HS)
        arrays = np.concatenate(chunks), self.table[rows], first, self.past[rows]
        qkv, table, first_, past = (constant(a) for a in arrays)
        size = len(rows), self.P, *self.heads
        ops.attention_paged(self.backend, out, self.pages, qkv, table, first_, past, PREC[self.prec], *size)
        self.past[rows] += np.diff(first)
        return np.split(out, first[1:-1])


@pytest.mark.parametrize("prec", EXACT)
@pytest.mark.parametrize("NH, NKV, HS", HEADS)
def test_paged_attention_has_the_bits_of_one_forward_pass(backend, rng, NH, NKV, HS, prec, threads):
    lengths = [1, 130, 65, 203]
    rows = [normal(rng, T, (NH + 2 * NKV) * HS) for T in lengths]
    want = [attention(backend, qkv, NH, NKV, HS, prec) for qkv in rows]
    cache = Cache(backend, rng, len(rows), NH, NKV, HS, prec)
    got = [[] for _ in rows]
    while (left := [T - int(past) for T, past in zip(lengths, cache.past, strict=True)]) != [0] * len(rows):
        live = rng.permutation(np.flatnonzero(left))[: rng.integers(1, 5)]
        take = [min(left[r], int(rng.choice([1, 1, 3, 4, 5, 64, 100]))) for r in live]
        _core.threads_set(int(rng.integers(1, 4)))
        chunks = [rows[r][cache.past[r] : cache.past[r] + n] for r, n in zip(live, take, strict=True)]
        for r, out in zip(live, cache.step(live, chunks), strict=True):
            got[r].append(out)
    for r in range(len(rows)):
        assert same_bits(np.concatenate(got[r]), want[r]), r


@pytest.mark.parametrize("prec", EXACT)
def test_paged_attention_writes_to_the_pages_of_its_rows_alone(backend, rng, prec):
    NH, NKV, HS = 2, 1, 20
    cache = Cache(backend, rng, 3, NH, NKV, HS, prec)
    qkv = normal(rng, 70, (NH + 2 * NKV) * HS)
    cache.step(np.array([1]), [qkv])
    pages = cache.pages.view(np.uint32).reshape(12, -1)
    untouched = set(range(12)) - set(cache.table[1, :2].tolist())
    assert all((pages[i] == np.float32(np.nan).view(np.uint32)).all() for i in untouched)

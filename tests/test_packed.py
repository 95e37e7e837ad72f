"""The operators of a session, whose weights and pages lie in a form of each backend's own: they have the bits of the
operators of training, which tests/test_ops.py holds against the reference."""

import numpy as np
import pytest
from barelm import _core
from barelm._core import ops
from cases import LINEAR
from conftest import guarded
from test_ops import FN, PREC, normal, same_bits

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


@pytest.fixture
def threads():
    yield
    _core.threads_set(0)


def linear_arguments(rng, c, N):
    x, weight = normal(rng, N, c.C), normal(rng, c.OC, c.C)
    bias, residual = normal(rng, c.OC) if c.bias else None, normal(rng, N, c.OC) if c.residual else None
    return x, weight, bias, residual


@pytest.mark.parametrize("c", SHORT, ids=str)
def test_a_packed_product_has_the_bits_of_linear_forward(backend, rng, c, threads):
    for N in {c.N, 1, 2, 3, 5, 9}:  # every tile of few rows
        x, weight, bias, residual = linear_arguments(rng, c, N)
        want, code = np.empty((N, c.OC), np.float32), (FN[c.fn], PREC[c.prec], N, c.C, c.OC)
        ops.linear_forward(backend, want, None, x, weight, bias, residual, *code)
        w = packed(backend, weight, c.prec)
        for n in 1, 3:
            _core.threads_set(n)
            out = empty(N, c.OC)
            ops.linear_packed(backend, out, constant(x), w, constant(bias), constant(residual), *code)
            assert same_bits(out, want), (N, n)


@pytest.mark.parametrize("prec", PREC)
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


@pytest.mark.parametrize("prec", PREC)
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


@pytest.mark.parametrize("prec", PREC)
def test_paged_attention_writes_to_the_pages_of_its_rows_alone(backend, rng, prec):
    NH, NKV, HS = 2, 1, 20
    cache = Cache(backend, rng, 3, NH, NKV, HS, prec)
    qkv = normal(rng, 70, (NH + 2 * NKV) * HS)
    cache.step(np.array([1]), [qkv])
    pages = cache.pages.view(np.uint32).reshape(12, -1)
    untouched = set(range(12)) - set(cache.table[1, :2].tolist())
    assert all((pages[i] == np.float32(np.nan).view(np.uint32)).all() for i in untouched)

"""Weights held in bf16 or int8: what is written stands for the floats that the contract says, and every operator that
reads one gives the bits that it gives for those floats."""

import numpy as np
import pytest
import reference
from barelm import _core
from barelm._core import ops
from cases import CASES
from conftest import guarded
from test_ops import FN, HELD, normal, same_bits
from test_packed import PREC, constant, empty, int8_values

SHORT = [c for c in CASES["linear_forward"] if not c.big]
ROUNDED = ("bf16", "int8")


def written(backend, weight, held):
    OC, C = weight.shape
    size = _core.held_bytes(backend, HELD[held], C, OC)
    whole = empty(-(-size // 4))
    ops.held_write(backend, whole, constant(weight), HELD[held], C, OC)
    return constant(whole)


def read(backend, whole, held, OC, C):
    out = empty(OC, C)
    ops.held_read(backend, out, whole, HELD[held], C, OC)
    return out


def rounded(weight, held):
    return {"fp32": np.asarray, "bf16": reference.bf16, "int8": int8_values}[held](weight).astype(np.float32)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("OC, C", [(1, 1), (3, 7), (5, 63), (2, 64), (9, 65), (300, 130), (7, 200)])
def test_what_is_written_is_read_as_it_was_rounded(backend, rng, held, OC, C, threads):
    weight = normal(rng, OC, C)
    weight[0] = 0
    for n in 1, 3:
        _core.threads_set(n)
        assert same_bits(read(backend, written(backend, weight, held), held, OC, C), rounded(weight, held)), n


@pytest.mark.parametrize("held", ROUNDED)
def test_rounding_twice_changes_nothing_or_a_last_bit(backend, rng, held):
    """bf16: exact.  int8: the scale is computed anew from the greatest value, 127 times the old scale, which was
    rounded: q stays, the scale may move by a last bit."""
    once = read(backend, written(backend, normal(rng, 33, 200), held), held, 33, 200)
    twice = read(backend, written(backend, once, held), held, 33, 200)
    np.testing.assert_allclose(twice, once, rtol=0 if held == "bf16" else 2**-22, atol=0)


@pytest.mark.parametrize("held", HELD)
def test_a_weight_is_written_in_parts(backend, rng, held):
    C, OC = 70, 50
    weight = normal(rng, OC, C)
    whole, parts = np.array(written(backend, weight, held)).view(np.uint8), empty(OC * C).view(np.uint8)
    for o in range(0, OC, 7):
        part = np.array(written(backend, weight[o : o + 7], held)).view(np.uint8)
        begin, end = (_core.held_bytes(backend, HELD[held], C, at) for at in (o, min(OC, o + 7)))
        parts[begin:end] = part[: end - begin]
    size = _core.held_bytes(backend, HELD[held], C, OC)
    assert (parts[:size] == whole[:size]).all()


@pytest.mark.parametrize("held", ROUNDED)
def test_a_value_that_is_not_finite_does_not_hide(backend, rng, held):
    for bad in np.nan, np.inf, -np.inf:
        weight = normal(rng, 3, 100)
        weight[1, 70] = bad
        out = read(backend, written(backend, weight, held), held, 3, 100)
        assert np.isfinite(out[[0, 2]]).all()
        assert not np.isfinite(out[1, 64:]).all()


@pytest.mark.parametrize("held", ROUNDED)
@pytest.mark.parametrize("c", SHORT, ids=str)
def test_products_with_a_held_weight(backend, rng, c, held, threads):
    weight = normal(rng, c.OC, c.C)
    w, floats, prec = written(backend, weight, held), rounded(weight, held), PREC[c.prec]
    x, bias = normal(rng, c.N, c.C), normal(rng, c.OC) if c.bias else None
    residual, dres = (normal(rng, c.N, n) if c.residual else None for n in (c.OC, c.C))
    before = normal(rng, c.N, c.C) if c.fn != "none" else None

    def forward(weight, as_):
        out, pre = empty(c.N, c.OC), empty(c.N, c.OC) if c.pre else None
        ops.linear_forward(
            backend,
            out,
            pre,
            constant(x),
            weight,
            as_,
            constant(bias),
            constant(residual),
            FN[c.fn],
            prec,
            c.N,
            c.C,
            c.OC,
        )
        return [out, pre] if c.pre else [out]

    def backward(weight, as_):
        din = empty(c.N, c.C)
        dout = constant(residual if c.residual else np.ones((c.N, c.OC), np.float32))
        args = constant(dres), weight, as_, constant(before), FN[c.fn], prec, c.N, c.C, c.OC
        ops.linear_backward_input(backend, din, dout, *args)
        return [din]

    for run in forward, backward:
        want = run(constant(floats), HELD["fp32"])
        for n in 1, 3:
            _core.threads_set(n)
            assert all(same_bits(a, b) for a, b in zip(run(w, HELD[held]), want, strict=True)), (run.__name__, n)


@pytest.mark.parametrize("held", ROUNDED)
@pytest.mark.parametrize("C", [1, 7, 64, 65, 300])
def test_the_rows_of_a_held_embedding(backend, rng, held, C, threads):
    V, B, T = 101, 3, 11
    wte, wpe, tokens = normal(rng, V, C), normal(rng, T, C), rng.integers(0, V, (B, T), dtype=np.int32)
    tokens[0, :2] = 0, V - 1
    for positions in None, wpe:
        want = np.empty((B, T, C), np.float32)
        ops.embedding_forward(backend, want, tokens, None, rounded(wte, held), 0, positions, B, T, C)
        for n in 1, 3:
            _core.threads_set(n)
            out = empty(B, T, C)
            w = written(backend, wte, held)
            ops.embedding_forward(backend, out, guarded(tokens), None, w, HELD[held], constant(positions), B, T, C)
            assert same_bits(out, want), (n, positions is None)

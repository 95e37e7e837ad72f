"""The reference against the definition of a derivative, and against truths that need no reference."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
from cases import make_starts

STEP = 1e-5  # central differences: error STEP^2 of the third derivative, and 1e-16 / STEP of rounding


def check_derivative(f, x, gradient, rng, directions=3, entries=4):
    """`gradient` is the derivative of the number f(x) in random directions and in single entries."""
    assert gradient.shape == x.shape
    steps = [rng.normal(size=x.shape) for _ in range(directions)]
    for i in rng.choice(x.size, min(entries, x.size), replace=False):
        steps.append(np.zeros(x.shape))
        steps[-1].flat[i] = 1.0
    for e in steps:
        numeric = (f(x + STEP * e) - f(x - STEP * e)) / (2 * STEP)
        scale = np.linalg.norm(gradient) * np.linalg.norm(e)
        assert (gradient * e).sum() == pytest.approx(numeric, abs=1e-7 * scale + 1e-9)


def check_all(f, inputs, gradients, rng):
    """`f(**inputs)` is a number; gradients: {name of an input: its gradient}."""
    for name, gradient in gradients.items():
        check_derivative(lambda x, name=name: f(**inputs | {name: x}), inputs[name], gradient, rng)


# ---- every operator


@pytest.mark.parametrize("kind", [None, "packed", "window"])
def test_embedding(rng, kind):
    B, T, C, V, P = 2, 9, 3, 5, 11
    starts = make_starts(kind, B, T)
    tokens, dout = rng.integers(0, V, (B, T)), rng.normal(size=(B, T, C))
    inputs = dict(wte=rng.normal(size=(V, C)), wpe=rng.normal(size=(P, C)))
    dwte, dwpe = ref.embedding_backward(dout, tokens, V, P, starts)
    check_all(
        lambda wte, wpe: (dout * ref.embedding_forward(tokens, wte, wpe, starts)).sum(),
        inputs,
        dict(wte=dwte, wpe=dwpe),
        rng,
    )


def test_layernorm(rng):
    x, weight, bias, dout = (rng.normal(size=s) for s in ((4, 7), 7, 7, (4, 7)))
    _, mean, rstd = ref.layernorm_forward(x, weight, bias)
    dx, dweight, dbias, dbias_in = ref.layernorm_backward(dout, x, weight, mean, rstd)
    check_all(
        lambda x, weight, bias: (dout * ref.layernorm_forward(x, weight, bias)[0]).sum(),
        dict(x=x, weight=weight, bias=bias),
        dict(x=dx, weight=dweight, bias=dbias),
        rng,
    )
    # the bias of the layer before is added to every row; the residual stream carries its own gradient
    check_derivative(lambda b: (dout * ref.layernorm_forward(x + b, weight, bias)[0]).sum(), np.zeros(7), dbias_in, rng)
    dres = rng.normal(size=x.shape)
    with_dres = ref.layernorm_backward(dout, x, weight, mean, rstd, dres)
    np.testing.assert_allclose(with_dres[0], dx + dres, rtol=1e-14)
    np.testing.assert_allclose(with_dres[3], dbias_in + dres.sum(0), rtol=1e-12)


def test_rmsnorm(rng):
    x, weight, dout, dres = (rng.normal(size=s) for s in ((4, 7), 7, (4, 7), (4, 7)))
    _, rstd = ref.rmsnorm_forward(x, weight)
    dx, dweight, dbias_in = ref.rmsnorm_backward(dout, x, weight, rstd)
    check_all(
        lambda x, weight: (dout * ref.rmsnorm_forward(x, weight)[0]).sum(),
        dict(x=x, weight=weight),
        dict(x=dx, weight=dweight),
        rng,
    )
    check_derivative(lambda b: (dout * ref.rmsnorm_forward(x + b, weight)[0]).sum(), np.zeros(7), dbias_in, rng)
    np.testing.assert_allclose(ref.rmsnorm_backward(dout, x, weight, rstd, dres)[0], dx + dres, rtol=1e-14)


@pytest.mark.parametrize("fn", ref.FUNCTIONS)
def test_linear(rng, fn):
    N, C, OC = 3, 5, 4
    inputs = dict(x=rng.normal(size=(N, C)), weight=rng.normal(size=(OC, C)), bias=rng.normal(size=OC))
    dout, residual = rng.normal(size=(N, OC)), rng.normal(size=(N, OC))
    _, pre = ref.linear_forward(**inputs, fn=fn)
    dpre = dout * ref.DERIVATIVES[fn](pre)
    dweight, dbias = ref.linear_backward_weight(dpre, inputs["x"])
    check_all(
        lambda **kw: (dout * ref.linear_forward(**kw, residual=residual, fn=fn)[0]).sum(),
        inputs,
        dict(x=ref.linear_backward_input(dpre, inputs["weight"]), weight=dweight, bias=dbias),
        rng,
    )
    # where the layer's input was fn(pre), its gradient goes on to pre
    pre = rng.normal(0, 2, (N, C))
    check_derivative(
        lambda pre: (dout * ref.linear_forward(ref.FUNCTIONS[fn](pre), inputs["weight"])[0]).sum(),
        pre,
        ref.linear_backward_input(dout, inputs["weight"], pre, fn),
        rng,
        entries=N * C,
    )


def test_swiglu(rng):
    x, dout = rng.normal(0, 3, (4, 10)), rng.normal(size=(4, 5))
    check_derivative(lambda x: (dout * ref.swiglu_forward(x)).sum(), x, ref.swiglu_backward(dout, x), rng)


@pytest.mark.parametrize("kind", [None, "packed", "ragged"])
def test_rope(rng, kind):
    B, T, NH, NKV, HS = 2, 9, 4, 2, 6
    starts, tables = make_starts(kind, B, T), ref.rope_tables(T, HS)
    qkv, dqkv = (rng.normal(size=(B, T, (NH + 2 * NKV) * HS)) for _ in range(2))
    check_derivative(
        lambda x: (dqkv * ref.rope_forward(x, *tables, NH, NKV, starts)).sum(),
        qkv,
        ref.rope_backward(dqkv, *tables, NH, NKV, starts),
        rng,
    )


@pytest.mark.parametrize("kind", [None, "packed", "ragged", "window"])
@pytest.mark.parametrize(("NH", "NKV"), [(2, 2), (6, 3), (4, 1)])
def test_attention(rng, kind, NH, NKV):
    B, T, HS = 2, 9, 3
    starts = make_starts(kind, B, T)
    qkv, dout = rng.normal(size=(B, T, (NH + 2 * NKV) * HS)), rng.normal(size=(B, T, NH * HS))
    check_derivative(
        lambda x: (dout * ref.attention_forward(x, NH, NKV, starts)[0]).sum(),
        qkv,
        ref.attention_backward(dout, qkv, NH, NKV, starts),
        rng,
        entries=8,
    )


@pytest.mark.parametrize("invtemp", [1.0, 0.3, 2.5])
def test_logprob(rng, invtemp):
    logits, targets, d = rng.normal(0, 2, (3, 5)), np.array([4, 0, -1]), rng.normal(size=3)
    dlogits = ref.logprob_backward(d, logits, targets, invtemp)
    check_derivative(
        lambda x: (d * ref.logprob_forward(x, targets, invtemp)[0]).sum(), logits, dlogits, rng, entries=15
    )
    assert (dlogits[2] == 0).all() and ref.logprob_forward(logits, targets, invtemp)[0][2] == 0


# ---- both transformers


def config_of(kwargs):
    defaults = dict(head_size=kwargs["n_embd"] // kwargs["n_head"], rope_theta=10000.0)
    return SimpleNamespace(**defaults | kwargs)


@pytest.mark.parametrize(("kind", "temperature"), [(None, 1.0), ("packed", 0.7), ("ragged", 1.6)])
def test_transformer_backward(rng, tiny_config, kind, temperature):
    c, B, T = config_of(tiny_config), 2, 7
    params = {name: rng.normal(0, 0.4, shape) for name, shape in ref.param_shapes(c).items()}
    tokens, targets = rng.integers(0, c.vocab_size, (B, T)), rng.integers(0, c.vocab_size, (B, T))
    targets[0, 2:4] = targets[1, -1] = -1
    dlogprobs, dhidden = rng.normal(size=(B, T)), rng.normal(size=(B, T, c.n_embd))
    options = dict(starts=make_starts(kind, B, T), temperature=temperature)

    def objective(params):
        f = ref.transformer_forward(params, c, tokens, targets, **options)
        return (dlogprobs * f["logprobs"]).sum() + (dhidden * f["hidden"]).sum()

    grads = ref.transformer_backward(params, c, tokens, targets, dlogprobs, dhidden, **options)
    assert {name: g.shape for name, g in grads.items()} == ref.param_shapes(c)
    for name in params:
        check_derivative(lambda x, name=name: objective(params | {name: x}), params[name], grads[name], rng, 1, 2)


def test_a_target_of_minus_1_gives_logprob_0_and_no_gradient(rng, tiny_config):
    c, B, T = config_of(tiny_config), 2, 5
    params = {name: rng.normal(0, 0.4, shape) for name, shape in ref.param_shapes(c).items()}
    tokens, targets = rng.integers(0, c.vocab_size, (B, T)), np.full((B, T), -1)
    assert (ref.transformer_forward(params, c, tokens, targets)["logprobs"] == 0).all()
    grads = ref.transformer_backward(params, c, tokens, targets, rng.normal(size=(B, T)))
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("kind", ["packed", "ragged"])
def test_a_packed_document_equals_the_document_alone(rng, tiny_config, kind):
    c, B, T = config_of(tiny_config), 2, 12
    params = {name: rng.normal(0, 0.4, shape) for name, shape in ref.param_shapes(c).items()}
    tokens, starts = rng.integers(0, c.vocab_size, (B, T)), make_starts(kind, B, T)
    packed = ref.transformer_forward(params, c, tokens, tokens, starts)
    for b in range(B):
        first = starts[b, -1]  # the last document of the row
        alone = ref.transformer_forward(params, c, tokens[b : b + 1, first:], tokens[b : b + 1, first:])
        for name in ("hidden", "logits", "logprobs", "entropy"):
            np.testing.assert_allclose(packed[name][b, first:], alone[name][0], atol=1e-12)


# ---- truths that need no reference


def test_bf16_keeps_8_bits_and_rounds_ties_to_even():
    one = 2.0**-7  # the distance between neighbours above 1
    given = np.array([1 + one / 2, 1 + 1.5 * one, 1 + 0.49 * one, -1 - 0.51 * one, 3e38, 0.0, -0.0])
    want = np.array([1.0, 1 + 2 * one, 1.0, -1 - one, 3e38, 0.0, -0.0])
    np.testing.assert_array_equal(ref.bf16(given)[given < 1e38], want[given < 1e38])
    np.testing.assert_allclose(ref.bf16(given), want, rtol=2.0**-8)
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert (np.abs(ref.bf16(x) - x) <= 2.0**-8 * np.abs(x)).all() and (ref.bf16(ref.bf16(x)) == ref.bf16(x)).all()


def test_norms_of_a_row_that_is_already_normal():
    x = np.array([[1.0, -1.0, 1.0, -1.0]])
    out, mean, rstd = ref.layernorm_forward(x, np.full(4, 3.0), np.full(4, 0.5), eps=0.0)
    np.testing.assert_array_equal(out, 3 * x + 0.5)
    assert mean == 0 and rstd == 1
    np.testing.assert_array_equal(ref.rmsnorm_forward(x, np.full(4, 3.0), eps=0.0)[0], 3 * x)


def test_known_values_of_the_activations():
    x = np.array([-30.0, -1.0, 0.0, 1.0, 30.0])
    phi = 0.8413447460685429  # the normal distribution at 1
    np.testing.assert_allclose(ref.gelu_erf(x), [0, phi - 1, 0, phi, 30], atol=1e-15)
    np.testing.assert_allclose(ref.gelu_tanh(x), [0, phi - 1, 0, phi, 30], atol=3e-4)  # an approximation
    assert np.abs(ref.gelu_tanh(x) - ref.gelu_erf(x)).max() > 1e-5
    silu = ref.swiglu_forward(np.array([[0.0, math.log(3), 5.0, 2.0]]))  # sigmoid(log 3) = 3/4
    np.testing.assert_allclose(silu, [[0.0, 1.5 * math.log(3)]])


def test_rope_depends_on_the_distance_alone_and_leaves_values(rng):
    HS, T = 8, 30
    q, k, v = (np.tile(rng.normal(size=HS), (1, T, 1)) for _ in range(3))
    qkv = np.concatenate([q, k, v], -1)
    turned = ref.rope_forward(qkv, *ref.rope_tables(T, HS), 1, 1)
    scores = turned[0, :, :HS] @ turned[0, :, HS : 2 * HS].T
    for distance in range(5):
        np.testing.assert_allclose(np.diag(scores, -distance), scores[distance, 0], atol=1e-12)
    np.testing.assert_array_equal(turned[..., 2 * HS :], v)
    np.testing.assert_array_equal(turned[:, 0], qkv[:, 0])  # position 0 is not turned
    # with theta = 10,000 and 8 values the pairs (i, i + 4) turn by 1, 1/10, 1/100, 1/1000 radian a position
    for i, angle in enumerate([1, 0.1, 0.01, 0.001]):
        want = q[0, 0, i] * math.cos(7 * angle) - q[0, 0, i + 4] * math.sin(7 * angle)
        np.testing.assert_allclose(turned[0, 7, i], want)


def test_attention_with_equal_scores_is_the_running_mean(rng):
    B, T, HS = 1, 6, 4
    qkv = np.concatenate([np.zeros((B, T, HS)), rng.normal(size=(B, T, 2 * HS))], -1)
    out, lse, scores, probs = ref.attention_forward(qkv, 1, 1)
    np.testing.assert_allclose(out[0], np.cumsum(qkv[0, :, 2 * HS :], 0) / np.arange(1, T + 1)[:, None])
    np.testing.assert_allclose(lse[0, 0], np.log(np.arange(1, T + 1)))
    assert np.isneginf(scores[0, 0, 0, 1:]).all() and (probs[0, 0][np.triu_indices(T, 1)] == 0).all()
    window = ref.attention_forward(qkv, 1, 1, make_starts("window", B, T))[3][0, 0]
    assert (window > 0).sum(-1).tolist() == [1, 2, 3, 4, 5, 5]


def test_entropy_of_even_and_of_sure_distributions():
    logits = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 800.0, 0.0, 0.0]])
    logprobs, lse, entropy = ref.logprob_forward(logits, np.array([2, 1]))
    np.testing.assert_allclose(entropy, [math.log(4), 0.0], atol=1e-15)
    np.testing.assert_allclose(logprobs, [-math.log(4), 0.0], atol=1e-15)
    np.testing.assert_allclose(lse, [1 + math.log(4), 800.0])


def test_the_first_adamw_step_moves_by_lr_against_the_sign():
    w, g = np.array([1.0, -2.0, 3.0]), np.array([0.5, -7.0, 0.0])
    new, m, v = ref.adamw(w, np.zeros(3), np.zeros(3), g, 0.1, (0.9, 0.95), 0.0 + 1e-30, 0.0, step=1)
    np.testing.assert_allclose(new, w - 0.1 * np.sign(g))
    np.testing.assert_allclose(m, 0.1 * g)
    np.testing.assert_allclose(v, 0.05 * g**2)
    decayed, _, _ = ref.adamw(w, np.zeros(3), np.zeros(3), np.zeros(3), 0.1, (0.9, 0.95), 1e-8, 0.5, step=1)
    np.testing.assert_allclose(decayed, w * (1 - 0.1 * 0.5))


def test_clipping_brings_the_norm_down_to_max_norm():
    x = np.array([3.0, 0.0, 4.0, 12.0])
    sums = ref.square_sums(x, [0, 1, 1, 4])
    np.testing.assert_array_equal(sums, [9, 0, 160])
    assert ref.clip_scale(sums, 6.5) == (0.5, 13.0)
    assert ref.clip_scale(sums, 13.0) == (1.0, 13.0) and ref.clip_scale(sums, 0.0) == (1.0, 13.0)
    assert ref.clip_scale(np.zeros(2), 1.0) == (1.0, 0.0)

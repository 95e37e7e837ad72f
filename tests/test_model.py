"""The whole model: against the reference transformers, the promises that hold to the bit, and what a step leaves
behind.

The backend of a model is chosen when it is made, so every test that computes runs on each of them.
"""

import gc
import itertools
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import reference
from barelm import Config, Model, _core
from cases import make_starts
from conftest import GPT2, LLAMA, tiny_configs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import (
    MID,
    MIDDLE,
    TINY_BATCH,
    assert_all_same_bits,
    assert_same_bits,
    contents,
    copies,
    random_batch,
    random_floats,
    random_model,
    threads,
)

EPS = float(np.finfo(np.float32).eps)
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-9}  # the largest relative error of one rounding

# Descriptions that neither family has, beside those of conftest.py.
MIXED = {
    "layernorm, rope": GPT2 | dict(pos="rope", rope_theta=10000.0),
    "layernorm, rope, no bias, untied": GPT2 | dict(pos="rope", rope_theta=300.0, bias=False, tied=False),
    "layernorm, swiglu": GPT2 | dict(act="swiglu", n_inner=37),
    "rmsnorm, gelu": LLAMA | dict(act="gelu_tanh", n_inner=41),
    "rmsnorm, gelu erf, learned, bias": LLAMA | dict(act="gelu_erf", pos="learned", bias=True),
    "rmsnorm, swiglu, learned, tied": LLAMA | dict(pos="learned", tied=True, n_inner=7),
    "head size given": GPT2 | dict(n_head=3, n_kv_head=3, head_size=10, n_embd=17, n_inner=9),
    "one of everything": GPT2 | dict(n_layer=1, n_head=1, n_kv_head=1, n_embd=1, n_inner=1, vocab_size=2),
}
CONFIGS = tiny_configs | MIXED


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


@pytest.fixture(autouse=True)
def isa(backend, monkeypatch):
    monkeypatch.setenv("BARELM_ISA", backend)
    return backend


@pytest.fixture(params=UNIT)
def precision(request):
    return request.param


# ---- against the reference


def nearby(compute, params, arrays, unit):
    """compute(params, *arrays), and how far each of its results moves when every number that goes in is off by one
    rounding: the largest norm of three tries.  A kernel's own roundings spread through the same network."""
    exact, moved = compute(params, *arrays), {}
    for seed in range(3):
        shake = partial(shaken, np.random.default_rng(seed), unit)
        other = compute({name: shake(p) for name, p in params.items()}, *map(shake, arrays))
        for name, value in exact.items():
            moved[name] = max(moved.get(name, 0), np.linalg.norm(other[name] - value))
    return exact, moved


def shaken(rng, unit, a):
    return a * (1 + unit * rng.uniform(-1, 1, a.shape))


def assert_near(got, exact, moved, unit):
    """Each result in norm, and in direction: a wrong part of a large tensor hides in a norm.

    A result passes some 20 roundings a layer, here with one or two layers: their walk is 4 to 6 times one rounding;
    over all descriptions, backends and many seeds the largest was 4.2, so 8 is the bound.  Added to it is one
    rounding of the result itself, for what does not depend on the weights.  Moving all scores of a query alike changes
    nothing, so the gradient of the keys' bias is a sum that cancels to 0: its terms are those of the queries' bias."""
    for name, value in exact.items():
        result, size = got[name].astype(np.float64), np.linalg.norm(value)
        error, allowed = np.linalg.norm(result - value), 8 * moved[name] + 4 * unit * size
        if name.endswith("k_proj.bias"):
            allowed += 8 * moved[name.replace("k_proj.bias", "k_proj.weight")]
        assert error <= allowed, f"{name}: off by {error:.3g}, allowed are {allowed:.3g}, its norm is {size:.3g}"
        if moved[name] < 0.01 * size:  # else the direction is noise
            cosine = (result * value).sum() / (np.linalg.norm(result) * size)
            assert cosine > 1 - 64 * (moved[name] / size + unit) ** 2, f"{name}: cosine {cosine}"


@dataclass
class Case:
    """A model's description and a batch; what the reference says about them is worked out once for all backends."""

    config: dict
    precision: str
    B: int
    T: int
    starts_kind: str | None = None
    temperature: float = 1.0

    def __post_init__(self):
        self.tokens, self.targets = random_batch(self.config, self.B, self.T)
        self.starts = make_starts(self.starts_kind, self.B, self.T)
        self.dlogprobs = random_floats(self.B, self.T)
        self.dhidden = random_floats(self.B, self.T, self.config["n_embd"], seed=3)

    def doors(self):
        """The ways to call backward: (dlogprobs, dhidden)."""
        return (self.dlogprobs, self.dhidden), (self.dlogprobs, None), (None, self.dhidden)

    def answers(self):
        """(results, how far they move) of forward, of logits, and of backward through each door."""
        model, unit = random_model(self.config), UNIT[self.precision]
        params = {name: p.astype(np.float64) for name, p in model.params.items()}
        before, behind = (params, model.config, self.tokens, self.targets), (self.starts, self.temperature)

        def forward(params):
            f = reference.transformer_forward(params, *before[1:], *behind)
            shown = {name: f[name] for name in ("logprobs", "hidden", "entropy", "logits")}
            return shown | {"last": f["logits"][:, -1]}

        def backward(params, *arrays):
            return reference.transformer_backward(params, *before[1:], *arrays, *behind)

        yield nearby(forward, params, [], unit)
        for arrays in self.doors():
            whole = (self.dlogprobs, self.dhidden)
            zeros = [0.0 * w if a is None else a.astype(np.float64) for a, w in zip(arrays, whole, strict=True)]
            yield nearby(backward, params, zeros, unit)

    known: ClassVar[dict] = {}

    def expected(self):
        key = repr((self.config, self.precision, self.B, self.T, self.starts_kind, self.temperature))
        if key not in self.known:
            self.known[key] = list(self.answers())
        return self.known[key]


def check_against_reference(*args, **kwargs):
    case = Case(*args, **kwargs)
    model, unit = random_model(case.config, case.precision), UNIT[case.precision]
    forward, *backward = case.expected()
    ids, options = (case.tokens, case.targets), dict(temperature=case.temperature, starts=case.starts)
    got = dict(zip(("logprobs", "hidden", "entropy"), model.forward(*ids, True, True, **options), strict=True))
    got["logits"] = model.logits(case.tokens, last=False, starts=case.starts)
    got["last"] = model.logits(case.tokens, starts=case.starts)
    assert_near(got, *forward, unit)
    assert_same_bits(got["last"], got["logits"][:, -1])
    assert (got["logprobs"][case.targets < 0] == 0).all()

    for door, answer in zip(case.doors(), backward, strict=True):
        assert_same_bits(model.forward(*ids, **options), got["logprobs"])
        model.backward(*door)
        assert_near(model.grads, *answer, unit)
        model.update(lr=0, weight_decay=0)  # forget the gradients


def test_against_the_reference(config, precision):
    check_against_reference(config, precision, **TINY_BATCH, temperature=0.7)


@pytest.mark.parametrize("kind", ["packed", "ragged", "window"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "layernorm, rope"])
def test_starts_against_the_reference(family, kind, precision):
    check_against_reference(CONFIGS[family], precision, 2, 17, kind, temperature=1.6)


@pytest.mark.parametrize("family", MIDDLE)
def test_block_borders_against_the_reference(family, precision):
    """More rows than a chunk of the head (512), more keys than a block (64), more channels than a vector."""
    check_against_reference(MIDDLE[family] | dict(n_layer=1), precision, 4, 131)


def test_rope_scaling(monkeypatch):
    """Llama 3.1's stretched waves: short ones stay, long ones turn `factor` times slower, between them a blend."""
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=20)
    plain = reference.rope_tables

    def stretched(P, HS, theta):
        frequency = theta ** (-2 * np.arange(HS // 2) / HS)
        wavelength = 2 * np.pi / frequency
        keep = np.clip((20 / wavelength - 1.0) / (4.0 - 1.0), 0, 1)
        angles = np.arange(P)[:, None] * frequency * (keep + (1 - keep) / 8.0)
        return np.cos(angles), np.sin(angles)

    config = LLAMA | dict(head_size=16, n_layer=1, rope_theta=100.0)
    assert not np.allclose(stretched(9, 16, 100.0)[0], plain(9, 16, 100.0)[0])
    monkeypatch.setattr(reference, "rope_tables", stretched)
    check_against_reference(config | dict(rope_scaling=scaling), "fp32", 2, 19)


def test_trace_shows_the_reference(config):
    model = random_model(config)
    tokens, targets = random_batch(config, **TINY_BATCH)

    def forward(params):
        f = reference.transformer_forward(params, model.config, tokens, targets)
        names = {name: name.replace("layers.", "h.") for name in f}
        return {names[name]: f[name] for name in f if names[name] in trace}

    trace = model.trace(tokens)
    layered = ("residual", "ln_1", "attn.qkv", "attn.heads", "residual_mid", "ln_2", "mlp.fc", "mlp.act")
    assert set(trace) == {f"h.{n}.{name}" for n in range(model.config.n_layer) for name in layered} | {
        "residual_final",
        "hidden",
    }
    exact, moved = nearby(forward, {name: p.astype(np.float64) for name, p in model.params.items()}, [], UNIT["fp32"])
    assert exact.keys() == trace.keys()
    assert_near(trace, exact, moved, UNIT["fp32"])


def test_names_and_shapes_are_those_of_hugging_face(config):
    model = random_model(config)
    want = reference.param_shapes(model.config)
    assert {name: p.shape for name, p in model.params.items()} == want
    assert {name: p.shape for name, p in model.grads.items()} == want
    assert model.n_params == sum(int(np.prod(shape)) for shape in want.values())
    assert model.decayed == {name for name, shape in want.items() if len(shape) == 2}


# ---- promises that hold to the bit


def train(config, precision, B, T, kind=None, steps=2):
    """Log-probabilities, gradients and weights of a few steps: all that a step computes."""
    model, starts = random_model(config, precision), make_starts(kind, B, T)
    out = {}
    for step in range(steps):
        tokens, targets = random_batch(config, B, T, seed=step)
        out[f"logprobs {step}"] = model.forward(tokens, targets, starts=starts)
        model.backward(random_floats(B, T), random_floats(B, T, model.config.n_embd))
        model.forward_backward(tokens, targets, random_floats(B, T, seed=5), starts=starts)
        out |= {f"gradient {step} {name}": g.copy() for name, g in model.grads.items()}
        model.update(lr=0.01)
        out |= {f"weight {step} {name}": p.copy() for name, p in model.params.items()}
    return out


@pytest.mark.parametrize("family", MIDDLE)
def test_any_number_of_threads_gives_the_same_bits(family, precision):
    runs = []
    for n in (1, 2, 3, 8):
        with threads(n):
            runs.append(train(MIDDLE[family], precision, 3, 70, kind="packed"))
    for run in runs[1:]:
        assert_all_same_bits(run, runs[0])


@pytest.mark.parametrize("B", [1, 5])
def test_attention_on_few_heads_and_many_threads(B, precision):
    """Backward chooses between two ways to share attention out, by heads and threads: both have the same bits."""
    config = MIDDLE["llama"] | dict(n_layer=1)
    with threads(1):
        want = train(config, precision, B, 150, steps=1)
    with threads(16):
        assert_all_same_bits(train(config, precision, B, 150, steps=1), want)


hypothesis_settings = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
any_family = st.sampled_from([CONFIGS[name] for name in ("gpt2", "llama", "gpt2, odd sizes", "layernorm, rope")])
any_seed = st.integers(0, 2**32 - 1)
LONG = 150  # over two blocks of keys


def all_outputs(model, tokens, targets, starts=None):
    names = ("logprobs", "hidden", "entropy")
    out = dict(zip(names, model.forward(tokens, targets, True, True, 1.3, starts), strict=True))
    return out | {"logits": model.logits(tokens, last=False, starts=starts)}


@hypothesis_settings
@given(
    config=any_family,
    B=st.integers(2, 5),
    T=st.integers(1, LONG),
    kind=st.sampled_from([None, "packed", "ragged"]),
    seed=any_seed,
    data=st.data(),
)
def test_a_row_does_not_depend_on_its_batch(precision, config, B, T, kind, seed, data):
    config = config | dict(context=LONG)
    model, starts = random_model(config, precision, seed), make_starts(kind, B, T)
    tokens, targets = random_batch(config, B, T, seed)
    rows = data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=3))
    whole = all_outputs(model, tokens, targets, starts)
    part = all_outputs(model, tokens[rows], targets[rows], None if starts is None else starts[rows])
    for name in whole:
        assert_same_bits(part[name], whole[name][rows], name)


@hypothesis_settings
@given(
    config=any_family,
    B=st.integers(1, 3),
    T=st.integers(2, LONG),
    kind=st.sampled_from([None, "packed", "window"]),
    seed=any_seed,
    data=st.data(),
)
def test_a_prefix_does_not_depend_on_what_follows(precision, config, B, T, kind, seed, data):
    config = config | dict(context=LONG)
    model, starts = random_model(config, precision, seed), make_starts(kind, B, T)
    tokens, targets = random_batch(config, B, T, seed)
    k = data.draw(st.integers(1, T - 1))
    cut = [None if a is None else np.ascontiguousarray(a[:, :k]) for a in (tokens, targets, starts)]
    whole, prefix = all_outputs(model, tokens, targets, starts), all_outputs(model, *cut)
    for name in whole:
        assert_same_bits(prefix[name], whole[name][:, :k], name)


@hypothesis_settings
@given(config=any_family, lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), seed=any_seed)
def test_a_packed_document_equals_the_document_alone(precision, config, lengths, seed):
    """Positions and keys count from where the document starts; what stands before it leaves no trace."""
    config = config | dict(context=400)
    model = random_model(config, precision, seed)
    tokens, targets = random_batch(config, 1, sum(lengths), seed)
    begins = np.cumsum([0, *lengths])
    starts = np.repeat(begins[:-1], lengths)[None].astype(np.int32)
    packed = all_outputs(model, tokens, targets, starts)
    for begin, end in itertools.pairwise(begins):
        alone = all_outputs(model, tokens[:, begin:end].copy(), targets[:, begin:end].copy())
        for name in packed:
            assert_same_bits(packed[name][:, begin:end], alone[name], name)


@pytest.mark.parametrize("family", MIDDLE)
def test_starts_of_zero_are_no_starts(family, precision):
    B, T, results = 2, 67, []
    for starts in (None, np.zeros((B, T), np.int32)):
        model = random_model(MIDDLE[family], precision)
        tokens, targets = random_batch(MIDDLE[family], B, T)
        out = all_outputs(model, tokens, targets, starts)
        model.forward_backward(tokens, targets, random_floats(B, T), starts=starts)
        results.append(out | copies(model.grads))
    assert_all_same_bits(*results)


@pytest.mark.parametrize(("B", "T"), [(2, 9), (4, 150)], ids=["one chunk", "two chunks"])
@pytest.mark.parametrize("family", MIDDLE)
@pytest.mark.parametrize("kind", [None, "packed"])
def test_the_joint_path_equals_the_two_doors(family, kind, B, T, precision):
    """Negative weights, targets of -1, a second pass that adds to the first; 600 rows are more than a chunk of 512."""
    config, starts, results = MIDDLE[family], make_starts(kind, B, T), []
    for joint in (False, True):
        model = random_model(config, precision)
        out = {}
        for n in range(2):
            tokens, targets = random_batch(config, B, T, seed=n)
            weights = random_floats(B, T, seed=10 + n)
            assert (weights < 0).any() and (targets == -1).any()
            if joint:
                loss, logprobs = model.forward_backward(tokens, targets, weights, 0.8, starts, logprobs=True)
                assert loss == pytest.approx(-(weights.astype(np.float64) * logprobs).sum(), rel=1e-12)
                assert loss == model.forward_backward(tokens, targets, 0 * weights + weights, 0.8, starts)
            else:
                for _ in range(2):
                    logprobs = model.forward(tokens, targets, temperature=0.8, starts=starts)
                    model.backward(-weights)
            out[f"logprobs {n}"] = logprobs
        results.append(out | copies(model.grads))
    assert_all_same_bits(*results)


# The order of summation, part of the contract, can be seen where it counts most: 1 added to 2^24 is lost, a finished
# block of ones is not.


@pytest.mark.parametrize("op", ["linear_forward", "linear_backward_input", "linear_backward_weight"])
def test_a_product_adds_chains_of_the_contracts_length(isa, op, precision):
    block = {"fp32": 256, "bf16": 512}[precision]
    chain = block // 32 if op == "linear_backward_weight" else block
    K = 2 * block + 88
    a, b, out = np.ones(K, np.float32), np.ones(K, np.float32), np.empty((1, 1), np.float32)
    a[0], prec = 2.0**24, ("fp32", "bf16").index(precision)
    row, column = (a[None].copy(), b[None].copy()), (a[:, None].copy(), b[:, None].copy())
    if op == "linear_forward":
        _core.ops.linear_forward(isa, out, None, *row, 0, None, None, 0, prec, 1, K, 1)
    elif op == "linear_backward_input":
        _core.ops.linear_backward_input(isa, out, row[0], None, column[1], 0, None, 0, prec, 1, 1, K)
    else:
        _core.ops.linear_backward_weight(isa, out, None, *column, 0, prec, K, 1, 1)
    assert out[0, 0] == 2.0**24 + K - chain


def test_sums_over_rows_lose_nothing_between_blocks(isa, precision):
    """2^24 + 1 is 2^24 in float: a one in each of many blocks would be lost one by one."""
    prec, block, blocks, C = ("fp32", "bf16").index(precision), {"fp32": 64, "bf16": 128}[precision], 9, 3
    x, want = np.zeros((blocks * block, C), np.float32), 2.0**24 + blocks - 1
    x[::block] = 1
    x[0] = 2.0**24
    ones, tokens = np.ones((len(x), 1), np.float32), np.zeros((1, len(x)), np.int32)
    dweight, dbias, dwte = np.empty((C, 1), np.float32), np.zeros(C, np.float32), np.zeros((1, C), np.float32)
    _core.ops.linear_backward_weight(isa, dweight, dbias, x, ones, 0, prec, len(x), 1, C)
    _core.ops.embedding_backward(isa, dwte, None, x, tokens, None, 1, len(x), C, 1)
    dnorm, dnorm_bias = np.zeros(C, np.float32), np.zeros(C, np.float32)
    column, row = np.zeros(len(x), np.float32), np.ones(C, np.float32)
    _core.ops.layernorm_backward(isa, x * 0, dnorm, dnorm_bias, None, x, None, x * 0, row, column, column, len(x), C)
    for got in (dweight, dbias, dwte, dnorm_bias):
        assert (got == want).all()


@pytest.mark.parametrize("start", [0, 10, 64, 70])
def test_attention_adds_blocks_of_64_keys_counted_from_the_start(isa, start, precision):
    """Equal scores, so that each of the 128 keys weighs exactly 1/128."""
    HS, T = 2, start + 128
    qkv = np.zeros((1, T, 3 * HS), np.float32)
    qkv[0, :, 2 * HS :] = 1
    qkv[0, start, 2 * HS :] = 2.0**24
    starts = np.minimum(np.arange(T), start).astype(np.int32)[None]
    out, lse = np.empty((1, T, HS), np.float32), np.empty((1, 1, T), np.float32)
    _core.ops.attention_forward(isa, out, lse, qkv, starts, ("fp32", "bf16").index(precision), 1, T, 1, 1, HS)
    assert (out[0, -1] == (2.0**24 + 64) / 128).all()


# ---- gradients add up, and are forgotten


@pytest.mark.parametrize("family", MIDDLE)
def test_a_second_backward_adds(family, precision):
    """Finished sums are added: to the bit, but for a tied embedding, which has two parts."""
    config = MIDDLE[family]
    batches = [(*random_batch(config, 2, 33, seed=n), random_floats(2, 33, seed=n)) for n in range(2)]
    alone = []
    for batch in batches:
        model = random_model(config, precision)
        model.forward_backward(*batch)
        alone.append(copies(model.grads))
    both = random_model(config, precision)
    for batch in batches:
        both.forward_backward(*batch)
    for name, g in both.grads.items():
        want = alone[0][name] + alone[1][name]
        if model.config.tied and name == "wte.weight":
            np.testing.assert_allclose(g, want, rtol=0, atol=4 * EPS * np.abs(want).max())
        else:
            np.testing.assert_array_equal(g, want, err_msg=name)


@pytest.mark.parametrize("T", [8, 33, 70, 128, 500])
@pytest.mark.parametrize("family", MIDDLE)
def test_micro_batches_add_up_to_the_batch(family, precision, T):
    """The same rows in one batch or in two: only the order of a sum over the rows differs, and chains of 8 rows lose a
    few units in the last place of the tensor's largest entry, however many they are."""
    config, B = MIDDLE[family] | dict(context=512), 4
    tokens, targets = random_batch(config, B, T)
    weights = np.full((B, T), 1 / (B * T), np.float32)
    whole, parts = random_model(config, precision), random_model(config, precision)
    whole.forward_backward(tokens, targets, weights)
    for rows in (slice(0, 2), slice(2, 4)):
        parts.forward_backward(tokens[rows], targets[rows], weights[rows])
    for name, want in whole.grads.items():
        tolerance = 4 * np.spacing(np.abs(want).max())
        np.testing.assert_allclose(parts.grads[name], want, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("family", MIDDLE)
def test_what_backward_makes_again_is_what_forward_had(isa, family, precision):
    """All rows in one batch take more memory than forward keeps for backward, half of them do not.  In bf16 queries,
    keys and values are then kept as products read them."""
    if isa == "ref":
        pytest.skip("the plain backend always makes them again")
    config = MIDDLE[family] | dict(n_layer=8, n_embd=64, n_head=4, n_kv_head=4, n_inner=256, context=128)
    B, T = 56, 128
    tokens, targets = random_batch(config, B, T)
    weights = np.full((B, T), 1 / (B * T), np.float32)
    whole, parts = random_model(config, precision), random_model(config, precision)
    whole.forward_backward(tokens, targets, weights)
    for rows in (slice(0, B // 2), slice(B // 2, B)):
        parts.forward_backward(tokens[rows], targets[rows], weights[rows])
    row = [m.memory(rows, T)["activations"] / rows for m, rows in ((whole, B), (parts, B // 2))]
    assert row[0] < (0.8 if precision == "fp32" else 0.75) * row[1], row
    for name, want in whole.grads.items():
        tolerance = 4 * np.spacing(np.abs(want).max())
        np.testing.assert_allclose(parts.grads[name], want, rtol=0, atol=tolerance, err_msg=name)
    shown = whole.trace(tokens)
    for name, want in parts.trace(tokens[: B // 2]).items():
        read = reference.bf16(want) if precision == "bf16" and "qkv" in name else want
        np.testing.assert_array_equal(shown[name][: B // 2], read, err_msg=name)


@pytest.mark.parametrize("family", MIDDLE)
def test_gradients_read_as_zero_after_an_update(family):
    config = MIDDLE[family]
    model, batch = random_model(config), random_batch(config, 2, 20)
    assert all((g == 0).all() for g in model.grads.values())
    view = model.grads
    for _ in range(2):
        model.forward_backward(*batch, random_floats(2, 20))
        assert all((g != 0).any() for g in view.values())
        model.update(lr=0.01)
        assert all((g == 0).all() for g in view.values()), "a view that was taken before the update"
        assert all((g == 0).all() for g in model.grads.values())


def test_a_step_that_is_skipped_leaves_no_trace():
    """Nothing changes but the gradients, which read as zero; the next step is as if there had been none before it."""
    config = MIDDLE["gpt2"]
    batch, other = random_batch(config, 2, 20), random_batch(config, 2, 20, seed=5)
    skipping, plain = random_model(config), random_model(config)
    for model in (skipping, plain):
        model.forward_backward(*batch, random_floats(2, 20))
        norm = model.update(lr=0.01)
    before = contents(skipping)
    skipping.forward_backward(*other, random_floats(2, 20))
    assert skipping.update(lr=0.01, skip_above=norm / 1e6) > norm / 1e6
    assert_all_same_bits(contents(skipping), before)
    for model in (skipping, plain):
        model.forward_backward(*batch, random_floats(2, 20))
        norm = model.update(lr=0.01, skip_above=1e30)
    assert skipping.step == plain.step == 2
    assert_all_same_bits(contents(skipping), contents(plain))


@pytest.mark.parametrize("door", ["logprobs", "hidden", "joint"])
@pytest.mark.parametrize("family", MIDDLE)
def test_a_step_does_not_see_the_gradients_of_the_last(family, door):
    """Each step's first backward: as in a fresh model with the same weights; whether or not anybody looked at them."""
    config = MIDDLE[family]

    def backward(model, seed):
        tokens, targets = random_batch(config, 2, 20, seed=seed)
        if door == "joint":
            model.forward_backward(tokens, targets, random_floats(2, 20, seed=seed))
        else:
            model.forward(tokens, targets)
            dhidden = random_floats(2, 20, config["n_embd"], seed=seed)
            model.backward(*((random_floats(2, 20, seed=seed), None) if door == "logprobs" else (None, dhidden)))

    for looks in (False, True):
        model, fresh = random_model(config, seed=1), random_model(config, seed=2)
        if looks:
            assert model.grads
        model.forward_backward(*random_batch(config, 2, 20), random_floats(2, 20))
        model.update(lr=0.01)
        for name, p in fresh.params.items():
            p[...] = model.params[name]
        backward(model, 7)
        backward(fresh, 7)
        for name, g in fresh.grads.items():
            np.testing.assert_array_equal(model.grads[name], g, err_msg=name)


# ---- the update


@pytest.mark.parametrize("family", MIDDLE)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_adamw_against_the_reference(family, clip):
    """Two steps, so that the bias correction counts; decay on matrices alone.  Tolerance: some eight roundings of the
    weight, and as many of the step it takes, which is at most lr / c for Adam and lr * decay * weight for the decay."""
    config, lr, betas, eps, decay = MIDDLE[family], 0.01, (0.8, 0.97), 1e-6, 0.3
    model = random_model(config)
    state = {name: (p.astype(np.float64), np.zeros(p.shape), np.zeros(p.shape)) for name, p in model.params.items()}
    for step in (1, 2):
        model.forward_backward(*random_batch(config, 2, 20, seed=step), random_floats(2, 20, seed=step))
        grads = {name: g.astype(np.float64) for name, g in model.grads.items()}
        norm = model.update(lr, betas, eps, decay, clip)
        want = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm == pytest.approx(want, rel=1e-12) and want > 0.1
        scale = clip / want if clip else 1.0
        for name, (w, m, v) in state.items():
            matrix = w.ndim == 2
            w, m, v = state[name] = reference.adamw(w, m, v, grads[name], lr, betas, eps, decay * matrix, step, scale)
            tolerance = 8 * EPS * (np.abs(w).max() + lr * (5 + np.abs(w).max()))
            np.testing.assert_allclose(model.params[name], w, rtol=0, atol=tolerance, err_msg=name)
            np.testing.assert_allclose(model.moments[0][name], m, rtol=0, atol=8 * EPS * np.abs(m).max(), err_msg=name)
            np.testing.assert_allclose(model.moments[1][name], v, rtol=16 * EPS, atol=1e-36, err_msg=name)
        assert model.step == step and model.has_moments


def test_decay_acts_on_the_names_that_decay(config):
    """With gradients of zero an update is the decay alone."""
    model = random_model(config)
    before = copies(model.params)
    model.grads  # noqa: B018 (they exist, and are zero)
    assert model.update(lr=0.5, weight_decay=0.5) == 0.0
    for name, p in model.params.items():
        want = before[name] * np.float32(0.75) if name in model.decayed else before[name]
        np.testing.assert_allclose(p, want, rtol=2 * EPS, atol=0, err_msg=name)


@pytest.mark.parametrize("family", MIDDLE)
def test_the_padding_of_the_vocabulary_never_counts(family):
    """301 tokens lie in 320 rows.  The rest stays zero, or logits of tokens that do not exist would take part."""
    config = MIDDLE[family]
    model = random_model(config)
    head = "wte.weight" if model.config.tied else "lm_head.weight"
    table = np.lib.stride_tricks.as_strided(model.params[head], (320, config["n_embd"]))
    for step in range(3):
        model.forward_backward(*random_batch(config, 2, 20, seed=step), random_floats(2, 20))
        model.update(lr=0.1)
    assert (table[:301] != 0).any() and (table[301:] == 0).all()


@pytest.mark.parametrize("family", MIDDLE)
def test_it_overfits_one_batch(family, precision):
    config = CONFIGS[family]
    model = Model(Config(**config), seed=3, precision=precision)
    tokens, _ = random_batch(config, 2, 12)
    targets = np.roll(tokens, -1, 1)
    weights = np.full(tokens.shape, 1 / tokens.size, np.float32)
    losses = []
    for _ in range(80):
        losses.append(model.forward_backward(tokens, targets, weights))
        model.update(lr=0.02, weight_decay=0)
    assert losses[0] == pytest.approx(np.log(config["vocab_size"]), abs=0.2) and losses[-1] < 0.05


# ---- what a call leaves behind


def test_what_drops_the_kept_forward():
    config = CONFIGS["llama"]
    model, batch = random_model(config), random_batch(config, 2, 9)
    d = random_floats(2, 9)

    def no_backward():
        with pytest.raises(RuntimeError, match="backward: no forward pass is kept"):
            model.backward(d)

    no_backward()
    model.forward(*batch)
    model.logits(batch[0])
    no_backward()
    model.forward_backward(*batch, d)
    no_backward()
    model.forward(*batch)
    model.update(lr=0.1)
    no_backward()
    with pytest.raises(RuntimeError, match="update: there are no gradients"):
        model.update(lr=0.1)
    model.forward(*batch)
    model.backward(d)


def test_a_view_keeps_its_block_alive():
    views = []
    for what in ("params", "grads", "moments"):
        model = random_model(CONFIGS["gpt2"], seed=5)
        model.forward_backward(*random_batch(CONFIGS["gpt2"], 2, 9), random_floats(2, 9))
        model.moments  # noqa: B018 (allocate them)
        block = getattr(model, what)[0] if what == "moments" else getattr(model, what)
        views.append((block["h.1.mlp.c_fc.weight"], block["h.1.mlp.c_fc.weight"].copy()))
        del model, block
    gc.collect()
    others = [random_model(CONFIGS["gpt2"], seed=9) for _ in range(8)]  # would take the place of a freed block
    for view, want in views:
        assert_same_bits(view, want)
        view += 1  # and it can be written
    assert others


@pytest.mark.parametrize("family", ["gpt2", "gpt2, erf, no bias, untied", "llama", "llama, bias"])
def test_a_weight_that_is_not_finite_is_named(family):
    config = CONFIGS[family]
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    model = random_model(config)
    for name, p in model.params.items():
        kept = p.flat[0]
        for bad in (np.nan, np.inf):
            p.flat[0] = bad
            with pytest.raises(FloatingPointError, match=f"weights: {re.escape(name)} holds a value that is not fin"):
                model.forward(tokens, tokens)
            with pytest.raises(RuntimeError, match="no forward pass is kept"):
                model.backward(np.zeros((2, 5), np.float32))
        p.flat[0] = kept
    assert np.isfinite(model.forward(tokens, tokens)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_gradient_that_is_not_finite_is_named(family, bad):
    config = CONFIGS[family]
    model, batch = random_model(config), random_batch(config, 2, 9)
    for update in range(2):  # before there are moments, and with them
        for name in list(model.grads)[::3]:
            model.forward_backward(*batch, random_floats(2, 9))
            before = contents(model)
            model.grads[name].flat[-1] = bad
            with pytest.raises(FloatingPointError, match=f"the gradient of {re.escape(name)} is not finite"):
                model.update(lr=0.1)
            after = contents(model)
            for what in before:
                if what.startswith("gradient"):
                    assert (after[what] == 0).all(), what
                else:
                    assert_same_bits(after[what], before[what], what)
        model.forward_backward(*batch, random_floats(2, 9))
        model.update(lr=0.1)
        assert model.step == update + 1


# ---- memory

MEASURE = """
import os, sys
import numpy as np
from barelm import Config, Model, _core

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

_core.threads_set(1)
B, T, training = 8, 128, sys.argv[1] == "training"
warm = Model(Config(n_layer=1, n_head=1, n_embd=64, vocab_size=100, context=T))  # scratch, code, NumPy
tokens = np.zeros((B, T), np.int32)
warm.forward_backward(tokens, tokens, np.ones((B, T), np.float32)), warm.update(lr=0.1), warm.logits(tokens)
before = resident()
config = Config(n_layer=6, n_head=4, n_embd=256, vocab_size=8000, context=T)
model = Model(config)
if training:
    for _ in range(2):
        model.forward_backward(tokens, tokens, np.ones((B, T), np.float32))
        model.update(lr=0.1)
else:
    model.logits(tokens, last=False)
print(resident() - before, sum(model.memory(B, T, training).values()))
"""


@pytest.mark.parametrize("what", ["training", "inference"])
def test_memory_is_what_the_process_takes(isa, what):
    """Huge pages round each block up to 2 MB, and the working memory of the thread grows with the size of a product."""
    if not sys.platform.startswith("linux") or isa == "ref":
        pytest.skip("reads /proc, and takes a while on the plain backend")
    done = subprocess.run([sys.executable, "-c", MEASURE, what], capture_output=True, text=True, check=True, timeout=60)
    taken, said = map(int, done.stdout.split())
    assert 0.95 * said <= taken <= 1.1 * said + (24 << 20), f"{said >> 20} MB said, {taken >> 20} MB taken"


@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("B", [4, 16])
def test_memory_holds_what_backward_needs(isa, B, family):
    """Floats a token. A layer: what its block reads, queries, keys, values, heads, the residual stream between, the MLP
    before its function, and a few numbers; two norms and the MLP behind its function only where they take up to 64 MB,
    and never on the plain backend. The rest, where the logits are the most: the residual stream behind the layers,
    the hidden state, its gradient, and a few numbers."""
    L, c = 12, Config(**family | dict(n_layer=12, n_embd=768, n_inner=3072, n_head=12, vocab_size=50257, context=256))
    T, N = 64, B * 64
    keys = c.n_kv_head * c.head_size
    inner = c.n_inner * (2 if c.act == "swiglu" else 1)
    layer, again = 4 * c.n_embd + 2 * keys + inner, 2 * c.n_embd + c.n_inner
    assert (4 * N * L * again > 64 << 20) == (B == 16)
    kept = L * (layer + (again if B == 4 and isa != "ref" else 0)) + 3 * c.n_embd
    floor, slack = 4 * N * kept, 4 * N * (L * (c.n_head + 4) + 10) + 64 * 200  # each begins on 64 bytes
    memory = c.memory(B, T)
    assert floor <= memory["activations"] <= floor + slack
    assert memory["head"] == 4 * min(N, 512) * 50304


def refuses_quickly(call, message):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(MemoryError, match=message + r": \d+\.\d\d GiB needed, \d+\.\d\d GiB free"):
        call()
    assert time.monotonic() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KB


def test_a_model_beyond_memory_is_refused_quickly():
    huge = Config(n_layer=1000, n_head=128, n_embd=128 * 256, vocab_size=10**6)
    assert sum(huge.memory().values()) > 2**40
    refuses_quickly(lambda: Model(huge), "weights")


OVER = """
import os, threading, time
import numpy as np
from barelm import Config, Model, _core

def watch():
    while True:
        with open("/proc/self/statm") as f:
            if int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > 3 << 30:
                os._exit(3)
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
held = np.ones(1 << 30, np.uint8)
model, B, T = Model(Config(n_layer=200, n_head=4, n_embd=48, vocab_size=301, context=300)), 1, 300
while model.memory(B, T)["activations"] < _core.memory_available() + held.nbytes // 3:
    B += 1
tokens = np.zeros((B, T), np.int32)
try:
    model.forward(tokens, tokens)
except MemoryError as e:
    print(e)
"""


def test_memory_is_looked_at_before_it_is_taken(isa):
    """A little more than is free while the process holds 1 GB, so less than the machine has: many a system grants that,
    and ends the process once it is used.  The script ends itself long before."""
    if not sys.platform.startswith("linux") or isa != _core.backends()[0]:
        pytest.skip("reads /proc; once is enough")
    done = subprocess.run([sys.executable, "-c", OVER], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "activations of B = " in done.stdout, done


def test_a_batch_beyond_memory_is_refused_quickly():
    """The activations are refused; the model lives on."""
    config = MID | dict(n_layer=500, context=1 << 14)
    model = random_model(config)
    tokens = np.zeros((1 << 10, 1 << 14), np.int32)
    refuses_quickly(lambda: model.forward(tokens, tokens), "activations of B = 1024, T = 16384")
    with pytest.raises(RuntimeError, match="no forward pass is kept"):
        model.backward(np.zeros((1, 1), np.float32))
    small = tokens[:1, :5].copy()
    assert np.isfinite(model.forward(small, small)).all()

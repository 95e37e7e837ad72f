"""Adapters: their gradients against the dense layer's, what stays as it is while they are trained, weights held in bf16
and int8 beneath them, sessions on them, and PEFT's files.

tests/test_peers_lora.py holds them beside PEFT itself.
"""

import dataclasses
import json

import numpy as np
import pytest
from barelm import Config, Lora, Model, Session, checkpoint
from barelm.checkpoint import CheckpointError
from barelm.convert.source import Source
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    MIDDLE,
    assert_all_same_bits,
    assert_same_bits,
    copies,
    random_batch,
    random_floats,
    random_model,
    threads,
)

EPS = float(np.finfo(np.float32).eps)
SOME = {"gpt2": ("attn.c_attn", "c_fc"), "llama": ("q_proj", "v_proj", "down_proj")}
ERF = MIDDLE["gpt2"] | dict(act="gelu_erf")
CASES = {
    "gpt2, all": (MIDDLE["gpt2"], Lora(rank=5, alpha=7.0)),
    "gpt2, some": (ERF, Lora(rank=3, alpha=3.0, targets=SOME["gpt2"], rslora=True)),
    "gpt2, the last layer alone": (MIDDLE["gpt2"], Lora(rank=1, alpha=-2.0, targets=("mlp.c_proj",))),
    "llama, all": (MIDDLE["llama"], Lora(rank=5, alpha=7.0)),
    "llama, some": (MIDDLE["llama"], Lora(rank=17, alpha=16.0, targets=SOME["llama"])),
}
every_case = pytest.mark.parametrize("config, lora", CASES.values(), ids=CASES.keys())


def adapted(config, lora, precision="fp32", weights="fp32", seed=3):
    """A model with random weights, held so, and an adapter of which no part is zero."""
    plain = random_model(config, precision)
    model = plain
    if weights != "fp32":
        model = Model.empty(plain.config, precision, weights=weights)
        for name, p in plain.params.items():
            model.put(name, 0, np.ascontiguousarray(p.T if name in model.transposed else p))
    model.adapt(lora, seed=1)
    rng = np.random.default_rng(seed)
    for name, p in model.adapter_params.items():
        p[...] = rng.normal(0, 0.3 if ".lora_B." in name else p.shape[1] ** -0.5, p.shape)
    return model


def parts(model):
    """(weight's name, A, B, their names) of every adapted module."""
    for name, A in model.adapter_params.items():
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            yield name.replace(".lora_A.", "."), A, model.adapter_params[other], name, other


def dense(model):
    """A model without an adapter whose weights have what it adds, computed in float64."""
    plain = Model.empty(model.config, model.precision)
    for name, p in plain.params.items():
        p[...] = model.params[name]
    for weight, A, B, *_ in parts(model):
        added = model.adapter.scale * (B.astype(np.float64) @ A)
        plain.params[weight][...] += added.T if weight in model.transposed else added
    return plain


def weights_of(targets):
    return (np.float32(1 / np.count_nonzero(targets >= 0)) * (targets >= 0)).astype(np.float32)


# ---- the maths ----


@every_case
def test_gradients_are_those_of_the_dense_layer(config, lora, backend, monkeypatch):
    """W' = W + s B A, so dA = s B^T dW' and dB = s dW' A^T, where dW' is the gradient of a dense model.

    Both are fp32 and add up in another order; 2e-5 of a tensor's largest entry is seven times what was met (3e-6).  A
    wrong group, scale, transpose or a term that is left out is off by a share of 1.
    """
    monkeypatch.setenv("BARELM_ISA", backend)
    model = adapted(config, lora)
    tokens, targets = random_batch(config, 3, 70)
    loss = model.forward_backward(tokens, targets, weights_of(targets))
    plain = dense(model)
    assert plain.forward_backward(tokens, targets, weights_of(targets)) == pytest.approx(loss, rel=1e-6)
    grads, s, seen = model.grads, lora.scale, set()
    for weight, A, B, a, b in parts(model):
        dW = plain.grads[weight].astype(np.float64)
        dW = dW.T if weight in plain.transposed else dW
        for name, want in ((a, s * B.T @ dW), (b, s * dW @ A.T)):
            np.testing.assert_allclose(grads[name], want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=name)
            seen.add(name)
    assert seen == set(grads) == set(model.adapter_params)


@every_case
def test_it_begins_without_effect(config, lora):
    model = random_model(config)
    tokens, targets = random_batch(config, 2, 40)
    before = model.forward(tokens, targets)
    model.adapt(lora, seed=4)
    assert_same_bits(model.forward(tokens, targets), before)
    for _, A, B, *_ in parts(model):
        bound = A.shape[1] ** -0.5
        assert not B.any() and np.abs(A).max() <= bound
        assert A.std() == pytest.approx(bound / 3**0.5, rel=0.5)  # a uniform one's; of 16 values at least
    other = random_model(config)
    other.adapt(lora, seed=5)
    assert all((A != B).all() for A, B in zip(*([A for _, A, *_ in parts(m)] for m in (model, other)), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every_case
def test_forward_is_the_merged_model_within_rounding(config, lora, precision):
    """In fp32 the two differ by the order of sums: log-probabilities of a few nats, some tens of EPS each.  In bf16 the
    merged weight is rounded as a whole, the adapter's parts each for themselves: 2^-8 of what the adapter adds, and of
    the weights."""
    model = adapted(config, lora, precision)
    tokens, targets = random_batch(config, 2, 60)
    got, want = model.forward(tokens, targets), dense(model).forward(tokens, targets)
    np.testing.assert_allclose(got, want, rtol=0, atol=(300 * EPS if precision == "fp32" else 0.3))
    assert np.abs(got - random_model(config, precision).forward(tokens, targets)).max() > 0.5  # it does have an effect


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every_case
def test_same_bits_for_any_number_of_threads_and_batch(config, lora, precision):
    tokens, targets = random_batch(config, 3, 130)
    results = []
    for n in 1, 2, 5:
        model = adapted(config, lora, precision)
        with threads(n):
            loss = model.forward_backward(tokens, targets, weights_of(targets))
            grads = copies(model.grads)
            norm = model.update(1e-2)
            results.append({"loss": np.float32(loss), "norm": np.float32(norm)} | grads | copies(model.adapter_params))
            row = model.forward(tokens[1:2, :50].copy(), targets[1:2, :50].copy())
            assert_same_bits(row, model.forward(tokens, targets)[1:2, :50])
    for other in results[1:]:
        assert_all_same_bits(other, results[0])


@every_case
def test_micro_batches_add_up_to_the_batch(config, lora):
    """Within 4 units in the last place of a tensor's largest entry, as the gradients of weights do."""
    tokens, targets = random_batch(config, 4, 70)
    weights = weights_of(targets)
    model = adapted(config, lora)
    model.forward_backward(tokens, targets, weights)
    whole = copies(model.grads)
    model.update(0.0, skip_above=0)  # forgets them
    for half in (slice(0, 2), slice(2, 4)):
        model.forward_backward(tokens[half].copy(), targets[half].copy(), weights[half].copy())
    for name, g in model.grads.items():
        largest = np.abs(whole[name]).max()
        assert np.abs(g - whole[name]).max() <= 4 * np.spacing(largest), name


@every_case
def test_both_doors_give_the_same_bits(config, lora):
    tokens, targets = random_batch(config, 2, 50)
    weights, model = weights_of(targets), adapted(config, lora)
    model.forward_backward(tokens, targets, weights)
    joint = copies(model.grads)
    model.update(0.0, skip_above=0)
    model.forward(tokens, targets)
    model.backward(-weights)
    assert_all_same_bits(copies(model.grads), joint)
    model.update(0.0, skip_above=0)
    hidden = model.forward(tokens, targets, hidden=True)[1]
    model.backward(dhidden=random_floats(*hidden.shape))
    assert all(np.abs(g).max() > 0 for g in model.grads.values())


# ---- what is trained, and what is not ----


@every_case
def test_only_the_adapter_is_trained(config, lora):
    model = adapted(config, lora)
    before, added = copies(model.params), copies(model.adapter_params)
    tokens, targets = random_batch(config, 2, 50)
    losses = []
    for _ in range(8):
        losses.append(model.forward_backward(tokens, targets, weights_of(targets)))
        model.update(1e-2)
    assert losses[-1] < losses[0] - 0.1
    assert_all_same_bits(copies(model.params), before)
    assert all((p != added[name]).any() for name, p in model.adapter_params.items())
    assert set(model.moments[0]) == set(model.grads) == model.decayed == set(model.adapter_params)
    assert model.step == 8


def test_what_was_trained_before_is_given_up():
    config, lora = CASES["gpt2, all"]
    model = random_model(config)
    tokens, targets = random_batch(config, 2, 20)
    model.forward_backward(tokens, targets, weights_of(targets))
    model.update(1e-3)
    model.forward_backward(tokens, targets, weights_of(targets))
    model.adapt(lora)
    assert model.step == 0 and not model.has_moments
    with pytest.raises(RuntimeError, match="update: there are no gradients"):
        model.update(1e-3)
    with pytest.raises(RuntimeError, match="no forward pass is kept"):
        model.backward(np.zeros(tokens.shape, np.float32))
    assert not any(g.any() for g in model.grads.values())


def test_a_gradient_that_is_not_finite_is_named():
    config, lora = CASES["llama, all"]
    model = adapted(config, lora)
    tokens, targets = random_batch(config, 2, 20)
    model.forward_backward(tokens, targets, weights_of(targets))
    model.grads["layers.1.mlp.up_proj.lora_B.weight"][3, 1] = np.nan
    before = copies(model.adapter_params)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight"):
        model.update(1e-3)
    assert_all_same_bits(copies(model.adapter_params), before)


def test_a_weight_that_is_not_finite_is_named():
    config, lora = CASES["llama, all"]
    tokens, targets = random_batch(config, 2, 20)
    model = adapted(config, lora)
    model.adapter_params["layers.0.self_attn.k_proj.lora_A.weight"][0, 0] = np.inf
    with pytest.raises(FloatingPointError, match=r"layers\.0\.self_attn\.k_proj\.lora_A\.weight"):
        model.forward(tokens, targets)
    for held in "bf16", "int8":
        model = adapted(config, lora, weights=held)
        bad = np.full((1, config["n_embd"]), np.nan, np.float32)
        model.put("layers.1.self_attn.v_proj.weight", 2, bad)
        with pytest.raises(FloatingPointError, match=r"layers\.1\.self_attn\.v_proj\.weight"):
            model.forward(tokens, targets)


# ---- weights that are held in less ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("held", ["bf16", "int8"])
@every_case
def test_held_weights_give_the_bits_of_the_floats_they_stand_for(config, lora, held, precision):
    model = adapted(config, lora, precision, held)
    plain = Model.empty(model.config, precision)
    for name, p in plain.params.items():
        p[...] = model.params[name]
    plain.adapt(lora)
    for name, p in plain.adapter_params.items():
        p[...] = model.adapter_params[name]
    tokens, targets = random_batch(config, 2, 70)
    for m in (model, plain):
        m.forward_backward(tokens, targets, weights_of(targets))
    assert_all_same_bits(copies(model.grads), copies(plain.grads))
    assert model.update(1e-3) == plain.update(1e-3)
    assert_same_bits(model.forward(tokens, targets), plain.forward(tokens, targets))
    assert_same_bits(model.logits(tokens), plain.logits(tokens))


@pytest.mark.parametrize("held", ["bf16", "int8"])
def test_held_weights_alone_are_not_trained(held):
    model = Model(Config(**MIDDLE["gpt2"]), weights=held)
    tokens, targets = random_batch(MIDDLE["gpt2"], 2, 20)
    model.forward(tokens, targets)
    for call in (
        lambda: model.backward(np.zeros(tokens.shape, np.float32)),
        lambda: model.forward_backward(tokens, targets, weights_of(targets)),
        lambda: model.grads,
        lambda: model.moments,
    ):
        with pytest.raises(RuntimeError, match="held in less than fp32"):
            call()
    with pytest.raises(ValueError, match="read-only"):
        model.params["wte.weight"][0, 0] = 1


@pytest.mark.parametrize("family", MIDDLE)
def test_initial_weights_are_those_of_fp32_rounded(family):
    config = Config(**MIDDLE[family])
    plain, held = Model(config, seed=8), Model(config, seed=8, weights="bf16")
    for name, p in plain.params.items():
        bound = 0 if p.ndim == 1 or name == "wpe.weight" else 2.0**-8
        np.testing.assert_allclose(held.params[name], p, rtol=bound, atol=0, err_msg=name)


def test_rows_are_written_and_read_within_the_tensor():
    model = Model(Config(**MIDDLE["gpt2"]), weights="bf16")
    rows = np.ones((2, 48), np.float32)
    model.put("h.0.attn.c_attn.weight", 10, rows)
    assert (model.params["h.0.attn.c_attn.weight"][:, 10:12] == 1).all()
    for row, n in ((143, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"c_attn\.weight: has 144 rows"):
            model.put("h.0.attn.c_attn.weight", row, np.ones((n, 48), np.float32))
    with pytest.raises(ValueError, match="C is 47"):
        model.put("h.0.attn.c_attn.weight", 0, np.ones((2, 47), np.float32))
    with pytest.raises(KeyError, match="nothing"):
        model.put("nothing", 0, rows)


@pytest.mark.parametrize("held", ["fp32", "bf16", "int8"])
@every_case
def test_memory_is_what_was_foretold(config, lora, held):
    """Gradients and moments of the adapter alone, and the weights in their form.  Each tensor may end before the next
    begins on 64 bytes; the vocabulary is padded to 320 rows."""
    small, model = Config(**config).memory(2, 50, True, held, lora), adapted(config, lora)
    added = sum(4 * p.size for p in model.adapter_params.values())
    a_value = {"fp32": lambda n: 4 * n, "bf16": lambda n: 2 * n, "int8": lambda n: 68 * -(-n // 64)}[held]
    bytes_of_rows = {name: p.shape[::-1] if name in model.transposed else p.shape for name, p in model.params.items()}
    base = sum(
        shape[0] * a_value(shape[1]) if len(shape) == 2 and name != "wpe.weight" else 4 * model.params[name].size
        for name, shape in bytes_of_rows.items()
    )
    slack = 64 * (len(bytes_of_rows) + len(model.adapter_params)) + 2 * 19 * a_value(48)
    assert 0 <= small["weights"] - base - added < slack
    assert 0 <= small["gradients"] - added < 64 * len(model.adapter_params)
    assert small["moments"] == 2 * small["gradients"]


# ---- sessions ----


@pytest.mark.parametrize("precision, held", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "int8")])
@every_case
def test_a_session_has_the_bits_of_forward(config, lora, precision, held):
    model = adapted(config, lora, precision, held)
    tokens, targets = random_batch(config, 2, 100, untrained=0)
    want = model.forward(tokens, targets)
    session = Session(model, 400)
    rows = [session.add(), session.add()]
    at = 0
    for n in (1, 7, 1, 60, 1, 30):  # a token at a time, and prompts, of both rows
        session.step(rows, [row[at : at + n] for row in tokens])
        at += n
        assert_same_bits(session.logprobs(targets[:, at - 1]), want[:, at - 1])
    fork = session.fork(rows[0])[0]
    logits = session.step([fork, rows[1]], [[3], [4]])
    alone = Session(model, 400)
    row = alone.add()
    assert_same_bits(alone.step([row], [[*tokens[0], 3]])[0], logits[0])


def test_a_session_takes_an_adapter_that_came_later_and_its_updates():
    config, lora = CASES["llama, all"]
    model = random_model(config)
    session, ids = Session(model, 200), [1, 2, 3]
    session.step([session.add()], [ids])
    model.adapt(lora)
    tokens, targets = random_batch(config, 2, 30)
    for _ in range(2):
        model.forward_backward(tokens, targets, weights_of(targets))
        model.update(3e-2)
        logits = session.step([session.add()], [ids])
        assert_same_bits(logits, model.logits(np.array([ids], np.int32)))


# ---- files ----


@pytest.fixture
def base(tmp_path, request):
    config, lora = request.param
    random_model(config).save(tmp_path / "base")
    return tmp_path / "base", lora


both = pytest.mark.parametrize("base", [CASES["gpt2, some"], CASES["llama, all"]], ids=["gpt2", "llama"], indirect=True)


def trained(base, lora, steps=3, **options):
    model = Model.load(base, **options)
    model.adapt(lora, seed=2)
    tokens, targets = random_batch(model.config.to_dict(), 2, 40)
    for _ in range(steps):
        model.forward_backward(tokens, targets, weights_of(targets))
        model.update(1e-2)
    return model, tokens, targets


@pytest.mark.parametrize("held", ["fp32", "bf16"])
@both
def test_saved_and_loaded_it_goes_on_with_the_same_bits(base, held, tmp_path):
    folder, lora = base
    model, tokens, targets = trained(folder, lora, weights=held)
    model.save(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"}
    again = Model.load(tmp_path / "adapter", weights=held)
    assert again.step == 3 and again.adapter == dataclasses.replace(lora, targets=again.adapter.targets)
    for m in (model, again):
        m.forward_backward(tokens, targets, weights_of(targets))
        m.update(1e-2)
    assert_all_same_bits(copies(again.adapter_params), copies(model.adapter_params))
    assert_all_same_bits(copies(again.moments[1]), copies(model.moments[1]))


@both
def test_merged_it_is_one_model(base, tmp_path):
    """The folder of an adapter is read as one model by everything that reads weights; W + s B A is rounded once, so
    log-probabilities differ by some tens of EPS."""
    folder, lora = base
    model, tokens, targets = trained(folder, lora)
    model.save(tmp_path / "adapter", optimizer=False)
    checkpoint.write(checkpoint.open_weights(tmp_path / "adapter"), tmp_path / "merged")
    merged = Model.load(tmp_path / "merged")
    want = model.forward(tokens, targets)
    np.testing.assert_allclose(merged.forward(tokens, targets), want, rtol=0, atol=300 * EPS)
    assert np.abs(Model.load(folder).forward(tokens, targets) - want).max() > 0.01
    for name, p in dense(model).params.items():
        np.testing.assert_allclose(merged.params[name], p, rtol=0, atol=4 * EPS * np.abs(p).max(), err_msg=name)
    session = Session.load(tmp_path / "adapter", 64)
    row = session.add()
    assert_same_bits(session.step([row], [[1, 2, 3]]), merged.logits(np.array([[1, 2, 3]], np.int32)))


@both
def test_the_base_may_have_moved(base, tmp_path):
    folder, lora = base
    model, tokens, targets = trained(folder, lora)
    model.save(tmp_path / "adapter")
    folder.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: its base model .*base is no checkpoint here"):
        Model.load(tmp_path / "adapter")
    again = Model.load(tmp_path / "adapter", base=tmp_path / "moved")
    assert_same_bits(again.forward(tokens, targets), model.forward(tokens, targets))
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "state.json").unlink()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(described | {"base_model_name_or_path": "../moved"})
    )
    assert_same_bits(Model.load(tmp_path / "adapter").forward(tokens, targets), model.forward(tokens, targets))


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED = {
    "another method": (dict(peft_type="IA3"), "peft_type: is 'IA3'"),
    "DoRA": (dict(use_dora=True), "use_dora: is True, which is not supported"),
    "biases": (dict(bias="all"), "bias: is 'all'"),
    "other ranks": (dict(rank_pattern={"q_proj": 4}), "rank_pattern"),
    "another rank": (dict(r=4), r"lora_A\.weight has shape \(5, "),
    "no rank": (dict(r=0), "rank: is 0"),
    "a rank that is none": (dict(r="8"), "rank: is '8'"),
    "alpha": (dict(lora_alpha=float("inf")), "alpha: is inf"),
    "no base": (dict(base_model_name_or_path=None), "base_model_name_or_path is missing"),
}


@pytest.mark.parametrize("changes, says", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("base", [CASES["llama, all"]], ids=["llama"], indirect=True)
def test_what_is_not_supported_is_refused_by_name(base, tmp_path, changes, says):
    folder, lora = base
    trained(folder, lora, steps=1)[0].save(tmp_path / "adapter")
    (tmp_path / "adapter" / "state.json").unlink()
    edit(tmp_path / "adapter", **changes)
    with pytest.raises(CheckpointError, match=says):
        Model.load(tmp_path / "adapter")


@pytest.mark.parametrize("base", [CASES["llama, all"]], ids=["llama"], indirect=True)
def test_an_adapter_for_another_model_is_refused(base, tmp_path):
    folder, lora = base
    trained(folder, lora, steps=1)[0].save(tmp_path / "adapter")
    random_model(MIDDLE["llama"] | dict(n_layer=1)).save(tmp_path / "shallow")
    random_model(MIDDLE["llama"] | dict(n_inner=80)).save(tmp_path / "wide")
    random_model(MIDDLE["gpt2"]).save(tmp_path / "gpt2")
    for other, says in {
        "shallow": "layers.1",
        "wide": r"has shape \(5, 75\)",
        "gpt2": "adapts .*must be of attn",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            Model.load(tmp_path / "adapter", base=tmp_path / other)


@pytest.mark.parametrize("base", [CASES["gpt2, all"]], ids=["gpt2"], indirect=True)
def test_an_altered_adapter_is_noticed(base, tmp_path):
    folder, lora = base
    trained(folder, lora, steps=1)[0].save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: was altered"):
        Model.load(tmp_path / "adapter")


# ---- arguments ----


def test_fields_that_cannot_be_are_named():
    for fields, says in (
        (dict(rank=0), "rank: is 0"),
        (dict(rank=2.0), "rank: is 2.0"),
        (dict(rank=1 << 17), "rank: is 131072"),
        (dict(alpha=0), "alpha: is 0"),
        (dict(alpha=float("nan")), "alpha: is nan"),
        (dict(alpha=10**400), "alpha: is 1000"),
        (dict(targets=()), r"targets: is \(\)"),
        (dict(targets=("",)), "targets"),
        (dict(rslora=1), "rslora: is 1"),
    ):
        with pytest.raises(ValueError, match=says):
            Lora(**fields)
    model = Model(Config(**MIDDLE["llama"]))
    with pytest.raises(ValueError, match=r"targets: there is no 'c_attn', but self_attn\.q_proj"):
        model.adapt(Lora(targets=("c_attn",)))
    with pytest.raises(ValueError, match="targets: there is no 'proj'"):  # the end of a name, not of a word
        model.adapt(Lora(targets=("proj",)))
    with pytest.raises(TypeError, match=r"lora: is dict, must be barelm\.Lora"):
        model.adapt({})
    with pytest.raises(ValueError, match="seed: is -1"):
        model.adapt(Lora(), seed=-1)
    assert model.adapter is None and not model.adapter_params
    with pytest.raises(ValueError, match="weights: is 'fp8', must be one of 'fp32', 'bf16', 'int8'"):
        Model(Config(**MIDDLE["llama"]), weights="fp8")
    model.adapt(Lora())
    with pytest.raises(RuntimeError, match="has an adapter already"):
        model.adapt(Lora())
    with pytest.raises(ValueError, match="has an adapter; save it"):
        Source.of_model(model)
    with pytest.raises(ValueError, match="base model has no folder"):
        model.save("nowhere")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["q_proj", "k_proj", "self_attn.v_proj", "o_proj", "gate_proj", "mlp.up_proj"]), min_size=1
    )
)
def test_targets_are_ends_of_names_in_the_order_of_the_model(targets):
    config = Config(**MIDDLE["llama"])
    found = Lora(targets=targets).modules(config)
    assert {m.rpartition(".")[2] for m in found} == {t.rpartition(".")[2] for t in targets}
    known = Lora().modules(config)
    assert found == [m for m in known if m in found]


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 20),
    n_embd=st.sampled_from([4, 8, 20]),
    heads=st.sampled_from([(2, 1), (2, 2), (4, 2)]),
    T=st.integers(1, 9),
    data=st.data(),
)
def test_any_size_works(rank, n_embd, heads, T, data):
    """A step on a tiny model of any shape, with an adapter wider than the layer too: loss and norm are finite and the
    adapter moves."""
    config = dict(
        n_layer=1,
        n_head=heads[0],
        n_kv_head=heads[1],
        n_embd=n_embd,
        n_inner=data.draw(st.integers(1, 30)),
        vocab_size=7,
        context=16,
        head_size=data.draw(st.sampled_from([2, 6])),
        norm="rmsnorm",
        act="swiglu",
        pos="rope",
        bias=False,
    )
    known = Lora().modules(Config(**config))
    targets = data.draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
    model = adapted(
        config, Lora(rank=rank, targets=targets), weights=data.draw(st.sampled_from(["fp32", "bf16", "int8"]))
    )
    before = copies(model.adapter_params)
    tokens, targets = random_batch(config, 2, T, untrained=0)
    model.forward_backward(tokens, targets, weights_of(targets))
    assert np.isfinite(model.update(1e-2))
    assert any((p != before[name]).any() for name, p in model.adapter_params.items())

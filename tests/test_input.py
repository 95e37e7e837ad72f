"""Every bad argument of the public API: an exception that names the argument (and the letter), and nothing has changed.

Each table holds (what is wrong, call, exception, what its message must say).
"""

import re
import subprocess
import sys

import numpy as np
import pytest
from barelm import Config, Model, _core
from conftest import GPT2, LLAMA
from models import assert_all_same_bits, contents, random_batch, random_floats, random_model

CONFIG = LLAMA | dict(context=16, vocab_size=11)
B, T, C, V = 2, 4, CONFIG["n_embd"], CONFIG["vocab_size"]
OK = np.zeros((B, T), np.int32)
FLOATS = np.zeros((B, T), np.float32)
HIDDEN = np.zeros((B, T, C), np.float32)


def with_value(value, b, t):
    a = OK.copy()
    a[b, t] = value
    return a


def bad_arrays(name, good, letters, whose):
    """What can be wrong with the type and shape of any array."""
    n = good.ndim
    other = np.int64 if good.dtype == np.int32 else np.float64
    wrong_order = np.zeros(good.shape[::-1], good.dtype).T
    strided = np.repeat(good, 2, axis=-1)[..., ::2]
    yield f"{name}: dtype", good.astype(other), TypeError, f"{name}: dtype is {np.dtype(other)}, must be {good.dtype}"
    yield f"{name}: byte order", good.astype(good.dtype.newbyteorder()), TypeError, f"{name}: dtype is >"
    yield f"{name}: a list of words", [["a"]], TypeError, f"{name}: "
    yield f"{name}: dimensions", good[0], ValueError, f"{name}: has {n - 1} dimensions, must have {n} ({letters})"
    yield f"{name}: too many", good[None], ValueError, f"{name}: has {n + 1} dimensions, must have {n} ({letters})"
    yield f"{name}: Fortran order", wrong_order, ValueError, f"{name}: must be C-contiguous"
    yield f"{name}: strided", strided, ValueError, f"{name}: must be C-contiguous"
    if whose:
        for axis, letter in enumerate(letters.split(", ")):
            size = good.shape[axis]
            longer = np.concatenate([good, np.take(good, [0], axis)], axis)
            shorter = np.ascontiguousarray(np.take(good, range(size - 1), axis))
            for wrong in (longer, shorter):
                says = f"{name}: {letter} is {wrong.shape[axis]}, {whose} has {size}"
                yield f"{name}: {letter} = {wrong.shape[axis]}", wrong, ValueError, says


def bad_tokens():
    yield from bad_arrays("tokens", OK, "B, T", None)
    for what, shape in (("no rows", (0, T)), ("no columns", (B, 0))):
        yield f"tokens: {what}", np.zeros(shape, np.int32), ValueError, f"tokens: shape {shape} is empty"
    yield "tokens: T", np.zeros((1, 17), np.int32), ValueError, "tokens: T is 17, the model's context is 16"
    for value, b, t in ((V, 1, 2), (-1, 0, 3), (2**31 - 1, 0, 0), (-(2**31), 1, 3)):
        says = f"tokens: value {value} at [{b}, {t}] is outside [0, {V})"
        yield f"tokens: {value}", with_value(value, b, t), ValueError, says


def bad_targets():
    yield from bad_arrays("targets", OK, "B, T", "tokens")
    for value, b, t in ((V, 1, 0), (-2, 0, 1), (2**31 - 1, 1, 3), (-(2**31), 0, 0)):
        says = f"targets: value {value} at [{b}, {t}] is outside [-1, {V})"
        yield f"targets: {value}", with_value(value, b, t), ValueError, says


def bad_starts():
    yield from bad_arrays("starts", OK, "B, T", "tokens")
    for value, b, t in ((1, 1, 0), (3, 0, 2), (-1, 1, 3), (2**31 - 1, 0, 3)):
        says = f"starts: value {value} at [{b}, {t}] is outside [0, t]"
        yield f"starts: {value}", with_value(value, b, t), ValueError, says


def calls():
    """Everything a model can be asked."""
    for what, a, error, says in bad_tokens():
        same = np.zeros(np.shape(a) if np.ndim(a) == 2 else (1, 1), np.int32)
        yield f"forward {what}", lambda m, a=a, same=same: m.forward(a, same), error, says
        yield (
            f"forward_backward {what}",
            lambda m, a=a, same=same: m.forward_backward(a, same, same.astype(np.float32)),
            error,
            says,
        )
        yield f"logits {what}", lambda m, a=a: m.logits(a), error, says
    for what, a, error, says in bad_targets():
        yield f"forward {what}", lambda m, a=a: m.forward(OK, a), error, says
        yield f"forward_backward {what}", lambda m, a=a: m.forward_backward(OK, a, FLOATS), error, says
    for what, a, error, says in bad_starts():
        yield f"forward {what}", lambda m, a=a: m.forward(OK, OK, starts=a), error, says
        yield f"forward_backward {what}", lambda m, a=a: m.forward_backward(OK, OK, FLOATS, starts=a), error, says
        yield f"logits {what}", lambda m, a=a: m.logits(OK, starts=a), error, says
        yield f"trace {what}", lambda m, a=a: m.trace(OK, starts=a), error, says
    for what, a, error, says in bad_arrays("weights", FLOATS, "B, T", "tokens"):
        yield f"forward_backward {what}", lambda m, a=a: m.forward_backward(OK, OK, a), error, says
    for what, a, error, says in bad_arrays("dlogprobs", FLOATS, "B, T", "the last forward"):
        yield f"backward {what}", lambda m, a=a: m.backward(a), error, says
    for what, a, error, says in bad_arrays("dhidden", HIDDEN, "B, T, C", "the last forward"):
        yield f"backward {what}", lambda m, a=a: m.backward(FLOATS, a), error, says
        yield f"backward alone {what}", lambda m, a=a: m.backward(dhidden=a), error, says
    yield "backward nothing", lambda m: m.backward(), ValueError, "dlogprobs and dhidden: one of them must be given"

    for value in (0, 0.0, -1.0, np.nan, np.inf, -np.inf):
        says = "temperature: must be finite and above 0"
        yield f"forward temperature {value}", lambda m, x=value: m.forward(OK, OK, temperature=x), ValueError, says
        yield (
            f"forward_backward temperature {value}",
            lambda m, x=value: m.forward_backward(OK, OK, FLOATS, temperature=x),
            ValueError,
            says,
        )
    yield "forward temperature text", lambda m: m.forward(OK, OK, temperature="hot"), TypeError, "temperature"

    for name, low in {"lr": 0.0, "eps": 1e-30, "weight_decay": 0.0, "clip": 0.0}.items():
        for value in (-1.0, -1e-30, np.nan, np.inf, -np.inf):
            yield (
                f"update {name} {value}",
                lambda m, n=name, x=value: m.update(**(dict(lr=0.1) | {n: x})),
                ValueError,
                f"{name}: is {float(value)}, must be in [{low}, 1e+30]",
            )
    for i in (0, 1):
        for value in (-0.1, 1.0, 2, np.nan, np.inf):
            betas = [0.9, 0.9]
            betas[i] = value
            yield (
                f"update betas[{i}] {value}",
                lambda m, b=tuple(betas): m.update(lr=0.1, betas=b),
                ValueError,
                f"betas[{i}]: is {float(value)}, must be in [0.0, 0.9999999]",
            )
    yield "step -1", lambda m: setattr(m, "step", -1), ValueError, "step: is -1, must be an int in [0, 2^63)"

    for value in (-1, 2**64, 1.5, "1", None):
        yield f"seed {value!r}", lambda _, x=value: Model(Config(**CONFIG), seed=x), ValueError, f"seed: is {value!r}, "
    yield "precision", lambda _: Model(Config(**CONFIG), precision="fp16"), ValueError, "precision: is 'fp16', must be"
    yield "device", lambda _: Model(Config(**CONFIG), device="gpu:7"), ValueError, "device: is 'gpu:7'"
    yield "config", lambda _: Model(CONFIG), TypeError, "config: is dict, must be barelm.Config"
    yield "threads", lambda _: _core.threads_set(-3), ValueError, "threads: is -3, must be at least 1"


TABLE = list(calls())


@pytest.fixture(scope="module")
def model():
    model = random_model(CONFIG)
    model.forward_backward(*random_batch(CONFIG, B, T), random_floats(B, T))
    model.update(lr=0.01)
    model.forward_backward(*random_batch(CONFIG, B, T), random_floats(B, T))
    model.forward(OK, OK)  # a forward pass that every call finds, and that no failing one may drop
    return model


@pytest.mark.parametrize(("call", "error", "says"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_bad_argument_is_named_and_changes_nothing(model, call, error, says):
    before = contents(model)
    with pytest.raises(error, match=re.escape(says)):
        call(model)
    assert_all_same_bits(contents(model), before)


def test_the_model_works_after_all_of_them(model):
    """The last test of the table's model: the pass that came before it is still kept, and the answers are right."""
    twin = random_model(CONFIG)
    for name, p in twin.params.items():
        p[...] = model.params[name]
    before = {name: g.copy() for name, g in model.grads.items()}
    for _, call, *_ in TABLE:
        with pytest.raises((TypeError, ValueError)):
            call(model)
    model.backward(random_floats(B, T))
    assert (twin.forward(OK, OK) == model.forward(OK, OK)).all()
    twin.backward(random_floats(B, T))
    for name, g in twin.grads.items():
        np.testing.assert_array_equal(model.grads[name], before[name] + g, err_msg=name)


@pytest.mark.parametrize("options", [dict(lr=1e39), dict(weight_decay=1e39), dict(eps=0), dict(eps=1e-60)], ids=str)
def test_an_update_never_makes_weights_that_are_not_finite(options):
    """Refused, or carried out; never a model full of NaN without a word.  eps = 0 divides 0 by 0 wherever a gradient
    has always been 0, as in the vocabulary's padding."""
    model = random_model(CONFIG)
    model.forward_backward(OK, OK, FLOATS + 1)
    try:
        model.update(**(dict(lr=0.1) | options))
    except ValueError as e:
        assert next(iter(options)) in str(e)
    assert all(np.isfinite(p).all() for p in model.params.values())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: m.update(lr=0.1, betas=(0.9,)), "betas"),
        (lambda m: m.update(lr=0.1, betas=0.5), "betas"),
        (lambda m: setattr(m, "step", 2**63), "step"),
        (lambda m: setattr(m, "step", 1.5), "step"),
        (lambda m: m.update(lr=10**400), "lr"),
        (lambda _: Config(norm_eps="small"), "norm_eps"),
        (lambda _: Config(rope_theta=None), "rope_theta"),
        (lambda _: Config(rope_scaling=5), "rope_scaling"),
        (lambda _: Config(head_size=True), "head_size"),
        (lambda _: Config(n_inner=True), "n_inner"),
        (lambda _: Config.preset(["gpt2"]), "preset"),
        (lambda _: Config(n_layer=1).memory(B=-1), "B"),
        (lambda _: Config(n_layer=1).memory(T=-5), "T"),
        (lambda _: Config(n_layer=1).memory(device="gpu"), "device"),
        (lambda _: Config(n_layer=1).memory(precision="fp64"), "precision"),
    ],
)
def test_errors_name_the_argument_first(model, call, name):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
        call(model)


def test_a_backend_that_is_not_there(monkeypatch):
    monkeypatch.setenv("BARELM_ISA", "sse9")
    with pytest.raises(ValueError, match="BARELM_ISA: is 'sse9', must be one that this build has"):
        Model(Config(**CONFIG))


# ---- configs

SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=20)
SIZES = ("n_layer", "n_head", "n_kv_head", "head_size", "n_embd", "n_inner", "vocab_size", "context")
BAD_FIELDS = [
    *((name, value) for name in SIZES for value in (0, -1, 2**31, 2.0, "2")),
    *((name, True) for name in SIZES if name not in ("head_size", "n_inner")),
    *((name, None) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "context")),
    *(("norm", value) for value in ("batchnorm", None, [])),
    *(("act", value) for value in ("relu", None, "GELU_TANH")),
    *(("pos", value) for value in ("alibi", None, 1)),
    *((name, value) for name in ("bias", "tied") for value in (1, 0, None, "yes")),
    *(("norm_eps", value) for value in (0, -1e-5, 1, np.nan, np.inf, 10**400)),
    *(("rope_theta", value) for value in (0, -1.0, np.nan, np.inf, 10**400)),
    ("rope_scaling", {}),
    *(("rope_scaling", {k: v for k, v in SCALING.items() if k != missing}) for missing in SCALING),
    *(
        ("rope_scaling", SCALING | bad)
        for bad in (
            dict(rope_type="yarn"),
            dict(factor=0),
            dict(factor=np.nan),
            dict(high_freq_factor=1.0),
            dict(low_freq_factor=-1.0),
        )
    ),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=str)
def test_a_bad_field_of_config(name, value):
    with pytest.raises(ValueError, match=f"^{name}: is "):
        Config(**(GPT2 | dict(head_size=8) | {name: value}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(n_head=4, n_kv_head=3), "n_kv_head: is 3, must divide n_head 4"),
        (dict(n_head=4, n_kv_head=8), "n_kv_head: is 8, must divide n_head 4"),
        (dict(n_head=5, n_embd=16), "n_embd: is 16, must be a multiple of n_head 5, or head_size be given"),
        (dict(head_size=7, pos="rope"), "head_size: is 7, must be even with pos='rope'"),
        (dict(n_head=1 << 16, n_kv_head=1 << 16, head_size=1 << 15), "head_size: is 32768, is too large"),
        (dict(n_inner=1 << 30), "n_inner: is 1073741824, is too large"),
    ],
)
def test_fields_of_config_that_do_not_go_together(fields, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Config(**(dict(n_layer=1) | fields))


def test_unknown_names():
    with pytest.raises(TypeError, match="n_layers"):
        Config(n_layers=3)
    with pytest.raises(ValueError, match="preset: is 'gpt5', must be one of gpt2, "):
        Config.preset("gpt5")
    with pytest.raises(ValueError, match="preset: unknown field 'n_layers'"):
        Config.preset("gpt2", n_layers=3)
    assert Config.preset("gpt2", n_layer=3).n_layer == 3


def test_config_cannot_be_changed():
    config = Config(rope_scaling=SCALING)
    with pytest.raises(AttributeError):
        config.n_layer = 3
    with pytest.raises(TypeError):
        config.rope_scaling["factor"] = 1.0
    assert Config(**config.to_dict()) == config


@pytest.mark.parametrize("how", ["import barelm", "import barelm.__main__ as m; m.main(['--help'])"])
def test_importing_does_nothing(how):
    """No library is loaded, so no thread started and no file read, before something is used."""
    code = f"import sys\n{how}\nprint({{'numpy', 'tiktoken', 'rich', 'barelm._core'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stdout + done.stderr

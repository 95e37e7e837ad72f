"""Checkpoint folders as others write them: in shards, in bfloat16 or half precision, pickled."""

import json
import re

import numpy as np
import pytest
from barelm import Config, Model, Session, Tokenizer, checkpoint
from barelm.checkpoint import CheckpointError, Weights
from barelm.convert import safetensors_file as st
from barelm.convert.numbers import KINDS, from_float32, n_bytes, to_float32
from barelm.convert.source import Source
from conftest import GPT2, LLAMA
from hypothesis import given, settings
from hypothesis import strategies as stg
from models import assert_all_same_bits, assert_same_bits, copies, random_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

INDEX = "model.safetensors.index.json"


def write(model, folder, tokenizer=None, **options):
    return checkpoint.write(Source.of_model(model, tokenizer), folder, **options)


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    return random_model({"gpt2": GPT2, "llama": LLAMA}[request.param])


# ---- numbers


def test_bf16_is_the_upper_half_rounded_to_even():
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20), 3.4e38, np.inf, -np.inf, 1e-40], np.float32)
    want = [0x3F80, 0x3F80, 0x3F82, 0xBF81, 0x7F80, 0x7F80, 0xFF80, 0x0001]
    assert from_float32(values, "BF16").tolist() == want
    nan = from_float32(np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32), "BF16")
    assert np.isnan(to_float32(nan, "BF16")).all()


@settings(deadline=None)
@given(stg.lists(stg.integers(0, 2**16 - 1), min_size=1), stg.sampled_from(["BF16", "F16"]))
def test_what_a_kind_can_hold_comes_back(bits, kind):
    units = np.array(bits, np.uint16).view(KINDS[kind].unit)
    values = to_float32(units, kind)
    back = from_float32(values, kind)
    assert ((back == units) | np.isnan(values)).all()


def test_q8_0_is_within_half_a_step():
    values = np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32)
    values[1, :32] = 0
    back = to_float32(from_float32(values, "Q8_0"), "Q8_0")
    step = np.abs(values.reshape(3, 3, 32)).max(-1, keepdims=True) / 127
    assert back.shape == values.shape and (back[1, :32] == 0).all()
    assert (np.abs((back - values).reshape(3, 3, 32)) <= step * (0.5 + 127 * 2**-11)).all()  # the scale is an F16
    assert from_float32(values, "Q8_0").nbytes == n_bytes(values.shape, "Q8_0") == 9 * 34


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_what_is_too_large_is_refused(kind):
    with pytest.raises(ValueError, match=f"1e\\+08 is too large for {kind}"):
        from_float32(np.full(32, 1e8, np.float32), kind)


# ---- what others write


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_folder_in_each_dtype(model, tmp_path, kind):
    assert write(model, tmp_path / "a", dtype=kind) == ["model.safetensors"]
    with safe_open(tmp_path / "a" / "model.safetensors", framework="np") as file:  # the package's own checks
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {kind}  # noqa: SIM118
    loaded = Model.load(tmp_path / "a")
    want = {name: to_float32(from_float32(p, kind), kind) for name, p in model.params.items()}
    assert_all_same_bits(copies(loaded.params), want)
    assert loaded.config == model.config and Weights(tmp_path / "a").kinds == {kind}
    dtype = json.loads((tmp_path / "a" / "config.json").read_text())["dtype"]
    assert dtype == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]


@pytest.mark.parametrize("shard_size", [1, 3000, 20_000])
def test_shards(model, tmp_path, shard_size):
    files = write(model, tmp_path / "a", shard_size=shard_size)
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert checkpoint.is_checkpoint(tmp_path / "a") and set(files) < set(checkpoint.verify(tmp_path / "a")["files"])
    for file in files:
        stored = load_file(tmp_path / "a" / file)
        assert len(stored) == 1 or sum(a.nbytes for a in stored.values()) <= shard_size
    assert_all_same_bits(copies(Model.load(tmp_path / "a").params), copies(model.params))
    alone, beside = Session.load(tmp_path / "a", 64), Session(model, 64)
    assert_same_bits(alone.step([alone.add()], [[1, 2, 3]]), beside.step([beside.add()], [[1, 2, 3]]))


def test_masks_that_old_checkpoints_hold_are_passed_over(tmp_path):
    """Hugging Face's own gpt2 has its causal masks among the weights, as floats or as booleans, and no prefix."""
    model = random_model(GPT2)
    write(model, tmp_path)
    (tmp_path / "state.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): a for name, a in tensors.items()}
    masks = {"h.0.attn.bias": np.ones((1, 1, 24, 24), bool), "h.1.attn.bias": np.ones((1, 1, 24, 24), np.float32)}
    masks |= {"h.0.attn.masked_bias": np.array(-1e4, np.float32), "lm_head.weight": tensors["wte.weight"]}
    save_file(tensors | masks, tmp_path / "model.safetensors")
    assert_all_same_bits(copies(Model.load(tmp_path).params), copies(model.params))


def test_any_size_of_parts_along_any_axis(model, tmp_path, monkeypatch):
    write(model, tmp_path / "a")
    weights = Weights(tmp_path / "a")
    for part in (1, 7, 100, 10**6):
        monkeypatch.setattr("barelm.convert.source.PART", part)
        for name, p in model.params.items():
            for axis in range(p.ndim):
                parts = list(weights.parts(name, axis))
                assert_same_bits(np.concatenate([values for _, values in parts], axis), p, name)
                assert sum(where.stop - where.start for where, _ in parts) == p.shape[axis]


def test_a_tokenizer_comes_along(tmp_path):
    model, tok = Model(Config(**GPT2 | dict(vocab_size=300))), Tokenizer.bytes()
    write(model, tmp_path / "a", files={"tokenizer.json": tok.to_json().encode()})
    assert Weights(tmp_path / "a").tokenizer.hash() == tok.hash()
    write(model, tmp_path / "b")
    assert Weights(tmp_path / "b").tokenizer is None


def test_what_is_too_large_leaves_the_older_folder(model, tmp_path):
    model.save(tmp_path / "a")
    other = random_model(model.config.to_dict(), seed=1)
    name = next(iter(other.params))
    other.params[name][0] = 1e6
    with pytest.raises(ValueError, match=f"{name}: 1e\\+06 is too large for F16"):
        write(other, tmp_path / "a", dtype="F16")
    assert_all_same_bits(copies(Model.load(tmp_path / "a").params), copies(model.params))
    with pytest.raises(ValueError, match="dtype: is 'F8', must be one of F32, F16, BF16"):
        write(other, tmp_path / "a", dtype="F8")
    with pytest.raises(ValueError, match="shard_size: is 0"):
        write(other, tmp_path / "a", shard_size=0)


def test_pickles_are_refused_by_name(tmp_path):
    write(random_model(GPT2), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is pickled, and reading that could run any"):
        Model.load(tmp_path)


# ---- an index that is not true


@pytest.fixture
def sharded(tmp_path):
    write(random_model(LLAMA), tmp_path / "a", shard_size=3000)
    (tmp_path / "a" / "state.json").unlink()
    return tmp_path / "a"


def moved(index, **changes):
    return index | {"weight_map": index["weight_map"] | changes}


FIRST = "model.embed_tokens.weight"
LIES = {
    "no map": (lambda i: {"metadata": {}}, "weight_map is no object of file names"),
    "no names": (lambda i: moved(i, **{FIRST: 3}), "weight_map is no object of file names"),
    "not json": (lambda i: None, "cannot be read"),
    "another file": (
        lambda i: moved(i, **{FIRST: "model-00002-of-00007.safetensors"}),
        "does not say that|which lacks",
    ),
    "a file too many": (lambda i: moved(i, more="model-9.safetensors"), "model-9.safetensors: is not there"),
    "outside": (lambda i: moved(i, more="../model.safetensors"), "is no safetensors file of this folder"),
    "pickled": (lambda i: moved(i, more="pytorch_model.bin"), "is no safetensors file of this folder"),
    "a tensor too many": (lambda i: moved(i, more=i["weight_map"][FIRST]), "says that more is in .*, which lacks it"),
    "a tensor too few": (
        lambda i: i | {"weight_map": {k: v for k, v in i["weight_map"].items() if k != FIRST}},
        "does not say that|lacks embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_is_not_true(sharded, lie):
    change, says = LIES[lie]
    changed = change(json.loads((sharded / INDEX).read_text()))
    (sharded / INDEX).write_text("{" if changed is None else json.dumps(changed))
    with pytest.raises(CheckpointError, match=re.escape(str(sharded)) + ".*(" + says + ")"):
        Model.load(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00007.safetensors").unlink(missing_ok=True)
    name = sorted(path.name for path in sharded.glob("*.safetensors"))[0]
    (sharded / name).unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        Model.load(sharded)


def test_a_billion_layers_are_not_written_down(tmp_path):
    write(random_model(GPT2), tmp_path)
    (tmp_path / "state.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 10**9}))
    with pytest.raises(CheckpointError, match=r"lacks most of the 1,000,000,000 layers of config\.json"):
        Model.load(tmp_path)


HEADERS = {
    "a name twice": b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{}}',
    "a gap": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "an overlap": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],'
    b'"data_offsets":[4,8]}}',
    "negative": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "true": b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    "wrong size": b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
    "backwards": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
    "too short": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "GGUF's kind": b'{"a":{"dtype":"Q8_0","shape":[32],"data_offsets":[0,8]}}',
    "an odd field": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}',
    "many dimensions": b'{"a":{"dtype":"F32","shape":[' + b",".join([b"1"] * 9) + b'],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_of_safetensors_that_is_not_true(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(HEADERS[header]).to_bytes(8, "little") + HEADERS[header] + bytes(8))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read: "):
        st.read(path)

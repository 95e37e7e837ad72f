"""Sessions that stand alone: weights are packed as a checkpoint is read, part by part, with no model beside them."""

import subprocess
import sys

import numpy as np
import pytest
from barelm import Config, Model, Session, _core
from barelm.checkpoint import CheckpointError
from barelm.convert import source
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MIDDLE, assert_same_bits, random_model

WEIGHTS = ("fp32", "bf16", "int8")
# a vocabulary and an MLP that are packed in several parts; heads whose rows end within a panel
WIDE = dict(n_layer=2, n_head=5, head_size=20, n_embd=36, n_inner=900, vocab_size=1600, context=200)
CONFIGS = {family: config | WIDE | dict(n_kv_head=5 if family == "gpt2" else 1) for family, config in MIDDLE.items()}
CONFIGS["tied llama"] = CONFIGS["llama"] | dict(tied=True, bias=True)


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, WIDE["vocab_size"], n).tolist()


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """(a model, a checkpoint of it)"""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_")) / "checkpoint"
    model = random_model(CONFIGS[request.param])
    model.save(folder)
    return model, folder


def logits_of(session):
    rows = [session.add(), session.add()]
    steps = [session.step(rows, [ids(70, 1), ids(3, 2)]), session.step(rows[:1], [[7]])]
    return np.concatenate(steps), session.logprobs([5])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_bits_are_those_beside_a_model(saved, weights, backend, monkeypatch):
    monkeypatch.setenv("BARELM_ISA", backend)
    model, folder = Model.load(saved[1]), saved[1]
    alone, beside = Session.load(folder, 300, weights), Session(model, 300, weights)
    for got, want in zip(logits_of(alone), logits_of(beside), strict=True):
        assert_same_bits(got, want)
    assert alone.config == model.config
    assert (alone.room, alone.memory["cache"]) == (beside.room, beside.memory["cache"])


@pytest.mark.parametrize("weights", WEIGHTS)
@settings(max_examples=15, deadline=None)
@given(values=st.integers(1, 200_000))
def test_any_size_of_parts(saved, weights, values):
    model, folder = saved
    with pytest.MonkeyPatch.context() as m:
        m.setattr(source, "PART", values if values > 2000 else 30 * values)  # 1 would open the file 10^5 times
        logits, _ = logits_of(Session.load(folder, 300, weights))
        m.setattr(source, "PART", values)
        loaded = Model.load(folder) if values > 500 else model
    assert_same_bits(logits, logits_of(Session(model, 300, weights))[0])
    assert all((p == model.params[name]).all() for name, p in loaded.params.items())


def test_the_embedding_exists_once_where_it_can(saved):
    """Beside the packed matrices: what is not packed, and where bf16 would round it, or the head is another, the
    embedding."""
    model, folder = saved
    size = {name: 4 * p.size for name, p in model.params.items()}
    small = sum(size[name] for name, p in model.params.items() if p.ndim == 1) + size.get("wpe.weight", 0)
    tokens = size.get("wte.weight", size.get("embed_tokens.weight"))
    for weights in WEIGHTS:
        extra = Session.load(folder, 64, weights).memory["weights"] - Session(model, 64, weights).memory["weights"]
        twice = weights == "bf16" or (weights == "fp32" and not model.config.tied)
        assert 0 <= extra - small - twice * tokens < 64 * len(size)  # each tensor begins on 64 bytes


def test_it_is_the_weights_of_its_folder_for_good(saved):
    session = Session.load(saved[1], 100)
    with pytest.raises(RuntimeError, match="refresh: the session has no model"):
        session.refresh()


def test_what_cannot_be_loaded(saved, tmp_path):
    _, folder = saved
    with pytest.raises(CheckpointError, match="there is no such folder"):
        Session.load(tmp_path / "none", 100)
    with pytest.raises(ValueError, match="weights: is 'int4'"):
        Session.load(folder, 100, weights="int4")
    with pytest.raises(ValueError, match="max_tokens: is 0"):
        Session.load(folder, 0)
    with pytest.raises(MemoryError, match=r"KV cache: .* GiB needed"):
        Session.load(folder, 2**30)
    data = bytearray((folder / "model.safetensors").read_bytes())
    try:
        (folder / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="was altered after it was written"):
            Session.load(folder, 100)
    finally:
        (folder / "model.safetensors").write_bytes(data)


def test_parts_come_in_order_and_fit():
    core = _core.Session(config=Config(**CONFIGS["gpt2"]), max_tokens=100, weights="int8", device="cpu")
    (first, _), (second, _) = core.order()[:2]
    V, C = WIDE["vocab_size"], WIDE["n_embd"]
    with pytest.raises(RuntimeError, match="has not got all of its weights"):
        core.step([core.add()], [1], np.array([1], np.int32))
    with pytest.raises(ValueError, match=f"{second}: comes out of order, {first} is not whole yet"):
        core.put(second, np.zeros((1, C), np.float32))
    with pytest.raises(ValueError, match=f"{first}: C is {C + 1}, it has {C}"):
        core.put(first, np.zeros((1, C + 1), np.float32))
    with pytest.raises(TypeError, match=f"{first}: dtype is float64, must be float32"):
        core.put(first, np.zeros((1, C)))
    core.put(first, np.zeros((V - 1, C), np.float32))
    with pytest.raises(ValueError, match=f"{first}: has {V} rows, {V + 1} came"):
        core.put(first, np.zeros((2, C), np.float32))


LOADING = """
import sys
from barelm import Session
def status(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) * 1024
session = Session.load(sys.argv[1], 1024, "int8")
session.step([session.add()], [list(range(1000))])
print(status("VmHWM"), sum(session.memory.values()))
"""


@pytest.mark.skipif(sys.platform != "linux" or _core.isa() == "ref", reason="counts memory as Linux does; takes long")
def test_a_process_holds_little_more_than_packed_weights_and_cache(tmp_path):
    """The model in fp32 would be another 290 MB."""
    Model(Config(n_layer=8, n_embd=768, vocab_size=20000)).save(tmp_path / "model")
    command = [sys.executable, "-c", LOADING, str(tmp_path / "model")]
    peak, held = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert peak <= 1.15 * held + 80e6

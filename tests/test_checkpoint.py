"""Checkpoints: what is read is what was written, to the bit; what was altered, torn or cut off is refused by name; and
whatever happens during a save, the older checkpoint is whole."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from barelm import Config, Model, checkpoint, files
from barelm.checkpoint import CheckpointError
from barelm.files import digest, digest_of
from conftest import GPT2, LLAMA
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import assert_all_same_bits, assert_same_bits, contents, copies, random_batch, random_floats, random_model
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

SCALING = dict(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8, rope_type="llama3"
)
CONFIGS = {
    "gpt2": GPT2,
    "gpt2, erf, untied": GPT2 | dict(act="gelu_erf", tied=False, n_inner=33),
    "llama": LLAMA,
    "llama, bias, tied": LLAMA | dict(bias=True, tied=True),
    "llama 3.2": LLAMA | dict(rope_theta=500000.0, rope_scaling=SCALING),
    "barelm: no bias": GPT2 | dict(bias=False),
    "barelm: layernorm, rope, grouped": GPT2 | dict(pos="rope", n_head=4, n_kv_head=2, head_size=6),
    "barelm: rmsnorm, gelu, learned": LLAMA | dict(act="gelu_tanh", pos="learned", n_inner=7),
}
WEIGHTS, OPTIMIZER, CONFIG, STATE = "model.safetensors", "optimizer.safetensors", "config.json", "state.json"


def a_step(model, seed):
    config = model.config.to_dict()
    model.forward_backward(*random_batch(config, 2, 9, seed=seed), random_floats(2, 9, seed=seed))
    model.update(lr=0.01)


def trained(config, seed=0, steps=2):
    model = random_model(config, seed=seed)
    for step in range(steps):
        a_step(model, step)
    return model


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    return trained(request.param)


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.endswith((".part", ".old")) or p.name.startswith(".")]


# ---- round trip


def test_what_is_read_is_what_was_written(model, tmp_path):
    model.save(tmp_path / "a")
    loaded = Model.load(tmp_path / "a")
    assert loaded.config == model.config and loaded.step == 2 and loaded.has_moments
    assert_all_same_bits(contents(loaded), contents(model))
    for m in (model, loaded):
        a_step(m, 7)
    assert_all_same_bits(contents(loaded), contents(model))
    assert leftovers(tmp_path) == []


def test_the_files_hold_names_and_shapes_of_the_parameters(model, tmp_path):
    model.save(tmp_path / "a")
    prefix = "transformer." if model.config.norm == "layernorm" else "model."
    stored = load_file(tmp_path / "a" / WEIGHTS)
    assert_all_same_bits({name.removeprefix(prefix): a for name, a in stored.items()}, copies(model.params))
    assert all(name.startswith(prefix) or name == "lm_head.weight" for name in stored)
    moments = {
        kind + name: a.copy()
        for kind, views in zip(("exp_avg.", "exp_avg_sq."), model.moments, strict=True)
        for name, a in views.items()
    }
    assert_all_same_bits(load_file(tmp_path / "a" / OPTIMIZER), moments)
    kind = json.loads((tmp_path / "a" / CONFIG).read_text())["model_type"]
    c = model.config
    assert kind == (
        "gpt2"
        if c == Config(**CONFIGS["gpt2"]) or c == Config(**CONFIGS["gpt2, erf, untied"])
        else "llama"
        if c.norm == "rmsnorm" and c.act == "swiglu"
        else "barelm"
    )


def test_without_moments(tmp_path):
    model = trained(GPT2)
    model.save(tmp_path / "a", optimizer=False)
    loaded = Model.load(tmp_path / "a")
    assert not (tmp_path / "a" / OPTIMIZER).exists() and not loaded.has_moments and loaded.step == 2
    assert_all_same_bits(copies(loaded.params), copies(model.params))
    fresh = random_model(GPT2)
    fresh.save(tmp_path / "b")
    assert not (tmp_path / "b" / OPTIMIZER).exists() and Model.load(tmp_path / "b").step == 0


def test_saving_changes_nothing(tmp_path):
    model = trained(LLAMA)
    model.forward_backward(*random_batch(LLAMA, 2, 9), random_floats(2, 9))
    before = contents(model)
    model.save(tmp_path / "a")
    assert_all_same_bits(contents(model), before)


def test_precision_is_the_readers_choice(tmp_path):
    trained(LLAMA).save(tmp_path / "a")
    assert Model.load(tmp_path / "a", precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match="precision: is 'fp8'"):
        Model.load(tmp_path / "a", precision="fp8")


def test_further_state_and_files(tmp_path):
    checkpoint.save(trained(GPT2), tmp_path / "a", state={"data": [3, "x"]}, files={"tokenizer.json": b"{}\n"})
    state = checkpoint.verify(tmp_path / "a")
    assert state["data"] == [3, "x"] and state["step"] == 2
    assert set(state["files"]) == {CONFIG, WEIGHTS, OPTIMIZER, "tokenizer.json"}
    (tmp_path / "a" / "tokenizer.json").write_bytes(b"[]\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: was altered"):
        Model.load(tmp_path / "a")


# ---- where it is written


def test_an_older_checkpoint_is_replaced(tmp_path):
    folder = tmp_path / "deep" / "er" / "a"
    checkpoint.save(trained(GPT2), folder, files={"extra": b"1"})
    newer = trained(LLAMA, steps=3)
    newer.save(folder)
    assert not (folder / "extra").exists()
    assert_all_same_bits(contents(Model.load(folder)), contents(newer))
    assert leftovers(folder.parent) == []


def test_without_the_exchange_of_folders(tmp_path, monkeypatch):
    """A system that cannot swap two names: the older folder steps aside first."""
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    trained(GPT2).save(tmp_path / "a")
    newer = trained(GPT2, steps=4)
    newer.save(tmp_path / "a")
    assert Model.load(tmp_path / "a").step == 4 and leftovers(tmp_path) == []


def test_an_empty_folder_is_used(tmp_path):
    trained(GPT2).save(tmp_path)
    assert Model.load(tmp_path).step == 2


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        trained(GPT2).save("a")
        assert Model.load("a").step == 2


@pytest.mark.parametrize("what", ["notes.txt", CONFIG, WEIGHTS])
def test_a_foreign_folder_is_not_touched(tmp_path, what):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / what).write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is no checkpoint"):
        trained(GPT2).save(tmp_path / "a")
    assert [p.name for p in (tmp_path / "a").iterdir()] == [what] and (tmp_path / "a" / what).read_text() == "mine"
    assert leftovers(tmp_path) == []


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is no checkpoint"):
        trained(GPT2).save(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


# ---- what was altered

fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FILES = [CONFIG, WEIGHTS, OPTIMIZER, STATE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint; tests that change it put it back."""
    folder = tmp_path_factory.mktemp("checkpoints") / "a"
    checkpoint.save(trained(LLAMA | dict(n_layer=1)), folder, state={"seed": 3})
    return folder


@contextlib.contextmanager
def content(path, new):
    """For a while the file holds `new` (None: it is gone)."""
    old = path.read_bytes()
    try:
        path.unlink() if new is None else path.write_bytes(new)
        yield
    finally:
        path.write_bytes(old)
        Model.load(path.parent)  # whole again


def refused(folder, name, says=""):
    with pytest.raises(CheckpointError, match=re.escape(str(folder / name)) + ".*" + says):
        Model.load(folder)


@pytest.mark.parametrize("name", FILES[:3])
@fuzz
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_is_refused(folder, name, where, flip):
    data = bytearray((folder / name).read_bytes())
    data[int(where * len(data))] ^= flip
    with content(folder / name, data):
        refused(folder, name, "was altered")


@pytest.mark.parametrize("name", FILES)
@fuzz
@given(where=st.floats(0, 1, exclude_max=True))
def test_a_torn_file_is_refused(folder, name, where):
    data = (folder / name).read_bytes()
    data = data[: int(where * (len(data) - 1))]  # without the last newline state.json is whole
    with content(folder / name, data):
        refused(folder, name)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_longer_file_is_refused(folder, name):
    with content(folder / name, (folder / name).read_bytes() + b" "):
        refused(folder, name, "bytes, .* were written")


@pytest.mark.parametrize("name", FILES[:3])
def test_a_missing_file_is_refused(folder, name):
    with content(folder / name, None), pytest.raises(CheckpointError, match=re.escape(name) + ".* missing"):
        Model.load(folder)


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nothing-here: there is no such folder"):
        Model.load(tmp_path / "nothing-here")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        Model.load(tmp_path)


@fuzz
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_of_the_state_breaks_nothing(folder, where, flip):
    """Refused, or a model with these very weights: no other error, and no other model."""
    data = bytearray((folder / STATE).read_bytes())
    want = load_file(folder / WEIGHTS)["model.norm.weight"]
    data[int(where * len(data))] ^= flip
    with content(folder / STATE, data):
        try:
            assert_same_bits(Model.load(folder).params["norm.weight"], want)
        except CheckpointError as e:
            assert str(folder) in str(e)


def test_an_altered_step_is_refused(folder):
    with content(folder / STATE, (folder / STATE).read_bytes().replace(b'"step": 2', b'"step": 3')):
        refused(folder, STATE)


# ---- hostile files that say of themselves that they are whole


@contextlib.contextmanager
def hostile(folder, name, new, sealed=True):
    """The file holds `new`, and state.json vouches for it; or, not sealed, there is no state.json."""
    state = json.loads((folder / STATE).read_text())
    old_state, old = (folder / STATE).read_bytes(), (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(new)
        state["files"][name] = digest(folder / name)
        state["sha256"] = digest_of(state)
        (folder / STATE).write_text(json.dumps(state)) if sealed else (folder / STATE).unlink()
        yield
    finally:
        (folder / name).write_bytes(old)
        (folder / STATE).write_bytes(old_state)


ODD_VALUES = [None, True, 0, -1, 1.5, 1e400, float("nan"), 2**31, 2**64, "", "x", [], [1], {}, {"a": 1}]
STATES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"\xff\xfe",
    b"\x00" * 50,
    b"[" * 100000,
    b'{"step": 1}',
    b'{"files": {}}',
    b'{"files": {}, "step": -1}',
    b'{"files": {}, "step": "1"}',
    b'{"files": [], "step": 1}',
    b'{"files": {}, "step": 1.5}',
    b'{"files": {"model.safetensors": null}, "step": 1}',
    b'{"files": {"model.safetensors": {"bytes": []}}, "step": 1}',
    b'{"files": {"..": {}}, "step": 1}',
    b'{"files": {"nothing": {"bytes": 0, "sha256": ""}}, "step": 1}',
]
CONFIG_FILES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe",
    b"[" * 100000,
    b"{}",
    b'{"model_type": "bert"}',
    b'{"model_type": ["llama"]}',
    b'{"model_type": "llama"}',
    b'{"model_type": "gpt2"}',
    b'{"model_type": "barelm", "n_layers": 3}',
]


@pytest.mark.parametrize("data", STATES, ids=lambda data: repr(data[:60]))
def test_a_hostile_state(folder, data):
    with content(folder / STATE, data), pytest.raises(CheckpointError, match=re.escape(str(folder))):
        Model.load(folder)


@pytest.mark.parametrize("step", ["9223372036854775808", "true"])
def test_a_step_that_is_no_count(folder, step):
    state = json.loads((folder / STATE).read_text()) | {"step": 12345}
    with content(folder / STATE, json.dumps(state).replace("12345", step).encode()):
        refused(folder, STATE)


@pytest.mark.parametrize("data", CONFIG_FILES, ids=lambda data: repr(data[:60]))
def test_a_hostile_config(folder, data):
    with hostile(folder, CONFIG, data):
        refused(folder, CONFIG)


def odd_fields():
    for family in ("gpt2", "llama", "barelm: no bias"):
        for name in checkpoint.hf.config_to_hf(Config(**CONFIGS[family])) | {"rope_parameters": None}:
            yield pytest.param(family, name, id=f"{family} {name}")


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize(("family", "name"), list(odd_fields()))
def test_an_odd_field_of_config_json(tmp_path, family, name):
    """Any value of any field: another model's description, that the weights do not fit, or CheckpointError; no file is
    trusted to vouch for itself."""
    folder, model = tmp_path / "a", random_model(CONFIGS[family])
    model.save(folder)
    (folder / STATE).unlink()
    original = json.loads((folder / CONFIG).read_text())
    for value in ODD_VALUES:
        if isinstance(value, int) and value >= 2**31 and name not in ("vocab_size", "n_layer"):
            continue
        (folder / CONFIG).write_text(json.dumps(original | {name: value}))
        try:
            loaded = Model.load(folder)
        except CheckpointError as e:
            assert str(folder) in str(e), value
        else:
            for tensor, p in loaded.params.items():  # fewer where the value says "tied"
                assert_same_bits(p, model.params[tensor], tensor)


def test_rope_parameters_that_are_pairs(folder):
    data = json.loads((folder / CONFIG).read_text()) | {"rope_parameters": ["ab"]}
    with hostile(folder, CONFIG, json.dumps(data).encode()):
        refused(folder, CONFIG)


def tensors_of(folder):
    return load_file(folder / WEIGHTS)


def serialised(tmp_path, tensors):
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    return (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, k: t.pop(k), "lacks"),
        (lambda t, k: t.clear(), "lacks .* \\.\\.\\."),
        (lambda t, k: t.update({k + "s": t[k]}), "has .*, which the model of config.json has not"),
        (lambda t, k: t.update({"norm.weight": t["model.norm.weight"]}), "or it comes twice"),
        (lambda t, k: t.update({k: t[k][:-1].copy()}), "has shape"),
        (lambda t, k: t.update({k: t[k].T.copy()}), "has shape"),
        (lambda t, k: t.update({k: t[k].ravel()}), "has shape"),
        (lambda t, k: t.update({k: t[k][None]}), "has shape"),
        (lambda t, k: t.update({k: t[k].astype(np.int32)}), "has dtype I32"),
    ],
)
def test_tensors_that_do_not_fit(folder, tmp_path, change, says, sealed):
    tensors = tensors_of(folder)
    change(tensors, "model.layers.0.self_attn.k_proj.weight")
    with hostile(folder, WEIGHTS, serialised(tmp_path, tensors), sealed):
        refused(folder, WEIGHTS, says)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_of_another_float_type(folder, tmp_path, dtype):
    """As others write them; they come out as float32, rounded once."""
    tensors = {name: a.astype(dtype) for name, a in tensors_of(folder).items()}
    with hostile(folder, WEIGHTS, serialised(tmp_path, tensors), sealed=False):
        loaded = Model.load(folder)
    for name, a in loaded.params.items():
        want = tensors[name if name == "lm_head.weight" else "model." + name].astype(np.float32)
        assert_same_bits(a, want, name)


def test_moments_that_do_not_fit(folder, tmp_path):
    stored = load_file(folder / OPTIMIZER)
    stored.pop("exp_avg_sq.norm.weight")
    with hostile(folder, OPTIMIZER, serialised(tmp_path, stored)):
        refused(folder, OPTIMIZER, r"lacks exp_avg_sq\.norm\.weight")


@settings(fuzz, max_examples=300)
@given(where=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_hostile_header_of_safetensors(folder, where, byte):
    """Without state.json only the format protects itself: a model of the right shape, or CheckpointError."""
    whole, data = tensors_of(folder), bytearray((folder / WEIGHTS).read_bytes())
    data[min(where, 7 + int.from_bytes(data[:8], "little"))] = byte
    with hostile(folder, WEIGHTS, data, sealed=False), contextlib.suppress(CheckpointError):
        assert Model.load(folder).n_params == sum(a.size for a in whole.values())


@fuzz
@given(where=st.floats(0, 1, exclude_max=True))
def test_a_torn_file_without_checksums(folder, where):
    data = (folder / WEIGHTS).read_bytes()
    with hostile(folder, WEIGHTS, data[: int(where * len(data))], sealed=False):
        refused(folder, WEIGHTS, "cannot be read")


# ---- a save that fails


@pytest.fixture
def older(tmp_path):
    """(folder, what it must hold afterwards): a checkpoint that a failing save would replace."""
    model = trained(GPT2)
    model.save(tmp_path / "a")
    return tmp_path / "a", contents(model)


def fails_in_turn(monkeypatch, owner, name, error, count):
    """The call number `count` of owner.name raises; the others go through."""
    real, calls = getattr(owner, name), []

    def fake(*args, **kwargs):
        calls.append(1)
        if len(calls) == count + 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fake)
    return calls


POINTS = [
    ("os", "fsync", 0),
    ("os", "fsync", 2),
    ("os", "fsync", 4),
    ("checkpoint", "save_file", 0),
    ("checkpoint", "save_file", 1),
    ("checkpoint", "digest", 1),
    ("files", "_exchange", 0),
]


@pytest.mark.parametrize(("owner", "name", "count"), POINTS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failing_save_leaves_the_older_one(older, monkeypatch, owner, name, count, error):
    folder, want = older
    newer = trained(GPT2, steps=5)
    with monkeypatch.context() as m:
        calls = fails_in_turn(m, {"os": os, "checkpoint": checkpoint, "files": files}[owner], name, error, count)
        with pytest.raises(type(error)):
            newer.save(folder)
        assert len(calls) == count + 1
    assert_all_same_bits(contents(Model.load(folder)), want)
    assert leftovers(folder.parent) == []
    newer.save(folder)
    assert Model.load(folder).step == 5


def test_a_failing_rename_leaves_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        fails_in_turn(m, os, "rename", OSError(5, "Input/output error"), 0)
        with pytest.raises(OSError, match="Input/output error"):
            trained(GPT2).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_rename_without_the_exchange_leaves_the_older_one(older, monkeypatch):
    folder, want = older
    with monkeypatch.context() as m:
        m.setattr(files, "_exchange", lambda a, b: False)
        fails_in_turn(m, os, "rename", OSError(5, "Input/output error"), 1)
        with pytest.raises(OSError, match="Input/output error"):
            trained(GPT2, steps=5).save(folder)
    assert_all_same_bits(contents(Model.load(folder)), want)


LOOP = """
import sys
import numpy as np
from barelm import Model
folder = sys.argv[1]
model = Model.load(folder)
print("ready", flush=True)
while True:
    model.step += 1
    for views in (model.params, *model.moments):
        for p in views.values():
            p[...] = model.step
    model.save(folder)
"""


def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL at random instants of a process that saves in a loop: step, weights and moments are those of one save."""
    folder, rng, before = tmp_path / "a", np.random.default_rng(0), 0
    model = random_model(GPT2 | dict(n_embd=64, n_inner=256))
    model.forward_backward(np.zeros((1, 2), np.int32), np.zeros((1, 2), np.int32), np.ones((1, 2), np.float32))
    model.update(lr=0)
    model.save(folder)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", LOOP, str(folder)], stdout=subprocess.PIPE, text=True) as p:
            assert p.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.05, 0.3))
            p.send_signal(signal.SIGKILL)
        loaded = Model.load(folder)
        assert loaded.step >= before
        for views in (loaded.params, *loaded.moments):
            assert loaded.step == 1 or all((p == loaded.step).all() for p in views.values())
        before = loaded.step
    assert before > 6, "the process never came to save"


FULL = """
import resource, sys
from barelm import Model
folder = sys.argv[1]
model = Model.load(folder)
model.step = 9
size = sum(p.nbytes for p in model.params.values())
resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
try:
    model.save(folder)
    print("saved?")
except OSError as e:
    print("refused")
except BaseException as e:
    print(type(e).__mro__, e)
"""


def disk_full(folder):
    return subprocess.run([sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True, timeout=30)


def test_a_write_that_fails_leaves_the_older_one(older):
    """A limit on the size of a file stands for a full disk: the write of the weights fails halfway."""
    folder, want = older
    disk_full(folder)
    assert_all_same_bits(contents(Model.load(folder)), want)
    assert leftovers(folder.parent) == []


def test_a_write_that_fails_is_an_os_error(older):
    assert disk_full(older[0]).stdout == "refused\n"


def test_a_full_disk(tmp_path):
    """A small disk in memory, where the system lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)], capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("no disk can be mounted here; a limit on the size of a file stands for it above")
    try:
        model = trained(GPT2)
        model.save(disk / "a")
        (disk / "ballast").write_bytes(b"x" * (250 << 10))
        want = contents(model)
        a_step(model, 3)
        with pytest.raises((OSError, SafetensorError), match="No space left"):
            model.save(disk / "a")
        assert_all_same_bits(contents(Model.load(disk / "a")), want)
        assert leftovers(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(older):
    folder, want = older
    folder.parent.chmod(0o555)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            trained(GPT2, steps=3).save(folder)
    finally:
        folder.parent.chmod(0o755)
    assert_all_same_bits(contents(Model.load(folder)), want)


def test_verify_says_what_it_read(folder):
    state = checkpoint.verify(folder)
    assert state["seed"] == 3 and state["step"] == 2 and set(state["files"]) == {CONFIG, WEIGHTS, OPTIMIZER}
    assert checkpoint.is_checkpoint(folder) and not checkpoint.is_checkpoint(Path(folder).parent)

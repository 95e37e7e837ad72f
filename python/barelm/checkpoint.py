"""Checkpoints: a folder that appears whole or not at all, whose every byte is checked, and that transformers opens.

config.json             Hugging Face's description
model.safetensors       weights under Hugging Face's names and shapes; or model.safetensors.index.json and the shards
                        that it names
optimizer.safetensors   AdamW's moments as exp_avg.NAME and exp_avg_sq.NAME, if there are any
state.json              step, whatever the caller adds, size and SHA-256 of every other file, SHA-256 of itself

A model with an adapter leaves its weights where they are: in the place of the first two is PEFT's form of the adapter,
adapter_config.json, which names the base model's folder, and adapter_model.safetensors (convert/peft.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from .convert import huggingface as hf
from .convert import peft
from .convert import safetensors_file as st
from .convert.numbers import from_float32, n_bytes
from .convert.source import CheckpointError, Source, Tensors, match, shapes_of
from .files import digest, digest_of, whole_folder
from .model import Config, Model

__all__ = [
    "CheckpointError",
    "Weights",
    "is_checkpoint",
    "load",
    "load_tokenizer",
    "open_weights",
    "read_config",
    "save",
    "verify",
    "write",
]

_WEIGHTS, _INDEX, _OPTIMIZER, _CONFIG, _STATE = (
    st.SINGLE,
    st.INDEX,
    "optimizer.safetensors",
    "config.json",
    "state.json",
)
_MOMENTS = ("exp_avg.", "exp_avg_sq.")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt", "ckpt.pt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.bpe")  # one of them makes Tokenizer.load worth a try
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and Hugging Face's


# ---- writing ----


def save(
    model: Model, folder, optimizer: bool = True, state: Mapping | None = None, files: Mapping[str, bytes] | None = None
):
    """Write `model` to `folder`, which is replaced in one step if it is a checkpoint already.  Of a model with an
    adapter the adapter alone: the folder that it was loaded from is its base.

    optimizer  also write the moments (two more of the weights' size)
    state      further entries of state.json
    files      further files, name -> content, checked like the others
    FileExistsError if the folder holds something else; OSError if it cannot be written, then nothing has changed.
    """
    with whole_folder(folder, is_checkpoint, "checkpoint") as part:
        _write(model, part, optimizer, dict(state or {}), dict(files or {}))


def _write(model: Model, part: Path, optimizer: bool, state: dict, files: dict[str, bytes]):
    if model.adapter:
        _write_adapter(model, part)
    else:
        config = hf.config_to_hf(model.config)
        (part / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _save_tensors({hf.to_file_name(model.config, name): p for name, p in model.params.items()}, part / _WEIGHTS)
    if optimizer and model.has_moments:
        moments = model.moments
        tensors = {kind + name: p for kind, m in zip(_MOMENTS, moments, strict=True) for name, p in m.items()}
        _save_tensors(tensors, part / _OPTIMIZER)
    for name, content in files.items():
        (part / name).write_bytes(content)
    _seal(part, state | {"step": model.step})


def _write_adapter(model: Model, part: Path):
    if not model.source:
        raise ValueError("save: the adapter's base model has no folder: save that first, and load it from there")
    described = peft.describe(model.adapter, model.config, model.source)
    (part / peft.CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    tensors = {peft.file_name(model.config, name): p for name, p in model.adapter_params.items()}
    _save_tensors(tensors, part / peft.WEIGHTS)


def _seal(part: Path, state: dict):
    state |= {"format": 1, "files": {p.name: digest(p) for p in sorted(part.iterdir())}}
    state["sha256"] = digest_of(state)
    (part / _STATE).write_text(json.dumps(state, indent=2) + "\n")


def _save_tensors(tensors: dict[str, np.ndarray], path: Path):
    try:
        save_file({name: np.ascontiguousarray(p) for name, p in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"{path}: cannot be written: {e}") from None


def write(
    source: Source,
    folder,
    dtype: str = "F32",
    shard_size: int = 5_000_000_000,
    files: Mapping[str, bytes] | None = None,
    progress: Callable[[str, int], None] = lambda name, n: None,
) -> list[str]:
    """Write any model that can be read as a checkpoint, without optimizer state, a few MB at a time.

    dtype        "F32", "F16" or "BF16" (rounded to nearest, ties to even)
    shard_size   bytes of a file of weights at most; a larger tensor has a file of its own
    files        further files, name -> content
    progress     called with a tensor's name and how many of its values were written
    Returns the names of the weight files.  ValueError: a value is too large for the dtype.  Otherwise as `save`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: is {dtype!r}, must be one of {', '.join(DTYPES)}")
    if type(shard_size) is not int or shard_size < 1:
        raise ValueError(f"shard_size: is {shard_size!r}, must be a whole number above 0")
    with whole_folder(folder, is_checkpoint, "checkpoint") as part:
        config = hf.config_to_hf(source.config) | {"dtype": DTYPES[dtype]}
        if config["model_type"] == "barelm":
            del config["dtype"]  # its fields are Config's
        (part / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        names = _write_shards(source, part, dtype, shard_size, progress)
        for name, content in (files or {}).items():
            (part / name).write_bytes(content)
        _seal(part, {"step": 0})
    return names


def _write_shards(source: Source, part: Path, dtype: str, shard_size: int, progress) -> list[str]:
    sizes = {name: n_bytes(shape, dtype) for name, shape in source.shapes.items()}
    groups = st.shards(sizes, shard_size)
    files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    files = files if len(groups) > 1 else [_WEIGHTS]
    where = {}
    for file, names in zip(files, groups, strict=True):
        tensors = [_tensor(source, name, dtype, progress) for name in names]
        st.write(part / file, tensors)
        where |= {tensor.name: file for tensor in tensors}
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (part / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _tensor(source: Source, name: str, dtype: str, progress) -> st.Tensor:
    def parts():
        for rows in source.rows(name):
            try:
                yield from_float32(rows, dtype)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            progress(name, rows.size)

    return st.Tensor(hf.to_file_name(source.config, name), dtype, source.shapes[name], parts())


# ---- reading ----


def is_checkpoint(folder) -> bool:
    """Whether the folder has the files of a checkpoint; says nothing about their content."""
    return is_adapter(folder) or (_has(folder, _CONFIG) and _weights_file(folder) is not None)


def is_adapter(folder) -> bool:
    """Whether it has the files of an adapter, and not those of a whole model."""
    whole = os.path.exists(os.path.join(folder, _CONFIG))
    return not whole and _has(folder, peft.CONFIG) and _has(folder, peft.WEIGHTS)


def _has(folder, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def base_of(folder) -> Path:
    """The folder of an adapter's base model, where its description says: as it is, or seen from the adapter's folder.
    CheckpointError: it is not there."""
    folder = Path(folder)
    name = peft.read_base(folder)
    for path in (Path(name), folder / name):
        if is_checkpoint(path) and not is_adapter(path):
            return path
    raise CheckpointError(
        f"{folder / peft.CONFIG}: its base model {name[:200]} is no checkpoint here; --base names another place"
    )


def _weights_file(folder: Path) -> Path | None:
    """What the weights are found by: one file, or the index of several."""
    return next((folder / name for name in (_WEIGHTS, _INDEX) if _has(folder, name)), None)


def verify(folder) -> dict:
    """Check every file that state.json lists, byte for byte; returns state.json.

    A folder without state.json (written by others) has nothing to check: returns {}.  CheckpointError names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    if not is_adapter(folder):
        _check_model_files(folder)
    if not os.path.exists(os.path.join(folder, _STATE)):
        return {}
    state = _read_json(folder / _STATE)
    files, step = state.get("files"), state.get("step")
    if not isinstance(files, dict) or type(step) is not int or not 0 <= step < 2**63:
        raise CheckpointError(f"{folder / _STATE}: step or files are missing or damaged")
    if state.get("sha256") != digest_of(state):
        raise CheckpointError(f"{folder / _STATE}: was altered after it was written (its checksum differs)")
    for name, want in files.items():
        _check_file(folder / name, want)
    return state


def _check_model_files(folder: Path):
    if not _has(folder, _CONFIG):
        raise CheckpointError(f"{folder}: is no checkpoint, {_CONFIG} is missing")
    if _weights_file(folder) is None:
        pickled = next((name for name in _PICKLES if (folder / name).exists()), None)
        if pickled:
            raise CheckpointError(
                f"{folder / pickled}: is pickled, and reading that could run any program; have it written as {_WEIGHTS}"
            )
        raise CheckpointError(f"{folder}: is no checkpoint, {_WEIGHTS} is missing")


def _check_file(path: Path, want):
    """A file against what state.json says of it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    have = digest(path)
    if not isinstance(want, dict) or have["bytes"] != want.get("bytes"):
        size = want.get("bytes") if isinstance(want, dict) else want
        raise CheckpointError(f"{path}: has {have['bytes']} bytes, {size} were written")
    if have["sha256"] != want.get("sha256"):
        raise CheckpointError(f"{path}: was altered after it was written (its checksum differs)")


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def read_config(folder, base=None) -> Config:
    """The Config of a checkpoint folder; an adapter's is that of its base."""
    if is_adapter(folder):
        folder = base or base_of(folder)
    path = Path(folder) / _CONFIG
    try:
        return hf.config_from_hf(_read_json(path))
    except CheckpointError:
        raise
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from None


def load(cls, folder, precision: str = "fp32", device: str = "cpu", weights: str = "fp32", base=None) -> Model:
    """The model of a checkpoint folder, with moments and step if it has them; of an adapter's folder its base with the
    adapter on it.

    weights  how they are held: see Model
    base     folder of an adapter's base model, where it is not the one that its description names
    CheckpointError names what is wrong.
    """
    folder, state = Path(folder), verify(folder)
    if is_adapter(folder):
        base = Path(base or base_of(folder))
        model = load(cls, base, precision, device, weights)
        adapter = peft.read(folder, model.config)
        model.adapt(adapter.lora)
        for name in adapter.tensors.shapes:
            for where, part in adapter.tensors.parts(name):
                model.put(name, where.start, part, "adapter")
        _fill_moments(model, folder, adapter.tensors.shapes)
    else:
        source = Weights(folder)
        model = cls.empty(source.config, precision, device, weights)
        source.fill_model(model)
        if weights == "fp32":
            _fill_moments(model, folder, source.shapes)
        model.source = str(folder.resolve())
    model.step = state.get("step", 0)
    return model


def _fill_moments(model: Model, folder: Path, shapes: Mapping[str, tuple[int, ...]]):
    path = folder / _OPTIMIZER
    if not path.exists():
        return
    named = {kind + name: shape for kind in _MOMENTS for name, shape in shapes.items()}
    moments = Tensors(match(st.read(path), named, lambda name: name, path, _CONFIG))
    transposed = model.transposed
    for kind, block in zip(_MOMENTS, ("first moment", "second moment"), strict=True):
        for name in shapes:
            axis = int(name in transposed)
            for where, part in moments.parts(kind + name, axis):
                model.put(name, where.start, np.ascontiguousarray(part.T if axis else part), block)


def open_weights(folder, base=None) -> Source:
    """The weights of a checkpoint folder, to be read in parts; an adapter's are merged into its base's."""
    folder = Path(folder)
    if not is_adapter(folder):
        return Weights(folder)
    whole = Weights(base or base_of(folder))
    return peft.Merged(folder, whole, peft.read(folder, whole.config), lambda: _tokenizer(folder) or whole.tokenizer)


class Weights(Source):
    """The config and the weights of a checkpoint folder, also one that others wrote: F32, F16, BF16 or F64, in one file
    or in shards.  They need never be in memory as a whole.

    CheckpointError names what is wrong: names, shapes and dtypes are known to be good once it exists.
    """

    def __init__(self, folder):
        folder = Path(folder)
        config, path = read_config(folder), _weights_file(folder)
        if path is None:
            raise CheckpointError(f"{folder / _WEIGHTS}: is not there")
        found = st.read_index(path) if path.name == _INDEX else st.read(path)
        shapes = shapes_of(config, len(found) + 1, path, _CONFIG)
        stored = match(found, shapes, lambda name: hf.from_file_name(config, name), path, _CONFIG)
        super().__init__(folder, "a checkpoint folder", config, stored, lambda: _tokenizer(folder))


def load_tokenizer(folder):
    """The Tokenizer of a checkpoint folder; an adapter's without one is that of its base.  ValueError, OSError: there
    is none that can be read."""
    from .tokenizer import Tokenizer  # tiktoken is loaded only where a vocabulary is wanted

    folder = Path(folder)
    return Tokenizer.load(base_of(folder) if is_adapter(folder) and not _has_tokenizer(folder) else folder)


def _tokenizer(folder: Path):
    return load_tokenizer(folder) if _has_tokenizer(folder) else None


def _has_tokenizer(folder: Path) -> bool:
    return any(_has(folder, name) for name in _TOKENIZERS)

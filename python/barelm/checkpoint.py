"""Checkpoints: a folder that appears whole or not at all, whose every byte is checked, and that transformers opens.

config.json             Hugging Face's description
model.safetensors       weights under Hugging Face's names and shapes
optimizer.safetensors   AdamW's moments as exp_avg.NAME and exp_avg_sq.NAME, if there are any
state.json              step, whatever the caller adds, size and SHA-256 of every other file, SHA-256 of itself
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from . import _core
from .convert import huggingface as hf
from .files import digest, digest_of, whole_folder
from .model import Config, Model

_WEIGHTS, _OPTIMIZER, _CONFIG, _STATE = "model.safetensors", "optimizer.safetensors", "config.json", "state.json"
_MOMENTS = ("exp_avg.", "exp_avg_sq.")
_FLOATS = ("F32", "F16", "F64")  # as safetensors calls them
_PART = 1 << 20  # values that are read at a time


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


# ---- writing ----


def save(
    model: Model, folder, optimizer: bool = True, state: Mapping | None = None, files: Mapping[str, bytes] | None = None
):
    """Write `model` to `folder`, which is replaced in one step if it is a checkpoint already.

    optimizer  also write the moments (two more of the weights' size)
    state      further entries of state.json
    files      further files, name -> content, checked like the others
    FileExistsError if the folder holds something else; OSError if it cannot be written, then nothing has changed.
    """
    with whole_folder(folder, is_checkpoint, "checkpoint") as part:
        _write(model, part, optimizer, dict(state or {}), dict(files or {}))


def _write(model: Model, part: Path, optimizer: bool, state: dict, files: dict[str, bytes]):
    config = hf.config_to_hf(model.config)
    (part / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    _save_tensors({hf.to_file_name(model.config, name): p for name, p in model.params.items()}, part / _WEIGHTS)
    if optimizer and model.has_moments:
        moments = model.moments
        tensors = {kind + name: p for kind, m in zip(_MOMENTS, moments, strict=True) for name, p in m.items()}
        _save_tensors(tensors, part / _OPTIMIZER)
    for name, content in files.items():
        (part / name).write_bytes(content)
    state |= {"format": 1, "step": model.step, "files": {p.name: digest(p) for p in sorted(part.iterdir())}}
    state["sha256"] = digest_of(state)
    (part / _STATE).write_text(json.dumps(state, indent=2) + "\n")


def _save_tensors(tensors: dict[str, np.ndarray], path: Path):
    try:
        save_file({name: np.ascontiguousarray(p) for name, p in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"{path}: cannot be written: {e}") from None


# ---- reading ----


def is_checkpoint(folder) -> bool:
    """Whether the folder has the files of a checkpoint; says nothing about their content."""
    folder = Path(folder)
    return (folder / _CONFIG).is_file() and (folder / _WEIGHTS).is_file()


def verify(folder) -> dict:
    """Check every file that state.json lists, byte for byte; returns state.json.

    A folder without state.json (written by others) has nothing to check: returns {}.  CheckpointError names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: is no checkpoint, {name} is missing")
    if not (folder / _STATE).exists():
        return {}
    state = _read_json(folder / _STATE)
    files, step = state.get("files"), state.get("step")
    if not isinstance(files, dict) or type(step) is not int or not 0 <= step < 2**63:
        raise CheckpointError(f"{folder / _STATE}: step or files are missing or damaged")
    if state.get("sha256") != digest_of(state):
        raise CheckpointError(f"{folder / _STATE}: was altered after it was written (its checksum differs)")
    for name, want in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        have = digest(path)
        if not isinstance(want, dict) or have["bytes"] != want.get("bytes"):
            size = want.get("bytes") if isinstance(want, dict) else want
            raise CheckpointError(f"{path}: has {have['bytes']} bytes, {size} were written")
        if have["sha256"] != want.get("sha256"):
            raise CheckpointError(f"{path}: was altered after it was written (its checksum differs)")
    return state


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def read_config(folder) -> Config:
    """The Config of a checkpoint folder."""
    path = Path(folder) / _CONFIG
    try:
        return hf.config_from_hf(_read_json(path))
    except CheckpointError:
        raise
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from None


def load(cls, folder, precision: str = "fp32", device: str = "cpu") -> Model:
    """The model of a checkpoint folder, with moments and step if it has them.  CheckpointError names what is wrong."""
    state, weights = verify(folder), Weights(folder)
    moments = None
    if (Path(folder) / _OPTIMIZER).exists():
        shapes = {kind + name: shape for kind in _MOMENTS for name, shape in weights.shapes.items()}
        moments = _Tensors(Path(folder) / _OPTIMIZER, shapes, lambda name: name)
    model = cls(weights.config, precision=precision, device=device)
    weights.tensors.fill(model.params)
    if moments:
        moments.fill({kind + name: p for kind, m in zip(_MOMENTS, model.moments, strict=True) for name, p in m.items()})
    model.step = state.get("step", 0)
    return model


class Weights:
    """The config and the weights of a checkpoint folder, which need never be in memory as a whole.

    CheckpointError names what is wrong: names, shapes and dtypes are known to be good once it exists.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.config = read_config(folder)
        self.shapes = _core.model_tensors(self.config)
        self.tensors = _Tensors(folder / _WEIGHTS, self.shapes, lambda name: hf.from_file_name(self.config, name))

    def rows(self, name: str, axis: int):
        """A parameter in parts, float32, one after the other along `axis` of Hugging Face's shape."""
        for _, part in self.tensors.parts(name, axis):
            yield np.asarray(part, np.float32)


class _Tensors:
    """Tensors of a safetensors file: exactly those of `shapes`.  rename: what a name in the file means; None: nothing.

    The file is opened anew for every part: what a mapping has touched counts as memory of this process until it ends.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], rename):
        self.path, self.keys, self.shapes = path, {}, shapes
        with self._open() as f:
            for key in f.keys():  # noqa: SIM118 (safe_open is no dict)
                name = rename(key)
                if name is None:
                    continue
                if name not in shapes or name in self.keys:
                    raise CheckpointError(
                        f"{path}: has {key}, which the model of config.json has not (or it comes twice)"
                    )
                self._check(f.get_slice(key), key, shapes[name])
                self.keys[name] = key
        missing = sorted(shapes.keys() - self.keys.keys())
        if missing:
            raise CheckpointError(f"{path}: lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}")

    def _check(self, tensor, key: str, shape: tuple[int, ...]):
        if tuple(tensor.get_shape()) != shape:
            raise CheckpointError(f"{self.path}: {key} has shape {tuple(tensor.get_shape())}, config.json says {shape}")
        if tensor.get_dtype() not in _FLOATS:
            raise CheckpointError(
                f"{self.path}: {key} has dtype {tensor.get_dtype()}, must be one of {', '.join(_FLOATS)}"
            )

    @contextmanager
    def _open(self):
        try:
            with safe_open(self.path, framework="np") as f:
                yield f
        except (SafetensorError, OSError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{self.path}: cannot be read: {e}") from None

    def parts(self, name: str, axis: int = 0):
        """(where along the axis, values as they are stored), until all of the tensor has come."""
        shape = self.shapes[name]
        step = max(1, _PART // (math.prod(shape) // shape[axis]))
        for at in range(0, shape[axis], step):
            where = slice(at, min(at + step, shape[axis]))
            with self._open() as f:
                part = f.get_slice(self.keys[name])[(slice(None),) * axis + (where,)]
            yield where, part

    def fill(self, targets: Mapping[str, np.ndarray]):
        for name, target in targets.items():
            for where, part in self.parts(name):
                target[where] = part

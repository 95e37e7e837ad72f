"""Checkpoints: a folder that appears whole or not at all, whose every byte is checked, and that transformers opens.

config.json             Hugging Face's description
model.safetensors       weights under Hugging Face's names and shapes
optimizer.safetensors   AdamW's moments as exp_avg.NAME and exp_avg_sq.NAME, if there are any
state.json              step, whatever the caller adds, size and SHA-256 of every other file, SHA-256 of itself
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .convert import huggingface as hf
from .files import digest, digest_of, whole_folder
from .model import Model

_WEIGHTS, _OPTIMIZER, _CONFIG, _STATE = "model.safetensors", "optimizer.safetensors", "config.json", "state.json"
_MOMENTS = ("exp_avg.", "exp_avg_sq.")


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


def load(cls, folder, precision: str = "fp32", device: str = "cpu") -> Model:
    """The model of a checkpoint folder, with moments and step if it has them.  CheckpointError names what is wrong."""
    folder = Path(folder)
    state = verify(folder)
    try:
        config = hf.config_from_hf(_read_json(folder / _CONFIG))
    except CheckpointError:
        raise
    except ValueError as e:
        raise CheckpointError(f"{folder / _CONFIG}: {e}") from None
    model = cls(config, precision=precision, device=device)
    _read_tensors(folder / _WEIGHTS, dict(model.params), lambda name: hf.from_file_name(config, name))
    if (folder / _OPTIMIZER).exists():
        targets = {kind + name: p for kind, m in zip(_MOMENTS, model.moments, strict=True) for name, p in m.items()}
        _read_tensors(folder / _OPTIMIZER, targets, lambda name: name)
    model.step = state.get("step", 0)
    return model


def _read_tensors(path: Path, targets: dict[str, np.ndarray], rename):
    """Fill every target from the file; a name too many, too few or of another shape is an error."""
    try:
        with safe_open(path, framework="np") as f:
            for key in f.keys():  # noqa: SIM118 (safe_open is no dict)
                name = rename(key)
                if name is None:
                    continue
                if name not in targets:
                    raise CheckpointError(
                        f"{path}: has {key}, which the model of config.json has not (or it comes twice)"
                    )
                value, target = f.get_tensor(key), targets.pop(name)
                if value.shape != target.shape:
                    raise CheckpointError(f"{path}: {key} has shape {value.shape}, config.json says {target.shape}")
                if value.dtype.kind != "f":
                    raise CheckpointError(f"{path}: {key} has dtype {value.dtype}, must be a float")
                target[...] = value
    except (SafetensorError, OSError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from None
    if targets:
        raise CheckpointError(f"{path}: lacks {', '.join(sorted(targets)[:3])}{' ...' if len(targets) > 3 else ''}")

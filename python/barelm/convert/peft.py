"""PEFT's files of a LoRA adapter: adapter_config.json and adapter_model.safetensors, beside a base model that lies
elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import _core
from ..lora import Lora
from ..model import Config
from . import huggingface as hf
from . import safetensors_file as st
from .source import CheckpointError, Source, Stored, Tensors, match

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "Merged", "describe", "file_name", "read", "read_base"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 16 << 20  # bytes
PREFIX = "base_model.model."
# What would change the arithmetic, and the value at which it does not.
PLAIN = {
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}


class Adapter(NamedTuple):
    lora: Lora
    tensors: Tensors  # under the names of Model.adapter_params


# ---- writing ------------------------------------------------------------------------------------------------------


def describe(lora: Lora, config: Config, base: str) -> dict:
    """adapter_config.json.  base: the folder of the model that the adapter is for."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": lora.modules(config),
        "fan_in_fan_out": hf.is_transposed(config),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        **PLAIN,
    }


def file_name(config: Config, name: str) -> str:
    """A name of Model.adapter_params in adapter_model.safetensors."""
    return PREFIX + hf.to_file_name(config, name)


# ---- reading ------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError("too large for a description")
        described = json.loads(path.read_bytes())
        if not isinstance(described, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return described


def read_base(folder: Path) -> str:
    """What adapter_config.json says of the base model: a folder, or a name on a hub."""
    base = _read_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / CONFIG}: base_model_name_or_path is missing")
    return base


def read(folder: Path, config: Config) -> Adapter:
    """The adapter of a folder for a base model of this config.  CheckpointError: it is damaged, does what we do not, or
    is for another model."""
    described, path = _read_config(folder), folder / WEIGHTS
    found = {_own_name(config, key, path): stored for key, stored in st.read(path).items()}
    try:
        lora = _lora(described, _targets(config, found, path))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    return Adapter(lora, Tensors(match(found, lora.shapes(config), lambda name: name, path, CONFIG)))


def _lora(described: Mapping, targets: list[str]) -> Lora:
    if described.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: is {described.get('peft_type')!r}, must be 'LORA'")
    for name, plain in PLAIN.items():
        if described.get(name) not in (plain, None):
            raise ValueError(f"{name}: is {described[name]!r:.60}, which is not supported")
    for name in ("r", "lora_alpha"):
        if name not in described:
            raise ValueError(f"{name}: is missing")
    return Lora(described["r"], described["lora_alpha"], targets, bool(described.get("use_rslora", False)))


def _own_name(config: Config, key: str, path: Path) -> str:
    if not key.startswith(PREFIX):
        raise CheckpointError(f"{path}: has {key[:99]}, where names begin with {PREFIX}")
    return hf.from_file_name(config, key.removeprefix(PREFIX)) or key


def _targets(config: Config, found: Mapping[str, Stored], path: Path) -> list[str]:
    """The modules that have an adapter.  The file tells, where the description may hold patterns."""
    known = _core.model_modules(config)
    there = {found_one[1] for name in found if (found_one := re.search(r"\.\d+\.(.*)\.lora_[AB]\.weight$", name))}
    if not there or not there <= set(known):
        strange = sorted(there - set(known)) or ["nothing"]
        raise CheckpointError(f"{path}: adapts {strange[0][:99]}, must be of {', '.join(known)}")
    return [module for module in known if module in there]


# ---- merged -------------------------------------------------------------------------------------------------------


class _Sum(NamedTuple):
    """A weight with what the adapter adds to it."""

    base: Stored
    A: Stored
    B: Stored
    scale: float
    transposed: bool

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return self.base.parameter_shape

    def read(self, axis: int, where: slice) -> np.ndarray:
        A, B = (tensor.read(0, slice(0, tensor.parameter_shape[0])) for tensor in (self.A, self.B))
        if (axis == 0) != self.transposed:
            B = B[where]
        else:
            A = A[:, where]
        with np.errstate(over="ignore", invalid="ignore"):  # as elsewhere, what is too large is infinite
            added = (np.float32(self.scale) * B) @ A
        return self.base.read(axis, where) + (added.T if self.transposed else added)


class Merged(Source):
    """A base model and an adapter as one model: W + scale * B @ A, computed in float32 as it is read."""

    def __init__(self, path: Path, base: Source, adapter: Adapter, tokenizer):
        stored, transposed = dict(base.stored), hf.is_transposed(base.config)
        parts = adapter.tensors.stored
        for name, A in parts.items():
            stem, is_a, _ = name.partition(".lora_A.weight")
            if is_a:
                B = parts[f"{stem}.lora_B.weight"]
                weight = f"{stem}.weight"
                stored[weight] = _Sum(base.stored[weight], A, B, adapter.lora.scale, transposed)
        super().__init__(path, "an adapter and its base model", base.config, stored, tokenizer)

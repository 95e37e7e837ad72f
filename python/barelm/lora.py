"""Lora: an adapter that is trained in the place of a model's own weights."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from . import _core

__all__ = ["ALL", "Lora"]

ALL = "all-linear"


@dataclass(frozen=True)
class Lora:
    """What an adapter is made of (LoRA, Hu et al. 2021, arXiv:2106.09685): to the product of a linear layer, in @ W^T,
    is added scale * (in @ A^T) @ B^T.  W stays as it is; A (rank, in) and B (out, rank) are trained.

    rank     r, the width between A and B
    alpha    scale is alpha / rank; with `rslora` alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)
    targets  which linear layers have one: "all-linear", or names as PEFT takes them, each of them the end of a
             module's: "q_proj", "mlp.c_proj"

    ValueError naming the field for what cannot be.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | Collection[str] = ALL
    rslora: bool = False

    def __post_init__(self):
        if type(self.rank) is not int or not 1 <= self.rank <= 65536:
            raise ValueError(f"rank: is {self.rank!r}, must be a whole number in [1, 65536]")
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not 0 < abs(self.alpha) < 1e30:
            raise ValueError(f"alpha: is {self.alpha!r}, must be a number that is not 0")
        if type(self.rslora) is not bool:
            raise ValueError(f"rslora: is {self.rslora!r}, must be True or False")
        targets = [self.targets] if isinstance(self.targets, str) else list(self.targets)
        if not targets or not all(isinstance(target, str) and target for target in targets):
            raise ValueError(f"targets: is {self.targets!r}, must be names of modules, or {ALL!r}")
        object.__setattr__(self, "targets", ALL if targets == [ALL] else tuple(dict.fromkeys(targets)))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def modules(self, config) -> list[str]:
        """The modules of a block that have an adapter, e.g. "self_attn.q_proj".  ValueError: a target is none."""
        known = _core.model_modules(config)
        if self.targets == ALL:
            return known
        for target in self.targets:
            if not any(_is_end(target, module) for module in known):
                raise ValueError(f"targets: there is no {target!r}, but {', '.join(known)}")
        return [module for module in known if any(_is_end(target, module) for target in self.targets)]

    def shapes(self, config) -> dict[str, tuple[int, int]]:
        """{name: shape} of A and B of every module, as Model.adapter_params shows them."""
        modules, shapes = self.modules(config), {}
        for name, shape in _core.model_tensors(config).items():
            module = re.fullmatch(r"(?:h|layers)\.\d+\.(.*)\.weight", name)
            if module and module[1] in modules:
                out, into = shape[::-1] if config.norm == "layernorm" else shape  # GPT-2's are stored as (in, out)
                stem = name.removesuffix(".weight")
                shapes |= {f"{stem}.lora_A.weight": (self.rank, into), f"{stem}.lora_B.weight": (out, self.rank)}
        return shapes

    def size(self, config) -> int:
        """Values that are trained."""
        return sum(math.prod(shape) for shape in self.shapes(config).values())


def _is_end(target: str, module: str) -> bool:
    return module == target or module.endswith("." + target)

"""Numbers as files hold them: float32 from their bytes, exactly where a float32 can be, and back, rounded once.

F32, F16 and F64 are IEEE's; BF16 is the upper half of an F32.  Q8_0 (ggml) keeps 32 neighbours as whole numbers from
-127 to 127 with one F16 as their scale: value = scale * number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["KINDS", "Kind", "fits", "from_float32", "n_bytes", "to_float32"]


class Kind(NamedTuple):
    unit: np.dtype  # as it lies in a file, little-endian
    values: int = 1  # in a unit


KINDS = {
    "F32": Kind(np.dtype("<f4")),
    "F16": Kind(np.dtype("<f2")),
    "BF16": Kind(np.dtype("<u2")),
    "F64": Kind(np.dtype("<f8")),
    "Q8_0": Kind(np.dtype([("scale", "<f2"), ("numbers", "i1", 32)]), 32),
}


def fits(shape: Sequence[int], kind: str) -> bool:
    """Whether rows of this shape are whole units."""
    return KINDS[kind].values == 1 or (len(shape) > 0 and shape[-1] % KINDS[kind].values == 0)


def n_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes that a tensor takes."""
    return math.prod(shape) // KINDS[kind].values * KINDS[kind].unit.itemsize


def to_float32(units: np.ndarray, kind: str) -> np.ndarray:
    """A new float32 array (..., n) of units (..., n / values of one).  F64 is rounded, the others are exact."""
    if kind == "BF16":
        return (units.astype(np.uint32) << 16).view(np.float32)
    if kind == "Q8_0":
        values = units["numbers"] * units["scale"][..., None].astype(np.float32)
        return values.reshape(*units.shape[:-1], units.shape[-1] * 32)
    with np.errstate(over="ignore", invalid="ignore"):  # an F64 too large for a float32 is infinite
        return units.astype(np.float32)


def from_float32(values: np.ndarray, kind: str) -> np.ndarray:
    """Units of float32 values (..., n), rounded to nearest, ties to even (Q8_0: away from zero, as llama.cpp does).

    ValueError: a value is too large for the kind.
    """
    if kind == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2")
    with np.errstate(over="ignore", invalid="ignore"):
        units = _q8_0(values) if kind == "Q8_0" else values.astype(KINDS[kind].unit)
    if kind in ("F16", "Q8_0"):
        large = np.abs(values).max(initial=0) if np.isfinite(values).all() else 0.0
        if not np.isfinite(units["scale"] if kind == "Q8_0" else units).all() and np.isfinite(large) and large:
            raise ValueError(f"{large:.4g} is too large for {kind}")
    return units


def _q8_0(values: np.ndarray) -> np.ndarray:
    blocks = values.reshape(*values.shape[:-1], values.shape[-1] // 32, 32)
    scale = np.abs(blocks).max(-1) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    exact = blocks * inverse[..., None]
    units = np.empty(scale.shape, KINDS["Q8_0"].unit)
    units["scale"] = scale
    units["numbers"] = np.trunc(exact + np.copysign(np.float32(0.5), exact))
    return units

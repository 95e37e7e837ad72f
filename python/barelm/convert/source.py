"""Weights where they lie: a Source says what a model is and reads its tensors in parts, whatever file they are in.

Every format's reader makes one, every writer takes one.  A tensor is named and shaped as in `Model.params`; a reader
says where its bytes are and how their order differs, and nothing is read before it is asked for.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import _core
from ..model import Config, Model
from ..tokenizer import legible
from .numbers import KINDS, n_bytes, to_float32

__all__ = [
    "CheckpointError",
    "Source",
    "Stored",
    "Tensors",
    "file_size",
    "half_split",
    "interleaved",
    "match",
    "same_bytes",
    "shapes_of",
]

PART = 1 << 20  # values that are read at a time


class CheckpointError(ValueError):
    """A file of weights that cannot be used; the message names the file and what is wrong with it.

    What it quotes of a file may be anything, and is made legible.
    """

    def __init__(self, message: str):
        super().__init__(legible(message))


class Stored(NamedTuple):
    """A tensor in a file: row after row, without gaps.

    shape        as it lies there
    transposed   as a parameter it has rows and columns the other way round
    order        row i of the parameter is row order[i] of the file (after transposing: its column); None: the same
    """

    path: Path
    offset: int
    kind: str  # one of KINDS
    shape: tuple[int, ...]
    transposed: bool = False
    order: np.ndarray | None = None

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape

    def read(self, axis: int, where: slice) -> np.ndarray:
        """float32: the part `where` along an axis of the parameter.

        The file is opened anew each time: what a mapping has touched counts as memory of this process until it ends.
        """
        if self.transposed:
            axis = 1 - axis
        rows = self._units()
        if axis == 0:
            part = to_float32(rows[where if self.order is None else self.order[where]], self.kind)
        else:
            per_unit = KINDS[self.kind].values
            first = where.start // per_unit
            part = to_float32(rows[:, first : -(-where.stop // per_unit)], self.kind)
            part = part[:, where.start - first * per_unit : where.stop - first * per_unit]
            part = part if self.order is None else part[self.order]
        return part.T if self.transposed else part

    def _units(self) -> np.ndarray:
        """The tensor, mapped for as long as this array lives."""
        kind, size = KINDS[self.kind], n_bytes(self.shape, self.kind)
        shape = (*self.shape[:-1], self.shape[-1] // kind.values)
        gap = self.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with open(self.path, "rb") as file:
                mapping = mmap.mmap(file.fileno(), gap + size, access=mmap.ACCESS_READ, offset=self.offset - gap)
        except (OSError, ValueError) as error:  # ValueError: it has become shorter
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from None
        return np.frombuffer(mapping, kind.unit, math.prod(shape), gap).reshape(shape)


class _Held(NamedTuple):
    """A tensor in memory."""

    values: np.ndarray

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, axis: int, where: slice) -> np.ndarray:
        return self.values[where] if axis == 0 else self.values[:, where]


class Tensors:
    """Named tensors that need never be in memory as a whole.  shapes: {name: shape}."""

    def __init__(self, stored: Mapping[str, Stored | _Held]):
        self.stored = stored
        self.shapes = {name: tensor.parameter_shape for name, tensor in stored.items()}

    def parts(self, name: str, axis: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
        """(where along the axis, float32 values there), one after the other until all of the tensor has come."""
        shape, tensor = self.shapes[name], self.stored[name]
        step = max(1, PART // (math.prod(shape) // shape[axis]))
        for at in range(0, shape[axis], step):
            where = slice(at, min(at + step, shape[axis]))
            yield where, tensor.read(axis, where)

    def rows(self, name: str, axis: int = 0) -> Iterator[np.ndarray]:
        """The values of `parts` alone."""
        for _, part in self.parts(name, axis):
            yield part

    def fill(self, targets: Mapping[str, np.ndarray]) -> None:
        """Read each of the targets' names into its array."""
        for name, target in targets.items():
            axis = int(getattr(self.stored[name], "transposed", False))  # along the rows of the file
            for where, part in self.parts(name, axis):
                target[(slice(None),) * axis + (where,)] = part


class Source(Tensors):
    """A model that can be read, by itself or by its parts.

    config     Config
    shapes     {name: shape} of its parameters, as in Model.params
    path       the file or folder it comes from
    format     what that is, in words
    kinds      how its tensors are stored: {"F32", ...}
    tokenizer  its Tokenizer, or None where there is none
    """

    def __init__(
        self,
        path: Path,
        format: str,
        config: Config,
        stored: Mapping[str, Stored | _Held],
        tokenizer: Callable[[], object] = lambda: None,
    ):
        super().__init__(stored)
        self.path, self.format, self.config = path, format, config
        self._tokenizer, self._made = tokenizer, None

    @classmethod
    def of_model(cls, model: Model, tokenizer=None) -> Source:
        """A model in memory.  ValueError: it has an adapter, which a saved one's folder is read with."""
        if model.adapter:
            raise ValueError("model: has an adapter; save it, and its folder can be read as one model")
        stored = {name: _Held(p) for name, p in model.params.items()}
        return cls(Path(), "a model in memory", model.config, stored, lambda: tokenizer)

    def fill_model(self, model: Model) -> None:
        """Read all weights into a model of this config, however it holds them."""
        if model.has_views:
            self.fill(model.params)
            return
        transposed = model.transposed
        for name in self.shapes:
            by_columns = name in transposed
            for where, part in self.parts(name, axis=int(by_columns)):
                model.put(name, where.start, np.ascontiguousarray(part.T if by_columns else part))

    @property
    def tokenizer(self):
        if self._made is None:
            self._made = self._tokenizer()
        return self._made

    def with_tokenizer(self, tokenizer) -> Source:
        """The same model with another tokenizer; None: with none."""
        return Source(self.path, self.format, self.config, self.stored, lambda: tokenizer)

    @property
    def kinds(self) -> set[str]:
        return {getattr(tensor, "kind", "F32") for tensor in self.stored.values()}

    @property
    def n_params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


def match(
    found: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], rename, path: Path, said: str
) -> dict[str, Stored]:
    """Exactly the tensors of `shapes`, in its order, out of those that a file has.

    rename   what a name in the file means; None: nothing that is wanted
    said     where the shapes come from, for the message
    CheckpointError: one is missing, has another shape, comes twice, or is not known.
    """
    tensors: dict[str, Stored] = {}
    for key, stored in found.items():
        name = rename(key)
        if name is None:
            continue
        if name not in shapes or name in tensors:
            raise CheckpointError(f"{path}: has {key[:99]}, which the model of {said} has not (or it comes twice)")
        if stored.parameter_shape != shapes[name]:
            raise CheckpointError(f"{path}: {key} has shape {stored.parameter_shape}, {said} says {shapes[name]}")
        if stored.kind not in KINDS:
            raise CheckpointError(f"{path}: {key[:99]} has dtype {stored.kind}, must be one of {', '.join(KINDS)}")
        tensors[name] = stored
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{path}: lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}")
    return {name: tensors[name] for name in shapes}


def same_bytes(a: Stored, b: Stored) -> bool:
    """Whether two tensors lie in their files with the same bytes, compared until they differ."""
    if (a.kind, a.shape) != (b.kind, b.shape):
        return False
    size, step = n_bytes(a.shape, a.kind), 4 * PART
    try:
        with open(a.path, "rb") as one, open(b.path, "rb") as other:
            one.seek(a.offset)
            other.seek(b.offset)
            return all(
                one.read(min(step, size - at)) == other.read(min(step, size - at)) for at in range(0, size, step)
            )
    except OSError as error:
        raise CheckpointError(f"{a.path}: cannot be read: {error}") from None


def shapes_of(config: Config, found: int, path: Path, said: str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a model's parameters.  CheckpointError where the file cannot have them all: a number in it must
    not make us write down the names of a billion layers."""
    if config.n_layer > found:
        raise CheckpointError(f"{path}: lacks most of the {config.n_layer:,} layers of {said}: it has {found} tensors")
    return _core.model_tensors(config)


def half_split(heads: int, head_size: int) -> np.ndarray:
    """order of rows for queries and keys whose rotary pairs lie side by side in the file (2i, 2i + 1), as llama2.c and
    GGUF have them; the parameter has the first halves of all pairs before the second ones (i, i + head_size / 2)."""
    pairs = np.arange(heads * head_size).reshape(heads, head_size // 2, 2)
    return pairs.transpose(0, 2, 1).reshape(-1)


def interleaved(heads: int, head_size: int) -> np.ndarray:
    """The way back: rows of the parameter in the order that llama2.c and GGUF want."""
    return np.argsort(half_split(heads, head_size))


def file_size(path: Path) -> int:
    """CheckpointError: it cannot be read, or is no file."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in its name
        raise CheckpointError(f"{path}: is not there") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is no file")
    return status.st_size

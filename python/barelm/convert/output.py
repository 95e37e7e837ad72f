"""What the writers of formats share: a file that appears whole or not at all, and a tensor that comes in parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .numbers import KINDS, n_bytes

__all__ = ["Tensor", "whole_file", "write_parts"]


@contextmanager
def whole_file(path: str | os.PathLike, is_ours: Callable[[Path], bool], what: str) -> Iterator[BinaryIO]:
    """A hidden file to write into; once the block is left without an error, `path` is replaced by it in one step.

    is_ours   whether an existing file is one that may be replaced
    what      what such a file is called, for the message
    FileExistsError if the file is something else; where the block raises, nothing has changed and nothing is left.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_file() and is_ours(path)):
        raise FileExistsError(f"{path}: exists and is no {what}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk too."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Tensor(NamedTuple):
    """What is to be written."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]  # in the order of the file, as units of the kind


def write_parts(file: BinaryIO, tensor: Tensor) -> None:
    """TypeError, ValueError: what came is not the tensor's kind or shape."""
    written = 0
    for units in tensor.parts:
        if units.dtype != KINDS[tensor.kind].unit:
            raise TypeError(f"{tensor.name}: {units.dtype} is not {tensor.kind}")
        file.write(np.ascontiguousarray(units).data.cast("B") if units.dtype.names is None else units.tobytes())
        written += units.nbytes
    if written != n_bytes(tensor.shape, tensor.kind):
        raise ValueError(f"{tensor.name}: {written} bytes came, which is not its shape {tensor.shape}")

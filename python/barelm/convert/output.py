"""Single files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["whole_file"]


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

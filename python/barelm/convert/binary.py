"""Headers of binary files, read in order: no count in them is believed beyond what the file has."""

from __future__ import annotations

import struct
from pathlib import Path

from .source import CheckpointError, file_size

__all__ = ["Binary"]


class Binary:
    """A file that is read from its beginning.  CheckpointError names the file, and what it was that it lacks."""

    def __init__(self, path: Path):
        self.path, self.size, self.at = path, file_size(path), 0
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    def __enter__(self) -> Binary:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, n: int, what: str) -> bytes:
        """The next n bytes."""
        if not 0 <= n <= self.left:
            raise self.error(f"{what}: {n:,} bytes are wanted at byte {self.at:,}, the file has {self.size:,}")
        data = self._file.read(n)
        if len(data) < n:
            raise self.error(f"{what}: the file has become shorter")
        self.at += n
        return data

    def skip(self, n: int, what: str) -> None:
        if not 0 <= n <= self.left:
            raise self.error(f"{what}: {n:,} bytes are wanted at byte {self.at:,}, the file has {self.size:,}")
        self._file.seek(n, 1)
        self.at += n

    def numbers(self, form: str, what: str) -> tuple:
        """Little-endian numbers, as struct names them."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def text(self, n: int, what: str) -> str:
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what}: is not UTF-8 ({error.reason})") from None

    def error(self, says: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {says}")

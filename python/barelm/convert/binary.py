"""Headers of binary files, read in order: no count in them is believed beyond what the file has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from struct import Struct

from .source import CheckpointError, file_size

__all__ = ["Binary"]

BLOCK = 1 << 16  # bytes that are read at a time, if not more are asked for


class Binary:
    """A file that is read from its beginning.  CheckpointError names the file, and what it was that it lacks."""

    def __init__(self, path: Path):
        self.path, self.size, self.at = path, file_size(path), 0
        self._block, self._block_at = b"", 0  # a part of the file, and where it begins
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    def __enter__(self) -> Binary:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, n: int, what: str) -> bytes:
        """The next n bytes."""
        start = self._place(n, what)
        return self._block[start : start + n]

    def skip(self, n: int, what: str) -> None:
        self._check(n, what)
        self.at += n

    def numbers(self, form: str, what: str) -> tuple:
        """Little-endian numbers, as struct names them."""
        numbers = _struct(form)
        start = self._place(numbers.size, what)
        return numbers.unpack_from(self._block, start)

    def text(self, n: int, what: str) -> str:
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what}: is not UTF-8 ({error.reason})") from None

    def texts(self, count: int, what: str) -> list[str]:
        """So many texts, each behind its length in eight bytes."""
        try:
            return [data.decode() for data in self._strings(count, what, True)]
        except UnicodeDecodeError as error:
            raise self.error(f"{what}: is not UTF-8 ({error.reason})") from None

    def skip_texts(self, count: int, what: str) -> None:
        for _ in self._strings(count, what, False):
            pass

    def error(self, says: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {says}")

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _place(self, n: int, what: str) -> int:
        """Where in the block the next n bytes begin, which then count as taken."""
        start = self.at - self._block_at
        if n < 0 or start + n > len(self._block):
            self._check(n, what)
            start, self._block_at = 0, self.at
            self._block = os.pread(self._file, max(n, BLOCK), self.at)
            if len(self._block) < n:
                raise self.error(f"{what}: the file has become shorter")
        self.at += n
        return start

    def _check(self, n: int, what: str) -> None:
        if not 0 <= n <= self.left:
            raise self.error(f"{what}: {n:,} bytes are wanted at byte {self.at:,}, the file has {self.size:,}")

    def _strings(self, count: int, what: str, wanted: bool) -> Iterator[bytes]:
        """The bytes of each; where they are not wanted long ones are passed over."""
        for _ in range(count):
            start = self.at - self._block_at + 8
            n = int.from_bytes(self._block[start - 8 : start], "little")
            if start + n <= len(self._block):
                self.at += 8 + n
                yield self._block[start : start + n]
            elif wanted:  # it does not lie in the block as a whole
                yield self.take(self.numbers("Q", what)[0], what)
            else:
                self.skip(self.numbers("Q", what)[0], what)


@lru_cache
def _struct(form: str) -> Struct:
    return Struct("<" + form)

"""Tokens: one row of them, in memory or in shards, and the batches and windows that are read from it.

A shard is a file in llm.c's form, all little-endian: 256 int32, of which the first are magic, version and the number of
tokens, then the tokens.  Magic 20240520 with version 1: uint16; magic 20240801 with version 7: uint32.

Shards are read with pread, out of the system's cache, and not through a mapping: a file that shrinks under a mapping
kills the process, here it is an error with a name.
"""

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from .. import _core
from ..tokenizer import Tokenizer
from .documents import Document

__all__ = ["FORMS", "HEADER", "Piece", "Shard", "Tokens", "document_starts", "encode"]

HEADER = 256  # int32
FORMS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # (magic, version): tokens
MAX_READ = 1 << 28  # tokens of one read: Linux gives less than 2 GiB at a time
GROUP = 1 << 18  # bytes of text that a thread encodes at a time, or one document


class _Part(Protocol):
    def __len__(self) -> int: ...
    def read(self, start: int, stop: int) -> np.ndarray: ...  # int32
    def cut(self, start: int, stop: int) -> "_Part": ...


class _Memory:
    """Tokens in an array."""

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._tokens[start:stop]

    def cut(self, start: int, stop: int) -> "_Memory":
        return _Memory(self._tokens[start:stop])


@dataclass(frozen=True)
class Shard:
    """Some of the tokens of a file, which must stay as it was when it was opened."""

    path: Path
    dtype: np.dtype
    first: int
    n: int
    stamp: tuple  # what a changed file has otherwise

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Check header and size.  ValueError: what is wrong with them."""
        with open(path, "rb") as file:
            header = file.read(4 * HEADER)
            status = os.fstat(file.fileno())
        if len(header) < 4 * HEADER:
            raise ValueError(f"{path}: is cut off, {len(header)} bytes are less than a header")
        magic, version, n = np.frombuffer(header, "<i4", 3).tolist()
        dtype = FORMS.get((magic, version))
        if dtype is None:
            known = " or ".join(f"{magic} with version {version}" for magic, version in FORMS)
            raise ValueError(f"{path}: is no token shard (magic {magic}, version {version}; must be {known})")
        want = 4 * HEADER + n * dtype.itemsize
        if n < 0 or status.st_size != want:
            fault = "is cut off" if status.st_size < want else "is damaged or has something behind its end"
            raise ValueError(f"{path}: {fault}: {status.st_size} bytes, but the header says {n} tokens")
        return cls(path, dtype, 0, n, _stamp(status))

    def __len__(self) -> int:
        return self.n

    def read(self, start: int, stop: int) -> np.ndarray:
        place, size = 4 * HEADER + (self.first + start) * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        file = os.open(self.path, os.O_RDONLY)
        try:
            changed = _stamp(os.fstat(file)) != self.stamp
            data = b"" if changed else os.pread(file, size, place)
        finally:
            os.close(file)
        if len(data) != size:
            raise OSError(f"{self.path}: was changed, cut off or replaced while it was in use")
        return np.frombuffer(data, self.dtype).astype(np.int32)

    def cut(self, start: int, stop: int) -> "Shard":
        return Shard(self.path, self.dtype, self.first + start, stop - start, self.stamp)


def _stamp(status: os.stat_result) -> tuple:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Tokens:
    """One row of tokens, in memory or in shards; each document in it begins with the tokenizer's bos.

    lengths   (n_vocab) int64: bytes of text that each id stands for, so that bits per byte is exact
    Reading raises OSError where a shard has been changed since it was opened.
    """

    def __init__(self, parts: Iterable[_Part], lengths: np.ndarray):
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._parts)))
        self.lengths = lengths

    @classmethod
    def encode(cls, documents: Iterable[Document | tuple[str, bytes | str]], tok: Tokenizer) -> "Tokens":
        """In memory, from documents or from (name, text) pairs."""
        pieces = (Piece(document[1], getattr(document, "begins", True)) for document in documents)
        ids = [part for _, part in encode(pieces, tok)]
        return cls([_Memory(np.concatenate([np.zeros(0, np.int32), *ids]))], tok.token_lengths())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1, int32; 0 <= start <= stop <= len."""
        found = []
        i = bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[i] - len(self._parts[i])
            end = min(stop, self._ends[i], start + MAX_READ)
            found.append(self._parts[i].read(start - first, end - first))
            start, i = end, i + (end == self._ends[i])
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int32), *found])

    def cut(self, start: int, stop: int) -> "Tokens":
        """The tokens start .. stop - 1 as Tokens of their own; nothing is read."""
        firsts = [end - len(part) for part, end in zip(self._parts, self._ends, strict=True)]
        parts = [
            part.cut(max(start - first, 0), min(stop - first, len(part)))
            for part, first in zip(self._parts, firsts, strict=True)
            if first < stop and first + len(part) > start
        ]
        return Tokens(parts, self.lengths)

    def check(self, T: int, what: str) -> None:
        """ValueError where there are too few tokens for one window of T; `what` names the data in the message."""
        if len(self) < T + 1:
            raise ValueError(f"context: a window of {T} needs {T + 1} tokens, the {what} has only {len(self)}")

    def batch(
        self,
        step: int,
        micro: int,
        B: int,
        T: int,
        seed: int = 0,
        order: Literal["random", "sequential"] = "random",
        per_step: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), (B, T) int32 each: micro-batch number `micro` of the `per_step` that `step` has.

        order   "random": windows at random places, with repetition.  The places come from a counter-based generator
                (Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by (seed, step,
                micro): a resumed run draws what the uninterrupted one would have drawn.  Raw words are used because
                NumPy promises their values, not those of `integers`.
                "sequential": windows that follow each other through all tokens, and at their end on from the beginning.
        """
        self.check(T, "data")
        if order == "random":
            words = np.random.Philox(key=[seed % 2**64, 0], counter=[0, 0, micro, step]).random_raw(B)
            places = len(self) - T  # how many windows there are
            starts = [int(word) * places >> 64 for word in words]
        elif order == "sequential":
            if not 0 <= micro < per_step:
                raise ValueError(f"micro: is {micro}, a step has {per_step} micro-batches")
            first = (step * per_step + micro) * B
            starts = [(first + b) * T % len(self) for b in range(B)]
        else:
            raise ValueError(f"order: is {order!r}, must be 'random' or 'sequential'")
        windows = np.stack([self._around(start, T + 1) for start in starts])
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def _around(self, start: int, n: int) -> np.ndarray:
        """n <= len tokens from `start`; the first follow the last."""
        stop = start + n
        if stop <= len(self):
            return self.read(start, stop)
        return np.concatenate([self.read(start, len(self)), self.read(0, stop - len(self))])

    def windows(self, B: int, T: int, batches: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yield (tokens, targets, bytes) for windows that follow each other, B at a time: every token but the very
        first is a target once.  The places after the end have target -1; `bytes` is how much text the targets stand
        for.  At most `batches` batches, from the beginning.
        """
        n = len(self) - 1  # targets
        rows = -(-n // T)
        for first in range(0, rows, B)[:batches]:
            B_here = min(B, rows - first)
            tokens, targets = np.zeros((2, B_here * T), np.int32)
            targets.fill(-1)
            here = self.read(first * T, min((first + B_here) * T, n) + 1)
            tokens[: len(here) - 1], targets[: len(here) - 1] = here[:-1], here[1:]
            yield tokens.reshape(B_here, T), targets.reshape(B_here, T), int(self.lengths[here[1:]].sum())


def document_starts(tokens: np.ndarray, bos: int) -> np.ndarray:
    """For Model.forward(starts=), (B, T) int32: where the document of each token begins in its row, which is the last
    bos at or before it, or 0.  Attention then stays within documents."""
    places = np.where(tokens == bos, np.arange(tokens.shape[1], dtype=np.int32), np.int32(0))
    return np.maximum.accumulate(places, axis=1)


# ---- encoding -----------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    text: bytes | str
    begins: bool = True  # with bos in front
    held_out: bool = False


def encode(pieces: Iterable[Piece], tok: Tokenizer) -> Iterator[tuple[bool, np.ndarray]]:
    """(held_out, ids) in the order of the pieces; those of several pieces that follow each other may come as one.

    Several threads encode (tiktoken lets others run meanwhile), and only so far ahead that memory is bounded.
    """
    bos = np.array([tok.bos], np.int32)

    def ids_of(group: list[Piece]) -> list[tuple[bool, np.ndarray]]:
        found = []
        for held_out, run in groupby(group, key=lambda piece: piece.held_out):
            parts = [part for piece in run for part in (bos[: piece.begins], tok.encode_to_array(piece.text))]
            found.append((held_out, np.concatenate(parts)))
        return found

    threads = min(8, _core.threads_get())
    pool, ahead = ThreadPoolExecutor(threads), deque()
    try:
        for group in _groups(pieces):
            ahead.append(pool.submit(ids_of, group))
            if len(ahead) > threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Short texts together: handing each to a thread would take longer than encoding it."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group

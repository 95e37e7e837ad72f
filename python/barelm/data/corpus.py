"""Text on disk to arrays of tokens: reading documents, the split into training and validation, and batches.

The offline default is the Python standard library of the interpreter that runs barelm: real text on every machine.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..tokenizer import Tokenizer

__all__ = ["Corpus", "TokenData", "read_documents"]

# Not text about Python but its tests, its editor's innards, what others installed, and what the build left behind.
STDLIB_SKIP = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__"}
STDLIB_SKIP_PREFIX = ("_sysconfigdata", "__phello__")


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    documents   (name, text) each; names are paths below the source, with "/"
    source      what was read, for people
    repaired    how many documents had bytes that are not UTF-8 (each such run became U+FFFD)
    skipped     how many files were left out: they hold a zero byte, so they are no text, or they are empty
    """

    documents: list[tuple[str, str]]
    source: str
    repaired: int = 0
    skipped: int = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.documents)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def n_bytes(self) -> int:
        """Bytes of UTF-8 text."""
        return sum(len(text.encode()) for _, text in self.documents)

    def hash(self) -> str:
        """sha256 over the names and texts: the same corpus, the same hash, wherever it lies."""
        digest = hashlib.sha256()
        for name, text in self.documents:
            for part in (name.encode("utf-8", "surrogateescape"), text.encode()):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.hexdigest()

    def split(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """(training, validation) documents.

        One document: its last tenth is for validation.  Several: the tenth whose names have the lowest hashes, at least
        one, so that a document's side does not depend on the order in which a system lists its files.
        """
        if len(self.documents) == 1:
            ((name, text),) = self.documents
            cut = len(text) * 9 // 10
            return [(name, text[:cut])], [(name, text[cut:])]
        by_hash = sorted(name for name, _ in self.documents)
        by_hash.sort(key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
        held_out = set(by_hash[: max(1, len(by_hash) // 10)])
        train = [document for document in self.documents if document[0] not in held_out]
        return train, [document for document in self.documents if document[0] in held_out]


def read_documents(path: str | os.PathLike | None = None) -> Corpus:
    """The documents of a text file, of a folder (every text file below it), or of the standard library (None).

    Hidden files and folders are passed over.  FileNotFoundError: no such path.  ValueError: no text in it.
    """
    if path is None:
        return _read_stdlib()
    path = Path(path)
    if path.is_dir():
        names = sorted(_walk(path, skip=lambda name: name.startswith(".")))
    elif path.is_file():
        path, names = path.parent, [path.name]
    elif path.exists():
        raise ValueError(f"{path}: neither a file nor a folder")
    else:
        raise FileNotFoundError(f"{path}: no such file or folder")
    source = str(path / names[0]) if len(names) == 1 else str(path)
    return _read_all(path, names, source)


def _read_stdlib() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    if root.is_dir():
        names = [
            name
            for name in _walk(root, skip=lambda name: name in STDLIB_SKIP)
            if name.endswith(".py") and not name.rsplit("/", 1)[-1].startswith(STDLIB_SKIP_PREFIX)
        ]
    if not names:
        raise ValueError(f"{root}: this Python keeps no .py files of its standard library there; name a text to read")
    return _read_all(root, sorted(names), "the Python standard library")


def _walk(root: Path, skip) -> Iterator[str]:
    """Paths, relative to root and with "/", of the regular files below it."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = sorted(name for name in folders if not skip(name))
        for name in files:
            path = Path(folder, name)
            if not skip(name) and path.is_file():  # a pipe or a socket would block the reader
                yield path.relative_to(root).as_posix()


def _read_all(root: Path, names: list[str], source: str) -> Corpus:
    documents, repaired, skipped = [], 0, 0
    for name in names:
        data = (root / name).read_bytes()
        if not data or b"\0" in data:
            skipped += 1
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text, repaired = data.decode("utf-8", "replace"), repaired + 1
        documents.append((name, text))
    if not documents:
        raise ValueError(f"{source}: no text here ({len(names)} files, {skipped} of them empty or not text)")
    return Corpus(documents, source, repaired, skipped)


@dataclass(frozen=True)
class TokenData:
    """Documents as one row of tokens, each beginning with the end-of-text token.

    tokens    (N) int32
    lengths   (n_vocab) int64: bytes of text that each id stands for, so that bits per byte is exact
    """

    tokens: np.ndarray
    lengths: np.ndarray = field(repr=False)

    @classmethod
    def encode(cls, documents: list[tuple[str, str]], tok: Tokenizer) -> "TokenData":
        eot = np.array([tok.eot], np.int32)
        parts = [part for _, text in documents for part in (eot, tok.encode_to_array(text))]
        return cls(np.concatenate([np.zeros(0, np.int32), *parts]), tok.token_lengths())

    def __len__(self) -> int:
        return len(self.tokens)

    def check(self, T: int, what: str) -> None:
        """ValueError where there are too few tokens for one window of T; `what` names the data in the message."""
        if len(self) < T + 1:
            raise ValueError(f"context: a window of {T} needs {T + 1} tokens, the {what} has only {len(self)}")

    def batch(self, step: int, micro: int, B: int, T: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets), (B, T) int32 each: B windows at random places, with repetition.

        The places come from a counter-based generator (Philox: Salmon et al. 2011, "Parallel random numbers: as easy as
        1, 2, 3") keyed by (seed, step, micro): a resumed run draws what the uninterrupted one would have drawn.  Raw
        words are used because NumPy promises their values, not those of `integers`.
        """
        self.check(T, "data")
        words = np.random.Philox(key=[seed % 2**64, 0], counter=[0, 0, micro, step]).random_raw(B)
        places = len(self) - T  # how many windows there are
        starts = [int(word) * places >> 64 for word in words]
        windows = np.stack([self.tokens[start : start + T + 1] for start in starts])
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

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
            here = self.tokens[first * T : min((first + B_here) * T, n) + 1]
            tokens[: len(here) - 1], targets[: len(here) - 1] = here[:-1], here[1:]
            yield tokens.reshape(B_here, T), targets.reshape(B_here, T), int(self.lengths[here[1:]].sum())

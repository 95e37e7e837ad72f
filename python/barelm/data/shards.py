"""Datasets: documents encoded once, split into what is learnt from and what is held out, and written as token shards.

A dataset is a folder:
  train_000000.bin ... val_000000.bin ...     shards in llm.c's form (tokens.py); each document begins with bos
  tokenizer.json      the vocabulary of the ids
  dataset.json        what was read, how it was split, size and SHA-256 of every shard, SHA-256 of itself
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import _core
from ..files import digest, digest_of, whole_folder
from ..tokenizer import Tokenizer
from .documents import Document, Documents, character_start
from .tokens import FORMS, HEADER, Piece, Shard, Tokens, document_starts, encode

__all__ = ["Dataset", "Tokens", "document_starts", "is_dataset", "write_dataset"]

MAX_TOKENS = 2**31 - 1  # in a shard
SIDECAR = "dataset.json"
FORMAT = 1  # of the sidecar
BLOCK = 1 << 22  # tokens of a foreign shard that are looked at together


# ---- the split ----------------------------------------------------------------------------------------------------


def split(documents: Iterable[Document], seed: int, fraction: float) -> Iterator[Piece]:
    """Every document on its side, in one pass.

    A document is held out where sha256(seed, its bytes), as a number in [0, 1), is below `fraction`: its name and place
    change nothing, and equal documents go to the same side.  The one with the lowest number is kept until the end and
    then goes where nothing is yet, so that of two documents or more one is on either side.  Of a document that is
    alone, and of each part of a very long one, the end is held out.
    """
    lowest, met = None, {False: 0, True: 0}
    for document, is_part in _with_next(documents):
        if is_part:
            at = character_start(document.data, len(document.data) - int(len(document.data) * fraction))
            pieces = [Piece(document.data[:at]), Piece(document.data[at:], held_out=True)]
        elif lowest is None:
            lowest, pieces = (_number(document.data, seed), document.data), []
        else:
            lowest, (number, data) = sorted([lowest, (_number(document.data, seed), document.data)])
            pieces = [Piece(data, held_out=number < fraction)]
        for piece in pieces:
            if piece.text:
                met[piece.held_out] += 1
                yield piece
    if lowest is not None:
        number, data = lowest
        yield Piece(data, held_out=bool(met[False]) and (number < fraction or not met[True]))


def _number(data: bytes, seed: int) -> float:
    digest = hashlib.sha256(seed.to_bytes(8, "little") + hashlib.sha256(data).digest()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _with_next(documents: Iterable[Document]) -> Iterator[tuple[Document, bool]]:
    """Each document, and whether it is a part of a longer one, or all there is."""
    last, alone = None, True
    for document in documents:
        if last is not None:
            yield last, not (last.begins and document.begins)
            alone = False
        last = document
    if last is not None:
        yield last, alone or not last.begins


# ---- writing ------------------------------------------------------------------------------------------------------


def write_dataset(
    documents: Documents,
    tok: Tokenizer,
    folder: str | os.PathLike,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    shard_tokens: int = 100_000_000,
    progress: Callable[[Documents, int], None] | None = None,
) -> "Dataset":
    """Encode every document into shards in `folder`, which appears whole or not at all; an older dataset is replaced.

    val_fraction   how much is held out, in (0, 1); which documents, `seed` decides (see split)
    shard_tokens   tokens in a shard, the last of each side has fewer
    progress       called now and then with the documents (counts, done, size) and the tokens written so far
    FileExistsError if the folder holds something else.  ValueError: no text, or an argument is out of its range.
    OSError: a file cannot be read, or the folder not be written.
    """
    check_split(val_fraction, seed, shard_tokens)
    with whole_folder(folder, lambda path: (path / SIDECAR).is_file(), "dataset") as part:
        sides = [_Writer(part, name, tok, shard_tokens) for name in ("train", "val")]
        tokens = 0
        try:
            for held_out, ids in encode(split(documents, seed, val_fraction), tok):
                sides[held_out].add(ids)
                tokens += len(ids)
                if progress:
                    progress(documents, tokens)
            for side in sides:
                side.end_shard()
        finally:
            for side in sides:
                side.close()
        check_found(documents)
        tok.save(part)
        shards = [shard | digest(part / shard["name"]) for side in sides for shard in side.shards]
        (part / SIDECAR).write_bytes(_sidecar(documents, tok, shards, val_fraction, seed))
    return Dataset.open(folder)


def check_split(val_fraction: float, seed: int, shard_tokens: int) -> None:
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction: is {val_fraction}, must be above 0 and below 1")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: is {seed}, must be 0 or more and below 2^64")
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise ValueError(f"shard_tokens: is {shard_tokens}, must be 1 or more and below 2^31")


def check_found(documents: Documents) -> None:
    """ValueError where a pass found no text; it says what there was instead."""
    counts = documents.counts
    if counts.documents == 0:
        first = "".join(f"; {name}: {why}" for name, why in counts.refused_first[:1])
        raise ValueError(f"{documents.source}: no text here ({counts.empty} empty, {counts.refused} refused{first})")


class _Writer:
    """The shards of one side, one after the other."""

    def __init__(self, folder: Path, name: str, tok: Tokenizer, limit: int):
        self._folder, self._name, self._limit, self._lengths = folder, name, limit, tok.token_lengths()
        self._form = next(form for form, dtype in FORMS.items() if tok.n_vocab <= 1 << (8 * dtype.itemsize))
        self._file, self.shards = None, []

    def add(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._file is None:
                self._begin_shard()
            shard = self.shards[-1]
            here, ids = np.split(ids, [self._limit - shard["tokens"]])
            self._file.write(here.astype(FORMS[self._form]).data)
            shard["tokens"] += len(here)
            shard["text_bytes"] += int(self._lengths[here].sum())
            if shard["tokens"] == self._limit:
                self.end_shard()

    def _begin_shard(self) -> None:
        name = f"{self._name}_{len(self.shards):06}.bin"
        self._file = open(self._folder / name, "wb")  # noqa: SIM115  (until the shard is full)
        self._file.write(bytes(4 * HEADER))
        self.shards.append({"name": name, "tokens": 0, "text_bytes": 0})

    def end_shard(self) -> None:
        if self._file is not None:
            header = np.zeros(HEADER, "<i4")
            header[:3] = *self._form, self.shards[-1]["tokens"]
            self._file.seek(0)
            self._file.write(header.data)
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _sidecar(documents: Documents, tok: Tokenizer, shards: list[dict], val_fraction: float, seed: int) -> bytes:
    counts = documents.counts
    return _seal(
        {
            "format": FORMAT,
            "corpus": counts.hash,
            "tokenizer": tok.hash(),
            "val_fraction": val_fraction,
            "seed": seed,
            "shards": shards,
            "summary": summary(documents, sum(shard["tokens"] for shard in shards)),
        }
    )


def summary(documents: Documents, tokens: int) -> dict:
    """What a pass met, for reports."""
    counts = documents.counts
    return {
        "source": documents.source,
        "documents": counts.documents,
        "bytes": counts.bytes,
        "tokens": tokens,
        "longest": list(counts.longest),
        "empty": counts.empty,
        "refused": counts.refused,
        "refused_first": [list(pair) for pair in counts.refused_first],
        "not_utf8": counts.not_utf8,
        "not_utf8_first": list(counts.not_utf8_first),
    }


def _seal(values: dict) -> bytes:
    return (json.dumps(values | {"sha256": digest_of(values)}, indent=1) + "\n").encode()


# ---- a dataset ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Text to learn from and text that is held out, as tokens.

    identity   {"corpus", "tokenizer", "split"}: equal for equal data, wherever it lies; what a run learns from
    summary    source, documents, bytes, tokens, longest [name, bytes], empty, refused, refused_first [[name, why]],
               not_utf8, not_utf8_first: what went in, as far as it is known
    """

    train: Tokens
    validation: Tokens
    tok: Tokenizer
    identity: dict[str, str]
    summary: dict = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike, tok: Tokenizer | None = None) -> "Dataset":
        """A folder that write_dataset wrote; or shards made by others: a folder of .bin files, one file, or a pattern.

        Shards made by others need `tok`.  Files with "val" in their name are held out; if there are none, the last
        tenth of the tokens is.  Every byte is checked.  FileNotFoundError: there is nothing.  ValueError: the name of
        the file and what is wrong with it.
        """
        if (Path(path) / SIDECAR).is_file():
            return _open_own(Path(path), tok)
        return _open_foreign(os.fspath(path), tok)


def is_dataset(path: str | os.PathLike) -> bool:
    """Whether Dataset.open is for this path: a folder that write_dataset wrote, a .bin file or a pattern of them, or a
    folder with shards in it.  Says nothing about their content."""
    if (Path(path) / SIDECAR).is_file():
        return True
    return any(_magic(found) in {magic for magic, _ in FORMS} for found in _bin_files(os.fspath(path))[:1])


def _magic(path: Path) -> int:
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little")


def _bin_files(path: str) -> list[Path]:
    pattern = os.path.join(glob.escape(path), "*.bin") if os.path.isdir(path) else path
    names = [path] if os.path.isfile(path) else sorted(glob.glob(pattern, recursive=True))
    return [Path(name) for name in names if name.endswith(".bin") and os.path.isfile(name)]


def _open_own(folder: Path, tok: Tokenizer | None) -> Dataset:
    values = _read_sidecar(folder / SIDECAR)
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"{folder / SIDECAR}: format {values['format']} is not one that this version reads")
        identity = {"corpus": str(values["corpus"]), "tokenizer": str(values["tokenizer"])}
        identity["split"] = f"val_fraction {values['val_fraction']}, seed {values['seed']}"
        entries = [(entry["name"], (entry["tokens"], entry["bytes"], entry["sha256"])) for entry in values["shards"]]
        found = {**values["summary"]}
    except (KeyError, TypeError):
        raise ValueError(f"{folder / SIDECAR}: is not the description of a dataset") from None
    own = _own_tokenizer(folder, identity["tokenizer"])
    if tok is not None and tok.hash() != identity["tokenizer"]:
        raise ValueError(f"tokenizer: {folder} was made with another vocabulary ({own!r} instead of {tok!r})")
    with ThreadPoolExecutor(min(8, _core.threads_get())) as pool:
        shards = list(pool.map(lambda entry: _own_shard(folder, *entry), entries))
    sides = [[shard for shard in shards if shard.path.name.startswith(name)] for name in ("train_", "val_")]
    train, validation = (Tokens(side, own.token_lengths()) for side in sides)
    return Dataset(train, validation, own, identity, found)


def _read_sidecar(path: Path) -> dict:
    data = path.read_bytes()
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is not a JSON object")
    if _seal({name: value for name, value in values.items() if name != "sha256"}) != data:
        raise ValueError(f"{path}: was altered after it was written (its checksum differs)")
    return values


def _own_tokenizer(folder: Path, want: str) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is missing")
    if digest(path)["sha256"] != want:
        raise ValueError(f"{path}: was altered after it was written (its checksum differs)")
    return Tokenizer.load(path)


def _own_shard(folder: Path, name: str, want: tuple[int, int, str]) -> Shard:
    if not isinstance(name, str) or not re.fullmatch(r"(train|val)_\d{6,}\.bin", name):
        raise ValueError(f"{folder / SIDECAR}: {name!r} is not the name of a shard")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: is missing")
    shard, have = Shard.open(path), digest(path)
    if (shard.n, have["bytes"], have["sha256"]) != want:
        raise ValueError(f"{path}: was altered after it was written (its checksum differs)")
    return shard


def _open_foreign(path: str, tok: Tokenizer | None) -> Dataset:
    paths = _bin_files(path)
    if not paths:
        raise FileNotFoundError(f"{path}: neither a dataset ({SIDECAR}) nor shards (.bin) here")
    if tok is None:
        raise ValueError(f"tokenizer: must be given, for {paths[0]} does not say whose ids it holds")
    with ThreadPoolExecutor(min(8, _core.threads_get())) as pool:
        looked = list(pool.map(lambda path: _look_at(path, tok), paths))
    held_out = [seen for seen in looked if "val" in seen.shard.path.name]
    rest = [seen for seen in looked if "val" not in seen.shard.path.name]
    train, validation = (Tokens([seen.shard for seen in side], tok.token_lengths()) for side in (rest, held_out))
    if not held_out:
        whole, at = train, len(train) * 9 // 10
        train, validation = whole.cut(0, at), whole.cut(at, len(whole))
    corpus = hashlib.sha256("".join(seen.hash for seen in rest + held_out).encode()).hexdigest()
    identity = {"corpus": corpus, "tokenizer": tok.hash(), "split": "by file" if held_out else "last tenth"}
    found = {"source": path, "tokens": len(train) + len(validation), "longest": None, "empty": 0, "refused": 0}
    found |= {name: sum(getattr(seen, name) for seen in looked) for name in ("documents", "bytes")}
    return Dataset(train, validation, tok, identity, found | {"refused_first": [], "not_utf8": 0, "not_utf8_first": []})


class _Seen(NamedTuple):
    shard: Shard
    hash: str
    documents: int
    bytes: int  # of text


def _look_at(path: Path, tok: Tokenizer) -> _Seen:
    """Go once through a shard made by others.  ValueError: an id that the vocabulary has not."""
    shard, hash, lengths = Shard.open(path), hashlib.sha256(), tok.token_lengths()
    documents = n_bytes = 0
    for start in range(0, len(shard), BLOCK):
        ids = shard.read(start, min(start + BLOCK, len(shard)))
        bad = np.flatnonzero((ids < 0) | (ids >= tok.n_vocab))
        if len(bad):
            place, id = start + int(bad[0]), int(ids[bad[0]]) % 2**32
            raise ValueError(f"{path}: token {place:,} is {id}, the vocabulary has ids below {tok.n_vocab:,}")
        hash.update(ids.data)
        documents += int(np.count_nonzero(ids == tok.bos))
        n_bytes += int(lengths[ids].sum())
    return _Seen(shard, hash.hexdigest(), documents, n_bytes)

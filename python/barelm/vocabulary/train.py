"""`barelm tokenizer train`: a vocabulary from text."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .. import _core
from ..data.documents import Documents
from ..report import Bar, console, count, duration, printable
from ..tokenizer import EOT, Tokenizer
from .common import visible

__all__ = ["TrainConfig", "main"]

SAMPLE = 8 << 20  # bytes of text, the first ones read, on which the compression is measured
LONGEST = 10  # tokens that are shown


@dataclass
class TrainConfig:
    """Learn a byte-level BPE vocabulary from text, and write tokenizer.json."""

    data: Annotated[
        str, "file, folder, pattern, - (standard input), or several with commas; left out: the Python standard library"
    ] = ""
    field: Annotated[str, "field of JSONL, or column of parquet, that holds the text"] = "text"
    split_at: Annotated[str, "what stands between two documents of a text file; left out: a file is one document"] = ""
    vocab_size: Annotated[int, "tokens, the 256 bytes and the special ones among them"] = 4096
    pattern: Annotated[Literal["gpt4", "gpt2"], "how text is cut into pieces before"] = "gpt4"
    special: Annotated[str, f"special tokens besides {EOT}, with commas between them"] = ""
    out: Annotated[str, "folder that gets tokenizer.json"] = "tokenizer"
    threads: Annotated[int, "0: as many as the machine grants"] = 0
    json: Annotated[bool, "print the result as JSON on standard output, everything else on standard error"] = False


def main(config: TrainConfig) -> int:
    special = _check(config)
    if config.threads:
        _core.threads_set(config.threads)
    screen, began = console(stderr=config.json), time.perf_counter()
    documents = Documents(config.data, field=config.field, split_at=config.split_at)
    with _Progress(screen) as progress:
        sample = _Sample(documents, progress)
        tok = Tokenizer.train(sample, config.vocab_size, config.pattern, special, progress=progress.merging)
    path = tok.save(config.out)
    result = _result(tok, documents, sample, path, time.perf_counter() - began)
    if config.json:
        print(json.dumps(result))
    else:
        for name, value in _facts(result, tok).items():
            screen.print(f"{name:9} {value}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _check(config: TrainConfig) -> tuple[str, ...]:
    """The special tokens."""
    special = (EOT, *(config.special.split(",") if config.special else ()))
    if "" in special or len(set(special)) < len(special):
        raise ValueError(f"--special: a name is empty or there twice in '{config.special}'")
    if config.vocab_size < 256 + len(special):
        raise ValueError(
            f"--vocab-size: must be at least {256 + len(special)}, got {config.vocab_size}: "
            f"256 bytes and {len(special)} special"
        )
    if config.threads < 0:
        raise ValueError(f"--threads: must be 0 or more, got {config.threads}")
    path = Path(config.out, "tokenizer.json")
    if path.exists():
        raise FileExistsError(f"--out: {path} is there already; name another folder, or remove it")
    return special


class _Sample:
    """The bytes of the documents, while the first ones are kept: standard input cannot be read twice."""

    def __init__(self, documents: Documents, progress: "_Progress"):
        self._documents, self._progress = documents, progress
        self.kept: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        left = SAMPLE
        for document in self._documents:
            if left > 0:
                self.kept.append(document.data[:left])
                left -= len(self.kept[-1])
            self._progress.reading(self._documents)
            yield document.data


def _result(tok: Tokenizer, documents: Documents, sample: _Sample, path: Path, seconds: float) -> dict:
    kept = sum(map(len, sample.kept))
    tokens = sum(map(len, tok.encode_batch(sample.kept)))
    lengths = tok.token_lengths()
    longest = [int(id) for id in (-lengths).argsort(kind="stable")[:LONGEST]]
    return {
        "tokenizer": str(path),
        "sha256": tok.hash(),
        "source": documents.source,
        "documents": documents.counts.documents,
        "bytes": documents.counts.bytes,
        "vocab_size": tok.n_vocab,
        "merges": tok.n_vocab - 256 - len(tok.special),
        "bytes_per_token": kept / tokens if tokens else 0.0,
        "measured_bytes": kept,
        "longest": [{"id": id, "bytes": int(lengths[id]), "text": visible(tok.token_bytes(id))} for id in longest],
        "seconds": seconds,
    }


def _facts(result: dict, tok: Tokenizer) -> dict[str, str]:
    first = (
        "" if result["measured_bytes"] == result["bytes"] else f" (the first {count(result['measured_bytes'], 'B')})"
    )
    longest = [f"|{token['text'][:40]}|" for token in result["longest"]]
    return {
        "data": f"{printable(result['source'])}: {result['documents']:,} documents, {count(result['bytes'], 'B')}",
        "tokens": f"{result['vocab_size']:,}: 256 bytes, {result['merges']:,} merges, {len(tok.special)} special",
        "encodes": f"{result['bytes_per_token']:.2f} bytes a token, on what it has read{first}",
        "longest": " ".join(longest),
        "took": f"{duration(result['seconds'])}, {count(result['bytes'] / result['seconds'], 'B/s')}",
        "written": result["tokenizer"],
        "next": f'barelm tokenizer show --tokenizer {result["tokenizer"]} --text "Hello, world"',
    }


class _Progress(Bar):
    """What is read, then the merges."""

    def reading(self, documents: Documents) -> None:
        counts = documents.counts
        self.show(f"reads  {counts.documents:,} documents  {count(counts.bytes, 'B')}", documents.done, documents.size)

    def merging(self, done: int, total: int) -> None:
        self.show(f"merges  {done:,} of {total:,}", done, total)

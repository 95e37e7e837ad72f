"""`barelm data`: what is in a text, how many tokens it makes, and shards of them to train on."""

import json
import os
import time
from dataclasses import dataclass
from typing import Annotated

from .data.documents import Documents
from .data.shards import Dataset, check_found, summary, write_dataset
from .data.tokens import Piece, encode
from .report import Reading, console, count, duration, printable
from .tokenizer import Tokenizer

__all__ = ["PrepareConfig", "main"]


@dataclass
class PrepareConfig:
    """Look at text, .jsonl (.ndjson) or .parquet, also .gz and .zst: what is in it; with --out, write token shards."""

    data: Annotated[
        str, "file, folder, pattern, - (standard input), or several with commas; left out: the Python standard library"
    ] = ""
    field: Annotated[str, "field of JSONL, or column of parquet, that holds the text"] = "text"
    split_at: Annotated[str, "what stands between two documents of a text file; left out: a file is one document"] = ""
    tokenizer: Annotated[str, "'bytes', or a tokenizer.json, or a folder with one or with GPT-2's files"] = "bytes"
    out: Annotated[str, "folder of the shards; left out: nothing is written"] = ""
    val_fraction: Annotated[float, "how much of the text is held out"] = 0.1
    seed: Annotated[int, "another seed holds out other documents"] = 0
    shard_tokens: Annotated[int, "tokens in a shard"] = 100_000_000
    json: Annotated[bool, "print the result as JSON on standard output, everything else on standard error"] = False


def main(config: PrepareConfig) -> int:
    screen, began = console(stderr=config.json), time.perf_counter()
    tok = Tokenizer.bytes() if config.tokenizer == "bytes" else Tokenizer.load(config.tokenizer)
    documents = Documents(config.data, field=config.field, split_at=config.split_at)
    with Reading(screen) as progress:
        dataset, result = _write(config, documents, tok, progress) if config.out else _look(documents, tok, progress)
    result |= {"corpus": documents.counts.hash, "tokenizer": tok.hash(), "seconds": time.perf_counter() - began}
    if config.json:
        print(json.dumps(result))
    else:
        for name, value in _facts(result, dataset).items():
            screen.print(f"{name:9} {value}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _look(documents: Documents, tok: Tokenizer, progress: Reading) -> tuple[None, dict]:
    tokens = 0
    for _, ids in encode((Piece(document.data, document.begins) for document in documents), tok):
        tokens += len(ids)
        progress(documents, tokens)
    check_found(documents)
    return None, summary(documents, tokens)


def _write(config: PrepareConfig, documents: Documents, tok: Tokenizer, progress: Reading) -> tuple[Dataset, dict]:
    dataset = write_dataset(
        documents,
        tok,
        config.out,
        val_fraction=config.val_fraction,
        seed=config.seed,
        shard_tokens=config.shard_tokens,
        progress=progress,
    )
    sizes = {"train_tokens": len(dataset.train), "validation_tokens": len(dataset.validation)}
    return dataset, dataset.summary | sizes | {"out": config.out}


def _facts(result: dict, dataset: Dataset | None) -> dict[str, str]:
    sides = f", {count(len(dataset.train))} to train on, {count(len(dataset.validation))} held out" if dataset else ""
    per_token = result["bytes"] / result["tokens"]
    name, longest = result["longest"]
    refused = [f"{_shown(name)} ({printable(why)})" for name, why in result["refused_first"]]
    not_utf8 = [_shown(name) for name in result["not_utf8_first"]]
    facts = {
        "data": f"{_shown(result['source'])}: {result['documents']:,} documents, {count(result['bytes'], 'B')}",
        "tokens": f"{count(result['tokens'])}, {per_token:.2f} bytes each{sides}",
        "longest": f"{_shown(name)}, {count(longest, 'B')}",
        "empty": f"{result['empty']:,}",
        "refused": _with_names(result["refused"], refused),
        "not UTF-8": _with_names(result["not_utf8"], not_utf8),
        "sha256": result["corpus"],
        "took": f"{duration(result['seconds'])}, {count(result['bytes'] / result['seconds'], 'B/s')}",
    }
    if dataset:
        facts |= {"written": result["out"], "next": f"barelm train --data {result['out']}"}
    return facts


def _with_names(number: int, names: list[str]) -> str:
    more = [f"and {number - len(names):,} more"] if number > len(names) else []
    return f"{number:,}: {', '.join([*names, *more])}" if number else "0"


def _shown(name: str) -> str:
    """A name of a file may hold anything but a zero byte."""
    return printable(os.fsencode(name).decode("utf-8", "replace")).replace("\n", "\ufffd")

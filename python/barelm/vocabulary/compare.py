"""`barelm tokenizer compare`: how many bytes of text a token of each tokenizer stands for."""

import json
from dataclasses import dataclass
from typing import Annotated

from ..data.documents import Documents
from ..report import console, count, printable
from ..tokenizer import Tokenizer
from .common import load
from .texts import beginning, kinds

__all__ = ["CompareConfig", "main"]


@dataclass
class CompareConfig:
    """Compare tokenizers by bytes per token, on code, English, digits, white space, other scripts and your text."""

    tokenizer: Annotated[
        str,
        "tokenizers, with commas between them: 'bytes', tokenizer.json, rank file, folder with one or GPT-2's files",
    ]
    data: Annotated[str, "text of yours: file, folder, pattern, - (standard input), or several with commas"] = ""
    field: Annotated[str, "field of JSONL, or column of parquet, that holds the text"] = "text"
    split_at: Annotated[str, "what stands between two documents of a text file; left out: a file is one document"] = ""
    json: Annotated[bool, "one JSON object instead of the table"] = False


def main(config: CompareConfig) -> int:
    names = config.tokenizer.split(",")
    if len(set(names)) < len(names):
        raise ValueError(f"--tokenizer: one is there twice in '{config.tokenizer}'")
    toks = {name: load(name) for name in names}
    texts = kinds()
    if config.data:
        documents = Documents(config.data, field=config.field, split_at=config.split_at)
        texts[documents.source] = beginning(documents)
    rows = [_measure(name, documents, toks) for name, documents in texts.items()]
    if config.json:
        sizes = {name: {"vocab_size": tok.n_vocab, "sha256": tok.hash()} for name, tok in toks.items()}
        print(json.dumps({"tokenizers": sizes, "texts": rows}))
    else:
        _show(toks, rows)
    return 0


def _measure(name: str, documents: list[bytes], toks: dict[str, Tokenizer]) -> dict:
    size = sum(map(len, documents))
    tokens = {of: sum(map(len, tok.encode_batch(documents))) for of, tok in toks.items()}
    per_token = {of: size / n if n else 0.0 for of, n in tokens.items()}
    return {"text": name, "bytes": size, "tokens": tokens, "bytes_per_token": per_token}


def _show(toks: dict[str, Tokenizer], rows: list[dict]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="bytes per token: more is better", title_justify="left")
    table.add_column("text", overflow="fold")
    table.add_column("size", justify="right")
    for name, tok in toks.items():
        table.add_column(Text(f"{printable(name)}\n{tok.n_vocab:,} tokens"), justify="right", overflow="fold")
    for row in rows:
        cells = [_cell(row["bytes_per_token"], name) for name in toks]
        table.add_row(Text(printable(row["text"])), count(row["bytes"], "B"), *cells)
    console().print(table)


def _cell(per_token: dict[str, float], name: str) -> str:
    """The number, and how it stands to that of the first tokenizer."""
    first = next(iter(per_token))
    against = f" ({per_token[name] / per_token[first] - 1:+.0%})" if name != first and per_token[first] else ""
    return f"{per_token[name]:.2f}{against}"

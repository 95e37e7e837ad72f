"""`barelm import`: a checkpoint from another project's model, so that every other command takes it."""

import json
import os
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from . import checkpoint
from .convert import generation
from .convert.recognise import open_source
from .convert.source import Source
from .report import Bar, console, count, duration, printable
from .sentencepiece import SentencePiece
from .tokenizer import Tokenizer

__all__ = [
    "ImportConfig",
    "Written",
    "check_elsewhere",
    "found",
    "main",
    "tokenizer_files",
    "with_tokenizer",
    "written",
]


@dataclass
class ImportConfig:
    """Make a checkpoint of a model that others wrote, a few MB at a time.

    SOURCE is a folder of Hugging Face's form, or a file of llama.cpp (GGUF), llm.c or llama2.c; what it is, its content
    says.  FOLDER becomes a checkpoint for `barelm sample`, `eval` and `train`, which transformers opens too.
    """

    positional: ClassVar[tuple[str, ...]] = ("source", "folder")

    source: Annotated[str, "file or folder to read"]
    folder: Annotated[str, "folder to write; a checkpoint there is replaced"]
    tokenizer: Annotated[
        str, "a tokenizer's file or folder, where SOURCE has none or another is wanted; 'none': leave it out"
    ] = ""
    dtype: Annotated[Literal["f32", "f16", "bf16"], "of the weights that are written"] = "f32"
    json: Annotated[bool, "print the result as JSON on standard output, everything else on standard error"] = False


def main(config: ImportConfig) -> int:
    began = time.perf_counter()
    source = with_tokenizer(open_source(config.source), config.tokenizer)
    check_elsewhere(source, config.folder)
    result = found(source, config.json)
    with Written(source, console(stderr=True)) as progress:
        checkpoint.write(source, config.folder, config.dtype.upper(), files=tokenizer_files(source), progress=progress)
    written(result, config.folder, config.dtype, began, config.json)
    return 0


def with_tokenizer(source: Source, name: str) -> Source:
    """The source with the tokenizer of this name ("": its own, "none": none).  ValueError: it cannot be read, or does
    not fit."""
    if name:
        source = source.with_tokenizer(None if name == "none" else Tokenizer.load(name))
    try:
        tok, V = source.tokenizer, source.config.vocab_size
    except ValueError as error:
        raise ValueError(f"{error}; --tokenizer names another, or none") from None
    if tok is not None and tok.n_vocab > V:
        raise ValueError(f"tokenizer: its ids go up to {tok.n_vocab - 1}, the model's vocabulary has {V}")
    return source


def check_elsewhere(source: Source, out: str) -> None:
    """A checkpoint is more than its weights: it is never replaced by a copy of itself."""
    if os.path.exists(out) and os.path.samefile(out, source.path):
        raise ValueError(f"{out}: cannot be written over itself")


class Written(Bar):
    """How much of a model is written."""

    def __init__(self, source: Source, screen):
        super().__init__(screen)
        self._total, self._done = source.n_params, 0

    def __call__(self, name: str, n: int) -> None:
        self._done += n
        spent = max(time.perf_counter() - self._start, 1e-9)
        left = duration(spent * (self._total - self._done) / self._done)
        text = (
            f"{count(self._done)} of {count(self._total)} values  {count(4 * self._done / spent, 'B/s')}  {left} left"
        )
        self.show(text, self._done, self._total)


def tokenizer_files(source: Source) -> dict[str, bytes]:
    """What a checkpoint's folder holds beside the model."""
    return {} if source.tokenizer is None else generation.files_of(source.tokenizer)


# ---- what is told ---------------------------------------------------------------------------------------------------

SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "context")


def found(source: Source, as_json: bool) -> dict:
    """Tell what a source is, and return it for scripts."""
    c, tok = source.config, source.tokenizer
    kind = "SentencePiece" if isinstance(tok, SentencePiece) else "byte-level BPE"
    result = {
        "format": source.format,
        "architecture": "gpt2" if c.norm == "layernorm" else "llama",
        "parameters": source.n_params,
        "sizes": {name: getattr(c, name) for name in SIZES},
        "stored": sorted(source.kinds),
        "tokenizer": None if tok is None else {"kind": kind, "n_vocab": tok.n_vocab, "sha256": tok.hash()},
    }
    if not as_json:
        grouped = f" ({c.n_kv_head} of keys and values)" if c.n_kv_head != c.n_head else ""
        _say("found", f"{source.format}, {', '.join(result['stored'])}")
        _say(
            "model",
            f"{result['architecture']}, {count(source.n_params)} parameters: {c.n_layer} layers, {c.n_head} heads"
            f"{grouped}, {c.n_embd} channels, {c.vocab_size:,} tokens, context {c.context:,}",
        )
        _say("tokenizer", f"{kind}, {tok.n_vocab:,} tokens" if tok else "none")
    return result


def written(result: dict, out: str, dtype: str, began: float, as_json: bool) -> None:
    """Tell what was written, as the last line, or everything as JSON."""
    seconds = time.perf_counter() - began
    if as_json:
        print(json.dumps(result | {"out": out, "dtype": dtype, "seconds": seconds}))
    else:
        _say("written", f"{printable(out)}, {dtype}, in {duration(seconds)}")


def _say(name: str, value: str) -> None:
    console().print(f"{name:9} {value}", markup=False, highlight=False, soft_wrap=True)

"""`barelm import`: a checkpoint from another project's model, so that every other command takes it."""

import json
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from . import checkpoint
from .convert.recognise import open_source
from .convert.source import Source
from .report import Bar, console, count, duration, printable
from .sentencepiece import SentencePiece
from .tokenizer import Tokenizer

__all__ = ["ImportConfig", "Written", "facts", "main", "with_tokenizer"]


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
    tok = source.tokenizer
    files = {} if tok is None else {"tokenizer.json": tok.to_json().encode()}
    with Written(source, console(stderr=True)) as progress:
        checkpoint.write(source, config.folder, config.dtype.upper(), files=files, progress=progress)
    result = facts(source) | {"out": config.folder, "dtype": config.dtype, "seconds": time.perf_counter() - began}
    tell(result, config.json)
    return 0


def with_tokenizer(source: Source, name: str) -> Source:
    """The source with the tokenizer of this name ("": its own, "none": none).  ValueError: it does not fit."""
    if name:
        source = source.with_tokenizer(None if name == "none" else Tokenizer.load(name))
    tok, V = source.tokenizer, source.config.vocab_size
    if tok is not None and tok.n_vocab > V:
        raise ValueError(f"tokenizer: its ids go up to {tok.n_vocab - 1}, the model's vocabulary has {V}")
    return source


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


def facts(source: Source) -> dict:
    """What was found, for people and for scripts."""
    c, tok = source.config, source.tokenizer
    kind = "SentencePiece" if isinstance(tok, SentencePiece) else "byte-level BPE"
    return {
        "format": source.format,
        "architecture": "gpt2" if c.norm == "layernorm" else "llama",
        "parameters": source.n_params,
        "sizes": {
            name: getattr(c, name) for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "context")
        },
        "stored": sorted(source.kinds),
        "tokenizer": None if tok is None else {"kind": kind, "n_vocab": tok.n_vocab, "sha256": tok.hash()},
    }


def tell(result: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    sizes, tok = result["sizes"], result["tokenizer"]
    heads = f"{sizes['n_head']} heads"
    if sizes["n_kv_head"] != sizes["n_head"]:
        heads += f" ({sizes['n_kv_head']} of keys and values)"
    lines = {
        "found": f"{result['format']}, {', '.join(result['stored'])}",
        "model": f"{result['architecture']}, {count(result['parameters'])} parameters: {sizes['n_layer']} layers, "
        f"{heads}, {sizes['n_embd']} channels, {sizes['vocab_size']:,} tokens, context {sizes['context']:,}",
        "tokenizer": f"{tok['kind']}, {tok['n_vocab']:,} tokens" if tok else "none",
        "written": f"{printable(str(result['out']))}, {result['dtype']}, in {duration(result['seconds'])}",
    }
    for name, value in lines.items():
        console().print(f"{name:9} {value}", markup=False, highlight=False, soft_wrap=True)

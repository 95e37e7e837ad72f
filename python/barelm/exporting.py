"""`barelm export`: a checkpoint in the form of transformers, llama.cpp or llm.c."""

import time
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from . import checkpoint
from .convert import gguf, llmc
from .convert.source import Source
from .importing import Written, check_elsewhere, found, tokenizer_files, with_tokenizer, written
from .report import console
from .runs import open_model

__all__ = ["ExportConfig", "main"]

DTYPES = {"hf": checkpoint.DTYPES, "gguf": gguf.KINDS, "llm.c": llmc.VERSIONS}  # what each format can hold


@dataclass
class ExportConfig:
    """Write a model for other programs, a few MB at a time.

    FOLDER is a checkpoint's or a run's (its newest checkpoint is taken), or anything that `barelm import` reads.
    TARGET is a folder for hf, a file for gguf and llm.c.
    """

    positional: ClassVar[tuple[str, ...]] = ("folder", "target")

    folder: Annotated[str, "what to write"]
    target: Annotated[str, "where to; what is there is replaced if it is of the same form"]
    format: Annotated[Literal["hf", "gguf", "llm.c"], "hf: a folder for transformers; gguf: for llama.cpp"] = "hf"
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"], "of the weights; q8_0 with gguf only, and llm.c has f32 and bf16"
    ] = "f32"
    shard_size: Annotated[float, "GB of a file of weights at most, with hf"] = 5.0
    tokenizer: Annotated[str, "another tokenizer's file or folder; 'none': leave it out"] = ""
    json: Annotated[bool, "print the result as JSON on standard output, everything else on standard error"] = False


def main(config: ExportConfig) -> int:
    began = time.perf_counter()
    _check(config)
    source = with_tokenizer(open_model(config.folder), config.tokenizer)
    check_elsewhere(source, config.target)
    result = found(source, config.json)
    with Written(source, console(stderr=True)) as progress:
        _write(config, source, progress)
    written(result, config.target, config.dtype, began, config.json)
    return 0


def _check(config: ExportConfig) -> None:
    """ValueError naming the flag whose value cannot be."""
    known = [dtype.lower() for dtype in DTYPES[config.format]]
    if config.dtype not in known:
        raise ValueError(f"--dtype: {config.format} has no {config.dtype}, but {', '.join(known)}")
    if not 0 < config.shard_size <= 1e6:
        raise ValueError(f"--shard-size: must be above 0 and at most a million, got {config.shard_size}")


def _write(config: ExportConfig, source: Source, progress: Written) -> None:
    kind = config.dtype.upper()
    if config.format == "gguf":
        gguf.write(source, config.target, kind, progress)
    elif config.format == "llm.c":
        llmc.write(source, config.target, kind, progress)
    else:
        size = round(config.shard_size * 1e9)
        checkpoint.write(source, config.target, kind, size, tokenizer_files(source), progress)

"""What a file or folder of weights is, by its content; its name is never asked."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint
from . import gguf, gguf_file, llama2c, llmc
from .binary import Binary
from .source import CheckpointError, Source

__all__ = ["open_source"]

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how torch.save's files begin


def open_source(path) -> Source:
    """A model of any form that we read: a checkpoint's folder, GGUF, llm.c's or llama2.c's file.

    CheckpointError: it is none of them, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        checkpoint.verify(path)
        return checkpoint.open_weights(path)
    with Binary(path) as file:
        head = file.take(min(16, file.left), "header")
    if head.startswith(gguf_file.MAGIC):
        return gguf.read(path)
    number = int.from_bytes(head[:4], "little")
    if number == llmc.MAGIC:
        return llmc.read(path)
    if head.startswith(PICKLES):
        raise CheckpointError(f"{path}: is pickled, and reading that could run any program; safetensors are read")
    if head[8:9] == b"{":
        raise CheckpointError(f"{path}: is a safetensors file; name its folder, where config.json lies beside it")
    if number == llama2c.LATER or llama2c.is_model(path):
        return llama2c.read(path)
    raise CheckpointError(
        f"{path}: is no model that is known: a folder with config.json and safetensors, GGUF, llm.c's checkpoint or "
        "llama2.c's version 0"
    )

"""llm.c's checkpoints of GPT-2: 256 int32 of header, then each kind of parameter for all layers together.

Header: 20240326, version (3: float32, 5: bfloat16), context, vocabulary, layers, heads, channels, rows of the embedding
(the vocabulary up to a multiple of 128; those behind it are zero).  Linear layers are [out, in].
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..model import Config
from .binary import Binary
from .numbers import KINDS, from_float32
from .output import whole_file
from .source import CheckpointError, Source, Stored, match, shapes_of

__all__ = ["VERSIONS", "is_llmc", "read", "write"]

MAGIC, HEADER = 20240326, 1024  # bytes
VERSIONS = {"F32": 3, "BF16": 5}
PADDED_TO = 128


class _Kind(NamedTuple):
    """Parameters of one kind."""

    name: str  # * stands for the layer
    shape: tuple[int, ...]  # of one, in the file
    transposed: bool = False


def _layout(c: Config) -> list[_Kind]:
    C = c.n_embd
    return [
        _Kind("wte.weight", (c.vocab_size, C)),
        _Kind("wpe.weight", (c.context, C)),
        _Kind("h.*.ln_1.weight", (C,)),
        _Kind("h.*.ln_1.bias", (C,)),
        _Kind("h.*.attn.c_attn.weight", (3 * C, C), True),
        _Kind("h.*.attn.c_attn.bias", (3 * C,)),
        _Kind("h.*.attn.c_proj.weight", (C, C), True),
        _Kind("h.*.attn.c_proj.bias", (C,)),
        _Kind("h.*.ln_2.weight", (C,)),
        _Kind("h.*.ln_2.bias", (C,)),
        _Kind("h.*.mlp.c_fc.weight", (4 * C, C), True),
        _Kind("h.*.mlp.c_fc.bias", (4 * C,)),
        _Kind("h.*.mlp.c_proj.weight", (C, 4 * C), True),
        _Kind("h.*.mlp.c_proj.bias", (C,)),
        _Kind("ln_f.weight", (C,)),
        _Kind("ln_f.bias", (C,)),
    ]


def _names(kind: _Kind, config: Config) -> list[str]:
    return [kind.name.replace("*", str(i)) for i in range(config.n_layer if "*" in kind.name else 1)]


# ---- reading --------------------------------------------------------------------------------------------------------


def is_llmc(path: Path) -> bool:
    try:
        with Binary(path) as file:
            return file.numbers("i", "header")[0] == MAGIC
    except CheckpointError:
        return False


def read(path: Path, tokenizer=lambda: None) -> Source:
    """CheckpointError: it is no such file, or not whole."""
    path = Path(path)
    with Binary(path) as file:
        header = file.numbers("256i", "header")
        if header[0] != MAGIC:
            raise file.error("is no checkpoint of llm.c")
        config, padded, kind = _config(file, header)
        size = KINDS[kind].unit.itemsize
        layout = _layout(config)
        values = (padded - config.vocab_size) * config.n_embd
        values += sum(math.prod(k.shape) * (config.n_layer if "*" in k.name else 1) for k in layout)
        if file.size != HEADER + size * values:
            raise file.error(f"has {file.size:,} bytes, its header says {HEADER + size * values:,}")
    at, stored = HEADER, {}
    for group in layout:
        for name in _names(group, config):
            stored[name] = Stored(path, at, kind, group.shape, group.transposed)
            at += size * math.prod(group.shape)
        if group.name == "wte.weight":
            at += size * (padded - config.vocab_size) * config.n_embd
    stored = match(stored, shapes_of(config, len(stored), path, "its header"), str, path, "its header")
    return Source(path, f"llm.c's, version {header[1]}", config, stored, tokenizer)


def _config(file: Binary, header: tuple[int, ...]) -> tuple[Config, int, str]:
    """(config, rows of the embedding, kind of the numbers)"""
    version, context, V, L, NH, C, padded = header[1:8]
    kind = next((kind for kind, number in VERSIONS.items() if number == version), None)
    if kind is None:
        raise file.error(f"is llm.c's version {version}, must be one of {', '.join(map(str, VERSIONS.values()))}")
    try:
        config = Config(n_layer=L, n_head=NH, n_embd=C, vocab_size=V, context=context)
    except ValueError as error:
        raise file.error(f"header: {error}") from None
    if padded < V:
        raise file.error(f"header: the embedding has {padded} rows for a vocabulary of {V}")
    return config, padded, kind


# ---- writing --------------------------------------------------------------------------------------------------------


def write(
    source: Source,
    path,
    kind: str = "F32",
    progress: Callable[[str, int], None] = lambda name, n: None,
) -> None:
    """Write a GPT-2 as llm.c's programs read it, a few MB at a time.

    kind       "F32" or "BF16", of all parameters
    progress   called with a tensor's name and how many of its values were written
    ValueError: llm.c has no such model.  FileExistsError: the file is no checkpoint of llm.c.
    """
    if kind not in VERSIONS:
        raise ValueError(f"kind: is {kind!r}, must be one of {', '.join(VERSIONS)}")
    c = source.config
    _check(c)
    padded = -(-c.vocab_size // PADDED_TO) * PADDED_TO
    numbers = [MAGIC, VERSIONS[kind], c.context, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded]
    with whole_file(path, is_llmc, "checkpoint of llm.c") as file:
        file.write(struct.pack("<256i", *numbers, *[0] * (256 - len(numbers))))
        for group in _layout(c):
            for name in _names(group, c):
                for part in _rows(source, name, group.transposed):
                    file.write(np.ascontiguousarray(from_float32(np.ascontiguousarray(part), kind)).data.cast("B"))
                    progress(name, part.size)
            if group.name == "wte.weight":
                file.write(bytes(KINDS[kind].unit.itemsize * (padded - c.vocab_size) * c.n_embd))


def _check(c: Config) -> None:
    """ValueError names what llm.c would compute otherwise: it has GPT-2 alone."""
    same = dict(n_kv_head=c.n_head, head_size=c.n_embd // c.n_head, n_inner=4 * c.n_embd, rope_scaling=None)
    fixed = same | {name: getattr(Config(), name) for name in ("norm", "act", "pos", "bias", "tied", "norm_eps")}
    for name, value in fixed.items():
        if getattr(c, name) != value:
            raise ValueError(f"llm.c has GPT-2 only: {name} is {getattr(c, name)!r}, must be {value!r}")


def _rows(source: Source, name: str, transposed: bool) -> Iterator[np.ndarray]:
    for part in source.rows(name, axis=int(transposed)):
        yield part.T if transposed else part

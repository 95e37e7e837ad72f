"""llama2.c's files: a model (the first form, .bin) and its tokenizer.

Model: seven int32 (channels, MLP width, layers, query heads, key/value heads, vocabulary, context; where the vocabulary
is negative the head is not the embedding), then float32: the embedding, each matrix or norm for all layers together,
the final norm, two tables of rotary angles that nobody needs, and the head.  Rotary pairs lie side by side.  There is
no magic number: what tells such a file is that its size follows from its header.

Tokenizer: the length of the longest piece, then for each piece its score, its length and its bytes, until the end; a
space is a space, and <s> and </s> have line ends around them.
"""

from __future__ import annotations

import math
from pathlib import Path

from ..model import Config
from ..sentencepiece import BYTE, BYTE_PIECE, CONTROL, NORMAL, SPACE, UNKNOWN, SentencePiece
from ..tokenizer import MAX_ID
from .binary import Binary
from .source import CheckpointError, Source, Stored, half_split, match, shapes_of

__all__ = ["is_model", "read", "read_tokenizer"]

FORMAT = "llama2.c's, version 0"
LATER = 0x616B3432  # "ak42", which begins versions 1 and 2
SPECIAL = {0: ("<unk>", UNKNOWN), 1: ("<s>", CONTROL), 2: ("</s>", CONTROL)}  # SentencePiece's first ids
MAX_PIECE = 1024  # bytes


# ---- the model ------------------------------------------------------------------------------------------------------


def is_model(path: Path) -> bool:
    """Whether the size of the file is what its header says."""
    try:
        with Binary(path) as file:
            config = _config(file)
            return file.size == 28 + 4 * sum(math.prod(shape) for _, shape in _layout(config))
    except CheckpointError:
        return False


def read(path: Path, tokenizer=lambda: None) -> Source:
    """CheckpointError: it is no such file, or not whole."""
    with Binary(path) as file:
        if file.size >= 8 and file.numbers("I", "header")[0] == LATER:
            version = file.numbers("i", "version")[0]
            raise file.error(f"is llama2.c's version {version}; only version 0 is read (export.py --version 0)")
        file.at = 0
        config = _config(file)
        layout = _layout(config)
        want = 28 + 4 * sum(math.prod(shape) for _, shape in layout)
        if file.size != want:
            raise file.error(f"has {file.size:,} bytes, its header says {want:,}: not llama2.c's, or not whole")
    at, stored = 28, {}
    for name, shape in layout:
        if name:
            stored |= _each_layer(path, at, name, shape, config)
        at += 4 * math.prod(shape)
    stored = match(stored, shapes_of(config, len(stored), path, "its header"), str, path, "its header")
    return Source(Path(path), FORMAT, config, stored, tokenizer)


def _config(file: Binary) -> Config:
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    numbers = dict(zip(names, file.numbers("7i", "header"), strict=True))
    for name, value in numbers.items():
        if value <= 0 and not (name == "vocab_size" and value < 0):
            raise file.error(f"header: {name} is {value}: not llama2.c's")
    try:
        return Config.preset(
            "llama",
            n_embd=numbers["dim"],
            n_inner=numbers["hidden_dim"],
            n_layer=numbers["n_layers"],
            n_head=numbers["n_heads"],
            n_kv_head=numbers["n_kv_heads"],
            vocab_size=abs(numbers["vocab_size"]),
            context=numbers["max_seq_len"],
            tied=numbers["vocab_size"] > 0,
        )
    except ValueError as error:
        raise file.error(f"header: {error}") from None


def _layout(c: Config) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) in the order of the file; * stands for the layers, "" for what is passed over."""
    L, C, F = c.n_layer, c.n_embd, c.n_inner
    Q, KV = c.n_head * c.head_size, c.n_kv_head * c.head_size
    head = [] if c.tied else [("lm_head.weight", (c.vocab_size, C))]
    return [
        ("embed_tokens.weight", (c.vocab_size, C)),
        ("layers.*.input_layernorm.weight", (L, C)),
        ("layers.*.self_attn.q_proj.weight", (L, Q, C)),
        ("layers.*.self_attn.k_proj.weight", (L, KV, C)),
        ("layers.*.self_attn.v_proj.weight", (L, KV, C)),
        ("layers.*.self_attn.o_proj.weight", (L, C, Q)),
        ("layers.*.post_attention_layernorm.weight", (L, C)),
        ("layers.*.mlp.gate_proj.weight", (L, F, C)),
        ("layers.*.mlp.down_proj.weight", (L, C, F)),
        ("layers.*.mlp.up_proj.weight", (L, F, C)),
        ("norm.weight", (C,)),
        ("", (2, c.context, c.head_size // 2)),
        *head,
    ]


def _each_layer(path: Path, at: int, name: str, shape: tuple[int, ...], c: Config) -> dict[str, Stored]:
    if "*" not in name:
        return {name: Stored(path, at, "F32", shape)}
    size, order = 4 * math.prod(shape[1:]), None
    if "q_proj" in name or "k_proj" in name:
        order = half_split(c.n_head if "q_proj" in name else c.n_kv_head, c.head_size)
    return {
        name.replace("*", str(i)): Stored(path, at + i * size, "F32", shape[1:], order=order) for i in range(shape[0])
    }


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def read_tokenizer(path: Path) -> SentencePiece:
    """CheckpointError: it is no such file, or not whole."""
    pieces, scores, kinds = [], [], []
    with Binary(path) as file:
        longest = file.numbers("i", "header")[0]
        if not 0 < longest <= MAX_PIECE:
            raise file.error(f"header: the longest piece would have {longest} bytes: not a tokenizer of llama2.c")
        while file.left:
            what = f"piece {len(pieces)}"
            score, length = file.numbers("fi", what)
            if not 0 < length <= longest + len("\n\n") or len(pieces) >= MAX_ID:
                raise file.error(f"{what}: has {length} bytes, the longest has {longest}")
            piece, kind = _piece(len(pieces), file.text(length, what))
            pieces.append(piece)
            scores.append(score)
            kinds.append(kind)
        try:
            return SentencePiece(pieces, scores, kinds, begin=1)
        except ValueError as error:
            raise file.error(str(error)) from None


def _piece(id: int, text: str) -> tuple[str, int]:
    if id in SPECIAL:
        return SPECIAL[id]
    return text.replace(" ", SPACE), BYTE if text[0] == "<" and BYTE_PIECE.fullmatch(text) else NORMAL

"""Models and vocabularies in GGUF, llama.cpp's files: architectures "gpt2" and "llama".

Linear layers are [out, in] there, so GPT-2's are transposed; llama's rotary pairs lie side by side, so queries' and
keys' rows are permuted; Llama-3's stretched rotation is a tensor of divisors, rope_freqs.  Matrices have the kind that
is asked for, vectors and positions are F32, as llama.cpp's own converters leave them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..model import Config
from ..sentencepiece import UNUSED, SentencePiece
from ..tokenizer import BYTE_TO_CHAR, GPT2_PATTERN, GPT4_PATTERN, MAX_ID, Tokenizer, build
from . import gguf_file
from .gguf_file import Array, Header
from .numbers import fits, from_float32
from .output import whole_file
from .source import CheckpointError, Source, half_split, interleaved, match, same_bytes, shapes_of

__all__ = ["KINDS", "is_gguf", "read", "read_tokenizer", "write"]

KINDS = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # of matrices, and llama.cpp's number for such a file
is_gguf = gguf_file.is_gguf

GPT2_NAMES = {  # ours: GGUF's; those of layers without their prefixes
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
LLAMA_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TRANSPOSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")  # of gpt2
ROPE = "rope_freqs.weight"
OWN_SCALING = "barelm.rope_scaling."  # the numbers that ROPE's follow from, in files that we write
LLAMA3_SCALING = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, of a turn, of a message
REFUSED = (  # values of models that compute something else
    *("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "attention.clamp_kqv"),
    *("rope.scale_linear", "rope.scaling.factor", "attention.sliding_window", "expert_count"),
)


def _layer_prefix(config: Config) -> str:
    return "h." if _arch(config) == "gpt2" else "layers."


def _arch(config: Config) -> str:
    return "gpt2" if config.norm == "layernorm" else "llama"


def _names(config: Config) -> dict[str, str]:
    return GPT2_NAMES if _arch(config) == "gpt2" else LLAMA_NAMES


def file_name(config: Config, name: str) -> str:
    """GGUF's name of a parameter."""
    stem, _, kind = name.rpartition(".")
    prefix, layers = "", _layer_prefix(config)
    if stem.startswith(layers):
        number, _, stem = stem.removeprefix(layers).partition(".")
        prefix = f"blk.{number}."
    return f"{prefix}{_names(config)[stem]}.{kind}"


def _order(config: Config, key: str, order: Callable[[int, int], np.ndarray]) -> np.ndarray | None:
    if _arch(config) == "llama" and ".attn_q." in key:
        return order(config.n_head, config.head_size)
    if _arch(config) == "llama" and ".attn_k." in key:
        return order(config.n_kv_head, config.head_size)
    return None


def _is_transposed(config: Config, key: str) -> bool:
    return _arch(config) == "gpt2" and key.endswith(".weight") and key.split(".")[-2] in TRANSPOSED


# ---- reading a model ------------------------------------------------------------------------------------------------


def read(path: Path) -> Source:
    """CheckpointError: it is damaged, or a model that cannot be built."""
    header = gguf_file.read(Path(path))
    config = _config(header)
    said = "its header"
    shapes = shapes_of(config, len(header.tensors), path, said)
    keys = {file_name(config, name): name for name in shapes}
    found = {
        key: stored._replace(transposed=_is_transposed(config, key))
        for key, stored in header.tensors.items()
        if key != ROPE and not (key == "output.weight" and config.tied)
    }
    stored = match(found, shapes, lambda key: keys.get(key, key), path, said)
    ordered = {  # only now are the heads known to be no more than the file has
        name: tensor._replace(order=_order(config, file_name(config, name), half_split))
        for name, tensor in stored.items()
    }
    return Source(Path(path), "GGUF", config, ordered, lambda: _tokenizer(header))


class _Values:
    """The named values of a header, by type."""

    def __init__(self, header: Header):
        self.path, self._values = header.path, header.values

    def get(self, key: str, kind: type, default: object = None) -> object:
        value = self._values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise CheckpointError(f"{self.path}: {key}: is {value!r:.60}, must be a {kind.__name__}")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._values


def _config(header: Header) -> Config:
    values = _Values(header)
    arch = values.get("general.architecture", str)
    if arch not in ("gpt2", "llama"):
        raise CheckpointError(f"{header.path}: general.architecture is {arch!r:.40}, must be 'gpt2' or 'llama'")
    if not header.tensors:
        raise CheckpointError(f"{header.path}: holds a vocabulary, but no tensors")
    _check_known(header, arch)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path}: lacks token_embd.weight, a matrix")
    sizes = dict(
        n_layer=values.get(f"{arch}.block_count", int),
        n_embd=values.get(f"{arch}.embedding_length", int),
        n_inner=values.get(f"{arch}.feed_forward_length", int),
        n_head=values.get(f"{arch}.attention.head_count", int),
        context=values.get(f"{arch}.context_length", int),
        vocab_size=embedding.shape[0],
        tied="output.weight" not in header.tensors or _is_twice(header),
    )
    try:
        return Config(**sizes, **(_gpt2_fields(values) if arch == "gpt2" else _llama_fields(header, values, sizes)))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{header.path}: {error}") from None


def _is_twice(header: Header) -> bool:
    """Whether the head is the embedding once more, as llama.cpp's converter wrote GPT-2 until 2024."""
    return same_bytes(header.tensors["output.weight"], header.tensors["token_embd.weight"])


def _check_known(header: Header, arch: str) -> None:
    values = header.values
    for name in REFUSED:
        if values.get(f"{arch}.{name}", 0) not in ((0,) if name == "attention.scale" else (0, 1)):
            raise CheckpointError(f"{header.path}: {arch}.{name} is {values[f'{arch}.{name}']!r:.40}: not supported")
    if values.get(f"{arch}.rope.scaling.type", "none") != "none":
        kind = values[f"{arch}.rope.scaling.type"]
        raise CheckpointError(f"{header.path}: {arch}.rope.scaling.type is {kind!r:.40}, must be 'none'")
    if values.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{header.path}: is one of several files (split.count); join them first")


def _gpt2_fields(values: _Values) -> dict:
    return dict(norm_eps=values.get("gpt2.attention.layer_norm_epsilon", float))


def _llama_fields(header: Header, values: _Values, sizes: Mapping) -> dict:
    heads, n_head = "llama.attention.", sizes["n_head"]
    head_size = values.get(heads + "key_length", int, sizes["n_embd"] // max(1, n_head))
    for key in (heads + "value_length", "llama.rope.dimension_count"):
        if values.get(key, int, head_size) != head_size:
            raise CheckpointError(f"{header.path}: {key} is {values.get(key, int)}, must be the head's {head_size}")
    theta = float(values.get("llama.rope.freq_base", float, 10000.0))
    return dict(
        n_kv_head=values.get(heads + "head_count_kv", int, n_head),
        head_size=head_size,
        norm="rmsnorm",
        act="swiglu",
        pos="rope",
        bias="blk.0.attn_q.bias" in header.tensors,
        norm_eps=values.get(heads + "layer_norm_rms_epsilon", float),
        rope_theta=theta,
        rope_scaling=_scaling(header, values, head_size, theta),
    )


# ---- the stretched rotation -----------------------------------------------------------------------------------------


def _divisors(scaling: Mapping, head_size: int, theta: float) -> np.ndarray:
    """(head_size / 2) float32: what llama3's rope_scaling divides each frequency by (Llama 3.1's model card)."""
    inverse = theta ** (-np.arange(0, head_size, 2) / head_size)
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def _scaling(header: Header, values: _Values, head_size: int, theta: float) -> dict | None:
    stored = header.tensors.get(ROPE)
    if stored is None:
        return None
    if stored.shape != (head_size // 2,) or stored.kind != "F32" or not (0 < theta < math.inf):
        raise CheckpointError(f"{header.path}: {ROPE} has shape {stored.shape}, must be {head_size // 2} values of F32")
    divisors = stored.read(0, slice(0, head_size // 2))
    if (divisors == 1).all():
        return None
    scaling = dict(rope_type="llama3", factor=float(divisors.max()), **LLAMA3_SCALING)
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        scaling[name] = float(values.get(OWN_SCALING + name, float, scaling[name]))
    name = "original_max_position_embeddings"
    scaling[name] = values.get(OWN_SCALING + name, int, scaling[name])
    good = np.isfinite(divisors).all() and scaling["high_freq_factor"] > scaling["low_freq_factor"]
    if not good or not scaling["factor"] > 0 or not np.allclose(_divisors(scaling, head_size, theta), divisors, 1e-4):
        raise CheckpointError(f"{header.path}: {ROPE} is not what Llama-3's rope_scaling gives; others are not known")
    return scaling


# ---- reading a vocabulary -------------------------------------------------------------------------------------------

PATTERNS = {"gpt-2": GPT2_PATTERN, "llama-bpe": GPT4_PATTERN, "llama3": GPT4_PATTERN, "llama-v3": GPT4_PATTERN}


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary of a GGUF file.  CheckpointError: it has none, or not one of ours."""
    header = gguf_file.read(Path(path))
    tok = _tokenizer(header)
    if tok is None:
        raise CheckpointError(f"{path}: has no vocabulary")
    return tok


def _tokenizer(header: Header) -> Tokenizer | None:
    values = _Values(header)
    kind = values.get("tokenizer.ggml.model", str, "no_vocab")
    if kind == "no_vocab":
        return None
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{header.path}: tokenizer.ggml.model is {kind!r:.40}, must be 'gpt2' or 'llama'")
    tokens = _array(values, "tokens").strings()
    if len(tokens) > MAX_ID:
        raise CheckpointError(f"{header.path}: has {len(tokens):,} tokens, more than any vocabulary")
    kinds = _per_token(values, "token_type", len(tokens)).tolist()
    try:
        tok = (_byte_level if kind == "gpt2" else _pieces)(values, tokens, kinds)
        tok.end_at([id for name in ENDS if (id := values.get(f"tokenizer.ggml.{name}", int, -1)) >= 0])
        return tok
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{header.path}: {error}") from None


def _array(values: _Values, name: str) -> Array:
    return values.get(f"tokenizer.ggml.{name}", Array)


def _per_token(values: _Values, name: str, n: int) -> np.ndarray:
    numbers = _array(values, name).numbers()
    if len(numbers) != n:
        raise CheckpointError(f"{values.path}: tokenizer.ggml.{name} has {len(numbers)} entries, tokens has {n}")
    return numbers


def _byte_level(values: _Values, tokens: list[str], kinds: list[int]) -> Tokenizer:
    # older files do not say it; of a GPT-2 it is certain
    unsaid = "gpt-2" if values.get("general.architecture", str, "") == "gpt2" else "not said"
    pre = values.get("tokenizer.ggml.pre", str, unsaid)
    if pre not in PATTERNS:
        known = ", ".join(map(repr, PATTERNS))
        raise CheckpointError(f"{values.path}: tokenizer.ggml.pre is {pre!r:.40}, must be one of {known}")
    merges = _array(values, "merges").strings()
    if len({*tokens}) < len(tokens):
        raise ValueError("two tokens are the same")
    normal = {token: id for id, token in enumerate(tokens) if kinds[id] == 1}
    special = {token: id for id, token in enumerate(tokens) if kinds[id] in (2, 3, 4)}
    is_llama3 = PATTERNS[pre] == GPT4_PATTERN
    bos = values.get("tokenizer.ggml.bos_token_id", int) if _adds_bos(values, is_llama3) else None
    return build(normal, merges, special, PATTERNS[pre], ignore_merges=is_llama3, bos=bos)


def _pieces(values: _Values, tokens: list[str], kinds: list[int]) -> SentencePiece:
    scores = _per_token(values, "scores", len(tokens))
    begin = values.get("tokenizer.ggml.bos_token_id", int, 1)
    prefix = values.get("tokenizer.ggml.add_space_prefix", bool, True)
    return SentencePiece(tokens, scores, kinds, begin, prefix, _adds_bos(values, True))


def _adds_bos(values: _Values, unsaid: bool) -> bool:
    """Whether a text begins with bos; `unsaid`: what llama.cpp does where the file does not say it."""
    return values.get("tokenizer.ggml.add_bos_token", bool, unsaid)


# ---- writing --------------------------------------------------------------------------------------------------------


def write(
    source: Source,
    path,
    kind: str = "F32",
    progress: Callable[[str, int], None] = lambda name, n: None,
) -> None:
    """Write a model, with its vocabulary if it has one, so that llama.cpp runs it; a few MB at a time.

    kind       of matrices: "F32", "F16", "BF16" or "Q8_0" (F16 for those whose rows are no multiple of 32)
    progress   called with a tensor's name and how many of its values were written
    ValueError: llama.cpp has no such model, or a value is too large.  FileExistsError: the file is no GGUF file.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: is {kind!r}, must be one of {', '.join(KINDS)}")
    _check(source.config)
    values = _values(source.config, kind) | _vocabulary(source.tokenizer, source.config)
    tensors = [_tensor(source, name, kind, progress) for name in source.shapes]
    if source.config.rope_scaling:
        c = source.config
        divisors = _divisors(c.rope_scaling, c.head_size, c.rope_theta)
        tensors.append(gguf_file.Tensor(ROPE, "F32", divisors.shape, [divisors]))
    with whole_file(path, is_gguf, "GGUF file") as file:
        gguf_file.write(file, values, tensors)


def _check(c: Config) -> None:
    """ValueError: llama.cpp computes something else, or nothing."""
    gpt2 = c.norm == "layernorm" and c.pos == "learned" and c.act == "gelu_tanh" and c.bias and c.n_kv_head == c.n_head
    llama = c.norm == "rmsnorm" and c.pos == "rope" and c.act == "swiglu"
    if not llama and not (gpt2 and c.head_size * c.n_head == c.n_embd):
        raise ValueError("GGUF: llama.cpp has GPT-2 (with biases and the tanh form of GELU) and Llama; this is neither")


def _values(c: Config, kind: str) -> dict[str, object]:
    arch = _arch(c)
    values: dict[str, object] = {
        "general.architecture": arch,
        "general.name": f"{arch} by barelm",
        "general.file_type": KINDS[kind],
        "general.quantization_version": 2,
        f"{arch}.vocab_size": c.vocab_size,
        f"{arch}.context_length": c.context,
        f"{arch}.embedding_length": c.n_embd,
        f"{arch}.feed_forward_length": c.n_inner,
        f"{arch}.block_count": c.n_layer,
        f"{arch}.attention.head_count": c.n_head,
        f"{arch}.attention.head_count_kv": c.n_kv_head,
    }
    if arch == "gpt2":
        return values | {"gpt2.attention.layer_norm_epsilon": float(c.norm_eps)}
    values |= {
        "llama.attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "llama.attention.key_length": c.head_size,
        "llama.attention.value_length": c.head_size,
        "llama.rope.dimension_count": c.head_size,
        "llama.rope.freq_base": float(c.rope_theta),
    }
    for name, value in (c.rope_scaling or {}).items():
        if name != "rope_type":
            values[OWN_SCALING + name] = int(value) if name.startswith("original") else float(value)
    return values


def _tensor(source: Source, name: str, kind: str, progress) -> gguf_file.Tensor:
    config, shape = source.config, source.shapes[name]
    key = file_name(config, name)
    transposed, order = _is_transposed(config, key), _order(config, key, interleaved)
    shape = shape[::-1] if transposed else shape
    if len(shape) == 1 or key == "position_embd.weight":
        kind = "F32"
    elif not fits(shape, kind):
        kind = "F16"

    def rows() -> Iterator[np.ndarray]:
        if order is not None:  # a head's rows are mixed: all of them are needed
            yield np.concatenate(list(source.rows(name)))[order]
        elif transposed:
            yield from (part.T for part in source.rows(name, axis=1))
        else:
            yield from source.rows(name)

    def parts() -> Iterator[np.ndarray]:
        for part in rows():
            try:
                yield from_float32(np.ascontiguousarray(part), kind)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            progress(name, part.size)

    return gguf_file.Tensor(key, kind, shape, parts())


def _vocabulary(tok: Tokenizer | None, config: Config) -> dict[str, object]:
    """What llama.cpp needs to know of a tokenizer; ids that no token has are there by name, marked as unused."""
    if tok is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    V = config.vocab_size
    if tok.n_vocab > V:
        raise ValueError(f"tokenizer: its ids go up to {tok.n_vocab - 1}, the model's vocabulary has {V}")
    tokens, kinds, scores = [f"[PAD{id}]" for id in range(V)], np.full(V, UNUSED, np.int32), np.zeros(V, np.float32)
    if isinstance(tok, SentencePiece):
        for id, (piece, kind) in enumerate(zip(tok.pieces, tok.kinds, strict=True)):
            if kind != UNUSED:
                tokens[id], kinds[id], scores[id] = piece, kind, tok.scores[id]
        more = {"model": "llama", "pre": "default", "scores": scores}
        more |= {"add_space_prefix": tok.prefix, "add_eos_token": False}
        unknown = [id for id, kind in enumerate(tok.kinds) if kind == 2]
        more |= {"unknown_token_id": unknown[0]} if unknown else {}
    else:
        more = _byte_level_values(tok, tokens, kinds)
    ids = {"bos_token_id": tok.bos, "eos_token_id": tok.eot, "add_bos_token": tok.adds_bos}
    ids |= dict(zip(ENDS[1:], _further_ends(tok), strict=False))
    return {f"tokenizer.ggml.{name}": v for name, v in ({"tokens": tokens, "token_type": kinds} | more | ids).items()}


def _further_ends(tok: Tokenizer) -> list[int]:
    """Of a turn, then of a message, which is the one that calls a tool.  llama.cpp has no words for more."""
    return sorted(tok.ends - {tok.eot, tok.bos}, key=lambda id: (b"eom" in tok.token_bytes(id), id))


def _byte_level_values(tok: Tokenizer, tokens: list[str], kinds: np.ndarray) -> dict[str, object]:
    pre = next((name for name, pattern in PATTERNS.items() if pattern == tok.pattern), None)
    if pre is None:
        raise ValueError("tokenizer: llama.cpp knows no such split pattern")
    for id in range(tok.n_vocab):
        if tok.has(id):
            tokens[id], kinds[id] = _chars(tok.token_bytes(id)), 1
    for text, id in tok.special.items():
        tokens[id], kinds[id] = text, 3
    merges = [f"{_chars(left)} {_chars(right)}" for left, right in tok.merges]
    return {"model": "gpt2", "pre": pre, "merges": merges}


def _chars(token: bytes) -> str:
    return "".join([BYTE_TO_CHAR[b] for b in token])

"""Hugging Face's description of a model: config.json and the names in its weight files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from ..model import Config
from ..tokenizer import legible

_ACTS = {"gelu_tanh": "gelu_new", "gelu_erf": "gelu"}
_ACTS_IN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu_erf"}


def _is_gpt2(c: Config) -> bool:
    plain = c.n_kv_head == c.n_head and c.head_size * c.n_head == c.n_embd
    return plain and c.norm == "layernorm" and c.pos == "learned" and c.act in _ACTS and c.bias


def _is_llama(c: Config) -> bool:
    return c.norm == "rmsnorm" and c.pos == "rope" and c.act == "swiglu"


def prefix(config: Config) -> str:
    """What Hugging Face's files put before the names of `Model.params` (all but lm_head's)."""
    return "transformer." if config.norm == "layernorm" else "model."


def is_transposed(config: Config) -> bool:
    """Whether the family's linear layers are stored as (in, out): GPT-2's Conv1D."""
    return config.norm == "layernorm"


def to_file_name(config: Config, name: str) -> str:
    """The name of a parameter in model.safetensors."""
    return name if name == "lm_head.weight" else prefix(config) + name


def from_file_name(config: Config, name: str) -> str | None:
    """The parameter's name, or None for what is no parameter: a tied head stored again, old GPT-2 attention masks."""
    name = name.removeprefix(prefix(config))
    if (config.tied and name == "lm_head.weight") or name.endswith(
        (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    ):
        return None
    return name


def config_to_hf(c: Config) -> dict:
    """config.json.  A mixture that neither GPT-2 nor Llama describes gets model_type "barelm" and our own fields."""
    common = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tied, "dtype": "float32"}
    if _is_gpt2(c):
        return common | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": c.context,
            "n_embd": c.n_embd,
            "n_layer": c.n_layer,
            "n_head": c.n_head,
            "n_inner": c.n_inner,
            "activation_function": _ACTS[c.act],
            "layer_norm_epsilon": c.norm_eps,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    if _is_llama(c):
        return common | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": c.context,
            "hidden_size": c.n_embd,
            "intermediate_size": c.n_inner,
            "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head,
            "num_key_value_heads": c.n_kv_head,
            "head_dim": c.head_size,
            "hidden_act": "silu",
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta,
            "rope_scaling": None if c.rope_scaling is None else dict(c.rope_scaling),
            "attention_bias": c.bias,
            "mlp_bias": c.bias,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    return {"model_type": "barelm"} | c.to_dict()


def _no_dropout(h: Mapping):
    lost = {k: v for k, v in h.items() if (k.endswith("_pdrop") or k == "attention_dropout") and v}
    if lost:
        warnings.warn(legible(f"config.json: {', '.join(sorted(lost))} ignored: there is no dropout"), stacklevel=2)


def _act(name: str) -> str:
    if name not in _ACTS_IN:
        raise ValueError(f"activation_function: is {name!r}, must be one of {', '.join(_ACTS_IN)}")
    return _ACTS_IN[name]


def _rope(h: Mapping) -> dict:
    """rope_theta and rope_scaling, in the older form (two fields) or the newer (rope_parameters)."""
    p = h.get("rope_parameters") or {}
    scaling = h.get("rope_scaling") or p
    for name, value in (("rope_parameters", p), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: is {value!r}, must be an object")
    scaling = dict(scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = p.get("rope_theta", h.get("rope_theta", scaling.get("rope_theta", 10000.0)))
    scaling.pop("rope_theta", None)
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling | {"rope_type": kind}}


def config_from_hf(h: Mapping) -> Config:
    """The Config that a config.json describes.  ValueError names what is missing or cannot be built."""
    kind = h.get("model_type")
    _no_dropout(h)
    try:
        if kind == "gpt2":
            return Config(
                n_layer=h["n_layer"],
                n_head=h["n_head"],
                n_embd=h["n_embd"],
                n_inner=h.get("n_inner"),
                vocab_size=h["vocab_size"],
                context=h["n_positions"],
                act=_act(h.get("activation_function", "gelu_new")),
                norm_eps=h.get("layer_norm_epsilon", 1e-5),
                tied=h.get("tie_word_embeddings", True),
            )
        if kind == "llama":
            if h.get("attention_bias", False) != h.get("mlp_bias", False):
                raise ValueError("attention_bias and mlp_bias: differ, must be alike")
            if h.get("hidden_act", "silu") != "silu":
                raise ValueError(f"hidden_act: is {h['hidden_act']!r}, must be 'silu'")
            return Config(
                norm="rmsnorm",
                act="swiglu",
                pos="rope",
                bias=h.get("attention_bias", False),
                n_layer=h["num_hidden_layers"],
                n_head=h["num_attention_heads"],
                n_kv_head=h.get("num_key_value_heads"),
                head_size=h.get("head_dim"),
                n_embd=h["hidden_size"],
                n_inner=h["intermediate_size"],
                vocab_size=h["vocab_size"],
                context=h["max_position_embeddings"],
                norm_eps=h.get("rms_norm_eps", 1e-6),
                tied=h.get("tie_word_embeddings", False),
                **_rope(h),
            )
        if kind == "barelm":
            return Config(**{k: v for k, v in h.items() if k != "model_type"})
    except KeyError as missing:
        raise ValueError(f"{missing.args[0]}: is missing") from None
    except TypeError as wrong:
        raise ValueError(str(wrong)) from None
    raise ValueError(f"model_type: is {kind!r}, must be 'gpt2', 'llama' or 'barelm'")

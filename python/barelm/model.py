"""Config and Model: one transformer, described by data, computed by the kernels of `barelm._core`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from . import _core
from .lora import Lora

_GPT2 = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}

_LLAMA = dict(norm="rmsnorm", act="swiglu", pos="rope", bias=False, tied=False, norm_eps=1e-5)
_LLAMA3 = dict(**_LLAMA, vocab_size=128256, context=131072, rope_theta=500000.0)
_LLAMA32_SCALING = dict(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3"
)
_PRESETS = {name: dict(n_layer=L, n_head=NH, n_embd=C) for name, (L, NH, C) in _GPT2.items()} | {
    # a small model of Llama's form, GPT-2 124M's size
    "llama": dict(
        **_LLAMA, n_layer=12, n_head=12, n_kv_head=4, n_embd=768, n_inner=2048, vocab_size=50257, context=1024
    ),
    "llama-3.2-1b": _LLAMA3
    | dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_inner=8192, tied=True, rope_scaling=_LLAMA32_SCALING),
    "llama-3.2-3b": _LLAMA3
    | dict(n_layer=28, n_head=24, n_kv_head=8, n_embd=3072, n_inner=8192, tied=True, rope_scaling=_LLAMA32_SCALING),
    "llama-3-8b": _LLAMA3 | dict(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_inner=14336, context=8192),
    # llama2.c's models of TinyStories (arXiv:2305.07759)
    "stories260k": _LLAMA
    | dict(n_layer=5, n_head=8, n_kv_head=4, n_embd=64, n_inner=172, vocab_size=512, context=512, tied=True),
    "stories15m": _LLAMA
    | dict(n_layer=6, n_head=6, n_kv_head=6, n_embd=288, n_inner=768, vocab_size=32000, context=256, tied=True),
}

_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "act": ("gelu_tanh", "gelu_erf", "swiglu"),
    "pos": ("learned", "rope"),
}
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a transformer is made of.  Fields left out are GPT-2 124M's.

    Fields
        n_layer, n_head, n_embd   blocks, query heads, channels C
        n_kv_head                 key/value heads, a divisor of n_head (default: n_head)
        head_size                 default n_embd / n_head
        n_inner                   width F of the MLP (default: 4 C; with "swiglu" 8/3 C up to a multiple of 64)
        vocab_size, context       number of tokens V, longest sequence
        norm                      "layernorm" or "rmsnorm", with norm_eps
        act                       "gelu_tanh" (GPT-2), "gelu_erf" or "swiglu"
        pos                       "learned" or "rope" (half-split), with rope_theta and Llama-3's rope_scaling
        bias                      biases in linear layers, and in LayerNorm
        tied                      the head shares the token embedding

    Raises ValueError naming the field for what cannot be built.
    """

    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    n_inner: int | None = None
    vocab_size: int = 50257
    context: int = 1024
    head_size: int | None = None
    norm: str = "layernorm"
    act: str = "gelu_tanh"
    pos: str = "learned"
    bias: bool = True
    tied: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping | None = None

    def __post_init__(self):
        self._default("n_kv_head", lambda: self.n_head)
        self._need_sizes("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size", "context")
        if self.head_size is None:
            by = f"must be a multiple of n_head {self.n_head}, or head_size be given"
            self._need(self.n_embd % self.n_head == 0, "n_embd", by)
        self._default("head_size", lambda: self.n_embd // self.n_head)
        self._default("n_inner", lambda: -(-8 * self.n_embd // 192) * 64 if self.act == "swiglu" else 4 * self.n_embd)
        self._need_sizes("head_size", "n_inner")
        self._need(self.n_head % self.n_kv_head == 0, "n_kv_head", f"must divide n_head {self.n_head}")
        # kernels take sizes as int, and offsets as 64 bits
        self._need(self.vocab_size <= 2**31 - 64, "vocab_size", "is too large")
        widest = max(self.vocab_size, self.context, 3 * self.n_head * self.head_size, 2 * self.n_inner)
        self._need(self.n_layer * widest * self.n_embd < 2**52, "n_embd", "is too large for the other sizes")
        self._need((self.n_head + 2 * self.n_kv_head) * self.head_size < 2**31, "head_size", "is too large for n_head")
        self._need(self.n_inner < 2**30, "n_inner", "is too large")
        for name, choices in _CHOICES.items():
            self._need(getattr(self, name) in choices, name, f"must be one of {', '.join(map(repr, choices))}")
        self._need(self.pos == "learned" or self.head_size % 2 == 0, "head_size", "must be even with pos='rope'")
        for name in ("bias", "tied"):
            self._need(isinstance(getattr(self, name), bool), name, "must be True or False")
        self._need(
            _is_number(self.norm_eps) and 1e-30 <= self.norm_eps < 1, "norm_eps", "must be a number in [1e-30, 1)"
        )
        self._need(_is_number(self.rope_theta) and self.rope_theta > 0, "rope_theta", "must be a number above 0")
        if self.rope_scaling is not None:
            self._check_scaling()

    def _default(self, name, value):
        if getattr(self, name) is None:
            object.__setattr__(self, name, value())

    def _need(self, ok, field, says):
        if not ok:
            raise ValueError(f"{field}: is {getattr(self, field)!r:.100}, {says}")

    def _need_sizes(self, *names):
        for name in names:
            value = getattr(self, name)
            self._need(_is_int(value), name, "must be an int")
            self._need(1 <= value < 2**31, name, "must be at least 1 and below 2^31")
            object.__setattr__(self, name, int(value))

    def _check_scaling(self):
        scaling = self.rope_scaling
        self._need(isinstance(scaling, Mapping), "rope_scaling", "must be a mapping or None")
        missing = [name for name in _SCALING if name not in scaling]
        self._need(not missing, "rope_scaling", f"lacks {', '.join(missing)}")
        self._need(scaling.get("rope_type", "llama3") == "llama3", "rope_scaling", "only rope_type 'llama3' is known")
        good = all(_is_number(scaling[name]) and scaling[name] > 0 for name in _SCALING)
        self._need(good, "rope_scaling", "must hold numbers above 0")
        self._need(scaling["high_freq_factor"] > scaling["low_freq_factor"], "rope_scaling", "must have high above low")
        object.__setattr__(self, "rope_scaling", MappingProxyType(dict(scaling)))

    @classmethod
    def preset(cls, name: str, **fields) -> Config:
        """A known model's config, e.g. "gpt2" (124M), "gpt2-xl" (1558M), "llama-3.2-1b"; `fields` override."""
        if not isinstance(name, str) or name not in _PRESETS:
            raise ValueError(f"preset: is {name!r}, must be one of {', '.join(_PRESETS)}")
        unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"preset: unknown field {sorted(unknown)[0]!r}")
        return cls(**(_PRESETS[name] | fields))

    def to_dict(self) -> dict:
        """Plain data, for JSON; `Config(**d)` gives it back."""
        d = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        d["rope_scaling"] = None if self.rope_scaling is None else dict(self.rope_scaling)
        return d

    def memory(
        self,
        B: int = 1,
        T: int = 0,
        training: bool = True,
        weights: str = "fp32",
        lora: Lora | None = None,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> dict[str, int]:
        """Bytes by purpose for batches of B x T (T = 0: the whole context), before anything is allocated.  weights,
        lora, precision, device: as Model has them; a GPU does not have to be there.  Its kernels take working memory
        besides."""
        for letter, value, low in (("B", B, 1), ("T", T, 0)):
            if not _is_int(value) or not low <= value < 2**31:
                raise ValueError(f"{letter}: is {value!r}, must be an int, at least {low}")
        rank, modules = (lora.rank, lora.modules(self)) if lora else (0, [])
        return _core.model_memory(
            self, B, T or self.context, training, weights, rank, modules, precision, kind_of(device)
        )


class Model:
    """A transformer with its weights, gradients and AdamW moments.

    config     Config
    seed       of the initial weights (normal 0.02; what feeds the residual stream 0.02 / sqrt(2 n_layer))
    precision  "fp32", or "bf16": operands of matrix products and attention are rounded to bf16, sums, activations and
               weights stay fp32
    device     "cpu", or a GPU: "cuda", "cuda:1".  There activations are bf16 with precision="bf16", and weights,
               gradients and moments are copied where NumPy asks for them
    weights    how the matrices lie in memory: "fp32", or "bf16" or "int8" (in groups of 64 values), rounded once.  Then
               they are not trained: an adapter is, see `adapt`

    Arrays go in as C-contiguous NumPy arrays of the dtype named, never converted: a wrong dtype, shape, token id or
    order raises TypeError or ValueError naming argument and axis before any kernel runs.  Calls from several threads
    are taken one at a time.  Ctrl-C interrupts a call between layers: gradients, if they were half made, then read as
    zero.  MemoryError says how much was needed and how much there was.
    """

    def __init__(
        self, config: Config, seed: int = 0, precision: str = "fp32", device: str = "cpu", weights: str = "fp32"
    ):
        if not _is_int(seed) or not 0 <= seed < 2**64:
            raise ValueError(f"seed: is {seed!r}, must be an int in [0, 2^64)")
        self._make(config, int(seed), precision, device, weights)

    @classmethod
    def empty(cls, config: Config, precision: str = "fp32", device: str = "cpu", weights: str = "fp32") -> Model:
        """A model whose weights are zero, to be written: `params`, or `put` row by row."""
        model = cls.__new__(cls)
        model._make(config, None, precision, device, weights)
        return model

    def _make(self, config: Config, seed: int | None, precision: str, device: str, weights: str):
        if not isinstance(config, Config):
            raise TypeError(f"config: is {type(config).__name__}, must be barelm.Config")
        open_device(device)
        self.config, self.precision, self.device, self.weights = config, precision, device, weights
        self.adapter: Lora | None = None
        self.source = ""  # the folder that `load` has read
        self._core = _core.Model(config, precision, seed, weights, kind_of(device))

    def forward(self, tokens, targets, hidden=False, entropy=False, temperature=1.0, starts=None):
        """Log-probability of each target under the model.

        tokens       (B, T) int32 in [0, V)
        targets      (B, T) int32 in [0, V), or -1: not trained on, log-probability 0
        temperature  logits are divided by it
        starts       (B, T) int32 or None: first key each query sees, 0 <= starts[b, t] <= t; positions count from it
        Returns logprobs (B, T) float32; with `hidden` also the hidden states after the final norm (B, T, C), with
        `entropy` also the entropy of each prediction in nats (B, T), as a tuple in this order.
        FloatingPointError names the first weight that is not finite.
        """
        return self._core.forward(np.asarray(tokens), np.asarray(targets), hidden, entropy, temperature, _maybe(starts))

    def backward(self, dlogprobs=None, dhidden=None):
        """Add the gradients of the last `forward`, given d loss / d logprobs (B, T) float32 and, or instead, d loss /
        d hidden (B, T, C) float32."""
        self._core.backward(_maybe(dlogprobs), _maybe(dhidden))

    def forward_backward(self, tokens, targets, weights, temperature=1.0, starts=None, logprobs=False):
        """Forward and backward of loss = -sum(weights * logprobs) with the head's work done once; the same bits as
        `forward` and `backward(-weights)`.

        weights  (B, T) float32, may be negative.  Use 1 / (tokens of the whole optimizer step) for the mean.
        Returns the loss (float), or with `logprobs` (loss, logprobs (B, T)).
        """
        loss, lp = self._core.forward_backward(
            np.asarray(tokens), np.asarray(targets), np.asarray(weights), temperature, _maybe(starts)
        )
        return (loss, lp) if logprobs else loss

    def accumulate(self, tokens, targets, weights, temperature=1.0, starts=None) -> None:
        """As `forward_backward`, but nothing comes back: a device is told what to do and not waited for.  What was not
        finite comes out in `update`, and `loss` then has the sum over all passes."""
        self._core.accumulate(np.asarray(tokens), np.asarray(targets), np.asarray(weights), temperature, _maybe(starts))

    @property
    def loss(self) -> float:
        """Of the last `update`: the sum of -weights * logprobs over all passes of `accumulate` and `forward_backward`
        that it was made of."""
        return self._core.loss

    def update(
        self, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0, skip_above=None, loss_above=None
    ) -> float:
        """Clip the gradients to the norm `clip` (0 or None: not), one AdamW step (arXiv:1711.05101; decay on matrices
        and embeddings only), and forget the gradients: they then read as zero.

        Returns the norm before clipping.  Where it is above `skip_above`, or `loss` above `loss_above`, there is no
        update: weights, moments and step keep their bits.  So too where a gradient or the loss is not finite;
        FloatingPointError then names the first such tensor.
        """
        try:
            beta1, beta2 = betas
        except (TypeError, ValueError):
            raise ValueError(f"betas: is {betas!r}, must be two numbers") from None
        numbers = {"lr": lr, "betas[0]": beta1, "betas[1]": beta2, "eps": eps, "weight_decay": weight_decay}
        numbers["clip"] = 0.0 if clip is None else clip
        numbers["skip_above"] = float("inf") if skip_above is None else skip_above
        numbers["loss_above"] = float("inf") if loss_above is None else loss_above
        for name, value in numbers.items():
            if not _is_number(value, finite=False):
                raise TypeError(f"{name}: is {value!r}, must be a number")
        return self._core.update(*numbers.values())

    def logits(self, tokens, last=True, starts=None):
        """Logits (B, V) float32 after the last token of each row, or (B, T, V).  Keeps nothing for `backward`."""
        return self._core.logits(np.asarray(tokens), last, _maybe(starts))

    def trace(self, tokens, starts=None) -> dict[str, np.ndarray]:
        """Every intermediate that exists, by name: "h.0.ln_1", "h.0.attn.qkv", ..., "hidden", each (B, T, columns).
        With precision="bf16", "attn.qkv" of a large batch is kept, and shown, rounded as products read it."""
        entries = self._core.trace(np.asarray(tokens), _maybe(starts))
        return {name if layer is None else f"h.{layer}.{name}": a for name, layer, a in entries}

    # ---- an adapter ----

    def adapt(self, lora: Lora, seed: int = 0):
        """From here on train an adapter alone; the weights stay as they are, and what they had of gradients and moments
        is given up.  It begins without effect: A is uniform within 1 / sqrt(in), drawn by the seed, B is zero, as in
        PEFT.

        RuntimeError: there is one already.  ValueError: a target that the model lacks.
        """
        if not isinstance(lora, Lora):
            raise TypeError(f"lora: is {type(lora).__name__}, must be barelm.Lora")
        if not _is_int(seed) or not 0 <= seed < 2**64:
            raise ValueError(f"seed: is {seed!r}, must be an int in [0, 2^64)")
        self._core.adapt(lora.rank, lora.scale, lora.modules(self.config), int(seed))
        self.adapter = lora

    @property
    def adapter_params(self) -> Mapping[str, np.ndarray]:
        """The adapter's values as writable views: "h.0.attn.c_attn.lora_A.weight" (rank, in), "... lora_B.weight"
        (out, rank), layer by layer.  Empty where there is no adapter."""
        return self._block("adapter") if self.adapter else MappingProxyType({})

    # ---- what it holds ----

    @property
    def params(self) -> Mapping[str, np.ndarray]:
        """Weights under Hugging Face's names (without the base model's prefix) and shapes, as writable views.  Of
        weights that are not held in fp32 each look-up is a copy that cannot be written; `put` writes them."""
        return self._block("weights")

    @property
    def has_views(self) -> bool:
        """Whether `params` are views of the weights themselves: in the host's memory, in fp32."""
        return self._core.on_host and self.weights == "fp32"

    def _block(self, name: str) -> Mapping[str, np.ndarray]:
        if not self._core.on_host or (name == "weights" and not self.has_views):
            return Copies(self._core, name)
        if name.endswith("moment"):
            return MappingProxyType(self._core.moments[name == "second moment"])
        views = {"weights": "params", "adapter": "added", "gradients": "grads"}
        return MappingProxyType(getattr(self._core, views[name]))

    def put(self, name: str, row: int, values, block: str = "weights"):
        """Write rows of a weight, however it is held and wherever it lies.

        row     the first one; rows are outputs of a layer, or tokens: of a matrix that is `transposed` its columns
        values  (n, columns of a row) float32, or (n) of a vector
        block   "weights", or "adapter", "gradients", "first moment", "second moment"
        """
        self._core.put(block, name, row, np.asarray(values))

    @property
    def transposed(self) -> frozenset[str]:
        """Names of the weights that `params` shows as (in, out): GPT-2's linear layers."""
        return frozenset(name for name, (_, transposed) in self._core.shapes("weights").items() if transposed)

    @property
    def grads(self) -> Mapping[str, np.ndarray]:
        """Gradients, as `params`, or with an adapter as `adapter_params`; zero after `update`."""
        return self._block("gradients")

    @property
    def moments(self) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
        """AdamW's first and second moments, as `grads`; allocated here if there was no update yet."""
        return self._block("first moment"), self._block("second moment")

    @property
    def has_moments(self) -> bool:
        """Whether an update (or a loaded checkpoint) has left moments."""
        return self._core.has_moments

    @property
    def step(self) -> int:
        """Updates made so far; AdamW's bias correction counts from it."""
        return self._core.step

    @step.setter
    def step(self, value: int):
        if not _is_int(value) or not 0 <= value < 2**63:
            raise ValueError(f"step: is {value!r}, must be an int in [0, 2^63)")
        self._core.step = int(value)

    @property
    def decayed(self) -> frozenset[str]:
        """Names of the parameters that weight decay acts on."""
        return frozenset(self._core.decays)

    @property
    def n_params(self) -> int:
        """Number of parameters, an adapter's not counted, nor the vocabulary's padding."""
        return sum(math.prod(shape) for shape, _ in self._core.shapes("weights").values())

    def memory(self, B: int = 1, T: int = 0, training: bool = True) -> dict[str, int]:
        """Bytes by purpose for batches of B x T; see Config.memory."""
        return self.config.memory(B, T, training, self.weights, self.adapter, self.precision, self.device)

    def save(self, folder, optimizer: bool = True):
        """Write a checkpoint that transformers opens as it is; see barelm.checkpoint.save."""
        from . import checkpoint

        checkpoint.save(self, folder, optimizer=optimizer)

    @classmethod
    def load(cls, folder, precision: str = "fp32", device: str = "cpu", weights: str = "fp32", base=None) -> Model:
        """Read a checkpoint written by `save`, or by transformers or PEFT; see barelm.checkpoint.load."""
        from . import checkpoint

        return checkpoint.load(cls, folder, precision=precision, device=device, weights=weights, base=base)

    def __repr__(self):
        c = self.config
        return (
            f"Model({self.n_params / 1e6:.1f}M parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, "
            f"{c.vocab_size} tokens, context {c.context}; {self.precision} on {self.device}, step {self.step})"
        )


class Copies(Mapping):
    """Tensors that are not float32 in the host's memory: each is read when it is asked for, and cannot be written."""

    def __init__(self, core, block: str):
        self._core, self._name, self._shapes = core, block, core.shapes(block)

    def __getitem__(self, name: str) -> np.ndarray:
        shape, transposed = self._shapes[name]
        whole = self._core.get(self._name, name, 0, shape[transposed])
        whole.flags.writeable = False
        return whole.T if transposed else whole

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self):
        return len(self._shapes)


def kind_of(device: str) -> str:
    """ "cpu" or "cuda".  ValueError: there is no device of that name."""
    kind, _, number = device.partition(":") if isinstance(device, str) else ("", "", "")
    if device == "cpu" or (kind == "cuda" and (number.isdigit() or device == kind)):
        return kind
    raise ValueError(f"device: is {device!r}, must be 'cpu', 'cuda' or 'cuda:1' ...")


def open_device(device: str) -> None:
    """Make a device ready.  ValueError: there is none of that name.  RuntimeError says what it lacks."""
    if kind_of(device) == "cuda":
        _core.cuda_open(str(cuda_library()), int(device.partition(":")[2] or 0))


def cuda_library() -> Path:
    """The library of kernels for GPUs: BARELM_CUDA_LIBRARY, or beside this file.  RuntimeError: it was not built."""
    named = os.environ.get("BARELM_CUDA_LIBRARY")
    found = [Path(named)] if named else sorted(Path(__file__).parent.glob("libbarelm_cuda*.so"))
    if not found:
        raise RuntimeError("device: barelm was built without its CUDA backend (see cuda/README.md)")
    return found[0]


def _maybe(a):
    return None if a is None else np.asarray(a)


def _is_int(x) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _is_number(x, finite: bool = True) -> bool:
    """Whether x is a number that a double holds."""
    if not isinstance(x, (int, float, np.integer, np.floating)) or isinstance(x, bool):
        return False
    try:
        return math.isfinite(float(x)) or not finite
    except OverflowError:  # an int of hundreds of digits
        return False

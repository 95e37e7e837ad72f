"""What a run should be, from few words: a preset, or one dial, the depth.

The dial sets the whole model, and from it how long to train, on how many tokens a step, and how fast:

    width       64 channels a layer, heads of 64: depth 12 is GPT-2 124M
    horizon     10 tokens for each weight of a matrix product (Hoffmann et al. 2022, arXiv:2203.15556, find 20 best for
                a given compute; small models are served with half of it)
    batch       tokens a step grow as horizon^0.383 (Bergsma et al. 2025, arXiv:2505.13738), 2^18 at depth 12
    lr          as the square root of the batch, and inversely as the width (Yang et al. 2022, arXiv:2203.03466): 6e-4
                at depth 12 with 2^19 tokens a step, GPT-3's (Brown et al. 2020, arXiv:2005.14165, table 2.1)

A model that has learnt already goes on more carefully:

    lr          a tenth of a new model's of its size: 2.9e-5 for GPT-2 XL, 1.6e-5 for Llama 2 7B; nanoGPT's
                config/finetune_shakespeare.py has 3e-5, Llama 2's authors took 2e-5 (Touvron et al. 2023,
                arXiv:2307.09288, 3.1)
    horizon     two passes over the text (the same)
    adapter     ten times that rate for LoRA (2e-4 for 7B: Dettmers et al. 2023, arXiv:2305.14314, B.2)
    batch       8 windows (transformers' run_clm.py)
    warm-up     3 % of the steps (Stanford Alpaca's train.py)
"""

import dataclasses
import math
from typing import NamedTuple

from .model import Config

__all__ = ["FAMILIES", "FINE_TUNING", "FineTuning", "Pace", "matrix_weights", "model_config", "pace"]

FAMILIES = ("gpt2", "llama")
SMALL = dict(n_layer=4, n_head=4, n_embd=256, context=256)  # where neither a preset nor a depth is named

TOKENS_PER_WEIGHT = 10
GPT2_HORIZON = 10 * 123_532_032  # tokens: TOKENS_PER_WEIGHT for each matrix weight of GPT-2 124M, its head included
GPT2_BATCH, GPT2_WIDTH = 2**18, 768
GPT3_LR, GPT3_BATCH = 6e-4, 2**19


class FineTuning(NamedTuple):
    lr: float  # share of a new model's
    lora_lr: float  # the same, of an adapter
    passes: int  # over the text
    windows: int  # in a step
    warmup: float  # share of the steps
    context: int  # tokens of a window at most: longer ones take memory and add little


FINE_TUNING = FineTuning(lr=0.1, lora_lr=1.0, passes=2, windows=8, warmup=0.03, context=1024)


class Pace(NamedTuple):
    tokens: int  # to train on in all
    tokens_per_step: int  # a multiple of the context
    steps: int
    lr: float


def model_config(n_vocab: int, preset: str = "", depth: int = 0, family: str = "gpt2", **sizes: int) -> Config:
    """The Config of a preset, of a depth, or of SMALL; `sizes` that are not 0 override (n_layer, n_head, n_kv_head,
    n_embd, context).  ValueError: both a preset and a depth, or a size that cannot be.
    """
    if preset and depth:
        raise ValueError("depth: a preset has its own; name one of the two")
    sizes = {name: size for name, size in sizes.items() if size}
    if preset:
        derived = dict(n_embd=("head_size", "n_inner"), n_head=("head_size", "n_kv_head"))  # anew, where those change
        anew = {name: None for size in derived.keys() & sizes.keys() for name in derived[size]}
        return dataclasses.replace(Config.preset(preset), vocab_size=n_vocab, **anew | sizes)
    base = dict(n_layer=depth, n_head=depth, n_embd=64 * depth, context=min(1024, 128 * depth)) if depth else SMALL
    return Config.preset(family, vocab_size=n_vocab, **dict(n_kv_head=None, n_inner=None) | base | sizes)


def matrix_weights(config: Config) -> int:
    """Weights of the matrix products that a token passes, the head included: what two operations each are counted for,
    forward."""
    C, HS = config.n_embd, config.head_size
    attention = C * (config.n_head + 2 * config.n_kv_head) * HS + config.n_head * HS * C
    mlp = (3 if config.act == "swiglu" else 2) * C * config.n_inner
    return config.n_layer * (attention + mlp) + C * config.vocab_size


def pace(config: Config) -> Pace:
    """How long, on how much a step, and how fast a model of this size should train; see the head of this file."""
    tokens = TOKENS_PER_WEIGHT * matrix_weights(config)
    wanted = GPT2_BATCH * (tokens / GPT2_HORIZON) ** 0.383
    windows = max(1, 2 ** round(math.log2(wanted / config.context)))
    per_step = windows * config.context
    lr = GPT3_LR * math.sqrt(per_step / GPT3_BATCH) * GPT2_WIDTH / config.n_embd
    return Pace(tokens, per_step, max(1, round(tokens / per_step)), float(f"{lr:.2g}"))

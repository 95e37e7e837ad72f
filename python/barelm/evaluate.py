"""How well a model predicts a text: bits per byte, which does not depend on the tokenizer."""

import math
from typing import NamedTuple

import numpy as np

from .data.tokens import Tokens

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    bits_per_byte: float  # -sum(log2 p(token)) / bytes of the text that the tokens stand for
    loss: float  # mean of -log p(token), nats per token
    tokens: int
    n_bytes: int
    stderr: float = 0.0


def evaluate(model, data: Tokens, B: int = 8, T: int | None = None, batches: int | None = None) -> Evaluation:
    """Score `data` in windows of T (the model's context where left out) that follow each other, B at a time; each
    window starts without memory of the one before.  At most `batches` batches.  End-of-text tokens count in the bits,
    and stand for no bytes.

    ValueError: there is nothing to score.
    """
    nats, tokens, n_bytes = 0.0, 0, 0
    for inputs, targets, size in data.windows(B, T or model.config.context, batches):
        logprobs = model.forward(inputs, targets)
        scored = targets >= 0
        nats -= float(np.sum(logprobs[scored], dtype=np.float64))
        tokens += int(scored.sum())
        n_bytes += size
    if n_bytes == 0:
        raise ValueError("data: there is no text to score")
    return Evaluation(nats / math.log(2) / n_bytes, nats / tokens, tokens, n_bytes)

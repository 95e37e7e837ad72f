"""The training loop's two ideas: one optimizer step, and the learning rate over time."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .recipe import matrix_weights

__all__ = ["StepResult", "flops_per_token", "step", "warmup_cosine"]


class StepResult(NamedTuple):
    loss: float  # mean negative log-likelihood of the step's targets, nats
    norm: float  # L2 norm of the gradient before clipping
    tokens: int  # targets trained on


def warmup_cosine(step: int, lr: float, min_lr: float, warmup: int, done: float) -> float:
    """Learning rate of update number `step` (the first is 0): half a cosine from lr down to min_lr (Loshchilov, Hutter
    2017, arXiv:1608.03983; without restarts), times a linear rise from 0 over the first `warmup` updates.

    done    share of the whole run that lies behind, in [0, 1]: step / steps, or the time used of the time given.  The
            cosine runs over the whole of it, so that a run whose length is a time has the same curve.
    """
    cosine = min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    return cosine * min(1.0, (step + 1) / warmup) if warmup else cosine


def step(
    model,
    micro_batches: Iterable[tuple[np.ndarray, np.ndarray]],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip: float = 1.0,
) -> StepResult:
    """One optimizer step on next-token loss.

    micro_batches   (tokens, targets) pairs, (B, T) int32 each; targets of -1 are not trained on.  Every token weighs
                    the same: the denominator is the number of targets of the whole step, not of a micro-batch.

    ValueError: nothing to train on.  FloatingPointError: the loss or the gradient is not finite; where it is the loss,
    the weights have not been touched.
    """
    batches = list(micro_batches)
    n = sum(int(np.count_nonzero(targets >= 0)) for _, targets in batches)
    if n == 0:
        raise ValueError("micro_batches: no target to train on")
    loss = 0.0
    for tokens, targets in batches:
        weights = np.where(targets >= 0, np.float32(1 / n), np.float32(0))
        loss += float(model.forward_backward(tokens, targets, weights))
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    norm = float(model.update(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip=clip))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the norm of the gradient is {norm}")
    return StepResult(loss, norm, n)


def flops_per_token(config, T: int) -> float:
    """Floating-point operations of training on one token, in windows of T: two per multiply-add, forward once and
    backward twice.  Counted: the weights of every matrix product and the causal half of the attention scores.  Not
    counted: look-ups, norms, and what a kernel computes again on its way back.  As PaLM's appendix B counts
    (arXiv:2204.02311), but for the causal half.
    """
    scores = 2 * config.n_head * config.head_size * (T + 1) / 2  # q.k and p.v, over (T + 1) / 2 keys on average
    return 6.0 * (matrix_weights(config) + config.n_layer * scores)

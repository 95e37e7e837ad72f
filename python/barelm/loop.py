"""The training loop's ideas: one optimizer step, and the learning rate over time."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .guard import Guard
from .lora import Lora
from .recipe import matrix_weights

__all__ = ["SCHEDULES", "StepResult", "flops_per_token", "schedule", "step"]


class StepResult(NamedTuple):
    loss: float  # mean negative log-likelihood of the step's targets, nats
    norm: float  # L2 norm of the gradient before clipping; NaN where it is not finite
    tokens: int  # targets trained on
    skipped: str = ""  # why no update was made; "" where one was


# ---- learning rate ------------------------------------------------------------------------------------------------


def cosine(done: float, end: float, decay: float) -> float:
    """Half a cosine from 1 down to `end` (Loshchilov, Hutter 2017, arXiv:1608.03983; without restarts)."""
    return end + 0.5 * (1 - end) * (1 + math.cos(math.pi * done))


def wsd(done: float, end: float, decay: float) -> float:
    """Warm-up, stable, decay: 1, and over the last share `decay` of the run a straight line down to `end` (Hu et al.
    2024, MiniCPM, arXiv:2404.06395).  The stable part can be gone on from at any time."""
    return 1 - (1 - end) * max(0.0, (done - (1 - decay)) / decay) if decay else 1.0


SCHEDULES = {"cosine": cosine, "wsd": wsd}


def schedule(step: int, done: float, lr: float, *, kind: str = "cosine", warmup: int = 0, end=0.1, decay=0.2) -> float:
    """Learning rate of update number `step` (the first is 0).

    done     share of the whole run that lies behind, in [0, 1]: step / steps, or the time used of the time given
    kind     a name of SCHEDULES; warmup: updates over which the rate rises in a straight line from 0
    end      share of lr that is left at the end; decay: share of the run over which "wsd" falls
    """
    rate = lr * SCHEDULES[kind](min(max(done, 0.0), 1.0), end, decay)
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate


# ---- a step -------------------------------------------------------------------------------------------------------


def step(
    model,
    micro_batches: Iterable[tuple[np.ndarray, ...]],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    guard: Guard | None = None,
) -> StepResult:
    """One optimizer step on next-token loss.

    micro_batches   (tokens, targets) or (tokens, targets, starts), (B, T) int32 each; targets of -1 are not trained on.
                    Every token weighs the same: the denominator is the number of targets of the whole step, not of a
                    micro-batch.
    guard           skips the step where its loss or its gradient is an outlier: the result says why, and weights,
                    moments and step of the model keep their bits

    ValueError: nothing to train on.  FloatingPointError: without a guard, the loss or the gradient is not finite; with
    one, too many steps in a row were skipped; or a weight is not finite.
    """
    batches = list(micro_batches)
    n = sum(int(np.count_nonzero(targets >= 0)) for _, targets, *_ in batches)
    if n == 0:
        raise ValueError("micro_batches: no target to train on")
    for tokens, targets, *starts in batches:
        weights = np.where(targets >= 0, np.float32(1 / n), np.float32(0))
        model.accumulate(tokens, targets, weights, starts=starts[0] if starts else None)

    watch = guard or Guard(deviations=0, patience=1)
    norm, why = _update(model, watch, lr, betas, eps, weight_decay, clip)
    if why:
        watch.skipped(why)
    else:
        watch.made(model.loss, norm)
    return StepResult(model.loss, norm, n, why)


def _update(model, watch: Guard, *numbers) -> tuple[float, str]:
    """The norm of the gradient, and why there was no update; "" where there was one."""
    limits = {"the loss": watch.loss_limit, "the norm of the gradient": watch.norm_limit}
    before = model.step
    try:
        norm = model.update(*numbers, loss_above=limits["the loss"], skip_above=limits["the norm of the gradient"])
    except FloatingPointError as error:  # it names the first bad tensor
        if not str(error).startswith("update: "):
            raise  # a weight is not finite: no later step would be better
        return math.nan, str(error).removeprefix("update: ").split(";")[0]
    if model.step > before:
        return norm, ""
    found = {"the loss": model.loss, "the norm of the gradient": norm}
    return norm, next(f"{name}, {x:.4g}, is above {limits[name]:.4g}" for name, x in found.items() if x > limits[name])


def flops_per_token(config, T: int, lora: Lora | None = None) -> float:
    """Floating-point operations of training on one token, in windows of T: two per multiply-add, forward once and
    backward twice.  Counted: the weights of every matrix product and the causal half of the attention scores.  Not
    counted: look-ups, norms, and what a kernel computes again on its way back.  As PaLM's appendix B counts
    (arXiv:2204.02311), but for the causal half.  With an adapter the weights that stay are passed backward only once.
    """
    scores = 2 * config.n_head * config.head_size * (T + 1) / 2  # q.k and p.v, over (T + 1) / 2 keys on average
    weights = 4.0 * matrix_weights(config) + 6.0 * lora.size(config) if lora else 6.0 * matrix_weights(config)
    return weights + 6.0 * config.n_layer * scores

"""Which token comes next: what is asked of a text (Sampling), and one token drawn for each row of logits."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import _core

__all__ = ["Drawn", "Sampling", "draw", "penalised"]


@dataclass(frozen=True)
class Sampling:
    """What is asked of a text.

    max_tokens          tokens to write at most
    temperature         logits are divided by it; 0: always the most likely token (the first of equals)
    top_k               only the k most likely tokens may come; None: all
    top_p               only the fewest tokens whose probabilities sum to at least p may come (nucleus sampling:
                        Holtzman et al. 2019, arXiv:1904.09751), of what top_k left; 1: all
    min_p               only tokens at least this share as probable as the most likely one may come (Nguyen et al.
                        2024, arXiv:2407.01082), of what top_p left; 0: all
    repetition_penalty  logits of the tokens that the prompt or the text has are divided by it where they are positive,
                        multiplied where negative (Keskar et al. 2019, arXiv:1909.05858); 1: none
    seed                another seed, another text; the same seed, the same
    stop                strings before which the text ends; one alone may be given as it is
    stop_ids            tokens that end the text, as the end-of-text token always does
    alternatives        so many of the likeliest tokens are kept beside each one that is drawn
    ignore_eot          the end-of-text token, and bos, are tokens like others

    ValueError, TypeError: names the field.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: "str | Sequence[str]" = ()
    stop_ids: Sequence[int] = ()
    alternatives: int = 0
    ignore_eot: bool = False

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        if not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError("stop: each must be a string that is not empty")
        if not all(_is_whole(id) and id >= 0 for id in self.stop_ids):
            raise ValueError("stop_ids: each must be a token id")
        for name in ("max_tokens", "seed", "alternatives", *(["top_k"] if self.top_k is not None else [])):
            if not _is_whole(getattr(self, name)):
                raise TypeError(f"{name}: must be a whole number, got {getattr(self, name)!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not _is_whole(value) and not isinstance(value, float | np.floating):
                raise TypeError(f"{name}: must be a number, got {value!r}")
        rules = [
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more, and finite"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more, or None"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0, and finite"),
            ("seed", 0 <= self.seed < 2**64, "in [0, 2^64)"),
            ("alternatives", self.alternatives >= 0, "0 or more"),
        ]
        for name, good, rule in rules:
            if not good:
                raise ValueError(f"{name}: must be {rule}, got {getattr(self, name)}")


def _is_whole(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


class Drawn(NamedTuple):
    """A token of a text.

    id               its id
    logprob          log p(id) in nats under the model as it is, at temperature 1: to the bit what Model.forward says
    sampled_logprob  log p(id) under the distribution it was drawn from, after penalty, temperature, top_k, top_p, min_p
    alternatives     ((id, logprob), ...) of the likeliest tokens under the model as it is, the likeliest first
    forced           it was put there from outside, so that its sampled_logprob is 0
    """

    id: int
    logprob: float
    sampled_logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()
    forced: bool = False


def draw(
    logits: "np.ndarray | Sequence[np.ndarray]", samplings: Sequence[Sampling], u: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """A token for each row of logits (n, V): what the row's number in u (n), in [0, 1), draws from softmax(logits /
    temperature) as the row's Sampling leaves it; the penalty is not its concern.  Of equal logits the lower id is the
    likelier.  -inf is a token that cannot come.

    Returns the tokens (n) int32 and their log-probabilities under the distributions drawn from (n) float32; the
    operator `sample` of csrc/ops.def says how exactly.  ValueError: a number of u; logits are NaN or
    +inf, or nothing can come.
    """
    n = len(samplings)
    ids, logprobs = np.empty(n, np.int32), np.empty(n, np.float32)
    if n:
        logits = np.ascontiguousarray(logits, np.float32)
        V = logits.shape[1]
        given = np.array([options(s, V) for s in samplings], np.float32)
        _core.ops.sample("", ids, logprobs, logits, given, numbers(u), n, V, V)
    check(ids)
    return ids, logprobs


def check(ids: np.ndarray) -> None:
    """ValueError where the operator could draw nothing."""
    if (ids < 0).any():
        raise ValueError("logits: NaN, +inf or nothing but -inf, nothing can be drawn")


def numbers(u: Sequence[float]) -> np.ndarray:
    """What tokens are drawn by, as the operator takes it.  ValueError: a number outside [0, 1)."""
    out = np.array(u, np.float64)
    bad = out[~((out >= 0) & (out < 1))]
    if bad.size:
        raise ValueError(f"u: must be in [0, 1), got {bad[0]}")
    return out


OPTIONS = 4


def options(s: Sampling, V: int) -> list[float]:
    """In the operator's order, and within its bounds when rounded to float."""
    float32 = np.finfo(np.float32)
    top_k = s.top_k if s.top_k is not None and s.top_k < V else 0
    below_one = 1 - float(float32.epsneg)
    return [min(s.temperature, float(float32.max)), top_k, max(s.top_p, float(float32.tiny)), min(s.min_p, below_one)]


def penalised(logits: np.ndarray, ids: Iterable[int], penalty: float) -> np.ndarray:
    """Logits (V) in float64 with those of the ids made less likely: positive ones divided by the penalty, negative ones
    multiplied, once however often an id is there (Keskar et al. 2019, arXiv:1909.05858); ids from V on are passed over.
    """
    seen = np.unique(np.fromiter(ids, np.int64))
    seen = seen[seen < len(logits)]
    out = np.array(logits, np.float64)
    out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    return out

"""Which token comes next: what is asked of a text (Sampling), and one token drawn for each row of logits."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Drawn", "Sampling", "draw", "penalised", "sample_token"]


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
    ignore_eot          the end-of-text token is a token like others

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


def draw(logits: np.ndarray, samplings: Sequence[Sampling], u: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A token for each row of logits (n, V), as sample_token of the row, its Sampling and its number in u (n).

    Returns the tokens (n) int64 and their log-probabilities under the distributions drawn from (n) float64.
    """
    drawn = [
        sample_token(row, s.temperature, s.top_k, s.top_p, number, s.min_p)
        for row, s, number in zip(logits, samplings, u, strict=True)
    ]
    return np.array([token for token, _ in drawn], np.int64), np.array([logprob for _, logprob in drawn], np.float64)


def sample_token(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float, u: float, min_p: float = 0.0
) -> tuple[int, float]:
    """The token that the number u in [0, 1) draws from softmax(logits / temperature), in float64, and its
    log-probability under what top_k, top_p and min_p (see Sampling) leave of it.

    logits  (V); -inf is a token that cannot come

    ValueError: the logits are NaN or +inf, or nothing can come.
    """
    logits = np.asarray(logits, np.float64)
    best = logits.max(initial=-math.inf)
    if not math.isfinite(best):
        raise ValueError(f"logits: the largest is {best}, nothing can be drawn")
    if temperature == 0:
        return int(logits.argmax()), 0.0
    with np.errstate(over="ignore"):  # a tiny temperature sends every other logit to -inf, as it should
        scaled = (logits - best) / temperature
    p = np.exp(scaled)
    if top_k is not None or top_p < 1:
        order = np.argsort(-p, kind="stable")  # stable: of equals the lower id stays
        keep = order[:top_k]
        if top_p < 1:
            mass = np.cumsum(p[keep])
            keep = keep[: 1 + np.searchsorted(mass, top_p * mass[-1])]
        p = np.where(np.isin(np.arange(len(p)), keep), p, 0.0)
    p[p < min_p] = 0.0  # the most likely token's is 1
    mass = np.cumsum(p)
    token = np.searchsorted(mass, u * mass[-1], side="right")
    token = int(min(token, np.flatnonzero(p)[-1]))  # u * mass may round up to mass
    return token, float(scaled[token] - math.log(mass[-1]))


def penalised(logits: np.ndarray, ids: Iterable[int], penalty: float) -> np.ndarray:
    """Logits (V) in float64 with those of the ids made less likely: positive ones divided by the penalty, negative ones
    multiplied, once however often an id is there (Keskar et al. 2019, arXiv:1909.05858); ids from V on are passed over.
    """
    seen = np.unique(np.fromiter(ids, np.int64))
    seen = seen[seen < len(logits)]
    out = np.array(logits, np.float64)
    out[seen] = np.where(out[seen] > 0, out[seen] / penalty, out[seen] * penalty)
    return out

"""Text from a model: one token drawn from its logits, and the loop that draws many."""

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from . import _core

__all__ = ["Drawn", "draw_tokens", "generate", "sample_token", "text_of"]


class Drawn(NamedTuple):
    id: int
    logprob: float  # log p(id) under the model as it is, before temperature, top_k and top_p; nats


def sample_token(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float, u: float) -> int:
    """The token that the number u in [0, 1) draws from softmax(logits / temperature), in float64.

    logits        (V); -inf is a token that cannot come
    temperature   0: the most likely token (the first of equals)
    top_k         only the k most likely may come; None: all
    top_p         only the fewest tokens whose probabilities sum to at least p may come (nucleus sampling: Holtzman
                  et al. 2019, arXiv:1904.09751), after top_k; 1: all

    ValueError: the logits are NaN or +inf, or nothing can come.
    """
    logits = np.asarray(logits, np.float64)
    best = logits.max(initial=-math.inf)
    if not math.isfinite(best):
        raise ValueError(f"logits: the largest is {best}, nothing can be drawn")
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature sends every other logit to -inf, as it should
        p = np.exp((logits - best) / temperature)
    if top_k is not None or top_p < 1:
        order = np.argsort(-p, kind="stable")  # stable: of equals the lower id stays
        keep = order[:top_k]
        if top_p < 1:
            mass = np.cumsum(p[keep])
            keep = keep[: 1 + np.searchsorted(mass, top_p * mass[-1])]
        p = np.where(np.isin(np.arange(len(p)), keep), p, 0.0)
    mass = np.cumsum(p)
    token = np.searchsorted(mass, u * mass[-1], side="right")
    return int(min(token, np.flatnonzero(p)[-1]))  # u * mass may round up to mass


def generate(
    model,
    tok,
    prompt: "str | bytes | Sequence[int]" = "",
    *,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    row: int = 0,
    stop: "str | Sequence[str]" = (),
) -> Iterator[str]:
    """Continue a prompt; yields pieces of valid text as they come, without the prompt.

    Ends after max_tokens, at the end-of-text token, or before the first of the `stop` strings.  An empty prompt begins
    a new document.  Draw number i comes from Philox keyed by (seed, stream, row, i), so samples with other rows are
    independent, and each is the same whatever runs beside it.  See sample_token for temperature, top_k and top_p.
    Only the last `context` tokens are seen.

    ValueError, before anything runs: an argument out of its range, or a prompt with an id that the model lacks.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError("stop: each must be a string that is not empty")
    drawn = draw_tokens(
        model,
        tok,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        row=row,
    )
    return text_of((token.id for token in drawn), tok, stops)


def draw_tokens(
    model,
    tok,
    prompt: "str | bytes | Sequence[int]" = "",
    *,
    max_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    row: int = 0,
) -> Iterator[Drawn]:
    """As generate, but the tokens themselves, each with its log-probability; the end-of-text token is not yielded."""
    ids = tok.encode(prompt) if isinstance(prompt, str | bytes) else [int(id) for id in prompt]
    _check(model, tok, ids, max_tokens, temperature, top_k, top_p, seed, row)

    def draw(logits: np.ndarray, position: int) -> int:
        u = _core.philox_uniform(seed, _core.STREAM_SAMPLE, row, position)
        return sample_token(logits, temperature, top_k, top_p, u)

    return _tokens(model, tok, ids or [tok.eot], max_tokens, draw)


def _check(model, tok, ids, max_tokens, temperature, top_k, top_p, seed, row) -> None:
    config = model.config
    if tok.n_vocab > config.vocab_size:
        raise ValueError(f"tok: its ids go up to {tok.n_vocab - 1}, the model's vocabulary has {config.vocab_size}")
    bad = next((id for id in ids if not 0 <= id < config.vocab_size), None)
    if bad is not None:
        raise ValueError(f"prompt: the id {bad} is not in [0, {config.vocab_size})")
    rules = [
        ("max_tokens", max_tokens, max_tokens >= 0, "0 or more"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more, and finite"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or None"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
        ("seed", seed, 0 <= seed < 2**64, "in [0, 2^64)"),
        ("row", row, 0 <= row < 2**64, "in [0, 2^64)"),
    ]
    for name, value, good, rule in rules:
        if not good:
            raise ValueError(f"{name}: must be {rule}, got {value}")


def _tokens(model, tok, ids: list[int], max_tokens: int, draw: Callable[[np.ndarray, int], int]) -> Iterator[Drawn]:
    ids = list(ids)
    for position in range(max_tokens):
        window = np.array([ids[-model.config.context :]], np.int32)
        logits = model.logits(window, last=True)[0]
        token = draw(logits[: tok.n_vocab], position)  # a model's vocabulary may be padded
        if token == tok.eot:
            return
        yield Drawn(token, _logprob(logits, token))
        ids.append(token)


def _logprob(logits: np.ndarray, token: int) -> float:
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


def text_of(tokens: Iterable[int], tok, stops: Sequence[str] = ()) -> Iterator[str]:
    """Tokens to text: bytes wait until they are whole characters, characters while they may begin a stop string."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""
    for token in tokens:
        held += decoder.decode(tok.token_bytes(token))
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
            return
        safe = len(held) - _overlap(held, stops)
        if safe:
            yield held[:safe]
            held = held[safe:]
    held += decoder.decode(b"", final=True)
    if held:
        yield held


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of text that begins a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for n in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return n
    return 0

"""Which of several continuations a model finds likeliest, and how often that is the right one.

How a text becomes tokens, and which tokens are scored, is what lm-evaluation-harness does (TemplateLM._encode_pair in
lm_eval/api/model.py, HFLM._loglikelihood_tokens in lm_eval/models/huggingface.py), but for the first token.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .tasks import Item, Request
from .tokenizer import Tokenizer

__all__ = ["Accuracy", "accuracy", "chance", "encode_pair", "fits", "right", "score"]


def encode_pair(tok: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(ids of the context with bos before them, ids of the continuation, at least one).

    A context begins a text, which models have read bos before: those of this project the end-of-text token, those of
    the Llama family <s> or <|begin_of_text|>, and GPT-2 its <|endoftext|> between documents.  Where the context is
    empty something has to be there anyway, for the first token of a continuation follows something.
    lm-evaluation-harness does the same for the Llama family; for GPT-2 it does so only there.

    White space at the end of the context goes to the continuation, for that is where tokens have it.  Then both are
    encoded together, and what exceeds the length of the context encoded alone is the continuation.  Where nothing does,
    because the last characters of the context and all of the continuation are one token, the continuation is encoded by
    itself, as OLMo always does (olmo/eval/downstream.py).
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    before, whole = tok.encode(context), tok.encode(context + continuation)
    return [tok.bos, *before], whole[len(before) :] or tok.encode(continuation)


def score(model, tok: Tokenizer, items: Sequence[Item], batch: int = 8, T: int | None = None) -> list[dict]:
    """The records of the items: of each choice the sum of the log-probabilities of its tokens behind its context.

    batch  rows (choices) at a time; neighbours in length run together, and what a row gives does not depend on them
    T      tokens that the model sees at once at most (its context where left out).  Of a context that is too long the
           last tokens are read; all of the continuation is always scored

    A record is {"name", "gold"} of the item, "cut": for how many tokens of a context there was no room, and of each
    choice "logprobs" (nats), "tokens", "bytes" and "chars", without the space in front.
    ValueError names the item of which a continuation alone is longer than T.
    """
    rows = [[_row(tok, item, request, T or model.config.context) for request in item.requests] for item in items]
    sums = iter(_sums(model, [row for of_item in rows for row in of_item], batch))
    return [
        {
            "name": item.name,
            "gold": item.gold,
            "logprobs": [next(sums) for _ in of_item],
            "tokens": [row.scored for row in of_item],
            "bytes": [len(request.choice.encode()) for request in item.requests],
            "chars": [len(request.choice) for request in item.requests],
            "cut": max(row.cut for row in of_item),
        }
        for item, of_item in zip(items, rows, strict=True)
    ]


def fits(record: dict, item: Item) -> bool:
    """Whether a record that comes from a file is one of this item."""
    lists = [record.get(key) for key in ("logprobs", "chars", "tokens", "bytes")]
    numbers = all(
        isinstance(values, list)
        and len(values) == len(item.requests)
        and all(type(value) in (int, float) for value in values)
        for values in lists
    )
    same = (record.get("name"), record.get("gold")) == (item.name, item.gold) and type(record.get("cut")) is int
    return numbers and same and record["chars"] == [len(request.choice) for request in item.requests]


class _Row(NamedTuple):
    ids: list[int]  # as many as fit, from the end: T that are read and the last, which is only scored
    scored: int  # the last so many
    cut: int


def _row(tok: Tokenizer, item: Item, request: Request, T: int) -> _Row:
    context, continuation = encode_pair(tok, *request)
    if len(continuation) > T:
        raise ValueError(f"{item.name}: a choice has {len(continuation)} tokens, the model sees {T} at once")
    ids = context + continuation
    return _Row(ids[-T - 1 :], len(continuation), max(0, len(ids) - T - 1))


def _sums(model, rows: list[_Row], batch: int) -> list[float]:
    sums = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for first in range(0, len(order), batch):
        here = order[first : first + batch]
        for i, value in zip(here, _forward(model, [rows[i] for i in here]), strict=True):
            sums[i] = value
    return sums


def _forward(model, rows: list[_Row]) -> list[float]:
    """The sum of each row.  Shorter ones are filled up on the right, which no token before it sees."""
    tokens, targets = np.zeros((2, len(rows), max(len(row.ids) for row in rows) - 1), np.int32)
    targets.fill(-1)
    for b, row in enumerate(rows):
        n = len(row.ids) - 1
        tokens[b, :n] = row.ids[:-1]
        targets[b, n - row.scored : n] = row.ids[-row.scored :]
    logprobs = model.forward(tokens, targets)
    # a sum in NumPy's order would depend on how far rows are filled up
    return [math.fsum(of_row[len(row.ids) - 1 - row.scored :]) for of_row, row in zip(logprobs, rows, strict=True)]


# ---- what it comes to -----------------------------------------------------------------------------------------------


def right(record: dict, measure: str) -> bool:
    """Whether the right choice of an item is the likeliest, the first of equals.

    acc       by the sum of log-probabilities
    acc_norm  by that sum per character of the choice (lm-evaluation-harness; OLMo's acc_per_char)
    """
    values = record["logprobs"]
    if measure == "acc_norm":
        values = [value / chars for value, chars in zip(values, record["chars"], strict=True)]
    return values.index(max(values)) == record["gold"]


class Accuracy(NamedTuple):
    value: float
    stderr: float | None  # None: a single item does not tell
    items: int


def accuracy(hits: Iterable[bool]) -> Accuracy:
    """The share of hits, and its standard error sqrt(p (1 - p) / (n - 1)), that of the mean of a sample of n."""
    hits = list(hits)
    n, p = len(hits), sum(hits) / len(hits)
    return Accuracy(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None, n)


def chance(records: Iterable[dict]) -> float:
    """The share of hits of one who chooses blindly."""
    shares = [1 / len(record["logprobs"]) for record in records]
    return sum(shares) / len(shares)

"""Session: rows of tokens with their keys and values kept, so that each new token costs one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import _core, drawing
from ._core import CacheFull, StaleRow
from .drawing import Sampling
from .model import Config, Model, kind_of, open_device

__all__ = ["PAGE", "CacheFull", "Session", "StaleRow"]

PAGE: int = _core.PAGE  # tokens
_GREEDY = Sampling(temperature=0)


class Session:
    """A KV cache for one model, in pages of 64 tokens, and the rows that live in it.

    model       its weights are packed once, and again after `model.update()`
    max_tokens  room, rounded up to whole pages; rows that share tokens share their pages
    weights     how they are packed: "fp32", "bf16" or "int8" (default: the model's precision).  Keys and values are
                fp32 with "fp32", else bf16.

    Rows are named by numbers that are given once.  They join, grow, fork and leave at any time; what a row computes
    does not depend on the others nor on the chunks it came in, and with the model's precision it has the bits of
    `model.forward` over all of its tokens.  In "int8" groups of 64 weights, and of 64 values of what they multiply,
    share a scale: products lose about 1 % of their size.  Calls are taken one at a time with those of the model.
    Ctrl-C interrupts a step between layers: the rows are then as they were.

    MemoryError says how much was needed and how much there was.  An unknown row is a ValueError.
    """

    def __init__(self, model: Model, max_tokens: int, weights: str | None = None):
        self.config: Config = model.config
        self._core = _core.Session(model._core, max_tokens, weights)

    @classmethod
    def load(cls, folder, max_tokens: int, weights: str = "fp32", device: str = "cpu") -> Session:
        """A session on the weights of a checkpoint, which are packed as they are read: there is no model beside it, and
        an "int8" session of 124M parameters has 135 MB of them.  The bits are those of a session on
        `Model.load(folder)` on the same device.  CheckpointError names what is wrong with the folder."""
        from . import checkpoint  # as Model.load does

        open_device(device)
        checkpoint.verify(folder)
        source = checkpoint.open_weights(folder)
        session = cls.__new__(cls)
        session.config = source.config
        session._core = _core.Session(
            config=source.config, max_tokens=max_tokens, weights=weights, device=kind_of(device)
        )
        for name, transposed in session._core.order():
            for rows in source.rows(name, axis=int(transposed)):
                session._core.put(name, np.ascontiguousarray(rows.T if transposed else rows))
        return session

    @property
    def pages(self) -> int:
        """All pages there are."""
        return self._core.pages

    @property
    def room(self) -> int:
        """Pages that are free."""
        return self._core.room

    @property
    def memory(self) -> dict[str, int]:
        """Bytes: "weights" (those that are packed; of a session that `load` has made, all) and "cache"."""
        return self._core.memory

    def add(self) -> int:
        """A new row, empty; it takes no page yet."""
        return self._core.add()

    def fork(self, row: int, n: int = 1) -> list[int]:
        """n new rows with all tokens of `row` so far.  They share its pages; one that is not full is copied when one of
        them writes to it."""
        return self._core.fork(row, n)

    def free(self, row: int) -> None:
        """Forget a row.  Its pages are free again where no other row shares them."""
        self._core.free(row)

    def length(self, row: int) -> int:
        """Tokens in a row."""
        return self._core.length(row)

    def pages_needed(self, rows: Sequence[int], counts: Sequence[int]) -> int:
        """Free pages that a step takes which gives these rows so many tokens."""
        return self._core.pages_needed(rows, counts)

    def step(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> np.ndarray:
        """advance(), and the logits (len(rows), V) float32 behind each row's last token, with no other step between."""
        return self._step(rows, chunks, read=True)

    def advance(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
        """Append to each row its chunk of at least one token id, all in one pass over the weights.

        Chunks may differ in length: some rows read their prompts while others take one token each.

        CacheFull: there are not enough pages.  StaleRow: a row has tokens that went through older weights; free it and
        begin a new one.  ValueError: a token out of range, an empty chunk, a row given twice, or longer than the
        model's context.  After any of them every row is as it was.
        """
        self._step(rows, chunks, read=False)

    def _step(self, rows: Sequence[int], chunks: Sequence[Sequence[int]], read: bool) -> np.ndarray:
        if len(rows) != len(chunks):
            raise ValueError(f"chunks: there are {len(chunks)}, rows has {len(rows)}")
        ids = [_ids(chunk, f"chunks[{i}]") for i, chunk in enumerate(chunks)]
        flat = np.concatenate(ids) if ids else np.empty(0, np.int32)
        return self._core.step(rows, [len(chunk) for chunk in ids], flat, read)

    def logits(self) -> np.ndarray:
        """Logits (R, V) float32 behind the last token of each row of the last step; no rows where there was none."""
        return self._core.logits()

    def draw(
        self, samplings: Sequence[Sampling | None], u: Sequence[float], vocab: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A token for each row of the last step: `drawing.draw` of its logits, which stay where they are, on a GPU too.

        samplings  of each row; None: nothing is wanted of it, and what is returned for it means nothing
        u          (R) numbers in [0, 1)
        vocab      only the first so many ids may come (default: all)

        Returns the tokens (R) int32, their log-probabilities under the model, as logprobs() has them, and under the
        distributions drawn from, (R) float32.  ValueError: logits are NaN or +inf, or a number in u.  RuntimeError: the
        last step had another number of rows.
        """
        V = self.config.vocab_size if vocab is None else vocab
        options = np.array([drawing.options(s or _GREEDY, V) for s in samplings], np.float32)
        ids, logprobs, sampled = self._core.draw(options.reshape(-1, drawing.OPTIONS), drawing.numbers(u), V)
        drawing.check(ids[[s is not None for s in samplings]])
        return ids, logprobs, sampled

    def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        """log p(token) under the model for each row of the last step, from its logits: (R,) float32, nats; the bits of
        `model.forward` with this token as target."""
        return self._core.logprobs(_ids(tokens, "tokens"), temperature)

    def refresh(self) -> None:
        """Take the weights anew, after some were written by hand through `model.params`.  `model.update()` needs no
        such call.  RuntimeError for a session that `load` has made."""
        self._core.refresh()


def _ids(tokens: Sequence[int], name: str) -> np.ndarray:
    ids = np.asarray(tokens)
    if ids.ndim != 1:
        raise ValueError(f"{name}: has {ids.ndim} dimensions, must have 1")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name}: dtype is {ids.dtype}, must be an integer's")
    if ids.dtype == np.int32:
        return np.ascontiguousarray(ids)  # the usual case of a step of decoding: clip takes 4 us
    return np.clip(ids, -1, 2**31 - 1).astype(np.int32)  # out of range stays out of range

"""An n-gram model with backoff: what counting alone reaches on a text, to hold a transformer against.

Absolute discounting, interpolated (Ney, Essen, Kneser 1994, "On structuring probabilistic dependences in stochastic
language modelling"): with h a history of n - 1 tokens, h' the same without its oldest, and c counts in the training
text,

    p(w | h) = max(c(h w) - D, 0) / c(h) + D * kinds(h) / c(h) * p(w | h')        kinds(h): different tokens after h
    p(w | h) = p(w | h')                                                          where h never came
    D = (n1 + 1) / (n1 + 2 n2 + 2)                           n1, n2: n-grams that came once, twice (of each order)

down to the uniform distribution over the vocabulary below single tokens.
"""

import numpy as np

__all__ = ["NGram"]


class NGram:
    """A model of order n over ids below n_vocab, from one row of tokens.

    tokens    (N) integers; documents follow each other, each beginning with the token for that
    """

    def __init__(self, tokens: np.ndarray, n_vocab: int, order: int = 5):
        self.n_vocab, self.order = n_vocab, order
        # Every n-gram is a number: (number of its history, last token), ranked.  Histories of length 0: number 0.
        self._tables = []
        history = np.zeros(len(tokens), np.int64)  # of the tokens before each place, as many as the order has
        for n in range(order):
            key = history[n:] * n_vocab + tokens[n:]  # the first n places have no history of this length
            keys, ids, counts = np.unique(key, return_inverse=True, return_counts=True)
            self._tables.append(_Table(keys, counts, n_vocab))
            history = np.zeros(len(tokens), np.int64)
            history[n + 1 :] = ids[:-1]

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """(N - 1) float64: log p of each token but the first, in nats, given those before it."""
        p = np.full(len(tokens), 1.0 / self.n_vocab)
        history = np.zeros(len(tokens), np.int64)  # -1: it never came
        for n, table in enumerate(self._tables):
            place = slice(n, None)
            ids, counts = table.find(history[place], tokens[place])
            p[place] = table.mix(history[place], counts, p[place])
            history = np.full(len(tokens), -1)
            history[n + 1 :] = ids[:-1]
        return np.log(p[1:])


class _Table:
    """The n-grams of one order: their keys (sorted), counts, and what is known of their histories."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, n_vocab: int):
        self._keys, self._counts, self._n_vocab = keys, counts, n_vocab
        histories = keys // n_vocab
        self._total = np.bincount(histories, weights=counts)
        self._kinds = np.bincount(histories)
        once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
        self._discount = (once + 1) / (once + 2 * twice + 2)  # never 0: nothing is impossible

    def find(self, history: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number, count) of each n-gram; (-1, 0) where it never came."""
        key = np.where(history >= 0, history * self._n_vocab + tokens, -1)
        at = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        known = self._keys[at] == key
        return np.where(known, at, -1), np.where(known, self._counts[at], 0)

    def mix(self, history: np.ndarray, counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """p(w | h) from the counts and p(w | h')."""
        seen = (history >= 0) & (history < len(self._total))
        total = np.where(seen, self._total[np.where(seen, history, 0)], 0.0)
        kinds = np.where(seen, self._kinds[np.where(seen, history, 0)], 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            p = (np.maximum(counts - self._discount, 0.0) + self._discount * kinds * lower) / total
        return np.where(total > 0, p, lower)

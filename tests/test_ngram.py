"""The n-gram model: a distribution, with the counts and discounts of its definition."""

import math

import numpy as np
import pytest
from barelm.ngram import NGram


def plain(tokens, n_vocab, order, history, word):
    """p(word | history), straight from the definition, with dictionaries."""
    p = 1 / n_vocab
    for n in range(order):
        h = tuple(history[len(history) - n :])
        if len(h) < n:
            break
        counts = {}
        for i in range(n, len(tokens)):
            gram = tuple(tokens[i - n : i + 1])
            counts[gram] = counts.get(gram, 0) + 1
        once, twice = (sum(c == k for c in counts.values()) for k in (1, 2))
        D = (once + 1) / (once + 2 * twice + 2)
        after = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == h}
        if not after:
            break
        total = sum(after.values())
        p = max(after.get(word, 0) - D, 0) / total + D * len(after) / total * p
    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_definition_and_sum_to_one(order):
    rng = np.random.default_rng(order)
    tokens = rng.choice(6, p=[0.4, 0.3, 0.15, 0.1, 0.05, 0.0], size=200)
    model = NGram(tokens, 6, order)
    for _ in range(20):
        history = rng.integers(0, 6, 6)
        got = [model.logprobs(np.append(history, word))[-1] for word in range(6)]
        want = [math.log(plain(tokens.tolist(), 6, order, history.tolist(), word)) for word in range(6)]
        np.testing.assert_allclose(got, want, rtol=1e-9)
        assert sum(map(math.exp, got)) == pytest.approx(1)


def test_every_place_of_a_text_has_the_history_it_should_have():
    rng = np.random.default_rng(0)
    train, text = rng.integers(0, 5, 300), rng.integers(0, 5, 40)
    got = NGram(train, 5, 3).logprobs(text)
    want = [math.log(plain(train.tolist(), 5, 3, text[:i].tolist(), text[i])) for i in range(1, 40)]
    np.testing.assert_allclose(got, want, rtol=1e-9)

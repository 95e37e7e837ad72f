"""Draws of the operator `sample`: how often each token comes, which tokens can come at all, and rows with a story.

test_ops.py compares single draws with the reference; here many numbers u go through one row.
"""

import math

import numpy as np
import pytest
import reference
from barelm import _core
from barelm._core import ops
from conftest import guarded
from hypothesis import given, settings
from hypothesis import strategies as st

DRAWS = 24_000
BELOW_ONE = np.nextafter(1.0, 0.0)
INF = math.inf


def draw(backend, logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Tokens and log-probabilities of one row of logits for each number u, in one call."""
    logits, u = np.atleast_1d(np.asarray(logits, np.float32)), np.atleast_1d(np.asarray(u, np.float64))
    N, V = len(u), len(logits)
    options = np.tile(np.array([temperature, top_k, top_p, min_p], np.float32), (N, 1))
    tokens, logprobs = guarded(np.full(N, -77, np.int32)), guarded(np.full(N, np.nan, np.float32))
    arrays = (guarded(a, constant=True) for a in (np.tile(logits, (N, 1)), options, u))
    ops.sample(backend, tokens, logprobs, *arrays, N, V, V)
    return tokens, logprobs


def chi_square(counts, p):
    """Pearson's statistic over its 99.9 % quantile.  Tokens that are expected less than 5 times are one class; the
    quantile of k degrees of freedom is Wilson's and Hilferty's (1931), 1 % off at worst from k = 3 on."""
    expected = counts.sum() * p
    rare = expected < 5
    seen, expected = (np.append(a[~rare], a[rare].sum()) for a in (counts, expected))
    seen, expected = seen[expected > 0], expected[expected > 0]
    k = len(seen) - 1
    quantile = k * (1 - 2 / (9 * k) + 3.0902 * math.sqrt(2 / (9 * k))) ** 3
    return ((seen - expected) ** 2 / expected).sum() / quantile


SETTINGS = {
    "plain": dict(),
    "temperature 0.5": dict(temperature=0.5),
    "temperature 3": dict(temperature=3.0),
    "top_k": dict(top_k=7),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.1),
    "all": dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_tokens_come_as_often_as_they_should(backend, options, seed):
    logits = np.random.default_rng(seed).normal(0, 1.5, 61).astype(np.float32)
    u = [_core.philox_uniform(seed, _core.STREAM_SAMPLE, row, 0) for row in range(DRAWS)]
    tokens, logprobs = draw(backend, logits, u, **options)
    exact = dict(temperature=1.0) | {name: float(np.float32(value)) for name, value in options.items()}
    p = reference.sample_probabilities(logits.astype(np.float64), **exact)
    counts = np.bincount(tokens, minlength=len(p))
    assert not counts[p == 0].any()
    assert chi_square(counts, p) < 1
    np.testing.assert_allclose(logprobs, np.log(p[tokens]), atol=5e-6)


def test_chi_square_sees_a_few_percent():
    """The test above could not fail if this one did: draws at a temperature that is 10 % off."""
    logits = np.random.default_rng(0).normal(0, 1.5, 61)
    wrong, p = (reference.sample_probabilities(logits, t) for t in (1.1, 1.0))
    assert chi_square(np.round(DRAWS * wrong), p) > 1
    assert chi_square(np.round(DRAWS * p), p) < 0.1


@st.composite
def rows(draw_from):
    """Logits with equals, both zeros and tokens that cannot come; a share of what is greatest down to e^-12."""
    values = st.integers(-24, 24).map(lambda i: i / 4) | st.sampled_from([-INF, -0.0])
    logits = draw_from(st.lists(values, min_size=1, max_size=70))
    logits[draw_from(st.integers(0, len(logits) - 1))] = draw_from(st.integers(-8, 24)) / 4
    return logits


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    logits=rows(),
    temperature=st.sampled_from([1.0, 1.5, 4.0, 100.0]),
    top_k=st.integers(0, 75),
    top_p=st.sampled_from([1e-6, 0.1, 0.3, 0.5001, 0.77, 0.9003, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.0123, 0.2, 0.7, 0.99]),
)
def test_the_tokens_that_can_come_are_those_of_the_reference(logits, temperature, top_k, top_p, min_p):
    logits = np.array(logits, np.float32)
    top_p, min_p = float(np.float32(top_p)), float(np.float32(min_p))
    x = logits.astype(np.float64)
    mass = np.cumsum(np.sort(reference.sample_probabilities(x, temperature, top_k))[::-1])
    if top_p < 1 and np.abs(mass - top_p).min() < 1e-5:
        return  # rounding decides which are kept
    p = reference.sample_probabilities(x, temperature, top_k, top_p, min_p)
    ends = np.cumsum(p)
    middles = (ends - p / 2)[p > 0]  # a number u in each token's share
    for backend in _core.backends():
        tokens, _ = draw(backend, logits, [0.0, *middles, BELOW_ONE], temperature, top_k, top_p, min_p)
        likely = p[p > 0] > 1e-5  # the share of the others is less than rounding moves it
        np.testing.assert_array_equal(tokens[1:-1][likely], np.flatnonzero(p)[likely])
        assert (p[tokens] > 0).all()
        assert (tokens[0], tokens[-1]) == (np.flatnonzero(p)[0], np.flatnonzero(p)[-1])


OPTIONS = [dict(), dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1), dict(top_k=3, top_p=0.9, min_p=0.1)]


@pytest.mark.parametrize("V", [1, 7, 16, 33, 64, 129, 2500])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_with_a_value_that_is_no_logit_gives_no_token(backend, rng, V, bad):
    logits = rng.standard_normal(V)
    for v in {0, V // 2, V - 1}:
        spoiled = logits.copy()
        spoiled[v] = bad
        for options in [dict(temperature=0.0), *OPTIONS]:
            tokens, logprobs = draw(backend, spoiled, 0.5, **options)
            assert tokens[0] == -1 and np.isnan(logprobs[0])
            tokens, _ = draw(backend, logits, 0.5, **options)
            assert 0 <= tokens[0] < V


def test_where_no_token_can_come_none_does(backend):
    for V in 1, 5, 40:
        for options in [dict(temperature=0.0), *OPTIONS]:
            tokens, logprobs = draw(backend, np.full(V, -INF), 0.5, **options)
            assert tokens[0] == -1 and np.isnan(logprobs[0])


def test_a_spoiled_row_leaves_its_neighbours_alone(backend, rng):
    N, V = 40, 1000
    logits, u = rng.standard_normal((N, V)).astype(np.float32), rng.random(N)
    options = np.tile(np.float32([1, 30, 0.9, 0.01]), (N, 1))

    def run():
        tokens, logprobs = np.empty(N, np.int32), np.empty(N, np.float32)
        ops.sample(backend, tokens, logprobs, logits, options, u, N, V, V)
        return tokens, logprobs

    good = run()
    logits[::3, 500] = np.nan
    spoiled = run()
    for before, after in zip(good, spoiled, strict=True):
        np.testing.assert_array_equal(np.delete(before, np.s_[::3]), np.delete(after, np.s_[::3]))
    assert (spoiled[0][::3] == -1).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30, 1e-6])
def test_a_temperature_of_nothing_takes_the_greatest(backend, rng, temperature):
    for V in 1, 9, 65, 1500:
        logits = rng.standard_normal(V)
        for options in OPTIONS:
            tokens, logprobs = draw(backend, logits, [0.0, BELOW_ONE], temperature, **options)
            assert tokens.tolist() == [logits.astype(np.float32).argmax()] * 2
            assert logprobs.tolist() == [0, 0]


def test_temperature_zero_takes_the_first_of_equals(backend):
    for V in 2, 40, 300:
        for first in {0, 1, V // 2}:
            logits = np.full(V, -1.0)
            logits[first:] = 5
            assert draw(backend, logits, BELOW_ONE, 0.0)[0][0] == first
    assert draw(backend, [-0.0, 0.0], 0.5, 0.0)[0][0] == 0


@pytest.mark.parametrize("V", [1, 2, 37, 3000])
def test_of_equals_the_lower_ids_stay(backend, V):
    """Both zeros are equal, though their bits are not."""
    zeros = np.where(np.arange(V) % 2, 0.0, -0.0)
    for value in zeros, np.full(V, 3.25), np.full(V, -1e30):
        for k in {1, V // 2, V - 1} - {0}:
            tokens, logprobs = draw(backend, value, [0.0, BELOW_ONE], top_k=k)
            assert tokens.tolist() == [0, k - 1]
            np.testing.assert_allclose(logprobs, -math.log(k), rtol=1e-6)
        tokens, _ = draw(backend, value, BELOW_ONE, top_p=0.6)
        assert tokens[0] == math.ceil(V * float(np.float32(0.6))) - 1


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equals_at_the_middle_of_an_interval_are_counted_once(backend, value):
    """An interval of 88 below the greatest logit, halved eight times, can end exactly at a logit: 1 / 256 of it below
    the greatest.  Where that is 0 the next float below is not the one whose bits are next."""
    logits = value + np.array([88 / 256, 0.0, -0.0, -0.125, -0.25, -3.0])
    for k in range(1, 6):
        tokens, _ = draw(backend, logits, [0.0, BELOW_ONE], top_k=k)
        assert tokens.tolist() == [0, k - 1]


def test_top_k_knows_logits_apart_whose_probabilities_are_equal_floats(backend):
    logits = np.full(50, 1.0, np.float32)
    logits[[20, 30]] = np.nextafter(np.float32(1), np.float32(2))
    tokens, _ = draw(backend, logits, [0.0, BELOW_ONE], temperature=100.0, top_k=2)
    assert tokens.tolist() == [20, 30]


def test_tokens_that_cannot_come_are_passed_over(backend):
    """More of them than a block of sums, at both ends."""
    logits = np.full(5000, -INF)
    logits[[2100, 2500, 2900]] = 1.0
    for options in [dict(), dict(top_k=4), dict(top_k=4000), dict(top_p=0.99), dict(min_p=0.5)]:
        tokens, logprobs = draw(backend, logits, [0.0, 0.5, BELOW_ONE], **options)
        assert tokens.tolist() == [2100, 2500, 2900]
        np.testing.assert_allclose(logprobs, -math.log(3), rtol=1e-6)
    ends = draw(backend, logits, [0.0, BELOW_ONE], temperature=100.0, top_p=0.01)[0]
    assert ends.tolist() == [2100, 2100]


def test_top_p_counts_what_top_k_left(backend):
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    assert draw(backend, logits, [0.0, BELOW_ONE], top_k=2, top_p=0.56)[0].tolist() == [1, 1]  # 4/7 reach 0.56
    assert draw(backend, logits, [0.0, BELOW_ONE], top_p=0.56)[0].tolist() == [1, 3]


def test_min_p_is_a_share_of_the_greatest(backend):
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    for min_p, ends in ((0.24, [0, 3]), (0.26, [1, 3]), (0.51, [1, 3]), (0.76, [1, 1])):
        assert draw(backend, logits, [0.0, BELOW_ONE], min_p=min_p)[0].tolist() == ends
    tokens, _ = draw(backend, logits, 0.7, min_p=0.51)  # 4/7 and 3/7
    assert tokens[0] == 3


def test_logits_far_from_zero_and_far_apart(backend):
    for logits in ([3e38, -3e38, 2e38], [-3e38, -INF, -3.2e38], [1e-42, -1e-42, -1e38]):
        for options in OPTIONS:
            tokens, logprobs = draw(backend, logits, [0.0, 0.4], **options)
            assert tokens.tolist() == [0, 0] and np.isfinite(logprobs).all()

"""The outlier guard: what is an outlier, that a skipped step leaves no trace, that a run of them stops, and that its
window survives a checkpoint."""

import json
import math

import numpy as np
import pytest
from barelm.guard import WARM, Guard, TooManySkips
from barelm.loop import step
from models import MIDDLE, assert_all_same_bits, contents, random_batch, random_model

BATCH = random_batch(MIDDLE["gpt2"], 2, 20)


def warm(loss=3.0, norm=0.5, spread=0.02, **options):
    """A guard that has seen WARM steps around these values."""
    guard = Guard(**options)
    for i in range(WARM):
        sway = 1 + spread * (-1) ** i
        guard.made(loss * sway, norm * sway)
    return guard


class Grads:
    """A model whose gradients can be tampered with between backward and update."""

    def __init__(self, model, tamper):
        self._model, self._tamper = model, tamper

    def accumulate(self, *args, **options):
        self._model.accumulate(*args, **options)
        self._tamper(self._model.grads)

    def __getattr__(self, name):
        return getattr(self._model, name)


def test_nothing_finite_is_an_outlier_before_enough_is_known():
    guard = Guard()
    for _ in range(WARM - 1):
        assert guard.loss_limit == math.inf and guard.norm_limit > 1e300
        guard.made(3.0, 0.5)
    guard.made(3.0, 0.5)
    assert guard.loss_limit < 4 and guard.norm_limit < 5


def test_limits_are_so_many_deviations_above_the_mean():
    guard = warm(loss=3.0, spread=0.5, deviations=5)
    assert guard.loss_limit == pytest.approx(3.0 + 5 * 1.5)  # values 4.5 and 1.5: deviation 1.5
    # ... and for the norm, of its logarithm
    logs = [math.log(0.5 * 1.5), math.log(0.5 * 0.5)]
    assert guard.norm_limit == pytest.approx(math.exp(np.mean(logs) + 5 * np.std(logs)))
    assert warm(deviations=0).loss_limit == math.inf


def test_an_even_window_does_not_make_a_small_difference_an_outlier():
    guard = warm(loss=3.0, norm=0.5, spread=0.0, deviations=8)
    assert guard.loss_limit == pytest.approx(3.4) and guard.norm_limit == pytest.approx(0.5 * math.exp(2))


def test_the_window_forgets():
    guard = warm(loss=9.0)
    for _ in range(128):
        guard.made(3.0, 0.5)
    assert guard.loss_limit < 3.5


def test_an_infinite_gradient_is_named_by_its_tensor_and_leaves_no_trace():
    model = random_model(MIDDLE["gpt2"])
    step(model, [BATCH], 0.01)
    before = contents(model)

    def tamper(grads):
        grads["h.1.mlp.c_fc.weight"][3, 5] = np.inf
        grads["ln_f.weight"][0] = np.nan  # another one behind it

    result = step(Grads(model, tamper), [BATCH], 0.01, guard=Guard())
    assert result.skipped == "the gradient of h.1.mlp.c_fc.weight is not finite" and math.isnan(result.norm)
    assert_all_same_bits(contents(model), before)
    with pytest.raises(FloatingPointError, match=r"h\.1\.mlp\.c_fc\.weight is not finite"):
        step(Grads(model, tamper), [BATCH], 0.01)
    assert_all_same_bits(contents(model), before)


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_a_spike_is_skipped_and_leaves_no_trace(what):
    model = random_model(MIDDLE["gpt2"])
    first = step(model, [BATCH], 0.0)
    before = contents(model)
    far = {"loss": dict(loss=first.loss / 2, norm=first.norm), "norm": dict(loss=first.loss, norm=first.norm / 9)}[what]
    result = step(model, [BATCH], 0.01, guard=warm(**far, spread=0.001))
    assert what in result.skipped and "is above" in result.skipped
    assert result.loss == pytest.approx(first.loss) and result.norm == pytest.approx(first.norm)
    assert_all_same_bits(contents(model), before)
    near = step(model, [BATCH], 0.01, guard=warm(loss=first.loss, norm=first.norm, spread=0.001))
    assert not near.skipped and model.step == 2


def test_a_run_of_skips_stops_and_a_good_step_ends_it():
    guard = Guard(patience=3)
    for _ in range(2):
        guard.skipped("a")
    guard.made(1.0, 1.0)
    for _ in range(2):
        guard.skipped("b")
    with pytest.raises(TooManySkips, match="3 steps in a row skipped, the last: c"):
        guard.skipped("c")


def test_its_state_goes_through_json_to_the_bit():
    guard = Guard()
    rng = np.random.default_rng(0)
    for loss, norm in rng.lognormal(size=(200, 2)):
        guard.made(float(loss), float(norm))
    guard.skipped("x")
    other = Guard()
    other.restore(json.loads(json.dumps(guard.state())))
    assert (other.loss_limit, other.norm_limit, other.in_a_row) == (guard.loss_limit, guard.norm_limit, 1)
    guard.made(1.5, 2.5), other.made(1.5, 2.5)
    assert other.state() == guard.state()

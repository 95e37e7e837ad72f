"""The loop's parts: one step, the learning rate over time, operations counted, and sizes from few words."""

import itertools

import barelm
import numpy as np
import pytest
from barelm.guard import Guard
from barelm.loop import flops_per_token, schedule, step
from barelm.recipe import matrix_weights, model_config, pace
from models import MIDDLE, assert_all_same_bits, copies, random_batch, random_model


def test_the_cosine_rises_falls_and_ends_at_its_end():
    rates = [schedule(i, i / 100, 2.0, warmup=10, end=0.1) for i in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[100] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2, abs=0.04)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule(0, 0.0, 1.0) == 1.0
    assert schedule(50, 0.5, 1.0, end=0.0) == pytest.approx(0.5)
    assert schedule(5, 7.0, 1.0, end=0.1) == pytest.approx(0.1)


def test_warm_up_stable_decay_is_flat_and_then_a_straight_line():
    rates = [schedule(i, i / 100, 1.0, kind="wsd", warmup=4, end=0.0, decay=0.2) for i in range(101)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and rates[4:81] == [1.0] * 77
    assert rates[80:] == pytest.approx(np.linspace(1, 0, 21))
    assert schedule(9, 1.0, 1.0, kind="wsd", decay=0.0) == 1.0


class Recorder:
    """A model that keeps what it is asked."""

    def __init__(self):
        self.loss, self.step, self.weights, self.updates = 1.0, 0, [], []

    def accumulate(self, tokens, targets, weights, starts):
        assert weights.dtype == np.float32 and weights.shape == targets.shape
        self.weights.append(weights)

    def update(self, *arguments, skip_above, loss_above):
        self.updates.append((*arguments, skip_above, loss_above))
        self.step += 1
        return 2.0


def test_every_token_of_a_step_weighs_the_same_whatever_its_micro_batch():
    model = Recorder()
    tokens = np.zeros((1, 4), np.int32)
    batches = [(tokens, np.array([[1, 2, -1, -1]], np.int32)), (tokens, np.array([[1, 2, 3, -1]], np.int32))]
    result = step(model, batches, 0.5, betas=(0.8, 0.9), weight_decay=0.2, clip=3.0)
    assert [w.tolist() for w in model.weights] == [[[np.float32(0.2)] * 2 + [0, 0]], [[np.float32(0.2)] * 3 + [0]]]
    (update,) = model.updates
    assert update[:-2] == (0.5, (0.8, 0.9), 1e-8, 0.2, 3.0) and min(update[-2:]) > 1e300
    assert result == (1.0, 2.0, 5, "")


def test_a_step_that_went_wrong_raises_and_makes_no_update():
    model = random_model(MIDDLE["llama"])
    tokens, targets = random_batch(MIDDLE["llama"], 1, 4)
    model.params["norm.weight"][:] = 1e30  # logits overflow, though every weight is finite
    model.params["lm_head.weight"][:] *= np.float32(1e30)
    before = copies(model.params)
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        step(model, [(tokens, targets)], 0.1)
    assert model.step == 0
    assert_all_same_bits(copies(model.params), before)
    model.params["layers.0.input_layernorm.weight"][1] = np.nan  # with a guard too: no later step would be better
    with pytest.raises(FloatingPointError, match=r"weights: layers\.0\.input_layernorm\.weight"):
        step(model, [(tokens, targets)], 0.1, guard=Guard())
    with pytest.raises(ValueError, match="no target"):
        step(model, [(tokens, targets * 0 - 1)], 0.1)


def test_the_loss_of_a_step_is_that_of_its_passes():
    model = random_model(MIDDLE["gpt2"])
    batches = [random_batch(MIDDLE["gpt2"], 2, 4), random_batch(MIDDLE["gpt2"], 1, 7)]
    n = sum(int((targets >= 0).sum()) for _, targets in batches)
    for _ in range(2):
        want = -sum(float(model.forward(*batch).astype(np.float64).sum()) for batch in batches) / n
        result = step(model, batches, 0.1)
        assert result.loss == model.loss == pytest.approx(want, rel=1e-6)


def test_operations_of_gpt2_are_six_for_each_weight_and_the_scores():
    config = barelm.Config.preset("gpt2")
    matrices = 12 * (4 * 768 * 768 + 8 * 768 * 768) + 768 * 50257
    assert flops_per_token(config, 1024) == 6 * (matrices + 12 * 768 * 1025)


def test_depth_12_is_gpt2():
    config = model_config(50257, depth=12)
    assert config == barelm.Config.preset("gpt2") == model_config(50257, preset="gpt2")
    assert matrix_weights(config) == 123_532_032
    assert pace(config) == (1_235_320_320, 2**18, 4712, 4.2e-4)  # 6e-4 * sqrt(2^18 / 2^19)


def test_the_dial_turns_everything_the_right_way():
    paces = [pace(model_config(4096, depth=depth)) for depth in range(2, 25)]
    assert all(a.tokens < b.tokens and a.tokens_per_step <= b.tokens_per_step for a, b in itertools.pairwise(paces))
    for depth, p in enumerate(paces, 2):
        config = model_config(4096, depth=depth)
        assert config.n_embd == 64 * depth and config.head_size == 64 and p.tokens_per_step % config.context == 0
        assert p.steps * p.tokens_per_step == pytest.approx(p.tokens, rel=0.01)


def test_depth_2_by_hand():
    """917,504 weights: 4,096 x 128 of the head and 12 x 128^2 of each layer.  2^18 x (917,504 / 123,532,032)^0.383 =
    40,080 tokens a step, of which 2^15 is the nearest power of two; 6e-4 x sqrt(2^15 / 2^19) x 768 / 128 = 9e-4."""
    assert pace(model_config(4096, depth=2)) == (9_175_040, 2**15, 280, 9e-4)


@pytest.mark.parametrize("preset", ["gpt2-xl", "llama-3.2-1b"])
def test_a_preset_keeps_what_is_not_overridden(preset):
    known = barelm.Config.preset(preset)
    config = model_config(1000, preset=preset, n_layer=2, context=64)
    assert (config.vocab_size, config.n_layer, config.context) == (1000, 2, 64)
    assert (config.norm, config.act, config.n_embd, config.n_kv_head) == (
        known.norm,
        known.act,
        known.n_embd,
        known.n_kv_head,
    )
    assert config.n_inner == known.n_inner


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="depth: a preset has its own"):
        model_config(100, preset="gpt2", depth=3)
    with pytest.raises(ValueError, match="preset: "):
        model_config(100, preset="gpt9")
    with pytest.raises(ValueError, match="n_embd: "):
        model_config(100, n_embd=30, n_head=4)

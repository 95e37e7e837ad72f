"""What rounding operands to bf16 costs a real model on real text: the direction of its gradients, and what it learns.

Whether single operators round as they should is test_ops.py's subject.
"""

import numpy as np
import pytest
from barelm import Config, Model
from barelm.loop import step

B, T, STEPS, WARMUP, LR = 8, 64, 300, 30, 1e-3
ADAMW = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
VALIDATION = 256  # windows


@pytest.fixture
def stories(test_data):
    """Bytes of TinyStories, in windows of T + 1: those that train, and the last VALIDATION of the text."""
    text = np.frombuffer((test_data / "text" / "tinystories_2MB.txt").read_bytes(), np.uint8).astype(np.int32)
    windows = text[: len(text) // (T + 1) * (T + 1)].reshape(-1, T + 1)
    return windows[:-VALIDATION], windows[-VALIDATION:]


def pair(windows):
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])


def description(family):
    """Six layers."""
    return Config.preset(
        family, n_layer=6, n_head=2, n_kv_head=None, n_embd=64, n_inner=None, vocab_size=256, context=T
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_keep_their_direction(stories, family):
    tokens, targets = pair(stories[0][:B])
    grads = {}
    for precision in ("fp32", "bf16"):
        model = Model(description(family), seed=0, precision=precision)
        model.forward_backward(tokens, targets, np.full((B, T), 1 / (B * T), np.float32))
        grads[precision] = {name: g.astype(np.float64).ravel() for name, g in model.grads.items()}
    for name, exact in grads["fp32"].items():
        rounded = grads["bf16"][name]
        cosine = float(exact @ rounded / (np.linalg.norm(exact) * np.linalg.norm(rounded)))
        assert 0.999 <= cosine < 1 - 1e-9, f"{name}: cosine {cosine}"  # 0.99998 to 0.999999; 1 would be fp32 itself


def validation_loss(precision, stories):
    train, validation = stories
    model, rng = Model(description("gpt2"), seed=0, precision=precision), np.random.default_rng(0)
    for n in range(STEPS):
        step(model, [pair(train[rng.integers(0, len(train), B)])], LR * min(1, (n + 1) / WARMUP), clip=1.0, **ADAMW)
    return -float(model.forward(*pair(validation)).mean())


@pytest.mark.slow
def test_300_steps_in_bf16_learn_what_they_learn_in_fp32(stories):
    exact, rounded = validation_loss("fp32", stories), validation_loss("bf16", stories)
    assert exact < 2.4  # nats a byte; the frequencies of bytes alone give 3.0
    assert rounded != exact
    # 0.07 % apart: runs that differ by rounding alone drift apart.
    assert abs(rounded - exact) <= 0.005 * exact, (rounded, exact)

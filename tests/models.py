"""What the tests of whole models share: models whose every path counts, batches for them, and comparison to the bit."""

import contextlib

import numpy as np
from barelm import Config, Model, _core

TINY_BATCH = dict(B=3, T=19)  # fits the context of every tiny config of conftest.py

# Large enough that products, norms and updates are shared out among threads, and key, K and head blocks are crossed.
MID = dict(n_layer=2, n_head=4, n_embd=48, n_inner=75, vocab_size=301, context=300)
MID_LLAMA = dict(norm="rmsnorm", act="swiglu", pos="rope", bias=False, tied=False, n_kv_head=2)
MIDDLE = {"gpt2": MID, "llama": MID | MID_LLAMA}


def random_model(config, precision="fp32", seed=0):
    """A model with weights at which no part is idle: GPT-2's own begin with zero biases and a nearly flat softmax."""
    model = Model(Config(**config), precision=precision)
    rng = np.random.default_rng(seed)
    for name, p in model.params.items():
        if p.ndim == 1:
            p[...] = rng.normal(name.endswith("weight"), 0.3, p.shape)
        else:
            p[...] = rng.normal(0, model.config.n_embd**-0.5, p.shape)
    return model


def random_batch(config, B, T, seed=1, untrained=0.2):
    """tokens, targets (B, T) int32; a share of the targets is -1."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, config["vocab_size"], (2, B, T)).astype(np.int32)
    targets[rng.random((B, T)) < untrained] = -1
    return tokens, targets


def random_floats(*shape, seed=2):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bits(a):
    return np.ascontiguousarray(a).view(np.uint32)


def assert_same_bits(a, b, what=""):
    np.testing.assert_array_equal(bits(a), bits(b), err_msg=what)


def copies(views):
    return {name: a.copy() for name, a in views.items()}


def assert_all_same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert_same_bits(got[name], want[name], name)


def contents(model):
    """A copy of all that a failing call must leave alone: weights, gradients, moments, step."""
    all_of_it = {f"weight {name}": p for name, p in model.params.items()}
    all_of_it |= {f"gradient {name}": p for name, p in model.grads.items()}
    for kind, views in zip(("first", "second"), model.moments if model.has_moments else ({}, {}), strict=True):
        all_of_it |= {f"{kind} moment {name}": p for name, p in views.items()}
    return copies(all_of_it) | {"step": np.array([model.step], np.int32)}


@contextlib.contextmanager
def threads(n):
    before = _core.threads_get()
    _core.threads_set(n)
    try:
        yield
    finally:
        _core.threads_set(before)

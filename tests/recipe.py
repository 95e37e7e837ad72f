"""nanoGPT's recipe for a CPU, written once for tests and benchmarks: a model of 0.8 M parameters learns Shakespeare's
characters in 2,000 steps (config/train_shakespeare_char.py of github.com/karpathy/nanoGPT, with the smaller sizes that
its README gives for a CPU).  Who takes the step is the caller's choice: barelm alone, or PyTorch beside it.
"""

import math
from dataclasses import dataclass

import numpy as np
from barelm import Config, Model

STEPS, WARMUP = 2000, 100
B, T = 12, 64
LR, MIN_LR = 1e-3, 1e-4
ADAMW = dict(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
CLIP = 1.0


@dataclass
class Text:
    """A text as ids of its own characters, in order of their code points: the first 90 % train, the rest validation."""

    train: np.ndarray  # (n) int32
    validation: np.ndarray  # (n) int32
    vocab_size: int

    @classmethod
    def read(cls, path):
        characters, ids = np.unique(list(path.read_text()), return_inverse=True)
        cut = int(0.9 * len(ids))
        return cls(ids[:cut].astype(np.int32), ids[cut:].astype(np.int32), len(characters))

    def batch(self, rng):
        """tokens, targets (B, T) int32: windows from anywhere in the training part."""
        at = rng.integers(0, len(self.train) - T, B)[:, None] + np.arange(T + 1)
        windows = self.train[at]
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def validation_batches(self, rows=64):
        """tokens, targets (rows, T) int32 that hold every character but the first as a target once; the rest is -1."""
        n = len(self.validation) - 1
        whole = math.ceil(n / (rows * T)) * rows * T
        tokens, targets = np.zeros(whole, np.int32), np.full(whole, -1, np.int32)
        tokens[:n], targets[:n] = self.validation[:-1], self.validation[1:]
        return list(zip(tokens.reshape(-1, rows, T), targets.reshape(-1, rows, T), strict=True))


def make_model(text, **options):
    """The recipe's model; no biases, as in nanoGPT's default."""
    config = Config(n_layer=4, n_head=4, n_embd=128, vocab_size=text.vocab_size, context=T, bias=False)
    return Model(config, seed=1, **options)


def learning_rate(step):
    """Of update `step` (the first is 0): a linear rise, then half a cosine, as nanoGPT computes it."""
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    return MIN_LR + 0.5 * (LR - MIN_LR) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def validation_loss(logprobs, text):
    """Nats a character over the whole validation part; `logprobs(tokens, targets)` -> (rows, T), 0 where the target is
    -1."""
    batches = text.validation_batches()
    return -sum(float(np.sum(logprobs(*batch), dtype=np.float64)) for batch in batches) / (len(text.validation) - 1)

"""What bench_decode.py sets beside each other: the work, and sessions, transformers and llama.cpp doing it.

Each is made in a process of its own: first() opens the rows and gives the logits behind the first of them, decode(rows)
is a turn and returns its seconds, bytes_read(rows) is what a step cannot do without, about() a line for the reader.
"""

import inspect
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from barelm import Config, Model, Session, _core
from barelm.session import PAGE


@dataclass(frozen=True)
class Workload:
    sizes: dict = field(default_factory=dict)  # of the Config; left out: GPT-2 124M's
    context: int = 128  # tokens in front of the decoded ones
    tokens: int = 15  # decoded in a turn and timed, after one that is not
    batch: int = 16  # rows that decode together
    prompt: int = 512  # tokens of the prompt that is read at once

    @property
    def config(self):
        return Config(**self.sizes)

    @property
    def mean_context(self):
        """Keys that a timed token sees, itself among them."""
        return self.context + 1 + (self.tokens + 1) / 2

    def prompts(self):
        """(batch, context) int32: the rows; the first is also that which decodes alone."""
        return self.ids(self.batch, self.context)

    def long_prompt(self):
        return self.ids(1, self.prompt)

    def ids(self, *shape):
        return np.random.default_rng(0).integers(0, self.config.vocab_size, shape, dtype=np.int32)


def seconds_of(n, step, token):
    """Seconds that n tokens take, step giving each from the one before.  One goes in front: it brings back what the
    others drove out of the caches."""
    token = step(token)
    start = time.perf_counter()
    for _ in range(n):
        token = step(token)
    return time.perf_counter() - start


class Barelm:
    def __init__(self, workload, weights, folder):
        self.workload, self.weights = workload, weights
        self.model = Model.load(folder, precision="fp32" if weights == "fp32" else "bf16")
        pages_of_row = -(-(workload.context + workload.tokens + 1) // PAGE)
        pages = 2 * workload.batch * pages_of_row + -(-workload.prompt // PAGE)
        self.session, self.rows = Session(self.model, pages * PAGE, weights), []

    def first(self):
        self.rows = [self.session.add() for _ in range(self.workload.batch)]
        logits = self.session.step(self.rows, list(self.workload.prompts()))
        self.next = logits.argmax(1)
        return logits[0]

    def decode(self, rows):
        forks = [fork for row in self.rows[:rows] for fork in self.session.fork(row)]
        seconds = seconds_of(
            self.workload.tokens, lambda tokens: self.session.step(forks, tokens[:, None]).argmax(1), self.next[:rows]
        )
        for fork in forks:
            self.session.free(fork)
        return seconds

    def prefill(self, rows):
        row, prompt = self.session.add(), self.workload.long_prompt()
        start = time.perf_counter()
        self.session.step([row], prompt)
        seconds = time.perf_counter() - start
        self.session.free(row)
        return seconds

    def forward(self, rows):
        prompt = self.workload.long_prompt()
        targets = np.roll(prompt, -1, 1)
        start = time.perf_counter()
        self.model.forward(prompt, targets)
        return time.perf_counter() - start

    def bytes_read(self, rows):
        c, size = self.workload.config, 4 if self.weights == "fp32" else 2
        cache = 2 * c.n_layer * c.n_kv_head * c.head_size * size * self.workload.mean_context
        return self.session.memory["weights"] + rows * cache

    def about(self):
        return f"barelm: {_core.isa()}, {_core.threads_get()} threads"


class Transformers:
    def __init__(self, workload, _, folder):
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(_core.threads_get())
        self.torch, self.workload = torch, workload
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
        takes = inspect.signature(self.model.forward).parameters
        self.word = "cache" if "cache" in takes else "past_key_values"  # older versions

    def first(self):
        logits = self._step(self.torch.from_numpy(self.workload.prompts()[:1]).long(), None)
        self.next = logits.argmax(-1, keepdim=True)
        return logits[0].numpy()

    def _step(self, ids, cache):
        with self.torch.inference_mode():
            out = self.model(ids, **{self.word: cache}, use_cache=True)
        self.cache = out[self.word]
        return out.logits[:, -1]

    def decode(self, rows):
        seconds = seconds_of(
            self.workload.tokens, lambda token: self._step(token, self.cache).argmax(-1, keepdim=True), self.next
        )
        self.cache.crop(-(self.workload.tokens + 1))
        return seconds

    def bytes_read(self, rows):
        c = self.workload.config
        weights = sum(p.numel() for p in self.model.parameters()) - c.context * c.n_embd  # the head is wte
        return 4 * (weights + 2 * c.n_layer * c.n_embd * self.workload.mean_context)

    def about(self):
        attention = self.model.config._attn_implementation
        return f"transformers: eager, attention {attention}, {self.torch.get_num_threads()} threads"


class Llama:
    def __init__(self, workload, kind, folder):
        from llama_cpp import LlamaCpp

        file = Path(folder) / f"{kind}.gguf"
        self.workload, self.weights = workload, int(file.with_suffix(".bytes").read_text())
        self.llama = LlamaCpp(file, workload.config.vocab_size, _core.threads_get())
        if self.llama.room < workload.context + workload.tokens + 1:
            raise RuntimeError(f"llama.cpp: has room for {self.llama.room} tokens only")

    def first(self):
        logits = self.llama.step(self.workload.prompts()[0]).copy()
        self.next = int(logits.argmax())
        return logits

    def decode(self, rows):
        seconds = seconds_of(self.workload.tokens, lambda token: int(self.llama.step([token]).argmax()), self.next)
        self.llama.cut(self.workload.context)
        return seconds

    def bytes_read(self, rows):
        c = self.workload.config
        return self.weights + 2 * c.n_layer * c.n_embd * 2 * self.workload.mean_context

    def about(self):
        threads = self.llama.lib.llama_n_threads(self.llama.context)
        return f"llama.cpp: llama_decode, {threads} threads, built for {self.llama.instructions()}"


LIBRARIES = {"barelm": Barelm, "transformers": Transformers, "llama.cpp": Llama}

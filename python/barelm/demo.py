"""`barelm demo`: learn a vocabulary and train a small model on the Python standard library, then let it write; offline.

What counting alone reaches, a 5-gram model of the same tokens, stands beside what the transformer reached.
"""

import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from . import _core
from .data.documents import Documents
from .data.shards import Dataset
from .engine import generate
from .model import Model
from .ngram import NGram
from .report import console, count, duration, printable
from .tokenizer import Tokenizer
from .train import TrainConfig, TrainResult, train

__all__ = ["DemoConfig", "main"]

PROMPTS = ("def ", "import ", "class ")
VOCAB_SIZE = 4096
ORDER = 5  # of the n-gram model


@dataclass
class DemoConfig:
    """Learn a vocabulary from the Python standard library, train a small GPT-2 on it, and let it write.  Needs no
    network."""

    minutes: Annotated[float, "how long to train"] = 2.0
    out: Annotated[str, "folder of the run; where it is taken, -2, -3 ... is added"] = "runs/demo"
    seed: Annotated[int, "of the weights, the batches and the samples"] = 0
    threads: Annotated[int, "0: as many as the machine grants"] = 0


def main(config: DemoConfig) -> int:
    if not 0 < config.minutes < math.inf:
        raise ValueError(f"--minutes: must be above 0, got {config.minutes}")
    if config.threads:
        _core.threads_set(config.threads)
    screen, out = console(), _free(config.out)
    _say(screen, f"A small GPT-2 reads Python's standard library for {config.minutes:g} minutes, then writes.\n")
    _vocabulary(screen, out)
    result = train(_settings(config, out), title="barelm demo")
    if result.signal:
        return 128 + result.signal
    counted = _counted(Path(out))
    _say(screen, "")
    for prompt, text in _samples(result, config.seed):
        screen.rule(repr(prompt), align="left", style="dim")
        _say(screen, printable(prompt + text))
    screen.rule(style="dim")
    _say(screen, _summary(result, counted))
    return 0


def _vocabulary(screen, out: str) -> None:
    """Learn the tokens from the text, and write them into the folder of the run."""
    began, documents = time.perf_counter(), Documents()
    tok = Tokenizer.train((document.data for document in documents), VOCAB_SIZE)
    tok.save(out)
    longest = sorted({tok.decode([id]).strip() for id in range(tok.n_vocab)} - {"<|endoftext|>"}, key=len)[-6:]
    words = ", ".join(repr(word) for word in longest if word.isprintable())
    seconds = time.perf_counter() - began
    _say(screen, f"tokens    {tok.n_vocab:,} learned in {seconds:.1f} s, the longest of them {words}")


def _settings(config: DemoConfig, out: str) -> TrainConfig:
    """Sizes for a few minutes of two cores: what a small model gains from more steps outweighs what a larger one gains
    from each."""
    return TrainConfig(
        minutes=config.minutes,
        out=out,
        tokenizer=out,
        seed=config.seed,
        threads=config.threads,
        precision="bf16",
        n_layer=4,
        n_head=4,
        n_embd=128,
        context=128,
        batch=12,
        lr=3e-3,
        lr_end=0.03,
        warmup=50,
        val_fraction=0.05,
        eval_every=1000,
        eval_batches=0,
        sample_every=0,
        save_every=0,
        keep=1,
    )


def _free(out: str) -> str:
    """The first of out, out-2, out-3 ... where nothing lies."""
    number, path = 1, Path(out)
    while path.exists():
        number += 1
        path = Path(f"{out}-{number}")
    return str(path)


def _samples(result: TrainResult, seed: int) -> list[tuple[str, str]]:
    model, tok = Model.load(result.checkpoint), Tokenizer.load(result.checkpoint)
    return [
        (prompt, "".join(generate(model, tok, prompt, max_tokens=160, temperature=0.7, seed=seed, row=row)))
        for row, prompt in enumerate(PROMPTS)
    ]


def _counted(folder: Path) -> float:
    """Bits per byte of the same held-out text under an n-gram model of the same training text."""
    dataset = Dataset.open(folder / "data")
    train, held_out = (part.read(0, len(part)) for part in (dataset.train, dataset.validation))
    nats = -NGram(train, dataset.tok.n_vocab, ORDER).logprobs(held_out).sum()
    return nats / math.log(2) / dataset.validation.lengths[held_out[1:]].sum()


def _summary(result: TrainResult, counted: float) -> str:
    before, after = result.before.bits_per_byte, result.after.bits_per_byte
    longer = 2 * max(1, round(result.seconds / 60))
    called = sys.argv[0] if Path(sys.argv[0]).name == "barelm" else f"{sys.executable} -m barelm"
    barelm = "barelm" if shutil.which("barelm") else called  # `make demo` runs it out of a virtual environment
    return f"""
What was done   {count(result.n_params)} parameters, {result.step:,} steps on {count(result.tokens)} tokens, \
{duration(result.seconds)}
How well        {before:.2f} -> {after:.2f} bits per byte of text that it never saw ({counted:.2f} \
by counting, with a {ORDER}-gram model)
How fast        {result.tokens_per_second:,.0f} tokens/s
Where it is     {result.out}/report.md with curve.svg; {result.checkpoint}

What to try next
  {barelm} sample --checkpoint {result.out} --prompt "for i in " --n 3
  {barelm} train --resume --out {result.out} --minutes {longer}    # the same run, longer
  {barelm} train --data YOUR_FOLDER --out runs/mine    # your own text
  {barelm} doctor    # what this machine has"""


def _say(screen, text: str) -> None:
    screen.print(text, markup=False, highlight=False, soft_wrap=True)

"""`barelm demo`: train a small model on the Python standard library and let it write, in about two minutes, offline."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .engine import generate
from .model import Model
from .report import console, count, duration, printable
from .tokenizer import Tokenizer
from .train import TrainConfig, TrainResult, train

__all__ = ["DemoConfig", "main"]

PROMPTS = ("def ", "import ", "class ")


@dataclass
class DemoConfig:
    """Train a small GPT-2 on the Python standard library, byte by byte, and let it write.  Needs no network."""

    minutes: Annotated[float, "how long to train"] = 2.0
    out: Annotated[str, "folder of the run; where it is taken, -2, -3 ... is added"] = "runs/demo"
    seed: Annotated[int, "of the weights, the batches and the samples"] = 0
    threads: Annotated[int, "0: as many as the machine grants"] = 0


def main(config: DemoConfig) -> int:
    if not 0 < config.minutes < float("inf"):
        raise ValueError(f"--minutes: must be above 0, got {config.minutes}")
    screen = console()
    _say(screen, f"A small GPT-2 reads Python's standard library for {config.minutes:g} minutes, then writes.\n")
    result = train(_settings(config), title="barelm demo")
    if result.signal:
        return 128 + result.signal
    _say(screen, "")
    for prompt, text in _samples(result, config.seed):
        screen.rule(repr(prompt), align="left", style="dim")
        _say(screen, printable(prompt + text))
    screen.rule(style="dim")
    _say(screen, _summary(result))
    return 0


def _settings(config: DemoConfig) -> TrainConfig:
    """Sizes for two minutes of two cores: what a small model gains from more steps outweighs what a larger one gains
    from each (after one minute, bits per byte: 128 channels 2.72, 192 channels 3.08, 256 channels 3.6)."""
    return TrainConfig(
        minutes=config.minutes,
        out=_free(config.out),
        seed=config.seed,
        threads=config.threads,
        n_layer=4,
        n_head=4,
        n_embd=128,
        context=128,
        batch=12,
        lr=3e-3,
        lr_end=0.03,
        warmup=50,
        eval_every=500,
        eval_batches=40,
        sample_every=1000,
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


def _summary(result: TrainResult) -> str:
    before, after = result.before.bits_per_byte, result.after.bits_per_byte
    longer = 2 * max(1, round(result.seconds / 60))
    called = sys.argv[0] if Path(sys.argv[0]).name == "barelm" else f"{sys.executable} -m barelm"
    barelm = "barelm" if shutil.which("barelm") else called  # `make demo` runs it out of a virtual environment
    return f"""
What was done   {count(result.n_params)} parameters, {result.step:,} steps on {count(result.tokens)} bytes of text, \
{duration(result.seconds)}
How well        {before:.2f} -> {after:.2f} bits per byte of text that it never saw (8 is a blind guess)
How fast        {result.tokens_per_second:,.0f} tokens/s
Where it is     {result.out}/report.md with curve.svg; {result.checkpoint}

What to try next
  {barelm} sample --checkpoint {result.out} --prompt "for i in " --n 3
  {barelm} train --resume --out {result.out} --minutes {longer}    # the same run, longer
  {barelm} train --data YOUR_FOLDER --out runs/mine    # your own text
  {barelm} doctor    # what this machine has"""


def _say(screen, text: str) -> None:
    screen.print(text, markup=False, highlight=False, soft_wrap=True)

"""`barelm sample`: text from a checkpoint, as it comes."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated

from . import _core
from .engine import draw_tokens, text_of
from .model import Model
from .report import printable
from .runs import newest_checkpoint
from .tokenizer import Tokenizer

__all__ = ["SampleConfig", "main"]


@dataclass
class SampleConfig:
    """Continue a prompt with a trained model.  Each field is a flag of `barelm sample`."""

    checkpoint: Annotated[str, "a checkpoint's folder, or a run's: its newest checkpoint"]
    prompt: Annotated[str, "text to continue; left out: a new document"] = ""
    max_tokens: Annotated[int, "tokens to write at most"] = 200
    temperature: Annotated[float, "0: always the most likely token; 1: as the model says"] = 0.8
    top_k: Annotated[int, "only the k most likely tokens may come; 0: all"] = 0
    top_p: Annotated[float, "only the likeliest tokens with this share of probability may come; 1: all"] = 1.0
    seed: Annotated[int, "another seed, another text; the same seed, the same"] = 0
    n: Annotated[int, "texts to write"] = 1
    threads: Annotated[int, "0: as many as the machine grants"] = 0
    json: Annotated[bool, "one JSON object a text, when it is whole, with its ids and their log-probabilities"] = False


def main(config: SampleConfig) -> int:
    if config.n < 1:
        raise ValueError(f"--n: must be 1 or more, got {config.n}")
    if config.threads < 0:
        raise ValueError(f"--threads: must be 0 or more, got {config.threads}")
    if config.threads:
        _core.threads_set(config.threads)
    folder = newest_checkpoint(config.checkpoint)
    model, tok = Model.load(folder), Tokenizer.load(folder)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" instead of stopping us
    for row in range(config.n):
        drawn = draw_tokens(
            model,
            tok,
            config.prompt,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k or None,
            top_p=config.top_p,
            seed=config.seed,
            row=row,
        )
        if config.json:
            tokens = list(drawn)
            ids, logprobs = [token.id for token in tokens], [token.logprob for token in tokens]
            text = "".join(text_of(ids, tok))
            print(json.dumps({"prompt": config.prompt, "text": text, "ids": ids, "logprobs": logprobs}), flush=True)
        else:
            _stream(config, row, text_of((token.id for token in drawn), tok))
    return 0


def _stream(config: SampleConfig, row: int, pieces) -> None:
    if config.n > 1:
        print(f"{chr(10) * (row > 0)}--- {row + 1} of {config.n} ---")
    show = printable if sys.stdout.isatty() else str
    print(show(config.prompt), end="", flush=True)
    for piece in pieces:
        print(show(piece), end="", flush=True)
    print()

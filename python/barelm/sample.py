"""`barelm sample`: text from a checkpoint, as it comes."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

from . import _core, checkpoint
from .assistant import template, trimmed
from .engine import Engine, Row, Sampling, row_tokens
from .report import printable
from .runs import newest_checkpoint
from .session import PAGE, Session
from .settings import check_device
from .tokenizer import Tokenizer

__all__ = ["SampleConfig", "main"]

AT_ONCE = 16  # texts that the cache surely has room for; of more, some wait for their turn


@dataclass
class SampleConfig:
    """Continue a prompt with a trained model.  Each field is a flag of `barelm sample`."""

    checkpoint: Annotated[str, "a checkpoint's folder, or a run's: its newest checkpoint"]
    prompt: Annotated[str, "text to continue; left out: a new document"] = ""
    max_tokens: Annotated[int, "tokens to write at most"] = 200
    temperature: Annotated[float, "0: always the most likely token; 1: as the model says"] = 0.8
    top_k: Annotated[int, "only the k most likely tokens may come; 0: all"] = 0
    top_p: Annotated[float, "only the likeliest tokens with this share of probability may come; 1: all"] = 1.0
    min_p: Annotated[float, "only tokens this share as probable as the likeliest may come; 0: all"] = 0.0
    repetition_penalty: Annotated[float, "above 1: tokens that are there already become less likely"] = 1.0
    assistant: Annotated[bool, "--prompt is a question: put it into a transcript, and print the answer alone"] = False
    stop: Annotated[str, "the text ends before this string; left out: none"] = ""
    weights: Annotated[str, "fp32, bf16 or int8: how they are held while sampling"] = "fp32"
    seed: Annotated[int, "another seed, another text; the same seed, the same"] = 0
    n: Annotated[int, "texts to write, side by side"] = 1
    device: Annotated[str, "where the model is: cpu, or a GPU: cuda, cuda:1"] = "cpu"
    threads: Annotated[int, "0: as many as the machine grants"] = 0
    json: Annotated[bool, "one JSON object a text, when it is whole, with its ids and their log-probabilities"] = False


def main(config: SampleConfig) -> int:
    if config.n < 1:
        raise ValueError(f"--n: must be 1 or more, got {config.n}")
    if config.threads < 0:
        raise ValueError(f"--threads: must be 0 or more, got {config.threads}")
    check_device(config.device)
    text, stops = _asked(config)
    sampling = _sampling(config, stops)
    if config.threads:
        _core.threads_set(config.threads)
    folder = newest_checkpoint(config.checkpoint)
    context, tok = checkpoint.read_config(folder).context, checkpoint.load_tokenizer(folder)
    prompt = tok.encode_prompt(text)
    room = row_tokens(context, len(prompt), config.max_tokens) + PAGE  # a row's last page is partly empty
    room *= min(config.n, AT_ONCE)
    session = Session.load(folder, max_tokens=room, weights=config.weights, device=config.device)
    engine = Engine(session, tok)
    rows = engine.add(prompt, sampling, n=config.n)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" instead of stopping us
    if config.n == 1 and not config.json:
        _stream(config, engine, rows[0])
    else:
        _print_each(config, engine, rows)
    return 0


def _asked(config: SampleConfig) -> tuple[str, tuple[str, ...]]:
    """What the model reads, and the strings before which its text ends."""
    stops = (config.stop,) if config.stop else ()
    if not config.assistant:
        return config.prompt, stops
    if not config.prompt.strip():
        raise ValueError("--prompt: with --assistant it must be a question")
    text, ends = template(config.prompt)
    return text, ends + stops


def _sampling(config: SampleConfig, stops: tuple[str, ...]) -> Sampling:
    return Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=stops,
        seed=config.seed,
    )


def _stream(config: SampleConfig, engine: Engine, row: Row) -> None:
    show = _show()
    pieces = trimmed(_pieces(engine, row)) if config.assistant else chain([config.prompt], _pieces(engine, row))
    try:
        for piece in pieces:
            print(show(piece), end="", flush=True)
    finally:
        print(flush=True)  # after Ctrl-C too


def _pieces(engine: Engine, row: Row) -> Iterator[str]:
    while row.finish is None:
        engine.step()
        yield row.take()


def _print_each(config: SampleConfig, engine: Engine, rows: list[Row]) -> None:
    """Each text when it is whole, in order.  Ctrl-C: those that are whole are not lost."""
    left = deque(rows)
    try:
        while left:
            while left[0].finish is None:
                engine.step()
            _print(config, left.popleft(), engine.tok)
    except KeyboardInterrupt:
        for row in left:
            if row.finish:
                _print(config, row, engine.tok)
        raise


def _print(config: SampleConfig, row: Row, tok: Tokenizer) -> None:
    if config.json:
        print(json.dumps(_record(config, row, tok)), flush=True)
        return
    show = _show()
    print(f"{chr(10) * (row.key > 0)}--- {row.key + 1} of {config.n} ---")
    print(show(_text(config, row) if config.assistant else config.prompt + row.text()), flush=True)


def _text(config: SampleConfig, row: Row) -> str:
    return row.text().strip() if config.assistant else row.text()


def _record(config: SampleConfig, row: Row, tok: Tokenizer) -> dict:
    """What --json says of a text; the token that ended it, which is no text, is left out."""
    ends = row.finish == "stop" and row.tokens[-1].id in tok.ends
    tokens = row.tokens[:-1] if ends else row.tokens
    return {
        "prompt": config.prompt,
        "text": _text(config, row),
        "ids": [token.id for token in tokens],
        "logprobs": [token.logprob for token in tokens],
        "finish": row.finish,
    }


def _show() -> Callable[[str], str]:
    """How text goes to standard output: to a terminal without what would take it over."""
    return printable if sys.stdout.isatty() else str

"""`barelm tokenizer show`: the tokens of a text, in colour on a terminal."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from ..report import console
from ..tokenizer import Tokenizer
from .common import load, read_text, visible

__all__ = ["ShowConfig", "main"]

# Backgrounds that follow each other, light enough for black on them; special tokens are white on black.
STYLES = [f"black on {colour}" for colour in ("#c7d2fe", "#bbf7d0", "#fde68a", "#fecaca", "#a5f3fc", "#e9d5ff")]
SPECIAL_STYLE = "bold white on black"
ID_STYLE = "dim"


@dataclass
class ShowConfig:
    """Show the tokens of a text: in colour on a terminal, with | between them elsewhere, and how many there are."""

    tokenizer: Annotated[str, "'bytes', or a tokenizer.json, a rank file, or a folder with one or with GPT-2's files"]
    text: Annotated[str, "what to show; left out: --data"] = ""
    data: Annotated[str, "file to show; - is standard input"] = "-"
    special: Annotated[bool, "special tokens in the text are special, not ordinary text"] = False
    ids: Annotated[bool, "a token a line, with its id"] = False


def main(config: ShowConfig) -> int:
    tok = load(config.tokenizer)
    ids = tok.encode(read_text(config.text, config.data), special=config.special)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal lacks a character
    screen = console()
    lines = _by_line(ids, tok) if config.ids else _running(ids, tok, screen.is_terminal and not screen.no_color)
    for line in lines:
        screen.print(line, soft_wrap=True)
    screen.print(f"\n{_counts(ids, tok)}", style="dim", markup=False, highlight=False)
    return 0


def _style(id: int, number: int, tok: Tokenizer) -> str:
    return SPECIAL_STYLE if id in tok.special.values() else STYLES[number % len(STYLES)]


def _running(ids: list[int], tok: Tokenizer, colour: bool) -> Iterator:
    """The text as it runs; a token that ends a line ends one here."""
    from rich.text import Text

    line = Text()
    for number, id in enumerate(ids):
        token = tok.token_bytes(id)
        line.append(visible(token), _style(id, number, tok) if colour else "")
        if b"\n" in token:
            yield line
            line = Text()
        elif not colour and number < len(ids) - 1:
            line.append("|")
    if line:
        yield line


def _by_line(ids: list[int], tok: Tokenizer) -> Iterator:
    from rich.text import Text

    width = len(str(max(ids, default=0)))
    for number, id in enumerate(ids):
        yield Text.assemble((f"{id:{width}}  ", ID_STYLE), (visible(tok.token_bytes(id)), _style(id, number, tok)))


def _counts(ids: list[int], tok: Tokenizer) -> str:
    size = len(tok.decode_bytes(ids))
    each = f", {size / len(ids):.2f} bytes a token" if ids else ""
    return f"{len(ids):,} tokens, {size:,} bytes{each}"

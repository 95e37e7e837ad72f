"""Texts of several kinds to compare tokenizers on, made of nothing but what a Python installation has."""

import ast
import json
import unicodedata
import warnings
from collections.abc import Iterator
from html.entities import html5
from itertools import chain

from ..data.documents import Documents

__all__ = ["beginning", "kinds"]

LIMIT = 2 << 20  # bytes of each kind at most

# First letter, last letter.  A Python installation has no words of these scripts, but it knows their letters.
SCRIPTS = {
    "Latin, with marks": ("\u00c0", "\u017e"),
    "Greek": ("\u0391", "\u03c9"),
    "Cyrillic": ("\u0410", "\u044f"),
    "Armenian": ("\u0531", "\u0586"),
    "Hebrew": ("\u05d0", "\u05ea"),
    "Arabic": ("\u0627", "\u064a"),
    "Devanagari": ("\u0905", "\u0939"),
    "Bengali": ("\u0985", "\u09b9"),
    "Tamil": ("\u0b85", "\u0bb9"),
    "Thai": ("\u0e01", "\u0e2e"),
    "Georgian": ("\u10d0", "\u10f0"),
    "Ethiopic": ("\u1200", "\u1357"),
    "Hiragana": ("\u3041", "\u3096"),
    "Katakana": ("\u30a1", "\u30fa"),
    "Chinese": ("\u4e00", "\u9fa5"),
    "Hangul": ("\uac00", "\ud7a3"),
}


def kinds() -> dict[str, list[bytes]]:
    """{what it is: documents}.  The first two are the standard library's: a tokenizer may have seen them."""
    files = _spread(list(Documents()))
    return {
        "code (standard library)": files,
        "English (docstrings)": list(chain.from_iterable(map(_docstrings, files))),
        "digits": [_digits().encode()],
        "indented JSON": [_indented().encode()],
        f"letters, {len(SCRIPTS)} scripts": [_letters().encode()],
    }


def beginning(documents: Documents) -> list[bytes]:
    """The first LIMIT bytes of the user's own text."""
    kept, left = [], LIMIT
    for document in documents:
        kept.append(document.data[:left])
        left -= len(kept[-1])
        if left <= 0:
            break
    return kept


def _spread(documents: list) -> list[bytes]:
    """Whole documents from everywhere in the list, LIMIT bytes in all or a little more."""
    size = sum(len(document.data) for document in documents)
    return [document.data for document in documents[:: max(1, -(-size // LIMIT))]]


def _docstrings(source: bytes) -> Iterator[bytes]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # strange escapes in old files
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text.encode("utf-8", "replace")


def _digits() -> str:
    """Numbers as they are met: counts, squares, fractions, dates."""
    lines = (
        f"{n} {n * n} {n**5} {1 / n:.12f} {n % 28 + 1:02}.{n % 12 + 1:02}.{1900 + n % 150}" for n in range(1, 5000)
    )
    return "\n".join(lines)


def _indented() -> str:
    return json.dumps({name: [hex(ord(char)) for char in text] for name, text in html5.items()}, indent=8)


def _letters(most: int = 200, group: int = 5) -> str:
    """A line for each script: its first letters in groups, as words have them."""
    lines = []
    for first, last in SCRIPTS.values():
        letters = [c for c in map(chr, range(ord(first), ord(last) + 1)) if unicodedata.category(c).startswith("L")]
        text = "".join(letters[:most])
        lines.append(" ".join(text[at : at + group] for at in range(0, len(text), group)))
    return "\n".join(lines)

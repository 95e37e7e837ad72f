"""Texts of several kinds to compare tokenizers on, made of nothing but what a Python installation has."""

import ast
import json
import unicodedata
import warnings
from collections.abc import Iterator
from html.entities import html5
from itertools import chain, islice

from ..data.documents import Documents

__all__ = ["beginning", "kinds"]

LIMIT = 2 << 20  # bytes of each kind at most

# First letter, last letter: words of these scripts are not to be had everywhere, their letters are.
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
    """{what it is: documents}.  The first two are the standard library's, what a vocabulary may have learned from."""
    files = _spread(list(Documents()))
    return {
        "Python code (standard library)": files,
        "English (its docstrings)": list(chain.from_iterable(map(_docstrings, files))),
        "digits": [_digits().encode()],
        "white space (indented JSON)": [_indented().encode()],
        f"letters of {len(SCRIPTS)} scripts, no words": [_letters().encode()],
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
    return "\n".join(
        f"{n} {n * n} {n**5} {1 / n:.12f} {n % 28 + 1:02}.{n % 12 + 1:02}.{1900 + n % 150}" for n in _NUMBERS
    )


_NUMBERS = range(1, 5000)


def _indented() -> str:
    return json.dumps({name: [hex(ord(char)) for char in text] for name, text in html5.items()}, indent=8)


def _letters() -> str:
    lines = []
    for first, last in SCRIPTS.values():
        letters = [c for c in map(chr, range(ord(first), ord(last) + 1)) if unicodedata.category(c).startswith("L")]
        lines.append(" ".join(_in_groups("".join(islice(letters, 200)), 5)))
    return "\n".join(lines)


def _in_groups(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]

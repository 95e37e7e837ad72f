"""What the commands of `barelm tokenizer` share: tokenizers by name, a text from where the user has it, and tokens in
characters that a terminal only shows.
"""

import sys
import unicodedata
from pathlib import Path

from ..tokenizer import Tokenizer

__all__ = ["load", "read_text", "visible"]

NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}


def load(name: str) -> Tokenizer:
    """'bytes', or what Tokenizer.load reads."""
    return Tokenizer.bytes() if name == "bytes" else Tokenizer.load(name)


def read_text(text: str, data: str) -> "str | bytes":
    """`text`, or where it is empty the bytes of the file `data`; "-" is standard input."""
    if text and data != "-":
        raise ValueError("--text and --data: only one of them can be encoded")
    if text:
        return text
    return sys.stdin.buffer.read() if data == "-" else Path(data).read_bytes()


def visible(token: bytes) -> str:
    r"""A token in characters that a terminal shows and does not obey: \n, \x1b, \u202e and so on for all others, \x80
    to \xff for bytes that are not UTF-8 (half of a character, say), and \\ for a backslash: no two tokens look alike.
    """
    return "".join(_visible(char) for char in token.decode("utf-8", "surrogateescape"))


def _visible(char: str) -> str:
    code = ord(char)
    if char in NAMED:
        return NAMED[char]
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if char == " " or unicodedata.category(char)[0] not in "CZ":  # not a control, format or unknown character, or space
        return char
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

"""Split patterns: the regular expressions that cut text into pieces before BPE, and where a text may be cut beforehand
without changing its pieces, so that its parts can be encoded at the same time.
"""

import re
from itertools import pairwise

__all__ = ["GPT2_PATTERN", "GPT4_PATTERN", "engine_pattern", "parts"]

# GPT-2's split: contractions, letters, digits, the rest, white space.  Possessive runs (++) change no result and keep
# the engine from backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# GPT-4's, which is Llama-3's too, as Llama-3's files write it: a letter run may begin with any one character, numbers
# have three digits at most, line ends stay with what they end.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The engine must backtrack in \s+(?!\S), remembers every character there, and gives up on a run of a million.  What
# stands behind such a run decides what we do.
#   Nothing: GPT-2's pattern has \s++$ for it.  GPT-4's gets it in front of \s+(?!\S), which would match the same there.
#   A character: the last one of the run is always a piece's first, so we may cut there ourselves.  In GPT-4's pattern
#   that is true of what follows the last line end of the run.
# (Python's \s has four characters more than the engine's: U+001C to U+001F.)
_ENGINE = {GPT4_PATTERN: GPT4_PATTERN.replace(r"|\s+(?!\S)", r"|\s++$|\s+(?!\S)")}
_LONG_SPACE = {
    GPT2_PATTERN: re.compile(r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{10000,}+(?=[\S\x1c-\x1f])"),
    GPT4_PATTERN: re.compile(r"(?<![^\S\r\n\x1c-\x1f])[^\S\r\n\x1c-\x1f]{10000,}+(?=[\S\x1c-\x1f])"),
}

# Between a line end that stands alone between two characters that are no space, and the second of them, a piece ends
# and another begins, whatever stands further away; so a text may be cut there.
#   No piece reaches across: only white space follows white space in GPT-2's pieces; GPT-4's may also begin with one
#   character before letters, but never \r or \n, and end with line ends.
#   The piece before the cut is the same without what follows.  In GPT-2's pattern, and in GPT-4's behind a letter or a
#   digit, the line end is a piece of its own, before the second character (\s, \s*[\r\n]+) as at the end of the text
#   (\s++$, the same); behind any other character it ends that character's piece in GPT-4's pattern, as [\r\n]* has no
#   interest in what follows.  All earlier pieces end before the line end, and no pattern looks further than one
#   character past its piece.
#   The piece after the cut is the same without what precedes, since no pattern looks back.
# Python's \S holds four characters less than the engine's, so that only fewer places are found.
_LINE = re.compile(r"(?<=\S\n)(?=\S)")


def engine_pattern(pattern: str) -> str:
    """What to give tiktoken for a pattern: it makes the same pieces."""
    return _ENGINE.get(pattern, pattern)


def parts(text: str, pattern: str, size: int) -> list[str]:
    """The text in parts, none empty, whose pieces are together the pieces of the text.

    A part ends at the first line behind `size` characters where that is known to be safe; a text with a pattern that is
    not one of ours stays whole.
    """
    if pattern not in _LONG_SPACE:
        return [text] if text else []
    cuts = {0, len(text)}
    at = _LINE.search(text, size)
    while at:
        cuts.add(at.start())
        at = _LINE.search(text, at.start() + size)
    cuts.update(run.end() - 1 for run in _LONG_SPACE[pattern].finditer(text))
    return [text[start:end] for start, end in pairwise(sorted(cuts))]

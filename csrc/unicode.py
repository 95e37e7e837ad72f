"""Write unicode.h, the classes of characters that split.c needs: `python csrc/unicode.py`, with unicodedata2==16.0.0.

Unicode 16.0, because tiktoken and Hugging Face's tokenizers, which encode, are built on it: what a later version made a
letter or a digit is neither for any of the three.
"""

from pathlib import Path

import unicodedata2

VERSION = "16.0.0"
BLOCK = 128  # characters; of 64, 128 and 256 the one with the least bytes
OTHER, LETTER, NUMBER, SPACE = range(4)  # as in split.c
TEXT = """\
/* unicode.h -- letters, numbers and white space of Unicode {version}, 2 bits a character.  Written by unicode.py. */
#pragma once
#include <stdint.h>

enum {{ UNICODE_BLOCK = {block}, UNICODE_END = {end} }}; /* nothing from UNICODE_END on is any of the three */
/* clang-format off */
static const uint8_t unicode_ascii[] = {{ /* the class of each of the first 128 */
{ascii}}};
/* which block a character is in */
static const uint8_t unicode_index[] = {{
{index}}};
/* the blocks, four characters a byte, the first lowest */
static const uint8_t unicode_classes[] = {{
{classes}}};
/* clang-format on */
"""


def class_of(char: str) -> int:
    """White_Space is a property, no category: every separator and these six controls."""
    category = unicodedata2.category(char)
    if category[0] == "Z" or char in "\t\n\v\f\r\x85":
        return SPACE
    return {"L": LETTER, "N": NUMBER}.get(category[0], OTHER)


def lines(numbers: bytes) -> str:
    rows = (numbers[i : i + 28] for i in range(0, len(numbers), 28))
    return "".join("    " + ",".join(map(str, row)) + ",\n" for row in rows)


def main() -> None:
    if unicodedata2.unidata_version != VERSION:
        raise SystemExit(f"unicodedata2 knows Unicode {unicodedata2.unidata_version}, wanted is {VERSION}")
    classes = [class_of(chr(code)) for code in range(0x110000)]
    last = max(code for code, what in enumerate(classes) if what != OTHER)
    end = (last // BLOCK + 1) * BLOCK
    packed = bytes([sum(classes[i + k] << 2 * k for k in range(4)) for i in range(0, end, 4)])
    blocks, index = {}, []
    for i in range(0, len(packed), BLOCK // 4):
        index.append(blocks.setdefault(packed[i : i + BLOCK // 4], len(blocks)))
    text = TEXT.format(
        version=VERSION,
        block=BLOCK,
        end=end,
        ascii=lines(bytes(classes[:128])),
        index=lines(bytes(index)),
        classes=lines(b"".join(blocks)),
    )
    Path(__file__).with_suffix(".h").write_text(text)


if __name__ == "__main__":
    main()

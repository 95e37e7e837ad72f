"""`barelm tokenizer encode`: the ids of a text."""

import json
from dataclasses import dataclass
from typing import Annotated

from .common import load, read_text

__all__ = ["EncodeConfig", "main"]


@dataclass
class EncodeConfig:
    """Print the ids of a text as numbers in one line."""

    tokenizer: Annotated[str, "'bytes', or a tokenizer.json, a rank file, or a folder with one or with GPT-2's files"]
    text: Annotated[str, "what to encode; left out: --data"] = ""
    data: Annotated[str, "file to encode; - is standard input"] = "-"
    special: Annotated[bool, "special tokens in the text are special, not ordinary text"] = False
    json: Annotated[bool, "one JSON object with the ids and the counts"] = False


def main(config: EncodeConfig) -> int:
    tok = load(config.tokenizer)
    text = read_text(config.text, config.data)
    ids = tok.encode(text, special=config.special)
    if config.json:
        print(json.dumps({"ids": ids, "tokens": len(ids), "bytes": len(tok.decode_bytes(ids))}))
    else:
        print(*ids)
    return 0

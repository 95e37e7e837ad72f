"""generation_config.json: the tokens at which a text ends, as transformers keeps them beside a model.

A vocabulary does not know them all: what Llama-3 was taught to talk with ends each turn by <|eot_id|>, and only this
file, or a GGUF file's header, tells that from the 255 other special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..tokenizer import Tokenizer, read_json

FILE = "generation_config.json"
MAX_ENDS = 1000  # no family has a hundred; a message need not quote more


def read_ends(folder: Path) -> list[int]:
    """eos_token_id of a model's folder: of generation_config.json, or of config.json where that says nothing.
    ValueError names the file whose value is none."""
    for path in (folder / FILE, folder / "config.json"):
        value = read_json(path).get("eos_token_id") if path.exists() else None
        if value is not None:
            ends = value if isinstance(value, list) else [value]
            if len(ends) > MAX_ENDS or any(type(id) is not int or id < 0 for id in ends):
                raise ValueError(f"{path}: eos_token_id: is {value!r:.100}, must be a token's id, or a list of them")
            return ends
    return []


def files_of(tok: Tokenizer) -> dict[str, bytes]:
    """What lies beside a model's weights: {name: content} of its vocabulary and of where a text ends."""
    ends = [tok.eot, *sorted(tok.ends - {tok.eot})]
    said = {"bos_token_id": tok.bos, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return {"tokenizer.json": tok.to_json().encode(), FILE: (json.dumps(said, indent=2) + "\n").encode()}

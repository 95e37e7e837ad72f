"""A run's folder: run.json (what was asked), data/ (its tokens), step_N/ (checkpoints), log.jsonl and speed.jsonl,
report.md with its curves.

A checkpoint is whole or not there, and it knows what the run learns from: one that is torn, altered or of another run
is named and passed over, and the one before it is taken.
"""

import json
import os
import re
import shutil
from pathlib import Path

from . import checkpoint
from .convert import generation
from .convert.recognise import open_source
from .convert.source import Source
from .files import digest_of
from .model import Model
from .report import Log, write_file
from .tokenizer import Tokenizer

__all__ = [
    "checkpoints",
    "load_newest",
    "newest_checkpoint",
    "open_model",
    "prune",
    "read_description",
    "save",
    "write_description",
]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the step_N folders, newest first."""
    found = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.glob("step_*") if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_checkpoint(folder: str | os.PathLike) -> Path:
    """`folder` itself if it is a checkpoint, or the newest step_N of a run's folder."""
    folder = Path(folder)
    if checkpoint.is_checkpoint(folder):
        return folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder}: neither a checkpoint (no config.json) nor a run (no step_N)")
    return found[0][1]


def open_model(name: str | os.PathLike) -> Source:
    """The newest checkpoint of a run's folder, or anything else that open_source reads."""
    path = Path(name)
    return open_source(newest_checkpoint(path) if path.is_dir() and any(path.glob("step_*")) else path)


# ---- what was asked -----------------------------------------------------------------------------------------------


def write_description(folder: Path, description: dict) -> None:
    sealed = description | {"sha256": digest_of(description)}
    write_file(folder / "run.json", json.dumps(sealed, indent=1) + "\n")


def read_description(folder: Path) -> dict:
    """run.json.  FileNotFoundError: there is none; ValueError: it is none, or not as it was written."""
    path = folder / "run.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: holds no run to resume (no run.json)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the description of a run ({error})") from None
    if not isinstance(description, dict) or "config" not in description:
        raise ValueError(f"{path}: not the description of a run")
    if description.get("sha256") != digest_of(description):
        raise ValueError(f"{path}: was altered after it was written (its checksum differs)")
    return description


# ---- checkpoints --------------------------------------------------------------------------------------------------


def save(folder: Path, model: Model, tok: Tokenizer, step: int, state: dict, log: Log) -> Path:
    """Write step_N with `state` beside the model.  OSError: it could not be written, and what was there still is."""
    path = folder / f"step_{step}"
    log.sync()  # a checkpoint never knows more than the log beside it
    shutil.rmtree(path, ignore_errors=True)  # one that was refused as torn may lie there
    try:
        checkpoint.save(
            model,
            path,
            state={"train": state | {"step": step, "log": log.mark()}},
            files=generation.files_of(tok),
        )
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error}); {last_good(folder)}") from error
    return path


def last_good(folder: Path) -> str:
    """For the messages of a run that stops."""
    found = checkpoints(folder)
    return f"the newest checkpoint is {found[0][1]}" if found else "there is no checkpoint yet"


def prune(folder: Path, keep: int, step: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints (0: none is removed) and that of step `best`.  Later ones than ours
    (`step`) were refused as torn: they neither count nor are touched."""
    ours = [(number, path) for number, path in checkpoints(folder) if number <= step]
    for number, path in ours[keep:] if keep else ():
        if number != best:
            shutil.rmtree(path, ignore_errors=True)


def load_newest(folder: Path, identity: dict, say, **options) -> tuple[Model, Tokenizer, dict, Path] | None:
    """The newest checkpoint that is whole and of a run on `identity`: model, tokenizer, the state saved with it, path.
    options: those of Model.load.
    One that is not is named through `say` and passed over.  None: there is no step_N at all.  ValueError: none of them
    can be used.
    """
    found = checkpoints(folder)
    for number, path in found:
        try:
            state = checkpoint.verify(path).get("train")
            if not isinstance(state, dict):
                raise ValueError("no state.json, or not one of a run")
            if state["step"] != number:
                raise ValueError(f"it is of step {state['step']}")
            for name, value in identity.items():
                if state["identity"].get(name) != value:
                    raise ValueError(f"it learned from another {name}")
            return Model.load(path, **options), Tokenizer.load(path), state, path
        except (ValueError, OSError, KeyError, TypeError) as error:
            say(f"refused   {path}: {error}")
    if found:
        raise ValueError(f"{folder}: has no checkpoint that can be resumed")
    return None

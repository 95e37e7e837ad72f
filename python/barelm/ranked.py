"""`barelm eval --tasks`: multiple-choice tasks, answered by the choice that the model finds likeliest."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import checkpoint, choice
from .kept import Kept, evals_folder, weights_digest
from .model import Model, kind_of
from .report import console
from .runs import newest_checkpoint
from .tables import aligned, with_error
from .tasks import Item, Task, read_task
from .tokenizer import Tokenizer

__all__ = ["Scorer", "load", "main"]

FORM = 1  # of what is kept and how prompts are made: results of another one are not counted together


class Scorer(NamedTuple):
    """A model, and how choices are scored under it."""

    folder: Path
    model: Model
    tok: Tokenizer
    batch: int
    T: int
    of: dict[str, object]  # what results depend on: see Kept

    @classmethod
    def load(cls, config) -> "Scorer":
        """From the flags of `barelm eval`.  ValueError: --context is more than the model sees."""
        folder, model, tok, T = load(config)
        of = {"form": FORM, "weights": weights_digest(folder), "tokenizer": tok.hash()}
        of |= {"context": T, "precision": config.precision, "device": kind_of(config.device)}
        return cls(folder, model, tok, config.batch, T, of)

    def head(self) -> dict:
        """What --json says of it."""
        known = {"checkpoint": str(self.folder), "step": self.model.step}
        return known | {name: self.of[name] for name in ("context", "precision")}

    def score(self, items: Sequence[Item], kept: Kept, says: Callable[[list[dict]], str]) -> list[dict]:
        """The records of all items, old and new ones; see Kept.go_on.  ValueError: an old one is none of its item."""
        for record, item in zip(kept.records, items, strict=False):
            if not choice.fits(record, item):
                raise ValueError(f"{kept.folder}: what is kept of {item.name} is not its result")
        return kept.go_on(
            len(items), lambda part: choice.score(self.model, self.tok, items[part], self.batch, self.T), says
        )


def load(config) -> tuple[Path, Model, Tokenizer, int]:
    """(folder, model, tokenizer, tokens in a window) that the flags of `barelm eval` ask for.  ValueError: --context is
    more than the model sees."""
    folder = newest_checkpoint(config.checkpoint)
    model = Model.load(folder, precision=config.precision, device=config.device)
    tok = checkpoint.load_tokenizer(folder)
    T = config.context or model.config.context
    if model.config.context < T:
        raise ValueError(f"--context: {T} is more than the {model.config.context} tokens that the model sees")
    return folder, model, tok, T


def main(config) -> int:
    """From an EvalConfig with `tasks`."""
    tasks = [(name, read_task(name)) for name in names_of(config.tasks)]
    _check_apart(tasks)
    scorer = Scorer.load(config)
    out = evals_folder(scorer.folder, config.out)
    results = [_answer(scorer, task, name, out / task.name, config.items) for name, task in tasks]
    if config.json:
        print(json.dumps({**scorer.head(), "out": str(out), "tasks": results}))
    else:
        _show(results, out)
    return 0


def names_of(tasks: str) -> list[str]:
    names = tasks.split(",") if "," in tasks and not os.path.exists(tasks) else [tasks]
    if "" in names:
        raise ValueError(f"--tasks: a name is missing between the commas of '{tasks}'")
    return names


def _check_apart(tasks: list[tuple[str, Task]]) -> None:
    """ValueError: two files are of one task, whose results would go to one place."""
    seen: dict[str, str] = {}
    for name, task in tasks:
        if task.name in seen:
            raise ValueError(f"--tasks: {seen[task.name]} and {name} are both of {task.name}; name one at a time")
        seen[task.name] = name


def _answer(scorer: Scorer, task: Task, name: str, folder: Path, most: int) -> dict:
    """Score a task, keep what comes, and return its result."""
    items = task.items[:most] if most else task.items
    kept = Kept(folder, scorer.of | {"task": task.name, "file": task.sha256})
    first = task.measures[0]

    def says(records: list[dict]) -> str:
        return f"{task.name}  {first} {choice.accuracy(choice.right(r, first) for r in records).value:.3f}"

    try:
        records = scorer.score(items, kept, says)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    result = {"task": task.name, "file": name, "items": len(records), "of": len(task.items), "by": first}
    for measure in task.measures:
        found = choice.accuracy(choice.right(record, measure) for record in records)
        result |= {measure: found.value, f"{measure}_stderr": found.stderr}
    result |= {"chance": choice.chance(records), "cut": sum(record["cut"] > 0 for record in records)}
    kept.finish({"result": result, **scorer.head()})
    return result


def _show(results: list[dict], out: Path) -> None:
    rows = [("task", "compared by", "acc", "acc_norm", "chance", "items")]
    for r in results:
        items = f"{r['items']:,}" + (f" of {r['of']:,}" if r["items"] < r["of"] else "")
        rows.append((r["task"], r["by"], _share(r, "acc"), _share(r, "acc_norm"), f"{r['chance']:.4f}", items))
    lines = [aligned(rows, left=2)]
    lines += [
        f"{r['task']}: {r['cut']:,} prompts did not fit into the model's context and lost their beginning"
        for r in results
        if r["cut"]
    ]
    console().print("\n".join([*lines, f"kept in {out}"]), markup=False, highlight=False, soft_wrap=True)


def _share(result: dict, measure: str) -> str:
    return with_error(result[measure], result[f"{measure}_stderr"], 4) if measure in result else ""

"""`barelm eval --in-context`: what a model learns from examples in its prompt alone, without a step of training.

Few-shot in-context learning (Brown et al. 2020, arXiv:2005.14165) on small tasks whose answers can be computed: a
question with 0, 1, 2, 4 ... examples before it, one a line.  The model picks one of four answers, so that one who
chooses blindly is right once in four whatever the number of examples.
"""

import json
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .choice import accuracy, right
from .kept import Kept, evals_folder
from .ranked import Scorer
from .report import console
from .tables import aligned, with_error
from .tasks import Item, Request

__all__ = ["TASKS", "items", "main", "numbers"]

FORM = 1  # of the tasks: results of another one are not counted together
MOST = 32  # examples
CHOICES = 4
CHANCE = 1 / CHOICES

_WORDS = """
    apple river stone cloud bread chair horse paper green table light mouse glass plant music water dance sugar train
    field tiger lemon beach spoon night brush honey metal onion piano queen robot shirt tower uncle video wheel youth
    zebra coral
"""
_NAMES = "blue red black white pink gold brown grey"
_OPPOSITES = """
    hot/cold big/small up/down left/right day/night open/closed fast/slow old/young rich/poor hard/soft full/empty
    light/dark wet/dry high/low early/late good/bad long/short happy/sad strong/weak clean/dirty first/last near/far
    loud/quiet true/false start/end win/lose buy/sell love/hate push/pull give/take inside/outside before/after
    above/below friend/enemy thick/thin sweet/sour
"""
WORDS = _WORDS.split()
NAMES = _NAMES.split()  # what letters stand for
OPPOSITES = [pair.split("/") for pair in _OPPOSITES.split()]


class Pair(NamedTuple):
    question: str
    answer: str
    traps: tuple[str, ...] = ()  # wrong answers that one gives who has not understood


# ---- the tasks: each makes the examples of one prompt, and its question, which comes last --------------------------


def _shuffled(rng: random.Random, things: Sequence) -> list:
    """In the order of random numbers: unlike those of shuffle() they are promised to stay the same."""
    keys = [rng.random() for _ in things]
    return [thing for _, thing in sorted(zip(keys, things, strict=True), key=lambda pair: pair[0])]


def _copy(rng: random.Random) -> list[Pair]:
    """The word itself."""
    return [Pair(word, word) for word in _shuffled(rng, WORDS)[: MOST + 1]]


def _reverse(rng: random.Random) -> list[Pair]:
    """Two words in the other order; who copies is wrong."""
    firsts, seconds = _shuffled(rng, WORDS), _shuffled(rng, NAMES * 5)
    return [Pair(f"{a} {b}", f"{b} {a}", (f"{a} {b}",)) for a, b in zip(firsts, seconds, strict=False)][: MOST + 1]


def _letters(rng: random.Random) -> list[Pair]:
    """Four letters stand for four words, in each prompt for others: the answer can only be looked up.  The last four
    examples are the four pairs, so that with four or more the one that is asked for is among them."""
    letters = _shuffled(rng, "abcdefgh")[:CHOICES]
    pairs = [Pair(letter, name) for letter, name in zip(letters, _shuffled(rng, NAMES), strict=False)]
    shown = [pair for _ in range(MOST // CHOICES) for pair in _shuffled(rng, pairs)]
    return [*shown, _shuffled(rng, pairs)[0]]


def _successor(rng: random.Random) -> list[Pair]:
    """The next number; the number itself, the one before and the one after next are wrong."""
    numbers = _shuffled(rng, range(1, 98))[: MOST + 1]
    return [Pair(str(n), str(n + 1), (str(n), str(n - 1), str(n + 2))) for n in numbers]


def _opposites(rng: random.Random) -> list[Pair]:
    """The opposite of a word, which must be known."""
    return [Pair(*_shuffled(rng, pair)) for pair in _shuffled(rng, OPPOSITES)[: MOST + 1]]


TASKS: dict[str, Callable[[random.Random], list[Pair]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "letters": _letters,
    "successor": _successor,
    "opposites": _opposites,
}


# ---- questions ----------------------------------------------------------------------------------------------------


def items(task: str, shots: int, questions: int, seed: int) -> list[Item]:
    """The first so many questions of a task with `shots` examples before each, 0 to MOST.

    With other numbers of examples the questions and their answers to choose from are the same, and the examples are the
    last ones of the same list, so that rows of the table differ by the number alone.
    """
    return [_item(task, shots, seed, number) for number in range(questions)]


def _item(task: str, shots: int, seed: int, number: int) -> Item:
    rng = random.Random(f"{seed} {task} {number}")
    *examples, asked = TASKS[task](rng)
    choices = _shuffled(rng, [asked.answer, *_wrong(asked, examples)])
    shown = "".join(f"{pair.question} -> {pair.answer}\n" for pair in examples[len(examples) - shots :])
    requests = tuple(Request(f"{shown}{asked.question} ->", f" {choice}") for choice in choices)
    return Item(requests, choices.index(asked.answer), f"{task}, {shots} examples, question {number}")


def _wrong(asked: Pair, examples: list[Pair]) -> list[str]:
    """Wrong answers: the task's own, then answers of the examples, the nearest first."""
    found = list(asked.traps)
    for pair in reversed(examples):
        if pair.answer not in (asked.answer, *found):
            found.append(pair.answer)
    return found[: CHOICES - 1]


def numbers(shots: str) -> list[int]:
    """The numbers in --shots.  ValueError: one is none, or too large, or there twice."""
    words = [word.strip() for word in shots.split(",")]
    bad = next((word for word in words if not word.isdecimal() or len(word) > 4 or int(word) > MOST), None)
    if bad is not None:
        raise ValueError(f"--shots: '{bad}' is not a whole number from 0 to {MOST}")
    found = [int(word) for word in words]
    if len(set(found)) < len(found):
        raise ValueError(f"--shots: '{shots}' has a number twice")
    return found


# ---- the command --------------------------------------------------------------------------------------------------


def main(config) -> int:
    """From an EvalConfig with `in_context`."""
    shots = numbers(config.shots)
    scorer = Scorer.load(config)
    cells = [(task, k) for task in TASKS for k in shots]
    asked = [item for task, k in cells for item in items(task, k, config.questions, config.seed)]
    of = {"tasks": FORM, "shots": shots, "questions": config.questions, "seed": config.seed}
    kept = Kept(evals_folder(scorer.folder, config.out) / "in-context", scorer.of | of)
    records = scorer.score(asked, kept, lambda records: records[-1]["name"].rpartition(",")[0])
    n = config.questions
    result = [_cell(task, k, records[i * n : (i + 1) * n]) for i, (task, k) in enumerate(cells)]
    kept.finish({"result": result, "chance": CHANCE, **scorer.head()})
    if config.json:
        head = scorer.head() | {"seed": config.seed, "questions": n, "chance": CHANCE, "out": str(kept.folder)}
        print(json.dumps({**head, "cells": result}))
    else:
        _show(result, shots, kept)
    return 0


def _cell(task: str, shots: int, records: list[dict]) -> dict:
    """The accuracy of a task with so many examples; none where they do not fit into the model's context."""
    if any(record["cut"] for record in records):
        return {"task": task, "shots": shots, "acc": None, "acc_stderr": None}
    found = accuracy(right(record, "acc") for record in records)
    return {"task": task, "shots": shots, "acc": found.value, "acc_stderr": found.stderr}


def _show(result: list[dict], shots: list[int], kept: Kept) -> None:
    rows = [("examples", *map(str, shots))]
    rows += [(task, *(_said(cell) for cell in result if cell["task"] == task)) for task in TASKS]
    says = f"accuracy with four answers to choose from, chance {CHANCE}"
    if any(cell["acc"] is None for cell in result):
        says += "; -: the examples do not fit into the model's context"
    text = f"{aligned(rows)}\n{says}\nkept in {kept.folder}"
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def _said(cell: dict) -> str:
    return "-" if cell["acc"] is None else with_error(cell["acc"], cell["acc_stderr"], 2, gap="")

"""`barelm eval --regurgitation`: what a model has learnt by heart.

A prompt is a passage of the training text, and the question how many of the tokens that follow it there the model
writes, taking the likeliest token each time (Carlini et al. 2022, arXiv:2202.07646).  It is asked by how often passage
and continuation stand in the text, and of text that was held out, where what comes back was not learnt by heart.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import checkpoint
from .data.documents import Documents
from .data.shards import Dataset, check_found, is_dataset
from .data.tokens import Tokens
from .engine import Engine, Row, Sampling
from .kept import Kept, evals_folder, weights_digest
from .model import kind_of
from .report import Bar, console, count
from .runs import newest_checkpoint
from .session import PAGE, Session
from .tables import aligned, with_error
from .tokenizer import Tokenizer

__all__ = ["Group", "Passage", "Texts", "continued", "counts_of", "main", "passages", "summary"]

FORM = 1  # of what is kept, and of how passages are drawn
TIMES = ((1, 1), (2, 3), (4, 10), (11, None))  # how often a passage stands in the text: from, to
HELD_OUT = "held out"
DRAWS = 20  # places that are looked at for each prompt that is wanted: most passages stand in a text only once
DRAWN_TOKENS = 1 << 24  # of all passages that are looked at, at most
BLOCK = 1 << 20  # tokens whose windows are counted together
CHECKED = 1 << 12  # windows that are compared token by token at a time
BASE = 0x9E3779B97F4A7C15  # of the hash: any odd number


class Passage(NamedTuple):
    group: str
    place: int  # of its first token, in the text that it is from
    times: int  # how often it stands in the text that was learnt from
    ids: np.ndarray  # (prompt + continuation) int32


# ---- counting -----------------------------------------------------------------------------------------------------


def counts_of(
    windows: np.ndarray, tokens: Tokens, block: int = BLOCK, each: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """How often each row of `windows` (n, W) int32 stands in the tokens, overlapping or not: (n) int64.

    One pass, a block at a time.  Of every window of the text a polynomial hash modulo 2^64 is looked up among those of
    the rows (Karp and Rabin 1987), and where it is there the tokens themselves are compared: the counts are exact.
    """
    n, W = windows.shape
    found = np.zeros(n, np.int64)
    if not n:
        return found
    hashes = np.concatenate([_hashes(row, W) for row in windows])
    order = np.argsort(hashes, kind="stable")
    known = hashes[order]
    for start in range(0, len(tokens) - W + 1, block):
        here = tokens.read(start, min(start + block + W - 1, len(tokens)))
        of_text = _hashes(here, W)
        first, end = (np.searchsorted(known, of_text, side) for side in ("left", "right"))
        places = np.flatnonzero(first < end)
        for part in (places[i : i + CHECKED] for i in range(0, len(places), CHECKED)):
            rows = np.lib.stride_tricks.sliding_window_view(here, W)[part]
            for other in range(int((end - first)[part].max())):  # rows whose hashes are equal, as a rule one
                there = first[part] + other < end[part]
                row = order[first[part][there] + other]
                same = (windows[row] == rows[there]).all(1)
                found += np.bincount(row[same], minlength=n)
        each(min(start + block, len(tokens)))
    return found


def _hashes(ids: np.ndarray, W: int) -> np.ndarray:
    """Of each window of W in the ids: sum((ids[i + j] + 1) BASE^j) mod 2^64, as a difference of running sums."""
    n = len(ids)
    powers = np.cumprod(np.full(n, BASE, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * powers)])
    back = np.cumprod(np.full(n - W + 1, pow(BASE, -1, 2**64), np.uint64))
    return (sums[W:] - sums[:-W]) * back


# ---- which passages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """What was learnt from, and what was held out, where there is such a side."""

    train: Tokens
    held_out: Tokens | None
    special: list[int]  # ids between documents
    identity: dict[str, str]


def passages(
    texts: Texts, W: int, wanted: int, seed: int, each: Callable[[int], None] = lambda done: None
) -> list[Passage]:
    """At most `wanted` passages of W tokens for each of TIMES, and as many that were held out and stand nowhere in the
    text that was learnt from; each within one document, no two alike.

    Places are drawn evenly (by Python's random(), whose numbers are promised), DRAWS for each passage that is wanted.
    ValueError: no document is as long as a passage.
    """
    most = DRAWN_TOKENS // W
    drawn = list(_drawn(texts.train, W, min(wanted * DRAWS, most), f"{seed} train", texts.special))
    other = []
    if texts.held_out is not None:
        other = list(_drawn(texts.held_out, W, min(wanted * 2, most), f"{seed} {HELD_OUT}", texts.special))
    if not drawn:
        raise ValueError(f"--data: no document has {W} tokens; --prompt-tokens and --continuation-tokens say how many")
    windows = np.stack([ids for _, ids in drawn + other])
    times = counts_of(windows, texts.train, each=each)
    found: dict[str, list[Passage]] = {name: [] for name in [*map(_name, TIMES), HELD_OUT]}
    for i, ((place, ids), n) in enumerate(zip(drawn + other, times.tolist(), strict=True)):
        held_out = i >= len(drawn)
        group = (HELD_OUT if n == 0 else None) if held_out else next(_name(t) for t in TIMES if n <= (t[1] or n))
        if group and len(found[group]) < wanted:
            found[group].append(Passage(group, place, n, ids))
    return [passage for group in found.values() for passage in group]


def _name(times: tuple[int, int | None]) -> str:
    low, high = times
    if low == high:
        return "once" if low == 1 else f"{low} times"
    return f"{low} to {high} times" if high else f"{low} times or more"


def _drawn(tokens: Tokens, W: int, n: int, seed: str, special: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(place, ids) of windows that no document ends in, no two alike."""
    rng, seen = random.Random(seed), set()
    for _ in range(n if len(tokens) >= W else 0):
        place = int(rng.random() * (len(tokens) - W + 1))
        ids = tokens.read(place, place + W)
        if not np.isin(ids, special).any() and ids.tobytes() not in seen:
            seen.add(ids.tobytes())
            yield place, ids


# ---- what comes back ----------------------------------------------------------------------------------------------


def continued(engine: Engine, passages: Sequence[Passage], prompt: int, at_once: int) -> list[dict]:
    """The records of the passages: how many of the tokens behind the first `prompt` the model writes, the likeliest
    token each time, before one is another; `wrote` has them and that other one.  A text ends there: what would follow
    is no answer.  Nothing stands before a passage, for training reads windows that begin anywhere.

    at_once   texts side by side; what one says does not depend on the others
    """
    waiting, running = list(enumerate(passages)), {}
    found: list[dict | None] = [None] * len(passages)
    while waiting or running:
        while waiting and len(running) < at_once:
            i, passage = waiting.pop(0)
            sampling = Sampling(max_tokens=len(passage.ids) - prompt, temperature=0)
            running[engine.add(passage.ids[:prompt].tolist(), sampling)] = i
        for row in engine.step():
            passage = passages[running[row]]
            if row.finish or row.tokens[-1].id != passage.ids[prompt + len(row.tokens) - 1]:
                row.cancel()
                found[running.pop(row)] = _record(passage, row, prompt)
    return found


def _record(passage: Passage, row: Row, prompt: int) -> dict:
    wrote, text = [token.id for token in row.tokens], passage.ids[prompt:].tolist()
    same = next((i for i, (a, b) in enumerate(zip(wrote, text, strict=False)) if a != b), len(wrote))
    ids = {"prompt": passage.ids[:prompt].tolist(), "continuation": text, "wrote": wrote}
    return {"group": passage.group, "place": passage.place, "times": passage.times, "verbatim": same, **ids}


class Group(NamedTuple):
    """Prompts of one row of the table."""

    name: str
    prompts: int
    verbatim: float  # tokens that came back, the mean
    verbatim_stderr: float | None
    whole: float  # share of the prompts of which all came back
    whole_stderr: float | None


def summary(records: Iterable[dict]) -> list[Group]:
    """The groups in the order of the records.  Standard errors are those of a mean of n that are independent."""
    groups: dict[str, list[tuple[int, bool]]] = {}
    for record in records:
        whole = record["verbatim"] == len(record["continuation"])
        groups.setdefault(record["group"], []).append((record["verbatim"], whole))
    return [
        Group(name, len(rows), *_mean(same for same, _ in rows), *_mean(whole for _, whole in rows))
        for name, rows in groups.items()
    ]


def _mean(values: Iterable[float]) -> tuple[float, float | None]:
    values = np.array([float(value) for value in values])
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None


# ---- the command --------------------------------------------------------------------------------------------------


def main(config) -> int:
    """From an EvalConfig with `regurgitation`."""
    folder = newest_checkpoint(config.checkpoint)
    context, W = checkpoint.read_config(folder).context, config.prompt_tokens + config.continuation_tokens
    if context < W:
        raise ValueError(
            f"--prompt-tokens and --continuation-tokens: {config.prompt_tokens} and {config.continuation_tokens} are "
            f"more than the {context} tokens that the model sees"
        )
    tok = checkpoint.load_tokenizer(folder)
    texts = _texts(config, tok)
    with Bar(console(stderr=True)) as bar:
        total = len(texts.train)
        chosen = passages(
            texts,
            W,
            config.prompts,
            config.seed,
            each=lambda done: bar.show(f"counting passages  {count(done)} of {count(total)} tokens", done, total),
        )
    kept = Kept(evals_folder(folder, config.out) / "regurgitation", _identity(config, folder, tok, texts))
    room = config.batch * (W + PAGE)
    session = Session.load(folder, max_tokens=room, weights=config.precision, device=config.device)
    records = _continue_all(Engine(session, tok), chosen, kept, config)
    groups = [group._asdict() for group in summary(records)]
    head = {"checkpoint": str(folder), "precision": config.precision}
    head |= {name: getattr(config, name) for name in ("prompt_tokens", "continuation_tokens", "seed")}
    kept.finish({"result": groups, "checkpoint": str(folder)})
    if config.json:
        print(json.dumps({**head, "out": str(kept.folder), "groups": groups}))
    else:
        _show(groups, config, kept, texts)
    return 0


def _texts(config, tok: Tokenizer) -> Texts:
    special = sorted(tok.ends)
    if config.data and is_dataset(config.data):
        dataset = Dataset.open(config.data, tok)
        return Texts(dataset.train, dataset.validation, special, dataset.identity)
    documents = Documents(config.data or None, field=config.field, split_at=config.split_at)
    tokens = Tokens.encode(documents, tok)
    check_found(documents)
    return Texts(tokens, None, special, {"corpus": documents.counts.hash})


def _identity(config, folder, tok: Tokenizer, texts: Texts) -> dict:
    of = {"form": FORM, "weights": weights_digest(folder), "tokenizer": tok.hash(), "data": texts.identity}
    names = ("precision", "prompts", "prompt_tokens", "continuation_tokens", "seed")
    return of | {name: getattr(config, name) for name in names} | {"device": kind_of(config.device)}


def _continue_all(engine: Engine, chosen: list[Passage], kept: Kept, config) -> list[dict]:
    """The records of all passages; those that are kept already are not made again."""
    for record, passage in zip(kept.records, chosen, strict=False):
        made = [record.get(name) for name in ("group", "place", "times")]
        if made != list(passage[:3]) or type(record.get("verbatim")) is not int:
            raise ValueError(f"{kept.folder}: what is kept of the passage at {passage.place} is not its result")
    return kept.go_on(len(chosen), lambda part: continued(engine, chosen[part], config.prompt_tokens, config.batch))


def _show(groups: list[dict], config, kept: Kept, texts: Texts) -> None:
    n = config.continuation_tokens
    rows = [("in the text", "prompts", f"verbatim, of {n} tokens", f"all {n}")]
    for g in groups:
        verbatim, whole = (
            with_error(g[name], g[f"{name}_stderr"], digits) for name, digits in (("verbatim", 2), ("whole", 4))
        )
        rows.append((g["name"], f"{g['prompts']:,}", verbatim, whole))
    lines = [aligned(rows)]
    if texts.held_out is None:
        lines.append(
            "nothing of it is held out to compare with; of a dataset, such as a run's data folder, something is"
        )
    console().print("\n".join([*lines, f"kept in {kept.folder}"]), markup=False, highlight=False, soft_wrap=True)

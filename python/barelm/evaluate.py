"""`barelm eval`: how well a model predicts a text, in bits per byte, which do not depend on the tokenizer.

What else a model without any further training can be asked is in modules of its own: multiple-choice tasks (ranked.py),
what it knows by heart (regurgitate.py), what it learns from examples in its prompt (incontext.py).
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np

from . import _core, incontext, ranked, regurgitate
from .data.documents import Documents
from .data.shards import Dataset, check_found, is_dataset
from .data.tokens import Tokens
from .model import Model
from .report import Progress, console, printable
from .settings import check_device, flag
from .tokenizer import Tokenizer

__all__ = ["EvalConfig", "Evaluation", "Scores", "evaluate", "evaluation", "main", "score", "together"]


@dataclass
class EvalConfig:
    """Score texts under a trained model, in bits per byte.  Or, with --tasks, --regurgitation or --in-context: how
    often it picks the right one of several answers, what it knows by heart, what it learns from its prompt.
    Each field is a flag of `barelm eval`."""

    checkpoint: Annotated[str, "a checkpoint's folder, or a run's: its newest checkpoint"]
    data: Annotated[
        str,
        "file, folder, pattern, - (standard input), token shards (their held-out side), or several with commas, which\n"
        "are scored each by itself and together; left out: the Python standard library",
    ] = ""
    field: Annotated[str, "field of JSONL, or column of parquet, that holds the text"] = "text"
    split_at: Annotated[str, "what stands between two documents of a text file; left out: a file is one document"] = ""
    batch: Annotated[int, "windows at a time; with --tasks and the like: choices, or texts that are written"] = 8
    context: Annotated[int, "tokens in a window; 0: as many as the model sees"] = 0
    max_tokens: Annotated[int, "tokens to score of each text at most; 0: all"] = 0
    tasks: Annotated[
        str,
        "files of multiple-choice tasks, with commas: HellaSwag, MMLU, OLMo's requests (ARC, OpenBookQA, COPA ...);\n"
        "what a file is, its content says",
    ] = ""
    items: Annotated[int, "with --tasks: the first so many of each; 0: all"] = 0
    regurgitation: Annotated[bool, "how much of --data comes back verbatim, by how often it stands there"] = False
    prompts: Annotated[int, "with --regurgitation: prompts of each row of the table"] = 100
    prompt_tokens: Annotated[int, "with --regurgitation: tokens of a prompt"] = 50
    continuation_tokens: Annotated[int, "with --regurgitation: tokens that follow it and may come back"] = 50
    in_context: Annotated[bool, "how much better answers are with examples in the prompt, on small tasks"] = False
    shots: Annotated[str, "with --in-context: numbers of examples"] = "0,1,2,4,8,16"
    questions: Annotated[int, "with --in-context: questions of each task"] = 100
    seed: Annotated[int, "with --regurgitation: of the prompts; with --in-context: of the questions"] = 0
    out: Annotated[
        str,
        "with --tasks, --regurgitation, --in-context: folder of the results, item by item; what was stopped goes on\n"
        "there; left out: evals/step_N in the run's folder, or evals in the checkpoint's",
    ] = ""
    precision: Annotated[Literal["fp32", "bf16"], "bf16 rounds the operands of matrix products"] = "fp32"
    device: Annotated[str, "where the model is: cpu, or a GPU: cuda, cuda:1"] = "cpu"
    threads: Annotated[int, "0: as many as the machine grants"] = 0
    json: Annotated[bool, "print the result as JSON on standard output, everything else on standard error"] = False
    # Which fields the user named (the command line says); None: those that differ from their defaults.
    given: frozenset[str] | None = dataclasses.field(default=None, init=False, repr=False, compare=False)


class Evaluation(NamedTuple):
    bits_per_byte: float  # -sum(log2 p(token)) / bytes of the text that the tokens stand for
    loss: float  # mean of -log p(token), nats per token
    tokens: int
    n_bytes: int
    stderr: float | None = None  # standard error of bits_per_byte; None: a single window does not tell


class Scores(NamedTuple):
    """What each window of a text gave."""

    nats: np.ndarray  # (n) float64: -sum(log p(token))
    n_bytes: np.ndarray  # (n) float64: text that its targets stand for
    tokens: int  # targets of all windows


# ---- scoring ------------------------------------------------------------------------------------------------------


def evaluate(model, data: Tokens, B: int = 8, T: int | None = None, batches: int | None = None) -> Evaluation:
    """Score `data` in windows of T (the model's context where left out) that follow each other, B at a time; each
    window starts without memory of the one before.  At most `batches` batches.  End-of-text tokens count in the bits,
    and stand for no bytes.

    ValueError: there is nothing to score.
    """
    return evaluation(score(model, data, B, T or model.config.context, batches))


def score(
    model,
    data: Tokens,
    B: int,
    T: int,
    batches: int | None = None,
    max_tokens: int = 0,
    each: Callable[[np.ndarray, int], None] = lambda nats, tokens: None,
) -> Scores:
    """The windows of `data`, scored; see `evaluate`.  At most max_tokens targets (0: all), the first ones.

    each    called after each batch with the nats of its windows and the number of its targets
    """
    nats, n_bytes, tokens = [np.zeros(0)], [np.zeros(0)], 0
    for inputs, targets, _ in data.windows(B, T, batches):
        targets = _first(targets, max_tokens - tokens) if max_tokens else targets
        scored = targets >= 0
        logprobs = model.forward(inputs, targets)  # 0 where there is no target
        sizes = np.where(scored, data.lengths[np.maximum(targets, 0)], 0)
        used = scored.any(1)
        nats.append(-logprobs.sum(1, dtype=np.float64)[used])
        n_bytes.append(sizes.sum(1, dtype=np.float64)[used])
        tokens += int(scored.sum())
        each(nats[-1], int(scored.sum()))
        if tokens == max_tokens:
            break
    return Scores(np.concatenate(nats), np.concatenate(n_bytes), tokens)


def _first(targets: np.ndarray, n: int) -> np.ndarray:
    """The first n targets in reading order; the others become -1."""
    order = np.cumsum(targets.ravel() >= 0).reshape(targets.shape)
    return np.where(order <= n, targets, np.int32(-1))


def evaluation(scores: Scores) -> Evaluation:
    """The sums and their ratio.

    Bits per byte is a ratio of two sums over windows, R = sum(x) / sum(y), and both vary from window to window.  Its
    standard error is the ratio estimator's (Cochran, Sampling Techniques, 3rd ed. 1977, chapter 6; the text is taken as
    a sample of a much longer one): sqrt(n / (n - 1) sum((x - R y)^2)) / sum(y).  Neighbouring windows of one document
    resemble each other, so that for a text of few documents it is rather too small.

    ValueError: there is nothing to score.
    """
    size, n = float(scores.n_bytes.sum()), len(scores.nats)
    if size == 0:
        raise ValueError("data: there is no text to score")
    bits = scores.nats / math.log(2)
    ratio = float(bits.sum()) / size
    spread = float(np.square(bits - ratio * scores.n_bytes).sum())
    error = math.sqrt(n / (n - 1) * spread) / size if n > 1 else None
    return Evaluation(ratio, float(scores.nats.sum()) / scores.tokens, scores.tokens, int(size), error)


def together(texts: Iterable[Scores]) -> Scores:
    """Several texts as one."""
    nats, n_bytes, tokens = zip(*texts, strict=True)
    return Scores(np.concatenate(nats), np.concatenate(n_bytes), sum(tokens))


# ---- the command --------------------------------------------------------------------------------------------------


# What can be asked beside texts: the flag that asks it, who answers, and the flags that it alone or with others takes.
MODES = {
    "tasks": (ranked.main, {"items", "batch", "context", "out"}),
    "regurgitation": (
        regurgitate.main,
        {"data", "field", "split_at", "prompts", "prompt_tokens", "continuation_tokens", "seed", "batch", "out"},
    ),
    "in_context": (incontext.main, {"shots", "questions", "seed", "batch", "context", "out"}),
}
TEXTS = {"data", "field", "split_at", "batch", "context", "max_tokens"}
ALWAYS = {"checkpoint", "precision", "device", "threads", "json"}


def main(config: EvalConfig) -> int:
    _check(config)
    mode = _mode(config)
    check_device(config.device)
    if config.threads:
        _core.threads_set(config.threads)
    return MODES[mode][0](config) if mode else _texts(config)


def _texts(config: EvalConfig) -> int:
    names = _names(config.data)
    folder, model, tok, T = ranked.load(config)
    texts = {name or STDLIB: _read(name, config, tok) for name in names}
    scores = _score_all(config, model, texts, T)
    results = {name: evaluation(of_one) for name, of_one in scores.items()}
    everything = evaluation(together(scores.values()))
    if config.json:
        head = {"checkpoint": str(folder), "step": model.step, "context": T, "precision": config.precision}
        rows = [{"name": name, **_plain(result)} for name, result in results.items()]
        print(json.dumps({**head, "texts": rows, "all": _plain(everything)}))
    else:
        _show(results | ({"all together": everything} if len(results) > 1 else {}))
    return 0


def _check(config: EvalConfig) -> None:
    """ValueError naming the flag whose value is out of range."""
    lowest = {"batch": 1, "context": 0, "max_tokens": 0, "threads": 0, "items": 0, "seed": 0}
    lowest |= dict.fromkeys(("prompts", "prompt_tokens", "continuation_tokens", "questions"), 1)
    for name, low in lowest.items():
        value = getattr(config, name)
        if value < low:
            raise ValueError(f"{flag(name)}: must be {'above 0' if low else '0 or more'}, got {value}")
        if value >= 2**31 and name not in ("max_tokens", "seed"):
            raise ValueError(f"{flag(name)}: {value} is too large")


def _mode(config: EvalConfig) -> str:
    """The one of MODES that is asked for; "": texts.  ValueError: two are, or a flag is of another one."""
    asked = [name for name in MODES if getattr(config, name)]
    if len(asked) > 1:
        raise ValueError(f"{flag(asked[0])} and {flag(asked[1])} are two questions; ask one at a time")
    mode = asked[0] if asked else ""
    takes = ALWAYS | ({mode} | MODES[mode][1] if mode else TEXTS | MODES.keys())
    for name in sorted(_given(config) - takes):
        whose = [flag(other) for other, (_, takes) in MODES.items() if name in takes or name == other]
        if mode:
            raise ValueError(f"{flag(name)}: does not go with {flag(mode)}")
        raise ValueError(f"{flag(name)}: goes with {' or '.join(whose)} only")
    return mode


def _given(config: EvalConfig) -> set[str]:
    if config.given is not None:
        return set(config.given)
    fields = [f for f in dataclasses.fields(config) if f.init and f.default is not dataclasses.MISSING]
    return {f.name for f in fields if getattr(config, f.name) != f.default}


STDLIB = "the Python standard library"


def _names(data: str) -> list[str]:
    """The texts that are scored each by itself.  ValueError: one is missing, or named twice."""
    names = data.split(",") if "," in data and not os.path.exists(data) else [data]
    if len(names) > 1 and "" in names:
        raise ValueError(f"--data: a name is missing between the commas of '{data}'")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--data: {twice[0]} is named twice")
    return names


def _read(name: str, config: EvalConfig, tok: Tokenizer) -> Tokens:
    """The tokens of one of the texts in --data."""
    if name and is_dataset(name):
        tokens = Dataset.open(name, tok).validation
    else:
        documents = Documents([name] if name else None, field=config.field, split_at=config.split_at)
        tokens = Tokens.encode(documents, tok)
        check_found(documents)
    if len(tokens) < 2:
        raise ValueError(f"--data: {name} has nothing to score: the first token follows nothing")
    return tokens


def _score_all(config: EvalConfig, model: Model, texts: dict[str, Tokens], T: int) -> dict[str, Scores]:
    """Every text's windows, with progress on the screen."""
    sizes = [min(len(data) - 1, config.max_tokens or len(data)) for data in texts.values()]
    scores, tokens, began = {}, 0, time.perf_counter()
    with Progress(console(stderr=True), unit="") as progress:
        for name, data in texts.items():

            def each(nats: np.ndarray, n: int, name: str = name) -> None:
                nonlocal tokens, began
                tokens, now = tokens + n, time.perf_counter()
                progress.update(printable(name), tokens / sum(sizes), float(nats.sum()) / n, n, now - began)
                began = now

            scores[name] = score(model, data, config.batch, T, max_tokens=config.max_tokens, each=each)
    return scores


def _plain(result: Evaluation) -> dict:
    values = result._asdict()
    return values | {"bytes": values.pop("n_bytes"), "perplexity": math.exp(result.loss) if result.loss < 700 else None}


def _show(results: dict[str, Evaluation]) -> None:
    screen, width = console(), max(map(len, results))
    for name, r in results.items():
        name = printable(name)
        error = "" if r.stderr is None else f" ± {r.stderr:.4f}"
        perplexity = f"{math.exp(r.loss):,.2f}" if r.loss < 700 else "beyond numbers"
        screen.print(
            f"{name:{width}}  {r.bits_per_byte:.4f}{error} bits per byte, {r.loss:.4f} nats per token, perplexity "
            f"{perplexity}; {r.tokens:,} tokens, {r.n_bytes:,} bytes",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

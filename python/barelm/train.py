"""`barelm train`: pretraining on next-token prediction.

A run is one folder: run.json (what was asked), step_N/ (checkpoints), log.jsonl, report.md, curve.svg.  Everything
that a run draws at random depends on its seed and its step alone, so a run that was stopped and resumed makes the same
bits as one that never stopped.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from . import _core, checkpoint
from .data.corpus import Corpus, TokenData, read_documents
from .engine import generate
from .evaluate import Evaluation, evaluate
from .loop import flops_per_token, step, warmup_cosine
from .model import Config, Model
from .report import Log, Progress, console, count, duration, printable, write_file, write_report
from .tokenizer import Tokenizer

__all__ = ["TrainConfig", "TrainResult", "main", "newest_checkpoint", "train"]

DEFAULT_STEPS = 1000
# What a resumed run may have otherwise than before: its length, and what it shows and keeps.  `data` and `tokenizer`
# are paths; what they lead to is compared by hash.
FREE = {
    "data",
    "tokenizer",
    "out",
    "resume",
    "json",
    "threads",
    "steps",
    "minutes",
    "eval_every",
    "save_every",
    "keep",
    "sample_every",
    "prompt",
}


@dataclass
class TrainConfig:
    """Train a GPT-2- or Llama-like model on next-token prediction.  Each field is a flag of `barelm train`."""

    data: Annotated[str, "text file, or folder of text files; left out: the Python standard library"] = ""
    tokenizer: Annotated[str, "'bytes', or a tokenizer.json, or a folder with one or with GPT-2's files"] = "bytes"
    preset: Annotated[str, "family of the model, gpt2 or llama; the sizes are the flags below"] = "gpt2"
    n_layer: Annotated[int, "blocks"] = 4
    n_head: Annotated[int, "query heads"] = 4
    n_kv_head: Annotated[int, "key/value heads; 0: as many as query heads"] = 0
    n_embd: Annotated[int, "channels"] = 256
    context: Annotated[int, "tokens the model sees at once"] = 256
    batch: Annotated[int, "windows in a micro-batch"] = 8
    accumulate: Annotated[int, "micro-batches in a step"] = 1
    steps: Annotated[int, f"steps of the whole run; 0: {DEFAULT_STEPS}, or as many as fit into --minutes"] = 0
    minutes: Annotated[float, "stop after so many minutes, the learning rate follows; 0: no limit"] = 0.0
    lr: Annotated[float, "highest learning rate"] = 1e-3
    min_lr: Annotated[float, "learning rate at the end"] = 1e-4
    warmup: Annotated[int, "steps over which the learning rate rises"] = 20
    weight_decay: Annotated[float, "AdamW's weight decay, on matrices"] = 0.1
    beta1: Annotated[float, "AdamW's memory of the gradient"] = 0.9
    beta2: Annotated[float, "AdamW's memory of its square"] = 0.95
    clip: Annotated[float, "largest norm of the gradient; 0: not clipped"] = 1.0
    seed: Annotated[int, "of the initial weights, the batches and the samples"] = 0
    precision: Annotated[Literal["fp32", "bf16"], "bf16 rounds the operands of matrix products"] = "fp32"
    eval_every: Annotated[int, "steps between evaluations; 0: only before and after"] = 250
    eval_batches: Annotated[int, "batches of held-out text in an evaluation; 0: all of it"] = 20
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 500
    keep: Annotated[int, "newest checkpoints to keep; 0: all"] = 2
    sample_every: Annotated[int, "steps between samples; 0: none"] = 0
    prompt: Annotated[str, "what the samples continue"] = "def "
    out: Annotated[str, "folder of the run"] = "runs/train"
    resume: Annotated[bool, "continue the run in --out from its newest good checkpoint"] = False
    threads: Annotated[int, "0: as many as the machine grants"] = 0
    json: Annotated[bool, "print the result as JSON on standard output, everything else on standard error"] = False
    # Which fields the user named (the command line says); None: all.  A resumed run compares only these with its own.
    given: frozenset[str] | None = field(default=None, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class TrainResult:
    out: str
    checkpoint: str
    step: int
    tokens: int  # trained on in the whole run
    seconds: float  # in the whole run
    tokens_per_second: float  # at the end
    n_params: int
    before: Evaluation
    after: Evaluation
    signal: int = 0  # the one that stopped the run


def main(config: TrainConfig) -> int:
    """Exit code: 0, or 128 + the signal that stopped the run."""
    result = train(config)
    if config.json:
        scores = {"before": result.before._asdict(), "after": result.after._asdict()}
        print(json.dumps(dataclasses.asdict(result) | scores))
    return 128 + result.signal if result.signal else 0


def train(config: TrainConfig, title: str = "Training run") -> TrainResult:
    """Run `barelm train`.  ValueError, OSError: what is asked cannot be done.  FloatingPointError: training broke."""
    screen = console(stderr=config.json)
    _check(config)
    if config.threads:
        _core.threads_set(config.threads)
    run = _resume(config, screen) if config.resume else _start(config)
    try:
        return _train(run, screen, title)
    finally:
        run.log.close()


# ---- a run --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the loop needs; `seconds` is the time that the run took in earlier processes."""

    config: TrainConfig
    folder: Path
    tok: Tokenizer
    model: Model
    corpus: Corpus
    train: TokenData
    validation: TokenData
    identity: dict  # hashes of what the run learns from; in every checkpoint
    log: Log
    seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    saved: int = -1  # the step of the last checkpoint

    @property
    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    @property
    def steps(self) -> float:
        """Steps of the whole run; infinite where only the time counts."""
        return self.config.steps or (math.inf if self.config.minutes else DEFAULT_STEPS)

    @property
    def done(self) -> float:
        """Share of the run that lies behind."""
        by_time = self.elapsed / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.model.step / self.steps, by_time))

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch * self.config.context * self.config.accumulate


def _start(config: TrainConfig) -> Run:
    folder = Path(config.out)
    if _checkpoints(folder):  # a run that died before its first checkpoint left nothing to continue: begin again
        raise ValueError(f"--out: {folder} already holds a run; --resume continues it, another --out begins a new one")
    tok = Tokenizer.bytes() if config.tokenizer == "bytes" else Tokenizer.load(config.tokenizer)
    corpus = read_documents(config.data or None)
    model = Model(_model_config(config, tok), seed=config.seed, precision=config.precision)
    identity = {"corpus": corpus.hash(), "tokenizer": tok.hash()}
    parts = _encode(corpus, tok, config)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(config, folder, tok, model, corpus, *parts, identity, Log(folder / "log.jsonl"))
    _write_run(run)
    return run


def _resume(config: TrainConfig, screen) -> Run:
    folder = Path(config.out)
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        old = TrainConfig(**before["config"])
    except FileNotFoundError:
        raise FileNotFoundError(f"--out: {folder} holds no run to resume (no run.json)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'run.json'}: not the description of a run ({error})") from None
    merged = _merge(old, config)
    _check(merged)
    say = partial(screen.print, markup=False, highlight=False, soft_wrap=True)
    model, tok, state, path = _load_newest(folder, merged.precision, say)
    corpus = read_documents(merged.data or None)
    identity = {"corpus": corpus.hash(), "tokenizer": tok.hash()}
    for name, flag in (("corpus", "--data"), ("tokenizer", "--tokenizer")):
        if identity[name] != state["identity"][name]:
            raise ValueError(
                f"{flag}: the {name} is not the one of the run in {folder} (sha256 {identity[name][:12]} "
                f"instead of {state['identity'][name][:12]})"
            )
    log = Log(folder / "log.jsonl", resume=model.step)
    run = Run(merged, folder, tok, model, corpus, *_encode(corpus, tok, merged), identity, log, state["seconds"])
    run.saved = model.step
    _write_run(run)
    say(f"resumed   {path}")
    return run


def _merge(old: TrainConfig, new: TrainConfig) -> TrainConfig:
    """The old run's config with what may change taken from the new one.  ValueError: what may not change does."""
    given = {f.name for f in dataclasses.fields(new) if f.init} if new.given is None else new.given
    for name in sorted(given - FREE):
        if getattr(new, name) != getattr(old, name):
            raise ValueError(
                f"{_flag(name)}: {getattr(new, name)} contradicts the run in {new.out}, which has {getattr(old, name)}"
            )
    return dataclasses.replace(old, **{name: getattr(new, name) for name in (given & FREE) | {"out", "resume"}})


def _encode(corpus: Corpus, tok: Tokenizer, config: TrainConfig) -> tuple[TokenData, TokenData]:
    parts = [TokenData.encode(documents, tok) for documents in corpus.split()]
    parts[0].check(config.context, "training text")
    parts[1].check(1, "held-out text")
    return parts[0], parts[1]


def _model_config(config: TrainConfig, tok: Tokenizer) -> Config:
    return Config.preset(
        config.preset,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_kv_head=config.n_kv_head or None,
        n_inner=None,
        vocab_size=tok.n_vocab,
        context=config.context,
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(config: TrainConfig) -> None:
    """ValueError naming the flag whose value is out of range."""
    positive = ("n_layer", "n_head", "n_embd", "context", "batch", "accumulate", "lr")
    not_negative = (
        "n_kv_head",
        "steps",
        "minutes",
        "min_lr",
        "warmup",
        "weight_decay",
        "clip",
        "seed",
        "eval_every",
        "eval_batches",
        "save_every",
        "keep",
        "sample_every",
        "threads",
    )
    for name in (*positive, *not_negative):
        value = getattr(config, name)
        if not (value > 0 if name in positive else value >= 0) or not math.isfinite(value):
            raise ValueError(f"{_flag(name)}: must be {'above 0' if name in positive else '0 or more'}, got {value}")
        if type(value) is int and value >= 2**31:
            raise ValueError(f"{_flag(name)}: {value} is too large")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{_flag(name)}: must be in [0, 1), got {getattr(config, name)}")
    if config.precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision: must be fp32 or bf16, got {config.precision}")
    if config.min_lr > config.lr:
        raise ValueError(f"--min-lr: {config.min_lr} is above --lr {config.lr}")
    if config.n_embd % config.n_head:
        raise ValueError(f"--n-head: {config.n_head} heads do not divide --n-embd {config.n_embd}")
    if config.n_kv_head and config.n_head % config.n_kv_head:
        raise ValueError(f"--n-kv-head: {config.n_kv_head} does not divide --n-head {config.n_head}")


# ---- checkpoints --------------------------------------------------------------------------------------------------


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
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
    found = _checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder}: neither a checkpoint (no config.json) nor a run (no step_N)")
    return found[0][1]


def _load_newest(folder: Path, precision: str, say) -> tuple[Model, Tokenizer, dict, Path]:
    """The newest checkpoint that is whole; one that is not is named and passed over."""
    for number, path in _checkpoints(folder):
        try:
            state = checkpoint.verify(path).get("train")
            if not isinstance(state, dict):
                raise ValueError("no state.json, or not one of a run")
            model, tok = Model.load(path, precision=precision), Tokenizer.load(path)
            if model.step != number:
                raise ValueError(f"it is of step {model.step}")
            return model, tok, state, path
        except (ValueError, OSError) as error:
            say(f"refused   {path}: {error}")
    raise ValueError(f"--out: {folder} has no checkpoint that can be resumed")


def _save(run: Run) -> Path:
    """Write step_N, whole or not at all; nothing to do where it is written already."""
    path = run.folder / f"step_{run.model.step}"
    if run.saved == run.model.step:
        return path
    run.log.sync()  # a checkpoint never knows more than the log beside it
    shutil.rmtree(path, ignore_errors=True)  # one that was refused as torn may lie there
    state = {"identity": run.identity, "seconds": run.elapsed, "config": _asdict(run.config)}
    checkpoint.save(run.model, path, state={"train": state}, files={"tokenizer.json": run.tok.to_json().encode()})
    run.saved = run.model.step
    _prune(run)
    return path


def _prune(run: Run) -> None:
    """Remove old checkpoints.  Later ones than ours were refused as torn: they neither count nor are touched."""
    ours = [path for number, path in _checkpoints(run.folder) if number <= run.model.step]
    for old in ours[run.config.keep :] if run.config.keep else ():
        shutil.rmtree(old, ignore_errors=True)


def _asdict(config: TrainConfig) -> dict:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def _write_run(run: Run) -> None:
    description = {
        "barelm": _core.version(),
        "config": _asdict(run.config),
        "model": run.model.config.to_dict(),
        "n_params": run.model.n_params,
        "identity": run.identity,
        "source": run.corpus.source,
    }
    write_file(run.folder / "run.json", json.dumps(description, indent=1) + "\n")


# ---- the loop -----------------------------------------------------------------------------------------------------


class _Stop:
    """Set by a signal; a second one interrupts at once."""

    signal = 0

    def __call__(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def _catch_signals() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM only leave a note, so that the step that runs is finished and saved."""
    stop, old = _Stop(), {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _train(run: Run, screen, title: str) -> TrainResult:
    peak = _core.peak_flops(run.config.precision, seconds=0.2)
    flops = flops_per_token(run.model.config, run.config.context)
    facts = _facts(run, flops)
    for name, value in facts.items():
        screen.print(f"{name:9} {value}", markup=False, highlight=False, soft_wrap=True)
    _warn_of_memory(run, screen)
    with _catch_signals() as stop, Progress(screen, flops, peak, run.done) as progress:
        if not run.log.column("bits_per_byte"):
            _evaluate(run, progress)
        while run.done < 1 and not stop.signal:
            _one_step(run, progress)
            _chores(run, progress)
        if not stop.signal and run.log.column("bits_per_byte")[-1][0] != run.model.step:
            _evaluate(run, progress)
        path = _save(run)
    result = _result(run, path, progress, stop.signal)
    _finish(run, screen, title, facts, result, progress)
    return result


def _one_step(run: Run, progress: Progress) -> None:
    config, number, began = run.config, run.model.step, time.perf_counter()
    lr = warmup_cosine(number, config.lr, config.min_lr, config.warmup, run.done)
    batches = [
        run.train.batch(number, micro, config.batch, config.context, config.seed) for micro in range(config.accumulate)
    ]
    try:
        loss, norm, tokens = step(
            run.model,
            batches,
            lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            clip=config.clip,
        )
    except FloatingPointError as error:
        newest = _checkpoints(run.folder)
        good = f"the newest checkpoint is {newest[0][1]}" if newest else "there is no checkpoint yet"
        raise FloatingPointError(
            f"step {number + 1}: {error} at learning rate {lr:.3g}; {good}; try a lower --lr, "
            "a longer --warmup or a lower --clip"
        ) from None
    seconds = time.perf_counter() - began
    of = f"/{run.steps:,}" if run.steps < math.inf else ""
    progress.update(f"{run.model.step:,}{of}", run.done, loss, tokens, seconds)
    run.log.write(
        run.model.step,
        loss=loss,
        norm=norm,
        lr=lr,
        tokens_per_second=round(tokens / seconds, 1),
        seconds=round(run.elapsed, 3),
    )


def _chores(run: Run, progress: Progress) -> None:
    """What is due after a step."""
    config, number = run.config, run.model.step
    if config.eval_every and number % config.eval_every == 0:
        _evaluate(run, progress)
    if config.sample_every and number % config.sample_every == 0:
        _sample(run, progress)
    if config.save_every and number % config.save_every == 0:
        _save(run)


def _evaluate(run: Run, progress: Progress) -> Evaluation:
    config = run.config
    result = evaluate(run.model, run.validation, config.batch, config.context, config.eval_batches or None)
    run.log.write(
        run.model.step,
        val_loss=result.loss,
        bits_per_byte=result.bits_per_byte,
        val_tokens=result.tokens,
        val_bytes=result.n_bytes,
    )
    progress.say(f"step {run.model.step:,}  held-out text: {result.bits_per_byte:.3f} bits per byte")
    return result


def _sample(run: Run, progress: Progress) -> None:
    prompt = run.config.prompt
    text = "".join(generate(run.model, run.tok, prompt, max_tokens=100, temperature=0.8, seed=run.config.seed))
    run.log.write(run.model.step, prompt=prompt, sample=text)
    progress.say(f"step {run.model.step:,}  sample:\n{printable(prompt + text)}\n")


# ---- what is told -------------------------------------------------------------------------------------------------


def _facts(run: Run, flops: float) -> dict[str, str]:
    config, model, corpus = run.config, run.model, run.corpus
    memory = model.memory(config.batch, config.context)
    counted = ((corpus.repaired, "not valid UTF-8"), (corpus.skipped, "files skipped"))
    notes = [f"{n} {what}" for n, what in counted if n]
    length = f"{run.steps:,} steps" if run.steps < math.inf else f"{config.minutes:g} minutes"
    return {
        "barelm": f"{_core.version()}, {_core.isa()}, {_core.threads_get()} threads, {config.precision}",
        "model": f"{config.preset}: {config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, context "
        f"{config.context}, {model.config.vocab_size:,} ids: {count(model.n_params)} parameters",
        "data": ", ".join(
            [
                f"{corpus.source}: {len(corpus):,} documents, {count(corpus.n_bytes, 'B')}",
                *notes,
                f"sha256 {run.identity['corpus'][:12]}",
            ]
        ),
        "tokens": f"{count(len(run.train))} to train on, {count(len(run.validation))} held out",
        "memory": ", ".join(f"{purpose} {count(size, 'B')}" for purpose, size in memory.items())
        + f": {count(sum(memory.values()), 'B')}",
        "plan": f"{length} of {run.tokens_per_step:,} tokens, {count(flops, 'FLOP')} a token",
    }


def _warn_of_memory(run: Run, screen) -> None:
    needed = sum(run.model.memory(run.config.batch, run.config.context).values())
    free = _core.memory_available()
    if needed > free:
        screen.print(
            f"warning   {count(needed, 'B')} are needed in all, {count(free, 'B')} are free: a lower --batch "
            "or --context needs less",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _result(run: Run, path: Path, progress: Progress, number: int) -> TrainResult:
    scores = [
        Evaluation(r["bits_per_byte"], r["val_loss"], r["val_tokens"], r["val_bytes"])
        for r in run.log.records
        if "bits_per_byte" in r
    ]
    return TrainResult(
        str(run.folder),
        str(path),
        run.model.step,
        run.model.step * run.tokens_per_step,
        run.elapsed,
        progress.tokens_per_second,
        run.model.n_params,
        scores[0],
        scores[-1],
        number,
    )


def _finish(run: Run, screen, title: str, facts: dict[str, str], result: TrainResult, progress: Progress) -> None:
    mfu = f", {progress.mfu:.0%} of peak" if progress.mfu else ""
    speed = (
        f"{result.tokens_per_second:,.0f} tokens/s{mfu}"
        if result.tokens_per_second
        else "no steps since it was resumed"
    )
    trained = f"{result.step:,} steps, {count(result.tokens)} tokens in {duration(result.seconds)} ({speed})"
    score = f"{result.before.bits_per_byte:.3f} -> {result.after.bits_per_byte:.3f} bits per byte of held-out text"
    facts = {**facts, "trained": trained, "score": score, "checkpoint": Path(result.checkpoint).name}
    goes_on = f"barelm train --resume --out {run.folder}"
    write_report(
        run.folder,
        title,
        facts,
        run.log,
        f"`barelm sample --checkpoint {run.folder}` writes more; `{goes_on}` goes on.",
    )
    lines = [
        f"trained   {trained}",
        f"score     {score}",
        f"saved     {result.checkpoint}",
        f"report    {run.folder / 'report.md'}",
    ]
    if result.signal:
        lines = [f"stopped   by {signal.Signals(result.signal).name}", *lines, f"continue  {goes_on}"]
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)

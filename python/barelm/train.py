"""`barelm train`: next-token prediction, from the beginning or from where another model has come to (--init).

A run is one folder (runs.py).  Everything that a run draws at random depends on its seed and its step alone, and all
that it learned from what came before - weights, moments, the guard's window - is in its checkpoints; so a run that was
stopped at any instant and resumed on the same device makes the same bits as one that never stopped.
"""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import _core, initial, runs
from .convert.source import Source
from .data.documents import Documents
from .data.shards import Dataset, is_dataset, write_dataset
from .data.tokens import document_starts
from .engine import generate
from .evaluate import Evaluation, evaluate
from .guard import Guard
from .loop import StepResult, flops_per_token, schedule, step
from .model import Model
from .profile import Line, Profile
from .report import Board, Log, Progress, Reading, console, count, duration, printable, write_report
from .settings import TrainConfig, check, fields, lora_of, merge, model_of, settle
from .tokenizer import Tokenizer

__all__ = ["TrainConfig", "TrainResult", "main", "train"]

OWN_DATA = "data"  # in a run's folder: the tokens it made of text


@dataclass(frozen=True)
class TrainResult:
    out: str
    checkpoint: str
    step: int
    tokens: int  # trained on in the whole run
    seconds: float  # in the whole run
    tokens_per_second: float  # at the end
    n_params: int
    skipped: int  # steps that the guard skipped
    before: Evaluation
    after: Evaluation
    init: str = ""  # the model that was fine-tuned; "": none
    signal: int = 0  # the one that stopped the run
    profile: list[Line] = dataclasses.field(default_factory=list)  # where the time of a step went, if that was asked


def main(config: TrainConfig) -> int:
    """Exit code: 0, or 128 + the signal that stopped the run."""
    result = train(config)
    if config.json:
        scores = {"before": result.before._asdict(), "after": result.after._asdict()}
        print(json.dumps(dataclasses.asdict(result) | scores))
    return 128 + result.signal if result.signal else 0


def train(config: TrainConfig, title: str = "") -> TrainResult:
    """Run `barelm train`.  ValueError, OSError: what is asked cannot be done.  FloatingPointError: training broke."""
    screen = console(stderr=config.json)
    check(config)
    if config.threads:
        _core.threads_set(config.threads)
    profile = Profile() if config.profile else None  # before the model, whose operators it times
    run = _resume(config, screen) if config.resume else _start(config, screen)
    run.profile = profile
    try:
        return _train(run, screen, title)
    finally:
        run.close()


# ---- a run --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the loop needs.  `step` counts the steps of the run; the model's own counts updates, without the skipped.
    `seconds` is the time that the run took in earlier processes."""

    config: TrainConfig  # settled: nothing is left to a preset or to the depth
    folder: Path
    model: Model
    tok: Tokenizer
    dataset: Dataset
    log: Log  # what follows from data and seed: the same bytes however often the run was stopped
    speed: Log  # what the clock said
    guard: Guard
    init: dict[str, str] | None = None  # what a fine-tuning run was begun with
    step: int = 0
    seconds: float = 0.0
    began: float = dataclasses.field(default_factory=time.perf_counter)
    saved: int = -1  # the step of the last checkpoint
    board: Board | None = None
    profile: Profile | None = None

    @property
    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    @property
    def steps(self) -> float:
        """Steps of the whole run; infinite where only the time counts."""
        return self.config.steps or math.inf

    @property
    def done(self) -> float:
        """Share of the run that lies behind.  On a slow machine time may be up before the first step: it is made."""
        by_time = self.elapsed / (60 * self.config.minutes) if self.config.minutes and self.step else 0.0
        return min(1.0, max(self.step / self.steps, by_time))

    @property
    def micro_batches(self) -> int:
        """In a step."""
        return self.config.tokens_per_step // (self.config.batch * self.config.context)

    @property
    def best(self) -> int | None:
        """The step of the best evaluation so far, the untrained model's left out."""
        scores = [(value, number) for number, value in self.log.column("val_loss") if number]
        return min(scores)[1] if scores else None

    def write(self, **values: object) -> None:
        """A record of the log, and of TensorBoard's."""
        self.log.write(self.step, **values)
        if self.board:
            self.board.write(self.step, values)

    def close(self) -> None:
        for log in (self.log, self.speed, self.board):
            if log:
                log.close()


def _start(config: TrainConfig, screen) -> Run:
    folder = Path(config.out)
    if runs.checkpoints(folder):  # a run that died before its first checkpoint left nothing to continue: begin again
        raise ValueError(f"--out: {folder} already holds a run; --resume continues it, another --out begins a new one")
    source = runs.open_model(config.init) if config.init else None
    tok = None if config.tokenizer == "bytes" else Tokenizer.load(config.tokenizer)
    if source is not None:
        is_named = config.given is not None and "tokenizer" in config.given
        tok = initial.vocabulary(source, Tokenizer.bytes() if tok is None and is_named else tok)
    if config.data and is_dataset(config.data):
        dataset = Dataset.open(config.data, tok)
    else:
        tok = tok or Tokenizer.bytes()
        settle(config, tok.n_vocab, source and source.config)  # what cannot be is said before the text is read
        documents = Documents(config.data, field=config.field, split_at=config.split_at)
        split = dict(val_fraction=config.val_fraction, seed=config.seed)
        with Reading(screen) as reading:
            dataset = write_dataset(documents, tok, folder / OWN_DATA, **split, progress=reading)
    dataset.tok.end_at(tok.ends if tok else ())  # of which a dataset says nothing
    return _begin(config, folder, dataset, source)


def _begin(
    config: TrainConfig, folder: Path, dataset: Dataset, source: Source | None, before: dict[str, str] | None = None
) -> Run:
    """A run from its first step, on data that is there.  `before`: what it was begun with when it died at once."""
    config = settle(config, dataset.tok.n_vocab, source and source.config, len(dataset.train))
    _check_data(dataset, config)
    model = _first_model(config, dataset.tok, source)
    init = initial.begun_with(str(source.path), model) if source else None
    if init and before:
        initial.check_unchanged(init, before)
    folder.mkdir(parents=True, exist_ok=True)
    if init and not (folder / OWN_DATA).is_dir():
        dataset.tok.save(folder)  # shards may not say whose ids they hold, and the folder of --init may go
    run = _open(config, folder, model, dataset, init=init)
    _describe(run)
    return run


def _first_model(config: TrainConfig, tok: Tokenizer, source: Source | None) -> Model:
    """The model before its first step: a new one, or that of --init."""
    if source is not None:
        return initial.make(source, lora_of(config), config.seed, weights=config.weights, **_where(config))
    return Model(model_of(config, tok.n_vocab), seed=config.seed, **_where(config))


def _where(config: TrainConfig) -> dict[str, str]:
    """How and where the model computes."""
    return {"precision": config.precision, "device": config.device}


def _open(
    config: TrainConfig,
    folder: Path,
    model: Model,
    dataset: Dataset,
    state: dict | None = None,
    init: dict[str, str] | None = None,
) -> Run:
    """A run with its logs; `state`: that of the checkpoint it resumes from."""
    step, mark = (state["step"], state["log"]) if state else (None, None)
    logs = Log(folder / "log.jsonl", step, mark), Log(folder / "speed.jsonl", step)
    run = Run(config, folder, model, dataset.tok, dataset, *logs, Guard(config.guard, patience=config.guard_stop))
    run.init = init
    if state:
        run.guard.restore(state["guard"])
        run.step = run.saved = state["step"]
        run.seconds = state["seconds"]
    run.board = Board.open(folder / "tensorboard", run.step) if config.tensorboard else None
    return run


def _resume(config: TrainConfig, screen) -> Run:
    folder = Path(config.out)
    old, init, ends = _read_description(folder)
    may_move = {"data"} if not (folder / OWN_DATA).is_dir() else set()  # the user's shards, an adapter's model
    merged = merge(old, config, may_move | ({"init"} if old.lora_rank else set()))
    check(merged)
    say = partial(screen.print, markup=False, highlight=False, soft_wrap=True)
    dataset = _open_data(folder, merged)
    base = runs.newest_checkpoint(merged.init) if merged.lora_rank else None
    options = dict(weights=merged.weights, base=base, **_where(merged))
    found = runs.load_newest(folder, dataset.identity, say, **options)
    if found is None:
        say(f"resumed   {folder}: it has no checkpoint yet, it begins again")
        source = runs.open_model(merged.init) if merged.init else None
        dataset.tok.end_at(ends)
        return _begin(merged, folder, dataset, source, init)
    model, tok, state, path = found
    dataset.tok.end_at(tok.ends)
    if model.adapter and init:
        initial.check_unchanged(initial.begun_with(model.source, model), init)
    run = _open(merged, folder, model, dataset, state, init)
    _describe(run)
    say(f"resumed   {path}")
    return run


def _read_description(folder: Path) -> tuple[TrainConfig, dict[str, str] | None, list[int]]:
    """What a run was asked, what it was begun with where it fine-tunes, and where its texts end."""
    description = runs.read_description(folder)
    try:
        init = description.get("init")
        init = {name: str(init[name]) for name in ("folder", "sha256")} if init else None
        ends = list(description.get("ends", ()))  # what an earlier barelm began says nothing of them
        return TrainConfig(**description["config"]), init, ends
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'run.json'}: not the description of a run ({error})") from None


def _open_data(folder: Path, config: TrainConfig) -> Dataset:
    """The tokens of a run that was there before: its own, or the shards it was begun with."""
    if (folder / OWN_DATA).is_dir():
        return Dataset.open(folder / OWN_DATA)
    tok = folder if config.init else config.tokenizer
    return Dataset.open(config.data, None if tok == "bytes" else Tokenizer.load(tok))


def _check_data(dataset: Dataset, config: TrainConfig) -> None:
    dataset.train.check(config.context, "training text")
    dataset.validation.check(1, "held-out text")


def _describe(run: Run) -> None:
    runs.write_description(
        run.folder,
        {
            "barelm": _core.version(),
            "config": fields(run.config),
            "model": run.model.config.to_dict(),
            "n_params": run.model.n_params,
            "identity": run.dataset.identity,
            "data": run.dataset.summary,
            "ends": sorted(run.tok.ends),
        }
        | ({"init": run.init} if run.init else {}),
    )


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
    on_cpu = run.config.device == "cpu"
    peak = _core.peak_flops(run.config.precision, seconds=0.2) if on_cpu else None
    flops = flops_per_token(run.model.config, run.config.context, run.model.adapter)
    facts = _facts(run, flops)
    for name, value in facts.items():
        screen.print(f"{name:9} {value}", markup=False, highlight=False, soft_wrap=True)
    if on_cpu:
        _warn_of_memory(run, screen)
    with _catch_signals() as stop, Progress(screen, flops, peak, run.done) as progress:
        if not run.log.column("bits_per_byte"):
            _evaluate(run, progress)
        while run.done < 1 and not stop.signal:
            _one_step(run, progress)
            _chores(run, progress)
        if not stop.signal and run.log.column("bits_per_byte")[-1][0] != run.step:
            _evaluate(run, progress)
        path = _save(run)
    result = _result(run, path, progress, stop.signal)
    _finish(run, screen, title or ("Fine-tuning run" if run.init else "Training run"), facts, result, progress)
    if run.profile:
        screen.print(run.profile.table(peak), markup=False, highlight=False, soft_wrap=True)
    return result


def _one_step(run: Run, progress: Progress) -> None:
    config, began = run.config, time.perf_counter()
    lr = schedule(
        run.step, run.done, config.lr, kind=config.schedule, warmup=config.warmup, end=config.lr_end, decay=config.decay
    )
    try:
        with run.profile.step() if run.profile else nullcontext():
            result = step(
                run.model,
                [_micro_batch(run, micro) for micro in range(run.micro_batches)],
                lr,
                betas=(config.beta1, config.beta2),
                weight_decay=config.weight_decay,
                clip=config.clip,
                guard=run.guard,
            )
    except FloatingPointError as error:
        raise FloatingPointError(
            f"step {run.step + 1}: {error}, at learning rate {lr:.3g}; {runs.last_good(run.folder)}; try a lower --lr, "
            "a longer --warmup or a lower --clip"
        ) from None
    run.step += 1
    _record(run, progress, result, lr, time.perf_counter() - began)


def _micro_batch(run: Run, micro: int):
    config = run.config
    tokens, targets = run.dataset.train.batch(
        run.step, micro, config.batch, config.context, config.seed, config.order, run.micro_batches
    )
    return (tokens, targets, document_starts(tokens, run.tok.bos)) if config.within else (tokens, targets)


def _record(run: Run, progress: Progress, result: StepResult, lr: float, seconds: float) -> None:
    finite = {name: value for name in ("loss", "norm") if math.isfinite(value := getattr(result, name))}
    run.write(**finite, lr=lr, **({"skipped": result.skipped} if result.skipped else {}))
    run.speed.write(
        run.step,
        tokens_per_second=round(result.tokens / seconds, 1),
        step_seconds=round(seconds, 6),
        seconds=round(run.elapsed, 3),
    )
    of = f"/{run.steps:,}" if run.steps < math.inf else ""
    progress.update(f"{run.step:,}{of}", run.done, result.loss, result.tokens, seconds)
    if result.skipped:
        progress.say(f"step {run.step:,}  skipped: {result.skipped}")


def _chores(run: Run, progress: Progress) -> None:
    """What is due after a step."""
    config = run.config
    if config.eval_every and run.step % config.eval_every == 0:
        _evaluate(run, progress)
        if config.keep_best and run.best == run.step:
            _save(run)
    if config.sample_every and run.step % config.sample_every == 0:
        _sample(run, progress)
    if config.save_every and run.step % config.save_every == 0:
        _save(run)


def _evaluate(run: Run, progress: Progress) -> Evaluation:
    config = run.config
    result = evaluate(run.model, run.dataset.validation, config.batch, config.context, config.eval_batches or None)
    run.write(
        val_loss=result.loss,
        bits_per_byte=result.bits_per_byte,
        stderr=result.stderr,
        val_tokens=result.tokens,
        val_bytes=result.n_bytes,
    )
    progress.say(f"step {run.step:,}  held-out text: {result.bits_per_byte:.3f} bits per byte")
    return result


def _sample(run: Run, progress: Progress) -> None:
    prompt = run.config.prompt
    text = "".join(generate(run.model, run.tok, prompt, max_tokens=100, temperature=0.8, seed=run.config.seed))
    run.write(prompt=prompt, sample=text)
    progress.say(f"step {run.step:,}  sample:\n{printable(prompt + text)}\n")


def _save(run: Run) -> Path:
    """Write step_N, whole or not at all; nothing to do where it is written already."""
    path = run.folder / f"step_{run.step}"
    if run.saved == run.step:
        return path
    state = {
        "identity": run.dataset.identity,
        "seconds": run.elapsed,
        "guard": run.guard.state(),
        "config": fields(run.config),
    }
    path = runs.save(run.folder, run.model, run.tok, run.step, state, run.log)
    run.saved = run.step
    runs.prune(run.folder, run.config.keep, run.step, run.best if run.config.keep_best else None)
    return path


# ---- what is told -------------------------------------------------------------------------------------------------


def _facts(run: Run, flops: float) -> dict[str, str]:
    config, model, dataset = run.config, run.model, run.dataset
    memory = model.memory(config.batch, config.context)
    length = f"{run.steps:,} steps" if run.steps < math.inf else f"{config.minutes:g} minutes"
    from_init = {"init": f"{run.init['folder']}, its weights' sha256 {run.init['sha256'][:12]}"} if run.init else {}
    return {
        "barelm": f"{_core.version()}, {_place(config.device)}, {config.precision}",
        **from_init,
        "model": f"{_form(run)}: {model.config.n_layer} layers, {model.config.n_head} heads, "
        f"{model.config.n_embd} channels, context {config.context}, {model.config.vocab_size:,} ids: "
        f"{count(model.n_params)} parameters",
        **({"adapter": _adapter_fact(model)} if model.adapter else {}),
        "data": _data_fact(dataset),
        "tokens": f"{count(len(dataset.train))} to train on, {count(len(dataset.validation))} held out",
        "memory": ", ".join(f"{purpose} {count(size, 'B')}" for purpose, size in memory.items())
        + f": {count(sum(memory.values()), 'B')}",
        "plan": f"{length} of {config.tokens_per_step:,} tokens ({run.micro_batches} x {config.batch} x "
        f"{config.context}), {count(flops, 'FLOP')} a token, learning rate {config.lr:g}",
    }


def _place(device: str) -> str:
    return f"{_core.isa()}, {_core.threads_get()} threads" if device == "cpu" else device


def _adapter_fact(model: Model) -> str:
    lora = model.adapter
    modules = [module.rpartition(".")[2] for module in lora.modules(model.config)]
    return (
        f"LoRA of rank {lora.rank} on {', '.join(dict.fromkeys(modules))}: {count(lora.size(model.config))} values "
        f"are trained, the weights stay, in {model.weights}"
    )


def _form(run: Run) -> str:
    if run.init:
        return "gpt2" if run.model.config.norm == "layernorm" else "llama"
    return run.config.preset or run.config.family


def _data_fact(dataset: Dataset) -> str:
    summary = dataset.summary
    parts = [f"{summary['source']}: {summary['documents']:,} documents, {count(summary['bytes'], 'B')}"]
    for name, what in (("refused", "refused"), ("not_utf8", "not valid UTF-8"), ("empty", "empty")):
        parts += [f"{summary[name]:,} {what}"] if summary[name] else []
    return ", ".join([*parts, f"sha256 {dataset.identity['corpus'][:12]}"])


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
        Evaluation(r["bits_per_byte"], r["val_loss"], r["val_tokens"], r["val_bytes"], r["stderr"])
        for r in run.log.records
        if "bits_per_byte" in r
    ]
    return TrainResult(
        str(run.folder),
        str(path),
        run.step,
        run.step * run.config.tokens_per_step,
        run.elapsed,
        progress.tokens_per_second,
        run.model.n_params,
        len(run.log.column("skipped")),
        scores[0],
        scores[-1],
        run.init["folder"] if run.init else "",
        number,
        run.profile.lines() if run.profile else [],
    )


def _finish(run: Run, screen, title: str, facts: dict[str, str], result: TrainResult, progress: Progress) -> None:
    mfu = f", {progress.mfu:.0%} of peak" if progress.mfu else ""
    speed = (
        f"{result.tokens_per_second:,.0f} tokens/s{mfu}"
        if result.tokens_per_second
        else "no steps since it was resumed"
    )
    skipped = f", {result.skipped:,} of them skipped" if result.skipped else ""
    trained = f"{result.step:,} steps{skipped}, {count(result.tokens)} tokens in {duration(result.seconds)} ({speed})"
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

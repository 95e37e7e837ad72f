"""What a run of `barelm train` is asked: its flags, what follows from those left out, and what may change on resume."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

from .loop import SCHEDULES
from .lora import Lora
from .model import Config, open_device
from .recipe import FAMILIES, FINE_TUNING, model_config, pace

__all__ = [
    "TrainConfig",
    "check",
    "check_device",
    "check_lora",
    "fields",
    "flag",
    "lora_of",
    "merge",
    "model_of",
    "settle",
]

# What a resumed run may have otherwise than before: its length, when it stops, and what it shows and keeps.
FREE = {
    "out",
    "resume",
    "json",
    "device",
    "threads",
    "steps",
    "minutes",
    "guard",
    "guard_stop",
    "eval_every",
    "save_every",
    "keep",
    "keep_best",
    "sample_every",
    "prompt",
    "tensorboard",
    "profile",
}
SMALL_PACE = dict(batch=8, steps=1000, lr=1e-3, warmup=20)  # for a model without preset or depth
MICRO_BATCH = 4096  # tokens of a micro-batch where --batch is left to a preset, to the depth or to --init
OF_THE_MODEL = ("preset", "depth", "family", "n_layer", "n_head", "n_kv_head", "n_embd")  # --init has its own


@dataclass
class TrainConfig:
    """Train a GPT-2- or Llama-like model on next-token prediction, from the beginning or (--init) from where another
    has come to.  Each field is a flag of `barelm train`."""

    data: Annotated[
        str, "text, .jsonl, .parquet, .gz, .zst: file, folder, pattern, -; or shards; left out: Python's own library"
    ] = ""
    field: Annotated[str, "the field of JSONL lines, or the column of parquet, that holds the text"] = "text"
    split_at: Annotated[str, "what stands between the documents of a text file, such as <|endoftext|>"] = ""
    val_fraction: Annotated[float, "share of the documents that is held out"] = 0.1
    tokenizer: Annotated[
        str, "'bytes', or a tokenizer.json, or a folder with one or with GPT-2's files; a model of --init has its own"
    ] = "bytes"
    init: Annotated[
        str, "model to fine-tune: the folder of a checkpoint, of a run, or as Hugging Face's; left out: a new model"
    ] = ""
    lora_rank: Annotated[
        int, "with --init: train an adapter of this rank, the model's own weights stay; 0: all of it"
    ] = 0
    lora_alpha: Annotated[float, "its products are scaled by alpha / rank; 0: twice the rank"] = 0.0
    lora_targets: Annotated[
        str, "linear layers that have one, with commas: q_proj,v_proj ..., c_attn ...; all-linear: each"
    ] = "all-linear"
    weights: Annotated[
        Literal["fp32", "bf16", "int8"], "with --lora-rank: how the model's own weights are held in memory"
    ] = "fp32"
    preset: Annotated[str, "a known size: gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama, llama-3.2-1b ..."] = ""
    depth: Annotated[int, "one dial for sizes, batch, learning rate and length: layers; 12 is GPT-2 124M"] = 0
    family: Annotated[Literal[FAMILIES], "form of the model where there is no preset"] = "gpt2"
    n_layer: Annotated[int, "blocks; this and what is 0 below: as preset or depth say, or a small model's"] = 0
    n_head: Annotated[int, "query heads"] = 0
    n_kv_head: Annotated[int, "key/value heads"] = 0
    n_embd: Annotated[int, "channels"] = 0
    context: Annotated[
        int, "tokens the model sees at once; with --init: of a window, at most as many as it can see"
    ] = 0
    batch: Annotated[int, "windows in a micro-batch"] = 0
    tokens_per_step: Annotated[int, "tokens of a step, in as many micro-batches as it takes; 0: by the size"] = 0
    steps: Annotated[int, "steps of the whole run; 0: as many as fit into --minutes, or by the size"] = 0
    minutes: Annotated[float, "stop after so many minutes, the learning rate follows; 0: no limit"] = 0.0
    lr: Annotated[float, "highest learning rate; 0: by the size"] = 0.0
    warmup: Annotated[int, "steps over which the learning rate rises; 0: by the length, 1: none"] = 0
    schedule: Annotated[Literal[tuple(SCHEDULES)], "wsd: warm-up, stable, and a straight decay at the end"] = "cosine"
    lr_end: Annotated[float, "share of --lr that is left at the end"] = 0.1
    decay: Annotated[float, "share of the run over which wsd decays"] = 0.2
    weight_decay: Annotated[float, "AdamW's weight decay: on matrices and embeddings, never on vectors"] = 0.1
    beta1: Annotated[float, "AdamW's memory of the gradient"] = 0.9
    beta2: Annotated[float, "AdamW's memory of its square"] = 0.95
    clip: Annotated[float, "largest norm of the gradient; 0: not clipped"] = 1.0
    guard: Annotated[float, "skip steps with a loss or norm so many deviations too high; 0: only not finite"] = 8.0
    guard_stop: Annotated[int, "skipped steps in a row after which the run stops"] = 10
    order: Annotated[Literal["random", "sequential"], "windows anywhere in the text, or in its order"] = "random"
    within: Annotated[bool, "attention stays within a document"] = False
    seed: Annotated[int, "of the split, the initial weights, the batches and the samples"] = 0
    precision: Annotated[Literal["fp32", "bf16"], "bf16 rounds the operands of matrix products"] = "fp32"
    eval_every: Annotated[int, "steps between evaluations; 0: only before and after"] = 250
    eval_batches: Annotated[int, "batches of held-out text in an evaluation; 0: all of it"] = 20
    save_every: Annotated[int, "steps between checkpoints; 0: only at the end"] = 500
    keep: Annotated[int, "newest checkpoints to keep; 0: all"] = 2
    keep_best: Annotated[bool, "save after each evaluation that is the best so far, and keep the best one"] = False
    sample_every: Annotated[int, "steps between samples; 0: none"] = 0
    prompt: Annotated[str, "what the samples continue"] = "def "
    tensorboard: Annotated[bool, "write TensorBoard's files too, where that package is installed"] = True
    profile: Annotated[bool, "say at the end where the time of a step went, by operator and size"] = False
    out: Annotated[str, "folder of the run"] = "runs/train"
    resume: Annotated[bool, "continue the run in --out from its newest good checkpoint"] = False
    device: Annotated[str, "where the model is: cpu, or a GPU: cuda, cuda:1"] = "cpu"
    threads: Annotated[int, "0: as many as the machine grants"] = 0
    json: Annotated[bool, "print the result as JSON on standard output, everything else on standard error"] = False
    # Which fields the user named (the command line says); None: all.  A resumed run compares only these with its own.
    given: frozenset[str] | None = dataclasses.field(default=None, init=False, repr=False, compare=False)


def settle(config: TrainConfig, n_vocab: int, init: Config | None = None, tokens: int = 0) -> TrainConfig:
    """The config with every 0 that stands for "by the size" filled in.  ValueError names the flag that cannot be.

    init      the model of --init: what it is made of stays 0 here
    tokens    of the text that will be learnt from, where it has been read; how long a model of --init learns depends on
              it
    """
    settled = _filled(config, _as_new(config, n_vocab) if init is None else _as_fine_tuned(config, init))
    windows = settled.batch * settled.context
    nearest = max(1, round(settled.tokens_per_step / windows)) * windows
    if config.tokens_per_step not in (0, nearest):
        raise ValueError(
            f"--tokens-per-step: {settled.tokens_per_step} is not a multiple of --batch x --context = {windows}; "
            f"{nearest} is"
        )
    settled.tokens_per_step = nearest
    if init is not None:
        steps = max(1, round(FINE_TUNING.passes * tokens / nearest))
        steps = settled.steps or (0 if config.minutes else steps)
        warmup = max(1, round(FINE_TUNING.warmup * steps)) if steps else SMALL_PACE["warmup"]
        settled = _filled(settled, dict(steps=steps, warmup=warmup))
    return settled


def _filled(config: TrainConfig, wanted: dict) -> TrainConfig:
    """The config with `wanted` in the place of zeros."""
    filled = dataclasses.replace(config, **{name: value for name, value in wanted.items() if not getattr(config, name)})
    filled.given = config.given
    return filled


def _as_new(config: TrainConfig, n_vocab: int) -> dict:
    """What a run from the beginning takes where nothing else is asked."""
    try:
        sizes = model_of(config, n_vocab)
    except ValueError as error:
        name, _, says = str(error).partition(": ")
        raise ValueError(f"{flag(name)}: {says}") from None
    wanted = dict(SMALL_PACE)
    if config.preset or config.depth:
        by_size = pace(sizes)
        batch = min(_micro_batch(sizes.context), by_size.tokens_per_step // sizes.context)
        wanted = dict(batch=batch, steps=by_size.steps, lr=by_size.lr)
        wanted |= dict(tokens_per_step=by_size.tokens_per_step, warmup=max(20, by_size.steps // 50))
    if config.minutes:
        del wanted["steps"]
    return wanted | {name: getattr(sizes, name) for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "context")}


def _as_fine_tuned(config: TrainConfig, init: Config) -> dict:
    """What a run that goes on from a model takes, but for its length; see recipe.FINE_TUNING."""
    for name in OF_THE_MODEL:
        if _is_named(config, name):
            raise ValueError(f"{flag(name)}: the model of --init has its own; leave one of the two out")
    context = config.context or min(init.context, FINE_TUNING.context)
    if context > init.context:
        raise ValueError(f"--context: is {context}, the model of --init sees {init.context} tokens at most")
    windows = FINE_TUNING.windows
    wanted = dict(context=context, batch=min(_micro_batch(context), windows), tokens_per_step=windows * context)
    share = FINE_TUNING.lora_lr if config.lora_rank else FINE_TUNING.lr
    return wanted | dict(lr=float(f"{share * pace(init).lr:.2g}"))


def lora_of(config: TrainConfig) -> Lora | None:
    """The adapter that is asked for."""
    if not config.lora_rank:
        return None
    targets = config.lora_targets.split(",")
    try:
        return Lora(config.lora_rank, config.lora_alpha or 2.0 * config.lora_rank, targets)
    except ValueError as error:
        raise ValueError(f"--lora-{error}") from None


def _micro_batch(context: int) -> int:
    """Windows of about MICRO_BATCH tokens."""
    return max(1, 2 ** int(math.log2(max(1, MICRO_BATCH // context))))


def _is_named(config: TrainConfig, name: str) -> bool:
    """Whether the user asked for it."""
    return getattr(config, name) != getattr(TrainConfig, name) if config.given is None else name in config.given


def model_of(config: TrainConfig, n_vocab: int) -> Config:
    """The new model that is asked for."""
    return model_config(
        n_vocab,
        config.preset,
        config.depth,
        config.family,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_kv_head=config.n_kv_head,
        n_embd=config.n_embd,
        context=config.context,
    )


def flag(name: str) -> str:
    """A field as the command line names it."""
    return "--" + name.replace("_", "-")


def check(config: TrainConfig) -> None:
    """ValueError naming the flag whose value is out of range."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if type(value) not in (int, float):
            continue
        if not 0 <= value < math.inf:
            raise ValueError(f"{flag(f.name)}: must be 0 or more, got {value}")
        if type(value) is int and value >= 2**31 and f.name != "seed":
            raise ValueError(f"{flag(f.name)}: {value} is too large")
    for name in ("beta1", "beta2", "val_fraction"):
        if not getattr(config, name) < 1:
            raise ValueError(f"{flag(name)}: must be in [0, 1), got {getattr(config, name)}")
    for name in ("lr_end", "decay"):
        if not getattr(config, name) <= 1:
            raise ValueError(f"{flag(name)}: must be in [0, 1], got {getattr(config, name)}")
    for name in ("precision", "schedule", "order", "family", "weights"):
        choices = _choices(name)
        if getattr(config, name) not in choices:
            raise ValueError(f"{flag(name)}: must be one of {', '.join(choices)}, got {getattr(config, name)}")
    check_lora(config)
    check_device(config.device)
    if config.profile and config.device != "cpu":
        raise ValueError("--profile: goes with --device cpu only")
    for name in ("guard_stop", "val_fraction"):
        if not getattr(config, name):
            raise ValueError(f"{flag(name)}: must be above 0, got 0")


def check_device(device: str) -> None:
    """Make --device ready.  ValueError says why it cannot be."""
    try:
        open_device(device)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--device: {str(error).removeprefix('device: ')}") from None


def check_lora(config: TrainConfig) -> None:
    """ValueError naming the flag of an adapter that cannot be."""
    for name in ("lora_alpha", "lora_targets", "weights"):
        if _is_named(config, name) and not config.lora_rank:
            raise ValueError(f"{flag(name)}: goes with --lora-rank only")
    if config.lora_rank and not config.init:
        raise ValueError("--lora-rank: goes with --init only, the model whose weights stay")
    lora_of(config)


def _choices(name: str) -> tuple[str, ...]:
    hint = TrainConfig.__annotations__[name]
    return hint.__origin__.__args__


def fields(config: TrainConfig) -> dict:
    """{name: value} of all flags."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def merge(old: TrainConfig, new: TrainConfig, free: set[str]) -> TrainConfig:
    """The old run's config with what may change (FREE and `free`) taken from the new one.  ValueError: what may not
    change does."""
    given = {f.name for f in dataclasses.fields(new) if f.init} if new.given is None else new.given
    free = FREE | free
    for name in sorted(given - free):
        if getattr(new, name) != getattr(old, name):
            raise ValueError(
                f"{flag(name)}: {getattr(new, name)} contradicts the run in {new.out}, which has {getattr(old, name)}"
            )
    return dataclasses.replace(old, **{name: getattr(new, name) for name in (given & free) | {"out", "resume"}})

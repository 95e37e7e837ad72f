"""`barelm plan`: what a run will be, before it starts: parameters, operations, memory, time and money.

What can be counted is counted, what this machine can do in seconds is timed, and what is assumed says where it is from.
"""

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from . import _core
from .hardware import GPUS, HISTORY, Past
from .loop import flops_per_token
from .lora import Lora
from .model import Config, Model
from .recipe import FAMILIES, matrix_weights, model_config
from .report import console, count, duration, printable
from .runs import open_model
from .settings import TrainConfig, check_lora, flag, lora_of, settle

__all__ = ["How", "PlanConfig", "Tensor", "Timing", "main", "measure", "memory", "plan", "tensors"]

SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "context")


@dataclass
class PlanConfig:
    """Say what a training run will take, before it starts.  Each field is a flag of `barelm plan`."""

    init: Annotated[str, "model to fine-tune: a folder, as barelm train takes it; left out: a new model"] = ""
    lora_rank: Annotated[int, "with --init: an adapter of this rank is trained; 0: all weights"] = 0
    lora_targets: Annotated[str, "linear layers that have one, with commas; all-linear: each"] = "all-linear"
    weights: Annotated[Literal["fp32", "bf16", "int8"], "with --lora-rank: how the other weights are held"] = "fp32"
    preset: Annotated[str, "gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama, llama-3.2-1b, llama-3.2-3b, llama-3-8b"] = ""
    depth: Annotated[int, "layers; the one dial that sets everything else; 0: as the sizes below say"] = 0
    family: Annotated[Literal[FAMILIES], "form of a model that is no preset"] = "gpt2"
    n_layer: Annotated[int, "blocks; 0 here and below: as the preset, or the depth, has it"] = 0
    n_head: Annotated[int, "query heads"] = 0
    n_kv_head: Annotated[int, "key/value heads"] = 0
    n_embd: Annotated[int, "channels"] = 0
    context: Annotated[int, "tokens the model sees at once; with --init: in a window"] = 0
    vocab: Annotated[int, "ids of the tokenizer; 0: the preset's own, or GPT-2's 50257"] = 0
    batch: Annotated[int, "windows in a micro-batch (on each GPU); 0 here and below: as barelm train takes it"] = 0
    tokens_per_step: Annotated[int, "tokens in a step"] = 0
    tokens: Annotated[int, "tokens of the whole run; with --init it must be said: twice those of the text"] = 0
    precision: Annotated[Literal["fp32", "bf16"], "of matrix products on this machine"] = "fp32"
    gpu: Annotated[str, f"plan for this GPU: {', '.join(GPUS)}; left out: for this machine"] = ""
    gpus: Annotated[int, "how many of them"] = 1
    price: Annotated[float, "dollars an hour of one GPU, or of this machine; 0: the GPU's example price"] = 0.0
    measure: Annotated[bool, "time some steps on this machine"] = True
    threads: Annotated[int, "0: as many as the machine grants"] = 0
    json: Annotated[bool, "print the plan as JSON on standard output, everything else on standard error"] = False


def main(config: PlanConfig) -> int:
    found = plan(config)
    if config.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def plan(config: PlanConfig) -> dict[str, Any]:
    """Everything that `barelm plan` tells, as plain data; sizes in bytes, times in seconds, money in dollars.

    ValueError naming the flag: what is asked cannot be.
    """
    _check(config)
    if config.threads:
        _core.threads_set(config.threads)
    init = open_model(config.init).config if config.init else None
    lora = lora_of(_train_config(config))
    n_vocab = init.vocab_size if init else config.vocab or _own_vocab(config.preset)
    settled = _as_trained(config, n_vocab, init)
    model = init or _asked_for(config, n_vocab)
    found = {
        "model": {"summary": _summary(config, model), "config": model.to_dict()},
        "parameters": _parameters(model) | ({"trained": lora.size(model)} if lora else {}),
    }
    model = replace(model, context=settled.context)  # from here on its windows count, which may be shorter
    run = _run(config, settled, model)
    flops = flops_per_token(model, model.context, lora)
    found |= {"run": run, "flops": {"per_token": flops, "run": flops * run["tokens"]}}
    how = How(config.precision, config.weights, lora)
    where = _on_gpu(config, model, run, how) if config.gpu else _on_this_machine(config, model, run, how)
    return found | where | {"history": [past._asdict() for past in HISTORY]}


# ---- what is asked ------------------------------------------------------------------------------------------------


def _check(config: PlanConfig) -> None:
    """ValueError naming the flag whose value is out of range."""
    positive = ("gpus",)
    not_negative = ("depth", *SIZES, "vocab", "batch", "tokens_per_step", "tokens", "price", "threads")
    for name in (*positive, *not_negative):
        value = getattr(config, name)
        if not (value > 0 if name in positive else value >= 0) or not math.isfinite(value):
            raise ValueError(f"{flag(name)}: must be {'above 0' if name in positive else '0 or more'}, got {value}")
        if type(value) is int and value >= (2**63 if name == "tokens" else 2**31):
            raise ValueError(f"{flag(name)}: {value} is too large")
    if config.gpu and config.gpu not in GPUS:
        raise ValueError(f"--gpu: '{config.gpu}' is not in the table, which has {', '.join(GPUS)}")
    if config.init and config.vocab:
        raise ValueError("--vocab: the model of --init has its own; leave one of the two out")
    if config.init and not config.tokens:
        raise ValueError("--tokens: must be given with --init; barelm train takes twice those of the text")
    check_lora(_train_config(config))
    if config.gpus > 1 and not config.gpu:
        raise ValueError(f"--gpus: {config.gpus} of which? --gpu names it")


def _own_vocab(preset: str) -> int:
    """Ids of a preset, or GPT-2's."""
    try:
        return Config.preset(preset or "gpt2").vocab_size
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def _asked_for(config: PlanConfig, n_vocab: int) -> Config:
    """A new model."""
    return model_config(n_vocab, config.preset, config.depth, config.family, **{n: getattr(config, n) for n in SIZES})


def _as_trained(config: PlanConfig, n_vocab: int, init: Config | None) -> TrainConfig:
    """What `barelm train` makes of the same flags."""
    settled = settle(_train_config(config), n_vocab, init)
    if settled.batch * settled.context >= 2**31:
        raise ValueError(f"--batch: {settled.batch} windows of {settled.context} tokens are too many for a micro-batch")
    return settled


def _train_config(config: PlanConfig) -> TrainConfig:
    same = ("init", "lora_rank", "lora_targets", "weights", "preset", "depth", "family", *SIZES, "batch")
    return TrainConfig(**{name: getattr(config, name) for name in (*same, "tokens_per_step", "precision")})


def _summary(config: PlanConfig, model: Config) -> str:
    heads = f"{model.n_head} heads" + (f" ({model.n_kv_head} of keys)" if model.n_kv_head != model.n_head else "")
    name = printable(config.init) or config.preset or f"{config.family}, depth {model.n_layer}"
    return (
        f"{name}: {model.n_layer} layers, {heads}, {model.n_embd} channels, context {model.context}, "
        f"{model.vocab_size:,} ids"
    )


def _run(config: PlanConfig, settled: TrainConfig, model: Config) -> dict[str, Any]:
    """How long the run is, in steps of whole micro-batches on every GPU."""
    a_round = settled.batch * settled.context * config.gpus
    if config.tokens_per_step % a_round:
        raise ValueError(f"--tokens-per-step: {config.tokens_per_step} does not go evenly onto {config.gpus} GPUs")
    accumulate = max(1, settled.tokens_per_step // a_round)
    per_step = accumulate * a_round
    steps = max(1, round((config.tokens or settled.steps * settled.tokens_per_step) / per_step))
    return {
        "tokens": steps * per_step,
        "tokens_per_step": per_step,
        "steps": steps,
        "accumulate": accumulate,
        "batch": settled.batch,
        "context": settled.context,
        "lr": settled.lr,
        "tokens_per_weight": steps * per_step / matrix_weights(model),
    }


# ---- parameters ---------------------------------------------------------------------------------------------------

EMBEDDINGS = ("wte.weight", "wpe.weight", "embed_tokens.weight", "embed_positions.weight")


class Tensor(NamedTuple):
    name: str  # Hugging Face's; "h.*" for that of every layer
    shape: tuple[int, ...]
    copies: int  # how many layers have one

    @property
    def size(self) -> int:
        """Numbers in all copies."""
        return math.prod(self.shape) * self.copies


def tensors(config: Config) -> list[Tensor]:
    """The parameters of a model that does not exist yet, kind by kind, as `Model.params` would show them."""
    shapes = _core.model_tensors(config)
    kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in shapes)
    return [Tensor(kind, shapes[kind.replace("*", "0")], copies) for kind, copies in kinds.items()]


def _parameters(config: Config) -> dict[str, Any]:
    kinds = tensors(config)
    total, embedding = sum(t.size for t in kinds), sum(t.size for t in kinds if t.name in EMBEDDINGS)
    rows = [t._asdict() | {"count": t.size, "share": t.size / total} for t in kinds]
    return {"total": total, "embeddings": embedding, "without_embeddings": total - embedding, "tensors": rows}


# ---- memory -------------------------------------------------------------------------------------------------------

HUGE_PAGE, PAGE = 2 << 20, 4096  # bytes
# What grows by itself in a process that trains, beside what is counted: code and tables that are read in when first
# used, stacks, small allocations (measured, Linux on x86-64: 7.4 MB for every model and batch).
FIRST_USE = 7_400_000
MALLOC_KEEPS = 32 << 20  # glibc gives larger blocks back at once (M_MMAP_THRESHOLD's upper limit)


class How(NamedTuple):
    """How a model is trained: see Model."""

    precision: str = "fp32"
    weights: str = "fp32"
    lora: Lora | None = None

    def model(self, config: Config) -> Model:
        model = Model(config, precision=self.precision, weights=self.weights)
        if self.lora:
            model.adapt(self.lora)
        return model

    def memory(self, config: Config, B: int, T: int, device: str = "cpu") -> dict[str, int]:
        return config.memory(B, T, weights=self.weights, lora=self.lora, precision=self.precision, device=device)


PLAIN = How()


def memory(config: Config, B: int, tokens_per_step: int, how: How = PLAIN) -> dict[str, int]:
    """Bytes of a training process by purpose, its peak being their sum, for micro-batches of B whole windows.

    The blocks of the model lie on whole huge pages and are touched when they are made, so they count in full.
    "program" is what this process has now (the interpreter, NumPy, and whatever else is imported) and what it will grow
    by.  The text that is trained on is not counted.
    """
    model = {purpose: _whole(size, HUGE_PAGE) for purpose, size in how.memory(config, B, config.context).items()}
    largest = max(math.prod(t.shape) for t in tensors(config) if t.copies > 1 or len(t.shape) == 1)
    return model | {
        "batches": 8 * tokens_per_step + 12 * B * config.context,  # tokens, targets; weights and logprobs of one
        "kernels": _scratch(config, B * config.context, how.precision),
        "program": _resident() + FIRST_USE + min(4 * largest, MALLOC_KEEPS),  # weights are drawn in a malloc'd buffer
    }


def _whole(size: int, page: int) -> int:
    """What a block of this size takes: small ones lie on small pages."""
    page = page if size >= page else PAGE
    return -(-size // page) * page


def _scratch(config: Config, N: int, precision: str) -> int:
    """Working memory of the kernels for N tokens: each thread's packed rows of a matrix product and its tile sums, and
    the partial sums of a norm's backward pass, which the calling thread keeps.  The sizes are those of csrc/linear.c
    and csrc/norm.c.
    """
    rows_at_once, most, tiles = 512, 16 << 20, 512 * 48 * 12 + 512 * 48 * 4
    long_a, piece_of_a, sums = 1 << 20, 128 << 10, 2 << 20
    threads, per_value = _core.threads_get(), 2 if precision == "bf16" else 1
    packed = 0
    for M, K, N_out, across in _products(config, N):
        units, waiting = -(-K // per_value), 0
        rows = min(rows_at_once, -(-M // threads), max(8, most // (units + 1)))
        if not across and rows * units >= long_a and rows * N_out <= sums:  # the sums wait while K comes in pieces
            units, waiting = max(256, piece_of_a // rows // 256 * 256), rows * N_out
        packed = max(packed, 4 * (rows * units * (across or precision == "bf16") + waiting))
    partial = 24 * config.n_embd * min(64, -(-N // 16))
    page = PAGE if "[never]" in _read("/sys/kernel/mm/transparent_hugepage/enabled") else HUGE_PAGE
    return threads * -(-(packed + tiles) // page) * page + -(-partial // page) * page


def _products(config: Config, N: int) -> list[tuple[int, int, int, bool]]:
    """(rows, length of the sums, columns, whether the left side lies across) of each matrix product.  It does for the
    gradients of weights, and then it is packed in fp32 too."""
    C, F = config.n_embd, config.n_inner * (2 if config.act == "swiglu" else 1)
    AO = config.n_head * config.head_size
    QKV = AO + 2 * config.n_kv_head * config.head_size
    products = []
    for rows, K, OC in (
        (N, C, QKV),
        (N, AO, C),
        (N, C, F),
        (N, config.n_inner, C),
        (min(N, 512), C, config.vocab_size),
    ):
        products += [(rows, K, OC, False), (rows, OC, K, False), (OC, rows, K, True)]
    return products


def _resident() -> int:
    """Bytes of memory that this process has."""
    pages = _read("/proc/self/statm").split()
    if len(pages) > 1:
        return int(pages[1]) * os.sysconf("SC_PAGESIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024  # the peak of a process that has not trained yet


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# ---- time ---------------------------------------------------------------------------------------------------------

SECONDS_AT_MOST = {"whole": 6.0, "part": 4.0}  # of one micro-batch that is timed
SECONDS_IN_ALL, REPEATS = 6.0, 5  # of the steps that are timed, whichever is reached first; one at least
EXPECTED_SHARE = 0.5  # of peak: only to choose what is timed
FREE_SHARE = 0.9  # of the free memory that timing may take

clock = time.perf_counter


class Timing(NamedTuple):
    """Seconds of the parts of a step."""

    first: float  # forward and backward of a step's first micro-batch, which writes the gradients
    more: float  # of any other, which adds to them
    update: float
    how: str  # what was timed

    def step(self, accumulate: int) -> float:
        return self.first + (accumulate - 1) * self.more + self.update


def measure(
    config: Config, B: int, how: How, free: int, peak: float, say: Callable[[str], None] = print
) -> Timing | None:
    """Time steps of the model with micro-batches of B whole windows on this machine.

    Where a micro-batch takes too long or the model does not fit into `free` bytes, fewer windows through one layer and
    through a few of the same width are timed, and time is taken to be linear in layers and windows.  None: not even
    that fits.
    """
    T = config.context

    def fits(layers: int, b: int, t: int, part: str) -> bool:
        some = replace(config, n_layer=layers)
        seconds = flops_per_token(some, t, how.lora) * b * t / (peak * EXPECTED_SHARE)
        return seconds <= SECONDS_AT_MOST[part] and sum(how.memory(some, b, t).values()) <= free * FREE_SHARE

    if fits(config.n_layer, B, T, "whole"):
        say(f"timing {B} windows of {T} tokens")
        return _time(config, B, T, how)._replace(how="timed")
    layers, b, t = 2, B, T
    while not fits(layers, b, t, "part"):
        if t == 1:
            return None
        b, t = (b // 2, t) if b > 1 else (1, t // 2)
    while layers < 8 and fits(2 * layers, b, t, "part"):  # the more layers, the less the noise of two timings counts
        layers *= 2
    what = f"1 and {layers} layers, {b} window{'s' * (b > 1)} of {t} tokens"
    say(f"timing {what}")
    one, several = (_time(replace(config, n_layer=n), b, t, how) for n in (1, layers))
    return _extrapolate(config, B, b, t, layers, one, several)._replace(how=f"extrapolated from {what}")


def _time(config: Config, B: int, T: int, how: How) -> Timing:
    """The best of several, for what else runs can only slow a step; after one that is not counted, which allocates."""
    model, rng = how.model(config), np.random.default_rng(0)
    tokens, targets = rng.integers(0, config.vocab_size, (2, B, T), dtype=np.int32)
    weights = np.full((B, T), 1 / (2 * B * T), np.float32)
    work = [lambda: model.forward_backward(tokens, targets, weights)] * 2 + [lambda: model.update(lr=1e-4)]
    for part in work:
        part()
    seconds, began = [], clock()
    while not seconds or (len(seconds) < REPEATS and clock() - began < SECONDS_IN_ALL):
        seconds.append([_seconds(part) for part in work])
    return Timing(*(min(part) for part in zip(*seconds, strict=True)), "")


def _seconds(part: Callable[[], object]) -> float:
    began = clock()
    part()
    return clock() - began


def _extrapolate(config: Config, B: int, b: int, t: int, layers: int, one: Timing, several: Timing) -> Timing:
    """From 1 and several layers and b windows of t to all layers and B whole windows."""
    T, windows = config.context, B * config.context / (b * t)
    longer = _layer_flops(config, T) / _layer_flops(config, t)  # attention sees more keys in a longer window

    def whole(of_one: float, of_several: float, windows: float, longer: float) -> float:
        layer = max(0.0, of_several - of_one) / (layers - 1)
        return windows * (max(0.0, of_one - layer) + config.n_layer * layer * longer)

    passes = [whole(one[i], several[i], windows, longer) for i in (0, 1)]
    return Timing(*passes, whole(one.update, several.update, 1.0, 1.0), "")


def _layer_flops(config: Config, T: int) -> float:
    one, two = (flops_per_token(replace(config, n_layer=n), T) for n in (1, 2))
    return two - one


# ---- this machine, or a GPU ---------------------------------------------------------------------------------------


def _on_this_machine(config: PlanConfig, model: Config, run: dict[str, Any], how: How) -> dict[str, Any]:
    screen = console(stderr=True)
    needed = memory(model, run["batch"], run["tokens_per_step"], how)
    program, free = needed["program"], _core.memory_available()
    total = sum(needed.values())
    found = {"memory": {"purposes": needed, "total": total, "there": free + program, "fits": total <= free + program}}
    timing = None
    if config.measure:
        peak = _core.peak_flops(config.precision, seconds=0.2)
        timing = measure(model, run["batch"], how, free, peak, lambda text: screen.print(text, highlight=False))
    if not timing:
        return found | {"time": None}
    step = timing.step(run["accumulate"])
    flops = flops_per_token(model, model.context, how.lora) * run["tokens_per_step"]
    return found | {
        "time": {
            **timing._asdict(),
            "step": step,
            "tokens_per_second": run["tokens_per_step"] / step,
            "share_of_peak": flops / (step * peak),
            **_whole_run(step * run["steps"], config.price),
        }
    }


def _on_gpu(config: PlanConfig, model: Config, run: dict[str, Any], how: How) -> dict[str, Any]:
    gpu, how = GPUS[config.gpu], how._replace(precision="bf16")  # which the peak is of
    needed = how.memory(model, run["batch"], model.context, device="cuda")
    total, share = sum(needed.values()), gpu.reference.share
    flops = flops_per_token(model, model.context, how.lora) * run["tokens_per_step"]
    step = flops / (config.gpus * gpu.flops * share)
    price = (config.price or gpu.price) * config.gpus
    return {
        "memory": {"purposes": needed, "total": total, "there": gpu.gb * 10**9, "fits": total <= gpu.gb * 10**9},
        "gpu": {"name": config.gpu, "n": config.gpus, "gb": gpu.gb, "flops": gpu.flops, "source": gpu.flops_source}
        | {"price": config.price or gpu.price, "price_source": "--price" if config.price else gpu.price_source},
        "time": {
            "how": f"{share:.0%} of peak, as {gpu.reference.name} ({gpu.reference.source})",
            "step": step,
            "tokens_per_second": run["tokens_per_step"] / step,
            "share_of_peak": share,
            **_whole_run(step * run["steps"], price),
        },
    }


def _whole_run(seconds: float, price: float) -> dict[str, float | None]:
    return {"run": seconds, "dollars": seconds / 3600 * price if price else None}


# ---- what is shown ------------------------------------------------------------------------------------------------


def _show(found: dict[str, Any]) -> None:
    screen = console()

    def line(name: str = "", text: str = "") -> None:
        screen.print(f"{name:11} {text}".rstrip(), markup=False, highlight=False, soft_wrap=True)

    run, flops = found["run"], found["flops"]
    line("model", found["model"]["summary"])
    line("parameters", _counts(found["parameters"]))
    for text in _tensor_lines(found["parameters"]["tensors"]):
        line("", text)
    line("run", f"{count(run['tokens'])} tokens ({run['tokens_per_weight']:.3g} for each weight of a matrix product)")
    line("", f"{run['steps']:,} steps of {run['tokens_per_step']:,} tokens, {_micro_batches(found)}; lr {run['lr']:g}")
    line("operations", f"{count(flops['per_token'], 'FLOP')} a token, {flops['run']:.3g} FLOP in all")
    for name, text in _memory_lines(found):
        line(name, text)
    for name, text in _time_lines(found):
        line(name, text)
    for name, text in _history_lines(found):
        line(name, text)


def _counts(parameters: dict[str, Any]) -> str:
    return (
        f"{parameters['total']:,}; {parameters['without_embeddings']:,} without the "
        f"{parameters['embeddings']:,} of embeddings"
        + (f"; {parameters['trained']:,} of an adapter are trained" if "trained" in parameters else "")
    )


def _micro_batches(found: dict[str, Any]) -> str:
    run, n = found["run"], found["run"]["accumulate"]
    on = f" on each of {found['gpu']['n']} GPUs" if found.get("gpu", {}).get("n", 1) > 1 else ""
    return f"{n} micro-batch{'es' * (n > 1)} of {run['batch']} x {run['context']}{on}"


def _tensor_lines(rows: list[dict[str, Any]]) -> list[str]:
    width = max(len(row["name"]) for row in rows)
    shapes = [" x ".join(map(str, row["shape"])) for row in rows]
    wide = max(map(len, shapes))
    return [
        f"{row['name']:{width}}  {shape:>{wide}}  x {row['copies']:<3} {row['count']:>15,}  {row['share']:6.1%}"
        for row, shape in zip(rows, shapes, strict=True)
    ]


def _memory_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    memory = found["memory"]
    purposes = ", ".join(f"{purpose} {count(size, 'B')}" for purpose, size in memory["purposes"].items() if size)
    verdict = "it fits" if memory["fits"] else "it does not fit: a lower --batch or --context needs less"
    if "gpu" in found:
        there = f"of the {count(memory['there'], 'B')} of {found['gpu']['name']}"
        note = "in bf16, as barelm train --device cuda --precision bf16; kernels take some working memory besides"
    else:
        there = f"of the {count(memory['there'], 'B')} that there are"
        note = "the text that is trained on is not counted"
    return [("memory", f"{count(memory['total'], 'B')} {there}: {verdict}"), ("", purposes), ("", note)]


def _time_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    spent = found["time"]
    if spent is None:
        return [("time", "unknown: nothing was timed (--no-measure, or not even a layer fits into memory)")]
    lines = [
        (
            "time",
            f"{_long(spent['run'])}; {_long(spent['step'])} a step, {spent['tokens_per_second']:,.0f} "
            f"tokens/s, {spent['share_of_peak']:.0%} of peak",
        )
    ]
    gpu = found.get("gpu")
    if gpu:
        peak = f"{gpu['n']} x {gpu['name']}: {count(gpu['flops'], 'FLOP/s')} each ({gpu['source']})"
        money = f"${spent['dollars']:,.2f} at ${gpu['price']:g} an hour ({gpu['price_source']}; prices are examples)"
        note = "a trainer as good as llm.c is assumed: barelm's own kernels have not been measured yet"
        return [*lines, ("", f"{peak}, {spent['how']}"), ("", note), ("money", money)]
    dollars = spent["dollars"]
    money = "unknown: --price says what an hour of this machine costs" if dollars is None else f"${dollars:,.2f}"
    note = f"this machine, {spent['how']}; evaluations, samples and checkpoints come on top"
    return [*lines, ("", note), ("money", money)]


def _long(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{duration(seconds)} (h:mm:ss)" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def _history_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [Past(**past) for past in found["history"]]
    width, wide = max(len(row.what) for row in rows), max(len(row.machine) for row in rows)
    lines = [
        f"{row.what:{width}}  {row.year}  {row.machine:{wide}}  {row.hours:6g} h  {f'${row.dollars:,.0f}':>8}  "
        f"{row.source}"
        for row in rows
    ]
    return [("for scale", lines[0]), *(("", text) for text in lines[1:])]

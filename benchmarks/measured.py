"""What a file of bench_model.py or bench_growth.py says, for a picture: checked, because it may be any file."""

import json
import re
import reprlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from barelm.model import Config
from barelm.plan import tensors
from barelm.recipe import FAMILIES
from barelm.report import count

AXES = ("T", "depth", "width", "threads")
PEER = re.compile(r"(barelm|torch (?:eager|compile)(?: tuned)?) (fp32|bf16)")


class Result(NamedTuple):
    """A line of a table: `rate` in tokens/s, `seconds` of a step in each round."""

    library: str
    precision: str
    rate: float
    seconds: list
    workload: dict
    axis: str = ""
    value: int = 0
    run: int = 0  # results of one run took turns, so their ratios count


def read(path):
    """(machine, model or None, [Result]) of a file.  ValueError says what is wrong with it, and where."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    try:
        everything = typed(data, dict, "the file")
        machine = machine_of(everything)
        model = model_of(everything["model"]) if "model" in everything else None
        items = typed(everything.get("results"), list, "results")
        if not items:
            raise ValueError("results: there are none")
        return machine, model, [result(item, f"results[{i}]", model) for i, item in enumerate(items)]
    except ValueError as error:
        raise ValueError(f"{path}: {error} (files of bench_model.py and bench_growth.py can be drawn)") from None


def machine_of(everything):
    machine = typed(everything.get("machine"), dict, "machine")
    words = ("cpu", "backend", "barelm", "commit", "torch")
    found = {name: text(machine[name], f"machine.{name}") for name in words if machine.get(name) is not None}
    text(found.get("cpu"), "machine.cpu")
    return found | {name: whole(machine.get(name), f"machine.{name}") for name in ("cpus", "threads")}


def model_of(item):
    """What bench_growth.py's models have in common."""
    item = typed(item, dict, "model")
    if item.get("family") not in FAMILIES:
        raise ValueError(f"model.family: must be one of {', '.join(FAMILIES)}, is {reprlib.repr(item.get('family'))}")
    sizes = {n: whole(item.get(n), f"model.{n}") for n in ("layers", "channels", "vocab", "context", "tokens")}
    return {"family": item["family"]} | sizes


def result(item, where, model):
    item = typed(item, dict, where)
    peer = text(item.get("peer"), f"{where}.peer")
    named = PEER.fullmatch(peer)
    if not named:
        raise ValueError(f"{where}.peer: '{peer}' is neither barelm nor PyTorch in a precision")
    seconds = typed(item.get("seconds"), list, f"{where}.seconds")
    if not seconds:
        raise ValueError(f"{where}.seconds: there are none")
    rate = number(item.get("tokens_per_second"), f"{where}.tokens_per_second")
    found = Result(
        *named.groups(),
        rate,
        [number(s, f"{where}.seconds") for s in seconds],
        workload_of(item.get("workload"), f"{where}.workload"),
    )
    if model is None:
        return found
    axis, value = text(item.get("axis"), f"{where}.axis"), whole(item.get("value"), f"{where}.value")
    if axis not in AXES:
        raise ValueError(f"{where}.axis: is '{axis}', must be one of {', '.join(AXES)}")
    return found._replace(axis=axis, value=value)


def workload_of(item, where):
    item = typed(item, dict, where)
    sizes = typed(item.get("sizes"), dict, f"{where}.sizes")
    try:
        Config(**sizes)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}.sizes: {error}") from None
    B, T = (whole(item.get(letter), f"{where}.{letter}") for letter in "BT")
    return {"name": text(item.get("name"), f"{where}.name", 40), "sizes": sizes, "B": B, "T": T}


def typed(value, kind, where):
    if type(value) is not kind:
        raise ValueError(f"{where}: must be {'an object' if kind is dict else 'a list'}, is {reprlib.repr(value)}")
    return value


def text(value, where, most=100):
    """A name: short, and of characters that can be seen."""
    if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value) <= most:
        raise ValueError(f"{where}: must be a short text, is {reprlib.repr(value)}")
    return value


def number(value, where):
    if type(value) not in (int, float) or not 1e-9 <= value <= 1e12:  # NaN is neither
        raise ValueError(f"{where}: must be a number above 0, is {reprlib.repr(value)}")
    return float(value)


def whole(value, where):
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{where}: must be a whole number above 0, is {reprlib.repr(value)}")
    return value


def gather(paths):
    """What all files say together.  ValueError: they do not belong together."""
    files = [read(path) for path in paths]
    machine, model, results = files[0][0], files[0][1], {}
    for run, (path, (other, its_model, more)) in enumerate(zip(paths, files, strict=True)):
        if its_model != model:
            raise ValueError(f"{path}: is not of the same benchmark and model as {paths[0]}")
        for name in ("cpu", "cpus", "threads", "backend", "torch"):
            if other.get(name) != machine.get(name):
                raise ValueError(f"{path}: machine.{name} is {other.get(name)}, in {paths[0]} {machine.get(name)}")
        for r in more:
            what = f"{r.library} {r.precision}, {f'{r.axis} {r.value}' if r.axis else title_of(r.workload)}"
            if what in results:
                raise ValueError(f"{path}: {what} is there twice")
            results[what] = r._replace(run=run)
    commits = dict.fromkeys(other.get("commit", "?") for other, *_ in files)
    return machine | {"commit": ", ".join(commits)}, model, list(results.values())


def title_of(workload):
    config = Config(**workload["sizes"])
    one, two = (sum(t.size for t in tensors(replace(config, n_layer=n))) for n in (1, 2))
    size = one + (config.n_layer - 1) * (two - one)
    return f"{workload['name']}, {count(size)} parameters, B = {workload['B']}, T = {workload['T']}"

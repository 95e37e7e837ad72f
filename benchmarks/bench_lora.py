"""python benchmarks/bench_lora.py  -- a 1B model with random weights: what reading it and training an adapter on it
take, its own weights held in bf16, int8 or fp32.

Each line is a process of its own, whose peak memory is that of the whole process.  The model is written first, as a
folder in bf16 of Hugging Face's form, a few MB at a time.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import numpy as np

HEADER = ("weights", "precision", "B, T", "load s", "ms a step", "tokens/s", "% of peak", "spread %", "peak GB", "loss")
IMPORTS = ("from", "to", "s", "peak MB", "bound MB")
RANK = 16


def write_model(preset, folder):
    """Random weights as `barelm import` would leave them."""
    from barelm import Config, checkpoint
    from barelm.convert.source import Source

    config = Config.preset(preset)
    source = Source(Path(), "random weights", config, Random.tensors(config))
    checkpoint.write(source, folder, "BF16")


class Random:
    """A tensor whose rows are drawn when they are read."""

    def __init__(self, shape, seed):
        self.parameter_shape, self.seed = shape, seed

    @classmethod
    def tensors(cls, config):
        from barelm import _core

        return {name: cls(tuple(shape), i) for i, (name, shape) in enumerate(_core.model_tensors(config).items())}

    def read(self, axis, where):
        rng = np.random.default_rng((self.seed, where.start))
        if len(self.parameter_shape) == 1:
            return np.ones(where.stop - where.start, np.float32)
        shape = list(self.parameter_shape)
        shape[axis] = where.stop - where.start
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def peak_memory():
    lines = [line.split() for line in machine.read("/proc/self/status").splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024


def train(folder, weights, precision, B, T, steps):
    """In a process of its own."""
    from barelm import Lora, Model, _core
    from barelm.loop import flops_per_token, step

    began = time.perf_counter()
    model = Model.load(folder, precision=precision, weights=weights)
    loaded = time.perf_counter() - began
    model.adapt(Lora(rank=RANK, alpha=2 * RANK))
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (B, T + 1), dtype=np.int32)
    batch = [(np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]))]
    seconds, result = [], None
    for _ in range(steps + 1):
        began = time.perf_counter()
        result = step(model, batch, 1e-4)
        seconds.append(time.perf_counter() - began)
    peak = _core.peak_flops(precision, seconds=0.5)
    print(
        json.dumps(
            {"load": loaded, "seconds": seconds[1:], "peak_flops": peak, "memory": peak_memory(), "loss": result.loss}
            | {"flops": flops_per_token(model.config, T, model.adapter) * B * T}
        )
    )


def convert(folder, target, command):
    """In a process of its own: `barelm import` or `export`."""
    from barelm.__main__ import main

    began = time.perf_counter()
    if main([*command.split(), str(folder), str(target)]):
        raise SystemExit(1)
    print(json.dumps({"seconds": time.perf_counter() - began, "memory": peak_memory()}))


def in_process(*words):
    run = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def line_of(weights, precision, B, T, found):
    median = statistics.median(found["seconds"])
    low, high = np.percentile(found["seconds"], (25, 75))
    return (
        weights,
        precision,
        f"{B}, {T}",
        f"{found['load']:.1f}",
        f"{1e3 * median:.0f}",
        f"{B * T / median:.1f}",
        f"{100 * found['flops'] / median / found['peak_flops']:.0f}",
        f"{100 * (high - low) / median:.0f}",
        f"{found['memory'] / 1e9:.2f}",
        f"{found['loss']:.4f}",
    )


def show(header, rows):
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(cells) + " |")


def converted(folder, preset):
    """Reading the folder and writing it again in another form, and back."""
    from barelm import Config, _core

    largest = max(4 * int(np.prod(shape)) for shape in _core.model_tensors(Config.preset(preset)).values())
    rows, gguf = [], folder.parent / "model.gguf"
    for what, source, target, command in (
        ("folder, bf16", folder, gguf, "export --format gguf --dtype q8_0"),
        ("GGUF, Q8_0", gguf, folder.parent / "again", "import --dtype bf16"),
    ):
        found = in_process("--role", "convert", "--folder", source, "--target", target, "--command", command)
        to = "GGUF, Q8_0" if target == gguf else "folder, bf16"
        bound = (4 * largest + 500e6) / 1e6
        rows.append((what, to, f"{found['seconds']:.0f}", f"{found['memory'] / 1e6:.0f}", f"{bound:.0f}"))
    show(IMPORTS, rows)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2].splitlines()[0])
    parser.add_argument("--preset", default="llama-3.2-1b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not (default 3)")
    parser.add_argument("--only", metavar="WORD", action="append", help="lines with this in 'weights precision'")
    parser.add_argument("--skip-convert", action="store_true", help="adapters alone")
    parser.add_argument("--json", metavar="FILE", help="write the same, with every step, as JSON")
    parser.add_argument("--role", choices=("train", "convert"), help=argparse.SUPPRESS)
    for hidden in ("--folder", "--target", "--command", "--weights", "--precision"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "train":
        train(options.folder, options.weights, options.precision, options.batch, options.context, options.steps)
        return
    if options.role == "convert":
        convert(options.folder, options.target, options.command)
        return
    about = machine.describe()
    machine.show(about)
    place = Path(tempfile.mkdtemp(prefix="bench_lora_"))
    try:
        write_model(options.preset, place / "model")
        about["convert"] = [] if options.skip_convert else converted(place / "model", options.preset)
        rows, about["steps"] = [], {}
        for weights, precision in (("bf16", "fp32"), ("bf16", "bf16"), ("int8", "bf16"), ("fp32", "fp32")):
            if options.only and not any(word in f"{weights} {precision}" for word in options.only):
                continue
            sizes = ("--batch", options.batch, "--context", options.context, "--steps", options.steps)
            found = in_process(
                *("--role", "train", "--folder", place / "model", "--weights", weights, "--precision", precision),
                *sizes,
            )
            about["steps"][f"{weights} {precision}"] = found
            rows.append(line_of(weights, precision, options.batch, options.context, found))
        show(HEADER, rows)
    finally:
        shutil.rmtree(place)
    if options.json:
        Path(options.json).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

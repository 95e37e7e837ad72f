"""python benchmarks/bench_driver.py  -- what the training driver costs beside the model's own work.

A run of `barelm train` on the Python standard library, 6 layers of 384 channels; of each step the time inside the model
(forward, backward, update) is taken from that of the whole step, so that what else the machine does counts on both
sides.  Of the rest, batches are shown by themselves; the remainder is the guard, the two logs and the progress line.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import machine
from barelm import train as training
from barelm.data.tokens import Tokens
from barelm.model import Model
from barelm.report import Progress, console
from barelm.tokenizer import Tokenizer

HEADER = ("model", "B, T", "ms a step", "of it batches %", "driver in all %", "steps")


@contextlib.contextmanager
def timed(spent, owner, name):
    """Add the time inside owner.name to spent[name]."""
    real = getattr(owner, name)

    def timing(*args, **options):
        began = time.perf_counter()
        try:
            return real(*args, **options)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

    setattr(owner, name, timing)
    try:
        yield
    finally:
        setattr(owner, name, real)


def measure(config, steps):
    """Each step's seconds: whole, in the model, in batches."""
    run = training._start(config, console(stderr=True))
    quiet = console()
    quiet.file = io.StringIO()
    rows = []
    with Progress(quiet, 1.0, 1.0) as progress:
        for _ in range(steps + 3):
            spent = {}
            with contextlib.ExitStack() as stack:
                for owner, name in ((Model, "forward_backward"), (Model, "update"), (Tokens, "batch")):
                    stack.enter_context(timed(spent, owner, name))
                began = time.perf_counter()
                training._one_step(run, progress)
                whole = time.perf_counter() - began
            rows.append((whole, spent["forward_backward"] + spent["update"], spent["batch"]))
    run.close()
    return rows[3:]  # the first allocate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    options = parser.parse_args()
    about = machine.describe()
    machine.show(about)
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        documents = training.Documents()
        Tokenizer.train((d.data for d in documents), 4096).save(Path(folder) / "tok")
        for precision in ("fp32", "bf16"):
            config = training.TrainConfig(
                tokenizer=f"{folder}/tok",
                out=f"{folder}/{precision}",
                n_layer=6,
                n_head=6,
                n_embd=384,
                context=256,
                batch=8,
                precision=precision,
                tensorboard=False,
            )
            rows = measure(config, options.steps)
            whole = statistics.median(row[0] for row in rows)
            batches = statistics.median(row[2] / row[0] for row in rows)
            driver = statistics.median(1 - row[1] / row[0] for row in rows)
            found.append(dict(precision=precision, step=whole, batches=batches, driver=driver, rows=rows))
            shares = f"{100 * batches:.2f} | {100 * driver:.2f}"
            print(f"| 6 x 384, {precision} | 8, 256 | {1e3 * whole:.1f} | {shares} | {len(rows)} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": about, "results": found}))


if __name__ == "__main__":
    main()

"""python benchmarks/bench_decode.py  -- how fast sessions decode, beside the machine's read bandwidth, transformers and
llama.cpp.

All decode the same GPT-2 124M with random weights: each new token goes through all of them once, so that for one row
the memory sets the limit.  Every contender is a process of its own that waits for its turn; a round is a measurement of
the read bandwidth and one turn of each, and ratios are taken within a round.  A contender whose first logits are not
those of the model is an error, not a row of the table.  `--loss FOLDER` asks instead what bf16 and int8 weights cost a
trained model.
"""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
import machine  # noqa: E402
from barelm import Model, Session, Tokenizer, _core  # noqa: E402
from barelm.data.documents import Documents  # noqa: E402
from barelm.data.shards import Dataset, is_dataset  # noqa: E402
from barelm.data.tokens import Tokens  # noqa: E402
from barelm.runs import newest_checkpoint  # noqa: E402
from barelm.session import PAGE  # noqa: E402
from decoders import LIBRARIES, Workload  # noqa: E402
from models import random_model  # noqa: E402

WEIGHTS = ("fp32", "bf16", "int8")
OWN = tuple(f"barelm {kind}" for kind in WEIGHTS)
LLAMA = ("llama.cpp F16", "llama.cpp BF16", "llama.cpp Q8_0")
PEERS = {"transformers fp32": ("torch", "transformers")} | dict.fromkeys(LLAMA, ("xllamacpp", "gguf"))
PACKAGES = ("transformers", "xllamacpp", "gguf")  # versions that are told; torch's is told with the machine's
# how far logits may be off, as a share of their deviation: twice what is met; two vectors exchanged make it 0.15
CLOSE = {"fp32": 1e-4, "bf16": 1e-2, "F16": 1e-2, "BF16": 1e-2, "int8": 4e-2, "Q8_0": 4e-2}
# whose forward pass a prompt is set beside: int8 weights have none, their activations are kept as those of bf16
FORWARD = dict(zip(OWN, ("barelm fp32", "barelm bf16", "barelm bf16"), strict=True))
HEADER = ("contender", "what", "ms", "tokens/s", "MB read", "% of read bandwidth", "spread %", "rounds")
PAUSE = 0.2  # seconds between turns: threads that wait for work by spinning have gone to sleep by then


# ---- in the process of a contender


def serve(pipe, name, workload, folder):
    """Send what the contender says of itself, or why it cannot start; then answer each (method, rows)."""
    library, kind = name.split()
    try:
        contender = LIBRARIES[library](workload, kind, folder)
        pipe.send({"logits": contender.first(), "about": contender.about()})
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})
        return
    while request := pipe.recv():  # None: the end
        method, rows = request
        pipe.send(getattr(contender, method)(rows))


def memory_of_session(pipe, weights, workload, folder):
    """Send the bytes of a process that loads a session of 1,024 tokens, fills it and decodes."""
    start, T = status_bytes("VmRSS"), min(1024, workload.config.context)
    session = Session.load(folder, T, weights)
    row, tokens = session.add(), workload.ids(T)
    at = T - T // 16
    session.step([row], [tokens[:at]])
    for token in tokens[at:]:
        session.step([row], [[token]])
    pipe.send({"session": weights, "tokens": T, "start": start, **session.memory, "peak": status_bytes("VmHWM")})


def status_bytes(field):
    """Memory of this process as the system counts it; NaN where it does not."""
    lines = [line.split() for line in machine.read("/proc/self/status").splitlines() if line.startswith(field + ":")]
    return int(lines[0][1]) * 1024 if lines else math.nan


# ---- in this process


class Process:
    """A process that runs target(pipe, name, workload, folder)."""

    def __init__(self, target, name, workload, folder):
        context = multiprocessing.get_context("spawn")
        self.name, self.about = name, None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, name, workload, folder))
        self.process.start()
        theirs.close()

    def hello(self):
        """The contender's first logits.  RuntimeError: it cannot start."""
        answer = self.receive()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        self.about = answer["about"]
        return answer["logits"]

    def receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: the process died; what it said is above") from None

    def turn(self, method, rows=1):
        self.pipe.send((method, rows))
        answer = self.receive()
        time.sleep(PAUSE)
        return answer

    def stop(self):
        with contextlib.suppress(OSError):  # it may be gone
            self.pipe.send(None)
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def activities(name, workload):
    """(method, rows, tokens of a turn) of each thing that is timed."""
    alone, long = ("decode", 1, workload.tokens), workload.prompt
    if name not in OWN:
        return [alone]
    together = ("decode", workload.batch, workload.batch * workload.tokens)
    forward = [("forward", 1, long)] if name != "barelm int8" else []
    return [alone, together, ("prefill", 1, long), *forward]


def start(processes, names, workload, folder, model):
    """Append those contenders to `processes` that can start, warmed up; returns why others cannot."""
    left_out = {}
    want = model.logits(workload.prompts()[:1])[0]
    for name in names:
        missing = [package for package in PEERS.get(name, ()) if find_spec(package) is None]
        if missing:
            left_out[name] = f"{' and '.join(missing)} not installed"
            continue
        print(f"{name} warms up", file=sys.stderr, flush=True)
        if name in LLAMA:
            write_gguf(model, folder, name.split()[1])
        processes.append(Process(serve, name, workload, folder))
        try:
            hello = processes[-1].hello()
        except RuntimeError as error:
            if name in OWN:
                raise
            left_out[name] = str(error)
            processes.pop().stop()
            continue
        check_logits(name, hello, want)
        for method, rows, _ in activities(name, workload):
            processes[-1].turn(method, rows)
    return left_out


def write_gguf(model, folder, kind):
    import llama_cpp

    file = Path(folder) / f"{kind}.gguf"
    size = llama_cpp.write(model, file, kind)
    file.with_suffix(".bytes").write_text(str(size))


def check_logits(name, got, want):
    """RuntimeError where a contender's logits are not those of the model, up to the rounding of its weights."""
    error = float(np.sqrt(np.mean((got - want) ** 2)) / want.std())
    if not error <= CLOSE[name.split()[1]]:
        raise RuntimeError(f"{name}: its logits differ from the model's by {error:.2g} of their deviation")


def race(workload, names, rounds, bandwidth_seconds=0.2):
    """Everything that was measured, as plain data."""
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(workload.sizes)
        model.save(folder, optimizer=False)
        try:
            left_out = start(processes, names, workload, folder, model)
            del model
            results = [entry(process, *what) for process in processes for what in activities(process.name, workload)]
            for _ in range(rounds):
                for process, r in results:
                    if r["what"] == "decode":  # just before: on a shared machine it changes from second to second
                        r["bandwidth"].append(_core.read_bandwidth(bandwidth_seconds))
                        time.sleep(PAUSE)
                    r["seconds"].append(process.turn(r["what"], r["rows"]))
        finally:
            for process in processes:
                process.stop()
        memory = [measure_memory(name.split()[1], workload, folder) for name in OWN if name in names]
    results = [r for _, r in results]
    return {
        "workload": asdict(workload),
        "bandwidth": [reading for r in results for reading in r["bandwidth"]],
        "results": [summary(r, workload) for r in results],
        "ratios": ratios(results),
        "memory": memory,
        "about": sorted({process.about for process in processes}),
        "left_out": left_out,
    }


def entry(process, method, rows, tokens):
    size = process.turn("bytes_read", rows) if method == "decode" else None
    return process, {
        "name": process.name,
        "what": method,
        "rows": rows,
        "tokens": tokens,
        "bytes": size,
        "bandwidth": [],
        "seconds": [],
    }


def measure_memory(weights, workload, folder):
    process = Process(memory_of_session, weights, workload, folder)
    try:
        return process.receive()
    finally:
        process.stop()


def middle(values):
    """Median, and the width of the range that holds half of them as a share of it."""
    low, median, high = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    return median, (high - low) / median


def summary(result, workload):
    """The result, with seconds a step, tokens/s, share of the bandwidth and spread."""
    steps = workload.tokens if result["what"] == "decode" else 1
    step, spread = middle(np.array(result["seconds"]) / steps)
    share = None
    if result["what"] == "decode":
        rates = result["bytes"] * steps / np.array(result["seconds"])
        share = middle(rates / np.array(result["bandwidth"]))[0]
    rate = result["tokens"] / steps / step
    return result | {"step": step, "tokens_per_second": rate, "share_of_bandwidth": share, "spread": spread}


def ratios(results):
    """How many times the tokens/s of one line those of another are, taken in each round."""
    rates = {(r["name"], r["what"], r["rows"]): r["tokens"] / np.array(r["seconds"]) for r in results}
    pairs = [(alone("barelm fp32"), alone("transformers fp32")), (alone("barelm int8"), alone("llama.cpp Q8_0"))]
    halves = [alone(name) for name in LLAMA[:2] if alone(name) in rates]
    if halves:
        pairs.insert(1, (alone("barelm bf16"), max(halves, key=lambda key: np.median(rates[key]))))
    pairs += [(alone(fast), alone(slow)) for slow, fast in itertools.pairwise(OWN)]
    pairs += [(key, alone(key[0])) for key in rates if key[1] == "decode" and key[2] > 1]
    pairs += [(key, (FORWARD[key[0]], "forward", 1)) for key in rates if key[1] == "prefill"]
    return [
        {"of": label(*a), "to": label(*b), "times": times, "spread": spread}
        for a, b in pairs
        if a in rates and b in rates
        for times, spread in [middle(rates[a] / rates[b])]
    ]


def alone(name):
    return name, "decode", 1


def label(name, what, rows):
    return f"{name}, {what}" + (f", {rows} row{'s' if rows > 1 else ''}" if what == "decode" else "")


# ---- what bf16 and int8 weights cost


def losses(folder, n_tokens=4096, rows=16):
    """Nats per token and bits per byte of a trained model through sessions, by their weights, over the same windows of
    the run's held-out text (the Python standard library where the folder has none), and the root mean square of what a
    token's log p is off.  No window sees the one before.  ValueError: there is not a window to score."""
    folder = newest_checkpoint(folder)
    model, tok = Model.load(folder), Tokenizer.load(folder)
    T, dataset = model.config.context, folder.parent / "data"
    own = is_dataset(dataset)
    data = Dataset.open(dataset, tok).validation if own else Tokens.encode(Documents(), tok)
    batch = min(rows, (len(data) - 1) // T)
    if batch < 1:
        raise ValueError(f"{folder}: a window of {T} tokens needs more than the {len(data)} that there are")
    batches = max(1, n_tokens // (batch * T))
    windows = [(x, y) for x, y, _ in data.windows(batch, T, batches) if x.shape == (batch, T) and (y >= 0).all()]
    logprobs = {}
    for weights in WEIGHTS:
        session = Session(model, batch * -(-T // PAGE) * PAGE, weights)
        logprobs[weights] = np.concatenate([session_logprobs(session, x, y).ravel() for x, y in windows])
    n_bytes = sum(int(data.lengths[y].sum()) for _, y in windows)
    apart = {weights: found - logprobs["fp32"] for weights, found in logprobs.items()}
    return {
        "checkpoint": str(folder),
        "text": "held-out side of the run" if own else "the Python standard library",
        "tokens": logprobs["fp32"].size,
        "bytes": n_bytes,
        "bits_per_byte": {w: -float(found.sum()) / math.log(2) / n_bytes for w, found in logprobs.items()},
        "nats": {weights: -float(found.mean()) for weights, found in logprobs.items()},
        "rms": {weights: float(np.sqrt(np.mean(np.square(d)))) for weights, d in apart.items()},
    }


def session_logprobs(session, tokens, targets):
    """log p(target), (T, B) float64 in nats, of tokens and targets (B, T) that go through one a step."""
    rows, found = [session.add() for _ in tokens], []
    for token, target in zip(tokens.T, targets.T, strict=True):
        session.step(rows, token[:, None])
        found.append(session.logprobs(target).astype(np.float64))
    for row in rows:
        session.free(row)
    return np.array(found)


# ---- the tables


def table(header, rows):
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def show(found, workload):
    bandwidth, spread = middle(found["bandwidth"])
    c = workload.config
    print(
        f"- {c.n_layer} layers, {c.n_embd} channels, {c.vocab_size} tokens; {workload.context} tokens in front, "
        f"{workload.tokens} decoded a turn, greedily; a prompt of {workload.prompt}"
    )
    print(f"- read bandwidth {bandwidth / 1e9:.1f} GB/s, spread {100 * spread:.0f} %")
    for line in found["about"]:
        print(f"- {line}")
    for name, reason in found["left_out"].items():
        print(f"- left out: {name} ({reason})")
    table(HEADER, map(row, found["results"]))
    table(
        ("tokens/s of", "over that of", "times", "spread %"),
        [(r["of"], r["to"], f"{r['times']:.2f}", f"{100 * r['spread']:.0f}") for r in found["ratios"]],
    )
    columns = ("start", "weights", "cache", "peak")
    table(
        ("session", "tokens", *(f"{name} MB" for name in columns)),
        [(m["session"], str(m["tokens"]), *(f"{m[name] / 1e6:.0f}" for name in columns)) for m in found["memory"]],
    )


def row(r):
    decode = r["what"] == "decode"
    return (
        r["name"],
        f"decode, {r['rows']} row{'s' if r['rows'] > 1 else ''}" if decode else r["what"],
        f"{1e3 * r['step']:.2f}",
        f"{r['tokens_per_second']:.0f}",
        f"{r['bytes'] / 1e6:.0f}" if decode else "",
        f"{100 * r['share_of_bandwidth']:.0f}" if decode else "",
        f"{100 * r['spread']:.0f}",
        str(len(r["seconds"])),
    )


def show_losses(found):
    print(f"- {found['checkpoint']}: {found['tokens']} tokens ({found['bytes']} bytes), {found['text']}")
    bits, nats, rms = found["bits_per_byte"], found["nats"], found["rms"]
    table(
        ("weights", "bits per byte", "nats per token", "bits above fp32", "nats above fp32", "a token off by"),
        [
            (
                w,
                *(f"{x[w]:.5f}" for x in (bits, nats)),
                *(f"{x[w] - x['fp32']:+.5f}" for x in (bits, nats)),
                f"{rms[w]:.4f}",
            )
            for w in WEIGHTS
        ],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2])
    everyone = [*OWN, *PEERS]
    parser.add_argument(
        "--only", action="append", metavar="WORD", help=f"of {', '.join(everyone)}: those with this in their name"
    )
    parser.add_argument("--rounds", type=int, help="turns of each contender (default 11)")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--loss", metavar="FOLDER", help="only this: the loss of a trained checkpoint or run")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON, every turn's time included")
    options = parser.parse_args()
    names = [name for name in everyone if any(word in name for word in options.only or [""])]
    if not names:
        raise SystemExit(f"nothing to run: --only leaves none of {', '.join(everyone)}")
    about = machine.describe() | {package: machine.version(package) for package in PACKAGES}
    machine.show(about)
    if options.loss:
        found = losses(options.loss)
        show_losses(found)
    else:
        print("- " + ", ".join(f"{package} {about[package]}" for package in PACKAGES), flush=True)
        workload = Workload()
        found = race(workload, names, options.rounds or (3 if options.quick else 11))
        show(found, workload)
        after = machine.load_average()
        print(f"\nLoad average {about['load_average']} before, {after} after (this run keeps every core busy itself).")
        about |= {"load_average_after": after}
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""python benchmarks/bench_growth.py  -- how the cost of a training step grows with window length, depth and width, and
what threads take off it.

From one small model one size at a time is changed; the tokens of a step stay as many.  All sizes of an axis take turns,
barelm in both precisions and, where asked for, PyTorch beside it: processes, turns and rounds are bench_model.py's.  So
a ratio of two sizes is taken within a round too, and a slow minute of the machine makes no bend in a line.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import machine
import numpy as np
import tuned
from barelm import Model, _core
from barelm.loop import flops_per_token
from barelm.recipe import FAMILIES, model_config
from bench_model import CPU_PEERS, Peer, Workload, check_losses, summarize

MODEL = ("family", "layers", "channels", "vocab", "context", "tokens")
AXES = ("T", "depth", "width", "threads")
HEADER = (
    "point",
    "B, T",
    "threads",
    "peer",
    "ms a step",
    "tokens/s",
    "% of peak",
    "x FLOPs",
    "x time",
    "x stock PyTorch",
    "x tuned",
    "spread %",
    "rounds",
    "GiB",
)
GIB = 2**30
# Of a process beside what the model counts for itself (barelm), or of all of it (PyTorch): a little more than is met.
BESIDE = {"barelm": (1.0, 0.1 * GIB), "torch": (1.6, 0.4 * GIB)}


@dataclass(frozen=True, eq=False)
class Point:
    axis: str
    value: int
    threads: int
    workload: Workload

    @property
    def name(self):
        return f"{self.axis} {self.value}"

    @property
    def flops(self):
        """Of a step."""
        w = self.workload
        return flops_per_token(w.config, w.T) * w.B * w.T

    def bytes(self, peer):
        """Memory that a peer is expected to take, to see how many can be alive together."""
        factor, more = BESIDE[peer.split()[0]]
        return factor * sum(self.workload.config.memory(self.workload.B, self.workload.T).values()) + more


# ---- what is measured


def points(options):
    """The points of all axes.  ValueError: a size that cannot be."""
    longest = max(options.context, *options.lengths)  # of every model: along T, nothing but T changes

    def point(axis, value, T=options.context, n_layer=options.layers, n_embd=options.channels, threads=None):
        if options.tokens % T:
            raise ValueError(f"{options.tokens} tokens a step are not a whole number of windows of {T}")
        heads = dict(n_layer=n_layer, n_head=n_heads(n_embd), n_embd=n_embd, context=longest)
        config = model_config(options.vocab, family=options.family, **heads)
        workload = Workload(f"{axis} {value}", config.to_dict(), options.tokens // T, T)
        return Point(axis, value, threads or _core.threads_get(), workload)

    return [
        *(point("T", T, T=T) for T in options.lengths),
        *(point("depth", n, n_layer=n) for n in options.depths),
        *(point("width", n, n_embd=n) for n in options.widths),
        *(point("threads", n, threads=n) for n in options.threads),
    ]


def n_heads(n_embd):
    """Heads of 64 channels; a narrower model has one.  ValueError: the width does not divide so."""
    if n_embd > 64 and n_embd % 64:
        raise ValueError(f"width {n_embd} is not a multiple of 64, the size of a head")
    return max(1, n_embd // 64)


def doubling(first, last):
    """first, twice that, ... below last, and last: [1, 2, 4, 6]."""
    return [*itertools.takewhile(lambda n: n < last, (first << i for i in range(64))), last]


def together(some_points, names, free):
    """The points in groups whose processes fit into the memory at once, in order.  A point that alone does not fit is
    left out, and a line says so."""
    groups, room = [], 0.0
    for point in some_points:
        size = sum(point.bytes(name) for name in names)
        if size > free:
            say(f"left out: {point.name} (takes {size / GIB:.1f} GiB, {free / GIB:.1f} are free)")
            continue
        if size > room:
            groups.append([])
            room = free
        groups[-1].append(point)
        room -= size
    return groups


@contextlib.contextmanager
def threads_of_children(n):
    before = os.environ.get("BARELM_THREADS")
    os.environ["BARELM_THREADS"] = str(n)
    try:
        yield
    finally:
        del os.environ["BARELM_THREADS"]
        if before is not None:
            os.environ["BARELM_THREADS"] = before


def race(group, names, rounds, seconds):
    """Run all peers on all points of a group; each round gives every one of them a turn of some steps."""
    runners = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for point in group:
            weights = Path(folder) / point.name.replace(" ", "_")
            Model(point.workload.config, seed=1).save(weights, optimizer=False)
            runners[point] = []
            for name in names:
                say(f"{point.name} ({point.workload.B}, {point.workload.T}): {name} warms up")
                with threads_of_children(point.threads):
                    runners[point].append(Peer(name, point.workload, weights))
                stack.callback(runners[point][-1].stop)
            check_losses(runners[point])
        check_threads(runners)
        steps = {p: max(1, round(seconds / float(np.median([r.warm for r in runners[p]])))) for p in group}
        for done in range(rounds):
            say(f"{group[0].axis}: round {done + 1} of {rounds}")
            for point, peer in pairs(runners):
                spent, loss = peer.turn(steps[point])
                peer.seconds.append(spent / steps[point])
                peer.losses.append(loss)
        for peers in runners.values():
            check_losses(peers)
        return [entry(point, peer, steps[point]) for point, peer in pairs(runners)]


def pairs(runners):
    return [(point, peer) for point, peers in runners.items() for peer in peers]


def check_threads(runners):
    """RuntimeError where barelm computes other losses with another number of threads: it must to the bit."""
    first = {}
    for point, peer in pairs(runners):
        if point.axis == "threads" and peer.name.startswith("barelm"):
            want = first.setdefault(peer.name, peer.losses[:2])
            if peer.losses[:2] != want:
                raise RuntimeError(f"{peer.name}, {point.threads} threads: losses {peer.losses[:2]}, before {want}")


def entry(point, peer, steps):
    w = point.workload
    return {
        "axis": point.axis,
        "value": point.value,
        "threads": point.threads,
        "flops": point.flops,
        "workload": {"name": w.name, "sizes": w.sizes, "B": w.B, "T": w.T},
        "peer": peer.name,
        "seconds": peer.seconds,
        "steps_a_turn": steps,
        "losses": peer.losses,
        "gib": peer.end(),
    }


# ---- what is said of it


def say(text):
    print(text, file=sys.stderr, flush=True)


def conclude(results, peaks):
    """Add to each result of one axis what bench_model.py adds, its share being that of the peak of its threads, and how
    much more FLOPs and time its step takes than that of the first point."""
    for _, found in itertools.groupby(results, key=lambda r: r["value"]):
        found = list(found)
        summarize(found, peaks[found[0]["threads"]])
    first = {}
    for r in results:
        start = first.setdefault(r["peer"], r)
        r["times_flops"] = r["flops"] / start["flops"]
        r["times_time"] = float(np.median(np.array(r["seconds"]) / start["seconds"]))
    return results


def row(r):
    ratios = ["" if r[kind] is None else f"{r[kind]:.2f}" for kind in ("stock", "tuned")]
    return (
        f"{r['axis']} {r['value']}",
        f"{r['workload']['B']}, {r['workload']['T']}",
        str(r["threads"]),
        r["peer"],
        f"{r['median'] * 1e3:.1f}",
        f"{r['tokens_per_second']:.0f}",
        f"{100 * r['share_of_peak']:.0f}",
        f"{r['times_flops']:.2f}",
        f"{r['times_time']:.2f}",
        *ratios,
        f"{100 * r['spread']:.0f}",
        str(len(r["seconds"])),
        "" if r["gib"] is None else f"{r['gib']:.2f}",
    )


def ceilings(counts):
    """{threads: {precision: FLOP/s}} of each number of threads, shown as they are found."""
    found, backend = {}, _core.isa()
    for n in counts:
        _core.threads_set(n)
        found[n] = machine.ceilings([backend])[backend]
        machine.show_ceilings({f"{backend}, {n} thread{'s' * (n > 1)}": found[n]})
    _core.threads_set(0)
    return found


# ---- what is asked


def whole(text):
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:10]) < 2**31:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def wholes(text):
    return sorted({whole(word) for word in text.split(",")})


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2], allow_abbrev=False)
    parser.add_argument("--family", choices=FAMILIES, default="gpt2", help="form of the model (default gpt2)")
    parser.add_argument("--layers", type=whole, default=6, help="of the model, where depth is not the axis (default 6)")
    parser.add_argument("--channels", type=whole, default=384, help="likewise, heads of 64 (default 384)")
    parser.add_argument("--context", type=whole, help="tokens of a window, where T is not the axis (default 256)")
    parser.add_argument("--vocab", type=whole, default=4096, help="tokens of the vocabulary (default 4096)")
    parser.add_argument("--tokens", type=whole, help="tokens of a step, in windows of T (default 4096)")
    lists = (
        ("lengths", "windows of T (default 64, 128 ... the tokens of a step)"),
        ("depths", "layers (default 1,2,4,8,12)"),
        ("widths", "channels (default 128,192,256,384,512)"),
        ("threads", "threads (default 1, 2, 4 ... those of the machine)"),
    )
    for name, what in lists:
        parser.add_argument(f"--{name}", type=wholes, metavar="N,N...", help=what)
    parser.add_argument("--precision", choices=machine.PRECISIONS, help="only this one (default both)")
    rivals = [name for name in CPU_PEERS if name.startswith("torch")]
    parser.add_argument(
        "--peers", action="append", metavar="WORD", help=f"those of {', '.join(rivals)} beside barelm (may be repeated)"
    )
    parser.add_argument(
        "--only", action="append", metavar="WORD", help="points with this in their name: 'T', 'depth 4'"
    )
    parser.add_argument("--rounds", type=whole, help="turns of each (default 5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of short turns, 1024 tokens a step")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON, every turn's time included")
    options = parser.parse_args(argv)
    fill(options)
    try:
        options.points = [p for p in points(options) if any(word in p.name for word in options.only or [""])]
        options.names = selected(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def fill(options):
    """Put in what was left out."""
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.tokens = options.tokens or (1024 if options.quick else 4096)
    options.context = options.context or min(256, options.tokens)
    options.lengths = options.lengths or doubling(min(64, options.tokens), options.tokens)
    options.depths = options.depths or [1, 2, 4, 8, 12]
    options.widths = options.widths or [128, 192, 256, 384, 512]
    options.threads = options.threads or doubling(1, _core.threads_get())


def selected(options):
    """Names of the peers.  ValueError: there is nothing to run, or PyTorch cannot."""
    if not options.points:
        raise ValueError(f"--only: no point has {' or '.join(options.only)} in its name; axes are {', '.join(AXES)}")
    precisions = [options.precision] if options.precision else machine.PRECISIONS
    names = [n for n in CPU_PEERS if n.split()[-1] in precisions]
    own = [n for n in names if n.startswith("barelm")]
    if not options.peers:
        return own
    rivals = [n for n in names if n.startswith("torch") and any(word in n for word in options.peers)]
    if not rivals:
        raise ValueError(f"--peers: none has {' or '.join(options.peers)} in its name; there are {', '.join(names)}")
    if find_spec("torch") is None:
        raise ValueError("--peers: torch is not installed")
    if options.family != "gpt2":
        raise ValueError(f"--peers: PyTorch's model is a GPT-2, there is none for --family {options.family}")
    why = tuned.missing()
    if why and any("tuned" in n for n in rivals):
        say(f"left out: tuned PyTorch ({why})")
        rivals = [n for n in rivals if "tuned" not in n]
    return own + rivals


def main():
    options = parse()
    about = machine.describe() | {"command": shlex.join(["python", "benchmarks/bench_growth.py", *sys.argv[1:]])}
    machine.show(about)
    print(f"- `{about['command']}`")
    print(
        f"- {options.family}: {options.layers} layers, {options.channels} channels, {options.vocab} tokens, windows of "
        f"{options.context}, but for the size that is changed; {options.tokens} tokens a step"
    )
    peaks = ceilings(sorted({p.threads for p in options.points}))
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    results = []
    for _, axis in itertools.groupby(options.points, key=lambda p: p.axis):
        found = []
        for group in together(axis, options.names, _core.memory_available()):
            found += race(group, options.names, options.rounds, 0.3 if options.quick else 1.0)
        for r in conclude(found, peaks):
            print("| " + " | ".join(row(r)) + " |", flush=True)
        results += found
    after = machine.load_average()
    print(f"\nLoad average {about['load_average']} before, {after} after (this run keeps every core busy by itself).")
    if options.json:
        about |= {"load_average_after": after}
        sizes = {name: getattr(options, name) for name in MODEL}
        everything = {"model": sizes, "machine": about, "ceilings": peaks, "results": results}
        Path(options.json).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()

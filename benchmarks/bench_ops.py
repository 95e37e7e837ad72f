"""python benchmarks/bench_ops.py  -- every operator on every backend, as a share of what this machine can do.

The cases are those that the tests mark `big`, and for what memory bounds one more, too large for any cache.  Arguments
come from the tests too, so what is timed is what is tested.
"""

import argparse
import json
import mmap
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
import cases  # noqa: E402
import machine  # noqa: E402
import test_ops  # noqa: E402
from barelm import _core  # noqa: E402

COPIED = 128 << 20  # bytes
BEYOND_CACHES = 256e6  # bytes: what is smaller is found in a cache, and is to stay there
HEADER = ("op", "backend", "precision", "shape", "ms", "rate", "% of ceiling", "spread %", "runs")


LARGE = {  # of operators that memory bounds: by what the case that tests mark `big` holds 256 MB and more
    "embedding_forward": dict(B=32),
    "embedding_backward": dict(B=32),
    "layernorm_forward": dict(N=45_000),
    "layernorm_backward": dict(N=45_000),
    "rmsnorm_forward": dict(N=45_000),
    "rmsnorm_backward": dict(N=45_000),
    "swiglu_forward": dict(N=11_000),
    "swiglu_backward": dict(N=7_000),
    "rope_forward": dict(B=22),
    "rope_backward": dict(B=22),
    "logprob_forward": dict(N=1_400),
    "logprob_backward": dict(N=700),
    "logprob_forward_backward": dict(N=700),
    "square_sums": dict(lengths=(68_000_000,)),
    "adamw": dict(lengths=(10_000_000,)),
}


def large_case(op):
    big = next(c for c in cases.CASES[op] if c.big)
    return cases.case("large", big=True, **(big.sizes | LARGE[op]))


def shown(c):
    """The case in a table: the letters with their values, options that are on by name."""
    hidden = ("prec", "scale", "step", "offset", "weight_decay")
    sizes = {name: value for name, value in c.sizes.items() if name not in hidden}
    if "lengths" in sizes:
        sizes = {"tensors": len(c.lengths), "n": sum(c.lengths)}
    words = [
        name if value is True else f"{name}={value}"
        for name, value in sizes.items()
        if value not in (None, False, "none")
    ]
    return " ".join(words)


def in_memory(a):
    """A copy on whole pages, huge ones where the system grants them, as the model's arrays lie (the tests' own end at a
    page instead).  Private: what processes could share is on small pages whatever is asked for."""
    a = np.ascontiguousarray(a)
    room = mmap.mmap(-1, max(a.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        room.madvise(mmap.MADV_HUGEPAGE)
    out = np.frombuffer(room, np.uint8, a.nbytes).view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def prepare(op, c):
    """The operator's arguments, in order.  What memory bounds and may work in place does so, as in a model: there an
    output's lines are at hand when they are written."""
    call = test_ops.OPERATORS[op](np.random.default_rng(0), c)
    arguments = {}
    for name, a in call.args.items():
        if isinstance(a, test_ops.Out):
            shape, mode, dtype = a.spec
            a = shape if mode == "in place" else np.zeros(shape, dtype)
        arguments[name] = in_memory(a) if isinstance(a, np.ndarray) else a
    if op in LARGE and call.aliases:
        output, given = call.aliases
        arguments[output] = arguments[given]
    return list(arguments.values())


def measure(function, seconds, between=None):
    """Seconds of each call, after one that warms up: at least five calls, or one where it takes longer than twice the
    time asked for (the plain backend's matrix products).  `between` is called in turn with it."""
    began = time.perf_counter()
    function()
    least = 1 if time.perf_counter() - began > 2 * seconds else 5
    times, stop = [], time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < least:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
        if between:
            between()
    return times


def bound_by(op, c, rates):
    """What takes longer at this machine's best: "copy", which is memory, or a precision's arithmetic."""
    precision = c.sizes.get("prec", "fp32")
    return precision if cases.flops(op, c) / rates[precision] > cases.bytes(op, c) / rates["copy"] else "copy"


def timed(op, c, call, seconds, rates):
    """(seconds of each call, work per second at best).  Memory is shared with other machines and twice as fast in one
    moment as in the next: what it bounds beyond the caches is compared with copies that take turns with it."""
    bound = bound_by(op, c, rates)
    if bound != "copy" or cases.bytes(op, c) < BEYOND_CACHES:
        return measure(call, seconds), rates[bound]
    values = np.random.default_rng(0).integers(0, 256, COPIED, np.uint8)  # zeros are copied faster on some machines
    src, dst, copies = in_memory(values), in_memory(values), []

    def copy():
        start = time.perf_counter()
        _core.copy_past_caches(dst, src)
        copies.append(2 * COPIED / (time.perf_counter() - start))

    return measure(call, seconds, copy), float(np.median(copies))


def result(op, backend, c, rates, seconds):
    arguments = prepare(op, c)
    times, best = timed(op, c, lambda: getattr(_core.ops, op)(backend, *arguments), seconds, rates)
    memory = bound_by(op, c, rates) == "copy"
    work, unit = (cases.bytes(op, c), "GB/s") if memory else (cases.flops(op, c), "GFLOP/s")
    median = float(np.median(times))
    low, high = np.quantile(times, [0.25, 0.75])
    return {
        "op": op,
        "backend": backend,
        "precision": c.sizes.get("prec", "fp32"),
        "why": c.why,
        "shape": shown(c),
        "seconds": median,
        "rate": work / median,
        "unit": unit,
        "ceiling": best,
        "share": work / median / best,
        "spread": float((high - low) / median),
        "runs": len(times),
        "bytes": cases.bytes(op, c),
    }


def row(r):
    return (
        r["op"],
        r["backend"],
        r["precision"],
        r["shape"],
        f"{r['seconds'] * 1e3:.3f}",
        f"{r['rate'] / 1e9:.1f} {r['unit']}",
        f"{100 * r['share']:.0f}",
        f"{100 * r['spread']:.0f}",
        str(r["runs"]),
    )


def selected(options):
    """(op, case) of what is asked for."""
    for op in (op for op in cases.CASES if options.only in op):
        yield from ((op, c) for c in cases.CASES[op] if c.big)
        if op in LARGE and not options.quick:
            yield op, large_case(op)


def run(options):
    backends = [options.backend] if options.backend else _core.backends()[: 1 if options.quick else None]
    rates = machine.ceilings(backends)
    machine.show_ceilings(rates)
    print("\n| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    results = []
    for op, c in selected(options):
        for backend in backends:
            results.append(result(op, backend, c, rates[backend], options.seconds))
            print("| " + " | ".join(row(results[-1])) + " |", flush=True)
    return {"ceilings": rates, "results": results}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2])
    parser.add_argument("--backend", choices=_core.backends(), help="this one; else all that run here")
    parser.add_argument("--only", default="", metavar="WORD", help="operators with this in their name")
    parser.add_argument("--quick", action="store_true", help="the best backend, the cases of the tests, 0.1 s for each")
    parser.add_argument("--seconds", type=float, help="for each line (default 0.5)")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    options = parser.parse_args()
    options.seconds = options.seconds or (0.1 if options.quick else 0.5)
    about = machine.describe()
    machine.show(about)
    found = run(options)
    after = machine.load_average()
    print(f"\nLoad average {about['load_average']} before, {after} after.")
    if options.json:
        about |= {"load_average_after": after}
        Path(options.json).write_text(json.dumps({"machine": about} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()

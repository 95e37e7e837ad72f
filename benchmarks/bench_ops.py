"""python benchmarks/bench_ops.py  -- every operator on every backend, as a share of what this machine can do.

The cases are those that the tests mark `big`, and for what memory bounds one more, too large for any cache.  Arguments
come from the tests too, so what is timed is what is tested.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
import cases  # noqa: E402
import machine  # noqa: E402
import test_ops  # noqa: E402
from barelm import _core  # noqa: E402

MIB = 2**20
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
    """A copy that begins on 64 bytes, as the model's arrays do (the tests' own end at a page instead)."""
    a = np.ascontiguousarray(a)
    room = np.empty(a.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    out = room[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


def prepare(op, c):
    """The operator's arguments, in order."""
    call = test_ops.OPERATORS[op](np.random.default_rng(0), c)
    arguments = []
    for a in call.args.values():
        if isinstance(a, test_ops.Out):
            shape, mode, dtype = a.spec
            a = shape if mode == "in place" else np.zeros(shape, dtype)
        arguments.append(in_memory(a) if isinstance(a, np.ndarray) else a)
    return arguments


def measure(function, seconds):
    """Seconds of each call, after one that warms up: at least five calls, or one where it takes longer than twice the
    time asked for (the plain backend's matrix products)."""
    began = time.perf_counter()
    function()
    least = 1 if time.perf_counter() - began > 2 * seconds else 5
    times, stop = [], time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < least:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def ceiling(op, c, precision, rates):
    """(work, unit, work per second at best): arithmetic or memory, whichever takes longer on this machine."""
    flops, traffic = cases.flops(op, c), cases.bytes(op, c)
    if flops / rates[precision] > traffic / rates["copy"]:
        return flops, "GFLOP/s", rates[precision]
    return traffic, "GB/s", rates["copy"]


def result(op, backend, c, times, rates):
    precision = c.sizes.get("prec", "fp32")
    work, unit, best = ceiling(op, c, precision, rates)
    median = float(np.median(times))
    low, high = np.quantile(times, [0.25, 0.75])
    return {
        "op": op,
        "backend": backend,
        "precision": precision,
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
        arguments = prepare(op, c)
        for backend in backends:
            times = measure(lambda: getattr(_core.ops, op)(backend, *arguments), options.seconds)  # noqa: B023
            results.append(result(op, backend, c, times, rates[backend]))
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

"""python benchmarks/bench_cuda.py  -- what a GPU can do, and which share of it the kernels reach at GPT-2's shapes.

Ceilings are a copy within the GPU's memory, and the matrix products of PyTorch's library (cuBLAS) at the same shapes,
with random values: zeros take less power and are faster.  Arrays are greater than the caches.  A time is the median of
several runs of many launches each, between two waits for the device.  Each row is printed and written to the JSON when
it has been measured; an operator that fails is a row that says so.  Whole steps beside PyTorch are
`bench_model.py --device cuda`.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]
import machine  # noqa: E402
from barelm import Config, Model, Session  # noqa: E402
from barelm.drawing import Sampling  # noqa: E402
from barelm.model import cuda_library, open_device  # noqa: E402
from emulated import FUNCTIONS, lost, recover, signatures, to_bf16  # noqa: E402

GELU_TANH, FP32, BF16, HYPER_COUNT = 1, 0, 1, 11  # of csrc/ops.h
BYTES = {"act": 2, "float": 4, "double": 8, "int32_t": 4, "bf16": 2}


@dataclass
class Sizes:
    """Of one micro-batch of GPT-2."""

    B: int = 64
    T: int = 1024
    C: int = 768
    NH: int = 12
    V: int = 50257
    layers: int = 12
    copied: int = 1 << 31  # bytes

    @property
    def N(self):
        return self.B * self.T

    @property
    def Vp(self):
        return -(-self.V // 64) * 64

    @property
    def n_params(self):
        return self.Vp * self.C + 12 * self.layers * self.C**2


TINY = Sizes(B=1, T=8, C=16, NH=2, V=70, layers=1, copied=1 << 12)  # to see that everything runs, in the emulation


class Device:
    """The library's operators on arrays in its memory."""

    def __init__(self):
        open_device("cuda")
        self.library = ctypes.CDLL(str(cuda_library()))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.cell, self.held = self.library.cuda_alloc(8), []
        self.noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def wait(self):
        self.library.cuda_copy_out(ctypes.byref(ctypes.c_double()), self.cell, 8)
        if error := self.library.cuda_error():
            raise RuntimeError(error.decode())

    def array(self, kind, n, values=None):
        """n values: those given, or small random ones; of doubles zeros."""
        size = n * BYTES[kind]
        pointer = self.library.cuda_alloc(size)
        if not pointer:
            self.wait()  # where something else failed it says so
            raise MemoryError(f"no memory for {size:,} bytes of {kind}")
        self.held.append((pointer, size))
        host = values if values is not None else self.noise * np.float32(0.02)
        if kind in ("act", "bf16"):
            host = to_bf16(host)
        for at in range(0, size if kind != "double" else 0, host.nbytes):
            self.library.cuda_copy_in(pointer + at, host.ctypes.data, min(host.nbytes, size - at))
        return pointer

    def free(self):
        for held in self.held:
            self.library.cuda_free(*held)
        self.held = []

    def call(self, op, *arguments):
        """Of an operator for activations in bf16."""
        convert = {"int": ctypes.c_int, "float": ctypes.c_float, "int64_t": ctypes.c_int64}
        kinds = [kind for _, kind in signatures()[op]]
        given = [convert.get(kind, ctypes.c_void_p)(a) for kind, a in zip(kinds, arguments, strict=True)]
        function = getattr(self.library, f"{op}_bf16")
        return lambda: function(*given)


def seconds_of(run, wait, seconds, rounds=5):
    """(median, spread) of one run; of a single one where it may take no time at all."""
    if seconds:
        run()
        wait()
    began = time.perf_counter()
    run()
    wait()
    once = max(time.perf_counter() - began, 1e-6)
    if not seconds:
        return once, 0.0
    n, found = max(1, min(1000, round(seconds / rounds / once))), []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(n):
            run()
        wait()
        found.append((time.perf_counter() - began) / n)
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75])
    return float(middle), float((high - low) / middle)


# ---- ceilings ----


def copy_bandwidth(device, s, seconds):
    """Bytes read and written per second."""
    a, b = device.array("float", s.copied // 4), device.array("float", s.copied // 4)
    copy = device.library.cuda_copy
    copy.restype, copy.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    time_, _ = seconds_of(lambda: copy(a, b, s.copied), device.wait, seconds)
    device.free()
    return 2 * s.copied / time_


def product_of_torch(torch, M, N, K, seconds):
    a = torch.randn(M, K, device="cuda", dtype=torch.bfloat16) * 0.02
    b = torch.randn(K, N, device="cuda", dtype=torch.bfloat16) * 0.02
    out = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    time_, _ = seconds_of(lambda: torch.mm(a, b, out=out), torch.cuda.synchronize, seconds)
    return 2 * M * N * K / time_


@cache
def library_product(M, N, K, seconds):
    """FLOP/s of PyTorch's product in bf16; None where there is no PyTorch for this GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    try:
        return product_of_torch(torch, M, N, K, seconds)
    except RuntimeError as failure:
        print(f"PyTorch's product of {M} x {N} x {K}: {failure}", file=sys.stderr)
        return None
    finally:
        torch.cuda.empty_cache()


# ---- operators: (name, sizes in words, the call, bytes that must move, work)
# work: (M, N, K) of a product, a number of FLOPs, or None where memory bounds it


def memory_bound(d, s):
    N, C, T, B = s.N, s.C, s.T, s.B
    unit = 2 * N * C  # an array of activations
    x, y, z, out = (d.array("act", N * C) for _ in range(4))
    row = [d.array("float", N) for _ in range(4)]
    w, b, dw, db, din_b = (d.array("float", C) for _ in range(5))
    ids = np.random.default_rng(1).integers(0, s.V, N).astype(np.int32)
    tokens, targets = (d.array("int32_t", N, ids) for _ in range(2))
    wte, wpe = d.array("float", s.Vp * C), d.array("float", T * C)
    words = f"{N} x {C}"
    embed = ("embedding_forward", out, tokens, None, wte, FP32, wpe, B, T, C)
    yield "embedding forward", words, embed, unit + 4 * (N * C + T * C), None
    back = ("embedding_backward", wte, wpe, x, tokens, None, B, T, C, s.Vp)
    yield "embedding backward", words, back, unit + 8 * (min(N, s.Vp) * C + T * C), None
    yield "layernorm forward", words, ("layernorm_forward", out, *row[:2], x, w, b, 1e-5, N, C), 2 * unit, None
    back = ("layernorm_backward", out, dw, db, din_b, y, z, x, w, *row[:2], N, C)
    yield "layernorm backward", words, back, 4 * unit, None
    yield "rmsnorm forward", words, ("rmsnorm_forward", out, row[0], x, w, 1e-5, N, C), 2 * unit, None
    yield "rmsnorm backward", words, ("rmsnorm_backward", out, dw, din_b, y, z, x, w, row[0], N, C), 4 * unit, None
    gated = d.array("act", 2 * N * C)
    yield "swiglu forward", words, ("swiglu_forward", out, gated, N, C), 3 * unit, None
    qkv, HS = d.array("act", 3 * N * C), C // s.NH
    angles = [d.array("float", T * HS // 2) for _ in range(2)]
    rope = ("rope_forward", qkv, *angles, None, B, T, s.NH, s.NH, HS)
    yield "rope forward", words, rope, 4 * unit, None
    n = s.n_params
    params, m, v, grads = (d.array("float", n) for _ in range(4))
    low, hyper = d.array("bf16", n), d.array("float", HYPER_COUNT, np.full(HYPER_COUNT, 0.5, np.float32))
    offsets = np.linspace(0, n, 149).astype(np.int64).view(np.int32)
    tensors, decays = d.array("int32_t", 298, offsets), d.array("int32_t", 148, np.ones(148, np.int32))
    yield "adamw", f"{n}", ("adamw", params, m, v, low, grads, hyper, tensors, decays, 148, n), 30 * n, None
    yield "weights to bf16", f"{n}", ("held_write", low, params, BF16, 16, n // 16), 6 * n, None
    squares = ("square_sums", d.array("double", 148), grads, tensors, 148)
    yield "square sums", f"{n}", squares, 4 * n, None
    rows = min(N, 4096)
    logits = d.array("act", rows * s.Vp)
    words = f"{rows} x {s.V}"
    lse = ("logprob_forward", *row[:2], None, logits, targets, 1.0, rows, s.V, s.Vp)
    yield "logprob forward", words, lse, 2 * rows * s.V, None
    back = ("logprob_backward", logits, row[2], logits, targets, row[1], 1.0, rows, s.V, s.Vp)
    yield "logprob backward", words, back, 4 * rows * s.V, None
    both = ("logprob_forward_backward", logits, *row[:2], row[2], logits, targets, 1.0, rows, s.V, s.Vp)
    yield "logprob, both", words, both, 4 * rows * s.V, None


def products(d, s):
    """Of a layer's four matrices and the head, each product with the epilogue that a step gives it."""
    rows = min(s.N, 4096)
    for name, N, C, OC, fn in (
        ("qkv", s.N, s.C, 3 * s.C, 0),
        ("attention out", s.N, s.C, s.C, 0),
        ("fc", s.N, s.C, 4 * s.C, GELU_TANH),
        ("fc out", s.N, 4 * s.C, s.C, 0),
        ("head", rows, s.C, s.Vp, 0),
    ):
        x, dx = (d.array("act", N * C) for _ in range(2))
        y, pre = (d.array("act", N * OC) for _ in range(2))
        weight, dweight = d.array("bf16", OC * C), d.array("float", OC * C)
        bias, dbias = (d.array("float", OC) for _ in range(2))
        residual = pre if "out" in name else None
        given = None if name == "head" else bias
        words, size = f"{N} x {C} x {OC}", 2 * (N * C + OC * C + N * OC)
        forward = ("linear_forward", y, pre if fn else None, x, weight, BF16, given, residual, fn, BF16, N, C, OC)
        yield f"{name} forward", words, forward, size, (N, OC, C)
        slope = (dx, GELU_TANH) if name == "fc out" else (None, 0)
        back = ("linear_backward_input", dx, y, None, weight, BF16, *slope, BF16, N, C, OC)
        yield f"{name} backward input", words, back, size, (N, C, OC)
        added = dbias if name in ("qkv", "fc") else None
        back = ("linear_backward_weight", dweight, added, y, x, int(name == "head"), BF16, N, C, OC)
        yield f"{name} backward weight", words, back, size + 2 * OC * C, (OC, C, N)
        d.free()


def attention(d, s):
    B, T, NH, HS = s.B, s.T, s.NH, s.C // s.NH
    qkv, dqkv = (d.array("act", 3 * s.N * s.C) for _ in range(2))
    out, dout = (d.array("act", s.N * s.C) for _ in range(2))
    lse = d.array("float", s.N * NH)
    flops, unit = 2 * B * NH * HS * T * (T + 1), 2 * s.N * s.C
    words, sizes = f"{B} x {T} x {NH} x {HS}", (None, BF16, B, T, NH, NH, HS)
    yield "attention forward", words, ("attention_forward", out, lse, qkv, *sizes), 4 * unit, flops
    back = ("attention_backward", dqkv, dout, qkv, out, lse, *sizes)
    yield "attention backward", words, back, 8 * unit, 5 * flops // 2


KINDS = memory_bound, products, attention
HEADER = ("operator", "sizes", "ms", "GB/s or TFLOP/s", "% of copy", "% of library", "by tile", "spread %")


def by_tile(device, call, seconds):
    """Seconds with each kind of tile that the product may have: the choice is to be the least of them."""
    tiling, found = device.library.barelm_cuda_tiling, []
    if call[0] in ("linear_forward", "linear_backward_input"):
        try:
            for kind in range(tiling(-1)):
                tiling(kind)
                found.append(seconds_of(device.call(*call), device.wait, seconds)[0])
        finally:
            tiling(-1)
    return found


def measured(device, call, moved, work, copy, seconds):
    """Of one operator."""
    time_, spread = seconds_of(device.call(*call), device.wait, seconds)
    product = work if isinstance(work, tuple) else None
    flops = 2 * float(np.prod(product, dtype=float)) if product else work
    library = library_product(*product, seconds) if product else None
    return dict(
        seconds=time_,
        spread=spread,
        bytes=moved,
        flops=flops,
        product=product,
        by_tile=by_tile(device, call, seconds),
        of_copy=None if flops else moved / time_ / copy,
        library=library,
        of_library=flops / time_ / library if library else None,
    )


def row(name, sizes, r):
    if "error" in r:
        return f"| {name} | {sizes} | {r['error']} |"
    rate = (r["flops"] or r["bytes"]) / r["seconds"]
    shares = ("" if share is None else f"{100 * share:.0f}" for share in (r["of_copy"], r["of_library"]))
    number = f"{rate / 1e12:.0f} TFLOP/s" if r["flops"] else f"{rate / 1e9:.0f} GB/s"
    tiles = " / ".join(f"{r['flops'] / t / 1e12:.0f}" for t in r["by_tile"])
    cells = (name, sizes, f"{1e3 * r['seconds']:.3f}", number, *shares, tiles, f"{100 * r['spread']:.0f}")
    return "| " + " | ".join(cells) + " |"


def operators(device, s, seconds, only, found, kind):
    for name, sizes, call, moved, work in kind(device, s):
        if only and not any(word in name for word in only):
            continue
        r = tried(device, measured, device, call, moved, work, found.all["copy"], seconds)
        print(row(name, sizes, r), flush=True)
        found.keep("operators", dict(name=name, sizes=sizes) | r)
        if lost:
            return


# ---- decoding ----

DECODE_HEADER = ("rows", "tokens before", "ms a step", "tokens/s", "% of copy", "spread %", "ms alone", "% alone")


def steps(model, s, tokens, rows, most=200, ahead=50):
    """The seconds of each step of a session and its draw; and those of a step alone, without the host: of several that
    are asked for one behind the other."""
    session = Session(model, rows * -(-2 * tokens // 64) * 64, "bf16")  # pages of 64 are a row's own
    ids = [session.add() for _ in range(rows)]
    prompt = np.random.default_rng(2).integers(0, s.V, tokens).astype(np.int32)
    session.advance(ids, [prompt] * rows)
    samplings, u, last = [Sampling(temperature=0)] * rows, [0.0] * rows, prompt[:rows]
    times = []
    for _ in range(max(2, min(tokens // 2, most))):
        began = time.perf_counter()
        session.advance(ids, last[:, None])
        last, _, _ = session.draw(samplings, u, s.V)
        times.append(time.perf_counter() - began)
    began, ahead = time.perf_counter(), min(ahead, tokens // 2)
    for _ in range(ahead):
        session.advance(ids, last[:, None])
    session.logits()
    alone = (time.perf_counter() - began) / ahead
    return dict(seconds=times, alone=alone, bytes=2 * s.n_params + 4 * rows * tokens * s.layers * s.C)


def decode_row(rows, tokens, r, copy):
    if "error" in r:
        return f"| {rows} | {tokens} | {r['error']} |"
    low, middle, high = np.quantile(r["seconds"][1:], [0.25, 0.5, 0.75])
    cells = (rows, tokens, f"{1e3 * middle:.3f}", f"{rows / middle:.0f}", f"{100 * r['bytes'] / middle / copy:.0f}")
    alone = f"{1e3 * r['alone']:.3f}", f"{100 * r['bytes'] / r['alone'] / copy:.0f}"
    return "| " + " | ".join(map(str, (*cells, f"{100 * (high - low) / middle:.0f}", *alone))) + " |"


def decode(device, s, tokens, counts, found):
    """A step of a session, by rows, from the tokens before to the most likely next ones: every weight is read once for
    all of them, and each row's keys and values."""
    config = Config(n_layer=s.layers, n_head=s.NH, n_embd=s.C, vocab_size=s.V, context=2 * tokens)
    print_header(DECODE_HEADER)
    model = Model(config, precision="bf16", device="cuda")
    for rows in counts:
        r = tried(device, steps, model, s, tokens, rows)
        print(decode_row(rows, tokens, r, found.all["copy"]), flush=True)
        found.keep("decode", dict(rows=rows, tokens=tokens) | r)
        if lost:
            return


# ---- all of it ----


class Found:
    """What was measured so far; the file has all of it at any time."""

    def __init__(self, about, path):
        self.all, self.path = {"machine": about, "operators": [], "decode": [], "failed": []}, path

    def keep(self, key, value):
        if isinstance(self.all.get(key), list):
            self.all[key].append(value)
        else:
            self.all[key] = value
        if self.path:
            Path(f"{self.path}.part").write_text(json.dumps(self.all, indent=1) + "\n")
            os.replace(f"{self.path}.part", self.path)

    def failures(self):
        return [r for r in self.all["operators"] + self.all["decode"] + self.all["failed"] if "error" in r]


def tried(device, work, *arguments):
    """What `work` gives, or why it failed; then the next can go on, unless the GPU is lost by it."""
    try:
        return work(*arguments)
    except (RuntimeError, MemoryError) as failure:
        return {"error": f"{failure}{recover(device.library)}"}


def print_header(names):
    print(f"\n| {' | '.join(names)} |\n|" + "---|" * len(names), flush=True)


def measure_all(device, s, seconds, options, found):
    copy = copy_bandwidth(device, s, seconds)
    found.keep("copy", copy)
    print(f"\nCopy: {copy / 1e12:.2f} TB/s, bytes read and written.")
    print_header(HEADER)
    parts = [(kind.__name__, operators, s, seconds, options.only, found, kind) for kind in KINDS]
    if not options.skip_decode:
        parts.append(("decode", decode, s, *((4, (1, 2)) if options.tiny else (1024, (1, 8, 64))), found))
    for name, work, *arguments in parts:
        failure = tried(device, work, device, *arguments)
        if failure:
            print(f"| {name} | | {failure['error']} |", flush=True)
            found.keep("failed", dict(name=name) | failure)
        if lost:
            return
        device.free()


def asked(what):
    """What nvidia-smi says of the GPU."""
    try:
        words = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no nvidia-smi"


def state():
    return asked("clocks.sm,clocks.mem,power.draw,temperature.gpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("  -- ")[2].splitlines()[0])
    parser.add_argument("--only", action="append", metavar="WORD", help="operators with this in their name")
    parser.add_argument("--skip-decode", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: to see that everything runs")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    options = parser.parse_args()
    about = machine.describe() | {"gpu": asked("name,driver_version,memory.total"), "gpu_before": state()}
    machine.show(about)
    print(f"- GPU: {about['gpu']}; clocks, power and temperature {about['gpu_before']}")
    found = Found(about, options.json)
    sizes, seconds = (TINY, 0.0) if options.tiny else (Sizes(), 0.3)
    measure_all(Device(), sizes, seconds, options, found)
    about["gpu_after"] = state()
    found.keep("machine", about)
    print(f"\nThe GPU's clocks, power and temperature: {about['gpu_before']} before, {about['gpu_after']} after.")
    if failures := found.failures():
        sys.exit(f"{len(failures)} failed" + (f"; {lost[0]}" if lost else ""))


if __name__ == "__main__":
    main()

"""The shapes every operator is tested and timed on, their arithmetic and their memory traffic.

tests/ and benchmarks/ both import this file.  CASES maps the name of an operator to its cases; a case has the letters
of csrc/ops.def as attributes, its options, `why` it is there, and `big`: GPT-2's own size, for benchmarks;
tests cut what only repeats in it and leave out the plain backend.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np


@dataclass
class Case:
    why: str
    big: bool = False
    sizes: dict = field(default_factory=dict)

    def __getattr__(self, name):  # only asked where the attribute is not a field
        if name == "sizes" or name not in self.sizes:
            raise AttributeError(name)
        return self.sizes[name]

    def __str__(self):
        shown = [f"{k}={v}" if v is not True else k for k, v in self.sizes.items() if v not in (None, False)]
        return f"{self.why}: {' '.join(shown)}"


def case(why, big=False, **sizes):
    return Case(why, big, sizes)


def make_starts(kind, B, T):
    """starts (B, T) int32, or None.

    packed    documents of several lengths, other ones in each row; some are one token long, some longer than a block
    ragged    left-padded rows: the padding sees only itself, the text only the text
    window    each query sees the last few keys, itself included
    """
    if kind is None:
        return None
    t, starts = np.arange(T), np.zeros((B, T), np.int32)
    for b in range(B):
        if kind == "packed":
            lengths = np.roll([4, 1, 3, 67, 2, 130, 16], -3 * b)
            borders = np.cumsum(np.tile(lengths, T // lengths.sum() + 1))
            first = np.concatenate([[0], borders])
            starts[b] = first[np.searchsorted(borders, t, side="right")]
        elif kind == "ragged":
            starts[b] = np.minimum(t, (3 + 13 * b) % T)
        elif kind == "window":
            starts[b] = np.maximum(0, t - (4 if T < 100 else 69))
        else:
            raise ValueError(f"starts: {kind!r} is not None, 'packed', 'ragged' or 'window'")
    return starts


STARTS = (None, "packed", "ragged", "window")

ACTS = [
    case("smallest", n=1),
    case("one past a vector of 16", n=17),
    case("several tasks", n=300_001),
]

ROWS = [
    case("smallest", N=1, C=1, ld=1),
    case("one past a vector of 16, rows apart", N=3, C=17, ld=40),
    case("rows that lie on no 16 bytes", N=5, C=19, ld=21),
    case("several tasks", N=3, C=100_003, ld=100_003),
]

EMBEDDING = [
    case("smallest", B=1, T=1, C=1, V=1, P=1, wpe=True, starts=None),
    case("no positions", B=2, T=5, C=9, V=7, P=5, wpe=False, starts=None),
    *(case("one past a vector", B=3, T=23, C=17, V=5, P=31, wpe=True, starts=kind) for kind in STARTS),
    case("many tokens of few kinds", B=4, T=100, C=33, V=3, P=100, wpe=True, starts="packed"),
    case("one token, whole vectors", B=4, T=100, C=40, V=1, P=100, wpe=True, starts=None),
    case("more rows than tokens", B=1, T=3, C=8, V=1000, P=64, wpe=True, starts=None),
    case("wider than a block of threads", B=1, T=3, C=2051, V=4, P=3, wpe=True, starts=None),
    case("several tiles and digits of a sort", B=3, T=400, C=5, V=700, P=400, wpe=True, starts="packed"),
    case("GPT-2", big=True, B=4, T=1024, C=768, V=50304, P=1024, wpe=True, starts=None),
]

NORM = [  # dweight: backward is asked for it
    case("smallest", N=1, C=1, options=True, offset=0, dweight=True),
    case("odd", N=3, C=7, options=False, offset=0, dweight=True),
    case("one past a vector of 8", N=5, C=9, options=True, offset=0, dweight=True),
    case("exactly a vector of 16", N=4, C=16, options=False, offset=0, dweight=True),
    case("one past a vector of 16", N=17, C=17, options=True, offset=0, dweight=True),
    case("mean far from 0", N=6, C=100, options=True, offset=100, dweight=True),
    case("many rows, odd", N=255, C=131, options=True, offset=0, dweight=True),
    case("wide, few rows", N=2, C=1601, options=False, offset=0, dweight=True),
    case("a weight that is not trained", N=19, C=37, options=False, offset=0, dweight=False),
    case("wider, in any place", N=3, C=3501, options=True, offset=0, dweight=True),
    case("too wide for shared memory", N=3, C=8201, options=True, offset=0, dweight=True),
    case("whole vectors, lanes with fewer", N=11, C=392, options=True, offset=0, dweight=True),
    case("whole vectors, twice as many", N=6, C=1000, options=False, offset=0, dweight=True),
    case("whole vectors, of GPT-2 1.5B", N=7, C=1600, options=False, offset=0, dweight=True),
    case("whole vectors, a block of many warps", N=5, C=2560, options=True, offset=0, dweight=True),
    case("whole vectors, too many for registers", N=5, C=5000, options=True, offset=0, dweight=True),
    case("GPT-2", big=True, N=1024, C=768, options=True, offset=0, dweight=True),
]


def linear_cases():
    on = dict(bias=True, residual=True, pre=True, accumulate=True)
    off = dict(bias=False, residual=False, pre=False, accumulate=False)
    for prec in ("fp32", "bf16"):
        yield case("smallest", N=1, C=1, OC=1, fn="gelu_tanh", prec=prec, **on)
        yield case("odd", N=3, C=5, OC=7, fn="none", prec=prec, **off)
        yield case("one past a vector of 8", N=9, C=9, OC=9, fn="gelu_erf", prec=prec, **on)
        yield case("one past a vector of 16", N=2, C=17, OC=17, fn="none", prec=prec, **(on | dict(residual=False)))
        yield case("one past two tiles", N=17, C=33, OC=97, fn="gelu_tanh", prec=prec, **(on | dict(pre=False)))
        block = 256 if prec == "fp32" else 512  # values of a K block
        yield case("one past a K block of C", N=20, C=block + 1, OC=20, fn="none", prec=prec, **on)
        yield case("one past two K blocks of C", N=7, C=513, OC=35, fn="gelu_erf", prec=prec, **off)
        yield case("several K blocks of C", N=18, C=1100, OC=6, fn="none", prec=prec, **(off | dict(bias=True)))
        yield case("several K blocks of OC", N=6, C=19, OC=1025, fn="gelu_tanh", prec=prec, **on)
        yield case("several K blocks of N", N=1031, C=13, OC=21, fn="gelu_tanh", prec=prec, **on)
        yield case("few rows, five K blocks", N=5, C=2100, OC=9, fn="none", prec=prec, **(off | dict(bias=True)))
        yield case("most of few rows, five K blocks", N=16, C=2100, OC=9, fn="none", prec=prec, **on)
        yield case("decode: one row", N=1, C=600, OC=131, fn="gelu_erf", prec=prec, **on)
        yield case("all edges", N=70, C=300, OC=203, fn="gelu_tanh", prec=prec, **on)
        yield case("rows on 16 bytes", N=140, C=136, OC=200, fn="gelu_tanh", prec=prec, **on)
        yield case(
            "rows on 16 bytes, residual", N=140, C=136, OC=200, fn="none", prec=prec, **(off | dict(residual=True))
        )
        plain = off | dict(bias=True, accumulate=True)
        yield case("GPT-2 qkv", big=True, N=1024, C=768, OC=2304, fn="none", prec=prec, **plain)
        yield case(
            "GPT-2 attention out",
            big=True,
            N=1024,
            C=768,
            OC=768,
            fn="none",
            prec=prec,
            **(plain | dict(residual=True)),
        )
        yield case(
            "GPT-2 MLP in", big=True, N=1024, C=768, OC=3072, fn="gelu_tanh", prec=prec, **(plain | dict(pre=True))
        )
        yield case(
            "GPT-2 MLP out", big=True, N=1024, C=3072, OC=768, fn="none", prec=prec, **(plain | dict(residual=True))
        )
        yield case("GPT-2 head", big=True, N=16, C=768, OC=50304, fn="none", prec=prec, **off)
        yield case("GPT-2 decode", big=True, N=1, C=768, OC=3072, fn="gelu_tanh", prec=prec, **plain)


LINEAR = list(linear_cases())
# Sums so long that they are cut into pieces: over C forward, over OC backward.  No longer than that takes.
_ON = dict(fn="gelu_tanh", bias=True, residual=True, pre=True, accumulate=True)
CUT_C = case("C cut into pieces", N=77, C=14001, OC=51, prec="fp32", **_ON)
CUT_OC = case("OC cut into pieces", N=77, C=51, OC=27001, prec="bf16", **_ON)

GELU = [
    case("smallest", N=1, F=1, fn="gelu_tanh"),
    case("odd", N=3, F=7, fn="gelu_erf"),
    case("one past two vectors of 16", N=5, F=33, fn="gelu_tanh"),
    case("several tasks", N=250, F=131, fn="gelu_erf"),
    case("GPT-2's size", big=True, N=1024, F=3072, fn="gelu_tanh"),
]

LORA = [  # accumulate: of the gather alone
    case("smallest", rows=[(0, 1)], r=1, OC=1, accumulate=True),
    case("queries and values of a Llama", rows=[(0, 20), (28, 36)], r=3, OC=36, accumulate=False),
    case("three groups, rows between and behind", rows=[(2, 9), (9, 12), (30, 41)], r=17, OC=50, accumulate=True),
    case("several tasks", rows=[(0, 3000), (3000, 6000)], r=8, OC=6001, accumulate=True),
    case("Llama-3.2-1B", big=True, rows=[(0, 2048), (2048, 2560), (2560, 3072)], r=16, OC=3072, accumulate=False),
]

SWIGLU = [
    case("smallest", N=1, F=1),
    case("odd", N=3, F=7),
    case("one past a vector of 8", N=2, F=9),
    case("one past a vector of 16", N=5, F=17),
    case("many rows", N=200, F=33),
    case("wider than a block of threads", N=2, F=2051),
    case("GPT-2's size", big=True, N=1024, F=2048),
]

ROPE = [
    case("smallest", B=1, T=1, NH=1, NKV=1, HS=2, starts=None),
    *(case("odd half head", B=2, T=19, NH=3, NKV=3, HS=6, starts=kind) for kind in STARTS),
    case("one past a vector of 8, grouped", B=2, T=5, NH=4, NKV=2, HS=18, starts=None),
    case("one past a vector of 16, grouped", B=1, T=70, NH=4, NKV=1, HS=34, starts="packed"),
    case("more pairs than a block has threads", B=1, T=2, NH=30, NKV=3, HS=130, starts=None),
    case("GPT-2's size", big=True, B=1, T=1024, NH=12, NKV=12, HS=64, starts=None),
]


def attention_cases():
    for prec in ("fp32", "bf16"):
        one = dict(prec=prec, starts=None, scale=1)
        yield case("smallest", B=1, T=1, NH=1, NKV=1, HS=1, **one)
        yield case("odd", B=2, T=5, NH=3, NKV=3, HS=7, **one)
        yield case("one past a vector of 8", B=1, T=9, NH=2, NKV=2, HS=9, **one)
        yield case("one past a vector of 16", B=1, T=17, NH=2, NKV=1, HS=17, **one)
        yield case("exactly a key block", B=1, T=64, NH=2, NKV=2, HS=16, **one)
        yield case("one past a key block, grouped", B=2, T=65, NH=4, NKV=2, HS=20, **one)
        yield case("wide head", B=1, T=70, NH=1, NKV=1, HS=129, **one)
        yield case("more queries than are prepared together", B=1, T=1030, NH=1, NKV=1, HS=4, **one)
        yield case("scores far apart", B=1, T=150, NH=2, NKV=2, HS=32, **(one | dict(scale=4)))
        yield case("huge scores", B=1, T=66, NH=1, NKV=1, HS=16, **(one | dict(scale=40)))
        for kind in STARTS:
            yield case("short", B=3, T=11, NH=2, NKV=1, HS=8, **(one | dict(starts=kind)))
            yield case("several key blocks", B=2, T=203, NH=4, NKV=2, HS=24, **(one | dict(starts=kind)))
        yield case("GPT-2", big=True, B=1, T=1024, NH=12, NKV=12, HS=64, **one)
        yield case("Llama, grouped, packed", big=True, B=1, T=1000, NH=8, NKV=2, HS=64, **(one | dict(starts="packed")))


ATTENTION = list(attention_cases())

LOGPROB = [
    case("smallest", N=1, V=1, Vp=1, invtemp=1.0, entropy=True),
    case("less than a vector, padded", N=3, V=7, Vp=8, invtemp=1.0, entropy=False),
    case("exactly a vector of 16", N=5, V=16, Vp=16, invtemp=1.7, entropy=True),
    case("one past two vectors of 16", N=4, V=33, Vp=40, invtemp=0.6, entropy=True),
    case("one past a vector of 8", N=2, V=9, Vp=64, invtemp=1.0, entropy=True),
    case("many rows", N=131, V=100, Vp=128, invtemp=1.3, entropy=True),
    case("wider than a block of threads", N=3, V=6999, Vp=7003, invtemp=1.0, entropy=True),
    case("three vectors a thread, whole", N=2, V=12999, Vp=13008, invtemp=1.0, entropy=True),
    case("GPT-2", big=True, N=16, V=50257, Vp=50304, invtemp=1.0, entropy=True),
]

# temperature, top_k, top_p, min_p
SAMPLE_OPTIONS = {
    "greedy": [(0, 0, 1, 0)],
    "plain": [(1, 0, 1, 0)],
    "top-k": [(1, 50, 1, 0)],
    "top-p": [(1, 0, 0.9, 0)],
    "min-p": [(1, 0, 1, 0.05)],
    "all": [(0.8, 200, 0.95, 0.02)],
    "many": [
        (1, 0, 1, 0),
        (0.7, 0, 1, 0),
        (1e-6, 5, 0.5, 0.1),
        (100, 0, 1, 0),
        (1, 1, 1, 0),
        (1.3, 5, 1, 0),
        (2, 1e6, 0.999999, 0),
        (1, 0, 1e-6, 0),
        (1, 0, 0.5, 0),
        (100, 0, 0.97, 0),
        (100, 20, 0.6, 0.99),
        (1, 0, 1, 0.1),
        (1, 40, 0.9, 0.01),
        (0, 3, 0.5, 0.5),
        (1.7, 30, 0.999, 0.5),
    ],
}

SAMPLE = [
    case("smallest", N=2, V=1, Vp=1, options="many"),
    case("less than a vector, padded", N=30, V=7, Vp=8, options="many"),
    case("one past a vector of 8", N=30, V=9, Vp=64, options="many"),
    case("one past two vectors of 16", N=30, V=33, Vp=40, options="many"),
    case("several blocks of sums", N=30, V=3001, Vp=3003, options="many"),
    case("three slices of a row", N=15, V=8200, Vp=8200, options="many"),
    case("many rows", N=131, V=100, Vp=128, options="many"),
    *(case("GPT-2", big=True, N=1, V=50257, Vp=50304, options=kind) for kind in SAMPLE_OPTIONS if kind != "many"),
]

SQUARE_SUMS = [
    case("no tensor", lengths=()),
    case("smallest", lengths=(1,)),
    case("empty ones between", lengths=(0, 5, 0, 17, 1, 0)),
    case("odd", lengths=(7, 9, 16, 33, 1000, 3)),
    case("one long", lengths=(300001,)),
    case("shares longer than a block of threads", lengths=(70001, 0, 3, 1_000_000)),
    case("GPT-2 block", big=True, lengths=(768 * 2304, 768 * 768, 768 * 3072, 3072 * 768) + (768,) * 6),
]

LOSS = [
    case("nothing", N=0),
    case("one", N=1),
    case("several to a thread", N=1000),
]

CLIP_SCALE = [
    case("nothing", n=0, max_norm=1.0, bad=""),
    case("one", n=1, max_norm=1.0, bad=""),
    case("off", n=3, max_norm=0.0, bad=""),
    case("below", n=5, max_norm=1e4, bad=""),
    case("many", n=149, max_norm=0.7, bad=""),
    # why there is no update
    *(case("none is made", n=300, max_norm=1.0, bad=bad) for bad in ("norm_limit", "loss_limit", "norm", "loss")),
]

ADAMW = [  # lengths of tensors; where there is decay, the second of each two has none
    case("smallest", lengths=(1,), step=1, weight_decay=0.1, made=True),
    case("odd", lengths=(7,), step=1, weight_decay=0.0, made=True),
    case("one past a vector of 8", lengths=(9,), step=3, weight_decay=0.1, made=True),
    case("one past a vector of 16", lengths=(17,), step=100, weight_decay=0.1, made=True),
    case("tensors within a vector", lengths=(3, 1, 0, 2, 40, 5, 0), step=2, weight_decay=0.1, made=True),
    case("no update", lengths=(1300, 200), step=1, weight_decay=0.1, made=False),
    case("several threads", lengths=(768, 33_000, 66_235), step=7, weight_decay=0.1, made=True),
    case("GPT-2 block", big=True, lengths=(7_077_888, 9_984), step=7, weight_decay=0.1, made=True),
]

CASES = {
    "act_read": ROWS,
    "act_write": ACTS,
    "embedding_forward": EMBEDDING,
    "embedding_backward": EMBEDDING,
    "layernorm_forward": NORM,
    "layernorm_backward": NORM,
    "rmsnorm_forward": NORM,
    "rmsnorm_backward": NORM,
    "linear_forward": [*LINEAR, CUT_C],
    "linear_backward_input": [*LINEAR, CUT_OC],
    "linear_backward_weight": LINEAR,
    "gelu_forward": GELU,
    "gelu_backward": GELU,
    "lora_spread": LORA,
    "lora_gather": LORA,
    "swiglu_forward": SWIGLU,
    "swiglu_backward": SWIGLU,
    "rope_forward": ROPE,
    "rope_backward": ROPE,
    "attention_forward": ATTENTION,
    "attention_backward": ATTENTION,
    "logprob_forward": LOGPROB,
    "logprob_backward": LOGPROB,
    "logprob_forward_backward": LOGPROB,
    "sample": SAMPLE,
    "square_sums": SQUARE_SUMS,
    "loss_add": LOSS,
    "clip_scale": CLIP_SCALE,
    "adamw": ADAMW,
}


def pairs_seen(c):
    """Pairs of a query and a key it sees, over all rows and one head."""
    starts = make_starts(c.starts, c.B, c.T)
    return c.B * c.T * (c.T + 1) // 2 - (0 if starts is None else int(starts.sum()))


def flops(op, c):
    """Multiplications and additions of the matrix products of one call; 0 where memory bounds the operator."""
    if op.startswith("linear"):
        return 2 * c.N * c.C * c.OC
    if op.startswith("attention"):  # forward QK, PV; backward QK again, dout V, and the three gradients
        return (4 if op.endswith("forward") else 10) * c.NH * c.HS * pairs_seen(c)
    return 0


def bytes(op, c):
    """Bytes of the arrays of one call, each read or written once (a "+=" output both)."""
    s = SimpleNamespace(**c.sizes)
    if op.startswith("embedding"):
        rows = s.B * s.T * s.C
        return 4 * rows * (2 + s.wpe) if op.endswith("forward") else 4 * rows * (3 + 2 * s.wpe)
    if op in ("layernorm_forward", "rmsnorm_forward"):
        return 4 * 2 * s.N * s.C
    if op in ("layernorm_backward", "rmsnorm_backward"):
        return 4 * (4 if s.options else 3) * s.N * s.C
    if op == "linear_forward":
        return 4 * (s.N * s.C + s.OC * s.C + s.N * s.OC * (1 + s.pre + s.residual))
    if op == "linear_backward_input":
        return 4 * (s.N * s.C * (1 if s.fn == "none" else 2) + s.OC * s.C + s.N * s.OC)
    if op == "linear_backward_weight":
        return 4 * (s.N * s.C + s.OC * s.C * (1 + s.accumulate) + s.N * s.OC)
    if op.startswith("act_"):
        return 8 * s.n
    if op.startswith("gelu"):
        return 4 * s.N * s.F * (2 if op.endswith("forward") else 3)
    if op.startswith("lora"):
        return 4 * s.r * (s.OC * len(s.rows) + sum(end - begin for begin, end in s.rows))
    if op.startswith("swiglu"):
        return 4 * s.N * s.F * (3 if op.endswith("forward") else 5)
    if op.startswith("rope"):
        return 4 * 2 * s.B * s.T * (s.NH + s.NKV) * s.HS
    if op.startswith("attention"):
        rows = s.B * s.T * s.HS
        qkv, out = rows * (s.NH + 2 * s.NKV), rows * s.NH
        return 4 * (qkv + out if op.endswith("forward") else 2 * qkv + 2 * out)
    if op.startswith("logprob"):
        return 4 * s.N * (s.V if op.endswith("forward") else s.V + s.Vp)
    if op == "sample":
        return 4 * s.N * s.V
    if op == "square_sums":
        return 4 * sum(s.lengths)
    if op == "loss_add":
        return 8 * s.N
    if op == "clip_scale":
        return 8 * s.n
    if op == "adamw":
        return 4 * 7 * sum(s.lengths)
    raise KeyError(op)

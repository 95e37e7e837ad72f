"""Attention and draws of cuda/ on the CPU, thread by thread, as in test_cuda.py: values against tests/reference.py, the
bits of every schedule, and planted faults.

Cases are those of cases.py, cut where size only repeats.  Heads of 64 and 128 values are added: they come by cp.async
where activations are bf16.
"""

import ctypes
import math
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import reference
import test_ops
from cases import ATTENTION, SAMPLE, case, make_starts
from conftest import guarded
from emulated import COMPILER, ON_GPU, ROOT, Backend, compile_object, link, to_bf16
from faults import FAULTS, planted_always
from test_cuda import ELSEWHERE, Stored, check_values, run
from test_ops import KEY_BLOCK, PREC, same_bits

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)")


def smaller(c):
    """Of a long row two heads are as good as more; 140 positions are three blocks of keys, and 80 are two.  On a GPU
    only the reference takes time: with all heads of GPT-2 10 s."""
    if ON_GPU:
        return replace(c, sizes=c.sizes | dict(NH=4, NKV=4 * c.NKV // c.NH)) if c.big else c
    T = min(c.T, 140 if c.prec == "bf16" and c.starts != "window" else 80)
    fewer = dict(B=1, NH=min(c.NH, 2), NKV=1 if c.NKV < c.NH else min(c.NKV, 2)) if T > 70 else {}
    return replace(c, sizes=c.sizes | fewer | dict(T=T))


SHORT = [smaller(c) for c in ATTENTION if ON_GPU or not c.big]
ONE = dict(B=1, prec="bf16", starts=None, scale=1)
GROUPED = case("64 values, grouped", **(ONE | dict(T=90, NH=4, NKV=2, HS=64)))
FAST = [
    GROUPED,
    case("64 values, a tile and a bit", **(ONE | dict(T=150, NH=2, NKV=1, HS=64, starts="packed"))),
    case("one past 64 values", **(ONE | dict(T=66, NH=1, NKV=1, HS=65))),
    case("128 values", **(ONE | dict(T=97, NH=1, NKV=1, HS=128, starts="ragged"))),
]
if ON_GPU:  # for those of Hopper, which test_cuda_attention_sm90.py has for the emulation
    FAST += [
        case("64 values, one position", **(ONE | dict(T=1, NH=1, NKV=1, HS=64))),
        case("64 values, three tiles, the last a few", **(ONE | dict(T=260, NH=2, NKV=2, HS=64))),
        case("64 values, documents in every row", **(ONE | dict(B=2, T=290, NH=2, NKV=1, HS=64, starts="packed"))),
        case("128 values, large scores", **(ONE | dict(T=129, NH=2, NKV=1, HS=128, scale=8))),
        case("128 values, windows", **(ONE | dict(T=70, NH=1, NKV=1, HS=128, starts="window"))),
        case("128 values, documents", **(ONE | dict(B=2, T=290, NH=4, NKV=2, HS=128, starts="packed"))),
        case("128 values, long", **(ONE | dict(T=1024, NH=1, NKV=1, HS=128))),
    ]
# Heads of the keys in 5/7 of a Hopper's SMs and more: one kernel makes all gradients.
FULL = [
    case("a head for most SMs", **(ONE | dict(B=8, T=200, NH=12, NKV=12, HS=64))),
    case("groups, and documents", **(ONE | dict(B=8, T=135, NH=24, NKV=12, HS=64, starts="packed"))),
    case("more heads than SMs", **(ONE | dict(B=16, T=70, NH=12, NKV=12, HS=64))),
]
QUICK = [SHORT[i] for i, c in enumerate(SHORT) if c.prec == "bf16" and (c.T == 1 or (c.why == "short" and c.starts))]
CASES = [("float", c) for c in SHORT if c.prec == "fp32" or c.T < 100]
# fp32 products of bf16 activations: the kernels are those of fp32, only what they load and store differs
CASES += [("bf16", c) for c in [*SHORT, *FAST] if c.prec == "bf16" or c.T < 20]


def rounded(draw):
    return lambda *args, **kwargs: reference.bf16(draw(*args, **kwargs)).astype(np.float32)


def rounded_arguments(rng, c, draw=test_ops.attention_arguments):
    qkv, starts = draw(rng, c)
    return reference.bf16(qkv).astype(np.float32), starts


def build(act, op, c):
    """The call.  For activations in bf16 inputs are rounded before anything is computed from them; and as the gradient
    takes d = dout.out of the `out` that it gets, which is rounded too, so does the reference here."""
    rng = np.random.default_rng(c.T)
    if act == "float":
        return test_ops.OPERATORS[op](rng, c)
    arguments = dict(normal=rounded(test_ops.normal), attention_arguments=rounded_arguments)
    with mock.patch.multiple(test_ops, Call=Stored, **arguments):
        call = test_ops.OPERATORS[op](rng, c)
    if op == "attention_backward":
        call.want = with_given_out(c, call, call.want)
    return call


def with_given_out(c, call, want):
    def heads(a):
        return a.astype(np.float64).reshape(c.B, c.T, c.NH, c.HS).swapaxes(1, 2)

    def wanted():
        value, tol = want()["dqkv"]
        qkv, dout, out = (call.args[name].astype(np.float64) for name in ("qkv", "dout", "out"))
        q, k, _ = reference.split_heads(qkv, c.NH, c.NKV)
        exact, _, _, probs = reference.attention_forward(qkv, c.NH, c.NKV, call.args["starts"])
        more = (heads(dout) * (heads(exact) - heads(out))).sum(-1, keepdims=True) * probs / math.sqrt(c.HS)
        dq, dk = more @ np.repeat(k, c.NH // c.NKV, 1), more.swapaxes(-1, -2) @ q
        dk = dk.reshape(c.B, c.NKV, -1, c.T, c.HS).sum(2)
        parts = [reference.merge_heads(a) for a in (dq, dk, np.zeros_like(dk))]
        return dict(dqkv=(value + np.concatenate(parts, -1), tol))

    return wanted


def ids(cases):
    return [f"{act}-{c}" for act, c in cases]


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
@pytest.mark.parametrize(("cuda", "c"), CASES, ids=ids(CASES), indirect=["cuda"])
def test_values_and_the_same_bits_under_every_schedule(cuda, c, op):
    check_values(cuda, build(cuda.act, op, c))


# ---- what the contract says of bits


def attention(cuda, qkv, starts, prec, NH, NKV):
    B, T, width = qkv.shape
    HS = width // (NH + 2 * NKV)
    out, lse = guarded(np.full((B, T, NH * HS), np.nan, np.float32)), guarded(np.full((B, NH, T), np.nan, np.float32))
    starts = None if starts is None else guarded(starts, constant=True)
    cuda("attention_forward", out, lse, guarded(qkv, constant=True), starts, PREC[prec], B, T, NH, NKV, HS)
    return out, lse


by_prec = pytest.mark.parametrize(("cuda", "prec"), [("float", "fp32"), ("bf16", "bf16")], indirect=["cuda"])


@by_prec
def test_a_prefix_does_not_depend_on_what_follows_nor_a_row_on_its_batch(cuda, rng, prec):
    B, T, NH, NKV, HS = 2, 140, 2, 1, 24
    qkv, starts = test_ops.normal(rng, B, T, (NH + 2 * NKV) * HS, scale=2), make_starts("ragged", B, T)
    out, lse = attention(cuda, qkv, starts, prec, NH, NKV)
    for b, k in (0, 1), (1, 65), (0, 129), (1, 140):
        part = attention(cuda, qkv[b : b + 1, :k], starts[b : b + 1, :k].copy(), prec, NH, NKV)
        assert same_bits(part[0][0], out[b, :k]) and same_bits(part[1][0], lse[b, :, :k]), (b, k)


@by_prec
def test_a_packed_document_has_the_bits_of_the_document_alone(cuda, rng, prec):
    B, T, NH, NKV = 1, 170, 2, 1
    qkv, starts = test_ops.normal(rng, B, T, (NH + 2 * NKV) * 24, scale=2), make_starts("packed", B, T)
    out, lse = attention(cuda, qkv, starts, prec, NH, NKV)
    for first in np.unique(starts[0]):
        last = np.flatnonzero(starts[0] == first)[-1] + 1
        alone = attention(cuda, qkv[:, first:last], None, prec, NH, NKV)
        assert same_bits(alone[0][0], out[0, first:last]) and same_bits(alone[1][0], lse[0, :, first:last]), first


@by_prec
@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
def test_no_rows(cuda, op, prec):
    call = build(cuda.act, op, replace(QUICK[0], sizes=QUICK[0].sizes | dict(prec=prec))).part([])
    assert all(a.size == 0 for a in run(cuda, call).values())


@by_prec
def test_a_row_of_a_batch_has_the_gradient_that_it_has_alone(cuda, rng, prec):
    call = build(cuda.act, "attention_backward", case("", **(ONE | dict(B=2, T=70, NH=2, NKV=1, HS=8, prec=prec))))
    whole = run(cuda, call)["dqkv"]
    for b in 0, 1:
        assert same_bits(run(cuda, call.part([b]))["dqkv"][0], whole[b])


@pytest.mark.skipif(not ON_GPU, reason="of test_cuda_attention_sm90.py; so many heads take minutes thread by thread")
@pytest.mark.parametrize("cuda", ["bf16"], indirect=True)
@pytest.mark.parametrize("c", FULL, ids=str)
def test_heads_that_fill_a_hopper(cuda, c):
    """Gradients of a batch are made by one kernel there, of a row alone by two: the same bits."""
    call = build("bf16", "attention_backward", c)
    check_values(cuda, call)
    whole = run(cuda, call)["dqkv"]
    for b in 0, c.B - 1:
        assert same_bits(run(cuda, call.part([b]))["dqkv"][0], whole[b])


@by_prec
@pytest.mark.parametrize("HS", [7, 64])
def test_attention_hears_nothing_of_its_neighbours(cuda, rng, HS, prec):
    """One head of one document, and NaN everywhere else."""
    B, T, NH = 1, 41, 2
    mine = np.s_[0, 5:38, ..., 1, :]
    starts = np.repeat(np.array([0, 5, 38], np.int32), [5, 33, 3])[None]
    qkv = test_ops.normal(rng, B, T, 3 * NH * HS)
    out, lse = attention(cuda, qkv, starts, prec, NH, NH)
    noisy = np.full((B, T, 3, NH, HS), np.nan, np.float32)
    noisy[mine] = qkv.reshape(noisy.shape)[mine]
    got, got_lse = attention(cuda, noisy.reshape(qkv.shape), starts, prec, NH, NH)
    shape = B, T, 1, NH, HS
    assert same_bits(got.reshape(shape)[mine], out.reshape(shape)[mine])
    assert same_bits(got_lse[0, 1, 5:38], lse[0, 1, 5:38]) and np.isfinite(lse[0, 1, 5:38]).all()


# ---- pages


class Cache:
    """Pages in an order of their own, at first full of NaN, and rows that take tokens in chunks."""

    def __init__(self, cuda, rng, rows, NH, NKV, HS, prec, P=3):
        page_bytes = getattr(cuda.library, f"page_bytes_{cuda.act}")
        page_bytes.restype = ctypes.c_int64
        self.cuda, self.heads, self.prec, self.P = cuda, (NH, NKV, HS), prec, P
        size = page_bytes(PREC[prec], NKV, HS)
        assert size % 16 == 0
        self.pages = guarded(np.full((rows * P, size // 4), np.nan, np.float32))
        self.table = rng.permutation(rows * P).reshape(rows, P).astype(np.int32)
        self.past = np.zeros(rows, np.int32)

    def step(self, rows, chunks):
        """chunks: qkv (n, (NH + 2 NKV) HS) of each row; returns out (n, NH HS) of each."""
        NH, _, HS = self.heads
        first = np.cumsum([0] + [len(chunk) for chunk in chunks]).astype(np.int32)
        out = guarded(np.full((first[-1], NH * HS), np.nan, np.float32))
        arrays = np.concatenate(chunks), self.table[rows], first, self.past[rows]
        qkv, table, first_, past = (guarded(a, constant=True) for a in arrays)
        size = len(rows), self.P, *self.heads
        self.cuda("attention_paged", out, self.pages, qkv, table, first_, past, PREC[self.prec], *size)
        self.past[rows] += np.diff(first)
        return np.split(out, first[1:-1])


# NH, NKV, HS; the last: more queries of few tokens than a product has rows
HEADS = [(3, 3, 7), (4, 2, 20), (2, 1, 64), (1, 1, 65), (1, 1, 128), (1, 1, 129), (5, 1, 8)]
PAGED = [  # the last: pages that the table has room for, few enough for strips of values or not
    *(
        ("float", prec, heads, P)
        for prec, P in (("fp32", 3), ("bf16", 3), ("bf16", 33))
        for heads in ((1, 1, 1), (4, 2, 20))
    ),
    *(("bf16", "bf16", heads, P) for heads in HEADS for P in (3, 33)),
]


def check_pages(cuda, rng, prec, heads, P):
    """As test_packed.py: rows that grow in turn have the bits of one forward pass, whatever the schedule."""
    NH, NKV, HS = heads
    rows = [test_ops.normal(rng, T, (NH + 2 * NKV) * HS) for T in (1, 131, 69)]
    want = [attention(cuda, qkv[None], None, prec, NH, NKV)[0][0] for qkv in rows]
    cache, got = Cache(cuda, rng, len(rows), NH, NKV, HS, prec, P), [[] for _ in rows]
    takes = [[1, 0, 62], [0, 66, 4], [0, 4, 3], [0, 61, 0]]
    for seed, take in enumerate(takes):
        cuda.schedule(seed)
        live = np.flatnonzero(take) if seed % 2 else np.arange(len(rows))[::-1]  # a row may bring nothing
        chunks = [rows[r][cache.past[r] : cache.past[r] + take[r]] for r in live]
        for r, out in zip(live, cache.step(live, chunks), strict=True):
            got[r].append(out)
    for r, qkv in enumerate(rows):
        assert cache.past[r] == len(qkv)
        assert same_bits(np.concatenate(got[r]), want[r]), r
    return cache


@pytest.mark.parametrize(
    ("cuda", "prec", "heads", "P"), PAGED, ids=["-".join(map(str, which)) for which in PAGED], indirect=["cuda"]
)
def test_paged_attention_has_the_bits_of_one_forward_pass(cuda, rng, prec, heads, P):
    check_pages(cuda, rng, prec, heads, P)


def check_many_pages(cuda, rng, P, HS=8):
    """So many that a warp has several of them: the last token alone has the bits that it has as the last of five, which
    goes the way of a prompt.  What the pages hold is random."""
    past, heads = (P - 1) * KEY_BLOCK, (1, 1, HS)
    cache, qkv, outs = Cache(cuda, rng, 1, *heads, "bf16", P), test_ops.normal(rng, 5, 3 * HS), []
    cache.pages.view(np.uint16)[...] = to_bf16(test_ops.normal(rng, *cache.pages.view(np.uint16).shape))
    for chunks in (5,), (4, 1):
        cache.past[0], at = past, 0
        for n in chunks:
            out, at = cache.step([0], [qkv[at : at + n]])[0], at + n
        outs.append(out[-1])
    assert same_bits(*outs) and np.isfinite(outs[0]).all()


@pytest.mark.parametrize("cuda", ["bf16"], indirect=True)
@pytest.mark.parametrize("P", [32, 66])
def test_many_pages(cuda, rng, P):
    check_many_pages(cuda, rng, P)


@by_prec
def test_a_step_of_decoding_has_the_same_bits_under_every_schedule_and_in_any_batch(cuda, rng, prec):
    NH, NKV, HS = 2, 1, 24
    chunk = test_ops.normal(rng, 70, (NH + 2 * NKV) * HS)
    other = test_ops.normal(rng, 3, (NH + 2 * NKV) * HS)
    seen = []
    for seed in range(4):
        cache = Cache(cuda, np.random.default_rng(seed), 2, NH, NKV, HS, prec)
        cache.step(np.array([1]), [chunk[:69]])
        cuda.schedule(seed)
        seen.append(cache.step(np.arange(2), [other, chunk[69:]])[1] if seed else cache.step([1], [chunk[69:]])[0])
    assert all(same_bits(seen[0], out) for out in seen[1:])


@by_prec
def test_pages_of_other_rows_are_not_written(cuda, rng, prec):
    NH, NKV, HS = 2, 1, 20
    for tokens in 3, 70:
        cache = Cache(cuda, rng, 3, NH, NKV, HS, prec)
        cache.step(np.array([1]), [test_ops.normal(rng, tokens, (NH + 2 * NKV) * HS)])
        pages = cache.pages.view(np.uint32)
        untouched = set(range(9)) - set(cache.table[1, : -(-tokens // KEY_BLOCK)].tolist())
        assert all((pages[i] == np.float32(np.nan).view(np.uint32)).all() for i in untouched)


# ---- draws: no activations, so one library is enough

DRAWS = [replace(c, sizes=c.sizes | dict(N=min(c.N, 15 if c.V < 1000 else 5))) for c in SAMPLE if ON_GPU or not c.big]
as_float = pytest.mark.parametrize("cuda", ["float"], indirect=True)


@as_float
@pytest.mark.parametrize("c", DRAWS, ids=str)
def test_draws(cuda, c):
    check_values(cuda, test_ops.sample(np.random.default_rng(c.V), c))


def draw(cuda, logits, u, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """As test_draws.draw: one row of logits for each number u."""
    logits, u = np.atleast_1d(np.asarray(logits, np.float32)), np.atleast_1d(np.asarray(u, np.float64))
    N, V = len(u), len(logits)
    options = np.tile(np.array([temperature, top_k, top_p, min_p], np.float32), (N, 1))
    tokens, logprobs = guarded(np.full(N, -77, np.int32)), guarded(np.full(N, np.nan, np.float32))
    cuda(
        "sample", tokens, logprobs, *(guarded(a, constant=True) for a in (np.tile(logits, (N, 1)), options, u)), N, V, V
    )
    return tokens.tolist(), logprobs


BELOW_ONE = np.nextafter(1.0, 0.0)


@as_float
def test_draws_with_a_story(cuda):
    """Of test_draws.py, whose rows are longer, what cannot come, equals, what is far apart."""
    for bad in np.nan, -np.nan, np.inf:
        for v in 0, 150, 299:
            logits = np.where(np.arange(300) == v, bad, 0.0)
            assert all(draw(cuda, logits, 0.5, t)[0] == [-1] for t in (0.0, 1.0))
    assert draw(cuda, np.full(40, -np.inf), 0.5)[0] == [-1]
    zeros = np.where(np.arange(1200) % 2, 0.0, -0.0)
    for k in 1, 600, 1199:
        tokens, logprobs = draw(cuda, zeros, [0.0, BELOW_ONE], top_k=k)
        assert tokens == [0, k - 1]
        np.testing.assert_allclose(logprobs, -math.log(k), rtol=1e-6)
    assert draw(cuda, zeros, BELOW_ONE, top_p=0.6)[0] == [math.ceil(1200 * float(np.float32(0.6))) - 1]
    assert draw(cuda, zeros, BELOW_ONE, 0.0)[0] == [0]
    zeros = np.zeros(5000)
    assert draw(cuda, zeros, [0.0, BELOW_ONE], top_k=4999)[0] == [0, 4998]
    assert draw(cuda, zeros, BELOW_ONE, top_p=0.9)[0] == [math.ceil(5000 * float(np.float32(0.9))) - 1]
    assert draw(cuda, [*zeros, 1.0], 0.0, top_k=1)[0] == [5000]
    assert draw(cuda, [*np.ones(10), *zeros], BELOW_ONE, top_k=4000)[0] == [3999]
    assert draw(cuda, zeros[:4], BELOW_ONE, top_k=2, top_p=0.9)[0] == [1]
    small, top_p = math.exp(-13), float(np.float32(0.995))  # of 5001 weights the small ones are 1 %
    last = math.ceil((top_p * (1 + 5000 * small) - 1) / small)
    assert draw(cuda, [0.0, *(zeros - 13)], BELOW_ONE, top_p=top_p)[0] == [last]
    logits = np.full(1500, -np.inf)
    logits[[700, 800, 1100]] = 1.0
    for options in dict(), dict(top_k=4), dict(top_k=1000), dict(top_p=0.99), dict(min_p=0.5):
        assert draw(cuda, logits, [0.0, 0.5, BELOW_ONE], **options)[0] == [700, 800, 1100]
    for logits in [3e38, -3e38, 2e38], [-3e38, -np.inf, -3.2e38], [1e-42, -1e-42, -1e38]:
        for options in dict(), dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1), dict(temperature=1e-45):
            tokens, logprobs = draw(cuda, logits, [0.0, 0.4], **options)
            assert tokens == [0, 0] and np.isfinite(logprobs).all()


@as_float
@pytest.mark.skipif(not ON_GPU, reason="takes 12 s thread by thread")
def test_draws_from_a_row_of_more_slices_than_threads(cuda):
    logits = np.full(4096 * 1024 + 5000, -200.0)
    logits[[0, 4096 * 3 + 7, -1]] = 1.0
    assert draw(cuda, logits, [0.0, 0.5, BELOW_ONE])[0] == [0, 4096 * 3 + 7, len(logits) - 1]
    assert draw(cuda, logits, BELOW_ONE, top_k=3)[0] == [len(logits) - 1]


# ---- planted faults


def check_all(cuda, file):
    """Of the operators of a file what is quick and takes every path: tiles, tails, groups, starts, cp.async."""
    rng = np.random.default_rng(0)
    if file == "sample.cu":
        test_draws_with_a_story(cuda)
        for c in DRAWS[3], DRAWS[5]:
            check_values(cuda, test_ops.sample(rng, c))
    elif file == "attention_paged.cu":
        for P in 3, 33:
            check_pages(cuda, rng, "bf16", (2, 1, 64), P)
        check_pages(cuda, rng, "bf16", (5, 1, 8), 3)
        for P in 32, 66:
            check_many_pages(cuda, rng, P)
    else:
        for c in *QUICK, GROUPED:
            for op in "attention_forward", "attention_backward":
                check_values(cuda, build(cuda.act, op, c))


PLANTED = planted_always([fault for fault in FAULTS if fault.first == f"tests/{Path(__file__).name}"])


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.what)
def test_a_planted_fault_is_caught(fault, cuda_objects, tmp_path):
    for path in (ROOT / "cuda").glob("attention*.cu*"):  # a header is found beside what includes it
        shutil.copy(path, tmp_path)
    changed = tmp_path / Path(fault.file).name
    changed.write_text((ROOT / fault.file).read_text().replace(fault.old, fault.new))
    act = "float" if changed.name == "sample.cu" else "bf16"
    broken = changed.name if changed.suffix == ".cu" else f"{changed.stem}.cu".replace("attention_plain", "attention")
    objects = {key: value for key, value in cuda_objects.items() if key[0].split(".")[0] in (*ELSEWHERE, "emulate")}
    objects[broken, act] = compile_object(
        tmp_path / broken, tmp_path / "broken.o", f"-DACT={act}", "-Wno-unused", "-O0"
    )
    caught = pytest.raises((RuntimeError, AssertionError, pytest.fail.Exception))
    with Backend(link(objects.values(), tmp_path / "broken.so"), act) as cuda, caught as found:
        check_all(cuda, broken)
    print(str(found.value).splitlines()[0])

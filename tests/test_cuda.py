"""The kernels of cuda/ on the CPU, thread by thread, against tests/reference.py: values, and the same bits in whatever
order blocks and threads run, and wherever arrays lie.  What this can find, and what not, is in cuda/README.md.
Attention and draws are in test_cuda_attention.py.

Calls, references and tolerances are those of test_ops.py.  For activations in bf16 the reference gets inputs that were
rounded to it, and an output may be half a unit in the last place of bf16 further off: it is rounded once, at the end.

With BARELM_CUDA_LIBRARY=.../libbarelm_cuda.so the same calls go to a GPU instead, and those of GPT-2's own size too.
"""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import reference
import test_ops
from cases import CASES, Case
from conftest import guarded, prefilled
from emulated import (
    ACTS,
    COMPILER,
    ON_GPU,
    ROOT,
    Backend,
    activations,
    compile_object,
    link,
    signatures,
    sources,
    to_bf16,
)
from faults import FAULTS, planted_always
from test_ops import assert_close, filled, same_bits

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)")

BF16, INT8, EPS = test_ops.PREC["bf16"], 2, test_ops.EPS
SEEDS = (1,) if ON_GPU else (1, 2, 3)  # of the unfair schedules, beside the one in order; there a second run
HEADERS = {"linear.cuh": "linear.cu", "linear_few.cuh": "linear.cu", "norm.cuh": "norm.cu"}  # and who includes it
ELSEWHERE = ("attention", "attention_paged", "sample")  # files of operators that test_cuda_attention.py tests


@cache
def operators():
    """{operator: the file that defines it}"""
    text = {path.name: path.read_text() for path in sources() if path.stem not in ELSEWHERE}
    return {op: name for op in signatures() for name in text if f"\nvoid OPERATOR({op})(" in text[name]}


class Stored(test_ops.Call):
    """A call whose activations are bf16 numbers, as its reference sees them."""

    def __post_init__(self):
        for i in activations(self.op):
            a = self.args[list(self.args)[i]]
            a = a.spec[0] if isinstance(a, test_ops.Out) else a
            if isinstance(a, np.ndarray):
                a[...] = reference.bf16(a)
        super().__post_init__()


def rounded_logits(rng, c, draw=test_ops.logprob_arguments):  # what is saved by forward is computed from them
    logits, *others = draw(rng, c)
    return reference.bf16(logits).astype(np.float32), *others


def build(act, op, number):
    c = CASES[op][number]
    if op.startswith("logprob"):
        c = replace(c, sizes=c.sizes | dict(N=min(c.N, 12)))  # rows repeat, and a block has many threads
    if act == "float":
        return test_ops.OPERATORS[op](np.random.default_rng(number), c)
    with mock.patch.multiple(test_ops, Call=Stored, logprob_arguments=rounded_logits):
        return test_ops.OPERATORS[op](np.random.default_rng(number), c)


def run_into(cuda, call, **arrays):
    cuda(call.op, *(arrays.get(name, a) for name, a in call.args.items()))


def run(cuda, call):
    out = {name: filled(*spec) for name, spec in call.outputs.items()}
    run_into(cuda, call, **out)
    return out


def half_a_unit(x):
    """Of the last place of bf16, which keeps 8 bits."""
    return np.ldexp(1.0, np.frexp(x)[1] - 9)


def answer(cuda, call):
    """{output: (value, tolerance)}"""
    stored = [list(call.args)[i] for i in activations(call.op)] if cuda.act == "bf16" else []
    return {
        name: (value, tol + half_a_unit(np.abs(value) + tol) * (value != 0) if name in stored else tol)
        for name, (value, tol) in call.want().items()
    }


def worth_its_time(act, op, c):
    """A thread here is a thousand times slower than on a GPU, where all sizes are.  What holds no activations is run
    once; products in the precision that goes with the type of activations, and one case in the other; and each is at
    least one tile."""
    if not ON_GPU and (c.big or max(c.sizes.get("C", 0), c.sizes.get("OC", 0)) > 5000):
        return False
    if op.startswith("linear"):
        less = c.why in ("one past a vector of 8", "one past a vector of 16", "one past two K blocks of C")
        if less and not ON_GPU:
            return False
        return c.prec == {"float": "fp32", "bf16": "bf16"}[act] or c.why == "one past two tiles"
    return act == "float" or bool(activations(op))


def small_cases(act, keep=lambda op, c: True):
    """(operator, number of its case)"""
    found = [(op, i, c) for op in operators() if op in CASES for i, c in enumerate(CASES[op])]
    return [(op, i) for op, i, c in found if worth_its_time(act, op, c) and keep(op, c)]


def every_case(keep=lambda op, c: True):
    found = [(act, which) for act in ACTS for which in small_cases(act, keep)]
    ids = [f"{act}-{op}-{CASES[op][i]}" for act, (op, i) in found]
    return pytest.mark.parametrize(("cuda", "which"), found, ids=ids, indirect=["cuda"])


def check_values(cuda, call, seeds=SEEDS):
    """Values, and the same bits under every schedule."""
    cuda.schedule(0)
    results = prefilled(lambda **out: run_into(cuda, call, **out), **call.outputs)
    for name, (value, tol) in answer(cuda, call).items():
        assert_close(name, results[name], value, tol)
    for seed in seeds:
        cuda.schedule(seed)
        other = run(cuda, call)
        for name in results:
            assert same_bits(results[name], other[name]), f"{name}, schedule {seed}"


@every_case()
def test_values_and_the_same_bits_under_every_schedule(cuda, which):
    check_values(cuda, build(cuda.act, *which))


def is_small(op, c):
    return (not c.big and not op.startswith("linear")) or c.why in ("one past two tiles", "one past a K block of C")


@every_case(keep=lambda op, c: is_small(op, c) and test_ops.has_rows(op, c))
def test_a_row_alone_has_the_bits_it_has_in_a_batch_and_none_give_nothing(cuda, which):
    call = build(cuda.act, *which)
    N = call.args[call.batch]
    whole = run(cuda, call)
    for rows in [N // 2], [N - 1], list(range(N // 2)):
        part = run(cuda, call.part(rows))
        for name in set(call.batched) & set(call.outputs):
            assert same_bits(part[name], whole[name][rows]), (name, rows)
    none = call.part([])
    results = prefilled(lambda **out: run_into(cuda, none, **out), **none.outputs)
    assert all((a == 0).all() for a in results.values())


@every_case(keep=lambda op, c: is_small(op, c) and test_ops.may_share(op, c))
def test_in_place_where_the_contract_permits(cuda, which):
    check_in_place(cuda, build(cuda.act, *which))


def check_in_place(backend, call):
    """An output that is the array of an input has the bits that it has by itself."""
    output, given = call.aliases
    whole = run(backend, call)
    shared = guarded(call.args[given])
    others = {name: filled(*spec) for name, spec in call.outputs.items() if name != output}
    run_into(backend, call, **others, **{output: shared, given: shared})
    for name, a in (others | {output: shared}).items():
        assert same_bits(a, whole[name]), name


def on_every_tiling(op, c):
    return op in ("linear_forward", "linear_backward_input") and c.prec == "bf16" and c.N > 16


@pytest.mark.skipif(not ON_GPU, reason="test_cuda_sm90.py has it for the emulation")
@every_case(keep=on_every_tiling)
def test_every_tiling_of_a_hopper_has_the_same_bits(cuda, which):
    tiling, call = cuda.library.barelm_cuda_tiling, build(cuda.act, *which)
    if not tiling(-1):
        pytest.skip("no Hopper")
    whole = run(cuda, call)
    try:
        for kind in range(tiling(-1)):
            tiling(kind)
            other = run(cuda, call)
            for name in whole:
                assert same_bits(whole[name], other[name]), (name, kind)
    finally:
        tiling(-1)


def room(*shape):
    return guarded(np.full(shape, np.nan, np.float32))


def check_rows_behind_a_norm(cuda, seeds=SEEDS):
    """The bits of the norm by itself and then the product, whether the product makes its norm, for few rows, or not."""
    rng = np.random.default_rng(0)
    for N, C, norm in (1, 70, 0), (3, 520, 0), (4, 24, 1), (5, 20, 1), (2, 1040, 1), (2, 2056, 0):
        OC, biased = 19, N % 2
        x, w, bias = test_ops.normal(rng, N, C), to_bf16(test_ops.normal(rng, OC, C)), test_ops.normal(rng, OC)
        gain, shift = test_ops.normal(rng, C), test_ops.normal(rng, C) if biased else None
        normed, sums, want = room(N, C), room(2, N), room(N, OC)
        cuda.schedule(0)
        if norm == 0:
            cuda("layernorm_forward", normed, sums[0], sums[1], x, gain, shift, 1e-5, N, C)
        else:
            cuda("rmsnorm_forward", normed, sums[0], x, gain, 1e-5, N, C)
        product = w, bias, test_ops.FN["gelu_tanh"], BF16, N, C, OC
        cuda("linear_packed", want, normed, *product[:2], None, *product[2:])
        for seed in (0, *seeds):
            cuda.schedule(seed)
            out = room(N, OC)
            cuda("norm_linear_packed", out, room(N, C), room(2, N), x, norm, gain, shift, 1e-5, *product)
            assert same_bits(out, want), (N, C, seed)


def check_small_behind_large(cuda):
    """Gradients of weights: one row of 2^24, and a 1 in each of 20 later blocks of rows, which floats would lose."""
    rows, block = 21 * 128, 128
    d, x = np.ones((rows, 8), np.float32), np.zeros((rows, 8), np.float32)
    x[::block] = 1
    x[0] = 2.0**24
    dweight = np.zeros((8, 8), np.float32)
    cuda("linear_backward_weight", dweight, None, d, x, 0, BF16, rows, 8, 8)
    assert (dweight == 2.0**24 + 20).all()


def check_int8(cuda, seeds=SEEDS):
    """As test_packed.py, whose tolerances these are: tails of rows, columns and groups, and more groups than are added
    at a time.  A row alone has the bits that it has among others."""
    rng = np.random.default_rng(0)
    packed_bytes = getattr(cuda.library, f"packed_bytes_{cuda.act}")
    packed_bytes.restype = ctypes.c_int64
    for N, C, OC, fn in (1, 70, 19, "gelu_tanh"), (18, 200, 9, "none"), (2, 66 * 64, 8, "none"):
        x, w, residual = test_ops.normal(rng, N, C), test_ops.normal(rng, OC, C), test_ops.normal(rng, N, OC)
        bias = test_ops.normal(rng, OC) if N > 1 else None
        if cuda.act == "bf16":
            x, residual = reference.bf16(x).astype(np.float32), reference.bf16(residual).astype(np.float32)
        x[0, : C // 3] = 0  # groups of zeros
        packed = np.zeros(packed_bytes(INT8, C, OC), np.uint8)
        cuda.schedule(0)
        cuda("linear_pack", packed, w, INT8, C, OC)
        terms = reference.linear_int8(x, w)
        want, pre = reference.linear_forward(terms.sum(-1), np.eye(OC), *test_ops.f64(bias, residual), fn)
        dpre = EPS * (test_ops.DOT * np.abs(terms).sum(-1) + np.abs(pre))
        tol = 1.13 * dpre + test_ops.function_tolerance(fn, pre)[0] + EPS * np.abs(want)
        tol += half_a_unit(np.abs(want) + tol) if cuda.act == "bf16" else 0
        whole = None
        for seed in (0, *seeds):
            cuda.schedule(seed)
            out, alone = room(N, OC), room(1, OC)
            cuda("linear_packed", out, x, packed, bias, residual, test_ops.FN[fn], INT8, N, C, OC)
            cuda("linear_packed", alone, x[-1:], packed, bias, residual[-1:], test_ops.FN[fn], INT8, 1, C, OC)
            assert_close("out", out, want, tol)
            whole = out if whole is None else whole
            assert same_bits(out, whole) and same_bits(alone[0], whole[-1]), seed


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("cuda", ["float"], indirect=True)
def test_an_update_writes_the_weights_in_bf16_too(cuda, rng, made):
    lengths = (3, 1, 4_000, 71)
    sizes = dict(lengths=lengths, step=2, weight_decay=0.1, made=made)
    call, rounded = test_ops.adamw(rng, Case("", False, sizes)), np.full(sum(lengths), 7, np.uint16)
    out = {name: filled(*spec) for name, spec in call.outputs.items()}
    run_into(cuda, call, rounded=rounded, **out)
    assert (rounded == (to_bf16(out["weights"]) if made else 7)).all()


@pytest.mark.parametrize("cuda", ACTS, indirect=True)
def test_products_in_int8(cuda):
    check_int8(cuda)


@pytest.mark.parametrize("cuda", ACTS, indirect=True)
def test_small_values_behind_large_ones(cuda):
    check_small_behind_large(cuda)


@pytest.mark.parametrize("cuda", ACTS, indirect=True)
def test_rows_behind_a_norm(cuda):
    check_rows_behind_a_norm(cuda)


@pytest.mark.parametrize(
    "fault",
    planted_always([f for f in FAULTS if Path(f.file).name in {*operators().values(), *HEADERS}]),
    ids=lambda fault: fault.what,
)
def test_a_planted_fault_is_caught(fault, cuda_objects, tmp_path):
    (tmp_path / Path(fault.file).name).write_text((ROOT / fault.file).read_text().replace(fault.old, fault.new))
    source = ROOT / "cuda" / HEADERS.get(Path(fault.file).name, Path(fault.file).name)
    act = "bf16" if source.name == "linear.cu" else "float"  # tensor cores are where the faults are
    changed = tmp_path / source.name
    for name in source.name, *HEADERS:  # a header is found beside what includes it
        if not (tmp_path / name).exists():
            shutil.copy(ROOT / "cuda" / name, tmp_path)
    effort = "-O1" if source.name == "linear.cu" else "-O0"  # products take longer to run than to compile
    broken = compile_object(changed, tmp_path / "broken.o", f"-DACT={act}", effort, "-Wno-unused")
    others = [object_ for which, object_ in cuda_objects.items() if which != (source.name, act)]
    library = link([broken, *others], tmp_path / "broken.so")
    mine = [(op, i) for op, i in small_cases(act) if operators()[op] == source.name]
    assert mine or source.name == "packed.cu"
    caught = pytest.raises((RuntimeError, AssertionError, pytest.fail.Exception))
    with Backend(library, act) as cuda, caught as found:
        for seeds in (), SEEDS:  # most are found in order
            for op, i in sorted(mine, key=lambda which: which[1]):  # small ones come first
                check_values(cuda, build(act, op, i), seeds)
            if source.name == "linear.cu":
                check_rows_behind_a_norm(cuda, seeds)
                check_small_behind_large(cuda)
            if source.name == "packed.cu":
                check_int8(cuda, seeds)
    print(found.value)


@pytest.mark.parametrize(
    ("command", "status"), [("echo fine", 0), ("exit 3", 3), ("echo 'ptxas info : (C7510) ..' >&2", 1)]
)
def test_a_strict_build_stops_where_tensor_cores_wait(command, status):
    done = subprocess.run(["sh", ROOT / "cuda" / "checked.sh", "sh", "-c", command], stderr=subprocess.DEVNULL)
    assert done.returncode == status

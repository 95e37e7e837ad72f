"""cuda/attention_sm90.cu on the CPU, thread by thread: cases and tolerances of test_cuda_attention.py, where heads have
64 or 128 values, and the bits of attention by mma.sync.

On a GPU test_cuda_attention.py tests it, where that is a Hopper.
"""

import ctypes
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_cuda_attention as attention
from cases import case
from emulated import COMPILER, ROOT, Backend, compile_object, link
from faults import FAULTS, planted_always
from test_cuda import check_values, run
from test_cuda_attention import FAST, GROUPED, ONE, build
from test_ops import same_bits

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)"),
    pytest.mark.skipif("BARELM_CUDA_LIBRARY" in os.environ, reason="on a GPU test_cuda_attention.py tests it"),
]

FILES = (
    "attention.cu",
    "attention_paged.cu",
    "attention_sm90.cu",
    "attention_backward_sm90.cu",
    "attention_few_sm90.cu",
)
OPS = ("attention_forward", "attention_backward")  # the second with 64 values alone
ALL = 132  # blocks at most
CHOSEN = -1  # by the sizes: whether one kernel makes all gradients
CASES = [c for c in FAST if c.HS in (64, 128)] + [
    case("one position", **(ONE | dict(T=1, NH=1, NKV=1, HS=64))),
    case("documents in every row of a batch", **(ONE | dict(B=2, T=135, NH=1, NKV=1, HS=64, starts="packed"))),
    case("three tiles, the last a few", **(ONE | dict(B=1, T=260, NH=1, NKV=1, HS=64))),
    case("documents over three tiles", **(ONE | dict(B=1, T=290, NH=1, NKV=1, HS=64, starts="packed"))),
    case("large scores", **(ONE | dict(T=129, NH=2, NKV=1, HS=128, scale=8))),
    case("windows", **(ONE | dict(T=70, NH=1, NKV=1, HS=128, starts="window"))),
]


class Hopper(Backend):
    def __init__(self, library):
        super().__init__(library, "bf16")
        self.blocks(ALL)
        self.hopper(True)

    def blocks(self, most, joint=CHOSEN):
        self.library.emulate_attention_bf16(ctypes.c_int(most))
        self.library.emulate_attention_backward_bf16(ctypes.c_int(most), ctypes.c_int(joint))

    def hopper(self, on):
        self.library.emulate_sm90(int(on))


@pytest.fixture(scope="module")
def objects(cuda_objects):
    return {name: cuda_objects[name] for name in [*((file, "bf16") for file in FILES), ("emulate", None)]}


@pytest.fixture
def hopper(objects, tmp_path_factory):
    library = tmp_path_factory.getbasetemp() / "attention_hopper.so"
    if not library.exists():
        link(objects.values(), library)
    backend = Hopper(library)
    backend.schedule(0)
    return backend


WHICH = [(op, c) for op in OPS for c in CASES if op == OPS[0] or c.HS == 64]
WHICH.append((OPS[0], case("heads in two sections", **(ONE | dict(B=2, T=130, NH=23, NKV=1, HS=64)))))
every_case = pytest.mark.parametrize("which", WHICH, ids=[f"{op}-{c}" for op, c in WHICH])


@every_case
def test_values_and_the_same_bits_under_every_schedule(hopper, which):
    check_values(hopper, build("bf16", *which))


@pytest.mark.parametrize("c", [c for op, c in WHICH if op == OPS[1]], ids=str)
def test_one_kernel_for_all_gradients_under_every_schedule(hopper, c):
    hopper.blocks(2, joint=1)
    check_values(hopper, build("bf16", OPS[1], c))


def check_bits(hopper, op, c):
    """Of one and two blocks, which have several items each, and of attention by mma.sync."""
    call = build("bf16", op, c)
    whole = run(hopper, call)
    ways = [(1, True, 5, 0), (2, True, 6, 0), (-1, False, 0, 0)]  # -1: Hopper's launch would have no blocks
    ways += [(1, True, 7, 1), (2, True, 0, 1), (ALL, True, 8, 1)] if op == "attention_backward" else []
    for most, on, seed, joint in ways:
        hopper.blocks(most, joint)
        hopper.hopper(on)
        hopper.schedule(seed)
        other = run(hopper, call)
        for name in whole:
            assert same_bits(whole[name], other[name]), (name, most, joint)
    hopper.blocks(ALL)
    hopper.hopper(True)


@every_case
def test_bits_are_those_of_any_number_of_blocks_and_of_other_gpus(hopper, which):
    check_bits(hopper, *which)


@pytest.mark.parametrize("HS", [64, 128])
def test_attention_hears_nothing_of_its_neighbours(hopper, rng, HS):
    attention.test_attention_hears_nothing_of_its_neighbours(hopper, rng, HS, "bf16")


def check_few(hopper, rng, seeds=(0, 1, 2)):
    """Few tokens behind pages: of a group of heads, of more queries than a product has rows, with a page for each warp
    of a cluster, and with some for none; prompts besides."""
    attention.check_pages(hopper, rng, "bf16", (2, 1, 64), 3)
    attention.check_pages(hopper, rng, "bf16", (5, 1, 64), 4)
    for seed in seeds:
        for P in 32, 10, 1:
            hopper.schedule(seed)
            attention.check_many_pages(hopper, rng, P, 64)
    hopper.schedule(0)


def test_few_tokens_have_the_bits_of_a_prompt(hopper, rng):
    check_few(hopper, rng)


def test_pages_and_rows_of_a_batch_have_the_bits_of_the_whole(hopper, rng):
    for heads, P in ((2, 1, 64), 33), ((1, 1, 128), 3):
        attention.check_pages(hopper, rng, "bf16", heads, P)
    for op in OPS:
        call = build("bf16", op, replace(GROUPED, sizes=GROUPED.sizes | dict(B=2)))
        whole = run(hopper, call)
        for b in 0, 1:
            part = run(hopper, call.part([b]))
            assert all(same_bits(part[name][0], whole[name][b]) for name in whole)


@pytest.mark.parametrize("op", OPS)
def test_no_rows(hopper, op):
    assert all(a.size == 0 for a in run(hopper, build("bf16", op, GROUPED).part([])).values())


@pytest.mark.parametrize(
    "fault",
    planted_always([f for f in FAULTS if f.first == f"tests/{Path(__file__).name}"]),
    ids=lambda fault: fault.what,
)
def test_a_planted_fault_is_caught(fault, objects, tmp_path):
    for path in (ROOT / "cuda").glob("attention*.cu*"):  # a header is found beside what includes it
        shutil.copy(path, tmp_path)
    (tmp_path / Path(fault.file).name).write_text((ROOT / fault.file).read_text().replace(fault.old, fault.new))
    op, file = (OPS[1], FILES[3]) if "backward" in fault.file else (OPS[0], FILES[2])
    file = FILES[4] if "few" in fault.file else file
    broken = compile_object(tmp_path / file, tmp_path / "broken.o", "-DACT=bf16", "-O0", "-Wno-unused")
    library = link((objects | {(file, "bf16"): broken}).values(), tmp_path / "broken.so")
    caught = pytest.raises((RuntimeError, AssertionError, pytest.fail.Exception))
    with Hopper(library) as hopper, caught as found:
        if file == FILES[4]:
            check_few(hopper, np.random.default_rng(0))
        test_attention_hears_nothing_of_its_neighbours(hopper, np.random.default_rng(0), 64)
        for c in (c for which, c in WHICH if which == op):
            for joint in (0, 1) if op == OPS[1] else (CHOSEN,):
                hopper.blocks(ALL, joint)
                check_values(hopper, build("bf16", op, c), (1, 2))
            check_bits(hopper, op, c)
    print(found.value)

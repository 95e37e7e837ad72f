"""The products of cuda/linear_sm90.cu on the CPU, thread by thread: the cases and tolerances of test_cuda.py, on every
tiling, with several tiles for a block and with rows in parts.

On a GPU test_cuda.py tests them, where that is a Hopper.
"""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
from cases import CASES
from emulated import COMPILER, ROOT, Backend, compile_object, link
from faults import FAULTS, planted_always
from test_cuda import build, check_in_place, check_small_behind_large, check_values, run, small_cases
from test_ops import may_share, same_bits

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)"),
    pytest.mark.skipif("BARELM_CUDA_LIBRARY" in os.environ, reason="on a GPU test_cuda.py tests them"),
]

TILINGS = {0: "128x192", 1: "128x160", 2: "128x128"}
CHOSEN = -1  # by the sizes
LEAST_ROWS = 512  # of a part of the rows
HEADER = {name: "linear_sm90.cu" for name in ("linear_write_sm90.cuh", "prim_sm90.cuh")}  # and a file that includes it


class Hopper(Backend):
    def __init__(self, library):
        super().__init__(library, "bf16")
        self.library.emulate_sm90(1)
        self.tiles()

    def tiles(self, tiling=CHOSEN, clusters=66, rows=LEAST_ROWS):
        self.library.emulate_tiling_bf16(ctypes.c_int(tiling), ctypes.c_int(clusters), ctypes.c_int(rows))


NEEDED = ("linear.cu", "linear_sm90.cu", "norm.cu", "packed.cu", "held.cu", "embedding.cu")  # by one another


@pytest.fixture(scope="module")
def objects(cuda_objects):
    return {name: cuda_objects[name] for name in [("emulate", None), *((file, "bf16") for file in NEEDED)]}


@pytest.fixture
def hopper(objects, tmp_path_factory):
    library = tmp_path_factory.getbasetemp() / "hopper.so"
    if not library.exists():
        link(objects.values(), library)
    backend = Hopper(library)
    backend.schedule(0)
    return backend


def linear(keep=lambda op, c: True):
    return small_cases("bf16", lambda op, c: op.startswith("linear_") and c.prec == "bf16" and keep(op, c))


def products(keep=lambda op, c: True):
    found = [which for which in linear(keep) if which[0] in PRODUCTS]
    return pytest.mark.parametrize("which", found, ids=[f"{op}-{CASES[op][i].why}" for op, i in found])


PRODUCTS = ("linear_forward", "linear_backward_input", "linear_backward_weight")
ON_16_BYTES = ("rows on 16 bytes", "rows on 16 bytes, residual")
QUICK = ("one past two tiles", "several K blocks of N", *ON_16_BYTES, "all edges", "several K blocks of C")
LONG = (*ON_16_BYTES, "several K blocks of C", "several K blocks of OC", "several K blocks of N", "all edges")


@products()
def test_values_and_the_same_bits_under_every_schedule(hopper, which):
    check_values(hopper, build("bf16", *which))


@products(lambda op, c: c.why in LONG)
def test_every_tiling_has_the_same_bits_and_a_block_may_have_many_tiles(hopper, which):
    call = build("bf16", *which)
    whole = run(hopper, call)
    for tiling in TILINGS:
        for clusters, seed in (2, tiling + 1), (1, 0):
            hopper.tiles(tiling, clusters)
            hopper.schedule(seed)
            other = run(hopper, call)
            for name in whole:
                assert same_bits(whole[name], other[name]), (name, TILINGS[tiling], clusters)


def check_parts_know_nothing_of_the_device(hopper, which):
    results = []
    for clusters in 66, 3, 1:
        hopper.tiles(rows=128, clusters=clusters)
        results.append(run(hopper, build("bf16", *which)))
    for other in results[1:]:
        assert all(same_bits(other[name], results[0][name]) for name in other)


@products(lambda op, c: op == "linear_backward_weight" and c.why in ("several K blocks of N", "one past two tiles"))
def test_rows_in_parts(hopper, which):
    hopper.tiles(rows=128, clusters=3)
    check_values(hopper, build("bf16", *which))
    check_parts_know_nothing_of_the_device(hopper, which)


@products(lambda op, c: may_share(op, c) and c.why in ("one past two tiles", "rows on 16 bytes, residual"))
def test_in_place_where_the_contract_permits(hopper, which):
    check_in_place(hopper, build("bf16", *which))


@products(lambda op, c: c.why in ("one past two tiles", "one past a K block of C"))
def test_a_row_alone_has_the_bits_it_has_in_a_batch(hopper, which):
    call = build("bf16", *which)
    N = call.args[call.batch]
    whole = run(hopper, call)
    for rows in [N // 2], [N - 1]:
        part = run(hopper, call.part(rows))
        for name in set(call.batched) & set(call.outputs):
            assert same_bits(part[name], whole[name][rows]), (name, rows)


@pytest.mark.parametrize("rows", [64, 128, 4096])
def test_a_long_sum_over_rows_loses_no_more_than_a_short_one(hopper, rng, rows):
    """Values of one sign: what is lost in one chain would be lost in each."""
    x, d = (rng.integers(128, 256, (rows, 8)).astype(np.float32) / 128 for _ in range(2))
    dweight = np.zeros((8, 8), np.float32)
    hopper("linear_backward_weight", dweight, None, d, x, 0, 1, rows, 8, 8)
    exact = d.astype(np.float64).T @ x
    assert np.max(np.abs(dweight / exact - 1)) < 8 * np.finfo(np.float32).eps


def test_small_values_behind_large_ones(hopper):
    check_small_behind_large(hopper)


def test_other_gpus_and_products_of_nothing_go_the_other_way(hopper):
    """The mma.sync path launches other blocks: 99 KB of shared memory, which the test asks it to exceed."""
    call = build("bf16", "linear_forward", 4)
    hopper.library.emulate_sm90(0)
    try:
        hopper.tiles(CHOSEN, -1)  # Hopper's launch has no blocks then
        other = run(hopper, call)
    finally:
        hopper.library.emulate_sm90(1)
    hopper.tiles()
    for name, a in run(hopper, call).items():
        np.testing.assert_allclose(a, other[name], rtol=2**-7, atol=2**-7)
    none = call.part([])
    run(hopper, none)


@pytest.mark.parametrize(
    "fault",
    planted_always([f for f in FAULTS if Path(f.file).name in ("linear_sm90.cu", *HEADER)]),
    ids=lambda fault: fault.what,
)
def test_a_planted_fault_is_caught(fault, objects, tmp_path):
    source = ROOT / fault.file
    changed = tmp_path / source.name
    changed.write_text(source.read_text().replace(fault.old, fault.new))
    if source.name in HEADER:  # a file finds a header beside itself first
        source = source.with_name(HEADER[source.name])
        changed = tmp_path / source.name
        changed.write_text(source.read_text())
    broken = compile_object(changed, tmp_path / "broken.o", "-DACT=bf16", "-O0", "-Wno-unused")
    library = link(list((objects | {("linear_sm90.cu", "bf16"): broken}).values()), tmp_path / "broken.so")
    caught = pytest.raises((RuntimeError, AssertionError, pytest.fail.Exception))
    mine = [which for why in QUICK for which in linear(lambda op, c, why=why: c.why == why and op in PRODUCTS)]
    with Hopper(library) as hopper, caught as found:
        for seeds in (), (1, 2):  # most are found in order
            for op, i in mine:
                for tiling in {"linear_forward": (2, 1, 0), "linear_backward_input": (2, 1)}.get(op, (2,)):
                    hopper.tiles(tiling, clusters=1, rows=256)
                    check_values(hopper, build("bf16", op, i), seeds)
        for which in (which for which in mine if which[0] == "linear_backward_weight"):
            check_parts_know_nothing_of_the_device(hopper, which)
    print(found.value)

"""The words of cuda/prim_sm90.cuh, one by one, and their emulation in cuda/emulate: as test_emulate.py, with kernels of
tests/emulation_sm90.cu.

With BARELM_CUDA_LIBRARY, nvcc and a Hopper the right ones run on it: of its PTX the emulation knows nothing.
"""

import ctypes
import itertools
import re
import subprocess

import numpy as np
import pytest
from emulated import (
    COMPILER,
    EMULATION,
    NVCC,
    ON_GPU,
    ROOT,
    Backend,
    compile_object,
    from_bf16,
    library_for_gpu,
    link,
    to_bf16,
)

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)")

SEEDS = (0,) if ON_GPU else (0, 1, 2, 3)  # of schedules, which a GPU does not have
by_seed = pytest.mark.parametrize("seed", SEEDS)
SOURCE = ROOT / "tests" / "emulation_sm90.cu"
FAULTS = re.findall(r"\w+", re.search(r"enum Fault \{(.*?)\}", SOURCE.read_text(), re.DOTALL)[1].lower())

emulated_alone = pytest.mark.skipif(ON_GPU, reason="of the emulation itself")


def is_hopper():
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        return "9.0" in subprocess.run(ask, capture_output=True, text=True).stdout.split()
    except OSError:  # no nvidia-smi
        return False


def for_gpu(folder):
    if not NVCC:
        pytest.skip("no nvcc (CUDACXX): the words of prim_sm90.cuh were not tried")
    if not is_hopper():
        pytest.skip("no Hopper: the words of prim_sm90.cuh were not tried")
    arch = "-gencode", "arch=compute_90a,code=sm_90a"
    return Backend(library_for_gpu(SOURCE, folder / "words.so", *arch), "float")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation_sm90")
    if ON_GPU:
        return for_gpu(folder)
    objects = [
        compile_object(EMULATION, folder / "emulate.o", "-O2", "-U_GLIBCXX_INCLUDE_NEXT_C_HEADERS"),
        compile_object(SOURCE, folder / "emulation.o"),
    ]
    return Backend(link(objects, folder / "emulation.so"), "float")


def call(emulation, seed, name, *args):
    emulation.schedule(seed)
    emulation.call(f"emulation_{name}", [ctypes.c_int(a) if isinstance(a, int) else a for a in args])


ROUNDS, COLUMN = 5, 24  # tiles of 8 rows by 64 columns


def matrix(rows, cols, ld):
    """Other numbers everywhere, and ones between cols and ld that must not be seen."""
    return np.arange(1, rows * ld + 1, dtype=np.uint16).reshape(rows, ld)


def copy_tiles(emulation, seed, fault="none", rows=37, cols=70, ld=72, which=-1, width=64):
    """What came, and what should have."""
    given = matrix(rows if which < 0 else 3 * rows, cols, ld)
    to, want = (np.zeros((ROUNDS * 8, width), np.uint16) for _ in range(2))
    there = given[max(which, 0) * rows :][:rows][: ROUNDS * 8, COLUMN : min(cols, COLUMN + width)]
    want[: len(there), : there.shape[1]] = there
    given.flags.writeable = False
    call(emulation, seed, "copy_tiles", to, given, rows, cols, ld, ROUNDS, COLUMN, which, width, FAULTS.index(fault))
    return to, want


def share_tiles(emulation, seed, fault="none", rows=75):
    given = matrix(rows, 64, 64)
    to, want = (np.zeros((2, ROUNDS * 16, 64), np.uint16) for _ in range(2))
    want[:, :rows] = given[: ROUNDS * 16]
    given.flags.writeable = False
    call(emulation, seed, "share_tiles", to, given, rows, ROUNDS, FAULTS.index(fault))
    return to, want


def tell_numbers(emulation, seed, fault="none"):
    given = to_bf16(np.arange(32 * 64, dtype=np.float32).reshape(32, 64))
    given.flags.writeable = False
    to = np.zeros((4, 4, 3), np.float32)
    call(emulation, seed, "tell_numbers", to, given, FAULTS.index(fault))
    return to, np.tile(np.outer(np.arange(4) * 8 * 64, [1, 2, 3]), (4, 1, 1))


def store_tiles(emulation, seed, fault="none", rows=37, cols=70, ld=72, which=-1, width=64):
    given = matrix(ROUNDS * 8, width, width)
    to, want = (np.full((rows if which < 0 else 3 * rows, ld), 9, np.uint16) for _ in range(2))
    there = want[max(which, 0) * rows :][:rows][: ROUNDS * 8, COLUMN : min(cols, COLUMN + width)]
    there[...] = given[: len(there), : there.shape[1]]
    call(emulation, seed, "store_tiles", to, given, rows, cols, ld, ROUNDS, COLUMN, which, width, FAULTS.index(fault))
    return to, want


def product(emulation, seed, rng, fault="none", N=128, K=128, by_k=0):
    """Small integers: sums are exact in any order."""
    a, b = (to_bf16(rng.integers(-8, 9, s).astype(np.float32)) for s in ((64, K), (N, K)))
    d = np.full((64, N), np.nan, np.float32)
    call(emulation, seed, "product", d, a, b, N, K, by_k, FAULTS.index(fault))
    return d, from_bf16(a) @ from_bf16(b).T


def product_of_rows(emulation, seed, rng, fault="none", K=32):
    a, b = (to_bf16(rng.integers(-8, 9, (64, K)).astype(np.float32)) for _ in range(2))
    d = np.full((64, 64), np.nan, np.float32)
    call(emulation, seed, "product_of_rows", d, a, b, K, FAULTS.index(fault))
    return d, from_bf16(a) @ from_bf16(b).T


@by_seed
@pytest.mark.parametrize("which", [-1, 0, 2])
@pytest.mark.parametrize("sizes", [(37, 70, 72), (40, 88, 88), (3, 30, 32)], ids=["tails", "whole", "less than a tile"])
def test_tiles_come_and_go(emulation, seed, sizes, which):
    for move, width in itertools.product((copy_tiles, store_tiles), (64, 32)):
        np.testing.assert_array_equal(*move(emulation, seed, "none", *sizes, which, width))


@by_seed
@pytest.mark.parametrize("rows", [75, 80, 9])
def test_blocks_of_a_cluster_bring_tiles_for_each_other(emulation, seed, rows):
    np.testing.assert_array_equal(*share_tiles(emulation, seed, "none", rows))


@by_seed
def test_blocks_of_a_cluster_tell_each_other_of_numbers(emulation, seed):
    np.testing.assert_array_equal(*tell_numbers(emulation, seed))


@by_seed
@pytest.mark.parametrize(("N", "K", "by_k"), [(8, 128, 3), (64, 64, 0), (128, 128, 0), (192, 128, 1), (160, 128, 2)])
def test_products_of_a_warpgroup(emulation, rng, seed, N, K, by_k):
    np.testing.assert_array_equal(*product(emulation, seed, rng, "none", N, K, by_k))


@by_seed
@pytest.mark.parametrize("K", [16, 32])
def test_products_of_rows_in_registers(emulation, rng, seed, K):
    np.testing.assert_array_equal(*product_of_rows(emulation, seed, rng, "none", K))


@by_seed
def test_matrices_and_one_of_a_warp(emulation, seed):
    """Word i of lane l holds 8 l + 2 i and the next; row r of matrix i is words i of lanes 4 r .. 4 r + 3."""
    to, elected = np.zeros((32, 8), np.uint32), np.zeros(1, np.int32)
    call(emulation, seed, "matrices", to)
    want = [[8 * (4 * (lane % 8) + j // 2) + 2 * (lane // 8) + j % 2 for j in range(8)] for lane in range(32)]
    np.testing.assert_array_equal(to, want)
    call(emulation, seed, "elect", elected, 0)
    assert elected[0] == 12


@emulated_alone
@by_seed
@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("copy_tiles", "no_barrier", "a race with the write|nobody wrote|was not made"),
        ("copy_tiles", "no_init_fence", "TMA does not see"),
        ("copy_tiles", "not_made", "an mbarrier that was not made|nobody wrote"),
        ("copy_tiles", "wrong_parity", "is being loaded|a race with the|nobody wrote"),
        ("copy_tiles", "no_full_wait", "is being loaded|a race with the|nobody wrote"),
        ("copy_tiles", "no_empty_wait", "a race with the read|is being loaded"),
        ("copy_tiles", "early_release", "a race with the|is being loaded|waits in an mbarrier"),
        ("copy_tiles", "too_few_bytes", "phase ended before|waits in an mbarrier.* bytes are missing"),
        ("copy_tiles", "too_many_bytes", r"waits in an mbarrier \(.*0 arrivals and 16 bytes are missing"),
        ("copy_tiles", "too_many_arrivals", "more arrivals than the 1|phase ended before"),
        ("copy_tiles", "not_aligned", "not on 1024 bytes"),
        ("copy_tiles", "other_rank", "a tile of matrix -1, where there are 3"),
        ("copy_tiles", "shared_end", "of a shared array of"),
        ("copy_tiles", "block_ends", "returns with a load under way|it has returned"),
        ("share_tiles", "no_cluster_sync", "another block's shared memory, before any cluster_sync"),
        ("share_tiles", "leaves", "reached for each other since the last cluster_sync"),
        ("share_tiles", "other_rank", "an mbarrier of block 2, where the cluster has 2"),
        ("share_tiles", "other_block", "a race with the (read|write)|is being loaded"),
        ("share_tiles", "no_empty_wait", "a race with the read|is being loaded|phase ended before"),
        ("share_tiles", "no_full_wait", "is being loaded|a race with the|nobody wrote"),
        ("share_tiles", "too_few_bytes", "phase ended before|is being loaded|nobody wrote"),
        ("tell_numbers", "no_cluster_sync", "another block's shared memory, before any cluster_sync"),
        ("tell_numbers", "too_few_bytes", "phase ended before|is being loaded|a race with the|nobody wrote"),
        ("tell_numbers", "other_rank", "numbers for block 4, where the cluster has 4"),
        ("tell_numbers", "no_full_wait", "is being loaded|a race with the|nobody wrote"),
        ("tell_numbers", "leaves", "it has returned"),
        ("tell_numbers", "not_told", "a tile's load before wait_earlier"),
        ("store_tiles", "no_async_fence", "without fence_async"),
        ("store_tiles", "no_barrier", "races with the write|nobody wrote|without fence_async"),
        ("store_tiles", "overwritten", "still reads it"),
        ("store_tiles", "under_way", "returns with a tile's store under way"),
        ("store_tiles", "not_written", "nobody wrote what a tile's store reads"),
        ("product", "touched", "touched before wgmma_wait"),
        ("product", "no_fence", "no wgmma_fence since"),
        ("product", "no_commit", "touched before wgmma_wait|still reads it"),
        ("product", "no_product_wait", "still reads it"),
        ("product", "no_async_fence", "without fence_async before wgmma"),
        ("product", "no_barrier", "wgmma races with|nobody wrote what wgmma|without fence_async"),
        ("product", "lanes_differ", "bring different operands"),
        ("product", "too_much_shared", "cannot launch 1 blocks of 128 threads with 233472 bytes"),
        ("product_of_rows", "rows_changed", "rows were changed before wgmma_wait"),
        ("elect", "too_many_registers", "68608 registers, where there are 65536"),
        ("elect", "gives_more", "176 registers, where there are 168"),
    ],
)
def test_each_fault_is_found(emulation, rng, seed, name, fault, said):
    if fault == "block_ends" and seed == 0:
        pytest.skip("in order, a tile has come as soon as it was asked for")
    with pytest.raises(RuntimeError, match=rf"^emulation_{name}: .*({said})"):
        if name in (by_name := {f.__name__: f for f in (copy_tiles, share_tiles, store_tiles, tell_numbers)}):
            by_name[name](emulation, seed, fault)
        elif name.startswith("product"):
            {"product": product, "product_of_rows": product_of_rows}[name](emulation, seed, rng, fault)
        else:
            call(emulation, seed, name, np.zeros(1, np.int32), FAULTS.index(fault))
    np.testing.assert_array_equal(*product(emulation, 0, rng))  # and the next kernel runs


@pytest.mark.parametrize("sizes", [(8, 70, 71), (8, 0, 72)])
def test_a_matrix_that_tma_cannot_copy(emulation, rng, sizes):
    with pytest.raises(RuntimeError, match="tensor_map: not what TMA can copy"):
        copy_tiles(emulation, 0, "none", *sizes)
    np.testing.assert_array_equal(*product(emulation, 0, rng))  # and the next kernel runs

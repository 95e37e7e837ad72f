"""The emulation of a GPU in cuda/emulate: kernels of tests/emulation.cu that are right come out right, and each fault
in them is found, under every schedule, with words that say what it is."""

import ctypes
import re

import numpy as np
import pytest
from emulated import COMPILER, EMULATION, ROOT, Backend, compile_object, from_bf16, link, to_bf16

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)")

SEEDS = (0, 1, 2, 3)
by_seed = pytest.mark.parametrize("seed", SEEDS)
SOURCE = ROOT / "tests" / "emulation.cu"
THREADS, WARP = 64, 32
FAULTS = re.findall(r"\w+", re.search(r"enum Fault \{(.*?)\}", SOURCE.read_text(), re.DOTALL)[1].lower())


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    objects = [
        compile_object(EMULATION, folder / "emulate.o"),
        compile_object(SOURCE, folder / "emulation.o"),
    ]
    return Backend(link(objects, folder / "emulation.so"), "float")


def call(emulation, seed, name, *args):
    emulation.schedule(seed)
    emulation.call(f"emulation_{name}", [ctypes.c_int(a) if isinstance(a, int) else a for a in args])


def run(emulation, seed, name, n, fault="none", *sizes):
    """A kernel on 0, 1, 2 ..: what it wrote."""
    to, numbers = np.full(n, -1, np.int32), np.arange(n, dtype=np.int32)
    numbers.flags.writeable = False
    call(emulation, seed, name, to, numbers, *sizes, FAULTS.index(fault))
    return to


@by_seed
def test_right_kernels_come_out_right(emulation, seed):
    assert run(emulation, seed, "reverse", THREADS).tolist() == list(range(THREADS))[::-1]
    assert run(emulation, seed, "reverse_warp", THREADS).tolist() == [*range(31, -1, -1), *range(63, 31, -1)]
    assert run(emulation, seed, "hand_over", THREADS)[:WARP].tolist() == list(range(WARP, 0, -1))
    rounds = run(emulation, seed, "reverse_async", 3 * THREADS, "none", 3).reshape(3, THREADS)
    want = np.arange(3 * THREADS).reshape(3, THREADS)
    want[:, -1] = 0
    np.testing.assert_array_equal(rounds, want[:, ::-1])


@by_seed
@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("reverse", "no_barrier", "a race with the|nobody wrote"),
        ("reverse", "not_written", "nobody wrote"),
        ("reverse", "shared_end", "byte 256 of a shared array of 256"),
        ("reverse", "array_end", "outside an array"),
        ("reverse", "leaves", "thread 5: returns, where|where 1 threads have returned"),
        ("reverse", "last_leaves", "thread 63: returns, where|where 1 threads have returned"),
        ("reverse", "last_overwrites", "a race with the"),
        ("reverse", "two_barriers", "where other threads wait at that of"),
        ("reverse", "overwritten", "a race with the"),
        ("reverse_warp", "no_warp_barrier", "a race with the|nobody wrote"),
        ("reverse_warp", "shuffle_orders", "a race with the"),
        ("reverse_warp", "half_a_warp", "where other threads of the warp are in"),
        ("hand_over", "no_barrier", "a race with the|nobody wrote"),
        ("hand_over", "too_few", "no thread can go on"),
        ("reverse_async", "no_wait", "is under way"),
        ("reverse_async", "no_commit", "is under way"),
        ("reverse_async", "no_barrier", "a race with the|is under way|nobody wrote"),
        ("reverse_async", "not_aligned", "not aligned"),
        ("reverse_async", "overwritten", "a race with the|is under way"),
        ("reverse_async", "under_way", "returns with cp.async under way"),
    ],
)
def test_each_fault_is_found(emulation, seed, name, fault, said):
    n, sizes = (3 * THREADS, (3,)) if name == "reverse_async" else (THREADS, ())
    with pytest.raises(RuntimeError, match=rf"^emulation_{name}: block 0.*({said})"):
        run(emulation, seed, name, n, fault, *sizes)
    assert run(emulation, seed, "reverse", THREADS)[0] == THREADS - 1  # and the next kernel runs


@by_seed
@pytest.mark.parametrize("flat", [0, 1])
def test_matrices_lie_in_the_lanes_as_the_contract_says(emulation, rng, seed, flat):
    """Sums of products of small integers are exact, whatever their order."""
    a, b = (to_bf16(rng.integers(-8, 9, s).astype(np.float32)) for s in ((16, 16), (16, 8)))
    d = np.full((16, 8), np.nan, np.float32)
    given = np.ascontiguousarray(b.T) if flat else b
    call(emulation, seed, "product", d, a, given, flat)
    np.testing.assert_array_equal(d, from_bf16(a) @ from_bf16(b))


@by_seed
def test_what_a_kernel_must_not_write_is_watched(emulation, seed):
    with pytest.raises(RuntimeError, match=r"memory around an array was written"):
        run(emulation, seed, "reverse", THREADS, "array_front")
    with pytest.raises(RuntimeError, match=r"an input was written"):
        run(emulation, seed, "reverse", THREADS, "input")


def test_schedules_differ_and_repeat(emulation):
    def last(seed):
        to = np.full(1, -1, np.int32)
        call(emulation, seed, "last_block", to)
        return int(to[0])

    seen = [last(seed) for seed in range(12)]
    assert seen[0] == 19 and len(set(seen)) > 3
    assert seen == [last(seed) for seed in range(12)]

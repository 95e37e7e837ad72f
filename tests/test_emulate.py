"""The words of cuda/prim.cuh, one by one, and the emulation of a GPU in cuda/emulate: kernels of tests/emulation.cu
that are right come out right, and each fault in them is found, under every schedule, with words that say what it is.

With BARELM_CUDA_LIBRARY and nvcc the right ones run on a GPU: of its PTX the emulation knows nothing.
"""

import ctypes
import re

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
SOURCE = ROOT / "tests" / "emulation.cu"
THREADS, WARP = 64, 32
FAULTS = re.findall(r"\w+", re.search(r"enum Fault \{(.*?)\}", SOURCE.read_text(), re.DOTALL)[1].lower())

emulated_alone = pytest.mark.skipif(ON_GPU, reason="of the emulation itself")


def for_gpu(folder):
    if not NVCC:
        pytest.skip("no nvcc (CUDACXX): the words of prim.cuh were not tried")
    return Backend(library_for_gpu(SOURCE, folder / "words.so", "-arch=native"), "float")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    if ON_GPU:
        return for_gpu(folder)
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
    blocks, each = 3, THREADS // WARP
    sums = run(emulation, seed, "classes", 2 * WARP + 1)
    assert (sums[:WARP] == blocks * each - 1).all()  # -1 was there
    # of pairs the lower begins at 2^32 - 1, and carries
    assert sums[WARP:-1].tolist() == [blocks * each - 1, blocks * each] * (WARP // 2)
    assert sums[-1] == blocks * (THREADS - WARP) - 1
    rounds = run(emulation, seed, "reverse_async", 3 * THREADS, "none", 3).reshape(3, THREADS)
    want = np.arange(3 * THREADS).reshape(3, THREADS)
    want[:, -1] = 0
    np.testing.assert_array_equal(rounds, want[:, ::-1])


@by_seed
def test_kernels_that_begin_early_see_all_that_was_written_before(emulation, seed):
    blocks, times = (2000, 101) if ON_GPU else (4, 5)
    n = blocks * THREADS
    got = run(emulation, seed, "pass_on", n, "none", n, times)
    np.testing.assert_array_equal(got, np.roll(np.arange(n), -times * THREADS) + times)


@by_seed
def test_what_the_host_told_is_read_before_the_wait(emulation, seed):
    blocks = 2000 if ON_GPU else 3
    n = blocks * THREADS
    to, told = np.full(n, -1, np.int32), np.arange(n, dtype=np.int32)
    told.flags.writeable = False
    call(emulation, seed, "told", to, told, blocks, 0)
    np.testing.assert_array_equal(to, 3 * told)
    if not ON_GPU:  # what a kernel wrote since is not seen
        to[:] = -1
        call(emulation, seed, "told", to, told, blocks, 1)
        np.testing.assert_array_equal(to, 2 * told - 1)


@by_seed
def test_lanes(emulation, rng, seed):
    """Whole numbers: sums are exact in any order."""
    x = rng.integers(-99, 99, THREADS).astype(np.float32)
    to = np.full((8, THREADS), np.nan, np.float32)
    call(emulation, seed, "lanes", to, x)
    t, warps = np.arange(THREADS), x.reshape(-1, WARP)
    np.testing.assert_array_equal(to[0], x[t ^ 5])
    np.testing.assert_array_equal(to[1], np.where(t % WARP < 3, x, x[t - 3]))
    np.testing.assert_array_equal(to[2], x[t // WARP * WARP + 7])
    np.testing.assert_array_equal(to[3], t ^ 16)
    np.testing.assert_array_equal(to[4:6], [np.repeat(warps.sum(1), WARP)] * 2)
    np.testing.assert_array_equal(to[6], np.repeat(warps.max(1), WARP))
    np.testing.assert_array_equal(to[7], 100 * (t // WARP) + t % WARP)


@by_seed
def test_numbers(emulation, rng, seed):
    """Rounding to bf16 is to nearest, ties to even, to infinity above the greatest, and NaN stays NaN; powers of two
    are within 2 units in the last place, as prim.cuh says."""
    ties = (np.arange(0x3F7F, 0x3F83, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    ends = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-40, 1e-45], np.float32)
    x = np.concatenate([ties, -ties, ends, rng.normal(0, 9, 200).astype(np.float32)])
    bits, pairs, power = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint32), np.zeros_like(x)
    call(emulation, seed, "numbers", bits, pairs, power, x, x.size)
    want, number = to_bf16(x), ~np.isnan(x)
    np.testing.assert_array_equal(bits[number], want[number])
    np.testing.assert_array_equal(pairs & 0xFFFF, to_bf16(np.float32([1]))[0])
    np.testing.assert_array_equal((pairs >> 16)[number], want[number])
    assert np.isnan(from_bf16(bits[~number])).all() and np.isnan(from_bf16(pairs[~number] >> 16)).all()
    exact = np.exp2(x[number & (np.abs(x) < 120)].astype(np.float64))
    assert (np.abs(power[number & (np.abs(x) < 120)] - exact) <= 2 * np.finfo(np.float32).eps * exact).all()
    assert power[x == -np.inf] == 0 and power[x == np.inf] == np.inf and np.isnan(power[~number]).all()


@by_seed
@pytest.mark.parametrize("skip", [0, 1, 4])
@pytest.mark.parametrize("n", [1, 8, 13, 1029])
def test_packs(emulation, rng, seed, skip, n):
    """Whole ones 16 bytes at a time where they lie so, single values where not; nothing behind the end."""
    x = rng.integers(-99, 99, n).astype(np.float32)
    for name, stored in (("packs", x), ("packs_bf16", to_bf16(x))):
        to = np.zeros_like(stored)
        call(emulation, seed, name, to, stored, skip, n)
        got = from_bf16(to) if stored.dtype == np.uint16 else to
        np.testing.assert_array_equal(got[skip:], x[skip:] + 1)
        assert (got[:skip] == 0).all()


@emulated_alone
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
        ("classes", "sum_before_write", "a race with the|nobody wrote"),
        ("classes", "sum_in_plain", "a race with the (sum|write)"),
        ("classes", "sum_read_early", "a race with the (sum|read)"),
        ("classes", "sum_of_nothing", "nobody wrote"),
        ("reverse_async", "not_aligned", "not aligned"),
        ("reverse_async", "overwritten", "a race with the|is under way"),
        ("reverse_async", "under_way", "returns with cp.async under way"),
        ("pass_on", "forgets_wait", "global memory before wait_earlier|returns without wait_earlier"),
        ("pass_on", "leaves_early", "returns without wait_earlier"),
        ("pass_on", "reads_early", "global memory before wait_earlier"),
        ("pass_on", "writes_early", "global memory before wait_earlier"),
        ("pass_on", "copies_early", "cp.async before wait_earlier"),
        ("pass_on", "waits_twice", "wait_earlier a second time"),
        ("pass_on", "not_early", "wait_earlier in a kernel that is not launched early"),
        ("pass_on", "prefetch_off", "prefetch_l2 of 256 bytes at .*: no words of 16"),
        ("pass_on", "prefetch_short", "prefetch_l2 of 252 bytes at .*: no words of 16"),
        ("pass_on", "prefetch_behind", "prefetch_l2 of 512 bytes at .*: outside an array"),
    ],
)
def test_each_fault_is_found(emulation, seed, name, fault, said):
    n, sizes = {
        "classes": (2 * WARP + 1, ()),
        "reverse_async": (3 * THREADS, (3,)),
        "pass_on": (3 * THREADS, (3 * THREADS, 1)),
    }.get(name, (THREADS, ()))
    with pytest.raises(RuntimeError, match=rf"^emulation_{name}: block \d.*({said})"):
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
def test_products_of_bytes(emulation, rng, seed):
    a, b = (rng.integers(-128, 128, s, dtype=np.int8) for s in ((16, 32), (8, 32)))
    before = rng.integers(-9, 9, (16, 8), dtype=np.int32)
    d = before.copy()
    call(emulation, seed, "product_of_bytes", d, a, b)
    np.testing.assert_array_equal(d, before + a.astype(np.int32) @ b.T.astype(np.int32))


@emulated_alone
@by_seed
def test_what_a_kernel_must_not_write_is_watched(emulation, seed):
    with pytest.raises(RuntimeError, match=r"memory around an array was written"):
        run(emulation, seed, "reverse", THREADS, "array_front")
    with pytest.raises(RuntimeError, match=r"an input was written"):
        run(emulation, seed, "reverse", THREADS, "input")


@emulated_alone
def test_schedules_differ_and_repeat(emulation):
    def last(seed):
        to = np.full(1, -1, np.int32)
        call(emulation, seed, "last_block", to)
        return int(to[0])

    seen = [last(seed) for seed in range(12)]
    assert seen[0] == 19 and len(set(seen)) > 3
    assert seen == [last(seed) for seed in range(12)]

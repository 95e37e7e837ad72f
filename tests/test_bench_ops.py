"""benchmarks/bench_ops.py: its large cases are those of the tests with other sizes, and it times them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_ops as bench


@pytest.mark.parametrize("op", bench.LARGE)
def test_a_large_case_is_beyond_every_cache(op):
    c = bench.large_case(op)
    assert cases.bytes(op, c) >= bench.BEYOND_CACHES and cases.flops(op, c) == 0
    assert set(bench.LARGE[op]) <= set(next(c for c in cases.CASES[op] if c.big).sizes)


def test_it_times_what_it_is_asked_for(tmp_path):
    words = "--only rmsnorm_backward --seconds 0.01 --json ops.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, bench.__file__, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ops.json").read_text())
    timed = [r for r in found["results"] if r["op"] == "rmsnorm_backward"]
    assert len(timed) == len(found["results"]) == 2 * len(found["ceilings"])
    assert all(r["seconds"] > 0 and 0 < r["share"] < 10 for r in timed)
    assert {r["bytes"] >= bench.BEYOND_CACHES for r in timed} == {False, True}


@pytest.mark.parametrize("op", ["rmsnorm_backward", "logprob_backward"])
def test_what_memory_bounds_works_in_place_as_in_a_model(op):
    small = next(c for c in cases.CASES[op] if not c.big)
    output, given = bench.test_ops.OPERATORS[op](np.random.default_rng(0), small).aliases
    names = list(bench.test_ops.OPERATORS[op](np.random.default_rng(0), small).args)
    arguments = dict(zip(names, bench.prepare(op, small), strict=True))
    assert arguments[output] is arguments[given] is not None


def test_arrays_are_private_memory():
    """Shared memory has no huge pages, and random rows of it took half as long again."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("asks Linux how memory lies")
    a = bench.in_memory(np.ones(1 << 20, np.float32))
    for line in maps.read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= a.ctypes.data < end:
            assert line.split()[1] == "rw-p"
            return
    raise AssertionError("the array is nowhere")


def test_the_copy_that_takes_turns_copies_all(threads):
    """For any number of threads, whatever the number of cache lines; what it could not copy is refused."""
    for n in (1, 2, 3):
        bench._core.threads_set(n)
        for size in (0, 64, 7 * 64, 1001 * 64):
            src = bench.in_memory(np.random.default_rng(size).integers(1, 256, size, np.uint8))
            dst = bench.in_memory(np.zeros(size, np.uint8))
            bench._core.copy_past_caches(dst, src)
            assert (dst == src).all()
    src, dst = (bench.in_memory(np.zeros(256, np.uint8)) for _ in range(2))
    for to, of in ((dst[:128], src[:64]), (dst[1:65], src[:64]), (dst[:64], src[1:65]), (dst[:63], src[:63])):
        with pytest.raises(ValueError, match="copy_past_caches: dst and src must be as long"):
            bench._core.copy_past_caches(to, of)
    with pytest.raises(ValueError, match="copy_past_caches: dst and src must be as long"):
        bench._core.copy_past_caches(dst.reshape(2, 128)[:, :64], src.reshape(2, 128)[:, :64])

"""benchmarks/bench_ops.py: its large cases are those of the tests with other sizes, and it times them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_ops as bench


@pytest.mark.parametrize("op", bench.LARGE)
def test_a_large_case_is_beyond_every_cache(op):
    c = bench.large_case(op)
    assert cases.bytes(op, c) >= 256e6 and cases.flops(op, c) == 0
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
    assert {r["bytes"] >= 256e6 for r in timed} == {False, True}

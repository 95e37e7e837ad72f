"""benchmarks/bench_cuda.py runs: every operator it measures is called with arguments that its kernel takes.  In the
emulation, at the smallest sizes; the numbers mean nothing."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import COMPILER

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C++ compiler (CXX)")


def test_every_operator_is_measured(cuda_library, tmp_path):
    words = ["--tiny", "--json", str(tmp_path / "found.json")]
    environment = os.environ | {"BARELM_CUDA_LIBRARY": str(cuda_library)}
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "bench_cuda.py", *words], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["operators"]) == 31 and all(r["seconds"] > 0 for r in found["operators"])
    assert [r["rows"] for r in found["decode"]] == [1, 2]
    assert f"| {found['operators'][0]['name']} |" in run.stdout


def test_a_hopper_alone_has_kinds_of_tiles(cuda_library):
    library = ctypes.CDLL(str(cuda_library))
    kinds = []
    for hopper in 1, 0:
        library.emulate_sm90(hopper)
        kinds.append(library.barelm_cuda_tiling(-1))
    assert kinds == [3, 0]

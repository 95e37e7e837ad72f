"""benchmarks/bench_cuda.py runs: every operator it measures is called with arguments that its kernel takes.  In the
emulation, at the smallest sizes; the numbers mean nothing."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from emulated import COMPILER, ON_GPU

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import bench_cuda  # noqa: E402
import bench_model  # noqa: E402

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
    assert not found["failed"] and {"gpu_before", "gpu_after"} <= found["machine"].keys()


def test_what_fails_is_a_row_and_the_next_goes_on(device, tmp_path, monkeypatch, capsys):
    def kind(d, s):
        wide, narrow, out = (d.array("act", n) for n in (16, 8, 8))
        yield "reads too much", "1 x 8", ("swiglu_forward", out, narrow, 1, 8), 48, None
        yield "reads enough", "1 x 8", ("swiglu_forward", out, wide, 1, 8), 48, None
        raise MemoryError("no memory for 7 bytes of act")

    monkeypatch.setattr(bench_cuda, "KINDS", (kind,))
    words = ["--tiny", "--skip-decode", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["bench_cuda.py", *words])
    with pytest.raises(SystemExit, match="2 failed"):
        bench_cuda.main()
    found, printed = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    assert "outside an array" in found["operators"][0]["error"] and found["operators"][1]["seconds"] > 0
    assert found["failed"] == [{"name": "kind", "error": "no memory for 7 bytes of act"}]
    assert all(f"| {name} |" in printed for name in ("reads too much", "reads enough", "kind"))


def test_a_peer_gives_memory_back_before_it_answers(monkeypatch):
    """And a turn of several steps begins with one that is not timed, which takes it again."""
    done, asked = [], iter((1, 2, 0))

    def take(batches):
        done.append("step")
        return 1.0

    take.rest = lambda: done.append("rest")
    monkeypatch.setattr(bench_model, "torch_step", lambda *_: take)
    monkeypatch.setattr(bench_model, "device_memory", lambda *_: 0.0)
    pipe = SimpleNamespace(recv=lambda: next(asked), send=lambda _: done.append("answer"))
    workload = bench_model.Workload("tiny", dict(vocab_size=9), 1, 4, device="cuda")
    bench_model.serve(pipe, "torch eager bf16", workload, Path(), None)
    assert done == ["step", "rest", "answer", *["step"] * 3, "rest", "answer", "answer"]


@pytest.mark.skipif(ON_GPU, reason="of the emulation itself")
def test_a_hopper_alone_has_kinds_of_tiles(cuda_library):
    library = ctypes.CDLL(str(cuda_library))
    kinds = []
    for hopper in 1, 0:
        library.emulate_sm90(hopper)
        kinds.append(library.barelm_cuda_tiling(-1))
    assert kinds == [3, 0]

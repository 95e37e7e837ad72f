"""benchmarks/llmc.py with a program that is called, reads and speaks as llm.c's train_gpt2cu does: what it gets is our
model and our tokens, and it stands still while others are timed."""

import argparse
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from barelm import Model

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_model as bench
import llmc

SIZES = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=256, context=16)
WORKLOAD = bench.Workload("tiny", SIZES, B=2, T=16, micro_batches=2)
# Trains by barelm, in order: what it says first is the loss of the same weights and batch.
PROGRAM = f"""#!{sys.executable}
import itertools, pathlib, sys, time
sys.path[:0] = {sys.path!r}
import numpy as np
from barelm import initial
from barelm.convert import llmc
from barelm.loop import step

words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
header = np.fromfile(words["-i"], "<i4", 256)
row = np.fromfile(words["-i"], "<u2", offset=1024).astype(np.int32)
assert header[:3].tolist() == [20240520, 1, len(row)] and words["-j"] == words["-i"]
B, T, lr, decay = int(words["-b"]), int(words["-t"]), float(words["-l"]), float(words["-c"])
micro_batches, rest = divmod(int(words["-d"]), B * T)
assert (rest, words["-s"], words["-r"]) == (0, "0", "0") and int(words["-v"]) > 1000
model = initial.make(llmc.read(pathlib.Path(words["-e"])))
print("allocated 237 MiB for model parameters", "allocating 1024 MiB for activations", sep="\\n")
samples = itertools.cycle(zip(row[:-1].reshape(-1, B, T), row[1:].reshape(-1, B, T)))
for i in range(min(int(words["-x"]), LAST)):
    loss = step(model, list(itertools.islice(samples, micro_batches)), lr, betas=(0.9, 0.95), eps=1e-8,
                weight_decay=decay, clip=1.0).loss
    print(f"step {{i + 1:4d}}/{{words['-x']}} | loss {{loss:7.6f}} (+nanz)| norm 1.0000 (+nanz)| lr 1.00e-04 |",
          "3.21 ms | 9.9% bf16 MFU | 123 tok/s")
    with open("steps", "ab") as file:
        file.write(b".")
print("out of memory")
sys.exit(3)
"""


@pytest.fixture
def program(tmp_path):
    """Writes it; `last` is the step after which it fails."""

    def write(last=10**9):
        path = tmp_path / "train_gpt2cu"
        path.write_text(PROGRAM.replace("LAST", str(last)))
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def running(tmp_path, program):
    """Starts it as a peer does; ends it after the test."""
    started = []

    def start(last=10**9):
        Model(WORKLOAD.config, seed=1).save(tmp_path / "start", optimizer=False)
        command, files = f"{program(last)} -r 0", tmp_path / "files"
        peer = llmc.Llmc(command, files, tmp_path / "start", WORKLOAD, lr=1e-4, weight_decay=0.1)
        started.append(peer)
        return peer

    yield start
    for peer in started:
        peer.close()


def test_it_races(program):
    found = bench.race(WORKLOAD, ["barelm bf16", "llm.c bf16"], 3, 0.01, f"{program()} -r 0")
    ours, theirs = bench.summarize(found, {"bf16": 1e12})
    assert ours["llm.c"] == pytest.approx(np.median(np.divide(theirs["seconds"], ours["seconds"])))
    assert ours["stock"] is None and theirs["llm.c"] == pytest.approx(1)
    assert np.allclose(ours["losses"], theirs["losses"], rtol=2e-3)


def test_it_stands_still_between_turns(running, tmp_path):
    peer = running()
    first = peer(None)
    peer.rest()
    time.sleep(0.1)  # a signal takes its time
    steps = bench.machine.read(tmp_path / "files" / "steps")  # of what it writes behind a line
    time.sleep(0.5)  # some hundred steps
    assert bench.machine.read(tmp_path / "files" / "steps") == steps
    later = [peer(None) for _ in range(50)]
    assert len(bench.machine.read(tmp_path / "files" / "steps")) >= 50 and later[-1] < first
    assert peer.mib == 237 + 1024


def test_what_it_said_before_it_died_is_the_error(running):
    peer = running(last=2)
    peer(None), peer(None)
    with pytest.raises(RuntimeError, match=r"ended with 3.*\n(.*\n)*out of memory"):
        peer(None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--llmc", "x"], "--llmc: .*--device cuda"),
        (["--device", "cuda", "--llmc", "x -r 0"], "--llmc: .*no program x"),
    ],
)
def test_a_wrong_flag_is_named(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_model.py", *words])
    with pytest.raises(SystemExit):
        bench.main()
    assert re.search(said, capsys.readouterr().err)


def test_without_its_program_it_is_left_out(capsys):
    options = argparse.Namespace(device="cuda", peers=["bf16"], only=None, llmc=None)
    assert "llm.c bf16" not in bench.selected(options)[1] and "--llmc" in capsys.readouterr().err
    assert "llm.c bf16" in bench.selected(argparse.Namespace(**vars(options) | {"llmc": "train_gpt2cu"}))[1]

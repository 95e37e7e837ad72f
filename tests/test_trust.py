"""A run that is killed at any instant, or whose files are harmed, either goes on to the same bits or says what is wrong
and leaves the last good checkpoint good."""

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import barelm
import pytest
from barelm import __main__ as command
from barelm import checkpoint
from barelm import train as training
from test_train import TEXT, arguments, log, refused, run, same_run, text  # noqa: F401  (text is a fixture)

STEPS = 36
FLAGS = dict(steps=STEPS, save_every=3, eval_every=5, keep=0, sample_every=9)

# Runs the command line, and kills itself just before operation number N on a file of the run's folder: before a file is
# opened, renamed, removed or synced, or a folder is made or removed.
KILLED = """
import os, signal, sys
folder, left = sys.argv[1], int(sys.argv[2])
def hook(event, args):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and folder in str(args[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from barelm.__main__ import main
sys.exit(main(sys.argv[3:]))
"""


def start(*words):
    path = os.pathsep.join([str(Path(barelm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def words(text, out):  # noqa: F811
    """What a user would call: go on if there is a run, else begin."""
    resume = ["--resume"] if (out / "run.json").exists() else []
    return [*arguments(text, out, **FLAGS), *resume]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "sums.txt").write_text(TEXT)
    assert run(folder / "sums.txt", folder / "run", **FLAGS) == 0
    return folder / "run"


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_ten_random_instants_a_run_ends_in_the_same_bits(text, tmp_path, whole, seed):  # noqa: F811
    """Half of them while files are written, half whenever.  Some fall before the first step, some into the writing of
    checkpoints; each child goes on from what the one before it left."""
    rng, out, killed = random.Random(seed), tmp_path / "run", 0
    for i in range(10):
        operation = rng.randrange(1, 60) if i % 2 else 0
        with start(out, operation, *words(text, out)) as process:
            if not operation:
                wait_for_a_line(out, process)
                time.sleep(rng.random() * 0.2)
                process.kill()
            process.communicate(timeout=120)
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 5
    assert command.main(words(text, out)) == 0
    same_run(out, whole, STEPS)
    assert not list(out.glob(".*.part")), "what a killed process left is removed"


def wait_for_a_line(out, process):
    before = (out / "log.jsonl").stat().st_size if (out / "log.jsonl").exists() else -1
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size != before:
            return
        time.sleep(0.01)


def harm(path, where):
    """Flip a bit of one byte."""
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x01
    path.write_bytes(data)


NEWEST = f"step_{STEPS - 3}"
PARTS = ("model.safetensors", "optimizer.safetensors", "tokenizer.json", "config.json", "state.json")
FILES = ["run.json", "log.jsonl", "data/dataset.json", "data/tokenizer.json", "data/train_000000.bin"]
FILES += ["data/val_000000.bin", *(f"{NEWEST}/{name}" for name in PARTS)]


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(tmp_path, whole, capsys, name, where):
    """In the newest checkpoint: it is refused by name, the one before it is taken, and the end is the same.  Elsewhere:
    one line that names the file, and every checkpoint is still good."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"step_{STEPS}")
    harm(out / name, where)
    resume = ["train", "--resume", "--out", str(out)]
    late = name == "log.jsonl" and where == 1.0  # a line behind the checkpoint, which is written again anyway
    if name.startswith(NEWEST) or late:
        assert command.main(resume) == 0
        assert (f"refused   {out / NEWEST}: " in capsys.readouterr().out) != late
        same_run(out, whole, STEPS)
    else:
        assert str(out / name) in refused(capsys, resume)
        for folder in out.glob("step_*"):
            checkpoint.verify(folder)


def test_a_description_that_was_edited_is_refused(tmp_path, whole, capsys):
    """It would be another run, and nothing else would say so."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    asked = (out / "run.json").read_text()
    assert '"weight_decay": 0.1,' in asked
    (out / "run.json").write_text(asked.replace('"weight_decay": 0.1,', '"weight_decay": 0.2,'))
    assert "run.json: was altered" in refused(capsys, ["train", "--resume", "--out", str(out)])


def test_without_its_log_a_run_goes_on_with_a_new_one(tmp_path, whole):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"step_{STEPS}")
    (out / "log.jsonl").unlink()
    assert command.main(["train", "--resume", "--out", str(out)]) == 0
    assert [record["step"] for record in log(out) if "loss" in record] == [STEPS - 2, STEPS - 1, STEPS]


# ---- the machine's faults -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(text, tmp_path, capsys):  # noqa: F811
    with small_disk(tmp_path / "disk", "600k") as disk:
        out = disk / "run"
        assert run(text, out, steps=200, save_every=3, keep=0) == 2
        said = capsys.readouterr().err
        newest = max(out.glob("step_*"), key=lambda path: int(path.name[5:]))
        assert "No space left on device" in said and f"the newest checkpoint is {newest}" in said
        checkpoint.verify(newest)
        assert not list(out.glob(".*.part"))
        for old in sorted(out.glob("step_*"))[:-1]:
            if old != newest:
                shutil.rmtree(old)
        assert run(text, out, "--resume", steps=int(newest.name[5:]) + 1, save_every=0) == 0


def test_a_write_that_fails_stops_the_run_and_names_the_last_good_checkpoint(text, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The same without the right to mount."""
    real = checkpoint.save

    def fail(model, folder, **options):
        if model.step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(model, folder, **options)

    monkeypatch.setattr(checkpoint, "save", fail)
    out = tmp_path / "run"
    assert run(text, out, steps=9, save_every=3) == 2
    said = capsys.readouterr().err
    assert f"{out / 'step_6'}: cannot be written (No space left on device)" in said
    assert f"the newest checkpoint is {out / 'step_3'}" in said
    checkpoint.verify(out / "step_3")


def test_a_folder_that_cannot_be_written_is_named(text, tmp_path, capsys):  # noqa: F811
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "Read-only file system" in refused(capsys, arguments(text, disk / "run"))
    assert "Not a directory" in refused(capsys, arguments(text, text / "run"))


def test_shards_that_change_while_they_are_used_are_named(text, tmp_path, monkeypatch, capsys):  # noqa: F811
    real = training.step

    def change(model, *args, **options):
        if model.step == 3:
            (tmp_path / "run" / "data" / "train_000000.bin").write_bytes(b"")
        return real(model, *args, **options)

    monkeypatch.setattr(training, "step", change)
    assert run(text, tmp_path / "run", steps=9, save_every=2) == 2
    assert "train_000000.bin: was changed, cut off or replaced while it was in use" in capsys.readouterr().err


def test_a_clock_that_is_set_back_changes_nothing(text, tmp_path, monkeypatch, whole):  # noqa: F811
    clock = itertools.count(2_000_000_000, -1000)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert run(text, tmp_path / "run", **FLAGS) == 0
    same_run(tmp_path / "run", whole, STEPS)


def test_an_empty_corpus_is_refused(tmp_path, capsys):
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "empty.txt: no text here" in refused(capsys, arguments(tmp_path / "empty.txt", tmp_path / "run"))
    assert not list((tmp_path / "run").iterdir())

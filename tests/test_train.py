"""Training through the command line: it learns, stops, resumes to the same bits, and names flags in its errors."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import barelm
import numpy as np
import pytest
from barelm import Model, Tokenizer
from barelm import __main__ as command
from barelm import train as training
from barelm.data.shards import Dataset
from barelm.data.tokens import Tokens, document_starts
from barelm.guard import WARM

TINY = {
    "n-layer": 1,
    "n-head": 2,
    "n-embd": 16,
    "context": 16,
    "batch": 4,
    "lr": 0.01,
    "warmup": 2,
    "threads": 1,
    "eval-batches": 2,
}
TEXT = "".join(f"{i} and {i} are {2 * i}.\n" for i in range(300))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "sums.txt"
    path.write_text(TEXT)
    return path


def arguments(text, out, **flags):
    flags = TINY | {"data": text, "out": out} | {name.replace("_", "-"): value for name, value in flags.items()}
    return ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def run(text, out, *more, **flags):
    """`barelm train` in this process; its exit code."""
    return command.main([*arguments(text, out, **flags), *more])


def refused(capsys, argv):
    """The one line on standard error of a command that ends with exit code 2."""
    capsys.readouterr()
    assert command.main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("barelm: ") and captured.err.count("\n") == 1
    return captured.err


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_run(a, b, step):
    """Weights, moments, update count and log of two runs: the same bytes."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (a / f"step_{step}" / name).read_bytes() == (b / f"step_{step}" / name).read_bytes(), name
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()
    states = [json.loads((run / f"step_{step}" / "state.json").read_text()) for run in (a, b)]
    assert states[0]["step"] == states[1]["step"] and states[0]["train"]["guard"] == states[1]["train"]["guard"]


# ---- a run --------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_folder(text, tmp_path, capsys):
    out = tmp_path / "run"
    every = dict(eval_every=20, sample_every=20, save_every=20)
    assert run(text, out, "--json", steps=40, keep=1, prompt="1 and", **every) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 40 and result["tokens"] == 40 * 4 * 16
    assert result["after"]["bits_per_byte"] < result["before"]["bits_per_byte"] - 1
    losses = [record["loss"] for record in log(out) if "loss" in record]
    assert len(losses) == 40 and losses[-1] < losses[0] - 1
    assert [record["step"] for record in log(out) if "sample" in record] == [20, 40]
    files = ["curve.svg", "data", "log.jsonl", "lr.svg", "report.md", "run.json", "speed.jsonl", "step_40"]
    assert sorted(path.name for path in out.iterdir() if path.name != "tensorboard") == files
    assert len((out / "speed.jsonl").read_text().splitlines()) == 40
    assert "1 and" in (out / "report.md").read_text() and "<svg" in (out / "curve.svg").read_text()
    assert Tokenizer.load(out / "step_40").encode("a") == [97]
    assert Model.load(out / "step_40").step == 40


def test_a_run_may_be_as_long_as_a_time(text, tmp_path):
    began = time.perf_counter()
    assert run(text, tmp_path / "run", minutes=0.01) == 0
    assert time.perf_counter() - began < 10
    rates = [record["lr"] for record in log(tmp_path / "run") if "lr" in record]
    assert len(rates) >= 1 and rates[-1] <= max(rates) and rates[-1] < 0.01


def test_every_step_and_micro_batch_draws_its_own_windows(text, tmp_path, monkeypatch):
    drawn, real = [], Tokens.batch

    def batch(self, step, micro, *sizes):
        drawn.append((step, micro))
        return real(self, step, micro, *sizes)

    monkeypatch.setattr(Tokens, "batch", batch)
    assert run(text, tmp_path / "run", steps=2, tokens_per_step=3 * 4 * 16) == 0
    assert drawn == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.mark.parametrize("bos", [256, 257])
def test_windows_may_follow_the_text_and_attention_stay_within_documents(tmp_path, monkeypatch, bos):
    special = {"<|endoftext|>": 256, "<|begin|>": 257}
    Tokenizer({bytes([b]): b for b in range(256)}, [], special, bos=bos).save(tmp_path / "tok")
    (tmp_path / "many.txt").write_text("".join(f"{i} is a number|" for i in range(400)))
    drawn, real = [], training.step

    def record(model, batches, *args, **options):
        drawn.extend(batches)
        return real(model, batches, *args, **options)

    monkeypatch.setattr(training, "step", record)
    flags = dict(split_at="|", order="sequential", steps=3, tokenizer=tmp_path / "tok")
    assert run(tmp_path / "many.txt", tmp_path / "run", "--within", **flags) == 0
    text = np.concatenate([tokens.ravel() for tokens, _, _ in drawn])
    train = Dataset.open(tmp_path / "run" / "data").train
    np.testing.assert_array_equal(text, train.read(0, len(text)))
    for tokens, _, starts in drawn:
        np.testing.assert_array_equal(starts, document_starts(tokens, bos))
        assert starts.max() > 0


# ---- stop and resume ----------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(text, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(text, whole, steps=30, eval_every=6, save_every=10, keep=0) == 0
    shutil.copytree(whole, halves)
    for late in ("step_20", "step_30"):
        shutil.rmtree(halves / late)
    assert run(text, halves, "--resume", steps=30, eval_every=6, save_every=10, keep=0) == 0
    same_run(whole, halves, 20)
    same_run(whole, halves, 30)


def stop_at(monkeypatch, number, stop_step):
    """Send ourselves a signal while that step runs."""
    real = training.step

    def interrupted(model, *args, **options):
        if model.step == stop_step - 1:
            signal.raise_signal(number)
        return real(model, *args, **options)

    monkeypatch.setattr(training, "step", interrupted)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_resumes(text, tmp_path, monkeypatch, capsys, number, code):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, number, 7)
        assert run(text, tmp_path / "run", steps=12) == code
    assert signal.getsignal(number) == before
    assert f"barelm train --resume --out {tmp_path / 'run'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "step_7").is_dir()
    assert command.main(["train", "--resume", "--out", str(tmp_path / "run"), "--threads", "1"]) == 0
    assert run(text, tmp_path / "whole", steps=12) == 0
    same_run(tmp_path / "run", tmp_path / "whole", 12)


def wait_for_a_step(out, process):
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "log.jsonl").exists() and '"loss"' in (out / "log.jsonl").read_text():
            return
        time.sleep(0.05)


def test_ctrl_c_reaches_a_real_process(text, tmp_path):
    out = tmp_path / "run"
    path = os.pathsep.join([str(Path(barelm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "barelm", *arguments(text, out, steps=1_000_000)]
    env = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            wait_for_a_step(out, process)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert f"continue  barelm train --resume --out {out}" in said and "Traceback" not in said
    done = max(record["step"] for record in log(out))
    assert (out / f"step_{done}").is_dir()
    assert run(text, out, "--resume", steps=done + 2) == 0
    assert Model.load(out / f"step_{done + 2}").step == done + 2


FILES = ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "config.json", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["cut", "gone", "altered"])
def test_a_torn_checkpoint_is_refused_by_name_and_the_one_before_is_used(text, tmp_path, capsys, name, harm):
    out = tmp_path / "run"
    assert run(text, out, steps=6, save_every=3) == 0
    path = out / "step_6" / name
    data = path.read_bytes()
    path.unlink()
    if harm != "gone":
        path.write_bytes(data[:-5] if harm == "cut" else data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    capsys.readouterr()
    assert run(text, out, "--resume", steps=6, save_every=3) == 0
    said = capsys.readouterr().out
    assert f"refused   {out / 'step_6'}: " in said and f"resumed   {out / 'step_3'}" in said
    assert Model.load(out / "step_6").step == 6  # written again, in the place of the torn one


def test_a_checkpoint_of_no_run_is_refused(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(text, out, steps=6, save_every=3) == 0
    Model.load(out / "step_6").save(out / "step_6")  # whole, but without what a run must know
    assert run(text, out, "--resume", steps=6, save_every=3) == 0
    assert f"refused   {out / 'step_6'}: no state.json, or not one of a run" in capsys.readouterr().out


def test_old_checkpoints_go_and_a_torn_one_does_not_count(text, tmp_path):
    out = tmp_path / "run"
    assert run(text, out, steps=10, save_every=2, keep=2) == 0
    (out / "step_99").mkdir()  # torn: nothing is in it
    assert run(text, out, "--resume", steps=14, save_every=2, keep=2) == 0
    assert sorted(path.name for path in out.glob("step_*")) == ["step_12", "step_14", "step_99"]


def test_resume_refuses_what_contradicts_the_run(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(text, out, steps=2) == 0
    assert "--n-embd: 32 contradicts" in refused(capsys, ["train", "--resume", "--out", out, "--n-embd", 32])
    the_default = ["--lr", training.TrainConfig.lr]
    assert "--lr: 0.0 contradicts" in refused(capsys, ["train", "--resume", "--out", out, *the_default])
    other = tmp_path / "other.txt"
    other.write_text(TEXT + "!")
    assert "other.txt contradicts the run" in refused(capsys, ["train", "--resume", "--out", out, "--data", other])
    assert "no run to resume" in refused(capsys, ["train", "--resume", "--out", tmp_path / "nothing"])
    assert "already holds a run" in refused(capsys, ["train", "--out", out])


def test_without_a_good_checkpoint_there_is_nothing_to_resume(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(text, out, steps=2) == 0
    (out / "step_2" / "model.safetensors").write_bytes(b"")
    assert "no checkpoint that can be resumed" in refused(capsys, ["train", "--resume", "--out", out])
    for text_of_it in "{}", "[" * 100_000:
        (out / "run.json").write_text(text_of_it)
        assert "run.json: not the description of a run" in refused(capsys, ["train", "--resume", "--out", out])


def test_a_run_that_died_before_its_first_checkpoint_begins_again(text, tmp_path, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    for folder in (out, whole):
        assert run(text, folder, steps=3) == 0
    shutil.rmtree(out / "step_3")
    text.unlink()  # its tokens are in the run's folder
    capsys.readouterr()
    assert command.main(["train", "--resume", "--out", str(out)]) == 0
    assert "no checkpoint yet, it begins again" in capsys.readouterr().out
    same_run(out, whole, 3)


def test_a_run_goes_on_with_the_tokens_it_began_with(text, tmp_path, capsys):
    """Its own shards are checked; shards of the user's may move, but not change."""
    own, shards, out = tmp_path / "own", tmp_path / "shards", tmp_path / "run"
    assert run(text, own, steps=2) == 0
    text.write_text("something else")
    assert command.main(["train", "--resume", "--out", str(own), "--steps", "3"]) == 0
    text.write_text(TEXT)
    assert command.main(["data", "--data", str(text), "--out", str(shards)]) == 0
    assert run(shards, out, steps=2) == 0 and not (out / "data").exists()
    shards.rename(tmp_path / "moved")
    goes_on = ["train", "--resume", "--out", str(out), "--steps", "3", "--data"]
    assert command.main([*goes_on, str(tmp_path / "moved")]) == 0
    text.write_text(TEXT + "!")
    assert command.main(["data", "--data", str(text), "--out", str(tmp_path / "other")]) == 0
    capsys.readouterr()
    assert "has no checkpoint that can be resumed" in refused(capsys, [*goes_on, tmp_path / "other"])


def test_the_best_checkpoint_is_kept(text, tmp_path, monkeypatch):
    scores = iter([5.0, 4.0, 2.0, 3.0, 2.5, 2.4])
    real = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *args: real(*args)._replace(loss=next(scores)))
    out = tmp_path / "run"
    assert run(text, out, "--keep-best", steps=10, eval_every=2, save_every=4, keep=1) == 0
    assert sorted(path.name for path in out.glob("step_*")) == ["step_10", "step_4"]


# ---- the guard ----------------------------------------------------------------------------------------------------


def break_steps(monkeypatch, steps):
    """An infinite gradient in these steps of the run, whatever they are called with."""
    seen, real = [0], training.step

    def broken(model, *args, **options):
        seen[0] += 1

        class Broken:
            def accumulate(self, *a, **o):
                model.accumulate(*a, **o)
                if seen[0] in steps:
                    model.grads["h.0.attn.c_proj.weight"][0, 1] = np.inf

            def __getattr__(self, name):
                return getattr(model, name)

        return real(Broken(), *args, **options)

    monkeypatch.setattr(training, "step", broken)


def test_a_bad_step_is_skipped_told_and_survives_a_resume(text, tmp_path, monkeypatch, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = dict(steps=WARM + 8, save_every=WARM + 2, keep=0)
    break_steps(monkeypatch, {3, WARM + 1})
    assert run(text, whole, **flags) == 0
    said = capsys.readouterr().out
    assert "step 3  skipped: the gradient of h.0.attn.c_proj.weight is not finite" in said
    assert f"{WARM + 8} steps, 2 of them skipped" in said
    assert [r["step"] for r in log(whole) if "skipped" in r] == [3, WARM + 1]
    assert Model.load(whole / f"step_{WARM + 8}").step == WARM + 6
    assert "is not finite" in (whole / "report.md").read_text()
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / f"step_{WARM + 8}")
    assert run(text, halves, "--resume", **flags) == 0
    same_run(whole, halves, WARM + 8)


def test_a_run_of_bad_steps_stops_and_names_the_last_good_checkpoint(text, tmp_path, monkeypatch, capsys):
    break_steps(monkeypatch, range(5, 100))
    assert run(text, tmp_path / "run", steps=20, save_every=2, guard_stop=3) == 1
    said = capsys.readouterr().err
    assert "step 7: 3 steps in a row skipped, the last: the gradient of h.0.attn.c_proj.weight is not finite" in said
    assert f"the newest checkpoint is {tmp_path / 'run' / 'step_6'}; try a lower --lr" in said


# ---- what is refused ----------------------------------------------------------------------------------------------

BAD = {
    "--n-head": -1,
    "--n-layer": -2,
    "--n-embd": -1,
    "--n-kv-head": 5,
    "--context": -1,
    "--batch": -1,
    "--tokens-per-step": 1000,
    "--schedule": "linear",
    "--order": "backwards",
    "--guard": -1,
    "--guard-stop": 0,
    "--val-fraction": 1,
    "--val-fraction ": 0,
    "--lr-end": 1.5,
    "--decay": -0.1,
    "--depth": -1,
    "--preset": "gpt5",
    "--steps": -1,
    "--minutes": "nan",
    "--lr": -1,
    "--warmup": -1,
    "--weight-decay": -1,
    "--beta1": 1,
    "--beta2": -0.1,
    "--clip": -1,
    "--seed": -1,
    "--precision": "fp8",
    "--eval-every": -1,
    "--threads": -1,
    "--keep": "x",
    "--batch ": 2**40,
}


@pytest.mark.parametrize("flag", BAD)
def test_a_bad_value_is_refused_by_its_flag(tmp_path, capsys, flag):
    said = refused(capsys, ["train", "--out", tmp_path / "run", flag.strip(), BAD[flag]])
    assert said.startswith(f"barelm: {flag.strip()}: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["train", "--n-laier", "3"], "unknown flag '--n-laier', did you mean '--n-layer'?"),
        (["train", "--step", "3"], "unknown flag '--step', did you mean '--steps'?"),
        (["trian"], "unknown command 'trian', did you mean 'train'?"),
        (["train", "books"], "'books' stands alone"),
        (["sample"], "--checkpoint must be given"),
        (["sample", "--checkpoint", "/nowhere"], "/nowhere: no such folder"),
        (["train", "--data", "/nowhere"], "/nowhere: no such file or folder"),
        (["train", "--tokenizer", "/nowhere"], "/nowhere: no such file"),
        (["demo", "--minutes", "0"], "--minutes: "),
        (["train", "--n-head", "3"], "--n-embd: is 256, must be a multiple of n_head 3"),
        (["train", "--preset", "gpt2", "--depth", "3"], "--depth: a preset has its own"),
        (["train", "--batch", "5", "--tokens-per-step", "1000"], "--tokens-per-step: 1000 is not a multiple of"),
    ],
)
def test_a_mistyped_command_is_explained(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, argv)


def test_a_text_that_is_too_short_is_refused(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    said = refused(capsys, arguments(tmp_path / "short.txt", tmp_path / "run"))
    assert "context: a window of 16 needs 17 tokens, the training text has only 10" in said


def test_debug_shows_where_an_error_arose(monkeypatch):
    monkeypatch.setenv("BARELM_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown flag"):
        command.main(["train", "--nothing"])


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_helps_and_every_field_is_a_flag_with_words(name, capsys):
    assert command.main([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    module = importlib.import_module(f"barelm.{command.COMMANDS[name].module}")
    config = getattr(module, command.COMMANDS[name].config)
    for field, _ in command._flags(config):
        word = "--" + field.name.replace("_", "-")
        word = field.name.upper() if field.name in getattr(config, "positional", ()) else word
        found = re.search(rf"\n  {word}(?![\w-])(.*?)(?=\n  -|\Z)", said, re.DOTALL)
        assert len(found[1].split()) > 1
    assert name in command._overview()


def test_version_and_overview(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"barelm {barelm.__version__}\n"
    assert command.main([]) == 0
    assert "usage: barelm COMMAND" in capsys.readouterr().out


# ---- what follows training ----------------------------------------------------------------------------------------


def test_sample_continues_from_a_run_the_same_for_the_same_seed(text, tmp_path, capsys):
    assert run(text, tmp_path / "run", steps=20) == 0
    capsys.readouterr()

    def sample(*more):
        assert command.main(["sample", "--checkpoint", str(tmp_path / "run"), "--max-tokens", "20", *more]) == 0
        return capsys.readouterr().out

    first = sample("--prompt", "1 and ")
    assert first.startswith("1 and ") and first == sample("--prompt", "1 and ")
    assert first != sample("--prompt", "1 and ", "--seed", "1")
    two = [json.loads(line) for line in sample("--json", "--n", "2").splitlines()]
    assert len(two) == 2 and two[0]["text"] != two[1]["text"]


def test_what_sample_says_of_its_tokens_is_what_forward_says(text, tmp_path, capsys):
    """Whatever distribution they were drawn from.  Tolerance: forward rounds to float32, a few units of 6e-8 at values
    up to 20."""
    assert run(text, tmp_path / "run", steps=20) == 0
    capsys.readouterr()
    argv = ["sample", "--checkpoint", str(tmp_path / "run"), "--json", "--max-tokens", "12", "--prompt", "1 a"]
    assert command.main([*argv, "--temperature", "1.5", "--top-k", "30"]) == 0
    said = json.loads(capsys.readouterr().out)
    model, tok = Model.load(tmp_path / "run" / "step_20"), Tokenizer.load(tmp_path / "run" / "step_20")
    ids = np.array([tok.encode("1 a") + said["ids"]], np.int32)
    want = model.forward(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]))[0, 2:]
    assert tok.decode(said["ids"]) == said["text"] and len(said["logprobs"]) == 12
    np.testing.assert_allclose(said["logprobs"], want, rtol=0, atol=5e-6)


@pytest.mark.slow
def test_the_demo_does_all_that_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)  # taken
    assert command.main(["demo", "--minutes", "0.2"]) == 0
    said = capsys.readouterr().out
    scores = re.search(r"([\d.]+) -> ([\d.]+) bits per byte .* \(([\d.]+) by counting, with a 5-gram model\)", said)
    before, after, counted = map(float, scores.groups())
    assert before > after and before > counted > 1
    assert "4,096 learned in" in said and "'def '" in said and "runs/demo-2/report.md" in said
    assert Tokenizer.load(tmp_path / "runs" / "demo-2").n_vocab == 4096


def test_doctor_tells_what_is_here(monkeypatch, capsys):
    assert command.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["broken"] == [] and report["barelm"]["version"] == barelm.__version__
    assert "FLOP/s" in report["speed"]["peak fp32"] and report["python"]["numpy"] == np.__version__
    monkeypatch.setattr(barelm._core, "copy_bandwidth", lambda: 2e9)  # measured above; it takes seconds
    assert command.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "CUDA" in said and "2 GB/s" in said


def test_doctor_says_what_is_broken(monkeypatch, capsys):
    def no_kernels(*_, **__):
        raise RuntimeError("no kernels")

    monkeypatch.setattr(barelm._core, "peak_flops", no_kernels)
    assert command.main(["doctor"]) == 1
    assert "broken: the kernels do not run: RuntimeError: no kernels" in capsys.readouterr().out


def test_what_is_not_named_follows_from_what_is():
    def settled(**flags):
        return training.settle(training.TrainConfig(**flags), 4096)

    small = settled()
    assert (small.n_layer, small.n_embd, small.context, small.batch, small.steps) == (4, 256, 256, 8, 1000)
    assert small.tokens_per_step == 8 * 256 and small.lr == 1e-3
    by_depth = settled(depth=4)
    assert (by_depth.n_layer, by_depth.n_embd, by_depth.context) == (4, 256, 512)
    assert by_depth.tokens_per_step == 2**16 and by_depth.batch == 8 and by_depth.steps > 500
    odd = settled(depth=4, batch=3)  # the step is made of whole micro-batches
    assert odd.tokens_per_step % (3 * 512) == 0 and abs(odd.tokens_per_step - 2**16) <= 3 * 256
    named = settled(preset="gpt2", steps=7, lr=1e-5, tokens_per_step=2048, batch=1)
    assert (named.n_layer, named.steps, named.lr, named.tokens_per_step) == (12, 7, 1e-5, 2048)
    assert settled(minutes=2.0).steps == 0

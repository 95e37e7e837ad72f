"""Training through the command line: it learns, stops, resumes to the same bits, and names flags in its errors."""

import importlib
import json
import os
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
from barelm.loop import flops_per_token, step, warmup_cosine

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


def without_clocks(records):
    clocks = ("seconds", "tokens_per_second")
    return [{name: value for name, value in record.items() if name not in clocks} for record in records]


def same_model(a, b):
    a, b = Model.load(a), Model.load(b)
    assert a.step == b.step and list(a.params) == list(b.params)
    for name in a.params:
        np.testing.assert_array_equal(a.params[name], b.params[name], err_msg=name)


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
    assert sorted(path.name for path in out.iterdir()) == ["curve.svg", "log.jsonl", "report.md", "run.json", "step_40"]
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
    drawn, real = [], training.TokenData.batch

    def batch(self, step, micro, *sizes):
        drawn.append((step, micro))
        return real(self, step, micro, *sizes)

    monkeypatch.setattr(training.TokenData, "batch", batch)
    assert run(text, tmp_path / "run", steps=2, accumulate=3) == 0
    assert drawn == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


# ---- stop and resume ----------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(text, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(text, whole, steps=30, eval_every=6, save_every=10, keep=0) == 0
    shutil.copytree(whole, halves)
    for late in ("step_20", "step_30"):
        shutil.rmtree(halves / late)
    assert run(text, halves, "--resume", steps=30, eval_every=6, save_every=10, keep=0) == 0
    same_model(whole / "step_30", halves / "step_30")
    same_model(whole / "step_20", halves / "step_20")
    assert without_clocks(log(whole)) == without_clocks(log(halves))


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
    same_model(tmp_path / "run" / "step_12", tmp_path / "whole" / "step_12")


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
    assert "--lr: 0.001 contradicts" in refused(capsys, ["train", "--resume", "--out", out, *the_default])
    other = tmp_path / "other.txt"
    other.write_text(TEXT + "!")
    assert "--data: the corpus is not" in refused(capsys, ["train", "--resume", "--out", out, "--data", other])
    text.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "moved.txt")
    assert "no such file" in refused(capsys, ["train", "--resume", "--out", out])
    assert "no run to resume" in refused(capsys, ["train", "--resume", "--out", tmp_path / "nothing"])
    assert "already holds a run" in refused(capsys, ["train", "--out", out])


def test_without_a_good_checkpoint_there_is_nothing_to_resume(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(text, out, steps=2) == 0
    (out / "step_2" / "model.safetensors").write_bytes(b"")
    assert "no checkpoint that can be resumed" in refused(capsys, ["train", "--resume", "--out", out])
    shutil.rmtree(out / "step_2")
    assert run(text, out, steps=3) == 0  # so it may begin again, with a log of its own
    assert [record["step"] for record in log(out) if "loss" in record] == [1, 2, 3]
    (out / "run.json").write_text("{}")
    assert "run.json: not the description of a run" in refused(capsys, ["train", "--resume", "--out", out])


# ---- what is refused ----------------------------------------------------------------------------------------------

BAD = {
    "--n-head": 3,
    "--n-layer": 0,
    "--n-embd": -1,
    "--n-kv-head": 5,
    "--context": 0,
    "--batch": 0,
    "--accumulate": 0,
    "--steps": -1,
    "--minutes": "nan",
    "--lr": 0,
    "--min-lr": 5,
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
    ],
)
def test_a_mistyped_command_is_explained(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, argv)


def test_a_text_that_is_too_short_is_refused(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    said = refused(capsys, arguments(tmp_path / "short.txt", tmp_path / "run"))
    assert "context: a window of 16 needs 17 tokens, the training text has only 9" in said


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch, capsys):
    real = training.step

    def broken(model, *args, **options):
        if model.step == 3:
            raise FloatingPointError("the loss is nan")
        return real(model, *args, **options)

    monkeypatch.setattr(training, "step", broken)
    assert run(text, tmp_path / "run", steps=9, save_every=2) == 1
    said = capsys.readouterr().err
    assert "step 4: the loss is nan at learning rate" in said
    assert f"{tmp_path / 'run' / 'step_2'}; try a lower --lr" in said


def test_debug_shows_where_an_error_arose(monkeypatch):
    monkeypatch.setenv("BARELM_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown flag"):
        command.main(["train", "--nothing"])


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_helps_and_every_field_is_a_flag_with_words(name, capsys):
    assert command.main([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    module = importlib.import_module(f"barelm.{command.COMMANDS[name].module}")
    for field, _ in command._flags(getattr(module, command.COMMANDS[name].config)):
        line = next(line for line in said.splitlines() if line.strip().startswith("--" + field.name.replace("_", "-")))
        assert len(line.split()) > 3
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


# ---- the loop's parts ---------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_falls_and_ends_at_its_end():
    rates = [warmup_cosine(i, 1.0, 0.1, 10, i / 100) for i in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[100] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1, abs=0.02)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert warmup_cosine(0, 1.0, 0.1, 0, 0.0) == 1.0
    assert warmup_cosine(50, 1.0, 0.0, 0, 0.5) == pytest.approx(0.5)
    assert warmup_cosine(5, 1.0, 0.1, 0, 7.0) == pytest.approx(0.1)


class Recorder:
    """A model that keeps what it is asked."""

    def __init__(self, loss=1.0, norm=2.0):
        self.loss, self.norm, self.weights, self.updates = loss, norm, [], []

    def forward_backward(self, tokens, targets, weights):
        assert weights.dtype == np.float32 and weights.shape == targets.shape
        self.weights.append(weights)
        return self.loss

    def update(self, **options):
        self.updates.append(options)
        return self.norm


def test_every_token_of_a_step_weighs_the_same_whatever_its_micro_batch():
    model = Recorder()
    tokens = np.zeros((1, 4), np.int32)
    batches = [(tokens, np.array([[1, 2, -1, -1]], np.int32)), (tokens, np.array([[1, 2, 3, -1]], np.int32))]
    result = step(model, batches, 0.5, betas=(0.8, 0.9), weight_decay=0.2, clip=3.0)
    assert [w.tolist() for w in model.weights] == [[[np.float32(0.2)] * 2 + [0, 0]], [[np.float32(0.2)] * 3 + [0]]]
    assert model.updates == [{"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.2, "clip": 3.0}]
    assert result == (2.0, 2.0, 5)


def test_a_step_that_went_wrong_raises_and_touches_no_weights():
    tokens = np.zeros((1, 2), np.int32)
    model = Recorder(loss=float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan"):
        step(model, [(tokens, tokens)], 0.1)
    assert model.updates == []
    with pytest.raises(FloatingPointError, match="norm of the gradient is inf"):
        step(Recorder(norm=float("inf")), [(tokens, tokens)], 0.1)
    with pytest.raises(ValueError, match="no target"):
        step(Recorder(), [(tokens, tokens - 1)], 0.1)


def test_operations_of_gpt2_are_six_for_each_weight_and_the_scores():
    config = barelm.Config.preset("gpt2")
    matrices = 12 * (4 * 768 * 768 + 8 * 768 * 768) + 768 * 50257
    assert flops_per_token(config, 1024) == 6 * (matrices + 12 * 768 * 1025)

"""`barelm plan`: counts against those made by hand and real models, memory against a real process, time against a clock
of our own."""

import dataclasses
import json
import subprocess
import sys

import pytest
from barelm import Config, Model, _core
from barelm import __main__ as command
from barelm import plan as planning
from barelm.hardware import GPUS, HISTORY, ON_A100, ON_H100
from barelm.loop import flops_per_token
from barelm.plan import How, PlanConfig, Timing, measure, memory, plan, tensors
from barelm.settings import TrainConfig, settle

COUNTED = dict(measure=False)


# ---- counts -------------------------------------------------------------------------------------------------------


def test_tensors_are_those_of_the_model(tiny_config):
    config = Config(**tiny_config)
    names = {}
    for name, p in Model(config).params.items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        shape, copies = names.get(kind, (p.shape, 0))
        assert shape == p.shape
        names[kind] = (shape, copies + 1)
    assert {t.name: (t.shape, t.copies) for t in tensors(config)} == names
    assert len(tensors(config)) == len(names)


@pytest.mark.parametrize(
    "flags, total",
    [
        (dict(preset="gpt2"), 124_439_808),
        (dict(preset="gpt2-xl"), 1_557_611_200),
        (dict(preset="llama-3.2-1b"), 1_235_814_400),  # as its authors count it
        (dict(preset="llama-3-8b"), 8_030_261_248),
        (dict(depth=12), 124_439_808),
    ],
    ids=str,
)
def test_known_models_have_their_known_size(flags, total):
    found = plan(PlanConfig(**COUNTED, **flags))["parameters"]
    assert found["total"] == total == sum(row["count"] for row in found["tensors"])
    assert sum(row["share"] for row in found["tensors"]) == pytest.approx(1)
    assert found["embeddings"] + found["without_embeddings"] == total


def test_gpt2_by_hand():
    found = plan(PlanConfig(**COUNTED, preset="gpt2"))
    C, V, T, L = 768, 50257, 1024, 12
    layer = 3 * C * C + 3 * C + C * C + C + 4 * C * C + 4 * C + 4 * C * C + C + 4 * C
    assert found["parameters"]["total"] == V * C + T * C + L * layer + 2 * C
    assert found["parameters"]["embeddings"] == (V + T) * C
    # two operations for each weight that multiplies and for half of all pairs in q.k and p.v, three times
    assert found["flops"]["per_token"] == 6 * (12 * C * C * L + V * C + L * C * (T + 1)) == 797_870_592
    assert found["flops"]["run"] == 797_870_592 * found["run"]["tokens"]


def test_the_run_is_the_one_that_train_would_make():
    run = plan(PlanConfig(**COUNTED, depth=12))["run"]
    settled = settle(TrainConfig(depth=12), 50257)
    for name in ("batch", "context", "steps", "tokens_per_step", "lr"):
        assert run[name] == getattr(settled, name)
    assert run["accumulate"] * run["batch"] * run["context"] == run["tokens_per_step"] == 2**18
    assert run["tokens"] == run["steps"] * 2**18
    assert run["tokens_per_weight"] == pytest.approx(10, rel=1 / run["steps"])  # whole steps


def test_the_run_is_as_asked():
    run = plan(PlanConfig(**COUNTED, depth=12, batch=4, tokens_per_step=2**19, tokens=2**29))["run"]
    assert (run["accumulate"], run["steps"], run["tokens"]) == (128, 1024, 2**29)
    run = plan(PlanConfig(gpu="h100", gpus=3, depth=12))["run"]  # a step that suits does not go onto 3: nearly as much
    assert run["tokens_per_step"] % (3 * run["batch"] * 1024) == 0
    assert run["tokens_per_step"] == pytest.approx(2**18, rel=3 * run["batch"] * 1024 / 2**18)


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_is_the_models_on_whole_pages_and_the_rest(precision):
    config = Config.preset("gpt2")
    purposes, model = memory(config, 4, 4096, How(precision)), config.memory(4, precision=precision)
    for purpose, size in model.items():
        assert size <= purposes[purpose] < size + 2**21
        assert purposes[purpose] % (2**21 if size >= 2**21 else 2**12) == 0
    assert purposes["batches"] == 4096 * 8 + 4 * 1024 * 12
    assert set(purposes) == {*model, "batches", "kernels", "program"}
    found = plan(PlanConfig(**COUNTED, preset="gpt2", batch=4, precision=precision))["memory"]
    assert found["total"] == sum(found["purposes"].values())


TRAIN = """
import json, sys
import numpy as np
from barelm import plan
from barelm.loop import step
from barelm.model import Model
config = plan.PlanConfig(**json.loads(sys.argv[1]), measure=False)
planned = plan.plan(config)
model = Model(plan.Config(**planned["model"]["config"]), precision=config.precision)
for _ in range(2):
    shape = (2, planned["run"]["batch"], planned["run"]["context"])
    n = planned["run"]["accumulate"]
    step(model, [np.random.default_rng(0).integers(0, config.vocab, shape, dtype=np.int32) for _ in range(n)], 1e-3)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps([planned["memory"]["total"], int(peak.split()[1]) * 1024]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the process's peak")
@pytest.mark.parametrize(
    "flags",
    [
        dict(n_layer=4, n_head=4, n_embd=256, context=128, vocab=1000, batch=8, tokens_per_step=2048),
        dict(n_layer=2, n_head=4, n_embd=256, context=64, vocab=30000, batch=4, tokens_per_step=256, precision="bf16"),
        dict(family="llama", n_layer=6, n_head=4, n_embd=192, context=256, vocab=512, batch=4, tokens_per_step=1024),
    ],
    ids=["gpt2", "bf16, many ids", "llama"],
)
def test_memory_is_what_a_process_takes(flags):
    run = subprocess.run([sys.executable, "-c", TRAIN, json.dumps(flags)], capture_output=True, text=True, check=True)
    planned, taken = json.loads(run.stdout)
    assert planned == pytest.approx(taken, rel=0.05)


# ---- time ---------------------------------------------------------------------------------------------------------

RATE = 1e9  # operations a second of the machine that the clock below belongs to


class Clock:
    """A clock that stands still but for what a FakeModel does."""

    def __init__(self):
        self.now, self.seen = 0.0, []

    def __call__(self):
        return self.now


@pytest.fixture
def machine(monkeypatch):
    """A machine whose speed is known: passes by their operations, 10 % more where they add; updates by the layers."""
    clock = Clock()

    class FakeModel:
        def __init__(self, config, precision, weights):
            self.config, self.adds = config, False

        def forward_backward(self, tokens, targets, weights):
            B, T = tokens.shape
            assert targets.shape == weights.shape == (B, T) and tokens.max() < self.config.vocab_size
            clock.seen.append((self.config.n_layer, B, T))
            seconds = flops_per_token(self.config, T) * B * T / RATE
            clock.now += seconds * (1.1 if self.adds else 1)
            self.adds = True

        def update(self, lr):
            clock.now += 2.0 + 0.5 * self.config.n_layer
            self.adds = False

    monkeypatch.setattr(planning, "Model", FakeModel)
    monkeypatch.setattr(planning, "clock", clock)
    return clock


SMALL = Config(n_layer=10, n_head=2, n_embd=32, vocab_size=100, context=64)


def exact(config, B):
    first = flops_per_token(config, config.context) * B * config.context / RATE
    return Timing(first, 1.1 * first, 2.0 + 0.5 * config.n_layer, "")


def assert_same_times(got, want):
    assert got[:3] == pytest.approx(want[:3], rel=1e-9)  # rounding of the clock


def test_what_fits_is_timed_as_it_is(machine):
    got = measure(SMALL, 4, How(), free=2**40, peak=RATE, say=[].append)
    assert got.how == "timed" and set(machine.seen) == {(10, 4, 64)}
    assert_same_times(got, exact(SMALL, 4))


@pytest.mark.parametrize("what", ["time", "memory"])
def test_what_does_not_fit_is_extrapolated(machine, what):
    B = 4096
    whole = flops_per_token(SMALL, 64) * B * 64
    limits = dict(free=2**40, peak=whole / 100) if what == "time" else dict(free=10**8, peak=1e15)
    said = []
    got = measure(SMALL, B, How(), **limits, say=said.append)
    assert {layers for layers, _, _ in machine.seen} >= {1} and max(machine.seen)[0] <= 8
    assert max(B_here for _, B_here, _ in machine.seen) < B
    assert said[0].removeprefix("timing ") == got.how.removeprefix("extrapolated from ")
    assert_same_times(got, exact(SMALL, B))


def test_shorter_windows_are_extrapolated_too(machine):
    config = dataclasses.replace(SMALL, context=4096)
    one_window = flops_per_token(dataclasses.replace(config, n_layer=2), 4096) * 4096
    got = measure(config, 2, How(), free=2**40, peak=one_window / 10, say=[].append)
    assert max(T for _, _, T in machine.seen) < 4096
    assert_same_times(got, exact(config, 2))


def test_where_nothing_fits_nothing_is_timed(machine):
    assert measure(SMALL, 4, How(), free=1000, peak=1e15, say=[].append) is None and not machine.seen


def test_the_first_step_is_not_counted_and_the_best_of_the_others_is(machine, monkeypatch):
    real, calls = planning.Model.forward_backward, []

    def noisy(self, *arrays):
        real(self, *arrays)
        calls.append(machine.now)
        machine.now += {1: 1000.0, 4: 0.7}.get(len(calls), 0.0)

    monkeypatch.setattr(planning.Model, "forward_backward", noisy)
    monkeypatch.setattr(planning, "SECONDS_IN_ALL", 100.0)
    assert_same_times(measure(SMALL, 1, How(), free=2**40, peak=RATE, say=[].append), exact(SMALL, 1))
    assert len(calls) >= 6


def test_a_step_is_its_micro_batches_and_an_update():
    timing = Timing(2.0, 3.0, 0.5, "")
    assert timing.step(1) == 2.5 and timing.step(4) == 11.5


def test_the_run_takes_its_steps(machine, monkeypatch):
    monkeypatch.setattr(_core, "peak_flops", lambda precision, seconds: RATE)
    monkeypatch.setattr(_core, "memory_available", lambda: 2**40)
    flags = dict(n_layer=10, n_head=2, n_embd=32, vocab=100, context=64, batch=4, tokens_per_step=1024, tokens=10240)
    found = plan(PlanConfig(**flags, price=7200.0))
    want = exact(SMALL, 4).step(4)
    assert found["time"]["step"] == pytest.approx(want) and found["time"]["run"] == pytest.approx(10 * want)
    assert found["time"]["dollars"] == pytest.approx(20 * want)  # $7200 an hour are $2 a second
    assert found["time"]["tokens_per_second"] == pytest.approx(1024 / want)
    assert found["time"]["share_of_peak"] == pytest.approx(flops_per_token(SMALL, 64) * 1024 / want / RATE)
    assert plan(PlanConfig(**flags))["time"]["dollars"] is None


# ---- GPUs ---------------------------------------------------------------------------------------------------------


def test_the_runs_that_gpus_are_measured_by_come_out_as_they_went():
    """llm.c says 94 minutes and about $20 for GPT-2 124M, 24 hours and $672 for 1558M."""
    small = PlanConfig(preset="gpt2", gpu="a100-80", gpus=8, batch=64, tokens_per_step=2**19, tokens=18_865 * 2**19)
    found = plan(small)["time"]
    assert found["run"] / 60 == pytest.approx(94.3, abs=0.1) and found["dollars"] == pytest.approx(22, abs=0.1)
    large = PlanConfig(preset="gpt2-xl", gpu="h100", gpus=8, batch=16, tokens_per_step=2**20, tokens=32_000 * 2**20)
    found = plan(large)["time"]
    assert found["run"] / 3600 == pytest.approx(24) and found["dollars"] == pytest.approx(672)
    assert ON_A100.share == pytest.approx(0.559, abs=0.001) and ON_H100.share == pytest.approx(0.481, abs=0.001)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_gives_a_plan(name):
    gpu = GPUS[name]
    found = plan(PlanConfig(preset="gpt2", gpu=name, batch=1))
    assert found["time"]["share_of_peak"] == gpu.reference.share
    assert found["time"]["step"] * gpu.flops * gpu.reference.share == pytest.approx(
        found["flops"]["per_token"] * found["run"]["tokens_per_step"]
    )
    assert found["time"]["dollars"] == pytest.approx(found["time"]["run"] / 3600 * gpu.price)
    needed = Config.preset("gpt2").memory(1, precision="bf16", device="cuda")
    assert found["memory"]["total"] == sum(needed.values()) and found["memory"]["fits"]
    assert gpu.flops_source and gpu.price_source


def test_a_model_too_large_for_a_gpu_says_so():
    assert not plan(PlanConfig(preset="gpt2-xl", gpu="l4", batch=1))["memory"]["fits"]
    assert plan(PlanConfig(preset="gpt2-xl", gpu="h100", batch=1))["memory"]["fits"]


def test_the_price_is_of_one_gpu():
    one, two = (plan(PlanConfig(preset="gpt2", gpu="h100", gpus=n, price=1.0, batch=1)) for n in (1, 2))
    assert one["time"]["dollars"] == pytest.approx(two["time"]["dollars"])
    assert one["time"]["run"] == pytest.approx(2 * two["time"]["run"])


# ---- the command --------------------------------------------------------------------------------------------------


def test_json_is_all_there_is_on_standard_output(capsys):
    tiny = ["--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--vocab", "50", "--context", "8", "--batch", "2"]
    assert command.main(["plan", *tiny, "--tokens-per-step", "32", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["time"]["how"] == "timed" and found["time"]["step"] > 0 and "timing 2 windows of 8 tokens" in err
    assert found["parameters"]["total"] == Model(Config(**found["model"]["config"])).n_params
    assert found["history"] == [past._asdict() for past in HISTORY]


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], ["124,439,808", "wte.weight", "50257 x 768", "unknown: nothing was timed", "GPT-2 1558M, OpenAI"]),
        (["--gpu", "h100", "--gpus", "8"], ["on each of 8 GPUs", "989 TFLOP/s each", "$3.5 an hour", "fits"]),
        (["--batch", "4096", "--tokens-per-step", str(2**22)], ["it does not fit"]),
    ],
    ids=["here", "gpu", "too much"],
)
def test_people_are_told(capsys, flags, says):
    flags = [*flags, "--no-measure", "--preset", "gpt2"]
    assert command.main(["plan", *flags]) == 0
    out = capsys.readouterr().out
    for words in says:
        assert words in out


HOSTILE = [
    (["--preset", "gpt5"], "must be one of gpt2"),
    (["--preset", "gpt2", "--depth", "4"], "--depth: a preset has its own"),
    (["--depth", "-1"], "--depth: must be 0 or more"),
    (["--depth", "1000000"], "too large"),
    (["--batch", "-1"], "--batch: must be 0 or more"),
    (["--n-layer", "2", "--batch", "8388608"], "--batch: 8388608 windows of 256 tokens are too many"),
    (["--batch", "3", "--tokens-per-step", "4096"], "is not a multiple of --batch x --context = 3072"),
    (["--preset", "gpt5"], "--preset: is 'gpt5', must be one of gpt2"),
    (["--context", "9999999999"], "--context: 9999999999 is too large"),
    (["--vocab", "-3"], "--vocab: must be 0 or more"),
    (["--n-head", "7"], "--n-embd: is 768, must be a multiple of n_head 7"),
    (["--tokens", "-1"], "--tokens: must be 0 or more"),
    (["--tokens-per-step", "1000"], "--tokens-per-step: 1000 is not a multiple of"),
    (["--price", "nan"], "--price: must be 0 or more, got nan"),
    (["--price", "inf"], "--price: must be 0 or more, got inf"),
    (["--gpu", "h1000"], "--gpu: 'h1000' is not in the table, which has a100-40"),
    (["--gpus", "8"], "--gpus: 8 of which?"),
    (["--gpu", "h100", "--gpus", "3", "--tokens-per-step", "524288"], "does not go evenly onto 3 GPUs"),
    (["--gpu", "h100", "--gpus", "0"], "--gpus: must be above 0"),
    (["--precision", "int4"], "int4"),
    (["--threads", "-2"], "--threads: must be 0 or more"),
]


@pytest.mark.parametrize("flags, says", HOSTILE, ids=[" ".join(flags) for flags, _ in HOSTILE])
def test_mistakes_are_one_line(capsys, flags, says):
    base = [] if {"--preset", "--depth", "--n-layer"} & set(flags) else ["--preset", "gpt2"]
    assert command.main(["plan", "--no-measure", *base, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.startswith("barelm: ") and err.count("\n") == 1


def test_ctrl_c_is_a_line(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "_time", interrupted)
    assert command.main(["plan", "--n-layer", "1", "--context", "8", "--json"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("barelm: interrupted\n")
